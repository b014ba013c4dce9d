"""Which weights of a checkpoint are adapted, how each is oriented, and at what rank.

Decided from the names on disk, the shapes and config.json; no model is built. An orientation is never guessed
from sizes: it is (out, in), except in the model families that are known to store (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlora_surgery.checkpoint import Checkpoint, TensorInfo
from nlora_surgery.errors import TargetError, UnsupportedCheckpointError

__all__ = [
    "Target",
    "choose_targets",
    "experts_lie_in_out",
    "is_conv1d",
    "module_kind",
    "refuse_quantized",
    "target_modules_for",
]

# Families whose linears are transformers' Conv1D, which stores (in, out). GPT-BigCode uses the same module
# names with nn.Linear, so names alone do not tell.
_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}

# Families whose experts are fused into (experts, in, out) tensors, and into (experts, out, in) ones.
_EXPERTS_IN_OUT = {"gpt_oss", "llama4", "llama4_text"}
_EXPERTS_OUT_IN = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"}

# One component of a module path each.
_EMBEDDING = re.compile(r".*embed(?!_out).*|wte|wpe|shared|relative_attention_bias|.*position_bias.*")
_HEAD = re.compile(r"lm_head|embed_out|output_projection|score|classifier|qa_outputs|cls|predictions|.*_head")
_ROUTER = re.compile(r"router|gate|shared_expert_gate|wg")
_NORM = re.compile(r".*norm.*|ln_?\d*(_f|_\d)?")

# Tensors that accompany a quantized weight.
_QUANTIZED_SUFFIXES = (
    ".weight_scale", ".weight_scale_inv", ".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map",
    ".weight_packed", "_blocks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One weight that is adapted.

    Attributes:
        tensor: its name on disk.
        module: the path of its module, as adapters name it.
        out_features, in_features: of the linear map, whatever the orientation on disk.
        fan_in_fan_out: whether the tensor lies on disk as (in, out).
        r: its rank.
    """

    tensor: str
    module: str
    out_features: int
    in_features: int
    fan_in_fan_out: bool
    r: int


def module_kind(module: str) -> str:
    """What a module is called in every layer: the path after the last layer number, `self_attn.q_proj`."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else module


def refuse_quantized(checkpoint: Checkpoint, what: str = "factored") -> None:
    """Refuse a checkpoint whose weights are stored as codes and scales.

    Args:
        checkpoint: any.
        what: cannot be done with it, for the message.

    Raises:
        UnsupportedCheckpointError: config.json has a quantization_config, or a tensor is such a companion.
    """
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        if quantization:
            method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
            raise UnsupportedCheckpointError(
                f"{checkpoint.directory} is quantized ({method}): its weights cannot be {what} as they lie; "
                "use the checkpoint that it was quantized from"
            )
    for name in checkpoint.tensors:
        if name.endswith(_QUANTIZED_SUFFIXES):
            raise UnsupportedCheckpointError(
                f"{checkpoint.directory} is quantized (it holds {name!r}): its weights cannot be {what} as they "
                "lie; use the checkpoint that it was quantized from"
            )


def choose_targets(
    checkpoint: Checkpoint, r: int, patterns: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Target]:
    """The weights to adapt, in the order of the checkpoint.

    Args:
        checkpoint: a model.
        r: the rank asked for; a module that is smaller gets min(out, in).
        patterns: module names (`q_proj`, `self_attn.q_proj`: whole path components from the end), regular
            expressions for the whole module path, or `all-linear` (every linear but embeddings and head).
            Empty means every linear weight inside the numbered blocks but routers.
        exclude: names or regular expressions likewise, taken away again.

    Raises:
        TargetError: a pattern is no regular expression or matches nothing that can be adapted; or nothing
            is left.
    """
    linears = [info for info in checkpoint if _is_linear(info)]
    modules = {info.name: info.name.removesuffix(".weight") for info in linears}
    if not patterns:
        chosen = {name for name, module in modules.items() if _in_block(module) and not _special(module)}
        if not chosen:
            raise TargetError(
                f"{checkpoint.directory} has no linear weight inside numbered blocks; name targets with --targets"
                f"{_could_match(modules.values())}"
            )
    else:
        chosen = set()
        for pattern in patterns:
            if pattern == "all-linear":
                matched = {name for name, module in modules.items() if not _special(module)}
            else:
                matched = _matching(pattern, modules)
            if not matched:
                raise TargetError(f"--targets {pattern} matches no linear weight{_could_match(modules.values())}")
            chosen |= matched
    for pattern in exclude:
        matched = _matching(pattern, modules)
        if not matched:
            raise TargetError(f"--exclude {pattern} matches no linear weight{_could_match(modules.values())}")
        chosen -= matched
    if not chosen:
        raise TargetError("--exclude takes away every target; nothing is left to adapt")

    targets = []
    for info in linears:
        if info.name not in chosen:
            continue
        module = modules[info.name]
        transposed = is_conv1d(checkpoint, module)
        out_features, in_features = reversed(info.shape) if transposed else info.shape
        rank = min(r, out_features, in_features)
        targets.append(Target(info.name, module, out_features, in_features, transposed, rank))
    return targets


def is_conv1d(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a linear's weight lies on disk as (in, out): transformers' Conv1D, in the families that use it."""
    family = str(checkpoint.config.get("model_type")) in _CONV1D_FAMILIES
    return family and module.rpartition(".")[2] in _CONV1D_MODULES


