"""Tests of train/tour.py: a whole tour of one paradigm in small, its files, and going on after an interruption."""

import json

import pytest

import mclr.train.tour
from mclr.train.data.dataset import load_split
from mclr.train.studies import tour as study
from mclr.train.studies.tour import gap_closed
from mclr.train.system.console import run

ARGUMENTS = ["--model", "var-digits", "train.images=128", "sample.batch=60"]


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """A tour of 128 images of training and 300 samples per arm, made twice in the same folder."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(study, "load_split", lambda path, name: tuple(t[:150] for t in load_split(path, name)))
        patch.setattr(study, "GAMMAS", {"var-digits": (0.5, 1.0)})
        patch.setattr(study, "SEEDS", 2)
        assert run(mclr.train.tour.main, ["--out", "tour", *ARGUMENTS]) == 0
        first = json.loads((folder / "tour" / "results.json").read_text())
        kept = {path: path.stat().st_mtime_ns for path in (folder / "tour").glob("scores/*")}
        assert run(mclr.train.tour.main, ["--out", "tour", *ARGUMENTS]) == 0
        assert {path: path.stat().st_mtime_ns for path in (folder / "tour").glob("scores/*")} == kept
    return folder / "tour", first


def test_a_second_tour_scores_nothing_again_and_finds_the_same(tour):
    folder, first = tour
    second = json.loads((folder / "results.json").read_text())
    for row in study.ROWS:
        for key in ("cfd", "precision", "recall"):
            assert second["var-digits"][row][key] == first["var-digits"][row][key]
    assert second["var-digits"]["gap_closed"] == first["var-digits"]["gap_closed"]


def test_results_are_complete_and_consistent(tour):
    result = tour[1]["var-digits"]
    cfd = {row: result[row]["cfd"]["mean"] for row in study.ROWS}
    assert result["gap_closed"] == gap_closed([cfd["control"]], [cfd["cfg"]], [cfd["mclr"]])
    assert result["gap_closed_by_dial"] == gap_closed([cfd["control"]], [cfd["cfg"]], [cfd["dial"]])
    for row, key in (("cfg", "gamma"), ("dial", "strength")):
        assert result[row][key] == min(result["sweep"][row], key=lambda point: point["cfd"])[key]
    assert [point["strength"] for point in result["sweep"]["dial"]] == pytest.approx([0, 0.25, 0.5, 1.0, 2.0])
    assert len({point["cfd"] for point in result["sweep"]["dial"]}) == 5
    assert all(len(result[row]["images_per_second"]["runs"]) == 5 for row in cfd)


def test_the_gap_is_of_the_means_and_needs_a_gain_of_cfg():
    assert gap_closed([2.0, 4.0], [1.0, 2.0], [2.0, 1.0]) == pytest.approx(1.0)
    # the shares of the two seeds are .5 and -8: the second has hardly a gain
    assert gap_closed([3.0, 1.1], [1.0, 1.0], [2.0, 1.9]) == pytest.approx(0.1 / 1.05)
    assert gap_closed([1.0], [1.0], [0.5]) is None and gap_closed([1.0], [2.0], [0.5]) is None


def test_guidance_costs_a_second_forward_where_its_weight_is_not_zero(tour):
    result = tour[1]["var-digits"]
    for row in ("base", "control", "mclr", "dial"):
        assert result[row]["forwards_per_image"] == 1
    # the null stream is filled with all 30 tokens: the ramp is 0 at the first scale alone
    assert result["cfg"]["forwards_per_image"] == 2


def test_the_control_costs_what_mclr_costs(tour):
    compute = tour[1]["var-digits"]["compute"]
    assert compute["control: TFLOPs"] >= compute["MCLR: TFLOPs, posterior classifier included"]
    # at most one batch of 64 more
    assert compute["control: images"] <= compute["MCLR: images"] * 4 / 3 + 64


def test_the_page_and_the_pictures_are_there(tour):
    folder, result = tour
    page = (folder / "report.html").read_text()
    assert "var-digits" in page and "MCLR" in page
    assert len(set(result["var-digits"]["grids"].values())) == 5
    for path in result["var-digits"]["grids"].values():
        assert (folder / path).read_bytes().startswith(b"\x89PNG")


def test_an_unwritable_folder_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(mclr.train.tour.main, ["--out", "file/tour"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
