"""Adapters on disk: names, configuration, matching with a base. Oracles: stock PEFT, the safetensors library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nlora_surgery.adapter import (
    Adapter,
    AdapterConfig,
    ModuleShape,
    check_base,
    pattern_for,
    plan_adapter_file,
    task_type_of,
    tensor_name,
)
from nlora_surgery.adapter_keys import AdapterKey, parse_key
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.errors import AdapterError, BaseMismatchError
from tests.adapters import edit_config, make_adapter, random_factors, save_model, write_adapter
from tests.checkpoints import write_checkpoint, write_llama

Q = "model.layers.0.self_attn.q_proj"

# --- names ----------------------------------------------------------------------------------------------------------

NAMES = {
    # PEFT's own, on disk and in memory
    f"base_model.model.{Q}.lora_A.weight": (Q, "lora_A", 0),
    f"base_model.model.{Q}.lora_B.weight": (Q, "lora_B", 0),
    f"base_model.model.{Q}.lora_N.weight": (Q, "lora_N", 0),
    f"base_model.model.{Q}.lora_A_initial.weight": (Q, "lora_A_initial", 0),
    f"base_model.model.{Q}.lora_A.default.weight": (Q, "lora_A", 0),
    f"base_model.model.{Q}.lora_B.my_adapter.weight": (Q, "lora_B", 0),
    f"base_model.model.{Q}.lora_B.bias": (Q, "lora_bias", 0),
    f"base_model.model.{Q}.lora_B.default.bias": (Q, "lora_bias", 0),
    "base_model.model.wte.lora_embedding_A": ("wte", "lora_embedding_A", 0),
    "base_model.model.wte.lora_embedding_B.default": ("wte", "lora_embedding_B", 0),
    f"base_model.model.{Q}.lora_magnitude_vector": (Q, "magnitude", 0),
    f"base_model.model.{Q}.lora_magnitude_vector.weight": (Q, "magnitude", 0),
    f"base_model.model.{Q}.lora_magnitude_vector.default": (Q, "magnitude", 0),
    f"base_model.model.{Q}.lora_magnitude_vector.default.weight": (Q, "magnitude", 0),
    # what takes the place of the base's own
    "base_model.model.lm_head.weight": ("lm_head", "weight", 0),
    f"base_model.model.{Q}.bias": (Q, "bias", 0),
    f"base_model.model.{Q}.base_layer.bias": (Q, "bias", 1),
    "base_model.model.lm_head.modules_to_save.weight": ("lm_head", "weight", 0),
    "base_model.model.lm_head.modules_to_save.default.weight": ("lm_head", "weight", 0),
    "base_model.model.embed_tokens.base_layer.weight": ("embed_tokens", "weight", 1),
    # parameters of one module, nested
    "base_model.model.experts.base_layer.lora_A.weight": ("experts", "lora_A", 1),
    "base_model.model.experts.base_layer.base_layer.lora_A.weight": ("experts", "lora_A", 2),
    # wrappers
    f"_orig_mod.base_model.model.{Q}.lora_A.weight": (Q, "lora_A", 0),
    f"base_model.model._orig_mod.{Q}.lora_A.weight": (Q, "lora_A", 0),
    f"module.base_model.model.{Q}.lora_A.weight": (Q, "lora_A", 0),
    f"module.module.base_model.model.module.{Q}.lora_A.default.weight": (Q, "lora_A", 0),
    f"_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{Q}.lora_B.weight": (Q, "lora_B", 0),
    "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_A.weight": ("model.layers.0.mlp.up_proj", "lora_A", 0),
    # a module that is called so keeps its name
    "base_model.model.visual.module.0.lora_A.weight": ("visual.module.0", "lora_A", 0),
    "base_model.model.model.lora_A.weight": ("model", "lora_A", 0),
    # other methods
    f"base_model.model.{Q}.lora_AB.weight": (Q, "lora_N", 0),
    f"base_model.model.{Q}.lora_AB.default.weight": (Q, "lora_N", 0),
    f"base_model.model.{Q}.default_lora_latent_mapping.weight": (Q, "lora_N", 0),
    "lora_unet_mid_block_to_q.lora_down.weight": ("lora_unet_mid_block_to_q", "lora_A", 0),
    "lora_unet_mid_block_to_q.lora_mid.weight": ("lora_unet_mid_block_to_q", "lora_N", 0),
    "lora_unet_mid_block_to_q.lora_up.weight": ("lora_unet_mid_block_to_q", "lora_B", 0),
    "lora_unet_mid_block_to_q.alpha": ("lora_unet_mid_block_to_q", "alpha", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_wild(name: str) -> None:
    """The table above as the oracle, taken from the projects' own files."""
    assert parse_key(name) == AdapterKey(*NAMES[name])


