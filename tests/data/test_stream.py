"""Streams: images and conditions arrive as they lie in the shards, from any number of shards; what is broken ends in one line, soon."""

import gc
import http.server
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import as_rank, is_alive
from photos import encoded, save_tar
from PIL import Image
from ranks import tiny

import mclr.train.data.stream
from mclr.configs.schema import Data
from mclr.errors import UserError
from mclr.train.cli import main
from mclr.train.data.images import center_crop
from mclr.train.data.stream import Reader, Stream


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """No pauses, no chance; and no reader outlives its test, into whose successors' output it would write."""
    monkeypatch.setattr(mclr.train.data.stream, "PAUSE", 0.0)
    monkeypatch.setattr(mclr.train.data.stream, "PATIENCE", 20.0)
    # the same draws every time
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    opened, init = [], Stream.__init__

    def noted(self, *args, **settings):
        init(self, *args, **settings)
        opened.append(self)

    monkeypatch.setattr(Stream, "__init__", noted)
    yield
    # whose __init__ raises has closed itself
    for stream in opened:
        stream.close()
    for reader in readers():
        reader.join(30)
    assert readers() == []


def readers():
    """The threads that read for any stream."""
    return [thread for thread in threading.enumerate() if isinstance(thread, Reader)]


def colour(c):
    return (20 * c, 255 - 20 * c, 7)


def png(c, size=(8, 8), kind="PNG"):
    return encoded(Image.new("RGB", size, colour(c)), kind, quality=100)


def shard(path, samples):
    """A tar file of (key, {suffix: content})."""
    return save_tar(path, [(f"{key}.{suffix}", content) for key, files in samples for suffix, content in files.items()])


def ten(first=0):
    return [(f"{first + c:04d}", {"png": png(c), "cls": str(c).encode()}) for c in range(10)]


def data(path, **settings):
    return Data(**({"name": "streamed", "path": path, "resolution": 8, "channels": 3, "num_classes": 10} | settings))


def conditions_of(image_BCHW):
    """As the colours say."""
    assert (image_BCHW == image_BCHW[:, :, :1, :1]).all()
    return (image_BCHW[:, 0, 0, 0] // 20).tolist()


@pytest.mark.parametrize(
    "notation", ["file://{}/{{0..2}}.tar", "pipe:cat {}/{{0..2}}.tar", "file://{0}/0.tar::file://{0}/{{1..2}}.tar"]
)
def test_images_and_conditions_arrive(tmp_path, notation, capsys):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", ten(10 * number))
    stream = Stream(data(notation.format(tmp_path)), seed=0)
    batches = [stream.batch(100 + first, 50) for first in range(0, 600, 50)]
    assert batches[0].image_BCHW.shape == (50, 3, 8, 8) and batches[0].image_BCHW.dtype == torch.uint8
    assert batches[0].c_B.dtype == torch.int64 and batches[0].tokens_BL is None
    for batch in batches:
        assert batch.c_B.tolist() == conditions_of(batch.image_BCHW)
    keys = stream.keys(100, 600)
    # every shard, in no order of its own
    assert len(set(keys)) == 30 and [int(key[-1]) for key in keys] == torch.cat([batch.c_B for batch in batches]).tolist()
    assert keys[0].startswith(("file:", "pipe:")) and sorted(keys[:30]) != keys[:30]
    assert (stream.damaged, len(stream)) == (0, 0) and stream.info.class_names == tuple("0123456789")
    assert stream.info.drawn is None and capsys.readouterr() == ("", "")


def test_local_shards_need_no_scheme(tmp_path):
    """Nor a name that a URL could hold."""
    (tmp_path / "my #1 data?").mkdir()
    for number in range(3):
        shard(tmp_path / f"my #1 data?/{number}.tar", ten(10 * number))
    stream = Stream(data(f"{tmp_path}/my #1 data?/{{0..2}}.tar"), seed=0)
    assert stream.data.streamed and stream.batch(0, 200).c_B.shape == (200,) and len(set(stream.keys(0, 200))) == 30


def test_which_paths_are_streams():
    assert all(data(path).streamed for path in ("data/{0..3}.tar", "file:data/a.tar", "pipe:cat a", "https://x/y", "s3://x"))
    assert not any(data(path).streamed for path in ("data/digits", "data/v1.5", "pipe", "a.tar/b"))


def test_images_of_other_sizes_and_kinds(tmp_path):
    samples = []
    for c, (size, kind) in enumerate([((16, 16), "PNG"), ((40, 20), "JPEG"), ((9, 33), "WEBP"), ((4, 5), "PNG")]):
        suffix = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
        samples.append((f"n0/{c}", {suffix: png(c, size, kind), "cls": b"%d\n" % c, "json": b"{}"}))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50), np.uint8))
    samples.append(("gray", {"png": encoded(noise), "cls": b"9"}))
    stream = Stream(data(f"file://{shard(tmp_path / 'a.tar', samples)}"), seed=0)
    batch = stream.batch(0, 100)
    for image, c in zip(batch.image_BCHW, batch.c_B.tolist(), strict=True):
        if c == 9:
            assert np.array_equal(image.permute(1, 2, 0), np.asarray(center_crop(noise.convert("RGB"), 8)))
        else:
            assert (image.float() - torch.tensor(colour(c))[:, None, None]).abs().max() <= 6
    assert set(batch.c_B.tolist()) == {0, 1, 2, 3, 9} and any(":n0/" in key for key in stream.keys(0, 100))


