"""The memorisation monitor: ICR of a diffusion network's own features, on training and on held-out images.

B views in a forward; D features; C H W image. Over a long training on few images ICR (mclr/metrics.py) is said to be U-shaped: it
falls while the network learns what images have in common, and rises from where it begins to memorise them (arXiv 2606.09718). On the
8x8 digits it did not tell a memorising run from a good one (mclr/EXPERIMENTS.md): read it beside the samples, not instead of them.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mclr.likelihood import Draws
from mclr.metrics import icr
from models.edm2 import EDM2
from train.data import DatasetInfo, SplitReader, permutation
from train.encoders import Encoder
from train.step import Task, to_image

SIGMA = 0.29  # noise of a view; the paper's choice
WIDTH = 32  # features; those of wider blocks are projected at random
PAIRS = 20 * WIDTH  # of views: of so many images, or of fewer in turn
BATCH = 64  # views in a forward
# seeds beyond those of training; the same views at every reading, so that their noise does not move the curve
VIEWS, PROJECTION = 2**63 + 1, 2**63 + 2
# ICR has turned when so many readings in a row lie above its minimum by this share of it
READINGS, MARGIN = 3, 0.1


def view(image_BCHW: Tensor, draws: Draws, flip: bool) -> Tensor:
    """uint8 -> [-1, 1], shifted by up to an eighth of the side (its edge repeated), mirrored for half of the images when `flip`.

    An eighth is 1 of the 8 pixels of the digits, and the 4 of CIFAR's 32 that are usual there.
    """
    most, side = image_BCHW.shape[-1] // 8, image_BCHW.shape[-1]
    padded_BCHW = F.pad(to_image(image_BCHW, draws, flip), (most, most, most, most), mode="replicate")
    corner_B2 = (draws.uniform(2) * (2 * most + 1)).long().tolist()
    return torch.stack([x_CHW[:, y : y + side, x : x + side] for x_CHW, (y, x) in zip(padded_BCHW, corner_B2, strict=True)])


@torch.no_grad()
def features(net: EDM2, x_BCHW: Tensor, draws: Draws) -> Tensor:
    """[B, D] fp32, D <= WIDTH: spatial mean of the middle block of the decoder, for x noised to SIGMA, under the null condition."""
    noisy_BCHW = x_BCHW + SIGMA * draws.normal(*x_BCHW.shape[1:])
    sigma_B = torch.full((len(x_BCHW),), SIGMA, device=x_BCHW.device)
    null_B = torch.full_like(sigma_B, net.config.num_classes, dtype=torch.int64)
    seen: list[Tensor] = []
    blocks = list(net.decoder.values())
    hook = blocks[len(blocks) // 2].register_forward_hook(lambda block, inputs, h_BDHW: seen.append(h_BDHW.mean((2, 3))))
    try:
        net.eval().forward(noisy_BCHW, sigma_B, null_B)
    finally:
        hook.remove()
    D = seen[0].shape[1]
    return seen[0] if D <= WIDTH else seen[0] @ Draws(PROJECTION, list(range(D)), x_BCHW.device).normal(WIDTH) / D**0.5


def measure(net: EDM2, encoder: Encoder, images: dict[str, SplitReader], flip: bool) -> dict[str, float]:
    """ICR of the network on each of these splits, from PAIRS pairs of views. Leaves the network in evaluation mode."""
    device = net.out_gain.device
    found = {}
    for name, reader in images.items():
        order = permutation(0, 0, len(reader.samples))
        views: tuple[list[Tensor], list[Tensor]] = ([], [])
        for first in range(0, PAIRS, BATCH):
            pairs = range(first, first + BATCH)
            image_BCHW = reader.images([int(order[p % len(order)]) for p in pairs]).to(device)
            for which, h_BD in enumerate(views):
                draws = Draws(VIEWS, [2 * p + which for p in pairs], device)
                h_BD.append(features(net, encoder.encode(view(image_BCHW, draws, flip)), draws).cpu())
        found[name] = icr(torch.cat(views[0]), torch.cat(views[1]))
    return found


def open_images(info: DatasetInfo) -> dict[str, SplitReader]:
    """The images of a reading: icr of training, icr_val of held-out ones where there are any."""
    names = {"icr": "train", "icr_val": "val"}
    return {name: SplitReader(info, split) for name, split in names.items() if info.splits[split].count}


def turned(history: list[tuple[int, float]]) -> int | None:
    """Images seen at the lowest of these (images seen, ICR) when READINGS in a row first lie above it by MARGIN, None before."""
    lowest, high = (0, float("inf")), 0
    for reading in history:
        lowest = min(lowest, reading, key=lambda each: each[1])
        high = high + 1 if reading[1] > (1 + MARGIN) * lowest[1] else 0
        if high == READINGS:
            return lowest[0]
    return None


class Monitor:
    """Reads ICR every `every` images and says, once, that it has turned. For rank 0 alone: it meets nobody.

    metrics: the run's metrics.jsonl, its only memory, so that a resumed run goes on as if uninterrupted.
    """

    def __init__(self, task: Task, every: int, metrics: Path):
        self.task, self.every = task, every
        self.images = open_images(task.source.info)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        self.history = [(line["images"], line["icr"]) for line in lines if "icr" in line]

    def read(self, images: int) -> dict[str, float]:
        """What to log at so many images seen: nothing until a reading is due, then icr and icr_val; icr_turned where it turns."""
        last = self.history[-1][0] if self.history else 0
        if images // self.every == last // self.every:
            return {}
        net = self.task.engine.net
        assert isinstance(net, EDM2)
        # past the engine, which would count the rows; it puts the network back into training mode
        found = measure(net, self.task.encoder, self.images, self.task.flip)
        before = turned(self.history)
        self.history.append((images, found["icr"]))
        lowest = turned(self.history)
        if before is None and lowest is not None:
            low = dict(self.history)[lowest]
            tqdm.write(
                f"ICR on the training images was lowest at {lowest} images ({low:.3f}), it is {found['icr']:.3f} at {images}: "
                "the network may begin to memorise them; compare its samples with them"
            )
            found["icr_turned"] = lowest
        return found
