"""The VAR paradigm: exact log-likelihood of tokens, coarse-to-fine sampling.

B samples; R scored rows; L tokens of all scales, the terms of a row (T = L); l tokens of one scale; V codes; E code dimensions.
The network: net(teacher_BlE, c_R, index_R, strength_R, cache) -> (h_RlD, head). Row r is sample index_R[r] under condition c_R[r];
without index_R rows are samples. strength_R is given to networks with a dial. head(h_RlD) -> logits_RlV, affine in h; head(h_RlD,
tokens_Bl, index_R, guide_RlD, mix_Rl) -> log p of the tokens [R, l], under the logits z + mix (z - sg z_guide) where a guide's h is given.
The tokenizer turns tokens into the teacher inputs of the next scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mclr.adapters import own_logits
from mclr.guidance import Guidance, mix
from mclr.likelihood import Draws, Net, Prediction, Probe, Scores, ask, network

HINT = "give it as mclr.from_logits makes it, with one condition more than classes, the null condition"


def scale_progress(scales: Sequence[int]) -> list[float]:
    """The progress of every scale, evenly from 0 (coarsest) to 1 (finest); of a single one 0."""
    return [k / max(len(scales) - 1, 1) for k in range(len(scales))]


def likely(logits_BlV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """(prob_BlN, code_BlN) of the top_k most likely codes (0 = all), cut to the smallest set of mass >= top_p.

    prob is 0 for codes that are cut. code is None where nothing is sorted: then N = V, in order."""
    logits = logits_BlV.float()
    code = None
    # Sorting costs more than all the rest, so sort only where something is cut.
    if top_k > 0 or top_p < 1:
        logits, code = logits.sort(dim=-1, descending=True, stable=True)
        logits = logits[..., : top_k or None]
    prob = logits.softmax(-1)
    if top_p < 1:
        prob = prob * (prob.cumsum(-1) - prob < top_p)
    return prob, code if code is None else code[..., : prob.shape[-1]]


def pick(logits_BlV: Tensor, uniform_Bl: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draw one of the likely codes per token, by inverse CDF."""
    prob, code = likely(logits_BlV, top_k, top_p)
    cdf = prob.cumsum(-1)
    drawn = (cdf <= uniform_Bl[..., None] * cdf[..., -1:]).sum(-1).clamp(max=prob.shape[-1] - 1)
    return drawn if code is None else code.gather(-1, drawn[..., None])[..., 0]


def blend(logits_BlV: Tensor, uniform_BlV: Tensor, top_k: int, top_p: float, progress: float) -> Tensor:
    """Shares_BlV of the likely codes, where `pick` draws one: VAR's `more_smooth`, defined only in its code.

    The Gumbel-softmax of (1 + progress) logits at temperature max(.27 (1 - .95 progress), .005).
    """
    prob, code = likely(logits_BlV, top_k, top_p)
    # A uniform of 0 would give -inf, and NaN where only one code is left.
    gumbel = -(-uniform_BlV.clamp(min=1e-9).log()).log()
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    gumbel = gumbel if code is None else gumbel.gather(-1, code)
    # log p equals the logits up to a constant, which the softmax removes.
    share = (((1 + progress) * prob.log() + gumbel) / temperature).softmax(-1)
    return share if code is None else torch.zeros_like(uniform_BlV).scatter(-1, code, share)


