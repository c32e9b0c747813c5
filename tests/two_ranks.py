"""A script of the tests as the two ranks of one run: how the tests start it, and how its ranks leave what they found."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stfbnn.errors import InputError

# Standalone takes a free port, so that several test processes can do this at once.
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")


def results_of_two(script: str, folder: Path, **environment: str) -> list[Any]:
    """Run a script that ends in `leave_results` as two ranks, and load what each of them has left."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    command = [*LAUNCHER, "--nproc-per-node", "2", script, str(folder)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"result.{rank}.pt", weights_only=True) for rank in (0, 1)]


def refusal(action: Callable[[], object]) -> str:
    """What an action is refused with; empty where it is not."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


def leave_results(find: Callable[[Path], Any]) -> None:
    """Be a rank: find the results, and leave them in FOLDER/result.RANK.pt."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    torch.save(find(folder), folder / f"result.{os.environ['RANK']}.pt")
    # What a thread of the process group does as the interpreter goes down is not tested.
    torch.distributed.barrier()
    os._exit(0)
