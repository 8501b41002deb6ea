"""What the tests of faults and of resumes under ZeRO share: the arguments of a tiny run, and the comparison of two runs."""

import json
from pathlib import Path

from ranks import tiny
from safetensors import safe_open
from safetensors.numpy import load_file
from test_resume import BATCH, DROPOUT, RECIPE, STEPS

from mclr.train.training.throughput import TIMING

# of the moment: who held the folder, what ranks last did, checksums and a page of files that tell the time a run took
IGNORED = ("lock", "manifest.json", "README.md")


def arguments(model, data, tokenizer, engine, *more):
    """Of `mclr train` into ./run: every source of chance and every state."""
    argv = ["--model", model, "--data", str(data), "--engine", engine, "--out", "run", *tiny(model, tokenizer), *RECIPE]
    return [*argv, DROPOUT[model], f"train.batch={BATCH}", f"train.images={STEPS * BATCH}", *more]


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
