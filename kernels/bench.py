"""`python -m kernels.bench`: how long every operation takes as plain torch, compiled, as others wrote it and as ours; tables and plots.

What keeps it honest: arms are checked before they are timed, and an operation of ours that is wrong prints no time. Arms take turns,
round by round, so that a slow minute hits all. A round is a batch of calls, the gaps between their launches included, over copies of the
inputs that exceed the GPU's L2. Bytes and FLOPs come from formulas, shares from a copy and a matrix product of the same run. `forward`
keeps what backward needs. `apart` is every arm's relative RMS distance from the first one's results at full size; beyond SAME it prints
no time. `error` is that from the definition in fp64, by kernels.op.check, on a CPU within seconds and hence with sizes cut to the
operation's `narrow`: fewer rows, the same compiled kernels. What torch.compile made is left out of it, it would compile again.

A row takes about a second (ROW_MS); after --minutes no shape is begun, and with --json FILE the next run goes on where this one ended.
Without a GPU shapes are cut to `narrow` before they are timed, in fp32, and those that become equal are timed once.

R rows; B samples; H heads; L tokens; D width; V codes; N = R L.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from kernels.choice import RESULTS, family, using
from kernels.op import DTYPES, Cost, Error, Op, Shape, as_tuple, cdiv, check, leaves, moved, triton
from kernels.registry import OPS

ROOT = Path(__file__).parent.parent
PASSES = ("forward", "forward+backward")
Row = dict[str, Any]
# rows that agree in these are the same measurement
KEY = ("op", "shape", "dtype", "arm", "pass", "device", "driver", "torch", "triton", "threads", "rounds", "source")
# milliseconds of a round and of all rounds, unless that is more than MOST_CALLS or fewer than LEAST_ROUNDS
BATCH_MS, WARM_UP_MS, ROW_MS, MOST_CALLS, LEAST_ROUNDS = 2.0, 50.0, {"cuda": 1000.0, "cpu": 300.0}, 200, 3
SAME = 0.05
CPU_CACHE = 32 << 20
# rows of a chunk of the baseline of token_logp
CHUNK = 8192


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` shows the arguments)\n")


@dataclass(frozen=True)
class Arm:
    """One way to compute an operation. kernels: the word for `using`. forward_only: why there is no backward."""

    call: Callable[..., Any]
    kernels: str = "torch"
    compiled: bool = False
    forward_only: str = ""


# --- what others would run --------------------------------------------------------------------------------------------------------

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ENDS = tuple(sum(side**2 for side in SCALES[: k + 1]) for k in range(len(SCALES)))


@cache
def scale_L(device: torch.device) -> Tensor:
    return torch.tensor([k for k, side in enumerate(SCALES) for _ in range(side**2)], device=device)


@cache
def mask_LL(device: torch.device) -> Tensor:
    return scale_L(device)[:, None] >= scale_L(device)[None, :]


@cache
def block_mask(device: torch.device) -> Any:
    scale = scale_L(device)
    return create_block_mask(lambda b, h, q, k: scale[q] >= scale[k], None, None, len(scale), len(scale), device=str(device))


def masked_attention(q_RHLd: Tensor, k_RHLd: Tensor, v_RHLd: Tensor) -> Tensor:
    """VAR's attention: a token sees its own scale and all coarser ones."""
    return F.scaled_dot_product_attention(q_RHLd, k_RHLd, v_RHLd, attn_mask=mask_LL(q_RHLd.device))


def prefix_attention(q_RHLd: Tensor, k_RHLd: Tensor, v_RHLd: Tensor) -> Tensor:
    """The same without a mask: one call per scale, on what it sees."""
    scales = [(slice(start, end), slice(end)) for start, end in pairwise((0, *ENDS))]
    attend = F.scaled_dot_product_attention
    return torch.cat([attend(q_RHLd[:, :, own], k_RHLd[:, :, seen], v_RHLd[:, :, seen]) for own, seen in scales], 2)


