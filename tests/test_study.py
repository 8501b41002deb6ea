"""Tests of train/study.py and train/figures.py: what is compared, what is done and what is left alone, and what is made of the records."""

import base64
import fcntl
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import train.tour
from configs.schema import load
from mclr.errors import UserError
from train.cli import main
from train.data import load_split
from train.figures import curves_figure, emergence_figure, gaps, label, markdown_tables, write_family
from train.report import image_grid
from train.study import BUDGET, FAMILY, SEEDS, Diverged, Method, Study, Unit, over

CONTROL, MCLR, CFG = (
    Method("control", "tune"),
    FAMILY["var-digits"][3],
    Method("cfg", "control", grid=over("sample.gamma", 0.5, 1)),
)
# one step of training, and few samples
TINY = ("train.images=64", "sample.batch=50")
PICTURES = base64.b64encode(image_grid(np.zeros((10, 1, 8, 8), np.uint8), 1, 10, 1)).decode()


def scores(cfd: float) -> dict:
    return {"cfd": cfd, "precision": 0.9, "recall": 0.8, "accuracy": 1.0, "forwards_per_image": 23.0}


def keep(study: Study, unit: Unit, cfd: float | None) -> None:
    """A made-up record: cfd None for a run that diverged."""
    run = {"images": 600, "rows": 700, "flops": 3e12, "mle_images": 1000, "posterior_flops": 0.0, "seconds": 1.0}
    point = study.point(unit)
    record = {"objective": unit.method.objective, "settings": study.settings(unit, point), "seconds": 2.0, "pictures": PICTURES}
    record |= {"run": run, "scores": scores(cfd), "diverged": None} if cfd else {"run": None, "scores": None, "diverged": 128}
    if unit.method.objective == "ddo":
        record["generated"] = {"count": 1500, "forwards_per_image": 2.0}
    path = study.store / f"{unit.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def everything(study: Study) -> None:
    """Made-up records of all units: uniform diverges throughout, of cca one seed."""
    for i, unit in enumerate(study.units()):
        diverged = unit.method.name == "mclr-uniform" or (unit.method.name == "cca" and unit.seed == 2)
        if study.point(unit) is not None:
            keep(study, unit, None if diverged else {"control": 2.0, "cfg": 0.4}.get(unit.method.name, 0.5 + 0.01 * (i % 7)))


def test_every_unit_has_its_own_name_and_settings_that_the_schema_accepts():
    study = Study(out=None, store=None)
    units = study.units()
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        # the first point stands for the chosen one
        settings = study.settings(unit, unit.method.grid[0] if unit.point is None else unit.point)
        extra = ["objective.generated=x"] if unit.method.objective == "ddo" else []
        config = load(unit.model, unit.method.objective, "digits", "local", settings + extra)
        assert config.train.seed == unit.seed
        assert config.train.images <= config.train.mle_images == BUDGET[unit.model]


def test_the_list_of_units_is_stable():
    names = [unit.name for unit in Study(out=None, store=None).units()]
    assert names[:4] == [f"edm2-digits/control-seed{seed}" for seed in (0, *SEEDS)]
    assert names[4:8] == [f"edm2-digits/mclr-posterior{end}" for end in ("-lam0.75", "-lam1.5", "-lam3", "-seed1")]
    for name in ("edm2-digits/cca-beta0.1-lam1", "var-digits/cfg-interval-gamma0.5-low0.3", "var-digits/emergence-images1800"):
        assert name in names
    assert not any("emergence-seed" in name or "base-seed" in name for name in names)
    for model in FAMILY:
        assert len([name for name in names if name.startswith(model)]) == {"edm2-digits": 106, "var-digits": 104}[model]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of three methods, done to the end: (study, what was printed)."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.tour, "load_split", lambda path, name: tuple(t[:60] for t in load_split(path, name)))
        family = {"var-digits": (CONTROL, replace(MCLR, grid=MCLR.grid[:1], repeated=False), CFG)}
        study = Study(folder / "out", folder / "kept", family, seeds=(1,), overrides=TINY)
        study.run("var-digits/control")
        only = sorted(path.name for path in folder.rglob("kept/*/*.json"))
        study.run()
        yield study, only


