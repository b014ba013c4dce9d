"""The Hugging Face Hub, through huggingface_hub: models come from it, and results go to it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlora_surgery.errors import CheckpointError, HubError, OptionError

__all__ = [
    "Uploaded",
    "base_metadata",
    "check_repo_id",
    "fetch",
    "join_card",
    "login",
    "split_card",
    "split_id",
    "upload",
]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@(?P<revision>[\w./-]+))?")
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx",
            "*.ot", "*.npz", "*.pkl", "onnx/*", "original/*"]  # fmt: skip
_SINGLE_FILE = "model.safetensors"
_ADAPTERS = ["adapter_model.safetensors", "adapter/adapter_model.safetensors"]  # the second: in an output of init

# Seconds that an upload's answer may take: the Hub puts large files together before it answers.
_UPLOAD_TIMEOUT = 120.0

# What goes to the Xet storage is small blocks, for which huggingface_hub's library for it has settings of its own: by
# default it tries a silent server again for a quarter of an hour and more.
_XET_TIMEOUT = 60.0
_XET_ATTEMPTS = 2


def split_id(name: str) -> tuple[str, str | None] | None:
    """`org/name` or `org/name@revision` as id and revision; None for what is no Hub id."""
    match = _REPO_ID.fullmatch(name)
    if match is None or ".." in name:
        return None
    return name.partition("@")[0], match["revision"]


# --- downloads ----------------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """The local directory of a model or adapter that is named by path or by Hub id.

    From the Hub comes what is needed and no more: every small file, and of the weights those that
    transformers would load (`model.safetensors`, else the shards of the index; an adapter's own). The token
    is huggingface_hub's: `HF_TOKEN` or the stored login.

    Args:
        name: a directory, or `org/name` or `org/name@revision`. A directory that exists comes first.

    Raises:
        CheckpointError: `name` is neither.
        HubError: the Hub could not be reached, or does not have it, or does not give it.
    """
    if not name:
        raise CheckpointError("the name of the model is empty")  # as a path it would be the current directory
    path = Path(name)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"no model at {name}: {error.strerror}") from error
    if is_directory:
        return path
    parts = split_id(name)
    if exists or parts is None:
        found = "it is a file" if exists else "no such directory, and a Hub id is written org/name"
        raise CheckpointError(f"no model at {name}: {found}")
    absent = "there is no such local directory, and no such repository on the Hub that this login may see"
    with _on_hub(f"cannot fetch {name}", absent):
        return _snapshot(*parts)


def _snapshot(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """A progress bar that is drawn on a terminal only, as ours are."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None, **kwargs})  # type: ignore[no-untyped-call]

    directory = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=_WEIGHTS, tqdm_class=Bar))

    def add(patterns: list[str]) -> None:
        # The revision is the commit just fetched: weights of a later one would not belong to this index.
        snapshot_download(repo_id, revision=directory.name, allow_patterns=patterns, tqdm_class=Bar)

    # The configurations are here already; they keep the client from warning that its patterns match nothing.
    add([_SINGLE_FILE, *_ADAPTERS, "config.json", "adapter_config.json"])
    if not (directory / _SINGLE_FILE).exists() and (shards := _shards(directory / f"{_SINGLE_FILE}.index.json")):
        add(shards)
    return directory


def _shards(index: Path) -> list[str]:
    """The files that an index names; none where it is missing or damaged, which whoever opens it will say."""
    try:
        # A pattern is all that these names become here; that they are plain is checked when it is opened.
        return sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


