"""On a CUDA GPU, by `pytest -m gpu`: a few steps of both paradigms in every precision, what a step waits for, a resume to the bit.

Each run is a process of its own, without Triton's interpreter (tests/conftest.py). Without a GPU the tests fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

MODELS = ("edm2-digits", "var-digits")
# a program that trains; with its first argument "count" it prints how often its last step waited for the device
PROGRAM = """
import sys, warnings, torch
torch.use_deterministic_algorithms(True, warn_only=True)
import mclr.train.training.loop as loop
real, waits = loop.train_step, 0
def train_step(*args):
    global waits
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = real(*args)
    torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(each.message) for each in caught)
    return metrics
if sys.argv.pop(1) == "count":
    loop.train_step = train_step
from mclr.train.cli import main
status = main()
print("waits", waits)
sys.exit(status)
"""

pytestmark = pytest.mark.gpu


@pytest.fixture
def train(digits, tmp_path):
    """train(name, model, *overrides, how) -> (lines of metrics, weights, output) of 3 steps."""
    assert torch.cuda.is_available(), "these tests need a GPU"

    def train(name, model, *overrides, how="plain", steps=3, **more):
        argv = ["train", "--model", model, "--objective", "mclr", "--data", str(digits), "--out", str(tmp_path / name)]
        argv += ["--engine", "local", "train.batch=16", f"train.images={16 * steps}", "train.log_every=1", *overrides]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | more
        command = [sys.executable, "-c", PROGRAM, how, *argv]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr[-3000:]
        lines = [json.loads(line) for line in Path(tmp_path, name, "metrics.jsonl").read_text().splitlines()]
        return lines, load_file(tmp_path / name / "weights/model.safetensors"), ran.stdout

    return train


@pytest.mark.parametrize("model", MODELS)
def test_steps_are_those_of_a_cpu(model, train):
    expected, *_ = train("cpu", model, CUDA_VISIBLE_DEVICES="")
    for name, overrides, near in (
        ("fp32", (), 1e-4),
        ("bf16", ("engine.precision=bf16",), 2e-2),
        ("compiled", ("engine.compile=true",), 1e-4),
    ):
        lines, weights, _ = train(name, model, *overrides)
        assert [line["value"] for line in lines] == pytest.approx([line["value"] for line in expected], rel=near), name
        assert all(t.isfinite().all() for t in weights.values())


@pytest.mark.parametrize(("model", "most"), zip(MODELS, (24, 24), strict=True))
def test_a_step_waits_for_the_device_a_few_times(model, most, train):
    """Copies from pageable memory, and masks turned into indices; one micro-batch. More than that is a new wait."""
    *_, said = train("counted", model, how="count")
    assert int(said.split()[-1]) <= most


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_ends_where_a_whole_one_does(model, train):
    _, whole, _ = train("whole", model, steps=4)
    train("parts", model, steps=2)
    _, parts, _ = train("parts", model, steps=4)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
