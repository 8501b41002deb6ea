"""The theorem: what every contrast of mclr makes of a network, against the guided model. Exactly, in expectation; and by training.

At a state (a noisy point, or the tokens so far) p_k = p(k | state), e_k is the exact answer under condition k (its denoised image, or
its distribution of the next token), and e_0 = sum_k p_k e_k the exact answer under the null condition.

S states; K conditions (the null condition is index K); D dimensions; L tokens, V codes; B samples; R rows.
"""

import math
from dataclasses import replace
from typing import Any

import exact
import pytest
import torch
from exact import K, OfForm, World, relative
from torch import Tensor, nn
from toy import Draws64, float64, wave

from mclr.analytic import Mixture
from mclr.diffusion import Diffusion, progress_of
from mclr.forms import DDPM, EDM, Flow, Form
from mclr.guidance import Guidance, mix
from mclr.likelihood import Guide, score
from mclr.objective import Objective
from mclr.posterior import noisy_posterior
from mclr.schedule import Schedule

SCHEDULES = {
    "constant": Schedule("constant", 1.0),
    "ramp": Schedule("ramp", 1.0),
    "interval": Schedule("interval", 1.0, low=0.35, high=0.55),
    "negative_window": Schedule("negative_window", 1.0, turn=0.45, below=0.6),
}


