"""`python -m kernels.bench`: how long every operation takes as plain torch, compiled, as others wrote it and as ours; tables and plots.

What keeps it honest: arms are checked before they are timed, and an operation of ours that is wrong prints no time. Arms take turns, round
by round, so that a slow minute hits all. A round is a batch of calls, the gaps between their launches included, over copies of the inputs
that exceed the GPU's L2. Bytes and FLOPs come from formulas, floors from a copy and a matrix product of the same run. `forward` keeps what
backward needs. `apart` is every arm's relative RMS distance from the first one's results at full size; beyond SAME, ours beyond 4
tolerances of the dtype, it prints no time. `error` is that from the definition in fp64, by kernels.op.check, on a CPU within seconds and
hence with sizes cut to the operation's `narrow`: fewer rows, the same compiled kernels. What torch.compile made is left out of it, it would
compile again. On a GPU ours is first checked at the tests' sizes and in all dtypes.

A row takes about a second (ROW_MS); after --minutes no shape is begun, and with --json FILE the next run goes on where this one ended.
Without a GPU shapes are cut to `narrow` before they are timed, in fp32, and those that become equal are timed once.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.arms import COMPARISONS, Arm, arms, sized
from kernels.choice import using
from kernels.compile import Parser
from kernels.op import DTYPES, TOLERANCE, Cost, Error, Op, Shape, as_tuple, cdiv, check, leaves, moved, triton
from kernels.registry import OPS
from kernels.results import PASSES, ROOT, Row, dump, load, machine, plot, publish, tables, write

# milliseconds of a round and of all rounds, and how many rounds that is at most and at least
BATCH_MS, WARM_UP_MS, ROW_MS, MOST_CALLS, LEAST_ROUNDS, ROUNDS = 2.0, 50.0, {"cuda": 1000.0, "cpu": 300.0}, 200, 3, 20
SAME = 0.05
CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, those of them that get gradients, and the gradients from above; none where the operation has none."""

    inputs: dict[str, Any]
    wanted: list[Tensor]
    upstream: list[Tensor]

    def copy(self) -> "Sample":
        inputs = moved(self.inputs, torch.clone)
        return Sample(inputs, list(leaves(inputs).values()), [t.clone() for t in self.upstream])


@dataclass
class Entry:
    """One arm's forward, or forward and backward, while it is measured. allowed: of `apart`. why: it has no time, since."""

    name: str
    arm: Arm
    backward: bool
    allowed: float
    why: str = ""
    calls: int = 1
    rounds: int = 0
    peak: int | None = None
    apart: float | None = None
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def call(self, sample: Sample) -> list[Tensor]:
        outputs = as_tuple(self.arm.call(**sample.inputs))
        return [*outputs, *(torch.autograd.grad(outputs, sample.wanted, sample.upstream) if self.backward else ())]

    def clock(self, copies: list[Sample], first: int, calls: int, device: torch.device) -> tuple[float, float]:
        with using(self.arm.kernels):
            return clocked(lambda i: self.call(copies[(first + i) % len(copies)]), calls, device)


def samples(op: Op, device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Sample, list[Sample]]:
    """Inputs, and copies of them to be timed, about twice as many bytes as the GPU's L2 holds."""
    inputs = moved(op.draw(shape, dtype, torch.Generator().manual_seed(0)), lambda t: t.to(device))
    wanted = list(leaves(inputs).values())
    with using("torch"):
        upstream = [torch.randn_like(out) for out in as_tuple(op.run(**inputs))] if wanted else []
    drawn = Sample(inputs, wanted, upstream)
    held = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    count = min(max(2, cdiv(2 * held, op.cost(shape, dtype).forward_bytes)), 256)
    return drawn, [drawn.copy() for _ in range(count)]


