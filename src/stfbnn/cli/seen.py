"""Warnings of examples that a stage has seen, on which figures flatter."""

from __future__ import annotations

from typing import Any

from stfbnn.cli.fitted import FittedRun
from stfbnn.cli.output import Output
from stfbnn.provenance import overlap, provenance_of


def note_seen(out: Output, found: FittedRun, test: Any, held_out: Any) -> None:
    """Warn of test examples that the network was trained on, or by which T was chosen, where that is known."""
    own = provenance_of(test)
    trained_on = 0 if found.bnn.provenance is None else overlap(own, found.bnn.provenance)
    if trained_on:
        out.note(
            f"warning: the network was trained on {trained_on} of the {own.count} test examples: figures flatter it"
        )
    chosen_by = 0 if held_out is None else overlap(own, provenance_of(held_out))
    if chosen_by:
        out.note(
            f"warning: {chosen_by} of the {own.count} test examples are the held-out ones, by which T and τ were chosen"
        )
