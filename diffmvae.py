"""Multimodal ELBO with Diffusion Decoders (Diff-MVAE; Wesego and Rooshenas) in one file.

Each modality x_i has an encoder q(z|x_i). Any subset A of them fuses to q(z|x_A), a product of
Gaussians; the ELBO is an average over subsets (MoPoE). Simple modalities have feed-forward
decoders; images have a diffusion decoder conditioned on z, whose denoising score-matching loss
stands inside the ELBO. A second, small diffusion model learns the distribution of z for
unconditional samples.

Sections 1 to 6 are the method, in the paper's order, and 7 its networks; 8 holds two variants; 9 to
11 train, measure and run it. README.md says what of the paper is where, and lists all departures
from it; those from its equations are marked "Deviation" here. The notation:

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
import signal
import sys
import textwrap
import time
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from tqdm import tqdm


class InputError(ValueError):
    """Something the user can mend; the message names it and the cure."""


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
    share = log_precision.softmax(dim=-2)  # (..., M, D)  σ_i⁻² / Σ_j σ_j⁻²
    return (share * mu).sum(-2), -log_precision.logsumexp(-2)


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
    raise InputError(f"unknown family {family!r}: choose one of mopoe, mvae, mmvae")


def sample_gaussian(mu, logvar):
    """z ~ N(μ, σ²), reparameterised: μ + σ ε."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


# ---- 2  Forward SDE (§3.1) -----------------------------------------------------------------------

@dataclass(frozen=True)
class VPSDE:
    """dx = −½ β(t) x dt + √β(t) dw on t ∈ [0, 1], β(t) linear (Song et al. 2021, SDE).

    q(x_t|x) = N(α(t) x, σ(t)² I) is the paper's q(x_t|x_0) with ᾱ_t = α(t)². Bound and samplers
    stop at t_min, which is ours. There σ = 0.0032, 0.4 of the step between two grey levels of 8
    bits (2/255 on [−1, 1]). Rounding to levels errs by 1/√12 = 0.29 of that step; noise a little
    larger hides the levels, so that a density gains nothing from peaks at them.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-4

    def __post_init__(self):
        if not 0 < self.t_min < 1:
            raise InputError(f"t_min {self.t_min}: give more than 0, where σ = 0, and less than 1")

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

# Both start from x ~ N(0, I) at t = 1 and evaluate eps_model(x_t, t) -> ε̂ at N scalar times, of
# which the last is t_min (if N > 1): N − 1 steps and, there, the denoised x̂0 = (x − σ ε̂)/α.

def ddim(eps_model, x, sde, evaluations):
    """DDIM (Song, Meng and Ermon 2021, Eq. 12 with η = 0). x: (B, ...) -> (B, ...).

    Its times are quadratic, as its authors had them for CIFAR-10: short steps where noise is low.
    """
    root = torch.linspace(1, math.sqrt(sde.t_min), evaluations, device=x.device, dtype=x.dtype)
    t = root.square()  # (N,)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    for i in range(evaluations):
        eps = eps_model(x, t[i])
        x0 = (x - sigma[i] * eps) / alpha[i]
        if i + 1 < evaluations:
            x = alpha[i + 1] * x0 + sigma[i + 1] * eps
    return x0


def euler_maruyama(eps_model, x, sde, evaluations):
    """Euler–Maruyama on the reverse SDE, times uniform in log-SNR. x: (B, ...) -> (B, ...).

    dx = [−½ β x − β s_θ] dt + √β dw̄ with s_θ = −ε̂/σ (Song et al. 2021, SDE). Time falls by h in a
    step, dt = −h, which turns the signs of the drift. On a grid uniform in t the last step would
    leave noise of √(βh), a dozen grey levels at 50 steps.
    """
    ell_1, ell_0 = sde.log_snr_ends()
    ell = torch.linspace(ell_1, ell_0, evaluations, device=x.device, dtype=x.dtype)
    t = sde.time_at(ell)  # (N,)
    for i in range(evaluations - 1):
        h, g2 = t[i] - t[i + 1], sde.g2(t[i])
        score = -eps_model(x, t[i]) / sde.sigma(t[i])
        x = x + h * g2 * (0.5 * x + score) + (h * g2).sqrt() * torch.randn_like(x)
    return (x - sde.sigma(t[-1]) * eps_model(x, t[-1])) / sde.alpha(t[-1])


# ---- 4  Score matching as a log-likelihood bound (Eqs. 1 and 2) ----------------------------------

def stratified(n, device=None):
    """(n,) numbers, each uniform on [0, 1), evenly spread: same expectations, less variance."""
    return (torch.rand((), device=device) + torch.randperm(n, device=device) / n) % 1


def in_bf16(network, *inputs):
    """network(*inputs); on CUDA it computes in bfloat16, and what comes out is float32 again. In
    float64 nothing changes."""
    if inputs[0].device.type != "cuda" or inputs[0].dtype == torch.float64:
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
    of the network for a sample; default: the table's.

                 weighting    λ(t) in Eq. 2   t uniform in   a bound, in nats   sampler, evaluations
    Diff-MVAE    likelihood   g(t)²           log-SNR ℓ      yes                Euler–Maruyama, 100
    Diff-MVAE*   simple       σ(t)², Eq. 1    t              no, a surrogate    DDIM, 20
    Diff-MVAE*   velocity     ∝ g² σ/α        angle φ        no, a surrogate    DDIM, 20

    with α = cos φ, σ = sin φ. Deviation: the paper gives Diff-MVAE* λ = 1. In Eq. 2 that would
    weigh small t still more than g² does; the works it cites have λ = 1 on Eq. 1's ε-loss:
    "simple". "velocity" has it on the network's own output, ‖v − v̂‖² = ‖ε − ε̂‖²/α² (Salimans and
    Ho 2022). Which times are drawn matters as much: half of all t have α² < 0.08, almost pure
    noise, hence uniform in φ. As dφ = g² α/(2σ) dt, "velocity" minimises ∫ g²/(2ασ) ‖ε − ε̂‖² dt;
    where that has g²/(2ασ), Eq. 2 has λ/σ²: the λ of the table.
    """

    samplers = {"likelihood": (euler_maruyama, 100), "simple": (ddim, 20), "velocity": (ddim, 20)}

    def __init__(self, net, shape, sde=VPSDE(), weighting="likelihood", evaluations=None):
        super().__init__()
        if weighting not in self.samplers:
            raise InputError(f"unknown weighting {weighting!r}: choose from {list(self.samplers)}")
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
        ell_1, ell_0 = self.sde.log_snr_ends()
        u = stratified(n, device)
        if self.weighting == "likelihood":
            return self.sde.time_at(ell_1 + (ell_0 - ell_1) * u)
        if self.weighting == "simple":
            return self.sde.t_min + (1 - self.sde.t_min) * u
        phi_0 = math.atan(math.exp(-ell_0 / 2))  # tan φ = σ/α = e^(−ℓ/2)
        phi_1 = math.atan(math.exp(-ell_1 / 2))
        phi = phi_0 + (phi_1 - phi_0) * u
        return self.sde.time_at(-2 * phi.tan().log())  # ℓ = log α²/σ² = −2 log tan φ

    def log_prob(self, x, z=None, t=None, eps=None):
        """An estimate of a lower bound b(x, z) ≤ log p(x|z) in nats, or of what stands for it.

        x: (B, *shape), z: (B, D) -> (B,). Of "likelihood" (Song et al. 2021, MLE; Kingma et al.
        2021) it is

            b = −KL(q(x_t|x) ‖ N(0, I)) at t = 1
                + E log N(x; x_t/α, σ²/α² I) at t = t_0
                − ½ ∫ g²/σ² E‖ε − ε̂‖² dt from t_0 to 1

        The integral is Eq. 2 with λ = g². Since g²/σ² = −dℓ/dt it is ℓ(t_0) − ℓ(1) times the mean
        error over times uniform in ℓ. The surrogates are −½ E‖ε − ε̂‖² ("simple") and
        −½ E‖v − v̂‖² = −½ E‖ε − ε̂‖²/α² ("velocity"). t: (B,) and eps are given only to test it.
        Deviation: Eq. 5 has of b only the integral, and adds it. It is at least 0 and has no upper
        limit: what is to be a lower bound on log p(x) must subtract it.
        """
        eps = torch.randn_like(x) if eps is None else eps
        t = self.draw_times(len(x), x.device).to(x.dtype) if t is None else t
        error = self.error(x, z, t, eps)  # (B,)
        if self.weighting == "simple":
            return -0.5 * error
        if self.weighting == "velocity":
            return -0.5 * error / self.sde.alpha(t).square()
        ell_1, ell_0 = self.sde.log_snr_ends()
        return self.terms_without_network(x) - 0.5 * (ell_0 - ell_1) * error

    def terms_without_network(self, x):
        """The first two terms of b(x, z): (B, *shape) -> (B,), nats.

        At t_0 the noise of x_t/α is known to have variance σ²/α², so that the expected log-density
        is −½ (1 + log 2π σ²/α²) a dimension, a constant.
        """
        _, ell_0 = self.sde.log_snr_ends()
        end = x.new_ones(())  # t = 1
        mean = self.sde.alpha(end) * x.flatten(1)  # (B, d)
        kl_at_end = kl_divergence(mean, 2 * self.sde.sigma(end).log())  # (B,)
        logvar_at_t0 = -ell_0  # log σ²/α²
        reconstruction = -0.5 * mean.shape[1] * (1 + math.log(2 * math.pi) + logvar_at_t0)
        return reconstruction - kl_at_end

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
            raise InputError(f"{evaluations} evaluations: give at least 1")
        if noise is None:
            like = next(self.parameters()) if z is None else z  # its device, its precision
            noise = like.new_empty(n if z is None else len(z), *self.shape).normal_()

        def eps_model(x_t, t):
            return self.predict_eps(x_t, z, t.expand(len(x_t)))

        return sampler(eps_model, noise, self.sde, evaluations)


