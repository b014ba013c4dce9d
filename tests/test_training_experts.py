"""Training beside experts that transformers fuses: `train`, `generate` and the PEFT plugin adapt modules alone.

Whatever names experts is refused in one sentence that says what to do, before anything is written; and what it says is
tried. Oracles: stock PEFT, autograd, `layers.attach`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from nlora_surgery.adapter import Adapter
from nlora_surgery.errors import AdapterError
from nlora_surgery.options import FactorOptions
from nlora_surgery.peft_plugin import SLoraConfig, SLoraLinear
from nlora_surgery.surgery.convert import ConvertOptions, convert, plan_convert
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.training.layers import attach
from tests.adapters import adapter_tensors

Surgery = Callable[..., Any]
Models = Callable[[str], Path]

SIZES = {
    "vocab_size": 448, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = ["mixtral, an expert a tensor", "mixtral, fused", "gpt_oss"]
FAST = ("--batch-size", 4, "--grad-accum", 1, "--device", "cpu", "--max-length", 64, "--max-steps", 2)
IDS = torch.arange(24).reshape(2, 12) * 7 % 96


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The directory of a random model with a tokenizer, written once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            config = {**SIZES, "initializer_range": 0.2}
            gpt = kind == "gpt_oss"
            model = GptOssForCausalLM(GptOssConfig(**config)) if gpt else MixtralForCausalLM(MixtralConfig(**config))
            made[kind] = tmp_path_factory.mktemp("experts") / "model"
            model.save_pretrained(made[kind], save_original_format=kind == KINDS[0])
            for file in tiny_llama.glob("tokenizer*"):
                shutil.copy(file, made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    row = {"prompt": "the red fox", "completion": "runs over a green hill"}
    path.write_text(8 * (json.dumps(row) + "\n"), encoding="utf-8")
    return path


def init(model: Path, out: Path, residual: str = "baked", exclude: tuple[str, ...] = (), **factor: Any) -> Path:
    options = InitOptions(4, FactorOptions(**{"method": "sketch", **factor}), residual, exclude=exclude)
    prepare(plan_init(model, out, options))
    return out


def load(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# --- train and generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["baked", "virtual", "two matrices"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_experts_are_refused(
    kind: str, way: str, surgery: Surgery, models: Models, data: Path, tmp_path: Path
) -> None:
    two: dict[str, Any] = {"method": "pissa", "two_matrix": True} if way == "two matrices" else {}
    out = init(models(kind), tmp_path / "out", "virtual" if way == "virtual" else "baked", **two)
    count = 24 if kind == KINDS[0] else 4
    for command in (
        ("train", out, "--data", data, "-o", tmp_path / "run", *FAST),
        ("train", out, "--data", data, "--eval-only", *FAST),
        ("generate", out, "--prompt", "the red fox", "--device", "cpu"),
    ):
        done = surgery(*command)
        assert done.code == 7, done.stderr
        text = " ".join(done.stderr.split())
        assert f"{count} of {count + 8} modules of {out / 'adapter'} are experts (model.layers.0." in text
        assert "leave them out with --exclude experts" in text
        assert "convert --to lora" in text
        assert "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_from_the_model_itself_leaves_experts_out_on_request(
    kind: str, surgery: Surgery, models: Models, data: Path, tmp_path: Path
) -> None:
    """Refused without --exclude, and nothing is left that would be in the way; then it trains, talks, and loads."""
    run = tmp_path / "run"
    arguments = ("train", models(kind), "--init", "nystrom", "--rank", 4, "--data", data, "-o", run, *FAST)
    done = surgery(*arguments)
    assert done.code == 7
    assert f"modules of {models(kind)} are experts (model.layers." in done.stderr
    assert "leave them out with --exclude experts" in done.stderr
    assert not run.exists()
    done = surgery(*arguments, "--exclude", "experts")
    assert done.code == 0, done.stderr
    start, trained = (adapter_tensors(path) for path in (run / "start" / "adapter", run))
    moved = [name for name, tensor in trained.items() if not torch.equal(tensor, start[name])]
    assert len(moved) == 2 * 4 * 3  # every factor of the attention, none of the frozen start
    assert surgery("generate", run, "--prompt", "the red", "--max-new-tokens", 2, "--device", "cpu").code == 0
    reference = load(models(kind))
    attach(reference, Adapter.open(run))
    in_peft = PeftModel.from_pretrained(load(models(kind)), str(run))
    assert torch.equal(logits(in_peft), logits(reference))
    assert not torch.equal(logits(in_peft), logits(load(models(kind))))


@pytest.mark.parametrize("kind", KINDS)
def test_as_two_matrices_experts_train_in_peft(kind: str, models: Models, tmp_path: Path) -> None:
    """What the messages advise: stock PEFT starts at the original's logits, and every expert's factors learn."""
    out = init(models(kind), tmp_path / "out")
    convert(plan_convert(out / "adapter", tmp_path / "lora", ConvertOptions(to="lora")))
    model = PeftModel.from_pretrained(load(out), str(tmp_path / "lora"), is_trainable=True)
    # The residual, in fp32, is rounded once: 2^-24 of weights of about 0.2, through two layers of sums of 32.
    assert (logits(model) - logits(load(models(kind)))).abs().max() <= 1e-4
    model(input_ids=IDS, labels=IDS).loss.backward()
    factors = {n: p for n, p in model.named_parameters() if ".experts." in n and ".lora_" in n}
    assert len(factors) == 2 * 2 * 2
    for name, parameter in factors.items():
        assert parameter.grad is not None
        experts = parameter.grad.unflatten(0, (4, -1)) if "lora_A" in name else parameter.grad.T.unflatten(0, (-1, 4))
        per_expert = experts.flatten(1) if "lora_A" in name else experts.transpose(0, 1).flatten(1)
        assert (per_expert.abs().amax(1) > 0).all(), name


# --- the plugin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["baked", "virtual"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_refuses_adapters_of_experts(kind: str, residual: str, models: Models, tmp_path: Path) -> None:
    out = init(models(kind), tmp_path / "out", residual)
    base = load(out if residual == "baked" else models(kind))
    with pytest.raises((AdapterError, ValueError), match="experts") as refused:
        PeftModel.from_pretrained(base, str(out / "adapter"))
    text = str(refused.value)
    assert "init --exclude experts" in text
    assert "nlora_surgery convert ADAPTER --to lora" in text
    if kind == KINDS[0]:
        assert "tensors of adapter 'default' are those of experts" in text
    else:
        assert "target_parameters names experts.down_proj, experts.gate_up_proj" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_adapts_what_lies_beside_experts(kind: str, models: Models, tmp_path: Path) -> None:
    """An adapter of init without the experts, against `layers.attach`, to the bit."""
    out = init(models(kind), tmp_path / "out", exclude=("experts",))
    reference = load(out)
    attach(reference, Adapter.open(out / "adapter"))
    model = PeftModel.from_pretrained(load(out), str(out / "adapter"))
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "gate_up_proj"], ["q_proj", "w1"], ["q_proj", "mlp.experts.down_proj"], ["o_proj", "experts.3.w2"]],
)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_names_of_experts_are_not_passed_over(kind: str, targets: list[str], models: Models) -> None:
    """PEFT itself adapts what it finds and says nothing of the rest."""
    with pytest.raises(
        ValueError, match=rf"target_modules names {targets[1]}, and the model has no such module.*experts"
    ):
        get_peft_model(load(models(kind)), SLoraConfig(r=4, target_modules=targets))
    with pytest.raises(ValueError, match=r"target_parameters names experts\.gate_up_proj.*LoraConfig"):
        SLoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(load(models(kind)), SLoraConfig(r=4, target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, SLoraLinear)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_names_that_other_models_have_pass_as_they_do_in_peft(tiny_llama: Path) -> None:
    """One list of names for many models is usual: without fused experts it is PEFT's own business."""
    for config in (SLoraConfig(r=4, target_modules=["q_proj", "w1"]), LoraConfig(r=4, target_modules=["q_proj", "w1"])):
        model = get_peft_model(load(tiny_llama), config)
        assert len([name for name, _ in model.named_modules() if name.endswith("q_proj")]) == 4
