"""The memory and FLOPs of a run's networks, found with fake tensors, which take neither.

R rows of one forward. Samples are images; there are twice as many where the objective also takes generated ones. Activations: the most
bytes alive in forward and backward besides weights, for the most rows that the objective may need (a drawn condition that coincides with
the matched one saves a row). Gradients are dropped as soon as they are made. Kernels and engine.compile count as plain torch.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mclr.configs.schema import DiffusionModel, RunConfig
from mclr.kernels.choice import using
from mclr.likelihood import Paradigm, Probe
from mclr.models.features import NoiseClassifier, NoiseClassifierConfig
from mclr.next_scale import NextScale
from mclr.train.data.encoders import Encoder, Tokens
from mclr.train.engine.base import autocast_of, make_optimizer
from mclr.train.training.compute import Calls, Forward, calls_of, flops_of, rows_per_sample
from mclr.train.training.networks import build_classifier, build_net, build_objective, build_paradigm
from mclr.train.weights.folder import find_weights, read_config

POINTS = (1, 2, 4, 8, 16, 32, 64)  # micro-batches that are measured


class Watch(TorchDispatchMode):
    """Follows the storages that fake tensors make inside: bytes alive now, and the most so far. Reading a value gives 0.

    known: storages that are not counted, since they were there before; views of them may appear.
    """

    def __init__(self, known: Set[int] = frozenset()):
        super().__init__()
        self.known = known
        self.alive: dict[int, ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in self.alive:
                    self.alive[key] = ref(storage, self._forget(key, size))
                    self.now += size
                    self.most = max(self.most, self.now)
        return out

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self.alive[key]
            self.now -= size

        return forget


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks of a run.

    groups: elements of every weight, in the groups of the optimizer. block: elements of the largest block. buffers, reference: bytes.
    classifier: parameters. flops, classifier_flops: of one row's forward.
    """

    groups: tuple[tuple[int, ...], ...]
    block: int
    buffers: int
    reference: int
    classifier: int
    flops: int
    classifier_flops: int

    @property
    def count(self) -> int:
        return sum(map(sum, self.groups))


