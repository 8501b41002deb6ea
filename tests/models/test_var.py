"""The generator of tokens against numbers of the published implementation; its cache, its causality, its initialisation."""

from dataclasses import replace

import pytest
import torch
from golden_weights import load_golden, load_rule, relative_rms
from test_vqvae import published_net
from toy import logits_of

from mclr.guidance import Guidance
from mclr.likelihood import Draws
from mclr.models.var import PUBLISHED, VAR, Attention, VARConfig
from mclr.next_scale import NextScale
from mclr.schedule import Schedule

TINY = VARConfig(
    num_classes=10, depth=3, embed_dim=64, num_heads=2, patch_nums=(1, 2, 3, 4), vocab_size=64, z_channels=8, mlp_ratio=2.0
)
ENDS = [1, 5, 14, 30]


@pytest.fixture(scope="module")
def tokenizer():
    return published_net("vqvae_tiny.npz")[0]


@pytest.fixture(scope="module", params=["var_tiny.npz", "var_tiny_shared_aln.npz"])
def published(request):
    arrays, config, names = load_golden(request.param)
    config["patch_nums"] = tuple(config["patch_nums"])
    return load_rule(VAR(VARConfig(**config, vocab_size=64, z_channels=8)), names, PUBLISHED), arrays


def log_likelihood(net, arrays, condition):
    logits = logits_of(net, arrays["teacher_input"], arrays[condition])
    return logits.log_softmax(-1).gather(-1, arrays["codes"][..., None])[..., 0]


@torch.no_grad()
def test_logits(published, tokenizer):
    net, arrays = published
    logits = logits_of(net, arrays["teacher_input"], arrays["y"])
    assert logits.dtype == torch.float32
    assert relative_rms(logits, arrays["logits_matched"]) < 1e-5
    from_codes = logits_of(net, tokenizer.teacher(arrays["codes"]), arrays["y"])
    assert relative_rms(from_codes, arrays["logits_matched"]) < 1e-5


def test_log_likelihood_and_gradients(published):
    net, arrays = published
    matched = log_likelihood(net, arrays, "y")
    mismatched = log_likelihood(net, arrays, "y_mismatched")
    assert relative_rms(matched, arrays["logp_matched"]) < 1e-5
    assert relative_rms(mismatched, arrays["logp_mismatched"]) < 1e-5
    loss = -(1.25 * matched.mean() - 0.25 * mismatched.mean())
    assert relative_rms(loss, arrays["loss"]) < 1e-5
    net.zero_grad()
    loss.backward()
    norms = {PUBLISHED.name_of(name): p.grad.norm() for name, p in net.named_parameters()}
    assert sorted(norms) == sorted(arrays["grad_names"])
    for name, expected in zip(arrays["grad_names"], arrays["grad_norms"], strict=True):
        assert abs(norms[name] - expected) < 1e-4 * expected, name


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_greedy_decoding(published, tokenizer, guidance):
    net, arrays = published
    paradigm = NextScale(scales=(1, 2, 3, 4), null=10, tokenizer=tokenizer, top_k=1)
    draws = Draws(seed=0, positions=[0, 1])
    tokens = paradigm.sample(net, arrays["y"], Guidance(Schedule("ramp", guidance)), draws)
    assert torch.equal(tokens, arrays[f"greedy_codes_cfg{guidance}"])
    image = tokenizer.decode(tokens) / 2 + 0.5
    assert relative_rms(image, arrays[f"greedy_image_cfg{guidance}"]) < 1e-5


@pytest.fixture(params=[{}, {"shared_aln": True, "attn_l2_norm": False}], ids=["per_block", "shared_without_l2_norm"])
def tiny(request):
    """A network in which every path is alive (at initialisation the gates are almost closed), and inputs for it."""
    torch.manual_seed(0)
    net = VAR(replace(TINY, **request.param)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5 if parameter.ndim == 1 else 0.2)
    return net, torch.randn(3, 29, 8), torch.tensor([1, 4, 10])


@torch.no_grad()
@pytest.mark.parametrize("calls", [[1, 5, 14, 30], [5, 30], [1, 14, 30], [14, 30], [30]], ids=str)
def test_cached_decoding_equals_teacher_forcing(tiny, calls):
    """One scale per call, and several: the calls end after `calls` tokens."""
    net, teacher, c = tiny
    cache, parts, start = net.new_cache(rows=3), [], 0
    for end in calls:
        parts.append(logits_of(net, teacher[:, max(start - 1, 0) : end - 1], c, cache=cache))
        assert cache.length == end and parts[-1].shape == (3, end - start, 64)
        start = end
    whole = logits_of(net, teacher, c)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-5
    assert relative_rms(logits_of(net, teacher[:, : calls[0] - 1], c), whole[:, : calls[0]]) < 1e-5


@torch.no_grad()
def test_block_causality(tiny):
    """What a scale reads changes its own logits, all of them, and those of finer scales; never those of coarser ones."""
    net, teacher, c = tiny
    logits = logits_of(net, teacher, c)
    for start, end in zip(ENDS, ENDS[1:], strict=False):
        changed = teacher.clone()
        changed[:, start - 1] += 1  # read by the scale's first token alone
        difference = (logits_of(net, changed, c) - logits).abs().amax(-1)
        assert difference[:, :start].max() == 0
        assert difference[:, start:end].min() > 1e-5
        assert difference[:, end:].numel() == 0 or difference[:, end:].min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("l2_norm", [True, False])
