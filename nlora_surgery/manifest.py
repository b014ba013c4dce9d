"""The manifest, `nlora_surgery.json`: what was done to make a directory, with the figures of every module."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlora_surgery.checkpoint import MANIFEST, Checkpoint, read_json
from nlora_surgery.errors import CheckpointError
from nlora_surgery.staging import run_id
from nlora_surgery.targets import module_kind
from nlora_surgery.version import VERSION

__all__ = ["has_init_manifest", "identify", "read_manifest", "summarize", "write_manifest"]


def identify(command: str, source: Checkpoint, source_name: str, **decisive: Any) -> dict[str, Any]:
    """The identity of a run, for `rewrite.Plan`: everything that decides the bytes that it writes.

    Args:
        command: its name.
        source: what is rewritten.
        source_name: how the user named it.
        decisive: whatever else the bytes depend on, as JSON values.
    """
    head = {"command": command, "version": VERSION, "source": source.fingerprint(), "source_name": source_name}
    return head | decisive


def write_manifest(tree: Path, identity: Mapping[str, Any], **figures: Any) -> None:
    """Write the manifest into a staged directory.

    Args:
        tree: the directory.
        identity: of the run, from `identify`.
        figures: what the operation says about it, as JSON values.
    """
    head = {
        "format": 1,
        "tool": {"name": "nlora_surgery", "version": identity["version"]},
        "command": identity["command"],
        "run": run_id(identity),
        "source": {"name": identity["source_name"], "fingerprint": identity["source"]},
    }
    (tree / MANIFEST).write_text(json.dumps(head | figures, indent=1) + "\n", encoding="utf-8")


def has_init_manifest(directory: Path) -> bool:
    """Whether a directory holds a manifest that is not one of another command, as merge and convert write them."""
    path = directory / MANIFEST
    if not os.path.exists(path):  # noqa: PTH110  (Path.exists raises if the name is too long)
        return False
    return read_json(path).get("command") not in {"convert", "extract", "merge"}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an output of `init`.

    Raises:
        CheckpointError: there is none, or it is not one of `init`.
    """
    path = directory / MANIFEST
    if not os.path.exists(path):  # noqa: PTH110  (Path.exists raises if the name is too long)
        raise CheckpointError(f"{directory} is not an output of init: it has no {MANIFEST}")
    manifest = read_json(path)
    try:
        folder = manifest["adapter"]["folder"]
        whole = manifest["command"] == "init" and manifest["options"]["residual"] and manifest["modules"]
    except (KeyError, TypeError):
        whole, folder = False, ""
    if not whole or not isinstance(folder, str) or Path(folder).name != folder:
        raise CheckpointError(f"{path} is not a manifest of init; make the directory again")
    return manifest


def summarize(manifest: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The manifest in a table and in words.

    Args:
        manifest: as `prepare` returns it.

    Returns:
        One row per module kind (`kind`, `count`, `r`, and means of `energy`, `delta_ratio`, `drift`), and the
        warnings that a user should read.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for module in manifest["modules"]:
        groups.setdefault(module_kind(module["module"]), []).append(module)
    rows = []
    for kind, modules in groups.items():
        row: dict[str, Any] = {"kind": kind, "count": len(modules), "r": max(module["r"] for module in modules)}
        for figure in ("energy", "delta_ratio", "drift"):
            values = [module[figure] for module in modules if module[figure] is not None]
            row[figure] = statistics.fmean(values) if values else None
        rows.append(row)

    modules, options = manifest["modules"], manifest["options"]
    warnings = []
    ratios = [module["delta_ratio"] for module in modules if module["delta_ratio"] is not None]
    mean_ratio = statistics.fmean(ratios) if ratios else 0.0
    conditions = [math.inf if module.get("singular") else module["condition"] or 0.0 for module in modules]
    if options["method"] == "nystrom-pinv" and conditions:
        warnings.append(
            "the cores that nystrom-pinv inverts are ill-conditioned (median condition "
            f"{statistics.median(conditions):.1e}, worst {max(conditions):.1e}): singular values below "
            f"{options['pinv_rtol']:g} of the largest were dropped; nystrom-optimal is the stable choice"
        )
    if options["residual"] == "none" and mean_ratio:
        warnings.append(
            "nothing is subtracted (--residual none): the model starts as weight + delta, with ‖delta‖/‖weight‖ = "
            f"{mean_ratio:.3g} on average; use --residual baked or virtual to start from the model itself"
        )
    elif options["residual"] == "baked" and mean_ratio > 1:
        drifts = [module["drift"] for module in modules if module["drift"] is not None]
        warnings.append(
            f"the start is larger than the weights (‖delta‖/‖weight‖ = {mean_ratio:.3g} on average), so the stored "
            f"residual is too and rounding it costs more: drift {statistics.fmean(drifts):.1e}; nystrom-optimal "
            "and sketch keep it small, --residual virtual makes it zero. Factors this large also want a learning rate "
            "below the paper's 2e-4: train --lr auto finds one"
        )
    clamped = [module["module"] for module in modules if module["r"] < options["rank"]]
    if clamped:
        warnings.append(
            f"{len(clamped)} modules are smaller than rank {options['rank']} and got min(out, in) instead, as "
            f"rank_pattern records: {clamped[0]}{', …' if len(clamped) > 1 else ''}"
        )
    if manifest["skipped"]:
        warnings.append(f"left alone because not finite: {', '.join(manifest['skipped'])}")
    if manifest["left_out"]:
        warnings.append(f"not carried over, since they hold other weights: {', '.join(manifest['left_out'])}")
    return rows, warnings
