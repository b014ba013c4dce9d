"""convert and extract. Oracles: the dense fp64 formula, stock PEFT's logits, bit equality."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nlora_surgery.adapter import Adapter, AdapterConfig, tensor_name
from nlora_surgery.surgery.convert import ConvertOptions, convert, plan_convert
from nlora_surgery.surgery.extract import ExtractOptions, extract, plan_extract
from nlora_surgery.surgery.merge import merge, plan_merge
from tests.checkpoints import write_checkpoint
from tests.test_bad_input import assert_broke_off, nothing_changes
from tests.test_init import init, load_checkpoint, same_files

Surgery = Callable[..., Any]
EPS32 = torch.finfo(torch.float32).eps


def write_adapter(
    directory: Path,
    modules: dict[str, dict[str, torch.Tensor]],
    config: AdapterConfig,
) -> Path:
    """An adapter directory, its tensors written by the safetensors library."""
    directory.mkdir(parents=True)
    tensors = {tensor_name(module, part): t for module, parts in modules.items() for part, t in parts.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(config.to_json())
    return directory


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    """scaling * B N A (minus the start of a virtual residual) in fp64, by the dense formula."""
    adapter = Adapter.open(directory)
    found = {}
    for module in adapter.parts:
        dense = torch.zeros(())
        for sign, factors in ((1, adapter.factors(module)), (-1, adapter.initial(module))):
            if factors is not None:
                core = torch.eye(len(factors.lora_A)) if factors.lora_N is None else factors.lora_N
                product = factors.lora_B.double() @ core.double() @ factors.lora_A.double()
                dense = dense + sign * adapter.scaling(module) * product
        found[module] = dense
    return found


def trained(prepared: Path, out: Path, parts: tuple[str, ...] = ("lora_A", "lora_N", "lora_B")) -> Path:
    """A prepared checkpoint's adapter as training might leave it: the named parts moved, the initial ones not."""
    shutil.copytree(prepared / "adapter", out)
    tensors = load_file(out / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.removesuffix(".weight").rpartition(".")[2] in parts:
            tensor += 0.1 * tensor.std().clamp_min(1e-3) * torch.randn(tensor.shape, generator=generator)
    from safetensors import safe_open

    with safe_open(prepared / "adapter" / "adapter_model.safetensors", "pt") as reader:
        metadata = reader.metadata()
    save_file(tensors, out / "adapter_model.safetensors", metadata=metadata)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return output


def merged(base: Path, adapter: Path, out: Path) -> Path:
    merge(plan_merge(base, [(adapter, 1.0)], out))
    return out


# --- the algebra: random shapes, ranks, scalings, dtypes; all forms share one product ---------------------


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    r=st.integers(1, 24),
    alpha=st.floats(0.25, 64),
    rslora=st.booleans(),
    three=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_all_forms_share_one_product(
    out_features: int, in_features: int, r: int, alpha: float, rslora: bool, three: bool, dtype: torch.dtype, seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    r = min(r, out_features, in_features)
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lora_A": torch.randn(r, in_features, generator=generator).to(dtype),
        "lora_B": torch.randn(out_features, r, generator=generator).to(dtype),
    }
    if three:
        parts["lora_N"] = torch.randn(r, r, generator=generator).to(dtype)
    kind = "SLORA" if three else "LORA"
    config = AdapterConfig(kind, r, alpha, target_modules=["m"], use_rslora=rslora)
    folder = tmp_path_factory.mktemp("algebra")
    source = write_adapter(folder / "source", {"layers.0.m": parts}, config)
    exact = deltas(source)["layers.0.m"]
    size = float(exact.norm())
    for index, options in enumerate(
        [
            ConvertOptions(to="lora"),
            ConvertOptions(to="slora"),
            ConvertOptions(to="slora", scale_split="balanced"),
            ConvertOptions(to="slora", scale_split="core"),
            ConvertOptions(to="lora", rank=r),
        ]
    ):
        out = folder / str(index)
        manifest = convert(plan_convert(source, out, options))
        found = deltas(out)["layers.0.m"]
        # One rounding of each factor to the stored dtype: relative eps each, and at most three factors, whose
        # norms multiply to at most sqrt(r)^3 times that of the product's largest term, as cancellation may
        # leave the product smaller than its factors: measured against them, not against it.
        factors = Adapter.open(out).factors("layers.0.m")
        scale = abs(Adapter.open(out).scaling("layers.0.m"))
        for matrix in factors.matrices():
            scale *= float(matrix.double().norm())
        tolerance = 4 * torch.finfo(dtype).eps * scale
        assert float((found - exact).norm()) <= tolerance + 1e-300, options
        assert manifest["modules"][0]["error"] * size <= tolerance + 1e-9 * size


def test_lora_to_slora_and_back_is_bit_identical(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.{layer}.mlp.up_proj": {
            "lora_A": torch.randn(4, 12, generator=generator),
            "lora_B": torch.randn(20, 4, generator=generator),
        }
        for layer in range(3)
    }
    config = AdapterConfig("LORA", 4, 7.0, target_modules=["up_proj"], use_rslora=True)
    source = write_adapter(tmp_path / "lora", modules, config)
    convert(plan_convert(source, tmp_path / "slora", ConvertOptions(to="slora")))
    convert(plan_convert(tmp_path / "slora", tmp_path / "back", ConvertOptions(to="lora")))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Adapter.open(tmp_path / "back").scaling("model.layers.0.mlp.up_proj") == 7.0 / 2