# ---- 5  The multimodal ELBO (Eqs. 3 to 5) --------------------------------------------------------

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
        inner = p
        while isinstance(inner, Independent):
            inner = inner.base_dist
        if isinstance(inner, Categorical):
            raise InputError("a Categorical has no mean: give x one-hot and a OneHotCategorical")
        return p

    def log_prob(self, x, z):
        """log p(x|z) in nats, summed over dimensions: (B, ...), (B, D) -> (B,)."""
        p = self.distribution(z)
        expected = p.batch_shape + p.event_shape
        if x.shape != expected:  # torch would broadcast it
            raise InputError(f"x is {tuple(x.shape)}, where p(x|z) is of {tuple(expected)}")
        return p.log_prob(x).reshape(len(z), -1).sum(1)

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
    beta: float  # weighs the KL
    term_weights: dict  # {modality: w_i}, 1 where missing

    @property
    def bound(self):
        """Σ_i log p(x_i|z) − KL, (B,): Eq. 5, if log_prob of every decoder is a bound."""
        return sum(self.log_prob.values()) - self.kl

    @property
    def total(self):
        """Σ_i w_i log p(x_i|z) − β KL, (B,): what is trained."""
        terms = [self.term_weights.get(name, 1) * term for name, term in self.log_prob.items()]
        return sum(terms) - self.beta * self.kl

    def terms(self, objective="ELBO"):
        """{objective: total, each modality, "KL"}, all (B,); give a surrogate another name."""
        return {objective: self.total, **self.log_prob, "KL": self.kl}


class DiffMVAE(nn.Module):
    """The multimodal VAE of §3.2: {name: encoder}, {name: decoder} -> Eq. 5, any-to-any generation.

    An encoder maps x_i to (mu, logvar), each (B, D). A decoder has log_prob(x_i, z) -> (B,), nats,
    sample(z) -> x_i, and every_subset = True if it is cheap enough to decode all subsets in a step.
    prior_expert multiplies p(z) into every product, as MVAE does (§2) and §3.3 does not. Deviation:
    beta weighs the KL, and term_weights, {name: w_i}, the log p(x_i|z), as in MoPoE; Eq. 5 has only
    1s.
    """

    def __init__(self, encoders, decoders, family="mopoe", beta=1.0, term_weights=None,
                 prior_expert=False):
        super().__init__()
        self.term_weights = {} if term_weights is None else term_weights
        check_names(self.term_weights, decoders, "decoder")
        self.encoders = nn.ModuleDict(encoders)
        self.decoders = nn.ModuleDict(decoders)
        self.register_buffer("subsets", subsets(len(encoders), family), persistent=False)  # (S, M)
        self.beta = beta
        self.prior_expert = prior_expert

    def experts(self, x):
        """q(z|x_i) for each modality in x: mu, logvar, each (B, M, D)."""
        check_names(x, self.encoders, "encoder")
        each = [in_bf16(self.encoders[name], x[name]) for name in self.encoders if name in x]
        means, logvars = zip(*each)  # M times (B, D)
        return torch.stack(means, dim=1), torch.stack(logvars, dim=1)

    def fuse(self, mu, logvar, present):
        """q(z|x_A) ∝ ∏_{i∈A} q(z|x_i), with p(z) if prior_expert: (..., M, D) -> (..., D)."""
        if self.prior_expert:
            zeros = torch.zeros_like(mu[..., :1, :])  # p(z): μ = 0 and log σ² = 0
            mu = torch.cat([mu, zeros], dim=-2)
            logvar = torch.cat([logvar, zeros], dim=-2)
            present = F.pad(present, (0, 1), value=True)
        return product_of_experts(mu, logvar, present)

    def posterior(self, x):
        """q(z|x_o) given the observed modalities x, a dict (§3.3): mu, logvar, each (B, D)."""
        if not x:
            raise InputError("nothing is observed: give at least one modality, or sample the prior")
        mu, logvar = self.experts(x)  # (B, M, D)
        present = torch.ones(mu.shape[:2], dtype=torch.bool, device=mu.device)
        return self.fuse(mu, logvar, present)

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        """KL(q(z|x_A) ‖ p(z)) of the products (B, S, D); the experts (B, M, D) are for MVTCAE."""
        return kl_divergence(mu, logvar)  # (B, S)

    def reconstruction(self, decoder, x, z, every_subset):
        """Σ_A ω_A log p(x|z_A), or an unbiased estimate: z: (B, S, D) -> (B,).

        Cheap decoders decode every subset; the others, if not asked to, one, drawn for each
        example.
        """
        batch, size, _ = z.shape
        if every_subset or getattr(decoder, "every_subset", False):
            x = x.repeat_interleave(size, dim=0)  # (B S, ...)
            return decoder.log_prob(x, z.flatten(0, 1)).view(batch, size).mean(1)
        drawn = (size * stratified(batch, z.device)).long()  # (B,), 0 .. S − 1, equally likely
        rows = torch.arange(batch, device=z.device)
        return decoder.log_prob(x, z[rows, drawn])

    def elbo(self, x, A=None, every_subset=False):
        """Eq. 5 for x, {name: (B, ...)}: each decoder runs once, the KL is exact.

        A Gaussian's KL needs no decoder, so it is averaged over all subsets: a mean of bounds on
        log p(x) is a bound, and what can be summed need not be drawn. every_subset: every decoder
        runs for every subset. A: (M,) bool takes this subset alone in place of the family.
        """
        if A is not None and not (A.any() or self.prior_expert):
            raise InputError("A is empty: only the prior expert allows a subset of nothing")
        check_names(x, [*self.encoders, *self.decoders], "encoder or decoder")
        family = self.subsets if A is None else A[None].to(self.subsets)  # (S, M)
        expert_mu, expert_logvar = self.experts({name: x[name] for name in self.encoders})
        mu, logvar = self.fuse(expert_mu[:, None], expert_logvar[:, None], family)  # (B, S, D)
        kl = self.divergence(mu, logvar, expert_mu, expert_logvar).mean(1)  # (B,)
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            log_prob[name] = self.reconstruction(decoder, x[name], z, every_subset)  # (B,)
        return ELBO(log_prob, kl, self.beta, self.term_weights)

    def decode(self, z):
        """A sample of every modality, {name: (B, ...)}; z may come from a posterior or a prior."""
        return {name: decoder.sample(z) for name, decoder in self.decoders.items()}