def test_one_shard_serves_any_number_of_readers_and_ranks(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", ten())
    monkeypatch.setattr(mclr.train.data.stream, "READERS", 3)
    orders = []
    for rank in (0, 1, 0):
        as_rank(monkeypatch, rank, 2)
        orders.append(Stream(data(f"pipe:cat {tmp_path}/a.tar"), seed=0).batch(0, 90).c_B.tolist())
        assert len(set(orders[-1])) == 10
        readers = [tuple(orders[-1][reader::3]) for reader in range(3)]
        assert len(set(readers)) == 3
    # by seed, rank and reader, whatever the threads do; and by the moment
    assert orders[0] == orders[2] != orders[1]
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert Stream(data(f"pipe:cat {tmp_path}/a.tar"), seed=0).batch(0, 90).c_B.tolist() != orders[0]


def damage(samples, *keys):
    for key, files in samples:
        if key in keys:
            files["png"] = files["png"][:40]
    return samples


def test_damaged_samples_are_passed_over_and_named_once(tmp_path, capsys):
    samples = damage([pair for first in range(0, 200, 10) for pair in ten(first)], "0003")
    samples[50][1].pop("cls")
    samples[60][1].pop("png")
    samples[70][1]["cls"] = b"cat"
    shard(tmp_path / "a.tar", samples)
    stream = Stream(data(f"file://{tmp_path}/a.tar", damaged=0.2), seed=0)
    batches = [stream.batch(first, 100) for first in range(0, 1500, 100)]
    assert all(batch.c_B.tolist() == conditions_of(batch.image_BCHW) for batch in batches)
    assert not {"0003", "0050", "0060", "0070"} & {key.rpartition(":")[2] for key in stream.keys(0, 1500)}
    lines = capsys.readouterr().err.splitlines()
    assert stream.damaged == len(lines) == 4 and stream.unreadable > 10
    faults = {"0003": "damaged", "0050": "no .cls, but .png;", "0060": "no image, but .cls;", "0070": "invalid literal"}
    for key, says in faults.items():
        (line,) = (line for line in lines if f"a.tar:{key} " in line)
        assert says in line and line.startswith("passed over: ")


DOTS = [(f"a.{c}.x", {"png": png(c), "cls": b"1"}) for c in range(3)]
APART = [*((key, {"png": files["png"]}) for key, files in ten()), *((key, {"cls": files["cls"]}) for key, files in ten())]


JSON = [("k", {"png": png(1), "json": b'{"id": 1, "y": 2}'})]


@pytest.mark.parametrize("samples, label, says", [
    (DOTS, "cls", "a.tar:a is damaged (it has no .cls, but .0.x.png, .0.x.cls, .1.x.png, .1.x.cls and 2 more; a key ends at the first"),
    (APART, "cls", "it has no .cls, but .png; a sample's files must follow each other in the tar file"),
    ([("k", {"png": png(1)})], "cls", "a.tar:k is damaged (it has no .cls, but .png; "),
    ([("k", {"cls": b"1", "txt": b"1"})], "cls", "it has no image, but .cls, .txt; "),
    (JSON, "cls", "no .cls, but .png, .json; data.label=json.NAME reads the entry NAME of the .json"),
    (JSON, "json.label", "has no label for data.label=json.label, but id, y"),
    ([("k", {"png": png(1), "json": b"[1]"})], "json.label", "has no label for data.label=json.label, but [1]"),
])  # fmt: skip
def test_what_a_sample_lacks_is_said_with_what_it_has(tmp_path, samples, label, says):
    shard(tmp_path / "a.tar", samples)
    with pytest.raises(UserError) as error:
        Stream(data(f"{tmp_path}/a.tar", damaged=0.0, label=label), seed=0)
    assert says in str(error.value) or (samples is APART and "it has no image, but .cls" in str(error.value))


def test_conditions_may_stand_in_json_files(tmp_path):
    samples = [(f"{c}", {"AVIF": png(c, kind="AVIF"), "json": b'{"meta": {"y": %d}}' % c}) for c in range(10)]
    stream = Stream(data(f"{shard(tmp_path / 'a.tar', samples)}", label="json.meta.y"), seed=0)
    batch = stream.batch(0, 100)
    assert (batch.image_BCHW[:, 0].float().mean((1, 2)) / 20).round().long().tolist() == batch.c_B.tolist()


ALL = [f"{c:04d}" for c in range(10)]


@pytest.mark.parametrize("bad, settings, says", [
    (["0003"], {"damaged": 0.01}, "samples read from .* are damaged, more than data.damaged=0.01; sample .*a.tar:0003 is damaged"),
    (["0003"], {"damaged": 0.0}, "^sample .*a.tar:0003 is damaged"),
    (ALL, {}, "11 of 11 samples read from"),
    (ALL, {"damaged": 1.0}, "no image came from"),
    ([], {"num_classes": 9}, r"has condition 9, outside of 0..8: correct data.num_classes"),
])  # fmt: skip
def test_too_much_damage_ends_the_run(tmp_path, monkeypatch, bad, settings, says):
    monkeypatch.setattr(mclr.train.data.stream, "PATIENCE", 2.0)
    shard(tmp_path / "a.tar", damage(ten(), *bad))
    with pytest.raises(UserError, match=says):
        Stream(data(f"file://{tmp_path}/a.tar", **settings), seed=0).batch(0, 1000)


@pytest.mark.parametrize("url, says", [
    ("file://{}/{{0..9}}.tar", "No such file or directory"),
    ("pipe:cat {}/nowhere.tar 2>/dev/null", "its command ended with status 1"),
    ("pipe:cat {}/a.tar && head -c 1000000 /dev/zero && exit 7", "its command ended with status 7"),
    ("pipe:head -c 3000 {}/a.tar", "unexpected end of data"),
    ("pipe:echo hello", "read failed|not be opened|empty|invalid|truncated|bad"),
    ("file://{}", "Is a directory"),
    ("file://{}/cut.tar", "unexpected end of data"),
    ("file://{}/empty.tar", "it holds no samples"),
    ("s3://bucket/a.tar", "no gopen handler"),
    ("file:///a{{.tar", "cannot be expanded"),
    ("file:///${{NOWHERE}}.tar", "cannot be expanded"),
])  # fmt: skip
def test_what_cannot_be_read_ends_in_one_line(tmp_path, capfd, url, says):
    (tmp_path / "cut.tar").write_bytes(shard(tmp_path / "a.tar", ten()).read_bytes()[:3000])
    shard(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=says) as error:
        Stream(data(url.format(tmp_path)), seed=0).batch(0, 1000)
    assert "\n" not in str(error.value) and "@ <" not in str(error.value)
    assert all("; trying again (" in line for line in capfd.readouterr().err.splitlines())


def test_a_command_that_never_answers(tmp_path, monkeypatch):
    """Nor outlives the stream, and what it has started neither, though the command itself has ended."""
    monkeypatch.setattr(mclr.train.data.stream, "PATIENCE", 1.0)
    url = f"pipe:sleep 100 & echo $! >> {tmp_path}/pids"
    with pytest.raises(UserError) as error:
        Stream(data(url), seed=0)
    assert str(error.value).startswith(f"no image came from {url} for 1 s: ")
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) >= 4 and not any(map(is_alive, pids))


