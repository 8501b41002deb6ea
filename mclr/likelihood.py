"""What the likelihood ratio is made of: random draws, scored rows, and the paradigm that scores them.

B samples; R scored rows; T terms per row (1 for diffusion, L tokens for next-scale models).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Net = Callable[..., Any]
Prediction = tuple[Tensor, Any]  # (answer, rest) of a network
# Seeds of Draws beyond those of training, one per purpose: no image and no measurement repeats the random numbers of training.
# A measurement takes the same draws every time, so that their noise does not move its curve.
SAMPLING, VIEWS, PROJECTION, LOSS, ENCODING = (2**63 + n for n in range(5))


class Draws:
    """Random numbers of a batch, drawn per sample from (seed, position): the same in any batch, on any number of ranks, after any resume.

    seed: of the run. positions: one integer per sample, its global place in training, or the seed of the image in sampling.
    Philox is counter-based (numpy), so neighbouring positions are independent. No global generator is touched.
    """

    def __init__(self, seed: int, positions: list[int], device: torch.device | str = "cpu"):
        # as uint64: numpy makes floats of a list with integers on both sides of 2^63, and rounds neighbouring keys to one
        keys = np.array([(seed, position) for position in positions], np.uint64)
        self.streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape], fp32."""
        drawn = [stream.standard_normal(shape, dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(drawn)).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [B, *shape], fp32."""
        drawn = [stream.random(shape, dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(drawn)).to(self.device)


@dataclass(frozen=True)
class Probe:
    """The inputs on which samples are scored: drawn once, and shared by all rows of a sample.

    inputs: tensors over B, the paradigm's own (noisy image and noise level, or tokens and teacher inputs).
    progress_BT: in [0, 1]; 0 pure noise or the coarsest scale, 1 data or the finest scale. strength_B: where the dial of the network
    stands; None: at 0, or there is no dial.
    """

    inputs: dict[str, Tensor]
    progress_BT: Tensor
    strength_B: Tensor | None = None

    def told(self, index_R: Tensor) -> list[Tensor]:
        """The last input of a network with a dial, the strength of every row; nothing where it stands at 0."""
        return [] if self.strength_B is None else [self.strength_B[index_R]]


@dataclass(frozen=True)
class Rows:
    """Which (sample, condition) pairs are scored in one forward.

    index_R: row -> sample of the probe (which may hold generated samples after the B real ones); rows 0..B-1 are the matched ones,
    in order. c_R: condition of each row. contrast_BT: the row that holds the contrast value of each term; the matched row itself
    where the drawn condition coincides (the terms then cancel exactly and nothing is computed). lam_BT: strength of the ratio.
    weight_BT: weight of the contrast value; negative where that counts as matched (`marginal`). mix_BT: weight g of inverse
    guidance on the matched rows, pred + g (pred - sg pred_null); None where no contrast is `null`.
    """

    index_R: Tensor
    c_R: Tensor
    contrast_BT: Tensor
    lam_BT: Tensor
    weight_BT: Tensor
    mix_BT: Tensor | None = None

    @property
    def terms(self) -> int:
        """The number of leading terms up to the last one with a ratio, in any sample."""
        ratio_T = self.lam_BT.ne(0).any(0)
        return int(ratio_T.nonzero().max()) + 1 if ratio_T.any() else 0


@dataclass(frozen=True)
class Scores:
    """Rows as the objective sees them. value_RT: log-likelihood or its surrogate, per dimension, fp32, higher is likelier.

    aux_R: calibration loss (0 for tokens). delta_R: log-likelihood ratio to the frozen reference, in nats, summed over the dimensions of
    a sample; None where there is no reference.
    """

    value_RT: Tensor
    aux_R: Tensor
    delta_R: Tensor | None = None


class Paradigm(Protocol):
    """A family of generators: how a sample is probed, scored under a condition, and drawn. Frozen; holds no trained weights."""

    @property
    def dims(self) -> int:
        """Dimensions of one sample: C*H*W, or the number of tokens."""

    @property
    def null(self) -> int:
        """Index of the null condition, which is the number of conditions."""

    def check(self, x_B: Tensor) -> None:
        """Raises ValueError, in one line, for samples of another shape or type."""

    def probe(self, x_B: Tensor, draws: Draws) -> Probe:
        """The inputs on which these samples are scored, drawn."""

    def predict(self, net: Net, probe: Probe, index_R: Tensor, c_R: Tensor, terms: int | None = None) -> Prediction:
        """(answer, rest) of the network for these rows. Guidance mixes answers, so only affine steps may follow.

        The network gets the inputs of each sample once, and index_R. terms: how many leading terms are wanted; None: all of them.
        """

    def log_likelihood(
        self, prediction: Prediction, probe: Probe, index_R: Tensor, guide: Prediction | None = None, mix_RT: Tensor | None = None
    ) -> Scores:
        """Values and aux of these rows. guide: a prediction, held constant, whose answer is mixed in: answer + mix (answer - guide)."""

    def compared(self, value_RT: Tensor, prediction: Prediction, frozen: Prediction) -> Tensor:
        """The values of a prediction under the uncertainty of the reference, whose prediction is `frozen`."""

    def sample(self, net: Net, c_B: Tensor, guidance: Any, draws: Draws) -> Tensor:
        """Draw one sample per condition, guided as mclr.Guidance says."""


def network(given: Any, name: str) -> Any:
    """The network that was given, or that of a Model. Raises ValueError for anything else. name: of the argument."""
    net = given if callable(given) else getattr(given, "net", None)
    if not callable(net):
        raise ValueError(f"{name} must be a network, or a Model of mclr.load, not {given!r:.60}")
    return net


def refuse_strength(net: Any, strength: float) -> None:
    """Raises ValueError for a strength that the dial of a network does not have; networks of a user's own do not say."""
    end = getattr(getattr(net, "config", None), "strength_max", strength)
    if not 0 <= strength <= end:
        has = f"the dial of the network goes from 0 to {end:g}" if end else "the network has no dial"
        raise ValueError(f"strength={strength} is out of range: {has}")


def ask(net: Net, shape: tuple[int, ...], hint: str, *inputs: Any, alone: bool = False, **cache: Any) -> Prediction:
    """(answer, rest) of a network. Raises ValueError for what a network of a user's own may do wrong, in one line that ends with `hint`.

    shape: of the answer, or how it begins. alone: the answer may come without a rest, which is then None.
    """
    try:
        answer = net(*inputs, **cache)
    except (TypeError, IndexError) as error:
        raise ValueError(f"the network fails ({error}): {hint}") from error
    given = answer if isinstance(answer, tuple) else (answer, None)[: 1 + alone]
    if len(given) != 2 or not isinstance(given[0], Tensor) or given[0].shape[: len(shape)] != shape:
        found = [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in given if each is not None]
        raise ValueError(
            f"the network answers {', '.join(map(str, found)) or 'nothing'}, not {list(shape)}{'' if alone else ' and a rest'}: {hint}"
        )
    return given[0], given[1]


@dataclass(frozen=True)
class Guide:
    """A network that guides another one of the same paradigm and form, and the condition that it is given.

    net: the network, or its Model. null: the index of its null condition, if it is asked under that, whatever the sample's condition
    is; its number of conditions may be another. None: it is asked under the sample's own condition (autoguidance, arXiv 2406.02507).
    """

    net: Any
    null: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "net", network(self.net, "guide"))

    def conditions(self, c_R: Tensor) -> Tensor:
        """The conditions that it is given for rows of these conditions."""
        return c_R if self.null is None else torch.full_like(c_R, self.null)


