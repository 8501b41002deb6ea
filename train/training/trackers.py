"""Trackers: where the metrics and pictures of a run go beside metrics.jsonl: TensorBoard, Weights & Biases. The x axis is images seen.

A tracker helps to look at a run and never ends one. One that fails is reported once, and the run goes on without it.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mclr.errors import UserError
from mclr.train.system.files import write_json

FINISH = 60  # seconds that W&B gets at the end of a run to upload what is left


def refuse_missing(names: Sequence[str]) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    for name in names:
        spec = find_spec(name)
        # W&B leaves a folder of its name where it ran: to Python that is a package without an origin
        if spec is None or spec.origin is None:
            raise UserError(f"train.log_to={name} needs {name}: pip install -e '.[{name}]'")


class TensorBoard:
    """Event files in RUN/tensorboard. Lines after the checkpoint that a run goes on from are marked as void, and not shown."""

    def __init__(self, start: "Trackers"):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(start.run / "tensorboard"), purge_step=start.begun + 1)

    def log(self, images: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)
        # so that a crash loses no line
        self.writer.flush()

    def picture(self, name: str, images: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image), images, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, named like the run folder; RUN/wandb.json keeps its id. WANDB_MODE and WANDB_PROJECT count.

    W&B takes every step once. So what an earlier process sent is not sent again: a run that goes on from a checkpoint repeats it bit
    for bit. Raises RuntimeError where W&B would ask for a key: nobody may sit at the terminal.
    """

    def __init__(self, start: "Trackers"):
        import wandb

        # these modes need no key
        if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        kept = start.run / "wandb.json"
        about: dict[str, Any] = {"id": uuid.uuid4().hex, "images": 0}
        if kept.exists():
            about = json.loads(kept.read_text())
            about["images"] = max(about["images"], start.last)
        write_json(kept, about)
        self.sent, self.wandb = about["images"], wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mclr"),
            name=start.run.resolve().name,
            id=about["id"],
            resume="allow",
            dir=str(start.run),
            config=start.settings,
            # without a network, the end of a run would wait for ever
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=FINISH),
        )

    def log(self, images: int, values: dict[str, Any]) -> None:
        if images > self.sent:
            self.run.log(values, step=images)

    def picture(self, name: str, images: int, path: Path) -> None:
        self.log(images, {name: self.wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[["Trackers"], Any]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """The trackers of train.log_to. Each is opened when it first gets something: a run that had finished leaves them as they are.

    begun: images seen where this process goes on. last: images seen at the last line that an earlier process logged.
    """

    def __init__(self, run: Path, settings: dict[str, Any]):
        self.run, self.settings, self.begun, self.last = run, settings, 0, 0
        self.names: list[str] = list(settings["train.log_to"])
        self.opened: dict[str, Any] = {}

    def give(self, what: str, *values: Any) -> None:
        """Call this method of every tracker: log(images, values), picture(name, images, path) or close()."""
        for name in list(self.opened if what == "close" else self.names):
            try:
                if name not in self.opened:
                    self.opened[name] = TRACKERS[name](self)
                getattr(self.opened[name], what)(*values)
            # a foreign package, a network or a disk may raise anything
            except Exception as error:
                self.names.remove(name)
                self.opened.pop(name, None)
                why = " ".join(str(error).split()) or type(error).__name__
                tqdm.write(f"{name} failed ({why}): the run goes on without it, metrics.jsonl has everything")
