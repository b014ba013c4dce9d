"""Tiny random models and adapters for tests, written by transformers, PEFT and safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

__all__ = [
    "MODELS",
    "adapter_tensors",
    "checkpoint_tensors",
    "edit_config",
    "edit_tensors",
    "make_adapter",
    "peft_merge",
    "random_factors",
    "save_model",
    "write_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {**_LLAMA, "num_hidden_layers": 1, "intermediate_size": 24, "head_dim": 8, "num_local_experts": 4}

# Llama is saved in several shards, GPT-2 has Conv1D (square, too) and a tied head, GPT-OSS and Llama 4 keep their
# experts fused in three dimensions; of GPT-OSS the down projection is square in the second kind.
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, attention_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**{**_LLAMA, "tie_word_embeddings": True})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**_EXPERTS)),
    "gpt-oss-square": lambda: GptOssForCausalLM(GptOssConfig(**{**_EXPERTS, "intermediate_size": 32})),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**_EXPERTS, intermediate_size_mlp=24)),
}


def save_model(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of `MODELS`, in shards of 40 kB, every parameter of it random and none zero."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(directory, max_shard_size=40_000)
    return directory


def make_adapter(base: Path, out: Path, *, seed: int = 0, **config: Any) -> None:
    """Save an adapter that PEFT makes for a base, every trainable parameter of it random.

    Args:
        base: a model's directory.
        out: the adapter's.
        seed: of its numbers.
        config: of PEFT's `LoraConfig`; r is 4 and lora_alpha 6 by default.
    """
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
            if "magnitude" in name:  # a length, which stays positive
                parameter.mul_(1 + noise)
            else:
                parameter.add_(noise)
    model.save_pretrained(out)


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype, *, autocast: bool = False) -> dict[str, Tensor]:
    """The state dict of stock PEFT's `merge_and_unload`, all of it loaded and computed in `dtype`.

    With `autocast`, PEFT's default, a 16-bit adapter is widened to fp32. In fp64 the result is the truth to within
    some 2^-50: every stored number is an fp64 number.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    wrapped = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=autocast)
    return {name: tensor.detach().clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, **config: Any
) -> Path:
    """Write an adapter's directory: `peft_type` LORA, r 4, lora_alpha 6 unless `config` says otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}
    (directory / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    save_file(dict(tensors), directory / WEIGHTS, dict(metadata or {"format": "pt"}))
    return directory


def adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, read by the safetensors library."""
    return load_file(directory / WEIGHTS)


def checkpoint_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of every shard that a directory holds, read by the safetensors library."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change an adapter's tensors; `change` edits the dictionary in place."""
    tensors = adapter_tensors(directory)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    """Set entries of an adapter's configuration."""
    path = directory / CONFIG
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(fields), encoding="utf-8")


def random_factors(
    out_features: int, in_features: int, r: int = 4, *, core: bool = False, seed: int = 0
) -> list[Tensor]:
    """Random lora_A, lora_B and, if asked for, lora_N."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(r, in_features), (out_features, r), *([(r, r)] if core else [])]
    return [torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape) / min(shape)) for shape in shapes]
