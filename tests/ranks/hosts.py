"""Two hosts train together, one is lost, the other goes on, the lost one comes back: python -m tests.ranks.hosts

The hosts are network namespaces on one machine, joined by a cable (a pair of virtual interfaces): they reach each
other through it and nothing else. Takes Linux and root; elsewhere it says why it does nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ranks.kills import LIMIT, START, children, pretrain, step, wait

HOSTS = {"llmfast-a": "10.77.0.1", "llmfast-b": "10.77.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def connect() -> None:
    (a, at_a), (b, at_b) = HOSTS.items()
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
    for host, address in ((a, at_a), (b, at_b)):
        ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
        ip("-n", host, "link", "set", "cable", "up")
        ip("-n", host, "link", "set", "lo", "up")


def start(host: str, out: Path, data: Path, log: Path) -> subprocess.Popen[bytes]:
    """torchrun on ``host``, for one rank of one or two."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5"]
    first = next(iter(HOSTS.values()))
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29400", "--rdzv-id", "hosts"]
    is_host = HOSTS[host] == first  # the machine has but one name
    conf = f"is_host={is_host},join_timeout=300,last_call_timeout=5"
    torchrun += ["--rdzv-conf", conf, "--local-addr", HOSTS[host]]
    command = ["ip", "netns", "exec", host, sys.executable, *torchrun, "-m", "llmfast", "pretrain"]
    command += pretrain(out, data, "ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else no machine comes back (examples/scale)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def unplug(host: str) -> None:
    """As if the power went: nothing that the other host sends is answered any more."""
    ip("-n", host, "link", "set", "cable", "down")


def kill(job: subprocess.Popen[bytes]) -> None:
    """torchrun and its rank at once."""
    for pid in (job.pid, *children(job.pid)):
        os.kill(pid, signal.SIGKILL)
    job.wait()


def main() -> None:
    if os.name != "posix" or shutil.which("ip") is None or os.geteuid() != 0:
        print("skipped: network namespaces take Linux, iproute2 and root")
        return
    try:
        connect()
    except subprocess.CalledProcessError as error:
        disconnect()
        print(f"skipped: no network namespaces here ({error.stderr.strip()})")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what is to be tidied up
    jobs: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        out, data, logs = Path(folder, "run"), Path(folder, "text.txt"), [Path(folder, name) for name in "ab"]
        data.write_text(Path(tempfile.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        _, b = HOSTS
        try:
            jobs = [start(host, out, data, log) for host, log in zip(HOSTS, logs, strict=True)]
            first, second = jobs
            wait("a checkpoint of both", START, first, lambda: step(out) > 0)
            assert "2 ranks" in together(logs), together(logs)
            before, ranks = step(out), children(first.pid)
            print(f"both hosts train: checkpoint {before}", flush=True)
            unplug(b)
            kill(second)
            gone = wait("the end of the other host's rank", LIMIT, first, lambda: not ranks & children(first.pid))
            wait("a new checkpoint", START, first, lambda: step(out) > before)
            assert second.poll() is not None
            print(f"one host lost: the other's rank ended after {gone:.1f} s and went on: {step(out)}", flush=True)
            before, ranks = step(out), children(first.pid)
            ip("-n", b, "link", "set", "cable", "up")
            jobs[1] = second = start(b, out, data, logs[1])
            wait("both hosts", START, first, lambda: children(second.pid) and not ranks & children(first.pid))
            before = max(before, step(out))
            wait("a new checkpoint", START, first, lambda: step(out) > before)
            print(f"the lost host came back, both go on: checkpoint {step(out)}", flush=True)
            first.send_signal(signal.SIGTERM)
            second.send_signal(signal.SIGTERM)
            for job in jobs:
                job.wait(60)
        except BaseException:
            print(together(logs)[-6000:], file=sys.stderr)
            raise
        finally:
            for job in jobs:
                if job.poll() is None:
                    kill(job)
            disconnect()


def together(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


if __name__ == "__main__":
    main()
