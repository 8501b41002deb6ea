"""`mclr sample`: images from a run or from weights. An image depends on its seed and its condition alone."""

import argparse
import re
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

if not __package__:
    # Run as a file: the repository's root takes the place of train/ (train/run.py says why).
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mclr.configs.schema import NextScaleModel
from mclr.errors import UserError
from mclr.train.sampling.find import find_generator, record_of
from mclr.train.sampling.folder import draw, write_dataset, write_npz
from mclr.train.sampling.generate import conditions_of, load_generator
from mclr.train.system.console import Parser, run_and_exit
from mclr.train.system.ranks import group, launched, on_signals, report_once, world
from mclr.train.weights.folder import read_config

EXAMPLE = """examples:
  mclr sample runs/mine --out samples/mine --per-class 50
  mclr sample edm2-digits --out samples/guided --count 200 sample.gamma=0.5 sample.steps=18
  mclr sample runs/mine --out samples/auto sample.gamma=0.5 sample.guide.weights=edm2-digits
  deepspeed train/sample.py runs/mine --out samples/mine --count 50000 --npz        on all GPUs; or torchrun -m train.sample

The images are DIR/images/SEED-CONDITION.png; seeds count from --seed, conditions take turns. DIR/grid.png shows the first of
them, DIR/sample.json says how they were made. Guidance is off unless sample.gamma is set; sample.guide.weights lets another network
be the guide. Running the same command again draws what is missing; a larger --count adds images."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr sample", description="Draw images.", epilog=EXAMPLE)
    parser.add_argument(
        "source",
        metavar="RUN_OR_WEIGHTS",
        help="a finished run, or weights: a folder, a bundled name, a published file, hf://ORG/REPO[/FILE][@REV]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, default=100, metavar="N", help="images in all (default: %(default)s)")
    number.add_argument("--per-class", type=int, metavar="N", help="images of every condition")
    parser.add_argument("--classes", metavar="0,3,7", help="draw these conditions alone, by number or name (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first image (default: %(default)s)")
    parser.add_argument("--model", help="preset of the weights (default: the one of their name); a run has its own")
    parser.add_argument(
        "--data",
        help="preset or dataset folder the weights were trained on (default: images as the weights make them); a run has its own",
    )
    parser.add_argument("--npz", action="store_true", help="also write DIR/samples.npz (arr_0: uint8 NHWC, arr_1: conditions)")
    parser.add_argument("--dataset", action="store_true", help="also write DIR/dataset, a dataset folder for objective.generated")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    rank = world()[0]
    with on_signals(signal.SIG_DFL) if rank else nullcontext():
        with report_once():
            args = parser.parse_intermixed_args(argv)
            config, weights = find_generator(args.source, args.model, args.data, args.overrides)
            record, K, names = record_of(config, weights), config.data.num_classes, read_config(weights).get("classes", ())
            conditions = list(range(K))
            if args.classes is not None:
                try:
                    conditions = conditions_of(re.split(" *, *", args.classes), K, names)
                except ValueError as error:
                    raise UserError(f"--classes {args.classes}: {error}") from None
            if len(set(conditions)) < len(conditions):
                raise UserError(f"--classes {args.classes}: give different conditions")
            tokens = isinstance(config.model, NextScaleModel)
            if args.dataset and config.sample.more_smooth:
                raise UserError("sample.more_smooth=true makes pictures of no tokens: leave out --dataset, or set it to false")
        count = args.count if args.per_class is None else args.per_class * len(conditions)
        with group(launched() and not torch.distributed.is_initialized()), report_once():
            seeds = range(args.seed, args.seed + count)
            settings = draw(
                partial(load_generator, config, weights), record, args.out, conditions, seeds, args.dataset and tokens
            )
            if rank == 0 and args.npz:
                write_npz(args.out)
            if rank == 0 and args.dataset:
                write_dataset(args.out, config.data, settings, tokens)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
