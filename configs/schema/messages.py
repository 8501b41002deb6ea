"""The errors of a configuration, in one line."""

import difflib
import json
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mclr.configs.schema.config import fields_of, range_of, type_of
from mclr.errors import UserError
from mclr.models.registry import NETWORKS

RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
LENGTHS = {"missing": "more entries", "too_short": "more entries", "too_long": "fewer entries"}


def user_error(messages: list[str]) -> UserError:
    """An error with the first message and the number of others."""
    return UserError(messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))


def invalid(error: ValidationError, kind: str, section: tuple[str, ...] = ()) -> UserError:
    """pydantic's error as a UserError. section: the section that was validated, () for a whole configuration."""
    # A default that depends on an invalid key is not an error of its own. A misspelt key may also be missing: tell the spelling first.
    errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    errors.sort(key=lambda each: each["type"] != "extra_forbidden")
    fields = fields_of(kind)
    return user_error([_message(each, (*section, *each["loc"]), fields) for each in errors])


def _message(error: Any, place: tuple[str | int, ...], fields: dict[str, FieldInfo]) -> str:
    # a number is the place of an entry in a list
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(key, fields)
    outer, entry, _ = key.partition("[")
    field, inner = fields[outer], _keys_of(outer, fields)
    given = f"{key}={json.dumps(value, default=str)}"
    if kind == "missing" and not entry and inner:
        return f"missing section {key}; it holds {inner[0]} and more"
    if kind == "missing" and not entry:
        return f"missing key {key}; set it in a preset or with {key}=..."
    if kind in LENGTHS:
        return f"{outer}={json.dumps(value, default=str)}: expected {LENGTHS[kind]}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{given}: {key} is a section; set one of its keys, like {inner[0]}=..."
    if kind in RANGES:
        return f"{given} is out of range: must be {range_of(field)}"
    if kind.endswith("_type") or kind == "literal_error":
        return f"{given}: expected {type_of(get_args(field.annotation)[0] if entry else field.annotation)}"
    return f"{given}: {error['msg'].replace('Input should be', 'expected')}"


def _unknown_key(key: str, fields: dict[str, FieldInfo]) -> str:
    """Suggest the same name in another section (the one with the fewest levels), else a similar name in this section."""
    section, _, name = key.rpartition(".")
    owner = next((kind for kind, network in NETWORKS.items() if network.paradigm and key in fields_of(kind)), None)
    if owner:
        which = f"networks of kind {owner}" if key.startswith("model.net.") else f"{NETWORKS[owner].paradigm} models"
        return f"unknown key {key}; only {which} have it"
    siblings = {other.rpartition(".")[2]: other for other in _keys_of(section, fields)}
    close = sorted((other for other in fields if other.rpartition(".")[2] == name), key=lambda other: other.count("."))
    close = close or [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    known = f"known in {section}" if section else "known"
    return f"unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"{known}: {', '.join(siblings)}")


def _keys_of(section: str, fields: dict[str, FieldInfo]) -> list[str]:
    return [key for key in fields if key.rpartition(".")[0] == section]
