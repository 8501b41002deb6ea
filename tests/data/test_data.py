"""Dataset folders and the order of samples: no sample is lost, repeated or moved, and damage is named in one line."""

import contextlib
import gc
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from sklearn.datasets import load_digits

import mclr.train.data.shards
from mclr.errors import UserError
from mclr.train.data.dataset import SplitReader, load_split, open_dataset
from mclr.train.data.images import png
from mclr.train.data.source import open_images, permutation
from mclr.train.data.write import open_or_prepare


@pytest.fixture
def copy(digits, tmp_path):
    """A dataset that a test may damage; without its index, so that the shards themselves are read."""
    path = tmp_path / "copy"
    shutil.copytree(digits, path)
    (path / "index.json").unlink()
    return path


def pairs(image_NCHW, c_N):
    return [(image.numpy().tobytes(), int(c)) for image, c in zip(image_NCHW, c_N, strict=True)]


def edit_json(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def rewrite_shard(folder, file, change):
    """Pass every member (name, content) of a shard through `change` (None drops it) and correct its record in dataset.json."""
    with tarfile.open(folder / file) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(folder / file, "w") as tar:
        for name, content in members:
            if (content := change(name, content)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    correct_size(folder, file)


def correct_size(folder, file):
    """Record the shard as it is now: size and sha256."""

    def change(record):
        for split in record["splits"].values():
            for shard in split["shards"]:
                if shard["file"] == file:
                    content = (folder / file).read_bytes()
                    shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()

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


def test_batches_larger_than_an_epoch(digits):
    batch = open_images(digits, "val", 0).batch(100, 700)
    assert batch.image_BCHW.shape == (700, 1, 8, 8) and len(batch.c_B) == 700


def test_large_splits_are_not_kept_in_memory(digits, monkeypatch):
    monkeypatch.setattr("mclr.train.data.dataset.KEPT_BYTES", 0)
    source, expected = open_images(digits, "val", 0), load_split(digits, "val")
    source.prefetch(range(0, 20))
    assert len(source.split.coming) == 20
    batch = source.batch(0, 297)
    assert Counter(pairs(batch.image_BCHW, batch.c_B)) == Counter(pairs(*expected))
    assert not source.split.kept and not source.split.coming


def test_small_splits_are_read_once(digits, monkeypatch):
    source = open_images(digits, "val", 0)
    first = source.batch(0, 297)
    monkeypatch.setattr("mclr.train.data.dataset.read_image", None)
    again = source.batch(0, 297)
    assert torch.equal(first.image_BCHW, again.image_BCHW)


@pytest.mark.parametrize(
    "what, order",
    [
        ((0, 0, 10), [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]),
        ((5, 3, 10), [3, 2, 6, 9, 0, 1, 5, 4, 8, 7]),
        ((0, 0, 10, 1), [8, 7, 6, 0, 4, 1, 9, 3, 5, 2]),
        ((0, 0, 10, 2), [8, 4, 5, 7, 0, 2, 6, 9, 1, 3]),
    ],
)
def test_orders_are_pinned(what, order):
    # a change here silently reorders every run that resumes
    assert permutation(*what).tolist() == order


def test_index_is_written_reused_and_rebuilt(copy, monkeypatch):
    expected = SplitReader(open_dataset(copy), "train").samples
    index = copy / "index.json"
    written = index.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(mclr.train.data.shards, "_index_shard", None)
        assert SplitReader(open_dataset(copy), "train").samples == expected

    stale = json.loads(written)
    stale["train/000001.tar"] = ["0" * 64, [["00000000", 0, 1, 2]]]
    for text in (json.dumps(stale), "{", "[]", '{"train/000000.tar": 3}', ""):
        index.write_text(text)
        assert SplitReader(open_dataset(copy), "train").samples == expected
        assert index.read_bytes() == written


def test_the_index_is_parsed_once_for_all_readers(digits):
    mclr.train.data.shards._parsed_index.cache_clear()
    readers = [SplitReader(open_dataset(digits), split) for split in ("train", "val", "train")]
    assert mclr.train.data.shards._parsed_index.cache_info().misses == 1 and gc.isenabled()
    assert readers[0].samples == readers[2].samples and readers[0].samples[0] is readers[2].samples[0]


def test_index_stays_in_memory_when_the_folder_is_read_only(copy, monkeypatch):
    def refuse(path, data):
        raise UserError("read-only")

    monkeypatch.setattr(mclr.train.data.shards, "write_file", refuse)
    assert len(open_images(copy, "train", 0)) == 1500
    assert not (copy / "index.json").exists()


def wrong(change):
    return lambda folder: edit_json(folder / "dataset.json", change)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut("dataset.json", 100), "dataset.json is damaged"),
        (lambda folder: (folder / "dataset.json").write_text("[1]"), "dataset.json is damaged"),
        (lambda folder: (folder / "dataset.json").write_bytes(b"\xff\xfe"), "dataset.json is damaged"),
        (wrong(lambda record: record.pop("splits")), "splits"),
        (wrong(lambda record: record.pop("resolution")), "resolution"),
        (wrong(lambda record: record.update(resolution="8")), "dataset.json is damaged"),
        (wrong(lambda record: record.update(channels=2)), "channels 2"),
        (wrong(lambda record: record.update(num_classes=9)), "num_classes is 9"),
        (wrong(lambda record: record["splits"].pop("val")), "train and val"),
        (wrong(lambda record: record["splits"]["train"].update(count=1499)), "counts 1499"),
        (wrong(lambda record: record["splits"]["train"].update(shards=[{"file": "x"}])), "dataset.json is damaged"),
        (lambda folder: (folder / "train/000002.tar").unlink(), "train/000002.tar is missing"),
        (cut("train/000002.tar", 5000), "train/000002.tar has 5000 bytes"),
    ],
)
def test_unusable_folders_are_named_in_one_line(copy, damage, says):
    damage(copy)
    with pytest.raises(UserError) as error:
        open_dataset(copy)
    assert says in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere", "no dataset folder at"),
        ("empty", "holds no dataset.json"),
        ("file", "no dataset folder at"),
        ("file/below", "no dataset folder at"),
    ],
)
def test_missing_empty_and_regular_paths(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{says}.*mclr prepare"):
        open_dataset(tmp_path / name)


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
        (
            "png",
            lambda content: png(np.zeros((1, 8, 9), np.uint8)),
            "the image of sample 00000380 is damaged (L 9x8, but dataset.json says L 8x8)",
        ),
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
    file = copy / "train/000001.tar"
    file.write_bytes(file.read_bytes()[:length])
    correct_size(copy, "train/000001.tar")
    with pytest.raises(UserError, match=r"train/000001.tar"):
        open_images(copy, "train", 0).batch(0, 1500)


@pytest.mark.parametrize("index", [None, "{}"])
def test_another_shard_of_the_recorded_size(copy, index):
    if index:
        (copy / "index.json").write_text(index)
    file = copy / "train/000001.tar"
    # readable, of the same samples and size, and with one condition changed
    content = file.read_bytes()
    place = content.index(b"00000380.cls") + 512
    file.write_bytes(content[:place] + (b"1" if content[place : place + 1] == b"0" else b"0") + content[place + 1 :])
    with pytest.raises(UserError, match=r"train/000001.tar is damaged \(its sha256 is \w{8}..., but dataset.json says"):
        open_images(copy, "train", 0)
    assert not index or (copy / "index.json").read_text() == index


def test_bytes_damaged_under_a_saved_index(digits, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(digits, path)
    sample = SplitReader(open_dataset(path), "val").samples[5]
    content = bytearray(Path(path, sample.file).read_bytes())
    content[sample.offset : sample.offset + 60] = bytes(60)
    Path(path, sample.file).write_bytes(content)
    with pytest.raises(UserError, match=f"{sample.file}: the image of sample {sample.key} is damaged \\(no PNG file\\): "):
        load_split(path, "val")


def test_unknown_and_empty_splits(copy):
    with pytest.raises(UserError, match="has no split test: it has train, val"):
        open_images(copy, "test", 0)
    edit_json(copy / "dataset.json", lambda record: record["splits"]["val"].update(count=0, shards=[]))
    with pytest.raises(
        UserError, match=r"has no held-out images .its val split is empty.: prepare the images again with a larger"
    ):
        load_split(copy, "val")


def spoil(folder, indices, split="train"):
    """Overwrite the images of these samples of a split, below its index."""
    samples = SplitReader(open_dataset(folder), split).samples
    for i in indices:
        with open(folder / samples[i].file, "r+b") as stream:
            stream.seek(samples[i].offset)
            stream.write(bytes(samples[i].size))


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


def test_reading_ahead_counts_nothing(copy):
    spoil(copy, range(10))
    source = open_images(copy, "train", 0, tolerated=0.01)
    source.prefetch(range(1500))
    for future in source.split.coming.values():
        future.exception()
    assert source.damaged == 0
    source.batch(0, 1500)
    assert source.damaged == 10


def test_tokens_go_with_the_image(copy):
    spoil(copy, [20])
    source = open_images(copy, "train", 0, tolerated=0.01)
    source.split.tokens_NL = torch.arange(1500)[:, None]
    tokens_NL = source.batch(0, 1500).tokens_BL
    assert sorted(tokens_NL[:, 0].tolist()) == sorted([*range(20), *range(21, 1500), stood_for(source.split.c_N, 20, {20})])


def test_too_much_damage_ends_the_run(copy, capsys):
    spoil(copy, [3, 400, 401])
    # 3 of 1500 are .002
    assert open_images(copy, "train", 0, tolerated=0.002).batch(0, 1500).image_BCHW.shape[0] == 1500
    capsys.readouterr()
    source = open_images(copy, "train", 0, tolerated=0.0019)
    with pytest.raises(UserError) as error:
        source.batch(0, 1500)
    says = f"3 of 1500 samples in split train of {copy} are damaged, 0.20%, more than data.damaged=0.0019; {copy}/train/00000"
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    assert len(capsys.readouterr().err.splitlines()) == 3
    with pytest.raises(UserError, match="is damaged"):
        open_images(copy, "train", 0).batch(0, 1500)
    assert capsys.readouterr().err == ""


def test_one_of_few_samples_may_be_damaged(copy):
    for bad, status in ((3, contextlib.nullcontext()), (400, pytest.raises(UserError, match="2 of 1500 samples"))):
        spoil(copy, [bad])
        with status:
            open_images(copy, "train", 0, tolerated=0.0001).batch(0, 1500)


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
def uneven(digits, tmp_path):
    """Ten conditions of 3 to 150 samples each."""
    path = tmp_path / "uneven"
    shutil.copytree(digits, path)
    left = Counter({str(c).encode(): 3 + 16 * c for c in range(10)})
    dropped = set()

    def thin(name, content):
        key, _, kind = name.partition(".")
        if kind == "cls":
            left[content] -= 1
            if left[content] < 0:
                dropped.add(key)

    rewrite_shard(path, "train/000000.tar", lambda name, content: (thin(name, content), content)[1])
    rewrite_shard(path, "train/000000.tar", lambda name, content: None if name.partition(".")[0] in dropped else content)

    def keep_one_shard(record):
        count = 375 - len(dropped)
        record["splits"]["train"]["shards"] = record["splits"]["train"]["shards"][:1]
        record["splits"]["train"]["shards"][0]["count"] = record["splits"]["train"]["count"] = count

    edit_json(path / "dataset.json", keep_one_shard)
    return path


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


def test_ten_thousand_shards_are_not_read_to_be_opened(copy, monkeypatch):
    rewrite_shard(copy, "val/000000.tar", lambda name, content: content if name.startswith("00000007") else None)
    record = json.loads((copy / "dataset.json").read_text())
    one = record["splits"]["val"]["shards"][0] | {"count": 1}
    shards = [one | {"file": f"train/{number}.tar"} for number in range(100_000, 110_000)]
    for shard in shards:
        os.link(copy / one["file"], copy / shard["file"])
    record["splits"] = {"train": {"count": len(shards), "shards": shards}, "val": {"count": 1, "shards": [one]}}
    (copy / "dataset.json").write_text(json.dumps(record))
    rows = [sample[1:] for sample in mclr.train.data.shards._index_shard(copy, mclr.train.data.shards.Shard(**one))]
    index = {shard["file"]: [one["sha256"], rows] for shard in [*shards, one]}
    (copy / "index.json").write_text(json.dumps(index))
    # a hit: no shard is indexed, nor the index written
    monkeypatch.setattr(mclr.train.data.shards, "_index_shard", None)
    monkeypatch.setattr(mclr.train.data.shards, "write_file", None)
    source = open_images(copy, "train", 0)
    assert len(source) == 10_000 and source.keys(0, 1)[0].endswith(".tar:00000007")
    assert source.batch(0, 2).image_BCHW.shape[0] == 2


def test_processes_may_index_at_once(copy):
    """Whoever reads index.json while others write it finds none or a whole one."""
    info = open_dataset(copy)
    shards = [shard for split in info.splits.values() for shard in split.shards]
    expected = mclr.train.data.shards.load_index(copy, shards)
    content = (copy / "index.json").read_bytes()

    def index_anew(_):
        (copy / "index.json").unlink(missing_ok=True)
        assert mclr.train.data.shards.load_index(copy, shards) == expected

    def look(_):
        with contextlib.suppress(FileNotFoundError):
            assert (copy / "index.json").read_bytes() == content

    with ThreadPoolExecutor(8) as threads:
        work = [threads.submit(each, i) for i in range(6) for each in (index_anew, look, look)]
        for future in work:
            future.result()
    assert (copy / "index.json").read_bytes() == content and not list(copy.glob(".tmp-*"))
