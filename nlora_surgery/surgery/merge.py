"""merge: adapters into their base, streamed; one sum in fp32 (fp64), one rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlora_surgery.adapter import Adapter, check_base
from nlora_surgery.adapter_keys import parse_key
from nlora_surgery.checkpoint import ADAPTER_CONFIG, INDEX_FILE, MANIFEST, Checkpoint, TensorInfo, read_json
from nlora_surgery.devices import compute_dtype, resolve_devices
from nlora_surgery.errors import AdapterError, NonFiniteError, OptionError
from nlora_surgery.factor import adding_product, delta_norm, is_finite, row_tiles
from nlora_surgery.manifest import identify, write_manifest
from nlora_surgery.rewrite import Edit, Plan, Progress, rewrite
from nlora_surgery.targets import (
    ExpertPiece,
    expert_pieces,
    experts_lie_in_out,
    is_conv1d,
    refuse_quantized,
    tensor_aliases,
)

__all__ = ["MergePlan", "merge", "plan_merge"]

_HEAD = "lm_head"
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"}


@dataclass(frozen=True)
class _Share:
    """What one adapter does to one tensor: of fused experts on a base that keeps each by itself, one piece's share."""

    adapter: Adapter
    module: str
    weight: float
    piece: ExpertPiece | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        own = self.adapter.shape(self.module)
        return own.out_features // (self.piece.parts if self.piece else 1), own.in_features

    def sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The product's sides, see `Adapter.sides`."""
        if self.piece is None:
            return self.adapter.sides(self.module, dtype, self.weight)
        left, right = self.adapter.sides(self.module, dtype, self.weight, self.piece.expert)
        return left.tensor_split(self.piece.parts)[self.piece.part], right


@dataclass
class _Change:
    """All that happens to one tensor of the base."""

    shares: list[_Share] = field(default_factory=list)
    biases: list[_Share] = field(default_factory=list)
    replacement: tuple[Adapter, str] | None = None


@dataclass(frozen=True)
class MergePlan:
    """What `merge` will do, decided before it touches anything.

    Attributes:
        base: the opened base.
        out: the directory to be made.
        adapters: each with its weight.
        changes: by the name of the tensor.
        engine: the engine's plan.
    """

    base: Checkpoint
    out: Path
    adapters: Sequence[tuple[Adapter, float]]
    changes: dict[str, _Change]
    engine: Plan


def plan_merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    untie: bool = False,
    base_name: str | None = None,
    device: str = "auto",
) -> MergePlan:
    """Open everything, match every key of every adapter with a tensor, lay out every file.

    Args:
        base: directory of the base that the adapters belong to.
        adapters: their directories, and what each product is multiplied by.
        out: directory to be made.
        untie: give a tied head a tensor of its own where only one of head and embedding changes.
        base_name: how the user named the base; the path by default.
        device: see `resolve_devices`.

    Raises:
        AdapterError, BaseMismatchError: an adapter is damaged, belongs to another base, matches nothing, has
            other shapes, or cannot be combined with another.
        CheckpointError, UnsupportedCheckpointError: the base is damaged or quantized.
        OptionError: a weight is not finite.
    """
    device_kind = resolve_devices(device)[0].type
    source = Checkpoint.open(base)
    refuse_quantized(source, "merged into")
    opened = [(Adapter.open(path), weight) for path, weight in adapters]
    changes: dict[str, _Change] = {}
    appended: dict[str, str] = {}
    for adapter, weight in opened:
        if not math.isfinite(weight):
            raise OptionError(f"--weight must be finite, not {weight}")
        check_base(adapter, source)
        _collect(source, adapter, weight, changes, appended, untie=untie)
    for name, change in changes.items():
        _check_change(source, name, change, several=len(opened) > 1)

    ordered = [name for name in [*source.tensors, *appended] if name in changes]
    carried, _ = source.other_files()
    engine = Plan(
        source=source,
        out=out,
        edits=ordered,
        identity=identify(
            "merge",
            source,
            base_name or str(base),
            adapters=[[adapter.file.fingerprint(), adapter.config.to_json(), weight] for adapter, weight in opened],
            untie=untie,
            device=device_kind,
        ),
        carried=carried,
        worker_bytes=max(_edit_bytes(source, changes[name]) for name in ordered),
        appended=appended,
        inputs=[base, *(path for path, _ in adapters if path.is_dir())],
        mend_source=f"repair it in {base}: nothing can be added to it",
        mend_result="the sum is beyond the base's dtype: store the base in a wider one, or lower --weight",
    )
    return MergePlan(source, out, opened, changes, engine)


