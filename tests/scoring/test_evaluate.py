"""train/evaluate.py: what the judge says of real, exchanged and noisy images; samples and runs end to end; every misuse is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch
from photos import refused
from PIL import Image

from mclr import metrics
from mclr.configs.schema import dump, load
from mclr.metrics import neighbour_radii, neighbour_scores
from mclr.models.features import ImageClassifier, ImageClassifierConfig
from mclr.train import evaluate, sample
from mclr.train.data import images as image_files
from mclr.train.data.dataset import SplitReader, load_split
from mclr.train.data.write import prepare_images
from mclr.train.scoring import evaluation, scores
from mclr.train.scoring import extractors as judges
from mclr.train.scoring import image_readers as image_sets
from mclr.train.scoring import statistics as references
from mclr.train.system.console import run
from mclr.train.training.networks import build_encoder, build_net
from mclr.train.weights.folder import save_weights, sha256

CLASSES = 3
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where the statistics of references are kept, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path / "mclr"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dataset `blobs` of 60 8x8 images, one bright quarter per condition; a judge; a run of an untrained network."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        (home / f"photos/{c}").mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 80, (8, 8))
            pixels[4 * (c // 2) :, 4 * (c % 2) :][:4, :4] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(home / f"photos/{c}/{i}.png")
    prepare_images(home / "photos", home / "blobs", 8, channels=1, val_share=0.3)
    torch.manual_seed(0)
    save_weights(home / "judge", ImageClassifier(ImageClassifierConfig(1, CLASSES, channels=8)))
    save_weights(home / "judge-of-10", ImageClassifier(ImageClassifierConfig(1, 10, channels=8)))
    small = ["model.net.model_channels=8", "model.net.channels_per_head=8", "sample.steps=1"]
    config = load("edm2-digits", "mle", str(home / "blobs"), "local", small)
    save_weights(home / "run/weights", build_net(config, build_encoder(config, torch.device("cpu"))))
    (home / "run/config.yaml").write_text(dump(config))
    return home


@pytest.fixture(scope="module")
def real(home):
    images, conditions = zip(*(load_split(home / "blobs", split) for split in ("train", "val")), strict=True)
    return torch.cat(images), torch.cat(conditions)


def write_samples(folder, images, conditions):
    (folder / "images").mkdir(parents=True)
    for i, (image, c) in enumerate(zip(images.numpy(), conditions.tolist(), strict=True)):
        (folder / "images" / f"{i:06d}-{c}.png").write_bytes(image_files.png(image))
    return folder


def nhwc(images):
    return images.permute(0, 2, 3, 1).numpy()


def evaluate_(*argv):
    return run(evaluate.main, [str(arg) for arg in argv])


def refused_evaluation(capsys, argv, line):
    """The evaluation ends with one line that holds this text, and says nothing else."""
    assert line in refused(evaluate.main, argv, capsys)


def written_by(folder):
    """What the last evaluation of a folder wrote."""
    (path,) = folder.glob("evaluation*.json")
    return json.loads(path.read_text())


def scored(folder, *argv):
    assert evaluate_(folder, *argv) == 0
    return written_by(folder)


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


def score_images(classifier, real_images, real_c, fake_images, fake_c):
    """score() of fake images against real ones, in memory."""
    judge = judges.classifier_judge(classifier)
    real, fake = (image_sets.in_memory_images(*each) for each in ((real_images, real_c), (fake_images, fake_c)))
    return scores.score(judge, references.measure(judge, real), references.measure(judge, fake, with_prob=True))


def test_real_exchanged_and_noisy_images(classifier, real):
    images, c = real
    right = score_images(classifier, images, c, images, c)
    expected = {"accuracy": 1, "fd": 0, "cfd": 0, "precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert right == pytest.approx(expected, abs=1e-9)
    # exchanged conditions hurt accuracy and class-wise FD alone
    wrong = score_images(classifier, images, c, images, (c + 1) % CLASSES)
    assert all(wrong[name] == right[name] for name in right if name not in ("accuracy", "cfd"))
    assert wrong["accuracy"] == 0 and wrong["cfd"] > 100 * max(right["cfd"], 1e-9)
    # noise is far from everything
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    far = score_images(classifier, images, c, noise, c)
    assert far["fd"] > 100 * max(right["fd"], 1e-9) and far["precision"] < 0.1 and far["coverage"] < 0.1


def test_a_folder_and_an_npz_of_the_same_images_score_the_same(home, real, tmp_path, capsys):
    folder = write_samples(tmp_path / "folder", real[0].flip(-1), real[1])
    np.savez(tmp_path / "s.npz", nhwc(real[0].flip(-1)), real[1].numpy())
    options = ("--reference", home / "blobs", "--judge", home / "judge")
    assert evaluate_(folder, *options) == 0
    out = capsys.readouterr().out
    assert evaluate_(tmp_path / "s.npz", *options) == 0
    written, of_npz = (json.loads((tmp_path / path).read_text()) for path in ("folder/evaluation.json", "s-evaluation.json"))
    assert written["scores"] == of_npz["scores"]
    assert set(written["scores"]) == {"accuracy", "fd", "cfd", "precision", "recall", "density", "coverage"}
    assert written["samples"] == {"path": str(folder), "count": 60, "made": None}
    about = {"data": "blobs", "path": str(home / "blobs"), "splits": ["train", "val"]}
    assert written["real"] == {**about, "count": 60, "neighbours": 60, "sha256": written["real"]["sha256"]}
    assert written["judge"]["sha256"] == sha256(home / "judge")
    lines = out.splitlines()
    assert lines[:3] == [
        f"samples    60 images of {folder}, guidance weight unknown, seeds unknown",
        "rounding   unknown",
        f"reference  60 images of blobs, train and val, sha256 {written['real']['sha256']}",
    ]
    assert lines[3] == f"extractor  {home / 'judge'}, penultimate layer, sha256 {written['judge']['sha256']}"
    for line, (name, value) in zip(lines[4:], written["scores"].items(), strict=False):
        assert line.startswith(f"{name:10} {value:9.4f}  ")
    assert lines[-1] == f"written to {folder / 'evaluation.json'}"


@pytest.mark.parametrize(("split", "count"), [("train", 42), ("val", 18), ("all", 60)])
def test_the_reference_is_a_choice(split, count, home, real, tmp_path):
    folder = write_samples(tmp_path, *real)
    assert scored(folder, "--reference", home / "blobs", "--judge", home / "judge", "--real", split)["real"]["count"] == count


def test_a_run_is_sampled_once_and_scored(home, capsys):
    assert evaluate_(home / "run", "--judge", home / "judge") == 0
    out = capsys.readouterr().out
    folder = home / "run/samples"
    assert f"{folder}: 60 images drawn, 1 network forwards per image, no guidance" in out
    assert f"samples    60 images of {folder}, guidance weight 0.0, seeds 0..59" in out
    assert "rounding   round(127.5 x + 127.5), half to even" in out
    result = written_by(folder)
    assert result["samples"]["made"]["sample.steps"] == 1 and result["samples"]["count"] == 60
    assert f"| fd | {result['scores']['fd']:.4g} |" in (home / "run/weights/README.md").read_text()
    assert evaluate_(home / "run", "--judge", home / "judge") == 0
    assert "is complete: 60 images" in capsys.readouterr().out
    # the samples say which data their model was for
    assert scored(folder, "--judge", home / "judge") == result


def test_misuse_is_one_line_and_writes_nothing(home, real, tmp_path, capsys):
    images, c = real
    good = write_samples(tmp_path / "good", images, c)
    few = write_samples(tmp_path / "few", images[:3], c[:3])
    wide = write_samples(tmp_path / "wide", images.repeat(1, 1, 1, 2), c)
    mixed = write_samples(tmp_path / "mixed", images, c)
    (mixed / "images/000100-1.png").write_bytes(image_files.png(np.zeros((1, 4, 4), np.uint8)))
    nameless = write_samples(tmp_path / "nameless", images, c)
    (nameless / "images/cat.png").write_bytes(image_files.png(images[0].numpy()))
    clear = write_samples(tmp_path / "clear", images, c)
    Image.new("RGBA", (8, 8)).save(clear / "images/000100-1.png")
    damaged = write_samples(tmp_path / "damaged", images, c)
    (damaged / "images/000007-1.png").write_bytes(b"\x89PNG")
    beyond = write_samples(tmp_path / "beyond", images, c + 1)
    (tmp_path / "bad.npz").write_bytes(b"x")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", np.array([None]), np.array([0]))
    np.savez(tmp_path / "names.npz", x=1)
    np.savez(tmp_path / "float.npz", nhwc(images.float()), c.numpy())
    np.savez(tmp_path / "short.npz", nhwc(images), c[:-1].numpy())
    np.savez(tmp_path / "whole.npz", nhwc(images), c.numpy())
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(content[:2000] + bytes(8) + content[2008:])
    part = tmp_path / "part"
    assert run(sample.main, [str(home / "run"), "--out", str(part), "--count", "60"]) == 0
    next((part / "images").iterdir()).unlink()
    data, judge_ = ("--reference", home / "blobs"), ("--judge", home / "judge")
    for argv, line in [
        ((tmp_path / "nothing", *data, *judge_), "is no run and holds no images"),
        ((good, *judge_), "does not say which data its model was for: give --reference"),
        ((good, "--reference", "nonsense", *judge_), "unknown data nonsense"),
        ((good, *data), f"bundled for blobs: give --judge WEIGHTS; `mclr prepare classifier WEIGHTS --data {home / 'blobs'}`"),
        ((good, *data, "--judge", home / "run/weights"), "hold a network of kind edm2, not image_classifier"),
        ((good, *data, "--judge", home / "judge-of-10"), "knows 10 conditions of 1-channel images, blobs has 3 of 1"),
        ((few, *data, *judge_), "samples and 20 real images, at least 2 of each are needed: draw more"),
        ((wide, *data, *judge_), "the samples are of shape (1, 8, 16), the images of blobs of (1, 8, 8)"),
        ((mixed, *data, *judge_), "000100-1.png is of shape (1, 4, 4)"),
        ((nameless, *data, *judge_), "cat.png does not say its condition"),
        ((clear, *data, *judge_), "000100-1.png is of shape (3, 8, 8), the images before it of (1, 8, 8)"),
        ((damaged, *data, *judge_), "000007-1.png is no readable image"),
        ((beyond, *data, *judge_), "holds condition 3, judge"),
        *(
            ((tmp_path / f"{name}.npz", *data, *judge_), "arr_1 (conditions): write it again by numpy.savez(FILE, images,")
            for name in ("bad", "names", "array", "half", "flipped")
        ),
        ((tmp_path / "objects.npz", *data, *judge_), "are object of shape (1,), not uint8"),
        ((tmp_path / "float.npz", *data, *judge_), "are float32 of shape (60, 8, 8, 1), not uint8"),
        ((tmp_path / "short.npz", *data, *judge_), "are not one whole number per image"),
        ((part, *judge_), "holds 59 of 60 images: repeat its `mclr sample` command"),
    ]:
        refused_evaluation(capsys, argv, line)
    assert not list(tmp_path.rglob("*evaluation.json"))


def test_scores_are_over_the_conditions_that_were_drawn(home, real, tmp_path, capsys):
    images, c = real
    folder = write_samples(tmp_path / "one", images[c == 2], c[c == 2])
    scores = scored(folder, "--reference", home / "blobs", "--judge", home / "judge")["scores"]
    assert "the samples are of 1 conditions, the reference of 3" in capsys.readouterr().out
    # the same images: nothing within the condition differs, but all real images are more than they
    assert scores["cfd"] == pytest.approx(0, abs=1e-9) and scores["fd"] > 0.01


def test_enough_of_every_condition_may_be_too_few_in_all(home, real, tmp_path, capsys):
    few = torch.cat([torch.arange(len(real[1]))[real[1] == c][:2] for c in (0, 1)])
    folder = write_samples(tmp_path / "few", real[0][few], real[1][few])
    reference = write_samples(tmp_path / "two", *(x[real[1] < 2] for x in real))
    line = "error: there are 4 samples or real images, at least 6 of each are needed: "
    refused_evaluation(capsys, (folder, "--reference", reference, "--judge", home / "judge"), line)


def test_images_are_read_a_batch_at_a_time(home, real, tmp_path, monkeypatch, cache):
    folder = write_samples(tmp_path / "samples", real[0].flip(-1), real[1])
    options = ("--reference", home / "blobs", "--judge", home / "judge")
    expected = scored(folder, *options)
    sizes = []
    original = ImageClassifier.features

    def features(self, image):
        sizes.append(len(image))
        return original(self, image)

    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr(judges, "BATCH", 16)
    monkeypatch.setattr(ImageClassifier, "features", features)
    # a whole split or folder at once would be more than a batch
    for owner, name in ((SplitReader, "images"), (image_sets, "read_images")):
        read = getattr(owner, name)

        def small(*args, read=read):
            assert len(args[-1]) <= 16
            return read(*args)

        monkeypatch.setattr(owner, name, small)
    assert scored(folder, *options)["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    assert sizes == 2 * [16, 16, 16, 12]


def test_neighbours_are_looked_for_among_a_limited_number_of_real_images(home, real, tmp_path, monkeypatch):
    folder = write_samples(tmp_path / "samples", real[0].flip(-1), real[1])
    watched = Mock(wraps=neighbour_scores)
    monkeypatch.setattr(scores, "neighbour_scores", watched)
    monkeypatch.setattr(references, "MOST", 25)
    written = scored(folder, "--reference", home / "blobs", "--judge", home / "judge")["real"]
    assert [list(map(len, call.args)) for call in watched.call_args_list] == [[25, 25]]
    assert (written["count"], written["neighbours"]) == (60, 25)


def published(name="inception", D=5, broken=False):
    """A judge of random projections with all that Inception gives: 5 features, 6 spatial ones, probabilities of 4 classes."""

    class Projection(torch.nn.Linear):
        def forward(self, image):
            out = super().forward(image.float().flatten(1) / 255)
            return judges.Answer(out[:, :D] / (not broken), out[:, D : D + 6], (5 * out[:, -4:]).softmax(1))

    torch.manual_seed(0)
    return judges.Judge(name, "projections", "FID", "0123", Projection(64, D + 10), lambda net, image: net(image), batch=16)


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr(evaluation, "open_judge", lambda name, weights: published(name))
    return ("--judge", "inception")


def write_plain(folder, images, suffix="png"):
    """Images below a folder of folders, without conditions in their names."""
    for i, image in enumerate(images[:, 0].numpy()):
        path = folder / f"{i // 20:02d}" / f"cat_{i:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_images_without_conditions_are_scored_as_by_hand(inception, real, tmp_path, capsys):
    images, other = real[0], real[0].flip(-1)
    folder, reference = write_plain(tmp_path / "fake", other), write_plain(tmp_path / "real", images)
    assert evaluate_(folder, "--reference", reference, *inception) == 0
    out = capsys.readouterr().out
    result = written_by(folder)
    assert list(result["scores"]) == ["fd", "sfid", "is", "precision", "recall", "density", "coverage"]
    with torch.no_grad():
        (a, a_s, _), (b, b_s, prob) = ([t.double().numpy() for t in published()(x)] for x in (images, other))
    for name, (x, y) in {"fd": (a, b), "sfid": (a_s, b_s)}.items():
        shift, cov_x, cov_y = x.mean(0) - y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        expected = shift @ shift + np.trace(cov_x + cov_y - 2 * scipy.linalg.sqrtm(cov_x @ cov_y).real)
        assert result["scores"][name] == pytest.approx(expected, rel=1e-5)
    expected = np.exp((prob * (np.log(prob) - np.log(prob.mean(0)))).sum(1).mean())
    assert result["scores"]["is"] == pytest.approx(expected, rel=1e-6)
    near = neighbour_scores(torch.from_numpy(a), torch.from_numpy(b))
    assert {name: result["scores"][name] for name in near} == pytest.approx(near)
    assert result["judge"] == {"name": "inception", "sha256": "0123", "features": "projections", "fd": "FID"}
    about = {"data": str(reference), "path": str(reference), "splits": None}
    assert result["real"] == {**about, "count": 60, "neighbours": 60, "sha256": result["real"]["sha256"]}
    assert "between all samples and all real images: FID\n" in out and "note" not in out
    # ADM's layout, images alone
    np.savez(tmp_path / "s.npz", nhwc(other))
    np.savez(tmp_path / "r.npz", nhwc(images))
    assert evaluate_(tmp_path / "s.npz", "--reference", tmp_path / "r.npz", *inception) == 0
    of_npz = json.loads((tmp_path / "s-evaluation-inception.json").read_text())
    assert of_npz["scores"] == result["scores"] and of_npz["real"]["count"] == 60


def test_a_classifier_without_conditions_leaves_class_scores_out(home, real, tmp_path):
    folder = write_plain(tmp_path / "fake", real[0])
    result = scored(folder, "--reference", home / "blobs", "--judge", home / "judge")
    assert list(result["scores"]) == ["fd", "precision", "recall", "density", "coverage"]
    assert result["scores"]["fd"] == pytest.approx(0, abs=1e-9) and result["notes"][0].startswith("accuracy and cfd are left out")
    # accuracy takes no real image, class-wise FD does
    named = write_samples(tmp_path / "named", *real)
    result = scored(named, "--reference", folder, "--judge", home / "judge")
    assert "accuracy" in result["scores"] and "cfd" not in result["scores"]
    assert result["notes"][0].startswith("cfd is left out: the images of the reference")


def test_stored_statistics_allow_fd_alone(inception, real, tmp_path, capsys):
    folder = write_plain(tmp_path / "fake", real[0].flip(-1))
    expected = scored(folder, "--reference", write_plain(tmp_path / "real", real[0]), *inception)["scores"]
    features, spatial, _ = published()(real[0])
    stored = {"mu": features.mean(0), "sigma": torch.cov(features.double().T)}
    stored |= {"mu_s": spatial.mean(0), "sigma_s": torch.cov(spatial.double().T)}
    np.savez(tmp_path / "adm.npz", **stored)
    capsys.readouterr()
    assert evaluate_(folder, "--reference", tmp_path / "adm.npz", *inception) == 0
    result, out = written_by(folder), capsys.readouterr().out
    assert result["scores"] == pytest.approx({name: expected[name] for name in ("fd", "sfid", "is")}, rel=1e-5)
    assert result["notes"] == [
        f"{tmp_path / 'adm.npz'} holds only mu and sigma: precision, recall, density and coverage are left out"
    ]
    assert "reference  unknown number of images" in out and result["real"]["count"] is result["real"]["neighbours"] is None
    np.savez(tmp_path / "edm2.npz", mu=stored["mu"], sigma=stored["sigma"])
    assert list(scored(folder, "--reference", tmp_path / "edm2.npz", *inception)["scores"]) == ["fd", "is"]
    # ADM's reference files hold some of the images beside the statistics of all: neighbours come from the images
    np.savez(tmp_path / "both.npz", nhwc(real[0][:30]), **stored)
    both = scored(folder, "--reference", tmp_path / "both.npz", *inception)
    assert both["scores"]["fd"] == result["scores"]["fd"] and both["scores"]["recall"] != expected["recall"]
    assert both["real"]["neighbours"] == 30


def test_statistics_of_another_judge_do_not_count(inception, real, tmp_path, capsys):
    folder = write_plain(tmp_path / "fake", real[0].flip(-1))
    np.savez(tmp_path / "r.npz", mu=np.zeros(9), sigma=np.eye(9))
    refused_evaluation(
        capsys, (folder, "--reference", tmp_path / "r.npz", *inception), "9 and 5 features; they need the same judge"
    )
    np.savez(tmp_path / "r.npz", nhwc(real[0]), mu=np.zeros(9), sigma=np.eye(9))
    assert scored(folder, "--reference", tmp_path / "r.npz", *inception)["real"]["neighbours"] == 60


def test_what_the_judge_saw_of_a_reference_is_kept(inception, home, real, tmp_path, monkeypatch, capsys, cache):
    folder, reference = write_plain(tmp_path / "fake", real[0].flip(-1)), write_plain(tmp_path / "real", real[0])
    options = ("--reference", reference, *inception)
    assert evaluate_(folder, *options) == 0
    first, out = written_by(folder), capsys.readouterr().out
    (kept,) = cache.iterdir()
    assert f"statistics of the reference: measured now, kept in {kept}" in out
    seen = []
    original = judges.Judge.__call__
    monkeypatch.setattr(judges.Judge, "__call__", lambda self, image: seen.append(len(image)) or original(self, image))
    assert scored(folder, *options) == first and sum(seen) == 60
    assert f"statistics of the reference: reused from {kept}" in capsys.readouterr().out
    with np.load(kept) as file:
        torch.testing.assert_close(
            torch.from_numpy(file["radii"]), neighbour_radii(torch.from_numpy(file["near"])), rtol=0, atol=0
        )
    # what was kept is itself a reference, as others store them
    assert scored(folder, "--reference", kept, *inception)["scores"] == first["scores"]
    # another image, or another judge, is another reference
    Image.fromarray(255 - real[0][0, 0].numpy()).save(reference / "00/cat_0000.png")
    assert evaluate_(folder, *options) == 0
    assert len(list(cache.iterdir())) == 2
    assert evaluate_(write_samples(tmp_path / "named", *real), "--reference", home / "blobs", "--judge", "dinov2") == 0
    assert len(list(cache.iterdir())) == 3
    # and so are other radii
    monkeypatch.setattr(references, "NEIGHBOURS", (3, 4))
    assert evaluate_(folder, *options) == 0
    assert len(list(cache.iterdir())) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(reference / "00/cat_0000.png"))
    assert evaluate_(folder, *options) == 0
    assert "measured now, and not kept (" in capsys.readouterr().out


def test_neighbours_among_the_real_images_are_looked_for_once(inception, real, tmp_path, monkeypatch):
    folder, reference = write_plain(tmp_path / "fake", real[0][:24].flip(-1)), write_plain(tmp_path / "real", real[0])
    watched = Mock(wraps=neighbour_radii)
    for module in (metrics, references):
        monkeypatch.setattr(module, "neighbour_radii", watched)
    for _ in range(2):
        assert evaluate_(folder, "--reference", reference, *inception, "--ranges", "3") == 0
    assert [len(call.args[0]) for call in watched.call_args_list] == [60] + 6 * [8]


def test_a_kept_reference_of_a_classifier_scores_the_same(home, real, tmp_path):
    folder = write_samples(tmp_path / "s", real[0].flip(-1), real[1])
    results = [scored(folder, "--reference", home / "blobs", "--judge", home / "judge") for _ in range(2)]
    assert results[0] == results[1] and "cfd" in results[1]["scores"]


def test_ranges_of_seeds_are_scored_apart(inception, real, tmp_path, capsys):
    others = real[0].flip(-1)
    reference = ("--reference", write_plain(tmp_path / "real", real[0]))
    folder = write_plain(tmp_path / "fake", others)
    assert evaluate_(folder, *reference, *inception, "--ranges", "3") == 0
    result, out = written_by(folder), capsys.readouterr().out
    apart = []
    for i in range(3):
        part = write_plain(tmp_path / f"part{i}", others[20 * i : 20 * i + 20])
        apart.append(scored(part, *reference, *inception)["scores"])
    assert [one["scores"] for one in result["ranges"]] == [pytest.approx(scores, rel=1e-5) for scores in apart]
    least, mean = min(one["fd"] for one in apart), sum(one["fd"] for one in apart) / 3
    assert (result["scores"]["fd_min"], result["scores"]["fd"]) == pytest.approx((least, mean), rel=1e-5)
    line = next(line for line in out.splitlines() if line.startswith("fd_min"))
    assert f"{least:.4f}" in line and "minimum of fd over the ranges" in line
    assert f"; mean of {', '.join(format(one['fd'], '.4f') for one in apart)}\n" in out
    refused_evaluation(capsys, (folder, *reference, *inception, "--ranges", "7"), "--ranges 7 does not divide the 60 images")


def test_a_run_is_sampled_for_every_range(home, capsys):
    for options, seeds in ((("--ranges", "2"), [[0, 59], [60, 119]]), ((), [[0, 59]])):
        assert evaluate_(home / "run", "--judge", home / "judge", *options) == 0
        result = json.loads((home / "run/samples/evaluation.json").read_text())
        assert [one["seeds"] for one in result["ranges"]] == seeds and result["samples"]["count"] == 60 * len(seeds)
    # the images of the second range did no harm
    assert "seeds 0..59\n" in capsys.readouterr().out


def test_doubtful_scores_say_so(inception, real, tmp_path, capsys, monkeypatch):
    folder, reference = write_plain(tmp_path / "fake", real[0][:20], "jpg"), write_plain(tmp_path / "real", real[0])
    monkeypatch.setattr(evaluation, "open_judge", lambda name, weights: published(name, D=30))
    notes = scored(folder, "--reference", reference, *inception)["notes"]
    assert notes[0].startswith("the 20 images of the samples cannot span the 30 features") and "biased upwards" in notes[0]
    assert notes[1].startswith("some images are JPEG files") and len(notes) == 2
    same = write_plain(tmp_path / "same", real[0][:1].repeat(20, 1, 1, 1))
    assert "all images of the samples have the same features" in scored(same, "--reference", reference, *inception)["notes"][1]
    monkeypatch.setattr(evaluation, "open_judge", lambda name, weights: published(name, broken=True))
    line = "error: judge inception cannot score these samples (16 of 16 rows of features are not finite): give another --judge\n"
    refused_evaluation(capsys, (folder, "--reference", reference, *inception), line)


def test_smoothed_samples_are_not_comparable(inception, home, real, tmp_path):
    folder = tmp_path / "drawn"
    assert run(sample.main, [str(home / "run"), "--out", str(folder), "--count", "60"]) == 0
    record = json.loads((folder / "sample.json").read_text())
    record["settings"]["sample.more_smooth"] = True
    (folder / "sample.json").write_text(json.dumps(record))
    assert any(
        "sample.more_smooth=true: scores of smoothed samples are not comparable" in n for n in scored(folder, *inception)["notes"]
    )


def test_misused_references_are_one_line(inception, home, real, tmp_path, capsys):
    folder = write_plain(tmp_path / "fake", real[0])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "odd.npz", x=1)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(5), sigma=np.zeros((4, 4)))
    (tmp_path / "text.npz").write_bytes(b"x")
    for argv, line in [
        (("--reference", tmp_path / "empty", *inception), "holds no images"),
        (("--reference", tmp_path / "odd.npz", *inception), "holds x: a reference needs images (arr_0), or mu and sigma"),
        (("--reference", tmp_path / "bad.npz", *inception), "is no readable .npz of mu and sigma (mu is of shape (5,)"),
        (("--reference", tmp_path / "text.npz", *inception), "is no readable .npz file"),
        (("--reference", folder, "--real", "val", *inception), "--real val has no effect"),
        (("--reference", folder), "no judge is bundled for"),
        (("--reference", folder, *inception, "--ranges", "0"), "--ranges 0: give 1 or more"),
    ]:
        refused_evaluation(capsys, (folder, *argv), line)
    assert not list(tmp_path.rglob("*evaluation*.json"))


MEMORY = """
import torch
from mclr.train.bench.step import peak_memory
from mclr.train.scoring import extractors, statistics
from mclr.train.scoring.image_readers import ImageSet
from mclr import metrics
N = 50_000
draws = torch.Generator().manual_seed(0)
def read(first, end):
    return torch.randint(0, 256, (end - first, 1, 8, 8), generator=draws, dtype=torch.uint8)
