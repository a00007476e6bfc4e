"""What holds for every kind of tokenizer: round trips, types, ids out of range, threads, processes."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest

from llmfast.errors import UserError
from llmfast.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe, train_char

TEXTS = ["", "a", "to be, or not to be", "naïve 😀\n\n\tcafe\u0301 \x00 漢字", "  'll 12345  "]


@pytest.fixture(scope="module", params=["gpt2", "byte", "char", "bpe"])
def tokenizer(request) -> Tokenizer:
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    if request.param == "byte":
        return load_tokenizer("byte")
    return train_char(TEXTS) if request.param == "char" else train_bpe([*TEXTS, *TEXTS], 300)


def test_text_comes_back(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids, dtype=np.int64)) == text
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


def test_the_bytes_of_every_token_are_listed(tokenizer):
    tokens = tokenizer.token_bytes()
    assert len(tokens) == tokenizer.vocab_size
    assert all(tokens[i] == tokenizer.decode_bytes([i]) for i in range(0, len(tokens), 7))
    assert tokenizer.eot_id is None or tokens[tokenizer.eot_id] == b"<|endoftext|>"


def test_batches_are_small_arrays_of_the_same_ids_whatever_the_threads(tokenizer):
    texts = TEXTS * 20
    one = tokenizer.encode_batch(texts)
    assert [array.tolist() for array in one] == [tokenizer.encode(text) for text in texts]
    assert all(array.dtype == np.uint16 and array.ndim == 1 for array in one)
    many = tokenizer.encode_batch(iter(texts), threads=4)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, many, strict=True))
    assert tokenizer.encode_batch([]) == tokenizer.encode_batch([], threads=3) == []


@pytest.mark.parametrize("outside", [-1, 1 << 17, 1 << 40])
def test_ids_out_of_range_are_a_clear_error(tokenizer, outside):
    with pytest.raises(UserError, match=rf"token id {outside} is out of range.*ids 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, outside])
    with pytest.raises(UserError, match="out of range"):
        tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("ids", [[0.5], [[0, 1]], ["a"], [True], [1 << 70]])
def test_ids_that_are_no_flat_integers_are_a_type_error(tokenizer, ids):
    with pytest.raises(TypeError, match="flat sequence of integers"):
        tokenizer.decode(ids)


def test_text_that_is_no_str_is_a_type_error(tokenizer):
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"abc")


def test_special_tokens_are_allowed_by_name(tokenizer):
    with pytest.raises(UserError, match=r"'<\|nope\|>' is no special token"):
        tokenizer.encode("to be", allow_special={"<|nope|>"})
    if tokenizer.eot_id is None:
        assert tokenizer.encode("to be", allow_special=True) == tokenizer.encode("to be")
        return
    text = "a<|endoftext|>to be<|endoftext|>"
    ids = tokenizer.encode(text, allow_special=True)
    assert ids.count(tokenizer.eot_id) == 2
    assert ids == tokenizer.encode(text, allow_special="<|endoftext|>")
    assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.eot_id not in tokenizer.encode(text)


def test_a_pickled_copy_gives_the_same_ids(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.kind, copy.vocab_size, copy.eot_id) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id)
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_give_the_same_ids(tokenizer, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(tokenizer.encode, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_lone_surrogates_become_the_replacement_character():
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800\ud83d\ude00")) == "a\ufffd😀"
    chars = train_char(["a\ud800"])
    assert chars.characters == "a\ufffd"
    assert chars.encode("\udfff") == chars.encode("\ufffd")


def test_byte_ids_are_the_utf8_bytes(random_texts):
    for text in random_texts(200, 1):
        assert ByteTokenizer().encode(text) == list(text.encode("utf-8"))
    assert ByteTokenizer().encode("<|endoftext|>", allow_special=True) == [256]


def test_char_ids_are_nanogpts(data_folder):
    text = (data_folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    tokenizer = train_char([text[: len(text) // 2], text[len(text) // 2 :]])
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode(text) == [ids[character] for character in text]


def test_a_character_never_seen_is_named():
    tokenizer = train_char(["hello"])
    for text, name in (
        ("hex", r"'x' \(U\+0078, at position 2"),
        ("\U0001f600", r"U\+1F600, at position 0"),
        ("\0", "0000"),
    ):
        with pytest.raises(UserError, match=name):
            tokenizer.encode(text)


def test_a_char_vocabulary_needs_a_character():
    with pytest.raises(UserError, match="text is empty"):
        CharTokenizer("")


def test_more_characters_than_uint16_holds_take_uint32():
    tokenizer = CharTokenizer(chr(code) for code in range(0x10000, 0x10000 + 65_537))
    (ids,) = tokenizer.encode_batch([chr(0x10000 + 65_536)])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [65_536]
