"""Weights folders: model.safetensors, config.json (kind and options of the network, notes) and README.md: written, found and loaded."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import mclr.models
from mclr.configs import schema
from mclr.errors import UserError
from mclr.models.conditions import Sources, map_conditions
from mclr.models.convert import misfits
from mclr.models.options import TRAINING, hints_of
from mclr.models.registry import NETWORKS, kind_of
from mclr.train.system import files
from mclr.train.system.files import checksum, ignore, new_folder, regular, write_json, write_tensors, write_text
from mclr.train.system.hub import SCHEME, fetch
from mclr.train.weights.model_card import card
from mclr.train.weights.published import read_published
from mclr.train.weights.state_dict import CHOICES, checksum_of, holds_weights

BUNDLED = Path(mclr.models.__file__).parent / "weights"
OWN = ("kind", "config", "parameters")  # entries of config.json that describe the network; all others are notes
# settings that name weights
WEIGHTS = ("model.weights", "model.tokenizer", "model.posterior.weights", "objective.guide.weights", "sample.guide.weights")
MOST = 3  # differences that an error names
DIAL = "dial."  # how entries of a dial begin (models/dial.py)
IMAGES = "give data of their images by --data (in Python, data=)"
TOKENS = "give the tokenizer that they were trained with, model.tokenizer=WEIGHTS"
# options that the preset does not set -> what to do when they differ
WAYS_OUT = {
    "num_classes": "give the data they were trained on, or start from them with model.class_map=fresh, or with a JSON file "
    "{class here: condition there, or null}",
    "img_resolution": IMAGES,
    "img_channels": IMAGES,
    "patch_nums": TOKENS,
    "vocab_size": TOKENS,
    "z_channels": TOKENS,
    "sigma_data": "give theirs, model.sigma_data=",
    "strength_max": "give their dial, model.strength.max=; of a VAR or DiT `mclr convert --strength` folds it",
}


def save_weights(
    folder: str | Path,
    net: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    half: bool = False,
    replace: bool = False,
    beat: Callable[[], None] = ignore,
    **notes: Any,
) -> None:
    """Write a weights folder, whole or not at all. weights: take the place of the network's parameters (an average, masters).

    half: store fp16. replace: overwrite the folder. beat: called for every chunk written. notes: what made the weights (command, seed,
    images seen), for config.json and README.md. Raises UserError when it cannot be written.
    """
    tensors = dict(net.state_dict()) | dict(weights or {})
    dtype = torch.float16 if half else torch.float32
    description = describe(net, tensors, notes)
    with new_folder(folder, replace) as temporary:
        write_tensors(temporary / "model.safetensors", {k: t.detach().to(dtype) for k, t in tensors.items()}, beat=beat)
        write_json(temporary / "config.json", description)
        write_text(temporary / "README.md", card(read_config(temporary)))


def describe(net: nn.Module, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. tensors: by name, whole; under ZeRO 3 those of the network are not."""
    config = dataclasses.asdict(net.config)  # type: ignore[call-overload]
    size = sum(tensors[name].numel() for name, _ in net.named_parameters())
    return {"kind": kind_of(net), "config": config, "parameters": size, **notes}


def find_weights(name: str) -> Path:
    """The weights folder of a bundled name, a folder, a run, a published file (converted once), or hf://ORG/REPO[/FILE][@REV] of either.

    Raises UserError when there is none, or when it cannot be fetched or converted.
    """
    found = fetch(name)
    for folder in (BUNDLED / name, found, found / "weights"):
        if is_ours(folder):
            return folder
    if found.is_file() or holds_weights(found):
        return converted(name)
    if (found / schema.FILE).is_file():
        raise UserError(f"run {name} has no weights yet: finish it, or give one of the folders in {found / 'checkpoints'}")
    bundled = sorted(f.name for f in BUNDLED.iterdir() if f.is_dir())
    if close := get_close_matches(name, bundled, 1):
        raise UserError(f"no weights at {name}; did you mean {close[0]}?")
    known = ", ".join(bundled)
    raise UserError(
        f"no weights at {name}: give a folder with config.json and model.safetensors, a published file, {SCHEME}ORG/REPO[/FILE], "
        f"or a bundled name ({known})"
    )


