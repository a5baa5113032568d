"""Multimodal ELBO with Diffusion Decoders (Diff-MVAE; Wesego and Rooshenas) in one file.

Each modality x_i has an encoder q(z|x_i). Any subset A of the modalities is fused into q(z|x_A), a
product of Gaussians, and the ELBO is averaged over the subsets (MoPoE). Simple modalities have
feed-forward decoders. Images have a diffusion decoder conditioned on z, whose denoising
score-matching loss is a term of the ELBO. A second, small diffusion model learns the distribution
of z, for unconditional samples.

Sections 1 to 6 are the method in the paper's order, but with the Gaussian algebra first and the
samplers (§4) after the SDE. Section 7 has its networks and section 8 two variants; sections 9 to 11
train, evaluate and run it. README.md maps the paper to the code and lists every departure from the
paper. Departures from its equations are marked "Deviation" here. Notation:

    x_1 .. x_M    modalities                          z           latent, (B, D), p(z) = N(0, I)
    A, ω_A        a subset, its weight                μ, log σ²   mu, logvar of an expert or product
    t ∈ [t_0, 1]  time, t_0 = t_min                   x_t         α(t) x + σ(t) ε, with ε ~ N(0, I)
    ℓ(t)          log-SNR, log α²/σ²                  β(t), β     g(t)², the noise rate; KL's weight
    ε̂_θ(x_t,z,t)  the predicted noise                 s_θ         the score, −ε̂/σ

In shapes, B is the batch size, M the number of modalities, S the number of subsets and D the number
of dimensions of z.
"""

import copy
import csv
import itertools
import json
import math
import os
import sys
import textwrap
import zlib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from tqdm import tqdm


class InputError(ValueError):
    """An error that the user can fix; the message says what is wrong and how to fix it."""


# ---- 1  Gaussian algebra (§2, §3.2, §3.3) --------------------------------------------------------

def product_of_experts(mu, logvar, present=None):
    """∏_i N(z; μ_i, σ_i²) up to a constant (§3.3): precisions add, and they weight the means.

    mu, logvar: (..., M, D), with the experts on dim −2. present: (..., M) bool, all experts if
    None; it broadcasts, so that one call can fuse a different subset for each example. Returns mu,
    logvar: (..., D), stable at any log-variance; where no expert is present, mu is NaN and logvar
    is inf.
    """
    log_precision = -logvar  # (..., M, D)
    if present is not None:
        present = present.unsqueeze(-1)  # (..., M, 1)
        log_precision = torch.where(present, log_precision, -torch.inf)
        mu = torch.where(present, mu, 0.0)
    share = log_precision.softmax(dim=-2)  # (..., M, D)  σ_i⁻² / Σ_j σ_j⁻²
    return (share * mu).sum(-2), -log_precision.logsumexp(-2)


def kl_divergence(mu, logvar, mu_p=None, logvar_p=None):
    """KL(N(μ, σ²) ‖ N(μ_p, σ_p²)) in nats: (..., D) -> (...); p defaults to N(0, I).

    ½ Σ [ (μ − μ_p)²/σ_p² + σ²/σ_p² − 1 − log σ²/σ_p² ]
    """
    mu_p = torch.zeros_like(mu) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar) if logvar_p is None else logvar_p
    log_ratio = logvar - logvar_p
    return 0.5 * ((mu - mu_p).square() * (-logvar_p).exp() + log_ratio.expm1() - log_ratio).sum(-1)


def subsets(num_modalities, family="mopoe"):
    """The family of subsets (§3.2), (S, M) bool: "mopoe" has every non-empty subset, "mvae" only
    the full one, "mmvae" the single modalities. All have the same weight, ω_A = 1/S."""
    every = torch.tensor(list(itertools.product([False, True], repeat=num_modalities)))[1:]
    size = every.sum(1)  # (2^M − 1,)
    full, single = size.eq(num_modalities), size.eq(1)
    return {"mopoe": every, "mvae": every[full], "mmvae": every[single]}[family]


def sample_gaussian(mu, logvar):
    """z ~ N(μ, σ²), reparameterized: μ + σ ε."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


# ---- 2  Forward SDE (§3.1) -----------------------------------------------------------------------

@dataclass(frozen=True)
class VPSDE:
    """dx = −½ β(t) x dt + √β(t) dw on t ∈ [0, 1], with β(t) linear (Song et al. 2021, SDE).

    q(x_t|x) = N(α(t) x, σ(t)² I) is the paper's q(x_t|x_0), with ᾱ_t = α(t)². The bound and the
    samplers stop at t_min > 0, which is our choice. There σ = 0.0032, which is 0.4 of the step
    between two 8-bit gray levels (2/255 on [−1, 1]). Rounding to these levels causes an RMS error
    of 1/√12 = 0.29 of that step. Because σ is a little larger, it hides the levels, and a density
    gains nothing from peaks at them.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-4

    def beta_integral(self, t):
        """B(t) = ∫_0^t β(s) ds."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t):
        """α = e^(−B/2)."""
        return (-0.5 * self.beta_integral(t)).exp()

    def sigma(self, t):
        """σ = √(1 − e^−B)."""
        return (-(-self.beta_integral(t)).expm1()).sqrt()

    def log_snr(self, t):
        """ℓ = log α²/σ² = −B − log(1 − e^−B)."""
        b = self.beta_integral(t)
        return -b - (-(-b).expm1()).log()

    def g2(self, t):
        """g² = β, the squared diffusion coefficient; g²/σ² = −dℓ/dt."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def log_snr_to_t(self, log_snr):
        """t = ℓ⁻¹(log_snr): b = log(1 + e^−ℓ), then the numerically stable root of B(t) = b."""
        b = F.softplus(-log_snr)
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())

    def log_snr_range(self):
        """(ℓ(1), ℓ(t_min)), the lowest and the highest log-SNR, as floats."""
        return self.log_snr(torch.tensor([1.0, self.t_min], dtype=torch.float64)).tolist()


# ---- 3  Samplers (§4) ----------------------------------------------------------------------------

# Both samplers start from x ~ N(0, I) at t = 1 and take num_steps steps. Each step evaluates
# eps_model(x_t, t) -> ε̂ once, at a scalar time t. The last step is at t_min (if num_steps > 1)
# and returns the denoised x̂0 = (x − σ ε̂)/α.

def ddim(eps_model, x, sde, num_steps, eta=0.0):
    """DDIM (Song, Meng and Ermon 2021, Eqs. 12 and 16). x: (B, ...) -> (B, ...).

    A step t → u adds the noise σ_u (√(1 − r²) ε̂ + r n) to α_u x̂0, with fresh n ~ N(0, I) and
    r = η √(1 − α_t²/α_u²)/σ_t. The sampler is deterministic for η = 0 and ancestral for η = 1.
    Fresh noise lets the network correct its earlier errors. The times are quadratic, as in that
    paper for CIFAR-10, so that steps are short where the noise is low.
    """
    root = torch.linspace(1, math.sqrt(sde.t_min), num_steps, device=x.device, dtype=x.dtype)
    t = root.square()  # (N,)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    for i in range(num_steps):
        eps = eps_model(x, t[i])
        x0 = (x - sigma[i] * eps) / alpha[i]
        if i + 1 < num_steps:
            if eta > 0:
                ratio = alpha[i] / alpha[i + 1]
                r = eta * (1 - ratio.square()).sqrt() / sigma[i]
                kept = (1 - r.square()).clamp(min=0).sqrt()  # rounding may leave r just above 1
                eps = kept * eps + r * torch.randn_like(x)
            x = alpha[i + 1] * x0 + sigma[i + 1] * eps
    return x0


def euler_maruyama(eps_model, x, sde, num_steps):
    """Euler–Maruyama on the reverse SDE, at times uniform in log-SNR. x: (B, ...) -> (B, ...).

    dx = [−½ β x − β s_θ] dt + √β dw̄ with s_θ = −ε̂/σ (Song et al. 2021, SDE). A step lowers t by
    h, so dt = −h flips the sign of the drift. On a grid uniform in t, the step to t_min would leave
    noise of √(βh), a dozen gray levels with 50 steps.
    """
    ell_1, ell_0 = sde.log_snr_range()
    ell = torch.linspace(ell_1, ell_0, num_steps, device=x.device, dtype=x.dtype)
    t = sde.log_snr_to_t(ell)  # (N,)
    for i in range(num_steps - 1):
        h, g2 = t[i] - t[i + 1], sde.g2(t[i])
        score = -eps_model(x, t[i]) / sde.sigma(t[i])
        x = x + h * g2 * (0.5 * x + score) + (h * g2).sqrt() * torch.randn_like(x)
    return (x - sde.sigma(t[-1]) * eps_model(x, t[-1])) / sde.alpha(t[-1])


