"""The pages that users read: their length, their links, their commands, and the Python blocks as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mclr.train.cli import PROGRAMS

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "mclr/PYTHON.md",
    *(f"{room}/README.md" for room in ("mclr", "models", "kernels", "configs", "train")),
]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that are in this language; "" for commands."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_their_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) <= 200
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Every `mclr COMMAND`, `python -m MODULE` and launched program of a page is there."""
    text = (ROOT / page).read_text()
    modules = re.findall(r"-m ((?:mclr\.)?(?:train|kernels|configs)\.[\w.]*\w)", text)
    files = [ROOT / (module.removeprefix("mclr.").replace(".", "/") + ".py") for module in modules]
    files += [ROOT / path for path in re.findall(r"\b(train/\w+\.py)\b", text)]
    assert [str(file) for file in files if not file.exists()] == []
    commands = [line for block in blocks(page, "") for line in block.splitlines() if line.startswith("mclr ")]
    assert [line for line in commands if shlex.split(line, comments=True)[1] not in PROGRAMS] == []


@pytest.mark.parametrize(("page", "shown"), [("README.md", "model.save("), ("mclr/PYTHON.md", "mclr.from_logits(")])
def test_the_python_of_a_page_runs(page, shown, tmp_path):
    """In a folder of a user's own, block after block in one program."""
    program = "\n".join(blocks(page, "python"))
    assert "mclr.Loss(" in program and shown in program
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "weights/mine/model.safetensors").exists() == (page == "README.md")
