"""`nlora_surgery train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from nlora_surgery_cli.options import rate_or_auto, split_names
from nlora_surgery_cli.render import count_text, echo_json, figure, first_rank, quiet_transformers

from nlora_surgery.errors import AdapterError, OptionError
from nlora_surgery.options import METHODS, FactorOptions

__all__ = ["command"]


@click.command("train")
@click.argument("model")
@click.option("--data", required=True, help="Training examples: .jsonl, .json, .csv, .parquet, or a Hub dataset id.")
@click.option("--eval-data", help="Examples to evaluate on, before, after and at --eval-steps.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory of the run.")
@click.option("--train", "mode", type=click.Choice(["nlora", "slora", "inttune", "lora"]),
              help="What is trained: all three matrices (nlora, slora), lora_N alone (inttune), or plain LoRA.  "
                   "[default: by the adapter]")  # fmt: skip
@click.option("--adapter", help="Adapter of MODEL to start from, where MODEL does not hold it.")
@click.option("--init", "method", type=click.Choice(METHODS),
              help="Start from MODEL itself, without an init before: its start is subtracted virtually.")  # fmt: skip
@click.option("--rank", "-r", type=int, default=64, show_default=True, help="With --init: r of every adapted module.")
@click.option("--targets", multiple=True, callback=split_names, help="With --init: as in init.")
@click.option("--exclude", multiple=True, callback=split_names, help="With --init: as in init.")
@click.option("--epochs", type=float, default=1.0, show_default=True)
@click.option("--max-steps", type=int, help="Optimizer steps, instead of epochs.")
@click.option("--lr", "learning_rate", callback=rate_or_auto, metavar="FLOAT|auto",
              help="Peak learning rate of AdamW; auto finds one for the start's own scale.  "
                   "[default: 2e-4, inttune 2e-3]")  # fmt: skip
@click.option("--batch-size", type=int, default=4, show_default=True, help="Examples per step and process.")
@click.option("--grad-accum", type=int, default=32, show_default=True,
              help="Steps whose gradients add up; with 4 examples each that is the paper's batch of 128.")  # fmt: skip
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of prompt and response.")
@click.option("--too-long", type=click.Choice(["truncate", "drop", "error"]), default="truncate", show_default=True,
              help="What happens to longer examples; they are counted.")  # fmt: skip
@click.option("--template", type=click.Choice(["auto", "alpaca", "chat", "raw"]), default="auto", show_default=True,
              help="How prompts are laid out. auto: the Alpaca prompt for question/answer and instruction/output, the "
                   "chat template for messages, nothing for prompt/completion and text.")  # fmt: skip
@click.option("--prompt-field", help="Field of the prompt, with any name.")
@click.option("--completion-field", help="Field of the response.")
@click.option("--warmup", type=float, default=0.03, show_default=True, help="Share of the steps, or their number.")
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant", "constant_with_warmup"]),
              default="cosine", show_default=True)  # fmt: skip
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True)
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Before the adapter's product.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Of the base; auto is as stored on a GPU, float32 on a CPU. The adapter is "
                                      "trained in float32.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute activations instead of keeping them.")
@click.option("--compile", is_flag=True, help="Run the model through torch.compile.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eval-steps", type=int, help="Evaluate every so many steps.")
@click.option("--save-steps", type=int, default=100, show_default=True, help="Write a checkpoint every so many steps.")
@click.option("--save-limit", type=int, default=2, show_default=True, help="Checkpoints that are kept.")
@click.option("--report-to", default="none", show_default=True, help="tensorboard, wandb, …: as transformers has them.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the run.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run.")
@click.option("--eval-only", is_flag=True, help="Print the loss on --data; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str,
    data: str,
    eval_data: str | None,
    out: Path | None,
    adapter: str | None,
    method: Any,
    rank: int,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    max_length: int,
    too_long: str,
    template: str,
    prompt_field: str | None,
    completion_field: str | None,
    resume: bool,
    overwrite: bool,
    eval_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the adapter of MODEL, an output of init, on examples; or of a plain model, with --init.

    The loss is taken on the responses only. The defaults are the paper's: AdamW, lr 2e-4 (IntTune 2e-3), cosine
    with 3 % warm-up, alpha = r, no dropout, batch 128. Under torchrun or accelerate launch every process takes
    its share of each batch.
    """
    if out is None and not eval_only:
        raise OptionError("--out is missing: name the directory of the run")
    if method is not None and (adapter is not None or eval_only):
        raise OptionError("--init makes a new adapter; it goes neither with --adapter nor with --eval-only")

    from nlora_surgery_cli.options import locate_base_and_adapter

    from nlora_surgery.surgery.prepare import InitOptions
    from nlora_surgery.training.data import DataOptions
    from nlora_surgery.training.trainer import TrainOptions, evaluate, join_processes, train

    quiet_transformers()
    layout = DataOptions(prompt_field, completion_field, template, max_length, too_long)
    train_options = TrainOptions(data=layout, **options)
    train_options.check()
    base, found = locate_base_and_adapter(model, adapter)
    if eval_only:
        loss = evaluate(base, found, data, train_options, notice=_notice)
        if first_rank():
            echo_json({"loss": loss}) if as_json else click.echo(f"loss {loss:.4f} on {data}")
        return
    assert out is not None
    if method is not None:
        if found is not None:
            raise OptionError(f"{model} has an adapter already; leave --init away to train that")
        join_processes(train_options.device)
        residual = "none" if method == "lora" else "virtual"
        factor = FactorOptions(method=method)
        init_options = InitOptions(rank=rank, factor=factor, residual=residual, targets=targets, exclude=exclude)
        found = _start(model, base, out, init_options, resume=resume, overwrite=overwrite)
    if found is None:
        raise AdapterError(
            f"{model} holds no adapter to train; run init on it first, or give --init nystrom --rank {rank}"
        )
    report = train(
        base, found, data, out, train_options, eval_data=eval_data, resume=resume, overwrite=overwrite, notice=_notice
    )
    if not first_rank():
        return
    if as_json:
        echo_json(asdict(report))
        return
    evaluated = f", eval loss {figure(report.start_eval_loss, '.4f')} → {figure(report.eval_loss, '.4f')}"
    click.echo(
        f"Wrote {out}: {report.mode}, {report.steps} steps, {count_text(report.trainable)} trainable parameters, loss "
        f"{figure(report.train_loss, '.4f')}{evaluated if eval_data else ''}."
    )


def _start(name: str, base: Path, out: Path, options: Any, *, resume: bool, overwrite: bool) -> Path:
    """Make the adapter that the run starts from, beside what the run will write."""
    from nlora_surgery.surgery.prepare import plan_init, prepare
    from nlora_surgery.training.layers import find_modules
    from nlora_surgery.training.loading import load_skeleton
    from nlora_surgery.training.trainer import START_FOLDER

    start = out / START_FOLDER
    if not (resume and start.exists()):
        plan = plan_init(base, start, options, source_name=name)
        find_modules([target.module for target in plan.targets], load_skeleton(base), name)
        prepare(plan, overwrite=overwrite)
    return start / "adapter"


def _notice(text: str) -> None:
    if first_rank():
        click.echo(text, err=True)
