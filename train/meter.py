"""The meter: what the machine did since the last line of metrics. Its figures decide nothing, and no two runs have the same."""

import resource
import sys
from typing import Any

import torch

from train.ranks import world

# columns of metrics.jsonl that differ between a run and its repetition, or between one that was stopped and one that was not
TIMING = ("seconds", "images_per_second", "rows_per_second", "mfu", "memory", "data_wait", "damaged")


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors on this GPU held at a time since the last call; on a CPU, that the process ever held."""
    if device.type != "cuda":
        # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Meter:
    """At every step each rank gives its share() to the sums of all ranks, and the sums go to step(); rank 0 reads at a line.

    done: Progress as a dict. peak: FLOP/s of one device (train/gpus.py); None: not known, so there is no mfu.
    """

    def __init__(self, done: dict[str, Any], peak: float | None, device: torch.device):
        self.rank, _, self.ranks = world()
        self.peak, self.device = peak, device
        self._begin(done)

    def _begin(self, done: dict[str, Any]) -> None:
        self.before = dict(done)
        self.memory, self.waited, self.damaged = 0.0, [0.0] * self.ranks, 0

    def share(self, waited: float, damaged: int) -> dict[str, float]:
        """This rank's part of a step's sums. waited: seconds, for data; damaged: samples that it has passed over since it started.

        What is no sum is under a name for each rank, to which the others add 0: so step() finds the largest.
        """
        mine = {"waited": waited, "memory": float(peak_memory(self.device))}
        parts = {f"{name}/{rank}": mine[name] if rank == self.rank else 0.0 for name in mine for rank in range(self.ranks)}
        return parts | {"damaged": damaged}

    def step(self, sums: dict[str, float]) -> None:
        for rank in range(self.ranks):
            self.waited[rank] += sums[f"waited/{rank}"]
            self.memory = max(self.memory, sums[f"memory/{rank}"])
        self.damaged = int(sums["damaged"])

    def read(self, done: dict[str, Any]) -> dict[str, float]:
        """Since the last call: images and rows with gradient per second; mfu, the share of all devices' FLOP/s that was used;
        memory, the most GiB of a rank; data_wait, the largest share of the time that a rank waited for data. damaged: since the start,
        as every rank found them."""
        past = {name: done[name] - self.before[name] for name in ("images", "rows", "flops", "seconds")}
        found = {f"{name}_per_second": past[name] / past["seconds"] for name in ("images", "rows")}
        if self.peak is not None:
            found["mfu"] = past["flops"] / (past["seconds"] * self.ranks * self.peak)
        found |= {"memory": self.memory / 2**30, "data_wait": max(self.waited) / past["seconds"]}
        rounded: dict[str, float] = {name: float(f"{value:.4g}") for name, value in found.items()}
        rounded["damaged"] = self.damaged
        self._begin(done)
        return rounded
