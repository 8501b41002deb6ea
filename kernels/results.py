"""The rows of the bench: their file, tables, kernels/RESULTS.*, and the operations that `auto` runs as Triton kernels.

A row is a dict: one arm at one shape.
What was measured: op, shape, sizes, dtype, arm. Where: device, family, driver, torch, triton, liger, threads, source.
why: the reason if a pass has no time, else empty. red: whether that is a fault of ours.
peak_bytes: memory above the inputs. apart: relative RMS difference from the results of the first arm.
passes: by name, the times of each pass in ms. ms: the median of the rounds; p20, p80: percentiles; host_ms: until everything was launched.
In them also bytes, flops: the least work; floor_ms: the time it needs at the rates copy_gbs and product_tflops of the same run.
"""

import hashlib
import importlib.metadata
import importlib.util
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
NEEDED = {"op", "shape", "dtype", "arm", "device", "family", "source", "why", "red", "passes"}


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
    """The rows of a file, none if there is no file. Raises ValueError if it holds something else, OSError if it cannot be read."""
    try:
        rows = json.loads(path.read_bytes())["rows"] if path.exists() else []
        if all(row.keys() >= NEEDED for row in rows):
            return rows
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


def cells(row: Row, name: str) -> list[str]:
    """(the time of one pass, the floor's share of it). *: the host took about as long to launch everything."""
    if name not in row["passes"]:
        return [("RED: " if row["red"] else "") + row["why"].replace("|", "/"), ""]
    times = row["passes"][name]
    mark = "*" if row["family"] != "cpu" and times["host_ms"] > 0.9 * times["ms"] else ""
    return [time_cell(times, mark), f"{100 * times['floor_ms'] / times['ms']:.0f} %"]


def tables(rows: list[Row]) -> str:
    """Markdown: a table per dtype, a line per operation, shape and arm. A line names operation and shape where they change."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines, above = [], ("", "")
        for row in (each for each in rows if each["dtype"] == dtype):
            at, peak, apart = (row["op"], row["shape"]), row["peak_bytes"], row["apart"]
            line = ["" if row["op"] == above[0] else row["op"], "" if at == above else row["shape"], row["arm"]]
            line += [cell for name in PASSES for cell in cells(row, name)]
            lines.append([*line, "" if peak is None else f"{peak / 2**20:.0f}", "" if apart is None else f"{apart:.1g}"])
            above, last = at, row
        facts = ", ".join(f"{name} {last[name]}" for name in FACTS if last.get(name))
        reached = f"a copy reaches {number(last['copy_gbs'])} GB/s, a matrix product {number(last['product_tflops'])} TFLOP/s"
        parts.append(f"**{dtype}**, {facts}; {reached}\n\n{table(HEAD, lines, left=3)}\n")
    return "\n".join(parts)


def wins(rows: list[Row], last: str) -> bool:
    """Whether ours/triton and another arm have times of the pass `last`, and ours is below all others."""
    times = {row["arm"]: row["passes"][last]["ms"] for row in rows if last in row["passes"]}
    ours = times.pop("ours/triton", math.inf)
    return ours < min(times.values(), default=0)


def winners(rows: list[Row]) -> dict[str, list[str]]:
    """GPU family -> the operations that `auto` runs as Triton kernels there.

    Such an operation has the lowest median of all arms: in its last pass, in bf16, at every shape, on every measured GPU of the family.
    """
    found: dict[str, list[str]] = {}
    for gpu in dict.fromkeys(row["family"] for row in rows):
        for name, op in OPS.items():
            of = [row for row in rows if (row["family"], row["op"], row["dtype"]) == (gpu, name, "bf16")]
            # forward decides only if the operation has no backward
            last = PASSES[any(PASSES[1] in row["passes"] for row in of)]
            places = product({row["device"] for row in of}, op.shapes)
            if of and all(wins([row for row in of if (row["device"], row["shape"]) == place], last) for place in places):
                found.setdefault(gpu, []).append(name)
    return found


def publish(file: Path) -> None:
    """Put the GPU rows of a file into RESULTS.json and RESULTS.md. They replace older rows of the same GPUs.

    Raises ValueError if there are none, if one is red, or if the code that they measured is not committed.
    """
    fresh = [row for row in load(file) if row["family"] != "cpu" and row["source"] == source()]
    if not fresh:
        raise ValueError(f"--publish: {file} holds no rows of a GPU that were measured with this code: measure again")
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
