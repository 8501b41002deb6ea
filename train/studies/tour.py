"""The tour: base, control, guidance and MCLR of each bundled model, compared by one judge."""

import hashlib
import json
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mclr.configs.schema import RunConfig, load
from mclr.errors import UserError
from mclr.models.features import ImageClassifier
from mclr.train.data.dataset import load_split
from mclr.train.data.encoders import ROUNDING
from mclr.train.data.images import image_grid
from mclr.train.data.write import prepare_digits
from mclr.train.sampling.generate import load_generator
from mclr.train.scoring.extractors import classifier_judge
from mclr.train.scoring.image_readers import in_memory_images
from mclr.train.scoring.scores import score
from mclr.train.scoring.statistics import measure
from mclr.train.system.files import write_file, write_json
from mclr.train.training.launch import micro_batch_of, start
from mclr.train.weights.folder import find_weights, load_net, sha256

# the five guidance weights of the sweep, around the best one of each control
GAMMAS = {
    "edm2-digits": (0.2, 0.35, 0.5, 0.65, 0.8),
    "sit-digits": (0.2, 0.35, 0.5, 0.65, 0.8),
    "var-digits": (0.25, 0.5, 0.75, 1.0, 1.5),
}
# strengths of the dial, as multiples of the lam of the preset; the last one is its end
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
ROWS = ("base", "control", "cfg", "mclr", "dial")
SEEDS, SEEDS_FULL = 3, 10
ABOUT = {
    "reference": "all 1,797 scans",
    "samples": "1,797, with the class counts of the scans",
    "features": "penultimate layer of the bundled digits-classifier (64 dimensions)",
    "covariances": "square roots by symmetric eigendecomposition, float64",
    "precision and recall": "k-nearest-neighbour manifolds, k = 3; density and coverage k = 5",
    "guidance weight of the cfg row, strength of the dial row": "best of the sweep by class-wise FD on sampling seed 0",
    "sampling seeds of the rows": "1 and up: means and standard deviations",
    "lam of the mclr row": "fixed in the preset beforehand",
    "equal compute": "forward and backward FLOPs of fine-tuning, with the posterior classifier's; so the control sees more images",
    "not counted": "fitting the bundled posterior classifier, which costs as much as maximum likelihood on about 68,000 images",
    "rounding": ROUNDING,
}


class DigitsJudge:
    """The bundled classifier of the digits, and its statistics of all real ones. c_N: their conditions; samples are drawn for the same.

    Prepares the digits if they are missing.
    """

    def __init__(self) -> None:
        prepare_digits("data/digits")
        images, conditions = zip(*(load_split("data/digits", name) for name in ("train", "val")), strict=True)
        classifier = load_net("digits-classifier", "image_classifier")
        assert isinstance(classifier, ImageClassifier)
        self.judge, self.c_N = classifier_judge(classifier), torch.cat(conditions)
        self.real = measure(self.judge, in_memory_images(torch.cat(images), self.c_N))

    def scores(self, images_N: torch.Tensor) -> dict[str, float]:
        """The scores of samples [N, C, H, W] uint8, drawn for the conditions c_N."""
        return score(self.judge, self.real, measure(self.judge, in_memory_images(images_N, self.c_N), with_prob=True))