def merge(
    plan: MergePlan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the merged model.

    Args:
        plan: from `plan_merge`, with the same `device`.
        device, overwrite, max_memory, progress: see `rewrite`.

    Returns:
        The manifest: `changed` lists each changed tensor with ‖change‖/‖weight‖.

    Raises:
        OutputError, StageError, NonFiniteError: see `rewrite`.
    """
    rewrite(
        plan.engine,
        partial(_edit, plan),
        partial(_finish, plan),
        device=device,
        overwrite=overwrite,
        max_memory=max_memory,
        progress=progress,
    )
    return read_json(plan.out / MANIFEST)


# --- which tensor changes how ---------------------------------------------------------------------------


def _collect(
    source: Checkpoint,
    adapter: Adapter,
    weight: float,
    changes: dict[str, _Change],
    appended: dict[str, str],
    *,
    untie: bool,
) -> None:
    """Add what one adapter does to `changes`; give a tied head its own tensor if that is asked for."""
    tied = _tied_embedding(source)
    touched = {name.removesuffix(".weight").rpartition(".")[2] for name in [*adapter.parts, *adapter.replaced]}
    if tied is not None and touched & {_HEAD, tied.removesuffix(".weight").rpartition(".")[2]}:
        if not untie:
            raise AdapterError(
                f"{adapter.directory} changes the head or the embedding, which are one tensor in {source.directory} "
                f"({tied}, tie_word_embeddings): a merge would change both; --untie gives the head its own"
            )
        appended[f"{_HEAD}.weight"] = tied
        changes.setdefault(f"{_HEAD}.weight", _Change())  # without a share it is a copy
    pieces = _pieces(source, adapter)
    resolved = adapter.resolve(source, appended, tensor_aliases(source), but=pieces)
    for module in adapter.parts:
        for piece in pieces.get(module, ()):
            changes.setdefault(piece.tensor, _Change()).shares.append(_Share(adapter, module, weight, piece))
        if module in pieces:
            continue
        share = _Share(adapter, module, weight)
        changes.setdefault(resolved[module], _Change()).shares.append(share)
        if "lora_bias" in adapter.parts[module]:
            bias = resolved[module].removesuffix("weight") + "bias"
            if bias not in source.tensors:
                raise AdapterError(f"{adapter.directory} trains a bias of {module}, but the base has no {bias}")
            changes.setdefault(bias, _Change()).biases.append(share)
    for wanted, name in adapter.replaced.items():
        if _is_own_copy(source, adapter, resolved[wanted], name):
            continue
        change = changes.setdefault(resolved[wanted], _Change())
        if change.replacement is not None:
            raise AdapterError(f"two adapters replace {resolved[wanted]} (modules_to_save); merge one of them")
        if weight != 1:
            raise OptionError(f"--weight {weight:g} has no meaning for {wanted}, which {adapter.directory} replaces")
        change.replacement = (adapter, name)


def _pieces(source: Checkpoint, adapter: Adapter) -> dict[str, list[ExpertPiece]]:
    """By module, the tensors of fused experts whose base keeps every expert by itself."""
    found: dict[str, list[ExpertPiece]] = {}
    for module in adapter.parts:
        own = adapter.shape(module)
        pieces = expert_pieces(source, module) if own.experts is not None and module not in source.tensors else []
        if not pieces:
            continue
        parts, count = pieces[0].parts, 1 + max(piece.expert for piece in pieces)
        if count != own.experts or own.out_features % parts:
            raise AdapterError(
                f"{adapter.directory}: {module} has {own.experts} experts of rank {own.r} and {own.out_features} "
                f"outputs by its tensors and {ADAPTER_CONFIG}, but the base has {count} experts, of which "
                f"{pieces[0].tensor} is one"
            )
        if own.out_features == own.in_features and experts_lie_in_out(source) is not False:
            raise _unknown_order(source, module)
        found[module] = pieces
    return found


def _unknown_order(source: Checkpoint, module: str) -> AdapterError:
    return AdapterError(
        f"{module} is square, and the orientation of its experts in model_type {source.config.get('model_type')!r} is "
        "not known; it will not be guessed"
    )


def _is_own_copy(source: Checkpoint, adapter: Adapter, tensor: str, name: str) -> bool:
    """Whether a tensor is a copy of the base's own, which PEFT saves beside the factors of an embedding."""
    key, info = parse_key(name), source.tensors.get(tensor)
    if key is None or not key.depth or info is None:
        return False
    theirs = adapter.file.tensors[name]
    if (theirs.dtype, theirs.shape) != (info.dtype, info.shape):
        return False
    return torch.equal(source.tensor(tensor), adapter.file.tensor(name))


def _tied_embedding(source: Checkpoint) -> str | None:
    """The embedding that is the head too, if there is one."""
    heads = [name for name in source.tensors if name.removesuffix(".weight").rpartition(".")[2] == _HEAD]
    configs = (source.config, source.config.get("text_config") or {})
    # transformers ties unless the configuration says otherwise, but only a missing head proves it.
    if heads or any(config.get("tie_word_embeddings") is False for config in configs if isinstance(config, dict)):
        return None
    found = [name for name in source.tensors if name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def _check_change(source: Checkpoint, name: str, change: _Change, *, several: bool) -> None:
    """Refuse shapes that disagree, and combinations that mean nothing."""
    base = source.tensors.get(name)
    shape = base.shape if base is not None else None
    if base is not None and base.torch_dtype is None:
        raise AdapterError(f"{name} is stored as {base.dtype}, which nothing can be added to")
    for share in change.shares:
        adapter, module = share.adapter, share.module
        own = adapter.shape(module)
        found: tuple[int, ...] = share.shape
        if own.kernel is not None:
            found = (own.out_features, own.in_features // math.prod(own.kernel), *own.kernel)
        elif shape is not None and len(shape) == 3:
            if found in {shape[1:], shape[:0:-1]}:
                if (own.experts or 1) != shape[0]:
                    raise AdapterError(
                        f"{adapter.directory}: {module} has {own.experts or 1} experts of rank {own.r} by its tensors "
                        f"and {ADAPTER_CONFIG}, but {name} of the base has {shape[0]}"
                    )
                _experts_transposed(source, share, shape)
                continue
        elif _is_transposed(source, name, share):
            found = found[::-1]
        if shape is not None and found != shape:
            raise AdapterError(
                f"{adapter.directory}: {module} changes a weight of shape {list(found)}, but {name} of the base has "
                f"{list(shape)}"
            )
        if own.experts is not None and share.piece is None:
            raise AdapterError(f"{adapter.directory}: {module} has {own.experts} experts, but {name} is one matrix")
        if "magnitude" in adapter.parts[module]:
            if several or adapter.is_embedding(module) or (shape is not None and len(shape) == 3 and not own.kernel):
                raise AdapterError(
                    f"{adapter.directory}: {module} has a DoRA magnitude, which can be merged alone, into a linear "
                    "weight; merge this adapter first, by itself"
                )
            if share.weight != 1:
                raise OptionError(
                    f"--weight {share.weight:g} has no meaning for {module}: DoRA sets a length, it adds none"
                )
            size = math.prod(adapter.file.tensors[adapter.parts[module]["magnitude"]].shape)
            if size != own.out_features:
                raise AdapterError(
                    f"{adapter.directory}: the magnitude of {module} has {size} values, expected {own.out_features}"
                )
    for share in change.biases:
        theirs = share.adapter.file.tensors[share.adapter.parts[share.module]["lora_bias"]]
        if theirs.shape != shape:
            raise AdapterError(
                f"{share.adapter.directory}: {theirs.name} has shape {list(theirs.shape)}, but {name} of the base has "
                f"{list(shape or ())}"
            )
    if change.replacement is not None:
        adapter, key = change.replacement
        theirs = adapter.file.tensors[key]
        if shape is not None and theirs.shape != shape:
            raise AdapterError(
                f"{adapter.directory} replaces {name} by shape {list(theirs.shape)}, the base has {list(shape)}; a "
                "resized vocabulary cannot be merged file by file: resize the base first"
            )


def _is_transposed(source: Checkpoint, name: str, share: _Share) -> bool:
    """Whether a matrix lies as (in, out) of the adapter's: in a Conv1D, unless its parameter is adapted as it lies."""
    return is_conv1d(source, name.removesuffix(".weight")) and not share.module.endswith(".weight")


def _experts_transposed(source: Checkpoint, share: _Share, shape: tuple[int, ...]) -> bool:
    """Whether fused experts (experts, a, b) lie as (experts, in, out)."""
    own = share.adapter.shape(share.module)
    if own.out_features != own.in_features:
        return (own.in_features, own.out_features) == shape[1:]
    known = experts_lie_in_out(source)
    if known is None:
        raise _unknown_order(source, share.module)
    return known


def _edit_bytes(source: Checkpoint, change: _Change) -> int:
    """About what the factors of one tensor take, widened to fp64."""
    total = 0
    for share in change.shares:
        own = share.adapter.shape(share.module)
        experts = 1 if share.piece is not None else own.experts or 1
        total += 4 * 8 * experts * own.r * (own.out_features + own.in_features)
    return total


# --- the arithmetic -----------------------------------------------------------------------------------------


def _edit(plan: MergePlan, info: TensorInfo, stored: Tensor) -> Edit:
    """How one tensor's rows change."""
    source, change = plan.base, plan.changes[info.name]
    dtype = compute_dtype(stored.dtype)
    steps: list[Callable[[slice, Tensor], None]] = []
    figures: dict[str, Any] = {}
    convolution = any(share.adapter.kernel(share.module) is not None for share in change.shares)
    if convolution:
        stored = stored.flatten(1)
    columns = stored.shape[-1]
    if change.replacement is not None:
        adapter, key = change.replacement
        own = _finite(adapter.file.tensor(key), adapter, key).to(stored.device)
        matrix = own.reshape(-1, columns)
        steps.append(lambda rows, tile: _put(tile, matrix[rows]))
    for share in change.biases:
        key = share.adapter.parts[share.module]["lora_bias"]
        bias = _finite(share.adapter.file.tensor(key), share.adapter, key).to(stored.device, dtype)
        bias = bias * (share.weight * share.adapter.scaling(share.module))
        steps.append(_adding(bias[None]))
    if change.shares:
        left, right = _sides(source, info.name, change.shares, stored, dtype)
        figures["delta_norm"] = delta_norm(left, right)
        steps.append(adding_product(left, right))
        share = change.shares[0]
        magnitude = share.adapter.parts[share.module].get("magnitude")
        if magnitude is not None:
            sizes = _finite(share.adapter.file.tensor(magnitude), share.adapter, magnitude).reshape(-1)
            sizes = sizes.to(stored.device, dtype)
            transposed = _is_transposed(source, info.name, share)
            steps.append(_rescaling(sizes, stored, left, right, transposed=transposed))
            figures.pop("delta_norm")
    if not steps:
        return Edit(None)

    def apply(rows: slice, tile: Tensor) -> None:
        for step in steps:
            step(rows, tile)

    return Edit(apply, columns, figures=figures)


def _sides(
    source: Checkpoint, name: str, shares: Sequence[_Share], stored: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum of the adapters' products as one product, as the weight lies: their sides, side by side."""
    lefts, rights = [], []
    for share in shares:
        initial = share.adapter.initial(share.module)
        for matrix in [*share.adapter.factors(share.module).matrices(), *(initial.matrices() if initial else ())]:
            _finite(matrix, share.adapter, share.module)
        left, right = share.sides(dtype)
        fused = stored.ndim == 3
        if _experts_transposed(source, share, tuple(stored.shape)) if fused else _is_transposed(source, name, share):
            left, right = right.mT, left.mT
        lefts.append(left.to(stored.device))
        rights.append(right.to(stored.device))
    return torch.cat(lefts, -1).contiguous(), torch.cat(rights, -2).contiguous()


def _finite(tensor: Tensor, adapter: Adapter, name: str) -> Tensor:
    if not is_finite(tensor):
        raise NonFiniteError(name, f"{adapter.directory}: {name} holds NaN or infinity; its training diverged")
    return tensor


def _put(tile: Tensor, rows: Tensor) -> None:
    tile.copy_(rows)


def _adding(row: Tensor) -> Callable[[slice, Tensor], None]:
    return lambda rows, tile: _put(tile, tile + row)


def _rescaling(
    magnitude: Tensor, stored: Tensor, left: Tensor, right: Tensor, *, transposed: bool
) -> Callable[[slice, Tensor], None]:
    """DoRA (arXiv 2402.09353, equation 5): each output's weights brought to the length that was learnt."""
    if not transposed:

        def rescale(rows: slice, tile: Tensor) -> None:
            tile.mul_((magnitude[rows] / torch.linalg.vector_norm(tile, dim=1))[:, None])

        return rescale
    # Stored as (in, out), an output is a column: its length takes a pass over all rows first.
    squares = torch.zeros_like(magnitude)
    for rows in row_tiles(stored.shape, left.dtype.itemsize):
        tile = torch.addmm(stored[rows].to(left.dtype), left[rows], right)
        squares += tile.square().sum(0)
    factor = magnitude / squares.sqrt()
    return lambda rows, tile: _put(tile, tile * factor)


def _finish(plan: MergePlan, tree: Path, records: dict[str, dict[str, Any]]) -> None:
    """Untie the configuration if the head was, and write the manifest."""
    if plan.engine.appended:
        _untie(plan, tree)
    with Checkpoint.open(tree) as written:
        fingerprint = written.fingerprint()
    changed = []
    for name, record in records.items():
        figures = record["figures"]
        weight_norm, delta = figures.get("weight_norm"), figures.get("delta_norm")
        ratio = delta / weight_norm if weight_norm and delta is not None else None
        changed.append({"tensor": name, "delta_ratio": ratio, "checksums": record["checksums"]})
    write_manifest(
        tree,
        plan.engine.identity,
        adapters=[{"name": str(adapter.directory), "weight": weight} for adapter, weight in plan.adapters],
        fingerprint=fingerprint,
        tensors=len(plan.base.tensors) + len(plan.engine.appended),
        changed=changed,
    )


def _untie(plan: MergePlan, tree: Path) -> None:
    config = read_json(tree / "config.json")
    config["tie_word_embeddings"] = False
    (tree / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (tree / INDEX_FILE).exists():
        index = read_json(tree / INDEX_FILE)
        for name in plan.engine.appended:
            origin = plan.engine.origin(name)
            index["weight_map"][name] = origin.file
            if isinstance(index.get("metadata"), dict) and isinstance(index["metadata"].get("total_size"), int):
                index["metadata"]["total_size"] += origin.size_bytes
        (tree / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