def experts_lie_in_out(checkpoint: Checkpoint) -> bool | None:
    """Whether fused experts lie on disk as (experts, in, out) rather than (experts, out, in); None if unknown."""
    texts = (checkpoint.config, checkpoint.config.get("text_config") or {})
    families = {str(config.get("model_type")) for config in texts if isinstance(config, dict)}
    if families & _EXPERTS_IN_OUT:
        return True
    return False if families & _EXPERTS_OUT_IN else None


def target_modules_for(modules: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """The shortest PEFT `target_modules` list that selects these modules and no others.

    PEFT adapts a module whose path is an entry or ends in `.entry`. Last components do if no other module of
    the checkpoint ends so; otherwise whole paths.
    """
    chosen = set(modules)
    everything = {name.rpartition(".")[0] for name in checkpoint.tensors}
    leaves = {module.rpartition(".")[2] for module in chosen}
    selected = {module for module in everything if module.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == chosen else chosen)


def _is_linear(info: TensorInfo) -> bool:
    if len(info.shape) != 2 or not all(info.shape) or info.torch_dtype is None or not info.name.endswith(".weight"):
        return False
    parts = info.name.removesuffix(".weight").split(".")
    return not any(_EMBEDDING.fullmatch(part) for part in parts) and not _NORM.fullmatch(parts[-1])


def _in_block(module: str) -> bool:
    return any(part.isdigit() for part in module.split(".")[:-1])


def _special(module: str) -> bool:
    """A head or a router: linear, but not adapted unless it is named."""
    parts = module.split(".")
    return bool(_ROUTER.fullmatch(parts[-1])) or any(_HEAD.fullmatch(part) for part in parts if not _in_block(module))


def _matching(pattern: str, modules: Mapping[str, str]) -> set[str]:
    by_name = {name for name, module in modules.items() if module == pattern or module.endswith(f".{pattern}")}
    if by_name or re.fullmatch(r"[\w.-]+", pattern):
        return by_name
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise TargetError(f"{pattern!r} is neither a module name nor a regular expression: {error}") from error
    return {name for name, module in modules.items() if expression.fullmatch(module)}


def _could_match(modules: Iterable[str]) -> str:
    kinds: dict[str, Any] = dict.fromkeys(sorted({module_kind(module) for module in modules}))
    listed = ", ".join(list(kinds)[:40])
    return f"; there are: {listed}" if kinds else "; the checkpoint has no linear weights at all"
