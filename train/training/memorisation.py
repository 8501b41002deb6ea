"""The memorisation monitor: the loss of maximum likelihood, and ICR of a diffusion network's features, on training and held-out images.

B images or views of a forward; D features; C H W image.

mle_loss, mle_loss_val: of the weights that are trained. Under `mle` a network that memorises gains on its training images and loses on
held-out ones: mle_loss_val turns up while mle_loss still falls. Under every other objective both may rise because the method works:
its optimum, the guided network, is not that of the likelihood. There, look at mle_loss_val - mle_loss: it widens as a run memorises.

icr, icr_val (mclr/metrics.py): said to fall while the network learns what images have in common, and to rise from where it begins to
memorise them (arXiv 2606.09718). On the 8x8 digits ICR did not tell a memorising run from a good one, and mle_loss_val did
(mclr/EXPERIMENTS.md).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mclr.errors import UserError
from mclr.forms import EDM, FORMS
from mclr.likelihood import PROJECTION, VIEWS, Draws
from mclr.metrics import icr
from mclr.train.data.dataset import SplitReader
from mclr.train.data.encoders import Encoder, from_uint8, mirrored
from mclr.train.engine.base import eval_mode
from mclr.train.system.files import ignore
from mclr.train.training.held_out import beside_training, fixed, mle_loss
from mclr.train.training.step import Task

SIGMA = 0.29  # noise of a view; the paper's choice
WIDTH = 32  # features; those of wider blocks are projected at random
NAMES = {"train": "{}", "val": "{}_val"}  # split -> column of a reading


def view(image_BCHW: Tensor, draws: Draws, flip: bool) -> Tensor:
    """uint8 -> [-1, 1], shifted by up to an eighth of the side (its edge repeated), mirrored for half of the images when `flip`.

    An eighth is 1 of the 8 pixels of the digits, and the 4 of CIFAR's 32 that are usual there.
    """
    most, side = image_BCHW.shape[-1] // 8, image_BCHW.shape[-1]
    image_BCHW = from_uint8(image_BCHW)
    if flip:
        image_BCHW = mirrored(image_BCHW, draws.uniform() < 0.5)
    padded_BCHW = F.pad(image_BCHW, (most, most, most, most), mode="replicate")
    corner_B2 = (draws.uniform(2) * (2 * most + 1)).long().tolist()
    return torch.stack([x_CHW[:, y : y + side, x : x + side] for x_CHW, (y, x) in zip(padded_BCHW, corner_B2, strict=True)])


@torch.no_grad()
def features(net: Any, x_BCHW: Tensor, draws: Draws) -> Tensor:
    """[B, D] fp32, D <= WIDTH: spatial mean of the middle block of the decoder, for x noised to SIGMA, under the null condition."""
    noisy_BCHW = x_BCHW + SIGMA * draws.normal(*x_BCHW.shape[1:])
    sigma_B = torch.full((len(x_BCHW),), SIGMA, device=x_BCHW.device)
    form = FORMS.get(getattr(net.config, "form", ""), EDM())
    null_B = torch.full_like(sigma_B, net.config.num_classes, dtype=torch.int64)
    seen: list[Tensor] = []
    hook = net.middle.register_forward_hook(lambda block, inputs, h_BDHW: seen.append(h_BDHW.mean((2, 3))))
    try:
        with eval_mode(net, bf16=False):
            net(*form.asked(*form.of_sigma(noisy_BCHW, sigma_B)), null_B)
    finally:
        hook.remove()
    D = seen[0].shape[1]
    return seen[0] if D <= WIDTH else seen[0] @ Draws(PROJECTION, list(range(D)), x_BCHW.device).normal(WIDTH) / D**0.5


def measure(
    net: Any, encoder: Encoder, images: dict[str, SplitReader], flip: bool, beat: Callable[[], None] = ignore
) -> dict[str, float]:
    """icr and icr_val: that of the network on each of these splits, from READING pairs of views, in fp32.

    beat: called after every batch. Raises UserError where the features of two views do not differ, or are not finite.
    """
    device = next(net.parameters()).device
    found = {}
    for split, reader in images.items():
        views: tuple[list[Tensor], list[Tensor]] = ([], [])
        for pairs, batch in fixed(reader):
            for which, h_BD in enumerate(views):
                draws = Draws(VIEWS, [2 * p + which for p in pairs], device)
                stored_B = encoder.encode(view(batch.image_BCHW.to(device), draws, flip))
                h_BD.append(features(net, encoder.draw(stored_B, draws), draws).cpu())
            beat()
        try:
            found[NAMES[split].format("icr")] = icr(torch.cat(views[0]), torch.cat(views[1]))
        except ValueError as error:
            raise UserError(f"no ICR of the {split} images ({error}): leave it out, or train longer") from error
    return found


class Monitor:
    """What is logged beside a step's metrics, once every `every` images (0: never).

    period: images between two lines of the log. readers: the images of both splits (held_out.py). beat: called after every batch, so
    that no watchdog takes a reading for a hang.
    """

    def __init__(self, task: Task, readers: dict[str, SplitReader], every: int, period: int, beat: Callable[[], None] = ignore):
        self.task, self.readers, self.every, self.period, self.beat = task, readers, every, period, beat

    def read(self, images: int) -> dict[str, float]:
        """At a line of the log, after so many images: nothing until a reading is due, then the loss; of diffusion also ICR. Collective.

        ICR looks at features under the null condition, so there is none where no condition is dropped. Only ranks that run the network
        get readings: rank 0, and all where each holds a part of it.
        """
        line_before, task = (images - 1) // self.period * self.period, self.task
        if not self.every or images // self.every == line_before // self.every:
            return {}
        with beside_training(task.engine.lockstep, self.beat) as working:
            if working is None:
                return {}
            found = {NAMES[s].format("mle_loss"): mle_loss(task, reader, working) for s, reader in self.readers.items()}
            if hasattr(task.engine.net, "middle") and task.loss.drop_condition > 0:
                try:
                    found |= measure(task.engine.net, task.encoder, self.readers, task.flip, working)
                except UserError as error:
                    tqdm.write(f"at {images} images {error}")
            return found
