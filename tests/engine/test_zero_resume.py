"""Under every ZeRO stage too a run that was stopped and goes on ends, bit for bit, where an uninterrupted one does."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launch import RUN, environment, launcher
from ranks import relative_rms
from runs import BATCH, DROPOUT, MODELS, STEPS, arguments, differences, steps_logged
from safetensors.torch import load_file

from mclr.train.cli import main

STOPPED = 4  # the step in which rank 1 is sent a signal
PLAN = Path(__file__).parent.parent / "resume_ranks.py"


def follow(plan, folder):
    """The statuses of these runs, one after the other, on two ranks: see tests/resume_ranks.py."""
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [*launcher("deepspeed"), str(PLAN)]
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((folder / "statuses.json").read_text())


@pytest.fixture(scope="module")
def runs(digits, tokenizer, tmp_path_factory):
    """The folder in which each (model, stage) has the runs MODEL-STAGE/whole and MODEL-STAGE/stopped."""
    folder, plan, expected = tmp_path_factory.mktemp("runs"), [], []
    for model in MODELS:
        for zero in (1, 2, 3):
            argv = arguments(model, digits, tokenizer, f"zero{zero}", "train.micro_batch=2")
            plan += [
                (f"{model}-{zero}/{name}", argv, step)
                for name, step in (("whole", None), ("stopped", STOPPED), ("stopped", None))
            ]
            expected += [0, 143, 0]
    assert follow(plan, folder) == expected
    return folder


@pytest.mark.parametrize("zero", (1, 2, 3))
@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_run_ends_where_a_whole_one_does(model, zero, runs):
    """Weights, moments, averages, snapshots, the posterior's classifier and every line of metrics."""
    whole, stopped = (runs / f"{model}-{zero}" / name / "run" for name in ("whole", "stopped"))
    assert differences(stopped, whole) == []
    assert steps_logged(whole) == list(range(1, STEPS + 1)) and len(list((whole / "snapshots").iterdir())) == STEPS
    assert (stopped / "checkpoints" / f"{(STOPPED - 1) * BATCH:012d}").exists()
    parts = {path.stem for path in (whole / "checkpoints" / f"{STEPS * BATCH:012d}").glob("*.safetensors")}
    assert parts - {"posterior"} == {"engine", "model", "ema-0.050"} and ("posterior" in parts) == (model == "edm2-digits")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_other_numbers_of_ranks_and_stages_go_on_from_each_other(model, digits, tokenizer, tmp_path, monkeypatch):
    """2 ranks at ZeRO 1, 1 at ZeRO 3, 4 at ZeRO 2, a third of the run each; without dropout, which every rank draws for itself."""
    monkeypatch.chdir(tmp_path)
    more = [DROPOUT[model].rpartition("=")[0] + "=0.0", "train.micro_batch=2"]
    for part, (ranks, zero) in enumerate(((2, 1), (1, 3), (4, 2)), 1):
        argv = arguments(model, digits, tokenizer, f"zero{zero}", *more, f"train.images={part * STEPS * BATCH // 3}")
        command = [*launcher("deepspeed", ranks), str(RUN), *argv]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
    assert main(["train", *arguments(model, digits, tokenizer, "local", *more), "--out", "alone"]) == 0
    assert steps_logged(Path("run")) == steps_logged(Path("alone")) == list(range(1, STEPS + 1))
    newest = f"checkpoints/{STEPS * BATCH:012d}"
    for file in ("weights/model", f"{newest}/model", f"{newest}/engine", f"{newest}/ema-0.050"):
        here, there = (load_file(f"{run}/{file}.safetensors") for run in ("run", "alone"))
        assert here.keys() == there.keys()
        weights = [name for name in there if torch.is_floating_point(there[name]) and not name.startswith("exp_avg")]
        assert relative_rms({name: here[name] for name in weights}, there) <= 1e-4
