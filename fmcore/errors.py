"""Errors that a user can act on, each with the exit code of the command line.

StrataError                1   something failed
├── UserInputError         2   the recipe, the command or the data is wrong; nothing was started
│   ├── RecipeError            a field of a recipe
│   ├── DataError              a file or record of a source
│   └── UnknownModelError      a model, version or alias that the registry or the store lacks
├── StoreError             1   the artifact store
│   └── IntegrityError         bytes that do not match their recorded sha256
├── TrainingError          1   the training or evaluation process failed
├── WorkerError            1   a process that reads or encodes data failed
├── TrackingError          1   the MLflow server or registry cannot be reached
└── Interrupted           75   stopped on request; the same command resumes
"""


class StrataError(Exception):
    """Root of all errors that Strata raises on purpose; the message is meant for the user."""

    exit_code = 1


class UserInputError(StrataError):
    """What the user gave is wrong; the message names the place and the remedy."""

    exit_code = 2


class RecipeError(UserInputError):
    """A recipe does not validate."""


class DataError(UserInputError):
    """A source or record cannot be used."""


class UnknownModelError(UserInputError):
    """A model reference that leads nowhere."""


class StoreError(StrataError):
    """The artifact store is not in the state it should be in."""


class IntegrityError(StoreError):
    """A file's bytes differ from what was recorded when it was made."""


class TrainingError(StrataError):
    """The training or evaluation process ended without its result."""


class WorkerError(StrataError):
    """A process that reads data ended without its result."""


class TrackingError(StrataError):
    """The tracking server or model registry cannot be reached or refuses."""


class Interrupted(StrataError):
    """Stopped by a signal after saving; the same command goes on from there."""

    exit_code = 75
