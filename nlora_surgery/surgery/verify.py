"""verify: was anything lost? Every element against a bound that is computed, not guessed; then the logits."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlora_surgery.adapter import Adapter, check_base
from nlora_surgery.checkpoint import Checkpoint, read_json
from nlora_surgery.devices import compute_dtype, cpu_cores, single_threaded_torch
from nlora_surgery.errors import BaseMismatchError, VerificationError
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

    with single_threaded_torch(), ThreadPoolExecutor(cpu_cores()) as pool:
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
    changed = prepared.base is not None and not prepared.starts_at_zero
    r, unit = module["r"], torch.finfo(compute_dtype(weight.dtype)).eps / 2
    unit_here = torch.finfo(torch.float64).eps / 2
    product_share = _gamma(2 * r + 2, unit) + _gamma(2 * r + 2, unit_here)
    weight_share = _gamma(r + 1, unit) + _gamma(r + 2, unit_here)

    max_error = worst_share = error_square = weight_square = 0.0
    for expert, before, after in _matrices(module, weight, stored):
        delta, magnitude = _effective_delta(prepared, module, expert)
        for rows in row_tiles(before.shape, 8):
            exact = before[rows].double()
            held = after[rows].double()
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


def _matrices(module: Mapping[str, Any], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Views of a module's tensors as matrices: each expert's with its number, or the only ones with None."""
    if module["experts"] is None:
        yield (None, *(tensor.flatten(1) for tensor in tensors))  # a convolution's kernel counts as inputs
    else:
        yield from ((expert, *(tensor[expert] for tensor in tensors)) for expert in range(len(tensors[0])))


_Sides = tuple[Tensor, Tensor]  # left (out, k) and right (k, in) of a product


def _effective_delta(prepared: Prepared, module: Mapping[str, Any], expert: int | None) -> tuple[_Sides, _Sides]:
    """What the adapter adds to a weight as it lies, and the same of absolute values, as left and right factors."""
    adapter, name = prepared.adapter, module["module"]
    factors = adapter.factors(name) if expert is None else adapter.factors(name).expert(expert)
    core = None if factors.lora_N is None else factors.lora_N.double().abs()
    size = Factors(factors.lora_A.double().abs(), factors.lora_B.double().abs(), core)
    delta = adapter.sides(name, torch.float64, expert=expert)
    magnitude = size.sides(abs(adapter.scaling(name)), torch.float64)
    return (_transposed(delta), _transposed(magnitude)) if module["fan_in_fan_out"] else (delta, magnitude)


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


# What is small is no statistic: outputs of fewer numbers than this are compared with the noise of several draws.
_FEW_NUMBERS, _DRAWS = 4096, 4
_LARGE_BYTES = 64 << 20
_ANY_IMAGE = 64  # side of the images for models that take any size


@dataclass(frozen=True)
class LogitsReport:
    """How far the prepared model's outputs are from the original's, both computed in fp32.

    All but the last two are about the logits, or what a model has in their place.

    Attributes:
        max_difference, rms_difference: of the logits.
        mean_kl: Kullback-Leibler divergence of the next-token distributions, in nats, over all positions.
        greedy_agreement: share of positions with the same most likely token.
        noise_rms: rms difference that one more rounding of the stored weights makes (see `verify_logits`).
        positions: how many were compared.
        worst_output: the output whose difference is the most in terms of its noise: `logits`, or another of the
            model's (`image_embeds`, `encoder_last_hidden_state`).
        worst_ratio: its rms difference, that of its noise taken as 1.
    """

    max_difference: float
    rms_difference: float
    mean_kl: float
    greedy_agreement: float
    noise_rms: float
    positions: int
    worst_output: str
    worst_ratio: float

    @property
    def passed(self) -> bool:
        """Whether the differences are what rounding explains; without rounding there must be none."""
        return self.worst_ratio <= _NOISE_FACTOR


