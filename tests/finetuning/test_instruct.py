"""Instruction tuning: rows and masks, packing, accumulation, splits, responses, and bad data."""

from __future__ import annotations

import ast
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.config import GPTConfig, InstructConfig, TrainConfig
from llmfast.errors import UserError
from llmfast.finetuning.base import Examples
from llmfast.finetuning.conversations import cut
from llmfast.finetuning.instruct import finetune_instruct, instruct_loss
from llmfast.finetuning.prompts import STYLES, Conversation, Turn, conversation_of, encode, prompt_style
from llmfast.finetuning.responding import respond
from llmfast.finetuning.rows import Row, pack, pad, pad_packed, row_of
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer
from llmfast.training import Trainer
from llmfast.training.update import Update

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


def config(base, data, tmp_path, **options):
    values = dict(
        checkpoint=str(base), data=data, out=str(tmp_path / "run"), prompt_style="{instruction} {input}>", threads=1,
        micro_batch_size=4, learning_rate=3e-3, response_tokens=8, sample_every=0, device="cpu",
    )  # fmt: skip
    return InstructConfig(**{**values, **options})


# ---- Rows ------------------------------------------------------------------------------------------------------------


def two_rows(*, mask_prompts):
    """Rows of "p>XY" and "q>Z": bytes and 256, the end of text."""
    tokenizer, style = load_tokenizer("byte"), prompt_style("{instruction}>")
    texts = (Turn("p", response="XY"), Turn("q", response="Z"))
    return [row_of(encode(tokenizer, style, Conversation((turn,))), mask_prompts=mask_prompts) for turn in texts]


def test_padding_is_masked_but_for_the_first_end_of_text():
    inputs, targets = pad(two_rows(mask_prompts=False), 256)
    assert inputs.tolist() == [[112, 62, 88, 89], [113, 62, 90, 256]]
    assert targets.tolist() == [[62, 88, 89, 256], [62, 90, 256, -100]]


def test_a_masked_prompt_leaves_the_response_and_its_end():
    inputs, targets = pad(two_rows(mask_prompts=True), 256)
    assert inputs.tolist() == [[112, 62, 88, 89], [113, 62, 90, 256]]
    assert targets.tolist() == [[-100, 88, 89, 256], [-100, 90, 256, -100]]


def test_packed_rows_know_their_documents():
    inputs, targets, doc_ids = pad_packed([two_rows(mask_prompts=True), two_rows(mask_prompts=True)[1:]], 256)
    assert inputs.tolist() == [[112, 62, 88, 89, 113, 62, 90], [113, 62, 90, 256, 256, 256, 256]]
    assert targets.tolist() == [[-100, 88, 89, 256, -100, 90, 256], [-100, 90, 256, -100, -100, -100, -100]]
    assert doc_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1]]


def some_rows(count=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(1, 13, (count,), generator=generator).tolist():
        ids = torch.randint(29, (length + 1,), generator=generator).tolist()
        masked = torch.randint(length + 1, (), generator=generator).item()
        rows.append(Row(ids[:-1], [-100] * masked + ids[1 + masked :]))
    return rows


def small(**options):
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab_size=29, block_size=16, n_layer=2, n_head=2, n_embd=16, **options)).double()


