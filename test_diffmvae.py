"""Tests of the mathematics against independent references, and of the scripts as a user runs them.

The references are grids, quadrature, recursions and closed forms. To average a quadratic
function of a standard normal exactly, two points per dimension, ±1, are enough.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from decimal import Decimal, getcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Stub
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytest import approx
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributions import (
    Categorical, Independent, MultivariateNormal, Normal, OneHotCategorical, kl_divergence,
)
from torch.testing import assert_close

import diffmvae as dm
import train_celeba as celeba
import train_cub as cub

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("ci")
torch.set_num_threads(1)  # the computations are too small for more
ROOT = Path(__file__).parent
seeds, moderate = st.integers(0, 2**31), st.floats(-3, 3)
f64 = lambda x: torch.tensor(x, dtype=torch.float64)
refused = lambda message: pytest.raises(dm.InputError, match=message)
results_in = lambda out: json.loads(Path(out, "results.json").read_text())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normals(seed):
    """Return randn(*shape) in float64, with a generator of its own."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def gaussians(seed, *shape):
    """Return random mu, logvar of this shape."""
    randn = normals(seed)
    return 1.5 * randn(*shape), randn(*shape)


def nudge(module, size=0.05):
    """Move every weight off its initial value; layers at zero pass no gradient back."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


# ---- 1  Gaussian algebra -------------------------------------------------------------------------

@given(seeds, st.integers(1, 4))
def test_product_is_the_normalized_product_of_densities(seed, m):
    mu, logvar = gaussians(seed, m, 1)
    z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_density = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(0)
    p = log_density.softmax(0)
    mean = (p * z).sum()
    fused_mu, fused_logvar = dm.product_of_experts(mu, logvar)
    assert fused_mu.item() == approx(mean.item(), abs=1e-6)
    assert fused_logvar.exp().item() == approx((p * (z - mean) ** 2).sum().item(), rel=1e-5)


@given(seeds)
def test_product_with_masks_is_the_product_of_present_experts(seed):
    mu, logvar = gaussians(seed, 7, 3, 5)
    present = dm.subsets(3)
    fused = dm.product_of_experts(mu, logvar, present)
    mu_absent = torch.where(present[..., None], mu, torch.nan)  # absent experts are not used
    assert_close(dm.product_of_experts(mu_absent, logvar, present), fused)
    flat = logvar.masked_fill(~present[..., None], torch.inf)  # an expert that knows nothing
    assert_close(dm.product_of_experts(mu, flat), fused)
    for i, mask in enumerate(present):
        alone = dm.product_of_experts(mu[i, mask], logvar[i, mask])
        assert_close((fused[0][i], fused[1][i]), alone)
    every = dm.product_of_experts(mu[:, None], logvar[:, None], present)  # (7, 1, 3, 5) and (7, 3)
    assert_close(every[0].diagonal(dim1=0, dim2=1).T, fused[0])


@given(st.lists(st.tuples(moderate, st.floats(-700, 700)), min_size=1, max_size=4))
def test_product_is_exact_at_extreme_log_variances(experts):
    getcontext().prec = 50
    mu, logvar = (torch.tensor(x, dtype=torch.float32)[:, None] for x in zip(*experts))
    precision = [(-Decimal(v)).exp() for v in logvar[:, 0].tolist()]
    mean = sum(p * Decimal(m) for p, m in zip(precision, mu[:, 0].tolist())) / sum(precision)
    fused_mu, fused_logvar = dm.product_of_experts(mu, logvar)
    assert fused_mu.item() == approx(float(mean), abs=2e-6)
    assert fused_logvar.item() == approx(float(-sum(precision).ln()), rel=1e-6, abs=1e-6)


def test_product_of_no_expert_is_nan():
    none = torch.zeros(1, 2, dtype=torch.bool)
    mu, logvar = dm.product_of_experts(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), none)
    assert mu.isnan().all() and (logvar == torch.inf).all()


@given(seeds)
def test_kl_agrees_with_torch(seed):
    (mu, logvar), (mu_p, logvar_p) = gaussians(seed, 6, 4), gaussians(seed + 1, 6, 4)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(mu_p, (logvar_p / 2).exp())
    assert_close(dm.kl_divergence(mu, logvar, mu_p, logvar_p), kl_divergence(q, p).sum(-1))
    standard = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    assert_close(dm.kl_divergence(mu, logvar), kl_divergence(q, standard).sum(-1))


@given(st.floats(-1e-3, 1e-3))
def test_kl_never_rounds_below_zero(logvar):
    assert dm.kl_divergence(torch.zeros(1), torch.tensor([logvar])) >= 0


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_subset_families(m):
    as_sets = lambda masks: [frozenset(i for i in range(m) if row[i]) for row in masks.tolist()]
    singles = [frozenset({i}) for i in range(m)]
    powerset = [frozenset(c) for k in range(1, m + 1) for c in itertools.combinations(range(m), k)]
    assert sorted(as_sets(dm.subsets(m)), key=sorted) == sorted(powerset, key=sorted)
    assert as_sets(dm.subsets(m, "mvae")) == [frozenset(range(m))]
    assert sorted(as_sets(dm.subsets(m, "mmvae")), key=sorted) == singles
    with pytest.raises(KeyError):
        dm.subsets(m, "poe")


def test_sample_gaussian_has_its_mean_and_variance():
    mu, logvar = torch.tensor([-2.0, 0.5]), torch.tensor([-2.0, 1.5])
    z = dm.sample_gaussian(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    assert_close(z.mean(0), mu, atol=0.03, rtol=0)
    assert_close(z.var(0), logvar.exp(), rtol=0.02, atol=0)


# ---- 2  Forward SDE ------------------------------------------------------------------------------

def schedule(sde, t):
    """Return α(t), σ(t) as floats."""
    return sde.alpha(f64(t)).item(), sde.sigma(f64(t)).item()


@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(beta_max=2.0), dm.VPSDE(0.5, 8.0)])
def test_marginals_solve_the_sde(sde):
    """dm/dt = −½ β m and dV/dt = β (1 − V), integrated with the midpoint rule."""
    n, mean, var = 20_000, 1.0, 0.0
    for i in range(n):
        beta, h = sde.g2(f64((i + 0.5) / n)).item(), 1 / n
        mean += -0.5 * beta * (mean - 0.25 * h * beta * mean) * h
        var += beta * (1 - (var + 0.5 * h * beta * (1 - var))) * h
        if i + 1 in (n // 100, n // 3, n):
            assert schedule(sde, (i + 1) / n) == approx((mean, var**0.5), rel=5e-7)


@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(beta_max=2.0)])
def test_log_snr(sde):
    assert dm.VPSDE() == dm.VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-4)  # β: the authors'
    t = torch.linspace(1e-4, 1, 1001, dtype=torch.float64, requires_grad=True)
    ell = sde.log_snr(t)
    assert_close(ell, (sde.alpha(t) ** 2 / sde.sigma(t) ** 2).log())
    (slope,) = torch.autograd.grad(ell.sum(), t)
    assert_close(-slope, sde.g2(t) / sde.sigma(t) ** 2)  # what makes λ = g² uniform in ℓ
    assert sde.log_snr_range() == approx([ell[-1].item(), ell[0].item()])


@given(st.floats(1e-6, 1))
def test_log_snr_to_t_inverts_log_snr_in_float32(t):
    sde, t = dm.VPSDE(), torch.tensor(t)
    assert_close(sde.log_snr_to_t(sde.log_snr(t)), t, rtol=3e-6, atol=0)


# ---- 3  Samplers ---------------------------------------------------------------------------------

def gaussian_eps(m, s2):
    """The denoiser of data N(m, s²): σ (x_t − α m) / (α² s² + σ²), as eps(x_t, z, α, σ)."""
    return lambda x, z, alpha, sigma: sigma * (x - alpha * m) / (alpha**2 * s2 + sigma**2)


def exact_eps(m, s2, sde):
    """Return the same denoiser as a sampler calls it, eps_model(x_t, t)."""
    return lambda x, t: gaussian_eps(m, s2)(x, None, sde.alpha(t), sde.sigma(t))


def quadratic_times(sde, steps):
    return [(1.0 + (sde.t_min**0.5 - 1) * i / max(1, steps - 1)) ** 2 for i in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("m, s2", [(0.7, 0.3), (-1.0, 2.0)])
def test_ddim_follows_its_recursion(steps, m, s2):
    sde, calls = dm.VPSDE(), []
    eps, x1 = exact_eps(m, s2, sde), f64([[-1.5], [0.2], [2.0]])
    out = dm.ddim(lambda x, t: calls.append(float(t)) or eps(x, t), x1, sde, steps)
    times = quadratic_times(sde, steps)
    assert calls == approx(times, rel=1e-4)
    K, points = 1.0, [schedule(sde, t) for t in times] + [(1.0, 0.0)]
    for (a, s), (a_next, s_next) in zip(points, points[1:]):
        K *= (a * a_next * s2 + s * s_next) / (a * a * s2 + s * s)
    assert_close(out, m + K * (x1 - points[0][0] * m), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps, t_min", [(2, 1e-4), (5, 0.05), (50, 1e-4)])
def test_ddim_with_noise_follows_its_recursion(eta, steps, t_min):
    """From x_1 ~ N(0, 1), the exact denoiser of N(m, s²) keeps every x_t Gaussian, N(M, V).

    The standard deviation of the fresh noise is Eq. 16 of DDIM's paper, with ᾱ = α²:
    η √((1 − ᾱ_u)/(1 − ᾱ_t)) √(1 − ᾱ_t/ᾱ_u).
    """
    sde, m, s2, n = dm.VPSDE(t_min=t_min), 0.7, 0.3, 400_000
    x1 = torch.randn(n, dtype=torch.float64)
    out = dm.ddim(exact_eps(m, s2, sde), x1, sde, steps, eta)
    M, V = 0.0, 1.0
    points = [schedule(sde, t) for t in quadratic_times(sde, steps)]
    for (a, s), (a_next, s_next) in zip(points, points[1:]):
        v = a * a * s2 + s * s
        fresh = eta * (s_next**2 / s**2 * (1 - a**2 / a_next**2)) ** 0.5
        slope = a_next * a * s2 / v + (s_next**2 - fresh**2) ** 0.5 * s / v  # of x̂0 and of ε̂
        M, V = a_next * m + slope * (M - a * m), slope**2 * V + fresh**2
    a, s = points[-1]
    k = a * s2 / (a * a * s2 + s * s)
    M, V = m + k * (M - a * m), k * k * V
    assert out.mean().item() == approx(M, abs=5 * (V / n) ** 0.5 + 1e-4)
    assert out.var().item() == approx(V, rel=5 * (2 / n) ** 0.5 + 1e-3)


def test_ddim_draws_noise_only_for_a_positive_eta():
    sde, x1 = dm.VPSDE(), torch.randn(5, 3)
    eps, before = exact_eps(0.7, 0.3, sde), torch.get_rng_state()
    first = dm.ddim(eps, x1, sde, 7)
    assert torch.equal(dm.ddim(eps, x1, sde, 7, eta=0.0), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dm.ddim(eps, x1, sde, 7, eta=0.5), first)
    for steps in (1, 2, 3, 1000):  # rounding must not make r greater than 1
        assert dm.ddim(eps, x1, sde, steps, eta=1.0).isfinite().all()


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(t_min=0.05)])  # with a last step that matters
def test_euler_maruyama_follows_its_recursion(steps, sde):
    m, s2, calls = 0.7, 0.3, []
    eps, n = exact_eps(m, s2, sde), 400_000
    record = lambda x, t: calls.append(float(t)) or eps(x, t)
    out = dm.euler_maruyama(record, torch.randn(n, dtype=torch.float64), sde, steps)
    ends = sde.log_snr_range()
    ells = [ends[0] + (ends[1] - ends[0]) * i / (steps - 1) for i in range(steps)]
    times = [sde.log_snr_to_t(f64(ell)).item() for ell in ells]
    assert calls == approx(times, rel=1e-4)
    M, V = 0.0, 1.0
    for t, u in zip(times, times[1:]):
        (a, s), h, beta = schedule(sde, t), t - u, sde.g2(t)
        v = a * a * s2 + s * s
        f = 1 + h * beta * (0.5 - 1 / v)
        M, V = f * M + h * beta * a * m / v, f * f * V + h * beta
    a, s = schedule(sde, times[-1])
    k = a * s2 / (a * a * s2 + s * s)
    M, V = m + k * (M - a * m), k * k * V
    assert out.mean().item() == approx(M, abs=5 * (V / n) ** 0.5 + 1e-4)
    assert out.var().item() == approx(V, rel=5 * (2 / n) ** 0.5 + 1e-3)


# ---- 4  The score-matching bound -----------------------------------------------------------------

def denoiser(eps):
    """Return a net whose v makes Diffusion predict eps(x_t, z, α, σ), a closed form."""

    def net(x_t, log_snr, z=None):
        ell = log_snr.view(-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = ell.sigmoid().sqrt(), (-ell).sigmoid().sqrt()
        return (eps(x_t, z, alpha, sigma) - sigma * x_t) / alpha

    return net


def diffusion(eps, shape, sde, weighting="likelihood"):
    return dm.Diffusion(denoiser(eps), shape, sde, weighting)


SDES = [dm.VPSDE(), dm.VPSDE(beta_max=2.0), dm.VPSDE(0.3, 6.0, 1e-2)]
midpoints = lambda n: (torch.arange(n, dtype=torch.float64) + 0.5) / n  # of n pieces of [0, 1]


def exact_bound(model, x):
    """Return E log_prob at x, (d,): midpoints in ℓ for the integral, ε = ±1 in each dimension.

    The error of a linear denoiser is quadratic in ε and separate in each dimension, so ±1 is exact.
    """
    ends, n = model.sde.log_snr_range(), 1024
    t = model.sde.log_snr_to_t(ends[0] + (ends[1] - ends[0]) * midpoints(n)).repeat(2)
    eps = f64([[1.0], [-1.0]]).repeat_interleave(n, 0).expand(2 * n, len(x))
    return model.log_prob(x.expand(2 * n, -1), None, t, eps).mean().item()


def alpha_sigma(ell):
    """Return the floats α, σ with ℓ = log α²/σ² and α² + σ² = 1."""
    return (1 + math.exp(-ell)) ** -0.5, (1 + math.exp(ell)) ** -0.5


def closed_form(x, m, s2, sde):
    """Return the bound at x for the exact denoiser of N(m, s²), derived by hand."""
    ell_1, ell_0 = sde.log_snr_range()
    alpha, sigma = alpha_sigma(ell_1)
    tail = lambda r: math.log(1 + r * s2) + (1 - (x - m) ** 2 / s2) / (1 + r * s2)
    prior = -0.5 * ((alpha * x) ** 2 + sigma**2 - 1 - 2 * math.log(sigma))
    reconstruction = -0.5 * (1 + math.log(2 * math.pi) - ell_0)
    return prior + reconstruction - 0.5 * (tail(math.exp(ell_0)) - tail(math.exp(ell_1)))


@pytest.mark.parametrize("sde", SDES)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3), moderate, st.floats(0.05, 4))
def test_bound_of_the_exact_denoiser_has_its_closed_form(sde, x, m, s2):
    got = exact_bound(diffusion(gaussian_eps(m, s2), (len(x),), sde), f64(x))
    assert got == approx(closed_form(f64(x), m, s2, sde).sum().item(), rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("sde", SDES[:2])
@given(seeds, st.floats(-1, 1), st.floats(0.1, 2), st.floats(0.02, 0.1))
@settings(max_examples=10)
def test_bound_stays_below_the_density_of_the_reverse_sde(sde, seed, m, s2, size):
    """ε̂ = a(t) x_t + c(t) keeps the model Gaussian: mean and variance follow ODEs in ℓ (RK4)."""
    p = size * np.random.default_rng(seed).standard_normal(4)

    def coefficients(alpha, sigma):
        a = sigma / (alpha**2 * s2 + sigma**2)
        return a + sigma * (p[0] + p[1] * alpha), -a * alpha * m + sigma * (p[2] + p[3] * alpha)

    def eps(x, z, alpha, sigma):
        a, c = coefficients(alpha, sigma)
        return a * x + c

    def slope(ell, state):
        (alpha, s), (mean, var) = alpha_sigma(ell), state
        a, c = coefficients(alpha, s)
        return np.array([(0.5 * s * s - s * a) * mean - s * c, (s * s - 2 * s * a) * var + s * s])

    (ell, end), state = sde.log_snr_range(), np.array([0.0, 1.0])
    h = (end - ell) / 500
    for _ in range(500):
        k1 = slope(ell, state)
        k2 = slope(ell + h / 2, state + h / 2 * k1)
        k3 = slope(ell + h / 2, state + h / 2 * k2)
        k4 = slope(ell + h, state + h * k3)
        state, ell = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), ell + h
    alpha, s = alpha_sigma(end)
    density = Normal(state[0] / alpha, (state[1] + s * s) ** 0.5 / alpha)
    for k in (-2, -0.7, 0, 0.7, 2):
        x = f64([density.mean + k * density.stddev])
        assert exact_bound(diffusion(eps, (1,), sde), x) <= density.log_prob(x).item() + 1e-6


@pytest.mark.parametrize("sde", [SDES[0], SDES[2]])
@pytest.mark.parametrize("weighting", ["likelihood", "simple", "v_mse"])
def test_sampled_times_and_noise_give_the_same_expectation(weighting, sde):
    m, s2, n = 0.4, 0.5, 200_000
    x, model = f64([0.9, -0.3]), diffusion(gaussian_eps(m, s2), (2,), sde, weighting)
    estimates = model.log_prob(x.expand(n, 2))
    if weighting == "likelihood":
        expected = closed_form(x, m, s2, sde).sum().item()
    else:  # −½ ∫ λ/σ² E‖ε − ε̂‖² dt; ε − ε̂ is linear in ε
        t = sde.t_min + (1 - sde.t_min) * midpoints(400_000) ** 3  # denser where σ is small
        step = 3 * (1 - sde.t_min) * midpoints(400_000) ** 2
        a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        v = a**2 * s2 + s**2
        error = ((a**2 * s2 / v) ** 2 + (s * a * (x - m) / v) ** 2).sum(1)
        angle = lambda t: math.atan2(*schedule(sde, t)[::-1])
        weight = {  # λ/σ², t uniform
            "simple": torch.ones_like(t) / (1 - sde.t_min),
            "v_mse": sde.g2(t) / (2 * a * s)[:, 0] / (angle(1.0) - angle(sde.t_min)),
        }[weighting]
        expected = -0.5 * (weight * error * step).mean().item()
    noise = 5 * estimates.std().item() / n**0.5
    assert estimates.mean().item() == approx(expected, abs=noise)


def test_squared_error_is_taken_at_the_noised_point():
    sde, seen = dm.VPSDE(), []

    def net(*inputs):
        seen.extend(inputs)
        return torch.full_like(inputs[0], 0.3)

    (x, eps), z, t = torch.randn(2, 5, 3, 4, 4), torch.randn(5, 7), torch.rand(5) * 0.9 + 0.05
    error = dm.Diffusion(net, (3, 4, 4)).squared_error(x, z, t, eps)
    alpha, sigma = sde.alpha(t).view(5, 1, 1, 1), sde.sigma(t).view(5, 1, 1, 1)
    x_t, log_snr, z_seen = seen
    assert_close(x_t, alpha * x + sigma * eps)
    assert_close(log_snr, sde.log_snr(t))
    assert z_seen is z
    predicted = sigma * x_t + alpha * 0.3
    assert_close(error, (eps - predicted).square().sum((1, 2, 3)))


def test_stratified_numbers_are_uniform_for_each_example():
    u = torch.stack([dm.stratified(3) for _ in range(20_000)])  # (repetitions, examples)
    for moment, expected in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 4)):
        assert_close((u**moment).mean(0), torch.full((3,), expected), atol=0.012, rtol=0)
    follows = (u[:, 1] - u[:, 0]) % 1 < 0.5  # by one third or two: the order of strata is random
    assert follows.float().mean().item() == approx(0.5, abs=0.02)


def test_each_weighting_has_its_own_sampler():
    sde, calls = dm.VPSDE(), []

    def eps(x, z, alpha, sigma):
        calls.append(z)
        return gaussian_eps(z, 0.01)(x, z, alpha, sigma)

    def sampled(weighting, num_steps=None, eta=None, **options):
        torch.manual_seed(1)
        calls.clear()
        model = dm.Diffusion(denoiser(eps), (1,), sde, weighting, num_steps, eta)
        return model.sample(z, noise=noise, **options), len(calls)

    z, noise = torch.tensor([[-1.0], [2.0]], requires_grad=True), torch.randn(2, 1)
    ddim = lambda eta, n: dict(sampler=partial(dm.ddim, eta=eta), num_steps=n)
    for weighting in ("simple", "v_mse"):
        image, n = sampled(weighting)
        assert n == 50 and calls[0] is z and not image.requires_grad
        assert_close(image, z, atol=0.4, rtol=0)
        assert torch.equal(image, sampled("likelihood", **ddim(1.0, 50))[0])
        image, n = sampled(weighting, num_steps=7, eta=0.5)
        assert n == 7 and torch.equal(image, sampled("likelihood", **ddim(0.5, 7))[0])
    image, n = sampled("likelihood")
    assert n == 100 and torch.equal(image, sampled("simple", 100, sampler=dm.euler_maruyama)[0])
    with refused("likelihood.*simple"):
        sampled("uniform")


# ---- 5  The multimodal ELBO ----------------------------------------------------------------------

DIM, SIZES = 3, {"a": 4, "b": 5, "c": 3}
chosen = lambda x, A: {k: value for (k, value), a in zip(x.items(), A) if a}
total = lambda model, world, A=None: model.elbo(world.batch(), A=A).total.mean().item()


class Fixed(nn.Module):
    """An encoder N(A (x − b), e^logvar): linear, with the same variance for every x."""

    def __init__(self, matrix, offset, logvar):
        super().__init__()
        self.matrix, self.offset, self.logvar = matrix, offset, logvar

    def forward(self, x):
        mu = (x - self.offset) @ self.matrix.T
        return mu, self.logvar.expand_as(mu)


class LinearGaussian:
    """x_i = W_i z + b_i + N(0, ψ_i I), W_iᵀW_i diagonal: posterior and evidence in closed form."""

    def __init__(self, seed=0):
        randn = normals(seed)
        self.W, self.b, self.psi = {}, {}, {}
        for k, n in SIZES.items():
            self.W[k] = torch.linalg.qr(randn(n, DIM))[0] * (1 + randn(DIM).abs())
            self.b[k], self.psi[k] = randn(n), 0.3 + randn(()).abs()
        self.x = {k: randn(1, n) for k, n in SIZES.items()}  # one example
        self.tau = {k: self.W[k].square().sum(0) / self.psi[k] for k in SIZES}  # (D,)

    def experts(self, prior_expert):
        """Return encoders whose full product, with or without N(0, I), is the exact posterior."""
        precision = {k: self.tau[k] + (0 if prior_expert else 1 / len(SIZES)) for k in SIZES}
        matrix = {k: self.W[k].T / self.psi[k] / precision[k][:, None] for k in SIZES}
        return {k: Fixed(matrix[k], self.b[k], -precision[k].log()) for k in SIZES}

    def wrong_experts(self, certain=False):
        """Return other encoders; if certain, their variance is almost 0."""
        randn, shift = normals(1), -40 * certain
        expert = lambda k, n: Fixed(0.3 * randn(DIM, n), self.b[k], 0.3 * randn(DIM) + shift)
        return {k: expert(k, n) for k, n in SIZES.items()}

    def decoder(self, k):
        mean = lambda z: z @ self.W[k].T + self.b[k]
        return dm.FeedForwardDecoder(mean, partial(self.likelihood, k))

    def likelihood(self, k, mean):
        return Normal(mean, self.psi[k].sqrt(), validate_args=False)

    def decoders(self):
        return {k: self.decoder(k) for k in SIZES}

    def evidence(self, given=SIZES):
        stacked = lambda part: torch.cat([part[k].view(SIZES[k], -1) for k in given])
        W, psi = stacked(self.W), torch.cat([self.psi[k].expand(SIZES[k]) for k in given])
        p = MultivariateNormal(stacked(self.b)[:, 0], W @ W.T + psi.diag())
        return p.log_prob(stacked(self.x)[:, 0]).item()

    def posterior(self, given=SIZES):
        precision = 1 + sum(self.tau[k] for k in given)
        pull = sum((self.x[k] - self.b[k]) @ self.W[k] / self.psi[k] for k in given)
        return pull / precision, -precision.log().expand_as(pull)

    def batch(self, copies=1):
        """Return the example, repeated for each of sigma_points."""
        return {k: x.expand(2 * DIM * copies, -1) for k, x in self.x.items()}


@pytest.fixture
def sigma_points(monkeypatch):
    """Take z at the 2D points μ ± √D σ along the axes: exact for means of quadratics in z."""
    axes = torch.cat([torch.eye(DIM), -torch.eye(DIM)]).double() * DIM**0.5  # (2D, D)

    def points(mu, logvar):
        e = axes.repeat(len(mu) // len(axes), 1).view(len(mu), *[1] * (mu.ndim - 2), DIM)
        return mu + (0.5 * logvar).exp() * e

    monkeypatch.setattr(dm, "sample_gaussian", points)


@pytest.mark.parametrize("prior_expert", [False, True])
def test_elbo_is_the_evidence_at_the_exact_posterior(prior_expert, sigma_points):
    world = LinearGaussian()
    experts = world.experts(prior_expert)
    model = dm.DiffMVAE(experts, world.decoders(), "mvae", prior_expert=prior_expert)
    assert total(model, world) == approx(world.evidence(), abs=1e-9)
    for A in dm.subsets(3) if prior_expert else ():  # every product is the posterior given A
        given = chosen(world.x, A)
        assert_close(model.posterior(given), world.posterior(given))


@pytest.mark.parametrize("prior_expert", [False, True])
@pytest.mark.parametrize("family", ["mopoe", "mvae", "mmvae"])
@pytest.mark.parametrize("wrong", [False, True])
def test_elbo_is_the_evidence_less_the_mean_gap(family, prior_expert, wrong, sigma_points):
    """ELBO = log p(x) − Σ_A ω_A KL(q(z|x_A) ‖ p(z|x)), for any experts."""
    world = LinearGaussian(seed=2)
    experts = world.wrong_experts() if wrong else world.experts(prior_expert)
    model = dm.DiffMVAE(experts, world.decoders(), family, prior_expert=prior_expert)
    gaps = []
    for A in dm.subsets(3, family):
        q = model.posterior(chosen(world.x, A))
        gaps.append(dm.kl_divergence(*q, *world.posterior()).item())
        assert total(model, world, A) == approx(world.evidence() - gaps[-1], abs=1e-8)
    expected = world.evidence() - np.mean(gaps)
    assert total(model, world) == approx(expected, abs=1e-8)
    every = model.elbo(world.batch(), every_subset=True).bound
    assert every.mean().item() == approx(expected, abs=1e-8)
    assert expected <= world.evidence()


def test_beta_and_weights_scale_their_terms():
    log_prob = {"a": torch.tensor([-3.0]), "b": torch.tensor([-5.0])}
    elbo = dm.ELBO(log_prob, torch.tensor([2.0]), beta=0.5, log_prob_weights={"b": 10})
    terms = {"surrogate": -3 - 50 - 1, "log p(a|z)": -3, "log p(b|z)": -5, "KL": 2}
    assert list(elbo.terms("surrogate").items()) == list(terms.items())
    assert elbo.bound == -3 - 5 - 2
    world, options = LinearGaussian(), dict(beta=0.5, log_prob_weights={"b": 10}, prior_expert=True)
    model = dm.DiffMVAE(world.experts(True), world.decoders(), **options)
    for elbo in (model.elbo(world.x), model.elbo(world.x, A=model.subsets[0])):
        a, b, c = (elbo.log_prob[k] for k in "abc")
        assert_close(elbo.total, a + 10 * b + c - 0.5 * elbo.kl)


@pytest.mark.parametrize("objective", ["ELBO", "surrogate"])
def test_a_modality_may_be_named_like_a_total(objective):
    log_prob = {name: torch.tensor([-3.0]) for name in ("ELBO", "surrogate", "KL")}
    terms = dm.ELBO(log_prob, torch.tensor([2.0]), 1.0, {}).terms(objective)
    assert next(iter(terms.items())) == (objective, -9 - 2)  # the first one is maximized
    assert terms["KL"] == 2 and len(terms) == 5


@pytest.mark.parametrize("model", [dm.DiffMVAE, dm.MVTCAE, dm.IncompleteDiffMVAE])
def test_a_weight_of_no_decoder_is_refused(model):
    parts = {"a": nn.Identity(), "b": nn.Identity()}, {"a": nn.Identity()}
    model(*parts, log_prob_weights={"a": 2})
    for name in ("b", "A"):  # b has no decoder
        with refused(rf"no decoder for \['{name}'\]: choose from \['a'\]"):
            model(*parts, log_prob_weights={"a": 2, name: 3})


def test_elbo_with_a_diffusion_decoder(sigma_points):
    """With the exact denoiser of p(c|z) = N(Wz + b, ψ), the term of c is its closed form."""
    world, sde = LinearGaussian(seed=3), dm.VPSDE(t_min=1e-3)
    mean, psi = world.decoder("c").net, world.psi["c"].item()
    eps = lambda x, z, alpha, sigma: gaussian_eps(mean(z), psi)(x, z, alpha, sigma)
    decoders = world.decoders() | {"c": diffusion(eps, (3,), sde)}
    model = dm.DiffMVAE(world.experts(False), decoders, "mvae")
    elbo = model.elbo(world.batch(copies=4000))
    z = dm.sample_gaussian(*model.posterior(world.batch()))  # (2D, D)
    exact = closed_form(world.x["c"], mean(z), psi, sde).sum(1).mean().item()
    noise = 5 * elbo.log_prob["c"].std().item() / len(elbo.kl) ** 0.5
    assert elbo.log_prob["c"].mean().item() == approx(exact, abs=noise)
    assert elbo.total.mean().item() == approx(world.evidence(), abs=noise + 0.05)


class FirstOf(nn.Module):
    """An expensive decoder, whose "log-likelihood" is the first number of z."""

    def log_prob(self, x, z):
        return z[:, 0]


def test_one_subset_per_example_is_unbiased_and_every_subset_exact(monkeypatch):
    world, batch = LinearGaussian(seed=4), 10  # 7 subsets do not divide 10
    model = dm.DiffMVAE(world.wrong_experts(certain=True), {"a": FirstOf()})
    x = {k: torch.randn(batch, n, dtype=torch.float64) for k, n in SIZES.items()}
    estimates = torch.stack([model.elbo(x).log_prob["a"] for _ in range(4000)])  # (4000, B)
    each = torch.stack([model.elbo(x, A=A).log_prob["a"] for A in model.subsets])  # (S, B)
    error = 5 * each.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - each.mean(0)).abs() < error).all()
    assert estimates[:, 0].round(decimals=6).unique().numel() == 7  # an example meets every subset
    assert_close(model.elbo(x, every_subset=True).log_prob["a"], each.mean(0))
    monkeypatch.setattr(FirstOf, "every_subset", True, raising=False)
    assert_close(model.elbo(x).log_prob["a"], each.mean(0))


def test_every_subset_decodes_each_example_against_itself():
    world = LinearGaussian(seed=5)
    model = dm.DiffMVAE(world.wrong_experts(certain=True), world.decoders())
    x = {k: torch.randn(6, n, dtype=torch.float64) for k, n in SIZES.items()}
    each = [model.elbo(x, A=A) for A in model.subsets]
    for together in (model.elbo(x), model.elbo(x, every_subset=True)):
        for k in SIZES:
            assert_close(together.log_prob[k], sum(e.log_prob[k] for e in each) / 7)
        assert_close(together.kl, sum(e.kl for e in each) / 7)


def test_gradients_reach_the_posterior_through_z():
    mu, logvar = torch.randn(2, 2, 6, requires_grad=True).unbind()
    z = dm.sample_gaussian(mu, logvar)
    assert_close(torch.autograd.grad(z.sum(), (mu, logvar)), (torch.ones(2, 6), 0.5 * (z - mu)))
    for weighting in dm.Diffusion.default_steps:
        image = dm.Diffusion(dm.UNet(2, 3, 8, 8, (1, 2), z_dim=6), (3, 8, 8), weighting=weighting)
        nudge(image)
        term = image.log_prob(torch.randn(2, 3, 8, 8), z.requires_grad_()).sum()
        assert torch.autograd.grad(term, z)[0].abs().min() > 0


def tiny(settings=celeba.Settings, **options):
    """Return settings for the smallest model and the shortest training."""
    size = dict(image_size=16, model_channels=8, channel_mult=[1, 2], attention_resolutions=[])
    more = dict(encoder_channels=8, latent_dim=16, steps=3, prior_steps=2, batch_size=4)
    return settings(**size | more | dict(device="cpu", compile=False) | options)


def tiny_batch(n=4):
    image, mask = torch.rand(n, 3, 16, 16) * 2 - 1, torch.rand(n, 1, 16, 16).round()
    return {"image": image, "mask": mask, "attributes": torch.rand(n, 18).round()}


@pytest.fixture
def quick(monkeypatch):
    """Render few examples and sample with few steps."""
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12, "fresh": 12})
    monkeypatch.setattr(cub, "BIRDS", {"train": 40, "test": 12, "fresh": 12})
    original = dm.Diffusion.sample

    def sample(self, *arguments, **options):
        return original(self, *arguments, **{"num_steps": 4, **options})

    monkeypatch.setattr(dm.Diffusion, "sample", sample)


@pytest.mark.parametrize("options", [
    {}, {"weighting": "likelihood"}, {"decoder": "feedforward"},
    {"family": "mvtcae", "prior_net": "unet"},
])
def test_gradients_reach_every_parameter(options):
    model, prior = celeba.build(tiny(**options))
    nudge(model)
    (-model.elbo(tiny_batch(8)).total.mean()).backward()
    nudge(prior)
    (-prior.log_prob(torch.randn(4, 16)).mean()).backward()
    for name, p in [*model.named_parameters(), *prior.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_any_subset_generates_everything(quick):
    model, _ = celeba.build(tiny())
    x = tiny_batch()
    for A in dm.subsets(3):
        mu, logvar = model.posterior(chosen(x, A))
        assert mu.shape == logvar.shape == (4, 16)
        made = model.decode(dm.sample_gaussian(mu, logvar))
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in x.items()}
    assert_close(model.posterior(dict(reversed(x.items()))), model.posterior(x))
    with refused("no modality is given"):
        model.posterior({})
    with refused("no encoder for"):
        model.posterior({"text": x["mask"]})
    for one in (model, celeba.build(tiny(family="mvtcae"))[0]):
        with refused("no encoder or decoder for ..text..: choose from"):
            one.elbo({**x, "text": x["mask"]})
    with refused("A is empty"):
        model.elbo(x, A=torch.zeros(3, dtype=torch.bool))


def test_an_empty_subset_with_the_prior_expert_is_the_prior():
    world = LinearGaussian()
    model = dm.DiffMVAE(world.experts(True), world.decoders(), prior_expert=True)
    x = {k: v.expand(4000, -1) for k, v in world.x.items()}
    nothing = model.elbo(x, A=torch.zeros(3, dtype=torch.bool))
    assert nothing.kl.abs().max().item() == approx(0, abs=1e-12)
    for k, term in nothing.log_prob.items():  # E log N(x; Wz + b, ψ) over z ~ N(0, I)
        square = (world.x[k] - world.b[k]).square().sum() + world.W[k].square().sum()
        n = world.x[k].numel()
        expected = -0.5 * (square / world.psi[k] + n * (2 * math.pi * world.psi[k]).log())
        assert abs(term.mean() - expected) < 5 * term.std() / 4000**0.5


def test_calibrated_gaussian_and_bernoulli():
    mean, x, likelihood = torch.randn(3, 2), torch.randn(3, 2), dm.CalibratedGaussian()
    nn.init.constant_(likelihood.logvar, math.log(0.25))
    expected = Normal(mean, 0.5).log_prob(x).sum(1)
    assert_close(dm.FeedForwardDecoder(nn.Identity(), likelihood).log_prob(x, mean), expected)
    masks, mask = dm.FeedForwardDecoder(nn.Identity(), dm.bernoulli), x.gt(0).float()
    loss = F.binary_cross_entropy_with_logits(mean, mask, reduction="none")
    assert_close(masks.log_prob(mask, mean), -loss.sum(1))
    assert_close(masks.sample(mean), mean.sigmoid())


@pytest.mark.parametrize("one", [(1,), (1, 4, 4)])
def test_shapes_that_torch_would_broadcast_are_refused(one):
    """Targets (B,) for (B, 1), or (B, H, W) for (B, 1, H, W), would give B² terms instead of B."""
    net = nn.Sequential(nn.Linear(2, math.prod(one)), nn.Unflatten(1, one))
    decoder, z = dm.FeedForwardDecoder(net, dm.bernoulli), torch.randn(4, 2)
    assert decoder.log_prob(torch.ones(4, *one), z).shape == (4,)
    for x in (torch.ones(4, *one[1:]), torch.ones(1, *one), torch.ones(4, 2, *one[1:])):
        message = f"x has shape {tuple(x.shape)}, but p(x|z) has {(4, *one)}"
        with refused(re.escape(message)):
            decoder.log_prob(x, z)


def one_hot(logits):
    return OneHotCategorical(logits=logits, validate_args=False)


@pytest.mark.parametrize("likelihood, good, bad", [
    (dm.bernoulli, [0.0, 1.0], [-1.0, 1.0]), (one_hot, [0.0, 1.0], [0.0, 0.0]),
    (lambda p: Independent(dm.bernoulli(p), 1), [1.0, 1.0], [2.0, 1.0]),
    (dm.CalibratedGaussian(), [-9.0, 9.0], [math.nan, 0.0]),
])
def test_targets_outside_the_support_are_refused(likelihood, good, bad):
    """log_prob itself does not notice: for attributes −1/1 it has no upper limit."""
    decoder, z = dm.FeedForwardDecoder(nn.Identity(), likelihood), torch.zeros(1, 2)
    decoder.check_support(torch.tensor([good, good]), z)
    with refused("targets are outside .*the support of their likelihood"):
        decoder.check_support(torch.tensor([good, bad]), z)


def test_a_categorical_is_refused_and_a_one_hot_categorical_works():
    z, x = torch.zeros(2, 3), torch.eye(3)[:2]
    hidden = lambda logits: Independent(Categorical(logits=logits[None]), 1)
    for likelihood in (lambda logits: Categorical(logits=logits), hidden):
        with refused("use one-hot x"):
            dm.FeedForwardDecoder(nn.Identity(), likelihood).log_prob(x.argmax(1), z)
    decoder = dm.FeedForwardDecoder(nn.Identity(), one_hot)
    assert_close(decoder.log_prob(x, z), torch.full((2,), -math.log(3)))
    assert_close(decoder.sample(z), torch.full((2, 3), 1 / 3))


# ---- 6  Latent prior -----------------------------------------------------------------------------

def test_latent_prior_standardizes():
    net = denoiser(gaussian_eps(0.0, 1.0))  # exact for standardized z
    prior = dm.LatentPrior(net, (1, 4))
    mu, logvar = torch.randn(3, 4) * 3 + 5, torch.randn(3, 4)  # few, so N − 1 would be noticed
    prior.standardize(mu, logvar)
    variance = (mu.square() + logvar.exp()).mean(0) - mu.mean(0).square()  # E z² − (E z)²
    assert_close(prior.mean, mu.mean(0))
    assert_close(prior.std, variance.sqrt())
    assert (prior.num_steps, prior.weighting) == (100, "v_mse")
    samples = prior.sample(20_000, noise=torch.randn(20_000, 1, 4), num_steps=200)
    assert samples.shape == (20_000, 4)
    assert_close(samples.mean(0), prior.mean, atol=0.12, rtol=0)
    assert_close(samples.std(0), prior.std, rtol=0.05, atol=0)
    torch.manual_seed(1)
    surrogate = prior.log_prob(mu)
    torch.manual_seed(1)
    standard = dm.Diffusion(net, (1, 4), weighting="v_mse")
    assert_close(surrogate, standard.log_prob(((mu - prior.mean) / prior.std)[:, None]))


# ---- 7  Networks ---------------------------------------------------------------------------------

UNETS = [
    dict(dims=1, in_channels=1, size=12, channel_mult=(1, 2), attention_levels=(1,)),
    dict(dims=2, in_channels=3, size=8, channel_mult=(1, 2, 2), attention_levels=(0,), z_dim=5),
    dict(dims=2, in_channels=3, size=12, channel_mult=(1, 2), z_dim=5, patch_size=2),
]


@pytest.mark.parametrize("options", UNETS)
def test_unet(options):
    net, z_dim = dm.UNet(model_channels=8, num_heads=2, **options), options.get("z_dim")
    x = torch.randn(2, options["in_channels"], *[options["size"]] * options["dims"])
    z, ell = torch.randn(2, z_dim) if z_dim else None, torch.tensor([-3.0, 2.0])
    assert (net(x, ell, z) == 0).all()  # the exact denoiser of N(0, I)
    nudge(net)
    with refused("needs z if, and only if, it was built with z_dim > 0"):
        net(x, ell, None if z_dim else torch.randn(2, 5))
    out = net(x, ell, z)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.allclose(net(x, ell + 1, z), out)
    swapped = net(x.flip(0), ell.flip(0), z.flip(0) if z_dim else None).flip(0)
    assert_close(swapped, out)  # examples do not mix
    for dead in ("z_to_image", "embed_z") if z_dim else ():  # either route of z is enough
        one = copy.deepcopy(net)
        getattr(one, dead).weight.data.zero_()
        assert not torch.allclose(one(x, ell, z + 1), one(x, ell, z))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("c_out", [4, 8])
def test_residual_blocks_are_their_formula(dims, c_out):
    """x + conv(silu((1 + s) GN(conv(silu(GN(x)))) + b))"""
    x, e = torch.randn(2, 4, *[5] * dims), torch.randn(2, 6)
    block = dm.ResBlock(dims, 4, c_out, embed_dim=6)
    nudge(block)
    scale, shift = block.modulation(e).view(2, 2, c_out, *[1] * dims).unbind(1)
    h = (1 + scale) * block.norm2(block.conv1(F.silu(block.norm1(x)))) + shift
    assert_close(block(x, e), block.skip(x) + block.conv2(F.silu(h)))


def test_encoders_start_wide():
    text = cub.TextEncoder(tiny_bert(hidden_size=256), 100)
    conv, mlp = dm.ConvEncoder(3, 16, 100, 8), dm.Encoder(dm.mlp(5, 300, 200))
    layers = [mlp[0][-1], conv[-1], text.linear]
    model, _ = cub.build(cub.Settings(), cub.text_parts(cub.Settings(), TWO_BIRDS)[1], init=True)
    layers.append(model.encoders["caption"].linear)
    for last, factor in zip(layers, (8, 8, 8, 16)):
        means, logvars = last.weight.chunk(2)
        assert (means.std() / logvars.std()).item() == approx(factor, rel=0.05)


def test_group_norm_keeps_the_precision_of_its_input():
    layer, x = dm.GroupNorm(16), 3 * torch.randn(4, 16, 6, 6) + 1
    nudge(layer)
    assert torch.equal(layer(x), F.group_norm(x, 4, layer.weight, layer.bias, layer.eps))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), layer(x), rtol=0.01, atol=0.03)


# ---- 8  Variants ---------------------------------------------------------------------------------

@pytest.mark.parametrize("option, alpha", [({"alpha": 0.0}, 0.0), ({"alpha": 0.4}, 0.4), ({}, 0.9)])
def test_mvtcae_by_its_formula(option, alpha, sigma_points):
    world = LinearGaussian(seed=6)
    options = dict(beta=0.5, log_prob_weights={"b": 10})
    parts = world.wrong_experts(), world.decoders()
    model = dm.MVTCAE(*parts, **options, **option)
    mvae = dm.DiffMVAE(*parts, "mvae", **options)
    gaussian = lambda mu, logvar: Normal(mu, (logvar / 2).exp())
    kl = lambda q, p: kl_divergence(q, p).sum().item()
    q, standard = gaussian(*mvae.posterior(world.x)), Normal(f64([0.0] * DIM), 1.0)
    to_experts = [kl(q, gaussian(*mvae.encoders[k](world.x[k]))) for k in SIZES]
    kls = (1 - alpha) * kl(q, standard) + alpha / 3 * sum(to_experts)
    log_prob = {k: term.mean().item() for k, term in mvae.elbo(world.batch()).log_prob.items()}
    expected = (3 - alpha) / 3 * (log_prob["a"] + 10 * log_prob["b"] + log_prob["c"]) - 0.5 * kls
    assert total(model, world) == approx(expected, abs=1e-9)
    others = {k: x * torch.arange(2 * DIM)[:, None] for k, x in world.batch().items()}  # 1: world.x
    assert model.elbo(others).kl[1].item() == approx(kls)
    assert (total(model, world) == approx(total(mvae, world))) == (alpha == 0)
    with refused("defined only for the product of all experts"):
        model.elbo(world.batch(), A=model.subsets[0])


def every_pattern(x):
    """Return x and observed for the 7 patterns of missing modalities, with NaN in the gaps."""
    n = len(x["a"]) // 7
    patterns = dm.subsets(3)  # the observed modalities
    observed = {k: there.repeat_interleave(n) for k, there in zip(SIZES, patterns.T)}
    return {k: torch.where(observed[k][:, None], x[k], torch.nan) for k in SIZES}, observed


@pytest.mark.parametrize("prior_expert", [False, True])
@pytest.mark.parametrize("family", ["mopoe", "mvae", "mmvae"])
def test_elbo_of_incomplete_examples(family, prior_expert, sigma_points):
    """ELBO = log p(x_o) − Σ_A ω_A KL(q(z|x_A) ‖ p(z|x_o)), as if only the modalities o existed."""
    world, options = LinearGaussian(seed=2), dict(beta=0.5, log_prob_weights={"b": 10})
    parts = world.wrong_experts(), world.decoders(), family
    model = dm.IncompleteDiffMVAE(*parts, prior_expert=prior_expert)
    complete = dm.DiffMVAE(*parts, prior_expert=prior_expert)
    x, observed = every_pattern(world.batch(copies=7))
    elbo = model.elbo(x, observed)
    for pattern, found in zip(dm.subsets(3), elbo.bound.view(7, -1).mean(1)):
        there = chosen(world.x, pattern)
        gaps = []
        for A in dm.subsets(len(there), family):
            q = complete.posterior(chosen(there, A))
            gaps.append(dm.kl_divergence(*q, *world.posterior(there)).item())
        assert found.item() == approx(world.evidence(there) - np.mean(gaps), abs=1e-8)
    for k in SIZES:
        assert torch.equal(elbo.log_prob[k] != 0, observed[k])
    weighted = dm.IncompleteDiffMVAE(*parts, **options, prior_expert=prior_expert)
    a, b, c = elbo.log_prob.values()
    assert_close(weighted.elbo(x, observed).total, a + 10 * b + c - 0.5 * elbo.kl)
    mu, logvar = model.posterior(x, observed)
    for pattern, *q in zip(dm.subsets(3), mu[:: 2 * DIM], logvar[:: 2 * DIM]):
        assert_close(q, [part[0] for part in complete.posterior(chosen(world.x, pattern))])
    for only in SIZES:  # a part of the modalities
        rows = {k: there[observed[only]] for k, there in observed.items()}
        mu, _ = model.posterior({only: x[only][observed[only]]}, rows)
        assert_close(mu[0], complete.posterior({only: world.x[only]})[0][0])


@pytest.mark.parametrize("prior_expert", [False, True])
def test_an_example_without_observed_modality_is_refused(prior_expert):
    world = LinearGaussian()
    x, nowhere = world.batch(), {k: torch.arange(2 * DIM) != 1 for k in SIZES}
    parts = world.experts(True), world.decoders()
    model = dm.IncompleteDiffMVAE(*parts, prior_expert=prior_expert)
    for f in (model.elbo, model.posterior):
        with refused("an example has no observed modality"):
            f(x, nowhere)
    with refused("no encoder or decoder for ..labels..: choose from"):
        model.elbo(x, {**nowhere, "labels": nowhere["a"]})


@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_the_contents_of_gaps_affect_neither_values_nor_gradients(decoder):
    """One of four faces lacks mask and attributes, one its image; each has something."""
    complete, _ = celeba.build(tiny(decoder=decoder))
    model = dm.IncompleteDiffMVAE(complete.encoders, complete.decoders)
    nudge(model)
    has = {"image": [1, 1, 0, 1], "mask": [1, 0, 1, 1], "attributes": [0, 0, 1, 1]}
    observed = {name: torch.tensor(there) == 1 for name, there in has.items()}
    x, found = tiny_batch(), []
    for value in (0.0, 255.0, torch.nan):
        for name, there in observed.items():
            x[name][~there] = value
        torch.manual_seed(1)
        terms = model.elbo(x, observed).terms()
        posterior = model.posterior(x, observed)
        model.zero_grad()
        (terms["ELBO"] + torch.cat(posterior, dim=1).sum(1)).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        found.append([*terms.values(), *posterior, *gradients])
    for one, *others in zip(*found):
        assert one.isfinite().all() and all(torch.equal(one, other) for other in others)


# ---- 9  Training ---------------------------------------------------------------------------------

def toy_settings(out, **changes):
    return celeba.Settings(out=out, **dict(steps=40, batch_size=4, device="cpu") | changes)


def toy_fit(model, terms, s, n=20, stage="model", trained_on={}, **options):
    return dm.fit(s, stage, model, lambda p: 1e-2, terms, n, trained_on, **options)


def toy(out, size=1.0, stop_at=None, preview=lambda ema_model: None, **changes):
    """Fit a line of numbers, with dropout, so that every step needs its own random numbers.

    size scales a term that is only logged. stop_at: press Ctrl-C in that step.
    """
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    data, steps = torch.linspace(-1, 1, 60).view(20, 3), itertools.count(1)

    def terms(i):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        x = data[i]
        return {"fit": -(model(x) - x[:, :1]).square()[:, 0], "size": size * x[:, 0]}

    ema_model = toy_fit(model, terms, toy_settings(out, **changes), preview=preview,
                        evaluate=lambda ema_model: {"test fit": ema_model(data).mean().item()})
    return [p.clone() for p in (*model.parameters(), *ema_model.parameters())]


def saved_in(out, stage="model"):
    return torch.load(Path(out, f"{stage}.pt"), weights_only=True)


def read_history(out):
    """Return the rows of model.csv, {column: float}, without empty cells."""
    with open(Path(out, "model.csv"), newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_resumed_training_equals_uninterrupted_training(tmp_path, monkeypatch):
    monkeypatch.setattr(dm, "SAVE_INTERVAL", 10)
    whole = toy(tmp_path / "whole")
    for step in (15, 12):  # Ctrl-C in steps 15 and, after resuming from step 10, 22
        with pytest.raises(KeyboardInterrupt):
            toy(tmp_path / "parts", stop_at=step)
    assert saved_in(tmp_path / "parts")["step"] == 20
    resumed = toy(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    assert saved_in(tmp_path / "whole")["step"] == 40 and not list(tmp_path.rglob("*.tmp"))
    assert read_history(tmp_path / "whole") == read_history(tmp_path / "parts")
    again = toy(tmp_path / "whole", preview=lambda ema_model: pytest.fail("it is finished"))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_each_step_of_each_stage_and_seed_has_its_own_random_numbers(tmp_path):
    model, seen = nn.Linear(2, 1), []

    def terms(i):
        seen.append(tuple(i.tolist()))
        return {"fit": model(torch.randn(4, 2))[:, 0]}

    for stage, seed in itertools.product(("model", "prior"), (0, 1)):
        s = toy_settings(tmp_path / f"{stage}{seed}", seed=seed, prior_steps=40, prior_batch_size=4)
        toy_fit(model, terms, s, n=10_000, stage=stage)
    assert len(seen) == len(set(seen)) == 160


def test_ema_weights_are_the_moving_average(tmp_path):
    """Compare with the recursion, for weights recorded at the start of each step."""
    history, model, x = [], nn.Linear(2, 1), torch.randn(20, 2)

    def terms(i):
        history.append(model.weight.detach().clone())
        return {"fit": -model(x[i])[:, 0].square()}

    s = toy_settings(tmp_path, steps=150, ema_decay=0.93)  # reached at step 119
    ema_model = toy_fit(model, terms, s)
    expected = history[0]
    for step, weight in enumerate([*history[1:], model.weight.detach()]):
        decay = min(0.93, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert_close(ema_model.weight, expected)
    moved = torch.stack([(b - a).abs().max() for a, b in zip(history, history[1:])])
    rates = torch.tensor([1e-2 * min(1, (k + 1) / 100, (150 - k) / 500) for k in range(149)])
    assert (moved <= 1.5 * rates).all()  # Adam moves by the learning rate, which rises and falls
    assert moved[0] <= 1.01e-4 and 1e-4 < moved[90:].max() <= 4e-3


def test_the_statistics_of_batch_norm_reach_the_ema_model(tmp_path):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(20, 2) + 5
    ema_model = toy_fit(model, lambda i: {"fit": -model(x[i]).sum(1)}, toy_settings(tmp_path))
    assert not ema_model.training and model[1].num_batches_tracked == 40
    assert torch.equal(ema_model[1].running_mean, model[1].running_mean)


def test_the_gradient_is_clipped(tmp_path):
    model, x = nn.Linear(2, 3), torch.randn(20, 2)
    terms = lambda i: {"fit": -1000 * model(x[i]).square().sum(1)}
    toy_fit(model, terms, toy_settings(tmp_path, steps=1))
    moments = [state["exp_avg"] for state in saved_in(tmp_path)["optimizer"]["state"].values()]
    assert sum((10 * m).square().sum() for m in moments).item() == approx(1, rel=1e-3)  # β₁ = 0.9


def test_every_parameter_is_trained(tmp_path, quick):
    """Also one outside of encoders and decoders, with the learning rate of the VAE."""
    s = tiny(out=tmp_path, steps=1, vae_lr=0.5, diffusion_lr=0.25)
    model, _ = celeba.build(s)
    model.temperature = nn.Parameter(torch.ones(()))
    divergence = model.divergence
    model.divergence = lambda *gaussians: model.temperature * divergence(*gaussians)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = celeba.synthetic_faces(16)
    dm.train_model(s, data, model, celeba.get_batch, lambda ema_model: None)
    rates = {"temperature": 0.5, "encoders.mask.0.weight": 0.5, "decoders.mask.net.0.weight": 0.5,
             "decoders.image.net.out.2.weight": 0.25}
    for name, rate in rates.items():
        moved = (model.get_parameter(name) - before[name]).abs().max().item()
        assert moved * 500 == approx(rate, rel=0.01)  # in the last step of the cooldown


def test_a_compiled_run_trains_the_same_weights(tmp_path, monkeypatch, quick):
    """Compiled by torch's backend that needs no compiler."""
    original, compiled, weights = nn.Module.compile, [], []

    def with_eager_backend(network, **options):
        compiled.append(type(network))
        original(network, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", with_eager_backend)
    data = celeba.synthetic_faces(16)
    for choice in (False, True):
        s = tiny(out=tmp_path / str(choice), compile=choice)
        torch.manual_seed(0)
        model = dm.train_model(s, data, celeba.build(s)[0], celeba.get_batch, Mock())
        weights.append(model.state_dict())
    assert compiled == [dm.ConvEncoder, dm.ConvEncoder, dm.UNet, dm.ConvDecoder]
    assert_close(*weights)


def test_targets_are_checked_before_training(tmp_path, quick):
    s, data = tiny(out=tmp_path), celeba.synthetic_faces(16)
    data["train"]["attributes"] = data["train"]["attributes"].char() * 2 - 1  # as CelebA codes them
    with refused("targets are outside"):
        dm.train_model(s, data, celeba.build(s)[0], celeba.get_batch, None)
    assert not (tmp_path / "model.pt").exists()


def test_history_holds_the_means_since_the_row_before(tmp_path, monkeypatch):
    monkeypatch.setattr(dm, "SAVE_INTERVAL", 25)
    model, x, seen = nn.Linear(2, 1), torch.randn(20, 2), []

    def terms(i):
        seen.append(x[i, 0].mean().item())
        return {"fit": -model(x[i])[:, 0].square(), "first": x[i, 0]}

    def preview(ema_model):
        assert not ema_model.training and saved_in(tmp_path)["step"] == len(seen)

    s, evaluate = toy_settings(tmp_path, steps=50), lambda ema_model: {"test fit": len(seen)}
    toy_fit(model, terms, s, evaluate=evaluate, preview=preview)
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == [20, 25, 40, 50]
    for row, (start, end) in zip(rows, itertools.pairwise([0, 20, 25, 40, 50])):
        assert row["first"] == approx(np.mean(seen[start:end]), rel=1e-4) and row["grad_norm"] > 0
    assert [row.get("test fit") for row in rows] == [None, 25, None, 50]


def test_a_checkpoint_of_other_settings_data_or_model_is_refused(tmp_path):
    model = nn.Linear(2, 1)
    terms = lambda i: {"fit": model(torch.ones(4, 2))[:, 0]}

    def run(stage, trained_on=1, **changes):
        s = toy_settings(tmp_path, **dict(steps=2, prior_steps=2) | changes)
        toy_fit(model, terms, s, stage=stage, trained_on={"checksum": trained_on})

    for stage in ("model", "prior"):
        run(stage)
        for irrelevant in (dict(num_samples=9), dict(eta=0.5), dict(evaluator="x")):
            run(stage, **irrelevant)
        with refused(f"{stage}.pt has seed 0, not 3: move it away, or choose another"):
            run(stage, seed=3)
        with refused("has checksum 1, not 2"):
            run(stage, trained_on=2)
        with refused("has image_size 32, not 64"):  # this is why the data differ
            run(stage, trained_on=2, image_size=64)
    run("model", prior_steps=3)
    with refused("has prior_steps 2, not 3"):
        run("prior", prior_steps=3)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(print, "model.pt")  # to load a function is to import its module
    optimus = lambda: cub.load_optimus("model.pt", None, None)
    for use in (lambda: toy("."), lambda: celeba.load("."), optimus):
        with pytest.raises(Exception, match="Weights only load failed"):
            use()


def test_the_checksum_depends_on_every_example():
    data = {"a": torch.arange(24).view(12, 2), "b": torch.ones(12, dtype=torch.uint8)}
    sums = {dm.checksum(data), dm.checksum({name: x[:11] for name, x in data.items()})}
    for name, k in itertools.product(data, range(12)):
        change = (torch.arange(12) == k).view(12, *[1] * (data[name].ndim - 1))
        sums.add(dm.checksum(data | {name: data[name] + change}))
    assert len(sums) == 2 + 2 * 12
    assert dm.checksum(dict(reversed(data.items()))) == dm.checksum(data)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(dm, "SAVE_INTERVAL", 10)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, stop_at=15)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="not finite by step 20, .*'size': nan"):
        toy(tmp_path, size=math.nan)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    dm.save_atomically(tmp_path / "x.pt", {"step": 1})

    def save(state, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space left"):
        dm.save_atomically(tmp_path / "x.pt", {"step": 2})
    assert torch.load(tmp_path / "x.pt") == {"step": 1}


# ---- 10  Using a model, metrics, figures ---------------------------------------------------------

def test_generated_images_are_clamped_and_latents_are_not():
    decoders = {name: Stub(sample=lambda z: 3 * z) for name in ("image", "mask")}
    z = torch.tensor([[-2.0], [0.1], [1.0]])
    assert dm.sample(decoders, "image", z).flatten().tolist() == approx([-1, 0.3, 1])
    assert dm.sample(decoders, "mask", z).flatten().tolist() == approx([-6, 0.3, 3])


@given(seeds)
@settings(max_examples=5)
def test_frechet_distance_of_two_gaussians(seed):
    """For commuting covariances it is ‖m_a − m_b‖² + Σ (s_a − s_b)²."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.standard_normal((400, 3)))
    white = x - x.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T  # mean 0, covariance I
    basis = torch.linalg.qr(torch.tensor(rng.standard_normal((3, 3))))[0]
    s_a, s_b, m = (torch.tensor(rng.uniform(0.1, 2, 3)) for _ in range(3))
    a, b = white * s_a @ basis.T, white.flip(0) * s_b @ basis.T + m
    expected = m.square().sum() + (s_a - s_b).square().sum()
    assert dm.frechet_distance(a, b) == approx(expected.item(), rel=1e-9)
    assert dm.frechet_distance(a, a) == approx(0, abs=1e-6)


def test_sharpness_is_the_energy_of_the_gradient_after_a_median():
    edges = torch.zeros(300, 3, 8, 6)
    edges[:150, ..., 3:] = 0.8  # one of five differences in each row
    edges[150:, :, 4:] = 0.4  # one of seven differences in each column
    speckled = edges.clone()
    speckled[:, :, 1::4, 1::4] += 0.2  # single pixels
    expected = (0.64 / 5 + 0.16 / 7) / 2
    assert dm.sharpness(speckled) == approx(expected) == approx(dm.sharpness(edges))


def test_images_are_evaluated_by_hand():
    """With an evaluator whose features are the first two pixels."""
    posterior = lambda x: (x["image"].flatten(1)[:, :2], torch.full((len(x["image"]), 2), 99.0))
    real = torch.rand(300, 3, 4, 4) - 0.5
    moved = real + 0.3 * (torch.arange(48) == 0).view(3, 4, 4)  # the first pixel
    images = {"same": real, "moved": moved, "halved": 0.5 * real}
    generated = {name: {"image": image} for name, image in images.items()}
    first = lambda features, x: {"first": (features[:, 0] == x["image"][:, 0, 0, 0]).all()}
    table = dm.evaluate_images(Stub(posterior=posterior), generated, real, first)
    z = real.flatten(1)[:, :2]
    halved = 0.25 * (z.mean(0).square() + z.var(0)).sum().item()
    fd = {name: row["fd"] for name, row in table.items()}
    assert fd == approx({"same": 0, "moved": 0.09, "halved": halved}, abs=1e-4)
    assert [table[name]["sharpness"] for name in ("same", "halved")] == approx([1, 0.25])
    assert all(row["first"] for row in table.values())


def test_save_grid(tmp_path):
    images = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)])
    rows, captions = {"one": images, "two": images[:2, :1]}, {"two": ["", "two lines of text"]}
    for path, texts, lines in (("a.png", {}, 0), ("b.png", captions, 2)):
        dm.save_grid(tmp_path / path, rows, texts)
        second = np.asarray(Image.open(tmp_path / path))[66 + 14 * lines:, -198:]
        assert len(second) == 66 + 14 * lines and (second[64:, 66:130] < 128).any() == (lines > 0)
        assert (second[:64, :64] == 0).all() and (second[:64, 66:130] == 128).all()


def test_save_history(tmp_path):
    """The panel of a curve that rises to 100, with 200 on the test set, in red, from step 50."""
    history = [{"step": k, "up": float(k), "flat": 1.0} for k in range(1, 101)]
    history[0]["up"] = -1e6  # outside the panel's range, which early steps do not widen
    history[49]["test up"] = history[99]["test up"] = 200.0
    dm.save_history(tmp_path / "x.pt", history)
    assert (tmp_path / "x.csv").read_text().splitlines()[50] == "50,50.0,1.0,200.0"
    panel = np.asarray(Image.open(tmp_path / "x.png")).astype(int)[20:118]
    row, column = np.nonzero(panel.sum(-1) == 0)  # black
    assert row[column < 60].min() > 80 and 40 < row[column > 570].min() < 60
    row, column = np.nonzero((panel[..., 0] > 200) & (panel[..., 1] < 50))
    assert (column.min(), column.max()) == (295, 590) and row.max() < 15


def test_evaluate_elbo_where_the_evidence_is_known():
    """Pixels are N(0.2, ½²) whatever z is, and the encoder gives N(0, I)."""
    encoder = dm.zero_init(dm.Encoder(nn.Flatten(), nn.Linear(12, 4)))
    likelihood = lambda zeros: Normal(zeros.view(-1, 3, 2, 2) + 0.2, 0.5)
    decoder = dm.FeedForwardDecoder(dm.zero_init(nn.Linear(2, 12)), likelihood)
    test = {"image": torch.randint(0, 256, (50, 3, 2, 2), dtype=torch.uint8)}
    model = dm.DiffMVAE({"image": encoder}, {"image": decoder}, "mvae", 0.5, {"image": 7})
    log_prob = Normal(0.2, 0.5).log_prob(celeba.get_batch(test)["image"])
    expected = log_prob.sum((1, 2, 3)).mean().item()
    terms = {"ELBO": expected, "log p(image|z)": expected, "KL": 0}
    found = dm.evaluate_elbo(model, test, celeba.get_batch)
    assert found == {term: {"nats": approx(v, rel=1e-5, abs=1e-6)} for term, v in terms.items()}


# ---- 11  What both scripts share -----------------------------------------------------------------

@pytest.mark.parametrize("problem, status, message", [
    (dm.InputError("choose another"), 2, "script.py: choose another"),
    (PermissionError(13, "Permission denied", "x.csv"), 2, "script.py: .* denied: 'x.csv'"),
    (KeyboardInterrupt(), 130,
     "Stopped. The same command continues from the last checkpoint, if there is one."),
])
def test_main_ends_with_one_line(monkeypatch, capsys, problem, status, message):
    monkeypatch.setattr(sys, "argv", ["here/script.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        dm.main(Mock(side_effect=problem), celeba.Settings, "")
    assert ended.value.code == status
    assert re.fullmatch(message + "\n", capsys.readouterr().err)


def test_the_command_line_gives_settings(monkeypatch, capsys):
    flags = "--data x --small --steps 3 --eta 0 --channel-mult 1 3 --attention-resolutions"
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    expected = dict(steps=3, eta=0.0, channel_mult=[1, 3], attention_resolutions=[])
    assert celeba.Settings.parse("") == celeba.Settings(data="x", small=True, **expected)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        cub.Settings.parse("what it does")
    said = " ".join(capsys.readouterr().out.split())
    assert "what it does" in said and "(synthetic 5000, real 94000, --small 20000)" in said
    assert "random seed (default 0)" in said


@pytest.mark.parametrize("name, value, message", [
    ("beta", -1.0, "out of range"), ("log_prob_weight", -1.0, "out of range"),
    ("vae_lr", 0.0, "out of range"), ("diffusion_lr", math.nan, "out of range"),
    ("ema_decay", 1.0, "out of range"), ("num_samples", 1, "out of range"),
    ("eta", 1.5, "out of range"), ("weighting", "velo", "choose from .'likelihood', '"),
    ("prior_net", "cnn", "choose from .'mlp', 'unet'"), ("text", "big", "choose from .'small'"),
    ("decoder", "unet", "choose from .'diffusion', 'feedforward', 'none'"),
    ("small", True, "--small needs --data"),
])
def test_nonsense_is_refused(name, value, message):
    with refused(message):
        cub.Settings(**{name: value})


@pytest.mark.parametrize("latent_dim", [37, 49])
def test_the_unet_of_the_prior_needs_a_square_of_an_even_number(latent_dim):
    with refused("the square of an even number"):
        celeba.build(tiny(latent_dim=latent_dim, prior_net="unet"))


def test_the_bound_has_no_eta():
    with refused("--weighting likelihood does not sample by DDIM: leave out --eta"):
        celeba.Settings(weighting="likelihood", eta=0.5)
    for options, eta in ((dict(weighting="likelihood"), 1.0), ({}, 1.0), (dict(eta=0.25), 0.25)):
        model, prior = celeba.build(tiny(**options))
        ddim = [prior.sampler] + [model.decoders["image"].sampler] * ("weighting" not in options)
        assert [(s.func, s.keywords["eta"]) for s in ddim] == [(dm.ddim, eta)] * len(ddim)


def test_paths_and_numpy_numbers_are_settings(tmp_path, quick):
    s = tiny(out=tmp_path, steps=np.int64(3), ema_decay=np.float32(0.5),
             channel_mult=(np.int64(1), 2))
    types = [type(value) for value in (s.out, s.steps, s.ema_decay, *s.channel_mult)]
    assert types == [str, int, float, int, int]
    celeba.run(s)
    assert celeba.Settings(**results_in(tmp_path)["settings"]) == s
    assert celeba.Settings(**saved_in(tmp_path)["settings"]) == s


def test_defaults():
    def found(**options):
        s = celeba.Settings(**options)
        return s.beta, s.log_prob_weight, s.sampling_steps, s.objective, s.is_bound

    surrogate, bound = (0.01, 10, 50, "surrogate", False), (1, 1, 100, "ELBO", True)
    assert found() == found(weighting="simple") == surrogate
    assert found(weighting="likelihood") == bound
    assert found(weighting="likelihood", beta=2.0) == (2, 1, 100, "surrogate", True)
    assert found(decoder="feedforward", log_prob_weight=3) == (1, 3, 50, "surrogate", True)
    assert found(weighting="likelihood", family="mvtcae") == (1, 1, 100, "surrogate", False)
    assert found(decoder="none") == (0, 10, 50, "surrogate", False)
    assert found(decoder="none", beta=0.5)[0] == 0.5 and cub.Settings().log_prob_weight == 5
    real, small = celeba.Settings(data="x"), celeba.Settings(data="x", small=True, mirror=False)
    presets = lambda s: (s.image_size, s.weighting, s.compile, s.mirror)
    assert presets(real) == (128, "simple", True, False)
    assert presets(small) == (64, "v_mse", False, False)
    ten, mvtcae = {"attributes": 10}, approx({"image": 0.7, "mask": 0.7, "attributes": 7.0})
    for options, beta, weights in (({}, 0.01, ten), (dict(decoder="none", family="mvae"), 0, ten),
                                   (dict(family="mvtcae"), 0.01, mvtcae)):
        model, _ = celeba.build(tiny(**options))
        assert (model.beta, model.log_prob_weights) == (beta, weights)


def test_the_unet_attends_where_it_is_told():
    for resolutions, expected in (([], []), ([16], [32] * 5), ([8], [64] * 5)):  # 2 down, 3 up
        model, _ = celeba.build(celeba.Settings(attention_resolutions=resolutions))
        unet = model.decoders["image"].net
        attending = [block for block in [*unet.down, *unet.up]
                     if isinstance(getattr(block, "attention", None), dm.Attention)]
        assert [block.conv1.out_channels for block in attending] == expected


def test_random_flip_mirrors_an_image_and_its_mask_together():
    image = torch.arange(1000 * 3 * 2 * 4).view(1000, 3, 2, 4)
    x = {"image": image, "mask": -image[:, :1], "caption": torch.randint(9, (1000, 2, 6))}
    out = dm.random_flip(x)
    flipped = (out["image"][:, 0, 0, 0] == image[:, 0, 0, 3]).view(-1, 1, 1, 1)
    assert 400 < flipped.sum() < 600 and out["caption"] is x["caption"]
    for name in ("image", "mask"):
        assert torch.equal(out[name], torch.where(flipped, x[name].flip(-1), x[name]))


def test_training_batches_are_mirrored_and_the_test_objective_is_not(tmp_path, monkeypatch, quick):
    flipped, data, previews = [], celeba.synthetic_faces(16), []
    monkeypatch.setattr(dm, "random_flip", lambda x: flipped.append(len(x["image"])) or x)
    for mirror, batches in ((False, []), (True, [4, 4, 4])):
        s = tiny(out=tmp_path / str(mirror), mirror=mirror)
        model = dm.train_model(s, data, celeba.build(s)[0], celeba.get_batch, previews.append)
        assert flipped == batches and previews.pop() is model
    torch.manual_seed(s.seed)
    batch = lambda k: celeba.get_batch(data["test"], slice(4 * k, 4 * k + 4))
    with torch.no_grad():
        total = np.mean([model.elbo(batch(k)).total.mean().item() for k in range(3)])
    assert read_history(s.out)[0]["test surrogate"] == approx(total, rel=1e-5)


@pytest.mark.parametrize("wrong", [
    dict(decoder="diffusion"), dict(image_size=32), dict(data="x"), dict(data="."),
])
def test_only_a_supervised_run_on_the_same_data_and_size_evaluates(tmp_path, wrong):
    def saved(**options):
        settings = asdict(tiny(**{"decoder": "none"} | options))
        dm.save_atomically(tmp_path / "model.pt", {"settings": settings})

    s = tiny(evaluator=tmp_path)
    saved()
    assert dm.load_evaluator(s, lambda out, device: out) == str(tmp_path)
    saved(**wrong)
    with refused("is not a --decoder none run of this data and image_size"):
        dm.load_evaluator(s, None)


def test_a_loaded_run_is_finished_and_samples_as_before(tmp_path, quick):
    celeba.run(tiny(out=tmp_path, sampling_steps=3, eta=0.5))
    before = torch.get_rng_state()
    model, prior = celeba.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    image = model.decoders["image"]
    assert image.num_steps == 3 and image.sampler.keywords == {"eta": 0.5}
    for part, stage in ((model, "model"), (prior, "prior")):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        ema = saved_in(tmp_path, stage)["ema"]
        assert all(torch.equal(value, ema[k]) for k, value in part.state_dict().items())
    torch.save({**saved_in(tmp_path, "prior"), "finished": False}, tmp_path / "prior.pt")
    with refused("is not finished: repeat its command"):
        celeba.load(tmp_path)
    torch.save({**saved_in(tmp_path), "finished": False}, tmp_path / "model.pt")
    (tmp_path / "prior.pt").unlink()  # stopped before there was one
    with refused("is not finished: repeat its command"):
        celeba.load(tmp_path)


def test_a_prior_of_another_model_is_refused(tmp_path, quick):
    """Whether model.pt was trained again, or another run wrote into the same folder."""
    s = tiny(out=tmp_path)
    celeba.run(s)
    state = saved_in(tmp_path)
    name, value = next(iter(state["ema"].items()))
    torch.save({**state, "ema": {**state["ema"], name: value + 1e-6}}, tmp_path / "model.pt")
    with refused("prior.pt is of another model"):
        celeba.load(tmp_path)
    with refused("prior.pt has model_checksum '.{8}', not '.{8}'"):
        celeba.run(s)  # the model is finished, and not the one of this prior


def test_tables_are_saved_and_printed(tmp_path, capsys):
    tables = {"images": {"mask + attributes": {"fd": 1.25}, "é": {"fd": 2, "coherence_mask": 0.5}}}
    dm.save_results(tiny(out=tmp_path), tables)
    assert results_in(tmp_path)["tables"] == tables
    lines = ["", "| images | FD ↓ | coherence mask |", "|---|---|---|",
             "| mask + attributes | 1.250 |  |", "| é | 2.000 | 0.500 |", "",
             f"All tables and figures are in {tmp_path}."]
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(ValueError, match="not JSON compliant"):
        dm.save_results(tiny(out=tmp_path), {"f1": {"image": {"mask": math.nan}}})


def test_images_are_decoded_once(tmp_path, capsys):
    decoded = []
    read = lambda k: decoded.append(k) or np.full(2, k)
    for names in ([3, 5], [3, 5], [3, 6]):
        arrays = dm.decode_cached(tmp_path / "cache.pt", read, names)
        assert arrays.tolist() == [[k, k] for k in names]
    assert sorted(decoded) == [3, 3, 5, 6]
    assert dm.decode_cached(tmp_path / "cache.pt" / "x.pt", read, [3]).tolist() == [[3, 3]]
    assert "Warning: the decoded images could not be cached" in capsys.readouterr().out


def test_text_files_of_other_systems_are_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\u2028\u0085\x0b\x0c\x1c lines\n".encode() + b"\xe9\n")
    assert dm.read_lines(path) == ["one", "two\u2028\u0085\x0b\x0c\x1c lines", "\ufffd"]


def test_images_are_opened_as_they_are_meant(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(dm.open_image(tmp_path / "turned.png", "RGB"))
    assert (turned == np.rot90(pixels, -1)).all()
    image.convert("P").save(tmp_path / "palette.gif")
    assert dm.open_image(tmp_path / "palette.gif", "L").mode == "L"
    Image.fromarray(np.full((2, 2), 3000, np.uint16)).save(tmp_path / "deep.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    for name, mode in (("deep", "I;16"), ("alpha", "RGBA")):
        with refused(f"{name}.png cannot be read as an 8-bit image: mode {mode} has"):
            dm.open_image(tmp_path / f"{name}.png", "L")
    image.resize((64, 64)).save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", 500)
    with refused("cut.jpg cannot be read as an 8-bit image"):
        dm.open_image(tmp_path / "cut.jpg", "RGB")


# ---- CelebA: synthetic faces and the released layout ---------------------------------------------

def face(size=64, seed=0, **changes):
    a = dict.fromkeys(celeba.ATTRIBUTES, False) | changes
    layers = celeba.render_face(a, np.random.default_rng(seed), size)
    return layers[..., :3], layers[..., 3] == 1


@pytest.mark.parametrize("name", celeba.ATTRIBUTES)
@pytest.mark.parametrize("size", [32, 64])
def test_every_attribute_is_visible(name, size):
    bald = {"Male": True} if name == "Bald" else {}
    change = np.abs(face(size, **bald)[0].astype(int) - face(size, **bald, **{name: True})[0])
    assert (change.max(-1) > 24).sum() >= 3


@given(seeds)
@settings(max_examples=20)
def test_the_mask_is_everything_but_skin_and_background(seed):
    """Another skin leaves the mask as it is; only skin and background colors are outside of it."""
    rng = np.random.default_rng(seed)
    a = celeba.sample_attributes(rng) | {"Heavy_Makeup": False, "Mustache": False}
    image, mask = face(128, seed, **a)
    outside = np.unique(image[~mask], axis=0)
    assert len(outside) <= 2 and mask.any()
    pale, pale_mask = face(128, seed, **a | {"Pale_Skin": not a["Pale_Skin"]})
    assert (mask == pale_mask).all() and (image != pale).any()


ANNO, MAPPING = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"
MASKS = "CelebAMask-HQ-mask-anno/0/00003_{}.png"


@pytest.fixture
def released(tmp_path):
    """Five faces in the released layout, with images of 64 px and masks of 32 px: two for training,
    one of CelebA's validation split, two for testing."""
    folder = tmp_path / "CelebAMask-HQ"
    names = [f"Other_{i}" for i in range(22)] + celeba.ATTRIBUTES[::-1]
    lines, mapping = ["5", " ".join(names)], ["idx orig_idx orig_file"]
    boxes = dict(hair=(0, 0, 32, 8), l_eye=(4, 4, 8, 16), skin=(0, 0, 32, 32))
    for k, origin in {3: 162_769, 2001: 162_770, 2: 182_637, 1: 0, 4: 202_598}.items():
        parts = folder / "CelebAMask-HQ-mask-anno" / str(k // 2000)
        for path in (parts, folder / "CelebA-HQ-img"):
            path.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (64, 64), (10 * (k % 10), 100, 200))
        image.save(folder / f"CelebA-HQ-img/{k}.jpg", quality=100)
        for part, box in boxes.items():
            layer = Image.new("L", (32, 32))
            layer.paste(255, box)
            layer.save(parts / f"{k:05d}_{part}.png")
        values = ["1" if name in ("Smiling", "Other_3") or k in (2, 4) else "-1" for name in names]
        lines.append(f"{k}.jpg " + " ".join(values))
        mapping.append(f"{k} {origin} {origin + 1:06d}.jpg")
    for name, rows in ((ANNO, lines), (MAPPING, mapping)):
        (folder / name).write_text("\n".join(rows) + "\n")
    return folder


def test_the_released_faces_are_read(released):
    data = celeba.read_faces(released, 16)
    assert {split: len(part["image"]) for split, part in data.items()} == dict(train=2, test=2)
    train = {name: x[0] for name, x in data["train"].items()}
    assert (train["image"].float().mean((1, 2)) - torch.tensor([30.0, 100, 200])).abs().max() < 3
    expected = torch.zeros(16, 16)
    expected[:4] = 1  # hair
    expected[2:8, 2:4] = 1  # an eye; the skin is left out
    assert torch.equal(train["mask"][0].float(), expected)
    assert [a for a, on in zip(celeba.ATTRIBUTES, train["attributes"]) if on] == ["Smiling"]
    assert data["test"]["attributes"].all()
    for path in released.rglob("*.jpg"):
        path.unlink()  # the second time the images come from the cache
    again = celeba.read_faces(released, 16)
    assert torch.equal(again["train"]["image"], data["train"]["image"])


def test_faces_that_would_be_silently_wrong_are_refused(released):
    annotations, hair = released / ANNO, released / MASKS.format("hair")
    text = annotations.read_text()
    annotations.write_text(text.replace("Smiling", "Smirking"))
    with refused("lacks Smiling: use the file as released"):
        celeba.read_faces(released, 16)
    annotations.write_text(text)
    Image.new("L", (32, 32), 1).save(hair)  # a mask of 0 and 1
    with refused(r"00003_\*.png are missing or are not masks of 0 and 255"):
        celeba.read_faces(released, 16)
    for part in ("hair", "l_eye"):
        (released / MASKS.format(part)).unlink()
    with refused(r"00003_\*.png are missing or are not masks of 0 and 255"):
        celeba.read_faces(released, 16)


def test_f1_by_hand():
    actual = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    predicted = torch.tensor([[0.9, 0.2, 0.6, 0.5], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert celeba.f1_score(predicted, actual) == approx((0.5 + 0 + 1 + 0) / 4)


def test_table3_never_sees_its_target():
    seen = []

    def posterior(x):
        seen.append(set(x))
        return torch.zeros(2, len(x["image"]), 2)

    x = {"image": torch.zeros(3, 3, 2, 2), "mask": torch.ones(3, 1, 2, 2)}
    x = {k: v.byte() for k, v in (x | {"attributes": torch.eye(3, 4)}).items()}
    decoders = {"attributes": Stub(sample=lambda z: torch.ones(len(z), 4)),
                "mask": Stub(sample=lambda z: torch.zeros(len(z), 1, 2, 2))}
    scores = celeba.table3(Stub(encoders=x, decoders=decoders, posterior=posterior), x, x)
    assert seen == [{"image", "mask"}, {"image"}, {"image", "attributes"}, {"image"}]
    for label in ("image + other modality", "image"):
        assert scores[label] == {"attributes": approx(2 / 5), "mask": 0}
    assert scores["constant baseline"] == {"attributes": approx(1 / 2), "mask": 1}
    supervised = Stub(encoders=["image"], decoders=decoders, posterior=posterior)
    scores = celeba.table3(supervised, x | {"mask": 1 - x["mask"]}, x)  # another training set
    assert scores["image + other modality"] == {} and scores["constant baseline"]["mask"] == 0


shifted = lambda by: Stub(sample=lambda z: z[:, :1, None, None] + by)  # a decoder


def summed(x):
    """A posterior without variance: z is the sum of the observed modalities."""
    mu = sum(v.flatten(1)[:, :1].float() for v in x.values())
    return mu, torch.full_like(mu, -torch.inf)


def test_faces_are_generated_from_their_conditions_and_compared_with_their_targets(tmp_path):
    shift = {"image": 0, "mask": 0.1, "attributes": 0.2}  # tells the decoders' outputs apart
    scale = {"image": 1e-4, "mask + attributes": 1.1e-2, "mask": 1e-3, "attributes": 1e-2}
    x = {k: scale[k] * torch.tensor([1.0, 2, 3])[:, None, None, None] for k in shift}
    model = Stub(posterior=summed, decoders={k: shifted(by) for k, by in shift.items()}, encoders=x)
    prior = Stub(sample=lambda n: 0.5 + 0.1 * torch.arange(n)[:, None])
    training = {k: 2 * v for k, v in x.items()}
    generated = celeba.generate(tmp_path / "grid.png", model, x, prior, training)
    assert list(generated) == [*scale, "aggregate posterior", "latent prior", "N(0, I)"]
    assert Image.open(tmp_path / "grid.png").size[1] == 9 * 66
    assert list(celeba.generate(tmp_path / "grid.png", model, x)) == list(scale)
    for label in scale:
        targets = dict(generated[label])
        assert_close(targets.pop("image"), scale[label] / scale["image"] * x["image"])
        expected = {"mask", "attributes"} if label == "image" else set(label.split(" + "))
        assert set(targets) == expected and all(targets[name] is x[name] for name in expected)
    for label, z in (("latent prior", prior.sample(3)), ("aggregate posterior", 222 * x["image"])):
        for name, value in generated[label].items():
            assert_close(value.flatten(), z.flatten() + shift[name])


def test_coherence_of_faces_by_hand():
    """With an evaluator that sees a mask if the first pixel is above 0.3, and never attributes."""
    posterior = lambda x: (x["image"].flatten(1)[:, :2], torch.zeros(300, 2))
    decoders = {"mask": shifted(0.2), "attributes": shifted(-1e9)}
    evaluator, real = Stub(posterior=posterior, decoders=decoders), torch.rand(300, 3, 4, 4) - 0.5
    mask = (real[:, :1, :1, :1] + 0.2 > 0.5).float()
    generated = {"same": {"image": real, "mask": mask, "attributes": mask}, "one": {"image": -real}}
    table = celeba.evaluate(evaluator, generated, real)
    assert table["same"]["coherence_mask"] == approx(mask.mean().item())  # 0 where both are empty
    assert table["same"]["coherence_attributes"] == 0
    assert table["one"].keys() == {"fd", "sharpness"}


# ---- CUB: the text VAE ---------------------------------------------------------------------------

def tiny_bert(**sizes):
    small = dict(vocab_size=12, pad_token_id=0, hidden_size=8, intermediate_size=8)
    layers = dict(num_attention_heads=2, num_hidden_layers=2)
    return hf.BertModel(hf.BertConfig(**small | layers | sizes))


def tiny_gpt2(vocabulary=12, seed=0):
    torch.manual_seed(seed)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **special))
    decoder = cub.TextDecoder(gpt2, 6, 9, True).eval()
    nudge(decoder, 0.3)  # biases too, so that nothing is hidden by a zero
    return decoder


CAPTIONS = torch.tensor([[1, 5, 7, 3, 2, 0, 0], [1, 4, 4, 9, 11, 6, 2]])
PAIR = torch.stack([CAPTIONS.flip(0), CAPTIONS], 1)  # (2, 2, 7): BERT's tokens, GPT-2's


def logits_by_hand(decoder, tokens, z):
    """Compute GPT-2 for one caption by hand: (T,) tokens and (D,) z -> (T, V)."""
    g, c = decoder.gpt2.transformer, decoder.gpt2.config
    t, d = len(tokens), c.n_embd // c.n_head
    x = g.wte.weight[tokens] + z @ decoder.embedding.weight.T + g.wpe.weight[1 : t + 1]
    memories = (z @ decoder.memory.weight.T).view(c.n_layer, c.n_embd)
    for layer, memory in zip(g.h, memories):
        q, k, v = layer.attn.c_attn(layer.ln_1(x)).split(c.n_embd, dim=1)
        k, v = torch.cat([memory[None], k]), torch.cat([memory[None], v])  # (1 + T, n_embd)
        out = []
        for h in range(c.n_head):
            at = slice(h * d, (h + 1) * d)
            score = q[:, at] @ k[:, at].T / d**0.5
            allowed = torch.ones(t, t + 1, dtype=torch.bool).tril(1)
            out.append(score.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, at])
        x = x + layer.attn.c_proj(torch.cat(out, 1))
        x = x + layer.mlp(layer.ln_2(x))
    return g.ln_f(x) @ g.wte.weight.T


