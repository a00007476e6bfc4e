"""How threads wait where the cores are crowded: what is measured, what follows, and that libgomp obeys."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest
import torch

from llmfast.ops import _waiting, process

SPINNING = """
import time
import torch
from llmfast import ops
from llmfast.ops import _waiting

def burnt():
    before = time.process_time()
    for _ in range(30):
        torch.zeros(1 << 17).add_(1.0)
        time.sleep(0.005)
    return time.process_time() - before

def gradients():
    torch.manual_seed(1)
    x, weight = torch.randn(8, 64, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    ops.layer_norm(ops.linear(x, weight), torch.ones(256), torch.zeros(256)).pow(3).mean().backward()
    return [x.grad, weight.grad]

first, spun = gradients(), burnt()
with _waiting.short_waits():
    again, slept = gradients(), burnt()
assert all(map(torch.equal, first, again))
print(spun, slept, burnt())
"""


def test_threads_sleep_inside_and_spin_outside_and_compute_the_same():
    if len(os.sched_getaffinity(0)) < 2 or _waiting.why_not() is not None:
        pytest.skip("needs libgomp, as PyTorch's Linux wheels have it, and two cores")
    env = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run([sys.executable, "-c", SPINNING], env=env, capture_output=True, text=True, check=True)
    spun, slept, again = map(float, done.stdout.split())
    assert slept < 0.5 * spun
    assert slept < 0.5 * again


def test_queued_adds_up_the_threads_and_survives_one_that_ends(tmp_path):
    assert _waiting.queued(tmp_path) is None
    for thread, line in {"7": "100 2000000000 3", "8": "5 500000000 1", "9": ""}.items():
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(line)
    assert _waiting.queued(tmp_path) == 2.5


@pytest.fixture
def watch(monkeypatch):
    """(watch, queueing, entered): queueing[0] seconds a second; entered counts the ways in and out of short waits."""
    queueing, entered = [0.0], [0, 0]
    if process._watch is not None:  # of an earlier test: it would look at these numbers too
        process._watch.stop()
        process._watch = None

    @contextlib.contextmanager
    def short_waits():
        entered[0] += 1
        yield
        entered[1] += 1

    monkeypatch.setattr(_waiting, "TICK", 0.05)
    monkeypatch.setattr(_waiting, "short_waits", short_waits)
    total, last = [0.0], [time.perf_counter()]

    def queued(tasks):
        now = time.perf_counter()
        total[0] += queueing[0] * (now - last[0])
        last[0] = now
        return total[0]

    monkeypatch.setattr(_waiting, "queued", queued)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    watch = _waiting.Watch()
    watch.start()
    yield watch, queueing, entered
    watch.stop()
    assert entered[0] == entered[1]


def until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_waits_are_short_from_when_the_cores_are_crowded_until_they_are_free(watch, monkeypatch):
    thread, queueing, entered = watch
    time.sleep(0.15)
    assert entered == [0, 0]
    assert not thread.crowded
    monkeypatch.setattr(process, "_watch", thread)
    queueing[0] = 0.8
    until(lambda: entered == [1, 0])
    assert process.cores_are_crowded()
    queueing[0] = (_waiting.CROWDED + _waiting.STILL_CROWDED) / 2  # not enough to begin, and enough to go on
    time.sleep(0.25)
    assert entered == [1, 0]
    queueing[0] = 0.05
    until(lambda: entered == [1, 1] and not thread.crowded)
    queueing[0] = 0.8
    until(lambda: entered == [2, 1])


def test_a_policy_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" in _waiting.why_not()
