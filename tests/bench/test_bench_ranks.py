"""The bench of ranks: its figures, its arguments, and that it runs."""

import pytest
import torch

from mclr.train.bench import ranks as bench_ranks
from mclr.train.bench.ranks import checkpoint_speed, live_bytes, main, table
from mclr.train.system.console import run


def test_times_are_told_against_the_first_engine_of_as_many_ranks():
    row = {"ms": 50.0, "low": 48.0, "high": 55.0, "images": 1280.0, "memory": 2**21, "forced": 0.011}
    rows = {"local": row, "zero3": row | {"ms": 75.0, "forced": None}}
    lines = table("edm2-digits", {1: rows, 2: {"zero0": row | {"ms": 100.0}}}).splitlines()
    assert lines[4:] == [
        "| 1 | local | 50 (48–55) | 1.00 | 1280 | 2.0 | 1.1 % |",
        "| 1 | zero3 | 75 (48–55) | 1.50 | 1280 | 2.0 |  |",
        "| 2 | zero0 | 100 (48–55) | 1.00 | 1280 | 2.0 | 1.1 % |",
    ]


def test_a_storage_counts_once():
    before = live_bytes()
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100), kept.detach()]
    assert live_bytes() - before == 4000 and len(views) == 3


def test_a_checkpoint_is_written_checked_and_read(tmp_path):
    said = checkpoint_speed(0.001, 2, tmp_path)
    assert said.startswith("A checkpoint of 0.001 GB, 2 times") and said.count(" s/GB (") == 3
    # the newest alone is kept
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"{2:012d}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be > 0"),
        (["--ranks", "2", "-1"], "--ranks -1: must be > 0"),
        (["--gigabytes", "nan"], "--gigabytes nan: must be > 0"),
        (["--model", "edm2-digit"], "unknown model edm2-digit; did you mean edm2-digits?"),
        (["train.batches=3"], "unknown key train.batches; did you mean train.batch?"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_launched(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks, "launch", lambda *_: pytest.fail("launched"))
    assert run(main, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.slow
def test_it_measures_every_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["--model", "edm2-digits", "--ranks", "1", "2", "--rounds", "2", "--gigabytes", "0.001"]
    assert main([f"data.path={tmp_path / 'digits'}", *argv]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 9 and all(float(row.split("|")[5]) > 0 for row in rows)