@given(seeds)
@settings(max_examples=5)
def test_caption_likelihood_by_hand(seed):
    decoder = tiny_gpt2(seed=seed)
    z = torch.randn(2, 6)
    for tokens, z_, found in zip(CAPTIONS, z, decoder.log_prob(PAIR, z)):
        tokens = tokens[tokens != 0]
        log_p = logits_by_hand(decoder, tokens[:-1], z_).log_softmax(-1)
        expected = log_p[range(len(tokens) - 1), tokens[1:]].sum()
        assert found.item() == approx(expected.item(), abs=1e-4)


def test_padding_never_counts():
    decoder, z = tiny_gpt2(), torch.randn(2, 6)
    padded = nn.functional.pad(PAIR, (0, 2))
    assert_close(decoder.log_prob(padded, z), decoder.log_prob(PAIR, z))
    encoder = cub.TextEncoder(tiny_bert(), 6).eval()
    nudge(encoder, 0.3)  # otherwise its attention is too even to notice padding
    for one, other in zip(encoder(padded), encoder(PAIR)):
        assert one.shape == (2, 6)
        assert_close(one, other, atol=1e-5, rtol=1e-4)
    theirs = torch.stack([PAIR[:, 0], PAIR[:, 0]], 1)  # BERT does not read GPT-2's tokens
    assert torch.equal(encoder(theirs)[0], encoder(PAIR)[0])


