"""Every error that nlora_surgery raises on purpose, and the exit code that the command line gives it.

::

    SurgeryError                         1   anything below
    ├── OptionError                      2   an option's value is impossible, or two options contradict
    ├── CheckpointError                  3   a model's files are missing, damaged or disagree with each other
    │   └── UnsupportedCheckpointError   4   a sound checkpoint of a kind that cannot be operated on
    ├── TargetError                      5   no weight, or the wrong weights, would be adapted
    ├── NonFiniteError                   6   NaN or infinity where arithmetic would spread it
    ├── AdapterError                     7   an adapter's files are missing, damaged or of an unknown kind
    │   └── BaseMismatchError            7   an adapter and a base that do not belong together
    ├── OutputError                      8   the output cannot be written
    │   └── StageError                   9   an unfinished run of this output is in the way
    ├── VerificationError               10   what was written is not what was promised
    ├── HubError                        11   the Hub could not be reached, or refused
    ├── MissingExtraError               12   an optional dependency is not installed
    ├── DataError                       13   training data that is missing, damaged or of no known form
    └── TrainingError                   14   training cannot go on

A message says what was found, what was expected and what to do, in one sentence where one is enough.
"""

__all__ = [
    "AdapterError",
    "BaseMismatchError",
    "CheckpointError",
    "DataError",
    "HubError",
    "MissingExtraError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "StageError",
    "SurgeryError",
    "TargetError",
    "TrainingError",
    "UnsupportedCheckpointError",
    "VerificationError",
]


class SurgeryError(Exception):
    """Base of every error that nlora_surgery raises on purpose.

    Attributes:
        exit_code: what the command line exits with.
        resumable: whether the staged part of an output is worth keeping, because the same command
            can finish it later.
    """

    exit_code = 1
    resumable = False


class OptionError(SurgeryError):
    """An option's value is impossible, or two options contradict each other."""

    exit_code = 2


class CheckpointError(SurgeryError):
    """A checkpoint's files are missing, damaged, or disagree with each other."""

    exit_code = 3


class UnsupportedCheckpointError(CheckpointError):
    """A sound checkpoint of a kind that cannot be operated on: quantized, pickled, an adapter."""

    exit_code = 4


class TargetError(SurgeryError):
    """No weight, or the wrong weights, would be adapted."""

    exit_code = 5


class NonFiniteError(SurgeryError):
    """NaN or infinity in a weight or in a result.

    Attributes:
        tensor: the name of the tensor.
    """

    exit_code = 6

    def __init__(self, tensor: str, message: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class AdapterError(SurgeryError):
    """An adapter's files are missing, damaged, or of a kind that is not known."""

    exit_code = 7


class BaseMismatchError(AdapterError):
    """An adapter and a base that do not belong together."""


class OutputError(SurgeryError):
    """The output cannot be written: it exists, it lies in the source, there is no space."""

    exit_code = 8

    def __init__(self, message: str, *, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


class StageError(OutputError):
    """An unfinished run of the same output is in the way: still running, or of another command."""

    exit_code = 9

    def __init__(self, message: str) -> None:
        super().__init__(message, resumable=True)  # it is not ours to remove


class VerificationError(SurgeryError):
    """What was written is not what was promised."""

    exit_code = 10


class HubError(SurgeryError):
    """The Hub could not be reached, or refused."""

    exit_code = 11


class MissingExtraError(SurgeryError):
    """An optional dependency is not installed."""

    exit_code = 12


class DataError(SurgeryError):
    """Training data that is missing, damaged, or of no known form."""

    exit_code = 13


class TrainingError(SurgeryError):
    """Training cannot go on: its loss is not finite, or a run in the way is another one's."""

    exit_code = 14
