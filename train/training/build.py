"""From a configuration to the objects of a run: its kernels, its data, its networks, and the task that the step works on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mclr.configs.schema import DiffusionModel, NextScaleModel, RunConfig
from mclr.configs.schema import Schedule as ScheduleConfig
from mclr.errors import UserError
from mclr.kernels.choice import interpreting, runs_triton, use
from mclr.kernels.registry import OPS
from mclr.likelihood import Guide
from mclr.loss import Loss, project
from mclr.models.features import NoiseClassifier
from mclr.models.registry import fold
from mclr.train.data.cache import through_cache
from mclr.train.data.encoders import Encoder
from mclr.train.data.source import Source, open_images
from mclr.train.engine.base import Engine, Frozen, make_optimizer
from mclr.train.engine.zero import DeepSpeedEngine, Sharded
from mclr.train.system.ranks import world
from mclr.train.training.class_map import class_map, class_names
from mclr.train.training.networks import (
    build_classifier,
    build_encoder,
    build_guide,
    build_net,
    build_objective,
    build_paradigm,
    build_schedule,
)
from mclr.train.training.step import Task
from mclr.train.weights.folder import find_weights, load_into, sha256

LARGE = 2e9  # parameters of a reference that `auto` divides among the ranks: 8 GB


def choose_kernels(mode: str, device: torch.device) -> str:
    """Choose the operations that this process runs as Triton kernels, and say so in a line. Raises UserError where they need a GPU."""
    # for the whole process: on CUDA, convolutions would otherwise use TF32
    torch.backends.cudnn.allow_tf32 = False
    if mode == "triton" and device.type != "cuda" and not interpreting():
        raise UserError("engine.kernels=triton needs a GPU: use auto")
    use(mode)
    fused = [name for name in OPS if runs_triton(name, torch.empty(0, device=device))]
    plain = "torch, no kernel has won on this GPU" if mode == "auto" and device.type == "cuda" else "torch"
    return f"kernels    {mode}: {plain if not fused else 'Triton for ' + ', '.join(fused)}"


def compile_blocks(net: nn.Module) -> None:
    """torch.compile for every block of a network, or for the whole of one that has none.

    Only the forward of a block is compiled: activation checkpointing and ZeRO 3's gathering around it stay plain torch. Do not copy the
    network afterwards: the copy would run the original's code.
    """
    compile_every_length()
    for module in getattr(net, "blocks", [net]):
        module.forward = compiled(module.forward)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward, with code of its own for every side of images.

    Code for any side, which torch.compile would make for the blocks of a U-Net, stops inductor with an error (torch 2.14, attention).
    """
    run = torch.compile(forward)

    def call(*inputs: Any) -> Any:
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.ndim == 4:
                torch._dynamo.mark_static(x, [2, 3])
        return run(*inputs)

    return call


def compile_every_length() -> None:
    """Let torch.compile make code for every kind of block and every number of tokens, with and without gradient.

    Beyond its limit, by default 8, it would run the rest as eager code.
    """
    torch._dynamo.config.recompile_limit = 256


def open_source(config: RunConfig, path: str | None = None) -> Source:
    """The training samples at data.path, or at another path. Raises UserError when they are damaged, or not what the config says."""
    data, model = config.data, config.model
    if path is None and data.streamed:
        # its webdataset is not on every machine
        from mclr.train.data.stream import Stream

        return Stream(data, config.train.seed)
    path = path or data.path
    tokenizer = sha256(find_weights(model.tokenizer)) if isinstance(model, NextScaleModel) else None
    source = open_images(path, "train", config.train.seed, data.balanced, data.damaged, tokenizer)
    for key in ("resolution", "channels", "num_classes"):
        here, there = getattr(data, key), getattr(source.info, key)
        if here != there:
            raise UserError(f"data.{key}={here}, but {path} holds {key} {there}: correct one of them")
    return source


def open_generated(config: RunConfig) -> Source:
    """The samples at objective.generated. Raises UserError unless they were drawn, unguided, from the weights that the run starts from."""
    path, model = config.objective.generated, config.model
    source = open_source(config, path)
    drawn, fault = source.info.drawn, None
    if drawn is None:
        fault = "does not say what drew it"
    elif drawn["weights"] != sha256(find_weights(str(model.weights))):
        fault = f"was drawn from other weights than model.weights={model.weights}"
    elif not build_schedule(ScheduleConfig.model_validate(drawn["sample.schedule"]), drawn["sample.gamma"]).is_zero:
        fault = "was drawn with guidance, the reference is without"
    elif isinstance(model, NextScaleModel) and drawn["tokenizer"] != sha256(find_weights(model.tokenizer)):
        fault = f"was drawn with another tokenizer than {model.tokenizer}"
    elif isinstance(model, NextScaleModel) and (drawn["sample.top_k"] or drawn["sample.top_p"] < 1):
        fault = "was drawn with top_k or top_p, the reference is without"
    if fault:
        raise UserError(f"objective.generated={path} {fault}; draw them again: mclr sample {model.weights} --out DIR --dataset")
    return source


