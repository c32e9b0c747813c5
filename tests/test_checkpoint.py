"""Checkpoints survive kills, and damaged or foreign ones are never loaded silently."""

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stfbnn import checkpoint as module
from stfbnn.checkpoint import load_checkpoint, previous_path, save_checkpoint
from stfbnn.errors import CheckpointError, InputError

SIGNATURE = {"seed": 3, "learning_rate": 0.1, "shapes": {"weight": [4, 2], "bias": [4]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "stage.ckpt"


def state_of(epoch):
    return {
        "epoch": epoch,
        "weight": torch.arange(8.0).reshape(4, 2) + epoch,
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 0.1}],
        },
        "history": [(1, 0.5, None), (2, float("nan"), True)],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }


def test_what_is_saved_is_loaded(path):
    save_checkpoint(path, state_of(1), SIGNATURE)
    loaded = load_checkpoint(path, SIGNATURE)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["weight"], state_of(1)["weight"])
    assert loaded["half"].dtype == torch.bfloat16
    assert loaded["optimizer"]["state"][0]["step"] == 2
    assert loaded["history"][0] == (1, 0.5, None)
    assert loaded["history"][1][2] is True


def test_missing_is_none_and_deleting_starts_anew(path):
    assert load_checkpoint(path, SIGNATURE) is None
    save_checkpoint(path, state_of(1), SIGNATURE)
    save_checkpoint(path, state_of(2), SIGNATURE)
    assert previous_path(path).exists()
    path.unlink()
    assert load_checkpoint(path, SIGNATURE) is None


def test_previous_is_the_one_before(path):
    for epoch in (1, 2, 3):
        save_checkpoint(path, state_of(epoch), SIGNATURE)
    assert load_checkpoint(path, SIGNATURE)["epoch"] == 3
    assert load_checkpoint(previous_path(path), SIGNATURE)["epoch"] == 2
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["stage.ckpt", "stage.ckpt.previous"]


def damage_by_truncation(path, position):
    path.write_bytes(path.read_bytes()[:position])


def damage_by_flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.unlink()  # the previous one may be a hard link to the same file
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_flip])
def test_every_kind_of_damage_is_refused(path, damage):
    save_checkpoint(path, state_of(1), SIGNATURE)
    whole = path.read_bytes()
    for position in [*range(0, 70), *range(70, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole)
        damage(path, position)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path, SIGNATURE)


def test_damage_falls_back_with_a_warning_and_keeps_the_good_previous(path):
    save_checkpoint(path, state_of(1), SIGNATURE)
    save_checkpoint(path, state_of(2), SIGNATURE)
    damage_by_flip(path, 200)
    with pytest.warns(UserWarning, match="checksum does not match.*previous"):
        assert load_checkpoint(path, SIGNATURE)["epoch"] == 1
    save_checkpoint(path, state_of(3), SIGNATURE)
    assert load_checkpoint(path, SIGNATURE)["epoch"] == 3
    assert load_checkpoint(previous_path(path), SIGNATURE)["epoch"] == 1


def test_both_damaged_is_an_error(path):
    save_checkpoint(path, state_of(1), SIGNATURE)
    save_checkpoint(path, state_of(2), SIGNATURE)
    damage_by_flip(path, 200)
    damage_by_flip(previous_path(path), 200)
    with pytest.raises(CheckpointError, match=r"no whole stage\.ckpt\.previous"):
        load_checkpoint(path, SIGNATURE)


def test_signature_names_every_difference_with_both_values(path):
    save_checkpoint(path, state_of(1), SIGNATURE)
    other = {"seed": 4, "shapes": {"weight": [4, 3], "bias": [4]}, "layer": "conv1", "learning_rate": 0.1}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, other)
    message = str(caught.value)
    assert "seed: 3 in the checkpoint, 4 now" in message
    assert "shapes.weight: [4, 2] in the checkpoint, [4, 3] now" in message
    assert 'layer: absent in the checkpoint, "conv1" now' in message
    assert "bias" not in message
    assert "learning_rate" not in message


