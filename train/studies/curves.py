"""The figure of a tour: class-wise FD against precision and recall, over both sweeps."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from mclr.errors import UserError
from mclr.train.system.files import in_memory

WEIGHTS = {"cfg": ("gamma", "γ"), "mclr": ("lam", "λ")}


# Okabe and Ito's blue and vermilion, which every kind of colour vision tells apart; the markers differ as well.
STYLES = {"cfg": ("#0072B2", "o"), "mclr": ("#D55E00", "s"), "base": ("#6B7280", "D"), "control": ("#6B7280", "^")}


INK = "#1F2937"


# Points whose class-wise FD is so many times the best one are named below the axis instead of drawn.
FRAME = 6


def curves_figure(name: str, paradigm: dict[str, Any]) -> bytes | None:
    """PNG of class-wise FD against precision and against recall, over both sweeps; None where the run has no sweep."""
    sweep = dict_of(paradigm.get("sweep") or {}, f"{name}.sweep")
    if not any(sweep.get(row) for row in WEIGHTS):
        return None
    figure = Figure(figsize=(11, 5.6), dpi=160, layout="constrained")
    figure.suptitle(f"{name}: what each weight buys, with guidance (CFG) and without (MCLR)", color=INK, fontsize=13)
    panels = []
    for axes, metric in zip(figure.subplots(1, 2), ("precision", "recall"), strict=True):
        curves, left_out = _in_frame([*_sweep_curves(name, sweep, metric), *_single_points(name, paradigm, metric)])
        _draw(axes, curves, metric, left_out)
        panels.append((axes, curves))
    # Labels are placed in pixels: the layout must be settled before, and must not move after.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, curves in panels:
        _place_labels(axes, curves)
    return in_memory(figure.savefig, format="png")


@dataclass(frozen=True)
class Curve:
    """Points [N, 2] in data units and the label of each; row names the style."""

    row: str
    points_N2: np.ndarray
    labels: list[str]


def _sweep_curves(name: str, sweep: dict[str, Any], metric: str) -> Iterator[Curve]:
    """One curve per sweep, by growing weight."""
    for row, (key, symbol) in WEIGHTS.items():
        where = f"{name}.sweep.{row}"
        entries = [dict_of(entry, where) for entry in list_of(sweep.get(row) or [], where)]
        points = sorted([number_of(entry.get(key), f"{where}.{key}"), *_place(entry, metric, where)] for entry in entries)
        if points:
            yield Curve(row, np.array(points)[:, 1:], [f"{row.upper()}, {symbol} = {weight:g}" for weight, *_ in points])


def _single_points(name: str, paradigm: dict[str, Any], metric: str) -> Iterator[Curve]:
    for row in ("base", "control"):
        if row in paradigm:
            yield Curve(row, np.array([_place(dict_of(paradigm[row], f"{name}.{row}"), metric, f"{name}.{row}")]), [row])


def _place(scores: dict[str, Any], metric: str, where: str) -> list[float]:
    """[metric, class-wise FD], the means where they are repeated; nan where the run has none."""
    values = [scores.get(key) for key in (metric, "cfd")]
    means = [value.get("mean") if isinstance(value, dict) else value for value in values]
    return [math.nan if mean is None else number_of(mean, f"{where}.{metric} or cfd") for mean in means]


def _in_frame(curves: list[Curve]) -> tuple[list[Curve], list[str]]:
    """The curves without the points that cannot be drawn, or that are so bad that the rest would shrink to a dot; and their names."""
    worst = FRAME * min((height for curve in curves for height in curve.points_N2[:, 1] if math.isfinite(height)), default=0)
    kept, left_out = [], []
    for curve in curves:
        keep_N = np.isfinite(curve.points_N2).all(1) & (curve.points_N2[:, 1] <= worst)
        left_out += [f"{curve.labels[i]} (at {x:.4g}, {y:.4g})" for i, (x, y) in enumerate(curve.points_N2) if not keep_N[i]]
        if keep_N.any():
            kept.append(Curve(curve.row, curve.points_N2[keep_N], [curve.labels[i] for i in np.flatnonzero(keep_N)]))
    return kept, left_out


def _draw(axes: Axes, curves: list[Curve], metric: str, left_out: list[str]) -> None:
    for curve in curves:
        colour, marker = STYLES[curve.row]
        axes.plot(*curve.points_N2.T, color=colour, marker=marker, markersize=6, linewidth=1.8)
    axes.margins(0.14)
    axes.set_xlabel("\n".join([f"{metric} (higher is better)", *(f"outside: {name}" for name in left_out)]), color=INK)
    axes.set_ylabel("class-wise FD (lower is better)", color=INK)
    axes.grid(color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: Axes, curves: list[Curve]) -> None:
    """Write each label beside its point, where it covers the least of the curves and of the labels before it."""
    pixels = [axes.transData.transform(curve.points_N2) for curve in curves]
    obstacles_P2 = np.concatenate([_along(points_N2) for points_N2 in pixels]) if pixels else np.empty((0, 2))
    boxes: list[tuple[np.ndarray, np.ndarray]] = []
    for curve, places_N2 in zip(curves, pixels, strict=True):
        colour, _ = STYLES[curve.row]
        # The whole name once per curve, at its end; the weight alone at its other points.
        labels = [*(label.split(" = ")[-1] for label in curve.labels[:-1]), curve.labels[-1]]
        for place_2, point_2, label in zip(places_N2, curve.points_N2, labels, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            note = axes.annotate(
                label,
                tuple(point_2),
                (0, 0),
                textcoords="offset pixels",
                ha="center",
                va="center",
                color=colour,
                arrowprops=leader,
            )
            half_2 = np.array(Text.get_window_extent(note).size) / 2 + 6
            choices = []
            for gap in (6, 20, 36, 56):
                for angle in np.radians(np.arange(0, 360, 15)):
                    side_2 = np.array([np.cos(angle), np.sin(angle)])
                    # The point stays outside the box: on its long side, its short side or at a corner.
                    offset_2 = gap * side_2 + half_2 * (1.5 * side_2).clip(-1, 1)
                    low_2, high_2 = place_2 + offset_2 - half_2, place_2 + offset_2 + half_2
                    covered = ((obstacles_P2 > low_2) & (obstacles_P2 < high_2)).all(1).sum()
                    overlaps = sum(bool((low_2 < high).all() and (low < high_2).all()) for low, high in boxes)
                    outside = bool((low_2 < axes.bbox.min).any() or (high_2 > axes.bbox.max).any())
                    choices.append((covered + gap / 6 + 30 * overlaps + 1000 * outside, tuple(offset_2), (low_2, high_2)))
            _, offset, box = min(choices, key=lambda choice: choice[0])
            note.set_position(offset)
            boxes.append(box)


def _along(points_N2: np.ndarray) -> np.ndarray:
    """Points along a polyline, one every few pixels; its corners, where the markers are, count eight times."""
    length_N = np.concatenate([[0], np.linalg.norm(np.diff(points_N2, axis=0), axis=1).cumsum()])
    place_P = np.concatenate([length_N.repeat(8), np.arange(0, length_N[-1], 5)])
    return np.stack([np.interp(place_P, length_N, points_N2[:, axis]) for axis in (0, 1)], axis=1)


def number_of(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"results.json: {where} should be a number, not {_short(value)}; repeat the run that wrote it")
    return value


def dict_of(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"results.json: {where} should hold named values, not {_short(value)}; repeat the run that wrote it")
    return value


def list_of(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"results.json: {where} should be a list, not {_short(value)}; repeat the run that wrote it")
    return value


def _short(value: Any) -> str:
    return json.dumps(value)[:40]
