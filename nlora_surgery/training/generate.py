"""generate: a first look at what a model says, with its adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nlora_surgery.errors import OptionError
from nlora_surgery.training.data import layout_prompt
from nlora_surgery.training.layers import attach
from nlora_surgery.training.loading import load_model, load_tokenizer, open_adapter

__all__ = ["generate"]


def generate(
    base: Path,
    adapter: Path | None,
    prompt: str,
    *,
    template: str = "auto",
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    write: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt.

    Args:
        base: directory of the model.
        adapter: directory of an adapter for it, or None.
        prompt: what is asked.
        template: `alpaca` (what `train` lays questions and instructions out with), `chat`, `raw`; `auto` is `alpaca`
            with an adapter, else `chat` where the tokenizer has a template, else `raw`.
        max_new_tokens: at most.
        temperature: 0 takes the most likely token.
        seed: of the sampling.
        dtype, device: see `loading.load_model`.
        write: called with pieces of the answer as they come.

    Returns:
        The answer, without the prompt.

    Raises:
        OptionError: a number is impossible.
        CheckpointError, AdapterError, BaseMismatchError: see their classes.
    """
    from transformers import TextStreamer

    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise OptionError(
            f"--max-new-tokens must be at least 1 and --temperature at least 0, not {max_new_tokens} and {temperature}"
        )
    opened = None if adapter is None else open_adapter(adapter, base)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=dtype, device=device)
    if opened is not None:
        attach(model, opened)
    if device != "cpu" and torch.cuda.is_available():
        model.to("cuda")
    model.eval()
    if template == "auto":
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        template = "alpaca" if opened is not None else "chat" if has_chat else "raw"
    text = layout_prompt(prompt, template, tokenizer)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=template != "chat").to(model.device)
    inputs.pop("token_type_ids", None)

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if write is not None:
                write(text)

    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
        torch.manual_seed(seed)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
