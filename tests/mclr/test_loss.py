"""mclr.Loss: the loss of a training step from a network, samples and conditions; what does not fit is refused; mclr.project."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import GENERATED, KINDS, K, toy

from mclr.diffusion import Diffusion
from mclr.guidance import Guidance
from mclr.loss import GENERATED as BEYOND
from mclr.loss import Loss, project
from mclr.objective import Objective
from mclr.schedule import Schedule

# every objective, with the settings that it needs
OBJECTIVES = {
    "mle": Objective(),
    "posterior": Objective("mclr", "posterior", lam=0.7),
    "weighted": Objective("mclr", "weighted", lam=Schedule("ramp", 0.7)),
    "uniform": Objective("mclr", "uniform", lam=0.3),
    "null": Objective("mclr", "null", lam=0.7),
    "unlearn": Objective("unlearn", lam=0.7),
    "cc_dpo": Objective("cc_dpo", lam=1.0, beta=0.3),
    "cca": Objective("cca", lam=2.5, beta=0.3),
    "ddo": Objective("ddo", lam=2.5, beta=0.3),
}
TRUE = torch.arange(8) % K


def loss_of(kind, objective, **settings):
    """(loss, case, further arguments of its call) with the parts that the objective needs."""
    case = toy(kind, torch.float32, c_B=TRUE)
    diffusion = kind == "diffusion" and objective.needs_posterior
    parts = {
        "posterior": case.posterior.args[0] if diffusion else None,
        "reference": case.reference if objective.needs_reference else None,
        "paradigm": case.paradigm,
    }
    more = {"generated": (case.generated_B, GENERATED)} if objective.needs_generated else {}
    return Loss(objective=objective, **parts | settings), case, more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_mean_of_the_objective_and_the_posteriors_loss(name, kind):
    """The order of its draws, which belong to the positions: first the dropped conditions, then the probe, then the rows, with that share.

    The values themselves are those of the parts; test_objective.py compares these with the published formulas.
    """
    criterion, case, more = loss_of(kind, OBJECTIVES[name], drop_condition=0.4, seed=3)
    loss, metrics = criterion(case.net, case.x_B, TRUE, first=16, **more)
    x, c = case.x_B, TRUE
    keys = list(range(16, 24))
    if more:
        x, c, keys = torch.cat([x, case.generated_B]), torch.cat([c, GENERATED]), [*keys, *(BEYOND + key for key in keys)]
    draws = case.draws(3, keys)
    dropped = draws.uniform() < 0.4
    dropped[8:] = False
    assert dropped.any() and not dropped.all()
    case.x_B, case.c_B = x, torch.where(dropped, K, c)
    probe = case.paradigm.probe(x, draws)
    objective = criterion.objective
    posterior_BTK, extra = case.posterior(probe, c) if objective.needs_posterior else (None, None)
    rows = objective.rows(probe, case.c_B, K, draws, posterior_BTK, null_share=0.4)
    loss_B, expected = objective(case.score_rows(probe, rows, objective), rows)
    assert metrics["loss"] == loss_B.mean() and metrics["value"] == expected["value"]
    assert torch.equal(loss, loss_B.mean() if extra is None else loss_B.mean() + extra.mean())
    assert loss.ndim == 0 and loss.requires_grad
    assert all(each.ndim == 0 and not each.requires_grad for each in metrics.values())


def test_a_trainable_posterior_learns_and_a_frozen_one_does_not():
    """Its cross-entropy is part of the loss; the network's gradient is the same in both cases."""
    gradients = []
    for trainable in (True, False):
        criterion, case, _ = loss_of("diffusion", OBJECTIVES["posterior"])
        classifier = criterion.posterior.requires_grad_(trainable)
        loss, metrics = criterion(case.net, case.x_B, TRUE, first=0)
        loss.backward()
        assert (classifier.weight.grad is not None) == trainable and metrics["posterior_loss"] > 0
        assert torch.isclose(loss, metrics["loss"] + trainable * metrics["posterior_loss"])
        gradients.append([p.grad for p in case.net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_before_the_warmup_ends_there_is_no_ratio():
    criterion, case, _ = loss_of("diffusion", OBJECTIVES["posterior"], warmup=8)
    plain, _, _ = loss_of("diffusion", OBJECTIVES["mle"])
    losses = [[each(case.net, case.x_B, TRUE, first=first)[1]["loss"] for each in (criterion, plain)] for first in (0, 8)]
    assert losses[0][0] == losses[0][1] and losses[1][0] != losses[1][1]


WRONG_PARTS = {
    "no posterior": ("posterior", {"posterior": None}, "needs posterior="),
    "a posterior for nothing": ("null", {"posterior": torch.nn.Linear(2, 2)}, "posterior= has no effect with contrast=null"),
    "no reference": ("cca", {"reference": None}, "needs reference=, a frozen copy"),
    "a reference for nothing": ("null", {"reference": torch.nn.Linear(2, 2)}, "takes no reference="),
    "untrained null": ("null", {"drop_condition": 0.0}, "drop_condition=0 leaves untrained"),
    "a guide for nothing": ("posterior", {"guide": torch.nn.Linear(2, 2)}, "guide= has no effect with contrast=posterior"),
    "no guide": ("null", {"guide": "edm2-digits"}, "guide must be a network"),
    "seed": ("mle", {"seed": -1}, "seed=-1 is out of range"),
    "share": ("mle", {"drop_condition": -0.1}, "drop_condition=-0.1 is out of range"),
    "a warm-up for nothing": ("null", {"warmup": 8}, "warmup=8 is for a posterior that learns; contrast=null has none"),
    "a warm-up of a reference": ("cca", {"warmup": 8}, "warmup=8 is for a posterior that learns"),
    "one condition": ("uniform", {"paradigm": Diffusion((1, 2, 2), 1)}, "objective mclr needs two conditions or more; null=1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_parts_that_do_not_fit_are_refused(case):
    name, settings, message = WRONG_PARTS[case]
    with pytest.raises(ValueError, match=message) as error:
        loss_of("diffusion", OBJECTIVES[name], **settings)
    assert "\n" not in str(error.value)


def test_tokens_take_no_posterior_and_alone_a_bound():
    with pytest.raises(ValueError, match="posterior= has no effect with tokens"):
        loss_of("tokens", OBJECTIVES["posterior"], posterior=torch.nn.Linear(2, 2))
    loss_of("tokens", replace(OBJECTIVES["uniform"], bound=1.0))
    with pytest.raises(ValueError, match=r"bound=1.0 needs mclr, a next_scale model"):
        loss_of("diffusion", replace(OBJECTIVES["uniform"], bound=1.0))


def test_a_posterior_of_other_conditions_is_refused():
    wrong = loss_of("diffusion", OBJECTIVES["posterior"], posterior=lambda noisy, sigma: torch.zeros(len(noisy), K - 1))
    criterion, case, _ = wrong
    with pytest.raises(ValueError, match=r"answers \[8, 2\], not \[8, 3\]: give posterior=classifier"):
        criterion(case.net, case.x_B, TRUE, first=0)


def test_what_is_no_part_at_all_is_refused():
    paradigm = Diffusion((1, 2, 2), K)
    for parts, message in (
        ((paradigm, "mclr"), "Loss is given Diffusion, str: give a paradigm, .* and an Objective, such as"),
        (("edm2-digits", Objective()), "Loss is given str, Objective: give a paradigm, such as model.paradigm"),
        (
            (paradigm, OBJECTIVES["posterior"], "digits-posterior"),
            "posterior must be a network, or a Model of mclr.load, not 'digits-",
        ),
        ((paradigm, OBJECTIVES["cca"], None, "edm2-digits"), "reference must be a network, or a Model of mclr.load, not 'edm2-d"),
    ):
        with pytest.raises(ValueError, match=message):
            Loss(*parts)


def test_a_model_stands_for_its_network():
    """As the network, the posterior, the reference and the guide."""
    for name in ("posterior", "cca"):
        criterion, case, _ = loss_of("diffusion", OBJECTIVES[name])
        given = {
            part: SimpleNamespace(net=getattr(criterion, part)) for part in ("posterior", "reference") if getattr(criterion, part)
        }
        found, _ = replace(criterion, **given)(SimpleNamespace(net=case.net), case.x_B, TRUE, first=0)
        assert torch.equal(found, criterion(case.net, case.x_B, TRUE, first=0)[0])
    assert Guidance(Schedule("constant", 1.0), SimpleNamespace(net=project)).guide.net is project
    assert project(SimpleNamespace(net=torch.nn.Linear(2, 2))) == []


WRONG_CALLS = {
    "x of another size": ("diffusion", {"x": torch.zeros(8, 1, 3, 3)}, r"x must be floats \[B, 1, 2, 2\]"),
    "x of no tensor": ("diffusion", {"x": [1.0]}, "x and c must be tensors, not list and Tensor"),
    "x of bytes": ("diffusion", {"x": torch.zeros(8, 1, 2, 2, dtype=torch.uint8)}, r"not torch.uint8"),
    "tokens of another length": ("tokens", {"x": torch.zeros(8, 3, dtype=torch.int64)}, r"int64 tokens \[B, 14\]"),
    "tokens of floats": ("tokens", {"x": torch.zeros(8, 14)}, r"not torch.float32"),
    "no samples": ("diffusion", {"x": torch.zeros(0, 1, 2, 2), "c": TRUE[:0]}, "x has 0 samples: must be 1 or more"),
    "too few conditions": ("diffusion", {"c": TRUE[:7]}, r"c must be int64 of shape \[8\]"),
    "conditions of floats": ("diffusion", {"c": TRUE.float()}, r"c must be int64"),
    "a condition too many": ("diffusion", {"c": TRUE + 1}, "c has conditions 1 .. 3: must be 0 .. 2"),
    "a negative condition": ("tokens", {"c": TRUE - 1}, "c has conditions -1 .. 1"),
    "a negative position": ("tokens", {"first": -1}, "first=-1 is a position"),
    "no network": ("tokens", {"net": "var-digits"}, "net must be a network, or a Model of mclr.load, not 'var-digits'"),
    "generated for nothing": ("tokens", {"generated": (torch.zeros(8, 14), TRUE)}, "takes no generated="),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_samples_that_do_not_fit_are_refused(name):
    kind, wrong, message = WRONG_CALLS[name]
    criterion, case, _ = loss_of(kind, OBJECTIVES["mle"])
    with pytest.raises(ValueError, match=message):
        criterion(**{"net": case.net, "x": case.x_B, "c": TRUE, "first": 0} | wrong)


def test_ddo_needs_as_many_generated_samples():
    criterion, case, more = loss_of("diffusion", OBJECTIVES["ddo"])
    x, c = more["generated"]
    for generated, message in (
        (None, r"needs generated=\(x, c\)"),
        ((x[:4], c), "generated x has 4 samples: must be 8"),
        ((x, c[:4]), r"generated c must be int64 of shape \[8\]"),
        ((x, c + 1), "generated c has conditions 1 .. 3"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(case.net, case.x_B, TRUE, first=0, generated=generated)


class Elsewhere(torch.Tensor):
    """Joins other tensors only after .to(device), like one on another device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is not torch.cat, "tensors on two devices"
        answer = super().__torch_function__(func, types, args, kwargs)
        return answer.as_subclass(torch.Tensor) if func is torch.Tensor.to else answer


def test_generated_samples_move_to_the_device_of_x():
    criterion, case, more = loss_of("diffusion", OBJECTIVES["ddo"])
    elsewhere = tuple(each.as_subclass(Elsewhere) for each in more["generated"])
    losses = [criterion(case.net, case.x_B, TRUE, first=0, generated=each)[0] for each in (more["generated"], elsewhere)]
    assert torch.equal(*losses)


def test_every_sample_is_checked_once(monkeypatch):
    criterion, case, _ = loss_of("diffusion", OBJECTIVES["mle"])
    checked = []
    monkeypatch.setattr(Diffusion, "check", lambda self, x_B: checked.append(x_B))
    criterion(case.net, case.x_B, TRUE, first=0)
    assert len(checked) == 1


def test_project_brings_forced_weights_to_unit_magnitude_wherever_they_are():
    class Forced(torch.nn.Linear):
        def magnitude_preserving(self):
            return [self.weight]

    torch.manual_seed(0)  # a row of tiny weights would stay below 1
    net = torch.nn.Sequential(Forced(4, 3), torch.nn.Linear(3, 2))
    before = net[1].weight.clone()
    assert [id(p) for p in project(net)] == [id(net[0].weight)]
    assert torch.allclose(net[0].weight.square().mean(1).sqrt(), torch.ones(3), atol=1e-3) and torch.equal(net[1].weight, before)
    assert project(net[1]) == []