def test_a_signal_before_the_first_image(tmp_path, monkeypatch):
    """Commands in sessions of their own hear of no Ctrl-C."""
    pids = tmp_path / "pids"

    def interrupted(stream):
        while not pids.exists():
            time.sleep(0.01)
        sys.exit(130)

    monkeypatch.setattr(Stream, "_next", interrupted)
    with pytest.raises(SystemExit):
        Stream(data(f"pipe:echo $$ >> {pids}; exec sleep 100"), seed=0)
    assert not any(map(is_alive, pids.read_text().split()))


def test_what_a_command_says_of_an_unread_end_is_not_heard(tmp_path, capfd):
    """The reader stops at a wrong condition, and nothing else is told or started."""
    shard(tmp_path / "a.tar", [pair for first in range(0, 1000, 10) for pair in ten(first)])
    with pytest.raises(UserError, match="has condition 9"):
        Stream(data(f"pipe:cat {tmp_path}/a.tar || exit 7", num_classes=9), seed=0).batch(0, 1000)
    gc.collect()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how, status", [("kill -9 $$", -9), ("exit 141", 141), ("exit 23", 23)])
def test_a_command_that_failed_between_two_samples(tmp_path, how, status):
    """A tar file does not say how long it is: half of one is whole but for the status."""
    shard(tmp_path / "a.tar", ten())
    with pytest.raises(UserError, match=rf"\(its command ended with status {status}\)"):
        Stream(data(f"pipe:head -c 8192 {tmp_path}/a.tar; {how}"), seed=0).batch(0, 1000)


