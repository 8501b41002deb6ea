"""Reads pickles and files of torch.save: EDM2's networks and checkpoints. Nothing in a file is ever run.

A pickle is a program for a small stack machine that may import and call anything. Ours is Python's own machine without those parts: it
knows the opcodes in Machine.dispatch alone, a name stays text and must be on the closed list ALLOWED, and a call only sorts its arguments
into one of the records below. The bytes of tensors stay in the mapped file, and the rest may have SCRIPT bytes: so reading is bounded in
time and memory. Opcodes: the standard library's pickletools.
"""

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

SCRIPT = 1 << 20  # bytes of a file beside its tensors; the largest published file has about a fifth
LINE = 256  # bytes of a name
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's, before zip archives
_KINDS = "Half BFloat16 Float Double ComplexFloat Long Int Short Char Byte Bool"
_DTYPES = "float16 bfloat16 float32 float64 complex64 int64 int32 int16 int8 uint8 bool"
DTYPES = {f"torch.{kind}Storage": getattr(torch, name) for kind, name in zip(_KINDS.split(), _DTYPES.split(), strict=True)}


class Refused(Exception):
    """What is wrong with a file, as the predicate of a sentence, and what to do."""


def refuse(what: str, way_out: str = "get it again from its publisher") -> NoReturn:
    raise Refused(f"{what}: {way_out}")


def _refuse_length() -> NoReturn:
    refuse(f"holds more than {SCRIPT >> 20} MiB beside its tensors", "save the state dict of the network alone")


@dataclass(frozen=True, slots=True)
class Name:
    """A module and a function or class of it, as text."""

    text: str


@dataclass(eq=False, slots=True)
class Module:
    """A network or a part of one: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any]


@dataclass(eq=False, slots=True)
class Storage:
    """Numbers in the file. place: their bytes, known when the storage has been found."""

    dtype: torch.dtype
    numel: int
    place: memoryview | None = None
    vector: Tensor | None = None

    def numbers(self) -> Tensor:
        """All of them, as a vector. It shares the bytes of the file where they are aligned, as torch needs them."""
        if self.vector is None:
            raw = torch.frombuffer(self.place, dtype=torch.uint8) if self.place else torch.empty(0, dtype=torch.uint8)
            self.vector = (raw if raw.data_ptr() % self.dtype.itemsize == 0 else raw.clone()).view(self.dtype)
        return self.vector


class View(NamedTuple):
    """A tensor that is not made yet: extents within a storage, as the file gives them."""

    storage: Storage
    offset: Any
    shape: Any
    stride: Any

    def tensor(self) -> Tensor:
        """Raises Refused where the extents do not lie within the storage."""
        try:
            return self.storage.numbers().as_strided(self.shape, self.stride, self.offset)
        # what torch raises depends on the extent
        except Exception as error:
            raise Refused("holds a tensor that reaches beyond its storage: get it again from its publisher") from error


class Inert:
    """Stands for an object that no network needs, such as a date or an array. It keeps nothing of it."""


def _view(arguments: tuple[Any, ...]) -> View:
    if type(arguments[0]) is not Storage or not type(arguments[2]) is type(arguments[3]) is tuple:
        refuse("holds a tensor without storage or shape")
    return View(*arguments[:4])


def _persistent(arguments: tuple[Any, ...]) -> Module:
    """EDM2's wrapper around a class. It also holds the source of the class, which stays unread."""
    (meta,) = arguments
    if not (type(meta) is dict and type(kind := meta.get("class_name")) is str and type(state := meta.get("state")) is dict):
        refuse("holds a network without class or state")
    return Module(kind, state)


# plain data that checkpoints hold beside weights: module -> its functions and classes, which all make an Inert
BESIDE = {
    "argparse": "Namespace",
    "builtins": "bytearray complex frozenset range set slice xrange",
    "collections": "Counter deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    **dict.fromkeys(("pathlib", "pathlib._local"), "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"),
    "types": "SimpleNamespace",
    "uuid": "UUID",
    "_codecs": "encode",
    "numpy": "dtype",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct scalar"),
    "torch": "device",
}
# a call -> what it makes of its arguments
CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **{f"{module}.{name}": lambda _: Inert() for module, names in BESIDE.items() for name in names.split()},
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "dnnlib.util.EasyDict"), lambda _: {}),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _view),
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), lambda given: given[0]),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.Size": lambda given: given[0],
}
EMBEDDED = "torch.storage._load_from_bytes"  # a stream of torch.save within a pickle
PARTS = "torch.nn.modules."  # classes of parts, whatever their names
VALUES = ("bool", "dict", "float", "int", "list", "str", "tuple")  # types that are named and not called, as by a defaultdict
ALLOWED = {*CALLS, EMBEDDED, *DTYPES, "numpy.ndarray", *map(str, DTYPES.values()), *(f"builtins.{name}" for name in VALUES)}


