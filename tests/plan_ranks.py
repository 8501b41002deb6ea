"""What the launcher runs for tests/planning/test_plan.py: what tensors and collectives of a training step take, at every ZeRO stage.

plan_ranks.py DIGITS TOKENIZER OUT: a dataset folder, a weights folder, a new folder; rank 0 leaves OUT/results.json there.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist

import mclr.train.engine.zero
from mclr.configs.schema import load
from mclr.train.engine.ema import averages_of
from mclr.train.system.console import run_and_exit
from mclr.train.system.ranks import group, world
from mclr.train.training.build import build_networks, build_task, open_source
from mclr.train.training.step import train_step

BATCH, MICRO = 8, 2
SMALL = 60_000  # of a bucket, below the weights of both networks
GATHERED = ("engine.kind=deepspeed", "engine.zero=3")
# hardly a condition is dropped and none coincides: as many rows as there can be
MODELS = {
    "edm2-digits": ("train.drop_condition=0", "objective.contrast=uniform", "objective.lam=0.2", "model.posterior.weights=null"),
    "var-digits": ("train.drop_condition=0.001", "objective.lam=0.5"),
}


def planned_run(model, tokenizer, *more):
    """The config of a small run."""
    named = ["model.weights=null", *[f"model.tokenizer={tokenizer}"] * (model == "var-digits"), f"train.batch={BATCH}"]
    overrides = [*MODELS[model], *named, f"train.micro_batch={MICRO}", *more]
    return load(model, "mclr", "digits", "auto", overrides)


def storages(tensors):
    """Storage -> bytes of all that these tensors lie in."""
    held = [t.untyped_storage() for t in tensors if t is not None]
    return {storage._cdata: storage.nbytes() for storage in held}


def live():
    gc.collect()
    # instances tell their class by a property that some raise in
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.layout == torch.strided]
    return storages([*tensors, *(t.grad for t in tensors if t.is_leaf)])


SENT = {"bytes": 0.0, "nested": False}


def count_collectives():
    """SENT["bytes"] grows by what a ring would have this rank send. Before DeepSpeed starts, which keeps the functions that it finds."""
    share = (world()[2] - 1) / world()[2]
    # times that a tensor is sent, and place of the whole one among the arguments
    kinds = {"all_reduce": (2, 0), "broadcast": (1, 0), "all_gather_into_tensor": (1, 0), "all_gather": (1, 0)}
    kinds |= {"reduce_scatter_tensor": (1, 1), "reduce_scatter": (1, 1)}
    for name, (times, whole) in kinds.items():
        setattr(dist, name, counted(getattr(dist, name), times * share, whole))


def counted(collective, times, whole):
    def call(*args, **kwargs):
        outer, SENT["nested"] = SENT["nested"], True
        if not outer:
            given = [*args, *kwargs.values()][whole]
            tensors = given if isinstance(given, list) else [given]
            SENT["bytes"] += times * sum(t.numel() * t.element_size() for t in tensors)
        try:
            return collective(*args, **kwargs)
        finally:
            SENT["nested"] = outer

    return call


def measure(config, patch):
    """Bytes on the rank that has most: in the second step, when nothing is made for the first time any more."""
    networks = build_networks(config, torch.device("cpu"))
    task = build_task(config, open_source(config), networks, torch.device("cpu"), MICRO)
    averages = averages_of(task.engine.shards(), config.train)
    rank, _, ranks = world()
    share, trained = BATCH // ranks, task.engine
    zero, parameters = trained.engine.optimizer, list(trained.net.parameters())
    seen = []

    def buckets():
        # ZeRO 1 and 2 have a list of buffers, ZeRO 3 one from the start
        found = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
        return storages(t for each in found for t in (each if isinstance(each, list) else [each]))

    def watched(owner, name, look):
        call = getattr(owner, name)

        def watching(*args):
            known = idle | buckets()
            seen.append({key: size for key, size in look().items() if key not in known})
            return call(*args)

        patch.setattr(owner, name, watching)

    for step in range(2):
        if step == 1:
            idle, SENT["bytes"] = live(), 0.0
            # gradients that accumulate; those at the end of backward, where DeepSpeed lets go of its buckets; what the step takes
            watched(trained, "backward", lambda: storages(p.grad for p in parameters))
            watched(trained, "step", live)
            if hasattr(zero, "_release_ipg_buffers"):
                watched(zero, "_release_ipg_buffers", live)
        first = step * BATCH + rank * share
        train_step(task, range(first, first + share), MICRO, config.train.lr, lambda: False)
    weights = storages(getattr(p, "ds_tensor", p) for p in parameters)
    # ZeRO 3 keeps both of its own
    masters = getattr(
        zero, "fp32_partitioned_groups_flat", [p for group in trained.optimizer.param_groups for p in group["params"]]
    )
    flat = storages([getattr(zero, "grad_partitions_flat_buffer", None)])
    optimizer = storages([*masters, *(t for state in trained.optimizer.state.values() for t in state.values())])
    new = [sum(each.values()) for each in seen]
    found = {
        "weights": sum(weights.values()),
        "gradients": max(new) + sum(flat.values()),
        "optimizer": sum(size for key, size in optimizer.items() if key not in weights),
        "averages": sum(storages(t for ema in averages.values() for t in ema.average.values()).values()),
        "sent": SENT["bytes"],
    }
    everywhere = [None] * ranks
    dist.all_gather_object(everywhere, found)
    return {key: max(each[key] for each in everywhere) for key in found}


def most_gathered(config, patch):
    """Bytes of weights that ZeRO 3 has whole, and of the messages that brought them, at most."""
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    networks = build_networks(config, torch.device("cpu"))
    task = build_task(config, open_source(config), networks, torch.device("cpu"), MICRO)
    parameters, sizes, handles = list(task.engine.net.parameters()), [0], weakref.WeakSet()
    begin, wait = AllGatherCoalescedHandle.__init__, AllGatherCoalescedHandle.wait

    def beginning(handle, *args, **kwargs):
        begin(handle, *args, **kwargs)
        handles.add(handle)

    def waiting(handle, *args, **kwargs):
        wait(handle, *args, **kwargs)
        whole = storages(p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
        sizes.append(sum((whole | storages(t for each in handles for t in each.partitions)).values()))

    patch.setattr(AllGatherCoalescedHandle, "__init__", beginning)
    patch.setattr(AllGatherCoalescedHandle, "wait", waiting)
    rank, _, ranks = world()
    share = BATCH // ranks
    # DeepSpeed learns the order of the weights in the second
    for step in range(3):
        first = step * BATCH + rank * share
        train_step(task, range(first, first + share), MICRO, config.train.lr, lambda: False)
    return max(sizes)


def every_model(digits, tokenizer, out):
    results = {}
    for model in MODELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mclr.train.engine.zero, "BUCKET", SMALL)
            results[f"{model} gathered"] = most_gathered(planned_run(model, tokenizer, *GATHERED, f"data.path={digits}"), patch)
        for zero in range(4):
            settings = ("engine.kind=deepspeed", f"engine.zero={zero}", f"data.path={digits}")
            with pytest.MonkeyPatch.context() as patch:
                results[f"{model} {zero}"] = measure(planned_run(model, tokenizer, *settings), patch)
    if world()[0] == 0:
        (out / "results.json").write_text(json.dumps(results, indent=1))


def main(_):
    torch.set_num_threads(1)
    # live() need not look through the modules that are imported
    gc.freeze()
    count_collectives()
    with group(True):
        every_model(*map(Path, [word for word in sys.argv[1:] if not word.startswith("--local_rank")]))


if __name__ == "__main__":
    run_and_exit(main)
