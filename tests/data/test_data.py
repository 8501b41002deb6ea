"""Dataset folders and the order of samples: no sample is lost, repeated or moved, and damage is named in one line."""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from photos import members, save, save_tar
from sklearn.datasets import load_digits

import mclr.train.data.shards
from mclr.errors import UserError
from mclr.train.data.dataset import SplitReader, load_split, open_dataset
from mclr.train.data.images import png
from mclr.train.data.source import open_images, permutation
from mclr.train.data.write import open_or_prepare, prepare_images


@pytest.fixture
def copy(digits, tmp_path):
    """A dataset that a test may damage; without its index, so that the shards themselves are read."""
    path = tmp_path / "copy"
    shutil.copytree(digits, path)
    (path / "index.npz").unlink()
    return path


def pairs(image_NCHW, c_N):
    return [(image.numpy().tobytes(), int(c)) for image, c in zip(image_NCHW, c_N, strict=True)]


def edit_json(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def rewrite_shard(folder, file, change):
    """Pass every member (name, content) of a shard through `change` (None drops it) and correct its record in dataset.json."""
    changed = [(name, change(name, content)) for name, content in members(folder / file)]
    save_tar(folder / file, [each for each in changed if each[1] is not None])
    correct_size(folder, file)


def correct_size(folder, file):
    """Record the shard as it is now: size and sha256."""
    content = (folder / file).read_bytes()

    def change(record):
        (shard,) = (shard for split in record["splits"].values() for shard in split["shards"] if shard["file"] == file)
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_json(folder / "dataset.json", change)


def test_digits_come_back_pixel_by_pixel(digits):
    train, val = load_split(digits, "train"), load_split(digits, "val")
    assert train[0].shape == (1500, 1, 8, 8) and val[0].shape == (297, 1, 8, 8)
    assert train[0].dtype == torch.uint8 and train[1].dtype == torch.int64
    original = load_digits()
    images = np.round(original.images * 255 / 16).astype(np.uint8)
    expected = Counter((image.tobytes(), int(c)) for image, c in zip(images, original.target, strict=True))
    assert Counter(pairs(*train) + pairs(*val)) == expected
    assert not set(pairs(*train)) & set(pairs(*val))


def test_webdataset_reads_the_shards(digits):
    shards = sorted(str(path) for path in (digits / "train").glob("*.tar"))
    assert len(shards) == 4
    loader = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    theirs = [(np.asarray(image.convert("L")).tobytes(), c) for image, c in loader]
    assert theirs == pairs(*load_split(digits, "train"))


@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_is_a_permutation(digits, seed):
    source = open_images(digits, "train", seed)
    epochs = [source.batch(epoch * 1500, 1500) for epoch in (0, 1, 5)]
    orders = [pairs(batch.image_BCHW, batch.c_B) for batch in epochs]
    assert all(Counter(order) == Counter(pairs(*load_split(digits, "train"))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # a batch may be longer than an epoch
    assert len(open_images(digits, "val", seed).batch(100, 700).c_B) == 700


def test_stream_is_the_same_for_any_number_of_ranks_and_any_resume(digits):
    whole = open_images(digits, "train", 3).batch(1480, 48)
    expected = pairs(whole.image_BCHW, whole.c_B)
    for world in (1, 2, 4):
        ranks = [open_images(digits, "train", 3) for _ in range(world)]
        share = 12 // world
        stream = []
        for step in range(4):
            for rank, source in enumerate(ranks):
                positions = range(1480 + step * 12 + rank * share, 1480 + step * 12 + (rank + 1) * share)
                # ranks differ in what they read ahead: it must not show
                source.prefetch(range(positions.start + 12 * rank, positions.stop + 12 * rank))
                batch = source.batch(positions.start, len(positions))
                stream += pairs(batch.image_BCHW, batch.c_B)
        assert stream == expected
    for resume in (1481, 1499, 1500, 1507):
        batch = open_images(digits, "train", 3).batch(resume, 5)
        assert pairs(batch.image_BCHW, batch.c_B) == expected[resume - 1480 :][:5]


def test_large_splits_are_not_kept_in_memory(digits, monkeypatch):
    monkeypatch.setattr("mclr.train.data.dataset.KEPT_BYTES", 0)
    source, expected = open_images(digits, "val", 0), load_split(digits, "val")
    source.prefetch(range(0, 20))
    assert len(source.split.coming) == 20
    batch = source.batch(0, 297)
    assert Counter(pairs(batch.image_BCHW, batch.c_B)) == Counter(pairs(*expected))
    assert not source.coming


def test_small_splits_are_read_once(digits, monkeypatch):
    source = open_images(digits, "val", 0)
    first = source.batch(0, 297)
    monkeypatch.setattr("mclr.train.data.dataset.read_image", None)
    again = source.batch(0, 297)
    assert torch.equal(first.image_BCHW, again.image_BCHW)


def test_orders_are_pinned():
    """A change here silently reorders every run that resumes."""
    assert permutation(0, 0, 10).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert permutation(5, 3, 10).tolist() == [3, 2, 6, 9, 0, 1, 5, 4, 8, 7]
    assert permutation(0, 0, 10, 1).tolist() == [8, 7, 6, 0, 4, 1, 9, 3, 5, 2]
    assert permutation(0, 0, 10, 2).tolist() == [8, 4, 5, 7, 0, 2, 6, 9, 1, 3]


def test_index_is_written_reused_and_rebuilt(copy, monkeypatch):
    expected = SplitReader(open_dataset(copy), "train").samples
    index = copy / "index.npz"
    written = index.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(mclr.train.data.shards, "_index_shard", None)
        assert np.array_equal(SplitReader(open_dataset(copy), "train").samples, expected)
    # cut off, of other numbers, of another shard, and none
    for damaged in (
        written[:-9],
        written.replace(*(key.encode("utf-32-le") for key in ("00000380", "00000381"))),
        written.replace(b":375:", b":374:"),
        b"",
    ):
        assert damaged != written
        index.write_bytes(damaged)
        assert np.array_equal(SplitReader(open_dataset(copy), "train").samples, expected)
        assert index.read_bytes() == written


def test_index_stays_in_memory_when_the_folder_is_read_only(copy, monkeypatch):
    def refuse(path, data):
        raise UserError("read-only")

    monkeypatch.setattr(mclr.train.data.shards, "write_file", refuse)
    assert len(open_images(copy, "train", 0)) == 1500
    assert not (copy / "index.npz").exists()


def wrong(change):
    return lambda folder: edit_json(folder / "dataset.json", change)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut("dataset.json", 100), "{} does not describe a dataset (Invalid JSON: EOF while parsing"),
        (
            lambda folder: (folder / "dataset.json").write_text("[1]"),
            "{} does not describe a dataset (Input should be an object)",
        ),
        (lambda folder: (folder / "dataset.json").write_bytes(b"\xff\xfe"), "{} does not describe a dataset (Invalid JSON: "),
        (wrong(lambda record: record.pop("splits")), "(splits: Field required): prepare the dataset again"),
        (wrong(lambda record: record.update(resolution="8")), "(resolution: Input should be a valid integer)"),
        (wrong(lambda record: record.update(channels=2)), "(channels: Input should be 1 or 3)"),
        (wrong(lambda record: record.update(num_classes=9)), "num_classes is 9, class_names are 10"),
        (wrong(lambda record: record["splits"].pop("val")), "train and val"),
        (wrong(lambda record: record["splits"]["train"].update(count=1499)), "counts 1499"),
        (wrong(lambda record: record["splits"]["train"]["shards"][3].update(file="../x/0.tar")), "(splits.train.shards.3.file: "),
        (lambda folder: (folder / "train/000002.tar").unlink(), "train/000002.tar is missing"),
        (cut("train/000002.tar", 5000), "train/000002.tar has 5000 bytes"),
    ],
)
def test_unusable_folders_are_named_in_one_line(copy, damage, says):
    damage(copy)
    with pytest.raises(UserError) as error:
        open_dataset(copy)
    assert says.format(copy / "dataset.json") in str(error.value) and str(copy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "file", "file/below", "photos"])
