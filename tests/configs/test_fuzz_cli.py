"""Thousands of wrong settings and command lines: exit status 0 or 2, one line on stderr, no traceback, no file after an error."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
import yaml
from fuzz import cases, check
from hypothesis import given
from hypothesis import strategies as st

from mclr.configs.schema import PRESETS, dump, flatten, load
from mclr.train.data.images import png
from mclr.train.data.write import prepare_images
from mclr.train.weights.folder import BUNDLED

ROOT = Path(__file__).parent.parent.parent
counts = fuzz.counts

MODELS = sorted(path.stem for path in (PRESETS / "model").glob("*.yaml"))
QUICK = ["edm2-digits", "var-digits"]  # whose weights are bundled
KINDS = ("model", "objective", "data", "engine")
FILES = [path for kind in KINDS for path in sorted((PRESETS / kind).rglob("*.yaml"))]
SETTINGS = {key: value for model in QUICK for key, value in flatten(load(model, "mclr", "digits", "auto", [])).items()}
KEYS = sorted(SETTINGS)


def words(text: str, between: str | None = None) -> list[str]:
    return text.split(between)


NUMBERS = [
    *words("0 -1 1 2 3 7 0.5 -0.5 1e-3 1e308 1e400 -1e400 .inf -.inf .nan 1e 0x10 0o7 0b 0x 1__0 1:30 +1 1_000 1000 65536 65537"),
    *words("1048576 2147483647 2147483648 9223372036854775807 9223372036854775808"),
    *("9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000, "1." + "0" * 5000),
]
WORDS = [
    *words("null ~ true yes none auto mclr mle digits fresh a=b=c = . .. / - -- ~root é 数字 \u202e \U0001f600 ' \" %s%d{x}"),
    *("hf://", "hf://a", "http://x", "", "a b", "a\tb", "x" * 300, "x/" * 3000),
]
YAML = [
    *words("[ ] { } [] {} [1,2] [1,[2]] {a:1} @ ` # --- ... *a <<:*a 2001-01-01 2001-99-99 2001-12-14t21:59:43.10-05:00"),
    *words(r'"\0" "\ud800" "\udcff" "\x80" "\U00110000" "a\nb"'),
    *words("{a: 1};&a [*a];&a {b: *a};<<: *a;!!python/object:os.system x;!!python/object/apply:os.system ['true'];!!int x", ";"),
    *words("!!float x;!!bool x;!!null x;!!timestamp x;!!binary x;!!set {a, b};!!omap [a: 1];!!pairs [a: 1];!!str [a]", ";"),
    *words("!!map x;!!seq x;!x y;!<tag:yaml.org,2002:str> x;x: !!str\n  {a: b}: c;2001-01-01 25:61:61;? a;a: b: c;- a", ";"),
    *("%YAML 9.9\n---", "|\n a\n b", "[" * 50, "[" * 3000 + "]" * 3000, "{a: " * 2000 + "}" * 2000),
]
LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)), "train: {seed: *a11}"]
)
BASES = [*MODELS, "edm2-img64", "good.yaml", "case.yaml", "text.yaml", "fifo.yaml", "../x.yaml", "", 3, None]
# as a shell hands them over: bytes that are no UTF-8 are lone surrogates, and no argument holds NUL
RAW = ["\udcff", "data/\udcff"]
PLACES = words(
    """photos photos/a photos/a/0.png data/digits data/mine data/digits/dataset.json empty missing missing/below link loop fifo
    fifo.yaml fifo.npz fifo.json text text/below text.yaml text.npz text.json folder.yaml /dev/null image.yaml image.npz image.pth
    image.pkl image.safetensors null.yaml zero.yaml run weights weights/model.safetensors weights/config.json broken tour samples
    samples.npz edm2.pkl map.json good.yaml digits-classifier digits-tokenizer digits-posterior edm2-img64-s var-d16 edm2-digits
    var-digits"""
)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
scalars = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.sampled_from(YAML), st.sampled_from(PLACES), texts)
arguments = st.one_of(scalars, st.sampled_from(RAW))


@pytest.fixture(scope="module")
def place(tmp_path_factory, digits):
    """A folder with one file of every kind, and the digits where the preset looks for them."""
    folder = tmp_path_factory.mktemp("fuzz")
    pixels = np.random.Generator(np.random.Philox(0)).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        for path in (f"photos/{'ab'[i % 2]}/{i}.png", f"samples/images/{i:06d}-{i % 10}.png"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(png(image[None]))
    (folder / "data").mkdir()
    shutil.copytree(digits, folder / "data/digits")
    prepare_images(folder / "photos", folder / "data/mine", 8, 1)
    shutil.copytree(BUNDLED / "edm2-digits", folder / "weights")
    shutil.copytree(BUNDLED / "edm2-digits", folder / "broken")
    os.truncate(folder / "broken/model.safetensors", 1000)
    shutil.copy(ROOT / "tests/golden/edm2_tiny.pkl", folder / "edm2.pkl")
    np.savez(folder / "samples.npz", pixels[:, :, :, None], np.arange(30) % 10)
    for name in ("empty", "folder.yaml", "run", "tour"):
        (folder / name).mkdir()
    (folder / "run/config.yaml").write_text(dump(load("edm2-digits", "mclr", "digits", "auto", [])))
    (folder / "tour/results.json").write_text('{"edm2-digits": {"base": {"accuracy": 1}}}')
    (folder / "good.yaml").write_text("base: edm2-digits\ntrain: {images: 640}\n")
    (folder / "map.json").write_text(json.dumps({str(c): c for c in range(10)}))
    for name in ("text", "text.yaml", "text.npz", "text.json"):
        (folder / name).write_text("no: such\n  - thing")
    for name in ("image.yaml", "image.npz", "image.pth", "image.pkl", "image.safetensors"):
        shutil.copy(folder / "photos/a/0.png", folder / name)
    for name, target in (("link", "nowhere"), ("loop", "loop"), ("null.yaml", "/dev/null"), ("zero.yaml", "/dev/zero")):
        (folder / name).symlink_to(target)
    (folder / "data/fifo").mkdir()
    for name in ("fifo", "fifo.yaml", "fifo.npz", "fifo.json", "data/fifo/dataset.json"):
        os.mkfifo(folder / name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def bounds(place):
    """No network, no training, and no DeepSpeed, whose import would end in an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setitem(sys.modules, "deepspeed", None)
        patch.setattr("mclr.train.training.launch.start", None)
        yield


