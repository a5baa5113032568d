"""The mathematics of diffmvae.py against independent truths, and the scripts as a user runs them.

Grids, quadrature, recursions and closed forms stand on one side, the module on the other. Where a
quadratic function of a standard normal is averaged, two points ±1 a dimension are exact, not sampled.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import diffmvae as dm
import train_celeba as celeba
import train_cub as cub

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("ci")
torch.set_default_dtype(torch.float32)
ROOT = Path(__file__).parent
seeds, moderate = st.integers(0, 2**31), st.floats(-3, 3)


def gaussians(seed, *shape, dtype=torch.float64):
    """mu, logvar of the given shape."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(*shape, generator=g, dtype=dtype)
    return 1.5 * draw(), draw()


# ---- 1  Gaussian algebra ----------------------------------------------------------------------------


@given(seeds, st.integers(1, 4))
def test_product_is_the_normalised_product_of_densities(seed, m):
    mu, logvar = gaussians(seed, m, 1)
    z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_density = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(0)
    p = log_density.softmax(0)
    mean = (p * z).sum()
    fused_mu, fused_logvar = dm.product_of_experts(mu, logvar)
    assert fused_mu.item() == pytest.approx(mean.item(), abs=1e-6)
    assert fused_logvar.exp().item() == pytest.approx((p * (z - mean) ** 2).sum().item(), rel=1e-5)


@given(seeds)
def test_product_ignores_order_and_grouping(seed):
    mu, logvar = gaussians(seed, 2, 4, 3)
    whole = dm.product_of_experts(mu, logvar)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    shuffled = dm.product_of_experts(mu[:, order], logvar[:, order])
    halves = [dm.product_of_experts(mu[:, i], logvar[:, i]) for i in (slice(0, 1), slice(1, 4))]
    grouped = dm.product_of_experts(*(torch.stack(x, dim=1) for x in zip(*halves)))
    for other in (shuffled, grouped):
        torch.testing.assert_close(other, whole)


@given(seeds)
def test_product_with_masks_is_the_product_of_those_present(seed):
    mu, logvar = gaussians(seed, 7, 3, 5)
    present = dm.subsets(3)
    fused = dm.product_of_experts(mu, logvar, present)
    mu_absent = torch.where(present[..., None], mu, torch.nan)  # what is absent is never looked at
    torch.testing.assert_close(dm.product_of_experts(mu_absent, logvar, present), fused)
    flat = logvar.masked_fill(~present[..., None], torch.inf)  # an expert that knows nothing
    torch.testing.assert_close(dm.product_of_experts(mu, flat), fused)
    for i, mask in enumerate(present):
        alone = dm.product_of_experts(mu[i, mask], logvar[i, mask])
        torch.testing.assert_close((fused[0][i], fused[1][i]), alone)
    every = dm.product_of_experts(mu[:, None], logvar[:, None], present)  # (7, 1, 3, 5) and (7, 3)
    torch.testing.assert_close(every[0].diagonal(dim1=0, dim2=1).T, fused[0])


@given(st.lists(st.tuples(moderate, st.floats(-700, 700)), min_size=1, max_size=4))
def test_product_is_exact_at_extreme_log_variances(experts):
    getcontext().prec = 50
    mu, logvar = (torch.tensor(x, dtype=torch.float32)[:, None] for x in zip(*experts))
    precision = [(-Decimal(v)).exp() for v in logvar[:, 0].tolist()]
    mean = sum(p * Decimal(m) for p, m in zip(precision, mu[:, 0].tolist())) / sum(precision)
    fused_mu, fused_logvar = dm.product_of_experts(mu, logvar)
    assert fused_mu.item() == pytest.approx(float(mean), abs=2e-6)
    assert fused_logvar.item() == pytest.approx(float(-sum(precision).ln()), rel=1e-6, abs=1e-6)


def test_product_of_nobody_is_loud():
    mu, logvar = dm.product_of_experts(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2).bool())
    assert mu.isnan().all() and logvar.isinf().all()


@given(seeds)
def test_kl_agrees_with_torch_and_with_sampling(seed):
    (mu, logvar), (mu_p, logvar_p) = gaussians(seed, 6, 4), gaussians(seed + 1, 6, 4)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(mu_p, (logvar_p / 2).exp())
    torch.testing.assert_close(dm.kl_divergence(mu, logvar, mu_p, logvar_p), kl_divergence(q, p).sum(-1))
    standard = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(dm.kl_divergence(mu, logvar), kl_divergence(q, standard).sum(-1))


def test_kl_is_the_mean_log_ratio():
    torch.manual_seed(0)
    mu, logvar = gaussians(3, 4)
    z = dm.sample_gaussian(*(x.expand(400_000, 4) for x in (mu, logvar)))
    q, p = Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    error = 5 * ratio.std() / len(z) ** 0.5
    assert abs(ratio.mean() - dm.kl_divergence(mu, logvar)) < error


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
    torch.manual_seed(0)
    mu, logvar = torch.tensor([-2.0, 0.5]), torch.tensor([-2.0, 1.5])
    z = dm.sample_gaussian(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    torch.testing.assert_close(z.mean(0), mu, atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), rtol=0.02, atol=0)


# ---- 2  Forward SDE ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(beta_max=2.0), dm.VPSDE(0.5, 8.0)])
def test_marginals_solve_the_sde(sde):
    """dm/dt = −½ β m and dV/dt = β (1 − V), integrated with the midpoint rule."""
    n, mean, var = 20_000, 1.0, 0.0
    for i in range(n):
        t = torch.tensor((i + 0.5) / n, dtype=torch.float64)
        beta, h = sde.g2(t).item(), 1 / n
        mean += -0.5 * beta * (mean - 0.25 * h * beta * mean) * h
        var += beta * (1 - (var + 0.5 * h * beta * (1 - var))) * h
        if i + 1 in (n // 100, n // 3, n):
            t = torch.tensor((i + 1) / n, dtype=torch.float64)
            assert sde.alpha(t).item() == pytest.approx(mean, rel=1e-6)
            assert sde.sigma(t).item() ** 2 == pytest.approx(var, rel=1e-6)


@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(beta_max=2.0)])
def test_log_snr(sde):
    assert dm.VPSDE() == dm.VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-4)  # as the authors have it
    t = torch.linspace(1e-4, 1, 1001, dtype=torch.float64, requires_grad=True)
    ell = sde.log_snr(t)
    torch.testing.assert_close(ell, (sde.alpha(t) ** 2 / sde.sigma(t) ** 2).log())
    (slope,) = torch.autograd.grad(ell.sum(), t)
    torch.testing.assert_close(-slope, sde.g2(t) / sde.sigma(t) ** 2)  # what makes λ = g² uniform in ℓ
    assert sde.log_snr_ends() == pytest.approx([ell[-1].item(), ell[0].item()])


@given(st.floats(1e-6, 1))
def test_time_at_inverts_log_snr_in_float32(t):
    sde, t = dm.VPSDE(), torch.tensor(t)
    torch.testing.assert_close(sde.time_at(sde.log_snr(t)), t, rtol=3e-6, atol=0)


# ---- 3  Samplers ------------------------------------------------------------------------------------


def exact_eps(m, s2, sde):
    """The denoiser of data N(m, s²): σ (x_t − α m) / (α² s² + σ²), as eps_model(x_t, t)."""
    return lambda x, t: sde.sigma(t) * (x - sde.alpha(t) * m) / (sde.alpha(t) ** 2 * s2 + sde.sigma(t) ** 2)


