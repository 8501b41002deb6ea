"""train/weights/state_dict.py: the state dict of one network in checkpoints, shards and folders, whatever their endings and wrappers."""

import collections
import datetime
import decimal
import fractions
import json
import pathlib
import types
import uuid
import zipfile
from argparse import Namespace

import pytest
import safetensors.torch
import torch
from foreign import convert_
from golden_weights import load_golden, rule_weights

from mclr.errors import UserError
from mclr.models.var import PUBLISHED
from mclr.train.weights.folder import find_weights, load_net, read_config

RAW = rule_weights(load_golden("var_tiny.npz")[2])
AVERAGE = {name: t + 0.25 for name, t in RAW.items()}
HALF = {name: t.half() for name, t in RAW.items()}
MIXED = {name: t.bfloat16() if i % 2 else t for i, (name, t) in enumerate(RAW.items())}
TOKENIZER = rule_weights(load_golden("vqvae_tiny.npz")[2])
BESIDE = {
    "args": Namespace(lr=0.1, out=pathlib.Path("/a/b/c/d/e/f/g/h/i/j")),
    "when": [datetime.datetime.now(datetime.UTC), datetime.date.today(), datetime.time(1), datetime.timedelta(1)],
    "numbers": (fractions.Fraction(1, 3), decimal.Decimal("0.1"), 1j, range(3), slice(1), 1 << 70, uuid.uuid4()),
    "sets": [{1, 2}, frozenset("ab"), collections.Counter("aab"), collections.deque([1], 3), bytearray(b"ab"), b"ab"],
    "dicts": [collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), types.SimpleNamespace(a=1)],
    "torch": [torch.device("cpu"), torch.Size([1]), torch.bfloat16, torch.nn.Parameter(torch.ones(1)), torch.zeros(2, dtype=torch.cfloat)],
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
}  # fmt: skip


def prefixed(prefix, state_dict=RAW):
    return {prefix + name: t for name, t in state_dict.items()}


def among(word):
    """With a wrapper's word before the last part of every name, too."""
    return {f"{word}.{'.'.join((*head, word, leaf))}": t for name, t in RAW.items() for *head, leaf in [name.split(".")]}


# case -> (what torch.save is given, what is read of it, what is said)
CHECKPOINTS = {
    "plain data": ({"model": RAW, "epoch": 1} | BESIDE, RAW, ""),
    "ema, model": ({"ema": AVERAGE, "model": RAW} | BESIDE, AVERAGE, "taken: the averaged weights under 'ema'; also there: 'model'"),
    "model_ema": ({"model": RAW, "model_ema": AVERAGE, "epoch": 3}, AVERAGE, "the averaged weights under 'model_ema'; also"),
    "only model_ema": ({"model_ema": AVERAGE}, AVERAGE, "taken: the averaged weights under 'model_ema'\n"),
    "ema_state_dict": ({"state_dict": RAW, "ema_state_dict": AVERAGE}, AVERAGE, "under 'ema_state_dict'; also there: 'state_dict'"),
    "g_ema": ({"g_ema": AVERAGE, "g": RAW, "d": {"fc": torch.ones(2)}}, AVERAGE, "under 'g_ema'; also there: 'g' ("),
    "timm": ({"state_dict": RAW, "state_dict_ema": AVERAGE}, AVERAGE, "under 'state_dict_ema'"),
    "one level below": ({"nets": {"net": RAW, "SWA-net": AVERAGE}}, AVERAGE, "under 'nets.SWA-net'; also there: 'nets.net'"),
    "other key": ({"generator": RAW, "head": {f"é{i}": torch.ones(1) for i in range(2001)}}, RAW, ""),
    "lightning": ({"state_dict": prefixed("model."), "callbacks": {}, "loops": BESIDE}, RAW, "names: without model."),
    "of VAR": ({"trainer": {"vae_local": TOKENIZER, "var_wo_ddp": RAW}}, RAW, "var_wo_ddp'; also there: 'trainer.vae_local'"),
    "net": (prefixed("net."), RAW, "without net."),
    "ddp, compiled": (prefixed("module._orig_mod."), RAW, "without _orig_mod., module."),
    "deep": (prefixed("_orig_mod.model.module.net.module."), RAW, "without _orig_mod., model., module., net."),
    "fsdp": (among("_fsdp_wrapped_module"), RAW, "without _fsdp_wrapped_module."),
    "checkpointed": (among("_checkpoint_wrapped_module"), RAW, "without _checkpoint_wrapped_module."),
    "half": (HALF, HALF, ""),
    "mixed": (MIXED, MIXED, ""),
    "beside a number": (RAW | {"epoch": 3}, RAW, "left out: 'epoch'"),
}  # fmt: skip


