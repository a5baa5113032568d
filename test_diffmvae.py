"""The mathematics of diffmvae.py against independent truths, and the scripts as a user runs them.

Grids, quadrature, recursions and closed forms stand on one side, the module on the other. Where a
quadratic function of a standard normal is averaged, two points ±1 a dimension are exact.
"""

import argparse
import copy
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal, getcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Stub

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
torch.set_num_threads(1)  # what is computed here is too small for more
ROOT = Path(__file__).parent
seeds, moderate = st.integers(0, 2**31), st.floats(-3, 3)
f64 = lambda x: torch.tensor(x, dtype=torch.float64)
refused = lambda message: pytest.raises(dm.InputError, match=message)
results_in = lambda out: json.loads(Path(out, "results.json").read_text())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normals(seed):
    """randn(*shape) in float64, with a generator of its own."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def gaussians(seed, *shape):
    """mu, logvar of the given shape."""
    randn = normals(seed)
    return 1.5 * randn(*shape), randn(*shape)


def nudge(module, size=0.05):
    """Move every weight off its start, where zeroed layers pass no gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


# ---- 1  Gaussian algebra -------------------------------------------------------------------------

@given(seeds, st.integers(1, 4))
def test_product_is_the_normalised_product_of_densities(seed, m):
    mu, logvar = gaussians(seed, m, 1)
    z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_density = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(0)
    p = log_density.softmax(0)
    mean = (p * z).sum()
    fused_mu, fused_logvar = dm.product_of_experts(mu, logvar)
    assert fused_mu.item() == approx(mean.item(), abs=1e-6)
    assert fused_logvar.exp().item() == approx((p * (z - mean) ** 2).sum().item(), rel=1e-5)


@given(seeds)
def test_product_ignores_order_and_grouping(seed):
    mu, logvar = gaussians(seed, 2, 4, 3)
    whole = dm.product_of_experts(mu, logvar)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert_close(dm.product_of_experts(mu[:, order], logvar[:, order]), whole)
    halves = (dm.product_of_experts(mu[:, i], logvar[:, i]) for i in (slice(0, 1), slice(1, 4)))
    assert_close(dm.product_of_experts(*(torch.stack(x, dim=1) for x in zip(*halves))), whole)


@given(seeds)
def test_product_with_masks_is_the_product_of_those_present(seed):
    mu, logvar = gaussians(seed, 7, 3, 5)
    present = dm.subsets(3)
    fused = dm.product_of_experts(mu, logvar, present)
    mu_absent = torch.where(present[..., None], mu, torch.nan)  # what is absent is never looked at
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


def test_product_of_nobody_is_loud():
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    mu, logvar = dm.product_of_experts(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), nobody)
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
    with pytest.raises(ValueError, match="mopoe, mvae, mmvae"):
        dm.subsets(m, "poe")


def test_sample_gaussian_has_its_mean_and_variance():
    mu, logvar = torch.tensor([-2.0, 0.5]), torch.tensor([-2.0, 1.5])
    z = dm.sample_gaussian(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    assert_close(z.mean(0), mu, atol=0.03, rtol=0)
    assert_close(z.var(0), logvar.exp(), rtol=0.02, atol=0)


# ---- 2  Forward SDE ------------------------------------------------------------------------------

def schedule(sde, t):
    """α(t), σ(t) as floats."""
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
    assert dm.VPSDE() == dm.VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-4)  # as the authors have it
    t = torch.linspace(1e-4, 1, 1001, dtype=torch.float64, requires_grad=True)
    ell = sde.log_snr(t)
    assert_close(ell, (sde.alpha(t) ** 2 / sde.sigma(t) ** 2).log())
    (slope,) = torch.autograd.grad(ell.sum(), t)
    assert_close(-slope, sde.g2(t) / sde.sigma(t) ** 2)  # what makes λ = g² uniform in ℓ
    assert sde.log_snr_ends() == approx([ell[-1].item(), ell[0].item()])


@pytest.mark.parametrize("t_min", [0.0, -1e-4, 1.0, math.nan])
def test_a_t_min_without_noise_or_without_time_is_refused(t_min):
    with refused(f"t_min {t_min}: give more than 0, where σ = 0, and less than 1"):
        dm.VPSDE(t_min=t_min)


@given(st.floats(1e-6, 1))
def test_time_at_inverts_log_snr_in_float32(t):
    sde, t = dm.VPSDE(), torch.tensor(t)
    assert_close(sde.time_at(sde.log_snr(t)), t, rtol=3e-6, atol=0)


# ---- 3  Samplers ---------------------------------------------------------------------------------

def gaussian_eps(m, s2):
    """The denoiser of data N(m, s²): σ (x_t − α m) / (α² s² + σ²), as eps(x_t, z, α, σ)."""
    return lambda x, z, alpha, sigma: sigma * (x - alpha * m) / (alpha**2 * s2 + sigma**2)


def exact_eps(m, s2, sde):
    """The same as samplers call it, eps_model(x_t, t)."""
    return lambda x, t: gaussian_eps(m, s2)(x, None, sde.alpha(t), sde.sigma(t))


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("m, s2", [(0.7, 0.3), (-1.0, 2.0)])
def test_ddim_follows_its_recursion(steps, m, s2):
    sde, calls = dm.VPSDE(), []
    eps, x1 = exact_eps(m, s2, sde), f64([[-1.5], [0.2], [2.0]])
    out = dm.ddim(lambda x, t: calls.append(float(t)) or eps(x, t), x1, sde, steps)
    roots = [1.0 + (sde.t_min**0.5 - 1) * i / max(1, steps - 1) for i in range(steps)]
    times = [root**2 for root in roots]  # quadratic
    assert calls == approx(times, rel=1e-4)
    K, points = 1.0, [schedule(sde, t) for t in times] + [(1.0, 0.0)]
    for (a, s), (a_next, s_next) in zip(points, points[1:]):
        K *= (a * a_next * s2 + s * s_next) / (a * a * s2 + s * s)
    assert_close(out, m + K * (x1 - points[0][0] * m), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(t_min=0.05)])  # whose last step weighs
def test_euler_maruyama_follows_its_recursion(steps, sde):
    m, s2, calls = 0.7, 0.3, []
    eps, n = exact_eps(m, s2, sde), 400_000
    record = lambda x, t: calls.append(float(t)) or eps(x, t)
    out = dm.euler_maruyama(record, torch.randn(n, dtype=torch.float64), sde, steps)
    ends = sde.log_snr_ends()
    ells = [ends[0] + (ends[1] - ends[0]) * i / (steps - 1) for i in range(steps)]
    times = [sde.time_at(f64(ell)).item() for ell in ells]
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


@pytest.mark.parametrize("sampler", [dm.ddim, dm.euler_maruyama])
def test_more_steps_bring_the_right_spread(sampler):
    sde, x1 = dm.VPSDE(), torch.randn(200_000, dtype=torch.float64)
    spread = lambda steps: sampler(exact_eps(0.0, 0.25, sde), x1, sde, steps).std().item()
    errors = [abs(spread(steps) - 0.5) for steps in (5, 20, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.mark.parametrize("sampler", [dm.ddim, dm.euler_maruyama])
def test_samplers_give_each_mode_its_share(sampler):
    """¼ N(−2, 0.1²) + ¾ N(1, 0.2²)."""
    sde = dm.VPSDE()
    weight, mean, var = torch.tensor([[0.25, 0.75], [-2.0, 1.0], [0.01, 0.04]])

    def eps(x, t):
        a, s = sde.alpha(t), sde.sigma(t)
        v = a**2 * var + s**2
        log_share = weight.log() - 0.5 * v.log() - 0.5 * (x[:, None] - a * mean) ** 2 / v
        return s * (log_share.softmax(1) * (x[:, None] - a * mean) / v).sum(1)

    x = sampler(eps, torch.randn(20_000), sde, 200)
    left = x < -0.5
    assert left.float().mean().item() == approx(0.25, abs=0.02)
    assert x[left].mean().item() == approx(-2, abs=0.02)
    assert x[~left].std().item() == approx(0.2, abs=0.02)


# ---- 4  The score-matching bound -----------------------------------------------------------------

def denoiser(eps):
    """The net whose v makes Diffusion predict eps(x_t, z, α, σ), a function in closed form."""

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
    """E log_prob for x: (d,), the integral by midpoints in ℓ, E over ε by ±1 in each dimension.

    A linear denoiser's error is quadratic in ε and separate in each dimension: the latter is exact.
    """
    ends, n = model.sde.log_snr_ends(), 1024
    t = model.sde.time_at(ends[0] + (ends[1] - ends[0]) * midpoints(n)).repeat(2)
    eps = f64([[1.0], [-1.0]]).repeat_interleave(n, 0).expand(2 * n, len(x))
    return model.log_prob(x.expand(2 * n, -1), None, t, eps).mean().item()


def alpha_sigma(ell):
    """The floats α, σ with ℓ = log α²/σ² and α² + σ² = 1."""
    return (1 + math.exp(-ell)) ** -0.5, (1 + math.exp(ell)) ** -0.5


def closed_form(x, m, s2, sde):
    """The bound at x for the exact denoiser of N(m, s²), derived by hand for any schedule."""
    ell_1, ell_0 = sde.log_snr_ends()
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


@pytest.mark.parametrize("m, s2", [(0.0, 1.0), (0.6, 0.2)])
def test_bound_of_the_exact_denoiser_is_the_log_density(m, s2):
    model = diffusion(gaussian_eps(m, s2), (1,), dm.VPSDE(t_min=1e-6))
    for x in f64([[-1.0], [0.3], [2.0]]):
        density = Normal(m, s2**0.5).log_prob(x).item()
        assert exact_bound(model, x) == approx(density, abs=5e-3)


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

    (ell, end), state = sde.log_snr_ends(), np.array([0.0, 1.0])
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
@pytest.mark.parametrize("weighting", ["likelihood", "simple", "velocity"])
def test_drawn_times_and_noise_give_the_same_expectation(weighting, sde):
    m, s2, n = 0.4, 0.5, 200_000
    x, model = f64([0.9, -0.3]), diffusion(gaussian_eps(m, s2), (2,), sde, weighting)
    drawn = model.log_prob(x.expand(n, 2))
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
            "velocity": sde.g2(t) / (2 * a * s)[:, 0] / (angle(1.0) - angle(sde.t_min)),
        }[weighting]
        expected = -0.5 * (weight * error * step).mean().item()
    assert drawn.mean().item() == approx(expected, abs=5 * drawn.std().item() / n**0.5)


@pytest.mark.parametrize("weighting", ["likelihood", "simple", "velocity"])
@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(t_min=0.05)])
def test_drawn_times_are_uniform_between_t_min_and_1(weighting, sde):
    """In log-SNR, in t, or in the angle: one quantile after the other."""
    t = diffusion(None, (1,), sde, weighting).draw_times(10_000, "cpu").double().sort().values
    scale = {
        "likelihood": sde.log_snr,
        "simple": lambda t: t,
        "velocity": lambda t: torch.atan2(sde.sigma(t), sde.alpha(t)),
    }[weighting]
    first, last = scale(f64([sde.t_min, 1.0]))
    assert_close((scale(t) - first) / (last - first), midpoints(10_000), atol=2e-4, rtol=0)


def test_pictures_and_vectors_have_the_same_bound():
    """log_prob of (3, 2, 2) is that of the same numbers as (12,)."""
    (x, eps), t = torch.randn(2, 5, 3, 2, 2), torch.rand(5) * 0.9 + 0.1
    picture, vector = (diffusion(gaussian_eps(0.3, 0.5), d, dm.VPSDE()) for d in ((3, 2, 2), (12,)))
    flat = vector.log_prob(x.flatten(1), None, t, eps.flatten(1))
    assert_close(picture.log_prob(x, None, t, eps), flat)


def test_error_is_the_squared_distance_at_the_noised_point():
    sde, seen = dm.VPSDE(), []

    def net(*inputs):
        seen.extend(inputs)
        return torch.full_like(inputs[0], 0.3)

    (x, eps), z, t = torch.randn(2, 5, 3, 4, 4), torch.randn(5, 7), torch.rand(5) * 0.9 + 0.05
    error = dm.Diffusion(net, (3, 4, 4)).error(x, z, t, eps)
    alpha, sigma = sde.alpha(t).view(5, 1, 1, 1), sde.sigma(t).view(5, 1, 1, 1)
    x_t, log_snr, z_seen = seen
    assert_close(x_t, alpha * x + sigma * eps)
    assert_close(log_snr, sde.log_snr(t))
    assert z_seen is z
    predicted = sigma * x_t + alpha * 0.3
    assert_close(error, (eps - predicted).square().sum((1, 2, 3)))


@given(st.integers(1, 40), seeds)
def test_stratified_draws_are_one_in_each_stratum(n, seed):
    torch.manual_seed(seed)
    u = dm.stratified(n)
    assert (0 <= u).all() and (u < 1).all()
    gaps = torch.cat([u, u + 1]).sort().values.diff()[:n]
    assert_close(gaps, torch.full((n,), 1 / n), atol=1e-5, rtol=0)


def test_stratified_draws_are_uniform_for_each_example():
    u = torch.stack([dm.stratified(3) for _ in range(20_000)])  # (draws, examples)
    for moment, expected in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 4)):
        assert_close((u**moment).mean(0), torch.full((3,), expected), atol=0.012, rtol=0)
    follows = (u[:, 1] - u[:, 0]) % 1 < 0.5  # by a third, not two: strata are in a random order
    assert follows.float().mean().item() == approx(0.5, abs=0.02)


def test_each_weighting_samples_with_its_own_sampler():
    sde, calls = dm.VPSDE(), []

    def eps(x, z, alpha, sigma):
        calls.append(z)
        return gaussian_eps(z, 0.01)(x, z, alpha, sigma)

    weightings = ("simple", "velocity", "likelihood")
    simple, velocity, bound = (diffusion(eps, (1,), sde, name) for name in weightings)
    z, noise = torch.tensor([[-1.0], [2.0]], requires_grad=True), torch.randn(2, 1)
    sampled = simple.sample(z, noise=noise)
    assert len(calls) == 20 and calls[0] is z
    assert_close(sampled, z, atol=0.4, rtol=0)
    for same in (simple, velocity):
        assert torch.equal(same.sample(z, noise=noise), sampled)
    calls.clear()
    random = bound.sample(z)
    assert random.shape == (2, 1) and not random.requires_grad and len(calls) == 100
    assert not torch.equal(bound.sample(z, noise=noise), bound.sample(z, noise=noise))  # random
    calls.clear()
    quick = bound.sample(z, noise=noise, sampler=dm.ddim, evaluations=3)
    assert len(calls) == 3 and not quick.requires_grad
    assert_close(quick, simple.sample(z, noise=noise, evaluations=3))
    calls.clear()
    dm.Diffusion(simple.net, (1,), sde, "simple", evaluations=7).sample(z)
    assert len(calls) == 7
    with pytest.raises(ValueError, match="0 evaluations: give at least 1"):
        simple.sample(z, evaluations=0)
    with pytest.raises(ValueError, match="likelihood.*simple"):
        diffusion(eps, (1,), sde, "uniform")


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
        """Encoders whose full product, with or without N(0, I), is the exact posterior."""
        precision = {k: self.tau[k] + (0 if prior_expert else 1 / len(SIZES)) for k in SIZES}
        matrix = {k: self.W[k].T / self.psi[k] / precision[k][:, None] for k in SIZES}
        return {k: Fixed(matrix[k], self.b[k], -precision[k].log()) for k in SIZES}

    def wrong_experts(self, certain=False):
        """Some others; if certain, z is their mean."""
        randn, shift = normals(1), -40 * certain
        expert = lambda k, n: Fixed(0.3 * randn(DIM, n), self.b[k], 0.3 * randn(DIM) + shift)
        return {k: expert(k, n) for k, n in SIZES.items()}

    def decoder(self, k):
        mean = lambda z: z @ self.W[k].T + self.b[k]
        return dm.FeedForward(mean, partial(self.likelihood, k))

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
        """The example for each of sigma_points."""
        return {k: x.expand(2 * DIM * copies, -1) for k, x in self.x.items()}