@pytest.mark.parametrize(
    "name",
    [
        "", "weight", "base_model.model.weight", f"{Q}.lora_A",
        f"{Q}.hada_w1_a", f"{Q}.lokr_w1", f"{Q}.ia3_l", f"{Q}.vera_lambda_b", f"{Q}.weight\n",
        f"{Q}.dora_scale", f"{Q}.token_adapter.trainable_tokens_delta", "prompt_embeddings", "module.alpha",
    ],
)  # fmt: skip
def test_names_of_no_known_form(name: str) -> None:
    assert parse_key(name) is None


_words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda word: word not in {"base_layer", "module", "modules_to_save", "original_module", "base_model"}
)
_parts = st.sampled_from(["lora_A", "lora_N", "lora_B", "lora_A_initial", "lora_N_initial", "lora_B_initial"])


@given(
    st.lists(_words | st.integers(0, 99).map(str), min_size=1, max_size=6).map(".".join),
    _parts,
    st.lists(st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module"]), max_size=3),
    st.integers(0, 3),
    st.sampled_from(["", ".default", ".other_1"]),
)
def test_what_is_written_is_read_back(module: str, part: str, outer: list[str], depth: int, adapter: str) -> None:
    """`tensor_name` as the oracle of `parse_key`, whatever is wrapped around it."""
    assert parse_key(tensor_name(module, part)) == AdapterKey(module, part)
    inner = f"{module}{'.base_layer' * depth}"
    name = ".".join([*outer, tensor_name(inner, part).removesuffix(".weight")]) + f"{adapter}.weight"
    assert parse_key(name) == AdapterKey(module, part, depth)


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_none(name: str) -> None:
    key = parse_key(name)
    assert key is None or (key.module and not key.module.endswith("base_layer") and key.depth >= 0)


# --- configuration --------------------------------------------------------------------------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "none": {},
    "rank": {"rank_pattern": {"q_proj": 2, r".*\.layers\.1\.mlp\..*": 6, "layers.0.mlp.up_proj": 3}},
    "alpha": {"alpha_pattern": {r"layers\.0\.mlp\..*": 3, "proj": 100, r"[qk]_proj": 32}},
    "both, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 1, r"model\.layers\.[0-9]+\.self_attn\.v_proj": 5},
        "alpha_pattern": {"v_proj": 2, "self_attn.v_proj": 50, "model.layers.1.mlp.down_proj": 7},
    },
    "first match counts": {
        "rank_pattern": {r".*proj": 3, "q_proj": 5},
        "alpha_pattern": {"q_proj": 1, "[a-z]_proj": 64},
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("patterns", PATTERNS)
def test_ranks_and_scalings_are_pefts(patterns: str, llama: Path, tmp_path: Path) -> None:
    """Stock PEFT's own `scaling` of every layer as the oracle, from the files that it saves and loads.

    (It sorts the patterns when it saves them, so that where two match it may load others than it trained with.)
    """
    make_adapter(llama, tmp_path / "adapter", target_modules="all-linear", **PATTERNS[patterns])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path / "adapter"))
    expected = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in loaded.named_modules()
        if isinstance(getattr(layer, "scaling", None), dict)
    }
    adapter = Adapter.open(tmp_path / "adapter")
    assert adapter.parts.keys() == expected.keys()
    assert len(expected) == 14
    for module, scaling in expected.items():
        assert adapter.scaling(module) == scaling
        assert adapter.config.scaling(module, adapter.shape(module).r) == scaling
    assert len(set(expected.values())) > 1 or patterns == "none"


_paths = st.lists(st.sampled_from(["model", "layers", "0", "1", "10", "mlp", "up_proj", "q_proj", "proj"]), min_size=1)
_patterns = st.sampled_from(
    [
        "q_proj",
        "proj",
        "up_proj",
        r"layers\.1",
        r".*\.mlp\..*",
        "mlp.up_proj",
        r"model|layers",
        r"1\..*",
        ".*",
        r"1.*proj",
    ]
)