def guide_of(given: Any) -> Guide | None:
    """A Guide as it is; a network as the Guide that sees the sample's own condition; None as it is. Raises ValueError for anything else."""
    return given if given is None or isinstance(given, Guide) else Guide(given)


def score(
    paradigm: Paradigm,
    net: Net,
    probe: Probe,
    rows: Rows,
    reference: Net | None = None,
    guide: Guide | None = None,
    lockstep: bool = False,
) -> Scores:
    """Values of all rows, with gradient. The contrast `null` and a reference take a second forward, without gradient.

    guide: of the contrast `null`; None: the network itself under the null condition. lockstep: run the network equally often whatever
    the rows are, as ranks must that share its weights: no row with gradient is cut short, and there always is a null forward.
    """
    batch, terms = rows.lam_BT.shape
    # Whether rows can be cut short is asked of a GPU, and so only where it is possible.
    if rows.mix_BT is None and reference is None and len(rows.index_R) > batch and terms > 1 and not lockstep:
        return _score_cut_short(paradigm, net, probe, rows)
    guiding, guided_R = None, rows.index_R[:0]
    if rows.mix_BT is not None:
        guided_R = rows.mix_BT.ne(0).any(1).nonzero()[:, 0]
        if lockstep and guide is None and not len(guided_R):
            guided_R = rows.index_R[:1]
    # Not every network takes zero rows.
    if len(guided_R):
        asked, plain = guide or Guide(net, paradigm.null), replace(probe, strength_B=None)
        # Before the forward with gradient, whose backward checkpointing and ZeRO 3 need right after it.
        with torch.no_grad():
            guiding = paradigm.predict(asked.net, plain, guided_R, asked.conditions(rows.c_R[guided_R]), rows.terms or None)
    prediction = paradigm.predict(net, probe, rows.index_R, rows.c_R)
    if guiding is not None:
        # all rows and terms: those that are not guided have a mix of 0
        whole = guiding[0].new_zeros(*prediction[0].shape[:2], *guiding[0].shape[2:])
        whole[guided_R, : guiding[0].shape[1]] = guiding[0]
        guiding = whole, guiding[1]
    own = paradigm.log_likelihood(prediction, probe, rows.index_R, guiding, None if guiding is None else rows.mix_BT)
    if reference is None:
        return own
    with torch.no_grad():
        frozen = paradigm.predict(reference, probe, rows.index_R, rows.c_R)
        reference_RT = paradigm.log_likelihood(frozen, probe, rows.index_R).value_RT
    # Compare under the reference's uncertainty: with each network's own, halving the error would show as a ratio of 0 (derived).
    policy_RT = paradigm.compared(own.value_RT, prediction, frozen)
    return replace(own, delta_R=paradigm.dims * (policy_RT - reference_RT).mean(1))


