"""``stfbnn fit``: stage two, the posterior of the first layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stfbnn.cli import options as opt
from stfbnn.cli import ranks
from stfbnn.cli import record as rec
from stfbnn.cli.output import Output, resumable
from stfbnn.errors import InputError

HELP = opt.help_text("""
Make a trained network's first layer Bayesian and infer its posterior (stage two).

RUN is the folder that `stfbnn train` wrote: network, data and the held-out part are taken from it. For a network of your own
give --model, --checkpoint, --data and --output instead, and held-out data that it has NEVER seen: --val-data, or
--hold-out with --hold-out-of test. By these the temperature T is chosen; on data that training fitted, the lowest T always
wins. Without them T = 0.1 is taken, with a warning.

The output folder gets the posterior (some kilobytes; the network itself is not copied), fit.json, which says where network
and data are, and a checkpoint from which a killed run goes on with the same result.

Started by torchrun, each process learns from its share of the data, with batches of --batch-size and draws of its own; RUN
and the output folder are ones that all of them see.

Examples:
    stfbnn fit run
    stfbnn fit run --tau held-out --epochs 20 -o run-20
    stfbnn fit run --engine bayes-by-backprop --temperature 1 -o run-bbb
    stfbnn fit --model my_nets:cnn --checkpoint cnn.pth --data mnist/ \\
        --hold-out 0.2 --hold-out-of test -o bayes
    torchrun --nproc-per-node 4 --no-python stfbnn fit run
