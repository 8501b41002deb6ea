"""train/studies/study.py and figures.py: what is compared, what is done and what is left alone, and what is made of the records."""

import base64
import fcntl
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mclr
import mclr.train.studies.tour
import mclr.train.tour
from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.train.cli import main
from mclr.train.data.dataset import load_split
from mclr.train.data.images import image_grid
from mclr.train.studies.figures import STYLES, Row, curves_figure, emergence_figure, gap, label, markdown_tables, write_family
from mclr.train.studies.study import (
    BUDGET,
    FAMILY,
    GENERATED,
    GENERATED_COST,
    SEEDS,
    Method,
    Study,
    Unit,
    decided_by,
    over,
    store_of,
)
from mclr.train.training.loop import NotFinite
from mclr.train.weights.folder import BUNDLED


def method_of(model: str, name: str) -> Method:
    return next(method for method in FAMILY[model] if method.name == name)


CONTROL, MCLR, CFG = (
    Method("control", "tune"),
    method_of("var-digits", "mclr-null"),
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
    record = study.decided_by(unit, study.point(unit)) | {"seconds": 2.0, "pictures": PICTURES}
    if unit.name.startswith("edm2-digits/mclr-posterior"):
        # a third of the posterior's own FLOPs
        run["posterior_flops"] = 0.6e12
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
        overrides = study.overrides_of(unit, unit.method.grid[0] if unit.point is None else unit.point)
        config = load(unit.model, unit.method.objective, "digits", "local", list(overrides))
        assert config.train.seed == unit.seed
        beforehand = GENERATED_COST[unit.model] if unit.method.objective == "ddo" else 0
        assert config.train.images <= config.train.mle_images == BUDGET[unit.model] - beforehand


def test_the_cost_of_generated_samples_is_that_of_the_presets():
    steps = load("edm2-digits", "mle", "digits", "local", []).sample.steps
    # Heun: two forwards per step but the last; a forward is a third of what an image of maximum likelihood costs
    assert {"edm2-digits": 10 * GENERATED * (2 * steps - 1) / 3, "var-digits": 10 * GENERATED / 3} == GENERATED_COST


def test_the_list_of_units_is_stable():
    names = [unit.name for unit in Study(out=None, store=None).units()]
    assert names[:4] == [f"edm2-digits/control-seed{seed}" for seed in (0, *SEEDS)]
    assert names[12:16] == [f"edm2-digits/mclr-posterior{end}" for end in ("-lam0.75", "-lam1.5", "-lam3", "-seed1")]
    for name in ("edm2-digits/cca-beta0.1-lam1", "var-digits/cfg-interval-gamma0.5-low0.3", "var-digits/emergence-images1800"):
        assert name in names
    assert not any("emergence-seed" in name or "base-seed" in name for name in names)
    for model in FAMILY:
        assert len([name for name in names if name.startswith(model)]) == {"edm2-digits": 118, "var-digits": 111}[model]


def test_every_repeated_method_has_a_style_of_its_own():
    names = {method.name for methods in FAMILY.values() for method in methods if method.repeated}
    assert names <= STYLES.keys() and len(set(STYLES.values())) == len(STYLES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of three methods, done to the end: (study, what was printed)."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(mclr.train.studies.tour, "load_split", lambda path, name: tuple(t[:60] for t in load_split(path, name)))
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
    settings = study.record(repeated)["settings"]
    assert f"sample.gamma={settings['sample.gamma']:g}" == best.point[0] and settings["train.seed"] == 1


def test_the_score_is_the_tours(tiny):
    study, _ = tiny
    config = load("var-digits", "mle", "digits", "local", ["sample.batch=50", "sample.gamma=0.5"])
    arm = mclr.train.studies.tour.Arm(config, study.folder(study.units()[0], ()) / "weights")
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
    study = replace(tiny[0], out=tmp_path, store=tmp_path / "kept", overrides=("train.images=128", *TINY[1:]))
    control = study.units()[0]
    shutil.copytree(tiny[0].folder(control, ()), study.folder(control, ()))
    assert study.attempt(control)
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


@pytest.mark.parametrize("setting", ["sample.top_k=3", "train.images=128", "train.lr=0.002", "model.weights=var-digits2"])
def test_what_decides_a_unit_makes_it_another(tiny, tmp_path, monkeypatch, setting):
    study, _ = tiny
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED / "var-digits", tmp_path / "var-digits2")
    other = replace(study, overrides=(*TINY, setting))
    assert all(other.record(unit) is None for unit in study.units())
    control = study.units()[0]
    assert other.folder(control, ()) != study.folder(control, ())


def test_a_setting_that_came_since_had_its_default(tiny):
    study, _ = tiny
    control = study.units()[0]
    path = study.store / f"{control.name}.json"
    kept = path.read_bytes()
    record = json.loads(kept)
    del record["settings"]["train.eps"]
    path.write_text(json.dumps(record))
    assert study.record(control) == record
    assert replace(study, overrides=(*TINY, "train.eps=0.1")).record(control) is None
    path.write_bytes(kept)


def test_what_decides_nothing_changes_nothing(tiny):
    study, _ = tiny
    other = replace(study, overrides=(*TINY, "train.log_every=7", "data.path=elsewhere"))
    assert all(other.record(unit) == study.record(unit) is not None for unit in study.units())


@pytest.mark.parametrize("name", ["model.weights", "model.tokenizer", "judge"])
def test_weights_changed_under_their_name_make_another_unit(tiny, name):
    study, _ = tiny
    control = study.units()[0]
    path = study.store / f"{control.name}.json"
    kept = path.read_bytes()
    record = json.loads(kept)
    assert len(record["weights"].pop(name)) == 64
    path.write_text(json.dumps(record | {"weights": record["weights"] | {name: "0" * 64}}))
    assert study.record(control) is None
    path.write_bytes(kept)


def test_weights_of_a_guide_and_of_a_posterior_decide_too():
    guided = decided_by("edm2-digits", "mle", ("sample.guide=edm2-digits", "sample.gamma=1"))
    assert guided["weights"]["sample.guide"] == guided["weights"]["model.weights"] != guided["weights"]["model.posterior.weights"]


def test_records_lie_beside_the_source_but_never_in_an_installed_package(tmp_path, monkeypatch):
    assert store_of(tmp_path).parent.name == "mclr"
    monkeypatch.setattr(mclr, "__file__", str(tmp_path / "site-packages" / "mclr" / "__init__.py"))
    assert store_of(tmp_path) == tmp_path / "records"


def test_a_run_that_diverges_is_a_result(tiny, tmp_path):
    unbounded = Method("unlearn", "tune", "unlearn", grid=over("objective.lam", 0.1))
    study = replace(tiny[0], store=tmp_path, family={"var-digits": (unbounded,)}, overrides=("train.images=640", "train.lr=1e30"))
    unit = study.units()[0]
    with pytest.raises(NotFinite):
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
    assert any(line.startswith("| cfg | gamma 0.2 † | 0.400 ± 0.000 | 1.00 ± 0.00 |") for line in tables)
    assert any(line.startswith("| cca | beta ") and "(2 seeds; 1 diverged)" in line for line in tables)
    assert "| mclr-uniform | lam 0.02 | diverged at 128 images |" in page
    assert "| 600 x 1.67 + 1,000 for its samples |" in page
    # 153,600 images at (.6e12 / 600) / (3e12 / 1000) of an image of maximum likelihood each
    costs = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in tables if " x 1.67" in line}
    assert costs["mclr-posterior"] == "600 x 1.67 + 51,200 once for its posterior |"
    assert costs["mclr-posterior-scratch"] == costs["mclr-null"] == "600 x 1.67 |"


