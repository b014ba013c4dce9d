"""Convolutions, adapted where they are named: their form on disk, and what each command makes of it.

That they load in stock PEFT and merge as there, family by family, is in the table of `test_architectures`. Oracles:
fp64 formulas on the tensors as the safetensors library reads them, torch.linalg.svd, stock PEFT's merge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import nlora_surgery.peft_plugin as plugin
from nlora_surgery.adapter import Adapter
from nlora_surgery.errors import AdapterError, TargetError
from nlora_surgery.options import METHODS, FactorOptions
from nlora_surgery.surgery.convert import ConvertOptions, convert, plan_convert
from nlora_surgery.surgery.extract import ExtractOptions, extract, plan_extract
from nlora_surgery.surgery.inspect import inspect
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.surgery.verify import half_ulp, verify
from nlora_surgery.training.layers import attach
from tests.adapters import adapter_tensors, checkpoint_tensors, edit_config, edit_tensors, write_adapter
from tests.checkpoints import write_llama
from tests.test_architectures import FAMILIES, _load, _write
from tests.test_merge import assert_rounded

RANK = 4
# One of each number of dimensions: family -> name on disk, module, --targets.
KINDS = {
    "whisper": ("model.encoder.conv2.weight", "model.encoder.conv2", "conv2"),
    "vit": (
        "vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.patch_embeddings.projection",
        "patch_embeddings",
    ),
    "qwen2_vl": ("visual.patch_embed.proj.weight", "model.visual.patch_embed.proj", "patch_embed"),
}  # fmt: skip
BASE_KEY = "base_model.model."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = _write(FAMILIES[name], tmp_path_factory.mktemp("model") / "model", dtype)
        return made[name, dtype]

    return get


def init(model: Path, out: Path, kind: str, residual: str = "baked", **factor: Any) -> dict[str, Any]:
    asked = InitOptions(RANK, FactorOptions(**factor), residual, 2.0 * RANK, targets=(KINDS[kind][2],))
    return prepare(plan_init(model, out, asked))


def dense(tensors: dict[str, Tensor], module: str, end: str = "") -> Tensor:
    """lora_B lora_N lora_A in fp64, in the dimensions of the weight, from the tensors of a file."""
    a, n, b = (tensors.get(f"{BASE_KEY}{module}.{part}{end}.weight") for part in ("lora_A", "lora_N", "lora_B"))
    assert a is not None
    assert b is not None
    assert set(b.shape[2:]) == {1}
    core = torch.eye(len(a), dtype=torch.float64) if n is None else n.double()
    return torch.einsum("or,rs,s...->o...", b.flatten(1).double(), core, a.double())


# --- init and verify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_factors_them(kind: str, method: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Shapes are PEFT's; residual plus product, by the formula, is the weight to half an ulp of what is stored."""
    model, (name, module, _) = models(kind, torch.bfloat16), KINDS[kind]
    manifest = init(model, tmp_path / "out", kind, method=method)
    tensors = adapter_tensors(tmp_path / "out" / "adapter")
    weight = checkpoint_tensors(model)[name]
    out_features, channels, *kernel = weight.shape
    shapes = {key.removeprefix(f"{BASE_KEY}{module}."): list(tensor.shape) for key, tensor in tensors.items()}
    core = {} if method == "lora" else {"lora_N.weight": [RANK, RANK]}
    assert shapes == core | {
        "lora_A.weight": [RANK, channels, *kernel], "lora_B.weight": [out_features, RANK, *[1] * len(kernel)],
    }  # fmt: skip
    assert manifest["modules"][0]["kernel"] == kernel
    stored, delta = checkpoint_tensors(tmp_path / "out")[name], 2 * dense(tensors, module)
    error = (stored.double() + delta - weight.double()).abs()
    # Computed in fp32: r terms and a sum, on numbers below those of |weight| + |delta| and of the factors' sizes.
    size = 2 * dense({key: tensor.abs() for key, tensor in tensors.items()}, module) + weight.double().abs()
    assert (error <= half_ulp(stored.double(), torch.bfloat16) + 2.0**-24 * (3 * RANK + 4) * size).all()
    if method in {"slora", "lora"}:
        assert not delta.any()
    else:
        assert delta.norm() > 0.02 * weight.double().norm()  # the test would not pass without the product
    report = verify(tmp_path / "out", model)
    assert report.failures == []
    assert len(report.modules) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_takes_the_leading_singular_triples(kind: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Of the matrix (out, channels · kernel), by torch.linalg.svd."""
    model, (name, module, _) = models(kind), KINDS[kind]
    init(model, tmp_path / "out", kind, method="pissa")
    delta = 2 * dense(adapter_tensors(tmp_path / "out" / "adapter"), module).flatten(1)
    U, S, Vh = torch.linalg.svd(checkpoint_tensors(model)[name].double().flatten(1), full_matrices=False)
    # Factors in fp32: each of r terms of at most S[0] is rounded in two places.
    assert (delta - U[:, :RANK] * S[:RANK] @ Vh[:RANK]).abs().max() <= RANK * 2.0**-22 * S[0]


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_and_no_residual(kind: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing but the adapter is written; virtual has its start beside it, and one that moved is found by verify."""
    model, (name, module, _) = models(kind, torch.bfloat16), KINDS[kind]
    weight = checkpoint_tensors(model)[name].double()
    init(model, tmp_path / "virtual", kind, "virtual", method="sketch")
    assert not list((tmp_path / "virtual").glob("*.safetensors"))
    tensors = adapter_tensors(tmp_path / "virtual" / "adapter")
    assert torch.equal(dense(tensors, module), dense(tensors, module, "_initial"))
    assert verify(tmp_path / "virtual", model).failures == []
    edit_tensors(tmp_path / "virtual" / "adapter", lambda t: t[f"{BASE_KEY}{module}.lora_A.weight"].mul_(1.01))
    assert verify(tmp_path / "virtual", model).failures
    manifest = init(model, tmp_path / "none", kind, "none", method="sketch")
    delta = 2 * dense(adapter_tensors(tmp_path / "none" / "adapter"), module)
    assert manifest["modules"][0]["drift"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)


# --- convert ----------------------------------------------------------------------------------------------------------


def trained(start: Path, out: Path, module: str, parts: tuple[str, ...]) -> Path:
    """The adapter as training might leave it: some factors moved."""
    shutil.copytree(start, out)
    generator = torch.Generator().manual_seed(1)

    def move(tensors: dict[str, Tensor]) -> None:
        for part in parts:
            tensor = tensors[f"{BASE_KEY}{module}.{part}.weight"]
            tensor += 0.3 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)

    edit_tensors(out, move)
    return out


