"""The names that adapter files give to their tensors, all brought to one form.

PEFT writes `base_model.model.<module>.lora_A.weight`. Met in the wild besides: an adapter's name before
`.weight`, wrappers of torch.compile, FSDP and DDP in the path, Kohya's `lora_down`, `lora_up` and `alpha`,
MoSLoRA's `lora_AB` and LoRA-XS's `default_lora_latent_mapping` for the matrix in the middle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["AdapterKey", "parse_key"]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# How a key ends -> the part that it is. The first match counts.
_ENDINGS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"\.(lora_[ANB](?:_initial)?)(?:\.\w+)?\.weight", None),
        (r"\.(lora_embedding_[AB])(?:\.\w+)?", None),
        (r"\.lora_magnitude_vector(?:\.\w+)??(?:\.weight)?", "magnitude"),
        (r"\.lora_B(?:\.\w+)?\.bias", "lora_bias"),
        (r"\.lora_AB(?:\.\w+)?(?:\.weight)?", "lora_N"),
        (r"\.\w*lora_latent_mapping(?:\.weight)?", "lora_N"),
        (r"\.lora_down(?:\.weight)?", "lora_A"),
        (r"\.lora_mid(?:\.weight)?", "lora_N"),
        (r"\.lora_up(?:\.weight)?", "lora_B"),
        (r"\.alpha", "alpha"),
    )
)
_REPLACED = re.compile(r"(?:\.modules_to_save(?:\.\w+)?|\.original_module)?\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """What one tensor of an adapter is.

    Attributes:
        module: the path of the module that it changes, wrappers stripped; for Kohya files with `_` for `.`.
        part: `lora_A`, `lora_N`, `lora_B` (with `_initial` for a frozen start), `lora_embedding_A`,
            `lora_embedding_B`, `magnitude`, `lora_bias`, `alpha`; or `weight` and `bias` for a tensor that
            takes the place of the module's own.
        depth: how many PEFT parameter wrappers lie inside of it; tells the parameters of one module apart.
    """

    module: str
    part: str
    depth: int = 0

    @property
    def replaces(self) -> bool:
        """Whether the tensor takes the place of one of the base."""
        return self.part in {"weight", "bias"}


def parse_key(name: str) -> AdapterKey | None:
    """Read a tensor's name.

    Args:
        name: as it stands in the file.

    Returns:
        What it is; None if the name is of no known form.
    """
    for ending, fixed in _ENDINGS:
        match = re.search(rf"{ending.pattern}\Z", name)
        if match:
            module, depth = _strip(name[: match.start()])
            return AdapterKey(module, fixed or match[1], depth) if module else None
    match = re.search(rf"{_REPLACED.pattern}\Z", name)
    if match:
        module, depth = _strip(name[: match.start()])
        return AdapterKey(module, match[1], depth) if module else None
    return None


def _strip(path: str) -> tuple[str, int]:
    """The module's path without what wraps it, and how often `base_layer` stood at its end."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    while parts and parts[0] == "module":
        parts = parts[1:]
    depth = 0
    while parts and parts[-1] == "base_layer":
        parts, depth = parts[:-1], depth + 1
    return ".".join(part for part in parts if part != "base_layer"), depth
