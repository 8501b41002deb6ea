"""models/dit.py and the forms ddpm and flow against the published DiT, SiT and REPA: networks, losses, gradients, samplers."""

import pytest
import torch
from golden_weights import load_golden, load_rule, relative_rms

from mclr.diffusion import Diffusion, progress_of
from mclr.forms import FORMS
from mclr.guidance import Guidance
from mclr.likelihood import Probe
from mclr.models.dit import PUBLISHED, DiT, positions
from mclr.models.options import DiTConfig
from mclr.schedule import Schedule

FORM = {"dit_tiny": "ddpm", "sit_tiny": "flow_to_data", "sit_repa_tiny": "flow"}
CFG = Guidance(Schedule("constant", 0.5))


class Given:
    """Draws that give these noises, one after the other."""

    def __init__(self, *noises):
        self.noises = list(noises)

    def normal(self, *shape):
        return self.noises.pop(0)


@pytest.fixture(params=FORM)
def golden(request):
    """(arrays, network, paradigm) of a published file."""
    arrays, given, names = load_golden(f"{request.param}.npz")
    config = DiTConfig(
        img_resolution=given["input_size"],
        img_channels=given["in_channels"],
        num_classes=given["num_classes"],
        form=FORM[request.param],
        depth=given["depth"],
        embed_dim=given["hidden_size"],
        num_heads=given["num_heads"],
        patch_size=given["patch_size"],
        variance=given.get("learn_sigma", False),
        projector_sizes=tuple(given.get("z_dims", ())),
        projector_dim=given.get("projector_dim", 2048),
    )
    net = load_rule(DiT(config), {name: shape for name, shape in names.items() if name != "pos_embed"}, PUBLISHED)
    return arrays, net, Diffusion((4, 8, 8), 10, FORMS[config.form], steps=6, solver="euler")


def probe_of(arrays, paradigm):
    form, time = paradigm.form, arrays["t"]
    if "alphas_cumprod" in arrays:
        kept = arrays["alphas_cumprod"][time]
        level = ((1 - kept) / kept).sqrt().float()
    else:
        level = 1 - time if form.to_data else time
    x, noise = arrays["x"], arrays["noise"]
    state = form.state(x, noise, level)
    return Probe({"target": form.target(x, noise, state, level), "state": state, "level": level}, torch.zeros(3, 1))


def test_the_network_sees_and_answers_as_published(golden):
    arrays, net, paradigm = golden
    probe, index = probe_of(arrays, paradigm), torch.arange(3)
    seen, time = paradigm.form.asked(probe.inputs["state"], probe.inputs["level"])
    assert relative_rms(seen, arrays["x_t"]) < 1e-6 and torch.allclose(time.double(), arrays["t"].double(), atol=1e-7)
    for name, c in (("", arrays["y"]), ("_null", torch.full((3,), 10))):
        answer, rest = paradigm.predict(net, probe, index, c)
        if "output" in arrays:
            answer = torch.cat([answer, rest], 1)
        assert relative_rms(answer, arrays[f"output{name}" if "output" in arrays else f"velocity{name}"]) < 1e-5
    # rows that share samples
    c, index = torch.tensor([1, 2, 3, 10]), torch.tensor([2, 0, 0, 1])
    shared = paradigm.predict(net, probe, index, c)[0]
    alone = net(seen[index], time[index], c)[0]
    assert relative_rms(shared, alone) < 1e-6


def test_loss_and_gradients(golden):
    arrays, net, paradigm = golden
    probe, index = probe_of(arrays, paradigm), torch.arange(3)
    scores = paradigm.log_likelihood(paradigm.predict(net, probe, index, arrays["y"]), probe, index)
    if "vb" in arrays:
        assert relative_rms(-scores.value_RT[:, 0], arrays["mse"]) < 1e-5 and relative_rms(scores.aux_R, arrays["vb"]) < 1e-4
    loss_R = scores.aux_R - scores.value_RT[:, 0]
    assert relative_rms(loss_R, arrays["loss"]) < 1e-5
    loss_R.mean().backward()
    published = {PUBLISHED.name_of(name): p.grad for name, p in net.named_parameters()}
    for name, norm in zip(arrays["grad_names"], arrays["grad_norms"], strict=True):
        assert published[name].norm().item() == pytest.approx(norm.item(), rel=1e-4), name


@pytest.mark.parametrize(
    ("name", "settings", "guidance"),
    [
        ("euler", {}, Guidance()),
        ("euler_cfg1p5", {}, CFG),
        ("heun", {"solver": "heun_tau"}, Guidance()),
        ("ddim", {}, Guidance()),
        ("ddim_cfg1p5", {}, CFG),
        ("ddim_cfg1p5_three_channels", {"guided_channels": 3}, CFG),
        ("sde", {"solver": "euler_maruyama"}, Guidance()),
        (
            "sde_cfg1p5_below_0p7",
            {"solver": "euler_maruyama"},
            Guidance(Schedule("interval", 0.5, low=float(progress_of(torch.tensor(0.7 / 0.3))), high=1.0)),
        ),
    ],
)
def test_published_samplers(golden, name, settings, guidance):
    arrays, net, paradigm = golden
    if name not in arrays:
        pytest.skip("another form")
    draws = Given(arrays["noise"], *arrays.get("sde_noises", []))
    x = Diffusion(paradigm.shape, 10, paradigm.form, **({"steps": 6, "solver": "euler"} | settings)).sample(
        net, arrays["y"], guidance, draws
    )
    assert relative_rms(x, arrays[name]) < 1e-5


def test_positions(golden):
    arrays, net, _ = golden
    if "pos_embed" in arrays:
        assert relative_rms(positions(net.config)[None], arrays["pos_embed"]) < 1e-6