@given(_paths.map(".".join), st.lists(_patterns, unique=True))
def test_patterns_are_looked_up_as_peft_does(module: str, keys: list[str]) -> None:
    """PEFT's `get_pattern_key` as the oracle."""
    patterns = {key: number for number, key in enumerate(keys)}
    assert pattern_for(patterns, module, -1) == patterns.get(get_pattern_key(patterns.keys(), module), -1)


def test_an_adapter_of_pefts_keeps_every_field(llama: Path, tmp_path: Path) -> None:
    """PEFT's file as the oracle: read and written again it says the same, but for what PEFT left null."""
    make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["norm"], use_rslora=True)
    theirs = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ours = json.loads(AdapterConfig.read(tmp_path / "adapter").to_json())
    assert {name: value for name, value in theirs.items() if ours.get(name) != value and value is not None} == {}
    assert ours["modules_to_save"] == ["norm"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "adapter_config.json").write_text(json.dumps(ours))
    assert LoraConfig.from_pretrained(tmp_path / "again") == LoraConfig.from_pretrained(tmp_path / "adapter")


CONFIGS = [
    AdapterConfig("LORA", 4, 8),
    AdapterConfig(
        "SLORA", 16, 2.5, ["q_proj"], {"k_proj": 2}, {"k_proj": 0.5}, use_rslora=True, fan_in_fan_out=True,
        base_model_name_or_path="org/name", task_type="CAUSAL_LM", residual="virtual", base_fingerprint="sha256:0",
    ),
    AdapterConfig(
        "LORA", 1, 1, r".*proj", {"q_proj": 1, "[a-z]_proj": 2}, {"z": 3, "a": 4, "m": 5},
        target_parameters=["experts.gate_up_proj"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_is_read_as_it_was_written(config: AdapterConfig, tmp_path: Path) -> None:
    """The object that was written as the oracle; written again it is the same text."""
    (tmp_path / "adapter_config.json").write_text(config.to_json())
    read = AdapterConfig.read(tmp_path)
    for name in AdapterConfig.__dataclass_fields__:
        expected = getattr(config, name)
        if name != "extra":
            assert getattr(read, name) == (list(expected) if isinstance(expected, tuple) else expected), name
    for pattern in ("rank_pattern", "alpha_pattern"):
        assert list(getattr(read, pattern)) == list(getattr(config, pattern)), "the first that matches is another"
    assert read.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"), ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("BertForSequenceClassification", "SEQ_CLS"), ("LlamaModel", None), (None, None),
    ],
)  # fmt: skip
def test_task_types(architecture: str | None, task: str | None) -> None:
    assert task_type_of({"architectures": [architecture]} if architecture else {}) == task
    assert task is None or task in set(TaskType)


# --- matching with a base -------------------------------------------------------------------------------------------


def opened(directory: Path, modules: Mapping[str, tuple[int, int]]) -> Adapter:
    """An adapter of these modules, (out, in) each."""
    tensors = {}
    for module, shape in modules.items():
        a, b = random_factors(*shape)
        tensors |= {tensor_name(module, "lora_A"): a, tensor_name(module, "lora_B"): b}
    return Adapter.open(write_adapter(directory, tensors))


def base_of(directory: Path, *names: str) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(directory, {name: torch.ones(4, 4) for name in names}, config={}))


@pytest.mark.parametrize(
    ("wanted", "names", "found"),
    [
        ("model.layers.0.q", ["model.layers.0.q.weight", "layers.0.q.weight"], "model.layers.0.q.weight"),
        ("model.layers.0.q", ["layers.0.q.weight", "layers.1.q.weight"], "layers.0.q.weight"),
        ("layers.0.q", ["model.layers.0.q.weight", "model.layers.10.q.weight"], "model.layers.0.q.weight"),
        ("model.layers.0.q", ["model.language_model.layers.0.q.weight", "layers.0.q.weight"], "layers.0.q.weight"),
        ("layers.0.q", ["text.layers.0.q.weight", "vision.layers.0.q.weight"], None),
        ("layers.0.q", ["layers.0.qq.weight", "xlayers.0.q.weight"], None),
        ("experts.gate_up_proj", ["model.experts.gate_up_proj"], "model.experts.gate_up_proj"),
    ],
)
def test_resolve(wanted: str, names: list[str], found: str | None, tmp_path: Path) -> None:
    """Exact names first, then the only one that ends alike, whole components; never one of several."""
    adapter, base = opened(tmp_path / "adapter", {wanted: (4, 4)}), base_of(tmp_path / "base", *names)
    if found is not None:
        assert adapter.resolve(base) == {wanted: found}
        return
    with pytest.raises(AdapterError, match="match no tensor"):
        adapter.resolve(base)


