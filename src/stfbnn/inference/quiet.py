"""Several fits in a row, of which only the first is to warn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told_once(first: bool) -> Iterator[None]:
    """Let only the first fit warn, and of nothing that one of several fits gives rise to: a table tells that of all.

    Args:
        first: Whether it is the first one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="on the held-out data the Bayesian network")
        if not first:
            warnings.simplefilter("ignore")
        yield
