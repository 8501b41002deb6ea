"""The dial in the objective and the paradigms: every sample draws a strength, and its terms are those of lam = strength."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy import CONTRASTS, KINDS, Draws64, K, float64, toy

from mclr.guidance import Guidance
from mclr.likelihood import Draws, score
from mclr.loss import Loss
from mclr.objective import Objective
from mclr.schedule import Schedule


class Told:
    """A toy network with a dial, which writes down what it is told, and does not care."""

    def __init__(self, net):
        self.net, self.strengths = net, []

    def __call__(self, *inputs, **cache):
        *others, last = inputs
        told = last is not None and last.is_floating_point()
        self.strengths.append(last if told else None)
        inputs = [each for each in (others if told else inputs) if each is not None]
        return self.net(*inputs, **cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS[1:])
@float64()
def test_every_sample_has_the_loss_of_its_own_strength(contrast, kind):
    case = toy(kind)
    strength_B = torch.linspace(0, 2.5, 8)

    def loss_B(objective: Objective, strength_B: Tensor | None = None) -> Tensor:
        draws = Draws64(0, list(range(8)))
        probe = replace(case.paradigm.probe(case.x_B, draws), strength_B=strength_B)
        posterior_BTK = case.posterior(replace(probe, strength_B=None), case.c_B % K)[0] if objective.needs_posterior else None
        rows = objective.rows(probe, case.c_B, K, draws, posterior_BTK)
        return objective(score(case.paradigm, Told(case.net), probe, rows), rows)[0]

    mine_B = loss_B(Objective("mclr", contrast, Schedule("ramp", 1.0), truncate=0.0, strength_max=2.5), strength_B)
    for b, strength in enumerate(strength_B.tolist()):
        alone_B = loss_B(Objective("mclr", contrast, Schedule("ramp", strength), truncate=0.0))
        assert abs(mine_B[b] - alone_B[b]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contrast", CONTRASTS[1:])
def test_the_network_is_told_a_strength_in_all_rows_but_the_null_and_the_posteriors(contrast, kind):
    """Uniform in [0, max], one for all rows of a sample."""
    case, net = toy(kind, torch.float32, c_B=torch.arange(64) % K), Told(toy(kind, torch.float32).net)
    objective = Objective("mclr", contrast, strength_max=2.5)
    asked = (lambda noisy, sigma: noisy.flatten(1)[:, :K]) if objective.needs_posterior and kind == "diffusion" else None
    Loss(case.paradigm, objective, posterior=asked)(net, case.x_B, case.c_B, first=0)
    told_R = torch.cat([each for each in net.strengths if each is not None])
    assert 0 <= told_R.min() < 0.3 and 2.2 < told_R.max() <= 2.5 and len(told_R.unique()) == 64
    plain = net.strengths.count(None)
    assert plain == (1 if contrast == "null" else K if kind == "tokens" and contrast in ("posterior", "weighted") else 0)


def test_sampling_tells_the_strength_to_the_network_and_not_to_its_guide():
    case = toy("diffusion", torch.float32)
    net, guide, c_B = Told(case.net), Told(case.net), torch.tensor([0, 1])
    case.paradigm.sample(net, c_B, Guidance(Schedule("constant", 0.5), guide, strength=1.5), Draws(0, [0, 1]))
    assert net.strengths and all(each.tolist() == [1.5, 1.5] for each in net.strengths) and set(guide.strengths) == {None}
    net.strengths.clear()
    case.paradigm.sample(net, c_B, Guidance(), Draws(0, [0, 1]))
    assert set(net.strengths) == {None}


def test_no_ratio_and_no_strength_while_a_posterior_learns():
    case = toy("diffusion", torch.float32, c_B=torch.arange(8) % K)
    net, asked = Told(case.net), lambda noisy, sigma: noisy.flatten(1)[:, :K]
    loss = Loss(case.paradigm, Objective("mclr", "posterior", strength_max=2.0), asked, drop_condition=0.0, warmup=8)
    learning, _ = loss(net, case.x_B, case.c_B, first=0)
    assert net.strengths == [None]
    assert learning == Loss(case.paradigm, Objective(), drop_condition=0.0)(case.net, case.x_B, case.c_B, first=0)[0]
    loss(net, case.x_B, case.c_B, first=8)
    assert net.strengths[-1] is not None


WRONG = {
    "both": ({"lam": 1.0}, "lam=1.0 and strength_max=2.0: give one of them"),
    "a shape of another weight": ({"lam": Schedule("ramp", 0.5)}, "lam=0.5 and strength_max=2.0"),
    "another objective": ({"name": "cca", "contrast": "", "beta": 0.1}, "strength_max=2.0 needs name=mclr"),
    "mle": ({"name": "mle", "contrast": "none"}, "strength_max=2.0 needs name=mclr"),
    "a window": ({"lam": Schedule("negative_window", 1.0, below=0.5)}, "needs another schedule.kind than negative_window"),
    "below 0": ({"strength_max": -1.0}, "strength_max=-1.0 is out of range"),
    "no number": ({"strength_max": float("nan")}, "strength_max=nan is out of range"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_dial_that_cannot_be_is_refused(case):
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Objective(**({"name": "mclr", "contrast": "null", "strength_max": 2.0} | settings))
    for strength in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"strength=.* is out of range"):
            Guidance(strength=strength)