def flexible(gpu: bool) -> Arm:
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(**qkv: Tensor) -> Tensor:
        # on a CPU it refuses inputs that require gradient
        q, k, v = (t if gpu else t.detach() for t in qkv.values())
        return compiled(q, k, v, block_mask=block_mask(q.device))

    return Arm(call, compiled=True, forward_only="" if gpu else "FlexAttention has no backward on a CPU")


def _draw_attention(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict:
    sizes = shape["R"], shape["H"], ENDS[-1], 64
    return {f"{name}_RHLd": torch.randn(sizes, generator=generator).to(dtype).requires_grad_() for name in "qkv"}


def _attention_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    rows, seen = shape["R"] * shape["H"], sum(side**2 * end for side, end in zip(SCALES, ENDS, strict=True))
    tensor, flops = rows * ENDS[-1] * 64 * dtype.itemsize, 4 * rows * seen * 64
    # backward: reads q k v, the output and its gradient, writes three gradients; five products where forward has two
    return Cost(4 * tensor, 8 * tensor, flops, flops * 5 // 2)


# measured beside OPS, to see whether a kernel of our own is worth writing
COMPARISONS = {
    "scale_attention": Op(
        name="scale_attention",
        run=masked_attention,
        reference=masked_attention,
        draw=_draw_attention,
        shapes={f"var-{net}, {R // 2} pairs": {"R": R, "H": H} for net, H in (("d16", 16), ("d30", 30)) for R in (16, 64)},
        tiny={},
        cost=_attention_cost,
        narrow={"R": 2},
    )
}


def autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The definition as networks run it, where the activations are half and the weight is fp32."""

    def call(hidden_RLD: Tensor, **others: Any) -> Any:
        half = hidden_RLD.dtype.itemsize == 2
        with torch.autocast(hidden_RLD.device.type, hidden_RLD.dtype if half else None, enabled=half):
            return reference(hidden_RLD, **others)

    return call


def liger() -> Arm | None:
    """Liger's fused Linear and cross-entropy, a value per token."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def call(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
        tokens_RL = tokens_BL[index_R]
        weight, bias = weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype)
        return -loss(weight, hidden_RLD.flatten(0, 1), tokens_RL.flatten(), bias).view(tokens_RL.shape)

    return Arm(call)


def _chunk(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_N: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V).float(), tokens_N, reduction="none")


def chunked(hidden_RLD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_BL: Tensor, index_R: Tensor) -> Tensor:
    """Linear and cross-entropy by chunks of rows, whose logits are computed again in backward instead of kept."""
    tokens_RL, linear = tokens_BL[index_R], (weight_VD.to(hidden_RLD.dtype), bias_V.to(hidden_RLD.dtype))
    pieces = hidden_RLD.flatten(0, 1).split(CHUNK), tokens_RL.flatten().split(CHUNK)
    values = [checkpoint(_chunk, h, *linear, t, use_reentrant=False) for h, t in zip(*pieces, strict=True)]
    return torch.cat(values).view(tokens_RL.shape)


BASELINES: dict[str, dict[str, Callable[[], Arm | None]]] = {
    "token_logp": {"Liger": liger, "chunks, compiled": lambda: Arm(torch.compile(chunked, dynamic=False), compiled=True)}
}


def arms(op: Op, gpu: bool) -> dict[str, Arm | None]:
    """By name; the first is the definition, None stands for what is not installed. Made anew for every shape, compiled for it alone."""
    if op.name in COMPARISONS:
        return {"SDPA, mask": Arm(op.reference), "FlexAttention": flexible(gpu), "SDPA by prefix": Arm(prefix_attention)}
    definition = autocast(op.reference) if op.name == "token_logp" else op.reference
    found: dict[str, Arm | None] = {"eager": Arm(definition)}
    if gpu:
        found["torch.compile"] = Arm(torch.compile(definition, dynamic=False), compiled=True)
        found |= {name: make() for name, make in BASELINES.get(op.name, {}).items()}
    found["ours/torch"] = Arm(op.run)
    if gpu:
        found["ours/triton"] = Arm(op.run, "triton") if triton else None
    return found


# --- one shape --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, those of them that get gradients, and the gradients from above; none where the operation has none."""

    inputs: dict[str, Any]
    wanted: list[Tensor]
    upstream: list[Tensor]


