"""`mclr evaluate`: scores samples against a dataset, in the features of a classifier that acts as judge.

N real and M fake images; C H W image; D features.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import FILE, DiffusionModel, load_data
from mclr.errors import UserError
from mclr.metrics import class_accuracy, class_frechet_distance, density_coverage, frechet_distance, precision_recall
from models.edm2 import EDM2
from models.features import ImageClassifier
from train import monitor
from train.build import build_encoder
from train.cli import Parser, run
from train.data import DatasetInfo, SplitReader, permutation
from train.encoders import from_uint8
from train.files import write_json
from train.prepare import open_or_prepare
from train.sample import condition_of, draw, find_generator, image_paths, parse_classes, read_images, read_record, sha256
from train.weights import find_weights, load_net

EXAMPLE = """examples:
  mclr evaluate samples/mine --data digits --judge digits-classifier
  mclr evaluate runs/mine
  mclr evaluate runs/mine --icr

Samples are a folder made by `mclr sample`, any folder with images/NAME-CONDITION.png, or an .npz file (arr_0: uint8 NHWC,
arr_1: conditions). A run is sampled first into RUN/samples, by its own settings: as many images as there are real ones, at most
50,000. A judge for your own data comes from `mclr prepare classifier`. The scores go to evaluation.json in the folder, or
to NAME-evaluation.json beside NAME.npz."""

BATCH = 256  # images per forward of the judge
MOST = 50_000  # samples of a run, and real images of the scores by neighbours: what the field reports on
FEWEST = 6  # of either: one more than the neighbours that density and coverage look at
SPLITS = {"all": ("train", "val"), "train": ("train",), "val": ("val",)}
SCORES = {
    "accuracy": "↑ class accuracy: share of samples that the judge puts under their condition",
    "fd": "↓ Fréchet distance (FD) between all samples and all real images",
    "cfd": "↓ class-wise FD: the same within each condition, averaged",
    "precision": "↑ share of samples near a real image",
    "recall": "↑ share of real images near a sample",
    "density": "↑ real neighbourhoods around a sample, 1 as for the real images themselves",
    "coverage": "↑ share of real images with a sample in their neighbourhood",
}
ICR = {
    "icr": "invariant contamination ratio of the network on training images; one past its minimum may memorise",
    "icr_val": "the same on held-out images",
}


def judge(
    classifier: ImageClassifier, real_images: Tensor, real_c: Tensor, fake_images: Tensor, fake_c: Tensor
) -> dict[str, float]:
    """score() of fake images [M, C, H, W] against real ones [N, C, H, W], uint8; conditions int64."""
    real, fake = (features(classifier, images.split(BATCH)) for images in (real_images, fake_images))
    return score(classifier, real, real_c, fake, fake_c)


@torch.no_grad()
def features(classifier: ImageClassifier, batches: Iterable[Tensor]) -> Tensor:
    """The judge's penultimate layer [N, D] fp32, on the CPU, of uint8 images that come in batches [B, C, H, W]."""
    device = classifier.head.weight.device
    return torch.cat([classifier.features(from_uint8(x_BCHW.to(device))).cpu() for x_BCHW in batches])


