"""The watchdog: what a rank writes of itself, and what becomes of a run in which one has gone silent."""

import multiprocessing
import os
import re
import time

import pytest

import mclr.train.system.watchdog
from mclr.errors import UserError
from mclr.train.system.watchdog import Watchdog, read_beats


def test_a_beat_tells_step_and_phase_and_counts_time(tmp_path):
    began = time.time()
    watchdog = Watchdog(tmp_path, rank=2, ranks=4, timeout=100)
    watchdog.enter("data", 7)
    time.sleep(0.05)
    watchdog.enter("compute")
    watchdog.enter("data", 8)
    ((rank, (step, phase, then)),) = read_beats(tmp_path / "watchdog", 4).items()
    watchdog.close()
    assert read_beats(tmp_path / "watchdog", 4)[2][1] == "ended"
    assert watchdog.waited >= 0.05
    assert (rank, step, phase) == (2, 8, "data") and began - 0.002 <= then <= time.time()


def test_ranks_of_an_earlier_start_with_more_of_them_do_not_count(tmp_path):
    for rank in (0, 3):
        Watchdog(tmp_path, rank, ranks=4, timeout=100).close()
    assert list(read_beats(tmp_path / "watchdog", 2)) == [0]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "watchdog").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        Watchdog(tmp_path, 0, 1, timeout=100)


def test_a_rank_that_goes_on_at_last_is_not_ended(tmp_path, monkeypatch):
    """It saw all silent, left the word to the first, and came back meanwhile; so does a rank that ends."""
    monkeypatch.setattr(mclr.train.system.watchdog, "PATIENCE", 3.0)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    for rank in (0, 1):
        Watchdog(tmp_path, rank, ranks=3, timeout=100).close()
    for comes_back in (True, False):
        watchdog = Watchdog(tmp_path, rank=2, ranks=3, timeout=0.3)
        time.sleep(0.6)
        if comes_back:
            watchdog.timeout = 100
            watchdog.enter("compute", 5)
            time.sleep(3.0)
            assert watchdog.watcher.is_alive()
        watchdog.close()


def test_what_cannot_be_read_ends_no_watch(tmp_path):
    """A beat that is made and not written yet, or not seen on a shared folder."""
    watchdog = Watchdog(tmp_path, rank=0, ranks=3, timeout=100)
    (tmp_path / "watchdog" / "00001").write_text("")
    assert list(read_beats(tmp_path / "watchdog", 3)) == [0] and watchdog._blame({})[0] == [0]
    (tmp_path / "watchdog" / "00000").unlink()
    assert "rank 0 has been silent for 0 s" in watchdog._blame({})[1]
    watchdog.close()


def rank_of(run, here, rank, ranks, phases, goes_on):
    """Enter these phases, then nothing more; with goes_on, enter the last one again and again."""
    with open(run / f"stderr-{rank}", "w") as stderr:
        os.dup2(stderr.fileno(), 2)
    # some ranks may start seconds later than others
    here.wait()
    watchdog = Watchdog(run, rank, ranks, timeout=2.0)
    for step, phase in enumerate(phases, start=1):
        watchdog.enter(phase, step)
        time.sleep(0.2)
    while True:
        time.sleep(0.1)
        if goes_on:
            watchdog.enter(phases[-1])


def ends(run, ranks):
    """(exit status, output) of each of these ranks; None: still alive when the first rank that hangs has ended, then killed here."""
    context = multiprocessing.get_context("spawn")
    here = context.Barrier(len(ranks))
    processes = [context.Process(target=rank_of, args=(run, here, rank, len(ranks), *how)) for rank, how in enumerate(ranks)]
    for process in processes:
        process.start()
    first = [process for process, (_, goes_on) in zip(processes, ranks, strict=True) if not goes_on]
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(process.exitcode is not None for process in first):
        time.sleep(0.1)
    status = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return status, [(run / f"stderr-{rank}").read_text() for rank in range(len(ranks))]


@pytest.mark.parametrize(
    ("ranks", "status", "blamed"),
    [
        ([(("data", "compute"), False)], [1], "rank 0 .* phase compute of step 2"),
        # rank 1 stops in its first step, before rank 0, which then waits for it
        ([(("data", "compute", "meet"), False), (("data",), False)], [1, None], "rank 1 .* phase data of step 1"),
        ([(("data",), True), (("data", "compute"), False)], [None, 1], "rank 1 .* phase compute of step 2"),
    ],
    ids=["alone", "another", "one goes on"],
)
def test_a_run_in_which_a_rank_hangs_ends_with_its_name(ranks, status, blamed, tmp_path):
    """One rank prints one line. A rank that goes on is not ended."""
    found, said = ends(tmp_path, ranks)
    (line,) = "".join(said).splitlines()
    assert found == status and line.startswith("error: ") and re.search(blamed, line)
