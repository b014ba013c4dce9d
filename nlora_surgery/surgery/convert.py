"""convert: one low-rank form into another, exact where algebra says so, with its error where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nlora_surgery.adapter import (
    FINGERPRINT_KEY,
    Adapter,
    AdapterConfig,
    AdapterLayout,
    ModuleShape,
    check_base,
)
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
from nlora_surgery.errors import AdapterError, BaseMismatchError, NonFiniteError, OptionError
from nlora_surgery.factor import SVD, Factors, delta_norm, is_finite, product_svd, split_scale
from nlora_surgery.manifest import identify, write_manifest
from nlora_surgery.options import SCALE_SPLITS, ScaleSplit
from nlora_surgery.rewrite import Edit, Plan, Progress, rewrite
from nlora_surgery.targets import expert_pieces, module_path, tensor_aliases

__all__ = ["VLLM_RANKS", "ConvertOptions", "ConvertPlan", "convert", "plan_convert"]

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be

_LINEAR_PARTS = {"lora_A", "lora_N", "lora_B", "lora_A_initial", "lora_N_initial", "lora_B_initial", "alpha"}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What `convert` is asked for.

    Attributes:
        to: `lora` or `slora`.
        rank: recompress to it; None keeps the product exact.
        scale_split: of `slora`, see `factor.split_scale`; `keep` leaves the factors alone.
        dtype: of the result, `float32`, `bfloat16` or `float16`; None keeps the adapter's.
        vllm: what vLLM's loader takes: one rank, alpha = r, no patterns, 16 bits.
    """

    to: str = "lora"
    rank: int | None = None
    scale_split: ScaleSplit = "keep"
    dtype: str | None = None
    vllm: bool = False

    def check(self) -> None:
        """Refuse impossible values and contradictions.

        Raises:
            OptionError: which one.
        """
        if self.to not in {"lora", "slora"}:
            raise OptionError(f"--to {self.to} is unknown; there are lora and slora")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"--rank must be at least 1, not {self.rank}")
        if self.scale_split not in SCALE_SPLITS:
            raise OptionError(f"--scale-split {self.scale_split} is unknown; there are {', '.join(SCALE_SPLITS)}")
        if self.scale_split != "keep" and self.to == "lora":
            raise OptionError("--scale-split spreads the scale over three matrices; --to lora has two")
        if self.vllm and (self.to != "lora" or self.dtype == "float32"):
            raise OptionError("--for vllm writes --to lora in bfloat16 or float16: it loads nothing else")


@dataclass(frozen=True)
class _Module:
    """One module's conversion: where from, at what rank, by which of the exact ways or by an SVD."""

    source: str  # its path in the adapter
    module: str  # and in the result
    r: int
    way: str  # "same", "fold", "difference", "svd"


@dataclass(frozen=True)
class ConvertPlan:
    """What `convert` will do, decided before it touches anything.

    Attributes:
        adapter: to be converted.
        initial: the start that is to be subtracted, or None.
        out: the directory to be made.
        options: as given.
        modules: how each is converted.
        config: of the result.
        passed: tensors taken over as they are: new name by old.
        engine: the engine's plan.
    """

    adapter: Adapter
    initial: Adapter | None
    out: Path
    options: ConvertOptions
    modules: Sequence[_Module]
    config: AdapterConfig
    passed: Mapping[str, str]
    engine: Plan

    @cached_property
    def by_tensor(self) -> dict[str, _Module]:
        """The modules by the names of their lora_A, from which their edits start."""
        return {self.adapter.parts[each.source]["lora_A"]: each for each in self.modules}

    @cached_property
    def layout(self) -> AdapterLayout:
        """Where the factors lie in the result's file."""
        return _layout(self.adapter, self.modules, self.options)

    @property
    def max_lora_rank(self) -> int:
        """What vLLM must be started with to load the result."""
        return next((rank for rank in VLLM_RANKS if rank >= self.config.r), self.config.r)


