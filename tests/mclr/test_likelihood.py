"""Draws that belong to positions, and score(): which forwards there are and what they carry."""

import numpy as np
import pytest
import torch
from test_objective import null_by_definition
from toy import KINDS, RAMP, Counted, K, float64, toy

from mclr.contrast import matched_rows
from mclr.guidance import mix
from mclr.likelihood import Draws, Guide, Rows, score
from mclr.objective import Objective
from mclr.schedule import Schedule


def numbers(seed: int, positions: list[int]) -> torch.Tensor:
    """Everything a step draws: several calls of both laws, flattened, [B, 20]."""
    draws = Draws(seed, positions)
    parts = [draws.normal(), draws.uniform(2), draws.normal(2, 3), draws.uniform(), draws.normal(1, 2, 5)]
    return torch.cat([part.reshape(len(positions), -1) for part in parts], 1)


def test_a_sample_draws_the_same_whatever_its_batch():
    positions = [0, 1, 2, 5, 10**9, 2**62]
    together = numbers(3, positions)
    assert torch.equal(numbers(3, positions[::-1]), together.flip(0))
    assert torch.equal(torch.cat([numbers(3, positions[:1]), numbers(3, positions[1:4]), numbers(3, positions[4:])]), together)
    assert torch.equal(
        numbers(3, [5, 77, 5]), together[[3, 3, 3]].where(torch.tensor([[True], [False], [True]]), numbers(3, [77]))
    )


def test_positions_seeds_and_calls_differ():
    table = torch.cat([numbers(seed, [0, 1, 2, 3]) for seed in (0, 1, 2, 2**63 - 1, 2**63, 2**63 + 1, 2**63 + 4)])
    assert len(table.flatten().unique()) == table.numel()
    assert not torch.equal(numbers(2**63, [2**60]), numbers(2**63, [2**60 + 1]))  # no rounding to floats
    # swapping seed and position is another stream as well
    assert not torch.equal(numbers(0, [1]), numbers(1, [0]))


def test_shapes_and_dtypes():
    draws = Draws(0, [7, 8, 9])
    assert draws.normal().shape == draws.uniform().shape == (3,)
    assert draws.normal(4, 2).shape == draws.uniform(4, 2).shape == (3, 4, 2)
    assert draws.normal(2).dtype == draws.uniform(2).dtype == torch.float32


def test_laws_over_positions_and_along_a_stream():
    """Mean, variance, fourth moment and neighbours, within five standard errors of N = 40,000 numbers."""
    for positions, shape in ((list(range(40_000)), ()), ([11], (40_000,))):
        draws = Draws(1, positions)
        normal, uniform = draws.normal(*shape).flatten().double(), draws.uniform(*shape).flatten().double()
        error = 5 / len(normal) ** 0.5
        assert abs(normal.mean()) < error
        assert abs(normal.var() - 1) < error * 2**0.5
        assert abs((normal**4).mean() - 3) < error * 96**0.5
        assert abs((normal[1:] * normal[:-1]).mean()) < error
        assert uniform.min() >= 0 and uniform.max() < 1
        assert abs(uniform.mean() - 1 / 2) < error / 12**0.5
        assert abs(uniform.var() - 1 / 12) < error / 180**0.5
        assert abs((normal * (uniform - 1 / 2)).mean()) < error / 12**0.5


