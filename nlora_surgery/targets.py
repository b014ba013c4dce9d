"""Which weights of a checkpoint are adapted, how each is oriented, and at what rank.

Decided from the names on disk, the shapes and config.json; no model is built, but for convolutions, which are adapted
only if they are named: what their shapes do not tell is read from the model's class, without its weights. An
orientation is never guessed from sizes: it is (out, in), except in the families that are known to store (in, out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlora_surgery.checkpoint import Checkpoint, TensorInfo
from nlora_surgery.errors import TargetError, UnsupportedCheckpointError

__all__ = [
    "EXPERT_PARTS",
    "ExpertPiece",
    "Target",
    "choose_targets",
    "describe_targets",
    "expert_pieces",
    "experts_lie_in_out",
    "is_conv1d",
    "is_fused_experts",
    "module_kind",
    "module_path",
    "refuse_quantized",
    "target_modules_for",
    "target_parameters_for",
    "tensor_aliases",
]

# Families whose linears are transformers' Conv1D, which stores (in, out). GPT-BigCode uses the same module
# names with nn.Linear, so names alone do not tell.
_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}

# State-space layers: transformers reads dt_proj.weight, and its fused kernels those of x_proj and out_proj, past any
# adapter around the module. PEFT refuses out_proj for that.
_MAMBA_FAMILIES = {"bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "zamba", "zamba2"}
_READ_PAST_ADAPTERS = {"dt_proj", "out_proj", "x_proj"}

# How PEFT takes fused experts: as (experts, in, out) where the class of transformers says `is_transposed`, else as
# (experts, out, in). Llama 4 lies as (experts, in, out) too, but its class does not say so; then PEFT's lora_A belongs
# to the last dimension there as well, and so does ours.
_EXPERTS_IN_OUT = {"gpt_oss", "openai_privacy_filter", "aria_text"}
_EXPERTS_OUT_IN = {
    "llama4", "llama4_text",
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4", "gemma4_text",
    "glm4_moe", "glm4v_moe", "glm4v_moe_text", "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax", "minimax_m2",
    "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "solar_open",
}  # fmt: skip

# The parameters that transformers fuses, and what they are made of in checkpoints that keep every expert by itself:
# stacked over the experts, and where there are two, side by side along the outputs.
_FUSED_FROM = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

# The last components of the names that experts have, fused or not.
EXPERT_PARTS = {*_FUSED_FROM, *(part for ways in _FUSED_FROM.values() for parts in ways for part in parts)}

# Families whose classes in transformers 5 name their modules otherwise than the checkpoint does: what to replace in the
# path of a tensor for the path of its module. PEFT renames some of these itself, some not.
_VIT = (
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_QWEN_VL = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))
_LLAVA = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_MODULE_NAMES: Mapping[str, Sequence[tuple[str, str]]] = {
    **dict.fromkeys(("vit", "deit", "vit_msn"), _VIT),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("llava", "gemma3", "mistral3", "paligemma", "vipllava"), _LLAVA),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
}
# The same by class, where several classes of one model_type differ: those with a projection keep the prefix.
_CLASS_MODULE_NAMES: Mapping[str, Sequence[tuple[str, str]]] = {
    **dict.fromkeys(("CLIPVisionModel", "SiglipVisionModel"), ((r"^vision_model\.", ""),)),
    **dict.fromkeys(("CLIPTextModel", "SiglipTextModel"), ((r"^text_model\.", ""),)),
}
# The same for experts: their adapters keep the names on disk, which PEFT knows and fuses; what PEFT saves has these.
_EXPERT_NAMES: Mapping[str, Sequence[tuple[str, str]]] = {"mixtral": ((r"\.block_sparse_moe\.", ".mlp."),)}

# One component of a module path each.
_EMBEDDING = re.compile(r".*embed(?!_out).*|wte|wpe|shared|relative_attention_bias|.*position_bias.*")
_HEAD = re.compile(r"lm_head|embed_out|output_projection|proj_out|score|classifier|qa_outputs|cls|predictions|.*_head")
_ROUTER = re.compile(r"router|gate|shared_expert_gate|wg")
_EXPERTS = re.compile(r"(\w+_)?experts")
_EXTRA_BLOCKS = re.compile(r"mtp|mtp_.*|nextn.*")  # multi-token prediction: transformers builds no such layers
_NORM = re.compile(r".*norm.*|ln_?\d*(_f|_\d)?")

_FUSED = {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}  # what fused experts are called

# Tensors that accompany a quantized weight, and whose they are.
_QUANTIZED_SUFFIXES = {
    ".SCB": "bitsandbytes, 8 bits", ".absmax": "bitsandbytes, 4 bits", ".quant_map": "bitsandbytes, 4 bits",
    ".weight_packed": "compressed-tensors", ".weight_scale": "codes and scales", ".weight_scale_inv": "FP8 and scales",
    ".g_idx": "GPTQ", ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", "_blocks": "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One weight that is adapted.

    Attributes:
        tensor: its name on disk.
        module: the path of its module, as adapters name it.
        out_features, in_features: of the linear map, whatever the orientation on disk; a convolution's weight
            (out, channels, *kernel) is taken as the matrix (out, channels · kernel).
        fan_in_fan_out: whether the tensor lies on disk as (in, out).
        r: its rank.
        experts: how many matrices a tensor of three dimensions is; each has factors of its own. None for a matrix.
        kernel: a convolution's size in each of its one to three directions; None for any other.
    """

    tensor: str
    module: str
    out_features: int
    in_features: int
    fan_in_fan_out: bool
    r: int
    experts: int | None = None
    kernel: tuple[int, ...] | None = None


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
        for entry in ("quantization_config", "compression_config"):
            quantization = config.get(entry) if isinstance(config, dict) else None
            if quantization:
                method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
                raise _quantized(checkpoint, str(method), what)
    for suffix, kind in _QUANTIZED_SUFFIXES.items():  # the telling ones first
        name = next((name for name in checkpoint.tensors if name.endswith(suffix)), None)
        if name is not None:
            raise _quantized(checkpoint, f"{kind}: it holds {name!r}", what)
    for info in checkpoint:
        if info.dtype.startswith(("F8_", "F6_", "F4")) and len(info.shape) > 1:
            raise _quantized(checkpoint, f"{info.name!r} is stored as {info.dtype}", what)