def check_names(given, known, kind):
    """Refuse names in given that are not in known."""
    unknown = set(given) - set(known)
    if unknown:
        raise InputError(f"no {kind} for {sorted(unknown)}: there are {list(known)}")


# ---- 6  Latent prior (§3.4) ----------------------------------------------------------------------

class LatentPrior(Diffusion):
    """A diffusion on z_0 ~ q(z|x) = ∏_i q(z|x_i): where unconditional z come from.

    It is trained after the model, on the finished encoders. Deviation: the default is the weighting
    "velocity", the paper's is Eq. 1, "simple". shape: how the D latents are laid out for net, (D,)
    for a ResidualMLP, and for the paper's UNets (1, 16, 16) (CelebA), (1, 768) (CUB). Deviation: z
    is standardised; otherwise its scale would not fit the fixed noise schedule.
    """

    def __init__(self, net, shape, weighting="velocity"):
        super().__init__(net, shape, weighting=weighting, evaluations=50)  # as in the paper
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.ones(math.prod(shape)))

    def standardise(self, mu, logvar):
        """Take mean and deviation of z_0 ~ q(z|x) from a training set, mu, logvar: (N, D)."""
        variance = mu.var(0, correction=0) + logvar.exp().mean(0)  # (D,), of the means and around
        self.mean.copy_(mu.mean(0))
        self.std.copy_(variance.sqrt())

    def log_prob(self, z_0):
        """The surrogate, −½ E‖ε − ε̂‖² of Eq. 1 or −½ E‖v − v̂‖², in standardised space: (B,)."""
        return super().log_prob(((z_0 - self.mean) / self.std).view(-1, *self.shape))

    def sample(self, n, **options):
        """n latents, (n, D). options: as in Diffusion.sample."""
        return super().sample(n=n, **options).flatten(1) * self.std + self.mean


# ---- 7  Networks (§4.1, §4.2) --------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


class GroupNorm(nn.GroupNorm):
    """In the precision of what comes in: autocast would make a float32 copy of every activation,
    and keep it for the backward pass. At most 32 groups, of at least four channels where there are
    as many."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, max(1, channels // 4), channels), channels)

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # the kernel adds up in float32
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


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
        self.norm = GroupNorm(channels)
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
        self.norm1 = GroupNorm(c_in)
        self.conv1 = CONV[dims](c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
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
    attention: the levels that have it, 0 the finest; the middle always has it. Inside, a patch of
    patch × patch pixels is one position (Hoogeboom et al. 2023).

    The way up takes back, last first, all that the way down has kept. With multipliers (1, 2) and
    blocks = 2 the channels are, in widths:

        down   stem 1   block 1   block 1   halve 1   block 2   block 2
        up     block 2 + 2 -> 2   block 2 + 2 -> 2   block 2 + 1 -> 2   double 2
               block 2 + 1 -> 1   block 1 + 1 -> 1   block 1 + 1 -> 1   out
    """

    def __init__(self, dims, channels, size, width, multipliers, blocks=2, attention=(), heads=8,
                 dropout=0.0, z_dim=0, patch=1):
        super().__init__()
        multiple = patch * 2 ** (len(multipliers) - 1)
        if size % multiple:
            raise InputError(f"size {size} cannot be halved so often: give a multiple of "
                             f"{multiple}, a smaller patch or fewer multipliers")
        if width % heads:
            raise InputError(f"{width} channels for {heads} heads: give a multiple of {heads}")
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
        kept = [c]  # the channels of all that forward keeps for the way up
        self.down = nn.ModuleList()
        for level, w in enumerate(widths):
            attending = heads if level in attention else 0
            for _ in range(blocks):
                self.down.append(block(c, w, attending))
                kept.append(w)
                c = w
            if level < last:
                self.down.append(conv(w, w, 3, stride=2, padding=1))
                kept.append(w)

        self.middle = nn.ModuleList([block(c, c, heads), block(c, c, 0)])

        self.up = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            attending = heads if level in attention else 0
            for _ in range(blocks + 1):
                self.up.append(block(c + kept.pop(), w, attending))
                c = w
            if level > 0:
                double = nn.Upsample(scale_factor=2)
                self.up.append(nn.Sequential(double, conv(w, w, 3, padding=1)))

        output = zeroed(TRANSPOSED[dims](c, channels, patch + 2, stride=patch, padding=1))
        self.out = nn.Sequential(GroupNorm(c), nn.SiLU(), output)

    def forward(self, x, log_snr, z=None):
        if (z is None) != (self.embed_z is None):
            raise InputError("z is given to a UNet of z_dim = 0, or missing for another")
        e = self.embed_time(log_snr)  # (B, embedding)
        if z is not None:
            e = e + self.embed_z(z)
            x = torch.cat([x, self.guess(z).view_as(x)], dim=1)  # (B, 2 channels, ...)
        e = F.silu(e)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), e)
            else:
                h = layer(h)
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


def widen_means(linear, factor=8):
    """The last layer of an encoder with the means' weights so much larger than usual, for z to
    start about as wide as N(0, I): decoders then see sooner what is in it."""
    means, _ = linear.weight.data.chunk(2)
    means.mul_(factor)
    return linear


