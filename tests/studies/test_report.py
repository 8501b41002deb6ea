"""The report of made-up results: every number on the page, nothing loaded from outside, one line for whatever cannot be read."""

import base64
import copy
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from mclr.train import cli
from mclr.train.data.images import image_grid
from mclr.train.report import main
from mclr.train.studies.report import curves_figure, markdown_table


def row(start: float, **weight: float) -> dict:
    """Scores that differ in every entry, so that a number on the page has one possible origin."""
    shares = ("accuracy", "precision", "recall", "density", "coverage")
    scores = {key: {"mean": start + 0.0111 * i, "std": 0.0012 + 0.001 * i} for i, key in enumerate(shares)}
    scores |= {key: {"mean": 100 * start + 10.3 * i, "std": 1.2 + i} for i, key in enumerate(("fd", "cfd"))}
    return scores | {"forwards_per_image": 35, "images_per_second": {"median": 412.0, "runs": [399.6, 412.0, 1420.0]}} | weight


def sweep(key: str, shift: float) -> list[dict]:
    return [
        {key: w, "cfd": 60 + 90 * (w - 0.3) ** 2 + shift, "precision": 0.8 + 0.1 * w, "recall": 0.98 - 0.1 * w}
        for w in (0.1, 0.3, 1)
    ]


RESULTS = {
    "judge": {"network": "a classifier <of digits>", "test_accuracy": 0.989},
    "phases": [{"name": "judge", "seconds": 31.25}, {"name": "fine-tuning", "seconds": 72.5}],
    "edm2-digits": {
        "base": row(0.51),
        "control": row(0.62),
        "cfg": row(0.73, gamma=0.1),
        "mclr": row(0.84, lam=0.2),
        "dial": row(0.95, strength=0.7),
        "gap_closed": 0.913,
        "gap_closed_by_dial": 1.042,
        "sweep": {"cfg": sweep("gamma", 0), "dial": sweep("strength", 5)},
        "compute": {"images_seen": 38400, "step_time_over_mle": 1.437, "device": "two cores"},
        "grids": {"base": "grids/base.png", "mclr": "grids/mclr.png"},
    },
    "var-digits": {"control": row(0.41)},
}


def run_folder(folder: Path, results: object) -> Path:
    (folder / "grids").mkdir(parents=True)
    for i, name in enumerate(("base", "mclr")):
        (folder / "grids" / f"{name}.png").write_bytes(image_grid(np.full((4, 1, 8, 8), 50 * i, np.uint8), 2, 2, scale=2))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", page)).replace("\xa0", " ")


def expected_numbers(results: dict) -> list[str]:
    numbers = []
    for scores in (results["edm2-digits"][name] for name in ("base", "control", "cfg", "mclr", "dial")):
        for key, score in scores.items():
            if "mean" in (score if isinstance(score, dict) else {}):
                digits = 1 if key in ("fd", "cfd") else 3
                numbers.append(f"{score['mean']:.{digits}f} ± {score['std']:.{digits}f}")
    return [*numbers, "412 (400–1,420)", "35", "γ = 0.1", "λ = 0.2", "s = 0.7", "91% (with a dial 104%)"]


def test_page_holds_every_number(tmp_path):
    folder = run_folder(tmp_path / "a-run", RESULTS)
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<dt>network</dt><dd>a classifier &lt;of digits&gt;</dd><dt>test accuracy</dt><dd>0.989</dd>" in page
    text = text_of(page)
    others = ["a-run", "a classifier <of digits>", "0.989", "31.2", "72.5", "103.8", "70%", "38,400", "1.44", "two cores"]
    for number in [*expected_numbers(RESULTS), *others]:
        assert number in text, number


