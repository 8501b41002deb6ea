"""Two small classifiers for image sets of any size: the judge of the metrics, and the posterior p(c | x_t) at every noise level.

R rows (B images for the judge); C channels, H, W pixels; D features; E noise features; K conditions.
Both are stacks of residual blocks, one per resolution, that end in a mean over all pixels; the posterior can use a ConvNeXt of timm
instead. There is no batch norm: an answer depends neither on the rest of the batch nor on the rank or the mode.
"""

import difflib
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mclr.errors import UserError
from mclr.models.options import ImageClassifierConfig, NoiseClassifierConfig

CONVNEXT_SMALLEST = 16  # side, in pixels, that its stem and three stages can halve


def channel_mult_for(resolution: int) -> tuple[int, ...]:
    """channel_mult of either classifier for images of this side, in pixels: halved to about 4 pixels, at most 4 widths."""
    return (1, 2, 2, 4)[: max(round(math.log2(resolution / 4)) + 1, 2)]


class ImageClassifier(nn.Module):
    """The judge: features [B, D] in which distances are measured, and logits [B, K], of clean images in [-1, 1]."""

    def __init__(self, config: ImageClassifierConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(self.trunk.width, config.num_classes)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """The penultimate layer [B, D]: the head is linear in it."""
        return self.trunk(image_BCHW)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.head(self.features(image_BCHW))


class NoiseClassifier(nn.Module):
    """log p(c | x_t) up to a constant: logits [R, K] in fp32 of noisy images x + sigma n, for sigma > 0 of the EDM noise law.

    Input scaling c_in = 1 / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4: Karras et al. 2022 (arXiv 2206.00364),
    table 1. c_noise modulates every block, or enters the ConvNeXt beside the image. Raises UserError for an unknown backbone.
    """

    def __init__(self, config: NoiseClassifierConfig):
        super().__init__()
        self.config = config
        self.embed_1 = nn.Linear(config.emb_channels, config.emb_channels)
        self.embed_2 = nn.Linear(config.emb_channels, config.emb_channels)
        self.trunk = ConvNeXt(config) if config.backbone else Trunk(config, config.emb_channels)
        self.head = nn.Linear(self.trunk.width, config.num_classes)

    def forward(self, x_noisy_RCHW: Tensor, sigma_R: Tensor) -> Tensor:
        sigma_R = sigma_R.float()
        c_in_R = (sigma_R.square() + self.config.sigma_data**2).rsqrt()
        # cos and sin of c_noise, which spans less than 3, at frequencies from 1 to 16
        frequency_F = torch.logspace(0, math.log10(16), self.config.emb_channels // 2, device=sigma_R.device)
        phase_RF = (sigma_R.log() / 4)[:, None] * frequency_F
        waves_RE = torch.cat([phase_RF.cos(), phase_RF.sin()], dim=1).to(self.embed_1.weight.dtype)
        emb_RE = F.silu(self.embed_2(F.silu(self.embed_1(waves_RE))))
        x_RCHW = (x_noisy_RCHW.float() * c_in_R[:, None, None, None]).to(self.embed_1.weight.dtype)
        return self.head(self.trunk(x_RCHW, emb_RE)).float()


class Trunk(nn.Module):
    """Image [R, C, H, W] -> features [R, D]: one block per width, the resolution halved between them, then the mean over pixels."""

    def __init__(self, config: ImageClassifierConfig, emb_channels: int = 0):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        self.width = widths[-1]
        self.stem = nn.Conv2d(config.img_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(*pair, emb_channels) for pair in pairwise([widths[0], *widths]))
        self.norm = nn.GroupNorm(self.width // 8, self.width)

    def forward(self, image_RCHW: Tensor, emb_RE: Tensor | None = None) -> Tensor:
        h_RDHW = self.stem(image_RCHW)
        for level, block in enumerate(self.blocks):
            h_RDHW = block(F.avg_pool2d(h_RDHW, 2) if level else h_RDHW, emb_RE)
        return F.silu(self.norm(h_RDHW)).mean((2, 3))


class ConvNeXt(nn.Module):
    """timm's ConvNeXt in the place of Trunk: image [R, C, H, W] and embedding [R, E] -> features [R, D].

    The embedding enters as E more channels, constant over the pixels. The stem has patches of 2 x 2 instead of 4 x 4, which would leave
    a 2 x 2 map of 64 pixels. Only this family is allowed: most others have batch norm, whose statistics differ between ranks, and
    between training and evaluation. Raises UserError for an unknown name.
    """

    def __init__(self, config: NoiseClassifierConfig):
        super().__init__()
        name = str(config.backbone)
        # takes seconds, and most runs do without
        import timm

        # the stem of an _ols is no single convolution
        known = timm.list_models(["convnext_*", "convnextv2_*"], exclude_filters="*_ols")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or ["convnext_tiny"]
            raise UserError(f"posterior backbone {name} is no ConvNeXt of timm; did you mean {close[0]}?")
        self.net = timm.create_model(name, num_classes=0)
        self.net.stem[0] = nn.Conv2d(config.img_channels + config.emb_channels, self.net.stem[0].out_channels, 2, stride=2)
        self.width = self.net.num_features

    def forward(self, image_RCHW: Tensor, emb_RE: Tensor) -> Tensor:
        emb_REHW = emb_RE[:, :, None, None].expand(-1, -1, *image_RCHW.shape[2:])
        return self.net(torch.cat([image_RCHW, emb_REHW], dim=1))


class Block(nn.Module):
    """Residual block [R, in, H, W] -> [R, out, H, W]: norm, SiLU, convolution, twice; an embedding scales and shifts the second norm."""

    def __init__(self, channels_in: int, channels_out: int, emb_channels: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(channels_in // 8, channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(channels_out // 8, channels_out)
        self.conv_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.modulation = nn.Linear(emb_channels, 2 * channels_out) if emb_channels else None

    def forward(self, x_RDHW: Tensor, emb_RE: Tensor | None) -> Tensor:
        h_RDHW = self.norm_2(self.conv_1(F.silu(self.norm_1(x_RDHW))))
        if self.modulation is not None:
            scale_RD11, shift_RD11 = self.modulation(emb_RE)[:, :, None, None].chunk(2, dim=1)
            h_RDHW = h_RDHW * (1 + scale_RD11) + shift_RD11
        return self.skip(x_RDHW) + self.conv_2(F.silu(h_RDHW))
