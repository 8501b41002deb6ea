"""Every operation: Triton (in its interpreter) and torch against the definition in fp64, its gradients, strides, compilation."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_house import ROOT
from torch.utils._pytree import tree_map_only

from mclr.kernels import choice
from mclr.kernels.choice import use, using
from mclr.kernels.compile import main as compile_main
from mclr.kernels.op import FLOATS, as_tuple, compare, fit, leaves, moved, recording, results
from mclr.kernels.registry import OPS
from mclr.kernels.results import source

# a tiny size of every operation, and of the norm both forms
FIRST = {name: (op, next(iter(op.tiny.values()))) for name, op in OPS.items()}
FIRST["modulated_norm alone"] = (OPS["modulated_norm"], OPS["modulated_norm"].tiny["pairs of a sample"])
CASES = [pytest.param(op, shape, id=f"{op.name}, {name}") for op in OPS.values() for name, shape in op.tiny.items()]
# of the dtypes that the interpreter computes rightly: in bf16 it is silently wrong
INTERPRETED = (torch.float32, torch.float16)
ALL = (torch.float64, *INTERPRETED, torch.bfloat16)
per_op = pytest.mark.parametrize(("op", "shape"), FIRST.values(), ids=FIRST)


def drawn(op, shape):
    return op.draw(shape, torch.float32, torch.Generator().manual_seed(3))


# force_weights has no gradient and refuses gaps
not_in_place = pytest.mark.parametrize(("op", "shape"), [FIRST[name] for name in FIRST if name != "force_weights"])


def doubled(t):
    return t.double() if t.is_floating_point() else t


def scattered(t):
    """The same numbers, no two of them neighbours in memory."""
    wide = t.new_full((*t.shape, 2), torch.nan if t.is_floating_point() else 0)
    wide[..., 0] = t
    return wide[..., 0]


BOTH_WAYS = [*(("triton", dtype) for dtype in INTERPRETED), *(("torch", dtype) for dtype in ALL)]


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_WAYS, ids=str)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_an_operation_is_its_definition(op, shape, kernels, dtype):
    inputs = op.draw(shape, torch.float32 if dtype == torch.float64 else dtype, torch.Generator().manual_seed(0))
    assert not compare(op, moved(inputs, doubled) if dtype == torch.float64 else inputs, dtype, kernels)


@not_in_place
def test_the_gradients_of_the_definition_are_finite_differences(op, shape):
    inputs = moved(drawn(op, shape), doubled)

    def of_leaves(*values):
        # gradcheck hands over copies of the leaves
        given = iter(values)
        filled = tree_map_only(torch.Tensor, lambda t: next(given) if t.requires_grad else t, inputs)
        return as_tuple(op.definition(**filled))

    assert torch.autograd.gradcheck(of_leaves, tuple(leaves(inputs).values()))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@not_in_place
def test_inputs_may_have_any_strides(op, shape, kernels):
    assert not compare(op, moved(drawn(op, shape), scattered), torch.float32, kernels)


@per_op
def test_fp64_is_for_torch(op, shape):
    with using("triton"), pytest.raises(ValueError, match=r"dtype torch\.float64, not"):
        op.run(**moved(drawn(op, shape), doubled))


@per_op
def test_two_runs_and_a_compiled_one_are_bit_equal(op, shape):
    """torch.compile sees one graph."""
    compiled = torch.compile(op.run, backend="aot_eager", fullgraph=True)
    with using("triton"):
        one, two, traced = (results(run, drawn(op, shape)) for run in (op.run, op.run, compiled))
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], traced[name]) for name in one)


@per_op
def test_a_wrong_result_is_found(op, shape):
    def times(factor):
        return replace(op, run=lambda **inputs: [factor * out for out in as_tuple(op.run(**inputs))])

    assert compare(times(1 + 1e-4), drawn(op, shape), torch.float32)
    assert len(compare(times(torch.nan), drawn(op, shape), torch.float32)) == len(results(op.run, drawn(op, shape)))


def test_every_kernel_compiles_for_a_hopper_gpu_in_bf16():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mclr.kernels.compile", "--arch", "90", "--dtype", "bf16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"| {name} |" in done.stdout for name in OPS)


def test_auto_runs_the_winners_of_this_gpu_and_nothing_else(monkeypatch):
    monkeypatch.setattr(choice, "WINNERS", {"sm_90": ["norm_silu", "force_weights"], "sm_80": ["sum_clip"]})
    monkeypatch.setattr(choice, "family", lambda device: "sm_90")
    launched = set()
    for name, op in OPS.items():
        with recording() as launches, using("auto"):
            op.run(**drawn(*FIRST[name]))
        launched |= {name} if launches else set()
    assert launched == {"norm_silu", "force_weights"}


def stale(published):
    """Winners whose rows were measured with other code than this, and names that do not exist."""
    wrong = [name for names in published["winners"].values() for name in names if name not in OPS]
    wrong += [family for family in published["winners"] if not re.fullmatch(r"sm_\d{2,3}", family)]
    for row in published["rows"]:
        if row["op"] in published["winners"].get(row["family"], ()) and row["source"] != source():
            wrong.append((row["family"], row["op"]))
    return wrong


def test_published_winners_are_of_this_code():
    row = {"family": "sm_90", "op": "sum_clip", "source": "other"}
    won = {"sm_90": ["sum_clip"]}
    assert stale({"winners": won, "rows": [row]}) == [("sm_90", "sum_clip")]
    assert stale({"winners": won, "rows": [row | {"source": source()}, row | {"op": "norm_silu"}]}) == []
    assert stale({"winners": {"hopper": ["sum_clip", "attention"]}, "rows": []}) == ["attention", "hopper"]
    assert stale(json.loads(choice.RESULTS.read_text())) == []


def test_auto_is_traced(monkeypatch):
    """torch.compile can trace the choice between Triton and torch: it reads no file and no cache."""
    monkeypatch.setattr(choice, "WINNERS", {"sm_90": ["won"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_a_gpu = SimpleNamespace(device=torch.device("cuda", 0))

    def chosen(op, x):
        return x + 1 if choice.runs_triton(op, on_a_gpu) else x - 1

    x = torch.zeros(1)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    with using("auto"):
        assert [compiled(op, x).item() for op in ("won", "lost")] == [1, -1]


def test_a_bad_argument_of_the_compiler_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        compile_main(["--arch", "70"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "invalid choice: 70" in said and len(said.splitlines()) == 1


def test_modes_are_words_that_exist():
    with pytest.raises(ValueError, match="kernels: 'fast' is not one of auto, torch, triton"):
        use("fast")


A = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (A[0], "b: 1 dimensions, not 2"),
        (A[:2], r"b: shape \(2, 4\), not \(3, 4\)"),
        (A.to("meta"), "b: on meta, not on cpu as a"),
        (A.double(), r"b: dtype torch\.float64, not one of torch\.float32"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(second, says):
    with pytest.raises(ValueError, match=says):
        fit(FLOATS, a=(A, "RD"), b=(second, "RD"))
    with pytest.raises(ValueError, match=r"c: shape \(0,\) holds nothing"):
        fit(FLOATS, a=(A, "RD"), c=(A[0, :0], "L"))
    assert fit(FLOATS, a=(A, "RD"), none=(None, "RLD"), index=(A[:, 0].long(), "R")) == {"R": 3, "D": 4}
