"""Multimodal ELBO with Diffusion Decoders (Diff-MVAE; Wesego and Rooshenas) in one file.

Each modality x_i has an encoder q(z|x_i). Any subset A of them fuses to q(z|x_A), a product of
Gaussians; training draws subsets (MoPoE). Simple modalities have feed-forward decoders; images have
a diffusion decoder conditioned on z, whose denoising score-matching loss stands inside the ELBO. A
second, small diffusion model learns the distribution of z for unconditional samples.

The file follows the paper from top to bottom: sections 1 to 7 are the method, 8 to 10 what it takes
to run it. README.md lists what is where, and all departures from the paper; those from its
equations are marked "Deviation" here. The notation:

    x_1 .. x_M    modalities                          z           latent, (B, D), p(z) = N(0, I)
    A, S, ω_A     a subset, their family, its weight  μ, log σ²   mu, logvar of an expert or product
    t ∈ [0, 1]    time                                x_t         α(t) x + σ(t) ε, with ε ~ N(0, I)
    ℓ(t)          log-SNR, log α²/σ²                  β(t)        g(t)², the SDE's noise rate
    ε̂_θ(x_t,z,t)  the predicted noise                 s_θ         the score, −ε̂/σ
"""

import copy
import itertools
import json
import math
import os
import resource
import signal
import sys
import textwrap
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter as Layout
from contextlib import ExitStack
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
    """The family S of §3.2, (S, M) bool: "mopoe" every non-empty subset, "mvae" only the full one,
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
    """dx = −½ β(t) x dt + √β(t) dw on t ∈ [0, 1], β(t) linear (Y. Song et al. 2021).

    q(x_t|x) = N(α(t) x, σ(t)² I) is the paper's q(x_t|x_0) with ᾱ_t = α(t)². Bound and samplers
    stop at t_min. There σ = 0.0033, 0.4 of the step between two grey levels of 8 bits (2/255 on
    [−1, 1]): a little more noise than rounding left, so that no density can profit from the levels.
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
        """(ℓ(1), ℓ(t_min)) as floats."""
        return self.log_snr(torch.tensor([1.0, self.t_min], dtype=torch.float64)).tolist()


# ---- 3  Samplers (§4) ----------------------------------------------------------------------------

# Both call eps_model(x_t, t) -> ε̂ at a scalar t and start from x ~ N(0, I) at t = 1. N evaluations
# are N − 1 steps and, at t_min, the denoised x̂0 = (x − σ ε̂)/α.

def ddim(eps_model, x, sde, steps):
    """DDIM (J. Song et al. 2021, Eq. 12 with η = 0). x: (B, ...) -> (B, ...).

    Its times are quadratic, as its authors had them for CIFAR-10: short steps where noise is low.
    """
    t = torch.linspace(1, math.sqrt(sde.t_min), steps, device=x.device).square()  # (N,)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    for i in range(steps):
        eps = eps_model(x, t[i])
        x0 = (x - sigma[i] * eps) / alpha[i]
        if i + 1 < steps:
            x = alpha[i + 1] * x0 + sigma[i + 1] * eps
    return x0


def euler_maruyama(eps_model, x, sde, steps):
    """Euler–Maruyama on the reverse SDE, times uniform in log-SNR. x: (B, ...) -> (B, ...).

    dx = [−½ β x − β s_θ] dt + √β dw̄, backwards in t, with s_θ = −ε̂/σ (Y. Song et al. 2021). On a
    grid uniform in t the last step would leave noise of √(βh), a dozen grey levels at 50 steps.
    """
    ell_1, ell_0 = sde.log_snr_ends()
    t = sde.time_at(torch.linspace(ell_1, ell_0, steps, device=x.device))  # (N,)
    for i in range(steps - 1):
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


