"""Pickled tensors, read without running anything in them: EDM2's networks, and the two layouts of torch.save.

A pickle is a program for a small stack machine that can import and call whatever it names. Here the machine is our own: it knows the
opcodes of ACTIONS alone, a name stays text, and a call is a look-up in CALLS, whose functions only sort their arguments into the
records below. The bytes of storages stay where they are in the mapped file; everything else may be SCRIPT bytes long, so that neither
time nor memory of reading exceeds what an honest file of that size takes. Opcodes: the standard library's pickletools.
"""

import math
import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

SCRIPT = 1 << 20  # bytes of a file beside its storages; the largest published file has about a fifth
LINE = 256  # bytes of a name
ARGUMENTS = 8  # of a call; numpy and torch pass 7 at most
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's, before zip archives
DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Name:
    """What a file names: module and function or class, as text."""

    text: str


@dataclass(eq=False, slots=True)
class Module:
    """A network, or a part of one: the name of its class and its attributes."""

    kind: str
    state: dict[str, Any]


@dataclass(eq=False, slots=True)
class Storage:
    """A stretch of numbers in the file; place: its bytes, known when the storages have been found."""

    dtype: torch.dtype
    numel: int
    place: memoryview | None = None


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A tensor that is not made yet: extents within a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (type(self.storage) is Storage and type(self.shape) is type(self.stride) is tuple):
            refuse("holds a tensor without storage or shape")
        extents = (self.offset, *self.shape, *self.stride)
        if not len(self.shape) == len(self.stride) <= 8 or not all(type(n) is int and 0 <= n < 1 << 40 for n in extents):
            refuse("holds a tensor of no possible shape")
        numel, limit = math.prod(self.shape), self.storage.numel
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if numel > limit or (numel and last >= limit):
            refuse("holds a tensor that reaches beyond its storage")

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def tensor(self) -> Tensor:
        """Over the bytes of the file where they are aligned, as torch needs them; else a copy."""
        assert self.storage.place is not None and 0 not in self.shape, "a tensor without bytes"
        raw, width = torch.frombuffer(self.storage.place, dtype=torch.uint8), self.dtype.itemsize
        if raw.data_ptr() % width == 0:
            return raw.view(self.dtype).as_strided(self.shape, self.stride, self.offset)
        steps = (*(step * width for step in self.stride), 1)
        raw = raw.as_strided((*self.shape, width), steps, self.offset * width).clone(memory_format=torch.contiguous_format)
        return raw.view(self.dtype).squeeze(-1)


class Inert:
    """An object that no network needs (of numpy, a device, a set): known to be there, and no more."""


def _persistent(meta: Any) -> Module:
    """EDM2's wrapper around a class; meta also has the source of its module, which stays unread."""
    if not (type(meta) is dict and type(kind := meta.get("class_name")) is str and type(state := meta.get("state")) is dict):
        refuse("holds a network without class or state")
    return Module(kind, state)


def _inert(*arguments: Any) -> Inert:
    return Inert()


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": lambda *of: View(*of[:4]),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.Size": lambda size: size,
    **dict.fromkeys(("torch.device", "builtins.set", "__builtin__.set", "_codecs.encode", "numpy.dtype"), _inert),
    **{f"numpy.{core}.multiarray.{name}": _inert for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
}
EMBEDDED = "torch.storage._load_from_bytes"  # a stream of torch.save within the pickle
PARTS = "torch.nn.modules."  # classes of parts, whatever their names
ALLOWED = {*CALLS, EMBEDDED, *DTYPES, "numpy.ndarray", *map(str, (torch.float16, torch.bfloat16, torch.float32, torch.float64))}


def read(path: Path) -> Any:
    """What a pickle or a file of torch.save holds: dicts, lists, numbers, text, and Module and View for networks and tensors.

    Raises Refused for a damaged file, and for one that names anything outside of ALLOWED.
    """
    with open(path, "rb") as file:
        # a private mapping: torch wants memory that it may write to, and no write reaches the file
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    try:
        return _read_archive(data) if data[:4] == b"PK\3\4" else _read_streams(Script(data))
    # what damaged bytes lead to in ACTIONS
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise Refused(f"is damaged ({type(error).__name__} in its pickle): download it again") from error


