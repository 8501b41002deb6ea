"""The rules of the house: rooms import one way and in no circle, files stay readable, the core is bare, some calls are banned."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "mclr", "models", "configs", "train")
FILES = {path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {file: ast.parse(path.read_text()) for file, path in FILES.items()}

# A room imports those before it, and itself. Rooms in one line are beside each other: neither imports the other.
ORDER = (
    ("kernels",),
    ("mclr", "models"),
    ("configs",),
    ("system",),
    ("weights",),
    ("data",),
    ("engine",),
    ("training",),
    ("sampling",),
    ("scoring",),
    ("planning", "bench"),
    ("studies",),
    ("commands",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# the door of the public API reaches up, lazily; errors.py is what all rooms raise; kernels are what networks are built of
DOOR, ERRORS = "mclr/__init__.py", "mclr/errors.py"
# What rooms may import from other distributions; train/ is free, but pydantic stays in configs/ and nobody imports tests/.
OUTSIDE = {
    "kernels": {"torch", "triton"},
    "mclr": {"torch", "numpy", "einops"},
    "models": {"torch", "numpy", "einops", "timm", "torchvision", "safetensors"},
    "configs": {"pydantic", "yaml"},
}
# the bench times what others wrote
OUTSIDE_BESIDE = {"liger_kernel": "kernels"}
FORBIDDEN_IN_TRAIN = {"pydantic", "tests"}
HEAVY = ("deepspeed", "pydantic", "webdataset", "yaml", "huggingface_hub", "tqdm", "sklearn", "matplotlib", "PIL", "timm")
LINES, FILES_OF_A_ROOM, FUNCTION_LINES, PARAMETERS = 350, 16, 60, 7
# what a docstring says where a function passes a limit
REASONS = ("In one piece:", "Many parameters:")


def room_of(file: str) -> str:
    """kernels/op.py -> kernels; train/data/source.py -> data; train/run.py -> commands."""
    parts = file.split("/")
    return parts[0] if parts[0] != "train" else parts[1] if len(parts) > 2 else "commands"


def name_of(file: str) -> str:
    """The one name of a file: mclr/loss.py -> mclr.loss, kernels/op.py -> mclr.kernels.op."""
    dotted = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return dotted if dotted.split(".")[0] == "mclr" else f"mclr.{dotted}"


NAMES = {name_of(file): file for file in FILES}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, wherever it does: `from a.b import c` gives a.b.c."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> str | None:
    """The file that an imported name is in: a module's own, or that of the module which defines it."""
    return NAMES.get(name) or NAMES.get(name.rpartition(".")[0])


def faults(file: str, tree: ast.AST) -> list[str]:
    """The imports of a file that its room may not have."""
    room, found = room_of(file), []
    for name in imported(tree):
        top = name.split(".")[0]
        target = file_of(name)
        if target is not None:
            there = room_of(target)
            upwards = LEVEL[there] > LEVEL[room] or (LEVEL[there] == LEVEL[room] and there != room)
            if upwards and file != DOOR and target != ERRORS:
                found.append(name)
        elif top in (*PACKAGES, "tests"):
            found.append(name)
        elif top not in sys.stdlib_module_names:
            allowed = OUTSIDE.get(room)
            if top in FORBIDDEN_IN_TRAIN if allowed is None else top not in allowed and OUTSIDE_BESIDE.get(top) != room:
                found.append(name)
    return found


@pytest.mark.parametrize("file", FILES)
def test_rooms_import_one_way(file):
    assert faults(file, TREES[file]) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/a.py", "import mclr.objective"),
        ("kernels/a.py", "import numpy"),
        ("kernels/a.py", "import kernels.op"),
        ("mclr/a.py", "from mclr.models.edm2 import EDM2"),
        ("mclr/a.py", "def f():\n    from mclr.train.training import step"),
        ("mclr/a.py", "import mclr.configs.schema as schema"),
        ("mclr/a.py", "import matplotlib"),
        ("models/a.py", "from mclr.diffusion import Diffusion"),
        ("models/a.py", "import deepspeed"),
        ("configs/a.py", "import mclr.train.system.files"),
        ("configs/a.py", "import torch"),
        ("train/system/a.py", "from mclr.train.data.dataset import DatasetInfo"),
        ("train/data/a.py", "import mclr.train.training.step"),
        ("train/planning/a.py", "import mclr.train.bench.step"),
        ("train/studies/a.py", "from mclr.train.run import main"),
        ("train/a.py", "import pydantic"),
        ("train/a.py", "import tests.toy"),
    ],
)
def test_a_wrong_import_is_noticed(file, line):
    assert len(faults(file, ast.parse(line))) == 1


