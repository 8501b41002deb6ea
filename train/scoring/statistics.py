"""Statistics of images in the features of a judge: measured in one pass, cached, or read from files.

N images of a set; B of a batch; D features; K classes.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mclr.configs.schema import PRESETS, DatasetInfo, load_data
from mclr.errors import UserError
from mclr.metrics import NEIGHBOURS, Gaussian, Moments, neighbour_radii
from mclr.train.data.source import permutation
from mclr.train.data.write import open_or_prepare
from mclr.train.scoring.extractors import Judge
from mclr.train.scoring.image_readers import ImageSet, npz_names, open_folder, open_npz, open_splits
from mclr.train.system.console import progress_bar
from mclr.train.system.files import cache_folder, checksum, in_memory, write_file

SPLITS = {"all": ("train", "val"), "train": ("train",), "val": ("val",)}
MOST = 50_000  # images of a set in the scores by neighbours, as in published scores


@dataclass(frozen=True)
class Statistics:
    """Means and covariances of features, and the features that the scores by neighbours need.

    near_ND: features of at most MOST images. radii_N2: neighbour_radii(near_ND), for real images. prob_NK: class probabilities of all
    images, for samples. of_condition: Gaussians per condition. count and near_ND are None if a file holds mu and sigma alone.
    """

    features: Gaussian
    spatial: Gaussian | None = None
    count: int | None = None
    near_ND: Tensor | None = None
    radii_N2: Tensor | None = None
    of_condition: Mapping[int, Gaussian] = field(default_factory=dict)
    prob_NK: Tensor | None = None
    c_N: Tensor | None = None


def measure(judge: Judge, images: ImageSet, part: range | None = None, with_prob: bool = False) -> Statistics:
    """Statistics of the images in `part` (None: all), in one pass. with_prob: keep class probabilities.

    Of more than MOST images, near_ND holds the first MOST of permutation(0, 0, N). Raises ValueError for features that are not finite,
    and for fewer than two images.
    """
    part = part or range(images.count)
    features, spatial, of_condition = Moments(), Moments(), defaultdict[int, Moments](Moments)
    chosen_N = torch.zeros(len(part), dtype=torch.bool)
    chosen_N[torch.from_numpy(permutation(0, 0, len(part))[:MOST].copy())] = True
    c_N = None if images.c_N is None else images.c_N[part.start : part.stop]
    near, prob = [], []
    # only on a terminal: elsewhere an error must be the only line
    with progress_bar(len(part), begun=0, quiet=not os.isatty(2)) as bar:
        for first in range(0, len(part), judge.batch):
            rows = slice(first, min(first + judge.batch, len(part)))
            answer = judge(images.read(part[rows].start, part[rows].stop))
            features.add(answer.features_BD)
            near.append(answer.features_BD[chosen_N[rows].to(judge.device)])
            if answer.spatial_BS is not None:
                spatial.add(answer.spatial_BS)
            if with_prob and answer.prob_BK is not None:
                prob.append(answer.prob_BK)
            if judge.conditions and c_N is not None:
                c_B = c_N[rows].to(judge.device)
                for c in c_B.unique().tolist():
                    of_condition[c].add(answer.features_BD[c_B == c])
            bar.update(rows.stop - rows.start)
    return Statistics(
        features.gaussian(),
        spatial.gaussian() if spatial.count else None,
        len(part),
        near_ND=torch.cat(near),
        of_condition={c: each.gaussian() for c, each in sorted(of_condition.items()) if each.count > 1},
        prob_NK=torch.cat(prob) if prob else None,
        c_N=c_N,
    )


def neighbour_bar(chunks: list[slice]) -> tqdm:
    """Progress bar of a pass over all distances, which takes minutes for 50,000 images without a GPU."""
    # only on a terminal, as in measure()
    return tqdm(chunks, "neighbours", unit="chunk", disable=not os.isatty(2))


@dataclass(frozen=True)
class RealSet:
    """The reference: real images, a file of mu and sigma, or a file with both (ADM's). info, splits: if it is a dataset."""

    name: str
    path: Path
    images: ImageSet | None
    stored: Path | None = None
    info: DatasetInfo | None = None
    splits: tuple[str, ...] | None = None

    def about(self) -> dict[str, Any]:
        found = checksum(self.path) if self.stored else self.images and self.images.checksum()
        return {"data": self.name, "path": str(self.path), "splits": self.splits, "sha256": found}


def open_real(name: str | None, own_data: dict[str, Any] | None, real: str, with_conditions: bool) -> RealSet:
    """Open the reference: an .npz file, a folder of images, a dataset folder or a preset. name None: the data of the samples.

    real: a key of SPLITS. Raises UserError if nothing is found, or if `real` asks for splits that do not exist.
    """
    path = Path(name or "")
    known = name is None or (PRESETS / "data" / f"{name}.yaml").is_file() or (path / "dataset.json").is_file()
    plain_folder = not known and path.is_dir()
    if not plain_folder and path.suffix != ".npz":
        data = own_data if name is None else load_data(name).model_dump()
        assert data is not None
        info = open_or_prepare(data["name"], data["path"])
        # "all" leaves out an empty val split
        splits = tuple(split for split in SPLITS[real] if info.splits[split].count or real != "all")
        return RealSet(info.name, info.path, open_splits(info, splits), info=info, splits=splits)
    if real != "all":
        raise UserError(f"--real {real} has no effect: {name} is no dataset and has no splits; leave it out")
    if plain_folder:
        return RealSet(str(path), path, open_folder(path, with_conditions))
    names = npz_names(path)
    if not {"mu", "arr_0"} & set(names):
        raise UserError(f"{path} holds {', '.join(names)}: a reference needs images (arr_0), or mu and sigma")
    return RealSet(str(path), path, open_npz(path) if "arr_0" in names else None, path if "mu" in names else None)


def real_statistics(judge: Judge, real_set: RealSet) -> tuple[Statistics, list[str], str]:
    """(statistics of the real images, notes for the reader of the scores, where the statistics come from).

    If a file holds images, mu and sigma, mu and sigma are used if they fit the features of this judge: ADM's cover more images than the
    file holds. Raises UserError for a damaged file, and ValueError as measure() does.
    """
    stored = read_statistics(real_set.stored, judge.device) if real_set.stored else None
    if real_set.images is None:
        assert stored is not None
        left_out = f"{real_set.path} holds only mu and sigma: precision, recall, density and coverage are left out"
        return stored, [left_out], f"read from {real_set.path}"
    measured, origin = _kept(judge, real_set.images)
    if stored is None or stored.features[0].shape != measured.features[0].shape:
        return measured, [], origin
    note = f"fd is against mu and sigma in {real_set.path}, the neighbours are its {real_set.images.count} images"
    return replace(measured, features=stored.features, spatial=stored.spatial, count=None), [note], origin


def _kept(judge: Judge, images: ImageSet) -> tuple[Statistics, str]:
    """(statistics of real images from the cache, or measured and put there, where they come from)."""
    key = json.dumps([images.checksum(), judge.sha256, judge.features, images.c_N is not None, MOST, NEIGHBOURS])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    if path.is_file():
        return read_statistics(path, judge.device), f"reused from {path}"
    statistics = measure(judge, images)
    near_ND = statistics.near_ND
    assert near_ND is not None
    radii_N2 = neighbour_radii(near_ND, progress=neighbour_bar)
    statistics = replace(statistics, radii_N2=radii_N2)
    # mu, sigma, mu_s and sigma_s (spatial) are ADM's names; the others are ours
    tensors = {"near": near_ND, "radii": radii_N2, "count": torch.tensor(statistics.count)}
    tensors |= zip(("mu", "sigma"), statistics.features, strict=True)
    if statistics.spatial:
        tensors |= zip(("mu_s", "sigma_s"), statistics.spatial, strict=True)
    if statistics.of_condition:
        tensors["conditions"] = torch.tensor(list(statistics.of_condition))
        tensors["mu_c"], tensors["sigma_c"] = map(torch.stack, zip(*statistics.of_condition.values(), strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, in_memory(np.savez, **{name: tensor.cpu().numpy() for name, tensor in tensors.items()}))
    except (UserError, OSError) as error:
        return statistics, f"measured now, and not kept ({error})"
    return statistics, f"measured now, kept in {path}"


def read_statistics(path: Path, device: torch.device) -> Statistics:
    """Statistics from an .npz file, ours or others'. Raises UserError if it is damaged or holds no mu and sigma."""
    try:
        with np.load(path) as file:
            tensors = {name: torch.from_numpy(file[name]).to(device) for name in file.files if not name.startswith("arr_")}
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mean in tensors and tensors[covariance].shape != 2 * tensors[mean].shape:
                raise ValueError(f"{mean} is of shape {tuple(tensors[mean].shape)}, {covariance} of another")
        conditions = tensors["conditions"].tolist() if "conditions" in tensors else []
        return Statistics(
            features=(tensors["mu"], tensors["sigma"]),
            spatial=(tensors["mu_s"], tensors["sigma_s"]) if "mu_s" in tensors else None,
            count=int(tensors["count"]) if "count" in tensors else None,
            near_ND=tensors.get("near"),
            radii_N2=tensors.get("radii"),
            of_condition={c: (tensors["mu_c"][i], tensors["sigma_c"][i]) for i, c in enumerate(conditions)},
        )
    # decoders raise almost any error on damaged bytes
    except Exception as error:
        raise UserError(f"{path} is no readable .npz of mu and sigma ({error}): copy it again, or remove it") from error