def clocked(work: Callable[[int], Any], calls: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds per call of work(0), work(1), ...: of the device (a CPU: all), and of the host until everything was launched."""
    gpu = device.type == "cuda"
    if gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
    began = time.perf_counter()
    for i in range(calls):
        work(i)
    host = 1000 * (time.perf_counter() - began)
    if gpu:
        end.record()
        torch.cuda.synchronize(device)
    return (start.elapsed_time(end) if gpu else host) / calls, host / calls


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest relative RMS difference among the results; NaN where one is."""

    def one(f: Tensor, t: Tensor) -> Tensor:
        difference = (f.float() - t.float()).norm()
        return torch.where(difference == 0, difference, difference / t.float().norm())

    return torch.stack([one(f, t) for f, t in zip(found, true, strict=True)]).max().item()


def warm_up(entry: Entry, first: list[Tensor] | None, drawn: Sample, copies: list[Sample], device: torch.device) -> list[Tensor]:
    """Fill in an entry's distance from the first arm's results, its memory, how much of it is timed. Returns its results."""
    # an arm may work in place
    sample = drawn.copy()
    results = [t.detach() for t in entry.call(sample)]
    if first is not None:
        entry.apart = distance(results, first)
        if not entry.apart <= entry.allowed:
            entry.why = f"a result is {entry.apart:.2g} from the first arm's"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        entry.call(sample)
        entry.peak = torch.cuda.max_memory_allocated(device) - before
    began, ms = time.perf_counter(), math.inf
    while ms == math.inf or 1000 * (time.perf_counter() - began) < WARM_UP_MS:
        ms = min(ms, entry.clock(copies, 0, 1 if ms == math.inf else 5, device)[0])
    entry.calls = min(max(1, round(BATCH_MS / ms)), MOST_CALLS)
    entry.rounds = min(ROUNDS, max(LEAST_ROUNDS, int(ROW_MS[device.type] / (entry.calls * ms))))
    return results


def take_turns(entries: list[Entry], copies: list[Sample], device: torch.device) -> None:
    """Time the entries round by round; each goes on through the copies where it was."""
    for done in range(max((entry.rounds for entry in entries), default=0)):
        for entry in (each for each in entries if done < each.rounds):
            ms, host = entry.clock(copies, done * entry.calls, entry.calls, device)
            entry.times.append(ms)
            entry.host.append(host)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def excess(errors: list[Error]) -> str:
    """What is wrong with the first of them that is too large; empty where none is."""
    return next((f"{e.name} is {e.relative:.2g} off, allowed {e.allowed:.2g}" for e in errors if not e.ok), "")


def wrong_when_tiny(op: Op, device: torch.device) -> str:
    """What is wrong with ours on this device at the sizes of the tests, in fp32, fp16 or bf16; empty where nothing is."""
    ours = {name: arm for name, arm in arms(op, device.type == "cuda").items() if arm and name.startswith("ours/")}
    for name, arm in ours.items():
        for at, shape in op.tiny.items():
            for word, dtype in DTYPES.items():
                try:
                    says = excess(check(replace(op, run=arm.call), device, dtype, shape, arm.kernels))
                except Exception as error:
                    says = brief(error)
                if says:
                    return f"{name}: {at}, {word}: {says}"
    return ""


def measure(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, peaks: dict[str, float], red: str = "") -> list[Row]:
    """Check every arm of an operation at one shape, time those that are right; a row per arm and pass.

    red: what is known to be wrong with ours; then there is no time.
    """
    # what was compiled at another shape would come back with dynamic sizes
    torch.compiler.reset()
    made = arms(op, device.type == "cuda")
    present = {name: arm for name, arm in made.items() if arm}
    errors: dict[str, list[Error]] = {name: [] for name in present}
    why = dict.fromkeys(present, "")
    for name, arm in present.items():
        # of others' code any error may come; it is a row's to tell
        try:
            if not arm.compiled:
                errors[name] = check(replace(op, run=arm.call), device, dtype, shape | op.narrow, arm.kernels)
        except Exception as error:
            why[name] = brief(error)
        if name.startswith("ours/"):
            why[name] = why[name] or excess(errors[name])
    red = red or next((f"{name}: {why[name]}" for name in present if name.startswith("ours/") and why[name]), "")
    why = {name: red or why[name] for name in present}
    copies: list[Sample] = []
    try:
        if not red:
            drawn, copies = samples(op, device, dtype, shape)
    except torch.OutOfMemoryError as error:
        why = dict.fromkeys(present, brief(error))
    entries: list[Entry] = []
    for backward in (False, True) if not copies or drawn.wanted else (False,):
        first = None
        for name, arm in present.items():
            allowed = 4 * TOLERANCE[dtype] if name.startswith("ours/") else SAME
            entry = Entry(name, arm, backward, allowed, why[name] or (arm.forward_only if backward else ""))
            entries.append(entry)
            if not entry.why:
                try:
                    with using(arm.kernels):
                        results = warm_up(entry, first, drawn, copies, device)
                    first = results if name == next(iter(present)) else first
                except Exception as error:
                    entry.why = brief(error)
    take_turns([entry for entry in entries if not entry.why], copies, device)
    absent = [{"arm": name, "pass": PASSES[0], "why": "not installed", "red": False} for name in made if name not in present]
    rows = [row_of(entry, op.cost(shape, dtype), errors[entry.name], peaks) for entry in entries]
    return [row | peaks for row in rows + absent]


def row_of(entry: Entry, cost: Cost, errors: list[Error], peaks: dict[str, float]) -> Row:
    least, flops = cost.forward_bytes, cost.forward_flops
    if entry.backward:
        least, flops = least + cost.backward_bytes, flops + cost.backward_flops
    row: Row = {"arm": entry.name, "pass": PASSES[entry.backward], "why": entry.why, "bytes": least, "flops": flops}
    # what does not fit this GPU is not wrong
    row["red"] = entry.name.startswith("ours/") and bool(entry.why) and "OutOfMemoryError" not in entry.why
    row["floor_ms"] = max(least / peaks["copy_gbs"] / 1e6, flops / peaks["product_tflops"] / 1e9)
    row["error"] = max((e.relative for e in errors), default=None)
    row["largest"] = max((e.largest for e in errors), default=None)
    row |= {"apart": entry.apart, "peak_bytes": entry.peak}
    if entry.why:
        return row
    ms, p20, p80 = (sorted(entry.times)[round(share * (len(entry.times) - 1))] for share in (0.5, 0.2, 0.8))
    host = statistics.median(entry.host)
    return row | {"ms": ms, "p20": p20, "p80": p80, "host_ms": host, "rounds": len(entry.times), "calls": entry.calls}


def reached(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in this run: GB/s of a copy (read and written), TFLOP/s of a matrix product."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    b, m = torch.zeros_like(a), torch.randn(side, side, device=device).to(dtype)
    work: tuple[Callable[[int], Any], ...] = (lambda i: b.copy_(a), lambda i: m @ m)
    copy, product = (min(clocked(f, 5, device)[0] for _ in range(5)) for f in work)
    return {"copy_gbs": 2 * size / copy / 1e6, "product_tflops": 2 * side**3 / product / 1e9}


def measure_all(todo: list[tuple[Op, str, Shape]], args: argparse.Namespace, device: torch.device, until: float) -> list[Row]:
    """Rows of everything to do, those that args.json holds among them; it gets the new ones, shape by shape."""
    facts, peaks = machine(device) | {"dtype": args.dtype}, None
    held = load(args.json) if args.json else []
    rows: list[Row] = []
    # on a CPU the tests look there
    tiny: dict[str, str] = {} if device.type == "cuda" else {op.name: "" for op, _, _ in todo}
    new = left = 0
    for op, name, shape in todo:
        same, start = facts | {"op": op.name, "shape": name, "sizes": shape}, time.perf_counter()
        found = [row for row in held if same.items() <= row.items()]
        if not found and start > until:
            left += 1
        elif not found:
            new, peaks = new + 1, peaks or reached(device, DTYPES[args.dtype])
            if op.name not in tiny:
                tiny[op.name] = wrong_when_tiny(op, device)
            found = [same | row for row in measure(op, shape, DTYPES[args.dtype], device, peaks, tiny[op.name])]
            held += found
            if args.json:
                write(args.json, dump(held))
            print(f"{op.name}, {name}: {len(found)} rows in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rows += found
    print(f"{new} shapes measured, {len(todo) - new - left} were there", file=sys.stderr)
    if left:
        print(f"{left} shapes are left, since {args.minutes:g} minutes are over: with --json FILE the same command goes on\n")
    return rows


def base_rows(args: argparse.Namespace, mine: list[Row]) -> list[Row]:
    """Ours of the checkout args.base, as arm `base`: measured by a process of its own, which cannot take turns with this one.

    control: the time of its first arm over that of the same arm here, 1 on a steady machine; NaN where its first arm is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "base.json"
        command = [sys.executable, "-m", "kernels.bench", "--json", str(file), "--dtype", args.dtype, "--shapes", args.shapes]
        command += ["--minutes", str(args.minutes), "--only", *args.only]
        done = subprocess.run(command, cwd=args.base, capture_output=True, text=True)
        if done.returncode == 2 or not file.exists():
            raise ValueError(f"--base {args.base}: {(done.stderr.strip() or 'no rows').splitlines()[-1]}")
        theirs = load(file)
    first: dict[tuple[str, str, str], Row] = {}
    for row in mine:
        first.setdefault((row["op"], row["shape"], row["pass"]), row)
    rows, controls = [], {}
    for row in theirs:
        place = row["op"], row["shape"], row["pass"]
        if place in first and row["arm"] == first[place]["arm"]:
            controls[place] = row.get("ms", math.nan) / first[place].get("ms", math.nan)
        elif place in first and row["arm"] == ("ours/torch" if row["family"] == "cpu" else "ours/triton"):
            rows.append(row | {"arm": "base", "control": controls.get(place, math.nan)})
    return rows


def interpret(names: list[str]) -> None:
    """Print as JSON, by operation, how many errors were looked at, and the worst; at the tiny sizes, in Triton's interpreter.

    bf16 is left out, which the interpreter gets wrong without a word.
    """
    found: dict[str, tuple[int, float, str]] = {}
    for name in names:
        cases = [(dtype, *shape) for dtype in ("fp32", "fp16") for shape in OPS[name].tiny.items()]
        errors = [(e, f"{at}, {dtype}") for dtype, at, shape in cases for e in check(OPS[name], "cpu", DTYPES[dtype], shape)]
        worst, where = max(errors, key=lambda error: (not error[0].ok, error[0].relative / error[0].allowed))
        found[name] = len(errors), worst.relative / worst.allowed, f"{where}: {worst.name}"
    print(json.dumps(found))


def without_gpu(names: list[str]) -> bool:
    """Print a line per operation: its kernels in Triton's interpreter and, by kernels.compile, compiled for a Hopper GPU and bf16.

    Returns false where an error is too large or a kernel above its bounds.
    """

    def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        # which of the two Triton does is decided when it is imported
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

    program = "import sys; from kernels.bench import interpret; interpret(sys.argv[1:])"
    interpreter = python("-c", program, *names, TRITON_INTERPRET="1")
    compiler = python("-m", "kernels.compile", "--arch", "90", "--dtype", "bf16", "--only", *names)
    red = [done.stderr.strip() or done.stdout.strip() for done in (interpreter, compiler) if done.returncode]
    red = [said.splitlines()[-1] for said in red]
    checked = {} if interpreter.returncode else json.loads(interpreter.stdout.splitlines()[-1])
    reports = [line.strip("| ").split(" | ") for line in compiler.stdout.splitlines() if line.startswith("| ")]
    print(
        "| ours/triton | checks, fp32 and fp16 | worst error, allowed = 1 | kernels | registers | bytes spilled | bytes shared |"
    )
    print("| --- " + "| ---: " * 6 + "|")
    for name in names:
        count, worst, where = checked.get(name, (0, math.nan, ""))
        taken = [[int(cell.split()[0]) for cell in report[-3:]] for report in reports if report[0] == name]
        red += [] if worst <= 1 or not where else [f"{name}, {where} is {worst:.2g} of what is allowed"]
        print(f"| {name} | {count} | {worst:.2f} | {len(taken)} |", *(f"{max(column)} |" for column in zip(*taken, strict=True)))
    print("\n" + "".join(f"RED: {line}\n\n" for line in red), end="", flush=True)
    return not red


def main(argv: list[str] | None = None) -> int:
    gpu, began, right = torch.cuda.is_available(), time.perf_counter(), True
    parser = Parser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, dtype, names = parser.add_argument, "bf16" if gpu else "fp32", [*OPS, *COMPARISONS]
    add("--only", nargs="+", choices=names, default=names, metavar="OP", help="of %(choices)s (default: all)")
    add("--dtype", choices=["bf16", "fp32"], default=dtype, help="of the activations (default here: %(default)s)")
    add("--shapes", default="", metavar="TEXT", help="those that have TEXT in their names")
    add("--minutes", type=float, default=7 if gpu else 2.5, help="no shape is begun after these (default here: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep rows there; what it has of this machine and code is not measured again")
    add("--plot", type=Path, metavar="FOLDER", help="draw roofline.png and bars-OP.png")
    add("--base", type=Path, metavar="DIR", help="a checkout of another revision, whose operations are measured too")
    add("--publish", type=Path, metavar="FILE", help="measure nothing: put the GPU rows of FILE into kernels/RESULTS.*")
    args = parser.parse_args(argv)
    ops = [OPS.get(name) or COMPARISONS[name] for name in args.only]
    todo = [(op, name, shape) for op in ops for name, shape in sized(op, gpu).items() if args.shapes in name]
    try:
        if args.publish:
            publish(args.publish)
            return 0
        wrong = {
            f"--shapes {args.shapes}: in no shape's name": not todo,
            f"--json {args.json}: no such folder": args.json and not args.json.parent.is_dir(),
            f"--base {args.base}: no checkout of this project": args.base and not (args.base / "kernels/bench.py").exists(),
            "--plot: matplotlib is not installed": args.plot and importlib.util.find_spec("matplotlib") is None,
        }
        for says in (says for says, is_wrong in wrong.items() if is_wrong):
            raise ValueError(says)
        if args.plot:
            args.plot.mkdir(parents=True, exist_ok=True)
        own = [op.name for op in ops if op.name in OPS]
        if not gpu:
            print("No GPU here: checks, compilation and the paths of a CPU; nothing below says how fast a GPU is.\n", flush=True)
            if triton is None:
                print("ours/triton: not installed\n")
            elif own:
                right = without_gpu(own)
        rows = measure_all(todo, args, torch.device("cuda" if gpu else "cpu"), began + 60 * args.minutes)
        if args.base:
            rows += base_rows(args, rows)
        print(tables(rows))
        if args.plot and rows:
            plot(rows, args.plot)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if right and not any(row["red"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
