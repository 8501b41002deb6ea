"""The objective against explicit formulas: gradients, full pairs, expectations, optima; and the golden losses.

`PYTHONPATH=.:tests python tests/mclr/test_objective.py` writes tests/golden/losses.json anew: only for a change of numerics that is meant.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    CONDITIONS,
    CONTRASTS,
    GENERATED,
    KINDS,
    MISMATCHED,
    RAMP,
    Counted,
    Draws64,
    Given,
    K,
    ToyTokenizer,
    V,
    float64,
    logits_of,
    toy,
    wave,
)

from mclr.adapters import from_denoiser, own_logits
from mclr.combinations import CONTRASTS as CONTRASTS_OF
from mclr.combinations import WITH_REFERENCE
from mclr.contrast import paired_rows
from mclr.likelihood import Probe, Rows, Scores, score
from mclr.next_scale import NextScale
from mclr.objective import Objective
from mclr.schedule import Schedule

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
MLE = Objective()
# the others of the family; their contrast is fixed by their name
FAMILY = {
    "unlearn": Objective("unlearn", lam=Schedule("ramp", 0.7)),
    "cc_dpo": Objective("cc_dpo", lam=1.0, beta=0.3),
    "cca": Objective("cca", lam=2.5, beta=0.3),
    "ddo": Objective("ddo", lam=2.5, beta=0.3),
}
TINY = 1e-12


def close(a: Tensor, b: Tensor, tolerance: float = TINY) -> bool:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def objective_of(contrast: str, *others: Any, **named: Any) -> Objective:
    """One of CONTRASTS under mclr, where there is one."""
    return MLE if contrast == "none" else Objective("mclr", contrast, *others, **named)


WRONG = {
    "posteriour": ({"name": "posteriour", "lam": 1.0}, "name=posteriour is unknown: expected mle, mclr,"),
    "contrast of mclr missing": ({"name": "mclr", "lam": 1.0}, "expected posterior or null or weighted or uniform"),
    "unknown contrast": ({"name": "mclr", "contrast": "x"}, "contrast=x is not for name=mclr"),
    "contrast of another": ({"name": "unlearn", "contrast": "posterior"}, "expected uniform"),
    "another contrast": ({"name": "cca", "contrast": "uniform", "beta": 1.0, "lam": 1.0}, "expected marginal"),
    "mle has no strength": ({"name": "mle", "lam": 0.1}, "there it must be 0"),
    "null has no bound": ({"name": "mclr", "contrast": "null", "bound": 1.0}, "bound=1.0 needs mclr"),
    "cca has no bound": ({"name": "cca", "beta": 0.1, "lam": 1.0, "bound": 1.0}, "bound=1.0 needs mclr"),
    "bound of 0": ({"name": "mclr", "contrast": "uniform", "bound": 0.0}, "bound=0.0 is out of range"),
    "beta is missing": ({"name": "ddo", "lam": 1.0}, "objective ddo needs it"),
    "beta of 0": ({"name": "ddo", "lam": 1.0, "beta": 0.0}, "beta=0.0 is out of range"),
    "beta without a reference": ({"name": "mclr", "contrast": "null", "beta": 0.1}, "only cc_dpo, cca, ddo have it"),
    "a ratio of samples has no schedule": ({"name": "ddo", "beta": 0.1, "lam": RAMP}, "its ratio is of whole samples"),
    "negative uniform": ({"name": "mclr", "contrast": "uniform", "lam": -0.1}, "must be >= 0 with contrast=uniform"),
    "null at -1": ({"name": "mclr", "contrast": "null", "lam": -1.0}, "must be > -1 with contrast=null"),
    "no number": ({"name": "mclr", "contrast": "null", "lam": float("nan")}, "weight=nan of a schedule must be a finite number"),
    "truncate": ({"name": "mclr", "contrast": "posterior", "truncate": 0.5}, "truncate=0.5 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_an_objective_cannot_do_is_refused(case):
    """In one line, by the objective itself: each of these once gave a loss of another objective."""
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Objective(**settings)
    assert "\n" not in str(error.value)


def test_every_objective_of_the_table_can_be_made():
    for name, contrasts in CONTRASTS_OF.items():
        for contrast in contrasts:
            beta = 0.1 if name in WITH_REFERENCE else None
            assert Objective(name, contrast, lam=0.0 if name == "mle" else 1.5, beta=beta).contrast == contrast
    assert Objective("mclr", contrast="posterior", lam=1.5) == Objective("mclr", "posterior", 1.5)
    assert Objective("cca", lam=1, beta=0.1).contrast == "marginal" and Objective("mclr", "null", 2).schedule == constant(2)


def constant(lam: float) -> Schedule:
    return Schedule("constant", lam)


@float64()
def test_mle_has_exactly_edm2s_gradients():
    """EDM2's loss, eq. 21: err exp(-u) + u. Its value differs from ours by mean(err exp(-u)), which carries no gradient."""
    case = toy("diffusion")
    probe, _ = case.ask(MLE)
    x, sigma, net = probe.inputs["x"], probe.inputs["sigma"], case.net
    denoised, u = net.denoise(probe.inputs["noisy"], sigma, case.c_B)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    err = weight * (denoised - x).square().mean((1, 2, 3))
    edm2 = err * (-u).exp() + u
    expected = torch.autograd.grad(edm2.mean(), list(net.parameters()))
    assert all(grad.abs().max() > 1e-3 for grad in expected)
    for name, grad in zip(case.gradients(MLE), expected, strict=True):
        assert close(case.gradients(MLE)[name], grad), name
    assert close(case.loss(MLE), edm2 + err * (-u).exp())


