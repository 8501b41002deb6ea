"""The ranks of a run: which one this process is, how ranks meet, fail together and end on signals."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mclr.errors import UserError
from mclr.train.system.files import ignore

# functions import torch themselves, so that a misspelt setting is reported without it

# a closed terminal sends SIGHUP; batch systems warn by SIGUSR1 or SIGUSR2 before they end a job
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 10  # seconds that a launcher needs to end the other ranks after one has failed
SOON = 1.0  # seconds between two beats that rank 0 sends to the ranks that wait for it
# variables that launchers set for every rank
LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher started this process. Clusters set RANK and WORLD_SIZE for whole machines; only launchers set LOCAL_RANK."""
    return bool(os.environ.get("LOCAL_RANK"))


def world() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) from the launcher; (0, 0, 1) without one. Raises UserError when some variables are missing."""
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
    """The process group of the ranks: NCCL on GPUs, gloo on CPUs; no group when not `shared`.

    timeout: seconds that a rank may be silent. Collective calls wait longer than that, so that the watchdog reports the rank first.
    Raises UserError when the ranks cannot meet.
    """
    if not shared:
        yield
        return
    import deepspeed
    import torch

    if os.access(sys.prefix, os.W_OK):
        # one folder per environment: environments with different torches would compile again and again in a common one
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    made = Path(os.environ.get("TORCH_EXTENSIONS_DIR", sys.prefix))
    if world()[0] == 0 and not torch.cuda.is_available() and not any(made.glob("deepspeed_shm_comm/*.so")):
        print("DeepSpeed compiles a small operator, once, for about a minute", flush=True)
    # NCCL uses the current GPU
    own_device()
    # Python's handlers do not run while C code waits for the other ranks
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
        # to destroy an NCCL group all ranks must take part: a rank that failed alone would wait for ever and not report its error
        if torch.distributed.get_backend() != "nccl":
            torch.distributed.destroy_process_group()
        raise
    finally:
        # DeepSpeed leaves 66 MiB of shared memory per rank on CPUs
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{world()[0]}"):
            with suppress(OSError):
                buffer.unlink()


@contextmanager
def report_once() -> Iterator[None]:
    """Let one rank report the error of the whole job.

    Rank 0 reports a UserError at once. Every other error, and every other rank, first waits PATIENCE seconds: usually the launcher ends
    it meanwhile.
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
    """A block that every rank enters: a UserError of one rank is raised on all ranks. Collective.

    Yields a function for rank 0 to call while it works and the others wait. Then every rank calls its `beat`, so that no watchdog takes
    the wait for a hang.
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
    """Set this handler for SIGNALS and return the old ones. A signal that is ignored stays ignored, such as SIGHUP under nohup."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return [(number, signal.signal(number, handler)) for number in heard]


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Inside, this handler gets SIGNALS; afterwards the old one gets them again."""
    before = handle_signals(handler)
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)


def launchers() -> list[int]:
    """Process ids of the launcher: our parent, and for deepspeed also the parent's parent.

    Empty without a launcher: then the parent is a shell, which may end before us (nohup).
    """
    if not launched():
        return []
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    try:
        # the file holds: pid, name in brackets, state, parent
        return [parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])]
    except OSError:
        # the parent has just ended
        return [parent]


def end_early(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of a run that has not begun to train: it ends at once."""
    print("interrupted", file=sys.stderr)
    raise SystemExit(128 + number)


class Interrupt:
    """Remembers a signal, or the death of the launcher, until training asks for it between micro-batches."""

    def __init__(self) -> None:
        self.signal = 0
        self.launchers = launchers()

    def notice(self, number: int, frame: FrameType | None) -> None:
        """The handler for on_signals; keeps the first signal."""
        self.signal = self.signal or number

    def agreed(self, device: Any) -> int:
        """The largest signal that any rank noticed; 0 = go on. Collective under a launcher."""
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
