"""A retraining that is interrupted ends where an undisturbed one does, and no other one takes its checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from retraining_runs import problem, require_same

from stfbnn.errors import CheckpointError
from stfbnn.optima.retraining import RetrainingOptions, retrain


class Interrupted:
    """A loader that is stopped in the middle of one of its passes."""

    def __init__(self, plain: Any, passes: int) -> None:
        self.plain, self.left = plain, passes
        self.dataset, self.sampler = plain.dataset, plain.sampler

    def __len__(self) -> int:
        return len(self.plain)

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        for number, batch in enumerate(self.plain):
            if self.left < 0 and number == 2:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("passes", [0, 1, 5, 9])
def test_a_resumed_retraining_ends_where_an_undisturbed_one_does(passes: int, tmp_path: Path) -> None:
    function, train, examples, held_out = problem("2")
    options = RetrainingOptions(runs=4, epochs=30, patience=2, learning_rate=0.1, weight_decay=1e-4, execution="loop")
    expected = retrain(function, train, examples, held_out, options, 0, progress=False)
    assert min(one.epochs for one in expected.optima) < max(one.epochs for one in expected.optima)
    file = tmp_path / "folder" / "run.ckpt"
    # One pass is the look at the first batch.
    interrupted = Interrupted(train, passes + 1)
    with pytest.raises(KeyboardInterrupt):
        retrain(function, interrupted, examples, held_out, options, 0, checkpoint=file, progress=False)
    assert file.exists() == (passes > 0)
    resumed = retrain(function, train, examples, held_out, options, 0, checkpoint=file, progress=False)
    require_same(resumed, expected)
    assert resumed.execution == "loop"
    # Nothing is left to do: the loader is not even read.
    again = retrain(function, Interrupted(train, -1), examples, held_out, options, 0, checkpoint=file, progress=False)
    require_same(again, expected)
    assert again.seconds == resumed.seconds


def test_a_checkpoint_of_other_settings_or_other_data_is_refused(tmp_path: Path) -> None:
    function, train, examples, held_out = problem()
    file = tmp_path / "run.ckpt"
    options = RetrainingOptions(runs=2, epochs=1)
    retrain(function, train, examples, held_out, options, 0, checkpoint=file, progress=False)
    with pytest.raises(CheckpointError, match="seed: 0 in the checkpoint, 1 now"):
        retrain(function, train, examples, held_out, options, 1, checkpoint=file, progress=False)
    more = RetrainingOptions(runs=2, epochs=2)
    with pytest.raises(CheckpointError, match=r"options\.epochs"):
        retrain(function, train, examples, held_out, more, 0, checkpoint=file, progress=False)
    with pytest.raises(CheckpointError, match="held_out"):
        retrain(function, train, examples, examples, options, 0, checkpoint=file, progress=False)
    found = retrain(function, train, examples, held_out, options, 1, checkpoint=file, resume=False, progress=False)
    assert len(found.optima) == 2
