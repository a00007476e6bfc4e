"""Preference tuning: losses against float64 formulas of their own, references, formats of records."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from llmfast.checkpoint import load_model
from llmfast.config import PreferenceConfig
from llmfast.errors import UserError
from llmfast.finetuning import preference
from llmfast.finetuning import preference_losses as losses
from llmfast.finetuning.conversations import Rows
from llmfast.finetuning.preference import finetune_preference
from llmfast.finetuning.preference_data import conversations_of_pair, judged_of, with_mismatches
from llmfast.finetuning.prompts import prompt_style
from llmfast.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


@pytest.fixture
def pairs():
    return [
        {"instruction": f"Say {'x' * (1 + i % 6)}", "input": "now" * (i % 2), "chosen": "good", "rejected": "bad bad"}
        for i in range(24)
    ]


def config(base, data, tmp_path, **options):
    values = dict(
        checkpoint=str(base), data=data, out=str(tmp_path / "run"), prompt_style="{instruction} {input}>", threads=1,
        micro_batch_size=4, learning_rate=3e-3, response_tokens=4, sample_every=0, device="cpu", log_every=1, epochs=2,
        val_fraction=0.2,
    )  # fmt: skip
    return PreferenceConfig(**{**values, **options})


def lines_of(result):
    return [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]


def random_log_probs(*shape):
    return -8 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.01


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_dpo_is_the_papers():
    columns = random_log_probs(4, 7)
    got = losses.dpo(*columns, beta=0.3)
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(columns.T.tolist()):
        reward_chosen, reward_rejected = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
        assert got.losses[i].item() == pytest.approx(-math.log(sigmoid(reward_chosen - reward_rejected)), rel=1e-12)
        assert got.chosen_rewards[i].item() == pytest.approx(reward_chosen, rel=1e-12)
        assert got.rejected_rewards[i].item() == pytest.approx(reward_rejected, rel=1e-12)
    equal = losses.dpo(columns[0], columns[1], columns[0], columns[1], beta=0.3)
    torch.testing.assert_close(equal.losses, torch.full((7,), math.log(2), dtype=torch.float64))


def test_orpo_is_the_papers():
    chosen, rejected = random_log_probs(2, 7)
    got = losses.orpo(chosen, rejected, weight=0.2)
    for i, (c, r) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        odds = [math.exp(log_p) / (1 - math.exp(log_p)) for log_p in (c, r)]
        want = -c - 0.2 * math.log(sigmoid(math.log(odds[0] / odds[1])))
        assert got.losses[i].item() == pytest.approx(want, rel=1e-10)


def test_orpo_of_a_certain_response_stays_finite():
    chosen = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    got = losses.orpo(chosen, torch.tensor([-50.0, 0.0, 0.0]), weight=0.1).losses
    got.sum().backward()
    assert got.isfinite().all()
    assert chosen.grad.isfinite().all()


def test_kto_is_the_papers():
    log_probs, ref = random_log_probs(2, 6)
    desirable = torch.tensor([True, False, False, True, True, False])
    got, rewards = losses.kto(
        log_probs, ref, desirable, torch.tensor(0.7), beta=0.4, desirable_weight=1.5, undesirable_weight=0.5
    )
    for i in range(6):
        reward, z = 0.4 * (log_probs[i] - ref[i]).item(), 0.4 * 0.7
        want = 1.5 * (1 - sigmoid(reward - z)) if desirable[i] else 0.5 * (1 - sigmoid(z - reward))
        assert got[i].item() == pytest.approx(want, rel=1e-6)
        assert rewards[i].item() == pytest.approx(reward, rel=1e-12)


def test_log_probabilities_equal_float64(base):
    model = load_model(base)
    generator = torch.Generator().manual_seed(5)
    inputs, targets = torch.randint(257, (2, 5, 31), generator=generator)
    targets = targets.masked_fill(torch.rand(5, 31, generator=generator) < 0.4, -100)
    got, counts = losses.response_log_probs(model, inputs, targets)
    log_p = model.double()(inputs)[0].log_softmax(-1)
    kept = targets != -100
    want = (log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    assert counts.tolist() == kept.sum(1).tolist()


# ---- Records ---------------------------------------------------------------------------------------------------------

USER, GOOD, BAD = (
    {"role": role, "content": content} for role, content in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_in_every_form(record):
    pieces = [prompt_style("<{instruction}>").pieces(conversation) for conversation in conversations_of_pair(record)]
    assert pieces == [[("<Q>", "A")], [("<Q>", "B")]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q", "chosen": "A"}, "no 'rejected'"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "'rejected' is empty"),
        ({"chosen": "A", "rejected": "B"}, "no instruction, prompt or messages"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]}, "different prompts"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "does not end with a message of the assistant"),
    ],
)
def test_a_bad_pair_says_what_it_lacks(record, message):
    with pytest.raises(ValueError, match=message):
        conversations_of_pair(record)


def test_labelled_records_and_their_mismatches(base):
    rows = Rows(load_tokenizer("byte"), prompt_style("{instruction}>"), 96, False)
    records = [
        {"prompt": "p", "completion": "A", "label": True},
        {"instruction": "q", "output": "B", "label": "false"},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"prompt": "p", "chosen": "C", "rejected": "D"},
    ]
    judged = [one for record in records for one in judged_of(record, rows)]
    assert [one.desirable for one in judged] == [True, False, True, True, False]
    said = []
    for one in with_mismatches(judged, rows):
        texts = [bytes(t for t in row.targets if 0 <= t < 256).decode() for row in one.rows]
        said.append((chr(one.rows[0].inputs[0]), *texts, one.desirable))
        assert one.rows[0].inputs[:2] == one.rows[1].inputs[:2]
    # Desirable p:A, Q:A, p:C, then undesirable q:B, p:D; each with the next response to another prompt.
    assert said == [
        ("p", "A", "A", True), ("Q", "A", "C", True), ("p", "C", "B", True),
        ("q", "B", "D", False), ("p", "D", "A", False),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'label' is 'maybe', not true or false"):
        judged_of({**records[0], "label": "maybe"}, rows)


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, dict(train="lora", learning_rate=3e-2), dict(precompute_reference=True), dict(average_log_probs=True)],
)
def test_dpo_starts_at_log_2_and_widens_the_margin(base, pairs, write, tmp_path, monkeypatch, options):
    probe = torch.randint(257, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    kept = []
    original = preference.reference_of

    def reference_of(model, config):
        kept.append((model, original(model, config)))
        kept.append(kept[0][1](model, *probe))
        return kept[0][1]

    monkeypatch.setattr(preference, "reference_of", reference_of)
    result, responses = finetune_preference(config(base, write(pairs), tmp_path, **options), progress=False)
    lines = lines_of(result)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    margins = [line["val_reward_margin"] for line in lines if "val_reward_margin" in line]
    assert 0 < margins[0] < margins[-1]
    assert result.metrics["val_reward_accuracy"] == 1.0
    assert result.metrics["val_loss"] < 0.68
    assert len(json.loads(responses.read_text())) == 2
    assert bool(kept) == (not options.get("precompute_reference"))
    if not kept:
        return
    (model, reference), before = kept
    assert torch.equal(reference(model, *probe), before)  # bit for bit, and the policy is another one
    assert not torch.equal(preference.log_probs(model, *probe, average=False), before)
    untuned = load_model(base)
    assert torch.equal(preference.log_probs(untuned, *probe, bool(options.get("average_log_probs"))), before)


def test_a_base_with_dropout_starts_at_log_2_too(base, pairs, write, tmp_path):
    model = load_model(base, dropout=0.5)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer("byte").save(tmp_path / "base")
    settings = config(tmp_path / "base", write(pairs), tmp_path, epochs=0.3, response_tokens=0)
    result, _ = finetune_preference(settings, progress=False)
    assert lines_of(result)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_precomputed_reference_trains_the_same_model(base, pairs, write, tmp_path):
    data = write(pairs)
    runs = []
    for name, ahead in (("held", False), ("ahead", True)):
        settings = config(base, data, tmp_path / name, precompute_reference=ahead, response_tokens=0)
        runs.append([line["loss"] for line in lines_of(finetune_preference(settings, progress=False)[0])])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.parametrize(("method", "start"), [("orpo", None), ("kto", 0.5)])
def test_orpo_and_kto_learn(base, pairs, write, tmp_path, method, start):
    settings = config(base, write(pairs), tmp_path, method=method, response_tokens=0)
    result, _ = finetune_preference(settings, progress=False)
    lines = lines_of(result)
    if start is not None:
        assert lines[0]["loss"] == pytest.approx(start, abs=1e-6)
    assert lines[-1]["val_loss"] < lines[0]["loss"]
    assert lines[-1]["val_reward_margin"] > lines[0]["reward_margin"]
    assert result.metrics["val_reward_accuracy"] == 1.0


def test_kto_from_a_precomputed_reference(base, pairs, write, tmp_path):
    records = [
        {"prompt": pair["instruction"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs[:12] for key in ("chosen", "rejected")
    ]  # fmt: skip
    data, runs = write(records, "labels.jsonl"), []
    for name, ahead in (("held", False), ("ahead", True)):
        settings = config(
            base, data, tmp_path / name, method="kto", precompute_reference=ahead, response_tokens=0, epochs=1
        )
        runs.append([line["loss"] for line in lines_of(finetune_preference(settings, progress=False)[0])])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="orpo", precompute_reference=True), "orpo has no reference"),
        (dict(beta=0.0), "beta must be above 0"),
        (dict(desirable_weight=-1.0), "desirable_weight and undesirable_weight must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(base, pairs, write, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        finetune_preference(config(base, write(pairs), tmp_path, **options), progress=False)
    assert not (tmp_path / "run").exists()


def test_bad_pairs_are_named_by_line_or_left_out(base, pairs, write, tmp_path, capsys):
    data = write([pairs[0], {"instruction": "a", "chosen": "b"}, *pairs[1:]], "data.jsonl")
    with pytest.raises(UserError, match=r"data.jsonl:2: no 'rejected'"):
        finetune_preference(config(base, data, tmp_path), progress=False)
    assert not (tmp_path / "run").exists()
    finetune_preference(config(base, data, tmp_path, skip_bad=True, response_tokens=0, epochs=1))
    assert "left out 1 of 25 records" in capsys.readouterr().err


def test_equal_responses_are_counted_or_left_out(base, pairs, write, tmp_path, capsys):
    data = write([{**pairs[0], "rejected": "good"}, *pairs], "data.jsonl")
    finetune_preference(config(base, data, tmp_path, response_tokens=0, epochs=0.3))
    assert "1 training pairs have one response as chosen and as rejected: --skip-bad" in capsys.readouterr().err
    settings = config(base, data, tmp_path / "less", response_tokens=0, epochs=0.3, skip_bad=True)
    finetune_preference(settings)
    assert f"left out 1 of 25 records of {data}; the first: {data}:1: chosen and rejected" in capsys.readouterr().err


def test_what_has_nothing_to_prefer_is_refused(base, write, tmp_path):
    data = write([{"prompt": f"p{i}", "chosen": "c", "rejected": "c"} for i in range(9)])
    with pytest.raises(UserError, match="every pair for training has one response as chosen and as rejected"):
        finetune_preference(config(base, data, tmp_path), progress=False)
    data = write([{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(9)])
    with pytest.raises(UserError, match="all examples for training are desirable, and KTO learns from both kinds"):
        finetune_preference(config(base, data, tmp_path, method="kto"), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_books_pairs_are_read(base):
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA is not set")
    records = json.loads(Path(folder, "instructions", "instruction-data-with-preference.json").read_text())
    for record in records:
        chosen, rejected = conversations_of_pair(record)
        assert (chosen.turns[0].response, rejected.turns[0].response) == (record["chosen"], record["rejected"])
        assert chosen.turns[0].input == record["input"]
