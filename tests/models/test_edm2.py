"""EDM2 against the published implementation's numbers, and the properties that the paper promises."""

import copy
from dataclasses import replace

import pytest
import torch
from golden_weights import load_golden, load_rule, relative_rms, rule_weights
from toy import Given

from mclr.diffusion import Diffusion
from mclr.errors import UserError
from mclr.forms import EDM
from mclr.guidance import Guidance
from mclr.kernels.magnitude import mp_silu, mp_sum, normalize
from mclr.models.blocks import MPFourier, mp_cat
from mclr.models.convert import NAMED, misfits
from mclr.models.edm2 import EDM2, PUBLISHED, Block, EDM2Config
from mclr.schedule import Schedule
from mclr.train.weights.folder import save_weights

ARRAYS, REFERENCE_CONFIG, NAMES = load_golden("edm2_tiny.npz")
CONFIG = EDM2Config(
    num_classes=REFERENCE_CONFIG["label_dim"],
    **{key: tuple(v) if isinstance(v, list) else v for key, v in REFERENCE_CONFIG.items() if key != "label_dim"},
)
NOISY, SIGMA, CONDITION = ARRAYS["x_noisy"], ARRAYS["sigma"], ARRAYS["y"]
NULL = torch.full_like(CONDITION, CONFIG.num_classes)
PARADIGM = Diffusion(shape=(3, 16, 16), null=CONFIG.num_classes, form=EDM(sigma_data=CONFIG.sigma_data), steps=5)


@pytest.fixture
def net() -> EDM2:
    return load_rule(EDM2(CONFIG), NAMES, PUBLISHED)


def fresh(**changes) -> EDM2:
    torch.manual_seed(0)
    return EDM2(replace(CONFIG, **changes)).eval()


def project(net: EDM2) -> None:
    with torch.no_grad():
        for weight in net.magnitude_preserving():
            weight.copy_(normalize(weight))


def denoise(net, noisy, sigma, c):
    """(denoised images, log-variances)."""
    raw, logvar = net(noisy, sigma, c)
    return PARADIGM.form.denoised(raw, noisy, sigma), logvar


def loss_elementwise(net: EDM2) -> torch.Tensor:
    denoised, logvar = denoise(net, NOISY, SIGMA, CONDITION)
    sigma, logvar = SIGMA[:, None, None, None], logvar[:, None, None, None]
    weight = (sigma**2 + CONFIG.sigma_data**2) / (sigma * CONFIG.sigma_data) ** 2
    return weight / logvar.exp() * (denoised - ARRAYS["x"]) ** 2 + logvar


# The published implementation's numbers


@torch.no_grad()
def test_denoised_image_and_log_variance(net):
    denoised, logvar = denoise(net, NOISY, SIGMA, CONDITION)
    assert relative_rms(denoised, ARRAYS["denoised"]) < 1e-5
    assert relative_rms(logvar, ARRAYS["logvar"]) < 1e-5
    assert relative_rms(denoise(net, NOISY, SIGMA, NULL)[0], ARRAYS["denoised_null"]) < 1e-5


@pytest.mark.parametrize("gamma, expected", [(0.0, "sample_plain"), (0.5, "sample_cfg1p5")])
def test_sampler(net, gamma, expected):
    sample = PARADIGM.sample(net, CONDITION, Guidance(Schedule("constant", gamma)), Given(normals=ARRAYS["sampler_noise"]))
    assert relative_rms(sample, ARRAYS[expected]) < 1e-5


def test_loss_and_gradients(net):
    net.train()
    project(net)
    loss = loss_elementwise(net)
    assert relative_rms(loss, ARRAYS["loss_elementwise"]) < 1e-5
    loss.mean().backward()
    norms = {PUBLISHED.name_of(name): p.grad.norm().item() for name, p in net.named_parameters()}
    assert norms == pytest.approx(dict(zip(ARRAYS["grad_names"], ARRAYS["grad_norms"].tolist(), strict=True)), rel=1e-4)


def test_three_steps_with_forced_weight_normalisation(net):
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    assert len(net.magnitude_preserving()) == sum(weight.ndim > 1 for weight in net.parameters())
    project(net)
    for _ in range(3):
        loss = loss_elementwise(net).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project(net)
        losses.append(loss.detach())
    assert relative_rms(torch.stack(losses), ARRAYS["losses"]) < 1e-4
    with torch.no_grad():
        assert relative_rms(denoise(net.eval(), NOISY, SIGMA, CONDITION)[0], ARRAYS["denoised_after_training"]) < 1e-4


# Names and sizes


def test_published_names_both_ways(net):
    weights, exported = rule_weights(NAMES), PUBLISHED.entries(net)
    assert {name: list(entry.shape) for name, entry in exported.items()} == NAMES
    assert all(torch.equal(exported[name], weights[name]) for name in NAMES)


