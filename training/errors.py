"""The errors of a training run, in the order of its steps. Each message is one line.

TrainingError
├── RecipeError     a recipe lacks something, or its file cannot be run
├── DeviceError     settings: the requested device cannot be used
├── DataError       load: the data set is missing and cannot be downloaded
├── CheckError      fit, export, parity, evaluate: a check failed, so nothing is published
└── PublishError    publish: the version exists, or models/ cannot be written
"""


class TrainingError(Exception):
    """Base class of the errors below."""


class RecipeError(TrainingError):
    """Raised when a recipe lacks a part, or the file that defines it cannot be run."""


class DeviceError(TrainingError):
    """Raised when the requested device cannot be used."""


class DataError(TrainingError):
    """Raised when the data set is missing and cannot be downloaded."""


class CheckError(TrainingError):
    """Raised when a check of the net or of its artifacts fails."""


class PublishError(TrainingError):
    """Raised when the version exists already, or the models folder cannot be written."""