def score(classifier: ImageClassifier, real: Tensor, real_c: Tensor, fake: Tensor, fake_c: Tensor) -> dict[str, float]:
    """accuracy, fd, cfd, precision, recall, density, coverage of features [M, D] of fake images against [N, D] of real ones.

    accuracy: share of the fake images that the judge puts under their own condition; the other scores are those of
    mclr/metrics.py. Distances between neighbours take N x M: those scores use at most MOST real images, chosen by
    permutation(0, 0, N). Raises ValueError where there are too few images.
    """
    near = real if len(real) <= MOST else real[torch.from_numpy(permutation(0, 0, len(real))[:MOST].copy())]
    precision, recall = precision_recall(near, fake)
    density, coverage = density_coverage(near, fake)
    with torch.no_grad():
        prediction = classifier.head(fake.to(classifier.head.weight.device)).argmax(1).cpu()
    return {
        "accuracy": class_accuracy(prediction, fake_c),
        "fd": frechet_distance(real, fake),
        "cfd": class_frechet_distance(real, real_c, fake, fake_c),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr evaluate", description="Score samples.", epilog=EXAMPLE)
    parser.add_argument(
        "source", type=Path, metavar="SAMPLES_OR_RUN", help="a folder of samples, an .npz file, or a finished run"
    )
    parser.add_argument("--data", metavar="D", help="real images: a preset or dataset folder (default: what the model was for)")
    parser.add_argument(
        "--judge", metavar="WEIGHTS", help="classifier: weights folder or bundled name (default: the bundled DATA-classifier)"
    )
    parser.add_argument(
        "--real", choices=SPLITS, default="all", help="split of the real images (default: train and val together)"
    )
    parser.add_argument(
        "--icr", action="store_true", help="also the invariant contamination ratio of a diffusion run, the memorisation monitor"
    )
    args = parser.parse_args(argv)
    evaluate(args.source, args.data, args.judge, args.real, args.icr)
    return 0


def evaluate(source: Path, data: str | None, judge_name: str | None, real: str, with_icr: bool = False) -> None:
    """Score the samples, print the scores and write them to evaluation.json beside the samples.

    with_icr: also ICR on training and held-out images (train/monitor.py), of the run that drew them.
    """
    # everything that can be wrong is looked at before any image is drawn or scored
    record = None
    is_run = (source / FILE).is_file()
    if is_run:
        config, weights = find_generator(str(source), None, None, [])
        own_data: dict[str, str] | None = {"name": config.data.name, "path": config.data.path}
    elif (source.suffix == ".npz" and source.is_file()) or image_paths(source):
        record = read_record(source) if source.is_dir() else None
        own_data = record["data"] if record else None
    else:
        raise UserError(f"{source} is no run and holds no images/NAME-CONDITION.png: give samples, an .npz file or a run")
    if with_icr and not (is_run and isinstance(config.model, DiffusionModel)):
        raise UserError(f"--icr looks into the network of a diffusion run, {source} is none: leave it out, or give such a run")
    if data is None and own_data is None:
        raise UserError(f"{source} does not say which data its model was for: say it by --data")
    if data is not None:
        chosen = load_data(data)
        own_data = {"name": chosen.name, "path": chosen.path}
    assert own_data is not None
    info = open_or_prepare(own_data["name"], own_data["path"])
    judge_name = judge_name or _default_judge(info)
    classifier = _load_judge(judge_name, info)
    # an empty val split is left out of "all"
    readers = [SplitReader(info, split) for split in SPLITS[real] if info.splits[split].count or real != "all"]
    real_c = torch.cat([reader.c_N for reader in readers])
    if is_run:
        conditions = parse_classes(None, config.data.num_classes)
        draw(config, weights, source / "samples", conditions, seed=0, count=min(len(real_c), MOST))
        source = source / "samples"
        record = read_record(source)
    fake_images, fake_c = _load_samples(source, record, info)
    _refuse_few(fake_c, real_c)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device)
    fake_MD, real_ND = features(classifier, fake_images), features(classifier, _batches(readers))
    try:
        scores = score(classifier, real_ND, real_c, fake_MD, fake_c)
    except ValueError as error:
        raise UserError(f"judge {judge_name} cannot score these samples ({error}): give another --judge") from error

    result = {
        "scores": scores,
        "samples": {"path": str(source), "count": len(fake_c), "made": record and record["settings"]},
        "real": {
            "data": info.name,
            "path": str(info.path),
            "splits": SPLITS[real],
            "count": len(real_c),
            "neighbours": min(len(real_c), MOST),  # those that precision, recall, density and coverage look at
        },
        "judge": {"name": judge_name, "sha256": sha256(find_weights(judge_name)), "features": "penultimate layer"},
    }
    if with_icr:
        net = load_net(str(weights), "edm2").to(device)
        assert isinstance(net, EDM2)
        contamination = monitor.measure(net, build_encoder(config, device), monitor.open_images(info), config.data.flip)
        result["icr"] = contamination | {"sigma": monitor.SIGMA, "pairs": monitor.PAIRS}
    path = source.with_name(f"{source.stem}-evaluation.json") if source.is_file() else source / "evaluation.json"
    write_json(path, result)
    print(_table(result))
    print(f"written to {path}")


def _default_judge(info: DatasetInfo) -> str:
    name = f"{info.name}-classifier"
    try:
        find_weights(name)
    except UserError:
        makes = f"`mclr prepare classifier WEIGHTS --data {info.path}` makes one"
        raise UserError(f"no judge is bundled for {info.name}: give --judge WEIGHTS; {makes}") from None
    return name