class Encoder(nn.Sequential):
    """q(z|x) = N(μ, σ²): layers, last a linear one to 2D numbers -> (mu, logvar), each (B, D)."""

    def __init__(self, *layers):
        super().__init__(*layers)
        widen_means([layer for layer in self.modules() if isinstance(layer, nn.Linear)][-1])

    def forward(self, x):
        return super().forward(x).chunk(2, dim=-1)


class ConvEncoder(Encoder):
    """Residual convolutional encoder in the manner of Soft-IntroVAE (Daniel and Tamar 2021).

    x: (B, channels, size, size). Every entry of widths halves the side once. Norm is by groups.
    """

    def __init__(self, channels, size, latent_dim, widths):
        if size % 2 ** len(widths):
            raise InputError(f"size {size} cannot be halved {len(widths)} times: give a multiple "
                             f"of {2 ** len(widths)}")
        layers = [nn.Conv2d(channels, widths[0], 5, padding=2), nn.AvgPool2d(2)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [ResBlock(2, c_in, c_out), nn.AvgPool2d(2)]
        side, c = size // 2 ** len(widths), widths[-1]
        layers += [ResBlock(2, c, c), GroupNorm(c), nn.SiLU(), nn.Flatten()]
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
        layers += [nn.Upsample(scale_factor=2), GroupNorm(widths[0]), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(widths[0], channels, 5, padding=2))


def mlp(*widths):
    """Linear layers of these widths with SiLU between them."""
    layers = []
    for w_in, w_out in itertools.pairwise(widths):
        layers += [nn.Linear(w_in, w_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


# ---- 8  Variants: a baseline, and incomplete examples --------------------------------------------

class MVTCAE(DiffMVAE):
    """The baseline of Hwang et al. 2021 (Tables 1 to 3), from the same parts; no bound on log p(x).

    (M − α)/M E[Σ_i log p(x_i|z)] − (1 − α) KL(q ‖ p(z)) − α/M Σ_i KL(q ‖ q(z|x_i)),  q = q(z|x)

    with the product of all experts alone; α = 0 is Eq. 5 for it. 0.9 is from earlier public code of
    the paper's authors. The first factor is in the terms' weights.
    """

    def __init__(self, encoders, decoders, alpha=0.9, beta=1.0, term_weights=None):
        super().__init__(encoders, decoders, "mvae", beta, term_weights)
        self.alpha = alpha
        share = (len(encoders) - alpha) / len(encoders)
        self.term_weights = {name: share * self.term_weights.get(name, 1) for name in decoders}

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        """(1 − α) KL(q ‖ p(z)) + α/M Σ_i KL(q ‖ q(z|x_i)): (B, 1)."""
        to_prior = kl_divergence(mu, logvar)  # (B, 1)
        to_experts = kl_divergence(mu, logvar, expert_mu, expert_logvar)  # (B, M), q against each
        return (1 - self.alpha) * to_prior + self.alpha * to_experts.mean(1, keepdim=True)

    def elbo(self, x, A=None, every_subset=False):
        """The objective above, in the form of Eq. 5."""
        if A is not None:
            raise InputError("MVTCAE is defined for the product of all alone")
        return super().elbo(x, every_subset=every_subset)


class IncompleteDiffMVAE(DiffMVAE):
    """Eq. 5 for examples that lack modalities: a bound on log p(x_observed).

    observed: {name: (B,) bool} says of each modality in x which examples have it; in the gaps x may
    hold anything, even NaN. Each A becomes A ∩ observed, what is then empty is dropped, the rest
    have the same weight, and only what is observed is reconstructed. Every decoder runs for every
    subset.
    """

    def present(self, x, observed):
        """Which of the encoders' modalities in x an example has: (B, M) bool."""
        check_names(observed, [*self.encoders, *self.decoders], "encoder or decoder")
        present = torch.stack([observed[name] for name in self.encoders if name in x], dim=1)
        if not present.any(1).all():
            raise InputError("an example has nothing observed: leave it out")
        return present

    def posterior(self, x, observed):
        """q(z|x_o), x_o being what is observed of x: mu, logvar, each (B, D)."""
        mu, logvar = self.experts(without_gaps(x, observed))  # (B, M, D)
        return self.fuse(mu, logvar, self.present(x, observed))

    def elbo(self, x, observed):
        """Eq. 5; the terms of what is not observed are 0."""
        x = without_gaps(x, observed)
        observed_ones = self.present(x, observed)[:, None]  # (B, 1, M)
        present = self.subsets & observed_ones  # (B, S, M)  A ∩ observed
        kept = present.any(-1)  # (B, S)
        present = torch.where(kept[..., None], present, observed_ones)  # some product to compute
        mu, logvar = self.experts({name: x[name] for name in self.encoders})
        mu, logvar = self.fuse(mu[:, None], logvar[:, None], present)  # (B, S, D)
        omega = kept.to(mu) / kept.sum(1, keepdim=True)  # (B, S)  ω_A
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            each = torch.stack([decoder.log_prob(x[name], z_A) for z_A in z.unbind(1)], dim=1)
            log_prob[name] = torch.where(observed[name], (omega * each).sum(1), 0)  # (B,)
        kl = (omega * kl_divergence(mu, logvar)).sum(1)  # (B,)
        return ELBO(log_prob, kl, self.beta, self.term_weights)


def without_gaps(x, observed):
    """x with zeros for what is not observed: nothing of what stood there goes on from here."""
    return {name: torch.where(with_dims(observed[name], value.ndim), value, 0)
            for name, value in x.items()}


# ---- 9  Training ---------------------------------------------------------------------------------

STAGES = ("model", "prior")
INTERVAL = 500  # steps between two checkpoints, or a hundredth of a long training
READING = 20  # steps between two rows of the history, or a five-hundredth
WARMUP, COOLDOWN = 100, 500  # first and last steps, in which the learning rate rises and falls
CLIP = 1.0  # largest norm of the gradient


def why(problem):
    """The first 25 words of an exception's message, or its name, on one line."""
    words = str(problem).split()
    return " ".join(words[:25]) if words else type(problem).__name__


def save_checkpoint(path, state):
    """Write beside, then rename: path holds the old state or the new one, never half of it."""
    part = path.with_suffix(f".{os.getpid()}.part")  # another process may be writing its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:  # RuntimeError: how torch says that a disk is full
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written ({why(problem)}), what was there before is "
                         "whole: make room, or take another folder") from problem


def read_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU; code in the file is not run."""
    if not path.exists():
        raise InputError(f"{path} is missing: that run has to be made first")
    try:
        return dict(torch.load(path, "cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception as problem:  # torch has no class for what is not, or not all of, a checkpoint
        raise InputError(f"{path} cannot be read as a checkpoint ({why(problem)}): move it away, "
                         "or take another folder") from problem


def checksum(data):
    """How many examples, and a checksum of all that they hold: what a checkpoint was trained on."""
    crc, n = 0, len(next(iter(data.values())))
    for name in sorted(data):
        crc = zlib.crc32(data[name].cpu().contiguous().numpy(), crc)
    return f"{n}, checksum {crc:08x}"


def seed_at(seed, stage, step):
    """One well-mixed seed for each step of each stage."""
    return int(np.random.SeedSequence((seed, STAGES.index(stage), step)).generate_state(1)[0])


def own_random_numbers():
    """A context that leaves torch's generators as they were."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


@contextmanager
def interruptible():
    """A list in which Ctrl-C and SIGTERM leave their numbers, so that the step under way can be
    finished and saved; a second one acts as usual."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@torch.no_grad()
def update_average(averaged, model, decay):
    """averaged ← decay · averaged + (1 − decay) · model; what is no parameter, such as the
    statistics of batch norm, is copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(averaged.buffers(), model.buffers()):
        average.copy_(buffer)


def finite_means(sums, steps, last):
    """{name: sum / steps} as floats, or a FloatingPointError that names what broke before last."""
    means = (torch.stack(list(sums.values())) / steps).tolist()  # here the device is waited for
    broken = [name for name, mean in zip(sums, means) if not math.isfinite(mean)]
    if broken:
        raise FloatingPointError(f"{', '.join(broken)} not finite before step {last}: lower the "
                                 "learning rate or look at the data; what was saved is kept")
    return dict(zip(sums, means))


def save_history(path, history):
    """The rows of a training so far, [{term: float}], beside its checkpoint path: a CSV file and a
    picture of curves."""
    columns = list(dict.fromkeys(column for row in history for column in row))
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
    save_curves(path.with_suffix(".png"), history)


def look(path, history, averaged, watch):
    """What comes after a checkpoint is only to be looked at, and ends no training."""
    try:
        if watch is not None:
            history[-1].update(watch(averaged))
    except (OSError, torch.OutOfMemoryError) as problem:
        tqdm.write(f"{why(problem)}: training goes on")
    try:
        save_history(path, history)
    except OSError as problem:
        tqdm.write(f"{why(problem)}: training goes on")


def resume(path, settings, parts):
    """Load the checkpoint path into parts, {name: what has a state_dict}: step, seconds, history.

    Where there is none, training starts; one of other settings is refused.
    """
    if not path.exists():
        return 0, 0.0, []
    state = read_checkpoint(path)
    was = state.get("settings", {})
    changes = [f"{name} was {was.get(name)!r} and is {settings.get(name)!r}"
               for name in sorted(was.keys() | settings.keys())
               if was.get(name) != settings.get(name)]
    if changes:
        raise InputError(f"{path} is of another run ({', '.join(changes)}): repeat its flags, with "
                         "its data, or change --out")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["seconds"], state["history"]


def fit(s, stage, model, rates, terms, objective, data, watch=None):
    """Train model with Adam; return its moving average, the model from then on, and the seconds.

    s: settings; stage: "model" or "prior"; rates: [(module, learning rate)]. data: {name: (N,
    ...)}, the examples; terms(indices) -> {name: (B,)} of a batch, of which objective is maximised.
    After each checkpoint, s.out/stage.pt, watch(averaged) -> {name: float} joins the history. A run
    resumed there ends with the same weights, as (seed, stage, step) seeds a step.
    """
    path = Path(s.out) / f"{stage}.pt"
    settings = {**s.training_settings(stage), "examples": checksum(data)}
    n = len(next(iter(data.values())))
    steps, batch_size = s.length(stage)
    averaged = copy.deepcopy(model.train()).eval().requires_grad_(False)
    groups = [{"params": list(part.parameters()), "rate": rate} for part, rate in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    step, seconds, history = resume(path, settings, parts)
    interval, reading = max(INTERVAL, steps // 100), max(READING, steps // 500)
    last_row, sums = step, {}
    started = time.monotonic() - seconds
    bar = tqdm(desc=stage, total=steps, initial=step, unit=" examples", unit_scale=batch_size)
    with own_random_numbers(), interruptible() as signals, bar:
        while step < steps:
            torch.manual_seed(seed_at(s.seed, stage, step))
            indices = torch.randint(n, (batch_size,), device=s.device)
            named = {name: term.mean() for name, term in terms(indices).items()}
            optimizer.zero_grad()
            (-named[objective]).backward()
            named["gradient"] = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            factor = min(1, (step + 1) / WARMUP, (steps - step) / COOLDOWN)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
            optimizer.step()
            decay = min(s.ema, (1 + step) / (10 + step))  # the first weights are soon forgotten
            update_average(averaged, model, decay)
            sums = {name: sums.get(name, 0) + value.detach() for name, value in named.items()}
            step += 1
            bar.update()
            at_checkpoint = step == steps or step % interval == 0 or len(signals) > 0
            if at_checkpoint or step % reading == 0:
                seconds = time.monotonic() - started
                means = finite_means(sums, step - last_row, step)
                bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})
                history.append({"step": step, "seconds": round(seconds, 2), **means})
                sums, last_row = {}, step
            if at_checkpoint:
                state = {name: part.state_dict() for name, part in parts.items()}
                state.update(step=step, seconds=seconds, settings=settings, history=history)
                save_checkpoint(path, state)
                look(path, history, averaged, None if signals else watch)
                if signals:
                    raise KeyboardInterrupt(f"stopped after step {step}, saved in {path}: run it "
                                            "again", signals[0])
                started = time.monotonic() - seconds  # without saving and looking
    return averaged, seconds


# ---- 10  Measures and pictures (§4) --------------------------------------------------------------

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
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):  # eigvals may crash on these
        raise FloatingPointError("features are not finite, or of one picture alone: look at the "
                                 "pictures, or give a larger --measured")
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # eigenvalues are ≥ 0
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()


def batches(x, label, size=250):
    """{name: (N, ...)} in pieces of so many examples, with a progress bar."""
    total = len(next(iter(x.values())))
    for start in tqdm(range(0, total, size), label, leave=False):
        yield {name: value[start : start + size] for name, value in x.items()}


def median3(x):
    """The median of each 3 × 3 pixels: grain goes, edges stay. x: (N, C, H, W)."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), "replicate"), 3)  # (N, 9 C, H W)
    return windows.unflatten(1, (x.shape[1], 9)).median(2).values.view(x.shape)


def contrasts(pictures):
    """The energy of the gradient of pictures without their grain, and the energy of that grain."""
    smooth = torch.cat([median3(piece["x"]) for piece in batches({"x": pictures}, "filtering")])
    edges = sum(smooth.diff(dim=d).square().mean().item() for d in (2, 3))
    return edges, (pictures - smooth).square().mean().item()


@torch.no_grad()
def features(judge, pictures):
    """What a Supervised model makes of pictures, the means of its q(z|image): (n, D)."""
    x = {"image": pictures.clamp(-1, 1)}
    return torch.cat([judge.posterior(piece)[0] for piece in batches(x, "judging")])


def judged(judge, made, real):
    """What Supervised says of generated pictures, {given: {measure: value}}.

    judge: its model; made: {given: (n, 3, H, W)}; real: (N, 3, H, W), none of them among made.
    Fréchet distance: of its features to those of real. They are nearly blind to blur, so
    beside it sharpness, the energy of the gradient of the pictures after a 3 × 3 median, and grain,
    of what the median takes off, both over those of real pictures.
    """
    of_real, (edges, grain) = features(judge, real), contrasts(real)
    if edges == 0 or grain == 0:
        raise InputError("the real pictures are flat, so that no sharpness can be measured: look "
                         "at the data")
    table = {}
    for given, pictures in made.items():
        own_edges, own_grain = contrasts(pictures.clamp(-1, 1))
        table[given] = {
            "Fréchet distance": frechet_distance(features(judge, pictures), of_real),
            "sharpness": own_edges / edges,
            "grain": own_grain / grain,
        }
    return table


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


def save_curves(path, history):
    """A PNG with a panel for each term of history, [{"step": …, term: …}], over the steps.

    Black in training, red held out. A panel's ends are those of the last nine tenths of its term.
    """
    width, height = 600, 120
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


# ---- 11  What both scripts share: settings, networks, both stages of training, tables, files -----

class SteadyStream:
    """A stream for people to read: what cannot be written, because a pipe is closed or the terminal
    lacks a letter, is left out, as no training may end for that."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None)
        if encoding is None:
            encoding = "utf-8"
        with suppress(OSError):
            self.stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):  # all else, such as isatty
        return getattr(self.stream, name)


