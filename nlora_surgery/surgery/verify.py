"""verify: was anything lost? Every element against a bound that is computed, not guessed; then the logits."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlora_surgery.adapter import Adapter, check_base
from nlora_surgery.checkpoint import Checkpoint, read_json
from nlora_surgery.devices import compute_dtype, single_threaded_torch
from nlora_surgery.errors import AdapterError, BaseMismatchError, VerificationError
from nlora_surgery.factor import Factors, row_tiles
from nlora_surgery.manifest import read_manifest
from nlora_surgery.options import STARTS_AT_ZERO
from nlora_surgery.rewrite import Progress
from nlora_surgery.targets import module_kind

__all__ = ["LogitsReport", "Prepared", "Verification", "half_ulp", "verify", "verify_logits"]


@dataclass
class Prepared:
    """An output of `init`, opened.

    Attributes:
        directory: where it lies.
        manifest: as written.
        adapter: its adapter.
        base: the residual base, or None where no shards were written.
    """

    directory: Path
    manifest: dict[str, Any]
    adapter: Adapter
    base: Checkpoint | None

    @classmethod
    def open(cls, directory: Path) -> Prepared:
        """Open a prepared checkpoint.

        Raises:
            CheckpointError: the directory is none, or its files are damaged.
            AdapterError: its adapter is damaged.
        """
        manifest = read_manifest(directory)
        base = Checkpoint.open(directory) if manifest["options"]["residual"] == "baked" else None
        return cls(directory, manifest, Adapter.open(directory / manifest["adapter"]["folder"]), base)

    @property
    def residual(self) -> str:
        """`baked`, `virtual` or `none`."""
        return str(self.manifest["options"]["residual"])

    @property
    def starts_at_zero(self) -> bool:
        """Whether the method subtracts nothing because its start is zero."""
        return self.manifest["options"]["method"] in STARTS_AT_ZERO


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        failures: one sentence each; empty when nothing was lost.
        checked: what was compared, in words.
        modules: for each target: `module`, `max_error`, `worst_share` (the largest share of its bound that an
            element's error takes) and `drift` (‖effective - original‖/‖original‖).
    """

    failures: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)

    def by_kind(self) -> list[dict[str, Any]]:
        """One row per module kind: `kind`, `count`, `max_error`, `worst_share`, mean `drift`."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for module in self.modules:
            groups.setdefault(module_kind(module["module"]), []).append(module)
        return [
            {
                "kind": kind,
                "count": len(modules),
                "max_error": max(module["max_error"] for module in modules),
                "worst_share": max(module["worst_share"] for module in modules),
                "drift": statistics.fmean(module["drift"] for module in modules),
            }
            for kind, modules in groups.items()
        ]


def half_ulp(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The most by which rounding to nearest can have moved a number that came out as `stored`.

    Args:
        stored: values that `dtype` represents, in any dtype that holds them.
        dtype: F16, BF16, F32 or F64.

    Returns:
        Half of the distance to the next larger magnitude, fp64, same shape.
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(stored.to(torch.float64))  # |stored| = m * 2^exponent, m in [0.5, 1)
    lowest = round(math.log2(info.tiny)) + 1  # below the normal numbers the distance stays the same
    half = exponent.clamp_min(lowest) - 2 + round(math.log2(info.eps))
    # 2^half from its bits: exact, where pow is not. fp64 itself cannot go below its normal numbers here.
    return (half.clamp_min(-1022).to(torch.int64) + 1023 << 52).view(torch.float64)


def verify(directory: Path, against: Path | None = None, *, progress: Progress | None = None) -> Verification:
    """Check a prepared checkpoint, by itself or against the original.

    By itself: every tensor that init computed has the checksum that the manifest records, and base and
    adapter belong together. Against the original, all of it, streamed: same files, names, order, shapes,
    dtypes and metadata; untouched tensors and other files equal byte for byte; and for every element of every
    target the effective weight within

        half an ulp of the stored residual
        + γ(2r+2) |s| |lora_B| |lora_N| |lora_A| + γ(r+1) |weight|,      γ(n) = n u / (1 - n u)

    of the original. The second line is how far `init`'s own arithmetic can be off (Higham 2002, section 3.5:
    inner products of length r, twice in a row, and one addition, in any order), with u the unit roundoff of
    the dtype it computes in, plus the same at fp64's u for the arithmetic here.

    Args:
        directory: an output of `init`.
        against: the original.
        progress: listens.

    Returns:
        What was checked and what failed.

    Raises:
        CheckpointError, AdapterError: a directory cannot be opened.
        BaseMismatchError: `against` is not the model that `directory` was made from.
    """
    progress = progress or Progress()
    prepared = Prepared.open(directory)
    report = Verification()
    try:
        if prepared.base is not None:
            check_base(prepared.adapter, prepared.base)
        if against is None:
            _check_checksums(prepared, report)
            return report
        with Checkpoint.open(against) as original:
            if prepared.manifest["source"]["fingerprint"] != original.fingerprint():
                raise BaseMismatchError(
                    f"{directory} was made from {prepared.manifest['source']['name']}, and {against} is another "
                    "model: their fingerprints differ"
                )
            _check_checksums(prepared, report)
            if prepared.base is not None:
                _check_untouched(prepared, prepared.base, original, report)
            _check_targets(prepared, original, report, progress)
    finally:
        progress.stop()
    return report


def _check_checksums(prepared: Prepared, report: Verification) -> None:
    count = 0
    for module in prepared.manifest["modules"]:
        for name, expected in module["checksums"].items():
            holder = prepared.adapter.file if name in prepared.adapter.file.tensors else prepared.base
            if holder is None or name not in holder.tensors:
                report.failures.append(f"{name} is missing")
            elif zlib.crc32(holder.raw(name)) != expected:
                report.failures.append(f"{name} is not what init wrote: its checksum differs from the manifest's")
            count += 1
    report.checked.append(f"{count} tensors against the checksums that init recorded")


def _check_untouched(prepared: Prepared, base: Checkpoint, original: Checkpoint, report: Verification) -> None:
    if base.files.keys() != original.files.keys():
        report.failures.append(f"the files differ: {sorted(base.files)} against {sorted(original.files)}")
        return
    for name, layout in original.files.items():
        if base.files[name].header != layout.header:
            report.failures.append(f"{name} has another header: names, order, dtypes, shapes or metadata changed")
            return
    targets = {module["tensor"] for module in prepared.manifest["modules"]}
    untouched = [name for name in original.tensors if name not in targets]
    report.failures += [
        f"{name} changed, but is no target" for name in untouched if base.raw(name) != original.raw(name)
    ]
    others, _ = original.other_files()
    for name in others:
        ours = prepared.directory / name
        if not ours.is_file() or ours.read_bytes() != (original.directory / name).read_bytes():
            report.failures.append(f"{name} is not the original's")
    report.checked.append(
        f"headers of {len(original.files)} files, {len(untouched)} untouched tensors and {len(others)} other files "
        "against the original's, byte for byte"
    )


def _check_targets(prepared: Prepared, original: Checkpoint, report: Verification, progress: Progress) -> None:
    modules = prepared.manifest["modules"]
    progress.start(sum(original.tensors[module["tensor"]].size_bytes for module in modules))

    def check(module: Mapping[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            result = _check_target(prepared, original, module)
        progress.advance(original.tensors[module["tensor"]].size_bytes)
        original.release(module["tensor"])
        return result

    with single_threaded_torch(), ThreadPoolExecutor(_cores()) as pool:
        report.modules = list(pool.map(check, modules))
    beyond = [module for module in report.modules if not module["worst_share"] <= 1]
    if beyond and prepared.residual == "none":
        report.failures.append(
            f"prepared with --residual none: the start is weight + delta by choice, {len(beyond)} modules differ from "
            f"the original, by {statistics.fmean(module['drift'] for module in beyond):.3g} of its norm on average"
        )
    else:
        report.failures += [
            f"{module['module']}: an element is off by {module['worst_share']:.3g} times its bound "
            f"(largest error {module['max_error']:.3g})"
            for module in beyond
        ]
    report.checked.append(f"every element of {len(modules)} target weights against its bound")


def _check_target(prepared: Prepared, original: Checkpoint, module: Mapping[str, Any]) -> dict[str, Any]:
    """The errors of one target's effective weight, element by element, in fp64."""
    weight = original.tensor(module["tensor"])
    stored = weight if prepared.base is None else prepared.base.tensor(module["tensor"])
    delta, magnitude = _effective_delta(prepared, module["module"])
    if module["fan_in_fan_out"]:
        delta, magnitude = _transposed(delta), _transposed(magnitude)
    changed = prepared.base is not None and not prepared.starts_at_zero
    r, unit = module["r"], torch.finfo(compute_dtype(weight.dtype)).eps / 2
    unit_here = torch.finfo(torch.float64).eps / 2
    product_share = _gamma(2 * r + 2, unit) + _gamma(2 * r + 2, unit_here)
    weight_share = _gamma(r + 1, unit) + _gamma(r + 2, unit_here)

    max_error = worst_share = error_square = weight_square = 0.0
    for rows in row_tiles(weight.shape, 8):
        exact = weight[rows].double()
        held = stored[rows].double()
        error = (held - exact).add_(delta[0][rows] @ delta[1]).abs_()
        if changed:
            bound = half_ulp(held, weight.dtype)
            bound += product_share * (magnitude[0][rows] @ magnitude[1]) + weight_share * exact.abs()
            # 0 / 0 is no error; anything else over 0, and NaN, is beyond every bound.
            share = torch.where(error == 0, 0.0, error / bound)
        else:
            share = torch.where(error == 0, 0.0, math.inf)
        max_error = max(max_error, float(error.max()))
        worst_share = max(worst_share, float(share.nan_to_num(nan=math.inf).max()))
        error_square += float(error.square().sum())
        weight_square += float(exact.square().sum())
    drift = math.sqrt(error_square / weight_square) if weight_square else math.sqrt(error_square)
    return {"module": module["module"], "max_error": max_error, "worst_share": worst_share, "drift": drift}


