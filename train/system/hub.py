"""hf://ORG/REPO[/FILE][@REV]: weights on the Hugging Face hub, fetched into its client's own cache."""

import json
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from mclr.errors import UserError
from mclr.train.system.files import cache_folder

SCHEME = "hf://"
FORM = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@]+))?")
FOLDER = ("config.json", "model.safetensors")  # weights of ours


@lru_cache
def fetch(name: str, folder: tuple[str, ...] = FOLDER) -> Path:
    """The local copy of FILE; without FILE a folder with the files of the repository named in `folder`; any other name as a path.

    The index of a network in shards brings the shards. The hub is asked once per process, so that a branch that moves meanwhile does
    not change the answer. Raises UserError when a file cannot be fetched.
    """
    if name.startswith(("https://", "http://")):
        raise UserError(f"{name} is an address: download it, or give what is on the hub as hf://ORG/REPO[/FILE][@REV]")
    if not name.startswith(SCHEME):
        return Path(name)
    # slow to import, and only used here
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import logging

    # every attempt would be a warning
    logging.set_verbosity_error()

    match = FORM.fullmatch(name)
    try:
        if match is None:
            raise ValueError(name)
        repo, file, revision = match.groups()
        files = (file,) if file else folder
        urls = [hf_hub_url(repo, each, revision=revision) for each in files]
    except ValueError:
        form = "hf://ORG/REPO[/FILE][@REV], as in hf://FoundationVision/var/var_d16.pth"
        raise UserError(f"{name} is no place on the hub: give {form}") from None
    # the client takes ~ for the name of a folder where the user has no home
    where: dict[str, Any] = {"cache_dir": cache_folder() / "hub"} if constants.HF_HUB_CACHE.startswith("~") else {}
    try:
        paths = [Path(hf_hub_download(repo, each, revision=revision, **where)) for each in files]
        # an index stands for the shards beside it
        shards = json.loads(paths[0].read_bytes())["weight_map"].values() if files[0].endswith(".index.json") else ()
        for shard in sorted(set(shards)):
            hf_hub_download(repo, str(PurePosixPath(files[0]).with_name(shard)), revision=revision, **where)
    # the client and what it stands on raise nearly anything
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        path = "its path" if file else "the path of the folder that holds both"
        raise UserError(
            f"cannot fetch {' and '.join(files)} of {repo}: download {' and '.join(urls)}, and give {path} ({reason})"
        ) from error
    return paths[0] if file else paths[0].parent
