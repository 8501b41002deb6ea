"""train/run.py for the launchers of tests/test_faults.py: waits in the first micro-batch of step HOLD until ./go is there.

It says so by ./held-RANK, which holds its process id. Then rank LOST no longer finds what it was given by relative paths, and with
UNREAD nobody reads what the ranks say.
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