def schedule(sde, t):
    """α(t), σ(t) as floats."""
    t = torch.tensor(t, dtype=torch.float64)
    return sde.alpha(t).item(), sde.sigma(t).item()


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("m, s2", [(0.7, 0.3), (-1.0, 2.0)])
def test_ddim_follows_its_recursion(steps, m, s2):
    sde, calls = dm.VPSDE(), []
    eps = exact_eps(m, s2, sde)
    x1 = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    out = dm.ddim(lambda x, t: calls.append(float(t)) or eps(x, t), x1, sde, steps)
    times = [1.0] if steps == 1 else [1 + (sde.t_min - 1) * i / (steps - 1) for i in range(steps)]
    assert calls == pytest.approx(times)
    K, points = 1.0, [schedule(sde, t) for t in times] + [(1.0, 0.0)]
    for (a, s), (a_next, s_next) in zip(points, points[1:]):
        K *= (a * a_next * s2 + s * s_next) / (a * a * s2 + s * s)
    torch.testing.assert_close(out, m + K * (x1 - points[0][0] * m), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_euler_maruyama_follows_its_recursion(steps):
    torch.manual_seed(0)
    m, s2, sde, calls = 0.7, 0.3, dm.VPSDE(), []
    eps, n = exact_eps(m, s2, sde), 400_000
    record = lambda x, t: calls.append(float(t)) or eps(x, t)
    out = dm.euler_maruyama(record, torch.randn(n, dtype=torch.float64), sde, steps)
    ends = sde.log_snr_ends()
    ells = [ends[0] + (ends[1] - ends[0]) * i / (steps - 1) for i in range(steps)]
    times = [sde.time_at(torch.tensor(ell, dtype=torch.float64)).item() for ell in ells]
    assert calls == pytest.approx(times, rel=1e-4)
    M, V = 0.0, 1.0
    for t, u in zip(times, times[1:]):
        (a, s), h, beta = schedule(sde, t), t - u, sde.g2(t)
        v = a * a * s2 + s * s
        f = 1 + h * beta * (0.5 - 1 / v)
        M, V = f * M + h * beta * a * m / v, f * f * V + h * beta
    a, s = schedule(sde, times[-1])
    k = a * s2 / (a * a * s2 + s * s)
    M, V = m + k * (M - a * m), k * k * V
    assert out.mean().item() == pytest.approx(M, abs=5 * (V / n) ** 0.5 + 1e-4)
    assert out.var().item() == pytest.approx(V, rel=5 * (2 / n) ** 0.5 + 1e-3)


@pytest.mark.parametrize("sampler", [dm.ddim, dm.euler_maruyama])
def test_more_steps_bring_the_right_spread(sampler):
    torch.manual_seed(0)
    sde, x1 = dm.VPSDE(), torch.randn(200_000, dtype=torch.float64)
    spread = lambda steps: sampler(exact_eps(0.0, 0.25, sde), x1, sde, steps).std().item()
    errors = [abs(spread(steps) - 0.5) for steps in (5, 20, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.mark.parametrize("sampler", [dm.ddim, dm.euler_maruyama])
def test_samplers_give_each_mode_its_share(sampler):
    """¼ N(−2, 0.1²) + ¾ N(1, 0.2²)."""
    sde = dm.VPSDE()
    weight, mean, var = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 1.0]), torch.tensor([0.01, 0.04])

    def eps(x, t):
        a, s = sde.alpha(t), sde.sigma(t)
        v = a**2 * var + s**2
        log_share = weight.log() - 0.5 * v.log() - 0.5 * (x[:, None] - a * mean) ** 2 / v
        return s * (log_share.softmax(1) * (x[:, None] - a * mean) / v).sum(1)

    torch.manual_seed(0)
    x = sampler(eps, torch.randn(20_000), sde, 200)
    left = x < -0.5
    assert left.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert x[left].mean().item() == pytest.approx(-2, abs=0.02)
    assert x[~left].std().item() == pytest.approx(0.2, abs=0.02)


# ---- 4  The score-matching bound --------------------------------------------------------------------


class Denoiser(nn.Module):
    """The net whose v makes Diffusion predict eps(x_t, z, ℓ), a function given in closed form."""

    def __init__(self, eps, sde):
        super().__init__()
        self.eps, self.sde = eps, sde

    def forward(self, x_t, log_snr, z=None):
        ell = log_snr.view(-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = ell.sigmoid().sqrt(), (-ell).sigmoid().sqrt()
        return (self.eps(x_t, z, alpha, sigma) - sigma * x_t) / alpha


def diffusion(eps, d, sde, weighting="likelihood"):
    return dm.Diffusion(Denoiser(eps, sde), (d,), sde, weighting)


def gaussian_eps(m, s2):
    return lambda x, z, alpha, sigma: sigma * (x - alpha * m) / (alpha**2 * s2 + sigma**2)


def exact_bound(model, x):
    """E log_prob for x: (d,), the integral by 1,024 midpoints in ℓ, E over ε by ±1 in each dimension.

    The error of a linear denoiser is quadratic in ε and separate in each dimension: both are exact.
    """
    ends, n = model.sde.log_snr_ends(), 1024
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = model.sde.time_at(ends[0] + (ends[1] - ends[0]) * u).repeat(2)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(n)
    eps = sign[:, None].expand(2 * n, len(x))
    return model.log_prob(x.expand(2 * n, -1), None, t, eps).mean().item()


def closed_form(x, m, s2, sde):
    """The bound at x for the exact denoiser of N(m, s²), derived by hand for any schedule."""
    ell_1, ell_0 = sde.log_snr_ends()
    a2, s1 = 1 / (1 + math.exp(-ell_1)), 1 / (1 + math.exp(ell_1))
    tail = lambda r: math.log(1 + r * s2) + (1 - (x - m) ** 2 / s2) / (1 + r * s2)
    prior = -0.5 * (a2 * x * x + s1 - 1 - math.log(s1))
    reconstruction = -0.5 * (1 + math.log(2 * math.pi) - ell_0)
    return prior + reconstruction - 0.5 * (tail(math.exp(ell_0)) - tail(math.exp(ell_1)))


SDES = [dm.VPSDE(), dm.VPSDE(beta_max=2.0), dm.VPSDE(0.3, 6.0, 1e-2)]


@pytest.mark.parametrize("sde", SDES)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3), moderate, st.floats(0.05, 4))
def test_bound_of_the_exact_denoiser_has_its_closed_form(sde, x, m, s2):
    model = diffusion(gaussian_eps(m, s2), len(x), sde)
    expected = sum(closed_form(value, m, s2, sde) for value in x)
    got = exact_bound(model, torch.tensor(x, dtype=torch.float64))
    assert got == pytest.approx(expected, rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("m, s2", [(0.0, 1.0), (0.6, 0.2)])
def test_bound_of_the_exact_denoiser_is_the_log_density(m, s2):
    model = diffusion(gaussian_eps(m, s2), 1, dm.VPSDE(t_min=1e-6))
    for x in (-1.0, 0.3, 2.0):
        density = Normal(m, s2**0.5).log_prob(torch.tensor(x)).item()
        assert exact_bound(model, torch.tensor([x], dtype=torch.float64)) == pytest.approx(density, abs=5e-3)


@pytest.mark.parametrize("sde", [dm.VPSDE(), dm.VPSDE(beta_max=2.0)])
@given(seeds, st.floats(-1, 1), st.floats(0.1, 2), st.floats(0.02, 0.1))
@settings(max_examples=10)
def test_bound_stays_below_the_density_of_the_reverse_sde(sde, seed, m, s2, size):
    """ε̂ = a(t) x_t + c(t) keeps the model Gaussian: its mean and variance follow two ODEs in ℓ (RK4)."""
    p = size * np.random.default_rng(seed).standard_normal(4)

    def coefficients(alpha, sigma):
        a = sigma / (alpha**2 * s2 + sigma**2)
        return a + sigma * (p[0] + p[1] * alpha), -a * alpha * m + sigma * (p[2] + p[3] * alpha)

    def slope(ell, state):
        alpha2, sigma2 = 1 / (1 + math.exp(-ell)), 1 / (1 + math.exp(ell))
        a, c = coefficients(alpha2**0.5, sigma2**0.5)
        mean, var = state
        s = sigma2**0.5
        return np.array([(0.5 * sigma2 - s * a) * mean - s * c, (sigma2 - 2 * s * a) * var + sigma2])

    (ell, end), state = sde.log_snr_ends(), np.array([0.0, 1.0])
    h = (end - ell) / 500
    for _ in range(500):
        k1 = slope(ell, state)
        k2 = slope(ell + h / 2, state + h / 2 * k1)
        k3 = slope(ell + h / 2, state + h / 2 * k2)
        k4 = slope(ell + h, state + h * k3)
        state, ell = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), ell + h
    alpha2, sigma2 = 1 / (1 + math.exp(-end)), 1 / (1 + math.exp(end))
    density = Normal(state[0] / alpha2**0.5, ((state[1] + sigma2) / alpha2) ** 0.5)

    def eps(x, z, alpha, sigma):
        a, c = coefficients(alpha, sigma)
        return a * x + c

    model = diffusion(eps, 1, sde)
    for k in (-2, -0.7, 0, 0.7, 2):
        x = torch.tensor([density.mean + k * density.stddev], dtype=torch.float64)
        assert exact_bound(model, x) <= density.log_prob(x).item() + 1e-6


@pytest.mark.parametrize("weighting", ["likelihood", "simple", "velocity"])
def test_drawn_times_and_noise_give_the_same_expectation(weighting):
    torch.manual_seed(0)
    m, s2, sde, n = 0.4, 0.5, dm.VPSDE(), 200_000
    model, x = diffusion(gaussian_eps(m, s2), 2, sde, weighting), torch.tensor([0.9, -0.3])
    drawn = model.log_prob(x.double().expand(n, 2))
    if weighting == "likelihood":
        expected = sum(closed_form(value, m, s2, sde) for value in x.tolist())
    else:  # −½ E‖ε − ε̂‖² or −½ E‖v − v̂‖², t uniform on [t_min, 1], by midpoints; linear in ε
        t = sde.t_min + (1 - sde.t_min) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        v = a**2 * s2 + s**2
        error = (a**2 * s2 / v) ** 2 + (s * a * (x.double() - m) / v) ** 2
        error = error / a**2 if weighting == "velocity" else error
        expected = -0.5 * error.sum(1).mean().item()
    assert drawn.mean().item() == pytest.approx(expected, abs=5 * drawn.std().item() / n**0.5)


def test_error_is_the_squared_distance_at_the_noised_point():
    torch.manual_seed(0)
    sde = dm.VPSDE()
    x, eps, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5) * 0.9 + 0.05
    seen = {}

    class Net(nn.Module):
        def forward(self, x_t, log_snr, z):
            seen.update(x_t=x_t, log_snr=log_snr, z=z)
            return torch.full_like(x_t, 0.3)

    z = torch.randn(5, 7)
    error = dm.Diffusion(Net(), (3, 4, 4)).error(x, z, t, eps)
    alpha, sigma = sde.alpha(t).view(5, 1, 1, 1), sde.sigma(t).view(5, 1, 1, 1)
    torch.testing.assert_close(seen["x_t"], alpha * x + sigma * eps)
    torch.testing.assert_close(seen["log_snr"], sde.log_snr(t))
    assert seen["z"] is z
    predicted = sigma * seen["x_t"] + alpha * 0.3
    torch.testing.assert_close(error, (eps - predicted).pow(2).sum((1, 2, 3)))


@given(st.integers(1, 40), seeds)
def test_stratified_draws_are_one_in_each_stratum(n, seed):
    torch.manual_seed(seed)
    u = dm.stratified(n)
    assert (0 <= u).all() and (u < 1).all()
    gaps = torch.cat([u, u + 1]).sort().values.diff()[:n]
    torch.testing.assert_close(gaps, torch.full((n,), 1 / n), atol=1e-5, rtol=0)


def test_stratified_draws_are_uniform_for_each_example():
    torch.manual_seed(0)
    u = torch.stack([dm.stratified(3) for _ in range(20_000)])  # (draws, examples)
    for moment, expected in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 4)):
        torch.testing.assert_close((u**moment).mean(0), torch.full((3,), expected), atol=0.012, rtol=0)


def test_diffusion_samples_with_its_own_sampler_and_start():
    sde, calls = dm.VPSDE(), []

    def eps(x, z, alpha, sigma):
        calls.append(z)
        return gaussian_eps(z, 0.01)(x, z, alpha, sigma)

    z = torch.tensor([[-1.0], [2.0]])
    simple, bound = diffusion(eps, 1, sde, "simple"), diffusion(eps, 1, sde)
    noise = torch.randn(2, 1)
    velocity = diffusion(eps, 1, sde, "velocity")
    torch.testing.assert_close(velocity.sample(z, noise=noise), simple.sample(z, noise=noise))
    calls.clear()
    torch.testing.assert_close(simple.sample(z, noise=noise), simple.sample(z, noise=noise))
    assert len(calls) == 100 and calls[0] is z
    torch.testing.assert_close(simple.sample(z, noise=noise), z, atol=0.4, rtol=0)
    calls.clear()
    bound.sample(z)
    assert len(calls) == 200
    assert not torch.equal(bound.sample(z, noise=noise), bound.sample(z, noise=noise))  # it is random
    calls.clear()
    quick = bound.sample(z, noise=noise, sampler=dm.ddim, steps=3)
    assert len(calls) == 3 and not quick.requires_grad
    torch.testing.assert_close(quick, simple.sample(z, noise=noise, steps=3))
    with pytest.raises(ValueError, match="likelihood.*simple"):
        diffusion(eps, 1, sde, "uniform")


# ---- 5  Networks ------------------------------------------------------------------------------------


