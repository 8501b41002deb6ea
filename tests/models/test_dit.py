"""models/dit.py and the forms ddpm and flow against the published DiT, SiT and REPA: networks, losses, gradients, samplers."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from golden_weights import load_golden, load_rule, relative_rms

from mclr.diffusion import Diffusion, progress_of
from mclr.forms import DDPM, EDM, FORMS, Flow, ddpm_table
from mclr.guidance import Guidance
from mclr.likelihood import Draws, Probe
from mclr.models.dit import PUBLISHED, DiT, positions
from mclr.models.options import DiTConfig
from mclr.schedule import Schedule
from mclr.train.cli import main
from mclr.train.weights.folder import load_net, save_weights

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


BELOW = Schedule("interval", 0.5, low=float(progress_of(torch.tensor(0.7 / 0.3))), high=1.0)
SDE = {"solver": "euler_maruyama"}
SAMPLERS = {
    "dit_tiny": [
        ("ddim", {}, Guidance()),
        ("ddim_cfg1p5", {}, CFG),
        ("ddim_cfg1p5_three_channels", {"guided_channels": 3}, CFG),
    ],
    "sit_tiny": [("euler", {}, Guidance()), ("euler_cfg1p5", {}, CFG), ("heun", {"solver": "heun_tau"}, Guidance())],
}
SAMPLERS["sit_repa_tiny"] = [*SAMPLERS["sit_tiny"], ("sde", SDE, Guidance()), ("sde_cfg1p5_below_0p7", SDE, Guidance(BELOW))]


@pytest.mark.parametrize(
    ("golden", "name", "settings", "guidance"),
    [(file, *each) for file, cases in SAMPLERS.items() for each in cases],
    indirect=["golden"],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_samplers(golden, name, settings, guidance):
    arrays, net, paradigm = golden
    draws = Given(arrays["noise"], *arrays.get("sde_noises", []))
    x = replace(paradigm, **settings).sample(net, arrays["y"], guidance, draws)
    assert relative_rms(x, arrays[name]) < 1e-5


def exact(form):
    """A network of this form that denoises N(0, .25) exactly."""

    def net(seen, time, c, index=None):
        if isinstance(form, Flow):
            state, level = seen, 1 - time if form.to_data else time
        elif isinstance(form, DDPM):
            level = torch.from_numpy(ddpm_table()[0]).float()[time]
            state = seen * (1 + level[:, None, None, None] ** 2).sqrt()
        else:
            state, level = seen, time
        denoised = form.noisy(state, level) * 0.25 / (0.25 + form.sigma(level)[:, None, None, None] ** 2)
        # what the form makes of an answer is affine
        unit, shift = form.denoised(torch.ones_like(state), state, level), form.denoised(torch.zeros_like(state), state, level)
        return (denoised - shift) / (unit - shift), None

    return net


@pytest.mark.parametrize("solver", ["heun", "sde"])
def test_the_solvers_in_sigma_serve_every_form(golden, solver):
    """They draw what they draw of an EDM network; of DDPM at the nearest timesteps."""
    form, c = golden[2].form, torch.zeros(500, dtype=torch.int64)
    mine, edm = (
        Diffusion((4, 8, 8), 10, each, steps=24, solver=solver, sigma_max=60.0).sample(
            exact(each), c, Guidance(), Draws(0, list(range(500)))
        )
        for each in (form, EDM())
    )
    assert relative_rms(mine, edm) < (0.02 if isinstance(form, DDPM) else 1e-4)


def test_at_timestep_0_the_bound_is_the_likelihood_of_a_bin():
    """The network's variance is the posterior's second one; its mean is right: nearly all of the probability lies in the bin."""
    sigma = torch.from_numpy(ddpm_table()[0][:1]).float()
    x, noise = torch.full((1, 4, 2, 2), 0.1), torch.zeros(1, 4, 2, 2)
    inputs = {"target": noise, "state": x, "level": sigma}
    found = DDPM().aux(torch.zeros(1), noise, torch.full((1, 4, 2, 2), -1.0), inputs, torch.zeros(1, dtype=torch.int64))
    std = math.exp(ddpm_table()[2][0] / 2)
    expected = -math.log2(math.erf(1 / 255 / std / math.sqrt(2)))
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_it_trains_samples_and_converts(form, digits, tmp_path, monkeypatch, capsys):
    """From the command line, on digits, with the contrast that needs a classifier; back to published names and in again."""
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "tiny.yaml"
    net = f"{{form: {form}, depth: 2, embed_dim: 16, num_heads: 2, variance: {str(form == 'ddpm').lower()}}}"
    preset.write_text(
        f"model: {{name: tiny, paradigm: diffusion, kind: dit, net: {net}, sigma_data: 1.0}}\n"
        "objective: {lam: 1.0}\ntrain: {images: 32, batch: 16, lr: 0.001}\nsample: {solver: euler, steps: 4, batch: 8}\n"
    )
    argv = ["train", "--model", str(preset), "--objective", "mclr", "--data", str(digits), "--out", "run"]
    assert main([*argv, "train.monitor_every=32", "train.keep_best=true"]) == 0
    assert main(["sample", "run", "--out", "drawn", "--count", "4", "sample.gamma=1.0"]) == 0
    assert main(["convert", "run/weights", "out.pth"]) == 0
    assert f"the file does not show 'form=\"{form}\"'" in capsys.readouterr().out
    assert main(["convert", "out.pth", "again"]) == 2
    assert "does not show whether it is a DiT or a SiT: give form=ddpm or form=flow_to_data" in capsys.readouterr().err
    assert main(["convert", "out.pth", "again", f"form={form}", "num_heads=2"]) == 0
    first, second = (load_net(name).state_dict() for name in ("run/weights", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # a guide of another form
    torch.manual_seed(0)
    other = next(name for name in FORMS if name != form)
    save_weights("other", DiT(dataclasses.replace(load_net("again").config, form=other)))
    capsys.readouterr()
    assert main(["sample", "run", "--out", "guided", "--count", "4", "sample.gamma=1.0", "sample.guide.weights=other"]) == 2
    assert f"has form {other}, the model has {form}" in capsys.readouterr().err


def test_positions(golden):
    arrays, net, _ = golden
    assert positions(net.config).shape == (16, 64)
    if "pos_embed" in arrays:
        assert relative_rms(positions(net.config)[None], arrays["pos_embed"]) < 1e-6


LAYOUTS = {
    "bare": lambda weights: weights,
    "averaged beside raw": lambda weights: {
        "model": {name: 0 * weight for name, weight in weights.items()},
        "ema": weights,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "steps": 400_000,
    },
    "of many ranks": lambda weights: {"ema": {f"module.{name}": weight for name, weight in weights.items()}},
    "one network": lambda weights: {"state_dict": weights},
    "without projectors": lambda weights: {name: weight for name, weight in weights.items() if not name.startswith("projectors")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_published_sit_of_repa_is_read(layout, tmp_path, monkeypatch, capsys):
    """As its authors publish it, and as those who fine-tune it may. Without projectors nothing in it shows the form."""
    monkeypatch.chdir(tmp_path)
    _, given, names = load_golden("sit_repa_tiny.npz")
    shapes = {name: shape for name, shape in names.items() if name != "pos_embed"}
    config = DiTConfig(
        8, 4, 10, "flow", given["depth"], given["hidden_size"], given["num_heads"], given["patch_size"], variance=False
    )
    config = replace(config, projector_sizes=tuple(given["z_dims"]), projector_dim=given["projector_dim"])
    net = load_rule(DiT(config), shapes, PUBLISHED)
    torch.save(LAYOUTS[layout](PUBLISHED.entries(net) | PUBLISHED.constants(config)), "file.pt")
    options = ["num_heads=" + str(config.num_heads)]
    if layout == "without projectors":
        assert main(["convert", "file.pt", "ours", *options]) == 2
        assert "does not show whether it is a DiT or a SiT: give form=ddpm or form=flow_to_data" in capsys.readouterr().err
        options.append("form=flow")
    assert main(["convert", "file.pt", "ours", *options]) == 0
    found = load_net("ours").state_dict()
    expected = {
        name: tensor for name, tensor in net.state_dict().items() if layout != "without projectors" or "projectors" not in name
    }
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_answers_of_neither_c_nor_2c_channels_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = DiT(DiTConfig(8, 4, 10, "ddpm", 2, 64, 1))
    weights = PUBLISHED.entries(net) | PUBLISHED.constants(net.config)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][:24]
    torch.save(weights, "file.pt")
    assert main(["convert", "file.pt", "ours", "form=ddpm"]) == 2
    said = capsys.readouterr().err
    assert "answers have 6 channels, neither 4 nor 8" in said and said.count("\n") == 1
