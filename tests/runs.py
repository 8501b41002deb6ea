"""What tests of training share: a tiny run with every source of chance, what it logged, and the comparison of two runs."""

import json
from pathlib import Path

import torch
from ranks import tiny
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from mclr.train.training.throughput import TIMING

MODELS = ("edm2-digits", "var-digits")
BATCH, STEPS = 8, 6
# every source of chance and every state: dropout, averages, dropped conditions, micro-batches, warm-up, decay, clipping
RECIPE = [
    "train.ema_std=0.1",
    "train.snapshot_every=16",
    "train.drop_condition=0.3",
    "train.micro_batch=4",
    "train.warmup_images=32",
    "train.weight_decay=0.1",
    "train.log_every=1",
    "train.checkpoint_every=1000000",
    "train.keep=2",
    "engine.gradient_clipping=1.0",
]
DROPOUT = {"edm2-digits": "model.net.dropout=0.2", "var-digits": "model.net.drop_path=0.2"}
# of the moment: who held the folder, what ranks last did, checksums and a page of files that tell the time a run took
IGNORED = ("lock", "manifest.json", "README.md")


def arguments(model, data, tokenizer, engine, *more):
    """Of `mclr train` into ./run: every source of chance and every state."""
    argv = ["--model", model, "--data", str(data), "--engine", engine, "--out", "run", *tiny(model, tokenizer), *RECIPE]
    return [*argv, DROPOUT[model], f"train.batch={BATCH}", f"train.images={STEPS * BATCH}", *more]


def metrics(run):
    """The lines of metrics.jsonl without the time they took."""
    return [_timeless(json.loads(line)) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def tensors(folder):
    """By file and name."""
    return {f"{path.name}:{k}": t for path in sorted(folder.glob("*.safetensors")) for k, t in load_tensors(path).items()}


def assert_same_tensors(run, other):
    """Of the checkpoints and the weights of two runs."""
    for place in (*(run / "checkpoints").iterdir(), run / "weights"):
        here, there = tensors(place), tensors(other / place.relative_to(run))
        assert here.keys() == there.keys() and len(here) > 10
        assert [k for k in here if not torch.equal(here[k], there[k])] == []


def steps_logged(run):
    """Of every whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["images"] // BATCH for line in lines if line.endswith("}")]


def differences(run, other):
    """Files of one run folder that are missing in the other or differ there, but for times; of checkpoints the newest alone counts."""
    here, there = _contents(run), _contents(other)
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def _contents(run):
    newest = max((run / "checkpoints").iterdir())
    contents = {}
    for path in (path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        old = name.startswith("checkpoints/") and newest not in path.parents
        if not (old or name.startswith("watchdog/") or path.name in IGNORED):
            contents[name] = _content(path)
    return contents


def _content(path: Path):
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".safetensors":
        # the order within its header is of no account, and changes
        with safe_open(path, framework="np") as file:
            about = file.metadata()
        return about, {name: (t.dtype, t.shape, t.tobytes()) for name, t in load_file(path).items()}
    return path.read_bytes()


def _timeless(value):
    return {k: _timeless(v) for k, v in value.items() if k not in TIMING} if isinstance(value, dict) else value
