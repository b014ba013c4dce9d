"""extract: the low-rank adapter between two checkpoints, streamed pairwise."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlora_surgery.adapter import FINGERPRINT_KEY, AdapterConfig, AdapterLayout, ModuleShape, adapter_task_type
from nlora_surgery.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FLOAT_DTYPES,
    MANIFEST,
    Checkpoint,
    TensorInfo,
    plan_file,
    read_json,
)
from nlora_surgery.devices import compute_dtype, resolve_devices
from nlora_surgery.errors import CheckpointError, NonFiniteError, OptionError, TargetError
from nlora_surgery.factor import (
    SVD,
    Factors,
    is_finite,
    module_generator,
    randomized_svd,
    row_tiles,
    split_scale,
    truncated_svd,
)
from nlora_surgery.manifest import identify, write_manifest
from nlora_surgery.options import ADAPTER_DTYPES
from nlora_surgery.rewrite import Edit, Plan, Progress, rewrite
from nlora_surgery.targets import (
    choose_targets,
    expert_pieces,
    experts_lie_in_out,
    is_conv1d,
    is_fused_experts,
    module_path,
    refuse_quantized,
    target_modules_for,
    target_parameters_for,
)

__all__ = ["ExtractOptions", "ExtractPlan", "extract", "plan_extract"]

_OVERSAMPLING = 16
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+\.weight")  # of a checkpoint that keeps every expert by itself


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What `extract` is asked for.

    Attributes:
        rank: r at most; smaller modules get min(out, in).
        targets: what is to be factored of all that changed, see `choose_targets`; empty is every linear weight.
        to: `lora` or `slora`.
        method: `sketch` or `svd`, the exact one.
        tolerance: leave away singular values while ‖error‖/‖change‖ stays below it; 0 keeps all `rank` of them.
        others: what to do with changed tensors that are not to be factored: `save` puts them into
            modules_to_save, `refuse` fails, `ignore` leaves them out and says so.
        dtype: of the adapter.
        seed: of the sketch.
    """

    rank: int = 64
    targets: Sequence[str] = ()
    to: str = "lora"
    method: str = "sketch"
    tolerance: float = 0.0
    others: str = "save"
    dtype: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            OptionError: which one.
        """
        if self.rank < 1:
            raise OptionError(f"--rank must be at least 1, not {self.rank}")
        if not 0 <= self.tolerance < 1:
            raise OptionError(f"--tolerance must be at least 0 and below 1, not {self.tolerance}")
        for name, value, known in (
            ("to", self.to, ("lora", "slora")),
            ("method", self.method, ("sketch", "svd")),
            ("others", self.others, ("save", "refuse", "ignore")),
            ("dtype", self.dtype, ADAPTER_DTYPES),
        ):
            if value not in known:
                raise OptionError(f"--{name} {value} is unknown; there are {', '.join(known)}")


@dataclass(frozen=True)
class ExtractPlan:
    """What `extract` will do, decided before it writes anything.

    Attributes:
        base, tuned: the opened checkpoints.
        out: the directory to be made.
        options: as given.
        modules: the changed weights that are factored, fused experts among them: shapes by tensor name.
        replaced: changed tensors that go to modules_to_save.
        ignored: changed tensors that are left out.
        config: of the adapter, before ranks are cut by a tolerance.
        engine: the engine's plan.
    """

    base: Checkpoint
    tuned: Checkpoint
    out: Path
    options: ExtractOptions
    modules: dict[str, ModuleShape]
    replaced: Sequence[str]
    ignored: Sequence[str]
    config: AdapterConfig
    engine: Plan

    @cached_property
    def layout(self) -> AdapterLayout:
        """How the factors lie in the adapter's file, before ranks are cut by a tolerance."""
        return AdapterLayout(self.modules.values(), three_matrix=self.options.to == "slora")


