"""A checkpoint of TinyLlama-1.1B's shapes with random weights, of any depth; and an adapter for it.

Timing needs the sizes of a real model, not its knowledge. The weights are normal with the standard deviation
of trained ones, plus a few directions of falling strength, so that the spectra are not flat.

    python -m benchmarks.synthetic DIR --layers 22
    python -m benchmarks.synthetic DIR --layers 22 --lora 64
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

HIDDEN: Final = 2048
INTERMEDIATE: Final = 5632
HEADS: Final = 32
KEY_VALUE_HEADS: Final = 4
VOCABULARY: Final = 32_000
LAYERS: Final = 22

SHARD_BYTES: Final = 480_000_000
_STD: Final = 0.02
_DIRECTIONS: Final = 32


def config(layers: int) -> dict[str, Any]:
    """The config.json with which transformers loads the checkpoint as LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": _STD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors, in the order in which they are stored."""
    narrow = HIDDEN // HEADS * KEY_VALUE_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for index in range(layers):
        block = f"model.layers.{index}"
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        yield f"{block}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.self_attn.k_proj.weight", (narrow, HIDDEN)
        yield f"{block}.self_attn.v_proj.weight", (narrow, HIDDEN)
        yield f"{block}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{block}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def build(directory: Path, layers: int) -> None:
    """Write the checkpoint, one shard at a time in memory; the directory is there when it is whole.

    Args:
        directory: to be made; nothing happens where it exists.
        layers: how many decoder blocks. Depth is the only size that varies; layer k has the same weights
            whatever the depth.
    """
    if directory.exists():
        return
    from safetensors.torch import save_file

    unfinished = _unfinished(directory)
    shards = _shards(layers)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _weight(name, shape) for name, shape in shard}, unfinished / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    total_bytes = sum(_size_bytes(shape) for shard in shards for _, shape in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(unfinished / "model.safetensors.index.json", index)
    _write_json(unfinished / "config.json", config(layers))
    unfinished.rename(directory)


def build_lora(directory: Path, layers: int, rank: int) -> None:
    """Write a random fp32 LoRA of all seven projections, lora_alpha = r, as PEFT saves it.

    The change that it makes is a sixth of the weights' noise, and far above what rounding them to bf16 takes.

    Args:
        directory: to be made; nothing happens where it exists.
        layers: of the checkpoint that it is for.
        rank: r of every projection.
    """
    if directory.exists():
        return
    import torch
    from safetensors.torch import save_file

    tensors = {}
    targets: set[str] = set()
    for name, shape in shapes(layers):
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if not leaf.endswith("_proj"):
            continue
        targets.add(leaf)
        rows, columns = shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"lora of {name}".encode()))
        path = f"base_model.model.{module}.{leaf}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * _STD
    unfinished = _unfinished(directory)
    save_file(tensors, unfinished / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    _write_json(unfinished / "adapter_config.json", {**fields, "target_modules": sorted(targets)})
    unfinished.rename(directory)


def _unfinished(directory: Path) -> Path:
    """A new directory in which it is built."""
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def _shards(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled_bytes = 0
    for name, shape in shapes(layers):
        if shards[-1] and filled_bytes + _size_bytes(shape) > SHARD_BYTES:
            shards.append([])
            filled_bytes = 0
        shards[-1].append((name, shape))
        filled_bytes += _size_bytes(shape)
    return shards


def _size_bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _weight(name: str, shape: tuple[int, ...]) -> Any:
    """The tensor of that name: ones for a norm, else noise and directions that fall as 1/k from above it."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.empty(shape).normal_(0, _STD, generator=generator)
    rows, columns = shape
    noise = _STD * (math.sqrt(rows) + math.sqrt(columns))  # the largest singular value of the noise alone
    strengths = 4 * noise / torch.arange(1, _DIRECTIONS + 1)
    left = torch.randn(rows, _DIRECTIONS, generator=generator) * (strengths / math.sqrt(rows))
    right = torch.randn(_DIRECTIONS, columns, generator=generator) / math.sqrt(columns)
    return weight.addmm_(left, right).bfloat16()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Build one checkpoint or adapter from the command line."""
    parser = argparse.ArgumentParser(description="A random checkpoint of TinyLlama-1.1B's shapes, or a LoRA for it.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--lora", type=int, metavar="RANK", help="the adapter, not the checkpoint")
    options = parser.parse_args()
    if options.lora is None:
        build(options.directory, options.layers)
    else:
        build_lora(options.directory, options.layers, options.lora)


if __name__ == "__main__":
    main()
