"""The objective against the published formulas: losses, gradients, which rows are scored; and the golden losses.

`PYTHONPATH=.:tests python tests/mclr/test_objective.py` writes tests/golden/losses.json anew: only for a change of numerics that is meant.
"""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import CONTRASTS, GENERATED, KINDS, MISMATCHED, RAMP, Counted, Draws64, Given, K, float64, logits_of, toy

from mclr.adapters import from_denoiser, own_logits
from mclr.likelihood import Guide, Probe, score
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


WRONG = {
    "posteriour": ({"name": "posteriour", "lam": 1.0}, "name=posteriour is unknown: expected mle, mclr,"),
    "contrast of mclr missing": ({"name": "mclr", "lam": 1.0}, "name=mclr needs contrast=posterior or null or weighted or uniform"),
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


@float64()
def test_mle_has_exactly_edm2s_gradients():
    """EDM2's loss, eq. 21: err exp(-u) + u. Its value differs from ours by mean(err exp(-u)), which carries no gradient."""
    case = toy("diffusion")
    probe, _ = case.ask(MLE)
    (noisy, sigma), net = case.paradigm.noisy(probe), case.net
    denoised, u = net.denoise(noisy, sigma, case.c_B)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    err = weight * (denoised - case.x_B).square().mean((1, 2, 3))
    edm2 = err * (-u).exp() + u
    expected = torch.autograd.grad(edm2.mean(), list(net.parameters()))
    assert all(grad.abs().max() > 1e-3 for grad in expected)
    for (name, grad), wanted in zip(case.gradients(MLE).items(), expected, strict=True):
        assert close(grad, wanted), name
    assert close(case.loss(MLE), edm2 + err * (-u).exp())


@pytest.mark.parametrize("contrast", CONTRASTS[1:])
@float64()
def test_uncertainty_learns_from_matched_rows_alone(contrast):
    """No value carries gradient into u, whatever the contrast: a ratio could drive u to -infinity."""
    case, objective = toy("diffusion"), Objective("mclr", contrast, RAMP, truncate=0.0)
    assert close(case.gradients(objective)["uncertainty"], case.gradients(MLE)["uncertainty"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS[1:])
def test_without_strength_every_contrast_is_mle_to_the_bit(kind, contrast):
    case, objective = toy(kind, torch.float32), Objective("mclr", contrast, 0.0)
    assert torch.equal(case.loss(objective), case.loss(MLE))
    expected = case.gradients(MLE)
    for name, grad in case.gradients(objective).items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS[1:])
@float64()
def test_dropped_conditions_are_plain_mle(kind, contrast):
    """No strength, no contrast row, no null row: a sample whose condition was dropped learns the null condition."""
    case, objective = toy(kind), Objective("mclr", contrast, RAMP, truncate=0.0)
    (_, rows), dropped = case.ask(objective), case.c_B == K
    assert rows.lam_BT[dropped].eq(0).all() and rows.lam_BT[~dropped].ne(0).any(1).all()
    sample = dropped.nonzero()[:, 0]
    assert rows.contrast_BT[sample].eq(sample[:, None]).all() and not torch.isin(rows.index_R[8:], sample).any()
    assert torch.equal(case.loss(objective)[dropped], case.loss(MLE)[dropped])


def draw(contrast: str, c: int, u: float, p: list[float], truncate: float) -> tuple[int, float]:
    """(c~, its weight) for a uniform u, by the definition of each contrast; p is p(c | what the network sees)."""
    if contrast == "uniform":
        others = [k for k in range(K) if k != c]
        return others[int(u * len(others))], 1.0
    if contrast == "weighted":
        return int(u * K), K * p[int(u * K)]
    if contrast == "posterior":
        p = [q if sum(r for r in p if r <= q) > truncate else 0.0 for q in p]
        return next(k for k in range(K) if u * sum(p) < sum(p[: k + 1])), 1.0
    return (K if u >= 0.75 else int(u / 0.75 * K)), 1.0


def log_ratio(case, probe: Probe, c: int) -> Tensor:
    """log p(x|c) of the network minus that of the reference, [B], by the definition of each paradigm."""
    c_B = torch.full((len(probe.progress_BT),), c)
    if isinstance(case.paradigm, NextScale):
        logits, frozen = (logits_of(net, probe.inputs["teacher"], c_B).log_softmax(-1) for net in (case.net, case.reference))
        return (logits - frozen).gather(-1, probe.inputs["tokens"][..., None])[..., 0].sum(1)
    (noisy, sigma), x = case.paradigm.noisy(probe), case.paradigm.form.denoised(*probe.inputs.values())
    (denoised, _), (frozen, u) = (net.denoise(noisy, sigma, c_B) for net in (case.net, case.reference))
    gain = (frozen - x).square().sum((1, 2, 3)) - (denoised - x).square().sum((1, 2, 3))
    return (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2 * gain * (-u).exp()


def by_definition(case, objective: Objective) -> Tensor:
    """loss_B of the published formulas, sample by sample and term by term, from the values of every sample under every condition."""
    c_B = torch.cat([case.c_B, GENERATED]) if objective.needs_generated else case.c_B
    draws = Draws64(0, list(range(len(c_B))))
    probe = case.paradigm.probe(torch.cat([case.x_B, case.generated_B])[: len(c_B)], draws)
    u_B, losses, s = draws.uniform().tolist(), [], torch.nn.functional.logsigmoid
    lam_BT, matched = objective.schedule(probe.progress_BT), case.value(probe, c_B)
    posterior_BTK = case.posterior(probe, c_B % K)[0].expand(-1, lam_BT.shape[1], -1).tolist()
    value = [case.value(probe, c).value_RT for c in range(K + 1)]
    delta = [objective.beta * log_ratio(case, probe, c) for c in range(K + 1)] if objective.beta else []
    for b, c in enumerate(case.c_B.tolist()):
        drawn = [draw(objective.contrast, c, u_B[b], p, objective.truncate) for p in posterior_BTK[b]]
        other, lam = drawn[0][0], objective.schedule.weight
        if objective.name == "cca":
            second = s(delta[other][b]) if other in (c, K) else lam * s(-delta[other][b])
            losses.append(-(s(delta[c][b]) + second) / max(lam, 1))
        elif c == K or objective.name == "mle":
            losses.append(-value[c][b].mean())
        elif objective.name == "cc_dpo":
            losses.append(-s(delta[c][b] - delta[other][b]))
        elif objective.name == "ddo":
            losses.append(-s(delta[c][b]) - lam * s(-delta[GENERATED[b]][8 + b]))
        else:
            up, lam_T, weight_T = value[c][b], lam_BT[b], torch.tensor([weight for _, weight in drawn])
            down = torch.stack([value[other][b, t] for t, (other, _) in enumerate(drawn)])
            if objective.bound is not None:
                down = torch.maximum(down, up.detach() - objective.bound)
            plus, minus = (1.0, lam_T / (1 + lam_T)) if objective.name == "unlearn" else (1 + lam_T, lam_T)
            losses.append((-plus * up + minus * weight_T * down).mean())
    return torch.stack(losses) + matched.aux_R[:8]


def null_by_definition(case, objective: Objective, guide: Guide | None = None) -> Tensor:
    """loss_B of maximum likelihood through inverse guidance: -(1 + lam) times the value of b pred + (1 - b) guide, b = 1 / (1 + lam)."""
    (probe, _), everyone, guide = case.ask(MLE), torch.arange(8), guide or Guide(case.net, K)
    lam_BT = objective.schedule(probe.progress_BT) * (case.c_B != K)[:, None]
    pred, rest = case.paradigm.predict(case.net, probe, everyone, case.c_B)
    with torch.no_grad():
        other, head = case.paradigm.predict(guide.net, probe, everyone, guide.conditions(case.c_B))
        other = other if pred.ndim == 4 else head(other)
    if pred.ndim == 3:  # hidden states of tokens
        pred, rest = rest(pred), own_logits
    b = (1 / (1 + lam_BT)).view(*lam_BT.shape, *[1] * (pred.ndim - 2))
    mixed, plain = (case.paradigm.log_likelihood((each, rest), probe, everyone) for each in (b * pred + (1 - b) * other, pred))
    return (-(1 + lam_BT) * mixed.value_RT).mean(1) + plain.aux_R


def check_definition(case, objective: Objective) -> None:
    """Loss and gradient: rows that are not computed, or shared, change nothing."""
    expected_B = (null_by_definition if objective.contrast == "null" else by_definition)(case, objective)
    assert close(case.loss(objective), expected_B)
    expected = torch.autograd.grad(expected_B.mean(), list(case.net.parameters()))
    for (name, grad), wanted in zip(case.gradients(objective).items(), expected, strict=True):
        assert close(grad, wanted), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mle", *MISMATCHED, *FAMILY])
@float64()
def test_every_loss_is_its_published_formula(name, kind):
    """The network and the reference are asked once, for the same rows, the latter without gradient."""
    objectives = {name: Objective("mclr", name, RAMP, truncate=0.2 if kind == "tokens" else 0.0) for name in MISMATCHED}
    case, objective = toy(kind), ({"mle": MLE} | objectives | FAMILY)[name]
    check_definition(case, objective)
    case.net, case.reference = Counted(case.net), Counted(case.reference)
    case.loss(objective)
    rows = sum(rows for rows, _ in case.net.calls)
    assert (rows == 8 if name == "mle" else rows > 8) and all(grad for _, grad in case.net.calls)
    assert case.reference.calls == ([(rows, False)] if objective.needs_reference else [])
    assert case.reference.conditions == (case.net.conditions if objective.needs_reference else [])


@pytest.mark.parametrize("contrast", MISMATCHED)
@float64()
def test_the_bounded_loss_is_its_formula(contrast):
    """Where l+ - l- > m the mismatched value gets no gradient; the matched one keeps all of (1 + lam)."""
    case, objective = toy("tokens"), Objective("mclr", contrast, RAMP, 0.4, 0.0)
    check_definition(case, objective)
    assert not close(case.loss(objective), case.loss(replace(objective, bound=None)), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.7, 2.0, -0.5])
@float64()
def test_null_loss_is_mle_through_inverse_guidance(lam, kind):
    """On a ramp, so that every term has its own b. u sees the unmixed prediction; the null branch learns from dropped samples alone."""
    check_definition(toy(kind), Objective("mclr", "null", Schedule("ramp", lam)))


@pytest.mark.parametrize("contrast", [*MISMATCHED, "null"])
@pytest.mark.parametrize(("high", "terms"), [(0.0, 1), (0.5, 5), (1.0, 14)])
@float64()
def test_rows_are_cut_short_after_the_last_scale_with_a_ratio(high, terms, contrast):
    """Coarser scales do not see finer ones: the loss and its gradient are those of whole rows, at the cost of the prefix."""
    case, objective = toy("tokens"), Objective("mclr", contrast, Schedule("interval", 0.7, high=high), truncate=0.0)
    check_definition(case, objective)
    (probe, rows), lengths = case.ask(objective), []

    def counted(teacher_BlE, c_R, index_R):
        lengths.append((torch.is_grad_enabled(), teacher_BlE.shape[1] + 1, len(c_R)))
        return case.net(teacher_BlE, c_R, index_R)

    score(case.paradigm, counted, probe, rows)
    assert rows.terms == terms
    if contrast == "null":
        assert lengths == [(False, terms, 7), (True, 14, 8)]
        return
    last_R = [14] * 8 + [1 + max(t for b, t in (rows.contrast_BT == row).nonzero().tolist()) for row in range(8, len(rows.c_R))]
    assert lengths == [(True, end, last_R.count(end)) for end in (14, 5, 1) if end in last_R]
    # uniform and weighted draw once per sample, the posterior at every scale
    assert max(last_R[8:]) == terms and (len(set(last_R[8:])) > 1) == (contrast == "posterior" and high == 1.0)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_draws_that_coincide_cost_no_rows_and_cancel(kind, certain):
    """8 matched rows and the distinct mismatched pairs, in one forward per length; a sample without pairs has the loss of mle."""
    objective = Objective("mclr", "posterior", 0.5, truncate=0.0)
    for seed in range(5):
        case, draws = toy(kind), Draws64(seed, list(range(8)))
        probe = case.paradigm.probe(case.x_B, draws)
        p_BTK, u_B = case.posterior(probe, case.c_B % K)[0], draws.uniform()
        if certain:
            p_BTK = torch.eye(K)[case.c_B % K][:, None].expand_as(p_BTK)
        drawn_BT = (p_BTK.cumsum(-1) <= u_B[:, None, None]).sum(-1)
        pairs = {(b, c) for b, row in enumerate(drawn_BT.tolist()) for c in row if c != case.c_B[b] < K}
        assert bool(pairs) != certain
        matched = case.value(probe, case.c_B)
        case.net = Counted(case.net)
        rows = objective.rows(probe, case.c_B, K, Given(u_B), p_BTK)
        loss_B, _ = objective(case.score_rows(probe, rows, objective), rows)
        assert all(grad for _, grad in case.net.calls) and len(case.net.calls) <= (3 if kind == "tokens" else 1)
        assert sum(count for count, _ in case.net.calls) == 8 + len(pairs)
        off_B = (loss_B + matched.value_RT.mean(1) - matched.aux_R).abs()
        has_pairs_B = torch.tensor([any(b == pair[0] for pair in pairs) for b in range(8)])
        assert torch.equal(off_B > 1e-6, has_pairs_B) and (off_B[~has_pairs_B] < TINY).all()


def test_metrics_are_averages_without_gradient():
    case, objective = toy("tokens", torch.float32), Objective("mclr", "posterior", 0.5)
    scores, rows = case.score(objective)
    loss_B, metrics = objective(scores, rows)
    contrast = scores.value_RT.gather(0, rows.contrast_BT)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert metrics["value"] == scores.value_RT[:8].mean() and metrics["aux"] == 0
    assert torch.isclose(metrics["ratio"], (scores.value_RT[:8] - contrast).mean())
    own = torch.arange(8)[:, None]
    assert 0 < metrics["contrast_share"] < 1 and torch.isclose(metrics["contrast_share"], rows.contrast_BT.ne(own).float().mean())
    assert loss_B.shape == (8,) and loss_B.dtype == torch.float32


@float64()
def test_the_ratio_to_the_reference_sees_an_error_that_shrank():
    """Half the error, and an uncertainty that followed: with each network's own uncertainty the ratio would be 0."""

    def frozen(noisy, sigma_R, c_R):
        denoised, logvar_R = case.net.denoise(noisy, sigma_R, c_R)
        return case.x_B + 2**0.5 * (denoised - case.x_B), logvar_R + torch.tensor(2.0).log()

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
        cases = {c: Objective("mclr", c, RAMP, bound if c in MISMATCHED else None, 0.1) for c in CONTRASTS[1:]}
        for name, objective in ({"none": MLE} | cases | FAMILY).items():
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
