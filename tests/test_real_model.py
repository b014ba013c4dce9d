"""A real language model, trained by stock PEFT and by us, through every conversion: it must go on saying the same.

Slow, and it needs a Llama checkpoint with a tokenizer: name its directory in NLORA_SURGERY_MODEL (SmolLM2-135M will
do), then `make test-slow`. Everything is computed and stored in fp32, so that the greedy text is the oracle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nlora_surgery.adapter import Adapter
from nlora_surgery.training.data import layout_prompt
from nlora_surgery.training.layers import attach
from nlora_surgery.training.loading import load_tokenizer

MODEL = os.environ.get("NLORA_SURGERY_MODEL", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="NLORA_SURGERY_MODEL names no checkpoint"),
]

QUESTIONS = {
    "A box holds 12 eggs. How many eggs are in 5 boxes?": "There are 12 * 5 = 60 eggs. #### 60",
    "Anna has 7 apples and eats 3. How many are left?": "Anna has 7 - 3 = 4 apples left. #### 4",
    "A train runs 80 km an hour. How far does it come in 3 hours?": "It comes 80 * 3 = 240 km. #### 240",
    "Tom reads 20 pages a day. How long does he take for 140 pages?": "He takes 140 / 20 = 7 days. #### 7",
}
PROMPTS = (*list(QUESTIONS)[:2], "Why is the sky blue?", "Sara buys 4 pens at 2 dollars each. What does she pay?")
RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in fp32, in shards."""
    directory = tmp_path_factory.mktemp("base") / "fp32"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="200MB")
    load_tokenizer(Path(MODEL)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def peft_trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that stock PEFT trained for twelve steps, with alpha = 2 r."""
    from peft import LoraConfig, get_peft_model

    from nlora_surgery.training.data import DataOptions, encode

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS))
    rows = encode(str(data), load_tokenizer(base), DataOptions()).rows
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(12):
        row = rows[step % len(rows)]
        loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(directory)
    return directory


def says(model: Any, base: Path) -> list[str]:
    """The greedy answers, by transformers."""
    tokenizer = load_tokenizer(base)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(layout_prompt(prompt, "alpaca", tokenizer), return_tensors="pt")
        output = model.eval().generate(
            **inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    return answers


def in_peft(base: Path, adapter: Path) -> list[str]:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return says(PeftModel.from_pretrained(model, adapter), base)


def in_ours(base: Path, adapter: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attach(model, Adapter.open(adapter))
    return says(model, base)


def plain(directory: Path) -> list[str]:
    return says(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), directory)


def test_an_adapter_of_peft(surgery: Callable[..., Any], base: Path, peft_trained: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> None:
        done = surgery(*arguments)
        assert done.code == 0, done.stderr

    expected = in_peft(base, peft_trained)
    assert expected != plain(base), "nothing was learnt"
    assert in_ours(base, peft_trained) == expected
    for split in ("keep", "balanced", "core"):
        slora, back = tmp_path / f"slora-{split}", tmp_path / f"back-{split}"
        run("convert", peft_trained, "-o", slora, "--to", "slora", "--scale-split", split)
        assert in_ours(base, slora) == expected
        run("convert", slora, "-o", back, "--to", "lora")
        assert in_peft(base, back) == expected
        run("merge", base, slora, "-o", tmp_path / f"merged-{split}")
        assert plain(tmp_path / f"merged-{split}") == expected
    for form, load in (("lora", in_peft), ("slora", in_ours)):
        found = tmp_path / f"extracted-{form}"
        run("extract", base, tmp_path / "merged-keep", "-o", found, "--rank", RANK, "--to", form)
        assert load(base, found) == expected
    run("convert", peft_trained, "-o", tmp_path / "wide", "--to", "lora", "--rank", RANK, "--base", base)
    assert in_peft(base, tmp_path / "wide") == expected


@pytest.mark.parametrize(("method", "residual", "mode"), [
    ("nystrom", "virtual", "nlora"), ("nystrom-optimal", "baked", "nlora"), ("sketch", "baked", "inttune"),
])  # fmt: skip
def test_an_adapter_of_ours(
    surgery: Callable[..., Any], base: Path, data: Path, tmp_path: Path, method: str, residual: str, mode: str
) -> None:
    def run(*arguments: Any) -> None:
        done = surgery(*arguments)
        assert done.code == 0, done.stderr

    prepared, trained = tmp_path / "prepared", tmp_path / "run"
    run("init", base, "--rank", RANK, "--method", method, "--residual", residual, "-o", prepared)
    run(
        "train", prepared, "--data", data, "-o", trained, "--train", mode, "--max-steps", 12, "--batch-size", 1,
        "--grad-accum", 1, "--device", "cpu",
    )  # fmt: skip
    own_base = prepared if residual == "baked" else base
    expected = in_ours(own_base, trained)
    assert expected != plain(base), "nothing was learnt"
    initial = ("--initial", prepared / "adapter") if residual == "baked" else ()
    for form, load in (("lora", in_peft), ("slora", in_ours)):
        run("convert", trained, "-o", tmp_path / form, "--to", form, "--base", base, *initial)
        assert load(base, tmp_path / form) == expected
    run("merge", own_base, trained, "-o", tmp_path / "merged")
    assert plain(tmp_path / "merged") == expected
    run("extract", base, tmp_path / "merged", "-o", tmp_path / "extracted", "--rank", 2 * RANK)
    assert in_peft(base, tmp_path / "extracted") == expected
