"""The solvers on Gaussians, where ODE and SDE have closed solutions: order, evaluations, and what guidance does to mean and variance.

A class N(mu, c) in a marginal N(0, u), one dimension, r = c / u; the denoiser of N(m, v) is m + v / (v + sigma^2) (x - m).
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from toy import Counted, Given, float64

from mclr.adapters import from_denoiser
from mclr.diffusion import Diffusion, progress_of
from mclr.guidance import Guidance
from mclr.schedule import Schedule
from mclr.solvers import euler, heun, sde, sigma_grid

MU, C, U = 1.0, 0.5, 2.0
R = C / U


class UnitNoises:
    """Draws for steps + 1 rows: the i-th noise is 1 in row i and 0 elsewhere, and none reaches the last row.

    A sampler of a Gaussian is affine in its noises, so these rows tell the mean and the variance of its samples exactly.
    """

    def __init__(self, steps: int):
        self.noises = iter(torch.eye(steps + 1)[:-1, :, None, None, None])

    def normal(self, *shape: int) -> torch.Tensor:
        return next(self.noises, torch.zeros(1, 1, 1, 1))


def moments(x: torch.Tensor) -> tuple[float, float]:
    """(mean, variance / c) from the rows of UnitNoises."""
    x = x.flatten()
    return x[-1].item(), ((x - x[-1]).square().sum() / C).item()


def gaussian(mean: float, variance: float):
    return lambda x, sigma: mean + variance / (variance + sigma**2) * (x - mean)


def test_sigma_grid_is_edms():
    """Eq. 5: sigma^(1/rho) falls linearly, then comes 0."""
    sigmas = sigma_grid(18, 0.002, 80.0)
    assert len(sigmas) == 19 and sigmas[-1] == 0
    assert sigmas[0] == pytest.approx(80) and sigmas[-2] == pytest.approx(0.002)
    roots = [sigma ** (1 / 7) for sigma in sigmas[:-1]]
    assert [a - b for a, b in pairwise(roots)] == pytest.approx([(roots[0] - roots[-1]) / 17] * 17)
    assert sigma_grid(3, 1.0, 9.0, rho=2.0) == pytest.approx([9.0, 4.0, 1.0, 0.0])
    assert sigma_grid(1, 0.002, 80.0) == [80.0, 0.0]


ORDERS = {
    "euler": (euler, 1, 1),
    "heun": (heun, 2, 2),
    "sde": (sde, 2, 2),
    # noise makes of N(mu, c) at sigma exactly that at the raised sigma
    "churned heun": (partial(heun, churn=10.0), 2, 2),
}


@pytest.mark.parametrize("name", ORDERS)
@float64()
def test_order_and_evaluations(name):
    """Twice the steps divide the error of the variance by 2^order: what starts at the class's own, c + 20^2, ends at c + .05^2.

    From sigma 20 to .05, so that no step goes to 0.
    """
    (solver, order, evaluations), errors = ORDERS[name], []
    for steps in (64, 128, 256):
        sigmas = [20 * (0.05 / 20) ** (i / steps) for i in range(steps + 1)]
        asked, draws = [], UnitNoises(steps + 1)

        def denoise(x, sigma, asked=asked):
            asked.append(sigma)
            return gaussian(MU, C)(x, sigma)

        mean, variance = moments(solver(denoise, MU + math.sqrt(C + 20**2) * draws.normal(), sigmas, draws.normal))
        assert mean == pytest.approx(MU, rel=1e-12) and len(asked) == evaluations * steps
        errors.append(abs(variance * C - (C + 0.05**2)))
    assert errors[0] < 0.1
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@float64()
def test_a_step_of_the_sde_is_exact_where_the_denoised_image_is_constant():
    """Then x at every sigma is that image plus noise of level sigma, whatever the steps."""
    sigmas = [80.0, 7.0, 6.0, 0.5]
    draws = UnitNoises(4)
    mean, variance = moments(sde(lambda x, sigma: torch.full_like(x, 3.0), 3 + 80 * draws.normal(), sigmas, draws.normal))
    assert mean == pytest.approx(3, rel=1e-12) and variance * C == pytest.approx(0.5**2, rel=1e-12)


@float64()
@pytest.mark.parametrize("churn_noise", [0.9, 1.0, 1.1])
def test_variance_of_churned_samples_in_closed_form(churn_noise):
    """v -> (v + (churn_noise^2) (raised^2 - sigma^2)) (c + following^2) / (c + raised^2), step by step; nothing added outside."""
    steps, rise, window = 1000, 0.04, (0.1, 10.0)
    sigmas = sigma_grid(steps, 0.002, 80.0)
    expected, inside = C + 80.0**2, 0
    for sigma, following in pairwise(sigmas):
        raised = sigma
        if window[0] <= sigma <= window[1]:
            raised, inside = (1 + rise) * sigma, inside + 1
        expected = (expected + churn_noise**2 * (raised**2 - sigma**2)) * (C + following**2) / (C + raised**2)
    draws = UnitNoises(inside + 1)
    start = MU + math.sqrt(C + 80.0**2) * draws.normal()
    x = heun(gaussian(MU, C), start, sigmas, draws.normal, rise * steps, *window, churn_noise)
    assert moments(x) == pytest.approx((MU, expected / C), rel=1e-3)
    assert next(draws.noises, None) is None and (abs(expected / C - 1) < 0.01) == (churn_noise == 1)


@pytest.mark.parametrize(("churn", "rise"), [(1.0, 0.2), (100.0, math.sqrt(2) - 1)])
def test_noise_is_added_inside_the_window_alone(churn, rise):
    """Its ends included, at most sqrt(2) - 1 of sigma; with the denoised image x itself nothing else moves x."""
    sigmas, asked, drawn = [80.0, 10.0, 3.0, 0.5, 0.1, 0.0], [], []

    def denoise(x, sigma):
        asked.append(sigma)
        return x

    def noise():
        drawn.append(len(asked))
        return torch.ones((), dtype=torch.float64)

    x = heun(denoise, torch.ones((), dtype=torch.float64), sigmas, noise, churn, 0.5, 10.0, 1.5)
    raised = [(1 + rise) * sigma for sigma in (10.0, 3.0, 0.5)]
    assert asked == pytest.approx([80.0, 10.0, raised[0], 3.0, raised[1], 0.5, raised[2], 0.1, 0.1], rel=1e-12)
    assert drawn == [2, 4, 6]
    assert x.item() == pytest.approx(1 + 1.5 * math.sqrt((1 + rise) ** 2 - 1) * (10 + 3 + 0.5), rel=1e-12)


def test_the_last_step_goes_to_the_denoised_image():
    """Down to 0 there is one evaluation, no correction and no noise: 2 * steps - 1 evaluations of Heun and of the SDE."""
    for solver, evaluations in ((euler, 5), (heun, 9), (sde, 9)):
        asked = []

        def denoise(x, sigma, asked=asked):
            asked.append(sigma)
            return torch.full_like(x, 3.0)

        start = torch.tensor([7.0, -50.0], dtype=torch.float64)
        out = solver(denoise, start, sigma_grid(5, 0.002, 80.0), lambda: torch.ones(2))
        assert torch.allclose(out, torch.full_like(out, 3.0)) and len(asked) == evaluations and 0 not in asked


def sampled(schedule: Schedule, steps: int, solver: str = "heun", sigma_max: float = 80.0) -> tuple[float, float]:
    """(mean, variance / c) of the class's samples, exactly."""

    def denoiser(x, sigma_B, c_B):
        conditional, marginal = (gaussian(m, v)(x, sigma_B[0]) for m, v in ((MU, C), (0.0, U)))
        return torch.where(c_B[:, None, None, None] == 0, conditional, marginal), None

    paradigm = Diffusion((1, 1, 1), null=1, steps=steps, solver=solver, sigma_max=sigma_max)
    net = from_denoiser(denoiser)
    return moments(paradigm.sample(net, torch.zeros(steps + 1).long(), Guidance(schedule), UnitNoises(steps)))


