"""Published files of VAR, its VQVAE and EDM2: read without running anything in them, and what network they hold.

A published file is a state dict: entry name -> tensor. What kind of network it is, and its size, follow from names and shapes.
L tokens of all scales; D width.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mclr.errors import UserError
from models import var, vqvae
from models.convert import NameOf, load_published
from models.edm2 import EDM2, EDM2Config, edm2_published_name
from models.var import VAR, VARConfig, var_published_name
from models.vqvae import VQVAE, VQVAEConfig, vqvae_published_name

SUFFIXES = (".pth", ".pt", ".safetensors")
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES = (SCALES_256, SCALES_512, (1, 2, 3, 4))
EDM2_LICENCE = "published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use"


def read_published(src: Path, settings: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """(network of ours, what its description must say) of a published file. settings: key=value, what names and shapes do not show.

    Raises UserError for a file that is no whole known network.
    """
    state_dict = read_state_dict(src)
    family = family_of(state_dict, src)
    try:
        config = family.infer(Shapes.of(state_dict))
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{src} is no whole {family.net.__name__}: {error}; copy it again, or give another file") from error
    for setting in settings:
        config = changed(config, setting)
    if isinstance(config, VARConfig | VQVAEConfig):
        check_tokens(config)
    try:
        net = family.net(config)
    except UserError as error:
        # all that a network of read shapes can object to
        raise UserError(f"{error}: the file does not show the right one, give channels_per_head=N") from error
    load_published(net, state_dict, family.name_of, family.ignored)
    return net, {"licence": EDM2_LICENCE} if family.kind == "edm2" else {}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without what wrappers put before its names. Code in a file is never run.

    Raises UserError for anything else than a readable file of named tensors.
    """
    if path.suffix == ".pkl":
        raise UserError(
            f"{path} is a pickle, which carries code, and this version cannot read one safely: where its code is trusted, "
            "load it there, save its state dict with torch.save(net.state_dict(), 'net.pth'), and convert that"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no published state dict: give a file that ends in {', '.join(SUFFIXES)}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a published state dict") from error
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the two readers raise almost anything
        raise UserError(
            f"{path} is damaged, or holds more than tensors (code in a file is never run): copy it again, or save the state "
            "dict of the network alone"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        content = content["trainer"].get("var_wo_ddp")  # a checkpoint of VAR's trainer
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} is no state dict (entry name -> tensor): save the state dict of the network alone")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): t for name, t in content.items()}


def infer_var(shape: "Shapes") -> VARConfig:
    _, L, D = shape["pos_1LC"]
    l2_norm = "blocks.0.attn.scale_mul_1H11" in shape
    return VARConfig(
        num_classes=shape["class_emb.weight"][0] - 1,
        depth=shape.count("blocks.#.attn.mat_qkv.weight"),
        embed_dim=D,
        num_heads=shape["blocks.0.attn.scale_mul_1H11"][1] if l2_norm else D // 64,
        patch_nums=next((s for s in SCALES if sum(side**2 for side in s) == L), ()),
        vocab_size=shape["head.weight"][0],
        z_channels=shape["word_embed.weight"][1],
        mlp_ratio=shape["blocks.0.ffn.fc1.weight"][0] / D,
        shared_aln="shared_ada_lin.1.weight" in shape,
        attn_l2_norm=l2_norm,
    )


def infer_vqvae(shape: "Shapes") -> VQVAEConfig:
    levels = shape.count("encoder.down.#.block.0.conv1.weight")
    widths = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    num_scales = shape["quantize.ema_vocab_hit_SV"][0] if "quantize.ema_vocab_hit_SV" in shape else len(SCALES_256)
    return VQVAEConfig(
        img_channels=shape["encoder.conv_in.weight"][1],
        ch=math.gcd(*widths),
        ch_mult=tuple(width // math.gcd(*widths) for width in widths),
        num_res_blocks=shape.count("encoder.down.0.block.#.conv1.weight"),
        z_channels=shape["quantize.embedding.weight"][1],
        vocab_size=shape["quantize.embedding.weight"][0],
        scales=next((s for s in SCALES if len(s) == num_scales), ()),
        share_quant_resi=shape.count("quantize.quant_resi.qresi_ls.#.weight"),
    )


def infer_edm2(shape: "Shapes") -> EDM2Config:
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
        num_blocks=shape.count(f"unet.enc.{resolutions[0]}x{resolutions[0]}_block#.conv_res1.weight"),
        attn_resolutions=tuple(r for r in resolutions if f"unet.enc.{r}x{r}_block0.attn_qkv.weight" in shape),
        logvar_channels=shape["logvar_fourier.freqs"][0],
    )


def var_constants(config: VARConfig) -> dict[str, Tensor]:
    """Scale of every token [1, L], additive attention mask [1, 1, L, L], and the keys' bias, zero."""
    scale_L = torch.tensor([k for k, side in enumerate(config.patch_nums) for _ in range(side**2)])
    mask_LL = torch.where(scale_L[:, None] >= scale_L, 0.0, -torch.inf)
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(config.embed_dim) for i in range(config.depth)}
    return {"lvl_1L": scale_L[None], "attn_bias_for_masking": mask_LL[None, None], **zeros}


