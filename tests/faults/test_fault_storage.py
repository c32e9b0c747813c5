"""A full disk, a read-only folder and damaged files: a clear error, what was good survives, and the run goes on from it."""

import os
import resource
import subprocess
from pathlib import Path

import fault_script
import pytest
import torch
from fault_script import Nobody

import stfbnn
from stfbnn.bulk.output import read_table
from stfbnn.checkpoint import previous_path, read_checkpoint
from stfbnn.errors import CheckpointError, StorageError

EPOCHS, SHARDS = 8, 6


# --- disks


class Filled:
    """A disk of 256 KiB that a file fills."""

    def __init__(self, folder):
        self.folder, self._filler = folder, folder / "filler"

    def fill(self):
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self):
        self._filler.unlink()


class Limited:
    """A process that may not write files of more than a few bytes, which every user can bring about."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def free(self):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def mounted(folder):
    """Mount a small disk on a folder, or skip the test with the reason."""
    folder.mkdir()
    done = subprocess.run(
        ["/usr/bin/env", "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


def unmount(folder):
    subprocess.run(["/usr/bin/env", "umount", "--lazy", folder], check=True)


@pytest.fixture(params=["small disk", "limit"])
def disk(request, tmp_path):
    if request.param == "limit":
        limited = Limited(tmp_path)
        yield limited
        limited.free()
        return
    mounted(tmp_path / "disk")
    yield Filled(tmp_path / "disk")
    unmount(tmp_path / "disk")


@pytest.fixture
def read_only(tmp_path):
    """A folder into which nothing can be written; for root that is a mount, for others a matter of permissions."""
    folder = tmp_path / "read only"
    if os.geteuid():
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)
        return
    mounted(folder)
    subprocess.run(["/usr/bin/env", "mount", "-o", "remount,ro", folder], check=True)
    yield folder
    unmount(folder)


class At(Nobody):
    """Does something at a row."""

    def __init__(self, count, action):
        self.left, self.action = count, action

    def row(self):
        self.left -= 1
        if self.left == 0:
            self.action()


def interrupt():
    raise KeyboardInterrupt


# --- what is done


def train(folder, killer):
    return fault_script.stage_one(folder, killer, EPOCHS)


def fit(folder, killer):
    return fault_script.stage_two(folder, killer, trained(), EPOCHS)


def predict(folder, killer):
    return fault_script.prediction(folder, killer, fitted(), shards=SHARDS)


def trained():
    return fault_script.network().eval()


def fitted():
    bnn = stfbnn.bayesianize(trained(), torch.zeros(2, 6))
    bnn.likelihood, bnn.temperature = stfbnn.Categorical(), 1.0
    return bnn


def end_of(stage, run):
    """What a stage ends with, but for seconds."""
    if stage == "train":
        return run.model.state_dict(), [record.loss for record in run.history]
    bnn, found = run
    return bnn.posterior_state()["posterior"], [(record.free_energy, record.kl) for record in found.history]


def require_equal(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


STAGES = {"train": train, "fit": fit}
# Rows drawn by the sixth epoch: first a batch of 3, for `fit` also a pass, then 24 an epoch.
SIXTH = {"train": 3 + 5 * 24 + 7, "fit": 3 + 24 + 5 * 24 + 7}
stages = pytest.mark.parametrize("stage", list(STAGES))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return {stage: end_of(stage, run(tmp_path_factory.mktemp(stage), Nobody())) for stage, run in STAGES.items()}


def hidden(folder):
    return [path.name for path in folder.rglob("*.tmp")]


# --- a full disk


@stages
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(stage, disk, straight):
    file = disk.folder / f"{stage}.ckpt"
    with pytest.raises(StorageError, match="free some space") as caught:
        STAGES[stage](disk.folder, At(SIXTH[stage], disk.fill))
    assert str(file) in str(caught.value)
    # The epoch in which the disk filled up is not in it.
    assert len(read_checkpoint(file)["history"]) == 5
    assert read_checkpoint(previous_path(file))
    assert not hidden(disk.folder)
    # Nor is a run begun that could not be kept.
    with pytest.raises(CheckpointError, match="free some space"):
        STAGES[stage](disk.folder, Nobody())
    disk.free()
    require_equal(end_of(stage, STAGES[stage](disk.folder, Nobody())), straight[stage])


def test_a_full_disk_leaves_whole_predictions_and_they_go_on_once_there_is_space(disk, tmp_path):
    other = tmp_path / "undisturbed"
    predict(other, Nobody())
    with pytest.raises(StorageError, match=r"shard-000003-000000\.parquet cannot be written.*free some space"):
        predict(disk.folder, At(3 * fault_script.SHARD_ROWS + 2, disk.fill))
    folder = disk.folder / "predictions"
    assert len(list(folder.glob("*.parquet"))) == 6
    assert not hidden(disk.folder)
    disk.free()
    done = predict(disk.folder, Nobody())
    assert (done.rows, done.rows_before) == (60, 60)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (other / "predictions").iterdir()
    }


def test_a_full_disk_leaves_the_saved_posterior_that_was_there(disk):
    bnn = fitted()
    stfbnn.save(bnn, disk.folder / "saved")
    before = {path.name: path.read_bytes() for path in (disk.folder / "saved").iterdir()}
    disk.fill()
    for place, overwrite in (("saved", True), ("new", False)):
        with pytest.raises(StorageError, match="free some space") as caught:
            stfbnn.save(bnn, disk.folder / place, overwrite=overwrite)
        assert str(caught.value).startswith(f"{disk.folder / place} cannot be written")
    disk.free()
    assert {path.name: path.read_bytes() for path in disk.folder.joinpath("saved").iterdir()} == before
    assert [path.name for path in disk.folder.iterdir() if path.is_dir() and path.name != "saved"] == []


# --- a folder that cannot be written to


@stages
def test_a_read_only_folder_is_refused_before_the_first_epoch(stage, read_only):
    rows = At(SIXTH[stage], interrupt)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be written to .*make it writable"):
        STAGES[stage](read_only, rows)
    assert SIXTH[stage] - rows.left == 3


def test_predictions_and_a_posterior_are_not_written_to_a_read_only_folder(read_only):
    with pytest.raises(StorageError, match=r"predictions\.json cannot be written.*make the folder writable"):
        predict(read_only, Nobody())
    with pytest.raises(StorageError, match=r"saved cannot be written.*make the folder writable"):
        stfbnn.save(fitted(), read_only / "saved")


@pytest.mark.skipif(not Path("/proc/self/mounts").exists() or os.geteuid() != 0, reason="only root can mount a folder")
def test_a_folder_that_becomes_read_only_in_the_midst_of_a_run_is_named(tmp_path, straight):
    folder = tmp_path / "disk"
    mounted(folder)
    try:
        mount = ["/usr/bin/env", "mount", "-o"]
        lock = lambda: subprocess.run([*mount, "remount,ro", folder], check=True)  # noqa: E731
        with pytest.raises(StorageError, match="make the folder writable"):
            train(folder, At(SIXTH["train"], lock))
        subprocess.run([*mount, "remount,rw", folder], check=True)
        assert not hidden(folder)
        require_equal(end_of("train", train(folder, Nobody())), straight["train"])
    finally:
        unmount(folder)


# --- damage


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x41
    path.write_bytes(data)


@stages
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end(stage, damage, tmp_path, straight):
    file = tmp_path / f"{stage}.ckpt"
    with pytest.raises(KeyboardInterrupt):
        STAGES[stage](tmp_path, At(SIXTH[stage], interrupt))
    damage(file)
    with pytest.warns(UserWarning, match=rf"{stage}\.ckpt is damaged .* going on from {stage}\.ckpt\.previous"):
        run = STAGES[stage](tmp_path, Nobody())
    require_equal(end_of(stage, run), straight[stage])
    damage(file)
    damage(previous_path(file))
    kept = file.read_bytes()
    with pytest.raises(CheckpointError, match="delete it to start anew"):
        STAGES[stage](tmp_path, Nobody())
    assert file.read_bytes() == kept


def test_no_byte_of_a_file_of_predictions_changes_unseen(tmp_path):
    done = predict(tmp_path, Nobody())
    file = done.files()[3]
    whole, good = read_table(file), file.read_bytes()
    seen = 0
    for position in range(0, len(good), 29):
        flip(file, position)
        try:
            # Without the name of its checksum a file passes for one of an earlier version.
            assert read_table(file).equals(whole)
        except CheckpointError as error:
            assert str(file) in str(error)  # noqa: PT017 - not all bytes matter
            seen += 1
        file.write_bytes(good)
    assert seen >= len(good) // 29 - 2
    flip(file)
    for action in (done.table, lambda: predict(tmp_path, Nobody())):
        with pytest.raises(CheckpointError, match="delete it, and it is made anew"):
            action()
    cut(file)
    with pytest.raises(CheckpointError, match="delete it, and it is made anew"):
        predict(tmp_path, Nobody())
    file.unlink()
    predict(tmp_path, Nobody())
    assert file.read_bytes() == good