def test_packing_keeps_every_row_once_within_the_length():
    rows = some_rows(50)
    groups = pack(rows, 16)
    assert sorted(map(repr, rows)) == sorted(repr(row) for group in groups for row in group)
    assert max(sum(map(len, group)) for group in groups) <= 16
    assert len(groups) <= -(-sum(map(len, rows)) // 16) + 2
    with pytest.raises(ValueError, match="at most length 5"):
        pack(rows, 5)


def test_packed_and_padded_batches_have_one_loss_and_gradient():
    rows, model = some_rows(), small()
    gradients = []
    for batch in (pad(rows, 3), pad_packed(pack(rows, 16), 3)):
        loss, count = instruct_loss(model, batch)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        assert count == sum(target != -100 for row in rows for target in row.targets)
        model.zero_grad()
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_accumulated_micro_batches_equal_the_full_batch(micro, tmp_path, monkeypatch):
    """Of masked rows of many lengths, some with no target at all, also where lengths decide who shares a batch."""
    seen = {}

    def record(self, step, loss, divisor):
        grads = [p.grad / divisor for p in self._parameters]
        seen[self.name] = [loss, *grads]
        return torch.zeros(())

    monkeypatch.setattr(Update, "apply", record)
    for size, length in ((10, None), (micro, len)):
        Update.name = size
        data = Examples(some_rows(10), functools.partial(pad, pad_id=3), size, batch_size=10, seed=1, length=length)
        options = TrainConfig(
            out=str(tmp_path / f"run{size}"), micro_batch_size=size, batch_size=10, max_steps=1, device="cpu", threads=1
        )
        Trainer(small(), options, data, loss_fn=instruct_loss, progress=False).fit()
    for full, accumulated in zip(seen[10], seen[micro], strict=True):
        torch.testing.assert_close(accumulated, full, rtol=1e-12, atol=1e-12)


def test_sorting_by_length_moves_no_sample_into_another_step():
    rows = some_rows(23)
    plain, by_length = (
        Examples(rows, lambda part: (part,), 2, batch_size=6, seed=5, length=length) for length in (None, len)
    )
    for step in range(9):
        a, b = ([row for i in (0, 2, 4) for row in data.batch(6 * step + i)[0]] for data in (plain, by_length))
        assert sorted(map(repr, a)) == sorted(map(repr, b))
        assert [len(row) for row in b] == sorted(len(row) for row in b)


def test_rows_of_the_books_data_are_the_books():
    """Its own ``InstructionDataset`` and ``custom_collate_fn``, over its own 1,100 entries."""
    data, peers = os.environ.get("LLMFAST_TEST_DATA"), os.environ.get("LLMFAST_PEERS")
    if not (data and peers):
        pytest.skip("LLMFAST_TEST_DATA and LLMFAST_PEERS are not set")
    file = Path(peers, "LLMs-from-scratch", "ch07", "01_main-chapter-code", "gpt_instruction_finetuning.py")
    wanted = ("InstructionDataset", "custom_collate_fn", "format_input")
    book: dict[str, Any] = {"torch": torch, "Dataset": object}  # the rest of the file needs TensorFlow
    parts = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) in wanted]
    exec(compile(ast.Module(parts, []), str(file), "exec"), book)
    entries = json.loads(Path(data, "instructions", "instruction-data.json").read_text())
    tokenizer = load_tokenizer(str(Path(data, "gpt2", "vocab.bpe")))
    theirs = book["InstructionDataset"](entries, tokenizer)
    ours = [
        row_of(encode(tokenizer, STYLES["alpaca"], conversation_of(entry)), mask_prompts=False) for entry in entries
    ]
    for start in range(0, len(entries), 8):
        inputs, targets = book["custom_collate_fn"]([theirs[i] for i in range(start, min(start + 8, len(entries)))])
        got = pad(ours[start : start + 8], 50256)
        assert torch.equal(got[0], inputs)
        assert torch.equal(got[1], targets)


# ---- Splits ----------------------------------------------------------------------------------------------------------


def test_the_books_split_is_in_the_files_order():
    parts = cut(1100, InstructConfig(checkpoint="", data=""))
    assert parts == {
        "train": list(range(935)), "test": list(range(935, 1045)), "validation": list(range(1045, 1100)),
    }  # fmt: skip


