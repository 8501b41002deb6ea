"""A dataset folder, checked, and the stream of training samples: which sample sits at which global position.

A dataset folder holds dataset.json and the shards of two splits, train/*.tar and val/*.tar (see train/prepare.py).
B samples of a batch; N of a split; C H W image.
"""

import hashlib
import io
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mclr.errors import UserError
from train.shards import Shard, load_index, read_image

# Decoded splits below this many bytes stay in memory, so that small runs read each image once.
KEPT_BYTES = 256 * 2**20
READERS = 4
TOKENS = "tokens.npy"


@dataclass(frozen=True)
class Split:
    count: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says. resolution in pixels; source: where the images come from; seed: of the split into train and val.

    drawn: how the images were drawn, where a network made them (train/prepare.py, prepare_samples); tokens: checksum of TOKENS, which
    holds the tokens of the train split in shard order, where they were drawn.
    """

    path: Path
    name: str
    resolution: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    source: str
    seed: int
    drawn: dict[str, Any] | None = None
    tokens: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.resolution, self.resolution


@dataclass(frozen=True)
class Batch:
    """image_BCHW uint8, c_B int64; tokens_BL int64: of drawn samples of a token model, what was drawn."""

    image_BCHW: Tensor
    c_B: Tensor
    tokens_BL: Tensor | None = None


def open_dataset(path: str | Path) -> DatasetInfo:
    """Read dataset.json and check it against the shards on disk (existence, sizes, counts).

    Raises UserError naming the file at fault and what to do.
    """
    path = Path(path)
    file = path / "dataset.json"
    try:
        if not path.is_dir():
            raise UserError(f"no dataset folder at {path}: make one with `mclr prepare`")
        if not file.is_file():
            raise UserError(f"{path} holds no dataset.json, so it is no dataset folder: make one with `mclr prepare`")
        info = _parse(path, json.loads(file.read_bytes()))
        for shard in [shard for split in info.splits.values() for shard in split.shards]:
            tar = path / shard.file
            if not tar.is_file():
                raise UserError(f"{tar} is missing: copy it here, or remove the dataset and prepare it again")
            if (size := tar.stat().st_size) != shard.bytes:
                differs = f"has {size} bytes, but dataset.json says {shard.bytes}"
                raise UserError(f"{tar} {differs}: copy it again, or remove the dataset and prepare it again")
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): make it readable") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): remove the dataset and prepare it again"
        ) from error
    return info


def _parse(path: Path, record: dict) -> DatasetInfo:
    """DatasetInfo of a parsed dataset.json; raises ValueError, TypeError, KeyError or AttributeError where it is malformed."""
    splits = {
        name: Split(count=split["count"], shards=tuple(Shard(**shard) for shard in split["shards"]))
        for name, split in record["splits"].items()
    }
    info = DatasetInfo(
        path=path,
        splits=splits,
        class_names=tuple(record["class_names"]),
        drawn=record.get("drawn"),
        tokens=record.get("tokens"),
        **{name: record[name] for name in ("name", "resolution", "channels", "num_classes", "source", "seed")},
    )
    if {"train", "val"} - splits.keys():
        raise ValueError("splits must be train and val")
    for name, split in splits.items():
        counts = sum(shard.count for shard in split.shards)
        if counts != split.count:
            raise ValueError(f"split {name} counts {split.count} samples, its shards {counts}")
    if info.channels not in (1, 3) or info.resolution < 1:
        raise ValueError(f"channels {info.channels}, resolution {info.resolution}")
    if len(info.class_names) != info.num_classes:
        raise ValueError(f"num_classes is {info.num_classes}, class_names are {len(info.class_names)}")
    return info


class SplitReader:
    """The samples of one split in shard order: c_N int64 is known at once, images are read when asked for."""

    def __init__(self, info: DatasetInfo, split: str):
        """Raises UserError for an unknown or empty split, a damaged shard, or a condition out of range."""
        if split not in info.splits:
            raise UserError(f"{info.path} has no split {split}: it has {', '.join(info.splits)}")
        if info.splits[split].count == 0:
            raise UserError(f"split {split} of {info.path} is empty: prepare the dataset with a larger share for it")
        index = load_index(info.path, [shard for each in info.splits.values() for shard in each.shards])
        self.info = info
        self.samples = [sample for shard in info.splits[split].shards for sample in index[shard.file]]
        for file, key, _, _, c in self.samples:
            if not 0 <= c < info.num_classes:
                raise UserError(f"{info.path / file}: sample {key} has condition {c}, outside of 0..{info.num_classes - 1}")
        self.c_N = torch.tensor([sample.c for sample in self.samples], dtype=torch.int64)
        self.keep = len(self.samples) * math.prod(info.image_shape) < KEPT_BYTES
        self.kept: dict[int, np.ndarray] = {}
        self.readers = ThreadPoolExecutor(READERS)
        self.coming: dict[int, Future[np.ndarray]] = {}

    def read_ahead(self, indices: list[int]) -> None:
        """Start reading these samples in the background; `images` then finds them."""
        for i in indices:
            if i not in self.kept and i not in self.coming:
                self.coming[i] = self.readers.submit(self._read, i)

    def images(self, indices: list[int]) -> Tensor:
        """image_BCHW uint8 of these samples; UserError naming shard and key where one is damaged."""
        self.read_ahead(indices)
        read = {i: self.kept[i] if i in self.kept else self.coming.pop(i).result() for i in dict.fromkeys(indices)}
        if self.keep:
            self.kept.update(read)
        return torch.from_numpy(np.stack([read[i] for i in indices]))

    def _read(self, i: int) -> np.ndarray:
        return read_image(self.info.path, self.samples[i], self.info.image_shape)


def read_tokens(info: DatasetInfo) -> Tensor:
    """The drawn tokens [N, L] int64 of the train split. Raises UserError when the file is not the one that dataset.json records."""
    file = info.path / TOKENS
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != info.tokens:
            raise ValueError("its checksum differs")
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.int64))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not what was drawn ({error}): remove the dataset and draw it again") from error


def load_split(path: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """(image_NCHW uint8, c_N int64) of a whole split, in shard order."""
    reader = SplitReader(open_dataset(path), split)
    return reader.images(list(range(len(reader.samples)))), reader.c_N


class Source:
    """An endless stream of training samples in which a sample's place depends on the seed alone.

    Position p is in epoch p // N and holds sample permutation(seed, p // N, N)[p % N]: every epoch shows each sample once, batches
    run across epochs, and neither the number of ranks nor a resume changes what sits where. So there is no state to save.
    """

    def __init__(self, path: str | Path, split: str, seed: int):
        """Raises UserError as open_dataset and SplitReader do."""
        self.info = open_dataset(path)
        self.reader = SplitReader(self.info, split)
        self.seed = seed
        self.tokens_NL = read_tokens(self.info) if split == "train" and self.info.tokens else None

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return len(self.reader.samples)

    def batch(self, first: int, count: int) -> Batch:
        """The samples at global positions first .. first + count - 1."""
        indices = self._indices(range(first, first + count))
        tokens_BL = None if self.tokens_NL is None else self.tokens_NL[indices]
        return Batch(self.reader.images(indices), self.reader.c_N[indices], tokens_BL)

    def prefetch(self, positions: range) -> None:
        """Start reading the samples at these global positions in the background, so that their batches need not wait."""
        self.reader.read_ahead(self._indices(positions))

    def _indices(self, positions: range) -> list[int]:
        return [int(permutation(self.seed, p // len(self), len(self))[p % len(self)]) for p in positions]


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A random order of 0 .. count-1 from (seed, epoch), read-only int64.

    Sorting raw Philox output rather than calling numpy's shuffle: bit generators are stable across numpy releases, shuffles are
    not, and a resumed run may meet a newer numpy. The counter starts beyond those of mclr.likelihood.Draws, which shares the keys.
    """
    order = np.argsort(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order
