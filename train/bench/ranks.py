"""`python -m train.bench.ranks`: measures a training step at every ZeRO stage, on several ranks of this machine.

The global batch is that of the preset: more ranks do the same work in smaller parts. All engines of one number of ranks run in the same
processes and take turns: compare the times within one number of ranks.

Times are medians (20th to 80th percentile) of whole steps, with reading data. MiB per rank: tensors alive between two steps that the
engine added (weights, moments, averages). local: plain torch, without DeepSpeed.
"""

import argparse
import gc
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: the checkout comes first, since other installed packages may be named `models` or `kernels`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch._subclasses import FakeTensor

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.kernels.timing import Turn, above_0, number, spread, table, take_turns, time_cell
from mclr.train.data.write import open_or_prepare
from mclr.train.engine.ema import averages_of
from mclr.train.system.console import Parser, run_and_exit
from mclr.train.system.ranks import group, own_device, world
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.step import train_step

EXAMPLE = """example:
  python -m train.bench.ranks --rounds 5 --ranks 1 2"""
WARM_UP, LIMIT = 2, 3600
KINDS = ("local", "zero0", "zero1", "zero2", "zero3")
Row = dict[str, Any]


def bytes_of(things: Iterable[Any]) -> int:
    """Bytes of the tensors among these objects; each storage counts once."""
    storages = {}
    for thing in things:
        # issubclass: deprecated objects warn when isinstance asks for their class. Fake tensors have no memory and no address.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def live_bytes() -> int:
    """Bytes of all tensors in this process."""
    gc.collect()
    return bytes_of(gc.get_objects())


class Trained:
    """One engine and all that its steps need. memory: bytes of this rank that it added."""

    def __init__(self, model: str, kind: str, overrides: list[str], rank: int, ranks: int):
        config = load(model, "mclr", "digits", kind, overrides)
        open_or_prepare("digits", config.data.path)
        device, before = own_device(), live_bytes()
        self.settings, self.share, self.first = config.train, config.train.batch // ranks, rank * config.train.batch // ranks
        self.task = build_task(config, open_source(config), build_networks(config, device), device, self.share)
        self.averages = averages_of(self.task.engine.shards(), config.train)
        for step in range(WARM_UP):
            self.step(step)
        self.memory = live_bytes() - before

    def step(self, _: int) -> None:
        train_step(self.task, range(self.first, self.first + self.share), self.share, self.settings.lr, lambda: False)
        self.first += self.settings.batch
        for ema in self.averages.values():
            ema.update(self.task.engine.shards(), self.first, self.settings.batch)


def measure(model: str, overrides: list[str], rounds: int, out: Path) -> None:
    """Run on every rank: the engines take turns. Rank 0 writes its rows to `out`."""
    rank, _, ranks = world()
    engines = {kind: Trained(model, kind, overrides, rank, ranks) for kind in (KINDS if ranks == 1 else KINDS[1:])}
    turns = {kind: Turn(each.step, rounds) for kind, each in engines.items()}
    take_turns(turns, own_device())
    rows: dict[str, Row] = {}
    for kind, each in engines.items():
        row = spread(turns[kind].times) | {"memory": each.memory}
        rows[kind] = row | {"images": 1000 * each.settings.batch / row["ms"]}
    if rank == 0:
        out.write_text(json.dumps(rows))


def launch(model: str, ranks: int, rounds: int, overrides: list[str], folder: Path) -> dict[str, Row]:
    """Run measure() on so many ranks. Raises UserError with their last line if they fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"{model}-{ranks}.json"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(port)]
    command += [__file__, "--model", model, "--rounds", str(rounds), "--rank-out", str(out), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if ended.returncode:
        raise UserError(f"{ranks} ranks failed: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(out.read_text())


def ranks_table(found: dict[int, dict[str, Row]]) -> str:
    head = ["engine", "ranks", "ms per step (p20–p80)", "time, first of these ranks = 1", "images/s", "MiB per rank"]
    lines = []
    for ranks, rows in found.items():
        first = next(iter(rows.values()))["ms"]
        for kind, row in rows.items():
            numbers = [f"{row['ms'] / first:.2f}", number(row["images"]), f"{row['memory'] / 2**20:.1f}"]
            lines.append([kind, ranks, time_cell(row), *numbers])
    return table(head, lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.bench.ranks", description=__doc__, epilog=EXAMPLE)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every row; give them first")
    add("--model", nargs="+", default=["edm2-digits", "var-digits"], metavar="NAME", help="default: the two on digits")
    add("--ranks", nargs="+", type=above_0(int), default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    add("--rounds", type=above_0(int), default=20, metavar="N", help="steps of every row (default: %(default)s)")
    add("--rank-out", type=Path, help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.rank_out is not None:
        with group(True):
            measure(args.model[0], args.overrides, args.rounds, args.rank_out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model:
            # wrong settings raise here, before a launch
            load(model, "mclr", "digits", "zero3", args.overrides)
            found = {ranks: launch(model, ranks, args.rounds, args.overrides, Path(folder)) for ranks in args.ranks}
            print(f"**{model}**\n\n{ranks_table(found)}\n", flush=True)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
