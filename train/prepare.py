"""`mclr prepare`: images become a dataset folder (train/data/write.py), encoders fill caches, small networks are fitted."""

import argparse
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext

from mclr.configs.schema import DatasetInfo, load
from mclr.errors import UserError
from mclr.kernels.timing import above_0
from mclr.train.data.images import MEGAPIXELS
from mclr.train.data.write import open_or_prepare, prepare_digits, prepare_images
from mclr.train.system.console import Parser, run_and_exit
from mclr.train.system.ranks import end_early, on_signals, own_device, report_once, world

NETWORKS = {
    "tokenizer": "the tokenizer of next-scale models (multi-scale VQVAE)",
    "classifier": "the classifier whose features judge samples",
    "posterior": "the noise-conditional classifier p(c | x_t) of the posterior contrast",
}
IMAGES = """Make a dataset of the images in SRC/CLASS/, as squares: the centre, resized. Every format that Pillow reads is taken. Links are
followed; hidden and system files are skipped. SRC may also hold train/CLASS/ and val/CLASS/, or a list of labels:
labels.csv (file,class), or dataset.json as EDM2's and StyleGAN's tools write it. Conditions are the classes in order of
their names, or of their numbers where all names are numbers. A .zip is read without unpacking. After an interruption
the same command goes on at its last finished shard."""
IMAGES_EXAMPLE = "photos data/photos --resolution 64"
DIGITS = "The handwritten digits that come with scikit-learn: 8x8 gray, ten classes, 1,500 train and 297 val."
CACHE = """Encode the images of a dataset once, into DATA/cache: latents of a VAE, tokens of a tokenizer. Runs of that encoder find them
there. The same command run again goes on where it stopped."""
CACHE_EXAMPLE = """--model edm2-img512-l --data data/imagenet-512
         torchrun --nproc-per-node 8 -m train.prepare cache --model ... --data ...        on all GPUs"""


def main(argv: list[str] | None = None) -> int:
    """`mclr prepare WHAT ...`. In one piece: it is the list of all options."""
    parser = Parser(
        prog="mclr prepare",
        description="Prepare what training reads.",
        epilog=f"example: mclr prepare images {IMAGES_EXAMPLE}\n`mclr prepare WHAT --help` shows the arguments of one.",
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)

    def add(name: str, program: Callable[[argparse.Namespace], None], example: str, text: str) -> argparse.ArgumentParser:
        epilog, about = f"example: mclr prepare {name} {example}", text.partition(".")[0]
        command = commands.add_parser(name, epilog=epilog, help=about, description=text)
        command.set_defaults(program=program, kind=name)
        return command

    option = add("images", _images, IMAGES_EXAMPLE, IMAGES).add_argument
    option("src", metavar="SRC", help="folder or .zip with one subfolder of images per class")
    option("out", metavar="OUT", help="dataset folder to make; reused when it holds these images already")
    option("--resolution", type=above_0(int), required=True, metavar="N", help="pixels per side after crop and resize")
    option("--channels", type=int, default=3, choices=(1, 3), help="1 gray, 3 RGB (default: %(default)s)")
    option("--val-share", type=float, metavar="X", help="share kept for val (default: 0.1, or SRC's own val folder)")
    option("--seed", type=int, default=0, metavar="N", help="of the split into train and val (default: %(default)s)")
    option("--shard-size", type=above_0(int), default=1000, metavar="N", help="images per shard (default: %(default)s)")
    largest = "largest image read, in 2^20 pixels (default: %(default)g)"
    option("--megapixels", type=float, default=MEGAPIXELS, metavar="M", help=largest)

    option = add("digits", lambda args: _show(prepare_digits(args.out)), "data/digits", DIGITS).add_argument
    option("out", metavar="OUT", help="dataset folder to make; reused when it holds the digits already")

    for kind, what in NETWORKS.items():
        option = add(kind, _network, f"weights/{kind} --data digits", f"Fit {what} to a dataset.").add_argument
        option("out", metavar="OUT", help="weights folder to make")
        option("--data", required=True, metavar="D", help="preset or dataset folder, like digits")
        option("--steps", type=int, default=1000, metavar="N", help="(default: %(default)s)")
        option("--batch", type=int, default=128, metavar="N", help="images per step (default: %(default)s)")
        option("--lr", type=float, default=0.002, metavar="X", help="at the start (default: %(default)s)")
        option("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
        option("--half", action="store_true", help="store fp16")

    cache = add("cache", _cache, CACHE_EXAMPLE, CACHE)
    cache.add_argument("--model", required=True, help="preset whose encoder is used, or a YAML path")
    cache.add_argument("--data", required=True, metavar="D", help="preset or dataset folder")
    cache.add_argument("--half", action="store_true", help="latents in fp16: half the disk, 11 bits of every number")
    settings = "as in the run: data.flip=true, model.vae=, model.tokenizer="
    cache.add_argument("overrides", nargs="*", metavar="section.key=value", help=settings)

    argv = sys.argv[1:] if argv is None else argv
    # a parser of subcommands does not allow overrides anywhere
    args = cache.parse_intermixed_args(argv[1:]) if argv[:1] == ["cache"] else parser.parse_args(argv)
    args.command = "mclr prepare " + " ".join(argv)
    args.program(args)
    return 0


def _images(args: argparse.Namespace) -> None:
    settings = (args.resolution, args.channels, args.val_share, args.seed, args.shard_size, args.megapixels)
    # a signal raises an exception, so that no temporary file is left
    with on_signals(end_early):
        _show(prepare_images(args.src, args.out, *settings))


def _network(args: argparse.Namespace) -> None:
    # slow to import
    from mclr.train.training.small_networks import Recipe, fit_to_data

    with on_signals(end_early):
        fit_to_data(args.kind, args.data, args.out, Recipe(args.steps, args.batch, args.lr), args.seed, args.half, args.command)


def _cache(args: argparse.Namespace) -> None:
    # slow to import
    from mclr.train.data.cache import make_cache
    from mclr.train.training.build import open_source
    from mclr.train.training.networks import build_encoder

    rank = world()[0]
    with on_signals(signal.SIG_DFL) if rank else nullcontext(), report_once():
        # the objective does not matter to an encoder; a cache needs all samples
        config = load(args.model, "mle", args.data, "auto", [*args.overrides, "data.damaged=0.0"])
        if config.data.streamed:
            raise UserError(f"{config.data.path} is a stream, whose samples have no numbers: give a dataset folder")
        open_or_prepare(config.data.name, config.data.path)
        device = own_device()
        encoder = build_encoder(config, device)
        make_cache(open_source(config), encoder, config.data, config.model, args.half, device, args.command)


def _show(info: DatasetInfo) -> None:
    counts = " and ".join(f"{split.count} {name}" for name, split in info.splits.items())
    channels = {1: "gray", 3: "RGB"}[info.channels]
    print(f"{info.path}: {counts} images, {info.resolution}x{info.resolution} {channels}, {info.num_classes} classes")


if __name__ == "__main__":
    run_and_exit(main)
