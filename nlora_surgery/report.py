"""report: the figures of a checkpoint, of what init made of it, of an adapter or of a run, on one page to look at."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from nlora_surgery.adapter import Adapter, check_base
from nlora_surgery.charts import need_matplotlib
from nlora_surgery.checkpoint import ADAPTER_CONFIG, Checkpoint, read_json
from nlora_surgery.errors import (
    AdapterError,
    BaseMismatchError,
    CheckpointError,
    OptionError,
    OutputError,
    TrainingError,
    UnsupportedCheckpointError,
)
from nlora_surgery.factor import Factors, moved_sides, product_svd
from nlora_surgery.manifest import has_init_manifest, read_manifest, summarize
from nlora_surgery.page import GENERATOR, render
from nlora_surgery.rewrite import Progress
from nlora_surgery.spectra import (
    MOST_RANK,
    Spectra,
    SpectraOptions,
    Weights,
    frobenius_norm,
    measure_spectra,
    original_weights,
    place,
    place_labels,
)
from nlora_surgery.staging import disk_errors
from nlora_surgery.surgery.inspect import inspect
from nlora_surgery.targets import Target, choose_targets, is_conv1d, tensor_aliases

__all__ = ["ReportOptions", "gather", "report"]

_RUN_OPTIONS: Final = "train_options.json"
_METRICS: Final = "metrics.jsonl"
_RUN_REPORT: Final = "train_report.json"
_START: Final = "start"  # in a run: what it started from, where `train --init` made that


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a page is to show.

    Attributes:
        rank: marked in the spectra; None is the adapter's own, or 64.
        spectra: what is measured of the weights.
        targets, exclude: see `choose_targets`; for a checkpoint, everything else has its modules already.
    """

    rank: int | None = None
    spectra: SpectraOptions = field(default_factory=SpectraOptions)
    targets: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            OptionError: with the option's name, what was found and what is possible.
        """
        self.spectra.check()
        if self.rank is not None and not 1 <= self.rank <= MOST_RANK:
            raise OptionError(f"--rank must be from 1 to {MOST_RANK}, not {self.rank}")


def report(
    directory: Path,
    out: Path,
    options: ReportOptions | None = None,
    *,
    name: str | None = None,
    base: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and write the page.

    Args:
        directory, options, name, base, device, progress: see `gather`.
        out: the file to write; it is there whole or not at all.
        overwrite: replace an earlier page.

    Returns:
        The figures on the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: `out` exists, and is not to be replaced or is no page of ours; or it cannot be written.
        Whatever `gather` raises.
    """
    need_matplotlib()
    with disk_errors(out):
        _check_file(out, overwrite=overwrite)
    found = gather(directory, options, name=name, base=base, device=device, progress=progress)
    page = render(found)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.unfinished")
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    return found


