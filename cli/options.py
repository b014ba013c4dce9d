"""How option values are read."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["byte_count", "locate_adapter", "split_names"]


def locate_adapter(name: str) -> Path:
    """The directory of an adapter, fetched if it is on the Hub; or a Kohya file."""
    from nlora_surgery.hub import fetch

    return Path(name) if name.endswith(".safetensors") and Path(name).is_file() else fetch(name)


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
