"""train/weights/published.py and edm2_pickle.py: networks out of pickles, checkpoints and damaged files."""

import dataclasses
import gzip
import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import archive, saved
from golden_weights import FOLDER, load_golden, rule_weights

from mclr.errors import UserError
from mclr.models.convert import NAMED
from mclr.models.edm2 import PUBLISHED, EDM2Config
from mclr.train.weights.published import read_published

_, ARGUMENTS, NAMES = load_golden("edm2_tiny.npz")
TINY = rule_weights(NAMES)
CONFIG = EDM2Config(
    img_resolution=16, img_channels=3, num_classes=10, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,),
    channels_per_head=16, logvar_channels=32,
)  # fmt: skip


def var(**changed):
    _, _, names = load_golden("var_tiny.npz")
    return rule_weights(names) | changed


class Part:
    """A network, or a part of one, that is pickled as EDM2's are."""

    def __init__(self, **state):
        self.state = {"_parameters": {}, "_buffers": {}, "_modules": {}} | state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": "#", "class_name": "Part", "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture
def persistence(monkeypatch):
    """The function that EDM2's pickles name, for writing them."""
    module = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): assert False, 'never run'", module.__dict__)
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def network(state_dict, given=ARGUMENTS, states=None):
    """The tree of parts of a state dict. given: the recorded arguments; states: prefix of a part -> further attributes."""
    parts = {"": Part(_init_args=(), _init_kwargs=given)}
    for name, t in state_dict.items():
        *path, leaf = name.split(".")
        for depth, piece in enumerate(path):
            prefix = ".".join(path[: depth + 1])
            parent = parts[".".join(path[:depth])]
            parts[prefix] = parent.state["_modules"].setdefault(piece, parts.get(prefix) or Part())
        parts[".".join(path)].state["_parameters"][leaf] = torch.nn.Parameter(t.half(), requires_grad=False)
    for prefix, state in (states or {}).items():
        parts[prefix].state.update(state)
    return parts[""]


def test_a_snapshot_becomes_its_network():
    net, notes = read_published(FOLDER / "edm2_tiny.pkl")
    assert net.config == CONFIG
    found = PUBLISHED.entries(net)
    assert found.keys() == TINY.keys() and all(torch.equal(found[name], TINY[name].half().float()) for name in TINY)
    assert "CC BY-NC-SA 4.0" in notes["licence"]


