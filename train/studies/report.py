"""The report of a tour: tables, figures, one page."""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from mclr.errors import UserError
from mclr.train.studies.curves import WEIGHTS, curves_figure, dict_of, list_of, number_of
from mclr.train.system.files import regular, write_file, write_text

# Row -> its name in the tables; its weight, where it has one: key in results.json and symbol.
ROWS = {"base": "base", "control": "control (more mle)", "cfg": "control + CFG", "mclr": "MCLR"}
# Key in results.json, heading (↑ higher is better, ↓ lower is better), format; None: three significant digits, a judge sets the scale.
METRICS = [
    ("accuracy", "class accuracy ↑", ".3f"),
    ("fd", "FD ↓", None),
    ("cfd", "class-wise FD ↓", None),
    ("precision", "precision ↑", ".3f"),
    ("recall", "recall ↑", ".3f"),
    ("density", "density ↑", ".3f"),
    ("coverage", "coverage ↑", ".3f"),
    ("forwards_per_image", "forwards per image ↓", "g"),
]
HEADINGS = ["model", *(heading for _, heading, _ in METRICS), "images/s ↑"]
LEGEND = """Values are mean ± standard deviation over repeated sampling, speeds the median with the range of the runs; – is not
measured. <em>base</em>: the model that fine-tuning starts from. <em>control</em>: base fine-tuned by plain maximum likelihood
with the compute that MCLR took, which is enough for more images. <em>CFG</em>: the control, sampled with classifier-free guidance
of extra weight γ. <em>MCLR</em>: base fine-tuned with contrast weight λ, sampled without guidance. FD is the Fréchet distance to
real images in the judge's features, class-wise FD its mean over the conditions; precision and density say how real the samples
are, recall and coverage how much of the real data they reach. In the figures, the points of both curves are of sampling seed 0
alone, base and control the means of their rows."""
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
    """results.json of a tour. Raises UserError when it is missing, unreadable or without scores."""
    path = folder / "results.json"
    try:
        results = json.loads(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: give the folder of a tour; a training run is scored by `mclr evaluate {folder}`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): repeat the run that wrote it") from None
    if not isinstance(results, dict) or not paradigms(results):
        raise UserError(f"{path} holds no scores ({', '.join(ROWS)} under the name of a paradigm): repeat the run that wrote it")
    return results


def paradigms(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries that hold rows of scores, by name, in the order of the file."""
    return {name: entry for name, entry in results.items() if isinstance(entry, dict) and ROWS.keys() & entry.keys()}


def write_report(results: dict[str, Any], run_folder: Path, out: Path) -> Path:
    """Write OUT/figures/NAME-curves.png and OUT/report.html; returns the path of the page. Raises UserError, also for bad scores."""
    figures = {name: curves_figure(name, paradigm) for name, paradigm in paradigms(results).items()}
    page = html_page(results, run_folder, figures)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out / 'figures'} ({error.strerror}): choose another --out") from None
    for name, png in figures.items():
        if png is not None:
            write_file(out / "figures" / f"{name}-curves.png", png)
    write_text(out / "report.html", page)
    return out / "report.html"


def markdown_table(results: dict[str, Any]) -> str:
    """One markdown table per paradigm: the README's. Raises UserError for scores that are no numbers."""
    parts = []
    for name, paradigm in paradigms(results).items():
        rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *table_rows(name, paradigm)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        parts.append(f"**{name}**\n\n{table}\n\n{gap_sentence(name, paradigm)}")
    return "\n\n".join(parts)


def table_rows(name: str, paradigm: dict[str, Any]) -> Iterator[list[str]]:
    """Cells of one row after the other; a dash where the run has no number."""
    for row, label in ROWS.items():
        if row in paradigm:
            where = f"{name}.{row}"
            scores = dict_of(paradigm[row], where)
            if row in WEIGHTS and (key := WEIGHTS[row][0]) in scores:
                label += f", {WEIGHTS[row][1]} = {number_of(scores[key], f'{where}.{key}'):g}"
            cells = [score_cell(scores.get(key), form, f"{where}.{key}") for key, _, form in METRICS]
            yield [label, *cells, _speed(scores.get("images_per_second"), f"{where}.images_per_second")]


def gap_sentence(name: str, paradigm: dict[str, Any]) -> str:
    if "gap_closed" not in paradigm:
        return "Gap closed: not measured in this run."
    if paradigm["gap_closed"] is None:
        return "Gap closed: –. CFG's class-wise FD is no lower than the control's, so there is no gap to close."
    share = number_of(paradigm["gap_closed"], f"{name}.gap_closed")
    return f"Gap closed: MCLR reaches {share:.0%} of CFG's gain in class-wise FD over the control, without guidance."


def html_page(results: dict[str, Any], run_folder: Path, figures: dict[str, bytes | None]) -> str:
    """The whole page; its pictures lie inside it, so that the file alone can be mailed and opened anywhere."""
    title = escape(f"MCLR report: {run_folder.resolve().name}")
    judge = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in _facts(dict_of(results.get("judge", {}), "judge"))
    )
    judge_html = f"<h2>The judge</h2><dl>{judge}</dl>" if judge else _missing("judge is not described")
    body = [f"<h1>{title}</h1>", f"<p>{LEGEND}</p>", judge_html]
    for name, paradigm in paradigms(results).items():
        body += [f"<h2>{escape(name)}</h2>", _table(HEADINGS, table_rows(name, paradigm))]
        body.append(f"<p><strong>{escape(gap_sentence(name, paradigm))}</strong></p>")
        png = figures[name]
        body.append(_picture(png, f"{name}: class-wise FD over both sweeps") if png else _missing("sweep was not run"))
        body += _grids(dict_of(paradigm.get("grids") or {}, f"{name}.grids"), run_folder)
        compute = dict_of(paradigm.get("compute") or {}, f"{name}.compute")
        body.append("<h3>Compute</h3>")
        body.append(_table(["quantity", "value"], _facts(compute)) if compute else _missing("compute was not recorded"))
    body += ["<h2>Cost</h2>", _phases(results.get("phases") or [])]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _grids(grids: dict[str, Any], run_folder: Path) -> list[str]:
    """Sample grids side by side: in all of them, the same place has the same seed and condition."""
    pictures, missing = [], []
    for row, path in grids.items():
        name = ROWS.get(row, row)
        try:
            picture = _picture((run_folder / str(path)).read_bytes(), f"samples of {name}")
            pictures.append(f"<figure>{picture}<figcaption>{escape(name)}</figcaption></figure>")
        except OSError:
            missing.append(_missing(f"grid of {name} ({path}) is missing"))
    shown = f'<div class="grids">{"".join(pictures)}</div>' if grids else _missing("sample grids were not drawn")
    return ["<h3>Samples, the same seeds in the same places</h3>", shown, *missing]