def mixture(dims: int, prior: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Mixture:
    return Mixture(torch.tensor(prior), 1.2 * wave(K, dims) / dims**0.25, 0.1 + 0.5 * wave(K, dims, phase=1).square())


def visited(oracle: Mixture) -> tuple[Tensor, Tensor]:
    """A few points that the noised mixture visits, and their noise levels."""
    sigma_S = torch.tensor([0.3, 0.8, 2.0, 10.0]).repeat(4)
    x_SD = oracle.sample(Draws64(0, list(range(16))))[0].flatten(1)
    return x_SD + sigma_S[:, None] * wave(*x_SD.shape, phase=2), sigma_S


def points(oracle: Mixture, form: Form = EDM()) -> World:  # noqa: B008  frozen
    x_SD, sigma_S = visited(oracle)
    return exact.points(oracle, x_SD, torch.tensor([form.known(sigma) for sigma in sigma_S.tolist()]), form)


def line(sigma: float, number: int) -> tuple[World, Tensor]:
    """Points of one dimension at even distances, and p(x_t, c) there times the distance."""
    oracle, where = mixture(1), (torch.linspace(-6, 6, number)[:, None], torch.full((number,), sigma))
    return exact.points(oracle, *where, EDM()), oracle.log_joint(*where).exp() * 12 / (number - 1)


def language(spread: float, L: int = 3) -> World:
    """Sequences of three codes; the conditions differ by `spread` around what they share."""
    S = sum(3**k for k in range(L))
    return exact.language(wave(S, 1, 3) + spread * wave(S, K, 3, phase=1), L)


WORLDS = {
    "diffusion, 1 dimension": lambda: points(mixture(1)),
    "diffusion, 8 dimensions": lambda: points(mixture(8)),
    "diffusion, equal priors": lambda: points(mixture(2, (1 / 3, 1 / 3, 1 / 3))),
    "diffusion, DDPM": lambda: points(mixture(1), DDPM()),
    "diffusion, flow": lambda: points(mixture(8), Flow()),
    "diffusion, flow to the data": lambda: points(mixture(2), Flow(to_data=True)),
    "tokens": lambda: language(0.2),
}


def smoothed(p_SK: Tensor) -> Tensor:
    """A classifier under 1 % of label smoothing."""
    return 0.99 * p_SK + 0.01 / K


def ratio(p_SK: Tensor) -> Tensor:
    """p_k / p_c at [s, c, k]."""
    return p_SK[:, None] / p_SK[..., None]


# name -> (contrast, belief, share), the latter two as functions of p_SK and the priors.
# belief[s, k, c]: what a sample of condition k takes for p(c | state) when c is drawn or weighed (None: the exact posterior).
# share[s, c, k]: of what is subtracted from the answer under c, the weight of e_k.
FACTS = {
    "posterior": ("posterior", None, lambda p, prior: p[:, None]),
    "weighted": ("weighted", None, lambda p, prior: p[:, None]),
    "uniform": ("uniform", None, lambda p, prior: (1 - torch.eye(K)) * ratio(p) / (K - 1)),
    "uniform over all conditions, the own one too": (
        "weighted",
        lambda p, prior: torch.full_like(ratio(p), 1 / K),
        lambda p, prior: ratio(p) / K,
    ),
    "c~ ~ prior, weight p(x_t|c~) / p(x_t|c)": (
        "weighted",
        lambda p, prior: prior * ratio(p / prior),
        lambda p, prior: prior.expand(len(p), K, K),
    ),
    "an under-confident posterior": (
        "posterior",
        lambda p, prior: smoothed(p)[:, None].expand(-1, K, -1),
        lambda p, prior: ratio(p) * smoothed(p)[..., None],
    ),
}


@pytest.mark.parametrize("world", WORLDS)
@float64()
def test_maximum_likelihood_pulls_every_answer_to_the_exact_one(world):
    """The gradient is (answer - e_c), weighed by how often state and condition are met; the other facts are relative to that."""
    world = WORLDS[world]()
    assert world.mass_SK1.min() > 0
    assert relative(world.pull(Objective(), world.table_SKX), world.answers(world.table_SKX) - world.exact_SKX) < 1e-10


def strengths(contrast: str) -> list[Schedule]:
    """Every kind of schedule with several strengths above -1; `uniform` has no negative ones."""
    every = [replace(schedule, weight=lam) for schedule in SCHEDULES.values() for lam in (0.3, 2.0, -0.9)]
    return [each for each in every if contrast != "uniform" or (each.weight > 0 and each.kind != "negative_window")]


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("world", WORLDS)
@float64()
def test_a_contrast_subtracts_the_exact_answers_by_its_shares_and_only_the_exact_posterior_makes_that_guidance(world, fact):
    """Gradient (1 + lam) (answer - e_c) - lam sum_k share(c, k) (answer - e_k), at any answers whatever.

    So the optimum is [(1 + lam) e_c - lam sum_k share(c, k) e_k] / Z, Z = 1 + lam - lam sum_k share(c, k), where Z > 0 and (tokens)
    all entries are positive; elsewhere there is none. Z is 1, the curvature of maximum likelihood, where the shares add up to 1.
    With share(c, k) = p_k that is e_c + lam(progress) (e_c - e_0): for diffusion the prediction of the guided sampler of the same
    schedule, for tokens guidance of the probabilities.
    """
    world, (contrast, belief, share) = WORLDS[world](), FACTS[fact]
    belief_SKK = belief(world.posterior_SK, world.prior_K) if belief else None
    share_SKK = share(world.posterior_SK, world.prior_K).expand(-1, K, -1)
    answers, exact_SKX = world.answers(world.table_SKX), world.exact_SKX
    for schedule in strengths(contrast):
        objective = Objective("mclr", contrast, schedule, truncate=0.0)
        lam_SK1 = schedule(world.progress_S)[:, None, None].expand(-1, K, 1)
        assert schedule.kind == "constant" or len(lam_SK1.unique()) > 1
        subtracted = share_SKK.sum(-1, keepdim=True) * answers - share_SKK @ exact_SKX
        expected = (1 + lam_SK1) * (answers - exact_SKX) - lam_SK1 * subtracted
        assert relative(world.pull(objective, world.table_SKX, None, belief_SKK), expected) < 1e-10
        guided = world.table_of(mix(exact_SKX, world.marginal_SX[:, None], lam_SK1[..., 0]))
        assert (world.pull(objective, guided, None, belief_SKK).abs().max() < 1e-9) == (fact in ("posterior", "weighted"))


@pytest.mark.parametrize("world", WORLDS)
@float64()
def test_null_is_maximum_likelihood_of_the_inversely_guided_network(world):
    """So its optimum is exactly what guidance of the same schedule computes, whatever the null branch believes, for every lam > -1.

    For tokens that is guidance in the logits: q_c ~ e_c^(1 + lam) q_null^-lam. For diffusion with a weak guide: autoguidance.
    """
    world = WORLDS[world]()
    null_SX = wave(*world.marginal_SX.shape, phase=5)
    for schedule in strengths("null"):
        objective, lam_SK = Objective("mclr", "null", schedule), schedule(world.progress_S)[:, None].expand(-1, K)
        inverse = mix(world.table_SKX, null_SX[:, None], -lam_SK / (1 + lam_SK))
        assert relative(world.pull(objective, world.table_SKX, null_SX), world.answers(inverse) - world.exact_SKX) < 1e-10
        guided = mix(world.table_of(world.exact_SKX), null_SX[:, None], lam_SK)
        assert world.pull(objective, guided, null_SX).abs().max() < 1e-10


@pytest.mark.parametrize("under", ["own", "null"])
@pytest.mark.parametrize("world", WORLDS)
@float64()
def test_any_guide_is_internalised(world, under):
    """The optimum is guidance by that guide: another network under the sample's condition, or its null condition, of other classes."""
    world, conditions = WORLDS[world](), K if under == "own" else 5
    table_SCX = wave(len(world.exact_SKX), conditions + 1, world.exact_SKX.shape[-1], phase=5)
    guide = Guide(world.net(table_SCX), None if under == "own" else conditions)
    guide_SKX = table_SCX[:, :K] if under == "own" else table_SCX[:, -1:]
    for schedule in strengths("null"):
        objective, lam_SK = Objective("mclr", "null", schedule), schedule(world.progress_S)[:, None].expand(-1, K)
        guided = mix(world.table_of(world.exact_SKX), guide_SKX, lam_SK)
        assert world.pull(objective, guided, None, None, guide).abs().max() < 1e-10
        assert world.pull(objective, guided).abs().max() > 1e-3


def curvature(world: World, objective: Objective, belief_SKK: Tensor | None = None) -> Tensor:
    """Of the expected loss, over that of maximum likelihood, by state and condition: negative where there is no minimum."""
    at_one, at_zero = (world.pull(objective, torch.full_like(world.exact_SKX, x), None, belief_SKK) for x in (1.0, 0.0))
    return (at_one - at_zero)[..., 0]


@pytest.mark.parametrize(("sigma", "share"), [(0.8, 0.437), (0.3, 0.598)])
@float64()
def test_uniform_is_unbounded_on_a_large_share_of_its_negatives(sigma, share):
    """lam .7: where (1 + lam) p_c < lam / (K - 1) times the sum of the others' p_k."""
    world, joint_SK = line(sigma, 1201)
    negatives_SK = (joint_SK.sum(1, keepdim=True) - joint_SK) / (K - 1)
    unbounded_SK = curvature(world, Objective("mclr", "uniform", lam=0.7)) < 0
    assert torch.equal(unbounded_SK, 1.7 * joint_SK < 0.7 * negatives_SK)
    assert (negatives_SK * unbounded_SK).sum().item() == pytest.approx(share, abs=0.005)


@float64()
def test_label_smoothing_unbounds_half_of_all_points_and_the_truncated_draw_cures():
    """1 % of it, lam .7: where p_c is small, 1 + lam - lam q_c / p_c falls below 0.

    Without the 2 % of unlikeliest conditions the curvature is above 0 everywhere, and the optimum is 1.2 % off (relative RMS over p_t).
    """
    world, joint_SK = line(0.3, 241)
    objective = Objective("mclr", "posterior", lam=0.7, truncate=0.0)
    belief_SKK = smoothed(world.posterior_SK)[:, None].expand(-1, K, -1)
    unbounded_S = (curvature(world, objective, belief_SKK) < 0).any(1)
    assert (joint_SK.sum(1) * unbounded_S).sum().item() == pytest.approx(0.50, abs=0.02)

    objective = replace(objective, truncate=0.02)
    curvature_SK = curvature(world, objective, belief_SKK)
    assert curvature_SK.min() > 0.5
    guided = mix(world.exact_SKX, world.marginal_SX[:, None], 0.7)
    off = world.pull(objective, guided, None, belief_SKK) / curvature_SK[..., None]
    error, size = ((joint_SK * x.square().sum(-1)).sum().sqrt() for x in (off, guided))
    assert error / size == pytest.approx(0.012, abs=0.002)


@pytest.mark.parametrize(("contrast", "spread", "lam"), [("posterior", 1.5, 0.7), ("uniform", 1.0, 0.3)])
@float64()
def test_the_bound_makes_an_optimum_where_there_is_none(contrast, spread, lam):
    """Additive without the negatives that are already `bound` nats less likely here than under their own condition.

    mu q_c(v) = (1 + lam) p_c(v) - lam sum of share(c, k) p_k(v) over the k with q_k(v) < e^bound q_c(v); at such a jump q_c(v) rests
    where mu q_c(v) lies within it. Found by descent from nowhere; without the bound there is no bottom.
    """
    spoken, bound, steps = language(spread, L=2), 1.0, 500
    e_SKV, share_SKK = spoken.exact_SKX, FACTS[contrast][2](spoken.posterior_SK, spoken.prior_K).expand(-1, K, -1)
    objective = Objective("mclr", contrast, lam=lam, bound=bound, truncate=0.0)
    logits = torch.zeros_like(e_SKV, requires_grad=True)
    adam = torch.optim.Adam([logits], betas=(0.5, 0.9))
    for i in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * 1e-4 ** (i / steps)
        logits.grad = spoken.pull(objective, logits)
        adam.step()

    q_SKV = logits.detach().softmax(-1)
    beyond_SCKV = (q_SKV[:, None] / q_SKV[:, :, None]).log() - bound
    below, above = (
        (1 + lam) * e_SKV - lam * torch.einsum("sck,skv,sckv->scv", share_SKK, e_SKV, (beyond_SCKV < edge).double())
        for edge in (1e-3, -1e-3)
    )
    assert (below != above).any() and ((below / q_SKV).amax(-1) - (above / q_SKV).amin(-1)).max() < 1e-4

    additive = (1 + lam) * e_SKV - lam * share_SKK @ e_SKV
    assert additive.min() < 0 and (additive - q_SKV).abs().max() > 0.05
    unbounded, losses = replace(objective, bound=None), []
    for depth in (50.0, 100.0, 200.0):
        deep = torch.where(additive < 0, -depth, logits.detach())
        losses.append(spoken.expected_loss(unbounded, deep).item())
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


# form, contrast, kind of schedule; of the contrast null, the condition under which a weaker network guides
TRAINED = [
    (EDM(-0.6, 1.4), "posterior", "constant", None),
    (EDM(-0.6, 1.4), "posterior", "interval", None),
    (EDM(-0.6, 1.4), "posterior", "negative_window", None),
    (EDM(-0.6, 1.4), "null", "constant", "own"),
    (Flow(), "null", "constant", "own"),
    (DDPM(), "null", "constant", "null"),
]


@pytest.mark.parametrize(
    ("form", "contrast", "kind", "under"),
    TRAINED,
    ids=lambda each: getattr(each, "__class__", str).__name__ if isinstance(each, Form) else str(each),
)
def test_training_internalises_the_guided_sampler(form, contrast, kind, under):
    """Trained with lam(progress), a network denoises like the sampler guided by gamma(progress), and its plain samples are its samples.

    From scratch. Denoiser: 2 % (relative RMS over p_t, where unguided is 15 to 30 % off); 3 % of another form than EDM. 20,001 samples:
    means to 3 % of the separation of the classes, variances to 5 %.
    """
    mean_K, schedule = torch.tensor([-1.0, 0.3, 1.2]), replace(SCHEDULES[kind], weight=0.7)
    steps = 1000 if isinstance(form, EDM) else 2000
    oracle = Mixture(torch.tensor([0.4, 0.35, 0.25]), mean_K[:, None], torch.tensor([[0.2], [0.3], [0.15]]))
    # what a network knows that has learned half of it
    weak = replace(oracle, mean_KD=oracle.mean_KD / 2, variance_KD=oracle.variance_KD + 0.4)
    paradigm, objective = Diffusion((1, 1, 1), K, form), Objective("mclr", contrast, schedule, truncate=0.0)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3 + K, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, K))
    nn.init.zeros_(layers[-1].weight)

    def denoise(noisy_RCHW: Tensor, sigma_R: Tensor, c_R: Tensor) -> Tensor:
        """Preconditioned as in EDM for data of variance 1. It sees the posterior and the schedule's weight, so that it can be small."""
        x_R1, sigma_R1 = noisy_RCHW.flatten(1), sigma_R[:, None]
        size_R1 = (1 + sigma_R1**2).sqrt()
        seen = [x_R1 / size_R1, sigma_R1.log() / 2, schedule(progress_of(sigma_R1)), oracle.posterior(x_R1, sigma_R)]
        out_R1 = layers(torch.cat(seen, 1)).gather(1, c_R[:, None])
        return (x_R1 / size_R1**2 + sigma_R1 / size_R1 * out_R1).view_as(noisy_RCHW)

    def of_form(denoise: Any) -> OfForm:
        """A network of this form. tau stays away from 0 and 1, where ln sigma is infinite."""
        kept = (1e-4, 0.9999) if isinstance(form, Flow) else (0.0, None)
        return OfForm(form, lambda x, level, c: denoise(form.noisy(x, level.clamp(*kept)), form.sigma(level.clamp(*kept)), c))

    net, perfect, draws = of_form(denoise), of_form(lambda *asked: oracle.denoise(*asked)[0]), QuasiRandom(5, 512)
    guide = under and Guide(of_form(lambda *asked: weak.denoise(*asked)[0]), K if under == "null" else None)
    optimizer = torch.optim.Adam(layers.parameters(), betas=(0.9, 0.99))
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.04 * min(1, i / 100) * (1 - i / steps) ** 2
        x_B, c_B = oracle.sample(draws)
        probe = paradigm.probe(x_B, draws)
        rows = objective.rows(probe, c_B, K, draws, noisy_posterior(oracle.log_joint, K, paradigm.noisy(probe), c_B)[0])
        loss_B, _ = objective(score(paradigm, net, probe, rows, guide=guide), rows)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
    layers.requires_grad_(False)

    draws = QuasiRandom(4, 20_001)
    x_B, c_B = oracle.sample(draws)
    # the noise of EDM for every form: where a sampler spends its steps
    at = Diffusion((1, 1, 1), K, TRAINED[0][0]).probe(x_B, draws).inputs
    at = (at["state"], at["level"])
    guided_by = (oracle, torch.full_like(c_B, K)) if guide is None else (weak, guide.conditions(c_B))
    conditional, other = (known.denoise(*at, c)[0] for known, c in ((oracle, c_B), guided_by))
    guided = mix(conditional, other, schedule(progress_of(at[1])))
    off, unguided = (
        (pred - guided).square().sum().sqrt() / guided.square().sum().sqrt() for pred in (denoise(*at, c_B), conditional)
    )
    assert off < (0.02 if isinstance(form, EDM) else 0.03) and unguided > (0.2 if contrast == "posterior" else 0.15)

    mine, guided = (
        paradigm.sample(network, torch.arange(K).repeat_interleave(6667), guidance, QuasiRandom(1, 20_001)).view(K, -1)
        for network, guidance in ((net, Guidance()), (perfect, Guidance(schedule, guide)))
    )
    separation = mean_K.diff().min()
    assert (mine.mean(1) - guided.mean(1)).abs().max() < 0.03 * separation
    assert (mine.var(1) / guided.var(1) - 1).abs().max() < 0.05
    # and guidance does something that these bounds notice
    assert (guided.mean(1) - mean_K).abs().max() > 0.15 * separation