def test_paths_without_a_dataset(tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    says = f"no dataset folder at {path}: make one with `mclr prepare`"
    if name == "photos":
        says = f"{path} holds no dataset.json: if it holds your images, run `mclr prepare images {path} OUT --resolution N` and give OUT"
    with pytest.raises(UserError) as error:
        open_dataset(path)
    assert str(error.value) == says


@pytest.mark.parametrize("path", ["https://host/{0..3}.tar", "pipe:cat a.tar", "data/{0..3}.tar"])
def test_a_stream_is_no_dataset_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (open_dataset, lambda path: open_or_prepare("digits", path)):
        with pytest.raises(UserError, match=r"is a stream: this needs a dataset folder \(`mclr evaluate`: "):
            use(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kinds, change, says",
    [
        ("cls", lambda content: b"10", "00000380 has condition 10, outside of 0..9"),
        ("cls", lambda content: b"-1", "00000380 has condition -1, outside of 0..9"),
        ("cls", lambda content: b"seven", "sample 00000380"),
        ("cls", lambda content: None, "sample 00000380 (its .png or its .cls is missing)"),
        ("png cls", lambda content: None, "holds 374 samples"),
        ("png", lambda content: content[:40] + bytes(20) + content[60:], "the image of sample 00000380 is damaged"),
        ("png", lambda content: png(np.zeros((1, 8, 9), np.uint8)), "damaged (L 9x8, but dataset.json says L 8x8)"),
    ],
)
def test_damaged_samples_are_named(copy, kinds, change, says):
    members = [f"00000380.{kind}" for kind in kinds.split()]
    rewrite_shard(copy, "train/000001.tar", lambda name, content: change(content) if name in members else content)
    with pytest.raises(UserError) as error:
        open_images(copy, "train", 0).batch(0, 1500)
    assert says in str(error.value) and "train/000001.tar" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [300 * 2048 + 512 + 20, 300 * 2048 + 3 * 512 + 20, 100])
