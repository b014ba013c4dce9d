"""`nlora_surgery report`."""

from __future__ import annotations

from pathlib import Path

import click
from nlora_surgery_cli.options import beside, split_names
from nlora_surgery_cli.render import ProgressBar, bytes_text, echo_json, warn

from nlora_surgery.errors import OptionError

__all__ = ["command"]


@click.command("report")
@click.argument("path")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File to write.  [default: PATH-report.html]")
@click.option(
    "--base", help="What PATH was made for or from, where it does not hold or name it: a directory or Hub id."
)
@click.option("--rank", "-r", type=int, help="The rank that is marked.  [default: the adapter's own, or 64]")
@click.option("--ranks", help="Ranks to compare.  [default: 4,8,16,32,64,128,256]")
@click.option("--layers", default="5", show_default=True,
              help="Layers whose spectra are measured, for each kind of module; or all.")  # fmt: skip
@click.option("--targets", multiple=True, callback=split_names, help="Of a checkpoint, as in init.")
@click.option("--exclude", multiple=True, callback=split_names, help="Names or a regex to leave out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sketches.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda (all GPUs), cuda:N or mps.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier page.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    path: str,
    out: Path | None,
    base: str | None,
    rank: int | None,
    ranks: str | None,
    layers: str,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write one HTML page about PATH: spectra, what ranks capture and cost, heat maps, losses.

    PATH is a checkpoint, an output of init, an adapter or a run of train: a directory, or a Hub id. The page
    holds everything and loads nothing.
    """
    from nlora_surgery.hub import fetch
    from nlora_surgery.report import ReportOptions, report
    from nlora_surgery.spectra import RANKS, SpectraOptions

    spectra = SpectraOptions(_numbers(ranks) if ranks else RANKS, _layers(layers), seed)
    options = ReportOptions(rank, spectra, targets, exclude)
    options.check()
    directory = fetch(path)
    original = fetch(base) if base is not None else None
    out = out or beside(path, directory, "-report.html")
    with ProgressBar("report") as progress:
        found = report(
            directory, out, options, name=path, base=original, device=device, overwrite=overwrite, progress=progress
        )
    for note in found["notes"]:
        warn(note)
    if as_json:
        echo_json(found)
        return
    click.echo(f"Wrote {out}, {bytes_text(out.stat().st_size)}: open it in a browser.")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise OptionError(f"--ranks takes numbers with commas between them, as in 8,16,32; not {text!r}") from None


def _layers(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--layers takes a number, or all; not {text!r}") from None
