"""Hundreds of damaged or hostile files that programs read: success or one UserError, nothing written outside, bounded time and memory."""

import contextlib
import copy
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import fuzz
import pytest
from fuzz import cases, check, files_below, limits
from hypothesis import given
from hypothesis import strategies as st
from photos import encoded, read, save_noise
from PIL import Image

from mclr.errors import UserError
from mclr.train.data.dataset import SplitReader, open_dataset
from mclr.train.data.source import open_images
from mclr.train.data.write import prepare_images
from mclr.train.engine.checkpoint import MANIFEST, newest_checkpoint
from mclr.train.weights.folder import BUNDLED

counts = fuzz.counts

Files = dict[str, bytes]
DEEP = "[" * 100_000 + "]" * 100_000
RAW = ["1e999", "NaN", "-Infinity", DEEP, "9" * 5000, '{"a": 1, "a": 2}']  # JSON that json.dumps does not write
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 8.0, 0.5, 2**31, 2**63, 10**30]
VALUES += ["", "x", "8", "../x", "/dev/zero", "\0", "\ud800", "x" * 300]
VALUES += [[], {}, [1], ["a", "b"], [["a"]], {"a": 1}, [None] * 3]
TYPES = [bytes([kind]) for kind in b"1234567SLKxgZ\0"]  # links, devices, folders, sparse files, headers of other headers, unknown
NAMES = ["../x.png", "../x.cls", "/x.png", ".png", "png", "a/b.png", "a.b.png", "x" * 300 + ".png", "", "\udcff.png"]
NAMES += ["00000000.png", "x.cls"]
SIZES = [0, 1, 511, 512, 10**6, 2**33, 2**62, 2**70, -1, -512, -(2**40)]
PAX = [
    {"size": "99999999999"}, {"size": "-1"}, {"size": "x"}, {"path": "../y.png"}, {"path": ""}, {"hdrcharset": "BINARY"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}, {"GNU.sparse.map": "0,x"},
    {"GNU.sparse.size": "99999999999", "GNU.sparse.map": "0,1"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"mtime": "nan"},
]  # fmt: skip
CONDITIONS = [b"", b"-1", b"2", b"x", b"9" * 5000, b"1.0", b"\xff", b" 1\n", b"1_0", b"1" + b" " * 100_000, b"true"]
OTHER_PNG = [encoded(Image.new(mode, size)) for mode, size in (("L", (8, 9)), ("RGB", (8, 8)), ("1", (8, 8)), ("P", (8, 8)))]
OTHER_PNG += [encoded(Image.new("L", (8, 8)), "JPEG")]


def torn(draw, data: bytes) -> bytes:
    """Bits flipped, parts cut out, doubled, zeroed or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, max(len(data) - 1, 0)))
        end = i + draw(st.sampled_from([1, 2, 8, 512, 1024, len(data)]))
        how = draw(st.integers(0, 6))
        if how < 3 and data:
            data = data[:i] + bytes([data[i] ^ (1 << draw(st.integers(0, 7)))]) + data[i + 1 :]
        elif how == 3:
            data = data[:i] + data[end:]
        elif how == 4:
            data = data[:i] + data[i:end] * 2 + data[end:]
        elif how == 5:
            data = data[:i] + bytes(len(data[i:end])) + data[end:]
        else:
            data = data[:i] + draw(st.binary(max_size=16)) + data[i:]
    return data


def places(tree: object) -> list[tuple]:
    """(container, key) of every value in a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((tree, key), *places(tree[key]))]