@dataclass
class Entry:
    """One arm's forward, or forward and backward, while it is measured. why: it has no time, since."""

    name: str
    arm: Arm
    backward: bool
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


def samples(op: Op, device: torch.device, dtype: torch.dtype, shape: Shape) -> list[Sample]:
    """Copies of the same inputs, twice as many bytes as the GPU's L2 holds."""
    first = moved(op.draw(shape, dtype, torch.Generator().manual_seed(0)), lambda t: t.to(device))
    size = 0

    def clone(t: Tensor) -> Tensor:
        nonlocal size
        size += t.nbytes
        return t.clone()

    with using("torch"):
        outputs = as_tuple(op.run(**moved(first, clone)))
    upstream = [torch.randn_like(out) for out in outputs] if leaves(first) else []
    held = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    count = min(max(2, cdiv(2 * held, size + sum(t.nbytes for t in upstream))), 256)
    copies = [moved(first, clone) for _ in range(count)]
    return [Sample(inputs, list(leaves(inputs).values()), [t.clone() for t in upstream]) for inputs in copies]


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


def warm_up(entry: Entry, first: list[Tensor] | None, copies: list[Sample], device: torch.device, rounds: int) -> list[Tensor]:
    """Fill in an entry's distance from the first arm's results, its memory, how much of it is timed. Returns its results."""
    results = [t.detach() for t in entry.call(copies[0])]
    if first is not None:
        entry.apart = distance(results, first)
        if not entry.apart <= SAME:
            entry.why = f"a result is {entry.apart:.2g} from the first arm's"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        entry.call(copies[0])
        entry.peak = torch.cuda.max_memory_allocated(device) - before
    began, ms = time.perf_counter(), math.inf
    while ms == math.inf or 1000 * (time.perf_counter() - began) < WARM_UP_MS:
        ms = min(ms, entry.clock(copies, 0, 1 if ms == math.inf else 5, device)[0])
    entry.calls = min(max(1, round(BATCH_MS / ms)), MOST_CALLS)
    entry.rounds = min(rounds, max(LEAST_ROUNDS, int(ROW_MS[device.type] / (entry.calls * ms))))
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


def measure(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int, peaks: dict[str, float]) -> list[Row]:
    """Check every arm of an operation at one shape, time those that are right; a row per arm and pass."""
    # what was compiled at another shape would come back with dynamic sizes
    torch.compiler.reset()
    present = {name: arm for name, arm in arms(op, device.type == "cuda").items() if arm}
    errors: dict[str, list[Error]] = {name: [] for name in present}
    why = dict.fromkeys(present, "")
    for name, arm in present.items():
        # of others' code any error may come; it is a row's to tell
        try:
            if not arm.compiled:
                errors[name] = check(replace(op, run=arm.call), device, dtype, shape | op.narrow, arm.kernels)
        except Exception as error:
            why[name] = brief(error)
        wrong = [e for e in errors[name] if not e.ok]
        if wrong and name.startswith("ours/"):
            why[name] = f"{wrong[0].name} is {wrong[0].relative:.2g} off, allowed {wrong[0].allowed:.2g}"
    red = next((f"{name}: {why[name]}" for name in present if name.startswith("ours/") and why[name]), "")
    copies: list[Sample] = []
    try:
        copies = [] if red else samples(op, device, dtype, shape)
    except torch.OutOfMemoryError as error:
        why = dict.fromkeys(present, brief(error))
    entries: list[Entry] = []
    for backward in (False, True) if not copies or copies[0].wanted else (False,):
        first = None
        for name, arm in present.items():
            entry = Entry(name, arm, backward, red or why[name] or (arm.forward_only if backward else ""))
            entries.append(entry)
            if not entry.why:
                try:
                    with using(arm.kernels):
                        results = warm_up(entry, first, copies, device, rounds)
                    first = results if name == next(iter(present)) else first
                except Exception as error:
                    entry.why = brief(error)
    take_turns([entry for entry in entries if not entry.why], copies, device)
    return [row_of(entry, op.cost(shape, dtype), errors[entry.name], peaks) for entry in entries]


