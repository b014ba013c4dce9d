"""Spectra of weights and what ranks capture of them. Oracle: torch.linalg.svdvals of the dense weight in fp64."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.errors import BaseMismatchError, OptionError
from nlora_surgery.factor import Factors, module_generator, moved_sides
from nlora_surgery.manifest import read_manifest
from nlora_surgery.options import FactorOptions
from nlora_surgery.spectra import (
    Spectra,
    SpectraOptions,
    Weights,
    evenly,
    frobenius_norm,
    measure_spectra,
    original_weights,
    place,
    place_labels,
    rank_costs,
    singular_values,
)
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.targets import choose_targets
from tests.adapters import save_model
from tests.checkpoints import llama_tensors, write_llama

ALL = SpectraOptions(layers=None)


def generator() -> torch.Generator:
    return module_generator(0, "test")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(out_features: int, in_features: int, values: Tensor) -> Tensor:
    """A matrix of known singular values, by random orthonormal sides."""
    U = torch.linalg.qr(noise(out_features, len(values), seed=1)).Q
    V = torch.linalg.qr(noise(in_features, len(values), seed=2)).Q
    return (U * values) @ V.T


def energies(values: Tensor, norm: float) -> Tensor:
    return (values / norm).square().cumsum(0)


# --- singular values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64), (1, 40), (40, 1)])
def test_small_weights_are_exact(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = noise(*shape).to(dtype)
    values, exact = singular_values(weight, 32, generator())
    wanted = torch.linalg.svdvals(weight.double())[:32]
    assert exact
    assert values.shape == wanted.shape
    # An eigenvalue of an n × n Gram matrix in fp64 is off by some n eps of the largest.
    bound = 8 * min(shape) * torch.finfo(torch.float64).eps * float(wanted[0]) ** 2
    assert torch.allclose(values.square(), wanted.square(), rtol=0, atol=bound)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_squares_of_huge_and_tiny_weights_are_no_matter(scale: float) -> None:
    """fp32 holds these weights, but not their squares."""
    weight = (noise(30, 20) * scale).float()
    values, _ = singular_values(weight, 20, generator())
    dense = weight.double() / scale
    assert torch.allclose(values / scale, torch.linalg.svdvals(dense), rtol=1e-9)
    assert frobenius_norm(weight) / scale == pytest.approx(float(torch.linalg.vector_norm(dense)), rel=1e-12)
    sketched, exact = singular_values((noise(700, 660) * scale).float(), 256, generator())
    assert not exact
    assert float(sketched[0]) / scale == pytest.approx(float(torch.linalg.svdvals(noise(700, 660))[0]), rel=1e-2)


@pytest.mark.parametrize("shape", [(700, 800), (800, 700)])
def test_a_sketch_finds_a_spectrum_that_ends(shape: tuple[int, int]) -> None:
    """Rank 200 within a sketch of 320 columns: all of it, to what fp32 sums of 800 products leave."""
    known = torch.linspace(1, 0.1, 200, dtype=torch.float64)
    values, exact = singular_values(with_values(*shape, known).float(), 256, generator())
    assert not exact
    # fp32: a product's relative error is sqrt(n) eps at most, and a singular value's is that of the largest.
    bound = math.sqrt(800) * torch.finfo(torch.float32).eps * float(torch.linalg.vector_norm(known))
    assert torch.allclose(values[:200], known, rtol=0, atol=bound)
    assert float(values[200:].max()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sketch_of_a_flat_spectrum_is_low_and_never_high(dtype: torch.dtype) -> None:
    """Noise is the worst there is for a sketch: energies fall short, by less than docs/report.md says."""
    weight = noise(700, 900).to(dtype)
    values, _ = singular_values(weight, 256, generator())
    exact = torch.linalg.svdvals(weight.double())
    norm = float(torch.linalg.vector_norm(exact))
    found, wanted = energies(values, norm), energies(exact[:256], norm)
    rounding = math.sqrt(900) * torch.finfo(torch.float32).eps
    assert bool((found <= wanted + rounding).all())
    assert float(wanted[255] - found[255]) > 1e-3, "it is a sketch, and cannot be that good"
    for rank, most in ((64, 0.004), (128, 0.009), (256, 0.023)):
        assert float(wanted[rank - 1] - found[rank - 1]) < most


# --- of a model --------------------------------------------------------------------------------------------


def measure(model: Path, options: SpectraOptions = ALL) -> Spectra:
    checkpoint = Checkpoint.open(model)
    return measure_spectra(Weights(checkpoint, choose_targets(checkpoint, 8)), options)


def test_a_model_has_the_means_of_its_weights(tmp_path: Path) -> None:
    tensors = llama_tensors(layers=3)
    summary = measure(write_llama(tmp_path / "model", layers=3), SpectraOptions((4, 8, 64), None)).summary()
    kinds = {kind["kind"]: kind for kind in summary["kinds"]}
    assert list(kinds) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj",
                           "self_attn.q_proj", "self_attn.v_proj"]  # fmt: skip
    means = dict.fromkeys((4, 8), 0.0)
    for name, kind in kinds.items():
        weights = [tensors[f"model.layers.{layer}.{name}.weight"].double() for layer in range(3)]
        assert (kind["modules"], kind["measured"], kind["exact"]) == (3, 3, True)
        assert kind["shapes"] == [list(weights[0].shape)]
        for rank in (4, 8):
            # What Eckart and Young's best product leaves, measured on that product.
            left = [weight - _best(weight, rank) for weight in weights]
            wanted = [1 - float(rest.norm() / weight.norm()) ** 2 for rest, weight in zip(left, weights, strict=True)]
            assert kind["energy"][str(rank)] == pytest.approx(sum(wanted) / 3, abs=1e-12)
            means[rank] += kind["energy"][str(rank)] / 7
        assert kind["energy"]["64"] == pytest.approx(1, abs=1e-12)  # more than there is to capture
    assert {rank: summary["energy"][str(rank)] for rank in means} == pytest.approx(means)
    # r (in + out) over q, o (32, 32), k, v (16, 32), three of (80, 32), in three layers.
    assert summary["costs"]["4"]["lora"] == 3 * 4 * (2 * 64 + 2 * 48 + 3 * 112)
    assert summary["costs"]["4"]["inttune"] == 3 * 7 * 16
    assert summary["costs"]["4"]["adapter_bytes"] == 4 * summary["costs"]["4"]["slora"]
    assert sum(kind["costs"]["8"]["slora"] for kind in summary["kinds"]) == summary["costs"]["8"]["slora"]


def _best(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_some_layers_stand_for_all(tmp_path: Path) -> None:
    spectra = measure(write_llama(tmp_path / "model", layers=9), SpectraOptions(layers=3))
    layers = {place(spectrum.target.module).layer for spectrum in spectra.measured}
    assert layers == {0, 4, 8}
    assert {kind["measured"] for kind in spectra.summary()["kinds"]} == {3}
    assert {kind["modules"] for kind in spectra.summary()["kinds"]} == {9}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_figures_do_not_depend_on_the_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sketched weight among small ones, against the same work without a pool."""
    name = "model.layers.0.mlp.up_proj.weight"
    model = write_llama(tmp_path / "model", changes={name: noise(720, 700).bfloat16()})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)), raising=False)
    for spectrum in measure(model).measured:
        weight = Checkpoint.open(model).tensor(spectrum.target.tensor)
        torch.set_num_threads(1)
        alone, exact = singular_values(weight, 256, module_generator(0, spectrum.target.module))
        assert torch.equal(spectrum.values, alone)
        assert spectrum.exact == exact == (spectrum.target.tensor != name)