def option(help, default=None, *, least=None, **flag):
    """A setting that is also a flag: help; default, or None where the table Settings.defaults has
    one for each kind of data; the least it may be, if not 1 for whole numbers and 0 for others;
    flag: what else argparse needs of it, such as choices."""
    meta = {"help": help, "default": default, "least": least, "flag": flag}
    return field(default=None, metadata=meta)


@dataclass
class Settings:
    """What both scripts can be told. Where nothing is given (None), the default for the kind of
    data is chosen here; those of beta, weight, evaluations and compile are properties."""

    data: str = option("folder of the real data; without it data are drawn", "")
    small: bool = option("real data on a CPU: takes the defaults called small below", False,
                         action=BooleanOptionalAction)
    out: str = option("folder for checkpoints, numbers and pictures")
    judge: str = option("folder of a Supervised run, by which generated pictures are measured", "")
    seed: int = option("seed of all randomness", 0, least=0)
    device: str = option("cuda, mps or cpu", "cuda" if torch.cuda.is_available() else "cpu")
    compile: bool = option("compile the networks before training, which takes minutes (default: "
                           "for real data without --small on CUDA)", action=BooleanOptionalAction)
    size: int = option("side of the pictures in pixels")
    steps: int = option("training steps of the model")
    batch_size: int = option("examples in a step")
    weighting: str = option("likelihood: Diff-MVAE, a bound; the others: Diff-MVAE*",
                            choices=tuple(Diffusion.samplers))
    family: str = option("subsets that are trained; mvtcae: that objective", "mopoe",
                         choices=("mopoe", "mvae", "mmvae", "mvtcae"))
    decoder: str = option("of images; feedforward: baseline MoPoE*; none: Supervised", "diffusion",
                          choices=("diffusion", "feedforward", "none"))
    beta: float = option("weight of the KL (default: 1 where the image's term is in nats, 0 for "
                         "Supervised, else 0.01)")
    weight: float = option("weight of log p of the attributes, or of the caption (default: 1 where "
                           "the image's term is in nats, else 10 and 5)")
    latent_dim: int = option("dimensions of z")
    mirror: bool = option("mirror half of the training pictures, masks with them",
                          action=BooleanOptionalAction)
    patch: int = option("side in pixels of what the UNet takes for one pixel")
    channels: int = option("channels of the UNet at its first level, a multiple of 8")
    multipliers: list = option("their multiple at each level", nargs="+", type=int)
    attention: int = option("side at which the UNet attends, besides its middle; 0: none", least=0)
    dropout: float = option("in the UNet")
    encoder_channels: int = option("channels of the encoders at half size")
    rate: float = option("learning rate of a diffusion decoder")
    vae_rate: float = option("learning rate of the encoders and other decoders")
    ema: float = option("decay of the averaged weights")
    prior_net: str = option("network of the latent prior; unet: the paper's", "mlp",
                            choices=("mlp", "unet"))
    prior_steps: int = option("training steps of the latent prior")
    prior_batch: int = option("latents in such a step", 256)
    prior_rate: float = option("its learning rate")
    evaluations: int = option("of the network for a picture (default: 20, of drawn birds 8, for a "
                              "bound 100)")
    measured: int = option("pictures generated of each kind for the tables", least=2)

    kinds = ("drawn", "real", "small")  # drawn data, real data, real data with --small
    defaults = {  # one for each kind; the scripts' tables have the others
        "weighting": ("velocity", "simple", "velocity"),
        "mirror": (False, False, True),
        "patch": (2, 1, 2),
        "attention": (0, 8, 0),
        "dropout": (0.0, 0.1, 0.0),
        "encoder_channels": (16, 64, 8),
        "rate": (1e-3, 1e-4, 1e-3),
        "ema": (0.995, 0.9999, 0.999),
        "prior_steps": (4000, 10_000, 4000),
        "prior_rate": (2e-3, 1e-3, 2e-3),
        "measured": (256, 6000, 256),
    }
    surrogate_weight = 1.0  # default weight where the image's term is a surrogate, not nats
    drawn_evaluations = None  # default for drawn data and a surrogate, if not Diffusion's
    # In a run; small only chooses defaults.
    may_change = ("out", "judge", "device", "compile", "evaluations", "measured", "small")

    def __post_init__(self):
        if self.small and not self.data:
            raise InputError("--small is for real data: give their folder with --data")
        kind = 0
        if self.data:
            kind = 2 if self.small else 1
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is None:
                value = self.defaults_of(setting)[kind]
            if value is not None:
                setattr(self, setting.name, self.converted(setting, value))
        if self.decoder == "none" and (self.judge or self.family != "mopoe"):
            raise InputError("--decoder none has one encoder and draws no pictures: leave out "
                             "--family and --judge")

    @classmethod
    def defaults_of(cls, setting):
        """Its defaults for drawn, real and small."""
        return cls.defaults.get(setting.name, 3 * [setting.metadata["default"]])

    @staticmethod
    def converted(setting, value):
        """value in the setting's type (a Path becomes a str, numpy's numbers Python's); refused
        where it is no choice or too small."""
        flag, least = setting.metadata["flag"], setting.metadata["least"]
        kind = flag.get("type", setting.type)  # of one, where there is a list
        if least is None:
            least = 1 if kind is int else 0
        items = [kind(item) for item in (value if setting.type is list else [value])]
        for item in items:
            if item not in flag.get("choices", [item]):
                raise InputError(f"{setting.name} {value}: choose from {flag['choices']}")
            if kind in (int, float) and not least <= item < math.inf:  # or NaN
                raise InputError(f"{setting.name} {value}: give at least {least}")
        return items if setting.type is list else items[0]

    @classmethod
    def parse(cls, description):
        """Read the command line."""
        parser = ArgumentParser(description=description,
                                formatter_class=RawDescriptionHelpFormatter)
        for setting in fields(cls):
            flag = dict(setting.metadata["flag"])
            if "action" not in flag and "type" not in flag:
                flag["type"] = setting.type
            help, defaults = setting.metadata["help"], cls.defaults_of(setting)
            if setting.name in cls.defaults:
                each = [f"{value} {kind}" for kind, value in zip(cls.kinds, defaults)]
                help = f"{help} (default: {', '.join(each)})"
            elif defaults[0] not in (None, ""):
                help = f"{help} (default: {defaults[0]})"
            name = "--" + setting.name.replace("_", "-")
            parser.add_argument(name, default=None, help=help, **flag)
        return cls(**vars(parser.parse_args()))

    @property
    def in_nats(self):
        """Whether the image's term is a log-likelihood, or a bound on one; all others are."""
        if self.decoder == "diffusion":
            return self.weighting == "likelihood"
        return self.decoder == "feedforward"

    @property
    def kl_weight(self):
        """β, the given one or its default."""
        if self.beta is not None:
            return self.beta
        if self.decoder == "none":
            return 0.0
        return 1.0 if self.in_nats else 0.01

    @property
    def label_weight(self):
        """Of log p of what is not the image, the given one or its default."""
        if self.weight is not None:
            return self.weight
        return 1.0 if self.in_nats else self.surrogate_weight

    @property
    def picture_evaluations(self):
        """The given ones or their default, None for what Diffusion has."""
        if self.evaluations is None and not self.data and not self.in_nats:
            return self.drawn_evaluations
        return self.evaluations

    @property
    def is_bound(self):
        """Whether the objective would be a bound on log p(x) with β = 1 and no weights."""
        return self.in_nats and self.family != "mvtcae"

    @property
    def objective(self):
        """What is trained: "ELBO" where it is the bound itself."""
        if self.is_bound and self.kl_weight == 1 and self.label_weight == 1:
            return "ELBO"
        return "surrogate"

    @property
    def compiles(self):
        """Whether the networks are compiled, as told or by default."""
        if self.compile is not None:
            return self.compile
        return self.device.startswith("cuda") and self.data != "" and not self.small

    def length(self, stage):
        """Steps of a stage, and the size of its batches."""
        if stage == "model":
            return self.steps, self.batch_size
        return self.prior_steps, self.prior_batch

    def training_settings(self, stage):
        """What a checkpoint and a run that goes on from it must have in common."""
        settings = {}
        for name, value in asdict(self).items():
            of_prior = name.startswith("prior_")
            if name not in self.may_change and (stage == "prior" or not of_prior):
                settings[name] = value
        settings["data"] = Path(self.data).resolve().name if self.data else ""
        settings["beta"], settings["weight"] = self.kl_weight, self.label_weight
        return settings


