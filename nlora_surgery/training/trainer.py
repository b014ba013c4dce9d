"""train: an adapter on its frozen base, by transformers' Trainer; what is ours is what gets saved and resumed.

The Trainer does the loop, the schedule, gradient accumulation, many processes (torchrun, accelerate launch) and
reporting. Checkpoints hold the adapter in our format beside the Trainer's own state, never the base.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from nlora_surgery.adapter import FINGERPRINT_KEY, Adapter, AdapterConfig, write_adapter
from nlora_surgery.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, read_json
from nlora_surgery.errors import MissingExtraError, OptionError, OutputError, TrainingError
from nlora_surgery.factor import is_finite
from nlora_surgery.training.data import DataOptions, Examples, encode
from nlora_surgery.training.layers import adapter_tensors, attach, first_step, freeze, load_tensors
from nlora_surgery.training.loading import load_model, load_tokenizer, open_adapter

__all__ = [
    "AUTO_STEP",
    "AUTO_STEP_INTTUNE",
    "START_FOLDER",
    "TrainOptions",
    "TrainReport",
    "auto_rate",
    "default_mode",
    "evaluate",
    "join_processes",
    "train",
]

SCHEDULES: Final = ("cosine", "linear", "constant", "constant_with_warmup")
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

# With `--lr auto`: how far the first step moves the weights, relative to them; more where lora_N moves alone.
# docs/experiments.md has where these are from.
AUTO_STEP: Final = 0.0015
AUTO_STEP_INTTUNE: Final = 0.0025

START_FOLDER: Final = "start"  # in a run: where `train --init` puts what it starts from

_FAR: Final = 4  # times more or less than that: a notice says so

_OPTIONS_FILE: Final = "train_options.json"
_METRICS_FILE: Final = "metrics.jsonl"
_CURVE_FILE: Final = "loss.png"
_REPORT_FILE: Final = "train_report.json"  # written last
_WHOLE: Final = "whole"  # an empty file in a checkpoint that was written to its end
# What may differ between a run and its continuation without changing a number.
_FREE_OPTIONS: Final = {"save_steps", "save_limit", "report_to"}


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults are the paper's.

    Attributes:
        mode: `nlora`, `slora` (the same: all three matrices), `inttune` (lora_N alone) or `lora`; None is `nlora`
            for an adapter with a lora_N, else `lora`.
        epochs: passes over the data.
        max_steps: optimizer steps instead of epochs.
        learning_rate: peak; None is 2e-4, for `inttune` 2e-3; `auto` makes the first step of Adam move the adapted
            weights by `AUTO_STEP` of their norm, for `inttune` by `AUTO_STEP_INTTUNE` (see `layers.first_step`).
        batch_size: examples per step and process; with `grad_accum` the paper's 128.
        grad_accum: steps whose gradients are added up.
        warmup: share of the steps if below 1, else their number.
        schedule: one of `SCHEDULES`.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it.
        dropout: before the adapter's product.
        dtype: of the base; `auto` is as stored on a GPU, and fp32 on a CPU. The adapter is always trained in fp32.
        device: `auto` or `cpu`.
        gradient_checkpointing: recompute activations instead of keeping them.
        compile: run through torch.compile.
        seed: of the order of the data, and of dropout.
        eval_steps: evaluate every so many steps, besides before the first and after the last; None does not.
        save_steps: write a checkpoint every so many steps.
        save_limit: how many of them are kept.
        report_to: `none`, `tensorboard`, `wandb` or whatever else the Trainer knows.
        data: layout of the examples.
    """

    mode: str | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | Literal["auto"] | None = None
    batch_size: int = 4
    grad_accum: int = 32
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int = 100
    save_limit: int = 2
    report_to: str = "none"
    data: DataOptions = field(default_factory=DataOptions)

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            OptionError: with the option's name, what was found and what is possible.
        """
        self.data.check()
        for name in ("batch_size", "grad_accum", "save_steps", "save_limit"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name, value in (("max-steps", self.max_steps), ("eval-steps", self.eval_steps)):
            if value is not None and value < 1:
                raise OptionError(f"--{name} must be at least 1, not {value}")
        for name, number in (
            ("lr", None if self.learning_rate == "auto" else self.learning_rate),
            ("epochs", self.epochs),
            ("max-grad-norm", self.max_grad_norm),
        ):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise OptionError(f"--{name} must be positive and finite, not {number}")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise OptionError(f"--warmup must be a share below 1 or a number of steps, not {self.warmup}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout must be at least 0 and below 1, not {self.dropout}")
        for name, text, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, ("auto", "cpu")),
        ):
            if text not in known:
                raise OptionError(f"--{name} {text} is unknown; there are {', '.join(known)}")


@dataclass(frozen=True)
class TrainReport:
    """What a run came to.

    Attributes:
        mode: what was trained.
        trainable, parameters: their numbers, and those of base and adapter together.
        steps: optimizer steps done, those before a resumption included.
        train_loss: of the last step.
        start_eval_loss, eval_loss: on the evaluation data, before and after; None without.
        learning_rate: the peak.
        first_step: how far it moves the adapted weights in the first step, relative to them (see `layers.first_step`);
            None, as the rate, in the report of a run of an earlier version.
        truncated, dropped: examples that were too long, in the training data.
        trained_tokens: tokens that the loss is taken on, per epoch.
    """

    mode: str
    trainable: int
    parameters: int
    steps: int
    train_loss: float | None
    start_eval_loss: float | None
    eval_loss: float | None
    truncated: int
    dropped: int
    trained_tokens: int
    learning_rate: float | None = None
    first_step: float | None = None


def default_mode(adapter: Adapter) -> str:
    """`nlora` for an adapter with a `lora_N`, else `lora`."""
    return "nlora" if adapter.three_matrix else "lora"


def join_processes(device: str = "auto") -> None:
    """Under torchrun or accelerate launch, meet the other processes as the Trainer will.

    For work before `train` that the processes share: a group that it opened and closed could not be opened again.

    Args:
        device: as in `TrainOptions`.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    _need_accelerate()
    if _world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def train(
    base: Path,
    adapter: Path,
    data: str,
    out: Path,
    options: TrainOptions,
    *,
    eval_data: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Train an adapter on its base.

    Under torchrun or accelerate launch every process calls this; the first one writes.

    Args:
        base: directory of the model that the adapter belongs to.
        adapter: directory of the adapter to start from.
        data: see `data.read_rows`.
        out: directory of the run: checkpoints, `metrics.jsonl`, and at the end the adapter itself.
        options: how.
        eval_data: likewise to `data`, evaluated before, after, and every `options.eval_steps`.
        resume: go on from the last whole checkpoint in `out`, with the same options.
        overwrite: replace an earlier run.
        notice: told what the user should know.

    Returns:
        The figures of the run.

    Raises:
        OptionError, DataError, AdapterError, BaseMismatchError, CheckpointError: see their classes.
        TrainingError: the loss is not finite; or `out` holds a run that is neither to be resumed nor overwritten,
            or one of other options.
        MissingExtraError: accelerate is not installed.
    """
    options.check()
    _need_accelerate()
    opened = open_adapter(adapter, base)
    mode = options.mode or default_mode(opened)
    options = replace(options, mode=mode, learning_rate=options.learning_rate or (2e-3 if mode == "inttune" else 2e-4))
    with Checkpoint.open(base) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    identity = _identity(opened, data, eval_data, options)
    last_checkpoint = _find_run(out, identity, resume=resume, overwrite=overwrite, notice=notice)
    if resume and (out / _REPORT_FILE).exists():
        notice(f"{out} was finished by an earlier run of this command")
        return TrainReport(**read_json(out / _REPORT_FILE, TrainingError))

    tokenizer = load_tokenizer(base)
    examples = encode(data, tokenizer, options.data)
    eval_examples = encode(eval_data, tokenizer, options.data) if eval_data is not None else None
    _tell_lengths(examples, data, options.data, notice)
    if eval_examples is not None and eval_data is not None:
        _tell_lengths(eval_examples, eval_data, options.data, notice)

    model = load_model(base, dtype=options.dtype, device=options.device)
    attach(model, opened, dropout=options.dropout)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable, parameters = freeze(model, mode)
    per_rate = first_step(model)
    usual = _usual_step(mode)
    rate = auto_rate(mode, per_rate) if options.learning_rate == "auto" else options.learning_rate
    assert rate is not None
    notice(
        f"{mode} trains {trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%}) at lr {rate:.3g} on "
        f"{len(examples):,} examples; the first step moves the weights by about {rate * per_rate:.2g} of their norm"
    )
    if not usual / _FAR < rate * per_rate < usual * _FAR:
        notice(f"that is far from {usual:g}, which suited every start tried on a language model; --lr auto takes it")
    config = replace(
        opened.config,
        base_fingerprint=fingerprint,
        base_model_name_or_path=opened.config.base_model_name_or_path or str(base),
    )
    if last_checkpoint is None and _is_first():
        _make_run(out, identity)
    resolved = replace(options, learning_rate=rate)
    trainer = _trainer(model, tokenizer, config, out, resolved, examples, eval_examples, resuming=last_checkpoint)
    batch = options.batch_size * options.grad_accum * _world_size()
    if options.max_steps is None and options.epochs * len(examples) < 10 * batch:
        notice(f"fewer than 10 optimizer steps of {batch} examples; a lower --grad-accum makes more of them")
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    except KeyboardInterrupt:
        notice("the same command with --resume goes on from the last checkpoint")
        raise
    history = trainer.state.log_history
    evals = [entry for entry in history if "eval_loss" in entry]
    if eval_examples is not None and (not evals or evals[-1]["step"] < trainer.state.global_step):
        trainer.evaluate()
        evals = [entry for entry in history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    report = TrainReport(
        mode=mode,
        trainable=trainable,
        parameters=parameters,
        steps=trainer.state.global_step,
        train_loss=losses[-1] if losses else None,
        start_eval_loss=evals[0]["eval_loss"] if evals else None,
        eval_loss=evals[-1]["eval_loss"] if evals else None,
        truncated=examples.truncated,
        dropped=examples.dropped,
        trained_tokens=examples.trained_tokens,
        learning_rate=rate,
        first_step=rate * per_rate,
    )
    if trainer.args.should_save:
        write_adapter(out, config, adapter_tensors(model), {FINGERPRINT_KEY: fingerprint})
        _draw_curve(history, out / _CURVE_FILE)
        (out / _REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return report


def _usual_step(mode: str) -> float:
    return AUTO_STEP_INTTUNE if mode == "inttune" else AUTO_STEP


def auto_rate(mode: str, per_rate: float) -> float:
    """The learning rate of `--lr auto`, whose first step has the mode's usual size; to two digits: more would pretend.

    Args:
        mode: what is trained.
        per_rate: size of the first step per unit of learning rate, from `layers.first_step`.

    Raises:
        TrainingError: the adapter's first step moves nothing, whatever the rate.
    """
    if not per_rate > 0:
        raise TrainingError("--lr auto finds no rate: the adapter's product cannot move; name one")
    return float(f"{_usual_step(mode) / per_rate:.1e}")


def evaluate(
    base: Path,
    adapter: Path | None,
    data: str,
    options: TrainOptions,
    *,
    notice: Callable[[str], None] = lambda _: None,
) -> float:
    """The mean loss of a model, with an adapter on it or without, over the examples' responses.

    Args:
        base: directory of the model.
        adapter: directory of an adapter for it, or None.
        data: see `data.read_rows`.
        options: `data`, `batch_size`, `dtype` and `device` count.
        notice: told what the user should know.

    Raises:
        As `train`.
    """
    options.check()
    _need_accelerate()
    opened = None if adapter is None else open_adapter(adapter, base)
    tokenizer = load_tokenizer(base)
    examples = encode(data, tokenizer, options.data)
    _tell_lengths(examples, data, options.data, notice)
    model = load_model(base, dtype=options.dtype, device=options.device)
    if opened is not None:
        attach(model, opened)
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(model, tokenizer, None, Path(directory), options, None, examples, resuming=None)
        return float(trainer.evaluate()["eval_loss"])


# --- the run's directory -----------------------------------------------------------------------------------


def _identity(adapter: Adapter, data: str, eval_data: str | None, options: TrainOptions) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values."""
    plain = {name: value for name, value in asdict(options).items() if name not in _FREE_OPTIONS}
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "adapter": adapter.file.fingerprint(),
                "data": data,
                "eval_data": eval_data,
                "processes": _world_size(),
                **plain,
            }
        )
    )


