"""Bulk prediction: the figures of ``predict``, in order, each row once whatever kills the run, in bounded memory."""

import json
import os
import random
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bulk_cases import IDS, SIZES, HubDataset, SlowSource, X, contents, network, parquet_folder
from torch import nn
from torch.utils.data import TensorDataset

from core_models import mlp
from stfbnn.bulk import Rows, Source, predict_shards
from stfbnn.bulk.reading import ShardReader
from stfbnn.conversion import bayesianize
from stfbnn.errors import CheckpointError, DataError, InputError, NotFittedError
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson
from stfbnn.posterior import Mixture
from stfbnn.prediction import predict


def column(table, name):
    """A column as a tensor, lists as rows."""
    return torch.tensor(table.column(name).to_pylist(), dtype=torch.float64)


def in_child(work):
    """Begin ``work`` in a forked process, which never returns into the test."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def check_classes(table, pred):
    for name in ("probs", "confidence", "entropy", "aleatoric", "epistemic"):
        torch.testing.assert_close(column(table, name), getattr(pred, name).double(), atol=1e-6, rtol=0)
    assert table.column("label").to_pylist() == pred.labels.tolist()


@pytest.mark.parametrize("rows_per_shard", [1, 7, 10_000])
def test_the_figures_are_those_of_predict_row_by_row_and_in_order(tmp_path, rows_per_shard):
    bnn = network()
    sizes = (5, 0, 3) if rows_per_shard == 1 else SIZES
    source = parquet_folder(tmp_path / "in", sizes)
    done = predict_shards(
        bnn, source, tmp_path / "out", samples=5, seed=3, keep=["id"], rows_per_shard=rows_per_shard, batch_size=16
    )
    table = done.table()
    count = len(table)
    assert (done.rows, done.missing(), done.rows_before) == (count, [], 0)
    assert table.column("id").to_pylist() == IDS[:count]
    assert table.column("row").to_pylist() == [row for size in sizes for row in range(size)][:count]
    check_classes(table, predict(bnn, X[:count], samples=5, seed=3))
    assert done.files() == sorted((tmp_path / "out").glob("*.parquet"))
    assert max(pq.ParquetFile(path).metadata.num_rows for path in done.files()) <= rows_per_shard
    assert pa.types.is_fixed_size_list(table.schema.field("probs").type)


def test_equal_chunks_are_equal_bit_for_bit(tmp_path):
    bnn = network()
    x = torch.randn(1030, 6, generator=torch.Generator().manual_seed(2))
    done = predict_shards(bnn, x, tmp_path, samples=2, rows_per_shard=512, batch_size=100)
    # 512 rows are a chunk for `predict` too.
    assert torch.equal(column(done.table(), "probs"), predict(bnn, x, samples=2).probs)


def test_batches_and_readers_change_no_bit(tmp_path):
    bnn, source = network(), parquet_folder(tmp_path / "in")
    files = []
    for batch, workers in ((256, 1), (3, 2), (7, 9)):
        out = tmp_path / f"{batch}"
        predict_shards(bnn, source, out, samples=2, keep=["id"], batch_size=batch, workers=workers, rows_per_shard=40)
        files.append(contents(out))
    assert files[0] == files[1] == files[2]


def test_every_file_says_what_it_was_made_with(tmp_path):
    done = predict_shards(network(), X, tmp_path, samples=4, seed=8, predictive_temperature=1.5)
    mark = json.loads(pq.read_schema(done.files()[0]).metadata[b"stfbnn"])
    assert mark["last"]
    settings = mark["settings"]
    assert (settings["samples"], settings["seed"], settings["predictive_temperature"]) == (4, 8, 1.5)
    assert len(settings["posterior"]) == 64
    assert settings["library_version"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_any_kill_a_rerun_ends_with_the_bytes_of_an_undisturbed_run(tmp_path):
    bnn = network()
    options = {"samples": 2, "rows_per_shard": 9, "batch_size": 4, "keep": ["id"]}

    def run(folder, pause):
        return predict_shards(bnn, SlowSource(X, pause=pause), folder, **options)

    run(tmp_path / "whole", 0)
    expected = contents(tmp_path / "whole")
    begun = time.perf_counter()
    run(tmp_path / "timed", 0.002)
    length = time.perf_counter() - begun

    moments, interrupted = random.Random(5), 0
    for attempt in range(5):
        out = tmp_path / f"killed-{attempt}"
        for _ in range(2):
            child = in_child(lambda out=out: run(out, 0.002))
            time.sleep(moments.uniform(0.02, 0.8) * length)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        there = contents(out) if out.exists() else {}
        interrupted += 0 < len(there) < len(expected)
        # What is under its final name is whole already.
        assert all(expected[name] == data for name, data in there.items() if not name.startswith("."))
        again = run(out, 0)
        assert contents(out) == expected
        assert again.rows + again.rows_before == len(X)
    assert interrupted, "no kill came in the middle"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_just_before_or_after_a_file_appears_loses_and_doubles_nothing(tmp_path, after):
    bnn, options = network(), {"samples": 2, "rows_per_shard": 40, "batch_size": 16}
    predict_shards(bnn, SlowSource(X, shards=2), tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    for number in range(len(expected)):
        out = tmp_path / str(number)
        original, calls = Path.replace, iter(range(100))

        def replace(self, target, original=original, calls=calls, number=number):
            last = next(calls) == number
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(out=out, replace=replace):
            Path.replace = replace
            predict_shards(bnn, SlowSource(X, shards=2), out, **options)

        child = in_child(work)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        there = [name for name in contents(out) if not name.startswith(".")]
        assert len(there) == number + after
        predict_shards(bnn, SlowSource(X, shards=2), out, **options)
        assert contents(out) == expected


def test_a_rerun_predicts_only_what_is_missing(tmp_path):
    bnn, source = network(), parquet_folder(tmp_path / "in")
    out = tmp_path / "out"
    first = predict_shards(bnn, source, out, samples=2, keep=["id"], rows_per_shard=20)
    expected = contents(out)
    (out / "shard-000003-000001.parquet").unlink()
    (out / ".shard-000003-000001.parquet.abc.tmp").write_text("left by a killed run")
    assert first.missing() == ["data-3.parquet"]
    again = predict_shards(bnn, source, out, samples=2, keep=["id"], rows_per_shard=20)
    # Rows before the gap stay, those after it are made anew.
    assert (again.rows, again.rows_before) == (71 - 20, len(X) - 51)
    assert contents(out) == expected
    assert predict_shards(bnn, source, out, samples=2, keep=["id"], rows_per_shard=20).rows == 0
    assert predict_shards(bnn, source, out, samples=2, keep=["id"], rows_per_shard=20, resume=False).rows == len(X)
    assert contents(out) == expected


def test_ranks_by_the_environment_write_apart_and_any_number_of_them_can_finish(tmp_path, monkeypatch):
    bnn, source = network(), parquet_folder(tmp_path / "in")
    predict_shards(bnn, source, tmp_path / "one", samples=2, keep=["id"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = predict_shards(bnn, source, tmp_path / "two", samples=2, keep=["id"])
    assert (second.shards, second.rank) == (("data-1.parquet", "data-3.parquet"), 1)
    assert second.missing() == ["data-0.parquet", "data-2.parquet", "data-4.parquet"]
    monkeypatch.setenv("RANK", "0")
    predict_shards(bnn, source, tmp_path / "two", samples=2, keep=["id"])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    # Rank 0 of 2 never came: three others do its work.
    predict_shards(bnn, source, tmp_path / "three", samples=2, keep=["id"], rank=1, world_size=2)
    rest = [
        predict_shards(bnn, source, tmp_path / "three", samples=2, keep=["id"], rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert sum(one.rows for one in rest) == 50 + 33 + 1
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_another_posterior_seed_or_source_in_the_folder_is_refused(tmp_path):
    bnn, source = network(), parquet_folder(tmp_path / "in", (5, 5))
    out = tmp_path / "out"
    predict_shards(bnn, source, out, samples=2, keep=["id"])
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"seed \(0 there, 1 now\)"):
        predict_shards(bnn, source, out, samples=2, keep=["id"], seed=1)
    with pytest.raises(CheckpointError, match=r"samples \(2 there, 3 now\)"):
        predict_shards(bnn, source, out, samples=3, keep=["id"])
    other = network()
    with torch.no_grad():
        next(other.posterior.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="posterior"):
        predict_shards(other, source, out, samples=2, keep=["id"])
    with pytest.raises(CheckpointError, match=r"another source: 2 shards there, 3 now; 'data-2.parquet' is new"):
        predict_shards(bnn, parquet_folder(tmp_path / "more", (5, 5, 5)), out, samples=2, keep=["id"])
    parquet_folder(tmp_path / "in", (5, 5), X + 1)
    with pytest.raises(CheckpointError, match=r"'data-0.parquet' has changed since"):
        predict_shards(bnn, source, out, samples=2, keep=["id"])
    assert contents(out) == before


def test_a_damaged_output_file_is_named_and_not_taken_for_done(tmp_path):
    bnn = network()
    done = predict_shards(bnn, X, tmp_path, samples=2)
    done.files()[0].write_bytes(done.files()[0].read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"shard-000000-000000.parquet is damaged"):
        predict_shards(bnn, X, tmp_path, samples=2)


def test_a_slow_network_holds_the_reader_back():
    source = SlowSource(X, shards=1)
    reader = ShardReader(source, "part-0", (), 1, skip=0, depth=3)
    most = taken = 0
    for _ in reader:
        taken += 1
        time.sleep(0.003)
        most = max(most, source.batches - taken)
    reader.close()
    # Three in the queue, and one in the reader's hands.
    assert (taken, most) == (len(X), 4)


def test_memory_holds_a_few_batches_whatever_the_size_of_the_shard(tmp_path):
    alive, most = set(), 0

    class Counting(SlowSource):
        def open(self, name, keep, batch_size):
            nonlocal most
            for number, batch in enumerate(super().open(name, keep, batch_size)):
                # Memory of its own, whose owner is known: a slice that is kept counts.
                array = batch.inputs.numpy().copy()
                alive.add(number)
                weakref.finalize(array, alive.discard, number)
                most = max(most, len(alive))
                yield Rows(torch.from_numpy(array))
                del array

    x = torch.randn(8000, 6, generator=torch.Generator().manual_seed(4))
    done = predict_shards(network(), Counting(x, shards=1), tmp_path, samples=1, batch_size=10, rows_per_shard=3000)
    assert (done.rows, len(done.files())) == (8000, 3)
    # A chunk of 512 rows, the queue, and what is in hands: not the 800 batches of the shard.
    assert 52 <= most < 70


def test_a_reader_that_is_closed_early_stops():
    source = SlowSource(X, shards=1)
    reader = ShardReader(source, "part-0", (), 1, skip=0, depth=2)
    next(iter(reader))
    reader.close()
    assert source.batches < 10


def test_nan_names_the_row_and_the_shard(tmp_path):
    bad = X.clone()
    bad[50 + 17, 2] = float("nan")
    source = parquet_folder(tmp_path / "in", (50, 40), bad)
    with pytest.raises(DataError, match=r"row 17 .*'data-1.parquet' holds NaN"):
        predict_shards(network(), source, tmp_path / "out", samples=2, keep=["id"], batch_size=8)


def test_a_damaged_shard_is_named_or_left_out_whole_and_listed(tmp_path):
    bnn, source = network(), parquet_folder(tmp_path / "in", (20, 30, 10))
    damaged = source / "data-1.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"data-1.parquet cannot be read as parquet"):
        predict_shards(bnn, source, out, samples=2, keep=["id"])
    done = predict_shards(bnn, source, out, samples=2, keep=["id"], on_error="skip")
    assert [one.shard for one in done.skipped] == done.missing() == ["data-1.parquet"]
    assert "cut short" in done.skipped[0].reason
    assert done.table().column("id").to_pylist() == IDS[:20] + IDS[50:60]
    # Repaired, it is done, and nothing else is.
    damaged.write_bytes(whole)
    again = predict_shards(bnn, source, out, samples=2, keep=["id"])
    assert (again.rows, again.rows_before, again.missing()) == (30, 30, [])
    assert again.table().column("id").to_pylist() == IDS[:60]


def test_a_shard_that_breaks_in_the_middle_leaves_no_part_behind_when_skipped(tmp_path):
    class Breaking(SlowSource):
        def open(self, name, keep, batch_size):
            for number, batch in enumerate(super().open(name, keep, batch_size)):
                if name == "part-1" and number == 3:
                    raise RuntimeError("the line went dead")
                yield batch

    options = {"samples": 2, "rows_per_shard": 4, "batch_size": 4}
    with pytest.raises(DataError, match="shard 'part-1' cannot be read: RuntimeError: the line went dead"):
        predict_shards(network(), Breaking(X, shards=3), tmp_path, **options)
    done = predict_shards(network(), Breaking(X, shards=3), tmp_path, on_error="skip", **options)
    assert not list(tmp_path.glob("shard-000001-*"))
    assert [one.shard for one in done.skipped] == ["part-1"]


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [(Gaussian(noise_std=0.3), 1), (Gaussian(noise_std=0.3), 2), (HeteroscedasticGaussian(), 2), (Poisson(), 1)],
)
def test_numbers_have_means_and_standard_deviations(tmp_path, likelihood, outputs):
    bnn = network(likelihood, outputs)
    table = predict_shards(bnn, X[:40], tmp_path, samples=4, rows_per_shard=15).table()
    pred = predict(bnn, X[:40], samples=4)
    expected = {
        "mean": pred.mean,
        "std": pred.std,
        "aleatoric_std": pred.aleatoric.sqrt(),
        "epistemic_std": pred.epistemic.sqrt(),
    }
    assert table.column_names == ["row", *expected]
    for name, values in expected.items():
        found = column(table, name).reshape(values.shape)
        torch.testing.assert_close(found, values.double(), atol=1e-5, rtol=1e-5)


def test_labels_have_a_probability_each(tmp_path):
    bnn = network(Bernoulli(), 3)
    table = predict_shards(bnn, X[:20], tmp_path, samples=4).table()
    pred = predict(bnn, X[:20], samples=4)
    torch.testing.assert_close(column(table, "probs"), pred.probs.double(), atol=1e-6, rtol=0)
    assert table.column("label").to_pylist() == pred.labels.tolist()


def test_a_class_for_each_position_is_a_flat_list_whose_shape_the_file_names(tmp_path):
    torch.manual_seed(0)
    bnn = bayesianize(nn.Conv2d(1, 3, 3, padding=1), torch.zeros(1, 1, 4, 5))
    bnn.likelihood = Categorical()
    images = torch.randn(7, 1, 4, 5)
    table = predict_shards(bnn, images, tmp_path, samples=3).table()
    pred = predict(bnn, images, samples=3)
    assert json.loads(table.schema.field("probs").metadata[b"shape"]) == [4, 5, 3]
    found = column(table, "probs").reshape(7, 4, 5, 3).movedim(-1, 1)
    torch.testing.assert_close(found, pred.probs.double(), atol=1e-6, rtol=0)
    assert torch.equal(column(table, "label").reshape(7, 4, 5).long(), pred.labels)


def test_a_mixture_and_a_model_of_several_inputs_are_predicted_as_predict_does(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a, b):
            return self.net(torch.cat([a, b], dim=1))

    bnn = bayesianize(Two(), (X[:2, :4], X[:2, 4:]), posterior=Mixture(components=2))
    bnn.likelihood = Categorical()
    data = TensorDataset(X[:, :4], X[:, 4:])
    table = predict_shards(bnn, data, tmp_path, samples=4, has_targets=False, rows_per_shard=60).table()
    check_classes(table, predict(bnn, (X[:, :4], X[:, 4:]), samples=4))


def test_an_empty_shard_is_a_file_without_rows_and_with_all_columns(tmp_path):
    source = parquet_folder(tmp_path / "in", (0, 3))
    done = predict_shards(network(), source, tmp_path / "out", samples=2, keep=["id"])
    empty, full = [pq.read_table(path) for path in done.files()]
    assert (len(empty), len(full)) == (0, 3)
    assert empty.column_names == full.column_names
    assert empty.schema.field("probs").type == full.schema.field("probs").type


def test_rows_may_be_kept_under_other_names(tmp_path):
    source = HubDataset({"x": X[:5].tolist(), "label": list("abcde")})
    with pytest.raises(InputError, match="'label': 'true_label'"):
        predict_shards(network(), source, tmp_path, keep=["label"])
    table = predict_shards(network(), source, tmp_path, samples=2, keep={"label": "true_label"}).table()
    assert table.column("true_label").to_pylist() == list("abcde")


def test_a_source_of_ones_own_must_give_a_value_a_row(tmp_path):
    class Short(SlowSource):
        def open(self, name, keep, batch_size):
            for batch in super().open(name, (), batch_size):
                yield Rows(batch.inputs, {"id": [1]})

    assert isinstance(Short(X), Source)
    with pytest.raises(InputError, match="one value a row"):
        predict_shards(network(), Short(X), tmp_path, keep=["id"], samples=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples"),
        ({"rows_per_shard": 0}, "rows_per_shard must be a positive integer"),
        ({"workers": 1.5}, "workers must be a positive integer"),
        ({"on_error": "ignore"}, "on_error"),
        ({"rank": 1}, "both rank and world_size"),
        ({"rank": 2, "world_size": 2}, "less than world_size"),
        ({"predictive_temperature": 0.0}, "predictive_temperature"),
        ({"keep": "id"}, "keep must be a list"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        predict_shards(network(), X, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_network_that_was_not_fitted_is_refused(tmp_path):
    bnn = network()
    bnn.likelihood = None
    with pytest.raises(NotFittedError):
        predict_shards(bnn, X, tmp_path)
    with pytest.raises(InputError, match="no rows"):
        predict_shards(network(), torch.zeros(0, 6), tmp_path)


def test_dtypes_are_those_of_predictions(tmp_path):
    table = predict_shards(network(), X[:5], tmp_path, samples=2).table()
    assert table.schema.field("probs").type.value_type == pa.float64()
    assert np.asarray(table.column("label")).dtype == np.int64


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_start_at_once_share_a_folder(tmp_path):
    bnn = network()

    def run(folder, rank, world_size):
        return predict_shards(bnn, SlowSource(X), folder, samples=2, rank=rank, world_size=world_size)

    run(tmp_path / "one", 0, 1)
    children = [in_child(lambda rank=rank: run(tmp_path / "three", rank, 3)) for rank in range(3)]
    for child in children:
        os.waitpid(child, 0)
    # Without a further call.
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