def test_gsutil_is_ended_with_what_it_starts(tmp_path, monkeypatch):
    """A script that starts another process."""
    monkeypatch.setattr(mclr.train.data.stream, "PATIENCE", 1.0)
    (tmp_path / "gsutil").write_text(f"#!/bin/sh\nsleep 100 & echo $! >> {tmp_path}/pids; echo $* > {tmp_path}/asked; wait\n")
    (tmp_path / "gsutil").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"^no image came from gs://bucket/a b\.tar "):
        Stream(data("gs://bucket/a b.tar"), seed=0)
    pids = (tmp_path / "pids").read_text().split()
    assert pids and not any(map(is_alive, pids)) and (tmp_path / "asked").read_text() == "cat gs://bucket/a b.tar\n"


def test_a_run_that_is_refused_leaves_no_reader_behind(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").write_text("a file")
    assert main(run_over(f"pipe:cat {digits}/train/{{000000..000003}}.tar; exec sleep 100")) == 2
    assert readers() == []


def stalling(folder, always):
    """A command of two processes, the first of which writes its id and stalls, the first time or always."""
    shard(folder / "a.tar", ten())
    (folder / "get").write_text(
        f"if [ -e {folder}/pid ] && ! {str(always).lower()}; then cat {folder}/a.tar\n"
        f"else head -c 5000 {folder}/a.tar; echo $$ > {folder}/pid; exec sleep 100; fi\n"
    )
    return f"pipe:sh {folder}/get | cat"


def test_a_download_that_stalls_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mclr.train.data.stream, "READERS", 1)
    monkeypatch.setattr(mclr.train.data.stream, "STALLED", 0.5)
    batch = Stream(data(stalling(tmp_path, always=False)), seed=0).batch(0, 300)
    assert batch.c_B.tolist() == conditions_of(batch.image_BCHW)
    # and what stalled is gone, not only the shell around it
    assert not is_alive((tmp_path / "pid").read_text().strip())


