"""Singular values of a model's weights: what adapters of any rank could capture of them, and at what cost.

Energy is what it is in the manifest of init: the share of ‖weight‖² that a product captures. The most that a product
of rank r can capture is the share of the r largest singular values (Eckart and Young 1936), so one spectrum answers
for every rank at once.

A spectrum of every weight would take minutes, so some layers stand for all: the first, the last and those at equal
distances between them. Small weights are measured exactly, large ones by a sketch, whose energies are those of
products that exist: never more than the best, and less by what docs/report.md measures.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import MANIFEST, Checkpoint
from nlora_surgery.devices import compute_dtype, cpu_cores, resolve_devices, single_threaded_torch
from nlora_surgery.errors import BaseMismatchError, CheckpointError, OptionError
from nlora_surgery.factor import adding_product, is_finite, module_generator, randomized_svd, row_tiles
from nlora_surgery.options import STARTS_AT_ZERO
from nlora_surgery.rewrite import Progress
from nlora_surgery.targets import Target, module_kind

__all__ = [
    "LAYERS",
    "MOST_RANK",
    "RANKS",
    "Place",
    "Spectra",
    "SpectraOptions",
    "Spectrum",
    "Weights",
    "evenly",
    "exact_values",
    "frobenius_norm",
    "manifest_targets",
    "mean_of_known",
    "measure_spectra",
    "original_weights",
    "parameter_counts",
    "place",
    "place_labels",
    "rank_costs",
    "singular_values",
    "sketched_values",
]

Item = TypeVar("Item")

RANKS: Final = (4, 8, 16, 32, 64, 128, 256)
LAYERS: Final = 5
MOST_RANK: Final = 4096

# Six products with the weight, and 64 columns more than are wanted; docs/report.md has the errors.
_OVERSAMPLING: Final = 64
_POWER_STEPS: Final = 2
_EXPERTS: Final = 2  # of each layer, where experts are many matrices of one kind
_MOST_THREADS: Final = 8  # each holds a sketch of its weight, some tens of MB for a 7B model


@dataclass(frozen=True, slots=True)
class SpectraOptions:
    """What is measured.

    Attributes:
        ranks: whose energy is told.
        layers: how many layers of each kind of module; None is all of them, and all of their experts.
        seed: of the sketches.
    """

    ranks: Sequence[int] = RANKS
    layers: int | None = LAYERS
    seed: int = 0

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            OptionError: with the option's name, what was found and what is possible.
        """
        wrong = [rank for rank in self.ranks if not 1 <= rank <= MOST_RANK]
        if wrong or not self.ranks:
            raise OptionError(f"--ranks must be numbers from 1 to {MOST_RANK}, not {wrong[0] if wrong else 'none'}")
        if self.layers is not None and self.layers < 1:
            raise OptionError(f"--layers must be at least 1, or all, not {self.layers}")

    @property
    def values(self) -> int:
        """How many singular values of each weight are found.

        As many as the default ranks need at least, so that a weight has the same figures whichever ranks are asked for.
        """
        return max(*self.ranks, *RANKS)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a module stands in a model.

    Attributes:
        stack: path of the list of layers that it is in, `model.layers`; empty for a module in none.
        layer: its number there.
        kind: what it is called in every layer, see `targets.module_kind`.
    """

    stack: str
    layer: int
    kind: str


def place(module: str) -> Place:
    """Where a module stands: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of layer 3 of `model.layers`."""
    found = re.search(r"(?<![^.])(\d+)\.", module)
    if found is None:
        return Place("", 0, module)
    return Place(module[: found.start()].rstrip("."), int(found[1]), module_kind(module))


def place_labels(places: Iterable[Place]) -> dict[tuple[str, str], str]:
    """What to call each kind of module: its name, with its stack where two stacks have such modules."""
    pairs = list(dict.fromkeys((each.stack, each.kind) for each in places))
    kinds = [kind for _, kind in pairs]
    return {pair: f"{pair[0]}: {pair[1]}" if kinds.count(pair[1]) > 1 else pair[1] for pair in pairs}


@dataclass(frozen=True)
class Weights:
    """The original weights of a model, wherever they are.

    Attributes:
        checkpoint: that holds them, or their residuals.
        targets: which of them.
        start: the adapter whose product was subtracted from them, if they are residuals.
    """

    checkpoint: Checkpoint
    targets: Sequence[Target]
    start: Adapter | None = None

    def matrix(self, target: Target, expert: int | None = None) -> Tensor:
        """One weight as it lies on disk, or for a residual as it was there, to one rounding of its dtype.

        A convolution's is the matrix (out, channels · kernel).
        """
        stored = self.checkpoint.tensor(target.tensor)
        if target.kernel is not None:
            stored = stored.flatten(1)
        if expert is not None:
            stored = stored[expert]
        if self.start is None:
            return stored
        dtype = compute_dtype(stored.dtype)
        left, right = self.start.sides(target.module, dtype, expert=expert)
        if target.fan_in_fan_out:
            left, right = right.mT, left.mT
        add = adding_product(left, right)
        original = torch.empty_like(stored)
        for rows in row_tiles(stored.shape, dtype.itemsize):
            tile = stored[rows].to(dtype)
            add(rows, tile)
            original[rows] = tile
        return original


def original_weights(directory: Path, manifest: Mapping[str, Any], source: Path | None = None) -> Weights:
    """The weights that an output of init was made from.

    Args:
        directory: the output.
        manifest: its manifest.
        source: directory of the model that it was made from, for an output without shards; by default where init
            found it.

    Returns:
        Residuals and the start that was subtracted, where the residual is baked; else the source's own weights.

    Raises:
        CheckpointError, AdapterError: the output is damaged.
        BaseMismatchError: the source is not there, or what is there is another model.
    """
    targets = manifest_targets(directory, manifest)
    options = manifest["options"]
    if options["residual"] == "baked":
        subtracted = options["method"] not in STARTS_AT_ZERO
        start = Adapter.open(directory / manifest["adapter"]["folder"]) if subtracted else None
        checkpoint = Checkpoint.open(directory)
    else:
        start, origin = None, source or Path(manifest["source"]["name"])
        if not origin.is_dir():
            raise BaseMismatchError(
                f"the weights that {directory} was made from are not in it, and {origin} is no directory here"
            )
        try:
            checkpoint = Checkpoint.open(origin)
        except CheckpointError as error:
            raise BaseMismatchError(f"the weights that {directory} was made from are not in it: {error}") from error
        if checkpoint.fingerprint() != manifest["source"]["fingerprint"]:
            raise BaseMismatchError(f"{origin} is another model than the one that {directory} was made from")
    missing = [target.tensor for target in targets if target.tensor not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{checkpoint.directory} lacks {missing[0]!r}, which {directory / MANIFEST} names")
    return Weights(checkpoint, targets, start)


def manifest_targets(directory: Path, manifest: Mapping[str, Any]) -> list[Target]:
    """The targets of an output of init, from its manifest.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    try:
        targets = []
        for entry in manifest["modules"]:
            out_features, in_features = map(int, entry["shape"])
            experts = None if entry["experts"] is None else int(entry["experts"])
            kernel = None if entry["kernel"] is None else tuple(map(int, entry["kernel"]))
            transposed, r = bool(entry["fan_in_fan_out"]), int(entry["r"])
            names = str(entry["tensor"]), str(entry["module"])
            targets.append(Target(*names, out_features, in_features, transposed, r, experts, kernel))
        return targets
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is not a manifest of init; make the directory again") from error


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of one weight; of a stack of experts the root mean square over those measured.

    Attributes:
        target: the weight.
        weight_norm: its Frobenius norm, likewise.
        values: descending, fp64.
        exact: whether they are no sketch.
    """

    target: Target
    weight_norm: float
    values: Tensor
    exact: bool

    def energies(self) -> list[float] | None:
        """The most that a product of rank 1, 2, … can capture of ‖weight‖²; None for a weight of zeros."""
        if not self.weight_norm:
            return None
        shares = (self.values / self.weight_norm).square().cumsum(0)
        return [min(1.0, float(share)) for share in shares]


@dataclass(frozen=True)
class Spectra:
    """What was measured of a model.

    Attributes:
        targets: of the model, all of them.
        measured: in the order of the model.
        not_finite: weights that hold NaN or infinity, and have no spectrum.
        options: as given.
    """

    targets: Sequence[Target]
    measured: Sequence[Spectrum]
    not_finite: Sequence[str] = ()
    options: SpectraOptions = field(default_factory=SpectraOptions)

    def summary(self) -> dict[str, Any]:
        """The figures by kind of module and rank, as JSON values.

        Returns:
            `ranks`, `layers` (None is all), `seed`, `not_finite`; `kinds` with `kind`, its `modules` and how many are
            `measured`, whether `exact`ly, the `shapes` (out, in) and the mean `energy` by rank; `energy` over all
            modules; `costs`, see `rank_costs`. Ranks are strings where they are keys.
        """
        labels = place_labels(place(target.module) for target in self.targets)
        groups: dict[str, list[Target]] = {label: [] for label in labels.values()}
        found: dict[str, list[Spectrum]] = {label: [] for label in labels.values()}
        for target in self.targets:
            groups[_label(target, labels)].append(target)
        for spectrum in self.measured:
            found[_label(spectrum.target, labels)].append(spectrum)
        kinds = [
            {
                "kind": label,
                "modules": len(targets),
                "measured": len(found[label]),
                "exact": all(spectrum.exact for spectrum in found[label]),
                "shapes": [list(shape) for shape in dict.fromkeys((t.out_features, t.in_features) for t in targets)],
                "energy": {
                    str(r): mean_of_known([_at(each, r) for spectrum in found[label] if (each := spectrum.energies())])
                    for r in self.options.ranks
                },
                "costs": {str(r): rank_costs(targets, r) for r in self.options.ranks},
            }
            for label, targets in groups.items()
        ]
        counts: Mapping[str, int] = {label: len(targets) for label, targets in groups.items()}
        return {
            "ranks": list(self.options.ranks),
            "layers": self.options.layers,
            "seed": self.options.seed,
            "not_finite": list(self.not_finite),
            "kinds": kinds,
            "energy": {
                str(r): mean_of_known(
                    [kind["energy"][str(r)] for kind in kinds for _ in range(counts[kind["kind"]])]  # type: ignore[index]
                )
                for r in self.options.ranks
            },
            "costs": {str(r): rank_costs(self.targets, r) for r in self.options.ranks},
        }


def parameter_counts(shapes: Iterable[tuple[int, int]], r: int) -> dict[str, int]:
    """Trainable parameters at a rank, by kind of training.

    Args:
        shapes: (out, in) of each adapted module.
        r: the rank; smaller modules count with min(out, in).

    Returns:
        `lora`: r (out + in) each; `slora`: r² more each; `inttune`: those r² alone.
    """
    sides = cores = 0
    for out_features, in_features in shapes:
        rank = min(r, out_features, in_features)
        sides += rank * (out_features + in_features)
        cores += rank * rank
    return {"lora": sides, "slora": sides + cores, "inttune": cores}


def rank_costs(targets: Iterable[Target], r: int) -> dict[str, int]:
    """`parameter_counts` of adapters for these weights, and the bytes of an SLoRA adapter's fp32 file.

    `adapter_bytes` is without, `virtual_adapter_bytes` with the start that a virtual residual keeps.
    """
    counts = parameter_counts(
        ((target.out_features, target.in_features) for target in targets for _ in range(target.experts or 1)), r
    )
    return counts | {"adapter_bytes": 4 * counts["slora"], "virtual_adapter_bytes": 8 * counts["slora"]}


def singular_values(weight: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, bool]:
    """The k largest singular values of a weight.

    Args:
        weight: (out, in), finite, any floating dtype, on any device; may be a lazy view.
        k: how many at most.
        generator: a CPU generator.

    Returns:
        min(k, out, in) values, descending, fp64 on the CPU; and whether they are exact. Those of a sketch are the
        singular values of a projection of the weight, hence none is larger than the true one.
    """
    if min(weight.shape) <= 2 * (k + _OVERSAMPLING):  # a sketch would cost no less
        return exact_values(weight, k), True
    return sketched_values(weight, k, generator), False


def exact_values(weight: Tensor, k: int) -> Tensor:
    """The k largest singular values, from the eigenvalues of the Gram matrix; arguments as in `singular_values`.

    On the host, in fp64: energies are exact, and only values below 1e-8 of the largest are lost.
    """
    exact = weight.to("cpu", torch.float64)
    scale = float(exact.abs().max()) or 1.0
    exact = (exact if len(exact) <= exact.shape[1] else exact.T) / scale
    squares: Tensor = torch.linalg.eigvalsh(exact @ exact.T)
    return squares.flip(0)[:k].clamp(min=0).sqrt() * scale


def sketched_values(weight: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The k largest singular values of a projection of the weight; arguments as in `singular_values`."""
    S = randomized_svd(
        weight,
        k,
        oversampling=_OVERSAMPLING,
        power_steps=_POWER_STEPS,
        generator=generator,
        dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
    ).S
    return S.to("cpu", torch.float64)


