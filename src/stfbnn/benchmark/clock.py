"""The clock of all costs."""

from __future__ import annotations

import time

import torch


def clock() -> float:
    """Seconds from some start: the processor's where one thread computes (other work hardly matters then), else the wall's."""
    return time.process_time() if uses_processor_time() else time.perf_counter()


def uses_processor_time() -> bool:
    """Whether `clock` counts the processor's seconds."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()