def test_greedy_sampling_equals_recomputation():
    decoder, z = tiny_gpt2(seed=3), torch.randn(20, 6)
    sampled = decoder.sample(z)
    assert sampled.shape == (20, 8)
    tokens, ended = torch.ones(20, 1, dtype=torch.long), torch.zeros(20, dtype=torch.bool)
    for _ in range(8):
        best = decoder.logits(tokens, z)[:, -1].argmax(-1).masked_fill(ended, 0)
        tokens, ended = torch.cat([tokens, best[:, None]], 1), ended | (best == 2)
    assert torch.equal(sampled, tokens[:, 1:])
    assert ended.any() and len(sampled.unique(dim=0)) > 1  # some end early, and z decides


def test_captions_survive_tokenization():
    captions = ["this bird has a red cap , and white wings", "A bird, small & gris-bleu"] * 2
    tokenizers, _ = cub.text_parts(cub.Settings(), captions)
    tokens, words = cub.tokenize(tokenizers, captions[:2], 12), tokenizers[1]
    assert tokens.shape == (2, 2, 12)
    assert torch.equal(tokens[:, 0], tokens[:, 1])  # one tokenizer, twice
    first = tokens[0, 0]
    assert first[0] == words.bos_token_id and (first == words.eos_token_id).sum() == 1
    texts = [captions[0], "a bird , small & gris - bleu"]
    assert cub.detokenize(tokenizers, tokens[:, 1]) == texts
    unknown = cub.tokenize(tokenizers, ["a zebra has white wings"], 12)
    again = cub.detokenize(tokenizers, unknown[:, 1])
    assert again == ["a <UNK> has white wings"]
    assert torch.equal(cub.tokenize(tokenizers, again, 12), unknown)
    with refused("no word occurs twice in the captions"):
        cub.text_parts(cub.Settings(), ["one", "another"])


