"""`python -m train.bench.data`: how many samples a second are read, and whether a step of training would wait for them.

Read are the images of a dataset (PNG in its shards) and, with --model, the latents or tokens of its cache. Two tables: samples a second
by number of reader threads; and a training loop whose step is a sleep, at stated speeds, with the READERS of training and the read-ahead
of train/training/loop.py, the samples of the next step while this one runs: what share of the time it waits for samples that are not
read yet, and copies them into a batch. A sleep leaves the CPU to the readers, of which a real step takes its share; and files that were
read before come from memory: measure data larger than that, or right after a start. Compare within one run.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mclr.configs.schema import load, load_data
from mclr.errors import UserError
from mclr.train.data.cache import cache_of, through_cache
from mclr.train.data.dataset import READERS
from mclr.train.data.source import Source, open_images
from mclr.train.system.console import Parser, run
from mclr.train.system.files import write_json
from mclr.train.training.build import open_source
from mclr.train.training.networks import build_encoder

EXAMPLE = """examples:
  python -m train.bench.data --data data/imagenet-512 --rate 100 400
  python -m train.bench.data --data data/imagenet-512 --model edm2-img512-l --rate 400 1600     the cache of its latents, too"""


def open_sources(args: argparse.Namespace) -> Iterator[tuple[str, Source]]:
    """What is read, by name. Raises UserError where there is no dataset, or no cache for the model."""
    if args.model is None:
        yield "images", open_images(load_data(args.data).path, "train", seed=0)
        return
    config = load(args.model, "mle", args.data, "auto", args.overrides)
    source, encoder = open_source(config), build_encoder(config, torch.device("cpu"))
    if not encoder.storage(config.data)[1]:
        raise UserError(f"{args.model} models pixels, of which there is no cache: leave out --model")
    cached = through_cache(source, encoder, config.data, config.model)
    cache = cache_of(cached)
    if cache is None:
        how = "make one with `mclr prepare cache`, or leave out --model"
        raise UserError(f"{source.info.path} has no complete cache for {args.model}: {how}")
    yield "images", source
    yield cache.key.what, cached


@dataclass(frozen=True)
class Waits:
    """Seconds of every step but the first, for which nobody has read ahead, in training as here: until the last sample is read, and
    to make a batch of them."""

    waiting: list[float]
    copying: list[float]


def simulate(source: Source, first: int, steps: int, batch: int, sleep: float) -> Waits:
    """Steps of `batch` samples from position `first` on, each of which then takes `sleep` seconds."""
    waits = Waits([], [])
    for positions in (range(start, start + batch) for start in range(first, first + (steps + 1) * batch, batch)):
        # its own too, which only the first step has not asked for yet
        source.prefetch(range(positions.start, positions.stop + batch))
        indices, asked, coming = source.order.indices(positions), time.perf_counter(), source.reader.coming
        for i in indices:
            if i in coming:
                coming[i].exception()
        read = time.perf_counter()
        source.batch(positions.start, batch)
        waits.waiting.append(read - asked)
        waits.copying.append(time.perf_counter() - read)
        time.sleep(sleep)
    return Waits(waits.waiting[1:], waits.copying[1:])


def measure(sources: dict[str, Source], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of both tables. waiting, copying: shares of the time; worst: wait in seconds."""
    read, loops = [], []
    for name, source in sources.items():
        source.split.keep = False
        # every row reads other samples, as long as there are others
        place = itertools.count(0, (args.steps + 2) * args.batch)
        for readers in args.readers:
            source.split.readers = ThreadPoolExecutor(readers)
            waits = simulate(source, next(place), args.steps, args.batch, sleep=0.0)
            speed = args.steps * args.batch / sum(waits.waiting + waits.copying)
            read.append({"source": name, "readers": readers, "per_second": speed})
        source.split.readers = ThreadPoolExecutor(READERS)
        for rate in args.rate:
            waits = simulate(source, next(place), args.steps, args.batch, args.batch / rate)
            waiting, copying = sum(waits.waiting), sum(waits.copying)
            whole = waiting + copying + args.steps * args.batch / rate
            shares = {"waiting": waiting / whole, "copying": copying / whole}
            loops.append({"source": name, "rate": rate, **shares, "worst": max(waits.waiting)})
    return {"read": read, "loops": loops}


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| samples | readers | samples/s |", "| --- | ---: | ---: |"]
    lines += [f"| {r['source']} | {r['readers']} | {r['per_second']:,.0f} |" for r in found["read"]]
    lines += ["", "| samples | step, images/s | waiting | worst step waits | copying |", "| --- | ---: | ---: | ---: | ---: |"]
    for r in found["loops"]:
        worst = f"{1000 * r['worst']:,.1f} ms"
        lines.append(f"| {r['source']} | {r['rate']:g} | {r['waiting']:.1%} | {worst} | {r['copying']:.1%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.bench.data", description=__doc__, epilog=EXAMPLE)
    add = parser.add_argument
    add("--data", required=True, metavar="D", help="preset or dataset folder")
    add("--model", help="measure also the cache of this preset's encoder")
    add("--readers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="threads (default: 1 2 4 8)")
    add("--rate", type=float, nargs="+", default=[100.0], metavar="R", help="images/s of a rank's step (default: 100)")
    add("--batch", type=int, default=64, metavar="N", help="images of a rank's step (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="of every row (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("overrides", nargs="*", metavar="section.key=value", help="with --model, as in the run")
    args = parser.parse_intermixed_args(argv)
    for name, values in (("readers", args.readers), ("rate", args.rate), ("batch", [args.batch]), ("steps", [args.steps])):
        for value in values:
            if not 0 < value < math.inf:
                parser.error(f"--{name} {value:g}: more than 0")
    if args.overrides and args.model is None:
        parser.error(f"{args.overrides[0]} has no effect without --model")
    found = measure(dict(open_sources(args)), args)
    print(tables(found))
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
