"""An adapter: its configuration, its factors by module, its two formats on disk.

A three-matrix adapter has `peft_type: "SLORA"`, which stock PEFT refuses loudly; a two-matrix one is a plain
PEFT LoRA directory. Both hold `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nlora_surgery.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, FileLayout, plan_file, read_json
from nlora_surgery.errors import AdapterError, BaseMismatchError, CheckpointError
from nlora_surgery.factor import Factors

__all__ = [
    "FINGERPRINT_KEY",
    "Adapter",
    "AdapterConfig",
    "ModuleShape",
    "check_base",
    "pattern_for",
    "plan_adapter_file",
    "task_type_of",
    "tensor_name",
]

FINGERPRINT_KEY = "base_fingerprint"

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_[ANB](?:_initial)?)(?:\.default)?\.weight")
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
    architectures = config.get("architectures") or [""]
    return next((task for suffix, task in _TASKS if str(architectures[0]).endswith(suffix)), None)


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
        module: its path.
        out_features, in_features: of the linear map.
        r: its rank.
    """

    module: str
    out_features: int
    in_features: int
    r: int

    def parts(self, *, three_matrix: bool, initial: bool = False) -> dict[str, tuple[int, int]]:
        """Shape of each factor, by part; `initial` adds the frozen start of each."""
        shapes = {"lora_A": (self.r, self.in_features)}
        if three_matrix:
            shapes["lora_N"] = (self.r, self.r)
        shapes["lora_B"] = (self.out_features, self.r)
        if initial:
            shapes |= {f"{part}_initial": shape for part, shape in shapes.items()}
        return shapes


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
    tensors = [
        (tensor_name(module.module, part), dtype, shape)
        for module in modules
        for part, shape in module.parts(three_matrix=three_matrix, initial=initial).items()
    ]
    return plan_file(name, tensors, {"format": "pt", **(metadata or {})})


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`, in PEFT's names.

    Attributes:
        peft_type: `SLORA` with a `lora_N`, else `LORA`.
        r, lora_alpha: the defaults; `rank_pattern` and `alpha_pattern` hold what differs, by module.
        residual: `baked`, `virtual` or `none` for an adapter of ours whose start is not zero, else None.
        base_fingerprint: of the base that the adapter belongs to (see `Checkpoint.fingerprint`).
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
        if self.peft_type == "SLORA":
            fields |= {"residual": self.residual, FINGERPRINT_KEY: self.base_fingerprint}
        return json.dumps({**fields, **self.extra}, indent=2, sort_keys=True) + "\n"

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
        if kind not in {"LORA", "SLORA"}:
            raise AdapterError(f"{path} has peft_type {kind!r}; known are LORA and SLORA")
        r, alpha = values.get("r"), values.get("lora_alpha")
        if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
            raise AdapterError(
                f"{path} has r = {r!r} and lora_alpha = {alpha!r}; expected a positive integer and a number"
            )
        known = {name for name in cls.__dataclass_fields__ if name != "extra"}
        for pattern in ("rank_pattern", "alpha_pattern"):
            if not isinstance(values.get(pattern) or {}, dict):
                raise AdapterError(f"{path} has a {pattern} that is no map")
            values[pattern] = values.get(pattern) or {}
        values["use_rslora"] = bool(values.get("use_rslora"))
        values["fan_in_fan_out"] = bool(values.get("fan_in_fan_out"))
        fields = {name: value for name, value in values.items() if name in known}
        return cls(**fields, extra={name: value for name, value in values.items() if name not in known})


def pattern_for(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    r"""PEFT's lookup in rank_pattern and alpha_pattern: the first key that the module's path ends with.

    A key is a regular expression that must match from a path component on: `(.*\.)?(key)$`.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


class Adapter:
    """An adapter on disk, its factors read when asked for.

    Attributes:
        directory: where it lies.
        config: its configuration.
        parts: for each adapted module, the tensor name of each part that it has.
        file: the opened `adapter_model.safetensors`.
    """

    def __init__(
        self, directory: Path, config: AdapterConfig, file: Checkpoint, parts: dict[str, dict[str, str]]
    ) -> None:
        self.directory = directory
        self.config = config
        self.file = file
        self.parts = parts

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Adapter:
        """Open an adapter directory.

        Raises:
            AdapterError: configuration or weights are missing, damaged, pickled, hold keys that are no
                factor, lack one of a pair, or disagree in shape.
        """
        directory = Path(directory)
        config = AdapterConfig.read(directory)
        weights = directory / ADAPTER_WEIGHTS
        if not weights.exists():
            if (directory / "adapter_model.bin").exists():
                raise AdapterError(
                    f"{directory} has its weights pickled (adapter_model.bin), which can run code when read; load "
                    "it with PEFT and save it again as safetensors"
                )
            raise AdapterError(f"{directory} has no {ADAPTER_WEIGHTS}; it is no whole adapter")
        try:
            file = Checkpoint.open_file(weights)
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        parts: dict[str, dict[str, str]] = {}
        for name in file.tensors:
            match = _KEY.fullmatch(name)
            if match is None:
                raise AdapterError(f"{weights} holds {name!r}, which is no factor of a low-rank adapter")
            parts.setdefault(match["module"], {})[match["part"]] = name
        if not parts:
            raise AdapterError(f"{weights} holds no factors")
        adapter = cls(directory, config, file, parts)
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

    def shape(self, module: str) -> ModuleShape:
        """Shapes of a module's factors, from its tensors."""
        r, in_features = self.file.tensors[self.parts[module]["lora_A"]].shape
        out_features = self.file.tensors[self.parts[module]["lora_B"]].shape[0]
        return ModuleShape(module, out_features, in_features, r)

    def scaling(self, module: str) -> float:
        """Alpha / r of a module."""
        return self.config.scaling(module, self.shape(module).r)

    def factors(self, module: str) -> Factors:
        """The factors of a module, as views of the file."""
        return self._factors(module, "")

    def initial(self, module: str) -> Factors | None:
        """The frozen start of a virtual residual, or None if there is none."""
        return self._factors(module, "_initial") if "lora_A_initial" in self.parts[module] else None

    def _factors(self, module: str, suffix: str) -> Factors:
        parts = self.parts[module]
        lora_N = parts.get(f"lora_N{suffix}")
        return Factors(
            self.file.tensor(parts[f"lora_A{suffix}"]),
            self.file.tensor(parts[f"lora_B{suffix}"]),
            None if lora_N is None else self.file.tensor(lora_N),
        )

    def _check(self, module: str) -> None:
        parts = self.parts[module]
        shapes = {part: self.file.tensors[name].shape for part, name in parts.items()}
        for suffix in ("", "_initial"):
            present = {part for part in shapes if part.endswith(suffix) and ("_initial" in part) == bool(suffix)}
            if not present:
                continue
            for needed in (f"lora_A{suffix}", f"lora_B{suffix}"):
                if needed not in shapes:
                    raise AdapterError(f"{self.directory}: module {module} lacks its {needed}")
            sides = shapes[f"lora_A{suffix}"], shapes[f"lora_B{suffix}"]
            if any(len(shape) != 2 for shape in sides) or sides[0][0] != sides[1][1]:
                raise AdapterError(
                    f"{self.directory}: module {module} has lora_A {list(sides[0])} and lora_B {list(sides[1])}; "
                    "expected (r, in) and (out, r)"
                )
            r = sides[0][0]
            core = shapes.get(f"lora_N{suffix}", (r, r))
            if core != (r, r):
                raise AdapterError(f"{self.directory}: module {module} has lora_N {list(core)} at rank {r}")
            if not suffix and (wanted := pattern_for(self.config.rank_pattern, module, self.config.r)) != r:
                raise AdapterError(
                    f"{self.directory}: module {module} has rank {r} in its tensors, {wanted} in {ADAPTER_CONFIG}"
                )
        if "lora_A" not in shapes:
            raise AdapterError(f"{self.directory}: module {module} has an initial factor but no lora_A")


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse an adapter on a base that it was not made for.

    Adapters that record no fingerprint pass.

    Raises:
        BaseMismatchError: the fingerprints differ.
    """
    recorded = adapter.base_fingerprint
    if recorded and recorded != (found := base.fingerprint()):
        raise BaseMismatchError(
            f"the adapter {adapter.directory} belongs to another base than {base.directory}: it records "
            f"{recorded[:23]}…, this base is {found[:23]}…; its configuration names "
            f"{adapter.config.base_model_name_or_path}"
        )