def test_resolve_of_a_tensor_that_is_yet_to_come(tmp_path: Path) -> None:
    adapter, base = opened(tmp_path / "adapter", {"lm_head": (4, 4)}), base_of(tmp_path / "base", "wte.weight")
    assert adapter.resolve(base, extra=["lm_head.weight"]) == {"lm_head": "lm_head.weight"}
    with pytest.raises(AdapterError, match="lm_head"):
        adapter.resolve(base)


def test_resolve_names_what_is_missing_and_what_is_close(tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.self_attn.qq_proj": (32, 32) for layer in range(8)}
    adapter = opened(tmp_path / "adapter", {Q: (32, 32), **modules})
    with pytest.raises(AdapterError) as refused:
        adapter.resolve(Checkpoint.open(write_llama(tmp_path / "base")))
    text = str(refused.value)
    assert text.startswith("8 of 9 modules")
    assert [module in text for module in modules] == [True] * 5 + [False] * 3
    assert "…; the closest to the first are model.layers.0.self_attn.q_proj" in text
    assert str(adapter.directory) in text
    assert str(tmp_path / "base") in text


def test_resolve_has_no_hint_where_nothing_is_close(tmp_path: Path) -> None:
    adapter = opened(tmp_path / "adapter", {"encoder.block.7.DenseReluDense.wi": (4, 4)})
    with pytest.raises(AdapterError) as refused:
        adapter.resolve(base_of(tmp_path / "base", "x.weight"))
    assert "closest" not in str(refused.value)


def test_two_modules_of_one_tensor_are_refused(tmp_path: Path) -> None:
    adapter = opened(tmp_path / "adapter", {"model.layers.0.q": (4, 4), "layers.0.q": (4, 4)})
    with pytest.raises(AdapterError, match=re.escape("both change model.layers.0.q.weight")):
        adapter.resolve(base_of(tmp_path / "base", "model.layers.0.q.weight"))


@pytest.mark.parametrize("where", ["configuration", "metadata"])
def test_the_fingerprint_of_a_base(where: str, tmp_path: Path) -> None:
    """Recorded in either place it admits its own base and no other; unrecorded, any."""
    base, other = (Checkpoint.open(write_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    plain = opened(tmp_path / "adapter", {Q: (32, 32)})
    assert plain.base_fingerprint is None
    check_base(plain, base)
    check_base(plain, other)
    recorded = {"base_fingerprint": base.fingerprint()}
    if where == "configuration":
        edit_config(tmp_path / "adapter", **recorded)
    else:
        tensors = {name: plain.file.tensor(name) for name in plain.file.tensors}
        write_adapter(tmp_path / "adapter", {name: tensor.clone() for name, tensor in tensors.items()}, recorded)
    adapter = Adapter.open(tmp_path / "adapter")
    assert adapter.base_fingerprint == base.fingerprint()
    check_base(adapter, base)
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        check_base(adapter, other)


# --- the file that is planned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("three_matrix", "initial"), [(False, False), (True, False), (True, True)])
def test_a_planned_file_is_opened_by_safetensors(
    three_matrix: bool, initial: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The safetensors library as the oracle of header, shapes, order and length; then our own reader."""
    modules = [ModuleShape("a.q", 6, 5, 3), ModuleShape("a.k", 2, 5, 1), ModuleShape("b", 7, 9, 2)]
    layout = plan_adapter_file(
        "adapter_model.safetensors", modules, dtype, three_matrix=three_matrix, initial=initial, metadata={"x": "y"}
    )
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(layout.header + bytes(layout.size_bytes - len(layout.header)))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "y"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {
        f"base_model.model.{module.module}.{part}{suffix}.weight": shape
        for module in modules
        for suffix in (["", "_initial"] if initial else [""])
        for part, shape in {
            "lora_A": (module.r, module.in_features),
            "lora_N": (module.r, module.r),
            "lora_B": (module.out_features, module.r),
        }.items()
        if part != "lora_N" or three_matrix
    }
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(info.start % dtype.itemsize == 0 for info in layout.tensors.values())
    fields = AdapterConfig("SLORA" if three_matrix else "LORA", 3, 3, rank_pattern={"a.k": 1, "b": 2}).to_json()
    (tmp_path / "adapter_config.json").write_text(fields)
    adapter = Adapter.open(tmp_path)
    assert [adapter.shape(module.module) for module in modules] == modules
    assert adapter.three_matrix == three_matrix
    assert (adapter.initial("b") is not None) == initial


# --- factors --------------------------------------------------------------------------------------------------------


def test_factors_multiply_to_the_weight_that_the_base_stores(tmp_path: Path) -> None:
    """fp64 formulas as the oracle: scaling B N A of a linear, (B A)^T of an embedding, their differences."""
    a, b, core = (factor.double() for factor in random_factors(6, 5, 3, core=True))
    start = [factor.double() for factor in random_factors(6, 5, 3, core=True, seed=1)]
    tensors = {tensor_name("q", f"lora_{side}"): factor for side, factor in zip("ABN", (a, b, core), strict=True)}
    tensors |= {tensor_name("v", f"lora_{side}"): factor for side, factor in zip("ABN", (a, b, core), strict=True)}
    tensors |= {tensor_name("v", f"lora_{side}_initial"): f for side, f in zip("ABN", start, strict=True)}
    tensors |= {"base_model.model.wte.lora_embedding_A": a, "base_model.model.wte.lora_embedding_B": b}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    adapter = Adapter.open(write_adapter(tmp_path, tensors, peft_type="SLORA", r=3, lora_alpha=12))
    expected = {
        "q": 4 * b @ core @ a,
        "v": 4 * (b @ core @ a - start[1] @ start[2] @ start[0]),
        "wte": 4 * (b @ a).T,
    }
    for module, delta in expected.items():
        for weight in (1.0, -0.5):
            left, right = adapter.sides(module, torch.float64, weight)
            # fp64, sums of at most 9 terms of size about 4: far above 9 * 2^-53 of them.
            assert torch.allclose(left @ right, weight * delta, rtol=0, atol=1e-13)
    assert (adapter.shape("wte").out_features, adapter.shape("wte").in_features) == (5, 6)


def test_a_start_that_never_moved_adds_exactly_nothing(tmp_path: Path) -> None:
    a, b, core = random_factors(6, 5, 3, core=True)
    tensors = {tensor_name("q", f"lora_{side}"): factor for side, factor in zip("ABN", (a, b, core), strict=True)}
    tensors |= {name.replace(".weight", "_initial.weight"): tensor.clone() for name, tensor in tensors.items()}
    adapter = Adapter.open(write_adapter(tmp_path, tensors, peft_type="SLORA", r=3))
    left, right = adapter.sides("q", torch.float32)
    assert not (left @ right).any()
    tensors[tensor_name("q", "lora_N")][0, 0] += 1e-6
    left, right = Adapter.open(write_adapter(tmp_path / "moved", tensors, peft_type="SLORA", r=3)).sides(
        "q", torch.float64
    )
    assert 0 < (left @ right).abs().max() < 1e-4


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_kohya_keeps_alpha_with_the_tensors(alpha: float | None, tmp_path: Path) -> None:
    """alpha / r by hand as the oracle; without alpha 1, at each module's own rank."""
    tensors = {}
    for module, r in (("lora_te_a", 2), ("lora_te_b", 5)):
        a, b = random_factors(6, 5, r)
        tensors |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "style.safetensors")
    for path in (tmp_path, tmp_path / "style.safetensors"):
        adapter = Adapter.open(path)
        scalings = {module: adapter.scaling(module) for module in adapter.parts}
        expected = {"lora_te_a": 1.0, "lora_te_b": 1.0} if alpha is None else {"lora_te_a": 1.0, "lora_te_b": 0.4}
        assert scalings == expected
