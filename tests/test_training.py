"""`nlora_surgery train` and `generate`, from the command line to the adapter on disk.

Oracles: transformers' own loss, an uninterrupted run, one process for two, stock PEFT for what was converted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nlora_surgery.adapter import Adapter
from nlora_surgery.checkpoint import Checkpoint
from nlora_surgery.factor import moved_sides
from nlora_surgery.training.data import DataOptions, encode
from nlora_surgery.training.loading import load_tokenizer
from nlora_surgery.training.trainer import AUTO_STEP, AUTO_STEP_INTTUNE

WORDS = ["the", "red", "fox", "runs", "over", "a", "green", "hill", "and", "sees", "two", "small", "birds", "sing"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short examples of varied length, so that batches need padding."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": " ".join(WORDS[: 2 + n % 6]), "completion": " ".join(WORDS[n % 5 : n % 5 + 1 + n % 4])}
        for n in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked output of init, r = 8, by nystrom-optimal."""
    return init(tiny_llama, tmp_path_factory.mktemp("prepared") / "out", "nystrom-optimal")


def init(model: Path, out: Path, method: str, residual: str = "baked", **factor: Any) -> Path:
    from nlora_surgery.options import FactorOptions
    from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare

    prepare(plan_init(model, out, InitOptions(rank=8, factor=FactorOptions(method, **factor), residual=residual)))  # type: ignore[arg-type]
    return out


FAST = ("--batch-size", 4, "--grad-accum", 1, "--device", "cpu", "--max-length", 64)


def losses(run: Path, name: str = "loss") -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    file = Adapter.open(adapter).file
    return {name: file.tensor(name).clone() for name in file.tensors}


def response_loss(model: torch.nn.Module, base: Path, data: Path) -> float:
    """The mean over batches of transformers' own loss, computed without the Trainer."""
    tokenizer = load_tokenizer(base)
    rows = encode(str(data), tokenizer, DataOptions(max_length=64)).rows
    batches = []
    for start in range(0, len(rows), 4):
        chunk = rows[start : start + 4]
        longest = max(len(row["input_ids"]) for row in chunk)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in chunk])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in chunk])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in chunk])
        with torch.no_grad():
            batches.append(float(model(input_ids=ids, attention_mask=mask, labels=labels).loss))
    return sum(batches) / len(batches)