# ---- 4  Score matching as a log-likelihood bound (Eqs. 1 and 2) ----------------------------------

def stratified(n, device=None):
    """Return (n,) numbers, each uniform on [0, 1) and jointly evenly spread, which leaves
    expectations unchanged and lowers variances."""
    return (torch.rand((), device=device) + torch.randperm(n, device=device) / n) % 1


def in_bf16(network, *inputs):
    """Return network(*inputs). On CUDA, unless the inputs are float64, the network runs in bfloat16
    and the result is float32."""
    if inputs[0].device.type != "cuda" or inputs[0].dtype == torch.float64:
        return network(*inputs)
    with torch.autocast("cuda", torch.bfloat16):
        out = network(*inputs)
    if torch.is_tensor(out):
        return out.float()
    return tuple(part.float() for part in out)


def append_dims(x, ndim):
    """Append dimensions of size 1 until x has ndim, to broadcast it: (B, ...) -> (B, ..., 1, 1)."""
    return x.view(*x.shape, *[1] * (ndim - x.ndim))


class Diffusion(nn.Module):
    """p(x|z) by denoising diffusion: the image decoder and, without z, the latent prior.

    net(x_t, ℓ, z) -> v, shaped like x_t, with ℓ: (B,) and z: (B, D) or None. Under every weighting
    the network predicts the velocity v. shape: the shape of one x. num_steps: sampling steps, by
    default those in the table. eta: η of DDIM.

                 weighting    λ(t) in Eq. 2   t uniform in   a bound, in nats   sampler, steps
    Diff-MVAE    likelihood   g(t)²           log-SNR ℓ      yes                Euler–Maruyama, 100
    Diff-MVAE*   simple       σ(t)², Eq. 1    t              no, a surrogate    DDIM, 50
    Diff-MVAE*   v_mse        ∝ g² σ/α        angle φ        no, a surrogate    DDIM, 50

    where α = cos φ and σ = sin φ. Deviation: the paper gives Diff-MVAE* λ = 1. In Eq. 2 that would
    weight small t even more than g² does. The works that the paper cites for λ = 1 put it on the
    ε-loss of Eq. 1, which is "simple". "v_mse" has λ = 1 on the loss of the network's own output,
    ‖v − v̂‖² = ‖ε − ε̂‖²/α² (Salimans and Ho 2022). With uniform t, half of all t would have
    α² < 0.08, almost pure noise, so φ is uniform instead. Since dφ = g² α/(2σ) dt, "v_mse"
    minimizes ∫ g²/(2ασ) ‖ε − ε̂‖² dt. Eq. 2 has λ/σ² in that place, hence the table's λ.
    """

    default_steps = {"likelihood": 100, "simple": 50, "v_mse": 50}

    def __init__(self, net, shape, sde=VPSDE(), weighting="likelihood", num_steps=None, eta=None):
        super().__init__()
        if weighting not in self.default_steps:
            raise InputError(f"unknown weighting {weighting!r}: use one of {[*self.default_steps]}")
        self.net = net
        self.shape = tuple(shape)
        self.sde = sde
        self.weighting = weighting
        self.num_steps = self.default_steps[weighting] if num_steps is None else num_steps
        self.sampler = partial(ddim, eta=1.0 if eta is None else eta)
        if weighting == "likelihood":
            self.sampler = euler_maruyama

    def predict_eps(self, x_t, z, t):
        """ε̂ = σ x_t + α v, where v predicts the velocity α ε − σ x. t: (B,) -> shaped like x_t.

        Deviation: the paper does not say what its network outputs. Predicting v leaves Eqs. 1 and 2
        unchanged, starts (v = 0) as the exact denoiser of N(0, I), and keeps x̂0 finite at high
        noise.
        """
        v = in_bf16(self.net, x_t, self.sde.log_snr(t), z)
        t = append_dims(t, x_t.ndim)  # (B, 1, ...)
        return self.sde.sigma(t) * x_t + self.sde.alpha(t) * v

    def squared_error(self, x, z, t, eps):
        """‖ε − ε̂_θ(α x + σ ε, z, t)‖² of Eqs. 1, 2 and 5. x, eps: (B, *shape), t: (B,) -> (B,).

        Eq. 2 is written with scores. Since ∇ log q(x_t|x) = −ε/σ and s_θ = −ε̂/σ,
        ‖∇ log q − s_θ‖² = ‖ε − ε̂‖²/σ².
        """
        alpha = append_dims(self.sde.alpha(t), x.ndim)  # (B, 1, ...)
        sigma = append_dims(self.sde.sigma(t), x.ndim)
        x_t = alpha * x + sigma * eps
        return (eps - self.predict_eps(x_t, z, t)).square().flatten(1).sum(1)

    def sample_times(self, n, device):
        """Return (n,) times on [t_min, 1], uniform in ℓ, t or φ: see the table of Diffusion."""
        ell_1, ell_0 = self.sde.log_snr_range()
        u = stratified(n, device)
        if self.weighting == "likelihood":
            return self.sde.log_snr_to_t(ell_1 + (ell_0 - ell_1) * u)
        if self.weighting == "simple":
            return self.sde.t_min + (1 - self.sde.t_min) * u
        phi_0 = math.atan(math.exp(-ell_0 / 2))  # tan φ = σ/α = e^(−ℓ/2)
        phi_1 = math.atan(math.exp(-ell_1 / 2))
        phi = phi_0 + (phi_1 - phi_0) * u
        return self.sde.log_snr_to_t(-2 * phi.tan().log())  # ℓ = log α²/σ² = −2 log tan φ

    def log_prob(self, x, z=None, t=None, eps=None):
        """Estimate a lower bound b(x, z) ≤ log p(x|z) in nats, or the surrogate that replaces it.

        x: (B, *shape), z: (B, D) -> (B,). With "likelihood" the bound is (Song et al. 2021, MLE;
        Kingma et al. 2021)

            b = −KL(q(x_t|x) ‖ N(0, I)) at t = 1
                + E log N(x; x_t/α, σ²/α² I) at t = t_0
                − ½ ∫ g²/σ² E‖ε − ε̂‖² dt from t_0 to 1

        The last term is Eq. 2 with λ = g². Since g²/σ² = −dℓ/dt, the integral is ℓ(t_0) − ℓ(1)
        times E‖ε − ε̂‖² at times uniform in ℓ. The surrogates are −½ E‖ε − ε̂‖² ("simple") and
        −½ E‖v − v̂‖² = −½ E‖ε − ε̂‖²/α² ("v_mse"). t, (B,), and eps are passed only by tests.
        Deviation: of b, Eq. 5 contains only the integral, with a plus sign. The integral is at
        least 0 and unbounded above, so a lower bound on log p(x) must subtract it.
        """
        eps = torch.randn_like(x) if eps is None else eps
        t = self.sample_times(len(x), x.device).to(x.dtype) if t is None else t
        error = self.squared_error(x, z, t, eps)  # (B,)
        if self.weighting == "simple":
            return -0.5 * error
        if self.weighting == "v_mse":
            return -0.5 * error / self.sde.alpha(t).square()
        ell_1, ell_0 = self.sde.log_snr_range()
        return self.prior_and_reconstruction(x) - 0.5 * (ell_0 - ell_1) * error

    def prior_and_reconstruction(self, x):
        """The first two terms of b(x, z), which have no parameters: (B, *shape) -> (B,), in nats.

        At t_0 the noise in x_t/α is known to have variance σ²/α², so the expected log-density is
        −½ (1 + log 2π σ²/α²) per dimension, a constant.
        """
        _, ell_0 = self.sde.log_snr_range()
        end = x.new_ones(())  # t = 1
        mean = self.sde.alpha(end) * x.flatten(1)  # (B, d)
        kl_at_end = kl_divergence(mean, 2 * self.sde.sigma(end).log())  # (B,)
        logvar_at_t0 = -ell_0  # log σ²/α²
        reconstruction = -0.5 * mean.shape[1] * (1 + math.log(2 * math.pi) + logvar_at_t0)
        return reconstruction - kl_at_end

    @torch.no_grad()
    def sample(self, z=None, n=None, noise=None, sampler=None, num_steps=None):
        """Sample x ~ p(x|z): z, (B, D) -> (B, *shape), or n samples without z -> (n, *shape).

        noise: x_t at t = 1, (B, *shape). sampler, num_steps: used instead of this model's own.
        """
        sampler = self.sampler if sampler is None else sampler
        num_steps = self.num_steps if num_steps is None else num_steps
        if noise is None:
            like = next(self.parameters()) if z is None else z  # for device and dtype
            noise = like.new_empty(n if z is None else len(z), *self.shape).normal_()

        def eps_model(x_t, t):
            return self.predict_eps(x_t, z, t.expand(len(x_t)))

        return sampler(eps_model, noise, self.sde, num_steps)


