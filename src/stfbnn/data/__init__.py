"""From a folder or a file that a user has to tensors, with the kind recognised.

``load`` gives a ``DataSet`` of a training and a test ``Split``; ``hold_out`` divides a split; ``loader`` makes batches.
"""

from stfbnn.data.assembly import DataSet
from stfbnn.data.loader import SplitDataset, loader, normalise
from stfbnn.data.loading import data_root, load, recognise
from stfbnn.data.split import Split, hold_out

__all__ = [
    "DataSet",
    "Split",
    "SplitDataset",
    "data_root",
    "hold_out",
    "load",
    "loader",
    "normalise",
    "recognise",
]
