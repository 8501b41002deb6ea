"""The errors of a configuration, in one line."""

import difflib
import json
from typing import Any

from pydantic import ValidationError

from mclr.configs.schema.config import allowed, entry_of, settings_of
from mclr.errors import UserError
from mclr.models.registry import NETWORKS, Network


def user_error(messages: list[str]) -> UserError:
    """An error with the first message and the number of others."""
    return UserError(messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))


def invalid(error: ValidationError, network: Network, section: tuple[str, ...] = ()) -> UserError:
    """pydantic's error as a UserError. section: the section that was validated, () for a whole configuration."""
    # A default that depends on an invalid key is not an error of its own. A misspelt key may also be missing: tell the spelling first.
    errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    errors.sort(key=lambda each: each["type"] != "extra_forbidden")
    return user_error([_message(each, (*section, *each["loc"]), settings_of(network)) for each in errors])


def _message(error: Any, place: tuple[str | int, ...], settings: dict[str, dict[str, Any]]) -> str:
    kind, value = error["type"], json.dumps(error["input"], default=str)
    # numbers are places of entries in a list
    key, entries = ".".join(part for part in place if isinstance(part, str)), [part for part in place if isinstance(part, int)]
    if kind == "extra_forbidden":
        return _unknown_key(key, settings)
    schema, inner = settings[key], _keys_of(key, settings)
    if kind == "missing" and inner:
        return f"missing section {key}; it holds {inner[0]} and more"
    if kind == "missing" and not entries:
        return f"missing key {key}; set it in a preset or with {key}=..."
    if inner:
        return f"{key}={value}: {key} is a section; set one of its keys, like {inner[0]}=..."
    if entries and kind != "missing":
        key, schema = f"{key}[{entries[0]}]", entry_of(schema)
    return f"{key}={value}: expected {'a finite number' if kind == 'finite_number' else allowed(schema)}"


def _unknown_key(key: str, settings: dict[str, dict[str, Any]]) -> str:
    """Suggest the same name in another section (the one with the fewest levels), else a similar name in this section."""
    section, _, name = key.rpartition(".")
    kinds = {kind: network for kind, network in NETWORKS.items() if network.paradigm and key in settings_of(network)}
    if kinds:
        paradigms = sorted({str(network.paradigm) for network in kinds.values()})
        which = f"networks of kind {' or '.join(kinds)}" if key.startswith("model.net.") else f"{' and '.join(paradigms)} models"
        return f"unknown key {key}; only {which} have it"
    siblings = {other.rpartition(".")[2]: other for other in _keys_of(section, settings)}
    close = sorted((other for other in settings if other.rpartition(".")[2] == name), key=lambda other: other.count("."))
    close = close or [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    known = f"known in {section}" if section else "known"
    return f"unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"{known}: {', '.join(siblings)}")


def _keys_of(section: str, settings: dict[str, dict[str, Any]]) -> list[str]:
    return [key for key in settings if key.rpartition(".")[0] == section]