def converted(name: str) -> Path:
    """The weights folder of a published file, made on first use in the user's cache, where the checksum of the file names it.

    Safe with several processes at once. Raises UserError as convert_published does.
    """
    file = fetch(name)
    cache = files.cache_folder()
    folder = cache / f"{file.stem}-{checksum_of(file)[:16]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        held, _ = files.lock(cache / "lock", wait=True, none=True)
    except OSError as error:
        raise UserError(f"cannot write {cache} ({error.strerror}): set XDG_CACHE_HOME to a folder with room to spare") from error
    with held:
        if not folder.is_dir():
            _, notes = convert_published(name, folder)
            # stdout is for the answer of a program
            print(f"{name}: converted once, into {folder}", file=sys.stderr)
            for what in CHOICES & notes.keys():
                print(f"{name}: {what}: {notes[what]}", file=sys.stderr)
    return folder


def is_ours(folder: Path) -> bool:
    """Whether config.json describes a network of ours, or is damaged; that of another library has no kind."""
    try:
        return "kind" in json.loads(regular(folder / "config.json").read_bytes())
    except OSError:
        return False
    except (ValueError, TypeError, RecursionError):
        # read_config reports the damage
        return True


def convert_published(
    name: str,
    folder: Path,
    settings: Sequence[str] = (),
    replace: bool = False,
    weights_key: str | None = None,
    ignore_extra: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Published file, also hf://ORG/REPO/FILE -> weights folder, in fp16 where that loses nothing; (network, what the file says beside it).

    The arguments after replace are those of read_published.
    Raises UserError, with nothing written, for a file that is no whole known network.
    """
    file = fetch(name)
    net, notes = read_published(file, settings, weights_key, ignore_extra)
    base = name if name.startswith(SCHEME) else file.name
    options = [*(["--weights-key", weights_key] if weights_key is not None else []), *["--ignore-extra"] * ignore_extra]
    made_by = shlex.join(["mclr", "convert", name, str(folder), *settings, *options])
    half = all(torch.equal(t.half().float(), t) for t in net.state_dict().values())
    save_weights(folder, net, half=half, replace=replace, made_by=made_by, base=base, **notes)
    return net, notes


def notes_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """The notes in config.json: everything but the network."""
    return {key: value for key, value in description.items() if key not in OWN}


def inherited(name: str | None) -> dict[str, Any]:
    """The notes that weights trained from `name` keep: licence and base."""
    if name is None:
        return {}
    description = ({"base": name} if name.startswith(SCHEME) else {}) | read_config(find_weights(name))
    return {key: description[key] for key in ("licence", "base") if key in description}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a weights folder; lists in its options are tuples. Raises UserError when it cannot be read."""
    try:
        described = json.loads(regular(folder / "config.json").read_bytes())
        if described["kind"] not in NETWORKS:
            raise ValueError(f"unknown kind {described['kind']}")
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in described["config"].items()}
        return described | {"config": options}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not the description of a network ({error}): choose other weights"
        ) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors of a weights folder, as it is stored. Raises UserError when it is missing or damaged."""
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read ({error}): copy the folder again") from error


def sha256(weights: Path) -> str:
    """Checksum of the tensors of a weights folder, which identifies weights wherever they are."""
    return checksum(weights / "model.safetensors")


def named_weights(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of WEIGHTS that are given. settings: dotted key -> value, as configs.schema.flatten makes them."""
    return {key: settings[key] for key in WEIGHTS if settings.get(key)}


def presets_of(description: Mapping[str, Any]) -> list[str]:
    """The names of the model presets whose networks have these options."""
    found, network, options = [], NETWORKS[description["kind"]], description["config"]
    for path in sorted((schema.PRESETS / "model").glob("*.yaml")):
        model = schema.read_preset("model", path.stem)["model"]
        if schema.kind_of_model(model) != description["kind"]:
            continue
        preset = schema.net_section(network).model_validate(model["net"]).model_dump()
        same = all(options.get(key) == value for key, value in preset.items() if key not in TRAINING)
        if same and (options.get("img_channels") == 4) == bool(model.get("vae")):
            found.append(path.stem)
    return found


