"""train/training/log.py, trackers.py and throughput.py: lines of JSON, trackers that never end a run, the figures of the machine."""

import json
import math
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from launch import as_rank
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mclr.configs.schema import dump, flatten, load
from mclr.errors import UserError
from mclr.train.training import throughput, trackers
from mclr.train.training.log import RunFolder
from mclr.train.training.throughput import TIMING, Throughput

CPU = torch.device("cpu")


@pytest.fixture
def open_run(tmp_path):
    """open_run(*trackers) -> the run folder of a process that begins, or goes on."""
    held = []

    def open_run(*names):
        if held:
            held.pop().close()
        config = load("edm2-digits", "mle", "digits", "auto", [f"train.log_to=[{','.join(names)}]"])
        held.append(RunFolder(tmp_path / "run", flatten(config), dump(config), {"inputs": {}}))
        return held[0]

    yield open_run
    for run in held:
        run.close()


def lines(run, name="metrics.jsonl"):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run.path / name).read_text().splitlines()]


def log(run, *images):
    """Lines as a run repeats them."""
    for each in images:
        run.log(images=each, loss=1 / each)


def test_what_is_not_finite_is_null(open_run):
    run = open_run()
    run.log(images=8, loss=math.nan, gradient_norm=-math.inf, flops=10**30, rows=0.5)
    assert lines(run) == [{"images": 8, "loss": None, "gradient_norm": None, "flops": 10**30, "rows": 0.5}]
    run.note_skipped(images=8, loss=math.inf, keys=["shard-0/17", "shard-0/18"])
    run.note_skipped(images=16, loss=2.5, keys=[])
    assert lines(run, "skipped.jsonl") == [
        {"images": 8, "loss": None, "keys": ["shard-0/17", "shard-0/18"]},
        {"images": 16, "loss": 2.5, "keys": []},
    ]


def test_going_on_drops_what_came_after_the_checkpoint(open_run):
    run = open_run()
    log(run, 8, 16, 24)
    for images in (8, 24):
        run.note_skipped(images=images, loss=1.0, keys=["a"])
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"images": null}\n{"images": 1' + 400 * b"0" + b'}\n{"images": 8, "\xff": 1}\n{"images": 4')
    (run.path / "grids").mkdir()
    for name in (f"{8:012d}.png", f"{24:012d}.png", "mine.png", ".tmp-1"):
        (run.path / "grids" / name).write_bytes(b"")
    run = open_run()
    run.rewind(16)
    assert [line["images"] for line in lines(run)] == [8, 16]
    assert [line["images"] for line in lines(run, "skipped.jsonl")] == [8]
    assert sorted(path.name for path in run.path.glob("grids/*")) == [f"{8:012d}.png", "mine.png"]


def picture(run, images):
    path = run.path / f"{images}.png"
    Image.new("RGB", (6, 4), (images, 0, 0)).save(path)
    run.trackers.give("picture", "samples", images, path)


def scalars(run, name="loss"):
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_tensorboard_shows_every_line_once(open_run):
    run = open_run("tensorboard")
    run.rewind(0)
    run.log(images=8, loss=math.nan, rows=3)
    log(run, 16, 24)
    picture(run, 24)
    # a crash: nothing is closed
    assert scalars(run) == [(16, 0.0625), (24, 0.041667)] and scalars(run, "rows") == [(8, 3.0)]
    run = open_run("tensorboard")
    run.rewind(16)
    log(run, 24, 32)
    picture(run, 32)
    assert scalars(run) == [(16, 0.0625), (24, 0.041667), (32, 0.03125)]
    run.close()
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload().Images("samples")
    assert [(event.step, event.width, event.height) for event in shown] == [(32, 6, 4)]


def test_a_run_that_logs_nothing_leaves_its_sinks_alone(open_run):
    run = open_run("tensorboard")
    run.rewind(0)
    run.close()
    assert not (run.path / "tensorboard").exists()


class FakeWandB(SimpleNamespace):
    """Stands for the package: what each run was begun with and given."""

    def __init__(self):
        super().__init__(begun=[], logged=[], Image=lambda path: f"picture {path.rpartition('/')[2]}", Settings=dict)
        self.key, self.asked, self.mode = "key", 0, "online"

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt=True, verify=True):
        self.asked += prompt
        return bool(self.key)

    def init(self, **how):
        self.asked += self.mode == "online" and not self.key
        self.begun.append(how)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=lambda: self.begun[-1].update(ended=True)
        )


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return sys.modules["wandb"]


def test_wandb_goes_on_in_the_same_run_and_gets_every_step_once(open_run, wandb):
    run = open_run()
    run.rewind(0)
    log(run, 8)
    for checkpoint, images in ((0, (8, 16, 24, 32)), (8, (16, 24)), (16, (24, 32, 40))):
        run = open_run("wandb")
        run.rewind(checkpoint)
        for each in images:
            log(run, each)
            picture(run, each)
    run.close()
    # 8 was logged before W&B was asked for, and lay after the checkpoint
    assert [step for step, values in wandb.logged if "loss" in values] == [8, 16, 24, 32, 40]
    assert wandb.logged[0] == (8, {"loss": 0.125}) and wandb.logged[-1] == (40, {"samples": "picture 40.png"})
    assert len({how["id"] for how in wandb.begun}) == 1 and len(wandb.begun) == 3 and all(how["ended"] for how in wandb.begun)
    how = wandb.begun[0]
    assert (how["project"], how["name"], how["resume"], how["dir"]) == ("mclr", "run", "allow", str(run.path))
    assert how["config"]["train.log_to"] == ["wandb"] and how["config"]["objective.name"] == "mle"
    # else a run would not end without a network
    assert 0 < how["settings"]["finish_timeout"] <= 60


