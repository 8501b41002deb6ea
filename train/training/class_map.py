"""model.class_map: the condition of the weights from which each class of a run starts."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mclr.configs.schema import RunConfig
from mclr.errors import UserError
from mclr.train.data.dataset import open_dataset
from mclr.train.system.files import regular
from mclr.train.weights.folder import read_config

FRESH, SAME = "fresh", "same"


def class_map(config: RunConfig, weights: Path) -> list[int | None] | None:
    """For every class of the run a condition of `weights`, or None = fresh (models/conditions.py); None: the conditions are the same.

    Raises UserError for a file that is not a JSON object with one entry, a condition or null, per class. Without a class_map it also
    raises UserError when weights and data record different class names.
    """
    file, data = config.model.class_map, config.data
    if file is None:
        refuse_other_names(config, weights)
    if file in (None, SAME):
        return None
    conditions = read_config(weights)["config"].get("num_classes")
    if not conditions:
        raise UserError(f"weights {config.model.weights} have no conditions for model.class_map={file} to map: leave it out")
    if config.objective.generated is not None:
        raise UserError(
            f"objective.generated={config.objective.generated} was drawn under the weights' own conditions, which model.class_map "
            "changes: fine-tune with the class_map by --objective mle first, and go on from those weights"
        )
    if file == FRESH:
        return [None] * data.num_classes
    # without a prepared folder, as for new digits, classes are named by their index
    known = Path(data.path, "dataset.json").exists()
    names = open_dataset(data.path).class_names if known else [str(c) for c in range(data.num_classes)]
    return sources_of(file, read_entries(file), names, conditions)


def refuse_other_names(config: RunConfig, weights: Path) -> None:
    """Raises UserError when weights and data record equally many classes with different names."""
    there, path = read_config(weights).get("classes") or (), Path(config.data.path)
    # streams and drawn images have numbers in place of names
    if not there or not (path / "dataset.json").exists() or (info := open_dataset(path)).drawn is not None:
        return
    differ = [c for c, name in enumerate(info.class_names) if len(there) == info.num_classes and str(there[c]) != name]
    if differ:
        c = differ[0]
        raise UserError(
            f"weights {config.model.weights} were trained on other classes than {path} has: condition {c} is {there[c]} there and "
            f"{info.class_names[c]} here. Say model.class_map={SAME} if the classes are the same, model.class_map={FRESH} if none is, "
            "or give a JSON file {class here: condition there}"
        )


def read_entries(file: str) -> list[tuple[str, Any]]:
    """The entries of a JSON object, duplicates included. Raises UserError for anything else."""
    try:
        entries = json.loads(regular(Path(file)).read_bytes(), object_pairs_hook=list)
    except OSError as error:
        raise UserError(
            f"cannot read model.class_map={file} ({error.strerror}): give {FRESH}, {SAME}, or a JSON file {{class here: condition there}}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"model.class_map={file} is not JSON ({error}): write {{class here: condition there, or null}}"
        ) from error
    if not isinstance(entries, list) or not all(isinstance(entry, tuple) for entry in entries):
        raise UserError(f"model.class_map={file} is no JSON object: write {{class here: condition there, or null}}")
    return entries


def sources_of(file: str, entries: Sequence[tuple[str, Any]], names: Sequence[str], conditions: int) -> list[int | None]:
    """The condition there of every class here. A key is a class name or, where no class has that name, an index."""
    index = {str(c): c for c in range(len(names))} | {name: c for c, name in enumerate(names)}
    sources: dict[int, int | None] = {}
    for key, there in entries:
        if key not in index:
            close = difflib.get_close_matches(key, names, n=1) or list(names[:10])
            raise UserError(
                f"model.class_map={file}: {key!r} is no class of the data: give one of its names, like {', '.join(close)}"
            )
        if index[key] in sources:
            raise UserError(f"model.class_map={file} has two entries for class {names[index[key]]}: leave one")
        if there is not None and (type(there) is not int or not 0 <= there < conditions):
            raise UserError(
                f"model.class_map={file}: {json.dumps(there)} for {key!r} is no condition of the weights: "
                f"give 0..{conditions - 1}, or null for a fresh one"
            )
        sources[index[key]] = there
    missing = [name for c, name in enumerate(names) if c not in sources]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.class_map={file} has no entry for {', '.join(missing[:3])}{more}: give a condition of the weights, or null"
        )
    return [sources[c] for c in range(len(names))]