# Settings


def mutated_word(draw, word: str) -> str:
    """A letter dropped, doubled or replaced; or a part of it."""
    i = draw(st.integers(0, max(len(word) - 1, 0)))
    changed = [word[:i] + word[i + 1 :], word[: i + 1] + word[i:], word[:i], word[i:], word.upper(), word + "."]
    return draw(st.sampled_from(changed))


def sections_of(tree: object) -> list[dict]:
    if not isinstance(tree, dict):
        return []
    return [tree] + [inner for value in tree.values() for inner in sections_of(value)]


@st.composite
def presets(draw) -> bytes:
    """A preset with keys dropped, misspelt, moved to another section, or of another value; or its text torn."""
    tree = yaml.safe_load(draw(st.sampled_from(FILES)).read_text())
    values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.lists(st.integers(), max_size=3))
    for _ in range(draw(st.integers(0, 4))):
        sections = [section for section in sections_of(tree) if section]
        if not sections:
            break
        section, other = draw(st.sampled_from(sections)), draw(st.sampled_from(sections))
        key = draw(st.sampled_from(sorted(section)))
        old = section.pop(key)
        how = draw(st.sampled_from(["drop", "misspell", "move", "copy", "value", "value", "value", "nest", "base"]))
        if how == "base":
            tree["base"] = draw(st.sampled_from(BASES))
        elif how != "drop":
            target = other if how == "move" else section
            name = mutated_word(draw, key) if how == "misspell" else key
            target[name] = draw(values) if how == "value" else copy.deepcopy({"copy": other, "nest": {key: old}}.get(how, old))
    lines = yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).splitlines()
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, max(len(lines) - 1, 0)))
        line = lines[i] if lines else ""
        torn = [[line, line], [" " + line], [], [draw(scalars), line], [f"{line.partition(':')[0]}: {draw(scalars)}"]]
        lines[i : i + 1] = draw(st.sampled_from(torn))
    return "\n".join(lines).encode("utf-8", "surrogateescape")


