"""`nlora_surgery generate`."""

from __future__ import annotations

import sys

import click
from nlora_surgery_cli.render import echo_json, quiet_transformers

__all__ = ["command"]


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, help="What to ask; - reads it from stdin.")
@click.option("--adapter", help="Adapter of MODEL, where MODEL does not hold it.")
@click.option("--template", type=click.Choice(["auto", "alpaca", "chat", "raw"]), default="auto", show_default=True,
              help="How the prompt is laid out. auto: alpaca with an adapter, else by the chat template.")  # fmt: skip
@click.option("--max-new-tokens", type=int, default=200, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the most likely token.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Of the base; auto is as stored on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print prompt and answer as JSON.")
def command(
    model: str,
    prompt: str,
    adapter: str | None,
    template: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Let MODEL answer a prompt: an output of init, a run of train, an adapter, or a plain model."""
    from nlora_surgery_cli.options import locate_base_and_adapter

    from nlora_surgery.training.generate import generate

    quiet_transformers()
    base, found = locate_base_and_adapter(model, adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    answer = generate(
        base,
        found,
        text,
        template=template,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        write=None if as_json else lambda piece: click.echo(piece, nl=False),
    )
    if as_json:
        echo_json({"prompt": text, "answer": answer})
    else:
        click.echo()
