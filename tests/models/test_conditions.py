"""models/conditions.py: what a mapped, a fresh and the null condition become, and how far EDM2's rows are rescaled."""

import pytest
import torch
from toy import logits_of

from mclr.errors import UserError
from mclr.kernels.magnitude import normalize
from mclr.models.conditions import map_columns, map_conditions, map_rows
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.var import VAR, VARConfig


def edm2(num_classes, seed):
    torch.manual_seed(seed)
    sizes = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8}
    net = EDM2(EDM2Config(8, 1, num_classes, **sizes, logvar_channels=8))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 0:
                p.fill_(0.7)
            # an average of weights is shorter than they are
            p.mul_(0.6 if name == EDM2.condition_layer else 1)
    return net


def var(num_classes, seed):
    torch.manual_seed(seed)
    return VAR(VARConfig(num_classes, depth=1, embed_dim=16, num_heads=2, patch_nums=(1, 2), vocab_size=8, z_channels=4))


def carried(old, new, sources):
    new.load_state_dict(map_conditions(new, old.state_dict(), sources))
    return new


def test_rows_are_copied_fresh_ones_start_as_the_null_row_which_stays_last():
    old_KD = torch.arange(8.0).reshape(4, 2)  # 3 conditions and the null condition
    assert torch.equal(map_rows(old_KD, old_KD, [2, None, 0, 2]), old_KD[[2, 3, 0, 2, 3]])


def test_a_mapped_var_answers_as_before_and_a_fresh_condition_as_without_condition():
    old = var(3, 0)
    new = carried(old, var(4, 1), [2, None, 0, 1])
    teacher = torch.linspace(-1, 1, 4 * 4).reshape(1, 4, 4)
    for here, there in ((0, 2), (1, 3), (2, 0), (3, 1), (4, 3)):
        assert torch.equal(logits_of(new, teacher, torch.tensor([here])), logits_of(old, teacher, torch.tensor([there])))


def test_columns_come_from_the_unit_magnitude_weight_and_fresh_ones_as_given():
    torch.manual_seed(0)
    old_EK, fresh_Ek = 0.3 * torch.randn(6, 3), torch.randn(6, 4)
    new_Ek = map_columns(old_EK, fresh_Ek, [1, None, 1, 0])
    assert torch.equal(new_Ek[:, [0, 2, 3]], normalize(old_EK)[:, [1, 1, 0]])
    assert torch.equal(new_Ek[:, 1], fresh_Ek[:, 1])


def test_a_mapped_edm2_embedding_is_divided_by_the_row_rms_and_null_stays_null():
    old = edm2(3, 0)
    new = carried(old, edm2(5, 1), [2, None, 0, None, None])
    # what training does first; the network itself divides by the same RMS
    r_E = new.state_dict()[EDM2.condition_layer].square().mean(1).sqrt()
    assert (r_E - 1).abs().max() > 0.1
    columns = {c: torch.eye(5)[[c]] * 5**0.5 for c in range(5)}
    for here, there in ((0, 2), (2, 0)):
        before = old.condition_linear(torch.eye(3)[[there]] * 3**0.5)[0]
        torch.testing.assert_close(new.condition_linear(columns[here])[0], before / r_E, rtol=1e-3, atol=0)
    x, sigma = torch.ones(1, 1, 8, 8), torch.ones(1)
    for after, before in zip(new(x, sigma, torch.tensor([5])), old(x, sigma, torch.tensor([3])), strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("make", [edm2, var])
def test_nothing_else_is_touched(make):
    old, new = make(3, 0).state_dict(), make(4, 1)
    mapped, fresh, layer = map_conditions(new, old, [None] * 4), new.state_dict(), new.condition_layer
    assert mapped.keys() == fresh.keys() and mapped[layer].shape == fresh[layer].shape != old[layer].shape
    assert all(torch.equal(mapped[name], old[name]) for name in old if name != layer)


def test_a_network_that_does_not_say_how_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"a Linear cannot map its conditions: leave out model\.class_map"):
        map_conditions(torch.nn.Linear(1, 1), {}, [None])
