"""Tables and figures of the study (train/studies/study.py): rows of records in, markdown and PNG files out."""

import base64
import io
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mclr.errors import UserError
from mclr.train.studies.report import INK, score_cell
from mclr.train.studies.tour import gap_closed, mean_std
from mclr.train.system.files import in_memory, write_file

Record = dict[str, Any]  # what study.py keeps of a unit

# Key of the scores, heading, format; None: three significant digits.
COLUMNS = [
    ("cfd", "class-wise FD ↓", None),
    ("gap", "gap closed ↑", ".2f"),
    ("precision", "precision ↑", ".3f"),
    ("recall", "recall ↑", ".3f"),
    ("forwards_per_image", "forwards per image ↓", "g"),
]
# Colours of Okabe and Ito, which every kind of colour vision tells apart: one per kind of method, markers within it.
MCLR, REFERENCE, PLAIN, GUIDED = "#D55E00", "#009E73", "#6B7280", "#0072B2"
STYLES = {
    "control": (PLAIN, "^"),
    "base": ("#9CA3AF", "D"),
    "mclr-posterior": (MCLR, "s"),
    "mclr-posterior-scratch": (MCLR, "D"),
    "mclr-posterior-warmup": (MCLR, "H"),
    "mclr-null": (MCLR, "o"),
    "mclr-weighted": ("#E69F00", "v"),
    "mclr-uniform": ("#E69F00", "X"),
    "mclr-coarse": ("#CC79A7", "h"),
    "mclr-interval": ("#CC79A7", "P"),
    "mclr-window": ("#CC79A7", "d"),
    "unlearn": ("#000000", "p"),
    "cc_dpo": (REFERENCE, "<"),
    "cca": (REFERENCE, ">"),
    "ddo": (REFERENCE, "*"),
    "cfg": (GUIDED, "o"),
    "cfg-interval": ("#56B4E9", "P"),
    "cfg-window": ("#56B4E9", "d"),
    "autoguidance": (GUIDED, "*"),
}
# What the bundled digits-posterior was fitted on: the steps in its config.json, of the batch of `mclr prepare posterior`.
POSTERIOR_IMAGES = 1_200 * 128
LEGEND = """Grids: training seed 0, sampling seed 0. The best point by class-wise FD is repeated with three other training seeds, each
sampled once: mean ± standard deviation. † A value of it is at the end of its grid, so that a better one may lie beyond.

Every fine-tuning starts from the same base, at the one learning rate that was chosen for MCLR, and costs the same: forward 1x,
backward 2x, rows without gradient, the posterior classifier's steps and the drawing of ddo's samples counted. Not counted: the bundled
posterior classifier was fitted beforehand, for about as much as the whole budget ("once for its posterior"); mclr-posterior-scratch and
-warmup begin without it. unlearn, cc_dpo, cca and ddo were tried in one variant each, MCLR in several.

Gap closed: (control - method) / (control - cfg) in class-wise FD, each the mean of the training seeds that all three have, ± the deviation
of the seeds' own shares; – where cfg gains nothing. Images x cost: what fine-tuning saw, and what an image cost in images of maximum
likelihood. The judge is that of `make tour`; guided rows sample the controls. Forwards of a token model: its tokens forwarded, as a share
of the image's."""


@dataclass(frozen=True)
class Row:
    """What is known of a method. fixed: its settings in common; grid: points tried with training seed 0; chosen: the best of them,
    None while some are missing or when all diverged; repeats: training seed -> record, at the chosen point."""

    name: str
    fixed: tuple[str, ...]
    grid: dict[tuple[str, ...], Record]
    chosen: tuple[str, ...] | None
    repeats: dict[int, Record]

    def scored(self) -> dict[int, dict[str, float]]:
        """Training seed -> scores, of the repeats that did not diverge."""
        return {seed: record["scores"] for seed, record in self.repeats.items() if record["scores"]}

    def at_end(self) -> bool:
        """Whether a value of the chosen point is the least or the greatest that was tried of it."""
        values = [[float(setting.rpartition("=")[2]) for setting in point] for point in (self.chosen or (), *self.grid)]
        return any(chosen in (min(tried), max(tried)) for chosen, *tried in zip(*values, strict=True) if len({*tried}) > 1)


def label(point: tuple[str, ...]) -> str:
    """For people: ("objective.lam=0.5",) becomes lam 0.5; – where there was nothing to choose."""
    return ", ".join(setting.rpartition("=")[0].rpartition(".")[2] + " " + setting.rpartition("=")[2] for setting in point) or "–"