def test_no_global_generator_is_touched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    numbers(0, [1, 2])
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_score_gives_every_row_its_sample_and_condition(kind):
    """Rows in any order and number, in one forward with gradient."""
    case = toy(kind)
    probe, _ = case.ask(Objective())
    index_R, c_R = torch.tensor([7, 0, 0, 3, 5, 0]), torch.tensor([0, 1, K, 2, 2, 1])
    nothing = torch.zeros(6, 1)
    case.net = Counted(case.net)
    scores = score(case.paradigm, case.net, probe, Rows(index_R, c_R, nothing.long(), nothing, nothing))
    assert case.net.calls == [(6, True)]
    terms = probe.progress_BT.shape[1]
    assert scores.value_RT.shape == (6, terms) and scores.aux_R.shape == (6,) and scores.value_RT.requires_grad
    for row, (b, c) in enumerate(zip(index_R.tolist(), c_R.tolist(), strict=True)):
        alone = case.value(probe, c)
        assert torch.allclose(scores.value_RT[row], alone.value_RT[b], rtol=1e-12)
        assert torch.allclose(scores.aux_R[row], alone.aux_R[b], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_score_mixes_with_the_null_condition(kind):
    """The value is that of the mixed prediction, the calibration that of the plain one; unmixed samples take no null row."""
    case = toy(kind, c_B=torch.arange(8) % K)
    probe, _ = case.ask(Objective())
    shape = probe.progress_BT.shape
    mix_BT = -0.1 * torch.arange(8.0)[:, None].expand(shape) * (torch.arange(8) % 2)[:, None]
    case.net = Counted(case.net)
    scores = score(case.paradigm, case.net, probe, matched_rows(case.c_B, torch.ones(shape), mix_BT))
    assert case.net.calls == [(4, False), (8, True)] and case.net.conditions[0] == [K] * 4
    everyone = torch.arange(8)
    pred, extra = case.paradigm.predict(case.net, probe, everyone, case.c_B)
    null, _ = case.paradigm.predict(case.net, probe, everyone, torch.full((8,), K))
    mixed = case.paradigm.log_likelihood((mix(pred, null, mix_BT), extra), probe, everyone)
    plain = case.paradigm.log_likelihood((pred, extra), probe, everyone)
    assert torch.allclose(scores.value_RT, mixed.value_RT, rtol=1e-12) and torch.equal(scores.aux_R, plain.aux_R)
    assert (
        torch.equal(scores.value_RT[::2], plain.value_RT[::2]) and (scores.value_RT[1::2] - plain.value_RT[1::2]).abs().min() > 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_null_forward_where_nobody_is_mixed(kind):
    """Not even one of zero rows, which not every network takes."""
    case = toy(kind, torch.float32)
    case.net = Counted(case.net)
    case.loss(Objective("mclr", "null", Schedule("constant", 0.0)))
    case.c_B = torch.full((8,), K)
    case.loss(Objective("mclr", "null", RAMP))
    assert case.net.calls == [(8, True), (8, True)]


@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_in_lockstep_there_are_as_many_forwards_whatever_the_rows_are(kind):
    """And the same values: ranks that hold parts of a network have to run it equally often."""
    schedules = (Schedule("constant", 0.0), Schedule("interval", 0.4, high=0.5), RAMP)
    for contrast, forwards in (("null", 2), ("uniform", 1)):
        for schedule in schedules:
            case = toy(kind)
            probe, rows = case.ask(Objective("mclr", contrast, schedule))
            case.net = Counted(case.net)
            plain = score(case.paradigm, case.net, probe, rows)
            case.net.calls.clear()
            together = score(case.paradigm, case.net, probe, rows, lockstep=True)
            assert len(case.net.calls) == forwards
            # what is cut short elsewhere has values of its own here, without a ratio that reads them
            used = rows.contrast_BT if contrast == "uniform" else torch.arange(len(case.c_B))[:, None]
            seen = rows.lam_BT.ne(0) if contrast == "uniform" else torch.ones_like(rows.lam_BT, dtype=torch.bool)
            values = [each.value_RT.gather(0, used.expand_as(rows.lam_BT))[seen] for each in (plain, together)]
            assert torch.allclose(*values, rtol=1e-12)
            assert torch.allclose(plain.value_RT[: len(case.c_B)], together.value_RT[: len(case.c_B)], rtol=1e-12)


@pytest.mark.parametrize("under", ["own", "null"])
@pytest.mark.parametrize("kind", KINDS)
@float64()
def test_another_network_guides(kind, under):
    """Its answers are mixed, of tokens its logits, since its hidden states are its own; one forward more, without gradient in it."""
    case, objective = toy(kind), Objective("mclr", "null", Schedule("ramp", 0.7))
    other = Counted(case.reference)
    guide = Guide(other, None if under == "own" else 1)
    probe, rows = case.ask(objective)
    loss_B, _ = objective(score(case.paradigm, case.net, probe, rows, guide=guide), rows)
    dropped = case.c_B == K
    assert other.calls == [(int((~dropped).sum()), False)]
    assert set(other.conditions[0]) == ({0, 1, 2} if under == "own" else {1})
    expected_B = null_by_definition(case, objective, Guide(case.reference, guide.null))
    assert (loss_B - expected_B).abs().max() < 1e-12 and (loss_B - case.loss(objective)).abs().max() > 1e-3
    parameters = [*case.net.parameters(), *case.reference.parameters()]
    found, wanted = (torch.autograd.grad(each.mean(), parameters, allow_unused=True) for each in (loss_B, expected_B))
    for mine, hand in zip(found, wanted, strict=True):
        assert (mine is None) == (hand is None) and (mine is None or (mine - hand).abs().max() < 1e-12)


@float64()
def test_no_row_is_guided_by_nobody():
    """A batch whose conditions were all dropped asks no other network."""
    case, objective = toy("tokens", c_B=torch.full((8,), K)), Objective("mclr", "null", 0.7)
    probe, rows = case.ask(objective)
    other = Counted(case.reference)
    score(case.paradigm, case.net, probe, rows, guide=Guide(other), lockstep=True)
    assert other.calls == []
