"""The model section, one per paradigm: the network, its weights, what it reads."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mclr.configs.schema.section import Blocks, Dropout, Fraction, MaybeSizes, Positive, Section, Size, Sizes

VAE_FACTOR = 8  # pixels per latent along a side (train/data/encoders.py, Latents)


class DiffusionNet(Section):
    """models.edm2.EDM2Config without what the data decides."""

    model_channels: Size = 192
    channel_mult: Sizes = (1, 2, 3, 4)
    channel_mult_noise: Size | None = None
    channel_mult_emb: Size | None = None
    num_blocks: Blocks = 3
    attn_resolutions: MaybeSizes = (16, 8)
    channels_per_head: Size = 64
    label_balance: Fraction = 0.5
    concat_balance: Fraction = 0.5
    res_balance: Fraction = 0.3
    attn_balance: Fraction = 0.3
    dropout: Dropout = 0.0
    clip_act: Positive = 256.0
    logvar_channels: Size = 128


class NextScaleNet(Section):
    """models.var.VARConfig without what the tokenizer and the data decide. Not given: width 64 * depth, as many heads as depth."""

    depth: Blocks
    # get: an invalid depth is absent here, and reported by itself
    embed_dim: Annotated[int, Field(gt=0, le=2**16, default_factory=lambda net: 64 * net.get("depth", 1))]
    num_heads: Annotated[int, Field(gt=0, default_factory=lambda net: net.get("depth", 1))]
    mlp_ratio: Positive = 4.0
    shared_aln: bool = False
    attn_l2_norm: bool = True
    norm_eps: Positive = 1e-6
    drop_path: Dropout = 0.0

    @model_validator(mode="after")
    def _check(self) -> "NextScaleNet":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}")
        return self


class Posterior(Section):
    """The noise-conditional classifier p(c | x_t) behind the contrasts posterior and weighted."""

    weights: str | None = None  # weights; None: from scratch, in the same job
    backbone: str | None = None  # timm's name of a ConvNeXt, for images of 16 pixels or more; None: our small network
    channels: Size = 32  # of our small network
    lr: Positive = 0.001
    # from scratch: images that it learns from before there is any ratio; the network learns by maximum likelihood meanwhile
    warmup_images: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "Posterior":
        if self.backbone is not None and self.channels != type(self).model_fields["channels"].default:
            raise ValueError(f"channels={self.channels} has no effect with backbone={self.backbone}, which has its own widths")
        return self


class DiffusionModel(Section):
    name: str
    paradigm: Literal["diffusion"]
    net: DiffusionNet
    weights: str | None = None  # what train/weights/folder.py finds by name; None: from scratch
    class_map: str | None = (
        None  # of weights' classes: JSON file {name here: condition there}, fresh or same; None: refused if others
    )
    vae: str | None = None  # folder of a diffusers AutoencoderKL, or hf://ORG/REPO, for latents; None: pixels
    noise_mean: float = -0.4  # of ln sigma in training
    noise_std: Positive = 1.0
    sigma_data: Positive = 0.5
    posterior: Posterior = Posterior()


class NextScaleModel(Section):
    name: str
    paradigm: Literal["next_scale"]
    net: NextScaleNet
    weights: str | None = None  # what train/weights/folder.py finds by name; None: from scratch
    class_map: str | None = (
        None  # of weights' classes: JSON file {name here: condition there}, fresh or same; None: refused if others
    )
    tokenizer: str  # what train/weights/folder.py finds by name


MODELS: dict[str, type[Section]] = {"diffusion": DiffusionModel, "next_scale": NextScaleModel}
