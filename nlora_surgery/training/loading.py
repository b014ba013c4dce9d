"""Models and tokenizers by transformers, for training and for looking; never with code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nlora_surgery.adapter import Adapter, check_base
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.errors import CheckpointError
from nlora_surgery.training.layers import find_modules

__all__ = ["load_model", "load_skeleton", "load_tokenizer", "open_adapter"]


def open_adapter(directory: Path, base: Path) -> Adapter:
    """Open an adapter for the base that it is about to be put on, before that is loaded.

    Raises:
        AdapterError, BaseMismatchError, CheckpointError: one is damaged, or they do not belong together, or the model
            has no such modules.
    """
    adapter = Adapter.open(directory)
    with Checkpoint.open(base) as checkpoint:
        check_base(adapter, checkpoint)
    find_modules(adapter.parts, load_skeleton(base), str(adapter.directory))
    return adapter


def load_skeleton(directory: Path) -> Any:
    """The modules of a causal language model by transformers, without its weights.

    Raises:
        CheckpointError: transformers has no class for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise _does_not_load(directory, error) from error


def load_model(directory: Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A causal language model by transformers, without code from the checkpoint.

    Args:
        directory: of the model.
        dtype: `auto` is as stored on a GPU, and float32 on a CPU, where 16 bits are slow.
        device: `auto` or `cpu`; decides what `auto` is.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    on_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    wanted = ("float32" if on_cpu else "auto") if dtype == "auto" else dtype
    try:
        return AutoModelForCausalLM.from_pretrained(str(directory), dtype=wanted, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, the finding is the same: it does not load
        raise _does_not_load(directory, error) from error


def _does_not_load(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"transformers cannot load a causal language model from {directory}: {error}")


def load_tokenizer(directory: Path) -> Any:
    """A tokenizer that pads on the right, with its end-of-sequence token where it has no token for that.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load a tokenizer from {directory}: {error}") from error
    if tokenizer.pad_token is None:  # padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer
