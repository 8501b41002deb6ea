"""`mclr prepare`: turn images into a dataset folder (dataset.json, train/*.tar, val/*.tar) that train/data/source.py reads.

A shard is a tar file in webdataset's format: every sample is KEY.png and KEY.cls (its condition, a decimal number).
"""

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm
from webdataset import TarWriter

from mclr.configs.schema import Data, is_stream, load
from mclr.errors import UserError
from mclr.train.cli import Parser, run_rank
from mclr.train.data.folders import FORMATS, Images, find_images
from mclr.train.data.shards import Shard, open_image
from mclr.train.data.source import TOKENS, DatasetInfo, SplitReader, open_dataset, permutation
from mclr.train.system.files import in_memory, new_folder, write_file, write_json
from mclr.train.system.ranks import on_signals, one_voice, own_device, world

CHUNK = 64


NETWORKS = {
    "tokenizer": "the tokenizer of next-scale models (multi-scale VQVAE)",
    "classifier": "the classifier whose features judge samples",
    "posterior": "the noise-conditional classifier p(c | x_t) of the posterior contrast",
}


def prepare_digits(out: str | Path) -> DatasetInfo:
    """scikit-learn's 1,797 scanned digits, 8x8 gray, as a dataset folder: 1,500 train and 297 val, split by seed 0.

    Values 0..16 become round(v * 255 / 16). The same dataset at `out` is reused; anything else there is a UserError.
    """
    header = {
        "name": "digits",
        "resolution": 8,
        "channels": 1,
        "num_classes": 10,
        "class_names": tuple("0123456789"),
        "source": "scikit-learn load_digits: optical recognition of handwritten digits (UCI), test part",
        "seed": 0,
    }
    if info := _existing(out, header):
        return info
    # slow to import and used here alone
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    order = permutation(0, 0, len(images)).tolist()
    with new_folder(out) as folder:
        splits = {}
        for split, indices in (("train", order[:1500]), ("val", order[1500:])):
            samples = ((_png(Image.fromarray(images[i])), int(digits.target[i])) for i in _progress(indices, split))
            splits[split] = write_split(folder, split, samples, per_shard=375)
        _finish(folder, header, splits)
    return open_dataset(out)


def open_or_prepare(name: str, path: str | Path) -> DatasetInfo:
    """The dataset folder at `path`; the digits are prepared there on first use."""
    if name == "digits" and not is_stream(str(path)) and not Path(path).exists():
        try:
            return prepare_digits(path)
        except UserError:
            # unless another process has prepared them meanwhile
            if not Path(path, "dataset.json").exists():
                raise
    return open_dataset(path)


