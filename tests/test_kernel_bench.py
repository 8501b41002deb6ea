"""kernels/bench.py: rows that can be gone on with, no time for what is wrong, and a list of winners that nothing else decides."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from kernels import bench
from kernels.op import Cost, Op, results
from kernels.registry import OPS

NAME = "denoising_value"
QUICK = ["--only", NAME, "--shapes", "img64", "--rounds", "3"]
BOTH = {(arm, which) for arm in ("eager", "ours/torch") for which in bench.PASSES}


@pytest.fixture
def unchecked(monkeypatch):
    """The checks in the interpreter and the compiler take seconds; one test runs them."""
    monkeypatch.setattr(bench, "interpreted", lambda names: True)
    monkeypatch.setattr(bench, "compiled", lambda names: True)


def rows_in(path):
    return json.loads(path.read_text())["rows"]


def test_a_run_without_a_gpu_says_so_checks_and_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    file, plots = tmp_path / "rows.json", tmp_path / "plots"
    assert bench.main([*QUICK, "--json", str(file), "--plot", str(plots)]) == 0
    out = capsys.readouterr().out
    assert "No GPU" in out.splitlines()[0] and "sm_90" in out
    assert all(line.count(f"| {NAME} |") <= 1 for line in out.splitlines()) and out.count(f"| {NAME} |") == 2
    rows = rows_in(file)
    assert {(row["arm"], row["pass"]) for row in rows} == BOTH and len(rows) == 4
    for row in rows:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["family"] == "cpu" and not row["red"]
        assert row["gbs"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["gbs"] / row["copy_gbs"])
        assert row["relative"] < 1e-5 and row["peak_bytes"] is None
    assert all(row["apart"] < 1e-4 for row in rows if row["arm"] == "ours/torch")
    for name in ("roofline.png", f"bars-{NAME}.png"):
        assert (plots / name).read_bytes().startswith(b"\x89PNG") and (plots / name).stat().st_size > 5000

    monkeypatch.setattr(bench, "interpreted", lambda names: True)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", None)
        before = file.read_bytes()
        assert bench.main([*QUICK, "--no-compile", "--json", str(file)]) == 0
        said = capsys.readouterr()
        assert file.read_bytes() == before and "0 shapes measured, 1 were there" in said.err
        assert all(f"{row['ms']:.3g} ({row['p20']:.3g}" in said.out for row in rows)
    # other code is another measurement; the old rows stay
    monkeypatch.setattr(bench, "source", lambda: "other")
    assert bench.main([*QUICK, "--no-compile", "--json", str(file)]) == 0
    assert [row["source"] == "other" for row in rows_in(file)] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("factor", [1 + 1e-4, torch.nan])
def test_a_red_operation_prints_no_time(unchecked, tmp_path, capsys, monkeypatch, factor):
    file, right = tmp_path / "rows.json", OPS[NAME]
    monkeypatch.setitem(bench.OPS, NAME, replace(right, run=lambda **inputs: right.run(**inputs) * factor))
    assert bench.main([*QUICK, "--json", str(file)]) == 1
    rows = rows_in(file)
    assert {(row["arm"], row["pass"]) for row in rows} == BOTH and not any("ms" in row for row in rows)
    assert {row["arm"] for row in rows if row["red"]} == {"ours/torch"}
    out = capsys.readouterr().out
    assert "RED: ours/torch: output 0 is" in out and "–" not in out.split("ours/torch |")[1]


def test_an_arm_that_computes_something_else_or_fails_has_a_reason_and_no_time(unchecked, capsys, monkeypatch):
    def fails(**inputs):
        raise RuntimeError("not this\nshape")

    arms = {
        "eager": bench.Arm(OPS[NAME].reference),
        "half": bench.Arm(lambda **inputs: OPS[NAME].reference(**inputs) / 2, compiled=True),
        "fails": bench.Arm(fails),
        "absent": None,
        "ours/torch": bench.Arm(OPS[NAME].run),
    }
    monkeypatch.setattr(bench, "arms", lambda op, gpu: arms)
    assert bench.main(QUICK) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| edm2")]
    says = {"half": "a result is 0.5 from the first arm's", "fails": "RuntimeError: not this shape", "absent": "not installed"}
    for arm in arms:
        (line,) = (line for line in lines if f"| {arm} |" in line)
        assert says.get(arm, "–") in line and (arm in says) == ("–" not in line), line


def test_an_operation_without_gradients_is_timed_forward():
    op = Op(
        name="double",
        run=lambda x: 2 * x,
        reference=lambda x: x + x,
        draw=lambda shape, dtype, generator: {"x": torch.randn(shape["N"], generator=generator).to(dtype)},
        shapes={"some": {"N": 8}},
        tiny={},
        cost=lambda shape, dtype: Cost(2 * shape["N"] * dtype.itemsize, 0),
    )
    rows = bench.measure(op, {"N": 8}, torch.float32, torch.device("cpu"), 3, {"copy_gbs": 1.0, "product_tflops": 1.0})
    assert [(row["arm"], row["pass"], row["why"]) for row in rows] == [(arm, "forward", "") for arm in ("eager", "ours/torch")]


def test_what_others_would_run_is_the_definition(monkeypatch):
    op = OPS["token_logp"]
    monkeypatch.setattr(bench, "CHUNK", 4)
    inputs = op.draw({"B": 2, "R": 3, "L": 5, "D": 6, "V": 7}, torch.float32, torch.Generator().manual_seed(0))
    true = results(op.reference, inputs)
    for form in (bench.chunked, bench.autocast(op.reference)):
        for name, found in results(form, inputs).items():
            torch.testing.assert_close(found, true[name], rtol=1e-4, atol=1e-5)
    # half activations beside an fp32 weight, as drawn
    half = op.draw({"B": 2, "R": 3, "L": 5, "D": 6, "V": 7}, torch.bfloat16, torch.Generator().manual_seed(0))
    for form in (bench.chunked, bench.autocast(op.reference)):
        for name, found in results(form, half).items():
            assert (found - true[name]).norm() < 0.05 * true[name].norm(), name


def test_what_is_not_installed_is_an_arm_without_a_call(monkeypatch):
    monkeypatch.setattr(bench, "triton", None)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    found = bench.arms(OPS["token_logp"], gpu=True)
    assert [name for name, arm in found.items() if arm is None] == ["Liger", "ours/triton"]
    assert list(found)[:2] == ["eager", "torch.compile"] and set(bench.arms(OPS["token_logp"], gpu=False)) == {
        "eager",
        "ours/torch",
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_over_scales_is_the_same_in_every_form():
    op = bench.COMPARISONS["scale_attention"]
    inputs = op.draw({"R": 1, "H": 1}, torch.float32, torch.Generator().manual_seed(0))
    mask = bench.mask_LL(torch.device("cpu"))
    assert mask.shape == (680, 680) and mask[0].sum() == 1 and mask[1].sum() == 5 and mask[-1].all()
    assert op.cost({"R": 1, "H": 1}, torch.float32).forward_flops == 4 * 64 * mask.sum()
    masked, prefix = (results(form, inputs) for form in (bench.masked_attention, bench.prefix_attention))
    for name, true in masked.items():
        torch.testing.assert_close(prefix[name], true, rtol=1e-4, atol=1e-5)
    q, k, v = (t.detach() for t in inputs.values())
    flexible = flex_attention(q, k, v, block_mask=bench.block_mask(q.device))
    torch.testing.assert_close(flexible.double(), masked["output 0"], rtol=1e-4, atol=1e-5)


def test_when_the_minutes_are_over_no_shape_is_begun(unchecked, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main([*QUICK, "--minutes", "0"]) == 0
    assert "1 shapes are left, since 0 minutes are over" in capsys.readouterr().out


def test_another_checkout_is_an_arm(unchecked, tmp_path):
    base, file = tmp_path / "base", tmp_path / "rows.json"
    shutil.copytree(bench.ROOT / "kernels", base / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with open(base / "kernels" / "op.py", "a") as op:
        op.write("# another state\n")
    args = bench.arguments([*QUICK, "--json", str(file), "--base", str(base)], gpu=False)[1]
    mine = bench.measure_all([(OPS[NAME], *next(iter(bench.sized(OPS[NAME], False).items())))], args, torch.device("cpu"), 1e9)
    rows = bench.base_rows(args, Path(f"{file}.base"), mine)
    assert [(row["arm"], row["pass"]) for row in rows] == [("base", which) for which in bench.PASSES]
    assert all(row["ms"] > 0 and row["control"] > 0 and row["source"] != bench.source() for row in rows)
    assert "| base, control " in bench.tables([*mine, *rows])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "attention"], "invalid choice: 'attention'"),
        (["--rounds", "2"], "--rounds 2: at least 3"),
        (["--dtype", "fp16"], "--dtype"),
        (["--shapes", "d99"], "--shapes d99: in no shape's name"),
        (["--json", "no/such/rows.json"], "--json no/such/rows.json: no such folder"),
        (["--json", "pyproject.toml"], "holds no rows of this program"),
        (["--base", "tests"], "--base tests: no kernels/bench.py there"),
        (["--plot", "README.md"], "--plot README.md: a file"),
        (["--publish"], "--publish needs --json FILE"),
    ],
)
def test_bad_arguments_are_one_line(unchecked, argv, says, capsys, monkeypatch):
    monkeypatch.chdir(bench.ROOT)
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and len(err.splitlines()) == 1


def made_up(**changes):
    """A GPU's rows of two operations, the first of which wins; changes: of those whose arm, shape or device is named in `of`."""
    of = changes.pop("of", {})
    rows = []
    for op in ("first", "second"):
        for shape in ("small", "large"):
            for which in bench.PASSES:
                for arm, ms in (("eager", 3.0), ("torch.compile", 2.0), ("ours/torch", 2.5), ("ours/triton", 1.0)):
                    row = {
                        "op": op,
                        "shape": shape,
                        "sizes": {},
                        "dtype": "bf16",
                        "arm": arm,
                        "pass": which,
                        "red": False,
                        "why": "",
                    }
                    row |= {"device": "GPU", "family": "sm_90", "driver": "1", "torch": "2", "triton": "3", "threads": 1}
                    row |= {"rounds": 20, "source": "here", "copy_gbs": 4000.0, "product_tflops": 700.0, "flops": 0}
                    row |= {
                        "ms": ms if op == "first" else 4 - ms,
                        "p20": 1.0,
                        "p80": 3.0,
                        "host_ms": 0.5,
                        "of_copy": 0.5,
                        "of_product": 0.0,
                    }
                    rows.append(row | (changes if all(row[name] == value for name, value in of.items()) else {}))
    return rows


