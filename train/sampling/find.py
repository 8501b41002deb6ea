"""Which generator a name means: its settings and its weights folder, and what decides the images that it draws."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mclr.configs.schema import FILE, PRESETS, DiffusionModel, NextScaleModel, RunConfig, kind_of_model, read_preset
from mclr.configs.schema import load as load_config
from mclr.errors import UserError
from mclr.train.data.encoders import ROUNDING, VAE_WEIGHTS, find_vae
from mclr.train.system.files import checksum
from mclr.train.weights.folder import find_weights, images_of, presets_of, read_config, sha256


def find_generator(source: str, model: str | None, data: str | None, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """(config, weights folder) of a run folder, or of weights with their presets. Raises UserError when there is neither."""
    settings = Path(source) / FILE
    if settings.is_file():
        if model or data:
            raise UserError(
                f"{source} is a run with a model and data of its own: leave out --model and --data (in Python, model=, data=)"
            )
        if not (Path(source) / "weights").is_dir():
            raise UserError(f"run {source} has no weights: it has not finished; repeat its `mclr train` command, which goes on")
        resolved = str(settings)  # in place of all four presets, so that overrides go on top
        return load_config(resolved, resolved, resolved, resolved, list(overrides)), Path(source) / "weights"
    weights = find_weights(source)
    description = read_config(weights)
    chosen = model or preset_of(source, description)
    if data is None:
        overrides = [*data_of(description, chosen, overrides), *overrides]
    objective = "mle"
    if dial := description["config"].get("strength_max"):
        objective, overrides = "mclr", [f"model.strength.max={dial}", *overrides]
    # The objective says nothing about sampling.
    return load_config(chosen, objective, data or "digits", "auto", list(overrides)), weights


def preset_of(source: str, description: Mapping[str, Any]) -> str:
    """The model preset of weights: of their name, the one they record, or the only one of their size. Raises UserError for none."""
    named = [str(name) for name in (source, description.get("model")) if (PRESETS / "model" / f"{name}.yaml").is_file()]
    presets = named[:1] or presets_of(description)
    if len(presets) == 1:
        return presets[0]
    fitting = f" ({' or '.join(presets)}, by their size)" if presets else ""
    raise UserError(
        f"no preset is named like the weights {source}: say by --model (in Python, model=) which one they belong to{fitting}"
    )


def data_of(description: Mapping[str, Any], model: str, settings: Sequence[str]) -> list[str]:
    """The settings of data.* that differ from the digits: images as these weights make them, under the name that the weights record.

    Empty where weights and preset do not go together, or one of them is damaged: loading says which.
    """
    preset = read_preset("model", model).get("model", {})
    if kind_of_model(preset) != description["kind"]:
        return []
    digits = read_preset("data", "digits")["data"]
    try:
        found = images_of(description["config"], preset, settings)
    except (LookupError, TypeError, ValueError, AttributeError):
        return []
    differing = {key: value for key, value in found.items() if digits[key] != value}
    if name := description.get("data") or (differing and "unknown"):
        # A name is that of a dataset, whose folder is data/NAME unless somebody chose another: it is opened by `mclr evaluate` alone.
        differing |= {"name": str(name), "path": f"data/{name}"}
    return [f"data.{key}={json.dumps(value)}" for key, value in differing.items()]


def record_of(config: RunConfig, weights: Path) -> dict[str, Any]:
    """What sample.json says of a generator before it draws. settings: all that decides the image of a seed and a condition."""
    model, chosen = config.model, config.sample.guide
    guide = chosen.weights and find_weights(chosen.weights)
    tokenizer = sha256(find_weights(model.tokenizer)) if isinstance(model, NextScaleModel) else None
    vae = checksum(find_vae(model.vae) / VAE_WEIGHTS) if isinstance(model, DiffusionModel) and model.vae else None
    return {
        "settings": {
            "weights": sha256(weights),
            "tokenizer": tokenizer,
            "vae": vae,
            **{f"sample.{key}": value for key, value in config.sample.model_dump(mode="json").items()},
            "sample.guide": guide and sha256(guide) + " under null" * (chosen.condition == "null"),
            "precision": config.engine.precision,
            "rounding": ROUNDING,
        },
        "model": model.name,
        "from": str(weights),
        "guide": guide and str(guide),
        "data": {"name": config.data.name, "path": config.data.path},
        "forwards_per_image": None,
    }
