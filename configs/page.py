"""Makes configs/README.md from the schema: `make settings`."""

import json
from typing import Any

from mclr.configs.schema import PRESETS
from mclr.configs.schema.config import allowed, settings_of
from mclr.models.registry import NETWORKS

PAGE = PRESETS / "README.md"

TEXT = """# Presets and settings

`make settings` writes this page from the schema (configs/schema/). A run is made of four presets and of overrides:
```
mclr train --model edm2-digits --objective mclr --data digits --engine auto objective.lam=0.3
```
An override `section.key=value` sets one setting, and wins over the presets: `objective.lam=0.3` sets `lam` of the section
`objective` to 0.3. The value is YAML, so `null`, `true` and `[1, 2]` (in a shell `'train.betas=[0.9, 0.99]'`) are values too.

- `--model`, `--objective`, `--data` and `--engine` take the name of a preset or the path of a YAML file. The presets are the files in
  configs/model, configs/objective, configs/data and configs/engine. Each begins with its purpose and a command that starts it.
  `--data` also takes a folder made by `mclr prepare`.
- The last one wins, in this order: defaults, engine, data, model, objective, overrides. Presets are merged key by key, so a model
  preset may hold a recipe of its own (`train`, `sample`, `objective.lam`).
- `--init WEIGHTS` is short for `model.weights=WEIGHTS`; `--init none` is `model.weights=null`.

A run folder keeps all its settings in `config.yaml`: changed presets do not change an old run. `mclr sample RUN` reads that file.
The same command goes on with the run; settings that would change what it learns are refused.

## Dry run
`mclr train ... --dry-run` prints all settings as YAML, with `contrast: auto` resolved. Below them it prints parameters and weights,
the objective, lam at every noise level or scale (if it varies), data, engine, rows per step and length. It writes nothing.
Unknown keys, wrong values and settings that do not go together give one line that says what to do.

## A preset of your own
```yaml
# mine.yaml: start with `mclr train --model mine.yaml --data data/mine`
base: edm2-32px
model: {name: mine}
train: {images: 500000, lr: 0.003}
```
`base` names the preset, recipe (configs/model/recipes) or YAML file (beside this one) that the file changes. A base has no base of
its own. A preset may hold any section, and needs no key that its base or another preset gives. Keys are plain words, each given
once; YAML aliases are refused.

## Settings
A setting without default is required: presets give most of them. Where a meaning begins with a value or a kind of model, as in
`heun: ...` or `next_scale: ...`, the setting has an effect only there; most are refused elsewhere.
Progress is 0 at pure noise or the coarsest scale, and 1 at the data or the finest scale: (4.382 - ln sigma) / 10.597 for diffusion,
k / (K - 1) for scale k of K. `edm2` networks are diffusion models, `var` networks next_scale models.
"""


def page() -> str:
    """The text of configs/README.md."""
    every = {kind: settings_of(network) for kind, network in NETWORKS.items() if network.paradigm}
    sections = dict.fromkeys(key.rpartition(".")[0] for settings in every.values() for key in settings)
    tables = []
    for section in sections:
        if section == "model.net":
            tables += [table(f"{section} ({kind})", section, {kind: settings}) for kind, settings in every.items()]
        elif section == "objective.schedule":
            tables.append(table("objective.schedule, and the same settings of sample.schedule", section, every))
        elif section not in ("", "sample.schedule"):
            tables.append(table(section, section, every))
    return "\n".join([TEXT, *tables])


def table(title: str, section: str, every: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of one section, without the sections in it. every: the settings of each kind of network."""
    lines = [f"### {title}", "| setting | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in dict.fromkeys(key for settings in every.values() for key in settings if key.rpartition(".")[0] == section):
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
