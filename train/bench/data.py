"""`python -m train.bench.data`: measures how many samples per second are read, and whether a training step would wait for them.

It reads the images of a dataset and, with --model, the latents or tokens of its cache. First a loop reads as fast as it can, for each
number of reader threads. Then it reads as training does: the samples of the next step are read ahead while a step runs. A sleep stands
for the step; it takes as long as a step at the images per second of --rate. The table gives the share of time that the loop waits for
samples, and the share that it copies them into a batch. A sleep leaves the CPU to the readers; a real step takes a part of it. Files
that were read before come from memory: measure data larger than the memory, or right after a start. Compare within one run.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mclr.configs.schema import load, load_data
from mclr.errors import UserError
from mclr.kernels.timing import above_0, number, table
from mclr.train.data.cache import cache_of, storage, through_cache
from mclr.train.data.dataset import READERS
from mclr.train.data.source import Source, open_images
from mclr.train.system.console import Parser, run
from mclr.train.training.build import open_source
from mclr.train.training.networks import build_encoder

EXAMPLE = """examples:
  python -m train.bench.data --data data/imagenet-512 --rate 100 400
  python -m train.bench.data --data data/imagenet-512 --model edm2-img512-l --rate 400 1600     also the cache of its latents"""
HEAD = ["samples", "readers", "step, images/s", "read, samples/s", "waiting", "worst step waits, ms", "copying"]


def open_sources(args: argparse.Namespace) -> Iterator[tuple[str, Source]]:
    """The sources to read, by name. Raises UserError if there is no dataset, or no cache for the model."""
    if args.model is None:
        yield "images", open_images(load_data(args.data).path, "train", seed=0)
        return
    config = load(args.model, "mle", args.data, "auto", args.overrides)
    source, encoder = open_source(config), build_encoder(config, torch.device("cpu"))
    if not storage(encoder, config.data)[1]:
        raise UserError(f"{args.model} models pixels, which have no cache: leave out --model")
    cached = through_cache(source, encoder, config.data, config.model)
    cache = cache_of(cached)
    if cache is None:
        how = "make one with `mclr prepare cache`, or leave out --model"
        raise UserError(f"{source.info.path} has no complete cache for {args.model}: {how}")
    yield "images", source
    yield cache.key.what, cached


def simulate(source: Source, first: int, steps: int, batch: int, sleep: float) -> list[tuple[float, float]]:
    """Of every step: (seconds until its last sample is read, seconds to copy its samples into a batch).

    A step takes `batch` samples, from position `first` on, and then sleeps. The first step is left out: it was not read ahead.
    """
    waits = []
    for positions in (range(start, start + batch) for start in range(first, first + (steps + 1) * batch, batch)):
        # this step's samples too, since nobody asked for those of the first step
        source.prefetch(range(positions.start, positions.stop + batch))
        indices, asked, coming = source.indices(positions), time.perf_counter(), source.coming
        for i in indices:
            if i in coming:
                coming[i].exception()
        read = time.perf_counter()
        source.batch(positions.start, batch)
        waits.append((read - asked, time.perf_counter() - read))
        time.sleep(sleep)
    return waits[1:]


def measure(sources: dict[str, Source], args: argparse.Namespace) -> list[list[Any]]:
    """A line of the table per source, number of readers and rate."""
    lines, images = [], args.steps * args.batch
    for name, source in sources.items():
        source.split.keep = False
        # every line reads other samples, as long as there are any
        place = itertools.count(0, images + 2 * args.batch)
        for readers, rate in [*((readers, math.inf) for readers in args.readers), *((READERS, rate) for rate in args.rate)]:
            source.split.readers = ThreadPoolExecutor(readers)
            waits = simulate(source, next(place), args.steps, args.batch, args.batch / rate)
            waiting, copying = map(sum, zip(*waits, strict=True))
            whole, asked = waiting + copying + images / rate, "as fast as it can" if rate == math.inf else number(rate)
            times = [f"{waiting / whole:.1%}", f"{1000 * max(waits)[0]:,.1f}", f"{copying / whole:.1%}"]
            lines.append([name, readers, asked, number(images / whole), *times])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.bench.data", description=__doc__, epilog=EXAMPLE)
    add, many, count = parser.add_argument, above_0(float), above_0(int)
    add("--data", required=True, metavar="D", help="preset or dataset folder")
    add("--model", help="measure also the cache of this preset's encoder")
    add("--readers", type=count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="threads (default: 1 2 4 8)")
    add("--rate", type=many, nargs="+", default=[100.0], metavar="R", help="images/s that one rank trains on (default: 100)")
    add("--batch", type=count, default=64, metavar="N", help="images per step of one rank (default: %(default)s)")
    add("--steps", type=count, default=20, metavar="N", help="steps of every row (default: %(default)s)")
    add("overrides", nargs="*", metavar="section.key=value", help="with --model, as in the run")
    args = parser.parse_intermixed_args(argv)
    if args.overrides and args.model is None:
        parser.error(f"{args.overrides[0]} has no effect without --model")
    print(table(HEAD, measure(dict(open_sources(args)), args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