def main(run, settings, description):
    """A script's entry: run on the command line's settings; what can be mended is one line."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    sys.stdout, sys.stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    try:
        s = settings.parse(description)
        check_device(s)
        Path(s.out).mkdir(parents=True, exist_ok=True)
        if s.data and not s.small and not s.device.startswith("cuda"):
            print("Without --small the defaults for real data are for a GPU with CUDA.")
        run(s)
        return
    except (InputError, FloatingPointError, OSError) as problem:  # OSError: names its file itself
        message, status = str(problem), 2
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: to train give a smaller --batch-size, else a smaller --measured"
        status = 2
    except KeyboardInterrupt as problem:
        message, number = "stopped: run it again", signal.SIGINT
        if problem.args:  # from fit
            message, number = problem.args
        status = 128 + number
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def check_device(s):
    """Refuse a device that cannot be computed on."""
    try:
        torch.ones(1, device=s.device).item()
    except (RuntimeError, AssertionError, ImportError) as problem:
        raise InputError(f"--device {s.device} cannot be used ({why(problem)}): give "
                         "another") from problem


# Networks for the settings

def image_networks(s):
    """The image's encoder and its decoder, of the kind s.decoder."""
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
    return Diffusion(unet, shape, weighting=s.weighting, evaluations=s.picture_evaluations)


