"""`mclr prepare`: folders of images become whole datasets or none, and every unusable input gets one line."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from photos import read, refused, save
from PIL import Image

import mclr.train.data.write
import mclr.train.prepare
from mclr.errors import UserError
from mclr.train.data.dataset import load_split, open_dataset
from mclr.train.data.folders import find_images
from mclr.train.data.write import open_or_prepare, prepare_digits, prepare_images
from mclr.train.prepare import main
from mclr.train.system.console import run

COLORS = {"blue": (10, 20, 200), "green": (20, 180, 30), "red": (210, 15, 25)}


@pytest.fixture
def tree(tmp_path):
    """Three classes of one colour each, 4 images per class, of many sizes and file formats."""
    src = tmp_path / "src"
    for name, color in COLORS.items():
        (src / name / "deeper").mkdir(parents=True)
        for place, size in (("a.png", (8, 8)), ("b.PNG", (40, 20)), ("c.bmp", (9, 33)), ("deeper/d.webp", (5, 7))):
            Image.new("RGB", size, color).save(src / name / place, lossless=True)
    (src / "red" / "notes.txt").write_text("not an image")
    (src / ".hidden").mkdir()
    (src / "red" / "._a.png").write_text("not an image either")
    return src


@pytest.fixture
def refuses(tmp_path, capsys):
    """refuses(SRC) -> the line that says why nothing is made of these images."""
    return lambda src: refused(main, ["images", src, tmp_path / "out", "--resolution", 8], capsys)


def test_images_become_a_dataset(tree, tmp_path):
    info = prepare_images(tree, tmp_path / "out", resolution=8, val_share=0.25, shard_size=4)
    assert info.class_names == ("blue", "green", "red") and info.num_classes == 3
    assert (info.name, info.resolution, info.channels, info.seed) == ("out", 8, 3, 0)
    assert [shard.count for shard in info.splits["train"].shards] == [4, 4, 1] and info.splits["val"].count == 3
    conditions = []
    for split in ("train", "val"):
        image_NCHW, c_N = load_split(tmp_path / "out", split)
        assert image_NCHW.shape[1:] == (3, 8, 8)
        for image, c in zip(image_NCHW, c_N.tolist(), strict=True):
            assert image.amax((1, 2)).tolist() == image.amin((1, 2)).tolist() == list(COLORS[info.class_names[c]])
        conditions += c_N.tolist()
    assert sorted(conditions) == [0] * 4 + [1] * 4 + [2] * 4


def test_same_images_give_the_same_bytes_and_another_seed_another_split(tree, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        prepare_images(tree, tmp_path / name / "data", resolution=8, seed=seed)
    one, two, three = (read(tmp_path / name / "data") for name in ("one", "two", "three"))
    assert one == two and one["train/000000.tar"] != three["train/000000.tar"]


RED = (200, 30, 60)


@pytest.mark.parametrize("mode, color, expected", [
    ("L", 77, (77, 77, 77)), ("L", 77, (77,)), ("RGB", (90, 90, 90), (90,)), ("1", 1, (255, 255, 255)), ("P", RED, RED),
    ("RGBA", (*RED, 255), RED), ("RGBA", (*RED, 0), (255, 255, 255)), ("LA", (0, 0), (255,)),
    ("I;16", 100 * 257, (100,)), ("I;16", 100 * 257, (100, 100, 100)),
])  # fmt: skip
def test_every_kind_of_pixel(tmp_path, mode, color, expected):
    save(tmp_path / "src" / "only" / "1.png", color, mode=mode)
    prepare_images(tmp_path / "src", tmp_path / "out", resolution=4, channels=len(expected), val_share=0)
    image_NCHW, _ = load_split(tmp_path / "out", "train")
    assert torch.equal(image_NCHW, torch.tensor(expected, dtype=torch.uint8).view(1, -1, 1, 1).expand(1, -1, 4, 4))


@pytest.mark.parametrize(
    "links", [{"red/up": ".."}, {"red/up": "../.."}, {"red/x": "../blue", "blue/y": "../red"}, {"red/self": "../red"}]
)
def test_links_that_lead_back_are_refused(tree, refuses, links):
    for link, target in links.items():
        os.symlink(target, tree / link)
    assert "is a link to a folder that it lies in: remove the link" in refuses(tree)


def test_other_links_are_followed(tree, tmp_path):
    os.rename(tree / "red", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tree / "red")
    # twice the same folder
    os.symlink("../red/deeper", tree / "blue" / "more")
    (tree / "blue" / "loop.png").symlink_to("loop.png")
    for number in range(100):
        save(tree / "green" / f"{number}.png")
    info = prepare_images(tree, tmp_path / "out", resolution=8, val_share=0)
    assert info.splits["train"].count == 113 and "114 images of" in info.source


def test_unusable_sources(tmp_path, refuses):
    for folder in ("empty", "hollow/cats", "loose"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file", "loose/cat.JPG"):
        (tmp_path / file).write_text("")
    for src, says in (
        ("nowhere", "no folder of images at"),
        ("file", "no folder of images at"),
        ("file/below", "no folder of images at"),
        ("empty", "has no class folders"),
        ("hollow", "hollow/cats has no images"),
        ("loose", "1 images outside of any class folder (cat.JPG)"),
    ):
        assert says in refuses(tmp_path / src) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["http://x", "new.tar"])
def test_a_folder_must_not_be_taken_for_a_stream(tree, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert f"{out} would be taken for a stream" in refused(main, ["digits", out], capsys)
    assert list(tmp_path.iterdir()) == [tree]


def test_unusable_places_and_arguments(tree, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    before = read(tmp_path)
    images = ["images", tree, tmp_path / "out", "--resolution", 8]
    for argv, says in (
        (["digits", tmp_path / "file"], "exists already"),
        (["digits", tmp_path / "file" / "below"], "lies below a regular file"),
        (["digits", tmp_path / "taken"], "exists already"),
        (["digits", "/proc/nowhere/out"], "cannot write"),
        (["images", tree, tree / "out", "--resolution", 8], "lies inside the images"),
        (["images", tree, tmp_path / "taken", "--resolution", 8], "exists already"),
        (["images", tree, tmp_path / "out", "--resolution", 0], "--resolution: 0: a finite number above 0 is needed"),
        (
            ["images", tree, tmp_path / "below" / "out", "--resolution", 65537],
            "65537, channels 3, shard size 1000: 1 to 65536 pixels",
        ),
        ([*images, "--shard-size", 0], "--shard-size: 0: a finite number above 0 is needed"),
        ([*images, "--val-share", 1], "val share is 1.0"),
        ([*images, "--val-share", 0.99], "to train on: lower it"),
        ([*images, "--seed", -1], "seed -1"),
    ):
        assert says in refused(main, argv, capsys)
    assert read(tmp_path) == before


def test_same_dataset_is_reused_and_another_is_refused(tree, tmp_path, capsys, monkeypatch):
    prepare_digits(tmp_path / "digits")
    prepare_images(tree, tmp_path / "images", resolution=8)
    before = read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mclr.train.data.write, "_write_split", None)
        assert prepare_digits(tmp_path / "digits") == open_dataset(tmp_path / "digits")
        assert main(["images", str(tree), str(tmp_path / "images"), "--resolution", "8"]) == 0
    assert "images: 11 train and 1 val images, 8x8 RGB, 3 classes" in capsys.readouterr().out
    assert "already holds another dataset" in refused(main, ["digits", tmp_path / "images"], capsys)
    assert "resolution: 8" in refused(main, ["images", tree, tmp_path / "images", "--resolution", 16], capsys)
    assert read(tmp_path) == before

    # a folder that was renamed, and one whose name was once that of its images
    (tmp_path / "images").rename(tmp_path / "renamed")
    assert prepare_images(tree, tmp_path / "renamed", resolution=8).name == "images"

    save(tree / "red" / "new.png")
    assert "source: 12 images" in refused(main, ["images", tree, tmp_path / "renamed", "--resolution", 8], capsys)
    (tmp_path / "digits" / "val" / "000000.tar").unlink()
    assert "000000.tar is missing" in refused(main, ["digits", tmp_path / "digits"], capsys)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_goes_on_after_its_last_shard(tree, tmp_path, monkeypatch, capsys, interruption):
    (tree / "green" / "bad.png").write_bytes(b"not a PNG")
    for number in range(100):
        save(tree / "green" / f"{number}.png", number)
    whole, out = tmp_path / "whole" / "data", tmp_path / "data"
    prepare_images(tree, whole, 8, shard_size=10)
    decoded = []
    decode, replace = mclr.train.data.write.decode, os.replace
    monkeypatch.setattr(mclr.train.data.write, "decode", lambda data, *rest: (decoded.append(data), decode(data, *rest))[1])

    def interrupted(source, target):
        if str(target).endswith("000007.tar"):
            raise interruption
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else UserError):
            prepare_images(tree, out, 8, shard_size=10)
    assert len(list(out.rglob("*.tar"))) == 7 and not list(tmp_path.rglob(".tmp-*"))
    # what SIGKILL leaves
    (out / "train" / ".tmp-1").write_bytes(b"half")
    with pytest.raises(UserError, match="data is not finished: run its `mclr prepare` command again"):
        open_dataset(out)
    decoded.clear()
    capsys.readouterr()
    prepare_images(tree, out, 8, shard_size=10)
    printed = capsys.readouterr()
    assert "going on after 7 finished shards" in printed.out and "1 of 113 images" in printed.err
    assert len(decoded) <= 44 and read(out) == read(whole)


def test_an_unfinished_dataset_is_finished_alone_and_as_it_was_begun(tree, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(mclr.train.data.write, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_images(tree, tmp_path / "out", 8)
    before, argv = read(tmp_path / "out"), ["images", tree, tmp_path / "out", "--resolution"]
    with open(tmp_path / "out" / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process makes" in refused(main, [*argv, 8], capsys)
    assert "holds an unfinished dataset of other images or settings: remove it" in refused(main, [*argv, 16], capsys)
    assert read(tmp_path / "out") == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_finished_shards_alone(tmp_path, number):
    for i in range(300):
        save(tmp_path / "src" / "only" / f"{i:03}.png", i % 256, (300, 300))
    argv = ["images", str(tmp_path / "src"), str(tmp_path / "out"), "--resolution", "256", "--shard-size", "3"]
    with subprocess.Popen([sys.executable, "-m", "mclr.train.prepare", *argv], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list((tmp_path / "out").rglob("*.tar"))) < 3:
            time.sleep(0.01)
        process.send_signal(number)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert 3 <= len(there) < 100 and (number == signal.SIGKILL or not list(tmp_path.rglob(".tmp-*")))
    assert run(main, argv) == 0
    # all but the newest, which may be there without being noted
    assert all(path.stat().st_mtime_ns == there[path] for path in sorted(there)[:-1]) and not list(tmp_path.rglob(".tmp-*"))
    assert sum(split.count for split in open_dataset(tmp_path / "out").splits.values()) == 300


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "out", tmp_path / "link")
    assert prepare_digits(tmp_path / "link").splits["train"].count == 1500
    assert open_dataset(tmp_path / "out").name == "digits" and sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_two_processes_may_prepare_the_digits_at_once(tmp_path, monkeypatch):
    def overtaken(path):
        prepare_digits(path)
        raise UserError(f"cannot write {path} (Directory not empty)")

    monkeypatch.setattr(mclr.train.data.write, "prepare_digits", overtaken)
    assert open_or_prepare("digits", tmp_path / "digits").splits["train"].count == 1500
    monkeypatch.setattr(mclr.train.data.write, "prepare_digits", lambda path: overtaken(path / "elsewhere"))
    with pytest.raises(UserError, match="not empty"):
        open_or_prepare("digits", tmp_path / "others")


def zipped(tree, path, **options):
    """The content of a folder as a zip file, in an order of its own and without entries for the folders."""
    with ZipFile(path, "w", **options) as archive:
        for file in sorted(tree.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, str(file.relative_to(tree)))
    return path


def labelled(tree, labels):
    (tree / "dataset.json").write_text(json.dumps({"labels": labels}))


def shards_of(folder):
    return {name: content for name, content in read(folder).items() if name.endswith(".tar")}


@pytest.mark.parametrize("compression", [ZIP_STORED, ZIP_DEFLATED])
def test_a_zip_file_gives_the_shards_of_its_folder(tree, tmp_path, compression):
    # sorted by folders, not by characters: "-" and "." come before "/"
    for name in ("red/deeper-a.png", "red/deeper.png", "red-ish/a.png"):
        save(tree / name, len(name))
    (tree / "red" / "bad.png").write_bytes(b"not a PNG")
    for number in range(100):
        save(tree / "green" / f"{number}.png", number)
    archive = zipped(tree, tmp_path / "photos.zip", compression=compression)
    with ZipFile(archive, "a") as more:
        more.writestr("__MACOSX/red/a.png", b"")
    one = prepare_images(tree, tmp_path / "one", resolution=8, shard_size=4)
    two = prepare_images(archive, tmp_path / "two", resolution=8, shard_size=4)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two") and len(one.splits["train"].shards) > 20
    assert one.class_names == two.class_names == ("blue", "green", "red", "red-ish")
    # the same images, so the same fingerprint: what differs is where they lie
    assert two.source == one.source.replace(str(tree), str(archive))
    assert prepare_images(archive, tmp_path / "two", resolution=8, shard_size=4) == two


def test_a_list_of_labels_decides_in_folder_and_zip(tree, tmp_path):
    labelled(tree, [[name, int(name[0] != "g")] for name, _ in find_images(tree).files])
    archive = zipped(tree, tmp_path / "labelled.zip")
    for src, out in ((tree, tmp_path / "one"), (archive, tmp_path / "two")):
        info = prepare_images(src, out, resolution=8, val_share=0)
        assert info.class_names == ("0", "1")
        image_NCHW, c_N = load_split(out, "train")
        assert sorted(c_N.tolist()) == [0] * 4 + [1] * 8
        assert [int(c) for c in c_N] == [int(image[1, 0, 0] != COLORS["green"][1]) for image in image_NCHW]
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


def test_unusable_labels(tree, tmp_path, refuses):
    good = [[name, 0] for name, _ in find_images(tree).files]
    for labels, says in (
        (None, "has no labels (null)"),
        ([[0]], "is no list of labels"),
        (7, "is no list of labels"),
        ([[1, 0], ["zzz", 0]], "has the label (1, 0): expected a name"),
        (good[1:], "has no label for 1 images (blue/a.png)"),
        ([*good, ["red/z.png", 0]], "has labels for 1 images that are not there (red/z.png)"),
        *(([*good[1:], ["blue/a.png", c]], f"has the label ('blue/a.png', {c})") for c in (-1, None, True, [1.0, 0.0])),
        ([*good[1:], ["blue/a.png", 2]], "has labels up to 2, but no image has 1"),
    ):
        labelled(tree, labels)
        for src in (tree, zipped(tree, tmp_path / "labelled.zip")):
            assert says in refuses(src)
    for text in ("{", "[]", '{"splits": {}}', '{"labels": ' + "[" * 100_000):
        (tree / "dataset.json").write_text(text)
        assert "is no list of labels" in refuses(tree)
    assert not (tmp_path / "out").exists()


def test_unusable_zip_files(tree, tmp_path, refuses):
    whole = zipped(tree, tmp_path / "whole.zip")
    content = whole.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    (tmp_path / "none.zip").write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    with ZipFile(whole) as archive:
        flags = archive.start_dir + 8
    # bit 0 of the flags of the first entry: encrypted
    (tmp_path / "locked.zip").write_bytes(content[:flags] + bytes([content[flags] | 1]) + content[flags + 1 :])
    with ZipFile(tmp_path / "torn.zip", "w", ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 0]] * 50}))
    torn = (tmp_path / "torn.zip").read_bytes()
    # beyond the entry's header of 30 bytes and its name
    (tmp_path / "torn.zip").write_bytes(torn[:42] + bytes(8 * [255]) + torn[50:])
    for name, entry in (("slip", "../evil/a.png"), ("root", "/evil/a.png"), ("inner", "red/../../a.png")):
        with ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(entry, (tree / "red" / "a.png").read_bytes())
    for names, says in (
        ("cut none torn", "is damaged, or no zip file"),
        ("folder", "has no class folders"),
        ("locked", "is encrypted: unpack it with its password"),
        ("slip root inner", "lies outside of it"),
        ("nowhere", "no folder of images at"),
    ):
        for name in names.split():
            assert says in refuses(tmp_path / f"{name}.zip")
            assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


def test_damaged_images_of_a_zip_file_are_counted(tree, tmp_path):
    archive = zipped(tree, tmp_path / "photos.zip")
    content = archive.read_bytes()
    place = content.index((tree / "red" / "a.png").read_bytes())
    archive.write_bytes(content[: place + 20] + b"\0\0\0\0" + content[place + 24 :])
    with pytest.raises(UserError, match=r"1 of 12 images in .* cannot be read: 1 Bad CRC-32 for file \(like red/a.png\)"):
        prepare_images(archive, tmp_path / "out", resolution=8)