def plan_convert(
    adapter: Path,
    out: Path,
    options: ConvertOptions,
    *,
    base: Path | None = None,
    base_name: str | None = None,
    initial: Path | None = None,
) -> ConvertPlan:
    """Open everything, decide what is subtracted and at what rank each module comes out.

    Args:
        adapter: its directory, or a Kohya file.
        out: directory to be made.
        options: what is wanted.
        base: the model that the result is for. With an adapter that was trained on a residual base, the
            original; then its start must be known.
        base_name: how the user named the base.
        initial: the adapter as it was before training; one with a virtual residual carries its own.

    Raises:
        OptionError: a contradiction, or `initial` is missing.
        AdapterError, BaseMismatchError: an adapter is damaged, does not fit the other or the base, or has
            what the wanted form cannot express.
    """
    options.check()
    source = Adapter.open(adapter)
    start = Adapter.open(initial) if initial is not None else None
    original = Checkpoint.open(base) if base is not None else None
    subtract = _check_belongs(source, start, original)
    _check_expressible(source, options, subtract=subtract)

    names: dict[str, str] = {}
    if original is not None:
        fused = {module for module in source.parts if expert_pieces(original, module)}
        names = source.resolve(original, aliases=tensor_aliases(original), but=fused)
    flat = any("." not in module for module in source.parts)
    if flat and original is None:
        raise OptionError(
            f"{source.directory} names its modules with underscores (Kohya), which only the model can resolve; give "
            "it with --base"
        )
    modules = []
    for module in source.parts:
        if _is_linear(source, module):
            target = module_path(original, names[module]) if flat and original is not None else module
            modules.append(_plan_module(source, start, module, target, options, subtract=subtract))
    if options.rank is not None and modules and options.rank > max(each.r for each in modules):
        raise OptionError(
            f"--rank {options.rank} is more than the {max(each.r for each in modules)} that the adapter's product "
            "has; leave it away to keep the product exact"
        )
    rescaled = subtract or options.rank is not None or options.vllm
    config = _config(source, original, base_name, modules, options, rescaled=rescaled, subtract=subtract)
    if options.vllm:
        modules = [replace(each, r=config.r) for each in modules]

    passed = {
        name: _passed_name(source, module, part)
        for module, parts in source.parts.items()
        if not _is_linear(source, module) or "lora_bias" in parts or "magnitude" in parts
        for part, name in parts.items()
        if not (_is_linear(source, module) and part in _LINEAR_PARTS)
    } | {name: f"base_model.model.{wanted}" for wanted, name in source.replaced.items()}
    side = plan_file(
        ADAPTER_WEIGHTS,
        [*_planned_factors(source, modules, options), *_planned_passed(source, passed)],
        {"format": "pt", **({FINGERPRINT_KEY: config.base_fingerprint} if config.base_fingerprint else {})},
    )
    engine = Plan(
        source=source.file,
        out=out,
        edits=[*(source.parts[each.source]["lora_A"] for each in modules), *passed],
        identity=identify(
            "convert",
            source.file,
            str(source.directory),
            initial=None if start is None else start.file.fingerprint(),
            config=config.to_json(),
            **asdict(options),
        ),
        write_shards=False,
        side=side,
        needs_whole=False,
        worker_bytes=max((_module_bytes(source.shape(each.source)) for each in modules), default=0),
        inputs=[path for path in (adapter, base, initial) if path is not None and path.is_dir()],
    )
    return ConvertPlan(source, start, out, options, modules, config, passed, engine)