class Model:
    """The networks of a run as fake tensors, and what was measured of them. encoder: that of the run."""

    def __init__(self, config: RunConfig, encoder: Encoder):
        self.config, self.bf16 = config, config.engine.precision == "bf16"
        self.objective = build_objective(config.objective)
        self.scales = encoder.tokenizer.config.scales if isinstance(encoder, Tokens) else None
        self.paradigm: Paradigm = build_paradigm(config, encoder)
        self.shape = encoder.shape(config.data)
        self.code_width = encoder.tokenizer.config.z_channels if isinstance(encoder, Tokens) else 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, Watch():
            self.net = build_net(config, encoder).train()
            self.classifier = self._classifier()
            self.sizes = self._sizes()
        self.measured = cache(lambda *call: self._of_all_blocks(lambda: self._measured(*call)))

    def _classifier(self) -> NoiseClassifier | None:
        model = self.config.model
        if not (isinstance(model, DiffusionModel) and self.objective.needs_posterior):
            return None
        if model.posterior.weights is None:
            return build_classifier(self.config)
        return NoiseClassifier(NoiseClassifierConfig(**read_config(find_weights(model.posterior.weights))["config"]))

    def _sizes(self) -> Sizes:
        optimizer = make_optimizer(self.net, 0.0, (0.0, 0.0), 0.0, 0.0)
        blocks = [sum(p.numel() for p in block.parameters()) for block in getattr(self.net, "blocks", [self.net])]
        linear = sum(p.numel() for m in self.net.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        return Sizes(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups),
            block=max(blocks, default=0),
            buffers=sum(t.nbytes for t in self.net.buffers()),
            # Frozen stores linear layers in bf16
            reference=4 * sum(p.numel() for p in self.net.parameters()) - (2 * linear if self.bf16 else 0),
            classifier=sum(p.numel() for p in self.classifier.parameters()) if self.classifier else 0,
            flops=self._of_all_blocks(lambda: (flops_of(lambda: self._values(self._probe(1), Forward(1), 1)),))[0],
            classifier_flops=flops_of(lambda: self._classify(self._probe(1))) if self.classifier else 0,
        )

    def _of_all_blocks(self, measure: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """What `measure` finds of the network. Each further block adds the same where all are alike: then it looks at 2 and 3 of them."""
        blocks = getattr(self.net, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len({tuple(p.shape for p in block.parameters()) for block in blocks}) > 1:
            return measure()
        found = []
        for count in (2, 3):
            self.net.blocks = blocks[:count]
            found.append(measure())
        self.net.blocks = blocks
        return tuple(two + (three - two) * (len(blocks) - 2) for two, three in zip(*found, strict=True))

    def _probe(self, samples: int) -> Probe:
        if isinstance(self.paradigm, NextScale):
            tokens = torch.zeros(samples, self.paradigm.dims, dtype=torch.int64)
            teacher = torch.zeros(samples, self.paradigm.dims - 1, self.code_width)
            return Probe({"tokens": tokens, "teacher": teacher}, torch.zeros(tokens.shape))
        assert self.shape is not None
        x, noisy = torch.zeros(samples, *self.shape), torch.zeros(samples, *self.shape)
        return Probe({"x": x, "noisy": noisy, "sigma": torch.zeros(samples)}, torch.zeros(samples, 1))

    def _values(self, probe: Probe, forward: Forward, samples: int) -> Tensor:
        """The sum of all values and aux losses of one forward."""
        index = torch.zeros(forward.rows * samples, dtype=torch.int64)
        prediction = self.paradigm.predict(self.net, probe, index, torch.zeros_like(index), forward.terms)
        mixed = {}
        if self.objective.contrast == "null" and torch.is_grad_enabled():
            mixed = {"guide": prediction[0].detach().clone(), "mix_RT": torch.zeros(probe.progress_BT.shape)}
        found = self.paradigm.log_likelihood(prediction, probe, index, **mixed)
        return found.value_RT.sum() + found.aux_R.sum()

    def _classify(self, probe: Probe) -> Tensor:
        assert self.classifier is not None
        return self.classifier(probe.inputs["noisy"], probe.inputs["sigma"]).sum()

    def activations(self, micro_batch: int, lockstep: bool) -> float:
        """The most bytes alive in forward and backward of this many images: measured at POINTS, linear between and beyond."""
        if micro_batch in POINTS:
            return self.measured(micro_batch, lockstep)[1]
        low, high = next(((a, b) for a, b in pairwise(POINTS) if micro_batch < b), POINTS[-2:])
        (_, first), (_, last) = self.measured(low, lockstep), self.measured(high, lockstep)
        return first + (last - first) * (micro_batch - low) / (high - low)

    def _measured(self, micro_batch: int, lockstep: bool) -> tuple[int, int]:
        """(bytes saved for backward, the most bytes alive in forward and backward)."""
        calls, saved = self.calls(lockstep), {}
        samples = calls.samples * micro_batch
        nets = [self.net, *([self.classifier] if self.classifier else [])]
        parameters = [p for net in nets for p in net.parameters()]
        known = {t.untyped_storage()._cdata for t in (*parameters, *(t for net in nets for t in net.buffers()))}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage
            return t

        hooks = [p.register_post_accumulate_grad_hook(drop_gradient) for p in parameters]
        with self.fake, using("torch"), Watch(known) as watch:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast_of(self.net, self.bf16):
                probe = self._probe(samples)
                loss = sum((self._values(probe, forward, samples) for forward in calls.grad), torch.zeros(()))
                if self.classifier is not None:
                    loss = loss + self._classify(probe)
            held = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()
        for hook in hooks:
            hook.remove()
        return held, watch.most

    def calls(self, lockstep: bool) -> Calls:
        return calls_of(self.objective, self.scales, self.config.data.num_classes, lockstep)

    def share_of(self, forwards: tuple[Forward, ...]) -> float:
        """Rows per sample; a row that is cut short counts by its share of the terms."""
        return rows_per_sample(forwards, self.paradigm.dims if self.scales else 1)


def drop_gradient(p: Tensor) -> None:
    p.grad = None
