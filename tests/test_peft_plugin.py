"""SLORA inside stock PEFT.

Oracles: the dense formula in fp64 and autograd through it, the base's own logits, what `init` writes, `layers.attach`,
`merge`, PEFT's LoRA of the converted adapter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from nlora_surgery import peft_plugin
from nlora_surgery.adapter import Adapter
from nlora_surgery.errors import AdapterError, BaseMismatchError, NonFiniteError
from nlora_surgery.options import METHODS, FactorOptions
from nlora_surgery.peft_plugin import SLoraConfig, SLoraLinear
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.surgery.verify import half_ulp
from nlora_surgery.training.layers import attach
from tests.adapters import adapter_tensors, checkpoint_tensors, edit_config, edit_tensors, save_model

IDS = torch.arange(22).reshape(2, 11) * 7 % 96
Base = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The directory of a random model of `tests.adapters.MODELS`, written once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = save_model(kind, tmp_path_factory.mktemp(kind) / "model", dtype)
        return made[kind, dtype]

    return get


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def wrapped(directory: Path, **config: Any) -> PeftModel:
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(load(directory), SLoraConfig(**config))


def move(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Stand in for training: every factor that may move does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            frozen = layer.frozen_peft_weight_names.get(adapter, ())
            for part in ("lora_A", "lora_N", "lora_B"):
                if part not in frozen:
                    weight = getattr(layer, part)[adapter].weight
                    weight.add_((0.05 * torch.randn(weight.shape, generator=generator)).to(weight.dtype))


def layers(model: nn.Module) -> dict[str, SLoraLinear]:
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, SLoraLinear)}
    assert found
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **arguments).logits


def dense(
    model: nn.Module, directory: Path, adapters: Iterable[str] = ("default",)
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The whole model in fp64 by the textbook formula.

    Returns:
        A function that computes its logits, and the factors it depends on, by their names in the PEFT model.
    """
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    weights = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    leaves: dict[str, Tensor] = {}
    for path, layer in layers(model).items():
        for adapter in adapters:
            current = []
            for part in ("lora_B", "lora_N", "lora_A"):
                leaf = getattr(layer, part)[adapter].weight.detach().double().requires_grad_()
                leaves[f"base_model.model.{path}.{part}.{adapter}.weight"] = leaf
                current.append(leaf)
            delta = current[0] @ current[1] @ current[2]
            if adapter in layer.lora_N_initial:
                B, N, A = (
                    getattr(layer, f"{part}_initial")[adapter].weight.double()
                    for part in ("lora_B", "lora_N", "lora_A")
                )
                delta = delta - B @ N @ A
            delta = layer.lora_alpha[adapter] / layer.r[adapter] * delta
            transposed = isinstance(plain.get_submodule(path), Conv1D)
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + (delta.T if transposed else delta)

    def forward(ids: Tensor = IDS) -> Tensor:
        return torch.func.functional_call(plain, weights, kwargs={"input_ids": ids}, tie_weights=False).logits

    return forward, leaves


# --- the start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "method"),
    [
        ("llama", torch.float32, "nystrom"),
        ("llama", torch.bfloat16, "sketch"),
        ("gpt2", torch.float32, "nystrom-optimal"),
        ("gpt2", torch.bfloat16, "slora"),
    ],
)
def test_a_virtual_start_is_the_base_to_the_bit(base: Base, kind: str, dtype: torch.dtype, method: str) -> None:
    """Oracle: the logits of the base without PEFT."""
    expected = logits(load(base(kind, dtype)))
    model = wrapped(base(kind, dtype), init_weights=method)
    assert torch.equal(logits(model), expected)
    assert next(iter(layers(model).values())).lora_N["default"].weight.dtype == torch.float32
    with torch.no_grad():
        narrow = get_peft_model(
            load(base(kind, dtype)),
            SLoraConfig(r=4, init_weights=method, target_modules="all-linear"),
            autocast_adapter_dtype=False,
        )
    assert torch.equal(logits(narrow), expected)
    assert {part.dtype for name, part in narrow.state_dict().items() if ".lora_" in name} == {dtype}


