"""Files of the Hugging Face hub, read and published by its own package, which keeps what it reads in its cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from edm2_core.errors import InputError

SCHEME = "hf://"
LIBRARY = "edm2"
"""The name of this library in a model card, by which its repositories are known."""
REPLACED = ("snapshots/*.safetensors", "model.safetensors", "samples/*.png")
"""Files of a publication that the next one removes, unless it has them too."""
_INITIAL = {".gitattributes", "README.md", "LICENSE"}  # files of a repository that has no content yet
_LOG_IN = "hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Address:
    """A place on the hub: ``hf://[datasets/]user/name[@revision][/path]``."""

    repo: str
    path: str = ""
    revision: str | None = None
    kind: str = "model"

    @classmethod
    def of(cls, url: str, /) -> "Address":
        """Raises InputError where the URL has no user and name."""
        rest = url.removeprefix(SCHEME).strip("/")
        kind = "dataset" if rest.startswith("datasets/") else "model"
        user, _, rest = rest.removeprefix("datasets/").partition("/")
        name, _, path = rest.partition("/")
        name, at, revision = name.partition("@")
        if not (user and name and bool(at) == bool(revision)):
            raise InputError(f"a repository of the hub must be {SCHEME}user/name, got {url}: correct it")
        return cls(f"{user}/{name}", path, unquote(revision) or None, kind)

    def local(self, *, instead: str) -> Path:
        """The file or folder, downloaded unless it is in the cache. Raises InputError as :func:`hub_folder`, or where
        the repository has no such file."""
        patterns = [self.path, f"{self.path}/*"] if self.path else ["*"]
        path = hub_folder(self.repo, patterns, instead=instead, revision=self.revision, kind=self.kind) / self.path
        if not path.exists():
            raise InputError(f"{self.repo} must have {self.path}, got no such file or folder there: correct the name")
        return path


def hub_folder(
    repo: str,
    patterns: Sequence[str],
    /,
    *,
    instead: str,
    only_local: bool = False,
    revision: str | None = None,
    kind: str = "model",
) -> Path:
    """The files of ``repo`` (user/name) that match ``patterns``, downloaded unless they are in the cache.

    Raises:
        InputError: the hub's package is missing, or neither hub nor cache has them; ``instead`` says what else to do.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise InputError(
            f"{repo} must be on this machine, got no folder of that name: {instead}, or pip install 'edm2[hub]'"
        ) from error
    with explained(repo, instead=instead):
        folder = snapshot_download(
            repo, allow_patterns=list(patterns), local_files_only=only_local, revision=revision, repo_type=kind
        )
    return Path(folder)


# ---- publishing


def publish(
    repo: str,
    files: Mapping[str, Path | bytes],
    /,
    *,
    message: str,
    private: bool = False,
    force: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Make ``files``, by their names there, the publication in the model repository ``repo``, user/name, which is
    created if it is new. All appear in one commit, after the large ones have been uploaded: until then nothing changes
    there, and what has arrived is not sent again. Returns the address of the repository.

    Args:
        private: create it as a private one.
        force: also publish to a repository of something else, whose other files stay.
        token: None: that of ``hf auth login`` or HF_TOKEN.

    Raises:
        InputError: the hub's package or a token is missing, the name is taken by something else, a public repository
            that was to be private, no right to write, or the hub does not answer.
    """
    repo = named(repo)
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    except ModuleNotFoundError as error:
        raise InputError("the hub's package must be installed, got none: pip install 'edm2[hub]'") from error
    if not (token := token or get_token()):
        raise InputError(f"a token of the hub must be set to publish, got none: {_LOG_IN}")
    api, instead = HfApi(token=token), "write the folder with --outdir, and upload it elsewhere"
    with explained(repo, instead=instead):
        info, present = _existing(api, repo, private=private, force=force)
        if info is None:
            api.create_repo(repo, private=private or None)
            say(f"created   {SCHEME}{repo}{', private' if private else ''}")
        gone = sorted(n for n in present if n not in files and any(fnmatchcase(n, pattern) for pattern in REPLACED))
    adding = [CommitOperationAdd(name, content) for name, content in files.items()]
    unfinished = "give the same command again: nothing is published yet, and what has arrived is not sent again"
    with explained(repo, instead=unfinished):
        commit = api.create_commit(
            repo,
            [*adding, *map(CommitOperationDelete, gone)],
            commit_message=message,
            parent_commit=None if info is None else info.sha,
        )
    return str(commit.commit_url).partition("/commit/")[0]


