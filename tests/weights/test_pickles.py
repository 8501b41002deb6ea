"""train/weights/unpickler.py and the program before it: honest files are read as torch would, and of hostile ones nothing is ever run.

Every hostile file goes to the real program in a process of its own, forked from one that has imported everything, in a folder that
holds nothing else: what it ran, wrote, or spent shows.
"""

import functools
import io
import json
import operator
import os
import pickle
import pickletools
import random
import signal
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import archive, saved
from golden_weights import FOLDER

from mclr.errors import UserError
from mclr.models.edm2 import EDM2
from mclr.train.weights.published import read_published
from mclr.train.weights.torch_file import read
from mclr.train.weights.unpickler import Inert, Name

SNAPSHOT = (FOLDER / "edm2_tiny.pkl").read_bytes()
ROOT = Path(__file__).parent.parent.parent
SECONDS = 10
MEMORY = 256 << 20  # bytes beside four times the file's
CODE = "touch ran"  # what a payload runs: it would leave a file
NUMBER = struct.pack("<qe", 1, 2)  # a storage of one fp16 number


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def dumped(content, protocol=4):
    return pickle.dumps(content, protocol)


def call(function, *arguments):
    return dumped(Call(function, *arguments))


def op(*pieces, protocol=4):
    """A pickle of its opcodes and their arguments."""
    return b"\x80" + bytes([protocol]) + b"".join(pieces) + b"."


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def embedded(stream):
    """A pickle that hands a stream to _load_from_bytes."""
    return op(named("torch.storage", "_load_from_bytes"), b"B", struct.pack("<I", len(stream)), stream, b"\x85R")


def stream(content=b"(\x8c\x07storagectorch\nHalfStorage\n\x8c\x01a\x8c\x03cpuK\x01NtQ", keys=b"]\x8c\x01aa", raw=NUMBER):
    """What torch.save writes without zip archives, with some of its five pickles replaced."""
    magic = dumped(0x1950A86A20F9469CFC6C, 2) + dumped(1001, 2) + dumped({"protocol_version": 1001, "little_endian": True}, 2)
    return magic + op(content, protocol=2) + op(keys, protocol=2) + raw


def view(shape=b"K\x01\x85", stride=b"K\x01\x85", offset=b"K\x00", numel=b"K\x01", raw=NUMBER):
    """A tensor as snapshots keep it, in opcodes; so are its extents."""
    data = stream(b"(\x8c\x07storagectorch\nHalfStorage\n\x8c\x01a\x8c\x03cpu" + numel + b"NtQ", raw=raw)
    storage = named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + shape + stride + b"\x89}tR"


def tensor(**extents):
    return op(b"}", text("unet.out_gain"), view(**extents), b"s")


def planted(payload):
    """The golden snapshot with one more entry before its end."""
    assert SNAPSHOT.endswith(b"u.")
    return SNAPSHOT[:-2] + text("more") + payload + b"u."


LONG = b"\x8b" + struct.pack("<i", (1 << 31) - 1)  # LONG4
# each list holds the one before it ten times
LAUGHS = b"(]\x94" + b"".join(b"](" + bytes([104, i]) * 10 + b"e\x94" for i in range(100)) + b"t"
TUPLES = b")" + b"\x85" * 100_000
PART = named("torch.nn.modules.module", "Module") + b")\x81"
WITHIN = PART + b"}" + text("_modules") + b"}" + text("a")  # of a part, to be followed by that and ssb
TENSORS = b"}\x94(" + text("0") + view() + b"\x94" + b"".join(text(str(i)) + b"h\x01" for i in range(1, 1900)) + b"u"
# parts of a network that have one dict of tensors
SHARING = [text(str(i)) + PART + b"}" + text("_parameters") + (b"h\x00" if i else TENSORS) + b"sb" for i in range(1500)]
HUGE = b"\x8a\x09" + b"\xff" * 8 + b"\x00"  # LONG1: 2^64 - 1
VIEW = "reaches beyond its storage"
CODE_REFUSED, OPCODE, CUT = "holds code", "pickle opcode", "incomplete"