def test_a_download_that_always_stalls_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mclr.train.data.stream, "STALLED", 0.2)
    monkeypatch.setattr(mclr.train.data.stream, "TRIES", 2)
    url = stalling(tmp_path, always=True)
    with pytest.raises(UserError) as error:
        Stream(data(url), seed=0)
    assert str(error.value).startswith(f"shard {url} cannot be read (nothing came for 0 s): ")


def run_over(url):
    """The command line of a tiny run."""
    settings = ["data.name=streamed", f"data.path={url}", "train.images=32", "train.batch=16", *tiny("edm2-digits", None)]
    return ["train", "--model", "edm2-digits", "--out", "run", *settings]


def test_a_run_leaves_no_reader_and_no_command_behind(digits, tmp_path, monkeypatch):
    """Though its commands would go on."""
    monkeypatch.chdir(tmp_path)
    assert main(run_over(f"pipe:echo $$ >> pids; cat {digits}/train/{{000000..000003}}.tar; exec sleep 100")) == 0
    pids = Path("pids").read_text().split()
    assert len(pids) >= 4 and not any(map(is_alive, pids))
    assert readers() == []


def test_what_comes_slowly_does_not_stall(tmp_path, monkeypatch, capfd):
    """A reader that gives nothing yet, but reads: the buffer it draws from is not full."""
    monkeypatch.setattr(mclr.train.data.stream, "STALLED", 1.5)
    shard(tmp_path / "a.tar", ten())
    monkeypatch.setattr(mclr.train.data.stream, "PATIENCE", 4.5)
    # longer than that in all, but not between any two samples
    slow = f"(head -c 10240; sleep 0.8; head -c 10240; sleep 0.8; cat; sleep 0.8) < {tmp_path}/a.tar"
    with pytest.raises(UserError, match="no image came from"):
        Stream(data(f"pipe:{slow}"), seed=0)
    # nothing was ended and tried again
    assert capfd.readouterr().err == ""


class Shards(http.server.BaseHTTPRequestHandler):
    """/flaky.tar fails every other time; anything else is not there."""

    content, asked = b"", 0

    def do_GET(self):
        type(self).asked += 1
        if self.path != "/flaky.tar":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content if self.asked % 2 else self.content[:3000])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "content", shard(tmp_path / "a.tar", ten()).read_bytes())
    monkeypatch.setattr(Shards, "asked", 0)
    # one at a time, so that one failure follows one success
    with http.server.HTTPServer(("127.0.0.1", 0), Shards) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_that_breaks_off_is_tried_again(server, monkeypatch, capfd):
    monkeypatch.setattr(mclr.train.data.stream, "READERS", 1)
    batch = Stream(data(f"{server}/flaky.tar"), seed=0).batch(0, 100)
    assert batch.c_B.tolist() == conditions_of(batch.image_BCHW) and Shards.asked > 4
    assert all("; trying again (" in line for line in capfd.readouterr().err.splitlines())


def test_a_page_that_is_not_there(server):
    with pytest.raises(UserError, match=r"nothing.tar cannot be read \(its command ended with status 22\)"):
        Stream(data(f"{server}/nothing.tar"), seed=0)
