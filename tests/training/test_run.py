"""`mclr train` and train/run.py as users meet them: bad input in one line, signals, launchers, and what --dry-run tells."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from launch import ROOT, RUN, as_rank, environment, is_alive, launcher, of_ours, started, wait_for
from ranks import tiny
from runs import metrics
from safetensors.torch import load_file, save_file
from test_data import correct_size, edit_json, rewrite_shard

import mclr.train.run
import mclr.train.system.ranks
import mclr.train.training.launch
from mclr.configs.schema import dump, flatten, load
from mclr.kernels.magnitude import normalize
from mclr.models.edm2 import EDM2, EDM2Config
from mclr.models.features import NoiseClassifier, NoiseClassifierConfig
from mclr.train.cli import main
from mclr.train.engine.checkpoint import checkpoints
from mclr.train.training.log import WRITES, RunFolder
from mclr.train.weights.folder import load_net, save_weights

EDM2_TINY = tiny("edm2-digits", None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, beside which data and weights may be put."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def copy(digits, tmp_path):
    """The digits, to be damaged; without the index that spares reading the shards."""
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "digits" / "index.npz").unlink()
    return tmp_path / "digits"


def edm2(folder, **options):
    """Weights of a tiny EDM2 with these options."""
    shape = {"img_resolution": 8, "img_channels": 1, "num_classes": 10, "model_channels": 8, "channels_per_head": 8} | options
    config = EDM2Config(**shape, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), logvar_channels=32)
    torch.manual_seed(1)
    save_weights(folder, EDM2(config))
    return folder


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(argv, capsys, here):
    """The message with which `mclr train` refuses: one line, status 2, nothing written, no process group."""
    before = snapshot(here)
    assert main(["train", *argv]) == 2
    assert snapshot(here) == before and not torch.distributed.is_initialized()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and err.endswith("\n")
    return err.removeprefix("error: ").strip()


def edm2_argv(data, *more):
    return ["--model", "edm2-digits", "--data", str(data), "--out", "run", *EDM2_TINY, "train.images=16", "train.batch=8", *more]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "arguments are required: --model"),
        (["--model"], "--model: expected one argument"),
        (["--model", "edm2-digits", "--bogus", "1"], "unrecognized arguments: --bogus"),
        (["--model", "edm2-digits", "--local_rank=x"], "--local_rank: invalid int value"),
        (["--model", "edm2-digit"], "unknown model edm2-digit; did you mean edm2-digits?"),
        (["--model", "edm2-digits", "train.lrr=1"], "unknown key train.lrr; did you mean train.lr?"),
        (["--model", "edm2-digits", "trainlr"], "override 'trainlr' is not of the form section.key=value"),
        (["--model", "edm2-digits", "--data", "nowhere"], "unknown data nowhere"),
        (["--model", "edm2-digits", "--init", "nowhere"], "no weights at nowhere"),
        (["--model", "edm2-digits", *EDM2_TINY, "model.posterior.weights=nowhere"], "no weights at nowhere"),
        (["--model", "var-digits", "model.tokenizer=nowhere"], "no weights at nowhere"),
        (
            ["--model", "var-digits", "data.channels=3"],
            "model.tokenizer=digits-tokenizer is for 1 x 8^2 images, digits has 3 x 8^2",
        ),
        (
            ["--model", "var-digits", "data.resolution=16", "--dry-run"],
            "for your own one by `mclr prepare tokenizer WEIGHTS --data data/digits`",
        ),
        (["--model", "edm2-digits", "--engine", "zero1"], "engine.kind=deepspeed needs a launcher"),
        (["--model", "edm2-digits", "--gpus", "0"], "--gpus and --gpu belong to --plan"),
        (["--model", "edm2-digits", "--gpu", ""], "--gpus and --gpu belong to --plan"),
        (["--model", "var-d16"], "needs ImageNet at 256 pixels: give --data FOLDER, made by `mclr prepare images PHOTOS FOLDER"),
        (["--model", "edm2-img512-l", "--dry-run"], "needs ImageNet at 512 pixels: give --data FOLDER"),
        (["--model", "edm2-32px"], "needs images of your own: give --data FOLDER"),
        (["--model", "edm2-digits", "data.name=mine", "data.path=nowhere", *EDM2_TINY], "no dataset folder at nowhere"),
    ],
)
def test_a_wrong_argument(argv, says, here, capsys):
    assert says in refused(argv, capsys, here)


DATA = {
    "empty": (lambda data: [shutil.rmtree(data), data.mkdir()], "holds no dataset.json"),
    "not JSON": (lambda data: (data / "dataset.json").write_text("{"), "does not describe a dataset"),
    "half a shard": (lambda data: os.truncate(data / "train/000001.tar", 1000), "has 1000 bytes, but dataset.json says"),
    "no shard": (lambda data: (data / "train/000002.tar").unlink(), "train/000002.tar is missing"),
    "a broken shard": (
        lambda data: break_tar(data, "train/000000.tar"),
        "(it holds 5 samples, but dataset.json says 375)",
    ),
    "a condition out of range": (
        lambda data: rewrite_shard(data, "train/000001.tar", lambda name, content: b"10" if name.endswith(".cls") else content),
        "has condition 10, outside of 0..9",
    ),
    "no samples": (lambda data: edit_json(data / "dataset.json", empty_train), "has no images in its train split"),
}


def break_tar(data, file):
    with tarfile.open(data / file) as tar:
        offset = tar.getmembers()[10].offset
    with open(data / file, "r+b") as stream:
        stream.seek(offset)
        stream.write(b"x" * 512)
    correct_size(data, file)


def empty_train(record):
    record["splits"]["train"] = {"count": 0, "shards": []}


@pytest.mark.parametrize("damage", DATA)
def test_a_damaged_dataset(damage, here, copy, capsys):
    do, says = DATA[damage]
    do(copy)
    assert says in refused(edm2_argv(copy), capsys, here)


def no_val(record):
    record["splits"]["val"] = {"count": 0, "shards": []}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(("key", "value"), [("keep_best", "true"), ("monitor_every", "8")])
def test_held_out_images_are_asked_for_before_the_first_step(key, value, dry, here, copy, capsys):
    edit_json(copy / "dataset.json", no_val)
    says = refused(edm2_argv(copy, f"train.{key}={value}", *dry), capsys, here)
    assert says == (
        f"train.{key}={value} needs held-out images, {copy} has none: prepare it with --val-share 0.1, or leave train.{key} out"
    )


def test_a_damaged_held_out_image_is_found_before_the_first_step(here, copy, capsys):
    rewrite_shard(copy, "val/000000.tar", lambda name, content: content if name.endswith("cls") else b"no image")
    assert main(["train", *edm2_argv(copy, "train.keep_best=true")]) == 2 and not os.listdir(here)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "of 297 samples in split val" in error


@pytest.mark.parametrize(("key", "value"), [("num_classes", 12), ("resolution", 16), ("channels", 3)])
def test_a_dataset_of_another_shape_than_said(key, value, here, digits, capsys):
    says = refused(edm2_argv(digits, f"data.{key}={value}", "model.net.attn_resolutions=[8]"), capsys, here)
    assert says.startswith(f"data.{key}={value}, but {digits} holds {key}")


WEIGHTS = {
    "other classes": (lambda folder: edm2(folder, num_classes=12), "have num_classes 12, this run has 10"),
    "other resolution": (lambda folder: edm2(folder, img_resolution=16), "have img_resolution 16, this run has 8"),
    "other channels": (lambda folder: edm2(folder, img_channels=3), "have img_channels 3, this run has 1"),
    "other width": (lambda folder: edm2(folder, model_channels=16), "have model_channels 16, this run has 8"),
    "other network": (
        lambda folder: save_weights(folder, NoiseClassifier(NoiseClassifierConfig(1, 10, 8))),
        "hold a network of kind noise_classifier, not edm2",
    ),
    "no tensors": (lambda folder: (edm2(folder) / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "half the tensors": (lambda folder: os.truncate(edm2(folder) / "model.safetensors", 5000), "cannot be read"),
    "no description": (lambda folder: (edm2(folder) / "config.json").unlink(), "is no published EDM2, DiT, SiT, VAR or VQVAE"),
    "half a description": (lambda folder: os.truncate(edm2(folder) / "config.json", 30), "is not the description of a network"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_do_not_fit(kind, here, digits, tmp_path, capsys):
    do, says = WEIGHTS[kind]
    do(tmp_path / "weights")
    assert says in refused(edm2_argv(digits, "--init", str(tmp_path / "weights")), capsys, here)


def test_a_run_folder_that_cannot_be(here, digits, capsys):
    (here / "file").write_text("")
    for out in ("file", "file/below", "file/far/below"):
        assert f"cannot write the run folder {out}" in refused(edm2_argv(digits, "--out", out), capsys, here)


def test_a_run_folder_that_is_taken(here, digits, capsys):
    argv = edm2_argv(digits)
    config = load("edm2-digits", "mclr", str(digits), "auto", argv[6:])
    held = RunFolder(here / "run", flatten(config), dump(config), {"inputs": {}})
    says = refused(argv, capsys, here)
    assert says == f"run folder run is held by process {os.getpid()}: wait for it, or choose another with --out"
    held.close()
    assert "with train.batch=8, this one has 4" in refused([*argv, "train.batch=4"], capsys, here)
    assert "with objective.lam=0.2, this one has 0.3" in refused([*argv, "objective.lam=0.3"], capsys, here)
    (here / "run" / "config.yaml").write_text("model: 1")
    assert "model=1" in refused(argv, capsys, here)


@pytest.mark.parametrize("settings", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_what_no_run_has_written_is_not_written_over(name, settings, here, digits, capsys):
    mine = here / "run" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    if settings:
        config = load("edm2-digits", "mclr", str(digits), "auto", edm2_argv(digits)[6:])
        mine.with_name("config.yaml").write_text(dump(config))
    says = refused(edm2_argv(digits), capsys, here)
    assert says.startswith(f"run/{name} is of no run that could go on") and mine.read_text() == "mine"


def test_what_else_is_in_a_run_folder_stays(here, digits):
    """A shell's log, somebody's unfinished work; empty places that were prepared for the run, also on another disk."""
    run = here / "run"
    (here / "scratch").mkdir()
    (run / ".tmp-0123").mkdir(parents=True)
    (run / "mclr.train.training.log").write_text("mine")
    (run / "weights").mkdir()
    (run / "metrics.jsonl").touch()
    (run / "checkpoints").symlink_to(here / "scratch")
    assert main(["train", *edm2_argv(digits)]) == 0
    assert (run / "mclr.train.training.log").read_text() == "mine" and (run / ".tmp-0123").is_dir() and checkpoints(here / "run")
    assert (run / "weights/config.json").exists() and next((here / "scratch").iterdir())


def test_a_run_begins_with_the_weights_of_another(here, digits, capsys):
    assert main(["train", *edm2_argv(digits, "--out", "base")]) == 0
    assert main(["train", *edm2_argv(digits, "--init", "base", "train.lr=1e-9")]) == 0
    before, after = (load_file(f"{run}/weights/model.safetensors") for run in ("base", "run"))
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)
    shutil.rmtree("base/weights")
    assert main(["train", *edm2_argv(digits, "--init", "base", "--out", "other")]) == 2
    says = "error: run base has no weights yet: finish it, or give one of the folders in base/checkpoints"
    assert capsys.readouterr().err.splitlines()[-1] == says


def test_a_file_in_the_place_of_a_folder_is_found_before_the_first_step(here, digits, capsys):
    assert main(["train", *edm2_argv(digits)]) == 0
    (here / "run" / "grids").write_text("mine")
    capsys.readouterr()
    assert main(["train", *edm2_argv(digits, "train.images=24", "train.grid_every=8")]) == 2
    assert capsys.readouterr().err.startswith("error: run/grids is a file, and the run would write a folder there: ")


@pytest.mark.parametrize("lost", [("config.yaml",), ("lock",), ("config.yaml", "lock"), ("checkpoints", "config.yaml")])
def test_a_run_that_has_lost_something_goes_on(lost, here, digits):
    assert main(["train", *edm2_argv(digits)]) == 0
    for name in lost:
        path = here / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", *edm2_argv(digits)]) == 0


def test_a_run_does_not_go_on_from_what_changed_under_its_name(here, digits, tmp_path, capsys):
    """The reference of cca is read again when a run goes on."""
    argv = edm2_argv(digits, "--init", str(edm2(tmp_path / "weights")), "--objective", "cca")
    argv = [word for word in argv if not word.startswith("objective.")]
    assert main(["train", *argv]) == 0
    shutil.rmtree(tmp_path / "weights")
    edm2(tmp_path / "weights", model_channels=8, dropout=0.5)
    # the same tensors, described in other words or found by another path
    for path in (str(tmp_path / "weights"), "../weights", "./../weights/"):
        argv[argv.index("--init") + 1] = path
        assert main(["train", *argv]) == 0
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    save_file({name: -t for name, t in tensors.items()}, tmp_path / "weights" / "model.safetensors")
    before = snapshot(here)
    capsys.readouterr()
    assert main(["train", *argv]) == 2 and snapshot(here) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run folder run began with another model.weights=") and line.endswith("or put it back")


@pytest.mark.parametrize(
    ("ranks", "more", "says"),
    [
        (3, [], "train.batch=8 cannot be shared by 3 ranks: make it a multiple of 3"),
        (2, ["--engine", "local"], "engine.kind=local runs on one rank, not 2: use engine.kind=deepspeed"),
    ],
)
def test_a_batch_that_the_ranks_cannot_share(ranks, more, says, here, digits, monkeypatch, capsys):
    as_rank(monkeypatch, 0, ranks)
    assert says in refused(edm2_argv(digits, *more), capsys, here)


def test_a_rank_that_fails_alone_says_who_it_is(here, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(mclr.train.system.ranks, "PATIENCE", 0)
    assert refused(["--model", "edm2-digit"], capsys, here).startswith("rank 1: unknown model edm2-digit")


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("--model", "--objective", "--data", "--engine", "--init", "--out", "--dry-run", "section.key=value", "example"):
        assert word in text
    assert "local_rank" not in text


MODELS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
SIDES = {"32px": 32, "img64": 64, "img512": 64, "it-": 32}


@pytest.mark.parametrize("model", MODELS)
def test_a_dry_run_tells_the_cost_and_writes_nothing(model, here, tokenizer, capsys):
    """Also before the digits are there."""
    paradigm = ["model.weights=null"] + [f"model.tokenizer={tokenizer}"] * model.startswith("var")
    data = [f"data.resolution={side}" for part, side in SIDES.items() if part in model]
    data += ["model.vae=null"] * ("img512" in model or "it-" in model)
    data += ["model.posterior.warmup_images=300"] * (not model.startswith("var"))
    assert (
        main(
            ["train", "--model", model, "--data", "digits", "--dry-run", *paradigm, *data, "train.images=1000", "train.batch=100"]
        )
        == 0
    )
    assert os.listdir(here) == []
    out = capsys.readouterr().out
    settings, _, cost = out.partition("\nmodel      ")
    assert yaml.safe_load(settings)["train"]["batch"] == 100
    assert "M parameters" in cost and " rows with gradient" in cost
    assert cost.rstrip().endswith("1000 images = 10 steps")
    assert ("no ratio for the first 300 images" in cost) == (
        not model.startswith("var") and model not in ("edm2-digits", "sit-digits")
    )
    # lam rises with the scale in the token presets, and is constant in the others
    assert ("\n  scale  " in cost and "\n  lam  " in cost) == model.startswith("var") and "\n  sigma  " not in cost


def test_a_dry_run_looks_at_the_weights(here, tokenizer, capsys):
    argv = ["train", "--model", "var-digits", "--dry-run", "--init"]
    for weights, line in [
        ("nowhere", "no weights at nowhere"),
        ("edm2-digits", "hold a network of kind edm2, not var: these look like edm2-digits, give --model edm2-digits"),
    ]:
        assert main([*argv, weights]) == 2
        assert line in capsys.readouterr().err
    assert main([*argv, "var-digits", "model.net.depth=3"]) == 2
    assert "depth 4, this run has 3" in capsys.readouterr().err
    assert main([*argv, "var-digits", "sample.gamma=1", "sample.guide.weights=nowhere"]) == 2
    assert "no weights at nowhere" in capsys.readouterr().err
    assert main([*argv, "var-digits", "model.class_map=nowhere.json"]) == 2
    assert "cannot read model.class_map=nowhere.json" in capsys.readouterr().err


def test_a_dry_run_of_a_large_model_needs_no_memory(here, tokenizer):
    """310M parameters would be 1.2 GB more than the small model's."""
    program = (
        # not getrusage, whose peak is inherited from the process that starts this one
        "import sys; from mclr.train.bench.step import peak_memory; from mclr.train.cli import main; "
        "main(sys.argv[1:]); print(int(peak_memory() * 2**20))"
    )
    peaks = []  # kB
    for model, size in (("var-digits", "(next_scale), 0"), ("var-d16", "(next_scale), 30")):
        argv = ["train", "--model", model, "--data", "digits", "--init", "none", "--dry-run", f"model.tokenizer={tokenizer}"]
        ran = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert ran.returncode == 0 and size in ran.stdout, ran.stderr
        peaks.append(int(ran.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 200_000


def test_a_path_that_yaml_would_misread_reaches_the_weights(here, digits, tmp_path, capsys):
    odd = edm2(tmp_path / "odd: [\"name\"] #1 {é} 𝄞 'x'")
    assert main(["train", *edm2_argv(digits, "--init", str(odd), "train.lr=1e-9")]) == 0
    assert f"weights {odd}" in capsys.readouterr().out
    written = json.loads((here / "run" / "weights" / "config.json").read_text())
    assert written["init"] == str(odd) and str(odd) in shlex.split(written["command"])
    # a rate of nearly nothing leaves the weights where they began, but for their projection
    for before, after in zip(load_net(str(odd), "edm2").parameters(), load_net("run/weights", "edm2").parameters(), strict=True):
        torch.testing.assert_close(after, normalize(before) if before.ndim > 1 else before, rtol=0, atol=1e-3)


def test_training_from_scratch_is_said_with_the_time_it_takes(here, digits, tmp_path, capsys):
    assert main(["train", *edm2_argv(digits)]) == 0
    assert capsys.readouterr().out.count("M parameters, from random weights (others: --init WEIGHTS)\n") == 1
    weights = edm2(tmp_path / "weights")
    assert main(["train", *edm2_argv(digits, "--init", str(weights), "--out", "other")]) == 0
    assert "random weights" not in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_ends_it_in_one_line(number, status, here, digits, monkeypatch, capsys):
    real = mclr.train.training.launch.build_networks

    def build_networks(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(mclr.train.training.launch, "build_networks", build_networks)
    with pytest.raises(SystemExit) as ended:
        main(["train", *edm2_argv(digits)])
    assert ended.value.code == status
    assert capsys.readouterr().err == "interrupted\n" and os.listdir(here) == []


def test_ctrl_c_in_a_process_of_its_own(here, digits):
    argv = [*edm2_argv(digits), "train.images=100000000", "train.log_every=1"]
    with started([sys.executable, str(RUN), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_for((here / "run" / "metrics.jsonl").exists, run)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "stopped by a signal at" in out.splitlines()[-1] and "Traceback" not in err
    assert main(["train", *argv, "train.images=8"]) == 0


def test_ranks_whose_launcher_dies_leave_a_checkpoint_that_one_process_goes_on_from(here, digits, capsys):
    """deepspeed, ZeRO 1, started elsewhere than in the repository."""
    argv = [*edm2_argv(digits), "train.log_every=1"]
    command = [*launcher("deepspeed"), str(RUN), *argv, "--engine", "zero1", "train.images=100000000"]
    with open("log", "w") as log, started(command, stdout=log, stderr=log) as runner:
        wait_for(Path("run/metrics.jsonl").exists, runner)
        (launch,) = (int(line) for line in Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split())
        ranks = [int(pid) for pid in Path(f"/proc/{launch}/task/{launch}/children").read_text().split()]
        os.kill(launch, signal.SIGKILL)
        # the lock is let go of when rank 0 has ended
        for _ in range(600):
            if not any(is_alive(pid) for pid in ranks):
                break
            time.sleep(0.1)
    assert not any(is_alive(pid) for pid in ranks), Path("log").read_text()
    (stopped,) = (line for line in Path("log").read_text().splitlines() if "stopped by a signal at" in line)
    images = int(stopped.split(" at ")[1].split()[0])
    assert main(["train", *argv, "--engine", "local", f"train.images={images + 8}"]) == 0
    assert f"going on from run/checkpoints/{images:012d}" in capsys.readouterr().out
    assert [line["images"] for line in metrics("run")] == list(range(8, images + 9, 8))


def test_torchrun_trains_as_one_process_does(here, digits):
    argv = [*edm2_argv(digits), "train.log_every=1"]
    ran = subprocess.run([*launcher("torchrun"), str(RUN), *argv], capture_output=True, text=True, env=environment(), timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("finished: 16 images") == 1 and ran.stdout.count("from random weights") == 1
    assert main(["train", *argv, "--out", "alone"]) == 0
    two, one = metrics("run"), metrics("alone")
    assert [line["images"] for line in two] == [8, 16]
    for name in ("value", "loss", "posterior_loss", "gradient_norm", "contrast_share"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5)


@pytest.mark.parametrize("who", ["both", "rank 1"])
def test_two_ranks_fail_in_one_line(who, here, digits, tmp_path):
    """Both meet the same; or rank 1 alone, which sees other files."""
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"if {who == 'both'} or os.environ['RANK'] == '1': os.chdir('/')\n"
        f"sys.argv[0] = {str(RUN)!r}\n"
        f"runpy.run_path({str(RUN)!r}, run_name='__main__')\n"
    )
    shutil.copytree(digits, here / "data")
    argv = [*edm2_argv(digits), "data.path=data", "data.name=mine"]
    command = [*launcher("deepspeed"), str(script), *argv]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    (line,) = of_ours(ran.stderr)
    assert line.startswith("error: rank 1: no dataset folder at data" if who == "rank 1" else "error: no dataset folder at data")


@pytest.mark.slow
def test_one_step_of_the_smallest_published_size(here, digits, tokenizer):
    """310M parameters, batch 4: about 6 GB of memory and some minutes on a CPU."""
    argv = ["--model", "var-d16", "--objective", "mclr", "--data", str(digits), "--out", "run", f"model.tokenizer={tokenizer}"]
    argv += ["train.batch=4", "train.images=4", "train.log_every=1"]
    command = launcher("deepspeed", 1)
    ran = subprocess.run([*command, str(RUN), *argv], capture_output=True, text=True, env=environment(), timeout=1800)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "from random weights" in ran.stdout
    (line,) = metrics("run")
    # nothing is learned yet: each of the 16 codes is as likely as any other
    assert line["images"] == 4 and line["value"] == pytest.approx(-2.77, abs=0.3)
