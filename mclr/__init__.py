"""MCLR: fine-tune class-conditional image generators so that they need no guidance. PYTHON.md beside this file shows how.

The names are looked up when they are first used: `import mclr` costs no more than torch. Only load and Model reach into train/.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mclr import metrics
    from mclr.adapters import PlainSequence, from_denoiser, from_logits
    from mclr.diffusion import Diffusion
    from mclr.errors import UserError
    from mclr.forms import DDPM, EDM, Flow
    from mclr.guidance import Guidance
    from mclr.likelihood import Draws, Guide, score
    from mclr.loss import Loss, project
    from mclr.next_scale import NextScale
    from mclr.objective import Objective
    from mclr.schedule import Schedule
    from mclr.train.sampling.generate import Model, load

__version__ = "0.1.0"
__all__ = [
    "DDPM",
    "EDM",
    "Diffusion",
    "Draws",
    "Flow",
    "Guidance",
    "Guide",
    "Loss",
    "Model",
    "NextScale",
    "Objective",
    "PlainSequence",
]
__all__ += ["Schedule", "UserError", "from_denoiser", "from_logits", "load", "metrics", "project", "score"]
# what the block above says, for Python itself
PLACES = {
    "adapters": ("PlainSequence", "from_denoiser", "from_logits"),
    "diffusion": ("Diffusion",),
    "errors": ("UserError",),
    "forms": ("DDPM", "EDM", "Flow"),
    "guidance": ("Guidance",),
    "likelihood": ("Draws", "Guide", "score"),
    "loss": ("Loss", "project"),
    "next_scale": ("NextScale",),
    "objective": ("Objective",),
    "schedule": ("Schedule",),
    "train.sampling.generate": ("Model", "load"),
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("mclr.metrics")
    for place, names in PLACES.items():
        if name in names:
            return getattr(import_module(f"mclr.{place}"), name)
    raise AttributeError(f"module mclr has no attribute {name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