@pytest.mark.parametrize("kind", SCHEDULES)
@float64()
def test_training_internalises_the_guided_sampler_of_tokens(kind):
    """The same by contrast null, the null condition learned along by dropping one condition in ten: token by token the same samples."""
    spoken, guidance, steps = language(1.0), Guidance(replace(SCHEDULES[kind], weight=1.5)), 400
    objective, dropped_B = Objective("mclr", "null", guidance.gamma), torch.full_like(spoken.c_B, K)
    logits = torch.zeros(len(spoken.exact_SKX), K + 1, 3, requires_grad=True)
    adam = torch.optim.Adam([logits])
    for i in range(steps):
        adam.param_groups[0]["lr"] = 0.1 * 1e-3 ** (i / steps)
        kept_B, null_B = (spoken.expected_loss_B(objective, spoken.net(logits), c_B) for c_B in (spoken.c_B, dropped_B))
        (logits.grad,) = torch.autograd.grad(spoken.chance_B @ (0.9 * kept_B + 0.1 * null_B), logits)
        adam.step()

    perfect = torch.cat([spoken.exact_SKX, spoken.marginal_SX[:, None]], 1).log()
    c_B = torch.arange(K).repeat_interleave(1000)
    mine, guided, plain = (
        spoken.paradigm.sample(spoken.net(table), c_B, gamma, Draws64(0, list(range(3000))))
        for table, gamma in ((logits.detach(), Guidance()), (perfect, guidance), (perfect, Guidance()))
    )
    assert (mine != guided).float().mean() < min(0.01, 0.1 * (plain != guided).float().mean())
