"""The processes of a run: which one this is, how they meet, fail together, and end on signals."""

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
from mclr.train.system.files import ignore

# torch is imported where it is used: a misspelt setting is answered before

# a closed terminal sends SIGHUP; batch systems warn by SIGUSR1 or SIGUSR2 before they end a job
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 10  # seconds in which a launcher ends the other ranks when one has failed
SOON = 1.0  # seconds between two beats that rank 0 sends to the ranks that wait for it
# what launchers tell every rank
LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher started this process. Clusters set RANK and WORLD_SIZE for whole machines; only launchers set LOCAL_RANK."""
    return bool(os.environ.get("LOCAL_RANK"))


def world() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) as the launcher says; (0, 0, 1) without one. Raises UserError when it says too little."""
    said = {name: os.environ.get(name) for name in LAUNCHED}
    if not launched() and said["WORLD_SIZE"] in (None, "", "1"):
        return 0, 0, 1
    if missing := [name for name, value in said.items() if not value]:
        given = ", ".join(name for name in said if name not in missing)
        raise UserError(
            f"{given} set, but not {', '.join(missing)}: start the ranks with `torchrun` or `deepspeed`, which set all of them, or unset "
            "them to run as one process"
        )
    try:
        return int(said["RANK"] or 0), int(said["LOCAL_RANK"] or 0), int(said["WORLD_SIZE"] or 1)
    except ValueError:
        numbers = ", ".join(f"{name}={said[name]}" for name in LAUNCHED[:3])
        raise UserError(f"{numbers}: these must be whole numbers, as launchers set them") from None


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
def group(shared: bool, timeout: float = 1800) -> Iterator[None]:
    """The process group of the ranks: NCCL on GPUs, gloo on CPUs, none without a launcher.

    timeout: seconds that a rank may be silent. Ranks that wait for it wait longer, so that the watchdog can name it first.
    Raises UserError when the ranks cannot meet.
    """
    if not shared:
        yield
        return
    import deepspeed
    import torch

    if os.access(sys.prefix, os.W_OK):
        # beside the torch that it is made for: with one folder for all checkouts each would compile it again for its own
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    made = Path(os.environ.get("TORCH_EXTENSIONS_DIR", sys.prefix))
    if world()[0] == 0 and not torch.cuda.is_available() and not any(made.glob("deepspeed_shm_comm/*.so")):
        print("DeepSpeed compiles a small operator, once, for about a minute", flush=True)
    # NCCL talks through the current GPU
    own_device()
    # waiting for the others happens outside of Python, whose handlers do not run meanwhile
    with on_signals(signal.SIG_DFL):
        try:
            deepspeed.init_distributed(timeout=timedelta(seconds=2 * timeout + 60))
        except torch.distributed.DistNetworkError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"the ranks cannot meet at {place} ({str(error).splitlines()[0]}): where another run has this port, give another to "
                "`deepspeed` or `torchrun` by --master_port"
            ) from error
    try:
        yield
        torch.distributed.destroy_process_group()
    except BaseException:
        # NCCL ends on all ranks together: a rank that failed alone would wait here for ever and never tell its error
        if torch.distributed.get_backend() != "nccl":
            torch.distributed.destroy_process_group()
        raise
    finally:
        # DeepSpeed leaves 66 MiB of memory behind for each rank on CPUs
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{world()[0]}"):
            with suppress(OSError):
                buffer.unlink()


@contextmanager
def report_once() -> Iterator[None]:
    """Print one error for the whole job.

    A UserError of rank 0 is told at once. Other ranks wait PATIENCE seconds for the launcher to end them, and tell their own error
    only if it does not.
    """
    try:
        yield
    except Exception as error:
        rank, _, ranks = world()
        if ranks == 1 or (rank == 0 and isinstance(error, UserError)):
            raise
        handle_signals(signal.SIG_DFL)
        time.sleep(PATIENCE)
        if isinstance(error, UserError):
            raise UserError(f"rank {rank}: {error}") from error
        raise


@contextmanager
def collective(beat: Callable[[], None] = ignore) -> Iterator[Callable[[], None]]:
    """A part that every rank enters: a UserError of one rank is raised on all, so that none waits for it. Collective.

    Yields a function that rank 0 calls while it works and the others wait: then every rank calls its `beat`, and no watchdog takes
    a long wait for a hang.
    """
    import torch.distributed as dist

    shared, told = dist.is_initialized(), 0.0

    def working() -> None:
        nonlocal told
        beat()
        if shared and dist.get_rank() == 0 and time.monotonic() - told >= SOON:
            told = time.monotonic()
            from_rank_0(True)

    failed = None
    try:
        yield working
    except UserError as error:
        failed = error
    if shared:
        if dist.get_rank() == 0:
            from_rank_0(False)
        while dist.get_rank() != 0 and from_rank_0(None):
            beat()
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


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


def handle_signals(handler: Handler) -> list[tuple[int, Any]]:
    """SIGNALS go to this handler; returns those before. Signals that our parent has us ignore stay ignored, as SIGHUP under nohup."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return [(number, signal.signal(number, handler)) for number in heard]


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Inside, SIGNALS go to this handler; afterwards to the one before."""
    before = handle_signals(handler)
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)


def launchers() -> list[int]:
    """Process ids of the launcher: our parent, and with deepspeed, which is two processes, also its parent.

    Empty without a launcher: the parent is then a shell, which may end before us (nohup).
    """
    if not launched():
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
    """What should end a run early: a signal, or the launcher's death. It may come at any time; training asks between micro-batches."""

    def __init__(self) -> None:
        self.signal = 0
        self.launchers = launchers()

    def notice(self, number: int, frame: FrameType | None) -> None:
        """The handler for on_signals; the first signal counts."""
        self.signal = self.signal or number

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