def test_page_is_self_contained(tmp_path):
    folder = run_folder(tmp_path / "run", RESULTS)
    assert main([str(folder), "--out", str(tmp_path / "elsewhere" / "page")]) == 0
    assert not (folder / "report.html").exists()
    page = (tmp_path / "elsewhere" / "page" / "report.html").read_text()
    tags: list[tuple[str, dict]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not re.search(r"https?:|url\(|@import", page)
    sources = [attributes["src"] for _, attributes in tags if "src" in attributes]
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    curves = Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert curves.width > 1000
    figure = tmp_path / "elsewhere" / "page" / "figures" / "edm2-digits-curves.png"
    assert figure.read_bytes() == base64.b64decode(sources[0].partition(",")[2])
    assert not (figure.parent / "var-digits-curves.png").exists()


def test_what_a_run_lacks_is_left_out(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["edm2-digits"]["grids"]["cfg"] = "grids/none.png"
    del results["judge"], results["phases"], results["edm2-digits"]["base"]["density"]
    folder = run_folder(tmp_path / "run", results)
    assert main([str(folder)]) == 0
    text = text_of((folder / "report.html").read_text())
    assert "The judge" not in text and "Cost" not in text and text.count("the same seeds in the same places") == 1
    assert "not measured in this run" in text and " – " in text


def test_markdown_holds_the_same_numbers_and_writes_nothing(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", RESULTS)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", str(folder), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == markdown_table(RESULTS) + "\n"
    assert all(number in printed for number in expected_numbers(RESULTS))
    assert {line.count("|") for line in printed.splitlines() if line.startswith("|")} == {11}
    assert sorted(tmp_path.rglob("*")) == before


def test_decimals_follow_the_scale_of_the_judge():
    scores = {
        "fd": {"mean": 0.03217, "std": 0.00119},
        "cfd": {"mean": 1234.56, "std": 7.89},
        "precision": 0.9,
        "recall": {"mean": 0.8},
    }
    cells = markdown_table({"toy": {"base": scores}}).splitlines()[4].split(" | ")
    assert cells[2:6] == ["0.0322 ± 0.0012", "1234.6 ± 7.9", "0.900", "0.800"]


def test_points_that_are_not_finite_are_left_out(monkeypatch):
    model = copy.deepcopy(RESULTS["edm2-digits"])
    model["sweep"]["dial"] += [{"strength": 4, "cfd": 2e6, "precision": 0.1, "recall": 0.2}]
    model["sweep"]["dial"] += [{"strength": 9, "cfd": float("nan"), "precision": 0.1, "recall": 0.2}]
    lines = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **style: lines.append((x, y)) or plot(axes, x, y, **style))
    assert curves_figure("edm2-digits", model)
    assert [len(x) for x, _ in lines] == 2 * [3, 4, 1, 1, 1] and 2e6 in lines[1][1]


def test_curves_of_a_run_that_diverged_altogether():
    nothing = {"cfd": float("nan"), "precision": float("nan"), "recall": float("nan")}
    assert curves_figure("edm2-digits", {"mclr": nothing, "sweep": {"dial": [{"strength": 1, **nothing}]}})


def broken(where: str, value: object) -> str:
    results = copy.deepcopy(RESULTS)
    *path, last = where.split("/")
    entry = results
    for key in path:
        entry = entry[key]
    entry[last] = value
    return json.dumps(results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "results.json is missing: give the folder of a tour; `mclr evaluate "),
        ("{", "cannot be read"),
        ("\x00", "cannot be read"),
        ("[]", "holds no scores"),
        ('{"judge": {}}', "holds no scores"),
        (broken("edm2-digits/base", 3), "results.json is not as a tour writes it"),
        (broken("edm2-digits/base/fd/mean", "low"), "results.json is not as a tour writes it"),
        (broken("edm2-digits/mclr/lam", None), "results.json is not as a tour writes it"),
        (broken("edm2-digits/sweep/cfg", [{"cfd": 3}]), "(KeyError: 'gamma')"),
        (broken("edm2-digits/sweep/dial", 3), "results.json is not as a tour writes it"),
        (broken("phases", 3), "results.json is not as a tour writes it"),
        (broken("phases", [{"name": "judge"}]), "(KeyError: 'seconds')"),
    ],
)
def test_bad_results_are_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_unusable_out_is_one_line(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", RESULTS)
    assert cli.main(["report", str(folder), "--out", str(folder / "results.json")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_image_grid_places_and_enlarges():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 4), np.uint8)
    grid = np.asarray(Image.open(io.BytesIO(image_grid(images, rows=2, columns=3, scale=5))))
    assert grid.shape == (5 * (2 * 3 - 1), 5 * (3 * 5 - 1), 3)
    for place in range(6):
        top, left = 15 * (place // 3), 25 * (place % 3)
        assert (grid[top : top + 10, left : left + 20] == place).all()
    assert (grid[10:15] == 255).all() and (grid[:, 20:25] == 255).all()


def test_image_grid_keeps_grey_levels():
    grey = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8), dtype=np.uint8)
    grid = np.asarray(Image.open(io.BytesIO(image_grid(grey, 1, 1, scale=1))))
    assert (grid == grey[0, 0, :, :, None]).all()