def nudge(module):
    """Move every weight off its start, where zeroed layers pass no gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))


UNETS = [
    (dict(dims=1, channels=1, size=12, width=8, multipliers=(1, 2), attention=(1,), heads=2), (1, 12)),
    (dict(dims=2, channels=3, size=8, width=8, multipliers=(1, 2, 2), attention=(0,), heads=2, z_dim=5), (3, 8, 8)),
    (dict(dims=2, channels=3, size=12, width=8, multipliers=(1, 2), heads=2, z_dim=5, patch=2), (3, 12, 12)),
]


@pytest.mark.parametrize("arguments, shape", UNETS)
def test_unet(arguments, shape):
    torch.manual_seed(0)
    net, z_dim = dm.UNet(**arguments), arguments.get("z_dim", 0)
    x, ell = torch.randn(2, *shape), torch.tensor([-3.0, 2.0])
    z = torch.randn(2, z_dim) if z_dim else None
    assert (net(x, ell, z) == 0).all()  # the exact denoiser of N(0, I)
    nudge(net)
    out = net(x, ell, z)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.allclose(net(x, ell + 1, z), out)
    swapped = net(x.flip(0), ell.flip(0), z.flip(0) if z_dim else None).flip(0)
    torch.testing.assert_close(swapped, out)  # examples do not mix
    for dead in ("guess", "embed_z") if z_dim else ():  # z counts by either route alone
        one = copy.deepcopy(net)
        getattr(one, dead).weight.data.zero_()
        assert not torch.allclose(one(x, ell, z + 1), one(x, ell, z))


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    layer, x = dm.Attention(8, 2), torch.randn(3, 8, 4, 5)
    nudge(layer)
    h = layer.norm(x).view(3, 8, 20)
    qkv = torch.einsum("oc,bcl->bol", layer.qkv.weight, h) + layer.qkv.bias[:, None]
    q, k, v = qkv.view(3, 3, 2, 4, 20).unbind(1)  # (B, heads, C, L)
    weights = torch.einsum("bhcl,bhcm->bhlm", q, k).div(4**0.5).softmax(-1)
    mixed = torch.einsum("bhlm,bhcm->bhcl", weights, v).reshape(3, 8, 20)
    out = torch.einsum("oc,bcl->bol", layer.proj.weight, mixed) + layer.proj.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.view(3, 8, 4, 5))


def test_encoders_start_wide():
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(vocab_size=12, hidden_size=256, num_hidden_layers=1, num_attention_heads=2))
    conv, text = dm.ConvEncoder(3, 16, 100, [8, 16]), cub.TextEncoder(bert, 100)
    for last in (dm.Encoder(dm.mlp(5, 300, 200))[0][-1], conv[-1], text.linear):
        means, logvars = last.weight.chunk(2)
        assert (means.std() / logvars.std()).item() == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("size", [16, 32])
def test_convolutional_encoder_and_decoder(size):
    encoder, decoder = dm.ConvEncoder(3, size, 6, [8, 16]), dm.ConvDecoder(3, size, 6, [8, 16])
    mu, logvar = encoder(torch.randn(2, 3, size, size))
    assert mu.shape == logvar.shape == (2, 6)
    assert decoder(mu).shape == (2, 3, size, size)


# ---- 6  The multimodal ELBO -------------------------------------------------------------------------

DIM, SIZES = 3, {"a": 4, "b": 5, "c": 3}


class Fixed(nn.Module):
    """An encoder N(A (x − b), e^logvar): linear, with the same variance for every x."""

    def __init__(self, matrix, offset, logvar):
        super().__init__()
        self.matrix, self.offset, self.logvar = matrix, offset, logvar

    def forward(self, x):
        mu = (x - self.offset) @ self.matrix.T
        return mu, self.logvar.expand_as(mu)


class LinearGaussian:
    """x_i = W_i z + b_i + N(0, ψ_i I) with W_iᵀW_i diagonal: posterior and evidence in closed form."""

    def __init__(self, seed=0, sizes=SIZES):
        g = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.W, self.b, self.psi, self.sizes = {}, {}, {}, sizes
        for k, n in sizes.items():
            self.W[k] = torch.linalg.qr(randn(n, DIM))[0] * (1 + randn(DIM).abs())
            self.b[k], self.psi[k] = randn(n), 0.3 + torch.rand((), generator=g, dtype=torch.float64)
        self.x = {k: randn(1, n) for k, n in sizes.items()}  # one example
        self.tau = {k: self.W[k].square().sum(0) / self.psi[k] for k in sizes}  # (D,)

    def experts(self, prior_expert):
        """Encoders whose full product, with or without N(0, I), is the exact posterior."""
        share = 0 if prior_expert else 1 / len(self.sizes)
        precision = {k: self.tau[k] + share for k in self.sizes}
        matrix = {k: self.W[k].T / self.psi[k] / precision[k][:, None] for k in self.sizes}
        return {k: Fixed(matrix[k], self.b[k], -precision[k].log()) for k in self.sizes}

    def wrong_experts(self, seed=1):
        g = torch.Generator().manual_seed(seed)
        randn = lambda *shape: 0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)
        return {k: Fixed(randn(DIM, n), self.b[k], randn(DIM)) for k, n in self.sizes.items()}

    def decoders(self):
        def decoder(k):
            net = nn.Linear(DIM, self.sizes[k], dtype=torch.float64)
            net.weight.data, net.bias.data = self.W[k], self.b[k]
            return dm.FeedForward(net, lambda mean: Normal(mean, self.psi[k].sqrt()))

        return {k: decoder(k) for k in self.sizes}

    def evidence(self):
        W, b, x = (torch.cat([part[k].view(-1, d) for k in self.sizes]) for part, d in
                   ((self.W, DIM), (self.b, 1), (self.x, 1)))  # fmt: skip
        psi = torch.cat([self.psi[k].expand(n) for k, n in self.sizes.items()])
        return MultivariateNormal(b[:, 0], W @ W.T + psi.diag()).log_prob(x[:, 0]).item()

    def posterior(self):
        precision = 1 + sum(self.tau[k] for k in self.sizes)
        pull = sum((self.x[k] - self.b[k]) @ self.W[k] / self.psi[k] for k in self.sizes)
        return pull / precision, -precision.log()


@pytest.fixture
def sigma_points(monkeypatch):
    """z at μ ± √D σ along each axis, the batch running over these 2D points: exact for quadratics in z."""
    axes = torch.cat([torch.eye(DIM), -torch.eye(DIM)]).double() * DIM**0.5  # (2D, D)

    def points(mu, logvar):
        e = axes.repeat(len(mu) // len(axes), 1).view(len(mu), *[1] * (mu.ndim - 2), DIM)
        return mu + (0.5 * logvar).exp() * e

    monkeypatch.setattr(dm, "sample_gaussian", points)


def total(model, world, **options):
    x = {k: v.expand(2 * DIM, -1) for k, v in world.x.items()}
    return model.elbo(x, **options).total.mean().item()


@pytest.mark.parametrize("prior_expert", [False, True])
def test_elbo_is_the_evidence_at_the_exact_posterior(prior_expert, sigma_points):
    world = LinearGaussian()
    model = dm.DiffMVAE(world.experts(prior_expert), world.decoders(), "mvae", prior_expert=prior_expert)
    assert total(model, world) == pytest.approx(world.evidence(), abs=1e-9)
    if prior_expert:  # then every product is the posterior given its subset
        for A in dm.subsets(3):
            given = LinearGaussian(sizes={k: n for (k, n), a in zip(SIZES.items(), A) if a})
            given.W, given.b, given.psi, given.x, given.tau = world.W, world.b, world.psi, world.x, world.tau
            fused = model.posterior({k: world.x[k] for k in given.sizes})
            expected = given.posterior()
            torch.testing.assert_close(fused, (expected[0], expected[1].expand_as(fused[1])))


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
        q = model.posterior({k: world.x[k] for k, a in zip(SIZES, A) if a})
        gaps.append(dm.kl_divergence(*q, *world.posterior()).item())
        assert total(model, world, A=A) == pytest.approx(world.evidence() - gaps[-1], abs=1e-8)
    expected = world.evidence() - np.mean(gaps)
    assert total(model, world) == pytest.approx(expected, abs=1e-8)
    x = {k: v.expand(2 * DIM, -1) for k, v in world.x.items()}
    assert model.full_elbo(x).total.mean().item() == pytest.approx(expected, abs=1e-8)
    assert expected <= world.evidence()


def test_beta_and_weights_scale_their_terms():
    terms = {"a": torch.tensor([-3.0]), "b": torch.tensor([-5.0])}
    elbo = dm.ELBO(terms, torch.tensor([2.0]), beta=0.5, weights={"b": 10})
    assert elbo.total.item() == -3 - 50 - 1
    assert list(elbo.terms("surrogate")) == ["surrogate", "a", "b", "KL"]
    world = LinearGaussian()
    model = dm.DiffMVAE(world.experts(True), world.decoders(), beta=0.5, weights={"b": 10}, prior_expert=True)
    for elbo in (model.elbo(world.x), model.elbo(world.x, model.subsets[0])):
        a, b, c = (elbo.log_prob[k] for k in "abc")
        torch.testing.assert_close(elbo.total, a + 10 * b + c - 0.5 * elbo.kl)
    bound = model.full_elbo(world.x)  # evaluation is of the bound itself
    torch.testing.assert_close(bound.total, sum(bound.log_prob.values()) - bound.kl)


def test_elbo_with_a_diffusion_decoder(sigma_points):
    """Replacing p(c|z) = N(Wz + b, ψ) by the exact denoiser for it changes log p(c|z) to its bound."""
    torch.manual_seed(0)
    world, sde = LinearGaussian(seed=3), dm.VPSDE(t_min=1e-3)
    W, b, psi = world.W["c"], world.b["c"], world.psi["c"].item()
    eps = lambda x, z, alpha, sigma: gaussian_eps(z @ W.T + b, psi)(x, z, alpha, sigma)
    decoders = world.decoders() | {"c": diffusion(eps, 3, sde)}
    model = dm.DiffMVAE(world.experts(False), decoders, "mvae")
    copies = 4000
    x = {k: v.expand(2 * DIM * copies, -1) for k, v in world.x.items()}
    elbo = model.elbo(x)
    mu, logvar = model.posterior({k: v[: 2 * DIM] for k, v in x.items()})
    means = dm.sample_gaussian(mu, logvar) @ W.T + b  # (2D, 3)
    exact = np.mean([
        sum(closed_form(c, m, psi, sde) for c, m in zip(world.x["c"][0].tolist(), row)) for row in means.tolist()
    ])  # fmt: skip
    noise = 5 * elbo.log_prob["c"].std().item() / len(x["c"]) ** 0.5
    assert elbo.log_prob["c"].mean().item() == pytest.approx(exact, abs=noise)
    assert elbo.total.mean().item() == pytest.approx(world.evidence(), abs=noise + 0.05)


class FirstOf(nn.Module):
    """A decoder that is dear to run; its 'log-likelihood' is z's first number, its sample z itself."""

    def log_prob(self, x, z):
        return z[:, 0]

    def sample(self, z):
        return z


def test_one_subset_per_example_is_unbiased_and_every_subset_exact():
    torch.manual_seed(0)
    world, batch = LinearGaussian(seed=4), 10  # 7 subsets do not divide 10
    experts = world.wrong_experts()
    for expert in experts.values():
        expert.logvar = expert.logvar - 40  # z is the mean
    model = dm.DiffMVAE(experts, {"a": FirstOf()})
    x = {k: torch.randn(batch, n, dtype=torch.float64) for k, n in SIZES.items()}
    draws = torch.stack([model.elbo(x).log_prob["a"] for _ in range(4000)])  # (draws, B)
    each = torch.stack([model.elbo(x, A).log_prob["a"] for A in model.subsets])  # (S, B)
    error = 5 * each.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - each.mean(0)).abs() < error).all()
    assert draws[:, 0].round(decimals=6).unique().numel() == 7  # each example meets every subset
    torch.testing.assert_close(model.full_elbo(x).log_prob["a"], each.mean(0))
    FirstOf.every_subset = True
    torch.testing.assert_close(model.elbo(x).log_prob["a"], each.mean(0))
    del FirstOf.every_subset


@pytest.fixture
def few_evaluations(monkeypatch):
    """The samplers of the models, at a cost for tests."""
    quick = {name: (sampler, 4) for name, (sampler, _) in dm.Diffusion.samplers.items()}
    monkeypatch.setattr(dm.Diffusion, "samplers", quick)


def test_every_subset_decodes_each_example_against_itself():
    torch.manual_seed(0)
    world = LinearGaussian(seed=5)
    experts = world.wrong_experts()
    for expert in experts.values():
        expert.logvar = expert.logvar - 40  # z is the mean
    model = dm.DiffMVAE(experts, world.decoders())
    x = {k: torch.randn(6, n, dtype=torch.float64) for k, n in SIZES.items()}
    together, each = model.elbo(x), [model.elbo(x, A) for A in model.subsets]
    for k in SIZES:
        torch.testing.assert_close(together.log_prob[k], sum(e.log_prob[k] for e in each) / 7)
    torch.testing.assert_close(together.kl, sum(e.kl for e in each) / 7)


def test_gradients_reach_z_through_both_kinds_of_decoder():
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    torch.manual_seed(1)
    z = dm.sample_gaussian(mu, logvar)
    by_mu, by_logvar = torch.autograd.grad(z.sum(), (mu, logvar), retain_graph=True)
    torch.testing.assert_close(by_mu, torch.ones(2, 6))
    torch.testing.assert_close(by_logvar, 0.5 * (z - mu))
    image = dm.Diffusion(dm.UNet(2, 3, 8, 8, (1, 2), z_dim=6), (3, 8, 8))
    nudge(image)
    model = dm.DiffMVAE({"a": nn.Identity()}, {})
    for decoder in (image, dm.FeedForward(dm.ConvDecoder(3, 8, 6, [8]), dm.CalibratedGaussian())):
        term = model.reconstruction(decoder, torch.randn(2, 3, 8, 8), z[:, None])
        assert torch.autograd.grad(term.sum(), z, retain_graph=True)[0].abs().min() > 0


