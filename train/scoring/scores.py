"""The scores of `mclr evaluate`: computing them from the statistics of real and fake images, and printing them."""

from typing import Any

from mclr.metrics import class_accuracy, class_frechet_distance, frechet_from_moments, inception_score, neighbour_scores
from mclr.train.scoring.extractors import Judge
from mclr.train.scoring.statistics import Statistics, neighbour_bar

SCORES = {
    "accuracy": "↑ class accuracy: share of samples in which the judge sees their condition",
    "fd": "↓ Fréchet distance (FD) between all samples and all real images",
    "sfid": "↓ sFID: the same distance in the spatial features",
    "is": "↑ Inception score",
    "cfd": "↓ class-wise FD: FD within each condition, averaged over the conditions that were drawn",
    "precision": "↑ share of samples near a real image",
    "recall": "↑ share of real images near a sample",
    "density": "↑ real neighbourhoods around a sample, 1 as for the real images themselves",
    "coverage": "↑ share of real images with a sample in their neighbourhood",
    "fd_min": "↓ minimum of fd over the ranges, as EDM2 reports it; below the average of single ranges",
}
ICR = {
    "icr": "invariant contamination ratio of the network on training images; if it rises again, the network may memorise",
    "icr_val": "the same on held-out images",
}


def score(judge: Judge, real: Statistics, fake: Statistics) -> dict[str, float]:
    """The SCORES that these statistics allow. accuracy and cfd need conditions, the four scores by neighbours need real images.

    mclr/metrics.py has the formulas. Raises ValueError if there are too few images, or if the statistics come from two judges.
    """
    scores = {}
    if judge.conditions and fake.c_N is not None and fake.prob_NK is not None:
        scores["accuracy"] = class_accuracy(fake.prob_NK.cpu(), fake.c_N)
    scores["fd"] = frechet_from_moments(*real.features, *fake.features)
    if real.spatial and fake.spatial:
        scores["sfid"] = frechet_from_moments(*real.spatial, *fake.spatial)
    if not judge.conditions and fake.prob_NK is not None:
        scores["is"] = inception_score(fake.prob_NK)
    if real.of_condition and fake.of_condition:
        drawn = {c: gaussian for c, gaussian in real.of_condition.items() if c in fake.of_condition}
        scores["cfd"] = class_frechet_distance(drawn, fake.of_condition)
    if real.near_ND is not None and fake.near_ND is not None:
        scores |= neighbour_scores(real.near_ND, fake.near_ND, real_radii_N2=real.radii_N2, progress=neighbour_bar)
    return scores


def table(result: dict[str, Any]) -> str:
    """The printed text of an evaluation, one line per score."""
    samples, real, judged_by, ranges = (result[key] for key in ("samples", "real", "judge", "ranges"))
    made = samples["made"] or {}
    gamma, rounding = made.get("sample.gamma", "unknown"), made.get("rounding", "unknown")
    seeds = ", ".join("..".join(map(str, one["seeds"])) if one["seeds"] else "unknown" for one in ranges)
    splits = f", {' and '.join(real['splits'])}" if real["splits"] else ""
    lines = [
        f"samples    {samples['count']} images of {samples['path']}, guidance weight {gamma}, seeds {seeds}",
        f"rounding   {rounding}",
        f"reference  {real['count'] or 'unknown number of'} images of {real['data']}{splits}, sha256 {real['sha256']}",
        f"extractor  {judged_by['name']}, {judged_by['features']}, sha256 {judged_by['sha256']}",
    ]
    for name, meaning in SCORES.items():
        if name not in result["scores"]:
            continue
        if name == "fd" and judged_by["fd"] != "FD":
            meaning += f": {judged_by['fd']}"
        if len(ranges) > 1 and name != "fd_min":
            meaning += f"; mean of {', '.join(format(one['scores'][name], '.4f') for one in ranges)}"
        lines.append(f"{name:10} {result['scores'][name]:9.4f}  {meaning}")
    icr = result.get("icr", {})
    lines += [f"{name:10} {icr[name]:9.4f}  {meaning}" for name, meaning in ICR.items() if name in icr]
    return "\n".join([*lines, *(f"note       {note}" for note in result["notes"])])