def named(repo: str, /) -> str:
    """``repo`` without the scheme. Raises InputError unless it is user/name."""
    address = Address.of(SCHEME + repo.removeprefix(SCHEME))
    if address != Address(address.repo):
        raise InputError(f"--repo must be user/name, got {repo}: correct it")
    return address.repo


def _existing(api: Any, repo: str, *, private: bool, force: bool) -> tuple[Any, list[str]]:
    """What the hub says of ``repo``, and the names of its files if they are an earlier publication; None and nothing
    for a new name."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if _refused_token(error):
            raise
        return None, []
    names = [file.rfilename for file in info.siblings or []]
    ours = info.library_name == LIBRARY or LIBRARY in (info.tags or [])
    if not ours and not force and set(names) - _INITIAL:
        raise InputError(
            f"--repo must be new or hold a network of edm2, got {repo}, a name taken by something else: choose another "
            "name, or add --force to publish beside its files"
        )
    if private and not info.private:
        raise InputError(
            f"--private needs a new or a private repository, got {repo}, which is public: make it private in its "
            "settings first, or choose another name"
        )
    return info, names if ours else []


# ---- errors


@contextmanager
def explained(repo: str, /, *, instead: str) -> Iterator[None]:
    """Within it, errors of the hub, its cache or the network, of many classes, become one InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _explanation(error, repo, instead) from error


def _explanation(error: Exception, repo: str, instead: str) -> InputError:
    from huggingface_hub import errors, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return InputError(f"a repository of the hub must be user/name, got {repo!r}: correct it")
    if _refused_token(error):
        return InputError(f"the token of the hub must be valid, got one that the hub refuses: {_LOG_IN}")
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{repo} must be open to you, got a repository with conditions: accept them on its page, then {_LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        seen = "this token sees" if get_token() else "is public, and no token"
        return InputError(
            f"{repo} must be a repository that you may read, got none of this name that {seen}: correct the name, or, "
            f"if it is private, {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo} must have the revision that was asked for, got none of this name: correct it")
    if status == 403:
        return InputError(
            f"{repo} must be yours to write, got a refusal by the hub: choose a name of your own, or use a token with "
            "the permission to write"
        )
    if status == 412:
        return InputError(f"{repo} must not change while it is published to, got another commit: {instead}")
    why = " ".join(str(error).split()) or type(error).__name__
    if (cause := _unreachable(error)) is not None:
        told = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            told = "HF_HUB_OFFLINE is set"
        return InputError(f"the hub must answer, or {repo} be in its cache, got '{told:.120}': {instead}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(f"{repo} must be on the hub or in its cache, got '{why:.240}': {instead}")
    return InputError(f"the hub must do as it is asked with {repo}, got '{why:.240}': {instead}")


def _refused_token(error: Exception) -> bool:
    headers = getattr(getattr(error, "response", None), "headers", {})
    return "Invalid credentials" in headers.get("X-Error-Message", "")


def _unreachable(error: BaseException | None) -> BaseException | None:
    """The error that says why the hub was not reached: offline, no connection, or no answer in time."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}  # of httpx, or of requests in older versions
        if isinstance(error, OfflineModeIsEnabled) or names & {"TransportError", "ConnectionError", "Timeout"}:
            return error
        error = error.__cause__
    return None
