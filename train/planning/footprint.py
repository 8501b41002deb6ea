"""The memory and FLOPs of a run's networks, found with fake tensors, which take neither.

R rows of one forward. Samples are images; there are twice as many where the objective also takes generated ones. Activations: the most
bytes alive in forward and backward besides weights, for the most rows that the objective may need (a drawn condition that coincides with
the matched one saves a row). Gradients are dropped as soon as they are made. Kernels and engine.compile count as plain torch.
"""

from collections.abc import Callable, Set
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
from mclr.diffusion import Diffusion
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
    """Counts the bytes of the tensors that are alive inside, and the most so far. Reading a number out of a tensor gives 0.

    known: storages that existed before and are not counted.
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


class Model:
    """The networks of a run as fake tensors, and what was measured of them. encoder: that of the run.

    groups: elements of every weight, in the groups of the optimizer; count: of all. block: elements of the largest block. buffers,
    reference, guide: bytes. posterior: parameters of the classifier. flops, classifier_flops: of one row's forward.
    """

    def __init__(self, config: RunConfig, encoder: Encoder):
        self.config, self.bf16 = config, config.engine.precision == "bf16"
        self.objective = build_objective(config)
        self.paradigm: Paradigm = build_paradigm(config, encoder)
        self.shape, self.scales, self.code_width = encoder.shape(config.data), None, 0
        if isinstance(encoder, Tokens):
            self.scales, self.code_width = encoder.tokenizer.config.scales, encoder.tokenizer.config.z_channels
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, Watch():
            net = self.net = build_net(config, encoder).train()
            self.classifier = self._classifier()
            optimizer = make_optimizer(net, 0.0, (0.0, 0.0), 0.0, 0.0)
            self.groups = tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups)
            self.count = sum(map(sum, self.groups))
            self.block = max((elements_of(block) for block in getattr(net, "blocks", [net])), default=0)
            self.buffers = sum(t.nbytes for t in net.buffers())
            # Frozen stores linear layers in bf16
            linear = sum(elements_of(m) for m in net.modules() if isinstance(m, nn.Linear))
            self.reference = 4 * elements_of(net) - (2 * linear if self.bf16 else 0)
            guide = config.objective.guide.weights
            self.guide = 4 * read_config(find_weights(guide)).get("parameters", self.count) if guide else 0
            self.posterior = elements_of(self.classifier) if self.classifier else 0
            self.flops = self._of_all_blocks(lambda: flops_of(lambda: self._values(self._probe(1), Forward(1), 1)))
            self.classifier_flops = flops_of(lambda: self._classify(self._probe(1))) if self.classifier else 0
        self.measured = cache(lambda *call: self._of_all_blocks(lambda: self._measured(*call)))

    def _classifier(self) -> NoiseClassifier | None:
        model = self.config.model
        if not (isinstance(model, DiffusionModel) and self.objective.needs_posterior):
            return None
        if model.posterior.weights is None:
            return build_classifier(self.config)
        return NoiseClassifier(NoiseClassifierConfig(**read_config(find_weights(model.posterior.weights))["config"]))

    def _of_all_blocks(self, measure: Callable[[], int]) -> int:
        """What `measure` finds of the network. Each further block adds the same where all are alike: then it looks at 2 and 3 of them."""
        blocks = getattr(self.net, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len({tuple(p.shape for p in block.parameters()) for block in blocks}) > 1:
            return measure()
        found = []
        for count in (2, 3):
            self.net.blocks = blocks[:count]
            found.append(measure())
        self.net.blocks = blocks
        return found[0] + (found[1] - found[0]) * (len(blocks) - 2)

    def _probe(self, samples: int) -> Probe:
        if isinstance(self.paradigm, NextScale):
            tokens = torch.zeros(samples, self.paradigm.dims, dtype=torch.int64)
            teacher = torch.zeros(samples, self.paradigm.dims - 1, self.code_width)
            return Probe({"tokens": tokens, "teacher": teacher}, torch.zeros(tokens.shape))
        assert self.shape is not None
        target, state = torch.zeros(samples, *self.shape), torch.zeros(samples, *self.shape)
        return Probe({"target": target, "state": state, "level": torch.zeros(samples)}, torch.zeros(samples, 1))

    def _values(self, probe: Probe, forward: Forward, samples: int) -> Tensor:
        """The sum of all values and aux losses of one forward."""
        index = torch.zeros(forward.rows * samples, dtype=torch.int64)
        prediction = self.paradigm.predict(self.net, probe, index, torch.zeros_like(index), forward.terms)
        mixed: dict[str, Any] = {}
        if self.objective.contrast == "null" and torch.is_grad_enabled():
            mixed = {"guide": (prediction[0].detach().clone(), prediction[1]), "mix_RT": torch.zeros(probe.progress_BT.shape)}
        found = self.paradigm.log_likelihood(prediction, probe, index, **mixed)
        return found.value_RT.sum() + found.aux_R.sum()

    def _classify(self, probe: Probe) -> Tensor:
        assert self.classifier is not None and isinstance(self.paradigm, Diffusion)
        return self.classifier(*self.paradigm.noisy(probe)).sum()

    def activations(self, micro_batch: int, lockstep: bool) -> float:
        """The most bytes alive in forward and backward of this many images: measured at POINTS, linear between and beyond."""
        if micro_batch in POINTS:
            return self.measured(micro_batch, lockstep)
        low, high = next(((a, b) for a, b in pairwise(POINTS) if micro_batch < b), POINTS[-2:])
        first, last = self.measured(low, lockstep), self.measured(high, lockstep)
        return first + (last - first) * (micro_batch - low) / (high - low)

    def _measured(self, micro_batch: int, lockstep: bool) -> int:
        """The most bytes alive in forward and backward."""
        calls = self.calls(lockstep)
        samples = calls.samples * micro_batch
        weights = [t for net in (self.net, self.classifier) if net for t in (*net.parameters(), *net.buffers())]
        hooks = [t.register_post_accumulate_grad_hook(drop_gradient) for t in weights if t.requires_grad]
        with self.fake, using("torch"), Watch({t.untyped_storage()._cdata for t in weights}) as watch:
            with autocast_of(self.net, self.bf16):
                probe = self._probe(samples)
                loss = sum((self._values(probe, forward, samples) for forward in calls.grad), torch.zeros(()))
                if self.classifier is not None:
                    loss = loss + self._classify(probe)
            loss.backward()
        for hook in hooks:
            hook.remove()
        return watch.most

    def calls(self, lockstep: bool) -> Calls:
        return calls_of(self.objective, self.scales, self.config.data.num_classes, lockstep)

    def share_of(self, forwards: tuple[Forward, ...]) -> float:
        """Rows per sample; a row that is cut short counts by its share of the terms."""
        return rows_per_sample(forwards, self.paradigm.dims if self.scales else 1)


def elements_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def drop_gradient(p: Tensor) -> None:
    p.grad = None
