"""SLORA as a method of stock PEFT: importing this module registers it.

    import nlora_surgery.peft_plugin
    model = get_peft_model(model, nlora_surgery.peft_plugin.SLoraConfig(r=64, init_weights="sketch"))
    model = PeftModel.from_pretrained(model, "OUT/adapter")

A LoRA layer of PEFT's carries the adapter as a variant, as DoRA does; what it computes is `training.layers`, what it
starts from is `factor.factorize` with the random stream that `init` gives the module, and what PEFT saves is the
format that `adapter` reads. A configuration that cannot be is a ValueError, as everywhere in PEFT; an adapter that
does not fit its base, or its file, is an AdapterError of ours.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from nlora_surgery.adapter import pattern_for
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.devices import compute_dtype
from nlora_surgery.errors import (
    AdapterError,
    BaseMismatchError,
    CheckpointError,
    MissingExtraError,
    NonFiniteError,
    OptionError,
)
from nlora_surgery.factor import Factors, change_sides, factorize, is_finite, module_generator
from nlora_surgery.options import METHODS, STARTS_AT_ZERO, FactorOptions
from nlora_surgery.surgery.prepare import InitOptions
from nlora_surgery.targets import EXPERT_PARTS
from nlora_surgery.training.layers import (
    Matrix,
    is_conv1d,
    linear_shape,
    low_rank,
    low_rank_change,
)

try:
    from peft import LoraConfig, LoraModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora.layer import Linear, LoraVariant
    from peft.utils import PeftType, register_peft_method

    _ = LoraModel._remap_adapter_state_dict_for_load  # since 0.21, where what is read can be checked
except (ImportError, AttributeError) as error:
    raise MissingExtraError(
        f'the PEFT plugin needs PEFT 0.21 or newer ({error}); run pip install --upgrade "nlora-surgery[peft]"'
    ) from error

__all__ = ["SLoraConfig", "SLoraLinear", "SLoraModel"]

_PARTS: Final = ("lora_A", "lora_N", "lora_B")
_INITIAL: Final = ("lora_A_initial", "lora_N_initial", "lora_B_initial")
_TRAIN: Final = ("nlora", "slora", "inttune")
_WEIGHT_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_NO_EXPERTS: Final = (
    "SLORA adapts modules, and experts that are fused are parameters; leave them out (init --exclude experts), or "
    "adapt them by two matrices: LoraConfig, or of an adapter that init wrote nlora_surgery convert ADAPTER --to lora"
)

# What LoraConfig has that means the same here; all else of it has to stand at its default.
_MEANT: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "r", "rank_pattern", "runtime_config", "target_modules", "use_rslora",
})  # fmt: skip


@dataclass
class SLoraConfig(LoraConfig):  # type: ignore[misc]
    """A three-matrix adapter; see `LoraConfig` for what is not listed here.

    Attributes:
        lora_alpha: `r` by default, so that the scaling is 1.
        init_weights: the method, as `nlora_surgery init --method`, `nystrom` by default. Of an adapter read from
            disk this, `sampling` and `seed` are what is recorded, or None.
        sampling, scale_split: see `options.FactorOptions`; `sampling` is `leading` by default.
        seed: of the sampling, the sketches and the random starts; 0 by default.
        residual: `virtual` subtracts the frozen start in the layer, `none` subtracts nothing; `baked` is for
            adapters that `nlora_surgery init` wrote, on the residual base that it wrote with them. None where the
            start is zero.
        base_fingerprint: of the base that the adapter belongs to, where it is a local directory.
        train: `nlora` and `slora` train all three matrices, `inttune` trains `lora_N` alone.

    Raises:
        ValueError: a value is impossible, contradicts another, or asks for what an SLORA layer does not do.
    """

    lora_alpha: float | None = None
    init_weights: str | None = None
    sampling: str | None = None
    scale_split: str | None = None
    seed: int | None = None
    residual: str | None = "virtual"
    base_fingerprint: str | None = None
    train: str = "nlora"

    def __post_init__(self) -> None:
        # Only what is read from a file names its type, and what belongs to it is about to be loaded from there too.
        self.saved = self.peft_type is not None and self.inference_mode  # type: ignore[has-type]
        super().__post_init__()
        self.peft_type = PeftType("SLORA")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not self.saved:
            self.init_weights = self.init_weights or "nystrom"
            self.sampling = self.sampling or "leading"
            self.seed = self.seed or 0
        if self.init_weights in STARTS_AT_ZERO:
            self.residual = None
        self.check()

    @property
    def factor_options(self) -> FactorOptions:
        """The method and its parameters, defaults filled in."""
        return FactorOptions(self.init_weights or "nystrom", self.sampling or "leading", self.scale_split)  # type: ignore[arg-type]

    def check(self) -> None:
        """Refuse impossible values and contradictions; fields can be set after construction, so PEFT's hooks ask too.

        Raises:
            ValueError: with the field's name, what was found and what is possible.
        """
        if isinstance(self.init_weights, bool):  # PEFT makes it True on the way
            raise ValueError(
                "path_initial_model_for_weight_conversion makes no LoRA of an SLORA adapter; save it without, and run "
                "nlora_surgery convert ADAPTER --to lora --initial START"
            )
        methods = tuple(method for method in METHODS if method != "lora")
        for name, value, known in (
            ("init_weights", self.init_weights or "nystrom", methods),
            ("train", self.train, _TRAIN),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; there are {', '.join(known)}")
        if self.target_parameters:
            raise ValueError(f"target_parameters names {', '.join(sorted(self.target_parameters)[:2])}: {_NO_EXPERTS}")
        plain = LoraConfig()
        for name in {each.name for each in fields(LoraConfig)} - _MEANT:
            value, default = getattr(self, name), getattr(plain, name)
            if (value or None) != (default or None):
                raise ValueError(f"SLORA does nothing with {name}={value!r}; leave it out, or use LoraConfig")
        if self.saved:
            return
        if self.residual == "baked":
            raise ValueError(
                "residual='baked' takes a base that is the residual already: run nlora_surgery init, load the base "
                "that it writes, and its adapter with PeftModel.from_pretrained; or use residual='virtual'"
            )
        if self.residual is None and self.init_weights not in STARTS_AT_ZERO:
            raise ValueError(f"residual=None is for starts at zero, not for {self.init_weights}; use virtual or none")
        try:
            InitOptions(self.r, self.factor_options, self.residual or "none", self.lora_alpha).check()
        except OptionError as error:
            raise ValueError(re.sub(r"--([\w-]+)", lambda name: name[1].replace("-", "_"), str(error))) from error

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, once the configuration is found to be one of SLORA."""
        self.check()
        super().save_pretrained(save_directory, **kwargs)


