"""VQVAE: image <-> tokens of several scales, by residual quantisation coarse to fine (VAR, arXiv 2404.02905, section 3.2).

An encoder turns the image into a feature map. Scale by scale, what is still missing of that map (the residual) is shrunk to the
scale's size, every vector is replaced by its nearest code, and the codes, enlarged and smoothed by a small convolution phi, are
added to the reconstruction f_hat of the map. A decoder turns f_hat into an image. The quantiser is fp32, also under autocast.

Legend: B images, C H W image, E code channels, L tokens of all scales, l tokens of one scale, h w one scale's map, V codes.
Feature maps (f, f_hat, h) are [B, E, side, side] with the side of the last scale.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mclr.errors import UserError
from mclr.models.convert import SCALES, Published, Shapes
from mclr.models.options import VQVAEConfig


def norm(channels: int) -> nn.GroupNorm:
    """32 groups, as published; in a tiny network the largest power of two that divides its channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(h_BCHW)))


class Attention(nn.Module):
    """One head over all positions of the map, [B, C, H, W] -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x_BCHW)), "B (n C) H W -> n B 1 (H W) C", n=3)
        h = F.scaled_dot_product_attention(q, k, v)
        return x_BCHW + self.proj_out(rearrange(h, "B 1 (H W) C -> B C H W", H=x_BCHW.shape[2]))


def halve(channels: int) -> nn.Sequential:
    """Half the size; padded only on the right and at the bottom, as published."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def double(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked, then the step to the next resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(width, out_channels) for width in widths)
        self.attentions = nn.ModuleList(Attention(out_channels) if attention else nn.Identity() for _ in widths)
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BCHW = attention(block(x_BCHW))
        return self.resample(x_BCHW)


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