def _quantized(checkpoint: Checkpoint, how: str, what: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{checkpoint.directory} is quantized ({how}): its weights cannot be {what} as they lie; "
        "use the checkpoint that it was quantized from"
    )


def choose_targets(
    checkpoint: Checkpoint, r: int, patterns: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Target]:
    """The weights to adapt, in the order of the checkpoint.

    Args:
        checkpoint: a model.
        r: the rank asked for; a module that is smaller gets min(out, in).
        patterns: module names (`q_proj`, `self_attn.q_proj`: whole path components from the end, or if there are
            none such, anywhere: `vision_tower`, `experts`), regular expressions for the whole module path, or
            `all-linear` (every linear but embeddings, routers and head). Empty means every linear weight inside the
            numbered blocks, fused experts included, but routers, layers that transformers does not build, and
            what Mamba's kernels read past an adapter: of its linears in_proj is left. A convolution takes a name
            that its path ends with, a regular expression, or the name of a module that holds no linear.
        exclude: names or regular expressions likewise, taken away again.

    Raises:
        TargetError: a pattern is no regular expression or matches nothing that can be adapted; a convolution is of
            a kind that no adapter fits; or nothing is left.
    """
    linears = {info.name: module_path(checkpoint, info.name) for info in checkpoint if _is_linear(info)}
    modules = {info.name: module_path(checkpoint, info.name)
               for info in checkpoint if info.name in linears or _may_be_convolution(info)}  # fmt: skip
    if not patterns:
        beyond = _layers_beyond(checkpoint)
        chosen = {
            name
            for name, module in linears.items()
            if _in_block(module) and not _special(module) and not beyond(module) and not _is_past(checkpoint, module)
        }
        if not chosen:
            raise TargetError(
                f"{checkpoint.directory} has no linear weight inside numbered blocks; name targets with --targets"
                f"{_could_match(modules.values())}"
            )
    else:
        chosen = set()
        for pattern in patterns:
            if pattern == "all-linear":
                matched = {name for name, module in linears.items() if not _special(module)}
            else:
                matched = _matching(pattern, modules, linears)
            if not matched:
                raise _no_match("targets", pattern, modules)
            chosen |= matched
    for pattern in exclude:
        matched = _matching(pattern, modules, linears)
        if not matched:
            raise _no_match("exclude", pattern, modules)
        chosen -= matched
    if not chosen:
        raise TargetError("--exclude takes away every target; nothing is left to adapt")

    _refuse_other_convolutions(
        checkpoint, {name: modules[name] for name in modules if name in chosen and name not in linears}
    )
    return [_target(checkpoint, info, modules[info.name], r) for info in checkpoint if info.name in chosen]


