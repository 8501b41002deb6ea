"""train/run.py for tests/training/test_faults.py: waits in the first micro-batch of step HOLD until ./go is there.

While it waits, ./held-RANK holds its process id. Then rank LOST leaves its folder, so that relative paths lead nowhere, and with UNREAD
the output of all ranks goes to a closed pipe.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import lose_readers

import mclr.loss
import mclr.train.run
from mclr.train.system.console import run_and_exit

here, rank = Path.cwd(), os.environ["RANK"]
real, count = mclr.loss.score, 0


def score(*args):
    global count
    count += 1
    # two micro-batches a step
    if count == 2 * int(os.environ["HOLD"]) - 1:
        held = here / f".held-{rank}"
        held.write_text(str(os.getpid()))
        held.rename(here / f"held-{rank}")
        while not (here / "go").exists():
            time.sleep(0.02)
        if os.environ.get("UNREAD"):
            lose_readers()
        if os.environ.get("LOST") == rank:
            os.chdir("/")
    return real(*args)


mclr.loss.score = score
run_and_exit(mclr.train.run.main)
