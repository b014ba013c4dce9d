"""The command line: each command parses, calls one library function and renders one report."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from nlora_surgery.errors import SurgeryError

__all__ = ["entry_point", "leave", "main", "quicken"]

# Command -> its module here and its line in --help. The module is imported when the command is used, and
# torch only when it runs, so that --help answers at once.
COMMANDS = {
    "init": "Factor a model's weights: write the residual base and the adapter.",
    "train": "Train the adapter on examples.",
    "generate": "Let a model, with its adapter, answer a prompt.",
    "merge": "Merge adapters into their base.",
    "convert": "Turn LoRA into SLoRA, or a residual adapter into LoRA of the original.",
    "extract": "Find the adapter between two checkpoints.",
    "inspect": "Say what a directory is, and what a rank costs.",
    "report": "Write a page with its spectra, figures and losses.",
    "verify": "Check that nothing was lost.",
    "push": "Push a result to the Hugging Face Hub, with a card.",
}

INTERRUPTED = 130


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nlora-surgery", prog_name="nlora_surgery")
def cli() -> None:
    r"""Checkpoint surgery for low-rank adapters.

    Works on the safetensors shards of a Hugging Face checkpoint, tensor by tensor.

    \b
    nlora_surgery init MODEL --rank 64           residual base and adapter, beside MODEL
    nlora_surgery verify OUT --against MODEL          was anything lost?
    nlora_surgery inspect DIR                         what is in it, and what a rank costs

    Results go to stdout (--json for machines), progress and warnings to stderr. Exit codes: 0 done, 2 usage,
    3 and 4 checkpoint, 5 targets, 6 not finite, 7 adapter, 8 and 9 output, 10 verification, 11 Hub, 12 a
    missing extra, 13 training data, 14 training, 130 interrupted.
    """


def entry_point() -> None:
    """What the console scripts and `python -m nlora_surgery` start: `main`, in a process of its own."""
    quicken()
    try:
        main()
    except SystemExit as end:
        leave(end.code)


def quicken() -> None:
    """Collect garbage seldom: importing torch makes so many objects that looking for it takes a tenth of a second."""
    gc.set_threshold(100_000, 50, 50)


def leave(code: int | str | None) -> NoReturn:
    """End the process now; taking the interpreter down with torch in it would take a third of a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Run the command line; every error that is foreseen ends in one sentence and its exit code."""
    try:
        sys.exit(cli(standalone_mode=False))
    except SurgeryError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; if an output was being written, the same command goes on with it.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        sys.exit(0)