# --- cards --------------------------------------------------------------------------------------------------


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A README.md as its metadata and what stands below them; no metadata where they cannot be read."""
    from huggingface_hub import ModelCard

    if not re.match(r"\s*---\s*\n", text):
        return {}, text
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # whatever YAML's parser raises, and what metadata of a wrong shape lead to
        return {}, text
    return dict(card.data.to_dict()), card.text  # type: ignore[no-untyped-call]


def join_card(metadata: Mapping[str, Any], body: str) -> str:
    """A README.md of metadata and text.

    Args:
        metadata: as `ModelCardData` takes them; None is left out.
        body: Markdown.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(ignore_metadata_errors=True, **metadata)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def base_metadata(repo_id: str, revision: str | None = None) -> dict[str, Any] | None:
    """The metadata of a model's card on the Hub; None if there is no such model that this login may see.

    Raises:
        HubError: the Hub could not be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = f"{repo_id}@{revision}" if revision else repo_id
    with _on_hub(f"cannot ask the Hub about the base {name}", "it is not there"):
        try:
            card = HfApi().model_info(repo_id, revision=revision).card_data
        except GatedRepoError:
            return {}
        except RepositoryNotFoundError:
            return None
    return {} if card is None else dict(card.to_dict())  # type: ignore[no-untyped-call]


# --- uploads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uploaded:
    """What an upload came to.

    Attributes:
        url: where it can be looked at.
        commit: the hash of the commit that holds it.
        changed: whether anything had to be sent.
        pull_request: the reference of the pull request that was opened (`refs/pr/1`), if one was.
        others: files of the repository that are not among the ones pushed, and stay there.
    """

    url: str
    commit: str
    changed: bool
    pull_request: str | None
    others: list[str]


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository, without asking the Hub.

    Raises:
        HubError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "@" in repo_id:
        raise HubError(f"cannot push to {repo_id}: name the branch by --revision")
    if split_id(repo_id) is None:
        raise HubError(f"cannot push to {repo_id}: a repository is written org/name, of letters, digits, -, _ and .")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"cannot push to {repo_id}: that is not a valid repository id; use at most 96 letters, digits, -, _ and ., "
            "no -- or .. in it, and neither - nor . nor .git at an end"
        ) from error


def login(repo_id: str) -> str:
    """The name of the user whose token is used: `HF_TOKEN`, or that of the stored login.

    Args:
        repo_id: what it is needed for.

    Raises:
        HubError: there is no token, or the Hub does not take it.
    """
    from huggingface_hub import HfApi

    with _on_hub(f"cannot push to {repo_id}", "the Hub knows no such user"):
        return str(HfApi().whoami()["name"])


def upload(
    files: Mapping[str, Path | str],
    repo_id: str,
    *,
    private: bool,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Uploaded:
    """Bring files into a model repository in one commit, and compare their checksums with the Hub's.

    What the Hub has already is not sent again, so that a second call finishes what a first one began.

    Args:
        files: by path in the repository: a file to be sent, or a text to be the file.
        repo_id: `org/name`; made if there is no such repository, unless `create_pr`.
        private: whether it is to be private; an existing one must be as this says.
        message: of the commit.
        revision: branch, made from `main` if there is none; `main` by default.
        create_pr: open a pull request instead of changing the branch.
        notice: told what the Hub warns of.

    Raises:
        OptionError: a revision and a pull request are asked for at once.
        HubError: whatever went wrong, in one sentence with what to do.
    """
    from huggingface_hub import HfApi, constants

    if create_pr and revision not in {None, "main"}:
        raise OptionError(f"a pull request is always against main; leave away --create-pr or --revision {revision}")
    api = HfApi()
    task = f"cannot push to {repo_id}"
    absent = (
        "there is no such repository that this login may write to; correct the name, or take a token with the write "
        "role"
    )
    _limit_xet()
    with _on_hub(task, absent, _timeout(_UPLOAD_TIMEOUT)), _quiet(notice):
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if bool(info.private) != private:
            is_now, option = ("private", "--private") if info.private else ("public", "--public")
            raise HubError(f"{task}: it exists and is {is_now}; give {option} if that is meant, or another name")
        before = info.sha if revision is None else _branch_head(repo_id, revision)
        with tempfile.TemporaryDirectory(prefix="nlora_surgery-") as folder:
            _lay_out(files, Path(folder))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                create_pr=create_pr,
                # Nothing that these match is among the files; they are here for whoever changes the choice of files.
                ignore_patterns=[".*", "*/.*", "checkpoint-*", "*/checkpoint-*", *_WEIGHTS[1:-2]],
            )
            found = api.verify_repo_checksums(repo_id, revision=commit.pr_revision or commit.oid, local_dir=folder)
    wrong = [*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths]
    if wrong:
        raise HubError(
            f"{task}: {', '.join(wrong[:3])}{'…' if len(wrong) > 3 else ''} did not arrive as sent; run the same "
            "command again"
        )
    url = f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    return Uploaded(
        url=str(commit.pr_url or url),
        commit=str(commit.oid),
        changed=commit.oid != before,
        pull_request=commit.pr_revision,
        others=[path for path in found.missing_paths if path != ".gitattributes"],
    )


def _branch_head(repo_id: str, revision: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        HfApi().create_branch(repo_id, branch=revision, exist_ok=True)
        return HfApi().model_info(repo_id, revision=revision).sha


def _lay_out(files: Mapping[str, Path | str], folder: Path) -> None:
    """A directory of exactly what goes up: links to the files, and the texts that are only made for it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content.resolve())
        else:
            path.write_text(content, encoding="utf-8")


def _timeout(usual: float) -> float:
    chosen = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
    return float(chosen) if chosen.isdigit() and int(chosen) > 0 else usual


def _limit_xet() -> None:
    """Let silence end an upload by Xet, too, unless the user's own settings say how."""
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{_timeout(_XET_TIMEOUT):g}s")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", str(_XET_ATTEMPTS))