_Sides = tuple[Tensor, Tensor]  # left (out, k) and right (k, in) of a product


def _effective_delta(prepared: Prepared, module: str) -> tuple[_Sides, _Sides]:
    """What the adapter adds to a module's weight, and the same of absolute values, as left and right factors."""
    adapter = prepared.adapter
    factors = adapter.factors(module)
    core = None if factors.lora_N is None else factors.lora_N.double().abs()
    size = Factors(factors.lora_A.double().abs(), factors.lora_B.double().abs(), core)
    return adapter.sides(module, torch.float64), size.sides(abs(adapter.scaling(module)), torch.float64)


def _transposed(sides: _Sides) -> _Sides:
    return sides[1].T, sides[0].T


def _gamma(n: int, unit: float) -> float:
    """Higham's γ(n): the relative error that n roundings can add up to."""
    return n * unit / (1 - n * unit)


# --- logits -------------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Question: A shop sells pencils at 3 for 2 dollars. How much do 12 pencils cost?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
)
# The difference may be this many times what one more rounding of the same weights makes: 1 is expected, and a
# wrong factor, scaling or module makes it many times larger.
_NOISE_FACTOR = 3.0


@dataclass(frozen=True)
class LogitsReport:
    """How far the prepared model's logits are from the original's, both computed in fp32.

    Attributes:
        max_difference, rms_difference: of the logits.
        mean_kl: Kullback-Leibler divergence of the next-token distributions, in nats, over all positions.
        greedy_agreement: share of positions with the same most likely token.
        noise_rms: rms difference that one more rounding of the stored weights makes (see `verify_logits`).
        positions: how many were compared.
    """

    max_difference: float
    rms_difference: float
    mean_kl: float
    greedy_agreement: float
    noise_rms: float
    positions: int

    @property
    def passed(self) -> bool:
        """Whether the difference is what rounding explains; without rounding there must be none."""
        return self.rms_difference <= _NOISE_FACTOR * self.noise_rms


