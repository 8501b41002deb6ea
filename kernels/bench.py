"""`python -m kernels.bench`: times every operation in plain torch, compiled, in other people's code and in ours.

examples:
  python -m kernels.bench --json gpu.json
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
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mclr.kernels.choice import using
from mclr.kernels.op import DTYPES, TOLERANCE, Op, Shape, as_tuple, cdiv, compare, leaves, moved, triton
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, Row, dump, load, machine, publish, tables, write
from mclr.kernels.timing import Parser, Turn, above_0, brief, rates, spread, take_turns

# milliseconds of a round, of the warm-up, of all rounds; most calls of a round; fewest and most rounds
BATCH_MS, WARM_UP_MS, ARM_MS, MOST_CALLS, LEAST_ROUNDS, ROUNDS = 2.0, 50.0, {"cuda": 1000.0, "cpu": 300.0}, 200, 3, 20
SAME = 0.05
CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Arm:
    """One way to compute an operation. kernels: the mode in which it runs (choice.using). allowed: how far from the first arm it may be."""

    call: Callable[..., Any]
    kernels: str = "torch"
    allowed: float = SAME


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, those of them that get gradients, and the upstream gradients."""

    inputs: dict[str, Any]
    wanted: list[Tensor]
    upstream: list[Tensor]

    def copy(self) -> "Sample":
        inputs = moved(self.inputs, torch.clone)
        return Sample(inputs, list(leaves(inputs).values()), [t.clone() for t in self.upstream])

    def pass_through(self, arm: Arm, backward: bool) -> list[Tensor]:
        """The outputs of the arm and, with `backward`, the gradients."""
        outputs = as_tuple(arm.call(**self.inputs))
        return [*outputs, *(torch.autograd.grad(outputs, self.wanted, self.upstream) if backward else ())]


def liger() -> Arm | None:
    """Liger's fused Linear and cross-entropy, with a value per token; None if Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def call(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
        tokens_RL = tokens_BL[index_R]
        weight, bias = weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype)
        return -loss(weight, hidden_RLD.flatten(0, 1), tokens_RL.flatten(), bias).view(tokens_RL.shape)

    return Arm(call)


def arms(op: Op, dtype: torch.dtype, gpu: bool) -> dict[str, Arm | None]:
    """Arms by name. The first is the definition; None: not installed. Make them anew for every shape, so that each is compiled for it."""
    near = 4 * TOLERANCE[dtype]
    found: dict[str, Arm | None] = {"eager": Arm(op.definition)}
    if gpu:
        found["torch.compile"] = Arm(torch.compile(op.definition, dynamic=False))
    if gpu and op.name == "token_logp":
        found["Liger"] = liger()
    found["ours/torch"] = Arm(op.run, "torch", near)
    if gpu:
        found["ours/triton"] = Arm(op.run, "triton", near) if triton else None
    return found


def sized(op: Op, gpu: bool) -> dict[str, Shape]:
    """The shapes to time, by name. On a CPU their sizes in `narrow` are cut, and equal shapes are timed once."""
    if gpu:
        return op.shapes
    cut: dict[str, Shape] = {}
    for name, shape in op.shapes.items():
        if shape | op.narrow not in cut.values():
            sizes = " ".join(f"{size}={n}" for size, n in op.narrow.items())
            cut[f"{re.sub(', [0-9]+ pairs', '', name)}, cut to {sizes}"] = shape | op.narrow
    return cut


def draw(op: Op, device: torch.device, dtype: torch.dtype, shape: Shape) -> Sample:
    inputs = moved(op.draw(shape, dtype, torch.Generator().manual_seed(0)), lambda t: t.to(device))
    with using("torch"):
        upstream = [torch.randn_like(out) for out in as_tuple(op.run(**moved(inputs, torch.clone)))]
    return Sample(inputs, list(leaves(inputs).values()), upstream)


def size(values: Any) -> int:
    """Bytes of the tensors among these values."""
    return sum(t.nbytes for t in tree_leaves(values) if isinstance(t, Tensor))


def copies_of(sample: Sample, device: torch.device) -> list[Sample]:
    """Copies to time. Their inputs together are three times as large as the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    return [sample.copy() for _ in range(min(max(2, cdiv(3 * cache, size(sample.inputs))), 256))]