def wrong_json(draw, data: bytes) -> bytes:
    """Values replaced, left out, moved, or of a form that JSON does not have; or bytes torn."""
    if not draw(st.integers(0, 4)):
        return torn(draw, data)
    tree, raw = json.loads(data), {}
    for i in range(draw(st.integers(1, 3))):
        if not (known := places(tree)):
            break
        where, key = draw(st.sampled_from(known))
        how = draw(st.integers(0, 9))
        if how == 0:
            del where[key]
        elif how == 1:
            other, name = draw(st.sampled_from(known))
            if name in other if isinstance(other, dict) else name < len(other):
                where[key] = copy.deepcopy(other[name])
        elif how == 2 and isinstance(where, dict):
            where[draw(st.sampled_from(["x", "", "../x", key + "_"]))] = where.pop(key)
        elif how == 3:
            where[key] = f"RAW{i}"
            raw[f'"RAW{i}"'] = draw(st.sampled_from(RAW))
        elif how == 4 and isinstance(where, list):
            where += [copy.deepcopy(where[key])] * draw(st.sampled_from([1, 100]))
        else:
            where[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    text = json.dumps(tree)
    for name, value in raw.items():
        text = text.replace(name, value)
    return text.encode()


def wrong_tar(draw, data: bytes) -> bytes:
    """Members moved, doubled, left out, of other names, types, sizes and headers, with other contents."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    for _ in range(draw(st.integers(1, 3))):
        i, j = (draw(st.integers(0, len(members) - 1)) for _ in range(2))
        member, content = copy.copy(members[i][0]), members[i][1]
        how = draw(st.integers(0, 9))
        if how == 0 and len(members) > 1:
            del members[i]
        elif how == 1:
            members.insert(j, members[i])
        elif how == 2:
            members[i], members[j] = members[j], members[i]
        else:
            if how == 3:
                member.name = draw(st.sampled_from(NAMES))
            elif how == 4:
                member.type = draw(st.sampled_from(TYPES))
                member.linkname = draw(st.sampled_from(["../x", "/dev/zero", member.name, ""]))
            elif how == 5:
                member.pax_headers = draw(st.sampled_from(PAX))
            elif how == 6:
                content = draw(st.sampled_from(OTHER_PNG if member.name.endswith("png") else CONDITIONS))
            elif how == 7:
                content = torn(draw, content)
            elif how == 8:
                member.type, content = tarfile.GNUTYPE_LONGNAME, content * draw(st.integers(1, 3))
            # or beside what is there, so that the header alone lies
            member.size = len(content) if how < 9 else draw(st.sampled_from(SIZES))
            members[i] = member, content
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    out = b""
    for member, content in members:
        # a size that PAX must spell out is one more header
        usual = form if 0 <= member.size < 2**33 else tarfile.GNU_FORMAT
        header = member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else usual, errors="surrogateescape")
        out += header + content + bytes(-len(content) % 512)
    return out + bytes(1024)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Files:
    """The files of a dataset of 20 images, 8x8 gray, in three shards."""
    folder = tmp_path_factory.mktemp("dataset")
    save_noise(folder / "photos", 20, 8)
    prepare_images(folder / "photos", folder / "data", 8, 1, val_share=0.2, shard_size=8)
    files = read(folder / "data")
    # the same bytes at every run
    return files | {"dataset.json": files["dataset.json"].replace(str(folder).encode(), b"")}


def write(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@st.composite
def damages(draw, files: Files) -> Files:
    """Some of a dataset's files damaged; mostly with the checksums of the damaged shards, which lets them be read."""
    files = dict(files)
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        if name not in files:
            continue
        if name.endswith("json"):
            files[name] = wrong_json(draw, files[name])
            continue
        whole = name.endswith("tar") and draw(st.integers(0, 3)) > 0
        files[name] = wrong_tar(draw, files[name]) if whole else torn(draw, files[name])
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError, LookupError):
            record = json.loads(files["dataset.json"])
            for shard in [shard for split in record["splits"].values() for shard in split["shards"] if shard["file"] == name]:
                if draw(st.integers(0, 9)):
                    shard |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
                    if draw(st.integers(0, 2)):
                        files.pop("index.npz", None)
            files["dataset.json"] = json.dumps(record).encode()
    return files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@cases(700)
