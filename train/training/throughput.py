"""Throughput: what the machine did since the last line of metrics. These figures decide nothing, and no two runs have the same."""

import resource
import sys
from typing import Any

import torch
import torch.distributed as dist

from mclr.train.system.ranks import world

# columns of metrics.jsonl that differ between a run and its repetition
TIMING = ("seconds", "images_per_second", "rows_per_second", "mfu", "memory", "data_wait", "damaged")


def peak_memory(device: torch.device) -> int:
    """On a GPU, the most bytes that tensors held at a time since the last call. On a CPU, the most that the process ever held."""
    if device.type != "cuda":
        # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Throughput:
    """peak: FLOP/s of one device (train/system/gpus.py); None where it is not known: then there is no mfu."""

    def __init__(self, peak: float | None, device: torch.device):
        self.peak, self.device = peak, device
        self.before: dict[str, Any] = {}

    def start(self, done: dict[str, Any]) -> None:
        """Count from here. done: the RunState as a dict."""
        self.before = dict(done)

    def read(self, done: dict[str, Any], waited: float, damaged: int) -> dict[str, float]:
        """Figures since the last call. Collective.

        images_per_second, rows_per_second (rows with gradient). mfu: share of all devices' FLOP/s that was used. memory: GiB of the
        fullest rank. data_wait: largest share of the time that a rank waited for data. damaged: samples passed over since the start.

        done: the RunState as a dict. waited, damaged: seconds and samples of this rank.
        """
        past = {name: done[name] - self.before[name] for name in ("images", "rows", "flops", "seconds")}
        self.start(done)
        worst = torch.tensor([waited, peak_memory(self.device)], dtype=torch.float64, device=self.device)
        total = torch.tensor(damaged, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            dist.all_reduce(total)
        longest, memory = worst.tolist()
        found = {f"{name}_per_second": past[name] / past["seconds"] for name in ("images", "rows")}
        if self.peak is not None:
            found["mfu"] = past["flops"] / (past["seconds"] * world()[2] * self.peak)
        found |= {"memory": memory / 2**30, "data_wait": longest / past["seconds"]}
        return {name: float(f"{value:.4g}") for name, value in found.items()} | {"damaged": int(total)}
