"""What became of a claim when it was measured: a sentence, a verdict, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stfbnn.errors import InputError

Verdict = Literal["holds", "holds in part", "does not hold here", "not measured"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts, from the best to none."""


@dataclass(frozen=True)
class Claim:
    """One claim and what the measurements say of it.

    Attributes:
        text: The claim, as its source makes it.
        verdict: What our figures say.
        evidence: Those figures, in a sentence.
        why: Why the verdict is what it is; may be empty.

    Raises:
        InputError: The verdict is another word, or the claim has no text.
    """

    text: str
    verdict: Verdict
    evidence: str
    why: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("a claim needs a text; it is empty")
        if self.verdict not in VERDICTS:
            raise InputError(
                f"the verdict of {self.text!r} must be one of {', '.join(VERDICTS)}, but is {self.verdict!r}"
            )