def test_signature_is_compared_as_json(path):
    save_checkpoint(path, {}, {"b": (1, 2), "a": float("nan")})
    assert load_checkpoint(path, {"a": float("nan"), "b": [1, 2]}) == {}
    with pytest.raises(InputError, match="JSON"):
        save_checkpoint(path, {}, {"a": torch.ones(1)})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.ones(2), r"state\['a'\]"),
        (np.float64(1.0), r"state\['a'\]"),
        ([1, {"x": Path("p")}], r"state\['a'\]\[1\]\['x'\]"),
        ({(1, 2): 3}, "keys must be"),
    ],
)
def test_what_could_not_be_loaded_safely_is_not_saved(path, value, where):
    save_checkpoint(path, state_of(1), SIGNATURE)
    with pytest.raises(InputError, match=where):
        save_checkpoint(path, {"a": value}, SIGNATURE)
    assert load_checkpoint(path, SIGNATURE)["epoch"] == 1


def test_a_view_does_not_drag_its_storage_along(path):
    save_checkpoint(path, {"row": torch.zeros(1000, 1000)[3], "parameter": torch.nn.Parameter(torch.ones(2))}, {})
    assert path.stat().st_size < 20_000
    loaded = load_checkpoint(path, {})
    assert loaded["row"].shape == (1000,)
    assert not loaded["parameter"].requires_grad


def test_no_code_is_executed(path, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    save_checkpoint(path, {}, {})
    buffer = io.BytesIO()
    torch.save({"signature": "{}", "state": Evil()}, buffer)
    payload = buffer.getvalue()
    header = module._MAGIC + len(payload).to_bytes(8, "little") + module.hashlib.sha256(payload).digest()
    path.write_bytes(header + payload)
    with pytest.raises(CheckpointError, match="plain tensors"):
        load_checkpoint(path, {})
    assert not (tmp_path / "executed").exists()


def test_folder_is_refused(tmp_path):
    for call in (lambda: save_checkpoint(tmp_path, {}, {}), lambda: load_checkpoint(tmp_path, {})):
        with pytest.raises(CheckpointError, match="is a folder"):
            call()


def test_without_hard_links_a_copy_is_kept(path, monkeypatch):
    def no_link(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_link)
    save_checkpoint(path, state_of(1), SIGNATURE)
    save_checkpoint(path, state_of(2), SIGNATURE)
    assert load_checkpoint(previous_path(path), SIGNATURE)["epoch"] == 1


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(path):
    path.parent.mkdir()
    leftovers = [path.parent / ".stage.ckpt.abcd_123.tmp", path.parent / ".stage.ckpt.previous.abcd_123.tmp"]
    others = [path.parent / ".stage.ckpt.other.abcd_123.tmp", path.parent / "stage.ckpt.notes"]
    for file in leftovers + others:
        file.write_text("x")
    save_checkpoint(path, {}, {})
    assert not any(file.exists() for file in leftovers)
    assert all(file.exists() for file in others)


def test_killed_at_any_moment_while_saving(path):
    script = textwrap.dedent(
        """
        import itertools, sys, torch
        from stfbnn.checkpoint import save_checkpoint
        torch.set_num_threads(1)
        for count in itertools.count(1):
            save_checkpoint(sys.argv[1], {"count": count, "same": torch.full((200_000,), float(count))}, {})
            print(count, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 20:
            process.send_signal(signal.SIGKILL)
            break
    remaining = process.stdout.read().split()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    finished = int(remaining[-1]) if remaining else 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_checkpoint(path, {})
    assert loaded["count"] in (finished, finished + 1)
    assert torch.equal(loaded["same"], torch.full((200_000,), float(loaded["count"])))
    assert re.fullmatch(r"stage\.ckpt\.previous", previous_path(path).name)
