"""A dataset folder, checked, and the stream of training samples: which sample sits at which global position.

A dataset folder holds dataset.json and the shards of two splits, train/*.tar and val/*.tar (see train/prepare.py).
B samples of a batch; N of a split; C H W image.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from mclr.errors import UserError
from mclr.train.data.dataset import SplitReader, open_dataset, read_tokens

# what a permutation orders, beside all samples (0): the conditions of a round; the samples of condition c (WITHIN + c)
ROUND, WITHIN = 1, 2


@dataclass(frozen=True)
class Batch:
    """image_BCHW uint8, c_B int64; tokens_BL int64: of drawn samples of a token model, what was drawn."""

    image_BCHW: Tensor
    c_B: Tensor
    tokens_BL: Tensor | None = None


class Source:
    """An endless stream of training samples in which a sample's place depends on the seed alone.

    Position p is in epoch p // N and holds sample permutation(seed, p // N, N)[p % N]: every epoch shows each sample once, batches
    run across epochs, and neither the number of ranks nor a resume changes what sits where. So there is no state to save.

    Balanced, position p is in round p // K of the K conditions, which visits each once: condition permutation(seed, p // K, K)[p % K],
    for the (p // K)-th time, and its samples come in an order of their own, anew once all of them were shown.
    """

    def __init__(self, path: str | Path, split: str, seed: int, balanced: bool = False, tolerated: float = 0.0):
        """balanced: every condition equally often, else every sample; tolerated: as for SplitReader.

        Raises UserError as open_dataset and SplitReader do, and where a condition to be balanced has no samples.
        """
        self.info = open_dataset(path)
        self.reader = SplitReader(self.info, split, tolerated)
        self.seed = seed
        self.balanced = balanced
        self.orders: dict[int, tuple[int, np.ndarray]] = {}
        empty = [name for name, alike in zip(self.info.class_names, self.reader.of_condition, strict=True) if not len(alike)]
        if balanced and empty:
            raise UserError(
                f"split {split} of {path} has no samples of {len(empty)} classes, like {empty[0]}: set data.balanced=false, or prepare "
                "the dataset without them"
            )
        self.tokens_NL = read_tokens(self.info) if split == "train" and self.info.tokens else None

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return len(self.reader.samples)

    @property
    def damaged(self) -> int:
        """Samples that this process has found damaged and passed over."""
        return len(self.reader.damaged)

    def batch(self, first: int, count: int) -> Batch:
        """The samples at global positions first .. first + count - 1."""
        indices = self._indices(range(first, first + count))
        image_BCHW = self.reader.images(indices)
        # found damaged by now
        standing = [self.reader.standing(i) for i in indices]
        return Batch(image_BCHW, self.reader.c_N[standing], None if self.tokens_NL is None else self.tokens_NL[standing])

    def keys(self, first: int, count: int) -> list[str]:
        """SHARD:KEY of each sample at these global positions, which were read before."""
        samples = [self.reader.samples[self.reader.standing(i)] for i in self._indices(range(first, first + count))]
        return [f"{sample.file}:{sample.key}" for sample in samples]

    def prefetch(self, positions: range) -> None:
        """Start reading the samples at these global positions in the background, so that their batches need not wait."""
        self.reader.read_ahead(self._indices(positions))

    def close(self) -> None:
        """End what reads in the background. Nothing here: what was asked for ahead ends by itself."""

    def _indices(self, positions: range) -> list[int]:
        return [self._balanced(p) if self.balanced else self._any(p) for p in positions]

    def _any(self, p: int) -> int:
        epoch, place = divmod(p, len(self))
        return int(permutation(self.seed, epoch, len(self))[place])

    def _balanced(self, p: int) -> int:
        visit, place = divmod(p, self.info.num_classes)
        c = int(permutation(self.seed, visit, self.info.num_classes, ROUND)[place])
        alike = self.reader.of_condition[c]
        epoch, place = divmod(visit, len(alike))
        # the order of one epoch per condition: together as long as the split
        if c not in self.orders or self.orders[c][0] != epoch:
            self.orders[c] = epoch, permutation(self.seed, epoch, len(alike), WITHIN + c)
        return int(alike[self.orders[c][1][place]])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int, what: int = 0) -> np.ndarray:
    """A random order of 0 .. count-1 from (seed, epoch, what), read-only int64. what: 0 samples of a split, ROUND, or WITHIN + c.

    Sorting raw Philox output rather than calling numpy's shuffle: bit generators are stable across numpy releases, shuffles are
    not, and a resumed run may meet a newer numpy. The counter starts beyond those of mclr.likelihood.Draws, which shares the keys.
    """
    order = np.argsort(np.random.Philox(key=[seed, epoch], counter=[0, 0, what, 1]).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order
