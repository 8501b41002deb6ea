"""The report of a tour: tables, a figure per model, and one page with all of it."""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mclr.errors import UserError
from mclr.kernels.timing import table
from mclr.train.system.files import in_memory, regular, write_file, write_text

# row -> its name in the tables
ROWS = {"base": "base", "control": "control (more mle)", "cfg": "control + CFG", "mclr": "MCLR", "dial": "MCLR with a dial"}
# row -> the key of its weight in results.json, and its symbol
WEIGHTS = {"cfg": ("gamma", "γ"), "mclr": ("lam", "λ"), "dial": ("strength", "s")}
SWEPT = ("cfg", "dial")  # rows whose other weights were tried: the curves of the figure
# key in results.json, heading (↑ higher is better, ↓ lower is better), format; None: three significant digits
METRICS = [
    ("accuracy", "class accuracy ↑", ".3f"),
    ("fd", "FD ↓", None),
    ("cfd", "class-wise FD ↓", None),
    ("precision", "precision ↑", ".3f"),
    ("recall", "recall ↑", ".3f"),
    ("density", "density ↑", ".3f"),
    ("coverage", "coverage ↑", ".3f"),
    ("forwards_per_image", "forwards per image ↓", "g"),
    ("images_per_second", "images/s ↑", None),
]
HEADINGS = ["model", *(heading for _, heading, _ in METRICS)]
# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart; the markers differ as well
STYLES = {
    "cfg": ("#0072B2", "o"),
    "dial": ("#D55E00", "s"),
    "mclr": ("#D55E00", "*"),
    "base": ("#6B7280", "D"),
    "control": ("#6B7280", "^"),
}
INK = "#1F2937"
LEGEND = """Values are mean ± standard deviation over the sampling seeds; speeds are the median and the range of the runs; – means
not measured. <em>base</em>: the model before fine-tuning. <em>control</em>: base fine-tuned by plain maximum likelihood, with the
compute of MCLR (so it sees more images). <em>CFG</em>: the control, sampled with classifier-free guidance of extra weight γ.
<em>MCLR</em>: base fine-tuned with contrast weight λ, sampled without guidance. <em>MCLR with a dial</em>: base fine-tuned once for all
strengths, sampled at strength s without guidance. FD is the Fréchet distance to real images in the
features of the judge; class-wise FD is its mean over the conditions. Precision and density tell how real the samples are, recall
and coverage how much of the real data they cover. In the figures, both curves use sampling seed 0; single points are the means of
their rows."""
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1F2937; max-width: 1160px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #D1D5DB } h3 { font-size: 1.05rem }
table { border-collapse: collapse; font-size: .76rem; font-variant-numeric: tabular-nums; margin: 0 0 .5rem }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #E5E7EB } td { white-space: nowrap }
th { vertical-align: bottom; border-bottom: 2px solid #9CA3AF } th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; font-size: .9rem } dd { margin: 0 }
.wide { overflow-x: auto } .missing { color: #6B7280; font-style: italic } img { max-width: 100% }
.grids { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 220px; max-width: 360px }
figure img { width: 100%; image-rendering: pixelated } figcaption { font-size: .85rem }
"""


def load_results(folder: Path) -> dict[str, Any]:
    """results.json of a tour. Raises UserError if it is missing, unreadable or without scores."""
    path = folder / "results.json"
    try:
        results = json.loads(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a tour; `mclr evaluate {folder}` scores a training run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): repeat the tour") from None
    if not isinstance(results, dict) or not models(results):
        raise UserError(f"{path} holds no scores ({', '.join(ROWS)} under the name of a model): repeat the tour")
    return results


def models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries with rows of scores, by name, in the order of the file."""
    return {name: entry for name, entry in results.items() if isinstance(entry, dict) and ROWS.keys() & entry.keys()}


@contextmanager
def written_by_a_tour() -> Iterator[None]:
    """Turns an error of what is done inside, with results, into a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"results.json is not as a tour writes it ({type(error).__name__}: {error}): repeat the tour") from error


def write_report(results: dict[str, Any], tour: Path, out: Path) -> Path:
    """Write OUT/figures/MODEL-curves.png and OUT/report.html, and return the path of the page. tour: the folder of the sample grids.

    Raises UserError if results are not as a tour writes them (then nothing is written), or if `out` cannot be written.
    """
    with written_by_a_tour():
        figures = {name: curves_figure(name, model) for name, model in models(results).items() if model.get("sweep")}
        page = html_page(results, tour, figures)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out / 'figures'} ({error.strerror}): choose another --out") from None
    for name, png in figures.items():
        write_file(out / "figures" / f"{name}-curves.png", png)
    write_text(out / "report.html", page)
    return out / "report.html"


def markdown_table(results: dict[str, Any]) -> str:
    """One markdown table per model. Raises UserError as write_report does."""
    with written_by_a_tour():
        parts = (f"**{name}**\n\n{table(HEADINGS, table_rows(m))}\n\n{gap_sentence(m)}" for name, m in models(results).items())
        return "\n\n".join(parts)


def table_rows(model: dict[str, Any]) -> Iterator[list[str]]:
    """The cells of each row. A dash stands for a number that the tour does not have."""
    for row, label in ROWS.items():
        if row in model:
            scores = model[row]
            if row in WEIGHTS and WEIGHTS[row][0] in scores:
                key, symbol = WEIGHTS[row]
                label += f", {symbol} = {scores[key]:g}"
            yield [label, *(cell(scores.get(key), form) for key, _, form in METRICS)]


def gap_sentence(model: dict[str, Any]) -> str:
    """The sentence that says how much of CFG's gain MCLR reaches."""
    if "gap_closed" not in model:
        return "Gap closed: not measured in this run."
    if model["gap_closed"] is None:
        return "Gap closed: –. CFG's class-wise FD is no lower than the control's, so there is no gap to close."
    share, dial = f"{model['gap_closed']:.0%}", model.get("gap_closed_by_dial")
    share += "" if dial is None else f" (with a dial {dial:.0%})"
    return f"Gap closed: MCLR reaches {share} of CFG's gain in class-wise FD over the control, without guidance."


def html_page(results: dict[str, Any], tour: Path, figures: dict[str, bytes]) -> str:
    """The whole page, with the pictures inside: one file that can be mailed and opened anywhere."""
    title = escape(f"MCLR report: {tour.resolve().name}")
    judge = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in _facts(results.get("judge", {})))
    body = [f"<h1>{title}</h1>", f"<p>{LEGEND}</p>", f"<h2>The judge</h2><dl>{judge}</dl>" if judge else ""]
    for name, model in models(results).items():
        body += [f"<h2>{escape(name)}</h2>", _table(HEADINGS, table_rows(model))]
        body.append(f"<p><strong>{escape(gap_sentence(model))}</strong></p>")
        if name in figures:
            body.append(_picture(figures[name], f"{name}: class-wise FD over both sweeps"))
        grids = {ROWS[row]: tour / path for row, path in model.get("grids", {}).items() if (tour / path).is_file()}
        if grids:
            body += ["<h3>Samples, the same seeds in the same places</h3>", '<div class="grids">']
            for row, path in grids.items():
                picture = _picture(path.read_bytes(), f"samples of {row}")
                body.append(f"<figure>{picture}<figcaption>{escape(row)}</figcaption></figure>")
            body.append("</div>")
        if model.get("compute"):
            body += ["<h3>Compute</h3>", _table(["quantity", "value"], _facts(model["compute"]))]
    if phases := results.get("phases"):
        total = sum(phase["seconds"] for phase in phases)
        rows = [[one["name"], f"{one['seconds']:,.1f}", f"{one['seconds'] / max(total, 1e-9):.0%}"] for one in phases]
        body += ["<h2>Cost</h2>", _table(["phase", "seconds", "share"], [*rows, ["total", f"{total:,.1f}", ""]])]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    # no line break before the arrow of a heading
    head = "".join(f"<th>{escape(heading).replace(' ↑', '&nbsp;↑').replace(' ↓', '&nbsp;↓')}</th>" for heading in headings)
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _picture(png: bytes, description: str) -> str:
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def curves_figure(name: str, model: dict[str, Any]) -> bytes:
    """PNG of class-wise FD (logarithmic) against precision and against recall, over both sweeps."""
    figure = Figure(figsize=(11, 6), dpi=160, layout="constrained")
    figure.suptitle(f"{name}: what each weight buys, with guidance (CFG) and without (MCLR)", color=INK, fontsize=13)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, ("precision", "recall"), strict=True):
        _draw_curves(axes, model, metric)
    panels[0].set_ylabel("class-wise FD (lower is better)", color=INK)
    panels[0].legend(frameon=False)
    return in_memory(figure.savefig, format="png")


