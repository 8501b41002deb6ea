"""README.md of a weights folder, its model card: front matter for the Hugging Face hub, then the facts of config.json in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mclr.configs.schema import PRESETS, RunConfig
from mclr.errors import UserError
from mclr.models.registry import NETWORKS
from mclr.train.system.files import write_json, write_text

METRICS = ("loss", "value", "ratio", "posterior_ece", "mle_loss", "mle_loss_val")  # of training, for the card
FEW = 20  # class names that a card lists
LICENCES = {"CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0", "Apache-2.0": "apache-2.0"}  # words in a note -> the name on the hub
NO_LICENCE = "None is recorded: that of the data and of the weights it was trained from."


def run_notes(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that its weights keep as notes."""
    model = config.model
    notes: dict[str, Any] = {"model": model.name, "objective": config.objective.model_dump(mode="json", exclude_defaults=True)}
    if model.paradigm == "next_scale":
        notes["tokenizer"] = model.tokenizer
    return notes | {"ema_std": config.train.ema_std, "seed": config.train.seed, "data": config.data.name}


def card(description: Mapping[str, Any]) -> str:
    """The model card. description: config.json of the folder. Raises UserError where the notes are damaged."""
    names = {key: description.get(key, key.upper()) for key in ("model", "data", "tokenizer")}
    for key in ("model", "data"):
        # a name that is no preset was a file or folder, which may have moved
        names[key] = names[key] if (PRESETS / key / f"{names[key]}.yaml").exists() else key.upper()
    use = f"## Use\n```\n{NETWORKS[description['kind']].use.format(**names)}\n```"
    licence = f"## Licence\n{description.get('licence', NO_LICENCE)}"
    try:
        about = [_front_matter(description), f"# {_title(description)}", _network(description), *_training(description)]
        scores = [_scores(result) for result in description.get("evaluations", {}).values()]
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"the notes of these weights (config.json) are damaged ({error}): choose other weights") from error
    return "\n\n".join([*about, *scores, use, licence]) + "\n"


def add_scores(folder: Path, result: Mapping[str, Any]) -> None:
    """Add scores to config.json and README.md of a weights folder. result: of `mclr evaluate`; the newest of each judge is kept."""
    description = json.loads((folder / "config.json").read_text())
    description["evaluations"] = description.get("evaluations", {}) | {result["judge"]["name"]: result}
    write_json(folder / "config.json", description)
    write_text(folder / "README.md", card(description))


def _front_matter(description: Mapping[str, Any]) -> str:
    licence = description.get("licence") or ""
    name = next((name for words, name in LICENCES.items() if words in licence), "other" if licence else "unknown")
    lines = [f"license: {name}", "library_name: mclr", f"tags: [mclr, {description['kind']}, image-generation]"]
    # the repository of the hub that the weights, or their base, came from
    places = [str(description.get(key)) for key in ("init", "base")]
    repositories = ["/".join(place[5:].split("@")[0].split("/")[:2]) for place in places if place.startswith("hf://")]
    lines += [f"base_model: {repository}" for repository in repositories[:1]]
    return "\n".join(["---", *lines, "---"])


def _title(description: Mapping[str, Any]) -> str:
    objective = description.get("objective", {}).get("name")
    names = (description.get("model", description["kind"]), objective, description.get("data"))
    return "-".join(str(name) for name in names if name)


def _network(description: Mapping[str, Any]) -> str:
    config = description["config"]
    size = f", {description['parameters'] / 1e6:.2f}M parameters" if "parameters" in description else ""
    conditions = f", {config['num_classes']} conditions" if "num_classes" in config else ""
    return f"{NETWORKS[description['kind']].about}{size}{conditions}: {_settings(config)}."


def _training(description: Mapping[str, Any]) -> list[str]:
    facts = {
        "objective": _settings(description.get("objective", {})),
        "dial": f"strengths 0 to {dial:g}, as sample.strength" if (dial := description["config"].get("strength_max")) else "",
        "folded at strength": f"{description['strength']:g}" if "strength" in description else "",
        "data": _data(description),
        "images seen": f"{description['images_seen']:,}" if "images_seen" in description else "",
        "average of the weights": f"of relative width {description['ema_std']}" if description.get("ema_std") else "",
        "started from": description.get("init") or "",
        "base": description.get("base", ""),
        "result": description.get("result", ""),
        "last metrics": _settings({k: v for k, v in description.get("metrics", {}).items() if k in METRICS and v is not None}),
        "command": f"`{command}`" if (command := description.get("command") or description.get("made_by")) else "",
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items() if fact]
    return ["## Training\n" + "\n".join(lines)] if lines else []


def _settings(settings: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return _settings(value)
        return f"{value:.4g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)

    return ", ".join(f"{key} {text(value)}" for key, value in settings.items())


def _data(description: Mapping[str, Any]) -> str:
    classes, images = description.get("classes", ()), description.get("data_images")
    listed = ", ".join(map(str, classes[:FEW])) + (", ..." if len(classes) > FEW else "")
    facts = [f"{images:,} images" if images else "", f"{len(classes)} classes ({listed})" if classes else ""]
    return ", ".join(fact for fact in (description.get("data"), *facts) if fact)


def _scores(result: Mapping[str, Any]) -> str:
    """The section of one judge. result: of `mclr evaluate`."""
    icr = {name: value for name, value in result.get("icr", {}).items() if name.startswith("icr")}
    rows = [f"| {name} | {value:.4g} |" for name, value in (result["scores"] | icr).items()]
    samples, real, judge = result["samples"], result["real"], result["judge"]
    made = samples["made"] or {}
    how_far = f"guidance weight {made.get('sample.gamma', 'unknown')}"
    if made.get("sample.strength"):
        how_far += f", strength {made['sample.strength']}"
    number, splits = format(real["count"], ",") if real["count"] else "unknown number of", " and ".join(real["splits"] or ())
    parts = len(result.get("ranges", ())) or 1
    each = f"mean over {parts} seed ranges of {samples['count'] // parts:,}" if parts > 1 else f"{samples['count']:,}"
    how = (
        f"{each} samples, {how_far}, against {number} images of {real['data']}{splits and f' ({splits})'}, "
        f"in the features of {judge['name']} (sha256 {judge['sha256'][:16]})."
    )
    notes = [f"- {note}" for note in result.get("notes", ())]
    heading = f"## Scores by {judge['name']}"
    return "\n".join([heading, how, "", "| score | value |", "| --- | ---: |", *rows, *([""] if notes else []), *notes])
