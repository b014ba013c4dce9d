"""`nlora_surgery inspect`."""

from __future__ import annotations

from typing import Any

import click
from nlora_surgery_cli.options import split_names
from nlora_surgery_cli.render import (
    ProgressBar,
    bytes_text,
    count_text,
    echo_json,
    echo_table,
    echo_targets,
    figure,
    figures_table,
    inputs_text,
    warn,
)

from nlora_surgery.errors import OptionError

__all__ = ["command"]


@click.command("inspect")
@click.argument("path")
@click.option("--rank", "-r", type=int,
              help="The rank whose cost is told; if it is given, also what it, half of it and twice as much can "
                   "capture, which takes reading some layers.  [default: 64, from headers alone]")  # fmt: skip
@click.option("--targets", multiple=True, callback=split_names, help="Of a checkpoint: as init would be given.")
@click.option("--exclude", multiple=True, callback=split_names, help="The same.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(path: str, rank: int | None, targets: list[str], exclude: list[str], as_json: bool) -> None:
    """Say what PATH is (checkpoint, adapter, prepared), and what a rank costs and captures.

    PATH is a directory, or a Hub id.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"--rank must be at least 1, not {rank}")
    from nlora_surgery.hub import fetch
    from nlora_surgery.spectra import MOST_RANK, SpectraOptions
    from nlora_surgery.surgery.inspect import inspect

    directory = fetch(path)
    ranks = sorted({each for each in (rank // 2, rank, 2 * rank) if 1 <= each <= MOST_RANK}) if rank else []
    spectra = SpectraOptions(ranks) if ranks else None
    with ProgressBar("inspect") as progress:
        found = inspect(directory, rank or 64, targets, exclude, spectra=spectra, progress=progress)
    if as_json:
        echo_json(found)
        return
    {"checkpoint": _echo_checkpoint, "adapter": _echo_adapter, "prepared": _echo_prepared}[found["kind"]](path, found)
    if "spectra" in found:
        _echo_spectra(found["spectra"])
    if "no_spectra" in found:
        warn(found["no_spectra"])


def _echo_checkpoint(path: str, found: dict[str, Any]) -> None:
    size = sum(found["files"].values())
    dtypes = ", ".join(f"{dtype} {count_text(count)}" for dtype, count in found["dtypes"].items())
    click.echo(
        f"{path}: a checkpoint ({found['model_type'] or 'no model_type'}), {count_text(found['parameters'])} "
        f"parameters ({dtypes}), {found['tensors']} tensors in {len(found['files'])} files, {bytes_text(size)}"
    )
    for name in found["not_loaded"]:
        warn(f"{name} holds other weights, which nothing here loads")
    if "refused" in found:
        warn(found["refused"])
        return
    rank, cost = found["rank"], found["cost"]
    echo_targets(found["targets"], "slora_parameters")
    click.echo(
        f"Trainable at r = {rank}: LoRA {count_text(cost['lora'])}, SLoRA and NLoRA {count_text(cost['slora'])}, "
        f"IntTune {count_text(cost['inttune'])} ({cost['inttune'] / cost['lora']:.2%} of LoRA's). An adapter file "
        f"takes {bytes_text(cost['adapter_bytes'])} in fp32."
    )


def _echo_adapter(path: str, found: dict[str, Any]) -> None:
    residual = f", {found['residual']} residual" if found["residual"] else ""
    scaling = "alpha / sqrt(r)" if found["use_rslora"] else "alpha / r"
    click.echo(
        f"{path}: an adapter ({found['format']}, {found['matrices']} matrices{residual}), "
        f"{count_text(found['parameters'])} parameters ({', '.join(found['dtypes'])}), r = {found['r']}, "
        f"lora_alpha = {found['lora_alpha']:g}, scaling {scaling}"
    )
    click.echo(
        f"made for {found['base'] or 'a base it does not name'}, {found['base_fingerprint'] or 'no fingerprint'}"
    )
    echo_table(
        ("module", "in → out", "count", "r", "scaling"),
        [
            (
                group["kind"],
                f"{inputs_text(group)} → {group['out_features']}",
                f"×{group['count']}",
                str(group["r"]),
                figure(group["scaling"], "g"),
            )
            for group in found["modules"]
        ],
    )


def _echo_prepared(path: str, found: dict[str, Any]) -> None:
    options = found["options"]
    click.echo(
        f"{path}: prepared from {found['source']['name']} by {options['method']} ({options['sampling']} sampling, "
        f"{options['scale_split']} split) at rank {options['rank']}, "
        f"{options['residual']} residual, seed {options['seed']}"
    )
    echo_table(*figures_table(found["figures"]))
    for text in found["warnings"]:
        warn(text)
    _echo_adapter(f"{path}/adapter", found["adapter"])


def _echo_spectra(spectra: dict[str, Any]) -> None:
    ranks = [str(rank) for rank in spectra["ranks"]]
    rows = [
        (
            kind["kind"],
            f"{kind['measured']} of {kind['modules']}",
            *(figure(kind["energy"][rank], ".1%") for rank in ranks),
        )
        for kind in spectra["kinds"]
    ]
    means = ("all", "", *(figure(spectra["energy"][rank], ".1%") for rank in ranks))
    costs = [
        (name, "", *(write(spectra["costs"][rank][what]) for rank in ranks))
        for name, what, write in (
            ("LoRA parameters", "lora", count_text),
            ("SLoRA parameters", "slora", count_text),
            ("IntTune parameters", "inttune", count_text),
            ("adapter file, fp32", "adapter_bytes", bytes_text),
        )
    ]
    click.echo("The most energy that a rank can capture, the share of ‖weight‖²:")
    echo_table(("module", "measured", *(f"r = {rank}" for rank in ranks)), [*rows, means, *costs])
    if not all(kind["exact"] for kind in spectra["kinds"]):
        click.echo("Sketched, hence never too high; docs/report.md says by how much too low.")
    for tensor in spectra["not_finite"]:
        warn(f"{tensor} holds NaN or infinity")
