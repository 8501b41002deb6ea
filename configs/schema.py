"""What a run is made of: the settings, their types and ranges, and how presets and overrides become one RunConfig.

A preset (configs/<kind>/<name>.yaml, or any YAML file) is a partial RunConfig: a mapping of sections; `base: NAME` beside them names
what it changes: a recipe (configs/<kind>/recipes, shared by presets and none itself), a preset, or a YAML file. They are merged key by key:
schema defaults < engine < data < model < objective < overrides. So a model preset carries its own recipe, and another paradigm is
another model preset. In this file: the sections; load() and its relatives; reading YAML; what is wrong, in one line.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mclr.errors import UserError

FILE = "config.yaml"  # of a resolved config in its run folder
PRESETS = Path(__file__).parent
MOST_LEVELS = 10  # of nested sections and lists
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # what no file name holds: NUL, halves of characters
VAE_FACTOR = 8  # pixels per latent along a side (train/data/encoders.py, Latents)

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=2**16)]  # of images and layers
Blocks = Annotated[int, Field(gt=0, le=100)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
EMAStd = Annotated[float, Field(ge=0.01, le=0.25)]
# A list in YAML, a tuple here: configs are constants.
Sizes = Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=16)]
MaybeSizes = Annotated[tuple[Size, ...], Field(strict=False)]
Contrast = Literal["auto", "uniform", "weighted", "posterior", "null", "none", "marginal", "generated"]
# contrasts that an objective may have, the one that `auto` means first; of mclr it depends on the paradigm
CONTRASTS = {
    "mle": ("none",),
    "mclr": ("posterior", "null", "weighted", "uniform"),
    "unlearn": ("uniform",),
    "cc_dpo": ("uniform",),
    "cca": ("marginal",),
    "ddo": ("generated",),
}
WITH_REFERENCE = ("cc_dpo", "cca", "ddo")


class Section(BaseModel):
    """A group of settings. A ValueError of its validator starts with the name of one of its keys: the message gets the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Schedule(Section):
    """The shape of a weight over progress (mclr/schedule.py); the weight itself is objective.lam or sample.gamma.

    Bounds are progresses: of a noise level (4.382 - ln sigma) / 10.597, mclr/diffusion.py; of scale k of K k / (K - 1). `mclr train
    --dry-run` and `mclr sample` show the weight at each, with its sigma or scale.
    """

    kind: Literal["constant", "ramp", "interval", "negative_window"] = "constant"
    low: Fraction = 0.0  # interval: first progress of the weight
    high: Fraction = 1.0  # interval: last progress of the weight
    turn: Fraction = 0.5  # negative_window: progress at which the weight turns negative
    below: Annotated[float, Field(gt=0, le=1)] = 1.0  # negative_window: the weight is -below from there on

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        owner = {"low": "interval", "high": "interval", "turn": "negative_window", "below": "negative_window"}
        for name, kind in owner.items():
            if kind != self.kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with kind={self.kind}; it belongs to kind={kind}")
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self


class DiffusionNet(Section):
    """models.edm2.EDM2Config without what the data decides."""

    model_channels: Size = 192
    channel_mult: Sizes = (1, 2, 3, 4)
    channel_mult_noise: Size | None = None
    channel_mult_emb: Size | None = None
    num_blocks: Blocks = 3
    attn_resolutions: MaybeSizes = (16, 8)
    channels_per_head: Size = 64
    label_balance: Fraction = 0.5
    concat_balance: Fraction = 0.5
    res_balance: Fraction = 0.3
    attn_balance: Fraction = 0.3
    dropout: Dropout = 0.0
    clip_act: Positive = 256.0
    logvar_channels: Size = 128


class NextScaleNet(Section):
    """models.var.VARConfig without what the tokenizer and the data decide. Not given: width 64 * depth, as many heads as depth."""

    depth: Blocks
    # get: an invalid depth is absent here, and reported by itself
    embed_dim: Annotated[int, Field(gt=0, le=2**16, default_factory=lambda net: 64 * net.get("depth", 1))]
    num_heads: Annotated[int, Field(gt=0, default_factory=lambda net: net.get("depth", 1))]
    mlp_ratio: Positive = 4.0
    shared_aln: bool = False
    attn_l2_norm: bool = True
    norm_eps: Positive = 1e-6
    drop_path: Dropout = 0.0

    @model_validator(mode="after")
    def _check(self) -> "NextScaleNet":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}")
        return self