def _phases(phases: Any) -> str:
    """Where the time went: seconds and share of each phase, and their sum."""
    if not phases:
        return _missing("phases were not timed")
    named = [dict_of(phase, "phases") for phase in list_of(phases, "phases")]
    timed = [(str(phase.get("name")), number_of(phase.get("seconds"), "phases.seconds")) for phase in named]
    total = sum(seconds for _, seconds in timed)
    rows = [[name, f"{seconds:,.1f}", f"{seconds / max(total, 1e-9):.0%}"] for name, seconds in timed]
    return _table(["phase", "seconds", "share"], [*rows, ["total", f"{total:,.1f}", ""]])


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{_tied(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _tied(heading: str) -> str:
    """The heading, its arrow tied to the last word."""
    return "&nbsp;".join(escape(heading).rsplit(" ", 1)) if heading.endswith(("↑", "↓")) else escape(heading)


def _picture(png: bytes, description: str) -> str:
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _missing(what: str) -> str:
    return f'<p class="missing">In this run the {escape(what)}.</p>'


def score_cell(value: Any, form: str | None, where: str) -> str:
    """A number, or {mean, std} as "mean ± std" with as many decimals; a dash for None."""
    if value is None:
        return "–"
    mean, std = (value.get("mean"), value.get("std")) if isinstance(value, dict) else (value, None)
    form = form or f".{_decimals(number_of(mean, where), least=1)}f"
    return format(number_of(mean, where), form) + ("" if std is None else " ± " + format(number_of(std, f"{where}.std"), form))


def _speed(value: Any, where: str) -> str:
    """Median of the runs and their range; a dash for None."""
    if value is None:
        return "–"
    median = number_of(dict_of(value, where).get("median"), f"{where}.median")
    runs = [number_of(one, f"{where}.runs") for one in list_of(value.get("runs") or [], f"{where}.runs")]
    return _digits(median) + (f" ({_digits(min(runs))}–{_digits(max(runs))})" if runs else "")


def _facts(values: dict[str, Any]) -> Iterator[list[str]]:
    """[name, value] of free-form entries as text."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        yield [name.replace("_", " "), _digits(value) if number else str(value)]


def _digits(value: float) -> str:
    """Whole numbers in full, others to three significant digits; thousands separated, no exponent."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{_decimals(value, least=0)}f}"


def _decimals(value: float, least: int) -> int:
    """Digits after the point that show three significant ones, up to six."""
    return min(6, max(least, 2 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else least