def test_pictures_and_vectors_have_the_same_bound():
    """log_prob of (3, 2, 2) is that of the same numbers as (12,)."""
    sde, x, eps, t = dm.VPSDE(), torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2), torch.rand(5) * 0.9 + 0.1
    net = Denoiser(gaussian_eps(0.3, 0.5), sde)
    picture = dm.Diffusion(net, (3, 2, 2), sde).log_prob(x, None, t, eps)
    vector = dm.Diffusion(net, (12,), sde).log_prob(x.flatten(1), None, t, eps.flatten(1))
    torch.testing.assert_close(picture, vector)


def tiny(settings=celeba.Settings, **options):
    """The smallest size of a script's model."""
    return settings(
        size=16, channels=8, multipliers=[1, 2], encoder_channels=8, latent_dim=16, device="cpu", **options
    )


def tiny_batch(n=4):
    return {"image": torch.rand(n, 3, 16, 16) * 2 - 1, "mask": torch.rand(n, 1, 16, 16).round(),
            "attributes": torch.rand(n, 18).round()}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"weighting": "likelihood"}, {"decoder": "feedforward"}])
def test_gradients_reach_every_parameter(options):
    torch.manual_seed(0)
    model, prior = celeba.build(tiny(**options))
    nudge(model)
    (-model.elbo(tiny_batch(8)).total.mean()).backward()
    nudge(prior)
    (-prior.log_prob(torch.randn(4, 16)).mean()).backward()
    for name, p in [*model.named_parameters(), *prior.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_any_subset_generates_everything(few_evaluations):
    model, _ = celeba.build(tiny())
    x = tiny_batch()
    for A in dm.subsets(3):
        given = {name: x[name] for name, a in zip(x, A) if a}
        mu, logvar = model.posterior(given)
        assert mu.shape == logvar.shape == (4, 16)
    decoded = model.decode(dm.sample_gaussian(mu, logvar))
    assert {name: value.shape for name, value in decoded.items()} == {k: v.shape for k, v in x.items()}
    reordered = model.posterior(dict(reversed(x.items())))
    torch.testing.assert_close(reordered, model.posterior(x))
    with pytest.raises(ValueError, match="at least one modality"):
        model.posterior({})
    with pytest.raises(ValueError, match="no encoder for"):
        model.posterior({"text": x["mask"]})
    with pytest.raises(ValueError, match="A is empty"):
        model.elbo(x, torch.zeros(3, dtype=torch.bool))


def test_an_empty_subset_with_the_prior_expert_is_the_prior():
    world = LinearGaussian()
    model = dm.DiffMVAE(world.experts(True), world.decoders(), prior_expert=True)
    assert model.elbo(world.x, torch.zeros(3, dtype=torch.bool)).kl.item() == pytest.approx(0, abs=1e-12)


def test_calibrated_gaussian_and_bernoulli():
    mean, x = torch.randn(3, 2), torch.randn(3, 2)
    likelihood = dm.CalibratedGaussian()
    nn.init.constant_(likelihood.logvar, math.log(0.25))
    expected = Normal(mean, 0.5).log_prob(x).sum(1)
    torch.testing.assert_close(dm.FeedForward(nn.Identity(), likelihood).log_prob(x, mean), expected)
    masks = dm.FeedForward(nn.Identity(), dm.bernoulli)
    expected = -nn.functional.binary_cross_entropy_with_logits(mean, x.gt(0).float(), reduction="none").sum(1)
    torch.testing.assert_close(masks.log_prob(x.gt(0).float(), mean), expected)
    torch.testing.assert_close(masks.sample(mean), mean.sigmoid())


# ---- 7  Latent prior --------------------------------------------------------------------------------


def test_latent_prior_standardises():
    torch.manual_seed(0)
    prior = dm.LatentPrior(dm.UNet(1, 1, 4, 8, (1, 2)), (1, 4))
    mu, logvar = torch.randn(500, 4) * 3 + 5, torch.randn(500, 4)
    prior.standardise(mu, logvar)
    z = dm.sample_gaussian(mu.repeat(400, 1), logvar.repeat(400, 1))
    torch.testing.assert_close(prior.mean, z.mean(0), rtol=0.02, atol=0.05)
    torch.testing.assert_close(prior.std, z.std(0), rtol=0.02, atol=0)
    prior.net = Denoiser(gaussian_eps(0.0, 1.0), prior.sde)  # exact for standardised z
    samples = prior.sample(20_000, noise=torch.randn(20_000, 1, 4), steps=200)
    torch.testing.assert_close(samples.mean(0), prior.mean, atol=0.12, rtol=0)
    torch.testing.assert_close(samples.std(0), prior.std, rtol=0.05, atol=0)
    noise = torch.randn(2, 1, 4)
    start = prior.sample(2, noise=noise, steps=1)
    torch.manual_seed(1)
    a = prior.log_prob(z[:8])
    torch.manual_seed(1)
    b = dm.Diffusion.log_prob(prior, ((z[:8] - prior.mean) / prior.std)[:, None])
    torch.testing.assert_close(a, b)
    assert start.shape == (2, 4)


# ---- 8  Training ------------------------------------------------------------------------------------


def toy(out, **options):
    """fit on a line of numbers, with dropout so that every step needs its own random numbers."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    data = torch.linspace(-1, 1, 60).view(20, 3)
    options = dm.Options(out=str(out), **{"steps": 40, "batch_size": 4, "device": "cpu"} | options)
    terms = lambda i: {"fit": -(model(data[i]) - data[i, :1]).square()[:, 0], "size": data[i, 0]}
    averaged, seconds = dm.fit(model, terms, 20, "model", options, [(model, 1e-2)])
    assert seconds > 0
    return [p.clone() for p in (*model.parameters(), *averaged.parameters())]


def stop_after(step, out, **options):
    """Press Ctrl-C at the beginning of that step of toy: it is finished and saved."""
    original, usual = dm.seed_at, signal.getsignal(signal.SIGINT)

    def interrupt(seed, stage, k):
        if k == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(seed, stage, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dm, "seed_at", interrupt)
        with pytest.raises(SystemExit, match=f"stopped after step {step}, saved in .*model.pt: run it again"):
            toy(out, **options)
    assert signal.getsignal(signal.SIGINT) is usual


def test_resumed_training_equals_uninterrupted_training(tmp_path, monkeypatch):
    whole = toy(tmp_path / "whole")
    stop_after(17, tmp_path / "parts")
    resumed = toy(tmp_path / "parts")  # goes on from 17
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    state = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    assert state["step"] == 40 and not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(dm, "seed_at", lambda *_: pytest.fail("a finished training must not train"))
    toy(tmp_path / "whole")


def test_averaged_weights_are_the_moving_average(tmp_path, monkeypatch):
    """Against the recursion, with the weights recorded at each step through the random seed's hook."""
    history, original = [], dm.seed_at
    torch.manual_seed(7)
    model = nn.Linear(2, 1)

    def record(*arguments):
        history.append(model.weight.detach().clone())
        return original(*arguments)

    monkeypatch.setattr(dm, "seed_at", record)
    x = torch.randn(10, 2)
    options = dm.Options(out=str(tmp_path), steps=150, batch_size=4, ema=0.9, device="cpu")
    averaged, _ = dm.fit(model, lambda i: {"fit": -model(x[i])[:, 0].square()}, 10, "model",
                         options, [(model, 1e-2)])  # fmt: skip
    expected = history[0]
    for step, weight in enumerate([*history[1:], model.weight.detach()]):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged.weight, expected)
    steps = torch.stack([(b - a).abs().max() for a, b in zip(history, history[1:])])
    assert steps[0] <= 1.01e-4 and 1e-4 < steps[90:].max() <= 4e-3  # Adam moves by the learning rate,
    rates = [(1e-2 * min(1, (k + 1) / 100, (150 - k) / 500)) for k in range(150)]  # which rises and falls
    assert (steps <= 1.5 * torch.tensor(rates[:-1])).all()


def test_seeds_differ_by_step_stage_and_run():
    seeds = {dm.seed_at(seed, stage, k) for seed in (0, 1) for stage in dm.STAGES for k in range(100)}
    assert len(seeds) == 400


def test_other_settings_are_refused_by_name(tmp_path):
    toy(tmp_path, steps=2)
    with pytest.raises(dm.InputError, match=r"steps was 2 and is 3, seed was 0 and is 3"):
        toy(tmp_path, steps=3, seed=3)
    assert toy(tmp_path, steps=2, prior_steps=3)  # of no concern to the model


def test_a_broken_loss_stops_and_keeps_the_checkpoint(tmp_path):
    stop_after(3, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    terms = lambda i: {"fit": model(torch.ones(4, 3))[:, 0], "mask": torch.full((4,), torch.nan)}
    options = dm.Options(out=str(tmp_path), steps=40, batch_size=4, device="cpu")
    with pytest.raises(FloatingPointError, match="mask not finite"):
        dm.fit(model, terms, 20, "model", options, [(model, 1e-2)])
    assert (tmp_path / "model.pt").read_bytes() == before


KILLED = """
import diffmvae, train_celeba as celeba
diffmvae.INTERVAL = 30
celeba.FACES = {"train": 40, "test": 8}
options = dict(size=16, latent_dim=16, channels=8, encoder_channels=8, batch_size=2, device="cpu")
s = celeba.Settings(out=%r, steps=150, prior_steps=1, **options)
celeba.train(s, celeba.draw_faces(16)["train"], celeba.build(s), celeba.batch, lambda *_: None)
"""


def test_killed_twice_at_random_and_run_again(tmp_path):
    """kill -9 of a training in its own process, at any moment: the weights end up the same."""
    start = lambda out: subprocess.Popen(
        [sys.executable, "-c", KILLED % str(out)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    whole, killed = start(tmp_path / "whole"), tmp_path / "killed" / "model.pt"
    for saved in (30, 60):
        process = start(tmp_path / "killed")
        while not killed.exists() or torch.load(killed, weights_only=True)["step"] < saved:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(np.random.default_rng(saved).uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0 and whole.wait() == 0
    one, other = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("whole", "killed"))
    assert one["step"] == other["step"] == 150
    for part in ("model", "averaged"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part])
    moments = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(m.values() for m in moments)) for k in a)


