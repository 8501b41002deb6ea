"""A run that was stopped and goes on ends, bit for bit, where an uninterrupted one does; and nothing on the way can spoil it."""

import functools
import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from runs import BATCH, MODELS, STEPS, arguments, assert_same_tensors, metrics, tensors

import mclr.loss
import mclr.train.engine.checkpoint
import mclr.train.training.loop
import mclr.train.training.state
import mclr.train.training.step
from mclr.train.cli import main
from mclr.train.engine.checkpoint import checkpoints
from mclr.train.weights.folder import load_net, read_config

FILES = ["checkpoints", "config.yaml", "inputs.json", "lock", "metrics.jsonl", "snapshots", "watchdog", "weights"]


@pytest.fixture
def start(digits, tokenizer, tmp_path, monkeypatch):
    """start(model, steps, *overrides) -> (status, run folder) of `mclr train` on few steps."""
    monkeypatch.chdir(tmp_path)

    def start(model, steps, *overrides, out="run"):
        more = ["--out", out, f"train.images={steps * BATCH}", *overrides]
        return main(["train", *arguments(model, digits, tokenizer, "local"), *more]), tmp_path / out

    return start


def kind_of_model(model):
    return {"edm2-digits": "edm2", "var-digits": "var"}[model]


def assert_same(run, other, steps=STEPS):
    """Same metrics at every step, same checkpoint (weights, moments, averages, posterior classifier), same weights and snapshots."""
    assert [line["images"] for line in metrics(run)] == [BATCH * (i + 1) for i in range(steps)]
    assert metrics(run) == metrics(other)
    images = range(2 * BATCH, steps * BATCH + 1, 2 * BATCH)
    assert sorted(os.listdir(run / "snapshots")) == [f"{n:012d}-{std}.safetensors" for n in images for std in ("0.050", "0.100")]
    for place in (f"checkpoints/{steps * BATCH:012d}", "weights", "snapshots"):
        here, there = tensors(run / place), tensors(other / place)
        assert here.keys() == there.keys() and len(here) > 10
        assert all(torch.equal(here[k], there[k]) for k in here)


def in_step(step, monkeypatch, action):
    """Do this in the first of the two micro-batches of the given step, counted from 1."""
    real, count = mclr.loss.score, 0

    def score(*args):
        nonlocal count
        count += 1
        if count == 2 * step - 1:
            action()
        return real(*args)

    monkeypatch.setattr(mclr.loss, "score", score)


