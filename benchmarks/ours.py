"""`nlora_surgery …` with stamps for the measuring parent: when all is imported, and when all is done.

    python -m benchmarks.ours init MODEL -o OUT --rank 64

The command line imports a command and torch only when they are used; here that is done first.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks.measure import DONE, IMPORTED, stamp

_IMPORTS = ("torch", "rich.progress", "nlora_surgery.hub", "nlora_surgery.manifest")


def main() -> None:
    """Import, stamp, run the command line, stamp if it was done."""
    command_line = importlib.import_module("nlora_surgery_cli")
    command_line.quicken()
    command = sys.argv[1]
    operation = "prepare" if command == "init" else command
    for name in (*_IMPORTS, f"nlora_surgery.surgery.{operation}", f"nlora_surgery_cli.{command}"):
        importlib.import_module(name)
    stamp(IMPORTED)
    try:
        command_line.main()
    except SystemExit as end:
        if end.code in {None, 0}:
            stamp(DONE)
        command_line.leave(end.code)


if __name__ == "__main__":
    main()
