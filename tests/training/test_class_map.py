"""train/training/class_map.py: files of classes, what is wrong with one in one line, and runs that start from weights of other classes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_data import edit_json

from mclr.configs.schema import load
from mclr.errors import UserError
from mclr.kernels.magnitude import normalize
from mclr.train.cli import main
from mclr.train.training.build import build_networks
from mclr.train.training.class_map import class_map as class_map_of
from mclr.train.weights.folder import save_weights

LAYER = "condition_linear.weight"
TINY = [
    "model.net.model_channels=8", "model.net.channels_per_head=8", "train.images=16", "train.batch=8", "objective.contrast=uniform",
    "objective.lam=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """The digits under other names; 7 is the name of the class 3."""
    folder = tmp_path_factory.mktemp("data") / "names"
    shutil.copytree(digits, folder)
    names = ["zero", "one", "two", "7", *"456", "seven", "8", "9"]
    edit_json(folder / "dataset.json", lambda record: record.update(class_names=names))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a tiny EDM2 with 12 conditions."""
    folder = tmp_path_factory.mktemp("weights") / "twelve"
    net = build_networks(config_of("digits", None, overrides=["data.num_classes=12"]), torch.device("cpu")).net
    save_weights(folder, net, licence="CC BY-NC-SA 4.0", base="hf://org/repo/net.pkl@v1")
    return folder


def config_of(data, weights, objective="mclr", overrides=()):
    weights = "null" if weights is None else weights
    return load("edm2-digits", objective, str(data), "local", [*TINY, f"model.weights={weights}", *overrides])


def class_map(config, weights):
    return class_map_of(config.model, config.data, weights, config.objective.generated)


def test_weights_that_record_other_classes_are_refused_unless_it_is_said_that_they_are_the_same(data, digits, tmp_path):
    net = build_networks(config_of("digits", None), torch.device("cpu")).net
    save_weights(tmp_path / "ten", net, classes=list("0123456789"))
    with pytest.raises(UserError, match=r"condition 0 is 0 there and zero here\. Say model\.class_map=same"):
        class_map(config_of(data, tmp_path / "ten"), tmp_path / "ten")
    for where, given in ((data, "same"), (digits, None), ("digits", None)):
        overrides = [f"model.class_map={given}"] if given else []
        assert class_map(config_of(where, tmp_path / "ten", overrides=overrides), tmp_path / "ten") is None
    assert class_map(config_of(data, tmp_path / "ten", overrides=["model.class_map=fresh"]), tmp_path / "ten") == [None] * 10
    # images that these weights drew are of their classes, whatever the names
    edit_json(shutil.copytree(data, tmp_path / "drawn") / "dataset.json", lambda record: record.update(drawn={}))
    assert class_map(config_of(tmp_path / "drawn", tmp_path / "ten"), tmp_path / "ten") is None


def sources(data, weights, given, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return class_map(config_of(data, weights, overrides=[f"model.class_map={path}"]), weights)


def test_names_and_indices_are_mapped_and_a_name_comes_before_an_index(data, weights, tmp_path):
    given = {"zero": 11, "1": 10, "two": None, "7": 3, "4": 4, "5": 5, "6": None, "seven": 7, "8": 8, "9": 8}
    assert sources(data, weights, given, tmp_path) == [11, 10, None, 3, 4, 5, None, 7, 8, 8]


def test_digits_that_are_still_to_be_prepared_are_named_by_their_index(weights, tmp_path):
    config = {str(c): 9 - c for c in range(10)}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(config))
    overrides = [f"model.class_map={path}", f"data.path={tmp_path / 'nowhere'}"]
    assert class_map(config_of("digits", weights, overrides=overrides), weights) == list(range(9, -1, -1))


def test_fresh_and_none(data, weights):
    assert class_map(config_of(data, weights), weights) is None
    assert class_map(config_of(data, weights, overrides=["model.class_map=fresh"]), weights) == [None] * 10


