"""The rules of the house: imports go one way, the core is bare, some calls are banned, and no text points outside the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "mclr", "models", "configs", "train")
BESIDE = tuple(f"mclr.{package}." for package in PACKAGES if package != "mclr")
MODULES = {path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}

# What a package may import beside the standard library and itself: kernels <- {mclr, models} <- train.
ALLOWED = {
    "kernels": {"torch", "triton"},
    "mclr": {"torch", "numpy", "einops", "kernels"},
    "models": {"torch", "numpy", "einops", "timm", "torchvision", "safetensors", "kernels", "mclr.errors"},
    "configs": {"pydantic", "yaml", "mclr.errors"},
}
# files of the bench: what others wrote is timed, and plots are drawn
ALLOWED_BESIDE = {"kernels/arms.py": {"liger_kernel"}, "kernels/results.py": {"matplotlib"}}
# The entry points stand above everything; pydantic stays in configs/, tests/ is imported by nobody.
FORBIDDEN_IN_TRAIN = {"pydantic", "tests"}
HEAVY = ("deepspeed", "pydantic", "webdataset", "yaml", "huggingface_hub", "tqdm", "sklearn", "matplotlib", "PIL", "timm")


def imports(source: str) -> set[str]:
    """Dotted names that a module imports, wherever it does: `from a.b import c` gives a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    # a file's one name begins with mclr.; rooms beside mclr/ are known by their folder here
    return {name.removeprefix("mclr.") if f"{name}.".startswith(BESIDE) else name for name in names}


def name_of(module: str) -> str:
    """mclr/a.py -> mclr.a, kernels/b.py -> mclr.kernels.b"""
    dotted = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return dotted if dotted.split(".")[0] == "mclr" else f"mclr.{dotted}"


def is_part_of(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


def forbidden(module: str, source: str) -> set[str]:
    """The imports of a module that its package may not have."""
    package = module.split("/")[0]
    names = {name for name in imports(source) if name.split(".")[0] not in sys.stdlib_module_names | {package}}
    if package == "train":
        return {name for name in names if is_part_of(name, FORBIDDEN_IN_TRAIN)}
    outside = {name for name in names if not is_part_of(name, ALLOWED[package] | ALLOWED_BESIDE.get(module, set()))}
    if package == "configs":
        # dataclasses that describe a component
        outside = {name for name in outside if not (is_part_of(name, {"mclr", "models"}) and name.endswith("Config"))}
    return outside


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert forbidden(module, MODULES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels/a.py", "import mclr.objective"),
        ("kernels/a.py", "import numpy"),
        ("kernels/a.py", "def f():\n    import matplotlib"),
        ("kernels/a.py", "import liger_kernel"),
        ("kernels/arms.py", "def f():\n    import matplotlib"),
        ("kernels/results.py", "import liger_kernel"),
        ("kernels/bench.py", "import matplotlib"),
        ("mclr/a.py", "from mclr.models.edm2 import EDM2"),
        ("mclr/a.py", "def f():\n    from mclr.train import step"),
        ("mclr/a.py", "import mclr.configs.schema as schema"),
        ("mclr/a.py", "import timm"),
        ("models/a.py", "from mclr.diffusion import Diffusion"),
        ("models/a.py", "from mclr import diffusion"),
        ("models/a.py", "import deepspeed"),
        ("configs/schema.py", "from mclr.models.edm2 import EDM2"),
        ("configs/schema.py", "import torch"),
        ("train/a.py", "import pydantic"),
    ],
)
def test_a_wrong_import_is_noticed(module, line):
    assert len(forbidden(module, line)) == 1


def test_the_core_imports_without_the_rest():
    """mclr/ and models/ need torch, numpy, einops and safetensors alone: a bare GPU machine has no more."""
    modules = [name_of(module) for module in MODULES if module.startswith(("mclr/", "models/"))]
    program = (
        "import sys, importlib, torch, numpy, einops, safetensors.torch\n"
        f"sys.modules.update(dict.fromkeys({(*HEAVY, 'mclr.train', 'mclr.configs')}))\n"
        f"for name in {modules}: importlib.import_module(name)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_says_what_lives_there(module):
    source = MODULES[module].read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert source.startswith('"""') and docstring and len(docstring.splitlines()[0]) > 20


BANS = {
    "pickle runs code": (r"pickle\.load", PACKAGES),
    "so does torch.load, unless told not to": (r"torch\.load\((?!.*weights_only=True)", PACKAGES),
    "subprocess, with a list": (r"os\.system|shell=True", PACKAGES),
    "networks draw nothing": (r"torch\.(rand|normal|bernoulli|multinomial)\w*\(", ("models",)),
    "random numbers come from Draws": (
        r"torch\.(rand|normal|bernoulli|multinomial|manual_seed)\w*\(|np\.random\.(?!Generator|Philox)",
        ("mclr",),
    ),
    "a step never waits for the device": (r"\.item\(|\.tolist\(|\.cpu\(", ("train/training/step.py",)),
}


@pytest.mark.parametrize("reason", BANS)
def test_bans(reason):
    pattern, where = BANS[reason]
    lines = [
        f"{module}:{number}: {line.strip()}"
        for module, path in MODULES.items()
        if module.startswith(where)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert lines == []


def test_the_objective_is_short():
    assert len(MODULES["mclr/objective.py"].read_text().splitlines()) < 200


def test_no_text_points_outside_the_tree():
    """No absolute paths of the machine a file was written on, nothing above the root, no notes that are not in the tree."""
    # in pieces, so that this file has none of them
    places = "|".join(["work", "home", "root", "Users"])
    notes = "|".join(["theory", "design", "field-" + "notes", "BRIEF"])
    pattern = re.compile(rf"(?<![\w./:])/({places})/|\.\./" + rf"shared|\b({notes})\.md\b|(?i:\bissue" + r"\s*#?\d)")
    folders = [path for name in (*PACKAGES, "tests", ".ci") for path in sorted((ROOT / name).rglob("*"))]
    found = []
    for path in [*sorted(ROOT.glob("*")), *folders]:
        if not path.is_file() or path.suffix in (".npz", ".safetensors", ".pyc", ".png", ".tar", ".pkl", ".gz"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_what_points_outside_would_be_noticed(tmp_path, monkeypatch):
    for text in ("/" + "work/main", "see .." + "/shared", "theory" + ".md", "issue" + " #3"):
        (tmp_path / "README.md").write_text(text)
        monkeypatch.setitem(globals(), "ROOT", tmp_path)
        with pytest.raises(AssertionError):
            test_no_text_points_outside_the_tree()
