"""Data sheets of GPUs, for plans (train/planning/plan.py) and for the utilisation in the log."""

import re
from dataclasses import dataclass

import torch

NODE = 8  # GPUs that share one machine
# words in the name of a device that is only a part of this GPU, or another GPU
LESSER = {"MIG", "LAPTOP", "D"}


@dataclass(frozen=True)
class GPU:
    """One GPU. words: all occur in torch.cuda.get_device_name. memory: GiB that torch sees. bf16, fp32: dense FLOP/s (bf16 accumulates
    in fp32; fp32 without TF32). link: bytes per second to the other GPUs of the machine, in each direction (NVLink, else PCIe x16)."""

    words: tuple[str, ...]
    memory: float
    bf16: float
    fp32: float
    link: float

    def peak(self, precision: str) -> float:
        return {"bf16": self.bf16, "fp32": self.fp32}[precision]


# from NVIDIA's data sheets, without sparsity; they give links for both directions together, here is half
GPUS = {
    "b200": GPU(("B200",), 178, 2250e12, 75e12, 900e9),
    "h200-nvl": GPU(("H200", "NVL"), 139, 836e12, 60e12, 64e9),
    "h200": GPU(("H200",), 139, 989e12, 67e12, 450e9),
    "h100-nvl": GPU(("H100", "NVL"), 93, 836e12, 60e12, 64e9),
    "h100-pcie": GPU(("H100", "PCIE"), 79, 756e12, 51e12, 64e9),
    "h100": GPU(("H100", "HBM3"), 79, 989e12, 67e12, 450e9),
    "a100-80-pcie": GPU(("A100", "80GB", "PCIE"), 79, 312e12, 19.5e12, 32e9),
    "a100-80": GPU(("A100", "80GB"), 79, 312e12, 19.5e12, 300e9),
    "a100-40-pcie": GPU(("A100", "40GB", "PCIE"), 39, 312e12, 19.5e12, 32e9),
    "a100-40": GPU(("A100", "40GB"), 39, 312e12, 19.5e12, 300e9),
    "l40s": GPU(("L40S",), 44, 362e12, 91.6e12, 32e9),
    "rtx-6000-ada": GPU(("6000", "ADA"), 47, 364e12, 91.1e12, 32e9),
    "rtx-4090": GPU(("4090",), 23.5, 165e12, 82.6e12, 32e9),
}


def gpu_named(device_name: str) -> str | None:
    """The key in GPUS for a name from torch.cuda.get_device_name; None when it is not there."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & LESSER:
        return None
    # entries with more words come first in the table
    return next((key for key, gpu in GPUS.items() if words.issuperset(gpu.words)), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of this device in fp32 or bf16; None on a CPU, and for a GPU that is not in the table."""
    name = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if name is None else GPUS[name].peak(precision)
