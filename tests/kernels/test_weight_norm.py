"""EDM2's weight normalisation: its properties, alignment, layouts, forced weights, what is refused. Formulas: test_kernels.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from mclr.kernels import weight_norm as module
from mclr.kernels.choice import using
from mclr.kernels.magnitude import EPS, normalize
from mclr.kernels.op import compare
from mclr.kernels.weight_norm import FORCE_WEIGHTS, USED_WEIGHTS, block, force_weights, used_weights
from mclr.models.edm2 import EDM2, EDM2Config

both = pytest.mark.parametrize("kernels", ["torch", "triton"])
# fan-in 1, odd, of whole vectors, of several blocks; one row; a kernel of 1
SHAPES = [(3, 1), (2, 7), (4, 4, 3, 3), (1, 128), (2, 30_000), (2, 2049), (3, 5, 1, 1)]


def drawn(shapes, seed=0):
    """Weights of different magnitudes, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul(10 ** (i % 3 - 1)).requires_grad_() for i, shape in enumerate(shapes)]


def upstream(outputs, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[2:3]], ids=["many", "one"])
def test_all_kinds_of_shapes(shapes, dtype, kernels):
    weights = drawn(shapes)
    assert not compare(USED_WEIGHTS, {"weights": weights, "dtype": dtype}, dtype, kernels)


@both
def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient(kernels):
    weights = drawn([(3, 8), (2, 7)])
    with torch.no_grad():
        weights[0][1] = 0
    with using(kernels):
        used = used_weights(weights, torch.float32)
        G = upstream(used)
        (dw,) = torch.autograd.grad(used, weights[:1], G)
    assert (used[0][1] == 0).all() and dw.isfinite().all()
    torch.testing.assert_close(dw[1], G[0][1] / (EPS * math.sqrt(8)))


@both
def test_an_unused_weight_gets_no_gradient(kernels):
    weights = drawn([(3, 8), (2, 7)])
    with using(kernels):
        used = used_weights(weights, torch.float32)
        used[0].sum().backward()
    assert weights[0].grad.abs().sum() > 0 and (weights[1].grad == 0).all()


def test_alignment_changes_no_bit():
    """Rows that begin anywhere run another copy of the code: weights cut from a flat buffer, as an engine may hold them."""
    aligned = drawn([(4, 8), (3, 4, 3, 3), (2, 2052)])
    flat, cut = torch.zeros(1 + sum(w.numel() for w in aligned)), []
    for w in aligned:
        start = 1 + sum(c.numel() for c in cut)
        view = flat[start : start + w.numel()].view_as(w)
        cut.append(view.copy_(w.detach()).requires_grad_())
    assert all(w.data_ptr() % 16 == 0 for w in aligned) and all(w.data_ptr() % 16 for w in cut)
    found = []
    with using("triton"):
        for weights in (aligned, cut):
            used = used_weights(weights, torch.float32)
            found.append((*used, *torch.autograd.grad(used, weights, upstream(used))))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@both
def test_channels_last_stays(kernels):
    weights = drawn([(3, 4, 3, 3), (2, 6)])
    last = [weights[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_(), weights[1]]
    found = []
    for given in (weights, last):
        with using(kernels):
            used = used_weights(given, torch.float32)
            grads = torch.autograd.grad(used, given, upstream(used))
        assert all(u.stride() == w.stride() for u, w in zip(used, given, strict=True))
        found.append((*used, *grads))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("name", "width", "channels"), [("edm2-img64-s", 192, 3), ("edm2-img512-l", 320, 4)])
def test_the_listed_shapes_are_those_of_the_network(name, width, channels):
    """Of a decoder's block with attention; all blocks of force_weights together are as many elements as the network has."""
    config = EDM2Config(img_resolution=64, img_channels=channels, num_classes=1000, model_channels=width)
    with torch.device("meta"):
        net = EDM2(config)
    of_blocks = [sorted(tuple(p.shape) for p in each.parameters() if p.ndim > 1) for each in net.blocks]
    assert sorted(block(USED_WEIGHTS.shapes[name])) in of_blocks
    count = sum(p.numel() for p in net.magnitude_preserving())
    assert sum(map(math.prod, block(FORCE_WEIGHTS.shapes[name]))) == pytest.approx(count, rel=0.02)


def test_tables_of_rows_are_made_once():
    """More lists of shapes than any network has. Making a table again would make the host wait for the GPU."""
    module._rows.cache_clear()
    lists = [drawn([(n, 3)]) for n in range(1, 41)]
    with using("triton"):
        for _ in range(2):
            for weights in lists:
                used_weights(weights, torch.float32)
    assert module._rows.cache_info().misses == len(lists)


def test_a_cuda_graph_is_refused(monkeypatch):
    """It would replay the addresses of the call that it captured."""
    on_a_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a CUDA graph would replay the addresses of this call"):
        module._table([on_a_gpu])


@both
def test_forcing_is_in_place_and_twice_is_once(kernels):
    weights = drawn(SHAPES)
    with torch.no_grad():
        weights[2][1] = 0
    given, before = list(weights), [w.detach().clone() for w in weights]
    with using(kernels):
        force_weights(weights)
        once = [w.detach().clone() for w in weights]
        force_weights(weights)
    for w, first, was, same in zip(weights, once, before, given, strict=True):
        assert w is same and w.requires_grad and w.grad_fn is None
        torch.testing.assert_close(first, normalize(was))
        rms = was.flatten(1).square().mean(1).sqrt()
        # a row of zeros stays
        assert (w[rms == 0] == 0).all()
        torch.testing.assert_close(w.detach(), first, rtol=1.1 * EPS * (1 + 1 / rms[rms > 0].min().item()), atol=0)


def test_forcing_takes_channels_last():
    w = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    expected = normalize(w)
    with using("triton"):
        force_weights([w])
    torch.testing.assert_close(w, expected)


W = torch.ones(2, 3)


@both
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: used_weights([], torch.float32), "weights: there are none"),
        (lambda: used_weights([W[0]], torch.float32), r"weights\[0\]: 1 dimensions, not 2"),
        (lambda: used_weights([W.half()], torch.float32), r"weights\[0\]: dtype torch\.float16, not one of torch\.float32"),
        (lambda: used_weights([W, W[:, :0]], torch.float32), r"weights\[1\]: shape \(2, 0\) holds nothing"),
        (lambda: used_weights([W, W.double()], torch.float32), r"weights\[1\]: dtype torch\.float64, not one of torch\.float32"),
        (lambda: used_weights([W, W.to("meta")], torch.float32), r"weights\[1\]: on meta, not on cpu as weights\[0\]"),
        (lambda: used_weights([W], torch.int32), r"dtype: torch\.int32, not one of torch\.float32"),
        (lambda: force_weights([]), "weights: there are none"),
        (lambda: force_weights([W.half()]), r"weights\[0\]: dtype torch\.float16"),
        (lambda: force_weights([W, torch.ones(3, 2).t()]), r"weights\[1\]: strides \(1, 2\) leave gaps"),
        (lambda: force_weights([W, W]), "weights: one of them is listed twice"),
    ],
)
def test_what_does_not_fit_is_refused(call, says, kernels):
    with using(kernels), pytest.raises(ValueError, match=says):
        call()
