"""Finds the state dict of one network in files of any ending: plain or wrapped, in a checkpoint, in shards, beside its average."""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mclr.errors import UserError
from mclr.models.registry import NETWORKS
from mclr.train.system.files import checksum
from mclr.train.weights.edm2_pickle import LONGEST, MANY, entries_of
from mclr.train.weights.torch_file import read
from mclr.train.weights.unpickler import AGAIN, ALONE, Module, Refused, View, refuse

MAX_HEADER = 4 << 20  # bytes of what a safetensors file says of its entries; published: 0.1 MB
# patterns of weights in a folder; the first that matches counts
IN_FOLDERS = (
    "*.index.json",
    "model.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "*.bin",
    "*.pth",
    "*.pt",
    "*.ckpt",
    "*.pkl",
)
SHARD = re.compile(r"-\d+-of-(\d+)\.")
AVERAGED = {"ema", "avg", "average", "averaged", "swa", "polyak"}  # words in the keys of averaged weights
# what wrappers put into the names of entries: the first two lines anywhere, the last at the beginning
INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = re.compile(r"^(?:(?:module|model|net)\.)+")
NAMED = 8  # keys that a message names
CHOICES = {"taken", "left out", "names"}  # notes on what was read of a file
LONGEST_LICENCE = 1000  # characters
LICENCE = "licence"  # key in the metadata of a safetensors file, member of an archive of torch.save


@dataclass
class Found:
    """The entries of a network by name; the pickled network that they come from (EDM2's); notes: what was chosen, for the user.

    licence: what `mclr convert` wrote into the file, "" for none; None in a file of another program.
    """

    entries: dict[str, Tensor]
    pickled: Module | None
    notes: dict[str, str]
    licence: str | None


def find_state_dict(src: Path, key: str | None = None) -> Found:
    """The state dict of the network in `src`: a file of any ending, an index of shards, or a folder of either.

    Of several networks, those that we know are preferred to others, generators to tokenizers, averaged weights to raw ones.
    key: takes the network under this key instead.
    Raises Refused and OSError for anything else than readable files of named tensors.
    """
    files = files_of(src)
    content, *shards = [_read(file) for file in files]
    if not all(isinstance(each, dict) for each in (content, *shards) if shards):
        refuse("is in shards that are no state dicts", ALONE)
    for shard in shards:
        content |= shard
    networks = networks_in(content)
    taken, notes = _choice(networks, key)
    network = networks[taken]
    entries = _tensors(_entries(network), sum(file.stat().st_size for file in files))
    if taken == "" and isinstance(content, dict) and len(content) > len(entries):
        notes["left out"] = listed(name for name in content if name not in entries)
    bare, wrappers = unwrapped(entries)
    if wrappers:
        notes["names"] = f"without {', '.join(wrappers)}"
    return Found(bare, network if isinstance(network, Module) else None, notes, _licence(files[0]))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The one state dict in a file, without what wrappers put before its names. Raises UserError for any other file."""
    with faults_of(path):
        return find_state_dict(path).entries


@contextmanager
def faults_of(src: Path, kind: str = "") -> Iterator[None]:
    """Raise what is wrong with a file as a UserError that names it.

    kind: of the network in it; with that, every other error means that the file is no whole one.
    """
    try:
        yield
    except Refused as error:
        raise UserError(f"{src} {error}") from error
    except UserError as error:
        raise UserError(f"{src}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {src} ({error.strerror}): give a published state dict, or weights of ours") from error
    # shapes that fit nothing make torch raise almost anything
    except Exception as error:
        if not kind:
            raise
        raise UserError(f"{src} is no whole {kind}: {error}; copy it again, or give another file") from error


def files_of(src: Path) -> list[Path]:
    """The files of weights at `src`: itself, the shards that an index names, or what a folder holds. Raises Refused and OSError."""
    if src.is_dir():
        files = next(filter(None, (sorted(src.glob(pattern)) for pattern in IN_FOLDERS)), [])
        if not files:
            refuse("is a folder without weights", "give a file")
        shards = {int(match[1]) if (match := SHARD.search(file.name)) else 0 for file in files}
        if shards != {len(files)} and (len(files) > 1 or shards != {0}):
            refuse(f"does not hold one file or all shards of one network ({listed(f.name for f in files)})", "give one file")
        return files_of(files[0]) if len(files) == 1 else files
    if not src.name.endswith(".index.json"):
        if src.exists() and not src.is_file():
            refuse("is no file", "give a published state dict")
        return [src]
    with open(src, "rb") as file:
        text = file.read(MAX_HEADER)
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
        files = [src.parent / name for name in names if Path(name).name == name]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"is no index of shards: {AGAIN}") from error
    missing = [name for name in names if not (src.parent / name).is_file()]
    if missing or not files or len(files) < len(names):
        refuse(f"names shards that are not beside it ({listed(missing or names)})", "download them too")
    return files


def holds_weights(folder: Path) -> bool:
    """Whether files_of finds something in a folder."""
    return any(any(folder.glob(pattern)) for pattern in IN_FOLDERS)


def checksum_of(src: Path) -> str:
    """sha256 of a file, or of the checksums of all files that `src` stands for. Raises UserError for files that cannot be read."""
    with faults_of(src):
        sums = [checksum(file) for file in files_of(src)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _read(path: Path) -> Any:
    """The content of one file, by what is in it: endings are often wrong."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(200)
    if not head:
        refuse("is empty", AGAIN)
    if head.startswith(b"\x1f\x8b"):
        refuse("is compressed by gzip", "unpack it")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        if head.startswith(b"version https://git-lfs"):
            refuse("is a pointer of git-lfs, not the file itself", "fetch that with `git lfs pull`")
        if head.lstrip().startswith(b"<"):
            refuse("is a web page", "download the file itself, not the page about it")
        refuse(f"is text ({str(head[:40], 'utf-8', 'replace')!r}), no weights", "download the file itself")
    if head[8:9] != b"{":
        return read(path)
    header = int.from_bytes(head[:8], "little")
    if header > MAX_HEADER:
        refuse(f"is damaged (a header of {header} bytes)", AGAIN)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        what = "incomplete" if size < 8 + header or "incomplete" in str(error) else "damaged"
        raise Refused(f"is {what} ({error}): {AGAIN}") from error


