"""`nlora_surgery convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from nlora_surgery_cli.options import WritingCommand, locate_adapter
from nlora_surgery_cli.render import ProgressBar, bytes_text, echo_json, first_rank, warn

from nlora_surgery.options import ADAPTER_DTYPES, SCALE_SPLITS

__all__ = ["command"]


@click.command("convert", cls=WritingCommand, uses_device=False)
@click.argument("adapter")
@click.option("--to", type=click.Choice(["lora", "slora"]), default="lora", show_default=True, help="The form wanted.")
@click.option("--base", help="The model that the result is for; the original, to leave a residual base.")
@click.option("--initial", help="The adapter as it was before training, to be subtracted.")
@click.option("--rank", "-r", type=int, help="Recompress to it and report the error.  [default: exact]")
@click.option("--scale-split", type=click.Choice(SCALE_SPLITS), default="keep", show_default=True,
              help="Of slora: how the scale is spread.")  # fmt: skip
@click.option("--dtype", type=click.Choice(ADAPTER_DTYPES), help="Of the result.  [default: the adapter's]")
@click.option("--for", "target", type=click.Choice(["vllm"]), help="What will load it: one rank, alpha = r, 16 bits.")
def command(
    adapter: str,
    out: Path,
    base: str | None,
    initial: str | None,
    target: str | None,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert ADAPTER between LoRA and SLoRA, or bring it to the original base.

    ADAPTER is a directory, a Hub id, or a Kohya file. An adapter trained on a residual base becomes a LoRA of
    the original: of rank 2r, of rank r where one side never moved, or of --rank with the error reported.
    """
    from nlora_surgery.hub import fetch
    from nlora_surgery.surgery.convert import ConvertOptions, convert, plan_convert

    convert_options = ConvertOptions(vllm=target == "vllm", **options)
    convert_options.check()
    plan = plan_convert(
        locate_adapter(adapter),
        out,
        convert_options,
        base=fetch(base) if base is not None else None,
        base_name=base,
        initial=locate_adapter(initial) if initial is not None else None,
    )
    if dry_run:
        ways = sorted({each.way for each in plan.modules})
        if as_json:
            echo_json({"out": str(out), "size_bytes": plan.engine.size_bytes, "r": plan.config.r, "ways": ways})
        else:
            click.echo(
                f"Would write {out}: {plan.config.peft_type} of rank {plan.config.r} in {len(plan.modules)} modules, "
                f"{bytes_text(plan.engine.size_bytes)}. Nothing was written."
            )
        return
    with ProgressBar("convert") as progress:
        manifest = convert(plan, overwrite=overwrite, max_memory=max_memory, progress=progress)
    if not first_rank():
        return
    if as_json:
        echo_json(manifest)
        return
    worst = max((module["error"] for module in manifest["modules"]), default=0.0)
    if worst > 1e-2:
        warn(f"the conversion loses up to {worst:.1%} of a module's change; a larger --rank loses less")
    click.echo(
        f"Wrote {out}: {plan.config.peft_type} of rank {plan.config.r} in {len(plan.modules)} modules, largest error "
        f"{worst:.1e} of a module's change, {bytes_text(plan.engine.size_bytes)}."
    )
    if target == "vllm":
        click.echo(f"vLLM needs --max-lora-rank {plan.max_lora_rank}.")
