"""`python -m train.bench.ranks`: what a training step costs at every ZeRO stage on several ranks of this machine, and a checkpoint per GB.

The global batch is that of the preset, so that more ranks do the same work in smaller parts. Engines of one number of ranks live in one
set of processes and take turns, so that a slow minute of the machine hits each of them: read the ratios within a table.

Times are medians (20th to 80th percentile) of whole steps, data included. Memory is of one rank: tensors that are alive between two
steps, beyond those before the engine was built (weights, moments, averages); and their most within a step, on a GPU. forced: share of
the step that EDM2's forced weight normalisation takes, what goes between ranks included. local: plain torch, without DeepSpeed.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.train.data.write import open_or_prepare
from mclr.train.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mclr.train.engine.ema import averages_of
from mclr.train.system.console import Parser, run_and_exit
from mclr.train.system.ranks import group, own_device, world
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.step import train_step

WARM_UP, LIMIT = 2, 3600
KINDS = ("local", "zero0", "zero1", "zero2", "zero3")


def live_bytes() -> int:
    """Of all tensors that this process can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # not isinstance: that asks deprecated objects for their class
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Arm:
    """One engine and what its steps have cost so far."""

    def __init__(self, model: str, kind: str, overrides: list[str], rank: int, ranks: int):
        config = load(model, "mclr", "digits", kind, overrides)
        open_or_prepare("digits", config.data.path)
        device, before = own_device(), live_bytes()
        self.settings, self.share, self.first = config.train, config.train.batch // ranks, rank * config.train.batch // ranks
        self.task = build_task(config, open_source(config), build_networks(config, device), device, self.share)
        self.averages = averages_of(self.task.engine.shards(), config.train)
        self.seconds: list[float] = []
        self.forced = 0.0
        for _ in range(WARM_UP):
            self.step()
        self.seconds.clear()
        self.forced = 0.0
        self.memory = live_bytes() - before

    def step(self) -> None:
        settings, engine = self.settings, self.task.engine
        positions = range(self.first, self.first + self.share)
        self.first += settings.batch
        began = time.perf_counter()
        train_step(self.task, positions, self.share, settings.lr, lambda: False)
        for ema in self.averages.values():
            ema.update(engine.shards(), self.first, settings.batch)
        self.seconds.append(time.perf_counter() - began)
        # once more, which changes nothing but the last digits
        began = time.perf_counter()
        if self.task.normalised:
            engine.force_weights(self.task.normalised)
        self.forced += time.perf_counter() - began


def measure(model: str, overrides: list[str], rounds: int, out: Path) -> None:
    """On every rank: each engine's steps, in turn. Rank 0 leaves what it saw at `out`."""
    rank, _, ranks = world()
    kinds = KINDS if ranks == 1 else KINDS[1:]
    arms = {kind: Arm(model, kind, overrides, rank, ranks) for kind in kinds}
    for _ in range(rounds):
        for arm in arms.values():
            arm.step()
    found: dict[str, dict[str, Any]] = {}
    for kind, arm in arms.items():
        times = sorted(1000 * each for each in arm.seconds)
        low, high = times[round(0.2 * (rounds - 1))], times[round(0.8 * (rounds - 1))]
        ms = statistics.median(times)
        found[kind] = {"ms": ms, "low": low, "high": high, "images": 1000 * arm.settings.batch / ms, "memory": arm.memory}
        found[kind]["forced"] = 1000 * arm.forced / rounds / ms if arm.task.normalised else None
    if rank == 0:
        out.write_text(json.dumps(found))


def launch(model: str, ranks: int, rounds: int, overrides: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """measure() on so many ranks. Raises UserError with the last line they said where that fails."""
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


def table(model: str, found: dict[int, dict[str, dict[str, Any]]]) -> str:
    lines = [
        f"**{model}**\n",
        "| ranks | engine | ms per step (p20–p80) | time, first of these ranks = 1 | images/s | MiB per rank | forced |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks, rows in found.items():
        first = next(iter(rows.values()))["ms"]
        for kind, row in rows.items():
            forced = f"{100 * row['forced']:.1f} %" if row["forced"] is not None else ""
            cells = [f"{row['ms']:.0f} ({row['low']:.0f}–{row['high']:.0f})", f"{row['ms'] / first:.2f}", f"{row['images']:.0f}"]
            lines.append(f"| {ranks} | {kind} | {' | '.join(cells)} | {row['memory'] / 2**20:.1f} | {forced} |")
    return "\n".join(lines) + "\n"


def checkpoint_speed(gigabytes: float, rounds: int, folder: Path) -> str:
    """Writing, checking and reading checkpoints of this size, per GB."""
    count = int(gigabytes * 1e9 / 4 / 8)
    tensors = {"engine": {f"weight:{n}": torch.randn(count) for n in range(8)}}
    seconds: dict[str, list[float]] = {"written": [], "checked": [], "read": []}
    for images in range(1, rounds + 1):
        times = [time.perf_counter()]
        save_checkpoint(folder, images, tensors, {}, {}, keep=1)
        times.append(time.perf_counter())
        newest, _ = newest_checkpoint(folder)
        times.append(time.perf_counter())
        assert newest is not None
        loaded, _ = load_checkpoint(newest)
        # files are mapped: they are read when they are used
        sum(float(t.sum()) for t in loaded["engine"].values())
        times.append(time.perf_counter())
        for name, began, ended in zip(seconds, times, times[1:], strict=False):
            seconds[name].append((ended - began) / (8 * count * 4 / 1e9))
    parts = [f"{name} {statistics.median(each):.2f} s/GB ({min(each):.2f}–{max(each):.2f})" for name, each in seconds.items()]
    return f"A checkpoint of {gigabytes:g} GB, {rounds} times, fsync and checksums included: {', '.join(parts)}."


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.bench.ranks", description=__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every row; give them first")
    add("--model", nargs="+", default=["edm2-digits", "var-digits"], metavar="NAME", help="default: the two on digits")
    add("--ranks", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    add("--rounds", type=int, default=20, help="steps of every row (default: %(default)s)")
    add("--gigabytes", type=float, default=1.0, help="of the checkpoint (default: %(default)s)")
    add("--rank-out", type=Path, help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    for name, value in (("--rounds", args.rounds), ("--gigabytes", args.gigabytes), *(("--ranks", n) for n in args.ranks)):
        # not of nan either
        if not value > 0:
            parser.error(f"{name} {value}: must be > 0")
    if args.rank_out is not None:
        with group(True):
            measure(args.model[0], args.overrides, args.rounds, args.rank_out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model:
            # settings that are wrong are told before anything is launched
            load(model, "mclr", "digits", "zero3", args.overrides)
            found = {ranks: launch(model, ranks, args.rounds, args.overrides, Path(folder)) for ranks in args.ranks}
            print(table(model, found), flush=True)
        print(f"{checkpoint_speed(args.gigabytes, 3, Path(folder))} {os.cpu_count()} cores, torch {torch.__version__}.")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