images = ImageSet("random", N, (1, 8, 8), read, str)
net = torch.nn.Linear(64, 1024)
judge = extractors.Judge("tiny", "", "FD", "", net, lambda net, x: extractors.Answer(net(x.float().flatten(1))), batch=256)
# not getrusage, whose peak is inherited from the process that starts this one
before = peak_memory()
real, fake = (statistics.measure(judge, images) for _ in range(2))
# one chunk of a distance matrix takes as much memory as all of them, and all take minutes
metrics.neighbour_scores(real.near_ND, fake.near_ND, progress=lambda chunks: chunks[:1])
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_fifty_thousand_images_fit_into_two_gib():
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert 0.3 < float(ran.stdout) < 2


def test_the_digits_are_prepared_on_first_use(home, real, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_samples(tmp_path / "samples", *(tensor.repeat_interleave(2, 0)[:20] for tensor in real))
    for i, path in enumerate(sorted((folder / "images").iterdir())):
        path.rename(path.with_name(f"{i:06d}-{i % 10}.png"))
    assert evaluate_(folder, "--reference", "digits", "--real", "val") == 0
    assert "297 images of digits, val" in capsys.readouterr().out and (tmp_path / "data/digits/dataset.json").is_file()


def test_a_folder_of_real_images_is_what_the_user_sees(tmp_path):
    """Links are followed; files of Jupyter and macOS are not the user's images."""
    plain = write_plain(
        tmp_path / "plain", torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    )
    expected = image_sets.open_folder(plain, False).read(0, 20)
    linked = tmp_path / "linked"
    (linked / ".ipynb_checkpoints").mkdir(parents=True)
    (linked / "below").symlink_to(plain)
    for name in (".ipynb_checkpoints/0.png", "._0.png"):
        (linked / name).write_bytes(b"junk")
    images = image_sets.open_folder(linked, False)
    assert torch.equal(images.read(0, 20), expected) and images.found.startswith(f"{linked}: 20 images (20 PNG)")
    assert "; skipped 2 hidden (like ." in images.found
