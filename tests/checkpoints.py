"""Tiny checkpoints for tests, written by the safetensors library and not by the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["llama_config", "llama_tensors", "write_checkpoint", "write_llama", "write_raw_file"]


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int | Sequence[Sequence[str]] = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model directory the way transformers does.

    Args:
        directory: to be made, or to be added to.
        tensors: by name.
        shards: 1 writes `model.safetensors`; n > 1 deals the names, in their order, into n files of about
            the same number of bytes, and writes the index; a list of lists says which names go where.
        config: `config.json`; none is written by default.
        metadata: of each file; `{"format": "pt"}` by default.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    header = dict({"format": "pt"} if metadata is None else metadata)
    groups = _dealt(tensors, shards) if isinstance(shards, int) else [list(names) for names in shards]
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", header)
        return directory
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / shard, header)
        weight_map |= dict.fromkeys(names, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return directory


def _dealt(tensors: Mapping[str, Tensor], count: int) -> list[list[str]]:
    total = sum(tensor.nbytes for tensor in tensors.values())
    groups: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name, tensor in tensors.items():
        groups[min(count - 1, before * count // max(1, total))].append(name)
        before += tensor.nbytes
    return groups


def llama_config(dtype: torch.dtype = torch.bfloat16, *, layers: int = 2, tied: bool = False) -> dict[str, Any]:
    """`config.json` of `llama_tensors`, which transformers loads as a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }


def llama_tensors(
    dtype: torch.dtype = torch.bfloat16, *, layers: int = 2, tied: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A random Llama with grouped queries: q is (32, 32), k and v (16, 32), the MLP (80, 32) and (32, 80)."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.01 * torch.randn(32, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(96, 32)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        tensors |= {
            f"{block}.input_layernorm.weight": norm(),
            f"{block}.self_attn.q_proj.weight": weight(32, 32),
            f"{block}.self_attn.k_proj.weight": weight(16, 32),
            f"{block}.self_attn.v_proj.weight": weight(16, 32),
            f"{block}.self_attn.o_proj.weight": weight(32, 32),
            f"{block}.post_attention_layernorm.weight": norm(),
            f"{block}.mlp.gate_proj.weight": weight(80, 32),
            f"{block}.mlp.up_proj.weight": weight(80, 32),
            f"{block}.mlp.down_proj.weight": weight(32, 80),
        }
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = weight(96, 32)
    return tensors


def write_llama(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    shards: int | Sequence[Sequence[str]] = 3,
    changes: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `llama_tensors` in 3 shards.

    Args:
        directory, shards: see `write_checkpoint`.
        dtype, layers, tied, seed: see `llama_tensors`.
        changes: tensors that replace or join the random ones.
        config: entries that replace or join those of `llama_config`.
    """
    tensors = llama_tensors(dtype, layers=layers, tied=tied, seed=seed) | dict(changes or {})
    merged = llama_config(dtype, layers=layers, tied=tied) | dict(config or {})
    return write_checkpoint(directory, tensors, shards=shards, config=merged)


def write_raw_file(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file, or what only looks like one.

    Args:
        path: of the file.
        header: a dict becomes compact JSON without padding; bytes go in as they are.
        data: what follows it.
        length: what the first eight bytes claim; the header's true length by default.
    """
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
