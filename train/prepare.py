"""`mclr prepare`: turn images into a dataset folder (dataset.json, train/*.tar, val/*.tar) that train/data/source.py reads.

A shard is a tar file in webdataset's format: every sample is KEY.png and KEY.cls (its condition, a decimal number).
"""

import argparse
import signal
import sys
from contextlib import nullcontext

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.train.data.dataset import DatasetInfo
from mclr.train.data.write import open_or_prepare, prepare_digits, prepare_images
from mclr.train.system.console import Parser, run_rank
from mclr.train.system.ranks import on_signals, own_device, report_once, world

NETWORKS = {
    "tokenizer": "the tokenizer of next-scale models (multi-scale VQVAE)",
    "classifier": "the classifier whose features judge samples",
    "posterior": "the noise-conditional classifier p(c | x_t) of the posterior contrast",
}


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
    from mclr.train.training.build import open_source
    from mclr.train.training.networks import build_encoder

    rank = world()[0]
    with on_signals(signal.SIG_DFL) if rank else nullcontext(), report_once():
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
