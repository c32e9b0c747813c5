"""Stage two at the end of a training by Lightning."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from core_models import classification, mlp
from stfbnn.errors import InputError

with warnings.catch_warnings():
    # What Lightning and its dependencies deprecate among each other.
    warnings.simplefilter("ignore")
    import lightning as L

    from stfbnn.integrations.lightning import StageTwo
    from stfbnn.integrations.stage_two import StageTwoOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore:.*treespec.*")


class Classifier(L.LightningModule):
    def __init__(self, unpack=lambda batch: batch):
        super().__init__()
        self.model = mlp()
        self.unpack = unpack

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        x, y = self.unpack(batch)
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, _):
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Uncopyable(TensorDataset):
    """A data set that a copy of the module must not take along."""

    def __deepcopy__(self, memo):
        raise AssertionError("the data set was copied")


def loaders(count=160):
    x, y = classification(count)
    held_x, held_y = classification(80, seed=1)
    return DataLoader(Uncopyable(x, y), batch_size=32), DataLoader(TensorDataset(held_x, held_y), batch_size=40)


def trained(module, stage_two, train, held=None, epochs=3):
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[stage_two],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # Few workers, no logger: Lightning's advice.
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        trainer.fit(module, train, held)
    return module


@pytest.mark.parametrize("network", ["", "model"])
def test_the_callback_does_what_the_two_calls_do(network):
    train, held = loaders()
    stage_two = StageTwo(network=network, epochs=2, temperatures=(1.0, 0.3), progress=False)
    module = trained(Classifier(), stage_two, train, held)
    plain = copy.deepcopy(module.model)
    assert stage_two.bnn.layer_name == ("model.0" if network == "" else "0")
    assert stage_two.run.held_out_nll is not None

    bnn = stfbnn.bayesianize(plain, classification(2)[0])
    stfbnn.fit(bnn, train, val_loader=held, epochs=2, temperatures=(1.0, 0.3), progress=False)
    x = classification(20, seed=2)[0]
    assert torch.equal(stfbnn.predict(stage_two.bnn, x).probs, stfbnn.predict(bnn, x).probs)


def test_a_trained_module_with_its_trainer_is_converted_without_the_data():
    train, _ = loaders()
    stage_two = StageTwo(epochs=1, temperature=1.0, progress=False)
    module = trained(Classifier(), stage_two, train)
    assert module.trainer is not None
    bnn = stfbnn.bayesianize(module, classification(2)[0])
    assert bnn.network._trainer is None
    assert module.trainer.train_dataloader is train


def test_batches_of_another_form_are_brought_into_the_right_one():
    x, y = classification(96)
    train = DataLoader([{"features": a, "class": b} for a, b in zip(x, y, strict=True)], batch_size=32)

    def to_pair(batch):
        return batch["features"], batch["class"]

    stage_two = StageTwo(to_batch=to_pair, epochs=1, temperature=1.0, progress=False)
    trained(Classifier(to_pair), stage_two, train)
    assert stage_two.bnn.num_examples == 96


def test_the_weights_of_mappings_never_reach_the_model():
    x, y = classification(64)
    batches = [{"input": x, "labels": y, "importance": torch.ones(64)}]
    options = {"epochs": 1, "temperature": 1.0, "weight_key": "importance", "progress": False}
    bnn, _ = StageTwoOptions(fit=options).run(mlp(), batches, None)
    assert bnn.num_examples == 64


def test_options_are_looked_at_before_the_training():
    with pytest.raises(InputError, match=r"fit takes no epoch here; it takes .*epochs"):
        StageTwo(epoch=3)
    with pytest.raises(InputError, match="bayesianize takes no model"):
        StageTwo(bayesianize={"model": None})


def test_a_network_that_is_not_there_is_named_before_the_training():
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InputError, match=r"Classifier has no module 'net'; it has .*'model'"):
        trained(module, StageTwo(network="net"), loaders()[0], epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_several_processes_are_left_alone():
    stage_two = StageTwo()

    class Trainer:
        world_size = 2

    with pytest.warns(UserWarning, match="2 processes"):
        stage_two.on_fit_end(Trainer(), Classifier())
    assert stage_two.bnn is None
