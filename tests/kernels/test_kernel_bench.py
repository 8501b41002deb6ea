"""kernels/bench.py, arms.py, results.py: no time for what is wrong, rows that can be gone on with, winners that only times decide."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mclr.kernels import arms, bench
from mclr.kernels import results as becomes
from mclr.kernels.arms import Arm
from mclr.kernels.op import DTYPES, Cost, Op, results
from mclr.kernels.registry import OPS
from mclr.kernels.results import PASSES, dump, machine, plot, tables, winners

NAME = "denoising_value"
QUICK = ["--only", NAME, "--shapes", "img64"]
BOTH = {(arm, which) for arm in ("eager", "ours/torch") for which in PASSES}
CPU = torch.device("cpu")
PEAKS = {"copy_gbs": 1.0, "product_tflops": 1.0}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "WARM_UP_MS", 1.0)


@pytest.fixture
def timed_alone(monkeypatch):
    """The checks in the interpreter and the compiler take seconds; one test runs them."""
    monkeypatch.setattr(bench, "without_gpu", lambda names: True)


def rows_in(path):
    return json.loads(path.read_text())["rows"]


def test_a_run_without_a_gpu_says_so_checks_and_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    file, plots = tmp_path / "rows.json", tmp_path / "plots"
    assert bench.main([*QUICK, "--json", str(file), "--plot", str(plots)]) == 0
    out = capsys.readouterr().out
    assert "No GPU" in out.splitlines()[0]
    # checks in two sizes and dtypes or more, two kernels, nothing spilled
    (checked,) = re.findall(rf"^\| {NAME} \| 12 \| 0\.\d\d \| 2 \| \d+ \| 0 \| \d+ \|$", out, re.M)
    rows = rows_in(file)
    assert {(row["arm"], row["pass"]) for row in rows} == BOTH and len(rows) == 4
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["rounds"] == 3 and row["family"] == "cpu" and not row["red"]
        assert row["floor_ms"] == pytest.approx(row["bytes"] / row["copy_gbs"] / 1e6)
        assert row["error"] < 1e-5 and row["peak_bytes"] is None
        assert f"{row['ms']:.3g} ({row['p20']:.3g}" in out.replace(checked, "")
    assert all(row["apart"] < 1e-4 for row in rows if row["arm"] == "ours/torch")
    for name in ("roofline.png", f"bars-{NAME}.png"):
        assert (plots / name).read_bytes().startswith(b"\x89PNG") and (plots / name).stat().st_size > 5000

    monkeypatch.setattr(bench, "without_gpu", lambda names: True)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", None)
        before = file.read_bytes()
        assert bench.main([*QUICK, "--json", str(file)]) == 0
        said = capsys.readouterr()
        assert file.read_bytes() == before and "0 shapes measured, 1 there already" in said.err
        assert all(f"{row['ms']:.3g} ({row['p20']:.3g}" in said.out for row in rows)
    # other code is another measurement; the old rows stay
    monkeypatch.setattr(becomes, "source", lambda: "other")
    assert bench.main([*QUICK, "--json", str(file)]) == 0
    assert [row["source"] == "other" for row in rows_in(file)] == [False] * 4 + [True] * 4


def test_what_is_wrong_without_a_gpu_is_red(capsys, monkeypatch):
    def run(command, **options):
        reports = f"| {NAME} | _forward | N=1 | bf16 | 90 | 4 | 40 | 8 | 32 |\n\n1 kernels compiled, 1 above the bounds\n"
        done = {"-c": (0, json.dumps({NAME: (12, found, "pairs, fp16: output 0")}), ""), "-m": (compiler, reports, "")}
        return bench.subprocess.CompletedProcess(command, *done[command[1]])

    monkeypatch.setattr(bench.subprocess, "run", run)
    for found, compiler, reds in ((0.5, 0, 0), (1.5, 0, 1), (float("nan"), 0, 1), (0.5, 1, 1), (2.0, 1, 2)):
        assert bench.without_gpu([NAME]) == (not reds)
        out = capsys.readouterr().out
        assert out.count("RED: ") == reds and f"| {NAME} | 12 | {found:.2f} | 1 | 40 | 8 | 32 |" in out
        assert ("pairs, fp16: output 0 is" in out) == (not found <= 1) and ("1 above" in out) == bool(compiler)


@pytest.mark.parametrize("factor", [1 + 1e-4, torch.nan, "crash"])
def test_a_red_operation_prints_no_time(timed_alone, tmp_path, capsys, monkeypatch, factor):
    file, right = tmp_path / "rows.json", OPS[NAME]
    monkeypatch.setitem(bench.OPS, NAME, replace(right, run=lambda **inputs: right.run(**inputs) * factor))
    assert bench.main([*QUICK, "--json", str(file)]) == 1
    rows = rows_in(file)
    assert {(row["arm"], row["pass"]) for row in rows} == BOTH and not any("ms" in row for row in rows)
    assert {row["arm"] for row in rows if row["red"]} == {"ours/torch"}
    out = capsys.readouterr().out
    says = "TypeError" if factor == "crash" else "output 0 is"
    assert f"RED: ours/torch: {says}" in out and "–" not in out.split("ours/torch |")[1]


def test_an_arm_that_computes_something_else_or_fails_has_a_reason_and_no_time(timed_alone, capsys, monkeypatch):
    def fails(**inputs):
        raise RuntimeError("not this\nshape")

    made = {
        "eager": Arm(OPS[NAME].definition),
        "half": Arm(lambda **inputs: OPS[NAME].definition(**inputs) / 2, compiled=True),
        "fails": Arm(fails),
        "absent": None,
        "ours/torch": Arm(OPS[NAME].run),
    }
    monkeypatch.setattr(bench, "arms", lambda op, gpu: made)
    assert bench.main(QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    says = {"half": "a result is 0.5 from the first arm's", "fails": "RuntimeError: not this shape", "absent": "not installed"}
    for arm in made:
        (line,) = (line for line in lines if f"| {arm} |" in line)
        assert says.get(arm, "–") in line and (arm in says) == ("–" not in line), line


def test_what_does_not_fit_is_not_wrong(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(bench, "samples", full)
    rows = bench.measure(OPS[NAME], OPS[NAME].tiny["pairs"], torch.float32, CPU, PEAKS)
    assert {(row["arm"], row["pass"], row["why"], row["red"]) for row in rows} == {
        (*which, "OutOfMemoryError: tried to allocate", False) for which in BOTH
    }


def test_an_operation_without_gradients_is_timed_forward():
    op = Op(
        name="double",
        run=lambda x: 2 * x,
        definition=lambda x: x + x,
        draw=lambda shape, dtype, generator: {"x": torch.randn(shape["N"], generator=generator).to(dtype)},
        shapes={"some": {"N": 8}},
        tiny={},
        cost=lambda shape, dtype: Cost(2 * shape["N"] * dtype.itemsize, 0),
    )
    rows = bench.measure(op, {"N": 8}, torch.float32, CPU, PEAKS)
    assert [(row["arm"], row["pass"], row["why"]) for row in rows] == [(arm, "forward", "") for arm in ("eager", "ours/torch")]


def test_force_weights_is_timed_in_place_and_compared_on_fresh_weights(monkeypatch):
    op = OPS["force_weights"]
    weights = op.draw(op.tiny["one level"], torch.float32, torch.Generator().manual_seed(0))["weights"]
    expected = op.definition(weights)
    found = arms.arms(op, gpu=False)["ours/torch"].call(weights=weights)
    assert all(a is b for a, b in zip(found, weights, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))
    # what another arm has forced before would be a percent off where rows had a magnitude of .01
    monkeypatch.setattr(bench, "arms", lambda op, gpu: arms.arms(op, gpu) | {"again": Arm(arms.forced)})
    rows = bench.measure(op, op.tiny["one level"], torch.float32, CPU, PEAKS)
    assert [row["why"] for row in rows] == ["", "", ""] and all(row["apart"] < 1e-6 for row in rows[1:])


def test_what_others_would_run_is_the_definition(monkeypatch):
    op = OPS["token_logp"]
    monkeypatch.setattr(arms, "CHUNK", 4)
    sizes = {"B": 2, "R": 3, "L": 5, "D": 6, "V": 7}
    inputs = op.draw(sizes, torch.float32, torch.Generator().manual_seed(0))
    true = results(op.definition, inputs)
    for name, found in results(arms.chunked, inputs).items():
        torch.testing.assert_close(found, true[name], rtol=1e-4, atol=1e-5)
    # half activations beside an fp32 weight, as drawn; the definition as a network under autocast computes it
    half = op.draw(sizes, torch.bfloat16, torch.Generator().manual_seed(0))
    for form in (arms.chunked, op.definition):
        for name, found in results(form, half).items():
            assert (found - true[name]).norm() < 0.05 * true[name].norm(), name
    assert op.definition(**half).dtype == torch.float32


def test_what_is_not_installed_is_an_arm_without_a_call(monkeypatch):
    monkeypatch.setattr(arms, "triton", None)
    monkeypatch.setattr(arms.importlib.util, "find_spec", lambda name: None)
    found = arms.arms(OPS["token_logp"], gpu=True)
    assert [name for name, arm in found.items() if arm is None] == ["Liger", "ours/triton"]
    assert list(found)[:2] == ["eager", "torch.compile"]
    assert list(arms.arms(OPS["token_logp"], gpu=False)) == ["eager", "ours/torch"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_over_scales_is_the_same_in_every_form():
    op = arms.COMPARISONS["scale_attention"]
    inputs = op.draw({"R": 1, "H": 1}, torch.float32, torch.Generator().manual_seed(0))
    mask = arms.mask_LL(CPU)
    assert mask.shape == (680, 680) and mask[0].sum() == 1 and mask[1].sum() == 5 and mask[-1].all()
    assert op.cost({"R": 1, "H": 1}, torch.float32).forward_flops == 4 * 64 * mask.sum()
    masked, prefix = (results(form, inputs) for form in (arms.masked_attention, arms.prefix_attention))
    for name, true in masked.items():
        torch.testing.assert_close(prefix[name], true, rtol=1e-4, atol=1e-5)
    q, k, v = (t.detach() for t in inputs.values())
    flexible = flex_attention(q, k, v, block_mask=arms.block_mask(q.device))
    torch.testing.assert_close(flexible.double(), masked["output 0"], rtol=1e-4, atol=1e-5)


def test_a_cpu_times_every_size_once():
    op = replace(
        OPS[NAME], shapes={"a, 8 pairs": {"B": 8, "C": 3}, "a, 32 pairs": {"B": 32, "C": 3}, "b, 8 pairs": {"B": 8, "C": 4}}
    )
    op = replace(op, narrow={"B": 2})
    assert arms.sized(op, gpu=False) == {"a, cut to B=2": {"B": 2, "C": 3}, "b, cut to B=2": {"B": 2, "C": 4}}
    assert arms.sized(op, gpu=True) == op.shapes


def test_when_the_minutes_are_over_no_shape_is_begun(timed_alone, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main([*QUICK, "--minutes", "1e-9"]) == 0
    said = capsys.readouterr()
    assert "--minutes 1e-09 are over, 1 shape to go" in said.out and said.err == "0 shapes measured\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "attention"], "invalid choice: 'attention'"),
        (["--dtype", "fp16"], "--dtype"),
        (["--shapes", "d99"], "--shapes d99: in no shape's name"),
        (["--json", "no/such/rows.json"], "--json no/such/rows.json: no such folder"),
        (["--json", "pyproject.toml"], "holds no rows of this program"),
        (["--json", "kernels"], "--json kernels: a folder"),
        (["--json", "OTHER"], "OTHER holds no rows of this program"),
        (["--json", ""], "--json: an empty name"),
        (["--plot", ""], "--plot: an empty name"),
        (["--plot", "README.md"], "--plot README.md: no folder can be made there"),
        (["--plot", "README.md/plots"], "--plot README.md/plots: no folder can be made there"),
        (["--minutes", "0"], "--minutes: 0: a finite number above 0 is wanted"),
        (["--minutes", "nan"], "--minutes: nan: a finite"),
        (["--minutes", "inf"], "--minutes: inf: a finite"),
        (["--minutes", "soon"], "--minutes: soon: a finite"),
        (["--publish", "absent.json"], "--publish absent.json: no such file"),
        (["--publish", "kernels"], "kernels cannot be read (Is a directory)"),
        (["--publish", "rows.json", "--only", NAME, "--plot", "plots"], "leave --only, --plot away"),
        (["--publish", "rows.json", "--dtype", "bf16", "--base", "."], "leave --base, --dtype away"),
        (["--publish", "rows.json", "--shapes", "d16", "--json", "rows.json"], "leave --shapes, --json away"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(becomes.ROOT)
    monkeypatch.setattr(bench, "without_gpu", None)
    other = tmp_path / "OTHER"
    other.write_text('{"rows": [{"op": "one", "shape": "small"}]}')
    argv = [str(other) if word == "OTHER" else word for word in argv]
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("error", "status", "says"), [(KeyboardInterrupt, 130, "interrupted\n"), (BrokenPipeError, 141, "")])
def test_what_ends_the_program_from_outside_is_no_traceback(monkeypatch, capsys, tmp_path, error, status, says):
    def ends(names):
        # what is named twice is done once
        assert names == [NAME]
        raise error

    monkeypatch.setattr(bench, "without_gpu", ends)
    monkeypatch.setattr(bench.sys, "argv", ["bench", "--shapes", "img64", "--only", NAME, NAME])
    with (tmp_path / "out").open("w") as file, monkeypatch.context() as patch:
        patch.setattr(bench.sys, "stdout", file)
        assert bench.program() == status
    assert capsys.readouterr().err == says


def made_up(of=(), **changes):
    """A GPU's rows of two operations, the first of which wins; changes: of the rows that are as `of` says."""
    where = {"device": "GPU", "family": "sm_90", "driver": "1", "torch": "2", "triton": "3", "liger": "", "source": "here"}
    found = {"red": False, "why": "", "p20": 1.0, "p80": 3.0, "host_ms": 0.5, "floor_ms": 0.5}
    rows = []
    for op in ("first", "second"):
        for shape in ("small", "large"):
            for which in PASSES:
                for arm, ms in (("eager", 3.0), ("torch.compile", 2.0), ("ours/torch", 2.5), ("ours/triton", 1.0)):
                    row = {"op": op, "shape": shape, "dtype": "bf16", "arm": arm, "pass": which} | where | PEAKS | found
                    row["ms"] = ms if op == "first" else 4 - ms
                    rows.append(row | (changes if dict(of).items() <= row.items() else {}))
    return rows