@pytest.fixture
def sigma_points(monkeypatch):
    """z at μ ± √D σ along each axis, a batch of these 2D points: exact for quadratics in z."""
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
    terms = {"a": torch.tensor([-3.0]), "b": torch.tensor([-5.0])}
    elbo = dm.ELBO(terms, torch.tensor([2.0]), beta=0.5, term_weights={"b": 10})
    named = {"surrogate": -3 - 50 - 1, "a": -3, "b": -5, "KL": 2}
    assert list(elbo.terms("surrogate").items()) == list(named.items())
    assert elbo.bound == -3 - 5 - 2
    world, options = LinearGaussian(), dict(beta=0.5, term_weights={"b": 10}, prior_expert=True)
    model = dm.DiffMVAE(world.experts(True), world.decoders(), **options)
    for elbo in (model.elbo(world.x), model.elbo(world.x, A=model.subsets[0])):
        a, b, c = (elbo.log_prob[k] for k in "abc")
        assert_close(elbo.total, a + 10 * b + c - 0.5 * elbo.kl)


@pytest.mark.parametrize("model", [dm.DiffMVAE, dm.MVTCAE, dm.IncompleteDiffMVAE])
def test_a_weight_of_no_decoder_is_refused(model):
    parts = {"a": nn.Identity(), "b": nn.Identity()}, {"a": nn.Identity()}
    model(*parts, term_weights={"a": 2})
    for name in ("b", "A"):  # b has no decoder
        with refused(rf"no decoder for \['{name}'\]: there are \['a'\]"):
            model(*parts, term_weights={"a": 2, name: 3})


def test_elbo_with_a_diffusion_decoder(sigma_points):
    """The exact denoiser of p(c|z) = N(Wz + b, ψ) as its decoder turns log p(c|z) to its bound."""
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
    """A decoder that is dear to run; its 'log-likelihood' is z's first number."""

    def log_prob(self, x, z):
        return z[:, 0]


def test_one_subset_per_example_is_unbiased_and_every_subset_exact(monkeypatch):
    world, batch = LinearGaussian(seed=4), 10  # 7 subsets do not divide 10
    model = dm.DiffMVAE(world.wrong_experts(certain=True), {"a": FirstOf()})
    x = {k: torch.randn(batch, n, dtype=torch.float64) for k, n in SIZES.items()}
    draws = torch.stack([model.elbo(x).log_prob["a"] for _ in range(4000)])  # (draws, B)
    each = torch.stack([model.elbo(x, A=A).log_prob["a"] for A in model.subsets])  # (S, B)
    error = 5 * each.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - each.mean(0)).abs() < error).all()
    assert draws[:, 0].round(decimals=6).unique().numel() == 7  # each example meets every subset
    assert_close(model.elbo(x, every_subset=True).log_prob["a"], each.mean(0))
    monkeypatch.setattr(FirstOf, "every_subset", True, raising=False)
    assert_close(model.elbo(x).log_prob["a"], each.mean(0))


def test_subsets_are_drawn_for_each_example_and_evenly():
    model = dm.DiffMVAE(LinearGaussian(seed=4).wrong_experts(certain=True), {"a": FirstOf()})
    x = {k: torch.randn(70, n, dtype=torch.float64) for k, n in SIZES.items()}
    each = torch.stack([model.elbo(x, A=A).log_prob["a"] for A in model.subsets])  # (S, B)
    drawn = (each - model.elbo(x).log_prob["a"]).abs().argmin(0)
    assert drawn.bincount().tolist() == [10] * 7 and drawn[:20].unique().numel() > 3


def test_every_subset_decodes_each_example_against_itself():
    world = LinearGaussian(seed=5)
    model = dm.DiffMVAE(world.wrong_experts(certain=True), world.decoders())
    x = {k: torch.randn(6, n, dtype=torch.float64) for k, n in SIZES.items()}
    each = [model.elbo(x, A=A) for A in model.subsets]
    for together in (model.elbo(x), model.elbo(x, every_subset=True)):
        for k in SIZES:
            assert_close(together.log_prob[k], sum(e.log_prob[k] for e in each) / 7)
        assert_close(together.kl, sum(e.kl for e in each) / 7)


def test_gradients_reach_z_through_both_kinds_of_decoder():
    mu, logvar = torch.randn(2, 2, 6, requires_grad=True).unbind()
    z = dm.sample_gaussian(mu, logvar)
    by_mu, by_logvar = torch.autograd.grad(z.sum(), (mu, logvar), retain_graph=True)
    assert_close(by_mu, torch.ones(2, 6))
    assert_close(by_logvar, 0.5 * (z - mu))
    image = dm.Diffusion(dm.UNet(2, 3, 8, 8, (1, 2), z_dim=6), (3, 8, 8))
    nudge(image)
    model = dm.DiffMVAE({"a": nn.Identity()}, {})
    for decoder in (image, dm.FeedForward(dm.ConvDecoder(3, 8, 6, [8]), dm.CalibratedGaussian())):
        term = model.reconstruction(decoder, torch.randn(2, 3, 8, 8), z[:, None], False)
        assert torch.autograd.grad(term.sum(), z, retain_graph=True)[0].abs().min() > 0


def tiny(settings=celeba.Settings, **options):
    """The smallest size of a script's model, in the shortest training."""
    size = dict(size=16, channels=8, multipliers=[1, 2], encoder_channels=8, latent_dim=16)
    training = dict(steps=3, prior_steps=2, batch_size=4, device="cpu", compile=False)
    return settings(**size | training | options)


def tiny_batch(n=4):
    picture, mask = torch.rand(n, 3, 16, 16) * 2 - 1, torch.rand(n, 1, 16, 16).round()
    return {"image": picture, "mask": mask, "attributes": torch.rand(n, 18).round()}