def prepare_images(
    src: str | Path,
    out: str | Path,
    resolution: int,
    channels: int = 3,
    val_share: float = 0.1,
    seed: int = 0,
    shard_size: int = 1000,
) -> DatasetInfo:
    """Images, src/CLASS/*.png or others that find_images finds, as a dataset folder: square crops of resolution^2, gray or RGB.

    The images, sorted by name, are put into the order permutation(seed, 0):
    its last val_share is val. The same dataset at `out` is reused. Raises UserError for unusable arguments or folders, and
    when more than 1% of the images cannot be read; up to that share they are named on stderr and left out.
    """
    src, out = Path(src), Path(out)
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: it must be 1 (gray) or 3 (RGB)")
    if resolution < 1 or shard_size < 1:
        raise UserError(f"resolution is {resolution} and shard size {shard_size}: both must be at least 1")
    if not (0 <= val_share < 1 and 0 <= seed < 2**64):
        raise UserError(f"val share is {val_share} and seed {seed}: the share must be in [0, 1), the seed in [0, 2^64)")
    # resolve() would raise at a loop of links
    if Path(os.path.realpath(src)) in Path(os.path.realpath(out)).parents:
        raise UserError(f"{out} lies inside the images of {src}: choose a place outside")
    images = find_images(src)
    class_names, files = images.class_names, images.files
    num_train = len(files) - round(val_share * len(files))
    if num_train == 0:
        raise UserError(f"{src} has {len(files)} images and a val share of {val_share} leaves none to train on: lower it")
    header = {
        "name": src.resolve().stem if images.archive else src.resolve().name,
        "resolution": resolution,
        "channels": channels,
        "num_classes": len(class_names),
        "class_names": class_names,
        "source": f"{len(files)} images of {src.resolve()} ({images.fingerprint()}), val share {val_share}",
        "seed": seed,
    }
    if info := _existing(out, header):
        return info
    order = permutation(seed, 0, len(files)).tolist()
    unreadable: list[str] = []
    with new_folder(out) as folder:
        splits = {}
        for split, indices in (("train", order[:num_train]), ("val", order[num_train:])):
            samples = _encode(images, [files[i] for i in indices], split, resolution, channels, unreadable)
            splits[split] = write_split(folder, split, samples, shard_size)
        if unreadable:
            names = ", ".join(sorted(unreadable)[:5])
            count = f"{len(unreadable)} of {len(files)} images in {src} cannot be read ({names}{', ...' * (len(unreadable) > 5)})"
            if len(unreadable) > 0.01 * len(files):
                raise UserError(f"{count}, more than 1%: remove or replace them")
            print(f"{count} and are left out", file=sys.stderr)
        _finish(folder, header, splits)
    return open_dataset(out)


def prepare_samples(
    images: list[tuple[Path, int]], tokens: list[Path], out: Path, data: Data, drawn: dict[str, Any]
) -> DatasetInfo:
    """Drawn images (PNG file, condition) as a dataset folder without a val split. data: of the network they were drawn from.

    tokens: of a token model, one file (npy, [L]) per image; drawn: the settings they were drawn by. The same dataset at `out` is reused.
    """
    header = {
        "name": f"samples-{data.name}",
        "resolution": data.resolution,
        "channels": data.channels,
        "num_classes": data.num_classes,
        "class_names": tuple(str(c) for c in range(data.num_classes)),
        "source": f"{len(images)} images drawn by weights {drawn['weights']}",
        "seed": 0,
        "drawn": drawn,
        "tokens": None,
    }
    data_NL = b""
    if tokens:
        data_NL = in_memory(np.save, arr=np.stack([np.load(path, allow_pickle=False) for path in tokens]))
        header["tokens"] = hashlib.sha256(data_NL).hexdigest()
    if info := _existing(out, header):
        return info
    with new_folder(out) as folder:
        if tokens:
            write_file(folder / TOKENS, data_NL)
        samples = ((path.read_bytes(), c) for path, c in images)
        splits = {"train": write_split(folder, "train", samples, 1000), "val": write_split(folder, "val", iter(()), 1000)}
        _finish(folder, header, splits)
    return open_dataset(out)