class _Variant(LoraVariant):  # type: ignore[misc]
    """How a LoRA layer of PEFT's starts, computes and merges with a matrix in the middle."""

    @staticmethod
    def init(module: SLoraLinear, adapter_name: str, config: SLoraConfig, target_name: str = "", **_: Any) -> None:
        module.start(adapter_name, config, target_name)

    @staticmethod
    def forward(module: SLoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        matrices, initial = module.matrices(active_adapter), module.initial(active_adapter)
        scaling = module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        if not initial:
            return result + low_rank(x, matrices, scaling)
        if module.only_core_moves[active_adapter] and not (matrices[0].requires_grad or matrices[2].requires_grad):
            initial = [matrices[0], initial[1], matrices[2]]
        return result + low_rank_change(x, matrices, initial, scaling)

    @staticmethod
    def merge_safe(module: SLoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return module.shifted(orig_weight, active_adapter, 1)

    @staticmethod
    def merge_unsafe(module: SLoraLinear, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(module.shifted(orig_weight, active_adapter, 1))

    @staticmethod
    def unmerge(module: SLoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return module.shifted(orig_weight, active_adapter, -1)  # to the rounding of two sums


class SLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer around an `nn.Linear` or `Conv1D`, with `lora_N` and, for a virtual residual, the frozen start.

    Attributes:
        lora_A, lora_N, lora_B: by adapter, hold `weight (r, in)`, `(r, r)`, `(out, r)`.
        lora_A_initial, lora_N_initial, lora_B_initial: the same as buffers, so that nothing trains them, for the
            adapters with a virtual residual.
        awaited: by adapter, whether its factors are still to be loaded; until then it is no adapter.
        only_core_moves: by adapter, whether IntTune keeps its outer factors equal to their start.
    """

    frozen_peft_weight_names: dict[str, tuple[str, ...]]
    adapter_layer_names = (*Linear.adapter_layer_names, "lora_N")
    other_param_names = (*Linear.other_param_names, *_INITIAL, "awaited", "only_core_moves")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: it is no SLORA adapter.
        """
        if not isinstance(config, SLoraConfig):
            raise ValueError(
                f"{adapter_name!r} is no SLORA adapter, and SLORA layers hold no others; unload them first"
            )
        if not hasattr(self, "lora_N"):  # within PEFT's constructor
            for name in ("lora_N", *_INITIAL):
                setattr(self, name, nn.ModuleDict())
            self.awaited: dict[str, bool] = {}
            self.only_core_moves: dict[str, bool] = {}
            self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> _Variant:
        """What PEFT asks to start, to compute and to merge."""
        return _Variant()

    def start(self, adapter_name: str, config: SLoraConfig, path: str) -> None:
        """Make an adapter's factors: from the base's weight, or room for those that PEFT is about to load."""
        r = self.r[adapter_name]
        virtual, inttune = config.residual == "virtual", config.train == "inttune"
        self.awaited[adapter_name] = config.saved or self.lora_A[adapter_name].weight.is_meta
        if self.awaited[adapter_name]:
            shapes = (r, self.in_features), (self.out_features, r), (r, r)
            factors = Factors(*[torch.empty(shape, dtype=torch.float32) for shape in shapes])  # type: ignore[arg-type]
        else:
            factors = self._factorize(adapter_name, config, path)
        for part in _PARTS:
            value = getattr(factors, part).contiguous()
            getattr(self, part)[adapter_name] = Matrix(value, trained=True)
            if virtual:
                getattr(self, f"{part}_initial")[adapter_name] = Matrix(value.clone(), trained=False)
        if inttune:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: ("lora_A", "lora_B")}
        self.only_core_moves[adapter_name] = virtual and inttune and not self.awaited[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _factorize(self, adapter_name: str, config: SLoraConfig, path: str) -> Factors:
        if self.merged:
            raise ValueError(f"{adapter_name!r} cannot start from a weight that others are merged into; unmerge first")
        weight = self.get_base_layer().weight.detach()
        if not is_finite(weight):
            raise NonFiniteError(
                f"{path}.weight", f"{path}.weight holds NaN or infinity; leave it out of target_modules"
            )
        return factorize(
            weight.T if self.fan_in_fan_out else weight,
            self.r[adapter_name],
            config.factor_options,
            scaling=self.scaling[adapter_name],
            generator=module_generator(config.seed or 0, path),
            dtype=compute_dtype(weight.dtype),
        ).to(torch.float32)

    def matrices(self, adapter_name: str) -> list[Tensor]:
        """`lora_A`, `lora_N`, `lora_B` of an adapter.

        Raises:
            AdapterError: they have not been loaded.
        """
        if self.awaited[adapter_name]:
            raise AdapterError(
                f"adapter {adapter_name!r} was made for a file of factors, and this layer has not had all of its own; "
                "load it with PeftModel.from_pretrained, or give get_peft_model a new SLoraConfig"
            )
        return [getattr(self, part)[adapter_name].weight for part in _PARTS]

    def initial(self, adapter_name: str) -> list[Tensor]:
        """The same of its frozen start; empty without one."""
        return [getattr(self, part)[adapter_name].weight for part in _INITIAL if adapter_name in getattr(self, part)]

    @torch.no_grad()
    def shifted(self, weight: Tensor, adapter_name: str, sign: int) -> Tensor:
        """`weight`, as it is stored, plus `sign` times what an adapter adds to it: one sum, one rounding."""
        dtype = compute_dtype(weight.dtype)
        left, right = self._sides(adapter_name, dtype)
        return torch.addmm(weight.to(dtype), left, right, alpha=sign).to(weight.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight as it is stored, in the adapter's dtype."""
        left, right = self._sides(adapter, compute_dtype(self.get_base_layer().weight.dtype))
        return (left @ right).to(self.lora_B[adapter].weight.dtype)

    def _sides(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scaling = self.scaling[adapter_name]
        initial = self.initial(adapter_name)
        start = Factors.of(initial) if initial else None
        left, right = change_sides(Factors.of(self.matrices(adapter_name)), start, scaling, dtype)
        return (right.T, left.T) if self.fan_in_fan_out else (left, right)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, without PEFT's rounding to the base's dtype: the start is meant in fp32."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name, None)
            if isinstance(held, nn.ModuleDict) and adapter_name in held:
                part = held[adapter_name]
                if not any(parameter.is_meta for parameter in part.parameters()):
                    part.to(device or self.get_base_layer().weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Note which adapters arrive whole; PEFT itself lets missing tensors pass."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.awaited:
            parts = (*_PARTS, *(_INITIAL if name in self.lora_N_initial else ()))
            found: dict[str, Any] = {part: state_dict.get(f"{prefix}{part}.{name}.weight") for part in parts}
            if all(value is not None for value in found.values()):
                self.awaited[name] = False
                self.only_core_moves[name] = (
                    name in self.lora_N_initial
                    and name in self.frozen_peft_weight_names
                    and all(torch.equal(found[side], found[f"{side}_initial"]) for side in ("lora_A", "lora_B"))
                )
            elif any(value is not None for value in found.values()):
                self.only_core_moves[name] = False


class SLoraModel(LoraModel):  # type: ignore[misc]
    """Puts SLORA layers into a model, for `get_peft_model` and `PeftModel`."""

    tuner_layer_cls = SLoraLinear

    def _check_new_adapter_config(self, config: SLoraConfig) -> None:
        """Check the configuration, and that the base is the one that the adapter belongs to.

        Raises:
            ValueError: see `SLoraConfig.check`.
            BaseMismatchError: the base's directory has another fingerprint than the adapter records.
        """
        super()._check_new_adapter_config(config)
        config.check()
        if not config.saved:  # of what is read from a file, every tensor has to find its place
            _refuse_experts(config.target_modules, self.model)
        name = getattr(self.model, "name_or_path", "")
        found = _fingerprint(Path(name)) if name else None
        if not config.saved:
            config.base_fingerprint = found
        elif found and config.base_fingerprint and found != config.base_fingerprint:
            raise BaseMismatchError(
                f"the adapter belongs to another base than {name}: it records {config.base_fingerprint[:23]}…, this "
                f"base is {found[:23]}…; its configuration names {config.base_model_name_or_path}"
            )

    def _create_and_replace(
        self,
        lora_config: SLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Adapt one module, at most at its full rank, which then joins rank_pattern as in `init`."""
        base = target.get_base_layer() if isinstance(target, SLoraLinear) else target
        weight = getattr(base, "weight", None)
        linear = isinstance(base, nn.Linear) or is_conv1d(base)
        if not (linear and type(weight) is nn.Parameter and weight.dtype in _WEIGHT_DTYPES):  # quantized ones are not
            kind = f"{type(base).__module__}.{type(base).__name__}"
            raise ValueError(
                f"{current_key} is a {kind}, its weight a {type(weight).__name__} of {getattr(weight, 'dtype', None)}; "
                "SLORA adapts nn.Linear and Conv1D in fp32, bf16, fp16 and fp64; convolutions PEFT's own LORA does "
                "(nlora_surgery convert ADAPTER --to lora)"
            )
        r = pattern_for(lora_config.rank_pattern, current_key, lora_config.r)
        full = min(linear_shape(base))
        if r > full:
            if pattern_for(lora_config.rank_pattern, current_key, None) is not None:
                raise ValueError(f"rank_pattern gives {current_key} r = {r}, and its weight allows {full} at most")
            lora_config.rank_pattern = {**lora_config.rank_pattern, current_key: full}
            if pattern_for(lora_config.alpha_pattern, current_key, None) is None:  # it keeps the others' scaling
                share = math.sqrt(full / r) if lora_config.use_rslora else full / r
                alpha = lora_config.lora_alpha * share  # type: ignore[operator]
                lora_config.alpha_pattern = {**lora_config.alpha_pattern, current_key: alpha}
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    @staticmethod
    def _create_new_module(
        lora_config: SLoraConfig, adapter_name: str, target: nn.Module, parameter_name: str | None = None, **kwargs: Any
    ) -> SLoraLinear:
        conv1d = is_conv1d(target)
        lora_config.fan_in_fan_out = conv1d
        return SLoraLinear(target, adapter_name, config=lora_config, is_target_conv_1d_layer=conv1d, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Factors at least in fp32, the frozen start with the others; or all in the base's dtype if that is asked."""
        for layer in self.model.modules():
            if isinstance(layer, SLoraLinear) and adapter_name in layer.lora_N:
                for name in (*_PARTS, *_INITIAL):
                    if adapter_name in getattr(layer, name):
                        part = getattr(layer, name)[adapter_name]
                        widened = torch.promote_types(part.weight.dtype, torch.float32)
                        part.to(widened if autocast_adapter_dtype else layer.get_base_layer().weight.dtype)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT mixes `lora_A` with `lora_A` and `lora_B` with `lora_B`.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter knows two matrices and would drop lora_N; activate several adapters at once with "
            "model.base_model.set_adapter([…]), or run nlora_surgery merge"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT does, but nothing of a file may be lost on the way.

        Raises:
            AdapterError: the model has no place for a tensor.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        lost = sorted(remapped.keys() - model.state_dict().keys())
        experts = [name for name in lost if "experts" in name.split(".")]
        if experts:
            raise AdapterError(
                f"{len(experts)} of {len(remapped)} tensors of adapter {adapter_name!r} are those of experts "
                f"({experts[0]}), which are no modules of this model: {_NO_EXPERTS}"
            )
        if lost:
            raise AdapterError(
                f"{len(lost)} of {len(remapped)} tensors of adapter {adapter_name!r} have no place in this model, "
                f"{lost[0]} first; it may be for another model, or its adapter_config.json is not its own"
            )
        return remapped


def _refuse_experts(target_modules: Any, model: nn.Module) -> None:
    """Refuse names of experts that are no modules of a model: PEFT passes over what it does not find.

    Raises:
        ValueError: `target_modules` lists such a name.
    """
    if isinstance(target_modules, str):
        return
    paths = {path for path, _ in model.named_modules()}
    for target in sorted(target_modules or ()):
        expert = "experts" in target.split(".") or target.rpartition(".")[2] in EXPERT_PARTS
        if expert and not any(f".{path}".endswith(f".{target}") for path in paths) and _fused_experts(model):
            raise ValueError(f"target_modules names {target}, and the model has no such module: {_NO_EXPERTS}")


def _fused_experts(model: nn.Module) -> bool:
    """Whether a model has experts that are parameters of three dimensions."""
    return any(
        parameter.ndim == 3 and "experts" in name.split(".") and name.rpartition(".")[2] in EXPERT_PARTS
        for name, parameter in model.named_parameters()
    )


def _fingerprint(directory: Path) -> str | None:
    """Of the checkpoint there, where there is one."""
    try:
        if not directory.is_dir():
            return None
        with Checkpoint.open(directory) as checkpoint:
            return checkpoint.fingerprint()
    except (CheckpointError, OSError):
        return None


def _register() -> None:
    """Make SLORA known to PEFT, once.

    Raises:
        ImportError: PEFT has an SLORA that is not this one.
    """
    if "SLORA" not in PeftType.__members__:
        member = str.__new__(PeftType, "SLORA")
        member._name_ = member._value_ = "SLORA"
        type.__setattr__(PeftType, "SLORA", member)  # past Enum's own, which allows no new members
        PeftType._member_names_.append("SLORA")
        PeftType._member_map_["SLORA"] = PeftType._value2member_map_["SLORA"] = member
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get("SLORA")
    if known is None:
        register_peft_method(name="slora", config_cls=SLoraConfig, model_cls=SLoraModel, prefix="lora_")
    elif known.__module__ != __name__:
        raise ImportError(f"PEFT has an SLORA from {known.__module__} already, which is another method than this one")


_register()
