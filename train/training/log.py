"""The run folder: its lock, its settings, its metrics, and the steps that were skipped."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mclr.configs.schema import FILE, flatten, load_resolved
from mclr.errors import UserError
from mclr.train.engine.checkpoint import MANIFEST, checkpoints
from mclr.train.system.files import NoLocks, lock, regular, try_folder, write_file, write_json
from mclr.train.training.trackers import Trackers

# Settings that may change between two starts of a run, by section: they do not decide what it learns. Nor does the section sample.
FREE = {
    "data": "damaged path",
    "engine": "activation_checkpointing compile kernels kind offload reference timeout zero",
    "train": "checkpoint_every grid_every images keep keep_best log_every log_to max_skipped micro_batch mle_images monitor_every",
}
INPUTS = "inputs.json"
METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"
LOCK = "lock"  # it holds the number of the process that was here last
FOLDERS = ("checkpoints", "grids", "snapshots", "watchdog", "weights")
# what a run writes over or removes in time
WRITES = (INPUTS, LOCK, METRICS, SKIPPED, *FOLDERS)


def is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "sample" or name in FREE.get(section, "").split()


class RunFolder:
    """A run folder, held by this process until it is closed.

    Raises UserError when it cannot be written, when another process holds it, or when it holds another run or something that no run
    wrote. settings: dotted key -> value; text: the same as YAML. notes: what the weights say about the run; notes["inputs"]: setting ->
    checksum of what it names, which could change under that name. no_lock: go on where the file system has no locks.
    """

    def __init__(self, path: Path, settings: dict[str, Any], text: str, notes: dict[str, Any], no_lock: bool = False):
        self.path, self.notes = path, notes
        goes_on = _is_run(path)
        for name in () if goes_on else WRITES:
            if _holds_something(path / name):
                raise UserError(
                    f"{path / name} is of no run that could go on, and this one would write over it: choose another --out"
                )
        if (path / FILE).exists():
            _refuse_other(path, settings, notes["inputs"])
        self.lock = _locked(path, no_lock)
        # a process of this run that died while writing left these
        for torn in [*path.glob(".tmp-*"), *path.glob("checkpoints/.tmp-*"), *path.glob("grids/.tmp-*")] if goes_on else []:
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        for folder in (path, *(path / name for name in FOLDERS if (path / name).exists())):
            if not folder.is_dir():
                raise UserError(f"{folder} is a file, and the run would write a folder there: move it, or choose another --out")
            try_folder(folder)
        write_json(path / INPUTS, notes["inputs"])
        write_file(path / FILE, text.encode())
        self.trackers = Trackers(path, settings)

    def close(self) -> None:
        """Let go of the folder."""
        self.trackers.give("close")
        self.lock.close()

    def rewind(self, images_seen: int) -> None:
        """Drop what was logged and drawn after the checkpoint that training goes on from."""
        last = 0
        for path in (self.path / METRICS, self.path / SKIPPED):
            if path.exists():
                lines = [(_images(line), line) for line in path.read_bytes().splitlines()]
                last = max([last, *(int(images) for images, _ in lines if math.isfinite(images))])
                write_file(path, b"".join(line + b"\n" for images, line in lines if images <= images_seen))
        for picture in self.path.glob("grids/*.png"):
            if picture.stem.isdigit() and int(picture.stem) > images_seen:
                picture.unlink()
        self.trackers.begun, self.trackers.last = images_seen, last

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, and give its numbers to the trackers. What is not finite becomes null."""
        values = _finite(values)
        self._append(METRICS, values)
        images = values.pop("images")
        self.trackers.give("log", images, {name: value for name, value in values.items() if value is not None})

    def note_skipped(self, images: int, loss: float, keys: Sequence[str]) -> None:
        """Append to skipped.jsonl a step that changed nothing, since its gradient was not finite. keys: the names of its samples."""
        self._append(SKIPPED, _finite({"images": images, "loss": loss, "keys": list(keys)}))

    def _append(self, name: str, values: dict[str, Any]) -> None:
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path / name} ({error.strerror}): make it writable, with room to spare"
            ) from error


def _locked(path: Path, no_lock: bool) -> IO[str]:
    """Make the folder and take its lock, a file that says who holds it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file, mine = lock(path / LOCK, none=no_lock)
    except NoLocks as error:
        raise UserError(
            f"the file system of {path} has no locks ({error.strerror}), which keep two runs apart: choose another place with --out, "
            "or give --no-lock and start no second run there"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write the run folder {path} ({error.strerror}): choose another with --out") from error
    if not mine:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(f"run folder {path} is held by process {holder}: wait for it, or choose another with --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _images(line: bytes) -> float:
    """The images seen that a line of a log names; infinity where the line is damaged, so that it is dropped."""
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def _is_run(path: Path) -> bool:
    """Whether a run was in this folder: its lock names a process, or it has a checkpoint (a copy may lack the lock)."""
    try:
        if regular(path / LOCK).read_text(errors="replace").strip().isdecimal():
            return True
    except OSError:
        pass
    return any((folder / MANIFEST).is_file() for folder in checkpoints(path))


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def _refuse_other(path: Path, here: dict[str, Any], inputs: dict[str, str]) -> None:
    try:
        there = flatten(load_resolved(path))
    except UserError as error:
        raise UserError(
            f"{path / FILE} is damaged ({error}): remove it, and the run goes on with the settings given here"
        ) from error
    try:
        began_with = json.loads((path / INPUTS).read_text())
    except (OSError, ValueError):
        began_with = {}
        print(f"{path / INPUTS} is lost: whether weights and data are those that the run began with cannot be told")
    # the same content under another name, such as another path to it, is the same input
    same = {key for key, checksum in inputs.items() if began_with.get(key) == checksum}
    for key in sorted((there.keys() | here.keys()) - same):
        if not is_free(key) and there.get(key) != here.get(key):
            raise UserError(
                f"run folder {path} holds a run with {key}={there.get(key)}, this one has {here.get(key)}: choose another with "
                "--out, or remove the folder"
            )
    for key, checksum in inputs.items():
        if began_with.get(key, checksum) != checksum:
            raise UserError(
                # latents are no setting: their precision is that of the cache
                f"run folder {path} began with another {key}={here.get(key, began_with[key])} than lies there now: choose another with "
                "--out, or put it back"
            )