def test_truncated_shard_of_the_recorded_size(copy, length):
    os.truncate(copy / "train/000001.tar", length)
    correct_size(copy, "train/000001.tar")
    with pytest.raises(UserError, match=r"train/000001.tar"):
        open_images(copy, "train", 0).batch(0, 1500)


@pytest.mark.parametrize("index", [None, "{}"])
def test_another_shard_of_the_recorded_size(copy, index):
    if index:
        (copy / "index.npz").write_text(index)
    file = copy / "train/000001.tar"
    # readable, of the same samples and size, and with one condition changed
    content = file.read_bytes()
    place = content.index(b"00000380.cls") + 512
    file.write_bytes(content[:place] + (b"1" if content[place : place + 1] == b"0" else b"0") + content[place + 1 :])
    with pytest.raises(UserError, match=r"train/000001.tar is damaged \(its sha256 is \w{8}..., but dataset.json says"):
        open_images(copy, "train", 0)
    assert not index or (copy / "index.npz").read_text() == index


def test_an_empty_split(copy):
    edit_json(copy / "dataset.json", lambda record: record["splits"]["val"].update(count=0, shards=[]))
    with pytest.raises(UserError, match=r"has no images in its val split: prepare the images again with a larger --val-share$"):
        load_split(copy, "val")


def spoil(folder, indices, split="train"):
    """Overwrite the images of these samples of a split, below its index."""
    samples = SplitReader(open_dataset(folder), split).samples
    for i in indices:
        with open(folder / samples[i].file, "r+b") as stream:
            stream.seek(samples[i].offset)
            stream.write(bytes(samples[i].length))


def stood_for(c_N, i, bad):
    """The rule, in other words: of the samples after i and then from the first on, the first of its condition that is not bad."""
    around = [*range(i, len(c_N)), *range(i)]
    return next(j for j in around if c_N[j] == c_N[i] and j not in bad)