@pytest.fixture
def quick(monkeypatch):
    """Few examples to draw, and samplers of few steps."""
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12, "anew": 12})
    monkeypatch.setattr(cub, "BIRDS", {"train": 40, "test": 12, "anew": 12})
    samplers = {name: (sampler, 4) for name, (sampler, _) in dm.Diffusion.samplers.items()}
    monkeypatch.setattr(dm.Diffusion, "samplers", samplers)


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
    with refused("at least one modality"):
        model.posterior({})
    with refused("no encoder for"):
        model.posterior({"text": x["mask"]})
    for one in (model, celeba.build(tiny(family="mvtcae"))[0]):
        with refused("no encoder or decoder for ..text..: there are"):
            one.elbo({**x, "text": x["mask"]})
    with refused("A is empty"):
        model.elbo(x, A=torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("weighting", ["likelihood", "velocity"])
def test_all_works_in_float64(quick, weighting):
    model, prior = celeba.build(tiny(weighting=weighting))
    nudge(model)
    model.double()
    prior.double()
    x = {name: value.double() for name, value in tiny_batch().items()}
    prior.standardise(*model.posterior(x))
    made = model.decode(prior.sample(2))
    terms = [*model.elbo(x).terms().values(), prior.log_prob(torch.randn(4, 16).double())]
    assert all(value.dtype == torch.float64 for value in [*made.values(), *terms])
    assert all(value.isfinite().all() for value in [*made.values(), *terms])


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
    assert_close(dm.FeedForward(nn.Identity(), likelihood).log_prob(x, mean), expected)
    masks, mask = dm.FeedForward(nn.Identity(), dm.bernoulli), x.gt(0).float()
    loss = F.binary_cross_entropy_with_logits(mean, mask, reduction="none")
    assert_close(masks.log_prob(mask, mean), -loss.sum(1))
    assert_close(masks.sample(mean), mean.sigmoid())


@pytest.mark.parametrize("one", [(1,), (1, 4, 4)])
def test_what_torch_would_broadcast_is_refused(one):
    """A label (B,) against (B, 1), masks (B, H, W) against (B, 1, H, W): B² terms in place of B."""
    net = nn.Sequential(nn.Linear(2, math.prod(one)), nn.Unflatten(1, one))
    decoder, z = dm.FeedForward(net, dm.bernoulli), torch.randn(4, 2)
    assert decoder.log_prob(torch.ones(4, *one), z).shape == (4,)
    for x in (torch.ones(4, *one[1:]), torch.ones(1, *one), torch.ones(4, 2, *one[1:])):
        message = f"x is {tuple(x.shape)}, where p(x|z) is of {(4, *one)}"
        with refused(re.escape(message)):
            decoder.log_prob(x, z)
    images = dm.FeedForward(net, lambda p: Independent(dm.bernoulli(p), len(one)))
    assert_close(images.log_prob(torch.ones(4, *one), z), decoder.log_prob(torch.ones(4, *one), z))


@pytest.mark.parametrize("inside", [0, 1, 2])
def test_a_categorical_is_refused_before_training_and_one_hot_works(inside):
    """Also inside of so many Independent."""
    z, x = torch.zeros(2, 3), torch.eye(3)[:2]

    def likelihood(logits):
        p = Categorical(logits=logits[None, None])
        for _ in range(inside):
            p = Independent(p, 1)
        return p

    decoder = dm.FeedForward(nn.Identity(), likelihood)
    for use in (lambda: decoder.log_prob(x.argmax(1), z), lambda: decoder.sample(z)):
        with refused("give x one-hot"):
            use()
    decoder.likelihood = lambda logits: OneHotCategorical(logits=logits)
    assert_close(decoder.log_prob(x, z), torch.full((2,), -math.log(3)))
    assert_close(decoder.sample(z), torch.full((2, 3), 1 / 3))


# ---- 6  Latent prior -----------------------------------------------------------------------------

def test_latent_prior_standardises():
    net = denoiser(gaussian_eps(0.0, 1.0))  # exact for standardised z
    prior = dm.LatentPrior(net, (1, 4))
    mu, logvar = torch.randn(500, 4) * 3 + 5, torch.randn(500, 4)
    prior.standardise(mu, logvar)
    z = dm.sample_gaussian(mu.repeat(400, 1), logvar.repeat(400, 1))
    assert_close(prior.mean, z.mean(0), rtol=0.02, atol=0.05)
    assert_close(prior.std, z.std(0), rtol=0.02, atol=0)
    assert (prior.evaluations, prior.weighting) == (50, "velocity")
    samples = prior.sample(20_000, noise=torch.randn(20_000, 1, 4), evaluations=200)
    assert samples.shape == (20_000, 4)
    assert_close(samples.mean(0), prior.mean, atol=0.12, rtol=0)
    assert_close(samples.std(0), prior.std, rtol=0.05, atol=0)
    torch.manual_seed(1)
    surrogate = prior.log_prob(z[:8])
    torch.manual_seed(1)
    standard = dm.Diffusion(net, (1, 4), weighting="velocity")
    assert_close(surrogate, standard.log_prob(((z[:8] - prior.mean) / prior.std)[:, None]))


def test_latent_prior_standardises_by_the_law_of_total_variance():
    """Of few examples, where dividing by N − 1 would be seen."""
    prior, (mu, logvar) = dm.LatentPrior(None, (4,)), gaussians(0, 3, 4)
    prior.standardise(mu, logvar)
    variance = (mu.square() + logvar.exp()).mean(0) - mu.mean(0).square()  # E z² − (E z)²
    assert_close(prior.mean.double(), mu.mean(0))
    assert_close(prior.std.double(), variance.sqrt())


def test_latent_prior_learns_how_dimensions_go_together(tmp_path):
    """z = W f + noise, f of four numbers: the correlations, by the scripts' own prior and batch."""
    s = celeba.Settings(out=tmp_path, latent_dim=36, prior_steps=300, device="cpu")
    randn, prior = normals(0), dm.build_prior(s, (6, 6))
    mu = (randn(2000, 4) @ randn(4, 36)).float()
    logvar = torch.full_like(mu, math.log(0.3**2))
    prior.standardise(mu, logvar)
    terms = lambda i: {"surrogate": prior.log_prob(dm.sample_gaussian(mu[i], logvar[i]))}
    correlations = lambda z: z.T.corrcoef()[~torch.eye(36, dtype=torch.bool)]
    wanted = correlations(dm.sample_gaussian(mu, logvar))

    def learned(prior):
        """The share of them that its samples have, by least squares."""
        return ((correlations(prior.sample(1000)) @ wanted) / (wanted @ wanted)).item()

    assert learned(prior) == approx(0, abs=0.05)  # untrained: N(0, I) of the right scale
    made, _ = dm.fit(s, "prior", prior, [(prior, s.prior_rate)], terms, "surrogate", {"mu": mu})
    assert learned(made) == approx(1, abs=0.1)


# ---- 7  Networks ---------------------------------------------------------------------------------

UNETS = [
    dict(dims=1, channels=1, size=12, multipliers=(1, 2), attention=(1,)),
    dict(dims=2, channels=3, size=8, multipliers=(1, 2, 2), attention=(0,), z_dim=5),
    dict(dims=2, channels=3, size=12, multipliers=(1, 2), z_dim=5, patch=2),
]


@pytest.mark.parametrize("options", UNETS)
def test_unet(options):
    net, z_dim = dm.UNet(width=8, heads=2, **options), options.get("z_dim")
    x = torch.randn(2, options["channels"], *[options["size"]] * options["dims"])
    z, ell = torch.randn(2, z_dim) if z_dim else None, torch.tensor([-3.0, 2.0])
    assert (net(x, ell, z) == 0).all()  # the exact denoiser of N(0, I)
    nudge(net)
    with refused("z is given to a UNet of z_dim = 0, or missing for another"):
        net(x, ell, None if z_dim else torch.randn(2, 5))
    out = net(x, ell, z)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.allclose(net(x, ell + 1, z), out)
    swapped = net(x.flip(0), ell.flip(0), z.flip(0) if z_dim else None).flip(0)
    assert_close(swapped, out)  # examples do not mix
    for dead in ("guess", "embed_z") if z_dim else ():  # z counts by either route alone
        one = copy.deepcopy(net)
        getattr(one, dead).weight.data.zero_()
        assert not torch.allclose(one(x, ell, z + 1), one(x, ell, z))


def test_residual_mlp():
    net, x, ell = dm.ResidualMLP(5, 16, 2), torch.randn(2, 5), torch.tensor([-3.0, 2.0])
    assert (net(x, ell) == 0).all()  # the exact denoiser of N(0, I)
    nudge(net)
    out = net(x, ell)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.allclose(net(x, ell + 1), out)
    assert_close(net(x.flip(0), ell.flip(0)).flip(0), out)  # examples do not mix
    for block in net.blocks:  # the log-SNR is all that modulation has to say
        nn.init.zeros_(block.modulation.weight)
    assert_close(net(x, ell + 1), net(x, ell))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("c_out", [4, 8])
def test_blocks_are_their_formulas(dims, c_out):
    """x + conv(silu((1 + s) GN(conv(silu(GN(x)))) + b)), and with linear and LN that of an MLP."""
    def by_hand(block, scale, shift):
        h = (1 + scale) * block.norm2(block.conv1(F.silu(block.norm1(x)))) + shift
        return block.skip(x) + block.conv2(F.silu(h))

    x, e = torch.randn(2, 4, *[5] * dims), torch.randn(2, 6)
    block, plain = dm.ResBlock(dims, 4, c_out, embedding=6), dm.ResBlock(dims, 4, c_out)
    mlp, h = dm.MLPBlock(4, 6), torch.randn(2, 4)
    for part in (block, plain, mlp):
        nudge(part)
    scale, shift = block.modulation(e).view(2, 2, c_out, *[1] * dims).unbind(1)
    assert_close(block(x, e), by_hand(block, scale, shift))
    assert_close(plain(x), by_hand(plain, 0, 0))
    scale, shift = mlp.modulation(e).view(2, 2, 4).unbind(1)
    assert_close(mlp(h, e), h + mlp.linear(F.silu((1 + scale) * mlp.norm(h) + shift)))


def test_attention_is_softmax_attention():
    layer, x = dm.Attention(8, 2), torch.randn(3, 8, 4, 5)
    nudge(layer)
    h = layer.norm(x).view(3, 8, 20)
    qkv = torch.einsum("oc,bcl->bol", layer.qkv.weight, h) + layer.qkv.bias[:, None]
    q, k, v = qkv.view(3, 3, 2, 4, 20).unbind(1)  # (B, heads, C, L)
    weights = torch.einsum("bhcl,bhcm->bhlm", q, k).div(4**0.5).softmax(-1)
    mixed = torch.einsum("bhlm,bhcm->bhcl", weights, v).reshape(3, 8, 20)
    out = torch.einsum("oc,bcl->bol", layer.proj.weight, mixed) + layer.proj.bias[:, None]
    assert_close(layer(x), x + out.view(3, 8, 4, 5))


def test_encoders_start_wide():
    text = cub.TextEncoder(tiny_bert(hidden_size=256), 100)
    conv = dm.ConvEncoder(3, 16, 100, [8, 16])
    layers = [dm.Encoder(dm.mlp(5, 300, 200))[0][-1], conv[-1], text.linear]
    model, _ = cub.build(cub.Settings(), cub.text_parts(cub.Settings(), TWO_BIRDS)[1], fresh=True)
    layers.append(model.encoders["caption"].linear)
    for last, factor in zip(layers, (8, 8, 8, 16)):
        means, logvars = last.weight.chunk(2)
        assert (means.std() / logvars.std()).item() == approx(factor, rel=0.05)
    mu, logvar = conv(torch.randn(64, 3, 16, 16))
    assert mu.std() > 4 * logvar.std()


@pytest.mark.parametrize("options, message", [
    (dict(size=12, multipliers=(1, 1, 1, 1)), "size 12 cannot be halved .* multiple of 8"),
    (dict(size=12, multipliers=(1, 1), patch=4), "size 12 cannot be halved .* multiple of 8"),
    (dict(width=12), "12 channels for 8 heads: give a multiple of 8"),
])
def test_unets_that_do_not_fit_are_refused(options, message):
    with refused(message):
        dm.UNet(2, 3, **dict(size=16, width=8, multipliers=(1, 2)) | options)


def test_group_norm_computes_in_the_precision_of_its_input():
    """bfloat16 stays so under autocast, as near to float64 as it can be, gradients too."""
    layer, x = dm.GroupNorm(16), 3 * torch.randn(4, 16, 6, 6) + 1
    nudge(layer)
    assert torch.equal(layer(x), F.group_norm(x, 4, layer.weight, layer.bias, layer.eps))
    x, towards = x.bfloat16(), torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad((out * towards).sum(), (layer.weight, layer.bias))
    exact = copy.deepcopy(layer).double()
    expected = exact(x.double())
    assert_close(out.double(), expected, rtol=0.01, atol=0.02)
    assert (out.double() - expected).abs().mean() < 0.004
    wanted = torch.autograd.grad((expected * towards).sum(), (exact.weight, exact.bias))
    for found, right in zip(gradients, wanted):
        assert found.dtype == torch.float32
        assert_close(found.double(), right, rtol=0.02, atol=0.2)
    groups = {c: dm.GroupNorm(c).num_groups for c in (3, 8, 48, 96, 128, 1024)}
    assert groups == {3: 1, 8: 2, 48: 4, 96: 8, 128: 32, 1024: 32}


def test_a_unet_keeps_no_float32_pictures_for_its_backward_pass(monkeypatch):
    """Autocast on CUDA has group norm among what it computes, and keeps, in float32."""
    original, kept = F.group_norm, []

    def group_norm(x, *arguments, **options):
        return original(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments, **options)

    def keep(x):
        if x.dtype == torch.float32 and x.shape[-2:] in ((16, 16), (8, 8)):
            kept.append(x)
        return x

    monkeypatch.setattr(F, "group_norm", group_norm)
    net = dm.UNet(2, 3, 16, 8, (1, 2), heads=2, z_dim=4)
    inputs = torch.randn(2, 3, 16, 16), torch.randn(2), torch.randn(2, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            net(*inputs)
    assert not kept


# ---- 8  Variants ---------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", [0.0, 0.4, None])
def test_mvtcae_by_its_formula(alpha, sigma_points):
    world = LinearGaussian(seed=6)
    options = dict(beta=0.5, term_weights={"b": 10})
    parts = world.wrong_experts(), world.decoders()
    model = dm.MVTCAE(*parts, **options if alpha is None else options | {"alpha": alpha})
    alpha = 0.9 if alpha is None else alpha
    mvae = dm.DiffMVAE(*parts, "mvae", **options)
    gaussian = lambda mu, logvar: Normal(mu, (logvar / 2).exp())
    kl = lambda q, p: kl_divergence(q, p).sum().item()
    q, standard = gaussian(*mvae.posterior(world.x)), Normal(f64([0.0] * DIM), 1.0)
    to_experts = [kl(q, gaussian(*mvae.encoders[k](world.x[k]))) for k in SIZES]
    kls = (1 - alpha) * kl(q, standard) + alpha / 3 * sum(to_experts)
    log_prob = {k: term.mean().item() for k, term in mvae.elbo(world.batch()).log_prob.items()}
    expected = (3 - alpha) / 3 * (log_prob["a"] + 10 * log_prob["b"] + log_prob["c"]) - 0.5 * kls
    assert total(model, world) == approx(expected, abs=1e-9)
    assert (total(model, world) == approx(total(mvae, world))) == (alpha == 0)
    with refused("defined for the product of all alone"):
        model.elbo(world.batch(), A=model.subsets[0])


def every_pattern(x):
    """x of 7 n examples, n of which lack what n others have, and observed; in the gaps are NaNs."""
    n = len(x["a"]) // 7
    patterns = dm.subsets(3)  # what is there
    observed = {k: there.repeat_interleave(n) for k, there in zip(SIZES, patterns.T)}
    return {k: torch.where(observed[k][:, None], x[k], torch.nan) for k in SIZES}, observed


@pytest.mark.parametrize("prior_expert", [False, True])
@pytest.mark.parametrize("family", ["mopoe", "mvae", "mmvae"])
def test_elbo_of_incomplete_examples(family, prior_expert, sigma_points):
    """ELBO = log p(x_o) − Σ_A ω_A KL(q(z|x_A) ‖ p(z|x_o)), as if there were no modalities but o."""
    world, options = LinearGaussian(seed=2), dict(beta=0.5, term_weights={"b": 10})
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
    weighed = dm.IncompleteDiffMVAE(*parts, **options, prior_expert=prior_expert)
    a, b, c = elbo.log_prob.values()
    assert_close(weighed.elbo(x, observed).total, a + 10 * b + c - 0.5 * elbo.kl)
    mu, logvar = model.posterior(x, observed)
    for pattern, *q in zip(dm.subsets(3), mu[:: 2 * DIM], logvar[:: 2 * DIM]):
        assert_close(q, [part[0] for part in complete.posterior(chosen(world.x, pattern))])
    for only in SIZES:  # of a part of the modalities, those of it that are observed
        rows = {k: there[observed[only]] for k, there in observed.items()}
        mu, _ = model.posterior({only: x[only][observed[only]]}, rows)
        assert_close(mu[0], complete.posterior({only: world.x[only]})[0][0])


@pytest.mark.parametrize("family", ["mopoe", "mvae", "mmvae"])
@pytest.mark.parametrize("prior_expert", [False, True])
def test_complete_examples_are_as_in_the_base_class(family, prior_expert, sigma_points):
    world = LinearGaussian(seed=2)
    parts = world.wrong_experts(), world.decoders(), family, 0.5, {"b": 10}, prior_expert
    x, everywhere = world.batch(), {k: torch.ones(2 * DIM) > 0 for k in SIZES}
    incomplete, complete = dm.IncompleteDiffMVAE(*parts), dm.DiffMVAE(*parts)
    assert_close(incomplete.elbo(x, everywhere).terms(), complete.elbo(x).terms())
    assert_close(incomplete.posterior(x, everywhere), complete.posterior(x))
    one = {"b": x["b"]}
    assert_close(incomplete.posterior(one, everywhere), complete.posterior(one))


def test_an_example_of_which_nothing_is_observed_is_refused():
    world = LinearGaussian()
    x, nowhere = world.batch(), {k: torch.arange(2 * DIM) != 1 for k in SIZES}
    for prior_expert in (False, True):
        model = dm.IncompleteDiffMVAE(world.experts(True), world.decoders(),
                                      prior_expert=prior_expert)
        for f in (model.elbo, model.posterior):
            with refused("an example has nothing observed: leave it out"):
                f(x, nowhere)
    with refused("no encoder or decoder for ..labels..: there are"):
        model.elbo(x, {**nowhere, "labels": nowhere["a"]})


@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_what_stands_in_the_gaps_reaches_neither_values_nor_gradients(decoder):
    """Of four faces one lacks both others, one its picture; each has something."""
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


def toy_fit(model, terms, s, data, watch=None):
    """fit of "fit", one of the named terms, as the model's stage."""
    before = torch.get_rng_state()
    fitted = dm.fit(s, "model", model, [(model, 1e-2)], terms, "fit", {"x": data}, watch)
    assert torch.equal(torch.get_rng_state(), before)
    return fitted


def toy(out, size=1.0, watch=None, during={}, **changes):
    """fit on a line of numbers, with dropout so that every step needs its own random numbers.

    size scales a term that is shown and not maximised; during: {k: what is called in the k-th step}
    """
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    data = torch.linspace(-1, 1, 60).view(20, 3)
    loss = lambda x: (model(x) - x[:, :1]).square()[:, 0]
    steps = itertools.count(1)

    def terms(i):
        during.get(next(steps), bool)()
        return {"fit": -loss(data[i]), "size": size * data[i, 0]}

    averaged, seconds = toy_fit(model, terms, toy_settings(out, **changes), data, watch)
    assert seconds > 0
    return [p.clone() for p in (*model.parameters(), *averaged.parameters())]


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def stop_after(step, out):
    """Press Ctrl-C in that step of toy: it is finished and saved."""
    usual = signal.getsignal(signal.SIGINT)
    message = f"stopped after step {step}, saved in .*model.pt: run it again"
    with pytest.raises(KeyboardInterrupt, match=message) as stopped:
        toy(out, during={step: press_ctrl_c})
    assert stopped.value.args[1] == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is usual


def saved_in(out):
    return torch.load(Path(out, "model.pt"), weights_only=True)


def read_history(out):
    """The rows of model.csv, {term: float}, where there is a value."""
    with open(Path(out, "model.csv"), newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    """Even if the file is overwritten as soon as it is read."""
    whole = toy(tmp_path / "whole")
    stop_after(20, tmp_path / "parts")

    def overwrite():
        with open(tmp_path / "parts" / "model.pt", "r+b") as file:
            file.write(bytes(os.stat(file.fileno()).st_size))

    resumed = toy(tmp_path / "parts", during={1: overwrite})
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    assert saved_in(tmp_path / "whole")["step"] == 40 and not list(tmp_path.rglob("*.part"))
    rows, others = (read_history(tmp_path / name) for name in ("whole", "parts"))
    for row in rows + others:
        del row["seconds"]
    assert rows == others and [row["step"] for row in rows] == [20, 40]
    again = toy(tmp_path / "whole", watch=lambda averaged: pytest.fail("it is finished"))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_averaged_weights_are_the_moving_average(tmp_path, monkeypatch):
    """Against the recursion, with the weights of each step recorded where it draws its seed."""
    history, original, model, x = [], dm.seed_at, nn.Linear(2, 1), torch.randn(10, 2)

    def record(*arguments):
        history.append(model.weight.detach().clone())
        return original(*arguments)

    monkeypatch.setattr(dm, "seed_at", record)
    terms = lambda i: {"fit": -model(x[i])[:, 0].square()}
    s = toy_settings(tmp_path, steps=150, ema=0.93)  # reached at step 119
    averaged, _ = toy_fit(model, terms, s, x)
    expected = history[0]
    for step, weight in enumerate([*history[1:], model.weight.detach()]):
        decay = min(0.93, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert_close(averaged.weight, expected)
    steps = torch.stack([(b - a).abs().max() for a, b in zip(history, history[1:])])
    rates = torch.tensor([1e-2 * min(1, (k + 1) / 100, (150 - k) / 500) for k in range(149)])
    assert (steps <= 1.5 * rates).all()  # Adam moves by the learning rate, which rises and falls
    assert steps[0] <= 1.01e-4 and 1e-4 < steps[90:].max() <= 4e-3


def test_the_statistics_of_batch_norm_reach_the_averaged_model(tmp_path):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(10, 2) + 5
    terms = lambda i: {"fit": -model(x[i]).square().sum(1)}
    averaged, _ = toy_fit(model, terms, toy_settings(tmp_path), x)
    assert model[1].num_batches_tracked == 40 and not averaged.training
    for average, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        assert torch.equal(average, buffer)


def test_each_part_has_its_own_learning_rate_and_the_gradient_is_clipped(tmp_path):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.randn(10, 2)
    start = copy.deepcopy(model)
    terms = lambda i: {"fit": -1000 * model(x[i])[:, 0].square()}
    rates = [(model[0], 1e-3), (model[1], 1e-1)]
    dm.fit(toy_settings(tmp_path, steps=1), "model", model, rates, terms, "fit", {"x": x})
    moved = [(a.weight - b.weight).abs().max().item() for a, b in zip(model, start)]
    assert moved == approx([1e-3 / 500, 1e-1 / 500], rel=0.05)  # the last step of the cooldown
    moments = [state["exp_avg"] for state in saved_in(tmp_path)["optimizer"]["state"].values()]
    assert sum((10 * m).square().sum() for m in moments).item() == approx(1, rel=1e-3)  # β₁ = 0.9


def test_history_holds_the_means_since_the_row_before(tmp_path, monkeypatch):
    monkeypatch.setattr(dm, "INTERVAL", 25)
    model, x, seen, watched = nn.Linear(2, 1), torch.randn(10, 2), [], []

    def terms(i):
        named = {"fit": -model(x[i])[:, 0].square(), "first": x[i, 0]}
        seen.append({name: term.mean().item() for name, term in named.items()})
        return named

    def watch(averaged):
        assert not averaged.training and saved_in(tmp_path)["step"] == len(seen)
        watched.append(-averaged(x).square().mean().item())
        return {"held-out fit": watched[-1]}

    toy_fit(model, terms, toy_settings(tmp_path, steps=50), x, watch)
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == [20, 25, 40, 50]
    for row, (start, end) in zip(rows, itertools.pairwise([0, 20, 25, 40, 50])):
        for name in ("fit", "first"):
            assert row[name] == approx(np.mean([step[name] for step in seen[start:end]]), rel=1e-4)
        assert row["gradient"] > 0 and row["seconds"] > 0
    assert [row.get("held-out fit") for row in rows] == [None, watched[0], None, watched[1]]
    assert Image.open(tmp_path / "model.png").size == (600, 3 * 120)  # fit, first, gradient


def test_seeds_differ_by_step_stage_and_run():
    keys = itertools.product((0, 1), dm.STAGES, range(100))
    assert len({dm.seed_at(*key) for key in keys}) == 400


def test_other_settings_and_other_data_are_refused_by_name(tmp_path):
    toy(tmp_path, steps=2)
    with refused(r"seed was 0 and is 3, steps was 2 and is 3.*or change --out"):
        toy(tmp_path, steps=3, seed=3)
    model, s = nn.Linear(3, 1), toy_settings(tmp_path, steps=2)
    with refused(r"another run \(examples was '20, checksum \w{8}' and is '20, checksum"):
        toy_fit(model, None, s, torch.ones(20, 3))
    assert toy(tmp_path, steps=2, prior_steps=3)  # of no concern to the model


class Malicious:
    """Unpickled with code allowed, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"not a checkpoint", [1], Malicious("executed")])
def test_what_is_no_checkpoint_is_refused_and_code_in_it_is_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = Path("model.pt")
    with refused("model.pt is missing: that run has to be made first"):
        dm.read_checkpoint(path)
    torch.save(content, path)
    for _ in range(2):  # whole, then cut short
        with refused("^model.pt cannot be read as a checkpoint .*: move it away, or take another"):
            dm.read_checkpoint(path)
        os.truncate(path, path.stat().st_size // 2)
    assert not Path("executed").exists()


def test_a_checkpoint_too_large_for_the_memory_is_not_called_broken(tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise MemoryError

    (tmp_path / "model.pt").touch()
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        dm.read_checkpoint(tmp_path / "model.pt")


def test_the_checksum_knows_every_example():
    data = {"a": torch.arange(24).view(12, 2), "b": torch.ones(12, dtype=torch.uint8)}
    sums = {dm.checksum(data), dm.checksum({name: x[:11] for name, x in data.items()})}
    for name, example in itertools.product(data, range(12)):
        changed = data[name].clone()
        changed[example] += 1
        sums.add(dm.checksum(data | {name: changed}))
    assert len(sums) == 2 + 2 * 12 and min(sums).startswith("11, checksum ")
    assert dm.checksum(dict(reversed(data.items()))) == dm.checksum(data)


def test_a_broken_loss_stops_and_keeps_the_checkpoint(tmp_path):
    stop_after(3, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    message = "^size not finite before step 20: lower the .* what was saved is kept"
    with pytest.raises(FloatingPointError, match=message):
        toy(tmp_path, size=math.nan)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_what_is_only_to_be_looked_at_ends_no_training(tmp_path, capsys):
    def watch(averaged):
        raise OSError("no space for the preview")

    toy(tmp_path / "preview", watch=watch)
    (tmp_path / "history" / "model.csv").mkdir(parents=True)
    toy(tmp_path / "history")
    said = capsys.readouterr().out
    assert "no space for the preview: training goes on" in said
    assert re.search("Is a directory: .*model.csv': training goes on", said)
    assert saved_in(tmp_path / "preview")["step"] == saved_in(tmp_path / "history")["step"] == 40


def test_ctrl_c_in_the_last_preview_stops_the_run(tmp_path):
    """After saving; what is watched then is finished, and in the history."""
    def watch(averaged):
        press_ctrl_c()
        return {"held-out fit": 5.0}

    with pytest.raises(KeyboardInterrupt, match="stopped after step 40, saved in .*model.pt"):
        toy(tmp_path, watch=watch)
    assert saved_in(tmp_path)["step"] == 40 and read_history(tmp_path)[-1]["held-out fit"] == 5
    toy(tmp_path, watch=watch)  # nothing is left to train, and nothing to watch


SCRIPT = """
import sys, diffmvae, train_celeba as celeba
diffmvae.INTERVAL = 15
celeba.FACES = {"train": 40, "test": 12, "anew": 12}
sys.argv[0] = "train_celeba.py"
diffmvae.main(celeba.run, celeba.Settings, celeba.__doc__)
"""


def start(out, steps, **streams):
    """A training in its own process."""
    flags = f"""--out {out} --steps {steps} --size 16 --latent-dim 16 --channels 8 --batch-size 2
        --encoder-channels 8 --prior-steps 1 --evaluations 1 --device cpu""".split()
    command = [sys.executable, "-c", SCRIPT, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def wait_until(process, out, saved):
    """Until so many steps are saved."""
    while not Path(out, "model.pt").exists() or saved_in(out)["step"] < saved:
        assert process.poll() is None
        time.sleep(0.05)


QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_twice_at_random_and_run_again(tmp_path):
    """kill -9 of a training in its own process, at any moment: the weights end up the same."""
    whole = start(tmp_path / "whole", 60, **QUIET)
    for saved in (15, 30):
        process = start(tmp_path / "killed", 60, **QUIET)
        wait_until(process, tmp_path / "killed", saved)
        time.sleep(np.random.default_rng(saved).uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed", 60, **QUIET).wait() == 0 and whole.wait() == 0
    one, other = saved_in(tmp_path / "whole"), saved_in(tmp_path / "killed")
    assert one["step"] == other["step"] == 60
    for part in ("model", "averaged"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part])
    moments = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(m.values() for m in moments)) for k in a)


def test_a_second_ctrl_c_acts_as_usual():
    with pytest.raises(KeyboardInterrupt), dm.interruptible() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_sigterm_saves_and_says_so(tmp_path):
    process = start(tmp_path, 1500, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(process, tmp_path, 15)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143
    step, sentence = saved_in(tmp_path)["step"], said.decode().splitlines()[-1]
    path = tmp_path / "model.pt"
    assert sentence == f"train_celeba.py: stopped after step {step}, saved in {path}: run it again"


def test_a_reader_that_dies_ends_no_training(tmp_path):
    """As in 2>&1 | head -1; nor does a history that cannot be written."""
    (tmp_path / "model.csv").mkdir()
    process = start(tmp_path, 1500, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.read(1)
    process.stdout.close()
    wait_until(process, tmp_path, 30)  # two checkpoints
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert saved_in(tmp_path)["step"] >= 30


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    stop_after(3, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    part = tmp_path / f"model.{os.getpid()}.part"
    part.symlink_to("/dev/full")  # every write fails, as on a full disk
    with refused("model.pt cannot be written .*before is whole: make room"):
        toy(tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == before and not part.is_symlink()


def test_causes_are_short_and_plain():
    assert dm.why(ValueError("no\n way")) == "no way"
    assert dm.why(ValueError("long " * 99)).count("long") == 25
    assert dm.why(KeyError()) == "KeyError"


# ---- 10  Measures and pictures -------------------------------------------------------------------

def test_f1_by_hand():
    actual = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    predicted = torch.tensor([[0.9, 0.2, 0.6, 0.5], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert dm.f1_score(predicted, actual) == approx((0.5 + 0 + 1 + 0) / 4)


@given(seeds)
@settings(max_examples=5)
def test_frechet_distance_of_two_gaussians(seed):
    """Commuting covariances: ‖m_a − m_b‖² + Σ (s_a − s_b)²."""
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


@pytest.mark.filterwarnings("ignore:cov")
def test_features_that_are_not_finite_are_named():
    for b in (torch.full((9, 3), torch.nan), torch.randn(1, 3)):
        with pytest.raises(FloatingPointError, match="features are not finite, or of one picture"):
            dm.frechet_distance(torch.randn(9, 3), b)


def test_save_grid(tmp_path):
    pictures = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)])
    dm.save_grid(tmp_path / "grid.png", {"a row": pictures, "another": pictures[:2, :1]})
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 2 * 66 and {0, 128, 255} <= set(np.unique(grid[:64, -190:]).tolist())
    second = grid[66:130, -198:]
    assert (second[:, :64] == 0).all() and (second[:, 66:130] == 128).all()


def test_save_curves(tmp_path):
    """One panel a term: a rising curve goes from bottom left to top right; held out in red."""
    history = [{"step": k, "seconds": k / 2, "up": float(k), "flat": 1.0} for k in range(1, 101)]
    history[0]["up"] = -1e6  # at the start, beyond the panel
    for k in (49, 99):
        history[k]["held-out up"] = 50.0
    dm.save_curves(tmp_path / "curves.png", history)
    picture = np.asarray(Image.open(tmp_path / "curves.png")).astype(int)
    assert picture.shape == (240, 600, 3)
    panel = picture[20:115, 95:590]
    row, column = np.nonzero(panel.sum(-1) == 0)  # black
    assert row[column < 60].min() > 80 and row[column > 480].max() < 15
    red_row, red_column = np.nonzero((panel[..., 0] > 200) & (panel[..., 1] < 50))
    assert 230 < red_column.min() < 260 and red_column.max() > 480
    assert abs(np.median(red_row) - 50) < 6  # 50 between 10 and 100


def test_a_first_row_with_the_held_out_objective_makes_no_panel_more(tmp_path):
    rows = [{"step": k, "fit": k, "held-out fit": k - 1, "gradient": 1.0} for k in (10.0, 20.0)]
    dm.save_curves(tmp_path / "curves.png", rows)
    assert Image.open(tmp_path / "curves.png").size == (600, 2 * 120)


@pytest.fixture
def judged():
    """judged by a judge that sees two features, the first pixels."""
    posterior = lambda x: (x["image"].flatten(1)[:, :2], torch.full((len(x["image"]), 2), 99.0))
    return partial(dm.judged, Stub(posterior=posterior))


def median_by_hand(pictures):
    """The median of each pixel's 3 × 3 neighbours, edges repeated."""
    padded = np.pad(pictures.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], "edge")
    height, width = pictures.shape[2:]
    shifts = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.tensor(np.sort(np.stack(shifts), axis=0)[4])


def test_judged_by_hand(judged):
    real = torch.rand(300, 3, 4, 4) - 0.5
    shift = torch.zeros(3, 4, 4)
    shift[0, 0, 0] = 0.3
    table = judged({"same": real, "moved": real + shift, "halved": 0.5 * real}, real)
    features = real.flatten(1)[:, :2]
    halved = 0.25 * (features.mean(0).square() + features.var(0)).sum().item()
    assert table["same"]["Fréchet distance"] == approx(0, abs=1e-4)
    assert table["moved"]["Fréchet distance"] == approx(0.09, abs=1e-4)
    assert table["halved"]["Fréchet distance"] == approx(halved, rel=0.01)
    for measure in ("sharpness", "grain"):
        assert table["same"][measure] == approx(1) and table["halved"][measure] == approx(0.25)


def test_judged_pictures_are_clamped_and_sharp_along_both_sides(judged):
    real = torch.rand(300, 3, 4, 4) - 0.5
    row = judged({"outside": 1e5 * real}, real.sign())["outside"]
    assert row.keys() == {"Fréchet distance", "sharpness", "grain"}
    assert row["Fréchet distance"] == approx(0, abs=0.02)
    assert row["sharpness"] == approx(1, abs=0.02)
    stripes = torch.zeros(5, 3, 4, 4)
    stripes[..., 2:, :] = 1.0  # differs from row to row, not from column to column
    smooth = median_by_hand(real)
    energy = (smooth.diff(dim=2).square().mean() + smooth.diff(dim=3).square().mean()).item()
    for picture in (stripes, stripes.mT):
        row = judged({"stripes": picture}, real)["stripes"]
        assert row["sharpness"] == approx(1 / 3 / energy) and row["grain"] == 0


def test_grain_is_not_sharpness(judged):
    edges = torch.zeros(200, 3, 8, 8)
    edges[..., 4:] = 0.8
    speckled = edges.clone()
    speckled[:, :, 2::4, 2::4] += 0.2  # single pixels
    real = edges + 0.01 * torch.randn_like(edges)
    table = judged({"clean": edges, "speckled": speckled}, real)
    assert table["speckled"]["sharpness"] == approx(table["clean"]["sharpness"], rel=0.01)
    assert table["speckled"]["grain"] > 10 and table["clean"]["grain"] == 0
    grain = (real - median_by_hand(real)).square().mean().item()
    assert table["speckled"]["grain"] == approx(4 * 0.04 / 64 / grain, rel=1e-3)
    with refused("the real pictures are flat"):
        judged({"clean": edges}, torch.zeros(4, 3, 8, 8))


# ---- 11  What both scripts share -----------------------------------------------------------------

@pytest.fixture
def command(tmp_path, capsys):
    """command(run, *flags): main as a script calls it."""
    with pytest.MonkeyPatch.context() as patch:
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, getattr(sys, stream))  # main changes them

        def main(run, *flags):
            flags = ["--out", str(tmp_path), "--device", "cpu", *flags]
            patch.setattr(sys, "argv", ["here/script.py", *flags])
            dm.main(run, celeba.Settings, "")

        yield main


@pytest.mark.parametrize("problem, status, message", [
    (dm.InputError("give another"), 2, "give another"),
    (FloatingPointError("KL not finite"), 2, "KL not finite"),
    (PermissionError(13, "Permission denied", "x.csv"), 2, ".* Permission denied: 'x.csv'"),
    (torch.OutOfMemoryError("CUDA out"), 2, "out of memory: to train give a smaller .*"),
    (MemoryError(), 2, "out of memory: to train give a smaller --batch-size, else .*"),
    (KeyboardInterrupt("stopped after step 3", signal.SIGINT), 130, "stopped after step 3"),
    (KeyboardInterrupt("stopped after step 3", signal.SIGTERM), 143, "stopped after step 3"),
    (KeyboardInterrupt(), 130, "stopped: run it again"),
])
def test_what_ends_a_run_is_one_line(command, capsys, problem, status, message):
    def run(s):
        raise problem

    with pytest.raises(SystemExit) as ended:
        command(run)
    assert ended.value.code == status
    assert re.fullmatch(rf"script\.py: {message}\n", capsys.readouterr().err)
    problem = RuntimeError("a mistake in the code")
    with pytest.raises(RuntimeError, match="a mistake"):
        command(run)


@pytest.mark.parametrize("device", ["tpu", "meta", "xla", "hpu"])
def test_a_device_that_cannot_be_used_is_refused(command, capsys, device):
    with pytest.raises(SystemExit, match="2"):
        command(None, "--device", device)
    message = rf"script\.py: --device {device} cannot be used .{{,200}}: give another\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_streams_without_letters_and_streams_that_are_no_files(command):
    written = io.BytesIO()
    sys.stdout = io.TextIOWrapper(written, "ascii")
    command(lambda s: dm.show({"F1": {"é": {"d": 0.25}}}))
    sys.stdout.flush()
    assert b"| ? | 0.250 |" in written.getvalue()
    sys.stdout = text = io.StringIO()  # it has no encoding, and no reconfigure
    command(lambda s: print("é", sys.stdout.isatty()))
    assert text.getvalue() == "é False\n"


@pytest.mark.parametrize("name, value, message", [
    ("steps", 0, "give at least 1"), ("multipliers", [1, 0], "give at least 1"),
    ("seed", -1, "give at least 0"), ("beta", -1.0, "give at least 0"),
    ("rate", math.nan, "give at least 0"), ("measured", 1, "give at least 2"),
    ("tokens", 2, "give at least 3"), ("weighting", "velo", r"choose from \('likelihood', '"),
])
def test_nonsense_is_refused(name, value, message):
    with refused(re.escape(f"{name} {value}: ") + message):
        cub.Settings(**{name: value})


def test_paths_and_numbers_of_numpy_are_settings(tmp_path, quick):
    s = tiny(out=tmp_path, steps=np.int64(3), rate=np.float64(1e-3), ema=np.float32(0.5),
             multipliers=(np.int64(1), 2), decoder="feedforward", seed=np.int64(1), beta=1)
    assert (s.multipliers, s.beta) == ([1, 2], 1.0)
    types = [type(value) for value in (s.out, s.steps, s.rate, s.ema, s.seed, s.beta)]
    assert types == [str, int, float, float, int, float]
    celeba.run(s)
    assert celeba.Settings(**results_in(tmp_path)["settings"]) == s
    settings = dm.read_checkpoint(tmp_path / "model.pt")["settings"]
    assert settings["multipliers"] == [1, 2] and type(settings["rate"]) is float
    celeba.load(tmp_path)


def test_settings_of_the_bound_and_of_the_surrogate():
    def found(s):
        return s.kl_weight, s.label_weight, s.objective, s.in_nats, s.is_bound

    surrogate, bound = (0.01, 10, "surrogate", False, False), (1, 1, "ELBO", True, True)
    s = celeba.Settings()
    assert found(s) == surrogate and found(replace(s, weighting="likelihood")) == bound
    assert found(replace(s, decoder="feedforward")) == bound
    assert found(replace(replace(s, weighting="likelihood"), weighting="simple")) == surrogate
    assert found(replace(s, weighting="likelihood", beta=2.0)) == (2, 1, "surrogate", True, True)
    assert found(replace(s, weighting="likelihood", weight=3.0)) == (1, 3, "surrogate", True, True)
    mvtcae = replace(s, weighting="likelihood", family="mvtcae")
    assert found(mvtcae) == (1, 1, "surrogate", True, False)
    supervised = celeba.Settings(decoder="none", weighting="likelihood")
    assert found(supervised) == (0, 10, "surrogate", False, False)
    assert celeba.Settings(decoder="none", beta=0.5).kl_weight == 0.5
    birds = cub.Settings()
    assert (birds.label_weight, birds.picture_evaluations, s.picture_evaluations) == (5, 8, None)
    for changes in (dict(weighting="likelihood"), dict(decoder="feedforward")):
        assert replace(birds, **changes).picture_evaluations is None
    assert cub.Settings(data="x", small=True).picture_evaluations is None
    assert cub.Settings(evaluations=50).picture_evaluations == 50
    assert dm.diffusion_decoder(tiny(cub.Settings)).evaluations == 8
    model, _ = celeba.build(tiny())
    assert model.beta == 0.01 and model.term_weights == {"attributes": 10}


def test_defaults_for_drawn_real_and_small():
    drawn, real = celeba.Settings(), celeba.Settings(data="x")
    assert (drawn.size, real.size, real.latent_dim, real.mirror) == (32, 128, 256, False)
    faces, birds = (script.Settings(data="x", small=True) for script in (celeba, cub))
    assert (faces.size, faces.multipliers, faces.patch, faces.mirror) == (64, [1, 2, 2], 2, True)
    assert (birds.size, birds.tokens, birds.text, birds.mirror) == (32, 32, "small", True)
    spelled_out = celeba.Settings(**{**vars(faces), "small": False})  # is the same run
    assert spelled_out.training_settings("prior") == faces.training_settings("prior")
    assert celeba.Settings(data="x", small=True, size=32, mirror=False).mirror is False
    with refused("--small is for real data: give their folder with --data"):
        celeba.Settings(small=True)


@pytest.mark.parametrize("wrong, message", [
    (dict(latent_dim=60, prior_net="unet"), "--latent-dim 60: .* a square number"),
    (dict(patch=3), "size 32 cannot be halved"),
    (dict(size=22, decoder="feedforward"), "size 22 cannot be halved 2 times"),
    (dict(attention=5), r"--attention 5: give 0 or one of \[16, 8\]"),
])
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with refused(message):
        celeba.build(celeba.Settings(**wrong))


def test_the_unet_attends_where_it_is_told():
    for attention, expected in ((0, []), (16, [32] * 5), (8, [64] * 5)):  # two down, three up
        model, _ = celeba.build(celeba.Settings(attention=attention))
        unet = model.decoders["image"].net
        blocks = [layer for layer in [*unet.down, *unet.up] if isinstance(layer, dm.ResBlock)]
        attending = [b for b in blocks if isinstance(b.attention, dm.Attention)]
        assert [b.conv1.out_channels for b in attending] == expected


def test_mvtcae_is_built():
    model, _ = celeba.build(tiny(family="mvtcae"))
    assert type(model) is dm.MVTCAE and (model.alpha, model.beta) == (0.9, 0.01)
    weights = {"image": 2.1 / 3, "mask": 2.1 / 3, "attributes": 10 * 2.1 / 3}
    assert model.term_weights == approx(weights)


def test_supervised_is_the_likelihood_of_mask_and_attributes_given_the_image():
    model, prior = celeba.build(tiny(decoder="none"))
    assert prior is None and set(model.encoders) == {"image"}
    x = tiny_batch()
    model.encoders["image"][-1].bias.data[16:] = -60  # q(z|image) is its mean
    nudge(model.decoders)
    elbo, (z, _) = model.elbo(x), model.posterior({"image": x["image"]})
    p = {k: d.likelihood(d.net(z)) for k, d in model.decoders.items()}
    expected = {k: p[k].log_prob(x[k]).flatten(1).sum(1) for k in ("mask", "attributes")}
    assert_close(elbo.log_prob, expected)
    assert_close(elbo.total, expected["mask"] + 10 * expected["attributes"])
    assert elbo.kl.min() > 100


def test_the_papers_latent_priors():
    birds = lambda s: cub.build(s, cub.text_parts(cub.Settings(), TWO_BIRDS)[1])
    for script, build, shape in ((celeba, celeba.build, (1, 4, 4)), (cub, birds, (1, 16))):
        for net, kind, expected in (("unet", dm.UNet, shape), ("mlp", dm.ResidualMLP, (16,))):
            _, prior = build(tiny(script.Settings, prior_net=net))
            assert type(prior.net) is kind and prior.shape == expected
            assert prior.sample(3).shape == (3, 16)


@pytest.mark.parametrize("options, compiles", [
    (dict(data="x", device="cuda"), True), (dict(data="x", device="cpu"), False),
    (dict(data="x", device="cuda", small=True), False), (dict(device="cuda"), False),
    (dict(data="x", device="cuda", compile=False), False), (dict(compile=True), True),
])
def test_what_is_compiled_by_default(options, compiles):
    assert celeba.Settings(**options).compiles == compiles


def test_compiled_networks_learn_the_same_under_the_same_names(tmp_path, monkeypatch, quick):
    original, compiled, averages = nn.Module.compile, [], []

    def compile(module, **options):
        compiled.append(module)
        original(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    data, states = celeba.draw_faces(16), []
    for flag in (False, True):
        s = tiny(out=tmp_path / str(flag), compile=flag)
        torch.manual_seed(0)
        dm.train(s, data, *celeba.build(s), celeba.get_batch, averages.append)
        states.append(saved_in(s.out))
    kinds = [type(network) for network in compiled]  # of the model, the attributes' MLPs are not
    assert sorted(kinds, key=str) == [dm.ConvDecoder, dm.ConvEncoder, dm.ConvEncoder, dm.UNet]
    assert all(network._compiled_call_impl is not None for network in compiled)
    parts = [part for average in averages for part in average.modules()]
    assert all(part._compiled_call_impl is None for part in parts)
    for part in ("model", "averaged"):
        assert_close(states[0][part], states[1][part])
    assert states[0]["settings"] == states[1]["settings"]


def test_mirrored_flips_a_picture_and_its_mask_together():
    picture = torch.arange(1000 * 3 * 2 * 4).view(1000, 3, 2, 4)
    x = {"image": picture, "mask": -picture[:, :1], "attributes": torch.rand(1000, 18)}
    x["caption"] = torch.randint(9, (1000, 2, 6))
    out = dm.mirrored(x)
    flipped = (out["image"][:, 0, 0, 0] == picture[:, 0, 0, 3]).view(-1, 1, 1, 1)
    assert 400 < flipped.sum() < 600
    for name in ("image", "mask"):
        assert torch.equal(out[name], torch.where(flipped, x[name].flip(-1), x[name]))
    assert out["attributes"] is x["attributes"] and out["caption"] is x["caption"]


def test_what_is_mirrored_and_what_is_held_out(tmp_path, monkeypatch, quick):
    """Mirrored are batches of the training, if asked; watched are the first test examples."""
    mirrored, data, previews = [], celeba.draw_faces(16), []
    data["test"] = {name: x[torch.arange(300) % 12] for name, x in data["test"].items()}
    monkeypatch.setattr(dm, "mirrored", lambda x: mirrored.append(len(x["image"])) or x)
    original, sampled = dm.sample_gaussian, []

    def sample_gaussian(mu, logvar):
        sampled.append(tuple(mu.shape))
        return original(mu, logvar)

    monkeypatch.setattr(dm, "sample_gaussian", sample_gaussian)
    for mirror, batches in ((False, []), (True, [64, 64, 64])):
        s = tiny(out=tmp_path / str(mirror), mirror=mirror, batch_size=64)
        pair = celeba.build(s)
        model, latents, _ = dm.train(s, data, *pair, celeba.get_batch, previews.append)
        assert mirrored == batches and previews.pop() is model
        assert sampled[-2:] == [(256, 16)] * 2  # the prior's two steps learn from samples
    mu, _ = model.posterior(celeba.get_batch(data["train"]))
    assert_close(latents.mean, mu.mean(0))
    (row,) = read_history(s.out)
    torch.manual_seed(s.seed)
    pieces = [celeba.get_batch(data["test"], slice(k, k + 64)) for k in range(0, 256, 64)]
    with torch.no_grad():
        totals = torch.cat([model.elbo(x).total for x in pieces])
    assert row["held-out surrogate"] == approx(totals.mean().item(), rel=1e-5)
    assert row["surrogate"] != row["held-out surrogate"]
    prior = Path(s.out, "prior.csv").read_text().splitlines()
    assert prior[0] == "step,seconds,surrogate,gradient" and prior[1].startswith("2,")


def test_only_a_supervised_run_on_such_pictures_judges(tmp_path):
    for decoder in ("none", "diffusion"):
        path = tmp_path / decoder / "model.pt"
        path.parent.mkdir()
        s = tiny(decoder=decoder)
        dm.save_checkpoint(path, {"settings": s.training_settings("model")})
    dm.check_judge(tiny(judge=tmp_path / "none"))
    (tmp_path / "foreign").mkdir()
    dm.save_checkpoint(tmp_path / "foreign" / "model.pt", {"step": 1})
    for options in (dict(judge="diffusion"), dict(judge="none", size=32),
                    dict(judge="none", data="real"), dict(judge="foreign")):
        options["judge"] = tmp_path / options["judge"]
        with refused("is no run of --decoder none on this --data and --size"):
            dm.check_judge(tiny(**options))
    with refused("model.pt is missing: that run has to be made first"):
        dm.check_judge(tiny(judge="nowhere"))
    for options in (dict(judge="x"), dict(family="mvtcae")):
        with refused("--decoder none has one encoder and draws no pictures: leave out"):
            cub.Settings(decoder="none", **options)


def test_what_is_no_finished_run_of_this_script_is_not_loaded(tmp_path, quick):
    s = tiny(out=tmp_path, measured=2)
    celeba.run(s)
    prior, before = torch.load(tmp_path / "prior.pt"), torch.get_rng_state()
    model, latents = celeba.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in (*model.parameters(), *latents.parameters()))
    assert not model.training and not latents.training
    for part, stage in ((model, "model"), (latents, "prior")):
        averaged = torch.load(tmp_path / f"{stage}.pt")["averaged"]
        assert all(torch.equal(value, averaged[k]) for k, value in part.state_dict().items())
    for changes, message in (
        ({"other": 1}, "is a run of another script, or of other code"),
        ({"prior_steps": 3}, "is not finished: run it again"),
        ({"steps": 4}, "is not finished: run it again"),
    ):
        settings = prior["settings"] | changes
        torch.save(prior | {"settings": settings}, tmp_path / "prior.pt")
        with refused(message):
            celeba.load(tmp_path)
    (tmp_path / "prior.pt").unlink()
    with refused("prior.pt is missing: that run has to be made first"):
        celeba.load(tmp_path)


def test_nats_where_the_evidence_is_known():
    """Pixels N(0.2, ½²) that z does not touch, and an encoder that knows nothing."""
    encoder = dm.zeroed(dm.Encoder(nn.Flatten(), nn.Linear(12, 4)))
    likelihood = lambda zeros: Normal(zeros.view(-1, 3, 2, 2) + 0.2, 0.5)
    decoder = dm.FeedForward(dm.zeroed(nn.Linear(2, 12)), likelihood)
    test = {"image": torch.randint(0, 256, (50, 3, 2, 2), dtype=torch.uint8)}
    model = dm.DiffMVAE({"image": encoder}, {"image": decoder}, "mvae", 0.5, {"image": 7})
    found = dm.nats(model, test, celeba.get_batch)
    log_prob = Normal(0.2, 0.5).log_prob(celeba.get_batch(test)["image"])
    expected = log_prob.sum((1, 2, 3)).mean().item()
    bits = -expected / 12 / math.log(2) + math.log2(127.5)
    terms = {"ELBO": expected, "image": expected, "KL": 0}
    terms["image given z, bits per dimension"] = bits
    assert found == {term: {"nats": approx(v, rel=1e-5, abs=1e-6)} for term, v in terms.items()}


def test_no_file_holds_nan(tmp_path):
    s, table = tiny(out=tmp_path), {"F1": {"the image": {"mask": math.nan}}}
    with pytest.raises(FloatingPointError, match="holds a number that is not finite: look at"):
        dm.save_results(s, {"tables": table})
    assert not any(tmp_path.iterdir())


def test_pictures_are_decoded_once(tmp_path, capsys):
    decoded = []
    read = lambda k: decoded.append(k) or np.full(2, k)
    for names in ([3, 5], [3, 5], [3, 6]):
        arrays = dm.decode_cached(tmp_path / "cache.pt", read, names)
        assert arrays.tolist() == [[k, k] for k in names]
    assert sorted(decoded) == [3, 3, 5, 6]
    assert dm.decode_cached(tmp_path / "cache.pt" / "x.pt", read, [3]).tolist() == [[3, 3]]
    assert "The pictures will be decoded again at each run" in capsys.readouterr().out


def test_files_of_other_systems_are_read_and_what_cannot_be_is_named(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xe9")
    assert dm.read_lines(path) == ["one", "two \ufffd"]
    for read in (dm.read_checkpoint, partial(dm.open_picture, mode="L")):
        with refused(f"^{tmp_path} cannot be .*Is a directory"):
            read(tmp_path)


# ---- CelebA: drawn faces and the released layout -------------------------------------------------

def face(size=64, seed=0, **changes):
    a = dict.fromkeys(celeba.ATTRIBUTES, False) | changes
    layers = celeba.draw_face(a, np.random.default_rng(seed), size)
    return layers[..., :3], layers[..., 3] == 1


@pytest.mark.parametrize("name", celeba.ATTRIBUTES)
@pytest.mark.parametrize("size", [32, 64])
def test_every_attribute_shows(name, size):
    bald = {"Male": True} if name == "Bald" else {}
    change = np.abs(face(size, **bald)[0].astype(int) - face(size, **bald, **{name: True})[0])
    assert (change.max(-1) > 24).sum() >= 3


@given(seeds)
@settings(max_examples=20)
def test_mask_is_everything_but_skin_and_background(seed):
    """Repainting skin leaves the mask alone; outside it are only background and skin colours."""
    rng = np.random.default_rng(seed)
    a = celeba.draw_attributes(rng) | {"Heavy_Makeup": False, "Mustache": False}
    picture, mask = face(128, seed, **a)
    outside = np.unique(picture[~mask], axis=0)
    assert len(outside) <= 2 and mask.any()
    pale, pale_mask = face(128, seed, **a | {"Pale_Skin": not a["Pale_Skin"]})
    assert (mask == pale_mask).all() and (picture != pale).any()


def test_drawn_attributes_are_plausible_and_all_occur():
    rng = np.random.default_rng(0)
    drawn = [celeba.draw_attributes(rng) for _ in range(500)]
    for a in drawn:
        assert sum(a[name] for name in celeba.HAIR) <= 1
        assert not (a["Bald"] and (a["Wavy_Hair"] or a["Bangs"] or a["Wearing_Hat"]))
        assert list(a) == celeba.ATTRIBUTES
    assert all(0.02 < np.mean([a[name] for a in drawn]) < 0.7 for name in celeba.ATTRIBUTES)


def test_drawn_faces_are_the_same_at_every_run(quick):
    first, second = celeba.draw_faces(16), celeba.draw_faces(16)
    shapes = {"image": (12, 3, 16, 16), "mask": (12, 1, 16, 16), "attributes": (12, 18)}
    assert {k: v.shape for k, v in first["test"].items()} == shapes
    assert all(torch.equal(first[s][k], second[s][k]) for s in first for k in first[s])
    for one, other in itertools.combinations(first.values(), 2):
        assert not torch.equal(one["image"][:12], other["image"][:12])


ANNO, MAPPING = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"
PICTURE, HAIR = "CelebA-HQ-img/3.jpg", "CelebAMask-HQ-mask-anno/0/00003_hair.png"


@pytest.fixture
def released(tmp_path):
    """Five faces in the released layout, 64 px pictures, parts of 32 px: two to train, one of
    CelebA's validation split, two to test."""
    folder = tmp_path / "CelebAMask-HQ"
    names = [f"Other_{i}" for i in range(22)] + celeba.ATTRIBUTES[::-1]
    lines, mapping = ["5", " ".join(names)], ["idx orig_idx orig_file"]
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    boxes = dict(hair=(0, 0, 32, 8), l_eye=(4, 4, 8, 16), skin=(0, 0, 32, 32))
    origins = {3: 162_769, 2001: 162_770, 2: 182_637, 1: 0, 4: 202_598}
    for k, origin in origins.items():
        parts = folder / "CelebAMask-HQ-mask-anno" / str(k // 2000)
        parts.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (64, 64), (10 * (k % 10), 100, 200))
        picture.save(folder / PICTURE.replace("3", str(k)), quality=100)
        for part, box in boxes.items():
            layer = Image.new("L", (32, 32))
            layer.paste(255, box)
            layer.save(parts / f"{k:05d}_{part}.png")
        values = ["1" if name in ("Smiling", "Other_3") or k in (2, 4) else "-1" for name in names]
        lines.append(f"{k}.jpg " + " ".join(values))
        mapping.append(f"{k} {origin} {origin + 1:06d}.jpg")
    (folder / ANNO).write_text("\n".join(lines) + "\n")
    (folder / MAPPING).write_text("\n".join(mapping) + "\n")
    return folder


def test_released_layout_is_read_back(released):
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
        path.unlink()  # the second time comes from the cache
    again = celeba.read_faces(released, 16)
    assert torch.equal(again["train"]["image"], data["train"]["image"])


def changed(file, old, new):
    """A function that replaces old in a text file of a folder."""
    def change(folder):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


def drawn_anew(**options):
    """A function that puts a picture in the place of one part of a mask."""
    return lambda folder: Image.new(**options).save(folder / HAIR)


def without_mask(folder):
    """Of picture 3, but for the skin."""
    for path in (folder / HAIR).parent.glob("00003_[!s]*.png"):
        path.unlink()


@pytest.mark.parametrize("damage, message", [
    (changed(ANNO, "2001.jpg -1", "2001.jpg"), r"line 4 \(2001.jpg -1.*is not as released"),
    (changed(ANNO, "2001.jpg -1", "2001.jpg 0"), r"line 4 \(2001.jpg 0 .*is not as"),
    (changed(ANNO, "2001.jpg -1", "2001.jpg -1 -1"), r"line 4 \(2001.jpg -1 -1.*is not as"),
    (changed(ANNO, "2.jpg", "two.jpg"), r"line 5 \(two.jpg"),
    (changed(ANNO, "2.jpg", "3.jpg"), "line 5 has 3 a second time"),
    (changed(ANNO, "Smiling", "Smirking"), "lacks Smiling"),
    (changed(ANNO, "5\n", "6\n"), "has 5 faces, its first line says 6"),
    (changed(MAPPING, "2001 162770 162771.jpg", "2001"), r"mapping.txt, line 3 \(2001\) is not as"),
    (changed(MAPPING, "2 182637 182638.jpg", ""), "mapping.txt lacks picture 2:"),
    (changed(MAPPING, "182637", "200"), "has 1 pictures of the test split: at least 2"),
    (lambda folder: (folder / PICTURE).unlink(), r"3\.jpg cannot be read"),
    (lambda folder: os.truncate(folder / PICTURE, 500), r"3\.jpg cannot be read"),
    (lambda folder: (folder / PICTURE).parent.rename(folder / "x"), "CelebA-HQ-img is missing"),
    (drawn_anew(mode="L", size=(32, 16), color=255), r"hair\.png is of another size"),
    (drawn_anew(mode="L", size=(32, 32), color=1), r"hair\.png has no value above 1"),
    (without_mask, "mask-anno/0 has no mask of picture 3: unpack it again, or take"),
])
def test_faces_that_are_not_as_released_are_refused(released, damage, message):
    damage(released)
    with refused(message):
        celeba.read_faces(released, 16)


def test_table3_never_sees_what_it_predicts():
    given = []

    def posterior(x):
        given.append(set(x))
        return torch.zeros(2, len(x["image"]), 2)

    x = {"image": torch.zeros(3, 3, 2, 2), "mask": torch.ones(3, 1, 2, 2)}
    x = {k: v.byte() for k, v in (x | {"attributes": torch.eye(3, 4)}).items()}
    ones = Stub(sample=lambda z: torch.ones(len(z), 4))
    zeros = Stub(sample=lambda z: torch.zeros(len(z), 1, 2, 2))
    model = Stub(encoders=list(x), decoders=dict(attributes=ones, mask=zeros), posterior=posterior)
    scores = celeba.table3(model, x, x)
    assert given == [{"image", "mask"}, {"image"}, {"image", "attributes"}, {"image"}]
    for label in ("both others", "the image"):
        assert scores[label] == {"attributes": approx(2 / 5), "mask": 0}
    assert scores["nothing"] == {"attributes": approx(1 / 2), "mask": 1}
    given.clear()
    model.encoders = ["image"]  # Supervised
    assert celeba.table3(model, x, x)["both others"] == {} and given == [{"image"}, {"image"}]


def test_the_best_constant_is_learned_from_the_training_set():
    def best(train, test):
        masks = lambda rows, value: torch.full((len(rows), 1), value)
        data = lambda rows, value: {"attributes": torch.tensor(rows), "mask": masks(rows, value)}
        model = Stub(encoders=[], decoders={})
        return celeba.table3(model, data(train, 1), data(test, 0))["nothing"]

    all_three, first = (1 + 2 / 4) / 2, (2 / 4 + 1) / 2  # the means are 1, 1/3, 1/3
    found = best([[1, 0, 1], [1, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]])
    assert found == {"attributes": approx(max(all_three, first)), "mask": 0}
    known_from_test_only = best([[1, 0, 1], [1, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 1, 0]])
    assert known_from_test_only["attributes"] == 0


shifted = lambda by: Stub(sample=lambda z: z[:, :1, None, None] + by)  # a decoder


def summed(x):
    """A posterior of no variance: z is the sum of what is given."""
    mu = sum(v.flatten(1)[:, :1].float() for v in x.values())
    return mu, torch.full_like(mu, -torch.inf)


def test_what_is_drawn_from_what_and_should_show_what(tmp_path):
    shift = {"image": 0, "mask": 0.1, "attributes": 0.2}  # tells what the decoders make apart
    scale = {"image": 1, "mask + attributes": 110, "mask": 10, "attributes": 100}
    x = {k: scale[k] * torch.tensor([1.0, 2, 3])[:, None, None, None] for k in shift}
    model = Stub(posterior=summed, decoders={k: shifted(by) for k, by in shift.items()})
    prior = Stub(sample=lambda n: 1000.0 + torch.arange(n)[:, None])
    training = {k: 2000 * v for k, v in x.items()}
    model.encoders = list(x)
    made = celeba.draw(tmp_path / "grid.png", model, x, prior, training)
    nothing = ["aggregate posterior", "latent prior", "N(0, I)"]
    assert list(made) == [*scale, *nothing]
    assert Image.open(tmp_path / "grid.png").size[1] == 9 * 66
    assert list(celeba.draw(tmp_path / "grid.png", model, x)) == list(scale)
    for label in scale:
        shown = dict(made[label])
        assert_close(shown.pop("image"), scale[label] * x["image"])
        told = {"mask", "attributes"} if label == "image" else set(label.split(" + "))
        assert set(shown) == told and all(shown[name] is x[name] for name in told)
    assert made["latent prior"]["image"].flatten().tolist() == [1000, 1001, 1002]
    assert made["N(0, I)"]["image"].abs().max() < 10
    assert_close(made["aggregate posterior"]["image"], 2000 * 111 * x["image"])
    for label in nothing:
        for name, value in made[label].items():
            assert (value == made[label]["image"] + shift[name]).all()


def test_coherence_of_faces_by_hand():
    """Of a judge that sees a mask if the first pixel is above 0.3, and never attributes."""
    posterior = lambda x: (x["image"].flatten(1)[:, :2], torch.zeros(300, 2))
    decoders = {"mask": shifted(0.2), "attributes": shifted(-1e9)}
    judge, real = Stub(posterior=posterior, decoders=decoders), torch.rand(300, 3, 4, 4) - 0.5
    mask = (real[:, :1, :1, :1] + 0.2 > 0.5).float()
    made = {"same": {"image": real, "mask": mask, "attributes": mask}, "moved": {"image": -real}}
    table = celeba.pictures_table(judge, made, real)
    assert table["same"]["coherence, mask"] == approx(mask.mean().item())  # 0 where both are empty
    assert table["same"]["coherence, attributes"] == 0
    assert table["moved"] == dm.judged(judge, {"moved": -real}, real)["moved"]


# ---- Captions: the text VAE ----------------------------------------------------------------------

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
PAIR = torch.stack([CAPTIONS, CAPTIONS], 1)  # (2, 2, 7): BERT's tokens, GPT-2's


def logits_by_hand(decoder, tokens, z):
    """GPT-2 written out for one caption, (T,) tokens and (D,) z -> (T, V), z in both places."""
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_never_counts(attention):
    decoder, z = tiny_gpt2(), torch.randn(2, 6)
    padded = nn.functional.pad(PAIR, (0, 2))
    assert_close(decoder.log_prob(padded, z), decoder.log_prob(PAIR, z))
    encoder = cub.TextEncoder(tiny_bert(attn_implementation=attention), 6).eval()
    nudge(encoder, 0.3)  # else its attention is too even to notice padding
    for one, other in zip(encoder(padded), encoder(PAIR)):
        assert one.shape == (2, 6)
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_bert_reads_its_tokens_and_gpt2_writes_its_own():
    decoder, encoder, z = tiny_gpt2(), cub.TextEncoder(tiny_bert(), 6).eval(), torch.randn(2, 6)
    nudge(encoder, 0.3)
    assert not torch.allclose(encoder(PAIR)[0][0], encoder(PAIR)[0][1])
    other = CAPTIONS.flip(0)
    assert torch.equal(encoder(torch.stack([CAPTIONS, other], 1))[0], encoder(PAIR)[0])
    swapped = torch.stack([other, CAPTIONS], 1)
    assert torch.equal(decoder.log_prob(swapped, z), decoder.log_prob(PAIR, z))


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


def test_words_go_there_and_back():
    captions = ["this bird has a red cap , and white wings", "A bird, small & gris-bleu"] * 2
    tokenizers, _ = cub.text_parts(cub.Settings(), captions)
    tokens, words = cub.tokenise(tokenizers, captions[:2], 12), tokenizers[1]
    assert tokens.shape == (2, 2, 12)
    assert torch.equal(tokens[:, 0], tokens[:, 1])  # one tokenizer, twice
    first = tokens[0, 0]
    assert first[0] == words.bos_token_id and (first == words.eos_token_id).sum() == 1
    spelt = [captions[0], "a bird , small & gris - bleu"]
    assert cub.spell(tokenizers, tokens[:, 1]) == spelt
    with refused("captions: give a list of them, not one string"):
        cub.tokenise(tokenizers, captions[0], 12)
    assert cub.tokenise(tokenizers, [], 12).shape == (0, 2, 12)
    with refused("no word is twice in the captions"):
        cub.text_parts(cub.Settings(), ["one", "another"])


TWO_BIRDS = ["a red bird", "a blue bird"] * 2  # each word at least twice, as a vocabulary needs


def pretrained_like(*special, **names):
    """A tokenizer of single characters; special, under names, are one token each."""
    vocabulary = {word: k for k, word in enumerate([*special, *map(chr, range(32, 127))])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    base.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return hf.PreTrainedTokenizerFast(tokenizer_object=base, **names)


@pytest.mark.parametrize("small", [True, False])
def test_captions_end_and_what_looks_like_an_end_is_text(small):
    captions = ["a <EOS> b <PAD> [SEP] c [PAD] d <BOS> e", "a bird " * 9, ""] * 2
    names = dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>")
    tokenizers = [
        pretrained_like("[PAD]", "[CLS]", "[SEP]", pad_token="[PAD]", cls_token="[CLS]",
                        sep_token="[SEP]"),
        pretrained_like("<PAD>", "<BOS>", "<EOS>", **names),
    ]
    if small:
        tokenizers, _ = cub.text_parts(cub.Settings(), captions)
    for length in (80, 6):
        tokens = cub.tokenise(tokenizers, captions, length)  # (6, 2, length)
        for rows, words in zip(tokens.unbind(1), tokenizers):
            begin, end = words.bos_token_id, words.eos_token_id
            if begin is None:
                begin, end = words.cls_token_id, words.sep_token_id
            after = (rows == end).cumsum(1) - (rows == end).int() > 0
            assert ((rows == end).sum(1) == 1).all()
            assert torch.equal(rows == begin, torch.arange(length).expand(6, -1) == 0)
            assert torch.equal(rows == words.pad_token_id, after)
    spelt = cub.spell(tokenizers, cub.tokenise(tokenizers, captions, 80)[:, 1])
    for one, other in zip(spelt, captions):
        assert one.replace(" ", "").lower() == other.replace(" ", "").lower()


def test_small_networks_know_distances_from_the_start():
    """The inner product of two positions depends on nothing but how far apart they are."""
    s = cub.Settings(decoder="feedforward")
    model, _ = cub.build(s, cub.text_parts(s, TWO_BIRDS)[1], fresh=True)
    bert = model.encoders["caption"].bert.embeddings.position_embeddings
    for table in (bert.weight, model.decoders["caption"].gpt2.transformer.wpe.weight):
        gram = (table[:40] @ table[:40].T).detach()
        for k in range(40):
            assert_close(gram.diagonal(k), gram[0, k].expand(40 - k), atol=1e-3, rtol=0)
        assert gram[0, 1] < gram[0, 0] and gram[0, 8] < gram[0, 1]


def test_optimus_weights_are_found_by_their_names(tmp_path):
    encoder, other = (cub.TextEncoder(tiny_bert(), 6) for _ in range(2))
    decoder, another, path = tiny_gpt2(seed=1), tiny_gpt2(seed=2), tmp_path / "optimus.pt"
    theirs = {"bert.": "encoder.", "linear.": "encoder.linear.", "gpt2.": "decoder.",
              "memory.": "decoder.transformer.linear.",
              "embedding.": "decoder.transformer.linear_emb."}
    rename = lambda k: re.sub(r"^\w+\.", lambda ours: theirs[ours[0]], k)
    state = {rename(k): v for part in (encoder, decoder) for k, v in part.state_dict().items()}
    surplus = {"decoder.transformer.h.0.attn.bias": torch.ones(1)}
    extra = {"iter": 1, "beta": 0.5, "optimizer_state_dict": {}}
    extra["args"] = argparse.Namespace(device=torch.device("cpu"), latent_size=6)
    wrapped = {f"module.{k}": v for k, v in (state | surplus).items()}
    torch.save({"model_state_dict": wrapped, **extra}, path)  # as in Optimus's own training.bin
    cub.load_optimus(path, other, another)
    for a, b in ((encoder, other), (decoder, another)):
        for one, two in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(one, two)
    with refused("cannot be loaded .*size mismatch for 0.linear.weight.*fits --latent-dim"):
        cub.load_optimus(path, cub.TextEncoder(other.bert, 4), another)
    for wrong, message in (
        ({k: v for k, v in state.items() if "linear" not in k}, "lacks 0.linear.weight and 2 more"),
        ({"args": argparse.Namespace()}, "it lacks .* and 70 more"), ([1], "cannot be loaded"),
        ({"args": Malicious(tmp_path / "executed")}, "optimus.pt cannot be loaded"),
    ):
        torch.save(wrong, path)
        with refused(message):
            cub.load_optimus(path, other, another)
    assert not (tmp_path / "executed").exists()
    with refused("nowhere cannot be loaded .*No such file"):
        cub.load_optimus("nowhere", other, another)


def test_what_the_hub_does_not_give_is_one_sentence(tmp_path, monkeypatch):
    def unreachable(name, **options):
        raise ConnectionError("no\nroute")

    folder = str(tmp_path)
    with refused("cannot be had as GPT2LMHeadModel .*: give a local folder"):
        cub.pretrained(hf.GPT2LMHeadModel, folder)  # which is empty
    tiny_gpt2().gpt2.save_pretrained(folder)
    with refused("cannot be had as BertModel .it lacks "):
        cub.pretrained(hf.BertModel, folder)  # GPT-2's weights would leave BERT random
    monkeypatch.setattr(hf.GPT2LMHeadModel, "from_pretrained", unreachable)
    with refused(r"gpt2 cannot be had as GPT2LMHeadModel \(no route\): give a local"):
        cub.pretrained(hf.GPT2LMHeadModel, "gpt2")


@pytest.fixture
def local(tmp_path):
    """Settings for BERT and GPT-2 saved in folders, as for a user without the hub."""
    (words, _), _ = cub.text_parts(cub.Settings(), TWO_BIRDS)
    gpt2 = hf.GPT2Config(vocab_size=len(words) - 3, n_embd=2, n_head=2, n_layer=1)  # to enlarge
    bert = tiny_bert(vocab_size=len(words), num_hidden_layers=1)
    folders = dict(bert=tmp_path / "bert", gpt2=tmp_path / "gpt2")
    for network, folder in zip((bert, hf.GPT2LMHeadModel(gpt2)), folders.values()):
        network.save_pretrained(folder)
        words.save_pretrained(folder)
    return dict(text="pretrained", tokens=8, out=tmp_path / "run", **folders)


def test_pretrained_text_starts_from_its_weights(local):
    s = tiny(cub.Settings, **local)
    tokenizers, configs = cub.text_parts(s, TWO_BIRDS)
    torch.manual_seed(0)
    cub.build(s, configs)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model, _ = cub.build(s, configs, fresh=True)
    assert torch.equal(torch.get_rng_state(), after)  # for the same prior, begun or not
    encoder, decoder = model.encoders["caption"], model.decoders["caption"]
    theirs = hf.BertModel.from_pretrained(s.bert), hf.GPT2LMHeadModel.from_pretrained(s.gpt2)
    for ours, network in zip((encoder.bert, decoder.gpt2), theirs):
        found, wanted = ours.state_dict(), network.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name][: len(value)], value) for name, value in wanted.items())
    assert not decoder.every_subset
    assert decoder.gpt2.config.eos_token_id == tokenizers[1].eos_token_id


def test_a_folder_without_words_is_refused(local):
    s = tiny(cub.Settings, **local)
    for path in Path(s.bert).glob("*token*"):
        path.unlink()
    with refused("bert cannot be had as AutoTokenizer"):
        cub.text_parts(s, TWO_BIRDS)


def test_a_finished_pretrained_run_needs_its_own_folder_alone(local, quick):
    """And one that goes on, too."""
    s = tiny(cub.Settings, **local, measured=2)
    cub.run(s)
    sheet = Path(s.out, "samples.png").read_bytes()
    shutil.rmtree(s.bert)
    shutil.rmtree(s.gpt2)
    before = torch.get_rng_state()
    model, _, tokenizers = cub.load(s.out)
    assert torch.equal(torch.get_rng_state(), before)
    caption = cub.tokenise(tokenizers, ["a red bird"], s.tokens)
    z = dm.sample_gaussian(*model.posterior({"caption": caption}))
    assert len(cub.spell(tokenizers, model.decode(z)["caption"])) == 1
    Path(s.out, "prior.pt").unlink()
    cub.run(s)
    assert Path(s.out, "samples.png").read_bytes() == sheet
    Path(s.out, "text-out.json").rename(Path(s.out, "x"))
    with refused("tokenizer-out or text-out.json is missing: that run has to be made first"):
        cub.load(s.out)


def test_clip_score_and_distance(tmp_path):
    (words, _), _ = cub.text_parts(cub.Settings(), TWO_BIRDS)
    part = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(words), eos_token_id=words.eos_token_id, **part)
    vision = dict(image_size=16, patch_size=8, **part)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    clip = hf.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = [cub.pretrained(kind, str(tmp_path)) for kind in (hf.CLIPModel, hf.AutoTokenizer)]
    pictures, captions = torch.rand(6, 3, 16, 16) * 2 - 1, ["a red bird", "a blue bird", "bird"] * 2
    made = {"real": (pictures, captions), "dark": (-pictures, captions)}
    table = cub.table2(loaded, made, "cpu")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = words(captions, padding=True, return_tensors="pt")
    real, dark = ((x / 2 + 0.5 - mean) / std for x in (pictures, -pictures))
    out = clip(tokens["input_ids"], real, tokens["attention_mask"])
    cosine = (out.image_embeds * out.text_embeds).sum(1)  # both have length 1
    assert table["real"]["CLIP score"] == approx(100 * cosine.mean().item(), abs=1e-3)
    assert table["real"]["Fréchet, CLIP"] == approx(0, abs=1e-4)
    features = [clip.get_image_features(x).pooler_output for x in (dark, real)]
    distance = dm.frechet_distance(*features)
    assert table["dark"]["Fréchet, CLIP"] == approx(distance, rel=1e-3) and distance > 1e-3


