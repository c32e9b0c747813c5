"""The command line, ``stfbnn``: one command a file, each thin (parse, call the library, print).

Nothing heavy is imported before a command needs it, so that ``stfbnn --help`` answers at once.
"""

from stfbnn.cli.app import app, main

__all__ = ["app", "main"]
