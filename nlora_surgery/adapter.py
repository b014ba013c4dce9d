"""An adapter: its configuration, its factors by module, its two formats on disk.

A three-matrix adapter has `peft_type: "SLORA"`, which stock PEFT refuses loudly; a two-matrix one is a plain
PEFT LoRA directory. Both hold `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nlora_surgery.adapter_keys import AdapterKey, parse_key
from nlora_surgery.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FLOAT_DTYPES,
    Checkpoint,
    FileLayout,
    plan_file,
    read_json,
)
from nlora_surgery.errors import AdapterError, BaseMismatchError, CheckpointError, OutputError
from nlora_surgery.factor import Factors, change_sides

__all__ = [
    "FINGERPRINT_KEY",
    "Adapter",
    "AdapterConfig",
    "AdapterLayout",
    "ModuleShape",
    "adapter_task_type",
    "check_base",
    "pattern_for",
    "plan_adapter_file",
    "task_type_of",
    "tensor_name",
    "write_adapter",
]

FINGERPRINT_KEY = "base_fingerprint"

# Values of init_lora_weights for which PEFT changes the base's weights, each time that it loads the adapter.
_RESIDUALIZING = r"(pissa(_niter_\d+)?|olora|corda|lora_ga|loftq)$"

# The parameters of fused experts, in the order in which the classes of transformers define them.
_PARAMETER_ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's `task_type` for a model's config.json, from the name of its class; None where that says nothing."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((task for suffix, task in _TASKS if name.endswith(suffix)), None)


def adapter_task_type(config: Mapping[str, Any]) -> str | None:
    """`task_type_of` for an adapter without the model's head.

    None for classifiers and the like: by their task types PEFT would look for a trained head in the adapter.
    """
    task = task_type_of(config)
    return task if task in {"CAUSAL_LM", "SEQ_2_SEQ_LM"} else None


def tensor_name(module: str, part: str) -> str:
    """The key of a factor on disk.

    Args:
        module: path of the adapted module.
        part: `lora_A`, `lora_N` or `lora_B`, with `_initial` for the frozen start of a virtual residual.
    """
    return f"base_model.model.{module}.{part}.weight"


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What fixes the shapes of one module's factors.

    Attributes:
        module: its path; that of the parameter for fused experts.
        out_features, in_features: of the linear map; a convolution's inputs are (channels · kernel).
        r: its rank.
        experts: of how many matrices each factor is a stack; None for a matrix.
        kernel: a convolution's size in each direction; None for any other. Then lora_A and lora_B lie on disk as PEFT
            has them, as weights of convolutions: (r, channels, *kernel) and (out, r, 1, …). `lora_N` is (r, r).
    """

    module: str
    out_features: int
    in_features: int
    r: int
    experts: int | None = None
    kernel: tuple[int, ...] | None = None

    def parts(self, *, three_matrix: bool, initial: bool = False) -> dict[str, tuple[int, ...]]:
        """Shape of each factor, by part; `initial` adds the frozen start of each."""
        stack = () if self.experts is None else (self.experts,)
        kernel = self.kernel or ()
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (*stack, self.r, self.in_features // math.prod(kernel), *kernel)
        }
        if three_matrix:
            shapes["lora_N"] = (*stack, self.r, self.r)
        shapes["lora_B"] = (*stack, self.out_features, self.r, *(1 for _ in kernel))
        if initial:
            shapes |= {f"{part}_initial": shape for part, shape in shapes.items()}
        return shapes


