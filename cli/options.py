"""The options that commands share, and how option values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

__all__ = [
    "WritingCommand",
    "beside",
    "byte_count",
    "locate_adapter",
    "locate_base_and_adapter",
    "rate_or_auto",
    "split_names",
]


class WritingCommand(click.Command):
    """A command that makes a directory, with the options that all of these share.

    They are `out`, unless the command has one of its own; `device`, unless it says that it uses none; `max_memory`,
    `dry_run`, `overwrite` and `as_json`.
    """

    def __init__(
        self, name: str, *, params: Sequence[click.Parameter], uses_device: bool = True, **settings: Any
    ) -> None:
        own = {parameter.name for parameter in params}
        out = click.Option(["--out", "-o"], type=click.Path(path_type=Path), required=True, help="Directory to make.")
        device = click.Option(
            ["--device"], default="auto", show_default=True, help="auto, cpu, cuda (all GPUs), cuda:N or mps."
        )
        memory = click.Option(
            ["--max-memory"], callback=byte_count, help="Bound on buffers, e.g. 500MB; fewer threads keep it."
        )
        shared = [
            *([] if "out" in own else [out]),
            *params,
            *([device] if uses_device else []),
            memory,
            click.Option(["--dry-run"], is_flag=True, help="Say what would be done; write nothing."),
            click.Option(["--overwrite"], is_flag=True, help="Replace an earlier output."),
            click.Option(["--json", "as_json"], is_flag=True, help="Print the manifest as JSON."),
        ]
        super().__init__(name, params=shared, **settings)


def beside(name: str, directory: Path, ending: str) -> Path:
    """Where an output goes without -o: beside a local model, here for one from the Hub.

    Args:
        name: as the user gave it.
        directory: where that is.
        ending: of the output's name.
    """
    path = Path(name)
    if path.is_dir():
        stem = path.name if path.name not in {"", "."} else directory.resolve().name
        parent = path.parent if path.name not in {"", "..", "."} else directory.resolve().parent
    else:
        stem, parent = name.partition("@")[0].rpartition("/")[2], Path()
    return parent / f"{stem}{ending}"


def locate_adapter(name: str) -> Path:
    """The directory of an adapter, fetched if it is on the Hub, or in an output of init; or a Kohya file."""
    from nlora_surgery.checkpoint import ADAPTER_CONFIG
    from nlora_surgery.hub import fetch

    if name.endswith(".safetensors") and Path(name).is_file():
        return Path(name)
    directory = fetch(name)
    inside = (directory / "adapter" / ADAPTER_CONFIG).exists() and not (directory / ADAPTER_CONFIG).exists()
    return directory / "adapter" if inside else directory


def split_names(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """`--targets q_proj,v_proj` and `--targets q_proj --targets v_proj` are the same; a regex keeps its commas."""
    plain = (value.split(",") if "(" not in value and "{" not in value else [value] for value in values)
    return tuple(part.strip() for parts in plain for part in parts if part.strip())


def byte_count(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """`500MB`, `2GB` or a number of bytes."""
    if value is None:
        return None
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1}
    text = value.strip().lower()
    unit = next((name for name in units if text.endswith(name)), "")
    try:
        count = float(text.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no size; write 500MB, 2GB or a number of bytes") from None
    if not 0 < count < 1e18:
        raise click.BadParameter(f"{value!r} is no possible size")
    return int(count)


def rate_or_auto(_: click.Context, __: click.Parameter, value: str | None) -> float | str | None:
    """A learning rate, or the word `auto`."""
    if value is None or value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


def locate_base_and_adapter(model: str, adapter: str | None) -> tuple[Path, Path | None]:
    """The directories of a base and of the adapter on it, fetched if they are on the Hub.

    Args:
        model: an output of init, a run of train, an adapter, or a plain model.
        adapter: an adapter of `model`, where it is not the one that `model` holds.

    Raises:
        AdapterError: the adapter does not say what its base is.
    """
    from nlora_surgery.adapter import AdapterConfig
    from nlora_surgery.checkpoint import ADAPTER_CONFIG
    from nlora_surgery.errors import AdapterError
    from nlora_surgery.hub import fetch

    directory = fetch(model)
    if adapter is not None:
        return directory, locate_adapter(adapter)
    found: Path | None = next(
        (path for path in (directory, directory / "adapter") if (path / ADAPTER_CONFIG).exists()), None
    )
    if found is None or (directory / "config.json").exists():
        return directory, found
    config = AdapterConfig.read(found)
    base, revision = config.base_model_name_or_path, config.extra.get("revision")
    if not base:
        raise AdapterError(f"{found} does not name its base model; give the base as MODEL and this by --adapter")
    return fetch(f"{base}@{revision}" if revision and not Path(base).exists() else base), found
