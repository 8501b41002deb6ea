"""train/cli.py: exit statuses, one line per error, and a dispatcher that imports nothing it does not need."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mclr
from mclr.errors import UserError
from mclr.train import cli


def raises(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (lambda argv: None, 0, ""),
        (lambda argv: 3, 3, ""),
        (raises(UserError("no folder x: make it")), 2, "error: no folder x: make it\n"),
        (raises(UserError("two\n  lines")), 2, "error: two lines\n"),
        (raises(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_run_returns_the_status_and_says_why_in_one_line(main, status, line, capsys):
    assert cli.run(main, []) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


# a command that writes to its streams in many ways, then leaves a file as a sign that it finished
WORK = """
import logging, os, sys, warnings, tqdm
from mclr.train.system.console import run_and_exit
def main(argv):
    for stream in (sys.stdout, sys.stderr):
        logging.getLogger(str(stream)).addHandler(logging.StreamHandler(stream))
    with tqdm.tqdm(total=3, mininterval=0) as bar:
        for i in range(3):
            print("step", i)
            print("step", i, file=sys.stderr, flush=True)
            warnings.warn(f"step {i}")
            for logger in logging.root.manager.loggerDict:
                logging.getLogger(logger).warning("step %d", i)
            os.write(1, b"from C")
            bar.update()
    open(sys.argv[1], "w").write("done")
    return 7
run_and_exit(main)
"""


@contextlib.contextmanager
def stream(kind):
    """A file descriptor that cannot be written."""
    if kind == "full":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, number = os.pipe()
        os.close(reader)
    yield number
    os.close(number)


@pytest.mark.parametrize("kind", ["pipe", "full"])
@pytest.mark.parametrize("lost", ["stdout", "stderr"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_when_output_cannot_be_written(kind, lost, unbuffered, tmp_path):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    other = "stderr" if lost == "stdout" else "stdout"
    with stream(kind) as number:
        command = [sys.executable, "-c", WORK.replace('os.write(1, b"from C")', ""), str(tmp_path / "file")]
        ran = subprocess.run(command, **{lost: number, other: subprocess.PIPE}, env=environment, text=True)
    assert (ran.returncode, (tmp_path / "file").read_text()) == (7, "done")
    said = getattr(ran, other)
    assert said.count("step 2") >= 1 and "Traceback" not in said and "Exception" not in said


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_work_goes_on_when_streams_are_closed(closed, tmp_path):
    """And no file takes their place, for a C library to write into."""
    closing = "".join(f" {number}>&-" for number in closed.split())
    command = f"exec {sys.executable} -c '{WORK}' {tmp_path / 'file'} {closing}"
    ran = subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, (tmp_path / "file").read_text()) == (7, "done")
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("pipe", 141, ""),
        ("full", 2, "error: cannot write to stdout (No space left on device): make room, or send it elsewhere\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_an_answer_that_cannot_be_written_is_told(kind, status, line, arguments, unbuffered):
    """Silently, where nobody wants to read on."""
    with stream(kind) as stdout:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "mclr.train.cli", *arguments]
        ran = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True)
    assert (ran.returncode, ran.stderr) == (status, line)


ENDED = """
import atexit, os, signal
from mclr.train.system.console import run_and_exit
atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
run_and_exit(lambda argv: 7)
"""


def test_signals_after_the_work_change_nothing():
    ran = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (7, "")


def test_a_folder_with_programs_and_packages_of_these_names_is_not_in_the_way(tmp_path):
    """As a checkout of another project has them, with PYTHONPATH=. for its own programs."""
    for name in ("train", "sample", "cli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')")
    for name in ("models", "kernels", "configs", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('theirs')")
    environment = os.environ | {"PYTHONPATH": "."}
    for command in ([Path(sys.executable).with_name("mclr"), "train"], [sys.executable, Path(cli.__file__).with_name("run.py")]):
        dry = [*command, "--model", "var-digits", "--dry-run"]
        ran = subprocess.run(dry, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0 and "model      var-digits" in ran.stdout, ran.stderr


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ZeroDivisionError()])
def test_our_own_mistakes_are_let_through(error):
    """A broken pipe that is not stdout is one, too."""
    with pytest.raises(type(error)), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        cli.run(raises(error), [])


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mclr {mclr.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_and_an_example(argv, capsys):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, summary) in cli.PROGRAMS.items():
        assert f"  {name:10}{summary}" in lines
    assert lines[0].startswith("example: mclr ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trian", "error: unknown command trian; did you mean train?\n"),
        ("xyz", "error: unknown command xyz; known: train, sample, evaluate, report, prepare, convert\n"),
    ],
)
def test_an_unknown_command_is_one_line(name, line, capsys):
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == line


def test_the_rest_of_the_arguments_reaches_the_program(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "mclr.train.report", SimpleNamespace(main=lambda argv: seen.append(argv)))
    assert cli.main(["report", "--help", "runs/a"]) == 0
    assert seen == [["--help", "runs/a"]]


def test_help_and_typos_import_no_heavy_library():
    code = "import sys; from mclr.train.cli import main; main(['--help']); main(['x']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "deepspeed", "pydantic", "yaml"} & set(modules)


@pytest.mark.parametrize("command", [*cli.PROGRAMS, "tour", "prepare images", "prepare classifier"])
def test_help_begins_with_an_example(command, capsys):
    module = cli.PROGRAMS.get(command.split()[0], ("mclr.train.tour",))[0]
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([*command.split()[1:], "--help"])
    lines = capsys.readouterr().out.splitlines()
    example = " ".join(lines[:2]).partition(":")[2].split()
    wanted = ["python", "-m", "train.tour"] if command == "tour" else ["mclr", *command.split()]
    assert lines[0].startswith("example") and example[: len(wanted)] == wanted