# ---- 5  The multimodal ELBO (Eqs. 3 to 5) --------------------------------------------------------

def bernoulli(logits):
    """Bernoulli(logits), the likelihood of masks and attributes."""
    return Bernoulli(logits=logits, validate_args=False)  # validation would wait for the GPU


class CalibratedGaussian(nn.Module):
    """mean -> N(mean, σ²) with one learned σ: a fair feed-forward baseline (Rybkin et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, mean):
        return Normal(mean, (0.5 * self.logvar).exp(), validate_args=False)


class FeedForwardDecoder(nn.Module):
    """p(x|z) in one pass. net: z -> parameters; likelihood: parameters -> a torch distribution."""

    every_subset = True

    def __init__(self, net, likelihood):
        super().__init__()
        self.net = net
        self.likelihood = likelihood

    def distribution(self, z):
        """Return p(x|z) as a torch distribution."""
        p = self.likelihood(in_bf16(self.net, z))
        inner = p
        while isinstance(inner, Independent):
            inner = inner.base_dist
        if isinstance(inner, Categorical):
            raise InputError("a Categorical has no mean: use one-hot x and a OneHotCategorical")
        return p

    def log_prob(self, x, z):
        """log p(x|z) in nats, summed over dimensions: (B, ...), (B, D) -> (B,)."""
        p = self.distribution(z)
        expected = p.batch_shape + p.event_shape
        if x.shape != expected:  # torch would broadcast x
            raise InputError(f"x has shape {tuple(x.shape)}, but p(x|z) has {tuple(expected)}")
        return p.log_prob(x).reshape(len(z), -1).sum(1)

    def check_support(self, x, z):
        """Refuse x outside the likelihood's support, such as attributes of ±1 for a Bernoulli.

        log_prob does not check this, because the check would wait for the GPU in every step. Call
        check_support once, before training, with the data and any z: (1, D).
        """
        support = self.distribution(z).support
        if not support.check(x).all():
            raise InputError(f"targets are outside {support}, the support of their likelihood: "
                             "recode them (for example, attributes as 0 and 1)")

    @torch.no_grad()
    def sample(self, z):
        """Return the mean of p(x|z), (B, ...); for binary x it is a probability, which F1 (§4.2)
        thresholds.

        The variation is in z; sampling p(x|z) would only add independent noise to every pixel.
        """
        return self.distribution(z).mean


@dataclass
class ELBO:
    """The terms of Eq. 5 for each example, averaged over the subsets. They are in nats, except for
    the term of a Diffusion decoder whose weighting makes it a surrogate."""

    log_prob: dict  # {modality: (B,)}, log p(x_i|z), or the bound or surrogate of a Diffusion
    kl: torch.Tensor  # (B,), KL(q(z|x_A) ‖ p(z))
    beta: float  # weight of the KL
    log_prob_weights: dict  # {modality: w_i}, 1 where missing

    @property
    def bound(self):
        """Σ_i log p(x_i|z) − KL, (B,): Eq. 5, if log_prob of every decoder is a bound."""
        return sum(self.log_prob.values()) - self.kl

    @property
    def total(self):
        """Σ_i w_i log p(x_i|z) − β KL, (B,): the objective that is maximized in training."""
        terms = [self.log_prob_weights.get(name, 1) * term for name, term in self.log_prob.items()]
        return sum(terms) - self.beta * self.kl

    def terms(self, objective="ELBO"):
        """Return {objective: total, "log p(x_i|z)": its term, "KL": KL}, each (B,). objective: the
        name of the total, which should not be "ELBO" for a surrogate."""
        log_prob = {f"log p({name}|z)": term for name, term in self.log_prob.items()}
        return {objective: self.total, **log_prob, "KL": self.kl}


class DiffMVAE(nn.Module):
    """The multimodal VAE of §3.2, built from {name: encoder} and {name: decoder}.

    An encoder maps x_i to (mu, logvar), each (B, D). A decoder has log_prob(x_i, z) -> (B,) in nats
    and sample(z) -> x_i. It has every_subset = True if it is cheap enough to decode all subsets in
    each step. prior_expert multiplies p(z) into every product, as MVAE does (§2) but §3.3 does not.
    Deviation: beta weights the KL, and log_prob_weights, {name: w_i}, weight the log p(x_i|z), as
    in MoPoE; in Eq. 5 all these weights are 1.
    """

    def __init__(self, encoders, decoders, family="mopoe", beta=1.0, log_prob_weights=None,
                 prior_expert=False):
        super().__init__()
        self.log_prob_weights = {} if log_prob_weights is None else log_prob_weights
        check_names(self.log_prob_weights, decoders, "decoder")
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
        """q(z|x_A) ∝ ∏_{i∈A} q(z|x_i), times p(z) if prior_expert: (..., M, D) -> (..., D)."""
        if self.prior_expert:
            zeros = torch.zeros_like(mu[..., :1, :])  # p(z): μ = 0 and log σ² = 0
            mu = torch.cat([mu, zeros], dim=-2)
            logvar = torch.cat([logvar, zeros], dim=-2)
            present = F.pad(present, (0, 1), value=True)
        return product_of_experts(mu, logvar, present)

    def posterior(self, x):
        """q(z|x_o) given the observed modalities x, a dict (§3.3): mu, logvar, each (B, D)."""
        if not x:
            raise InputError("no modality is given: give at least one, or sample the prior")
        mu, logvar = self.experts(x)  # (B, M, D)
        present = torch.ones(mu.shape[:2], dtype=torch.bool, device=mu.device)
        return self.fuse(mu, logvar, present)

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        """KL(q(z|x_A) ‖ p(z)) of the products, (B, S, D) -> (B, S). MVTCAE also uses the experts,
        (B, M, D)."""
        return kl_divergence(mu, logvar)  # (B, S)

    def reconstruction(self, decoder, x, z, every_subset):
        """Σ_A ω_A log p(x|z_A), or an unbiased estimate. z: (B, S, D) -> (B,).

        Cheap decoders decode every subset. The others decode one, chosen at random for each
        example, unless every_subset is true.
        """
        batch, size, _ = z.shape
        if every_subset or getattr(decoder, "every_subset", False):
            x = x.repeat_interleave(size, dim=0)  # (B S, ...)
            return decoder.log_prob(x, z.flatten(0, 1)).view(batch, size).mean(1)
        chosen = (size * stratified(batch, z.device)).long()  # (B,), 0 .. S − 1, equally likely
        rows = torch.arange(batch, device=z.device)
        return decoder.log_prob(x, z[rows, chosen])

    def elbo(self, x, A=None, every_subset=False):
        """Eq. 5 for x, {name: (B, ...)}, as an ELBO. Each decoder runs once; the KL is exact.

        A Gaussian's KL needs no decoder, so it is averaged over all subsets instead of being
        estimated from random ones. The mean of the bounds for all A is itself a bound on log p(x).
        every_subset: run every decoder for every subset. A: (M,) bool, one subset to use instead of
        the family.
        """
        if A is not None and not (A.any() or self.prior_expert):
            raise InputError("A is empty: an empty subset of modalities needs prior_expert=True")
        check_names(x, {**self.encoders, **self.decoders}, "encoder or decoder")
        family = self.subsets if A is None else A[None].to(self.subsets)  # (S, M)
        expert_mu, expert_logvar = self.experts({name: x[name] for name in self.encoders})
        mu, logvar = self.fuse(expert_mu[:, None], expert_logvar[:, None], family)  # (B, S, D)
        kl = self.divergence(mu, logvar, expert_mu, expert_logvar).mean(1)  # (B,)
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            log_prob[name] = self.reconstruction(decoder, x[name], z, every_subset)  # (B,)
        return ELBO(log_prob, kl, self.beta, self.log_prob_weights)

    def decode(self, z):
        """A sample of every modality, {name: (B, ...)}; z may come from a posterior or a prior."""
        return {name: decoder.sample(z) for name, decoder in self.decoders.items()}


def check_names(given, known, kind):
    """Refuse names in given that are not in known."""
    unknown = set(given) - set(known)
    if unknown:
        raise InputError(f"no {kind} for {sorted(unknown)}: choose from {list(known)}")


# ---- 6  Latent prior (§3.4) ----------------------------------------------------------------------

class LatentPrior(Diffusion):
    """A diffusion model of z_0 ~ q(z|x) ∝ ∏_i q(z|x_i), which generates unconditional z.

    It is trained after the model, with the model fixed. shape: the shape in which net takes one z,
    (D,) for a ResidualMLP; (1, 16, 16) on CelebA and (1, 768) on CUB for the paper's UNets.
    Deviation: the default weighting is "v_mse"; the paper uses Eq. 1, "simple". Deviation: z is
    standardized; otherwise its scale would not fit the fixed noise schedule.
    """

    def __init__(self, net, shape, weighting="v_mse", num_steps=100, eta=None):
        super().__init__(net, shape, weighting=weighting, num_steps=num_steps, eta=eta)
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.ones(math.prod(shape)))

    def standardize(self, mu, logvar):
        """Set mean and std to those of z_0 ~ q(z|x) over a training set, mu, logvar: (N, D)."""
        variance = mu.var(0, correction=0) + logvar.exp().mean(0)  # (D,), total variance
        self.mean.copy_(mu.mean(0))
        self.std.copy_(variance.sqrt())

    def log_prob(self, z_0):
        """The surrogate, −½ E‖ε − ε̂‖² of Eq. 1 or −½ E‖v − v̂‖², in standardized space: (B,)."""
        return super().log_prob(((z_0 - self.mean) / self.std).view(-1, *self.shape))

    def sample(self, n, **options):
        """Return n latents, (n, D). options: as in Diffusion.sample."""
        return super().sample(n=n, **options).flatten(1) * self.std + self.mean


# ---- 7  Networks (§4.1, §4.2) --------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its input. Under autocast, nn.GroupNorm would make a float32
    copy of every activation and keep it for the backward pass. There are at most 32 groups, of at
    least four channels if possible."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, max(1, channels // 4), channels), channels)

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # the kernel accumulates in float32
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def zero_init(layer):
    """Set a layer's parameters to zero; for the last layer of a residual branch or a network."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class LogSNREmbedding(nn.Sequential):
    """Embed ℓ by sines and cosines of many frequencies and two linear layers: (B,) -> (B, size)."""

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
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.qkv(self.norm(x).flatten(2).mT)  # (B, L, 3C)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, C)
        return x + self.proj(h).mT.reshape(x.shape)


