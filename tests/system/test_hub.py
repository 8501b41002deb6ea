"""train/system/hub.py: what is asked of the hub, and what is said when it does not answer. Nothing here goes to the network."""

import huggingface_hub
import pytest

from mclr.errors import UserError
from mclr.train.system.hub import fetch


@pytest.fixture(autouse=True)
def forget():
    fetch.cache_clear()


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is downloaded, one entry per file."""
    calls = []

    def download(repo, file, revision=None):
        calls.append((repo, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("hf://org/repo/net.pth", "net.pth", [("org/repo", "net.pth", None)]),
        ("hf://Org-1/re.po_2/sub/net.pth@v1.0", "sub/net.pth", [("Org-1/re.po_2", "sub/net.pth", "v1.0")]),
        ("hf://org/repo/net.pth@refs/pr/1", "net.pth", [("org/repo", "net.pth", "refs/pr/1")]),
        ("hf://org/repo", "", [("org/repo", "config.json", None), ("org/repo", "model.safetensors", None)]),
        ("hf://org/repo@a1b2", "", [("org/repo", "config.json", "a1b2"), ("org/repo", "model.safetensors", "a1b2")]),
    ],
)
def test_a_file_or_a_folder_is_fetched_once(name, found, expected, asked, tmp_path):
    assert fetch(name) == fetch(name) == tmp_path / found
    assert asked == expected


def test_an_index_brings_its_shards(asked, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/net.index.json").write_text('{"weight_map": {"a": "2.bin", "b": "1.bin", "c": "2.bin"}}')
    assert fetch("hf://org/repo/sub/net.index.json@v1") == tmp_path / "sub/net.index.json"
    assert asked == [("org/repo", f"sub/{name}", "v1") for name in ("net.index.json", "1.bin", "2.bin")]
    fetch.cache_clear()
    (tmp_path / "sub/net.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    with pytest.raises(UserError, match=r"cannot fetch sub/net\.index\.json of org/repo"):
        fetch("hf://org/repo/sub/net.index.json")


@pytest.mark.parametrize(
    "name",
    ["", "repo", "/repo", "org/", "org/repo/", "org/repo@", "org/repo/a@b@c", "a--b/c", "a b/c"],
    ids=lambda name: name or "none",
)
def test_what_is_no_place_on_the_hub_is_one_line(name, asked):
    with pytest.raises(UserError) as error:
        fetch(f"hf://{name}")
    assert str(error.value).startswith(f"hf://{name} is no place on the hub: give hf://ORG/REPO[/FILE][@REV]") and asked == []


def test_offline_says_which_file_to_bring(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 makes it at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, what, how in (
        ("hf://org/none-such/a/net.pth@v2", "a/net.pth", "org/none-such/resolve/v2/a/net.pth, and give its path ("),
        (
            "hf://org/none-such",
            "config.json and",
            "org/none-such/resolve/main/model.safetensors, and give the path of the folder",
        ),
    ):
        with pytest.raises(UserError) as error:
            fetch(name)
        message = str(error.value)
        assert message.startswith(f"cannot fetch {what}") and " of org/none-such: download https://" in message and how in message
        assert "\n" not in message


def test_any_failure_of_the_client_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"^cannot fetch net.pth of org/repo: download .*net.pth, .* its path \(first line\)$"):
        fetch("hf://org/repo/net.pth")
