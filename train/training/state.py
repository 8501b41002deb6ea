"""What a run has done so far: how it is counted, and how it is kept and found again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mclr.configs.schema import Train
from mclr.errors import UserError
from mclr.kernels.choice import using
from mclr.likelihood import Draws
from mclr.posterior import NoisyPosterior
from mclr.train.engine.base import Engine, buffers_of
from mclr.train.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mclr.train.engine.ema import EMA, write_snapshot
from mclr.train.system.files import ignore
from mclr.train.system.ranks import collective, from_rank_0, world
from mclr.train.training.step import Task
from mclr.train.weights.folder import describe, save_weights


@dataclass
class RunState:
    """What a run has done so far, over all ranks; part of every checkpoint.

    rows: run through the network with gradient; one cut short after a scale counts by its share of the tokens. flops: of forwards
    (1x) and backwards (2x), the posterior classifier's included. skipped: steps that were not finite and changed nothing. held_out:
    loss of maximum likelihood on held-out images at this checkpoint, where the best is kept.
    """

    images: int = 0
    rows: float = 0.0
    rows_no_grad: float = 0.0
    flops: float = 0.0
    posterior_flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    held_out: float | None = None


def add_up(values: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Sums over the ranks of numbers and 0-d tensors, in one collective."""
    # numbers go to the device together
    numbers = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values.values()], dtype=torch.float64).to(device)
    found = [v.to(device, torch.float64) if isinstance(v, Tensor) else numbers[i] for i, v in enumerate(values.values())]
    sums = torch.stack(found)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def rows_of(task: Task) -> dict[str, float]:
    """Rows that this rank ran through network and posterior classifier since the last call."""
    rows = {"rows": task.engine.rows["grad"], "rows_no_grad": task.engine.rows["no_grad"], "posterior_rows": 0}
    engines: list[Engine] = [task.engine]
    if task.posterior_engine is not None:
        rows["posterior_rows"] = task.posterior_engine.rows["grad"]
        engines.append(task.posterior_engine)
    if task.loss.reference is not None:
        rows["rows_no_grad"] += task.loss.reference.rows["no_grad"]
        task.loss.reference.rows.update(no_grad=0)
    for engine in engines:
        engine.rows.update(grad=0, no_grad=0)
    return rows


def count_compute(progress: RunState, sums: dict[str, float], flops: dict[str, int]) -> None:
    """Add one step's rows of all ranks to progress."""
    rows, no_grad, posterior_rows = (sums[name] for name in ("rows", "rows_no_grad", "posterior_rows"))
    progress.rows += rows
    progress.rows_no_grad += no_grad
    progress.posterior_flops += flops["posterior"] * 3 * posterior_rows
    progress.flops += flops["net"] * (3 * rows + no_grad) + flops["posterior"] * 3 * posterior_rows


@torch.no_grad()
def forward_flops(task: Task) -> dict[str, int]:
    """Floating-point operations of one row's forward, counted by torch: of the network, and of the posterior's classifier."""
    batch = task.source.batch(0, 1)
    draws = Draws(0, [0], task.device)
    x_B = task.encoder.draw(task.encode(batch), draws)
    probe = task.loss.paradigm.probe(x_B, draws)
    index = torch.zeros(1, dtype=torch.int64, device=task.device)

    def value() -> None:
        prediction = task.loss.paradigm.predict(task.engine.net, probe, index, batch.c_B.to(task.device))
        task.loss.paradigm.log_likelihood(prediction, probe, index)

    counted = {"net": flops_of(value), "posterior": 0}
    if isinstance(task.loss.posterior, NoisyPosterior) and task.posterior_engine is not None:
        classifier = task.posterior_engine.net
        counted["posterior"] = flops_of(lambda: classifier(probe.inputs["noisy"], probe.inputs["sigma"]))
    return counted