class Posterior(Section):
    """The noise-conditional classifier p(c | x_t) behind the contrasts posterior and weighted."""

    weights: str | None = None  # weights; None: from scratch, in the same job
    backbone: str | None = None  # timm's name of a ConvNeXt, for images of 16 pixels or more; None: our small network
    channels: Size = 32  # of our small network
    lr: Positive = 0.001
    # from scratch: images that it learns from before there is any ratio; the network learns by maximum likelihood meanwhile
    warmup_images: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "Posterior":
        if self.backbone is not None and self.channels != type(self).model_fields["channels"].default:
            raise ValueError(f"channels={self.channels} has no effect with backbone={self.backbone}, which has its own widths")
        return self


class DiffusionModel(Section):
    name: str
    paradigm: Literal["diffusion"]
    net: DiffusionNet
    weights: str | None = None  # what train/weights/folder.py finds by name; None: from scratch
    class_map: str | None = None  # weights of other conditions: JSON file {name here: condition there}, or fresh; None: refused
    vae: str | None = None  # folder of a diffusers AutoencoderKL, or hf://ORG/REPO, for latents; None: pixels
    noise_mean: float = -0.4  # of ln sigma in training
    noise_std: Positive = 1.0
    sigma_data: Positive = 0.5
    posterior: Posterior = Posterior()


class NextScaleModel(Section):
    name: str
    paradigm: Literal["next_scale"]
    net: NextScaleNet
    weights: str | None = None  # what train/weights/folder.py finds by name; None: from scratch
    class_map: str | None = None  # weights of other conditions: JSON file {name here: condition there}, or fresh; None: refused
    tokenizer: str  # what train/weights/folder.py finds by name


def is_stream(path: str) -> bool:
    """Whether a path names shards in webdataset's notation: https://..., pipe:COMMAND, or data/{000..099}.tar."""
    return "://" in path or path.startswith(("pipe:", "file:")) or path.endswith(".tar")


class Data(Section):
    name: str
    path: str  # folder with dataset.json; or shards to stream, as is_stream() knows them
    resolution: Size
    channels: Literal[1, 3]
    num_classes: Annotated[int, Field(gt=0, le=2**20)]
    flip: bool = False
    balanced: bool = False  # every condition equally often; else every sample
    damaged: Fraction = 0.001  # largest share of unreadable samples that training passes over

    @property
    def streamed(self) -> bool:
        """Whether path names shards to stream (train/data/stream.py), and no folder."""
        return is_stream(self.path)


class Objective(Section):
    name: Literal["mle", "mclr", "unlearn", "cc_dpo", "cca", "ddo"]
    # YAML reads the word null as nothing.
    contrast: Annotated[Contrast, BeforeValidator(lambda value: "null" if value is None else value)] = "auto"
    lam: float
    schedule: Schedule = Schedule()
    bound: Positive | None = None  # nats
    beta: Positive | None = None  # of cc_dpo, cca, ddo: scale of the log-likelihood ratio to the reference
    generated: str | None = None  # of ddo: dataset folder of samples of the reference, as `mclr sample --dataset` makes it
    truncate: Annotated[float, Field(ge=0, lt=0.5)] = 0.02  # share of the posterior (its least likely classes) never drawn