def _score_cut_short(paradigm: Paradigm, net: Net, probe: Probe, rows: Rows) -> Scores:
    """One forward for every number of leading terms that rows are scored on, up to one per scale; the values beyond are 0.

    A matched row is scored on all terms, another one up to the last term whose contrast it is. Coarser scales do not see finer ones, so a
    token row that is cut short after a scale is exact.
    """
    batch, terms = rows.lam_BT.shape
    number_BT = torch.arange(1, terms + 1, device=rows.index_R.device).expand(batch, -1)
    terms_R = torch.zeros_like(rows.index_R).scatter_reduce(0, rows.contrast_BT.flatten(), number_BT.flatten(), "amax")
    terms_R[:batch] = terms
    value_RT, aux_R = rows.lam_BT.new_zeros(len(terms_R), terms), rows.lam_BT.new_zeros(len(terms_R))
    for number in terms_R.unique(sorted=True).flip(0).tolist():
        cut = (terms_R == number).nonzero()[:, 0]
        prediction = paradigm.predict(net, probe, rows.index_R[cut], rows.c_R[cut], number)
        some = paradigm.log_likelihood(prediction, probe, rows.index_R[cut])
        value_RT[cut, :number], aux_R[cut] = some.value_RT, some.aux_R
    return Scores(value_RT, aux_R)
