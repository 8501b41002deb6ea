"""cc_dpo, cca, ddo and unlearn from the command line, beside a frozen reference: rounds, resumes, equal compute, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import tiny
from runs import BATCH, MODELS, metrics
from safetensors.torch import load_file

import mclr.loss
from mclr.train.cli import main
from mclr.train.data.dataset import load_split, open_dataset


@pytest.fixture
def fine_tune(digits, tokenizer, tmp_path, monkeypatch):
    """fine_tune(model, objective, *overrides) -> (status, run folder), from weights trained for one step."""
    monkeypatch.chdir(tmp_path)

    def fine_tune(model, objective, *overrides, out="run", weights="base/weights", images=3 * BATCH):
        argv = ["train", "--model", model, "--objective", objective, "--data", str(digits), "--engine", "local", "--out", out]
        settings = [pair for pair in tiny(model, tokenizer) if not pair.startswith("objective.")]
        settings += [f"train.batch={BATCH}", f"train.images={images}", "train.log_every=1", "train.lr=0.01"]
        return main([*argv, *settings, f"model.weights={weights}", *overrides]), tmp_path / out

    for model in MODELS:
        assert fine_tune(model, "mle", out=f"{model}-base", weights="null", images=BATCH)[0] == 0
    return lambda model, *more, **named: fine_tune(model, *more, **{"weights": f"{model}-base/weights"} | named)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_goes_on_with_the_reference_it_began_with(model, fine_tune):
    """The reference is not part of a checkpoint: it is where the run began, not where it stopped."""
    status, whole = fine_tune(model, "cca", out="whole")
    assert status == 0
    assert fine_tune(model, "cca", images=BATCH)[0] == 0
    status, run = fine_tune(model, "cca")
    assert status == 0 and metrics(run) == metrics(whole)
    here, there = (load_file(folder / "weights" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(here[name], there[name]) for name in here)
    # at the first step network and reference are the same, but for the dropped conditions' plain mle; later they are not
    first, *_, last = metrics(run)
    assert first["delta"] == 0 != last["delta"]
    # every row once more through the reference, at a third of the cost of a row that is trained
    assert last["mle_images"] == pytest.approx(last["rows"] * 4 / 3, abs=1)


@pytest.mark.parametrize("model", MODELS)
def test_a_ddo_round_from_samples_to_weights(model, fine_tune, capsys):
    assert fine_tune(model, "mle", out="zero", images=BATCH)[0] == 0
    draw = ["sample", "zero", "--out", "drawn", "--count", "12", "--dataset", "sample.batch=4"]
    assert main(draw) == 0 and main([*draw, "--count", "20"]) == 0 and main([*draw, "--count", "20"]) == 0
    info = open_dataset("drawn/dataset")
    assert (info.splits["train"].count, info.num_classes, info.splits["val"].count) == (20, 10, 0)
    images, c_N = load_split("drawn/dataset", "train")
    assert c_N.tolist() == [*range(10), *range(10)] and len(images.unique()) > 10
    status, run = fine_tune(model, "ddo", "objective.generated=drawn/dataset", "train.drop_condition=0.0", weights="zero/weights")
    assert status == 0
    # one generated row beside every real one
    assert metrics(run)[-1]["rows"] == 2 * 3 * BATCH


def test_drawn_tokens_are_trained_on_as_they_were_drawn(fine_tune, monkeypatch, capsys):
    """Decoded, rounded to 8 bits and encoded again, most of them would be others."""
    draw = ["sample", "var-digits-base", "--out", "drawn", "--count", "10", "sample.batch=4"]
    # images drawn before their tokens were asked for are drawn again, alike
    assert main(draw) == 0
    before = {path.name: path.read_bytes() for path in Path("drawn/images").iterdir()}
    assert main([*draw, "--dataset"]) == 0
    assert before == {path.name: path.read_bytes() for path in Path("drawn/images").iterdir()}
    tokens_NL = torch.stack([torch.from_numpy(np.load(path)) for path in sorted(Path("drawn/tokens").iterdir())])
    seen = []
    real = mclr.loss.score

    def score(paradigm, net, probe, *rest):
        seen.append(probe.inputs["tokens"][4:])
        return real(paradigm, net, probe, *rest)

    monkeypatch.setattr(mclr.loss, "score", score)
    more = ("objective.generated=drawn/dataset", "train.micro_batch=4", "train.batch=4")
    assert fine_tune("var-digits", "ddo", *more, images=4)[0] == 0
    (seen_BL,) = seen
    assert seen_BL.unique(dim=0).shape == seen_BL.shape
    assert all((row == tokens_NL).all(1).any() for row in seen_BL)
    # another model takes the images, and reads no tokens
    monkeypatch.setattr(mclr.loss, "score", real)
    Path("drawn/dataset/tokens.npy").write_bytes(b"other")
    assert fine_tune("edm2-digits", "mle", "data.path=drawn/dataset", out="pixels", weights="null", images=8)[0] == 0
    capsys.readouterr()
    assert fine_tune("var-digits", "ddo", *more, out="again", images=4)[0] == 2
    assert "tokens.npy is not what was drawn" in capsys.readouterr().err


def test_generated_samples_keep_their_condition_and_their_place(fine_tune, monkeypatch):
    """Real and generated samples in turn, whatever the micro-batch; a dropped condition leaves its generated one alone."""
    seen = []
    real = mclr.loss.score

    def score(paradigm, net, probe, rows, reference, *more):
        seen.append((rows.index_R, rows.c_R, paradigm.null))
        return real(paradigm, net, probe, rows, reference)

    monkeypatch.setattr(mclr.loss, "score", score)
    assert main(["sample", "edm2-digits-base", "--out", "drawn", "--count", "10", "--dataset", "sample.batch=4"]) == 0
    more = ("objective.generated=drawn/dataset", "train.drop_condition=0.5", "train.micro_batch=4")
    assert fine_tune("edm2-digits", "ddo", *more, images=BATCH)[0] == 0
    assert len(seen) == 2
    for index_R, c_R, null in seen:
        assert index_R[:4].tolist() == [0, 1, 2, 3]
        # a sample whose condition was dropped has no partner
        assert index_R[4:].tolist() == [4 + b for b in range(4) if c_R[b] != null]
    drawn = torch.cat([c_R[4:] for _, c_R, _ in seen])
    assert 0 < len(drawn) < BATCH and drawn.lt(10).all() and len(drawn.unique()) == len(drawn)  # no sample twice in an epoch


@pytest.mark.parametrize("objective", ["unlearn", "cc_dpo", "mclr"])
def test_equal_compute_ends_a_run(objective, fine_tune, capsys):
    """At the first step that reaches it; the finished run says so when it is started again."""
    status, run = fine_tune("edm2-digits", objective, "train.mle_images=40", images=1000)
    assert status == 0
    *_, before, last = (line["mle_images"] for line in metrics(run))
    assert before < 40 <= last
    assert fine_tune("edm2-digits", objective, "train.mle_images=40", images=1000)[0] == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("finished already")


def test_bad_generated_samples_are_one_line(fine_tune, capsys, digits):
    draw = ["--count", "4", "--dataset", "sample.batch=4", "--out"]
    assert fine_tune("edm2-digits", "mle", out="other", images=BATCH)[0] == 0
    assert main(["sample", "other", *draw, "others"]) == 0
    assert main(["sample", "edm2-digits-base", *draw, "guided", "sample.gamma=0.5"]) == 0
    for path, says in (
        ("missing", "no dataset folder at missing"),
        (str(digits / "train"), "holds no dataset.json"),
        (str(digits), "does not say what drew it"),
        ("others/dataset", "was drawn from other weights than model.weights=edm2-digits-base/weights"),
        ("guided/dataset", "was drawn with guidance"),
    ):
        capsys.readouterr()
        assert fine_tune("edm2-digits", "ddo", f"objective.generated={path}")[0] == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line and not Path("run").exists()
