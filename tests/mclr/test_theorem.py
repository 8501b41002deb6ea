"""The theorem: the optimum of every contrast of mclr, against the guided model. At points exactly, by enumeration, and by training.

P noisy points, each met with every condition, every c~, and two values of x that have the mean and the variance of x given the
point: so an expectation of the loss is a finite sum over B samples, exact because the loss is quadratic in x. R scored rows;
K conditions (the null condition is index K); D dimensions; L tokens, V codes, S prefixes (sequences of fewer than L tokens).
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Draws64, Given, float64, wave

from mclr.adapters import from_denoiser, own_logits
from mclr.analytic import Mixture
from mclr.contrast import draw_any, generated_rows, paired_rows
from mclr.diffusion import Diffusion, progress_of
from mclr.guidance import Guidance, mix
from mclr.likelihood import Probe, Rows, score
from mclr.next_scale import NextScale
from mclr.objective import Objective
from mclr.posterior import NoisyPosterior, PrefixPosterior
from mclr.schedule import Schedule

K = 3
SCHEDULES = {
    "constant": lambda lam: Schedule("constant", lam),
    "ramp": lambda lam: Schedule("ramp", lam),
    "interval": lambda lam: Schedule("interval", lam, low=0.35, high=0.55),
    "negative_window": lambda lam: Schedule("negative_window", lam, turn=0.45, below=0.6),
}


def mixture(dims: int, prior: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Mixture:
    return Mixture(torch.tensor(prior), 1.2 * wave(K, dims) / dims**0.25, 0.1 + 0.5 * wave(K, dims, phase=1).square())


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    return ((a - b).abs().max() / b.abs().max()).item()


class Points:
    """Everything that can be asked at P noisy points of a mixture, weighted by its probability given the point.

    x_PD, sigma_P: the points. uniforms_PN, chance_PN: the draws of c~ and their probabilities.
    """

    def __init__(self, oracle: Mixture, x_PD: Tensor, sigma_P: Tensor, uniforms_PN: Tensor, chance_PN: Tensor):
        P, N = uniforms_PN.shape
        self.denoised_PKD, self.marginal_PD = oracle.denoisers(x_PD, sigma_P).split([K, 1], 1)
        self.posterior_PK, spread_PKD = oracle.posterior(x_PD, sigma_P), oracle.spread(sigma_P)
        self.paradigm, self.sigma_P = Diffusion(oracle.shape, K), sigma_P
        point, c, sign, n = torch.meshgrid(*map(torch.arange, (P, K, 2, N)), indexing="ij")
        self.point_B, self.c_B = point.flatten(), c.flatten()
        self.sign_B1 = 1.0 - 2 * sign.flatten()[:, None]
        self.uniform_B = uniforms_PN[point, n].flatten()
        self.chance_B = (chance_PN[point, n] * self.posterior_PK[point, c] / 2).flatten()
        self.probe = self.ask(self.denoised_PKD, spread_PKD)

    def ask(self, mean_PKD: Tensor, spread_PKD: Tensor) -> Probe:
        """Samples of that mean and spread at the points. A table stands for the network: it sees the number of the sample."""
        at = (self.point_B, self.c_B)
        x_B, sigma_B = (mean_PKD[at] + self.sign_B1 * spread_PKD[at])[..., None, None], self.sigma_P[self.point_B]
        number_B = torch.arange(len(x_B)).view(-1, 1, 1, 1).expand_as(x_B)
        return Probe({"x": x_B, "noisy": number_B, "sigma": sigma_B}, progress_of(sigma_B)[:, None])

    def rows(self, objective: Objective, posterior_PK: Tensor | None = None) -> Rows:
        posterior_PK = self.posterior_PK if posterior_PK is None else posterior_PK
        return objective.rows(self.probe, self.c_B, K, Given(self.uniform_B), posterior_PK[self.point_B][:, None])

    def optimum(
        self, objective: Objective, rows: Rows, probe: Probe | None = None, guide_PKD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The only stationary table D_PKD of the expected loss, and the loss's curvature there over that of maximum likelihood.

        guide_PKD: what the network answers under the null condition; the exact marginal unless given.
        """
        probe = probe or self.probe
        guide_PKD = self.marginal_PD.expand_as(self.denoised_PKD) if guide_PKD is None else guide_PKD

        def gradient(D: Tensor, objective: Objective, rows: Rows, probe: Probe) -> Tensor:
            def net(number_R: Tensor, sigma_R: Tensor, c_R: Tensor) -> tuple[Tensor, Tensor]:
                b_R = number_R[:, 0, 0, 0]
                own_R, null_R = D[self.point_B[b_R], c_R % K], guide_PKD[self.point_B[b_R], self.c_B[b_R]]
                return torch.where(c_R[:, None] == K, null_R, own_R)[..., None, None], torch.zeros_like(sigma_R)

            D.requires_grad_()
            loss_B, _ = objective(score(self.paradigm, from_denoiser(net), probe, rows), rows)
            return torch.autograd.grad(self.chance_B @ loss_B, D)[0]

        def curvature(start: Tensor, *question) -> tuple[Tensor, Tensor]:
            """The gradient at the start and the diagonal of the Hessian; there is nothing beside the diagonal."""
            grad, direction = gradient(start, *question), wave(start.numel(), phase=4).view_as(start)
            diagonal = gradient(start.detach() + 1, *question) - grad
            assert relative(gradient(start.detach() + direction, *question) - grad, diagonal * direction) < 1e-9
            return grad, diagonal

        start = wave(self.denoised_PKD.numel(), phase=3).view_as(self.denoised_PKD)
        grad, diagonal = curvature(start, objective, rows, probe)
        mle = Objective()
        _, plain = curvature(start.detach(), mle, self.rows(mle), self.probe)
        return start.detach() - grad / diagonal, diagonal / plain