def posterior_warmup(config: RunConfig) -> int:
    """Images seen before there is any ratio: while a posterior classifier learns from scratch; else 0.

    In whole steps, so that neither micro-batches nor ranks decide which samples have a ratio.
    """
    model, batch = config.model, config.train.batch
    if not isinstance(model, DiffusionModel) or model.posterior.weights or not build_objective(config).needs_posterior:
        return 0
    return -(-model.posterior.warmup_images // batch) * batch


@dataclass(frozen=True)
class Networks:
    """What a run trains and trains with, before any engine.

    classifier: of the posterior. reference: the network before fine-tuning. generated: samples of the reference. guide: another network
    for the contrast null. Each of these four is None where the objective does not need it.
    """

    encoder: Encoder
    net: nn.Module
    classifier: NoiseClassifier | None
    reference: nn.Module | None
    generated: Source | None
    guide: Guide | None = None


def build_networks(config: RunConfig, device: torch.device) -> Networks:
    """With the weights that the run starts from, or fresh ones by its seed. Raises UserError when weights do not fit."""
    model, data, objective = config.model, config.data, build_objective(config)
    # as in choose_kernels
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.train.seed)
    encoder = build_encoder(config, device)
    net = build_net(config, encoder)
    if model.weights:
        weights = find_weights(model.weights)
        load_into(net, weights, class_map(model, data, weights, config.objective.generated))
    classifier = build_classifier(config) if isinstance(model, DiffusionModel) and objective.needs_posterior else None
    reference = copy.deepcopy(net) if objective.needs_reference else None
    generated = through_cache(open_generated(config), encoder, data, model) if objective.needs_generated else None
    guide = build_guide(config, net, "objective", class_names(data))
    return Networks(encoder, net, classifier, reference, generated, guide)


def is_sharded(how: str, parameters: int, ranks: int) -> bool:
    """Whether so many ranks divide a reference of so many parameters, instead of holding it whole. how: engine.reference."""
    return how == "sharded" or (how == "auto" and parameters > LARGE and ranks > 1)


def build_task(config: RunConfig, source: Source, networks: Networks, device: torch.device, micro_batch: int) -> Task:
    """Everything that trains. micro_batch: images per forward of one rank. Collective with DeepSpeed."""
    settings, model, engine, ranks = config.train, config.model, config.engine, world()[2]
    bf16 = engine.precision == "bf16"
    normalised = project(networks.net.to(device))
    reference = None
    if networks.reference is not None:
        project(networks.reference.to(device))
        fold(networks.reference)
        size = sum(p.numel() for p in networks.reference.parameters())
        reference = (Sharded if is_sharded(engine.reference, size, ranks) else Frozen)(networks.reference, bf16)

    guide = networks.guide
    if guide is not None:
        fold(guide.net.to(device))
        # held whole on every rank
        guide = replace(guide, net=Frozen(guide.net, bf16))

    def engine_of(net: nn.Module, lr: float, weight_decay: float, zero: int, offload: bool) -> Engine:
        net.to(device).train()
        if engine.compile:
            compile_blocks(net)
        optimizer = make_optimizer(net, lr, settings.betas, settings.eps, weight_decay)
        if engine.here() != "deepspeed":
            return Engine(net, optimizer, engine.gradient_clipping, settings.batch // micro_batch, bf16)
        accumulation = settings.batch // ranks // micro_batch
        return DeepSpeedEngine(net, optimizer, engine.gradient_clipping, accumulation, bf16, micro_batch, zero, offload)

    trained = engine_of(networks.net, settings.lr, settings.weight_decay, engine.zero, engine.offload)
    posterior_lr = model.posterior.lr if isinstance(model, DiffusionModel) else 0.0
    posterior_engine = None
    if networks.classifier is not None:
        # too small to be worth dividing
        posterior_engine = engine_of(networks.classifier, posterior_lr, 0.0, zero=0, offload=False)
    loss = Loss(
        build_paradigm(config, networks.encoder),
        build_objective(config),
        posterior=posterior_engine,
        reference=reference,
        guide=guide,
        drop_condition=settings.drop_condition,
        seed=settings.seed,
        warmup=posterior_warmup(config),
    )
    return Task(
        source=source,
        encoder=networks.encoder,
        loss=loss,
        engine=trained,
        normalised=normalised,
        posterior_engine=posterior_engine,
        posterior_lr=posterior_lr,
        generated=networks.generated,
        flip=config.data.flip,
        bf16=bf16,
        device=device,
    )
