"""init, from files to files. Oracles: the safetensors library, fp64 formulas, transformers, stock PEFT."""

from __future__ import annotations

import filecmp
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from nlora_surgery.options import METHODS, STARTS_AT_ZERO, FactorOptions
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.surgery.verify import verify, verify_logits

Surgery = Callable[..., Any]
RANK = 16


def init(model: Path, out: Path, rank: int = RANK, **options: Any) -> dict[str, Any]:
    """The library's init; options of the factorization and of init alike."""
    names = set(FactorOptions.__dataclass_fields__)
    factor = FactorOptions(**{name: value for name, value in options.items() if name in names})
    rest = {name: value for name, value in options.items() if name not in names}
    return prepare(plan_init(model, out, InitOptions(rank=rank, factor=factor, **rest)))


def load_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the shards, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def dense_delta(directory: Path, module: str, scaling: float = 1.0) -> torch.Tensor:
    """scaling * B N A of one module in fp64, from the adapter file as the safetensors library reads it."""
    factors = load_file(directory / "adapter" / "adapter_model.safetensors")
    key = f"base_model.model.{module}."
    product = factors[f"{key}lora_B.weight"].double()
    if f"{key}lora_N.weight" in factors:
        product = product @ factors[f"{key}lora_N.weight"].double()
    return scaling * product @ factors[f"{key}lora_A.weight"].double()