def limit(schedule: Schedule) -> dict[str, tuple[float, float]]:
    """(mean, variance / c) of the continuous limits from t = sigma^2 = inf, by quadrature over ln t (derived):

    SDE  mean = mu int (1+w) c (c+t)^-2 e^-G dt,              Var = int (c / (c+t))^2 e^-2G dt,
    ODE  mean = mu sqrt(c) / 2 int (1+w) (c+t)^-3/2 e^-G/2 dt,  Var = c e^-G(inf),   G(t) = int_0^t w (1/(c+t) - 1/(u+t)) dt.
    """
    log_t = torch.linspace(math.log(1e-9), math.log(1e13), 400_001)
    t = log_t.exp()
    w = schedule(progress_of(t.sqrt()))
    # G at the nodes, by midpoints; beyond the ends it is constant
    slope = w * (1 / (C + t) - 1 / (U + t)) * t
    step = log_t[1] - log_t[0]
    G = torch.cat([slope.new_zeros(1), ((slope[1:] + slope[:-1]) / 2 * step).cumsum(0)])

    def over_t(f: torch.Tensor) -> float:
        return (f * t).sum().item() * step.item()

    sde_mean = MU * over_t((1 + w) * C / (C + t) ** 2 * (-G).exp())
    ode_mean = MU * math.sqrt(C) / 2 * over_t((1 + w) * (C + t) ** -1.5 * (-G / 2).exp())
    sde_variance = over_t((C / (C + t)) ** 2 * (-2 * G).exp()) / C
    return {"sde": (sde_mean, sde_variance), "heun": (ode_mean, G[-1].neg().exp().item())}


def window(sigma_turn: float, weight: float) -> Schedule:
    """+weight above sigma_turn, -1 below."""
    return Schedule("negative_window", weight, turn=progress_of(torch.tensor(sigma_turn)).item(), below=1.0)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0, -0.5, -0.25])
