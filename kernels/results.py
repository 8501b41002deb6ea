"""The rows of the bench: their file, tables and plot, kernels/RESULTS.*, and the operations that `auto` runs as Triton kernels.

A row is a dict: one pass of one arm at one shape.
What was measured: op, shape, sizes, dtype, arm, pass. Where: device, family, driver, torch, triton, liger, threads, source.
why: the reason if there is no time, else empty. red: whether that is a fault of ours.
ms: the median of the rounds; p20, p80: percentiles; host_ms: until everything was launched; rounds; calls: of a round.
bytes, flops: the least work. floor_ms: the time it needs at the rates copy_gbs and product_tflops of the same run.
peak_bytes: memory above the inputs. apart: relative RMS difference from the results of the first arm.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mclr.kernels.choice import RESULTS, family
from mclr.kernels.op import triton
from mclr.kernels.registry import OPS
from mclr.kernels.timing import number, table, time_cell

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("forward", "forward+backward")
Row = dict[str, Any]
# the keys that every row has
NEEDED = {"op", "shape", "dtype", "arm", "pass", "device", "family", "source", "why", "red"}


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash it is the old one or the new one."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def dump(rows: list[Row], **more: Any) -> bytes:
    """JSON with one row per line. more: other entries."""
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in more.items()]
    return ("{" + ",\n".join([*parts, '"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"]) + "}\n").encode()


def load(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file. Raises ValueError if it cannot be read, or holds something else."""
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        if all(row.keys() >= NEEDED for row in rows):
            return rows
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} holds no rows of this bench: choose another file")


def said(*command: str) -> str:
    """The first line of a program's output; empty if the program is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def source() -> str:
    """A digest of the code in kernels/: rows of different code must not mix."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def machine(device: torch.device) -> Row:
    gpu, info = device.type == "cuda", Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu[1] if cpu else platform.machine(),
        "family": family(device),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "liger": importlib.metadata.version("liger_kernel") if importlib.util.find_spec("liger_kernel") else "",
        "threads": torch.get_num_threads(),
        "source": source(),
    }


FACTS = ("device", "driver", "torch", "triton", "liger", "threads", "commit")
HEAD = ["operation", "shape", "arm", *(cell for name in PASSES for cell in (f"{name}, ms (p20–p80)", "of floor"))]
HEAD += ["peak MiB", "apart"]


def cells(row: Row | None) -> list[str]:
    """(the time of one pass, the floor's share of it). *: the host took about as long to launch everything."""
    if row is None or row["why"]:
        return [("RED: " if row["red"] else "") + row["why"].replace("|", "/") if row else "", ""]
    mark = "*" if row["family"] != "cpu" and row["host_ms"] > 0.9 * row["ms"] else ""
    return [time_cell(row, mark), f"{100 * row['floor_ms'] / row['ms']:.0f} %"]