class Train(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images: Count  # seen in total
    mle_images: Count | None = None  # end before that when the compute of so many images of plain maximum likelihood is spent
    batch: Annotated[int, Field(gt=0, lt=2**31)]  # images per step, over all ranks
    micro_batch: Count | None = None  # most images per forward of one rank; None: batch / ranks
    lr: Positive
    betas: Annotated[tuple[Dropout, Dropout], Field(strict=False)] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_images: Annotated[int, Field(ge=0)] = 0
    drop_condition: Fraction = 0.1
    ema_std: float = 0.0  # relative width of the averaged weights (arXiv 2312.02696, section 3); 0: no average
    snapshot_every: Annotated[int, Field(ge=0)] = 0  # images between snapshots of averages, for `mclr convert --ema-std`; 0: none
    # relative widths of those averages
    snapshot_stds: Annotated[tuple[EMAStd, ...], Field(strict=False, min_length=2)] = (0.05, 0.1)
    checkpoint_every: Count = 1_000_000  # images
    keep: Count = 2  # checkpoints; the one before the newest serves when that is damaged
    keep_best: bool = False  # and the one of the lowest loss of maximum likelihood on held-out images
    # steps in a row with a gradient that is not finite, which change nothing; one more ends the run
    max_skipped: Annotated[int, Field(ge=0)] = 10
    log_every: Count = 10  # steps
    log_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()  # beside metrics.jsonl
    grid_every: Annotated[int, Field(ge=0)] = 0  # images between pictures of samples, always of the same seeds; 0: none
    # images between readings of the memorisation monitor (train/training/memorisation.py); 0: off
    monitor_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.ema_std != 0 and not 0.01 <= self.ema_std <= 0.25:
            raise ValueError(f"ema_std={self.ema_std} is out of range: must be 0 (no average), or >= 0.01 and <= 0.25")
        # their files are named by three
        if len({f"{std:.3f}" for std in self.snapshot_stds}) < len(self.snapshot_stds):
            raise ValueError(f"snapshot_stds={list(self.snapshot_stds)} must differ in their first three decimals")
        return self


class Engine(Section):
    kind: Literal["auto", "local", "deepspeed"] = "auto"
    zero: Annotated[int, Field(ge=0, le=3)] = 0  # stage
    offload: bool = False  # fp32 masters and moments of ZeRO 1 to 3 in host memory
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products; weights are fp32
    gradient_clipping: NotNegative = 0.0  # norm; 0: none
    activation_checkpointing: bool = False  # backward computes the activations of every block again
    compile: bool = False  # every block by torch.compile
    reference: Literal["auto", "whole", "sharded"] = "auto"  # reference network on every rank; auto: whole up to 2e9 parameters
    # seconds without a sign of life from a rank, after which the run ends and names it; below 180 on a local disk alone, since shared
    # folders show changes late
    timeout: Annotated[int, Field(gt=0, le=10**6)] = 1800
    # fused operations: auto, Triton where it won on this GPU (kernels/RESULTS.json); torch, never; triton, always
    kernels: Literal["auto", "torch", "triton"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> "Engine":
        if self.kind == "local" and self.zero:
            raise ValueError(f"zero={self.zero} needs kind=deepspeed")
        if self.offload and not self.zero:
            raise ValueError("offload=true needs zero=1, 2 or 3")
        return self

    def here(self) -> Literal["local", "deepspeed"]:
        """The engine of this process: `auto` is deepspeed under a launcher. Not resolved in the config, which outlives the process."""
        if self.kind == "auto":
            return "deepspeed" if "WORLD_SIZE" in os.environ else "local"
        return self.kind


class Sample(Section):
    steps: Count = 32
    solver: Literal["heun", "euler", "sde"] = "heun"
    batch: Count = 64
    gamma: float = 0.0  # extra guidance weight; 0: none
    schedule: Schedule = Schedule()
    guide: str | None = None  # weights (autoguidance); None: the same network under the null condition
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    more_smooth: bool = False  # of tokens: blends of codes instead of codes; for pictures, never for scores
    churn: NotNegative = 0.0  # of heun: noise added again, over all steps (EDM, algorithm 2: S_churn); 0: none
    churn_min: NotNegative = 0.0  # sigma down to which it is added
    churn_max: Positive | None = None  # sigma up to which it is added; None: all
    churn_noise: Positive = 1.0  # its standard deviation
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    @model_validator(mode="after")
    def _check(self) -> "Sample":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        if self.guide is not None and self.gamma == 0 and self.schedule.kind != "negative_window":
            raise ValueError(f"guide={self.guide} has no effect with gamma=0.0; set sample.gamma, or sample.guide=null")
        if self.churn and self.solver != "heun":
            raise ValueError(f"churn={self.churn} needs solver=heun")
        if self.churn_max is not None and self.churn_min >= self.churn_max:
            raise ValueError(f"churn_min={self.churn_min} must be below churn_max={self.churn_max}")
        for key in ("churn_min", "churn_max", "churn_noise"):
            if not self.churn and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} has no effect with churn=0.0")
        return self


class RunConfig(Section):
    """Everything that decides a run. Made by load(), from_dict() or load_resolved(): they resolve what depends on other keys."""

    model: Annotated[DiffusionModel | NextScaleModel, Field(discriminator="paradigm")]
    data: Data
    objective: Objective
    train: Train
    engine: Engine = Engine()
    sample: Sample = Sample()


MODELS: dict[str, type[Section]] = {"diffusion": DiffusionModel, "next_scale": NextScaleModel}


def load(model: str, objective: str, data: str, engine: str, overrides: list[str]) -> RunConfig:
    """The config of a run. Each of the first four: name of a preset or path of a YAML file; data: also a prepared dataset folder.

    overrides: "section.key=value", the value in YAML. Raises UserError for whatever is unknown, ill-typed, out of range or at odds.
    """
    merged: dict[str, Any] = {}
    for kind, name in (("engine", engine), ("data", data), ("model", model), ("objective", objective)):
        _merge(merged, read_preset(kind, name))
    for override in overrides:
        _merge(merged, _parse_override(override))
    return from_dict(merged)


def from_dict(sections: dict[str, Any]) -> RunConfig:
    """A validated config, the contrast `auto` resolved: for mclr posterior with diffusion and null with next_scale."""
    try:
        config = RunConfig.model_validate(sections)
    except ValidationError as invalid:
        model = sections.get("model")
        fields = _fields(model.get("paradigm") if isinstance(model, dict) else None)
        # A default that another key decides is no error of its own; a misspelt key may also be missing, its spelling comes first.
        errors = [error for error in invalid.errors() if error["type"] != "default_factory_not_called"]
        errors.sort(key=lambda error: error["type"] != "extra_forbidden")
        raise _user_error([_message(error, fields) for error in errors]) from None
    if config.objective.contrast == "auto":
        contrast = CONTRASTS[config.objective.name][0]
        if config.objective.name == "mclr" and config.model.paradigm == "next_scale":
            contrast = "null"
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"contrast": contrast})})
    conflicts = list(_conflicts(config))
    if conflicts:
        raise _user_error(conflicts)
    return config


