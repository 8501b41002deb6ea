"""`mclr report --study family`: every objective and every guidance at equal compute, both paradigms, one judge.

A unit is at most one fine-tuning, and 1,797 samples for the judge: some two minutes. It is kept as one JSON file the moment it is
finished and never repeated; a run stopped half-way goes on. Training seed 0 tries a grid; other training seeds report its best point.
In this file: what is compared; the study, which finds out what is missing and does it. Its tables and figures: train/studies/figures.py.
"""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import mclr
import mclr.train.sample
from mclr.configs.schema import flatten, load
from mclr.errors import UserError
from mclr.train.data.images import image_grid
from mclr.train.sampling.folder import read_record
from mclr.train.studies.figures import Row, markdown_tables, write_family
from mclr.train.studies.tour import GAMMAS, JUDGE_WEIGHTS, Arm, Judge, digits_judge, fine_tune
from mclr.train.system.files import lock, write_json
from mclr.train.training.log import is_free
from mclr.train.training.loop import NotFinite
from mclr.train.weights.folder import find_weights, named_weights, sha256

# What a fine-tuning may cost, as images of plain maximum likelihood: about what the preset's own mclr run costs
# (mclr train --model MODEL --objective mclr; `mle_images` in the last line of metrics.jsonl).
BUDGET = {"edm2-digits": 64_000, "var-digits": 37_440}
# of training, each with the sampling seed of the same number; seed 0 of both tries the grids
SEEDS = (1, 2, 3)
# samples of the reference for ddo, per condition: together about as many as there are training images
GENERATED = 150
# their first seed, beyond those of the judged samples
FIRST_GENERATED = 100_000_000
# what they cost, in the same images, of which a forward is a third: 23 forwards each (12 Heun steps), or one
GENERATED_COST = {"edm2-digits": 11_500, "var-digits": 500}
# settings that a run folder may change, but that decide a unit
DECIDES = ("sample.", "train.images", "train.mle_images")

Point = tuple[str, ...]  # settings, as in ("objective.beta=0.1", "objective.lam=1")


@dataclass(frozen=True)
class Method:
    """One way to samples. fixed: settings in common; grid: points of which training seed 0 chooses one.

    start: `tune` fine-tunes the base; `control` samples the control that has the same training seed; `base` samples the base.
    repeated: whether the best point is repeated with the other training seeds.
    """

    name: str
    start: Literal["tune", "control", "base"]
    objective: str = "mle"
    fixed: Point = ()
    grid: tuple[Point, ...] = ((),)
    repeated: bool = True


@dataclass(frozen=True)
class Unit:
    """A method at one point of its grid with training seed 0, or, where point is None, at the best one with another seed."""

    model: str
    method: Method
    seed: int
    point: Point | None

    @property
    def name(self) -> str:
        """Also of its file; -seed0 where there is nothing to choose."""
        where = "" if self.point is None else brief(self.point)
        return f"{self.model}/{self.method.name}{where or f'-seed{self.seed}'}"


def brief(point: Point) -> str:
    """Part of a file name: ("sample.gamma=0.5",) becomes -gamma0.5."""
    return "".join(f"-{key.rpartition('.')[2]}{value}" for key, _, value in (setting.partition("=") for setting in point))


def over(keys: str, *values: float | tuple[float, ...]) -> tuple[Point, ...]:
    """A grid: one value, or one tuple of values, per point. keys: separated by blanks."""
    points = [value if isinstance(value, tuple) else (value,) for value in values]
    return tuple(tuple(f"{key}={v:g}" for key, v in zip(keys.split(), point, strict=True)) for point in points)


def tune(name: str, objective: str, fixed: str, grid: tuple[Point, ...], repeated: bool = True) -> Method:
    """A fine-tuning. fixed: settings of the section objective, separated by blanks."""
    return Method(name, "tune", objective, tuple(f"objective.{text}" for text in fixed.split()), grid, repeated)


def guide(name: str, fixed: str, grid: tuple[Point, ...]) -> Method:
    """The control with guidance. fixed: settings of the section sample, separated by blanks."""
    return Method(name, "control", fixed=tuple(f"sample.{text}" for text in fixed.split()), grid=grid)


