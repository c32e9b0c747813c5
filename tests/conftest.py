"""Settings and fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Path:
    """The folder of real data sets; without it the test is skipped."""
    root = os.environ.get("STFBNN_DATA")
    if not root:
        pytest.skip("STFBNN_DATA is not set: it names the folder of real data sets")
    return Path(root)