@float64()
def test_constant_guidance_in_closed_form(weight):
    """Any w > 0 shrinks the variance. SDE: Var / c = (1 - r^(1+2w)) / ((1+2w) (1-r)), mean / mu = (1 - r^(1+w)) / (1-r); ODE: r^w.

    r = c / u (derived). At w = -1/2 the first is -ln r / (1 - r). Both solvers in 256 steps.
    """
    spread = 1 + 2 * weight
    shrunk = (1 - R**spread) / (spread * (1 - R)) if spread else -math.log(R) / (1 - R)
    schedule, exact = Schedule("constant", weight), limit(Schedule("constant", weight))
    assert exact["sde"] == pytest.approx(((1 - R ** (1 + weight)) / (1 - R) * MU, shrunk), rel=1e-5)
    assert exact["heun"][1] == pytest.approx(R**weight, rel=1e-5)
    for solver in ("sde", "heun"):
        assert sampled(schedule, 256, solver, sigma_max=800.0) == pytest.approx(exact[solver], rel=0.01)


# schedule, then (mean, variance / c) of the SDE and of the ODE. At mean 1.18 of the SDE a negative window keeps the variance, where the
# constant weight that shifts as much leaves .60 of it.
TABLE = {
    "constant 1": (Schedule("constant", 1.0), (1.250, 0.4375), (1.380, 0.250)),
    "constant .56": (Schedule("constant", 0.558), (1.18, 0.60), (1.26, 0.46)),
    "+1 above .512": (window(0.512, 1.0), (1.18, 1.04), (1.38, 0.45)),
    "+3 above .671": (window(0.671, 3.0), (1.30, 1.03), (1.70, 0.09)),
    "+3 above 1.767": (window(1.767, 3.0), (1.00, 2.93), (1.81, 1.00)),
    "ramp": (Schedule("ramp", 2.0), (1.227, 0.437), (1.282, 0.318)),
    "interval": (Schedule("interval", 2.0, low=0.3, high=0.6), (1.305, 0.296), (1.398, 0.084)),
    "negative interval": (Schedule("interval", -0.5, high=0.5), (0.730, 1.536), (0.649, 1.809)),
}


@pytest.mark.parametrize("name", TABLE)
@float64()
def test_mean_and_variance_are_those_of_the_continuous_limit(name):
    """Known figures, to the digits given; the samplers to 1 % of the exact value, or .002 where that is small.

    It takes sigma 800 for the start to count as infinite (at 80 the ODE's means are 1 to 2 % lower), and 900 steps for the jump
    of a window to count as sharp.
    """
    schedule, of_sde, of_ode = TABLE[name]
    exact = limit(schedule)
    assert exact["sde"] == pytest.approx(of_sde, abs=0.006) and exact["heun"] == pytest.approx(of_ode, abs=0.006)
    for solver in ("sde", "heun"):
        assert sampled(schedule, 900, solver, sigma_max=800.0) == pytest.approx(exact[solver], rel=0.01, abs=0.002)


@pytest.mark.parametrize(
    ("solver", "steps", "schedule", "variance"),
    [
        ("euler", 32, Schedule("constant", 0.0), 0.84),
        ("sde", 32, Schedule("constant", 0.0), 0.90),
        ("heun", 32, Schedule("constant", 0.0), 1.03),
        ("heun", 32, Schedule("constant", 1.0), 0.26),
        ("heun", 32, window(1.767, 3.0), 1.19),
        ("heun", 256, window(1.767, 3.0), 0.99),
    ],
    ids=str,
)
@float64()
def test_variance_at_the_usual_number_of_steps(solver, steps, schedule, variance):
    """What 32 steps from sigma 80 make of 1, .25 and 1: discretisation shows most at the jump of a window."""
    assert sampled(schedule, steps, solver)[1] == pytest.approx(variance, abs=0.005)


@pytest.mark.parametrize(("solver", "evaluations"), [("heun", 2 * 32 - 1), ("euler", 32), ("sde", 2 * 32 - 1)])
@pytest.mark.parametrize(("gamma", "factor"), [(0.0, 1), (1.5, 2)])
def test_number_of_forwards(solver, evaluations, gamma, factor):
    """63 at 32 Heun steps; twice that under guidance; exactly one per evaluation where gamma is 0. None carries gradient."""
    net = Counted(lambda x, sigma_B, c_B: (gaussian(MU, C)(x, sigma_B[0]), None))
    paradigm = Diffusion((1, 1, 1), null=1, solver=solver)
    x = paradigm.sample(net, torch.zeros(3).long(), Guidance(Schedule("constant", gamma)), Given(normals=torch.ones(3, 1, 1, 1)))
    assert net.calls == [(3, False)] * (factor * evaluations) and not x.requires_grad
    assert [c for c in net.conditions if c == [1] * 3] == [[1] * 3] * ((factor - 1) * evaluations)
