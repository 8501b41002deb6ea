"""The bench: turns, going on with the rows of a file, no times for wrong results, winners, publishing."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from mclr.kernels import bench, timing
from mclr.kernels import results as becomes
from mclr.kernels.bench import Arm
from mclr.kernels.op import DTYPES
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, dump, tables, winners
from mclr.kernels.timing import Turn, number, spread, table, take_turns

NAME = "sum_clip"
RIGHT = OPS[NAME]
TINY = RIGHT.tiny["odd sizes"]
QUICK = ["--only", NAME, "--shapes", "img64-s, 16"]
CPU = torch.device("cpu")
RATES = {"copy_gbs": 1.0, "product_tflops": 1.0}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "WARM_UP_MS", 1.0)


def rows_in(path):
    return json.loads(path.read_text())["rows"]


def test_turns_go_round_by_round_and_what_is_out_of_memory_stops(monkeypatch):
    """Each work sees its own calls in order; warm-up rounds do not count; `after` follows every turn."""
    seen, after = [], []
    monkeypatch.setattr(timing, "clocked", lambda work, calls, device: ([work(i) for i in range(calls)][-1], 0.0))

    def work(name):
        def call(i):
            if name == "c" and i == 1:
                raise torch.OutOfMemoryError("tried to allocate")
            seen.append((name, i))
            return 10.0 * i

        return call

    turns = {"a": Turn(work("a"), 3), "b": Turn(work("b"), 1, calls=2, warm_up=1), "c": Turn(work("c"), 3)}
    take_turns(turns, CPU, after.append)
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("c", 0), ("a", 1), ("b", 2), ("b", 3), ("a", 2)]
    assert after == ["a", "b", "c", "a", "b", "c", "a"]
    assert turns["a"].times == [0, 10, 20] and turns["b"].times == [30]
    assert turns["c"].failed == "OutOfMemoryError: tried to allocate" and not turns["a"].failed


def test_medians_and_tables():
    assert spread([5, 1, 3, 2, 4, 100]) == {"ms": 3.5, "p20": 2, "p80": 5}
    assert [number(value) for value in (0.012345, 9.876, 123.4, 12_345)] == ["0.0123", "9.88", "123", "12,345"]
    assert table(["a", "b", "c"], [["x", 1, 2.5]], left=2) == "| a | b | c |\n| --- | --- | ---: |\n| x | 1 | 2.5 |"


def test_a_run_without_a_gpu_says_so_and_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.json"
    assert bench.main([*QUICK, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "No GPU" in out.splitlines()[0]
    rows = rows_in(file)
    assert [row["arm"] for row in rows] == ["eager", "ours/torch"] and rows[1]["apart"] < 1e-4
    for row in rows:
        assert row["family"] == "cpu" and not row["red"] and row["peak_bytes"] is None and list(row["passes"]) == list(PASSES)
        for times in row["passes"].values():
            assert 0 < times["p20"] <= times["ms"] <= times["p80"]
            assert times["floor_ms"] == pytest.approx(times["bytes"] / row["copy_gbs"] / 1e6)
            assert f"{number(times['ms'])} ({number(times['p20'])}" in out
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", None)
        before = file.read_bytes()
        assert bench.main([*QUICK, "--json", str(file)]) == 0
        said = capsys.readouterr()
        assert file.read_bytes() == before and "shapes: 0 measured, 1 there already" in said.err
        assert said.out == out
    # other code is another measurement; the old rows stay
    monkeypatch.setattr(becomes, "source", lambda: "other")
    assert bench.main([*QUICK, "--json", str(file)]) == 0
    assert [row["source"] == "other" for row in rows_in(file)] == [False] * 2 + [True] * 2


def test_copies_exceed_the_cache_by_their_inputs(monkeypatch):
    monkeypatch.setattr(bench, "CPU_CACHE", 1 << 16)
    drawn = bench.draw(RIGHT, CPU, torch.float32, TINY | {"R": 8})
    size = drawn.inputs["a_RNHW"].nbytes + drawn.inputs["b_RNHW"].nbytes
    assert 3 << 16 <= len(bench.copies_of(drawn, CPU)) * size < (3 << 16) + size


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "again", "flops"),
    [
        # bytes of bf16: x and scale; the backward reads them once more
        ("scale_silu", 2 * (105 * 3 + 15), 2 * 315, 2 * (105 * 3 + 15), 0),
        # a backward that needs no inputs
        ("sum_clip", 4 * 315, 2 * 315, 0, 0),
        # hidden in bf16, the Linear and the values in fp32, int64 tokens and indices
        ("token_logp", 2 * 5 * 3 * 12 + 4 * 7 * 13 + 8 * (9 + 5), 4 * 15, 2 * 180 + 4 * 91 + 8 * 14, 2 * 15 * 12 * 7),
        ("force_weights", 4 * 158, 4 * 158, 0, 0),
    ],
)
def test_the_least_work_is_that_of_inputs_and_results(name, inputs, outputs, again, flops):
    op = OPS[name]
    drawn = bench.draw(op, CPU, torch.bfloat16, next(iter(op.tiny.values())))
    forward, *rest = bench.least_work(op, drawn)
    assert forward == {"bytes": inputs + outputs, "flops": flops}
    gradients = sum(t.nbytes for t in drawn.wanted)
    both = {"bytes": inputs + 2 * outputs + again + gradients, "flops": 3 * flops}
    assert rest == ([] if name == "force_weights" else [both])


@pytest.mark.parametrize(("factor", "says"), [(1.01, "from the first arm's"), (torch.nan, "nan from"), ("crash", "TypeError")])
def test_what_is_wrong_has_a_reason_and_no_time(capsys, monkeypatch, factor, says):
    """Ours is a percent off: RED, exit status 1. Others may be that far off, or fail, without a fault of ours."""
    wrong = Arm(lambda **inputs: RIGHT.run(**inputs) * factor)
    half = Arm(lambda **inputs: RIGHT.definition(**inputs) / 2)
    made = {
        "eager": Arm(RIGHT.definition),
        "theirs": wrong,
        "half": half,
        "absent": None,
        "ours/torch": replace(wrong, allowed=1e-4),
    }
    monkeypatch.setattr(bench, "arms", lambda op, dtype, gpu: made)
    assert bench.main(QUICK) == 1
    lines = {arm: line for line in capsys.readouterr().out.splitlines() for arm in made if f"| {arm} |" in line}
    assert "RED: " in lines["ours/torch"] and says in lines["ours/torch"] and "–" not in lines["ours/torch"]
    assert says in lines["theirs"] if factor != 1.01 else "–" in lines["theirs"]
    assert "a result is 0.5 from the first arm's" in lines["half"] and "RED" not in lines["half"]
    assert "not installed" in lines["absent"] and "–" in lines["eager"]


def test_what_does_not_fit_is_not_wrong(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(bench, "turn_of", full)
    rows = bench.measure(RIGHT, TINY, torch.float32, CPU, RATES)
    monkeypatch.setattr(bench, "copies_of", full)
    rows += bench.measure(RIGHT, TINY, torch.float32, CPU, RATES)
    found = [(row["arm"], row["why"], row["red"], row["passes"]) for row in rows]
    assert found == [(arm, "OutOfMemoryError: tried to allocate", False, {}) for arm in ("eager", "ours/torch", "eager")]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_wrong_at_the_sizes_of_the_tests_stops_the_bench(dtype):
    """On a GPU; here the same check of the torch path."""
    assert bench.wrong_when_tiny(RIGHT, CPU) == ""

    def wrong(a_RNHW, **inputs):
        return RIGHT.run(a_RNHW, **inputs) * (2 if a_RNHW.dtype == DTYPES[dtype] else 1)

    says = bench.wrong_when_tiny(replace(RIGHT, run=wrong), CPU)
    assert says.startswith(f"ours/torch: odd sizes, {dtype}: output 0 is 1 off")


def test_what_works_in_place_is_compared_on_fresh_inputs(monkeypatch):
    """Weights that another arm had forced before would be a percent off in rows of magnitude .01."""
    op = OPS["force_weights"]
    monkeypatch.setattr(bench, "arms", lambda *args, real=bench.arms: real(*args) | {"again": Arm(op.run, allowed=1e-6)})
    rows = bench.measure(op, op.tiny["one block"], torch.float32, CPU, RATES)
    assert [(list(row["passes"]), row["why"]) for row in rows] == [(["forward"], "")] * 3


def test_arms_of_a_gpu_and_of_a_cpu(monkeypatch):
    monkeypatch.setattr(bench, "triton", None)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    found = bench.arms(OPS["token_logp"], torch.bfloat16, gpu=True)
    assert list(found) == ["eager", "torch.compile", "Liger", "ours/torch", "ours/triton"]
    assert [name for name, arm in found.items() if arm is None] == ["Liger", "ours/triton"]
    assert list(bench.arms(OPS["token_logp"], torch.bfloat16, gpu=False)) == ["eager", "ours/torch"]
    shapes = {"a, 8 pairs": {"B": 8, "C": 3}, "a, 32 pairs": {"B": 32, "C": 3}, "b, 8 pairs": {"B": 8, "C": 4}}
    op = replace(RIGHT, shapes=shapes, narrow={"B": 2})
    assert bench.sized(op, gpu=False) == {"a, cut to B=2": {"B": 2, "C": 3}, "b, cut to B=2": {"B": 2, "C": 4}}
    assert bench.sized(op, gpu=True) == shapes


def test_when_the_minutes_are_over_no_shape_is_begun(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main([*QUICK, "--minutes", "1e-9"]) == 0
    said = capsys.readouterr()
    assert "--minutes 1e-09 are over, shapes left: 1" in said.out and said.err == "shapes: 0 measured\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "attention"], "invalid choice: 'attention'"),
        (["--dtype", "fp16"], "--dtype"),
        (["--shapes", "d99"], "--shapes d99: no shape has this in its name"),
        (["--json", "no/such/rows.json"], "(No such file or directory)"),
        (["--json", "pyproject.toml"], "holds no rows of this bench"),
        (["--json", "kernels"], "cannot use kernels (Is a directory)"),
        (["--json", "OTHER"], "OTHER holds no rows of this bench"),
        (["--json", ""], "cannot use . (Is a directory)"),
        (["--minutes", "nan"], "--minutes: nan: a finite number above 0 is needed"),
        (["--minutes", "soon"], "--minutes: invalid float value: 'soon'"),
        (["--publish", "absent.json"], "--publish: absent.json holds no rows of a GPU"),
        (["--publish", "rows.json", "--only", NAME, "--minutes", "1"], "leave --only, --minutes out"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(becomes.ROOT)
    monkeypatch.setattr(bench, "measure", None)
    other = tmp_path / "OTHER"
    other.write_text('{"rows": [{"op": "one", "shape": "small"}]}')
    argv = [str(other) if word == "OTHER" else word for word in argv]
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and len(err.splitlines()) == 1


def made_up(of=(), which=PASSES[1], times=(), **changes):
    """Rows of a GPU for two operations, of which the first wins.

    changes: entries of the rows that match `of`. times: changed times of their pass `which`; None takes the pass away.
    """
    where = {"device": "GPU", "family": "sm_90", "driver": "1", "torch": "2", "triton": "3", "liger": "", "source": "here"}
    rows = []
    for op in ("first", "second"):
        for shape in ("small", "large"):
            for arm, ms in (("eager", 3.0), ("torch.compile", 2.0), ("ours/torch", 2.5), ("ours/triton", 1.0)):
                row = {"op": op, "shape": shape, "dtype": "bf16", "arm": arm, "red": False, "why": "", **where, **RATES}
                row |= {"apart": None, "peak_bytes": None}
                each = {"ms": ms if op == "first" else 4 - ms, "p20": 1.0, "p80": 3.0, "host_ms": 0.5, "floor_ms": 0.5}
                row["passes"] = {name: dict(each) for name in PASSES}
                if dict(of).items() <= row.items():
                    row |= changes
                    row["passes"][which] |= dict(times or {})
                    if times is None:
                        del row["passes"][which]
                rows.append(row)
    return rows


SLOWER_THERE = {"op": "first", "shape": "large", "arm": "torch.compile"}
OURS_THERE = SLOWER_THERE | {"arm": "ours/triton"}
QUICK_ONE, TIE = made_up(SLOWER_THERE, times={"ms": 0.9}), made_up(SLOWER_THERE, times={"ms": 1.0})


@pytest.fixture
def two_operations(monkeypatch):
    made = {name: replace(RIGHT, name=name, shapes={"small": {}, "large": {}}) for name in ("first", "second")}
    monkeypatch.setattr(becomes, "OPS", made)


@pytest.mark.parametrize(
    ("rows", "won"),
    [
        (made_up(), {"sm_90": ["first"]}),
        (QUICK_ONE, {}),
        # a tie is no win, and neither is a shape without our time or without another's
        (TIE, {}),
        (made_up(OURS_THERE, times=None, why="out of memory"), {}),
        ([row for row in made_up() if row["shape"] == "small"], {}),
        ([row for row in made_up() if row["arm"] == "ours/triton"], {}),
        # fp32, and forward where there is a backward, decide nothing
        (made_up() + [row | {"dtype": "fp32"} for row in QUICK_ONE], {"sm_90": ["first"]}),
        (made_up(SLOWER_THERE, PASSES[0], {"ms": 0.9}), {"sm_90": ["first"]}),
        ([row | {"passes": {PASSES[0]: row["passes"][PASSES[0]]}} for row in QUICK_ONE], {"sm_90": ["first"]}),
        # every GPU of a family has to agree; another family decides for itself
        (made_up() + [row | {"device": "slow"} for row in QUICK_ONE], {}),
        (made_up() + [row | {"device": "old", "family": "sm_80"} for row in QUICK_ONE], {"sm_90": ["first"]}),
    ],
)
def test_an_operation_wins_where_nothing_else_is_faster_anywhere(two_operations, rows, won):
    assert winners(rows) == won


@pytest.fixture
def published(two_operations, tmp_path, monkeypatch):
    """A copy of kernels/RESULTS.* that --publish writes to, in a tree that is a commit."""
    for kind in ("json", "md"):
        shutil.copy(becomes.RESULTS.with_suffix(f".{kind}"), tmp_path)
    answers = {"rev-parse": "c0ffee", "status": ""}
    monkeypatch.setattr(becomes, "said", lambda *command: answers[command[1]])
    monkeypatch.setattr(becomes, "source", lambda: "here")
    monkeypatch.setattr(becomes, "RESULTS", tmp_path / "RESULTS.json")
    return tmp_path, answers


def test_publishing_replaces_what_the_same_gpu_said(published):
    folder, _ = published
    file, before = folder / "rows.json", (folder / "RESULTS.md").read_text()
    for device, ms in (("old", 1.0), ("GPU", 5.0), ("GPU", 1.0)):
        rows = [row | {"device": device} for row in made_up(OURS_THERE, times={"ms": ms})]
        file.write_bytes(dump([*rows, rows[0] | {"family": "cpu"}]))
        assert bench.main(["--publish", str(file)]) == 0
        done = json.loads((folder / "RESULTS.json").read_text())
        assert done["winners"] == ({} if ms == 5.0 else {"sm_90": ["first"]})
    assert list(done) == ["winners", "rows"] and len(done["rows"]) == 32
    assert all(row["commit"] == "c0ffee" and row["family"] == "sm_90" for row in done["rows"])
    page = (folder / "RESULTS.md").read_text()
    assert page.count("### GPU (sm_90)") == page.count("### old (sm_90)") == 1 and "on sm_90 first." in page and "c0ffee" in page
    assert page.count("| ours/triton | 1 (1–3) | 50 % | 1 (1–3) | 50 % |") == 4
    # the other sections stay as they are
    outside = [re.sub(r"(?ms)^## GPU$.*?^## ", "", text) for text in (before, page)]
    assert outside[0] == outside[1] and len(outside[0]) < len(before)


@pytest.mark.parametrize(
    ("rows", "answer", "says"),
    [
        ([row | {"family": "cpu"} for row in made_up()], {}, "holds no rows of a GPU"),
        ([], {}, "holds no rows of a GPU"),
        (made_up(source="before"), {}, "that were measured with this code: measure again"),
        (made_up(SLOWER_THERE, red=True, why="output 0"), {}, "1 rows are red, first first at large: output 0"),
        (made_up(), {"status": "M kernels/op.py"}, "kernels/ differs from its commit (M kernels/op.py)"),
        (made_up(), {"rev-parse": ""}, "no git here"),
    ],
)
def test_what_is_not_published(published, capsys, rows, answer, says):
    folder, answers = published
    answers.update(answer)
    file, before = folder / "rows.json", (folder / "RESULTS.json").read_bytes()
    file.write_bytes(dump(rows))
    with pytest.raises(SystemExit) as exit:
        bench.main(["--publish", str(file)])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and len(err.splitlines()) == 1
    assert (folder / "RESULTS.json").read_bytes() == before


def test_a_row_without_a_time_is_told():
    why = "OutOfMemoryError: tried to allocate"
    rows = made_up({"arm": "eager", "shape": "large"}, times=None, why=why, family="cpu")
    assert tables(rows).count(f"| eager | 3 (1–3) | 17 % | {why} |") == 1
    assert "| 1* (1–3) |" in tables(made_up(OURS_THERE, times={"host_ms": 0.95}))
