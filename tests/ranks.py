"""What the launcher runs for tests/test_engine.py: ranks of one process group, every stage against Engine on the whole batch.

ranks.py DIGITS TOKENIZER OUT: a dataset folder, a weights folder, a new folder; rank 0 leaves OUT/results.json there. COMPILED=1 in the
environment: what torch.compile makes of it instead.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mclr.configs.schema import load
from mclr.train.cli import main as cli
from mclr.train.engine.checkpoint import load_checkpoint, save_checkpoint
from mclr.train.system.console import run_and_exit
from mclr.train.system.ranks import group, world
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.step import train_step
from mclr.train.weights.folder import save_weights

BATCH, STEPS, MORE, LR, CLIP = 16, 12, 3, 2e-3, 1.4
STAGES = (0, 1, 2, 3)
TINY = {
    "edm2-digits": [
        "model.net.model_channels=8",
        "model.net.channels_per_head=8",
        "model.posterior.channels=8",
        "model.posterior.weights=null",
        "objective.contrast=posterior",
        "objective.lam=0.2",
    ],
    "var-digits": [
        "model.net.depth=2",
        "model.net.embed_dim=32",
        "model.net.num_heads=2",
        "objective.contrast=null",
        "objective.lam=0.5",
    ],
}

# what more of a step the ranks share: (model, objective, settings); at the stages 2 and 3
KINDS = {
    "reference": ("edm2-digits", "cca", ()),
    "reference of tokens": ("var-digits", "cca", ()),
    "generated": ("edm2-digits", "ddo", ()),
    "generated tokens": ("var-digits", "ddo", ()),
    "rows cut short": (
        "var-digits",
        "mclr",
        ("objective.contrast=uniform", "objective.schedule.kind=interval", "objective.schedule.high=0.5"),
    ),
    "dial": ("edm2-digits", "mclr", ("model.strength.max=2.0", "objective.lam=null")),
    "prefix posterior": ("var-digits", "mclr", ("objective.contrast=posterior", "objective.lam=0.2")),
    "sharded reference": ("edm2-digits", "cca", ("engine.reference=sharded",)),
    "sharded reference of tokens": ("var-digits", "cca", ("engine.reference=sharded",)),
}
# what one process runs in their place
LOCAL = {"sharded reference": (), "sharded reference of tokens": ()}
CHECKPOINTED = "engine.activation_checkpointing=true"
# engines that go on from each other's checkpoints
RESUMED = ((0, 1), (1, 2), (2, 3), (3, 0), (0, "local"), (1, "local"), (2, "local"), (3, "local"), ("local", 2), ("local", 3))
# ways to run the same step: (stages, settings)
WAYS = {
    "offload": ((1, 2, 3), ("engine.offload=true",)),
    "checkpointed": (STAGES, (CHECKPOINTED,)),
}
COMPILED = {"compiled": (("local", 2, 3), ("engine.compile=true",)), "both": ((3,), ("engine.compile=true", CHECKPOINTED))}


def tiny(model, tokenizer):
    """Overrides that make a preset small, and free of bundled weights."""
    return [*TINY[model], "model.weights=null"] + [f"model.tokenizer={tokenizer}"] * (model == "var-digits")


class Trained:
    """A task and how many steps it has made; kind: local or a ZeRO stage."""

    def __init__(self, model, kind, digits, tokenizer, micro_batch, precision="fp32", objective="mclr", settings=()):
        engine = "local" if kind == "local" else f"zero{kind}"
        overrides = [*tiny(model, tokenizer), f"data.path={digits}", f"train.batch={BATCH}"]
        if objective != "mclr":
            overrides = [pair for pair in overrides if not pair.startswith("objective.")]
        overrides += [f"engine.precision={precision}", f"engine.gradient_clipping={CLIP}", *settings]
        config = load(model, objective, "digits", engine, overrides)
        device = torch.device("cpu")
        self.micro_batch, self.done, self.norms = micro_batch, 0, []
        self.rank, _, self.ranks = (0, 0, 1) if kind == "local" else world()
        self.task = build_task(config, open_source(config), build_networks(config, device), device, micro_batch)

    def train(self, steps):
        share = BATCH // self.ranks
        for _ in range(steps):
            first = self.done * BATCH + self.rank * share
            metrics = train_step(self.task, range(first, first + share), self.micro_batch, LR, lambda: False)
            self.norms.append(float(metrics["gradient_norm"]))
            self.done += 1
        return self

    def poisoned(self):
        """One step whose images are no numbers."""
        samples, self.task.samples = self.task.samples, lambda *args: nan_first(samples(*args))
        self.train(1)
        self.task.samples = samples
        assert not self.task.engine.stepped
        return self

    def give_up(self):
        """Begin one more step, and stop before its second micro-batch."""
        asked = iter((False, True))
        first = self.done * BATCH + self.rank * BATCH // self.ranks
        positions = range(first, first + BATCH // self.ranks)
        assert train_step(self.task, positions, self.micro_batch, LR, lambda: next(asked)) is None
        return self

    def engines(self):
        return {"engine": self.task.engine} | ({"posterior": self.task.posterior_engine} if self.task.posterior_engine else {})

    def weights(self):
        """Whole, on rank 0; elsewhere empty."""
        return {f"{part}.{name}": w.clone() for part, e in self.engines().items() for name, w in e.gather(e.shards()).items()}

    def save(self, folder):
        tensors = {part: engine.save() for part, engine in self.engines().items()}
        if world()[0] == 0:
            save_checkpoint(folder, self.done, tensors, {}, {}, keep=1)
        torch.distributed.barrier()

    def load(self, folder):
        """The weights as they were saved."""
        tensors, _ = load_checkpoint(folder / "checkpoints" / f"{STEPS:012d}")
        for part, engine in self.engines().items():
            engine.load(tensors[part])
        self.done = STEPS
        return {f"{part}.{name.removeprefix('weight:')}": w for part in tensors for name, w in tensors[part].items()}


def nan_first(samples):
    x, *rest = samples
    return x * float("nan"), *rest


def draw(model, trained, digits, tokenizer, out):
    """Settings of a run that starts from what was trained, and of one that also needs samples of it."""
    weights, drawn = out / f"{model}-weights", out / f"{model}-drawn"
    if world()[0] == 0:
        save_weights(weights, trained.task.engine.net)
    torch.distributed.barrier()
    settings = [pair for pair in tiny(model, tokenizer) if not pair.startswith("objective.")]
    argv = ["sample", str(weights), "--model", model, "--data", str(digits), "--out", str(drawn), "--count=40", "--dataset"]
    # ranks share the drawing
    assert cli([*argv, *settings]) == 0
    torch.distributed.barrier()
    from_there = (f"model.weights={weights}",)
    return {"mclr": (), "cca": from_there, "ddo": (*from_there, f"objective.generated={drawn / 'dataset'}")}


def distance(a, b):
    """Relative RMS over all weights; of the network or of the posterior's classifier, whichever is larger. On rank 0, which has them."""
    if world()[0] != 0:
        return None
    assert a.keys() == b.keys()
    parts = {name.partition(".")[0] for name in a}
    return max(relative_rms({k: a[k] for k in a if k.startswith(part)}, b) for part in parts)


