"""Checkpoint surgery for low-rank adapters.

The names below are the library's public ones; each is imported when it is first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Checkpoint",
    "FactorOptions",
    "Factors",
    "InitOptions",
    "SurgeryError",
    "factorize",
    "fetch",
    "inspect",
    "plan_init",
    "prepare",
    "verify",
    "verify_logits",
]

_HOMES = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "Checkpoint": "checkpoint",
    "FactorOptions": "options",
    "Factors": "factor",
    "InitOptions": "surgery.prepare",
    "SurgeryError": "errors",
    "factorize": "factor",
    "fetch": "hub",
    "inspect": "surgery.inspect",
    "plan_init": "surgery.prepare",
    "prepare": "surgery.prepare",
    "verify": "surgery.verify",
    "verify_logits": "surgery.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
