"""MCLR: fine-tune class-conditional image generators so that they need no guidance. README.md beside this file shows how.

The names are looked up when they are first used: `import mclr` costs no more than torch. Only load and Model reach into train/.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mclr import metrics as metrics
    from mclr.adapters import PlainSequence as PlainSequence
    from mclr.adapters import from_denoiser as from_denoiser
    from mclr.adapters import from_logits as from_logits
    from mclr.diffusion import Diffusion as Diffusion
    from mclr.errors import UserError as UserError
    from mclr.guidance import Guidance as Guidance
    from mclr.likelihood import Draws as Draws
    from mclr.likelihood import score as score
    from mclr.loss import Loss as Loss
    from mclr.loss import project as project
    from mclr.next_scale import NextScale as NextScale
    from mclr.objective import Objective as Objective
    from mclr.schedule import Schedule as Schedule
    from mclr.train.sampling.generate import Model as Model
    from mclr.train.sampling.generate import load as load

# public name -> the module that defines it
PUBLIC = {
    "load": "mclr.train.sampling.generate",
    "Model": "mclr.train.sampling.generate",
    "Loss": "mclr.loss",
    "Objective": "mclr.objective",
    "Diffusion": "mclr.diffusion",
    "NextScale": "mclr.next_scale",
    "Schedule": "mclr.schedule",
    "Guidance": "mclr.guidance",
    "Draws": "mclr.likelihood",
    "from_denoiser": "mclr.adapters",
    "from_logits": "mclr.adapters",
    "PlainSequence": "mclr.adapters",
    "project": "mclr.loss",
    "score": "mclr.likelihood",
    "metrics": "mclr",
    "UserError": "mclr.errors",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module mclr has no attribute {name}")
    if PUBLIC[name] == "mclr":
        return importlib.import_module(f"mclr.{name}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