MADE_UP = {name: replace(OPS[NAME], name=name, shapes={"small": {}, "large": {}}) for name in ("first", "second")}
SLOWER_THERE = {"op": "first", "shape": "large", "arm": "torch.compile", "pass": "forward+backward"}


@pytest.mark.parametrize(
    ("rows", "won"),
    [
        (made_up(), {"sm_90": ["first"]}),
        (made_up(of=SLOWER_THERE, ms=0.9), {}),
        # a tie is no win, and neither is a shape without our time or without another's
        (made_up(of=SLOWER_THERE, ms=1.0), {}),
        (made_up(of=SLOWER_THERE | {"arm": "ours/triton"}, why="out of memory"), {}),
        ([row for row in made_up() if row["shape"] == "small"], {}),
        ([row for row in made_up() if row["arm"] == "ours/triton"], {}),
        # of fp32, of forward alone, of the kernels before, nothing is decided
        (made_up(of=SLOWER_THERE, ms=0.9, dtype="fp32"), {"sm_90": ["first"]}),
        (made_up(of=SLOWER_THERE | {"pass": "forward"}, ms=0.9), {"sm_90": ["first"]}),
        (made_up(of=SLOWER_THERE, ms=0.9, arm="base"), {"sm_90": ["first"]}),
        ([row for row in made_up() if row["pass"] == "forward"], {"sm_90": ["first"]}),
        # every GPU of a family has to agree; another family decides for itself
        (made_up() + [row | {"device": "slow"} for row in made_up(of=SLOWER_THERE, ms=0.9)], {}),
        (
            made_up() + [row | {"device": "old", "family": "sm_80"} for row in made_up(of=SLOWER_THERE, ms=0.9)],
            {"sm_90": ["first"]},
        ),
    ],
)
def test_an_operation_wins_where_nothing_else_is_faster_anywhere(rows, won):
    assert bench.winners(rows, MADE_UP) == won


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A copy of kernels/RESULTS.* that --publish writes to, in a tree that is a commit."""
    for kind in ("json", "md"):
        shutil.copy(bench.RESULTS.with_suffix(f".{kind}"), tmp_path)
    answers = {"rev-parse": "c0ffee", "status": "", "ls-files": ""}
    monkeypatch.setattr(bench, "said", lambda *command: answers[command[1]])
    monkeypatch.setattr(bench, "source", lambda: "here")
    monkeypatch.setattr(bench, "OPS", MADE_UP)
    monkeypatch.setattr(bench.winners, "__defaults__", (MADE_UP,))
    monkeypatch.setattr(bench.publish, "__defaults__", (tmp_path / "RESULTS.json",))
    return tmp_path, answers


def test_publishing_replaces_what_the_same_gpu_said(published):
    folder, _ = published
    file, before = folder / "rows.json", (folder / "RESULTS.md").read_text()
    for device, ms in (("old", 1.0), ("GPU", 5.0), ("GPU", 1.0)):
        rows = [row | {"device": device} for row in made_up(of=SLOWER_THERE | {"arm": "ours/triton"}, ms=ms)]
        file.write_bytes(bench.dump([*rows, rows[0] | {"family": "cpu"}, rows[0] | {"arm": "base"}]))
        assert bench.main(["--json", str(file), "--publish"]) == 0
        done = json.loads((folder / "RESULTS.json").read_text())
        assert done["winners"] == ({} if ms == 5.0 else {"sm_90": ["first"]})
    assert list(done) == ["winners", "rows"] and len(done["rows"]) == 64
    assert all(row["commit"] == "c0ffee" and row["family"] == "sm_90" and row["arm"] != "base" for row in done["rows"])
    page = (folder / "RESULTS.md").read_text()
    assert page.count("### GPU (sm_90)") == page.count("### old (sm_90)") == 1 and "on sm_90 first." in page and "c0ffee" in page
    # the other sections stay as they are
    outside = [re.sub(r"(?ms)^## GPU$.*?^## ", "", text) for text in (before, page)]
    assert outside[0] == outside[1] and len(outside[0]) < len(before)


@pytest.mark.parametrize(
    ("rows", "answer", "says"),
    [
        ([row | {"family": "cpu"} for row in made_up()], {}, "holds no rows of a GPU"),
        ([], {}, "holds no rows of a GPU"),
        (made_up(source="before"), {}, "are of other code than this"),
        (made_up(of=SLOWER_THERE, red=True, why="output 0"), {}, "1 rows are red, first first at large: output 0"),
        (made_up(), {"status": "M kernels/op.py"}, "the tree is not what its commit says (M kernels/op.py)"),
        (made_up(), {"ls-files": "kernels/new.py"}, "the tree is not what its commit says (kernels/new.py)"),
        (made_up(), {"rev-parse": ""}, "no git here"),
    ],
)
def test_what_is_not_published(published, capsys, rows, answer, says):
    folder, answers = published
    answers.update(answer)
    file, before = folder / "rows.json", (folder / "RESULTS.json").read_bytes()
    file.write_bytes(bench.dump(rows))
    with pytest.raises(SystemExit) as exit:
        bench.main(["--json", str(file), "--publish"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and len(err.splitlines()) == 1
    assert (folder / "RESULTS.json").read_bytes() == before
