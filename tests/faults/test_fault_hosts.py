"""Three hosts, each a network namespace with an address of its own, of which one is cut off in the midst of a run."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import fault_host_script
import pytest
import torch

from stfbnn.processes import TIMEOUT

HOSTS = 3
# Seconds that a rank waits for the others, and within which the failure is to be known: that, and what the launcher takes.
PATIENCE, KNOWN = 10, 45
# For what has to happen some time, on a machine that is busy with other things.
LIMIT = 150


def ip(*arguments):
    return subprocess.run([shutil.which("ip"), *arguments], capture_output=True, text=True, check=False)


class Network:
    """Hosts on a switch, which is a namespace too, so that nothing of the machine's own network is touched."""

    def __init__(self):
        token = f"stfbnn-{os.getpid()}"
        self.switch, self.hosts = f"{token}-switch", [f"{token}-{index}" for index in range(HOSTS)]

    def build(self):
        """Returns why that is not possible; an empty text where it was."""
        commands = [
            ["netns", "add", self.switch],
            ["-n", self.switch, "link", "add", "bridge", "type", "bridge"],
            ["-n", self.switch, "link", "set", "bridge", "up"],
        ]
        for index, host in enumerate(self.hosts):
            port = f"port{index}"
            commands += [
                ["netns", "add", host],
                ["-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "net0", "netns", host],
                ["-n", self.switch, "link", "set", port, "master", "bridge", "up"],
                ["-n", host, "link", "set", "lo", "up"],
                ["-n", host, "addr", "add", f"{address(index)}/24", "dev", "net0"],
                ["-n", host, "link", "set", "net0", "up"],
            ]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                return f"`ip {' '.join(command)}` fails: {done.stderr.strip()}"
        return ""

    def remove(self):
        for name in (*self.hosts, self.switch):
            ip("netns", "delete", name)

    def cut_off(self, index):
        assert ip("-n", self.switch, "link", "set", f"port{index}", "down").returncode == 0

    def connect(self, index):
        assert ip("-n", self.switch, "link", "set", f"port{index}", "up").returncode == 0


def address(index):
    return f"10.77.0.{index + 1}"


@pytest.fixture
def network():
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip`, which is not here")
    network = Network()
    try:
        reason = network.build()
        if reason:
            pytest.skip(f"network namespaces are not allowed here: {reason}")
        yield network
    finally:
        network.remove()


def launch(network, index, folder):
    conf = f"is_host={int(index == 0)},join_timeout={LIMIT}"
    launcher = ["-m", "torch.distributed.run", "--nnodes", str(HOSTS), "--nproc-per-node", "1", "--max-restarts", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address(0)}:29400", "--rdzv-conf", conf]
    own = ["--local-addr", address(index), fault_host_script.__file__, str(folder)]
    command = [shutil.which("ip"), "netns", "exec", network.hosts[index], sys.executable, *launcher, *meeting, *own]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "net0", TIMEOUT: str(PATIENCE)}
    with (folder / f"output.{index}.txt").open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def wait_until(reached, folder, limit=LIMIT):
    """Returns the seconds that it took."""
    began = time.monotonic()
    while not reached():
        if time.monotonic() - began > limit:
            pytest.fail(
                f"{limit} seconds are over; " + "\n".join(said(folder, index)[-2500:] for index in range(HOSTS))
            )
        time.sleep(0.05)
    return time.monotonic() - began


def said(folder, index):
    return (folder / f"output.{index}.txt").read_text(errors="replace")


@pytest.mark.timeout(4 * LIMIT)
def test_a_host_that_is_cut_off_is_noticed_in_time_and_the_run_goes_on_when_it_is_back(network, tmp_path):
    hosts = [launch(network, index, tmp_path) for index in range(HOSTS)]
    try:
        # For a while: the others notice, and wait for it in a new start.
        wait_until(lambda: all((tmp_path / f"begun.0.{rank}").exists() for rank in range(HOSTS)), tmp_path)
        network.cut_off(2)
        noticed = wait_until(lambda: all("LostRankError" in said(tmp_path, index) for index in (0, 1)), tmp_path)
        assert noticed < KNOWN
        assert not any((tmp_path / f"resumed.{rank}.pt").exists() for rank in range(HOSTS))
        network.connect(2)
        wait_until(lambda: all((tmp_path / f"second.1.{rank}").exists() for rank in range(HOSTS)), tmp_path)
        for rank in range(HOSTS):
            straight, resumed = (
                torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for name in ("straight", "resumed")
            )
            assert resumed["history"] == straight["history"]
            assert all(torch.equal(resumed["model"][name], value) for name, value in straight["model"].items())
        # For good, and with no start left: the others end.
        network.cut_off(2)
        ended = wait_until(lambda: all(hosts[index].poll() is not None for index in (0, 1)), tmp_path)
        assert ended < KNOWN
        assert hosts[0].returncode == hosts[1].returncode == 1
        for index in (0, 1):
            assert said(tmp_path, index).count(f"LostRankError: rank {index} of 3 lost another rank") == 2
    finally:
        for host in hosts:
            end(host)


def end(host):
    """The launcher's whole session: a worker is in a group of its own, which a launcher that is killed does not end."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == host.pid:
            with suppress(ProcessLookupError):
                os.kill(int(path.parent.name), 9)
    host.wait(timeout=30)
