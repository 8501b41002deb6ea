"""The dial and guides, by the commands: trained, sampled, converted; and what they refuse."""

import json

import pytest
import torch

import mclr
from mclr.train.cli import main
from mclr.train.weights.folder import load_net, read_config

FEW = ["train.images=16", "train.batch=8", "train.checkpoint_every=16"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, digits):
    """command(*words): run `mclr words` in an empty folder; its exit status and what it printed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main([str(word) for word in words])
        found = capsys.readouterr()
        return status, found.out + found.err

    return run


@pytest.mark.parametrize("model", ["edm2-digits", "sit-digits", "var-digits"])
def test_a_dial_from_training_to_published_names(model, command, tmp_path):
    train = ["train", "--model", model, "--objective", "mclr", "--out", "run", "model.strength.max=2.0", *FEW]
    status, said = command(*train)
    assert status == 0 and "lam 0 to 2, drawn for every sample" in said
    config = read_config(tmp_path / "run/weights")
    assert (
        config["config"]["strength_max"] == 2.0
        and "strengths 0 to 2, as sample.strength" in (tmp_path / "run/weights/README.md").read_text()
    )
    # from the run, and from its weights alone, which remember their dial
    said = command("sample", "run", "--out", "b", "model.strength.max=5.0", "sample.strength=3.0")[1]
    assert "model.strength.max=5, but the weights run/weights have a dial from 0 to 2: leave that setting out" in said
    status, said = command("sample", "run", "--out", "a", "--count", 4, "sample.strength=1.5")
    assert status == 0 and "no guidance, strength 1.5" in said
    assert json.loads((tmp_path / "a/sample.json").read_text())["settings"]["sample.strength"] == 1.5
    assert command("sample", "run/weights", "--model", model, "--out", "a", "--count", 8, "sample.strength=1.5")[0] == 0
    assert "holds images of sample.strength=1.5" in command("sample", "run", "--out", "a", "--count", 8)[1]
    found = mclr.load("run/weights", device="cpu", model=model)
    assert torch.equal(found.sample([3], seed=1, strength=0), found.sample([3], seed=1))
    for strength, why in (
        (-1, "must be >= 0"),
        (2.5, "the dial of the network goes from 0 to 2"),
        (float("nan"), "must be >= 0"),
    ):
        with pytest.raises(ValueError, match=f"strength={strength} is out of range: {why}"):
            found.sample([3], strength=strength)
    with pytest.raises(ValueError, match="the network has no dial"):
        mclr.load(model, device="cpu").sample([3], strength=0.5)

    for other in (model, "digits-tokenizer"):
        assert "these weights have no dial" in command("convert", other, "none", "--strength", 1)[1]
    status, said = command("convert", "run", "plain.safetensors", "--strength", 1.5)
    if model == "edm2-digits":
        assert status == 2 and "the dial of an EDM2 cannot be folded" in said and not (tmp_path / "plain.safetensors").exists()
        return
    assert status == 0 and "published names" in said
    assert command("convert", "run", "folded", "--strength", 1.5)[0] == 0
    assert read_config(tmp_path / "folded")["strength"] == 1.5 and load_net("folded").config.strength_max == 0
    form = ["form=flow_to_data"] if model == "sit-digits" else []
    assert command("convert", "plain.safetensors", "back", *form)[0] == 0
    back, folded = load_net("back").state_dict(), load_net("folded").state_dict()
    assert back.keys() == folded.keys() and all(torch.equal(back[name], folded[name]) for name in back)


REFUSED = {
    "lam and a dial": (
        ["model.strength.max=2.0", "objective.lam=1.0"],
        "objective.lam=1.0 and model.strength.max=2.0: give one of them",
    ),
    "a dial of mle": (["--objective", "mle", "model.strength.max=2.0"], "model.strength.max=2.0 needs objective.name=mclr"),
    "a window": (
        ["model.strength.max=2.0", "objective.schedule.kind=negative_window", "objective.schedule.below=0.5"],
        "needs another objective.schedule.kind than negative_window",
    ),
    "a strength without a dial": (["sample.strength=1.0"], "sample.strength=1.0 needs a dial, and edm2-digits has none"),
    "a strength beyond": (["model.strength.max=2.0", "sample.strength=3.0"], "the dial of edm2-digits goes from 0 to 2.0"),
    "no number": (["model.strength.max=.nan"], "model.strength.max=NaN: expected a finite number"),
    "a guide for nothing": (
        ["objective.guide.weights=edm2-digits"],
        "objective.guide.weights=edm2-digits needs objective.contrast=null",
    ),
    "a condition for nothing": (
        ["objective.guide.condition=null"],
        "objective.guide.condition=null needs objective.guide.weights",
    ),
    "a guide of another form": (
        ["objective.contrast=null", "objective.guide.weights=sit-digits"],
        "objective.guide.weights=sit-digits has form flow_to_data, the model has edm",
    ),
    "a guide of tokens": (
        ["objective.contrast=null", "objective.guide.weights=var-digits"],
        "hold a network of kind var, not edm2 or dit",
    ),
    "a guide that is not there": (["objective.contrast=null", "objective.guide.weights=gone"], "no weights at gone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_one_line(case, command, tmp_path):
    words, message = REFUSED[case]
    for more in ([], ["--dry-run"]):
        status, said = command("train", "--model", "edm2-digits", "--out", "run", *FEW, *words, *more)
        assert status == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["edm2-digits", "sit-digits", "var-digits"])
def test_another_network_guides_training(model, command, tmp_path):
    """The guide is asked under the sample's condition, then under its null condition; in fp32, then in bf16. The run counts its cost."""
    assert command("train", "--model", model, "--objective", "mle", "--out", "weak", *FEW)[0] == 0
    for condition, precision in (("own", "fp32"), ("null", "bf16")):
        guide = [
            "objective.contrast=null",
            "objective.guide.weights=weak",
            f"objective.guide.condition={condition}",
            "train.seed=3",
        ]
        guide += [f"engine.precision={precision}", "train.log_every=1", "train.keep_best=true"]
        status, said = command("train", "--model", model, "--out", condition, *FEW, *guide)
        assert status == 0 and f"guide      weak, under {'each' if condition == 'own' else 'the null'} condition" in said
    assert command("train", "--model", model, "--out", "itself", *FEW, "objective.contrast=null", "train.seed=3")[0] == 0
    weak, own, null, itself = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("weak", "own", "null", "itself")
    )
    assert len({each["loss"] for each in (own, null, itself)}) == 3
    # a guide of the same size costs what the null condition costs
    assert own["flops"] == null["flops"] == itself["flops"] > weak["flops"]


def test_a_guide_of_other_classes_must_be_asked_without_one(command, tmp_path):
    assert command("train", "--model", "edm2-digits", "--objective", "mle", "--out", "weak", *FEW)[0] == 0
    path = tmp_path / "weak/weights/config.json"
    described = json.loads(path.read_text())
    described["classes"][2] = "cat"
    path.write_text(json.dumps(described))
    guide = ["objective.contrast=null", "objective.guide.weights=weak"]
    status, said = command("train", "--model", "edm2-digits", "--out", "run", *FEW, *guide)
    assert (
        status == 2 and "objective.guide.weights=weak was trained on other classes: condition 2 is cat there and 2 here" in said
    )
    assert command("train", "--model", "edm2-digits", "--out", "run", *FEW, *guide, "objective.guide.condition=null")[0] == 0
    drawn = ["sample", "run", "--out", "s", "--count", 4, "sample.gamma=1.0", "sample.guide.weights=weak"]
    assert "condition 2 is cat there and 2 here" in command(*drawn)[1]
    status, said = command(*drawn, "sample.guide.condition=null")
    assert status == 0 and "guidance 1 by weak/weights under its null condition" in said