def least_work(op: Op, sample: Sample) -> list[dict[str, int]]:
    """Of each pass: the bytes of its inputs and results, each read or written once, and the FLOPs of its matrix products."""
    meta = moved(sample.inputs, lambda t: t.to("meta"))
    wanted, read, results = list(leaves(meta).values()), size(meta), size(sample.upstream)
    with FlopCounterMode(display=False) as counter:
        outputs = as_tuple(op.definition(**meta))
        found = [{"bytes": read + results, "flops": counter.get_total_flops()}]
        if wanted:
            torch.autograd.grad(outputs, wanted, [torch.empty_like(out) for out in outputs])
            again = results + read * op.rereads + size(wanted)
            found.append({"bytes": found[0]["bytes"] + again, "flops": counter.get_total_flops()})
    return found


def distance(found: Iterable[Tensor], true: Iterable[Tensor]) -> float:
    """The largest relative RMS difference of a result; NaN if one is NaN."""
    each = [(f.float() - t.float()).norm() / t.float().norm().clamp_min(1e-30) for f, t in zip(found, true, strict=True)]
    return torch.stack(each).max().item()


def turn_of(arm: Arm, backward: bool, copies: list[Sample], device: torch.device) -> Turn:
    """Warm up one pass of an arm, and choose how many calls and rounds of it are timed."""
    turn = Turn(lambda i: copies[i % len(copies)].pass_through(arm, backward), 1, arm.kernels)
    began = time.perf_counter()
    while not turn.times or 1000 * (time.perf_counter() - began) < WARM_UP_MS:
        turn.take(device)
        turn.calls = 5
    ms = min(turn.times)
    calls = min(max(1, round(BATCH_MS / ms)), MOST_CALLS)
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(ARM_MS[device.type] / (calls * ms))))
    return Turn(turn.work, rounds, arm.kernels, calls)


def wrong_when_tiny(op: Op, device: torch.device) -> str:
    """Check ours on this device, at the sizes of the tests, in fp32, fp16 and bf16. Returns what is wrong, or an empty text."""
    ours = {name: arm for name, arm in arms(op, torch.float32, device.type == "cuda").items() if arm and name.startswith("ours/")}
    cases = [(name, arm, *each, *dtype) for name, arm in ours.items() for each in op.tiny.items() for dtype in DTYPES.items()]
    for name, arm, at, shape, word, dtype in cases:
        try:
            wrong = compare(replace(op, run=arm.call), draw(op, device, dtype, shape).inputs, dtype, arm.kernels)
        except Exception as error:
            wrong = [brief(error)]
        if wrong:
            return f"{name}: {at}, {word}: {wrong[0]}"
    return ""


def untimed(arm: str, why: str, red: bool = False) -> Row:
    return {"arm": arm, "why": why, "red": red, "apart": None, "peak_bytes": None, "passes": {}}


def measure(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, reached: dict[str, float]) -> list[Row]:
    """A row per arm at one shape: the times of its passes, if their results are near those of the first arm, else the reason."""
    # forget what was compiled at other shapes: torch would compile with dynamic sizes now
    torch.compiler.reset()
    try:
        drawn = draw(op, device, dtype, shape)
        copies = copies_of(drawn, device)
    except torch.OutOfMemoryError as error:
        return [untimed("eager", brief(error))]
    work = least_work(op, drawn)
    rows, turns, first = {}, dict[Any, Turn](), dict[bool, list[Tensor]]()
    for name, arm in arms(op, dtype, device.type == "cuda").items():
        row = rows[name] = untimed(name, "" if arm else "not installed")
        for backward in (False, True)[: len(work) if arm else 0]:
            try:
                assert arm is not None
                # a copy, since an arm may work in place
                sample = drawn.copy()
                with using(arm.kernels):
                    results = [t.detach() for t in sample.pass_through(arm, backward)]
                    row["apart"] = distance(results, first.setdefault(backward, results))
                    if not row["apart"] <= arm.allowed:
                        raise ArithmeticError(f"a result is {row['apart']:.2g} from the first arm's")
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                        before = torch.cuda.memory_allocated(device)
                        sample.pass_through(arm, backward)
                        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
                turns[name, backward] = turn_of(arm, backward, copies, device)
            except Exception as error:
                row["why"] = brief(error)
                break
    take_turns(turns, device)
    for (name, backward), turn in turns.items():
        floor = max(
            work[backward]["bytes"] / reached["copy_gbs"] / 1e6, work[backward]["flops"] / reached["product_tflops"] / 1e9
        )
        if turn.failed:
            rows[name]["why"] = turn.failed
        else:
            times = spread(turn.times) | {"host_ms": spread(turn.host)["ms"], "floor_ms": floor}
            rows[name]["passes"][PASSES[backward]] = times | work[backward]
    for name, row in rows.items():
        # too little memory is no fault of ours
        row["red"] = name.startswith("ours/") and row["why"] not in ("", "not installed") and "OutOfMemoryError" not in row["why"]
    return [row | reached for row in rows.values()]


