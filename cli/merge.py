"""`nlora_surgery merge`."""

from __future__ import annotations

from pathlib import Path

import click
from nlora_surgery_cli.options import WritingCommand, locate_adapter
from nlora_surgery_cli.render import ProgressBar, bytes_text, echo_json, figure, first_rank

from nlora_surgery.errors import OptionError

__all__ = ["command"]


@click.command("merge", cls=WritingCommand)
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--weight", "weights", type=float, multiple=True, help="Times an adapter's change; one per ADAPTER.")
@click.option("--untie", is_flag=True, help="Give a tied head its own tensor where head or embedding changes.")
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    weights: tuple[float, ...],
    untie: bool,
    device: str,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTERs into BASE, the model that they belong to.

    Streams the shards; one sum in fp32, one rounding. Each is a directory, a Hub id, or a Kohya file. Every
    key of every adapter must match a tensor of the base.
    """
    if weights and len(weights) != len(adapters):
        raise OptionError(f"--weight is given {len(weights)} times for {len(adapters)} adapters; give one for each")
    from nlora_surgery.hub import fetch
    from nlora_surgery.surgery.merge import merge, plan_merge

    factors = weights or [1.0] * len(adapters)
    pairs = [(locate_adapter(name), factor) for name, factor in zip(adapters, factors, strict=True)]
    plan = plan_merge(fetch(base), pairs, out, untie=untie, base_name=base, device=device)
    total = len(plan.base.tensors) + len(plan.engine.appended)
    if dry_run:
        if as_json:
            echo_json({"out": str(out), "size_bytes": plan.engine.size_bytes, "changed": list(plan.engine.edits)})
        else:
            click.echo(
                f"Would write {out}: {bytes_text(plan.engine.size_bytes)}, {len(plan.engine.edits)} of {total} tensors "
                "changed. Nothing was written."
            )
        return
    with ProgressBar("merge") as progress:
        manifest = merge(plan, device=device, overwrite=overwrite, max_memory=max_memory, progress=progress)
    if not first_rank():
        return
    if as_json:
        echo_json(manifest)
        return
    ratios = [change["delta_ratio"] for change in manifest["changed"] if change["delta_ratio"] is not None]
    largest = figure(max(ratios, default=None), ".3g")
    click.echo(
        f"Wrote {out}: {len(manifest['changed'])} of {total} tensors changed (largest ‖change‖/‖weight‖ {largest}), "
        f"{bytes_text(plan.engine.size_bytes)}."
    )
