"""What becomes of the bench's rows: a file, tables, plots, kernels/RESULTS.*, the operations that `auto` runs as Triton kernels.

A row is one arm's pass at one shape, a dict. What was measured: op, shape, sizes, dtype, arm, pass; where: device, family, driver, torch,
triton, liger, threads, source. What was found: why there is no time (empty where there is one), red where that is an error of ours;
ms (median over the rounds), p20, p80, host_ms (until all was launched), rounds, calls of a round; bytes, flops, and floor_ms, the least
time for them at the copy_gbs and product_tflops of the same run; peak_bytes above the inputs; error, relative RMS, and largest, absolute,
from the definition in fp64; apart, relative RMS from the first arm. Of an arm `base`, from another checkout: control (bench.base_rows).
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
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mclr.kernels.choice import RESULTS, family
from mclr.kernels.op import triton
from mclr.kernels.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("forward", "forward+backward")
Row = dict[str, Any]
# what every row has
NEEDED = {"op", "shape", "dtype", "arm", "pass", "device", "family", "source", "why", "red"}


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
    """None where there is no file. Raises ValueError in one line where it cannot be read or holds something else."""
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        if all(row.keys() >= NEEDED for row in rows):
            return rows
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} holds no rows of this program: choose another file")


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


def machine(device: torch.device) -> Row:
    gpu, info = device.type == "cuda", Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu[1] if cpu else platform.machine(),
        "family": family(device) if gpu else "cpu",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "liger": importlib.metadata.version("liger_kernel") if importlib.util.find_spec("liger_kernel") else "",
        "threads": torch.get_num_threads(),
        "source": source(),
    }


FACTS = ("device", "driver", "torch", "triton", "liger", "threads", "commit")
HEAD = ["operation", "shape", "arm", *(cell for name in PASSES for cell in (f"{name}, ms (p20–p80)", "of floor"))]
HEAD += ["peak MiB", "error (largest)", "apart"]
ABOVE = "> 100 %"
# said under a table that has such a word
NOTES = {
    "(control ": "control: time of the first arm in the base's run over the same arm's here; a comparison holds near 1",
    ABOVE: f"{ABOVE}: the machine was slower when its rates were measured: measure again",
}


def cells(row: Row | None) -> list[str]:
    """Time of one pass, and the share of it that its floor is. *: the host took about as long to launch it all."""
    if row is None or row["why"]:
        return [("RED: " if row["red"] else "") + row["why"].replace("|", "/") if row else "", ""]
    late = "*" if row["family"] != "cpu" and row["host_ms"] > 0.9 * row["ms"] else ""
    share = round(100 * row["floor_ms"] / row["ms"])
    return [f"{row['ms']:.3g}{late} ({row['p20']:.3g}–{row['p80']:.3g})", f"{share} %" if share <= 100 else ABOVE]


def tables(rows: list[Row]) -> str:
    """Markdown: a table per dtype, a line per operation, shape and arm; the first two stand where they change."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in (row for row in rows if row["dtype"] == dtype):
            lines.setdefault((row["op"], row["shape"], row["arm"]), {})[row["pass"]] = row
        facts = ", ".join(f"{name} {row[name]}" for name in FACTS if row.get(name))
        peaks = f"a copy reaches {row['copy_gbs']:,.3g} GB/s, a matrix product {row['product_tflops']:,.3g} TFLOP/s"
        parts += [f"**{dtype}**, {facts}; {peaks}\n", f"| {' | '.join(HEAD)} |", "| --- " * 3 + "| ---: " * (len(HEAD) - 3) + "|"]
        above, start = ("", ""), len(parts)
        for (op, shape, arm), found in lines.items():
            last = next((row for row in reversed(found.values()) if not row["why"]), {})
            peak, error, apart = (last.get(name) for name in ("peak_bytes", "error", "apart"))
            line = ["" if op == above[0] else op, "" if (op, shape) == above else shape]
            line.append(f"{arm} (control {last['control']:.2f})" if "control" in last else arm)
            line += [cell for name in PASSES for cell in cells(found.get(name))]
            line += [
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if error is None else f"{error:.1g} ({last['largest']:.1g})",
            ]
            parts.append(f"| {' | '.join([*line, '' if apart is None else f'{apart:.1g}'])} |")
            above = (op, shape)
        notes = [note for word, note in NOTES.items() if any(word in line for line in parts[start:])]
        parts += ["", *(f"{note}\n" for note in notes)]
    return "\n".join(parts)


def last_pass(rows: list[Row]) -> str:
    """Forward and backward, or forward, where an operation has no backward."""
    return PASSES[any(row["pass"] == PASSES[1] for row in rows)]


def wins(rows: list[Row]) -> bool:
    """Whether ours/triton has a time that is below that of every other arm, of which there is one at least."""
    times = {row["arm"]: row["ms"] for row in rows}
    ours = times.pop("ours/triton", math.inf)
    return ours < min(times.values(), default=0)


