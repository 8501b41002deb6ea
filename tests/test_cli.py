"""train/cli.py: exit statuses, one line per error, and a dispatcher that imports nothing it does not need."""

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_who_reads_is_no_error(unbuffered):
    unread, stdout = os.pipe()
    os.close(unread)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ran = subprocess.run([sys.executable, "-m", "mclr.train.cli"], stdout=stdout, stderr=subprocess.PIPE, env=environment)
    os.close(stdout)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_a_pipe_of_our_own_that_breaks_is_our_mistake():
    with pytest.raises(BrokenPipeError), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        cli.run(raises(BrokenPipeError(32, "Broken pipe")), [])


def test_run_lets_our_own_mistakes_through():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0, [])


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_and_an_example(argv, capsys):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, summary) in cli.PROGRAMS.items():
        assert f"  {name:10}{summary}" in lines
    assert any(line.startswith("example: mclr ") for line in lines)


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


@pytest.mark.parametrize("module", [module for module, _ in cli.PROGRAMS.values()])
def test_every_command_has_its_program(module):
    assert importlib.util.find_spec(module)


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