@float64()
def test_mle_of_tokens_is_cross_entropy():
    case = toy("tokens")
    probe, _ = case.ask(MLE)
    logits = logits_of(case.net, probe.inputs["teacher"], case.c_B)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), case.x_B, reduction="none").mean(1)
    assert close(case.loss(MLE), expected)


@pytest.mark.parametrize("contrast", CONTRASTS)
@float64()
def test_uncertainty_learns_from_matched_rows_alone(contrast):
    """No value carries gradient into u, whatever the contrast: a ratio could drive u to -infinity."""
    case, objective = toy("diffusion"), objective_of(contrast, RAMP, truncate=0.0)
    scores, _ = case.score(objective)
    (through_values,) = torch.autograd.grad(scores.value_RT.sum(), case.net.uncertainty, allow_unused=True)
    assert through_values is None
    assert close(case.gradients(objective)["uncertainty"], case.gradients(MLE)["uncertainty"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_without_strength_every_contrast_is_mle_to_the_bit(kind, contrast):
    case, objective = toy(kind, torch.float32), objective_of(contrast, constant(0.0))
    assert torch.equal(case.loss(objective), case.loss(MLE))
    expected = case.gradients(MLE)
    for name, grad in case.gradients(objective).items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS[1:])
def test_dropped_conditions_are_plain_mle(kind, contrast):
    """No strength, no contrast row, no null row: a sample whose condition was dropped learns the null condition."""
    case, objective = toy(kind), Objective("mclr", contrast, RAMP, truncate=0.0)
    dropped = case.c_B == K
    with float64():
        _, rows = case.ask(objective)
        assert rows.lam_BT[dropped].eq(0).all() and rows.lam_BT[~dropped].ne(0).any(1).all()
        sample = dropped.nonzero()[:, 0]
        assert rows.contrast_BT[sample].eq(sample[:, None]).all()
        assert not torch.isin(rows.index_R[8 : rows.contrast_BT.max() + 1], sample).any()
        assert torch.equal(case.loss(objective)[dropped], case.loss(MLE)[dropped])
        case.net = Counted(case.net)
        case.loss(objective)
    if contrast == "null":
        assert case.net.calls == [(7, False), (8, True)]
        assert case.net.conditions[0] == [K] * 7


def by_definition(case, objective: Objective) -> Tensor:
    """loss_B from all K rows of every sample, term by term, with c~ drawn by the definition of each contrast."""
    draws = Draws64(0, list(range(8)))
    probe = case.paradigm.probe(case.x_B, draws)
    u_B = draws.uniform().tolist()
    posterior = case.posterior(probe, case.c_B % K)[0].expand(-1, probe.progress_BT.shape[1], -1)
    value = [case.value(probe, c).value_RT for c in range(K)]
    matched, lam_BT, losses = case.value(probe, case.c_B), RAMP(probe.progress_BT), []
    for b, c in enumerate(case.c_B.tolist()):
        terms = []
        for t, up in enumerate(matched.value_RT[b]):
            lam, w = (lam_BT[b, t], 1.0) if c != K else (0.0, 1.0)
            if objective.contrast == "uniform":
                others = [k for k in range(K) if k != c]
                other = others[int(u_B[b] * len(others))]
            elif objective.contrast == "weighted":
                other = int(u_B[b] * K)
                w = K * posterior[b, t, other]
            else:
                p = posterior[b, t].tolist()
                p = [q if sum(r for r in p if r <= q) > objective.truncate else 0.0 for q in p]
                other = next(k for k in range(K) if u_B[b] * sum(p) < sum(p[: k + 1]))
            down = value[other][b, t]
            if objective.bound is not None:
                down = torch.maximum(down, up.detach() - objective.bound)
            terms.append(-(1 + lam) * up + lam * w * down)
        losses.append(torch.stack(terms).mean() + matched.aux_R[b])
    return torch.stack(losses)


@pytest.mark.parametrize("contrast", MISMATCHED)
@pytest.mark.parametrize(("kind", "bound", "truncate"), [("diffusion", None, 0.0), ("tokens", None, 0.2), ("tokens", 0.4, 0.0)])
@float64()
def test_loss_is_the_full_pair_formula(contrast, kind, bound, truncate):
    """Rows that are not computed, or shared, change nothing: value and gradient, row by row."""
    case, objective = toy(kind), Objective("mclr", contrast, RAMP, bound, truncate)
    _, rows = case.ask(objective)
    assert rows.contrast_BT.max() >= 8  # some contrast rows exist
    loss_B, expected_B = case.loss(objective), by_definition(case, objective)
    assert close(loss_B, expected_B)
    expected = torch.autograd.grad(expected_B.mean(), list(case.net.parameters()))
    for (name, grad), wanted in zip(case.gradients(objective).items(), expected, strict=True):
        assert close(grad, wanted), name


@pytest.mark.parametrize("contrast", [*MISMATCHED, "null"])
@pytest.mark.parametrize(("high", "terms"), [(0.0, 1), (0.5, 5), (1.0, 14)])
@float64()
def test_rows_are_cut_short_after_the_last_scale_with_a_ratio(high, terms, contrast, monkeypatch):
    """Coarser scales do not see finer ones: the loss and its gradient are those of whole rows, at the cost of the prefix."""
    case, objective = toy("tokens"), Objective("mclr", contrast, Schedule("interval", 0.7, high=high), truncate=0.0)
    lengths = []

    def counted(teacher_BlE, c_R, index_R, net=case.net):
        lengths.append((torch.is_grad_enabled(), teacher_BlE.shape[1] + 1, len(c_R)))
        return net(teacher_BlE, c_R, index_R)

    loss, gradients = case.loss(objective), case.gradients(objective)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "terms", 14)
        patch.setattr(Rows, "terms_R", property(lambda rows: torch.full_like(rows.index_R, 14)))
        whole, expected = case.loss(objective), case.gradients(objective)
    assert close(loss, whole)
    for name, grad in gradients.items():
        assert close(grad, expected[name]), name
    _, rows = case.ask(objective)
    assert rows.terms == terms
    score(case.paradigm, counted, case.ask(objective)[0], rows)
    if contrast == "null":
        assert lengths == [(False, terms, 7), (True, 14, 8)]
        return
    last_R = [14] * 8 + [1 + max(t for b, t in (rows.contrast_BT == row).nonzero().tolist()) for row in range(8, len(rows.c_R))]
    assert lengths == [(True, end, last_R.count(end)) for end in (14, 5, 1) if end in last_R]
    # uniform and weighted draw once per sample, the posterior at every scale
    assert max(last_R[8:]) == terms and (len(set(last_R[8:])) > 1) == (contrast == "posterior" and high == 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_coinciding_draws_cost_no_rows_and_cancel_exactly(kind):
    """A posterior that is certain of the true condition leaves plain mle, lam or not."""
    case, objective = toy(kind, torch.float32), Objective("mclr", "posterior", RAMP)
    case.posterior = lambda probe, c_B: (torch.eye(K)[c_B][:, None].expand(-1, probe.progress_BT.shape[1], -1), None)
    case.net = Counted(case.net)
    loss_B = case.loss(objective)
    assert case.net.calls == [(8, True)]
    assert (loss_B - case.loss(MLE)).abs().max() < 1e-6 * loss_B.abs().max()


@float64()
def test_posterior_scores_only_the_draws_that_differ():
    """8 matched rows and the distinct mismatched pairs, in one forward per length."""
    for kind in KINDS:
        for seed in range(5):
            case, objective = toy(kind), Objective("mclr", "posterior", constant(0.5), truncate=0.0)
            draws = Draws64(seed, list(range(8)))
            probe = case.paradigm.probe(case.x_B, draws)
            p_BTK, u_B = case.posterior(probe, case.c_B % K)[0], draws.uniform()
            drawn_BT = (p_BTK.cumsum(-1) <= u_B[:, None, None]).sum(-1)
            pairs = {(b, c) for b, row in enumerate(drawn_BT.tolist()) for c in row if c != case.c_B[b] < K}
            assert pairs
            case.net = Counted(case.net)
            rows = objective.rows(probe, case.c_B, K, Given(u_B), p_BTK)
            score(case.paradigm, case.net, probe, rows)
            assert all(grad for _, grad in case.net.calls) and len(case.net.calls) <= (3 if kind == "tokens" else 1)
            assert sum(count for count, _ in case.net.calls) == 8 + len(pairs)


@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_weighted_and_posterior_have_the_same_expectation(kind):
    """Over c~, exactly: every interval of the uniform between two jumps of any term's c~ counts with its length."""
    case = toy(kind)
    probe, _ = case.ask(MLE)
    p_BTK = case.posterior(probe, case.c_B % K)[0]
    for b in range(8):
        expectation = {}
        for contrast in ("weighted", "posterior"):
            jumps = p_BTK[b].cumsum(-1)[:, :-1].flatten() if contrast == "posterior" else torch.arange(1, K) / K
            edges = torch.cat([torch.zeros(1), jumps, torch.ones(1)]).sort().values
            u_N, length_N = (edges[1:] + edges[:-1]) / 2, edges.diff()
            copies = torch.full((len(u_N),), b)
            here = Probe({name: x[copies] for name, x in probe.inputs.items()}, probe.progress_BT[copies])
            objective = Objective("mclr", contrast, RAMP, truncate=0.0)
            rows = objective.rows(here, case.c_B[copies], K, Given(u_N), p_BTK[copies])
            loss_N, _ = objective(score(case.paradigm, case.net, here, rows), rows)
            expectation[contrast] = length_N @ loss_N
        assert close(expectation["weighted"], expectation["posterior"])
        different = case.c_B[b] != K
        assert close(expectation["weighted"], case.loss(MLE)[b]) != different


@float64()
def test_bound_acts_on_the_contrast_alone():
    """Where l+ - l- > m the mismatched value gets no gradient; the matched one keeps all of (1 + lam)."""
    lam, bound = 0.5, 1.0
    objective = Objective("mclr", "uniform", constant(lam), bound)
    c_B = torch.tensor([0, 1])
    rows = paired_rows(c_B, torch.tensor([[1], [0]]), K, torch.full((2, 3), lam), torch.ones(2, 3))
    values = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0], [-1.5, -3.5, -9.0], [-1.999, -2.001, 0.0]])
    value_RT = torch.cat([values, torch.zeros(len(rows.c_R) - 4, 3)]).requires_grad_()
    loss_B, _ = objective(Scores(value_RT, value_RT.new_zeros(len(value_RT))), rows)
    (grad,) = torch.autograd.grad(loss_B.sum() * 3, value_RT)
    assert grad[:2].eq(-(1 + lam)).all()
    assert torch.equal(grad[2:4] / lam, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    bounded = values[2:].max(values[:2] - bound)
    assert close(loss_B, (-(1 + lam) * values[:2] + lam * bounded).mean(1))


def test_metrics_are_averages_without_gradient():
    case, objective = toy("tokens", torch.float32), Objective("mclr", "posterior", constant(0.5))
    scores, rows = case.score(objective)
    loss_B, metrics = objective(scores, rows)
    contrast = scores.value_RT.gather(0, rows.contrast_BT)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert metrics["value"] == scores.value_RT[:8].mean() and metrics["aux"] == 0
    assert torch.isclose(metrics["ratio"], (scores.value_RT[:8] - contrast).mean())
    own = torch.arange(8)[:, None]
    assert 0 < metrics["contrast_share"] < 1 and torch.isclose(metrics["contrast_share"], rows.contrast_BT.ne(own).float().mean())
    assert loss_B.shape == (8,) and loss_B.dtype == torch.float32


@pytest.mark.parametrize("lam", [0.7, 2.0, -0.5])
@float64()
def test_null_loss_is_mle_through_inverse_guidance(lam):
    """-(1+lam) log softmax(b z_c + (1-b) z_null)[x] for tokens, (1+lam) err(b D_c + (1-b) D_null) for diffusion; b = 1/(1+lam).

    A ramp, so that every term has its own b; the calibration of u sees the unmixed prediction.
    """
    objective = Objective("mclr", "null", Schedule("ramp", lam))
    for kind in KINDS:
        case = toy(kind)
        probe, _ = case.ask(MLE)
        everyone = torch.arange(8)
        pred, extra = case.paradigm.predict(case.net, probe, everyone, case.c_B)
        null, _ = case.paradigm.predict(case.net, probe, everyone, torch.full((8,), K))
        strength = lam * probe.progress_BT * (case.c_B != K)[:, None]
        if kind == "tokens":
            b = 1 / (1 + strength[..., None])
            value_BT = (b * extra(pred) + (1 - b) * extra(null)).log_softmax(-1).gather(-1, case.x_B[..., None])[..., 0]
            expected = (-(1 + strength) * value_BT).mean(1)
        else:
            b = 1 / (1 + strength[..., None, None])
            pred, null = (case.paradigm.denoised(raw, probe.inputs["noisy"], probe.inputs["sigma"]) for raw in (pred, null))
            err = (b * pred + (1 - b) * null - case.x_B).square().mean((1, 2, 3))
            sigma = probe.inputs["sigma"]
            weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
            plain = weight * (pred - case.x_B).square().mean((1, 2, 3))
            expected = (1 + strength[:, 0]) * weight * err * (-extra).exp() + plain * (-extra).exp() + extra
        assert close(case.loss(objective), expected)


@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_null_branch_gets_no_gradient(kind):
    """Of samples that kept their condition; with a dropped one it learns, as in mle."""
    objective = Objective("mclr", "null", RAMP)
    name = {"diffusion": "shift", "tokens": "condition"}[kind]
    assert toy(kind, c_B=CONDITIONS % K).gradients(objective)[name][K].eq(0).all()
    assert toy(kind).gradients(objective)[name][K].ne(0).all()


class Table:
    """A network that knows nothing but its conditions: one vector of logits each."""

    def __init__(self, logits_KV: Tensor):
        self.logits_KV = logits_KV

    def __call__(self, teacher_BlE: Tensor, c_R: Tensor, index_R: Tensor) -> tuple[Tensor, Any]:
        return self.logits_KV[c_R][:, None], own_logits


def null_losses(logits_KV: Tensor, lam: float) -> Tensor:
    """loss of each of the V codes as a single token under condition 0; K = 1, so the null condition is row 1."""
    paradigm, objective = NextScale((1,), 1, ToyTokenizer((1,))), Objective("mclr", "null", constant(lam))
    probe = paradigm.probe(torch.arange(V)[:, None], Given())
    rows = objective.rows(probe, torch.zeros(V, dtype=torch.long), 1, Given(), None)
    return objective(score(paradigm, Table(logits_KV), probe, rows), rows)[0]


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0, -0.5])
@float64()
def test_null_loss_of_tokens_is_likelihood_and_renyi_divergence(lam):
    """loss = -l+ - lam D_b(q_c, sg q_null) - lam l_null: the last term is a constant, so the gradients are those of the first two."""
    logits_KV = 2 * wave(2, V)
    z = logits_KV.log_softmax(-1).requires_grad_()
    b = 1 / (1 + lam)
    divergence = (b * z[0] + (1 - b) * z[1].detach()).logsumexp(-1) / (b - 1)
    expected_V = -z[0] - lam * divergence
    leaf = z.detach().clone().requires_grad_()
    loss_V = null_losses(leaf, lam)
    assert close(loss_V.detach(), (expected_V - lam * z[1]).detach())
    for loss, expected in zip(loss_V, expected_V, strict=True):
        (grad,), (wanted,) = (torch.autograd.grad(y, leaf_, retain_graph=True) for y, leaf_ in ((loss, leaf), (expected, z)))
        # as functions of the logits: the gradient of normalised log-probabilities is taken along the simplex
        assert close(grad[0], wanted[0] - z[0].detach().exp() * wanted[0].sum()) and grad[1].eq(0).all()
    assert divergence >= 0


