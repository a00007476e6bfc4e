"""The loop: what it computes, writes and refuses."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from small_runs import SHAPE, metrics_of, same_weights

from llmfast.checkpoint import find_checkpoint, load_model, load_tokenizer_of, read_state
from llmfast.config import GPTConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.nn import GPT
from llmfast.tokenizer import Tokenizer
from llmfast.training import Trainer, TrainingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_the_loss_of_real_text_falls_and_the_files_are_there(train, byte_tokenizer):
    result, model = train(max_steps=60, learning_rate=1e-2, eval_every=20, tokenizer=byte_tokenizer, sample_tokens=5)
    lines = metrics_of(result)
    assert [line["step"] for line in lines] == [1, *range(5, 61, 5)]
    assert lines[0]["loss"] > 5.0 > 4.0 > lines[-1]["loss"]
    assert lines[-1]["tokens"] == result.tokens == 60 * 4 * 16
    assert all({"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(line) for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [20, 40, 60]
    assert result.val_loss == lines[-1]["val_loss"]
    assert result.best_val_loss == min(line["val_loss"] for line in lines if "val_loss" in line)
    assert result.train_loss < 4.5
    assert (result.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (result.out / "samples.txt").read_text().count("===== step") == 3
    assert result.checkpoint.name == "step-000060"
    assert same_weights(load_model(result.checkpoint), model)
    assert isinstance(load_tokenizer_of(result.out), Tokenizer)
    assert find_checkpoint(result.out).name == result.best_checkpoint.name
    assert not model.training


def test_the_update_is_pytorchs(train, tokens):
    """Three steps of the loop against the same steps by hand with torch.optim.AdamW and clip_grad_norm_."""
    options = dict(max_steps=3, learning_rate=1e-2, warmup_steps=0, schedule="constant", grad_clip=0.5, shuffle=False)
    _, model = train(**options, val=False)
    torch.manual_seed(1337)
    other = GPT(GPTConfig(**SHAPE))
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], 1e-2, (0.9, 0.99)
    )
    for step in range(3):
        ids = torch.from_numpy(tokens[0].windows(np.arange(4) * 16 + step * 64, 17)).long()
        logits, _ = other(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


class Masked:
    """Rows with between 0 and 16 targets that count."""

    samples_per_epoch = 24

    def __init__(self, rows):
        self.rows = rows

    def batch(self, position):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 257, (24, 17), generator=generator)
        kept = torch.arange(24) % 17
        kept[5] = 0
        targets = torch.where(torch.arange(16) < kept[:, None], ids[:, 1:], -100)
        chosen = torch.arange(position, position + self.rows) % 24
        return ids[chosen, :-1], targets[chosen]


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_equals_the_full_batch(train, tmp_path, masked):
    """In float64, to 1e-12, although the micro batches hold different numbers of targets."""
    weights = []
    for micro in (12, 4, 1):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPE)).double()
        result, _ = train(
            model=model, out=str(tmp_path / str(micro)), data=Masked(micro) if masked else None, val=False,
            micro_batch_size=micro, batch_size=12, max_steps=4, learning_rate=1e-2, warmup_steps=0, grad_clip=0.3,
        )  # fmt: skip
        weights.append(([p.detach() for p in model.parameters()], [line["loss"] for line in metrics_of(result)]))
    for other, losses in weights[1:]:
        assert losses == pytest.approx(weights[0][1], abs=1e-12)
        for p, q in zip(weights[0][0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_step_without_any_target_is_an_error(train):
    class Nothing(Masked):
        def batch(self, position):
            inputs, targets = super().batch(position)
            return inputs, torch.full_like(targets, -100)

    with pytest.raises(TrainingError, match=r"every target .* is masked"):
        train(data=Nothing(4), val=False)


def test_own_batches_and_loss_pass_through_the_same_loop(train):
    """A fine-tuning: regression of the last hidden state on a number, with the count of its rows."""

    class Rows:
        samples_per_epoch = 8

        def batch(self, position):
            ids = (torch.arange(position, position + 4) % 8)[:, None].expand(4, 6)
            return ids, ids[:, 0].float() / 8

    def loss_fn(model, batch):
        ids, wanted = batch
        return (model.hidden_states(ids)[:, -1, 0] - wanted).square().mean(), len(ids)

    result, _ = train(data=Rows(), val=False, loss_fn=loss_fn, max_steps=80, learning_rate=1e-2)
    lines = metrics_of(result)
    assert lines[-1]["loss"] < lines[0]["loss"] / 3
    assert lines[-1]["tokens"] == 80 * 4


def test_evaluation_covers_the_whole_split_once_without_dropout(train, tokens):
    result, model = train(shape=dict(dropout=0.5), max_steps=2, eval_batches=0, micro_batch_size=4)
    source = tokens[1]
    starts = np.arange((len(source) - 1) // 16) * 16
    assert len(starts) % 4  # the last batch is a short one
    ids = torch.from_numpy(source.windows(starts, 17)).long()
    with torch.no_grad():
        logits, _ = model.double()(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert result.val_loss == pytest.approx(expected.item(), abs=1e-5)


def test_samples_and_evaluations_leave_the_training_alone(train, byte_tokenizer, tmp_path):
    _, quiet = train(shape=dict(dropout=0.2), val=False, sample_every=0, save_every=0, log_every=7)
    _, busy = train(
        shape=dict(dropout=0.2), out=str(tmp_path / "busy"), tokenizer=byte_tokenizer, sample_every=3, sample_tokens=4,
        eval_every=2, log_every=1,
    )  # fmt: skip
    assert same_weights(quiet, busy)


def test_the_training_loss_is_estimated_without_dropout_where_asked(train, tokens):
    """On as many micro batches as the validation loss, spread over the training data."""
    result, model = train(shape=dict(dropout=0.5), eval_train=True)
    source = tokens[0]
    windows = (len(source) - 1) // 16
    starts = np.concatenate([i * windows // 2 + np.arange(4) for i in range(2)]) * 16
    ids = torch.from_numpy(source.windows(starts, 17))
    with torch.no_grad():
        logits, _ = model.double()(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    lines = metrics_of(result)
    assert [line["step"] for line in lines if "train_loss" in line] == [10, 20]
    assert result.train_loss == lines[-1]["train_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_epochs_replace_steps(train, tokens):
    """And a resume may replace them by more steps."""
    result, _ = train(epochs=0.25, val=False)
    assert result.steps == int(0.25 * ((len(tokens[0]) - 1) // 16) / 4)
    options = tomllib.loads((result.out / "config.toml").read_text(encoding="utf-8"))
    assert train(**{**options, "max_steps": result.steps + 2}, resume=True, val=False)[0].steps == result.steps + 2


@pytest.mark.parametrize(
    "options", [dict(dtype="bfloat16"), dict(activation_checkpointing=True), dict(backend="torch")]
)
def test_other_ways_to_compute_give_about_the_same_loss(train, tmp_path, options):
    plain, _ = train()
    other, _ = train(out=str(tmp_path / "other"), **options)
    assert other.val_loss == pytest.approx(plain.val_loss, abs=0.03)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_cpu_without_it_says_that_it_will_not_be_faster(train, monkeypatch, capfd, fast):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    train(max_steps=1, dtype="bfloat16", val=False, progress=True)
    assert ("bfloat16 will not be faster than float32 here" in capfd.readouterr().err) == (not fast)


def test_a_nan_names_the_module_and_leaves_the_weights(train, tokens, tmp_path):
    model = GPT(GPTConfig(**SHAPE))
    steps = []

    def poison(_module, _inputs, output):
        if model.training:
            steps.append(None)
            if len(steps) > 3:
                return torch.full_like(output, math.nan)
        return output

    model.transformer.h[1].mlp.register_forward_hook(poison)
    weights = []
    step = torch.optim.Optimizer.zero_grad

    def remember(self, set_to_none=True):
        weights.append([p.detach().clone() for p in model.parameters()])
        step(self, set_to_none)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", remember)
        with pytest.raises(
            TrainingError, match=r"step 4: the loss is nan; .* transformer\.h\.1\.mlp\. No weight"
        ) as caught:
            train(model=model, val=False)
    assert len(weights) == 3
    assert all(torch.equal(p, q) for p, q in zip(weights[-1], model.parameters(), strict=True))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_gradient_that_overflows_is_named(train):
    model = GPT(GPTConfig(**SHAPE))
    model.transformer.h[0].mlp.c_fc.bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match=r"gradient norm is (inf|nan); .* transformer\.h\.0\.mlp\.c_fc\.bias"):
        train(model=model, val=False)


def test_weights_that_are_not_finite_are_named(train):
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight[3] = math.inf
    with pytest.raises(TrainingError, match=r"the weights of transformer\.h\.0\.ln_2\.weight are not finite"):
        train(model=model, val=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_proposes_a_way_out(train, error):
    def loss_fn(_model, _batch):
        raise error

    with pytest.raises(
        TrainingError, match=r"out of memory .*--micro-batch-size 2 --batch-size 4 .*--activation-check"
    ):
        train(loss_fn=loss_fn, val=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(train, number):
    model = GPT(GPTConfig(**SHAPE))
    calls = []

    def send(_module, _inputs):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), number)

    model.register_forward_pre_hook(send)
    before = signal.getsignal(number)
    result, _ = train(model=model, max_steps=1000, eval_every=500, val=False)
    assert (result.steps, result.interrupted) == (7, number.name)
    assert result.checkpoint.name == "step-000007"
    assert read_state(result.checkpoint)["step"] == 7
    assert signal.getsignal(number) is before


def test_a_second_sigint_stops_at_once(train):
    model = GPT(GPTConfig(**SHAPE))
    handle = model.register_forward_pre_hook(lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model=model, val=False)
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_off_the_main_thread(train):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(val=False)[0]))
    thread.start()
    thread.join()
    assert results[0].steps == 20


def test_a_run_is_not_overwritten(train):
    train(max_steps=2)
    with pytest.raises(UserError, match=r"already holds a run: pass --resume .* or choose another --out"):
        train(max_steps=2)


def test_a_directory_in_use_is_refused(train):
    entered, leave = threading.Event(), threading.Event()

    def loss_fn(model, batch):
        entered.set()
        leave.wait(20)
        return model(*batch)[1], batch[1].numel()

    thread = threading.Thread(target=lambda: train(loss_fn=loss_fn, val=False, max_steps=1))
    thread.start()
    assert entered.wait(20)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        train(resume=True)
    leave.set()
    thread.join()


def test_a_path_that_is_a_file_is_a_user_error(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        train(out=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(device="cuda:7"), "cuda:7 is not there"),
        (dict(device="abacus"), "unknown device 'abacus'"),
        (dict(device="meta"), "'meta' is not supported"),
        (dict(dtype="float16"), "float16 trains on CUDA devices only"),
        (dict(dtype="float8"), "unknown dtype 'float8'"),
        (dict(block_size=17), "block size 17 is above the model's 16"),
        (dict(micro_batch_size=3, batch_size=8), "batch_size 8 is not a multiple of micro_batch_size 3"),
        (dict(max_steps=0), "max_steps must be at least 1"),
        (dict(micro_batch_size=0), "must be at least 1"),
        (dict(log_every=0), "log_every must be at least 1"),
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(schedule="cosin"), "schedule"),
        (dict(decay="some"), "decay"),
        (dict(keep=0), "keep"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(epochs=0.0), "epochs"),
        (dict(beta2=1.0), "beta2"),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_is_written(train, tmp_path, options, said):
    with pytest.raises(UserError, match=said) as caught:
        train(**options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_written_config_starts_the_same_run(train, tmp_path):
    first, model = train(max_steps=6, sample_prompt='a"\\\n\té\x7f', learning_rate=3e-4)
    values = tomllib.loads((first.out / "config.toml").read_text())
    assert (values["sample_prompt"], values["min_learning_rate"]) == ('a"\\\n\té\x7f', pytest.approx(3e-5))
    assert "resume" not in values
    _, again = train(**{**values, "out": str(tmp_path / "again")})
    assert same_weights(model, again)


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused_at_the_start(train, tokens):
    class Picky:
        def encode(self, text):
            raise ValueError("'\\n' is not in the vocabulary")

    with pytest.raises(UserError, match=r"--sample-prompt .* not in the vocabulary"):
        train(tokenizer=Picky())


def test_a_vocabulary_above_the_models_is_refused(tokens):
    class Larger:
        vocab_size = 300
        window, windows, name = tokens[0].window, tokens[0].windows, "larger"

        def __len__(self):
            return len(tokens[0])

    with pytest.raises(UserError, match="300 token ids, the model has 257"):
        Trainer(GPT(GPTConfig(**SHAPE)), TrainConfig(), Larger())