# ---- Birds: drawn, and as released ---------------------------------------------------------------

@given(seeds)
def test_drawn_birds_show_what_their_captions_say(seed):
    rng = np.random.default_rng(seed)
    f = {k: str(rng.choice(list(v))) for k, v in cub.FACTORS.items()}
    picture, caption = cub.draw_bird(f, rng, 32), cub.write_caption(f, rng)
    said = cub.parse(caption)
    assert said.items() <= f.items() and len(said) >= 4
    assert ("shape" in said) == ("bill" in said)
    assert ("size" in said) == (f["size"] in caption.split())
    (seen,) = cub.read_colours(torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1)
    assert seen == {part: f[part] for part in cub.SPOT}


def test_every_factor_changes_the_picture():
    f = dict.fromkeys(cub.SPOT, "red") | {"shape": "short", "size": "small"}
    draw = lambda f: cub.draw_bird(f, np.random.default_rng(0), 32)
    for k in f:
        other = {"shape": "long", "size": "large"}.get(k, "blue")
        assert (draw(f | {k: other}) != draw(f)).any()


def test_what_is_generated_from_what(monkeypatch):
    monkeypatch.setattr(cub, "spell", lambda _, tokens: tokens.flatten().tolist())
    image, caption = torch.tensor([[1.0, 2, 3, 5], [10, 20, 30, 50]])
    x = {"image": image[:, None], "caption": caption.view(4, 1, 1).expand(4, 2, 1)}
    echo = Stub(sample=lambda z: z, log_prob=lambda x, z: z[:, 0] * x[:, 0, 0])
    both = {"image": echo, "caption": echo}
    model = Stub(posterior=summed, encoders=both, decoders=both)
    pairs = cub.generate(model, None, x, 2)
    made = {label: (picture.flatten().tolist(), said) for label, (picture, said) in pairs.items()}
    assert made == {
        "real": ([1, 2, 3, 5], [10, 20, 30, 50]),
        "caption from image": ([1, 2, 3, 5], [1, 2, 3, 5]),
        "image from caption": ([10, 20], [10, 20]),
    }
    z = {"both": image + caption, "the caption": caption, "the image": image,
         "another bird's image": image[[2, 3, 0, 1]]}
    nats = {label: {"nats": approx((caption * row).mean().item())} for label, row in z.items()}
    assert cub.caption_nats(model, x) == nats


