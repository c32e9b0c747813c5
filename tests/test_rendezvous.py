"""Ranks that are started again meet those of their own start, whatever earlier ones have left in the store."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from stfbnn.errors import LostRankError
from stfbnn.rendezvous import meet

PATIENCE = timedelta(seconds=20)


def together(store, ranks, count):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: meet(store, rank, count, PATIENCE), ranks))


def test_each_start_has_a_number_of_its_own():
    store = HashStore()
    assert [together(store, range(3), 3) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]
    assert meet(store, 0, 1, PATIENCE) == 4


def test_a_rank_that_comes_first_is_not_taken_for_one_of_the_start_before():
    store = HashStore()
    together(store, range(2), 2)
    found = []
    early = threading.Thread(target=lambda: found.append(meet(store, 1, 2, PATIENCE)))
    early.start()
    # It has greeted the start that is over, and nobody answers.
    early.join(0.3)
    assert early.is_alive()
    assert meet(store, 0, 2, PATIENCE) == 2
    early.join(20)
    assert found == [2]


def test_a_start_of_which_a_rank_died_on_its_way_does_no_harm():
    store = HashStore()
    # Rank 0 came, and one of two others; then all were started again.
    assert store.add("start", 1) == 1
    store.set("1/greeting/2", "of one that died")
    assert together(store, (2, 1, 0), 3) == [2] * 3


def test_a_rank_that_does_not_come_is_told_of():
    short = timedelta(seconds=0.2)
    for rank in (0, 1):
        with pytest.raises(LostRankError, match=f"rank {rank} of 2 has not met all others within 0.2 s"):
            meet(HashStore(), rank, 2, short)
    store = HashStore()
    store.add("start", 1)
    with pytest.raises(LostRankError, match="rank 0 has not answered"):
        meet(store, 1, 2, short)