@given(data=st.data(), tolerated=st.sampled_from([0.0, 0.2, 1.0]), balanced=st.booleans())
def test_datasets(place, counts, dataset, data, tolerated, balanced):
    write(place / "data", data.draw(damages(dataset)))
    before = files_below(place)
    status = 0
    with limits(), contextlib.redirect_stderr(io.StringIO()):
        try:
            info = open_dataset(place / "data")
            for split in info.splits:
                SplitReader(info, split)
            source = open_images(place / "data", "train", seed=0, balanced=balanced, tolerated=tolerated)
            for first in range(0, 2 * len(source), 5):
                batch = source.batch(first, 5)
                assert batch.image_BCHW.shape == (5, *info.image_shape)
                assert int(batch.c_B.min()) >= 0 and int(batch.c_B.max()) < info.num_classes
        except UserError:
            status = 2
    after = files_below(place)
    assert {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)} <= {"data/index.npz"}
    counts["datasets", status] += 1


DRY_RUN = "train --dry-run --model"


@cases(200)
@given(data=st.data())
def test_datasets_of_a_dry_run(place, counts, dataset, data):
    write(place / "data", data.draw(damages(dataset)))
    argv = f"{DRY_RUN} edm2-digits --data data --init none model.posterior.weights=null".split()
    counts["datasets of a dry run", check(place, argv)] += 1


LABELS = {"labels": [[f"{'ab'[i % 2]}/{i}.png", i % 2] for i in range(6)]}


@cases(100)
@given(data=st.data(), packed=st.booleans())
def test_images_to_prepare(place, counts, data, packed):
    """A damaged list of labels in a folder, or in a zip file that may be torn besides."""
    labels = json.dumps(LABELS).encode()
    labels = data.draw(st.sampled_from([labels, wrong_json(data.draw, labels)]))
    files = {"dataset.json": labels} | {name: OTHER_PNG[1] for name, _ in LABELS["labels"]}
    write(place / "photos", {} if packed else files)
    if packed:
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", data.draw(st.sampled_from([0, 8, 12]))) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        (place / "photos.zip").write_bytes(torn(data.draw, buffer.getvalue()))
    argv = ["prepare", "images", "photos.zip" if packed else "photos", "new", "--resolution", "8", "--shard-size", "2"]
    counts["images to prepare", check(place, argv)] += 1


TRAIN = "train --model edm2-digits --objective mle --data data --init none --engine local --out run train.images=8 "
TRAIN += "train.batch=4 train.checkpoint_every=4 objective.lam=0"


@cases(40)
@given(data=st.data())
def test_datasets_of_a_training(place, counts, dataset, data):
    write(place / "data", data.draw(damages(dataset)))
    shutil.rmtree(place / "run", ignore_errors=True)
    counts["datasets of a training", check(place, TRAIN.split(), may_write=("run", "data/index.npz"))] += 1


@pytest.fixture(scope="module")
def run(place, dataset) -> Files:
    """The files of a finished run of two steps."""
    write(place / "data", dataset)
    assert check(place, TRAIN.split(), may_write=("run",), keep=True) == 0
    return read(place / "run")


@st.composite
def damaged_files(draw, files: Files, names: list[str]) -> Files:
    """Some of these files damaged or gone."""
    files = dict(files)
    for name in draw(st.sets(st.sampled_from(names), min_size=1, max_size=3).map(sorted)):
        if not draw(st.integers(0, 9)):
            del files[name]
        else:
            files[name] = wrong_json(draw, files[name]) if name.endswith(".json") else torn(draw, files[name])
    return files


@cases(100)
@given(data=st.data())
def test_checkpoints(place, counts, run, data):
    names = sorted(name for name in run if name.startswith("checkpoints"))
    write(place / "run", data.draw(damaged_files(run, names)))
    with limits():
        found, _ = newest_checkpoint(place / "run")
    if found is not None:
        whole = {name: run[name] for name in run if name.startswith(f"checkpoints/{found.name}/") and not name.endswith(MANIFEST)}
        assert whole and whole.items() <= read(place / "run").items()
    counts["checkpoints", 0 if found else 2] += 1