MADE_UP = {name: replace(OPS[NAME], name=name, shapes={"small": {}, "large": {}}) for name in ("first", "second")}
SLOWER_THERE = {"op": "first", "shape": "large", "arm": "torch.compile", "pass": "forward+backward"}


@pytest.fixture
def two_operations(monkeypatch):
    monkeypatch.setattr(becomes, "OPS", MADE_UP)


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
        # of fp32 or of forward alone nothing is decided
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
        (made_up(source="before"), {}, "are of other code than this"),
        (made_up(SLOWER_THERE, red=True, why="output 0"), {}, "1 rows are red, first first at large: output 0"),
        (made_up(), {"status": "M kernels/op.py"}, "kernels/ is not what its commit says (M kernels/op.py)"),
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


def test_base_is_the_same_operation_of_another_checkout(tmp_path, capsys, monkeypatch, timed_alone):
    """Asked with the same arguments; the eager arms of both say how steady the machine was."""
    asked = []

    def there(command, cwd, **_):
        asked.append((cwd, command[command.index("--only") + 1 :]))
        file = command[command.index("--json") + 1]
        assert bench.main([*QUICK, "--json", file]) == 0
        slower = [row | {"ms": 2 * row["ms"]} for row in rows_in(Path(file))]
        Path(file).write_bytes(dump(slower))
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/bench.py").touch()
    here = bench.main
    monkeypatch.setattr(bench, "machine", lambda device: machine(device) | {"source": "here"})
    monkeypatch.setattr(bench.subprocess, "run", there)
    assert here([*QUICK, "--base", str(tmp_path)]) == 0
    assert asked == [(tmp_path, [NAME])]
    out = capsys.readouterr().out
    assert re.search(r"^\|.*\| ours/torch \|.*\n\|  \|  \| base \(control \d", out, re.M) and out.count("| base (control") == 1
    assert out.count("\n\ncontrol: time of the first arm in the base's run") == 1