def assert_read(folder, expected):
    found = PUBLISHED.entries(load_net(str(folder), "var"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_read_whatever_is_around_its_weights(case, old, tmp_path, capsys):
    content, expected, said = CHECKPOINTS[case]
    torch.save(content, tmp_path / "net", _use_new_zipfile_serialization=not old)
    assert convert_(tmp_path / "net", tmp_path / "ours") == 0
    out = capsys.readouterr().out
    assert said in out and (said or "taken" not in out)
    assert_read(tmp_path / "ours", expected)


def test_a_key_chooses_and_a_wrong_one_names_all(tmp_path, refused):
    torch.save({"model": RAW, "ema_0_1": AVERAGE, "ema_0_2": HALF, "vae": {"a": torch.ones(1)}}, tmp_path / "net.pt")
    for key, expected in (("model", RAW), ("ema_0_2", HALF)):
        assert convert_(tmp_path / "net.pt", tmp_path / key, "--weights-key", key) == 0
        assert_read(tmp_path / key, expected)
        assert read_config(tmp_path / key)["made_by"].endswith(f" --weights-key {key}")
    err = refused(tmp_path / "net.pt", tmp_path / "c", "--weights-key", "modle")
    assert "holds no network under 'modle', but 'model', 'ema_0_1', 'ema_0_2', 'vae': give one" in err
    two = "holds 2 networks ('ema_0_1', 'ema_0_2'): choose by `mclr convert FILE FOLDER --weights-key KEY`"
    assert two in refused(tmp_path / "net.pt", tmp_path / "c")


def test_entries_too_many_are_named_and_left_out_if_asked(tmp_path, capsys, refused):
    torch.save(RAW | {"my_head.weight": torch.zeros(3, 3), "global_step": torch.tensor(5)}, tmp_path / "net.pth")
    err = refused(tmp_path / "net.pth", tmp_path / "ours")
    assert "my_head.weight is unexpected, global_step is unexpected" in err and "`mclr convert --ignore-extra`" in err
    assert convert_(tmp_path / "net.pth", tmp_path / "ours", "--ignore-extra") == 0
    assert "left out: 'my_head.weight', 'global_step'" in capsys.readouterr().out
    assert_read(tmp_path / "ours", RAW)
    # what is missing is not made up for
    torch.save({name: t for name, t in RAW.items() if name != "head.bias"} | {"a": torch.ones(1)}, tmp_path / "net.pth")
    err = refused(tmp_path / "net.pth", tmp_path / "b", "--ignore-extra")
    assert "head.bias is missing" in err and "--ignore-extra" not in err


@pytest.fixture
def shards(tmp_path):
    """A folder as hubs keep a large network of other software."""
    folder, names = tmp_path / "hub", list(RAW)
    folder.mkdir()
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        safetensors.torch.save_file({name: RAW[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"depth": 2, "_class_name": "VAR"}))
    return folder


def test_shards_are_joined(shards, tmp_path):
    for name in ("hub", "hub/model.safetensors.index.json"):
        assert_read(find_weights(str(tmp_path / name)), RAW)
    (shards / "model.safetensors.index.json").unlink()
    assert_read(find_weights(str(shards)), RAW)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"does not hold one file or all shards of one network \('model-00001-of-00002.safetensors'\)"
    ):
        find_weights(str(shards))


@pytest.mark.parametrize("files", [("pytorch_model.bin", "training_args.bin"), ("model-00001-of-00001.safetensors",)])
def test_folders_of_one_file_as_hubs_keep_them(files, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in files:
        if file.endswith(".safetensors"):
            safetensors.torch.save_file(RAW, folder / file)
        else:
            torch.save(RAW if "model" in file else Namespace(lr=0.1), folder / file)
    assert_read(find_weights(str(folder)), RAW)


@pytest.mark.parametrize("licence", [b"\xff\xfe", b"a\x1b[31m", b"x" * 2000, None])
def test_a_licence_that_is_no_line_of_text_is_refused(licence, tmp_path):
    """None: the bytes of a good one are changed, so that its checksum differs."""
    path = tmp_path / "net.pth"
    torch.save(RAW, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/licence", b"MITMIT" if licence is None else licence)
    if licence is None:
        path.write_bytes(path.read_bytes().replace(b"MITMIT", b"MITMIX"))
    with pytest.raises(UserError, match="licence"):
        find_weights(str(path))


def test_a_folder_of_other_software_is_read_and_a_choice_is_said_once(tmp_path, capsys):
    (tmp_path / "hub").mkdir()
    torch.save({"model": RAW, "ema": AVERAGE}, tmp_path / "hub/pytorch_model.bin")
    (tmp_path / "hub/config.json").write_text("{}")
    for _ in range(2):
        assert_read(find_weights(str(tmp_path / "hub")), AVERAGE)
    first, second = capsys.readouterr().err.splitlines()
    assert "converted once" in first and ": taken: the averaged weights under 'ema'; also there: 'model'" in second
    safetensors.torch.save_file(RAW, tmp_path / "hub/model.safetensors")
    assert_read(find_weights(str(tmp_path / "hub")), RAW)


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ("[]", "is no index of shards"),
        ('{"weight_map": {"a": 3}}', "is no index of shards"),
        ('{"weight_map": {}}', "names shards that are not beside it"),
        ('{"weight_map": {"a": "../net.pth"}}', "names shards that are not beside it ('../net.pth')"),
        ('{"weight_map": {"a": "none.bin"}}', "names shards that are not beside it ('none.bin')"),
    ],
)
def test_a_bad_index_is_one_line(index, line, tmp_path, refused):
    torch.save(RAW, tmp_path / "net.pth")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/a.index.json").write_text(index)
    assert line in refused(tmp_path / "hub", tmp_path / "ours")


def test_a_folder_of_several_networks_is_not_guessed_at(tmp_path, refused):
    for name in ("a.pth", "b.pth"):
        torch.save(RAW, tmp_path / name)
    several = "does not hold one file or all shards of one network ('a.pth', 'b.pth'): give one file"
    assert several in refused(tmp_path, tmp_path / "ours")
    (tmp_path / "none").mkdir()
    assert "is a folder without weights: give a file" in refused(tmp_path / "none", tmp_path / "ours")
