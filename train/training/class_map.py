"""model.class_map: the condition of the weights from which each class of a run starts."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mclr.configs.schema import Data, DiffusionModel, NextScaleModel
from mclr.errors import UserError
from mclr.train.data.dataset import open_dataset
from mclr.train.system.files import regular
from mclr.train.weights.folder import read_config

FRESH, SAME = "fresh", "same"
FORM = "{class here: condition there, or null}"


def class_map(
    model: DiffusionModel | NextScaleModel, data: Data, weights: Path, generated: str | None = None
) -> list[int | None] | None:
    """For every class of the run a condition of `weights`, or None = fresh (models/conditions.py); None: the conditions are the same.

    generated: objective.generated. Raises UserError for a file that is not a JSON object with one entry, a condition or null, per class.
    Without a class_map it also raises UserError when weights and data record different class names.
    """
    file, described, names = model.class_map, read_config(weights), class_names(data)
    # without a prepared folder, as for new digits, classes are named by their index
    here = names or [str(c) for c in range(data.num_classes)]
    if file is None:
        there = described.get("classes") or ()
        if (c := first_other(there, names)) is not None:
            raise UserError(
                f"weights {model.weights} were trained on other classes than {data.path} has: condition {c} is {there[c]} there "
                f"and {names[c]} here. Say model.class_map={SAME} if the classes are the same, model.class_map={FRESH} if none is, "
                "or give a JSON file {class here: condition there}"
            )
    if file in (None, SAME):
        return None
    conditions = described["config"].get("num_classes")
    if not conditions:
        raise UserError(f"weights {model.weights} have no conditions for model.class_map={file} to map: leave it out")
    if generated is not None:
        raise UserError(
            f"objective.generated={generated} was drawn under the weights' own conditions, which model.class_map changes: "
            "fine-tune with the class_map by --objective mle first, and go on from those weights"
        )
    if file == FRESH:
        return [None] * data.num_classes
    return sources_of(file, read_entries(file), here, conditions)


def first_other(there: Sequence[Any], here: Sequence[str]) -> int | None:
    """The first class whose name differs; None where all agree, or the numbers of names do not."""
    if len(there) != len(here):
        return None
    return next((c for c, (theirs, ours) in enumerate(zip(there, here, strict=True)) if str(theirs) != ours), None)


def class_names(data: Data) -> Sequence[str]:
    """The names of the classes of the data; empty where it has numbers: streams, drawn images, and what is not prepared yet."""
    info = open_dataset(data.path) if Path(data.path, "dataset.json").exists() else None
    return info.class_names if info and info.drawn is None else ()


def read_entries(file: str) -> list[tuple[str, Any]]:
    """The entries of a JSON object, duplicates included. Raises UserError for anything else."""
    try:
        entries = json.loads(regular(Path(file)).read_bytes(), object_pairs_hook=list)
    except OSError as error:
        way_out = f"give {FRESH}, {SAME}, or a JSON file {FORM}"
        raise UserError(f"cannot read model.class_map={file} ({error.strerror}): {way_out}") from error
    except ValueError as error:
        raise UserError(f"model.class_map={file} is not JSON ({error}): write {FORM}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, tuple) for entry in entries):
        raise UserError(f"model.class_map={file} is no JSON object: write {FORM}")
    return entries


def sources_of(file: str, entries: Sequence[tuple[str, Any]], names: Sequence[str], conditions: int) -> list[int | None]:
    """The condition there of every class here. A key is a class name or, where no class has that name, an index."""
    index = {str(c): c for c in range(len(names))} | {name: c for c, name in enumerate(names)}
    sources: dict[int, int | None] = {}
    for key, there in entries:
        fault = None
        if key not in index:
            close = difflib.get_close_matches(key, names, n=1) or list(names[:10])
            fault = f": {key!r} is no class of the data: give one of its names, like {', '.join(close)}"
        elif index[key] in sources:
            fault = f" has two entries for class {names[index[key]]}: leave one"
        elif there is not None and (type(there) is not int or not 0 <= there < conditions):
            fault = f": {json.dumps(there)} for {key!r} is no condition of the weights: give 0..{conditions - 1}, or null for a fresh one"
        if fault:
            raise UserError(f"model.class_map={file}{fault}")
        sources[index[key]] = there
    missing = [name for c, name in enumerate(names) if c not in sources]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.class_map={file} has no entry for {', '.join(missing[:3])}{more}: give a condition of the weights, or null"
        )
    return [sources[c] for c in range(len(names))]