def test_weights_without_a_spectrum(tmp_path: Path) -> None:
    zero, bad = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors = llama_tensors()
    broken = tensors[bad].clone()
    broken[3, 4] = math.nan
    model = write_llama(tmp_path / "model", changes={zero: torch.zeros_like(tensors[zero]), bad: broken})
    summary = measure(model).summary()
    kind = next(kind for kind in summary["kinds"] if kind["kind"] == "mlp.up_proj")
    assert summary["not_finite"] == [bad]
    assert (kind["measured"], set(kind["energy"].values())) == (1, {None})
    assert summary["energy"]["8"] is not None


def test_options_that_cannot_be() -> None:
    for options in (SpectraOptions(()), SpectraOptions((0,)), SpectraOptions((8, 5000)), SpectraOptions(layers=0)):
        with pytest.raises(OptionError, match=r"--ranks|--layers"):
            options.check()


def test_places_and_their_labels() -> None:
    assert place("model.layers.3.mlp.up_proj") == place("model.layers.3.mlp.up_proj")
    deep = place("decoder.block.2.layer.1.EncDecAttention.q")
    assert (deep.stack, deep.layer, deep.kind) == ("decoder.block", 2, "EncDecAttention.q")
    assert (place("lm_head").stack, place("lm_head").kind) == ("", "lm_head")
    assert place("h.0.attn.c_attn").stack == "h"
    alike = [place("encoder.block.0.layer.0.SelfAttention.q"), place("decoder.block.0.layer.0.SelfAttention.q")]
    assert set(place_labels(alike).values()) == {"encoder.block: SelfAttention.q", "decoder.block: SelfAttention.q"}
    assert place_labels(alike[:1]) == {("encoder.block", "SelfAttention.q"): "SelfAttention.q"}


