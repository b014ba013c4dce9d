"""How far below the exact energies those of the report's sketches are.

    python -m benchmarks.spectra MODEL [--layers 5]

The sketch is taken of small weights too, which the report itself measures exactly. The exact spectrum is that of the
Gram matrix in fp64, which takes a minute for a weight of 4096 × 11008.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from nlora_surgery import spectra
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.factor import module_generator
from nlora_surgery.targets import choose_targets


def main() -> None:
    """Print one row: by rank the mean shortfall of the energy, and the worst."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, default=spectra.LAYERS, help="of each kind of module")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    width = max(spectra.RANKS)
    shortfalls: dict[int, list[float]] = {r: [] for r in spectra.RANKS}
    seconds = 0.0
    with Checkpoint.open(arguments.model) as model:
        groups: dict[str, list[str]] = {}
        for target in choose_targets(model, width):
            if target.experts is None and target.r >= width:
                groups.setdefault(spectra.place(target.module).kind, []).append(target.tensor)
        chosen = [tensor for group in groups.values() for tensor in spectra.evenly(group, arguments.layers)]
        for tensor in chosen:
            weight = model.tensor(tensor)
            start = time.perf_counter()
            sketched = spectra.sketched_values(weight, width, module_generator(0, tensor)).square().cumsum(0)
            seconds += time.perf_counter() - start
            exact = spectra.exact_values(weight, min(weight.shape)).square().cumsum(0)
            for r, values in shortfalls.items():
                values.append(float((exact[r - 1] - sketched[r - 1]) / exact[-1]))
    print(f"{len(chosen)} weights, {seconds / max(1, len(chosen)):.2f} s each for the sketch; mean (worst) by rank:")
    print(" | ".join(f"r = {r}: {statistics.fmean(v):.3%} ({max(v):.3%})" for r, v in shortfalls.items() if v))


if __name__ == "__main__":
    main()
