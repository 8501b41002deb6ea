"""The EDM paradigm: progress, the law of its probes, the surrogate, and how its sampler asks the networks."""

import math

import pytest
import torch
from toy import SHAPE, Draws64, Given, K, ToyDenoiser, float64, wave

from mclr.diffusion import Diffusion, progress_of, sigma_of
from mclr.forms import DDPM, EDM, scales
from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws, Probe
from mclr.schedule import Schedule
from mclr.solvers import heun, sigma_grid


def test_progress_and_sigma_are_inverse_and_progress_is_clipped():
    assert sigma_of(0.0) == pytest.approx(80) and sigma_of(1.0) == pytest.approx(0.002)
    assert sigma_of(0.5) == pytest.approx(0.4)  # the geometric mean
    progress = torch.linspace(0, 1, 33, dtype=torch.float64)
    sigma = torch.tensor([sigma_of(p) for p in progress.tolist()], dtype=torch.float64)
    assert (progress_of(sigma) - progress).abs().max() < 1e-12
    assert (sigma.diff() < 0).all()
    assert progress_of(torch.tensor([1000.0, 80.0, 0.002, 1e-5])).tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)
    assert progress_of(torch.tensor([1e9, 1e-9])).tolist() == [0, 1]


def test_probe_draws_edm2s_noise_law():
    """ln sigma ~ N(-0.4, 1), noise ~ N(0, sigma^2), one each per sample; within five standard errors."""
    B = 5000
    x_B = wave(B, *SHAPE).float()
    probe = Diffusion(SHAPE, K, EDM(noise_mean=-0.4, noise_std=1.3)).probe(x_B, Draws(0, list(range(B))))
    sigma, noise = probe.inputs["level"], probe.inputs["state"] - x_B
    error = 5 / B**0.5
    assert abs(sigma.log().mean() + 0.4) < 1.3 * error and abs(sigma.log().var() / 1.3**2 - 1) < error * 2**0.5
    unit = noise / sigma[:, None, None, None]
    assert (unit.mean(0)).abs().max() < error and (unit.var(0) - 1).abs().max() < error * 2**0.5
    assert abs((unit[:, 0, 0, 0] * unit[:, 0, 1, 1]).mean()) < error and abs((unit.mean((1, 2, 3)) * sigma.log()).mean()) < error
    assert Diffusion((3, 8, 4), K).dims == 96
    Diffusion([3, 8, 4], K).check(torch.zeros(2, 3, 8, 4))  # a list serves as a shape
    assert probe.progress_BT.shape == (B, 1) and torch.equal(probe.progress_BT[:, 0], progress_of(sigma))


