"""`python -m nlora_surgery`: the command line (the only import of it in the library)."""

from nlora_surgery_cli import entry_point

entry_point()