def conv_widths(s):
    """Of ConvEncoder and ConvDecoder: doubled up to eightfold at each halving, down to 4 pixels."""
    halvings = max(1, int(math.log2(s.size)) - 2)
    return [s.encoder_channels * min(2**level, 8) for level in range(halvings)]


def build_model(s, encoders, decoders, term_weights):
    """The untrained model of the family s.family; Supervised has the image's encoder and the
    others' decoders."""
    if s.decoder == "none":
        encoders = {"image": encoders["image"]}
        decoders = {name: decoder for name, decoder in decoders.items() if name != "image"}
    if s.family == "mvtcae":
        return MVTCAE(encoders, decoders, beta=s.kl_weight, term_weights=term_weights)
    return DiffMVAE(encoders, decoders, s.family, s.kl_weight, term_weights)


def build_prior(s, sides):
    """The untrained latent prior (§3.4), None for Supervised; the paper's UNet has the latents laid
    out on sides."""
    if s.decoder == "none":
        return None
    if s.prior_net == "mlp":
        return LatentPrior(ResidualMLP(s.latent_dim, 256, 4), (s.latent_dim,))
    if math.prod(sides) != s.latent_dim:
        raise InputError(f"--latent-dim {s.latent_dim}: for --prior-net unet give a square number")
    unet = UNet(len(sides), 1, sides[0], s.channels, (1, 2))
    return LatentPrior(unet, (1, *sides))


def compile_networks(model):
    """In place, so that weights keep their names; text models are left as they are."""
    print("The networks are compiled in the first steps: that takes minutes.")
    for part in (*model.encoders.values(), *model.decoders.values()):
        network = getattr(part, "net", part)
        if isinstance(network, (UNet, ConvEncoder, ConvDecoder)):
            network.compile(dynamic=False)


# Training

def on_device(data, s):
    """{split: {name: tensor}} on s.device."""
    return {split: {name: x.to(s.device) for name, x in part.items()}
            for split, part in data.items()}


def mirrored(x):
    """x with the pictures of a random half of the examples mirrored, an example's all alike."""
    flips = torch.rand(len(next(iter(x.values()))), 1, 1, 1) < 0.5
    out = {}
    for name, value in x.items():
        if value.ndim == 4:  # (B, channels, H, W)
            value = torch.where(flips.to(value.device), value.flip(-1), value)
        out[name] = value
    return out


def train(s, data, model, prior, get_batch, preview):
    """Diff-MVAE (§3.2), then its latent prior (§3.4), if there is one: both, averaged, and their
    seconds.

    data: {"train" | "test": {name: (N, ...)}} on s.device; get_batch(part, i) gives the networks
    its examples i. preview(averaged) draws.
    """
    model, seconds = train_model(s, data, model, get_batch, preview)
    if prior is None:
        return model, None, {"model": seconds}
    prior, prior_seconds = train_prior(s, data["train"], model, prior, get_batch)
    return model, prior, {"model": seconds, "prior": prior_seconds}


def train_model(s, data, model, get_batch, preview):
    """Eq. 5 maximised: the averaged model, and the seconds."""
    model = model.to(s.device)

    def terms(i):
        x = get_batch(data["train"], i)
        return model.elbo(mirrored(x) if s.mirror else x).terms(s.objective)

    def watch(averaged):
        preview(averaged)
        return {f"held-out {s.objective}": held_out(s, averaged, data["test"], get_batch)}

    rates = [(model.encoders, s.vae_rate)]
    for decoder in model.decoders.values():
        rates.append((decoder, s.rate if isinstance(decoder, Diffusion) else s.vae_rate))
    if s.compiles:
        compile_networks(model)
    return fit(s, "model", model, rates, terms, s.objective, data["train"], watch)


