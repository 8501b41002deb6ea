"""The throughput: what the machine did since the last line of metrics. Its figures decide nothing, and no two runs have the same."""

import resource
import sys
from typing import Any

import torch
import torch.distributed as dist

from mclr.train.system.ranks import world

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


class Throughput:
    """done: RunState as a dict. peak: FLOP/s of one device (train/system/gpus.py); None: not known, so there is no mfu."""

    def __init__(self, done: dict[str, Any], peak: float | None, device: torch.device):
        self.before, self.peak, self.device = dict(done), peak, device

    def read(self, done: dict[str, Any], waited: float, damaged: int) -> dict[str, float]:
        """Since the last call: images and rows with gradient per second; mfu, the share of all devices' FLOP/s that was used;
        memory, the most GiB of a rank; data_wait, the largest share of the time that a rank waited for data. Collective.

        waited: seconds so, of this rank. damaged: samples that this rank has passed over since it started; summed over the ranks.
        """
        past = {name: done[name] - self.before[name] for name in ("images", "rows", "flops", "seconds")}
        self.before = dict(done)
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