def _licence(file: Path) -> str | None:
    """Found.licence of a file. Raises Refused where it is no short text."""
    with open(file, "rb") as opened:
        head = opened.read(9)
        if head[8:] == b"{":
            with safe_open(file, "pt") as tensors:
                text = (tensors.metadata() or {}).get(LICENCE)
        elif head.startswith(b"PK"):
            text = _member(opened)
        else:
            return None
    if text is not None and not (len(text) <= LONGEST_LICENCE and (text + " ").isprintable()):
        refuse("holds a licence that is no line of text", AGAIN)
    return text


def _member(opened: IO[bytes]) -> str | None:
    """The licence in an archive of torch.save."""
    # the checksums of the archive are read here alone
    try:
        with zipfile.ZipFile(opened) as archive:
            name = f"{archive.namelist()[0].partition('/')[0]}/{LICENCE}"
            if name not in archive.namelist():
                return None
            with archive.open(name) as member:
                return member.read(LONGEST_LICENCE + 1).decode()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"holds a damaged licence ({error}): {AGAIN}") from error


def kind_in(entries: Mapping[str, Any]) -> str | None:
    """The kind of published network that has entries of these names, a key of models.registry.NETWORKS."""
    return next((kind for kind, each in NETWORKS.items() if each.published and each.published.mark in entries), None)


def networks_in(content: Any) -> dict[str, Any]:
    """Key -> network (Module, or dict of named tensors): the content itself under "", else those in it and one level below.

    Raises Refused where there is none.
    """
    judged: dict[int, bool] = {}  # by id: one object may be there many times

    def is_network(part: Any) -> bool:
        if id(part) not in judged:
            named = isinstance(part, dict) and all(type(k) is str and isinstance(v, View | Tensor) for k, v in part.items())
            judged[id(part)] = isinstance(part, Module) or (named and bool(part))
        return judged[id(part)]

    if is_network(content):
        return {"": content}
    content = content if isinstance(content, dict) else {}
    found, opened = {}, set()
    for key, part in content.items():
        if is_network(part):
            found[str(key)] = part
        elif isinstance(part, dict) and id(part) not in opened:
            opened.add(id(part))
            found |= {f"{key}.{inner}": value for inner, value in part.items() if is_network(value)}
    if sum(isinstance(part, Module) for part in found.values()) > NAMED:
        refuse("holds too many networks", "save one alone")
    tensors = {name: value for name, value in content.items() if isinstance(value, View | Tensor)}
    if not (found or tensors):
        refuse("is no state dict (entry name -> tensor)", ALONE)
    return found or {"": tensors}


