"""The processes of a run: which one this is, how they meet, how they fail together, and what makes all of them stop."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from mclr.errors import UserError

# torch is imported where it is used: a misspelt setting is answered before

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 10  # seconds in which a launcher ends the ranks beside a failed one


def world() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) as the launcher says; (0, 0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> Any:
    """The device of this rank: a GPU of its own, or the CPU. Raises UserError where there are more ranks than GPUs."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = world()[1]
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: start no more ranks than that")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def group(launched: bool, timeout: float = 1800) -> Iterator[None]:
    """The process group of the launched ranks, NCCL on GPUs and gloo on CPUs; none without a launcher.

    timeout: seconds that a rank may be silent; those that wait for it wait longer, so that its name is told first (watchdog.py).
    """
    if not launched:
        yield
        return
    import deepspeed
    import torch

    if os.access(sys.prefix, os.W_OK):
        # beside the torch that it is made for: elsewhere every other checkout's launch would compile it again
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    made = Path(os.environ.get("TORCH_EXTENSIONS_DIR", sys.prefix))
    if world()[0] == 0 and not torch.cuda.is_available() and not any(made.glob("deepspeed_shm_comm/*.so")):
        print("DeepSpeed compiles a small operator, once, for about a minute", flush=True)
    # NCCL talks through the current GPU
    own_device()
    # waiting for the others happens outside of Python, whose handlers do not run meanwhile
    with on_signals(signal.SIG_DFL):
        deepspeed.init_distributed(timeout=timedelta(seconds=2 * timeout + 60))
    try:
        yield
        torch.distributed.destroy_process_group()
    except BaseException:
        # NCCL ends on all ranks together: one that failed alone would wait here for ever, its error untold
        if torch.distributed.get_backend() != "nccl":
            torch.distributed.destroy_process_group()
        raise
    finally:
        # 66 MiB of memory for each rank of each launch on CPUs, which DeepSpeed leaves behind
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{world()[0]}"):
            with suppress(OSError):
                buffer.unlink()


@contextmanager
def report_once() -> Iterator[None]:
    """Of what goes wrong on several ranks, or on one because of another, the user hears once.

    A UserError of rank 0 is told at once, and the end of rank 0 makes the launcher end the others. Whatever else happened waits
    for such an end; who is spared was alone with its error and tells it.
    """
    try:
        yield
    except Exception as error:
        rank, _, ranks = world()
        if ranks == 1 or (rank == 0 and isinstance(error, UserError)):
            raise
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(PATIENCE)
        if isinstance(error, UserError):
            raise UserError(f"rank {rank}: {error}") from error
        raise


@contextmanager
def collective() -> Iterator[None]:
    """A part that every rank enters: a UserError of one rank is raised by all, so that none waits for it. Collective."""
    import torch.distributed as dist

    failed = None
    try:
        yield
    except UserError as error:
        failed = error
    if dist.is_initialized():
        said = gather_objects(failed and str(failed))
        rank = next((rank for rank, message in enumerate(said) if message), None)
        if rank is not None:
            raise UserError(said[rank] if rank == 0 else f"rank {rank}: {said[rank]}") from failed
    elif failed:
        raise failed


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank. Collective under a launcher."""
    import torch.distributed as dist

    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in order. Collective under a launcher."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[None]:
    """SIGINT and SIGTERM go to this handler; afterwards to the one before."""
    before = [(number, signal.signal(number, handler)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)


def launchers() -> list[int]:
    """Process ids of the launcher: our parent, and with deepspeed, which is two processes, also its parent.

    Without a launcher none: the parent is a shell then, which may end before us (nohup).
    """
    if "LOCAL_RANK" not in os.environ:
        return []
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    try:
        # pid, name in brackets, state, parent
        return [parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])]
    except OSError:
        return [parent]  # it ended just now


class Interrupt:
    """What should end a run early: a signal, or the launcher's death. Noticed at any time, heeded between two micro-batches."""

    def __init__(self) -> None:
        self.signal = 0
        self.launchers = launchers()

    def notice(self, number: int, frame: FrameType | None) -> None:
        """The handler for on_signals."""
        self.signal = number

    def agreed(self, device: Any) -> int:
        """The largest signal noticed by any rank; 0 = go on. Collective under a launcher."""
        import torch
        import torch.distributed as dist

        if not self.signal and launchers() != self.launchers:
            self.signal = signal.SIGTERM
        if not dist.is_initialized():
            return self.signal
        flag = torch.tensor(self.signal, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal = int(flag)
        return self.signal
