"""An evaluation: find run or samples, reference and judge; draw; score; write the scores down."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mclr.configs.schema import FILE, Data, DatasetInfo, DiffusionModel
from mclr.errors import UserError
from mclr.models.features import ImageClassifier
from mclr.train.sampling.find import find_generator, record_of
from mclr.train.sampling.folder import draw, read_record
from mclr.train.sampling.generate import Model, load_generator
from mclr.train.scoring.extractors import PUBLISHED, Judge, open_judge
from mclr.train.scoring.image_readers import ImageSet, find_images, open_folder, open_npz
from mclr.train.scoring.scores import score, table
from mclr.train.scoring.statistics import MOST, RealSet, Statistics, measure, open_real, real_statistics
from mclr.train.system.files import write_json
from mclr.train.training import held_out, memorisation
from mclr.train.weights.folder import find_weights
from mclr.train.weights.model_card import add_scores

FEWEST = 6  # images of either side: one more than the neighbours of density and coverage


@dataclass(frozen=True)
class Request:
    """The arguments of `mclr evaluate`.

    source: a folder of samples, an .npz file or a run. reference: real images; None: the data of the model. real: a key of SPLITS.
    judge, judge_weights: see open_judge; judge None: the bundled classifier of the data. ranges: number of disjoint ranges of seeds.
    icr: also measure the invariant contamination ratio of a diffusion run.
    """

    source: Path
    reference: str | None = None
    real: str = "all"
    judge: str | None = None
    judge_weights: Path | None = None
    ranges: int = 1
    icr: bool = False


@dataclass(frozen=True)
class Run:
    """A finished run: its weights, its generator, what record_of says of it, and its data."""

    weights: Path
    load: Callable[[], Model]
    record: dict[str, Any]
    data: Data


@dataclass(frozen=True)
class Evaluation:
    """A request, its judge, its reference, and the run if the source is one."""

    request: Request
    judge: Judge
    real_set: RealSet
    run: Run | None


def evaluate(request: Request) -> None:
    """Score the samples, print the scores, and write them beside the samples. Raises UserError before it draws or scores an image."""
    evaluation = resolve(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation.judge.net.to(device)
    source, wanted = request.source, None
    if evaluation.run:
        # as many as the reference; stored mu and sigma may cover more images than their file holds: then the most
        images = None if evaluation.real_set.stored else evaluation.real_set.images
        source, wanted = source / "samples", request.ranges * (min(images.count, MOST) if images else MOST)
        draw_samples(evaluation.run, source, wanted)
    samples, made, parts = open_samples(evaluation, source, wanted)
    result, origin = score_samples(evaluation, samples, made, parts)
    if request.icr and evaluation.run and evaluation.real_set.info:
        result["icr"] = contamination(evaluation.run, evaluation.real_set.info)
    name = f"evaluation-{evaluation.judge.name}.json" if evaluation.judge.name in PUBLISHED else "evaluation.json"
    path = source.with_name(f"{source.stem}-{name}") if source.is_file() else source / name
    write_json(path, result)
    if evaluation.run:
        add_scores(evaluation.run.weights, result)
    for images in (samples, evaluation.real_set.images):
        if images is not None and images.found:
            print(images.found)
    print(table(result))
    print(f"statistics of the reference: {origin}")
    print(f"written to {path}")


def resolve(request: Request) -> Evaluation:
    """Find run or samples, reference and judge. Raises UserError if one of them is missing, or if they do not go together."""
    source, own_data, run, has_icr = request.source, None, None, False
    if (source / FILE).is_file():
        config, weights = find_generator(str(source), None, None, [])
        run = Run(weights, partial(load_generator, config, weights), record_of(config, weights), config.data)
        own_data, has_icr = config.data.model_dump(), isinstance(config.model, DiffusionModel)
    elif (source.suffix == ".npz" and source.is_file()) or find_images(source):
        record = read_record(source) if source.is_dir() else None
        own_data = record and record["data"]
    else:
        raise UserError(f"{source} is no run and holds no images: give samples, an .npz file or a run")
    if request.ranges < 1:
        raise UserError(f"--ranges {request.ranges}: give 1 or more")
    if request.icr and not has_icr:
        raise UserError(
            f"--icr looks into the network of a diffusion run, and {source} is none: leave it out, or give such a run"
        )
    if request.reference is None and own_data is None:
        raise UserError(f"{source} does not say which data its model was for: give --reference")
    real_set = open_real(request.reference, own_data, request.real, request.judge not in PUBLISHED)
    if request.icr and real_set.info is None:
        raise UserError("--icr compares images of a dataset: give a dataset by --reference, or leave out --icr")
    judge = open_judge(request.judge or _default_judge(real_set), request.judge_weights)
    return Evaluation(request, judge, real_set, run)


def draw_samples(run: Run, folder: Path, wanted: int) -> None:
    """Draw so many images of the run into the folder; keep what an earlier call drew beyond that."""
    there = read_record(folder)
    draw(run.load, run.record, folder, list(range(run.data.num_classes)), range(max(wanted, there["count"] if there else 0)))


def open_samples(evaluation: Evaluation, source: Path, wanted: int | None) -> tuple[ImageSet, dict[str, Any] | None, list[range]]:
    """(samples, the settings that drew them if known, the images of each range). wanted: how many are scored; None: all.

    Raises UserError if they cannot be scored.
    """
    request, judge = evaluation.request, evaluation.judge
    record = read_record(source) if source.is_dir() else None
    samples = open_npz(source) if source.is_file() else open_folder(source, request.judge not in PUBLISHED)
    if record and samples.count != record["count"]:
        raise UserError(f"{source} holds {samples.count} of {record['count']} images: repeat its `mclr sample` command")
    each, rest = divmod(wanted or samples.count, request.ranges)
    if rest:
        raise UserError(
            f"--ranges {request.ranges} does not divide the {samples.count} images of {source}: draw more, or give another"
        )
    parts = [range(first, first + each) for first in range(0, each * request.ranges, each)]
    _refuse_other(judge, samples, evaluation.real_set)
    for part in parts:
        _refuse_few(judge, samples, part, evaluation.real_set)
    return samples, record and record["settings"], parts


def score_samples(
    evaluation: Evaluation, samples: ImageSet, made: dict[str, Any] | None, parts: list[range]
) -> tuple[dict[str, Any], str]:
    """(the scores with their facts, where the statistics of the reference come from). Raises UserError if the judge cannot score."""
    judge, real_set = evaluation.judge, evaluation.real_set
    ranges: list[dict[str, Any]] = []
    try:
        real, notes, origin = real_statistics(judge, real_set)
        for part in parts:
            fake = measure(judge, samples, part, with_prob=True)
            seeds = [made["seed"] + part.start, made["seed"] + part.stop - 1] if made else None
            ranges.append({"seeds": seeds, "scores": score(judge, real, fake)})
        notes += _doubts(judge, samples, real_set, made, real, fake)
    except ValueError as error:
        raise UserError(f"judge {judge.name} cannot score these samples ({error}): give another --judge") from error
    scores = {name: sum(one["scores"][name] for one in ranges) / len(ranges) for name in ranges[0]["scores"]}
    if len(ranges) > 1:
        scores["fd_min"] = min(one["scores"]["fd"] for one in ranges)
    result = {
        "scores": scores,
        "samples": {"path": samples.name, "count": sum(map(len, parts)), "made": made},
        "real": real_set.about() | {"count": real.count, "neighbours": None if real.near_ND is None else len(real.near_ND)},
        "judge": {"name": judge.name, "sha256": judge.sha256, "features": judge.features, "fd": judge.fd},
        "ranges": ranges,
        "notes": notes,
    }
    return result, origin


def contamination(run: Run, info: DatasetInfo) -> dict[str, Any]:
    """The invariant contamination ratio of a diffusion run, on the images of the reference."""
    model = run.load()
    if not hasattr(model.net, "middle"):
        raise UserError(f"--icr looks into the middle of a network, and that of {run.weights} does not say where: leave it out")
    found = memorisation.measure(model.net, model.encoder, held_out.readers_of(info), run.data.flip)
    return found | {"sigma": memorisation.SIGMA, "pairs": held_out.READING}


def _default_judge(real_set: RealSet) -> str:
    info = real_set.info
    if info is None:
        raise UserError(f"no judge is bundled for {real_set.name}: give --judge dinov2, inception or the weights of a classifier")
    try:
        find_weights(f"{info.name}-classifier")
    except UserError:
        makes = f"`mclr prepare classifier WEIGHTS --data {info.path}` makes one"
        raise UserError(f"no judge is bundled for {info.name}: give --judge WEIGHTS; {makes}") from None
    return f"{info.name}-classifier"


def _refuse_other(judge: Judge, samples: ImageSet, real_set: RealSet) -> None:
    """Raises UserError if a classifier does not fit the reference or the samples. The other judges take any image."""
    if not isinstance(judge.net, ImageClassifier):
        return
    found, info = (judge.net.config.num_classes, judge.net.config.img_channels), real_set.info
    expected = (info.num_classes, info.channels) if info else (found[0], samples.shape[0])
    if found != expected:
        raise UserError(
            f"judge {judge.name} knows {found[0]} conditions of {found[1]}-channel images, {real_set.name} has {expected[0]} of "
            f"{expected[1]}: give another --judge, or fit one with `mclr prepare classifier`"
        )
    if real_set.images and samples.shape != real_set.images.shape:
        raise UserError(
            f"the samples are of shape {samples.shape}, the images of {real_set.name} of {real_set.images.shape}: "
            "give by --reference the data of their model"
        )
    if samples.c_N is not None and (highest := int(samples.c_N.max())) >= found[0]:
        raise UserError(
            f"{samples.name} holds condition {highest}, judge {judge.name} knows 0..{found[0] - 1}: give another --judge"
        )


def _refuse_few(judge: Judge, samples: ImageSet, part: range, real_set: RealSet) -> None:
    """Raises UserError if there are fewer images than the scores need (mclr/metrics.py)."""
    more = "draw more, or compare with more real images (--real all)"
    real = real_set.images
    if judge.conditions and samples.c_N is not None and real and real.c_N is not None:
        fake_c = samples.c_N[part.start : part.stop]
        # the class-wise scores leave out conditions that were not drawn
        for c in fake_c.unique().tolist():
            fakes, reals = (int((c_N == c).sum()) for c_N in (fake_c, real.c_N))
            if min(fakes, reals) < 2:
                raise UserError(
                    f"condition {c} has {fakes} samples and {reals} real images, at least 2 of each are needed: {more}"
                )
    if (fewest := min(len(part), real.count if real else len(part))) < FEWEST:
        raise UserError(f"there are {fewest} samples or real images, at least {FEWEST} of each are needed: {more}")


def _doubts(
    judge: Judge, samples: ImageSet, real_set: RealSet, made: dict[str, Any] | None, real: Statistics, fake: Statistics
) -> Iterator[str]:
    """Notes: which scores are left out, and what makes scores unfit for comparison."""
    if judge.conditions and samples.c_N is None:
        yield "accuracy and cfd are left out: the samples do not say their conditions (NAME-CONDITION.png, or arr_1)"
    elif judge.conditions and not real.of_condition:
        yield "cfd is left out: the images of the reference do not say their conditions (NAME-CONDITION.png, or arr_1)"
    elif judge.conditions and len(fake.of_condition) < len(real.of_condition):
        drawn = f"the samples are of {len(fake.of_condition)} conditions, the reference of {len(real.of_condition)}"
        yield f"{drawn}: accuracy and cfd are over the conditions that were drawn, the other scores compare with all real images"
    for name, seen in (("reference", real), ("samples", fake)):
        D = len(seen.features[0])
        if seen.count is not None and seen.count <= D:
            few = f"the {seen.count} images of the {name} cannot span the {D} features (their covariance is singular)"
            yield f"{few}: fd is biased upwards, so compare only at equal counts"
        if not seen.features[1].diagonal().any():
            yield f"all images of the {name} have the same features: they are one image, or the judge sees nothing"
    if made and made.get("sample.more_smooth"):
        yield "drawn with sample.more_smooth=true: scores of smoothed samples are not comparable with others"
    if samples.jpeg or (real_set.images and real_set.images.jpeg):
        yield "some images are JPEG files: their compression alone changes fd"
