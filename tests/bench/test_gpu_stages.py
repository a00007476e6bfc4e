"""tools/gpu.py: its stages run within their limits, go on after a failure, and are not run twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("llmfast_tools_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def drive(gpu, tmp_path, monkeypatch):
    """Runs stages, given as name -> (seconds, Python code or reason), and returns (exit code, results)."""
    monkeypatch.delenv("OUT", raising=False)

    def run(stages, *, no_gpu=None, minutes=2.0, again=False):
        import argparse

        made = []
        for name, (seconds, code, *reason) in stages.items():
            words = code if reason else gpu.python("-c", code)
            made.append(gpu.Stage(name, seconds, name, lambda o, f, words=words: words))
        options = argparse.Namespace(minutes=minutes, patience=1.0, rehearse=False, again=again, full=False)
        code = gpu.run(options, made, tmp_path / "results", no_gpu or ("a GPU", [9, 0]))
        return code, json.loads((tmp_path / "results" / "summary.json").read_text())["stages"]

    return run


def test_a_later_stage_runs_after_a_failure_and_a_timeout(drive, tmp_path, capsys):
    hangs = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('began', flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    stages = {"fails": (20, "print('why it failed'); raise SystemExit(3)"), "hangs": (1, hangs), "works": (20, "pass")}
    code, results = drive(stages)
    assert time.monotonic() - began < 20
    assert code == 1
    assert [results[name]["status"] for name in stages] == ["failed", "timed out", "ok"]
    assert results["fails"]["code"] == 3
    printed = capsys.readouterr().out
    assert "why it failed" in printed
    assert "began" in printed
    assert "hangs | timed out" in (tmp_path / "results" / "SUMMARY.md").read_text()


def test_a_stage_that_cannot_run_says_why(drive):
    code, results = drive({"absent": (20, "no compiler on PATH", True)})
    assert code == 1
    assert results["absent"] == {"status": "cannot run", "why": "no compiler on PATH", "seconds": 0.0}


def test_what_passed_is_not_run_again(drive, tmp_path):
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x')"
    assert drive({"one": (20, code)})[0] == 0
    assert drive({"one": (20, code), "two": (20, code)})[0] == 0
    assert count.read_text() == "xx"
    drive({"one": (20, code)}, again=True)
    assert count.read_text() == "xxx"


def test_what_passed_is_run_again_for_other_sources_or_on_another_machine(drive, gpu, tmp_path, monkeypatch):
    count = tmp_path / "count"
    stages = {"one": (20, f"open({str(count)!r}, 'a').write('x')")}
    drive(stages)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("changed")
    drive(stages)
    drive(stages)
    assert count.read_text() == "xx"
    drive(stages, no_gpu="no GPU here")
    drive(stages)
    assert count.read_text() == "xxx"


def test_a_machine_without_git_runs_all_the_same(drive, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert drive({"one": (20, "")})[0] == 0


def test_ending_the_command_ends_its_stage(tmp_path):
    """Stages are sessions of their own: nothing else would end them."""
    program = f"""
import argparse, importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu", {str(PATH)!r})
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
hang = gpu.python("-c", "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)")
gpu.STAGES = [gpu.Stage("hangs", 60, "hangs", lambda o, f: hang)]
gpu.find_gpu, gpu.ROOT, gpu.prepare = lambda: ("a GPU", [9, 0]), gpu.Path({str(tmp_path)!r}), lambda: None
sys.exit(gpu.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    until(lambda: pid.exists() and pid.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    until(lambda: not Path(f"/proc/{pid.read_text()}").exists())


def until(true):
    for _ in range(200):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened in 20 s")


def test_what_the_stages_expect_is_prepared(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "llmfast").mkdir()
    gpu.prepare()
    gpu.prepare()
    assert (tmp_path / "llmfast" / "kernels").resolve() == tmp_path / "kernels"
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_the_sanitizer_looks_at_our_own_kernels(gpu, tmp_path, monkeypatch):
    import argparse

    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = argparse.Namespace(rehearse=False, full=False, patience=1.0)
    command = " ".join(gpu.sanitize(options, tmp_path))
    assert "--kernel-name kns=llmfast" in command
    assert "--kernel-name kns=_layer_norm_forward" in command
    assert "tile_of" not in command  # no kernel: a function of kernels


def test_without_a_gpu_every_stage_says_so_and_nothing_runs(drive, tmp_path):
    code, results = drive({"one": (20, f"open({str(tmp_path / 'ran')!r}, 'w')"), "two": (20, "")}, no_gpu="no GPU here")
    assert code == 1
    assert {result["why"] for result in results.values()} == {"no GPU here"}
    assert not (tmp_path / "ran").exists()


def test_when_the_time_is_over_the_rest_says_so(drive):
    _, results = drive({"one": (20, "")}, minutes=0.01)
    assert "minutes are over" in results["one"]["why"]


def test_everything_is_packed_for_the_folder_out(drive, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    drive({"one": (20, "print('hello')")})
    with tarfile.open(tmp_path / "out" / "gpu-results.tar.gz") as archive:
        log = archive.extractfile("gpu-results/one.log").read().decode()
    assert "hello" in log
    assert (tmp_path / "out" / "SUMMARY.md").exists()


def test_the_default_selection_fits_its_minutes(gpu):
    """Typical times are well below the limits; the limits themselves may add up to more, the deadline cuts them."""
    assert {"build", "kernels", "sanitize", "tune", "train", "report"} <= {stage.name for stage in gpu.STAGES}
    assert all(stage.seconds <= 200 for stage in gpu.STAGES)


def test_every_op_has_a_stage_and_shapes_that_it_reads(gpu):
    from llmfast.bench.ops import parse_shape
    from llmfast.ops._registry import OPS

    assert set(gpu.OPS) == set(OPS)
    for name, shapes in gpu.OPS.items():
        assert all(parse_shape(OPS[name], shape) in OPS[name].gpu_samples for shape in shapes)


def test_this_machine_says_whether_it_has_a_gpu(gpu):
    import torch

    found = gpu.find_gpu()
    assert isinstance(found, tuple) == torch.cuda.is_available()
    assert isinstance(found, tuple) or torch.__version__ in found