class Arm:
    """One way to sample: weights and config.sample, as in `mclr sample WEIGHTS sample.gamma=...`."""

    def __init__(self, config: RunConfig, weights: Path):
        self.config, self.weights = config, weights
        self.model = load_generator(config, weights, torch.device("cpu")).counted()

    def draw(self, c_N: torch.Tensor, first_seed: int) -> torch.Tensor:
        return self.model.draw(c_N, range(first_seed, first_seed + len(c_N)))

    def judged(self, judge: DigitsJudge, seed: int) -> dict[str, float]:
        """Scores of one sample per real image, for this sampling seed; and the network forwards per image."""
        self.model.work = 0.0
        x_N = self.draw(judge.c_N, seed * 1_000_000)
        batch = self.config.sample.batch
        padded = -(-len(x_N) // batch) * batch
        return judge.scores(self.model.images(x_N)) | {"forwards_per_image": self.model.per_image(padded)}


@dataclass
class Tour:
    """One tour: its folder and its judge. full: more seeds, finer sweeps. overrides: of every preset.

    phases: name -> seconds, those of an interrupted tour included.
    """

    out: Path
    full: bool
    overrides: list[str]
    judge: DigitsJudge
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seeds(self) -> range:
        """Sampling seeds of the rows. Seed 0 is left out: it chose the guidance weight."""
        return range(1, 1 + (SEEDS_FULL if self.full else SEEDS))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        path = self.out / "phases.json"
        phases = json.loads(path.read_text()) if path.exists() else {}
        # the time of an interrupted tour counts; repeating a finished phase does not
        spent, done = phases.get(name, (0.0, False))
        started = time.perf_counter()
        try:
            yield
            phases[name] = (spent if done else spent + time.perf_counter() - started, True)
        except BaseException:
            phases[name] = (spent + time.perf_counter() - started, False)
            raise
        finally:
            write_json(path, phases)
        self.phases[name] = round(phases[name][0], 1)
        print(f"== {name}: {self.phases[name]} s", flush=True)

    def scores(self, name: str, arm: Arm, seed: int) -> dict[str, float]:
        """The scores of an arm. Reads them back if the tour has them already."""
        # the file's name holds all that decides the scores, so that a changed tour never reads old ones
        gamma, strength = arm.config.sample.gamma, arm.config.sample.strength
        settings = json.dumps(arm.config.sample.model_dump(), sort_keys=True) + sha256(arm.weights)
        key = f"{arm.config.model.name}-{name}-{gamma:g}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}-{seed}"
        kept = self.out / "scores" / f"{key}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        scores = arm.judged(self.judge, seed)
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, scores)
        print(
            f"{name:8} gamma {gamma:<5g} strength {strength:<5g} seed {seed}: "
            + ", ".join(f"{k} {v:.3g}" for k, v in scores.items()),
            flush=True,
        )
        return scores

    def row(self, name: str, arm: Arm) -> dict[str, Any]:
        """Mean and standard deviation over the sampling seeds."""
        runs = [self.scores(name, arm, seed) for seed in self.seeds]
        of_key = {key: [run[key] for run in runs] for key in runs[0]}
        row = {key: {"mean": statistics.mean(values), "std": statistics.stdev(values)} for key, values in of_key.items()}
        return row | {"forwards_per_image": runs[0]["forwards_per_image"]}

    def grid(self, row: str, arm: Arm) -> str:
        """The picture of a row: ten conditions down, eight seeds across, the same in every arm."""
        path = Path("grids") / f"{arm.config.model.name}-{row}.png"
        (self.out / "grids").mkdir(exist_ok=True)
        images_N = arm.model.images(arm.draw(torch.arange(10).repeat_interleave(8), 0))
        write_file(self.out / path, image_grid(images_N.numpy(), 10, 8, 6))
        return str(path)