@pytest.mark.parametrize("balanced, kept", [(False, 0), (True, 2**28)])
def test_damaged_samples_are_passed_over_alike_everywhere(copy, digits, monkeypatch, capsys, balanced, kept):
    monkeypatch.setattr("mclr.train.data.dataset.KEPT_BYTES", kept)
    image_NCHW, c_N = load_split(digits, "train")
    whole = open_images(digits, "train", 3, balanced)
    # of one condition two in a row, and its last, which the first stands for; and some others
    alike = whole.split.of_condition[4]
    bad = {int(i) for i in (alike[7], alike[8], alike[-1], 0, 700, 1499)}
    spoil(copy, bad)
    expected = [stood_for(c_N, i, bad) for i in whole.indices(range(1400, 3100))]
    capsys.readouterr()
    for world in (1, 2):
        ranks = [open_images(copy, "train", 3, balanced, tolerated=0.004) for _ in range(world)]
        images, keys = [], []
        for step in range(1700 // 50):
            for rank, source in enumerate(ranks):
                first, share = 1400 + step * 50 + rank * 50 // world, 50 // world
                # what is read ahead must not show, nor count
                source.prefetch(range(first, first + 300 * (rank + 1)))
                batch = source.batch(first, share)
                images.append(batch.image_BCHW)
                assert batch.c_B.tolist() == c_N[expected[first - 1400 :][:share]].tolist()
                keys += source.keys(first, share)
        assert torch.equal(torch.cat(images), image_NCHW[expected])
        assert keys == [f"{whole.split.samples[i].file}:{whole.split.samples[i].key}" for i in expected]
        # named once by each rank that met it
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == sum(source.damaged for source in ranks) and len(set(lines)) == len(bad)
        assert all(line.startswith(f"passed over: {copy}/train/00000") and "is damaged (no PNG file)" in line for line in lines)
        assert {i for source in ranks for i in source.split.damaged} == bad
        assert not any(source.split.damaged & source.split.coming.keys() for source in ranks)
    resumed = open_images(copy, "train", 3, balanced, tolerated=0.004).batch(2222, 100)
    assert torch.equal(resumed.image_BCHW, image_NCHW[expected[822:][:100]])


def test_reading_ahead_counts_nothing_and_tokens_go_with_the_image(copy):
    spoil(copy, [20])
    source = open_images(copy, "train", 0, tolerated=0.01)
    source.split.tokens_NL = torch.arange(1500)[:, None]
    source.prefetch(range(1500))
    for future in source.coming.values():
        future.exception()
    assert source.damaged == 0
    tokens_NL = source.batch(0, 1500).tokens_BL
    assert source.damaged == 1
    assert sorted(tokens_NL[:, 0].tolist()) == sorted([*range(20), *range(21, 1500), stood_for(source.split.c_N, 20, {20})])


@pytest.mark.parametrize("bad, tolerated, says", [
    ([3, 400, 401], 0.002, None),
    ([3, 400, 401], 0.0019, "^3 of 1500 samples in split train of .* are damaged, 0.20%, more than data.damaged=0.0019; .*train/0"),
    # of few samples one may be
    ([3], 0.0001, None),
    ([3, 400], 0.0001, "^2 of 1500 samples"),
    ([3], 0, r"^.*train/000000.tar: the image of sample 00000003 is damaged \(no PNG file\)"),
])  # fmt: skip
def test_too_much_damage_ends_the_run(copy, capsys, bad, tolerated, says):
    spoil(copy, bad)
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext() as error:
        assert open_images(copy, "train", 0, tolerated=tolerated).batch(0, 1500).image_BCHW.shape[0] == 1500
    assert not error or "\n" not in str(error.value)
    assert len(capsys.readouterr().err.splitlines()) == (len(bad) if tolerated else 0)


def test_a_condition_of_which_nothing_is_left(copy):
    alike = open_images(copy, "val", 0).split.of_condition[7].tolist()
    spoil(copy, alike, "val")
    with pytest.raises(UserError, match=f"all {len(alike)} samples of condition 7 in split val are damaged"):
        open_images(copy, "val", 0, tolerated=1).batch(0, 297)


def unreadable(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("fault", [Path.unlink, unreadable, lambda file: os.truncate(file, 2000)])
def test_a_shard_that_goes_away_is_no_damaged_sample(copy, capsys, fault):
    source = open_images(copy, "train", 0, tolerated=1)
    source.batch(0, 10)
    fault(copy / "train/000002.tar")
    with pytest.raises(UserError, match=rf"{copy}/train/000002.tar .* put .* back, and the same command goes on"):
        source.batch(0, 1500)
    assert source.damaged == 0 and capsys.readouterr().err == ""


@pytest.fixture
def uneven(tmp_path):
    """Ten conditions of 3 to 39 samples each."""
    for c in range(10):
        for i in range(3 + 4 * c):
            save(tmp_path / "src" / str(c) / f"{i}.png", 10 * c + i)
    prepare_images(tmp_path / "src", tmp_path / "uneven", 8, val_share=0)
    return tmp_path / "uneven"


def test_balanced_conditions_come_equally_often(uneven):
    sizes = torch.bincount(load_split(uneven, "train")[1])
    assert sizes.min() == 3 and sizes.max() > 30
    source = open_images(uneven, "train", 5, balanced=True)
    assert len(source) == sizes.sum()
    batch, keys = source.batch(0, 1000), source.keys(0, 1000)
    counts_PK = torch.nn.functional.one_hot(batch.c_B, 10).cumsum(0)
    assert (counts_PK.amax(1) - counts_PK.amin(1)).max() == 1
    assert (counts_PK[9::10] == torch.arange(1, 101)[:, None]).all()
    # rounds differ in their order
    assert len({tuple(order) for order in batch.c_B.view(100, 10).tolist()}) > 90
    for c, size in enumerate(sizes.tolist()):
        seen = [key for key, condition in zip(keys, batch.c_B.tolist(), strict=True) if condition == c]
        epochs = [tuple(seen[first : first + size]) for first in range(0, 100 - size + 1, size)]
        # each sample once before any comes again, then in another order
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert size == 3 or all(one != two for one, two in pairwise(epochs))
        # and no condition in the order of another
        assert source.of_round[c][1].tolist() == permutation(5, 99 // size, size, 2 + c).tolist()
    assert open_images(uneven, "train", 5, balanced=True).keys(317, 400) == keys[317:717]
    assert open_images(uneven, "train", 6, balanced=True).keys(0, 1000) != keys


def test_balance_needs_samples_of_every_condition(uneven):
    rewrite_shard(uneven, "train/000000.tar", lambda name, content: b"1" if (name[-3:], content) == ("cls", b"0") else content)
    assert len(open_images(uneven, "train", 0)) > 0
    with pytest.raises(UserError, match=r"has no samples of 1 classes in split train, like 0: set data.balanced=false"):
        open_images(uneven, "train", 0, balanced=True)