@pytest.mark.parametrize(
    ("kind", "dtype", "method"),
    [
        *(("llama", torch.float32, method) for method in METHODS if method != "lora"),
        ("llama", torch.bfloat16, "nystrom"),
        ("llama", torch.bfloat16, "sketch"),
        ("gpt2", torch.float32, "nystrom-optimal"),
    ],
)
def test_the_start_is_what_init_writes(base: Base, tmp_path: Path, kind: str, dtype: torch.dtype, method: str) -> None:
    """Oracle: `init --residual virtual`. At r = 20, k and v of the Llama (16 × 32) are clamped to 16."""
    source = base(kind, dtype)
    options = InitOptions(20, FactorOptions(method), "virtual", alpha=30, seed=5)  # type: ignore[arg-type]
    prepare(plan_init(source, tmp_path / "init", options, device="cpu"), device="cpu")
    wrapped(source, r=20, lora_alpha=30, seed=5, init_weights=method).save_pretrained(tmp_path / "plugin")

    ours, theirs = (Adapter.open(tmp_path / name) for name in ("plugin", "init/adapter"))
    assert ours.file.tensors.keys() == theirs.file.tensors.keys()
    assert ours.base_fingerprint == theirs.base_fingerprint
    for field in ("peft_type", "residual", "r", "lora_alpha", "fan_in_fan_out", "task_type"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)
    for module in theirs.parts:
        assert ours.shape(module) == theirs.shape(module)
        assert ours.scaling(module) == theirs.scaling(module)
        if method in {"nystrom", "slora"}:  # rows and columns, or random numbers
            assert all(map(torch.equal, ours.factors(module).matrices(), theirs.factors(module).matrices()))
            continue
        # Computed from memory that lies otherwise, so in another order: fp32 rounding, 2^-24, times what a gap of a
        # few percent between neighbouring singular values makes of it, times a small constant.
        product, wanted = (
            left @ right for left, right in (each.factors(module).sides(1.0, torch.float64) for each in (ours, theirs))
        )
        assert (product - wanted).norm() <= 1e-4 * wanted.norm()


def test_clamped_modules_keep_the_scaling_of_rslora(base: Base, tmp_path: Path) -> None:
    """Oracles: the definition, alpha / sqrt(r) at the r that was asked for; `Adapter`, of what is saved."""
    model = wrapped(base(), r=20, lora_alpha=30, use_rslora=True)
    model.save_pretrained(tmp_path)
    saved = Adapter.open(tmp_path)
    assert {layer.r["default"] for layer in layers(model).values()} == {16, 20}
    for path, layer in layers(model).items():
        assert layer.scaling["default"] == pytest.approx(30 / 20**0.5, rel=1e-12)
        assert saved.scaling(path) == layer.scaling["default"]


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [
    {"train": "nlora"}, {"train": "inttune"}, {"train": "nlora", "residual": "none", "init_weights": "slora"},
])  # fmt: skip
def test_output_and_gradients_are_those_of_the_dense_formula(base: Base, kind: str, config: dict[str, Any]) -> None:
    """Oracle: the dense formula in fp64, and autograd through it."""
    model = wrapped(base(kind), lora_alpha=6, **config).double()
    move(model)
    output = model(input_ids=IDS).logits
    forward, leaves = dense(model, base(kind))
    expected = forward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {name.split(".")[-3] for name in trained}
    assert parts == ({"lora_N"} if config["train"] == "inttune" else {"lora_A", "lora_N", "lora_B"})
    # fp64, some thirty products of inner dimension at most 128 in a row: rounding stays far below 1e-9 of the largest.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    got = torch.autograd.grad(output.square().sum(), list(trained.values()))
    wanted = torch.autograd.grad(expected.square().sum(), [leaves[name] for name in trained])
    for gradient, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize(("kind", "safe_merge"), [("llama", False), ("gpt2", True)])