def points(oracle: Mixture, sigmas: tuple[float, ...] = (0.3, 0.8, 2.0, 10.0), each: int = 4) -> tuple[Tensor, Tensor]:
    """A few points that the noised mixture visits."""
    x_B, _ = oracle.sample(Draws64(0, list(range(each * len(sigmas)))))
    sigma_B = torch.tensor(sigmas).repeat(each)
    return x_B.flatten(1) + sigma_B[:, None] * wave(*x_B.shape[:2], phase=2), sigma_B


def every_draw(contrast: str, posterior_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Uniforms, one in each interval that gives another c~, and the lengths of the intervals."""
    if contrast == "posterior":
        edges = torch.cat([torch.zeros(len(posterior_PK), 1), posterior_PK.cumsum(1)], 1)
        return (edges[:, 1:] + edges[:, :-1]) / 2, posterior_PK
    count = {"weighted": K, "uniform": K - 1}.get(contrast, 1)
    even = (torch.arange(count) + 0.5) / count
    return even.expand(len(posterior_PK), -1), torch.full((len(posterior_PK), count), 1 / count)


def at_points(oracle: Mixture, contrast: str, x_PD: Tensor, sigma_P: Tensor) -> Points:
    return Points(oracle, x_PD, sigma_P, *every_draw(contrast, oracle.posterior(x_PD, sigma_P)))


@pytest.mark.parametrize("lam", [0.3, 2.0, -0.9])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("contrast", ["weighted", "posterior", "null"])
@pytest.mark.parametrize("dims", [1, 8])
@float64()
def test_optimum_is_guidance(dims, contrast, kind, lam):
    """D* = D_c + lam(progress) (D_c - D_0): what the guided sampler of the same schedule calls its prediction.

    The problem is bounded wherever lam > -1: its curvature is that of maximum likelihood (null: over 1 + lam).
    """
    oracle, schedule = mixture(dims), SCHEDULES[kind](lam)
    here = at_points(oracle, contrast, *points(oracle))
    objective = Objective("mclr", contrast, schedule, truncate=0.0)
    stationary, curvature = here.optimum(objective, here.rows(objective))
    lam_P = schedule(progress_of(here.sigma_P))
    assert kind == "constant" or len(lam_P.unique()) > 1
    assert relative(stationary, mix(here.denoised_PKD, here.marginal_PD.expand_as(stationary), lam_P)) < 1e-10
    expected_P = 1 / (1 + lam_P) if contrast == "null" else torch.ones_like(lam_P)
    assert relative(curvature, expected_P[:, None, None].expand_as(curvature)) < 1e-10


@float64()
def test_coinciding_draws_cancel_row_by_row():
    """Where c~ = c no row is scored and the sample's loss is that of maximum likelihood, to rounding."""
    oracle = mixture(2)
    here = at_points(oracle, "posterior", *points(oracle))
    objective, mle = Objective("mclr", "posterior", Schedule("constant", 2.0), truncate=0.0), Objective()

    def loss(objective: Objective, rows: Rows) -> Tensor:
        def net(number_R: Tensor, sigma_R: Tensor, c_R: Tensor) -> tuple[Tensor, Tensor]:
            image_RCHW = wave(len(here.c_B), *oracle.shape, phase=5)[number_R[:, 0, 0, 0]] + c_R.view(-1, 1, 1, 1)
            return image_RCHW, wave(len(c_R), phase=6)

        return objective(score(here.paradigm, from_denoiser(net), here.probe, rows), rows)[0]

    rows = here.rows(objective)
    coincide_B = rows.contrast_BT[:, 0] == torch.arange(len(here.c_B))
    drawn_B = torch.arange(K).repeat(len(here.c_B) // K)
    assert torch.equal(coincide_B, drawn_B == here.c_B)
    scored = int((~coincide_B).sum())
    assert len(rows.c_R) == -8 * (-(len(here.c_B) + scored) // 8)
    with_ratio, without = loss(objective, rows), loss(mle, here.rows(mle))
    rounding = 4 * torch.finfo(torch.float64).eps * without.abs() * (1 + 2 * 2.0)
    assert ((with_ratio - without).abs() <= rounding)[coincide_B].all()
    assert ((with_ratio - without).abs() > 1e-6)[~coincide_B].all()


@pytest.mark.parametrize("lam", [0.5, 2.0, -0.5])
@float64()
def test_autoguidance_is_the_optimum_against_a_weak_model(lam):
    """A weaker model of the same condition in place of the marginal: (1 + lam) D_c - lam D_weak, by both bounded routes.

    `null` with the weak model as guide; or, as contrast, x~ drawn from the weak model's p(x | x_t, c) at the real x_t.
    """
    oracle, schedule = mixture(2), Schedule("constant", lam)
    weak = Mixture(oracle.prior_K, oracle.mean_KD + 0.3 * wave(K, 2, phase=7), 1.5 * oracle.variance_KD)
    here = at_points(oracle, "none", *points(oracle))
    x_PD = points(oracle)[0]
    weak_PKD = weak.denoisers(x_PD, here.sigma_P)[:, :K]
    expected = mix(here.denoised_PKD, weak_PKD, lam)

    objective = Objective("mclr", "null", schedule)
    assert relative(here.optimum(objective, here.rows(objective), guide_PKD=weak_PKD)[0], expected) < 1e-10

    # The ratio of mclr, with generated samples as its contrast.
    objective = Objective("mclr", "posterior", schedule)
    drawn = here.ask(weak_PKD, weak.spread(here.sigma_P))
    both = Probe(
        {name: torch.cat([value, drawn.inputs[name]]) for name, value in here.probe.inputs.items()},
        torch.cat([here.probe.progress_BT, drawn.progress_BT]),
    )
    # the number of a sample says only where it is, so a drawn one and its real one look alike
    lam_BT = schedule(here.probe.progress_BT)
    rows = generated_rows(here.c_B.repeat(2), lam_BT, torch.ones_like(lam_BT))
    stationary, curvature = here.optimum(objective, rows, probe=both)
    assert relative(stationary, expected) < 1e-10 and relative(curvature, torch.ones_like(curvature)) < 1e-10

    # noising samples of the weak model instead meets x_t with another density: additive, and unbounded where that is too large
    ratio_PK = (weak.log_density(x_PD, here.sigma_P) - oracle.log_density(x_PD, here.sigma_P)).exp()
    noised = replace(rows, weight_BT=ratio_PK[here.point_B, here.c_B][:, None])
    stationary, curvature = here.optimum(objective, noised, probe=both)
    density_PK1 = (1 + lam - lam * ratio_PK)[..., None]
    assert relative(curvature, density_PK1.expand_as(curvature)) < 1e-10
    assert relative(stationary * density_PK1, (1 + lam) * here.denoised_PKD - lam * ratio_PK[..., None] * weak_PKD) < 1e-9
    assert lam < 2 or curvature.min() < 0


@pytest.mark.parametrize("prior", [(0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3)], ids=["unequal", "equal"])
@pytest.mark.parametrize("dims", [1, 8])
@float64()
def test_optimum_of_uniform_is_additive(dims, prior):
    """(1+lam) p_c D_c - lam/(K-1) sum of the others' pi_k/pi_c p_k D_k, over the same sum of densities, which is the curvature.

    With one's own class allowed the same at lam K/(K-1); with equal priors that is (1+lam) p_c - lam p.
    """
    oracle, lam = mixture(dims, prior), 0.8
    here = at_points(oracle, "uniform", *points(oracle))
    objective = Objective("mclr", "uniform", Schedule("constant", lam))
    stationary, curvature = here.optimum(objective, here.rows(objective))
    others_KK = (1 - torch.eye(K)) / (K - 1)
    share_KK = (1 + lam) * torch.eye(K) - lam * others_KK
    # pi_k p_k / (pi_c p_c) is the ratio of the posteriors
    density_PK1 = (here.posterior_PK @ share_KK / here.posterior_PK)[..., None]
    assert relative(curvature, density_PK1.expand_as(curvature)) < 1e-10
    joint_PKD = here.posterior_PK[..., None] * here.denoised_PKD
    additive = (share_KK @ joint_PKD) / here.posterior_PK[..., None]
    assert relative(stationary * density_PK1, additive) < 1e-9

    allowed = at_points(oracle, "weighted", *points(oracle))  # for its draws: all K classes
    larger = Schedule("constant", lam * K / (K - 1))
    lam_BT = larger(allowed.probe.progress_BT)
    rows = paired_rows(allowed.c_B, draw_any(allowed.uniform_B, K), K, lam_BT, torch.ones_like(lam_BT))
    again, curvature_again = allowed.optimum(Objective("mclr", "uniform", larger), rows)
    assert relative(again * curvature_again, additive) < 1e-9 and relative(curvature_again, curvature) < 1e-9
    if len(set(prior)) == 1:
        ratio_PK1 = (here.posterior_PK.mean(1, keepdim=True) / here.posterior_PK)[..., None]  # p / p_c
        assert relative(curvature, (1 + lam_BT[0] - lam_BT[0] * ratio_PK1).expand_as(curvature)) < 1e-10


@pytest.mark.parametrize(("sigma", "share"), [(0.8, 0.437), (0.3, 0.598)])
@float64()
def test_uniform_is_unbounded_on_a_large_share_of_its_negatives(sigma, share):
    """lam .7: where (1+lam) p_c < lam/(K-1) sum of the others' pi_k/pi_c p_k the loss has no minimum; by curvature, and by formula."""
    oracle, lam = mixture(1), 0.7
    x_PD, step = torch.linspace(-6, 6, 1201)[:, None], 0.01
    here = at_points(oracle, "uniform", x_PD, torch.full((len(x_PD),), sigma))
    objective = Objective("mclr", "uniform", Schedule("constant", lam))
    _, curvature = here.optimum(objective, here.rows(objective))
    joint_PK = oracle.log_joint(x_PD, here.sigma_P).exp()
    negatives_PK = (joint_PK.sum(1, keepdim=True) - joint_PK) / (K - 1)
    by_formula = (1 + lam) * joint_PK < lam * negatives_PK
    assert torch.equal(curvature[..., 0] < 0, by_formula)
    assert (negatives_PK * by_formula).sum().item() * step == pytest.approx(share, abs=0.005)


@float64()
def test_an_underconfident_posterior_unbounds_and_the_truncated_draw_cures():
    """1 % of label smoothing, lam .7: where p(c|x_t) is small the curvature (1+lam) - lam q/p falls below 0, for half of all x_t.

    Without the 2 % of unlikeliest classes it is above 0 everywhere, and the optimum moves by 1.2 % (relative RMS over p_t).
    """
    oracle, lam = mixture(1), 0.7
    x_PD, step = torch.linspace(-5, 5, 201)[:, None], 0.05
    sigma_P = torch.full((len(x_PD),), 0.3)
    exact_PK, joint_PK = oracle.posterior(x_PD, sigma_P), oracle.log_joint(x_PD, sigma_P).exp()
    smooth_PK = 0.99 * exact_PK + 0.01 / K

    here = Points(oracle, x_PD, sigma_P, *every_draw("posterior", smooth_PK))
    objective = Objective("mclr", "posterior", Schedule("constant", lam), truncate=0.0)
    _, curvature = here.optimum(objective, here.rows(objective, smooth_PK))
    expected = 1 + lam - lam * smooth_PK / exact_PK
    assert torch.allclose(curvature[..., 0], expected, rtol=1e-9)
    unbounded_P = (expected < 0).any(1)
    assert (joint_PK.sum(1) * unbounded_P).sum().item() * step == pytest.approx(0.50, abs=0.02)

    # even uniforms: the chances of every c~ to .4 %
    even_PN = ((torch.arange(250) + 0.5) / 250).expand(len(x_PD), -1)
    here = Points(oracle, x_PD, sigma_P, even_PN, torch.full_like(even_PN, 1 / 250))
    objective = replace(objective, truncate=0.02)
    stationary, curvature = here.optimum(objective, here.rows(objective, smooth_PK))
    assert curvature.min() > 0.5
    guided = mix(here.denoised_PKD, here.marginal_PD.expand_as(stationary), lam)
    off, size = ((joint_PK * x.square().sum(-1)).sum().sqrt() for x in (stationary - guided, guided))
    assert off / size == pytest.approx(0.012, abs=0.002)


@float64()
def test_a_pairwise_weight_is_not_guidance():
    """c~ ~ pi with weight p(x_t|c~) / p(x_t|c) gives (1+lam) D_c - lam sum_k pi_k D_k, the priors where the posterior belongs."""
    oracle, lam = mixture(2), 0.8
    here = at_points(oracle, "weighted", *points(oracle))
    c_B1 = draw_any(here.uniform_B, K)
    density_PK = here.posterior_PK / oracle.prior_K
    pair_B1 = density_PK[here.point_B, c_B1[:, 0]] / density_PK[here.point_B, here.c_B]
    weight_BT = K * oracle.prior_K[c_B1] * pair_B1[:, None]
    rows = paired_rows(here.c_B, c_B1, K, torch.full_like(weight_BT, lam), weight_BT)
    stationary, _ = here.optimum(Objective("mclr", "weighted", Schedule("constant", lam)), rows)
    priors = (oracle.prior_K[:, None] * here.denoised_PKD).sum(1, keepdim=True)
    assert relative(stationary, mix(here.denoised_PKD, priors.expand_as(stationary), lam)) < 1e-9


class Enumerated:
    """The tokenizer of scales of one token: the teacher input is the number of the prefix, 0 at the root, i V + 1 + v for child v of i."""

    def __init__(self, V: int):
        self.V = V

    def start(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def advance(self, prefix_B1: Tensor, tokens_B1: Tensor, k: int) -> tuple[Tensor, Tensor]:
        child_B1 = prefix_B1 * self.V + 1 + tokens_B1
        return child_B1, child_B1[:, None]

    def teacher(self, tokens_BL: Tensor) -> Tensor:
        prefix_B1, teachers = self.start(len(tokens_BL)), []
        for k in range(tokens_BL.shape[1] - 1):
            prefix_B1, teacher_B11 = self.advance(prefix_B1, tokens_BL[:, k : k + 1], k)
            teachers.append(teacher_B11)
        return torch.cat(teachers, 1)


class Table:
    """The network that has one vector of logits for every condition and prefix."""

    def __init__(self, logits_KSV: Tensor):
        self.logits_KSV = logits_KSV

    def new_cache(self, rows: int) -> list[int]:
        return []

    def __call__(
        self, teacher_BlE: Tensor, c_R: Tensor, index_R: Tensor | None = None, cache: list[int] | None = None
    ) -> tuple[Tensor, Any]:
        prefix_Rl = (teacher_BlE if index_R is None else teacher_BlE[index_R])[..., 0].long()
        if not cache:
            prefix_Rl = torch.nn.functional.pad(prefix_Rl, (1, 0))
        if cache is not None:
            cache.append(prefix_Rl.shape[1])
        return self.logits_KSV[c_R[:, None], prefix_Rl], own_logits


class Language:
    """L tokens of V codes under K equally likely conditions: every sequence, its probability, every conditional and posterior."""

    def __init__(self, logits_KSV: Tensor, L: int):
        self.V, self.L = logits_KSV.shape[2], L
        self.paradigm = NextScale((1,) * L, K, Enumerated(self.V))
        self.conditional_KSV = logits_KSV.softmax(-1)
        sequences = torch.tensor(list(itertools.product(range(self.V), repeat=L)))
        self.c_B = torch.arange(K).repeat_interleave(len(sequences))
        self.probe = self.paradigm.probe(sequences.repeat(K, 1), Given())
        truth, mle = Table(logits_KSV), Objective()
        rows = mle.rows(self.probe, self.c_B, K, Given(), None)
        self.chance_B = score(self.paradigm, truth, self.probe, rows).value_RT.sum(1).exp() / K
        self.posterior_BLK = PrefixPosterior(self.paradigm, truth)(self.probe, self.c_B)[0]
        prefix_BL = torch.nn.functional.pad(self.probe.inputs["teacher"][..., 0].long(), (1, 0))
        self.posterior_KS = torch.zeros(K, logits_KSV.shape[1])
        self.posterior_KS[:, prefix_BL] = self.posterior_BLK.permute(2, 0, 1)
        self.marginal_SV = torch.einsum("ks,ksv->sv", self.posterior_KS, self.conditional_KSV)
        self.progress_S = torch.zeros(logits_KSV.shape[1])
        self.progress_S[prefix_BL] = self.probe.progress_BT

    def expected_loss(self, objective: Objective, logits_KSV: Tensor, dropped: bool = False) -> Tensor:
        """Over conditions, sequences and every c~: the uniforms between two jumps of any term's c~ count with their length."""
        c_B = torch.full_like(self.c_B, K) if dropped else self.c_B
        if objective.contrast == "posterior":
            jumps_BN = self.posterior_BLK.cumsum(-1)[..., :-1].flatten(1)
        else:
            others = {"weighted": K, "uniform": K - 1}.get(objective.contrast, 1)
            jumps_BN = (torch.arange(1, others) / others).expand(len(self.c_B), -1)
        edges_BN = torch.cat([torch.zeros(len(self.c_B), 1), jumps_BN, torch.ones(len(self.c_B), 1)], 1).sort(1).values
        uniform_BN, chance_BN = (edges_BN[:, 1:] + edges_BN[:, :-1]) / 2, edges_BN.diff() * self.chance_B[:, None]
        copies = torch.arange(len(self.c_B)).repeat_interleave(uniform_BN.shape[1])
        probe = Probe({name: x[copies] for name, x in self.probe.inputs.items()}, self.probe.progress_BT[copies])
        rows = objective.rows(probe, c_B[copies], K, Given(uniform_BN.flatten()), self.posterior_BLK[copies])
        loss_B, _ = objective(score(self.paradigm, Table(logits_KSV), probe, rows), rows)
        return chance_BN.flatten() @ loss_B

    def minimum(self, objective: Objective, null_SV: Tensor | None = None) -> Tensor:
        """The distributions q_KSV of least loss, by Newton steps of at most 1 in any logit; prefixes and conditions do not mix.

        Stops where no probability moves by 1e-13, and fails where the loss is not convex.
        """
        null_1SV = (torch.zeros_like(self.marginal_SV) if null_SV is None else null_SV)[None]
        logits = torch.zeros_like(self.conditional_KSV)
        for _ in range(100):
            logits.requires_grad_()
            loss = self.expected_loss(objective, torch.cat([logits, null_1SV]))
            (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
            columns = [torch.autograd.grad(grad[..., v].sum(), logits, retain_graph=True)[0] for v in range(self.V)]
            before, curvature = logits.detach(), torch.stack(columns, -1)
            # flat where all logits of a prefix move together; nothing comes of a prefix's own probability
            mass_KS11 = curvature.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            assert (torch.linalg.eigvalsh(curvature / mass_KS11) > -1e-12).all()
            step = torch.linalg.solve(curvature / mass_KS11 + 1, (grad / mass_KS11[..., 0]).detach()[..., None])[..., 0]
            logits = before - step * (1 / step.abs().max()).clamp(max=1)
            if (logits.softmax(-1) - before.softmax(-1)).abs().max() < 1e-13:
                return logits.softmax(-1)
        raise AssertionError("no minimum found")


def language(spread: float, V: int = 3, L: int = 3, phase: float = 0.0) -> Language:
    """Conditions that differ by `spread` around what they share."""
    S = sum(V**k for k in range(L))
    return Language(wave(1, S, V, phase=phase) + spread * wave(K, S, V, phase=phase + 1), L)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("contrast", ["weighted", "posterior"])
@float64()
def test_signed_optimum_of_tokens_is_additive(contrast, kind):
    """(1+lam) p_c - lam p_0 at every prefix, normalised as it stands, with p_0 the mean over p(c|prefix); all entries positive here."""
    spoken, schedule = language(0.4), SCHEDULES[kind](0.7)
    p_KSV, lam_KS = spoken.conditional_KSV, schedule(spoken.progress_S).expand(K, -1)
    additive = mix(p_KSV, spoken.marginal_SV.expand_as(p_KSV), lam_KS)
    assert additive.min() > 0 and relative(additive.sum(-1), torch.ones_like(additive[..., 0])) < 1e-12
    found = spoken.minimum(Objective("mclr", contrast, schedule, truncate=0.0))
    assert (found - additive).abs().max() < 1e-10


@pytest.mark.parametrize("kind", SCHEDULES)
@float64()
def test_null_optimum_of_tokens_is_guidance_in_the_logits(kind):
    """Exactly what guidance of the same schedule would sample, q_c ~ p_c^(1+lam) q_null^-lam, whatever the null branch believes."""
    spoken, schedule = language(1.5), SCHEDULES[kind](1.5)
    null_SV = wave(*spoken.marginal_SV.shape, phase=5)
    logits_KSV = spoken.conditional_KSV.log()
    guided = mix(logits_KSV, null_SV.expand_as(logits_KSV), schedule(spoken.progress_S).expand(K, -1)).softmax(-1)
    found = spoken.minimum(Objective("mclr", "null", schedule), null_SV)
    assert (found - guided).abs().max() < 1e-10


@float64()
def test_additive_and_guided_tokens_agree_to_first_order():
    """Halving log(p_c / p_0) divides their difference by four."""
    differences = []
    for spread in (0.02, 0.01):
        spoken, lam = language(spread), 0.7
        logits = spoken.conditional_KSV.log()
        guided = mix(logits, spoken.marginal_SV.log().expand_as(logits), lam).log_softmax(-1)
        found = spoken.minimum(Objective("mclr", "weighted", Schedule("constant", lam), truncate=0.0)).log()
        differences.append((found - guided).abs().max().item())
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.05)


def bounded_optimum(p_KSV: Tensor, share_KKS: Tensor, lam: float, bound: float) -> Tensor:
    """q_c(v) ~ (1+lam) p_c(v) - lam sum_k share(c, k) p_k(v) over the k with q_k(v) < e^bound q_c(v), for all conditions at once.

    Derived: given the other q_k, every entry solves mu q = g(q), g a falling staircase with a step at each e^-bound q_k(v); the
    entry sits on a step's edge where no stair meets the line. mu is the only one for which the entries add up to 1.
    """
    q_KSV = p_KSV.clone()
    for _ in range(30):
        for c in range(K):
            others = [k for k in range(K) if k != c]
            edges, order = (math.exp(-bound) * q_KSV[others]).sort(0)
            drops = (lam * share_KKS[c, others][..., None] * p_KSV[others]).gather(0, order)
            # a row never loses what it contrasts with itself
            top_SV = (1 + lam - lam * share_KKS[c, c][:, None]) * p_KSV[c]

            def entries(mu_S1: Tensor, top_SV=top_SV, edges=edges, drops=drops) -> Tensor:
                stair, q = top_SV, top_SV / mu_S1
                for edge, drop in zip(edges, drops, strict=True):
                    stair = stair - drop
                    q = torch.minimum(q, torch.maximum(edge, stair / mu_S1))
                return q

            low, high = torch.full_like(top_SV[:, :1], 1e-9), torch.full_like(top_SV[:, :1], 1e9)
            for _ in range(80):
                middle = (low * high).sqrt()
                too_much = entries(middle).sum(-1, keepdim=True) > 1
                low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
            q_KSV[c] = entries(high)
    return q_KSV


@pytest.mark.parametrize(("contrast", "spread", "lam"), [("posterior", 1.5, 0.7), ("uniform", 1.0, 0.3)])
@float64()
def test_the_bound_makes_an_optimum_where_there_is_none(contrast, spread, lam):
    """Additive without the negatives that are already `bound` nats less likely here than under their own condition.

    share(c, k): what k's tokens weigh among c's contrasts, p(k|prefix), or p(k|prefix) / p(c|prefix) / (K-1) of the others for
    uniform (where lam times their sum stays below 1 + lam). Found by descent from nowhere; without the bound there is no bottom.
    """
    spoken, bound = language(spread, L=2), 1.0
    p_KSV, posterior_KS = spoken.conditional_KSV, spoken.posterior_KS
    share_KKS = posterior_KS.expand(K, -1, -1)
    if contrast == "uniform":
        share_KKS = (1 - torch.eye(K))[..., None] * posterior_KS / posterior_KS[:, None] / (K - 1)
    objective = Objective("mclr", contrast, Schedule("constant", lam), bound, truncate=0.0)
    logits, steps, null = torch.zeros_like(p_KSV, requires_grad=True), 500, torch.zeros_like(p_KSV[:1])
    adam = torch.optim.Adam([logits], betas=(0.8, 0.95))
    for i in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * 1e-5 ** (i / steps)
        (logits.grad,) = torch.autograd.grad(spoken.expected_loss(objective, torch.cat([logits, null])), logits)
        adam.step()
    expected = bounded_optimum(p_KSV, share_KKS, lam, bound)
    assert (logits.softmax(-1) - expected).abs().max() < 1e-3

    additive = (1 + lam) * p_KSV - lam * torch.einsum("cks,ksv->csv", share_KKS, p_KSV)
    assert additive.min() < 0 and (additive - expected).abs().max() > 0.05
    losses = []
    for depth in (50.0, 100.0, 200.0):
        deep = torch.where(additive < 0, -depth, logits.detach())
        losses.append(spoken.expected_loss(replace(objective, bound=None), torch.cat([deep, null])).item())
    assert losses[1] - losses[2] == pytest.approx(2 * (losses[0] - losses[1]), rel=1e-6) and losses[0] - losses[1] > 0.01


class QuasiRandom:
    """Draws whose numbers fill the cube of all `columns` that a step draws evenly (Sobol), so that small batches are precise."""

    def __init__(self, columns: int, batch: int):
        self.sequence, self.batch = torch.quasirandom.SobolEngine(columns, scramble=True, seed=0), batch
        self.left: list[Tensor] = []

    def uniform(self, *shape: int) -> Tensor:
        if not self.left:
            self.left = list(self.sequence.draw(self.batch).clamp(1e-6, 1 - 1e-6).unbind(1))
        return torch.stack([self.left.pop() for _ in range(math.prod(shape))], 1).view(self.batch, *shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.special.ndtri(self.uniform(*shape))


class SmallDenoiser(nn.Module):
    """Some 1,400 weights for one-dimensional data of variance about 1, preconditioned as in EDM; one linear head per condition.

    It sees the posterior and the schedule's weight, so that it can be small and a jump of the weight is one.
    """

    def __init__(self, oracle: Mixture, schedule: Schedule, width: int = 32):
        super().__init__()
        self.oracle, self.schedule = oracle, schedule
        self.trunk = nn.Sequential(nn.Linear(3 + K, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Embedding(K, width)
        nn.init.zeros_(self.head.weight)

    def forward(self, noisy_RCHW: Tensor, sigma_R: Tensor, c_R: Tensor) -> tuple[Tensor, Tensor]:
        x_R1, sigma_R1 = noisy_RCHW.flatten(1), sigma_R[:, None]
        size_R1 = (1 + sigma_R1**2).sqrt()
        seen = [x_R1 / size_R1, sigma_R1.log() / 2, self.schedule(progress_of(sigma_R1)), self.oracle.posterior(x_R1, sigma_R)]
        out_R1 = (self.head(c_R) * self.trunk(torch.cat(seen, 1))).sum(1, keepdim=True)
        return (x_R1 / size_R1**2 + sigma_R1 / size_R1 * out_R1).view_as(noisy_RCHW), torch.zeros_like(sigma_R)


@pytest.mark.parametrize("kind", ["constant", "interval", "negative_window"])
def test_training_internalises_the_guided_sampler(kind):
    """Trained with lam(progress), a network denoises like the sampler guided by gamma(progress), and its plain samples are its samples.

    From scratch, posterior contrast. Denoiser: 2 % (relative RMS over p_t, where unguided is 20 to 30 % off). 20,001 samples: means
    to 3 % of the separation of the classes, variances to 5 %.
    """
    mean_K = torch.tensor([-1.0, 0.3, 1.2])
    oracle = Mixture(torch.tensor([0.4, 0.35, 0.25]), mean_K[:, None], torch.tensor([[0.2], [0.3], [0.15]]))
    schedule = SCHEDULES[kind](0.7)
    paradigm, objective = (
        Diffusion((1, 1, 1), K, noise_mean=-0.6, noise_std=1.4),
        Objective("mclr", "posterior", schedule, truncate=0.0),
    )
    torch.manual_seed(0)
    net, posterior = SmallDenoiser(oracle, schedule), NoisyPosterior(oracle.log_joint, K)
    optimizer, steps, draws = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99)), 1500, QuasiRandom(5, 512)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * min(1, i / 100) * (1 - i / steps)
        x_B, c_B = oracle.sample(draws)
        probe = paradigm.probe(x_B, draws)
        rows = objective.rows(probe, c_B, K, draws, posterior(probe, c_B)[0])
        loss_B, _ = objective(score(paradigm, from_denoiser(net), probe, rows), rows)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()

    draws = QuasiRandom(4, 20_001)
    x_B, c_B = oracle.sample(draws)
    inputs = paradigm.probe(x_B, draws).inputs
    noisy, sigma_B = inputs["noisy"], inputs["sigma"]
    conditional, marginal = (oracle.denoise(noisy, sigma_B, c)[0] for c in (c_B, torch.full_like(c_B, K)))
    guided = mix(conditional, marginal, schedule(progress_of(sigma_B)))
    with torch.no_grad():
        mine = net(noisy, sigma_B, c_B)[0]

    def off(pred: Tensor) -> Tensor:
        return ((pred - guided).square().sum() / guided.square().sum()).sqrt()

    assert off(mine) < 0.02 and off(conditional) > 0.2

    c_B = torch.arange(K).repeat_interleave(20_001 // K)
    mine = paradigm.sample(from_denoiser(net), c_B, Guidance(), QuasiRandom(1, 20_001)).view(K, -1)
    guided = paradigm.sample(from_denoiser(oracle.denoise), c_B, Guidance(schedule), QuasiRandom(1, 20_001)).view(K, -1)
    separation = mean_K.diff().min()
    assert (mine.mean(1) - guided.mean(1)).abs().max() < 0.03 * separation
    assert (mine.var(1) / guided.var(1) - 1).abs().max() < 0.05
    # and guidance does something that these bounds notice
    assert (guided.mean(1) - mean_K).abs().max() > 0.15 * separation


@pytest.mark.parametrize("kind", SCHEDULES)
@float64()
def test_training_internalises_the_guided_sampler_of_tokens(kind):
    """The same by contrast null, the null condition learned along by dropping one condition in ten: token by token the same samples."""
    spoken, schedule = language(1.0), SCHEDULES[kind](1.5)
    objective = Objective("mclr", "null", schedule)
    logits, steps = torch.zeros(K + 1, *spoken.marginal_SV.shape, requires_grad=True), 400
    adam = torch.optim.Adam([logits])
    for i in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * 1e-3 ** (i / steps)
        loss = 0.9 * spoken.expected_loss(objective, logits) + 0.1 * spoken.expected_loss(objective, logits, dropped=True)
        (logits.grad,) = torch.autograd.grad(loss, logits)
        adam.step()
    exact = torch.cat([spoken.conditional_KSV, spoken.marginal_SV[None]]).log()
    c_B, draws = torch.arange(K).repeat_interleave(1000), lambda: Draws64(0, list(range(3000)))
    mine = spoken.paradigm.sample(Table(logits.detach()), c_B, Guidance(), draws())
    guided = spoken.paradigm.sample(Table(exact), c_B, Guidance(schedule), draws())
    plain = spoken.paradigm.sample(Table(exact), c_B, Guidance(), draws())
    assert (mine != guided).float().mean() < min(0.01, 0.1 * (plain != guided).float().mean())
