"""EDM2's pickled networks: the tensors of one, and the options that it was made with.

Their modules keep attributes as torch's do, and record what their constructors were given (`_init_kwargs`). The source of their classes,
which they carry too, is never looked at.
"""

from collections.abc import Iterator
from typing import Any

from mclr.configs.schema import fits
from mclr.models.options import EDM2Config, hints_of
from mclr.train.weights.unpickler import Module, View, refuse

LONGEST = 200  # letters of an entry's name; EDM2's have 36
MANY = 2000  # parts of a network, or entries of one part; a published EDM2 has about 250
# EDM2's arguments and our options: the same names, but for one
HINTS = hints_of(EDM2Config)
ARGUMENTS = {name: name for name in HINTS}
ARGUMENTS["label_dim"] = ARGUMENTS.pop("num_classes")
WITHOUT_EFFECT = ("use_fp16", "resample_filter")  # a matter of the run; checked to be the only one that we have


def parts(network: Module) -> Iterator[tuple[str, Module]]:
    """(prefix of its entries, part) of a network: itself first, then its parts, depth first."""
    seen: set[int] = set()
    todo = [("", network)]
    while todo:
        prefix, part = todo.pop()
        if type(part) is not Module or id(part) in seen or len(prefix) > LONGEST or len(seen) > MANY:
            refuse("holds a network that is no tree of parts")
        seen.add(id(part))
        yield prefix, part
        todo += reversed([(f"{prefix}{name}.", inner) for name, inner in _group(part, "_modules")])


def entries_of(network: Module) -> dict[str, View]:
    """Entry name -> tensor: parameters and buffers, as the state dict of the network would name them."""
    found: dict[str, View] = {}
    for prefix, part in parts(network):
        for name, view in [*_group(part, "_parameters"), *_group(part, "_buffers")]:
            if type(view) is not View:
                refuse(f"holds no tensor at {prefix + name!r}")
            found[prefix + name] = view
        if len(found) > MANY:
            refuse(f"holds a network of more than {MANY} entries, which no published one has")
    return found


def _group(part: Module, group: str) -> list[tuple[str, Any]]:
    members = part.state.get(group, {})
    if type(members) is not dict or len(members) > MANY or not all(type(n) is str and len(n) <= LONGEST for n in members):
        refuse(f"holds a network whose {group} are none")
    return [(name, member) for name, member in members.items() if member is not None]


def recorded_edm2(network: Module, shown: EDM2Config) -> EDM2Config:
    """The options of a pickled network: what it and its parts were given or keep; else the published defaults, which are ours.

    shown: what the shapes of the weights show. Raises Refused where two of these contradict one another.
    """
    if type(given := network.state.get("_init_kwargs")) is not dict:
        refuse("does not record the options of its network", "convert its state dict instead")
    unknown = [str(name)[:LONGEST] for name in given if name not in (*ARGUMENTS, *WITHOUT_EFFECT)]
    if unknown:
        refuse(f"records the option {unknown[0]!r}, which this EDM2 does not have", "give another file")
    required = {name: getattr(shown, name) for name in ("img_resolution", "img_channels", "num_classes")}
    found: dict[str, Any] = {}
    for _, part in parts(network):
        given, heads, width = (part.state.get(name) for name in ("_init_kwargs", "num_heads", "out_channels"))
        records = [part.state, given if type(given) is dict else {}]
        # 0 heads: a block without attention
        if type(heads) is type(width) is int and heads > 0:
            records.append({"channels_per_head": width // heads})
        for name, option in ARGUMENTS.items():
            for value in (record[name] for record in records if name in record):
                value = _option(option, value)
                if found.setdefault(option, value) != value:
                    refuse(f"records both {found[option]} and {value} as {name}")
        for value in (record["resample_filter"] for record in records if "resample_filter" in record):
            if type(value) is not list or value != [1, 1]:
                refuse("records another resample_filter than this EDM2 has, [1, 1]", "give another file")
    result = EDM2Config(**required | found)
    weights = _shown_by_shapes(shown)
    for what, value in _shown_by_shapes(result).items():
        if value != weights[what]:
            refuse(f"records {what} {value}, but its weights have {weights[what]}")
    return result


def _option(name: str, value: Any) -> Any:
    """A recorded value as the config wants it. Raises Refused for what no network can have."""
    value = tuple(value) if type(value) is list else value
    if not fits(value, HINTS[name]):
        refuse(f"records a {name} that no EDM2 has")
    return float(value) if type(getattr(EDM2Config, name, None)) is float else value


def _shown_by_shapes(config: EDM2Config) -> dict[str, Any]:
    """What two configurations of the same shapes agree on."""
    unit, levels = config.model_channels, [config.img_resolution >> i for i in range(len(config.channel_mult))]
    return {
        "img_resolution": config.img_resolution,
        "img_channels": config.img_channels,
        "label_dim": config.num_classes,
        "channels": [unit * mult for mult in config.channel_mult],
        "noise channels": unit * (config.channel_mult_noise or config.channel_mult[0]),
        "embedding channels": unit * (config.channel_mult_emb or max(config.channel_mult)),
        "num_blocks": config.num_blocks,
        "attn_resolutions": [level for level in levels if level in config.attn_resolutions],
        "logvar_channels": config.logvar_channels,
    }