def test_what_would_fail_late_is_refused_at_once(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(dm.InputError, match="^--out .*file cannot be used .*: give another"):
        dm.prepare(dm.Options(out=str(file), device="cpu"))
    with pytest.raises(dm.InputError, match="^--device tpu cannot be used"):
        dm.prepare(dm.Options(out=str(tmp_path), device="tpu"))
    toy(tmp_path / "run", steps=2)
    with pytest.raises(dm.InputError, match="steps was 2 and is 3"):
        dm.prepare(dm.Options(out=str(tmp_path / "run"), steps=3, batch_size=4, device="cpu"))
    (tmp_path / "run" / "prior.pt").write_bytes((tmp_path / "run" / "model.pt").read_bytes()[:900])
    with pytest.raises(dm.InputError, match=r"prior.pt cannot be read: missing, or damaged"):
        dm.prepare(dm.Options(out=str(tmp_path / "run"), steps=2, batch_size=4, device="cpu"))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    stop_after(3, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.part").symlink_to("/dev/full")  # every write fails, as on a full disk
    with pytest.raises(dm.InputError, match="model.pt cannot be written .*before is whole: make room"):
        toy(tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.parametrize("wrong, message", [
    ({"steps": 0}, "--steps 0: give a larger number"), ({"prior_steps": -1}, "--prior-steps -1"),
    ({"batch_size": 0}, "--batch-size 0"), ({"ema": -0.1}, "--ema -0.1"), ({"seed": -1}, "--seed -1"),
    ({"multipliers": [1, 0]}, r"--multipliers \[1, 0\]"), ({"latent_dim": -4}, "--latent-dim -4"),
    ({"ema": 2.0}, "--ema 2.0: give a smaller number"), ({"dropout": 1.5}, "--dropout 1.5: give a smaller"),
    ({"beta": -1.0}, "--beta -1.0"), ({"rate": math.nan}, "--rate nan"), ({"tokens": 0}, "--tokens 0"), ({"measured": 1}, "--measured 1"),
])  # fmt: skip
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(dm.InputError, match=message):
        cub.Settings(**{"device": "cpu"} | wrong)


def test_zero_is_allowed_where_it_has_a_meaning():
    cub.Settings(device="cpu", seed=0, dropout=0.0, attention=0, beta=0.0)


# ---- 9  Measures and pictures -----------------------------------------------------------------------


def test_f1_by_hand():
    actual = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    predicted = torch.tensor([[0.9, 0.2, 0.6, 0.5], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert dm.f1_score(predicted, actual) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


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
    assert dm.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert dm.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_save_grid(tmp_path):
    pictures = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)])
    dm.save_grid(tmp_path / "grid.png", {"a row": pictures, "another": pictures[:2, :1]})
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 2 * 66 and {0, 128, 255} <= set(np.unique(grid[:64, -190:]).tolist())


# ---- CelebA: drawn faces and the released layout ----------------------------------------------------


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
    """Repainting skin leaves the mask alone; outside the mask are only background and skin colours."""
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
        assert sum(a[name] for name in celeba.HAIR if name) <= 1
        assert not (a["Bald"] and (a["Wavy_Hair"] or a["Bangs"] or a["Wearing_Hat"]))
        assert list(a) == celeba.ATTRIBUTES
    assert all(0.02 < np.mean([a[name] for a in drawn]) < 0.7 for name in celeba.ATTRIBUTES)


def test_drawn_faces_are_the_same_at_every_run(monkeypatch):
    monkeypatch.setattr(celeba, "FACES", {"train": 5, "test": 3})
    first, second = celeba.draw_faces(16), celeba.draw_faces(16)
    assert {k: v.shape for k, v in first["test"].items()} == {
        "image": (3, 3, 16, 16), "mask": (3, 1, 16, 16), "attributes": (3, 18)}  # fmt: skip
    assert all(torch.equal(first[s][k], second[s][k]) for s in first for k in first[s])
    assert not torch.equal(first["train"]["image"][:3], first["test"]["image"])


@pytest.fixture
def released(tmp_path):
    """Three faces in the released layout: 64 px pictures, parts of 32 px, one in each split."""
    folder = tmp_path / "CelebAMask-HQ"
    names = [f"Other_{i}" for i in range(22)] + celeba.ATTRIBUTES[::-1]
    lines, mapping = ["3", " ".join(names)], ["idx orig_idx orig_file"]
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    for k, origin in ((3, 162_770), (2001, 182_637), (2, 182_638)):
        parts = folder / "CelebAMask-HQ-mask-anno" / str(k // 2000)
        parts.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (10 * (k % 10), 100, 200)).save(folder / "CelebA-HQ-img" / f"{k}.jpg", quality=100)
        for part, box in (("hair", (0, 0, 32, 8)), ("l_eye", (4, 4, 8, 16)), ("skin", (0, 0, 32, 32))):
            layer = Image.new("L", (32, 32))
            layer.paste(255, box)
            layer.save(parts / f"{k:05d}_{part}.png")
        values = ["1" if name in ("Smiling", "Other_3") or k == 2 else "-1" for name in names]
        lines.append(f"{k}.jpg " + " ".join(values))
        mapping.append(f"{k} {origin} {origin:06d}.jpg")
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(lines) + "\n")
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n")
    return folder


def test_released_layout_is_read_back(released):
    data = celeba.read_faces(released, 16)
    assert {split: len(part["image"]) for split, part in data.items()} == dict(train=1, test=1)
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


def damage(folder, what):
    anno, mapping = folder / "CelebAMask-HQ-attribute-anno.txt", folder / "CelebA-HQ-to-CelebA-mapping.txt"
    text = anno.read_text()
    match what:
        case "missing folder":
            (folder / "CelebA-HQ-img").rename(folder / "images")
        case "missing picture":
            (folder / "CelebA-HQ-img" / "3.jpg").unlink()
        case "broken picture":
            (folder / "CelebA-HQ-img" / "3.jpg").write_bytes(b"not a picture")
        case "short line":
            anno.write_text(text.replace("2001.jpg -1", "2001.jpg"))
        case "odd value":
            anno.write_text(text.replace("2001.jpg -1", "2001.jpg 0"))
        case "truncated picture":
            picture = folder / "CelebA-HQ-img" / "3.jpg"
            picture.write_bytes(picture.read_bytes()[:-200])
        case "no mask":
            for path in (folder / "CelebAMask-HQ-mask-anno" / "0").glob("00003_[!s]*.png"):
                path.unlink()  # all but the skin's
        case "short mapping":
            mapping.write_text(mapping.read_text().replace("2001 182637 182637.jpg", "2001"))
        case "no mapping":
            mapping.write_text(mapping.read_text().replace("2 182638 182638.jpg", ""))
        case "no test picture":
            mapping.write_text(mapping.read_text().replace("182638", "200"))
        case "no digits":
            anno.write_text(text.replace("2.jpg", "two.jpg"))
        case "no attribute":
            anno.write_text(text.replace("Smiling", "Smirking"))


@pytest.mark.parametrize("what, message", [
    ("missing folder", "CelebA-HQ-img is missing"), ("missing picture", r"3\.jpg cannot be read"),
    ("broken picture", r"3\.jpg cannot be read"), ("short line", r"line 4 \(2001.jpg -1.*is not as"),
    ("odd value", r"line 4 \(2001.jpg 0 .*is not as"), ("no attribute", "lacks Smiling"),
    ("truncated picture", r"3\.jpg cannot be read"), ("no mask", "CelebAMask-HQ-mask-anno/0 has no mask of picture 3"),
    ("short mapping", r"mapping.txt, line 3 \(2001\) is not as"), ("no mapping", r"mapping.txt lacks picture 2:"),
    ("no test picture", "lists no picture of CelebA's test split"), ("no digits", r"line 5 \(two.jpg"),
])  # fmt: skip
def test_bad_input_is_named(released, what, message):
    damage(released, what)
    with pytest.raises(dm.InputError, match=message):
        celeba.read_faces(released, 16)


@pytest.mark.parametrize("wrong, message", [
    ({"latent_dim": 60}, "even number squared"), ({"latent_dim": 25}, "even number squared"),
    ({"size": 48}, "power of 2"), ({"size": 4}, "power of 2"), ({"patch": 3}, "--patch 3: give"),
    ({"attention": 5}, r"--attention 5: give 0 or one of \[16, 8\]"),
    ({"channels": 12}, "--channels 12 .*multiple of 8"), ({"encoder_channels": 5}, "--encoder-channels 5"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(dm.InputError, match=message):
        celeba.build(celeba.Settings(device="cpu", **wrong))


def test_the_unet_attends_where_it_is_told():
    for attention, with_heads in ((0, 0), (16, 2 + 3), (8, 2 + 3)):
        model, _ = celeba.build(celeba.Settings(device="cpu", attention=attention))
        unet = model.decoders["image"].net
        blocks = [b for stage, _ in [*unet.down, *unet.up] for b in stage]
        assert sum(isinstance(b.attention, dm.Attention) for b in blocks) == with_heads
        assert {b.conv1.weight.shape[0] for b in blocks if isinstance(b.attention, dm.Attention)} <= {
            {16: 32, 8: 64}.get(attention)
        }


def test_settings_of_the_bound_and_of_the_surrogate():
    bound, surrogate = celeba.Settings(weighting="likelihood", data="x"), celeba.Settings()
    assert (bound.beta, bound.weight, bound.size, bound.latent_dim) == (1, 1, 128, 256)
    assert (surrogate.beta, surrogate.weight, surrogate.size) == (0.01, 10, 32)
    model, _ = celeba.build(tiny())
    assert model.beta == 0.01 and model.weights == {"attributes": 10}
    supervised = celeba.Settings(decoder="none", weighting="likelihood")
    assert (supervised.beta, supervised.weight, supervised.is_bound) == (0, 10, False)
    assert celeba.Settings(decoder="none", beta=0.5).beta == 0.5


@pytest.mark.parametrize("options, name", [
    ({}, "Diff-MVAE*"), ({"weighting": "simple"}, "Diff-MVAE*"), ({"weighting": "likelihood"}, "Diff-MVAE"),
    ({"decoder": "feedforward"}, "MoPoE*"), ({"family": "mvae"}, "Diff-MVAE*, mvae"), ({"decoder": "none"}, "Supervised"),
])  # fmt: skip
def test_methods_have_the_names_of_the_paper(options, name):
    assert celeba.Settings(**options).method == name


def test_supervised_is_the_likelihood_of_mask_and_attributes_given_the_image():
    torch.manual_seed(0)
    model, prior = celeba.build(tiny(decoder="none"))
    assert prior is None and set(model.encoders) == {"image"} and set(model.decoders) == {"mask", "attributes"}
    x = tiny_batch()
    model.encoders["image"][-1].bias.data[16:] = -60  # q(z|image) is its mean
    nudge(model.decoders)
    elbo, (z, _) = model.elbo(x), model.posterior({"image": x["image"]})
    expected = {k: model.decoders[k].likelihood(model.decoders[k].net(z)).log_prob(x[k]).flatten(1).sum(1) for k in model.decoders}
    torch.testing.assert_close(elbo.total, expected["mask"] + 10 * expected["attributes"])
    torch.testing.assert_close(elbo.log_prob, expected)
    assert elbo.kl.min() > 100


def test_table3_never_sees_what_it_predicts():
    given = []

    class Model:
        class Ones:
            sample = staticmethod(lambda z: torch.ones(len(z), 4))

        class Zeros:
            sample = staticmethod(lambda z: torch.zeros(len(z), 1, 2, 2))

        encoders, decoders = ["image", "mask", "attributes"], {"attributes": Ones, "mask": Zeros}

        @staticmethod
        def posterior(x):
            given.append(set(x))
            return torch.zeros(len(x["image"]), 2), torch.zeros(len(x["image"]), 2)

    test = {"image": torch.zeros(3, 3, 2, 2), "mask": torch.ones(3, 1, 2, 2), "attributes": torch.eye(3, 4)}
    scores = celeba.table3(Model, test, {name: x.byte() for name, x in test.items()})
    assert given == [{"image", "mask"}, {"image"}, {"image", "attributes"}, {"image"}]
    for label in ("both others", "the image"):
        assert scores[label] == {"attributes": pytest.approx(2 / 5), "mask": 0}
    assert scores["nothing"] == {"attributes": pytest.approx(1 / 2), "mask": 1}
    given.clear()
    Model.encoders = ["image"]  # Supervised
    scores = celeba.table3(Model, test, {name: x.byte() for name, x in test.items()})
    assert given == [{"image"}, {"image"}] and scores["both others"] == {}


def test_the_best_constant_is_learned_from_the_training_set():
    class Model:
        encoders, decoders = [], {}

    train = {"attributes": torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 0]]), "mask": torch.ones(3, 1, 1, 1)}
    test = {"image": torch.zeros(2, 3, 1, 1), "attributes": torch.tensor([[1, 1, 1], [1, 0, 0]]), "mask": torch.zeros(2, 1, 1, 1)}
    scores = celeba.table3(Model, train, {name: x.byte() for name, x in test.items()})
    all_three, first = (1 + 2 / 4) / 2, (2 / 4 + 1) / 2  # the means are 1, 1/3, 1/3
    assert scores["nothing"] == {"attributes": pytest.approx(max(all_three, first)), "mask": 0}
    test["attributes"] = torch.tensor([[0, 1, 0], [0, 1, 0]])  # known from the test set only
    train["attributes"] = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 0]])
    assert celeba.table3(Model, train, test)["nothing"]["attributes"] == 0