def tables(rows: list[Row]) -> str:
    """Markdown: a table per dtype, a line per operation, shape and arm. A line names operation and shape where they change."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        passes: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in (each for each in rows if each["dtype"] == dtype):
            passes.setdefault((row["op"], row["shape"], row["arm"]), {})[row["pass"]] = row
        facts = ", ".join(f"{name} {row[name]}" for name in FACTS if row.get(name))
        reached = f"a copy reaches {number(row['copy_gbs'])} GB/s, a matrix product {number(row['product_tflops'])} TFLOP/s"
        lines, above = [], ("", "")
        for (op, shape, arm), found in passes.items():
            last = next((row for row in reversed(found.values()) if not row["why"]), {})
            peak, apart = last.get("peak_bytes"), last.get("apart")
            line = ["" if op == above[0] else op, "" if (op, shape) == above else shape, arm]
            line += [cell for name in PASSES for cell in cells(found.get(name))]
            line.append("" if peak is None else f"{peak / 2**20:.0f}")
            lines.append([*line, "" if apart is None else f"{apart:.1g}"])
            above = (op, shape)
        parts.append(f"**{dtype}**, {facts}; {reached}\n\n{table(HEAD, lines, left=3)}\n")
    return "\n".join(parts)


def last_pass(rows: list[Row]) -> str:
    """The pass that decides: forward and backward, or forward if the operation has no backward."""
    return PASSES[any(row["pass"] == PASSES[1] for row in rows)]


def wins(rows: list[Row]) -> bool:
    """Whether ours/triton and another arm have times, and ours is below all others."""
    times = {row["arm"]: row["ms"] for row in rows}
    ours = times.pop("ours/triton", math.inf)
    return ours < min(times.values(), default=0)


def winners(rows: list[Row]) -> dict[str, list[str]]:
    """GPU family -> the operations that `auto` runs as Triton kernels there.

    Such an operation has the lowest median of all arms in the last pass: in bf16, at every shape, on every measured GPU of the family.
    """
    found: dict[str, list[str]] = {}
    for gpu in dict.fromkeys(row["family"] for row in rows):
        for name, op in OPS.items():
            of = [row for row in rows if (row["family"], row["op"], row["dtype"]) == (gpu, name, "bf16")]
            timed = [row for row in of if row["pass"] == last_pass(of) and not row["why"]]
            places = product({row["device"] for row in of}, op.shapes)
            if of and all(wins([row for row in timed if (row["device"], row["shape"]) == place]) for place in places):
                found.setdefault(gpu, []).append(name)
    return found


def publish(file: Path) -> None:
    """Put the GPU rows of a file into RESULTS.json and RESULTS.md. They replace older rows of the same GPUs.

    Raises ValueError if there are none, if one is red, or if the code that they measured is not committed.
    """
    if not file.exists():
        raise ValueError(f"--publish {file}: no such file")
    of_gpus = [row for row in load(file) if row["family"] != "cpu"]
    if not of_gpus:
        raise ValueError(f"--publish: {file} holds no rows of a GPU: measure on one")
    fresh = [row for row in of_gpus if row["source"] == source()]
    if not fresh:
        raise ValueError(f"--publish: the rows of {file} were measured with other code than this: measure again")
    if red := [row for row in fresh if row["red"]]:
        raise ValueError(f"--publish: {len(red)} rows are red, first {red[0]['op']} at {red[0]['shape']}: {red[0]['why']}")
    # the files that this function writes do not count
    commit, written = said("git", "rev-parse", "HEAD"), [f":!kernels/RESULTS.{kind}" for kind in ("json", "md")]
    changed = said("git", "status", "--porcelain", "--untracked-files=all", "--", "kernels", *written)
    if not commit or changed:
        raise ValueError(f"--publish: kernels/ differs from its commit ({changed or 'no git here'}): commit first")
    devices = {row["device"] for row in fresh}
    rows = [row for row in load(RESULTS) if row["device"] not in devices] + [row | {"commit": commit} for row in fresh]
    won = winners(rows)
    listed = "; ".join(f"on {gpu} {', '.join(names)}" for gpu, names in won.items()) or "nothing"
    body = [f"`auto` runs as Triton kernels: {listed}.\n"]
    for device in dict.fromkeys(row["device"] for row in rows):
        of = [row for row in rows if row["device"] == device]
        body.append(f"### {device} ({of[-1]['family']})\n{tables(of)}")
    page = RESULTS.with_suffix(".md")
    before, after = re.split(r"(?ms)^## GPU\n.*?(?=^## |\Z)", page.read_text())
    write(page, "\n".join([f"{before}## GPU", *body, after]).encode())
    write(RESULTS, dump(rows, winners=won))


def plot(rows: list[Row], folder: Path) -> Path:
    """Draw roofline.png: every time against its floor."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if not row["why"]]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["arm"] for row in timed)):
        for kind, marker, label in zip(PASSES, "os", (name, None), strict=True):
            of = [row for row in timed if (row["arm"], row["pass"]) == (name, kind)]
            points = [row["floor_ms"] for row in of], [row["ms"] for row in of]
            axes.plot(*points, marker, color=f"C{i}", markersize=5, alpha=0.8, label=label)
    for op in dict.fromkeys(row["op"] for row in timed):
        slowest = max((row for row in timed if row["op"] == op), key=lambda row: row["ms"])
        at = slowest["floor_ms"], slowest["ms"]
        axes.annotate(op, at, xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=7)
    axes.set(xscale="log", yscale="log", ylabel="measured, ms")
    axes.set_xlabel("floor, ms: the larger of bytes / copy rate and FLOPs / product rate")
    axes.axline((1, 1), (10, 10), color="black", linewidth=1)
    where = f"{'CPU, cut shapes: ' if rows[0]['family'] == 'cpu' else ''}{rows[0]['device']}, {rows[0]['dtype']}"
    axes.set_title(f"Distance from the roofline (line); ○ forward, □ forward+backward\n{where}", fontsize=10)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write(folder / "roofline.png", buffer.getvalue())
    return folder / "roofline.png"
