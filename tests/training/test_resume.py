"""A resumed run continues bit for bit, or says in one line why it cannot."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SHAPE, metrics_of, same_weights

from llmfast import ops
from llmfast.checkpoint import find_checkpoint, load_model, read_state
from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.training.report import Report

DROPOUT = dict(dropout=0.3)


class Stop(BaseException):
    """Stands for a kill inside the process."""


def stop_at(step):
    """A model whose forward pass ends the process's work in step ``step``."""
    model = GPT(GPTConfig(**SHAPE, **DROPOUT))
    calls = []

    def count(module, _inputs):
        if module.training:
            calls.append(None)
            if len(calls) == step:
                raise Stop

    model.register_forward_pre_hook(count)
    return model


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("killed_in", [4, 10, 11, 19])
def test_a_killed_run_ends_as_if_nothing_had_happened(train, tmp_path, byte_tokenizer, killed_in):
    """Weights, optimizer, metrics and samples; with dropout, shuffled data and Python's and NumPy's random numbers."""

    def loss_fn(model, batch):
        factor = 1 + random.random() + np.random.rand() if model.training else 1.0
        return model(*batch)[1] * factor, batch[1].numel()

    options = dict(loss_fn=loss_fn, tokenizer=byte_tokenizer, sample_tokens=3, save_every=5, shape=DROPOUT)
    whole, model = train(**options, out=str(tmp_path / "whole"))
    torch.manual_seed(1337)
    with pytest.raises(Stop):
        train(**options, model=stop_at(killed_in))
    torch.rand(3), random.random(), np.random.rand()  # the new process is not where the old one was
    resumed, other = train(**options, resume=True)
    assert same_weights(model, other)
    for name in ("optimizer.safetensors", "model.safetensors"):
        assert (whole.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes()
    assert without_time(metrics_of(whole)) == without_time(metrics_of(resumed))
    assert (whole.out / "samples.txt").read_text() == (resumed.out / "samples.txt").read_text()
    assert (whole.best_val_loss, whole.val_loss) == (resumed.best_val_loss, resumed.val_loss)


def test_a_run_may_grow(train, tmp_path):
    constant = dict(schedule="constant", save_every=0)
    _, model = train(**constant, max_steps=12, out=str(tmp_path / "whole"))
    train(**constant, max_steps=7)
    result, other = train(**constant, max_steps=12, resume=True)
    assert same_weights(model, other)
    assert result.steps == 12
    steps = [line["step"] for line in metrics_of(result)]
    assert steps == sorted(set(steps))


def test_a_finished_run_has_nothing_left_to_do(train):
    first, _ = train()
    again, model = train(resume=True)
    assert (again.steps, again.val_loss, again.best_val_loss) == (20, first.val_loss, first.best_val_loss)
    assert same_weights(model, load_model(first.checkpoint))
    assert metrics_of(again) == metrics_of(first)


def test_resume_without_a_checkpoint_starts_from_the_beginning(train, tmp_path):
    _, model = train(out=str(tmp_path / "whole"))
    with pytest.raises(Stop):
        train(model=stop_at(4))
    torch.manual_seed(1337)
    result, other = train(resume=True)
    assert same_weights(model, other)
    assert [line["step"] for line in metrics_of(result)] == [1, 5, 10, 15, 20]


def test_a_corrupt_newest_checkpoint_costs_only_its_steps(train, caplog):
    result, model = train(save_every=5, max_steps=15)
    newest = find_checkpoint(result.out, prefer="latest") / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4] + b"\0\0\0\1")
    resumed, again = train(save_every=5, max_steps=15, resume=True)
    assert same_weights(model, again)
    assert "step-000015/model.safetensors is damaged" in caplog.text
    assert "using" in caplog.text
    assert "step-000010" in caplog.text
    assert find_checkpoint(resumed.out, prefer="latest").name == "step-000015"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(train):
    result, _ = train(keep=1, save_every=0)
    (result.checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* verifies"):
        train(resume=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(learning_rate=0.5), r"learning_rate was 0.001, now 0.5"),
        (dict(batch_size=8), r"batch_size was 4, now 8"),
        (dict(seed=1), r"seed was 1337, now 1"),
        (dict(shape=dict(n_layer=1)), r"n_layer was 2, now 1"),
        (dict(shape=dict(dropout=0.1)), r"dropout was 0.0, now 0.1"),
        (dict(stride=8), r"stride was 16, now 8"),
    ],
)
def test_another_run_is_refused_with_then_and_now(train, options, said):
    train(max_steps=2)
    with pytest.raises(UserError, match=f"cannot resume.*{said}") as caught:
        train(resume=True, **options)
    assert "\n" not in str(caught.value)


def test_other_data_is_refused(train, tokens):
    train(max_steps=2)
    with pytest.raises(UserError, match=r"training data: sha256 was .*, now|training data: tokens was .*, now"):
        train(resume=True, data=tokens[1])


def test_the_micro_batch_may_shrink_on_resume(train, capsys):
    """What the out-of-memory message proposes; the updates are the same but for rounding."""
    train(batch_size=4, max_steps=5)
    result, _ = train(batch_size=4, micro_batch_size=2, max_steps=6, resume=True)
    assert result.steps == 6


def test_threads_and_matmul_routing_are_repeated(train, monkeypatch):
    routing = {"float32": "default", "bfloat16": "default"}
    ops.set_matmul_routing(routing)
    torch.set_num_threads(1)
    result, _ = train(max_steps=5)
    state = read_state(result.checkpoint)
    assert (state["threads"], state["matmul_routing"]["float32"]) == (1, "default")
    repeated = []
    real = ops.set_matmul_routing
    monkeypatch.setattr(ops, "set_matmul_routing", lambda routing: (repeated.append(routing), real(routing)))
    torch.set_num_threads(2)
    train(max_steps=6, resume=True, threads=None)
    assert repeated == [state["matmul_routing"]]
    assert torch.get_num_threads() == 1


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


def test_a_killed_process_resumes_bit_for_bit():
    """kill -9 at random moments, also in the middle of a save; the benchmark does it twenty times."""
    command = [sys.executable, SCRIPT, *"--kills 2 --steps 60 --seed 3 --threads 1 --json".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["kills"], answer["identical"]) == (2, 2)


def test_sigterm_to_a_process_saves_and_ends_cleanly(tmp_path):
    command = [sys.executable, SCRIPT, "--child", tmp_path, *"--steps 100000 --threads 1 --routing null".split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    saved = find_checkpoint(tmp_path / "run", prefer="latest")
    assert json.loads(output)["checkpoint"] == str(saved)
    assert 10 <= read_state(saved)["step"] == json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert not list(saved.parent.glob(".tmp-*"))


def test_what_a_kill_cut_short_is_cut_off(tmp_path):
    """A torn last line, and lines and samples after the step that the run goes on from."""
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "lo')
    samples = "===== step 10 =====\n\none\n===== not a header =====\n\n===== step 15 =====\ntwo\n\n"
    (tmp_path / "samples.txt").write_text(samples)
    with Report(tmp_path, done=10, total=20, progress=False) as report:
        report.metrics({"step": 15, "loss": 2.0, "mfu": None, "grad_norm": float("inf")})
        report.sample(15, "three")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [*(json.loads(line) for line in lines[:3]), {"step": 15, "loss": 2.0}]
    assert (tmp_path / "samples.txt").read_text() == samples.replace("two", "three")
