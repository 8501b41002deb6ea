"""train/bench/data.py: arithmetic with a clock that only the test moves, tables, bad arguments."""

import shutil
from types import SimpleNamespace

import pytest
from photos import refused

import mclr.train.bench.data
from mclr.train.bench.data import main, measure, simulate
from mclr.train.prepare import main as prepare
from mclr.train.system.console import run


class Clock:
    """In place of the module `time`: its time passes in sleep() alone."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Coming:
    """A sample that is ready at a certain time; exception() waits for it."""

    def __init__(self, clock, ready):
        self.clock, self.ready = clock, ready

    def exception(self):
        self.clock.now = max(self.clock.now, self.ready)


class Slow:
    """Samples that one reader reads one after the other, each in `seconds`; copying a batch takes `copy` seconds."""

    def __init__(self, clock, seconds, copy=0.0):
        self.clock, self.seconds, self.copy = clock, seconds, copy
        self.coming, self.busy, self.asked = {}, 0.0, []
        self.split = SimpleNamespace()

    def indices(self, positions):
        return list(positions)

    def prefetch(self, positions):
        for p in positions:
            if p not in self.coming:
                self.busy = max(self.busy, self.clock.now) + self.seconds
                self.coming[p] = Coming(self.clock, self.busy)

    def batch(self, first, count):
        self.asked.append(first)
        for p in range(first, first + count):
            self.coming.pop(p).exception()
        self.clock.now += self.copy


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(mclr.train.bench.data, "time", clock)
    return clock


def test_a_step_waits_for_what_its_readers_have_not_finished(clock):
    # 4 samples a step: .4 s of reading beside a step of .3 s, or of .25 s and .05 s of copying
    for sleep, copy in ((0.3, 0.0), (0.25, 0.05)):
        source = Slow(clock, 0.1, copy)
        waiting, copying = zip(*simulate(source, first=8, steps=3, batch=4, sleep=sleep), strict=True)
        assert waiting == pytest.approx([0.1] * 3) and copying == pytest.approx([copy] * 3)
        assert source.asked == [8, 12, 16, 20]
    assert all(waiting == pytest.approx(0.0) for waiting, _ in simulate(Slow(clock, 0.1), 0, 3, batch=4, sleep=0.4))


def test_rates_and_shares_are_those_of_the_steps_after_the_first(clock):
    args = SimpleNamespace(readers=[1, 2], rate=[5.0, 20.0, 40.0], batch=4, steps=10)
    source = Slow(clock, 0.1)
    most, fast = mclr.train.bench.data.READERS, "as fast as it can"
    # as fast as it can, then steps of .8, .2 and .1 s, read in .4 s each
    assert measure({"images": source}, args) == [
        ["images", 1, fast, "10", "100.0%", "400.0", "0.0%"],
        ["images", 2, fast, "10", "100.0%", "400.0", "0.0%"],
        ["images", most, "5", "5", "0.0%", "0.0", "0.0%"],
        ["images", most, "20", "10", "50.0%", "200.0", "0.0%"],
        ["images", most, "40", "10", "75.0%", "300.0", "0.0%"],
    ]
    # no sample twice
    assert len(set(source.asked)) == len(source.asked) == 5 * 11
    assert source.split.readers._max_workers == most and source.split.keep is False
    # half of a second copying, in a second and a half
    (line,) = measure({"images": Slow(clock, 0.0, copy=0.05)}, SimpleNamespace(readers=[], rate=[40.0], batch=4, steps=10))
    assert line[4:] == ["0.0%", "0.0", "33.3%"]


def test_the_digits_are_read_from_shards_and_from_a_cache(digits, tokenizer, tmp_path, capsys):
    data = shutil.copytree(digits, tmp_path / "data")
    model = ["--model", "var-digits", f"model.tokenizer={tokenizer}"]
    quick = ["--data", str(data), "--steps", "2", "--batch", "8", "--readers", "1", "2", "--rate", "1000"]
    assert run(main, [*quick, *model]) == 2
    assert f"error: {data} has no complete cache for var-digits: make one" in capsys.readouterr().err
    assert prepare(["cache", "--data", str(data), *model]) == 0
    capsys.readouterr()
    for given, names in (([], ["images"]), (model, ["images", "tokens"])):
        assert run(main, [*quick, *given]) == 0
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        fast = "as fast as it can"
        cases = (("1", fast), ("2", fast), (str(mclr.train.bench.data.READERS), "1,000"))
        assert [tuple(line[:3]) for line in lines] == [(name, *case) for name in names for case in cases]
        assert all(float(line[3].replace(",", "")) > 0 for line in lines)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "arguments are required: --data"),
        (["--data", "digits", "--readers", "0"], "--readers: 0: a finite number above 0"),
        (["--data", "digits", "--rate", "10", "-1"], "--rate: -1: a finite"),
        (["--data", "digits", "--rate", "nan"], "--rate: nan: a finite"),
        (["--data", "digits", "--batch", "0"], "--batch: 0: a finite"),
        (["--data", "digits", "data.flip=true"], "data.flip=true has no effect without --model"),
        (["--data", "nowhere"], "unknown data nowhere"),
    ],
)
def test_bad_arguments_are_one_line(argv, says, capsys):
    assert says in refused(main, argv, capsys)
