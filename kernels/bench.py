"""`python -m kernels.bench`: how long every operation takes as plain torch, compiled, as others wrote it and as ours; tables and plots.

On a GPU our kernels are first checked at small sizes in every dtype. Without one, at every run: they are checked in Triton's interpreter
and compiled; then our torch paths are timed, in fp32 by default, at shapes cut to few rows, and those that become equal once.
A shape takes seconds; after --minutes none is begun, and with --json FILE the same command goes on where it ended.

Arms are checked before they are timed, then take turns, round by round, so that a slow minute hits all. A round is a batch of calls, the
gaps between their launches included, over copies of the inputs that exceed the GPU's L2. `forward` keeps what backward needs.

  ms        per call: median of the rounds, 20th to 80th percentile
  of floor  share of that time which its bytes and FLOPs, by formula, need at the rates of a copy and a matrix product in this run
  *         the host took about as long to launch it: a faster kernel would not show
  peak MiB  memory above the inputs, of forward and backward where there is one
  error     relative RMS distance from the definition in fp64, worst of outputs and gradients, and the largest absolute one, with sizes cut
            to fewer rows; of what torch.compile made there is none, it would compile again
  apart     relative RMS distance from the first arm's results at full size; above 0.05, ours above 4 tolerances of the dtype, no time
  RED       ours is wrong: says what, the operation has no times, the exit status is 1
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

from mclr.kernels.arms import COMPARISONS, Arm, arms, sized
from mclr.kernels.choice import using
from mclr.kernels.compile import Parser
from mclr.kernels.op import DTYPES, TOLERANCE, Cost, Error, Op, Shape, as_tuple, cdiv, check, leaves, moved, triton
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, ROOT, Row, dump, load, machine, plot, publish, tables, write

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


def shapes(count: int) -> str:
    return f"{count} shape{'' if count == 1 else 's'}"


def measure_all(
    todo: list[tuple[Op, str, Shape]], held: list[Row], args: argparse.Namespace, device: torch.device, until: float
) -> list[Row]:
    """Rows of everything to do, those held already among them; args.json gets the new ones, shape by shape."""
    facts, peaks = machine(device) | {"dtype": args.dtype}, None
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
    print(f"{shapes(new)} measured" + (f", {len(todo) - new - left} there already" if args.json else ""), file=sys.stderr)
    if left:
        print(f"--minutes {args.minutes:g} are over, {shapes(left)} to go: with --json FILE the same command goes on\n")
    return rows


def base_rows(args: argparse.Namespace, mine: list[Row]) -> list[Row]:
    """My rows, ours each followed by that of the checkout args.base, as arm `base`: measured by a process of its own, which takes no turns.

    control: the time of its first arm over that of the same arm here, 1 on a steady machine; NaN where its first arm is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "base.json"
        command = [
            sys.executable,
            "-m",
            "mclr.kernels.bench",
            "--json",
            str(file),
            "--dtype",
            args.dtype,
            "--shapes",
            args.shapes,
        ]
        command += ["--minutes", str(args.minutes), "--only", *args.only]
        done = subprocess.run(command, cwd=args.base, capture_output=True, text=True)
        if done.returncode == 2 or not file.exists():
            raise ValueError(f"--base {args.base}: {(done.stderr.strip() or 'no rows').splitlines()[-1]}")
        theirs = load(file)

    def place(row: Row) -> tuple[str, str, str]:
        return row["op"], row["shape"], row["pass"]

    def ours(row: Row) -> bool:
        return row["arm"] == ("ours/torch" if row["family"] == "cpu" else "ours/triton")

    first: dict[tuple[str, str, str], Row] = {}
    for row in mine:
        first.setdefault(place(row), row)
    # the first arm's row comes before ours
    base, controls = {}, {}
    for row in theirs:
        at = place(row)
        if at in first and row["arm"] == first[at]["arm"]:
            controls[at] = row.get("ms", math.nan) / first[at].get("ms", math.nan)
        elif ours(row):
            base[at] = row | {"arm": "base", "control": controls.get(at, math.nan)}
    rows = []
    for row in mine:
        rows.append(row)
        if ours(row) and place(row) in base:
            rows.append(base[place(row)])
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
    compiler = python("-m", "mclr.kernels.compile", "--arch", "90", "--dtype", "bf16", "--only", *names)
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