def flops_of(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call, without gradient, as torch counts them."""
    # plain operations: what torch.compile, fused attention and our kernels run is not counted everywhere
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        using("torch"),
        FlopCounterMode(display=False) as counter,
    ):
        run()
    return counter.get_total_flops()


def resume(task: Task, averages: dict[str, EMA], path: Path, rank: int, beat: Callable[[], None] = ignore) -> RunState:
    """Load the newest whole checkpoint of the run folder, if there is one, into engines and averages. Collective.

    Raises UserError when there are checkpoints and none is whole, or when a rank does not see it.
    """
    newest = None
    with collective(beat) as working:
        # one rank reads and checks it all
        if rank == 0:
            newest, damaged = newest_checkpoint(path, working)
            if damaged and newest is None:
                raise UserError(
                    f"no checkpoint in {path / 'checkpoints'} is whole (newest: {damaged[0].name}): remove that folder to start from "
                    f"the beginning, or choose another --out"
                )
            for bad in damaged:
                print(f"checkpoint {bad} is damaged and left out")
            if newest is not None:
                print(f"going on from {newest}")
    newest = from_rank_0(newest)
    if newest is None:
        return RunState()
    with collective():
        if not newest.exists():
            raise UserError(f"{newest} is not seen here: put the run folder on storage that all ranks see")
        tensors, state = load_checkpoint(newest, beat)
        model, engine = tensors["model"], tensors["engine"]
        for name, _ in task.engine.net.named_parameters():
            engine.setdefault(f"weight:{name}", model[name])
        task.engine.load(engine | {name: model[name.removeprefix("buffer:")] for name in buffers_of(task.engine.net)})
        if task.posterior_engine is not None:
            task.posterior_engine.load(tensors["posterior"])
        for name, ema in averages.items():
            ema.average = task.engine.split(model if name == "ema" else tensors[name])
    return RunState(**state)


def snapshot(
    task: Task,
    averages: dict[str, EMA],
    settings: Train,
    progress: RunState,
    path: Path,
    rank: int,
    beat: Callable[[], None] = ignore,
) -> None:
    """Write one snapshot per width in settings.snapshot_stds. Collective."""
    whole = {}
    for ema in averages.values():
        if ema.std in settings.snapshot_stds:
            whole[ema.std] = task.engine.gather(ema.average)
            beat()
    with collective(beat) as working:
        if rank == 0:
            for std, average in whole.items():
                write_snapshot(path, average, std, progress.images, working)


def save(
    task: Task,
    averages: dict[str, EMA],
    progress: RunState,
    path: Path,
    settings: Train,
    notes: dict[str, Any],
    beat: Callable[[], None] = ignore,
) -> None:
    """Write a checkpoint; collective, since gathering the engines' states is."""
    engine = task.engine.save()
    tensors = {"engine": engine}
    for name, ema in averages.items():
        beat()
        tensors[name] = task.engine.gather(ema.average)
    beat()
    if task.posterior_engine is not None:
        tensors["posterior"] = task.posterior_engine.save()
    with collective(beat) as working:
        if world()[0] == 0:
            # as `mclr sample` and `mclr convert` read weights, and no tensor twice
            average = tensors.pop("ema", None) or taken(engine, "weight:")
            tensors["model"] = average | taken(engine, "buffer:")
            about = describe(task.engine.net, tensors["model"], notes | {"images_seen": progress.images})
            save_checkpoint(path, progress.images, tensors, vars(progress), about, settings.keep, settings.keep_best, working)


def taken(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those entries of an engine's state, which then lacks them, by the rest of their names."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def export(
    task: Task,
    weights: dict[str, Tensor],
    progress: RunState,
    path: Path,
    notes: dict[str, Any],
    beat: Callable[[], None] = ignore,
) -> None:
    """Write RUN/weights of a finished run, with notes and the last line of its metrics, unless they are there.

    Those of a shorter run are removed first: the checkpoint holds all that is needed to write them, again if need be.
    """
    folder = path / "weights"
    try:
        if json.loads((folder / "config.json").read_text())["images_seen"] == progress.images:
            print(f"finished already: {progress.images} images, weights in {folder}")
            return
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    notes = notes | {"images_seen": progress.images, "metrics": json.loads(lines[-1]) if lines else {}}
    save_weights(folder, task.engine.net, weights, beat=beat, **notes)
    print(f"finished: {progress.images} images in {progress.seconds:.0f} s, weights in {folder}")