def write_family(rows: dict[str, list[Row]], out: Path) -> Path:
    """Write OUT/family.md and OUT/figures/*.png; returns the path of the first. rows: of each paradigm."""
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out / 'figures'} ({error.strerror}): choose another --out") from error
    for model, of_model in rows.items():
        for name, figure in (("family", curves_figure(model, of_model)), ("emergence", emergence_figure(model, of_model))):
            if figure is not None:
                write_file(out / "figures" / f"{model}-{name}.png", in_memory(figure.savefig, format="png"))
    write_file(out / "figures" / "forwards.png", in_memory(forwards_figure(rows).savefig, format="png"))
    write_file(out / "family.md", (markdown_tables(rows) + "\n").encode())
    return out / "family.md"


def gap(rows: list[Row], row: Row) -> float | dict[str, float] | None:
    """As the cells of report.py take it: gap_closed() of the training seeds that method, control and cfg have, and their deviation."""
    found = {r.name: {seed: s["cfd"] for seed, s in r.scored().items()} for r in rows}
    control, cfg, own = (found.get(name, {}) for name in ("control", "cfg", row.name))
    seeds = [seed for seed in own if seed in control and seed in cfg]
    if not seeds:
        return None
    share = gap_closed(*([cfd[seed] for seed in seeds] for cfd in (control, cfg, own)))
    shares = [gap_closed([control[seed]], [cfg[seed]], [own[seed]]) for seed in seeds]
    known = [value for value in shares if value is not None]
    if share is None or len(known) < max(len(seeds), 2):
        return share
    return {"mean": share, "std": statistics.stdev(known)}


def markdown_tables(rows: dict[str, list[Row]]) -> str:
    """Per paradigm: the table of the repeats, the settings in common, the table of the grids."""
    parts = []
    for model, of_model in rows.items():
        repeated = [row for row in of_model if row.repeats]
        headings = ["method", "chosen", *(heading for _, heading, _ in COLUMNS), "images x cost"]
        parts += [f"**{model}**", _table(headings, (_repeated_cells(of_model, row) for row in repeated))]
        parts.append("\n".join(f"- {row.name}: `{' '.join(row.fixed)}`" for row in of_model if row.fixed and row.grid))
        tried = ((row, point, record) for row in of_model for point, record in row.grid.items())
        columns = [column for column in COLUMNS if column[0] != "gap"]
        headings = ["method", "tried", *(heading for _, heading, _ in columns)]
        parts += [f"**{model}, the grids**", _table(headings, (_grid_cells(columns, *each) for each in tried))]
    return "\n\n".join([LEGEND, *(part for part in parts if part)])


def _table(headings: list[str], rows: Iterator[list[str]]) -> str:
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _repeated_cells(rows: list[Row], row: Row) -> list[str]:
    scores = list(row.scored().values())
    values = {key: mean_std([s[key] for s in scores]) for key in ("cfd", "precision", "recall", "forwards_per_image")}
    # of all seeds alike, but for a method whose compute depends on what it draws
    values["forwards_per_image"] = scores[0]["forwards_per_image"] if scores else None
    values["gap"] = gap(rows, row)
    cells = [score_cell(values[key], form, f"{row.name}.{key}") for key, _, form in COLUMNS]
    diverged = [record["diverged"] for record in row.repeats.values() if not record["scores"]]
    if diverged:
        cells[0] += f" ({len(scores)} seeds; {len(diverged)} diverged)"
    return [row.name, label(row.chosen or ()) + " †" * row.at_end(), *cells, _training(list(row.repeats.values()))]


def _training(records: list[Record]) -> str:
    """The images that the fine-tuning behind these records saw, and what one cost, in images of maximum likelihood."""
    runs = [record["run"] for record in records if record["run"]]
    if not runs:
        return "–"
    images, cost = statistics.mean(run["images"] for run in runs), statistics.mean(run["mle_images"] for run in runs)
    text = f"{images:,.0f} x {cost / images:.2f}"
    if generated := records[0].get("generated"):
        # a forward is a third of an image of maximum likelihood
        text += f" + {generated['count'] * generated['forwards_per_image'] / 3:,.0f} for its samples"
    if runs[0]["posterior_flops"] and records[0]["settings"]["model.posterior.weights"]:
        # an image costs its posterior the same beforehand and in the run
        share = runs[0]["posterior_flops"] / runs[0]["images"] / (runs[0]["flops"] / runs[0]["mle_images"])
        text += f" + {POSTERIOR_IMAGES * share:,.0f} once for its posterior"
    return text


def _grid_cells(columns: list[tuple[str, str, str | None]], row: Row, point: tuple[str, ...], record: Record) -> list[str]:
    if not record["scores"]:
        return [row.name, label(point), f"diverged at {record['diverged']:,} images", *["–"] * (len(columns) - 1)]
    cells = [score_cell(record["scores"][key], form, f"{row.name}.{key}") for key, _, form in columns]
    return [row.name, f"**{label(point)}**" if point == row.chosen and point else label(point), *cells]


