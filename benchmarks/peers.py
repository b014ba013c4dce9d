"""What others take to the same files: PEFT's inits and merge, mergekit's extraction.

    python -m benchmarks.peers init MODEL OUT --init pissa_niter_4 --rank 64
    python -m benchmarks.peers merge MODEL ADAPTER OUT
    python -m benchmarks.peers extract MODEL TUNED OUT --rank 64

Stamps tell the measuring parent when the imports are done and when the work is. Nothing but the standard library
is imported before a command is known: mergekit lives in an environment of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from benchmarks.measure import DONE, IMPORTED, stamp

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INITS: Final = ("lora", "pissa_niter_4", "olora", "pissa")


def initialize(model_directory: Path, out: Path, init: str, rank: int) -> None:
    """PEFT: write `out/adapter` and `out/base`, the base as the init leaves it (less the start, where there is one).

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


def merge(model_directory: Path, adapter: Path, out: Path) -> None:
    """PEFT: load model and adapter, merge, save.

    Args:
        model_directory: of the base.
        adapter: of the adapter.
        out: to be made.
    """
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    stamp(IMPORTED)
    model = LlamaForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    stamp(DONE)


def extract(model_directory: Path, tuned: Path, out: Path, rank: int) -> None:
    """mergekit: exact SVDs of the linear weights.

    Head and embedding are excluded: they did not change, and mergekit would save them whole.

    Args:
        model_directory: of the base.
        tuned: of the model that was tuned.
        out: to be made.
        rank: r at most.
    """
    from mergekit.scripts.extract_lora import main as extract_lora

    stamp(IMPORTED)
    models = ["--model", str(tuned), "--base-model", str(model_directory), "--out-path", str(out)]
    untouched = ["--exclude-regex", "lm_head", "--exclude-regex", "embed_tokens"]
    extract_lora([*models, "--max-rank", str(rank), *untouched], standalone_mode=False)
    stamp(DONE)


def main() -> None:
    """Do one of them from the command line."""
    parser = argparse.ArgumentParser(description="What PEFT and mergekit do where nlora_surgery does it by files.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, inputs in (("init", ["model"]), ("merge", ["model", "adapter"]), ("extract", ["model", "tuned"])):
        own = commands.add_parser(command)
        for name in [*inputs, "out"]:
            own.add_argument(name, type=Path)
        if command != "merge":
            own.add_argument("--rank", type=int, default=64)
        if command == "init":
            own.add_argument("--init", choices=INITS, default="lora")
    options = parser.parse_args()
    if options.command == "init":
        initialize(options.model, options.out, options.init, options.rank)
    elif options.command == "merge":
        merge(options.model, options.adapter, options.out)
    else:
        extract(options.model, options.tuned, options.out, options.rank)


if __name__ == "__main__":
    main()
