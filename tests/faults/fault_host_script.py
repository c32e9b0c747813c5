"""A run on three hosts of which one is cut off twice: once for a while, and then for good.

Usage, under torchrun on each host: fault_host_script.py FOLDER. The first start trains undisturbed and then with a checkpoint,
and is to be cut off; the second goes on from there, leaves FOLDER/straight.RANK.pt and FOLDER/resumed.RANK.pt, and goes on to
a stage two that is not to come to its end.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import fault_script
import torch
from fault_script import Nobody


class Slow(Nobody):
    """Leaves the time to be cut off, and says where it is."""

    def __init__(self, file):
        self.file, self.rows = file, 0

    def row(self):
        time.sleep(0.02)
        self.rows += 1
        if self.rows == 40:
            self.file.touch()


def stage_one(folder, killer):
    run = fault_script.stage_one(folder, killer)
    history = [(record.epoch, record.loss, record.accuracy, record.learning_rate) for record in run.history]
    return run.model, {"model": run.model.state_dict(), "history": history}


def main(folder):
    rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    import stfbnn

    # All have imported before any waits for another, which takes seconds that say nothing of the network.
    _ = stfbnn.train, stfbnn.fit
    (folder / f"imported.{start}.{rank}").touch()
    while len(list(folder.glob(f"imported.{start}.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    if start == "0":
        (folder / "undisturbed").mkdir(exist_ok=True)
        torch.save(stage_one(folder / "undisturbed", Nobody())[1], folder / f"straight.{rank}.pt")
    model, found = stage_one(folder, Slow(folder / f"begun.{start}.{rank}"))
    torch.save(found, folder / f"resumed.{rank}.pt")
    fault_script.stage_two(folder, Slow(folder / f"second.{start}.{rank}"), model, 10_000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.modules["torchmetrics"] = None
    main(Path(sys.argv[1]))