def plan_extract(
    base: Path,
    tuned: Path,
    out: Path,
    options: ExtractOptions,
    *,
    base_name: str | None = None,
    device: str = "auto",
) -> ExtractPlan:
    """Open both, find what changed (equal tensors cost a comparison and no more), lay out the adapter.

    Args:
        base: the model that was tuned.
        tuned: the result.
        out: directory to be made.
        options: what is wanted.
        base_name: how the user named the base.
        device: see `resolve_devices`.

    Raises:
        CheckpointError: they are not of one architecture.
        TargetError: nothing changed; or, with `others="refuse"`, something that is not to be factored did; or
            `targets` name what is not there.
    """
    options.check()
    device_kind = resolve_devices(device)[0].type
    source, result = Checkpoint.open(base), Checkpoint.open(tuned)
    refuse_quantized(source, "compared")
    refuse_quantized(result, "compared")
    odd = sorted(source.tensors.keys() ^ result.tensors.keys())
    if odd:
        _refuse_other_experts(source, result)
        raise CheckpointError(
            f"{base} and {tuned} are not of one architecture: {len(odd)} tensors are in one of them only, "
            f"{odd[0]} for instance"
        )
    changed = _changed(source, result)
    if not changed:
        raise TargetError(f"{tuned} equals {base} in every tensor; there is nothing to extract")

    modules: dict[str, ModuleShape] = {}
    replaced: list[str] = []
    chosen = choose_targets(source, options.rank, options.targets) if options.targets else ()
    named = {target.tensor: target for target in chosen}
    for name in _with_other_experts(source, changed):
        before, after = source.tensors[name], result.tensors[name]
        target = named.get(name)
        if options.targets and target is None:
            if name in changed:
                replaced.append(name)
        elif target is not None and target.kernel is not None and _is_alike(before, after):
            sides = target.out_features, target.in_features
            modules[name] = ModuleShape(target.module, *sides, target.r, kernel=target.kernel)
        elif _is_factorable(before, after):
            modules[name] = _shape(source, before, options.rank)
        else:
            replaced.append(name)
    resized = [name for name in replaced if source.tensors[name].shape != result.tensors[name].shape]
    # modules_to_save knows the weights and biases of modules; a parameter by itself has no place there.
    unsavable = [
        name for name in replaced if result.tensors[name].torch_dtype is None or not name.endswith((".weight", ".bias"))
    ]
    what = "target" if options.targets else "linear weight"
    if replaced and options.others == "refuse":
        raise TargetError(
            f"{len(replaced)} changed tensors are no {what}s: {', '.join(replaced[:5])}; --others save puts "
            "them into modules_to_save, --others ignore leaves them out"
        )
    if options.others == "save" and (resized or unsavable):
        name = [*resized, *unsavable][0]
        raise TargetError(
            f"{name} is {source.tensors[name].dtype} {list(source.tensors[name].shape)} in {base} and "
            f"{result.tensors[name].dtype} {list(result.tensors[name].shape)} in {tuned}, which no adapter can "
            "express; --others ignore leaves it out"
        )
    ignored = replaced if options.others == "ignore" else []
    replaced = [] if options.others == "ignore" else replaced
    if not modules and not replaced:
        raise TargetError(f"no {what} changed between {base} and {tuned}; only {', '.join(ignored[:5])} did")

    fingerprint = source.fingerprint()
    config = _config(source, modules, replaced, options, base_name or str(base), fingerprint)
    dtype = getattr(torch, options.dtype)
    layout = AdapterLayout(modules.values(), three_matrix=options.to == "slora")
    side = plan_file(
        ADAPTER_WEIGHTS,
        [(key, dtype, size) for shape in modules.values() for key, size in layout.tensors(shape.module)]
        + [
            (f"base_model.model.{name}", FLOAT_DTYPES[result.tensors[name].dtype], result.tensors[name].shape)
            for name in replaced
        ],
        {"format": "pt", FINGERPRINT_KEY: fingerprint},
    )
    engine = Plan(
        source=source,
        out=out,
        edits=[*modules, *replaced],
        identity=identify(
            "extract",
            source,
            base_name or str(base),
            tuned=result.fingerprint(),
            device=device_kind,
            **asdict(options),
        ),
        write_shards=False,
        side=side,
        worker_bytes=max(
            (
                _module_bytes(shape, FLOAT_DTYPES[source.tensors[name].dtype], options)
                for name, shape in modules.items()
            ),
            default=0,
        ),
        inputs=[base, tuned],
    )
    return ExtractPlan(source, result, out, options, modules, replaced, ignored, config, engine)