def relative_rms(a, b):
    apart = sum((a[name].double() - b[name].double()).square().sum() for name in a)
    return float((apart / sum(b[name].double().square().sum() for name in a)).sqrt())


def norms_apart(a, b):
    return max(abs(x - y) / y for x, y in zip(a.norms, b.norms, strict=True))


def off_projection(trained):
    """Largest deviation from 1 of the RMS of a row of a weight under forced normalisation; 0 where a network has none."""
    net = trained.task.engine.net
    forced = {name for name, p in net.named_parameters() if any(p is w for w in trained.task.normalised)}
    whole = trained.weights()
    assert len(forced) == len(trained.task.normalised)
    rows = [whole[f"engine.{name}"].flatten(1).square().mean(1).sqrt() for name in forced if whole]
    return max((float((r - 1).abs().max()) for r in rows), default=0.0)


def part():
    """A micro-batch of which each of these ranks has two."""
    return BATCH // world()[2] // 2


def apart(ranks, local):
    return {"weights": distance(ranks.weights(), local.weights()), "norms": norms_apart(ranks, local)}


def every_stage(make, model, out, results):
    """Makes the plain run, in fp32 and bf16, on every stage; leaves checkpoints of all. Returns the plain one."""
    local, micro = make(model, "local", BATCH).train(STEPS), make(model, "local", BATCH // 4).train(STEPS)
    moved = distance(local.weights(), make(model, "local", BATCH).weights())
    results[f"{model} local"] = {"moved": moved, "norms": [min(local.norms), max(local.norms)], "micro": apart(micro, local)}
    local.save(out / f"{model}-local")
    # by the forwards of these ranks: in bf16 those of other sizes round otherwise, and Adam's first steps magnify that
    share = BATCH // world()[2]
    half = make(model, "local", share, "bf16").train(STEPS)
    for zero in STAGES:
        ranks = make(model, zero, part()).train(STEPS)
        results[f"{model} zero{zero}"] = apart(ranks, local) | {"rows": off_projection(ranks)}
        # as after a signal: a checkpoint in the middle of a step holds what was before the step
        ranks.give_up().save(out / f"{model}-{zero}")
        ranks = make(model, zero, share, "bf16").train(STEPS)
        results[f"{model} zero{zero} bf16"] = {
            "weights": distance(ranks.weights(), half.weights()),
            "rows": off_projection(ranks),
        }
    results[f"{model} one micro-batch"] = apart(make(model, 1, share).train(STEPS), local)
    return local


def every_resume(make, model, local, out, results):
    """Goes on from every checkpoint with another engine."""
    local.train(MORE)
    for start, end in RESUMED:
        resumed = make(model, end, BATCH if end == "local" else part())
        saved = resumed.load(out / f"{model}-{start}")
        same = all(torch.equal(saved[name], weight) for name, weight in resumed.weights().items())
        results[f"{model} from {start} to {end}"] = {
            "same": same,
            "next": distance(resumed.train(MORE).weights(), local.weights()),
        }


def every_way(make, model, ways, results):
    """Makes the same few steps in these ways and in the plain one."""
    local = make(model, "local", BATCH).train(MORE)
    for name, (kinds, settings) in ways.items():
        for kind in kinds:
            ran = make(model, kind, BATCH if kind == "local" else part(), settings=settings).train(MORE)
            config = getattr(getattr(ran.task.engine, "engine", None), "_config", None)
            assert (name == "offload") == (config is not None and config.zero_config.offload_optimizer is not None)
            results[f"{model} {name} {kind}"] = {"weights": distance(ran.weights(), local.weights())}
            assert ("engine.compile=true" in settings) == (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)


def every_kind(make, settings, results):
    for name, (model, objective, more) in KINDS.items():
        local = make(model, "local", BATCH, objective=objective, settings=settings[model][objective] + LOCAL.get(name, more))
        fresh = local.weights()
        local.train(MORE)
        for zero in (2, 3):
            ranks = make(model, zero, part(), objective=objective, settings=settings[model][objective] + more).train(MORE)
            results[f"{name} zero{zero}"] = {"moved": distance(local.weights(), fresh), **apart(ranks, local)}


def every_skip(make, model, results):
    """Steps that are not finite, against a run that passes over their batches."""
    local = make(model, "local", BATCH).train(MORE)
    local.done += 1
    local.train(MORE)
    for zero in STAGES:
        ranks = make(model, zero, part()).train(MORE).poisoned().train(MORE)
        results[f"poisoned zero{zero}"] = {"weights": distance(ranks.weights(), local.weights())}


def every_model(digits, tokenizer, out):
    results, settings = {}, {}

    def make(model, kind, micro_batch, *more, **named):
        return Trained(model, kind, digits, tokenizer, micro_batch, *more, **named)

    for model in TINY:
        if os.environ.get("COMPILED"):
            every_way(make, model, COMPILED, results)
            continue
        local = every_stage(make, model, out, results)
        settings[model] = draw(model, local, digits, tokenizer, out)
        every_resume(make, model, local, out, results)
        every_way(make, model, WAYS, results)
    if settings:
        every_kind(make, settings, results)
        every_skip(make, "edm2-digits", results)
    if world()[0] == 0:
        (out / "results.json").write_text(json.dumps(results, indent=1))


def main(_):
    torch.set_num_threads(1)
    with group(True):
        every_model(*map(Path, [word for word in sys.argv[1:] if not word.startswith("--local_rank")]))


if __name__ == "__main__":
    run_and_exit(main)
