"""`mclr convert`: published weights of VAR, its VQVAE, EDM2, DiT and SiT into a weights folder, and back."""

import argparse
import dataclasses
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mclr.configs.schema import FILE
from mclr.errors import UserError
from mclr.models.convert import Shapes
from mclr.models.dial import folded
from mclr.models.options import SCALES_512, TRAINING
from mclr.models.registry import NETWORKS
from mclr.train.engine.ema import reconstruct
from mclr.train.system.console import Parser, run
from mclr.train.system.files import write_file
from mclr.train.weights.folder import convert_published, find_weights, is_ours, load_net, notes_of, read_config, save_weights
from mclr.train.weights.state_dict import LICENCE

SUFFIXES = (".pth", ".pt", ".safetensors")  # of files that are written
FOREIGN = (".pkl", ".bin", ".ckpt")  # of files that are only read
EXAMPLE = f"""examples:
  mclr convert var_d16.pth weights/var-d16                  published -> ours
  mclr convert edm2-img64-s-1073741-0.075.pkl weights/edm2-img64-s
  mclr convert vae_ch160v4096z32.pth weights/vqvae-512 'scales={list(SCALES_512)}'
  mclr convert runs/a/weights a.safetensors                 ours -> published
  mclr convert runs/a/weights weights/a --half              ours, half the size
  mclr convert runs/a weights/a-0.1 --ema-std 0.1           another average of a run that kept snapshots (train.snapshot_every)
  mclr convert runs/a a.pth --strength 1.5                  a VAR or DiT with a dial -> without, tuned for one strength

A DST that ends in {", ".join(SUFFIXES)} is written with published names; any other DST is the weights folder to make.
key=value sets what names and shapes do not show: the scales of a VQVAE (default: those of 256 px), channels_per_head of an
EDM2 (default: 64, as in every published size), num_heads of a VAR without attn_l2_norm (default: width 64 each).
Files are known by their content: .pth, .ckpt, .bin, .safetensors, shards with their index, checkpoints of trainers, EDM2's .pkl. Those
on the Hugging Face hub are named hf://ORG/REPO/FILE[@REV]. Of raw and averaged weights in one file the averaged ones are taken."""

WEIGHTS = {"model.safetensors", "config.json", "README.md"}  # what a weights folder holds


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr convert", description="Translate weights.", epilog=EXAMPLE)
    parser.add_argument(
        "src", metavar="SRC", help="a published network (a file of any ending, or a folder of shards), weights of ours, or a run"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="the weights folder to make, or the file to write")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the network, where the file does not show it")
    parser.add_argument("--force", action="store_true", help="replace the weights that are at DST")
    parser.add_argument(
        "--weights-key", metavar="KEY", help="of a checkpoint with several networks: which one (default: the averaged weights)"
    )
    parser.add_argument("--ignore-extra", action="store_true", help="leave out entries that the network does not have")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--half", action="store_true", help="copy weights of ours as they are, stored in fp16")
    how.add_argument(
        "--ema-std", type=float, metavar="STD", help="of the run SRC: the average of this relative width, .01 to .25"
    )
    how.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="of weights with a dial (model.strength.max), or their run: as they answer at S",
    )
    args = parser.parse_args(argv)
    copied, to_a_file = args.half or args.ema_std is not None, args.dst.suffix.lower() in SUFFIXES
    folds = args.strength is not None
    check_target(args.dst, args.force, folder=copied)
    options = [*args.settings, *["--weights-key"] * (args.weights_key is not None), *["--ignore-extra"] * args.ignore_extra]
    if options and (copied or folds or to_a_file):
        raise UserError(f"{options[0]} has no effect: it is for published files, and weights of ours are complete")
    if args.ema_std is None and not folds and (Path(args.src) / FILE).is_file():
        raise UserError(f"{args.src} is a run: give {args.src}/weights, or the width of an average by --ema-std")
    if not (copied or folds or to_a_file) and is_ours(Path(args.src)):
        ways = f"copy it, store it in fp16 by --half, or give a DST that ends in {', '.join(SUFFIXES)}"
        raise UserError(f"{args.src} is a weights folder already: {ways}")
    if args.half:
        to_half(args.src, args.dst, args.force)
    elif args.ema_std is not None:
        to_average(Path(args.src), args.dst, args.ema_std, args.force)
    elif folds and not to_a_file:
        to_plain(args.src, args.dst, args.strength, args.force)
    elif to_a_file:
        to_file(args.src, args.dst, args.strength)
    else:
        to_folder(args)
    return 0