TWO_BIRDS = ["a red bird", "a blue bird"] * 2  # each word at least twice, as a vocabulary needs


def pretrained_like(special):
    """Return a tokenizer of single characters, with these special tokens."""
    vocabulary = {word: k for k, word in enumerate([*special.values(), *map(chr, range(32, 127))])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    base.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return hf.PreTrainedTokenizerFast(tokenizer_object=base, **special)


def test_captions_end_and_text_like_a_special_token_is_text():
    captions = ["a <EOS> b <PAD> [SEP] c [PAD] d <BOS> e", "a bird " * 9, ""] * 2
    bert = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    gpt2 = dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>")
    tokenizers = [pretrained_like(bert), pretrained_like(gpt2)]
    for pair in (tokenizers, cub.text_parts(cub.Settings(), captions)[0]):
        for length in (80, 6):
            tokens = cub.tokenize(pair, captions, length)  # (6, 2, length)
            for rows, words in zip(tokens.unbind(1), pair):
                end = words.sep_token_id if words.eos_token_id is None else words.eos_token_id
                assert ((rows == end).sum(1) == 1).all()
                after = (rows == end).cumsum(1) - (rows == end).int() > 0
                assert torch.equal(rows == words.pad_token_id, after)
    texts = cub.detokenize(tokenizers, cub.tokenize(tokenizers, captions, 80)[:, 1])
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in captions]


