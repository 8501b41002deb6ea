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
ARGUMENTS = {"label_dim" if name == "num_classes" else name: name for name in HINTS}
WITHOUT_EFFECT = (
    "use_fp16",
    "resample_filter",
)  # use_fp16 belongs to a run; of resample_filter there is [1, 1] alone, checked below
SHOWN = ("img_resolution", "img_channels", "num_classes", "num_blocks")  # options that shapes always show


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
        refuse(f"holds a network whose {group} are damaged")
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
    found: dict[str, Any] = {name: getattr(shown, name) for name in SHOWN}
    for _, part in parts(network):
        given, heads, width = (part.state.get(name) for name in ("_init_kwargs", "num_heads", "out_channels"))
        records = [part.state, given if type(given) is dict else {}]
        # 0 heads: a block without attention
        if type(heads) is type(width) is int and heads > 0:
            records.append({"channels_per_head": width // heads})
        for record in records:
            if record.get("resample_filter", [1, 1]) != [1, 1]:
                refuse("records another resample_filter than this EDM2 has, [1, 1]", "give another file")
            for name, option in ((name, option) for name, option in ARGUMENTS.items() if name in record):
                value = tuple(record[name]) if type(record[name]) is list else record[name]
                if not fits(value, HINTS[option]):
                    refuse(f"records a {option} that no EDM2 has")
                if found.setdefault(option, value) != value:
                    refuse(f"records {name} {value}, elsewhere it has {found[option]}")
    return EDM2Config(**found)
