"""init: factor every target weight, write the residual base and the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nlora_surgery.adapter import (
    FINGERPRINT_KEY,
    AdapterConfig,
    AdapterLayout,
    ModuleShape,
    adapter_task_type,
    plan_adapter_file,
)
from nlora_surgery.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    Checkpoint,
    FileLayout,
    TensorInfo,
    read_json,
)
from nlora_surgery.devices import compute_dtype, resolve_devices
from nlora_surgery.errors import NonFiniteError, OptionError, UnsupportedCheckpointError
from nlora_surgery.factor import (
    Factors,
    adding_product,
    delta_norm,
    factorize,
    is_finite,
    module_generator,
    row_tiles,
)
from nlora_surgery.manifest import identify, read_manifest, write_manifest
from nlora_surgery.options import (
    ADAPTER_DTYPES,
    FAMILY_NYSTROM,
    METHODS,
    RESIDUALS,
    SAMPLINGS,
    SCALE_SPLITS,
    STARTS_AT_ZERO,
    FactorOptions,
)
from nlora_surgery.rewrite import Edit, Plan, Progress, rewrite
from nlora_surgery.targets import (
    Target,
    choose_targets,
    refuse_quantized,
    target_modules_for,
    target_parameters_for,
)

__all__ = ["InitOptions", "InitPlan", "plan_init", "prepare"]

ADAPTER_FOLDER: Final = "adapter"
_MEND: Final = "repair it, or leave it out with --allow-nonfinite"
_NO_FINGERPRINT: Final = "sha256:" + "0" * 64  # as long as a real one, which takes its place at the end


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What `init` is asked to do.

    Attributes:
        rank: r of every module; smaller modules get min(out, in).
        factor: the method and its parameters.
        residual: `baked` writes the residual base; `virtual` stores the initial factors with the adapter, to
            be subtracted by the layer; `none` subtracts nothing.
        alpha: lora_alpha; None is `rank`, so that the scaling is 1.
        targets, exclude: see `choose_targets`.
        adapter_dtype: one of `ADAPTER_DTYPES`.
        seed: of the sampling, the sketches and the random starts.
        allow_nonfinite: leave modules with NaN or infinity unadapted instead of failing.
    """

    rank: int = 64
    factor: FactorOptions = field(default_factory=FactorOptions)
    residual: str = "baked"
    alpha: float | None = None
    targets: Sequence[str] = ()
    exclude: Sequence[str] = ()
    adapter_dtype: str = "float32"
    seed: int = 0
    allow_nonfinite: bool = False

    def check(self) -> None:
        """Refuse impossible values and contradictions.

        Raises:
            OptionError: with the option's name, what was found and what is possible.
        """
        if not 1 <= self.rank < 1 << 31:
            raise OptionError(f"--rank must be at least 1 and below 2^31, not {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise OptionError(f"--alpha must be positive and finite, not {self.alpha}")
        if self.factor.oversampling < 0 or (self.factor.power_steps or 0) < 0:
            raise OptionError("--oversampling and --power-steps must not be negative")
        if not 0 <= self.factor.pinv_rtol < 1:
            raise OptionError(f"--pinv-rtol must be at least 0 and below 1, not {self.factor.pinv_rtol}")
        for name, value, known in (
            ("method", self.factor.method, METHODS),
            ("sampling", self.factor.sampling, SAMPLINGS),
            ("scale-split", self.factor.split, SCALE_SPLITS),
            ("residual", self.residual, RESIDUALS),
            ("adapter-dtype", self.adapter_dtype, ADAPTER_DTYPES),
        ):
            if value not in known:
                raise OptionError(f"--{name} {value} is unknown; there are {', '.join(known)}")
        method = self.factor.method
        if self.factor.two_matrix and method not in {"pissa", "pissa-fast", "lora"}:
            raise OptionError(
                f"--format lora is for pissa, pissa-fast and lora; {method} has three matrices: run init, then "
                "convert --to lora"
            )
        if self.factor.scale_split is not None and (method in STARTS_AT_ZERO or self.factor.two_matrix):
            raise OptionError(f"--scale-split has no meaning for {method} in this format: there is nothing to spread")
        if self.factor.sampling != "leading" and method not in FAMILY_NYSTROM:
            raise OptionError(f"--sampling is for the Nyström methods; {method} samples no rows or columns")
        if self.residual == "virtual" and self.factor.two_matrix:
            raise OptionError(
                "--residual virtual needs three matrices: a loader of plain LoRA would not subtract the start; "
                "use --residual baked, or --format slora"
            )

    @property
    def three_matrix(self) -> bool:
        """Whether the adapter has a lora_N."""
        return self.factor.method != "lora" and not self.factor.two_matrix

    @property
    def subtracts(self) -> bool:
        """Whether there is a start to be subtracted somewhere."""
        return self.residual != "none" and self.factor.method not in STARTS_AT_ZERO


@dataclass(frozen=True)
class InitPlan:
    """What `init` will do, decided before it touches anything.

    Attributes:
        source: the opened checkpoint.
        source_name: how the user named it.
        out: the directory to be made.
        options: as given.
        targets: the weights to be adapted.
        skipped: target weights left alone because they are not finite.
        left_out: files of the source that are not carried over.
        config: the adapter's configuration, fingerprint aside.
        engine: the engine's plan.
    """

    source: Checkpoint
    source_name: str
    out: Path
    options: InitOptions
    targets: Sequence[Target]
    skipped: Sequence[str]
    left_out: Sequence[str]
    config: AdapterConfig
    engine: Plan

    @cached_property
    def layout(self) -> AdapterLayout:
        """Where the factors lie in the adapter's file."""
        return AdapterLayout(map(_shape, self.targets), three_matrix=self.options.three_matrix)

    @cached_property
    def by_tensor(self) -> dict[str, Target]:
        """The targets by the names of their weights."""
        return {target.tensor: target for target in self.targets}

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter."""
        three = self.options.three_matrix
        return sum(
            math.prod(shape) for target in self.targets for shape in _shape(target).parts(three_matrix=three).values()
        )


def plan_init(
    model: Path, out: Path, options: InitOptions, *, source_name: str | None = None, device: str = "auto"
) -> InitPlan:
    """Open the model, choose the targets, lay out every file.

    Args:
        model: directory of the original.
        out: directory to be made.
        options: what to do.
        source_name: how the user named the model, a Hub id for instance; the path by default.
        device: see `resolve_devices`; decides the bits of the result, hence the identity of a run.

    Raises:
        OptionError, CheckpointError, UnsupportedCheckpointError, TargetError, NonFiniteError: see their classes.
    """
    options.check()
    device_kind = resolve_devices(device)[0].type
    if (model / MANIFEST).exists() and read_json(model / MANIFEST).get("command") == "init":
        raise UnsupportedCheckpointError(
            f"{model} is an output of init already ({MANIFEST} says so); name the original model"
        )
    source = Checkpoint.open(model)
    refuse_quantized(source)
    source_name = source_name or str(model)
    targets = choose_targets(source, options.rank, options.targets, options.exclude)
    skipped: list[str] = []
    if options.allow_nonfinite:
        skipped = [target.tensor for target in targets if not is_finite(source.tensor(target.tensor))]
        targets = [target for target in targets if target.tensor not in skipped]
        if not targets:
            raise NonFiniteError(skipped[0], "every target weight holds NaN or infinity; nothing is left to adapt")

    writes_shards = options.residual == "baked"
    config = _adapter_config(source, targets, options, str(out) if writes_shards else source_name)
    side = plan_adapter_file(
        f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}",
        map(_shape, targets),
        getattr(torch, options.adapter_dtype),
        three_matrix=options.three_matrix,
        initial=options.residual == "virtual" and options.subtracts,
        metadata={FINGERPRINT_KEY: _NO_FINGERPRINT},
    )
    carried, left_out = source.other_files()
    engine = Plan(
        source=source,
        out=out,
        edits=[target.tensor for target in targets],
        identity=identify("init", source, source_name, device=device_kind, **_plain_options(options)),
        write_shards=writes_shards,
        side=side,
        carried=carried if writes_shards else (),
        needs_whole=_needs_whole(options),
        worker_bytes=max(_factor_bytes(target, source, options) for target in targets),
        mend_source=_MEND,
        mend_result="choose another method or --exclude the module",
    )
    return InitPlan(
        source, source_name, out, options, targets, skipped, left_out if writes_shards else (), config, engine
    )


def prepare(
    plan: InitPlan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the residual base and the adapter.

    Args:
        plan: from `plan_init`, with the same `device`.
        device, overwrite, max_memory, progress: see `rewrite`.

    Returns:
        The manifest, as it stands in the output.

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
    return read_manifest(plan.out)


def _edit(plan: InitPlan, info: TensorInfo, stored: Tensor) -> Edit:
    """Factor one weight; say how its rows change and what goes into the adapter."""
    options, target = plan.options, plan.by_tensor[info.name]
    dtype = compute_dtype(stored.dtype)
    if target.kernel is not None:
        stored = stored.flatten(1)
    weight = stored.mT if target.fan_in_fan_out else stored
    scaling = plan.config.scaling(target.module, target.r)
    if plan.engine.needs_whole and not options.factor.samples_only and not is_finite(stored):
        raise _not_finite(target)
    try:
        exact = _factorize(target, weight, scaling, options, dtype)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if not is_finite(stored):
            raise _not_finite(target) from error
        raise NonFiniteError(
            target.tensor,
            f"the decomposition of {target.tensor!r} did not converge; choose another method or --exclude the module "
            f"({error})",
        ) from error

    # The residual is taken from the factors as they are stored, so that rounding them costs nothing.
    factors = exact.to(getattr(torch, options.adapter_dtype))
    if not all(map(is_finite, factors.matrices())):
        if not is_finite(stored):
            raise _not_finite(target)
        if options.adapter_dtype != "float32" and all(map(is_finite, exact.matrices())):
            raise NonFiniteError(
                target.tensor,
                f"a factor of {target.tensor!r} overflows {options.adapter_dtype}; use --adapter-dtype float32",
            )
        raise _overflow(target, "its factors overflow")
    sides = plan.layout.stored(target.module, factors)
    if options.residual == "virtual" and options.subtracts:
        sides |= plan.layout.stored(target.module, factors, initial=True)
    if options.factor.method in STARTS_AT_ZERO:
        return Edit(sides=sides, figures={"delta_norm": 0.0})

    left, right = factors.sides(scaling, dtype)
    size = delta_norm(left, right)
    if not 0 < size < math.inf:  # the squares of huge numbers, or of tiny ones, are beyond the compute dtype
        if not _is_finite_product(left, right):
            raise _overflow(target, "scaling times the product of its factors overflows")
        size = delta_norm(left.to("cpu", torch.float64), right.to("cpu", torch.float64))
    figures = {"delta_norm": size, "condition": exact.condition}
    sign = 1 if options.residual == "none" else -1
    update = _low_rank_update(left, right, sign, target) if plan.engine.needs_whole else None
    return Edit(update, stored.shape[-1], sides, figures)


def _factorize(target: Target, weight: Tensor, scaling: float, options: InitOptions, dtype: torch.dtype) -> Factors:
    """The factors of one weight; of fused experts those of each, as stacks."""

    def one(matrix: Tensor, name: str) -> Factors:
        generator = module_generator(options.seed, name)
        return factorize(matrix, target.r, options.factor, scaling=scaling, generator=generator, dtype=dtype)

    if target.experts is None:
        return one(weight, target.module)
    return Factors.stack([one(weight[expert], f"{target.module}.{expert}") for expert in range(target.experts)])


def _low_rank_update(left: Tensor, right: Tensor, sign: int, target: Target) -> Callable[[slice, Tensor], None]:
    if target.fan_in_fan_out:
        left, right = right.mT, left.mT
    return adding_product(left, right, sign)


def _is_finite_product(left: Tensor, right: Tensor) -> bool:
    stacks = [(left, right)] if left.ndim == 2 else list(zip(left, right, strict=True))
    return all(
        bool((one[rows] @ other).isfinite().all())
        for one, other in stacks
        for rows in row_tiles((len(one), other.shape[1]), one.dtype.itemsize)
    )


def _finish(plan: InitPlan, tree: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write the adapter's configuration and the manifest into the staged directory."""
    if plan.engine.write_shards:
        with Checkpoint.open(tree) as written:  # what was staged must open like any checkpoint
            base_fingerprint = written.fingerprint()
    else:
        base_fingerprint = str(plan.engine.identity["source"])
    side = plan.engine.side
    assert side is not None
    _set_fingerprint(tree / side.name, side, base_fingerprint)
    config = replace(plan.config, base_fingerprint=base_fingerprint)
    (tree / ADAPTER_FOLDER / ADAPTER_CONFIG).write_text(config.to_json(), encoding="utf-8")
    write_manifest(
        tree,
        plan.engine.identity,
        options=_plain_options(plan.options),
        base_fingerprint=base_fingerprint,
        adapter={"folder": ADAPTER_FOLDER, "parameters": plan.parameters, "size_bytes": side.size_bytes},
        skipped=list(plan.skipped),
        left_out=list(plan.left_out),
        modules=[
            {
                "tensor": target.tensor,
                "module": target.module,
                "shape": [target.out_features, target.in_features],
                "fan_in_fan_out": target.fan_in_fan_out,
                "experts": target.experts,
                "kernel": None if target.kernel is None else list(target.kernel),
                "r": target.r,
                "scaling": plan.config.scaling(target.module, target.r),
                **_ratios(records[tensor]["figures"], plan.options),
                "checksums": records[tensor]["checksums"],
            }
            for tensor, target in plan.by_tensor.items()
        ],
    )


def _ratios(figures: Mapping[str, Any], options: InitOptions) -> dict[str, Any]:
    """A module's figures for the manifest; None for what was not measured.

    `energy` is the share of ‖weight‖² that scaling * product captures, 1 - ‖weight - product‖²/‖weight‖²;
    `delta_ratio` ‖product‖/‖weight‖; `drift` ‖effective - weight‖/‖weight‖, where effective is what is
    stored plus the product.
    """
    weight_norm, delta = figures.get("weight_norm"), figures["delta_norm"]
    ratios: dict[str, Any] = {
        "weight_norm": weight_norm,
        "delta_norm": delta,
        "condition": figures.get("condition"),
        "energy": None,
        "delta_ratio": None,
        "drift": None,
    }
    if weight_norm:
        ratios["delta_ratio"] = delta / weight_norm
        if options.subtracts:
            ratios["energy"] = 1 - (figures["result_norm"] / weight_norm) ** 2
        if options.residual == "baked":
            ratios["drift"] = figures["rounding_norm"] / weight_norm
        if options.residual == "none":
            ratios["drift"] = delta / weight_norm
    if options.residual == "virtual" or not (options.subtracts or delta):
        ratios["drift"] = 0.0
    if ratios["condition"] is not None and not math.isfinite(ratios["condition"]):
        ratios["condition"] = None  # a singular core; JSON has no infinity
        ratios["singular"] = True
    return ratios


# --- details ------------------------------------------------------------------------------------------


def _needs_whole(options: InitOptions) -> bool:
    """Whether every element of a target is read: to be factored, or to be changed or measured."""
    if options.factor.method in STARTS_AT_ZERO:
        return False
    return options.residual != "virtual" or not options.factor.samples_only


def _shape(target: Target) -> ModuleShape:
    return ModuleShape(target.module, target.out_features, target.in_features, target.r, target.experts, target.kernel)


def _adapter_config(
    source: Checkpoint, targets: Sequence[Target], options: InitOptions, base_name: str
) -> AdapterConfig:
    alpha = float(options.rank if options.alpha is None else options.alpha)
    clamped = {target.module: target.r for target in targets if target.r < options.rank}
    ranks = _by_shortest_name(clamped, [target.module for target in targets])
    extra: dict[str, Any] = {}
    if options.three_matrix:
        extra["init_weights"] = options.factor.method
    return AdapterConfig(
        peft_type="SLORA" if options.three_matrix else "LORA",
        r=options.rank,
        lora_alpha=alpha,
        target_modules=target_modules_for([target.module for target in targets if target.experts is None], source),
        rank_pattern=ranks,
        # A clamped module keeps the scaling of the others.
        alpha_pattern={name: alpha * r / options.rank for name, r in ranks.items()},
        fan_in_fan_out=all(target.fan_in_fan_out and target.experts is None for target in targets),
        base_model_name_or_path=base_name,
        task_type=adapter_task_type(source.config),
        residual=options.residual if options.three_matrix and options.factor.method not in STARTS_AT_ZERO else None,
        target_parameters=target_parameters_for([t.module for t in targets if t.experts is not None], source),
        extra=extra,
    )


def _by_shortest_name(ranks: Mapping[str, int], modules: Sequence[str]) -> dict[str, int]:
    """`rank_pattern` keys: a last component where all modules that end so have the same rank, else the path."""
    shortest: dict[str, int] = {}
    for module, r in ranks.items():
        leaf = module.rpartition(".")[2]
        alike = {ranks.get(other) for other in modules if other.rpartition(".")[2] == leaf}
        shortest[leaf if alike == {r} else module] = r
    return shortest


def _plain_options(options: InitOptions) -> dict[str, Any]:
    factor = asdict(options.factor) | {"scale_split": options.factor.split}
    plain = {name: value for name, value in asdict(options).items() if name != "factor"} | factor
    return plain | {"targets": list(options.targets), "exclude": list(options.exclude)}


def _factor_bytes(target: Target, source: Checkpoint, options: InitOptions) -> int:
    """About what factoring this target allocates at most."""
    stored = source.tensors[target.tensor]
    assert stored.torch_dtype is not None
    itemsize = compute_dtype(stored.torch_dtype).itemsize
    sides = (target.out_features + target.in_features) * itemsize
    if options.factor.method == "pissa":
        smaller = min(target.out_features, target.in_features)
        return 3 * target.out_features * target.in_features * itemsize + 2 * smaller * sides
    stacks = 3 * sides * target.r * (target.experts or 0)
    if options.factor.samples_only:
        return stacks + 3 * sides * target.r
    return stacks + 5 * sides * (target.r + options.factor.oversampling)


def _not_finite(target: Target) -> NonFiniteError:
    return NonFiniteError(target.tensor, f"weight {target.tensor!r} holds NaN or infinity; {_MEND}")


def _overflow(target: Target, what: str) -> NonFiniteError:
    return NonFiniteError(
        target.tensor,
        f"weight {target.tensor!r} is finite, but {what}; choose another method or --alpha, or --exclude the module",
    )


def _set_fingerprint(path: Path, layout: FileLayout, fingerprint: str) -> None:
    header = layout.header.replace(_NO_FINGERPRINT.encode(), fingerprint.encode())
    with open(path, "r+b") as file:
        file.write(header)
