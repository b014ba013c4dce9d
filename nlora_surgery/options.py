"""What can be asked for, by name: methods, samplings, scale splits, residuals. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "ADAPTER_DTYPES",
    "APPROXIMATIONS",
    "FAMILY_NYSTROM",
    "METHODS",
    "RESIDUALS",
    "SAMPLINGS",
    "SCALE_SPLITS",
    "STARTS_AT_ZERO",
    "FactorOptions",
    "Method",
    "Sampling",
    "ScaleSplit",
]

Method = Literal["nystrom", "nystrom-pinv", "nystrom-optimal", "sketch", "pissa", "pissa-fast", "slora", "lora"]
Sampling = Literal["leading", "uniform", "norm"]
ScaleSplit = Literal["keep", "balanced", "core"]

METHODS: Final = (
    "nystrom", "nystrom-pinv", "nystrom-optimal", "sketch", "pissa", "pissa-fast", "slora", "lora",
)  # fmt: skip
SAMPLINGS: Final = ("leading", "uniform", "norm")
SCALE_SPLITS: Final = ("keep", "balanced", "core")
RESIDUALS: Final = ("baked", "virtual", "none")
ADAPTER_DTYPES: Final = ("float32", "bfloat16", "float16")

FAMILY_NYSTROM: Final = frozenset({"nystrom", "nystrom-pinv", "nystrom-optimal"})
STARTS_AT_ZERO: Final = frozenset({"slora", "lora"})
# Methods whose `scaling * product` approximates the weight; the raw core of `nystrom` does not try to.
APPROXIMATIONS: Final = frozenset(METHODS) - STARTS_AT_ZERO - {"nystrom"}


@dataclass(frozen=True, slots=True)
class FactorOptions:
    """How to factor a weight.

    Attributes:
        method: one of `METHODS`.
        sampling: which rows and columns the Nyström family takes: the `leading` ones (the paper's),
            `uniform` at random, or at random with probability proportional to their squared `norm`.
        scale_split: how the scale of the product is spread over the factors (see `split_scale`); None is
            `keep` for the Nyström family and `balanced` for the others.
        two_matrix: fold `lora_N` away (`pissa` and `pissa-fast` only; `lora` never has one).
        oversampling: extra columns of a sketch beyond r.
        power_steps: how often a sketch is passed through `weight @ weight.T`; None is 2, and 4 for
            `pissa-fast` (what PEFT's documentation recommends as `pissa_niter_4`).
        pinv_rtol: singular values of `nystrom-pinv`'s core below this share of the largest count as zero.
            0.1 keeps the product near the weight's own size on real models; 0 is the exact pseudo-inverse.
    """

    method: Method = "nystrom"
    sampling: Sampling = "leading"
    scale_split: ScaleSplit | None = None
    two_matrix: bool = False
    oversampling: int = 16
    power_steps: int | None = None
    pinv_rtol: float = 0.1

    @property
    def split(self) -> ScaleSplit:
        """`scale_split` with its default filled in."""
        return self.scale_split or ("keep" if self.method in FAMILY_NYSTROM else "balanced")

    @property
    def samples_only(self) -> bool:
        """Whether the factors depend on some rows and columns of the weight, or on none of it."""
        raw = self.method in {"nystrom", "nystrom-pinv"} and self.sampling != "norm"
        return raw or self.method in STARTS_AT_ZERO
