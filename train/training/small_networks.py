"""Fits the small networks that a dataset needs beside the generator: tokenizer, judge classifier, posterior classifier."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from mclr.configs.schema import load_data
from mclr.errors import UserError
from mclr.likelihood import Draws
from mclr.models.features import ImageClassifier, ImageClassifierConfig, NoiseClassifier, NoiseClassifierConfig, channel_mult_for
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.data.dataset import SplitReader
from mclr.train.data.encoders import from_uint8
from mclr.train.data.source import Source, open_images
from mclr.train.data.write import open_or_prepare
from mclr.train.system.console import progress_bar
from mclr.train.system.files import new_folder, write_json, write_text
from mclr.train.weights.folder import read_config, save_weights
from mclr.train.weights.model_card import card

BATCH = 256  # held-out images per forward

Criterion = Callable[
    [nn.Module, Tensor, Tensor, Draws], Tensor
]  # of network, image [B, C, H, W] in [-1, 1], c [B], random numbers


@dataclass(frozen=True)
class Recipe:
    """AdamW over `steps` steps of `batch` images. The rate falls to 0 along a cosine."""

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.01


def fit(net: nn.Module, criterion: Criterion, source: Source, recipe: Recipe, seed: int, device: torch.device) -> nn.Module:
    """Minimise a criterion. Every sample has its own random numbers, from the seed.

    Raises UserError when the loss or its gradient is not finite.
    """
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    with progress_bar(recipe.steps * recipe.batch, begun=0, quiet=False) as bar:
        for step in range(recipe.steps):
            first = step * recipe.batch
            batch = source.batch(first, recipe.batch)
            draws = Draws(seed, list(range(first, first + recipe.batch)), device)
            value = criterion(net, from_uint8(batch.image_BCHW.to(device)), batch.c_B.to(device), draws)
            value.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            if not (value.detach() + norm).isfinite():
                raise UserError(f"the loss or its gradient is not finite at step {step} of {recipe.steps}: give a smaller --lr")
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(recipe.batch)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(value.detach()):.4f}", refresh=False)
    return net.eval()


def fit_to_data(kind: str, data: str, out: str, recipe: Recipe, seed: int, half: bool, command: str) -> None:
    """Fit a network of this kind to a dataset, and write it to `out` with its quality on the held-out images.

    data: a preset or a dataset folder. Raises UserError before the fit where data, recipe or `out` cannot be used.
    """
    if recipe.steps < 1 or recipe.batch < 1:
        raise UserError(f"--steps is {recipe.steps} and --batch {recipe.batch}: both must be at least 1")
    if not 0 < recipe.lr < math.inf:
        raise UserError(f"--lr is {recipe.lr:g}: it must be a number above 0")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}: it must be in [0, 2^63)")
    chosen = load_data(data)
    info = open_or_prepare(chosen.name, chosen.path)
    source, held_out = open_images(info.path, "train", seed), SplitReader(info, "val")
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = new_network(kind, info.resolution, info.channels, info.num_classes)
    size = sum(p.numel() for p in net.parameters())
    with new_folder(out) as folder:
        print(f"fitting {size} parameters: {recipe.steps} steps of {recipe.batch} images (--steps)", flush=True)
        fit(net, CRITERIA[kind], source, recipe, seed, device)
        save_weights(folder, net, half=half, made_by=command, seed=seed, data=info.name)
    # the weights are written before the scoring, which may fail
    result = quality(kind, net, held_out, device)
    described = read_config(Path(out)) | {"result": result}
    write_json(Path(out) / "config.json", described)
    write_text(Path(out) / "README.md", card(described))
    print(f"{out}: {size} parameters, {result}")


def shifted(image_BCHW: Tensor, draws: Draws) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel along each axis. Background (-1) fills the edge."""
    padded = nn.functional.pad(image_BCHW, (1, 1, 1, 1), value=-1.0)
    height, width = image_BCHW.shape[2:]
    offsets = (draws.uniform(2) * 3).long().clamp(max=2).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)])


def tokenizer_loss(net: nn.Module, image: Tensor, c_B: Tensor, draws: Draws) -> Tensor:
    reconstruction, vq_loss, _ = net(image)
    return mse_loss(reconstruction, image) + vq_loss