""")

_INFERENCE = opt.INFERENCE


def fit(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder that `stfbnn train` wrote.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the posterior. Default: RUN itself.", show_default=False),
    ] = None,
    model: opt.Factory = None,
    model_args: opt.FactoryArguments = "{}",
    checkpoint: opt.Checkpoint = None,
    layer: Annotated[
        str | None,
        typer.Option(help="The layer's name, where the first one is not meant.", rich_help_panel=opt.MODEL),
    ] = None,
    data: opt.Source = None,
    kind: opt.Kind = None,
    target: opt.Target = None,
    task: opt.Task = None,
    image_size: opt.ImageSize = None,
    split: opt.SplitNumber = 0,
    limit: opt.Limit = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    val_data: Annotated[
        str | None,
        typer.Option(help="Held-out data from elsewhere; of the same kind.", rich_help_panel=opt.DATA),
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(
            help="Share or number of examples that the network has never seen. Default: RUN's.",
            rich_help_panel=opt.DATA,
            show_default=False,
        ),
    ] = None,
    hold_out_of: Annotated[
        str,
        typer.Option(
            help="train or test: the part to hold out of; `evaluate` leaves it out.", rich_help_panel=opt.DATA
        ),
    ] = "train",
    batch_size: opt.BatchSize = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the data, for each T.", rich_help_panel=_INFERENCE)] = 10,
    engine: Annotated[
        str, typer.Option(help="auto, natural-gradient, bayes-by-backprop or laplace.", rich_help_panel=_INFERENCE)
    ] = "auto",
    engine_options: Annotated[
        str, typer.Option(help="Its settings, as JSON: '{\"learning_rate\": 0.05}'.", rich_help_panel=_INFERENCE)
    ] = "{}",
    estimator: Annotated[
        str,
        typer.Option(
            help="Of the gradient: auto, shared, antithetic, per-example, flipout or local-reparameterization.",
            rich_help_panel=_INFERENCE,
        ),
    ] = "auto",
    draws: Annotated[
        int | None,
        typer.Option(help="Passes a step. Default: the estimator's.", rich_help_panel=_INFERENCE, show_default=False),
    ] = None,
    posterior: Annotated[
        str,
        typer.Option(
            help="Family: mean-field, low-rank, filterwise, full, mixture or point.", rich_help_panel=_INFERENCE
        ),
    ] = "mean-field",
    posterior_options: Annotated[
        str, typer.Option(help="Its settings, as JSON: '{\"components\": 4}'.", rich_help_panel=_INFERENCE)
    ] = "{}",
    prior: Annotated[
        str | None,
        typer.Option(
            help="rms, rms-per-parameter, pretrained, empirical-bayes, or a standard deviation; as JSON one for each of the "
            'layer\'s parameters: \'{"weight": 0.1, "bias": 1}\'. Default: rms, for embeddings pretrained.',
            rich_help_panel=_INFERENCE,
            show_default=False,
        ),
    ] = None,
    likelihood: Annotated[
        str,
        typer.Option(
            help="auto, categorical, bernoulli, gaussian, heteroscedastic or poisson.", rich_help_panel=_INFERENCE
        ),
    ] = "auto",
    temperature: Annotated[
        str | None,
        typer.Option(
            help="T, a number or held-out. Default: held-out where data are held out, else 0.1.",
            rich_help_panel=_INFERENCE,
            show_default=False,
        ),
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="What held-out tries, from high to low. Default: 1,0.3,0.1,0.03,0.01, until it gets worse twice.",
            rich_help_panel=_INFERENCE,
            show_default=False,
        ),
    ] = None,
    tau: Annotated[
        str,
        typer.Option(help="Temperature of the prediction, a number or held-out.", rich_help_panel=_INFERENCE),
    ] = "1",
    early_stop: Annotated[
        str | None,
        typer.Option(help="nll or free-energy, on the held-out data.", rich_help_panel=_INFERENCE),
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without gain.", rich_help_panel=_INFERENCE)] = 3,
    samples: Annotated[int, typer.Option(help="Posterior draws of a held-out score.", rich_help_panel=_INFERENCE)] = 32,
    seed: opt.Seed = 0,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16-mixed runs the network in bfloat16. Default: 32-true.",
            rich_help_panel=_INFERENCE,
            show_default=False,
        ),
    ] = None,
    device: opt.Device = "auto",
    devices: opt.Devices = "auto",
    num_nodes: opt.NumNodes = 1,
    strategy: opt.Strategy = "auto",
    resume: opt.Resume = True,
    as_json: opt.AsJson = False,
) -> None:
    """Parse, put network and data together, infer, save, print."""
    from stfbnn.artifact import save  # noqa: PLC0415 - it imports torch, which takes seconds
    from stfbnn.artifact_files import check_target  # noqa: PLC0415
    from stfbnn.cli import sources, stage_two  # noqa: PLC0415
    from stfbnn.conversion import bayesianize, parameter_counts  # noqa: PLC0415
    from stfbnn.files import plain, write_json  # noqa: PLC0415
    from stfbnn.inference.diagnostics import diagnose, findings_table  # noqa: PLC0415
    from stfbnn.inference.fit import fit as run_inference  # noqa: PLC0415
    from stfbnn.posterior import build_family  # noqa: PLC0415

    folder = output or run
    if folder is None:
        raise InputError("say where to put the posterior with --output")
    request = stage_two.Request(
        run=run,
        checkpoint=checkpoint,
        factory=model,
        arguments=opt.parse_object("--model-args", model_args),
        data=opt.data_choice(data, kind, target, task, image_size, split, limit),
        val_data=val_data,
        share=None if hold_out is None else opt.parse_share("--hold-out", hold_out),
        share_of=hold_out_of,
        mean=opt.parse_numbers("--mean", mean),
        std=opt.parse_numbers("--std", std),
        seed=seed,
    )
    # Of any type, for the library checks what they say, and its message is the better one.
    chosen: dict[str, Any] = {
        "temperature": opt.parse_number_or_word("--temperature", temperature, ("held-out",)),
        "predictive_temperature": opt.parse_number_or_word("--tau", tau, ("held-out",)),
        "early_stop": early_stop,
        "engine_options": opt.parse_object("--engine-options", engine_options),
        "precision": precision,
    }
    if temperatures is not None:
        chosen["temperatures"] = opt.parse_numbers("--temperatures", temperatures)
    family = build_family(posterior, opt.parse_object("--posterior-options", posterior_options))
    chosen_prior = opt.parse_prior(prior)
    group = ranks.join(device, devices, num_nodes, strategy)
    if group.launched or strategy != "auto":
        chosen |= group.settings
    out = Output(as_json, silent=not group.first)
    group.by_first(lambda: check_target(folder / rec.POSTERIOR, overwrite=True))

    ready = group.by_each(lambda: stage_two.prepare(request, out.note))
    group.require_same("data", (ready.record.train_digest, ready.record.held_out_digest))
    if resume:
        group.by_first(lambda: ready.record.refuse_other(folder / rec.FIT_RECORD))
    out.note(ready.summary())
    network = ready.network.to(group.device)
    example = next(iter(sources.batches(ready.example, ready.record, len(ready.example))))[0].to(group.device)
    bnn = bayesianize(network, example, layer=layer, posterior=family, prior=chosen_prior)
    group.by_first(lambda: ready.record.write(folder / rec.FIT_RECORD))
    state = folder / rec.FIT_CHECKPOINT
    with resumable(state):
        result = run_inference(
            bnn,
            sources.batches(ready.train, ready.record, batch_size, shuffle=True),
            epochs=epochs,
            engine=engine,
            estimator=estimator,
            draws=draws,
            likelihood=likelihood,
            seed=seed,
            val_loader=None if ready.held_out is None else sources.batches(ready.held_out, ready.record, batch_size),
            patience=patience,
            val_samples=samples,
            checkpoint=state,
            resume=resume,
            **chosen,
        )

    def saved() -> Path:
        path = save(bnn, folder / rec.POSTERIOR, overwrite=True)
        write_json(folder / rec.FIT_HISTORY, plain(result.as_dict()))
        return path

    posterior_folder = group.by_first(saved)
    findings = diagnose(bnn, result)
    counts = parameter_counts(bnn)
    out.show(result.table())
    if result.components:
        out.show(result.component_table())
    if findings:
        out.show(findings_table(findings))
    out.show(
        f"\nLayer {bnn.layer_name or '(the model itself)'}: {counts['random']:,} of {counts['total']:,} parameters are "
        f"random, T = {result.temperature:g}, τ = {result.predictive_temperature:.3g}."
        f"\nThe posterior is in {posterior_folder}; go on with: stfbnn evaluate {folder}"
    )
    out.finish(
        {
            "output": folder,
            "posterior": posterior_folder,
            "layer": bnn.layer_name,
            "random_parameters": counts["random"],
            "parameters": counts["total"],
            "findings": [asdict(finding) for finding in findings],
            **result.as_dict(),
        }
    )
    group.leave()