def _find_run(
    out: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, notice: Callable[[str], None]
) -> Path | None:
    """Find the checkpoint to go on from, and refuse what is in the way; writes nothing.

    Returns:
        The last whole checkpoint, or None to begin at the beginning.
    """
    record = out / _OPTIONS_FILE
    if record.exists() and resume:
        earlier = read_json(record, TrainingError)
        differing = sorted(name for name in {*earlier, *identity} if earlier.get(name) != identity.get(name))
        if differing:
            name = differing[0]
            raise TrainingError(
                f"{out} is a run with another {', '.join(differing)} ({name} was {earlier.get(name)!r}, is "
                f"{identity.get(name)!r}); give the same options, or --overwrite"
            )
        last = _last_checkpoint(out)
        notice(f"going on from {last.name}" if last else f"{out} has no whole checkpoint yet; beginning anew")
        return last
    if _is_first() and out.exists() and any(path.name != START_FOLDER for path in out.iterdir()):
        if not record.exists():
            raise TrainingError(f"{out} exists and is no run of train; name another directory")
        if not overwrite:
            raise TrainingError(f"{out} holds a run already; go on with it by --resume, or replace it by --overwrite")
    return None


def _make_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the run's directory, without what an earlier run left there."""
    for path in _run_files(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _OPTIONS_FILE).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write into {out}: {error.strerror}") from error