def _draw_curves(axes: Axes, model: dict[str, Any], metric: str) -> None:
    """Draw a line per sweep, with the weight at each point, and a point for every other row. Leave out scores that are not finite."""
    for row, (colour, marker) in STYLES.items():
        if row in SWEPT:
            key, symbol = WEIGHTS[row]
            points = sorted((entry[key], entry[metric], entry["cfd"]) for entry in model["sweep"].get(row, []))
            label = f"{ROWS[row]}, by {symbol}"
        else:
            points = [(None, _mean(model[row][metric]), _mean(model[row]["cfd"]))] if row in model else []
            label = ROWS[row]
        points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
        places = [x for _, x, _ in points], [y for *_, y in points]
        axes.plot(*places, color=colour, marker=marker, linewidth=1.8, linestyle="-" if row in SWEPT else "none", label=label)
        # points over all weights
        if points:
            axes.scatter(*places, color=colour, marker=marker, zorder=4)
        for weight, x, y in points if row in SWEPT else []:
            # the two lines often meet: the weights of one are above it, those of the other below, on white
            side = (0, 8) if row == "dial" else (0, -16)
            note = axes.annotate(
                f"{weight:g}", (x, y), side, textcoords="offset points", color=colour, fontsize=9, ha="center", zorder=5
            )
            note.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.margins(0.1)
    axes.set_xlabel(f"{metric} (higher is better)", color=INK)
    axes.grid(color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(value: float | dict[str, float]) -> float:
    return value["mean"] if isinstance(value, dict) else value


def cell(value: float | dict[str, Any] | None, form: str | None) -> str:
    """A number, {mean, std} as "mean ± std" with the same decimals, or {median, runs} as the median and the range; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, dict) and "runs" in value:
        return f"{_digits(value['median'])} ({_digits(min(value['runs']))}–{_digits(max(value['runs']))})"
    form = form or f".{_decimals(_mean(value), least=1)}f"
    deviation = f" ± {value['std']:{form}}" if isinstance(value, dict) and "std" in value else ""
    return f"{_mean(value):{form}}{deviation}"


def _facts(values: dict[str, Any]) -> Iterator[list[str]]:
    """[name, value] of free entries, as text."""
    for name, value in values.items():
        yield [name.replace("_", " "), _digits(value) if isinstance(value, int | float) else str(value)]


def _digits(value: float) -> str:
    """Whole numbers in full, others with three significant digits; commas between thousands, no exponent."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{_decimals(value, least=0)}f}"


def _decimals(value: float, least: int) -> int:
    """Digits after the point that show three significant digits; at most six."""
    return min(6, max(least, 2 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else least