class ResBlock(nn.Module):
    """x + conv(silu(AdaGN(conv(silu(GN(x)))))), AdaGN(h) = (1 + s(e)) GN(h) + b(e), s, b linear.

    x: (B, c_in, ...) -> (B, c_out, ...). Only the UNet passes e, (B, embed_dim). Self-attention
    follows if heads > 0.
    """

    def __init__(self, dims, c_in, c_out, embed_dim=0, dropout=0.0, heads=0):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = CONV[dims](c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = CONV[dims](c_out, c_out, 3, padding=1)
        self.modulation = nn.Linear(embed_dim, 2 * c_out) if embed_dim else None
        self.dropout = nn.Dropout(dropout)
        self.skip = CONV[dims](c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else nn.Identity()
        if embed_dim:
            zero_init(self.conv2)

    def forward(self, x, e=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if e is not None:
            e = append_dims(self.modulation(e), x.ndim)  # (B, 2 c_out, 1, ...)
            scale, shift = e.chunk(2, dim=1)
            h = (1 + scale) * h + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


class UNet(nn.Module):
    """v(x_t, ℓ, z) in 2-D (images, and the paper's latent prior on CelebA) or 1-D (that on CUB).

    x: (B, in_channels, size) or (B, in_channels, size, size), with size divisible by
    patch_size · 2^(levels − 1). log_snr: (B,). z: (B, z_dim), or None if z_dim = 0. The sum of the
    embeddings of log_snr and z conditions every block by adaptive group norm (after Preechakul et
    al. 2022). An image that is linear in z, a first guess of x, is concatenated to x_t (Pandey et
    al. 2022 do so with a VAE's output). attention_levels: the levels with attention, 0 being the
    finest; the middle always has it. Inside the network one position is a patch of
    patch_size × patch_size pixels (Hoogeboom et al. 2023).

    The up path concatenates the activations kept by the down path, last first. With channel_mult
    (1, 2) and num_res_blocks = 2 the channels, in multiples of model_channels, are:

        down   stem 1   block 1   block 1   downsample 1   block 2   block 2
        up     block 2 + 2 -> 2   block 2 + 2 -> 2   block 2 + 1 -> 2   upsample 2
               block 2 + 1 -> 1   block 1 + 1 -> 1   block 1 + 1 -> 1   out
    """

    def __init__(self, dims, in_channels, size, model_channels, channel_mult, num_res_blocks=2,
                 attention_levels=(), num_heads=8, dropout=0.0, z_dim=0, patch_size=1):
        super().__init__()
        conv = CONV[dims]
        widths = [model_channels * m for m in channel_mult]
        embed_dim = max(256, 4 * model_channels)
        last = len(widths) - 1

        def block(c_in, c_out, heads):
            return ResBlock(dims, c_in, c_out, embed_dim, dropout, heads)

        self.embed_log_snr = LogSNREmbedding(model_channels, embed_dim)
        self.embed_z, self.z_to_image = None, None
        inputs = in_channels
        if z_dim:
            self.embed_z = nn.Linear(z_dim, embed_dim)
            self.z_to_image = nn.Linear(z_dim, in_channels * size**dims)
            inputs = 2 * in_channels
        self.stem = conv(inputs, model_channels, patch_size + 2, stride=patch_size, padding=1)

        c = model_channels
        skip_channels = [c]  # from down to up
        self.down = nn.ModuleList()
        for level, w in enumerate(widths):
            heads = num_heads if level in attention_levels else 0
            for _ in range(num_res_blocks):
                self.down.append(block(c, w, heads))
                skip_channels.append(w)
                c = w
            if level < last:
                self.down.append(conv(w, w, 3, stride=2, padding=1))
                skip_channels.append(w)

        self.middle = nn.ModuleList([block(c, c, num_heads), block(c, c, 0)])

        self.up = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            heads = num_heads if level in attention_levels else 0
            for _ in range(num_res_blocks + 1):
                self.up.append(block(c + skip_channels.pop(), w, heads))
                c = w
            if level > 0:
                upsample = nn.Upsample(scale_factor=2)
                self.up.append(nn.Sequential(upsample, conv(w, w, 3, padding=1)))

        unpatch = TRANSPOSED[dims](c, in_channels, patch_size + 2, stride=patch_size, padding=1)
        self.out = nn.Sequential(GroupNorm(c), nn.SiLU(), zero_init(unpatch))

    def forward(self, x, log_snr, z=None):
        if (z is None) != (self.embed_z is None):
            raise InputError("a UNet needs z if, and only if, it was built with z_dim > 0")
        e = self.embed_log_snr(log_snr)  # (B, embed_dim)
        if z is not None:
            e = e + self.embed_z(z)
            x = torch.cat([x, self.z_to_image(z).view_as(x)], dim=1)  # (B, 2 in_channels, ...)
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
    """h + linear(silu((1 + s(e)) LN(h) + b(e))), s, b linear. h: (B, width), e: (B, embed_dim)."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(embed_dim, 2 * width)
        self.linear = zero_init(nn.Linear(width, width))

    def forward(self, h, e):
        scale, shift = self.modulation(e).chunk(2, dim=1)
        return h + self.linear(F.silu((1 + scale) * self.norm(h) + shift))


class ResidualMLP(nn.Module):
    """v(z_t, ℓ) for the latent prior. x: (B, D), log_snr: (B,); z is not used.

    Deviation: the paper has UNets here. But neighboring dimensions of z are unrelated, whereas a
    convolution relates neighbors and treats all dimensions alike. Diffusion autoencoders
    (Preechakul et al. 2022) use an MLP for the same purpose.
    """

    def __init__(self, size, width, blocks):
        super().__init__()
        self.embed_log_snr = LogSNREmbedding(32, 64)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(MLPBlock(width, 64) for _ in range(blocks))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zero_init(nn.Linear(width, size)))

    def forward(self, x, log_snr, z=None):
        e = F.silu(self.embed_log_snr(log_snr))  # (B, 64)
        h = self.stem(x)  # (B, width)
        for block in self.blocks:
            h = block(h, e)
        return self.out(h)


def widen_means(linear, factor=8):
    """Multiply the weights that give the means in an encoder's last layer by factor, so that z
    starts about as wide as N(0, I) and decoders learn to use it sooner."""
    means, _ = linear.weight.data.chunk(2)
    means.mul_(factor)
    return linear


class Encoder(nn.Sequential):
    """q(z|x) = N(μ, σ²): layers, the last linear with 2 · D outputs -> (mu, logvar), each (B, D).
    """

    def __init__(self, *layers):
        super().__init__(*layers)
        widen_means([layer for layer in self.modules() if isinstance(layer, nn.Linear)][-1])

    def forward(self, x):
        return super().forward(x).chunk(2, dim=-1)


def conv_widths(size, base):
    """Return the channels after each halving of the resolution down to 4 pixels: base, then twice
    as many each time, at most 8 · base."""
    halvings = max(1, int(math.log2(size)) - 2)
    return [base * min(2**level, 8) for level in range(halvings)]


class ConvEncoder(Encoder):
    """Residual convolutional encoder after Soft-IntroVAE (Daniel and Tamar 2021), with group norm.

    x: (B, channels, size, size); base: channels after the first layer.
    """

    def __init__(self, channels, size, latent_dim, base):
        widths = conv_widths(size, base)
        layers = [nn.Conv2d(channels, widths[0], 5, padding=2), nn.AvgPool2d(2)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [ResBlock(2, c_in, c_out), nn.AvgPool2d(2)]
        side, c = size // 2 ** len(widths), widths[-1]
        layers += [ResBlock(2, c, c), GroupNorm(c), nn.SiLU(), nn.Flatten()]
        super().__init__(*layers, nn.Linear(c * side * side, 2 * latent_dim))


class ConvDecoder(nn.Sequential):
    """The mirror image of ConvEncoder, z: (B, latent_dim) -> (B, channels, size, size)."""

    def __init__(self, channels, size, latent_dim, base):
        widths = conv_widths(size, base)
        side = size // 2 ** len(widths)
        shape = (widths[-1], side, side)
        layers = [nn.Linear(latent_dim, math.prod(shape)), nn.Unflatten(1, shape)]
        layers += [ResBlock(2, widths[-1], widths[-1])]
        for c_in, c_out in itertools.pairwise(widths[::-1]):
            layers += [nn.Upsample(scale_factor=2), ResBlock(2, c_in, c_out)]
        layers += [nn.Upsample(scale_factor=2), GroupNorm(widths[0]), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(widths[0], channels, 5, padding=2))


def mlp(*widths):
    """Linear layers of these widths, with SiLU between them."""
    layers = []
    for w_in, w_out in itertools.pairwise(widths):
        layers += [nn.Linear(w_in, w_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


# ---- 8  Variants: a baseline, and incomplete examples --------------------------------------------

class MVTCAE(DiffMVAE):
    """The baseline of Hwang et al. 2021 (Tables 1 to 3). Its objective is not a bound on log p(x):

    (M − α)/M E[Σ_i log p(x_i|z)] − (1 − α) KL(q ‖ p(z)) − α/M Σ_i KL(q ‖ q(z|x_i)),  q = q(z|x)

    It uses only the product of all experts. α = 0 gives Eq. 5 for that product; 0.9 is from earlier
    public code of the paper's authors. log_prob_weights contain the factor (M − α)/M.
    """

    def __init__(self, encoders, decoders, alpha=0.9, beta=1.0, log_prob_weights=None):
        super().__init__(encoders, decoders, "mvae", beta, log_prob_weights)
        self.alpha = alpha
        factor = (len(encoders) - alpha) / len(encoders)
        weights = self.log_prob_weights
        self.log_prob_weights = {name: factor * weights.get(name, 1) for name in decoders}

    def divergence(self, mu, logvar, expert_mu, expert_logvar):
        """(1 − α) KL(q ‖ p(z)) + α/M Σ_i KL(q ‖ q(z|x_i)): (B, 1)."""
        to_prior = kl_divergence(mu, logvar)  # (B, 1)
        to_experts = kl_divergence(mu, logvar, expert_mu, expert_logvar)  # (B, M), q against each
        return (1 - self.alpha) * to_prior + self.alpha * to_experts.mean(1, keepdim=True)

    def elbo(self, x, A=None, every_subset=False):
        """The objective above, as an ELBO."""
        if A is not None:
            raise InputError("MVTCAE is defined only for the product of all experts: leave out A")
        return super().elbo(x, every_subset=every_subset)


class IncompleteDiffMVAE(DiffMVAE):
    """Eq. 5 for examples that lack modalities: a bound on log p(x_observed).

    observed: {name: (B,) bool} says for each modality in x which examples have it. Missing
    values in x may be anything, even NaN. Each A becomes A ∩ observed; subsets that are then empty
    are dropped, the rest are weighted equally, and only observed modalities are reconstructed.
    Every decoder runs for every subset.
    """

    def present(self, x, observed):
        """Return which of the encoders' modalities in x each example has: (B, M) bool."""
        check_names(observed, {**self.encoders, **self.decoders}, "encoder or decoder")
        present = torch.stack([observed[name] for name in self.encoders if name in x], dim=1)
        if not present.any(1).all():
            raise InputError("an example has no observed modality: leave it out")
        return present

    def posterior(self, x, observed):
        """q(z|x_o), where x_o are the observed modalities of x: mu, logvar, each (B, D)."""
        mu, logvar = self.experts(without_gaps(x, observed))  # (B, M, D)
        return self.fuse(mu, logvar, self.present(x, observed))

    def elbo(self, x, observed):
        """Eq. 5 as an ELBO; the terms of modalities that are not observed are 0."""
        x = without_gaps(x, observed)
        observed_mask = self.present(x, observed)[:, None]  # (B, 1, M)
        present = self.subsets & observed_mask  # (B, S, M)  A ∩ observed
        kept = present.any(-1)  # (B, S)
        present = torch.where(kept[..., None], present, observed_mask)  # placeholder, as ω_A is 0
        mu, logvar = self.experts({name: x[name] for name in self.encoders})
        mu, logvar = self.fuse(mu[:, None], logvar[:, None], present)  # (B, S, D)
        omega = kept.to(mu) / kept.sum(1, keepdim=True)  # (B, S)  ω_A
        z = sample_gaussian(mu, logvar)  # (B, S, D)
        log_prob = {}
        for name, decoder in self.decoders.items():
            each = torch.stack([decoder.log_prob(x[name], z_A) for z_A in z.unbind(1)], dim=1)
            log_prob[name] = torch.where(observed[name], (omega * each).sum(1), 0)  # (B,)
        kl = (omega * kl_divergence(mu, logvar)).sum(1)  # (B,)
        return ELBO(log_prob, kl, self.beta, self.log_prob_weights)


def without_gaps(x, observed):
    """Return x with zeros in the gaps, so that their contents affect neither values nor gradients.
    """
    return {name: torch.where(append_dims(observed[name], value.ndim), value, 0)
            for name, value in x.items()}


# ---- 9  Training ---------------------------------------------------------------------------------

SAVE_INTERVAL = 500  # steps between two checkpoints, or a hundredth of a long run
LOG_INTERVAL = 20  # steps between two rows of the history, or a five-hundredth of a long run
WARMUP_STEPS, COOLDOWN_STEPS = 100, 500  # the learning rate rises, and falls to 0, linearly
MAX_GRAD_NORM = 1.0


def checksum(tensors):
    """Return a checksum of {name: tensor}: of a data set, or of a model's weights."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().contiguous().numpy(), crc)
    return f"{crc:08x}"


def save_atomically(path, state):
    """Save state next to path, then rename it, so that path never holds an incomplete file."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def update_ema(ema_model, model, decay):
    """ema ← decay · ema + (1 − decay) · model; buffers, such as a prior's mean, are copied."""
    torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema_model.buffers(), model.buffers()):
        average.copy_(buffer)


def fit(s, stage, model, learning_rate, terms, n, trained_on,
        evaluate=lambda ema_model: {}, preview=lambda ema_model: None):
    """Train model with Adam and return its exponential moving average (EMA).

    stage: "model" or "prior". learning_rate(p) -> the peak learning rate of a parameter. terms(i)
    -> {name: (B,)} for indices i < n; the mean of the first is maximized, and all are logged.
    trained_on: {input: checksum}. At each checkpoint (s.out/stage.pt), evaluate(EMA) -> {"test " +
    column: number} is logged, and preview(EMA) is called. A stopped run resumes from there.
    """
    steps = s.steps if stage == "model" else s.prior_steps
    batch_size = s.batch_size if stage == "model" else s.prior_batch_size
    save_interval, log_interval = max(SAVE_INTERVAL, steps // 100), max(LOG_INTERVAL, steps // 500)
    ema_model = copy.deepcopy(model.train()).eval().requires_grad_(False)
    groups = {}  # {peak learning rate: parameters}
    for p in model.parameters():
        groups.setdefault(learning_rate(p), []).append(p)
    optimizer = torch.optim.Adam([{"params": params} for params in groups.values()], fused=True)
    parts = {"model": model, "ema": ema_model, "optimizer": optimizer}
    path, recent = Path(s.out) / f"{stage}.pt", []
    step, history = 0, []
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = torch.load(path, "cpu", weights_only=True)
        s.check_resumable(stage, state, trained_on)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, history = state["step"], state["history"]
    bar = tqdm(range(step, steps), stage, steps, initial=step, unit=" steps")
    for step in bar:
        entropy = (s.seed, ("model", "prior").index(stage), step)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))  # resumable
        i = torch.randint(n, (batch_size,), device=s.device)
        means = {name: term.mean() for name, term in terms(i).items()}
        objective, *_ = means.values()
        optimizer.zero_grad()
        (-objective).backward()
        means["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        factor = min(1, (step + 1) / WARMUP_STEPS, (steps - step) / COOLDOWN_STEPS)
        for group, peak in zip(optimizer.param_groups, groups):
            group["lr"] = peak * factor
        optimizer.step()
        update_ema(ema_model, model, min(s.ema_decay, (1 + step) / (10 + step)))
        recent.append(torch.stack(list(means.values())).detach())
        done = step + 1
        save = done == steps or done % save_interval == 0
        if save or done % log_interval == 0:
            row = dict(zip(means, torch.stack(recent).mean(0).tolist()))  # waits for the GPU
            recent = []
            if not all(map(math.isfinite, row.values())):
                raise FloatingPointError(f"not finite by step {done}, last checkpoint kept: {row}")
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})
            history.append({"step": done, **row})
        if save:
            history[-1].update(evaluate(ema_model))
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(step=done, finished=done == steps, history=history)
            save_atomically(path, {**state, "settings": asdict(s), "trained_on": trained_on})
            save_history(path, history)
            preview(ema_model)
    return ema_model