def _is_averaged(key: str) -> bool:
    return not AVERAGED.isdisjoint(re.split(r"[^a-z]+", key.lower()))


def _choice(networks: Mapping[str, Any], key: str | None) -> tuple[str, dict[str, str]]:
    """(key of the network to take, what to say of the choice). Raises Refused where it is not clear, or there is none under `key`."""
    if key is not None and key not in networks:
        refuse(f"holds no network under {key!r}, but {listed(networks)}", "give one of these by --weights-key")
    # by id: one object may be there many times
    parts = {id(part): part for part in networks.values()} if len(networks) > 1 else {}
    kinds: dict[int, str | None] = {}
    for number, part in parts.items():
        # a damaged network may lie beside the one that is wanted
        with suppress(Refused):
            kinds[number] = kind_in(unwrapped(_entries(part))[0])
    known = {name: kind for name, part in networks.items() if (kind := kinds.get(id(part)))}
    useful = list(known or networks)
    generators = [name for name, kind in known.items() if NETWORKS[kind].paradigm] or useful
    averaged = [name for name in generators if _is_averaged(name)] or generators
    if key is None and len(averaged) > 1:
        refuse(f"holds {len(averaged)} networks ({listed(averaged)})", "choose by `mclr convert FILE FOLDER --weights-key KEY`")
    taken = averaged[0] if key is None else key
    others = [name for name in useful if name != taken]
    if not (others or _is_averaged(taken)):
        return taken, {}
    kind = "averaged weights" if _is_averaged(taken) else "weights"
    beside = f"; also there: {listed(others)} (mclr convert --weights-key KEY takes them)" if others else ""
    return taken, {"taken": f"the {kind} under {taken!r}{beside}"}


def listed(names: Iterable[Any]) -> str:
    names = [repr(str(name)[:LONGEST]) for name in names]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _entries(network: Any) -> dict[str, Any]:
    """The entries of a network by the names in the file. Raises Refused for names that no network has."""
    entries = entries_of(network) if isinstance(network, Module) else network
    if len(entries) > MANY:
        refuse(f"has {len(entries)} entries, more than any published network", ALONE)
    if not all(type(name) is str and name.isascii() and name.isprintable() and len(name) <= LONGEST for name in entries):
        refuse("has entries of impossible names")
    return entries


def _tensors(entries: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """size: bytes of the file. Raises Refused where the tensors are empty or larger: a number under many names asks for any memory."""
    storages = {id(entry.storage): entry.storage for entry in entries.values() if isinstance(entry, View)}
    too_large = ("has entries that are larger than the file", ALONE)
    if sum(storage.nbytes for storage in storages.values()) > size:
        refuse(*too_large)
    tensors = {name: entry.tensor() if isinstance(entry, View) else entry for name, entry in entries.items()}
    if sum(t.nbytes for t in tensors.values()) > size:
        refuse(*too_large)
    empty = [name for name, t in tensors.items() if 0 in t.shape]
    if empty or not tensors:
        refuse(f"has no numbers{' at ' + repr(empty[0]) if empty else ''}")
    return tensors


def unwrapped(entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(entries without what wrappers put into their names, what that was)."""
    bare, wrappers = {}, set[str]()
    for name, t in entries.items():
        inner = INNER.sub("", name)
        short = OUTER.sub("", inner)
        bare[short] = t
        wrappers |= {*INNER.findall(name), *inner.removesuffix(short).split(".")} - {""} if short != name else set()
    if len(bare) < len(entries):
        refuse("has entries of the same name, with and without module.", ALONE)
    return bare, sorted(f"{wrapper.rstrip('.')}." for wrapper in wrappers)
