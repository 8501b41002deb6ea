"""Checkpoints: RUN/checkpoints/IMAGES/, written whole or not at all, independent of ranks and ZeRO stages, verified before use.

Each is also a weights folder (train/weights/folder.py) without a card: model.safetensors holds the average, or the weights where no
average is kept.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mclr.errors import UserError
from mclr.train.system.files import CannotWrite, digest, ignore, new_folder, write_json, write_tensors

MANIFEST = "manifest.json"  # file name -> sha256
Beat = Callable[[], None]  # called for every file and every CHUNK of it, so that a slow disk does not look like a hang


def save_checkpoint(
    run: Path,
    images_seen: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    about: dict[str, Any],
    keep: int,
    keep_best: bool = False,
    beat: Beat = ignore,
) -> None:
    """Write a checkpoint, then remove all but the newest `keep`. Many parameters: the content, and the rules of what is kept.

    tensors: file name -> name -> tensor. about: config.json of a weights folder. keep_best: also keep the checkpoint with the lowest
    state["held_out"]. Raises UserError when it cannot be written; then the earlier checkpoints remain.
    """
    path = run / "checkpoints" / f"{images_seen:012d}"
    # a checkpoint of this name is damaged, or training would not have gone on from an older one
    shutil.rmtree(path, ignore_errors=True)
    try:
        with new_folder(path) as folder:
            files = {f"{name}.safetensors": group for name, group in tensors.items()}
            digests = {name: write_tensors(folder / name, group, beat=beat) for name, group in files.items()}
            for name, content in (("state.json", state), ("config.json", about)):
                digests[name] = write_json(folder / name, content)
            write_json(folder / MANIFEST, digests)
    except CannotWrite as error:
        raise UserError(f"cannot write the checkpoint {path} ({error.reason}): make room; those before it still stand") from error
    # newer ones are damaged
    good = [folder for folder in checkpoints(run) if folder <= path]
    kept = good[-keep:]
    if keep_best and (best := best_checkpoint(good)):
        kept.append(best[0])
    for old in set(checkpoints(run)).difference(kept):
        # a network file system keeps the names of files that another machine still reads
        shutil.rmtree(old, ignore_errors=True)
        beat()


def best_checkpoint(folders: list[Path]) -> tuple[Path, float] | None:
    """(the checkpoint with the lowest held-out loss, the newest of equal ones; that loss), or None when no state has one."""
    losses = {}
    for folder in folders:
        # a damaged checkpoint, or one of a time when the run did not measure this loss
        with suppress(OSError, ValueError, KeyError, TypeError):
            losses[folder] = float(json.loads((folder / "state.json").read_text())["held_out"])
    best = min(reversed(losses), key=lambda folder: losses[folder], default=None)
    return None if best is None else (best, losses[best])


def newest_checkpoint(run: Path, beat: Beat = ignore) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint whose files all match their checksums, or None; the damaged ones that are newer, newest first)."""
    damaged: list[Path] = []
    for folder in reversed(checkpoints(run)):
        with suppress(OSError, ValueError, RecursionError):
            files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
            if json.loads((folder / MANIFEST).read_bytes()) == {path.name: digest(path, beat) for path in files}:
                return folder, damaged
        damaged.append(folder)
    return None, damaged


def load_checkpoint(folder: Path, beat: Beat = ignore) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state), as they were saved."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors[path.stem] = load_file(path)
        beat()
    return tensors, json.loads((folder / "state.json").read_text())


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Unfinished folders and other files have other names."""
    return sorted(p for p in (run / "checkpoints").glob("?" * 12 + "*") if p.name.isdigit())