def some_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def some_minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a finite number above 0 is wanted")
    return minutes


def checked(args: argparse.Namespace, todo: list[tuple[Op, str, Shape]]) -> list[Row]:
    """The rows that args.json holds. Raises ValueError in one line for arguments that cannot work; makes the folder args.plot."""
    wrong = {
        f"--shapes {args.shapes}: in no shape's name": not todo,
        f"--json {args.json}: no such folder, or none to write to": args.json
        and not os.access(args.json.parent, os.W_OK | os.X_OK),
        f"--json {args.json}: a folder": args.json and args.json.is_dir(),
        f"--base {args.base}: no checkout of this project": args.base and not (args.base / "kernels/bench.py").exists(),
        "--plot: matplotlib is not installed": args.plot and importlib.util.find_spec("matplotlib") is None,
    }
    for says in (says for says, is_wrong in wrong.items() if is_wrong):
        raise ValueError(says)
    held = load(args.json) if args.json else []
    if args.plot:
        try:
            args.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--plot {args.plot}: no folder can be made there ({error.strerror})") from None
        if not os.access(args.plot, os.W_OK | os.X_OK):
            raise ValueError(f"--plot {args.plot}: no folder to write to")
    return held


def main(argv: list[str] | None = None) -> int:
    gpu, began, right = torch.cuda.is_available(), time.perf_counter(), True
    parser = Parser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, dtype, names = parser.add_argument, "bf16" if gpu else "fp32", [*OPS, *COMPARISONS]
    # no defaults where --publish wants to know what was given
    add("--only", nargs="+", choices=names, metavar="OP", help="of %(choices)s (default: all)")
    add("--dtype", choices=["bf16", "fp32"], help="of the activations (default: bf16 on a GPU, fp32 on a CPU)")
    add("--shapes", default="", metavar="TEXT", help="those that have TEXT in their names")
    add(
        "--minutes",
        type=some_minutes,
        default=7 if gpu else 2.5,
        help="no shape is begun after these (default here: %(default)s)",
    )
    keep = "keep what was measured there; what it has of this machine and code is not measured again"
    add("--json", type=some_path, metavar="FILE", help=keep)
    add("--plot", type=some_path, metavar="FOLDER", help="draw roofline.png and bars-OP.png there")
    base = "a checkout of another revision: its operations are measured too, and stand as `base` under ours"
    add("--base", type=some_path, metavar="DIR", help=base)
    into = "measure nothing: put what FILE, of --json, has of GPUs into kernels/RESULTS.json and RESULTS.md"
    add("--publish", type=some_path, metavar="FILE", help=into)
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in ("only", "shapes", "json", "plot", "base", "dtype") if getattr(args, name)]
    args.only, args.dtype = list(dict.fromkeys(args.only or names)), args.dtype or dtype
    ops = [OPS.get(name) or COMPARISONS[name] for name in args.only]
    todo = [(op, name, shape) for op in ops for name, shape in sized(op, gpu).items() if args.shapes in name]
    try:
        if args.publish:
            if given:
                raise ValueError(f"--publish measures nothing: leave {', '.join(given)} away")
            publish(args.publish)
            return 0
        held = checked(args, todo)
        own = [op.name for op in ops if op.name in OPS]
        if not gpu:
            print("No GPU here: checks, compilation and the paths of a CPU; nothing below says how fast a GPU is.\n", flush=True)
            if triton is None:
                print("ours/triton: not installed\n")
            elif own:
                right = without_gpu(own)
        rows = measure_all(todo, held, args, torch.device("cuda" if gpu else "cpu"), began + 60 * args.minutes)
        if args.base:
            rows = base_rows(args, rows)
        print(tables(rows))
        if args.plot and rows:
            drawn = plot(rows, args.plot)
            print(f"wrote {', '.join(drawn)} to {args.plot}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if right and not any(row["red"] for row in rows) else 1


def program() -> int:
    """main as a shell wants it: status 130 after Ctrl-C, 141 where what read the output went away."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # what is still buffered would be tried once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(program())
