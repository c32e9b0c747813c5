"""The exceptions of the library: each message says what was wrong, what was expected and what to do."""


class StfbnnError(Exception):
    """Base of every error that the library raises on purpose; the command line prints it without a traceback."""


class InputError(StfbnnError, ValueError):
    """An argument, a batch or a model output has the wrong shape, dtype, range or value."""


class LayerError(StfbnnError, ValueError):
    """The model has no layer that can be made Bayesian, or the named layer cannot be."""


class ModelChangedError(StfbnnError, RuntimeError):
    """The user's model was changed after it was made Bayesian, so the frozen trunk is no longer its trunk."""


class NotFittedError(StfbnnError, RuntimeError):
    """A prediction or a file was asked of a posterior that has not been inferred yet."""


class CertificateError(StfbnnError, ValueError):
    """A certificate was asked of data, or of a network, for which no bound holds."""


class DataError(StfbnnError, ValueError):
    """A data set on disk is missing, of an unknown kind, damaged, or unusable."""


class ArtifactError(StfbnnError, ValueError):
    """A saved posterior, or a file of weights, is damaged, of an unknown format, or belongs to another model."""


class CheckpointError(StfbnnError, ValueError):
    """A checkpoint is damaged, or was written by a run with other settings."""


class StorageError(StfbnnError, OSError):
    """A file could not be written: the disk is full, the folder cannot be written to, or the like."""


class LostRankError(StfbnnError, RuntimeError):
    """Another process of the same run has ended, or its machine could not be reached in time."""