def extract(
    plan: ExtractPlan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the adapter.

    Args:
        plan: from `plan_extract`, with the same `device`.
        device, overwrite, max_memory, progress: see `rewrite`.

    Returns:
        The manifest: `error`, ‖change - product‖/‖change‖ of each module and of all together; what was
        replaced and what was left out.

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


def _changed(source: Checkpoint, result: Checkpoint) -> list[str]:
    """Names of the tensors that differ in dtype, shape or any byte."""

    def differs(name: str) -> bool:
        before, after = source.tensors[name], result.tensors[name]
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return True
        different = not _same_bytes(source.raw(name), result.raw(name))
        source.release(name)
        result.release(name)
        return different

    with ThreadPoolExecutor(2) as pool:  # two streams: one file each
        return [
            name for name, different in zip(source.tensors, pool.map(differs, source.tensors), strict=True) if different
        ]


def _with_other_experts(source: Checkpoint, changed: Sequence[str]) -> list[str]:
    """The changed tensors, and where one expert changed, its layer's other experts: PEFT fuses all of them or none."""
    layers = {match[1] for name in changed if (match := _EXPERT.fullmatch(name))}
    others = {name for name in source.tensors if (match := _EXPERT.fullmatch(name)) and match[1] in layers}
    wanted = others.union(changed)
    return [name for name in source.tensors if name in wanted]


def _same_bytes(left: memoryview, right: memoryview) -> bool:
    """Whether two buffers of one length are equal; as words, since Python compares element by element."""
    whole = len(left) - len(left) % 8
    return left[:whole].cast("Q") == right[:whole].cast("Q") and left[whole:] == right[whole:]


def _refuse_other_experts(source: Checkpoint, result: Checkpoint) -> None:
    """Say so where experts lie fused in one of the two, and each by itself in the other."""
    for fused, other in ((source, result), (result, source)):
        for info in filter(is_fused_experts, fused):
            pieces = [] if info.name in other.tensors else expert_pieces(other, info.name)
            if pieces:
                raise CheckpointError(
                    f"{fused.directory} has its experts fused ({info.name}), {other.directory} each by itself "
                    f"({pieces[0].tensor}); bring the second into the form of the first, with transformers 5: "
                    "from_pretrained(DIR).save_pretrained(NEW_DIR, save_original_format=False)"
                )


def _is_alike(before: TensorInfo, after: TensorInfo) -> bool:
    """Whether one can be subtracted from the other."""
    return before.torch_dtype is not None and after.torch_dtype is not None and before.shape == after.shape


def _is_factorable(before: TensorInfo, after: TensorInfo) -> bool:
    if not _is_alike(before, after) or min(before.shape[-2:], default=1) == 1:
        return False
    if is_fused_experts(before):
        return True
    module = before.name.removesuffix(".weight")
    embedding = "embed" in module.rpartition(".")[2] or module.rpartition(".")[2] in {"wte", "wpe", "shared"}
    return len(before.shape) == 2 and before.name.endswith(".weight") and not embedding


def _shape(source: Checkpoint, info: TensorInfo, rank: int) -> ModuleShape:
    """The shapes of one changed weight's factors.

    Raises:
        TargetError: which way fused experts lie is not known.
    """
    module = module_path(source, info.name)
    experts = info.shape[0] if len(info.shape) == 3 else None
    if experts is not None and experts_lie_in_out(source) is None:
        raise TargetError(
            f"the experts of {info.name} are fused, and whether model_type {source.config.get('model_type')!r} stores "
            "them as (experts, out, in) or (experts, in, out) is not known; it will not be guessed, and no adapter "
            "can be extracted for them"
        )
    out_features, in_features = info.shape[:-3:-1] if _is_transposed(source, module, experts) else info.shape[-2:]
    return ModuleShape(module, out_features, in_features, min(rank, out_features, in_features), experts)


def _is_transposed(source: Checkpoint, module: str, experts: int | None) -> bool:
    """Whether a weight, or those of all its experts, lie as (in, out)."""
    return is_conv1d(source, module) if experts is None else experts_lie_in_out(source) is True


def _edit(plan: ExtractPlan, info: TensorInfo, stored: Tensor) -> Edit:
    after = plan.tuned.tensor(info.name)
    if info.name in plan.replaced:
        return Edit(sides={f"base_model.model.{info.name}": after})
    shape = plan.modules[info.name]
    if shape.kernel is not None:
        stored, after = stored.flatten(1), after.flatten(1)
    if shape.experts is None:
        found = [_extract_one(plan, info.name, shape, stored, after, shape.module)]
        factors = found[0].factors.padded(shape.r)
    else:  # as many matrices, each found by itself
        found = [
            _extract_one(plan, info.name, shape, stored[expert], after[expert], f"{shape.module}.{expert}")
            for expert in range(shape.experts)
        ]
        factors = Factors.stack([each.factors.padded(shape.r) for each in found])
    plan.tuned.release(info.name)
    figures = {
        "change_norm": math.hypot(*(each.change_norm for each in found)),
        "error_norm": math.hypot(*(each.error_norm for each in found)),
        "r": max(each.factors.lora_A.shape[0] for each in found),
    }
    # In the place that was planned for the rank asked for; `_finish` cuts the zeros off again.
    return Edit(sides=plan.layout.stored(shape.module, factors), figures=figures)


@dataclass(frozen=True, slots=True)
class _Found:
    """The factors of one matrix's change, ‖change‖, and ‖change - product‖."""

    factors: Factors
    change_norm: float
    error_norm: float


def _extract_one(
    plan: ExtractPlan, name: str, shape: ModuleShape, stored: Tensor, after: Tensor, stream: str
) -> _Found:
    """Factor the change of one matrix, as it lies; `stream` names its random numbers."""
    options = plan.options
    dtype = max((compute_dtype(stored.dtype), compute_dtype(after.dtype)), key=lambda each: each.itemsize)
    # The change is formed as a whole: both sides are rounded numbers, and their difference is exact in few dtypes.
    change, after = torch.empty(stored.shape, dtype=dtype, device=stored.device), after.to(stored.device)
    # A change of bfloat16 weights is known no better than their rounding: that does for a sketch's first steps.
    coarse = torch.empty_like(stored) if stored.dtype == after.dtype == torch.bfloat16 else None
    for rows in row_tiles(change.shape, dtype.itemsize):
        tile = change[rows].copy_(after[rows]).sub_(stored[rows])
        if coarse is not None:
            coarse[rows].copy_(tile)
    size = float(torch.linalg.vector_norm(change))
    if not math.isfinite(size):
        raise _not_finite(plan, name, stored, after)
    if _is_transposed(plan.base, shape.module, shape.experts):
        change, coarse = change.T, None if coarse is None else coarse.T
    if options.method == "svd":
        svd = truncated_svd(change, shape.r, dtype)
    else:
        svd = randomized_svd(
            change,
            shape.r,
            oversampling=_OVERSAMPLING,
            power_steps=2,
            generator=module_generator(options.seed, stream),
            dtype=dtype,
            coarse=coarse,
        )
    kept = _kept(svd.S, size, options.tolerance)
    svd = SVD(svd.U[:, :kept], svd.S[:kept], svd.Vh[:kept])
    made = split_scale(svd, "balanced")
    factors = (made if options.to == "slora" else Factors(made.lora_A, made.lora_B)).to(getattr(torch, options.dtype))
    if not all(map(is_finite, factors.matrices())):
        raise NonFiniteError(name, f"a factor of {name!r} overflows {options.dtype}; use --dtype float32")
    left, right = factors.sides(1.0, dtype)
    squares = 0.0
    for rows in row_tiles(change.shape, dtype.itemsize):
        squares += float(torch.linalg.vector_norm(change[rows].sub_(left[rows] @ right))) ** 2
    return _Found(factors, size, math.sqrt(squares))


def _not_finite(plan: ExtractPlan, name: str, stored: Tensor, after: Tensor) -> NonFiniteError:
    for checkpoint, weight in ((plan.base, stored), (plan.tuned, after)):
        if not is_finite(weight):
            return NonFiniteError(
                name, f"weight {name!r} of {checkpoint.directory} holds NaN or infinity; repair it there"
            )
    return NonFiniteError(name, f"weight {name!r} is finite in both, but the squares of its change overflow")


def _kept(values: Tensor, size: float, tolerance: float) -> int:
    """How many singular values are needed for ‖error‖ ≤ tolerance * ‖change‖, as far as there are so many."""
    if tolerance == 0:
        return len(values)
    left_over = size**2 - values.double().square().cumsum(0)
    enough = (left_over <= (tolerance * size) ** 2).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(values)


def _finish(plan: ExtractPlan, tree: Path, records: dict[str, dict[str, Any]]) -> None:
    figures = {name: records[name]["figures"] for name in plan.modules}
    ranks = {plan.modules[name].module: each["r"] for name, each in figures.items()}
    config = plan.config
    if any(each["r"] < plan.modules[name].r for name, each in figures.items()):
        _cut(plan, tree, ranks)
        config = _ranked(config, ranks)
    (tree / ADAPTER_CONFIG).write_text(config.to_json(), encoding="utf-8")
    total = math.sqrt(sum(each["change_norm"] ** 2 for each in figures.values()))
    wrong = math.sqrt(sum(each["error_norm"] ** 2 for each in figures.values()))
    write_manifest(
        tree,
        plan.engine.identity,
        options=asdict(plan.options),
        error=wrong / total if total else 0.0,
        replaced=list(plan.replaced),
        ignored=list(plan.ignored),
        modules=[
            {
                "module": plan.modules[name].module,
                "r": each["r"],
                "change_norm": each["change_norm"],
                "error": each["error_norm"] / each["change_norm"] if each["change_norm"] else 0.0,
            }
            for name, each in figures.items()
        ],
    )


def _cut(plan: ExtractPlan, tree: Path, ranks: dict[str, int]) -> None:
    """Write the adapter file again with each module at the rank that its tolerance needs."""
    assert plan.engine.side is not None
    dtype, three = getattr(torch, plan.options.dtype), plan.options.to == "slora"
    layout = AdapterLayout(
        [replace(shape, r=ranks[shape.module]) for shape in plan.modules.values()], three_matrix=three
    )
    # Two matrices of fused experts have the experts' rows of lora_A one behind the other.
    flat = {
        layout.name(shape.module, "lora_A"): shape.experts
        for shape in plan.modules.values()
        if shape.experts is not None and not three
    }
    with Checkpoint.open_file(tree / ADAPTER_WEIGHTS) as wide:
        tensors = [(key, dtype, size) for shape in plan.modules.values() for key, size in layout.tensors(shape.module)]
        for name in plan.replaced:
            info = wide.tensors[f"base_model.model.{name}"]
            tensors.append((info.name, FLOAT_DTYPES[info.dtype], info.shape))
        narrow = plan_file(ADAPTER_WEIGHTS, tensors, plan.engine.side.metadata)
        written = tree / f"{ADAPTER_WEIGHTS}.tmp"
        with open(written, "wb") as file:
            file.write(narrow.header)
            for info in sorted(narrow.tensors.values(), key=lambda info: info.start):
                own = wide.tensor(info.name)
                if info.name in flat:
                    experts = flat[info.name]
                    own = own.view(experts, -1, own.shape[-1])[:, : info.shape[0] // experts].flatten(0, 1)
                own = own[tuple(map(slice, info.shape))]
                file.write(own.contiguous().view(torch.uint8).numpy().tobytes())
    written.replace(tree / ADAPTER_WEIGHTS)


def _config(
    source: Checkpoint,
    modules: dict[str, ModuleShape],
    replaced: Sequence[str],
    options: ExtractOptions,
    base_name: str,
    fingerprint: str,
) -> AdapterConfig:
    saved = sorted({name.rpartition(".")[0] for name in replaced})
    paths = [shape.module for shape in modules.values() if shape.experts is None]
    parameters = [shape.module for shape in modules.values() if shape.experts is not None]
    config = AdapterConfig(
        peft_type=options.to.upper(),
        r=options.rank,
        lora_alpha=float(options.rank),
        target_modules=target_modules_for(paths, source) if paths else [],
        fan_in_fan_out=bool(paths) and not parameters and all(is_conv1d(source, path) for path in paths),
        base_model_name_or_path=base_name,
        task_type=adapter_task_type(source.config),
        base_fingerprint=fingerprint,
        target_parameters=target_parameters_for(parameters, source),
        extra={"modules_to_save": saved} if saved else {},
    )
    return _ranked(config, {shape.module: shape.r for shape in modules.values()})


def _ranked(config: AdapterConfig, ranks: dict[str, int]) -> AdapterConfig:
    """The configuration with these ranks, and the scaling 1 for each."""
    lower = {module: r for module, r in ranks.items() if r != config.r}
    alphas = {module: float(r) for module, r in lower.items()}
    return replace(config, rank_pattern=lower, alpha_pattern=alphas)


def _module_bytes(shape: ModuleShape, stored: torch.dtype, options: ExtractOptions) -> int:
    """About what one weight's extraction allocates: its change, and a sketch, or an SVD with LAPACK's own space.

    Of fused experts that is for one of them at a time, and the factors of all.
    """
    itemsize = compute_dtype(stored).itemsize
    whole = itemsize * shape.out_features * shape.in_features
    sides = itemsize * (shape.r + _OVERSAMPLING) * (shape.out_features + shape.in_features)
    stacks = 3 * sides * (shape.experts or 0)
    return stacks + (5 * whole if options.method == "svd" else whole + whole // 2 + 5 * sides)
