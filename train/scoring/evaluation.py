"""Samples against a reference, in the features of a network that acts as judge."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclr.configs.schema import FILE, DiffusionModel
from mclr.errors import UserError
from mclr.models.edm2 import EDM2
from mclr.models.features import ImageClassifier
from mclr.train.sampling.folder import draw, read_record
from mclr.train.sampling.generate import find_generator, parse_classes
from mclr.train.scoring.extractors import PUBLISHED, Judge, classifier_judge, open_judge
from mclr.train.scoring.image_readers import ImageSet, find_images, in_memory_images, open_folder, open_npz
from mclr.train.scoring.scores import Range, score, table
from mclr.train.scoring.statistics import MOST, Reference, Statistics, measure, open_reference, reference_statistics
from mclr.train.system.files import write_json
from mclr.train.training import memorisation as monitor
from mclr.train.training.networks import build_encoder
from mclr.train.weights.folder import find_weights, load_net
from mclr.train.weights.model_card import add_scores

FEWEST = 6  # of either: one more than the neighbours that density and coverage look at


def judge(
    classifier: ImageClassifier, real_images: Tensor, real_c: Tensor, fake_images: Tensor, fake_c: Tensor
) -> dict[str, float]:
    """score() of fake images [M, C, H, W] against real ones [N, C, H, W], uint8, in memory; conditions int64."""
    by = classifier_judge(classifier)
    real = measure(by, in_memory_images(real_images, real_c))
    return score(by, real, measure(by, in_memory_images(fake_images, fake_c), with_prob=True))


def evaluate(args: argparse.Namespace) -> None:
    """Score the samples, print the scores and write them beside the samples."""
    # everything that can be wrong is looked at before any image is drawn or scored
    source: Path = args.source
    record, own_data, is_run = None, None, (source / FILE).is_file()
    if is_run:
        config, weights = find_generator(str(source), None, None, [])
        own_data = config.data.model_dump()
    elif (source.suffix == ".npz" and source.is_file()) or find_images(source):
        record = read_record(source) if source.is_dir() else None
        own_data = record and record["data"]
    else:
        raise UserError(f"{source} is no run and holds no images: give samples, an .npz file or a run")
    if args.ranges < 1:
        raise UserError(f"--ranges {args.ranges}: give 1 or more")
    if args.icr and not (is_run and isinstance(config.model, DiffusionModel)):
        raise UserError(f"--icr looks into the network of a diffusion run, {source} is none: leave it out, or give such a run")
    if args.reference is None and own_data is None:
        raise UserError(f"{source} does not say which data its model was for: say it by --reference")
    with_conditions = args.judge not in PUBLISHED
    reference = open_reference(args.reference, own_data, args.real, with_conditions)
    if args.icr and reference.info is None:
        raise UserError("--icr compares images of a dataset: give a dataset by --reference, or leave out --icr")
    by = open_judge(args.judge or _default_judge(reference), args.judge_weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by.net.to(device)
    if is_run:
        # mu and sigma may be of more images than there are
        asked = args.ranges * (MOST if reference.stored or not reference.images else min(reference.images.count, MOST))
        there = read_record(source / "samples")
        # more images of these settings are no harm
        drawn = max(asked, there["count"] if there else 0)
        draw(config, weights, source / "samples", parse_classes(None, config.data.num_classes), seed=0, count=drawn)
        source = source / "samples"
        record = read_record(source)
    samples = open_npz(source) if source.is_file() else open_folder(source, with_conditions)
    if record and samples.count != record["count"]:
        raise UserError(f"{source} holds {samples.count} of {record['count']} images: repeat its `mclr sample` command")
    each, rest = divmod(asked if is_run else samples.count, args.ranges)
    if rest:
        raise UserError(
            f"--ranges {args.ranges} does not divide the {samples.count} images of {source}: draw more, or give another"
        )
    parts = [range(first, first + each) for first in range(0, each * args.ranges, each)]
    _refuse_other(by, samples, reference)
    for part in parts:
        _refuse_few(by, samples, part, reference)

    made, ranges = record and record["settings"], []
    try:
        real, notes, origin = reference_statistics(by, reference)
        for part in parts:
            fake = measure(by, samples, part, with_prob=True)
            seeds = [made["seed"] + part.start, made["seed"] + part.stop - 1] if made else None
            ranges.append(Range(seeds, score(by, real, fake)))
        notes += _doubts(by, samples, reference, made, real, fake)
    except ValueError as error:
        raise UserError(f"judge {by.name} cannot score these samples ({error}): give another --judge") from error
    scores = {name: sum(one.scores[name] for one in ranges) / len(ranges) for name in ranges[0].scores}
    if len(ranges) > 1:
        scores["fd_min"] = min(one.scores["fd"] for one in ranges)
    result = {
        "scores": scores,
        "samples": {"path": str(source), "count": each * args.ranges, "made": made},
        "real": reference.about() | {"count": real.count, "neighbours": None if real.near_ND is None else len(real.near_ND)},
        "judge": {"name": by.name, "sha256": by.sha256, "features": by.features, "fd": by.fd},
        "ranges": [asdict(one) for one in ranges],
        "notes": notes,
    }
    if args.icr:
        net = load_net(str(weights), "edm2").to(device)
        assert isinstance(net, EDM2) and reference.info is not None
        contamination = monitor.measure(net, build_encoder(config, device), monitor.open_images(reference.info), config.data.flip)
        result["icr"] = contamination | {"sigma": monitor.SIGMA, "pairs": monitor.PAIRS}
    name = f"evaluation-{by.name}.json" if by.name in PUBLISHED else "evaluation.json"
    path = source.with_name(f"{source.stem}-{name}") if source.is_file() else source / name
    write_json(path, result)
    if is_run:
        add_scores(weights, result)
    print(table(result))
    print(f"statistics of the reference: {origin}")
    print(f"written to {path}")


def _default_judge(reference: Reference) -> str:
    info = reference.info
    if info is None:
        raise UserError(
            f"no judge is bundled for {reference.name}: give --judge dinov2, inception or the weights of a classifier"
        )
    name = f"{info.name}-classifier"
    try:
        find_weights(name)
    except UserError:
        makes = f"`mclr prepare classifier WEIGHTS --data {info.path}` makes one"
        raise UserError(f"no judge is bundled for {info.name}: give --judge WEIGHTS; {makes}") from None
    return name


def _refuse_other(by: Judge, samples: ImageSet, reference: Reference) -> None:
    """Raises UserError where a classifier does not suit the reference or the samples; the other judges look at any image."""
    if not isinstance(by.net, ImageClassifier):
        return
    found, info = (by.net.config.num_classes, by.net.config.img_channels), reference.info
    expected = (info.num_classes, info.channels) if info else (found[0], samples.shape[0])
    if found != expected:
        raise UserError(
            f"judge {by.name} knows {found[0]} conditions of {found[1]}-channel images, {reference.name} has {expected[0]} of "
            f"{expected[1]}: give another --judge, or fit one with `mclr prepare classifier`"
        )
    if reference.images and samples.shape != reference.images.shape:
        raise UserError(
            f"the samples are of shape {samples.shape}, the images of {reference.name} of {reference.images.shape}: "
            "give the --reference their model was trained on"
        )
    if samples.c_N is not None and (highest := int(samples.c_N.max())) >= found[0]:
        raise UserError(
            f"{samples.name} holds condition {highest}, judge {by.name} knows 0..{found[0] - 1}: give another --judge"
        )


def _refuse_few(by: Judge, samples: ImageSet, part: range, reference: Reference) -> None:
    """Raises UserError where there are fewer images than the scores need (mclr/metrics.py)."""
    more = "draw more, or compare with more real images (--real all)"
    real = reference.images
    if by.conditions and samples.c_N is not None and real and real.c_N is not None:
        fake_c = samples.c_N[part.start : part.stop]
        for c in torch.cat([fake_c, real.c_N]).unique().tolist():
            fakes, reals = (int((c_N == c).sum()) for c_N in (fake_c, real.c_N))
            if min(fakes, reals) < 2:
                raise UserError(
                    f"condition {c} has {fakes} samples and {reals} real images, at least 2 of each are needed: {more}"
                )
    if (fewest := min(len(part), real.count if real else len(part))) < FEWEST:
        raise UserError(f"there are {fewest} samples or real images, at least {FEWEST} of each are needed: {more}")


def _doubts(
    by: Judge, samples: ImageSet, reference: Reference, made: dict[str, Any] | None, real: Statistics, fake: Statistics
) -> Iterator[str]:
    """What is left out, and what makes the scores unfit for comparison, in one line each."""
    if by.conditions and samples.c_N is None:
        yield "accuracy and cfd are left out: the samples do not say their conditions (NAME-CONDITION.png, or arr_1)"
    elif by.conditions and not real.of_condition:
        yield "cfd is left out: the images of the reference do not say their conditions (NAME-CONDITION.png, or arr_1)"
    for name, seen in (("reference", real), ("samples", fake)):
        D = len(seen.features[0])
        if seen.count is not None and seen.count <= D:
            few = f"the {seen.count} images of the {name} cannot span the {D} features (their covariance is singular)"
            yield f"{few}: fd is biased upwards, compare at equal counts alone"
        if not seen.features[1].diagonal().any():
            yield f"all images of the {name} have the same features: they are one image, or the judge sees nothing"
    if made and made.get("sample.more_smooth"):
        yield "drawn with sample.more_smooth=true: scores of smoothed samples are not comparable with others"
    if samples.jpeg or (reference.images and reference.images.jpeg):
        yield "some images are JPEG files: their compression alone changes fd"