def write_split(folder: Path, split: str, samples: Iterator[tuple[bytes, int]], per_shard: int) -> dict[str, Any]:
    """Write (PNG file, condition) pairs into folder/split/*.tar; what dataset.json says of the split."""
    (folder / split).mkdir()
    shards: list[Shard] = []
    for first in samples:
        file = f"{split}/{len(shards):06d}.tar"
        count = 0
        # no time stamps, so that the same images give the same shards
        with open(folder / file, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            for png, c in chain([first], islice(samples, per_shard - 1)):
                key = f"{len(shards) * per_shard + count:08d}"
                tar.write({"__key__": key, "png": png, "cls": str(c).encode()})
                count += 1
        with open(folder / file, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        shards.append(Shard(file, count, (folder / file).stat().st_size, sha256))
    return {"count": sum(shard.count for shard in shards), "shards": [asdict(shard) for shard in shards]}


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at resolution x resolution, as ImageNet is prepared for diffusion models (Dhariwal & Nichol 2021).

    Halved by a box filter while twice too large, then bicubic until the shorter side fits, then cropped.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _existing(out: str | Path, header: dict[str, Any]) -> DatasetInfo | None:
    """The dataset at `out` if it is the one that `header` describes; None if there is none; UserError if it is another, or out names
    a stream."""
    if is_stream(str(out)):
        raise UserError(f"{out} would be taken for a stream: choose another name for the dataset folder")
    if not os.path.exists(Path(out, "dataset.json")):
        return None
    info = open_dataset(out)
    for name, value in header.items():
        if (found := getattr(info, name)) != value:
            raise UserError(f"{out} already holds another dataset ({name}: {found}): remove it or choose another place")
    return info


def _finish(folder: Path, header: dict[str, Any], splits: dict[str, Any]) -> None:
    """Write dataset.json, read everything back, and leave the index beside it."""
    write_json(folder / "dataset.json", header | {"splits": splits})
    SplitReader(open_dataset(folder), "train")


def _encode(
    images: Images, files: list[tuple[str, int]], split: str, resolution: int, channels: int, unreadable: list[str]
) -> Iterator[tuple[bytes, int]]:
    """(PNG file, condition) of each image that can be read, in order; the others are appended to `unreadable`."""

    def encode(name: str) -> bytes | None:
        try:
            with open_image(images.read(name), FORMATS) as image:
                return _png(center_crop(convert(image, {1: "L", 3: "RGB"}[channels]), resolution))
        # decoders raise nearly anything on bad files; each is counted and reported
        except Exception:
            return None

    names = [name for name, _ in files]
    with ThreadPoolExecutor() as threads:
        # a chunk at a time: whatever the threads have encoded and nobody has written yet sits in memory
        chunks = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
        encoded = chain.from_iterable(threads.map(encode, chunk) for chunk in chunks)
        for (name, c), png in zip(_progress(files, split), encoded, strict=True):
            if png is None:
                unreadable.append(name)
            else:
                yield png, c


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image upright, opaque (over white) and 8 bits per channel; ValueError where the pixels have no known range."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range")
    # Pillow would clip 16 bits at 255
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _png(image: Image.Image) -> bytes:
    return in_memory(image.save, format="PNG")


def _progress(items: list, split: str) -> tqdm:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(items, split, unit="image", disable=None)


def main(argv: list[str] | None = None) -> int:
    """`mclr prepare WHAT ...`: each subcommand sets `program`, which is called with the parsed arguments."""
    parser = Parser(
        prog="mclr prepare",
        description="Prepare what training reads.",
        epilog="example: mclr prepare digits data/digits\n`mclr prepare WHAT --help` shows the arguments of one.",
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)

    digits = commands.add_parser(
        "digits",
        help="scikit-learn's 1,797 scanned digits, no download",
        description="The handwritten digits that come with scikit-learn: 8x8 gray, ten classes, 1,500 train and 297 val.",
        epilog="example: mclr prepare digits data/digits",
    )
    digits.add_argument("out", metavar="OUT", help="dataset folder to make; reused when it holds the digits already")
    digits.set_defaults(program=lambda args: _show(prepare_digits(args.out)))

    images = commands.add_parser(
        "images",
        help="a folder or .zip of images, one subfolder per class",
        description="Images in SRC/CLASS/*.png (jpg, webp, ...), cropped to squares and resized; the classes are the subfolders, or the "
        "labels of SRC/dataset.json, as EDM2's and StyleGAN's tools write it. A .zip is read without unpacking.",
        epilog="example: mclr prepare images photos data/photos --resolution 64",
    )
    images.add_argument("src", metavar="SRC", help="folder or .zip with one subfolder of images per class")
    images.add_argument("out", metavar="OUT", help="dataset folder to make; reused when it holds these images already")
    images.add_argument("--resolution", type=int, required=True, metavar="N", help="pixels per side after crop and resize")
    images.add_argument("--channels", type=int, default=3, choices=(1, 3), help="1 gray, 3 RGB (default: %(default)s)")
    images.add_argument("--val-share", type=float, default=0.1, metavar="X", help="share kept for val (default: %(default)s)")
    images.add_argument("--seed", type=int, default=0, metavar="N", help="of the split into train and val (default: %(default)s)")
    images.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images per shard (default: %(default)s)")
    images.set_defaults(program=_images)

    for kind, what in NETWORKS.items():
        network = commands.add_parser(
            kind,
            help=what,
            description=f"Fit {what} to a dataset and write a weights folder.",
            epilog=f"example: mclr prepare {kind} weights/{kind} --data digits",
        )
        network.add_argument("out", metavar="OUT", help="weights folder to make")
        network.add_argument("--data", required=True, metavar="D", help="preset or dataset folder, like digits")
        network.add_argument("--steps", type=int, default=1000, metavar="N", help="(default: %(default)s)")
        network.add_argument("--batch", type=int, default=128, metavar="N", help="images per step (default: %(default)s)")
        network.add_argument("--lr", type=float, default=0.002, metavar="X", help="at the start (default: %(default)s)")
        network.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
        network.add_argument("--half", action="store_true", help="store fp16")
        network.set_defaults(program=_network, kind=kind)

    cache = commands.add_parser(
        "cache",
        help="what a model's frozen encoder stores of every image, which training then reads instead",
        description="Encode the images of a dataset once: latents of a VAE, tokens of a tokenizer, into DATA/cache. Runs of that encoder "
        "find them there. Running the same command again goes on where it stopped.",
        epilog="example: mclr prepare cache --model edm2-img512-l --data data/imagenet-512\n"
        "         torchrun --nproc-per-node 8 -m train.prepare cache --model ... --data ...        on all GPUs",
    )
    cache.add_argument("--model", required=True, help="preset whose encoder is used, or a YAML path")
    cache.add_argument("--data", required=True, metavar="D", help="preset or dataset folder")
    cache.add_argument("--half", action="store_true", help="latents in fp16: half the disk, 11 bits of every number")
    cache.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in the run: data.flip=true, model.vae=, model.tokenizer="
    )
    cache.set_defaults(program=_cache)

    argv = sys.argv[1:] if argv is None else argv
    # overrides may stand anywhere, which a parser of subcommands cannot have
    args = cache.parse_intermixed_args(argv[1:]) if argv[:1] == ["cache"] else parser.parse_args(argv)
    args.command = "mclr prepare " + " ".join(argv)
    args.program(args)
    return 0


