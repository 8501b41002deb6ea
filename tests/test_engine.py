"""DeepSpeed on two ranks is plain torch on the whole batch: at every ZeRO stage, for both paradigms, through every save and load."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CLIP, KINDS
from torch import nn

from train.engine import LocalEngine, make_optimizer

MODELS = ("edm2-digits", "var-digits")
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def results(digits, tokenizer, tmp_path_factory):
    """What tests/ranks.py found on two ranks."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    command += [str(Path(__file__).with_name("ranks.py")), str(digits), str(tokenizer), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # DeepSpeed compiles a small library the first time
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_moves_and_is_clipped_at_some_steps(results, model):
    assert results[f"{model} local"]["moved"] > 1e-2
    smallest, largest = results[f"{model} local"]["norms"]
    assert smallest < CLIP < largest


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batch", (4, 8))
@pytest.mark.parametrize("zero", STAGES)
def test_ranks_and_micro_batches_do_not_change_the_result(results, model, zero, micro_batch):
    found = results[f"{model} zero{zero} micro{micro_batch}"]
    assert found["weights"] <= 1e-5 and found["norms"] <= 1e-5 and found["rows"] <= 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_micro_batches_do_not_change_what_every_kind_of_step_does(results, kind):
    found = results[kind]
    assert found["weights"] <= 1e-5 and found["norms"] <= 1e-5 < 1e-3 < found["moved"]


@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_do_not_change_the_result_of_one_rank(results, model):
    found = results[f"{model} local"]["micro"]
    assert found["weights"] <= 1e-5 and found["norms"] <= 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("zero", STAGES)
def test_bf16_runs_at_every_stage_as_it_does_on_one_rank(results, model, zero):
    found = results[f"{model} zero{zero} bf16"]
    assert found["weights"] <= 2e-3 and found["rows"] <= 2e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (1, 2), (2, 0), (0, "local"), (1, "local"), (2, "local"), ("local", 2)], ids=str
)
def test_what_one_engine_saves_any_other_goes_on_from(results, model, start, end):
    found = results[f"{model} from {start} to {end}"]
    assert found["same"] and found["next"] <= 1e-5


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_weight_decay_spares_gains_and_biases(linear):
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = make_optimizer(linear, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    engine = LocalEngine(linear, optimizer, clip=0.0, accumulation=1, bf16=False)
    engine.backward(engine(torch.zeros(1, 3)).sum() * 0)
    engine.step(0.1)
    torch.testing.assert_close(linear.weight, before["weight"] * 0.95)
    torch.testing.assert_close(linear.bias, before["bias"], rtol=0, atol=0)


def test_the_step_takes_its_rate_and_tells_the_norm_before_clipping(linear):
    engine = LocalEngine(linear, make_optimizer(linear, 1.0, (0.9, 0.99), 1e-8, 0.0), clip=0.1, accumulation=1, bf16=False)
    x = torch.tensor([[3.0, 0.0, 4.0]])
    engine.backward(engine(x)[:, 0].sum())
    before = linear.weight.detach().clone()
    # gradient: x in one row of the weight, 1 in the bias
    assert float(engine.step(0.25)) == pytest.approx(26**0.5)
    # AdamW's first step has the size of the rate, whatever the clipping
    torch.testing.assert_close(before - linear.weight, torch.tensor([[0.25, 0, 0.25], [0, 0, 0]]), rtol=1e-4, atol=1e-6)


def test_rows_are_counted_with_and_without_gradient(linear):
    engine = LocalEngine(linear, make_optimizer(linear, 1.0, (0.9, 0.99), 1e-8, 0.0), clip=0.0, accumulation=1, bf16=False)
    engine(torch.zeros(5, 3))
    with torch.no_grad():
        engine(torch.zeros(2, 3))
    assert engine.rows == {"grad": 5, "no_grad": 2}
