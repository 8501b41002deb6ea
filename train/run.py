"""`mclr train`, `deepspeed train/run.py`, `torchrun train/run.py`, `python train/run.py`: fine-tune or train a generator."""

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path

if not __package__:
    # Run as a file: Python put train/ first, whose names are no modules of ours. The repository's root takes its place: other
    # distributions own packages named `models` or `kernels`, and an editable install comes after them.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mclr.configs.schema import RunConfig, dump, load
from mclr.errors import UserError
from mclr.train.system.console import Parser, answer, run_and_exit
from mclr.train.system.ranks import end_early, on_signals, report_once, world
from mclr.train.training.trackers import refuse_missing

EXAMPLES = """examples:
  mclr train --model edm2-digits --objective mclr --out runs/mine
  mclr train --model edm2-digits --objective mclr --dry-run
  mclr train --model edm2-32px --data data/mine --init runs/base --objective mclr objective.lam=0.3
  deepspeed --num_accelerators 2 train/run.py --model var-digits --objective mclr --engine zero2

Presets are YAML files under configs/; each may be a path instead. `section.key=value` overrides any setting.
Running the same command again goes on from its newest checkpoint."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("mclr train", description=__doc__, epilog=EXAMPLES)
    option = parser.add_argument
    option(
        "--model",
        required=True,
        help="what is trained, a preset of configs/model: edm2-digits, var-digits, edm2-32px, edm2-img64-s, edm2-img512-l, var-d16, ...; "
        "or a YAML path",
    )
    option("--objective", default="mclr", help="mclr, mle, unlearn, cc_dpo, cca, ddo, or a YAML path (default: mclr)")
    option("--data", help="a folder made by `mclr prepare`, digits, or a YAML path (default for models of the digits: digits)")
    option("--engine", default="auto", help="auto, local, zero0 to zero3, 8x80gb, 4-nodes, or a YAML path (default: auto)")
    option(
        "--init",
        metavar="WEIGHTS",
        help="start from these weights: a run, a folder, a bundled name, a published file, or hf://ORG/REPO[/FILE][@REV]; `none` = "
        "random weights (default: those of the model preset)",
    )
    option("--out", type=Path, metavar="RUN", help="run folder (default: runs/MODEL-OBJECTIVE-DATA)")
    option("--no-lock", action="store_true", help="for a file system without locks: start no second run in this folder")
    option("--dry-run", action="store_true", help="print the settings and what they cost, write nothing")
    option("--plan", action="store_true", help="print memory, FLOPs and speed on 1 to 1024 GPUs, read and write nothing")
    option("--gpus", type=int, metavar="N", help="of a plan: how many GPUs, 1 to 1024 (default: a table of several)")
    option("--gpu", metavar="NAME", help="of a plan: a100-80, h100, h200, ... (default: this machine's, else h100)")
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the deepspeed launcher
    option("overrides", nargs="*", metavar="section.key=value", help="any setting, as --dry-run shows them")
    args = parser.parse_intermixed_args(argv)
    if not args.plan and not (args.gpus is None and args.gpu is None):
        parser.error("--gpus and --gpu belong to --plan")
    if args.plan and args.dry_run:
        parser.error("--plan and --dry-run: give one of them")
    return args


def config_of(args: argparse.Namespace) -> RunConfig:
    """The settings of a run or plan. Raises UserError where no data was given and the model is not made for the digits."""
    overrides, data = args.overrides, args.data or "digits"
    if args.init:
        weights = "null" if args.init == "none" else json.dumps(args.init, ensure_ascii=False)
        overrides = [*overrides, f"model.weights={weights}"]
    if args.plan or (args.data is None and "digits" not in args.model):
        from mclr.train.planning.plan import published_data

        overrides = [*published_data(args.model, data), *overrides]
    config = load(args.model, args.objective, data, args.engine, overrides)
    if not args.plan and args.data is None and "digits" not in config.model.name:
        side, images = "N", "images of your own"
        if config.data.name == "imagenet":
            side, images = str(config.data.resolution), f"ImageNet at {config.data.resolution} pixels"
        raise UserError(
            f"--model {args.model} needs {images}: give --data FOLDER, made by `mclr prepare images PHOTOS FOLDER --resolution {side}`"
        )
    return config


def main(argv: list[str] | None = None) -> int:
    rank, _, ranks = world()
    with on_signals(end_early if rank == 0 else signal.SIG_DFL):
        with report_once():
            args = parse(argv)
            config = config_of(args)
            if args.plan:
                from mclr.train.planning.plan import plan

                for line in plan(config, args.gpus, args.gpu) if rank == 0 else ():
                    answer(line)
                return 0
            refuse_missing(config.train.log_to)
            # only now: it imports torch, and a misspelt setting is answered at once
            from mclr.train.training.launch import describe, micro_batch_of, planned, start

            micro_batch = micro_batch_of(config, ranks)
            if args.dry_run:
                if rank == 0:
                    answer(dump(config) + "\n".join(describe(config, planned(config), micro_batch)))
                return 0
        out = args.out or Path("runs") / "-".join(Path(name).stem for name in (args.model, args.objective, args.data or "digits"))
        given = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
        return start(config, out, micro_batch, shlex.join(["mclr", "train", *given]), args.no_lock)


if __name__ == "__main__":
    run_and_exit(main)
