"""The bench of ranks: its figures, its arguments, and that it runs."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mclr.train.bench import ranks as bench_ranks
from mclr.train.bench.ranks import bytes_of, live_bytes, main, ranks_table
from mclr.train.system.console import run


def test_times_are_told_against_the_first_engine_of_as_many_ranks():
    row = {"ms": 50.0, "p20": 48.0, "p80": 55.0, "images": 1280.0, "memory": 2**21}
    lines = ranks_table({1: {"local": row, "zero3": row | {"ms": 75.0}}, 2: {"zero0": row | {"ms": 100.0}}}).splitlines()
    assert lines[2:] == [
        "| local | 1 | 50 (48–55) | 1.00 | 1,280 | 2.0 |",
        "| zero3 | 1 | 75 (48–55) | 1.50 | 1,280 | 2.0 |",
        "| zero0 | 2 | 100 (48–55) | 1.00 | 1,280 | 2.0 |",
    ]


def test_a_storage_counts_once_and_a_fake_one_not_at_all():
    kept = torch.zeros(1000)
    with FakeTensorMode():
        fake = torch.zeros(500)
    things = [kept, kept[:10], "no tensor", torch.Tensor, kept.view(10, 100), torch.nn.Parameter(kept), fake, torch.zeros(7)]
    assert bytes_of(things) == 4028
    assert live_bytes() >= 4028


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "argument --rounds: 0: a finite number above 0 is needed"),
        (["--ranks", "2", "-1"], "argument --ranks: -1: a finite number above 0 is needed"),
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
    argv = ["--model", "edm2-digits", "--ranks", "1", "2", "--rounds", "2"]
    assert main([f"data.path={tmp_path / 'digits'}", *argv]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| local |", "| zero"))]
    assert len(rows) == 9 and all(float(row.split("|")[5].replace(",", "")) > 0 for row in rows)
