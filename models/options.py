"""The options of every network, with their ranges. Without torch and pydantic, so that importing them costs nothing.

What a run decides by its data and its encoder (GIVEN, below) comes first in each class; a preset sets the rest as model.net.
"""

# ruff: noqa: RUF009  option() makes constants
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_origin, get_type_hints


class Within:
    """The range of a number, or the length of a list: gt, ge, lt, le, min_length, max_length. pydantic reads it (configs/schema)."""

    def __init__(self, **limits: float):
        self.limits = limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        # a list in YAML is a tuple here, also where types are strict
        return handler(source) | self.limits | ({"strict": False} if get_origin(source) is tuple else {})


Size = Annotated[int, Within(gt=0, le=2**16)]  # of images and layers
Blocks = Annotated[int, Within(gt=0, le=100)]
Conditions = Annotated[int, Within(ge=0, lt=2**31)]
Positive = Annotated[float, Within(gt=0)]
NotNegative = Annotated[float, Within(ge=0)]
Fraction = Annotated[float, Within(ge=0, le=1)]
Dropout = Annotated[float, Within(ge=0, lt=1)]
Sizes = Annotated[tuple[Size, ...], Within(min_length=1, max_length=16)]
Form = Literal["ddpm", "flow", "flow_to_data"]
MaybeSizes = Annotated[tuple[Size, ...], Within(min_length=0, max_length=16)]

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the published token maps
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# what the data, the encoder and the paradigm of a run decide of its network
GIVEN = {
    "diffusion": ("img_resolution", "img_channels", "num_classes", "sigma_data", "strength_max"),
    "next_scale": ("num_classes", "vocab_size", "z_channels", "patch_nums", "strength_max"),
}
TRAINING = ("dropout", "drop_path", "beta")  # options that matter in training alone