def _load_judge(name: str, info: DatasetInfo) -> ImageClassifier:
    classifier = load_net(name, "image_classifier")
    assert isinstance(classifier, ImageClassifier)
    expected = (info.channels, info.num_classes)
    found = (classifier.config.img_channels, classifier.config.num_classes)
    if found != expected:
        raise UserError(
            f"judge {name} knows {found[1]} conditions of {found[0]}-channel images, {info.name} has {expected[1]} of "
            f"{expected[0]}: give another --judge, or fit one with `mclr prepare classifier`"
        )
    return classifier


def _batches(readers: list[SplitReader]) -> Iterator[Tensor]:
    """image_BCHW uint8 of these splits, one after the other."""
    for reader in readers:
        for first in range(0, len(reader.samples), BATCH):
            yield reader.images(list(range(first, min(first + BATCH, len(reader.samples)))))


def _load_samples(source: Path, record: dict[str, Any] | None, info: DatasetInfo) -> tuple[Iterable[Tensor], Tensor]:
    """(batches of image_BCHW uint8, c_M) of a samples folder or an .npz file.

    Raises UserError where they are not of this dataset's form; for the images of a folder, when their batch is read.
    """
    if source.is_file():
        try:
            with np.load(source) as arrays:
                images, c_M = arrays["arr_0"].transpose(0, 3, 1, 2), arrays["arr_1"]
        # a decoder that meets damaged bytes raises nearly anything, and numpy's advice on other files is not for ours
        except Exception as error:
            raise UserError(
                f"{source} is no readable .npz of arr_0 (uint8 NHWC) and arr_1 (conditions): write it again by "
                "numpy.savez(FILE, images, conditions)"
            ) from error
        count, batches = len(images), (images[first : first + BATCH].copy() for first in range(0, len(images), BATCH))
    else:
        paths = image_paths(source)
        if record and len(paths) != record["count"]:
            raise UserError(f"{source} holds {len(paths)} of {record['count']} images: repeat its `mclr sample` command")
        c_M = np.array([condition_of(path) for path in paths])
        count, batches = len(paths), (read_images(paths[first : first + BATCH]) for first in range(0, len(paths), BATCH))
    if c_M.shape != (count,) or not np.issubdtype(c_M.dtype, np.integer) or not (c_M >= 0).all():
        raise UserError(f"the conditions of {source} are not one whole number per image: draw the samples again")
    if c_M.max() >= info.num_classes:
        raise UserError(f"{source} holds condition {c_M.max()}, {info.name} has 0..{info.num_classes - 1}: give another --data")
    return (_checked(batch, info) for batch in batches), torch.from_numpy(c_M.astype(np.int64))


def _refuse_few(fake_c: Tensor, real_c: Tensor) -> None:
    """Raises UserError where there are fewer images than the scores need (mclr/metrics.py)."""
    more = "draw more, or compare with more real images (--real all)"
    for c in torch.cat([fake_c, real_c]).unique().tolist():
        fake, real = (int((c_N == c).sum()) for c_N in (fake_c, real_c))
        if min(fake, real) < 2:
            raise UserError(f"condition {c} has {fake} samples and {real} real images, at least 2 of each are needed: {more}")
    if (fewest := min(len(fake_c), len(real_c))) < FEWEST:
        raise UserError(f"there are {fewest} samples or real images, at least {FEWEST} of each are needed: {more}")


def _checked(images: np.ndarray, info: DatasetInfo) -> Tensor:
    if images.dtype != np.uint8 or images.shape[1:] != info.image_shape:
        raise UserError(
            f"the samples are {images.dtype} of shape {images.shape[1:]}, those of {info.name} uint8 of {info.image_shape}: "
            "give the --data their model was trained on"
        )
    return torch.from_numpy(images)


def _table(result: dict[str, Any]) -> str:
    samples, real, judged_by = (result[key] for key in ("samples", "real", "judge"))
    made = samples["made"] or {}
    return "\n".join(
        [
            f"samples    {samples['count']} images of {samples['path']}, guidance weight {made.get('sample.gamma', 'unknown')}",
            f"rounding   {made.get('rounding', 'unknown')}",
            f"reference  {real['count']} images of {real['data']}, {' and '.join(real['splits'])}",
            f"extractor  {judged_by['name']}, {judged_by['features']}, sha256 {judged_by['sha256']}",
            *(f"{name:10} {result['scores'][name]:9.4f}  {meaning}" for name, meaning in SCORES.items()),
            *(
                f"{name:10} {result['icr'][name]:9.4f}  {meaning}"
                for name, meaning in ICR.items()
                if name in result.get("icr", {})
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(run(main))
