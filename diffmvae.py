"""Multimodal ELBO with Diffusion Decoders (Diff-MVAE; Wesego and Rooshenas) in one file.

Each modality x_i has an encoder q(z|x_i). Any subset A of them fuses to q(z|x_A), a product of
Gaussians; the ELBO is an average over subsets (MoPoE). Simple modalities have feed-forward
decoders; images have a diffusion decoder conditioned on z, whose denoising score-matching loss
stands inside the ELBO. A second, small diffusion model learns the distribution of z for
unconditional samples.

Sections 1 to 7 are the method, each built on those before it; 8 to 10 train, measure and run it.
README.md says what of the paper is where, and lists all departures from it; those from its
equations are marked "Deviation" here. The notation:

    x_1 .. x_M    modalities                          z           latent, (B, D), p(z) = N(0, I)
    A, ω_A        a subset, its weight                μ, log σ²   mu, logvar of an expert or product
    t ∈ [t_0, 1]  time, t_0 = t_min                   x_t         α(t) x + σ(t) ε, with ε ~ N(0, I)
    ℓ(t)          log-SNR, log α²/σ²                  β(t), β     g(t)², the noise rate; KL's weight
    ε̂_θ(x_t,z,t)  the predicted noise                 s_θ         the score, −ε̂/σ

In shapes B is the batch, M the number of modalities, S that of subsets, D the dimensions of z.
"""

import copy
import csv
import itertools
import json
import math
import os
import platform
import re
import signal
import sqlite3
import sys
import textwrap
import threading
import time
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal
from tqdm import tqdm

try:
    import resource
except ImportError:  # on Windows
    resource = None

# ---- 1  Gaussian algebra (§2, §3.2, §3.3) --------------------------------------------------------

def product_of_experts(mu, logvar, present=None):
    """∏_i N(z; μ_i, σ_i²) up to a constant (§3.3): precisions add, means are weighted by precision.

    mu, logvar: (..., M, D), the experts on dim −2. present: (..., M) bool, all experts if None; it
    broadcasts, so one call fuses a different subset for each example. Returns mu, logvar: (..., D),
    exact at any log-variance; where no expert is present mu is NaN and logvar inf.
    """
    log_precision = -logvar  # (..., M, D)
    if present is not None:
        present = present.unsqueeze(-1)  # (..., M, 1)
        log_precision = torch.where(present, log_precision, -torch.inf)
        mu = torch.where(present, mu, 0.0)
    weight = log_precision.softmax(dim=-2)  # (..., M, D)  σ_i⁻² / Σ_j σ_j⁻²
    return (weight * mu).sum(-2), -log_precision.logsumexp(-2)


def kl_divergence(mu, logvar, mu_p=None, logvar_p=None):
    """KL(N(μ, σ²) ‖ N(μ_p, σ_p²)) in nats: (..., D) -> (...); p is N(0, I) if not given.

    ½ Σ [ (μ − μ_p)²/σ_p² + σ²/σ_p² − 1 − log σ²/σ_p² ]
    """
    mu_p = torch.zeros_like(mu) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar) if logvar_p is None else logvar_p
    log_ratio = logvar - logvar_p
    return 0.5 * ((mu - mu_p).square() * (-logvar_p).exp() + log_ratio.expm1() - log_ratio).sum(-1)


def subsets(num_modalities, family="mopoe"):
    """The family of §3.2, (S, M) bool: "mopoe" every non-empty subset, "mvae" only the full one,
    "mmvae" the single modalities. All have the same weight ω_A = 1/S."""
    every = torch.tensor(list(itertools.product([False, True], repeat=num_modalities)))[1:]
    size = every.sum(1)  # (2^M − 1,)
    if family == "mopoe":
        return every
    if family == "mvae":
        return every[size.eq(num_modalities)]
    if family == "mmvae":
        return every[size.eq(1)]
    raise ValueError(f"unknown family {family!r}: choose one of mopoe, mvae, mmvae")


def sample_gaussian(mu, logvar):
    """z ~ N(μ, σ²), reparameterised: μ + σ ε."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


# ---- 2  Forward SDE (§3.1) -----------------------------------------------------------------------

@dataclass(frozen=True)
class VPSDE:
    """dx = −½ β(t) x dt + √β(t) dw on t ∈ [0, 1], β(t) linear (Song et al. 2021, SDE).

    q(x_t|x) = N(α(t) x, σ(t)² I) is the paper's q(x_t|x_0) with ᾱ_t = α(t)². Bound and samplers
    stop at t_min. There σ = 0.0032, 0.4 of the step between two grey levels of 8 bits (2/255 on
    [−1, 1]). Rounding to levels is an error of 0.29 of a step; under a little more noise than that
    the levels blur, and a density gains nothing by being high at them and low between.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-4

    def integral(self, t):
        """B(t) = ∫_0^t β(s) ds."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t):
        """α = e^(−B/2)."""
        return (-0.5 * self.integral(t)).exp()

    def sigma(self, t):
        """σ = √(1 − e^−B)."""
        return (-(-self.integral(t)).expm1()).sqrt()

    def log_snr(self, t):
        """ℓ = log α²/σ² = −B − log(1 − e^−B)."""
        b = self.integral(t)
        return -b - (-(-b).expm1()).log()

    def g2(self, t):
        """g² = β, the squared diffusion coefficient; g²/σ² = −dℓ/dt."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def time_at(self, log_snr):
        """The t with that log-SNR: B = log(1 + e^−ℓ), then the stable root of B(t) = B."""
        b = F.softplus(-log_snr)
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())

    def log_snr_ends(self):
        """(ℓ(1), ℓ(t_min)), the least and the greatest, as floats."""
        return self.log_snr(torch.tensor([1.0, self.t_min], dtype=torch.float64)).tolist()


# ---- 3  Samplers (§4) ----------------------------------------------------------------------------

# Both start from x ~ N(0, I) at t = 1 and evaluate eps_model(x_t, t) -> ε̂ at N scalar times, for
# N − 1 steps and, at the last time, the denoised x̂0 = (x − σ ε̂)/α. It is t_min, or 1 if N = 1.

def ddim(eps_model, x, sde, evaluations):
    """DDIM (Song, Meng and Ermon 2021, Eq. 12 with η = 0). x: (B, ...) -> (B, ...).

    Its times are quadratic, as its authors had them for CIFAR-10: short steps where noise is low.
    """
    t = torch.linspace(1, math.sqrt(sde.t_min), evaluations, device=x.device).square()  # (N,)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    for i in range(evaluations):
        eps = eps_model(x, t[i])
        x0 = (x - sigma[i] * eps) / alpha[i]
        if i + 1 < evaluations:
            x = alpha[i + 1] * x0 + sigma[i + 1] * eps
    return x0


def euler_maruyama(eps_model, x, sde, evaluations):
    """Euler–Maruyama on the reverse SDE, times uniform in log-SNR. x: (B, ...) -> (B, ...).

    dx = [−½ β x − β s_θ] dt + √β dw̄, backwards in t, with s_θ = −ε̂/σ (Song et al. 2021, SDE). On
    a grid uniform in t the last step would leave noise of √(βh), a dozen grey levels at 50 steps.
    """
    ell_min, ell_max = sde.log_snr_ends()
    t = sde.time_at(torch.linspace(ell_min, ell_max, evaluations, device=x.device))  # (N,)
    for i in range(evaluations - 1):
        h, beta = t[i] - t[i + 1], sde.g2(t[i])
        score = -eps_model(x, t[i]) / sde.sigma(t[i])
        x = x + h * beta * (0.5 * x + score) + (h * beta).sqrt() * torch.randn_like(x)
    return (x - sde.sigma(t[-1]) * eps_model(x, t[-1])) / sde.alpha(t[-1])


# ---- 4  Score matching as a log-likelihood bound (Eqs. 1 and 2) ----------------------------------

def stratified(n, device=None):
    """(n,) numbers, each uniform on [0, 1), evenly spread: same expectations, less variance."""
    return (torch.rand((), device=device) + torch.randperm(n, device=device) / n) % 1


def in_bf16(network, *inputs):
    """network(*inputs); on CUDA it computes in bfloat16, and what comes out is float32 again."""
    if inputs[0].device.type != "cuda":
        return network(*inputs)
    with torch.autocast("cuda", torch.bfloat16):
        out = network(*inputs)
    if torch.is_tensor(out):
        return out.float()
    return tuple(part.float() for part in out)


def with_dims(x, ndim):
    """(B, ...) -> (B, ..., 1, 1), of ndim dimensions, to multiply what has more of them."""
    return x.view(*x.shape, *[1] * (ndim - x.ndim))