def option(default: Any, meaning: str, follows: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """An option of model.net with its default (...: it must be given) and its meaning, for the table of settings in configs/.

    follows: for presets, the default out of the options before it.
    """
    return field(default=MISSING if default is ... else default, metadata={"meaning": meaning, "follows": follows})


class Options:
    """Base of the options of a network."""

    @staticmethod
    def misfits(net: Any, side: int | None) -> Iterator[str]:
        """What keeps options that are fine one by one from making a network; each text begins with a key under model.net.

        net: holds the options of model.net as attributes. side: of the samples, in cells; None: they are tokens.
        """
        yield from ()


# name -> type with its range, of every option of a config
hints_of = partial(get_type_hints, include_extras=True)


@dataclass(frozen=True)
class EDM2Config(Options):
    """EDM2 (models/edm2.py); the defaults are the published size S. References are to arXiv 2312.02696."""

    form = "edm"  # no option: every EDM2 has it
    img_resolution: Size = option(..., "Side of the images or latents; halved at every level after the first")
    img_channels: Size = option(..., "Channels of the images or latents")
    num_classes: Conditions = option(..., "Conditions; 0 builds an unconditional network")
    # width and depth (Figure 21)
    model_channels: Size = option(192, "Unit of all widths")
    channel_mult: Sizes = option((1, 2, 3, 4), "Width of each level, in units; each level has half the resolution")
    channel_mult_noise: Size | None = option(None, "Width of the noise features, in units; null: that of the first level")
    channel_mult_emb: Size | None = option(None, "Width of the embedding, in units; null: that of the widest level")
    num_blocks: Blocks = option(3, "Blocks per level of the encoder; the decoder has one more")
    attn_resolutions: MaybeSizes = option((16, 8), "Resolutions whose blocks have attention")
    channels_per_head: Size = option(64, "Channels of an attention head")
    # balance: share of the second operand in a sum (Eq. 88) or a concatenation (Eq. 103)
    label_balance: Fraction = option(0.5, "Share of the condition in its sum with the noise embedding")
    concat_balance: Fraction = option(0.5, "Share of the skip connection in the input of a decoder block")
    res_balance: Fraction = option(0.3, "Share of the residual branch in its sum with the main path")
    attn_balance: Fraction = option(0.3, "Share of attention in its sum with the main path")
    dropout: Dropout = option(0.0, "Dropout in the residual branch")
    clip_act: Positive = option(256.0, "Activations are clipped to plus and minus this after every block")
    # input scaling (Karras et al. 2022, arXiv 2206.00364, Table 1), learned uncertainty (Eq. 21)
    sigma_data: Positive = option(0.5, "Standard deviation of the data")
    strength_max: NotNegative = option(0.0, "Largest strength of the dial (models/dial.py); 0: no dial")
    logvar_channels: Size = option(128, "Noise features of the learned log-variance")

    @staticmethod
    def misfits(net: Any, side: int | None) -> Iterator[str]:
        assert side is not None
        halvings = len(net.channel_mult) - 1
        if side % 2**halvings:
            yield f"channel_mult: a side of {side} cannot be halved {halvings} times"
            return
        channels = {side >> level: net.model_channels * mult for level, mult in enumerate(net.channel_mult)}
        have = ", ".join(map(str, channels))
        for resolution in net.attn_resolutions:
            if resolution not in channels:
                yield f"attn_resolutions: {resolution} is not a resolution of this net ({have})"
        # the middle of the net always has attention
        for resolution in {*net.attn_resolutions, side >> halvings} & channels.keys():
            if channels[resolution] % net.channels_per_head:
                have = f"the {channels[resolution]} channels at resolution {resolution}"
                yield f"channels_per_head={net.channels_per_head} must divide {have}"


@dataclass(frozen=True)
class DiTConfig(Options):
    """DiT, SiT and REPA's SiT (models/dit.py): the size is that of the preset, as in DiT-XL/2. No file shows its form."""

    img_resolution: Size = option(..., "Side of the images or latents")
    img_channels: Size = option(..., "Channels of the images or latents")
    num_classes: Conditions = option(..., "Conditions")
    form: Form = option(
        ..., "ddpm: answers the noise (DiT); flow: n - x, time 1 is noise (REPA); flow_to_data: x - n, time 1 is data (SiT)"
    )
    depth: Blocks = option(..., "Number of blocks")
    embed_dim: Size = option(..., "Width")
    num_heads: Size = option(..., "Attention heads")
    patch_size: Size = option(2, "Side of a patch")
    mlp_ratio: Positive = option(4.0, "Width of the feed-forward layers, in widths of the network")
    variance: bool = option(
        True, "The network answers twice the channels: form ddpm learns a variance from them, a flow ignores them"
    )
    projector_sizes: MaybeSizes = option((), "Outputs of REPA's projectors, which are kept unused")
    projector_dim: Size = option(2048, "Width of REPA's projectors")
    strength_max: NotNegative = option(0.0, "Largest strength of the dial (models/dial.py); 0: no dial")

    @staticmethod
    def misfits(net: Any, side: int | None) -> Iterator[str]:
        assert side is not None
        if side % net.patch_size:
            yield f"patch_size={net.patch_size} must divide the side of {side}"
        for name, factor in (("num_heads", net.num_heads), ("a quarter of it", 4)):
            if net.embed_dim % factor:
                yield f"embed_dim={net.embed_dim} must be a multiple of {factor} ({name})"


@dataclass(frozen=True)
class VARConfig(Options):
    """VAR (models/var.py). The published network for 512 px (d36-s) has shared_aln and larger scales."""

    num_classes: Conditions = option(..., "Conditions")
    depth: Blocks = option(..., "Number of blocks")
    embed_dim: Size = option(..., "Width; not given: 64 x depth", follows=lambda net: 64 * net.get("depth", 1))
    num_heads: Size = option(..., "Attention heads; not given: depth", follows=lambda net: net.get("depth", 1))
    patch_nums: Sizes = option(SCALES_256, "Side of each scale, in tokens")
    vocab_size: Size = option(4096, "Codes")
    z_channels: Size = option(32, "Width of a code vector")
    mlp_ratio: Positive = option(4.0, "Width of the feed-forward layers, in widths of the network")
    shared_aln: bool = option(False, "One adaptive LayerNorm projection for all blocks, as VAR has it at 512 pixels")
    attn_l2_norm: bool = option(True, "Queries and keys have unit length, with a learned temperature per head")
    norm_eps: Positive = option(1e-6, "Epsilon of LayerNorm")
    drop_path: Dropout = option(0.0, "Stochastic depth of the last block; it rises linearly from 0 at the first")
    strength_max: NotNegative = option(0.0, "Largest strength of the dial (models/dial.py); 0: no dial")

    @staticmethod
    def misfits(net: Any, side: int | None) -> Iterator[str]:
        if net.embed_dim % net.num_heads:
            yield f"embed_dim={net.embed_dim} must be a multiple of model.net.num_heads={net.num_heads}"


@dataclass(frozen=True)
class VQVAEConfig(Options):
    """VAR's tokenizer. The defaults are the published one at 256 px; at 512 px only the scales differ."""

    img_channels: Size = 3
    ch: Size = 160  # channels of the highest resolution
    ch_mult: Sizes = (1, 1, 2, 2, 4)  # channels of each resolution in units of ch; each step halves the size
    num_res_blocks: Blocks = 2  # per resolution in the encoder, one more in the decoder
    z_channels: Size = 32  # width of a code vector
    vocab_size: Size = 4096
    scales: Sizes = SCALES_256  # side of each scale; the last is the side of the feature map
    share_quant_resi: Blocks = 4  # number of phi convolutions that the scales share
    quant_resi: Fraction = 0.5  # share of phi's convolution in its output
    beta: Positive = 0.25  # weight of the commitment term

    @property
    def widths(self) -> list[int]:
        """Channels of each resolution, the highest first."""
        return [self.ch * mult for mult in self.ch_mult]

    @property
    def img_resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.scales[-1] << (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ImageClassifierConfig(Options):
    """channels times channel_mult gives the width at each resolution, finest first (multiples of 8); the last one is D.

    The defaults suit 8 x 8 digits (D = 64, 77k parameters); models.features.channel_mult_for gives what suits other images.
    """

    img_channels: Size
    num_classes: Conditions
    channels: Size = 32
    channel_mult: Sizes = (1, 2)


@dataclass(frozen=True)
class NoiseClassifierConfig(ImageClassifierConfig):
    """sigma_data is the standard deviation of the clean data, emb_channels is E (even).

    backbone: a ConvNeXt by timm's name instead of our blocks; channels and channel_mult say nothing then.
    """

    emb_channels: Size = 32
    sigma_data: Positive = 0.5
    backbone: str | None = None