def read(path: Path) -> Any:
    """What a pickle or a file of torch.save holds: dicts, lists, numbers, text, and Module, View and Inert for objects.

    Raises Refused for a damaged file, and for one that names anything outside of ALLOWED.
    """
    with open(path, "rb") as file:
        # a private mapping: torch wants memory that it may write to, and no write reaches the file
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            return _read_archive(data, file.fileno()) if data[:4] == b"PK\3\4" else _read_streams(Script(data))
        except zipfile.BadZipFile as error:
            raise Refused(f"is incomplete ({error}): download it again") from error
        # what damaged bytes lead to in a machine and in zipfile
        except (
            ArithmeticError,
            LookupError,
            NotImplementedError,
            TypeError,
            ValueError,
            struct.error,
            pickle.UnpicklingError,
        ) as error:
            raise Refused(f"is damaged ({type(error).__name__} in its pickle): download it again") from error


class Script:
    """The bytes of a file, read from `at` on. left: how many may still be read beside storages."""

    def __init__(self, data: memoryview, at: int = 0, left: int = SCRIPT):
        self.data, self.at, self.left = data, at, left

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            _refuse_length()
        return bytes(self.data[(place := self.skip(count)) : place + count])

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin, which stay unread."""
        place = self.at
        if count > len(self.data) - place:
            refuse("is incomplete (it ends in the middle of its contents)", "download it again")
        self.at += count
        return place

    def number(self, form: str) -> Any:
        """One number in the format of struct."""
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def readline(self) -> bytes:
        text, newline, _ = bytes(self.data[self.at : self.at + LINE]).partition(b"\n")
        if not newline:
            refuse("holds a name without end")
        return self.read(len(text) + 1)


class _Opcodes(dict[int, Callable[[Any], Any]]):
    def __missing__(self, code: int) -> NoReturn:
        refuse(f"asks for what no weights need (pickle opcode {bytes([code])!r}); nothing in a file is ever run")


class Machine(pickle._Unpickler):
    """Reads one pickle of a script. calls: by name; storage: from a persistent id, None where there may be none.

    All opcodes that import, call or change an object are methods here; those taken from Python's machine make plain values.
    """

    dispatch = _Opcodes()
    pop_mark: Callable[[], list[Any]]

    def __init__(self, script: Script, calls: Mapping[str, Callable], storage: Callable[[Any], Storage] | None = None):
        super().__init__(script)  # type: ignore[arg-type]
        self.script, self.calls, self.storage = script, calls, storage
        self.stack: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        text = f"{'builtins' if module == '__builtin__' else module}.{name}" if len(module) + len(name) < LINE else "?"
        if text not in ALLOWED and not text.startswith(PARTS):
            refuse(f"holds code ({text!r}), which is never run", "save the state dict of the network alone")
        return Name(text)

    def persistent_load(self, identity: Any) -> Storage:
        if self.storage is None:
            refuse("refers to storages that it does not have")
        return self.storage(identity)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            refuse("calls what is no function")
        if function.text.startswith(PARTS) and arguments == ():
            self.stack.append(Module(function.text, {}))
        elif function.text in self.calls:
            self.stack.append(self.calls[function.text](arguments))
        else:
            refuse(f"calls {function.text!r} where no weights need it")

    def build(self) -> None:
        """Give an object that was just made its state. Our dicts and Inert keep none."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Module and type(state) is dict and not target.state:
            target.state = state
        elif type(target) not in (dict, Inert):
            refuse("gives a state to what has none")

    def place(self, form: str) -> None:
        """Bytes stay in the file: push where they lie."""
        count = self.script.number(form)
        self.stack.append(slice(start := self.script.skip(count), start + count))

    def extend(self, values: Sequence[Any]) -> None:
        if type(target := self.stack[-1]) is list:
            target += values
        elif type(target) is not Inert:
            refuse("appends to what is no list")

    def update(self, values: Sequence[Any]) -> None:
        if type(target := self.stack[-1]) not in (dict, Inert):
            refuse("sets items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True) if type(target) is dict else ():
            # keys with a quick hash that the writer of the file cannot choose
            if not (type(key) is str or (type(key) is int and 0 <= key < 1 << 31)):
                refuse("holds a dict whose keys are no names")
            target[key] = value


PLAIN = (
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 TUPLE EMPTY_LIST EMPTY_DICT BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
    # these ask find_class and persistent_load
    "GLOBAL STACK_GLOBAL BINPERSID"
)
OWN: dict[bytes, Callable[[Machine], Any]] = {
    pickle.FRAME: lambda m: m.script.number("<Q"),  # how much may be read at once, which we need not know
    pickle.BINBYTES: lambda m: m.place("<I"),
    pickle.SHORT_BINBYTES: lambda m: m.place("B"),
    # a set becomes a list
    pickle.EMPTY_SET: lambda m: m.stack.append([]),
    pickle.FROZENSET: lambda m: m.stack.append(m.pop_mark()),
    pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: lambda m: m.update([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.update(m.pop_mark()),
    pickle.REDUCE: Machine.call,
    pickle.NEWOBJ: Machine.call,
    pickle.BUILD: Machine.build,
}
for opcode in PLAIN.split():
    Machine.dispatch[ord(getattr(pickle, opcode))] = pickle._Unpickler.dispatch[ord(getattr(pickle, opcode))]
Machine.dispatch.update({ord(opcode): action for opcode, action in OWN.items()})


def _storage(identity: Any) -> tuple[str, Storage]:
    """(key, storage) of torch.save's persistent id: ("storage", type, key, device, numel), in streams also a view, which is None."""
    _, kind, key, _, numel, *view = identity
    if type(key) is not str or type(numel) is not int or numel < 0 or view not in ([], [None]):
        refuse("holds a storage of an unknown form")
    return key, Storage(DTYPES[kind.text if type(kind) is Name else ""], numel)


def _read_streams(script: Script, embedded: bool = False) -> Any:
    """One pickle, or what torch.save wrote before zip archives: five pickles, then numel and bytes of every storage.

    embedded: the latter within the bytes of a pickle, which then hold one storage and no more.
    """

    def load(arguments: tuple[Any, ...]) -> Any:
        (place,) = arguments
        if type(place) is not slice:
            refuse(f"calls {EMBEDDED!r} with no bytes")
        inner = Script(script.data[: place.stop], place.start, script.left)
        content = _read_streams(inner, embedded=True)
        script.left = inner.left
        return content

    calls = {} if embedded else CALLS | {EMBEDDED: load}
    content = Machine(script, calls).load()
    storages: dict[str, Storage] = {}
    if content == MAGIC:
        protocol, system = (Machine(script, {}).load() for _ in range(2))
        if protocol != PROTOCOL or system["little_endian"] is not True:
            refuse("is written for another kind of machine")

        def storage(identity: Any) -> Storage:
            key, new = _storage(identity)
            return storages.setdefault(key, new)

        content = Machine(script, calls, storage).load()
        for key in Machine(script, {}).load():
            # text alone: the hash of tuples within tuples may take for ever
            found = storages[key if type(key) is str else ""]
            if script.number("<q") != found.numel:
                refuse("holds storages of two sizes")
            start = script.skip(size := found.numel * found.dtype.itemsize)
            found.place = script.data[start : start + size]
    if embedded and type(content) is not Storage:
        refuse("holds other things than a storage among its storages")
    if any(storage.place is None for storage in storages.values()) or script.at != len(script.data):
        refuse("does not end where its contents do")
    return content


class _Bounded(io.FileIO):
    """A file of which at most SCRIPT bytes are read at once, as zipfile does with the list of members."""

    def read(self, count: int | None = -1, /) -> bytes:
        found = super().read(count if count is not None and 0 <= count <= SCRIPT else SCRIPT + 1) or b""
        if len(found) > SCRIPT:
            _refuse_length()
        return found


def _read_archive(data: memoryview, descriptor: int) -> Any:
    """What torch.save writes now: an uncompressed zip archive with one pickle, data.pkl, and a member data/KEY for every storage."""
    members: dict[str, memoryview] = {}
    with _Bounded(descriptor, closefd=False) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                refuse("is a compressed archive, which torch.save does not write")
            # a header of 30 bytes, the name and an extra field come before the content (APPNOTE.TXT 6.3.10, section 4.3.7)
            start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
            if not 0 <= start <= len(data) - info.file_size:
                raise ValueError("a member outside of the file")
            members[info.filename] = data[start : start + info.file_size]
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

    return Machine(Script(members[f"{folder}data.pkl"]), CALLS, storage).load()
