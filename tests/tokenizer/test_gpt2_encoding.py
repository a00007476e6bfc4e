"""GPT-2's ids against published figures and an independent implementation, and inputs made to break it."""

from __future__ import annotations

import json
import time

import pytest
import tiktoken
import tokenizers

from llmfast.tokenizer.bpe import BPETokenizer, split_long_space
from llmfast.tokenizer.gpt2 import written


def test_a_known_sentence_has_its_known_ids(gpt2):
    assert gpt2.encode("Hello, world. Is this-- a test?") == [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]
    assert gpt2.decode([15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]) == "Hello, world. Is this-- a test?"


def test_known_texts_have_their_known_lengths(gpt2, data_folder):
    assert len(gpt2.encode((data_folder / "text/the-verdict.txt").read_text(encoding="utf-8"))) == 5145
    shakespeare = (data_folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(shakespeare))
    assert len(gpt2.encode(shakespeare[:cut])) == 301_966
    assert len(gpt2.encode(shakespeare[cut:])) == 36_059


def test_ten_thousand_random_strings_encode_like_the_tokenizers_library(gpt2, data_folder, random_texts):
    vocab = json.loads((data_folder / "gpt2/encoder.json").read_text(encoding="utf-8"))
    lines = (data_folder / "gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    texts = random_texts(10_000, 20261120)
    ours = gpt2.encode_batch(texts, threads=2)
    for text, ids, expected in zip(texts, ours, peer.encode_batch(texts), strict=True):
        assert ids.tolist() == expected.ids, repr(text)
        assert gpt2.decode_bytes(ids) == text.encode("utf-8")


def test_the_merges_are_those_of_the_file(gpt2, data_folder):
    lines = (data_folder / "gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    assert [f"{written(left)} {written(right)}" for left, right in gpt2.merges()] == [line for line in lines if line]
    vocab = json.loads((data_folder / "gpt2/encoder.json").read_text(encoding="utf-8"))
    assert [vocab[written(token)] for token in gpt2.tokens] == list(range(50_256))


def test_special_token_text_is_ordinary_text_unless_allowed(gpt2):
    ordinary = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eot_id == 50256
    assert gpt2.eot_id not in ordinary
    assert gpt2.decode(ordinary) == "a<|endoftext|>b"
    for text in ("a<|endoftext|>b", "<|endoftext|>", " \n <|endoftext|><|endoftext|> \n", "", "<|endoftext"):
        assert gpt2.encode(text, allow_special=True) == gpt2.encoding.encode(text, allowed_special="all")
        assert gpt2.encode(text, allow_special={"<|endoftext|>"}) == gpt2.encode(text, allow_special=True)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000,
        " " * 1_000_000 + "x",  # tiktoken alone panics on this one
        "\n" * 1_000_000 + "x",
        "\u3000" * 1_000_000 + "x",
        ("x" + " \t" * 150_000) * 3 + "y",
        "\x00" * 1_000_000,
        "." * 1_000_000,
        "😀" * 300_000,
        "ab \n" * 250_000,
        "<|endoftext|>" * 80_000,
    ],
    ids=lambda text: f"{text[:3]!r}x{len(text)}",
)
def test_huge_repeats_encode_in_seconds_and_come_back(gpt2, text):
    start = time.perf_counter()
    ids = gpt2.encode(text)
    assert time.perf_counter() - start < 10
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("length", [99_999, 100_000, 100_001, 150_007])
@pytest.mark.parametrize("run", [" ", "\n", "\t ", "\u3000", " \x85"])
def test_cuts_in_long_white_space_leave_the_tokens_as_tiktoken_has_them(gpt2, run, length):
    for before in ("", "x", "word  ", "  \x1c"):
        for after in ("", "x", "\x00", "'s", " ", "😀"):
            text = before + (run * length)[:length] + after
            assert "".join(split_long_space(text)) == text
            assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text), (before, after)


def test_a_long_run_is_cut_once_and_only_where_text_follows():
    long = " " * 200_000
    assert [len(part) for part in split_long_space(long)] == [200_000]
    assert [len(part) for part in split_long_space("ab" + long + "c" + long + "d")] == [200_001, 200_001, 2]
    assert list(split_long_space("word " * 60_000)) == ["word " * 60_000]


def test_lone_surrogates_become_the_replacement_character(gpt2):
    assert gpt2.encode("a\ud800b") == gpt2.encode("a\ufffdb") == gpt2.encoding.encode_ordinary("a\ud800b")
    assert gpt2.encode("\ud83d\ude00") == gpt2.encode("😀")
    assert gpt2.decode(gpt2.encode("\ud800" * 100_000)) == "\ufffd" * 100_000
    assert gpt2.encode_batch(["\udfff"])[0].tolist() == gpt2.encode("\ufffd")


def test_ids_that_are_no_utf8_decode_to_the_replacement_character(gpt2):
    first_byte = gpt2.encode("é€")[0]
    assert gpt2.decode_bytes([gpt2.tokens.index(b"\xc3")]) == b"\xc3"
    assert gpt2.decode([gpt2.tokens.index(b"\xc3")]) == "\ufffd"
    assert gpt2.decode([first_byte, gpt2.eot_id]).endswith("<|endoftext|>")


def test_tokens_must_be_distinct_and_hold_every_byte():
    every_byte = [bytes([byte]) for byte in range(256)]
    with pytest.raises(ValueError, match="distinct"):
        BPETokenizer([*every_byte, b"ab", b"ab"])
    with pytest.raises(ValueError, match="256 single bytes"):
        BPETokenizer(every_byte[1:])
    assert isinstance(BPETokenizer(every_byte).encoding, tiktoken.Encoding)