def log_ratio(case, probe: Probe, c: int) -> Tensor:
    """log p(x|c) of the network minus that of the reference, [B], by the definition of each paradigm."""
    c_B = torch.full((len(probe.progress_BT),), c)
    if isinstance(case.paradigm, NextScale):
        logits, frozen = (logits_of(net, probe.inputs["teacher"], c_B).log_softmax(-1) for net in (case.net, case.reference))
        return (logits - frozen).gather(-1, probe.inputs["tokens"][..., None])[..., 0].sum(1)
    x, noisy, sigma = (probe.inputs[name] for name in ("x", "noisy", "sigma"))
    (denoised, _), (frozen, u) = (net.denoise(noisy, sigma, c_B) for net in (case.net, case.reference))
    gain = (frozen - x).square().sum((1, 2, 3)) - (denoised - x).square().sum((1, 2, 3))
    return (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2 * gain * (-u).exp()


def family_by_definition(case, objective: Objective) -> Tensor:
    """loss_B of the published formulas, sample by sample."""
    generated = objective.name == "ddo"
    draws = Draws64(0, list(range(16 if generated else 8)))
    probe = case.paradigm.probe(torch.cat([case.x_B, case.generated_B]) if generated else case.x_B, draws)
    u, lam, losses = draws.uniform().tolist(), objective.schedule.weight, []
    value = [case.value(probe, c).value_RT for c in range(K + 1)]
    delta = [objective.beta * log_ratio(case, probe, c) for c in range(K + 1)] if objective.beta else None
    s = torch.nn.functional.logsigmoid
    for b, c in enumerate(case.c_B.tolist()):
        other = [k for k in range(K) if k != c][int(u[b] * (K - 1))] if c != K else c
        if objective.name == "cca":
            other = K if u[b] >= 0.75 else int(u[b] / 0.75 * K)
            positive = other in (c, K)
            second = s(delta[other][b]) if positive else lam * s(-delta[other][b])
            losses.append(-(s(delta[c][b]) + second) / max(lam, 1))
        elif c == K:
            losses.append(-value[c][b].mean())
        elif objective.name == "unlearn":
            lam_T = RAMP(probe.progress_BT[b])
            losses.append((-value[c][b] + lam_T / (1 + lam_T) * value[other][b]).mean())
        elif objective.name == "cc_dpo":
            losses.append(-s(delta[c][b] - delta[other][b]))
        else:
            losses.append(-s(delta[c][b]) - lam * s(-delta[GENERATED[b]][8 + b]))
    return torch.stack(losses) + case.value(probe, torch.cat([case.c_B, GENERATED])[: len(probe.progress_BT)]).aux_R[:8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILY)
@float64()
def test_the_family_is_the_published_formulas(name, kind):
    """Loss and gradient; the reference is asked without gradient, for the same rows."""
    case, objective = toy(kind), FAMILY[name]
    loss_B, expected_B = case.loss(objective), family_by_definition(case, objective)
    assert close(loss_B, expected_B)
    expected = torch.autograd.grad(expected_B.mean(), list(case.net.parameters()))
    for (parameter, grad), wanted in zip(case.gradients(objective).items(), expected, strict=True):
        assert close(grad, wanted), parameter
    case.net, case.reference = Counted(case.net), Counted(case.reference)
    case.loss(objective)
    (rows, _), *others = case.net.calls
    assert rows > 8 and not others
    assert case.reference.calls == ([(rows, False)] if objective.needs_reference else [])
    assert case.reference.conditions == (case.net.conditions if objective.needs_reference else [])


@float64()
def test_the_ratio_to_the_reference_sees_an_error_that_shrank():
    """Half the error, and an uncertainty that followed: with each network's own uncertainty the ratio would be 0."""

    def frozen(noisy, sigma_R, c_R):
        denoised, logvar_R = case.net.denoise(noisy, sigma_R, c_R)
        x = probe.inputs["x"]
        return x + 2**0.5 * (denoised - x), logvar_R + torch.tensor(2.0).log()

    case = toy("diffusion")
    probe, rows = case.ask(MLE)
    scores = score(case.paradigm, case.net, probe, rows, from_denoiser(frozen))
    # err exp(-u) of the reference, halved by the network
    expected = -0.5 * case.paradigm.dims * scores.value_RT[:, 0]
    assert close(scores.delta_R, expected) and (scores.delta_R > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cc_dpo", "cca", "ddo"])
@float64()
def test_a_network_that_is_its_reference_is_undecided(name, kind):
    """Where fine-tuning starts every ratio is 0: the loss is log 2 for each sigmoid, and there is a gradient."""
    case, objective = toy(kind), FAMILY[name]
    case.reference = case.net
    scores, rows = case.score(objective)
    assert scores.delta_R.abs().max() == 0
    other, lam = rows.weight_BT[:, 0] > 0, objective.schedule.weight
    sigmoids = {"cc_dpo": 1, "cca": torch.where(other, 1 + lam, 2.0) / lam, "ddo": 1 + lam}[name]
    kept = case.c_B != K if name != "cca" else torch.ones(8, dtype=torch.bool)
    expected_B = torch.log(torch.tensor(2.0)) * sigmoids * torch.ones(8) + scores.aux_R[:8]
    assert close(case.loss(objective)[kept], expected_B[kept])
    assert all(grad.abs().max() > 0 for grad in case.gradients(objective).values())


@cache
def golden_losses() -> dict[str, dict]:
    """Rows, loss_B and norm of every gradient of one training step, by paradigm and objective."""
    golden = {}
    for kind in KINDS:
        bound = 0.5 if kind == "tokens" else None
        cases = {c: objective_of(c, RAMP, bound if c in MISMATCHED else None, truncate=0.1) for c in CONTRASTS} | FAMILY
        for name, objective in cases.items():
            with float64():
                case = toy(kind)
                _, rows = case.ask(objective)
                norms = {parameter: grad.norm().item() for parameter, grad in case.gradients(objective).items()}
                loss_B = case.loss(objective).tolist()
            golden[f"{kind} {name}"] = {"rows": len(rows.c_R), "loss": loss_B, "gradient": norms}
    return golden


@pytest.mark.parametrize("name", [f"{kind} {name}" for kind in KINDS for name in (*CONTRASTS, *FAMILY)])
def test_golden_losses(name):
    """Relative 1e-10 in fp64: rounding differs between machines, nothing else may."""
    golden, now = json.loads(GOLDEN.read_text())[name], golden_losses()[name]
    assert now["rows"] == golden["rows"]
    assert now["loss"] == pytest.approx(golden["loss"], rel=1e-10)
    assert now["gradient"] == pytest.approx(golden["gradient"], rel=1e-10)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_losses(), indent=1) + "\n")
