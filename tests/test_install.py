"""Installed elsewhere: the wheel and the sdist hold all files, and work from a folder with its own models/, train.py and kernels/."""

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("mclr", "kernels", "models", "configs", "train", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# Prints the files that were imported as two modules, and the modules of ours that are not from the folder FROM.
WATCH = """
import os, sys
def report(place):
    files = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        below = file and os.path.isfile(file) and os.path.relpath(os.path.realpath(file), os.path.realpath(place))
        # a checkout may hold the environment that runs it
        if below and not below.startswith("..") and "site-packages" not in below:
            files.setdefault(os.path.realpath(file), set()).add(id(module))
    print("twice:", sorted(file for file, found in files.items() if len(found) > 1))
    print("files:", len(files))
"""


def build(what, tree, out):
    subprocess.run([sys.executable, "-c", BUILD, what, str(out)], cwd=tree, check=True, capture_output=True)
    (found,) = out.iterdir()
    return found


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, where building leaves its files; first by way of the sdist, which must make the same."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        copy = shutil.copy if (ROOT / name).is_file() else shutil.copytree
        copy(ROOT / name, tree / name, **({} if copy is shutil.copy else {"symlinks": True}))
    sdist = build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))
    again = tmp_path_factory.mktemp("again")
    with tarfile.open(sdist) as archive:
        archive.extractall(again, filter="data")
    (unpacked,) = again.iterdir()
    by_sdist = build("build_wheel", unpacked, tmp_path_factory.mktemp("by_sdist"))
    whole = build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))
    assert contents(by_sdist) == contents(whole)
    return whole


def test_the_wheel_holds_every_file_under_mclr_alone(wheel):
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    # as the links in mclr/ show them
    wanted = {
        f"mclr/{path.relative_to(ROOT).as_posix()}".replace("mclr/mclr/", "mclr/")
        for room in ("mclr", "kernels", "models", "configs", "train")
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and path.suffix in (".py", ".typed", ".yaml", ".json", ".safetensors", ".example")
        and "family" not in path.parts
    }
    assert {name for name in wanted - names} == set()
    assert {name.split("/")[0] for name in names} == {"mclr"}


def test_an_installation_trains_samples_and_converts_in_a_folder_of_the_users(wheel, tmp_path):
    home, python = tmp_path / "env", tmp_path / "env/bin/python"
    venv.create(home, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (site,) = home.glob("lib/python3*/site-packages")
    # the packages of this environment, behind what is installed there
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    work = tmp_path / "work"
    for name in ("models", "kernels", "configs"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    (work / "train.py").write_text("raise SystemExit('the wrong module')")
    program = WATCH + (
        "from mclr.train.cli import main\n"
        "steps = ['train.images=8', 'train.batch=4']\n"
        "assert main(['train', '--model', 'edm2-digits', '--objective', 'mclr', '--out', 'run', *steps]) == 0\n"
        "few = ['--count', '2', 'sample.steps=2', 'sample.batch=2']\n"
        "assert main(['sample', 'run', '--out', 'samples', *few]) == 0\n"
        "assert main(['convert', 'run/weights', 'half', '--half']) == 0\n"
        "import mclr\n"
        "assert mclr.load('half', device='cpu').sample([3], steps=2).shape == (1, 1, 8, 8)\n"
        "import mclr.train.bench.ranks\n"
        f"assert {str(site / 'mclr')!r} not in sys.path, sys.path\n"  # `import models` would give ours
        f"report({str(site / 'mclr')!r}); report({str(work)!r}); report({str(ROOT)!r})\n"
    )
    ran = subprocess.run([python, "-c", program], cwd=work, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [line for line in ran.stdout.splitlines() if line.startswith(("twice:", "files:"))]
    assert found[::2] == ["twice: []"] * 3
    ours, theirs, checkout = (int(line.split()[1]) for line in found[1::2])
    assert ours > 60 and theirs == 0 and checkout == 0
    assert len(list((work / "samples/images").iterdir())) == 2 and (work / "half/model.safetensors").is_file()
    # the command itself, which answers without torch
    helped = subprocess.run([home / "bin/mclr", "--help"], cwd=work, capture_output=True, text=True)
    assert helped.returncode == 0 and "usage: mclr COMMAND" in helped.stdout


@pytest.mark.parametrize(
    "command",
    [
        "main('mclr.train.cli', 'train', '--help')",
        "main('train.sample', '--help')",
        "main('kernels.bench', '--help')",
        "runpy.run_path('train/run.py', run_name='__main__')",
    ],
)
def test_no_file_is_imported_under_two_names(command):
    """Operations register once. In a checkout, by every way that commands are started."""
    program = WATCH + (
        "import runpy\n"
        "def main(module, *argv):\n"
        "    sys.argv = [module, *argv]\n"
        "    runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "sys.argv = ['train/run.py', '--help']\n"
        "try:\n"
        f"    {command}\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error\n"
        "finally:\n"
        "    report('.')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "twice: []" in ran.stdout and int(ran.stdout.split("files:")[-1]) > 5