def train_prior(s, examples, model, prior, get_batch):
    """The latent prior on z of examples, as they are, not mirrored: averaged, and the seconds."""
    prior = prior.to(s.device)
    with own_random_numbers(), torch.no_grad():
        torch.manual_seed(s.seed)
        each = [model.posterior(get_batch(piece)) for piece in batches(examples, "encoding")]
    mu, logvar = (torch.cat(parts) for parts in zip(*each))  # (N, D) each
    prior.standardise(mu, logvar)

    def terms(i):
        return {"surrogate": prior.log_prob(sample_gaussian(mu[i], logvar[i]))}

    return fit(s, "prior", prior, [(prior, s.prior_rate)], terms, "surrogate", examples)


@torch.no_grad()
def held_out(s, model, test, get_batch):
    """The objective on the first 256 test examples, with the same random numbers at each call."""
    torch.manual_seed(s.seed)
    some = {name: x[:256] for name, x in test.items()}
    pieces = batches(some, "held out", s.batch_size)
    return torch.cat([model.elbo(get_batch(piece)).total for piece in pieces]).mean().item()


def load_run(out, settings, build, device="cpu"):
    """(model, prior) that a finished run left in the folder out, ready to use.

    settings: the script's class; build(settings) makes the pair untrained; Supervised has no prior.
    """
    states = {"model": read_checkpoint(Path(out) / "model.pt")}
    saved = states["model"].get("settings", {})
    if saved.get("decoder") != "none":
        states["prior"] = read_checkpoint(Path(out) / "prior.pt")
        saved = states["prior"].get("settings", {})  # has the model's and its own
    saved = {name: value for name, value in saved.items() if name != "examples"}
    try:
        s = settings(**saved, device=device)
    except TypeError as problem:  # other names
        raise InputError(f"{out} is a run of another script, or of other code") from problem
    with own_random_numbers():
        parts = dict(zip(STAGES, build(s)))
    for stage, state in states.items():
        if state["step"] < s.length(stage)[0]:
            raise InputError(f"{out} is not finished: run it again")
        parts[stage].load_state_dict(state["averaged"])
        parts[stage].to(device).eval().requires_grad_(False)
    return parts["model"], parts["prior"]


def check_judge(s):
    """The judge of s must be Supervised and know pictures such as those of s."""
    was = read_checkpoint(Path(s.judge) / "model.pt").get("settings", {})
    data = s.training_settings("model")["data"]
    if (was.get("decoder"), was.get("data"), was.get("size")) != ("none", data, s.size):
        raise InputError(f"--judge {s.judge} is no run of --decoder none on this --data and --size")


# Using a trained model

@torch.no_grad()
def infer(model, x, given):
    """z ~ q(z|x_o), x_o the given modalities of x (§3.3): (N, D)."""
    x = {name: x[name] for name in given}
    each = [sample_gaussian(*model.posterior(piece)) for piece in batches(x, "encoding")]
    return torch.cat(each)


def sample(decoder, z):
    """One x ~ p(x|z) for each row of z, in batches."""
    return torch.cat([decoder.sample(piece["z"]) for piece in batches({"z": z}, "sampling")])


def unconditional(model, prior, training):
    """As many rows of z as training has examples, without looking at any x: {label: (n, D)}.

    From the latent prior (§3.4), from N(0, I) without it and, as the ceiling of both, from what the
    prior imitates, the aggregate posterior: z ~ q(z|x) given all of real training examples.
    """
    ceiling = infer(model, training, list(model.encoders))
    pieces = batches({"z": ceiling}, "sampling z")
    z = torch.cat([prior.sample(len(piece["z"])) for piece in pieces])
    return {"aggregate posterior": ceiling, "latent prior": z, "N(0, I)": torch.randn_like(z)}


@torch.no_grad()
def nats(model, test, get_batch):
    """Eq. 5's terms averaged over test, every decoder run for every subset; and the image's alone,
    without the KL, in bits per dimension."""
    each = []
    for piece in batches(test, "ELBO", 32):
        elbo = model.elbo(get_batch(piece), every_subset=True)
        each.append({"ELBO": elbo.bound, **elbo.log_prob, "KL": elbo.kl})
    means = {name: torch.cat([terms[name] for terms in each]).mean().item() for name in each[0]}
    log2_density = means["image"] / test["image"][0].numel() / math.log(2)  # of a dimension
    # A grey level is 1/127.5 wide on [−1, 1], so −log2 p(level) = log2 127.5 − log2 density.
    means["image given z, bits per dimension"] = math.log2(127.5) - log2_density
    return {term: {"nats": value} for term, value in means.items()}


# Tables, and the files of a run

def show(tables):
    """Print {title: {row: {column: number}}} in Markdown."""
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in table.items():
            cells = [f"{row[column]:.3f}" if column in row else "" for column in columns]
            print(f"| {name} | {' | '.join(cells)} |")


def save_results(s, results):
    """Show the tables of results, and write all of it, the settings and the machine to results.json
    in the folder s.out."""
    show(results["tables"])
    path = Path(s.out) / "results.json"
    record = {
        "settings": asdict(s),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **results,
    }
    if s.device.startswith("cuda"):
        record["device"] = torch.cuda.get_device_name(s.device)
        record["peak memory, GiB"] = torch.cuda.max_memory_allocated(s.device) / 2**30
    try:
        path.write_text(json.dumps(record, indent=1, allow_nan=False), "utf-8")
    except ValueError as problem:
        raise FloatingPointError("a table holds a number that is not finite: look at the curves in "
                                 "model.png and at the data") from problem
    print(f"\nNumbers are in {path}.")


# Reading data

def read_lines(path):
    """The lines of a text file, whatever its line ends, with or without a byte-order mark; what is
    not UTF-8 in it is replaced."""
    return path.read_text("utf-8-sig", "replace").splitlines()


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


def check_splits(rows, path):
    """Of {split: its pictures' rows}, as path has it, each split needs two: the tables have
    covariances."""
    for split, some in rows.items():
        if len(some) < 2:
            raise InputError(f"{path} has {len(some)} pictures of the {split} split: at least 2 "
                             "are needed")


def open_picture(path, mode):
    """The PIL image in a file, decoded."""
    try:
        return Image.open(path).convert(mode)
    except Exception as problem:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise InputError(f"{path} cannot be read ({why(problem)}): unpack it again") from problem


def decode_cached(cache, read, names):
    """[read(name) for each name], in threads; kept in the file cache and taken from there."""
    if cache.exists():
        kept = read_checkpoint(cache)
        if kept.get("names") == names:
            return kept["arrays"]
    with ThreadPoolExecutor() as pool:
        arrays = list(tqdm(pool.map(read, names), "decoding pictures", len(names)))
    arrays = torch.from_numpy(np.stack(arrays))
    try:
        save_checkpoint(cache, {"names": names, "arrays": arrays})
    except InputError as problem:
        print(f"The pictures will be decoded again at each run: {problem}.")
    return arrays