def images_of(net: Mapping[str, Any], preset: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """num_classes, resolution and channels of the images that a network with these options makes."""
    if "img_resolution" in net:
        factor, channels = (schema.VAE_FACTOR, 3) if preset.get("vae") else (1, net["img_channels"])
        return {"num_classes": net["num_classes"], "resolution": net["img_resolution"] * factor, "channels": channels}
    given = [text.partition("=")[2] for text in settings if text.startswith("model.tokenizer=")]
    tokens = read_config(find_weights((given or [preset["tokenizer"]])[-1]))["config"]
    resolution = tokens["scales"][-1] << (len(tokens["ch_mult"]) - 1)
    return {"num_classes": net["num_classes"], "resolution": resolution, "channels": tokens["img_channels"]}


def load_net(name: str, *kinds: str) -> nn.Module:
    """The network of a weights folder (or bundled name), in evaluation mode. kinds: those that are expected, keys of NETWORKS.

    Raises UserError for weights of another kind, damaged ones and those that do not fit their own config.json.
    """
    folder = find_weights(name)
    described = read_config(folder)
    kind = described["kind"]
    if kinds and kind not in kinds:
        raise UserError(f"weights {name} hold a network of kind {kind}, not {' or '.join(kinds)}: choose other weights")
    config_class, net_class = NETWORKS[kind].config, NETWORKS[kind].net
    try:
        hints, config = hints_of(config_class), config_class(**described["config"])
        for key, value in described["config"].items():
            if not schema.fits(value, hints[key]):
                raise ValueError(f"{key} {value!r:.40}")
        tensors = read_tensors(folder)
        # first without memory: options may ask for any size
        with torch.device("meta"):
            _refuse_others(net_class(config).state_dict(), tensors, folder)
        net = net_class(config)
        net.load_state_dict(tensors)
    except UserError:
        raise
    # a network of impossible options raises nearly anything
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} does not describe a {kind} ({error}): choose other weights") from error
    return net.eval()


def load_into(net: nn.Module, folder: Path, sources: Sources | None = None) -> None:
    """Copy a weights folder into a network. Raises UserError, with the first differences, where they do not fit.

    sources: for each condition of the network that of the weights (models/conditions.py); None: the conditions are the same. A dial
    that the weights do not have stays as it is, 0 everywhere.
    """
    refuse_misfit(net, folder, any_conditions=sources is not None)
    tensors, state = read_tensors(folder), net.state_dict()
    if not any(name.startswith(DIAL) for name in tensors):
        tensors |= {name: own for name, own in state.items() if name.startswith(DIAL)}
    if sources is not None:
        tensors = map_conditions(net, tensors, sources)
    _refuse_others(state, tensors, folder)
    net.load_state_dict(tensors)


def _refuse_others(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], folder: Path) -> None:
    if wrong := misfits(ours, theirs):
        raise UserError(f"weights {folder} do not fit the network: {wrong}; choose other weights")


def refuse_misfit(net: nn.Module, folder: Path, any_conditions: bool) -> None:
    """Raises UserError for weights of another kind, or with other options, than the network. any_conditions: num_classes may differ."""
    described, own = read_config(folder), dataclasses.asdict(net.config)  # type: ignore[call-overload]
    theirs = described["config"]
    checked = [key for key in own if not (key in TRAINING or (any_conditions and key == "num_classes"))]
    differing = [key for key in checked if theirs.get(key, own[key]) != own[key]]
    # any weights gain a dial, or another end of theirs
    if own.get("strength_max") and "strength_max" in differing:
        differing.remove("strength_max")
    size = [key for key in differing if key not in WAYS_OUT]
    what = "have " + "; ".join(f"{key} {theirs[key]}, this run has {own[key]}" for key in (size or differing)[:MOST])
    if other_kind := described["kind"] != kind_of(net):
        what = f"hold a network of kind {described['kind']}, not {kind_of(net)}"
    elif not differing:
        return
    way_out = "give fitting weights by --init" if size or other_kind else WAYS_OUT[differing[0]]
    if (size or other_kind) and (presets := presets_of(described)):
        way_out = f"these look like {' or '.join(presets)}, give --model {presets[0]} (in Python, model=)"
    raise UserError(f"weights {folder} {what}: {way_out}")