def test_best_known_nats():
    """nats() on a model whose evidence is known: N(b, σ²) pixels that z does not touch, encoders at the prior."""
    model = dm.DiffMVAE(
        {"image": Fixed(torch.zeros(2, 12), torch.zeros(1), torch.zeros(2))}, {}, "mvae"
    )
    constant = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (3, 2, 2)))
    nn.init.zeros_(constant[0].weight)
    nn.init.constant_(constant[0].bias, 0.2)
    model.decoders["image"] = dm.FeedForward(constant, lambda mean: Normal(mean, 0.5))
    model.encoders["image"].forward = lambda x: (torch.zeros(len(x), 2), torch.zeros(len(x), 2))
    test = {"image": torch.randint(0, 256, (50, 3, 2, 2), dtype=torch.uint8)}
    x = celeba.batch(test)["image"]
    expected = Normal(0.2, 0.5).log_prob(x).sum((1, 2, 3)).mean().item()
    nats = {term: row["nats"] for term, row in celeba.nats(model, test).items()}
    assert nats["ELBO"] == pytest.approx(expected, rel=1e-5) and nats["KL"] == pytest.approx(0, abs=1e-6)
    levels = -expected / 12 / math.log(2) + math.log2(127.5)
    assert nats["image, bits per dimension"] == pytest.approx(levels, rel=1e-5)


class Sum:
    """A model whose z is the sum of what is given; what its decoders make of z tells them apart."""

    class Decoder:
        def __init__(self, shift):
            self.shift = shift

        def sample(self, z):
            return z[:, :1, None, None] + self.shift

    decoders = {"image": Decoder(0), "mask": Decoder(0.1), "attributes": Decoder(0.2)}

    @staticmethod
    def posterior(x):
        mu = sum(v.flatten(1)[:, :1].float() for v in x.values())
        return mu, torch.full_like(mu, -torch.inf)


def test_what_is_drawn_from_what_and_should_show_what(tmp_path):
    x = {name: torch.tensor([1.0, 2, 3])[:, None, None, None] * scale
         for name, scale in (("image", 1), ("mask", 10), ("attributes", 100))}  # fmt: skip

    class Prior:
        sample = staticmethod(lambda n: 1000.0 + torch.arange(n)[:, None])

    made = celeba.draw(tmp_path / "grid.png", Sum, x, Prior)
    assert list(made) == ["real", "image", "mask + attributes", "mask", "attributes", "latent prior", "N(0, I)"]
    assert made["real"] == (x["image"], x) and Image.open(tmp_path / "grid.png").size[1] == 8 * 66
    assert list(celeba.draw(tmp_path / "grid.png", Sum, x)) == list(made)[:5]
    for label, scale in (("image", 1), ("mask + attributes", 110), ("mask", 10), ("attributes", 100)):
        picture, shown = made[label]
        torch.testing.assert_close(picture, scale * x["image"])
        told = {"mask", "attributes"} if label == "image" else set(label.split(" + "))
        assert set(shown) - {"image"} == told and all(shown[name] is x[name] for name in told)
    assert made["latent prior"][0].flatten().tolist() == [1000, 1001, 1002]
    assert made["N(0, I)"][0].abs().max() < 10
    for label in ("latent prior", "N(0, I)"):
        for name, shift in (("mask", 0.1), ("attributes", 0.2)):
            torch.testing.assert_close(made[label][1][name], made[label][0] + shift)


def test_judged_by_hand():
    class Judge:
        """Sees two features, the first pixels; a mask or attributes where they are positive."""

        posterior = staticmethod(lambda o: (o["image"].flatten(1)[:, :2], torch.full((len(o["image"]), 2), 99.0)))
        decoders = {"mask": Sum.Decoder(0.2), "attributes": Sum.Decoder(-1e9)}

    torch.manual_seed(0)
    real = torch.rand(300, 3, 4, 4) - 0.5
    shift = torch.zeros(3, 4, 4)
    shift[0, 0, 0] = 0.3
    positive = (real[:, :1, :1, :1] + 0.2 > 0.5).float()
    shown = {"mask": positive, "attributes": positive}
    made = {"same": (real, shown), "moved": (real + shift, shown), "halved": (0.5 * real, shown),
            "few": (real[:7], {k: v[:7] for k, v in shown.items()})}  # fmt: skip
    table = celeba.judged(Judge, made, real)
    assert table["same"]["Fréchet distance"] == pytest.approx(0, abs=1e-4)
    assert table["moved"]["Fréchet distance"] == pytest.approx(0.09, abs=1e-4)
    features = real.flatten(1)[:, :2]
    halved = 0.25 * (features.mean(0).square() + features.var(0)).sum().item()
    assert table["halved"]["Fréchet distance"] == pytest.approx(halved, rel=0.01)
    assert table["same"]["sharpness"] == pytest.approx(1) and table["halved"]["sharpness"] == pytest.approx(0.25)
    assert table["same"]["coherence, mask"] == pytest.approx(positive.mean().item())  # 0 where both are empty
    assert {row["coherence, attributes"] for row in table.values()} == {0.0}
    outside = celeba.judged(Judge, {"outside": (100 * real, {"mask": positive})}, real.sign())
    assert outside["outside"].keys() == {"Fréchet distance", "sharpness", "coherence, mask"}
    assert outside["outside"]["Fréchet distance"] == pytest.approx(0, abs=0.02)
    assert outside["outside"]["sharpness"] == pytest.approx(1, abs=0.02)
    only_rows = torch.zeros(5, 3, 4, 4)
    only_rows[..., 1::2, :] = 1.0  # differs from row to row, not from column to column
    by_rows = celeba.judged(Judge, {"rows": (only_rows, {k: v[:5] for k, v in shown.items()})}, real)
    expected = 1 / (real.diff(dim=2).square().mean() + real.diff(dim=3).square().mean()).item()
    assert by_rows["rows"]["sharpness"] == pytest.approx(expected)


def test_export_writes_what_is_measured(tmp_path):
    pictures = torch.rand(3, 3, 8, 8) * 2.4 - 1.2
    (tmp_path / "N-0-I").mkdir()
    for stale in ("00007.png", "mine.png"):
        (tmp_path / "N-0-I" / stale).touch()
    celeba.export(tmp_path, {"N(0, I)": (pictures, None), "mask + attributes": (pictures.flip(0), None)})
    assert {path.name for path in (tmp_path / "N-0-I").iterdir()} == {"00000.png", "00001.png", "00002.png", "mine.png"}
    for k in range(3):
        first = np.asarray(Image.open(tmp_path / "N-0-I" / f"{k:05d}.png"))
        assert np.array_equal(first, np.asarray(Image.open(tmp_path / "mask-attributes" / f"{2 - k:05d}.png")))
        expected = ((pictures[k].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        assert first.shape == (8, 8, 3) and np.abs(first - expected).max() <= 0.51


def test_report_is_mean_and_deviation_over_seeds(tmp_path, capsys):
    def finished(name, value, **options):
        s = tiny(out=str(tmp_path / name), **options)
        (tmp_path / name).mkdir()
        tables = {"F1 given": {"the image": {"mask": value}, "nothing": {"mask": 0.5}}}
        (tmp_path / name / "results.json").write_text(json.dumps({"settings": asdict(s), "tables": tables}))
        return str(tmp_path / name)

    judge = dict(judge="sup", measured=7)
    runs = [finished(f"star{seed}", value, seed=seed, **judge) for seed, value in enumerate((0.25, 0.5, 0.75))]
    runs += [finished("mopoe", 0.125, decoder="feedforward", **judge), finished("sup", 1.0, decoder="none")]
    celeba.run(celeba.Settings(report=runs, device="cpu"))
    assert capsys.readouterr().out == (
        "\n| F1 given: mask | the image | nothing |\n|---|---|---|\n"
        "| Diff-MVAE* | 0.500 ± 0.250 | 0.500 ± 0.000 |\n| MoPoE* | 0.125 | 0.500 |\n| Supervised | 1.000 | 0.500 |\n"
    )
    for name, options, message in (
        ("longer", dict(steps=9, seed=5, **judge), r"in more than Diff-MVAE\*'s --seed"),
        ("simple", dict(weighting="simple", seed=5, **judge), r"in more than Diff-MVAE\*'s --seed"),
        ("again", dict(seed=2, **judge), r"one more Diff-MVAE\* of --seed 2"),
        ("fewer", dict(family="mvae", judge="sup", measured=6), "in --judge or --measured"),
        ("other", dict(family="mvae", judge="s", measured=7), "in --judge or --measured"),
        ("real", dict(family="mvae", data="real"), "in --data or --size"),
    ):
        with pytest.raises(dm.InputError, match=f"{name}/results.json .*{message}"):
            celeba.report(celeba.Settings(report=[*runs, finished(name, 0.5, **options)]))
    for wrong, text in (("nowhere", None), ("broken", "{"), ("old", '{"settings": {"size": 16}}'), ("none", "{}")):
        if text:
            (tmp_path / wrong).mkdir()
            (tmp_path / wrong / "results.json").write_text(text)
        with pytest.raises(dm.InputError, match=rf"{wrong}/results.json is missing or"):
            celeba.report(celeba.Settings(report=[*runs, str(tmp_path / wrong)]))


def test_only_a_finished_supervised_run_on_such_pictures_judges(tmp_path, monkeypatch):
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12})
    runs, data = dict(sup=dict(decoder="none"), star={}, half=dict(decoder="none")), celeba.draw_faces(16)["train"]
    for name, options in runs.items():
        s = tiny(out=str(tmp_path / name), steps=1, prior_steps=1, batch_size=4, **options)
        celeba.train(s, data, celeba.build(s), celeba.batch, lambda *_: None)
    half = dm.read_checkpoint(tmp_path / "half" / "model.pt")
    dm.save_checkpoint(tmp_path / "half" / "model.pt", half | {"settings": half["settings"] | {"steps": 2}})
    judge = celeba.load_judge(tiny(judge=str(tmp_path / "sup")))
    assert set(judge.decoders) == {"mask", "attributes"} and not any(p.requires_grad for p in judge.parameters())
    refused = [(tiny(judge=str(tmp_path / "star")), "is no run of --decoder none")]
    refused.append((tiny(judge=str(tmp_path / "half")), "half is not finished: run it again"))
    refused.append((celeba.Settings(size=32, device="cpu", judge=str(tmp_path / "sup")), "is no run of --decoder none"))
    refused.append((tiny(data="real", judge=str(tmp_path / "sup")), "is no run of --decoder none"))
    refused.append((tiny(judge=str(tmp_path / "nowhere")), "cannot be read: missing"))
    for s, message in refused:
        with pytest.raises(dm.InputError, match=message):
            celeba.load_judge(s)
    prior = dm.read_checkpoint(tmp_path / "star" / "prior.pt")
    longer = prior["settings"] | {"prior_steps": 2}
    dm.save_checkpoint(tmp_path / "star" / "prior.pt", prior | {"settings": longer})
    with pytest.raises(dm.InputError, match="star is not finished"):
        celeba.load(tmp_path / "star")
    for option in (dict(judge="x"), dict(export="x")):
        with pytest.raises(dm.InputError, match="--decoder none draws no pictures"):
            celeba.run(tiny(decoder="none", **option))


# ---- Captions: the text VAE -------------------------------------------------------------------------