def test_the_gap_is_of_the_training_seeds_that_all_have(tmp_path):
    study = Study(tmp_path, tmp_path, {"var-digits": (CONTROL, MCLR, CFG)})
    cfd = {"control": {1: 2.0, 2: 3.0, 3: 5.0}, "mclr-null": {1: 1.5, 2: 1.0, 3: None}, "cfg": {1: 1.0, 2: 2.0, 3: 1.0}}

    def shown() -> object:
        for unit in study.units():
            keep(study, unit, cfd[unit.method.name].get(unit.seed, 1.0))
        rows = study.rows("var-digits")
        return gap(rows, rows[1])

    # seed 3 diverged; the shares of the others are .5 and 2
    assert shown() == {"mean": pytest.approx(1.25), "std": pytest.approx(1.5 / 2**0.5)}
    cfd["cfg"][2] = 3.0
    # the share of seed 2 is not defined, that of the means is
    assert shown() == pytest.approx(2.5)
    cfd["cfg"][1] = 2.0
    assert shown() is None


def test_a_choice_at_the_end_of_its_grid_is_marked():
    def row(chosen: int, *values: float | tuple[float, ...]) -> Row:
        points = over("objective.beta objective.lam" if isinstance(values[0], tuple) else "objective.lam", *values)
        return Row("cca", (), {point: {} for point in points}, points[chosen], {})

    assert [row(i, 0.5, 1, 2).at_end() for i in range(3)] == [True, False, True]
    assert [row(i, (0.1, 1), (0.1, 2), (0.1, 3)).at_end() for i in range(3)] == [True, False, True]
    assert row(1, (0.1, 1), (0.2, 2), (0.2, 3)).at_end() and not row(1, (0.1, 1), (0.2, 2), (0.3, 3)).at_end()
    assert not Row("control", (), {(): {}}, (), {}).at_end() and not Row("x", (), {}, None, {}).at_end()


def test_points_beyond_the_frame_stand_at_its_edge():
    def record(cfd: float, precision: float) -> dict:
        return {"scores": {"cfd": cfd, "precision": precision, "recall": 0.5}}

    rows = [Row("control", (), {(): record(2.0, 0.8)}, (), {})]
    rows.append(
        Row("mclr-uniform", (), {("objective.lam=1",): record(0.5, 0.9), ("objective.lam=2",): record(80.0, 0.1)}, None, {})
    )
    figure = curves_figure("edm2-digits", rows)
    lines = figure.axes[0].lines
    hollow = [line.get_xydata().tolist() for line in lines if line.get_markerfacecolor() == "white" and len(line.get_xydata())]
    assert hollow == [[pytest.approx([0.8, 2.4])]]
    assert lines[2].get_xydata().tolist() == [[0.9, 0.5], pytest.approx([0.8, 2.4])]
    # they leave the panels their places
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.3 for axes in figure.axes)


def test_emergence_begins_with_the_base_without_guidance(tmp_path):
    study = Study(tmp_path, tmp_path, {"var-digits": FAMILY["var-digits"]})
    everything(study)
    rows = study.rows("var-digits")
    assert emergence_figure("var-digits", rows)
    base = next(row for row in rows if row.name == "base")
    # whatever else there is of the base
    del base.grid[("sample.gamma=0",)]
    assert base.grid and emergence_figure("var-digits", rows) is None


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
        ([], "give the folder of a tour, or --study"),
        (["runs/x", "--study", "family"], "give the folder of a tour, or --study"),
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