def row_of(entry: Entry, cost: Cost, errors: list[Error], peaks: dict[str, float]) -> Row:
    least, flops = cost.forward_bytes, cost.forward_flops
    if entry.backward:
        least, flops = least + cost.backward_bytes, flops + cost.backward_flops
    row: Row = {"arm": entry.name, "pass": PASSES[entry.backward], "why": entry.why, "bytes": least, "flops": flops} | peaks
    # what does not fit this GPU is not wrong
    row["red"] = entry.name.startswith("ours/") and bool(entry.why) and "OutOfMemoryError" not in entry.why
    row |= {
        "relative": max((e.relative for e in errors), default=None),
        "largest": max((e.largest for e in errors), default=None),
    }
    row |= {"apart": entry.apart, "peak_bytes": entry.peak}
    if entry.why:
        return row
    ms, p20, p80 = (sorted(entry.times)[round(share * (len(entry.times) - 1))] for share in (0.5, 0.2, 0.8))
    row |= {"ms": ms, "p20": p20, "p80": p80, "host_ms": statistics.median(entry.host), "calls": entry.calls}
    row |= {"gbs": least / ms / 1e6, "tflops": flops / ms / 1e9, "timed_rounds": len(entry.times)}
    return row | {"of_copy": row["gbs"] / peaks["copy_gbs"], "of_product": row["tflops"] / peaks["product_tflops"]}