def test_unfit_weights_are_named_in_one_line(net):
    """The first few differences, of every kind."""
    weights = rule_weights(NAMES)
    weights["unet.emb_label.weight"] = torch.zeros(64, 11)
    for name in [name for name in NAMES if ".dec." in name and name.endswith("emb_gain")]:
        del weights[name]
    message = misfits(PUBLISHED.entries(net), weights | {"extra": torch.ones(())})
    assert message.startswith("unet.emb_label.weight is [64, 11] instead of [64, 10], ") and "\n" not in message
    assert message.count("is missing") == NAMED - 2 and "extra is unexpected" in message
    assert message.endswith(f"and {9 - NAMED} more entries")


# Properties


def test_operations_preserve_magnitude():
    torch.manual_seed(0)
    a, b, wide = (torch.empty(1000, n, 4, 4).normal_() for n in (16, 16, 48))
    rms = {"silu": mp_silu(a), "sum": mp_sum(a, b, 0.3), "cat": mp_cat(a, wide, 0.5), "normalize": normalize(3 * a, dim=1)}
    assert {name: y.square().mean().sqrt().item() for name, y in rms.items()} == pytest.approx(dict.fromkeys(rms, 1.0), abs=0.01)
    # Half of the variance comes from either side, though one is three times as wide.
    assert mp_cat(a, 0 * wide, 0.5).square().mean().item() == pytest.approx(0.5, abs=0.01)


def test_fourier_features_have_unit_variance_and_forget_after_a_fifth():
    torch.manual_seed(0)
    here, near = MPFourier(100_000)(torch.tensor([0.0, 0.2]))
    assert here.mean().item() == pytest.approx(0, abs=0.02)
    assert here.square().mean().item() == pytest.approx(1, abs=0.02)
    # E[f(0) f(v)] = exp(-(2 pi v)^2 / 2)
    assert (here * near).mean().item() == pytest.approx(0.454, abs=0.02)


@torch.no_grad()
def test_forward_leaves_weights_alone_and_ignores_their_scale(net):
    net.train()
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    denoised = denoise(net, NOISY, SIGMA, CONDITION)[0]
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    for weight in net.magnitude_preserving():
        weight.mul_(2)
    assert relative_rms(denoise(net, NOISY, SIGMA, CONDITION)[0], denoised) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True])
def test_a_folded_network_answers_the_same_and_normalises_no_weight(net, bf16, monkeypatch):
    """Bit for bit: a folded reference starts at a ratio of exactly 1, and the images of a seed stay."""
    folded = copy.deepcopy(net)
    folded.fold()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = [denoise(net, NOISY, SIGMA, c) for c in (CONDITION, NULL)]
        monkeypatch.delattr("mclr.models.blocks.used_weights")
        monkeypatch.delattr("mclr.models.edm2.used_weights")
        found = [denoise(folded, NOISY, SIGMA, c) for c in (CONDITION, NULL)]
    assert all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in net.parameters())


def test_a_folded_network_is_neither_trained_nor_saved_nor_folded_again(net, tmp_path):
    net.fold()
    net.eval()
    for misuse in (net.train, net.state_dict, net.fold, lambda: save_weights(tmp_path / "weights", net)):
        with pytest.raises(AssertionError, match="folded"):
            misuse()
    assert not (tmp_path / "weights").exists()


@torch.no_grad()
def test_a_fresh_network_has_activations_of_unit_magnitude_and_denoises_by_c_skip():
    net = fresh(channel_mult=(1, 2, 2), num_blocks=2)
    magnitudes = {}
    for name, module in net.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda _, __, y, name=name: magnitudes.__setitem__(name, y.square().mean().sqrt().item())
            )
    torch.manual_seed(1)
    x = torch.empty(8, 3, 16, 16).normal_(std=0.5)
    sigma = torch.logspace(-2, 1, 8)[:, None, None, None]
    noisy = x + sigma * torch.empty_like(x).normal_()
    denoised, _ = denoise(net, noisy, sigma.flatten(), torch.arange(8))
    assert len(magnitudes) == 21
    assert all(0.8 < magnitude < 1.25 for magnitude in magnitudes.values()), magnitudes
    assert torch.equal(denoised, 0.25 / (sigma**2 + 0.25).sqrt() ** 2 * noisy)


@torch.no_grad()
def test_the_null_condition_is_the_zero_one_hot(net):
    assert relative_rms(denoise(net, NOISY, SIGMA, CONDITION)[0], ARRAYS["denoised_null"]) > 1e-2
    net.condition_linear.weight.zero_()
    assert torch.equal(denoise(net, NOISY, SIGMA, CONDITION)[0], denoise(net, NOISY, SIGMA, NULL)[0])
    assert relative_rms(denoise(net, NOISY, SIGMA, NULL)[0], ARRAYS["denoised_null"]) < 1e-5


