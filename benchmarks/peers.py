"""PEFT's way to the same two files: load the model, add the adapter, save it, save the residual base.

    python -m benchmarks.peers MODEL OUT --init pissa_niter_4 --rank 64

Stamps tell the measuring parent when the imports are done and when the work is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from benchmarks.measure import DONE, IMPORTED, stamp

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INITS: Final = ("lora", "pissa_niter_4", "olora", "pissa")


def initialize(model_directory: Path, out: Path, init: str, rank: int) -> None:
    """Write `out/adapter` and `out/base`, the base as the init leaves it (less the start, where there is one).

    Args:
        model_directory: of the original.
        out: to be made.
        init: one of `INITS`; all but `lora` are values of PEFT's `init_lora_weights`.
        rank: r of every projection; lora_alpha is the same.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    stamp(IMPORTED)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    adapter = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(PROJECTIONS),
        init_lora_weights=True if init == "lora" else init,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, adapter)
    adapted.save_pretrained(out / "adapter")
    adapted.unload().save_pretrained(out / "base")
    stamp(DONE)


def main() -> None:
    """Do one of PEFT's inits from the command line."""
    parser = argparse.ArgumentParser(description="PEFT: load, init, save the adapter and the residual base.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init", choices=INITS, default="lora")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    initialize(options.model, options.out, options.init, options.rank)


if __name__ == "__main__":
    main()