def measure_all(todo: list[tuple[Op, str, Shape]], held: list[Row], args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows of all shapes in `todo`. Rows in `held` are not measured again; new ones go to args.json, shape by shape."""
    facts, until, dtype = machine(device) | {"dtype": args.dtype}, time.perf_counter() + 60 * args.minutes, DTYPES[args.dtype]
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
            new, reached = new + 1, reached or rates(device, dtype)
            if op.name not in tiny:
                tiny[op.name] = wrong_when_tiny(op, device)
            red = [untimed("ours", tiny[op.name], red=True) | reached] if tiny[op.name] else []
            found = [same | row for row in red or measure(op, shape, dtype, device, reached)]
            held += found
            if args.json:
                write(args.json, dump(held))
            print(f"{op.name}, {name}: {len(found)} rows in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rows += found
    print(f"shapes: {new} measured" + (f", {len(todo) - new - left} there already" if args.json else ""), file=sys.stderr)
    if left:
        print(f"--minutes {args.minutes:g} are over, shapes left: {left}. With --json FILE the same command goes on.\n")
    return rows


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = Parser("python -m kernels.bench", description=__doc__)
    add, names = partial(parser.add_argument, default=None), list(OPS)
    add("--only", nargs="+", choices=names, metavar="OP", help="of %(choices)s (default: all)")
    add("--dtype", choices=["bf16", "fp32"], help="of the activations (default: bf16 on a GPU, else fp32)")
    add("--shapes", metavar="TEXT", help="only shapes that have TEXT in their names")
    add("--minutes", type=above_0(float), help="begin no shape later than this (default: 7 on a GPU, else 2.5)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep the rows there; what is there from this machine and code is not measured again",
    )
    add(
        "--publish",
        type=Path,
        metavar="FILE",
        help="measure nothing; put the GPU rows of FILE into kernels/RESULTS.json and RESULTS.md",
    )
    args = parser.parse_args(argv)
    given = [f"--{name}" for name, value in vars(args).items() if name != "publish" and value is not None]
    args.dtype, args.minutes = args.dtype or ("bf16" if gpu else "fp32"), args.minutes or (7.0 if gpu else 2.5)
    ops = [op for name, op in OPS.items() if not args.only or name in args.only]
    todo = [(op, name, shape) for op in ops for name, shape in sized(op, gpu).items() if (args.shapes or "") in name]
    try:
        if args.publish:
            if given:
                raise ValueError(f"--publish measures nothing: leave {', '.join(given)} out")
            publish(args.publish)
            return 0
        if not todo:
            raise ValueError(f"--shapes {args.shapes}: no shape has this in its name")
        held = load(args.json) if args.json else []
        if args.json:
            write(args.json, dump(held))
        if not gpu:
            print("No GPU here: the times below are of a CPU, and say nothing about a GPU.\n", flush=True)
        rows = measure_all(todo, held, args, torch.device("cuda" if gpu else "cpu"))
        print(tables(rows))
    except OSError as error:
        parser.error(f"cannot use {error.filename} ({error.strerror})")
    except ValueError as error:
        parser.error(str(error))
    return 1 if any(row["red"] for row in rows) else 0


if __name__ == "__main__":
    # no traceback when the reader of the output is gone, or after Ctrl-C
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
