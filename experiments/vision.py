"""The same comparison on a small vision transformer: `python -m experiments.vision`.

A ViT learns scikit-learn's digits (1,797 images of 8 × 8, from real hands) upright; adapters then teach it the same
digits lying on their side. Its head stays as it is. Takes minutes on one core, so every cell has three seeds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.run import append_result, provenance, read_results
from experiments.table import Start, Trial, rate_text
from nlora_surgery.adapter import Adapter
from nlora_surgery.training.layers import attach, first_step, freeze

__all__ = ["RESULTS", "TRIALS", "VisionRun", "mean_losses", "runs_at"]

RESULTS: Final = Path(__file__).parent / "results" / "vision.jsonl"

_RANK: Final = 16  # of a width of 128
_TRAIN_IMAGES: Final = 1200
_STEPS: Final = 100
_BATCH: Final = 32
_SEEDS: Final = range(3)


@dataclass(frozen=True)
class VisionRun:
    """One training of an adapter on the lying digits."""

    start: Start
    mode: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Short and unique; the key of its result."""
        return f"{self.start.name}-{self.mode}-lr{rate_text(self.lr)}-seed{self.seed}"


def _trials() -> Iterator[Trial]:
    def trial(mode: str, first: float, **start: Any) -> Trial:
        return Trial(start=Start(**{"rank": _RANK, **start}), mode=mode, first=first)

    # The starts.
    yield trial("lora", 5e-3, method="lora")
    yield trial("slora", 5e-3, method="slora")
    yield trial("nlora", 5e-3, method="nystrom")
    yield trial("nlora", 2e-3, method="nystrom-optimal")
    yield trial("lora", 2e-3, method="pissa", two_matrix=True)
    yield trial("nlora", 2e-3, method="sketch")
    # How the scale is split.
    yield trial("nlora", 5e-3, method="nystrom-optimal", split="balanced")
    yield trial("nlora", 5e-3, method="nystrom-optimal", split="core")
    yield trial("nlora", 2e-3, method="sketch", split="core")
    # IntTune.
    yield trial("inttune", 1e-1, method="nystrom")
    yield trial("inttune", 1e-1, method="nystrom-optimal")
    yield trial("inttune", 2e-2, method="sketch", split="core")
    for rank in (32, 64):
        yield trial("inttune", 5e-2, method="nystrom", rank=rank)
        yield trial("inttune", 1e-2, method="sketch", split="core", rank=rank)
    # Ranks.
    for rank in (4, 8, 32, 64):
        yield trial("slora", 5e-3, method="slora", rank=rank)
        yield trial("nlora", 5e-3, method="nystrom", rank=rank)
    # The core, and no residual at all.
    yield trial("nlora", 5e-4, method="nystrom-pinv")
    yield trial("nlora", 5e-3, method="nystrom", residual="none")
    yield trial("nlora", 1e-3, method="nystrom-pinv", residual="none")
    yield trial("nlora", 2e-3, method="nystrom-optimal", residual="none")
    # The order: lora_N within lora_B.
    yield trial("lora", 5e-3, method="nystrom", folded=True)
    yield trial("lora", 2e-3, method="nystrom-optimal", folded=True)
    # DoRA.
    yield trial("dora", 5e-3, method="lora")
    yield trial("dora", 2e-3, method="pissa", two_matrix=True)
    yield trial("dora", 5e-3, method="nystrom", folded=True)
    yield trial("dora", 5e-3, method="nystrom-optimal", folded=True)


TRIALS: Final = tuple(_trials())


def runs_at(trial: Trial, lr: float) -> list[VisionRun]:
    """The runs of a trial at a learning rate, one for each seed."""
    return [VisionRun(trial.start, trial.mode, lr, seed) for seed in _SEEDS]