def speeds(arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """images/s of the sampler's loop. The arms take turns, so that a slow minute of the machine hits all of them."""
    runs: dict[str, list[float]] = {name: [] for name in arms}
    # one full micro-batch: padding would cost time without being counted
    c_N = torch.arange(next(iter(arms.values())).config.sample.batch) % 10
    for _ in range(5):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm.draw(c_N, 0)
            runs[name].append(len(c_N) / (time.perf_counter() - started))
    return {name: {"median": statistics.median(values), "runs": values} for name, values in runs.items()}


def fine_tune(folder: Path, model: str, objective: str, overrides: list[str]) -> dict[str, Any]:
    """Train in this run folder; go on if it is unfinished. Returns the last line of its metrics."""
    config = load(model, objective, "digits", "local", overrides)
    command = ["mclr", "train", "--model", model, "--objective", objective, "--engine", "local", "--out", str(folder), *overrides]
    if status := start(config, folder, micro_batch_of(config, ranks=1), shlex.join(command)):
        raise SystemExit(status)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def gap_closed(control: Sequence[float], cfg: Sequence[float], method: Sequence[float]) -> float | None:
    """The share of cfg's gain in class-wise FD over the control that a method reaches; None if cfg gains nothing.

    It uses the means over the seeds: if the gain is small, the share of a single seed is noise.
    """
    from_, to, reached = (statistics.mean(values) for values in (control, cfg, method))
    return (from_ - reached) / (from_ - to) if to < from_ else None


def compare(tour: Tour, model: str) -> dict[str, Any]:
    """One model: the five rows, the sweeps, the speeds, the grids."""
    config = load(model, "mclr", "digits", "local", tour.overrides)
    lam, batch = config.objective.lam, config.train.batch
    if lam is None:
        raise UserError("a tour trains with a dial and without: leave out model.strength.max")
    folders = {row: tour.out / f"{model}-{row}" for row in ("control", "mclr", "dial")}
    with tour.phase(f"{model}: fine-tune with MCLR, lam {lam:g}"):
        mclr_last = fine_tune(folders["mclr"], model, "mclr", tour.overrides)
    # the lam of the dial is drawn
    kept = [each for each in tour.overrides if not each.startswith("objective.lam=")]
    dial = [*kept, f"model.strength.max={lam * STRENGTHS[-1]}"]
    with tour.phase(f"{model}: fine-tune with MCLR and a dial, strengths 0 to {lam * STRENGTHS[-1]:g}"):
        fine_tune(folders["dial"], model, "mclr", dial)
    images = -(-mclr_last["mle_images"] // batch) * batch
    with tour.phase(f"{model}: fine-tune the control, mle on {images} images"):
        control_last = fine_tune(folders["control"], model, "mle", [*tour.overrides, f"train.images={images}"])

    arms = {
        "base": Arm(config, find_weights(str(config.model.weights))),
        "control": Arm(config, folders["control"] / "weights"),
        "mclr": Arm(config, folders["mclr"] / "weights"),
    }
    with_dial = load(model, "mclr", "digits", "local", dial)
    with tour.phase(f"{model}: sweeps of guidance and of the dial"):
        gammas, strengths = list(GAMMAS[model]), [lam * multiple for multiple in STRENGTHS]
        if tour.full:
            gammas, strengths = (sorted(each + [(a + b) / 2 for a, b in pairwise(each)]) for each in (gammas, strengths))
        sweep = {}
        for row, key, settings, weights in (("cfg", "gamma", config, gammas), ("dial", "strength", with_dial, strengths)):
            folder, points = folders["control" if row == "cfg" else row] / "weights", []
            for weight in weights:
                sample = settings.sample.model_copy(update={key: weight})
                points.append((weight, Arm(settings.model_copy(update={"sample": sample}), folder)))
            scores = [tour.scores(row, arm, 0) for _, arm in points]
            best = min(range(len(points)), key=lambda i: scores[i]["cfd"])
            arms[row] = points[best][1]
            sweep[row] = [{key: weight, **each} for (weight, _), each in zip(points, scores, strict=True)]
    with tour.phase(f"{model}: {len(tour.seeds)} sampling seeds of {', '.join(ROWS)}"):
        result: dict[str, Any] = {name: tour.row(name, arms[name]) for name in ROWS}
    with tour.phase(f"{model}: speeds, grids"):
        for name, speed in speeds({name: arms[name] for name in ROWS}).items():
            result[name]["images_per_second"] = speed
        result["grids"] = {name: tour.grid(name, arms[name]) for name in ROWS}
    result["mclr"]["lam"] = lam
    result["cfg"]["gamma"], result["dial"]["strength"] = arms["cfg"].config.sample.gamma, arms["dial"].config.sample.strength
    for name, key in (("mclr", "gap_closed"), ("dial", "gap_closed_by_dial")):
        result[key] = gap_closed(*([result[row]["cfd"]["mean"]] for row in ("control", "cfg", name)))
    result["sweep"] = sweep
    result["compute"] = {
        "MCLR: images": mclr_last["images"],
        "MCLR: TFLOPs, posterior classifier included": round(mclr_last["flops"] / 1e12, 3),
        "MCLR: of these the posterior classifier": round(mclr_last["posterior_flops"] / 1e12, 3),
        "MCLR: rows with gradient": mclr_last["rows"],
        "control: images": control_last["images"],
        "control: TFLOPs": round(control_last["flops"] / 1e12, 3),
    }
    return result
