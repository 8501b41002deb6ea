"""The bench: turns, going on with the rows of a file, no times for wrong results, winners, publishing."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from mclr.kernels import arms, bench, timing
from mclr.kernels import results as becomes
from mclr.kernels.arms import Arm
from mclr.kernels.op import DTYPES, results
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, dump, plot, tables, winners
from mclr.kernels.timing import Turn, number, spread, table, take_turns

NAME = "sum_clip"
RIGHT = OPS[NAME]
TINY = RIGHT.tiny["odd sizes"]
QUICK = ["--only", NAME, "--shapes", "img64-s, 16"]
BOTH = {(arm, which) for arm in ("eager", "ours/torch") for which in PASSES}
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
    file, plots = tmp_path / "rows.json", tmp_path / "plots"
    assert bench.main([*QUICK, "--json", str(file), "--plot", str(plots)]) == 0
    out = capsys.readouterr().out
    assert "No GPU" in out.splitlines()[0]
    rows = rows_in(file)
    assert {(row["arm"], row["pass"]) for row in rows} == BOTH and len(rows) == 4
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["rounds"] == 3 and row["family"] == "cpu" and not row["red"]
        assert row["floor_ms"] == pytest.approx(row["bytes"] / row["copy_gbs"] / 1e6) and row["peak_bytes"] is None
        assert f"{number(row['ms'])} ({number(row['p20'])}" in out
    assert all(row["apart"] < 1e-4 for row in rows if row["arm"] == "ours/torch")
    drawn = (plots / "roofline.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 5000
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", None)
        before = file.read_bytes()
        assert bench.main([*QUICK, "--json", str(file)]) == 0
        said = capsys.readouterr()
        assert file.read_bytes() == before and "shapes: 0 measured, 1 there already" in said.err
        assert all(f"{number(row['ms'])} ({number(row['p20'])}" in said.out for row in rows)
    # other code is another measurement; the old rows stay
    monkeypatch.setattr(becomes, "source", lambda: "other")
    assert bench.main([*QUICK, "--json", str(file)]) == 0
    assert [row["source"] == "other" for row in rows_in(file)] == [False] * 4 + [True] * 4


def test_copies_exceed_the_cache_by_their_inputs(monkeypatch):
    monkeypatch.setattr(bench, "CPU_CACHE", 1 << 16)
    drawn = bench.draw(RIGHT, CPU, torch.float32, TINY | {"R": 8})
    size = drawn.inputs["a_RNHW"].nbytes + drawn.inputs["b_RNHW"].nbytes
    assert 3 << 16 <= len(bench.copies_of(drawn, CPU)) * size < (3 << 16) + size


@pytest.mark.parametrize(("factor", "says"), [(1.01, "from the first arm's"), (torch.nan, "nan from"), ("crash", "TypeError")])
def test_what_is_wrong_has_a_reason_and_no_time(capsys, monkeypatch, factor, says):
    """Ours is a percent off: RED, exit status 1. Others may be that far off, or fail, without a fault of ours."""
    wrong = Arm(lambda **inputs: RIGHT.run(**inputs) * factor)
    half = Arm(lambda **inputs: RIGHT.definition(**inputs) / 2)
    made = {"eager": Arm(RIGHT.definition), "theirs": wrong, "half": half, "absent": None, "ours/torch": wrong}
    monkeypatch.setattr(bench, "arms", lambda op, gpu: made)
    assert bench.main(QUICK) == 1
    lines = {arm: line for line in capsys.readouterr().out.splitlines() for arm in made if f"| {arm} |" in line}
    assert "RED: " in lines["ours/torch"] and says in lines["ours/torch"] and "–" not in lines["ours/torch"]
    assert says in lines["theirs"] if factor != 1.01 else "–" in lines["theirs"]
    assert "a result is 0.5 from the first arm's" in lines["half"] and "RED" not in lines["half"]
    assert "not installed" in lines["absent"] and "–" in lines["eager"]


def test_what_does_not_fit_is_not_wrong(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(bench, "copies_of", full)
    rows = bench.measure(RIGHT, TINY, torch.float32, CPU, RATES)
    assert {(row["arm"], row["pass"], row["why"], row["red"]) for row in rows} == {
        (*which, "OutOfMemoryError: tried to allocate", False) for which in BOTH
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_wrong_at_the_sizes_of_the_tests_stops_the_bench(dtype):
    """On a GPU; here the same check of the torch path."""
    assert bench.wrong_when_tiny(RIGHT, CPU) == ""

    def wrong(a_RNHW, **inputs):
        return RIGHT.run(a_RNHW, **inputs) * (2 if a_RNHW.dtype == DTYPES[dtype] else 1)

    says = bench.wrong_when_tiny(replace(RIGHT, run=wrong), CPU)
    assert says.startswith(f"ours/torch: odd sizes, {dtype}: output 0 is 1 off")
    rows = bench.measure(RIGHT, TINY, torch.float32, CPU, RATES, says)
    assert {row["arm"] for row in rows if row["red"]} == {"ours/torch"} and all(row["why"] == says for row in rows)


def test_force_weights_is_timed_in_place_and_compared_on_fresh_weights(monkeypatch):
    op = OPS["force_weights"]
    shape = op.tiny["one block"]
    weights = op.draw(shape, torch.float32, torch.Generator().manual_seed(0))["weights"]
    expected = op.definition(weights)
    found = arms.arms(op, gpu=False)["ours/torch"].call(weights=weights)
    assert all(a is b and torch.allclose(a, c, rtol=1e-5) for a, b, c in zip(found, weights, expected, strict=True))
    # weights that another arm had forced before would be a percent off in rows of magnitude .01
    monkeypatch.setattr(bench, "arms", lambda op, gpu: arms.arms(op, gpu) | {"again": Arm(arms.forced)})
    rows = bench.measure(op, shape, torch.float32, CPU, RATES)
    assert [(row["pass"], row["why"]) for row in rows] == [("forward", "")] * 3 and all(row["apart"] < 1e-6 for row in rows[1:])


def test_what_others_would_run_is_the_definition():
    op = OPS["token_logp"]
    sizes = {"B": 2, "R": 3, "L": 5, "D": 6, "V": 7}
    inputs = op.draw(sizes, torch.float32, torch.Generator().manual_seed(0))
    true = results(op.definition, inputs)
    # half activations beside an fp32 weight, as in a network under autocast
    half = op.draw(sizes, torch.bfloat16, torch.Generator().manual_seed(0))
    forms = (arms.cross_entropy, lambda **given: arms.cross_entropy(**given, chunk=4))
    for form in forms:
        for name, found in results(form, inputs).items():
            torch.testing.assert_close(found, true[name], rtol=1e-4, atol=1e-5)
    for form in (*forms, op.definition):
        for name, found in results(form, half).items():
            assert (found - true[name]).norm() < 0.05 * true[name].norm(), name


def test_arms_of_a_gpu_and_of_a_cpu(monkeypatch):
    monkeypatch.setattr(arms, "triton", None)
    monkeypatch.setattr(arms.importlib.util, "find_spec", lambda name: None)
    found = arms.arms(OPS["token_logp"], gpu=True)
    assert [name for name, arm in found.items() if arm is None] == ["Liger", "ours/triton"]
    assert list(found)[:2] == ["eager", "torch.compile"] and "cross-entropy, compiled" in found
    assert list(arms.arms(OPS["token_logp"], gpu=False)) == ["eager", "ours/torch"]
    shapes = {"a, 8 pairs": {"B": 8, "C": 3}, "a, 32 pairs": {"B": 32, "C": 3}, "b, 8 pairs": {"B": 8, "C": 4}}
    op = replace(RIGHT, shapes=shapes, narrow={"B": 2})
    assert arms.sized(op, gpu=False) == {"a, cut to B=2": {"B": 2, "C": 3}, "b, cut to B=2": {"B": 2, "C": 4}}
    assert arms.sized(op, gpu=True) == shapes


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
        (["--json", "no/such/rows.json"], "no/such/rows.json cannot be written"),
        (["--json", "pyproject.toml"], "holds no rows of this bench"),
        (["--json", "kernels"], "kernels cannot be read (Is a directory)"),
        (["--json", "OTHER"], "OTHER holds no rows of this bench"),
        (["--json", ""], "cannot be read"),
        (["--plot", "README.md/plots"], "README.md/plots cannot be written"),
        (["--minutes", "nan"], "--minutes: nan: a finite number above 0 is needed"),
        (["--minutes", "soon"], "--minutes: soon: a finite"),
        (["--publish", "absent.json"], "--publish absent.json: no such file"),
        (["--publish", "kernels"], "kernels cannot be read (Is a directory)"),
        (["--publish", "rows.json", "--only", NAME, "--plot", "plots"], "leave --only, --plot out"),
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


def made_up(of=(), **changes):
    """Rows of a GPU for two operations, of which the first wins. changes: entries of the rows that match `of`."""
    where = {"device": "GPU", "family": "sm_90", "driver": "1", "torch": "2", "triton": "3", "liger": "", "source": "here"}
    found = {"red": False, "why": "", "p20": 1.0, "p80": 3.0, "host_ms": 0.5, "floor_ms": 0.5}
    rows = []
    for op in ("first", "second"):
        for shape in ("small", "large"):
            for which in PASSES:
                for arm, ms in (("eager", 3.0), ("torch.compile", 2.0), ("ours/torch", 2.5), ("ours/triton", 1.0)):
                    row = {"op": op, "shape": shape, "dtype": "bf16", "arm": arm, "pass": which} | where | RATES | found
                    row["ms"] = ms if op == "first" else 4 - ms
                    rows.append(row | (changes if dict(of).items() <= row.items() else {}))
    return rows


SLOWER_THERE = {"op": "first", "shape": "large", "arm": "torch.compile", "pass": "forward+backward"}


@pytest.fixture
def two_operations(monkeypatch):
    made = {name: replace(RIGHT, name=name, shapes={"small": {}, "large": {}}) for name in ("first", "second")}
    monkeypatch.setattr(becomes, "OPS", made)


@pytest.mark.parametrize(
    ("rows", "won"),
    [
        (made_up(), {"sm_90": ["first"]}),
        (made_up(SLOWER_THERE, ms=0.9), {}),
        # a tie is no win, and neither is a shape without our time or without another's
        (made_up(SLOWER_THERE, ms=1.0), {}),
        (made_up(SLOWER_THERE | {"arm": "ours/triton"}, why="out of memory"), {}),
        ([row for row in made_up() if row["shape"] == "small"], {}),
        ([row for row in made_up() if row["arm"] == "ours/triton"], {}),
        # fp32, and forward where there is a backward, decide nothing
        (made_up() + made_up(SLOWER_THERE, ms=0.9, dtype="fp32"), {"sm_90": ["first"]}),
        (made_up(SLOWER_THERE | {"pass": "forward"}, ms=0.9), {"sm_90": ["first"]}),
        ([row for row in made_up() if row["pass"] == "forward"], {"sm_90": ["first"]}),
        # every GPU of a family has to agree; another family decides for itself
        (made_up() + [row | {"device": "slow"} for row in made_up(SLOWER_THERE, ms=0.9)], {}),
        (made_up() + [row | {"device": "old", "family": "sm_80"} for row in made_up(SLOWER_THERE, ms=0.9)], {"sm_90": ["first"]}),
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
        rows = [row | {"device": device} for row in made_up(SLOWER_THERE | {"arm": "ours/triton"}, ms=ms)]
        file.write_bytes(dump([*rows, rows[0] | {"family": "cpu"}]))
        assert bench.main(["--publish", str(file)]) == 0
        done = json.loads((folder / "RESULTS.json").read_text())
        assert done["winners"] == ({} if ms == 5.0 else {"sm_90": ["first"]})
    assert list(done) == ["winners", "rows"] and len(done["rows"]) == 64
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
        (made_up(source="before"), {}, "were measured with other code than this"),
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


def test_a_row_without_a_time_is_told_and_drawn(tmp_path):
    rows = made_up({"arm": "eager", "shape": "large"}, why="OutOfMemoryError: tried to allocate", family="cpu")
    assert tables(rows).count("| eager | OutOfMemoryError: tried to allocate |") == 2
    assert "| 1* (1–3) |" in tables(made_up(SLOWER_THERE, ms=1.0, host_ms=0.95))
    assert plot(rows, tmp_path).read_bytes().startswith(b"\x89PNG")