def posterior_loss(net: nn.Module, image: Tensor, c_B: Tensor, draws: Draws) -> Tensor:
    """Cross-entropy at the noise levels of training: EDM2's distribution for latents, which is wide enough for pixels."""
    sigma_B = (draws.normal() * 1.2 - 0.6).exp()
    noisy = image + sigma_B[:, None, None, None] * draws.normal(*image.shape[1:])
    return cross_entropy(net(noisy, sigma_B), c_B)


def halvings(resolution: int) -> int:
    """How often a tokenizer halves images: at most four times, to a feature map of about 4 pixels (images up to 16 px) or 16."""
    return min(max(round(math.log2(resolution / (4 if resolution <= 16 else 16))), 0), 4)


def new_tokenizer(resolution: int, channels: int) -> VQVAE:
    """A small one up to 16 px; above, the published one with 64 channels instead of 160. Raises UserError where halving leaves a rest."""

    def fits(size: int) -> bool:
        return size % 2 ** halvings(size) == 0

    levels = halvings(resolution) + 1
    if not fits(resolution):
        below, above = next(filter(fits, range(resolution, 0, -1))), next(filter(fits, count(resolution)))
        raise UserError(
            f"a tokenizer halves {resolution}-pixel images {levels - 1} times, which leaves a rest: "
            f"prepare them with --resolution {below} or {above}"
        )
    side = resolution >> (levels - 1)
    # the published scales of a map of 16, shrunk or stretched to this side; of 4: 1, 2, 3, 4
    scales = tuple(sorted({1} | {math.ceil(scale * side / 16) for scale in VQVAEConfig.scales}))
    if resolution <= 16:
        mult = (1,) * levels
        return VQVAE(VQVAEConfig(channels, 32, mult, num_res_blocks=1, z_channels=8, vocab_size=64, scales=scales))
    return VQVAE(VQVAEConfig(channels, 64, VQVAEConfig.ch_mult[:levels], scales=scales))


def new_network(kind: str, resolution: int, channels: int, num_classes: int) -> nn.Module:
    """A network of the size that suits the data; kind: tokenizer, classifier or posterior."""
    if kind == "tokenizer":
        return new_tokenizer(resolution, channels)
    mult = channel_mult_for(resolution)
    if kind == "classifier":
        return ImageClassifier(ImageClassifierConfig(channels, num_classes, channel_mult=mult))
    return NoiseClassifier(NoiseClassifierConfig(channels, num_classes, channel_mult=mult))


CRITERIA: dict[str, Criterion] = {
    "tokenizer": tokenizer_loss,
    "classifier": lambda net, image, c_B, draws: cross_entropy(net(shifted(image, draws)), c_B),
    "posterior": posterior_loss,
}


@torch.no_grad()
def quality(kind: str, net: Any, held_out: SplitReader, device: torch.device) -> str:
    """One line on the held-out images: accuracy of a classifier, error and code use of a tokenizer."""
    N, c_N = len(held_out.samples), held_out.c_N
    batches = [list(range(first, min(first + BATCH, N))) for first in range(0, N, BATCH)]
    if kind == "tokenizer":
        error, used = 0.0, torch.zeros(net.config.vocab_size, dtype=torch.bool, device=device)
        for batch in batches:
            image = from_uint8(held_out.images(batch).to(device))
            tokens = net.encode(image)
            used[tokens] = True
            error += float((net.decode(tokens) - image).square().flatten(1).mean(1).sum())
        return f"held-out reconstruction error {math.sqrt(error / N):.3f} (RMS, images in [-1, 1]), {int(used.sum())} codes used"

    def accuracy(sigma: float | None) -> tuple[float, float]:
        """(accuracy, cross-entropy in nats), at this noise level."""
        parts = []
        for batch in batches:
            image = from_uint8(held_out.images(batch).to(device))
            if sigma is None:
                parts.append(net(image).cpu())
            else:
                noisy = image + sigma * Draws(0, batch, device).normal(*image.shape[1:])
                parts.append(net(noisy, torch.full((len(batch),), sigma, device=device)).cpu())
        logits = torch.cat(parts)
        return float((logits.argmax(1) == c_N).float().mean()), float(cross_entropy(logits, c_N))

    if kind == "classifier":
        return f"held-out accuracy {accuracy(None)[0]:.4f}"
    levels = [(sigma, *accuracy(sigma)) for sigma in (0.1, 0.5, 1.0, 2.0)]
    return "held-out, " + "; ".join(f"sigma {sigma}: accuracy {right:.3f}, nats {nats:.3f}" for sigma, right, nats in levels)