def _run_files(out: Path) -> list[Path]:
    """What a run leaves in its directory; everything else in there is not ours to delete."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, _OPTIONS_FILE, _METRICS_FILE, _CURVE_FILE, _REPORT_FILE)
    return [*(out / name for name in names if (out / name).exists()), *out.glob("checkpoint-*")]


def _last_checkpoint(out: Path) -> Path | None:
    whole = [path.parent for path in out.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell_lengths(examples: Examples, data: str, options: DataOptions, notice: Callable[[str], None]) -> None:
    if examples.truncated:
        notice(
            f"{examples.truncated} of {len(examples) + examples.dropped} examples of {data} have more than "
            f"{options.max_length} tokens and were cut there (--max-length, --too-long)"
        )
    if examples.dropped:
        notice(f"{examples.dropped} examples of {data} were left out: too long, with nothing of the response left")


# --- transformers' Trainer ---------------------------------------------------------------------------------


def _need_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('training takes accelerate: pip install "nlora-surgery[train]"') from error


def _trainer(
    model: Any,
    tokenizer: Any,
    config: AdapterConfig | None,
    out: Path,
    options: TrainOptions,
    examples: Examples | None,
    eval_examples: Examples | None,
    *,
    resuming: Path | None,
) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class AdapterTrainer(Trainer):  # type: ignore[misc]
        """A Trainer whose checkpoints hold the adapter alone, and which stops at the first loss that is not finite."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if not self.args.should_save:
                return
            assert config is not None
            tensors = adapter_tensors(self.accelerator.unwrap_model(self.model))
            if not all(map(is_finite, tensors.values())):
                raise TrainingError(
                    f"the adapter holds NaN or infinity after step {self.state.global_step}; {_last_good(out)} a lower "
                    "--lr may keep it finite"
                )
            metadata = {FINGERPRINT_KEY: config.base_fingerprint or ""}
            write_adapter(Path(output_dir or self.args.output_dir), config, tensors, metadata)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / _WHOLE).touch()

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            with Checkpoint.open_file(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS) as file:
                load_tensors(self.model, {name: file.tensor(name) for name in file.tensors})

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"the loss became {float(loss)} in step {self.state.global_step + 1}; {_last_good(out)} a lower "
                    "--lr may keep it finite"
                )
            return loss

    class Metrics(TrainerCallback):  # type: ignore[misc]
        """Every figure that the Trainer logs, one JSON object a line."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:  # what a killed run wrote beyond its last checkpoint comes again
                _keep_lines(out / _METRICS_FILE, state.global_step if resuming else 0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if state.is_world_process_zero and config is not None:
                with open(out / _METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    class LossBar(ProgressCallback):  # type: ignore[misc]
        """The Trainer's own progress bar, with the loss on it instead of a line for every step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if logs and name in logs}
            if state.is_world_process_zero and self.training_bar is not None and shown:
                self.training_bar.set_postfix(shown)

    evaluates = eval_examples is not None and examples is not None
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=0.0 if options.learning_rate in (None, "auto") else float(options.learning_rate),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.schedule,
        optim="adamw_torch",
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu",
        torch_compile=options.compile,
        eval_strategy="steps" if evaluates and options.eval_steps else "no",
        eval_steps=options.eval_steps,
        eval_on_start=evaluates and resuming is None,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_limit,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # a frozen start never changes
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # ours takes its place
    )
    try:
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=eval_examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[Metrics, *([LossBar] if sys.stderr.isatty() else [])],
        )
    except (RuntimeError, ValueError) as error:
        if options.report_to == "none":
            raise
        raise OptionError(f"--report-to {options.report_to} cannot be had: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_good(out: Path) -> str:
    last = _last_checkpoint(out)
    return f"the last good adapter is {last};" if last else "no checkpoint had been written;"


def _keep_lines(path: Path, steps: int) -> None:
    """Cut a metrics file behind the last line of a step that is not done again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps and steps]
    path.write_text("".join(kept), encoding="utf-8")


def _draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """A picture of the losses, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, title in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=title, marker="o" if len(points) < 20 else None)
    axes.legend()
    figure.savefig(path, dpi=150)
