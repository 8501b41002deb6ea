"""What a run has done so far, and what it keeps of that: checkpoints, snapshots of averages, and the finished weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mclr.configs.schema import Train
from mclr.errors import UserError
from mclr.train.engine.base import buffers_of
from mclr.train.engine.checkpoint import Beat, best_checkpoint, checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from mclr.train.engine.ema import averages_of, write_snapshot
from mclr.train.engine.zero import Sharded
from mclr.train.system.files import ignore
from mclr.train.system.ranks import collective, from_rank_0
from mclr.train.training.held_out import HeldOut, beside_training, with_weights
from mclr.train.training.log import METRICS, RunFolder
from mclr.train.training.step import Task
from mclr.train.weights.folder import describe, save_weights


@dataclass
class RunState:
    """What a run has done so far, over all ranks; part of every checkpoint.

    rows: run through the network with gradient; one cut short after a scale counts by its share of the tokens. flops: of forwards
    (1x) and backwards (2x), those of posterior classifier and guide included. skipped: steps that were not finite and changed nothing.
    held_out: loss of this checkpoint on held-out images, where the best checkpoint is kept.
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

    def count(self, sums: dict[str, float], flops: dict[str, int]) -> None:
        """Add the rows of one step, of all ranks (compute.rows_of), at these FLOPs of a forward (compute.forward_flops)."""
        rows, no_grad, posterior_rows, guide_rows = (
            sums[name] for name in ("rows", "rows_no_grad", "posterior_rows", "guide_rows")
        )
        self.rows += rows
        self.rows_no_grad += no_grad
        self.posterior_flops += flops["posterior"] * 3 * posterior_rows
        self.flops += flops["net"] * (3 * rows + no_grad) + flops["posterior"] * 3 * posterior_rows + flops["guide"] * guide_rows


class Keeper:
    """Writes what a run keeps in its folder, and reads it again. Its methods are collective.

    path: the run folder, held by rank 0 as `folder`. ranking: what ranks the checkpoints, where the best one is kept. beat: called
    while files are written, so that no watchdog takes a slow disk for a hang.
    """

    def __init__(
        self, task: Task, settings: Train, path: Path, folder: RunFolder | None, ranking: HeldOut | None, beat: Beat = ignore
    ):
        self.task, self.settings, self.path, self.folder, self.ranking, self.beat = task, settings, path, folder, ranking, beat
        self.averages = averages_of(task.engine.shards(), settings)

    def resume(self) -> RunState:
        """Load the newest whole checkpoint, if there is one, into engines and averages.

        Raises UserError when there are checkpoints and none is whole, when a rank does not see it, or when another version wrote it.
        """
        newest = None
        with collective(self.beat) as working:
            # one rank reads and checks it all
            if self.folder is not None:
                newest, damaged = newest_checkpoint(self.path, working)
                if damaged and newest is None:
                    raise UserError(
                        f"no checkpoint in {self.path / 'checkpoints'} is whole (newest: {damaged[0].name}): remove that folder to start "
                        "from the beginning, or choose another --out"
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
            tensors, kept = load_checkpoint(newest, self.beat)
            try:
                state = RunState(**kept)
            except TypeError as error:
                raise UserError(
                    f"{newest} is from another version of this program ({error}): go on with that version, or start anew with another --out"
                ) from error
            self._load(tensors)
        return state

    def _load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        task, model, engine = self.task, tensors["model"], tensors["engine"]
        for name, _ in task.engine.net.named_parameters():
            engine.setdefault(f"weight:{name}", model[name])
        task.engine.load(engine | {name: model[name.removeprefix("buffer:")] for name in buffers_of(task.engine.net)})
        if task.posterior_engine is not None:
            task.posterior_engine.load(tensors["posterior"])
        for name, ema in self.averages.items():
            ema.average = task.engine.split(model if name == "ema" else tensors[name])

    def snapshot(self, state: RunState) -> None:
        """Write one snapshot per width in settings.snapshot_stds."""
        whole = {}
        for ema in self.averages.values():
            if ema.std in self.settings.snapshot_stds:
                whole[ema.std] = self.task.engine.gather(ema.average)
                self.beat()
        with collective(self.beat) as working:
            for std, average in whole.items() if self.folder is not None else ():
                write_snapshot(self.path, average, std, state.images, working)

    def checkpoint(self, state: RunState) -> None:
        """Write a checkpoint and, where the best is looked for, its held-out loss."""
        task, settings = self.task, self.settings
        state.held_out = self._held_out_loss() if state.images > task.loss.warmup else None
        tensors = {"engine": task.engine.save()}
        for name, ema in self.averages.items():
            self.beat()
            tensors[name] = task.engine.gather(ema.average)
        self.beat()
        if task.posterior_engine is not None:
            tensors["posterior"] = task.posterior_engine.save()
        with collective(self.beat) as working:
            if self.folder is not None:
                # as `mclr sample` and `mclr convert` read weights, and no tensor twice
                average = tensors.pop("ema", None) or taken(tensors["engine"], "weight:")
                tensors["model"] = average | taken(tensors["engine"], "buffer:")
                about = describe(task.engine.net, tensors["model"], self.folder.notes | {"images_seen": state.images})
                save_checkpoint(self.path, state.images, tensors, vars(state), about, settings.keep, settings.keep_best, working)

    def _held_out_loss(self) -> float | None:
        """The run's own loss on held-out images, of the weights that the checkpoint's folder holds; known to rank 0."""
        if self.ranking is None:
            return None
        engine, average = self.task.engine, self.averages.get("ema")
        given = {} if average is None else average.average if engine.lockstep else engine.gather(average.average)
        # ranks that share the network, or its reference, run it together
        together = engine.lockstep or isinstance(self.task.loss.reference, Sharded)
        with beside_training(together, self.beat) as working:
            if working is None:
                return None
            with with_weights(engine, given):
                return self.ranking.loss(working)

    def export(self, state: RunState) -> None:
        """Write RUN/weights of a finished run, with notes and the last line of its metrics, unless they are there.

        Those of a shorter run are removed first: the checkpoint holds all that is needed to write them, again if need be.
        """
        engine = self.task.engine
        weights = engine.gather(self.averages["ema"].average if "ema" in self.averages else engine.shards())
        with collective(self.beat) as working:
            if self.folder is None:
                return
            target, metrics = self.path / "weights", self.path / METRICS
            if images_of(target) == state.images:
                print(f"finished already: {state.images} images, weights in {target}")
            else:
                shutil.rmtree(target, ignore_errors=True)
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                notes = self.folder.notes | {"images_seen": state.images, "metrics": json.loads(lines[-1]) if lines else {}}
                save_weights(target, engine.net, weights, beat=working, **notes)
                print(f"finished: {state.images} images in {state.seconds:.0f} s, weights in {target}")
            if self.settings.keep_best and (best := best_checkpoint(checkpoints(self.path))):
                print(f"best checkpoint: {best[0]}, held-out loss {best[1]:.4g}")


def taken(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of an engine's state whose names have this prefix, without it. The state then lacks them."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def images_of(weights: Path) -> int | None:
    """Images seen by these weights; None where there are none, or only a part of them."""
    try:
        return json.loads((weights / "config.json").read_text())["images_seen"]
    except (OSError, ValueError, KeyError):
        return None