def train_model(s, data, model, get_batch, preview):
    """Maximize Eq. 5, or its surrogate, and return the EMA of the model.

    data: {"train" | "test": {modality: (N, ...)}} on s.device. get_batch(split, i) prepares
    examples i of a split for the networks. preview(ema_model) saves samples after each checkpoint.
    """
    model.to(s.device)
    z = torch.zeros(1, s.latent_dim, device=s.device)
    for piece in batches(data["train"], "checking the data"):
        x = get_batch(piece)
        for name, decoder in model.decoders.items():
            if isinstance(decoder, FeedForwardDecoder):
                decoder.check_support(x[name], z)
    for network in model.modules():
        if s.compile and isinstance(network, (UNet, ConvEncoder, ConvDecoder)):
            network.compile(dynamic=False)  # in place, so that weights keep their names

    def terms(i):
        x = get_batch(data["train"], i)
        return model.elbo(random_flip(x) if s.mirror else x).terms(s.objective)

    @torch.no_grad()
    def evaluate(ema_model):
        torch.manual_seed(s.seed)  # the same noise at every checkpoint
        pieces = batches({k: x[:256] for k, x in data["test"].items()}, "test", s.batch_size)
        totals = torch.cat([ema_model.elbo(get_batch(piece)).total for piece in pieces])
        return {f"test {s.objective}": totals.mean().item()}

    diffusion = {p for decoder in model.decoders.values() if isinstance(decoder, Diffusion)
                 for p in decoder.parameters()}
    n, trained_on = len(data["train"]["image"]), {"data_checksum": checksum(data["train"])}
    return fit(s, "model", model, lambda p: s.diffusion_lr if p in diffusion else s.vae_lr,
               terms, n, trained_on, evaluate, preview)