def same_files(left: Path, right: Path, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Assert that two directories hold the same files with the same bytes."""
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file())
    for name in set(names) - but:
        assert filecmp.cmp(left / name, right / name, shallow=False), name


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_lost(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """fp64 formula as the oracle: stored + product is within half an ulp of the stored residual, and a little."""
    manifest = init(tiny_llama, tmp_path / "out", method=method)
    original, stored = load_checkpoint(tiny_llama), load_checkpoint(tmp_path / "out")
    assert stored.keys() == original.keys()
    targets = {entry["tensor"]: entry["module"] for entry in manifest["modules"]}
    assert len(targets) == 4 * 7
    for name, weight in original.items():
        if name not in targets:
            assert torch.equal(stored[name], weight)
            continue
        product = dense_delta(tmp_path / "out", targets[name])
        error = (stored[name].double() + product - weight.double()).abs()
        # bf16 keeps 8 significant bits: half an ulp is at most 2^-8 of the number. The second term covers
        # init's fp32 arithmetic: some 2 r + 3 roundings of 2^-24, of a sum of products in absolute value,
        # which for these factors stays below 2^8 times the largest product.
        slack = (2 * RANK + 3) * 2.0**-24 * 2**8 * product.abs().max()
        assert (error <= 2.0**-8 * stored[name].double().abs() + slack).all()
    report = verify(tmp_path / "out", tiny_llama)
    assert report.failures == []
    assert max(module["worst_share"] for module in report.modules) > 0.5 or method in STARTS_AT_ZERO
    logits = verify_logits(tmp_path / "out", tiny_llama)
    assert logits.passed
    assert logits.greedy_agreement > 0.95


def test_the_files_are_the_sources(tiny_llama: Path, tmp_path: Path) -> None:
    """Same files, same names and order of tensors, same metadata, everything else byte for byte."""
    init(tiny_llama, tmp_path / "out")
    for path in tiny_llama.iterdir():
        ours = tmp_path / "out" / path.name
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as source, safe_open(ours, "pt") as written:
                assert written.keys() == source.keys()
                assert written.metadata() == source.metadata()
        else:
            assert filecmp.cmp(path, ours, shallow=False), path.name
    extra = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in tiny_llama.iterdir()}
    assert extra == {"adapter", "nlora_surgery.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "a stage was left behind"


def test_transformers_loads_the_residual_base(tiny_llama: Path, tmp_path: Path) -> None:
    init(tiny_llama, tmp_path / "out", method="sketch")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    stored = load_checkpoint(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, stored[name]), name


def test_nystrom_factors_are_the_leading_rows_and_columns_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    init(tiny_llama, tmp_path / "out")
    original = load_checkpoint(tiny_llama)
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name, weight in original.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if "_proj" in name:
            assert torch.equal(factors[f"{key}.lora_A.weight"], weight[:RANK].float())
            assert torch.equal(factors[f"{key}.lora_B.weight"], weight[:, :RANK].float())
            assert torch.equal(factors[f"{key}.lora_N.weight"], weight[:RANK, :RANK].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["nystrom", "nystrom-optimal", "pissa"])
def test_every_dtype_within_its_bound(dtype: torch.dtype, method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Weights that fill their dtype: the bound must hold in each, and be nearly reached (it is no wide one)."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.05).to(dtype)
        for name, tensor in load_file(next(iter(sorted(tiny_llama.glob("*.safetensors"))))).items()
    }
    model = tmp_path / "model"
    model.mkdir()
    save_file(weights, model / "model.safetensors")
    init(model, tmp_path / "out", method=method, alpha=2.0 * RANK)
    report = verify(tmp_path / "out", model)
    assert report.failures == []
    # In the 16-bit dtypes the half ulp dominates and some element comes close to it; in the others the bound's
    # arithmetic part does, which is a worst case.
    if dtype.itemsize == 2:
        assert max(module["worst_share"] for module in report.modules) > 0.9


@pytest.mark.parametrize("method", ["nystrom", "sketch", "pissa"])
@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16"])
def test_the_residual_makes_up_for_rounded_factors(
    method: str, adapter_dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    init(tiny_llama, tmp_path / "out", method=method, adapter_dtype=adapter_dtype, alpha=3.0)
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {getattr(torch, adapter_dtype)}
    assert verify(tmp_path / "out", tiny_llama).failures == []


# --- determinism ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nystrom", "nystrom-optimal", "sketch", "pissa", "slora"])
def test_same_seed_same_bytes_whatever_the_threads(
    method: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"sampling": "norm"} if method.startswith("nystrom") else {}
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    out = Path("out")  # the same name, as adapter_config.json records it
    threads = torch.get_num_threads()
    try:
        for folder, cores in (("one", {0}), ("many", set(range(5)))):
            monkeypatch.chdir(tmp_path / folder)
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
            torch.set_num_threads(len(cores))
            init(tiny_llama, out, method=method, **sampling)
            assert torch.get_num_threads() == len(cores), "init changed the caller's thread count"
    finally:
        torch.set_num_threads(threads)
    same_files(tmp_path / "one" / "out", tmp_path / "many" / "out")


def test_another_seed_samples_others(tiny_llama: Path, tmp_path: Path) -> None:
    first = load_file_after(init(tiny_llama, tmp_path / "a", sampling="uniform", seed=1), tmp_path / "a")
    other = load_file_after(init(tiny_llama, tmp_path / "b", sampling="uniform", seed=2), tmp_path / "b")
    assert not any(torch.equal(first[name], other[name]) for name in first)


def load_file_after(_: dict[str, Any], directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


# --- residuals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nystrom", "nystrom-pinv", "sketch", "slora"])
def test_virtual_writes_the_adapter_alone_and_starts_bit_exact(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    init(tiny_llama, tmp_path / "out", method=method, residual="virtual")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"nlora_surgery.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert verify(tmp_path / "out", tiny_llama).failures == []
    logits = verify_logits(tmp_path / "out", tiny_llama)
    assert logits.max_difference == 0.0
    assert logits.passed


def test_virtual_reads_only_what_it_samples(tmp_path: Path) -> None:
    """NaN wherever the leading rows and columns are not: reading anything else would fail or show."""
    weight = torch.full((64, 48), math.nan, dtype=torch.bfloat16)
    weight[:4] = 0.5
    weight[:, :4] = 0.25
    model = tmp_path / "model"
    model.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, model / "model.safetensors")
    init(model, tmp_path / "out", rank=4, residual="virtual")
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in factors.values())


def test_none_subtracts_nothing_and_says_so(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    done = surgery("init", tiny_llama, "-r", RANK, "-o", tmp_path / "out", "--residual", "none")
    assert done.code == 0
    assert "nothing is subtracted" in done.stderr
    done = surgery("verify", tmp_path / "out", "--against", tiny_llama)
    assert done.code == 10
    assert "weight + delta by choice" in done.stderr
    assert not verify_logits(tmp_path / "out", tiny_llama).passed


def test_nystrom_pinv_warns(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    done = surgery("init", tiny_llama, "-r", RANK, "-o", tmp_path / "out", "--method", "nystrom-pinv")
    assert done.code == 0
    assert "ill-conditioned" in done.stderr


# --- formats: what PEFT makes of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pissa", "pissa-fast", "lora"])
@pytest.mark.parametrize("alpha", [None, 40.0])
def test_stock_peft_loads_two_matrix_adapters(
    method: str, alpha: float | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """Stock PEFT as the oracle: our residual base under our adapter, loaded by it, is the original model."""
    from peft import PeftModel

    init(tiny_llama, tmp_path / "out", rank=RANK, method=method, two_matrix=True, alpha=alpha)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected, actual = original(ids).logits, loaded(ids).logits
    ours = verify_logits(tmp_path / "out", tiny_llama)
    # The yardstick of verify_logits was measured on other inputs; a factor of ten covers that.
    assert (actual - expected).square().mean().sqrt() <= 10 * ours.noise_rms + 1e-5
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 28


def test_two_matrix_pissa_is_stock_pefts(tiny_llama: Path, tmp_path: Path) -> None:
    """Stock PEFT's own `init_lora_weights="pissa"` as the oracle, delta against delta."""
    from peft import LoraConfig, get_peft_model

    alpha = 24.0
    init(tiny_llama, tmp_path / "out", method="pissa", two_matrix=True, alpha=alpha)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=int(alpha), init_lora_weights="pissa", target_modules="all-linear")
    theirs = get_peft_model(model, config)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            expected = module.get_delta_weight("default").double()
            path = name.removeprefix("base_model.model.")
            ours = dense_delta(tmp_path / "out", path, alpha / RANK)
            # Both are fp32 SVDs: backward stable, so each is within a modest multiple of eps * ‖W‖ of the
            # exact rank-r product, amplified by the gap at r (Wedin); 2^12 covers the gaps of this model.
            tolerance = 2**12 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(expected, 2)
            assert torch.linalg.matrix_norm(ours - expected, 2) <= tolerance