def test_optimus_weights_are_found_by_their_names(tmp_path):
    encoder, other = (cub.TextEncoder(tiny_bert(), 6) for _ in range(2))
    decoder, another, path = tiny_gpt2(seed=1), tiny_gpt2(seed=2), tmp_path / "optimus.pt"
    theirs = {"bert.": "encoder.", "linear.": "encoder.linear.", "gpt2.": "decoder.",
              "memory.": "decoder.transformer.linear.",
              "embedding.": "decoder.transformer.linear_emb."}
    rename = lambda k: "module." + re.sub(r"^\w+\.", lambda ours: theirs[ours[0]], k)
    state = {rename(k): v for part in (encoder, decoder) for k, v in part.state_dict().items()}
    surplus = {"module.decoder.transformer.h.0.attn.bias": torch.ones(1)}
    extra = {"beta": 0.5, "args": argparse.Namespace(device=torch.device("cpu"), latent_size=6)}
    torch.save({"model_state_dict": state | surplus, **extra}, path)  # as in its training.bin
    cub.load_optimus(path, other, another)
    for a, b in ((encoder, other), (decoder, another)):
        for one, two in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(one, two)
    torch.save({k: v for k, v in state.items() if "linear" not in k}, path)
    with refused("lacks 3 Optimus weights, such as 0.linear.weight"):
        cub.load_optimus(path, other, another)


