"""`mclr convert`: published weights of VAR, its VQVAE and EDM2 into a weights folder, and back."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mclr.errors import UserError
from models.convert import to_published
from train.cli import Parser, run
from train.files import write_file
from train.published import FAMILIES, SCALES_512, SUFFIXES, TRAINING, Shapes, read_published
from train.weights import find_weights, load_net, read_config, save_weights

EXAMPLE = f"""examples:
  mclr convert var_d16.pth weights/var-d16                  published -> ours
  mclr convert vae_ch160v4096z32.pth weights/vqvae-512 'scales={list(SCALES_512)}'
  mclr convert runs/a/weights a.safetensors                 ours -> published
  mclr convert runs/a/weights weights/a --half              ours, half the size

A DST that ends in {", ".join(SUFFIXES)} is written with published names; any other DST is the weights folder to make.
key=value sets what names and shapes do not show: the scales of a VQVAE (default: those of 256 px), channels_per_head of an
EDM2 (default: 64, as in every published size), num_heads of a VAR without attn_l2_norm (default: width 64 each).
Checkpoints of VAR's trainer can be given as they are."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr convert", description="Translate weights.", epilog=EXAMPLE)
    parser.add_argument("src", metavar="SRC", help=f"a published state dict ({', '.join(SUFFIXES)}), or weights of ours")
    parser.add_argument("dst", type=Path, metavar="DST", help="the weights folder to make, or the file to write")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the network, where the file does not show it")
    parser.add_argument("--half", action="store_true", help="copy weights of ours as they are, stored in fp16")
    args = parser.parse_args(argv)
    if args.half:
        to_half(args.src, args.dst)
    elif args.dst.suffix in SUFFIXES:
        if args.settings:
            raise UserError(f"{args.settings[0]} has no effect: the settings of a weights folder stand in its config.json")
        to_file(args.src, args.dst)
    else:
        to_folder(Path(args.src), args.dst, args.settings)
    return 0


def to_folder(src: Path, dst: Path, settings: list[str]) -> None:
    """Published file -> weights folder. Raises UserError, with nothing written, for a file that is no whole known network."""
    net, notes = read_published(src, settings)
    config: Any = net.config
    save_weights(dst, net, made_by=" ".join(["mclr convert", str(src), str(dst), *settings]), **notes)
    print(f"{dst}: {type(net).__name__}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters")
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items()))
    for name, note in notes.items():
        print(f"{name}: {note}")


def to_half(src: str, dst: Path) -> None:
    """Weights folder -> the same in fp16, with its notes."""
    folder = find_weights(src)
    described = read_config(folder)
    notes = {key: value for key, value in described.items() if key not in ("kind", "config")}
    net = load_net(src, described["kind"])
    save_weights(dst, net, half=True, **notes, stored="fp16, by mclr convert --half")
    print(f"{dst}: {net.__class__.__name__} in fp16")


def to_file(src: str, dst: Path) -> None:
    """Weights folder (or bundled name) -> published state dict in fp32, with the constants that published code expects."""
    if dst.exists():
        raise UserError(f"{dst} exists already: remove it or choose another name")
    described = read_config(find_weights(src))
    family = next((family for family in FAMILIES if family.kind == described["kind"]), None)
    if family is None:
        known = ", ".join(family.kind for family in FAMILIES)
        raise UserError(f"weights {src} hold a network of kind {described['kind']}: only {known} have a published form")
    net = load_net(src, family.kind)
    config: Any = net.config
    state_dict = to_published(net, family.name_of) | family.constants(config)
    if dst.suffix == ".safetensors":
        data = safetensors.torch.save(state_dict)
    else:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        data = buffer.getvalue()
    write_file(dst, data)
    print(f"{dst}: {len(state_dict)} entries with the published names of {family.net.__name__}")
    inferred, own = dataclasses.asdict(family.infer(Shapes.of(state_dict))), dataclasses.asdict(config)
    hidden = [f"'{key}={json.dumps(own[key])}'" for key in own if own[key] != inferred[key] and key not in TRAINING]
    if hidden:
        print(f"the file does not show {', '.join(hidden)}: repeat that when you convert it back")
    if "licence" in described:
        print(f"licence: {described['licence']}")


if __name__ == "__main__":
    sys.exit(run(main))
