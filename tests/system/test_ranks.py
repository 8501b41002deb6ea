"""Processes of a run: what launchers and clusters tell them, signals, parts that all ranks enter, and how one that fails leaves."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from launch import ROOT, environment, free_port

from mclr.errors import UserError
from mclr.train.system.ranks import LAUNCHED, SIGNALS, Interrupt, launched, on_signals, world


@pytest.fixture
def told(monkeypatch):
    """told(RANK="0", ...): what is in the environment, and nothing else of a launcher."""

    def told(**names):
        for name in LAUNCHED:
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return told


WHOLE = {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


def test_a_rank_is_what_its_launcher_says(told):
    told(**WHOLE)
    assert world() == (3, 1, 4) and launched()


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "MASTER_ADDR": ""},
        {"RANK": "", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node-0"},
    ],
)
def test_one_process_where_a_cluster_tells_of_one(told, names):
    told(**names)
    assert world() == (0, 0, 1) and not launched()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (WHOLE | {"LOCAL_RANK": ""}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set, but not LOCAL_RANK: start the ranks with"),
        ({"WORLD_SIZE": "4", "RANK": "2"}, "RANK, WORLD_SIZE set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK set, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: "),
        (WHOLE | {"RANK": ""}, "but not RANK: "),
        (WHOLE | {"RANK": "first"}, "LOCAL_RANK=1, RANK=first, WORLD_SIZE=4: these must be whole numbers"),
    ],
)
def test_what_a_launcher_left_out_is_one_line(told, names, says):
    told(**names)
    with pytest.raises(UserError) as error:
        world()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_first_signal_counts():
    interrupt = Interrupt()
    with on_signals(interrupt.notice):
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert interrupt.agreed("cpu") == signal.SIGUSR1 and {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2} < set(SIGNALS)


def test_what_is_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    interrupt, before = Interrupt(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(interrupt.notice):
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.signal == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ranks without a launcher: RANK, the number of them and their port are arguments
SHARED = """
import json, os, sys, time
import torch.distributed as dist
import mclr.train.system.ranks as ranks
from mclr.errors import UserError
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
ranks.SOON, beats, said = 0, [], []
for failing in (None, 0, 1):
    try:
        with ranks.collective(lambda: beats.append(1)) as working:
            for _ in range(5 * (rank == 0)):
                working()
            if rank == failing:
                raise UserError("no room")
    except UserError as error:
        said.append(str(error))
print(json.dumps([len(beats), said]), flush=True)
os._exit(0)
"""


def test_ranks_beat_while_rank_0_works_and_fail_together():
    port = free_port()
    command = [sys.executable, "-c", SHARED]
    ran = [
        subprocess.Popen([*command, str(rank), port], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [json.loads(process.communicate(timeout=120)[0]) for process in ran] == [[15, ["no room", "rank 1: no room"]]] * 2


# NCCL, as far as it matters here: it takes itself down on all ranks together, and waits for the others
PROGRAM = """
import sys, time
import torch.distributed as dist
from mclr.errors import UserError
from mclr.train.system.console import run_and_exit
from mclr.train.system.ranks import group
dist.get_backend = lambda: "nccl"
dist.destroy_process_group = lambda: time.sleep(1000)
def main(argv):
    with group(True):
        raise {error}
run_and_exit(main)
"""


def ended(error, port):
    """Exit status, and the last line said, of a rank 0 that fails so."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", PROGRAM.format(error=error)]
    ran = subprocess.run(command, cwd=ROOT, env=environment() | rank, capture_output=True, text=True, timeout=120)
    return ran.returncode, ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("UserError('lower it')", 2, "error: lower it"), ("ZeroDivisionError('bug')", 1, "ZeroDivisionError: bug")],
)
def test_a_rank_that_fails_alone_says_so_and_waits_for_nobody(error, status, said):
    assert ended(error, free_port()) == (status, said)


def test_a_port_that_is_taken_is_one_line():
    """As by another `deepspeed` run on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = ended("UserError('never reached')", port)
    assert status == 2 and said.startswith(f"error: the ranks cannot meet at 127.0.0.1:{port} (") and "--master_port" in said
