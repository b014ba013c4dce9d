"""merge, from files to files. Oracles: stock PEFT's merge_and_unload in fp64, fp64 formulas, transformers."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nlora_surgery.options import FactorOptions
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.surgery.verify import half_ulp
from tests.adapters import (
    adapter_tensors,
    checkpoint_tensors,
    edit_config,
    edit_tensors,
    make_adapter,
    peft_merge,
    random_factors,
    save_model,
    write_adapter,
)
from tests.test_bad_input import assert_broke_off, assert_refused, nothing_changes

Surgery = Callable[..., Any]
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"  # (32, 32) and (16, 32) in every Llama
KEY = "base_model.model."


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a model of `MODELS`, written once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = save_model(kind, tmp_path_factory.mktemp(kind) / "model", dtype)
        return made[kind, dtype]

    return get


def same_files(left: Path, right: Path, but: Collection[str] = (), extra: Collection[str] = ()) -> None:
    """Assert that `right` holds the files of `left` and `extra`, all of them but `but` with the same bytes."""
    names = {str(path.relative_to(left)) for path in left.rglob("*") if path.is_file()}
    assert {str(path.relative_to(right)) for path in right.rglob("*") if path.is_file()} == names | set(extra)
    for name in names - set(but):
        assert filecmp.cmp(left / name, right / name, shallow=False), name


def run_merge(base: Path, out: Path, *adapters: Path | tuple[Path, float], **options: Any) -> dict[str, Tensor]:
    """The library's merge; what it wrote, read by the safetensors library."""
    pairs = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    merge(plan_merge(base, pairs, out, **options))
    return checkpoint_tensors(out)


def assert_rounded(actual: Tensor, truth: Tensor, name: str = "") -> None:
    """Assert that a merged tensor is the truth, rounded once to its dtype.

    merge computes fp32 weights in fp64, where its own errors are some 2^-50 of the terms: 2^-20 of half an ulp,
    and 2^-45 of the largest entry where terms cancel, cover them. It computes 16-bit weights in fp32: a dozen terms
    (r is at most 8), none larger than a few times the tensor's largest entry, and their scalings make up some 32
    roundings of 2^-24 each.
    """
    slack = (2.0**-45 if actual.dtype == torch.float32 else 32 * 2.0**-24) * truth.abs().max()
    bound = (1 + 2.0**-20) * half_ulp(actual, actual.dtype) + slack
    excess = (actual.double() - truth).abs() / bound
    assert bool((excess <= 1).all()), (name, float(excess.max()))


# --- stock PEFT as the oracle ---------------------------------------------------------------------------------------

LINEAR = {"target_modules": "all-linear"}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}

