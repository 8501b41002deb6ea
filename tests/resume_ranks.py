"""What the launcher runs for tests/test_zero_resume.py: `mclr train` again and again within one process group.

./plan.json: a list of [folder, arguments, step in which rank 1 is sent a SIGTERM, or null]; rank 0 leaves the statuses in ./statuses.json.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import mclr.loss
import mclr.train.run
import mclr.train.training.launch
from mclr.train.system.console import run_and_exit
from mclr.train.system.ranks import group, world

real = mclr.loss.score


def once(folder, argv, step):
    count = 0

    def score(*args):
        nonlocal count
        count += 1
        # two micro-batches a step: in the first of them, so that the second is not begun
        if step is not None and count == 2 * step - 1 and world()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    mclr.loss.score = score
    Path(folder).mkdir(parents=True, exist_ok=True)
    home = Path.cwd()
    os.chdir(folder)
    try:
        return mclr.train.run.main(argv)
    finally:
        os.chdir(home)


def main(_):
    torch.set_num_threads(1)
    with group(True):
        mclr.train.training.launch.group = lambda *args: nullcontext()
        statuses = [once(*run) for run in json.loads(Path("plan.json").read_text())]
        if world()[0] == 0:
            Path("statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    run_and_exit(main)