@st.composite
def overrides(draw) -> str:
    key = draw(st.sampled_from(KEYS))
    how = draw(st.integers(0, 9))
    if how == 0:
        key = mutated_word(draw, key)
    elif how == 1:
        section, _, name = key.rpartition(".")
        key = draw(st.sampled_from([section, name, key + ".x", "." + key, key + "." * 3000, *WORDS]))
    if how in (2, 3):
        value = json.dumps(SETTINGS[draw(st.sampled_from(KEYS))] if how == 2 else SETTINGS.get(key))
    elif how in (4, 5):
        value = draw(st.sampled_from(["0", "1", "2", "16", "0.05", "0.5", "true", "null"]))
    else:
        value = draw(arguments)
    return draw(st.sampled_from([f"{key}={value}"] * 9 + [key, f"{key}:{value}", f"={value}", f"{key}=={value}"]))


@st.composite
def yaml_files(draw) -> bytes:
    how = draw(st.integers(0, 3))
    if how == 0:
        return draw(st.binary(max_size=200))
    good = draw(st.sampled_from(FILES)).read_bytes()
    if how == 1:
        i = draw(st.integers(0, len(good)))
        return good[:i] + draw(st.binary(max_size=8)) + good[i + draw(st.integers(0, 8)) :]
    keys = st.sampled_from([*KEYS, "model", "train", "base", "a", "<<", "?", "!!x y"])
    lines = draw(st.lists(st.tuples(keys, scalars), max_size=4))
    text = "\n".join(f"{key.rpartition('.')[2]}: {value}" for key, value in lines)
    if how == 2:
        return text.encode("utf-8", "surrogatepass")
    wide = text.encode("utf-16", "surrogatepass")
    return draw(st.sampled_from([LAUGHS.encode(), wide, b"\xef\xbb\xbf" + text.encode(), good + text.encode()]))


@cases(1400)
@given(
    kind=st.sampled_from(["model", "model", *KINDS]),
    data=st.one_of(presets(), presets(), yaml_files()),
    question=st.sampled_from(["--dry-run"] * 4 + ["--plan"]),
)
def test_files_of_presets(place, counts, kind, data, question):
    (place / "case.yaml").write_bytes(data)
    given = {"model": "edm2-digits"} | {kind: "case.yaml"}
    argv = ["train", question, *(f"--{kind}={name}" for kind, name in given.items())]
    counts[f"files of presets, {question}", check(place, argv)] += 1


@cases(1000)
@given(
    model=st.sampled_from([*QUICK, *QUICK, *MODELS]),
    objective=st.sampled_from(["mclr", "mle", "cca"]),
    given_=st.lists(overrides(), min_size=1, max_size=3),
)
def test_overrides(place, counts, model, objective, given_):
    counts["overrides", check(place, ["train", "--dry-run", "--model", model, "--objective", objective, *given_])] += 1


# Command lines


