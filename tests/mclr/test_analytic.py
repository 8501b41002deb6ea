"""The oracle against what it does not use: quadrature, autograd, the moments of its own samples."""

import math

import pytest
import torch
from toy import Draws64, wave

from mclr.adapters import from_denoiser
from mclr.analytic import Mixture
from mclr.diffusion import Diffusion
from mclr.likelihood import Probe
from mclr.posterior import noisy_posterior


def mixture(dims: int, diagonal: bool = True) -> Mixture:
    """Three conditions of unequal priors, fp64."""
    prior_K = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Mixture(prior_K, 1.5 * wave(3, dims), 0.1 + wave(3, dims if diagonal else 1, phase=1).square())


LINE = torch.linspace(-12, 12, 4001, dtype=torch.float64)
STEP = (LINE[1] - LINE[0]).item()


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_density_posterior_and_denoisers_by_quadrature(sigma):
    """In one dimension: the clean densities, each convolved with the noise; moments of x under Bayes' rule."""
    oracle = mixture(1)
    x_t = torch.tensor([[-1.0], [0.1], [2.5]], dtype=torch.float64)
    sigma_B = torch.full((3,), sigma, dtype=torch.float64)
    clean_NK = oracle.log_density(LINE[:, None], torch.zeros_like(LINE)).exp()
    assert torch.allclose(clean_NK.sum(0) * STEP, torch.ones(3, dtype=torch.float64))
    by_hand = torch.distributions.Normal(oracle.mean_KD[1], oracle.variance_KD[1].sqrt()).log_prob(LINE).exp()
    assert torch.allclose(clean_NK[:, 1], by_hand)
    noise_BN = (-((x_t - LINE) ** 2) / (2 * sigma**2)).exp() / (math.sqrt(2 * math.pi) * sigma)
    both_BNK = noise_BN[..., None] * clean_NK
    density_BK = both_BNK.sum(1) * STEP
    assert torch.allclose(oracle.log_density(x_t, sigma_B), density_BK.log(), rtol=0, atol=1e-9)
    joint_BK = density_BK * oracle.prior_K
    assert torch.allclose(oracle.log_joint(x_t, sigma_B), joint_BK.log(), rtol=0, atol=1e-9)
    assert torch.allclose(oracle.posterior(x_t, sigma_B), joint_BK / joint_BK.sum(1, keepdim=True), rtol=0, atol=1e-9)
    mean_BK = (both_BNK * LINE[:, None]).sum(1) * STEP / density_BK
    square_BK = (both_BNK * LINE[:, None] ** 2).sum(1) * STEP / density_BK
    denoised_BK = oracle.denoisers(x_t, sigma_B)[..., 0]
    assert torch.allclose(denoised_BK[:, :3], mean_BK, rtol=0, atol=1e-9)
    assert torch.allclose(denoised_BK[:, 3], (joint_BK * mean_BK).sum(1) / joint_BK.sum(1), rtol=0, atol=1e-9)
    assert torch.allclose(oracle.spread(sigma_B)[..., 0] ** 2, square_BK - mean_BK**2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "isotropic"])
def test_denoisers_are_tweedies_in_any_dimension(diagonal):
    """D = x_t + sigma^2 grad log p(x_t), of every condition and of the marginal."""
    oracle, sigma_B = mixture(8, diagonal), torch.tensor([0.1, 0.7, 3.0, 40.0], dtype=torch.float64)
    x_t = wave(4, 8, phase=2).requires_grad_()
    log_BK = oracle.log_density(x_t, sigma_B)
    logs = [*log_BK.unbind(1), (log_BK + oracle.prior_K.log()).logsumexp(1)]
    for c, log_B in enumerate(logs):
        (score_BD,) = torch.autograd.grad(log_B.sum(), x_t, retain_graph=True)
        expected = x_t + sigma_B[:, None] ** 2 * score_BD
        assert torch.allclose(oracle.denoisers(x_t, sigma_B)[:, c], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "isotropic"])
def test_samples_have_the_priors_means_and_variances(diagonal):
    """Within five standard errors."""
    oracle, B = mixture(2, diagonal), 10_000
    x_B, c_B = oracle.sample(Draws64(0, list(range(B))))
    assert x_B.shape == (B, *oracle.shape) and x_B.dtype == torch.float64
    for c, prior in enumerate(oracle.prior_K.tolist()):
        mine = x_B[c_B == c].flatten(1)
        assert abs(len(mine) / B - prior) < 5 * math.sqrt(prior * (1 - prior) / B)
        variance_D, n = oracle.variance_KD[c].expand(2), len(mine)
        assert ((mine.mean(0) - oracle.mean_KD[c]).abs() < 5 * (variance_D / n).sqrt()).all()
        assert ((mine.var(0) / variance_D - 1).abs() < 5 * math.sqrt(2 / n)).all()


def test_it_is_a_denoiser_and_a_classifier_of_the_paradigm():
    oracle = mixture(8)
    paradigm = Diffusion(oracle.shape, oracle.null)
    noisy, sigma_B, c_B = wave(4, 8, 1, 1), torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    probe = Probe({"state": noisy, "level": sigma_B}, torch.zeros(4, 1))
    raw, logvar = paradigm.predict(from_denoiser(oracle.denoise), probe, torch.arange(4), c_B)
    denoised = paradigm.form.denoised(raw, noisy, sigma_B).flatten(1)
    assert torch.allclose(denoised.double(), oracle.denoisers(noisy, sigma_B)[torch.arange(4), c_B], atol=1e-6)
    assert logvar.eq(0).all()
    posterior_B1K, _ = noisy_posterior(oracle.log_joint, 3, (noisy, sigma_B), c_B.clamp(max=2))
    assert torch.allclose(posterior_B1K[:, 0].double(), oracle.posterior(noisy, sigma_B), atol=1e-6)
