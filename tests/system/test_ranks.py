"""Processes of a run: how one that fails alone leaves."""

import subprocess
import sys

import pytest
from launch import ROOT, environment, free_port

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


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("UserError('lower it')", 2, "error: lower it"), ("ZeroDivisionError('bug')", 1, "ZeroDivisionError: bug")],
)
def test_a_rank_that_fails_alone_says_so_and_waits_for_nobody(error, status, said):
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", PROGRAM.format(error=error)]
    ran = subprocess.run(command, cwd=ROOT, env=environment() | rank, capture_output=True, text=True, timeout=120)
    assert ran.returncode == status and ran.stderr.splitlines()[-1] == said