@contextmanager
def _quiet(notice: Callable[[str], None]) -> Iterator[None]:
    """Progress bars on a terminal only; the client's log without addresses that carry signatures, nor the token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    token = get_token()

    def redact(record: logging.LogRecord) -> bool:
        text = re.sub(r"\?\S+", "", record.getMessage())
        record.msg, record.args = text.replace(token, "…") if token else text, ()
        return not text.startswith("No files have been modified")  # ours to say

    handlers = logging.getLogger("huggingface_hub").handlers
    silence = not (sys.stderr.isatty() or are_progress_bars_disabled())
    if silence:
        disable_progress_bars()
    for handler in handlers:
        handler.addFilter(redact)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(redact)
        if silence:
            enable_progress_bars()
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        notice(" ".join(text.split()))


# --- failures -----------------------------------------------------------------------------------------------


@contextmanager
def _on_hub(task: str, absent: str, seconds: float | None = None) -> Iterator[None]:
    """Turn whatever the client raises into one sentence, and limit the requests that have no time limit.

    Args:
        task: what the sentence begins with: what cannot be done.
        absent: what to say of a repository that is not there, or not for this login.
        seconds: the limit; by default the one that huggingface_hub has for downloads.
    """
    from huggingface_hub import constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds
    try:
        with _time_limit(limit):
            yield
    except HubError:
        raise
    except Exception as error:
        # The client lets through whatever its HTTP library, its up- and downloaders and its own reading of the
        # answer raise; of what its threads raise it says in which file first.
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        why, named = _explain(cause, absent, limit)
        raise HubError(f"{task}: {why} ({type(named).__name__})") from error


def _explain(error: BaseException, absent: str, limit: float) -> tuple[str, BaseException]:
    """What an error of the client means for the user, and the error to name with it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no login was found; run `hf auth login`, or set HF_TOKEN", error
    if isinstance(error, errors.GatedRepoError):
        return "its owner gives access on request; ask on its page, then log in with `hf auth login`", error
    if isinstance(error, errors.RepositoryNotFoundError):
        return absent, error
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", error
    if isinstance(error, errors.HFValidationError):
        return "that is not a valid repository id", error
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Raised for whatever kept the client from the Hub, where its cache could not stand in.
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            return _refusal(cause), cause
        state = "offline mode is on" if isinstance(cause, errors.OfflineModeIsEnabled) else "the Hub cannot be reached"
        return f"there is no such local directory, {state}, and the cache does not hold it, or not all of it", error
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error), error
    return _breakage(error, limit), error


def _refusal(error: Any) -> str:
    """What an answer that is an error means for the user."""
    said = " ".join(str(error.server_message or "").split()).rstrip(".")
    return _meaning(error.response.status_code, error.response.headers.get("Retry-After", ""), said)


def _meaning(status: int, wait: str = "", said: str = "") -> str:
    """What a status means for the user, with how long to wait and what the Hub said, where that is known."""
    if status in {401, 403}:
        return f"the Hub refuses access with status {status}; log in with `hf auth login`, or correct HF_TOKEN"
    if status == 429:
        when = f"in {wait} seconds" if wait.isdigit() else "in some minutes"
        return f"the Hub takes no more requests for now (status 429); run the same command again {when}"
    if status in {409, 412}:
        return f"the repository changed meanwhile (status {status}); run the same command again"
    if status == 400 and said:
        return f"the Hub does not take the request (status 400): {said[:200]}"
    return f"the Hub answered with status {status}; try again later"


def _breakage(error: BaseException, limit: float) -> str:
    """What an error that is no answer means for the user."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    kinds = {kind.__name__ for kind in type(error).__mro__}  # of httpx or httpx2, by the client's version
    if "ConnectError" in kinds or "ConnectTimeout" in kinds:
        return "the Hub cannot be reached; check the network, and run the same command again"
    if "TimeoutException" in kinds:
        return (
            f"the Hub has been silent for {limit:g} seconds; check the network and run the same command again, or set "
            "HF_HUB_DOWNLOAD_TIMEOUT to more"
        )
    if status := re.search(r"HTTP status \w+ error \((\d{3})", str(error)):  # so the library for Xet says it
        return _meaning(int(status[1]))
    if isinstance(error, OSError) and error.strerror:  # of the cache: a full disk, a folder that is not ours
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        return f"the Hub does not take the card's metadata: {' '.join(str(error).split()[4:])[:200]}"
    if isinstance(error, ValueError | TypeError | LookupError | AssertionError):
        return "what answers there is not a Hub, or the login cannot be sent; correct HF_ENDPOINT or HF_TOKEN"
    return "the connection broke off; run the same command again to go on with it"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Limit the requests that have no time limit, as huggingface_hub's default client has none.

    Such a request would wait for ever where a network swallows the answer. The limit is on the time without a
    byte. It is set where HTTP clients are made, because huggingface_hub makes a new one after a failed connection.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY

    def limit(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {phase: seconds if own is None else own for phase, own in limits.items()}

    def make_limited() -> Any:
        client = make()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
        return client

    set_client_factory(make_limited)
    try:
        yield
    finally:
        set_client_factory(make)
