"""configs/schema/ and the presets: what loads, what is refused and in which words, what survives a round trip."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pydantic
import pytest
import yaml

from mclr.configs import page, schema
from mclr.configs.schema import PRESETS, RunConfig, dump, flatten, from_dict, load, load_resolved
from mclr.configs.schema.config import settings_of
from mclr.errors import UserError
from mclr.models.registry import NETWORKS
from mclr.schedule import Schedule


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def load_with(*overrides: str, model="edm2-digits", objective="mclr", data="digits", engine="local") -> RunConfig:
    return load(model, objective, data, engine, list(overrides))


def refusal(*overrides: str, **presets: str) -> str:
    with pytest.raises(UserError) as refused:
        load_with(*overrides, **presets)
    message = str(refused.value)
    assert "\n" not in message
    return message


# what an objective asks for and no preset can know: a network to compare with, samples of it
REFERENCE = ["model.weights=mine"]
NEEDED = {"cc_dpo": REFERENCE, "cca": REFERENCE, "ddo": [*REFERENCE, "objective.generated=samples"]}
# a net of four levels, with attention at 16: nothing for 8 pixels; a VAE reads three channels
SIZED = {"img64": ["data.resolution=64"], "512": ["data.resolution=512", "data.channels=3"]}
SIZED |= {kind: ["data.resolution=256", "data.channels=3"] for kind in ("dit-", "sit-")}


def sized(model: str) -> list[str]:
    return next((data for part, data in SIZED.items() if part in model), [])


def whole(model: str) -> list[str]:
    """Where there is a reference: no dropout, and no bf16 for diffusion."""
    if model.startswith("var"):
        return ["model.net.drop_path=0.0"]
    return ["engine.precision=fp32", *["model.net.dropout=0.0"] * model.startswith("edm2")]


# an engine is the same to every model: all of them with the small ones, one with the others
COMBINATIONS = [
    (model, *others)
    for model, *others in itertools.product(names("model"), names("objective"), names("data"), names("engine"))
    if model.endswith("-digits") or others[-1] == "auto"
]


@pytest.mark.parametrize("presets", COMBINATIONS, ids=" ".join)
def test_every_combination_of_presets_loads_and_survives_a_round_trip(presets, tmp_path):
    model, objective, *_ = presets
    config = load(*presets, [*sized(model), *NEEDED.get(objective, []), *(whole(model) if objective in NEEDED else [])])
    (tmp_path / schema.FILE).write_text(dump(config))
    assert load_resolved(tmp_path) == load_resolved(tmp_path / schema.FILE) == config
    assert from_dict(config.model_dump()) == config


@pytest.mark.parametrize("path", sorted(PRESETS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_opens_with_what_it_is_and_how_to_start_it(path):
    header = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert len(header) >= 2
    assert any(line.startswith(("#   mclr ", "#   deepspeed ")) for line in header)


@pytest.mark.parametrize("model", names("model"))
def test_the_contrast_follows_from_objective_and_paradigm(model):
    """mle takes back what a model preset says about it."""
    mclr, mle = (load(model, objective, "digits", "local", sized(model)).objective for objective in ("mclr", "mle"))
    assert mclr.contrast == ("null" if model.startswith("var") else "posterior") and mclr.lam > 0
    assert (mle.contrast, mle.lam, mle.bound) == ("none", 0.0, None)


def test_later_presets_and_overrides_win(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("objective:\n  name: mclr\n  lam: 0.3\ntrain:\n  lr: 1e-3\n")
    config = load("edm2-digits", str(mine), "digits", "local", ["train.seed=1", "train.seed=2"])
    assert (config.objective.lam, config.train.lr, config.train.seed, config.model.name) == (0.3, 1e-3, 2, "edm2-digits")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.micro_batch=null", "train.micro_batch", None),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.betas=[0.5, 0.6]", "train.betas", [0.5, 0.6]),
        ("model.net.channel_mult=[1, 3]", "model.net.channel_mult", [1, 3]),
        ("model.weights=a=b", "model.weights", "a=b"),
        ("model.name='1e3'", "model.name", "1e3"),
        ("objective.contrast=null", "objective.contrast", "null"),
        ("objective.lam=-0.5", "objective.lam", -0.5),
    ],
)
def test_overrides_are_yaml_and_survive_a_round_trip(override, key, value, tmp_path):
    config = load_with(override)
    assert flatten(config)[key] == value
    (tmp_path / schema.FILE).write_text(dump(config))
    assert load_resolved(tmp_path) == config


def test_a_config_is_constant():
    config = load_with()
    with pytest.raises(pydantic.ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]
    assert hash(config) == hash(load_with())


def test_width_and_heads_follow_the_depth():
    net = load_with("model.net.depth=2", model="var-d16").model.net
    assert (net.embed_dim, net.num_heads) == (128, 2)


@pytest.mark.parametrize(
    ("rank", "engine", "here"), [(None, "auto", "local"), ("0", "auto", "deepspeed"), ("0", "local", "local")]
)
def test_engine_auto_asks_the_process(rank, engine, here, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert load_with(engine=engine).engine.here() == here


def test_names_and_defaults_of_a_schedule_equal_those_of_the_component():
    component = {field.name: field.default for field in dataclasses.fields(Schedule)[2:]}
    ours = {name: field.default for name, field in schema.Schedule.model_fields.items()}
    assert ours == component | {"kind": "constant"}


EMPTY = {split: {"count": 0, "shards": []} for split in ("train", "val")}
CATS = {"name": "cats", "resolution": 16, "channels": 3, "num_classes": 4, "class_names": [*"abcd"], "source": "", "seed": 0}


def test_a_prepared_folder_describes_itself(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(CATS | {"splits": EMPTY}))
    config = load_with("model.net.attn_resolutions=[8]", data=str(tmp_path))
    assert config.data == schema.Data(name="cats", path=str(tmp_path), resolution=16, channels=3, num_classes=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("objective.lamda=1", "unknown key objective.lamda; did you mean objective.lam?"),
        ("train.lam=1", "unknown key train.lam; did you mean objective.lam?"),
        ("objectiv.lam=1", "unknown key objectiv; did you mean objective?"),
        ("model.net.model_chanels=8", "unknown key model.net.model_chanels; did you mean model.net.model_channels?"),
        ("engine.foo=1", "unknown key engine.foo; known in engine: kind, zero, offload, precision, gradient_clipping, "
         "activation_checkpointing, compile, reference, timeout, kernels"),
        ("foo=1", "unknown key foo; known: model, data, objective, train, engine, sample"),
        ("model.net.depth=4", "unknown key model.net.depth; only networks of kind dit or var have it"),
        # values
        ("train.lr=fast", 'train.lr="fast": expected a number > 0'),
        ("train.lr=0", "train.lr=0: expected a number > 0"),
        ("train.lr=.inf", "train.lr=Infinity: expected a finite number"),
        ("train.lr.low=1", 'train.lr={"low": 1}: expected a number > 0'),
        ("train.micro_batch=x", 'train.micro_batch="x": expected an integer > 0 or null'),
        ("engine.compile=1", "engine.compile=1: expected true or false"),
        ("model.name=3", "model.name=3: expected text"),
        ("data.label=.x", 'data.label=".x": expected text of the form ^[a-z0-9_]+(\\.[^.]+)*$'),
        ("data.channels=2", "data.channels=2: expected one of 1, 3"),
        ("model.net.channel_mult=[]",
         "model.net.channel_mult=[]: expected a list of 1 to 16 entries, each an integer > 0 and <= 65536"),
        ("model.net.channel_mult=[1, x]", 'model.net.channel_mult[1]="x": expected an integer > 0 and <= 65536'),
        ("train.betas=[0.9]", "train.betas=[0.9]: expected a list of 2 entries, each a number >= 0 and < 1"),
        ("train.betas=[0.9, 1.0]", "train.betas[1]=1.0: expected a number >= 0 and < 1"),
        ("train.ema_std=0.5", "train.ema_std=0.5 is out of range: must be 0 (no average), or >= 0.01 and <= 0.25"),
        ("objective.contrast=posteriour",
         'objective.contrast="posteriour": expected one of auto, none, posterior, null, weighted, uniform, marginal, generated'),
        ("model.paradigm=gan", 'model.paradigm="gan": expected diffusion or next_scale'),
        ("model.kind=unet", 'model.kind="unet": expected edm2 or dit'),
        ("train=5", "train=5: train is a section; set one of its keys, like train.seed=..."),
        ("objective.schedule=ramp",
         'objective.schedule="ramp": objective.schedule is a section; set one of its keys, like objective.schedule.kind=...'),
        # two keys of one section
        ("engine.zero=1", "engine.zero=1 needs engine.kind=deepspeed or auto"),
        ("data.label=txt", "data.label=txt needs a stream as data.path"),
        ("engine.offload=true", "engine.offload=true needs engine.zero=1, 2 or 3"),
        ("sample.churn_min=1", "sample.churn_min=1.0 needs sample.churn > 0"),
        ("sample.guide.weights=mine", "sample.guide.weights=mine needs sample.gamma, the weight of guidance"),
        ("train.snapshot_stds=[0.1, 0.1001]", "train.snapshot_stds=[0.1, 0.1001] must differ in their first three decimals"),
        ("engine.reference=whole", "engine.reference=whole needs objective.name=cc_dpo, cca or ddo"),
        ("sample.sigma_min=90", "sample.sigma_min=90.0 must be below sample.sigma_max=80.0"),
        ("sample.schedule.low=0.3", "sample.schedule.low=0.3 needs sample.schedule.kind=interval"),
        # two sections
        ("objective.contrast=none",
         "objective.contrast=none is not for objective.name=mclr: expected posterior or null or weighted or uniform"),
        ("data.num_classes=1", "objective mclr needs two conditions or more; data.num_classes=1"),
        ("objective.generated=x", "objective.generated=x needs objective.name=ddo"),
        ("sample.top_k=5", "sample.top_k=5 needs a next_scale model; edm2-digits is a diffusion model"),
        ("data.resolution=9", "model.net.channel_mult: a side of 9 cannot be halved 1 times: "
         "choose a --model for 9-pixel images, or set that key"),
        ("data.resolution=16", "model.net.attn_resolutions: 4 is not a resolution of this net (16, 8): "
         "choose a --model for 16-pixel images, or set that key"),
        ("model.vae=mine", "model.vae=mine reads 3 channels and a side that is a multiple of 8, not data.channels=1 and "
         "data.resolution=8; set model.vae=null for pixels"),
        ("model.net.channels_per_head=5", "model.net.channels_per_head=5 must divide the 32 channels at resolution 4: "
         "choose a --model for 8-pixel images, or set that key"),
        # form
        ("train.lr", "override 'train.lr' is not of the form section.key=value, like train.lr=0.001"),
        ("train={lr: 1}",
         "override 'train={lr: 1}' sets a whole section; set its keys one by one, like train.lr=0.001 train.batch=64"),
        ("train.betas=[0.9",
         "override 'train.betas=[0.9': the value is not valid YAML; quote it or check its brackets"),
    ],
)  # fmt: skip
def test_an_override_is_refused_in_one_line(override, message):
    assert refusal(override) == message


@pytest.mark.parametrize(
    ("overrides", "presets", "message"),
    [
        (["train.lr=0", "train.seed=-1", "train.betaz=1"], {}, "unknown key train.betaz; did you mean train.betas? (and 2 more)"),
        (["model.weights=null"], {"objective": "cca"},
         "objective cca compares with the network before fine-tuning; give its weights by --init"),
        (REFERENCE, {"objective": "cca", "model": "var-d16"}, "objective cca compares whole networks; set model.net.drop_path=0"),
        (["model.net.dropout=0.1"], {"objective": "cc_dpo"}, "objective cc_dpo compares whole networks; set model.net.dropout=0"),
        (["engine.precision=bf16"], {"objective": "cca"},
         "engine.precision=bf16 is too coarse for objective cca of a diffusion model, whose ratio is a small difference "
         "times all dimensions; set engine.precision=fp32"),
        (["objective.contrast=null", "train.drop_condition=0.0"], {},
         "objective.contrast=null needs the null condition, which train.drop_condition=0 leaves untrained; set train.drop_condition=0.1, "
         "or objective.guide.weights=WEIGHTS"),
        (["sample.gamma=0.5", "train.drop_condition=0.0"], {},
         "sample.gamma=0.5 with sample.schedule.kind=constant needs the null condition, which train.drop_condition=0 leaves untrained; "
         "set sample.guide.weights=WEIGHTS, or train.drop_condition=0.1"),
        (["data.path=a.tar", "train.keep_best=true"], {}, "train.keep_best=true needs a dataset folder; data.path=a.tar is a stream"),
        (["sample.churn=2", "sample.solver=euler"], {}, "sample.churn=2.0 needs sample.solver=heun"),
        ([], {"objective": "ddo"},
         "missing key objective.generated; objective ddo needs a dataset folder made by `mclr sample --dataset`"),
        (["objective.schedule.kind=interval", "objective.schedule.low=0.5", "objective.schedule.high=0.2"], {},
         "objective.schedule.low=0.5 must be below objective.schedule.high=0.2"),
        (["model.posterior.weights=null", "model.posterior.warmup_images=38400"], {},
         "model.posterior.warmup_images=38400 leaves nothing of train.images=38400 to the ratio; set it to a third of that, "
         "model.posterior.warmup_images=12800"),
        (["model.posterior.backbone=convnext_tiny", "model.posterior.channels=64"], {},
         "model.posterior.channels=64 needs model.posterior.backbone=null, since a ConvNeXt has its own widths"),
        (["data.resolution=500", "data.channels=3"], {"model": "edm2-img512-s"},
         "model.vae=hf://stabilityai/sd-vae-ft-mse reads 3 channels and a side that is a multiple of 8, not data.channels=3 and "
         "data.resolution=500; set model.vae=null for pixels"),
        (["data.resolution=480", "data.channels=3"], {"model": "edm2-img512-s"},
         "model.net.channel_mult: a side of 60 cannot be halved 3 times: "
         "choose a --model for 480-pixel images, latents of side 60, or set that key"),
        (["data.resolution=64", "data.channels=3"], {"model": "edm2-img512-s"},
         "model.net.attn_resolutions: 16 is not a resolution of this net (8, 4, 2, 1): "
         "choose a --model for 64-pixel images, latents of side 8, or set that key"),
        (["sample.steps=9"], {"model": "var-digits"},
         "sample.steps=9 needs a diffusion model; var-digits is a next_scale model"),
        (["model.net.num_heads=7"], {"model": "var-d16"}, "model.net.embed_dim=1024 must be a multiple of model.net.num_heads=7"),
        ([], {"model": "edm2-digit"},
         "unknown model edm2-digit; did you mean edm2-digits? "
         f"(known: {', '.join(names('model'))}; or the path of a YAML file)"),
        ([], {"objective": "xyz"}, f"unknown objective xyz (known: {', '.join(names('objective'))}; or the path of a YAML file)"),
        ([], {"data": "digit"},
         f"unknown data digit; did you mean digits? (known: {', '.join(names('data'))}; or a folder made by `mclr prepare`)"),
        ([], {"engine": "missing.yaml"}, "cannot read missing.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_presets_and_overrides_at_odds_are_refused_in_one_line(overrides, presets, message):
    assert refusal(*overrides, **presets) == message


@pytest.mark.parametrize(
    ("overrides", "presets"),
    [
        # label contrasts of tokens have a bound; their log-likelihood is in fp32 and in nats
        (["objective.contrast=uniform", "objective.bound=3"], {"model": "var-digits"}),
        (["objective.contrast=weighted"], {"model": "var-digits"}),
        (["engine.precision=bf16"], {"model": "var-digits", "objective": "cca"}),
        # another guide needs no null condition
        (["sample.gamma=0.5", "sample.guide.weights=mine", "train.drop_condition=0.0"], {}),
    ],
)
def test_what_may_go_together(overrides, presets):
    assert load_with(*overrides, **presets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: edm2-img65\n", f"{{path}}: unknown base edm2-img65 (known: {', '.join(names('model/recipes') + names('model'))}; "
         "or the path of a YAML file)"),
        ("base: edm2-img64-s\n",
         "{path}: its base edm2-img64-s has a base of its own, edm2-img64; name that one, and set the rest here"),
        ("base: gone.yaml\n", "cannot read {folder}/gone.yaml: No such file or directory"),
        ("train:\n  lr: 1\n  lr: 2\n", "{path}, line 3: duplicate key lr"),
        ("train:\n  lr: [1\n", "{path}, line 3: expected ',' or ']', but got '<stream end>'"),
        ("train:\n  1: 2\n", "{path}, line 2: a key must be a plain word"),
        ("- train\n", "{path}: expected sections (model, data, objective, train, engine, sample), each with its keys"),
        ("", "{path}: expected sections (model, data, objective, train, engine, sample), each with its keys"),
        ("train: \0", "{path}: unacceptable character #x0000: special characters are not allowed"),
        ("train:\n", "missing section model; it holds model.name and more (and 1 more)"),
        ("engine:\nmodel:\n  name: x\n  paradigm: diffusion\n  net: {}\ntrain: {images: 1, batch: 1, lr: 1}\nobjective: {lam: 1}\n",
         "engine=null: engine is a section; set one of its keys, like engine.kind=..."),
        ("model:\n  name: x\n  paradigm: diffusion\n  net: {}\nobjective: {lam: 1}\n",
         "missing section train; it holds train.seed and more"),
        ("model:\n  name: x\n", "model.paradigm=null: expected diffusion or next_scale"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_place(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert refusal(model=str(path)) == message.format(path=path, folder=tmp_path)


@pytest.mark.parametrize("base", ["edm2-digits", "edm2-img64", "common.yaml"])
def test_a_base_is_a_preset_a_recipe_or_a_file(base, tmp_path):
    """What the file says wins; a file is looked for beside it."""
    (tmp_path / "common.yaml").write_text((PRESETS / "model/edm2-digits.yaml").read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {base}\nmodel: {{name: mine}}\nobjective: {{lam: 0.25}}\ntrain: {{lr: 0.125}}\n")
    config = load(str(mine), "mclr", "digits", "local", sized(base))
    assert (config.model.name, config.objective.lam, config.train.lr) == ("mine", 0.25, 0.125)
    assert (config.train.batch, config.model.weights) == ((2048, None) if base == "edm2-img64" else (64, "edm2-digits"))


def test_a_recipe_is_no_model():
    assert refusal(model="edm2-img64").startswith("unknown model edm2-img64; did you mean edm2-img64-")
    assert not set(names("model/recipes")) & set(names("model"))


def test_the_page_of_settings_is_fresh():
    """`make settings` writes it; every setting is on it, with its meaning and that of each of its values."""
    text = page.PAGE.read_text()
    assert text == page.page() and len(text.splitlines()) <= 200
    for key, setting in (pair for kind in ("edm2", "var") for pair in settings_of(NETWORKS[kind]).items()):
        assert "|" not in setting.get("description", "") and all(
            str(v) in setting["description"] for v in setting.get("enum", ())
        ), key
    keys = {key for model in ("edm2-digits", "var-digits") for key in flatten(load(model, "mclr", "digits", "local", []))}
    assert {key for key in keys if f"| `{key}` |" not in text} == {key for key in keys if key.startswith("sample.schedule.")}


def test_a_run_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read .*config\.yaml: No such file or directory$"):
        load_resolved(tmp_path)


def test_the_schema_imports_no_heavy_library():
    code = "import sys, mclr.configs.schema; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "deepspeed"} & set(modules)


def test_runs_from_before_a_guide_had_a_condition_are_read(tmp_path):
    for guide in (None, "edm2-digits"):
        config = load("edm2-digits", "mclr", "digits", "local", ["sample.gamma=1.0"])
        old = config.model_dump(mode="json")
        old["sample"]["guide"] = guide
        (tmp_path / "config.yaml").write_text(yaml.dump(old))
        assert load_resolved(tmp_path).sample.guide.weights == guide


def test_a_dial_takes_the_place_of_lam_wherever_it_is_set(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("base: edm2-digits\nmodel: {name: mine, strength: {max: 2.0}}\n")
    config = load(str(preset), "mclr", "digits", "local", [])
    assert (config.model.strength.max, config.objective.lam) == (2.0, None)
    assert load(str(preset), "mclr", "digits", "local", ["model.strength.max=0"]).objective.lam == 1.5
    with pytest.raises(UserError, match=r"objective.lam=1.5 and model.strength.max=2.0: give one of them"):
        load(str(preset), "mclr", "digits", "local", ["objective.lam=1.5"])
