"""Previews: every so many images a picture of samples, RUN/grids/IMAGES.png, always of the same seeds and conditions.

A column is a condition, at most ten of them. A row takes the next seeds. The network that is being trained is sampled, not its average,
with the sampling of the configuration, its strength too, but without guidance. N images of a picture; C H W image.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mclr.configs.schema import Sample
from mclr.errors import UserError
from mclr.guidance import Guidance
from mclr.likelihood import SAMPLING, Draws
from mclr.train.data.encoders import to_uint8
from mclr.train.data.images import image_grid
from mclr.train.engine.base import eval_mode
from mclr.train.system.files import ignore, write_file
from mclr.train.training.held_out import beside_training
from mclr.train.training.log import RunFolder
from mclr.train.training.step import Task

COLUMNS, ROWS = 10, 4


def columns(num_classes: int) -> list[int]:
    """The conditions of a picture: all, or ten that are spread evenly."""
    count = min(num_classes, COLUMNS)
    return [k * num_classes // count for k in range(count)]


class Preview:
    """Every rank has one. every: images between pictures, 0 for none. sample: how images are drawn. folder: held by rank 0, else None.

    beat: called after every forward, so that no watchdog takes a picture for a hang.
    """

    def __init__(self, task: Task, every: int, sample: Sample, folder: RunFolder | None, beat: Callable[[], None] = ignore):
        self.task, self.every, self.batch, self.folder, self.beat = task, every, sample.batch, folder, beat
        self.guidance = Guidance(strength=sample.strength)
        self.conditions = columns(task.loss.paradigm.null)

    def due(self, images: int, before: int, done: bool) -> bool:
        """After a step that brought the images seen from `before` to `images`, and may have been the last."""
        return self.every > 0 and (done or images // self.every > before // self.every)

    def write(self, images: int) -> None:
        """Write the picture, and hand it to the trackers. Collective. Raises UserError when it cannot be written, or memory is short.

        Training goes on as if there had been no picture: its random numbers and its counts of rows stay as they are.
        """
        with beside_training(self.task.engine.lockstep, self.beat) as working:
            if working is None:
                return
            try:
                images_NCHW = self._images(working)
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of GPU memory for a picture: lower sample.batch (now {self.batch})") from error
            if self.folder is not None:
                path = self.folder.path / "grids" / f"{images:012d}.png"
                try:
                    path.parent.mkdir(exist_ok=True)
                except OSError as error:
                    raise UserError(
                        f"cannot make {path.parent} ({error.strerror}): make room, the same command goes on"
                    ) from error
                scale = max(64 // images_NCHW.shape[2], 1)
                write_file(path, image_grid(images_NCHW.numpy(), ROWS, len(self.conditions), scale))
                self.folder.trackers.give("picture", "samples", images, path)

    def _images(self, working: Callable[[], None]) -> Tensor:
        """uint8 [N, C, H, W], row by row of the picture. working: called after every forward."""
        net, device, found = self.task.engine.net, self.task.device, []
        c_N = torch.tensor(self.conditions * ROWS, device=device)
        beats = net.register_forward_hook(lambda *_: working())
        try:
            for seeds in torch.arange(len(c_N)).split(self.batch):
                draws = Draws(SAMPLING, seeds.tolist(), device)
                with eval_mode(net, self.task.bf16):
                    x = self.task.loss.paradigm.sample(net, c_N[seeds.to(device)], self.guidance, draws)
                found.append(to_uint8(self.task.encoder.decode(x)).cpu())
                working()
        finally:
            beats.remove()
        return torch.cat(found)
