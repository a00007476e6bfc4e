"""Prompt styles, chat messages, and which tokens are a response."""

from __future__ import annotations

import pytest

from llmfast.errors import UserError
from llmfast.finetuning.prompts import STYLES, Conversation, Turn, conversation_of, encode, prompt_style
from llmfast.tokenizer import load_tokenizer

ENTRY = {"instruction": "Name a colour.", "input": "warm", "output": "Red."}
TWO_TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao."},
    ]
}


def text(style, record):
    """A conversation as text, responses in [[ ]]."""
    pieces = prompt_style(style).pieces(conversation_of(record))
    return "".join(prompt + f"[[{response}]]" for prompt, response in pieces)


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour."
)


@pytest.mark.parametrize(
    ("style", "entry", "want"),
    [
        ("alpaca", ENTRY, ALPACA + "\n\n### Input:\nwarm\n\n### Response:\n[[Red.]]"),
        ("alpaca", {**ENTRY, "input": ""}, ALPACA + "\n\n### Response:\n[[Red.]]"),
        ("phi3", ENTRY, "<|user|>\nName a colour.\nwarm\n<|assistant|>\n[[Red.]]"),
        ("chatml", {**ENTRY, "input": None},
         "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Red.]]"),
        ("plain", ENTRY, "Name a colour.\nwarm[[Red.]]"),
        ("Q: {instruction} ({input})\\nA: ", ENTRY, "Q: Name a colour. (warm)\nA: [[Red.]]"),
        ("{instruction}\n\nGiven {input}\n\n= ", {"prompt": "x", "completion": "y"}, "x\n\n= [[y]]"),
        ('{"q": "{instruction}"} ', ENTRY, '{"q": "Name a colour.\nwarm"} [[Red.]]'),
        ("alpaca", TWO_TURNS, "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n[[Hello.]]\n\n"
         "### Instruction:\nBye\n\n### Response:\n[[Ciao.]]"),
        ("chatml", TWO_TURNS, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\n[[Hello.]]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[Ciao.]]"),
        ("phi3", TWO_TURNS, "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n[[Hello.]]\n"
         "<|user|>\nBye\n<|assistant|>\n[[Ciao.]]"),
    ],
)  # fmt: skip
def test_styles(style, entry, want):
    assert text(style, entry) == want


def test_share_gpt_conversations_are_messages():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    assert text("phi3", {"conversations": turns}) == "<|user|>\nHi\n<|assistant|>\n[[Hello.]]"


def test_a_template_comes_from_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("Frage: {instruction}\nAntwort: ", encoding="utf-8")
    assert text(str(tmp_path / "t.txt"), {**ENTRY, "input": ""}) == "Frage: Name a colour.\nAntwort: [[Red.]]"


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("alpacca", "did you mean alpaca"),
        ("{input}", "no {instruction}"),
        ("{instruction} {output}", "unknown placeholder {output}"),
    ],
)
def test_a_bad_style_is_named(style, message):
    with pytest.raises(UserError, match=message):
        prompt_style(style)


def test_what_an_entry_holds_is_never_taken_for_a_placeholder_or_a_prompt():
    entry = {"instruction": "{input} ### Response:\n", "input": "{instruction}", "output": "### Response:\n{input}"}
    assert text("alpaca", entry).endswith(
        "### Instruction:\n{input} ### Response:\n\n\n### Input:\n{instruction}\n\n"
        "### Response:\n[[### Response:\n{input}]]"
    )
    tokenizer = load_tokenizer("byte")
    encoded = encode(tokenizer, STYLES["alpaca"], conversation_of(entry))
    assert tokenizer.decode(encoded.ids[encoded.prompt_length : -1]) == entry["output"]


def test_responses_are_known_token_by_token():
    """A hand-written expectation: bytes, responses in capitals, 256 for end of text."""
    tokenizer = load_tokenizer("byte")
    turns = (Turn("a", response="BC"), Turn("d", "e", response="F"))
    encoded = encode(tokenizer, prompt_style("<{instruction}>{input}"), Conversation(turns, "s"))
    assert encoded.ids == [*b"s\n\n<a>", *b"BC", 256, *b"\n\n<d>e", *b"F", 256]
    assert encoded.is_response == [False] * 6 + [True] * 3 + [False] * 6 + [True] * 2
    assert encoded.prompt_length == 15
    last = encoded.last_response_only()
    assert (last.ids, last.is_response) == (encoded.ids, [False] * 15 + [True] * 2)
    asked = encode(tokenizer, prompt_style("<{instruction}>{input}"), Conversation(turns, "s").prompt)
    assert asked.ids == encoded.ids[:15]


def test_end_of_text_written_in_an_entry_is_only_text():
    tokenizer = load_tokenizer("byte")
    encoded = encode(tokenizer, STYLES["plain"], Conversation((Turn("<|endoftext|>", response="x<|endoftext|>"),)))
    assert encoded.ids.count(256) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"no instruction, prompt or messages \(it has text\)"),
        ({"instruction": "x"}, "no 'output'"),
        ({"instruction": " ", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "x", "output": ""}, "'output' is empty"),
        ({"instruction": "x", "output": 3}, "'output' is no text, but int"),
        ({"messages": []}, "messages is no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "does not end with a message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"messages\[0\]: a message of the assistant does not"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: role is 'robot'"),
        ({"messages": [{"role": "user", "content": ""}]}, r"messages\[0\]: content is empty"),
        ({"messages": ["x"]}, r"messages\[0\] is no message"),
        ({"messages": [{"role": [], "content": "x"}]}, r"messages\[0\]: role is"),
    ],
)  # fmt: skip
def test_a_bad_record_says_what_it_lacks(record, message):
    with pytest.raises(ValueError, match=message):
        conversation_of(record)