# --- orientation, ranks, targets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2: Conv1D, which stores (in, out); hidden size 32, c_attn (32, 96), square c_proj."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    directory = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", ["nystrom", "nystrom-optimal", "sketch", "pissa", "lora"])
def test_conv1d_is_factored_the_right_way_round(method: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    manifest = init(tiny_gpt2, tmp_path / "out", rank=4, method=method)
    shapes = {entry["module"].rpartition(".")[2]: entry["shape"] for entry in manifest["modules"]}
    assert shapes == {"c_attn": [96, 32], "c_proj": [32, 128], "c_fc": [128, 32]}  # the last c_proj is the MLP's
    assert verify(tmp_path / "out", tiny_gpt2).failures == []
    assert verify_logits(tmp_path / "out", tiny_gpt2).passed


def test_stock_peft_applies_a_conv1d_adapter(tiny_gpt2: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    init(tiny_gpt2, tmp_path / "out", rank=4, method="pissa", two_matrix=True)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    original = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected, actual = original(ids).logits, loaded(ids).logits
    # fp32 throughout: logits of size about 1 after two layers of sums over at most 128 terms.
    assert (actual - expected).abs().max() < 1e-4


def test_a_rank_too_large_is_clamped_and_keeps_the_scaling(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    done = surgery("init", tiny_llama, "-r", 100, "--alpha", 50, "-o", tmp_path / "out", "--method", "sketch")
    assert done.code == 0
    assert "rank_pattern" in done.stderr
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"k_proj": 64, "v_proj": 64}
    assert config["alpha_pattern"] == {"k_proj": 32.0, "v_proj": 32.0}
    assert surgery("verify", tmp_path / "out", "--against", tiny_llama, "--logits").code == 0


@pytest.mark.parametrize(
    ("patterns", "exclude", "kinds"),
    [
        (("q_proj", "v_proj"), (), {"self_attn.q_proj", "self_attn.v_proj"}),
        (("self_attn.q_proj",), (), {"self_attn.q_proj"}),
        ((r".*\.layers\.[01]\.mlp\..*",), (), {"mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"}),
        (("all-linear",), ("down_proj", r".*self_attn.*"), {"mlp.up_proj", "mlp.gate_proj"}),
        (("lm_head",), (), {"lm_head"}),
    ],
)
def test_targets(
    patterns: tuple[str, ...], exclude: tuple[str, ...], kinds: set[str], tiny_llama: Path, tmp_path: Path
) -> None:
    plan = plan_init(tiny_llama, tmp_path / "out", InitOptions(rank=4, targets=patterns, exclude=exclude))
    modules = {target.module for target in plan.targets}
    assert {module.split(".", 3)[3] if ".layers." in module else module for module in modules} == kinds
    # What PEFT would select by this configuration, by its own rule, are these modules and no others.
    everything = {name.rpartition(".")[0] for name in plan.source.tensors}
    entries = plan.config.target_modules
    assert entries is not None
    selected = {m for m in everything if m in entries or m.endswith(tuple(f".{entry}" for entry in entries))}
    assert selected == modules


# --- the command line -------------------------------------------------------------------------------------------


def test_default_output_lies_beside_the_model(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_llama, tmp_path / "model")
    done = surgery("init", tmp_path / "model", "--rank", 8)
    assert done.code == 0
    assert (tmp_path / "model-nlora-r8" / "nlora_surgery.json").exists()
    assert "mlp.down_proj" in done.stdout


def test_dry_run_writes_nothing(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    done = surgery("init", tiny_llama, "-r", RANK, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert "Nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_manifest(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    done = surgery("init", tiny_llama, "-r", RANK, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "nlora_surgery.json").read_text())


def test_energy_is_what_the_dense_formula_says(tiny_llama: Path, tmp_path: Path) -> None:
    """fp64 formulas as the oracle of the manifest's figures."""
    manifest = init(tiny_llama, tmp_path / "out", method="nystrom-optimal")
    original, stored = load_checkpoint(tiny_llama), load_checkpoint(tmp_path / "out")
    for entry in manifest["modules"]:
        weight, product = original[entry["tensor"]].double(), dense_delta(tmp_path / "out", entry["module"])
        # Norms of fp32 tiles: relative error of about sqrt(n) * 2^-24, far below 1e-5.
        assert entry["delta_ratio"] == pytest.approx(float(product.norm() / weight.norm()), rel=1e-5)
        assert entry["energy"] == pytest.approx(float(1 - ((weight - product).norm() / weight.norm()) ** 2), rel=1e-4)
        effective = stored[entry["tensor"]].double() + product
        assert entry["drift"] == pytest.approx(float((effective - weight).norm() / weight.norm()), rel=1e-2)


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "prepared"])
def test_inspect_tells_what_a_directory_is(kind: str, surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init(tiny_llama, out, method="sketch", alpha=8.0)
    path = {"checkpoint": tiny_llama, "adapter": out / "adapter", "prepared": out}[kind]
    found = json.loads(surgery("inspect", path, "--rank", RANK, "--json").stdout)
    assert found["kind"] == kind
    if kind == "checkpoint":
        parameters = sum(tensor.numel() for tensor in load_checkpoint(tiny_llama).values())
        assert found["parameters"] == parameters
        # LoRA's r (in + out) over q, o (128 + 128), k, v (128 + 64), gate, up, down (128 + 352), four layers.
        assert found["cost"]["lora"] == 4 * RANK * (2 * 256 + 2 * 192 + 3 * 480)
        assert found["cost"]["inttune"] == 4 * 7 * RANK**2
    else:
        adapter = found if kind == "adapter" else found["adapter"]
        stored = load_file(out / "adapter" / "adapter_model.safetensors")
        assert adapter["parameters"] == sum(tensor.numel() for tensor in stored.values())
        assert {group["scaling"] for group in adapter["modules"]} == {0.5}
    assert surgery("inspect", path).code == 0


def test_the_papers_parameter_counts() -> None:
    """LLaMA-2-7B at r = 128: LoRA 319.8 M, SLoRA 3.67 M more, IntTune 1.15 % of LoRA's (paper, table 3)."""
    from nlora_surgery.spectra import parameter_counts

    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    counts = parameter_counts(layer * 32, 128)
    assert counts == {"lora": 319_815_680, "slora": 323_485_696, "inttune": 3_670_016}
    assert round(counts["inttune"] / counts["lora"], 4) == 0.0115


# --- verify can fail ----------------------------------------------------------------------------------------


def test_verify_sees_one_ulp_beyond_the_bound(tiny_llama: Path, tmp_path: Path) -> None:
    """One element pushed one ulp further in the direction in which it is off already, checksum made to match."""
    import zlib

    out = tmp_path / "out"
    manifest = init(tiny_llama, out, method="sketch")
    entry = manifest["modules"][0]
    name = entry["tensor"]
    original = load_checkpoint(tiny_llama)[name].double()
    file = next(path for path in sorted(out.glob("*.safetensors")) if name in load_file(path))
    tensors = load_file(file)
    stored = tensors[name]
    error = stored.double() + dense_delta(out, entry["module"]) - original
    row, column = divmod(int(error.abs().argmax()), stored.shape[1])
    upward = torch.tensor(math.inf if error[row, column] > 0 else -math.inf, dtype=stored.dtype)
    stored[row, column] = torch.nextafter(stored[row, column], upward)
    with open(file, "r+b") as handle:
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
        from nlora_surgery.checkpoint import read_header

        handle.seek(read_header(file).tensors[name].start)
        handle.write(stored.view(torch.uint8).numpy().tobytes())
    entry["checksums"][name] = zlib.crc32(stored.view(torch.uint8).numpy().tobytes())
    (out / "nlora_surgery.json").write_text(json.dumps(manifest))
    report = verify(out, tiny_llama)
    assert len(report.failures) == 1
    assert entry["module"] in report.failures[0]


def test_logits_fail_with_a_wrong_scaling(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init(tiny_llama, out, method="sketch")
    path = out / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_alpha"] *= 1.05
    path.write_text(json.dumps(config))
    assert not verify_logits(out, tiny_llama).passed
    assert any("times its bound" in failure for failure in verify(out, tiny_llama).failures)


def test_options_contradict() -> None:
    from nlora_surgery.errors import OptionError

    for options in (
        InitOptions(rank=0),
        InitOptions(alpha=-1.0),
        InitOptions(factor=FactorOptions(method="sketch", sampling="norm")),
        InitOptions(factor=FactorOptions(method="nystrom", two_matrix=True)),
        InitOptions(residual="virtual", factor=FactorOptions(method="pissa", two_matrix=True)),
        replace(InitOptions(), adapter_dtype="int8"),
    ):
        with pytest.raises(OptionError):
            options.check()