def load_resolved(path: str | Path) -> RunConfig:
    """The config that dump() wrote. path: the file, or the run folder that holds it."""
    path = Path(path)
    return from_dict(_read_yaml(path / FILE if path.is_dir() else path))


def dump(config: RunConfig) -> str:
    """The config as YAML, complete: load_resolved() gives it back whatever the presets have become."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, lists as lists: for logs and for telling two runs apart."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def load_data(name: str) -> Data:
    """The data section alone. name: as the argument `data` of load(). Raises UserError as load() does."""
    try:
        return Data.model_validate(read_preset("data", name).get("data", {}))
    except ValidationError as invalid:
        fields = _fields(None)
        raise _user_error([_message(error | {"loc": ("data", *error["loc"])}, fields) for error in invalid.errors()]) from None


def _merge(base: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or key.count(".") > MOST_LEVELS:
        raise UserError(f"override {override!r} is not of the form section.key=value, like train.lr=0.001")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it or check its brackets") from None
    if isinstance(value, dict):
        raise UserError(
            f"override {override!r} sets a whole section; set its keys one by one, like train.lr=0.001 train.batch=64"
        )
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def read_preset(kind: str, name: str) -> dict[str, Any]:
    presets = {path.stem: path for path in sorted((PRESETS / kind).glob("*.yaml"))}
    file = Path(name) if name.endswith((".yaml", ".yml")) else presets.get(name)
    if file is not None:
        sections = _read_yaml(file)
        return _on_base(kind, file, sections) if "base" in sections else sections
    if kind == "data" and Path(name).is_dir():
        return {"data": _read_dataset(Path(name))}
    close = difflib.get_close_matches(name, presets, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    other = "a folder made by `mclr prepare`" if kind == "data" else "the path of a YAML file"
    raise UserError(f"unknown {kind} {name}{hint} (known: {', '.join(presets)}; or {other})")


def _on_base(kind: str, file: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of a file upon those of its base: a recipe or preset by name, or the path of a YAML file, seen from the file."""
    base = str(sections.pop("base"))
    known = {path.stem: path for folder in ("recipes", "") for path in sorted((PRESETS / kind / folder).glob("*.yaml"))}
    found = file.parent / base if base.endswith((".yaml", ".yml")) else known.get(base)
    if found is None:
        raise UserError(f"{file}: unknown base {base} (known: {', '.join(known)}; or the path of a YAML file)")
    merged = _read_yaml(found)
    if "base" in merged:
        raise UserError(f"{file}: its base {base} has a base of its own, {merged['base']}; name that one, and set the rest here")
    _merge(merged, sections)
    return merged