def test_a_random_split_follows_its_seed_alone():
    first, same, other = (
        cut(100, InstructConfig(checkpoint="", data="", split="random", seed=seed, split_seed=split_seed))
        for seed, split_seed in ((1, 1), (2, 1), (1, 2))
    )
    assert first == same != other
    assert sorted(i for part in first.values() for i in part) == list(range(100))
    assert [len(first[name]) for name in ("train", "validation", "test")] == [85, 5, 10]


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(mask_instruction=True, packing=True), dict(train="lora", split="random")])
def test_a_run_learns_and_answers_its_test_split(base, entries, write, tmp_path, options):
    settings = config(base, write(entries), tmp_path, epochs=3, val_fraction=0.2, **options)
    result, responses = finetune_instruct(settings, progress=False)
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    splits = {
        name: [json.loads(line) for line in (result.out / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    assert [len(splits[name]) for name in splits] == [28, 8, 4]
    written = json.loads(responses.read_text())
    assert [{k: v for k, v in entry.items() if k != "model_response"} for entry in written] == splits["test"]
    assert all(isinstance(entry["model_response"], str) for entry in written)
    # Once more: nothing is left to train, and the responses are the same.
    before = responses.read_bytes()
    responses.unlink()
    again, responses = finetune_instruct(InstructConfig(**{**vars(settings), "resume": True}), progress=False)
    assert (again.steps, responses.read_bytes()) == (result.steps, before)


def test_examples_in_files_of_their_own(base, entries, write, tmp_path):
    chat = [{"messages": [{"role": "user", "content": "Say a"}, {"role": "assistant", "content": "a"}]}] * 3
    settings = config(
        base, write(entries), tmp_path, val_data=write(chat, "val.jsonl"), test_data=write(chat[:2], "test.json"),
        epochs=1,
    )  # fmt: skip
    result, responses = finetune_instruct(settings, progress=False)
    assert result.steps == 10
    assert [entry["messages"] for entry in json.loads(responses.read_text())] == [chat[0]["messages"]] * 2


def test_a_response_may_hold_a_prompt():
    """The model repeats a text that looks like the prompt: all of it is the response."""
    said = b"\n\n### Response:\n{instruction}"

    class Echo(GPT):
        def hidden_states(self, idx, *, cache=None):
            return torch.nn.functional.one_hot(idx % 257, 257).float()

    tokenizer = load_tokenizer("byte")
    table = {256: said[0]}
    model = Echo(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=1, n_embd=257, tie_embeddings=False))
    # Each byte of the text occurs where it is followed by one byte only: spelled with distinct bytes.
    text = bytes(dict.fromkeys(said))
    table = dict(zip((ord(">"), *text), (*text, 256), strict=True))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for now, then in table.items():
            model.lm_head.weight[then, now] = 1.0
    style = prompt_style("{instruction}>")
    got = respond(model, tokenizer, style, [Conversation((Turn("x"),))], max_new_tokens=99, progress=False)
    assert got == [text.decode().strip()]


def test_responses_do_not_depend_on_their_batch(base):
    from llmfast.checkpoint import load_model

    model, tokenizer, style = load_model(base), load_tokenizer("byte"), prompt_style("plain")
    asked = [Conversation((Turn("x" * (1 + 5 * i % 23)),)) for i in range(11)]
    together = respond(model, tokenizer, style, asked, max_new_tokens=9, progress=False)
    alone = [respond(model, tokenizer, style, [one], max_new_tokens=9, progress=False)[0] for one in asked]
    assert together == alone


# ---- Bad data --------------------------------------------------------------------------------------------------------

GOOD = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ([GOOD, {"instruction": "a"}], 6, "no 'output'"),
        ([GOOD, {"instruction": "a", "output": ""}], 6, "'output' is empty"),
        ([GOOD, {"instruction": "a", "output": None}], 6, "no 'output'"),
        ([GOOD, {"instruction": "a", "output": "b" * 200}], 6, "context has 96"),
        ([GOOD, ["a", "b"]], 6, "expected a JSON object"),
        (b'[{"instruction": "a", "output": "b"},\n {"instruction": "a" "output": "b"}]', 2, "broken JSON"),
        (b'[{"instruction": "a", "output": "\xff"}]', 1, "not UTF-8"),
        (b"[]", None, "no record"),
        (b'[{"instruction": "a", "output": "b"},\n{"instruction": "a", "output', 2, "broken JSON"),
    ],
)  # fmt: skip
def test_bad_data_is_one_clear_error_and_writes_nothing(base, write, tmp_path, content, line, message):
    data = write(content)
    with pytest.raises(UserError, match=message) as caught:
        finetune_instruct(config(base, data, tmp_path), progress=False)
    assert f"{data}:{line}:" in str(caught.value) if line else data in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(response_tokens=-1), "response_tokens must be 0 or more, got -1"),
        (dict(prompt_style="alpacca"), "did you mean alpaca"),
        (dict(val_data="nowhere.json"), "nowhere.json: No such file"),
    ],
)
def test_options_that_make_no_sense_are_refused(base, entries, write, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        finetune_instruct(config(base, write(entries), tmp_path, **options), progress=False)
    assert not (tmp_path / "run").exists()


def test_half_characters_of_json_escapes_do_no_harm(base, write, tmp_path):
    data = write([{"instruction": "a\ud800", "output": "b\udfff"}] * 30)
    result, responses = finetune_instruct(config(base, data, tmp_path, epochs=0.2, sample_every=1), progress=False)
    assert json.loads(responses.read_text())[0]["instruction"] == "a\ufffd"
    assert "a\ufffd" in (result.out / "samples.txt").read_text()


def test_bad_records_are_left_out_and_counted_if_asked(base, entries, write, tmp_path, capsys):
    bad = [{"instruction": "x"}, {"instruction": "", "output": "y"}, {"instruction": "x", "output": "y" * 200}]
    data = write([*entries[:20], *bad, *entries[20:]], "data.jsonl")
    Path(data).write_bytes(Path(data).read_bytes() + b"{broken\n\xff\n")
    settings = config(base, data, tmp_path, skip_bad=True, epochs=1, test_fraction=0.0)
    result, responses = finetune_instruct(settings)
    assert responses is None
    assert f"left out 5 of 45 records of {data}" in capsys.readouterr().err
    assert result.steps == 9  # of 38, in fours


def test_longer_texts_are_cut_and_counted_if_asked(base, entries, write, tmp_path, capsys):
    data = write([*entries, {"instruction": "x", "output": "y" * 200}] * 2)
    finetune_instruct(config(base, data, tmp_path, max_length=90, epochs=0.1, response_tokens=0))
    assert "cut 2 conversations to 90 tokens" in capsys.readouterr().err
    long = write([{"instruction": "x" * 20, "output": "y"}], "long.json")
    with pytest.raises(UserError, match=r"long.json:2: its prompt alone has more than 10 tokens"):
        finetune_instruct(config(base, long, tmp_path / "other", max_length=10))
    with pytest.raises(UserError, match="max_length 97 is above the model's context of 96"):
        finetune_instruct(config(base, data, tmp_path / "other", max_length=97))


def test_real_instructions_are_cut_as_the_book_cuts_them(base, tmp_path):
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA is not set")
    from llmfast.finetuning.conversations import read_splits_of
    from llmfast.finetuning.prompts import conversation_of

    data = str(Path(folder, "instructions", "instruction-data.json"))
    splits, notes = read_splits_of(config(base, data, tmp_path), conversation_of)
    assert {name: len(split) for name, split in splits.items()} == {"train": 935, "validation": 55, "test": 110}
    assert notes == ["935 train, 55 validation, 110 test examples"]
    assert splits["test"].records[0]["output"] == "The car is as fast as lightning."
    assert sum(len(split.records) for split in splits.values()) == len(json.loads(Path(data).read_text()))