class AdapterLayout:
    """Where the factors of each module lie in an adapter's file, and in what form.

    Those of a linear map are matrices under its path; those of a convolution have its dimensions (see `ModuleShape`).
    Those of fused experts are stacks of matrices under the path of the parameter, if there are three. Two lie as PEFT
    has them for its `target_parameters`: as matrices with rank and experts in one dimension, experts outermost in
    `lora_A (experts * r, in)` and innermost in `lora_B (out, r * experts)`, under the path of the module that holds
    the parameter, which PEFT wraps once for each of its parameters.

    Attributes:
        three_matrix: whether there is a `lora_N`.
    """

    def __init__(self, modules: Iterable[ModuleShape], *, three_matrix: bool) -> None:
        self.three_matrix = three_matrix
        self._shapes = {shape.module: shape for shape in modules}
        self._paths = {module: module for module in self._shapes}
        if not three_matrix:
            self._paths |= self._wrapper_paths()

    def _wrapper_paths(self) -> dict[str, str]:
        holders: dict[str, list[str]] = {}
        for module, shape in self._shapes.items():
            if shape.experts is not None:
                holder, _, parameter = module.rpartition(".")
                holders.setdefault(holder, []).append(parameter)
        paths = {}
        for holder, parameters in holders.items():
            # The first parameter that the class defines is wrapped first, and lies innermost.
            ordered = sorted(parameters, key=_PARAMETER_ORDER.index) if len(parameters) > 1 else parameters
            for inside, parameter in enumerate(reversed(ordered)):
                paths[f"{holder}.{parameter}"] = f"{holder}{'.base_layer' * inside}"
        return paths

    def name(self, module: str, part: str) -> str:
        """The key of a factor."""
        return tensor_name(self._paths[module], part)

    def tensors(self, module: str, *, initial: bool = False) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each of a module's factors; `initial` adds the frozen start of each."""
        shape = self._shapes[module]
        return [
            (self.name(module, part), self._stored_shape(shape, part, size))
            for part, size in shape.parts(three_matrix=self.three_matrix, initial=initial).items()
        ]

    def stored(self, module: str, factors: Factors, *, initial: bool = False) -> dict[str, Tensor]:
        """A module's factors by name, as they are stored; `initial` names them as the frozen start."""
        matrices = {"lora_A": factors.lora_A, "lora_N": factors.lora_N, "lora_B": factors.lora_B}
        return {
            self.name(module, f"{part}_initial" if initial else part): self._flat(module, part, matrix)
            for part, matrix in matrices.items()
            if matrix is not None
        }

    def _stored_shape(self, shape: ModuleShape, part: str, size: tuple[int, ...]) -> tuple[int, ...]:
        if self.three_matrix or shape.experts is None:
            return size
        wide = shape.experts * shape.r
        return (wide, shape.in_features) if part.startswith("lora_A") else (shape.out_features, wide)

    def _flat(self, module: str, part: str, matrix: Tensor) -> Tensor:
        shape = self._shapes[module]
        if shape.kernel is not None:
            return matrix.reshape(shape.parts(three_matrix=True)[part])
        if self.three_matrix or shape.experts is None:
            return matrix
        return matrix.flatten(0, 1) if part == "lora_A" else matrix.permute(1, 2, 0).flatten(1)