# --- all shapes, and the file of rows ---------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def dump(rows: list[Row], **more: Any) -> bytes:
    """JSON with a row per line."""
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in more.items()]
    return ("{" + ",\n".join([*parts, '"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"]) + "}\n").encode()


def load(path: Path) -> list[Row]:
    """Raises ValueError where the file holds something else."""
    try:
        return json.loads(path.read_text())["rows"] if path.exists() else []
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no rows of this program: choose another file") from None


def said(*command: str) -> str:
    """First line of what a program prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def source() -> str:
    """A digest of the modules here: rows of two states of the code are not mixed, committed or not."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def machine(device: torch.device, rounds: int) -> Row:
    gpu, info = device.type == "cuda", Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu[1] if cpu else platform.machine(),
        "family": family(device) if gpu else "cpu",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "source": source(),
    }


def reached(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in this run: GB/s of a copy (read and written), TFLOP/s of a matrix product."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    b, m = torch.zeros_like(a), torch.randn(side, side, device=device).to(dtype)
    work: tuple[Callable[[int], Any], ...] = (lambda i: b.copy_(a), lambda i: m @ m)
    copy, product = (min(clocked(f, 5, device)[0] for _ in range(5)) for f in work)
    return {"copy_gbs": 2 * size / copy / 1e6, "product_tflops": 2 * side**3 / product / 1e9}


def sized(op: Op, gpu: bool) -> dict[str, Shape]:
    """The shapes that are timed; for a CPU cut to `narrow`, each of them once."""
    if gpu:
        return op.shapes
    cut: dict[str, Shape] = {}
    for name, shape in op.shapes.items():
        if shape | op.narrow not in cut.values():
            sizes = " ".join(f"{size}={n}" for size, n in op.narrow.items())
            cut[f"{re.sub(', [0-9]+ pairs', '', name)}, cut to {sizes}"] = shape | op.narrow
    return cut


def measure_all(todo: list[tuple[Op, str, Shape]], args: argparse.Namespace, device: torch.device, until: float) -> list[Row]:
    """Rows of everything to do, those that args.json holds among them; it gets the new ones, shape by shape."""
    facts, peaks = machine(device, args.rounds) | {"dtype": args.dtype}, None
    held = load(args.json) if args.json else []
    rows: list[Row] = []
    new = left = 0
    for op, name, shape in todo:
        same = facts | {"op": op.name, "shape": name, "sizes": shape}
        found = [row for row in held if all(row[fact] == same[fact] for fact in KEY if fact in same)]
        wanted, start = arms(op, device.type == "cuda"), time.perf_counter()
        if {arm for arm, there in wanted.items() if there} - {row["arm"] for row in found}:
            if start > until:
                left += 1
                continue
            new, peaks = new + 1, peaks or reached(device, DTYPES[args.dtype])
            held = [row for row in held if row not in found]
            found = [same | row for row in measure(op, shape, DTYPES[args.dtype], device, args.rounds, peaks)]
            held += found
            if args.json:
                write(args.json, dump(held))
            print(f"{op.name}, {name}: {len(found)} rows in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        absent = {"pass": PASSES[0], "why": "not installed", "red": False}
        rows += found + [same | absent | {"arm": arm} for arm, there in wanted.items() if not there]
    print(f"{new} shapes measured, {len(todo) - new - left} were there", file=sys.stderr)
    if left:
        print(f"{left} shapes are left, since {args.minutes:g} minutes are over: with --json FILE the same command goes on\n")
    return rows


def base_rows(args: argparse.Namespace, file: Path, mine: list[Row]) -> list[Row]:
    """Ours of the checkout args.base as arm `base`, measured by a process of its own, which cannot take turns with this one.

    control: the first arm's time there over the same arm's here, 1 on a steady machine.
    """
    command = [sys.executable, "-m", "kernels.bench", "--no-compile", "--json", str(file.resolve()), "--shapes", args.shapes]
    command += ["--dtype", args.dtype, "--rounds", str(args.rounds), "--minutes", str(args.minutes)]
    command += ["--only", *args.only] if args.only else []
    done = subprocess.run(command, cwd=args.base, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 2 or not file.exists():
        raise ValueError(f"--base {args.base}: {(done.stderr.strip() or 'no rows').splitlines()[-1]}")
    here, there = ({(row["op"], row["shape"], row["pass"], row["arm"]): row for row in rows} for rows in (mine, load(file)))
    found = []
    for (*place, arm), row in there.items():
        if arm == ("ours/torch" if row["family"] == "cpu" else "ours/triton"):
            steady = [rows.get((*place, "eager"), {}).get("ms", math.nan) for rows in (there, here)]
            found.append(row | {"arm": "base", "control": steady[0] / steady[1]})
    return found


# --- without a GPU ----------------------------------------------------------------------------------------------------------------


def interpret(names: list[str]) -> None:
    """Print as JSON every operation's errors at its tiny sizes; bf16, which Triton's interpreter gets wrong without a word, is left out."""
    cases = [(OPS[name], dtype, shape) for name in names for dtype in ("fp32", "fp16") for shape in OPS[name].tiny]
    found = [(op, dtype, shape, e) for op, dtype, shape in cases for e in check(op, "cpu", DTYPES[dtype], op.tiny[shape])]
    print(json.dumps([(op.name, f"{shape}, {dtype}: {e.name}", e.relative / e.allowed) for op, dtype, shape, e in found]))


def interpreted(names: list[str]) -> bool:
    """Check the kernels in Triton's interpreter, which must be asked for before kernels are imported; print a line for each."""
    command = [sys.executable, "-c", "import sys; from kernels.bench import interpret; interpret(sys.argv[1:])", *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        print(f"RED: ours/triton in Triton's interpreter: {done.stderr.strip().splitlines()[-1]}\n")
        return False
    print("| ours/triton in Triton's interpreter | fp32 and fp16 checks | worst, allowed = 1 |\n| --- | ---: | ---: |")
    found, right = json.loads(done.stdout.splitlines()[-1]), True
    for name in names:
        of = [(not error <= 1, error, where) for op, where, error in found if op == name]
        wrong, error, where = max(of)
        right &= not wrong
        print(f"| {name} | {len(of)} | {error:.2f}{f' RED: {where}' if wrong else ''} |")
    print(flush=True)
    return right


def compiled(names: list[str]) -> bool:
    """Print a line per operation of what kernels.compile says of a Hopper GPU and bf16; false where a kernel is above its bounds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--arch", "90", "--dtype", "bf16", "--only", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print("| compiled for sm_90, bf16 | kernels | registers at most | bytes spilled | bytes shared at most |")
    print("| --- " + "| ---: " * 4 + "|")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    for name in names:
        of = [[int(cell.split()[0]) for cell in row[-3:]] for row in rows if row[0] == name]
        print(f"| {name} | {len(of)} |", " | ".join(str(max(column)) for column in zip(*of, strict=True)), "|")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
    print(f"\nRED: {said}\n" if done.returncode else "", flush=True)
    return done.returncode == 0


# --- what a reader gets -----------------------------------------------------------------------------------------------------------


def cells(row: Row | None) -> list[str]:
    """Time and shares of one pass. *: the host took about as long to launch it all."""
    if row is None or row["why"]:
        return [("RED: " if row["red"] else "") + row["why"].replace("|", "/") if row else "", ""]
    shares = [row["of_copy"], row["of_product"]] if row["flops"] else [row["of_copy"]]
    late = "*" if row["family"] != "cpu" and row["host_ms"] > 0.9 * row["ms"] else ""
    return [f"{row['ms']:.3g}{late} ({row['p20']:.3g}–{row['p80']:.3g})", " / ".join(f"{100 * share:.0f} %" for share in shares)]


def tables(rows: list[Row]) -> str:
    """Markdown, a table per operation and dtype, a line per shape and arm."""
    grouped: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        grouped.setdefault(f"**{row['op']}**, {row['dtype']}", {}).setdefault((row["shape"], row["arm"]), {})[row["pass"]] = row
    heads = [f"{name}, ms (p20–p80) | of copy / product" for name in PASSES]
    head = (
        " | ".join(["| shape | arm", *heads, "peak MiB", "error (largest)", "apart |"]) + "\n| --- | --- " + "| ---: " * 7 + "|"
    )
    parts = []
    for title, lines in grouped.items():
        parts.append(f"{title}\n\n{head}")
        for (shape, arm), found in lines.items():
            last = next((row for row in reversed(found.values()) if not row["why"]), {})
            peak, error, largest, apart = (last.get(name) for name in ("peak_bytes", "relative", "largest", "apart"))
            control = f", control {last['control']:.2f}" if last.get("control") else ""
            line = [shape, arm + control, *cells(found.get(PASSES[0])), *cells(found.get(PASSES[1]))]
            line += ["" if peak is None else f"{peak / 2**20:.0f}", "" if error is None else f"{error:.1g} ({largest:.1g})"]
            parts.append(f"| {' | '.join([*line, '' if apart is None else f'{apart:.1g}'])} |")
        parts.append("")
    return "\n".join(parts)


def winners(rows: list[Row], ops: dict[str, Op] = OPS) -> dict[str, list[str]]:
    """GPU family -> operations that run as Triton kernels there: at every shape, on each GPU of the family that has rows, in bf16,
    the median of forward and backward (of forward, where there is no backward) is lower than that of every other arm.
    """
    found: dict[str, list[str]] = {}
    for gpu in dict.fromkeys(row["family"] for row in rows):
        for name, op in ops.items():
            of = [row for row in rows if (row["family"], row["op"], row["dtype"]) == (gpu, name, "bf16")]
            last = PASSES[any(row["pass"] == PASSES[1] for row in of)]
            times: dict[tuple[str, str], dict[str, float]] = {
                (device, shape): {} for device in {row["device"] for row in of} for shape in op.shapes
            }
            for row in of:
                if row["pass"] == last and row["arm"] != "base" and not row["why"]:
                    times.setdefault((row["device"], row["shape"]), {})[row["arm"]] = row["ms"]
            # a shape without our time, or without another's, is not won
            if times and all(
                len(by) > 1 and min(by, key=lambda arm: (by[arm], arm == "ours/triton")) == "ours/triton" for by in times.values()
            ):
                found.setdefault(gpu, []).append(name)
    return found


def publish(file: Path, results: Path = RESULTS) -> None:
    """Put the GPU rows of a file into RESULTS.json and RESULTS.md, instead of those of the same GPUs. Raises ValueError in one line."""
    fresh = [row for row in load(file) if row["family"] != "cpu" and row["arm"] != "base"]
    if not fresh:
        raise ValueError(f"--publish: {file} holds no rows of a GPU: measure on one")
    fresh = [row for row in fresh if row["source"] == source()]
    if not fresh:
        raise ValueError(f"--publish: the rows of {file} are of other code than this: measure again")
    red = [row for row in fresh if row["red"]]
    if red:
        raise ValueError(f"--publish: {len(red)} rows are red, first {red[0]['op']} at {red[0]['shape']}: {red[0]['why']}")
    # what is written here is no change of what was measured, and neither is a file of rows
    commit, written = said("git", "rev-parse", "HEAD"), [f":!kernels/RESULTS.{kind}" for kind in ("json", "md")]
    changed = said("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    changed = changed or said("git", "ls-files", "--others", "--exclude-standard", "--", "kernels", *written)
    if not commit or changed:
        raise ValueError(f"--publish: the tree is not what its commit says ({changed or 'no git here'}): commit first")
    devices = {row["device"] for row in fresh}
    rows = [row for row in load(results) if row["device"] not in devices] + [row | {"commit": commit} for row in fresh]
    won = winners(rows)
    listed = "; ".join(f"on {gpu} {', '.join(names)}" for gpu, names in won.items()) or "nothing"
    body = [f"`auto` runs as Triton kernels: {listed}.\n"]
    for device in dict.fromkeys(row["device"] for row in rows):
        of = [row for row in rows if row["device"] == device]
        facts = ", ".join(f"{name} {of[-1][name]}" for name in ("driver", "torch", "triton", "commit"))
        peaks = f"a copy reaches {of[-1]['copy_gbs']:,.0f} GB/s, a matrix product {of[-1]['product_tflops']:,.0f} TFLOP/s"
        body.append(f"### {device} ({of[-1]['family']})\n{facts}; {peaks}.\n\n{tables(of)}")
    page = results.with_suffix(".md")
    before, after = re.split(r"(?ms)^## GPU\n.*?(?=^## |\Z)", page.read_text())
    write(page, "\n".join([f"{before}## GPU", *body, after]).encode())
    write(results, dump(rows, winners=won))


def plot(rows: list[Row], folder: Path) -> None:
    """roofline.png: every time against the least that its bytes and FLOPs take. bars-OP.png: the longer pass of every arm."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if not row["why"]]
    names, where = list(dict.fromkeys(row["arm"] for row in timed)), f"{rows[0]['device']}, {rows[0]['dtype']}"
    colours = {name: f"C{i}" for i, name in enumerate(names)}

    def save(figure: Figure, name: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        write(folder / name, buffer.getvalue())

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        for kind, marker, label in zip(PASSES, "os", (name, None), strict=True):
            points = [row for row in timed if (row["arm"], row["pass"]) == (name, kind)]
            floors = [row["ms"] * max(row["of_copy"], row["of_product"]) for row in points]
            axes.plot(floors, [row["ms"] for row in points], marker, color=colours[name], markersize=5, alpha=0.8, label=label)
    axes.set(xscale="log", yscale="log", xlabel="least time for its bytes or FLOPs, ms", ylabel="measured, ms")
    axes.axline((1, 1), (10, 10), color="black", linewidth=1)
    axes.set_title(f"Distance from the roofline (line); ○ forward, □ forward+backward; {where}", fontsize=10)
    axes.legend(frameon=False)
    save(figure, "roofline.png")

    for op in dict.fromkeys(row["op"] for row in timed):
        last = PASSES[any((row["op"], row["pass"]) == (op, PASSES[1]) for row in timed)]
        bars = [row for row in timed if (row["op"], row["pass"]) == (op, last)]
        shapes = list(dict.fromkeys(row["shape"] for row in bars))
        # an empty place between shapes
        places = [i + shapes.index(row["shape"]) for i, row in enumerate(bars)]
        unit = {row["shape"]: row["ms"] for row in reversed(bars)}
        figure = Figure(figsize=(10, 1.2 + 0.2 * (len(bars) + len(shapes))), layout="constrained")
        axes = figure.subplots()
        for row, place in zip(bars, places, strict=True):
            axes.barh(place, row["ms"] / unit[row["shape"]], 0.95, color=colours[row["arm"]])
            axes.text(row["ms"] / unit[row["shape"]], place, f" {row['ms']:.3g} ms", va="center", fontsize=7)
        centres = {shape: [place for place, row in zip(places, bars, strict=True) if row["shape"] == shape] for shape in shapes}
        axes.set_yticks([sum(of) / len(of) for of in centres.values()], shapes, fontsize=8)
        axes.set_ylim(places[-1] + 1, -1)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(f"{last}: time over the first arm's", fontsize=9)
        shown = dict.fromkeys(row["arm"] for row in bars)
        handles = [axes.barh(0, 0, color=colours[name], label=name) for name in shown]
        figure.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=8, title=f"{op}, {where}")
        save(figure, f"bars-{op}.png")


# --- the program ------------------------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None, gpu: bool) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, dtype = parser.add_argument, "bf16" if gpu else "fp32"
    add("--only", nargs="+", choices=[*OPS, *COMPARISONS], metavar="OP", help="of %(choices)s (default: all)")
    add("--dtype", choices=["bf16", "fp32"], default=dtype, help="of the activations (default here: %(default)s)")
    add("--shapes", default="", metavar="TEXT", help="those that have TEXT in their names")
    add("--rounds", type=int, default=20, help="turns of every arm, fewer of slow ones (default: %(default)s)")
    add("--minutes", type=float, default=7 if gpu else 2.5, help="no shape is begun after these (default here: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep rows there; what it has of this machine, code and rounds is not measured")
    add("--base", type=Path, metavar="DIR", help="measure ours of another checkout too, afterwards, as arm base")
    add("--plot", type=Path, metavar="FOLDER", help="draw roofline.png and bars-OP.png")
    add("--no-compile", action="store_true", help="without a GPU: no report of compilation")
    add("--publish", action="store_true", help="measure nothing: put the GPU rows of --json FILE into kernels/RESULTS.*")
    args = parser.parse_args(argv)
    wrong = {
        f"--rounds {args.rounds}: at least {LEAST_ROUNDS}": args.rounds < LEAST_ROUNDS,
        "--publish needs --json FILE": args.publish and not args.json,
        f"--json {args.json}: no such folder": args.json and not args.json.parent.is_dir(),
        f"--base {args.base}: no kernels/bench.py there": args.base and not (args.base / "kernels/bench.py").is_file(),
        f"--plot {args.plot}: a file": args.plot and args.plot.is_file(),
        "--plot: matplotlib is not installed": args.plot and importlib.util.find_spec("matplotlib") is None,
    }
    for says in (says for says, is_wrong in wrong.items() if is_wrong):
        parser.error(says)
    return parser, args


def main(argv: list[str] | None = None) -> int:
    gpu, began, right = torch.cuda.is_available(), time.perf_counter(), True
    parser, args = arguments(argv, gpu)
    device, names = torch.device("cuda" if gpu else "cpu"), args.only or [*OPS, *COMPARISONS]
    ops = [OPS.get(name) or COMPARISONS[name] for name in names]
    todo = [(op, name, shape) for op in ops for name, shape in sized(op, gpu).items() if args.shapes in name]
    if not todo:
        parser.error(f"--shapes {args.shapes}: in no shape's name")
    try:
        if args.publish:
            publish(args.json)
            return 0
        own = [name for name in names if name in OPS]
        if not gpu:
            print("No GPU here: checks, compilation and the paths of a CPU; nothing below says how fast a GPU is.\n", flush=True)
        if not gpu and own:
            print("" if triton else "ours/triton: not installed\n", end="")
            # both, whatever the first says
            right = not triton or all([interpreted(own), args.no_compile or compiled(own)])
        rows = measure_all(todo, args, device, began + 60 * args.minutes)
        if args.base:
            with tempfile.TemporaryDirectory() as folder:
                rows += base_rows(args, Path(f"{args.json}.base") if args.json else Path(folder, "rows.json"), rows)
        facts = machine(device, args.rounds)
        print(", ".join(f"{name} {value}" for name, value in facts.items() if value) + f"\n\n{tables(rows)}")
        if args.plot and rows:
            args.plot.mkdir(parents=True, exist_ok=True)
            plot(rows, args.plot)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if right and not any(row["red"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