def test_coherence_by_hand():
    red, blue = (torch.tensor(cub.COLOURS[c]).view(3, 1, 1) / 127.5 - 1 for c in ("red", "blue"))
    pictures = torch.stack([red.expand(3, 32, 32), blue.expand(3, 32, 32)])
    captions = [f"this bird has a red cap and a {rest}" for rest in ("red throat", "blue wing")]
    factors = [{"crown": "red", "body": "blue"}, {"crown": "red", "wing": "red"}]
    pairs = {"caption from image": (pictures, captions), "other": (pictures, ["zzz"] * 2)}
    given = {"colours": 3 / 4, "all factors": 2 / 4}
    assert cub.coherence(pairs, factors) == {"caption from image": given, "other": {"colours": 0}}


@pytest.fixture
def released_birds(tmp_path):
    """Six birds in CUB's layout: a grey picture, captions that are not ASCII or fewer than ten."""
    root, texts = tmp_path / "cub" / "CUB_200_2011", tmp_path / "cub" / "text"
    names = [f"{kind}/{name}.jpg" for kind in ("1.A", "2.B") for name in ("one", "two", "three")]
    for folder in ("1.A", "2.B"):
        (root / "images" / folder).mkdir(parents=True)
        (texts / folder).mkdir(parents=True)
    for k, name in enumerate(names):
        grey = Image.new("L", (60, 40), 100)
        (grey if k == 1 else Image.new("RGB", (40, 50), (200, 40, 40))).save(root / "images" / name)
        lines = [f"caption {j} of a café bird {k}" for j in range(3 if k == 2 else 10)]
        (texts / name).with_suffix(".txt").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "images.txt").write_text("".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n5 0\n6 0\n")
    return tmp_path / "cub"


def test_released_birds_are_read_back(released_birds):
    for _ in range(2):  # decoded, then from the cache
        birds = cub.read_birds(released_birds, 16)
        (pictures, captions, _), grey = birds["train"], birds["test"].pictures
        assert pictures.shape == (2, 3, 16, 16) and grey.shape == (4, 3, 16, 16)
        assert pictures.dtype == torch.uint8 and [len(ten) for ten in captions] == [10, 10]
        assert (pictures[0, 0].float() - 200).abs().max() < 6
        assert (grey[0].float() - 100).abs().max() < 4
        assert captions[0][3] == "caption 3 of a café bird 0"
        assert captions[1][3] == "caption 0 of a café bird 2"


@pytest.mark.parametrize("file, text, message", [
    ("images.txt", None, "images.txt is missing"),
    ("images.txt", "1 1.A/one.jpg\n2 1.A/two.jpg\n", "has 2 pictures, train_test_split.txt 6"),
    ("images/1.A/two.jpg", None, "two.jpg cannot be read"),
    ("../text/1.A/one.txt", None, "one.txt is missing or holds no caption"),
    ("../text/1.A/one.txt", "\n \n", "one.txt is missing or holds no caption"),
    ("train_test_split.txt", "1 2\n2 0\n3 1\n", r"split.txt, line 1 \(1 2\) is not as"),
    ("train_test_split.txt", "\n2 0\n3 1\n4 0\n5 0\n6 0\n", "split.txt lacks picture 1"),
    ("train_test_split.txt", "1 0\n2 0\n3 0\n4 0\n5 0\n6 0\n", "has 0 pictures of the train split"),
])
def test_bad_birds_are_named(released_birds, file, text, message):
    path = released_birds / "CUB_200_2011" / file
    path.unlink() if text is None else path.write_text(text)
    with refused(message):
        cub.read_birds(released_birds, 16)


def test_one_of_ten_captions_is_drawn():
    tokens = torch.arange(2 * 10 * 2 * 3, dtype=torch.int32).view(2, 10, 2, 3)
    data = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "caption": tokens}
    drawn = torch.stack([cub.get_batch(data)["caption"] for _ in range(300)])  # (300, 2, 2, 3)
    for k in range(2):
        seen, counts = drawn[:, k].unique(dim=0, return_counts=True)
        assert torch.equal(seen, tokens[k].long()) and counts.min() > 10


