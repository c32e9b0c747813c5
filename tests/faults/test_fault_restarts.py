"""Two ranks under torchrun, killed and started again, or with a full disk: the end is that of an undisturbed run."""

import pytest
import torch

import faults
from stfbnn.errors import InputError, LostRankError
from stfbnn.launching import launched_fabric
from stfbnn.processes import TIMEOUT, Processes, naming_lost_ranks

# Some ten starts of torchrun, each of which takes seconds, and more on a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)

KILLS = [
    {"stage": "train", "rank": 0, "moment": "half a file", "count": 5},
    {"stage": "fit", "rank": 1, "moment": "row", "count": 70},
    {"stage": "fit", "rank": 0, "moment": "after rename", "count": 4},
    {"stage": "predict", "rank": 1, "moment": "half a file", "count": 3},
    {"stage": "predict", "rank": 0, "moment": "before rename", "count": 5},
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run to its end, and then one in which the disk of rank 0 fills up in every part."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = faults.launch(folder, (), "full")
    assert done["code"] == 0, done["output"][-3000:]
    return folder


def test_a_run_whose_ranks_are_killed_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    done = faults.launch(tmp_path, KILLS)
    assert done["code"] == 0, done["output"][-3000:]
    assert [{name: kill[name] for name in KILLS[0]} for kill in done["kills"]] == KILLS
    assert faults.differences(tmp_path, undisturbed) == []


def test_a_full_disk_on_rank_0_ends_every_rank_with_the_same_error(undisturbed):
    said = [torch.load(undisturbed / f"full.{rank}.pt", weights_only=True)["said"] for rank in (0, 1)]
    for stage in ("train", "fit"):
        assert said[0][stage] == said[1][stage]
        name, text = said[0][stage]
        assert name == "StorageError"
        assert f"{stage}.ckpt cannot be written" in text
        assert "free some space" in text


def test_predictions_of_another_rank_do_not_suffer_from_a_full_disk(undisturbed):
    said = [torch.load(undisturbed / f"full.{rank}.pt", weights_only=True)["said"]["predict"] for rank in (0, 1)]
    assert said[0][0] == "StorageError"
    assert ".parquet cannot be written" in said[0][1]
    assert said[1] == ["", ""]


def test_once_there_is_space_all_ranks_go_on_to_the_undisturbed_result(undisturbed):
    for rank in (0, 1):
        straight = torch.load(undisturbed / f"result.{rank}.pt", weights_only=True)
        torch.save(straight, undisturbed / "full" / f"result.{rank}.pt")
        found = torch.load(undisturbed / f"full.{rank}.pt", weights_only=True)
        torch.save({name: found[name] for name in straight}, undisturbed / "full" / f"result.{rank}.pt")
    assert faults.differences(undisturbed / "full", undisturbed) == []


def test_three_ranks_sum_in_the_same_order_after_an_interruption_as_without_one(tmp_path):
    """Of three numbers the sum depends on the order, which DDP changes after its first pass."""
    done = faults.launch(tmp_path, (), "interrupted", ranks=3)
    assert done["code"] == 0, done["output"][-3000:]
    for rank in range(3):
        straight, resumed = (
            torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for name in ("straight", "resumed")
        )
        assert [name for name in straight if not faults.equal(straight[name], resumed[name])] == []


def test_a_difference_would_be_seen(undisturbed, tmp_path):
    for rank in (0, 1):
        found = torch.load(undisturbed / f"result.{rank}.pt", weights_only=True)
        found["model"]["0.weight"] = found["model"]["0.weight"].nextafter(torch.tensor(9.0))
        torch.save(found, tmp_path / f"result.{rank}.pt")
    (tmp_path / "predictions").mkdir()
    for path in list((undisturbed / "predictions").iterdir())[1:]:
        (tmp_path / "predictions" / path.name).write_bytes(path.read_bytes())
    assert len(faults.differences(tmp_path, undisturbed)) == 3


def test_the_plans_of_two_runs_hold_every_moment_of_every_stage():
    both = faults.plan(0) + faults.plan(1)
    assert {(kill["stage"], kill["moment"]) for kill in both} == {
        (stage, moment) for stage in faults.STAGES for moment in faults.MOMENTS
    }


# --- in one process


class SeveralRanks(Processes):
    def __init__(self):
        super().__init__()
        self.rank, self.count = 1, 3


@pytest.mark.parametrize("error", [RuntimeError("[gloo/x.cc:1] Timed out"), torch.distributed.DistNetworkError("gone")])
def test_a_rank_that_cannot_reach_another_says_so(error):
    with (
        pytest.raises(LostRankError, match="rank 1 of 3 lost another rank") as caught,
        naming_lost_ranks(SeveralRanks()),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert TIMEOUT in str(caught.value)


def test_other_errors_and_single_processes_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_lost_ranks(SeveralRanks()):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match=r"^gloo$"), naming_lost_ranks(Processes()):
        raise RuntimeError("gloo")


@pytest.mark.parametrize("said", ["soon", "0", "-3", "nan"])
def test_a_timeout_that_is_none_is_refused(said, monkeypatch):
    monkeypatch.setenv(TIMEOUT, said)
    with pytest.raises(InputError, match=TIMEOUT):
        launched_fabric("cpu", 2, "auto", 1)
