"""Every way a training run fails on purpose, in the order of its path. Each is one line fit for its reader.

TrainingError
├── DeviceError     settings: the device asked for is not there
├── DataError       load: the data set is not there and cannot be fetched
├── CheckError      fit, export, parity, evaluate: a check failed, so nothing is published
└── PublishError    publish: the version exists, or models/ cannot be written
"""


class TrainingError(Exception):
    """Base of all failures that this package raises on purpose."""


class DeviceError(TrainingError):
    """The device asked for cannot be used here."""


class DataError(TrainingError):
    """The data set is not there and cannot be fetched."""


class CheckError(TrainingError):
    """A check of the trained net or of its artifacts failed."""


class PublishError(TrainingError):
    """The version exists already, or the models folder cannot be written."""
