"""Faults on purpose: killed, stopped and hanging ranks, full disks, lost files. After each, the same command goes on.

At most 8 minutes on two busy cores, 2 of them without launchers. Every run ends with the tensors, snapshots, weights and metrics of an
undisturbed run, bit for bit. Runs of one rank are children of a fork server; runs of two ranks have a launcher. At the end a table
shows how many steps each fault cost.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from faults_child import child
from launch import RUN, environment, is_alive, launcher, of_ours, started, wait_for
from runs import BATCH, MODELS, STEPS, arguments, assert_same_tensors, differences, steps_logged
from test_zero_resume import follow

from mclr.train.engine.checkpoint import MANIFEST

pytestmark = pytest.mark.faults

KILLS = 20  # SIGKILLs, over both models
PROMPT = 20  # seconds in which a rank ends after a signal
LONGEST = 120  # seconds that anything may take
EVERY = 2  # steps between checkpoints
HOLDER = Path(__file__).parent.parent / "faults_rank.py"
HELD = 4  # the step in which launched ranks wait for their fault
SILENT = 15  # engine.timeout of launched ranks: more than PATIENCE, after which a failed rank reports its error

EDM2, VAR = MODELS
SERVER = multiprocessing.get_context("forkserver")
TABLE: dict[str, list[int | None]] = {}  # fault -> steps that each try cost; None: not survived
NOTES: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints TABLE and NOTES at the end, also under -q."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        # the fork server imports these once for all children
        SERVER.set_forkserver_preload(["faults_child", "mclr.train.run", "mclr.train.training.build", "torch._dynamo"])
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))
        started_at = time.monotonic()
        yield
    lines = [f"{'fault':44} tries  survived  lost steps"]
    for fault, lost in TABLE.items():
        costs = [cost for cost in lost if cost is not None]
        spread = f"{min(costs)} to {max(costs)}" if costs else "-"
        lines.append(f"{fault:44} {len(lost):5}  {len(costs):8}  {spread}")
    lines += [*NOTES, f"a checkpoint every {EVERY} steps; {time.monotonic() - started_at:.0f} s in all"]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


def run_child(folder, argv, *fault):
    """(exit status, output) of `mclr train` in a child. fault: see tests/faults_child.py."""
    process = SERVER.Process(target=child, args=(folder, argv, *fault))
    process.start()
    process.join(LONGEST)
    if hung := process.is_alive():
        process.kill()
        process.join()
    assert not hung, f"not ended after {LONGEST} s"
    return process.exitcode, (folder / "log").read_text()


class Case:
    """A run with a fault, in a folder of its own. whole: the run folder of the same run without a fault."""

    def __init__(self, fault, folder, argv, whole):
        self.fault, self.folder, self.argv, self.whole, self.run = fault, folder, argv, whole, folder / "run"
        TABLE.setdefault(fault, []).append(None)

    def start(self, *fault):
        return run_child(self.folder, self.argv, *fault)

    def refused(self, *fault):
        """The run ends with status 2 and leaves no unfinished files; returns its one line."""
        status, said = self.start(*fault)
        assert status == 2 and "Traceback" not in said and not list(self.run.rglob(".tmp-*")), said
        (error,) = of_ours(said)
        return error

    def goes_on(self, lost=None):
        """The same command does the rest; returns its output. lost: steps that it must do again, unless None."""
        before = max(steps_logged(self.run), default=0)
        status, said = self.start()
        assert status == 0, said
        assert differences(self.run, self.whole) == []
        assert steps_logged(self.run) == list(range(1, STEPS + 1))
        began = [int(line.rpartition("/")[2]) // BATCH for line in said.splitlines() if line.startswith("going on from ")]
        TABLE[self.fault][-1] = before - (began or [0])[0]
        assert lost in (None, TABLE[self.fault][-1])
        return said


@pytest.fixture(scope="module")
def fresh(digits, tmp_path_factory):
    """fresh(NAME): a new folder in which ./data are the digits."""
    home = tmp_path_factory.mktemp("faults")

    def fresh(name):
        (home / name).mkdir()
        (home / name / "data").symlink_to(digits)
        return home / name

    return fresh


@pytest.fixture(scope="module")
def whole(fresh, tokenizer):
    """whole(model, overrides, fault) -> (arguments, folder) of a complete run; each is run once."""
    ran = {}

    def whole(model, overrides=(), fault=()):
        if (key := (model, overrides, fault)) not in ran:
            argv = arguments(model, "data", tokenizer, "local", f"train.checkpoint_every={EVERY * BATCH}", *overrides)
            folder = fresh(f"whole-{len(ran)}")
            status, said = run_child(folder, argv, *fault)
            assert status == 0, said
            ran[key] = argv, folder
        return ran[key]

    return whole


@pytest.fixture
def begin(fresh, whole):
    """begin(fault, model, overrides, of the whole) -> Case."""

    def begin(fault, model, overrides=(), of_whole=()):
        argv, folder = whole(model, overrides, of_whole)
        return Case(fault, fresh(f"case-{sum(map(len, TABLE.values()))}"), argv, folder / "run")

    return begin


@pytest.fixture(scope="module")
def ticks(whole):
    """ticks(model) -> the names of all ticks of its run."""
    return lambda model: json.loads((whole(model)[1] / "ticks.json").read_text())


@pytest.fixture(scope="module")
def tick(ticks):
    """tick(model, name, nth) -> number of the nth such call, counted from 1."""
    return lambda model, name, nth: [n for n, place in enumerate(ticks(model)) if place.endswith(name)][nth - 1]


def in_step(step):
    """Number of the call of `score` in the first of its two micro-batches."""
    return 2 * step - 1


def test_sigkill_anywhere(begin, ticks):
    """At random ticks, the same ones in every session; many of them while a checkpoint, a snapshot or the weights are written."""
    chance, writing = random.Random(0), 0
    for model in MODELS:
        places = ticks(model)
        for when in sorted(chance.sample(range(len(places)), KILLS // len(MODELS))):
            writing += "save_checkpoint" in places[when]
            case = begin("SIGKILL at a random moment", model)
            assert case.start(when, "send", signal.SIGKILL)[0] == -signal.SIGKILL
            case.goes_on()
    assert writing >= 5
    NOTES.append(f"{writing} of {KILLS} SIGKILLs fell into the writing of a checkpoint")


@pytest.mark.parametrize(
    ("number", "name", "nth"),
    [
        (signal.SIGTERM, "score", in_step(4)),
        (signal.SIGTERM, "samples", in_step(2)),
        (signal.SIGHUP, "step", 3),
        (signal.SIGUSR1, "write_tensors", 2),
        (signal.SIGUSR2, "write_snapshot", 1),
    ],
)
def test_a_signal(number, name, nth, begin, tick):
    case = begin(number.name, EDM2)
    status, said = case.start(tick(EDM2, name, nth), "send", number)
    assert status == 128 + number and "stopped by a signal at" in said.splitlines()[-1], said
    assert time.time() - (case.folder / "sent").stat().st_mtime < PROMPT
    case.goes_on(lost=0)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (0, 0)])
@pytest.mark.parametrize("name", ["score", "write_tensors"])
def test_nobody_reads_what_it_says(number, ends, name, begin, tick):
    """`mclr train 2>&1 | tee log`, then Ctrl-C, which ends `tee` as well; or `tee` alone has died."""
    case = begin("nobody reads stdout and stderr", EDM2)
    status, said = case.start(tick(EDM2, name, 3), "unread", number)
    assert status == ends and "Traceback" not in said, said
    case.goes_on(lost=0)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def killed(fresh, whole, tick):
    """A folder with a run that was killed in step 5, after its second checkpoint; to be copied."""
    folder = fresh("killed")
    assert run_child(folder, whole(EDM2)[0], tick(EDM2, "score", in_step(5)), "send", signal.SIGKILL)[0] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (cut, "engine.safetensors"),
        (cut, MANIFEST),
        (flip_a_bit, "model.safetensors"),
        (flip_a_bit, "state.json"),
        (Path.unlink, "posterior.safetensors"),
        (Path.unlink, MANIFEST),
    ],
)
def test_the_newest_checkpoint_is_damaged(harm, file, begin, killed):
    case = begin("newest checkpoint damaged", EDM2)
    shutil.copytree(killed / "run", case.run)
    harm(case.run / "checkpoints" / f"{4 * BATCH:012d}" / file)
    said = case.goes_on()
    assert f"checkpoint run/checkpoints/{4 * BATCH:012d} is damaged" in said and f"from run/checkpoints/{2 * BATCH:012d}" in said


@pytest.mark.parametrize(
    ("step", "size", "full"),
    [(1, 400_000, "checkpoints/000000000016"), (1, 50_000, "snapshots/000000000016-0."), (3, 1_500, "metrics.jsonl")],
)
def test_files_may_grow_no_further(step, size, full, begin, tick):
    case = begin("a file cannot grow (RLIMIT_FSIZE)", EDM2)
    error = case.refused(tick(EDM2, "score", in_step(step)), "limit", size)
    assert f"run/{full}" in error and "File too large" in error and "room" in error
    case.goes_on()


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at this new folder."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        NOTES.append(f"full disk: not tried, mounting is not permitted here ({mounted.stderr.strip()})")
        pytest.skip("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# a run needs 4 MB
@pytest.mark.parametrize("size", ["600k", "1300k", "1700k", "2200k", "2700k", "3200k"])
def test_a_full_disk(size, begin):
    case = begin("full disk (tmpfs)", EDM2)
    with small_disk(case.run, size):
        assert "room" in case.refused()
        subprocess.run(["mount", "-o", "remount,size=64m", str(case.run)], check=True)
        case.goes_on()


def test_a_shard_goes_missing(begin, tick):
    case = begin("a shard goes missing", EDM2)
    data = case.folder / "data"
    digits = data.readlink()
    data.unlink()
    shutil.copytree(digits, data)
    lost = "data/train/000001.tar"
    # images are read a step ahead
    error = case.refused(tick(EDM2, "score", in_step(3)), "lose", lost, "elsewhere.tar")
    assert lost in error and 3 <= max(steps_logged(case.run)) < STEPS
    assert lost in case.refused()
    os.rename(case.folder / "elsewhere.tar", case.folder / lost)
    case.goes_on()


# where the next checkpoint, the next snapshot, the weights, the next line go
@pytest.mark.parametrize("path", ["run/checkpoints", "run/snapshots", "run", "run/metrics.jsonl"])
def test_no_more_writing(path, begin, tick):
    case = begin("a folder becomes unwritable", EDM2)
    error = case.refused(tick(EDM2, "score", in_step(3)), "forbid", path)
    assert path in error and "Permission denied" in error
    os.chmod(case.folder / path, 0o755)
    case.goes_on()


def test_batches_of_nan_are_left_out(begin):
    """The run ends as one without these batches, and notes their samples."""
    bad, settings = (2, 4, 5), ("train.max_skipped=2",)
    case = begin("batches of NaN", EDM2, settings, (0, "leave out", bad))
    assert case.start(0, "spoil", bad)[0] == 0
    assert_same_tensors(case.run, case.whole)
    noted = [json.loads(line) for line in (case.run / "skipped.jsonl").read_text().splitlines()]
    assert [(each["images"] // BATCH, len(set(each["keys"]))) for each in noted] == [(step, BATCH) for step in bad]
    TABLE[case.fault][-1] = 0


def test_too_many_batches_of_nan_end_a_run(begin):
    """Steps 3 to 5; the batch of step 5 is good when the run goes on."""
    case = begin("batches of NaN", EDM2, ("train.max_skipped=2",), (0, "spoil", (3, 4)))
    assert f"gradient_norm is nan at {5 * BATCH} images, 3 steps in a row" in case.refused(0, "spoil", (3, 4, 5))
    case.goes_on()


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_that_hangs_is_named(model, begin, tick):
    case = begin("a rank hangs", model, ("engine.timeout=3",))
    status, said = case.start(tick(model, "samples/batch", in_step(4)), "hang")
    (error,) = of_ours(said)
    assert status == 1 and "rank 0 has been silent for 3 s, since phase data of step 4" in error
    case.goes_on()


@pytest.fixture(scope="module")
def launched(fresh, tokenizer):
    """launched(fault, model, stage, launcher) -> Launched."""
    settings = ["train.micro_batch=2", f"train.checkpoint_every={EVERY * BATCH}", f"engine.timeout={SILENT}"]
    kinds = ((EDM2, 1), (VAR, 2), (EDM2, 3))
    plan = {kind: arguments(kind[0], "data", tokenizer, f"zero{kind[1]}", *settings) for kind in kinds}
    home = fresh("launched")
    for model, zero in plan:
        (home / f"{model}-{zero}").mkdir()
        (home / f"{model}-{zero}" / "data").symlink_to(home / "data")
    statuses = follow([(f"{model}-{zero}", argv, None) for (model, zero), argv in plan.items()], home)
    assert statuses == [0, 0, 0]

    def launched(fault, model, zero, name):
        folder = fresh(f"case-{sum(map(len, TABLE.values()))}")
        return Launched(fault, folder, plan[model, zero], home / f"{model}-{zero}" / "run", name)

    return launched


class Launched(Case):
    """A run on two ranks. name: the launcher; all starts use the same port."""

    def __init__(self, fault, folder, argv, whole, name):
        super().__init__(f"{fault}, {name}, {argv[argv.index('--engine') + 1]}", folder, argv, whole)
        self.command = launcher(name)

    def start(self):
        command = [*self.command, str(RUN), *self.argv]
        ran = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=LONGEST)
        return ran.returncode, ran.stdout + ran.stderr

    def suffer(self, whom, number, *more):
        """Send a signal, or none (0), to a rank or the launcher in step HELD: (the launcher's status, seconds until the end, output).

        more: variables for tests/faults_rank.py.
        """
        marks = [self.folder / f"held-{rank}" for rank in range(2)]
        command = ["env", f"HOLD={HELD}", *more, *self.command, str(HOLDER), *self.argv]
        with open(self.folder / "log", "w") as log, started(command, stdout=log, stderr=log, cwd=self.folder) as process:
            wait_for(lambda: all(mark.exists() for mark in marks), process, LONGEST)
            pid = process.pid if whom == "launcher" else int(marks[1].read_text())
            everybody = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
            try:
                os.kill(pid, number)
                (self.folder / "go").touch()
                began = time.monotonic()
                status = process.wait(LONGEST)
                while any(map(is_alive, everybody)) and time.monotonic() - began < LONGEST:
                    time.sleep(0.1)
                took = time.monotonic() - began
                said = (self.folder / "log").read_text()
                assert not any(map(is_alive, everybody)), said
            finally:
                for pid in filter(is_alive, everybody):
                    os.kill(pid, signal.SIGKILL)
                # ranks that were killed leave 66 MiB each
                for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.command[-1]}_?"):
                    buffer.unlink()
        return status, took, said


@pytest.mark.parametrize(("name", "zero"), [("deepspeed", 1), ("torchrun", 3)])
def test_nobody_reads_what_ranks_say(name, zero, launched):
    """Ctrl-C then goes to the launcher, which sends it on."""
    case = launched("nobody reads what ranks say", EDM2, zero, name)
    _, took, _ = case.suffer("launcher", signal.SIGINT, "UNREAD=1")
    assert took < PROMPT + SILENT
    case.goes_on(lost=0)


@pytest.mark.parametrize(
    ("whom", "number", "model", "zero", "name"),
    [
        ("rank", signal.SIGTERM, EDM2, 1, "deepspeed"),
        ("launcher", signal.SIGTERM, VAR, 2, "deepspeed"),
        ("launcher", signal.SIGTERM, EDM2, 1, "torchrun"),
        ("launcher", signal.SIGKILL, EDM2, 3, "torchrun"),
    ],
)
def test_ranks_end_after_a_signal_or_without_their_launcher(whom, number, model, zero, name, launched):
    """They save a checkpoint; folder and port are free at once."""
    case = launched(f"{number.name} to a {whom}", model, zero, name)
    status, took, said = case.suffer(whom, number)
    # a launcher passes the signal on a little later, when the ranks may have made another step
    (stopped,) = re.findall(r"stopped by a signal at (\d+) images", said)
    assert took < PROMPT and (int(stopped) == (HELD - 1) * BATCH or (whom == "launcher" and int(stopped) < STEPS * BATCH)), said
    assert whom == "launcher" or (status == 128 + number and not of_ours(said)), said
    case.goes_on(lost=0)


@pytest.mark.parametrize(
    ("fault", "number", "more", "model", "zero", "name", "says"),
    [
        ("SIGKILL to a rank", signal.SIGKILL, (), EDM2, 3, "deepspeed", None),
        (
            "SIGSTOP to a rank",
            signal.SIGSTOP,
            (),
            VAR,
            2,
            "deepspeed",
            f"rank 1 has been silent .* phase compute of step {HELD}",
        ),
        ("a rank loses its data", 0, ("LOST=1",), EDM2, 1, "torchrun", "error: rank 1: data/train/"),
    ],
)
def test_one_of_two_ranks_fails(fault, number, more, model, zero, name, says, launched):
    case = launched(fault, model, zero, name)
    status, _, said = case.suffer("rank", number, *more)
    assert status == 1 if number == signal.SIGSTOP else status != 0, said
    if says is not None:
        (error,) = of_ours(said)
        assert re.search(says, error), said
    case.goes_on()
