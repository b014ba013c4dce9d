"""Models from the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlora_surgery.errors import CheckpointError, HubError

__all__ = ["fetch"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@(?P<revision>[\w./-]+))?")
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot",
            "onnx/*", "original/*"]  # fmt: skip


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
    path = Path(name)
    if path.is_dir():
        return path
    match = _REPO_ID.fullmatch(name)
    if path.exists() or match is None or ".." in name:
        found = "it is a file" if path.exists() else "no such directory, and a Hub id is written org/name"
        raise CheckpointError(f"no model at {name}: {found}")
    repo_id, revision = name.partition("@")[0], match["revision"]
    return _on_hub(name, lambda: _snapshot(repo_id, revision))


def _snapshot(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=_WEIGHTS))
    index = directory / "model.safetensors.index.json"
    wanted = ["model.safetensors", "adapter_model.safetensors"]
    if index.exists():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError):
            shards = ()  # opening it says what is wrong
        # A pattern is all that these names become here; that they are plain is checked when it is opened.
        wanted += sorted({str(shard) for shard in shards})
    # The revision is the commit just fetched: weights of a later one would not belong to this index.
    return Path(snapshot_download(repo_id, revision=directory.name, allow_patterns=wanted))


def _on_hub(name: str, call: Callable[[], Path]) -> Path:
    from huggingface_hub import errors

    def failed(why: str, error: Exception) -> HubError:
        return HubError(f"cannot fetch {name}: {why} ({type(error).__name__})")

    try:
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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise failed(
            "there is no such local directory, the Hub cannot be reached (or offline mode is on), and the cache "
            "does not hold it",
            error,
        ) from error
    except errors.HFValidationError as error:
        raise failed("that is not a valid repository id", error) from error
    except errors.HfHubHTTPError as error:
        raise failed(f"the Hub answered {_status(error)}; try again later", error) from error
    except (errors.IncompleteSnapshotError, OSError, RuntimeError, ValueError) as error:
        raise failed("the download broke off; run the same command again to go on with it", error) from error


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"with status {response.status_code}" if response is not None else "with an error"
