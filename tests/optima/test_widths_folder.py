"""A comparison of layers that was killed goes on where it was, and no other one takes its folder."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compared_layers import small, three_layers, timeless

from core_models import classification, loader, trained
from stfbnn.errors import CheckpointError
from stfbnn.optima import widths


class Interrupted:
    """Batches that end in an interruption, as that of a person, after so many."""

    def __init__(self, batches: list[Any], after: float) -> None:
        self.batches, self.after, self.given = batches, after, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.given >= self.after:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


def test_a_comparison_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(loader(*classification(90), shuffle=False))
    expected = small(train=batches, epochs=3)
    # 1 batch for the example; each layer reads 1 (first look) and 3 (survey) and 3 an epoch: this is in layer 1's third epoch.
    with pytest.raises(KeyboardInterrupt):
        small(train=Interrupted(batches, 1 + 13 + 12), epochs=3, checkpoint=tmp_path)
    assert (tmp_path / "layer-000.json").exists()
    assert (tmp_path / "layer-001.fit").exists()
    assert not (tmp_path / "layer-000.fit").exists()
    rest = Interrupted(batches, math.inf)
    resumed = small(train=rest, epochs=3, checkpoint=tmp_path)
    assert timeless(resumed) == timeless(expected)
    assert rest.given == 1 + (1 + 3) + 13  # an epoch of layer 1 was left, without its survey, and all of layer 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"layer-00{number}.json" for number in range(3)]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("all is done")

    with monkeypatch.context() as patch:
        patch.setattr(widths, "fit", refuse)
        assert small(train=batches, epochs=3, checkpoint=tmp_path, layers=["4", "0"]).layers == (
            resumed.layers[0],
            resumed.layers[2],
        )
    # A damaged file is as good as none.
    (tmp_path / "layer-001.json").write_text("{", encoding="utf-8")
    assert timeless(small(train=batches, epochs=3, checkpoint=tmp_path)) == timeless(expected)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    x_val, y_val = classification(80, seed=1)
    small(checkpoint=tmp_path, layers=["4"], epochs=1)
    for changes, message in (
        ({"epochs": 2}, "epochs: 1 there, 2 now"),
        ({"epochs": 1, "prior": 0.3}, "prior"),
        ({"epochs": 1, "seed": 3}, "seed: 0 there, 3 now"),
        ({"epochs": 1, "val": [(x_val.flip(0), y_val.flip(0))]}, "held-out data"),
        ({"epochs": 1, "outside": {"far": 4 * x_val}}, "foreign data"),
        ({"epochs": 1, "net": trained(three_layers(), *classification(90), steps=1)}, "model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            small(checkpoint=tmp_path, layers=["4"], **changes)
    anew = small(checkpoint=tmp_path, layers=["4"], epochs=2, resume=False)
    assert timeless(anew) == timeless(small(checkpoint=tmp_path, layers=["4"], epochs=2))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no checkpoint can be written"):
        small(checkpoint=tmp_path / "file")