@float64()
def test_the_surrogate():
    """value = -weight mean((D - x)^2) exp(-u); aux = err exp(-u) + u; over rows that share samples."""
    x = wave(2, *SHAPE)
    sigma, index_R = torch.tensor([0.3, 2.0]), torch.tensor([1, 0, 1])
    form = EDM(sigma_data=0.7)
    probe = Probe({"target": form.target(x, x, x, sigma), "state": x, "level": sigma}, torch.zeros(2, 1))
    paradigm = Diffusion(SHAPE, K, form)
    raw, logvar = wave(3, *SHAPE, phase=1).requires_grad_(), wave(3, phase=2).requires_grad_()
    denoised = form.denoised(raw, x[index_R], sigma[index_R])
    scores = paradigm.log_likelihood((raw, logvar), probe, index_R)
    for row, b in enumerate(index_R.tolist()):
        s, u = sigma[b].item(), logvar[row].item()
        err = (s**2 + 0.49) / (s * 0.7) ** 2 * (denoised[row] - x[b]).square().sum().item() / 4
        assert scores.value_RT[row].tolist() == pytest.approx([-err * math.exp(-u)], rel=1e-12)
        assert scores.aux_R[row].item() == pytest.approx(err * math.exp(-u) + u, rel=1e-12)
    assert torch.autograd.grad(scores.aux_R.sum(), raw, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(scores.value_RT.sum(), logvar, retain_graph=True, allow_unused=True) == (None,)


def test_values_are_fp32_whatever_the_network_gives():
    x = wave(2, *SHAPE).float()
    probe = Probe({"target": x, "state": x, "level": torch.ones(2)}, torch.zeros(2, 1))
    scores = Diffusion(SHAPE, K).log_likelihood((x.bfloat16() * 2, torch.zeros(2)), probe, torch.arange(2))
    assert scores.value_RT.dtype == scores.aux_R.dtype == torch.float32


@float64()
def test_the_guide_is_the_null_condition_or_another_network_under_the_same_condition():
    """One Euler step ends at the mixed prediction; by hand, at sigma 80 with gamma(progress 0)."""
    c_B, noise = torch.tensor([0, 2]), wave(2, *SHAPE, phase=3)
    paradigm = Diffusion(SHAPE, K, steps=1, solver="euler")
    net, other = ToyDenoiser(), ToyDenoiser(phase=1)
    sigma_B = torch.full((2,), 80.0)
    pred = net.denoise(80 * noise, sigma_B, c_B)[0]
    null, weak = net.denoise(80 * noise, sigma_B, torch.full((2,), K))[0], other.denoise(80 * noise, sigma_B, c_B)[0]
    for guide, guided in ((None, null), (other, weak)):
        x = paradigm.sample(net, c_B, Guidance(Schedule("constant", 1.5), guide), Given(normals=noise))
        assert torch.allclose(x, pred + 1.5 * (pred - guided), rtol=1e-10)
    assert torch.allclose(paradigm.sample(net, c_B, Guidance(), Given(normals=noise)), pred, rtol=1e-10)


@float64()
@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_samples_do_not_depend_on_the_micro_batch(churn):
    net, guidance, c_B = ToyDenoiser(), Guidance(Schedule("constant", 0.5)), torch.tensor([0, 1, 2, 0, 1])
    paradigm, seeds = Diffusion(SHAPE, K, steps=8, churn=churn), [4, 0, 9, 2, 7]
    whole = paradigm.sample(net, c_B, guidance, Draws64(0, seeds))
    assert len(whole.flatten(1).unique(dim=0)) == 5
    parts = [paradigm.sample(net, c_B[a:b], guidance, Draws64(0, seeds[a:b])) for a, b in ((0, 1), (1, 3), (3, 5))]
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-12)


@float64()
def test_churn_is_that_of_the_solver():
    """Every setting reaches it; guidance is weighted at the raised noise level; without churn one noise is drawn, at the start."""
    net, guidance, c_B = ToyDenoiser(), Guidance(Schedule("ramp", 1.5)), torch.tensor([0, 1, 2])
    settings = {"churn": 3.0, "churn_min": 0.05, "churn_max": 30.0, "churn_noise": 1.1}
    paradigm, draws = Diffusion(SHAPE, K, steps=8, **settings), Draws64(0, [4, 0, 9])
    x = paradigm.sample(net, c_B, guidance, draws)

    def denoise(x, sigma):
        pred, null = (net.denoise(x, torch.full((3,), sigma), c)[0] for c in (c_B, torch.full((3,), K)))
        return mix(pred, null, guidance.gamma.at(progress_of(torch.tensor(sigma)).item()))

    noises, sigmas = Draws64(0, [4, 0, 9]), sigma_grid(8, 0.002, 80.0)
    start = 80 * noises.normal(*SHAPE)
    expected = heun(denoise, start, sigmas, lambda: noises.normal(*SHAPE), **settings)
    assert torch.allclose(x, expected, rtol=1e-12, atol=1e-14)
    assert draws.normal(1).equal(noises.normal(1))

    plain, once = Draws64(0, [4, 0, 9]), Draws64(0, [4, 0, 9])
    assert not torch.allclose(Diffusion(SHAPE, K, steps=8).sample(net, c_B, guidance, plain), x, rtol=1e-2)
    once.normal(*SHAPE)
    assert plain.normal(1).equal(once.normal(1))