def _read_dataset(folder: Path) -> dict[str, Any]:
    """The data section of a prepared folder; its dataset.json may say more, which is its reader's."""
    path = folder / "dataset.json"
    try:
        described = json.loads(_bytes_of(path))
        return {key: described[key] for key in ("name", "resolution", "channels", "num_classes")} | {"path": str(folder)}
    except OSError:
        raise UserError(f"{folder} has no readable dataset.json; make the folder with `mclr prepare`") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a dataset ({error}); make the folder with `mclr prepare`") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        sections = _parse_yaml(_bytes_of(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(sections, dict):
        raise UserError(f"{path}: expected sections ({', '.join(RunConfig.model_fields)}), each with its keys")
    return sections


def _bytes_of(path: Path) -> bytes:
    # a pipe would be waited for, a device has no end
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: it is no regular file")
    return path.read_bytes()


def _parse_yaml(text: str | bytes) -> Any:
    """Raises YAMLError for whatever is wrong."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    # the constructors behind tags and dates raise nearly anything
    except Exception as error:
        raise yaml.YAMLError(f"not valid YAML ({error})") from error


class _Loader(yaml.SafeLoader):
    """YAML whose keys are texts, each given once, and in which 1e-3 is a number as in YAML 1.2.

    Nothing that explodes: no aliases, few levels, whole numbers of 64 bits, texts that can name a file.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="no aliases here, write the value again", problem_mark=mark)
        self.depth += 1
        if self.depth > MOST_LEVELS:
            raise yaml.composer.ComposerError(problem=f"more than {MOST_LEVELS} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if NO_NAME.search(value):
            raise yaml.constructor.ConstructorError(problem="a text that can name no file", problem_mark=node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that _Loader would read as numbers."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _conflicts(config: RunConfig) -> Iterator[str]:
    """Settings that are fine alone and cannot go together, and settings that would have no effect."""
    model, data, objective, sample = config.model, config.data, config.objective, config.sample
    name, allowed = objective.name, CONTRASTS[objective.name]
    if objective.contrast not in allowed:
        yield f"objective.contrast={objective.contrast} is not for objective.name={name}: expected {' or '.join(allowed)}"
    if name == "mle" and objective.lam != 0:
        yield f"objective.lam={objective.lam} has no effect with objective.name=mle; there it must be 0"
    if name != "mle" and data.num_classes < 2:
        yield f"objective {name} needs two conditions or more; data.num_classes={data.num_classes}"
    if name in WITH_REFERENCE:
        if objective.beta is None:
            yield f"missing key objective.beta; objective {name} needs it, like objective.beta=0.1"
        if model.weights is None:
            yield f"objective {name} compares with the network before fine-tuning; give its weights by --init"
        if objective.lam <= 0 or objective.schedule.kind != "constant":
            yield f"objective {name} needs objective.lam > 0 and objective.schedule.kind=constant: its ratio is of whole samples"
        # with weights equal to the reference's the ratio must be 0, not that of a thinned network to a whole one
        dropout = "dropout" if isinstance(model, DiffusionModel) else "drop_path"
        if getattr(model.net, dropout) != 0:
            yield f"objective {name} compares whole networks; set model.net.{dropout}=0"
        if model.paradigm == "diffusion" and config.engine.precision == "bf16":
            yield (
                f"engine.precision=bf16 is too coarse for objective {name} of a diffusion model, whose ratio is a small difference "
                "times all dimensions; set engine.precision=fp32"
            )
    elif objective.beta is not None:
        yield f"objective.beta={objective.beta} has no effect with objective.name={name}; only {', '.join(WITH_REFERENCE)} have it"
    if name == "ddo" and objective.generated is None:
        yield "missing key objective.generated; objective ddo needs a dataset folder made by `mclr sample --dataset`"
    if name != "ddo" and objective.generated is not None:
        yield f"objective.generated={objective.generated} has no effect with objective.name={name}; only ddo has it"
    if name in ("mclr", "unlearn"):
        negative_window = objective.schedule.kind == "negative_window"
        if objective.contrast == "uniform":
            if objective.lam < 0:
                yield f"objective.lam={objective.lam} is out of range: must be >= 0 with objective.contrast=uniform"
            if negative_window:
                yield "objective.schedule.kind=negative_window needs another contrast; uniform allows no negative lam"
        elif objective.lam <= -1:
            yield f"objective.lam={objective.lam} is out of range: must be > -1 with objective.contrast={objective.contrast}"
        # lam = -below there, and nothing is left to learn at lam = -1
        if negative_window and objective.schedule.below == 1:
            yield "objective.schedule.below=1.0 is out of range: must be > 0 and < 1 in training"
    if config.train.drop_condition == 0:
        untrained = "the null condition, which train.drop_condition=0 leaves untrained"
        if objective.contrast == "null":
            yield f"objective.contrast=null needs {untrained}; set train.drop_condition=0.1"
        if sample.guide is None and (sample.gamma != 0 or sample.schedule.kind == "negative_window"):
            guided = f"sample.gamma={sample.gamma} with sample.schedule.kind={sample.schedule.kind}"
            yield f"{guided} needs {untrained}; set sample.guide=WEIGHTS, or train.drop_condition=0.1"
    # the bound compares two values of one token in nats: diffusion has a surrogate, and null has no contrast value
    if objective.bound is not None and (name != "mclr" or model.paradigm == "diffusion" or objective.contrast == "null"):
        yield f"objective.bound={objective.bound} needs mclr, a next_scale model and the contrast uniform, weighted or posterior"
    if config.engine.reference != "auto" and name not in WITH_REFERENCE:
        having = ", ".join(WITH_REFERENCE)
        yield f"engine.reference={config.engine.reference} has no effect with objective.name={name}; only {having} have one"
    if data.streamed:
        stream = f"data.path={data.path} is a stream"
        if data.balanced:
            yield f"data.balanced=true needs a dataset folder, which says how many samples there are; {stream}"
        for key in ("monitor_every", "keep_best"):
            if value := getattr(config.train, key):
                yield f"train.{key}={json.dumps(value)} needs the held-out images of a dataset folder; {stream}"
    owners = {
        "diffusion": ("steps", "solver", "sigma_min", "sigma_max", "rho", "churn"),
        "next_scale": ("top_k", "top_p", "more_smooth"),
    }
    for paradigm, names in owners.items():
        for key in names:
            value = getattr(sample, key)
            if paradigm != model.paradigm and value != Sample.model_fields[key].default:
                yield f"sample.{key}={value} has no effect: {model.name} is a {model.paradigm} model, this is for {paradigm}"
    if model.class_map is not None and model.weights is None:
        yield f"model.class_map={model.class_map} has no effect without weights; give them by --init"
    if isinstance(model, DiffusionModel) and objective.contrast in ("posterior", "weighted") and not model.posterior.weights:
        warmup, images = model.posterior.warmup_images, config.train.images
        if warmup >= images:
            way_out = f"set it to a third of that, model.posterior.warmup_images={images // 3}"
            yield f"model.posterior.warmup_images={warmup} leaves nothing of train.images={images} to the ratio; {way_out}"
    if isinstance(model, DiffusionModel):
        yield from _net_conflicts(model, data)


def _net_conflicts(model: DiffusionModel, data: Data) -> Iterator[str]:
    net, side, latents = model.net, data.resolution, ""
    if model.vae is not None:
        if data.channels != 3 or side % VAE_FACTOR:
            yield (
                f"model.vae={model.vae} reads 3 channels and a side that is a multiple of {VAE_FACTOR}, "
                f"not data.channels={data.channels} and data.resolution={side}; set model.vae=null for pixels"
            )
            return
        side //= VAE_FACTOR
        latents = f", latents of side {side},"
    halvings = len(net.channel_mult) - 1
    if side % 2**halvings:
        yield (
            f"data.resolution={data.resolution}{latents} cannot be halved {halvings} times, "
            "as the entries of model.net.channel_mult ask"
        )
        return
    channels = {side >> level: net.model_channels * mult for level, mult in enumerate(net.channel_mult)}
    for resolution in net.attn_resolutions:
        if resolution not in channels:
            have = ", ".join(map(str, channels))
            way_out = f"choose a --model for {data.resolution}-pixel images, or set that key"
            yield f"model.net.attn_resolutions: {resolution} is not a resolution of this net ({have}): {way_out}"
    # the middle of the net always has attention
    for resolution in {*net.attn_resolutions, side >> halvings} & channels.keys():
        if channels[resolution] % net.channels_per_head:
            yield (
                f"model.net.channels_per_head={net.channels_per_head} must divide the {channels[resolution]} channels "
                f"at resolution {resolution}"
            )


def _user_error(messages: list[str]) -> UserError:
    more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    return UserError(messages[0] + more)


def _fields(paradigm: str | None) -> dict[str, FieldInfo]:
    """Dotted key -> field of everything that may be set for this paradigm, sections included."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            yield prefix + name, field
            inner = MODELS.get(str(paradigm), DiffusionModel) if prefix + name == "model" else field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from walk(inner, f"{prefix}{name}.")

    return dict(walk(RunConfig, ""))


EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "more entries",
    "too_long": "fewer entries",
}


def _message(error: Any, fields: dict[str, FieldInfo]) -> str:
    """One line of ours for one error of pydantic's."""
    # pydantic names the member of the union after `model`; an entry of a list is a number
    names = [part for i, part in enumerate(error["loc"]) if not (i == 1 and error["loc"][0] == "model" and part in MODELS)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)[1:]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(key, fields)
    field, inner = fields[key.partition("[")[0]], _keys_of(key, fields)
    given = f"{key}={json.dumps(error['input'], default=str)}"
    if kind == "missing" and isinstance(names[-1], int):
        return f"{key.partition('[')[0]}={json.dumps(error['input'])}: expected more entries"
    if kind == "missing" and inner:
        return f"missing section {key}; it holds {inner[0]} and more"
    if kind == "missing":
        return f"missing key {key}; set it in a preset or with {key}=..."
    if kind == "union_tag_not_found":
        return f"missing key {key}.paradigm; expected {' or '.join(MODELS)}"
    if kind == "union_tag_invalid":
        return f"{key}.paradigm={json.dumps(error['input']['paradigm'], default=str)}: expected {' or '.join(MODELS)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{given}: {key} is a section; set one of its keys, like {inner[0]}=..."
    if kind == "value_error":
        return f"{key}.{context['error']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{given} is out of range: must be {_range(field)}"
    if kind == "literal_error":
        return f"{given}: expected {context['expected'].replace(chr(39), '')}"
    if kind in EXPECTED:
        return f"{given}: expected {EXPECTED[kind]}" + (" or null" if type(None) in get_args(field.annotation) else "")
    return f"{given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown_key(key: str, fields: dict[str, FieldInfo]) -> str:
    """Suggests the same name in another section (the shallowest), else a similar name in this one."""
    section, _, name = key.rpartition(".")
    owner = next((paradigm for paradigm in MODELS if key in _fields(paradigm)), None)
    if owner:
        return f"unknown key {key}; only {owner} models have it"
    siblings = {other.rpartition(".")[2]: other for other in _keys_of(section, fields)}
    known = f"known in {section}" if section else "known"
    close = sorted((other for other in fields if other.rpartition(".")[2] == name), key=lambda other: other.count("."))
    close = close or [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    return f"unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"{known}: {', '.join(siblings)}")


def _keys_of(section: str, fields: dict[str, FieldInfo]) -> list[str]:
    return [key for key in fields if key.rpartition(".")[0] == section]


def _range(field: FieldInfo) -> str:
    """The bounds of a field, or of the entries of its list, as in `>= 0 and < 1`."""

    def bounds(annotation: Any, metadata: Any) -> Iterator[str]:
        for limit in metadata:
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(limit, name):
                    yield f"{sign} {getattr(limit, name)}"
        for part in get_args(annotation):
            yield from bounds(part, part.metadata if isinstance(part, FieldInfo) else ())

    return " and ".join(dict.fromkeys(bounds(field.annotation, field.metadata)))
