"""Models from the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nlora_surgery.errors import CheckpointError, HubError

__all__ = ["fetch"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@(?P<revision>[\w./-]+))?")
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx",
            "*.ot", "*.npz", "*.pkl", "onnx/*", "original/*"]  # fmt: skip
_SINGLE_FILE = "model.safetensors"
_ADAPTERS = ["adapter_model.safetensors", "adapter/adapter_model.safetensors"]  # the second: in an output of init


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
    match = _REPO_ID.fullmatch(name)
    if exists or match is None or ".." in name:
        found = "it is a file" if exists else "no such directory, and a Hub id is written org/name"
        raise CheckpointError(f"no model at {name}: {found}")
    repo_id, revision = name.partition("@")[0], match["revision"]
    return _on_hub(name, lambda: _snapshot(repo_id, revision))


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


def _on_hub(name: str, call: Callable[[], Path]) -> Path:
    from huggingface_hub import errors

    def failed(why: str, error: Exception) -> HubError:
        return HubError(f"cannot fetch {name}: {why} ({type(error).__name__})")

    try:
        with _time_limit():
            return call()
    except errors.GatedRepoError as error:
        raise failed(
            "its owner gives access on request; ask on its page, then log in with `hf auth login`", error
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise failed(
            "there is no such local directory, and no such repository on the Hub that this login may see", error
        ) from error
    except errors.RevisionNotFoundError as error:
        raise failed("the repository has no such revision", error) from error
    except errors.HFValidationError as error:
        raise failed("that is not a valid repository id", error) from error
    except errors.LocalEntryNotFoundError as error:
        # Raised for whatever kept the client from the Hub, where its cache could not stand in.
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise failed(_refusal(cause), cause) from error
        state = "offline mode is on" if isinstance(cause, errors.OfflineModeIsEnabled) else "the Hub cannot be reached"
        raise failed(
            f"there is no such local directory, {state}, and the cache does not hold it, or not all of it", error
        ) from error
    except errors.HfHubHTTPError as error:
        raise failed(_refusal(error), error) from error
    except Exception as error:
        # The client lets through whatever its HTTP library, its downloaders and its own reading of the answer raise.
        raise failed(_breakage(error), error) from error


def _refusal(error: Any) -> str:
    """What an answer that is an error means for the user."""
    status = error.response.status_code
    if status in {401, 403}:
        return f"the Hub refuses access with status {status}; log in with `hf auth login`, or correct HF_TOKEN"
    return f"the Hub answered with status {status}; try again later"


def _breakage(error: Exception) -> str:
    """What an error that is no answer means for the user."""
    if isinstance(error, OSError) and error.strerror:  # of the cache: a full disk, a folder that is not ours
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError | TypeError | LookupError | AssertionError):
        return "what answers there is not a Hub, or the login cannot be sent; correct HF_ENDPOINT or HF_TOKEN"
    return "the download broke off; run the same command again to go on with it"


@contextmanager
def _time_limit() -> Iterator[None]:
    """Limit the requests that have no time limit, as huggingface_hub's for the list of files have none.

    Such a request would wait for ever where a network swallows the answer. The limit is the one that
    huggingface_hub has for the others: ten seconds without a byte, or `HF_HUB_DOWNLOAD_TIMEOUT`.
    """
    from huggingface_hub import constants, get_session

    def limit(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {
            phase: constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds
            for phase, seconds in limits.items()
        }

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
    try:
        yield
    finally:
        session.event_hooks = hooks
