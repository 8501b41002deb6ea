"""EDM2: the diffusion U-Net of Karras et al. 2024 (arXiv 2312.02696), written from the paper.

In this order: the network, its residual block, its attention, the published names. The options are in models/options.py.
B samples; R rows; C H W image; E embedding; K conditions; N channels of an activation; h heads of d channels.

What rows of one sample share is computed once: the first convolution and half of the first block, where the condition enters.
Precision: the trunk (U-Net) computes in the dtype of an enclosing torch.autocast, else in fp32; its output has that dtype.
Input scaling, embedding, log-variance, weight normalisation, RMS statistics and attention logits (inside the fused attention) are fp32.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mclr.errors import UserError
from mclr.kernels.magnitude import mp_silu, mp_sum, normalize
from mclr.kernels.norm_silu import norm_silu
from mclr.kernels.scale_silu import scale_silu
from mclr.kernels.sum_clip import sum_clip
from mclr.kernels.weight_norm import used_weights
from mclr.models.blocks import MPConv, MPFourier, mp_cat, running, trunk_dtype
from mclr.models.conditions import map_columns
from mclr.models.convert import Published, Shapes
from mclr.models.dial import log_strength
from mclr.models.options import EDM2Config

# [R, N, H, W] -> half the size, by means of 2 x 2 cells; or twice the size, every cell becomes 2 x 2
halve, double = partial(F.avg_pool2d, kernel_size=2), partial(F.interpolate, scale_factor=2, mode="nearest")


class EDM2(nn.Module):
    """Noisy image, noise level and condition -> raw answer of unit variance, and the log-variance of its error (Figure 21)."""

    condition_layer, map_layer = "condition_linear.weight", staticmethod(map_columns)

    def __init__(self, config: EDM2Config):
        super().__init__()
        self.config = config
        # published files may name resolutions that their network does not have
        misfits = (each for each in config.misfits(config, config.img_resolution) if not each.startswith("attn_resolutions"))
        if misfit := next(misfits, ""):
            raise UserError(f"{misfit}: give {misfit.replace(':', '=').partition('=')[0]}=... to `mclr convert`")
        unit, resolutions = config.model_channels, [config.img_resolution >> i for i in range(len(config.channel_mult))]
        levels = [
            (f"{resolution}x{resolution}", unit * mult, resolution in config.attn_resolutions)
            for resolution, mult in zip(resolutions, config.channel_mult, strict=True)
        ]
        noise = unit * (config.channel_mult_noise or config.channel_mult[0])
        emb = unit * (config.channel_mult_emb or max(config.channel_mult))
        self.noise_fourier = MPFourier(noise)
        self.noise_linear = MPConv(noise, emb)
        if config.num_classes:
            self.condition_linear = MPConv(config.num_classes, emb)

        self.encoder = nn.ModuleDict()
        skips = []  # width of every encoder entry; each is taken back by one decoder block
        for size, width, attention in levels:
            if not skips:
                self.encoder[f"{size}_conv"] = MPConv(config.img_channels + 1, width, kernel=3)
                skips.append(width)
            else:
                self.encoder[f"{size}_down"] = Block(config, skips[-1], skips[-1], emb, resample=halve)
                skips.append(skips[-1])
            for i in range(config.num_blocks):
                self.encoder[f"{size}_block{i}"] = Block(config, skips[-1], width, emb, attention=attention)
                skips.append(width)

        self.decoder = nn.ModuleDict()
        last = skips[-1]
        for size, width, attention in reversed(levels):
            if not self.decoder:
                self.decoder[f"{size}_in0"] = Block(config, last, last, emb, decoder=True, attention=True)
                self.decoder[f"{size}_in1"] = Block(config, last, last, emb, decoder=True)
            else:
                self.decoder[f"{size}_up"] = Block(config, last, last, emb, decoder=True, resample=double)
            for i in range(config.num_blocks + 1):
                joined = last + skips.pop()
                self.decoder[f"{size}_block{i}"] = Block(config, joined, width, emb, decoder=True, attention=attention)
                last = width

        self.out_conv = MPConv(last, config.img_channels, kernel=3)
        self.out_gain = nn.Parameter(torch.zeros(()))  # the untrained network denoises by c_skip alone
        self.logvar_fourier = MPFourier(config.logvar_channels)
        self.logvar_linear = MPConv(config.logvar_channels, 1)
        self.activation_checkpointing = False
        if config.strength_max:
            self.dial = MPDial(noise, emb)

    @property
    def blocks(self) -> list["Block"]:
        """All blocks: everything but the first and the last layers."""
        return [module for part in (self.encoder, self.decoder) for module in part.values() if isinstance(module, Block)]

    @property
    def middle(self) -> nn.Module:
        """The block of the decoder whose output the invariant contamination ratio looks at."""
        blocks = list(self.decoder.values())
        return blocks[len(blocks) // 2]

    def forward(
        self,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        c_R: Tensor,
        index_R: Tensor | None = None,
        strength_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noisy images, their sigma > 0, int64 conditions of the rows, sample of each row -> (raw_RCHW, logvar_R).

        raw has unit variance and the trunk's dtype; mclr.diffusion makes the denoised image of it. logvar is fp32. index_R: None where
        rows are samples. strength_R: of a network with a dial. c = num_classes is the null condition, an all-zero vector; an
        unconditional network ignores c.
        """
        noisy_BCHW, sigma_B = noisy_BCHW.float(), sigma_B.float()
        dtype = trunk_dtype(noisy_BCHW)
        # autocast only tells the dtype: all casts of this network are explicit
        with torch.autocast(noisy_BCHW.device.type, enabled=False):
            c_in_B = 1 / (sigma_B**2 + self.config.sigma_data**2).sqrt()
            c_noise_B = sigma_B.log() / 4
            emb_RE = self.embed(c_noise_B, c_R, index_R, strength_R)
            scaled_BCHW = c_in_B[:, None, None, None] * noisy_BCHW
            raw_RCHW = self.trunk(scaled_BCHW.to(dtype), emb_RE.to(dtype), index_R)
            logvar_B = self.logvar_linear(self.logvar_fourier(c_noise_B)).squeeze(1)
            return raw_RCHW, gathered(logvar_B, index_R)

    def embed(self, c_noise_B: Tensor, c_R: Tensor, index_R: Tensor | None = None, strength_R: Tensor | None = None) -> Tensor:
        """c_noise = ln(sigma) / 4 of the samples, conditions and strengths of the rows -> embedding [R, E], fp32."""
        emb_RE = gathered(self.noise_linear(self.noise_fourier(c_noise_B)), index_R)
        conditions = self.config.num_classes
        if conditions:
            # the null condition loses its column and is all zero; sqrt(K) gives a one-hot vector of K entries unit RMS
            one_hot_RK = F.one_hot(c_R, conditions + 1)[:, :conditions] * math.sqrt(conditions)
            emb_RE = mp_sum(emb_RE, self.condition_linear(one_hot_RK.to(emb_RE.dtype)), self.config.label_balance)
        if self.config.strength_max:
            emb_RE = emb_RE + self.dial(strength_R, c_R, conditions)
        return mp_silu(emb_RE)

    def trunk(self, x_BCHW: Tensor, emb_RE: Tensor, index_R: Tensor | None = None) -> Tensor:
        """The U-Net: images [B, C, H, W] -> raw answer [R, C, H, W], both of unit variance."""
        # A channel of ones stands in for the biases that no layer has.
        x = torch.cat([x_BCHW, torch.ones_like(x_BCHW[:, :1])], dim=1)
        # channels last from here to the answer: convolutions need no reordering, on CPUs and GPUs
        x = x.contiguous(memory_format=torch.channels_last)
        run, skips = running(self.activation_checkpointing), []
        for block in self.encoder.values():
            if not skips:
                x = block(x)
                skips.append(gathered(x, index_R))
            else:
                x = run(block, x, emb_RE, index_R if len(skips) == 1 else None)
                skips.append(x)
        for name, block in self.decoder.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = run(block, x, emb_RE)
        return self.out_gain * self.out_conv(x)

    def magnitude_preserving(self) -> list[nn.Parameter]:
        """The weights on which forced weight normalisation acts (kernels.weight_norm, before training and after every step)."""
        return [layer.weight for layer in mp_layers(self)]

    def fold(self) -> None:
        """Freeze the network and store the weights that forwards compute with: bit-equal answers for less work.

        There is no way back: a folded network can be neither trained nor saved.
        """
        assert not self.out_conv.folded, "folded twice"
        self.eval().requires_grad_(False)
        for layer in mp_layers(self):
            layer.fold()

    def train(self, mode: bool = True) -> "EDM2":
        assert not (mode and self.out_conv.folded), "a folded network cannot be trained"
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        assert not self.out_conv.folded, "a folded network cannot be saved: its weights are not the stored ones"
        return super().state_dict(*args, **kwargs)


