"""How long a training step takes, and how much memory, beside stock PEFT's LoRA at the same rank.

    python benchmarks/train.py
    python benchmarks/train.py --model smollm2-135m --rounds 5 --json bench-data/train.json

Every run is a process of its own that takes a few steps on the same random tokens: forward, backward, AdamW. The
cases alternate in rounds. Without --model the model is a random one of SmolLM2-135M's shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

if __package__ in {None, ""}:  # run as a script: let it find its neighbours as a package, as -m does
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import measure
from benchmarks.peers import PROJECTIONS

SMOLLM2: Final = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
CASES: Final = {
    "peft-lora": "PEFT LoRA",
    "lora": "ours, LoRA",
    "slora": "ours, SLoRA (nlora, baked)",
    "virtual": "ours, nlora with a virtual residual",
    "inttune": "ours, IntTune",
    "inttune-virtual": "ours, IntTune with a virtual residual",
}
_WARM_UP: Final = 2  # steps that are not counted: the optimizer's state is made in the first


def child(case: str, out: Path, options: argparse.Namespace) -> None:
    """Take steps in this process; write the seconds of each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if options.model is not None:
        model: Any = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    model = _with_peft(model, options.rank) if case == "peft-lora" else _with_ours(model, options.rank, case)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(1000, (options.batch_size, options.length))
    seconds = []
    for _ in range(_WARM_UP + options.steps):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    out.write_text(json.dumps(seconds[_WARM_UP:]), encoding="utf-8")


def _with_peft(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)))


def _with_ours(model: Any, rank: int, case: str) -> Any:
    import torch

    from nlora_surgery.factor import Factors
    from nlora_surgery.training.layers import AdapterLinear, freeze

    virtual = "virtual" in case
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in PROJECTIONS:
            core = None if case == "lora" else torch.eye(rank)
            start = Factors(
                torch.randn(rank, layer.in_features) / rank, torch.randn(layer.out_features, rank) * 1e-3, core
            )
            adapted = AdapterLinear(layer, start, 1.0, initial=start if virtual else None)
            setattr(model.get_submodule(parent), name, adapted)
    freeze(model, {"lora": "lora", "inttune": "inttune", "inttune-virtual": "inttune"}.get(case, "nlora"))
    return model


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
    """All cases, alternating; in each round once for the time and, one step long, once for the memory.

    Returns:
        Of each case the median step of every round in seconds, and the peak resident memory in bytes.
    """
    results: dict[str, dict[str, list[float]]] = {case: {"seconds": [], "rss_bytes": []} for case in options.cases}
    for index in range(options.rounds):
        for case in options.cases:
            steps, _ = _run_child(case, options, options.steps, {})
            # What is freed goes back to the system at once, so that the peak is what was in use and not what the
            # allocator kept; that costs time, so it is a run of its own.
            _, peak = _run_child(case, options, 1, {"MALLOC_MMAP_THRESHOLD_": "65536"})
            results[case]["seconds"].append(statistics.median(steps))
            results[case]["rss_bytes"].append(peak)
            say(f"round {index + 1} of {options.rounds}: {CASES[case]}: {statistics.median(steps):.3f} s a step")
    return results


def _run_child(
    case: str, options: argparse.Namespace, steps: int, environment: dict[str, str]
) -> tuple[list[float], int]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "steps.json"
        command = [sys.executable, "-m", "benchmarks.train", "--child", case, str(out), "--steps", str(steps)]
        command += ["--rank", str(options.rank)]
        command += ["--batch-size", str(options.batch_size), "--length", str(options.length)]
        command += ["--model", str(options.model)] if options.model is not None else []
        measured = measure(command, {"HF_HUB_OFFLINE": "1", **environment})
        return json.loads(out.read_text(encoding="utf-8")), measured.peak_rss_bytes


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """The Markdown table: medians over rounds, and ratios to PEFT's of the same round."""
    lines = [
        "| case | s a step, median (min–max) | ÷ PEFT LoRA | peak RSS MB | ÷ PEFT LoRA |",
        "|---|---:|---:|---:|---:|",
    ]
    peft = results.get("peft-lora")
    for case, figures in results.items():
        seconds, memory = figures["seconds"], figures["rss_bytes"]
        ratios = ["–", "–"]
        if peft is not None:
            ratios = [
                f"{statistics.median(a / b for a, b in zip(figures[name], peft[name], strict=True)):.3f}"
                for name in ("seconds", "rss_bytes")
            ]
        lines.append(
            f"| {CASES[case]} | {statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f}) | {ratios[0]} "
            f"| {statistics.median(memory) / 1e6:,.0f} | {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama checkpoint")
    parser.add_argument("--rank", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each run  [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--length", type=int, default=128, help="tokens of each example  [%(default)s]")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="file for the single measurements")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options)
        return
    results = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
