"""train/weights/model_card.py: front matter that the hub reads, and the facts of config.json and of an evaluation in words."""

import json

import pytest
import torch
import yaml

from mclr.errors import UserError
from mclr.models.features import ImageClassifier, ImageClassifierConfig
from mclr.models.vqvae import VQVAE, VQVAEConfig
from mclr.train.weights.folder import read_config, save_weights
from mclr.train.weights.model_card import add_scores, card

RUN = {
    "kind": "edm2",
    "config": {"img_resolution": 64, "num_classes": 3, "channel_mult": [1, 2]},
    "parameters": 1_234_567,
    "init": "hf://org/repo/net.pkl@v1",
    "command": "mclr train --model edm2-img64-s",
    "model": "edm2-img64-s",
    "objective": {"name": "mclr", "contrast": "posterior", "lam": 0.4, "schedule": {"kind": "ramp"}},
    "ema_std": 0.1,
    "data": "pets",
    "data_images": 1500,
    "classes": ["cat", "dog", "fish"],
    "images_seen": 2_000_000,
    "licence": "published EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use",
}
RESULT = {
    "scores": {"accuracy": 0.98765, "fd": 0.0423},
    "samples": {"path": "runs/a/samples", "count": 50000, "made": {"sample.gamma": 0.0}},
    "real": {"data": "pets", "path": "data/pets", "splits": ["train", "val"], "count": 1797, "neighbours": 1797},
    "judge": {"name": "pets-classifier", "sha256": "0123456789abcdef" * 4, "features": "penultimate layer"},
    "icr": {"icr": 0.5, "sigma": 1.0},
}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_is_described():
    text = card(RUN)
    assert front_matter(text) == {
        "license": "cc-by-nc-sa-4.0",
        "library_name": "mclr",
        "tags": ["mclr", "edm2", "image-generation"],
        "base_model": "org/repo",
    }
    for fact in (
        "# edm2-img64-s-mclr-pets\n",
        "An EDM2 diffusion network, 1.23M parameters, 3 conditions: img_resolution 64,",
        "- objective: name mclr, contrast posterior, lam 0.4, schedule kind ramp\n",
        "- data: pets, 1,500 images, 3 classes (cat, dog, fish)\n",
        "- images seen: 2,000,000\n",
        "- average of the weights: of relative width 0.1\n",
        "- command: `mclr train --model edm2-img64-s`\n",
        "```\nmclr sample FOLDER --model edm2-img64-s --data DATA --out samples/mine\n```",
        "## Licence\npublished EDM2 weights and all weights made from them: CC BY-NC-SA 4.0, not for commercial use\n",
    ):
        assert fact in text, fact
    assert "## Scores" not in text


@pytest.mark.parametrize(
    ("changed", "base"),
    [
        ({"init": "edm2-digits", "base": "hf://a/b"}, "a/b"),
        ({"init": "hf://c/d@main", "base": "hf://a/b/net.pth"}, "c/d"),
        ({"init": None, "base": "net.pth"}, None),
    ],
)
def test_the_base_is_named_where_it_lies_on_the_hub(changed, base):
    assert front_matter(card(RUN | changed)).get("base_model") == base


@pytest.mark.parametrize(("licence", "name"), [(None, "unknown"), ("MIT", "other"), (RUN["licence"], "cc-by-nc-sa-4.0")])
def test_the_licence_is_named(licence, name):
    description = {key: value for key, value in RUN.items() if key != "licence"} | ({"licence": licence} if licence else {})
    text = card(description)
    assert front_matter(text)["license"] == name
    assert f"## Licence\n{licence or 'None is recorded: '}" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", 3),
        ("objective", None),
        ("parameters", "many"),
        ("licence", 3),
        ("evaluations", []),
        ("evaluations", {"a": {"scores": 3}}),
    ],
)
def test_damaged_notes_are_one_line(name, value):
    with pytest.raises(UserError, match=r"the notes of these weights \(config.json\) are damaged \("):
        card(RUN | {name: value})


def test_many_classes_are_not_all_listed():
    text = card(RUN | {"classes": [f"class{i}" for i in range(1000)]})
    assert "1000 classes (class0, " in text and "class19, ...)" in text and "class20" not in text


@pytest.mark.parametrize(
    ("net", "use"),
    [
        (ImageClassifier(ImageClassifierConfig(1, 3)), "mclr evaluate SAMPLES --reference DATA --judge FOLDER"),
        (
            VQVAE(
                VQVAEConfig(img_channels=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, vocab_size=16, scales=(1, 2))
            ),
            "mclr train --model MODEL --data DATA model.tokenizer=FOLDER",
        ),
    ],
)
def test_save_weights_writes_it(net, use, tmp_path):
    save_weights(tmp_path / "weights", net, made_by="mclr prepare", data="pets", result="accuracy 1")
    text = (tmp_path / "weights/README.md").read_text()
    assert text == card(read_config(tmp_path / "weights")) and use in text
    assert "- result: accuracy 1\n- command: `mclr prepare`\n" in text


def test_scores_are_added_one_table_per_judge(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "weights"
    save_weights(folder, ImageClassifier(ImageClassifierConfig(1, 3)), licence=RUN["licence"])
    before = (folder / "README.md").read_text()
    # what stands in evaluation.json suffices
    add_scores(folder, json.loads(json.dumps(RESULT)))
    text = (folder / "README.md").read_text()
    assert "| accuracy | 0.9877 |\n| fd | 0.0423 |\n| icr | 0.5 |" in text
    how = "50,000 samples, guidance weight 0.0, against 1,797 images of pets (train and val), in the features of pets-classifier"
    assert how in text and "CC BY-NC-SA" in text
    add_scores(folder, RESULT | {"scores": {"fd": 2.0}, "samples": RESULT["samples"] | {"made": None}})
    text = (folder / "README.md").read_text()
    assert "accuracy" not in text and "sigma" not in text and "| fd | 2 |" in text and "guidance weight unknown" in text
    # a reference of which only statistics are known
    add_scores(folder, RESULT | {"real": RESULT["real"] | {"count": None, "splits": None}, "notes": ["few images"]})
    text = (folder / "README.md").read_text()
    assert "against unknown number of images of pets, in" in text and "| icr | 0.5 |\n\n- few images\n" in text
    judge = RESULT["judge"] | {"name": "dinov2"}
    add_scores(folder, RESULT | {"scores": {"fd": 3.0}, "judge": judge})
    text = (folder / "README.md").read_text()
    assert "## Scores by dinov2" in text and "## Scores by pets-classifier" in text and "| fd | 3 |" in text
    # copies of the weights keep them
    assert read_config(folder)["evaluations"].keys() == {"pets-classifier", "dinov2"}
    save_weights(folder, ImageClassifier(ImageClassifierConfig(1, 3)), replace=True, licence=RUN["licence"])
    assert (folder / "README.md").read_text() == before
