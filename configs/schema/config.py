"""RunConfig: all settings of a run, as one object, as a flat table, and as JSON schemas in words."""

from collections.abc import Iterator
from functools import cache, reduce
from operator import getitem
from typing import Any

from pydantic import create_model

from mclr.configs.schema.data import Data
from mclr.configs.schema.engine import Engine
from mclr.configs.schema.model import MODELS, DiffusionModel, NextScaleModel, net_section
from mclr.configs.schema.objective import Objective
from mclr.configs.schema.sample import Sample
from mclr.configs.schema.section import Section
from mclr.configs.schema.train import Train
from mclr.models.registry import NETWORKS, Network

TYPES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text", "null": "null"}
LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<=", "pattern": "of the form"}


class RunConfig(Section):
    """All settings of a run. load(), from_dict() and load_resolved() make it: they resolve settings that depend on others."""

    model: DiffusionModel | NextScaleModel
    data: Data
    objective: Objective
    train: Train
    engine: Engine = Engine()
    sample: Sample = Sample()


@cache
def config_class(network: Network) -> type[RunConfig]:
    """RunConfig for one kind of network, whose options model.net holds."""
    model = create_model("Model", __base__=MODELS[str(network.paradigm)], net=(net_section(network), ...))
    return create_model("RunConfig", __base__=RunConfig, model=(model, ...))


@cache
def settings_of(network: Network) -> dict[str, dict[str, Any]]:
    """Dotted key -> JSON schema, of all settings and sections ($ref) that this kind of network allows."""
    whole = config_class(network).model_json_schema()

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, schema in section["properties"].items():
            yield prefix + name, schema | {"required": name in section.get("required", ())}
            if "$ref" in schema:
                yield from walk(whole["$defs"][schema["$ref"].rpartition("/")[2]], f"{prefix}{name}.")

    return dict(walk(whole, ""))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, tuples as lists: for logs, and to compare two runs."""
    values, settings = config.model_dump(mode="json"), settings_of(NETWORKS[config.model.kind])
    return {key: reduce(getitem, key.split("."), values) for key, schema in settings.items() if "$ref" not in schema}


def allowed(schema: dict[str, Any]) -> str:
    """The values of a setting in words: `an integer > 0 or null`, `one of fp32, bf16`."""
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema["type"] == "array":
        low, high = schema["minItems"], schema["maxItems"]
        return f"a list of {low if low == high else f'{low} to {high}'} entries, each {allowed(entry_of(schema))}"
    limits = " and ".join(f"{sign} {schema[name]}" for name, sign in LIMITS.items() if name in schema)
    return f"{TYPES[schema['type']]} {limits}".rstrip()


def entry_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the entries of a list; they are all alike."""
    return schema.get("items") or schema["prefixItems"][0]