def train_prior(s, examples, model, prior, get_batch):
    """Train the latent prior (§3.4) on z ~ q(z|x) of examples, and return its EMA."""
    torch.manual_seed(s.seed)
    with torch.no_grad():
        each = [model.posterior(get_batch(piece)) for piece in batches(examples, "encoding")]
    mu, logvar = (torch.cat(parts) for parts in zip(*each))  # (N, D) each
    prior.to(s.device).standardize(mu, logvar)

    def terms(i):
        return {"surrogate": prior.log_prob(sample_gaussian(mu[i], logvar[i]))}

    trained_on = {"model_checksum": checksum(model.state_dict())}
    return fit(s, "prior", prior, lambda p: s.prior_lr, terms, len(mu), trained_on)


def random_flip(x):
    """Flip the image of each example, together with its mask, with a probability of ½."""
    flips = (torch.rand(len(x["image"]), 1, 1, 1) < 0.5).to(x["image"].device)
    return {name: torch.where(flips, value.flip(-1), value) if value.ndim == 4 else value
            for name, value in x.items()}


# ---- 10  Using a model, metrics, figures (§4) ----------------------------------------------------

def batches(x, label, size=250):
    """Yield {name: (N, ...)} in pieces of at most size examples, with a progress bar."""
    for start in tqdm(range(0, len(next(iter(x.values()))), size), label, leave=False):
        yield {name: value[start : start + size] for name, value in x.items()}


@torch.no_grad()
def encode_rows(model, x, condition):
    """z ~ q(z|x_o), (N, D), where condition lists the modalities of x that are in x_o (§3.3)."""
    pieces = batches({name: x[name] for name in condition}, "encoding")
    return torch.cat([sample_gaussian(*model.posterior(piece)) for piece in pieces])


def sample(decoders, name, z):
    """Decode z into the modality called name, (N, ...), in batches; clamp images to [−1, 1]."""
    pieces = batches({"z": z}, f"sampling {name}")
    x = torch.cat([decoders[name].sample(piece["z"]) for piece in pieces])
    return x.clamp(-1, 1) if name == "image" else x


def unconditional_latents(model, prior, training):
    """Return {label: z}, each (N, D), to compare the latent prior (§3.4) with N(0, I) and with the
    distribution that it imitates: z ~ q(z|x) of training examples, the aggregate posterior."""
    posterior = encode_rows(model, training, list(model.encoders))
    z = prior.sample(len(posterior))
    return {"aggregate posterior": posterior, "latent prior": z, "N(0, I)": torch.randn_like(z)}


@torch.no_grad()
def evaluate_elbo(model, test, get_batch):
    """Return the terms of Eq. 5 over test, every subset decoded: {term: {"nats": mean}}."""
    each = []
    for piece in batches(test, "ELBO", 32):
        elbo = model.elbo(get_batch(piece), every_subset=True)
        each.append({**elbo.terms(), "ELBO": elbo.bound})  # β and all weights are 1 in the bound
    return {name: {"nats": torch.cat([terms[name] for terms in each]).mean().item()}
            for name in each[0]}