@pytest.fixture
def local(tmp_path):
    """Return settings for BERT and GPT-2 saved in folders, as for a user without the hub."""
    (words, _), _ = cub.text_parts(cub.Settings(), TWO_BIRDS)
    gpt2 = hf.GPT2Config(vocab_size=len(words) - 3, n_embd=2, n_head=2, n_layer=1)  # grows
    bert = tiny_bert(vocab_size=len(words), num_hidden_layers=1)
    folders = dict(bert=tmp_path / "bert", gpt2=tmp_path / "gpt2")
    for network, folder in zip((bert, hf.GPT2LMHeadModel(gpt2)), folders.values()):
        network.save_pretrained(folder)
        words.save_pretrained(folder)
    return dict(text="pretrained", max_length=8, out=tmp_path / "run", **folders)


def test_pretrained_text_starts_from_its_weights(local):
    s = tiny(cub.Settings, **local)
    _, configs = cub.text_parts(s, TWO_BIRDS)
    torch.manual_seed(0)
    cub.build(s, configs)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model, _ = cub.build(s, configs, init=True)
    assert torch.equal(torch.get_rng_state(), after)  # so the prior starts the same
    encoder, decoder = model.encoders["caption"], model.decoders["caption"]
    theirs = hf.BertModel.from_pretrained(s.bert), hf.GPT2LMHeadModel.from_pretrained(s.gpt2)
    for ours, network in zip((encoder.bert, decoder.gpt2), theirs):
        found, wanted = ours.state_dict(), network.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name][: len(value)], value) for name, value in wanted.items())
    assert not decoder.every_subset


