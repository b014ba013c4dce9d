"""The adapter layer. Oracles: the dense formula in fp64, autograd through it, transformers' own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nlora_surgery.adapter import Adapter
from nlora_surgery.errors import AdapterError, OptionError
from nlora_surgery.factor import Factors
from nlora_surgery.training.layers import (
    AdapterLinear,
    adapter_layers,
    adapter_tensors,
    attach,
    detach,
    first_step,
    freeze,
    load_tensors,
    merge,
)

EPS32 = torch.finfo(torch.float32).eps


def random_factors(out: int, inner: int, r: int, *, core: bool = True, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Factors(draw(r, inner), draw(out, r), draw(r, r) if core else None)


def linear(kind: str, inner: int, out: int) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Linear(inner, out) if kind == "linear" else Conv1D(out, inner)
    return layer.double()


def dense(layer: AdapterLinear) -> Tensor:
    """The whole weight (out, in) of the layer, from its parts, by the textbook formula."""
    weight = layer.base_layer.weight
    weight = weight.T if isinstance(layer.base_layer, Conv1D) else weight

    def product(parts: list[Tensor]) -> Tensor:
        whole = parts[-1]
        for part in reversed(parts[:-1]):
            whole = whole @ part
        return layer.scaling * whole

    return weight + product(layer.matrices) - (product(layer.initial) if layer.initial else 0)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    inner=st.integers(1, 9),
    out=st.integers(1, 9),
    r=st.integers(1, 4),
    core=st.booleans(),
    virtual=st.booleans(),
    mode=st.sampled_from(["nlora", "inttune"]),
    scaling=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_output_and_gradients_are_those_of_the_dense_formula(
    kind: str, inner: int, out: int, r: int, core: bool, virtual: bool, mode: str, scaling: float
) -> None:
    start = random_factors(out, inner, r, core=core, seed=3)
    # IntTune's shortcut needs sides that did not move; the others get a start of their own.
    moved = Factors(start.lora_A, start.lora_B, 2 * start.lora_N) if core and mode == "inttune" else None
    factors = moved or random_factors(out, inner, r, core=core, seed=4)
    layer = AdapterLinear(
        linear(kind, inner, out), factors, scaling, initial=start if virtual else None, dtype=torch.float64
    )
    layer.train_only(mode if core else "lora")
    x = torch.randn(5, inner, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), [x, *trained])

    expected = x @ dense(layer).T + layer.base_layer.bias
    wanted = torch.autograd.grad(expected.square().sum(), [x, *trained])
    # fp64: a handful of sums of at most 9 terms, each gradient a product of four of them.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.fixture(scope="module")
def virtual_start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("virtual") / "out", "--residual", "virtual")


def prepared(model: Path, out: Path, *arguments: str) -> Path:
    from nlora_surgery.options import FactorOptions
    from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare

    residual = arguments[1] if arguments else "baked"
    prepare(plan_init(model, out, InitOptions(rank=8, factor=FactorOptions("nystrom"), residual=residual)))
    return out


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(40).reshape(2, 20) % 50
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["nlora", "inttune"])
def test_a_virtual_start_is_the_base_to_the_bit(
    tiny_llama: Path, virtual_start: Path, dtype: torch.dtype, mode: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    expected = logits(model)
    attach(model, Adapter.open(virtual_start / "adapter"))
    freeze(model, mode)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        next(adapter_layers(model))[1].lora_N.weight.mul_(1.5)
    assert not torch.equal(logits(model), expected), "the adapter does nothing"


def test_merged_equals_unmerged_and_detached_equals_the_base(tiny_llama: Path, virtual_start: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base = logits(model)
    layers = attach(model, Adapter.open(virtual_start / "adapter"))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.weight.add_(0.2 * torch.randn_like(layer.lora_B.weight))
    unmerged = logits(model)
    merge(model)
    assert not any(True for _ in adapter_layers(model))
    merged = logits(model)
    # Both round fp32 sums of up to 512 terms through 4 layers; the change itself is hundreds of times larger.
    tolerance = 512 * EPS32 * float(base.abs().max())
    assert float((merged - unmerged).abs().max()) <= tolerance
    assert float((merged - base).abs().max()) > 100 * tolerance

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    attach(model, Adapter.open(virtual_start / "adapter"))
    detach(model)
    assert torch.equal(logits(model), base)


def test_a_baked_start_is_the_base_to_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    """The residual was rounded to bf16 once; the same weights rounded to bf16 once more are the yardstick."""
    out = prepared(tiny_llama, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    layers = attach(model, Adapter.open(out / "adapter"))
    difference = float((logits(model) - logits(base)).square().mean().sqrt())
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers:  # half a bf16 ulp is at most 2^-8 of the number
            weight = layer.base_layer.weight
            weight.mul_(1 + (2 * torch.rand_like(weight) - 1) * 2**-8)
    yardstick = float((logits(model) - logits(base)).square().mean().sqrt())
    assert 0 < difference < 3 * yardstick


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("mode", ["nlora", "inttune", "lora"])
@pytest.mark.parametrize("virtual", [False, True])
def test_the_first_step_is_the_norm_of_the_products_jacobian(kind: str, mode: str, virtual: bool) -> None:
    """Oracle: signs s, independent and fair, move the product by J s, of the expected square ‖J‖²; J is autograd's."""
    factors = random_factors(7, 5, 3, core=mode != "lora")
    layer = AdapterLinear(linear(kind, 5, 7), factors, 0.7, initial=factors if virtual else None, dtype=torch.float64)
    model = nn.Sequential(layer)
    freeze(model, mode)
    trained = [matrix for matrix in layer.matrices if matrix.requires_grad]
    assert len(trained) == {"nlora": 3, "inttune": 1, "lora": 2}[mode]

    def product(*changed: Tensor) -> Tensor:
        replaced = dict(zip(map(id, trained), changed, strict=True))
        matrices = [replaced.get(id(matrix), matrix) for matrix in layer.matrices]
        return layer.scaling * torch.linalg.multi_dot(matrices[::-1])

    jacobian = torch.autograd.functional.jacobian(product, tuple(trained))
    expected = torch.cat([part.flatten() for part in jacobian]).norm() / dense(layer).detach().norm()
    # Norms of at most 49 numbers, in fp32.
    assert first_step(model) == pytest.approx(float(expected), rel=49 * EPS32)