def frechet_distance(a, b):
    """‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½) of features, (N, d); FID if from Inception."""
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # eigenvalues are ≥ 0
    return ((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * root).item()


def sharpness(images):
    """Return the mean squared gradient of images, (N, C, H, W), after a 3 × 3 median filter."""
    smooth = []
    for piece in batches({"x": images}, "sharpness"):
        padded = F.pad(piece["x"], (1, 1, 1, 1), "replicate")
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)  # (n, C, H, W, 9)
        smooth.append(windows.median(-1).values)  # without noise, but with edges
    return sum(torch.cat(smooth).diff(dim=dim).square().mean().item() for dim in (2, 3))


@torch.no_grad()
def evaluate_images(evaluator, generated, real, extra_metrics):
    """Return {condition: {metric: value}} for generated, {condition: {"image": (n, 3, H, W), ...}}.

    "fd" is the Fréchet distance to real, (N, 3, H, W). Its features are the means of q(z|image) of
    evaluator, a Supervised model. They hardly register blur; "sharpness", relative to real images,
    does. extra_metrics(features, x) -> {metric: value}.
    """
    def features(images):
        pieces = batches({"image": images}, "features")
        return torch.cat([evaluator.posterior(piece)[0] for piece in pieces])  # (N, D)

    real_z, real_sharpness = features(real), sharpness(real)
    rows = {}
    for condition, x in generated.items():
        z, ratio = features(x["image"]), sharpness(x["image"]) / real_sharpness
        rows[condition] = {"fd": frechet_distance(z, real_z), "sharpness": ratio}
        rows[condition].update(extra_metrics(z, x))
    return rows


