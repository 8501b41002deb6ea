"""The run folder: its lock, its settings, its metrics."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from configs.schema import FILE, RunConfig, dump, flatten, load_resolved
from mclr.errors import UserError
from train.files import lock, write_file, write_json

# may change between one start and the next: they do not decide what is learned
FREE = (
    "data.path",
    "engine.compile",
    "engine.kernels",
    "engine.kind",
    "engine.zero",
    "sample.",
    "train.checkpoint_every",
    "train.images",
    "train.keep",
    "train.log_every",
    "train.micro_batch",
    "train.mle_images",
    "train.monitor_every",
)
INPUTS = "inputs.json"


class RunFolder:
    """A run folder held by this process until it is closed. Raises UserError when it is unwritable, held, or holds another run.

    inputs: checksum of each thing that the config names and that could change under its name.
    """

    def __init__(self, path: Path, config: RunConfig, inputs: dict[str, str]):
        self.path = path
        if (path / FILE).exists():
            _refuse_other(path, config, inputs)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock, mine = lock(path / "lock")
        except OSError as error:
            raise UserError(f"cannot write the run folder {path} ({error.strerror}): choose another with --out") from error
        if not mine:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            self.lock.close()
            raise UserError(f"run folder {path} is held by process {holder}: wait for it, or choose another with --out")
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        # left by a process that died while writing
        for torn in [*path.glob(".tmp-*"), *path.glob("checkpoints/.tmp-*")]:
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        write_json(path / INPUTS, inputs)
        write_file(path / FILE, dump(config).encode())

    def close(self) -> None:
        """Let go of the folder."""
        self.lock.close()

    def rewind(self, images_seen: int) -> None:
        """Drop metrics logged after the checkpoint that training goes on from."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if _images(line) <= images_seen]
            write_file(metrics, "".join(f"{line}\n" for line in lines).encode())

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'metrics.jsonl'} ({error.strerror}): make room") from error


def _images(line: str) -> float:
    try:
        return json.loads(line)["images"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a crash


def _refuse_other(path: Path, config: RunConfig, inputs: dict[str, str]) -> None:
    there, here = flatten(load_resolved(path)), flatten(config)
    for key in sorted(there.keys() | here.keys()):
        if not key.startswith(FREE) and there.get(key) != here.get(key):
            raise UserError(
                f"run folder {path} holds a run with {key}={there.get(key)}, this one has {here.get(key)}: choose another with --out"
            )
    try:
        began_with = json.loads((path / INPUTS).read_text())
    except (OSError, ValueError):
        began_with = {}
        print(f"{path / INPUTS} is lost: whether weights and data are those that the run began with cannot be told")
    for key, checksum in inputs.items():
        if began_with.get(key, checksum) != checksum:
            raise UserError(
                f"run folder {path} began with another {key}={here[key]} than lies there now: choose another with --out, or put it back"
            )
