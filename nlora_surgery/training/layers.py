"""The adapter as a layer around a linear, and the hands that put it on a model and take it off.

    y = base_layer(x) + scaling * lora_B(lora_N(lora_A(dropout(x))))

without `lora_N` for plain LoRA; with a virtual residual the product of the frozen initial factors is subtracted,
so that the first output is the base's own, bit for bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nlora_surgery.adapter import Adapter, tensor_name
from nlora_surgery.devices import compute_dtype
from nlora_surgery.errors import AdapterError, OptionError
from nlora_surgery.factor import Factors, adam_step_norm, change_sides

__all__ = [
    "TRAIN_MODES",
    "AdapterLinear",
    "Matrix",
    "adapter_layers",
    "adapter_tensors",
    "attach",
    "detach",
    "find_modules",
    "first_step",
    "freeze",
    "is_conv1d",
    "linear_shape",
    "load_tensors",
    "low_rank",
    "low_rank_change",
    "merge",
]

# What is trained: the paper's names, of which the first two freeze the same.
TRAIN_MODES: Final = ("nlora", "slora", "inttune", "lora")


def low_rank(x: Tensor, matrices: Sequence[Tensor], scaling: float) -> Tensor:
    """`scaling * lora_B(lora_N(lora_A(x)))`.

    Args:
        x: (..., in), in the dtype of the matrices unless autocast is on.
        matrices: `lora_A (r, in)`, `lora_N (r, r)` if there is one, `lora_B (out, r)`.
        scaling: alpha / r.

    Returns:
        (..., out).
    """
    if len(matrices) == 3 and matrices[0].requires_grad and not torch.is_autocast_enabled(x.device.type):
        product: Tensor = _Frugal.apply(x, *matrices, scaling)  # type: ignore[no-untyped-call]
        return product
    return functional.linear(_inner(x, matrices[:-1], scaling), matrices[-1])


def _inner(x: Tensor, matrices: Sequence[Tensor], scaling: float) -> Tensor:
    for matrix in matrices:
        x = functional.linear(x, matrix)
    return x * scaling if scaling != 1 else x  # here, where it is narrow


class _Frugal(torch.autograd.Function):
    """The product of three matrices with an input, of which only the input is kept for the backward pass.

    autograd would keep `lora_A(x)` and `lora_N(lora_A(x))` besides, for every module. They are narrow, and cheaper to
    make again than to keep. Where `lora_A` is frozen the input need not be kept at all, and this is of no use.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_N: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, lora_A, lora_N, lora_B)
        ctx.scaling = scaling
        return functional.linear(_inner(x, (lora_A, lora_N), scaling), lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The chain rule from the output inwards, each gradient as the formula's own product."""
        x, lora_A, lora_N, lora_B = ctx.saved_tensors
        flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        inner = functional.linear(flat_x, lora_A)
        for_B = flat.T @ _inner(inner, (lora_N,), ctx.scaling) if ctx.needs_input_grad[3] else None
        middle = _inner(flat, (lora_B.T,), ctx.scaling)
        for_N = middle.T @ inner if ctx.needs_input_grad[2] else None
        middle = middle @ lora_N
        for_A = middle.T @ flat_x if ctx.needs_input_grad[1] else None
        for_x = (middle @ lora_A).reshape(x.shape) if ctx.needs_input_grad[0] else None
        return for_x, for_A, for_N, for_B, None


def low_rank_change(x: Tensor, matrices: Sequence[Tensor], initial: Sequence[Tensor], scaling: float) -> Tensor:
    """What training has changed: `low_rank` of the matrices less that of their start, exactly zero where none moved.

    Args:
        x: (..., in).
        matrices: as in `low_rank`.
        initial: their frozen start. Sides that are the very same tensors as in `matrices` (IntTune) are multiplied
            once, around the difference of the cores.
        scaling: alpha / r.

    Returns:
        (..., out).
    """
    if len(matrices) == 3 and matrices[0] is initial[0] and matrices[2] is initial[2]:
        return low_rank(x, (matrices[0], matrices[1] - initial[1], matrices[2]), scaling)
    return low_rank(x, matrices, scaling) - low_rank(x, initial, scaling)


class Matrix(nn.Module):
    """One factor, under the name `weight` that it has on disk; a buffer where it is part of the frozen start."""

    weight: Tensor

    def __init__(self, value: Tensor, *, trained: bool) -> None:
        super().__init__()
        if trained:
            self.weight = nn.Parameter(value)
        else:
            self.register_buffer("weight", value)


class AdapterLinear(nn.Module):
    """A linear with an adapter: its output is the base's plus the low-rank product.

    Attributes:
        base_layer: `nn.Linear`, or transformers' `Conv1D`; frozen by `freeze`, not by itself.
        module: the path under which adapters on disk name it.
        scaling: alpha / r.
        lora_A, lora_N, lora_B: hold `weight (r, in)`, `(r, r)`, `(out, r)`; `lora_N` is None for plain LoRA.
        lora_A_initial, lora_N_initial, lora_B_initial: the same as buffers for a virtual residual, else None.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Factors,
        scaling: float,
        *,
        module: str = "",
        initial: Factors | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Put factors around a linear.

        Args:
            base_layer: the linear, (in → out).
            factors: copied to the linear's device in `dtype`.
            scaling: alpha / r.
            module: path of the linear, as adapters on disk name it.
            initial: the frozen start of a virtual residual.
            dropout: probability, before the product.
            dtype: of the factors, whatever the base's is.

        Raises:
            AdapterError: the factors do not fit the linear.
        """
        super().__init__()
        in_features, out_features = linear_shape(base_layer)
        found = factors.lora_B.shape[0], factors.lora_A.shape[1]
        if found != (out_features, in_features):
            raise AdapterError(
                f"the adapter of {module or 'this layer'} is for a weight (out, in) of {list(found)}, the model's is "
                f"{[out_features, in_features]}"
            )
        self.base_layer = base_layer
        self.module = module
        self.scaling = scaling
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        device = _weight(base_layer).device

        def matrix(value: Tensor, *, trained: bool) -> Matrix:
            return Matrix(value.detach().to(device, dtype, copy=True).contiguous(), trained=trained)

        self.lora_A = matrix(factors.lora_A, trained=True)
        self.lora_N = None if factors.lora_N is None else matrix(factors.lora_N, trained=True)
        self.lora_B = matrix(factors.lora_B, trained=True)
        self.lora_A_initial: Matrix | None = None
        self.lora_N_initial: Matrix | None = None
        self.lora_B_initial: Matrix | None = None
        if initial is not None:
            self.lora_A_initial = matrix(initial.lora_A, trained=False)
            self.lora_N_initial = None if initial.lora_N is None else matrix(initial.lora_N, trained=False)
            self.lora_B_initial = matrix(initial.lora_B, trained=False)
        self._only_core_moves = False

    @property
    def matrices(self) -> list[Tensor]:
        """`lora_A`, `lora_N` if there is one, `lora_B`."""
        return [part.weight for part in (self.lora_A, self.lora_N, self.lora_B) if part is not None]

    @property
    def initial(self) -> list[Tensor]:
        """The same of the frozen start; empty without one."""
        parts = (self.lora_A_initial, self.lora_N_initial, self.lora_B_initial)
        return [part.weight for part in parts if part is not None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out) in the base's dtype; the sum is rounded to it once."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        inner = self.dropout(x)
        matrices, initial = self.matrices, self.initial
        if not torch.is_autocast_enabled(x.device.type):
            inner = inner.to(matrices[0].dtype)
        if not initial:
            return result.add_(low_rank(inner, matrices, self.scaling))
        if self._only_core_moves:
            initial = [matrices[0], initial[1], matrices[2]]
        return result.add_(low_rank_change(inner, matrices, initial, self.scaling))

    def train_only(self, mode: str) -> None:
        """Let gradients flow into what the mode trains and into nothing else of this layer.

        Args:
            mode: one of `TRAIN_MODES`.

        Raises:
            OptionError: the mode does not fit the number of matrices.
        """
        if mode not in TRAIN_MODES:
            raise OptionError(f"--train {mode} is unknown; there are {', '.join(TRAIN_MODES)}")
        if (mode == "lora") != (self.lora_N is None):
            has = "no lora_N" if self.lora_N is None else "a lora_N"
            fitting = "lora" if self.lora_N is None else "nlora, slora or inttune"
            raise OptionError(f"--train {mode} does not fit the adapter, which has {has}; use {fitting}")
        self.base_layer.requires_grad_(False)
        for part in (self.lora_A, self.lora_B):
            part.weight.requires_grad_(mode != "inttune")
        if self.lora_N is not None:
            self.lora_N.weight.requires_grad_(True)
        # Then both products share their sides, and one pass through them does.
        self._only_core_moves = (
            mode == "inttune"
            and self.lora_A_initial is not None
            and self.lora_B_initial is not None
            and torch.equal(self.lora_A.weight, self.lora_A_initial.weight)
            and torch.equal(self.lora_B.weight, self.lora_B_initial.weight)
        )

    def sides(self) -> tuple[Tensor, Tensor]:
        """What the adapter adds to the weight, as `left (out, k) @ right (k, in)`, in fp32 (fp64 for wide factors).

        With a virtual residual k = 2 r: the current product beside the initial one's negative.
        """
        dtype = compute_dtype(_weight(self.base_layer).dtype)
        matrices, initial = ([part.detach() for part in parts] for parts in (self.matrices, self.initial))
        return change_sides(Factors.of(matrices), Factors.of(initial) if initial else None, self.scaling, dtype)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The base's weight with the product added, in its own orientation, in fp32 (fp64 for wide factors)."""
        left, right = self.sides()
        if is_conv1d(self.base_layer):
            left, right = right.T, left.T
        return torch.addmm(_weight(self.base_layer).to(left.dtype), left, right)

    @torch.no_grad()
    def first_step(self) -> float:
        """How far Adam's first step moves the effective weight, over its norm and per unit of the learning rate.

        See `factor.adam_step_norm`. What is trained is what requires gradients.
        """
        core_only = not self.lora_A.weight.requires_grad
        size = float(self.effective_weight().norm())
        return adam_step_norm(Factors.of(self.matrices), self.scaling, core_only=core_only) / size if size else 0.0

    def merge(self) -> nn.Module:
        """Add the product to the base's weight, one sum and one rounding, and return the base."""
        with torch.no_grad():
            _weight(self.base_layer).copy_(self.effective_weight())
        return self.base_layer


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear.

    Raises:
        AdapterError: the layer is none.
    """
    if is_conv1d(layer):
        nx, nf = _weight(layer).shape
        return nx, nf
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    raise AdapterError(f"a {type(layer).__name__} cannot be adapted; expected nn.Linear or Conv1D")


# --- a model and its adapter ---------------------------------------------------------------------------


def attach(
    model: nn.Module, adapter: Adapter, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[AdapterLinear]:
    """Put an adapter on a model, each pair or triple of factors around the linear that it names.

    Args:
        model: holds the linears; changed in place.
        adapter: LoRA or SLORA, with or without a virtual residual.
        dropout: probability, before each product.
        dtype: of the factors in memory.

    Returns:
        The layers, in the adapter's order.

    Raises:
        AdapterError: the model lacks a module, a module is no linear or has another shape, or the adapter has
            what the layer does not compute (convolutions, DoRA, embeddings, biases, replaced weights).
    """
    _refuse_other_parts(adapter)
    convolution = next((name for name in adapter.parts if adapter.kernel(name) is not None), None)
    if convolution is not None:
        raise AdapterError(
            f"{adapter.directory} adapts the convolution {convolution}, which is neither trained nor run here: leave "
            "it out with init's --exclude, or use PEFT with it as LORA (init --format lora, or convert --to lora)"
        )
    layers = []
    for name, path in find_modules(adapter.parts, model, str(adapter.directory)).items():
        layer = AdapterLinear(
            model.get_submodule(path),
            adapter.factors(name),
            adapter.scaling(name),
            module=name,
            initial=adapter.initial(name),
            dropout=dropout,
            dtype=dtype,
        )
        _replace(model, path, layer)
        layers.append(layer)
    return layers


def find_modules(names: Iterable[str], model: nn.Module, owner: str) -> dict[str, str]:
    """Where in a model the modules are that an adapter names.

    Args:
        names: of the modules, as adapters on disk have them.
        model: as transformers builds it; its weights are not looked at.
        owner: whose modules they are, for the message.

    Returns:
        Path in the model by name.

    Raises:
        AdapterError: the model lacks one; if that is an expert, which transformers has as a parameter, the message says
            what can be done.
    """
    modules = dict(model.named_modules())
    found = {name: _find_module(name, modules) for name in names}
    missing = [name for name, path in found.items() if path is None]
    experts = [name for name in missing if "experts" in name.split(".")]
    if experts:
        raise AdapterError(
            f"{len(experts)} of {len(found)} modules of {owner} are experts ({experts[0]}), which transformers fuses "
            "into parameters, and train and generate adapt modules only: leave them out with --exclude experts, train "
            "them in PEFT as two matrices (init, then convert --to lora), or merge what is trained into its base"
        )
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(found)} modules of {owner} are not in the model: "
            f"{', '.join(missing[:5])}{'…' if len(missing) > 5 else ''}"
        )
    return {name: path for name, path in found.items() if path is not None}


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    """The adapted layers of a model: path in the model, and layer."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdapterLinear):
            yield path, layer


def detach(model: nn.Module) -> None:
    """Take the adapter off: every linear is the base's own again."""
    for path, layer in list(adapter_layers(model)):
        _replace(model, path, layer.base_layer)


def merge(model: nn.Module) -> None:
    """Add the adapter to the base's weights and take it off."""
    for path, layer in list(adapter_layers(model)):
        _replace(model, path, layer.merge())


def freeze(model: nn.Module, mode: str) -> tuple[int, int]:
    """Freeze all of a model but what the mode trains.

    Args:
        model: with an adapter on it.
        mode: `nlora` and `slora` train all three matrices, `inttune` trains `lora_N` alone, `lora` both of two.

    Returns:
        Numbers of trainable parameters and of all.

    Raises:
        OptionError: the mode does not fit the adapter.
        AdapterError: no adapter is attached.
    """
    layers = list(adapter_layers(model))
    if not layers:
        raise AdapterError("the model has no adapter; attach one first")
    model.requires_grad_(False)
    for _, layer in layers:
        layer.train_only(mode)
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters)