def _target(checkpoint: Checkpoint, info: TensorInfo, module: str, r: int) -> Target:
    if not _is_linear(info):
        out_features, in_features = info.shape[0], math.prod(info.shape[1:])
        rank = min(r, out_features, in_features)
        return Target(info.name, module, out_features, in_features, False, rank, kernel=info.shape[2:])
    experts = info.shape[0] if len(info.shape) == 3 else None
    transposed = is_conv1d(checkpoint, module)
    if experts is not None:
        known = experts_lie_in_out(checkpoint)
        if known is None:
            raise TargetError(
                f"the experts of {info.name} are fused, and whether model_type {checkpoint.config.get('model_type')!r} "
                "stores them as (experts, out, in) or (experts, in, out) is not known; it will not be guessed: leave "
                "them out with --exclude experts"
            )
        transposed = known
    out_features, in_features = info.shape[:-3:-1] if transposed else info.shape[-2:]
    return Target(info.name, module, out_features, in_features, transposed, min(r, out_features, in_features), experts)


def _refuse_other_convolutions(checkpoint: Checkpoint, modules: Mapping[str, str]) -> None:
    """Refuse what looks like a convolution and is none, or one that an adapter of its weight's shape does not fit.

    Groups cannot be told from shapes, and PEFT gives such a layer an adapter of another form, which cannot be merged;
    dilation and padding modes PEFT's layer leaves out. The model's class knows, where transformers has it. Of a class
    that it has not, weights of four and five dimensions are taken as they are: whatever their groups, a sum of weights
    is right, and PEFT refuses the shapes of an adapter for another number of channels.

    Args:
        checkpoint: the model.
        modules: paths by names of tensors.

    Raises:
        TargetError: which, and why.
    """
    layers = _layers_of_the_class(checkpoint) if modules else {}
    for name, module in modules.items():
        shape = checkpoint.tensors[name].shape
        # Where its path is not found, as under an older name, it is one of those of its shape.
        found = [layers[module]] if module in layers else [layers[path] for path in layers if _alike(path, module)]
        found = found or [layer for layer in layers.values() if tuple(layer.weight.shape) == shape]
        why = next(filter(None, (_misfit(layer, shape) for layer in found)), "")
        if not found and (len(shape) == 3 or shape[1] == 1):
            why = (
                f"of shape {list(shape)} may be a convolution in groups, or none at all, and transformers has no class "
                f"that tells for model_type {checkpoint.config.get('model_type')!r}; it will not be guessed"
            )
        if why:
            raise TargetError(f"{name} {why}: leave it out with --exclude {module}")


def _misfit(layer: Any, shape: tuple[int, ...]) -> str:
    """Why an adapter for a weight of this shape would not fit a layer; empty if it would."""
    from torch import nn

    if type(layer) not in {nn.Conv1d, nn.Conv2d, nn.Conv3d} or tuple(layer.weight.shape) != shape:
        return f"belongs to a {type(layer).__name__}, which is no plain convolution"
    if layer.groups > 1:
        return f"is of a convolution in {layer.groups} groups, whose adapter PEFT shapes otherwise and cannot merge"
    if set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        return (
            f"is of a convolution with dilation {list(layer.dilation)} and padding of {layer.padding_mode}, which "
            "PEFT's layer for its adapter does not have"
        )
    return ""


