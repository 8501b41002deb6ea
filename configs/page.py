"""Writes the tables of configs/README.md from the schema: `make settings`."""

import json
from typing import Any

from mclr.configs.schema import PRESETS
from mclr.configs.schema.config import allowed, settings_of
from mclr.models.registry import NETWORKS

PAGE = PRESETS / "README.md"
WITHIN = (".strength", ".guide")  # small sections, whose settings stand in the table of the section around them
MARK = "<!-- `make settings` writes what follows -->\n"


def page() -> str:
    """The text of configs/README.md: as it is down to MARK, then all settings."""
    text, mark, _ = PAGE.read_text().partition(MARK)
    every = {kind: settings_of(network) for kind, network in NETWORKS.items() if network.paradigm}
    sections = dict.fromkeys(key.rpartition(".")[0] for settings in every.values() for key in settings)
    tables = []
    for section in sections:
        if section == "model.net":
            tables += [table(f"{section} ({kind})", section, {kind: settings}) for kind, settings in every.items()]
        elif section == "objective.schedule":
            tables.append(table("objective.schedule, and the same settings of sample.schedule", section, every))
        elif section not in ("", "sample.schedule") and not section.endswith(WITHIN):
            tables.append(table(section, section, every))
    return "\n".join([text + mark, *tables])


def table(title: str, section: str, every: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of one section, without the sections in it. every: the settings of each kind of network."""
    lines = [f"### {title}", "| setting | value | default | meaning |", "| --- | --- | --- | --- |"]
    inside = {section, *(section + within for within in WITHIN)}
    for key in dict.fromkeys(key for settings in every.values() for key in settings if key.rpartition(".")[0] in inside):
        found = {kind: settings[key] for kind, settings in every.items() if key in settings}
        schema = next(iter(found.values()))
        if "$ref" not in schema:
            values = " or ".join(dict.fromkeys(map(allowed, found.values())))
            default = f"`{json.dumps(schema['default'])}`" if "default" in schema else "required" * schema["required"]
            paradigms = dict.fromkeys(str(NETWORKS[kind].paradigm) for kind in found)
            owner = "" if len(found) == len(every) else f"{' and '.join(paradigms)}: "
            lines.append(f"| `{key}` | {values} | {default} | {owner}{schema['description']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