@float64()
@pytest.mark.parametrize(
    ("schedule", "guided"),
    [
        (Schedule("interval", 1.5, low=0.3, high=0.6), lambda p: 0.3 <= p <= 0.6),
        (Schedule("negative_window", 0.0, turn=0.6, below=0.5), lambda p: p >= 0.6),
        (Schedule("negative_window", 1.5, turn=0.6, below=0.5), lambda p: True),
        (Schedule("constant", 1.0), lambda p: True),
    ],
    ids=["interval", "window without weight", "window", "constant"],
)
def test_the_guide_is_asked_only_where_its_weight_is_not_zero(schedule, guided):
    """At every evaluation of Heun's; the sample is that of a guide asked everywhere."""
    c_B, paradigm = torch.tensor([1, 0]), Diffusion(SHAPE, K, steps=12)
    net, other = ToyDenoiser(), ToyDenoiser(phase=1)
    sigmas: dict[str, list[float]] = {"net": [], "guide": []}

    def asked(name, called):
        def denoise(x, sigma_B, c_B):
            sigmas[name].append(sigma_B[0].item())
            return called(x, sigma_B, c_B)

        return denoise

    x = paradigm.sample(asked("net", net), c_B, Guidance(schedule, asked("guide", other)), Draws64(0, [0, 1]))
    assert len(sigmas["net"]) == 23
    assert sigmas["guide"] == [sigma for sigma in sigmas["net"] if guided(progress_of(torch.tensor(sigma)).item())] != []

    def everywhere(x, sigma_B, c_B):
        pred, weight_B1 = net(x, sigma_B, c_B)[0], schedule(progress_of(sigma_B))[:, None]
        return mix(pred, other(x, sigma_B, c_B)[0], weight_B1), None

    assert torch.equal(x, paradigm.sample(everywhere, c_B, Guidance(), Draws64(0, [0, 1])))


@pytest.mark.parametrize("sigma", [0.002, 0.4, 80.0])
def test_a_denoising_value_is_edms_and_keeps_its_digits_at_extreme_noise(sigma):
    """Table 1 of EDM as it stands, in fp32, is 6e-6 off at small noise."""
    torch.manual_seed(0)
    x, raw, index = torch.randn(2, 3, 8, 8) / 2, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    noisy, upstream, sigma_B = x + sigma * torch.randn(2, 3, 8, 8), torch.randn(4), torch.full((2,), sigma)
    wide = raw.double().requires_grad_()
    c_skip, c_out = (scale[index] for scale in scales(sigma_B.double(), 0.5))
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    true = -weight * ((c_skip * noisy[index].double() + c_out * wide) - x[index]).square().mean((1, 2, 3))
    narrow = raw.requires_grad_()
    probe = Probe({"target": EDM().target(x, x, noisy, sigma_B), "state": noisy, "level": sigma_B}, torch.zeros(2, 1))
    found = Diffusion((3, 8, 8), 3).log_likelihood((narrow, torch.zeros(4)), probe, index).value_RT[:, 0]
    gradients = (torch.autograd.grad(value, of, upstream.to(value))[0] for value, of in ((true, wide), (found, narrow)))
    for exact, other in ((true, found), tuple(gradients)):
        assert (other.double() - exact).norm() < 5e-7 * exact.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "dpm"}, "solver=dpm is unknown: expected euler, heun, sde, heun_tau, euler_maruyama"),
        ({"solver": "sde", "churn": 3.0}, "churn=3.0 needs solver=heun, not sde"),
        ({"steps": 0}, "steps=0: both must be >= 1"),
        ({"sigma_min": 80.0}, "sigma_min=80.0, sigma_max=80.0: both must be > 0, sigma_min the smaller one"),
        ({"solver": "heun_tau"}, "solver=heun_tau is for flows: expected euler, heun, sde"),
        ({"form": DDPM(), "solver": "euler", "steps": 300}, "steps=300: 1000 timesteps have no 300 at equal distances, but 250"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(SHAPE, K, **settings)
    with pytest.raises(ValueError, match=r"sigma_data=0\.0"):
        EDM(sigma_data=0.0)
