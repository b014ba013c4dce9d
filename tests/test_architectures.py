"""Every architecture as it lies on disk: one line of the table each, tiny random models that transformers makes.

Oracles: the linear layers of the model's class for the targets; transformers' own loading and the bound of `verify` for
init; stock PEFT, computing in fp64, for merge; the original's outputs for adapters that stock PEFT loads.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.errors import AdapterError, TargetError, UnsupportedCheckpointError
from nlora_surgery.options import FactorOptions
from nlora_surgery.surgery.convert import ConvertOptions, convert, plan_convert
from nlora_surgery.surgery.extract import ExtractOptions, extract, plan_extract
from nlora_surgery.surgery.inspect import inspect
from nlora_surgery.surgery.merge import merge, plan_merge
from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare
from nlora_surgery.surgery.verify import _calls, verify, verify_logits
from nlora_surgery.targets import choose_targets, module_kind
from tests.adapters import checkpoint_tensors, edit_config, random_factors, write_adapter
from tests.checkpoints import write_checkpoint, write_llama
from tests.test_merge import assert_rounded

RANK = 4
MISSING = 0  # families of the table whose class this transformers lacks


@dataclass(frozen=True)
class Family:
    """A line of the table.

    Attributes:
        config, sizes: of the tiny model.
        model: its class.
        kinds: the module kinds that init adapts, braces expanded.
        fused: written under the names of the model's class, as a checkpoint that was never converted would be:
            experts fused, new prefixes.
        not_by_peft: what init has to leave out (`--exclude`) for an adapter that stock PEFT loads.
        targets: convolutions that are asked for (`--targets`), in place of the default.
        older: a prefix of names that is another on disk, as earlier versions of transformers wrote it.
        read_past: transformers asks the layer for what PEFT's around it lacks, so that it runs only once merged.
    """

    config: str
    sizes: Mapping[str, Any]
    model: str
    kinds: str
    fused: bool = False
    not_by_peft: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    older: tuple[str, str] | None = None
    read_past: bool = False

    @property
    def expected_kinds(self) -> set[str]:
        return {kind for word in self.kinds.split() for kind in _braces(word)}

    @cached_property
    def classes(self) -> tuple[Any, Any] | None:
        found = getattr(transformers, self.config, None), getattr(transformers, self.model, None)
        return None if None in found else found


def _braces(word: str) -> Iterator[str]:
    parts = [part.split(",") for part in re.split(r"[{}]", word)]
    yield from map("".join, product(*parts))


LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {**LLAMA, "head_dim": 8}
BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
DEBERTA = {
    **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_buckets": 8, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
WHISPER = {
    "vocab_size": 96, "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 2,
    "d_model": 32,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "max_source_positions": 16,
    "pad_token_id": 0,
    "max_target_positions": 32, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 1], "num_labels": 5}
LLAVA = {
    "text_config": {**LLAMA, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"},
    "image_token_index": 90,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VL = {
    "text_config": {**LLAMA, "rope_parameters": ROPE},
    "vision_config": {
        "depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2, "in_channels": 3,
    },
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
}  # fmt: skip
QWEN_MOE = {**HEADS, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip

ATTENTION, MLP = "self_attn.{q,k,v,o}_proj", "mlp.{gate,up,down}_proj"
DECODER = f"{ATTENTION} {MLP}"
ENCODER = "attention.self.{query,key,value} attention.output.dense intermediate.dense output.dense"
FAIRSEQ = "self_attn.{q,k,v,out}_proj fc{1,2}"
CLIP = "self_attn.{q,k,v,out}_proj mlp.fc{1,2}"
VIT = "attention.attention.{query,key,value} attention.output.dense intermediate.dense output.dense"
EXPERTS = "mlp.experts.{gate_up,down}_proj"
NEOX = "attention.{query_key_value,dense} mlp.dense_{h_to_4h,4h_to_h}"
# Names that PEFT 0.21 takes for those of experts that transformers fuses, wherever they stand: in shared experts they
# cannot be adapted besides. For Qwen2-MoE it renames the keys of experts, but not the targets in the configuration.
TAKEN = ("gate_proj", "up_proj", "down_proj")
NOT_ADAPTED = r"(router|gate|mixer\.(x|dt|out)_proj)$"  # routers, and what Mamba reads past the module

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", LLAMA, "LlamaForCausalLM", DECODER),
    "llama, classifier": Family("LlamaConfig", LLAMA, "LlamaForSequenceClassification", DECODER),
    "mistral": Family("MistralConfig", LLAMA, "MistralForCausalLM", DECODER),
    "qwen2": Family("Qwen2Config", LLAMA, "Qwen2ForCausalLM", DECODER),
    "qwen3": Family("Qwen3Config", HEADS, "Qwen3ForCausalLM", DECODER),
    "gemma2": Family("Gemma2Config", HEADS, "Gemma2ForCausalLM", DECODER),
    "gemma3": Family("Gemma3TextConfig", HEADS, "Gemma3ForCausalLM", DECODER),
    "phi3": Family("Phi3Config", LLAMA, "Phi3ForCausalLM", "self_attn.{qkv,o}_proj mlp.{gate_up,down}_proj"),
    "gpt_neox": Family("GPTNeoXConfig", BERT, "GPTNeoXForCausalLM", NEOX),
    "gpt2": Family(
        "GPT2Config", {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel",
        "attn.c_{attn,proj} mlp.c_{fc,proj}",
    ),
    "opt": Family(
        "OPTConfig",
        {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "word_embed_proj_dim": 24},
        "OPTForCausalLM", FAIRSEQ,
    ),
    "falcon": Family(
        "FalconConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "FalconForCausalLM", "self_attention.{query_key_value,dense} mlp.dense_{h_to_4h,4h_to_h}",
    ),
    "olmo": Family("OlmoConfig", LLAMA, "OlmoForCausalLM", DECODER),
    "olmo2": Family("Olmo2Config", LLAMA, "Olmo2ForCausalLM", DECODER),
    "bert": Family("BertConfig", BERT, "BertForMaskedLM", ENCODER),
    "bert, classifier": Family("BertConfig", BERT, "BertForSequenceClassification", ENCODER),
    "bert, answers": Family("BertConfig", BERT, "BertForQuestionAnswering", ENCODER),
    "roberta": Family("RobertaConfig", BERT, "RobertaForSequenceClassification", ENCODER),
    "deberta-v3": Family(
        "DebertaV2Config", DEBERTA, "DebertaV2ForSequenceClassification",
        "attention.self.{query,key,value}_proj attention.output.dense intermediate.dense output.dense",
    ),
    "t5, gated": Family(
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
             "decoder_start_token_id": 0},
        "T5ForConditionalGeneration", "{SelfAttention,EncDecAttention}.{q,k,v,o} DenseReluDense.{wi_0,wi_1,wo}",
    ),
    "whisper": Family(
        "WhisperConfig", WHISPER, "WhisperForConditionalGeneration", f"{FAIRSEQ} encoder_attn.{{q,k,v,out}}_proj"
    ),
    "vit": Family("ViTConfig", VISION, "ViTForImageClassification", VIT),
    "vit, new names": Family(
        "ViTConfig", VISION, "ViTForImageClassification", "attention.{q,k,v,o}_proj mlp.fc{1,2}", fused=True
    ),
    "deit": Family("DeiTConfig", VISION, "DeiTForImageClassification", VIT),
    "clip": Family("CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 24}, "CLIPModel",
    CLIP),
    "llava": Family("LlavaConfig", LLAVA, "LlavaForConditionalGeneration", f"{DECODER} {CLIP}"),
    "llava, new names": Family(
        "LlavaConfig", LLAVA, "LlavaForConditionalGeneration", f"{DECODER} {CLIP}", fused=True
    ),
    "llava, older names": Family(
        "LlavaConfig", LLAVA, "LlavaForConditionalGeneration", f"{DECODER} {CLIP}",
        older=("vision_tower.", "vision_tower.vision_model."),
    ),
    "clip, images": Family(
        "CLIPVisionConfig", VISION, "CLIPVisionModel", CLIP, older=("", "vision_model."),
    ),
    "siglip, images": Family(
        "SiglipVisionConfig", VISION, "SiglipVisionModel", CLIP, older=("", "vision_model."),
    ),
    "clip, text": Family("CLIPTextConfig", BERT, "CLIPTextModel", CLIP, older=("", "text_model.")),
    "gemma3, images": Family(
        "Gemma3Config",
        {"text_config": HEADS, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 90},
        "Gemma3ForConditionalGeneration", f"{DECODER} {CLIP}",
    ),
    "qwen2_vl": Family(
        "Qwen2VLConfig", QWEN_VL, "Qwen2VLForConditionalGeneration", f"{DECODER} attn.{{qkv,proj}} mlp.fc{{1,2}}"
    ),
    "qwen2_vl, new names": Family(
        "Qwen2VLConfig", QWEN_VL, "Qwen2VLForConditionalGeneration", f"{DECODER} attn.{{qkv,proj}} mlp.fc{{1,2}}",
        fused=True,
    ),
    "mamba": Family(
        "MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "MambaForCausalLM",
        "mixer.in_proj",
    ),
    "mamba2": Family(
        "Mamba2Config",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8,
        "n_groups": 1},
        "Mamba2ForCausalLM", "mixer.in_proj",
    ),
    "mixtral": Family(
        "MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM", f"{ATTENTION} w{{1,2,3}}"
    ),
    "mixtral, fused": Family(
        "MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM", f"{ATTENTION} {EXPERTS}", fused=True
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", QWEN_MOE, "Qwen3MoeForCausalLM", f"{ATTENTION} {{gate,up,down}}_proj"),
    "qwen3_moe, fused": Family(
        "Qwen3MoeConfig", QWEN_MOE, "Qwen3MoeForCausalLM", f"{ATTENTION} {EXPERTS}", fused=True
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", {**QWEN_MOE, "shared_expert_intermediate_size": 24}, "Qwen2MoeForCausalLM",
        f"{ATTENTION} {{gate,up,down}}_proj mlp.shared_expert.{{gate,up,down}}_proj", not_by_peft=("experts",),
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config", DEEPSEEK, "DeepseekV3ForCausalLM",
        f"self_attn.{{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}} {MLP} {{gate,up,down}}_proj "
        "mlp.shared_experts.{gate,up,down}_proj", not_by_peft=("shared_experts", r".*layers\.0\.mlp\..*"),
    ),
    "gpt_oss": Family(
        "GptOssConfig", {**HEADS, "num_local_experts": 4}, "GptOssForCausalLM", f"{ATTENTION} {EXPERTS}"
    ),
    "gpt_oss, square": Family(
        "GptOssConfig", {**HEADS, "num_local_experts": 4, "intermediate_size": 32}, "GptOssForCausalLM",
        f"{ATTENTION} {EXPERTS}",
    ),
    "llama4": Family(
        "Llama4TextConfig", {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 24}, "Llama4ForCausalLM",
        f"{ATTENTION} feed_forward.experts.{{gate_up,down}}_proj feed_forward.shared_expert.{{gate,up,down}}_proj",
    ),
    "vit, patches": Family(
        "ViTConfig", VISION, "ViTForImageClassification", "vit.embeddings.patch_embeddings.projection",
        targets=("projection",),
    ),
    "clip, patches": Family(
        "CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 24}, "CLIPModel",
        "vision_model.embeddings.patch_embedding", targets=("patch_embedding",),
    ),
    "llava, patches": Family(
        "LlavaConfig", LLAVA, "LlavaForConditionalGeneration", "vision_tower.embeddings.patch_embedding",
        targets=("patch_embedding",),
    ),
    "siglip, patches": Family(
        "SiglipVisionConfig", VISION, "SiglipVisionModel", "vision_model.embeddings.patch_embedding",
        targets=("patch_embedding",), older=("", "vision_model."),
    ),
    "llava, patches, older names": Family(
        "LlavaConfig", LLAVA, "LlavaForConditionalGeneration", "vision_tower.vision_model.embeddings.patch_embedding",
        targets=("patch_embedding",), older=("vision_tower.", "vision_tower.vision_model."),
    ),
    "clip, patches of images": Family(
        "CLIPVisionConfig", VISION, "CLIPVisionModel", "vision_model.embeddings.patch_embedding",
        targets=("patch_embedding",), older=("", "vision_model."),
    ),
    "qwen2_vl, patches": Family(
        "Qwen2VLConfig", QWEN_VL, "Qwen2VLForConditionalGeneration", "visual.patch_embed.proj",
        targets=("patch_embed.proj",),
    ),
    "qwen2_vl, patches, new names": Family(
        "Qwen2VLConfig", QWEN_VL, "Qwen2VLForConditionalGeneration", "model.visual.patch_embed.proj", fused=True,
        targets=("patch_embed.proj",),
    ),
    "whisper, convolutions": Family(
        "WhisperConfig", WHISPER, "WhisperForConditionalGeneration", "model.encoder.conv{1,2}",
        targets=("conv1", "conv2"), read_past=True,
    ),
    "resnet, pointwise": Family(
        "ResNetConfig", RESNET, "ResNetForImageClassification", "shortcut.convolution convolution",
        targets=("shortcut.convolution", "layer.0.convolution", "layer.2.convolution"),
    ),
    "resnet, wide": Family(
        "ResNetConfig", RESNET, "ResNetForImageClassification", "resnet.embedder.embedder.convolution convolution",
        targets=("embedder.convolution", "layer.1.convolution"),
    ),
}  # fmt: skip


def test_every_class_is_there() -> None:
    """Lines of the table that are skipped are counted."""
    assert sum(family.classes is None for family in FAMILIES.values()) == MISSING


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a family's model in a dtype, written once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype) -> Path:
        if FAMILIES[name].classes is None:
            pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].model}")
        if (name, dtype) not in made:
            made[name, dtype] = _write(FAMILIES[name], tmp_path_factory.mktemp("model") / "model", dtype)
        return made[name, dtype]

    return get


def _write(family: Family, directory: Path, dtype: torch.dtype) -> Path:
    """A random model, no parameter of it zero, in small shards with every fifth tensor moved into the next one."""
    assert family.classes is not None
    config, model_class = family.classes
    torch.manual_seed(0)
    model = model_class(config(**family.sizes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape))
    model.save_pretrained(directory, max_shard_size=40_000)
    tensors = checkpoint_tensors(directory)
    if family.fused:
        own = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        stored = {tensor.data_ptr() for tensor in own.values()}
        assert not own.keys() <= tensors.keys(), "the class has no names of its own"
        tensors = {n: t for n, t in own.items() if t.data_ptr() in stored and not stored.discard(t.data_ptr())}  # type: ignore[func-returns-value]
    if family.older is not None:
        new, old = family.older
        assert any(name.startswith(new) for name in tensors)
        tensors = {old + name.removeprefix(new) if name.startswith(new) else name: t for name, t in tensors.items()}
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    count = max(2, sum(tensor.nbytes for tensor in tensors.values()) // 40_000)
    shards: list[list[str]] = [[] for _ in range(count)]
    for number, name in enumerate(tensors):
        shard = number * count // len(tensors)
        shards[(shard + (number % 5 == 0)) % count].append(name)
    return write_checkpoint(directory, tensors, shards=shards)


def _load(directory: Path, family: Family, dtype: torch.dtype = torch.float32) -> Any:
    assert family.classes is not None
    model, found = family.classes[1].from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def _outputs(model: Any) -> Tensor:
    """Everything that a model says to inputs that suit it, in one row."""
    torch.manual_seed(0)
    tokens = [torch.randint(3, 90, (1, 12)), torch.randint(3, 90, (1, 7))]
    with torch.inference_mode():
        values = [value for call in _calls(model, tokens) for value in call().values()]
    return torch.cat([value.reshape(-1) for value in values if torch.is_tensor(value) and value.is_floating_point()])


def _init(
    model: Path, out: Path, exclude: tuple[str, ...] = (), targets: tuple[str, ...] = (), **options: Any
) -> dict[str, Any]:
    asked = InitOptions(RANK, FactorOptions(**options), alpha=2.0 * RANK, targets=targets, exclude=exclude)
    return prepare(plan_init(model, out, asked))


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets(name: str, models: Callable[..., Path]) -> None:
    """The table, and the class's own layers as the oracle of count and orientation: linears inside numbered blocks."""
    family = FAMILIES[name]
    directory = models(name, torch.bfloat16)
    with Checkpoint.open(directory) as checkpoint:
        assert len(checkpoint.files) > 1
        targets = choose_targets(checkpoint, RANK, family.targets)
    assert {module_kind(target.tensor.removesuffix(".weight")) for target in targets} == family.expected_kinds
    actual: Counter[tuple[int, int]] = Counter()
    for target in targets:
        actual[target.out_features, target.in_features] += target.experts or 1
    model = _load(directory, family)
    if family.targets:
        convolutions = _convolutions(model, family)
        assert {(target.module, target.kernel) for target in targets} == {
            (path, layer.kernel_size) for path, layer in convolutions.items()
        }
        assert actual == Counter((len(layer.weight), layer.weight[0].numel()) for layer in convolutions.values())
    else:
        assert actual == _shapes_of_the_class(model, fused=any(target.experts for target in targets))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("patterns", [(), ("all-linear",)])