class Diffusion(nn.Module):
    """p(x|z) by denoising diffusion: the image decoder, and without z the latent prior.

    net(x_t, ℓ, z) -> v with v like x_t, ℓ: (B,), z: (B, D) or None. shape: of one x. evaluations:
    of the network for a sample, the table's if None.

                 weighting    λ(t) in Eq. 2   t uniform in   a bound, in nats   sampler, evaluations
    Diff-MVAE    likelihood   g(t)²           log-SNR ℓ      yes                Euler–Maruyama, 200
    Diff-MVAE*   simple       σ(t)², Eq. 1    t              no, a surrogate    DDIM, 20
    Diff-MVAE*   velocity     σ(t)²/α(t)²     angle φ        no, a surrogate    DDIM, 20

    with α = cos φ, σ = sin φ. Deviation: the paper gives Diff-MVAE* λ = 1. In Eq. 2 that would
    weigh small t still more than g² does; the works it cites have λ = 1 on Eq. 1's ε-loss:
    "simple". "velocity" has it on the network's own output, ‖v − v̂‖² (Salimans and Ho 2022), and
    spends less on times that are almost pure noise: half of all t have α² < 0.08.
    """

    samplers = {"likelihood": (euler_maruyama, 200), "simple": (ddim, 20), "velocity": (ddim, 20)}

    def __init__(self, net, shape, sde=VPSDE(), weighting="likelihood", evaluations=None):
        super().__init__()
        if weighting not in self.samplers:
            raise ValueError(f"unknown weighting {weighting!r}: choose from {list(self.samplers)}")
        self.net = net
        self.shape = tuple(shape)
        self.sde = sde
        self.weighting = weighting
        self.evaluations = evaluations

    def over_pictures(self, t):
        """(B,) -> (B, 1, ...), to multiply x."""
        return t.view(-1, *[1] * len(self.shape))

    def predict_eps(self, x_t, z, t):
        """ε̂ = σ x_t + α v: the network's v is the velocity α ε − σ x. t: (B,) -> ε̂ like x_t.

        Deviation: the paper does not say what its network outputs. v leaves Eqs. 1 and 2 as they
        are, starts (v = 0) as the exact denoiser of N(0, I), and keeps x̂0 finite at high noise.
        """
        v = in_bf16(self.net, x_t, self.sde.log_snr(t), z)
        t = self.over_pictures(t)  # (B, 1, ...)
        return self.sde.sigma(t) * x_t + self.sde.alpha(t) * v

    def error(self, x, z, t, eps):
        """‖ε − ε̂_θ(α x + σ ε, z, t)‖², of Eqs. 1, 2, 5. x, eps: (B, *shape), t: (B,) -> (B,).

        The step from Eq. 2's scores to noise: ∇ log q(x_t|x) = −ε/σ and s_θ = −ε̂/σ, so that
        ‖∇ log q − s_θ‖² = ‖ε − ε̂‖²/σ².
        """
        t_ = self.over_pictures(t)
        x_t = self.sde.alpha(t_) * x + self.sde.sigma(t_) * eps
        return (eps - self.predict_eps(x_t, z, t)).square().flatten(1).sum(1)

    def draw_times(self, n, device):
        """(n,) times, each uniform on [t_min, 1] in what the table says."""
        ell_1, ell_0 = self.sde.log_snr_ends()
        u = stratified(n, device)
        if self.weighting == "likelihood":
            return self.sde.time_at(ell_1 + (ell_0 - ell_1) * u)
        if self.weighting == "simple":
            return self.sde.t_min + (1 - self.sde.t_min) * u
        phi_0, phi_1 = math.atan(math.exp(-ell_0 / 2)), math.atan(math.exp(-ell_1 / 2))
        phi = phi_0 + (phi_1 - phi_0) * u  # tan φ = σ/α = e^(−ℓ/2)
        return self.sde.time_at(-2 * phi.tan().log())

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

        b = −KL(q(x_1|x) ‖ N(0, I)) + E log N(x; x_t0/α, σ²/α² I) − ½ ∫ g²/σ² E‖ε − ε̂‖² dt

        The integral, from t0 = t_min to 1, is Eq. 2. Since g²/σ² = −dℓ/dt it is (ℓ(t0) − ℓ(1))
        times the mean error over times uniform in ℓ. The second term needs no network: x − x_t0/α
        is noise of just that variance, so it is −½ (1 + log 2π σ²/α²) a dimension.
        Deviation: Eq. 5 leaves out the first two terms and adds the third, where it must subtract.
        """
        ell_1, ell_0 = self.sde.log_snr_ends()
        one = x.new_ones(())
        mean_1 = self.sde.alpha(one) * x.flatten(1)  # (B, d)
        logvar_1 = 2 * self.sde.sigma(one).log()
        prior = kl_divergence(mean_1, logvar_1)  # (B,)
        reconstruction = -0.5 * mean_1.shape[1] * (1 + math.log(2 * math.pi) - ell_0)
        score_matching = 0.5 * (ell_0 - ell_1) * error  # (B,)
        return reconstruction - prior - score_matching

    @torch.no_grad()
    def sample(self, z=None, n=None, noise=None, sampler=None, steps=None):
        """x ~ p(x|z), one for each row of z, (B, D), or n without z. noise: x_1, (B, *shape);
        steps: evaluations of the network, at least 1."""
        default_sampler, default_steps = self.samplers[self.weighting]
        if sampler is None:
            sampler = default_sampler
        if steps is None:
            steps = default_steps if self.evaluations is None else self.evaluations
        if steps < 1:
            raise ValueError(f"{steps} steps: give at least 1")
        if noise is None:
            device = next(self.parameters()).device if z is None else z.device
            noise = torch.randn(n if z is None else len(z), *self.shape, device=device)

        def eps_model(x_t, t):
            return self.predict_eps(x_t, z, t.expand(len(x_t)))

        return sampler(eps_model, noise, self.sde, steps)


# ---- 5  Networks (§4.1, §4.2) --------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def group_norm(channels):
    """At least four channels a group, at most 32 groups."""
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
            e = self.modulation(e)  # (B, 2 c_out)
            scale, shift = e.view(*e.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            h = (1 + scale) * h + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


class UNet(nn.Module):
    """v(x_t, ℓ, z) in 2-D (images, the paper's latent prior of CelebA) or 1-D (that of CUB).

    x: (B, channels, size) or (B, channels, size, size), size divisible by patch · 2^(levels − 1).
    log_snr: (B,). z: (B, z_dim), or None if z_dim = 0. Both condition every block by adaptive group
    norm (Preechakul et al. 2022); z also stands beside x_t as a picture that is linear in z, a
    first guess of x (as Pandey et al. 2022 do with a VAE's). attention: the levels that have it, 0
    the finest; the middle has. A patch is one position inside (Hoogeboom et al. 2023).
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
    """h + linear(silu((1 + s) LN(h) + b)), s and b linear in e. h: (B, width), e: (B, embedding)."""

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

    def log_prob(self, x, z):
        """log p(x|z) in nats, summed over dimensions: (B, ...), (B, D) -> (B,)."""
        return self.likelihood(in_bf16(self.net, z)).log_prob(x).reshape(len(z), -1).sum(1)

    @torch.no_grad()
    def sample(self, z):
        """The mean of p(x|z), (B, ...); of binary x the probability, which F1 (§4.2) thresholds.

        What varies is in z; sampling p(x|z) would only lay independent noise on every pixel.
        """
        p = self.likelihood(in_bf16(self.net, z))
        if isinstance(p, Categorical):
            raise ValueError("a Categorical has no mean: give x one-hot and a OneHotCategorical")
        return p.mean


@dataclass
class ELBO:
    """The terms of Eq. 5 for each example, averaged over the subsets. They are nats where every
    decoder's log_prob is: not under the surrogates of Diffusion."""

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


def mean_where(counts, values):
    """The mean of values (B, S) over those that count, (B, S) bool -> (B,); 0 where none does."""
    return (values * counts).sum(1) / counts.sum(1).clamp(min=1)


def without_gaps(x, observed):
    """x with zeros for what is not observed: nothing of that, NaN or other, goes on from here."""
    filled = dict(x)
    for name in x.keys() & observed.keys():
        there = observed[name].view(-1, *[1] * (x[name].ndim - 1))  # (B, 1, ...)
        filled[name] = torch.where(there, x[name], 0)
    return filled


def remaining(family, there):
    """A ∩ observed for each A and example, (S, M), (B, M) bool -> (B, S, M), and which count, (B, S).

    What is empty by that does not count. All that is there stands in its place, to be computable.
    """
    present = family & there[:, None]  # (B, S, M)
    counts = present.any(-1) | ~family.any(-1)  # (B, S)
    return torch.where(counts[..., None], present, there[:, None]), counts


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
        reserved = {"ELBO", "surrogate", "KL"} & {*encoders, *decoders}
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
        if self.prior_expert:  # one more expert, μ = 0 and log σ² = 0
            mu, logvar = F.pad(mu, (0, 0, 0, 1)), F.pad(logvar, (0, 0, 0, 1))
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

    def reconstruction(self, decoder, x, z, counts, exact):
        """Σ_A ω_A E log p(x|z_A), or an unbiased estimate: z: (B, S, D), counts: (B, S) -> (B,).

        Cheap decoders decode every subset; the others, if not exact, one, drawn for each example.
        """
        batch, size, _ = z.shape
        if exact:
            each = [decoder.log_prob(x, z[:, s]) for s in range(size)]
            return mean_where(counts, torch.stack(each, dim=1))
        if getattr(decoder, "every_subset", False):
            x = x.repeat_interleave(size, dim=0)  # (B S, ...)
            return mean_where(counts, decoder.log_prob(x, z.flatten(0, 1)).view(batch, size))
        number = (counts.sum(1) * stratified(batch, z.device)).long()  # (B,) of those that count
        drawn = (counts.cumsum(1) > number[:, None]).int().argmax(1)  # (B,) of all
        return decoder.log_prob(x, z[torch.arange(batch, device=z.device), drawn])

    def elbo(self, x, observed=None, A=None, exact=False):
        """Eq. 5 for x, {name: (B, ...)}: each decoder runs once, the KL is exact.

        A Gaussian's KL needs no decoder, so it is averaged over all subsets: a mean over A of bounds
        on log p(x) is a bound, and what can be summed need not be drawn. exact: every decoder runs
        for every subset. A: (M,) bool takes this subset alone in place of the family.
        """
        if A is not None and not (A.any() or self.prior_expert):
            raise ValueError("A is empty: only the prior expert allows a subset of nothing")
        observed = {} if observed is None else observed
        x = without_gaps(x, observed)
        family = self.subsets if A is None else A[None].to(self.subsets)  # (S, M)
        experts = self.experts({name: x[name] for name in self.encoders}, observed)
        expert_mu, expert_logvar, there = experts  # (B, M, D) twice, (B, M)
        present, counts = remaining(family, there)  # (B, S, M), (B, S)
        mu, logvar = self.fuse(expert_mu[:, None], expert_logvar[:, None], present)  # (B, S, D)
        divergence = self.divergence(mu, logvar, expert_mu, expert_logvar)  # (B, S)
        kl = mean_where(counts, divergence)  # (B,)  Σ_A ω_A KL(q(z|x_A) ‖ p(z))
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            term = self.reconstruction(decoder, x[name], z, counts, exact)  # (B,)
            log_prob[name] = torch.where(observed[name], term, 0) if name in observed else term
        return ELBO(log_prob, kl, self.beta, self.weights)

    def full_elbo(self, x, observed=None):
        """The bound itself: β = 1, no weights, and every decoder runs for every subset."""
        elbo = self.elbo(x, observed, exact=True)
        return ELBO(elbo.log_prob, elbo.kl, 1.0, {})

    def decode(self, z):
        """A sample of every modality, {name: (B, ...)}; z may come from a posterior or a prior."""
        return {name: decoder.sample(z) for name, decoder in self.decoders.items()}


class MVTCAE(DiffMVAE):
    """The baseline of Hwang et al. 2021 (Tables 1 to 3), from the same parts; no bound on log p(x).

    (M − α)/M E[Σ_i log p(x_i|z)] − (1 − α) KL(q ‖ p(z)) − α/M Σ_i KL(q ‖ q(z|x_i)),  q = q(z|x)

    with the product of all experts alone. α = 0 is the objective of MVAE.
    """

    def __init__(self, encoders, decoders, alpha=0.9, beta=1.0, weights=None):
        super().__init__(encoders, decoders, "mvae", beta, weights)
        self.alpha = alpha
        share = (len(encoders) - alpha) / len(encoders)
        self.weights = {name: share * self.weights.get(name, 1) for name in decoders}

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        to_prior = kl_divergence(mu, logvar)  # (B, 1)
        to_experts = kl_divergence(mu, logvar, expert_mu, expert_logvar)  # (B, M)
        return (1 - self.alpha) * to_prior + self.alpha * to_experts.mean(1, keepdim=True)

    def elbo(self, x, observed=None, A=None, exact=False):
        if observed or A is not None:
            raise ValueError("MVTCAE is defined for complete examples and the product of all")
        return super().elbo(x, exact=exact)


# ---- 7  Latent prior (§3.4) ----------------------------------------------------------------------

class LatentPrior(Diffusion):
    """ε-matching (Eq. 1) on z_0 ~ q(z|x) = ∏_i q(z|x_i): where unconditional z come from.

    It is trained after the model, on the finished encoders. shape: how the D latents are laid out
    for net, (D,) for a ResidualMLP; the paper's UNets have (1, 16, 16) for CelebA, (1, 768) for CUB.
    Deviation: z is standardised; otherwise its scale would not fit the fixed noise schedule.
    """

    def __init__(self, net, shape, weighting="velocity"):
        super().__init__(net, shape, weighting=weighting)
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
INTERVAL = 500  # steps between two checkpoints, or a hundredth of a long training
WARMUP, COOLDOWN = 100, 500  # first and last steps, in which the learning rate rises and falls
CLIP = 1.0  # largest norm of the gradient


class InputError(ValueError):
    """Something the user can mend; the message names it and the cure."""


def option(drawn, help, real=None, least=None, most=math.inf, **flag):
    """A field of Options: its default for drawn data and, where that differs, for real data."""
    note = f" (default: {drawn})" if real is None else f" (default: {drawn} drawn, {real} real)"
    flag["help"] = help + note * (drawn not in (None, "", []))
    defaults = drawn, drawn if real is None else real
    ends = least or (1e-9 if drawn else 0), most  # 0 is allowed where the default is 0 or none
    return field(default=None, metadata=dict(defaults=defaults, ends=ends, flag=flag))


@dataclass
class Options:
    """Settings that are also flags, each made by option; scripts add theirs. None: the default."""

    data: str = option("", "folder of the real data; without it data are drawn")
    out: str = option("runs", "folder for checkpoints, numbers and pictures")
    export: str = option("", "folder for PNGs of real and generated pictures, as for FID")
    report: str = option([], "folders of finished runs: print their tables and stop", nargs="+")
    steps: int = option(1000, "training steps of Diff-MVAE")
    prior_steps: int = option(2000, "training steps of the latent prior", 10_000)
    prior_batch: int = option(256, "latents in a step of the latent prior")
    batch_size: int = option(16, "examples in a step")
    ema: float = option(0.995, "decay of the averaged weights", 0.9999, most=1)
    seed: int = option(0, "seed of all randomness")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    free = {"out", "export", "report", "device"}  # what does not touch the weights

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, f.metadata["defaults"][bool(self.data)])
            least, most = f.metadata["ends"]
            for v in np.ravel(value := getattr(self, f.name)):
                if isinstance(v, np.number) and not least <= v <= most:
                    flag, better = f.name.replace("_", "-"), "smaller" if v > most else "larger"
                    raise InputError(f"--{flag} {value}: give a {better} number")

    @classmethod
    def parse(cls, description):
        """Read the command line."""
        parser = ArgumentParser(description=description, formatter_class=Layout)
        for f in fields(cls):
            parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, **f.metadata["flag"])
        return cls(**vars(parser.parse_args()))

    def shared(self, stage):
        """What a checkpoint and a run that goes on from it must have in common."""
        free = self.free
        if stage == "model":
            free = free | {name for name in asdict(self) if name.startswith("prior_")}
        fixed = {k: v for k, v in asdict(self).items() if k not in free}
        return fixed | {"data": self.data and Path(self.data).resolve().name}