def circles(edges: dict[str, set[str]]) -> list[str]:
    """The nodes that reach themselves, sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(node for node in edges if node in reached(node))


def test_no_circle_between_files():
    edges = {
        file: {target for name in imported(tree) if (target := file_of(name)) and target != file}
        for file, tree in TREES.items()
        if file != DOOR
    }
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_files_and_rooms_stay_readable():
    lines = {file: path.read_text().count("\n") for file, path in FILES.items()}
    rooms = Counter(Path(file).parent.as_posix() for file in FILES if not file.endswith("__init__.py"))
    assert {file: count for file, count in lines.items() if count > LINES} == {}
    assert {room: count for room, count in rooms.items() if count > FILES_OF_A_ROOM} == {}


def test_the_whole_configuration_goes_no_further_than_launcher_and_builders():
    """Beside them stands what plans, describes or varies whole runs; every other part gets its own section."""
    launcher_and_builders = {"train/run.py", *(f"train/training/{name}.py" for name in ("launch", "build", "networks"))}
    of_whole_runs = {"train/planning/plan.py", "train/planning/footprint.py", "train/weights/model_card.py"}
    of_whole_runs |= {"train/bench/step.py", "train/studies/tour.py", "train/sampling/find.py", "train/sampling/generate.py"}
    rooms = {file: tree for file, tree in TREES.items() if file.startswith("train/")}
    named = {file for file, tree in rooms.items() if any(name.endswith(".RunConfig") for name in imported(tree))}
    assert named == launcher_and_builders | of_whole_runs


def too_large(tree: ast.AST, parameters: int = PARAMETERS) -> list[str]:
    """Functions of too many lines or parameters whose docstrings give no reason."""
    found = []
    # the docstring of a class speaks for its __init__
    of_class = {id(part): node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            large = (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES or count > parameters
            text = ast.get_docstring(of_class[id(node)] if node.name == "__init__" else node) or ""
            if large and not any(reason in text for reason in REASONS):
                found.append(node.name)
    return found


@pytest.mark.parametrize("file", FILES)
def test_functions_stay_readable(file):
    # a Triton kernel takes every pointer and every size by itself
    assert too_large(TREES[file], 99 if room_of(file) == "kernels" else PARAMETERS) == []


def test_a_large_function_is_noticed():
    many = ", ".join(f"a{i}" for i in range(PARAMETERS + 1))
    long = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    assert too_large(ast.parse(f"def f({many}):\n    pass")) == too_large(ast.parse(long)) == ["f"]
    assert too_large(ast.parse(f'def f({many}):\n    """Many parameters: one for each letter."""')) == []


@pytest.mark.parametrize("file", FILES)
def test_the_first_line_says_what_lives_there(file):
    docstring = ast.get_docstring(TREES[file])
    assert FILES[file].read_text().startswith('"""') and docstring and len(docstring.splitlines()[0]) > 20


@pytest.mark.parametrize("room", [room for room in LEVEL if room != "commands" and LEVEL[room] > LEVEL["configs"]])
def test_a_room_says_what_it_may_import(room):
    docstring = ast.get_docstring(TREES[f"train/{room}/__init__.py"])
    assert docstring and len(docstring.splitlines()) == 3 and "may import" in docstring


def test_the_core_imports_without_the_rest():
    """mclr/ and models/ need torch, numpy, einops and safetensors alone: a bare GPU machine has no more."""
    modules = [name_of(file) for file in FILES if room_of(file) in ("mclr", "models")]
    program = (
        "import sys, importlib, torch, numpy, einops, safetensors.torch\n"
        f"sys.modules.update(dict.fromkeys({(*HEAVY, 'mclr.train', 'mclr.configs')}))\n"
        f"for name in {modules}: importlib.import_module(name)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


BANS = {
    "pickle runs code": (r"pickle\.load", PACKAGES),
    "so does torch.load, unless told not to": (r"torch\.load\((?!.*weights_only=True)", PACKAGES),
    "subprocess, with a list": (r"os\.system|shell=True", PACKAGES),
    "networks draw nothing": (r"torch\.(rand|normal|bernoulli|multinomial)\w*\(", ("models",)),
    "random numbers come from Draws": (
        r"torch\.(rand|normal|bernoulli|multinomial|manual_seed)\w*\(|np\.random\.(?!Generator|Philox)",
        ("mclr",),
    ),
    "step.py itself reads no number back from the device": (r"\.item\(|\.tolist\(|\.cpu\(", ("train/training/step.py",)),
}


@pytest.mark.parametrize("reason", BANS)
def test_bans(reason):
    pattern, where = BANS[reason]
    lines = [
        f"{file}:{number}: {line.strip()}"
        for file, path in FILES.items()
        if file.startswith(where)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert lines == []


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