def first_step(model: nn.Module) -> float:
    """How far Adam's first step moves the adapted weights, relative to them and per unit of the learning rate.

    Args:
        model: with an adapter on it, and frozen but for what is trained (`freeze`).

    Returns:
        The mean over the adapted layers of `AdapterLinear.first_step`.

    Raises:
        AdapterError: no adapter is attached.
    """
    steps = [layer.first_step() for _, layer in adapter_layers(model)]
    if not steps:
        raise AdapterError("the model has no adapter; attach one first")
    return statistics.fmean(steps)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors of every adapted layer, detached, under their names on disk."""
    tensors = {}
    for _, layer in adapter_layers(model):
        for part in ("lora_A", "lora_N", "lora_B"):
            for name in (part, f"{part}_initial"):
                holder = getattr(layer, name)
                if holder is not None:
                    tensors[tensor_name(layer.module, name)] = holder.weight.detach()
    return tensors


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put values from disk into the adapted layers, in place: what `adapter_tensors` gave.

    Raises:
        AdapterError: some are missing, or have another shape.
    """
    for name, own in adapter_tensors(model).items():
        value = tensors.get(name)
        if value is None or value.shape != own.shape:
            found = "missing" if value is None else f"of shape {list(value.shape)}"
            raise AdapterError(f"{name} is {found}, expected shape {list(own.shape)}")
        own.copy_(value)


def _refuse_other_parts(adapter: Adapter) -> None:
    known = {f"{part}{end}" for part in ("lora_A", "lora_N", "lora_B") for end in ("", "_initial")} | {"alpha"}
    for name, parts in adapter.parts.items():
        other = sorted(set(parts) - known)
        if other:
            raise AdapterError(
                f"{adapter.directory} has {', '.join(other)} for {name}, which only a merge can apply: merge it into "
                "its base"
            )
    if adapter.replaced:
        raise AdapterError(
            f"{adapter.directory} replaces {next(iter(adapter.replaced))} (modules_to_save), which only a merge can "
            "apply: merge it into its base"
        )


def _find_module(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of a module, exactly or, where prefixes differ, as the only one that ends like it."""
    if name in modules:
        return name
    alike = [path for path in modules if path.endswith(f".{name}") or (path and name.endswith(f".{path}"))]
    alike = [path for path in alike if isinstance(modules[path], nn.Linear) or is_conv1d(modules[path])]
    return alike[0] if len(alike) == 1 else None


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