def mean_losses(trial: Trial, results: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Losses after training, the mean over the seeds, by ascending learning rate; rates that lack one are left out."""
    found: dict[float, list[float]] = {}
    for result in results:
        if (result["run"]["start"], result["run"]["mode"]) == (trial.start.name, trial.mode):
            found.setdefault(float(result["run"]["lr"]), []).append(result["after"]["loss"])
    return {lr: statistics.fmean(losses) for lr, losses in sorted(found.items()) if len(losses) == len(_SEEDS)}


class _Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images and their digits, as the Trainer takes them."""

    def __init__(self, images: np.ndarray[Any, Any], digits: np.ndarray[Any, Any], *, lying: bool) -> None:
        turned = np.rot90(images, axes=(1, 2)) if lying else images
        self.pixel_values = torch.from_numpy(turned.copy()).float().unsqueeze(1) / 8 - 1  # they count to 16
        self.labels = torch.from_numpy(digits).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def _digits(*, lying: bool) -> tuple[_Images, _Images]:
    """Training and test images; which is which does not depend on a run's seed."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, digits = images.reshape(-1, 8, 8)[order], digits[order]
    parts = slice(None, _TRAIN_IMAGES), slice(_TRAIN_IMAGES, None)
    train, test = (_Images(images[part], digits[part], lying=lying) for part in parts)
    return train, test


def _train(
    model: nn.Module, data: tuple[_Images, _Images], *, lr: float, steps: int, seed: int
) -> list[dict[str, float]]:
    """Train what is not frozen; loss and accuracy on the test images before and after."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            per_device_train_batch_size=_BATCH,
            per_device_eval_batch_size=256,
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            label_names=["labels"],  # which the Trainer does not find on a model of PEFT's
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data[0], eval_dataset=data[1],
                          compute_metrics=accuracy)  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()
        trainer.train()
        return [
            {"loss": round(found["eval_loss"], 5), "accuracy": round(found["eval_accuracy"], 5)}
            for found in (before, trainer.evaluate())
        ]


def _pretrained(folder: Path) -> Path:
    """A ViT that knows the upright digits, as a checkpoint."""
    from transformers import ViTConfig, ViTForImageClassification

    if not folder.exists():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=8,
            patch_size=2, num_channels=1, num_labels=10,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        _, after = _train(model, _digits(lying=False), lr=1e-3, steps=1000, seed=0)
        click.echo(f"pretrained: accuracy {after['accuracy']:.1%} on upright digits")
        model.save_pretrained(folder)
    return folder


def _run(run: VisionRun, base: Path, work: Path) -> dict[str, Any]:
    from transformers import ViTForImageClassification

    began = time.monotonic()
    start = work / f"{run.start.name}-seed{run.seed}"
    adapter = start / ("folded" if run.start.folded else "adapter")
    if not start.exists():
        _surgery("init", base, "-o", start, *run.start.arguments(run.seed))
        if run.start.folded:
            _surgery("convert", start / "adapter", "-o", adapter, "--to", "lora")
    model = ViTForImageClassification.from_pretrained(start if run.start.residual == "baked" else base)
    if run.mode == "dora":
        model = _with_dora(model, adapter, ViTForImageClassification.from_pretrained(base))
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        step = None
    else:
        attach(model, Adapter.open(adapter))
        trainable, _ = freeze(model, run.mode)
        step = float(f"{first_step(model):.4g}")
    before, after = _train(model, _digits(lying=True), lr=run.lr, steps=_STEPS, seed=run.seed)
    return {
        "name": run.name,
        "run": {"start": run.start.name, "mode": run.mode, "lr": run.lr, "seed": run.seed, "steps": _STEPS},
        "trainable": trainable,
        "step_per_rate": step,
        "before": before,
        "after": after,
        "seconds": round(time.monotonic() - began, 1),
    } | provenance(torch.get_num_threads(), ("torch", "transformers", "scikit-learn"))


def _surgery(*arguments: object) -> None:
    command = [sys.executable, "-m", "nlora_surgery", *map(str, arguments)]
    subprocess.run(command, capture_output=True, check=True)


def _with_dora(model: nn.Module, adapter: Path, original: nn.Module) -> nn.Module:
    """PEFT's DoRA from a start in two matrices, so that the model is still the original one.

    DoRA scales each row of `base + product` to a magnitude. With a residual base that sum is the original weight, so
    the magnitudes to begin with are the norms of its rows.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(adapter))
    config.use_dora, config.inference_mode = True, False
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        weight = original.get_parameter(f"{module.removeprefix('base_model.model.')}.weight")
        tensors[f"{module}.lora_magnitude_vector"] = torch.linalg.vector_norm(weight.detach(), dim=1)
    wrapped: nn.Module = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("experiments-work/vision"), show_default=True,
              help="For the model and its starts; can be deleted.")  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(work: Path, results: Path) -> None:
    """Train what has no result yet."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    base = _pretrained(work / "vit")
    for trial in TRIALS:
        while (lr := trial.next_rate(mean_losses(trial, read_results(results).values()))) is not None:
            for run in runs_at(trial, lr):
                if run.name in read_results(results):
                    continue
                result = _run(run, base, work)
                append_result(results, result)
                click.echo(f"{run.name}: {result['after']['loss']:.4f}, {result['after']['accuracy']:.1%}")


if __name__ == "__main__":
    main()
