"""generate: texts in, completions out; streams that join to them; stop strings; tokenizers that do not fit."""

from __future__ import annotations

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.generation import generate, generate_ids
from llmfast.generation.text import Completion
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer, train_char

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = load_tokenizer("byte")
TEXT = "naïve — 漢字 🙂 \U0001f1e9\U0001f1ea end"


def model_of(vocab_size: int = 300) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=32, init="pytorch"))


def test_completions_are_the_decoded_ids():
    model, prompts = model_of(), ["abc", "ä", "a longer prompt than the context"]
    ids = generate_ids(
        model, [BYTES.encode(p) for p in prompts], seed=1, max_new_tokens=30, eot_id=BYTES.eot_id, vocab_size=257
    )
    texts = generate(model, BYTES, prompts, seed=1, max_new_tokens=30)
    assert texts == [BYTES.decode(row) for row in ids]
    assert generate(model, BYTES, "ä", seed=1, max_new_tokens=30) == texts[1]


def test_streamed_pieces_join_to_the_completion():
    model, one, many = model_of(), [], {0: [], 1: []}
    text = generate(model, BYTES, "x", seed=0, max_new_tokens=60, stream=one.append)
    assert "".join(one) == text
    assert len(one) > 10
    texts = generate(
        model, BYTES, ["x", "y"], seed=0, max_new_tokens=60, stream=lambda row, piece: many[row].append(piece)
    )
    assert texts == ["".join(many[0]), "".join(many[1])]
    assert texts[0] == text


def feed(data: bytes, stop: list[str]) -> tuple[list[str], str, int]:
    """Pieces, whole text and number of bytes taken of a completion that is fed byte by byte."""
    pieces: list[str] = []
    completion = Completion(BYTES, stop, pieces.append)
    taken = next((n for n, byte in enumerate(data, 1) if completion.add(byte)), len(data))
    return pieces, completion.finish(), taken


def test_no_piece_splits_a_character():
    pieces, text, _ = feed(TEXT.encode(), [])
    assert pieces == list(TEXT)
    assert text == TEXT


@pytest.mark.parametrize("data", [b"\xff", b"a\xe6\xbc", b"\xf0\x9f\x99b", b"\x80\x80\xc3\xa4", b""])
def test_broken_utf8_becomes_replacement_characters_as_in_decode(data):
    pieces, text, _ = feed(data, [])
    assert text == "".join(pieces) == BYTES.decode(list(data))


@pytest.mark.parametrize("stop", [["end"], ["漢字"], ["🙂 "], ["dne", "nd"], ["aab"], ["ïx", "ïv"], ["never"]])
def test_text_ends_before_the_first_stop_string(stop):
    whole = TEXT + "aaaab tail"
    pieces, text, taken = feed(whole.encode(), stop)
    ends = [whole.index(s) for s in stop if s in whole]
    assert text == "".join(pieces) == whole[: min(ends, default=len(whole))]
    if ends:
        assert taken == max(len(whole[: whole.index(s) + len(s)].encode()) for s in stop if whole.find(s) == min(ends))


def test_generation_ends_at_a_stop_string():
    model = model_of()
    free = generate(model, BYTES, "x", seed=3, max_new_tokens=80)
    stop = free[20:22]
    assert generate(model, BYTES, "x", seed=3, max_new_tokens=80, stop=[stop]) == free[: free.index(stop)]
    assert generate(model, BYTES, "x", seed=3, max_new_tokens=80, stop=stop) == free[: free.index(stop)]


def test_the_end_of_text_token_ends_the_text_unless_told_otherwise():
    model = model_of(257)
    with torch.no_grad():
        model.lm_head.weight[256] = 40 * model.transformer.ln_f.bias.add(1)
        model.transformer.ln_f.bias.fill_(1.0)
    assert generate(model, BYTES, "x", temperature=0, max_new_tokens=2) == ""
    assert generate(model, BYTES, "x", temperature=0, max_new_tokens=2, stop_at_eot=False) == "<|endoftext|>" * 2


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    model = model_of()
    ids = generate_ids(model, [[BYTES.eot_id]], temperature=0, max_new_tokens=9, vocab_size=257)
    assert generate(model, BYTES, "", temperature=0, max_new_tokens=9, stop_at_eot=False) == BYTES.decode(ids[0])


def test_an_empty_prompt_without_an_end_of_text_token_is_a_user_error():
    chars = train_char(["abc"])
    assert chars.eot_id is None
    with pytest.raises(UserError, match="empty prompt needs an end-of-text token"):
        generate(model_of(), chars, "")


def test_a_tokenizer_larger_than_the_model_is_a_user_error():
    with pytest.raises(UserError, match="tokenizer has 257 ids, the model 100"):
        generate(model_of(100), BYTES, "x")


def test_an_empty_stop_string_is_a_user_error():
    with pytest.raises(UserError, match="stop string is empty"):
        generate(model_of(), BYTES, "x", stop=[""])


def test_no_prompts_give_no_completions():
    assert generate(model_of(), BYTES, []) == []
