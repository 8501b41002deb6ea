"""What tests share that start processes: launchers and ranks, and how they are waited for and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import mclr.train.run
from mclr.train.system.ranks import LAUNCHED

RUN = Path(mclr.train.run.__file__).resolve()
ROOT = RUN.parent.parent


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def started(command, **streams):
    """A process that ends with the block, and with it all that it started, also where the block fails."""
    process = subprocess.Popen(command, text=True, env=environment(), start_new_session=True, **streams)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, process, seconds=300):
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None, "the run has ended"
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def lose_readers():
    """Stdout and stderr of this process become a pipe that nobody reads."""
    reader, pipe = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(pipe, stream)


def as_rank(patch, rank, ranks):
    """What a launcher tells this rank of so many, on one machine."""
    for name, value in zip(LAUNCHED, (rank, rank, ranks, "127.0.0.1", 29500), strict=True):
        patch.setenv(name, str(value))


def launcher(name, ranks=2):
    """The command that starts so many ranks, on a port that is free."""
    port = free_port()
    if name == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", port]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]


def results_of(program, ranks, out, *arguments, **more):
    """What a program beside this file leaves at OUT/results.json when so many ranks run it: PROGRAM ARGUMENTS OUT. more: environment."""
    command = [*launcher("deepspeed", ranks), str(Path(__file__).with_name(program)), *map(str, arguments), str(out)]
    # DeepSpeed compiles a small library the first time
    ran = subprocess.run(command, env=environment() | more, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((out / "results.json").read_text())


def of_ours(text):
    """The lines with our message, of all that a launcher tells."""
    return [line for line in text.splitlines() if "error: " in line]


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
