"""inspect: what a directory holds, and what a rank would cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import ADAPTER_CONFIG, MANIFEST, Checkpoint
from nlora_surgery.errors import TargetError, UnsupportedCheckpointError
from nlora_surgery.manifest import read_manifest, summarize
from nlora_surgery.targets import choose_targets, describe_targets, module_kind, refuse_quantized

__all__ = ["inspect", "parameter_counts"]


def parameter_counts(shapes: Iterable[tuple[int, int]], r: int) -> dict[str, int]:
    """Trainable parameters at a rank, by kind of training.

    Args:
        shapes: (out, in) of each adapted module.
        r: the rank; smaller modules count with min(out, in).

    Returns:
        `lora`: r (out + in) each; `slora`: r² more each; `inttune`: those r² alone.
    """
    sides = cores = 0
    for out_features, in_features in shapes:
        rank = min(r, out_features, in_features)
        sides += rank * (out_features + in_features)
        cores += rank * rank
    return {"lora": sides, "slora": sides + cores, "inttune": cores}


def inspect(directory: Path, r: int = 64, targets: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a checkpoint, an adapter or a prepared checkpoint, as JSON values.

    Args:
        directory: any of the three.
        r: the rank whose cost is told.
        targets, exclude: of a checkpoint, see `choose_targets`.

    Returns:
        `kind` (`checkpoint`, `adapter` or `prepared`) and what belongs to it. A checkpoint has its
        parameters and bytes, its `targets` (see `describe_targets`), and the `cost` of rank r (see
        `parameter_counts`; `adapter_bytes` in fp32); an adapter its format, ranks, scalings and base; a
        prepared checkpoint its method, its figures and its adapter.

    Raises:
        CheckpointError, AdapterError: the directory is none of them, or damaged.
        TargetError: `targets` or `exclude` name what is not there, or cannot be adapted.
    """
    if (directory / MANIFEST).exists():
        return _prepared(directory)
    if (directory / ADAPTER_CONFIG).exists():
        return _adapter(directory)
    with Checkpoint.open(directory) as checkpoint:
        return _checkpoint(checkpoint, r, targets, exclude)


def _checkpoint(checkpoint: Checkpoint, r: int, patterns: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
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
        return described | {"refused": str(reason)}
    try:
        targets = choose_targets(checkpoint, r, patterns, exclude)
    except TargetError as reason:
        if patterns or exclude:
            raise
        return described | {"refused": str(reason)}
    shapes = [(target.out_features, target.in_features) for target in targets for _ in range(target.experts or 1)]
    cost = parameter_counts(shapes, r)
    return described | {
        "rank": r,
        "targets": describe_targets(checkpoint, targets),
        "cost": cost | {"adapter_bytes": 4 * cost["slora"], "virtual_adapter_bytes": 8 * cost["slora"]},
    }


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