def _alike(path: str, module: str) -> bool:
    return path.endswith(f".{module}") or module.endswith(f".{path}")


def _layers_of_the_class(checkpoint: Checkpoint) -> dict[str, Any]:
    """The layers with a weight of more than two dimensions in the class that transformers builds, by path.

    Without memory for any weight. Empty if transformers has no such class.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(checkpoint.directory), trust_remote_code=False)
        named: Any = getattr(transformers, _class_name(checkpoint), None)
        known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        with torch.device("meta"):
            model: Any = named(config) if known else transformers.AutoModel.from_config(config)
    except Exception:  # whatever a configuration that it does not know makes it raise
        return {}
    weights = ((path, module, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {path: module for path, module, weight in weights if torch.is_tensor(weight) and weight.ndim > 2}


def module_path(checkpoint: Checkpoint, tensor: str) -> str:
    """The path of a tensor's module in the class that transformers builds, which is what adapters name.

    Mostly the tensor's own name; a few families are stored under older names.
    """
    return _renamed(tensor, _module_names(checkpoint)).removesuffix(".weight")


def tensor_aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors whose names in transformers' classes are others than on disk: name on disk by that name."""
    family = str(checkpoint.config.get("model_type"))
    rules = (*_module_names(checkpoint), *_EXPERT_NAMES.get(family, ()))
    renamed = {_renamed(name, rules): name for name in checkpoint.tensors} if rules else {}
    return {alias: name for alias, name in renamed.items() if alias not in checkpoint.tensors}


def _module_names(checkpoint: Checkpoint) -> Sequence[tuple[str, str]]:
    by_family = _MODULE_NAMES.get(str(checkpoint.config.get("model_type")), ())
    return (*by_family, *_CLASS_MODULE_NAMES.get(_class_name(checkpoint), ()))


def _class_name(checkpoint: Checkpoint) -> str:
    """That of transformers, by config.json; empty where it names none."""
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


