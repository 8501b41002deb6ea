"""Every operation: Triton (in its interpreter) and torch against the definition in fp64, its gradients, strides, compilation."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_house import ROOT

from mclr.kernels import choice
from mclr.kernels.choice import use, using
from mclr.kernels.compile import main as compile_main
from mclr.kernels.op import FLOATS, as_tuple, check, compare, fit, leaves, moved, recording, results
from mclr.kernels.registry import OPS, refuse_unknown
from mclr.kernels.results import dump, source

CASES = [pytest.param(op, shape, id=f"{op.name}, {name}") for op in OPS.values() for name, shape in op.tiny.items()]
# of the dtypes that the interpreter computes rightly: in bf16 it is silently wrong
INTERPRETED = (torch.float32, torch.float16)
ALL = (torch.float64, *INTERPRETED, torch.bfloat16)
per_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def first(op, dtype=torch.float32):
    """Inputs of an operation's first tiny size."""
    return op.draw(next(iter(op.tiny.values())), dtype, torch.Generator().manual_seed(3))


WITH_GRADIENT = {name: op for name, op in OPS.items() if leaves(first(op))}


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
    if dtype == torch.float64:
        inputs = op.draw(shape, torch.float32, torch.Generator().manual_seed(0))
        errors = compare(op, moved(inputs, doubled), dtype, kernels)
    else:
        errors = check(op, "cpu", dtype, shape, kernels)
    assert errors and all(error.ok for error in errors), errors


@pytest.mark.parametrize("op", WITH_GRADIENT.values(), ids=WITH_GRADIENT)
def test_the_gradients_of_the_definition_are_finite_differences(op):
    inputs = moved(first(op), doubled)

    def of_leaves(*values):
        # gradcheck hands over copies of the leaves
        given = iter(values)

        def fill(value):
            if isinstance(value, list):
                return [fill(each) for each in value]
            return next(given) if torch.is_tensor(value) and value.requires_grad else value

        return as_tuple(op.definition(**{name: fill(value) for name, value in inputs.items()}))

    assert torch.autograd.gradcheck(of_leaves, tuple(leaves(inputs).values()))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@per_op
def test_inputs_may_have_any_strides(op, kernels):
    errors = compare(op, moved(first(op), scattered), torch.float32, kernels)
    assert all(error.ok for error in errors), errors


@per_op
def test_fp64_is_for_torch(op):
    with using("triton"), pytest.raises(ValueError, match=r"dtype torch\.float64, not"):
        op.run(**moved(first(op), doubled))


@per_op
def test_two_runs_are_bit_equal(op):
    with using("triton"):
        one, two = (results(op.run, first(op)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@per_op
def test_torch_compile_sees_one_graph(op):
    inputs = first(op)
    with using("triton"):
        compiled = torch.compile(op.run, backend="aot_eager", fullgraph=True)
        eager, traced = results(op.run, inputs), results(compiled, inputs)
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


@per_op
def test_a_wrong_result_is_found(op):
    def skewed(**inputs):
        head, *rest = as_tuple(op.run(**inputs))
        return (head * (1 + 1e-4), *rest)

    errors = compare(replace(op, run=skewed), first(op), torch.float32)
    assert not all(error.ok for error in errors)
    nan = compare(
        replace(op, run=lambda **inputs: [out * torch.nan for out in as_tuple(op.run(**inputs))]), first(op), torch.float32
    )
    assert not any(error.ok for error in nan)


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
            op.run(**first(op))
        launched |= {name} if launches else set()
    assert launched == {"norm_silu", "force_weights"}


@pytest.mark.parametrize(
    ("winners", "says"),
    [({"sm_90": ["attention"]}, "unknown operation attention for sm_90"), ({"hopper": ["sum_clip"]}, "hopper is no GPU family")],
)
def test_winners_that_do_not_exist_are_refused(winners, says, tmp_path):
    """The import of kernels reads the file and refuses them."""
    with pytest.raises(ValueError, match=says):
        refuse_unknown(winners)
    refuse_unknown({"sm_90": list(OPS), "sm_120": []})
    (tmp_path / "RESULTS.json").write_bytes(dump([], winners=winners))
    (tmp_path / "choice.py").write_text((ROOT / "kernels/choice.py").read_text())
    planted = runpy.run_path(str(tmp_path / "choice.py"))
    assert planted["WINNERS"] == winners and "refuse_unknown(WINNERS)" in (ROOT / "kernels/registry.py").read_text().splitlines()


def stale(published):
    """Winners whose rows were measured with other code than this."""
    return [
        (gpu, row["op"])
        for gpu, names in published["winners"].items()
        for row in published["rows"]
        if row["family"] == gpu and row["op"] in names and row["source"] != source()
    ]


def test_published_winners_are_of_this_code():
    row = {"family": "sm_90", "op": "sum_clip", "source": "other"}
    assert stale({"winners": {"sm_90": ["sum_clip"]}, "rows": [row]}) == [("sm_90", "sum_clip")]
    assert stale({"winners": {"sm_90": ["sum_clip"]}, "rows": [row | {"source": source()}, row | {"op": "norm_silu"}]}) == []
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


FIRST = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (FIRST[0], "b: 1 dimensions, not 2"),
        (FIRST[:2], r"b: shape \(2, 4\), not \(3, 4\)"),
        (FIRST.to("meta"), "b: on meta, not on cpu as a"),
        (FIRST.double(), r"b: dtype torch\.float64, not one of torch\.float32"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(second, says):
    with pytest.raises(ValueError, match=says):
        fit(FLOATS, a=(FIRST, "RD"), b=(second, "RD"))
    with pytest.raises(ValueError, match=r"c: shape \(0,\) holds nothing"):
        fit(FLOATS, a=(FIRST, "RD"), c=(FIRST[0, :0], "L"))
    assert fit(FLOATS, a=(FIRST, "RD"), none=(None, "RLD"), index=(FIRST[:, 0].long(), "R")) == {"R": 3, "D": 4}