def verify_logits(directory: Path, against: Path, prompts: Sequence[str] = PROMPTS) -> LogitsReport:
    """Load the original and the prepared model with transformers, apply the adapter, compare logits.

    The yardstick is measured, not chosen: the prepared model runs a second time with every stored residual
    moved at random within the error bound that `verify` grants each element, as if it had been rounded once
    more. That changes the logits by as much as rounding the residual did, if rounding is all that happened.

    Args:
        directory: an output of `init`.
        against: the original.
        prompts: what to run; random tokens where the original has no tokenizer.

    Returns:
        The report; see `LogitsReport.passed`.

    Raises:
        CheckpointError, AdapterError: a directory cannot be opened, or the model lacks an adapted module.
        VerificationError: transformers cannot load one of the two.
    """
    prepared = Prepared.open(directory)
    inputs = _inputs(against, prompts)
    model = _load(against)
    expected = _logits(model, inputs)
    if prepared.base is not None:
        del model
        gc.collect()
        model = _load(directory)
    _apply_adapter(model, prepared)
    actual = _logits(model, inputs)
    _round_once_more(model, prepared)
    noisy = _logits(model, inputs)

    difference = actual - expected
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return LogitsReport(
        max_difference=float(difference.abs().max()),
        rms_difference=float(difference.double().square().mean().sqrt()),
        mean_kl=max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())),
        greedy_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        noise_rms=float((noisy - actual).double().square().mean().sqrt()),
        positions=len(expected),
    )


