"""The dial of every kind of network: nothing at first, nothing for the null condition; loaded, folded, converted."""

from dataclasses import replace

import pytest
import torch

from mclr.errors import UserError
from mclr.models.dial import folded
from mclr.models.options import EDM2Config
from mclr.train.weights.folder import find_weights, load_into, load_net, save_weights

BUNDLED = ("edm2-digits", "sit-digits", "var-digits")
C = torch.tensor([0, 3, 10, 9])  # 10: the null condition


@pytest.fixture(params=BUNDLED)
def pair(request):
    """(bundled network, the same with a dial up to 2, loaded from the same weights)."""
    plain = load_net(request.param)
    torch.manual_seed(0)
    net = type(plain)(replace(plain.config, strength_max=2.0))
    load_into(net, find_weights(request.param))
    return plain, net.eval()


def answer(net, *strength):
    """Of a network for the rows C; images, or logits."""
    torch.manual_seed(1)
    if "patch_nums" in net.config.__dict__:
        h, head = net(torch.randn(4, 29, 8), C, None, *strength)
        return head(h)
    return net(torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, C, None, *strength)[0]


def turned(net):
    """The network with a dial that has learned something."""
    with torch.no_grad():
        for name, parameter in net.dial.named_parameters():
            if name in ("gain", "layers.2.weight", "layers.2.bias"):
                parameter.normal_(std=0.1)
    return net


@torch.no_grad()
def test_a_new_dial_changes_no_bit_and_a_learned_one_leaves_the_null_condition_alone(pair):
    plain, net = pair
    at_half = torch.full((4,), 0.5)
    assert torch.equal(answer(plain), answer(net, at_half)) and torch.equal(answer(plain), answer(net))
    turned(net)
    at_zero, at_half, at_two = answer(net), answer(net, at_half), answer(net, torch.tensor([2.0, 0.5, 2.0, 2.0]))
    assert torch.equal(at_zero, answer(net, torch.zeros(4)))
    changed = [
        [bool((a != b).any()) for a, b in zip(one, other, strict=True)] for one, other in ((at_zero, at_half), (at_half, at_two))
    ]
    assert changed == [[True, True, False, True], [True, False, False, True]]
    assert torch.equal(at_two[2], answer(plain)[2])


def test_every_strength_has_its_gradient(pair):
    """The embedding learns from the first step, at every strength, and not from rows under the null condition."""
    _, net = pair
    strength_R = torch.tensor([0.0, 1.0, 1.0, 2.0])
    first = [p for name, p in net.dial.named_parameters() if name in ("gain", "layers.2.weight")]
    for rows, learns in (([0], True), ([1], True), ([2], False), ([3], True)):
        grads = torch.autograd.grad(answer(net, strength_R)[rows].square().sum(), first)
        assert all((grad != 0).any() == learns for grad in grads)


@torch.no_grad()
def test_a_folded_dial_is_a_network_without(pair, tmp_path):
    plain, net = pair
    turned(net)
    if isinstance(net.config, EDM2Config):
        with pytest.raises(UserError, match="the dial of an EDM2 cannot be folded: it normalises"):
            folded(net, 1.5)
        return
    at = folded(net, 1.5)
    assert at.config == plain.config and at.state_dict().keys() == plain.state_dict().keys()
    expected = answer(net, torch.full((4,), 1.5))
    assert (answer(at.eval()) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (answer(at) - answer(net)).abs().max() > 1e-3
    for strength in (-0.1, 2.1, float("nan")):
        with pytest.raises(UserError, match="is out of range: the dial of these weights goes from 0 to 2"):
            folded(net, strength)
    with pytest.raises(UserError, match="these weights have no dial"):
        folded(plain, 1.0)


def test_weights_with_a_dial_come_back_and_take_another_end_but_are_not_taken_for_plain_ones(pair, tmp_path):
    plain, net = pair
    save_weights(tmp_path / "dial", turned(net))
    back = load_net(str(tmp_path / "dial"))
    strength_R = torch.full((4,), 1.0)
    assert torch.equal(answer(back, strength_R), answer(net, strength_R))
    longer = type(net)(replace(net.config, strength_max=3.0)).eval()
    load_into(longer, tmp_path / "dial")
    assert torch.equal(answer(longer, strength_R), answer(net, strength_R))
    with pytest.raises(UserError, match=r"have strength_max 2.0, this run has 0.0: give their dial, model.strength.max="):
        load_into(plain, tmp_path / "dial")
