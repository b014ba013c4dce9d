"""The package's version, in one place."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("nlora-surgery")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0+unknown"