class Diffusion(nn.Module):
    """p(x|z) by denoising diffusion: the image decoder, and without z the latent prior.

    net(x_t, ℓ, z) -> v with v like x_t, ℓ: (B,), z: (B, D) or None. shape: of one x. evaluations:
    of the network for a sample, the table's if None.

                 weighting    λ(t) in Eq. 2   t uniform in   a bound, in nats   sampler, evaluations
    Diff-MVAE    likelihood   g(t)²           log-SNR ℓ      yes                Euler–Maruyama, 100
    Diff-MVAE*   simple       σ(t)², Eq. 1    t              no, a surrogate    DDIM, 20
    Diff-MVAE*   velocity     ∝ g² σ/α        angle φ        no, a surrogate    DDIM, 20

    with α = cos φ, σ = sin φ. Deviation: the paper gives Diff-MVAE* λ = 1. In Eq. 2 that would
    weigh small t still more than g² does; the works it cites have λ = 1 on Eq. 1's ε-loss:
    "simple". "velocity" has it on the network's own output, ‖v − v̂‖² = ‖ε − ε̂‖²/α² (Salimans and
    Ho 2022), with times uniform in φ: half of all t have α² < 0.08, almost pure noise. Since
    dφ = g² α/(2σ) dt, that is the λ of the table.
    """

    samplers = {"likelihood": (euler_maruyama, 100), "simple": (ddim, 20), "velocity": (ddim, 20)}

    def __init__(self, net, shape, sde=VPSDE(), weighting="likelihood", evaluations=None):
        super().__init__()
        if weighting not in self.samplers:
            raise ValueError(f"unknown weighting {weighting!r}: choose from {list(self.samplers)}")
        self.net = net
        self.shape = tuple(shape)
        self.sde = sde
        self.weighting = weighting
        self.evaluations = evaluations

    def predict_eps(self, x_t, z, t):
        """ε̂ = σ x_t + α v: the network's v is the velocity α ε − σ x. t: (B,) -> ε̂ like x_t.

        Deviation: the paper does not say what its network outputs. v leaves Eqs. 1 and 2 as they
        are, starts (v = 0) as the exact denoiser of N(0, I), and keeps x̂0 finite at high noise.
        """
        v = in_bf16(self.net, x_t, self.sde.log_snr(t), z)
        t = with_dims(t, x_t.ndim)  # (B, 1, ...)
        return self.sde.sigma(t) * x_t + self.sde.alpha(t) * v

    def error(self, x, z, t, eps):
        """‖ε − ε̂_θ(α x + σ ε, z, t)‖², of Eqs. 1, 2, 5. x, eps: (B, *shape), t: (B,) -> (B,).

        The step from Eq. 2's scores to noise: ∇ log q(x_t|x) = −ε/σ and s_θ = −ε̂/σ, so that
        ‖∇ log q − s_θ‖² = ‖ε − ε̂‖²/σ².
        """
        alpha = with_dims(self.sde.alpha(t), x.ndim)  # (B, 1, ...)
        sigma = with_dims(self.sde.sigma(t), x.ndim)
        x_t = alpha * x + sigma * eps
        return (eps - self.predict_eps(x_t, z, t)).square().flatten(1).sum(1)

    def draw_times(self, n, device):
        """(n,) times, each uniform on [t_min, 1] in what the table says."""
        ell_min, ell_max = self.sde.log_snr_ends()  # at t = 1, at t_min
        u = stratified(n, device)
        if self.weighting == "likelihood":
            return self.sde.time_at(ell_min + (ell_max - ell_min) * u)
        if self.weighting == "simple":
            return self.sde.t_min + (1 - self.sde.t_min) * u
        phi_min = math.atan(math.exp(-ell_max / 2))  # tan φ = σ/α = e^(−ℓ/2)
        phi_max = math.atan(math.exp(-ell_min / 2))
        phi = phi_min + (phi_max - phi_min) * u
        return self.sde.time_at(-2 * phi.tan().log())  # ℓ = log α²/σ² = −2 log tan φ

    def log_prob(self, x, z=None, t=None, eps=None):
        """An estimate of a lower bound b(x, z) ≤ log p(x|z) in nats, or of what stands for it.

        x: (B, *shape), z: (B, D) -> (B,). The surrogates are −½ E‖ε − ε̂‖² ("simple") and
        −½ E‖v − v̂‖² = −½ E‖ε − ε̂‖²/α² ("velocity"). t: (B,) and eps are given only to test it.
        """
        eps = torch.randn_like(x) if eps is None else eps
        t = self.draw_times(len(x), x.device) if t is None else t
        error = self.error(x, z, t, eps)  # (B,)
        if self.weighting == "likelihood":
            return self.bound(x, error)
        if self.weighting == "simple":
            return -0.5 * error
        return -0.5 * error / self.sde.alpha(t).square()

    def bound(self, x, error):
        """b(x, z) of Eq. 2 with λ = g², given ‖ε − ε̂‖² at times uniform in log-SNR: (B,) -> (B,).

        b = −KL(q(x_t|x) ‖ N(0, I)) at t = 1
            + E log N(x; x_t/α, σ²/α² I) at t = t_0
            − ½ ∫ g²/σ² E‖ε − ε̂‖² dt from t_0 to 1

        (Song et al. 2021, MLE; Kingma et al. 2021). The integral is Eq. 2. Since g²/σ² = −dℓ/dt it
        is (ℓ(t_0) − ℓ(1)) times the mean error over times uniform in ℓ. The second term needs no
        network: x − x_t/α is noise of just that variance, so it is −½ (1 + log 2π σ²/α²) a
        dimension.
        Deviation: Eq. 5 leaves out the first two terms and adds the third, where it must subtract.
        """
        ell_min, ell_max = self.sde.log_snr_ends()
        end = x.new_ones(())  # t = 1
        mean = self.sde.alpha(end) * x.flatten(1)  # (B, d)
        logvar = 2 * self.sde.sigma(end).log()
        prior = kl_divergence(mean, logvar)  # (B,)
        reconstruction = -0.5 * mean.shape[1] * (1 + math.log(2 * math.pi) - ell_max)
        score_matching = 0.5 * (ell_max - ell_min) * error  # (B,)
        return reconstruction - prior - score_matching

    @torch.no_grad()
    def sample(self, z=None, n=None, noise=None, sampler=None, evaluations=None):
        """x ~ p(x|z), one for each row of z, (B, D), or n without z. noise: x_t at t = 1,
        (B, *shape); evaluations: of the network, at least 1."""
        default_sampler, default_evaluations = self.samplers[self.weighting]
        if sampler is None:
            sampler = default_sampler
        if evaluations is None:
            evaluations = self.evaluations
        if evaluations is None:
            evaluations = default_evaluations
        if evaluations < 1:
            raise ValueError(f"{evaluations} evaluations: give at least 1")
        if noise is None:
            device = next(self.parameters()).device if z is None else z.device
            noise = torch.randn(n if z is None else len(z), *self.shape, device=device)

        def eps_model(x_t, t):
            return self.predict_eps(x_t, z, t.expand(len(x_t)))

        return sampler(eps_model, noise, self.sde, evaluations)


