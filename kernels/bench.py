"""`python -m kernels.bench`: times every operation in plain torch, compiled, in other people's code and in ours; tables and a plot.

examples:
  python -m kernels.bench --json gpu.json --plot plots
  python -m kernels.bench --json gpu.json --only token_logp --shapes d30
  python -m kernels.bench --publish gpu.json

On a GPU our kernels are first checked against fp64, at small sizes in every dtype. Without a GPU our torch paths are timed: at shapes
cut to few rows, by default in fp32. No shape begins after --minutes; with --json FILE the same command goes on where it stopped.

Arms take turns, round by round. A round is several calls, with the gaps between their launches, over copies of the inputs that exceed
the cache. `forward` keeps what backward needs.

  ms        per call: median of the rounds, 20th to 80th percentile
  of floor  least time over measured time. The least time is what the bytes and FLOPs need at the rates of a copy and of a matrix product
            in this run. Above 100 % the machine was slower while these rates were measured
  *         the host took about as long to launch the call: a faster kernel would not show
  peak MiB  memory above the inputs, of the last pass
  apart     relative RMS difference from the first arm, the largest of outputs and gradients. An arm that is more than 0.05 apart (ours:
            4 times the tolerance of the dtype) gets no time
  RED       ours is wrong: the reason is shown, the operation has no times, the exit status is 1
"""

import argparse
import importlib.util
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclr.kernels.arms import Arm, arms, sized
from mclr.kernels.choice import using
from mclr.kernels.op import DTYPES, TOLERANCE, Cost, Op, Shape, as_tuple, cdiv, check, flat, leaves, moved
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, Row, dump, load, machine, plot, publish, tables, write
from mclr.kernels.timing import Parser, Turn, above_0, brief, rates, spread, take_turns

