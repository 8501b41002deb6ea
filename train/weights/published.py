"""Published files of VAR, its VQVAE and EDM2: which network they hold, and how that becomes one of ours.

Kind and size follow from the names and shapes of entries; the pickled networks of EDM2 also record their options.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclr.configs.schema import fits
from mclr.errors import UserError
from mclr.models.convert import Shapes, misfits
from mclr.models.options import DiTConfig, EDM2Config, VARConfig, hints_of
from mclr.models.registry import NETWORKS
from mclr.train.weights.edm2_pickle import recorded_edm2
from mclr.train.weights.state_dict import faults_of, find_state_dict, kind_in, listed
from mclr.train.weights.unpickler import refuse

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EDM2_LICENCE = "published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use"
DIT_LICENCE = "published DiT weights and all weights made from them: CC BY-NC 4.0, not for commercial use"
LICENCES = {"edm": EDM2_LICENCE, "ddpm": DIT_LICENCE, "flow": "MIT, as REPA", "flow_to_data": "MIT, as SiT"}

# options that a file may not show, as they may be given
LIKE = {"patch_nums": [1, 2, 3, 4], "scales": [1, 2, 3, 4], "form": "ddpm"}


def read_published(
    src: Path, settings: Sequence[str] = (), weights_key: str | None = None, ignore_extra: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """(network of ours, what its description must say) of a published file, an index of shards or a folder of either.

    settings: key=value, what names and shapes do not show. weights_key: takes the network under this key of a checkpoint.
    ignore_extra: leaves out entries that the network does not have. A file that `mclr convert` wrote says its licence; an EDM2 in any
    other file has EDM2's.
    Raises UserError for a file that is no whole known network.
    """
    with faults_of(src):
        found = find_state_dict(src, weights_key)
        entries, notes = found.entries, found.notes
        kind = kind_in(entries)
        if kind is None:
            names = ", ".join(list(entries)[:3])
            refuse(
                f"is no published EDM2, DiT, SiT, VAR or VQVAE (its entries: {names}, ...)", "give a state dict of one of them"
            )
    network, published = NETWORKS[kind], NETWORKS[kind].published
    name = network.net.__name__
    with faults_of(src, name):
        config = published.infer(Shapes.of(entries))
        if found.pickled is not None and network.config is EDM2Config:
            config = recorded_edm2(found.pickled, config)
            if settings:
                refuse("records the options of its network", f"leave out {settings[0]}")
        for setting in settings:
            config = changed(config, setting)
        _refuse_hidden(config)
        # sizes from a file can ask for any amount of memory; without memory, every entry is compared with them first
        with torch.device("meta"):
            known = published.entries(network.net(config))
        extra = [entry for entry in entries if entry not in known and not entry.endswith(published.ignored)]
        own = {entry: t for entry, t in entries.items() if entry not in extra}
        if extra and ignore_extra:
            entries, notes["left out"] = own, listed(extra)
        if wrong := misfits(known, entries, published.ignored):
            superfluous = not misfits(known, own, published.ignored)
            way_out = "leave out what is unexpected by `mclr convert --ignore-extra`" if superfluous else "give a whole file"
            refuse(f"looks like {network.about[0].lower()}{network.about[1:]}, but {wrong}", way_out)
        net = network.net(config)
        for entry, weight in published.entries(net).items():
            if entries[entry].dtype not in WEIGHTS:
                refuse(f"holds {entries[entry].dtype} at {entry}, no weights", "get the file in fp16, bf16 or fp32")
            # one by one: a copy of the whole file would be as large as the network
            weight.copy_(entries[entry])
            if not weight.isfinite().all():
                refuse(f"holds NaN or infinite numbers at {entry}", "copy the file again, or give weights of an earlier step")
    unsaid = LICENCES.get(getattr(config, "form", kind), "")
    licence = unsaid if found.licence is None else found.licence
    return net, notes | ({"licence": licence} if licence else {})


def _refuse_hidden(config: Any) -> None:
    """Raises Refused for options that the file does not show, or that make no network."""
    for key in ("patch_nums", "scales"):
        if getattr(config, key, None) == ():
            refuse(
                "has scales of other sides than the published ones",
                f"give them to `mclr convert`, as in '{key}=[1, 2, 3, 4]'",
            )
    if getattr(config, "form", None) == "":
        refuse("does not show whether it is a DiT or a SiT", "give form=ddpm or form=flow_to_data to `mclr convert`")
    for fault in (
        config.misfits(config, getattr(config, "img_resolution", None)) if isinstance(config, VARConfig | DiTConfig) else ()
    ):
        refuse(f"shows {fault}", "give num_heads=... to `mclr convert`")


def changed(config: Any, setting: str) -> Any:
    """The config with one option replaced. setting: key=value, the value in JSON and as the option declares it."""
    key, equals, text = setting.partition("=")
    hints = hints_of(type(config))
    if not equals or key not in hints:
        raise UserError(f"{setting!r} is no setting of this network: give key=value, where key is one of {', '.join(hints)}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = tuple(value) if type(value) is list else value
    if not fits(value, hints[key]):
        raise UserError(f"{setting!r}: {key} must be like {json.dumps(getattr(config, key) or LIKE[key])}, and in its range")
    return dataclasses.replace(config, **{key: value})