LAM, GAMMA, RATIO = "objective.lam", "sample.gamma", "objective.beta objective.lam"
# the most telling first: what is not done yet is missed the less
FAMILY: dict[str, tuple[Method, ...]] = {
    "edm2-digits": (
        Method("control", "tune"),
        guide("cfg", "", over(GAMMA, *GAMMAS["edm2-digits"])),
        tune("mclr-posterior", "mclr", "contrast=posterior", over(LAM, 0.75, 1.5, 3)),
        tune("mclr-null", "mclr", "contrast=null", over(LAM, 0.5, 0.8, 1.2)),
        tune("mclr-uniform", "mclr", "contrast=uniform", over(LAM, 0.02, 0.05, 0.1)),
        # sigma 2 to .7: above, a class says little; below, p(c|x_t) is sure of it and the posterior draws c itself
        tune(
            "mclr-interval",
            "mclr",
            "contrast=posterior schedule.kind=interval schedule.low=0.35 schedule.high=0.45",
            over(LAM, 0.75, 1.5, 3),
        ),
        # negative below sigma .93
        tune(
            "mclr-window",
            "mclr",
            "contrast=posterior schedule.kind=negative_window schedule.turn=0.42 schedule.below=0.5",
            over(LAM, 0.75, 1.5, 3),
        ),
        tune("mclr-weighted", "mclr", "contrast=weighted", over(LAM, 0.75, 1.5, 3)),
        Method(
            "mclr-posterior-scratch",
            "tune",
            "mclr",
            ("objective.contrast=posterior", "model.posterior.weights=null"),
            over(LAM, 0.75, 1.5, 3),
        ),
        # the same, but maximum likelihood alone while the classifier sees its first images: 43 % of the compute
        Method(
            "mclr-posterior-warmup",
            "tune",
            "mclr",
            ("objective.contrast=posterior", "model.posterior.weights=null", "model.posterior.warmup_images=19200"),
            over(LAM, 0.75, 1.5, 3),
        ),
        tune("cca", "cca", "", over(RATIO, (0.02, 1), (0.1, 1), (0.1, 4))),
        tune("ddo", "ddo", "", over(RATIO, (0.02, 1), (0.1, 1), (0.1, 4))),
        tune("cc_dpo", "cc_dpo", "", over("objective.beta", 0.005, 0.02, 0.1)),
        tune("unlearn", "unlearn", "", over(LAM, 0.02, 0.05, 0.1)),
        # sigma 5.7 to .24, and 2 to .7
        guide(
            "cfg-interval",
            "schedule.kind=interval",
            over(
                f"{GAMMA} sample.schedule.low sample.schedule.high",
                (0.5, 0.25, 0.55),
                (0.8, 0.25, 0.55),
                (1.2, 0.25, 0.55),
                (0.8, 0.35, 0.45),
                (1.2, 0.35, 0.45),
                (2, 0.35, 0.45),
            ),
        ),
        # negative below sigma .4 or .93
        guide(
            "cfg-window",
            "schedule.kind=negative_window",
            over(
                f"{GAMMA} sample.schedule.turn sample.schedule.below",
                (0.5, 0.5, 0.25),
                (0.8, 0.5, 0.5),
                (0.8, 0.42, 0.25),
                (1.2, 0.42, 0.5),
            ),
        ),
        guide("autoguidance", "guide=edm2-digits", over(GAMMA, 0.5, 1, 2, 4)),
        Method("base", "base", grid=over(GAMMA, 0, *GAMMAS["edm2-digits"]), repeated=False),
        # the preset's own objective, in ever longer runs: random numbers go by image, so each begins like the next
        tune("emergence", "mclr", "", over("train.images", 2_400, 4_800, 9_600, 19_200, 38_400), repeated=False),
    ),
    "var-digits": (
        Method("control", "tune"),
        guide("cfg", "", over(GAMMA, *GAMMAS["var-digits"])),
        tune("mclr-posterior", "mclr", "contrast=posterior schedule.kind=constant", over(LAM, 0.15, 0.3, 0.6)),
        tune("mclr-null", "mclr", "contrast=null schedule.kind=ramp", over(LAM, 0.5, 1, 2)),
        tune("mclr-uniform", "mclr", "contrast=uniform schedule.kind=constant bound=3", over(LAM, 0.3, 0.6, 1)),
        # contrast rows cut short after the second or third of the four scales: 5 or 14 of their 30 tokens
        tune(
            "mclr-coarse",
            "mclr",
            "contrast=uniform schedule.kind=interval bound=3",
            over(f"{LAM} objective.schedule.high", (0.6, 0.4), (1, 0.4), (0.6, 0.7), (1, 0.7)),
        ),
        # all scales but the first
        tune("mclr-interval", "mclr", "contrast=null schedule.kind=interval schedule.low=0.3", over(LAM, 0.3, 0.6, 1.2)),
        # negative at the last scale
        tune(
            "mclr-window",
            "mclr",
            "contrast=null schedule.kind=negative_window schedule.turn=0.9 schedule.below=0.25",
            over(LAM, 0.3, 0.6, 1.2),
        ),
        tune("mclr-weighted", "mclr", "contrast=weighted schedule.kind=constant", over(LAM, 0.15, 0.3, 0.6)),
        tune("cca", "cca", "", over(RATIO, (0.1, 1), (0.1, 4), (0.02, 10))),
        tune("ddo", "ddo", "", over(RATIO, (0.02, 1), (0.1, 1), (0.1, 4))),
        tune("cc_dpo", "cc_dpo", "", over("objective.beta", 0.005, 0.02, 0.1)),
        tune("unlearn", "unlearn", "", over(LAM, 0.05, 0.1, 0.3)),
        # from the second or the third of the four scales on
        guide(
            "cfg-interval",
            "schedule.kind=interval",
            over(f"{GAMMA} sample.schedule.low", (0.25, 0.3), (0.5, 0.3), (0.75, 0.3), (0.5, 0.6), (1, 0.6)),
        ),
        # negative at the last scale
        guide(
            "cfg-window",
            "schedule.kind=negative_window schedule.turn=0.9 schedule.below=0.25",
            over(GAMMA, 0.25, 0.5, 1),
        ),
        guide("autoguidance", "guide=var-digits", over(GAMMA, 0.5, 1, 2, 4)),
        Method("base", "base", grid=over(GAMMA, 0, *GAMMAS["var-digits"]), repeated=False),
        tune("emergence", "mclr", "", over("train.images", 1_800, 3_600, 7_200, 14_400, 28_800), repeated=False),
    ),
}