def test_evenly() -> None:
    assert evenly(range(30), 5) == [0, 7, 14, 22, 29]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert evenly(range(9), 1) == [4]


# --- the weights that a prepared checkpoint was made from --------------------------------------------------


def init(model: Path, out: Path, method: str = "sketch", residual: str = "baked", **factor: Any) -> Path:
    options = InitOptions(rank=4, factor=FactorOptions(method=method, **factor), residual=residual, alpha=8.0)  # type: ignore[arg-type]
    prepare(plan_init(model, out, options))
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("method", ["sketch", "lora"])
def test_a_baked_residual_and_its_start_are_the_original(kind: str, method: str, tmp_path: Path) -> None:
    """Linear, Conv1D and fused experts: the same weights again, to a rounding of each step."""
    model = save_model(kind, tmp_path / "model", torch.bfloat16)
    out = init(model, tmp_path / "out", method)
    weights = original_weights(out, read_manifest(out))
    with Checkpoint.open(model) as source:
        for target in weights.targets:
            for expert in [None] if target.experts is None else range(target.experts):
                stored = source.tensor(target.tensor)
                wanted = (stored if expert is None else stored[expert]).double()
                found = weights.matrix(target, expert).double()
                assert found.shape == wanted.shape
                # The residual is at most twice as large as the weight here, and is rounded once, as the sum is.
                assert float((found - wanted).abs().max()) <= 3 * float(wanted.abs().max()) * 2**-8
    of_source = measure_spectra(Weights(Checkpoint.open(model), weights.targets), ALL).summary()
    of_output = measure_spectra(weights, ALL).summary()
    assert of_output["energy"] == pytest.approx(of_source["energy"], abs=1e-3)


def test_experts_are_measured_as_the_stack_that_they_are(tmp_path: Path) -> None:
    model = save_model("gpt-oss", tmp_path / "model")
    spectra = measure(model)
    with Checkpoint.open(model) as checkpoint:
        for spectrum in spectra.measured:
            if spectrum.target.experts is None:
                continue
            stack = checkpoint.tensor(spectrum.target.tensor).double()
            squares = sum(torch.linalg.svdvals(matrix).square() for matrix in stack)
            assert isinstance(squares, Tensor)
            wanted = squares.cumsum(0) / squares.sum()
            assert spectrum.energies() == pytest.approx(wanted.tolist(), abs=1e-9)
    assert any(spectrum.target.experts for spectrum in spectra.measured)
    with_experts = [target for target in spectra.targets if target.experts]
    each = sum(2 * (t.out_features + t.in_features) * (t.experts or 1) for t in with_experts)
    assert rank_costs(with_experts, 2)["lora"] == each


def test_where_an_output_without_shards_has_its_weights(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    out = init(model, tmp_path / "out", residual="virtual")
    manifest = read_manifest(out)
    weights = original_weights(out, manifest)
    assert weights.start is None
    assert weights.checkpoint.directory == model
    other = write_llama(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match="another model"):
        original_weights(out, manifest, other)
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(BaseMismatchError, match="no directory here"):
        original_weights(out, manifest)
    assert original_weights(out, manifest, moved).checkpoint.directory == moved


# --- how far an adapter has gone ---------------------------------------------------------------------------


@pytest.mark.parametrize("three", [True, False])
@pytest.mark.parametrize("step", [1.0, 1e-9])
def test_the_sides_of_a_movement(three: bool, step: float) -> None:
    """Against the dense difference in fp64, and for a step that such a difference would lose in fp32."""
    start = Factors(noise(3, 12), noise(9, 3, seed=1), noise(3, 3, seed=2) if three else None)
    moved = [matrix + step * noise(*matrix.shape, seed=7) for matrix in start.matrices()]
    now = Factors.of(moved)
    left, right = moved_sides(now, start, 1.5, torch.float64)
    assert left.shape == (9, 6)
    assert right.shape == (6, 12)
    dense = 1.5 * (_product(now) - _product(start))
    # The dense difference itself is off by the rounding of the two products.
    bound = 64 * torch.finfo(torch.float64).eps * float(_product(start).norm())
    assert float((left @ right - dense).norm()) <= bound
    assert float((left @ right).norm()) > 0.1 * step


def _product(factors: Factors) -> Tensor:
    core = torch.eye(3, dtype=torch.float64) if factors.lora_N is None else factors.lora_N
    return factors.lora_B @ core @ factors.lora_A