def convert(
    plan: ConvertPlan,
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the converted adapter.

    Args:
        plan: from `plan_convert`.
        overwrite, max_memory, progress: see `rewrite`.

    Returns:
        The manifest: for each module its rank and `error`, ‖converted - exact‖/‖exact‖ of the product, which
        holds the rounding to the stored dtype; 0 where every bit was kept.

    Raises:
        OutputError, StageError, NonFiniteError: see `rewrite`.
    """
    rewrite(
        plan.engine,
        partial(_edit, plan),
        partial(_finish, plan),
        device="cpu",  # the factors are small next to a model, and fp64 is wanted: not work for a GPU
        overwrite=overwrite,
        max_memory=max_memory,
        progress=progress,
    )
    return read_json(plan.out / MANIFEST)


# --- what is subtracted, and what may be asked for --------------------------------------------------------


def _check_belongs(source: Adapter, start: Adapter | None, original: Checkpoint | None) -> bool:
    """Whether a start is to be subtracted; refuse adapters and bases that do not belong together."""
    virtual = any("lora_A_initial" in parts for parts in source.parts.values())
    recorded = source.base_fingerprint
    if virtual or start is None:
        started = source.config.residual == "baked" or str(source.config.extra.get("init_lora_weights")).startswith(
            ("pissa", "olora")
        )
        if original is not None and not virtual:
            found = original.fingerprint()
            if started and (recorded is None or recorded != found):
                raise OptionError(
                    f"{source.directory} was trained on a residual base, and {original.directory} is another: to bring "
                    "it there, give the adapter as it was before training with --initial"
                )
            check_base(source, original)
        if original is not None and virtual:
            check_base(source, original)
        return virtual
    if original is None:
        raise OptionError(
            "--initial subtracts a start, so that the result is for the original base: name it with --base"
        )
    if recorded and start.base_fingerprint and recorded != start.base_fingerprint:
        raise BaseMismatchError(
            f"{source.directory} and {start.directory} belong to different bases: {recorded[:23]}… and "
            f"{start.base_fingerprint[:23]}…"
        )
    manifest = start.directory.parent / MANIFEST
    if manifest.exists() and isinstance(made_from := read_json(manifest).get("source"), dict):
        expected = made_from.get("fingerprint")
        if expected and expected != original.fingerprint():
            raise BaseMismatchError(
                f"{start.directory} was made from {made_from.get('name')}, and {original.directory} is another model: "
                "their fingerprints differ"
            )
    if source.parts.keys() != start.parts.keys():
        odd = sorted(source.parts.keys() ^ start.parts.keys())
        raise AdapterError(f"{source.directory} and {start.directory} adapt different modules: {', '.join(odd[:5])}")
    for module in source.parts:
        own, before = source.shape(module), start.shape(module)
        if (own.out_features, own.in_features) != (before.out_features, before.in_features):
            raise AdapterError(f"{module} is {own.out_features} × {own.in_features} in {source.directory}, "
                               f"{before.out_features} × {before.in_features} in {start.directory}")  # fmt: skip
    return True


def _check_expressible(source: Adapter, options: ConvertOptions, *, subtract: bool) -> None:
    """Refuse what the wanted form has no place for, and say the way round."""
    special = {
        "a DoRA magnitude": [m for m, parts in source.parts.items() if "magnitude" in parts],
        "a trained bias": [m for m, parts in source.parts.items() if "lora_bias" in parts],
        "an embedding": [m for m in source.parts if source.is_embedding(m)],
        "fused experts": [m for m in source.parts if source.experts(m) is not None],
        "a convolution": [m for m in source.parts if source.kernel(m) is not None],
        "a parameter of its own (target_parameters)": [
            m
            for m in source.parts
            if source.experts(m) is None and not _is_linear(source, m) and not source.is_embedding(m)
        ],
        "a replaced tensor (modules_to_save)": list(source.replaced),
    }
    wanted = "vLLM" if options.vllm else options.to
    reworked = options.to == "slora" or options.vllm
    for what, modules in special.items():
        if what in {"fused experts", "a convolution"}:
            refused = options.vllm
        else:
            bent = what in {"a DoRA magnitude", "a parameter of its own (target_parameters)"}
            refused = reworked or (bent and (subtract or options.rank is not None))
        if modules and refused:
            raise AdapterError(
                f"{source.directory} has {what} ({modules[0]}), which {wanted} cannot express in this conversion; "
                "merge it into its base instead: nlora_surgery merge BASE ADAPTER -o OUT"
            )


def _is_linear(source: Adapter, module: str) -> bool:
    """Whether its factors are those of a linear map, or of a stack of such: what the algebra here is about."""
    if source.is_embedding(module):
        return False
    parameter = any(f".{module}".endswith(f".{target}") for target in source.config.target_parameters)
    return not parameter or source.experts(module) is not None


def _plan_module(
    source: Adapter, start: Adapter | None, module: str, target: str, options: ConvertOptions, *, subtract: bool
) -> _Module:
    shape = source.shape(module)
    most = min(shape.out_features, shape.in_features)
    if not subtract:
        r = shape.r if options.rank is None else min(options.rank, shape.r, most)
        if r < shape.r or options.scale_split != "keep":
            return _Module(module, target, min(r, most), "svd")
        # With a rank asked for, or vLLM, the scaling becomes 1 and has to go into a factor.
        same = (options.to == "slora" or "lora_N" not in source.parts[module]) and options.rank is None
        return _Module(module, target, r, "same" if same and not options.vllm else "fold")
    before = _start(source, start, module)
    now = source.factors(module)
    still = torch.equal(now.lora_A, before.lora_A) or _same_left(now, before)
    whole = shape.r if still else shape.r + before.lora_A.shape[-2]
    r = min(whole, most) if options.rank is None else min(options.rank, whole, most)
    exact = r == whole and options.scale_split == "keep"
    return _Module(module, target, r, "difference" if exact else "svd")


def _start(source: Adapter, start: Adapter | None, module: str) -> Factors:
    before = start.factors(module) if start is not None else source.initial(module)
    if before is None:
        raise AdapterError(f"{source.directory}: module {module} has no initial factors, others have")
    return before


def _same_left(now: Factors, before: Factors) -> bool:
    cores = now.lora_N, before.lora_N
    same_core = cores == (None, None) or (None not in cores and torch.equal(*cores))  # type: ignore[arg-type]
    return same_core and torch.equal(now.lora_B, before.lora_B)


# --- the algebra ------------------------------------------------------------------------------------------


def _edit(plan: ConvertPlan, info: TensorInfo, stored: Tensor) -> Edit:
    if info.name in plan.passed:
        return Edit(sides={plan.passed[info.name]: stored}, figures={"error": 0.0})
    adapter, options, each = plan.adapter, plan.options, plan.by_tensor[info.name]
    now = _finite(adapter, each.source, adapter.factors(each.source))
    dtype = _stored_dtype(adapter, each.source, options)
    scaling = adapter.scaling(each.source)
    left, right = _exact_sides(plan, each, now, scaling)
    if each.way == "same":
        made = _with_core(now, options)
    elif each.way in {"fold", "difference"}:
        # Where the result keeps the adapter's scaling, it must not be in a factor too.
        made = _with_core(Factors(right, left / plan.config.scaling(each.module, each.r)), options)
    elif left.ndim == 3:
        made = Factors.stack([_cut(plan, each, one, other) for one, other in zip(left, right, strict=True)])
    else:
        made = _cut(plan, each, left, right)
    made = made.to(dtype).padded(each.r)  # for loaders that know one rank only
    if not all(map(is_finite, made.matrices())):
        wider = "bfloat16" if options.vllm else "float32"
        mend = f"use --dtype {wider}" if dtype.itemsize == 2 else "its training diverged"
        raise NonFiniteError(each.module, f"a factor of {each.module} overflows {str(dtype)[6:]}; {mend}")

    kept = each.way == "same" and made.lora_A.dtype == now.lora_A.dtype
    error = 0.0 if kept else _error(plan, each, left, right, made)
    return Edit(sides=plan.layout.stored(each.module, made), figures={"error": error})


def _cut(plan: ConvertPlan, each: _Module, left: Tensor, right: Tensor) -> Factors:
    """The best factors of rank r for one product."""
    options = plan.options
    U, S, Vh = product_svd(left, None, right)
    share = plan.config.scaling(each.module, each.r)
    cut = SVD(U[:, : each.r], S[: each.r] / share, Vh[: each.r])
    made = split_scale(cut, "balanced" if options.scale_split == "keep" else options.scale_split)
    return made if options.to == "slora" else Factors(made.lora_A, made.lora_B)


def _exact_sides(plan: ConvertPlan, each: _Module, now: Factors, scaling: float) -> tuple[Tensor, Tensor]:
    """`left @ right` is the exact change on the result's base, in fp64, at the lowest rank that algebra gives.

    That is `[s B N | -s0 B0 N0] [A; A0]` in general; the difference of one side where the other never moved.
    """
    left, right = now.sides(scaling, torch.float64)
    if plan.initial is None and plan.adapter.initial(each.source) is None:
        return left, right
    holder = plan.initial or plan.adapter
    before = _finite(holder, each.source, _start(plan.adapter, plan.initial, each.source))
    initial_left, initial_right = before.sides(holder.scaling(each.source), torch.float64)
    if torch.equal(now.lora_A, before.lora_A):
        return left - initial_left, right
    if _same_left(now, before) and left.shape == initial_left.shape and torch.equal(left, initial_left):
        return left, right - initial_right
    return torch.cat([left, -initial_left], -1), torch.cat([right, initial_right], -2)


def _finite(adapter: Adapter, module: str, factors: Factors) -> Factors:
    if not all(map(is_finite, factors.matrices())):
        raise NonFiniteError(module, f"{adapter.directory}: {module} holds NaN or infinity; its training diverged")
    return factors


def _with_core(factors: Factors, options: ConvertOptions) -> Factors:
    """Three matrices if they are wanted: with the identity where there was no core."""
    if options.to == "lora" or factors.lora_N is not None:
        return factors
    *stack, r, _ = factors.lora_A.shape
    identity = torch.eye(r, dtype=factors.lora_A.dtype).expand(*stack, r, r)
    return Factors(factors.lora_A, factors.lora_B, identity)


def _error(plan: ConvertPlan, each: _Module, left: Tensor, right: Tensor, made: Factors) -> float:
    """‖made - exact‖/‖exact‖ of the product, by an SVD of the difference, which a Gram matrix would cancel away."""
    made_left, made_right = made.sides(plan.config.scaling(each.module, each.r), torch.float64)
    size = delta_norm(left, right)
    lefts, rights = torch.cat([left, -made_left], -1), torch.cat([right, made_right], -2)
    pairs = [(lefts, rights)] if lefts.ndim == 2 else zip(lefts, rights, strict=True)
    difference = torch.cat([product_svd(one, None, other).S for one, other in pairs])
    return float(torch.linalg.vector_norm(difference)) / size if size else float(torch.linalg.vector_norm(difference))


# --- the result's files -------------------------------------------------------------------------------------


def _finish(plan: ConvertPlan, tree: Path, records: Mapping[str, dict[str, Any]]) -> None:
    (tree / ADAPTER_CONFIG).write_text(plan.config.to_json(), encoding="utf-8")
    write_manifest(
        tree,
        plan.engine.identity,
        options=asdict(plan.options),
        modules=[
            {"module": each.module, "r": each.r, "way": each.way, **records[name]["figures"]}
            for name, each in plan.by_tensor.items()
        ],
    )


def _config(
    source: Adapter,
    original: Checkpoint | None,
    base_name: str | None,
    modules: Sequence[_Module],
    options: ConvertOptions,
    *,
    rescaled: bool,
    subtract: bool,
) -> AdapterConfig:
    before = source.config
    dropped = {"init_lora_weights", "init_weights", "peft_type", "inference_mode"}
    changes: dict[str, Any] = {
        "peft_type": options.to.upper(),
        "extra": {name: value for name, value in before.extra.items() if name not in dropped},
        "residual": None if subtract else before.residual,
        "base_fingerprint": original.fingerprint() if original is not None else source.base_fingerprint,
        "base_model_name_or_path": (base_name or str(original.directory)) if original is not None
        else before.base_model_name_or_path,
    }  # fmt: skip
    flat = any("." not in module for module in source.parts)
    if before.target_modules is None or flat or options.vllm:
        changes["target_modules"] = sorted({each.module.rpartition(".")[2] for each in modules})
    ranks = {each.module: each.r for each in modules}
    if rescaled or flat:
        most = max(ranks.values(), default=before.r)
        if options.vllm:
            ranks = dict.fromkeys(ranks, most)
        lower = {module: r for module, r in ranks.items() if r != most}
        scalings = {each.module: 1.0 if rescaled else source.scaling(each.source) for each in modules}
        alphas = {module: scalings[module] * r for module, r in ranks.items()}
        changes |= {
            "r": most,
            "lora_alpha": float(most),
            "use_rslora": False,
            "rank_pattern": lower,
            "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != most},
        }
    return replace(before, **changes)


def _planned_factors(
    source: Adapter, modules: Sequence[_Module], options: ConvertOptions
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    layout = _layout(source, modules, options)
    planned: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for each in modules:
        dtype = _stored_dtype(source, each.source, options)
        planned += [(name, dtype, size) for name, size in layout.tensors(each.module)]
    return planned


def _layout(source: Adapter, modules: Sequence[_Module], options: ConvertOptions) -> AdapterLayout:
    shapes = [replace(source.shape(each.source), module=each.module, r=each.r) for each in modules]
    return AdapterLayout(shapes, three_matrix=options.to == "slora")


def _planned_passed(source: Adapter, passed: Mapping[str, str]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    infos = [(source.file.tensors[name], new) for name, new in passed.items()]
    return [(new, FLOAT_DTYPES[info.dtype], info.shape) for info, new in infos]


def _passed_name(source: Adapter, module: str, part: str) -> str:
    """PEFT's own key of a tensor that is taken over."""
    name = source.parts[module][part]
    if source.config.target_parameters:
        return name
    endings = {"lora_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector.weight"}
    ending = endings.get(part, part if part.startswith("lora_embedding") else f"{part}.weight")
    return f"base_model.model.{module}.{ending}"


def _stored_dtype(source: Adapter, module: str, options: ConvertOptions) -> torch.dtype:
    own = FLOAT_DTYPES[source.file.tensors[source.parts[module]["lora_A"]].dtype]
    if options.dtype is not None:
        found = getattr(torch, options.dtype)
        assert isinstance(found, torch.dtype)
        return found
    return torch.bfloat16 if options.vllm and own.itemsize > 2 else own


def _module_bytes(shape: ModuleShape) -> int:
    return math.ceil(8 * 16 * shape.r * (shape.experts or 1) * (shape.out_features + shape.in_features))