@cases(25)
@given(data=st.data())
def test_runs_gone_on_with(place, counts, dataset, run, data):
    write(place / "data", dataset)
    write(place / "run", data.draw(damaged_files(run, sorted(run))))
    counts["runs gone on with", check(place, f"{TRAIN} train.images=12".split(), may_write=("run",))] += 1


DRAW = "sample.steps=1 sample.batch=2 --out new --count=2"
USES = {
    "edm2-digits": [f"sample weights --model edm2-digits {DRAW}", f"{DRY_RUN} edm2-digits --init weights"],
    "var-digits": [f"sample weights --model var-digits {DRAW}", "convert weights new.pth"],
    "digits-tokenizer": [f"{DRY_RUN} var-digits --init none model.tokenizer=weights", "convert weights new.pth"],
    "digits-posterior": ["convert weights new --half"],
    "digits-classifier": ["convert weights new --half"],
}


@cases(200)
@given(name=st.sampled_from(sorted(USES)), data=st.data())
def test_weights(place, counts, name, data):
    files = {path.name: path.read_bytes() for path in (BUNDLED / name).iterdir() if path.is_file()}
    tensors = files["model.safetensors"]
    if data.draw(st.booleans()):
        end = 8 + int.from_bytes(tensors[:8], "little")
        header = wrong_json(data.draw, tensors[8:end])
        files["model.safetensors"] = len(header).to_bytes(8, "little") + header + tensors[end:]
    else:
        files = data.draw(damaged_files(files, ["config.json", "config.json", "model.safetensors"]))
    write(place / "weights", files)
    counts["weights", check(place, data.draw(st.sampled_from(USES[name])).split())] += 1


ROW = {"accuracy": {"mean": 0.9, "std": 0.01}, "fd": {"mean": 2.0, "std": 0.1}, "cfd": 3.0, "precision": 0.9, "recall": 0.8}
ROW |= {"gamma": 0.5, "lam": 1.0, "forwards_per_image": 23, "images_per_second": {"median": 412.0, "runs": [399.6, 412.0]}}
SWEEP = {
    name: [{key: w, "cfd": 60.0, "precision": 0.8, "recall": 0.9} for w in (0.1, 1)]
    for name, key in (("cfg", "gamma"), ("mclr", "lam"))
}
MORE = {"gap_closed": 0.9, "sweep": SWEEP, "compute": {"images_seen": 38400, "step_time_over_mle": 1.4}}
RESULTS = {
    "judge": {"network": "a classifier", "test_accuracy": 0.989},
    "phases": [{"name": "judge", "seconds": 31.25}],
    "edm2-digits": dict.fromkeys(("base", "control", "cfg", "mclr"), ROW) | MORE | {"grids": {"base": "grids/base.png"}},
}


@cases(150)
@given(data=st.data(), markdown=st.integers(0, 3).map(bool))
def test_results(place, counts, data, markdown):
    write(place / "tour", {"results.json": wrong_json(data.draw, json.dumps(RESULTS).encode())})
    counts["results", check(place, ["report", "tour", "--out", "page", *["--markdown"][:markdown]])] += 1


SAMPLE = "sample edm2-digits --out samples --count=20 sample.steps=1 sample.batch=20 --npz"
EVALUATE = [
    "evaluate samples --reference samples/samples.npz --judge digits-classifier",
    "evaluate samples/samples.npz --reference samples --judge digits-classifier",
    "evaluate samples",
]


@pytest.fixture(scope="module")
def samples(place, digits) -> Files:
    shutil.copytree(digits, place / "data/digits", dirs_exist_ok=True)
    assert check(place, SAMPLE.split(), keep=True) == 0
    return read(place / "samples")


@cases(150)
@given(data=st.data())
def test_samples(place, counts, samples, data):
    files = data.draw(damaged_files(samples, ["sample.json", "samples.npz", *sorted(samples)[:4]]))
    write(place / "samples", files)
    argv = data.draw(st.sampled_from([*EVALUATE, SAMPLE])).split()
    counts["samples", check(place, argv, may_write=("samples",))] += 1
