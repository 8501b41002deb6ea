"""A dataset folder, checked, and the samples of its splits in shard order."""

import hashlib
import io
import math
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mclr.configs.schema import DATASET, DatasetInfo, is_stream, read_dataset
from mclr.errors import UserError
from mclr.train.data.shards import Damaged, load_index, read_image

# Decoded splits below this many bytes stay in memory, so that small runs read each image once.
KEPT_BYTES = 256 * 2**20
READERS = 4
TOKENS = "tokens.npy"


@dataclass(frozen=True)
class Batch:
    """Samples: image_BCHW uint8, conditions c_B int64. tokens_BL int64: where a token model drew the images, their tokens.

    stored_BV, fp32 or int64: where a cache is read, what the encoder stores of each view of the image; then image_BCHW is empty.
    """

    image_BCHW: Tensor
    c_B: Tensor
    tokens_BL: Tensor | None = None
    stored_BV: Tensor | None = None


def open_dataset(path: str | Path) -> DatasetInfo:
    """A dataset folder, with all its shards. Raises UserError that names the file at fault and says what to do."""
    if is_stream(str(path)):
        raise UserError(f"{path} is a stream: this needs a dataset folder (`mclr evaluate`: name one by --reference)")
    info = read_dataset(Path(path))
    for shard in info.shards:
        tar = info.path / shard.file
        size = os.path.getsize(tar) if os.path.isfile(tar) else None
        if size != shard.bytes:
            differs = "is missing" if size is None else f"has {size} bytes, but {DATASET} says {shard.bytes}"
            raise UserError(f"{tar} {differs}: copy it again, or remove the dataset and prepare it again")
    return info


class SplitReader:
    """Reads the samples of one split, numbered in shard order. Conditions (c_N int64) are read at once, images when they are asked for.

    A damaged sample is replaced by its substitute: the next readable one of its condition in shard order; after the last comes the
    first. So the substitute is the same on every rank and after every resume.
    """

    def __init__(self, info: DatasetInfo, split: str, tolerated: float = 0.0, tokens_NL: Tensor | None = None):
        """tolerated: the largest share of the split that may be damaged; 0: none. tokens_NL: of the images, for the batches.

        Raises UserError for an empty split, a damaged shard, or a condition out of range.
        """
        if info.splits[split].count == 0:
            how = "prepare the images again" + " with a larger --val-share" * (split == "val")
            raise UserError(f"{info.path} has no images in its {split} split: {how}")
        index = load_index(info.path, info.shards)
        self.info, self.split, self.tolerated, self.tokens_NL = info, split, tolerated, tokens_NL
        self.samples = np.concatenate([index[shard.file] for shard in info.splits[split].shards]).view(np.recarray)
        for odd in self.samples[(self.samples.c < 0) | (self.samples.c >= info.num_classes)][:1]:
            where = f"{info.path / odd.file}: sample {odd.key}"
            raise UserError(f"{where} has condition {odd.c}, outside of 0..{info.num_classes - 1}")
        self.c_N = torch.from_numpy(self.samples.c.copy())
        ends = torch.bincount(self.c_N, minlength=info.num_classes).cumsum(0).numpy()
        self.of_condition = np.split(np.argsort(self.c_N.numpy(), kind="stable"), ends[:-1])
        self.keep = len(self.samples) * math.prod(info.image_shape) < KEPT_BYTES
        self.readers = ThreadPoolExecutor(READERS)
        self.coming: dict[int, Future[np.ndarray]] = {}
        self.damaged: set[int] = set()

    def read_ahead(self, indices: list[int]) -> None:
        """Start reading these samples in the background; `images` then finds them."""
        for i in indices:
            if not (i in self.coming or i in self.damaged):
                self.coming[i] = self.readers.submit(read_image, self.info.path, self.samples[i], self.info.image_shape)

    def batch(self, indices: list[int]) -> Batch:
        """These samples, or their substitutes."""
        image_BCHW = self.images(indices)
        # after the images, whose damage is known now
        used = [self.substitute(i) for i in indices]
        return Batch(image_BCHW, self.c_N[used], None if self.tokens_NL is None else self.tokens_NL[used])

    def images(self, indices: list[int]) -> Tensor:
        """image_BCHW uint8 of these samples, or their substitutes. Raises UserError where more are damaged than is tolerated.

        Damage is counted here, in the order of `indices`: what was read ahead does not change the count.
        """
        self.read_ahead(indices)
        read = {i: self._image(i) for i in dict.fromkeys(indices)}
        return torch.from_numpy(np.stack([read[i] for i in indices]))

    def substitute(self, i: int) -> int:
        """The sample that stands for sample i: i itself unless it is known to be damaged. Raises UserError where there is none."""
        if i not in self.damaged:
            return i
        alike = self.of_condition[self.samples[i].c]
        for j in np.roll(alike, -np.searchsorted(alike, i)).tolist():
            if j not in self.damaged:
                return j
        where = f"condition {self.samples[i].c} in split {self.split}"
        raise UserError(f"{self.info.path}: all {len(alike)} samples of {where} are damaged: prepare the dataset again")

    def _image(self, i: int) -> np.ndarray:
        while True:
            i = self.substitute(i)
            self.read_ahead([i])
            coming = self.coming[i] if self.keep else self.coming.pop(i)
            try:
                return coming.result()
            except Damaged as error:
                if not self.tolerated:
                    raise
                self.coming.pop(i, None)
                self.damaged.add(i)
                tqdm.write(f"passed over: {error}", file=sys.stderr)
                found, count = len(self.damaged), len(self.samples)
                # one damaged sample is always tolerated: of few samples it is a large share
                if found > max(1, self.tolerated * count):
                    what = (
                        f"{found} of {count} samples in split {self.split} of {self.info.path} are damaged, {found / count:.2%}"
                    )
                    raise UserError(f"{what}, more than data.damaged={self.tolerated:g}; {error}") from error


def read_tokens(info: DatasetInfo) -> Tensor:
    """Tokens [N, L] int64 of the train split, as they were drawn. Raises UserError where the file is not the one in dataset.json."""
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