@pytest.mark.parametrize("to", ["lora", "slora"])
@pytest.mark.parametrize(
    ("parts", "rank"), [(("lora_A", "lora_N", "lora_B"), 2 * RANK), (("lora_N",), RANK)], ids=["all", "core"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_adapter_comes_to_the_original(
    kind: str, parts: tuple[str, ...], rank: int, to: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """s (B N A - B0 N0 A0), by the formula; at rank 2r, or r where the sides stood; of a baked and a virtual start."""
    model, (_, module, _) = models(kind), KINDS[kind]
    for residual in ("baked", "virtual"):
        start = tmp_path / residual / "adapter"
        init(model, tmp_path / residual, kind, residual, method="sketch")
        moved = trained(start, tmp_path / f"{residual} moved", module, parts)
        made = tmp_path / f"{residual} {to}"
        initial = start if residual == "baked" else None
        convert(plan_convert(moved, made, ConvertOptions(to=to), base=model, initial=initial))
        adapter = Adapter.open(made)
        assert adapter.shape(module).r == rank
        expected = 2 * (dense(adapter_tensors(moved), module) - dense(adapter_tensors(start), module))
        actual = adapter.scaling(module) * dense(adapter_tensors(made), module)
        # Each factor is rounded to fp32 once: 2^-24 of each of rank terms, of which those of both products cancel.
        largest = (2 * dense({k: t.abs() for k, t in adapter_tensors(moved).items()}, module)).max()
        assert (expected - actual).abs().max() <= rank * 2.0**-23 * largest
        assert expected.norm() > 1e-3 * largest


def test_recompressed_at_the_least_error(models: Callable[..., Path], tmp_path: Path) -> None:
    model, (_, module, _) = models("vit"), KINDS["vit"]
    init(model, tmp_path / "out", "vit", method="sketch")
    start = tmp_path / "out" / "adapter"
    moved = trained(start, tmp_path / "moved", module, ("lora_A", "lora_N", "lora_B"))
    options = ConvertOptions(to="lora", rank=2)
    manifest = convert(plan_convert(moved, tmp_path / "made", options, base=model, initial=start))
    change = 2 * (dense(adapter_tensors(moved), module) - dense(adapter_tensors(start), module))
    values = torch.linalg.svdvals(change.flatten(1))
    best = float(values[2:].norm() / values.norm())
    assert manifest["modules"][0]["error"] == pytest.approx(best, rel=1e-4)
    delta = Adapter.open(tmp_path / "made").scaling(module) * dense(adapter_tensors(tmp_path / "made"), module)
    assert float((delta - change).norm() / change.norm()) == pytest.approx(best, rel=1e-4)


def test_vllm_takes_none(models: Callable[..., Path], tmp_path: Path) -> None:
    init(models("vit"), tmp_path / "out", "vit", method="sketch")
    with pytest.raises(AdapterError, match=r"has a convolution .*projection.*vLLM cannot express"):
        plan_convert(tmp_path / "out" / "adapter", tmp_path / "made", ConvertOptions(to="lora", vllm=True))


# --- merge ------------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {"conv2": 2}, "alpha_pattern": {"projection": 5}},
    "DoRA": {"use_dora": True},
    "bias": {"lora_bias": True},
    "saved": {"modules_to_save": ["layernorm", "conv1"]},
}


# Qwen's has no bias of its own.
@pytest.mark.parametrize(("kind", "form"), sorted({*product(KINDS, FORMS)} - {("qwen2_vl", "bias")}))
def test_merge_is_pefts(kind: str, form: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """What PEFT can do to a convolution besides; its merge in fp64, saved again, is the truth."""
    family, base, module = FAMILIES[kind], models(kind), KINDS[kind][1]
    torch.manual_seed(2)
    model = _load(base, family)
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=6, target_modules=[module], **FORMS[form]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge(plan_merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out"))
    exact = PeftModel.from_pretrained(_load(base, family, torch.float64), str(tmp_path / "adapter"))
    exact.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merged, original, truth = map(checkpoint_tensors, (tmp_path / "out", base, tmp_path / "theirs"))
    changed = {key for key, tensor in truth.items() if not torch.equal(tensor.double(), original[key].double())}
    assert KINDS[kind][0] in changed
    for key, tensor in merged.items():
        if key in changed:
            assert_rounded(tensor, truth[key].double(), key)
        else:
            assert torch.equal(tensor, original[key]), key


def test_kohyas_convolutions(models: Callable[..., Path], tmp_path: Path) -> None:
    """lora_down is the wide one, lora_up has a kernel of ones; a third in the middle (CP) is not understood."""
    base, (name, module, _) = models("vit"), KINDS["vit"]
    flat, generator = f"lora_unet_{module.replace('.', '_')}", torch.Generator().manual_seed(0)
    down = torch.randn(RANK, 3, 8, 8, generator=generator)
    up = torch.randn(32, RANK, 1, 1, generator=generator)
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    merge(plan_merge(base, [(tmp_path / "kohya.safetensors", 1.0)], tmp_path / "out"))
    expected = checkpoint_tensors(base)[name].double()
    expected += 2.0 / RANK * torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
    assert_rounded(checkpoint_tensors(tmp_path / "out")[name], expected)
    save_file(tensors | {f"{flat}.lora_mid.weight": torch.ones(RANK, RANK, 8, 8)}, tmp_path / "cp.safetensors")
    with pytest.raises(AdapterError, match=r"lora_N \[4, 4, 8, 8\] at rank 4|expected"):
        plan_merge(base, [(tmp_path / "cp.safetensors", 1.0)], tmp_path / "other")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((RANK, 3, 4, 4), (32, RANK, 1, 1), r"a weight of shape \[32, 3, 4, 4\], but .* has \[32, 3, 8, 8\]"),
        ((RANK, 3, 64), (32, RANK, 1), r"a weight of shape \[32, 3, 64\], but .* has \[32, 3, 8, 8\]"),
        ((RANK, 192), (32, RANK), r"a weight of shape \[32, 192\], but .* has \[32, 3, 8, 8\]"),
        ((RANK, 3, 8, 8), (32, RANK, 8, 8), "expected"),
        ((RANK, 6, 8, 8), (32, RANK // 2, 1, 1), "one in groups cannot be merged"),
        ((RANK, 0, 8, 8), (32, RANK, 1, 1), "expected"),
    ],
)
def test_other_shapes_are_refused(
    a: tuple[int, ...], b: tuple[int, ...], message: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    key = f"{BASE_KEY}{KINDS['vit'][1]}"
    tensors = {f"{key}.lora_A.weight": torch.ones(a), f"{key}.lora_B.weight": torch.ones(b)}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(AdapterError, match=message):
        plan_merge(models("vit"), [(adapter, 1.0)], tmp_path / "out")


def test_a_conv1d_is_no_stack_of_experts(tmp_path: Path) -> None:
    """Both have three dimensions. Of three matrices the middle one tells, whatever the sizes; of two it is a Conv1d."""
    key = f"{BASE_KEY}m"
    a, b, stacked = torch.ones(4, 1, 5), torch.ones(4, 4, 1), torch.ones(4, 1, 1)  # 4 experts (4, 5) of rank 1, or …
    for name, core, kernel, experts, r in (
        ("convolution", torch.ones(4, 4), (5,), None, 4), ("experts", stacked, None, 4, 1), ("two", None, (5,), None, 4)
    ):  # fmt: skip
        tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        tensors |= {} if core is None else {f"{key}.lora_N.weight": core}
        kind = "LORA" if core is None else "SLORA"
        adapter = Adapter.open(write_adapter(tmp_path / name, tensors, peft_type=kind, r=r))
        assert (adapter.kernel("m"), adapter.experts("m"), adapter.shape("m").r) == (kernel, experts, r)


# --- extract ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lora", "slora"])
@pytest.mark.parametrize("method", ["svd", "sketch"])
@pytest.mark.parametrize("kind", KINDS)
def test_extract_where_they_are_named(
    kind: str, method: str, to: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """A change of rank 3 at most comes back; by a tolerance its rank is found; unnamed it is saved whole."""
    base, (name, module, pattern) = models(kind), KINDS[kind]
    generator = torch.Generator().manual_seed(3)
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    for file in tuned.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            weight = tensors[name]
            sides = torch.randn(len(weight), 3, generator=generator), torch.randn(3, weight[0].numel(),
                                                                                    generator=generator)  # fmt: skip
            weight += 0.1 * (sides[0] @ sides[1]).reshape(weight.shape)
            save_file(tensors, file, {"format": "pt"})
    change = checkpoint_tensors(tuned)[name].double() - checkpoint_tensors(base)[name].double()
    for tolerance, rank in ((0.0, RANK), (1e-3, 3)):
        options = ExtractOptions(RANK, (pattern,), to, method, tolerance)
        manifest = extract(plan_extract(base, tuned, tmp_path / f"{tolerance}", options))
        tensors = adapter_tensors(tmp_path / f"{tolerance}")
        assert manifest["modules"][0]["module"] == module
        assert manifest["modules"][0]["r"] == rank == Adapter.open(tmp_path / f"{tolerance}").shape(module).r
        # Weights of about 1 in fp32: the change itself is of rank 3 to 2^-24 of them, its factors to 2^-24 of it.
        assert (dense(tensors, module) - change).norm() <= 1e-5 * change.norm()
    plan = plan_extract(base, tuned, tmp_path / "whole", ExtractOptions(RANK))
    assert (plan.modules, plan.replaced) == ({}, [name])


def test_extract_factors_what_is_named_and_nothing_else(models: Callable[..., Path], tmp_path: Path) -> None:
    """A linear changed too: it is saved whole where only the convolution is named, and the other way round."""
    base, (name, module, _) = models("vit"), KINDS["vit"]
    shutil.copytree(base, tmp_path / "tuned")
    linear = "vit.layers.0.attention.q_proj"
    on_disk = "vit.encoder.layer.0.attention.attention.query.weight"
    for file in (tmp_path / "tuned").glob("*.safetensors"):
        tensors = load_file(file)
        save_file({key: t + 1 if key in {name, on_disk} else t for key, t in tensors.items()}, file, {"format": "pt"})
    for targets, modules, others in (
        (("projection",), {module}, [on_disk]),
        (("q_proj",), {linear}, [name]),
        ((), {linear}, [name]),
        (("projection", "query"), {module, linear}, []),
    ):
        plan = plan_extract(base, tmp_path / "tuned", tmp_path / "out", ExtractOptions(RANK, targets))
        assert ({shape.module for shape in plan.modules.values()}, plan.replaced) == (modules, others)
        assert set(plan.config.extra.get("modules_to_save", ())) == {other.removesuffix(".weight") for other in others}
    options = ExtractOptions(RANK, ("projection",), others="refuse")
    with pytest.raises(TargetError, match="1 changed tensors are no targets: "):
        plan_extract(base, tmp_path / "tuned", tmp_path / "out", options)


# --- names ------------------------------------------------------------------------------------------------------------


def chosen(model: Path, out: Path, *targets: str, exclude: tuple[str, ...] = ()) -> set[str]:
    plan = plan_init(model, out, InitOptions(RANK, FactorOptions("lora"), targets=targets, exclude=exclude))
    return {target.module for target in plan.targets}


def test_how_they_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    """Their own names, expressions, what holds nothing else; but not what holds linears too."""
    out, model, projection = tmp_path / "out", models("vit"), KINDS["vit"][1]
    for pattern in ("projection", "patch_embeddings", "embeddings", projection, r".*proj\w+"):
        assert chosen(model, out, pattern) == {projection}
    both = chosen(model, out, r".*(projection|layers\.0\.attention\.q_proj)")
    assert both == {projection, "vit.layers.0.attention.q_proj"}
    assert chosen(model, out, "projection", "all-linear") > {projection}
    assert projection not in chosen(model, out, "projection", "all-linear", exclude=("projection",))
    assert projection not in chosen(model, out, "vit")
    assert chosen(models("whisper"), out, "conv1", "conv2", exclude=("conv1",)) == {"model.encoder.conv2"}
    with pytest.raises(TargetError, match=r"conv3 matches no linear weight or convolution; there are: .*conv2"):
        chosen(models("whisper"), out, "conv3")


# --- refused ----------------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "groups": (
        "SqueezeBertConfig",
        {"vocab_size": 96, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4},
        "SqueezeBertForMaskedLM", "query", "in 4 groups",
    ),
    "depthwise": (
        "MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        "MambaForCausalLM", "conv1d", "in 64 groups",
    ),
    "dilated": ("SpeechT5HifiGanConfig", {"upsample_initial_channel": 32}, "SpeechT5HifiGan", "resblocks.0.convs1.1",
                r"dilation \[3\]"),
    "transposed": ("SpeechT5HifiGanConfig", {"upsample_initial_channel": 32}, "SpeechT5HifiGan", "upsampler.0",
                   "ConvTranspose1d, which is no plain convolution"),
    "standardized": (
        "BitConfig", {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_groups": 4},
        "BitForImageClassification", "embedder.convolution", "WeightStandardizedConv2d, which is no plain convolution",
    ),
}  # fmt: skip


REGNET = {"embedding_size": 16, "hidden_sizes": [32], "depths": [1], "groups_width": 8, "layer_type": "x"}


@pytest.mark.parametrize("what", OTHERS)
def test_others_are_refused(what: str, tmp_path: Path) -> None:
    """The model's class knows what shapes do not tell; the sentence says how to go on, and so one does."""
    config, sizes, model_class, name, message = OTHERS[what]
    model = getattr(transformers, model_class)(getattr(transformers, config)(**sizes))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(TargetError, match=rf"{name}\.weight .*{message}.*: leave it out with --exclude .*{name}$"):
        chosen(tmp_path / "model", tmp_path / "out", name)
    if what == "groups":
        named = chosen(tmp_path / "model", tmp_path / "out", r".*(query|post_attention\.conv1d)", exclude=(name,))
        assert {path.rpartition("layers.")[2] for path in named} == {"0.post_attention.conv1d"}


def test_of_a_class_that_is_not_known(models: Callable[..., Path], tmp_path: Path) -> None:
    """Three dimensions may be anything, one channel depthwise; what else there is can only be convolutions."""
    for kind in KINDS:
        shutil.copytree(models(kind), tmp_path / kind)
        edit_model_config(tmp_path / kind, model_type="some_model", architectures=["SomeModel"])
    assert chosen(tmp_path / "vit", tmp_path / "out", "projection") == {KINDS["vit"][1]}
    assert chosen(tmp_path / "qwen2_vl", tmp_path / "out", "patch_embed") == {"visual.patch_embed.proj"}
    unknown = "may be a convolution in groups.*'some_model'; it will not be guessed: leave it out with --exclude"
    with pytest.raises(TargetError, match=rf"conv2.weight of shape \[32, 32, 3\] {unknown}"):
        chosen(tmp_path / "whisper", tmp_path / "out", "conv2")
    changes = {"model.stem.weight": torch.ones(8, 1, 3, 3), "model.layers.0.fused.weight": torch.ones(4, 8, 8)}
    net = transformers.RegNetForImageClassification(transformers.RegNetConfig(**REGNET))
    net.save_pretrained(tmp_path / "regnet")
    tensors = load_file(tmp_path / "regnet" / "model.safetensors")
    old = {name.replace("regnet.encoder.stages", "backbone.blocks"): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "regnet" / "model.safetensors", {"format": "pt"})
    grouped = next(name for name, tensor in old.items() if tensor.shape == (32, 8, 3, 3))
    with pytest.raises(TargetError, match="in 4 groups"):  # another name, but a layer of the class has its shape
        chosen(tmp_path / "regnet", tmp_path / "out", grouped.removesuffix(".weight"))
    model = write_llama(tmp_path / "llama", changes=changes)  # a class that is known, but not to have these
    for name in ("stem", "fused"):
        with pytest.raises(TargetError, match=rf"{name}.weight of shape .* may be a convolution in groups"):
            chosen(model, tmp_path / "out", name)


def edit_model_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def test_training_them_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    """By our layers and by the plugin, in one sentence that says what does train them."""
    model, projection = models("vit"), KINDS["vit"][1]
    init(model, tmp_path / "out", "vit", method="sketch")
    with pytest.raises(
        AdapterError, match=rf"adapts the convolution {projection}, which is neither trained nor run here: .*PEFT"
    ):
        attach(_load(model, FAMILIES["vit"]), Adapter.open(tmp_path / "out" / "adapter"))
    for load in (
        lambda net: get_peft_model(net, plugin.SLoraConfig(r=RANK, target_modules=["projection"])),
        lambda net: PeftModel.from_pretrained(net, str(tmp_path / "out" / "adapter")),
    ):
        with pytest.raises(ValueError, match=r"projection is a .*Conv2d.*convolutions PEFT's own LORA does"):
            load(_load(tmp_path / "out", FAMILIES["vit"]))


# --- what is told -----------------------------------------------------------------------------------------------------


def test_they_are_told_with_their_kernels(
    surgery: Callable[..., Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    model, out = models("vit", torch.bfloat16), tmp_path / "out"
    named = ("-r", 4, "--targets", "projection,q_proj")
    for arguments in (("inspect", model, *named), ("init", model, *named, "--dry-run", "-o", out)):
        done = surgery(*arguments)
        assert done.code == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if "projection" in line)
        # 32 × 3 · 8 · 8 in bf16; 4 (32 + 192) + 4² numbers of the adapter.
        assert line.split()[1:] == ["3·8·8→32", "×1", "6.144", "k", "12.3", "kB", "912"]
    assert "projection" not in surgery("inspect", model).stdout
    assert surgery("inspect", model, "--targets", "nothing").code == 5
    init(model, out, "vit", method="sketch")
    line = next(line for line in surgery("inspect", out / "adapter").stdout.splitlines() if "projection" in line)
    assert line.split()[1:] == ["3·8·8", "→", "32", "×1", "4", "2"]
    assert inspect(out / "adapter")["parameters"] == 912
    done = surgery("verify", out, "--against", model, "--logits")
    assert done.code == 0, done.stderr
    edit_config(out / "adapter", lora_alpha=2.2 * RANK)
    assert surgery("verify", out, "--against", model, "--logits").code == 10
    merged = surgery("merge", out, out / "adapter", "-o", tmp_path / "merged")
    assert merged.code == 0, merged.stderr
    done = surgery(
        "extract", out, tmp_path / "merged", "-r", 4, "--targets", "projection", "-o", tmp_path / "extracted"
    )
    assert done.code == 0, done.stderr
    assert "1 targets changed, 0 other tensors" in done.stdout
