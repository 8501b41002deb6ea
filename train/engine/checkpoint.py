"""Checkpoints: RUN/checkpoints/IMAGES/, written whole or not at all, free of ranks and stages, verified before they are trusted.

Each is also a weights folder (train/weights/folder.py), without a card: model.safetensors is the average, or where none is kept the
weights.
"""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mclr.errors import UserError
from mclr.train.system.files import new_folder, write_json

MANIFEST = "manifest.json"


def save_checkpoint(
    run: Path,
    images_seen: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    about: dict[str, Any],
    keep: int,
    keep_best: bool = False,
) -> None:
    """Write tensors (file name -> name -> tensor), state and what is to be said about the weights, then drop all but the newest `keep`.

    keep_best: nor is that with the lowest state["held_out"] dropped. Raises UserError when there is no room; the checkpoints before
    still stand.
    """
    path = run / "checkpoints" / f"{images_seen:012d}"
    # only a damaged one can have this name: training went on from an older one
    shutil.rmtree(path, ignore_errors=True)
    with new_folder(path) as folder:
        for name, group in tensors.items():
            try:
                save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, folder / f"{name}.safetensors")
            except SafetensorError as error:
                raise UserError(
                    f"cannot write the checkpoint {path} ({error}): make room; those before it still stand"
                ) from error
        write_json(folder / "state.json", state)
        write_json(folder / "config.json", about)
        write_json(folder / MANIFEST, _digests(folder))
    # newer ones were found damaged
    newer, older = [p for p in checkpoints(run) if p > path], [p for p in checkpoints(run) if p <= path]
    kept = older[-keep:]
    if keep_best and (best := best_checkpoint(older)):
        kept.append(best[0])
    for old in newer + [p for p in older if p not in kept]:
        # somebody may read it on another machine, whose network file system then keeps names in it
        shutil.rmtree(old, ignore_errors=True)


def best_checkpoint(folders: list[Path]) -> tuple[Path, float] | None:
    """That of the lowest held-out loss, the newest of equal ones, and its loss; None where no state tells one."""
    losses = {}
    for folder in folders:
        # damaged, or of a time when the run did not look
        with suppress(OSError, ValueError, KeyError, TypeError):
            losses[folder] = float(json.loads((folder / "state.json").read_text())["held_out"])
    best = min(reversed(losses), key=lambda folder: losses[folder], default=None)
    return None if best is None else (best, losses[best])


def newest_checkpoint(run: Path) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint whose files all match their checksums, or None; the damaged ones that are newer, newest first)."""
    damaged: list[Path] = []
    for folder in reversed(checkpoints(run)):
        try:
            if json.loads((folder / MANIFEST).read_bytes()) == _digests(folder):
                return folder, damaged
        except (OSError, ValueError, RecursionError):
            pass
        damaged.append(folder)
    return None, damaged


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state), as they were saved."""
    tensors = {p.stem: load_file(p) for p in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def checkpoints(run: Path) -> list[Path]:
    """Oldest first; what was being written when a process died, or is not ours, has another name."""
    return sorted(p for p in (run / "checkpoints").glob("?" * 12 + "*") if p.name.isdigit())


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
