"""The model section, one class per paradigm: the network, its weights, and what turns images into its input."""

from typing import Annotated, Literal

from pydantic import Field

from mclr.configs.schema.section import Count, Dropout, Fraction, Positive, Section, Size, Whole, setting

VAE_FACTOR = 8  # pixels per latent along a side (train/data/encoders.py, Latents)

# lists in YAML, tuples here: configs are constants
Widths = Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=16)]
Resolutions = Annotated[tuple[Size, ...], Field(strict=False)]


class DiffusionNet(Section):
    """The options of models.edm2.EDM2Config that the data does not decide."""

    model_channels: Size = setting(192, "Unit of all widths")
    channel_mult: Widths = setting((1, 2, 3, 4), "Width of each level, in units; each level has half the resolution")
    channel_mult_noise: Size | None = setting(None, "Width of the noise features, in units; null: that of the first level")
    channel_mult_emb: Size | None = setting(None, "Width of the embedding, in units; null: that of the widest level")
    num_blocks: int = setting(3, "Blocks per level of the encoder; the decoder has one more", gt=0, le=100)
    attn_resolutions: Resolutions = setting((16, 8), "Resolutions whose blocks have attention")
    channels_per_head: Size = setting(64, "Channels of an attention head")
    label_balance: Fraction = setting(0.5, "Share of the condition in its sum with the noise embedding")
    concat_balance: Fraction = setting(0.5, "Share of the skip connection in the input of a decoder block")
    res_balance: Fraction = setting(0.3, "Share of the residual branch in its sum with the main path")
    attn_balance: Fraction = setting(0.3, "Share of attention in its sum with the main path")
    dropout: Dropout = setting(0.0, "Dropout in the residual branch")
    clip_act: Positive = setting(256.0, "Activations are clipped to plus and minus this after every block")
    logvar_channels: Size = setting(128, "Noise features of the learned log-variance")


class NextScaleNet(Section):
    """The options of models.var.VARConfig that neither the tokenizer nor the data decides."""

    depth: int = setting(..., "Number of blocks", gt=0, le=100)
    # get: an invalid depth is absent here; it has a message of its own
    embed_dim: Size = Field(default_factory=lambda net: 64 * net.get("depth", 1), description="Width; not given: 64 x depth")
    num_heads: Count = Field(default_factory=lambda net: net.get("depth", 1), description="Attention heads; not given: depth")
    mlp_ratio: Positive = setting(4.0, "Width of the feed-forward layers, in widths of the network")
    shared_aln: bool = setting(False, "One adaptive LayerNorm projection for all blocks, as VAR has it at 512 pixels")
    attn_l2_norm: bool = setting(True, "Queries and keys have unit length, with a learned temperature per head")
    norm_eps: Positive = setting(1e-6, "Epsilon of LayerNorm")
    drop_path: Dropout = setting(0.0, "Stochastic depth of the last block; it rises linearly from 0 at the first")


class Posterior(Section):
    """The noise-conditional classifier p(c | x_t) of the contrasts posterior and weighted."""

    weights: str | None = setting(None, "Weights of the classifier; null: trained from scratch with the run")
    backbone: str | None = setting(None, "A ConvNeXt by timm's name, for sides of 16 or more; null: our small network")
    channels: Size = setting(32, "Width of our small network")
    lr: Positive = setting(0.001, "Learning rate of the classifier")
    warmup_images: Whole = setting(
        0, "From scratch: images that the classifier sees first; the network learns by maximum likelihood meanwhile"
    )


class _Model(Section):
    """What the models of all paradigms have."""

    name: str = setting(..., "Name in logs and model cards")
    weights: str | None = setting(
        None, "Where training starts: weights folder, run, bundled name, published file or hf://ORG/REPO; null: from scratch"
    )
    class_map: str | None = setting(
        None,
        "Classes of the weights: JSON file {class here: condition there, or null}, `fresh` or `same`; null: others are refused",
    )


class DiffusionModel(_Model):
    """A diffusion model: EDM2 on pixels or latents."""

    paradigm: Literal["diffusion"] = setting(..., "Kind of model")
    net: DiffusionNet
    vae: str | None = setting(None, "Encoder of latents: folder of a diffusers AutoencoderKL or hf://ORG/REPO; null: pixels")
    noise_mean: float = setting(-0.4, "Mean of ln sigma in training")
    noise_std: Positive = setting(1.0, "Standard deviation of ln sigma in training")
    sigma_data: Positive = setting(0.5, "Standard deviation of the data")
    posterior: Posterior = Posterior()


class NextScaleModel(_Model):
    """A next-scale model: VAR on tokens."""

    paradigm: Literal["next_scale"] = setting(..., "Kind of model")
    net: NextScaleNet
    tokenizer: str = setting(..., "Weights of the tokenizer: a folder, bundled name or published file")


MODELS: dict[str, type[Section]] = {"diffusion": DiffusionModel, "next_scale": NextScaleModel}