def _images(args: argparse.Namespace) -> None:
    _show(prepare_images(args.src, args.out, args.resolution, args.channels, args.val_share, args.seed, args.shard_size))


def _network(args: argparse.Namespace) -> None:
    # torch's optimisers and the networks are slow to import, and the other subcommands do without
    from mclr.train.training.small_networks import Recipe, fit_to_data

    fit_to_data(args.kind, args.data, args.out, Recipe(args.steps, args.batch, args.lr), args.seed, args.half, args.command)


def _cache(args: argparse.Namespace) -> None:
    # as above
    from mclr.train.data.cache import make_cache
    from mclr.train.training.build import build_encoder, open_source

    rank = world()[0]
    with on_signals(signal.SIG_DFL) if rank else nullcontext(), one_voice():
        # the objective says nothing about encoders; a cache is of all samples
        config = load(args.model, "mle", args.data, "auto", [*args.overrides, "data.damaged=0.0"])
        if config.data.streamed:
            raise UserError(f"{config.data.path} is a stream, whose samples have no numbers: give a dataset folder")
        open_or_prepare(config.data.name, config.data.path)
        device = own_device()
        make_cache(config, open_source(config), build_encoder(config, device), args.half, device, args.command)


def _show(info: DatasetInfo) -> None:
    counts = " and ".join(f"{split.count} {name}" for name, split in info.splits.items())
    channels = {1: "gray", 3: "RGB"}[info.channels]
    print(f"{info.path}: {counts} images, {info.resolution}x{info.resolution} {channels}, {info.num_classes} classes")


if __name__ == "__main__":
    run_rank(main)