def verify_logits(directory: Path, against: Path, prompts: Sequence[str] = PROMPTS) -> LogitsReport:
    """Load the original and the prepared model with transformers, each weight with its product added, compare outputs.

    The prepared model is loaded from its effective weights under their names on disk, so that transformers does with
    them what it does with any checkpoint: renames, fuses experts, ties.

    The yardstick is measured, not chosen: the prepared model runs a second time with every stored residual
    moved at random within the error bound that `verify` grants each element, as if it had been rounded once
    more. That changes the logits by as much as rounding the residual did, if rounding is all that happened.

    Args:
        directory: an output of `init`.
        against: the original.
        prompts: what a model of texts runs; random tokens where the original has no tokenizer. Models of images or
            sounds run random ones.

    Returns:
        The report; see `LogitsReport.passed`.

    Raises:
        CheckpointError, AdapterError: a directory cannot be opened.
        VerificationError: transformers cannot load or run one of the two.
    """
    prepared = Prepared.open(directory)
    tokens = _token_ids(against, prompts)
    with Checkpoint.open(against) as original:
        expected = _outputs(against, original, {}, tokens)
        base = prepared.base or original
        modules = {entry["tensor"]: entry for entry in prepared.manifest["modules"]}

        def outputs(noise: int | None) -> dict[str, Tensor]:
            weights = {
                name: partial(_effective_weight, prepared, base, entry, noise) for name, entry in modules.items()
            }
            return _outputs(against, base, weights, tokens)

        actual = outputs(None)
        draws = 1 if all(output.numel() >= _FEW_NUMBERS for output in expected.values()) else _DRAWS
        rounded = prepared.base is not None and not prepared.starts_at_zero
        noisy = [outputs(draw) for draw in range(draws)] if rounded else [actual]  # or nothing may differ

    # A token that rounding sends to another expert moves by far more than rounding itself: few of them shall not count.
    typical = _median_rms if any(".experts." in name for name in original.tensors) else _rms
    worst_output, worst_ratio, first = "", -1.0, next(iter(expected))
    for name, output in expected.items():
        difference, noise = typical(actual[name] - output), _noise(noisy, actual, name, typical)
        ratio = difference / noise if noise else (math.inf if difference else 0.0)
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > worst_ratio:
            worst_output, worst_ratio = name, ratio
    log_p, log_q = expected[first].log_softmax(-1), actual[first].log_softmax(-1)
    change = actual[first] - expected[first]
    return LogitsReport(
        max_difference=float(change.abs().max()),
        rms_difference=_rms(change),
        mean_kl=max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())),
        greedy_agreement=float((expected[first].argmax(-1) == actual[first].argmax(-1)).double().mean()),
        noise_rms=_noise(noisy, actual, first),
        positions=len(expected[first]),
        worst_output=worst_output,
        worst_ratio=worst_ratio,
    )


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _median_rms(difference: Tensor) -> float:
    """The median over positions."""
    return float(difference.double().square().mean(-1).median().sqrt())


def _noise(
    noisy: Sequence[Mapping[str, Tensor]],
    actual: Mapping[str, Tensor],
    name: str,
    typical: Callable[[Tensor], float] = _rms,
) -> float:
    return math.sqrt(statistics.fmean(typical(each[name] - actual[name]) ** 2 for each in noisy))


def _effective_weight(prepared: Prepared, base: Checkpoint, entry: Mapping[str, Any], draw: int | None) -> Tensor:
    """One weight with its adapter's product added, in fp32; with a number, moved at random within its bound."""
    stored = base.tensor(entry["tensor"])
    effective = torch.empty(stored.shape, dtype=torch.float32)
    unit, r = torch.finfo(torch.float32).eps / 2, entry["r"]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{draw}:{entry['tensor']}".encode()))
    for expert, held, out in _matrices(entry, stored, effective):
        (left, right), magnitude = _effective_delta(prepared, entry, expert)
        exact = held.double()
        result = exact + left @ right
        if draw is not None:
            bound = half_ulp(exact, stored.dtype)
            # What an fp32 model does besides: its weight was a product in fp32, or is rounded to it here. n roundings
            # add up to about sqrt(n) of one (Higham and Mary 2019); γ(n) is for bounds, not for what is typical.
            bound += unit * (math.sqrt(2 * r + 2) * (magnitude[0] @ magnitude[1]) + math.sqrt(r + 1) * exact.abs())
            noise = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
            result += noise.mul_(2).sub_(1).mul_(bound)
        out.copy_(result)
    return effective


class _Lazy:
    """A tensor that is computed when transformers reads it, which it does by `tensor[...]`."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute

    def __getitem__(self, _: Any) -> Tensor:
        return self._compute()


def _outputs(
    directory: Path, weights: Checkpoint, changed: Mapping[str, Callable[[], Tensor]], tokens: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Everything that a model of these weights says to the inputs that suit it, as matrices by name.

    Args:
        directory: of the original, whose configuration counts.
        weights: the tensors.
        changed: what takes the place of some, by name.
        tokens: token ids of several prompts, (1, length) each.
    """
    model = _load(directory, weights, changed)
    found: dict[str, list[Tensor]] = {}
    try:
        with torch.inference_mode():
            for call in _calls(model, tokens):
                for name, value in call().items():
                    if torch.is_tensor(value) and value.is_floating_point() and value.ndim > 0:
                        found.setdefault(name, []).append(value.float().reshape(-1, value.shape[-1]))
    except Exception as error:  # whatever a model's code raises, it cannot be run so
        raise VerificationError(f"transformers cannot run {directory}: {error}") from error
    finally:
        del model
        if sum(layout.size_bytes for layout in weights.files.values()) > _LARGE_BYTES:
            gc.collect()  # a model refers to itself; the next one needs its memory
    if not found:
        raise VerificationError(f"the model in {directory} has no output to compare")
    # Some are as wide as their input is long: starts and ends of answers.
    wide = {name: len({value.shape[1] for value in values}) == 1 for name, values in found.items()}
    return {
        name: torch.cat([value if wide[name] else value.reshape(-1, 1) for value in values])
        for name, values in found.items()
    }


