"""Files of the Hugging Face hub, by its own package, which keeps them in its cache."""

from collections.abc import Sequence
from pathlib import Path

from edm2_core.errors import InputError

SCHEME = "hf://"


def hub_folder(repo: str, patterns: Sequence[str], /, *, instead: str, only_local: bool = False) -> Path:
    """The files of ``repo`` (user/name) that match ``patterns``, downloaded unless they are in the cache.

    Raises:
        InputError: the hub's package is missing, or neither hub nor cache has them; ``instead`` says what else to do.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise InputError(
            f"{repo} must be on this machine, got no folder of that name: {instead}, or pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=only_local))
    except Exception as error:  # of the hub, its cache or the network: many classes
        why = str(error).split("\n")[0]
        raise InputError(f"{repo} must be on the hub or in its cache, got '{why}': {instead}") from error