def save_checkpoint(path, state):
    """Write beside, then rename: path holds the old state or the new one, never half of it."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:  # RuntimeError: how torch says that a disk is full
        raise InputError(f"{path} cannot be written ({problem}), what was there before is whole: "
                         "make room, or take another folder") from problem


def read_checkpoint(path):
    """What save_checkpoint wrote, on the CPU."""
    try:
        return torch.load(path, "cpu", weights_only=True, mmap=True)  # reads no more than is used
    except Exception as problem:  # torch has no class for what is not, or not all of, a checkpoint
        state = "damaged: remove it" if path.exists() else "missing: that run has to be made first"
        raise InputError(f"{path} is {state}") from problem


def restore(path, settings, parts):
    """Load {name: part} from a checkpoint of the same settings; return its step and seconds."""
    state = read_checkpoint(path)
    was = state.get("settings", {})
    if differ := [k for k in was | settings if was.get(k) != settings.get(k)]:
        changes = ", ".join(f"{k} was {was.get(k)!r} and is {settings.get(k)!r}" for k in differ)
        raise InputError(f"{path} has other settings ({changes}): repeat its flags or change --out")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["seconds"]


def prepare(options):
    """options, if nothing will fail later: the device, the folders, the checkpoints in them."""
    try:
        torch.empty(0, device=getattr(options, flag := "device"))
        for flag in (name for name in ("out", "export") if getattr(options, name)):
            Path(getattr(options, flag)).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=getattr(options, flag)).close()
    except (OSError, RuntimeError, AssertionError) as problem:
        value, why = getattr(options, flag), str(problem).splitlines()[0]
        raise InputError(f"--{flag} {value} cannot be used ({why}): give another") from problem
    for stage in STAGES:
        if (path := Path(options.out) / f"{stage}.pt").exists():
            restore(path, options.shared(stage), {})
    return options


def readings(named, step):
    """{name: float} of the means, or a FloatingPointError that names the terms that broke."""
    values = dict(zip(named, torch.stack(list(named.values())).tolist()))
    if broken := ", ".join(name for name, value in values.items() if not math.isfinite(value)):
        cure = "the last checkpoint is kept; lower the learning rate or look at the data"
        raise FloatingPointError(f"{broken} not finite before step {step}: {cure}")
    return values


def seed_at(seed, stage, step):
    """One well-mixed seed for each step of each stage."""
    return int(np.random.SeedSequence((seed, STAGES.index(stage), step)).generate_state(1)[0])


def fit(model, terms, num_examples, stage, options, rates, preview=None):
    """Train model with Adam; return its moving average, the model from then on, and the seconds.

    terms(indices) -> {name: (B,)}, named terms for a batch: the first is maximised, all are shown.
    stage names the checkpoint, and preview(averaged) follows it. rates: [(module, learning rate)].
    From a checkpoint training goes on and ends as if never interrupted: a step draws all its
    randomness from (seed, stage, step).
    """
    path, settings = Path(options.out) / f"{stage}.pt", options.shared(stage)
    steps = options.steps if stage == "model" else options.prior_steps
    size = options.batch_size if stage == "model" else options.prior_batch
    interval = max(INTERVAL, steps // 100)
    path.parent.mkdir(parents=True, exist_ok=True)
    averaged = copy.deepcopy(model.train()).eval().requires_grad_(False)
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    step, seconds = restore(path, settings, parts) if path.exists() else (0, 0.0)
    weights, averages = list(model.parameters()), list(averaged.parameters())
    progress = tqdm(desc=stage, total=steps, initial=step, unit=" examples", unit_scale=size)
    with ExitStack() as stack, progress as bar:
        stop = []  # Ctrl-C fills it, and the step under way is finished
        usual = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
        stack.callback(signal.signal, signal.SIGINT, usual)
        started = time.monotonic() - seconds
        while step < steps:
            torch.manual_seed(seed_at(options.seed, stage, step))
            indices = torch.randint(num_examples, (size,), device=options.device)
            named = {name: term.mean() for name, term in terms(indices).items()}
            optimizer.zero_grad()
            (-next(iter(named.values()))).backward()
            named["gradient"] = nn.utils.clip_grad_norm_(weights, CLIP)
            for group, (_, rate) in zip(optimizer.param_groups, rates):
                group["lr"] = rate * min(1, (step + 1) / WARMUP, (steps - step) / COOLDOWN)
            optimizer.step()
            with torch.no_grad():
                keep = min(options.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, weights, 1 - keep)
            step += 1
            bar.update()
            due = stop or step == steps or step % interval == 0
            if due or step % 20 == 0:
                bar.set_postfix({k: f"{v:.4g}" for k, v in readings(named, step).items()})
            if due:
                seconds = time.monotonic() - started
                state = {"step": step, "seconds": seconds, "settings": settings}
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(path, state | states)
            if due and preview and not stop:
                preview(averaged)
                started = time.monotonic() - seconds
            if stop and due:
                raise SystemExit(f"\nstopped after step {step}, saved in {path}: run it again")
    return averaged, seconds


# ---- 9  Measures and pictures (§4) ---------------------------------------------------------------

def f1_score(predicted, actual):
    """Sample-average F1 (§4.2): 2 TP / (2 TP + FP + FN) of each example, 0 where both are empty;
    predicted, actual: (N, ...) bool, or probabilities, which are thresholded at ½."""
    predicted, actual = ((x > 0.5).flatten(1) for x in (predicted, actual))
    both, total = (predicted & actual).sum(1), predicted.sum(1) + actual.sum(1)
    return (2 * both / total.clamp(min=1)).mean().item()


def frechet_distance(a, b):
    """‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½) for features (N, d); FID on Inception's."""
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # eigenvalues are ≥ 0
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()