def _load(directory: Path, weights: Checkpoint, changed: Mapping[str, Callable[[], Tensor]]) -> Any:
    import transformers
    from safetensors import safe_open

    names = read_json(directory / "config.json").get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    auto = getattr(transformers, name, None) or transformers.AutoModelForCausalLM
    state: dict[str, Any] = {}
    with contextlib.ExitStack() as files:
        for file in weights.files:
            opened = files.enter_context(safe_open(weights.directory / file, "pt"))
            for tensor in weights.files[file].tensors:
                compute = changed.get(tensor)
                state[tensor] = opened.get_slice(tensor) if compute is None else _Lazy(compute)
        try:
            config = transformers.AutoConfig.from_pretrained(str(directory))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # of what the checkpoint lacks, a new head for instance
                model = auto.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
        except Exception as error:  # whatever transformers raises, the finding is the same: it does not load
            raise VerificationError(f"transformers cannot load {weights.directory}: {error}") from error
    return model.eval()


def _token_ids(directory: Path, prompts: Sequence[str]) -> list[Tensor]:
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
    sizes = [part.get("vocab_size") for part in (config, config.get("text_config")) if isinstance(part, dict)]
    size = next((int(size) for size in sizes if size), 100)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, 16), generator=generator) for _ in prompts]


def _calls(model: Any, tokens: Sequence[Tensor]) -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Runs of a model that together use all of its weights, by what it says that it takes."""
    config, kind = model.config, model.main_input_name
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Some have a place for so many tokens and no more, and RoBERTa's kind begins at the third.
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None) or 1 << 20
    tokens = [ids[:, : max(1, longest - 2)] for ids in tokens]
    decoder = {"decoder_input_ids": tokens[0]} if config.is_encoder_decoder else {}
    vision = getattr(config, "vision_config", None)
    if kind == "pixel_values":
        pixels = random(2, *_image_shape(config))
        yield partial(model, pixel_values=pixels, **decoder)
    elif kind == "input_features":
        yield partial(model, input_features=random(1, config.num_mel_bins, 2 * config.max_source_positions), **decoder)
    elif kind == "input_values":
        yield partial(model, input_values=random(1, 4000), **decoder)
    elif vision is not None and hasattr(model, "logit_scale"):  # two encoders side by side
        for ids in tokens:
            yield partial(model, input_ids=ids, pixel_values=random(1, *_image_shape(vision)))
    else:
        # Where an image would stand there is none.
        places = [
            value for name, value in config.to_dict().items() if re.fullmatch(r"(image|video|vision)_.*token.*", name)
        ]
        known = torch.tensor([value for value in places if isinstance(value, int)], dtype=torch.long)
        other = next(token for token in range(text.vocab_size) if token not in known)
        for ids in tokens:
            ids = torch.where(torch.isin(ids, known), other, ids) % text.vocab_size
            yield partial(model, input_ids=ids, **({"decoder_input_ids": ids} if decoder else {}))
        if vision is not None and hasattr(model, "get_image_features"):
            yield partial(_image_features, model, vision, random)


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or _ANY_IMAGE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _image_features(model: Any, vision: Any, random: Callable[..., Tensor]) -> Mapping[str, Any]:
    """What a model of texts and images makes of an image, before any text."""
    if hasattr(vision, "temporal_patch_size"):  # Qwen's, which takes patches of any number of images
        side, merge = vision.patch_size, vision.spatial_merge_size
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        pixels = random((4 * merge) ** 2, channels * vision.temporal_patch_size * side**2)
        found = model.get_image_features(pixels, image_grid_thw=torch.tensor([[1, 4 * merge, 4 * merge]]))
    else:
        found = model.get_image_features(pixel_values=random(1, *_image_shape(vision)))
    values = {"last_hidden_state": found} if torch.is_tensor(found) else found
    values = values if isinstance(values, Mapping) else {"last_hidden_state": torch.cat(list(values))}
    flat = {
        name: torch.cat(list(value))
        if isinstance(value, tuple | list) and value and torch.is_tensor(value[0])
        else value
        for name, value in values.items()
        if name in {"last_hidden_state", "pooler_output"}
    }
    return {f"image {name}": value for name, value in flat.items()}