def curves_figure(model: str, rows: list[Row]) -> Figure | None:
    """Class-wise FD (logarithmic) against precision and against recall: one line per method over its grid, training seed 0."""
    curves = {
        row.name: np.array([[s["precision"], s["recall"], s["cfd"]] for s in (r["scores"] for r in row.grid.values()) if s])
        for row in rows
        if row.name in STYLES and any(record["scores"] for record in row.grid.values())
    }
    if not curves:
        return None
    diverged = {row.name: sum(not record["scores"] for record in row.grid.values()) for row in rows}
    # the frame ends a little above doing nothing; what is worse stands at its edge
    points_N3 = np.concatenate(list(curves.values()))
    worst = 1.2 * max([curves[name][0, 2] for name in ("control", "base") if name in curves], default=points_N3[:, 2].max())
    inside_N3 = points_N3[points_N3[:, 2] <= worst]
    low_3, high_3 = inside_N3.min(0), np.array([*inside_N3[:, :2].max(0), worst])
    figure = Figure(figsize=(12, 6), dpi=160, layout="constrained")
    figure.suptitle(
        f"{model}: each method over its grid, on the seeds that choose from it (training 0, sampling 0)\n"
        "solid: fine-tuned at equal compute; dashed: guidance of the base or the control; hollow: beyond the frame",
        color=INK,
        fontsize=11,
    )
    for axes, column, metric in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("precision", "recall"), strict=True):
        for name, points in curves.items():
            colour, marker = STYLES[name]
            guided = name.startswith("cfg") or name in ("autoguidance", "base")
            lost = f" ({diverged[name]} diverged)" if diverged[name] else ""
            style = {"color": colour, "marker": marker, "markersize": 6.5}
            shown = points.clip(low_3, high_3)
            beyond = shown[(shown != points).any(1)]
            axes.plot(shown[:, column], shown[:, 2], label=name + lost, linewidth=1.3, linestyle="--" if guided else "-", **style)
            # over the filled marker; half of it lies outside the axes, which are not to shrink for it
            hollow = {"linestyle": "", "markerfacecolor": "white", "clip_on": False, "in_layout": False, "zorder": 3}
            axes.plot(beyond[:, column], beyond[:, 2], **hollow, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_ylim(top=worst)
        _plain(axes)
        axes.set_xlabel(f"{metric} (higher is better)", color=INK)
        if column == 0:
            axes.set_ylabel("class-wise FD (lower is better)", color=INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def emergence_figure(model: str, rows: list[Row]) -> Figure | None:
    """The same ten seeds, one per condition: down ever longer runs of MCLR, beside guidance weights rising on the base."""
    found = {row.name: row.grid for row in rows}
    guided = [(label(point), record) for point, record in found.get("base", {}).items() if record["scores"]]
    tuned = [
        (f"{record['run']['images']:,} images", record) for record in found.get("emergence", {}).values() if record["scores"]
    ]
    base = found.get("base", {}).get(("sample.gamma=0",))
    if base is None or not tuned:
        return None
    columns = {
        "MCLR fine-tuning, no guidance": [("0 images", base), *tuned],
        "base with guidance, no fine-tuning": guided,
    }
    count = max(len(column) for column in columns.values())
    figure = Figure(figsize=(12, 0.55 * count + 0.7), dpi=160, layout="constrained")
    figure.suptitle(f"{model}: what fine-tuning and what guidance make of the same seeds", color=INK)
    places = figure.subplots(count, 2, squeeze=False)
    for place in places.flat:
        place.set_axis_off()
    for side, (title, column) in enumerate(columns.items()):
        places[0, side].set_title(title, fontsize=10, color=INK)
        for axes, (name, record) in zip(places[:, side], column, strict=False):
            axes.imshow(Image.open(io.BytesIO(base64.b64decode(record["pictures"]))), cmap="gray", vmin=0, vmax=255)
            text = f"{name}\nclass-wise FD {record['scores']['cfd']:.3g}"
            axes.text(-0.02, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=INK)
    return figure


def forwards_figure(rows: dict[str, list[Row]]) -> Figure:
    """Bars: what an image costs to sample with each method, and the class-wise FD that it buys."""
    figure = Figure(figsize=(12, 5), dpi=160, layout="constrained")
    figure.suptitle("Network forwards per image, at the chosen point of each grid", color=INK)
    for axes, (model, of_model) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        shown = [row for row in of_model if row.scored()]
        for place, row in enumerate(reversed(shown)):
            scores = list(row.scored().values())
            forwards, cfd = scores[0]["forwards_per_image"], statistics.mean(s["cfd"] for s in scores)
            axes.barh(place, forwards, color=STYLES[row.name][0], height=0.7)
            axes.text(forwards, place, f" {forwards:g}, class-wise FD {cfd:#.3g}", va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)])
        axes.set_title(model, fontsize=10, color=INK)
        axes.margins(x=0.45)
        axes.set_xlim(left=0)
        axes.set_xlabel("network forwards per image")
        _plain(axes)
        # they would cross the texts
        axes.grid(False)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
