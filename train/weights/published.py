"""Published files of VAR, its VQVAE and EDM2: which network they hold, of which size, and how that becomes one of ours.

Kind and size follow from the names and shapes of entries; the pickled networks of EDM2 also record their options.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclr.errors import UserError
from mclr.models.convert import Shapes, load_published, published_entries, to_published
from mclr.models.options import EDM2Config, VARConfig, VQVAEConfig
from mclr.models.registry import NETWORKS
from mclr.train.weights.edm2_pickle import recorded_edm2
from mclr.train.weights.state_dict import find_state_dict, kind_in, listed
from mclr.train.weights.unpickler import Refused

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EDM2_SIZES = {64: "xxs", 128: "xs", 192: "s", 256: "m", 320: "l", 384: "xl", 448: "xxl"}  # by model_channels
EDM2_LICENCE = "published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use"


def read_published(
    src: Path, settings: Sequence[str] = (), weights_key: str | None = None, ignore_extra: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """(network of ours, what its description must say) of a published file, an index of shards or a folder of either.

    settings: key=value, what names and shapes do not show. weights_key: takes the network under this key of a checkpoint.
    ignore_extra: leaves out entries that the network does not have.
    Raises UserError for a file that is no whole known network.
    """
    found = find_state_dict(src, weights_key)
    entries, notes = found.entries, found.notes
    kind = kind_in(entries)
    if kind is None:
        names = ", ".join(list(entries)[:3])
        raise UserError(f"{src} is no published VAR, VQVAE or EDM2 (its entries: {names}, ...): give a state dict of one of them")
    network, published = NETWORKS[kind], NETWORKS[kind].published
    with _faults_of(src, network.net.__name__):
        config = published.infer(Shapes.of(entries))
        likely = size_of(config)
        if found.pickled is not None and network.config is EDM2Config:
            config = recorded_edm2(found.pickled, config)
            if settings:
                raise UserError(f"it records the options of its network: leave out {settings[0]}")
        for setting in settings:
            config = changed(config, setting)
        check_tokens(config)
        # sizes from a file can ask for any amount of memory; without memory, every entry is compared with them first
        with torch.device("meta"):
            skeleton = network.net(config)
    known = published_entries(skeleton, published.name_of)
    extra = [name for name in entries if name not in known and not name.endswith(published.ignored)] if ignore_extra else []
    if extra:
        notes["left out"] = listed(extra)
        entries = {name: t for name, t in entries.items() if name not in extra}
    try:
        shapes = {name: torch.empty(t.shape, device="meta") for name, t in entries.items()}
        load_published(skeleton, shapes, published.name_of, published.ignored)
    except UserError as error:
        # all that the network has is there, and fits
        more = all(name in entries and entries[name].shape == t.shape for name, t in known.items())
        raise UserError(
            f"{src} looks like {likely}, but {error}{', or leave out what is unexpected by `mclr convert --ignore-extra`' * more}"
        ) from error
    net = network.net(config)
    for name, weight in to_published(net, published.name_of).items():
        if entries[name].dtype not in WEIGHTS:
            raise UserError(f"{src}: {name} holds {entries[name].dtype}, no weights: get the file in fp16, bf16 or fp32")
        # one by one: a copy of the whole file would be as large as the network
        weight.copy_(entries[name])
        if not weight.isfinite().all():
            raise UserError(
                f"{src}: {name} holds NaN or infinite numbers: copy the file again, or give weights of an earlier step"
            )
    return net, notes | ({"licence": EDM2_LICENCE} if network.config is EDM2Config else {})


@contextmanager
def _faults_of(src: Path, kind: str) -> Iterator[None]:
    """What a file that is no whole network leads to becomes a UserError."""
    try:
        yield
    except Refused as error:
        raise UserError(f"{src} {error}") from error
    except UserError as error:
        raise UserError(f"{src}: {error}") from error
    # shapes that fit nothing make torch raise almost anything
    except Exception as error:
        raise UserError(f"{src} is no whole {kind}: {error}; copy it again, or give another file") from error


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


def check_tokens(config: Any) -> None:
    """Raises UserError where what the file of a VAR or VQVAE does not show is missing or does not fit."""
    key = "patch_nums" if isinstance(config, VARConfig) else "scales"
    if isinstance(config, VARConfig | VQVAEConfig) and not getattr(config, key):
        raise UserError(
            f"the sides of its scales are none of the published ones: give them to `mclr convert`, as in '{key}=[1, 2, 3, 4]'"
        )
    if isinstance(config, VARConfig) and (config.num_heads < 1 or config.embed_dim % config.num_heads):
        raise UserError(
            f"{config.num_heads} heads cannot share a width of {config.embed_dim}: give num_heads=... to `mclr convert`"
        )


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