# --- from a residual base to the original -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "moved", "rank"),
    [
        ("nystrom", ("lora_A", "lora_N", "lora_B"), 16),
        ("sketch", ("lora_A", "lora_N", "lora_B"), 16),
        ("nystrom-optimal", ("lora_N",), 8),  # IntTune: A and B never moved, rank r is exact
        ("sketch", ("lora_N", "lora_B"), 8),
        ("pissa", ("lora_A",), 8),
    ],
)
@pytest.mark.parametrize("residual", ["baked", "virtual"])
def test_a_residual_adapter_becomes_lora_of_the_original(
    method: str, moved: tuple[str, ...], rank: int, residual: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Stock PEFT as the oracle: the converted LoRA on the original gives the prepared model's logits."""
    from peft import PeftModel

    out = tmp_path / "out"
    init(tiny_llama, out, rank=8, method=method, residual=residual)
    adapter = trained(out, tmp_path / "trained", moved)
    initial = out / "adapter" if residual == "baked" else None
    plan = plan_convert(adapter, tmp_path / "lora", ConvertOptions(to="lora"), base=tiny_llama, initial=initial)
    manifest = convert(plan)
    assert plan.config.r == rank
    assert max(module["error"] for module in manifest["modules"]) < 1e-4

    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ours = logits(PeftModel.from_pretrained(original, str(tmp_path / "lora")))
    # The truth in fp32: the original's weights plus what training changed.
    truth = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    after, before = deltas(adapter), deltas(out / "adapter")
    with torch.no_grad():
        for module in after:
            change = after[module] - (before[module] if residual == "baked" else 0)
            truth.get_submodule(module).weight += change.float()
    expected = logits(truth)
    moved_by = (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))).abs().max()
    assert moved_by > 0.01, "training changed nothing that could be got wrong"
    # fp32 logits of size ~10 through four layers of sums over up to 352 terms: some 1e-5 each way.
    assert (ours - expected).abs().max() < min(2e-3, 0.1 * float(moved_by)) * max(1.0, float(moved_by))


def test_recompression_reports_its_error(tiny_llama: Path, tmp_path: Path) -> None:
    """The dense fp64 difference as the oracle of the reported error; an SVD's tail is the best that can be."""
    out = tmp_path / "out"
    init(tiny_llama, out, rank=8, method="sketch")
    adapter = trained(out, tmp_path / "trained")
    plan = plan_convert(
        adapter, tmp_path / "lora", ConvertOptions(to="lora", rank=4), base=tiny_llama, initial=out / "adapter"
    )
    manifest = convert(plan)
    after, before, made = deltas(adapter), deltas(out / "adapter"), deltas(tmp_path / "lora")
    for entry in manifest["modules"]:
        change = after[entry["module"]] - before[entry["module"]]
        error = float((made[entry["module"]] - change).norm() / change.norm())
        tail = float(torch.linalg.svdvals(change)[4:].norm() / change.norm())
        assert entry["error"] == pytest.approx(error, rel=1e-5)
        assert tail * (1 - 1e-6) <= entry["error"] <= tail + 1e-5
        assert entry["error"] > 1e-3