SHARED = torch.zeros(100_000)
WIDE = {  # a VAR whose matrices would have 1.2e9 numbers each
    "pos_1LC": torch.zeros(1, 30, 20_000),
    "blocks.0.attn.scale_mul_1H11": torch.zeros(1, 2, 1, 1),
    "blocks.0.attn.mat_qkv.weight": torch.zeros(1),
    "blocks.0.ffn.fc1.weight": torch.zeros(80_000),
    **{name: torch.zeros(2, 2) for name in ("class_emb.weight", "head.weight", "word_embed.weight")},
    **{f"rest{i}": torch.zeros(1) for i in range(9)},
}

# name of the file: (its bytes, part of the answer)
HOSTILE = {
    # calls
    "os_system.pkl": (call(os.system, CODE), CODE_REFUSED),
    "eval.pkl": (call(eval, f"__import__('os').system({CODE!r})"), CODE_REFUSED),
    "exec.pkl": (call(exec, f"__import__('os').system({CODE!r})"), CODE_REFUSED),
    "popen.pkl": (call(subprocess.Popen, ["touch", "ran"]), CODE_REFUSED),
    "nested.pkl": (dumped({"ema": [{"a": (Call(os.system, CODE), 1)}]}), CODE_REFUSED),
    "posix.pkl": (op(named("posix", "system"), text(CODE), b"\x85R"), "'posix.system'"),
    "global.pkl": (b"cposix\nsystem\n(S'touch ran'\ntR.", "is text"),
    "global_2.pkl": (op(b"cposix\nsystem\n", text(CODE), b"\x85R", protocol=2), "'posix.system'"),
    "getattr.pkl": (op(named("builtins", "getattr"), named("collections", "OrderedDict"), text("b"), b"\x86R"), CODE_REFUSED),
    "dotted.pkl": (op(named("torch", "serialization.os.system"), text(CODE), b"\x85R"), CODE_REFUSED),
    "dotted_allowed.pkl": (op(named("collections", "OrderedDict.__init__.__globals__"), b"."), CODE_REFUSED),
    "parts_dotted.pkl": (op(named("torch.nn.modules.module", "torch.load"), text(CODE), b"\x85R"), "calls 'torch.nn.modules"),
    "torch_load.pkl": (op(named("torch.serialization", "load"), text("x"), b"\x85R"), CODE_REFUSED),
    "torch_jit.pkl": (op(named("torch.jit._serialization", "load"), text("x"), b"\x85R"), CODE_REFUSED),
    "torch_hub.pkl": (op(named("torch.hub", "load_state_dict_from_url"), text("x"), b"\x85R"), CODE_REFUSED),
    "import.pkl": (op(named("importlib", "import_module"), text("antigravity"), b"\x85R"), CODE_REFUSED),
    "partial.pkl": (dumped(functools.partial(os.system, CODE)), CODE_REFUSED),
    "methodcaller.pkl": (dumped(operator.methodcaller("system", CODE)), CODE_REFUSED),
    "many_arguments.pkl": (op(named("torch", "device"), b"(", b"N" * 9, b"tR"), "is no state dict"),
    "copyreg.pkl": (op(named("copyreg", "_reconstructor"), named("builtins", "object"), b"\x85R"), CODE_REFUSED),
    "numpy_objects.pkl": (dumped(np.array([Call(os.system, CODE)], dtype=object)), CODE_REFUSED),
    "numpy_load.pkl": (op(named("numpy", "load"), text("x"), b"\x85R"), CODE_REFUSED),
    "set_of_calls.pkl": (op(b"\x8f(", named("posix", "system"), text(CODE), b"\x85R", b"\x90"), CODE_REFUSED),
    "call_of_text.pkl": (op(text("posix.system"), text(CODE), b"\x85R"), "calls what is no function"),
    "call_of_a_dtype.pkl": (op(named("torch", "HalfStorage"), HUGE, b"\x85R"), "calls 'torch.HalfStorage'"),
    "no_text.pkl": (op(b"K\x01K\x02\x93"), "damaged"),
    # opcodes
    "inst.pkl": (op(b"(", text(CODE), b"iposix\nsystem\n"), OPCODE),
    "obj.pkl": (op(b"(", named("collections", "OrderedDict"), b"o"), OPCODE),
    "ext1.pkl": (op(b"\x82\x01"), OPCODE),
    "newobj_ex.pkl": (op(named("collections", "OrderedDict"), b")}\x92"), OPCODE),
    "next_buffer.pkl": (op(b"\x97", protocol=5), OPCODE),
    "string.pkl": (op(b"S'a' + open('ran', 'w').name\n", protocol=2), OPCODE),
    "unicode.pkl": (op(b"Vran\n", protocol=2), OPCODE),
    "long4.pkl": (op(LONG), OPCODE),
    "long_text.pkl": (op(b"L" + b"9" * 100_000 + b"L\n"), OPCODE),
    "binunicode8.pkl": (op(b"\x8d" + struct.pack("<Q", 1 << 60)), OPCODE),
    "bytearray8.pkl": (op(b"\x96" + struct.pack("<Q", 1 << 60), protocol=5), OPCODE),
    "persid.pkl": (op(b"Pstorage\n", protocol=2), OPCODE),
    # lengths, places and depths
    "memo.pkl": (b"\x80\x04Nr\xff\xff\xff\x7f.", "is no state dict"),
    "binbytes.pkl": (op(b"B\xff\xff\xff\xff"), CUT),
    "binunicode.pkl": (op(b"X\xff\xff\xff\xff"), "MiB beside its tensors"),
    "frame.pkl": (op(b"\x95" + struct.pack("<Q", 1 << 60)), "damaged"),
    "name_without_end.pkl": (op(b"c" + b"a" * 100_000), "damaged"),
    "long_names.pkl": (op(b"X" + struct.pack("<I", 680_000) + b"torch.nn.modules." * 40_000, b"\x94", b"h\x00\x93" * 9999), CODE_REFUSED),
    "tuples.pkl": (op(TUPLES), "is no state dict"),
    "deep_key.pkl": (op(b"}", TUPLES, b"Ns"), "keys are no names"),
    "deep_storage_key.pkl": (embedded(stream(keys=b"]" + TUPLES + b"a")), "damaged"),
    "deep_network.pkl": (op(WITHIN * 5000, PART, b"ssb" * 5000), "no tree"),
    "laughs.pkl": (op(b"}", text("ema"), LAUGHS, b"s"), "no state dict"),
    "opcodes.pkl": (op(b"}" * (8 << 20)), "MiB beside its tensors"),
    "memoize.pkl": (op(b")", b"\x94" * 1_000_000), "is no state dict"),
    "text.pkl": (op(b"X" + struct.pack("<I", 8 << 20) + "\U0001f600".encode() * (2 << 20)), "MiB beside its tensors"),
    "itself.pkl": (op(b"]\x94h\x00a"), "is no state dict"),
    "underflow.pkl": (op(b"R"), "damaged"),
    "unset_memo.pkl": (op(b"h\x07"), "damaged"),
    # states
    "class.pkl": (op(PART, b"}", text("__class__"), named("torch.nn.modules.linear", "Linear"), b"sb"), "no numbers"),
    "setstate.pkl": (op(named("dnnlib.util", "EasyDict"), b")\x81}", text("__setstate__"), named("posix", "system"), b"sb"), CODE_REFUSED),
    "state_of_a_name.pkl": (op(named("dnnlib.util", "EasyDict"), b"}", text("__module__"), text("os"), b"sb"), "gives a state"),
    "network_in_itself.pkl": (op(PART, b"\x94}", text("_modules"), b"}", text("a"), b"h\x00ssb"), "no tree"),
    "shared_parts.pkl": (op(PART, b"}", text("_modules"), b"}(", *SHARING, b"usb"), "more than 2000 entries"),
    "many_modules.pkl": (op(b"}(", *[text(str(i)) + PART for i in range(1000)], b"u"), "too many networks"),
    "one_network_many_times.pkl": (op(b"}(", text("k"), TENSORS, *[text(str(i)) + b"h\x00" for i in range(30_000)], b"u"), "networks ("),
    "network_of_text.pkl": (op(PART, b"}", text("_modules"), text("a"), b"sb"), "_modules are damaged"),
    # storages and tensors
    "persistent_id.pkl": (op(b"(", text("storage"), b"tQ"), "damaged"),
    "hostile_stream.pkl": (embedded(call(os.system, CODE)), CODE_REFUSED),
    "hostile_in_stream.pkl": (embedded(stream(named("posix", "system") + text(CODE) + b"\x85R")), CODE_REFUSED),
    "hostile_keys.pkl": (embedded(stream(keys=named("posix", "system") + text(CODE) + b"\x85R")), CODE_REFUSED),
    "stream_in_stream.pkl": (embedded(embedded(stream())), "where no weights need it"),
    "stream_of_text.pkl": (op(named("torch.storage", "_load_from_bytes"), text("x"), b"\x85R"), "with no bytes"),
    "no_storage.pkl": (embedded(stream(b"}")), "other things than a storage|damaged"),
    "storage_view.pkl": (embedded(stream(b"(\x8c\x07storagectorch\nHalfStorage\n\x8c\x01a\x8c\x03cpuK\x01)tQ")), "unknown form"),
    "storage_numel.pkl": (tensor(numel=HUGE), "of two sizes"),
    "storage_bytes.pkl": (tensor(numel=b"J\xff\xff\xff\x7f", raw=struct.pack("<q", (1 << 31) - 1)), CUT),
    "storage_negative.pkl": (tensor(numel=b"J\xff\xff\xff\xff", raw=struct.pack("<q", -1)), "unknown form"),
    "shape.pkl": (tensor(shape=b"J\xff\xff\xff\x7f\x85"), VIEW),
    "shape_without_stride.pkl": (tensor(shape=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"), "larger than the file"),
    "shape_huge.pkl": (tensor(shape=HUGE + b"\x85"), VIEW),
    "shape_of_a_dict.pkl": (tensor(shape=b"}K\x01Ns"), "without storage or shape"),
    "shape_of_text.pkl": (tensor(shape=text("a") + b"\x85"), VIEW),
    "shape_empty.pkl": (tensor(shape=b"K\x00\x85"), "no numbers"),
    "stride_negative.pkl": (tensor(stride=b"J\xff\xff\xff\xff\x85"), VIEW),
    "offset.pkl": (tensor(offset=b"K\x01"), VIEW),
    "offset_negative.pkl": (tensor(offset=b"J\xff\xff\xff\xff"), VIEW),
    # other files
    "zip.pkl": (archive({"net.pkl": SNAPSHOT}), "none of torch.save"),
    "code.pth": (archive({"a/data.pkl": call(os.system, CODE)}), CODE_REFUSED),
    "code_legacy.pth": (saved({"a": Call(os.system, CODE)}, _use_new_zipfile_serialization=False), CODE_REFUSED),
    "network.pth": (saved(Call(exec, CODE)), CODE_REFUSED),
    "bomb.pth": (archive({"a/data.pkl": b"}" * (64 << 20)}, zipfile.ZIP_DEFLATED), "compressed"),
    "bomb_storage.pth": (archive({"a/data.pkl": dumped({}), "a/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED), "compressed"),
    "members.pth": (archive({"a/data.pkl": dumped({}), **{f"a/{i:060}": b"" for i in range(10_000)}}), "MiB beside its tensors"),
    "end_of_zip.pth": (archive({"a/data.pkl": dumped({})})[:-10] + b"\xff" * 8 + b"\0\0", "damaged|incomplete"),
    "header.safetensors": (struct.pack("<Q", 1 << 40) + b"{}", "damaged"),
    "header_of_code.safetensors": (struct.pack("<Q", 9) + b'{"a": 1}.', "damaged"),
    "extents.safetensors": (struct.pack("<Q", 57) + b'{"a":{"dtype":"F16","shape":[99],"data_offsets":[0,198]}}', CUT),
    # sizes that ask for more than the file has
    "width.pth": (saved(WIDE), "looks like"),
    "depth.pth": (saved(WIDE | {f"blocks.{i}.attn.mat_qkv.weight": torch.zeros(1) for i in range(1900)}), "is no whole VAR"),
    "entries.pth": (saved({f"a{i}": torch.zeros(1) for i in range(2500)}), "more than any published network"),
    "shared.pth": (saved({f"a{i}": SHARED for i in range(1900)}), "larger than the file"),
    # planted in a good snapshot
    "planted.pkl": (planted(named("posix", "system") + text(CODE) + b"\x85R"), CODE_REFUSED),
    "planted_stream.pkl": (planted(embedded(call(os.system, CODE))[2:-1]), CODE_REFUSED),
    "appended.pkl": (SNAPSHOT + call(os.system, CODE), "does not end"),
    **{f"cut_{at}.pkl": (SNAPSHOT[:at], CUT) for at in (2, 30, 1500, 100_000, len(SNAPSHOT) - 1)},
}  # fmt: skip

# Reads lines of JSON: a folder, a Python expression, seconds; answers with what became of a fork that evaluated it there.
SERVER = """
import json, os, signal, sys
from mclr.train.system.console import run
from mclr.train.convert import main

def evaluated(folder, expression, seconds):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(seconds)
            os.chdir(folder)
            for descriptor in (1, 2):
                os.dup2(os.open(f"../{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            status = eval(expression)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024

for line in sys.stdin:
    print(json.dumps(evaluated(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def evaluate():
    """(folder, expression, seconds) -> (exit status, peak memory in bytes) of a process that has imported the program."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def evaluate(folder, expression, seconds=SECONDS):
            print(json.dumps([str(folder), expression, seconds]), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield evaluate
        server.stdin.close()


@pytest.fixture(scope="module")
def imported(evaluate, tmp_path_factory):
    """Peak memory, in bytes, of a process that has imported the program and does nothing."""
    folder = tmp_path_factory.mktemp("nothing") / "in"
    folder.mkdir()
    return evaluate(folder, "0")[1]


@pytest.fixture
def folder(tmp_path):
    """An empty folder; the output of the program goes beside it."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("name", HOSTILE)
def test_of_a_hostile_file_nothing_is_run_and_it_is_one_line(name, evaluate, imported, folder):
    data, answer = HOSTILE[name]
    (folder / name).write_bytes(data)
    status, peak = evaluate(folder, f"run(main, {[name, 'out']})")
    out, err = ((folder.parent / descriptor).read_text() for descriptor in ("1", "2"))
    assert [path.name for path in folder.iterdir()] == [name], "it ran, or wrote"
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert any(part in err for part in answer.split("|")) and len(err) < 500, err
    assert peak - imported <= MEMORY + 4 * len(data), f"{(peak - imported) >> 20} MiB"


def test_what_a_hostile_file_does_would_be_noticed(evaluate, imported, folder):
    assert evaluate(folder, f"os.system({CODE!r})")[0] == 0 and (folder / "ran").exists()
    assert evaluate(folder, "signal.pause()", 1)[0] == -signal.SIGALRM
    assert evaluate(folder, "bytes(b'1' * (400 << 20))[0] * 0")[1] - imported > MEMORY
    assert evaluate(folder, "1 / 0")[0] == 1 and (folder.parent / "2").read_text().count("\n") > 1


def test_the_source_in_a_snapshot_is_never_looked_at(evaluate, folder):
    source, code = b"# source omitted\n", b"open('ran', 'w')\n"
    assert SNAPSHOT.count(source) == 1 and len(source) == len(code)
    (folder / "a.pkl").write_bytes(SNAPSHOT.replace(source, code))
    assert evaluate(folder, "run(main, ['a.pkl', 'out'])", 60)[0] == 0, (folder.parent / "2").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["a.pkl", "out"]


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save_are_read_as_torch_does(legacy, tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    tensors = OrderedDict(
        a=base.view(2, 3, 4).transpose(0, 2), b=base[5:7], half=base.half()[1:], brain=base.bfloat16(), double=base.double(),
        whole=base.long(), byte=base.byte(), truth=base > 3, scalar=torch.tensor(2.5), weight=torch.nn.Parameter(base),
    )  # fmt: skip
    tensors._metadata = {"version": 1}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    content = {"net": tensors, "optimizer": optimizer, "epoch": 300, "size": torch.Size([2]), "none": None, "large": -(1 << 40)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read(tmp_path / "a.pth")
    views = found.pop("net")
    assert found == {key: tuple(value) if key == "size" else value for key, value in content.items() if key != "net"}
    assert list(views) == list(tensors)
    for name, expected in tensors.items():
        value = views[name].tensor()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name


def test_large_archives_are_read(monkeypatch, tmp_path):
    """Members from 4 GiB on keep their sizes in another field; here, those from 10 bytes on. Their bytes are not aligned either."""
    numbers = torch.arange(99.0, dtype=torch.float64).view(9, 11)
    content = {"a": numbers[1:].t(), "b": torch.tensor(2.5), "c": numbers.bfloat16()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    with zipfile.ZipFile(io.BytesIO(saved(content))) as file:
        (tmp_path / "a.pth").write_bytes(archive({name: file.read(name) for name in file.namelist()}))
    found = read(tmp_path / "a.pth")
    assert all(torch.equal(found[name].tensor(), content[name]) for name in content)


def test_harmless_names_are_read_and_left_alone(tmp_path):
    """The encoders of EDM2 keep arrays; devices, dtypes and sets may occur as well."""
    content = {
        "array": np.float32([1, 2]),
        "number": np.float64(3),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "set": {"a"},
    }
    for protocol in (2, 4):
        (tmp_path / "a.pkl").write_bytes(dumped(content, protocol))
        found = read(tmp_path / "a.pkl")
        assert [type(found[key]) for key in ("array", "number", "device")] == [Inert] * 3
        assert found["dtype"] == Name("torch.float16")


def test_no_bytes_of_a_storage_are_copied_where_they_are_aligned(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    view = read(tmp_path / "a.pth")["a"]
    place = np.frombuffer(view.storage.place, np.uint8)
    assert view.tensor().data_ptr() == place.ctypes.data


def test_a_damaged_snapshot_is_refused_or_a_network(tmp_path):
    """Bytes flipped or cut off anywhere, most of them beside the storages."""
    draw = random.Random(0)
    beside = [at for _, argument, at in pickletools.genops(SNAPSHOT) if type(argument) is not bytes]
    read = 0
    for _ in range(150):
        data = bytearray(SNAPSHOT)
        for _ in range(draw.choice((1, 1, 3))):
            data[draw.choice((draw.randrange(len(data)), draw.choice(beside)))] = draw.randrange(256)
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        (tmp_path / "a.pkl").write_bytes(data)
        try:
            net, _ = read_published(tmp_path / "a.pkl")
        except UserError as error:
            assert str(tmp_path) in str(error)
            continue
        read += 1
        assert isinstance(net, EDM2) and all(p.isfinite().all() for p in net.parameters())
    assert 20 < read < 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]