def test_no_convolution_unless_it_is_named(name: str, patterns: tuple[str, ...], models: Callable[..., Path]) -> None:
    """Though most of these models have some, and the class of each says which."""
    directory = models(name, torch.bfloat16)
    convolutions = {path for path, layer in _load(directory, FAMILIES[name]).named_modules() if _is_convolution(layer)}
    assert convolutions or not FAMILIES[name].targets
    with Checkpoint.open(directory) as checkpoint:
        if name.startswith("resnet"):
            with pytest.raises(TargetError, match=r"no linear weight.*; there are: .*shortcut\.convolution"):
                choose_targets(checkpoint, RANK, patterns)
            return
        targets = choose_targets(checkpoint, RANK, patterns)
    assert not {target.module for target in targets} & convolutions
    assert not any(target.kernel for target in targets)


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _convolutions(model: nn.Module, family: Family) -> dict[str, Any]:
    """Those of the class whose paths end as is asked for."""
    return {
        path: layer for path, layer in model.named_modules()
        if _is_convolution(layer) and path.endswith(tuple(f".{target}" for target in family.targets))
    }  # fmt: skip


def _shapes_of_the_class(model: nn.Module, *, fused: bool) -> Counter[tuple[int, int]]:
    """(out, in) of every linear layer, and every expert, inside numbered blocks; routers aside."""
    shapes: Counter[tuple[int, int]] = Counter()
    for path, module in model.named_modules():
        numbered = re.search(r"\.\d+\.", path) is not None
        if isinstance(module, nn.Linear) and numbered and not re.search(NOT_ADAPTED, path):
            shapes[module.out_features, module.in_features] += 1
        elif isinstance(module, Conv1D) and numbered:
            shapes[module.nf, module.nx] += 1
        elif path.endswith(".experts"):
            in_out = getattr(module, "is_transposed", False)  # PEFT's own way to tell
            for part, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                experts, *shape = getattr(module, part).shape
                out_features, in_features = reversed(shape) if in_out else shape
                split = 1 if fused else parts
                shapes[out_features // split, in_features] += experts * split
    return shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_init_verify_logits(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """The bound of every element, then outputs of both models by transformers; and both tell a wrong scaling."""
    model, out = models(name, torch.bfloat16), tmp_path / "out"
    manifest = _init(model, out, targets=FAMILIES[name].targets, method="nystrom-optimal")
    report = verify(out, model)
    assert report.failures == []
    assert len(report.modules) == len(manifest["modules"])
    assert max(module["worst_share"] for module in report.modules) > 0.5  # the half ulp is used up somewhere
    logits = verify_logits(out, model)
    assert logits.passed, logits
    assert logits.worst_ratio > 0
    assert logits.noise_rms > 0 or logits.worst_output.startswith("image ")  # no text passes a convolution
    edit_config(out / "adapter", lora_alpha=2.2 * RANK)
    assert not verify_logits(out, model).passed
    assert verify(out, model).failures


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_is_pefts(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter that stock PEFT makes of the class's layers; its merge in fp64, saved again, is the truth."""
    family = FAMILIES[name]
    base = models(name, torch.float32)
    model = _load(base, family)
    parameters = [f"experts.{part}" for part in ("gate_up_proj", "down_proj")]
    experts = any(path.endswith(".experts") for path, _ in model.named_modules())
    linears = [
        path for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", path) and "mixer.out_proj" not in path
    ]  # fmt: skip
    if family.targets:
        linears = list(_convolutions(model, family))
    if family.not_by_peft:
        linears = [path for path in linears if not path.endswith(TAKEN)]
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=linears, target_parameters=parameters if experts else None,
        fan_in_fan_out=linears[0].endswith("c_attn"),
    )  # fmt: skip
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    merge(plan_merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out"))
    exact = PeftModel.from_pretrained(_load(base, family, torch.float64), str(tmp_path / "adapter"))
    exact.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merged, original, truth = map(checkpoint_tensors, (tmp_path / "out", base, tmp_path / "theirs"))
    assert merged.keys() == original.keys() == truth.keys()
    changed = set()
    for key, tensor in merged.items():
        if torch.equal(truth[key].double(), original[key].double()):
            assert torch.equal(tensor, original[key]), key
        else:
            assert_rounded(tensor, truth[key].double(), key)
            changed.add(key)
    assert len(changed) >= len(linears)


@pytest.mark.parametrize("name", FAMILIES)
def test_convert_there_and_back(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Three matrices to two and back to three: the dense fp64 product of every module, and of every expert."""
    _init(models(name, torch.bfloat16), tmp_path / "out", targets=FAMILIES[name].targets, method="sketch")
    start = tmp_path / "out" / "adapter"
    convert(plan_convert(start, tmp_path / "lora", ConvertOptions(to="lora")))
    convert(plan_convert(tmp_path / "lora", tmp_path / "back", ConvertOptions(to="slora")))
    first, *others = (Adapter.open(path) for path in (start, tmp_path / "lora", tmp_path / "back"))
    for other in others:
        assert other.parts.keys() == first.parts.keys()
        for module in first.parts:
            expected, actual = (torch.matmul(*each.sides(module, torch.float64)) for each in (first, other))
            # lora_B @ lora_N is rounded to fp32 once: 2^-24 of each of its r terms per entry of the product.
            assert (expected - actual).abs().max() <= RANK * 2.0**-23 * max(1.0, float(expected.abs().max())), module


@pytest.mark.parametrize("way", ["pissa", "converted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_peft_loads(name: str, way: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """No key missing, none unexpected; the residual base under the adapter is the original, by its outputs."""
    family = FAMILIES[name]
    model, out = models(name, torch.float32), tmp_path / "out"
    adapter = out / "adapter"
    if way == "pissa":
        _init(model, out, family.not_by_peft, family.targets, method="pissa", two_matrix=True)
    else:
        _init(model, out, family.not_by_peft, family.targets, method="sketch")
        convert(plan_convert(adapter, tmp_path / "lora", ConvertOptions(to="lora")))
        adapter = tmp_path / "lora"
    expected, residual = _outputs(_load(model, family)), _load(out, family)
    bare = _outputs(residual)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(residual, str(adapter))
    assert not [str(each.message) for each in told if "adapter keys" in str(each.message)]
    found = wrapped.load_adapter(str(adapter), "again")
    assert [key for key in found.missing_keys if ".again." in key] == found.unexpected_keys == []
    if family.read_past:
        with pytest.raises(AttributeError):
            _outputs(wrapped.base_model.model)
        actual = _outputs(wrapped.merge_and_unload(adapter_names=["default"]))
    else:
        actual = _outputs(wrapped.base_model.model)
    # fp32 against fp32: the residual is rounded once (2^-24 of entries of about 1), products are sums of at most 96
    # terms through at most 4 layers: some 100 * 2^-24 of the outputs, which here are below 100; a module that is
    # left out moves them by far more.
    scale = max(1.0, float(expected.abs().max()))
    assert (actual - expected).abs().max() <= 1e-4 * scale
    assert (bare - expected).abs().max() > 1e-2 * scale


def _tune(model: Path, out: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A copy of a model in which `change` has been added to tensors, in fp64 and rounded once."""
    shutil.copytree(model, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for key, tensor in tensors.items():
            added = change(key, tensor)
            if added is not None:
                tensors[key] = (tensor.double() + added).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})
    return out


def _low_rank(shape: Sequence[int], rank: int, size: float = 0.1) -> Tensor:
    *stack, rows, columns = shape
    return size * torch.randn(*stack, rows, rank).double() @ torch.randn(*stack, rank, columns).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_peft_loads_what_extract_finds(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """The tuned model's outputs from the base, where the rank suffices; layout and targets as init has them."""
    family = FAMILIES[name]
    model = models(name, torch.float32)
    init = {"rank": RANK, "residual": "none", "targets": family.targets, "exclude": family.not_by_peft}
    plan = plan_init(model, tmp_path / "out", InitOptions(factor=FactorOptions(method="lora"), **init))
    targets = {target.tensor: target for target in plan.targets}

    def change(key: str, tensor: Tensor) -> Tensor | None:
        if key not in targets:
            return None
        if targets[key].kernel is None:
            return _low_rank(tensor.shape, RANK)
        return _low_rank((len(tensor), tensor[0].numel()), RANK).view_as(tensor)

    torch.manual_seed(2)
    tuned = _tune(model, tmp_path / "tuned", change)
    options = ExtractOptions(rank=RANK, targets=family.targets)
    found = plan_extract(model, tuned, tmp_path / "found", options)
    three = plan_extract(model, tuned, tmp_path / "three", replace(options, to="slora"))
    three_init = plan_init(model, tmp_path / "out", InitOptions(factor=FactorOptions(method="slora"), **init))
    for ours, theirs in ((found, plan), (three, three_init)):
        assert ours.engine.side is not None
        assert theirs.engine.side is not None
        expected_layout, layout = (
            {key: info.shape for key, info in side.tensors.items()} for side in (theirs.engine.side, ours.engine.side)
        )
        assert layout == expected_layout
        assert ours.config.target_modules == theirs.config.target_modules
        assert ours.config.target_parameters == theirs.config.target_parameters
        assert ours.config.fan_in_fan_out == theirs.config.fan_in_fan_out
    # Both models are rounded to fp32: 2^-24 of entries of about 1, of changes that are not much smaller.
    assert extract(found)["error"] < 1e-5
    expected, bare = _outputs(_load(tuned, family)), _outputs(_load(model, family))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(_load(model, family), str(tmp_path / "found"))
    assert not [str(each.message) for each in told if "adapter keys" in str(each.message)]
    tuned_again = wrapped.merge_and_unload() if family.read_past else wrapped.base_model.model
    scale = max(1.0, float(expected.abs().max()))  # and the tolerance as in test_stock_peft_loads
    assert (_outputs(tuned_again) - expected).abs().max() <= 1e-4 * scale
    assert (bare - expected).abs().max() > 1e-2 * scale


FUSED = ["mixtral, fused", "qwen3_moe, fused", "gpt_oss", "gpt_oss, square", "llama4"]


@pytest.mark.parametrize("to", ["lora", "slora"])
@pytest.mark.parametrize("name", FUSED)
def test_extract_of_fused_experts_is_the_svd_of_each(
    name: str, to: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Oracle: torch's SVD in fp64, expert by expert; and base and adapter merged are as far off as is reported."""
    model = models(name, torch.float32)
    torch.manual_seed(2)
    tuned = _tune(
        model,
        tmp_path / "tuned",
        lambda key, t: 0.1 * torch.randn(t.shape).double() if key.endswith(("gate_up_proj", "down_proj")) else None,
    )
    options = ExtractOptions(rank=RANK, to=to, method="svd")
    manifest = extract(plan_extract(model, tuned, tmp_path / "found", options))
    errors = {module["module"]: module["error"] for module in manifest["modules"]}
    merge(plan_merge(model, [(tmp_path / "found", 1.0)], tmp_path / "merged"))
    before, after, merged = map(checkpoint_tensors, (model, tuned, tmp_path / "merged"))
    adapter = Adapter.open(tmp_path / "found")
    assert len(errors) == 4
    assert adapter.parts.keys() == errors.keys()
    transposed = name.startswith("gpt_oss")
    for module, error in errors.items():
        change = after[module].double() - before[module].double()
        U, S, Vh = torch.linalg.svd(change.mT if transposed else change, full_matrices=False)
        best = U[..., :RANK] * S[..., None, :RANK] @ Vh[..., :RANK, :]
        left, right = adapter.sides(module, torch.float64)
        # Either side is U or V times roots of S, rounded to fp32: together 2 · 2^-24 of ‖√S‖² = ΣS for each expert.
        distance = torch.linalg.matrix_norm(left @ right - best)
        assert (distance <= 1.01 * 2.0**-23 * S[:, :RANK].sum(-1)).all(), module
        tail = float(S[:, RANK:].norm() / S.norm())
        assert error == pytest.approx(tail, rel=1e-5)
        off = float((merged[module].double() - after[module].double()).norm())
        rounding = 2.0**-24 * float(after[module].double().norm())  # of the merge
        assert abs(off - error * float(change.norm())) <= 2 * rounding + 1e-5 * off, module


@pytest.mark.parametrize("to", ["lora", "slora"])
@pytest.mark.parametrize("name", FUSED)
def test_extract_cuts_experts_to_the_largest_rank_that_one_needs(
    name: str, to: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Changes of rank 0, 1, 2 and 3: each expert's product, in fp64; merged, and by stock PEFT, the tuned model."""
    family, model = FAMILIES[name], models(name, torch.float32)
    torch.manual_seed(2)
    tuned = _tune(
        model,
        tmp_path / "tuned",
        lambda key, t: (
            torch.stack([_low_rank(t.shape[1:], rank) for rank in range(4)])
            if key.endswith(("gate_up_proj", "down_proj"))
            else None
        ),
    )
    options = ExtractOptions(rank=8, to=to, tolerance=1e-3)
    manifest = extract(plan_extract(model, tuned, tmp_path / "found", options))
    assert {module["r"] for module in manifest["modules"]} == {3}
    before, after = map(checkpoint_tensors, (model, tuned))
    adapter = Adapter.open(tmp_path / "found")
    for module in adapter.parts:
        change = after[module].double() - before[module].double()
        left, right = adapter.sides(module, torch.float64)
        assert left.shape[-1] == 3
        product = (left @ right).mT if name.startswith("gpt_oss") else left @ right
        distance = torch.linalg.matrix_norm(product - change)
        assert (distance <= 1e-3 * torch.linalg.matrix_norm(change)).all(), module
    if to == "lora":
        expected = _outputs(_load(tuned, family))
        wrapped = PeftModel.from_pretrained(_load(model, family), str(tmp_path / "found"))
        # What the tolerance cut is below 1e-3 of a change that is about as large as the weights.
        assert (_outputs(wrapped.base_model.model) - expected).abs().max() <= 1e-3 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_extract_where_one_expert_changed(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Stock PEFT fuses all experts of a layer or none, so that the others are there with it; outputs as tuned."""
    family, model = FAMILIES[name], models(name, torch.float32)
    torch.manual_seed(2)
    tuned = _tune(model, tmp_path / "tuned", lambda k, t: _low_rank(t.shape, RANK) if "1.mlp.experts.2." in
                  k.replace("block_sparse_moe", "mlp") else None)  # fmt: skip
    manifest = extract(plan_extract(model, tuned, tmp_path / "found", ExtractOptions(rank=RANK)))
    assert len(manifest["modules"]) == 4 * 3  # of one layer
    assert sum(module["change_norm"] > 0 for module in manifest["modules"]) == 3
    expected, bare = _outputs(_load(tuned, family)), _outputs(_load(model, family))
    wrapped = PeftModel.from_pretrained(_load(model, family), str(tmp_path / "found"))
    scale = max(1.0, float(expected.abs().max()))
    assert (_outputs(wrapped.base_model.model) - expected).abs().max() <= 1e-4 * scale
    assert (bare - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_extract_from_experts_in_two_forms(
    surgery: Callable[..., Any], family: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Refused either way round, with what to do; and that does it."""
    apart, fused = models(family, torch.float32), models(f"{family}, fused", torch.float32)
    for base, tuned in ((apart, fused), (fused, apart)):
        done = surgery("extract", base, tuned, "-o", tmp_path / "out", "-r", 4)
        assert done.code == 3
        assert f"{fused} has its experts fused (model.layers.0.mlp.experts." in done.stderr
        assert f"{apart} each by itself (model.layers.0." in done.stderr
        assert "from_pretrained(DIR).save_pretrained(NEW_DIR, save_original_format=False)" in done.stderr
        assert not (tmp_path / "out").exists()
    _load(apart, FAMILIES[family]).save_pretrained(tmp_path / "brought", save_original_format=False)
    tuned = _tune(tmp_path / "brought", tmp_path / "tuned", lambda key, t: t.double() if "experts" in key else None)
    plan = plan_extract(fused, tuned, tmp_path / "out", ExtractOptions(rank=RANK))
    assert {shape.experts for shape in plan.modules.values()} == {4}


def test_extract_from_experts_in_an_unknown_order(
    surgery: Callable[..., Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("gpt_oss", torch.float32), model)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "some_moe"}
    (model / "config.json").write_text(json.dumps(config))
    tuned = _tune(model, tmp_path / "tuned", lambda key, t: t.double() if key.endswith("gate_up_proj") else None)
    done = surgery("extract", model, tuned, "-o", tmp_path / "out", "-r", 4)
    assert done.code == 5
    assert "'some_moe' stores them as (experts, out, in) or (experts, in, out) is not known" in done.stderr


def test_extract_with_changes_that_no_adapter_holds(
    surgery: Callable[..., Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    """The biases of fused experts, which are no module's: refused, or left out on request; the rest is found."""
    model = models("gpt_oss", torch.float32)
    tuned = _tune(model, tmp_path / "tuned", lambda key, t: t.double() if "gate_up_proj" in key else None)
    arguments = ("extract", model, tuned, "-o", tmp_path / "out", "-r", 4)
    done = surgery(*arguments)
    assert done.code == 5
    assert "gate_up_proj_bias" in done.stderr
    assert "--others ignore leaves it out" in done.stderr
    assert surgery(*arguments, "--others", "ignore").code == 0
    parameters = {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2)}
    assert Adapter.open(tmp_path / "out").parts.keys() == parameters


# --- what is carried, what is left alone, what is refused -------------------------------------------------------------


def test_what_transformers_does_not_know_is_carried(tmp_path: Path) -> None:
    """Multi-token prediction by either name, a tied head, tensors that are no floats: same bytes, and no targets."""
    weight = torch.randn(32, 32).to(torch.bfloat16)
    others = {
        "mtp.layers.0.mlp.up_proj.weight": weight, "model.layers.2.self_attn.q_proj.weight": weight + 1,
        "model.layers.2.eh_proj.weight": weight + 2, "model.position_ids": torch.arange(8),
        "model.mask": torch.tensor([True, False]), "model.scale": torch.tensor(2.0),
        "model.empty": torch.empty(0, 4),
    }  # fmt: skip
    extra = {"num_nextn_predict_layers": 1}
    model = write_llama(tmp_path / "model", tied=True, changes=others, config=extra)
    manifest = _init(model, tmp_path / "out", method="nystrom-optimal")
    adapted = {module["tensor"] for module in manifest["modules"]}
    assert len(adapted) == 2 * 7
    assert not adapted & others.keys()
    before, after = checkpoint_tensors(model), checkpoint_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before.keys() - adapted:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    assert verify(tmp_path / "out", model).failures == []
    named = plan_init(model, tmp_path / "named", InitOptions(rank=RANK, targets=["mtp.layers.0.mlp.up_proj"]))
    assert [target.module for target in named.targets] == ["mtp.layers.0.mlp.up_proj"]


def test_a_tied_head_is_no_tensor_to_adapt(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tied=True)
    with pytest.raises(TargetError, match="lm_head matches no linear weight"):
        plan_init(model, tmp_path / "out", InitOptions(targets=["lm_head"]))


def test_experts_in_an_unknown_order_are_not_guessed(models: Callable[..., Path], tmp_path: Path) -> None:
    """A model_type that nobody knows: refused, with what to do, and inspect goes on."""
    model = tmp_path / "model"
    shutil.copytree(models("gpt_oss, square", torch.bfloat16), model)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "some_moe"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="not be guessed: leave them out with --exclude experts"):
        plan_init(model, tmp_path / "out", InitOptions(rank=RANK))
    plan = plan_init(model, tmp_path / "out", InitOptions(rank=RANK, exclude=["experts"]))
    assert {module_kind(target.module) for target in plan.targets} == set(_braces(ATTENTION))
    assert "not be guessed" in inspect(model)["refused"]


@pytest.mark.parametrize("name", ["mixtral", "mixtral, fused"])
def test_another_number_of_experts(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter whose ranks make eight experts of what are four."""
    model = _load(models(name, torch.float32), FAMILIES[name])
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=["experts.gate_up_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", r=RANK // 2)
    with pytest.raises(AdapterError, match="8 experts of rank 2"):
        plan_merge(models(name, torch.float32), [(tmp_path / "adapter", 1.0)], tmp_path / "out")


MODULE = "model.layers.0.mlp.up_proj"
CODES, SCALES = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4)
# How each lies on disk -> quant_method in config.json, the tensors, and the word that tells it without config.json.
QUANTIZED: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        {f"{MODULE}.weight": CODES.reshape(-1, 1), f"{MODULE}.weight.absmax": SCALES,
         f"{MODULE}.weight.quant_map": SCALES, f"{MODULE}.weight.quant_state.bitsandbytes__nf4": CODES},
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        "bitsandbytes", {f"{MODULE}.weight": CODES.to(torch.int8), f"{MODULE}.SCB": SCALES}, "bitsandbytes",
    ),
    "GPTQ": (
        "gptq",
        {f"{MODULE}.qweight": CODES.int(), f"{MODULE}.qzeros": CODES.int(), f"{MODULE}.scales": SCALES.half(),
         f"{MODULE}.g_idx": SCALES.int()},
        "GPTQ",
    ),
    "AWQ": (
        "awq", {f"{MODULE}.qweight": CODES.int(), f"{MODULE}.qzeros": CODES.int(), f"{MODULE}.scales": SCALES}, "AWQ",
    ),
    "compressed-tensors": (
        "compressed-tensors",
        {f"{MODULE}.weight_packed": CODES.int(), f"{MODULE}.weight_scale": SCALES, f"{MODULE}.weight_shape": CODES[0]},
        "compressed-tensors",
    ),
    "FP8, scales of blocks": (
        "fp8", {f"{MODULE}.weight": CODES.view(torch.float8_e4m3fn), f"{MODULE}.weight_scale_inv": SCALES[None]}, "FP8",
    ),
    "FP8, one scale": (
        "compressed-tensors", {f"{MODULE}.weight": CODES.view(torch.float8_e4m3fn), f"{MODULE}.weight_scale": SCALES},
        "scales",
    ),
    "FP8 without scales": ("fp8", {f"{MODULE}.weight": CODES.view(torch.float8_e5m2)}, "F8_E5M2"),
    "MXFP4": (
        "mxfp4",
        {"model.layers.0.mlp.experts.down_proj_blocks": CODES[None], "model.layers.0.mlp.experts.down_proj_scales":
         CODES[:1]},
        "MXFP4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("by", ["config.json", "tensors"])
@pytest.mark.parametrize("what", QUANTIZED)
def test_quantized_checkpoints_are_refused(what: str, by: str, tmp_path: Path) -> None:
    """By what config.json says, and without it by the tensors' own names and types; inspect tells the same."""
    method, tensors, word = QUANTIZED[what]
    config = {"quantization_config": {"quant_method": method}} if by == "config.json" else {}
    rest = {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32), "model.norm.weight": torch.ones(32)}
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    model = write_checkpoint(tmp_path / "model", {**rest, **own}, config={"model_type": "llama", **config})
    reason = method if config else word
    with pytest.raises(UnsupportedCheckpointError, match=rf"is quantized \(.*{reason}.*use the checkpoint that it was"):
        plan_init(model, tmp_path / "out", InitOptions(rank=RANK))
    factors = random_factors(32, 32)
    keys = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",) * 2
    adapter = dict(zip((keys[0], keys[1].replace("lora_A", "lora_B")), factors, strict=True))
    write_adapter(tmp_path / "adapter", adapter)
    with pytest.raises(UnsupportedCheckpointError, match=rf"is quantized \(.*{reason}.*merged into"):
        plan_merge(model, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert reason in inspect(model)["refused"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


# --- what is told ---------------------------------------------------------------------------------------------------


def test_targets_are_told_as_a_tree(surgery: Callable[..., Any], models: Callable[..., Path], tmp_path: Path) -> None:
    """By hand for one model; `inspect` and `init --dry-run` say the same, and write nothing."""
    model = models("mixtral", torch.bfloat16)
    for arguments in (("inspect", model, "-r", 4), ("init", model, "-r", 4, "--dry-run", "-o", tmp_path / "out")):
        done = surgery(*arguments)
        assert done.code == 0, done.stderr
        tree = done.stdout.partition("The most energy")[0]
        lines = {line.split()[0]: line.split()[1:] for line in tree.splitlines() if line.strip()}
        assert lines["model.layers.{0…1}"] == []
        assert lines["block_sparse_moe.experts.{0…3}"] == []
        # 2 layers of 4 experts, 32 × 48 in bf16 each; 4 (32 + 48) + 4² numbers of the adapter each.
        assert lines["w1"] == ["32→48", "×8", "12.29", "k", "24.6", "kB", "2.688", "k"]
        assert lines["k_proj"] == ["32→16", "×2", "1.024", "k", "2.05", "kB", "416"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_told_as_json(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Sums over groups are those over targets, and of the adapter's own file."""
    model = models(name, torch.bfloat16)
    targets = FAMILIES[name].targets
    found = inspect(model, RANK, targets)
    options = InitOptions(rank=RANK, factor=FactorOptions(method="slora"), targets=targets)
    plan = plan_init(model, tmp_path / "out", options)
    with Checkpoint.open(model) as checkpoint:
        stored = [checkpoint.tensors[target.tensor] for target in plan.targets]
    assert sum(group["count"] for group in found["targets"]) == len(plan.targets)
    assert sum(group["size_bytes"] for group in found["targets"]) == sum(info.size_bytes for info in stored)
    assert sum(2 * group["parameters"] for group in found["targets"]) == sum(info.size_bytes for info in stored)
    assert plan.engine.side is not None
    numbers = sum(info.size_bytes // 4 for info in plan.engine.side.tensors.values())
    assert sum(group["slora_parameters"] for group in found["targets"]) == found["cost"]["slora"] == numbers
    assert plan.parameters == numbers
