"""Weights folders: model.safetensors beside config.json, which rebuilds the network; bundled ones go by name."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from mclr.errors import UserError
from models.edm2 import EDM2, EDM2Config
from models.features import ImageClassifier, ImageClassifierConfig, NoiseClassifier, NoiseClassifierConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig
from train.files import new_folder, write_json

KINDS: dict[str, tuple[type, type]] = {
    "edm2": (EDM2Config, EDM2),
    "var": (VARConfig, VAR),
    "vqvae": (VQVAEConfig, VQVAE),
    "image_classifier": (ImageClassifierConfig, ImageClassifier),
    "noise_classifier": (NoiseClassifierConfig, NoiseClassifier),
}
BUNDLED = Path(models.__file__).parent / "weights"


def save_weights(
    folder: str | Path, net: nn.Module, weights: Mapping[str, Tensor] | None = None, half: bool = False, **notes: Any
) -> None:
    """Write a weights folder, whole or not at all. weights: replace the network's own parameters (an average, masters).

    half: store fp16. notes: what made them (command, seed, images seen), kept in config.json.
    """
    kind = next(name for name, (_, cls) in KINDS.items() if cls is type(net))
    tensors = dict(net.state_dict()) | dict(weights or {})
    dtype = torch.float16 if half else torch.float32
    with new_folder(folder) as temporary:
        try:
            save_file({k: t.detach().to(dtype).cpu().contiguous() for k, t in tensors.items()}, temporary / "model.safetensors")
        except SafetensorError as error:
            raise UserError(f"cannot write {folder} ({error}): make room, or choose another place") from error
        config = dataclasses.asdict(net.config)  # type: ignore[call-overload]
        write_json(temporary / "config.json", {"kind": kind, "config": config, **notes})


def find_weights(name: str) -> Path:
    """The folder of bundled weights `name`, or `name` itself as a folder. Raises UserError when there is neither."""
    for folder in (BUNDLED / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    known = ", ".join(sorted(f.name for f in BUNDLED.iterdir() if f.is_dir()))
    raise UserError(f"no weights at {name}: give a folder with config.json and model.safetensors, or a bundled name ({known})")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a weights folder. Raises UserError when it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["kind"] not in KINDS or not isinstance(config["config"], dict):
            raise ValueError(f"unknown kind {config['kind']}")
        return config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not the description of a network ({error}): choose other weights"
        ) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors of a weights folder, fp32. Raises UserError when it is missing or damaged."""
    try:
        return {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read ({error}): copy the folder again") from error


def sha256(weights: Path) -> str:
    """Checksum of a weights folder's tensors: what tells two weights apart wherever they lie."""
    try:
        with open(weights / "model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {weights / 'model.safetensors'} ({error.strerror}): copy the folder again") from error


def load_net(name: str, kind: str) -> nn.Module:
    """The network of a weights folder (or bundled name), in evaluation mode. kind: what is expected, a key of KINDS."""
    folder = find_weights(name)
    described = read_config(folder)
    if described["kind"] != kind:
        raise UserError(f"weights {name} hold a network of kind {described['kind']}, not {kind}: choose other weights")
    config_class, net_class = KINDS[kind]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described["config"].items()}
    try:
        net = net_class(config_class(**fields))
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'} does not describe a {kind} ({error}): choose other weights") from error
    load_into(net, folder)
    return net.eval()


def load_into(net: nn.Module, folder: Path) -> None:
    """Copy a weights folder into a network of the same architecture. Raises UserError naming the first difference."""
    described, own = read_config(folder), dataclasses.asdict(net.config)  # type: ignore[call-overload]
    theirs = {k: tuple(v) if isinstance(v, list) else v for k, v in described["config"].items()}
    kind = next(name for name, (_, cls) in KINDS.items() if cls is type(net))
    if described["kind"] != kind:
        raise UserError(f"weights {folder.name} hold a network of kind {described['kind']}, not {kind}: give others by --init")
    # dropout is a property of training, not of the weights
    differing = [k for k in own if not k.startswith("drop") and theirs.get(k, own[k]) != own[k]]
    if differing:
        k = differing[0]
        raise UserError(
            f"weights {folder.name} have {k} {theirs[k]}, this run has {own[k]}: give fitting weights by --init, or change {k}"
        )
    tensors, state = read_tensors(folder), net.state_dict()
    wrong = sorted(
        k for k in state.keys() | tensors.keys() if k not in state or k not in tensors or state[k].shape != tensors[k].shape
    )
    if wrong:
        raise UserError(
            f"weights {folder.name} do not fit the network: {wrong[0]} and {len(wrong) - 1} more differ; choose other weights"
        )
    net.load_state_dict(tensors)