@dataclass(frozen=True)
class NextScale:
    """The paradigm of token networks: how tokens are scored and sampled. Raises ValueError for settings out of range.

    scales: side of each token map, coarse to fine. null: index of the null condition. tokenizer: teacher(tokens_BL), start(B)
    and advance(f_hat, tokens_Bl or shares_BlV, scale) of a multi-scale tokenizer. top_k, top_p: of sampling (VAR, arXiv 2404.02905).
    more_smooth: sample blends of codes, for pictures.
    """

    scales: tuple[int, ...]
    null: int
    tokenizer: Any
    top_k: int = 0
    top_p: float = 1.0
    more_smooth: bool = False

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1 or self.scales[0] != 1:
            raise ValueError(f"scales={self.scales}: must be one or more sides >= 1, the first of them 1")
        if self.null < 1:
            raise ValueError(f"null={self.null} is out of range: must be >= 1, the number of conditions")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is out of range: must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is out of range: must be > 0 and <= 1")

    @property
    def dims(self) -> int:
        return sum(side * side for side in self.scales)

    def check(self, x_B: Tensor) -> None:
        if x_B.shape[1:] != (self.dims,) or x_B.dtype != torch.int64:
            raise ValueError(f"x must be int64 tokens [B, {self.dims}], not {x_B.dtype} {list(x_B.shape)}")

    def probe(self, x_B: Tensor, draws: Draws) -> Probe:
        """Teacher inputs of the tokens; nothing is drawn. x_B: tokens [B, L] int64."""
        sizes = torch.tensor([side * side for side in self.scales])
        progress_L = torch.tensor(scale_progress(self.scales)).repeat_interleave(sizes).to(x_B.device)
        with torch.no_grad():
            teacher = self.tokenizer.teacher(x_B)
        return Probe({"tokens": x_B, "teacher": teacher}, progress_L.expand(len(x_B), -1))

    def predict(self, net: Net, probe: Probe, index_R: Tensor, c_R: Tensor, terms: int | None = None) -> Prediction:
        """(h of the first `terms` tokens [R, terms, D], head): a mixture of h makes the same mixture of logits.

        terms: tokens of whole scales.
        """
        # the first token has no teacher input
        last = None if terms is None else terms - 1
        teacher = probe.inputs["teacher"][:, :last]
        return ask(net, (len(c_R), terms or self.dims), HINT, teacher, c_R, index_R, *probe.told(index_R))

    def log_likelihood(
        self, prediction: Prediction, probe: Probe, index_R: Tensor, guide: Prediction | None = None, mix_RT: Tensor | None = None
    ) -> Scores:
        """log p(token | coarser scales, c) of every token, exact, in nats; tokens need no calibration."""
        h, head = prediction
        tokens = probe.inputs["tokens"][:, : h.shape[1]]
        if guide is None or guide[1] == head:
            value_RL = head(h, tokens, index_R, guide and guide[0], mix_RT)
        else:
            # another network has hidden states of its own, so the logits are mixed
            with torch.no_grad():
                guide_logits = guide[1](guide[0])
            value_RL = own_logits(head(h), tokens, index_R, guide_logits, mix_RT)
        return Scores(value_RL, value_RL.new_zeros(len(value_RL)))

    def compared(self, value_RT: Tensor, prediction: Prediction, frozen: Prediction) -> Tensor:
        return value_RT

    @torch.no_grad()
    def sample(self, net: Any, c_B: Tensor, guidance: Guidance, draws: Draws) -> Tensor:
        """Tokens [B, L], or with more_smooth the feature map f_hat that the blends add up to.

        Scales of weight 0 skip the guide. It reads them in one block-causal pass at the next scale whose weight is not 0.
        """
        net = network(net, "net")
        guide, dial = guidance.guide_for(net, self.null), guidance.told(net, c_B)
        if not hasattr(net, "new_cache") or not hasattr(guide.net, "new_cache"):
            raise ValueError(f"the network has no new_cache(rows): {HINT}")
        progress = scale_progress(self.scales)
        weights = [guidance.gamma.at(p) for p in progress]
        cache, guide_cache = net.new_cache(len(c_B)), None
        f_hat = self.tokenizer.start(len(c_B))
        teacher = f_hat.new_zeros(len(c_B), 0, *f_hat.shape[1:2])
        unseen, tokens = [], []
        for k, side in enumerate(self.scales):
            h, head = ask(net, (len(c_B), side * side), HINT, teacher, c_B, *dial, cache=cache)
            logits = head(h)
            unseen.append(teacher)
            if weights[k] != 0:
                if guide_cache is None:
                    guide_cache = guide.net.new_cache(len(c_B))
                guide_h, guide_head = guide.net(torch.cat(unseen, 1), guide.conditions(c_B), cache=guide_cache)
                logits, unseen = mix(logits, guide_head(guide_h[:, -side * side :]), weights[k]), []
            if self.more_smooth:
                codes = blend(logits, draws.uniform(side * side, logits.shape[-1]), self.top_k, self.top_p, progress[k])
            else:
                codes = pick(logits, draws.uniform(side * side), self.top_k, self.top_p)
                tokens.append(codes)
            f_hat, teacher = self.tokenizer.advance(f_hat, codes, k)
        return f_hat if self.more_smooth else torch.cat(tokens, 1)