# ---- Baselines of another architecture (.github/baselines.md) ------------------------------------

def page_blocks():
    """[(tag, code)] of the page's Python blocks, at the tests' size and in few steps."""
    page = (ROOT / ".github/baselines.md").read_text("utf-8")
    page = page.replace("size, seed = 32, 0", "size, seed = 16, 0")
    page = re.sub(r"\bsteps=\d+", "steps=2", page).replace("times=250", "times=25")
    return re.findall(r"```python (\w+)\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def example(quick):
    """The names that the definitions of one example make, example(tag) -> {name: object}."""
    def definitions(tag):
        namespace = {}
        for wanted in ("shared", tag):
            exec(next(code for name, code in page_blocks() if name == wanted), namespace)
        return namespace

    return definitions


def covariance(size):
    """Of a Gaussian with unit variances and all sorts of correlations."""
    factor = torch.randn(size, size + 1, dtype=torch.float64)
    C = factor @ factor.T
    return C / C.diagonal().sqrt().outer(C.diagonal().sqrt())


def conditional(C, given):
    """z_hidden = K z_given + N(0, S) of N(0, C), where given: (D,) bool."""
    K = C[~given][:, given] @ torch.linalg.inv(C[given][:, given])
    return K, C[~given][:, ~given] - K @ C[given][:, ~given]


def exact_conditional(example, C, given):
    """MLD whose denoiser is that of N(0, C) with these dimensions given."""
    K, S = conditional(C, given)
    eye = torch.eye(len(S), dtype=torch.float64)

    def eps(z_t, c, alpha, sigma):
        assert_close(z_t[:, given], c[:, 0, given])  # what is given comes clean
        mean = c[:, 0, given] @ K.T  # (B, D_hidden)
        precision = torch.linalg.inv(alpha[..., None]**2 * S + sigma[..., None]**2 * eye)
        out = torch.full_like(z_t, 1e3)  # what is said of the given dimensions must not matter
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
    z = mld.sample(c, noise=noise, sampler=dm.ddim, evaluations=100)
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
    error = mld.error(z, c, f64([t]).expand(n), torch.randn_like(z))
    a2, s2 = mld.sde.alpha(f64(t)).square(), mld.sde.sigma(f64(t)).square()
    s = torch.linalg.eigvalsh(conditional(C, given)[1])
    expected = 4 / len(s) * (a2 * s / (a2 * s + s2)).sum().item()
    assert error.mean().item() == approx(expected, abs=5 * error.std().item() / n**0.5)


class Function(nn.Module):
    """A network that is a function."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


def correlated(r, sde):
    """eps_model(z, t) of two standard normals of correlation r, and E(z, ℓ) = −log of the ratio of
    p_t(z_i, z_j) to ½ p_t(z_i) p_t(z_j) + ½ N(0, I), which are the same here."""
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
    """Correlation 0.9, and 1.5 given: mean 1.35, variance 0.19, or with energies precision P =
    (1 + s)/(1 − r²) − s and mean (1 + s) r z_o/((1 − r²) P); replacement alone is far off."""
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
    """MMVAE+ of that world with its exact posteriors, moved by shift, and r_n(w) = N(0, 0)."""
    def constant(i):
        precision = f64([1 + 2 / VARIANCE, 1 + 1 / VARIANCE])  # of z given both, of w given its own
        mean = torch.stack([(TWO["a"] + TWO["b"])[0, 0], TWO[i][0, 1]]) / VARIANCE / precision
        return Function(lambda x: ((mean + shift).expand_as(x), -precision.log().expand_as(x)))

    def likelihood(mean):
        return Normal(mean, VARIANCE**0.5)

    encoders = {name: constant(name) for name in TWO}
    decoders = {name: dm.FeedForward(nn.Identity(), likelihood) for name in TWO}
    model = example("mmvae")["MMVAEPlus"](encoders, decoders, D=1).double()
    model.zeros = model.zeros.double()
    for logvar in model.logvars.values():
        nn.init.constant_(logvar, -torch.inf)
    return model


def evidence(own, other):
    """log p(x_own, x_other) of the term that draws w_own alone."""
    v = VARIANCE
    shared = MultivariateNormal(f64([0.0, 0.0]), f64([[1 + v, 1], [1, 1 + v]]))
    private = MultivariateNormal(f64([0.0, 0.0]), f64([[1 + v, 0], [0, v]]))
    x = torch.cat([own, other])  # (2, 2)
    return (shared.log_prob(x[:, 0]) + private.log_prob(x[:, 1])).item()


def test_mmvae_plus_is_the_evidence_at_the_exact_posteriors(example):
    exact = [evidence(TWO["a"], TWO["b"]), evidence(TWO["b"], TWO["a"])]
    assert exact == approx([-5.5616, -3.8816], abs=1e-4)
    x = {name: value.expand(50, 2) for name, value in TWO.items()}
    terms = plus_model(example).terms(x)  # (2, 50)
    assert_close(terms, f64(exact)[:, None].expand(2, 50))  # each sample of each


@pytest.mark.parametrize("shift", [-0.3, 0.2])
def test_mmvae_plus_is_below_the_evidence_by_the_divergence(example, shift):
    """Both experts are off alike, so the gap is that of z and that of w_m."""
    n = 100_000
    x = {name: value.expand(n, 2) for name, value in TWO.items()}
    terms = plus_model(example, shift).terms(x)
    gap = 0.5 * shift**2 * (2 + 3 / VARIANCE)  # ½ Δ² (precision of z + that of w)
    for term, (own, other) in zip(terms, [("a", "b"), ("b", "a")]):
        expected = evidence(TWO[own], TWO[other]) - gap
        assert term.mean().item() == approx(expected, abs=5 * term.std().item() / n**0.5)


def test_mmvae_plus_takes_what_is_its_own_from_what_is_given(example):
    """z from a given expert, each as often; w from q(w|x) for the one chosen, else from p(w)."""
    def certain(z, w):
        return Function(lambda x: (f64([z, w]).expand(len(x), 2), f64(-90.0).expand(len(x), 2)))

    def likelihood(mean):
        return Normal(mean, 1.0)

    encoders = {"a": certain(10.0, 50.0), "b": certain(20.0, 60.0), "c": certain(30.0, 70.0)}
    decoders = {name: dm.FeedForward(nn.Identity(), likelihood) for name in encoders}
    model, n = example("mmvae")["MMVAEPlus"](encoders, decoders, D=1), 10_000
    made = model.generate({name: torch.zeros(n, 2) for name in "ab"}, n)
    z = made["a"][:, 0]
    assert all(torch.equal(made[name][:, 0], z) for name in "bc")
    assert set(z.tolist()) == {10, 20} and (z == 10).double().mean().item() == approx(0.5, abs=0.03)
    for name, own, w in (("a", 10, 50), ("b", 20, 60)):
        assert_close(made[name][z == own, 1], torch.full_like(z[z == own], w))
        assert made[name][z != own, 1].std().item() == approx(1, abs=0.05)
    assert made["c"][:, 1].std().item() == approx(1, abs=0.05)
    nothing = model.generate({}, n)
    for values in nothing.values():
        assert values.std(0).tolist() == approx([1, 1], abs=0.05)


def test_baselines_page(quick, tmp_path, monkeypatch, capsys):
    """What the page's commands run, in few steps: each method's blocks, then the picture's."""
    monkeypatch.chdir(tmp_path)
    celeba.run(tiny(out="runs/supervised", decoder="none"))
    celeba.run(tiny(out="runs/drawn"))
    blocks = page_blocks()
    for tag in ("mld", "sbm", "mmvae", "figure"):
        namespace = {}
        for name, code in blocks:
            if name in ("shared", tag):
                exec(code, namespace)
    shown = capsys.readouterr().out
    for method in ("MLD", "SBM-VAE", "SBM-VAE-C", "MMVAE+"):
        assert f"| {method}, F1 given |" in shown and f"| {method}, pictures given |" in shown
        assert Path(f"runs/{method}.png").exists()
    assert Path("runs/baselines.png").exists()


# ---- The scripts, as a user runs them ------------------------------------------------------------

def on_meta(pair, data, get_batch):
    """Losses, gradients and samples of both stages on tensors without values: to read one, for
    which a GPU's whole queue is waited for, is an error, and so is arithmetic with another device.
    """
    model, prior = (part.to("meta") for part in pair)
    data, i = {k: x.to("meta") for k, x in data.items()}, torch.randint(8, (4,), device="meta")
    (-model.elbo(dm.mirrored(get_batch(data, i))).terms()["ELBO"].mean()).backward()
    prior.standardise(*model.posterior(get_batch(data)))
    (-prior.log_prob(torch.randn(4, 16, device="meta")).mean()).backward()
    made = model.decoders["image"].sample(prior.sample(4))
    assert made.device.type == "meta" and made.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("options", [
    {}, dict(weighting="likelihood"), dict(decoder="feedforward"), dict(attention=8),
])
def test_a_step_with_faces_never_waits_for_the_device(quick, options):
    data = celeba.draw_faces(16)["test"]
    on_meta(celeba.build(tiny(**options)), data, celeba.get_batch)


def test_a_step_with_birds_never_waits_for_the_device(quick):
    s, birds = tiny(cub.Settings), cub.draw_birds(16)
    tokenizers, configs = cub.text_parts(s, birds["test"].captions[0])
    data = cub.tensors(birds, tokenizers, s.tokens)["test"]
    on_meta(cub.build(s, configs), data, cub.get_batch)


FROM_NOTHING = {"aggregate posterior", "latent prior", "N(0, I)"}


@pytest.mark.parametrize("options", [
    {}, dict(weighting="likelihood"), dict(decoder="feedforward", family="mmvae"),
    dict(decoder="feedforward", family="mvtcae"),
])
def test_celeba_end_to_end(tmp_path, capsys, quick, options):
    s, sheet = tiny(out=tmp_path, **options), tmp_path / "samples.png"
    celeba.run(s)
    shown = capsys.readouterr().out
    assert shown.startswith("These faces are drawn; --data CelebAMask-HQ")
    assert ("ELBO" in shown) == s.is_bound
    assert set(results_in(tmp_path)["tables"]["F1 given"]["nothing"]) == {"attributes", "mask"}
    width, height = Image.open(sheet).size
    assert height // 66 == 9 and 10 * 66 < width < 13 * 66  # ten faces and the labels
    first = sheet.read_bytes()
    celeba.run(s)  # all is trained: measures and draws, the same
    assert sheet.read_bytes() == first
    model, prior = celeba.load(tmp_path)
    assert model.decode(prior.sample(2))["image"].shape == (2, 3, 16, 16)


def test_faces_are_judged(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    celeba.run(tiny(out="supervised", decoder="none"))
    assert not Path("supervised/prior.pt").exists()
    celeba.run(tiny(out="run", judge="supervised", measured=5))
    table = results_in("run")["tables"]["pictures given"]
    given = {"image", "mask + attributes", "mask", "attributes"} | FROM_NOTHING
    assert set(table) == given | {"drawn anew"}
    measures = {"Fréchet distance", "sharpness", "grain", "coherence, mask",
                "coherence, attributes"}
    assert set(table["N(0, I)"]) == measures == set(table["drawn anew"])


@pytest.mark.parametrize("options", [{}, dict(decoder="feedforward", family="mvae")])
def test_cub_end_to_end(tmp_path, capsys, quick, options):
    s = tiny(cub.Settings, out=tmp_path, measured=4, ema=0.9, **options)
    sheet = tmp_path / "samples.png"
    cub.run(s)
    assert capsys.readouterr().out.startswith("These birds are drawn; --data cub")
    tables = results_in(tmp_path)["tables"]
    given = {"both", "the caption", "the image", "another bird's image"}
    assert set(tables["log p of the caption, z given"]) == given
    assert ("Eq. 5" in tables) == s.is_bound
    table = tables["coherence"]
    made = {"caption from image", "image from caption"} | FROM_NOTHING
    assert set(table) == made | {"real"}
    assert table["real"]["all factors"] == 1 and table["real"]["colours"] > 0.9
    first = sheet.read_bytes()
    cub.run(s)  # all is trained: measures and draws, the same
    assert sheet.read_bytes() == first
    model, prior, tokenizers = cub.load(tmp_path)
    decoded = model.decode(prior.sample(2))
    assert decoded["image"].shape == (2, 3, 16, 16)
    assert len(cub.spell(tokenizers, decoded["caption"])) == 2


def test_birds_are_judged(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    cub.run(tiny(cub.Settings, out="supervised", decoder="none", measured=4))
    assert not Path("supervised/prior.pt").exists()
    nats = results_in("supervised")["tables"]["log p of the caption, z given"]
    assert set(nats) == {"the image", "another bird's image"}
    cub.run(tiny(cub.Settings, out="run", judge="supervised", measured=4))
    table = results_in("run")["tables"]["pictures given"]
    assert set(table) == {"drawn anew", "image from caption"} | FROM_NOTHING
    measures = {"Fréchet distance", "sharpness", "grain", "log p(caption)", "caption agrees"}
    assert all(set(row) == measures for row in table.values())


def test_real_faces_end_to_end(tmp_path, released, quick):
    s = tiny(out=tmp_path / "run", data=released, attention=0)
    celeba.run(s)
    assert results_in(s.out)["tables"]["F1 given"]["the image"].keys() == {"mask", "attributes"}


def test_real_birds_end_to_end_and_other_birds_are_refused(tmp_path, released_birds, quick):
    real = dict(data=released_birds, text="small", attention=0)
    s = tiny(cub.Settings, out=tmp_path, measured=2, **real)
    cub.run(s)
    assert "coherence" not in results_in(tmp_path)["tables"]
    before = {path: path.read_bytes() for path in tmp_path.glob("tokenizer-*/*")}
    (released_birds / "text" / "1.A" / "one.txt").write_text("other words, other words\n")
    with refused(r"model.pt is of another run .examples was '\d, checksum .* and is '\d, checksum"):
        cub.run(s)
    assert len(before) >= 4 and all(path.read_bytes() == was for path, was in before.items())


def test_command_line(tmp_path):
    def run(*flags):
        command = [sys.executable, ROOT / "train_celeba.py", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = run("--data", "nowhere", "--device", "cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout.startswith("Without --small the defaults for real data are for a GPU")
    assert re.fullmatch(r"train_celeba\.py: nowhere.* is missing: .*\n", done.stderr)
    flags = "--data --weighting --family --decoder --beta --prior-steps --device --judge --small"
    assert set(flags.split()) <= set(re.findall(r"--[a-z-]+", run("--help").stdout))


def test_readme_examples(tmp_path, monkeypatch, quick):
    """Every Python block of README and results runs, in order, beside small trained runs."""
    pages = [(ROOT / page).read_text("utf-8") for page in ("README.md", ".github/results.md")]
    code = re.findall(r"```python\n(.*?)```", "".join(pages), re.DOTALL)
    assert len(code) >= 3
    monkeypatch.chdir(tmp_path)
    kinds = {"bound": dict(weighting="likelihood"), "mopoe": dict(decoder="feedforward"),
             "supervised": dict(decoder="none")}
    for out in sorted(set(re.findall(r'"(runs/(?!png)\w+)"', "".join(code)))):
        script = cub if "birds" in out else celeba
        script.run(tiny(script.Settings, out=out, measured=4, **kinds.get(Path(out).name, {})))
    monkeypatch.setattr(celeba, "Settings", tiny)  # for what is measured at full size
    namespace = {}
    for block in code:
        exec(block.replace("(20, 50, 100, 200)", "(2, 3)"), namespace)
    for picture in re.findall(r'save_grid\("(.*?)"', "".join(code)):
        assert Path(picture).exists()
