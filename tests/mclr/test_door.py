"""`import mclr`: its names are there, documented, and cost nothing before they are used."""

import inspect
import json
import subprocess
import sys

import pytest

import mclr


def test_importing_costs_what_torch_costs_and_training_needs_nothing_of_the_rest():
    """Loss and its parts need no configuration, no files, and nothing of train/."""
    names = [name for name in mclr.__all__ if name not in ("load", "Model", "UserError")]
    code = "import sys, json, torch; old = set(sys.modules); import mclr; dir(mclr); new = sorted(set(sys.modules) - old)\n"
    code += f"[getattr(mclr, name) for name in {names}]; print(json.dumps([new, list(sys.modules)]))"
    new, modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert new == ["mclr"]
    assert not {"deepspeed", "pydantic", "yaml", "webdataset", "mclr.train", "mclr.configs", "mclr.models"} & set(modules)


@pytest.mark.parametrize("name", mclr.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(mclr, name)
    assert name in dir(mclr) and inspect.getdoc(found)
    assert inspect.ismodule(found) or inspect.getmodule(found).__name__.startswith("mclr")


def test_type_checkers_see_the_same_names():
    """Those of the TYPE_CHECKING block, from the same modules."""
    imports = [line.split(maxsplit=3) for line in inspect.getsource(mclr).splitlines() if line.startswith("    from ")]
    seen = {place: tuple(names.split(", ")) for _, place, _, names in imports}
    assert seen == {"mclr": ("metrics",)} | {f"mclr.{place}": names for place, names in mclr.PLACES.items()}
    assert sorted(sum(seen.values(), ())) == sorted(mclr.__all__)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="module mclr has no attribute los"):
        mclr.los  # noqa: B018