def test_attention_is_its_definition(l2_norm):
    torch.manual_seed(0)
    attention = Attention(replace(TINY, attn_l2_norm=l2_norm))
    for parameter in attention.parameters():
        parameter.normal_(std=0.3)
    if l2_norm:
        attention.log_temperature[0, 1] = 9.0  # above the cap
    x, mask = torch.randn(2, 5, 64), torch.ones(5, 5).tril().bool()
    q, k, v = (x @ attention.qkv.weight.T).view(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4)
    q, v = (a + bias.view(1, 2, 1, 32) for a, bias in ((q, attention.q_bias), (v, attention.v_bias)))
    if l2_norm:
        temperature = torch.tensor([attention.log_temperature[0, 0].exp(), 100.0]).view(1, 2, 1, 1)
        logits = temperature * (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).mT
    else:
        logits = 0.25 / 32**0.5 * q @ k.mT
    mixed = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    expected = attention.project(mixed.transpose(1, 2).flatten(2))
    assert relative_rms(attention(x, mask, 0, None), expected) < 1e-5


def test_rows_of_a_sample_share_what_comes_before_the_condition(tiny):
    """Rows by index answer as rows of copied samples do, and so do the gradients; a sample without a row has none."""
    net, teacher, c = tiny
    index = torch.tensor([1, 0, 1, 1])
    teacher = teacher.clone().requires_grad_()
    copied, shared = logits_of(net, teacher[index], c[index]), logits_of(net, teacher, c[index], index)
    assert relative_rms(shared, copied) < 1e-5
    upstream = torch.linspace(-1, 1, shared.numel()).reshape(shared.shape)
    wanted = [teacher, *(p for p in net.parameters() if p.requires_grad)]
    for mine, theirs in zip(*(torch.autograd.grad(out, wanted, upstream) for out in (shared, copied)), strict=True):
        assert relative_rms(mine, theirs) < 2e-5
    assert torch.autograd.grad(logits_of(net, teacher, c[index], index).sum(), teacher)[0][2].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 1])], ids=["samples", "rows by index"])
def test_compiles_without_a_graph_break(tiny, index):
    net, teacher, c = tiny
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert relative_rms(compiled(teacher, c, index)[0], net(teacher, c, index)[0]) < 1e-5


@torch.no_grad()
def test_bf16_autocast(tiny):
    """The trunk is bf16, the logits are fp32 and not rounded; a cache made under autocast is bf16 and serves as well."""
    net, teacher, c = tiny
    reference = logits_of(net, teacher, c)
    with torch.autocast("cpu", torch.bfloat16):
        logits, cache = logits_of(net, teacher, c), net.new_cache(3)
        cached = torch.cat(
            [logits_of(net, teacher[:, max(s - 1, 0) : e - 1], c, cache=cache) for s, e in zip([0, *ENDS], ENDS, strict=False)], 1
        )
    assert logits.dtype == torch.float32 and cache.kv.dtype == torch.bfloat16
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9
    assert 1e-4 < relative_rms(logits, reference) < 3e-2
    assert relative_rms(cached, reference) < 3e-2


@pytest.mark.parametrize("shared_aln", [False, True])
def test_initialisation(shared_aln):
    torch.manual_seed(0)
    net = VAR(replace(TINY, embed_dim=192, shared_aln=shared_aln))
    std = (1 / (3 * 192)) ** 0.5
    offset_std = 192**-0.5 if shared_aln else std
    six = net.blocks[1].modulation[0, 0] if shared_aln else net.blocks[1].modulation.weight.view(6, 192, 192)
    deviations = [
        (net.embed_condition.weight, std),
        (net.position, std),
        (net.blocks[1].attention.qkv.weight, std),
        (net.blocks[1].attention.project.weight, std / 6**0.5),
        (net.blocks[1].ffn[2].weight, std / 6**0.5),
        (six[:2], 1e-5 * offset_std),
        (six[2:], 0.5 * offset_std),
        (net.head_modulation.weight, 0.5 * std),
        (net.head.weight, 0.02 * std),
    ]
    for parameter, expected in deviations:
        tolerance = 5 / (2 * parameter.numel()) ** 0.5  # five standard errors
        assert abs(parameter.std() / expected - 1) < tolerance
    assert net.blocks[1].attention.log_temperature.exp().sub(4).abs().max() < 1e-5
    assert all(parameter.abs().max() == 0 for name, parameter in net.named_parameters() if name.endswith("bias"))
    teacher, c = torch.randn(4, 29, 8), torch.arange(4)
    first_loss = -logits_of(net, teacher, c).log_softmax(-1).mean()
    assert abs(first_loss - torch.tensor(64.0).log()) < 0.05
    again = torch.manual_seed(0) and VAR(net.config)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_stochastic_depth_drops_whole_branches_in_training_alone():
    torch.manual_seed(0)
    net = VAR(replace(TINY, drop_path=0.5))
    gate_RD = torch.ones(4000, 3)
    kept_RD = net.blocks[2].kept(gate_RD)
    assert set(kept_RD.unique().tolist()) == {0.0, 2.0} and torch.equal(kept_RD, kept_RD[:, :1].expand(-1, 3))
    assert abs(kept_RD.mean() - 1) < 0.1
    assert net.blocks[0].kept(gate_RD) is gate_RD and net.eval().blocks[2].kept(gate_RD) is gate_RD


def test_part_of_a_scale_is_refused():
    with pytest.raises(AssertionError, match="whole scales"):
        VAR(TINY)(torch.zeros(1, 2, 8), torch.tensor([0]))