def test_merged_is_unmerged(base: Base, kind: str, safe_merge: bool) -> None:
    """Oracle: the same model unmerged, in fp64; and the base again after unmerge."""
    model = wrapped(base(kind), lora_alpha=6).double()
    move(model)
    before = logits(model)
    tolerance = 1e-10 * float(before.abs().max())  # as above
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(load(base(kind)).double()), rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_bf16_merge_rounds_once(base: Base, safe_merge: bool) -> None:
    """Oracle: the exact sum in fp64, to within half an ulp of what is stored and the error of an fp32 product."""
    directory = base("llama", torch.bfloat16)
    model = wrapped(directory)
    move(model)
    original = checkpoint_tensors(directory)
    exact = {}
    for path, layer in layers(model).items():
        B, N, A, B0, N0, A0 = (
            getattr(layer, part)["default"].weight.detach().double()
            for part in ("lora_B", "lora_N", "lora_A", "lora_B_initial", "lora_N_initial", "lora_A_initial")
        )
        # Two products of inner dimension 2 r = 8, and the sum, each with a relative error of 2^-24 per term.
        size = B.abs() @ N.abs() @ A.abs() + B0.abs() @ N0.abs() @ A0.abs() + original[f"{path}.weight"].abs()
        exact[path] = original[f"{path}.weight"].double() + B @ N @ A - B0 @ N0 @ A0, 16 * 2**-24 * size
    merged = model.merge_and_unload(safe_merge=safe_merge)
    for path, (wanted, product_error) in exact.items():
        stored = merged.get_submodule(path).weight
        assert stored.dtype == torch.bfloat16
        assert ((stored.double() - wanted).abs() <= half_ulp(stored, torch.bfloat16) + product_error).all(), path


def test_unload_gives_the_base_back(base: Base) -> None:
    expected = logits(load(base()))
    model = wrapped(base())
    move(model)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


# --- from and to disk ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """What `init` writes, with its trainable factors moved and, for Llama, patterns and rsLoRA in the configuration."""
    made: dict[tuple[str, str, torch.dtype], Path] = {}

    def get(residual: str, dtype: torch.dtype = torch.float32, kind: str = "llama") -> Path:
        if (kind, residual, dtype) not in made:
            out = tmp_path_factory.mktemp("init") / residual
            prepare(plan_init(base(kind, dtype), out, InitOptions(20, FactorOptions("sketch"), residual, alpha=30)))

            def change(tensors: dict[str, Tensor]) -> None:
                for index, (name, tensor) in enumerate(sorted(tensors.items())):
                    if "initial" not in name:
                        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
                        tensors[name] = tensor + 0.05 * noise

            edit_tensors(out / "adapter", change)
            if kind == "llama":
                edit_config(out / "adapter", use_rslora=True)
                assert json.loads((out / "adapter/adapter_config.json").read_text())["rank_pattern"]
            made[kind, residual, dtype] = out
        return made[kind, residual, dtype]

    return get


