"""Published files of VAR, its VQVAE and EDM2: read without running anything in them, and what network they hold.

A published file is a state dict: entry name -> tensor. What kind of network it is, and its size, follow from names and shapes; the
pickled networks of EDM2 (.pkl) also record their options. In this order: networks out of files; the state dict in a file; configurations
from shapes; options from pickles; the kinds of networks; settings of the user.
L tokens of all scales; D width.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mclr.errors import UserError
from mclr.models.convert import Shapes, load_published, to_published
from mclr.models.options import EDM2Config, VARConfig, VQVAEConfig
from mclr.models.registry import NETWORKS, Network
from mclr.train.weights import unpickler as pickles
from mclr.train.weights.edm2_pickle import LONGEST, MANY, entries_of, recorded_edm2
from mclr.train.weights.unpickler import Module, Refused, View, refuse

SUFFIXES = (".pth", ".pt", ".safetensors")  # of state dicts, which are also written
READABLE = (*SUFFIXES, ".pkl")
WRAPPERS = ("ema", "net", "model", "state_dict")  # under which checkpoints keep a network
MAX_HEADER = 4 << 20  # bytes of what a safetensors file says of its entries; published: 0.1 MB
WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EDM2_SIZES = {64: "xxs", 128: "xs", 192: "s", 256: "m", 320: "l", 384: "xl", 448: "xxl"}  # by model_channels
EDM2_LICENCE = "published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use"


def read_published(src: Path, settings: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """(network of ours, what its description must say) of a published file. settings: key=value, what names and shapes do not show.

    Raises UserError for a file that is no whole known network.
    """
    entries, pickled = _read(src)
    family = family_of(entries, src)
    kind, published = family.net.__name__, family.published
    try:
        config = published.infer(Shapes.of(entries))
        likely = size_of(config)
        if pickled is not None and family.config is EDM2Config:
            config = recorded_edm2(pickled, config)
    except Refused as error:
        raise UserError(f"{src} {error}") from error
    except UserError as error:
        raise UserError(f"{src}: {error}") from error
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{src} is no whole {kind}: {error}; copy it again, or give another file") from error
    if pickled is not None and settings and family.config is EDM2Config:
        raise UserError(f"{src} records the options of its network: leave out {settings[0]}")
    for setting in settings:
        config = changed(config, setting)
    if isinstance(config, VARConfig | VQVAEConfig):
        check_tokens(config, src)
    try:
        # sizes from a file can ask for any amount of memory; without memory, every entry is compared with them first
        with torch.device("meta"):
            skeleton = family.net(config)
    except UserError as error:
        # all that a network of read shapes can object to
        raise UserError(f"{src}: {error}: the file does not show the right one, give channels_per_head=N") from error
    except Exception as error:  # shapes that fit nothing make torch raise almost anything
        raise UserError(f"{src} is no whole {kind}: {error}; copy it again, or give another file") from error
    try:
        shapes = {name: torch.empty(t.shape, device="meta") for name, t in entries.items()}
        load_published(skeleton, shapes, published.name_of, published.ignored)
    except UserError as error:
        raise UserError(f"{src} looks like {likely}, but {error}") from error
    for name in to_published(skeleton, published.name_of):
        if entries[name].dtype not in WEIGHTS:
            raise UserError(f"{src}: {name} holds {entries[name].dtype}, no weights: get the file in fp16, bf16 or fp32")
    net = family.net(config)
    for name, weight in to_published(net, published.name_of).items():
        # one by one: a copy of the whole file would be as large as the network
        weight.copy_(_tensor(entries[name]))
        if not weight.isfinite().all():
            raise UserError(
                f"{src}: {name} holds NaN or infinite numbers: copy the file again, or give weights of an earlier step"
            )
    return net, {"licence": EDM2_LICENCE} if family.config is EDM2Config else {}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without what wrappers put before its names. Code in a file is never run.

    Raises UserError for anything else than a readable file of named tensors.
    """
    return {name: _tensor(entry) for name, entry in _read(path)[0].items()}


def _tensor(entry: View | Tensor) -> Tensor:
    return entry.tensor() if isinstance(entry, View) else entry


def _read(path: Path) -> tuple[dict[str, View | Tensor], Module | None]:
    """(entries of the state dict, the network that they were found in where the file is an EDM2's pickle)."""
    if not path.exists() and path.suffix not in READABLE:
        raise UserError(f"there is nothing at {path}: give a published state dict, or weights of ours")
    if path.suffix not in READABLE:
        raise UserError(f"{path} is no published state dict: give a file that ends in {', '.join(READABLE)}")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: give a published state dict")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(200)
        foreign(head)
        # by content: endings are often wrong
        content: Any = _read_safetensors(path, head, size) if head[8:9] == b"{" else pickles.read(path)
        network = the_network(content)
        entries: Any = entries_of(network) if isinstance(network, Module) else network
        return _checked(entries, size), network if isinstance(network, Module) else None
    except Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a published state dict") from error


