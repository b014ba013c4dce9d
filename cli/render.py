"""What commands print: tables and JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import click

__all__ = [
    "ProgressBar",
    "bytes_text",
    "count_text",
    "echo_json",
    "echo_table",
    "echo_targets",
    "figure",
    "figures_table",
    "first_rank",
    "inputs_text",
    "quiet_transformers",
    "warn",
]


def first_rank() -> bool:
    """Whether this process is the one that reports (alone, or rank 0 under torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def bytes_text(count: float) -> str:
    """`2.2 GB`, in powers of ten, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def count_text(count: float) -> str:
    """`50.5 M`."""
    for unit in ("", " k", " M"):
        if count < 999.5:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} G"


def echo_json(value: Any) -> None:
    """A JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def echo_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


def figure(value: float | None, form: str) -> str:
    """A number, or a dash for what was not measured."""
    return "-" if value is None else format(value, form)


def figures_table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of `manifest.summarize`'s table."""
    header = ("module", "count", "r", "energy", "‖delta‖/‖weight‖", "drift")
    return header, [
        (
            row["kind"],
            str(row["count"]),
            str(row["r"]),
            figure(row["energy"], ".1%"),
            figure(row["delta_ratio"], ".3f"),
            figure(row["drift"], ".1e"),
        )
        for row in rows
    ]


def inputs_text(group: Mapping[str, Any]) -> str:
    """`576`; of a convolution channels and kernel, `3·14·14`."""
    kernel = group["kernel"] or []
    return "·".join(map(str, [group["in_features"] // math.prod(kernel), *kernel]))


def echo_targets(groups: Sequence[Mapping[str, Any]], adapter: str) -> None:
    """A tree of `targets.describe_targets` on stdout.

    Args:
        groups: what it gave.
        adapter: which of their counts is told as the adapter's, `slora_parameters` or `lora_parameters`.
    """
    most = max((group["r"] for group in groups), default=0)
    rows = []
    for label, group in _tree([(str(group["path"]).split("."), group) for group in groups]):
        if group is None:
            rows.append((label, "", "", "", "", ""))
            continue
        experts = f" × {group['experts']} experts" if group["experts"] is not None else ""
        rows.append(
            (
                label,
                f"{inputs_text(group)}→{group['out_features']}",
                f"×{group['count']}{experts}",
                count_text(group["parameters"]),
                bytes_text(group["size_bytes"]),
                count_text(group[adapter]) + (f" (r = {group['r']})" if group["r"] < most else ""),
            )
        )
    echo_table(("module", "in→out", "count", "parameters", "bytes", f"adapter at r = {most}"), rows)


def _tree(
    items: Sequence[tuple[Sequence[str], Mapping[str, Any]]], depth: int = 0
) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Lines of a tree: paths that begin alike under their common beginning, each level indented by two."""
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    branches: dict[str, list[tuple[Sequence[str], Mapping[str, Any]]]] = {}
    for path, value in items:
        branches.setdefault(path[0], []).append((path, value))
    for branch in branches.values():
        alike = (len(set(parts)) == 1 for parts in zip(*(path for path, _ in branch), strict=False))
        length = sum(1 for _ in itertools.takewhile(bool, alike))
        label = "  " * depth + ".".join(branch[0][0][:length])
        if len(branch) == 1:
            lines.append(("  " * depth + ".".join(branch[0][0]), branch[0][1]))
        elif any(len(path) == length for path, _ in branch):  # one path, several shapes
            lines += [("  " * depth + ".".join(path), value) for path, value in branch]
        else:
            lines.append((label, None))
            lines += _tree([(path[length:], value) for path, value in branch], depth + 1)
    return lines


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and notices out of our stderr; its errors still come."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def warn(text: str) -> None:
    """A warning on stderr."""
    click.echo(f"warning: {text}", err=True)


class ProgressBar:
    """Bytes, rate and time left on stderr, where that is a terminal; the engine's `Progress`."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None
        self._lock = threading.Lock()

    def start(self, total_bytes: int) -> None:
        """Show the bar, if stderr is a terminal."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        if not (console.is_terminal and first_rank()):
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(self._what, total=total_bytes)
        self._bar.start()

    def advance(self, count: int) -> None:
        """Move it by so many bytes."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(self._task, advance=count)

    def notice(self, text: str) -> None:
        """A line on stderr."""
        if first_rank():
            click.echo(text, err=True)

    def stop(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