@cache
def decided_by(model: str, objective: str, overrides: Point) -> dict[str, Any]:
    """All that decides a unit, as its record keeps it: settings without those that change nothing, checksums of weights."""
    config = flatten(load(model, objective, "digits", "local", list(overrides)))
    settings = {key: value for key, value in config.items() if key.startswith(DECIDES) or not is_free(key)}
    named = named_weights(settings) | {"judge": JUDGE_WEIGHTS}
    return {"settings": settings, "weights": {key: sha256(find_weights(name)) for key, name in named.items()}}


@cache
def preset(model: str) -> dict[str, Any]:
    """The settings of a model preset that nothing was changed of."""
    return flatten(load(model, "mle", "digits", "local", []))


@dataclass
class Study:
    """The units, where their records are kept (store) and where their runs live (out).

    seeds: of training, for the chosen points. overrides: of every preset.
    """

    out: Path
    store: Path
    family: dict[str, tuple[Method, ...]] = field(default_factory=lambda: FAMILY)
    seeds: tuple[int, ...] = SEEDS
    overrides: Point = ()

    @cached_property
    def judge(self) -> Judge:
        return digits_judge()

    def units(self) -> list[Unit]:
        """All of them; what a unit needs comes before it."""
        units = []
        for model, methods in self.family.items():
            for method in methods:
                units += [Unit(model, method, 0, point) for point in method.grid]
                units += [Unit(model, method, seed, None) for seed in self.seeds if method.repeated]
        return units

    def overrides_of(self, unit: Unit, point: Point) -> Point:
        """The unit's settings, beyond its presets."""
        budget = BUDGET[unit.model]
        generated: Point = ()
        if unit.method.objective == "ddo":
            budget -= GENERATED_COST[unit.model]
            # which samples: where they lie says nothing
            generated = (f"objective.generated={GENERATED} per condition, seeds from {FIRST_GENERATED}",)
        length = (f"train.images={budget}", f"train.mle_images={budget}", f"train.seed={unit.seed}")
        return (*length, *generated, *unit.method.fixed, *point, *self.overrides)

    def decided_by(self, unit: Unit, point: Point) -> dict[str, Any]:
        return decided_by(unit.model, unit.method.objective, self.overrides_of(unit, point))

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """What is kept of a unit; None where there is nothing, or what there is was decided by other things."""
        point = self.point(unit)
        path = self.store / f"{unit.name}.json"
        if point is None or not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            made = {key: record[key] for key in ("settings", "weights")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of a unit ({error}): remove it, and the unit is done again") from error
        now = self.decided_by(unit, point)
        # a setting that went since says nothing; one that came since had its default
        same = all(now["settings"].get(key, value) == value for key, value in made["settings"].items())
        came = now["settings"].keys() - made["settings"].keys()
        same = same and all(now["settings"][key] == preset(unit.model)[key] for key in came)
        return record if same and made["weights"] == now["weights"] else None

    def point(self, unit: Unit) -> Point | None:
        """The unit's point, the best by class-wise FD where it has none of its own.

        None while the grid has gaps, and where all of it diverged.
        """
        if unit.point is not None:
            return unit.point
        tried = self.tried(unit.model, unit.method)
        scores = {point: record["scores"] for point, record in tried.items() if record["scores"]}
        if len(tried) < len(unit.method.grid) or not scores:
            return None
        return min(scores, key=lambda point: scores[point]["cfd"])

    def tried(self, model: str, method: Method) -> dict[Point, dict[str, Any]]:
        """The records of training seed 0 that are kept."""
        records = {point: self.record(Unit(model, method, 0, point)) for point in method.grid}
        return {point: record for point, record in records.items() if record is not None}

    def run(self, only: str = "") -> None:
        """Do what is missing of the units whose names begin with `only`, until no more can be done here."""
        units = [unit for unit in self.units() if unit.name.startswith(only)]
        if not units:
            raise UserError(f"no unit begins with {only}: give a part of a name like {self.units()[0].name}")
        # a pass may make possible what had to wait in the one before
        while any([self.attempt(unit) for unit in units]):
            pass
        left = [unit.name for unit in units if self.record(unit) is None]
        if left:
            print(f"{len(left)} of {len(units)} units wait for others, for another process or for a grid that all diverged:")
            print(" ".join(left))

    def attempt(self, unit: Unit) -> bool:
        """Do a unit and keep its record; False where it is kept already, has to wait, or another process has it."""
        point = self.point(unit)
        if point is None or self.record(unit) is not None:
            return False
        control = self.control(unit)
        if control is not None and self.record(control) is None:
            return False
        with self.claim(unit) as mine:
            # another process may have finished it just now
            if not mine or self.record(unit) is not None:
                return False
            started = time.perf_counter()
            record = self.decided_by(unit, point) | {"run": None, "scores": None, "diverged": None}
            try:
                if control is not None:
                    with self.claim(control, wait=True):
                        weights, record["run"] = self.tune(control, ())
                elif unit.method.start == "tune":
                    weights, record["run"] = self.tune(unit, point)
                else:
                    weights = find_weights(str(load(unit.model, "mle", "digits", "local", []).model.weights))
                record |= self.sample(unit, point, weights)
            except NotFinite as end:
                # a result like any other
                record["diverged"] = end.images
            if unit.method.objective == "ddo":
                record["generated"] = self.generated(unit.model)[1]
            record["seconds"] = round(time.perf_counter() - started, 1)
            path = self.store / f"{unit.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
        scores = record["scores"]
        outcome = f"class-wise FD {scores['cfd']:.3g}" if scores else f"diverged at {record['diverged']} images"
        print(f"== {unit.name}: {record['seconds']} s, {outcome}", flush=True)
        return True

    def control(self, unit: Unit) -> Unit | None:
        """The control that a unit samples: of the same training seed."""
        if unit.method.start != "control":
            return None
        method = next(method for method in self.family[unit.model] if method.name == "control")
        return Unit(unit.model, method, unit.seed, () if unit.seed == 0 else None)

    @contextmanager
    def claim(self, unit: Unit, wait: bool = False) -> Iterator[bool]:
        """Whether the unit is this process's until the block ends."""
        path = self.out / f"{unit.name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file, mine = lock(path, wait)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from error
        with file:
            yield mine

    def folder(self, unit: Unit, point: Point) -> Path:
        """Of the unit's run: another one for whatever decides it otherwise."""
        decided = json.dumps(self.decided_by(unit, point), sort_keys=True).encode()
        run = f"run{unit.seed}-{hashlib.sha256(decided).hexdigest()[:8]}"
        return self.out / f"{unit.model}/{unit.method.name}{brief(point)}-{run}"

    def tune(self, unit: Unit, point: Point) -> tuple[Path, dict[str, Any]]:
        """(weights, what they cost) of a unit's run, which begins, goes on or is found finished. Raises NotFinite."""
        folder = self.folder(unit, point)
        # the first step that is not finite counts as divergence
        arguments = ["--objective", unit.method.objective, *self.overrides_of(unit, point), "train.max_skipped=0"]
        if unit.method.objective == "ddo":
            arguments.append(f"objective.generated={self.generated(unit.model)[0]}")
        last = fine_tune(folder, unit.model, arguments)
        cost = {key: last[key] for key in ("images", "rows", "flops", "mle_images", "posterior_flops", "seconds")}
        return folder / "weights", cost

    def generated(self, model: str) -> tuple[Path, dict[str, float]]:
        """(dataset folder, its cost) of samples of the base, drawn where they are not there yet."""
        folder = self.out / model / "generated"
        config = load(model, "mle", "digits", "local", list(self.overrides))
        marker = Unit(model, Method("generated", "base"), 0, ())
        with self.claim(marker, wait=True):
            count = ["--per-class", str(GENERATED), "--seed", str(FIRST_GENERATED)]
            source = [str(config.model.weights), "--model", model, "--out", str(folder), "--dataset"]
            mclr.train.sample.main([*source, *count, *self.overrides])
        record = read_record(folder)
        assert record is not None
        return folder / "dataset", {key: record[key] for key in ("count", "forwards_per_image")}

    def sample(self, unit: Unit, point: Point, weights: Path) -> dict[str, Any]:
        """Scores of 1,797 samples, and one picture per condition (PNG, ten across), the same seeds for all units of a model."""
        chosen = [setting for setting in self.overrides_of(unit, point) if setting.startswith("sample.")]
        arm = Arm(load(unit.model, "mle", "digits", "local", chosen), weights)
        pictures = image_grid(arm.pictures(1).numpy(), 1, 10, 1)
        return {"scores": arm.judged(self.judge, unit.seed), "pictures": base64.b64encode(pictures).decode()}

    def rows(self, model: str) -> list[Row]:
        """What is known of each method of a paradigm."""
        rows = []
        for method in self.family[model]:
            repeats = {seed: self.record(Unit(model, method, seed, None)) for seed in self.seeds if method.repeated}
            kept = {seed: record for seed, record in repeats.items() if record is not None}
            chosen = self.point(Unit(model, method, self.seeds[0], None))
            rows.append(Row(method.name, method.fixed, self.tried(model, method), chosen, kept))
        return rows


def store_of(out: Path) -> Path:
    """Where records are kept: beside the source, which is how they are published; an installed package is no place to write to."""
    package = Path(mclr.__file__).parent
    return package / "family" if (package.parent / "pyproject.toml").exists() else out / "records"


def report(out: Path, only: str, markdown: bool) -> None:
    """Do what is missing of the study, then write its tables and figures. markdown: print the tables alone, of what is there."""
    study = Study(out, store_of(out))
    if not markdown:
        study.run(only)
    rows = {model: study.rows(model) for model in study.family}
    print(markdown_tables(rows) if markdown else write_family(rows, out))