def is_conv1d(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a linear's weight lies on disk as (in, out): transformers' Conv1D, in the families that use it."""
    return bool(_families(checkpoint) & _CONV1D_FAMILIES) and module.rpartition(".")[2] in _CONV1D_MODULES


def is_fused_experts(info: TensorInfo) -> bool:
    """Whether a tensor is a stack of experts' weights, of three dimensions, experts first."""
    parts = info.name.removesuffix(".weight").split(".")
    return len(info.shape) == 3 and parts[-1] in _FUSED and any(_EXPERTS.fullmatch(part) for part in parts[:-1])


def experts_lie_in_out(checkpoint: Checkpoint) -> bool | None:
    """Whether PEFT takes fused experts as (experts, in, out) rather than (experts, out, in); None if unknown."""
    families = _families(checkpoint)
    if families & _EXPERTS_IN_OUT:
        return True
    return False if families & _EXPERTS_OUT_IN else None


def _families(checkpoint: Checkpoint) -> set[str]:
    """The model_type of the whole, and of the parts that may hold the layers."""
    parts = [checkpoint.config, *(checkpoint.config.get(part) for part in ("text_config", "decoder"))]
    return {str(config.get("model_type")) for config in parts if isinstance(config, dict)}


@dataclass(frozen=True, slots=True)
class ExpertPiece:
    """Where one expert's share of a fused parameter lies in a checkpoint that keeps every expert by itself.

    Attributes:
        tensor: its name on disk.
        expert: its number.
        part, parts: it is the `part`-th of so many equal shares of the fused outputs (gate and up).
    """

    tensor: str
    expert: int
    part: int
    parts: int


def expert_pieces(checkpoint: Checkpoint, parameter: str) -> list[ExpertPiece]:
    """The tensors that transformers fuses into a parameter as it loads a checkpoint of per-expert matrices.

    Args:
        checkpoint: the model.
        parameter: `model.layers.0.mlp.experts.gate_up_proj`. The block around the experts may have another name on
            disk (`block_sparse_moe`).

    Returns:
        One for each expert and part; empty if the checkpoint has no such tensors, or not all of one kind.
    """
    path = parameter.split(".")
    if len(path) < 3 or path[-2] != "experts" or path[-1] not in _FUSED_FROM:
        return []
    layer = "".join(f"{part}." for part in path[:-3])
    inside = [name for name in checkpoint.tensors if name.startswith(layer)]
    for parts in _FUSED_FROM[path[-1]]:
        expression = re.compile(rf"\w+\.experts\.(\d+)\.({'|'.join(parts)})\.weight")
        found = [(name, match) for name in inside if (match := expression.fullmatch(name, len(layer)))]
        pieces = [ExpertPiece(name, int(match[1]), parts.index(match[2]), len(parts)) for name, match in found]
        if pieces and len(pieces) == len(parts) * (1 + max(piece.expert for piece in pieces)):
            return pieces
    return []


def target_parameters_for(parameters: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """The shortest PEFT `target_parameters` list that selects these fused experts and no others.

    PEFT adapts a parameter whose path is an entry or ends in `.entry`.
    """
    chosen = set(parameters)
    short = {".".join(parameter.rsplit(".", 2)[-2:]) for parameter in chosen}
    selected = {name for name in checkpoint.tensors if name.endswith(tuple(f".{entry}" for entry in short))}
    return sorted(short if selected == chosen else chosen)


def describe_targets(checkpoint: Checkpoint, targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Targets grouped over layers and experts by their names on disk, as JSON values, in the order of their first ones.

    Args:
        checkpoint: the model.
        targets: of it.

    Returns:
        For each group `path` with the numbers that occur (`model.layers.{0…31}.mlp.down_proj`), `kind`,
        `in_features`, `out_features`, `r`, `experts` (how many matrices each tensor is, or None), `kernel` (a
        convolution's sizes, or None; they count into `in_features`), `count` of tensors,
        their `parameters` and `size_bytes`, and what an adapter has for them: `lora_parameters`, `slora_parameters`.
    """
    groups: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets:
        path = re.sub(r"(?<![^.])\d+(?![^.])", "{}", target.tensor.removesuffix(".weight"))
        key = path, target.out_features, target.in_features, target.r, target.experts, target.kernel
        groups.setdefault(key, []).append(target)
    described = []
    for (path, out_features, in_features, r, experts, kernel), members in groups.items():
        numbers = [[int(part) for part in member.tensor.split(".") if part.isdigit()] for member in members]
        spans = [_span(sorted(set(column))) for column in zip(*numbers, strict=True)]
        matrices = len(members) * (experts or 1)
        sides = matrices * r * (out_features + in_features)
        described.append(
            {
                "path": path.format(*spans),
                "kind": module_kind(members[0].tensor.removesuffix(".weight")),
                "in_features": in_features,
                "out_features": out_features,
                "r": r,
                "experts": experts,
                "kernel": None if kernel is None else list(kernel),
                "count": len(members),
                "parameters": matrices * out_features * in_features,
                "size_bytes": sum(checkpoint.tensors[member.tensor].size_bytes for member in members),
                "lora_parameters": sides,
                "slora_parameters": sides + matrices * r * r,
            }
        )
    return described


def _span(numbers: Sequence[int]) -> str:
    """`7`, `{0…31}`, `{0…3,5}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}" for run in runs) + "}"


def target_modules_for(modules: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """The shortest PEFT `target_modules` list that selects these modules and no others.

    PEFT adapts a module whose path is an entry or ends in `.entry`. So for each module that is the shortest end of
    its path with which no other module of the checkpoint ends.
    """
    chosen = set(modules)
    others = {module_path(checkpoint, name).removesuffix(".bias") for name in checkpoint.tensors} - chosen
    taken = {end for module in others for end in _ends(module)}
    return sorted({next((end for end in _ends(module) if end not in taken), module) for module in chosen})


def _ends(path: str) -> Iterator[str]:
    """`q_proj`, `self_attn.q_proj`, … up to the whole path."""
    position = len(path)
    while position > 0:
        position = path.rfind(".", 0, position)
        yield path[position + 1 :]


def _is_linear(info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a linear map, or a stack of experts' weights."""
    if not all(info.shape) or info.torch_dtype is None:
        return False
    if len(info.shape) == 3:
        return is_fused_experts(info)
    parts = info.name.removesuffix(".weight").split(".")
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        return False
    return not any(_EMBEDDING.fullmatch(part) for part in parts) and not _NORM.fullmatch(parts[-1])


def _may_be_convolution(info: TensorInfo) -> bool:
    """Whether a tensor has the name and the dimensions of a convolution's weight, and is no stack of experts."""
    parts = info.name.removesuffix(".weight").split(".")
    return (
        info.name.endswith(".weight")
        and 3 <= len(info.shape) <= 5
        and all(info.shape)
        and info.torch_dtype is not None
        and not any(_EXPERTS.fullmatch(part) for part in parts)
    )


def _in_block(module: str) -> bool:
    return any(part.isdigit() for part in module.split(".")[:-1])


def _is_past(checkpoint: Checkpoint, module: str) -> bool:
    """Whether the weight would be read past its adapter."""
    return bool(_families(checkpoint) & _MAMBA_FAMILIES) and module.rpartition(".")[2] in _READ_PAST_ADAPTERS


def _layers_beyond(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Whether a module lies in layers that transformers does not build: for multi-token prediction.

    They have a name of their own, or go on counting where the model's layers end.
    """
    configs = [
        config for config in (checkpoint.config, checkpoint.config.get("text_config")) if isinstance(config, dict)
    ]
    ends = [config.get("num_hidden_layers") for config in configs if config.get("num_nextn_predict_layers")]
    end = next((end for end in ends if isinstance(end, int)), None)

    def beyond(module: str) -> bool:
        if any(_EXTRA_BLOCKS.fullmatch(part) for part in module.split(".")):
            return True
        layer = re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.", module)
        return end is not None and layer is not None and int(layer[1]) >= end

    return beyond


def _special(module: str) -> bool:
    """A head or a router: linear, but not adapted unless it is named."""
    parts = module.split(".")
    return bool(_ROUTER.fullmatch(parts[-1])) or any(_HEAD.fullmatch(part) for part in parts if not _in_block(module))


def _matching(pattern: str, modules: Mapping[str, str], linears: Container[str]) -> set[str]:
    """Names of the tensors that a pattern means, by the paths of their modules or by their own names on disk.

    A name that stands for all within it stands for the linears, if there are any.
    """
    paths = [(name, path) for name, module in modules.items() for path in {module, name.removesuffix(".weight")}]
    by_name = {name for name, path in paths if f".{path}".endswith(f".{pattern}")}
    if not by_name:
        inside = {name for name, path in paths if f".{pattern}." in f".{path}."}
        by_name = {name for name in inside if name in linears} or inside
    if by_name or re.fullmatch(r"[\w.-]+", pattern):
        return by_name
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise TargetError(f"{pattern!r} is neither a module name nor a regular expression: {error}") from error
    return {name for name, path in paths if expression.fullmatch(path)}


def _no_match(option: str, pattern: str, modules: Mapping[str, str]) -> TargetError:
    could = _could_match(modules.values())
    return TargetError(f"--{option} {pattern} matches no linear weight or convolution{could}")


def _could_match(modules: Iterable[str]) -> str:
    kinds: dict[str, Any] = dict.fromkeys(sorted({module_kind(module) for module in modules}))
    listed = ", ".join(list(kinds)[:40])
    return f"; there are: {listed}" if kinds else "; the checkpoint has no linear weights at all"