def test_slora_of_the_original_is_exact(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init(tiny_llama, out, rank=8, method="sketch")
    adapter = trained(out, tmp_path / "trained")
    convert(plan_convert(adapter, tmp_path / "s", ConvertOptions(to="slora"), base=tiny_llama, initial=out / "adapter"))
    after, before, made = deltas(adapter), deltas(out / "adapter"), deltas(tmp_path / "s")
    for module, product in made.items():
        change = after[module] - before[module]
        # Factors of norm up to that of the weight's approximation, each rounded to fp32 once.
        assert (product - change).norm() <= 8 * EPS32 * (after[module].norm() + before[module].norm())


def test_folded_lora_of_the_residual_base_loads_in_peft(tiny_llama: Path, tmp_path: Path) -> None:
    """Stock PEFT: the folded adapter on the residual base is the original model."""
    from peft import PeftModel

    out = tmp_path / "out"
    init(tiny_llama, out, rank=8, method="sketch", alpha=20.0)
    convert(plan_convert(out / "adapter", tmp_path / "lora", ConvertOptions(to="lora")))
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    folded = logits(PeftModel.from_pretrained(base, str(tmp_path / "lora")))
    merged(out, out / "adapter", tmp_path / "merged")
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    # The residual's bf16 rounding moves logits by a few hundredths on this model (see verify --logits).
    assert (folded - expected).abs().max() < 0.2
    assert (folded - expected).abs().mean() < 0.02


def test_for_vllm(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    """What vLLM's loader checks: one rank, alpha / r taken from the configuration, no patterns, 16 bits."""
    out = tmp_path / "out"
    init(tiny_llama, out, rank=80, method="sketch", alpha=40.0)  # k and v are clamped to 64
    done = surgery("convert", out / "adapter", "-o", tmp_path / "v", "--for", "vllm")
    assert done.code == 0, done.stderr
    assert "--max-lora-rank 128" in done.stdout
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 80
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {80}
    expected, found = deltas(out / "adapter"), deltas(tmp_path / "v")
    for module, product in expected.items():
        # bf16 factors: relative 2^-8 each; the product of a truncated SVD cancels little.
        assert (found[module] - product).norm() <= 2 * 2.0**-8 * product.norm()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--to", "lora", "--scale-split", "core"), 2, "two"),
        (("--to", "slora", "--for", "vllm"), 2, "--for vllm writes --to lora"),
        (("--rank", "0"), 2, "--rank must be at least 1"),
        (("--rank", "9"), 2, "more than the 8"),
        (("--base", "ORIGINAL"), 2, "--initial"),
        (("--initial", "INITIAL"), 2, "--base"),
        (("--initial", "INITIAL", "--base", "OTHER"), 7, "another model"),
    ],
)
def test_bad_conversions(
    arguments: tuple[str, ...], code: int, words: str, surgery: Surgery, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    init(tiny_llama, out, rank=8)
    adapter = trained(out, tmp_path / "trained")
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    with open(shard, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\0\0")
    named = {"ORIGINAL": tiny_llama, "INITIAL": out / "adapter", "OTHER": other}
    before = {path.name for path in tmp_path.iterdir()}
    done = surgery("convert", adapter, "-o", tmp_path / "lora", *(named.get(word, word) for word in arguments))
    assert done.code == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before


PLAIN = "layers.0.m"
LORA_M = AdapterConfig("LORA", 2, 2.0, target_modules=["m"])


@pytest.mark.parametrize("part", ["lora_A", "lora_N", "lora_B"])
def test_an_adapter_that_is_not_finite(part: str, surgery: Surgery, tmp_path: Path) -> None:
    parts = {"lora_A": torch.ones(2, 4), "lora_N": torch.eye(2), "lora_B": torch.ones(3, 2)}
    parts[part][1, 1] = float("nan")
    write_adapter(tmp_path / "bad", {PLAIN: parts}, replace(LORA_M, peft_type="SLORA"))
    with nothing_changes(tmp_path):
        done = surgery("convert", tmp_path / "bad", "-o", tmp_path / "out")
        assert_broke_off(done, 6, PLAIN, "holds NaN or infinity", "training diverged")


@pytest.mark.parametrize(
    ("dtype", "size", "options", "advice"),
    [
        (torch.float32, 1e6, ("--dtype", "float16"), "--dtype float32"),
        (torch.float32, 1e6, ("--dtype", "float16", "--for", "vllm"), "--dtype bfloat16"),
        (torch.float32, 1e38, (), "training diverged"),
    ],
)
def test_a_factor_that_overflows(
    dtype: torch.dtype, size: float, options: tuple[str, ...], advice: str, surgery: Surgery, tmp_path: Path
) -> None:
    """The advice is one that the command takes: vLLM loads no fp32."""
    parts = {"lora_A": torch.ones(2, 4), "lora_N": 10 * torch.eye(2), "lora_B": size * torch.ones(3, 2)}
    write_adapter(
        tmp_path / "large", {PLAIN: {n: t.to(dtype) for n, t in parts.items()}}, replace(LORA_M, peft_type="SLORA")
    )
    with nothing_changes(tmp_path):
        assert_broke_off(
            surgery("convert", tmp_path / "large", "-o", tmp_path / "out", *options), 6, PLAIN, "overflows", advice
        )


def test_dora_cannot_become_slora(surgery: Surgery, tmp_path: Path) -> None:
    directory = tmp_path / "dora"
    config = AdapterConfig("LORA", 2, 2.0, target_modules=["m"], extra={"use_dora": True})
    write_adapter(directory, {"layers.0.m": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(3, 2)}}, config)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.layers.0.m.lora_magnitude_vector.weight"] = torch.ones(3)
    save_file(tensors, directory / "adapter_model.safetensors")
    done = surgery("convert", directory, "-o", tmp_path / "s", "--to", "slora")
    assert done.code == 7
    assert "merge" in done.stderr
    done = surgery("convert", directory, "-o", tmp_path / "same", "--to", "lora")
    assert done.code == 0, done.stderr
    same = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)


