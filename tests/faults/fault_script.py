"""Both stages and a prediction, one after the other, whose process is killed at moments that a plan names.

Usage, under torchrun: fault_script.py FOLDER [full], which leaves its results in FOLDER/result.RANK.pt and FOLDER/predictions;
with "full", also what comes of it where the disk of rank 0 fills up, in FOLDER/full.RANK.pt. FOLDER/plan.json lists what is
killed, one entry for each start: ``{"stage", "rank", "moment", "count"}``. FOLDER/kills.txt gets a line just before each kill.

Or: fault_script.py FOLDER interrupted, which runs the two stages without a stop, and then interrupts each one and goes on, for
FOLDER/straight.RANK.pt and FOLDER/resumed.RANK.pt.
"""

import builtins
import io
import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

STAGES = ("train", "fit", "predict")
# What is counted up to a kill; "seconds" is a clock that does not know what the process is doing.
MOMENTS = ("row", "file begun", "half a file", "before rename", "after rename", "seconds")
EPOCHS, TRAIN_ROWS, SHARDS, SHARD_ROWS = 40, 24, 60, 20
# A batch of a prediction that is to be killed takes so long that no rank is done before the other one is killed.
PAUSE = 0.02


class Killer:
    """Ends this process by signal 9 at one moment of one stage."""

    def __init__(self, folder, entry):
        self.folder, self.entry, self.left, self.stage = folder, entry, entry["count"], None
        wrap = {"file begun": self._files, "half a file": self._halves, "seconds": self._clock}
        renames = entry["moment"].endswith("rename")
        wrap.get(entry["moment"], self._renames if renames else lambda: None)()

    def enter(self, stage):
        self.stage = stage
        if self.entry["moment"] == "seconds" and stage == self.entry["stage"]:
            self.started.set()

    def kill(self):
        with (self.folder / "kills.txt").open("a") as file:
            file.write(json.dumps({**self.entry, "start": int(os.environ["TORCHELASTIC_RESTART_COUNT"])}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def due(self):
        """Count a moment of the right stage; whether it is the one."""
        if self.stage != self.entry["stage"]:
            return False
        self.left -= 1
        return self.left == 0

    def row(self):
        if self.entry["moment"] == "row" and self.due():
            self.kill()

    def _clock(self):
        self.started = threading.Event()

        def wait():
            self.started.wait()
            threading.Event().wait(self.entry["count"])
            self.kill()

        threading.Thread(target=wait, daemon=True).start()

    def _files(self):
        import tempfile

        make = tempfile.mkstemp

        def made(*args, **options):
            found = make(*args, **options)
            if self.due():
                self.kill()
            return found

        tempfile.mkstemp = made

    def _renames(self):
        replace = os.replace

        def replaced(source, target, **options):
            due = self.due()
            if due and self.entry["moment"] == "before rename":
                self.kill()
            replace(source, target, **options)
            if due:
                self.kill()

        os.replace = replaced

    def _halves(self):
        """Of what is written in one go: Python's files in the two stages, Arrow's in predictions."""
        import pyarrow.parquet

        write_table, opened = pyarrow.parquet.write_table, io.open

        def halved(table, path, **options):
            write_table(table, path, **options)
            if self.due():
                os.truncate(path, path.stat().st_size // 2)
                self.kill()

        def opened_for_halves(file, mode="r", *args, **options):
            stream = opened(file, mode, *args, **options)
            if mode != "wb" or not self.due():
                return stream
            return HalfWriter(stream, self.kill)

        pyarrow.parquet.write_table = halved
        io.open = builtins.open = opened_for_halves


class HalfWriter:
    """A file that writes the first half of the second piece that it is given, and then does what it is told."""

    def __init__(self, stream, then):
        self.stream, self.then, self.pieces = stream, then, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, data):
        self.pieces += 1
        if self.pieces < 2:
            return self.stream.write(data)
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        self.then()
        raise AssertionError("this process should have been killed")


class Nobody:
    """No kill."""

    entry = None

    def enter(self, stage):
        pass

    def row(self):
        pass


class FullDisk(Nobody):
    """From some row on this process can write no file of more than a few bytes."""

    def __init__(self, count):
        self.left = count

    def row(self):
        self.left -= 1
        if self.left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    @staticmethod
    def free():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Interrupted(Nobody):
    """The user's Ctrl-C, at a row."""

    def __init__(self, count):
        self.left = count

    def row(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Rows(Dataset):
    """Rows of three classes; each draws from the global generator, and tells the killer."""

    def __init__(self, killer, count=TRAIN_ROWS):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = (self.x[:, :3].sum(1) > 0).long() + (self.x[:, 3] > 1).long()
        self.killer = killer

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.killer.row()
        return self.x[index] + 0.1 * torch.rand(()), self.y[index]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def stage_one(folder, killer, epochs=EPOCHS):
    import stfbnn

    loader = DataLoader(Rows(killer), 3, shuffle=True)
    return stfbnn.train(
        network(), loader, epochs=epochs, lr=0.02, seed=3, checkpoint=folder / "train.ckpt", accelerator="cpu"
    )


def stage_two(folder, killer, model, epochs=EPOCHS):
    import stfbnn

    rows, held_out = Rows(killer), Rows(Nobody(), 30)
    bnn = stfbnn.bayesianize(model, rows.x[:2])
    run = stfbnn.fit(
        bnn,
        DataLoader(rows, 3, shuffle=True),
        epochs=epochs // 2,
        temperatures=(1.0, 0.3),
        # Other rows than those that were learned from: those have noise on them.
        val_loader=[(held_out.x, held_out.y)],
        val_samples=4,
        seed=3,
        checkpoint=folder / "fit.ckpt",
        accelerator="cpu",
    )
    return bnn, run


def prediction(folder, killer, bnn, pause=0.0, shards=SHARDS):
    import stfbnn
    from stfbnn.bulk import Rows as Batch
    from stfbnn.bulk import Source

    x = torch.randn(shards * SHARD_ROWS, 6, generator=torch.Generator().manual_seed(8))

    class Shards(Source):
        def shards(self):
            return [f"part-{index}" for index in range(shards)]

        def identity(self, name):
            return name

        def open(self, name, keep, batch_size):
            start = int(name.split("-")[1]) * SHARD_ROWS
            for first in range(start, start + SHARD_ROWS, 5):
                time.sleep(pause)
                for _ in range(5):
                    killer.row()
                yield Batch(x[first : first + 5], {})

    # Two files for each shard, a shard at a time.
    return stfbnn.predict_shards(
        bnn, Shards(), folder / "predictions", samples=4, seed=2, rows_per_shard=12, batch_size=5
    )


def result(run, bnn, fitted):
    return {
        "model": run.model.state_dict(),
        "train history": [
            (one.epoch, one.loss, one.accuracy, one.val_loss, one.val_accuracy, one.learning_rate)
            for one in run.history
        ],
        "seen": run.provenance.to_tensor(),
        "posterior": bnn.posterior_state()["posterior"],
        "fit history": [
            (one.temperature, one.epoch, one.free_energy, one.nll, one.kl, one.mean_std) for one in fitted.history
        ],
        "chosen": [fitted.temperature, fitted.predictive_temperature, fitted.held_out_nll, fitted.network_held_out_nll],
        "trials": [(one.temperature, one.held_out_nll) for one in fitted.trials],
        "seen by inference": bnn.seen.inference.to_tensor(),
    }


def refusal(action):
    from stfbnn.errors import StfbnnError

    try:
        action()
    except StfbnnError as error:
        return [type(error).__name__, str(error)]
    finally:
        FullDisk.free()
    return ["", ""]


def disk_fills_up(folder, rank):
    """What each rank raises where rank 0 has no space in the sixth epoch, and what comes of it once there is space."""
    folder.mkdir(exist_ok=True)
    full = [FullDisk(70) if rank == 0 else Nobody() for _ in STAGES]
    said = {"train": refusal(lambda: stage_one(folder, full[0]))}
    run = stage_one(folder, Nobody())
    said["fit"] = refusal(lambda: stage_two(folder, full[1], run.model))
    bnn, fitted = stage_two(folder, Nobody(), run.model)
    said["predict"] = refusal(lambda: prediction(folder, full[2], bnn))
    prediction(folder, Nobody(), bnn)
    return {"said": said, **result(run, bnn, fitted)}


def interrupted_and_resumed(folder, count):
    with suppress(KeyboardInterrupt):
        stage_one(folder, Interrupted(count))
        raise AssertionError("the first stage was not interrupted")
    run = stage_one(folder, Nobody())
    with suppress(KeyboardInterrupt):
        stage_two(folder, Interrupted(count), run.model)
        raise AssertionError("the second stage was not interrupted")
    return result(run, *stage_two(folder, Nobody(), run.model))


def compare(folder):
    rank = os.environ["RANK"]
    for name in ("straight", "stopped"):
        (folder / name).mkdir(exist_ok=True)
    run = stage_one(folder / "straight", Nobody())
    torch.save(result(run, *stage_two(folder / "straight", Nobody(), run.model)), folder / f"straight.{rank}.pt")
    torch.save(interrupted_and_resumed(folder / "stopped", 43), folder / f"resumed.{rank}.pt")
    torch.distributed.barrier()


def main(folder, then=""):
    rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else []
    killer = Killer(folder, plan[start]) if start < len(plan) and plan[start]["rank"] == rank else Nobody()
    killer.enter("train")
    run = stage_one(folder, killer)
    killer.enter("fit")
    bnn, fitted = stage_two(folder, killer, run.model)
    killer.enter("predict")
    # Together, so that one rank is not done with its shards before the other has begun, and is there to be killed.
    torch.distributed.barrier()
    prediction(folder, killer, bnn, PAUSE if start < len(plan) else 0.0)
    torch.save(result(run, bnn, fitted), folder / f"result.{rank}.pt")
    if then == "full":
        torch.save(disk_fills_up(folder / "full", rank), folder / f"full.{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # It is only looked for by what trains, and is what takes longest to import.
    sys.modules["torchmetrics"] = None
    import warnings

    warnings.simplefilter("ignore")
    if sys.argv[2:] == ["interrupted"]:
        compare(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    # What a thread of the process group does as the interpreter goes down is not tested.
    os._exit(0)
