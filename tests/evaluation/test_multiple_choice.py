"""Log-likelihoods and multiple choice, beside a slow float64 reference that takes one ending at a time."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from llmfast.cli.main import main
from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.evaluation.likelihood import encode_pair, log_likelihoods
from llmfast.evaluation.multiple_choice import Question, evaluate_multiple_choice, read_questions
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "nn"))
from plain_gpt import plain_logits

BLOCK = 24


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=257, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # far from uniform, so that greedy choice and order are no accident
    return model


def slow(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition, in float64, one token at a time."""
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    total, greedy, read = 0.0, True, list(context)
    for token in continuation:
        start = max(0, len(context) + len(continuation) - 1 - model.config.block_size)
        logits = plain_logits(p, torch.tensor([read[start:]]), n_head=2)[0, -1]
        total += float(logits.log_softmax(0)[token])
        greedy &= int(logits.argmax()) == token
        read.append(token)
    return total, greedy


def random_pairs(model: GPT, count: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    pairs = []
    for number in range(count):
        context = [rng.randrange(257) for _ in range(rng.choice([1, 2, 7, 20, BLOCK, 40]))]
        length = rng.choice([1, 2, 5, BLOCK])
        continuation = [rng.randrange(257) for _ in range(length)]
        if number % 3 == 0:  # what greedy decoding would write
            from llmfast.generation import generate_ids

            continuation = generate_ids(model, [context[-4:]], max_new_tokens=3, temperature=0)[0]
            context = context[-4:]
        pairs.append((context, continuation))
    return pairs


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_log_likelihoods_are_the_slow_ones(model, one_thread, batch_size):
    pairs = random_pairs(model, 24)
    rows: list[int] = []
    found = log_likelihoods(model.train(), pairs, batch_size, progress=rows.append)
    expected = [slow(model, *pair) for pair in pairs]
    assert model.training
    assert sum(rows) == len(pairs)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    assert sum(one.is_greedy for one in found) == 8
    assert [one.log_likelihood for one in found] == pytest.approx([total for total, _ in expected], abs=1e-3, rel=1e-5)


def test_pairs_that_have_no_likelihood(model):
    with pytest.raises(ValueError, match="pair 1 has an empty context"):
        log_likelihoods(model, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="pair 0 has an empty continuation"):
        log_likelihoods(model, [([1], [])])
    with pytest.raises(ValueError, match="continuation 0 has 25 tokens, the model reads 24"):
        log_likelihoods(model, [([1], [2] * (BLOCK + 1))])


def test_pairs_are_cut_as_the_harness_cuts_them():
    byte = load_tokenizer("byte")
    assert encode_pair(byte, "a b", " c") == ([*b"a b"], [*b" c"])
    assert encode_pair(byte, "a b ", "c") == ([*b"a b"], [*b" c"])
    assert encode_pair(byte, "", " c") == ([256], [*b" c"])
    assert encode_pair(byte, "  ", "c") == ([*b"  "], [*b"c"])


def some_questions(count: int) -> list[Question]:
    rng = random.Random(1)
    words = "the cat sat on a mat and ran".split()
    return [
        Question(
            " ".join(rng.choices(words, k=3)),
            [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.choice([2, 4]))],
            rng.randrange(2),
            f"line {number}",
        )
        for number in range(count)
    ]


def test_accuracies_are_those_of_the_slow_reference(model, one_thread):
    questions, byte = some_questions(30), load_tokenizer("byte")
    right = right_norm = 0
    for question in questions:
        scores = [slow(model, [*question.context.encode()], [*f" {ending}".encode()])[0] for ending in question.endings]
        normed = [score / len(ending) for score, ending in zip(scores, question.endings, strict=True)]
        right += scores.index(max(scores)) == question.label
        right_norm += normed.index(max(normed)) == question.label
    found = evaluate_multiple_choice(model, byte, questions, 7)
    assert (found.acc, found.acc_norm) == (right / 30, right_norm / 30)
    assert found.acc != found.acc_norm
    assert found.chance == pytest.approx(sum(1 / len(q.endings) for q in questions) / 30)
    assert found.acc_stderr == pytest.approx(math.sqrt(found.acc * (1 - found.acc) / 29))
    assert found.truncated == sum(
        len(q.context) + 1 + len(ending) > BLOCK + 1 for q in questions for ending in q.endings
    )
    with pytest.raises(UserError, match="line 7: ending 1 has 31 tokens, the model reads 1 to 24"):
        evaluate_multiple_choice(model, byte, [Question("a", ["b", "c" * 30], 0, "line 7")])


def test_records_of_hellaswag_are_put_together_as_the_harness_does(tmp_path):
    path = tmp_path / "h.jsonl"
    record = {
        "ctx": "unused", "label": "1", "activity_label": "Baking", "ctx_a": "He bakes. [header] How [title] So",
        "ctx_b": "then HE", "endings": ["eats [substeps] all.", " sleeps  now."],
    }  # fmt: skip
    path.write_text(json.dumps(record) + "\n\n" + '{"ctx": "a [b]", "endings": ["c", "d"], "label": 0}\n')
    first, second = read_questions(path)
    assert first == Question("Baking: He bakes. How. So Then he", ["eats all.", "sleeps now."], 1, f"{path}, line 1")
    assert second == Question("a [b]", ["c", "d"], 0, f"{path}, line 3")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"ctx": "a", "endings": ["b", "c"]}', "line 2: no 'label'"),
        (b'{"ctx": 1, "endings": ["b", "c"], "label": 0}', "line 2: ctx must be text, got 1"),
        (b'{"ctx": "a", "endings": ["b"], "label": 0}', "line 2: endings must be a list of two or more"),
        (b'{"ctx": "a", "endings": ["b", " "], "label": 0}', "line 2: endings must be a list of two or more"),
        (b'{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 2: label must lie in 0 .. 1, got 2"),
        (b'{"ctx": "a", "endings": ["b", "c"], "label": ""}', "line 2: label must lie in 0 .. 1"),
        (b"[1]", "line 2: expected an object"),
        (b"{1", "line 2: not valid JSON"),
        (b'{"ctx": "\xff"}', "line 2: not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"ctx": "a", "endings": ["b", "c"], "label": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match=words.replace(".", r"\.").replace("[", r"\[")):
        read_questions(path)


def test_the_command_answers_questions(model, tmp_path, capsys, one_thread):
    from llmfast.checkpoint import save_checkpoint

    byte, questions = load_tokenizer("byte"), some_questions(6)
    save_checkpoint(tmp_path / "checkpoints", 1, model=model, tokenizer=byte, state=None)
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(json.dumps({"ctx": q.context, "endings": q.endings, "label": q.label}) + "\n" for q in questions)
    )
    words = ["evaluate", "--checkpoint", str(tmp_path / "checkpoints"), "--multiple-choice", str(path)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["acc"], found["questions"]) == (evaluate_multiple_choice(model, byte, questions).acc, 6)
    assert main(words) == 0
    assert f"acc         {found['acc']:.2%}" in capsys.readouterr().out
    assert main([*words, "--baseline"]) == 2
    assert "--multiple-choice does not go with --baseline" in capsys.readouterr().err
    path.write_text("")
    assert main(words) == 2
    assert "holds no question" in capsys.readouterr().err