def save_grid(path, rows, captions={}, side=64):
    """Save a PNG of rows {label: (n, 1 or 3, H, H) in [−1, 1]}, enlarged to about side pixels, with
    captions {label: n strings} below the images."""
    size = next(iter(rows.values())).shape[-1]
    side = size * max(1, side // size)
    texts = {label: [textwrap.fill(text, side // 7) for text in row]
             for label, row in captions.items()}
    lines = max((text.count("\n") + 1 for row in texts.values() for text in row), default=0)
    width, height = side + 2, side + 2 + 14 * lines  # of an image with its caption
    left = 12 + max(int(ImageFont.load_default(14).getlength(label)) for label in rows)
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (left + width * columns, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        y = row * height
        draw.text((6, y + side / 2), label, "black", font_size=14, anchor="lm")
        levels = (images.float().cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()
        for column, pixels in enumerate(levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
            x, image = left + column * width, Image.fromarray(pixels)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
            if label in texts:
                draw.text((x, y + side), texts[label][column], "black", font_size=12, spacing=1)
    sheet.save(path)


def save_history(path, history):
    """Save [{"step": ..., column: number}] as CSV and as curves in a PNG (test set in red)."""
    names = list(history[-1])
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    columns = [name for name in names if name != "step" and not name.startswith("test ")]
    sheet = Image.new("RGB", (600, 120 * len(columns)), "white")
    draw, last = ImageDraw.Draw(sheet), history[-1]["step"]
    for k, column in enumerate(columns):
        curves = [[(row["step"], row[name]) for row in history if name in row]
                  for name in (column, f"test {column}")]
        late = [y for curve in curves for step, y in curve if step > last / 10]
        low, high = min(late), max(late)  # the range of the panel
        scale = 90 / max(high - low, 1e-12)
        draw.text((6, 120 * k + 4), f"{column}: axis {low:.4g} to {high:.4g}, step {last}", "gray")
        for curve, color in zip(curves, ("black", "red")):
            draw.line([(590 * x / last, 120 * k + 115 - scale * (min(max(y, low), high) - low))
                       for x, y in curve], color)
    sheet.save(path.with_suffix(".png"))


# ---- 11  What both scripts share: settings, networks, results, files -----------------------------

def option(help, *presets, choices=None):
    """Return a field of Settings. presets: one default, or three: synthetic, real, --small."""
    presets = presets if len(presets) == 3 else 3 * presets
    return field(default=None, metadata={"help": help, "presets": presets, "choices": choices})


@dataclass
class Settings:
    """The settings of a run. None stands for the default and is replaced by it at construction, so
    checkpoints and results.json hold resolved values, which dataclasses.replace keeps."""

    data: str = option("folder with the real data; if omitted, data are synthetic", "")
    small: bool = option("with --data: presets that suit a CPU", False)
    out: str = option("folder for checkpoints, results and figures", None)
    evaluator: str = option("folder of a Supervised run that evaluates generated images", "")
    seed: int = option("random seed", 0)
    device: str = option("torch device", "cuda" if torch.cuda.is_available() else "cpu")
    compile: bool = option("compile the UNet and convolutional networks", False, True, False)
    image_size: int = option("height and width of the images in pixels", None)
    steps: int = option("training steps of the model", None)
    batch_size: int = option("batch size of the model", None)
    weighting: str = option("image loss; likelihood: Diff-MVAE, a bound; others: Diff-MVAE*",
                            "v_mse", "simple", "v_mse", choices=("likelihood", "simple", "v_mse"))
    family: str = option("family of subsets, or the baseline MVTCAE", "mopoe",
                         choices=("mopoe", "mvae", "mmvae", "mvtcae"))
    decoder: str = option("image decoder; feedforward: the baseline MoPoE*; none: Supervised",
                          "diffusion", choices=("diffusion", "feedforward", "none"))
    beta: float = option("weight of the KL; 1 if all terms are in nats, 0 for Supervised", 0.01)
    log_prob_weight: float = option(
        "weight of log p(attributes or caption|z); 1 if all terms are in nats", None)
    latent_dim: int = option("dimensions of z", None)
    mirror: bool = option("flip images and masks horizontally at random", False, False, True)
    patch_size: int = option("patch size of the UNet in pixels", 2, 1, 2)
    model_channels: int = option("base channels of the UNet, a multiple of 8", None)
    channel_mult: list = option("channel multipliers of the UNet, one for each level", None)
    attention_resolutions: list = option("resolutions, in patches, with attention", [], [8], [])
    dropout: float = option("dropout of the UNet", 0.0, 0.1, 0.0)
    encoder_channels: int = option("base channels of ConvEncoder and ConvDecoder", 16, 64, 8)
    diffusion_lr: float = option("learning rate of the diffusion decoder", 1e-3, 1e-4, 1e-3)
    vae_lr: float = option("learning rate of all but the diffusion decoder", None)
    ema_decay: float = option("decay of the EMA of the weights", 0.995, 0.9999, 0.999)
    prior_net: str = option("network of the latent prior", "mlp", choices=("mlp", "unet"))
    prior_steps: int = option("training steps of the latent prior", 4000, 10_000, 4000)
    prior_batch_size: int = option("batch size of the latent prior", 256)
    prior_lr: float = option("learning rate of the latent prior", 2e-3, 1e-3, 2e-3)
    sampling_steps: int = option("sampling steps for images; 100 if --weighting likelihood", 50)
    eta: float = option("η of DDIM, 0 (deterministic) to 1; not with --weighting likelihood", 1.0)
    num_samples: int = option("generated images per condition; faces: if evaluated", 256, 6000, 256)

    presets = {}  # {name: three defaults}, from the scripts, in place of those above
    may_differ = ("data", "small", "out", "evaluator", "device", "compile", "sampling_steps", "eta",
                  "num_samples")  # between a checkpoint and the run that resumes it

    def __post_init__(self):
        if self.small and not self.data:
            raise InputError("--small needs --data: synthetic data are already small")
        column = 0
        if self.data:
            column = 2 if self.small else 1
        defaults = {f.name: self.presets.get(f.name, f.metadata["presets"])[column]
                    for f in fields(self)}
        given = {name: value for name, value in vars(self).items() if value is not None}
        chosen = {**defaults, **given}
        likelihood = chosen["weighting"] == "likelihood"
        in_nats = {"diffusion": likelihood, "feedforward": True}.get(chosen["decoder"], False)
        if in_nats:  # the image term is in nats, as all others are
            defaults.update(beta=1.0, log_prob_weight=1.0)
        if chosen["decoder"] == "none":
            defaults["beta"] = 0.0
        if likelihood:
            defaults.update(sampling_steps=100, eta=None)
            if self.eta is not None:
                raise InputError("--weighting likelihood does not sample by DDIM: leave out --eta")
        for f in fields(self):
            value = given.get(f.name, defaults[f.name])
            if value is not None:  # a checkpoint can hold neither a Path nor numpy's numbers
                value = [int(v) for v in value] if f.type is list else f.type(value)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise InputError(f"{f.name} is {value!r}: choose from {f.metadata['choices']}")
            setattr(self, f.name, value)
        if not (self.beta >= 0 and self.log_prob_weight >= 0 and 0 <= self.ema_decay < 1
                and self.diffusion_lr > 0 and self.vae_lr > 0 and self.prior_lr > 0
                and self.num_samples >= 2 and (self.eta is None or 0 <= self.eta <= 1)):
            raise InputError("out of range: beta and log_prob_weight must be ≥ 0, learning rates "
                             "> 0, 0 ≤ ema_decay < 1, num_samples ≥ 2 and 0 ≤ eta ≤ 1")
        self.is_bound = in_nats and self.family != "mvtcae"  # whether ELBO.bound is one
        unweighted = self.beta == self.log_prob_weight == 1
        self.objective = "ELBO" if self.is_bound and unweighted else "surrogate"

    @classmethod
    def parse(cls, description):
        """Read the settings from the command line."""
        parser = ArgumentParser(description=description, argument_default=SUPPRESS,
                                formatter_class=RawDescriptionHelpFormatter)
        flags = {bool: {"action": BooleanOptionalAction}, list: {"type": int, "nargs": "*"}}
        for f in fields(cls):
            flag = flags.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
            presets = cls.presets.get(f.name, f.metadata["presets"])
            shown = "synthetic {!r}, real {!r}, --small {!r}".format(*presets)
            if presets[0] == presets[1] == presets[2]:
                shown = f"default {presets[0]!r}"
            text = f"{f.metadata['help']} ({shown})"
            parser.add_argument("--" + f.name.replace("_", "-"), help=text, **flag)
        return cls(**vars(parser.parse_args()))

    def check_resumable(self, stage, state, trained_on):
        """Refuse a checkpoint of other settings, other data or, for a prior, another model."""
        before, now = {**state["settings"], **state["trained_on"]}, {**asdict(self), **trained_on}
        for name, value in now.items():
            of_prior_only = name.startswith("prior_") and stage == "model"
            if before.get(name) != value and name not in self.may_differ and not of_prior_only:
                raise InputError(f"{self.out}/{stage}.pt has {name} {before.get(name)!r}, not "
                                 f"{value!r}: move it away, or choose another --out")


def main(run, settings_class, description):
    """Run a script with the command line's settings; print an error that the user can fix."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    try:
        run(settings_class.parse(description))
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. The same command continues from the last checkpoint, if there is one.",
              file=sys.stderr)
        sys.exit(130)


def image_networks(s):
    """Return the image encoder and the image decoder (None for Supervised)."""
    decoder = None
    if s.decoder == "feedforward":
        net = ConvDecoder(3, s.image_size, s.latent_dim, s.encoder_channels)
        decoder = FeedForwardDecoder(net, CalibratedGaussian())
    if s.decoder == "diffusion":
        resolutions = [s.image_size // s.patch_size // 2**k for k in range(len(s.channel_mult))]
        levels = [resolutions.index(resolution) for resolution in s.attention_resolutions]
        unet = UNet(2, 3, s.image_size, s.model_channels, s.channel_mult, attention_levels=levels,
                    dropout=s.dropout, z_dim=s.latent_dim, patch_size=s.patch_size)
        decoder = Diffusion(unet, (3, s.image_size, s.image_size), weighting=s.weighting,
                            num_steps=s.sampling_steps, eta=s.eta)
    return ConvEncoder(3, s.image_size, s.latent_dim, s.encoder_channels), decoder


def build_pair(s, encoders, decoders, log_prob_weights, layout):
    """Return the untrained model and latent prior (§3.4; None for Supervised). layout: the shape of
    one z in the paper's UNet."""
    variant = MVTCAE if s.family == "mvtcae" else partial(DiffMVAE, family=s.family)
    prior = None
    if s.decoder == "none":
        encoders = {"image": encoders["image"]}
        decoders = {name: decoder for name, decoder in decoders.items() if name != "image"}
    elif s.prior_net == "mlp":
        prior = LatentPrior(ResidualMLP(s.latent_dim, 256, 4), (s.latent_dim,), eta=s.eta)
    else:
        if math.prod(layout) != s.latent_dim or layout[0] % 2:
            raise InputError("--prior-net unet needs a latent_dim that is the square of an even "
                             f"number (faces), or even (birds), not {s.latent_dim}")
        unet = UNet(len(layout), 1, layout[0], s.model_channels, (1, 2))
        prior = LatentPrior(unet, (1, *layout), eta=s.eta)
    return variant(encoders, decoders, beta=s.beta, log_prob_weights=log_prob_weights), prior


def load_run(out, settings_class, build, device="cpu"):
    """Return the trained (model, prior) of the finished run in out. build(s) -> untrained pair."""
    states = [torch.load(Path(out) / "model.pt", "cpu", weights_only=True)]
    if states[0]["settings"]["decoder"] != "none" and states[0]["finished"]:
        states.append(torch.load(Path(out) / "prior.pt", "cpu", weights_only=True))
        if states[1]["trained_on"]["model_checksum"] != checksum(states[0]["ema"]):
            raise InputError(f"{out}/prior.pt is of another model: move it away and train it again")
    with torch.random.fork_rng():
        pair = build(settings_class(**{**states[-1]["settings"], "device": device}))
    for part, state in zip(pair, states):
        if not state["finished"]:
            raise InputError(f"the run in {out} is not finished: repeat its command")
        part.load_state_dict(state["ema"])
        part.to(device).eval().requires_grad_(False)
    return pair


def load_evaluator(s, load):
    """Return load(s.evaluator), which must be Supervised, on the same data and image size."""
    was = torch.load(Path(s.evaluator) / "model.pt", "cpu", weights_only=True)["settings"]
    names = [data and Path(data).resolve().name for data in (was["data"], s.data)]
    if (was["decoder"], was["image_size"], names[0]) != ("none", s.image_size, names[1]):
        raise InputError(f"{s.evaluator} is not a --decoder none run of this data and image_size")
    return load(s.evaluator, s.device)


def save_results(s, tables):
    """Save settings and tables, {title: {row: {column: number}}}, in results.json; print tables."""
    text = json.dumps({"settings": asdict(s), "tables": tables}, indent=1, allow_nan=False)
    Path(s.out, "results.json").write_text(text, "utf-8")
    named = {"f1": "F1", "elbo": "Eq. 5", "fd": "FD ↓", "clip": "CLIP"}
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        headings = [named.get(name, name.replace("_", " ")) for name in (title, *columns)]
        print(f"\n| {' | '.join(headings)} |\n|---|{'---|' * len(columns)}")
        for label, row in table.items():
            cells = [f"{row[column]:.3f}" if column in row else "" for column in columns]
            print(f"| {label} | {' | '.join(cells)} |")
    print(f"\nAll tables and figures are in {s.out}.")


def read_lines(path):
    """Return the non-blank lines of a UTF-8 file, with or without a byte-order mark."""
    return [line for line in path.read_text("utf-8-sig", "replace").split("\n") if line.strip()]


def open_image(path, mode):
    """Return the image in a file in PIL's mode "RGB" or "L", with its EXIF orientation applied."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF" or image.has_transparency_data:
            raise ValueError(f"mode {image.mode} has transparency or more than 8 bits per channel")
        return image.convert(mode)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise InputError(f"{path} cannot be read as an 8-bit image: {error}") from error


def decode_cached(cache, read, names):
    """Return [read(name) for each name] as a tensor; decode once, then load the file at cache."""
    saved = torch.load(cache, "cpu", weights_only=True) if cache.exists() else {}
    if saved.get("names") != names:
        with ThreadPoolExecutor() as pool:
            arrays = list(tqdm(pool.map(read, names), "decoding images", len(names)))
        saved = {"names": names, "arrays": torch.from_numpy(np.stack(arrays))}
        try:
            save_atomically(cache, saved)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where it cannot write
            print(f"Warning: the decoded images could not be cached: {error}")
    return saved["arrays"]
