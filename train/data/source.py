"""The endless stream of training samples: which sample stands at which global position."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from mclr.errors import UserError
from mclr.train.data.dataset import Batch, SplitReader, open_dataset, read_tokens

# what a permutation orders: 0 all samples of a split, ROUND the conditions of a round, WITHIN + c the samples of condition c
ROUND, WITHIN = 1, 2


class Source:
    """An endless stream of training samples. The order depends on the seed alone: not on the number of ranks, nor on a resume.

    Position p is in epoch p // N and holds sample permutation(seed, p // N, N)[p % N]. Every epoch shows each sample once. Batches run
    across epochs. If balanced, position p is in round p // K of the K conditions. Every round visits each condition once, in the order
    permutation(seed, p // K, K, ROUND). A condition shows all its samples in a random order, then again in another one.
    """

    def __init__(self, split: SplitReader, seed: int, balanced: bool = False):
        """balanced: show every condition equally often, not every sample. Raises UserError where a condition then has no samples."""
        self.split, self.info, self.seed, self.balanced = split, split.info, seed, balanced
        self.coming = split.coming  # what is read ahead
        self.of_round: dict[int, tuple[int, np.ndarray]] = {}
        empty = [name for name, alike in zip(split.info.class_names, split.of_condition, strict=True) if not len(alike)]
        if balanced and empty:
            says = f"{self.info.path} has no samples of {len(empty)} classes in split {split.split}, like {empty[0]}"
            raise UserError(f"{says}: set data.balanced=false, or prepare the dataset without them")

    def indices(self, positions: range) -> list[int]:
        """The samples at these global positions."""
        count = len(self.split.samples)
        if self.balanced:
            return [self._balanced(p) for p in positions]
        return [int(permutation(self.seed, p // count, count)[p % count]) for p in positions]

    def _balanced(self, p: int) -> int:
        visit, place = divmod(p, self.info.num_classes)
        c = int(permutation(self.seed, visit, self.info.num_classes, ROUND)[place])
        alike = self.split.of_condition[c]
        epoch, place = divmod(visit, len(alike))
        # one order is kept for each condition: together they are as long as the split
        if c not in self.of_round or self.of_round[c][0] != epoch:
            self.of_round[c] = epoch, permutation(self.seed, epoch, len(alike), WITHIN + c)
        return int(alike[self.of_round[c][1][place]])

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return len(self.split.samples)

    @property
    def damaged(self) -> int:
        """Samples that this process has found damaged and passed over."""
        return len(self.split.damaged)

    def batch(self, first: int, count: int) -> Batch:
        """The samples at global positions first .. first + count - 1."""
        return self.split.batch(self.indices(range(first, first + count)))

    def keys(self, first: int, count: int) -> list[str]:
        """SHARD:KEY of the samples that these global positions gave."""
        samples = [self.split.samples[self.split.substitute(i)] for i in self.indices(range(first, first + count))]
        return [f"{sample.file}:{sample.key}" for sample in samples]

    def prefetch(self, positions: range) -> None:
        """Start reading the samples at these global positions in the background."""
        self.split.read_ahead(self.indices(positions))

    def close(self) -> None:
        """End what reads in the background. Here each read ends by itself."""


def open_images(
    path: str | Path, split: str, seed: int, balanced: bool = False, tolerated: float = 0.0, tokenizer: str | None = None
) -> Source:
    """The images of a split of the dataset folder at `path`.

    tokenizer: checksum of the run's tokenizer. Batches hold the drawn tokens where the images were drawn with the same tokenizer.
    Raises UserError as open_dataset, SplitReader and Source do.
    """
    info = open_dataset(path)
    drawn = tokenizer is not None and info.tokens is not None and (info.drawn or {}).get("tokenizer") == tokenizer
    reader = SplitReader(info, split, tolerated, read_tokens(info) if drawn and split == "train" else None)
    return Source(reader, seed, balanced)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int, what: int = 0) -> np.ndarray:
    """A random order of 0 .. count-1 from (seed, epoch, what), read-only int64. what: 0, ROUND or WITHIN + c.

    Raw Philox numbers are sorted: numpy keeps its bit generators stable across releases, but not its shuffle, and a resumed run may meet
    a newer numpy. mclr.likelihood.Draws uses the same keys, so the counter starts beyond its counters.
    """
    order = np.argsort(np.random.Philox(key=[seed, epoch], counter=[0, 0, what, 1]).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order