# milliseconds of a round, of the warm-up, of all rounds; most calls of a round; fewest and most rounds
BATCH_MS, WARM_UP_MS, ROW_MS, MOST_CALLS, LEAST_ROUNDS, ROUNDS = 2.0, 50.0, {"cuda": 1000.0, "cpu": 300.0}, 200, 3, 20
SAME = 0.05
CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, those of them that get gradients, and the upstream gradients (empty if nothing gets gradients)."""

    inputs: dict[str, Any]
    wanted: list[Tensor]
    upstream: list[Tensor]

    def copy(self) -> "Sample":
        inputs = moved(self.inputs, torch.clone)
        return Sample(inputs, list(leaves(inputs).values()), [t.clone() for t in self.upstream])


@dataclass
class Entry:
    """The forward of one arm, or its forward and backward. turn.failed: why there is no time. apart, peak: columns of the table."""

    name: str
    arm: Arm
    backward: bool
    turn: Turn
    apart: float | None = None
    peak: int | None = None

    def call(self, sample: Sample) -> list[Tensor]:
        outputs = as_tuple(self.arm.call(**sample.inputs))
        return [*outputs, *(torch.autograd.grad(outputs, sample.wanted, sample.upstream) if self.backward else ())]


def is_ours(arm: str) -> bool:
    return arm.startswith("ours/")


def draw(op: Op, device: torch.device, dtype: torch.dtype, shape: Shape) -> Sample:
    inputs = moved(op.draw(shape, dtype, torch.Generator().manual_seed(0)), lambda t: t.to(device))
    wanted = list(leaves(inputs).values())
    with using("torch"):
        upstream = [torch.randn_like(out) for out in as_tuple(op.run(**inputs))] if wanted else []
    return Sample(inputs, wanted, upstream)


def copies_of(sample: Sample, device: torch.device) -> list[Sample]:
    """Copies to time. Their inputs together are three times as large as the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    size = sum(t.nbytes for t in flat(sample.inputs).values() if isinstance(t, Tensor))
    return [sample.copy() for _ in range(min(max(2, cdiv(3 * cache, size)), 256))]


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest relative RMS difference of a result; NaN if one is NaN."""

    def one(f: Tensor, t: Tensor) -> Tensor:
        difference = (f.float() - t.float()).norm()
        return torch.where(difference == 0, difference, difference / t.float().norm())

    return torch.stack([one(f, t) for f, t in zip(found, true, strict=True)]).max().item()


def prepare(
    entry: Entry, first: list[Tensor] | None, allowed: float, drawn: Sample, copies: list[Sample], device: torch.device
) -> list[Tensor]:
    """Warm an entry up, set its apart, peak and turn, and return its results. first: the results of the first arm.

    allowed: how large apart may be.
    """
    # a copy, since an arm may work in place
    sample = drawn.copy()
    with using(entry.arm.kernels):
        results = [t.detach() for t in entry.call(sample)]
        if first is not None:
            entry.apart = distance(results, first)
            if not entry.apart <= allowed:
                entry.turn.failed = f"a result is {entry.apart:.2g} from the first arm's"
                return results
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            entry.call(sample)
            entry.peak = torch.cuda.max_memory_allocated(device) - before
    entry.turn = Turn(lambda i: entry.call(copies[i % len(copies)]), 1, entry.arm.kernels)
    began = time.perf_counter()
    while not entry.turn.times or 1000 * (time.perf_counter() - began) < WARM_UP_MS:
        entry.turn.take(device)
        entry.turn.calls = 5
    ms = min(entry.turn.times)
    calls = min(max(1, round(BATCH_MS / ms)), MOST_CALLS)
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(ROW_MS[device.type] / (calls * ms))))
    entry.turn = replace(entry.turn, calls=calls, rounds=rounds, done=0, times=[], host=[])
    return results


def wrong_when_tiny(op: Op, device: torch.device) -> str:
    """Check ours on this device, at the sizes of the tests, in fp32, fp16 and bf16. Returns what is wrong, or an empty text."""
    ours = {name: arm for name, arm in arms(op, device.type == "cuda").items() if arm and is_ours(name)}
    cases = [(name, arm, *each, *dtype) for name, arm in ours.items() for each in op.tiny.items() for dtype in DTYPES.items()]
    for name, arm, at, shape, word, dtype in cases:
        try:
            errors = check(replace(op, run=arm.call), device, dtype, shape, arm.kernels)
            says = next((f"{e.name} is {e.relative:.2g} off, allowed {e.allowed:.2g}" for e in errors if not e.ok), "")
        except Exception as error:
            says = brief(error)
        if says:
            return f"{name}: {at}, {word}: {says}"
    return ""


def measure(
    op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, reached: dict[str, float], red: str = ""
) -> list[Row]:
    """Time every arm of an operation at one shape if its results are near those of the first arm. Returns a row per arm and pass.

    red: what is wrong with ours, if that is known; then there are no times.
    """
    # forget what was compiled at other shapes: torch would compile with dynamic sizes now
    torch.compiler.reset()
    made = arms(op, device.type == "cuda")
    present = {name: arm for name, arm in made.items() if arm}
    why, copies = red, list[Sample]()
    try:
        if not red:
            drawn = draw(op, device, dtype, shape)
            copies = copies_of(drawn, device)
    except torch.OutOfMemoryError as error:
        why = brief(error)
    entries: list[Entry] = []
    for backward in (False, True) if not copies or drawn.wanted else (False,):
        first = None
        for name, arm in present.items():
            entry = Entry(name, arm, backward, Turn(lambda i: None, 0, failed=why))
            entries.append(entry)
            try:
                if not why:
                    results = prepare(entry, first, 4 * TOLERANCE[dtype] if is_ours(name) else SAME, drawn, copies, device)
                    first = results if name == next(iter(present)) else first
            except Exception as error:
                entry.turn.failed = brief(error)
    take_turns({i: entry.turn for i, entry in enumerate(entries)}, device)
    absent = [{"arm": name, "pass": PASSES[0], "why": "not installed", "red": False} for name in made if name not in present]
    return [row | reached for row in [*(row_of(entry, op.cost(shape, dtype), reached) for entry in entries), *absent]]


def row_of(entry: Entry, cost: Cost, reached: dict[str, float]) -> Row:
    turn, why = entry.turn, entry.turn.failed
    least, flops = cost.forward_bytes, cost.forward_flops
    if entry.backward:
        least, flops = least + cost.backward_bytes, flops + cost.backward_flops
    row: Row = {"arm": entry.name, "pass": PASSES[entry.backward], "why": why, "bytes": least, "flops": flops}
    # too little memory is no fault of ours
    row["red"] = is_ours(entry.name) and bool(why) and "OutOfMemoryError" not in why
    row["floor_ms"] = max(least / reached["copy_gbs"] / 1e6, flops / reached["product_tflops"] / 1e9)
    row |= {"apart": entry.apart, "peak_bytes": entry.peak}
    if not why:
        row |= spread(turn.times) | {"host_ms": spread(turn.host)["ms"], "rounds": turn.rounds, "calls": turn.calls}
    return row


def measure_all(todo: list[tuple[Op, str, Shape]], held: list[Row], args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows of all shapes in `todo`. Rows in `held` are not measured again; new ones go to args.json, shape by shape."""
    facts, until = machine(device) | {"dtype": args.dtype}, time.perf_counter() + 60 * args.minutes
    reached: dict[str, float] = {}
    rows: list[Row] = []
    # on a CPU the tests check ours
    tiny: dict[str, str] = {} if device.type == "cuda" else {op.name: "" for op, _, _ in todo}
    new = left = 0
    for op, name, shape in todo:
        same, start = facts | {"op": op.name, "shape": name, "sizes": shape}, time.perf_counter()
        found = [row for row in held if same.items() <= row.items()]
        if not found and start > until:
            left += 1
        elif not found:
            new, reached = new + 1, reached or rates(device, DTYPES[args.dtype])
            if op.name not in tiny:
                tiny[op.name] = wrong_when_tiny(op, device)
            found = [same | row for row in measure(op, shape, DTYPES[args.dtype], device, reached, tiny[op.name])]
            held += found
            if args.json:
                write(args.json, dump(held))
            print(f"{op.name}, {name}: {len(found)} rows in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rows += found
    print(f"shapes: {new} measured" + (f", {len(todo) - new - left} there already" if args.json else ""), file=sys.stderr)
    if left:
        print(f"--minutes {args.minutes:g} are over, shapes left: {left}. With --json FILE the same command goes on.\n")
    return rows


def held_rows(args: argparse.Namespace) -> list[Row]:
    """The rows in args.json. Makes the folder args.plot. Raises ValueError if one of them cannot be written."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed")
    held = load(args.json) if args.json else []
    makers = {args.json: lambda path: write(path, dump(held)), args.plot: lambda path: path.mkdir(parents=True, exist_ok=True)}
    for path, make in makers.items():
        try:
            if path:
                make(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror})") from None
    return held


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = Parser("python -m kernels.bench", description=__doc__)
    add, dtype, names = parser.add_argument, "bf16" if gpu else "fp32", list(OPS)
    add("--only", nargs="+", choices=names, default=names, metavar="OP", help="of %(choices)s (default: all)")
    add("--dtype", choices=["bf16", "fp32"], default=dtype, help="of the activations (default here: %(default)s)")
    add("--shapes", default="", metavar="TEXT", help="only shapes that have TEXT in their names")
    add(
        "--minutes",
        type=above_0(float),
        default=7.0 if gpu else 2.5,
        help="begin no shape later than this (default here: %(default)s)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep the rows there; what this machine and code have measured is not measured again",
    )
    add("--plot", type=Path, metavar="FOLDER", help="draw roofline.png there: every time against its floor")
    add(
        "--publish",
        type=Path,
        metavar="FILE",
        help="measure nothing; put the GPU rows of FILE into kernels/RESULTS.json and RESULTS.md",
    )
    args = parser.parse_args(argv)
    ops = [OPS[name] for name in dict.fromkeys(args.only)]
    todo = [(op, name, shape) for op in ops for name, shape in sized(op, gpu).items() if args.shapes in name]
    try:
        if args.publish:
            given = [f"--{name}" for name, value in vars(args).items() if name != "publish" and value != parser.get_default(name)]
            if given:
                raise ValueError(f"--publish measures nothing: leave {', '.join(given)} out")
            publish(args.publish)
            return 0
        if not todo:
            raise ValueError(f"--shapes {args.shapes}: no shape has this in its name")
        held = held_rows(args)
        if not gpu:
            print("No GPU here: the times below are of a CPU, and say nothing about a GPU.\n", flush=True)
        rows = measure_all(todo, held, args, torch.device("cuda" if gpu else "cpu"))
        print(tables(rows))
        if args.plot and rows:
            print(f"wrote {plot(rows, args.plot)}", file=sys.stderr)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 1 if any(row["red"] for row in rows) else 0


if __name__ == "__main__":
    # no traceback when the reader of the output is gone, or after Ctrl-C
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