def check_target(dst: Path, force: bool, folder: bool) -> None:
    """Raises UserError where something is at DST, unless it is empty, or --force is given and it is weights. folder: DST is to be one."""
    ending = dst.suffix.lower()
    if ending in FOREIGN or (folder and ending in SUFFIXES):
        raise UserError(f"{dst} is named like a published file, and would be a weights folder: give it another name")
    try:
        there = {path.name for path in dst.iterdir()} if dst.is_dir() else {dst.name} if dst.exists() else set()
    except OSError as error:
        raise UserError(f"cannot read {dst} ({error.strerror}): choose another name") from error
    if there and not force:
        raise UserError(f"{dst} exists already: remove it, choose another name, or replace it by --force")
    if there and not ({"config.json"} <= there <= WEIGHTS if dst.is_dir() else ending in SUFFIXES):
        raise UserError(f"{dst} is not what --force may replace, weights: choose another name")


def to_folder(args: argparse.Namespace) -> None:
    """Published file -> weights folder. Raises UserError, with nothing written, for a file that is no whole known network."""
    dst = args.dst
    net, notes = convert_published(args.src, dst, args.settings, args.force, args.weights_key, args.ignore_extra)
    config: Any = net.config
    print(f"{dst}: {type(net).__name__}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters")
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items()))
    for name, note in notes.items():
        print(f"{name}: {note}")


def to_half(src: str, dst: Path, force: bool) -> None:
    """Weights folder -> the same in fp16, with its notes."""
    described = read_config(find_weights(src))
    net = load_net(src)
    save_weights(dst, net, half=True, replace=force, **notes_of(described) | {"stored": "fp16, by mclr convert --half"})
    print(f"{dst}: {net.__class__.__name__} in fp16")


def to_average(run: Path, dst: Path, std: float, force: bool) -> None:
    """The average of relative width `std` of a run's weights at its newest snapshot -> weights folder, with the run's notes.

    Raises UserError for a folder that is no run, and as train.ema.reconstruct does.
    """
    if not (run / "weights" / "config.json").is_file():
        raise UserError(f"{run} is no finished run: --ema-std needs the folder that `mclr train` made, with its weights")
    described = read_config(run / "weights")
    net = load_net(str(run / "weights"))
    average, images = reconstruct(run, std)
    if {name: p.shape for name, p in net.named_parameters()} != {name: t.shape for name, t in average.items()}:
        raise UserError(f"the snapshots of {run} are of another network than its weights: give a whole run folder")
    save_weights(dst, net, average, replace=force, **notes_of(described) | {"images_seen": images, "ema_std": std})
    print(f"{dst}: {net.__class__.__name__}, average of relative width {std} at {images} images of {run}")


def to_plain(src: str, dst: Path, strength: float, force: bool) -> None:
    """Weights with a dial -> without, as they answer at one strength."""
    net, described = folded(load_net(src), strength), read_config(find_weights(src))
    save_weights(dst, net, replace=force, **notes_of(described) | {"strength": strength})
    print(f"{dst}: {net.__class__.__name__} without a dial, as {src} answers at strength {strength:g}")


def to_file(src: str, dst: Path, strength: float | None = None) -> None:
    """Weights folder (or bundled name) -> published state dict in fp32, with the constants that published code expects.

    strength: of weights with a dial, which is folded at it; they have no published form otherwise.
    """
    described = read_config(find_weights(src))
    kind = NETWORKS[described["kind"]]
    family = kind.published
    if family is None:
        known = ", ".join(name for name, each in NETWORKS.items() if each.published)
        raise UserError(f"weights {src} hold a network of kind {described['kind']}: only {known} have a published form")
    net: Any = load_net(src) if strength is None else folded(load_net(src), strength)
    config: Any = net.config
    if getattr(config, "strength_max", 0):
        raise UserError(
            f"weights {src} have a dial, which no published network has: fold it, by --strength S up to {config.strength_max:g}"
        )
    state_dict = family.entries(net) | family.constants(config)
    licence = described.get("licence") or ""
    if dst.suffix.lower() == ".safetensors":
        data = safetensors.torch.save(state_dict, {LICENCE: licence})
    else:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        # readers pass over members that they do not know
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(f"archive/{LICENCE}", licence)
        data = buffer.getvalue()
    write_file(dst, data)
    print(f"{dst}: {len(state_dict)} entries with the published names of {kind.net.__name__}")
    inferred, own = dataclasses.asdict(family.infer(Shapes.of(state_dict))), dataclasses.asdict(config)
    hidden = [f"'{key}={json.dumps(own[key])}'" for key in own if own[key] != inferred[key] and key not in TRAINING]
    if hidden:
        print(f"the file does not show {', '.join(hidden)}: repeat that when you convert it back")
    if licence:
        print(f"licence: {licence}")


if __name__ == "__main__":
    sys.exit(run(main))
