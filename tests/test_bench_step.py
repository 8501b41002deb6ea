"""train/bench_step.py: every arm takes its turns, and its work is what its rows say."""

import pytest
from ranks import tiny

import train.bench_step
from train.cli import run


@pytest.mark.parametrize("model", ["edm2-digits", "var-digits"])
def test_the_table_says_what_each_objective_costs(model, digits, tokenizer, capsys, tmp_path, monkeypatch):
    settings = [pair for pair in tiny(model, tokenizer) if not pair.startswith("objective.")]
    # so small a share drops none of these samples
    settings += [f"data.path={digits}", "train.batch=32", "train.drop_condition=1e-9", "model.weights=null"]
    # without weights there is no reference to start from
    monkeypatch.setattr(train.bench_step, "ARMS", {arm: of for arm, of in train.bench_step.ARMS.items() if arm != "cca"})
    found = train.bench_step.measure(model, 1, settings)
    assert found.keys() == train.bench_step.ARMS.keys()
    assert found["mle"]["work"] == 1 and found["mclr uniform"]["work"] == 2
    # the first two scales are 5 of the 21 tokens of a contrast row; of the noise levels chance decides
    cut = found["mclr uniform, progress <= 0.5"]["work"]
    assert cut == pytest.approx(1 + 5 / 21) if model == "var-digits" else 1 < cut < 2
    # the ramp is 0 at the first scale alone
    assert found["mclr null"]["work"] == pytest.approx(4 / 3)
    assert all(0 < times["fastest"] <= times["median"] <= times["slowest"] for times in found.values())
    assert run(train.bench_step.main, ["--model", model, "--rounds", "1", *settings]) == 0
    out = capsys.readouterr().out
    assert all(f"| {arm} |" in out for arm in train.bench_step.ARMS) and "| mle |" in out and "1.00" in out
    assert ("| sigma from |" in out) == (model == "edm2-digits")


def test_contrast_rows_are_computed_where_the_noise_hides_the_class(digits, monkeypatch):
    task, batch, _ = train.bench_step.build("edm2-digits", "mclr posterior", [f"data.path={digits}", "train.drop_condition=0.0"])
    bands = train.bench_step.computed_shares(task, batch, batches=4)
    assert [low for low, _, _ in bands] == list(train.bench_step.BANDS)
    assert sum(share for _, share, _ in bands) == pytest.approx(1)
    assert bands[0][2] < 0.05 and bands[-1][2] > 0.7


@pytest.mark.parametrize(("argv", "says"), [(["--rounds", "0"], "--rounds 0"), (["--model", "edm2"], "unknown model edm2")])
def test_bad_arguments_are_one_line(argv, says, capsys):
    assert run(train.bench_step.main, argv) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