def to_bytes(pictures):
    """(n, 1 or 3, H, W) in [−1, 1] -> (n, H, W, 3) uint8, for PIL."""
    levels = (pictures.float().cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def save_grid(path, rows, captions=None, side=64):
    """A PNG of rows {label: (n, 1 or 3, H, H) in [−1, 1]}, above captions {label: n strings}."""
    font, small, captions = ImageFont.load_default(14), ImageFont.load_default(10), captions or {}
    left, own = 12 + max(int(font.getlength(k)) for k in rows), next(iter(rows.values())).shape[-1]
    side = own * max(1, side // own)
    heights = {label: side + (72 if label in captions else 2) for label in rows}
    size = left + (side + 2) * max(map(len, rows.values())), sum(heights.values())
    sheet, top = Image.new("RGB", size, "white"), 0
    draw = ImageDraw.Draw(sheet)
    for label, pictures in rows.items():
        draw.text((6, top + side / 2), label, "black", font, anchor="lm")
        for j, picture in enumerate(map(Image.fromarray, to_bytes(pictures))):
            place = left + (side + 2) * j, top
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
            if label in captions:
                text = textwrap.fill(captions[label][j], (side + 2) // 6)
                draw.multiline_text((place[0], top + side), text, "black", small, spacing=1)
        top += heights[label]
    sheet.save(path)


@torch.no_grad()
def in_batches(f, data, label, size=250):
    """f on pieces of {name: (N, ...)}; each of the several tensors it returns is concatenated."""
    pieces = list(zip(*(x.split(size) for x in data.values())))
    results = [f(dict(zip(data, piece))) for piece in tqdm(pieces, label, leave=False)]
    return [torch.cat(parts) for parts in zip(*results)]


def save_results(options, results):
    """Write results, the settings and the machine to results.json in the folder options.out."""
    name, peak = f"CPU, {torch.get_num_threads()} threads", resource.getrusage(resource.RUSAGE_SELF)
    memory, path = peak.ru_maxrss * 1024, Path(options.out) / "results.json"
    if options.device.startswith("cuda"):
        name = torch.cuda.get_device_name(options.device)
        memory = torch.cuda.max_memory_allocated(options.device)
    speed = options.steps * options.batch_size / results["seconds"]["model"]
    record = {"settings": asdict(options), "device": name, "peak memory, GiB": memory / 2**30,
              "images trained per second": speed}
    path.write_text(json.dumps(record | results, indent=1))
    print(f"\nNumbers are in {path}.")


def main(run, options, description):
    """A script's entry: run on the command line's options; an InputError is a line, status 2."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    try:
        s = options.parse(description)
        run(s if s.report else prepare(s))
    except (InputError, FloatingPointError, KeyboardInterrupt) as problem:
        why = str(problem) or "stopped: run it again"
        print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
        sys.exit(2)