def mostly(good: str, other: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A mistake now and then lets a command line come further than one of mistakes alone."""
    return st.sampled_from([st.sampled_from(words(good))] * 5 + [other]).flatmap(lambda each: each)


# nothing that takes long
SMALL = mostly("1 2", st.sampled_from(["0", "-1", "abc", "", "1.5", "9" * 5000, "1e1", "²"]))
FLOATS = mostly("0.1 0.25", st.sampled_from(["0", "-1", "1", "nan", "inf", "-inf", "1e400", "abc", ""]))
HUGE = mostly("1 3", st.sampled_from(["0", "-1", "x", "9" * 12, "9" * 18, "9" * 19, "9" * 30]))
NAMES = st.one_of(arguments, st.sampled_from(PLACES), st.sampled_from(PLACES))
OUTS = mostly("new new/below", st.one_of(arguments, st.sampled_from([*PLACES, "new.pth", "new.safetensors", "photos/new"])))
DATA = mostly("data/digits data/mine digits", NAMES)
SAMPLING = st.builds(
    "sample.{}={}".format,
    st.sampled_from(sorted(key[7:] for key in KEYS if key.startswith("sample.") and key[7:] not in ("steps", "batch"))),
    arguments,
)
PRESET = mostly("edm2-digits var-digits good.yaml", st.one_of(NAMES, st.sampled_from(MODELS)))
RUN = {"--model": PRESET, "--objective": mostly("mclr mle cca ddo", NAMES), "--data": DATA, "--dry-run": None}
RUN |= {"--engine": mostly("auto local zero1 zero3 8x80gb", NAMES)}
INIT = mostly("edm2-digits weights none edm2.pkl", NAMES)
FIT = {"--data": DATA, "--steps": SMALL, "--batch": SMALL, "--lr": FLOATS, "--seed": HUGE, "--half": None}
IMAGES = {"--channels": mostly("1 3", SMALL), "--val-share": FLOATS, "--seed": HUGE, "--shard-size": HUGE}
IMAGES |= {"--resolution": mostly("8 7 16", st.sampled_from(["0", "-1", "x", "1", "9" * 9, "9" * 30]))}
SAMPLES = {"--out": OUTS, "--data": DATA, "--npz": None, "--dataset": None, "--model": mostly("edm2-digits var-digits", NAMES)}
SAMPLES |= dict.fromkeys(("--count", "--per-class", "--seed"), HUGE)
SAMPLES |= {"--classes": mostly("0 0,3", st.sampled_from(["3,3", "10", "-1", "a", "", ",", "9" * 5000]))}
SCORES = {"--reference": mostly("digits data/digits photos samples.npz samples", NAMES), "--ranges": HUGE, "--icr": None}
SCORES |= {"--real": st.sampled_from(["all", "train", "val", "x", ""]), "--judge": mostly("digits-classifier", NAMES)}
SCORES |= {"--judge-weights": NAMES}
# of each program: what every call begins with, positional arguments, options with their values (None: a switch), what it ends with
GRAMMAR: dict[str, tuple[list[str], list[st.SearchStrategy[str]], dict[str, st.SearchStrategy[str] | None], list[str]]] = {
    "train": (["--dry-run"], [overrides()], {**RUN, "--init": INIT, "--out": OUTS, "--local_rank": SMALL}, []),
    "train --plan": ([], [overrides()], {**RUN, "--gpus": HUGE, "--gpu": mostly("h100 a100-80", NAMES)}, []),
    "sample": (
        ["--count=2"],
        [mostly("edm2-digits var-digits weights edm2.pkl", NAMES), SAMPLING],
        SAMPLES,
        ["sample.steps=1", "sample.batch=2"],
    ),
    "evaluate": ([], [mostly("samples samples.npz photos", st.sampled_from(PLACES))], SCORES, []),
    "report": ([], [mostly("tour", NAMES)], {"--out": OUTS, "--markdown": None}, []),
    "prepare digits": ([], [OUTS], {}, []),
    "prepare images": ([], [mostly("photos", NAMES), OUTS], IMAGES, []),
    **{f"prepare {kind}": (["--steps=1", "--batch=2"], [OUTS], FIT, []) for kind in ("tokenizer", "classifier", "posterior")},
    "prepare cache": ([], [overrides()], {"--model": PRESET, "--data": DATA, "--half": None}, []),
    "convert": (
        [],
        [mostly("edm2.pkl weights var-digits digits-tokenizer new", NAMES), OUTS, arguments],
        {"--force": None, "--half": None, "--ema-std": FLOATS},
        [],
    ),
}
NEEDED = {
    **{"train": ["--model"], "train --plan": ["--model"], "sample": ["--out"], "prepare images": ["--resolution"]},
    **{f"prepare {kind}": ["--data"] for kind in ("tokenizer", "classifier", "posterior")},
    "prepare cache": ["--model", "--data"],
}


@st.composite
def command_lines(draw) -> list[str]:
    """Arguments in any order: abbreviated, repeated, left out, of other programs."""
    program = draw(st.sampled_from([*sorted(GRAMMAR), *sorted(GRAMMAR.keys() - {"prepare digits"})]))
    begin, positional, options, end = GRAMMAR[program]
    groups = [[draw(each)] for each in positional if draw(st.integers(0, 19))]
    names = [name for name in NEEDED.get(program, []) if draw(st.integers(0, 19))]
    names += draw(st.lists(st.sampled_from(sorted(options)), max_size=3)) if options else []
    for name in names:
        value = options[name]
        # down to the shortest abbreviation and beyond
        short = name[: draw(st.integers(3, len(name)))] if not draw(st.integers(0, 9)) else name
        how = draw(st.integers(0, 19))
        if value is None or not how:
            group = [short]
        else:
            group = [short, draw(value)] if how % 2 else [f"{short}={draw(value)}"]
        groups.insert(draw(st.integers(0, len(groups))), group)
    if not draw(st.integers(0, 19)):
        odd = st.sampled_from([*words("-- -h --help -x --xyz --xyz=1 - @case.yaml"), ""])
        groups.insert(draw(st.integers(0, len(groups))), [draw(odd)])
    return [*program.split(), *begin, *(word for group in groups for word in group), *end]


# that once ended in a traceback or in none
DRY = "train --dry-run --model"
KNOWN = [
    *(
        f"sample edm2-digits --out new --{option} {'9' * digits}"
        for option, digits in (("count", 12), ("per-class", 18), ("seed", 30))
    ),
    f"prepare tokenizer new --data digits --seed {'9' * 30}",
    "prepare digits loop",
    "prepare digits /",
    "convert -- edm2.pkl --",
    f"{DRY} edm2-digits train.batch=2147483629 train.micro_batch=2147483628",
    f"{DRY} edm2-digits model.weights=null model.net.num_blocks=100",
    f"{DRY} edm2-digits model.weights=null model.net.model_channels=65536 model.net.channel_mult=[65536]",
    f"{DRY} var-digits model.weights=null model.net.depth=100 model.net.embed_dim=64000",
    f"{DRY} var-digits --init \udcff --out \udcff --data \udcff",
    f"{DRY} edm2-digits model.posterior.channels=65536 model.posterior.weights=null",
    f"{DRY} edm2-digits model.class_map=fifo.json",
    f"{DRY} edm2-digits --data data/fifo",
    "evaluate samples --reference digits --judge inception --judge-weights fifo",
]


@pytest.mark.parametrize("argv", KNOWN, ids=range(len(KNOWN)))
def test_known_command_lines(place, argv):
    check(place, argv.split())


@cases(1200)
@given(argv=command_lines())
def test_command_lines(place, counts, argv):
    counts["command lines", check(place, argv)] += 1


@pytest.mark.fuzz
@pytest.mark.parametrize("name", sorted({name for name in PLACES if name not in QUICK}))
@pytest.mark.parametrize("option", ["--model", "--objective", "--data", "--engine", "--init"])
def test_every_kind_of_file_as_an_argument(place, counts, option, name):
    argv = ["train", "--dry-run", *(["--model", "edm2-digits"] if option != "--model" else []), option, name]
    counts["kinds of files", check(place, argv)] += 1
