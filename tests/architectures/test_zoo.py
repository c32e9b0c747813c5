"""Every architecture of the table, small but of the same classes, goes the whole way: convert, fit, predict, save, load."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import stfbnn
from stfbnn.batches import call_model, map_tensors, output_tensor
from zoo import ROWS


class Examples(Dataset):
    """Inputs of any structure with targets, example by example."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        one = map_tensors(self.inputs, lambda tensor: tensor[index])
        return {**one, "labels": self.targets[index]} if isinstance(one, dict) else (one, self.targets[index])


def built(row, count=12):
    torch.manual_seed(0)
    model, inputs = row.build(True)
    with torch.no_grad():
        # Weights and running statistics as of a trained network: with those of the start, a deep network's signal dies.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
            elif name.endswith("weight"):
                parameter.fill_(1.0)
        for _ in range(20):
            call_model(model.train(), inputs(16))
    torch.manual_seed(1)
    return model.eval(), inputs(count)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_whole_way(row, tmp_path):
    model, inputs = built(row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert stfbnn.locate_first_layer(model, inputs).name == row.first
    bnn = stfbnn.bayesianize(model, inputs, layer=row.layer, **row.options)
    assert bnn.layer_name == (row.layer or row.first)

    with torch.no_grad():
        plain = output_tensor(call_model(model, inputs))
        at_mean = output_tensor(call_model(lambda *a, **k: bnn(*a, weights="mean", **k), inputs))
    assert torch.allclose(at_mean, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))

    targets = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(2))
    loader = DataLoader(Examples(inputs, targets), batch_size=6)
    run = stfbnn.fit(bnn, loader, epochs=1, temperature=1.0, progress=False)
    assert len(run.history) == 1
    pred = stfbnn.predict(bnn, inputs, samples=3)
    assert pred.probs.shape == (12, 10)
    assert torch.allclose(pred.probs.sum(1), torch.ones(12, dtype=torch.float64))
    assert float(pred.epistemic.min()) >= 0
    assert float(pred.epistemic.max()) > 0

    again = stfbnn.load(stfbnn.save(bnn, tmp_path / "posterior"), model)
    assert torch.equal(stfbnn.predict(again, inputs, samples=3).probs, pred.probs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("row", [row for row in ROWS if row.layer is None], ids=lambda row: row.name)
def test_a_draw_is_the_plain_network_with_those_weights(row):
    model, inputs = built(row, 3)
    bnn = stfbnn.bayesianize(model, inputs)
    generator = torch.Generator().manual_seed(3)
    vector = bnn.posterior.draw(bnn.draw_noise(generator)).detach()
    with torch.no_grad():
        drawn = bnn.outputs(vector, inputs)
        for name, value in bnn.layout.unflatten(vector).items():
            parameter = model.get_parameter(f"{row.first}.{name}")
            padding = getattr(model.get_submodule(row.first), "padding_idx", None)
            kept = None if padding is None else parameter[padding].clone()
            parameter.copy_(value)
            if kept is not None:
                parameter[padding] = kept
        plain = output_tensor(call_model(model, inputs))
    assert torch.allclose(drawn, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
