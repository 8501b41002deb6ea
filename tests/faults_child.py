"""A child process of tests/training/test_faults.py: `mclr train` with a fault at one of its ticks.

A tick is a call of one of PLACES, before it begins. They are counted from 0, and the same in every run of the same command.
"""

import ctypes
import functools
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from launch import lose_readers
from test_resume import poison, skip

import mclr.loss
import mclr.train.engine.checkpoint
import mclr.train.training.state
import mclr.train.training.step
from mclr.train.cli import main
from mclr.train.data.source import Source
from mclr.train.engine.base import Engine
from mclr.train.engine.ema import EMA
from mclr.train.training.log import RunFolder

PLACES = [
    (mclr.train.training.step.Task, "samples"),
    (Source, "batch"),
    (mclr.loss, "score"),
    (Engine, "step"),
    (EMA, "update"),
    (RunFolder, "log"),
    (mclr.train.training.state, "write_snapshot"),
    (mclr.train.training.state, "save_checkpoint"),
    (mclr.train.engine.checkpoint, "write_tensors"),
    (mclr.train.engine.checkpoint, "write_json"),
    (mclr.train.training.state.Keeper, "export"),
    (shutil, "rmtree"),
    (os, "unlink"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
]


class Ticks:
    """names: the ticks so far, each with the calls around it. act: called at tick `when`."""

    def __init__(self, patch, when, act):
        self.names, self.around, self.when, self.act = [], [], when, act
        for owner, name in PLACES:
            patch.setattr(owner, name, self._counting(getattr(owner, name), name))

    def _counting(self, real, name):
        @functools.wraps(real)
        def call(*args, **options):
            self.names.append("/".join([*self.around, name]))
            if len(self.names) == self.when + 1:
                self.act()
            self.around.append(name)
            try:
                return real(*args, **options)
            finally:
                self.around.pop()

        return call


def send(number):
    Path("sent").touch()
    os.kill(os.getpid(), number)


def unread(number):
    """From now on nobody reads the output, as when Ctrl-C also ends the other side of a pipe; then send a signal, unless it is 0."""
    lose_readers()
    if number:
        send(number)


def limit(size):
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def forbid(path):
    """Nobody may write there, not even root: this process gives up root's right to."""
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, capabilities) == 0
    # drop CAP_DAC_OVERRIDE from the effective capabilities
    capabilities[0] &= ~(1 << 1)
    assert libc.capset(header, capabilities) == 0
    os.chmod(path, 0o555 if os.path.isdir(path) else 0o444)
    assert not os.access(path, os.W_OK, effective_ids=True)


ACTIONS = {
    "send": send,
    "hang": lambda: time.sleep(1e6),
    "unread": unread,
    "limit": limit,
    "forbid": forbid,
    "lose": os.rename,
    "spoil": lambda steps: poison(steps, pytest.MonkeyPatch()),
    "leave out": lambda steps: skip(steps, pytest.MonkeyPatch()),
}


def child(folder, argv, when=-1, action="send", *words):
    """Run in this folder. The output goes to ./log, and after a complete run the names of its ticks to ./ticks.json."""
    os.chdir(folder)
    log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with pytest.MonkeyPatch.context() as patch:
        ticks = Ticks(patch, when, functools.partial(ACTIONS[action], *words))
        status = main(["train", *argv])
    if status == 0:
        Path("ticks.json").write_text(json.dumps(ticks.names))
    sys.exit(status)