def test_a_share_of_the_units_can_be_done_alone(tiny):
    assert tiny[1] == ["control-seed0.json", "control-seed1.json"]


def test_a_unit_is_a_run_and_its_scores(tiny):
    study, _ = tiny
    records = {unit.name: study.record(unit) for unit in study.units()}
    assert len(records) == 6 and all(record["scores"]["cfd"] > 0 for record in records.values())
    null = records["var-digits/mclr-null-lam0.5"]
    assert null["run"]["images"] == 64 and null["run"]["mle_images"] == pytest.approx(64 * 4 / 3, abs=1)
    guided = records["var-digits/cfg-gamma1"]
    assert guided["run"]["mle_images"] == 64
    assert (null["scores"]["forwards_per_image"], guided["scores"]["forwards_per_image"]) == (1, 2)
    assert Image.open(io.BytesIO(base64.b64decode(null["pictures"]))).size == (10 * 9 - 1, 8)


def test_the_other_seeds_repeat_the_best_point(tiny):
    study, _ = tiny
    *tried, repeated = (unit for unit in study.units() if unit.method is CFG)
    best = min(tried, key=lambda unit: study.record(unit)["scores"]["cfd"])
    assert {best.point[0], "train.seed=1"} <= set(study.record(repeated)["settings"])


def test_the_score_is_the_tours(tiny):
    study, _ = tiny
    config = load("var-digits", "mle", "digits", "local", ["sample.batch=50", "sample.gamma=0.5"])
    arm = train.tour.Arm(config, study.out / "var-digits/control-run0/weights")
    kept = next(study.record(u) for u in study.units() if u.name == "var-digits/cfg-gamma0.5")
    assert arm.judged(study.judge, 0) == kept["scores"]


def test_what_is_finished_is_left_alone_and_what_is_not_goes_on(tiny, capsys):
    study, _ = tiny
    files = sorted(study.store.rglob("*.json"))
    before = {path: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in files}
    gone = study.store / "var-digits" / "control-seed1.json"
    gone.unlink()
    capsys.readouterr()
    study.run()
    said = capsys.readouterr().out
    # its run had been finished; only the samples were missing
    assert "finished already" in said and said.count("== ") == 1
    again = json.loads(gone.read_text())
    assert again | {"seconds": 0} == before[gone][1] | {"seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in files if path != gone} == {
        p: t for p, (t, _) in before.items() if p != gone
    }


def test_a_run_stopped_half_way_goes_on(tiny, tmp_path, capsys):
    shutil.copytree(tiny[0].out / "var-digits" / "control-run0", tmp_path / "var-digits" / "control-run0")
    study = replace(tiny[0], out=tmp_path, store=tmp_path / "kept", overrides=("train.images=128", *TINY[1:]))
    assert study.attempt(study.units()[0])
    assert "going on from" in capsys.readouterr().out
    assert study.record(study.units()[0])["run"]["images"] == 128


