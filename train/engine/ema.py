"""Power-function averages of the weights, snapshots of them, and averages of other widths reconstructed from snapshots.

EDM2, arXiv 2312.02696, section 3 and appendix C. In the average of exponent gamma after t images, the weights after s <= t images
have the density p(s) = (gamma + 1) s^gamma / t^(gamma + 1): its standard deviation is a fixed share `std` of t. t counts the images
of this run only: the weights that fine-tuning starts from have no share in an average. K snapshots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mclr.configs.schema import Train
from mclr.errors import UserError
from mclr.train.system.files import ignore, write_tensors

FARTHEST = 0.1  # largest L2 error of a reconstructed profile, relative to its norm


def exponent_of(std: float) -> float:
    """The exponent gamma of the profile with this relative standard deviation (largest real root, eq. 126 of the paper)."""
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def beta_of(std: float, images_seen: int, images: int) -> float:
    """The weight of the old average after `images` more images, `images_seen` in total (eq. 127)."""
    return (1 - images / images_seen) ** (exponent_of(std) + 1)


def overlap(t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """Integral over the images of the product of two profiles, fp64, elementwise (derived; appendix C)."""
    first, last = np.minimum(t, other_t), np.maximum(t, other_t)
    # written as a ratio of times: their powers would overflow
    decay = (first / last) ** np.where(t < other_t, other_gamma, gamma)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * decay / last


def coefficients(t_K: np.ndarray, std_K: np.ndarray, t: float, std: float) -> tuple[np.ndarray, float]:
    """Least-squares weights of K averages for the average of width `std` at `t` images: (weights [K] with sum 1, error), fp64.

    t_K, std_K: images seen and relative width of the K averages. error: L2 distance of the two profiles, relative to the wanted one.
    """
    gamma_K = np.array([exponent_of(each) for each in std_K])
    wanted = np.array(t), np.array(exponent_of(std))
    gram_KK = overlap(t_K[:, None], gamma_K[:, None], t_K, gamma_K)
    wanted_K = overlap(t_K, gamma_K, *wanted)
    # lstsq takes the smallest norm when copies of a snapshot make the solution ambiguous
    x_K = np.linalg.lstsq(gram_KK, wanted_K)[0]
    x_K /= x_K.sum()
    square = 1 + (x_K @ gram_KK @ x_K - 2 * x_K @ wanted_K) / overlap(*wanted, *wanted)
    return x_K, max(float(square), 0.0) ** 0.5


class EMA:
    """average: name -> fp32 shard that this rank holds (train/engine/base.py). std: .01 to .25, relative to the images seen in this run."""

    def __init__(self, shards: dict[str, Tensor], std: float):
        self.std = std
        self.average = {name: shard.clone() for name, shard in shards.items()}

    @torch.no_grad()
    def update(self, shards: dict[str, Tensor], images_seen: int, images: int) -> None:
        share = 1 - beta_of(self.std, images_seen, images)
        torch._foreach_lerp_(list(self.average.values()), [shards[name] for name in self.average], share)


def averages_of(shards: dict[str, Tensor], settings: Train) -> dict[str, EMA]:
    """The averages of a run by their names in a checkpoint: `ema`, which becomes RUN/weights, and those kept for snapshots only."""
    stds = {"ema": settings.ema_std} if settings.ema_std else {}
    if settings.snapshot_every:
        stds |= {f"ema-{std:.3f}": std for std in settings.snapshot_stds if std != settings.ema_std}
    return {name: EMA(shards, std) for name, std in stds.items()}


def write_snapshot(
    run: Path, average: dict[str, Tensor], std: float, images_seen: int, beat: Callable[[], None] = ignore
) -> None:
    """Write RUN/snapshots/IMAGES-STD.safetensors: the average in fp16, and both numbers. A crash leaves no part of a file."""
    folder = run / "snapshots"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}): make room there, the same command goes on") from error
    tensors = {name: t.half() for name, t in average.items()}
    about = {"images_seen": str(images_seen), "std": str(std)}
    write_tensors(folder / f"{images_seen:012d}-{std:.3f}.safetensors", tensors, about, beat)


def rewind_snapshots(run: Path, images_seen: int) -> None:
    """Remove unfinished snapshots, and those newer than the checkpoint that training goes on from."""
    for path in (run / "snapshots").glob("*"):
        images = path.name.partition("-")[0]
        if images == ".tmp" or (images.isdigit() and int(images) > images_seen):
            path.unlink()


def reconstruct(run: Path, std: float) -> tuple[dict[str, Tensor], int]:
    """Reconstruct the average of width `std` at the newest snapshot from all snapshots of a run: (name -> fp32 tensor, images seen).

    Needs the memory of one network; leaves out buffers. Raises UserError when std is not in 0.01 .. 0.25, when snapshots are damaged or
    belong to several networks, and when they are too few, or their widths too far from std, for a good fit.
    """
    if not 0.01 <= std <= 0.25:
        raise UserError(f"std={std} is out of range: must be >= 0.01 and <= 0.25")
    folder = run / "snapshots"
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no snapshots: train with train.snapshot_every=IMAGES, or choose another run folder")
    numbers = []
    for path in paths:
        with _opened(path) as (_, *of_snapshot):
            numbers.append(of_snapshot)
    t_K, std_K = np.array(numbers, dtype=np.float64).T
    x_K, distance = coefficients(t_K, std_K, t_K.max(), std)
    if distance > FARTHEST:
        theirs = ", ".join(str(each) for each in sorted(set(std_K.tolist())))
        raise UserError(
            f"from the {len(paths)} snapshot(s) in {folder} the profile of std={std} would be {distance:.0%} off: choose a std nearer to "
            f"theirs ({theirs}), or train with a smaller train.snapshot_every"
        )
    average: dict[str, Tensor] = {}
    for path, x in zip(paths, x_K.tolist(), strict=True):
        with _opened(path) as (snapshot, _, _):
            shapes = {name: snapshot.get_slice(name).get_shape() for name in snapshot.keys()}  # noqa: SIM118 (no mapping)
            average = average or {name: torch.zeros(shape) for name, shape in shapes.items()}
            if shapes != {name: list(total.shape) for name, total in average.items()}:
                raise UserError(f"{path} is of another network than {paths[0]}: keep the snapshots of one run there")
            for name, total in average.items():
                total.add_(snapshot.get_tensor(name), alpha=x)
    return average, int(t_K.max())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int, float]]:
    """(snapshot, whose tensors are read one by one; images seen; relative width). Raises UserError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as snapshot:
            about = snapshot.metadata()
            yield snapshot, int(about["images_seen"]), float(about["std"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"snapshot {path} is damaged ({error}): remove it, the others are enough") from error
