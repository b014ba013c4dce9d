"""How near the sketch comes to the exact SVD, and at what share of its time.

    python benchmarks/sketch.py MODEL [--rank 64]

Every target weight of MODEL, and one random 2048 × 5632 weight; one thread, alternating, medians of three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.factor import SVD, randomized_svd, truncated_svd
from nlora_surgery.targets import choose_targets, module_kind

_ROUNDS = 3


def _seconds(work: Callable[[], SVD]) -> tuple[float, SVD]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(weight: Tensor, r: int) -> tuple[float, float, float]:
    """Excess of the sketch's residual norm over the exact one's, and the seconds of sketch and exact SVD."""
    sketch_times, exact_times = [], []
    for _ in range(_ROUNDS):
        generator = torch.Generator().manual_seed(0)
        seconds, sketch = _seconds(
            lambda generator=generator: randomized_svd(  # type: ignore[misc]
                weight, r, oversampling=16, power_steps=2, generator=generator, dtype=torch.float32
            )
        )
        sketch_times.append(seconds)
        seconds, exact = _seconds(lambda: truncated_svd(weight, r, torch.float32))
        exact_times.append(seconds)
    residuals = [float(torch.linalg.vector_norm(weight.float() - (svd.U * svd.S) @ svd.Vh)) for svd in (sketch, exact)]
    return residuals[0] / residuals[1] - 1, statistics.median(sketch_times), statistics.median(exact_times)


def main() -> None:
    """Print one row per module kind, and one for the large weight."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--every", type=int, default=5, help="take one of so many layers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    groups: dict[str, list[tuple[float, float, float]]] = {}
    with Checkpoint.open(arguments.model) as model:
        counts: dict[str, int] = {}
        for target in choose_targets(model, arguments.rank):
            kind = module_kind(target.module)
            counts[kind] = counts.get(kind, 0) + 1
            if (counts[kind] - 1) % arguments.every == 0:
                groups.setdefault(kind, []).append(compare(model.tensor(target.tensor), arguments.rank))
    groups["all of them"] = [row for rows in groups.values() for row in rows]
    large = torch.randn(2048, 5632, generator=torch.Generator().manual_seed(0)) * 0.02
    groups["random 2048 × 5632"] = [compare(large, arguments.rank)]
    print("| module | weights | residual above the exact SVD's, mean (worst) | exact SVD's time ÷ the sketch's |")
    print("| --- | ---: | ---: | ---: |")
    for kind, rows in groups.items():
        excess = [row[0] for row in rows]
        ratio = sum(row[2] for row in rows) / sum(row[1] for row in rows)
        print(f"| {kind} | {len(rows)} | {statistics.fmean(excess):.2%} ({max(excess):.2%}) | {ratio:.1f} |")


if __name__ == "__main__":
    main()