def _check_file(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise OutputError(f"{out} is a directory; name a file with -o")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; name another output with -o, or replace it with --overwrite")
    with open(out, "rb") as file:
        if GENERATOR.encode() not in file.read(4096):
            raise OutputError(
                f"{out} is no page of nlora_surgery report, so --overwrite will not replace it; remove it yourself or "
                "name another output"
            )


def gather(
    directory: Path,
    options: ReportOptions | None = None,
    *,
    name: str | None = None,
    base: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of a page, as JSON values.

    Args:
        directory: a checkpoint, an output of init, an adapter, or a run of train.
        options: what to show.
        name: how the user named it; the path by default.
        base: directory of the model that an adapter, or an output of init without shards, was made for; by default
            what it names itself, if that is a directory here.
        device: where spectra are computed.
        progress: listens to that.

    Returns:
        `kind` (`checkpoint`, `prepared`, `adapter` or `run`), `name`, `rank`, `described` (see `inspect`), and what
        there is of: `spectra` (see `Spectra.summary`) with the `curve` of each kind and `modules`, each with its
        `curve`, the energies at rank 1, 2, …; `start`, the manifest's figures by module; `change`, how far the
        adapter has gone; `training`, the losses. `notes` say what is not there, and why.

    Raises:
        CheckpointError, AdapterError, TargetError, UnsupportedCheckpointError: see their classes.
        BaseMismatchError: `base` is not the adapter's.
        OptionError: impossible options.
    """
    options = options or ReportOptions()
    options.check()
    is_prepared = has_init_manifest(directory)
    is_adapter = not is_prepared and (directory / ADAPTER_CONFIG).exists()
    if not (is_prepared or is_adapter) and (directory / _RUN_OPTIONS).exists():
        raise CheckpointError(
            f"{directory} is a run that has not finished; name its last checkpoint, a directory in it"
        )
    if not (is_prepared or is_adapter) and base is not None:
        raise OptionError("--base is for adapters and outputs of init without shards; a checkpoint has its weights")
    if (is_prepared or is_adapter) and (options.targets or options.exclude):
        raise OptionError("--targets and --exclude are for checkpoints; an adapter has its modules")
    found: dict[str, Any] = {"name": name or str(directory), "notes": []}
    if is_prepared:
        weights = _add_prepared(found, directory, options, base)
    elif is_adapter:
        weights = _add_adapter(found, directory, options, base)
    else:
        weights = _add_checkpoint(found, directory, options)
    if weights is not None:
        ranks = sorted({*options.spectra.ranks, found["rank"]})
        spectra = measure_spectra(weights, replace(options.spectra, ranks=ranks), device=device, progress=progress)
        found["spectra"] = _spectra(spectra, weights)
    return found


def _add_checkpoint(found: dict[str, Any], directory: Path, options: ReportOptions) -> Weights:
    rank = options.rank or 64
    found |= {"kind": "checkpoint", "rank": rank, "described": inspect(directory, rank)}
    if "refused" in found["described"]:
        raise UnsupportedCheckpointError(found["described"]["refused"])
    checkpoint = Checkpoint.open(directory)
    return Weights(checkpoint, choose_targets(checkpoint, rank, options.targets, options.exclude))


def _add_prepared(found: dict[str, Any], directory: Path, options: ReportOptions, base: Path | None) -> Weights | None:
    manifest = read_manifest(directory)
    rank = options.rank or int(manifest["options"]["rank"])
    found |= {"kind": "prepared", "rank": rank, "described": inspect(directory), "start": _start(manifest)}
    found["notes"] += found["described"]["warnings"]
    return _originals(found, directory, manifest, base)


def _originals(
    found: dict[str, Any], directory: Path, manifest: Mapping[str, Any], base: Path | None
) -> Weights | None:
    try:
        return original_weights(directory, manifest, base)
    except BaseMismatchError as reason:
        if base is not None:
            raise
        found["notes"].append(f"No spectra: {reason}. Name the model with --base.")
        return None


def _start(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that init recorded, by module and by kind."""
    figures = ("energy", "delta_ratio", "drift")
    modules = [
        {"module": entry["module"], "r": entry["r"], **{figure: entry[figure] for figure in figures}}
        for entry in manifest["modules"]
    ]
    return {"options": manifest["options"], "modules": modules, "kinds": summarize(manifest)[0]}


# --- spectra ---------------------------------------------------------------------------------------------


def _spectra(spectra: Spectra, weights: Weights) -> dict[str, Any]:
    summary = spectra.summary()
    labels = place_labels(place(target.module) for target in spectra.targets)
    by_label: dict[str, list[list[float]]] = {}
    modules = []
    for spectrum in spectra.measured:
        where = place(spectrum.target.module)
        energies = spectrum.energies()
        if energies is None:
            continue
        by_label.setdefault(labels[where.stack, where.kind], []).append(energies)
        values = [float(value) / spectrum.weight_norm for value in spectrum.values]
        modules.append(
            {
                "module": spectrum.target.module,
                "weight_norm": spectrum.weight_norm,
                "exact": spectrum.exact,
                "curve": [round(energy, 6) for energy in energies],
                "values": [float(f"{value:.4g}") for value in values],
            }
        )
    for kind in summary["kinds"]:
        curves = by_label.get(kind["kind"], [])
        length = max(map(len, curves), default=0)
        kind["curve"] = [
            statistics.fmean(curve[min(rank, len(curve) - 1)] for curve in curves) for rank in range(length)
        ]
        kind["sizes"] = _sizes(target for target in spectra.targets if _label(target, labels) == kind["kind"])
    return summary | {"modules": modules, "of": "residuals" if weights.start is not None else "weights"}


def _label(target: Target, labels: Mapping[tuple[str, str], str]) -> str:
    where = place(target.module)
    return labels[where.stack, where.kind]


def _sizes(targets: Iterator[Target]) -> list[list[int]]:
    """(out, in, how many matrices) of each shape."""
    counts: dict[tuple[int, int], int] = {}
    for target in targets:
        shape = target.out_features, target.in_features
        counts[shape] = counts.get(shape, 0) + (target.experts or 1)
    return [[*shape, count] for shape, count in counts.items()]


# --- adapters and runs -----------------------------------------------------------------------------------


def _add_adapter(found: dict[str, Any], directory: Path, options: ReportOptions, base: Path | None) -> Weights | None:
    adapter = Adapter.open(directory)
    found |= {"rank": options.rank or adapter.config.r, "described": inspect(directory)}
    run = directory if (directory / _METRICS).exists() else directory.parent
    if (run / _METRICS).exists() and (run == directory or (run / _RUN_OPTIONS).exists()):
        found |= {"kind": "run", "training": _training(run)}
    else:
        found["kind"], run = "adapter", directory

    home = run / _START if has_init_manifest(run / _START) else None
    if home is None:
        base = _base(found, adapter, base)
        home = base if base is not None and has_init_manifest(base) else None
    weights: Weights | None = None
    start: Adapter | None = None
    norms: dict[str, float] = {}
    if home is not None:
        manifest = read_manifest(home)
        found["start"] = _start(manifest)
        start = Adapter.open(home / manifest["adapter"]["folder"])
        weights = _originals(found, home, manifest, None if base == home else base)
        norms = {entry["module"]: entry["weight_norm"] for entry in manifest["modules"] if entry["weight_norm"]}
    elif base is not None:
        weights = _named_weights(found, adapter, base)
    if weights is not None:
        norms |= {target.module: _norm(weights, target) for target in weights.targets if target.module not in norms}
    found["change"] = _change(found, adapter, start, norms)
    return weights


def _base(found: dict[str, Any], adapter: Adapter, base: Path | None) -> Path | None:
    """The directory of the adapter's base, if it is here and is that base."""
    named = adapter.config.base_model_name_or_path
    path = base or (Path(named) if named else None)
    here = adapter.directory.resolve()
    if base is None and has_init_manifest(here.parent):
        path = here.parent if read_manifest(here.parent)["adapter"]["folder"] == here.name else path
    if path is None or not path.is_dir():
        found["notes"].append(
            f"The base {'that the adapter names, ' + named + ',' if named else 'of the adapter'} is no directory here, "
            "so there are no spectra of its weights, and sizes are not relative to them. Name it with --base."
        )
        return None
    try:
        # An output of init without shards stands for the model that it was made from, which is checked when it is read.
        if not has_init_manifest(path) or read_manifest(path)["options"]["residual"] == "baked":
            with Checkpoint.open(path) as checkpoint:
                check_base(adapter, checkpoint)
    except (CheckpointError, AdapterError) as reason:
        if base is not None:
            raise
        found["notes"].append(f"Nothing here is relative to the base: {reason}.")
        return None
    return path


def _named_weights(found: dict[str, Any], adapter: Adapter, base: Path) -> Weights | None:
    checkpoint = Checkpoint.open(base)
    try:
        names = adapter.resolve(checkpoint, aliases=tensor_aliases(checkpoint))
    except AdapterError as reason:
        found["notes"].append(f"Nothing here is relative to the base: {reason}.")
        return None
    targets = []
    for module in adapter.parts:
        shape = adapter.shape(module)
        info = checkpoint.tensors[names[module]]
        dimensions = 2 + len(shape.kernel or ()) if shape.experts is None else 3
        if info.torch_dtype is None or len(info.shape) != dimensions:
            continue
        targets.append(
            Target(
                info.name,
                module,
                shape.out_features,
                shape.in_features,
                is_conv1d(checkpoint, module),
                shape.r,
                shape.experts,
                shape.kernel,
            )
        )
    return Weights(checkpoint, targets) if targets else None


def _change(
    found: dict[str, Any], adapter: Adapter, start: Adapter | None, norms: Mapping[str, float]
) -> dict[str, Any]:
    """How far each module is from its start, or from zero where the start is not known.

    From factors of rank 2 r at most, by QR of both sides and the singular values of what is between them.
    """
    origins = {module: adapter.initial(module) or _start_of(start, adapter, module) for module in adapter.parts}
    from_start = all(origin is not None for origin in origins.values())
    modules = []
    for module, origin in origins.items():
        factors, scaling = adapter.factors(module), adapter.scaling(module)
        if from_start and origin is not None:
            left, right = moved_sides(factors, origin, scaling, torch.float64)
        else:
            left, right = factors.sides(scaling, torch.float64)
        values = _product_values(left, right)
        norm = float(torch.linalg.vector_norm(values))
        size = norms.get(module)
        modules.append(
            {
                "module": module,
                "r": adapter.shape(module).r,
                "norm": norm,
                "ratio": norm / size if size else None,
                "rank90": _rank_holding(values, 0.9),
            }
        )
    if adapter.three_matrix and not from_start:
        found["notes"].append(
            "The adapter's start is not here, so its figures are those of the whole product, of which training may "
            "have made a small part. Name the output of init that it was trained from with --base."
        )
    if any("magnitude" in parts for parts in adapter.parts.values()):
        found["notes"].append("DoRA's magnitudes are not in these figures, which are those of the products alone.")
    return {"since": "start" if from_start else "zero", "modules": modules}


def _start_of(start: Adapter | None, adapter: Adapter, module: str) -> Factors | None:
    if start is None or module not in start.parts or start.shape(module) != adapter.shape(module):
        return None
    if start.three_matrix != adapter.three_matrix or start.scaling(module) != adapter.scaling(module):
        return None
    return start.factors(module)


def _product_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of `left @ right`; of a stack, the root mean square over its matrices."""
    if left.ndim == 2:
        return product_svd(left, None, right).S
    stacked = torch.stack([product_svd(one, None, other).S for one, other in zip(left, right, strict=True)])
    return stacked.square().sum(0).sqrt()  # so that the norm is that of the whole stack


def _rank_holding(values: torch.Tensor, share: float) -> int:
    """The least rank that holds a share of the energy; 0 for a product of zero."""
    squares = values.square().cumsum(0)
    if not float(squares[-1]):
        return 0
    return int(torch.searchsorted(squares, share * squares[-1])) + 1


def _norm(weights: Weights, target: Target) -> float:
    if target.experts is None:
        return frobenius_norm(weights.matrix(target))
    return math.hypot(*(frobenius_norm(weights.matrix(target, expert)) for expert in range(target.experts)))


def _training(run: Path) -> dict[str, Any]:
    """Losses by step, and what the run reported at its end."""
    losses: list[list[float]] = []
    evals: list[list[float]] = []
    for entry in _lines(run / _METRICS):
        for name, points in (("loss", losses), ("eval_loss", evals)):
            step, value = entry.get("step"), entry.get(name)
            if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
                points.append([step, value])
    finished = (run / _RUN_REPORT).exists()
    return {
        "losses": losses,
        "eval_losses": evals,
        "report": read_json(run / _RUN_REPORT, TrainingError) if finished else None,
    }


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a file of JSON lines; what a kill cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry
