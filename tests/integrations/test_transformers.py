"""Stage two at the end of a training by the Trainer of transformers."""

import warnings

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import stfbnn
from stfbnn.errors import InputError
from stfbnn.integrations.transformers import StageTwo


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (count, 8), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int((row > 27).float().mean() > 0.5)}
        for row in ids
    ]


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, num_labels=2, **sizes))


@pytest.mark.parametrize("layer", [None, "bert.embeddings.position_embeddings"])
def test_the_callback_infers_from_the_trainers_own_data(layer, tmp_path):
    model = bert()
    stage_two = StageTwo(bayesianize={"layer": layer}, epochs=2, temperatures=(1.0, 0.3), progress=False)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        eval_strategy="epoch",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, train_dataset=sentences(96, 0), eval_dataset=sentences(64, 1), callbacks=[stage_two]
    )
    with warnings.catch_warnings():
        # What the trainer says of its own defaults, and that so little data repair nothing.
        warnings.simplefilter("ignore")
        trainer.train()
    bnn, run = stage_two.bnn, stage_two.run
    assert bnn.layer_name == (layer or "bert.embeddings.word_embeddings")
    assert bnn.num_examples == 96
    assert run.held_out_nll is not None
    test = sentences(10, 2)
    batch = {key: torch.stack([one[key] for one in test]) for key in ("input_ids", "attention_mask")}
    pred = stfbnn.predict(bnn, batch)
    assert pred.probs.shape == (10, 2)
    assert float(pred.epistemic.max()) > 0


def test_a_network_that_is_not_there_is_named_before_the_training():
    with pytest.raises(InputError, match=r"BertForSequenceClassification has no module 'net'"):
        StageTwo(network="net").on_train_begin(None, None, None, model=bert())