def test_a_base_whose_first_arm_is_another_has_no_control(tmp_path, monkeypatch):
    mine = made_up()
    theirs = [row | {"arm": "plain"} if row["arm"] == "eager" else row for row in mine]

    def there(command, **_):
        Path(command[command.index("--json") + 1]).write_bytes(dump(theirs))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench.subprocess, "run", there)
    args = SimpleNamespace(base=tmp_path, dtype="bf16", shapes="", minutes=1, only=["first"])
    rows = bench.base_rows(args, mine)
    assert [row for row in rows if row["arm"] != "base"] == mine and len(rows) == len(mine) + 8
    for ours, base in pairwise(rows):
        if base["arm"] == "base":
            same = ("op", "shape", "pass")
            assert ours["arm"] == "ours/triton" and [ours[key] for key in same] == [base[key] for key in same]
            assert math.isnan(base["control"])


def test_more_than_the_floor_and_no_time_are_said(tmp_path):
    slow = made_up({"arm": "ours/triton", "op": "first"}, floor_ms=2.0)
    table = tables(slow)
    assert table.count("| > 100 % |") == 4 and "200 %" not in table
    assert table.count("\n\n> 100 %: the machine was slower") == 1 and "> 100 %" not in tables(made_up())
    rows = made_up({"arm": "eager", "shape": "large"}, why="OutOfMemoryError: tried to allocate", family="cpu")
    assert plot(rows, tmp_path) == ["roofline.png", "bars-first.png", "bars-second.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars-first.png", "bars-second.png", "roofline.png"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_wrong_at_the_sizes_of_the_tests_stops_the_bench(monkeypatch, dtype):
    """On a GPU; here the same look at the torch path."""
    right = OPS[NAME]
    assert bench.wrong_when_tiny(right, CPU) == ""

    def wrong(raw_RCHW, **inputs):
        return right.run(raw_RCHW=raw_RCHW, **inputs) * (2 if raw_RCHW.dtype == DTYPES[dtype] else 1)

    says = bench.wrong_when_tiny(replace(right, run=wrong), CPU)
    assert says.startswith(f"ours/torch: pairs, {dtype}: output 0 is 1 off")
    rows = bench.measure(right, right.tiny["pairs"], torch.float32, CPU, PEAKS, says)
    assert {row["arm"] for row in rows if row["red"]} == {"ours/torch"} and all(row["why"] == says for row in rows)


def test_ours_is_nearer_to_the_first_arm_than_others_must_be(monkeypatch):
    """A percent off at full size."""
    right = OPS[NAME]
    skewed = Arm(lambda **inputs: right.run(**inputs) * 1.01, compiled=True)
    monkeypatch.setattr(bench, "arms", lambda op, gpu: {"eager": Arm(right.definition), "theirs": skewed, "ours/torch": skewed})
    rows = bench.measure(right, right.tiny["pairs"], torch.float32, CPU, PEAKS)
    assert {row["arm"]: (row["why"], row["red"]) for row in rows} == {
        "eager": ("", False),
        "theirs": ("", False),
        "ours/torch": ("a result is 0.01 from the first arm's", True),
    }


def test_a_base_that_is_no_checkout_is_refused(tmp_path, capsys, timed_alone):
    with pytest.raises(SystemExit) as stop:
        bench.main([*QUICK, "--base", str(tmp_path)])
    assert stop.value.code == 2 and "no checkout of this project" in capsys.readouterr().err