def frobenius_norm(matrix: Tensor) -> float:
    """Of a matrix, or of a stack as a whole; fp64, tile by tile."""
    matrix = matrix.reshape(-1, matrix.shape[-1])
    tiles = [float(torch.linalg.vector_norm(matrix[rows].to(torch.float64))) for rows in row_tiles(matrix.shape, 8)]
    return math.hypot(*tiles)


def measure_spectra(
    weights: Weights, options: SpectraOptions, *, device: str = "auto", progress: Progress | None = None
) -> Spectra:
    """The spectra of some layers of a model.

    The same for the same seed, whatever the number of threads.

    Args:
        weights: the model's.
        options: which, and how many values.
        device: see `devices.resolve_devices`.
        progress: listens.

    Raises:
        OptionError: impossible options, or no such device.
    """
    options.check()
    progress = progress or Progress()
    devices = resolve_devices(device)
    chosen = _choose(weights.targets, options.layers)
    progress.start(sum(weights.checkpoint.tensors[target.tensor].size_bytes for target in chosen))

    def measure(job: tuple[Target, torch.device]) -> Spectrum | None:
        torch.set_num_threads(1)
        target, on = job
        found = _spectrum(weights, target, options, on)
        weights.checkpoint.release(target.tensor)
        progress.advance(weights.checkpoint.tensors[target.tensor].size_bytes)
        return found

    threads = min(cpu_cores(), _MOST_THREADS) if devices[0].type == "cpu" else len(devices)
    with single_threaded_torch(), ThreadPoolExecutor(threads, "spectra") as pool:
        try:
            found = list(pool.map(measure, zip(chosen, cycle(devices), strict=False)))
        except BaseException:  # an interrupt, above all: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Spectra(
        weights.targets,
        [spectrum for spectrum in found if spectrum is not None],
        [target.tensor for target, spectrum in zip(chosen, found, strict=True) if spectrum is None],
        options,
    )


