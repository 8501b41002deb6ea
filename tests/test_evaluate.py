"""train/evaluate.py: what the judge says of real, exchanged and noisy images; samples and runs end to end; every misuse is one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import dump, load
from mclr.errors import UserError
from models.features import ImageClassifier, ImageClassifierConfig
from train import evaluate, sample
from train.build import build_encoder, build_net
from train.cli import run
from train.data import SplitReader, load_split
from train.evaluate import judge
from train.prepare import prepare_images
from train.weights import save_weights

CLASSES = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dataset `blobs` of 60 8x8 images, one bright quarter per condition; a judge; a run of an untrained network."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        (home / f"blobs/{c}").mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 80, (8, 8))
            pixels[4 * (c // 2) :, 4 * (c % 2) :][:4, :4] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(home / f"blobs/{c}/{i}.png")
    prepare_images(home / "blobs", home / "data", 8, channels=1, val_share=0.3)
    torch.manual_seed(0)
    save_weights(home / "judge", ImageClassifier(ImageClassifierConfig(1, CLASSES, channels=8)))
    save_weights(home / "judge-of-10", ImageClassifier(ImageClassifierConfig(1, 10, channels=8)))
    small = ["model.net.model_channels=8", "model.net.channels_per_head=8", "sample.steps=1"]
    config = load("edm2-digits", "mle", str(home / "data"), "local", small)
    save_weights(home / "run/weights", build_net(config, build_encoder(config, torch.device("cpu"))))
    (home / "run/config.yaml").write_text(dump(config))
    return home


@pytest.fixture(scope="module")
def real(home):
    images, conditions = zip(*(load_split(home / "data", split) for split in ("train", "val")), strict=True)
    return torch.cat(images), torch.cat(conditions)


def write_samples(folder, images, conditions):
    (folder / "images").mkdir(parents=True)
    for i, (image, c) in enumerate(zip(images.numpy(), conditions.tolist(), strict=True)):
        (folder / "images" / f"{i:06d}-{c}.png").write_bytes(sample.png(image))
    return folder


def evaluate_(*argv):
    return run(evaluate.main, [str(arg) for arg in argv])


@pytest.fixture(scope="module")
def classifier(real):
    torch.manual_seed(0)
    net = ImageClassifier(ImageClassifierConfig(1, CLASSES, channels=8))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        torch.nn.functional.cross_entropy(net(real[0].float() / 127.5 - 1), real[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def test_real_images_are_perfect_samples_of_themselves(classifier, real):
    images, c = real
    expected = {"accuracy": 1, "fd": 0, "cfd": 0, "precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert judge(classifier, images, c, images, c) == pytest.approx(expected, abs=1e-9)


def test_exchanged_conditions_hurt_accuracy_and_class_wise_fd_alone(classifier, real):
    images, c = real
    right, wrong = judge(classifier, images, c, images, c), judge(classifier, images, c, images, (c + 1) % CLASSES)
    for name in ("fd", "precision", "recall", "density", "coverage"):
        assert wrong[name] == right[name]
    assert wrong["accuracy"] == 0 and wrong["cfd"] > 100 * max(right["cfd"], 1e-9)


def test_noise_is_far_from_everything(classifier, real):
    images, c = real
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near, far = judge(classifier, images, c, images, c), judge(classifier, images, c, noise, c)
    assert far["fd"] > 100 * max(near["fd"], 1e-9) and far["precision"] < 0.1 and far["coverage"] < 0.1


def test_the_number_of_images_per_forward_does_not_matter(classifier, real, monkeypatch):
    scores = judge(classifier, *real, *real)
    monkeypatch.setattr(evaluate, "BATCH", 7)
    assert judge(classifier, *real, *real) == pytest.approx(scores, abs=1e-4)


def test_a_folder_and_an_npz_of_the_same_images_score_the_same(home, real, tmp_path, capsys):
    folder = write_samples(tmp_path / "folder", real[0].flip(-1), real[1])
    np.savez(tmp_path / "s.npz", real[0].flip(-1).permute(0, 2, 3, 1).numpy(), real[1].numpy())
    options = ("--data", home / "data", "--judge", home / "judge")
    assert evaluate_(folder, *options) == 0
    out = capsys.readouterr().out
    assert evaluate_(tmp_path / "s.npz", *options) == 0
    written, of_npz = (json.loads((tmp_path / path).read_text()) for path in ("folder/evaluation.json", "s-evaluation.json"))
    assert written["scores"] == of_npz["scores"]
    assert set(written["scores"]) == {"accuracy", "fd", "cfd", "precision", "recall", "density", "coverage"}
    assert written["samples"] == {"path": str(folder), "count": 60, "made": None}
    about = {"data": "blobs", "path": str(home / "data"), "splits": ["train", "val"]}
    assert written["real"] == {**about, "count": 60, "neighbours": 60}
    assert written["judge"]["sha256"] == sample.sha256(home / "judge")
    lines = out.splitlines()
    assert lines[:3] == [
        f"samples    60 images of {folder}, guidance weight unknown",
        "rounding   unknown",
        "reference  60 images of blobs, train and val",
    ]
    assert lines[3] == f"extractor  {home / 'judge'}, penultimate layer, sha256 {written['judge']['sha256']}"
    for line, (name, value) in zip(lines[4:], written["scores"].items(), strict=False):
        assert line.startswith(f"{name:10} {value:9.4f}  ")
    assert lines[-1] == f"written to {folder / 'evaluation.json'}"


@pytest.mark.parametrize(("split", "count"), [("train", 42), ("val", 18), ("all", 60)])
def test_the_reference_is_a_choice(split, count, home, real, tmp_path):
    folder = write_samples(tmp_path, *real)
    assert evaluate_(folder, "--data", home / "data", "--judge", home / "judge", "--real", split) == 0
    assert json.loads((folder / "evaluation.json").read_text())["real"]["count"] == count


def test_a_run_is_sampled_once_and_scored(home, capsys):
    assert evaluate_(home / "run", "--judge", home / "judge") == 0
    out = capsys.readouterr().out
    folder = home / "run/samples"
    assert f"{folder}: 60 images drawn, 1 network forwards per image, no guidance" in out
    assert f"samples    60 images of {folder}, guidance weight 0.0" in out
    assert "rounding   round(127.5 x + 127.5), half to even" in out
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["samples"]["made"]["sample.steps"] == 1 and result["samples"]["count"] == 60
    assert evaluate_(home / "run", "--judge", home / "judge") == 0
    assert "is complete: 60 images" in capsys.readouterr().out
    # the samples say which data their model was for
    assert evaluate_(folder, "--judge", home / "judge") == 0
    assert json.loads((folder / "evaluation.json").read_text()) == result


def test_misuse_is_one_line_and_writes_nothing(home, real, tmp_path, capsys):
    images, c = real
    good = write_samples(tmp_path / "good", images, c)
    few = write_samples(tmp_path / "few", images[:3], c[:3])
    wide = write_samples(tmp_path / "wide", images.repeat(1, 1, 1, 2), c)
    mixed = write_samples(tmp_path / "mixed", images, c)
    (mixed / "images/000100-1.png").write_bytes(sample.png(np.zeros((1, 4, 4), np.uint8)))
    nameless = write_samples(tmp_path / "nameless", images, c)
    (nameless / "images/cat.png").write_bytes(sample.png(images[0].numpy()))
    clear = write_samples(tmp_path / "clear", images, c)
    Image.new("RGBA", (8, 8)).save(clear / "images/000100-1.png")
    damaged = write_samples(tmp_path / "damaged", images, c)
    (damaged / "images/000007-1.png").write_bytes(b"\x89PNG")
    beyond = write_samples(tmp_path / "beyond", images, c + 1)
    one_class = write_samples(tmp_path / "one", images, torch.zeros_like(c))
    (tmp_path / "bad.npz").write_bytes(b"x")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", np.array([None]), np.array([0]))
    np.savez(tmp_path / "names.npz", x=1)
    np.savez(tmp_path / "float.npz", images.permute(0, 2, 3, 1).float().numpy(), c.numpy())
    np.savez(tmp_path / "short.npz", images.permute(0, 2, 3, 1).numpy(), c[:-1].numpy())
    content = (tmp_path / "float.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(content[:2000] + bytes(8) + content[2008:])
    part = tmp_path / "part"
    assert run(sample.main, [str(home / "run"), "--out", str(part), "--count", "60"]) == 0
    next((part / "images").iterdir()).unlink()
    capsys.readouterr()
    data, judge_ = ("--data", home / "data"), ("--judge", home / "judge")
    for argv, line in [
        ((tmp_path / "nothing", *data, *judge_), "is no run and holds no images/NAME-CONDITION.png"),
        ((good, *judge_), "does not say which data its model was for: say it by --data"),
        ((good, "--data", "nonsense", *judge_), "unknown data nonsense"),
        ((good, *data), f"bundled for blobs: give --judge WEIGHTS; `mclr prepare classifier WEIGHTS --data {home / 'data'}`"),
        ((good, *data, "--judge", home / "run/weights"), "hold a network of kind edm2, not image_classifier"),
        ((good, *data, "--judge", home / "judge-of-10"), "knows 10 conditions of 1-channel images, blobs has 3 of 1"),
        ((few, *data, *judge_), "samples and 20 real images, at least 2 of each are needed: draw more"),
        ((one_class, *data, *judge_), "condition 1 has 0 samples and 20 real images, at least 2 of each are needed: draw more"),
        ((wide, *data, *judge_), "the samples are uint8 of shape (1, 8, 16), those of blobs uint8 of (1, 8, 8)"),
        ((mixed, *data, *judge_), "000100-1.png is of shape (1, 4, 4)"),
        ((nameless, *data, *judge_), "cat.png does not say its condition"),
        ((clear, *data, *judge_), "000100-1.png is of mode RGBA: save it as 8-bit gray"),
        ((damaged, *data, *judge_), "000007-1.png is no readable image"),
        ((beyond, *data, *judge_), "holds condition 3, blobs has 0..2"),
        *(
            ((tmp_path / f"{name}.npz", *data, *judge_), "and arr_1 (conditions): write it again by numpy.savez(FILE, images,")
            for name in ("bad", "names", "array", "objects", "half", "flipped")
        ),
        ((tmp_path / "float.npz", *data, *judge_), "the samples are float32"),
        ((tmp_path / "short.npz", *data, *judge_), "are not one whole number per image"),
        ((part, *judge_), "holds 59 of 60 images: repeat its `mclr sample` command"),
    ]:
        assert evaluate_(*argv) == 2, argv
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and line in err, err
    assert not list(tmp_path.rglob("*evaluation.json"))


def test_enough_of_every_condition_may_be_too_few_in_all():
    real_c = torch.arange(2).repeat(9)
    with pytest.raises(UserError, match=r"^there are 4 samples or real images, at least 6 of each are needed: "):
        evaluate._refuse_few(real_c[:4], real_c)
    evaluate._refuse_few(real_c[:6], real_c)


def test_images_are_read_a_batch_at_a_time(home, real, tmp_path, monkeypatch):
    folder = write_samples(tmp_path / "samples", real[0].flip(-1), real[1])
    options = ("--data", home / "data", "--judge", home / "judge")
    assert evaluate_(folder, *options) == 0
    expected = json.loads((folder / "evaluation.json").read_text())
    sizes = []
    original = ImageClassifier.features

    def features(self, image):
        sizes.append(len(image))
        return original(self, image)

    monkeypatch.setattr(evaluate, "BATCH", 16)
    monkeypatch.setattr(ImageClassifier, "features", features)
    # a whole split or folder at once would be more than a batch
    for owner, name in ((SplitReader, "images"), (evaluate, "read_images")):
        read = getattr(owner, name)

        def small(*args, read=read):
            assert len(args[-1]) <= 16
            return read(*args)

        monkeypatch.setattr(owner, name, small)
    assert evaluate_(folder, *options) == 0
    assert sizes == [16, 16, 16, 12, 16, 16, 10, 16, 2]  # samples, train, val
    assert json.loads((folder / "evaluation.json").read_text())["scores"] == pytest.approx(expected["scores"], abs=1e-4)


def test_neighbours_are_looked_for_among_a_limited_number_of_real_images(home, real, tmp_path, monkeypatch):
    folder = write_samples(tmp_path / "samples", real[0].flip(-1), real[1])
    seen = {}
    for name in ("precision_recall", "density_coverage", "frechet_distance"):
        function = getattr(evaluate, name)

        def watched(real_ND, fake_MD, name=name, function=function):
            seen[name] = len(real_ND), len(fake_MD)
            return function(real_ND, fake_MD)

        monkeypatch.setattr(evaluate, name, watched)
    monkeypatch.setattr(evaluate, "MOST", 25)
    assert evaluate_(folder, "--data", home / "data", "--judge", home / "judge") == 0
    assert seen == {"precision_recall": (25, 60), "density_coverage": (25, 60), "frechet_distance": (60, 60)}
    written = json.loads((folder / "evaluation.json").read_text())["real"]
    assert (written["count"], written["neighbours"]) == (60, 25)


def test_the_digits_are_prepared_on_first_use(home, real, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_samples(tmp_path / "samples", *(tensor.repeat_interleave(2, 0)[:20] for tensor in real))
    for i, path in enumerate(sorted((folder / "images").iterdir())):
        path.rename(path.with_name(f"{i:06d}-{i % 10}.png"))
    assert evaluate_(folder, "--data", "digits", "--real", "val") == 0
    assert "297 images of digits, val" in capsys.readouterr().out and (tmp_path / "data/digits/dataset.json").is_file()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--help"])
    assert exit_.value.code == 0 and "mclr evaluate samples/mine --data digits" in capsys.readouterr().out