def vqvae_constants(config: VQVAEConfig) -> dict[str, Tensor]:
    """How often each code was used at each scale in training, which we do not record."""
    return {"quantize.ema_vocab_hit_SV": torch.zeros(len(config.scales), config.vocab_size)}


@dataclass(frozen=True)
class Family:
    """One kind of published network. mark: an entry that no other kind has. ignored: endings of entries that we do not keep."""

    kind: str
    net: Callable[..., nn.Module]
    mark: str
    infer: Callable[["Shapes"], Any]
    name_of: NameOf
    ignored: tuple[str, ...] = ()
    constants: Callable[[Any], dict[str, Tensor]] = lambda config: {}


FAMILIES = (
    Family("var", VAR, "pos_1LC", infer_var, var_published_name, var.IGNORED, var_constants),
    Family("vqvae", VQVAE, "quantize.embedding.weight", infer_vqvae, vqvae_published_name, vqvae.IGNORED, vqvae_constants),
    Family("edm2", EDM2, "unet.out_gain", infer_edm2, edm2_published_name),
)
TRAINING = ("dropout", "drop_path", "beta")  # settings that say nothing about the network in use


def family_of(state_dict: Mapping[str, Tensor], path: Path) -> Family:
    family = next((family for family in FAMILIES if family.mark in state_dict), None)
    if family is None:
        names = ", ".join(list(state_dict)[:3])
        raise UserError(
            f"{path} is no published VAR, VQVAE or EDM2 (its entries: {names}, ...): give a state dict of one of them"
        )
    return family


def check_tokens(config: VARConfig | VQVAEConfig) -> None:
    """Raises UserError where what the file does not show is missing or does not fit."""
    scales, key = (config.patch_nums, "patch_nums") if isinstance(config, VARConfig) else (config.scales, "scales")
    if not scales:
        raise UserError(f"the sides of its scales are none of the published ones: give them, as in '{key}=[1, 2, 3, 4]'")
    if isinstance(config, VARConfig) and config.embed_dim % config.num_heads:
        raise UserError(f"{config.num_heads} heads cannot share a width of {config.embed_dim}: give num_heads=...")


def changed(config: Any, setting: str) -> Any:
    """The config with one field replaced; its value must be of the type that the field has."""
    key, equals, text = setting.partition("=")
    fields = dataclasses.asdict(config)
    if not equals or key not in fields:
        raise UserError(f"{setting!r} is no setting of this network: give key=value, where key is one of {', '.join(fields)}")
    try:
        value: Any = json.loads(text)
    except ValueError:
        raise UserError(f"{setting!r}: the value is no number or list of numbers in brackets") from None
    wanted = type(fields[key])
    value = float(value) if wanted is float and type(value) is int else tuple(value) if type(value) is list else value
    whole = not isinstance(value, tuple) or all(type(entry) is int and entry > 0 for entry in value)
    if type(value) is not wanted or not whole or (wanted is int and value < 1):
        example = ", as in [1, 2, 3, 4]" if wanted is tuple else ""
        raise UserError(f"{setting!r}: {key} must be like {json.dumps(fields[key])}{example}")
    return dataclasses.replace(config, **{key: value})


class Shapes(dict[str, tuple[int, ...]]):
    """Entry name -> shape of a state dict; a missing name is a LookupError that says so."""

    @staticmethod
    def of(state_dict: Mapping[str, Tensor]) -> "Shapes":
        return Shapes({name: tuple(t.shape) for name, t in state_dict.items()})

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise LookupError(f"{name} is missing")

    def numbers(self, names: str) -> list[int]:
        """The different numbers at the first # of entries that are named like this, rising; # stands for any number."""
        pattern = re.escape(names).replace(r"\#", r"(\d+)")
        found = sorted({int(match[1]) for name in self if (match := re.fullmatch(pattern, name))})
        if not found:
            raise LookupError(f"entries like {names} are missing")
        return found

    def count(self, names: str) -> int:
        return len(self.numbers(names))