@pytest.mark.parametrize("mode", ["nlora", "inttune"])
def test_a_run_learns_and_writes_an_adapter(
    surgery: Callable[..., Any], prepared: Path, tiny_llama: Path, data: Path, tmp_path: Path, mode: str
) -> None:
    run = tmp_path / "run"
    done = surgery(
        "train", prepared, "--data", data, "--eval-data", data, "-o", run, "--train", mode, "--epochs", 2,
        "--eval-steps", 8, "--save-steps", 8, *FAST, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 24
    assert [step for step, _ in losses(run)] == list(range(1, 25))
    assert [step for step, _ in losses(run, "eval_loss")] == [0, 8, 16, 24]
    assert report["eval_loss"] < 0.98 * report["start_eval_loss"]

    start, trained = tensors(prepared / "adapter"), tensors(run)
    moved = {name.rpartition(".lora_")[2] for name in start if not torch.equal(start[name], trained[name])}
    assert moved == ({"A.weight", "N.weight", "B.weight"} if mode == "nlora" else {"N.weight"})
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-24"]
    assert Adapter.open(run).base_fingerprint == Adapter.open(prepared / "adapter").base_fingerprint
    assert "lora_N" in str(list(trained))
    # The learning rates are the paper's, on its schedule: 3 % of 24 steps warm up, then a cosine to zero.
    rates = [rate for _, rate in losses(run, "learning_rate")]
    assert max(rates) == pytest.approx(2e-3 if mode == "inttune" else 2e-4)
    assert rates[-1] < 0.02 * max(rates)


@pytest.mark.parametrize("mode", ["nlora", "inttune"])
def test_lr_auto_moves_the_weights_by_a_known_share(
    surgery: Callable[..., Any], tiny_llama: Path, prepared: Path, data: Path, tmp_path: Path, mode: str
) -> None:
    """Oracle: what Adam did in a step, from the files; without warm-up, so that it is one of the whole rate."""
    run = tmp_path / "run"
    arguments = ("train", prepared, "--data", data, "-o", run, "--train", mode, "--max-steps", 1, "--warmup", 0, *FAST)
    done = surgery(*arguments, "--lr", "auto", "--schedule", "constant", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    usual = AUTO_STEP_INTTUNE if mode == "inttune" else AUTO_STEP
    assert losses(run, "learning_rate") == [(1, report["learning_rate"])]
    assert report["first_step"] == pytest.approx(usual, rel=0.05)  # the rate has two digits
    assert "suited every start" not in done.stderr

    start, trained = Adapter.open(prepared / "adapter"), Adapter.open(run)
    shares = []
    with Checkpoint.open(tiny_llama) as original:
        for name in start.parts:
            left, right = moved_sides(trained.factors(name), start.factors(name), start.scaling(name), torch.float64)
            weight = original.tensor(f"{name}.weight").double()
            shares.append(float((left @ right).norm() / weight.norm()))
    # The signs of real gradients are not independent: the same order of magnitude is what can be asked.
    assert usual / 2 < sum(shares) / len(shares) < 10 * usual

    far = surgery(*arguments, "--overwrite", "--lr", 1.0)
    assert "suited every start" in far.stderr
    assert "--lr must be positive" in surgery(*arguments, "--overwrite", "--lr", "nan").stderr
    assert "neither a number nor auto" in surgery(*arguments, "--lr", "fast").stderr


def test_the_start_has_the_loss_of_the_base(
    surgery: Callable[..., Any], tiny_llama: Path, prepared: Path, data: Path, tmp_path: Path
) -> None:
    """Virtual: exactly. Baked: to the rounding of the residual; and all as transformers computes it by itself."""

    def loss(*arguments: Any) -> float:
        done = surgery("train", *arguments, "--data", data, "--eval-only", "--json", *FAST)
        assert done.code == 0, done.stderr
        return float(json.loads(done.stdout)["loss"])

    base = loss(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert base == pytest.approx(response_loss(model, tiny_llama, data), rel=1e-5)  # fp32, sums in another order
    assert loss(init(tiny_llama, tmp_path / "virtual", "nystrom", "virtual")) == base
    assert loss(prepared) == pytest.approx(base, rel=5e-3)  # one bf16 rounding of every weight


def test_on_a_terminal_the_bar_shows_the_loss(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", prepared, "--data", data, "--max-steps", 2, *FAST)
    assert "loss=" not in surgery(*arguments, "-o", tmp_path / "piped").stderr
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = surgery(*arguments, "-o", tmp_path / "terminal").stderr
    for _, loss in losses(tmp_path / "terminal"):
        assert f"loss={loss:.4f}" in shown


def test_where_matplotlib_is_there_is_a_curve(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert surgery("train", prepared, "--data", data, "--max-steps", 2, *FAST, "-o", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_recomputed_activations_change_nothing(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path
) -> None:
    kept, recomputed = tmp_path / "kept", tmp_path / "recomputed"
    arguments = ("train", prepared, "--data", data, "--max-steps", 2, *FAST)
    assert surgery(*arguments, "-o", kept).code == 0
    assert surgery(*arguments, "-o", recomputed, "--gradient-checkpointing").code == 0
    assert losses(kept) == losses(recomputed)


def test_a_plain_model_starts_virtually_from_itself(
    surgery: Callable[..., Any], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", tiny_llama, "--init", "nystrom", "--rank", 8, "--data", data, "-o", run, "--max-steps", 3)
    done = surgery(*arguments, *FAST)
    assert done.code == 0, done.stderr
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["peft_type"], config["residual"]) == ("SLORA", "virtual")
    assert not (run / "start" / "model.safetensors.index.json").exists()
    assert config["base_model_name_or_path"] == str(tiny_llama)
    # It is the same start as init's, and the adapter on disk still holds it.
    start = tensors(init(tiny_llama, tmp_path / "init", "nystrom", "virtual") / "adapter")
    trained = tensors(run)
    assert all(torch.equal(trained[name], start[name]) for name in start if "_initial" in name)
    done = surgery("generate", run, "--prompt", "the red fox", "--max-new-tokens", 4, "--device", "cpu")
    assert done.code == 0, done.stderr


def test_trained_then_converted_to_lora_equals_in_stock_peft(
    surgery: Callable[..., Any], tiny_llama: Path, prepared: Path, data: Path, tmp_path: Path
) -> None:
    """The residual adapter after training, as LoRA of rank 2r on the original base, loaded by PEFT."""
    from peft import PeftModel

    from nlora_surgery.training.layers import attach

    run, lora = tmp_path / "run", tmp_path / "lora"
    assert surgery("train", prepared, "--data", data, "-o", run, "--max-steps", 4, "--lr", 1e-3, *FAST).code == 0
    done = surgery(
        "convert", run, "-o", lora, "--to", "lora", "--base", tiny_llama, "--initial", prepared / "adapter"
    )  # fmt: skip
    assert done.code == 0, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32).eval()
    attach(ours, Adapter.open(run))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] % 50
    with torch.no_grad():
        wanted, original = ours(input_ids=ids).logits, base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, lora).eval()(input_ids=ids).logits
    # They differ by the bf16 rounding of the stored residual, which training has not touched.
    start = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32).eval()
    attach(start, Adapter.open(prepared / "adapter"))
    with torch.no_grad():
        rounding = float((start(input_ids=ids).logits - original).square().mean().sqrt())
    assert float((theirs - wanted).square().mean().sqrt()) < 2 * rounding
    assert float((theirs - original).square().mean().sqrt()) > 5 * rounding, "nothing was trained"


def test_plain_lora_trains_and_loads_in_peft(
    surgery: Callable[..., Any], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    run = tmp_path / "run"
    done = surgery(
        "train", tiny_llama, "--init", "lora", "--rank", 4, "--data", data, "-o", run, "--max-steps", 3, "--lr", 1e-2,
        *FAST,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(base, run).eval()
    done = surgery("train", tiny_llama, "--adapter", run, "--data", data, "--eval-only", "--json", *FAST)
    # The same fp32 sums in another order.
    assert json.loads(done.stdout)["loss"] == pytest.approx(response_loss(peft, tiny_llama, data), rel=1e-5)


# --- kills, resumption, processes -------------------------------------------------------------------------


def start_process(*arguments: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nlora_surgery", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("lines", [4, 9])
def test_killed_and_resumed_gives_the_same_bits(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path, lines: int
) -> None:
    """The oracle is a run that nobody killed; dropout makes the random state matter."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = ("train", prepared, "--data", data, "--max-steps", 14, "--save-steps", 3, "--dropout", 0.1, *FAST)
    assert surgery(*arguments, "-o", whole).code == 0
    process = start_process(*arguments, "-o", run)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter_config.json").exists(), "it was too fast to be killed"
    done = surgery(*arguments, "-o", run, "--resume")
    assert done.code == 0, done.stderr
    assert "going on from checkpoint-" in done.stderr
    resumed, expected = tensors(run), tensors(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("start", ["prepared", "init"])
def test_two_processes_learn_what_one_with_twice_the_batch_does(
    surgery: Callable[..., Any], prepared: Path, tiny_llama: Path, data: Path, tmp_path: Path, start: str
) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    model = (prepared,) if start == "prepared" else (tiny_llama, "--init", "nystrom", "--rank", 8)
    common = (
        "train", *model, "--data", data, "--max-steps", 5, "--grad-accum", 1, "--device", "cpu", "--max-length", 64,
    )  # fmt: skip
    assert surgery(*common, "-o", alone, "--batch-size", 4).code == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = ["-m", "nlora_surgery", *map(str, common), "-o", str(pair), "--batch-size", "2"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    # fp32 sums in another order, and five AdamW steps that amplify them where a gradient is near zero.
    for (step, one), (other, two) in zip(losses(alone), losses(pair), strict=True):
        assert step == other
        assert two == pytest.approx(one, rel=2e-4)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = surgery(
        "train", prepared, "--data", data, "-o", run, "--max-steps", 40, "--lr", 1e20, "--warmup", 0, "--save-steps", 1,
        "--schedule", "constant", *FAST,
    )  # fmt: skip
    assert done.code == 14
    assert done.stderr.count("Error:") == 1
    assert "step 2" in done.stderr or "after step" in done.stderr
    assert not (run / "adapter_config.json").exists()
    for checkpoint in run.glob("checkpoint-*/whole"):
        assert all(bool(value.isfinite().all()) for value in tensors(checkpoint.parent).values())


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_run_is_neither_overwritten_nor_mixed(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", prepared, "--data", data, "-o", run, "--max-steps", 2, *FAST)
    assert surgery(*arguments).code == 0
    again = surgery(*arguments)
    assert (again.code, "holds a run already" in again.stderr) == (14, True)
    other = surgery(*arguments, "--resume", "--lr", 1e-3)
    assert (other.code, "another learning_rate" in other.stderr) == (14, True)
    finished = surgery(*arguments, "--resume")
    assert (finished.code, "was finished by an earlier run" in finished.stderr) == (0, True)
    (run / "notes.txt").write_text("mine")
    assert surgery(*arguments, "--overwrite").code == 0
    assert (run / "notes.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x").touch()
    refused = surgery("train", prepared, "--data", data, "-o", foreign, "--max-steps", 2, "--overwrite", *FAST)
    assert (refused.code, "is no run of train" in refused.stderr) == (14, True)
    assert (foreign / "x").exists()


def test_bad_input_ends_in_one_sentence(
    surgery: Callable[..., Any], prepared: Path, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def refused(code: int, words: str, *arguments: Any) -> None:
        done = surgery("train", *arguments, "-o", out)
        assert done.code == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr

    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(7, "holds no adapter to train", tiny_llama, "--data", data)
    refused(7, "belongs to another base", tiny_llama, "--adapter", prepared / "adapter", "--data", data)
    refused(13, "holds no example", prepared, "--data", empty)
    refused(13, "there is no data file", prepared, "--data", tmp_path / "none.jsonl")
    refused(13, "--max-length is 4", prepared, "--data", data, "--max-length", 4, "--too-long", "error")
    refused(2, "has an adapter already", prepared, "--init", "nystrom", "--data", data)
    refused(2, "does not fit the adapter", prepared, "--train", "lora", "--data", data)
    refused(2, "--lr must be positive", prepared, "--lr", -1, "--data", data)
    refused(2, "--report-to nobody cannot be had", prepared, "--data", data, "--report-to", "nobody")
    refused(2, "--grad-accum must be at least 1", prepared, "--grad-accum", 0, "--data", data)
    missing_out = surgery("train", prepared, "--data", data)
    assert (missing_out.code, "--out is missing" in missing_out.stderr) == (2, True)


def test_without_accelerate_the_extra_is_named(
    surgery: Callable[..., Any], prepared: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    done = surgery("train", prepared, "--data", data, "-o", tmp_path / "run")
    assert done.code == 12
    assert 'pip install "nlora-surgery[train]"' in done.stderr


# --- generate ----------------------------------------------------------------------------------------------


def test_generate_is_transformers_greedy(
    surgery: Callable[..., Any], tiny_llama: Path, prepared: Path, tmp_path: Path
) -> None:
    arguments = ("--prompt", "the red fox", "--template", "raw", "--max-new-tokens", 8, "--device", "cpu")
    tokenizer = load_tokenizer(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    inputs = tokenizer("the red fox", return_tensors="pt")
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8,
                            do_sample=False, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    plain = surgery("generate", tiny_llama, *arguments)
    assert plain.code == 0, plain.stderr
    assert plain.stdout == expected + "\n"
    virtual = init(tiny_llama, tmp_path / "virtual", "nystrom", "virtual")
    assert surgery("generate", virtual, *arguments).stdout == expected + "\n"
    as_json = surgery("generate", prepared, "--json", *arguments)
    assert json.loads(as_json.stdout)["prompt"] == "the red fox"
    assert surgery("generate", tiny_llama, "--prompt", "x", "--max-new-tokens", 0).code == 2
