"""`nlora_surgery extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from nlora_surgery_cli.options import WritingCommand, split_names
from nlora_surgery_cli.render import ProgressBar, bytes_text, echo_json, echo_table, first_rank, warn

from nlora_surgery.options import ADAPTER_DTYPES

__all__ = ["command"]


@click.command("extract", cls=WritingCommand)
@click.argument("base")
@click.argument("tuned")
@click.option("--rank", "-r", type=int, default=64, show_default=True, help="r of every changed module, at most.")
@click.option("--targets", multiple=True, callback=split_names,
              help="Factor these, named as for init; convolutions only so.  "
                   "[default: every changed linear]")  # fmt: skip
@click.option("--to", type=click.Choice(["lora", "slora"]), default="lora", show_default=True, help="The form wanted.")
@click.option("--method", type=click.Choice(["sketch", "svd"]), default="sketch", show_default=True)
@click.option("--tolerance", type=float, default=0.0, show_default=True,
              help="Lower a module's rank while ‖error‖/‖change‖ stays below this.")  # fmt: skip
@click.option("--others", type=click.Choice(["save", "refuse", "ignore"]), default="save", show_default=True,
              help="Other changed tensors: into modules_to_save, an error, or left out.")  # fmt: skip
@click.option("--dtype", type=click.Choice(ADAPTER_DTYPES), default="float32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sketch.")
def command(
    base: str,
    tuned: str,
    out: Path,
    device: str,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Extract the adapter that turns BASE into TUNED.

    Both are directories or Hub ids, of one architecture. Equal tensors cost a comparison; the error is
    reported for each module and for all.
    """
    from nlora_surgery.hub import fetch
    from nlora_surgery.surgery.extract import ExtractOptions, extract, plan_extract

    extract_options = ExtractOptions(**options)
    extract_options.check()
    plan = plan_extract(fetch(base), fetch(tuned), out, extract_options, base_name=base, device=device)
    what = "target" if extract_options.targets else "linear weight"
    summary = f"{len(plan.modules)} {what}s changed, {len(plan.replaced)} other tensors go to modules_to_save"
    if first_rank():
        for name in plan.ignored:
            warn(f"{name} changed, but is no {what}: it is left out")
        for name in plan.replaced:
            click.echo(f"modules_to_save: {name}", err=True)
    if dry_run:
        if as_json:
            modules = [shape.module for shape in plan.modules.values()]
            echo_json(
                {"out": str(out), "modules": modules, "replaced": list(plan.replaced), "ignored": list(plan.ignored)}
            )
        else:
            click.echo(
                f"Would write {out}: {summary}, {bytes_text(plan.engine.size_bytes)} at most. Nothing was written."
            )
        return
    with ProgressBar("extract") as progress:
        manifest = extract(plan, device=device, overwrite=overwrite, max_memory=max_memory, progress=progress)
    if not first_rank():
        return
    if as_json:
        echo_json(manifest)
        return
    echo_table(("module", "r", "error"), [(m["module"], str(m["r"]), f"{m['error']:.2e}") for m in manifest["modules"]])
    click.echo(f"Wrote {out}: {summary}; ‖error‖/‖change‖ over all {manifest['error']:.2e}.")