# What it is -> the model, and PEFT's LoraConfig.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", LINEAR),
    "rsLoRA": ("llama", {**LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            **LINEAR,
            "rank_pattern": {"q_proj": 3, r".*\.layers\.1\.mlp\..*": 6, "self_attn.o_proj": 5, r"[kv]_proj": 2},
            "alpha_pattern": {r"layers\.0\..*": 20, "q_proj": 1, r"(up|down)_proj": 5, "proj": 99},
        },
    ),
    "patterns, rsLoRA": (
        "llama", {**LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"mlp.up_proj": 3}},
    ),
    "bias of lora_B": ("llama-bias", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias of lora_B, Conv1D": ("gpt2", {**CONV1D, "lora_bias": True}),
    "every bias of the base": ("gpt2", {**CONV1D, "bias": "all"}),
    "the biases of adapted layers": ("gpt2", {**CONV1D, "bias": "lora_only"}),
    "head": ("llama", {"target_modules": ["lm_head", "k_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "embedding alone": ("llama", {"target_modules": ["embed_tokens"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "DoRA": ("llama", {**LINEAR, "use_dora": True}),
    "DoRA, rsLoRA, patterns": (
        "llama", {**LINEAR, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 7}},
    ),
    "DoRA, Conv1D": ("gpt2", {**CONV1D, "use_dora": True}),
    "DoRA, biases": ("llama-bias", {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "bias": "lora_only"}),
    "Conv1D": ("gpt2", CONV1D),
    "Conv1D, fan_in_fan_out unsaid": ("gpt2", {**CONV1D, "fan_in_fan_out": False}),
    "experts": ("gpt-oss", EXPERTS),
    "experts, square": ("gpt-oss-square", EXPERTS),
    "experts, rsLoRA, patterns": (
        "gpt-oss", {**EXPERTS, "use_rslora": True, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {
            "gate_up_proj": 11}},
    ),
    "experts, stored (out, in) for PEFT": ("llama4", EXPERTS),
    "experts, the second parameter alone": ("gpt-oss", {**EXPERTS, "target_parameters": ["experts.down_proj"]}),
    "experts, full paths": (
        "gpt-oss", {"target_modules": [], "target_parameters": [
            "model.layers.0.mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    "experts and a router": ("gpt-oss", {**EXPERTS, "target_parameters": [
        "router.weight", "experts.gate_up_proj", "experts.down_proj"]}),
    "a parameter of two dimensions": (
        "llama", {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ),
    "a parameter of Conv1D": ("gpt2", {"target_modules": [], "target_parameters": ["attn.c_attn.weight"]}),
    "a parameter of Conv1D, square": ("gpt2", {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_stock_pefts_merge(
    form: str, dtype: torch.dtype, model: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT's merge in fp64 as the truth, tensor by tensor; PEFT's own in the base's dtype is further from it."""
    kind, config = FORMS[form]
    base = model(kind, dtype)
    make_adapter(base, tmp_path / "adapter", **config)
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    merged = run_merge(base, tmp_path / "out", tmp_path / "adapter")
    original = checkpoint_tensors(base)
    truth = peft_merge(base, tmp_path / "adapter", torch.float64)
    narrow = peft_merge(base, tmp_path / "adapter", dtype)
    wide = peft_merge(base, tmp_path / "adapter", dtype, autocast=True) if dtype == torch.bfloat16 else narrow
    assert merged.keys() == original.keys()
    changed = set()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        if torch.equal(truth[name], original[name].double()):
            assert torch.equal(tensor, original[name]), name
            continue
        changed.add(name)
        assert_rounded(tensor, truth[name], name)
        error, in_fp32, as_stored = ((t.double() - truth[name]).abs().sum() for t in (tensor, wide[name], narrow[name]))
        # With a 16-bit adapter widened PEFT rounds once, as we do, but for ties that errors of 2^-24 break differently.
        assert error <= (1 + 2.0**-10) * in_fp32, name
        # Otherwise it rounds the product too. (What only takes the place of a tensor is exact in both.)
        assert error < as_stored or error == as_stored == 0, name
    listed = json.loads((tmp_path / "out" / "nlora_surgery.json").read_text())["changed"]
    assert {change["tensor"] for change in listed} == changed
    assert changed


def test_a_merged_model_loads_and_says_what_pefts_says(model: Callable[..., Path], tmp_path: Path) -> None:
    """Logits of plain transformers on our merge, of PEFT on base and adapter."""
    from peft import PeftModel

    base = model("llama")
    make_adapter(base, tmp_path / "adapter", **LINEAR, modules_to_save=["lm_head"])
    run_merge(base, tmp_path / "out", tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = plain(ids).logits
        expected = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(ids).logits
        actual = ours(ids).logits
    # fp32: logits of size about 1, sums over at most 80 terms, two layers: far above 80 * 2^-24 of them.
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - before).abs().max() > 0.1


def test_what_is_untouched_is_the_same_bytes(model: Callable[..., Path], tmp_path: Path) -> None:
    """Files without a changed tensor, and every other file, byte for byte; in the others every other tensor."""
    base = tmp_path / "base"
    shutil.copytree(model("llama", torch.bfloat16), base)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    make_adapter(base, tmp_path / "adapter", target_modules=r".*layers\.1\.self_attn\.q_proj")
    run_merge(base, tmp_path / "out", tmp_path / "adapter")
    changed = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    same_files(base, tmp_path / "out", but={index[changed]}, extra={"nlora_surgery.json"})
    with safe_open(base / index[changed], "pt") as before, safe_open(tmp_path / "out" / index[changed], "pt") as after:
        assert before.metadata() == after.metadata()
        assert before.keys() == after.keys()
        assert [n for n in before.keys() if not torch.equal(before.get_tensor(n), after.get_tensor(n))] == [changed]  # noqa: SIM118
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"], "a stage was left behind"


def test_an_embeddings_saved_copy_counts_where_it_differs(model: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT as the oracle: the weight that it saves beside an adapted embedding takes the place of the base's."""
    base = model("llama")
    key = f"{KEY}model.embed_tokens.base_layer.weight"
    make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert torch.equal(
        adapter_tensors(tmp_path / "adapter")[key], checkpoint_tensors(base)["model.embed_tokens.weight"]
    )
    plain = run_merge(base, tmp_path / "plain", tmp_path / "adapter")["model.embed_tokens.weight"]
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors[key].mul_(-2))
    merged = run_merge(base, tmp_path / "out", tmp_path / "adapter")["model.embed_tokens.weight"]
    truth = peft_merge(base, tmp_path / "adapter", torch.float64)["model.embed_tokens.weight"]
    assert_rounded(merged, truth)
    original = checkpoint_tensors(base)["model.embed_tokens.weight"]
    assert torch.allclose(merged - plain, -3 * original, rtol=0, atol=2.0**-21)  # fp32 sums of size about 1


def test_a_weight_applies_to_an_embedding_beside_its_copy(model: Callable[..., Path], tmp_path: Path) -> None:
    """fp64 formula as the oracle; two adapters of one embedding, each of which PEFT saves with the same copy."""
    base, name = model("llama"), "model.embed_tokens"
    truth = checkpoint_tensors(base)[f"{name}.weight"].double()
    adapters = []
    for seed, weight in enumerate([0.5, -2.0]):
        directory = tmp_path / f"adapter-{seed}"
        make_adapter(base, directory, seed=seed, target_modules=["embed_tokens"])
        tensors = adapter_tensors(directory)
        a, b = (tensors[f"{KEY}{name}.lora_embedding_{side}"].double() for side in "AB")
        truth += weight * 6 / 4 * (b @ a).T
        adapters.append((directory, weight))
    assert_rounded(run_merge(base, tmp_path / "out", *adapters)[f"{name}.weight"], truth)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_base_peft_residualizes_is_refused(
    start: str, surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT takes the residual of the base while it loads such an adapter: merged as it lies it would be wrong."""
    base = model("llama")
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights=start)
    tensors = adapter_tensors(tmp_path / "adapter")
    theirs = peft_merge(base, tmp_path / "adapter", torch.float32)[f"{Q}.weight"]
    a, b = (tensors[f"{KEY}{Q}.lora_{side}.weight"] for side in "AB")
    wrong = checkpoint_tensors(base)[f"{Q}.weight"] + 6 / 4 * b @ a
    assert (theirs - wrong).norm() > 0.1 * wrong.norm()
    done = surgery("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    assert_refused(done, 7, "init_lora_weights", start, "residual")
    edit_config(tmp_path / "adapter", init_lora_weights=True)  # which says that the base is the residual already
    assert_rounded(run_merge(base, tmp_path / "out", tmp_path / "adapter")[f"{Q}.weight"], wrong_in_fp64(base, a, b))


def wrong_in_fp64(base: Path, a: Tensor, b: Tensor) -> Tensor:
    return checkpoint_tensors(base)[f"{Q}.weight"].double() + 6 / 4 * b.double() @ a.double()


# --- names and formats met in the wild: against PEFT's names, and dense fp64 formulas -------------------------------

SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "torch.compile": lambda key: key.replace(KEY, f"{KEY}_orig_mod."),
    "torch.compile around PEFT": lambda key: f"_orig_mod.{key}",
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(KEY, f"{KEY}module."),
    "FSDP": lambda key: key.replace(".layers", "._fsdp_wrapped_module._checkpoint_wrapped_module.layers"),
    "no PEFT prefix": lambda key: key.removeprefix(KEY),
    "the inner model's paths": lambda key: key.replace(f"{KEY}model.", KEY),
    "a deeper model's paths": lambda key: key.replace(KEY, f"{KEY}language_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_the_same_adapter(spelling: str, model: Callable[..., Path], tmp_path: Path) -> None:
    """The same factors under PEFT's own names as the oracle: the same bytes."""
    base = model("llama", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", **LINEAR)
    expected = run_merge(base, tmp_path / "plain", tmp_path / "adapter")

    def rename(tensors: dict[str, Tensor]) -> None:
        renamed = {SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}
        assert not renamed.keys() & tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(tmp_path / "adapter", rename)
    actual = run_merge(base, tmp_path / "out", tmp_path / "adapter")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


CORES = {
    "the paper's fork": ("LORA", ".lora_N.weight"),
    "SLORA": ("SLORA", ".lora_N.weight"),
    "MoSLoRA": ("LORA", ".lora_AB.weight"),
    "MoSLoRA in memory": ("LORA", ".lora_AB.default.weight"),
    "LoRA-XS": ("LORA", ".default_lora_latent_mapping.weight"),
}


@pytest.mark.parametrize("form", CORES)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_matrix_in_the_middle(form: str, rslora: bool, model: Callable[..., Path], tmp_path: Path) -> None:
    """W + scaling * B N A in fp64 as the oracle."""
    base = model("llama")
    kind, ending = CORES[form]
    a, b, core = random_factors(16, 32, core=True)
    tensors = {f"{KEY}{K}.lora_A.weight": a, f"{KEY}{K}.lora_B.weight": b, f"{KEY}{K}{ending}": core}
    fork = {"init_lora_weights": "n_lora"} if form == "the paper's fork" else {}
    write_adapter(tmp_path / "adapter", tensors, peft_type=kind, use_rslora=rslora, **fork)
    merged = run_merge(base, tmp_path / "out", tmp_path / "adapter")
    original = checkpoint_tensors(base)
    truth = original[f"{K}.weight"].double() + 6 / (2 if rslora else 4) * b.double() @ core.double() @ a.double()
    assert_rounded(merged[f"{K}.weight"], truth)
    assert [n for n in merged if not torch.equal(merged[n], original[n])] == [f"{K}.weight"]


@pytest.mark.parametrize("alpha", [6.0, None])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", ""])
def test_a_kohya_file(
    alpha: float | None, core: bool, prefix: str, surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    """W + alpha / r * up (mid) down in fp64 as the oracle; alpha is r where the file has none."""
    base = model("llama", torch.bfloat16)
    truth = {name: tensor.double() for name, tensor in checkpoint_tensors(base).items()}
    tensors: dict[str, Tensor] = {}
    for module, shape, r in ((Q, (32, 32), 4), (K, (16, 32), 2)):
        factors = random_factors(*shape, r, core=core, seed=r)
        flat = prefix + module.replace(".", "_")
        for part, factor in zip(("down", "up", "mid"), factors, strict=False):
            tensors[f"{flat}.lora_{part}.weight"] = factor
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        a, b = (factor.double() for factor in factors[:2])
        middle = factors[2].double() if core else torch.eye(r, dtype=torch.float64)
        truth[f"{module}.weight"] += (r if alpha is None else alpha) / r * b @ middle @ a
    (tmp_path / "kohya").mkdir()
    save_file(tensors, tmp_path / "kohya" / "style.safetensors")
    assert surgery("merge", base, tmp_path / "kohya", "-o", tmp_path / "out").code == 0
    merged = checkpoint_tensors(tmp_path / "out")
    for name in (f"{Q}.weight", f"{K}.weight"):
        assert_rounded(merged[name], truth[name])
    by_file = run_merge(base, tmp_path / "by-file", tmp_path / "kohya" / "style.safetensors")
    assert all(torch.equal(by_file[name], merged[name]) for name in merged)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor.double(), truth[name])}
    assert changed <= {f"{Q}.weight", f"{K}.weight"}


# --- several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-oss"])
def test_several_adapters_with_weights(kind: str, surgery: Surgery, model: Callable[..., Path], tmp_path: Path) -> None:
    """W + Σ weight * (PEFT's merge of each alone - W) in fp64 as the oracle: ranks, scalings, targets differ."""
    base = model(kind, torch.bfloat16)
    targets = {
        "llama": (
            {"target_modules": ["q_proj", "v_proj"]},
            {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
        ),
        "gpt2": ({"target_modules": ["c_attn"], "lora_bias": True}, {"target_modules": ["c_attn", "c_proj"]}),
        "gpt-oss": (EXPERTS, {**EXPERTS, "target_parameters": ["experts.gate_up_proj"]}),
    }[kind]
    original = {name: tensor.double() for name, tensor in checkpoint_tensors(base).items()}
    truth = {name: tensor.clone() for name, tensor in original.items()}
    arguments: list[object] = []
    for number, (config, weight) in enumerate(zip(targets, (0.75, -1.5), strict=True)):
        directory = tmp_path / f"adapter-{number}"
        make_adapter(base, directory, seed=number, **{"r": 3 + number, **config})
        alone = peft_merge(base, directory, torch.float64)
        for name, tensor in original.items():
            truth[name] += weight * (alone[name] - tensor)
        arguments += [directory, "--weight", weight]
    done = surgery("merge", base, *arguments, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    merged = checkpoint_tensors(tmp_path / "out")
    for name, tensor in merged.items():
        assert_rounded(tensor, truth[name], name)
    assert sum(not torch.equal(tensor.double(), original[name]) for name, tensor in merged.items()) >= 3
    manifest = json.loads((tmp_path / "out" / "nlora_surgery.json").read_text())
    assert [adapter["weight"] for adapter in manifest["adapters"]] == [0.75, -1.5]


def test_a_delta_on_what_another_adapter_replaces(model: Callable[..., Path], tmp_path: Path) -> None:
    """modules_to_save of one, factors of the other: replacement + product in fp64, whatever their order."""
    base = model("llama")
    make_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    factors = random_factors(96, 32)
    write_adapter(
        tmp_path / "b", {f"{KEY}lm_head.lora_{side}.weight": factor for side, factor in zip("AB", factors, strict=True)}
    )
    head = adapter_tensors(tmp_path / "a")[f"{KEY}lm_head.weight"].double()
    truth = head + 6 / 4 * factors[1].double() @ factors[0].double()
    first = run_merge(base, tmp_path / "ab", tmp_path / "a", tmp_path / "b")["lm_head.weight"]
    assert_rounded(first, truth)
    assert torch.equal(run_merge(base, tmp_path / "ba", tmp_path / "b", tmp_path / "a")["lm_head.weight"], first)


# --- init, then merge -----------------------------------------------------------------------------------------------

METHOD = FactorOptions(method="sketch")


def move(adapter: Path) -> None:
    """Training, as it were: every current factor moves, the initial ones stay."""

    def train(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, tensor in tensors.items():
            if "_initial" not in name:
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = adapter_tensors(adapter)
    train(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata)


def product(tensors: dict[str, Tensor], module: str, suffix: str = "") -> Tensor:
    b, core, a = (tensors[f"{KEY}{module}.lora_{side}{suffix}.weight"].double() for side in "BNA")
    return b @ core @ a


@pytest.mark.parametrize("method", ["nystrom", "sketch", "pissa"])
def test_init_then_merge_gives_the_original_back(
    method: str, surgery: Surgery, tiny_llama: Path, tmp_path: Path
) -> None:
    """verify's half ulp as the bound: the residual was rounded once, the sum once more."""
    out = tmp_path / "init"
    manifest = prepare(plan_init(tiny_llama, out, InitOptions(rank=8, factor=FactorOptions(method=method))))
    assert surgery("merge", out, out / "adapter", "-o", tmp_path / "merged").code == 0
    original, stored, merged = map(checkpoint_tensors, (tiny_llama, out, tmp_path / "merged"))
    targets = {entry["tensor"]: entry["module"] for entry in manifest["modules"]}
    factors = adapter_tensors(out / "adapter")
    for name, weight in original.items():
        if name not in targets:
            assert torch.equal(merged[name], weight)
            continue
        # Both sums are of fp32 products of rank 8: some 2 * (2 r + 3) roundings of 2^-24, of sums of absolute values
        # that stay below 2^8 times the largest product (as in test_init).
        slack = 2 * 19 * 2.0**-24 * 2**8 * product(factors, targets[name]).abs().max()
        bound = sum(half_ulp(t[name], torch.bfloat16) for t in (stored, merged)) + slack
        error = (merged[name].double() - weight.double()).abs()
        assert (error <= bound).all(), name
        assert not torch.equal(stored[name], weight)


def test_a_virtual_adapter_that_never_moved_merges_to_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    """The source's bytes as the oracle."""
    prepare(plan_init(tiny_llama, tmp_path / "init", InitOptions(rank=8, factor=METHOD, residual="virtual")))
    merged = run_merge(tiny_llama, tmp_path / "out", tmp_path / "init" / "adapter")
    assert len(merged) > 28
    same_files(tiny_llama, tmp_path / "out", extra={"nlora_surgery.json"})


def test_a_virtual_adapter_that_moved(tiny_llama: Path, tmp_path: Path) -> None:
    """W + scaling * (B N A - B0 N0 A0) in fp64 as the oracle, rounded once."""
    prepare(
        plan_init(tiny_llama, tmp_path / "init", InitOptions(rank=8, alpha=12.0, factor=METHOD, residual="virtual"))
    )
    adapter = tmp_path / "init" / "adapter"
    move(adapter)
    merged, original = run_merge(tiny_llama, tmp_path / "out", adapter), checkpoint_tensors(tiny_llama)
    factors = adapter_tensors(adapter)
    for name in (f"{Q}.weight", "model.layers.3.mlp.down_proj.weight"):
        module = name.removesuffix(".weight")
        current, initial = product(factors, module), product(factors, module, "_initial")
        truth = original[name].double() + 12 / 8 * (current - initial)
        # fp32 differences of two products: what cancels counts, not what is left.
        slack = 64 * 2.0**-24 * (current.abs().max() + initial.abs().max())
        error = (merged[name].double() - truth).abs()
        assert (error <= half_ulp(merged[name], torch.bfloat16) + slack).all()
        assert (truth - original[name].double()).norm() > 0.01 * truth.norm()


def test_a_moved_residual_adapter_on_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    """Stored residual + B N A in fp64 as the oracle."""
    out = tmp_path / "init"
    prepare(plan_init(tiny_llama, out, InitOptions(rank=8, factor=METHOD)))
    move(out / "adapter")
    merged, stored = run_merge(out, tmp_path / "merged", out / "adapter"), checkpoint_tensors(out)
    factors = adapter_tensors(out / "adapter")
    scaling = json.loads((out / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 8
    assert_rounded(merged[f"{Q}.weight"], stored[f"{Q}.weight"].double() + scaling * product(factors, Q))


# --- tied heads ---------------------------------------------------------------------------------------------------


def logits(directory: Path | torch.nn.Module, ids: Tensor) -> Tensor:
    found = directory
    if isinstance(found, Path):
        found = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    with torch.inference_mode():
        return found(ids).logits


def tied_adapter(base: Path, directory: Path, change: str) -> tuple[Tensor, Tensor]:
    """An adapter of a tied model's head or embedding; what embedding and head then are, in fp64."""
    name = next(name for name in checkpoint_tensors(base) if "embed_tokens" in name or "wte" in name)
    shared = checkpoint_tensors(base)[name].double()
    module = name.removesuffix(".weight")
    a, b = random_factors(*shared.shape)
    delta = 6 / 4 * b.double() @ a.double()
    replacement = shared.float() + 0.1 * torch.randn(shared.shape, generator=torch.Generator().manual_seed(0))
    if change == "head":
        write_adapter(directory, {f"{KEY}lm_head.lora_A.weight": a, f"{KEY}lm_head.lora_B.weight": b})
        return shared, shared + delta
    if change == "embedding":
        parts = {f"{KEY}{module}.lora_embedding_A": b.T, f"{KEY}{module}.lora_embedding_B": a.T}
        write_adapter(directory, {part: tensor.contiguous() for part, tensor in parts.items()})
        return shared + delta, shared
    write_adapter(directory, {f"{KEY}lm_head.weight": replacement})
    return shared, replacement.double()


@pytest.mark.parametrize("shards", ["one file", "several"])
@pytest.mark.parametrize("change", ["head", "embedding", "head replaced"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_untie(
    kind: str, change: str, shards: str, surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    """fp64 formulas as the oracle of both tensors; transformers' own model, untied by hand, of the logits."""
    base = model(kind)
    if shards == "one file":
        loaded = AutoModelForCausalLM.from_pretrained(base)
        base = tmp_path / "base"
        loaded.save_pretrained(base)
    embedding, head = tied_adapter(base, tmp_path / "adapter", change)
    before = checkpoint_tensors(base)
    assert "lm_head.weight" not in before
    done = surgery("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--untie")
    assert done.code == 0, done.stderr

    merged = checkpoint_tensors(tmp_path / "out")
    assert merged.keys() == before.keys() | {"lm_head.weight"}
    name = next(name for name in before if "embed_tokens" in name or "wte" in name)
    assert_rounded(merged[name], embedding)
    assert_rounded(merged["lm_head.weight"], head)
    assert all(torch.equal(merged[other], before[other]) for other in before if other != name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    index_path = tmp_path / "out" / "model.safetensors.index.json"
    assert index_path.exists() == (shards == "several")
    if index_path.exists():
        index = json.loads(index_path.read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
        for tensor, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as shard:
                assert tensor in shard.keys()  # noqa: SIM118
        assert index["weight_map"].keys() == merged.keys()

    # The oracle: the tied model with its embedding's and its head's parameter set apart by hand.
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.get_input_embeddings().weight = torch.nn.Parameter(embedding.float())
    reference.get_output_embeddings().weight = torch.nn.Parameter(head.float())
    ids = torch.arange(40)[None]
    expected, actual = logits(reference, ids), logits(tmp_path / "out", ids)
    assert (actual - expected).abs().max() < 1e-4  # fp32, logits of size about 1, as above
    assert (actual - logits(base, ids)).abs().max() > 0.1


def test_untie_changes_nothing_where_nothing_is_shared(model: Callable[..., Path], tmp_path: Path) -> None:
    """The merge without --untie as the oracle, byte for byte."""
    base = model("llama-tied")
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    run_merge(base, tmp_path / "plain", tmp_path / "adapter")
    run_merge(base, tmp_path / "out", tmp_path / "adapter", untie=True)
    same_files(tmp_path / "plain", tmp_path / "out", but={"nlora_surgery.json"})


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bf16 Llama and an adapter of its q, k, v and o, made by PEFT."""
    base = model("llama", torch.bfloat16)
    adapter = tmp_path_factory.mktemp("plain") / "adapter"
    make_adapter(base, adapter, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return base, adapter


def test_dry_run_writes_nothing(surgery: Surgery, plain: tuple[Path, Path], tmp_path: Path) -> None:
    done = surgery("merge", *plain, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert "8 of 21 tensors" in done.stdout
    assert "Nothing was written" in done.stdout
    planned = json.loads(surgery("merge", *plain, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert surgery("merge", *plain, "-o", tmp_path / "out").code == 0
    written = json.loads((tmp_path / "out" / "nlora_surgery.json").read_text())
    assert planned["changed"] == [change["tensor"] for change in written["changed"]]
    files = [path for path in (tmp_path / "out").iterdir() if path.name != "nlora_surgery.json"]
    assert planned["size_bytes"] == sum(path.stat().st_size for path in files)


def test_json_is_the_manifest(surgery: Surgery, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Norms in fp64 as the oracle of its figures."""
    base, adapter = plain
    done = surgery("merge", base, adapter, "-o", tmp_path / "out", "--json")
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((tmp_path / "out" / "nlora_surgery.json").read_text())
    truth, original = peft_merge(base, adapter, torch.float64), checkpoint_tensors(base)
    for change in manifest["changed"]:
        weight = original[change["tensor"]].double()
        ratio = (truth[change["tensor"]] - weight).norm() / weight.norm()
        # Grams of fp32 and norms of fp32 tiles: far below 1e-5 of the product's norm at rank 4.
        assert change["delta_ratio"] == pytest.approx(float(ratio), rel=1e-5)


def test_ranks_write_the_bytes_of_one_process(surgery: Surgery, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """One process as the oracle of two under torchrun; the name of the base is the same in both."""
    base, adapter = plain
    assert surgery("merge", base, adapter, "-o", tmp_path / "one").code == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "nlora_surgery", "merge", base, adapter, "-o", "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote two") == 1, "each rank reports"
    same_files(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_the_merged_model_is_a_base_for_more(surgery: Surgery, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Merging with weights 1 and -1 in turn: PEFT's sum minus its delta, to two roundings, is the original."""
    base, adapter = plain
    first = run_merge(base, tmp_path / "first", adapter)
    assert surgery("merge", tmp_path / "first", adapter, "--weight", -1, "-o", tmp_path / "second").code == 0
    second, original = checkpoint_tensors(tmp_path / "second"), checkpoint_tensors(base)
    for name, weight in original.items():
        bound = sum(half_ulp(t[name], torch.bfloat16) for t in (first, second)) + 2.0**-18 * weight.abs().max().double()
        assert ((second[name].double() - weight.double()).abs() <= bound).all()
    assert not torch.equal(first[f"{Q}.weight"], original[f"{Q}.weight"])


# --- bad input ------------------------------------------------------------------------------------------------------


def keys(module: str) -> tuple[str, str]:
    return f"{KEY}{module}.lora_A.weight", f"{KEY}{module}.lora_B.weight"


A, B = keys(Q)
_A, _B = random_factors(32, 32)


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(adapter, lambda tensors: tensors.update({new: tensors.pop(old)}))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(adapter, lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(adapter, lambda tensors: tensors.pop(name))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter: edit_config(adapter, **changes)


def spoil(name: str, number: float, like: Tensor | None = None) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if like is not None:
            tensors[name] = like.clone()
        tensors[name].view(-1)[-1] = number

    return lambda adapter: edit_tensors(adapter, change)


def virtual(adapter: Path) -> None:
    a, b, core = random_factors(32, 32, core=True)
    tensors = {f"{KEY}{Q}.lora_{side}.weight": t for side, t in zip("ABN", (a, b, core), strict=True)}
    initial = {name.replace(".weight", "_initial.weight"): tensor.clone() for name, tensor in tensors.items()}
    write_adapter(adapter, tensors | initial, peft_type="SLORA", residual="virtual")


def truncate(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        for each in changes:
            each(adapter)

    return change


# What is wrong with an adapter of one module, layer 0's q_proj, (32, 32), r 4 -> how it comes to be so, the exit
# code, words of the sentence.
WRONG: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "a layer that the base lacks": (
        both(*(rename(name, name.replace("layers.0", "layers.7")) for name in (A, B))), 7,
        ("1 of 1 modules", "layers.7.self_attn.q_proj", "closest", "model.layers.1.self_attn.q_proj"),
    ),
    "a module that the base lacks": (
        both(*(rename(name, name.replace("q_proj", "qkv_proj")) for name in (A, B))), 7,
        ("qkv_proj", "closest", "self_attn.q_proj"),
    ),
    "a replaced tensor that the base lacks": (put(f"{KEY}score.weight", _A), 7, ("1 of 2", "score.weight")),
    "wrong in_features": (put(A, _A[:, :16].contiguous()), 7, ("[32, 16]", "[32, 32]", f"{Q}.weight")),
    "wrong out_features": (put(B, _B[:16].contiguous()), 7, ("[16, 32]", "[32, 32]")),
    "factors of a weight on a norm": (
        both(*(rename(name, name.replace("self_attn.q_proj", "input_layernorm")) for name in (A, B))), 7,
        ("[32, 32]", "[32]"),
    ),
    "r of the configuration": (config(r=8), 7, ("rank 4", "8 in adapter_config.json", Q)),
    "r of a pattern": (config(rank_pattern={"q_proj": 2}), 7, ("rank 4", "2 in adapter_config.json")),
    "ranks of the pair": (put(B, torch.ones(32, 3)), 7, ("[4, 32]", "[32, 3]")),
    "rank of the core": (put(f"{KEY}{Q}.lora_N.weight", torch.ones(4, 3)), 7, ("lora_N", "[4, 3]", "rank 4")),
    "no lora_B": (drop(B), 7, (Q, "lacks its lora_B")),
    "no lora_A": (drop(A), 7, (Q, "lacks its lora_A")),
    "no factors but a magnitude": (
        put(f"{KEY}{K}.lora_magnitude_vector", torch.ones(16)), 7, (K, "lacks its lora_A"),
    ),
    "factors of one dimension": (put(A, torch.ones(32)), 7, ("[32]", "expected")),
    "a factor of no dimension": (put(A, torch.tensor(1.0)), 7, ("[]", "expected")),
    "integers": (put(A, torch.ones(4, 32, dtype=torch.int32)), 7, ("I32", "no float")),
    "NaN in lora_A": (spoil(A, float("nan")), 6, (Q, "NaN or infinity")),
    "infinity in lora_B": (spoil(B, float("inf")), 6, (Q, "NaN or infinity")),
    "NaN in lora_N": (spoil(f"{KEY}{Q}.lora_N.weight", float("nan"), torch.ones(4, 4)), 6, (Q, "NaN or infinity")),
    "NaN in a replacement": (
        spoil(f"{KEY}model.norm.weight", float("nan"), torch.ones(32)), 6, ("model.norm.weight", "NaN or infinity"),
    ),
    "NaN in a magnitude": (
        spoil(f"{KEY}{Q}.lora_magnitude_vector", float("nan"), torch.ones(32)), 6, (Q, "NaN or infinity"),
    ),
    "NaN in the start": (both(virtual, spoil(f"{KEY}{Q}.lora_A_initial.weight", float("nan"))), 6, (Q, "NaN")),
    "a start without its core": (both(virtual, drop(f"{KEY}{Q}.lora_N_initial.weight")), 7, (Q, "lora_N_initial")),
    "a start without lora_A": (both(virtual, drop(f"{KEY}{Q}.lora_A_initial.weight")), 7, (Q, "lora_A_initial")),
    "a start of other shapes": (
        both(virtual, put(f"{KEY}{Q}.lora_A_initial.weight", torch.ones(4, 16))), 7, (Q, "[4, 16]"),
    ),
    "a magnitude of another size": (
        put(f"{KEY}{Q}.lora_magnitude_vector", torch.ones(16)), 7, ("16 values", "expected 32"),
    ),
    "a bias that the base lacks": (
        put(f"{KEY}{Q}.lora_B.bias", torch.ones(32)), 7, (f"no {Q}.bias",),
    ),
    "a peft_type of another method": (config(peft_type="IA3"), 7, ("'IA3'", "known are LORA and SLORA")),
    "a peft_type that is no text": (config(peft_type=["LORA"]), 7, ("['LORA']", "known are LORA and SLORA")),
    "no peft_type": (config(peft_type=None), 7, ("None", "known are LORA and SLORA")),
    "no r": (config(r=None), 7, ("r = None", "positive integer")),
    "r of zero": (config(r=0), 7, ("r = 0",)),
    "r that is true": (config(r=True), 7, ("r = True",)),
    "alpha that is text": (config(lora_alpha="16"), 7, ("'16'", "number")),
    "alpha that is NaN": (config(lora_alpha=float("nan")), 7, ("nan", "number")),
    "a pattern that is no map": (config(rank_pattern=[1]), 7, ("rank_pattern", "no map")),
    "a pattern that is no expression": (config(alpha_pattern={"q_proj(": 2}), 7, ("alpha_pattern", "q_proj(")),
    "a pattern's rank that is text": (config(rank_pattern={"q_proj": "4"}), 7, ("rank_pattern", "'4'")),
    "a pattern's alpha that is text": (config(alpha_pattern={"q_proj": "many"}), 7, ("alpha_pattern", "many")),
    "a configuration that is a list": (lambda a: (a / "adapter_config.json").write_text("[]"), 7, ("object",)),
    "a configuration that is no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), 7, ("JSON",)),
    "pickled weights": (pickled, 7, ("adapter_model.bin", "safetensors")),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), 7, ("has no adapter_model.safetensors",)),
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), 7, ("it has no adapter_config.json",)),
    "a truncated file": (truncate, 7, ("truncated",)),
    "an empty file": (lambda a: (a / "adapter_model.safetensors").write_bytes(b""), 7, ("adapter_model.safetensors",)),
    "no tensors": (lambda a: save_file({}, a / "adapter_model.safetensors"), 7, ("holds no factors",)),
    "a key of no known form": (
        put(f"{KEY}{Q}.hada_w1_a", torch.ones(4, 4)), 7, ("hada_w1_a", "no tensor of a LoRA, SLORA, MoSLoRA"),
    ),
    "two spellings of one tensor": (
        put(A.replace(".weight", ".other.weight"), _A), 7, (f"lora_A of {Q} twice", "two adapters"),
    ),
    "two paths to one tensor": (
        both(put(A.replace(f"{KEY}model.", KEY), _A), put(B.replace(f"{KEY}model.", KEY), _B)), 7,
        ("both change", f"{Q}.weight"),
    ),
    "two replacements of one tensor": (
        both(put(f"{KEY}lm_head.weight", torch.ones(96, 32)),
             put(f"{KEY}lm_head.modules_to_save.default.weight", torch.zeros(96, 32))),
        7, ("lm_head.weight", "twice"),
    ),
    "another vocabulary": (
        put(f"{KEY}lm_head.weight", torch.ones(100, 32)), 7, ("[100, 32]", "[96, 32]", "resize the base"),
    ),
    "a replacement of integers": (
        put(f"{KEY}lm_head.weight", torch.ones(96, 32, dtype=torch.uint8)), 7, ("U8", "lm_head.weight"),
    ),
    "a magnitude of an embedding": (
        both(put(f"{KEY}model.embed_tokens.lora_embedding_A", torch.ones(4, 96)),
             put(f"{KEY}model.embed_tokens.lora_embedding_B", torch.ones(32, 4)),
             put(f"{KEY}model.embed_tokens.lora_magnitude_vector", torch.ones(32))),
        7, ("model.embed_tokens", "magnitude"),
    ),
    "DoRA without its magnitudes": (config(use_dora=True), 7, (Q, "use_dora", "magnitude")),
    "one pair of factors for two parameters": (
        config(target_parameters=["q_proj.weight", "q_proj.bias"]), 7, ("1 pairs", "bias, weight"),
    ),
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter of q_proj in layer 0, to be spoilt."""
    return write_adapter(tmp_path / "adapter", {A: _A, B: _B})


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_adapter(
    what: str, surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    change, code, words = WRONG[what]
    change(adapter)
    with nothing_changes(tmp_path):
        done = surgery("merge", model("llama", torch.bfloat16), adapter, "-o", tmp_path / "out")
        (assert_broke_off if code == 6 else assert_refused)(done, code, *words)


def test_that_adapter_is_sound(surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """Unspoilt it merges: what the table shows is due to the spoiling. So does the virtual one."""
    base = model("llama", torch.bfloat16)
    assert surgery("merge", base, adapter, "-o", tmp_path / "out").code == 0
    virtual(adapter)
    assert surgery("merge", base, adapter, "-o", tmp_path / "virtual").code == 0


def assert_only_its_own_options(stderr: str) -> None:
    """No option that merge lacks, as init's would be."""
    assert not {"--allow-nonfinite", "--exclude", "--method"} & set(re.findall(r"--[a-z-]+", stderr))
    assert "method" not in stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite(
    value: float, surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model("llama", torch.bfloat16), base)
    shard = base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][f"{Q}.weight"]
    tensors = load_file(shard)
    tensors[f"{Q}.weight"][3, 5] = value
    save_file(tensors, shard, {"format": "pt"})
    with nothing_changes(tmp_path):
        done = surgery("merge", base, adapter, "-o", tmp_path / "out")
        assert_broke_off(done, 6, repr(f"{Q}.weight"), "holds NaN or infinity", f"repair it in {base}")
        assert_only_its_own_options(done.stderr)


def test_a_sum_that_overflows(surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """The largest fp16 is 65504; the product of these factors is of size 1."""
    with nothing_changes(tmp_path):
        done = surgery("merge", model("llama", torch.float16), adapter, "--weight", 1e7, "-o", tmp_path / "out")
        words = (repr(f"{Q}.weight"), "is finite, but as F16 it is not", "beyond the base's dtype", "--weight")
        assert_broke_off(done, 6, *words)
        assert_only_its_own_options(done.stderr)


@pytest.mark.parametrize("shape", [(16,), (1,), (2, 32)])
def test_a_bias_of_another_shape(
    shape: tuple[int, ...], surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    put(f"{KEY}{Q}.lora_B.bias", torch.ones(shape))(adapter)
    with nothing_changes(tmp_path):
        done = surgery("merge", model("llama-bias"), adapter, "-o", tmp_path / "out")
        assert_refused(done, 7, str(list(shape)), "[32]", f"{Q}.bias")


KOHYA = f"lora_unet_{Q.replace('.', '_')}"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{KOHYA}.lora_down.weight": _A}, ("lacks its lora_B",)),
        ({f"{KOHYA}.alpha": torch.tensor(4.0)}, ("lacks its lora_A",)),
        ({f"{KOHYA}.lora_down.weight": torch.tensor(1.0), f"{KOHYA}.lora_up.weight": _B}, ("[]",)),
        ({f"{KOHYA}.lora_down.weight": torch.ones(0, 32), f"{KOHYA}.lora_up.weight": torch.ones(32, 0)}, ("[0, 32]",)),
        (
            {f"{KOHYA}.lora_down.weight": _A, f"{KOHYA}.lora_up.weight": _B, f"{KOHYA}.alpha": torch.ones(2)},
            ("alpha", "[2]"),
        ),
        (
            {f"{KOHYA}.lora_down.weight": _A, f"{KOHYA}.lora_up.weight": _B, f"{KOHYA}.dora_scale": torch.ones(32)},
            ("dora_scale",),
        ),
        (
            {f"{KOHYA}x.lora_down.weight": _A, f"{KOHYA}x.lora_up.weight": _B},
            (f"{KOHYA}x", "match no tensor"),
        ),
    ],
)  # fmt: skip
def test_a_wrong_kohya_file(
    tensors: dict[str, Tensor], words: tuple[str, ...], surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "kohya").mkdir()
    save_file(tensors, tmp_path / "kohya" / "style.safetensors")
    with nothing_changes(tmp_path):
        assert_refused(surgery("merge", model("llama"), tmp_path / "kohya", "-o", tmp_path / "out"), 7, *words)


@pytest.mark.parametrize("rank", [{"r": 2}, {"rank_pattern": {"experts.down_proj": 1}}])
def test_wrong_ranks_of_experts(
    rank: dict[str, Any], surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    base = model("gpt-oss")
    make_adapter(base, tmp_path / "adapter", **EXPERTS)
    edit_config(tmp_path / "adapter", **rank)
    with nothing_changes(tmp_path):
        done = surgery("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
        assert_refused(done, 7, "rank", "adapter_config.json")


def test_experts_whose_order_is_unknown(surgery: Surgery, model: Callable[..., Path], tmp_path: Path) -> None:
    """Two pairs of factors of one module, and nothing that says whose is which."""
    base = model("gpt-oss")
    make_adapter(base, tmp_path / "adapter", **EXPERTS)
    edit_config(tmp_path / "adapter", target_parameters=["experts.gate_up_proj", "experts.other"])
    with nothing_changes(tmp_path):
        done = surgery("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
        assert_refused(done, 7, "gate_up_proj", "other", "order")


def test_another_bases_adapter(surgery: Surgery, tiny_llama: Path, tmp_path: Path) -> None:
    """The fingerprint tells: of a residual on the original, of the original on the residual, of any other model."""
    for residual in ("baked", "virtual"):
        options = InitOptions(rank=4, factor=METHOD, residual=residual)  # type: ignore[arg-type]
        prepare(plan_init(tiny_llama, tmp_path / residual, options))
    shutil.copytree(tiny_llama, tmp_path / "other")
    shard = sorted((tmp_path / "other").glob("*.safetensors"))[0]
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: -tensor for name, tensor in tensors.items()}, shard, {"format": "pt"})
    with nothing_changes(tmp_path):
        for base, adapter in (
            (tiny_llama, tmp_path / "baked" / "adapter"),
            (tmp_path / "baked", tmp_path / "virtual" / "adapter"),
            (tmp_path / "other", tmp_path / "virtual" / "adapter"),
        ):
            done = surgery("merge", base, adapter, "-o", tmp_path / "out")
            assert_refused(done, 7, "belongs to another base", str(base), str(adapter), "sha256:")


def test_two_adapters_that_cannot_be_combined(
    surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base, head = model("llama"), torch.ones(96, 32)
    first = write_adapter(tmp_path / "a", {f"{KEY}lm_head.weight": head})
    second = write_adapter(tmp_path / "b", {f"{KEY}lm_head.weight": 2 * head})
    dora = write_adapter(tmp_path / "dora", {A: _A, B: _B, f"{KEY}{Q}.lora_magnitude_vector": torch.ones(32)})
    with nothing_changes(tmp_path):
        done = surgery("merge", base, first, second, "-o", tmp_path / "out")
        assert_refused(done, 7, "two adapters replace lm_head.weight")
        for pair in ((dora, adapter), (adapter, dora)):
            done = surgery("merge", base, *pair, "-o", tmp_path / "out")
            assert_refused(done, 7, str(dora), Q, "DoRA", "alone")
        done = surgery("merge", base, first, "--weight", 0.5, "-o", tmp_path / "out")
        assert_refused(done, 2, "--weight 0.5", "lm_head.weight")
    assert surgery("merge", base, dora, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("change", ["head", "embedding", "head replaced"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_tied_head_is_refused_without_untie(
    kind: str, change: str, surgery: Surgery, model: Callable[..., Path], tmp_path: Path
) -> None:
    base = model(kind)
    tied_adapter(base, tmp_path / "adapter", change)
    with nothing_changes(tmp_path):
        done = surgery("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
        assert_refused(done, 7, "one tensor", "--untie", str(tmp_path / "adapter"))


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 2.0, 3.0)])
def test_one_weight_for_each_adapter(
    weights: tuple[float, ...], surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    options = [part for weight in weights for part in ("--weight", weight)]
    with nothing_changes(tmp_path):
        done = surgery("merge", model("llama"), adapter, *options, "-o", tmp_path / "out")
        assert_refused(done, 2, f"given {len(weights)} times for 1 adapters")


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number(
    weight: str, surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    with nothing_changes(tmp_path):
        done = surgery("merge", model("llama"), adapter, "--weight", weight, "-o", tmp_path / "out")
        assert_refused(done, 2, "--weight", "finite", weight)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["base", "adapter", "base/inside", "adapter/inside", "."])
def test_an_output_over_an_input(
    out: str, overwrite: bool, surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """Whatever --overwrite says, and though the inputs are outputs of ours."""
    shutil.copytree(model("llama"), tmp_path / "base")
    for directory in (tmp_path, tmp_path / "base", adapter):
        (directory / "nlora_surgery.json").write_text("{}")
    with nothing_changes(tmp_path):
        options = ["--overwrite"] if overwrite else []
        done = surgery("merge", tmp_path / "base", adapter, "-o", tmp_path / out, *options)
        assert_refused(done, 8, "the output", str(tmp_path / out))


def test_the_prepared_directory_around_its_adapter_is_no_output(
    surgery: Surgery, tiny_llama: Path, tmp_path: Path
) -> None:
    """A virtual residual's directory holds the adapter alone: --overwrite would replace what is being read."""
    out = tmp_path / "init"
    prepare(plan_init(tiny_llama, out, InitOptions(rank=4, factor=METHOD, residual="virtual")))
    with nothing_changes(tmp_path):
        assert_refused(surgery("merge", tiny_llama, out / "adapter", "-o", out, "--overwrite"), 8, "contains", str(out))


@pytest.mark.parametrize("missing", ["base", "adapter"])
def test_a_directory_that_is_not_there(
    missing: str, surgery: Surgery, model: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    names = {"base": model("llama"), "adapter": adapter, missing: tmp_path / "nowhere" / "at" / "all"}
    with nothing_changes(tmp_path):
        done = surgery("merge", names["base"], names["adapter"], "-o", tmp_path / "out")
        assert_refused(done, 3, "nowhere/at/all", "no such directory")