# --- extract ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp32_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model in fp32: there a merge keeps what an extraction is to find."""
    from tests.conftest import FIXTURE

    directory = tmp_path_factory.mktemp("fp32") / "model"
    AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).save_pretrained(directory, max_shard_size="1MB")
    return directory


@pytest.mark.parametrize("method", ["sketch", "svd"])
@pytest.mark.parametrize("to", ["lora", "slora"])
def test_extract_recovers_what_was_merged(method: str, to: str, fp32_llama: Path, tmp_path: Path) -> None:
    """The adapter that was merged as the oracle, at its true rank."""
    init(fp32_llama, tmp_path / "s", rank=4, method="slora", residual="virtual", targets=("q_proj", "up_proj"))
    adapter = trained(tmp_path / "s", tmp_path / "trained")
    merged(fp32_llama, adapter, tmp_path / "merged")
    options = ExtractOptions(rank=4, to=to, method=method)
    manifest = extract(plan_extract(fp32_llama, tmp_path / "merged", tmp_path / "found", options))
    expected, found = deltas(adapter), deltas(tmp_path / "found")
    assert found.keys() == expected.keys()
    original = load_checkpoint(fp32_llama)
    for module, product in expected.items():
        # The merge rounded each merged weight to fp32: at most half an ulp, 2^-24 of it.
        rounding = 2.0**-24 * original[f"{module}.weight"].double().norm()
        assert (found[module] - product).norm() <= 4 * rounding + 16 * EPS32 * product.norm()
    assert manifest["error"] < 1e-2
    assert manifest["replaced"] == []
    # And back: base plus what was found is the merged model, within fp32's rounding.
    merged(fp32_llama, tmp_path / "found", tmp_path / "again")
    again, once = load_checkpoint(tmp_path / "again"), load_checkpoint(tmp_path / "merged")
    for name, tensor in once.items():
        assert (again[name] - tensor).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max()))


def test_a_sketch_of_16_bit_models_comes_close_to_the_exact_svd(tmp_path: Path) -> None:
    """A full fine-tune's change, of falling spectrum, in bf16; the SVD's tail is the least that any rank leaves."""
    name, generator = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(300, 200, generator=generator)
    left, _ = torch.linalg.qr(torch.randn(300, 200, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator))
    tuned = base + left * (0.5 / torch.arange(1, 201) ** 0.7) @ right
    for directory, weight in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / directory, {name: weight.bfloat16()})
    change = tuned.bfloat16().double() - base.bfloat16().double()
    plan = plan_extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(rank=16))
    manifest = extract(plan)
    (made,) = deltas(tmp_path / "out").values()
    error = float((made - change).norm() / change.norm())
    tail = float(torch.linalg.svdvals(change)[16:].norm() / change.norm())
    assert manifest["error"] == pytest.approx(error, rel=1e-5)
    assert 0.1 < tail <= error <= 1.01 * tail