def _load(directory: Path) -> Any:
    import transformers

    architectures = read_json(directory / "config.json").get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    auto = getattr(transformers, name, None) or transformers.AutoModelForCausalLM
    try:
        return auto.from_pretrained(str(directory), dtype=torch.float32).eval()
    except Exception as error:  # whatever transformers raises, the finding is the same: it does not load
        raise VerificationError(f"transformers cannot load {directory}: {error}") from error


def _inputs(directory: Path, prompts: Sequence[str]) -> list[Tensor]:
    from transformers import AutoTokenizer

    encoded: list[Tensor] = []
    # A directory without tokenizer files may raise any of these, or give a tokenizer that knows no token.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        encoded = [tokenizer(prompt, return_tensors="pt").input_ids.long() for prompt in prompts]
    encoded = [ids for ids in encoded if ids.numel()]
    if encoded:
        return encoded
    config = read_json(directory / "config.json")
    size = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 100))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, 16), generator=generator) for _ in prompts]


def _logits(model: Any, inputs: Sequence[Tensor]) -> Tensor:
    """Logits (positions, vocabulary) over all inputs."""
    with torch.inference_mode():
        outputs = [model(input_ids=ids) for ids in inputs]
    logits = [output.logits if "logits" in output else output.last_hidden_state for output in outputs]
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in logits])


def _apply_adapter(model: Any, prepared: Prepared) -> None:
    """Add the adapter's output to each adapted module's, as the layer that trains it does."""

    def hook(module: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        scaling = prepared.adapter.scaling(module)
        factors, initial = prepared.adapter.factors(module), prepared.adapter.initial(module)

        def through(which: Factors, x: Tensor) -> Tensor:
            for matrix in which.matrices():
                x = x @ matrix.float().T
            return scaling * x

        def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            delta = through(factors, inputs[0])
            return output + (delta if initial is None else delta - through(initial, inputs[0]))

        return add

    for module in prepared.adapter.parts:
        _submodule(model, module).register_forward_hook(hook(module))


def _round_once_more(model: Any, prepared: Prepared) -> None:
    """Move every stored weight of the model at random, within what rounding and fp32 arithmetic can do to it."""
    if prepared.base is None or prepared.starts_at_zero:
        return  # nothing was rounded and nothing is added, so nothing may differ
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(torch.float32).eps / 2
    with torch.inference_mode():
        for entry in prepared.manifest["modules"]:
            stored = prepared.base.tensor(entry["tensor"])
            _, magnitude = _effective_delta(prepared, entry["module"])
            left, right = _transposed(magnitude) if entry["fan_in_fan_out"] else magnitude
            exact, r = stored.double(), entry["r"]
            bound = half_ulp(exact, stored.dtype)
            # The model's own arithmetic: an fp32 weight is not rounded any further, but the path through the
            # adapter is another order of summation than the one weight that the original has. n roundings add
            # up to about sqrt(n) of one (Higham and Mary 2019); γ(n) is for bounds, not for what is typical.
            bound += unit * (math.sqrt(2 * r + 2) * (left @ right) + math.sqrt(r + 1) * exact.abs())
            noise = torch.rand(stored.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(bound)
            parameter = _submodule(model, entry["module"]).weight
            parameter.copy_((exact + noise).to(parameter.dtype))


def _submodule(model: Any, module: str) -> Any:
    names = [module, f"{model.base_model_prefix}.{module}"]
    for name in names:
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise AdapterError(f"{type(model).__name__} has no module {module!r}, which the adapter adapts")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