def test_a_unit_of_another_process_is_left_to_it(tiny, capsys):
    study, _ = tiny
    path = study.store / "var-digits" / "cfg-gamma1.json"
    kept = path.read_bytes()
    path.unlink()
    with open(study.out / "var-digits" / "cfg-gamma1.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        study.run()
        assert not path.exists()
        # neither is the best point known without it
        assert "2 of 6 units wait" in capsys.readouterr().out
    path.write_bytes(kept)


def test_changed_settings_are_a_new_unit(tiny):
    study, _ = tiny
    other = replace(study, overrides=(*TINY, "sample.top_k=3"))
    assert all(other.record(unit) is None for unit in study.units())


def test_a_run_that_diverges_is_a_result(tiny, tmp_path):
    unbounded = Method("unlearn", "tune", "unlearn", grid=over("objective.lam", 0.1))
    study = replace(tiny[0], store=tmp_path, family={"var-digits": (unbounded,)}, overrides=("train.images=640", "train.lr=1e30"))
    unit = study.units()[0]
    with pytest.raises(Diverged):
        study.tune(unit, unit.point)
    assert study.attempt(unit)
    record = study.record(unit)
    assert record["scores"] is None and 0 < record["diverged"] <= 640
    # a grid that diverged as a whole has nothing to repeat
    assert study.point(study.units()[1]) is None and not study.attempt(study.units()[1])


def test_other_errors_are_no_divergence(tiny, tmp_path):
    study = replace(tiny[0], store=tmp_path, overrides=("train.batch=0",))
    with pytest.raises(UserError, match=r"train\.batch"):
        study.attempt(study.units()[0])


def test_tables_and_figures_of_made_up_records(tmp_path):
    study = Study(tmp_path / "out", tmp_path / "kept", {"edm2-digits": FAMILY["edm2-digits"]})
    everything(study)
    rows = {"edm2-digits": study.rows("edm2-digits")}
    page = write_family(rows, tmp_path / "out").read_text()
    assert page == markdown_tables(rows) + "\n"
    names = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert names == ["edm2-digits-emergence.png", "edm2-digits-family.png", "forwards.png"]
    assert all(Image.open(tmp_path / "out" / "figures" / name).width > 1000 for name in names)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 2
    assert any(line.startswith("| control | – | 2.00 ± 0.00 | 0.00 ± 0.00 |") for line in tables)
    assert any(line.startswith("| cfg | gamma 0.2 | 0.400 ± 0.000 | 1.00 ± 0.00 |") for line in tables)
    assert any(line.startswith("| cca | beta ") and "(1 of 3 seeds diverged)" in line for line in tables)
    assert "| mclr-uniform | lam 0.02 | diverged at 128 images |" in page
    assert "| 600 x 1.67 + 1,000 for its samples |" in page


def test_gaps_are_of_the_same_training_seed(tmp_path):
    study = Study(tmp_path, tmp_path, {"var-digits": (CONTROL, MCLR, CFG)})
    cfd = {"control": {1: 2.0, 2: 3.0, 3: 4.0}, "mclr-null": {1: 1.5, 2: 1.0, 3: 1.0}, "cfg": {1: 1.0, 2: 2.0, 3: 1.0}}
    for unit in study.units():
        keep(study, unit, cfd[unit.method.name].get(unit.seed, 1.0))
    rows = study.rows("var-digits")
    assert gaps(rows, rows[1]) == pytest.approx([0.5, 2.0, 1.0])


def test_what_is_there_of_a_begun_study_is_shown(tmp_path):
    study = Study(tmp_path / "out", tmp_path / "kept")
    keep(study, study.units()[0], 0.7)
    rows = {model: study.rows(model) for model in FAMILY}
    assert "| control | – | 0.700 |" in write_family(rows, tmp_path / "out").read_text()
    assert curves_figure("edm2-digits", rows["edm2-digits"]) and not curves_figure("var-digits", rows["var-digits"])
    assert emergence_figure("edm2-digits", rows["edm2-digits"]) is None


def test_labels():
    assert label(("objective.beta=0.1", "objective.lam=4")) == "beta 0.1, lam 4"
    assert label(()) == "–"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a run, or --study"),
        (["runs/x", "--study", "family"], "give the folder of a run, or --study"),
        (["--study", "famly"], "invalid choice"),
        (["runs/x", "--only", "edm2"], "--only belongs to --study"),
        (["--study", "family", "--only", "edm3"], "no unit begins with edm3"),
        (["--study", "family", "--out", "file/x", "--only", "edm2-digits/base"], "choose another"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_record_is_one_line(tmp_path):
    study = Study(tmp_path, tmp_path)
    (tmp_path / "edm2-digits").mkdir()
    (tmp_path / "edm2-digits" / "control-seed0.json").write_text("{")
    with pytest.raises(UserError, match=r"control-seed0\.json is no record"):
        study.record(study.units()[0])


def test_markdown_alone_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--study", "family", "--markdown"]) == 0
    assert "**edm2-digits**" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
