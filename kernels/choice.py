"""Which operations run as Triton kernels. `auto`: those that won a measurement on this family of GPU; `torch`: none; `triton`: all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

MODES = ("auto", "torch", "triton")
RESULTS = Path(__file__).parent / "RESULTS.json"
# GPU family -> operations. Read once, at import: torch.compile cannot trace the reading of a file
WINNERS: dict[str, list[str]] = json.loads(RESULTS.read_text())["winners"]
_mode = "auto"


def use(mode: str) -> None:
    """Set the mode of the whole process. Raises ValueError if `mode` is not one of MODES."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"kernels: {mode!r} is not one of {', '.join(MODES)}")
    _mode = mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """use(mode) within a `with`; the mode before it comes back."""
    before = _mode
    use(mode)
    try:
        yield
    finally:
        use(before)


def family(device: torch.device) -> str:
    """The family of a GPU: its compute capability, as sm_90; cpu for a CPU. A measurement holds for a family."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU. TRITON_INTERPRET=1 must be set before the first import of kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(op: str, like: Tensor) -> bool:
    """Whether this operation runs as a Triton kernel on the device of `like`."""
    return _mode == "triton" or (_mode == "auto" and op in WINNERS.get(family(like.device), ()))
