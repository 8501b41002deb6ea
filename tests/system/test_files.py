"""Files and folders appear whole or not at all, and what stands in their way is named in one line."""

import json
import os
import pwd
import subprocess
import sys

import pytest
from launch import ROOT, environment

from mclr.errors import UserError
from mclr.train.system import files
from mclr.train.system.files import cache_folder, new_folder, write_file, write_json


def no_room(*args):
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_file(path, b"old")
    write_json(path, {"name": "é", "values": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"name": "é", "values": [1, 2.5, None]}
    before = path.read_bytes()
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr(os, step, no_room)
            write_file(path, b"new")
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, UserError, FileNotFoundError])
def test_a_failed_folder_vanishes(tmp_path, interruption):
    with pytest.raises(interruption), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("content")
        raise interruption
    assert os.listdir(tmp_path) == []


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    for path, says in (
        (tmp_path / "file", "exists already"),
        (tmp_path / "folder", "exists already"),
        (tmp_path / "file" / "below", "below a regular file"),
        ("/proc/nowhere/folder", "cannot write"),
        (tmp_path / ("long" * 100), "name too long"),
    ):
        with pytest.raises(UserError, match=says) as error, new_folder(path):
            raise AssertionError("the body must not run")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "file" / "below", tmp_path / "nowhere" / "file", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot write"):
            write_file(path, b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_folder_that_one_is_in_stays(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for path in (".", "below/..", here):
        for replace in (False, True):
            with pytest.raises(UserError, match="is the folder that you are in"), new_folder(path, replace):
                raise AssertionError("the body must not run")
    for path in ("..", "/"):
        with pytest.raises(UserError, match="exists already"), new_folder(path):
            raise AssertionError("the body must not run")
    assert os.listdir(tmp_path) == ["here"] and os.listdir() == []


def test_what_is_written_elsewhere_needs_no_current_folder(tmp_path, monkeypatch):
    """A run that lives longer than the folder that it was started in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for name in ("new", "here"):
        with new_folder(tmp_path / name) as folder:
            (folder / "file").write_text("content")
        assert (tmp_path / name / "file").read_text() == "content"


def test_a_folder_appears_or_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "parent" / "folder"
    with new_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "old").write_text("old")
        assert not path.exists() and folder.parent == path.parent
    assert (path / "deep" / "old").read_text() == "old"
    with pytest.raises(ValueError), new_folder(path, replace=True):
        raise ValueError
    assert os.listdir(path) == ["deep"]
    with new_folder(path, replace=True) as folder:
        (folder / "new").write_text("new")
        assert os.listdir(path) == ["deep"]
    assert os.listdir(path) == ["new"] and os.listdir(path.parent) == ["folder"]
    with pytest.raises(UserError, match="exists already"), new_folder(path / "new", replace=True):
        raise AssertionError("a file is not replaced")


def test_a_file_in_a_new_folder_that_cannot_be_written_is_told_by_the_folders_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError) as error, new_folder(tmp_path / "folder") as folder:
        write_file(folder / "file", b"content")
    assert str(error.value).startswith(f"cannot write {tmp_path / 'folder'} (No space left on device): ")
    assert os.listdir(tmp_path) == []


def test_a_folder_taken_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="not empty"), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("theirs")
    assert (tmp_path / "folder" / "file").read_text() == "theirs" and os.listdir(tmp_path) == ["folder"]


def test_a_user_without_a_home_has_a_temporary_cache(tmp_path, monkeypatch, capsys):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    files._temporary_cache.cache_clear()
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.is_dir() and cache_folder() == folder
    assert capsys.readouterr().err == f"this user has no home: caches go to {folder}, or where XDG_CACHE_HOME says\n"
    files._temporary_cache.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: 1234567)
    (tmp_path / "mclr-1234567").mkdir()
    with pytest.raises(UserError, match="it belongs to another user"):
        cache_folder()


# a file system that refuses the calls in the variable SHIM, as CIFS, FUSE and some network mounts do
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
static int on(const char *what) { const char *s = getenv("SHIM"); return s && strstr(s, what); }
static int refuse(int number) { errno = number; return -1; }
int fsync(int fd) {
  struct stat st;
  if (on("fsync-dir") && fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) return refuse(EINVAL);
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int chmod(const char *p, mode_t m) {
  if (on("chmod")) return refuse(EPERM);
  return ((int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "chmod"))(p, m); }
int flock(int fd, int how) {
  if (on("flock")) return refuse(ENOLCK);
  return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, how); }
int rename(const char *a, const char *b) {
  struct stat st;
  if (on("rename-dir") && stat(a, &st) == 0 && S_ISDIR(st.st_mode)) return refuse(ENOSYS);
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(a, b); }
"""
TRAIN = ["train", "--model", "var-digits", "--objective", "mle", "--out", "run", "train.images=32", "train.batch=16"]


GOES_ON = "going on without"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path, "-ldl"], input=SHIM, text=True, check=True)
    return path


@pytest.mark.parametrize(
    ("refused", "more", "status", "says"),
    [
        (
            "chmod fsync-dir flock",
            ["--no-lock"],
            0,
            [
                f"the file system of run/lock has no locks (No locks available): {GOES_ON}",
                f" has no syncing of folders (Invalid argument): {GOES_ON}",
            ],
        ),
        ("flock", [], 2, ["the file system of run has no locks", "--no-lock"]),
        ("rename-dir", [], 2, ["cannot rename folders (Function not implemented), as checkpoints need"]),
    ],
)
def test_a_run_does_without_what_safety_does_not_need(refused, more, status, says, shim, digits, tmp_path):
    """Each lack is reported once. A run that is refused has not begun."""
    program = environment() | {"LD_PRELOAD": str(shim), "SHIM": refused, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mclr.train.cli", *TRAIN, "--data", str(digits), *more]
    ran = subprocess.run(command, cwd=tmp_path, env=program, capture_output=True, text=True)
    said, run = ran.stdout + ran.stderr, tmp_path / "run"
    assert ran.returncode == status and all(said.count(each) == 1 for each in says), said
    assert said.count(GOES_ON) == (len(says) if status == 0 else 0), said
    done = status == 0
    assert (run / "weights" / "model.safetensors").exists() == (run / "metrics.jsonl").exists() == done
    assert not list(run.glob(".tmp-*"))