class FromLast(nn.Sequential):
    """Its modules in turn, the last one first."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for module in reversed(self):
            x_BCHW = module(x_BCHW)
        return x_BCHW


def encoder(config: VQVAEConfig) -> nn.Sequential:
    """Image [B, C, H, W] -> map [B, E, side, side]."""
    widths, last, net = config.widths, len(config.widths) - 1, nn.Sequential()
    net.conv_in, net.down = nn.Conv2d(config.img_channels, widths[0], 3, padding=1), nn.Sequential()
    for i, width in enumerate(widths):
        resample = halve(width) if i < last else nn.Identity()
        net.down.append(Level(widths[max(i - 1, 0)], width, config.num_res_blocks, i == last, resample))
    net.middle, net.norm_out, net.silu = middle(widths[-1]), norm(widths[-1]), nn.SiLU()
    net.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
    return net


def decoder(config: VQVAEConfig) -> nn.Sequential:
    """Map [B, E, side, side] -> image [B, C, H, W], not clamped."""
    widths, last, net = config.widths, len(config.widths) - 1, nn.Sequential()
    net.conv_in, net.middle = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1), middle(widths[-1])
    # index 0 is the highest resolution, as in the encoder
    net.up = FromLast()
    for i, width in enumerate(widths):
        resample = double(width) if i > 0 else nn.Identity()
        net.up.append(Level(widths[min(i + 1, last)], width, config.num_res_blocks + 1, i == last, resample))
    net.norm_out, net.silu = norm(widths[0]), nn.SiLU()
    net.conv_out = nn.Conv2d(widths[0], config.img_channels, 3, padding=1)
    return net


class VQVAE(nn.Module):
    """The tokenizer: image <-> tokens [B, L] of all scales, and the generator's teacher inputs."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        E = config.z_channels
        self.encoder = encoder(config)
        self.to_features = nn.Conv2d(E, E, 3, padding=1)
        self.codebook = nn.Embedding(config.vocab_size, E)
        # codes begin close together, so that all are used from the start; most unit normal ones would stay unused
        nn.init.uniform_(self.codebook.weight, -1 / config.vocab_size, 1 / config.vocab_size)
        self.phis = nn.ModuleList(nn.Conv2d(E, E, 3, padding=1) for _ in range(config.share_quant_resi))
        self.from_features = nn.Conv2d(E, E, 3, padding=1)
        self.decoder = decoder(config)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training: image in [-1, 1] -> (reconstruction, not clamped; quantisation loss, a scalar in fp32; tokens [B, L]).

        The loss is the mean over scales of beta * |f - sg f_hat|^2 + |sg f - f_hat|^2, each a mean over elements and f_hat
        that of the scales so far. Straight-through: the reconstruction's gradient reaches the encoder as if f_hat were f.
        """
        f = self.features(image_BCHW)
        tokens_BL, f_hats = self.quantize(f)
        losses = [self.config.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach()) for f_hat in f_hats]
        straight_through = f + (f_hats[-1] - f).detach()
        return self.decoder(self.from_features(straight_through)), torch.stack(losses).mean(), tokens_BL

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Image in [-1, 1] -> tokens [B, L], int64, scale after scale, each in raster order."""
        return self.quantize(self.features(image_BCHW))[0]

    @torch.no_grad()
    def decode(self, x_B: Tensor) -> Tensor:
        """Tokens [B, L], or a feature map f_hat -> image in [-1, 1]."""
        f_hat = x_B if x_B.is_floating_point() else self.replay(x_B)[0]
        return self.decoder(self.from_features(f_hat)).float().clamp(-1, 1)

    @torch.no_grad()
    def teacher(self, tokens_BL: Tensor) -> Tensor:
        """Tokens [B, L] -> the generator's teacher inputs for the tokens after the first, [B, L-1, E]."""
        return self.replay(tokens_BL)[1]

    def replay(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """All scales in turn: tokens [B, L] -> (f_hat, teacher inputs [B, L-1, E])."""
        f_hat, teachers = self.start(len(tokens_BL)), []
        for scale, tokens_Bl in enumerate(tokens_BL.split([side**2 for side in self.config.scales], dim=1)):
            f_hat, teacher_BlE = self.advance(f_hat, tokens_Bl, scale)
            teachers.append(teacher_BlE)
        return f_hat, torch.cat(teachers, dim=1)

    def start(self, B: int) -> Tensor:
        """f_hat before the first scale: zeros, fp32."""
        side = self.config.scales[-1]
        return torch.zeros(B, self.config.z_channels, side, side, device=self.codebook.weight.device)

    def advance(self, f_hat: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Adds one scale to f_hat; returns it and the teacher inputs of the next scale, [B, l, E] (after the last, l = 0).

        codes: tokens [B, l], or the shares of all codes in a blend of them [B, l, V].
        """
        with torch.autocast(f_hat.device.type, enabled=False):
            config, side, last = self.config, self.config.scales[scale], len(self.config.scales) - 1
            vectors_BlE = codes @ self.codebook.weight if codes.is_floating_point() else self.codebook(codes)
            vectors_BEhw = rearrange(vectors_BlE, "B (h w) E -> B E h w", h=side)
            h = F.interpolate(vectors_BEhw, size=f_hat.shape[-2:], mode="bicubic")  # exactly the identity at the last scale
            f_hat = f_hat + (1 - config.quant_resi) * h + config.quant_resi * self.phis[self.phi_index(scale)](h)
            return f_hat, self.vectors(f_hat, scale + 1) if scale < last else vectors_BlE[:, :0]

    def quantize(self, f: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Feature map -> tokens [B, L] and f_hat after each scale; the gradient reaches the codebook and phi, never f."""
        f_hat, tokens, f_hats = self.start(len(f)), [], []
        codebook_VE = self.codebook.weight.detach()
        with torch.autocast(f.device.type, enabled=False):
            for scale in range(len(self.config.scales)):
                residual_BlE = self.vectors((f - f_hat).detach(), scale)
                # |z - e|^2 without |z|^2, which is the same for all codes.
                distance_BlV = codebook_VE.square().sum(1) - 2 * residual_BlE @ codebook_VE.T
                tokens.append(distance_BlV.argmin(-1))
                f_hat, _ = self.advance(f_hat, tokens[-1], scale)
                f_hats.append(f_hat)
        return torch.cat(tokens, dim=1), f_hats

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Image in [-1, 1] -> feature map, fp32. Raises UserError where the image is not of the tokenizer's size."""
        config = self.config
        wanted = (config.img_channels, config.img_resolution, config.img_resolution)
        if image_BCHW.shape[1:] != wanted:
            found, reads = ("x".join(map(str, shape)) for shape in (image_BCHW.shape[1:], wanted))
            raise UserError(f"the images are {found} but this tokenizer reads {reads}; resize them or choose another tokenizer")
        return self.to_features(self.encoder(image_BCHW)).float()

    def vectors(self, f: Tensor, scale: int) -> Tensor:
        """A map at a scale's size, by averaging over areas (the last scale is the map itself): [B, l, E]."""
        return rearrange(F.interpolate(f, size=self.config.scales[scale], mode="area"), "B E h w -> B (h w) E")

    def phi_index(self, scale: int) -> int:
        """Of N convolutions, evenly placed on [1/(3N), 1 - 1/(3N)], the one nearest to the scale's place on [0, 1].

        In integers, with ties going up: for ten scales two places are exact ties, and 0 0 1 1 1 2 2 3 3 3 is published.
        """
        N, K = self.config.share_quant_resi, max(len(self.config.scales) - 1, 1)
        return (2 * (N - 1) * (3 * N * scale - K) + K * (3 * N - 2)) // (2 * K * (3 * N - 2))


RENAMES = (
    (r"\.(up|down)\.(\d+)\.resample\.1", r".\1.\2.\1sample.conv"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0", ".mid.block_1"),
    (r"\.middle\.1", ".mid.attn_1"),
    (r"\.middle\.2", ".mid.block_2"),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^codebook", "quantize.embedding"),
    (r"^phis", "quantize.quant_resi.qresi_ls"),
    (r"^to_features", "quant_conv"),
    (r"^from_features", "post_quant_conv"),
)
IGNORED = ("ema_vocab_hit_SV",)  # published entries that we do not keep: how often each code was used in training


def infer_vqvae(shape: Shapes) -> VQVAEConfig:
    levels = shape.count("encoder.down.#.block.0.conv1.weight")
    widths = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    num_scales = shape["quantize.ema_vocab_hit_SV"][0] if "quantize.ema_vocab_hit_SV" in shape else len(VQVAEConfig.scales)
    vocab_size, z_channels = shape["quantize.embedding.weight"]
    return VQVAEConfig(
        img_channels=shape["encoder.conv_in.weight"][1],
        ch=math.gcd(*widths),
        ch_mult=tuple(width // math.gcd(*widths) for width in widths),
        num_res_blocks=shape.count("encoder.down.0.block.#.conv1.weight", times=levels),
        z_channels=z_channels,
        vocab_size=vocab_size,
        scales=next((s for s in SCALES if len(s) == num_scales), ()),
        share_quant_resi=shape.count("quantize.quant_resi.qresi_ls.#.weight"),
    )


def counters(config: VQVAEConfig) -> dict[str, Tensor]:
    return {"quantize.ema_vocab_hit_SV": torch.zeros(len(config.scales), config.vocab_size)}


PUBLISHED = Published("quantize.embedding.weight", infer_vqvae, RENAMES, IGNORED, counters)