def test_the_first_step_needs_an_adapter() -> None:
    with pytest.raises(AdapterError, match="no adapter"):
        first_step(nn.Sequential(nn.Linear(2, 2)))


def meta_llama_7b(r: int, *, core: bool) -> nn.Module:
    """The seven projections of LLaMA-2-7B's 32 layers, without memory, adapted."""
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]

    def layer(inner: int, out: int) -> AdapterLinear:
        base = nn.Linear(inner, out, bias=False, device="meta")
        parts = [torch.empty(shape, device="meta") for shape in ((r, inner), (out, r), (r, r))]
        return AdapterLinear(base, Factors(parts[0], parts[1], parts[2] if core else None), 1.0)

    return nn.ModuleList([layer(*shape) for _ in range(32) for shape in shapes])


def test_trainable_parameters_at_llama_2_7b() -> None:
    """The paper's numbers at r = 128: LoRA 320 M, SLoRA 3.67 M (1.15 %) more, IntTune those 3.67 M alone."""
    lora, _ = freeze(meta_llama_7b(128, core=False), "lora")
    slora, _ = freeze(meta_llama_7b(128, core=True), "slora")
    inttune, _ = freeze(meta_llama_7b(128, core=True), "inttune")
    assert lora == 319_815_680
    assert slora - lora == inttune == 7 * 32 * 128**2 == 3_670_016
    assert round(100 * inttune / lora, 2) == 1.15


@pytest.mark.parametrize("virtual", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Path, virtual_start: Path, virtual: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        layers = attach(model, Adapter.open(virtual_start / "adapter"))
        for layer in layers:
            if not virtual:
                layer.lora_A_initial = layer.lora_N_initial = layer.lora_B_initial = None
        freeze(model, "nlora")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = torch.arange(20)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_the_layer_compiles_without_a_graph_break() -> None:
    layer = AdapterLinear(nn.Linear(6, 5), random_factors(5, 6, 2), 0.5, initial=random_factors(5, 6, 2, seed=9))
    x = torch.randn(3, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_tensors_go_out_and_come_back(tiny_llama: Path, virtual_start: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapter = Adapter.open(virtual_start / "adapter")
    attach(model, adapter)
    tensors = adapter_tensors(model)
    assert set(tensors) == set(adapter.file.tensors)
    assert all(torch.equal(tensors[name], adapter.file.tensor(name)) for name in tensors)
    doubled = {name: 2 * value for name, value in tensors.items()}
    load_tensors(model, doubled)
    assert all(torch.equal(value, doubled[name]) for name, value in adapter_tensors(model).items())
    with pytest.raises(AdapterError, match="is missing"):
        load_tensors(model, {})


def test_dropout_drops_in_training_only() -> None:
    layer = AdapterLinear(nn.Linear(64, 5), random_factors(5, 64, 2), 1.0, dropout=0.5)
    x = torch.ones(1, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Identity()), "Identity cannot be adapted"),
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Linear(3, 4)), r"\(out, in\)"),
        (lambda model: delattr(model.model.layers[0].mlp, "up_proj"), "1 of 28 modules .* are not in the model"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    tiny_llama: Path, virtual_start: Path, change: Callable[[nn.Module], None], message: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    change(model)
    with pytest.raises(AdapterError, match=message):
        attach(model, Adapter.open(virtual_start / "adapter"))


def test_modes_that_do_not_fit_are_refused() -> None:
    two = nn.ModuleList([AdapterLinear(nn.Linear(4, 4), random_factors(4, 4, 2, core=False), 1.0)])
    three = nn.ModuleList([AdapterLinear(nn.Linear(4, 4), random_factors(4, 4, 2), 1.0)])
    with pytest.raises(OptionError, match="has no lora_N; use lora"):
        freeze(two, "inttune")
    with pytest.raises(OptionError, match="has a lora_N; use nlora"):
        freeze(three, "lora")
    with pytest.raises(OptionError, match="unknown"):
        freeze(three, "dora")
    with pytest.raises(AdapterError, match="no adapter"):
        freeze(nn.Linear(2, 2), "nlora")
