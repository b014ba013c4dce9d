"""`nlora_surgery init`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from nlora_surgery_cli.options import WritingCommand, beside, split_names
from nlora_surgery_cli.render import (
    ProgressBar,
    bytes_text,
    count_text,
    echo_json,
    echo_table,
    echo_targets,
    figures_table,
    first_rank,
    warn,
)

from nlora_surgery.options import ADAPTER_DTYPES, METHODS, RESIDUALS, SAMPLINGS, SCALE_SPLITS, FactorOptions

__all__ = ["command"]


@click.command("init", cls=WritingCommand)
@click.argument("model")
@click.option("--rank", "-r", type=int, default=64, show_default=True, help="r of every adapted module.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory to make.  [default: MODEL-nlora-rRANK]")
@click.option("--method", type=click.Choice(METHODS), default="nystrom", show_default=True,
              help="How the factors start.")  # fmt: skip
@click.option("--sampling", type=click.Choice(SAMPLINGS), default="leading", show_default=True,
              help="Which rows and columns the Nyström methods take.")  # fmt: skip
@click.option("--scale-split", type=click.Choice(SCALE_SPLITS),
              help="How the product's scale is spread over the factors.  "
                   "[default: keep for Nyström, balanced for sketch and pissa]")  # fmt: skip
@click.option("--residual", type=click.Choice(RESIDUALS), default="baked", show_default=True,
              help="baked: write the residual base. virtual: write only the adapter, with its start. "
                   "none: subtract nothing, as the paper's code does.")  # fmt: skip
@click.option("--format", "adapter_format", type=click.Choice(["slora", "lora"]), default="slora", show_default=True,
              help="Three matrices, or (pissa, pissa-fast) plain PEFT LoRA.")  # fmt: skip
@click.option("--alpha", type=float, help="lora_alpha.  [default: the rank, so that the scaling is 1]")
@click.option("--targets", multiple=True, callback=split_names,
              help="Module names, a regex for whole module paths, or all-linear.  "
                   "[default: every linear inside the blocks]")  # fmt: skip
@click.option("--exclude", multiple=True, callback=split_names, help="Names or a regex to leave out.")
@click.option("--adapter-dtype", type=click.Choice(ADAPTER_DTYPES), default="float32", show_default=True)
@click.option("--power-steps", type=int, help="Of sketch (default 2) and pissa-fast (default 4).")
@click.option("--oversampling", type=int, default=16, show_default=True, help="Extra columns of a sketch.")
@click.option("--pinv-rtol", type=float, default=0.1, show_default=True,
              help="nystrom-pinv drops singular values below this share of the largest; 0 keeps all.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--allow-nonfinite", is_flag=True, help="Leave weights with NaN or infinity alone instead of failing.")
def command(
    model: str,
    rank: int,
    out: Path | None,
    adapter_format: str,
    device: str,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Factor MODEL's weights: write the residual base and the adapter.

    MODEL is a directory, or a Hub id (org/name[@revision]). The effective weights of the output equal the
    original's to the rounding of what is stored.
    """
    from nlora_surgery.hub import fetch
    from nlora_surgery.manifest import summarize
    from nlora_surgery.surgery.prepare import InitOptions, plan_init, prepare

    factor = FactorOptions(
        two_matrix=adapter_format == "lora",
        **{
            name: options.pop(name)
            for name in ("method", "sampling", "scale_split", "power_steps", "oversampling", "pinv_rtol")
        },
    )
    init_options = InitOptions(rank=rank, factor=factor, **options)
    init_options.check()
    directory = fetch(model)
    plan = plan_init(
        directory, out or beside(model, directory, f"-nlora-r{rank}"), init_options, source_name=model, device=device
    )
    if dry_run:
        _echo_plan(plan, as_json=as_json)
        return
    with ProgressBar("init") as progress:
        manifest = prepare(plan, device=device, overwrite=overwrite, max_memory=max_memory, progress=progress)
    if not first_rank():
        return
    rows, warnings = summarize(manifest)
    for text in warnings:
        warn(text)
    if as_json:
        echo_json(manifest)
        return
    _echo_report(plan, manifest, rows)


def _echo_plan(plan: Any, *, as_json: bool) -> None:
    from nlora_surgery.targets import describe_targets

    groups = describe_targets(plan.source, plan.targets)
    if as_json:
        echo_json(
            {
                "out": str(plan.out),
                "size_bytes": plan.engine.size_bytes,
                "parameters": plan.parameters,
                "modules": groups,
                "left_out": list(plan.left_out),
            }
        )
        return
    echo_targets(groups, "slora_parameters" if plan.options.three_matrix else "lora_parameters")
    click.echo(
        f"Would write {plan.out}: {bytes_text(plan.engine.size_bytes)}, an adapter of {count_text(plan.parameters)} "
        f"parameters in {len(plan.targets)} modules. Nothing was written."
    )


def _echo_report(plan: Any, manifest: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    echo_table(*figures_table(rows))
    written = "residual base and adapter" if manifest["options"]["residual"] == "baked" else "adapter"
    click.echo(
        f"Wrote {plan.out}: {written}, {count_text(manifest['adapter']['parameters'])} trainable parameters in "
        f"{len(manifest['modules'])} modules, {bytes_text(plan.engine.size_bytes)} in all."
    )
    if manifest["options"]["residual"] == "baked":
        click.echo(f"Check it: nlora_surgery verify {plan.out} --against {manifest['source']['name']}")