class Refused(Exception):
    """What a file does, as the predicate of a sentence about it."""


def refuse(what: str, way_out: str = "get it again from its publisher") -> NoReturn:
    raise Refused(f"{what}: {way_out}")


@dataclass
class Script:
    """The bytes of a file, read from `at` on; those that are no storage count against SCRIPT."""

    data: memoryview
    at: int = 0
    left: int = SCRIPT

    def take(self, count: int) -> memoryview:
        self.left -= count
        if self.left < 0:
            refuse(f"holds more than {SCRIPT >> 20} MiB beside its tensors, which no published network does")
        return self.data[(place := self.skip(count)) : place + count]

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin, which stay unread."""
        place = self.at
        if count > len(self.data) - place:
            refuse("is incomplete (it ends in the middle of its contents)", "download it again")
        self.at += count
        return place

    def number(self, form: str) -> Any:
        """One number, as struct writes it."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]


class Machine:
    """Reads one pickle from a script. calls: by name; storage: what a persistent id stands for, None where none may occur."""

    def __init__(self, script: Script, calls: dict[str, Callable[..., Any]], storage: Callable[[Any], Storage] | None = None):
        self.script, self.calls, self.storage = script, calls, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        while (code := self.script.take(1)[0]) != pickle.STOP[0]:
            action = ACTIONS.get(code)
            if action is None:
                refuse(
                    f"asks for what no published network needs (pickle opcode {bytes([code])!r}); nothing in a file is ever run"
                )
            action(self)
        (content,) = self.stack
        return content

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def pop_mark(self) -> tuple[Any, ...]:
        mark = self.marks.pop()
        return self.pop(len(self.stack) - mark) if len(self.stack) > mark else ()

    def text(self, form: str) -> str:
        return str(self.script.take(self.script.number(form)), "utf-8")

    def place(self, form: str) -> slice:
        """Of bytes, which stay in the file."""
        count = self.script.number(form)
        start = self.script.skip(count)
        return slice(start, start + count)

    def line(self) -> str:
        start = self.script.at
        text, newline, _ = bytes(self.script.data[start : start + LINE]).partition(b"\n")
        self.script.take(len(text) + 1)
        if not newline:
            refuse("holds a name without end")
        return str(text, "utf-8")

    def frame(self) -> None:
        start, count = self.script.at + 8, self.script.number("<Q")
        # a frame only says how much can be read at once
        self.script.skip(count)
        self.script.at = start

    def put(self, index: int) -> None:
        # what writers do; other places would let a few bytes ask for any amount of memory
        if index != len(self.memo):
            refuse("numbers its objects out of order")
        self.memo.append(self.stack[-1])

    def append(self, values: tuple[Any, ...]) -> None:
        if type(target := self.stack[-1]) is not list:
            refuse("appends to what is no list")
        target += values

    def set_items(self, values: tuple[Any, ...]) -> None:
        if type(target := self.stack[-1]) is not dict:
            refuse("sets items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # keys whose hash is quick, and not of the writer's choice
            if not (type(key) is str or (type(key) is int and 0 <= key < 1 << 31)):
                refuse("holds a dict whose keys are no names")
            target[key] = value

    def name(self, module: Any, name: Any) -> Name:
        known = type(module) is type(name) is str and len(module) + len(name) < LINE
        text = f"{module}.{name}" if known else "?"
        if text not in ALLOWED and not text.startswith(PARTS):
            refuse(f"holds code ({text!r}), which is never run, and no published network needs it")
        return Name(text)

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Name or type(arguments) is not tuple:
            refuse("calls what is no function")
        if function.text.startswith(PARTS) and arguments == ():
            return Module(function.text, {})
        # copied at every call
        if len(arguments) > ARGUMENTS:
            refuse(f"calls {function.text!r} with more arguments than any takes")
        if function.text not in self.calls:
            refuse(f"calls {function.text!r} where no published network does")
        return self.calls[function.text](*arguments)

    def build(self, target: Any, state: Any) -> None:
        """State of an object that was just made; our dicts and inert objects have none."""
        if type(target) is Module and type(state) is dict and not target.state:
            target.state = state
        elif type(target) not in (dict, Inert):
            refuse("gives a state to what has none")
        self.push(target)

    def persistent(self, identity: Any) -> Storage:
        if self.storage is None:
            refuse("refers to storages that it does not have")
        return self.storage(identity)


# fmt: off
_TABLE: dict[bytes, Callable[[Machine], None]] = {
    pickle.PROTO:            lambda m: m.script.number("B"),
    pickle.FRAME:            lambda m: m.frame(),
    pickle.MARK:             lambda m: m.marks.append(len(m.stack)),
    # constants and numbers
    pickle.NONE:             lambda m: m.push(None),
    pickle.NEWTRUE:          lambda m: m.push(True),
    pickle.NEWFALSE:         lambda m: m.push(False),
    pickle.BININT:           lambda m: m.push(m.script.number("<i")),
    pickle.BININT1:          lambda m: m.push(m.script.number("B")),
    pickle.BININT2:          lambda m: m.push(m.script.number("<H")),
    pickle.LONG1:            lambda m: m.push(int.from_bytes(m.script.take(m.script.number("B")), "little", signed=True)),
    pickle.BINFLOAT:         lambda m: m.push(m.script.number(">d")),
    # text and bytes
    pickle.BINUNICODE:       lambda m: m.push(m.text("<I")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text("B")),
    pickle.BINBYTES:         lambda m: m.push(m.place("<I")),
    pickle.SHORT_BINBYTES:   lambda m: m.push(m.place("B")),
    # containers; a set is kept as a list
    pickle.EMPTY_TUPLE:      lambda m: m.push(()),
    pickle.EMPTY_LIST:       lambda m: m.push([]),
    pickle.EMPTY_SET:        lambda m: m.push([]),
    pickle.EMPTY_DICT:       lambda m: m.push({}),
    pickle.TUPLE1:           lambda m: m.push(m.pop(1)),
    pickle.TUPLE2:           lambda m: m.push(m.pop(2)),
    pickle.TUPLE3:           lambda m: m.push(m.pop(3)),
    pickle.TUPLE:            lambda m: m.push(m.pop_mark()),
    pickle.APPEND:           lambda m: m.append(m.pop(1)),
    pickle.APPENDS:          lambda m: m.append(m.pop_mark()),
    pickle.ADDITEMS:         lambda m: m.append(m.pop_mark()),
    pickle.SETITEM:          lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS:         lambda m: m.set_items(m.pop_mark()),
    # objects named before
    pickle.BINPUT:           lambda m: m.put(m.script.number("B")),
    pickle.LONG_BINPUT:      lambda m: m.put(m.script.number("<I")),
    pickle.MEMOIZE:          lambda m: m.put(len(m.memo)),
    pickle.BINGET:           lambda m: m.push(m.memo[m.script.number("B")]),
    pickle.LONG_BINGET:      lambda m: m.push(m.memo[m.script.number("<I")]),
    # names and calls
    pickle.GLOBAL:           lambda m: m.push(m.name(m.line(), m.line())),
    pickle.STACK_GLOBAL:     lambda m: m.push(m.name(*m.pop(2))),
    pickle.REDUCE:           lambda m: m.push(m.call(*m.pop(2))),
    pickle.NEWOBJ:           lambda m: m.push(m.call(*m.pop(2))),
    pickle.BUILD:            lambda m: m.build(*m.pop(2)),
    pickle.BINPERSID:        lambda m: m.push(m.persistent(*m.pop(1))),
}
# fmt: on
ACTIONS = {opcode[0]: action for opcode, action in _TABLE.items()}


def _storage(identity: Any) -> tuple[str, Storage]:
    """(key, storage) of torch.save's persistent id: ("storage", type, key, device, numel); streams add a view, which is None."""
    _, kind, key, _, numel, *view = identity
    if type(key) is not str or type(numel) is not int or numel < 0 or view not in ([], [None]):
        refuse("holds a storage of an unknown form")
    return key, Storage(DTYPES[kind.text if type(kind) is Name else ""], numel)


def _read_streams(script: Script, embedded: bool = False) -> Any:
    """One pickle, or what torch.save wrote before zip archives: five pickles, then numel and bytes of every storage.

    embedded: the latter as bytes within a pickle, which hold a storage and no more.
    """

    def load(place: Any) -> Any:
        if type(place) is not slice:
            refuse(f"calls {EMBEDDED!r} with no bytes")
        inner = Script(script.data[: place.stop], place.start, script.left)
        content = _read_streams(inner, embedded=True)
        script.left = inner.left
        return content

    calls = {} if embedded else CALLS | {EMBEDDED: load}
    content = Machine(script, calls).run()
    storages: dict[str, Storage] = {}
    if content == MAGIC:
        protocol, system = (Machine(script, {}).run() for _ in range(2))
        if protocol != PROTOCOL or system["little_endian"] is not True:
            refuse("is written for another kind of machine")

        def storage(identity: Any) -> Storage:
            key, new = _storage(identity)
            return storages.setdefault(key, new)

        content = Machine(script, calls, storage).run()
        for key in Machine(script, {}).run():
            # of no other type: the hash of a tuple within a tuple within ... has no end
            _locate(storages[key if type(key) is str else ""], script)
    if embedded and type(content) is not Storage:
        refuse("holds other things than a storage among its storages")
    if any(storage.place is None for storage in storages.values()) or script.at != len(script.data):
        refuse("does not end where its contents do")
    return content


def _locate(storage: Storage, script: Script) -> None:
    """The bytes of a storage, where the script stands."""
    if script.number("<q") != storage.numel:
        refuse("holds storages of two sizes")
    count = storage.numel * storage.dtype.itemsize
    start = script.skip(count)
    storage.place = script.data[start : start + count]


def _read_archive(data: memoryview) -> Any:
    """What torch.save writes now: an uncompressed zip archive with one pickle, data.pkl, and a member data/KEY for every storage."""
    members = _members(data)
    folder = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if folder is None:
        refuse("is a zip archive, but none of torch.save")
    if members.get(f"{folder}byteorder", b"little") != b"little":
        refuse("is written for another kind of machine")
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        key, new = _storage(identity)
        if key not in storages:
            new.place = members[f"{folder}data/{key}"]
            if len(new.place) != new.numel * new.dtype.itemsize:
                refuse("holds storages of two sizes")
            storages[key] = new
        return storages[key]

    return Machine(Script(members[f"{folder}data.pkl"]), CALLS, storage).run()


def _members(data: memoryview) -> dict[str, memoryview]:
    """Name -> bytes of the members of a zip archive without comment (APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3)."""
    end = len(data) - 22
    if end < 0 or data[end : end + 4] != b"PK\5\6":
        refuse("is incomplete (a zip archive without its end)", "download it again")
    size, start = struct.unpack_from("<II", data, end + 12)
    if end >= 20 and data[end - 20 : end - 16] == b"PK\6\7":
        (record,) = struct.unpack_from("<Q", data, end - 12)
        size, start = struct.unpack_from("<QQ", data, record + 40)
    script = Script(data, start)
    members = {}
    while script.at < start + size:
        head = struct.unpack("<4s6xH8xIIHHH8xI", script.take(46))
        signature, method, packed, count, name_size, extra_size, comment_size, place = head
        if signature != b"PK\1\2":
            raise ValueError
        name = str(script.take(name_size), "utf-8")
        extra = script.take(extra_size)
        script.take(comment_size)
        # sizes from 4 GiB on stand in a field of their own, those that need it, in this order
        wide = iter(_zip64(extra))
        count, packed, place = (next(wide, 0) if n == 0xFFFFFFFF else n for n in (count, packed, place))
        if method or packed != count:
            refuse("is a compressed archive, which torch.save does not write")
        name_size, extra_size = struct.unpack_from("<HH", data, place + 26)
        member = Script(data, place + 30 + name_size + extra_size)
        at = member.skip(count)
        members[name] = data[at : at + count]
    return members


def _zip64(extra: memoryview) -> tuple[int, ...]:
    while extra:
        tag, size = struct.unpack_from("<HH", extra)
        if tag == 1:
            return struct.unpack(f"<{size // 8}Q", extra[4 : 4 + size // 8 * 8])
        extra = extra[4 + size :]
    return ()