# --- details ------------------------------------------------------------------------------------------


def _spectrum(weights: Weights, target: Target, options: SpectraOptions, device: torch.device) -> Spectrum | None:
    """Of one weight, or None if it is not finite."""
    experts: list[int | None] = [None]
    if target.experts is not None:
        count = target.experts if options.layers is None else _EXPERTS
        experts = list(evenly(range(target.experts), count))
    squares = norm = 0.0
    total: Tensor | None = None
    exact = True
    for expert in experts:
        matrix = weights.matrix(target, expert)
        if not is_finite(matrix):
            return None
        name = target.module if expert is None else f"{target.module}.{expert}"
        found, exact = singular_values(matrix.to(device), options.values, module_generator(options.seed, name))
        norm = frobenius_norm(matrix)
        squares += norm**2 / len(experts)
        share = found.square() / len(experts)
        total = share if total is None else total + share
    assert total is not None
    if len(experts) == 1:  # without the detour over squares, which huge numbers would leave
        return Spectrum(target, norm, found, exact)
    return Spectrum(target, math.sqrt(squares), total.sqrt(), exact)


def _choose(targets: Sequence[Target], layers: int | None) -> list[Target]:
    """The targets of some layers of each kind, and of experts that are targets of their own some in each layer."""
    if layers is None:
        return list(targets)
    groups: dict[tuple[str, str], dict[int, list[Target]]] = {}
    for target in targets:
        where = place(target.module)
        groups.setdefault((where.stack, where.kind), {}).setdefault(where.layer, []).append(target)
    chosen = {
        target.tensor
        for group in groups.values()
        for layer in evenly(sorted(group), layers)
        for target in evenly(group[layer], _EXPERTS)
    }
    return [target for target in targets if target.tensor in chosen]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at equal distances, the first and the last among them."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _label(target: Target, labels: Mapping[tuple[str, str], str]) -> str:
    where = place(target.module)
    return labels[where.stack, where.kind]


def _at(energies: Sequence[float], r: int) -> float:
    """The energy at a rank; a module that is smaller has all of its own."""
    return energies[min(r, len(energies)) - 1]


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