def tiny_gpt2(vocabulary=12, seed=0):
    torch.manual_seed(seed)
    config = hf.GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=2, n_head=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    decoder = cub.TextDecoder(hf.GPT2LMHeadModel(config), 6, 9, True).eval()
    for p in decoder.parameters():
        p.data += 0.3 * torch.randn_like(p)  # biases too, so that nothing is hidden by a zero
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
        assert found.item() == pytest.approx(log_p[range(len(tokens) - 1), tokens[1:]].sum().item(), abs=1e-4)


def test_caption_likelihood_token_by_token():
    """The chain rule over a growing cache, one token at a time, equals one teacher-forced pass."""
    decoder, z = tiny_gpt2(), torch.randn(2, 6)
    cache, total = decoder.remember(z), torch.zeros(2)
    for now, after in zip(CAPTIONS.T, CAPTIONS.T[1:]):
        log_p = decoder.logits(now[:, None], z, cache)[:, 0].log_softmax(-1)
        total += torch.where(after == 0, 0, log_p.gather(1, after[:, None])[:, 0])
    torch.testing.assert_close(decoder.log_prob(PAIR, z), total, atol=1e-5, rtol=1e-5)


def test_captions_sum_to_one():
    """Over all captions of two tokens that are not padding, p sums to the mass off the padding."""
    decoder, z = tiny_gpt2(vocabulary=5), torch.randn(1, 6)
    every = torch.tensor([[1, a, b] for a in range(1, 5) for b in range(1, 5)])
    total = decoder.log_prob(torch.stack([every, every], 1), z.expand(16, -1)).exp().sum()
    first = decoder.logits(torch.tensor([[1]]), z)[0, -1].softmax(-1)
    second = [decoder.logits(torch.tensor([[1, a]]), z)[0, -1].softmax(-1) for a in range(1, 5)]
    expected = sum(first[a] * (1 - p[0]) for a, p in zip(range(1, 5), second))
    torch.testing.assert_close(total, expected)


def test_padding_never_counts():
    decoder, z = tiny_gpt2(), torch.randn(2, 6)
    padded = torch.nn.functional.pad(PAIR, (0, 2))
    torch.testing.assert_close(decoder.log_prob(padded, z), decoder.log_prob(PAIR, z))
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    bert = hf.BertModel(hf.BertConfig(vocab_size=12, pad_token_id=0, **sizes))
    encoder = cub.TextEncoder(bert, 6).eval()
    for p in encoder.parameters():
        p.data += 0.3 * torch.randn_like(p)  # else its attention is too even to notice padding
    for one, other in zip(encoder(padded), encoder(PAIR)):
        assert one.shape == (2, 6)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoder(PAIR)[0][0], encoder(PAIR)[0][1])
    mixed = torch.stack([CAPTIONS, CAPTIONS.flip(0)], 1)  # BERT reads the first, GPT-2 writes the second
    assert torch.equal(encoder(mixed)[0], encoder(PAIR)[0])
    swapped = torch.stack([CAPTIONS.flip(0), CAPTIONS], 1)
    assert torch.equal(decoder.log_prob(swapped, z), decoder.log_prob(PAIR, z))


def test_both_injections_carry_z():
    decoder, z = tiny_gpt2(), torch.randn(2, 6, requires_grad=True)
    decoder.log_prob(PAIR, z).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (z, decoder.memory.weight, decoder.embedding.weight))
    for injection in (decoder.memory, decoder.embedding):
        decoder = tiny_gpt2()
        other = decoder.embedding if injection.out_features > 8 else decoder.memory
        torch.nn.init.zeros_(other.weight)
        assert not torch.allclose(decoder.log_prob(PAIR, z), decoder.log_prob(PAIR, z + 1))


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


def test_nucleus_sampling():
    decoder, n = tiny_gpt2(), 20_000
    z = torch.randn(1, 6).expand(n, -1)
    p = (decoder.logits(torch.ones(1, 1, dtype=torch.long), z[:1])[0, -1] / 1.5).softmax(-1)
    share = lambda top_p: decoder.sample(z, top_p, temperature=1.5)[:, 0].bincount(minlength=12) / n
    torch.manual_seed(0)
    decoder.longest = 2
    torch.testing.assert_close(share(1.0), p, atol=0.02, rtol=0)
    order = p.argsort(descending=True)
    top_p = (p[order][:2].sum() + p[order][:3].sum()).item() / 2  # needs the third
    kept = torch.zeros(12).index_fill(0, order[:3], 1) * p
    torch.testing.assert_close(share(top_p), kept / kept.sum(), atol=0.02, rtol=0)


def test_words_go_there_and_back():
    captions = [["this bird has a red cap , and white wings", "A bird, small & gris-bleu"]] * 2
    tokenizers = cub.text_tokenizers(cub.Settings(device="cpu"), captions)
    tokens, words = cub.tokenise(tokenizers, captions[0], 12), tokenizers[1]
    assert tokens.shape == (2, 2, 12) and torch.equal(tokens[:, 0], tokens[:, 1])  # one tokenizer, twice
    assert tokens[0, 0, 0] == words.bos_token_id and (tokens[0, 0] == words.eos_token_id).sum() == 1
    assert cub.spell(tokenizers, tokens[:, 1]) == [captions[0][0], "a bird , small & gris - bleu"]


def test_small_networks_know_distances_from_the_start():
    """The inner product of two positions depends on nothing but how far apart they are."""
    s = cub.Settings(device="cpu")
    encoder, decoder = cub.text_networks(s, cub.text_tokenizers(s, [["a red bird", "a blue bird"]] * 2))
    for table in (encoder.bert.embeddings.position_embeddings.weight, decoder.gpt2.transformer.wpe.weight):
        gram = (table[:40] @ table[:40].T).detach()
        for k in range(40):
            torch.testing.assert_close(gram.diagonal(k), gram[0, k].expand(40 - k), atol=1e-3, rtol=0)
        assert gram[0, 1] < gram[0, 0] and gram[0, 8] < gram[0, 1]


def test_optimus_weights_are_found_by_their_names(tmp_path):
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
    make = lambda: cub.TextEncoder(hf.BertModel(hf.BertConfig(vocab_size=12, **sizes)), 6)
    encoder, decoder, path = make(), tiny_gpt2(seed=1), tmp_path / "optimus.pt"
    state = {f"encoder.{k.removeprefix('bert.')}": v for k, v in encoder.state_dict().items()}
    names = {"memory.weight": "decoder.transformer.linear.weight", "embedding.weight": "decoder.transformer.linear_emb.weight"}
    state |= {names.get(k, f"decoder.{k.removeprefix('gpt2.')}"): v for k, v in decoder.state_dict().items()}
    torch.save({"model_state_dict": state | {"decoder.transformer.h.0.attn.bias": torch.ones(1)}}, path)
    other, another = make(), tiny_gpt2(seed=2)
    cub.load_optimus(path, other, another)
    for a, b in ((encoder, other), (decoder, another)):
        for one, two in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(dm.InputError, match="latent-dim"):
        cub.load_optimus(path, cub.TextEncoder(other.bert, 4), another)
    torch.save({k: v for k, v in state.items() if "linear" not in k}, path)
    with pytest.raises(dm.InputError, match="0.linear.weight and 2 more are missing"):
        cub.load_optimus(path, other, another)
    torch.save({"args": argparse.Namespace()}, path)
    with pytest.raises(dm.InputError, match="Weights only load failed"):
        cub.load_optimus(path, other, another)


def test_without_the_hub_there_is_one_sentence_at_once(tmp_path, monkeypatch):
    def unreachable(name, allow_patterns):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(cub, "snapshot_download", unreachable)
    with pytest.raises(dm.InputError, match=r"gpt2 cannot be had as GPT2LMHeadModel \(no route\): give a local"):
        cub.pretrained(hf.GPT2LMHeadModel, "gpt2")
    with pytest.raises(dm.InputError, match="cannot be had as GPT2LMHeadModel"):
        cub.pretrained(hf.GPT2LMHeadModel, str(tmp_path))
    hf.BertConfig().save_pretrained(tmp_path)  # a tokenizer comes of it, without words
    s = cub.Settings(device="cpu", text="pretrained", bert=str(tmp_path), gpt2=str(tmp_path))
    with pytest.raises(dm.InputError, match="words or weights are missing"):
        cub.text_tokenizers(s, [])
    sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=12)
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(dm.InputError, match="words or weights are missing"):
        cub.pretrained(hf.BertModel, str(tmp_path))  # GPT-2's weights would leave BERT random


def test_pretrained_text_from_local_folders(tmp_path):
    """BERT and GPT-2 saved in folders, as for a user without the hub: their weights are taken."""
    captions = [["a red bird", "a blue bird"]] * 2
    words, _ = cub.text_tokenizers(cub.Settings(device="cpu"), captions)
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=len(words))
    networks = hf.BertModel(hf.BertConfig(intermediate_size=8, **sizes)), hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))
    folders = [tmp_path / "bert", tmp_path / "gpt2"]
    for folder, network in zip(folders, networks):
        network.save_pretrained(folder)
        words.save_pretrained(folder)
    bert, gpt2 = map(str, folders)
    s = cub.Settings(device="cpu", text="pretrained", bert=bert, gpt2=gpt2, latent_dim=6, tokens=8)
    encoder, decoder = cub.text_networks(s, cub.text_tokenizers(s, captions))
    assert torch.equal(encoder.bert.embeddings.word_embeddings.weight, networks[0].embeddings.word_embeddings.weight)
    assert torch.equal(decoder.gpt2.transformer.wte.weight, networks[1].transformer.wte.weight)
    assert not decoder.every_subset and decoder.gpt2.config.eos_token_id == words.eos_token_id


def test_clip_score_and_distance(tmp_path):
    torch.manual_seed(0)
    words, _ = cub.text_tokenizers(cub.Settings(device="cpu"), [["a red bird", "a blue bird"]] * 2)
    part = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(words), eos_token_id=words.eos_token_id, max_position_embeddings=8, **part)
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=dict(image_size=16, patch_size=8, **part), projection_dim=4))
    clip.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    pictures, captions = torch.rand(6, 3, 16, 16) * 2 - 1, ["a red bird", "a blue bird", "bird"] * 2
    loaded = [cub.pretrained(kind, str(tmp_path)) for kind in (hf.CLIPModel, hf.AutoTokenizer)]
    table = cub.table2(loaded, {"real": (pictures, captions), "dark": (-pictures, captions)}, "cpu")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = words(captions, padding=True, return_tensors="pt")
    out = clip.eval()(tokens["input_ids"], (pictures / 2 + 0.5 - mean) / std, tokens["attention_mask"])
    cosine = (out.image_embeds * out.text_embeds).sum(1)  # both have length 1
    assert table["real"]["CLIP score"] == pytest.approx(100 * cosine.mean().item(), abs=1e-3)
    assert table["real"]["Fréchet, CLIP"] == pytest.approx(0, abs=1e-4)
    dark = clip.get_image_features((0.5 - pictures / 2 - mean) / std).pooler_output
    features = clip.get_image_features((pictures / 2 + 0.5 - mean) / std).pooler_output
    distance = dm.frechet_distance(dark, features)
    assert table["dark"]["Fréchet, CLIP"] == pytest.approx(distance, rel=1e-3) and distance > 1e-3


# ---- Birds: drawn, and as released ------------------------------------------------------------------


@given(seeds)
def test_drawn_birds_show_what_their_captions_say(seed):
    rng = np.random.default_rng(seed)
    f = {k: str(rng.choice(list(v))) for k, v in cub.FACTORS.items()}
    picture, caption = cub.draw_bird(f, rng, 32), cub.write_caption(f, rng)
    said = cub.parse(caption)
    assert said.items() <= f.items() and len(said) >= 4
    assert ("shape" in said) == ("bill" in said) and ("size" in said) == (f["size"] in caption.split())
    assert re.fullmatch(cub.GRAMMAR, caption)
    assert not re.fullmatch(cub.GRAMMAR, caption.replace(" and", "", 1))
    (seen,) = cub.read_colours(torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1)
    assert seen == {part: f[part] for part in cub.SPOT}


