"""What is wrong with a configuration, in one line."""

import difflib
import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mclr.configs.schema.config import RunConfig
from mclr.configs.schema.model import MODELS, DiffusionModel
from mclr.configs.schema.section import Section
from mclr.errors import UserError


def user_error(messages: list[str]) -> UserError:
    more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    return UserError(messages[0] + more)


def fields_of(paradigm: str | None) -> dict[str, FieldInfo]:
    """Dotted key -> field of everything that may be set for this paradigm, sections included."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            yield prefix + name, field
            inner = MODELS.get(str(paradigm), DiffusionModel) if prefix + name == "model" else field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from walk(inner, f"{prefix}{name}.")

    return dict(walk(RunConfig, ""))


EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "more entries",
    "too_long": "fewer entries",
}


def message_of(error: Any, fields: dict[str, FieldInfo]) -> str:
    """One line of ours for one error of pydantic's."""
    # pydantic names the member of the union after `model`; an entry of a list is a number
    names = [part for i, part in enumerate(error["loc"]) if not (i == 1 and error["loc"][0] == "model" and part in MODELS)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)[1:]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(key, fields)
    field, inner = fields[key.partition("[")[0]], _keys_of(key, fields)
    given = f"{key}={json.dumps(error['input'], default=str)}"
    if kind == "missing" and isinstance(names[-1], int):
        return f"{key.partition('[')[0]}={json.dumps(error['input'])}: expected more entries"
    if kind == "missing" and inner:
        return f"missing section {key}; it holds {inner[0]} and more"
    if kind == "missing":
        return f"missing key {key}; set it in a preset or with {key}=..."
    if kind == "union_tag_not_found":
        return f"missing key {key}.paradigm; expected {' or '.join(MODELS)}"
    if kind == "union_tag_invalid":
        return f"{key}.paradigm={json.dumps(error['input']['paradigm'], default=str)}: expected {' or '.join(MODELS)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{given}: {key} is a section; set one of its keys, like {inner[0]}=..."
    if kind == "value_error":
        return f"{key}.{context['error']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{given} is out of range: must be {_range(field)}"
    if kind == "literal_error":
        return f"{given}: expected {context['expected'].replace(chr(39), '')}"
    if kind in EXPECTED:
        return f"{given}: expected {EXPECTED[kind]}" + (" or null" if type(None) in get_args(field.annotation) else "")
    return f"{given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown_key(key: str, fields: dict[str, FieldInfo]) -> str:
    """Suggests the same name in another section (the shallowest), else a similar name in this one."""
    section, _, name = key.rpartition(".")
    owner = next((paradigm for paradigm in MODELS if key in fields_of(paradigm)), None)
    if owner:
        return f"unknown key {key}; only {owner} models have it"
    siblings = {other.rpartition(".")[2]: other for other in _keys_of(section, fields)}
    known = f"known in {section}" if section else "known"
    close = sorted((other for other in fields if other.rpartition(".")[2] == name), key=lambda other: other.count("."))
    close = close or [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    return f"unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"{known}: {', '.join(siblings)}")


def _keys_of(section: str, fields: dict[str, FieldInfo]) -> list[str]:
    return [key for key in fields if key.rpartition(".")[0] == section]


def _range(field: FieldInfo) -> str:
    """The bounds of a field, or of the entries of its list, as in `>= 0 and < 1`."""

    def bounds(annotation: Any, metadata: Any) -> Iterator[str]:
        for limit in metadata:
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(limit, name):
                    yield f"{sign} {getattr(limit, name)}"
        for part in get_args(annotation):
            yield from bounds(part, part.metadata if isinstance(part, FieldInfo) else ())

    return " and ".join(dict.fromkeys(bounds(field.annotation, field.metadata)))