# ---- 5  Networks (§4.1, §4.2) --------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def group_norm(channels):
    """At most 32 groups, of at least four channels where there are as many."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


def zeroed(layer):
    """A layer that starts at zero: the end of a residual branch, or of a network."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class EmbedLogSNR(nn.Sequential):
    """ℓ, (B,), as sines and cosines of many frequencies, then two layers -> (B, size)."""

    def __init__(self, width, size):
        super().__init__(nn.Linear(2 * (width // 2), size), nn.SiLU(), nn.Linear(size, size))
        self.register_buffer("frequencies", torch.linspace(-4, 4, width // 2).exp2(), False)

    def forward(self, log_snr):
        angles = log_snr[:, None] * self.frequencies  # (B, width/2)
        return super().forward(torch.cat([angles.sin(), angles.cos()], dim=1))


class Attention(nn.Module):
    """Self-attention over positions: x + proj(softmax(q kᵀ/√d) v). (B, C, ...) -> (B, C, ...)"""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.qkv(self.norm(x).flatten(2).mT)  # (B, L, 3C)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, C)
        return x + self.proj(h).mT.reshape(x.shape)


class ResBlock(nn.Module):
    """x + conv(silu(AdaGN(conv(silu(GN(x)))))), AdaGN(h) = (1 + s) GN(h) + b, s, b linear in e.

    x: (B, c_in, ...) -> (B, c_out, ...). In the UNet: e, (B, embedding), and attention if heads.
    """

    def __init__(self, dims, c_in, c_out, embedding=0, dropout=0.0, heads=0):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = CONV[dims](c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = CONV[dims](c_out, c_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * c_out) if embedding else None
        self.dropout = nn.Dropout(dropout)
        self.skip = CONV[dims](c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else nn.Identity()
        if embedding:
            zeroed(self.conv2)

    def forward(self, x, e=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if e is not None:
            e = with_dims(self.modulation(e), x.ndim)  # (B, 2 c_out, 1, ...)
            scale, shift = e.chunk(2, dim=1)
            h = (1 + scale) * h + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


class UNet(nn.Module):
    """v(x_t, ℓ, z) in 2-D (images, the paper's latent prior of CelebA) or 1-D (that of CUB).

    x: (B, channels, size) or (B, channels, size, size), size divisible by patch · 2^(levels − 1).
    log_snr: (B,). z: (B, z_dim), or None if z_dim = 0. The sum of their embeddings conditions every
    block by adaptive group norm (after Preechakul et al. 2022); z also stands beside x_t as a
    picture that is linear in z, a first guess of x (as Pandey et al. 2022 do with a VAE's).
    attention: the levels that have it, 0 the finest; the middle has. A patch is one position inside
    (Hoogeboom et al. 2023).
    """

    def __init__(self, dims, channels, size, width, multipliers, blocks=2, attention=(), heads=8,
                 dropout=0.0, z_dim=0, patch=1):
        super().__init__()
        conv = CONV[dims]
        widths = [width * m for m in multipliers]
        embedding = max(256, 4 * width)
        last = len(widths) - 1

        def block(c_in, c_out, heads):
            return ResBlock(dims, c_in, c_out, embedding, dropout, heads)

        self.embed_time = EmbedLogSNR(width, embedding)
        self.embed_z, self.guess = None, None
        inputs = channels
        if z_dim:
            self.embed_z = nn.Linear(z_dim, embedding)
            self.guess = nn.Linear(z_dim, channels * size**dims)
            inputs = 2 * channels
        self.stem = conv(inputs, width, patch + 2, stride=patch, padding=1)

        c = width
        skips = [c]  # the channels of all that forward keeps for the way up
        self.down = nn.ModuleList()
        for level, w in enumerate(widths):
            attending = heads if level in attention else 0
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(block(c, w, attending))
                skips.append(w)
                c = w
            halve = None
            if level < last:
                halve = conv(w, w, 3, stride=2, padding=1)
                skips.append(w)
            self.down.append(nn.ModuleList([stage, halve]))

        self.middle = nn.ModuleList([block(c, c, heads), block(c, c, 0)])

        self.up = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            attending = heads if level in attention else 0
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(block(c + skips.pop(), w, attending))
                c = w
            double = conv(w, w, 3, padding=1) if level > 0 else None
            self.up.append(nn.ModuleList([stage, double]))

        output = zeroed(TRANSPOSED[dims](c, channels, patch + 2, stride=patch, padding=1))
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), output)

    def forward(self, x, log_snr, z=None):
        e = self.embed_time(log_snr)  # (B, embedding)
        if z is not None:
            e = e + self.embed_z(z)
            x = torch.cat([x, self.guess(z).view_as(x)], dim=1)  # (B, 2 channels, ...)
        e = F.silu(e)
        h = self.stem(x)
        skips = [h]
        for stage, halve in self.down:
            for block in stage:
                h = block(h, e)
                skips.append(h)
            if halve is not None:
                h = halve(h)
                skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for stage, double in self.up:
            for block in stage:
                h = block(torch.cat([h, skips.pop()], dim=1), e)
            if double is not None:
                h = double(F.interpolate(h, scale_factor=2))
        return self.out(h)


class MLPBlock(nn.Module):
    """h + linear(silu((1 + s) LN(h) + b)), s, b linear in e. h: (B, width), e: (B, embedding)."""

    def __init__(self, width, embedding):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.linear = zeroed(nn.Linear(width, width))

    def forward(self, h, e):
        scale, shift = self.modulation(e).chunk(2, dim=1)
        return h + self.linear(F.silu((1 + scale) * self.norm(h) + shift))


class ResidualMLP(nn.Module):
    """v(z_t, ℓ) for the latent prior. x: (B, D), log_snr: (B,); z is not used.

    Deviation: the paper has UNets here. The dimensions of z have no order and no neighbours, so a
    convolution cannot tell one from another; diffusion autoencoders (Preechakul et al. 2022) have
    an MLP for the same purpose.
    """

    def __init__(self, size, width, blocks):
        super().__init__()
        self.embed_time = EmbedLogSNR(32, 64)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(MLPBlock(width, 64) for _ in range(blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, size)))

    def forward(self, x, log_snr, z=None):
        e = F.silu(self.embed_time(log_snr))  # (B, 64)
        h = self.stem(x)  # (B, width)
        for block in self.blocks:
            h = block(h, e)
        return self.out(h)


def spread(linear):
    """The last layer of an encoder with the means' weights eight times as large as usual, for z to
    start about as wide as N(0, I): decoders then see sooner what is in it."""
    means, _ = linear.weight.data.chunk(2)
    means.mul_(8)
    return linear


class Encoder(nn.Sequential):
    """q(z|x) = N(μ, σ²): layers, last a linear one to 2D numbers -> (mu, logvar), each (B, D)."""

    def __init__(self, *layers):
        super().__init__(*layers)
        spread([layer for layer in self.modules() if isinstance(layer, nn.Linear)][-1])

    def forward(self, x):
        return super().forward(x).chunk(2, dim=-1)


class ConvEncoder(Encoder):
    """Residual convolutional encoder in the manner of Soft-IntroVAE (Daniel and Tamar 2021).

    x: (B, channels, size, size). Every entry of widths halves the side once. Norm is by groups.
    """

    def __init__(self, channels, size, latent_dim, widths):
        layers = [nn.Conv2d(channels, widths[0], 5, padding=2), nn.AvgPool2d(2)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [ResBlock(2, c_in, c_out), nn.AvgPool2d(2)]
        side, c = size // 2 ** len(widths), widths[-1]
        layers += [ResBlock(2, c, c), group_norm(c), nn.SiLU(), nn.Flatten()]
        super().__init__(*layers, nn.Linear(c * side * side, 2 * latent_dim))


class ConvDecoder(nn.Sequential):
    """The encoder's mirror image, z: (B, latent_dim) -> (B, channels, size, size)."""

    def __init__(self, channels, size, latent_dim, widths):
        side = size // 2 ** len(widths)
        shape = (widths[-1], side, side)
        layers = [nn.Linear(latent_dim, math.prod(shape)), nn.Unflatten(1, shape)]
        layers += [ResBlock(2, widths[-1], widths[-1])]
        for c_in, c_out in itertools.pairwise(widths[::-1]):
            layers += [nn.Upsample(scale_factor=2), ResBlock(2, c_in, c_out)]
        layers += [nn.Upsample(scale_factor=2), group_norm(widths[0]), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(widths[0], channels, 5, padding=2))


def mlp(*widths):
    """Linear layers of these widths with SiLU between them."""
    layers = []
    for w_in, w_out in itertools.pairwise(widths):
        layers += [nn.Linear(w_in, w_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


# ---- 6  The multimodal ELBO (Eqs. 3 to 5) --------------------------------------------------------

def bernoulli(logits):
    """The likelihood of masks and attributes."""
    return Bernoulli(logits=logits, validate_args=False)  # no synchronisation; fit checks the loss


class CalibratedGaussian(nn.Module):
    """mean -> N(mean, σ²) with one learned σ: a fair feed-forward baseline (Rybkin et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, mean):
        return Normal(mean, (0.5 * self.logvar).exp(), validate_args=False)


class FeedForward(nn.Module):
    """p(x|z) by one pass. net: z -> parameters; likelihood: parameters -> a torch distribution."""

    every_subset = True

    def __init__(self, net, likelihood):
        super().__init__()
        self.net = net
        self.likelihood = likelihood

    def distribution(self, z):
        """p(x|z) itself."""
        p = self.likelihood(in_bf16(self.net, z))
        if isinstance(p, Categorical):
            raise ValueError("a Categorical has no mean: give x one-hot and a OneHotCategorical")
        return p

    def log_prob(self, x, z):
        """log p(x|z) in nats, summed over dimensions: (B, ...), (B, D) -> (B,)."""
        return self.distribution(z).log_prob(x).reshape(len(z), -1).sum(1)

    @torch.no_grad()
    def sample(self, z):
        """The mean of p(x|z), (B, ...); of binary x the probability, which F1 (§4.2) thresholds.

        What varies is in z; sampling p(x|z) would only lay independent noise on every pixel.
        """
        return self.distribution(z).mean


@dataclass
class ELBO:
    """The terms of Eq. 5 for each example, averaged over the subsets. All are nats but those of a
    Diffusion whose weighting is a surrogate."""

    log_prob: dict  # {modality: (B,)}, log p(x_i|z), or its bound where the decoder is a diffusion
    kl: torch.Tensor  # (B,), KL(q(z|x_A) ‖ p(z))
    beta: float  # 1 for the bound
    weights: dict  # {modality: w_i}, 1 where missing, and everywhere for the bound

    @property
    def total(self):
        """Σ_i w_i log p(x_i|z) − β KL, (B,)."""
        terms = [self.weights.get(name, 1) * term for name, term in self.log_prob.items()]
        return sum(terms) - self.beta * self.kl

    def terms(self, objective="ELBO"):
        """{objective: total, each modality, "KL"}, all (B,); give a surrogate another name."""
        return {objective: self.total, **self.log_prob, "KL": self.kl}


def without_gaps(x, observed):
    """x with zeros for what is not observed: nothing of that, NaN or other, goes on from here."""
    filled = dict(x)
    for name in x.keys() & observed.keys():
        there = with_dims(observed[name], x[name].ndim)  # (B, 1, ...)
        filled[name] = torch.where(there, x[name], 0)
    return filled


def observed_subsets(family, there):
    """A ∩ observed for each A and each example: family (S, M), there (B, M), all bool.

    Returns subsets (B, S, M), and which are valid, (B, S). An A of which nothing is observed is
    not; in its place stands all that is, so that there is a product to compute, and the averages
    leave it out. (The empty A, which the prior expert allows, is valid.)
    """
    present = family & there[:, None]  # (B, S, M)
    valid = present.any(-1) | ~family.any(-1)  # (B, S)
    return torch.where(valid[..., None], present, there[:, None]), valid


def mean_of_valid(values, valid):
    """Σ_A ω_A values_A, ω_A uniform over the valid A: (B, S) twice -> (B,); 0 where none is."""
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)


def draw_valid(valid):
    """One of the valid A for each example, all alike likely: (B, S) bool -> its index, (B,)."""
    valid_first = valid.int().argsort(dim=1, descending=True, stable=True)  # (B, S), indices
    k = (valid.sum(1) * stratified(len(valid), valid.device)).long()  # (B,), below their number
    return valid_first.gather(1, k[:, None])[:, 0]


class DiffMVAE(nn.Module):
    """The multimodal VAE of §3.2: {name: encoder}, {name: decoder} -> Eq. 5, any-to-any generation.

    An encoder maps x_i to (mu, logvar), each (B, D). A decoder has log_prob(x_i, z) -> (B,), nats,
    sample(z) -> x_i, and every_subset = True if it is cheap enough to decode all subsets in a step.
    prior_expert multiplies p(z) into every product, as MVAE does (§2) and §3.3 does not. Deviation:
    beta weighs the KL, and weights, {name: w_i}, the log p(x_i|z), as in MoPoE; Eq. 5 has only 1s.

    Examples may lack modalities: observed, {name: (B,) bool}, says which have one (all, of a name
    that is not in it). In its gaps x may hold anything. Each A becomes A ∩ observed, and only what
    is observed is reconstructed: then Eq. 5 bounds log p(x_observed).
    """

    def __init__(self, encoders, decoders, family="mopoe", beta=1.0, weights=None,
                 prior_expert=False):
        super().__init__()
        columns = {"ELBO", "surrogate", "KL", "gradient", "step", "seconds"}  # of the history
        reserved = columns & {*encoders, *decoders}
        if reserved:
            raise ValueError(f"{min(reserved)} is the name of a term: call the modality otherwise")
        self.encoders = nn.ModuleDict(encoders)
        self.decoders = nn.ModuleDict(decoders)
        self.register_buffer("subsets", subsets(len(encoders), family), persistent=False)  # (S, M)
        self.beta = beta
        self.weights = {} if weights is None else weights
        self.prior_expert = prior_expert

    def experts(self, x, observed):
        """q(z|x_i) for each modality in x: mu, logvar (B, M, D), and which are there, (B, M)."""
        unknown = x.keys() - self.encoders.keys()
        if unknown:
            raise ValueError(f"no encoder for {sorted(unknown)}: there are {list(self.encoders)}")
        means, logvars, there = [], [], []
        for name in self.encoders:
            if name in x:
                mu, logvar = in_bf16(self.encoders[name], x[name])  # (B, D) each
                means.append(mu)
                logvars.append(logvar)
                everywhere = torch.ones(len(mu), dtype=torch.bool, device=mu.device)
                there.append(observed.get(name, everywhere))
        there = torch.stack(there, dim=1)  # (B, M)
        if observed and not self.prior_expert and not there.any(1).all():
            raise ValueError("an example has nothing observed: only the prior expert allows that")
        return torch.stack(means, dim=1), torch.stack(logvars, dim=1), there

    def fuse(self, mu, logvar, present):
        """q(z|x_A) ∝ ∏_{i∈A} q(z|x_i), with p(z) if prior_expert: (..., M, D) -> (..., D)."""
        if self.prior_expert:
            zeros = torch.zeros_like(mu[..., :1, :])  # p(z): μ = 0 and log σ² = 0
            mu = torch.cat([mu, zeros], dim=-2)
            logvar = torch.cat([logvar, zeros], dim=-2)
            present = F.pad(present, (0, 1), value=True)
        return product_of_experts(mu, logvar, present)

    def posterior(self, x, observed=None):
        """q(z|x_o) given the observed modalities x, a dict (§3.3): mu, logvar, each (B, D)."""
        if not x:
            raise ValueError("nothing is observed: give at least one modality, or sample the prior")
        observed = {} if observed is None else observed
        return self.fuse(*self.experts(without_gaps(x, observed), observed))

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        """KL(q(z|x_A) ‖ p(z)) of the products (B, S, D); the experts (B, M, D) are for MVTCAE."""
        return kl_divergence(mu, logvar)  # (B, S)

    def reconstruction(self, decoder, x, z, valid, exact):
        """Σ_A ω_A E log p(x|z_A), or an unbiased estimate: z: (B, S, D), valid: (B, S) -> (B,).

        Cheap decoders decode every subset; the others, if not exact, one, drawn for each example.
        """
        batch, size, _ = z.shape
        if exact:
            each = [decoder.log_prob(x, z[:, k]) for k in range(size)]
            return mean_of_valid(torch.stack(each, dim=1), valid)
        if getattr(decoder, "every_subset", False):
            x = x.repeat_interleave(size, dim=0)  # (B S, ...)
            each = decoder.log_prob(x, z.flatten(0, 1)).view(batch, size)
            return mean_of_valid(each, valid)
        rows = torch.arange(batch, device=z.device)
        log_prob = decoder.log_prob(x, z[rows, draw_valid(valid)])  # (B,)
        return torch.where(valid.any(1), log_prob, 0)

    def elbo(self, x, observed=None, A=None, exact=False):
        """Eq. 5 for x, {name: (B, ...)}: each decoder runs once, the KL is exact.

        A Gaussian's KL needs no decoder, so it is averaged over all subsets: a mean of bounds on
        log p(x) is a bound, and what can be summed need not be drawn. exact: every decoder runs for
        every subset. A: (M,) bool takes this subset alone in place of the family.
        """
        if A is not None and not (A.any() or self.prior_expert):
            raise ValueError("A is empty: only the prior expert allows a subset of nothing")
        observed = {} if observed is None else observed
        x = without_gaps(x, observed)
        family = self.subsets if A is None else A[None].to(self.subsets)  # (S, M)
        experts = self.experts({name: x[name] for name in self.encoders}, observed)
        expert_mu, expert_logvar, there = experts  # (B, M, D) twice, (B, M)
        present, valid = observed_subsets(family, there)  # (B, S, M), (B, S)
        mu, logvar = self.fuse(expert_mu[:, None], expert_logvar[:, None], present)  # (B, S, D)
        divergence = self.divergence(mu, logvar, expert_mu, expert_logvar)  # (B, S)
        kl = mean_of_valid(divergence, valid)  # (B,)  Σ_A ω_A KL(q(z|x_A) ‖ p(z))
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            term = self.reconstruction(decoder, x[name], z, valid, exact)  # (B,)
            log_prob[name] = torch.where(observed[name], term, 0) if name in observed else term
        return ELBO(log_prob, kl, self.beta, self.weights)

    def full_elbo(self, x, observed=None):
        """Eq. 5 at β = 1, without weights, every decoder run for every subset: the bound itself, if
        log_prob of every decoder is one."""
        elbo = self.elbo(x, observed, exact=True)
        return ELBO(elbo.log_prob, elbo.kl, 1.0, {})

    def decode(self, z):
        """A sample of every modality, {name: (B, ...)}; z may come from a posterior or a prior."""
        return {name: decoder.sample(z) for name, decoder in self.decoders.items()}


class MVTCAE(DiffMVAE):
    """The baseline of Hwang et al. 2021 (Tables 1 to 3), from the same parts; no bound on log p(x).

    (M − α)/M E[Σ_i log p(x_i|z)] − (1 − α) KL(q ‖ p(z)) − α/M Σ_i KL(q ‖ q(z|x_i)),  q = q(z|x)

    with the product of all experts alone. α = 0 is the objective of MVAE. The first factor is in
    the decoders' weights.
    """

    def __init__(self, encoders, decoders, alpha=0.9, beta=1.0, weights=None):
        super().__init__(encoders, decoders, "mvae", beta, weights)
        self.alpha = alpha
        share = (len(encoders) - alpha) / len(encoders)
        self.weights = {name: share * self.weights.get(name, 1) for name in decoders}

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        to_prior = kl_divergence(mu, logvar)  # (B, 1)
        to_experts = kl_divergence(mu, logvar, expert_mu, expert_logvar)  # (B, M), q against each
        return (1 - self.alpha) * to_prior + self.alpha * to_experts.mean(1, keepdim=True)

    def elbo(self, x, observed=None, A=None, exact=False):
        if observed or A is not None:
            raise ValueError("MVTCAE is defined for complete examples and the product of all")
        return super().elbo(x, exact=exact)


# ---- 7  Latent prior (§3.4) ----------------------------------------------------------------------

class LatentPrior(Diffusion):
    """A diffusion on z_0 ~ q(z|x) = ∏_i q(z|x_i): where unconditional z come from.

    It is trained after the model, on the finished encoders. Deviation: the default is the weighting
    "velocity", the paper's is Eq. 1, "simple". shape: how the D latents are laid out
    for net, (D,) for a ResidualMLP, and for the paper's UNets (1, 16, 16) (CelebA), (1, 768) (CUB).
    Deviation: z is standardised; otherwise its scale would not fit the fixed noise schedule.
    """

    def __init__(self, net, shape, weighting="velocity"):
        super().__init__(net, shape, weighting=weighting, evaluations=50)  # as in the paper
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.ones(math.prod(shape)))

    def standardise(self, mu, logvar):
        """Take mean and deviation of z ~ q(z|x) from a training set, mu, logvar: (N, D)."""
        variance = mu.var(0, correction=0) + logvar.exp().mean(0)  # (D,), of the means and around
        self.mean.copy_(mu.mean(0))
        self.std.copy_(variance.sqrt())

    def log_prob(self, z):
        """The surrogate, −½ E‖ε − ε̂‖² of Eq. 1 or −½ E‖v − v̂‖², in standardised space: (B,)."""
        return super().log_prob(((z - self.mean) / self.std).view(-1, *self.shape))

    def sample(self, n, **options):
        """n latents, (n, D). options: as in Diffusion.sample."""
        return super().sample(n=n, **options).flatten(1) * self.std + self.mean


# ---- 8  Training ---------------------------------------------------------------------------------

STAGES = ("model", "prior")
HISTORY = {"model": "history", "prior": "history-prior"}  # their files
INTERVAL = 500  # steps between two checkpoints, or a hundredth of a long training
HELD_OUT = 256  # examples at most on which the objective is watched
READING = 20  # steps between two rows of the history, or a five-hundredth
WARMUP, COOLDOWN = 100, 500  # first and last steps, in which the learning rate rises and falls
CLIP = 1.0  # largest norm of the gradient


class InputError(ValueError):
    """Something the user can mend; the message names it and the cure."""


def why(problem):
    """The first 25 words of an exception's message, or its name, on one line without colours."""
    words = re.sub(r"\x1b\[[\d;]*m", "", str(problem)).split()
    return " ".join(words[:25]) if words else type(problem).__name__


def save_checkpoint(path, state):
    """Write beside, then rename: path holds the old state or the new one, never half of it."""
    part = path.with_suffix(f".{os.getpid()}.part")  # another process may be writing its own
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:  # RuntimeError: how torch says that a disk is full
        if part.exists():  # in a file system that is read-only nothing may even be removed
            part.unlink()
        raise InputError(f"{path} cannot be written ({why(problem)}), what was there before is "
                         "whole: make room, or take another folder") from problem


def read_checkpoint(path, *keys):
    """What save_checkpoint wrote, a dict with these keys, on the CPU."""
    try:
        path.open("rb").close()
    except FileNotFoundError as problem:
        raise InputError(f"{path} is missing: that run has to be made first") from problem
    except OSError as problem:
        raise InputError(f"{path} cannot be opened ({why(problem)})") from problem
    try:
        state = torch.load(path, "cpu", weights_only=True, mmap=True)  # reads no more than is used
    except MemoryError:
        raise
    except Exception as problem:  # torch has no class for what is not, or not all of, a checkpoint
        raise InputError(f"{path} is damaged: remove it") from problem
    if not isinstance(state, dict) or not set(keys) <= state.keys():
        raise InputError(f"{path} is no such file of this program: remove it, or change the folder")
    return state


def restore(path, part, state):
    """Load what the checkpoint path holds into a module or an optimiser."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as problem:  # names or shapes that part does not have
        raise InputError(f"{path} is of other code, whose networks differ ({why(problem)}): train "
                         "in another --out, or take that code") from problem


def check_same(path, was, now):
    """Refuse to go on from a checkpoint with other settings or other data, and name them."""
    changes = []
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            changes.append(f"{name} was {was.get(name)!r} and is {now.get(name)!r}")
    if changes:
        raise InputError(f"{path} is of another run ({', '.join(changes)}): repeat its flags, and "
                         "give it its data, or change --out")


def seed_at(seed, stage, step):
    """One well-mixed seed for each step of each stage."""
    return int(np.random.SeedSequence((seed, STAGES.index(stage), step)).generate_state(1)[0])


@contextmanager
def interruptible():
    """An event that Ctrl-C sets, so that the step under way can be finished and saved."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread may catch signals; there Ctrl-C is as usual
        return
    usual = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)


class Sums:
    """Running sums of named scalars. They stay on the device: only means waits for it."""

    def __init__(self):
        self.named, self.steps = {}, 0

    def add(self, named):
        for name, value in named.items():
            self.named[name] = self.named.get(name, 0) + value.detach()
        self.steps += 1

    def means(self, step, path):
        """{name: float} since the last call, or a FloatingPointError that names what broke."""
        values = (torch.stack(list(self.named.values())) / self.steps).tolist()
        means = dict(zip(self.named, values))
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            kept = f"{path} is kept; " if path.exists() else ""
            raise FloatingPointError(f"{', '.join(broken)} not finite before step {step}: {kept}"
                                     "lower the learning rate or look at the data")
        self.named, self.steps = {}, 0
        return means


class Trainee:
    """A model with its optimiser and its moving average, which is the model from training on.

    rates: [(module, learning rate)] of its parts.
    """

    def __init__(self, model, rates, decay):
        self.model = model.train()
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.weights = list(model.parameters())
        self.averages = list(self.averaged.parameters())
        self.rates = [rate for _, rate in rates]
        groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.decay = decay

    def update(self, objective, step, steps):
        """Ascend the objective, a scalar; return the gradient's norm."""
        self.optimizer.zero_grad()
        (-objective).backward()
        norm = nn.utils.clip_grad_norm_(self.weights, CLIP)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * min(1, (step + 1) / WARMUP, (steps - step) / COOLDOWN)
        self.optimizer.step()
        decay = min(self.decay, (1 + step) / (10 + step))  # the first weights are soon forgotten
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        return norm

    def parts(self):
        """All that changes in training."""
        return {"model": self.model, "averaged": self.averaged, "optimizer": self.optimizer}

    def state(self):
        """Of the parts, for a checkpoint."""
        return {name: part.state_dict() for name, part in self.parts().items()}


def save_history(checkpoint, history):
    """The rows of a training so far, [{term: float}], as a CSV file and as a picture of curves."""
    name = HISTORY[checkpoint.stem]
    columns = list(dict.fromkeys(column for row in history for column in row))
    with open(checkpoint.with_name(f"{name}.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
    save_curves(checkpoint.with_name(f"{name}.png"), history)


def resume(path, settings, trainee):
    """Load a checkpoint of the same settings into trainee; its step, seconds and history."""
    if not path.exists():
        return 0, 0.0, []
    state = read_checkpoint(path, "settings")
    check_same(path, state["settings"], settings)
    for name, part in trainee.parts().items():
        restore(path, part, state[name])
    return state["step"], state["seconds"], state["history"]


def fit(s, stage, model, terms, objective, *, num_examples, steps, batch_size, rates, contents="",
        held_out=None, preview=None):
    """Train model with Adam; return its moving average, the model from then on, and the seconds.

    The checkpoint is s.out/stage.pt. terms(indices) -> {name: (B,)}, named terms of a batch; that
    named objective is maximised, all are shown. rates: [(module, learning rate)]. contents: a
    checksum of what it must have been trained on. At each checkpoint held_out(averaged), a float,
    joins the history, and preview(averaged) follows. From a checkpoint training goes on and ends as
    if never interrupted: a step draws all its randomness from (seed, stage, step).
    """
    path = Path(s.out) / f"{stage}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {**s.fixed(stage), "examples": contents}
    trainee = Trainee(model, rates, s.ema)
    step, seconds, history = resume(path, settings, trainee)
    interval, reading = max(INTERVAL, steps // 100), max(READING, steps // 500)
    sums = Sums()
    progress = tqdm(desc=stage, total=steps, initial=step, unit=" examples", unit_scale=batch_size)
    with interruptible() as stopped, progress as bar:
        started = time.monotonic() - seconds
        while step < steps:
            torch.manual_seed(seed_at(s.seed, stage, step))
            indices = torch.randint(num_examples, (batch_size,), device=s.device)
            named = {name: term.mean() for name, term in terms(indices).items()}
            named["gradient"] = trainee.update(named[objective], step, steps)
            sums.add(named)
            step += 1
            bar.update()
            at_checkpoint = stopped.is_set() or step == steps or step % interval == 0
            at_reading = at_checkpoint or step % reading == 0
            if not at_reading:
                continue
            seconds = time.monotonic() - started
            means = sums.means(step, path)
            bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            row = {"step": step, "seconds": round(seconds, 2), **means}
            if at_checkpoint and held_out is not None:
                row[f"held-out {objective}"] = held_out(trainee.averaged)
            history.append(row)
            if at_checkpoint:
                about = {"step": step, "seconds": seconds, "settings": settings, "history": history}
                save_checkpoint(path, {**about, **trainee.state()})
                save_history(path, history)
                if stopped.is_set():
                    raise KeyboardInterrupt(f"stopped after step {step}, saved in {path}: run it "
                                            "again")
                if preview is not None:
                    preview(trainee.averaged)
                started = time.monotonic() - seconds
    return trainee.averaged, seconds


# ---- 9  Measures and pictures (§4) ---------------------------------------------------------------

def f1_score(predicted, actual):
    """Sample-average F1 (§4.2): 2 TP / (2 TP + FP + FN) of each example, 0 where both are empty;
    predicted, actual: (N, ...) bool, or probabilities, which are thresholded at ½."""
    predicted = predicted.flatten(1) > 0.5
    actual = actual.flatten(1) > 0.5
    both = (predicted & actual).sum(1)
    total = predicted.sum(1) + actual.sum(1)
    return (2 * both / total.clamp(min=1)).mean().item()


def frechet_distance(a, b):
    """‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½) for features (N, d); FID on Inception's."""
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # eigenvalues are ≥ 0
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()


@torch.no_grad()
def in_batches(f, data, label, size=250):
    """f on pieces of {name: (N, ...)}; each of the several tensors it returns is concatenated."""
    total = len(next(iter(data.values())))
    results = []
    for start in tqdm(range(0, total, size), label, leave=False):
        piece = {name: x[start : start + size] for name, x in data.items()}
        results.append(f(piece))
    return [torch.cat(parts) for parts in zip(*results)]


def to_bytes(pictures):
    """(n, 1 or 3, H, W) in [−1, 1] -> (n, H, W, 3) uint8, for PIL."""
    levels = (pictures.float().cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def save_grid(path, rows, captions=None, side=64):
    """A PNG of rows {label: (n, 1 or 3, H, H) in [−1, 1]}, above captions {label: n strings}."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(10)
    left = 12 + max(int(font.getlength(label)) for label in rows)
    own_side = next(iter(rows.values())).shape[-1]
    side = own_side * max(1, side // own_side)  # pixels are repeated a whole number of times
    texts, heights = {}, {}
    for label in rows:
        said = [] if captions is None else captions.get(label, [])
        texts[label] = [textwrap.fill(caption, (side + 2) // 6) for caption in said]
        lines = max((text.count("\n") + 1 for text in texts[label]), default=0)
        heights[label] = side + 2 + 12 * lines
    longest = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (left + (side + 2) * longest, sum(heights.values())), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for label, pictures in rows.items():
        draw.text((6, top + side / 2), label, "black", font, anchor="lm")
        for j, pixels in enumerate(to_bytes(pictures)):
            x = left + (side + 2) * j
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, top))
            if texts[label]:
                draw.multiline_text((x, top + side), texts[label][j], "black", small, spacing=1)
        top += heights[label]
    sheet.save(path)


def save_curves(path, history, width=600, height=120):
    """A PNG with a panel for each term of history, [{"step": …, term: …}], over the steps.

    Black in training, red held out. A panel's ends are those of the last nine tenths of its term.
    """
    held_out = "held-out "
    terms = [name for name in history[0]
             if name not in ("step", "seconds") and not name.startswith(held_out)]
    sheet = Image.new("RGB", (width, height * len(terms)), "white")
    draw = ImageDraw.Draw(sheet)
    last = history[-1]["step"]
    for k, term in enumerate(terms):
        black = [(row["step"], row[term]) for row in history]
        red = [(row["step"], row[held_out + term]) for row in history if held_out + term in row]
        settled = [value for step, value in black + red if step > last / 10]
        low, high = min(settled), max(settled)
        scale = (height - 30) / max(high - low, 1e-12)
        top = k * height + 20

        def place(point):
            step, value = point
            y = top + scale * (high - min(max(value, low), high))
            return 90 + (width - 100) * step / last, y

        draw.text((6, top - 16), term, "black")
        draw.text((6, top), f"{high:.4g}", "grey")
        draw.text((6, top + height - 40), f"{low:.4g}", "grey")
        draw.line([place(point) for point in black], "black")
        draw.line([place(point) for point in red], "red", 2)
    draw.text((width - 90, 4), f"{last} steps", "grey")
    sheet.save(path)


# ---- 10  What both scripts share: settings, networks, both stages of training, tables, files -----

def option(help, drawn, real=None, *, small=None, least=0, most=math.inf, **flag):
    """A setting that is also a flag: help; defaults for drawn data, for real data, and for real
    data with --small (drawn's, unless others are given); the least and the most that it may be;
    flag: what else argparse needs of it, such as choices."""
    real = drawn if real is None else real
    small = drawn if small is None else small
    defaults = {"drawn": drawn, "real": real, "small": small}
    if real != drawn or small != drawn:
        each = [f"{value} {kind}" for kind, value in defaults.items()]
        help = f"{help} (default: {', '.join(each)})"
    elif drawn not in (None, "", []):
        help = f"{help} (default: {drawn})"
    meta = {**defaults, "least": least, "most": most, "flag": flag, "help": help}
    return field(default=None, metadata=meta)


@dataclass
class Settings:
    """What both scripts can be told. Each adds what differs: out, size, steps, batch_size, weight,
    latent_dim, channels, multipliers, vae_rate. Nothing given (None) means the default."""

    data: str = option("folder of the real data; without it data are drawn", "")
    small: bool = option("real data on a CPU: takes the defaults called small below", False,
                         action=BooleanOptionalAction)
    export: str = option("folder for PNGs of real and generated pictures, as for FID", "")
    report: list = option("folders of finished runs: print their tables and stop", [], nargs="+",
                          type=str)
    seed: int = option("seed of all randomness", 0, most=2**63 - 1)
    device: str = option("cuda, mps or cpu", "cuda" if torch.cuda.is_available() else "cpu")
    weighting: str = option("likelihood: Diff-MVAE, a bound; the others: Diff-MVAE*", "velocity",
                            "simple", choices=tuple(Diffusion.samplers))
    family: str = option("subsets that are trained; mvtcae: that objective", "mopoe",
                         choices=("mopoe", "mvae", "mmvae", "mvtcae"))
    decoder: str = option("of images; feedforward: baseline MoPoE*", "diffusion",
                          choices=("diffusion", "feedforward"))
    beta: float = option("weight of the KL (default: 1 where all is in nats, or 0.01)", None)
    observed: float = option("share of the training examples that have more than a picture", 1.0,
                             most=1)
    gaps: bool = option("take real data that lack something, too", False,
                        action=BooleanOptionalAction)
    mirror: bool = option("mirror half of the training pictures, masks with them", False,
                          small=True, action=BooleanOptionalAction)
    patch: int = option("side in pixels of what the UNet takes for one pixel", 2, 1, least=1)
    attention: int = option("side at which the UNet attends, besides its middle", 0, 16)
    dropout: float = option("in the UNet", 0.0, 0.1, most=1)
    encoder_channels: int = option("channels of the encoders at half size", 16, 64, small=8,
                                   least=2)
    rate: float = option("learning rate of the image decoder", 1e-3, 1e-4)
    ema: float = option("decay of the averaged weights", 0.995, 0.9999, small=0.999, most=1)
    prior_net: str = option("network of the latent prior; unet: the paper's", "mlp",
                            choices=("mlp", "unet"))
    prior_steps: int = option("training steps of the latent prior", 4000, 10_000, least=1)
    prior_batch: int = option("latents in such a step", 256, least=1)
    prior_rate: float = option("its learning rate", 2e-3, 1e-3)
    evaluations: int = option("of the network for a picture (default: 20, or 100 for a bound)",
                              None, least=1)
    measured: int = option("pictures generated of each kind for the tables", 256, 6000, least=2)

    # What may change in a run; small only chooses defaults.
    free = ("out", "export", "report", "device", "evaluations", "measured", "small")
    surrogate_weight = 1.0  # default weight where the picture's term is a surrogate, not nats

    def __post_init__(self):
        if self.small and not self.data:
            raise InputError("--small is for real data: give their folder with --data")
        kind = "drawn"
        if self.data:
            kind = "small" if self.small else "real"
        for setting in fields(self):
            if getattr(self, setting.name) is None:
                setattr(self, setting.name, setting.metadata[kind])
            check_ends(setting, getattr(self, setting.name))
        if self.beta is None:
            self.beta = 1.0 if self.in_nats else 0.01
        if self.weight is None:
            self.weight = 1.0 if self.in_nats else self.surrogate_weight

    @classmethod
    def parse(cls, description):
        """Read the command line."""
        parser = ArgumentParser(description=description,
                                formatter_class=RawDescriptionHelpFormatter)
        for setting in fields(cls):
            flag = {"help": setting.metadata["help"], **setting.metadata["flag"]}
            if "action" not in flag:
                flag.setdefault("type", setting.type)
            parser.add_argument(flag_name(setting), default=None, **flag)
        return cls(**vars(parser.parse_args()))

    @property
    def in_nats(self):
        """Whether every decoder's term is a log-likelihood, or a bound of one."""
        return self.decoder == "feedforward" or self.weighting == "likelihood"

    @property
    def is_bound(self):
        """Whether the objective is one on log p(x), at β = 1 and without weights."""
        return self.in_nats and self.family != "mvtcae"

    @property
    def method(self):
        """A name as in the paper's tables. The star of a baseline says: with the networks of
        Diff-MVAE*, as in the paper's MoPoE*."""
        if self.decoder == "feedforward":
            names = {"mopoe": "MoPoE*", "mvae": "MVAE*", "mmvae": "MMVAE*", "mvtcae": "MVTCAE*"}
            return names[self.family]
        name = "Diff-MVAE" if self.weighting == "likelihood" else "Diff-MVAE*"
        return name if self.family == "mopoe" else f"{name}, {self.family}"

    def fixed(self, stage):
        """What a checkpoint and a run that goes on from it must have in common."""
        settings = {"data": Path(self.data).resolve().name if self.data else ""}
        for name, value in asdict(self).items():
            later = stage == "model" and name.startswith("prior_")
            if name not in (*self.free, "data") and not later:
                settings[name] = value
        return settings


def flag_name(setting):
    """--prior-steps of the field prior_steps."""
    return "--" + setting.name.replace("_", "-")


def check_ends(setting, value):
    """Refuse numbers beyond a setting's ends, NaN and infinity."""
    least, most = setting.metadata["least"], setting.metadata["most"]
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, (int, float)):
            continue
        if not least <= number <= most or number == math.inf:
            ends = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise InputError(f"{flag_name(setting)} {value}: give {ends}")


def check_usable(s):
    """Refuse at once what would fail late: the device, the folders, the checkpoints in them."""
    try:
        torch.ones(1, device=s.device).item()
    except (RuntimeError, AssertionError, ImportError) as problem:
        raise InputError(f"--device {s.device} cannot be used ({why(problem)}): give "
                         "another") from problem
    if not s.out:
        raise InputError("--out: give a folder")
    for flag, folder in (("--out", s.out), ("--export", s.export)):
        if folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
            except OSError as problem:
                raise InputError(f"{flag} {folder} cannot be used ({why(problem)}): give "
                                 "another") from problem
    prior = Path(s.out) / "prior.pt"
    if prior.exists() and not (Path(s.out) / "model.pt").exists():
        raise InputError(f"{prior} is of a model.pt that is gone: remove it, or change --out")
    for stage in STAGES:
        path = Path(s.out) / f"{stage}.pt"
        if path.exists():
            was = read_checkpoint(path, "settings")["settings"]
            check_same(path, {k: v for k, v in was.items() if k != "examples"}, s.fixed(stage))


@contextmanager
def alone_in(folder):
    """Keep other runs out of a folder by SQLite's lock, which all systems have, and which ends with
    the process, however that ends."""
    path = Path(folder) / "lock"
    try:
        lock = sqlite3.connect(path, timeout=0, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as problem:
        if problem.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise InputError(f"--out {folder}: another run is using this folder") from problem
        raise InputError(f"{path} cannot be locked ({why(problem)}): remove it, or give another "
                         "--out") from problem
    try:
        yield
    finally:
        lock.close()


def main(run, settings, description):
    """A script's entry: run on the command line's settings; what can be mended is one line."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    sys.stdout.reconfigure(errors="replace")  # of a terminal that lacks ± or é
    status = 2
    try:
        s = settings.parse(description)
        if s.report:
            show(report(s))
            return
        check_usable(s)
        if s.data and not s.small and not s.device.startswith("cuda"):
            print("Without --small the defaults for real data are for a GPU with CUDA.")
        with alone_in(s.out):
            run(s)
            return
    except (InputError, FloatingPointError, OSError) as problem:  # OSError: names its file itself
        message = str(problem)
    except KeyboardInterrupt as problem:
        message, status = str(problem) or "stopped: run it again", 130
    except (RuntimeError, MemoryError) as problem:
        lacking = isinstance(problem, (torch.OutOfMemoryError, MemoryError))
        if not lacking and not re.search("(out of|allocate) memory", str(problem)):
            raise
        message = f"out of memory ({why(problem)}): give a smaller --batch-size"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


# Networks for the settings

def image_networks(s):
    """The image's encoder and its decoder, of the kind s.decoder; with s.seed the same weights."""
    torch.manual_seed(s.seed)
    if s.patch.bit_count() != 1:
        raise InputError(f"--patch {s.patch}: give a power of 2")
    multiple = math.lcm(8, s.patch * 2 ** (len(s.multipliers) - 1))
    if s.size % multiple or s.size.bit_count() != 1:
        raise InputError(f"--size {s.size}: give a power of 2 that is a multiple of {multiple}, or "
                         "a smaller --patch or fewer --multipliers")
    if s.channels % 8 or s.encoder_channels % 2:
        raise InputError(f"--channels {s.channels} --encoder-channels {s.encoder_channels}: "
                         "give a multiple of 8 and an even number")
    decoder = None
    if s.decoder == "feedforward":
        net = ConvDecoder(3, s.size, s.latent_dim, conv_widths(s))
        decoder = FeedForward(net, CalibratedGaussian())
    elif s.decoder == "diffusion":
        decoder = diffusion_decoder(s)
    return ConvEncoder(3, s.size, s.latent_dim, conv_widths(s)), decoder


def diffusion_decoder(s):
    """Of images, with the UNet of s."""
    sides = [s.size // s.patch // 2**level for level in range(len(s.multipliers))]
    if s.attention not in (0, *sides):
        raise InputError(f"--attention {s.attention}: give 0 or one of {sides}")
    attention = [level for level, side in enumerate(sides) if side == s.attention]
    unet = UNet(2, 3, s.size, s.channels, s.multipliers, attention=attention, dropout=s.dropout,
                z_dim=s.latent_dim, patch=s.patch)
    shape = (3, s.size, s.size)
    return Diffusion(unet, shape, weighting=s.weighting, evaluations=s.evaluations)


def conv_widths(s):
    """Of ConvEncoder and ConvDecoder: doubled up to eightfold at each halving, down to 4 pixels."""
    halvings = max(1, int(math.log2(s.size)) - 2)
    return [s.encoder_channels * min(2**level, 8) for level in range(halvings)]


def multimodal(s, encoders, decoders, weights):
    """The untrained model of the family s.family."""
    if s.family == "mvtcae":
        if s.observed < 1 or s.gaps:
            raise InputError("--family mvtcae is defined for complete examples: leave out "
                             "--observed and --gaps")
        return MVTCAE(encoders, decoders, beta=s.beta, weights=weights)
    return DiffMVAE(encoders, decoders, s.family, s.beta, weights)


def latent_prior(s, sides):
    """The untrained latent prior (§3.4); the paper's UNet has the latents laid out on sides."""
    if s.prior_net == "mlp":
        return LatentPrior(ResidualMLP(s.latent_dim, 256, 4), (s.latent_dim,))
    unet = UNet(len(sides), 1, sides[0], s.channels, (1, 2))
    return LatentPrior(unet, (1, *sides))


# Training

def complete(data, observed):
    """The examples of {name: (N, ...)} that lack nothing by observed, {name: (N,) bool}."""
    if not observed:
        return data
    rows = torch.stack(list(observed.values())).all(0)
    return {name: x[rows] for name, x in data.items()}


def hide_labels(s, n, observed, names):
    """What is observed of n examples if only a share s.observed of them, by s.seed, keeps names."""
    if s.observed == 1:
        return observed
    ranks = torch.randperm(n, generator=torch.Generator().manual_seed(s.seed))
    kept = ranks < round(s.observed * n)
    return {name: kept & observed.get(name, kept) for name in names}


def only_gaps(observed):
    """Without the names that every example has."""
    return {name: there for name, there in observed.items() if not there.all()}


def prepare(s, data, observed, names):
    """What to train on and what to measure on.

    data: {"train" | "test": {name: (N, ...)}}, observed: {"train" | "test": {name: (N,) bool}}.
    Returns, on s.device, data and what of the training examples the model may see, {name: (N,)
    bool}; and, where they are, those training examples that the data set has whole. Test examples
    with gaps are left out, as nothing can be measured against a gap; so are training examples for
    Supervised.
    """
    gaps = {split: only_gaps(observed.get(split, {})) for split in data}
    train, test = data["train"], complete(data["test"], gaps["test"])
    whole = complete(train, gaps["train"])
    seen = only_gaps(hide_labels(s, len(train["image"]), gaps["train"], names))
    if s.decoder == "none":
        train, seen = complete(train, seen), {}
    for purpose, part in (("train", train), ("train", whole), ("test", test)):
        n = len(part["image"])
        if n < 2:  # no covariance, which the tables need
            raise InputError(f"{n} examples to {purpose} lack nothing, where at least 2 are "
                             "needed: get more data")
    data = {"train": on_device(train, s), "test": on_device(test, s)}
    return data, on_device(seen, s), whole


def on_device(tensors, s):
    """{name: tensor} on s.device."""
    return {name: x.to(s.device) for name, x in tensors.items()}


def mirrored(x):
    """x with the pictures of a random half of the examples mirrored, an example's all alike."""
    flips = torch.rand(len(next(iter(x.values()))), 1, 1, 1) < 0.5
    out = {}
    for name, value in x.items():
        if value.ndim == 4:  # (B, channels, H, W)
            value = torch.where(flips.to(value.device), value.flip(-1), value)
        out[name] = value
    return out


def checksum(data):
    """How many examples, and a checksum of all that they hold: what a checkpoint was trained on."""
    crc = 0
    for name in sorted(data):
        crc = zlib.crc32(data[name].cpu().contiguous().numpy(), crc)
    return f"{len(data[name])}, checksum {crc:08x}"


def train(s, data, observed, model, prior, batch, preview):
    """Diff-MVAE (§3.2), then its latent prior (§3.4): both, averaged, and their seconds.

    data: {"train" | "test": {name: (N, ...)}}, of which batch(part, i) gives the networks examples
    i; observed: {name: (N,) bool} of the training set. preview(averaged) draws. The prior learns
    from examples as they are, not mirrored.
    """
    n = len(data["train"]["image"])
    objective = "ELBO" if s.is_bound and s.beta == 1 and s.weight == 1 else "surrogate"
    model = model.to(s.device, memory_format=torch.channels_last)

    def examples(i):
        return batch(data["train"], i), {name: flags[i] for name, flags in observed.items()}

    def model_terms(i):
        x, seen = examples(i)
        if s.mirror:
            x = mirrored(x)
        return model.elbo(x, seen).terms(objective)

    def held_out(averaged):
        torch.manual_seed(s.seed)  # the same captions, times and noise at each call
        some = {name: x[:HELD_OUT] for name, x in data["test"].items()}
        each = in_batches(lambda x: [averaged.elbo(batch(x)).total], some, "held out", s.batch_size)
        return each[0].mean().item()

    rates = [(model.encoders, s.vae_rate)]
    for decoder in model.decoders.values():
        rates.append((decoder, s.rate if isinstance(decoder, Diffusion) else s.vae_rate))
    contents = checksum({**data["train"], **{f"{k} observed": v for k, v in observed.items()}})
    averaged, seconds = fit(
        s, "model", model, model_terms, objective, num_examples=n, steps=s.steps,
        batch_size=s.batch_size, rates=rates, contents=contents, held_out=held_out,
        preview=preview)
    if prior is None:
        return averaged, None, {"model": seconds}

    prior = prior.to(s.device)
    torch.manual_seed(s.seed)
    rows = {"i": torch.arange(n, device=s.device)}
    mu, logvar = in_batches(lambda row: averaged.posterior(*examples(row["i"])), rows, "encoding")
    prior.standardise(mu, logvar)

    def prior_terms(i):
        return {"surrogate": prior.log_prob(sample_gaussian(mu[i], logvar[i]))}

    prior, prior_seconds = fit(
        s, "prior", prior, prior_terms, "surrogate", num_examples=n, steps=s.prior_steps,
        batch_size=s.prior_batch, rates=[(prior, s.prior_rate)], contents=contents)
    return averaged, prior, {"model": seconds, "prior": prior_seconds}


def load_run(out, make_settings, build, device="cpu"):
    """(model, prior) that a finished run left in the folder out, ready to use.

    make_settings(**saved) makes its settings, and build(settings) the pair untrained; Supervised
    has no prior.
    """
    states = {"model": read_checkpoint(Path(out) / "model.pt", "settings")}
    if states["model"]["settings"]["decoder"] != "none":
        states["prior"] = read_checkpoint(Path(out) / "prior.pt", "settings")
        shared = {name: states["prior"]["settings"].get(name)
                  for name in states["model"]["settings"]}
        check_same(Path(out) / "prior.pt", shared, states["model"]["settings"])
    for stage, state in states.items():
        steps = state["settings"]["steps" if stage == "model" else "prior_steps"]
        if state["step"] < steps:
            raise InputError(f"{out} is not finished: run it again")
    latest = states.get("prior", states["model"])  # only the prior's has the settings prior_…
    saved = {**latest["settings"], "device": device}
    del saved["examples"]
    try:
        settings = make_settings(**saved)
    except TypeError as problem:  # other names
        raise InputError(f"{out} is a run of another script, or of other code") from problem
    model, prior = build(settings)
    for stage, part in (("model", model), ("prior", prior)):
        if part is not None:
            restore(Path(out) / f"{stage}.pt", part, states[stage]["averaged"])
            part.to(device).eval().requires_grad_(False)
    return model, prior


# Using a trained model

def infer(model, x, given):
    """z ~ q(z|x_o), x_o the given modalities of x (§3.3): (N, D)."""
    x = {name: x[name] for name in given}
    return in_batches(lambda o: [sample_gaussian(*model.posterior(o))], x, "encoding")[0]


def sample(decoder, z):
    """One x ~ p(x|z) for each row of z, in batches."""
    return in_batches(lambda rows: [decoder.sample(rows["z"])], {"z": z}, "sampling")[0]


def unconditional(model, prior, training):
    """As many rows of z as training has examples, without looking at any x: {label: (n, D)}.

    From the latent prior (§3.4), from N(0, I) without it and, as the ceiling of both, from what the
    prior imitates, the aggregate posterior: z ~ q(z|x) given all of real training examples.
    """
    ceiling = infer(model, training, list(model.encoders))
    z = in_batches(lambda rows: [prior.sample(len(rows["z"]))], {"z": ceiling}, "sampling z")[0]
    return {"aggregate posterior": ceiling, "latent prior": z, "N(0, I)": torch.randn_like(z)}


def nats(model, test, batch):
    """Eq. 5's terms averaged over test, and the image's in bits per dimension."""
    def terms(x):
        return model.full_elbo(batch(x)).terms().values()

    names = ["ELBO", *model.decoders, "KL"]  # in the order of ELBO.terms
    each = in_batches(terms, test, "ELBO", 32)
    means = {name: term.mean().item() for name, term in zip(names, each, strict=True)}
    log2_density = means["image"] / test["image"][0].numel() / math.log(2)  # of a dimension
    # A grey level is 1/127.5 wide on [−1, 1], so −log2 p(level) = log2 127.5 − log2 density.
    means["image, bits per dimension"] = math.log2(127.5) - log2_density
    return {term: {"nats": value} for term, value in means.items()}


# Tables, and the files of a run

def show(tables):
    """Print {title: {row: {column: number, or one for each seed}}} in Markdown."""
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in table.items():
            cells = [cell(row[column]) if column in row else "" for column in columns]
            print(f"| {name} | {' | '.join(cells)} |")


def cell(value):
    """A number, or the mean and the standard deviation of several."""
    if np.size(value) > 1:
        return f"{np.mean(value):.3f} ± {np.std(value, ddof=1):.3f}"
    return f"{np.mean(value):.3f}"


def read_results(path, settings):
    """The settings and the tables in a results.json."""
    if not path.exists():
        raise InputError(f"{path} is missing: that run has to be made first, to its end")
    text = read_text(path)
    try:
        record = json.loads(text)
        return settings(**record["settings"]), record["tables"]
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} is damaged or of no run of this script ({why(problem)}): leave "
                         "it out") from problem


def check_comparable(path, s, other):
    """Refuse the run in path if it cannot stand in one table with another; both are Settings."""
    differ = ""
    if (s.fixed("model")["data"], s.size) != (other.fixed("model")["data"], other.size):
        differ = "--data or --size"
    elif judged_by(s) and judged_by(other) and judged_by(s) != judged_by(other):
        differ = "--judge or --measured"
    elif s.method == other.method:
        if but_for_seed(s) != but_for_seed(other):
            differ = f"more than {s.method}'s --seed"
        elif s.seed == other.seed:
            raise InputError(f"{path} is one more {s.method} of --seed {s.seed}: leave it out")
    if differ:
        raise InputError(f"{path} differs from a run before it in {differ}: leave it out")


def but_for_seed(s):
    """What two runs must share to be one method with two seeds."""
    return {**s.fixed("prior"), "evaluations": s.evaluations, "seed": None}


def judged_by(s):
    """By whom, and on how many pictures; None without a judge."""
    return (Path(s.judge).resolve(), s.measured) if getattr(s, "judge", "") else None


def report(s):
    """The tables of the runs s.report, turned: {measure: {method: {given: [one a seed]}}}."""
    tables, runs = {}, []
    for folder in s.report:
        path = Path(folder) / "results.json"
        of_run, found = read_results(path, type(s))
        check_finite(path, found)
        for other in runs:
            check_comparable(path, of_run, other)
        runs.append(of_run)
        for title, given, measure, value in entries(found):
            methods = tables.setdefault(f"{title}: {measure}", {})
            row = methods.setdefault(of_run.method, {})
            row.setdefault(given, []).append(value)
    return tables


def entries(tables):
    """The numbers in {title: {row: {column: value}}}, as (title, row, column, value)."""
    for title, table in tables.items():
        for row, columns in table.items():
            for column, value in columns.items():
                yield title, row, column, value


def check_finite(path, tables):
    """Refuse tables for, or of, a file in which something is not a number."""
    for title, row, column, value in entries(tables):
        if not math.isfinite(value):
            raise FloatingPointError(f"{path}: {title}, {row}, {column} is {value}: look at the "
                                     "curves in history.png and at the data")


def save_results(s, results):
    """Write results, the settings and the machine to results.json in the folder s.out."""
    path = Path(s.out) / "results.json"
    check_finite(path, results["tables"])
    record = {
        "settings": asdict(s),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "images trained per second": s.steps * s.batch_size / results["seconds"]["model"],
        **results,
    }
    if s.device.startswith("cuda"):
        record["device"] = torch.cuda.get_device_name(s.device)
        record["peak memory, GiB"] = torch.cuda.max_memory_allocated(s.device) / 2**30
    elif resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        record["peak memory, GiB"] = peak / 2**30
    path.write_text(json.dumps(record, indent=1, allow_nan=False), "utf-8")
    print(f"\nNumbers are in {path}.")


def export(folder, pictures):
    """{label: (n, 3, H, W)} as folder/label/00000.png, for FID (Tables 1 and 3) by pytorch-fid."""
    for label, row in pictures.items():
        place = Path(folder) / "-".join(re.findall(r"\w+", label))
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("[0-9]" * 5 + ".png"):  # of a longer export before
            old.unlink()
        for k, pixels in enumerate(tqdm(to_bytes(row), f"writing {place}", leave=False)):
            Image.fromarray(pixels).save(place / f"{k:05d}.png")


# Reading data

def read_text(path):
    """A text file, with or without a byte-order mark; what is not UTF-8 in it is replaced."""
    try:
        text = path.read_text("utf-8-sig", "replace")
    except OSError as problem:
        raise InputError(f"{path} cannot be opened ({why(problem)})") from problem
    if "\0" in text:
        raise InputError(f"{path} is no text in UTF-8: get it anew")
    return text


def read_lines(path):
    """The lines of a text file, whatever its line ends."""
    return read_text(path).splitlines()


def read_table(path, pair, header=0, keys=()):
    """{key: value}, each pair(*words) of a line after the header; with all these keys, if given."""
    table = {}
    for number, line in enumerate(read_lines(path), 1):
        if number <= header or not line.strip():
            continue
        try:
            key, value = pair(*line.split())
        except (TypeError, ValueError, KeyError) as problem:  # words too many, too few, or others
            raise InputError(f"{path}, line {number} ({line[:40]}) is not as released: get it "
                             "anew") from problem
        if key in table:
            raise InputError(f"{path}, line {number} has {key} a second time: get it anew")
        table[key] = value
    missing = set(keys) - table.keys()
    if missing:
        raise InputError(f"{path} lacks picture {min(missing)}: unpack it again")
    return table


def open_picture(path, mode):
    """The PIL image in a file, decoded."""
    try:
        return Image.open(path).convert(mode)
    except Exception as problem:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise InputError(f"{path} cannot be read ({why(problem)}): unpack it again") from problem


def decoded(cache, read, names):
    """[read(name) for each name], in threads; kept in the file cache and taken from there."""
    if not names:
        raise InputError(f"there is no picture to decode for {cache}: get the lists of pictures "
                         "anew")
    if cache.exists():
        kept = read_checkpoint(cache, "names", "arrays")
        if kept["names"] == names:
            return kept["arrays"]
    with ThreadPoolExecutor() as pool:
        arrays = list(tqdm(pool.map(read, names), "decoding pictures", len(names)))
    arrays = torch.from_numpy(np.stack(arrays))
    try:
        save_checkpoint(cache, {"names": names, "arrays": arrays})
    except InputError as problem:
        print(f"The pictures will be decoded again at each run: {problem}.")
    return arrays