def test_pretrained_models_that_lack_words_or_weights_are_refused(local, monkeypatch):
    s = tiny(cub.Settings, **local)
    tokenizers, configs = cub.text_parts(s, TWO_BIRDS)
    s.bert = s.gpt2  # GPT-2's weights would leave BERT random
    with refused("gpt2 lacks weights, which would stay random"):
        cub.build(s, configs, init=True)
    empty = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()))
    monkeypatch.setattr(hf, "AutoTokenizer", Stub(from_pretrained=lambda name: empty))
    with refused("has no vocabulary"):
        cub.text_parts(s, TWO_BIRDS)


def test_a_pretrained_run_needs_only_its_own_folder(local, quick):
    """Both to be loaded and to be resumed."""
    s = tiny(cub.Settings, **local, num_samples=2)
    cub.run(s)
    sheet = Path(s.out, "samples.png").read_bytes()
    for folder in (s.bert, s.gpt2):
        shutil.rmtree(folder)
    model, _, tokenizers = cub.load(s.out)
    caption = cub.tokenize(tokenizers, ["a red bird"], 8)
    assert model.encoders["caption"](caption)[0].isfinite().all()
    Path(s.out, "prior.pt").unlink()
    cub.run(s)
    assert Path(s.out, "samples.png").read_bytes() == sheet


def test_clip_score(tmp_path):
    (words, _), _ = cub.text_parts(cub.Settings(), TWO_BIRDS)
    part = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(words), eos_token_id=words.eos_token_id, **part)
    vision = dict(image_size=16, patch_size=8, **part)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    clip = hf.CLIPModel(config).eval()
    images, captions = torch.rand(6, 3, 16, 16) * 2 - 1, ["a red bird", "a blue bird", "bird"] * 2
    table = cub.table2(clip, words, {"real": {"image": images, "caption": captions}}, "cpu")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = words(captions, padding=True, return_tensors="pt")
    out = clip(tokens["input_ids"], (images / 2 + 0.5 - mean) / std, tokens["attention_mask"])
    cosine = (out.image_embeds * out.text_embeds).sum(1)  # both have length 1
    assert table["real"]["clip_score"] == approx(100 * cosine.mean().item(), abs=1e-3)


# ---- CUB: synthetic birds and the released layout ------------------------------------------------

@given(seeds)
def test_synthetic_birds_show_what_their_captions_say(seed):
    rng = np.random.default_rng(seed)
    f = {k: str(rng.choice(list(v))) for k, v in cub.FACTORS.items()}
    image, caption = cub.render_bird(f, rng, 32), cub.write_caption(f, rng)
    said = cub.parse_caption(caption)
    assert said.items() <= f.items() and len(said) >= 4
    assert ("shape" in said) == ("bill" in said)
    assert ("size" in said) == (f["size"] in caption.split())
    (seen,) = cub.read_colors(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert seen == {part: f[part] for part in cub.SPOT}


def test_birds_are_generated_from_their_conditions(monkeypatch):
    monkeypatch.setattr(cub, "detokenize", lambda _, tokens: tokens.flatten().tolist())
    monkeypatch.setattr(dm, "save_grid", lambda *args, **options: None)
    image, caption = torch.tensor([[0.1, 0.2, 0.3, 0.5], [10, 20, 30, 50]])
    x = {"image": image[:, None], "caption": caption.view(4, 1, 1).expand(4, 2, 1)}
    both = {"image": Stub(sample=lambda z: z / 100),
            "caption": Stub(sample=lambda z: z, log_prob=lambda x, z: z[:, 0] * x[:, 0, 0])}
    model = Stub(posterior=summed, encoders=both, decoders=both)
    pairs = cub.generate("pairs.png", model, None, x, list("abcd"), 2)
    assert {label: [*pair["image"].flatten().tolist(), *pair["caption"]]
            for label, pair in pairs.items()} == {
        "real": [*image.tolist(), *"abcd"],  # the captions themselves, not their tokens
        "caption from image": [*image.tolist(), *image.tolist()],
        "image from caption": [approx(0.1), approx(0.2), *"ab"],
    }
    z = {"caption": caption, "image": image, "another bird's image": image[[2, 3, 0, 1]]}
    nats = {label: {"nats": approx((caption * row).mean().item())} for label, row in z.items()}
    assert cub.caption_log_prob(model, x) == nats


def test_coherence_of_birds_by_hand():
    red, blue = (torch.tensor(cub.COLORS[c]).view(3, 1, 1) / 127.5 - 1 for c in ("red", "blue"))
    images = torch.stack([red.expand(3, 32, 32), blue.expand(3, 32, 32)])
    captions = [f"this bird has a red cap and a {rest}" for rest in ("red throat", "blue wing")]
    factors = [{"crown": "red", "body": "blue"}, {"crown": "red", "wing": "red"}]
    pairs = {"caption from image": {"image": images, "caption": captions},
             "other": {"image": images, "caption": ["zzz"] * 2}}
    expected = {"color_accuracy": 3 / 4, "caption_accuracy": 2 / 4}
    assert cub.coherence(pairs, factors) == {"caption from image": expected,
                                             "other": {"color_accuracy": 0}}


@pytest.fixture
def released_birds(tmp_path):
    """Six birds in CUB's layout; one image is grayscale, captions are not ASCII or too few."""
    root, texts = tmp_path / "cub" / "CUB_200_2011", tmp_path / "cub" / "text"
    names = [f"{kind}/{name}.jpg" for kind in ("1.A", "2.B") for name in ("one", "two", "three")]
    for folder in ("1.A", "2.B"):
        (root / "images" / folder).mkdir(parents=True)
        (texts / folder).mkdir(parents=True)
    for k, name in enumerate(names):
        gray = Image.new("L", (60, 40), 100)
        (gray if k == 1 else Image.new("RGB", (40, 50), (200, 40, 40))).save(root / "images" / name)
        space = "\ufffd\ufffd" if k == 0 else " "  # as in a few files of Reed et al.
        lines = [f"caption {j} of a café{space}bird {k}" for j in range(3 if k == 2 else 10)]
        (texts / name).with_suffix(".txt").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "images.txt").write_text("".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n5 0\n6 0\n")
    return tmp_path / "cub"


def test_the_released_birds_are_read(released_birds):
    for _ in range(2):  # decoded, then from the cache
        birds = cub.read_birds(released_birds, 16)
        (images, captions, _), (others, texts, _) = birds["train"], birds["test"]
        assert images.shape == (2, 3, 16, 16) and others.shape == (4, 3, 16, 16)
        assert images.dtype == torch.uint8 and [len(ten) for ten in captions] == [10, 10]
        assert (images[0, 0].float() - 200).abs().max() < 6
        assert [ten[0][-1] for ten in texts] == [*"4135"]  # the species are mixed
        assert (others[1].float() - 100).abs().max() < 4
        assert captions[0][3] == "caption 3 of a café bird 0"
        assert captions[1][3] == "caption 0 of a café bird 2"
    path = released_birds / "text/1.A/one.txt"
    for damage in (lambda: path.write_text("\n \n\ufffd\n"), path.unlink):
        damage()
        with refused("one.txt is missing or has no caption"):  # all later captions would shift
            cub.read_birds(released_birds, 16)


def test_one_of_ten_captions_is_chosen_at_random():
    tokens = torch.arange(2 * 10 * 2 * 3, dtype=torch.int32).view(2, 10, 2, 3)
    data = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "caption": tokens}
    chosen = torch.stack([cub.get_batch(data)["caption"] for _ in range(300)])  # (300, 2, 2, 3)
    for k in range(2):
        seen, counts = chosen[:, k].unique(dim=0, return_counts=True)
        assert torch.equal(seen, tokens[k].long()) and counts.min() > 10


# ---- Baselines of another architecture (.github/baselines.md) ------------------------------------