def test_wandb_without_a_key_asks_nobody(open_run, wandb, capsys):
    """At a terminal its own start would wait for one. The modes that need no key are left alone."""
    wandb.key = None
    for wandb.mode in ("online", "offline", "disabled"):
        run = open_run("wandb")
        run.rewind(0)
        log(run, 8)
    assert wandb.asked == 0 and len(wandb.begun) == 2
    why = "no API key: run `wandb login`, or set WANDB_MODE=offline"
    assert capsys.readouterr().out == f"wandb failed ({why}): the run goes on without it, metrics.jsonl has everything\n"
    assert [line["images"] for line in lines(run)] == [8]


def test_wandb_itself_offline(open_run, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for checkpoint in (0, 8):
        run = open_run("wandb")
        run.rewind(checkpoint)
        log(run, 8, 16)
        picture(run, 16)
        run.close()
    assert "failed" not in capsys.readouterr().out
    name = json.loads((run.path / "wandb.json").read_text())["id"]
    # the second goes on in the first, and has nothing new
    kept = sorted(run.path.glob(f"wandb/offline-run-*/run-{name}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [len(list(path.parent.glob("files/media/images/*.png"))) for path in kept] == [1, 0]


class Broken(trackers.TensorBoard):
    def __init__(self, start, at="log"):
        # beside the files of the one that works
        super().__init__(SimpleNamespace(run=start.run / "broken", begun=start.begun))
        setattr(self, at, self.fail)

    def fail(self, *_):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("at", ["begin", "log", "picture", "close"])
def test_a_sink_that_fails_is_said_once_and_ends_no_run(at, open_run, monkeypatch, capsys):
    run = open_run("wandb", "tensorboard")

    def broken(start):
        if at == "begin":
            raise RuntimeError("no API key\nconfigured")
        return Broken(start, at)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", broken)
    run.rewind(0)
    log(run, 8, 16)
    picture(run, 16)
    picture(run, 24)
    run.close()
    why = "no API key configured" if at == "begin" else "[Errno 28] No space left on device"
    assert capsys.readouterr().out == f"wandb failed ({why}): the run goes on without it, metrics.jsonl has everything\n"
    assert [line["images"] for line in lines(run)] == [8, 16]
    assert scalars(run) == [(8, 0.125), (16, 0.0625)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_event_files_that_cannot_be_written_end_no_run(open_run, capsys):
    """TensorBoard writes in a thread of its own, which fails at some later time."""
    others = set(threading.enumerate())
    run = open_run("tensorboard")
    run.rewind(0)
    log(run, 8)
    shutil.rmtree(run.path / "tensorboard")
    (run.path / "tensorboard").write_text("in the way")
    log(run, 16, 24)
    run.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=10)
    assert capsys.readouterr().out.count("tensorboard failed") == 1
    assert [line["images"] for line in lines(run)] == [8, 16, 24]


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    trackers.refuse_missing(("tensorboard",))
    # what W&B leaves where it ran
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"^train.log_to=wandb needs wandb: pip install -e '.\[wandb\]'$"):
        trackers.refuse_missing(("wandb",))


def progress(images, rows, flops, seconds):
    return {"images": images, "rows": rows, "flops": flops, "seconds": seconds, "posterior_flops": 0.0}


def test_figures_are_of_what_passed_since_the_last_line(monkeypatch):
    """Of this rank and two others: the second waits longest, the third holds most."""
    as_rank(monkeypatch, 0, 3)
    others = torch.tensor([[0.0, 3.0 * 2**30, 4], [1.0, 2**30, 2]], dtype=torch.float64)

    def all_reduce(values, op=None):
        if op is None:
            values += others[:, 2].sum()
        else:
            assert op is throughput.dist.ReduceOp.MAX
            values.copy_(torch.stack([values, *others[:, :2]]).amax(0))

    monkeypatch.setattr(throughput.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(throughput.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(throughput, "peak_memory", lambda device: 2 * 2**30)
    here = Throughput(1e4, CPU)
    here.start(progress(100, 150.0, 1e6, 7.0))
    read = here.read(progress(140, 230.0, 1.06e6, 9.0), waited=0.5, damaged=1)
    assert read == {"images_per_second": 20, "rows_per_second": 40, "mfu": 1.0, "memory": 3, "data_wait": 0.5, "damaged": 7}
    assert {"seconds", *read} == set(TIMING)
    read = here.read(progress(141, 230.0, 1.06e6, 19.0), waited=0.1, damaged=1)
    assert read == {"images_per_second": 0.1, "rows_per_second": 0, "mfu": 0, "memory": 3, "data_wait": 0.1, "damaged": 7}


def test_of_a_device_that_is_not_known_there_is_no_utilisation():
    here = Throughput(None, CPU)
    here.start(progress(0, 0.0, 0.0, 0.0))
    read = here.read(progress(8, 8.0, 1e9, 1.0), 0.25, 0)
    assert set(TIMING) - {"seconds", *read} == {"mfu"} and read["data_wait"] == 0.25
    # what this very process holds
    assert 0.05 < read["memory"] < 64