def interrupt_in(step, monkeypatch, number=signal.SIGINT):
    """A signal in the middle of a step, which is then given up."""
    in_step(step, monkeypatch, lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def whole(digits, tokenizer, tmp_path_factory):
    """whole(model): the run folder of an uninterrupted run; each is run once."""

    @functools.cache
    def whole(model):
        run = tmp_path_factory.mktemp("whole") / "run"
        assert main(["train", *arguments(model, digits, tokenizer, "local"), "--out", str(run)]) == 0
        return run

    return whole


@pytest.mark.parametrize("model", MODELS)
def test_more_images_continue_a_finished_run(model, start, whole, capsys):
    assert start(model, 2)[0] == 0
    assert start(model, 2)[0] == 0
    assert f"finished already: {2 * BATCH} images" in capsys.readouterr().out
    status, run = start(model, STEPS)
    assert status == 0 and f"going on from run/checkpoints/{2 * BATCH:012d}" in capsys.readouterr().out
    assert_same(run, whole(model))
    notes = json.loads((run / "weights" / "config.json").read_text())
    assert notes["images_seen"] == STEPS * BATCH and notes["metrics"]["loss"] == metrics(run)[-1]["loss"]
    assert sorted(os.listdir(run)) == FILES
    stored = {path.stem for path in (run / "checkpoints" / f"{STEPS * BATCH:012d}").glob("*.safetensors")}
    assert stored - {"posterior"} == {"engine", "model", "ema-0.050"} and ("posterior" in stored) == (model == "edm2-digits")


@pytest.mark.parametrize(("model", "number", "status"), [(MODELS[0], signal.SIGINT, 130), (MODELS[1], signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_a_checkpoint_and_it_goes_on(model, number, status, start, whole, monkeypatch, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_in(3, patch, number)
        assert start(model, STEPS)[0] == status
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"stopped by a signal at {2 * BATCH} images; the same command goes on from there"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    status, run = start(model, STEPS)
    assert status == 0
    assert_same(run, whole(model))


def test_an_impatient_user_does_no_harm(start, whole, monkeypatch):
    """Ctrl-C again and again while the checkpoint is written, and at once after the resume."""
    model = MODELS[0]
    with monkeypatch.context() as patch:
        interrupt_in(3, patch)
        real = mclr.train.engine.checkpoint.write_json

        def write_json(*args):
            os.kill(os.getpid(), signal.SIGINT)
            digest = real(*args)
            os.kill(os.getpid(), signal.SIGTERM)
            return digest

        patch.setattr(mclr.train.engine.checkpoint, "write_json", write_json)
        assert start(model, STEPS)[0] in (130, 143)
    with monkeypatch.context() as patch:
        real_resume = mclr.train.training.state.Keeper.resume

        def resume(*args):
            os.kill(os.getpid(), signal.SIGINT)
            return real_resume(*args)

        patch.setattr(mclr.train.training.state.Keeper, "resume", resume)
        status, run = start(model, STEPS)
        assert status == 130 and os.listdir(run / "checkpoints") == [f"{2 * BATCH:012d}"]
    assert start(model, STEPS)[0] == 0
    assert_same(run, whole(model))


class Crash(Exception):
    pass


def crash():
    raise Crash


def test_a_crash_costs_the_steps_since_the_checkpoint(start, whole, tmp_path, monkeypatch):
    """Their metrics, a line torn by the crash and their snapshots are not there twice; nor does torn writing stay."""
    model, run = MODELS[1], tmp_path / "run"
    with monkeypatch.context() as patch:
        in_step(6, patch, crash)
        with pytest.raises(Crash):
            start(model, STEPS, f"train.checkpoint_every={3 * BATCH}")
    assert [line["images"] for line in metrics(run)] == [BATCH * (i + 1) for i in range(5)]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"images": 4')
    (run / "checkpoints" / ".tmp-1").mkdir()
    (run / ".tmp-2").write_text("torn")
    (run / "snapshots" / ".tmp-3").write_text("torn")
    (run / "snapshots" / f"{4 * BATCH:012d}-0.050.safetensors").write_bytes(b"of weights that were lost")
    (run / "snapshots" / f"{5 * BATCH:012d}-0.100.safetensors").write_bytes(b"of a run that ended here")
    assert start(model, STEPS)[0] == 0
    assert_same(run, whole(model))
    assert sorted(os.listdir(run)) == FILES
    assert sorted(os.listdir(run / "checkpoints")) == [f"{steps * BATCH:012d}" for steps in (3, 6)]


def test_a_crash_between_the_snapshots_of_one_time_is_made_good(start, whole, monkeypatch):
    model, written = MODELS[1], 0
    with monkeypatch.context() as patch:
        real = mclr.train.training.state.write_snapshot

        def write_snapshot(*args):
            nonlocal written
            written += 1
            if written == 4:
                raise Crash
            real(*args)

        patch.setattr(mclr.train.training.state, "write_snapshot", write_snapshot)
        with pytest.raises(Crash):
            start(model, STEPS, f"train.checkpoint_every={BATCH}")
    status, run = start(model, STEPS)
    assert status == 0
    assert_same(run, whole(model))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(start, whole, capsys):
    model = MODELS[0]
    assert start(model, 2)[0] == 0
    assert start(model, 4)[0] == 0
    _, run = start(model, 4)
    (run / "checkpoints" / f"{4 * BATCH:012d}" / "engine.safetensors").write_bytes(b"nonsense")
    capsys.readouterr()
    assert start(model, STEPS)[0] == 0
    out = capsys.readouterr().out
    assert f"checkpoint run/checkpoints/{4 * BATCH:012d} is damaged" in out and f"from run/checkpoints/{2 * BATCH:012d}" in out
    assert_same(run, whole(model))


def test_a_run_without_a_whole_checkpoint_does_not_start_over(start, capsys):
    _, run = start(MODELS[1], 2)
    (run / "checkpoints" / f"{2 * BATCH:012d}" / "state.json").write_text("{}")
    before = (run / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert start(MODELS[1], STEPS)[0] == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint in run/checkpoints is whole")
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("harm", ["gone", "half", "older"])
def test_weights_that_a_crash_took_are_written_again(harm, start, whole, capsys):
    """The last checkpoint was written and the weights were not: the same command does the rest."""
    model = MODELS[1]
    _, run = start(model, STEPS)
    if harm == "gone":
        shutil.rmtree(run / "weights")
    elif harm == "half":
        (run / "weights" / "config.json").unlink()
    else:
        config = json.loads((run / "weights" / "config.json").read_text())
        (run / "weights" / "config.json").write_text(json.dumps(config | {"images_seen": 8}))
        (run / "weights" / "model.safetensors").write_bytes(b"")
    assert start(model, STEPS)[0] == 0
    assert_same(run, whole(model))


def poison(steps, patch):
    """The images of these steps, counted from 1, are no numbers."""
    real, count = mclr.train.training.step.Task.samples, 0

    def samples(*args):
        nonlocal count
        count += 1
        x_P, *rest = real(*args)
        # two micro-batches each; tokens make NaN where they become teacher inputs
        return (x_P * float("nan") if (count + 1) // 2 in steps else x_P), *rest

    patch.setattr(mclr.train.training.step.Task, "samples", samples)


def skip(steps, patch):
    """A run told to pass over the batches of these steps."""
    real, count, found = mclr.train.training.loop.train_step, 0, {}

    def train_step(*args):
        nonlocal count
        count += 1
        if count in steps:
            args[0].engine.stepped = False
            return {name: torch.full_like(value, float("nan")) for name, value in found.items()}
        found.update(real(*args))
        return dict(found)

    patch.setattr(mclr.train.training.loop, "train_step", train_step)


def test_a_step_that_is_not_finite_is_skipped_as_if_its_batch_were_not_there(start, monkeypatch):
    model, bad, runs = MODELS[0], (2, 4, 5), {}
    for name, how in {"poisoned": poison, "told": skip}.items():
        with monkeypatch.context() as patch:
            how(bad, patch)
            status, runs[name] = start(model, STEPS, "train.max_skipped=2", out=name)
        assert status == 0
    assert_same_tensors(runs["poisoned"], runs["told"])
    lines = metrics(runs["poisoned"])
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in bad for step in range(1, STEPS + 1)]
    noted = [json.loads(line) for line in (runs["poisoned"] / "skipped.jsonl").read_text().splitlines()]
    assert [event["images"] for event in noted] == [step * BATCH for step in bad]
    assert all(len(set(event["keys"])) == BATCH for event in noted)


@pytest.mark.parametrize("model", MODELS)
def test_activations_that_are_computed_again_change_nothing(model, start):
    """Dropout, stochastic depth and averages included, bit for bit."""
    runs = [start(model, 3, f"engine.activation_checkpointing={on}", out=on) for on in ("false", "true")]
    assert [status for status, _ in runs] == [0, 0]
    assert metrics(runs[0][1]) == metrics(runs[1][1])
    assert_same_tensors(runs[0][1], runs[1][1])


def test_a_checkpoint_is_a_weights_folder(start, tmp_path):
    """The average of one run, the weights of another: as at the end of the run, and ready for `mclr convert` and --init."""
    for model, std in ((MODELS[0], 0.1), (MODELS[1], 0.0)):
        status, run = start(model, 2, f"train.ema_std={std}", out=model)
        folder = run / "checkpoints" / f"{2 * BATCH:012d}"
        assert status == 0
        net, last = load_net(str(folder), kind_of_model(model)), load_net(str(run / "weights"), kind_of_model(model))
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), last.state_dict().values(), strict=True))
        assert read_config(folder) | {"metrics": 0} == read_config(run / "weights") | {"metrics": 0}
        assert main(["convert", str(folder), str(tmp_path / f"{model}-half"), "--half"]) == 0
        assert start(model, 3, "train.ema_std=0.0", f"model.weights={folder}", out=f"{model}-again")[0] == 0


def test_a_checkpoint_of_another_version_is_one_line(start, capsys):
    """One that lacks what is new is fine; one that holds what this version does not know is not."""
    _, run = start(MODELS[1], 2)
    for edit, status in (({"skipped": None}, 0), ({"tempo": 1.0}, 2)):
        change_state(checkpoints(run)[-1], edit)
        capsys.readouterr()
        assert start(MODELS[1], STEPS)[0] == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is from another version of this program" in error and "'tempo'" in error and "another --out" in error


def change_state(folder, edit):
    """Set entries of a checkpoint's state, or take them away (None), with the checksum that belongs to it."""
    state = json.loads((folder / "state.json").read_text()) | edit
    (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key not in edit or edit[key]}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_whose_steps_are_no_longer_finite_ends(start, monkeypatch, capsys):
    model = MODELS[0]
    with monkeypatch.context() as patch:
        poison((3, 4, 5), patch)
        assert start(model, STEPS, f"train.checkpoint_every={2 * BATCH}", "train.max_skipped=2")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: gradient_norm is nan at {5 * BATCH} images, 3 steps in a row: start again with a lower train.lr or "
        f"objective.lam and another --out; run keeps its checkpoint of {4 * BATCH} images"
    )


def test_a_real_divergence_is_noticed(start, capsys):
    assert start(MODELS[0], STEPS, "train.lr=1e30", "train.weight_decay=0.0", "train.max_skipped=1")[0] == 2
    assert "is nan" in capsys.readouterr().err.splitlines()[-1]


def test_the_ratio_waits_for_a_classifier_that_starts_from_scratch(start):
    """For whole steps, whatever the micro-batch; it learns meanwhile."""
    runs = {}
    for name, overrides in {"warm": (), "halves": ("train.micro_batch=2",)}.items():
        status, runs[name] = start("edm2-digits", 6, f"model.posterior.warmup_images={2 * BATCH + 5}", *overrides, out=name)
        assert status == 0
    lines = metrics(runs["warm"])
    shares = [line["contrast_share"] for line in lines]
    assert shares[:3] == [0, 0, 0] and min(shares[3:]) > 0
    assert lines[2]["rows"] == 3 * BATCH and lines[3]["rows"] > 4 * BATCH
    assert shares == [line["contrast_share"] for line in metrics(runs["halves"])]
    status, without = start("edm2-digits", 6, "objective.contrast=null", out="null")
    untouched = start("edm2-digits", 6, "objective.contrast=null", "model.posterior.warmup_images=1000", out="null-warm")
    assert status == untouched[0] == 0 and metrics(without) == metrics(untouched[1])


def test_the_classifier_learns_before_there_is_a_ratio(start):
    settings = (f"model.posterior.warmup_images={99 * BATCH}", "model.posterior.lr=0.01")
    losses = [line["posterior_loss"] for line in metrics(start("edm2-digits", 100, *settings)[1])]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
