"""Published state dicts into our networks and back: names are translated, and every entry is checked."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from mclr.models.options import SCALES_256, SCALES_512

SCALES = (SCALES_256, SCALES_512, (1, 2, 3, 4))  # known scales: a file shows only the number of tokens or of scales
NAMED = 3  # differences that an error names


def misfits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ignore: tuple[str, ...] = ()) -> str:
    """How the names and shapes of a state dict differ from those of a network, the first few in words; empty where they fit.

    ignore: endings of names that may be there in excess.
    """
    misshaped = [
        f"{name} is {list(theirs[name].shape)} instead of {list(ours[name].shape)}"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    missing = [f"{name} is missing" for name in ours if name not in theirs]
    unexpected = [f"{name} is unexpected" for name in theirs if name not in ours and not name.endswith(ignore)]
    # in turns, so that the few that are named show every kind
    faults = [fault for group in zip_longest(misshaped, missing, unexpected) for fault in group if fault]
    more = [f"and {len(faults) - NAMED} more entries"] if len(faults) > NAMED else []
    return ", ".join(faults[:NAMED] + more)


@dataclass(frozen=True)
class Published:
    """How a kind of network is published. mark: an entry that no other kind has. infer: shapes -> the options that they show.

    renames: (pattern in our names, what is published for it), applied in this order. ignored: endings of entries that we do not keep.
    constants: options -> the entries among those that published code expects.
    """

    mark: str
    infer: Callable[["Shapes"], Any]
    renames: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    constants: Callable[[Any], dict[str, Tensor]] = lambda config: {}

    def name_of(self, name: str) -> str:
        """Our parameter or buffer name -> its name in published state dicts; shapes are equal."""
        for ours, published in self.renames:
            name = re.sub(ours, published, name)
        return name

    def entries(self, net: nn.Module) -> dict[str, Tensor]:
        """The network's parameters and buffers under their published names, in its order: detached, in the network's memory."""
        return {self.name_of(name): tensor for name, tensor in net.state_dict().items()}


class Shapes(dict[str, tuple[int, ...]]):
    """Entry name -> shape of a state dict; a missing name is a LookupError that says so."""

    @staticmethod
    def of(entries: Mapping[str, Any]) -> "Shapes":
        return Shapes({name: tuple(t.shape) for name, t in entries.items()})

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise LookupError(f"{name} is missing")

    def numbers(self, names: str) -> list[int]:
        """The different numbers at the first # of entries that are named like this, rising; # stands for any number."""
        pattern = re.escape(names).replace(r"\#", r"(\d+)")
        found = sorted({int(match[1]) for name in self if (match := re.fullmatch(pattern, name))})
        if not found:
            raise LookupError(f"entries like {names} are missing")
        return found

    def count(self, names: str, times: int = 0) -> int:
        """How many numbers() finds. times: blocks of the network for each; LookupError where there are too few entries for so many."""
        found = len(self.numbers(names))
        # a block and its counterpart in a decoder have more entries; a few names must not build a network of any depth
        if 8 * times * found > len(self):
            raise LookupError(f"{times * found} blocks in {len(self)} entries, some are missing")
        return found
