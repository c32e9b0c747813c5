"""Hardware and versions, for the record of a measurement."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The processor, the accelerator, the threads and the versions that a figure came from, and the command line."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stfbnn": version("stfbnn"),
        "command": _command(),
    }


def _command() -> str:
    """The command line, without the folder that an installed program lies in."""
    program = sys.argv[0] if sys.argv else ""
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    return " ".join([*start, *sys.argv[1:]])