@pytest.mark.parametrize(
    ("kind", "dtype", "residual"),
    [
        ("llama", torch.bfloat16, "baked"),
        ("llama", torch.bfloat16, "virtual"),
        ("llama", torch.float32, "none"),
        ("gpt2", torch.float32, "baked"),
        ("gpt2", torch.float32, "virtual"),
    ],
)
def test_adapters_of_init_load_and_compute_as_in_training(
    base: Base, trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, dtype: torch.dtype, residual: str,
) -> None:  # fmt: skip
    """Oracles: `layers.attach`, to the bit; the file's own tensors after loading and saving."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("what is loaded is not to be factored")

    monkeypatch.setattr(peft_plugin, "factorize", never)
    out = trained(residual, dtype, kind)
    directory = out if residual == "baked" else base(kind, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")  # PEFT only warns
        model = PeftModel.from_pretrained(load(directory), str(out / "adapter"))
    reference = load(directory)
    attach(reference, Adapter.open(out / "adapter"))
    assert torch.equal(logits(model), logits(reference))
    low = PeftModel.from_pretrained(load(directory), str(out / "adapter"), low_cpu_mem_usage=True)
    assert torch.equal(logits(low), logits(reference))

    model.save_pretrained(tmp_path / "again")
    wanted, found = adapter_tensors(out / "adapter"), adapter_tensors(tmp_path / "again")
    assert found.keys() == wanted.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    before, after = (
        json.loads((path / "adapter_config.json").read_text()) for path in (out / "adapter", tmp_path / "again")
    )
    before["target_modules"], after["target_modules"] = (
        sorted(before["target_modules"]),
        sorted(after["target_modules"]),
    )
    assert {name: after[name] for name in before} == before
    assert after["seed"] is after["sampling"] is None  # not known, and so not invented


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bf16_adapter_is_widened(
    base: Base, trained: Callable[..., Path], tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    """Oracle: `layers.attach`, which keeps factors in fp32."""
    narrow = shutil.copytree(trained("virtual") / "adapter", tmp_path / "narrow")
    edit_tensors(narrow, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))
    model = PeftModel.from_pretrained(load(base()), str(narrow), low_cpu_mem_usage=low_cpu_mem_usage)
    assert {part.dtype for name, part in model.state_dict().items() if ".lora_" in name} == {torch.float32}
    reference = load(base())
    attach(reference, Adapter.open(narrow))
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_what_it_saves_merges_as_it_does_itself(base: Base, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Oracle: the plugin's own merge_and_unload against `merge`, which streams the files."""
    model = wrapped(base(kind, dtype), r=20)
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(plan_merge(base(kind, dtype), [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu"), device="cpu")
    streamed = checkpoint_tensors(tmp_path / "merged")
    for name, tensor in model.merge_and_unload().state_dict().items():
        if name in streamed:
            # Both round the same sum once; they may differ where their sums, rounded otherwise, straddle a tie.
            bound = 2 * half_ulp(streamed[name], dtype)
            assert ((tensor.double() - streamed[name].double()).abs() <= bound).all(), name


def test_an_adapter_that_does_not_fit_is_refused(base: Base, trained: Callable[..., Path], tmp_path: Path) -> None:
    out = trained("baked")
    with pytest.raises(BaseMismatchError, match="another base"):  # the residual's adapter on the original
        PeftModel.from_pretrained(load(base()), str(out / "adapter"))

    part = shutil.copytree(out / "adapter", tmp_path / "part")
    edit_tensors(part, lambda tensors: tensors.pop(next(name for name in tensors if "lora_N" in name)))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(load(out), str(part))
    with pytest.raises(AdapterError, match="has not had all"):
        logits(model)

    more = shutil.copytree(out / "adapter", tmp_path / "more")
    edit_config(more, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="have no place in this model"):
        PeftModel.from_pretrained(load(out), str(more))

    config = PeftConfig.from_pretrained(str(out / "adapter"))
    model = get_peft_model(load(out), config)  # a configuration without its file
    with pytest.raises(AdapterError, match="get_peft_model a new SLoraConfig"):
        model.merge_and_unload()


# --- several adapters, other hosts -----------------------------------------------------------------------------


def test_several_adapters(base: Base, trained: Callable[..., Path]) -> None:
    """Oracles: the dense formula in fp64 with both adapters; a model with the one adapter alone."""
    directory = base()
    model = wrapped(directory, lora_alpha=6)
    model.add_adapter("other", SLoraConfig(r=8, init_weights="sketch", target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(model), logits(load(directory)))
    model.double()
    for name in ("default", "other"):
        with torch.no_grad():
            for layer in layers(model).values():
                if name in layer.lora_N:
                    layer.lora_N[name].weight.add_(0.1 * torch.randn(layer.lora_N[name].weight.shape).double())
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.set_adapter("other")
    other = logits(model)
    assert {name.split(".")[-2] for name, each in model.named_parameters() if each.requires_grad} == {"other"}
    model.set_adapter("default")
    first = logits(model)

    only = {path: layer for path, layer in layers(model).items() if "other" in layer.lora_N}
    assert len(only) == 4
    change = {path: layer.get_delta_weight("other") for path, layer in only.items()}
    forward, _ = dense(model, directory)
    tolerance = 1e-10 * float(first.abs().max())
    torch.testing.assert_close(first, forward(), rtol=0, atol=tolerance)
    plain = load(directory).double()
    for path, delta in change.items():
        plain.get_submodule(path).weight.data += delta
    torch.testing.assert_close(other, logits(plain), rtol=0, atol=tolerance)
    for path, layer in layers(model).items():
        plain.get_submodule(path).weight.data += layer.get_delta_weight("default")
    torch.testing.assert_close(both, logits(plain), rtol=0, atol=tolerance)

    # one batch for several adapters
    mixed = logits(model, adapter_names=["other", "__base__"])
    torch.testing.assert_close(mixed[0], other[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(mixed[1], logits(load(directory).double())[1], rtol=0, atol=tolerance)

    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    torch.testing.assert_close(logits(model), other, rtol=0, atol=tolerance)
    assert not any("default" in name for name in model.state_dict())
    out = trained("virtual")
    model.load_adapter(str(out / "adapter"), "loaded")
    model.set_adapter("loaded")
    reference = PeftModel.from_pretrained(load(directory).double(), str(out / "adapter"))
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=tolerance)


def test_inttune_trains_lora_n_alone(base: Base, trained: Callable[..., Path]) -> None:
    def trained_parts(model: nn.Module) -> set[str]:
        return {name.split(".")[-3] for name, each in model.named_parameters() if each.requires_grad}

    model = wrapped(base(), train="inttune")
    assert trained_parts(model) == {"lora_N"}
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * len(layers(model))
    model.set_adapter("default")
    with model.disable_adapter():
        assert trained_parts(model) == set()
    assert trained_parts(model) == {"lora_N"}

    out = trained("virtual")
    config = PeftConfig.from_pretrained(str(out / "adapter"))
    config.train = "inttune"
    loaded = PeftModel.from_pretrained(load(base()), str(out / "adapter"), config=config, is_trainable=True)
    assert trained_parts(loaded) == {"lora_N"}
    assert not any(layer.only_core_moves["default"] for layer in layers(loaded).values())  # its sides had moved


def test_inttune_goes_on_with_one_pass_through_the_sides(base: Base, tmp_path: Path) -> None:
    """Oracle: the same tensors without the shortcut."""
    model = wrapped(base(), train="inttune")
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(base()), str(tmp_path), is_trainable=True)
    for each in (model, loaded):
        assert all(layer.only_core_moves["default"] for layer in layers(each).values())
    assert torch.equal(logits(model), logits(loaded))
    shortcut = logits(loaded.double())
    for layer in layers(loaded).values():
        layer.only_core_moves["default"] = False
    torch.testing.assert_close(shortcut, logits(loaded), rtol=0, atol=1e-10 * float(shortcut.abs().max()))


@pytest.mark.parametrize(
    ("kind", "residual", "rank"), [("llama", "virtual", 8), ("gpt2", "virtual", 8), ("llama", "none", 4)]
)
def test_it_is_a_lora_of_rank_r_or_2r(base: Base, kind: str, residual: str, rank: int) -> None:
    """Oracle: the SLORA model's own logits, from stock LoRA with the converted factors on the same base."""
    model = wrapped(base(kind), residual=residual, init_weights="sketch")
    move(model)
    assert model.supports_lora_conversion()
    config, tensors = convert_to_lora(model, rank)
    plain = get_peft_model(load(base(kind)), config)
    set_peft_model_state_dict(plain, tensors)
    # The SVD in fp32 leaves about 2^-24 times the largest singular value, 1e-6 of the weight's change, in each of
    # some fifteen layers; a rank too small would leave 1e-2.
    expected = logits(model)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_stock_trainer_trains_it(base: Base, tmp_path: Path) -> None:
    """Three steps with gradient checkpointing: the loss falls, what is frozen stays, the checkpoint resumes."""
    model = wrapped(base("llama", torch.bfloat16), r=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(6, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, gradient_checkpointing=True, seed=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    for name, tensor in model.state_dict().items():
        is_trained = ".default." in name and "_initial" not in name
        assert torch.equal(tensor, before[name]) != is_trained, name

    again = wrapped(base("llama", torch.bfloat16), r=8)
    resumed = Trainer(model=again, args=arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = again.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_weights": "lora"}, "init_weights='lora' is unknown; there are nystrom,"),
        ({"init_weights": "olora"}, "unknown"),
        ({"init_lora_weights": "pissa"}, "SLORA does nothing with init_lora_weights='pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"use_dora": True}, "SLORA does nothing with use_dora=True; leave it out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"residual": "baked"}, "run nlora_surgery init"),
        ({"residual": "half"}, "residual half is unknown"),
        ({"residual": None}, "residual=None is for starts at zero"),
        ({"train": "lora"}, "train='lora' is unknown; there are nlora, slora, inttune"),
        ({"init_weights": "sketch", "sampling": "norm"}, "sampling is for the Nyström methods"),
        ({"init_weights": "slora", "scale_split": "core"}, "scale_split has no meaning"),
        ({"r": 0}, "must be at least 1"),
        ({"lora_alpha": 0}, "alpha must be positive"),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLoraConfig(**config)


def test_defaults() -> None:
    config = SLoraConfig(r=16)
    assert (config.lora_alpha, config.init_weights, config.residual, config.train) == (
        16,
        "nystrom",
        "virtual",
        "nlora",
    )
    assert SLoraConfig(init_weights="slora").residual is None
    assert json.loads(json.dumps(config.to_dict(), default=list))["peft_type"] == "SLORA"
    peft_plugin._register()  # once more is not too often


def test_models_that_cannot_be(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens is a torch.*Embedding, .*SLORA adapts nn.Linear and Conv1D"):
        wrapped(base(), target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"rank_pattern gives .*k_proj r = 20, and its weight allows 16"):
        wrapped(base(), rank_pattern={"k_proj": 20})
    stock = get_peft_model(load(base()), LoraConfig(r=4, target_modules=["q_proj"]))
    with (
        pytest.raises(ValueError, match=r"is a peft.tuners.lora.layer.Linear"),
        pytest.warns(UserWarning, match="second"),
    ):
        get_peft_model(stock.base_model.model, SLoraConfig(target_modules=["q_proj"]))
    broken = load(base())
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj.weight"):
        get_peft_model(broken, SLoraConfig(target_modules=["up_proj"]))

    model = wrapped(base())
    with pytest.raises(ValueError, match="would drop lora_N"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="SLORA layers hold no others"), pytest.warns(UserWarning, match="second"):
        get_peft_model(model.base_model.model, LoraConfig(r=4, target_modules=["q_proj"]))
    model = wrapped(base())
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="nlora_surgery convert ADAPTER --to lora --initial"):
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert Adapter.open(tmp_path / "start").config.extra["init_weights"] == "nystrom"
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        model.add_adapter("late", SLoraConfig(target_modules=["q_proj"]))


def test_without_the_plugin_and_without_peft(base: Base, trained: Callable[..., Path]) -> None:
    """Stock PEFT refuses the adapter, and the plugin says what it lacks."""
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "try: PeftModel.from_pretrained(model, sys.argv[2])\n"
        "except KeyError as error: print(error)\n"
        "sys.modules['peft'] = None\n"
        "from nlora_surgery.errors import MissingExtraError\n"
        "try: import nlora_surgery.peft_plugin\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(base()), str(trained("virtual") / "adapter")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "'SLORA'"
    assert "needs PEFT 0.21" in second
    assert 'pip install --upgrade "nlora-surgery[peft]"' in second