def test_every_factor_changes_the_picture():
    f = dict.fromkeys(cub.SPOT, "red") | {"shape": "short", "size": "small"}
    draw = lambda f: cub.draw_bird(f, np.random.default_rng(0), 32)
    for k in f:
        other = {"shape": "long", "size": "large"}.get(k, "blue")
        assert (draw(f | {k: other}) != draw(f)).any()


class Echo(Sum):
    """As Sum, but its decoders repeat z."""

    class Decoder:
        sample = staticmethod(lambda z: z)
        log_prob = staticmethod(lambda x, z: z[:, 0] * x[:, 0, 0])

    decoders = {"image": Decoder, "caption": Decoder}


def test_what_is_generated_from_what(monkeypatch):
    monkeypatch.setattr(cub, "spell", lambda _, tokens: tokens.flatten().tolist())
    x = {"image": torch.tensor([1.0, 2, 3, 5])[:, None], "caption": torch.tensor([10.0, 20, 30, 50]).view(4, 1, 1).expand(4, 2, 1)}
    pairs = cub.generate(Echo, None, x, 2)
    assert set(pairs) == {"real", "caption from image", "image from caption"}
    assert pairs["real"][1] == [10, 20, 30, 50] and torch.equal(pairs["real"][0], x["image"])
    assert pairs["caption from image"][1] == [1, 2, 3, 5] and torch.equal(pairs["caption from image"][0], x["image"])
    assert pairs["image from caption"][0].flatten().tolist() == [10, 20] and pairs["image from caption"][1] == [10, 20]
    a, b = x["image"][:, 0], x["caption"][:, 0, 0]
    expected = {"both": (a + b) * b, "the caption": b * b, "the image": a * b, "another bird's image": a[[2, 3, 0, 1]] * b}
    found = {label: row["nats"] for label, row in cub.caption_nats(Echo, x).items()}
    assert found == {label: pytest.approx(value.mean().item()) for label, value in expected.items()}


def test_coherence_by_hand():
    red, blue = (torch.tensor(cub.COLOURS[c]).view(3, 1, 1) / 127.5 - 1 for c in ("red", "blue"))
    pictures = torch.stack([red.expand(3, 32, 32), blue.expand(3, 32, 32)])
    captions = ["this bird has a red cap and a red throat", "this bird has a red cap and a blue wing"]
    factors = [{"crown": "red", "body": "blue"}, {"crown": "red", "wing": "red"}]
    table = cub.coherence({"caption from image": (pictures, captions), "other": (pictures, ["zzz"] * 2)}, factors)
    measured = {"colours": 3 / 4, "all factors": 2 / 4, "claims": 2.0, "grammatical": 1.0}
    assert table["caption from image"] == measured
    assert table["other"] == {"colours": 0.0, "claims": 0.0, "grammatical": 0.0}


@pytest.fixture
def released_birds(tmp_path):
    """Six birds in CUB's layout: a greyscale picture, captions that are not ASCII or fewer than ten."""
    root, texts = tmp_path / "cub" / "CUB_200_2011", tmp_path / "cub" / "text"
    names = [f"{kind}/{name}.jpg" for kind in ("001.A", "002.B") for name in ("one", "two", "three")]
    for folder in ("001.A", "002.B"):
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
        pictures, captions, _ = birds["train"]
        assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.uint8
        assert (pictures[0, 0].float() - 200).abs().max() < 6 and [len(ten) for ten in captions] == [10, 10]
        assert captions[0][3] == "caption 3 of a café bird 0" and captions[1][3] == "caption 0 of a café bird 2"
        assert (birds["test"][0][0].float() - 100).abs().max() < 4 and birds["test"][0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("what, message", [
    ("images.txt", "images.txt is missing"), ("images/001.A/two.jpg", "two.jpg cannot be read"),
    ("../text/001.A/one.txt", "one.txt is missing or holds no caption"), ("empty", "one.txt is missing or holds"),
    ("1 1 1", r"split.txt, line 1 \(1 1 1\) is not as"), ("1 2", r"split.txt, line 1 \(1 2\) is not as"),
    ("", "split.txt lacks picture 1"), ("only test", "lists no picture to train"),
])  # fmt: skip
def test_bad_birds_are_named(released_birds, what, message):
    split = released_birds / "CUB_200_2011" / "train_test_split.txt"
    if what == "only test":
        split.write_text(split.read_text().replace(" 1", " 0"))
    elif set(what) <= set("1 2"):  # in place of the line of picture 1
        split.write_text(split.read_text().replace("1 1\n", what + "\n\n", 1))
    elif what == "empty":
        (released_birds / "text/001.A/one.txt").write_text("\n \n")
    else:
        (released_birds / "CUB_200_2011" / what).unlink()
    with pytest.raises(dm.InputError, match=message):
        cub.read_birds(released_birds, 16)


def test_one_of_ten_captions_is_drawn():
    tokens = torch.arange(2 * 10 * 2 * 3, dtype=torch.int32).view(2, 10, 2, 3)
    data = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "caption": tokens}
    torch.manual_seed(0)
    drawn = torch.stack([cub.batch(data)["caption"] for _ in range(300)])  # (300, 2, 2, 3)
    for k in range(2):
        seen, counts = drawn[:, k].unique(dim=0, return_counts=True)
        assert torch.equal(seen, tokens[k].long()) and counts.min() > 10
    one = {"image": data["image"], "caption": tokens[:, 4:5]}
    assert torch.equal(cub.batch(one, torch.tensor([1]))["caption"], tokens[1:, 4].long())


# ---- The scripts, as a user runs them ---------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"weighting": "likelihood"}, {"decoder": "feedforward", "family": "mmvae"}
])  # fmt: skip
def test_celeba_end_to_end(tmp_path, monkeypatch, capsys, few_evaluations, options):
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12})
    s = tiny(out=str(tmp_path / "run"), steps=3, prior_steps=2, batch_size=4, **options)
    celeba.run(s)
    shown = capsys.readouterr().out
    assert shown.startswith("These faces are drawn; --data CelebAMask-HQ")
    assert ("ELBO" in shown) == s.is_bound
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["tables"]["F1 given"]["nothing"]) == {"attributes", "mask"} and results["settings"]["size"] == 16
    assert results["images sampled per second"] > 0
    assert results["images trained per second"] > 0 and results["peak memory, GiB"] > 0
    width, height = Image.open(tmp_path / "run" / "samples.png").size
    assert height // 66 == 8 and 10 * 66 < width < 12 * 66  # ten faces and the labels
    first = (tmp_path / "run" / "samples.png").read_bytes()
    celeba.run(s)  # all is trained: measures and draws, the same
    assert (tmp_path / "run" / "samples.png").read_bytes() == first
    model, prior = celeba.load(tmp_path / "run")
    assert model.decode(prior.sample(2))["image"].shape == (2, 3, 16, 16)


def test_supervised_judges_and_pictures_are_exported(tmp_path, monkeypatch, capsys, few_evaluations):
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12})
    monkeypatch.chdir(tmp_path)
    short = dict(steps=3, prior_steps=2, batch_size=4, measured=5)
    celeba.run(tiny(out="supervised", decoder="none", **short))
    assert not (tmp_path / "supervised" / "prior.pt").exists()
    celeba.run(tiny(out="run", judge="supervised", export="png", **short))
    tables = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    labels = {"real", "image", "mask + attributes", "mask", "attributes", "latent prior", "N(0, I)"}
    assert set(tables["pictures given"]) == labels and set(tables["pictures given"]["N(0, I)"]) == {
        "Fréchet distance", "sharpness", "coherence, mask", "coherence, attributes"
    }  # fmt: skip
    for label in ("real", "image", "mask-attributes", "mask", "attributes", "latent-prior", "N-0-I"):
        assert len(list((tmp_path / "png" / label).glob("*.png"))) == 5
    capsys.readouterr()
    celeba.run(celeba.Settings(report=["supervised", "run"], device="cpu"))
    shown = capsys.readouterr().out
    assert shown.count("| Supervised |") == 2 and shown.count("| Diff-MVAE* |") == 6


@pytest.mark.parametrize("options", [{}, {"decoder": "feedforward", "family": "mvae"}])
def test_cub_end_to_end(tmp_path, monkeypatch, capsys, few_evaluations, options):
    monkeypatch.setattr(cub, "BIRDS", {"train": 40, "test": 12})
    s = tiny(cub.Settings, out=str(tmp_path), steps=3, prior_steps=2, batch_size=4, measured=4, ema=0.9, **options)
    cub.run(s)
    assert capsys.readouterr().out.startswith("These birds are drawn; --data cub")
    results = json.loads((tmp_path / "results.json").read_text())
    table = results["tables"]["coherence"]
    assert table["real"]["all factors"] == 1 and table["real"]["grammatical"] == 1
    for measure in ("colours", "all factors"):
        assert table["real, shuffled"][measure] < 0.5 < table["real"][measure]
    assert set(table) == {
        "real", "real, shuffled", "caption from image", "image from caption",
        "latent prior", "N(0, I)",
    }  # fmt: skip
    assert set(results["tables"]["log p of the caption, z given"]) == {"both", "the caption", "the image", "another bird's image"}
    first = (tmp_path / "samples.png").read_bytes()
    cub.run(s)  # all is trained: measures and draws, the same
    assert (tmp_path / "samples.png").read_bytes() == first
    capsys.readouterr()
    cub.run(cub.Settings(report=[str(tmp_path)], device="cpu"))
    assert f"| {s.method} | {table['real']['claims']:.3f} | {table['caption from image']['claims']:.3f} |" in capsys.readouterr().out
    model, prior, tokenizers = cub.load(tmp_path)
    made = model.decode(prior.sample(2))
    assert made["image"].shape == (2, 3, 16, 16) and len(cub.spell(tokenizers, made["caption"])) == 2


def test_real_birds_end_to_end(tmp_path, released_birds, monkeypatch, few_evaluations):
    real = dict(data=str(released_birds), text="small", attention=0)
    s = tiny(cub.Settings, out=str(tmp_path), steps=2, prior_steps=2, batch_size=2, measured=2, **real)
    cub.run(s)
    assert "coherence" not in json.loads((tmp_path / "results.json").read_text())["tables"]


def test_command_line(tmp_path):
    run = lambda *flags: subprocess.run(
        [sys.executable, ROOT / "train_celeba.py", *flags], capture_output=True, text=True, cwd=tmp_path
    )
    done = run("--data", "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(r"train_celeba\.py: nowhere.* is missing: .*\n", done.stderr)
    shown = run("--help").stdout
    for flag in ("--data", "--weighting", "--family", "--decoder", "--beta", "--prior-steps", "--device"):
        assert flag in shown


def test_readme_examples(tmp_path, monkeypatch, capsys, few_evaluations):
    """Every Python block of the README runs, in order, beside a small trained run."""
    monkeypatch.setattr(celeba, "FACES", {"train": 40, "test": 12})
    short = dict(steps=2, prior_steps=2, batch_size=4)
    for name, options in (("drawn", {}), ("bound", dict(weighting="likelihood")),
                          ("mopoe", dict(decoder="feedforward")), ("supervised", dict(decoder="none"))):  # fmt: skip
        celeba.run(tiny(out=str(tmp_path / "runs" / name), **short, **options))
    monkeypatch.setattr(cub, "BIRDS", {"train": 40, "test": 8})
    cub.run(tiny(cub.Settings, out=str(tmp_path / "runs" / "birds"), measured=4, **short))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(block.replace("(50, 100, 500)", "(2, 3)"), namespace)
    assert all((tmp_path / f"{name}.png").exists() for name in ("figure5", "glasses", "birds"))
    assert "| Fréchet distance | sharpness |" in capsys.readouterr().out