def test_extract_saves_other_tensors_and_cuts_ranks(surgery: Surgery, fp32_llama: Path, tmp_path: Path) -> None:
    """A full fine-tune: a low-rank change, a changed norm; stock PEFT loads the result."""
    from peft import PeftModel

    tuned = tmp_path / "tuned"
    shutil.copytree(fp32_llama, tuned)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(tuned.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("v_proj.weight"):
                left = torch.randn(tensor.shape[0], 3, generator=generator)
                tensor += 0.05 * left @ torch.randn(3, tensor.shape[1], generator=generator)
            if name == "model.norm.weight":
                tensor *= 1.5
        save_file(tensors, file, metadata={"format": "pt"})
    done = surgery("extract", fp32_llama, tuned, "-o", tmp_path / "refused", "-r", 8, "--others", "refuse")
    assert done.code == 5
    assert "model.norm.weight" in done.stderr
    done = surgery("extract", fp32_llama, tuned, "-o", tmp_path / "found", "-r", 8, "--tolerance", 1e-3)
    assert done.code == 0, done.stderr
    assert "modules_to_save: model.norm.weight" in done.stderr
    adapter = Adapter.open(tmp_path / "found")
    assert {adapter.shape(module).r for module in adapter.parts} == {3}, "the tolerance cuts to the true rank"
    base = AutoModelForCausalLM.from_pretrained(fp32_llama)
    loaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "found")))
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned))
    assert (loaded - expected).abs().max() < 1e-3
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(fp32_llama))).abs().max() > 0.1


def test_nothing_to_extract(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "same")
    done = surgery("extract", tiny_llama, tmp_path / "same", "-o", tmp_path / "out")
    assert done.code == 5
    assert "nothing to extract" in done.stderr
    assert not (tmp_path / "out").exists()


def test_extract_refuses_another_architecture(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, other / "model.safetensors")
    done = surgery("extract", tiny_llama, other, "-o", tmp_path / "out")
    assert done.code == 3
    assert "not of one architecture" in done.stderr


@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_extract_from_a_weight_that_is_not_finite(whose: str, surgery: Surgery, tmp_path: Path) -> None:
    """It says in which of the two."""
    name = "model.layers.0.mlp.up_proj.weight"
    models = {"base": torch.randn(16, 8), "tuned": torch.randn(16, 8)}
    models[whose][2, 3] = float("nan")
    for directory, weight in models.items():
        write_checkpoint(tmp_path / directory, {name: weight})
    with nothing_changes(tmp_path):
        done = surgery("extract", tmp_path / "base", tmp_path / "tuned", "-r", 2, "-o", tmp_path / "out")
        assert_broke_off(done, 6, repr(name), f"of {tmp_path / whose} holds NaN or infinity", "repair it there")


def test_extracted_factors_that_overflow(surgery: Surgery, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for directory, size in (("base", 0.0), ("tuned", 1e12)):
        write_checkpoint(tmp_path / directory, {name: torch.full((16, 8), size)})
    arguments = ("extract", tmp_path / "base", tmp_path / "tuned", "-r", 2, "-o", tmp_path / "out")
    with nothing_changes(tmp_path):
        done = surgery(*arguments, "--dtype", "float16")
        assert_broke_off(done, 6, repr(name), "overflows float16", "--dtype float32")
    assert surgery(*arguments).code == 0


def test_same_bytes_whatever_the_threads(fp32_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    init(fp32_llama, tmp_path / "s", rank=4, method="slora", residual="virtual")
    adapter = trained(tmp_path / "s", tmp_path / "trained")
    merged(fp32_llama, adapter, tmp_path / "merged")
    for folder, cores in (("one", {0}), ("many", {0, 1, 2})):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        extract(plan_extract(fp32_llama, tmp_path / "merged", tmp_path / folder / "out", ExtractOptions(rank=4)))
    same_files(tmp_path / "one" / "out", tmp_path / "many" / "out")