def winners(rows: list[Row]) -> dict[str, list[str]]:
    """GPU family -> operations that run as Triton kernels there: at every shape, on each GPU of the family that has rows, in bf16,
    the median of the last pass is lower than that of every other arm.
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
    """Put the GPU rows of a file into RESULTS.json and RESULTS.md, instead of those of the same GPUs. Raises ValueError in one line."""
    if not file.exists():
        raise ValueError(f"--publish {file}: no such file")
    fresh = [row for row in load(file) if row["family"] != "cpu"]
    if not fresh:
        raise ValueError(f"--publish: {file} holds no rows of a GPU: measure on one")
    fresh = [row for row in fresh if row["source"] == source()]
    if not fresh:
        raise ValueError(f"--publish: the rows of {file} are of other code than this: measure again")
    red = [row for row in fresh if row["red"]]
    if red:
        raise ValueError(f"--publish: {len(red)} rows are red, first {red[0]['op']} at {red[0]['shape']}: {red[0]['why']}")
    # what is written here is no change of what was measured
    commit, written = said("git", "rev-parse", "HEAD"), [f":!kernels/RESULTS.{kind}" for kind in ("json", "md")]
    changed = said("git", "status", "--porcelain", "--untracked-files=all", "--", "kernels", *written)
    if not commit or changed:
        raise ValueError(f"--publish: kernels/ is not what its commit says ({changed or 'no git here'}): commit first")
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


def plot(rows: list[Row], folder: Path) -> list[str]:
    """roofline.png: every time against the least that its bytes and FLOPs take. bars-OP.png: the last pass of every arm. Returns names."""
    from matplotlib.figure import Figure

    timed, where = [row for row in rows if not row["why"]], f"{rows[0]['device']}, {rows[0]['dtype']}"
    where = f"CPU, cut shapes: {where}" if rows[0]["family"] == "cpu" else where
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["arm"] for row in rows))}
    drawn: list[str] = []

    def save(figure: Figure, name: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        write(folder / name, buffer.getvalue())
        drawn.append(name)

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["arm"] for row in timed):
        for kind, marker, label in zip(PASSES, "os", (name, None), strict=True):
            of = [row for row in timed if (row["arm"], row["pass"]) == (name, kind)]
            points = [row["floor_ms"] for row in of], [row["ms"] for row in of]
            axes.plot(*points, marker, color=colours[name], markersize=5, alpha=0.8, label=label)
    for op in dict.fromkeys(row["op"] for row in timed):
        slowest = max((row for row in timed if row["op"] == op), key=lambda row: row["ms"])
        at = slowest["floor_ms"], slowest["ms"]
        axes.annotate(op, at, xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=7)
    axes.set(xscale="log", yscale="log", ylabel="measured, ms")
    axes.set_xlabel("floor, ms: the larger of bytes / copy rate and FLOPs / product rate")
    axes.axline((1, 1), (10, 10), color="black", linewidth=1)
    axes.set_title(f"Distance from the roofline (line); ○ forward, □ forward+backward\n{where}", fontsize=10)
    axes.legend(frameon=False)
    save(figure, "roofline.png")

    for op in dict.fromkeys(row["op"] for row in rows):
        of = [row for row in rows if row["op"] == op]
        last = last_pass(of)
        # what is not installed has a row of the first pass alone
        found = {(row["shape"], row["arm"]): row for row in of if row["pass"] == last or row["why"]}
        shapes, names = (list(dict.fromkeys(row[key] for row in of)) for key in ("shape", "arm"))
        # an empty place between shapes
        step = len(names) + 1
        figure = Figure(figsize=(10, 1.2 + 0.2 * step * len(shapes)), layout="constrained")
        axes = figure.subplots()
        labelled = set()
        for i, shape in enumerate(shapes):
            unit = math.nan
            for j, name in enumerate(names):
                row, y = found.get((shape, name)), step * i + j
                if row is None:
                    continue
                if row["why"]:
                    axes.text(0, y, f" {name}: {textwrap.shorten(row['why'], 80, placeholder=' …')}", va="center", fontsize=7)
                    continue
                ms = row["ms"]
                unit = ms if math.isnan(unit) else unit
                label = None if name in labelled else name
                labelled.add(name)
                axes.barh(y, ms / unit, 0.95, color=colours[name], label=label)
                axes.hlines(y, row["p20"] / unit, row["p80"] / unit, color="black", linewidth=1)
                axes.text(max(ms, row["p80"]) / unit, y, f"  {ms:.3g} ms", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8, zorder=0)
        axes.set_yticks([step * i + (len(names) - 1) / 2 for i in range(len(shapes))], shapes, fontsize=8)
        axes.margins(x=0.12)
        axes.set(xlim=(0, None), ylim=(step * len(shapes) - 1, -1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(f"{last}: time over that of the first arm that has one; lines: 20th to 80th percentile", fontsize=9)
        figure.legend(loc="outside upper center", ncols=8, frameon=False, fontsize=8, title=f"{op}; {where}")
        save(figure, f"bars-{op}.png")
    return drawn