class MPDial(nn.Module):
    """What the strength adds to the embedding of a row, [R, E]: 0 before training, and always for the null condition (models/dial.py).

    SPEED times as fast as other weights: where it is slow, all strengths share what the first steps teach (mclr/EXPERIMENTS.md).
    """

    SPEED = 10.0

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.fourier, self.linear = MPFourier(channels), MPConv(channels, emb)
        # of order 1, so that near strengths are embedded alike
        self.fourier.freqs /= 2 * math.pi
        self.gain = nn.Parameter(torch.zeros(emb))

    def forward(self, strength_R: Tensor | None, c_R: Tensor, null: int) -> Tensor:
        added_RE = self.linear(self.fourier(log_strength(strength_R, c_R)))
        return self.SPEED * self.gain * added_RE * (c_R != null)[:, None]


class Block(nn.Module):
    """Residual block, modulated by the embedding (Figure 21): [R, in, H, W] -> [R, out, H', W'].

    Encoder blocks normalise the main path over its channels (Eq. 30), where both branches start; decoder blocks do not.
    """

    def __init__(
        self,
        config: EDM2Config,
        channels_in: int,
        channels_out: int,
        emb: int,
        decoder: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.config, self.decoder, self.resample = config, decoder, resample
        self.conv_skip = MPConv(channels_in, channels_out, kernel=1) if channels_in != channels_out else nn.Identity()
        self.conv_res0 = MPConv(channels_in if decoder else channels_out, channels_out, kernel=3)
        self.emb_linear = MPConv(emb, channels_out)
        self.emb_gain = nn.Parameter(torch.zeros(()))  # no modulation at first
        self.conv_res1 = MPConv(channels_out, channels_out, kernel=3)
        self.attention = Attention(channels_out, config.channels_per_head) if attention else None
        self.layers = mp_layers(self)

    def forward(self, x: Tensor, emb_RE: Tensor, index_R: Tensor | None = None) -> Tensor:
        """index_R: of an encoder block whose x is still one per sample."""
        config = self.config
        with weights_in_use(self.layers, x.dtype):
            if self.resample is not None:
                x = self.resample(x)
            if self.decoder:
                active = mp_silu(x)
            else:
                x, active = norm_silu(self.conv_skip(x))

            scale_RN = 1 + self.emb_gain * self.emb_linear(emb_RE)
            branch = self.conv_res0(active)
            x, branch = gathered(x, index_R), gathered(branch, index_R)
            branch = scale_silu(branch, scale_RN)
            branch = F.dropout(branch, config.dropout, self.training)
            branch = self.conv_res1(branch)

            if self.decoder:
                x = self.conv_skip(x)
            if self.attention is None:
                return sum_clip(x, branch, config.res_balance, config.clip_act)
            x = sum_clip(x, branch, config.res_balance, math.inf)
            return sum_clip(x, self.attention(x), config.attn_balance, config.clip_act)


class Attention(nn.Module):
    """Self-attention over the cells, with q, k and v at unit RMS (cosine attention, Eq. 34): [R, N, H, W] -> the same."""

    def __init__(self, channels: int, channels_per_head: int):
        super().__init__()
        self.heads = channels // channels_per_head
        self.qkv = MPConv(channels, 3 * channels, kernel=1)
        self.proj = MPConv(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        # q, k, v vary fastest along the channels: the layout of the published weights. Fused attention wants d to be last in memory.
        qkv = rearrange(self.qkv(x), "R (h d three) H W -> three R h (H W) d", h=self.heads, three=3).contiguous()
        q, k, v = normalize(qkv, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)  # logits q.k / sqrt(d)
        # channels last in memory
        return self.proj(rearrange(y, "R h (H W) d -> R H W (h d)", H=x.shape[2]).movedim(-1, 1))


@contextmanager
def weights_in_use(layers: list[MPConv], dtype: torch.dtype) -> Iterator[None]:
    """Inside, these layers hold the weights to compute with, made in one operation; folded layers need none."""
    if layers[0].folded:
        yield
        return
    for layer, used in zip(layers, used_weights([layer.weight for layer in layers], dtype), strict=True):
        layer.used = used
    try:
        yield
    finally:
        for layer in layers:
            layer.used = None


def mp_layers(net: nn.Module) -> list[MPConv]:
    return [module for module in net.modules() if isinstance(module, MPConv)]


def gathered(x_B: Tensor, index_R: Tensor | None) -> Tensor:
    """[B, ...] of the samples -> [R, ...] of the rows."""
    return x_B if index_R is None else x_B[index_R]


def infer_edm2(shape: Shapes) -> EDM2Config:
    resolutions = shape.numbers("unet.enc.#x#_block0.conv_res1.weight")[::-1]
    widths = [shape[f"unet.enc.{r}x{r}_block0.conv_res1.weight"][0] for r in resolutions]
    emb, noise = shape["unet.emb_noise.weight"]
    unit = math.gcd(*widths, emb, noise)
    return EDM2Config(
        img_resolution=resolutions[0],
        img_channels=shape["unet.out_conv.weight"][0],
        num_classes=shape["unet.emb_label.weight"][1] if "unet.emb_label.weight" in shape else 0,
        model_channels=unit,
        channel_mult=tuple(width // unit for width in widths),
        channel_mult_noise=None if noise == widths[0] else noise // unit,
        channel_mult_emb=None if emb == max(widths) else emb // unit,
        num_blocks=shape.count(f"unet.enc.{resolutions[0]}x{resolutions[0]}_block#.conv_res1.weight", times=len(resolutions)),
        attn_resolutions=tuple(r for r in resolutions if f"unet.enc.{r}x{r}_block0.attn_qkv.weight" in shape),
        logvar_channels=shape["logvar_fourier.freqs"][0],
    )


RENAMES = (
    (r"^noise_fourier", "unet.emb_fourier"),
    (r"^noise_linear", "unet.emb_noise"),
    (r"^condition_linear", "unet.emb_label"),
    (r"^encoder", "unet.enc"),
    (r"^decoder", "unet.dec"),
    (r"^out_", "unet.out_"),
    (r"\.attention\.", ".attn_"),
)
PUBLISHED = Published("unet.out_gain", infer_edm2, RENAMES)