def plan_adapter_file(
    name: str,
    modules: Iterable[ModuleShape],
    dtype: torch.dtype,
    *,
    three_matrix: bool,
    initial: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """Lay out `adapter_model.safetensors` before its factors exist.

    Args:
        name: of the file, relative to the output directory.
        modules: the adapted modules.
        dtype: of every factor.
        three_matrix: whether there is a `lora_N`.
        initial: whether the initial factors are stored too.
        metadata: joins `{"format": "pt"}`.
    """
    shapes = list(modules)
    layout = AdapterLayout(shapes, three_matrix=three_matrix)
    tensors = [(key, dtype, size) for each in shapes for key, size in layout.tensors(each.module, initial=initial)]
    return plan_file(name, tensors, {"format": "pt", **(metadata or {})})


def write_adapter(
    directory: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an adapter that is in memory; each of its two files appears whole or not at all, the weights first.

    Args:
        directory: made if it is not there.
        config: of the adapter.
        tensors: by their names on disk (see `tensor_name`), on any device.
        metadata: joins `{"format": "pt"}`.

    Raises:
        OutputError: it cannot be written.
    """
    weights, text = directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG
    try:
        directory.mkdir(parents=True, exist_ok=True)
        on_host = {name: tensor.contiguous().to("cpu") for name, tensor in tensors.items()}
        save_file(on_host, weights.with_suffix(".unfinished"), {"format": "pt", **(metadata or {})})
        weights.with_suffix(".unfinished").replace(weights)
        text.with_suffix(".unfinished").write_text(config.to_json(), encoding="utf-8")
        text.with_suffix(".unfinished").replace(text)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the adapter into {directory}: {error}") from error


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`, in PEFT's names.

    Attributes:
        peft_type: `SLORA` with a `lora_N`, else `LORA`.
        r, lora_alpha: the defaults; `rank_pattern` and `alpha_pattern` hold what differs, by module.
        residual: `baked`, `virtual` or `none` for an adapter of ours whose start is not zero, else None.
        base_fingerprint: of the base that the adapter belongs to (see `Checkpoint.fingerprint`).
        target_parameters: parameters that PEFT adapts directly, fused experts for instance.
        extra: every other field, as read.
    """

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    residual: str | None = None
    base_fingerprint: str | None = None
    target_parameters: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def scaling(self, module: str, r: int) -> float:
        """Alpha / r of one module (alpha / sqrt(r) with rsLoRA).

        Args:
            module: its path.
            r: its rank, as its tensors have it.
        """
        alpha = float(pattern_for(self.alpha_pattern, module, self.lora_alpha))
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_json(self) -> str:
        """The file's text: every field that loaders of LoRA read, and for SLORA ours."""
        alpha = self.lora_alpha
        fields: dict[str, Any] = {
            "alpha_pattern": dict(self.alpha_pattern),
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            # The base is already what it has to be: PEFT must not initialize, or residualize, once more.
            "init_lora_weights": True,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": self.peft_type,
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": self.target_modules,
            "task_type": self.task_type,
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }
        if self.target_parameters:
            fields["target_parameters"] = list(self.target_parameters)
        if self.peft_type == "SLORA":
            fields |= {"residual": self.residual, FINGERPRINT_KEY: self.base_fingerprint}
        fields |= self.extra
        # By name as PEFT does, but only so deep: of the patterns the first that matches counts.
        return json.dumps({name: fields[name] for name in sorted(fields)}, indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Read an adapter's configuration.

        Raises:
            AdapterError: it is missing, no JSON, of an unknown `peft_type`, or lacks r or lora_alpha.
        """
        path = directory / ADAPTER_CONFIG
        if not path.exists():
            raise AdapterError(f"no adapter at {directory}: it has no {ADAPTER_CONFIG}")
        values = read_json(path, AdapterError)
        kind = values.get("peft_type")
        if kind not in ("LORA", "SLORA"):
            raise AdapterError(f"{path} has peft_type {kind!r}; known are LORA and SLORA")
        r, alpha = values.get("r"), values.get("lora_alpha")
        if type(r) is not int or r < 1 or not _is_number(alpha):
            raise AdapterError(
                f"{path} has r = {r!r} and lora_alpha = {alpha!r}; expected a positive integer and a number"
            )
        known = {name for name in cls.__dataclass_fields__ if name != "extra"}
        for pattern in ("rank_pattern", "alpha_pattern"):
            values[pattern] = _checked_pattern(path, pattern, values.get(pattern) or {})
        values["target_parameters"] = list(values.get("target_parameters") or ())
        values["use_rslora"] = bool(values.get("use_rslora"))
        values["fan_in_fan_out"] = bool(values.get("fan_in_fan_out"))
        fields = {name: value for name, value in values.items() if name in known}
        return cls(**fields, extra={name: value for name, value in values.items() if name not in known})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_pattern(path: Path, name: str, pattern: Any) -> dict[str, Any]:
    if not isinstance(pattern, dict):
        raise AdapterError(f"{path} has a {name} that is no map")
    for key, value in pattern.items():
        try:
            re.compile(key)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{path} has {key!r} in its {name}, which is no regular expression: {error}") from error
        if not _is_number(value):
            raise AdapterError(f"{path} has {value!r} for {key!r} in its {name}; expected a number")
    return pattern


def pattern_for(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    r"""PEFT's lookup in rank_pattern and alpha_pattern: the first key that the module's path ends with.

    A key is a regular expression that must match from a path component on: `(.*\.)?(key)$`.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


class Adapter:
    """An adapter on disk, of any known form, its tensors read when asked for.

    Attributes:
        directory: where it lies.
        config: its configuration.
        file: the opened safetensors file.
        parts: for each adapted module, the name in `file` of each part that it has (see `AdapterKey.part`).
        replaced: tensor names of the base (`lm_head.weight`) that the adapter replaces, and theirs in `file`.
    """

    def __init__(
        self,
        directory: Path,
        config: AdapterConfig,
        file: Checkpoint,
        parts: dict[str, dict[str, str]],
        replaced: dict[str, str],
    ) -> None:
        self.directory = directory
        self.config = config
        self.file = file
        self.parts = parts
        self.replaced = replaced

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """Open an adapter: a directory of PEFT's layout, or a Kohya file (or the directory that holds one).

        Raises:
            AdapterError: configuration or weights are missing, damaged, pickled, hold keys of no known form,
                lack one of a pair, or disagree in shape or with the configuration.
        """
        path = Path(path)
        weights = _kohya_file(path)
        if weights is None:
            config: AdapterConfig | None = AdapterConfig.read(path)
            weights = path / ADAPTER_WEIGHTS
            if not weights.exists():
                raise _no_weights(path)
        else:
            config, path = None, weights.parent
        try:
            file = Checkpoint.open_file(weights)
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        parts, replaced = _sort_keys(file, weights, config)
        if config is None:  # Kohya: ranks are those of the tensors, and alpha is r where there is none
            shapes = {module: file.tensors[of["lora_A"]].shape for module, of in parts.items() if "lora_A" in of}
            ranks = {re.escape(module): shape[0] for module, shape in shapes.items() if shape}
            r = max(ranks.values(), default=1)
            config = AdapterConfig("LORA", r, float(r), rank_pattern=ranks, alpha_pattern=ranks)
        adapter = cls(path, config, file, parts, replaced)
        for module in parts:
            adapter._check(module)
        return adapter

    @property
    def three_matrix(self) -> bool:
        """Whether its modules have a `lora_N`."""
        return any("lora_N" in parts for parts in self.parts.values())

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base that it belongs to, if it records one: in its configuration, or in its file's metadata."""
        metadata = next(iter(self.file.files.values())).metadata
        return self.config.base_fingerprint or metadata.get(FINGERPRINT_KEY)

    def experts(self, module: str) -> int | None:
        """Of how many matrices a module's factors are stacks: those of fused experts. None for any other module."""
        if self.is_embedding(module) or self.kernel(module) is not None:
            return None
        shape = self.file.tensors[self.parts[module]["lora_A"]].shape
        if len(shape) == 3:
            return shape[0]
        if not any(f".{module}".endswith(f".{target}") for target in self.config.target_parameters):
            return None
        count, rest = divmod(shape[0], self._configured_rank(module))
        return count if count > 1 and not rest else None

    def kernel(self, module: str) -> tuple[int, ...] | None:
        """A convolution's size in each direction, by the shapes of its factors; None for any other module.

        Of three dimensions are the factors of a Conv1d and stacks for fused experts; the latter have a `lora_N` of
        three dimensions too.
        """
        parts = self.parts[module]
        if self.is_embedding(module) or not {"lora_A", "lora_B"} <= parts.keys():
            return None
        a, b = (self.file.tensors[parts[part]].shape for part in ("lora_A", "lora_B"))
        stacked = "lora_N" in parts and len(self.file.tensors[parts["lora_N"]].shape) != 2
        if not 3 <= len(a) == len(b) <= 5 or stacked or b[1] != a[0] or set(b[2:]) != {1}:
            return None
        return a[2:]

    def shape(self, module: str) -> ModuleShape:
        """Shapes of a module's factors, from its tensors; an embedding's as of a weight (vocabulary, width)."""
        a, b = (self.file.tensors[self.parts[module][part]].shape for part in self._sides(module))
        if self.is_embedding(module):
            return ModuleShape(module, a[1], b[0], a[0])
        kernel = self.kernel(module)
        if kernel is not None:
            return ModuleShape(module, b[0], math.prod(a[1:]), a[0], kernel=kernel)
        experts = self.experts(module)
        r = a[-2] if experts is None or len(a) == 3 else a[0] // experts
        return ModuleShape(module, b[-2], a[-1], r, experts)

    def check_rank(self, module: str) -> None:
        """Refuse a module whose rank is another in its tensors than in the configuration.

        Raises:
            AdapterError: it is.
        """
        r, wanted = self.shape(module).r, self._configured_rank(module)
        if wanted != r:
            raise AdapterError(
                f"{self.directory}: module {module} has rank {r} in its tensors, {wanted} in {ADAPTER_CONFIG}"
            )

    def _configured_rank(self, module: str) -> int:
        return int(pattern_for(self.config.rank_pattern, module, self.config.r))

    def is_embedding(self, module: str) -> bool:
        """Whether a module is adapted by PEFT's `lora_embedding_A` and `lora_embedding_B`."""
        return "lora_embedding_A" in self.parts[module]

    def scaling(self, module: str) -> float:
        """The factor before a module's product: alpha / r."""
        r = self.shape(module).r
        if "alpha" in self.parts[module]:  # Kohya keeps it with the tensors
            return float(self.file.tensor(self.parts[module]["alpha"])) / r
        return self.config.scaling(module, r)

    def factors(self, module: str) -> Factors:
        """The factors of a module, as views of the file, so that `scaling * B N A` fits the base's weight.

        Those of fused experts are stacks: (experts, r, in), (experts, r, r), (experts, out, r). Those of a convolution
        are matrices: (r, channels · kernel), (r, r), (out, r).
        """
        a, b = (self.file.tensor(self.parts[module][part]) for part in self._sides(module))
        if self.is_embedding(module):  # delta = (B A)^T, so that of the stored (vocabulary, width) is A^T B^T
            return Factors(b.T, a.T)
        lora_N = self.parts[module].get("lora_N")
        core = None if lora_N is None else self.file.tensor(lora_N)
        if self.kernel(module) is not None:
            return Factors(a.flatten(1), b.flatten(1), core)
        experts = self.experts(module)
        if experts is not None and a.ndim == 2:  # see AdapterLayout
            a, b = a.view(experts, -1, a.shape[-1]), b.view(len(b), -1, experts).permute(2, 0, 1)
        return Factors(a, b, core)

    def initial(self, module: str) -> Factors | None:
        """The frozen start of a virtual residual, or None if there is none."""
        parts = self.parts[module]
        if "lora_A_initial" not in parts:
            return None
        lora_N = parts.get("lora_N_initial")
        a, b = (self.file.tensor(parts[f"{part}_initial"]) for part in ("lora_A", "lora_B"))
        if self.kernel(module) is not None:
            a, b = a.flatten(1), b.flatten(1)
        return Factors(a, b, None if lora_N is None else self.file.tensor(lora_N))

    def sides(
        self, module: str, dtype: torch.dtype, weight: float = 1.0, expert: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the adapter adds to a module's weight, as `left (out, k) @ right (k, in)`; stacks for fused experts.

        With a virtual residual that is the current product minus the initial one, k = 2 r, and exactly zero where
        nothing moved.

        Args:
            module: its path.
            dtype: to compute in, and of the results.
            weight: multiplies all of it.
            expert: only this one of the fused experts.
        """
        factors, initial = self.factors(module), self.initial(module)
        if expert is not None:
            factors, initial = factors.expert(expert), None if initial is None else initial.expert(expert)
        return change_sides(factors, initial, weight * self.scaling(module), dtype)

    def resolve(
        self,
        base: Checkpoint,
        extra: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
        but: Container[str] = (),
    ) -> dict[str, str]:
        """The tensor of the base that each module, and each replaced tensor, stands for.

        Exact names come first; then, where prefixes differ (`model.layers…` and `layers…`), the only tensor
        whose name ends like that; Kohya's paths, which have `_` for `.`, by comparing them so.

        Args:
            base: the model.
            extra: names of tensors that it will have besides.
            aliases: other names of its tensors, see `targets.tensor_aliases`.
            but: modules to leave out.

        Returns:
            Name in `base` by module path and by name in `replaced`.

        Raises:
            AdapterError: some match nothing, which names them and what is close; or two match one tensor.
        """
        known = {name: name for name in [*base.tensors, *extra]} | dict(aliases or {})
        tensors = dict.fromkeys(known)
        flat = {re.sub(r"\W", "_", name.removesuffix(".weight")): name for name in tensors}
        found: dict[str, str] = {}
        missing: list[str] = []
        for wanted in [*self.parts, *self.replaced]:
            if wanted in but:
                continue
            name = _find_tensor(wanted, tensors, flat)
            if name is None:
                missing.append(wanted)
            else:
                found[wanted] = known[name]
        if missing:
            close = difflib.get_close_matches(missing[0], [name.removesuffix(".weight") for name in tensors], 3, 0.5)
            hint = f"; the closest to the first are {', '.join(close)}" if close else ""
            raise AdapterError(
                f"{len(missing)} of {len(self.parts) + len(self.replaced)} modules of {self.directory} match no tensor "
                f"of {base.directory}: {', '.join(missing[:5])}{'…' if len(missing) > 5 else ''}{hint}"
            )
        # A tensor can be replaced and have a product added: PEFT saves an adapted embedding's own weight besides.
        names: dict[tuple[str, bool], str] = {}
        for wanted, name in found.items():
            other = names.setdefault((name, wanted in self.parts), wanted)
            if other != wanted:
                raise AdapterError(f"{self.directory}: {wanted} and {other} both change {name} of the base")
        return found

    def _sides(self, module: str) -> tuple[str, str]:
        embedding = self.is_embedding(module)
        return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")

    def _check(self, module: str) -> None:
        """Refuse a module whose factors are no whole set, or do not multiply."""
        parts = self.parts[module]
        shapes = {part: self.file.tensors[name].shape for part, name in parts.items()}
        for part, name in parts.items():
            if self.file.tensors[name].dtype not in FLOAT_DTYPES:
                raise AdapterError(
                    f"{self.directory}: {name} has dtype {self.file.tensors[name].dtype}, no float ({part})"
                )
        a, b = self._sides(module)
        needed = [a, b]
        if any(part.endswith("_initial") for part in parts):
            needed += [f"{part}_initial" for part in ("lora_A", "lora_N", "lora_B") if part in (a, b) or part in parts]
        if self.config.extra.get("use_dora"):
            needed.append("magnitude")
        for part in needed:
            if part not in shapes:
                why = " (use_dora)" if part == "magnitude" else ""
                raise AdapterError(f"{self.directory}: module {module} lacks its {part}{why}; the adapter is not whole")
        one, other = shapes[a], shapes[b]
        convolution = self.kernel(module) is not None
        alike = len(one) == len(other) in {2, 3} and one[:-2] == other[:-2] and one[-2] == other[-1]
        if not (alike or convolution) or not one[-2] or (convolution and not all(one)):
            grouped = 3 <= len(one) == len(other) and set(other[2:]) == {1}
            raise AdapterError(
                f"{self.directory}: module {module} has {a} {list(one)} and {b} {list(other)}; expected "
                "(r, in) and (out, r), stacks of such, or (r, in, …) and (out, r, 1, …) of a convolution"
                f"{'; one in groups cannot be merged, by PEFT neither' if grouped else ''}"
            )
        r = self.shape(module).r
        core = (r, r) if convolution else (*one[:-2], one[-2], one[-2])
        if shapes.get("lora_N", core) != core:
            raise AdapterError(f"{self.directory}: module {module} has lora_N {list(shapes['lora_N'])} at rank {r}")
        for part, shape in shapes.items():
            current = shapes.get(part.removesuffix("_initial"))
            if shape != current:
                raise AdapterError(
                    f"{self.directory}: module {module} has {part} {list(shape)}, and "
                    f"{part.removesuffix('_initial')} {list(current or ())}"
                )
        if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
            raise AdapterError(
                f"{self.directory}: module {module} has alpha {list(shapes['alpha'])}; expected a number"
            )
        self.check_rank(module)


def _kohya_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".safetensors" and path.name != ADAPTER_WEIGHTS:
        return path
    if path.is_dir() and not (path / ADAPTER_CONFIG).exists():
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1 and not files[0].name.startswith(("model", "adapter_model")):
            return files[0]
    return None


def _no_weights(directory: Path) -> AdapterError:
    if (directory / "adapter_model.bin").exists():
        return AdapterError(
            f"{directory} has its weights pickled (adapter_model.bin), which can run code when read; load "
            "it with PEFT and save it again as safetensors"
        )
    return AdapterError(f"{directory} has no {ADAPTER_WEIGHTS}; it is no whole adapter")


def _sort_keys(
    file: Checkpoint, weights: Path, config: AdapterConfig | None
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Factors by module and part, and tensors that replace the base's, from the names in the file."""
    keys = {name: parse_key(name) for name in file.tensors}
    unknown = [name for name, key in keys.items() if key is None]
    if unknown:
        raise AdapterError(
            f"{weights} holds {unknown[0]!r}, which is no tensor of a LoRA, SLORA, MoSLoRA, LoRA-XS or Kohya adapter"
        )
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name, key in keys.items():
        assert key is not None
        if key.replaces:
            if file.tensors[name].dtype not in FLOAT_DTYPES:
                raise AdapterError(f"{weights}: {name} has dtype {file.tensors[name].dtype}, no float")
            if replaced.setdefault(f"{key.module}.{key.part}", name) != name:
                raise AdapterError(
                    f"{weights} holds {key.module}.{key.part} twice; it may mix two adapters: save one alone"
                )
            continue
        module = _parameter_path(key, keys.values(), config)
        if parts.setdefault(module, {}).setdefault(key.part, name) != name:
            raise AdapterError(f"{weights} holds {key.part} of {module} twice; it may mix two adapters: save one alone")
    if not parts and not replaced:
        raise AdapterError(f"{weights} holds no factors")
    return parts, replaced


def _parameter_path(key: AdapterKey, keys: Iterable[AdapterKey | None], config: AdapterConfig | None) -> str:
    """The module's path; of a parameter that PEFT adapts directly, the parameter's own.

    PEFT nests one wrapper per parameter of a module, in the order in which the model's class defines them, so
    the first lies innermost. Which parameters they are stands in target_parameters.
    """
    if config is None or not config.target_parameters or _is_target_module(key.module, config.target_modules):
        return key.module
    own = {
        target.rpartition(".")[2]
        for target in config.target_parameters
        if f".{key.module}".endswith(f".{target.rpartition('.')[0]}") or "." not in target
    }
    if not own:
        return key.module
    depths = sorted({other.depth for other in keys if other is not None and other.module == key.module}, reverse=True)
    if len(depths) != len(own):
        raise AdapterError(
            f"{key.module} has {len(depths)} pairs of factors for {len(own)} target_parameters, "
            f"{', '.join(sorted(own))}"
        )
    if len(own) > 1 and not own <= set(_PARAMETER_ORDER):
        raise AdapterError(
            f"{key.module} has factors for {', '.join(sorted(own))}; which are whose depends on the order in which "
            f"the model's class defines them, which is known only of {', '.join(_PARAMETER_ORDER)}"
        )
    ordered = sorted(own, key=_PARAMETER_ORDER.index) if len(own) > 1 else list(own)
    return f"{key.module}.{ordered[depths.index(key.depth)]}"


def _is_target_module(module: str, target_modules: Sequence[str] | str | None) -> bool:
    """Whether PEFT adapts the module itself: it is an entry, or ends in `.entry`, or matches the one expression."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(f".{module}".endswith(f".{entry}") for entry in target_modules or ())


def _find_tensor(wanted: str, tensors: Mapping[str, None], flat: Mapping[str, str]) -> str | None:
    for name in (f"{wanted}.weight", wanted):
        if name in tensors:
            return name
    if "." not in wanted and "_" in wanted:
        path = re.sub(r"^lora_[a-z0-9]+_", "", wanted)
        return flat.get(path) or flat.get(wanted)
    alike = [
        name
        for name in tensors
        if any(own.endswith(f".{wanted}") or wanted.endswith(f".{own}") for own in (name.removesuffix(".weight"), name))
    ]
    return alike[0] if len(alike) == 1 else None


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse an adapter on a base that it was not made for.

    Adapters that record no fingerprint pass, unless their configuration says that PEFT changes the base as it
    loads them.

    Raises:
        BaseMismatchError: the fingerprints differ, or the factors belong to a base that PEFT would make.
    """
    recorded = adapter.base_fingerprint
    start = adapter.config.extra.get("init_lora_weights")
    if not recorded and isinstance(start, str) and re.match(_RESIDUALIZING, start):
        raise BaseMismatchError(
            f"{adapter.directory} has init_lora_weights {start!r}: PEFT takes the residual of the base when it loads "
            "this adapter, whose factors belong to that; save it from PEFT with "
            "path_initial_model_for_weight_conversion, or set init_lora_weights to true if the base is the residual"
        )
    if recorded and recorded != (found := base.fingerprint()):
        raise BaseMismatchError(
            f"the adapter {adapter.directory} belongs to another base than {base.directory}: it records "
            f"{recorded[:23]}…, this base is {found[:23]}…; its configuration names "
            f"{adapter.config.base_model_name_or_path}"
        )
