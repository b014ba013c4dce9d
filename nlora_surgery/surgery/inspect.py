"""inspect: what a directory holds, and what a rank would cost and capture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import ADAPTER_CONFIG, Checkpoint
from nlora_surgery.errors import BaseMismatchError, TargetError, UnsupportedCheckpointError
from nlora_surgery.manifest import has_init_manifest, read_manifest, summarize
from nlora_surgery.rewrite import Progress
from nlora_surgery.spectra import SpectraOptions, Weights, measure_spectra, original_weights, rank_costs
from nlora_surgery.targets import Target, choose_targets, describe_targets, module_kind, refuse_quantized

__all__ = ["inspect"]


def inspect(
    directory: Path,
    r: int = 64,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    spectra: SpectraOptions | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint, an adapter or a prepared checkpoint, as JSON values.

    Args:
        directory: any of the three.
        r: the rank whose cost is told.
        targets, exclude: of a checkpoint, see `choose_targets`.
        spectra: also measure what ranks would capture, in some layers; None reads headers only.
        device: where spectra are computed.
        progress: listens to that.

    Returns:
        `kind` (`checkpoint`, `adapter` or `prepared`) and what belongs to it. A checkpoint has its
        parameters and bytes, its `targets` (see `describe_targets`), and the `cost` of rank r (see
        `rank_costs`); an adapter its format, ranks, scalings and base; a prepared checkpoint its method, its
        figures and its adapter. `spectra` as `Spectra.summary` gives it, of the original weights; for a
        prepared checkpoint whose original weights are not here, `no_spectra` says so.

    Raises:
        CheckpointError, AdapterError: the directory is none of them, or damaged.
        TargetError: `targets` or `exclude` name what is not there, or cannot be adapted.
        OptionError: see `measure_spectra`.
    """
    if has_init_manifest(directory):
        described = _prepared(directory)
        if spectra is not None:
            try:
                weights = original_weights(directory, read_manifest(directory))
            except BaseMismatchError as reason:
                return described | {"no_spectra": str(reason)}
            described["spectra"] = measure_spectra(weights, spectra, device=device, progress=progress).summary()
        return described
    if (directory / ADAPTER_CONFIG).exists():
        return _adapter(directory)
    with Checkpoint.open(directory) as checkpoint:
        described, chosen = _checkpoint(checkpoint, r, targets, exclude)
        if spectra is not None and chosen:
            weights = Weights(checkpoint, chosen)
            described["spectra"] = measure_spectra(weights, spectra, device=device, progress=progress).summary()
        return described


def _checkpoint(
    checkpoint: Checkpoint, r: int, patterns: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, Any], list[Target]]:
    """The description, and the targets; none where it says `refused`."""
    dtypes: dict[str, int] = {}
    parameters = 0
    for info in checkpoint:
        count = math.prod(info.shape)
        parameters += count
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + count
    described: dict[str, Any] = {
        "kind": "checkpoint",
        "model_type": checkpoint.config.get("model_type"),
        "files": {name: layout.size_bytes for name, layout in checkpoint.files.items()},
        "tensors": len(checkpoint.tensors),
        "parameters": parameters,
        "dtypes": dtypes,
        "fingerprint": checkpoint.fingerprint(),
        "not_loaded": checkpoint.other_files()[1],
    }
    try:
        refuse_quantized(checkpoint)
    except UnsupportedCheckpointError as reason:
        return described | {"refused": str(reason)}, []
    try:
        targets = choose_targets(checkpoint, r, patterns, exclude)
    except TargetError as reason:
        if patterns or exclude:
            raise
        return described | {"refused": str(reason)}, []
    return described | {
        "rank": r,
        "targets": describe_targets(checkpoint, targets),
        "cost": rank_costs(targets, r),
    }, targets


def _adapter(directory: Path) -> dict[str, Any]:
    adapter = Adapter.open(directory)
    modules = [adapter.shape(module) for module in adapter.parts]
    counts: dict[tuple[str, int, int, tuple[int, ...] | None, int, float], int] = {}
    for module in modules:
        key = (
            module_kind(module.module),
            module.out_features,
            module.in_features,
            module.kernel,
            module.r,
            adapter.scaling(module.module),
        )
        counts[key] = counts.get(key, 0) + 1
    stored = {adapter.file.tensors[name].dtype for parts in adapter.parts.values() for name in parts.values()}
    return {
        "kind": "adapter",
        "format": adapter.config.peft_type,
        "matrices": 3 if adapter.three_matrix else 2,
        "residual": adapter.config.residual,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.lora_alpha,
        "use_rslora": adapter.config.use_rslora,
        "base": adapter.config.base_model_name_or_path,
        "base_fingerprint": adapter.base_fingerprint,
        "dtypes": sorted(stored),
        "parameters": sum(
            math.prod(size) for module in modules for size in module.parts(three_matrix=adapter.three_matrix).values()
        ),
        "modules": [
            {
                "kind": kind,
                "in_features": n,
                "out_features": m,
                "kernel": None if kernel is None else list(kernel),
                "r": r,
                "scaling": scaling,
                "count": count,
            }
            for (kind, m, n, kernel, r, scaling), count in counts.items()
        ],
    }


def _prepared(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    rows, warnings = summarize(manifest)
    return {
        "kind": "prepared",
        "options": manifest["options"],
        "source": manifest["source"],
        "base_fingerprint": manifest["base_fingerprint"],
        "figures": rows,
        "warnings": warnings,
        "adapter": _adapter(directory / manifest["adapter"]["folder"]),
    }
