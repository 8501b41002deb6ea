"""From presets, YAML files, dataset folders and overrides to one RunConfig, and back from the file that holds it."""

import difflib
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mclr.combinations import CONTRASTS
from mclr.configs.schema.checks import conflicts
from mclr.configs.schema.config import RunConfig, config_class
from mclr.configs.schema.data import Data, Images
from mclr.configs.schema.dataset import read_dataset
from mclr.configs.schema.messages import invalid, user_error
from mclr.configs.schema.model import kind_of_model
from mclr.configs.schema.strict_yaml import MOST_LEVELS, Dumper, parse_yaml
from mclr.errors import UserError
from mclr.models.registry import NETWORKS

PRESETS = Path(__file__).parent.parent
ENDINGS = (".yaml", ".yml")
FILE = "config.yaml"  # of a resolved config in its run folder


def load(model: str, objective: str, data: str, engine: str, overrides: list[str]) -> RunConfig:
    """The config of a run. Each of the first four is the name of a preset or the path of a YAML file; data may also be a dataset folder.

    overrides: "section.key=value", the value in YAML. Raises UserError for unknown keys, wrong types, values out of range, and settings
    that do not go together.
    """
    merged: dict[str, Any] = {}
    for kind, name in (("engine", engine), ("data", data), ("model", model), ("objective", objective)):
        merge(merged, read_preset(kind, name))
    patches = [parse_override(override) for override in overrides]
    for patch in patches:
        merge(merged, patch)
    # a dial takes the place of the lam that presets set
    if value_at(merged, "model.strength.max") and not any(value_at(patch, "objective.lam") is not None for patch in patches):
        merge(merged, {"objective": {"lam": None}})
    return from_dict(merged)


def value_at(sections: Any, key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    for name in key.split("."):
        sections = sections.get(name) if isinstance(sections, dict) else None
    return sections


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


def merge(base: dict[str, Any], patch: dict[str, Any]) -> None:
    """Put the patch over the base, key by key, in place."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def parse_override(override: str) -> dict[str, Any]:
    """`train.lr=1e-3` -> {"train": {"lr": 0.001}}."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.count(".") > MOST_LEVELS:
        raise UserError(f"override {override!r} is not of the form section.key=value, like train.lr=0.001")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it or check its brackets") from None
    if isinstance(value, dict):
        raise UserError(
            f"override {override!r} sets a whole section; set its keys one by one, like train.lr=0.001 train.batch=64"
        )
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def read_preset(kind: str, name: str) -> dict[str, Any]:
    """The sections of a preset in configs/<kind>, of a YAML file, or (data) of a prepared folder, merged over those of its base.

    base: a preset, a recipe, or a YAML file, whose path is relative to the file that names it.
    """
    presets, recipes = (
        {path.stem: path for path in sorted((PRESETS / folder).glob("*.yaml"), key=attrgetter("stem"))}
        for folder in (kind, f"{kind}/recipes")
    )
    file = Path(name) if name.endswith(ENDINGS) else presets.get(name)
    if file is None and kind == "data" and Path(name).is_dir():
        return {"data": read_dataset(Path(name)).model_dump(mode="json", include={*Images.model_fields, "path"})}
    if file is None:
        close = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        other = "a folder made by `mclr prepare`" if kind == "data" else "the path of a YAML file"
        raise UserError(f"unknown {kind} {name}{hint} (known: {', '.join(presets)}; or {other})")
    sections = read_yaml(file)
    if "base" not in sections:
        return sections
    base, known = str(sections.pop("base")), recipes | presets
    found = file.parent / base if base.endswith(ENDINGS) else known.get(base)
    if found is None:
        raise UserError(f"{file}: unknown base {base} (known: {', '.join(known)}; or the path of a YAML file)")
    merged = read_yaml(found)
    if "base" in merged:
        raise UserError(f"{file}: its base {base} has a base of its own, {merged['base']}; name that one, and set the rest here")
    merge(merged, sections)
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises UserError with the place of the fault."""
    try:
        # reading a pipe would wait, and a device may have no end
        if path.exists() and not path.is_file():
            raise UserError(f"cannot read {path}: it is no regular file")
        sections = parse_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(sections, dict):
        raise UserError(f"{path}: expected sections ({', '.join(RunConfig.model_fields)}), each with its keys")
    return sections
