"""The exception of this package."""

from stfbnn.errors import StfbnnError


class ExportError(StfbnnError, RuntimeError):
    """A network cannot be written in a format, or what was written does not compute what PyTorch computes."""