def page_blocks():
    """Return [(tag, code)] of the page's Python blocks, for small images and few steps."""
    page = (ROOT / ".github/baselines.md").read_text("utf-8")
    page = page.replace("size, seed = 32, 0", "size, seed = 16, 0")
    page = re.sub(r"\bsteps=\d+", "steps=2", page).replace("steps=250", "steps=25")
    return re.findall(r"```python (\w+)\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def example(quick):
    """Return a function that runs the definitions of an example: example(tag) -> {name: object}."""
    def definitions(tag):
        namespace = {}
        for wanted in ("shared", tag):
            exec(next(code for name, code in page_blocks() if name == wanted), namespace)
        return namespace

    return definitions


def covariance(size):
    """Return a covariance matrix with unit variances and various correlations."""
    factor = torch.randn(size, size + 1, dtype=torch.float64)
    C = factor @ factor.T
    return C / C.diagonal().sqrt().outer(C.diagonal().sqrt())


def conditional(C, given):
    """Return K, S with z_hidden = K z_given + N(0, S) for z ~ N(0, C); given: (D,) bool."""
    K = C[~given][:, given] @ torch.linalg.inv(C[given][:, given])
    return K, C[~given][:, ~given] - K @ C[given][:, ~given]


def exact_conditional(example, C, given):
    """Return MLD with the exact denoiser of N(0, C) for these given dimensions."""
    K, S = conditional(C, given)
    eye = torch.eye(len(S), dtype=torch.float64)

    def eps(z_t, c, alpha, sigma):
        assert_close(z_t[:, given], c[:, 0, given])  # the given dimensions come clean
        mean = c[:, 0, given] @ K.T  # (B, D_hidden)
        precision = torch.linalg.inv(alpha[..., None]**2 * S + sigma[..., None]**2 * eye)
        out = torch.full_like(z_t, 1e3)  # predictions for the given dimensions must not matter
        residual = (z_t[:, ~given] - alpha * mean)[:, :, None]
        out[:, ~given] = sigma * (precision @ residual)[:, :, 0]
        return out

    return example("mld")["MLD"](denoiser(eps), (len(C),))


GIVEN_DIMENSIONS = [[False] * 4, [True, False, False, True], [False, True, True, True]]


@pytest.mark.parametrize("given", GIVEN_DIMENSIONS)
def test_mld_samples_the_conditional(example, given):
    C, given, n = covariance(4), torch.tensor(given), 10_000
    mld = exact_conditional(example, C, given)
    clean = torch.where(given, f64([0.9, -0.4, 0.3, 0.7]), 0)
    c = torch.stack([clean, given.double()]).expand(n, 2, 4)
    noise = torch.randn(n, 4, dtype=torch.float64)
    z = mld.sample(c, noise=noise, sampler=dm.ddim, num_steps=100)
    assert torch.equal(z[:, given], c[:, 0, given])
    K, S = conditional(C, given)
    assert_close(z[:, ~given].mean(0), K @ clean[given], atol=0.04, rtol=0)
    assert_close(z[:, ~given].T.cov().view_as(S), S, atol=0.05, rtol=0)


@pytest.mark.parametrize("given", GIVEN_DIMENSIONS)
@pytest.mark.parametrize("t", [0.05, 0.3, 0.8])
def test_mld_loss_of_the_exact_denoiser(example, given, t):
    """(D / D_hidden) Σ_k α² s_k / (α² s_k + σ²), s_k the eigenvalues of the conditional's S."""
    C, given, n = covariance(4), torch.tensor(given), 40_000
    mld = exact_conditional(example, C, given)
    z = MultivariateNormal(torch.zeros(4, dtype=torch.float64), C).sample((n,))
    c = torch.stack([z * given, given.double().expand(n, 4)], 1)
    error = mld.squared_error(z, c, f64([t]).expand(n), torch.randn_like(z))
    a2, s2 = mld.sde.alpha(f64(t)).square(), mld.sde.sigma(f64(t)).square()
    s = torch.linalg.eigvalsh(conditional(C, given)[1])
    expected = 4 / len(s) * (a2 * s / (a2 * s + s2)).sum().item()
    assert error.mean().item() == approx(expected, abs=5 * error.std().item() / n**0.5)


def Function(f):
    """Return a network that computes f."""
    network = nn.Module()
    network.forward = f
    return network


def correlated(r, sde):
    """Return eps_model(z, t) for two standard normals with correlation r, and the exact energy
    E(z, ℓ) = −log of p_t(z_i, z_j) over ½ p_t(z_i) p_t(z_j) + ½ N(0, I)."""
    def precision(c):
        one = torch.ones_like(c)
        return torch.stack([one, -c, -c, one], -1).view(-1, 2, 2) / (1 - c * c).view(-1, 1, 1)

    def eps_model(z, t):
        P = precision(sde.alpha(t).square() * r)
        return sde.sigma(t) * (P @ z[..., None])[..., 0]

    def energy(z, log_snr):
        P = precision(log_snr.sigmoid() * r)
        joint = 0.5 * P.det().log() - 0.5 * (z * (P @ z[..., None])[..., 0]).sum(1)
        return -(joint + 0.5 * z.square().sum(1))[:, None]

    return eps_model, energy


@pytest.mark.parametrize("corrections, strength, steps, mean, variance", [
    (0, 0, 250, 0.94, 0.31), (1, 0, 250, 1.35, 0.19), (10, 0, 50, 1.35, 0.19),
    (1, 1, 250, 1.492, 0.105),
])
def test_replacement_needs_the_corrector(example, corrections, strength, steps, mean, variance):
    """For correlation 0.9 and 1.5 given, mean 1.35 and variance 0.19 are right. With energies the
    precision is P = (1 + s)/(1 − r²) − s and the mean (1 + s) r z_o/((1 − r²) P)."""
    names, sde, n = example("sbm"), dm.VPSDE(), 5_000
    eps_model, energy = correlated(0.9, sde)
    energies = names["Energies"]([Function(energy)], sde)
    energies.pairs = [(0, 1)]
    given = torch.tensor([True, False])

    def guided(z, t):
        gradient = energies.gradient(z.view(n, 2, 1), given, t.expand(n)).flatten(1)
        return eps_model(z, t) + strength * sde.sigma(t) * gradient

    clean = torch.tensor([1.5, 0.0]).expand(n, 2)
    z = names["predict_correct"](guided, torch.randn(n, 2), sde, steps, clean, given, corrections)
    assert (z[:, 0] == 1.5).all()
    assert z[:, 1].mean().item() == approx(mean, abs=0.03)
    assert z[:, 1].var().item() == approx(variance, abs=0.03)


@pytest.mark.parametrize("wrong", [0.5, 0.8, 1.25, 2.0])
def test_the_exact_energy_has_the_best_contrast(example, wrong):
    names, sde, n = example("sbm"), dm.VPSDE(), 50_000
    _, energy = correlated(0.9, sde)
    z = MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.9], [0.9, 1]])).sample((n,))
    contrasts = []
    for factor in (1.0, wrong):
        energies = names["Energies"]([Function(lambda *of: factor * energy(*of))], sde)
        energies.pairs = [(0, 1)]
        torch.manual_seed(1)
        contrasts.append(energies.contrast(z[:, :, None], torch.full((n,), 0.1)))  # (n,)
    gain = contrasts[0] - contrasts[1]
    assert gain.mean() > 3 * gain.std() / n**0.5


# z, w_1, w_2 ~ N(0, 1) and x_m = (z, w_m) + N(0, VARIANCE I), of which term m has w_n = 0, n ≠ m
VARIANCE, TWO = 0.25, {"a": f64([[0.7, -0.4]]), "b": f64([[0.3, 1.1]])}


def plus_model(example, shift=0.0):
    """Return MMVAE+ with the exact posteriors, moved by shift, and r_n(w) = N(0, 0)."""
    def constant(i):
        precision = f64([1 + 2 / VARIANCE, 1 + 1 / VARIANCE])  # of z given both, of w given its own
        mean = torch.stack([(TWO["a"] + TWO["b"])[0, 0], TWO[i][0, 1]]) / VARIANCE / precision
        return Function(lambda x: ((mean + shift).expand_as(x), -precision.log().expand_as(x)))

    def likelihood(mean):
        return Normal(mean, VARIANCE**0.5)

    encoders = {name: constant(name) for name in TWO}
    decoders = {name: dm.FeedForwardDecoder(nn.Identity(), likelihood) for name in TWO}
    model = example("mmvae")["MMVAEPlus"](encoders, decoders, D=1).double()
    model.zeros = model.zeros.double()
    for logvar in model.logvars.values():
        nn.init.constant_(logvar, -torch.inf)
    return model


def evidence(own, other):
    """Return log p(x_own, x_other) of the term that samples only w_own."""
    v = VARIANCE
    shared = MultivariateNormal(f64([0.0, 0.0]), f64([[1 + v, 1], [1, 1 + v]]))
    private = MultivariateNormal(f64([0.0, 0.0]), f64([[1 + v, 0], [0, v]]))
    x = torch.cat([own, other])  # (2, 2)
    return (shared.log_prob(x[:, 0]) + private.log_prob(x[:, 1])).item()


@pytest.mark.parametrize("shift", [0.0, -0.3, 0.2])
def test_mmvae_plus_is_below_the_evidence_by_the_divergence(example, shift):
    """Both experts are off by the same shift, so the gap is that of z plus that of w_m."""
    n, exact = 100_000, [evidence(TWO["a"], TWO["b"]), evidence(TWO["b"], TWO["a"])]
    assert exact == approx([-5.5616, -3.8816], abs=1e-4)
    terms = plus_model(example, shift).terms({k: v.expand(n, 2) for k, v in TWO.items()})
    gap = 0.5 * shift**2 * (2 + 3 / VARIANCE)  # ½ Δ² (precision of z + that of w)
    for term, expected in zip(terms, exact):  # without shift, every sample is exact
        noise = 5 * term.std().item() / n**0.5 + 1e-9
        assert term.mean().item() == approx(expected - gap, abs=noise)


def test_mmvae_plus_generates_from_each_given_modality_equally_often(example):
    """w is from q(w|x) for the chosen modality, and otherwise from p(w)."""
    def certain(z, w):
        return Function(lambda x: (f64([z, w]).expand(len(x), 2), f64(-90.0).expand(len(x), 2)))

    encoders = {"a": certain(10.0, 50.0), "b": certain(20.0, 60.0), "c": certain(30.0, 70.0)}
    mean = dm.FeedForwardDecoder(nn.Identity(), lambda mean: Normal(mean, 1.0))
    model, n = example("mmvae")["MMVAEPlus"](encoders, {name: mean for name in "abc"}, D=1), 10_000
    made = model.generate({name: torch.zeros(n, 2) for name in "ab"}, n)
    z = made["a"][:, 0]
    assert all(torch.equal(made[name][:, 0], z) for name in "bc")
    assert set(z.tolist()) == {10, 20} and (z == 10).double().mean().item() == approx(0.5, abs=0.03)
    for name, own, w in (("a", 10, 50), ("b", 20, 60)):
        assert_close(made[name][z == own, 1], torch.full_like(z[z == own], w))
        assert made[name][z != own, 1].std().item() == approx(1, abs=0.05)
    for values in (made["c"][:, 1:], *model.generate({}, n).values()):
        assert values.std(0).tolist() == approx([1] * values.shape[1], abs=0.05)


def test_baselines_page(quick, tmp_path, monkeypatch, capsys):
    """Run the commands of the page in few steps: each method's blocks, then those of the figure."""
    monkeypatch.chdir(tmp_path)
    celeba.run(tiny(out="runs/supervised", decoder="none"))
    celeba.run(tiny(out="runs/faces"))
    blocks = page_blocks()
    for tag in ("mld", "sbm", "mmvae", "figure"):
        namespace = {}
        for name, code in blocks:
            if name in ("shared", tag):
                exec(code, namespace)
    for method in ("MLD", "SBM-VAE", "SBM-VAE-C", "MMVAE+"):
        assert set(results_in(f"runs/{method}")["tables"]) == {"f1", "images"}
    assert Path("runs/baselines.png").exists()


# ---- The scripts, as a user runs them ------------------------------------------------------------

@pytest.mark.parametrize("script, options", [
    (celeba, dict(weighting="likelihood", attention_resolutions=[8])),
    (celeba, dict(decoder="feedforward")), (cub, {}),
])
def test_a_step_never_waits_for_the_device(quick, script, options):
    """Reading a tensor without a value is an error; on a GPU it would wait for the whole queue."""
    s = tiny(script.Settings, **options)
    if script is celeba:
        pair, data = celeba.build(s), celeba.synthetic_faces(16)["test"]
    else:
        birds = cub.synthetic_birds(16)
        tokenizers, configs = cub.text_parts(s, birds["test"][1][0])
        pair = cub.build(s, configs)
        data = cub.to_tensors(birds, tokenizers, s.max_length)["test"]
    model, prior = (part.to("meta") for part in pair)
    data, i = {k: x.to("meta") for k, x in data.items()}, torch.randint(8, (4,), device="meta")
    x = dm.random_flip(script.get_batch(data, i))
    (-model.elbo(x).terms()["ELBO"].mean()).backward()
    prior.standardize(*model.posterior(script.get_batch(data)))
    (-prior.log_prob(torch.randn(4, 16, device="meta")).mean()).backward()
    images = model.decoders["image"].sample(prior.sample(4))
    assert images.device.type == "meta" and images.shape == (4, 3, 16, 16)


UNCONDITIONAL = {"aggregate posterior", "latent prior", "N(0, I)"}


@pytest.mark.parametrize("options", [
    {}, dict(weighting="likelihood"), dict(decoder="feedforward", family="mmvae"),
    dict(decoder="feedforward", family="mvtcae"),
])
def test_celeba_end_to_end(tmp_path, monkeypatch, capsys, quick, options):
    monkeypatch.chdir(tmp_path)
    celeba.run(tiny(out="supervised", decoder="none"))
    assert not Path("supervised/prior.pt").exists()
    sheet = Path("run/samples.png")
    s = tiny(out="run", evaluator="supervised", num_samples=5, **options)
    celeba.run(s)
    assert capsys.readouterr().out.startswith("These faces are synthetic; --data CelebAMask-HQ")
    tables = results_in("run")["tables"]
    assert set(tables["f1"]["constant baseline"]) == {"attributes", "mask"}
    assert ("elbo" in tables) == s.is_bound
    conditions = {"image", "mask + attributes", "mask", "attributes"} | UNCONDITIONAL
    assert set(tables["images"]) == conditions | {"fresh"}
    metrics = {"fd", "sharpness", "coherence_mask", "coherence_attributes"}
    assert set(tables["images"]["N(0, I)"]) == metrics == set(tables["images"]["fresh"])
    width, height = Image.open(sheet).size
    assert height // 66 == 9 and 5 * 66 < width < 8 * 66  # five faces and the labels
    first = sheet.read_bytes()
    celeba.run(s)  # everything is trained: it evaluates and samples the same again
    assert sheet.read_bytes() == first and results_in("run")["tables"] == tables
    model, prior = celeba.load("run")
    assert model.decode(prior.sample(2))["image"].shape == (2, 3, 16, 16)


FEEDFORWARD = dict(decoder="feedforward", family="mvae", prior_net="unet")


@pytest.mark.parametrize("options", [{}, FEEDFORWARD])
def test_cub_end_to_end(tmp_path, monkeypatch, capsys, quick, options):
    monkeypatch.chdir(tmp_path)
    small = dict(num_samples=4, ema_decay=0.9)
    cub.run(tiny(cub.Settings, out="supervised", decoder="none", **small))
    assert set(results_in("supervised")["tables"]["caption_log_prob"]) == {
        "image", "another bird's image"}
    s = tiny(cub.Settings, out="run", evaluator="supervised", **small, **options)
    cub.run(s)
    assert capsys.readouterr().out.startswith("These birds are synthetic; --data cub")
    tables, generated = results_in("run")["tables"], {"image from caption"} | UNCONDITIONAL
    assert ("elbo" in tables) == s.is_bound
    assert set(tables["coherence"]) == {"real", "caption from image"} | generated
    real = tables["coherence"]["real"]
    assert real["caption_accuracy"] == 1 and real["color_accuracy"] > 0.9
    assert set(tables["images"]) == {"fresh"} | generated
    metrics = {"fd", "sharpness", "caption_log_prob"}
    assert all(set(row) == metrics for row in tables["images"].values())
    first = Path("run/samples.png").read_bytes()
    cub.run(s)  # everything is trained: it evaluates and samples the same again
    assert Path("run/samples.png").read_bytes() == first
    model, prior, tokenizers = cub.load("run")
    decoded = model.decode(prior.sample(2))
    assert decoded["image"].shape == (2, 3, 16, 16)
    assert len(cub.detokenize(tokenizers, decoded["caption"])) == 2


def test_real_birds_end_to_end_and_other_birds_are_refused(tmp_path, released_birds, quick):
    s = tiny(cub.Settings, out=tmp_path, num_samples=2, data=released_birds, text="small")
    cub.run(s)
    assert "coherence" not in results_in(tmp_path)["tables"]
    before = {path: path.read_bytes() for path in tmp_path.glob("[bg][ep][rt][t2]/*")}
    (released_birds / "text" / "1.A" / "one.txt").write_text("other words, other words\n")
    with refused("model.pt has data_checksum '.{8}', not '.{8}'"):
        cub.run(s)
    assert len(before) >= 4 and all(path.read_bytes() == was for path, was in before.items())


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "train_celeba.py", "--data", "nowhere", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"train_celeba\.py: .*No such file.*nowhere.*\n", done.stderr)


def test_readme_examples(tmp_path, monkeypatch, quick):
    """Run the Python blocks of README and results in order, next to small trained runs."""
    pages = [(ROOT / page).read_text("utf-8") for page in ("README.md", ".github/results.md")]
    code = re.findall(r"```python\n(.*?)```", "".join(pages), re.DOTALL)
    assert len(code) >= 3
    monkeypatch.chdir(tmp_path)
    options = {"bound": dict(weighting="likelihood"), "mopoe": dict(decoder="feedforward"),
               "supervised": dict(decoder="none")}
    for out in sorted(set(re.findall(r'"(runs/(?!png)\w+)"', "".join(code)))):
        script = cub if "birds" in out else celeba
        script.run(tiny(script.Settings, out=out, num_samples=4, **options.get(Path(out).name, {})))
    monkeypatch.setattr(celeba, "Settings", tiny)  # for the speed at full size
    namespace = {}
    for block in code:
        exec(block, namespace)
    for figure in re.findall(r'save_grid\("(.*?)"', "".join(code)):
        assert Path(figure).exists()