def test_options_come_from_arguments_then_state_then_defaults(persistence, tmp_path):
    """The balances as arguments; what the parts keep, where no argument says it; channels_per_head from the number of heads."""
    given = {key: value for key, value in ARGUMENTS.items() if key != "channels_per_head"} | {
        "attn_balance": 0.25,
        "use_fp16": True,
    }
    states = {
        "": {"sigma_data": 0.25},
        "unet": {"concat_balance": 0.75},
        "unet.enc.8x8_block0": {"num_heads": 8, "out_channels": 64, "clip_act": 128, "dropout": 0.125, "resample_filter": [1, 1]},
        "unet.enc.16x16_block0": {"num_heads": 0, "out_channels": 32, "attn_balance": 0.25},
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": network(TINY, given, states)}, 4))
    net, _ = read_published(tmp_path / "a.pkl")
    assert net.config == dataclasses.replace(
        CONFIG, attn_balance=0.25, sigma_data=0.25, concat_balance=0.75, clip_act=128.0, dropout=0.125, channels_per_head=8
    )


def test_widths_that_shapes_alone_do_not_tell(persistence, tmp_path):
    """The unit of the widths is recorded; an unconditional network has no table of conditions."""
    given = ARGUMENTS | {"model_channels": 8, "channel_mult": [4, 8], "channel_mult_noise": 4, "label_dim": 0}
    state_dict = {name: t for name, t in TINY.items() if "emb_label" not in name}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": network(state_dict, given)}, 4))
    net, _ = read_published(tmp_path / "a.pkl")
    assert net.config == dataclasses.replace(CONFIG, model_channels=8, channel_mult=(4, 8), channel_mult_noise=4, num_classes=0)


@pytest.mark.parametrize("where", ["ema", "net", None])
def test_a_network_is_found_beside_other_things(where, persistence, tmp_path):
    encoder = Part(_init_kwargs={}, scale=np.float32([1, 2]), bias=np.float64(3))
    net = network(TINY)
    content = (
        {where: net, "encoder": encoder, "loss_fn": Part(sigma_data=7.0), "dataset_kwargs": {"path": "x.zip"}} if where else net
    )
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    assert read_published(tmp_path / "a.pkl")[0].config == CONFIG


CONTRADICTIONS = {
    "num_blocks": ({"num_blocks": 2}, {}, "records num_blocks 2, elsewhere it has 1"),
    "label_dim": ({"label_dim": 1000}, {}, "records label_dim 1000, elsewhere it has 10"),
    "img_resolution": ({"img_resolution": 32}, {}, "records img_resolution 32, elsewhere it has 16"),
    "attn_resolutions": ({"attn_resolutions": [16, 8]}, {}, "unet.enc.16x16_block0.attn_qkv.weight is missing"),
    "model_channels": ({"model_channels": 64}, {}, "unet.emb_noise.weight is [64, 32] instead of [128, 64]"),
    "levels": ({"channel_mult": [1, 2, 4]}, {}, "unet.emb_noise.weight is [64, 32] instead of [128, 32]"),
    "noise": ({"channel_mult_noise": 3}, {}, "unet.emb_fourier.freqs is [32] instead of [96]"),
    "embedding": ({"channel_mult_emb": 3}, {}, "unet.emb_noise.weight is [64, 32] instead of [96, 32]"),
    "state": ({"sigma_data": 0.5}, {"": {"sigma_data": 1.0}}, "records sigma_data 0.5, elsewhere it has 1.0"),
    "heads": (
        {},
        {"unet.enc.8x8_block0": {"num_heads": 2, "out_channels": 64}},
        "records channels_per_head 32, elsewhere it has 16",
    ),
    "another option": ({"skip_mode": "cat"}, {}, "records the option 'skip_mode', which this EDM2 does not have"),
    "another filter": ({"resample_filter": [1, 3, 3, 1]}, {}, "records another resample_filter"),
    "heads of width 0": ({"channels_per_head": 0}, {}, "records a channels_per_head that no EDM2 has"),
    "no heads": ({"channels_per_head": 24}, {}, "channels_per_head=24 must divide the 64 channels"),
    "dropout": ({"dropout": 1.5}, {}, "records a dropout that no EDM2 has"),
    "nan": ({"sigma_data": float("nan")}, {}, "records a sigma_data that no EDM2 has"),
    "overflow": ({"clip_act": 1 << 2000}, {}, "records a clip_act that no EDM2 has"),
    "truth": ({"num_blocks": True}, {}, "records a num_blocks that no EDM2 has"),
    "text": ({"channel_mult": "12"}, {}, "records a channel_mult that no EDM2 has"),
    "no levels": ({"channel_mult": []}, {}, "records a channel_mult that no EDM2 has"),
    "no record": ({}, {"": {"_init_kwargs": None}}, "does not record the options"),
    "no tensor": ({}, {"unet.out_conv": {"_buffers": {"freqs": 3}}}, "holds no tensor at 'unet.out_conv.freqs'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_snapshot_that_contradicts_itself_is_refused(case, persistence, tmp_path):
    given, states, line = CONTRADICTIONS[case]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": network(TINY, ARGUMENTS | given, states)}, 4))
    with pytest.raises(UserError) as error:
        read_published(tmp_path / "a.pkl")
    assert line in str(error.value)


LIKELY = "looks like a VAR next-scale network, but"
SMALL = saved({"a": torch.zeros(9999)})
OLD = saved({"a": torch.zeros(9999)}, _use_new_zipfile_serialization=False)
SNAPSHOT = (FOLDER / "edm2_tiny.pkl").read_bytes()
PLAIN = safetensors.torch.save({"a": torch.zeros(99)})
FC = "blocks.1.ffn.fc2.bias"
NONE = "is no published EDM2, DiT, SiT, VAR or VQVAE (its entries: "
BAD = {
    "no file": (None, "net (No such file or directory): give a published state dict"),
    "empty": (b"", "is empty: download it again"),
    "web page": (b"\n<!DOCTYPE html>\n<html>" + b"x" * 999, "is a web page: download the file itself"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "text": (b"404: Not Found", "is text ('404: Not Found'), no weights"),
    "gzip": (gzip.compress(SMALL), "is compressed by gzip: unpack it"),
    "half of a zip": (SMALL[:20000], "is incomplete"),
    "all but a byte of a zip": (SMALL[:-1], "is incomplete"),
    "half of an old file": (OLD[:20000], "is incomplete"),
    "half of a snapshot": (SNAPSHOT[:700_000], "is incomplete"),
    "half of a safetensors": (PLAIN[:200], "is incomplete"),
    "half of its header": (PLAIN[:20], "is incomplete"),
    "no content": (b"\x80\x04.", "is damaged"),
    "noise": (bytes(range(256)), "asks for what no weights need"),
    "noise in a pickle": (b"\x80\x02garbage", "asks for what no weights need"),
    "noise in a zip": (archive({"a/data.pkl": b"x"}), "asks for what no weights need"),
    "a number": (saved(3), "is no state dict"),
    "numbers": (saved({"trainer": {}, "epoch": 3}), "is no state dict"),
    "arrays": (pickle.dumps({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, 4), "is no state dict"),
    "two networks": (saved({"model": TINY, "net": TINY}), "holds 2 networks ('model', 'net'): choose by `mclr convert FILE FOLDER --w"),
    "a module": (saved(torch.nn.Linear(2, 2)), f"{NONE}weight, bias, ...)"),
    "other network": (saved({"fc.weight": torch.zeros(2), "epoch": 3}), f"{NONE}fc.weight, ...)"),
    "one name twice": (saved({"model.a": torch.zeros(2), "a": torch.zeros(2)}), "entries of the same name"),
    "empty entry": (saved(var(extra=torch.zeros(0))), "has no numbers at 'extra'"),
    "escapes": (saved({"\x1b[2J": torch.zeros(2)}), "impossible names"),
    "missing entry": (saved({k: t for k, t in var().items() if k != FC}), f"{LIKELY} {FC} is missing"),
    "missing table": (saved({k: t for k, t in var().items() if k != "class_emb.weight"}), "is no whole VAR: class_emb.weight is missing"),
    "unexpected entries": (saved(var(**{f"lora{i}": torch.zeros(2) for i in range(300)})), f"and {300 - NAMED} more entries"),
    "other shape": (saved(var(**{FC: torch.zeros(5)})), f"{LIKELY} {FC} is [5]"),
    "bad shape": (saved(var(pos_1LC=torch.zeros(2))), "is no whole VAR"),
    "unknown scales": (saved(var(pos_1LC=torch.zeros(1, 21, 128))), "has scales of other sides than the published ones"),
    "a stub": (saved({"unet.out_gain": torch.zeros(())}), "is no whole EDM2: entries like unet.enc.#x#_block0"),
    "too few heads": (saved(var(**{"blocks.0.attn.scale_mul_1H11": torch.zeros(1, 3, 1, 1)})), "must be a multiple of model.net.num"),
    "nan": (saved(var(**{FC: torch.full([128], torch.nan)})), f"holds NaN or infinite numbers at {FC}"),
    "infinite": (saved(var(**{FC: torch.full([128], 1e300, dtype=torch.double)})), f"holds NaN or infinite numbers at {FC}"),
    "integers": (saved(var(**{FC: torch.zeros(128, dtype=torch.int8)})), f"holds torch.int8 at {FC}, no weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_short_line_and_leaves_nothing(case, tmp_path, refused):
    content, line = BAD[case]
    if content is not None:
        (tmp_path / "net").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    err = refused(tmp_path / "net", tmp_path / "ours")
    assert line in err and str(tmp_path / "net") in err and len(err) < 600
    assert sum(err.count(fault) for fault in (" is missing", " is unexpected, ", " instead of ")) <= NAMED
    assert sorted(tmp_path.iterdir()) == before
