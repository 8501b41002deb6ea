"""RunConfig: all settings of a run; the settings as flat tables; type and range of a setting in words."""

import json
from collections.abc import Iterator
from functools import cache, reduce
from operator import getitem
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import create_model
from pydantic.fields import FieldInfo

from mclr.configs.schema.data import Data
from mclr.configs.schema.engine import Engine
from mclr.configs.schema.model import MODELS, DiffusionModel, NextScaleModel, net_section
from mclr.configs.schema.objective import Objective
from mclr.configs.schema.sample import Sample
from mclr.configs.schema.section import Section
from mclr.configs.schema.train import Train
from mclr.errors import UserError
from mclr.models.registry import NETWORKS, Network, kinds_of

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


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


def kind_of_model(model: Any) -> str:
    """The kind of network that an unchecked model section names, or the default of its paradigm.

    Raises UserError for an unknown paradigm, or a kind that the paradigm does not have.
    """
    # other faults of the section are found when its settings are validated
    paradigm = model.get("paradigm") if isinstance(model, dict) else "diffusion"
    if paradigm not in list(MODELS):
        raise UserError(f"model.paradigm={json.dumps(paradigm, default=str)}: expected {' or '.join(MODELS)}")
    kind = MODELS[paradigm].model_fields["kind"].default
    kind, kinds = model.get("kind", kind) if isinstance(model, dict) else kind, kinds_of(paradigm)
    if kind not in kinds:
        raise UserError(f"model.kind={json.dumps(kind, default=str)}: expected {' or '.join(kinds)}")
    return kind


def fields_of(kind: str) -> dict[str, FieldInfo]:
    """Dotted key -> field, of all settings and sections that this kind of network allows."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            yield prefix + name, field
            if isinstance(inner := field.annotation, type) and issubclass(inner, Section):
                yield from walk(inner, f"{prefix}{name}.")

    return dict(walk(config_class(NETWORKS[kind]), ""))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, tuples as lists: for logs, and to compare two runs."""
    values = config.model_dump(mode="json")
    found = {key: reduce(getitem, key.split("."), values) for key in fields_of(config.model.kind)}
    return {key: value for key, value in found.items() if not isinstance(value, dict)}


def type_of(annotation: Any) -> str:
    """A type in words: `an integer or null`, `a list of 2 numbers`, `fp32 or bf16`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0])
    if origin is tuple:
        entry, count = type_of(parts[0]), "" if parts[-1] is ... else f"{len(parts)} "
        return f"a list of {count}" + (f"{entry.split()[-1]}s" if entry in WORDS.values() else entry)
    if not parts:
        return WORDS[annotation]
    words = [str(part) if origin is Literal else type_of(part) for part in parts]
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def range_of(field: FieldInfo) -> str:
    """The bounds of a field, or of the entries of its list, in words: `>= 0 and < 1`."""

    def bounds(annotation: Any, metadata: Any) -> Iterator[str]:
        for limit in metadata:
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if getattr(limit, name, None) is not None:
                    yield f"{sign} {getattr(limit, name)}"
        for part in get_args(annotation):
            yield from bounds(part, getattr(part, "metadata", (part,)))

    return " and ".join(dict.fromkeys(bounds(field.annotation, field.metadata)))
