"""From presets and overrides to one RunConfig, and back from the files that hold it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mclr.combinations import CONTRASTS
from mclr.configs.schema.checks import conflicts
from mclr.configs.schema.config import RunConfig, config_class
from mclr.configs.schema.data import Data
from mclr.configs.schema.messages import invalid, user_error
from mclr.configs.schema.model import kind_of_model
from mclr.configs.schema.presets import merge, parse_override, read_preset, read_yaml
from mclr.configs.schema.strict_yaml import Dumper
from mclr.models.registry import NETWORKS

FILE = "config.yaml"  # of a resolved config in its run folder


def load(model: str, objective: str, data: str, engine: str, overrides: list[str]) -> RunConfig:
    """The config of a run. Each of the first four is the name of a preset or the path of a YAML file; data may also be a dataset folder.

    overrides: "section.key=value", the value in YAML. Raises UserError for unknown keys, wrong types, values out of range, and settings
    that do not go together.
    """
    merged: dict[str, Any] = {}
    for kind, name in (("engine", engine), ("data", data), ("model", model), ("objective", objective)):
        merge(merged, read_preset(kind, name))
    for override in overrides:
        merge(merged, parse_override(override))
    return from_dict(merged)


def from_dict(sections: dict[str, Any]) -> RunConfig:
    """A validated config. For mclr the contrast `auto` becomes posterior (diffusion) or null (next_scale)."""
    network = NETWORKS[kind_of_model(sections.get("model"))]
    try:
        config: RunConfig = config_class(network).model_validate(sections)
    except ValidationError as error:
        raise invalid(error, network) from None
    if config.objective.contrast == "auto":
        tokens = config.objective.name == "mclr" and config.model.paradigm == "next_scale"
        contrast = "null" if tokens else CONTRASTS[config.objective.name][0]
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"contrast": contrast})})
    if found := conflicts(config):
        raise user_error(found)
    return config


def load_resolved(path: str | Path) -> RunConfig:
    """The config that dump() wrote. path: the file, or the run folder that holds it."""
    path = Path(path)
    return from_dict(read_yaml(path / FILE if path.is_dir() else path))


def dump(config: RunConfig) -> str:
    """The whole config as YAML: load_resolved() gives it back even if presets have changed."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


def load_data(name: str) -> Data:
    """The data section alone. name: the argument `data` of load(). Raises UserError as load() does."""
    try:
        return Data.model_validate(read_preset("data", name).get("data", {}))
    except ValidationError as error:
        raise invalid(error, NETWORKS["edm2"], ("data",)) from None