def test_conditions_out_of_range_are_refused(net):
    with pytest.raises(RuntimeError):
        net(NOISY, SIGMA, NULL + 1)


@torch.no_grad()
def test_an_unconditional_network_has_no_condition_embedding():
    net = fresh(num_classes=0)
    net.out_gain.fill_(1.0)
    assert "unet.emb_label.weight" not in PUBLISHED.entries(net)
    assert torch.equal(denoise(net, NOISY, SIGMA, CONDITION)[0], denoise(net, NOISY, SIGMA, torch.zeros_like(CONDITION))[0])


@torch.no_grad()
def test_deterministic_and_rows_do_not_mix(net):
    both = denoise(net, NOISY, SIGMA, CONDITION)[0]
    assert torch.equal(both, denoise(net, NOISY, SIGMA, CONDITION)[0])
    assert relative_rms(denoise(net, NOISY[1:], SIGMA[1:], CONDITION[1:])[0], both[1:]) < 1e-5


def test_rows_of_a_sample_share_what_comes_before_the_condition(net):
    """Rows by index answer as rows of copied samples do, and so do the gradients."""
    index = torch.tensor([1, 0, 1, 1])
    c = torch.arange(4)
    copied, shared = net(NOISY[index], SIGMA[index], c), net(NOISY, SIGMA, c, index)
    wanted = [p for p in net.parameters() if p.requires_grad]
    upstream = [torch.linspace(-1, 1, out.numel()).reshape(out.shape) for out in shared]
    for mine, theirs in zip(shared, copied, strict=True):
        assert mine.shape == theirs.shape and relative_rms(mine, theirs) < 1e-5
    for mine, theirs in zip(*(torch.autograd.grad(out, wanted, upstream) for out in (shared, copied)), strict=True):
        assert relative_rms(mine, theirs) < 2e-5


BALANCES = dict.fromkeys(["label_balance", "concat_balance", "res_balance", "attn_balance"], 0.4)
OPTIONS = BALANCES | {
    "clip_act": 0.5, "attn_resolutions": (), "sigma_data": 0.4, "channel_mult_noise": 3, "channel_mult_emb": 4
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("option, value", OPTIONS.items())
def test_every_option_reaches_the_network(option, value):
    usual, changed = fresh(), fresh(**{option: value})
    for gain in [weight for net in (usual, changed) for weight in net.parameters() if weight.ndim == 0]:
        gain.fill_(1.0)
    assert relative_rms(denoise(changed, NOISY, SIGMA, CONDITION)[0], denoise(usual, NOISY, SIGMA, CONDITION)[0]) > 1e-3


@torch.no_grad()
def test_dropout_acts_in_training_alone():
    net = fresh(dropout=0.5)
    net.out_gain.fill_(1.0)
    still = denoise(net, NOISY, SIGMA, CONDITION)[0]
    assert torch.equal(still, denoise(net, NOISY, SIGMA, CONDITION)[0])
    assert relative_rms(denoise(net.train(), NOISY, SIGMA, CONDITION)[0], still) > 1e-2


def test_bf16_trunk_answers_in_bf16(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(NOISY, SIGMA, CONDITION)[0].dtype == torch.bfloat16
        denoised, logvar = denoise(net, NOISY, SIGMA, CONDITION)
    assert denoised.dtype == logvar.dtype == torch.float32
    assert 1e-4 < relative_rms(denoised, ARRAYS["denoised"]) < 2e-2
    assert relative_rms(logvar, ARRAYS["logvar"]) < 1e-5
    denoised.mean().backward()
    assert all(weight.grad.dtype == torch.float32 for name, weight in net.named_parameters() if "logvar" not in name)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0])], ids=["samples", "rows by index"])
def test_compiles_without_a_graph_break(net, index):
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(NOISY, SIGMA, CONDITION, index), net(NOISY, SIGMA, CONDITION, index), strict=True):
        assert relative_rms(mine, theirs) < 1e-5


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"channel_mult": (1,) * 6}, "halved 5 times"),
        ({"channels_per_head": 24}, "24 must divide the 64 channels .*: give ch"),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, said):
    with pytest.raises(UserError, match=said):
        fresh(**changes)


def test_a_resolution_that_the_network_does_not_have_is_no_fault():
    """As in published files; the configuration refuses it where it was typed."""
    config = replace(CONFIG, attn_resolutions=(*CONFIG.attn_resolutions, 3))
    names = [EDM2(each).state_dict().keys() for each in (CONFIG, config)]
    assert names[0] == names[1]