def _checked(entries: Mapping[str, View | Tensor], size: int) -> dict[str, View | Tensor]:
    """Entries without what wrappers put before their names. size: of the file, in bytes. Raises Refused for what no network has."""
    if len(entries) > MANY:
        refuse(f"has {len(entries)} entries, more than any published network", "save the state dict of the network alone")
    if not all(name.isascii() and name.isprintable() and len(name) <= LONGEST for name in entries):
        refuse("has entries of impossible names")
    empty = [name for name, t in entries.items() if 0 in t.shape]
    if empty or not entries:
        refuse(f"has no numbers{' at ' + repr(empty[0]) if empty else ''}")
    # the same numbers under many names would ask for any amount of memory
    if sum(math.prod(t.shape) * t.dtype.itemsize for t in entries.values()) > size:
        refuse("has entries that are larger than the file", "save the state dict of the network alone")
    bare = {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in entries.items()}
    if len(bare) < len(entries):
        refuse("has entries of the same name, with and without module.", "save the state dict of the network alone")
    return bare


def foreign(head: bytes) -> None:
    """Raises Refused for the first bytes of what is often found in the place of weights."""
    if not head:
        refuse("is empty", "download it again")
    if head.startswith(b"\x1f\x8b"):
        refuse("is compressed by gzip", "unpack it")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        if head.startswith(b"version https://git-lfs"):
            refuse("is a pointer of git-lfs, not the file itself", "fetch that with `git lfs pull`")
        if head.lstrip().startswith(b"<"):
            refuse("is a web page", "download the file itself, not the page about it")
        refuse(f"is text ({str(head[:40], 'utf-8', 'replace')!r}), no weights", "download the file itself")


def _read_safetensors(path: Path, head: bytes, size: int) -> dict[str, Tensor]:
    header = int.from_bytes(head[:8], "little")
    if header > MAX_HEADER:
        refuse(f"is damaged (a header of {header} bytes)", "download it again")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        what = "incomplete" if size < 8 + header or "incomplete" in str(error) else "damaged"
        raise Refused(f"is {what} ({error}): download it again") from error


def the_network(content: Any) -> Any:
    """The one network in a file: a state dict or a Module, as it is or in a checkpoint. Raises Refused where there is none, or several."""

    def is_network(part: Any) -> bool:
        named = isinstance(part, dict) and all(type(k) is str and isinstance(v, View | Tensor) for k, v in part.items())
        return isinstance(part, Module) or (named and bool(part))

    if is_network(content):
        return content
    found = {}
    if isinstance(content, dict):
        trainer = content.get("trainer")
        inside = {key: content.get(key) for key in WRAPPERS}
        inside["trainer"] = trainer.get("var_wo_ddp") if isinstance(trainer, dict) else None  # of VAR
        found = {key: part for key, part in inside.items() if is_network(part)}
    if len(found) > 1:
        refuse(f"holds {len(found)} networks ({', '.join(found)})", "save the state dict of one alone")
    if not found:
        refuse("is no state dict (entry name -> tensor)", "save the state dict of the network alone")
    return found.popitem()[1]


def size_of(config: Any) -> str:
    """What a network of this size is likely to be: the name of the published one where there is one."""
    if isinstance(config, VARConfig):
        return f"var-d{config.depth}{'-s' * config.shared_aln}"
    if isinstance(config, VQVAEConfig):
        return f"vae_ch{config.ch}v{config.vocab_size}z{config.z_channels}"
    size = EDM2_SIZES.get(config.model_channels) if config.img_resolution == 64 else None
    if size is None:
        return f"an EDM2 of {config.model_channels} channels at {config.img_resolution}x{config.img_resolution}"
    return f"edm2-img{512 if config.img_channels == 4 else 64}-{size}"


def family_of(entries: Mapping[str, View | Tensor], path: Path) -> Network:
    family = next((each for each in NETWORKS.values() if each.published and each.published.mark in entries), None)
    if family is None:
        names = ", ".join(list(entries)[:3])
        raise UserError(
            f"{path} is no published VAR, VQVAE or EDM2 (its entries: {names}, ...): give a state dict of one of them"
        )
    return family


def check_tokens(config: VARConfig | VQVAEConfig, path: Path) -> None:
    """Raises UserError where what the file does not show is missing or does not fit."""
    scales, key = (config.patch_nums, "patch_nums") if isinstance(config, VARConfig) else (config.scales, "scales")
    if not scales:
        raise UserError(f"{path}: the sides of its scales are none of the published ones: give them, as in '{key}=[1, 2, 3, 4]'")
    if isinstance(config, VARConfig) and (config.num_heads < 1 or config.embed_dim % config.num_heads):
        raise UserError(f"{path}: {config.num_heads} heads cannot share a width of {config.embed_dim}: give num_heads=...")


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
