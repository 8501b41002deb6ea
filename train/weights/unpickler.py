"""Reads pickles without running anything in them.

A pickle is a program for a small stack machine that may import and call anything. Ours is Python's own machine without those parts: it
knows the opcodes in Machine.dispatch alone, a name stays text and must be on the closed list ALLOWED, and a call only sorts its arguments
into one of the records below. The bytes of tensors stay in the mapped file, and the rest may have SCRIPT bytes: so reading is bounded in
time and memory. Opcodes: the standard library's pickletools.
"""

import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

SCRIPT = 1 << 20  # bytes of a file beside its tensors; the largest published file has about a fifth
LINE = 256  # bytes of a name
ALONE, AGAIN = "save the state dict of the network alone", "download it again"  # ways out
TOO_LONG = f"holds more than {SCRIPT >> 20} MiB beside its tensors", ALONE
_KINDS = "Half BFloat16 Float Double ComplexFloat Long Int Short Char Byte Bool"
_DTYPES = "float16 bfloat16 float32 float64 complex64 int64 int32 int16 int8 uint8 bool"
DTYPES = {f"torch.{kind}Storage": getattr(torch, name) for kind, name in zip(_KINDS.split(), _DTYPES.split(), strict=True)}


class Refused(Exception):
    """What is wrong with a file, as the predicate of a sentence, and what to do."""


def refuse(what: str, way_out: str = "get it again from its publisher") -> NoReturn:
    raise Refused(f"{what}: {way_out}")


class Name(str):
    """A module and a function or class of it."""


@dataclass(eq=False, slots=True)
class Module:
    """A network or a part of one, by its attributes."""

    state: dict[str, Any]


@dataclass(eq=False, slots=True)
class Storage:
    """Numbers in the file. place: their bytes, known when the storage has been found."""

    dtype: torch.dtype
    numel: int
    place: memoryview | None = None
    vector: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

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
    if type(meta) is not dict or type(state := meta.get("state")) is not dict:
        refuse("holds a network without a state")
    return Module(state)


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


class Script:
    """The bytes of a file, read from `at` on. left: how many may still be read beside storages."""

    def __init__(self, data: memoryview, at: int = 0, left: int = SCRIPT):
        self.data, self.at, self.left = data, at, left

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            refuse(*TOO_LONG)
        return bytes(self.data[(place := self.skip(count)) : place + count])

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin, which stay unread."""
        place = self.at
        if count > len(self.data) - place:
            refuse("is incomplete (it ends in the middle of its contents)", AGAIN)
        self.at += count
        return place

    def number(self, form: str) -> Any:
        """One number in the format of struct."""
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def readline(self) -> bytes:
        text, newline, _ = bytes(self.data[self.at : self.at + LINE]).partition(b"\n")
        if not newline:
            raise ValueError("a name without end")
        return self.read(len(text) + 1)


class _Opcodes(dict[int, Callable[[Any], Any]]):
    def __missing__(self, code: int) -> NoReturn:
        refuse(f"asks for what no weights need (pickle opcode {bytes([code])!r}); nothing in a file is ever run")


class Machine(pickle._Unpickler):
    """Reads one pickle of a script. calls: by name. storages: those that it refers to by persistent ids, by their keys.

    All opcodes that import, call or change an object are methods here; those taken from Python's machine make plain values.
    """

    dispatch = _Opcodes()
    pop_mark: Callable[[], list[Any]]

    def __init__(self, script: Script, calls: Mapping[str, Callable] = CALLS):
        super().__init__(script)  # type: ignore[arg-type]
        self.script, self.calls, self.storages = script, calls, dict[str, Storage]()
        self.stack: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        text = f"{'builtins' if module == '__builtin__' else module}.{name}" if len(module) + len(name) < LINE else "?"
        if text not in ALLOWED and not text.startswith(PARTS):
            refuse(f"holds code ({text!r}), which is never run", ALONE)
        return Name(text)

    def persistent_load(self, identity: Any) -> Storage:
        """torch.save's id of a storage: ("storage", type, key, device, numel), in streams also a view, which is None."""
        _, kind, key, _, numel, *view = identity
        if type(key) is not str or type(numel) is not int or numel < 0 or view not in ([], [None]):
            refuse("holds a storage of an unknown form")
        return self.storages.setdefault(key, Storage(DTYPES[kind if type(kind) is Name else ""], numel))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            refuse("calls what is no function")
        if function.startswith(PARTS) and arguments == ():
            self.stack.append(Module({}))
        elif function in self.calls:
            self.stack.append(self.calls[function](arguments))
        else:
            refuse(f"calls {function!r} where no weights need it")

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
