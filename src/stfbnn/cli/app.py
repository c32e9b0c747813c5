"""The application: its commands, its exit codes, and how errors and warnings are told."""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stfbnn.cli import (
    abstain,
    attack,
    benchmark,
    certify,
    demo,
    evaluate,
    export,
    fit,
    landscape,
    merge,
    predict,
    predict_shards,
    privacy,
    ranks,
    train,
)
from stfbnn.cli.options import help_text
from stfbnn.cli.output import Interrupted, complain
from stfbnn.errors import StfbnnError

FAILED, INTERRUPTED = 1, 130

HELP = help_text("""
Make the first layer of a trained network Bayesian, and get predictions that know what they do not know.

The way, in short:
    stfbnn demo                               see it work, in under a minute
    stfbnn train --data DATA -o run           stage one: an ordinary network
    stfbnn fit run                            stage two: its first layer
    stfbnn evaluate run --ood OTHER           is it better, and at what?
    stfbnn abstain run --max-risk 0.05        when not to trust it
    stfbnn predict run --data NEW -o p.csv    classes with their uncertainty
    stfbnn predict-shards run --data d -o p   the same for data of any size, on any number of machines
    stfbnn export run -o model.onnx           the same from one file, without this library
    stfbnn landscape run                      which optima the first layer has, and which layer to take
    stfbnn attack run                         who can fool it, and by how little?
    stfbnn privacy run                        what it tells of its training data
    stfbnn certify run --fit                  how often can it err at most, on examples yet unseen?
    stfbnn benchmark quick                    every method that one could pick, side by side

A network that is trained already needs no `train`: give `fit` its --model, --checkpoint and --data.

Results go to standard output, all else to standard error; with --json a command prints one JSON object and nothing else.

Exit codes:
    0    done
    1    failed: one line says what was wrong (--debug adds the traceback)
    2    the command line itself is wrong
    130  interrupted (Ctrl-C); run again, `train` and `fit` go on from there
""")


class CommandGroup(TyperGroup):
    """Runs the commands, and turns what they raise into one line and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was asked for, and refuse it where it is not for several processes."""
        found = super().resolve_command(ctx, args)
        ranks.require_shared(found[0])
        return found

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        debug = bool(ctx.params.get("debug"))
        try:
            with _warnings_on_one_line():
                return super().invoke(ctx)
        except StfbnnError as error:
            ranks.tell_once(partial(_tell, error, debug))
            raise typer.Exit(FAILED) from error
        except OSError as error:
            # A reader that went away (such as `head`) is not a failure to report; typer knows what to do.
            if error.errno == errno.EPIPE:
                raise
            ranks.tell_once(partial(_tell, error, debug))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            ranks.tell_once(partial(complain, str(error) if isinstance(error, Interrupted) else "interrupted"))
            raise typer.Exit(INTERRUPTED) from error
        except RuntimeError as error:
            # A rank that another one's end has cut off.
            if ranks.told():
                raise typer.Exit(FAILED) from error
            raise


app = typer.Typer(
    cls=CommandGroup,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", help=demo.HELP)(demo.demo)
app.command("train", help=train.HELP)(train.train)
app.command("fit", help=fit.HELP)(fit.fit)
app.command("evaluate", help=evaluate.HELP)(evaluate.evaluate)
app.command("abstain", help=abstain.HELP)(abstain.abstain)
app.command("predict", help=predict.HELP)(predict.predict)
app.command("predict-shards", help=predict_shards.HELP)(predict_shards.predict_shards)
app.command("export", help=export.HELP)(export.export)
app.command("merge", help=merge.HELP)(merge.merge)
app.command("landscape", help=landscape.HELP)(landscape.landscape)
app.command("attack", help=attack.HELP)(attack.attack)
app.command("privacy", help=privacy.HELP)(privacy.privacy)
app.command("certify", help=certify.HELP)(certify.certify)
app.command("benchmark", help=benchmark.HELP)(benchmark.benchmark)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - slow, needed here alone

        typer.echo(f"stfbnn {version('stfbnn')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="STFBNN_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Options of every command; what they do is done above."""


def main() -> None:
    """The entry point ``stfbnn``."""
    try:
        app(prog_name="stfbnn")
    except KeyboardInterrupt:
        # Before a command ran, such as while modules are imported.
        complain("interrupted")
        sys.exit(INTERRUPTED)


def _tell(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    complain(f"error: {error}")


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Show the library's warnings as a user reads them; what other libraries warn their own users of is theirs."""

    def show(*arguments: Any, **_: Any) -> None:
        complain(f"warning: {arguments[0]}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("ignore", module=r"(torch|lightning|numpy|sklearn)")
        warnings.showwarning = show
        yield