COMPLETE = {name: 0 for name in ["zero", "one", "two", "7", *"456", "seven", "8", "9"]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "is not JSON"),
        ("[0, 1]", "is no JSON object"),
        ("3", "is no JSON object"),
        (COMPLETE | {"eight": 3}, "'eight' is no class of the data: give one of its names, like "),
        (COMPLETE | {"0": 1}, "has two entries for class zero"),
        (json.dumps(COMPLETE)[:-1] + ', "9": 1}', "has two entries for class 9"),
        (COMPLETE | {"9": 12}, "12 for '9' is no condition of the weights: give 0..11, or null"),
        (COMPLETE | {"9": -1}, "-1 for '9' is no condition"),
        (COMPLETE | {"9": True}, "true for '9' is no condition"),
        (COMPLETE | {"9": "8"}, "\"8\" for '9' is no condition"),
        (COMPLETE | {"9": {"a": 1}}, "for '9' is no condition"),
        ({"zero": 1}, "has no entry for one, two, 7 and 6 more: give a condition of the weights, or null"),
    ],
)
def test_a_bad_file_is_one_line(given, says, data, weights, tmp_path):
    with pytest.raises(UserError) as error:
        sources(data, weights, given, tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_no_file_no_conditions_and_samples_of_other_conditions(data, weights, tmp_path):
    with pytest.raises(
        UserError, match=r"cannot read model.class_map=nowhere.json \(No such file or directory\): give fresh, same, or a JSON"
    ):
        class_map(config_of(data, weights, overrides=["model.class_map=nowhere.json"]), weights)
    overrides = ["model.class_map=fresh", "objective.generated=samples", "objective.beta=0.1", "model.net.dropout=0.0"]
    config = load("edm2-digits", "ddo", str(data), "local", [*TINY[:4], f"model.weights={weights}", *overrides])
    with pytest.raises(UserError, match="was drawn under the weights' own conditions"):
        class_map(config, weights)
    unconditional = tmp_path / "weights"
    shutil.copytree(weights, unconditional)
    edit_json(unconditional / "config.json", lambda record: record["config"].update(num_classes=0))
    with pytest.raises(UserError, match="have no conditions for"):
        class_map(config_of(data, weights, overrides=["model.class_map=fresh"]), unconditional)


@pytest.mark.parametrize("objective", ["mclr", "cca"])
def test_a_run_starts_from_weights_of_other_classes(objective, data, weights, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({name: None if name == "two" else 2 for name in COMPLETE}))
    more = ["objective.contrast=auto", "objective.beta=0.1", "objective.lam=1.0"] if objective == "cca" else []
    config = config_of(data, weights, objective, [f"model.class_map={path}", *more])
    networks = build_networks(config, torch.device("cpu"))
    old_EK, new_Ek = load_file(weights / "model.safetensors")[LAYER], networks.net.state_dict()[LAYER]
    for c, name in enumerate(COMPLETE):
        assert torch.equal(new_Ek[:, c], normalize(old_EK)[:, 2]) == (name != "two")
    # a fresh column is that of a new network of the run's seed
    fresh = build_networks(config_of(data, None), torch.device("cpu")).net.state_dict()[LAYER]
    assert torch.equal(new_Ek[:, 2], fresh[:, 2])
    # the reference is what training begins with
    if networks.reference is not None:
        assert torch.equal(networks.reference.state_dict()[LAYER], new_Ek)


def test_training_with_a_class_map(data, weights, tmp_path, capsys):
    argv = ["train", "--model", "edm2-digits", "--data", str(data), "--init", str(weights), *TINY, "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    assert (
        "have num_classes 12, this run has 10: give the data they were trained on, or start from them with model.class_map=fresh"
        in (capsys.readouterr().err)
    )
    path = tmp_path / "map.json"
    path.write_text(json.dumps(COMPLETE))
    assert main([*argv, f"model.class_map={path}"]) == 0
    described = json.loads((tmp_path / "run/weights/config.json").read_text())
    assert described["config"]["num_classes"] == 10 and list(COMPLETE) == described["classes"]
    # the licence of the base is that of all that comes of it
    assert described["licence"] == "CC BY-NC-SA 4.0" and described["base"] == "hf://org/repo/net.pkl@v1"
    # another map under the same name is another run
    path.write_text(json.dumps(COMPLETE | {"9": 1}))
    assert main([*argv, f"model.class_map={path}", "train.images=32"]) == 2
    assert f"began with another model.class_map={path} than lies there now" in capsys.readouterr().err
    # the weights made so need no map
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "samples"), "--count", "2", "sample.steps=2"]) == 0
