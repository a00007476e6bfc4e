"""The C++ trainer, its Python twin and independent references agree, and training holds what it says."""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
import tracemalloc
from collections import Counter

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.errors import UserError
from llmfast.tokenizer import BPETokenizer, bpe_train, load_tokenizer, train_bpe
from llmfast.tokenizer.bpe_train import MIN_COUNT, character_classes, count_pieces, merge_pieces
from llmfast.tokenizer.gpt2 import written


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(bpe_train, "_native_trainer", lambda: None)


@pytest.fixture(scope="module")
def native():
    trainer = bpe_train._native_trainer()
    if trainer is None:
        pytest.skip("llmfast._C is not built")
    return lambda: trainer(character_classes())


def both(native, texts: list[str], merges: int, min_count: int = MIN_COUNT) -> list[bytes]:
    """The tokens, once the C++ trainer and the twin agree on pieces and tokens."""
    trainer = native()
    for text in texts:
        trainer.add(text)
    counts = count_pieces(texts)
    assert trainer.pieces() == counts
    tokens = trainer.train(merges, min_count)
    assert tokens == merge_pieces(counts, merges, min_count)
    return tokens


def by_recounting(counts: Counter[bytes], merges: int) -> list[bytes]:
    """The rules of bpe_train.py with nothing kept between merges: every pair is counted anew."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [(list(piece), count) for piece, count in counts.items()]
    while len(tokens) < 256 + merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            for i in range(len(word) - 1):
                pairs[word[i], word[i + 1]] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < MIN_COUNT:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(tokens) - 1]
                i += 1
    return tokens[256:]


def test_small_random_corpora_give_the_same_tokens_as_counting_anew(native):
    rng = random.Random(7)
    for _ in range(150):
        alphabet = rng.choice(["a", "ab", "abc", "aab ", "ab'st\n ", "aé😀 1"])
        texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(rng.randrange(5))]
        merges = rng.randrange(40)
        tokens = both(native, texts, merges)
        assert tokens == by_recounting(count_pieces(texts), merges)
        assert len(set(tokens)) == len(tokens)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
def test_any_text_is_split_and_merged_as_in_the_twin(native, texts):
    both(native, texts * 2, 50)


def test_random_unicode_is_split_as_by_the_pattern(native, random_texts):
    both(native, random_texts(3_000, 5), 300)


def test_every_code_point_is_split_as_by_the_pattern(native):
    trainer = native()
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for text in ("".join(characters), "".join(f"a{c} {c}" for c in characters[:0x3100])):
        trainer.add(text)
    expected = count_pieces(["".join(characters), "".join(f"a{c} {c}" for c in characters[:0x3100])])
    assert trainer.pieces() == expected


def test_a_real_text_gives_the_same_tokens_in_both(native, data_folder):
    text = (data_folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    tokens = both(native, text.split("\n\n"), 1_500)
    assert len(tokens) == 1_500
    assert train_bpe([text], 600).tokens[256:] == both(native, [text], 600 - 257)


def test_a_real_text_needs_no_more_tokens_than_the_tokenizers_library(native, data_folder):
    text = (data_folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1023, initial_alphabet=alphabet, show_progress=False)
    peer.train_from_iterator([text[:cut]], trainer)
    ours = train_bpe([text[:cut]], 1024)
    assert len(ours.encode(text[cut:])) <= 1.005 * len(peer.encode(text[cut:]).ids)


def test_the_fallback_gives_the_same_tokenizer_and_says_so_once(monkeypatch, caplog):
    texts = ["the cat sat on the mat, the rat sat on the cat"] * 3
    expected = train_bpe(texts, 280)
    bpe_train._native_trainer.cache_clear()
    monkeypatch.setitem(sys.modules, "llmfast._C", None)
    with caplog.at_level(logging.WARNING, "llmfast.tokenizer"):
        assert train_bpe(texts, 280).tokens == train_bpe(texts, 280).tokens == expected.tokens
    bpe_train._native_trainer.cache_clear()
    assert sum("llmfast._C is missing" in message for message in caplog.messages) == 1


def test_the_vocabulary_counts_bytes_merges_and_end_of_text():
    tokenizer = train_bpe(["abcabcabc abc"] * 2, 260)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("bpe", 260, 259)
    assert tokenizer.tokens[256:] == [b"ab", b"abc", b"abcabc"]
    assert tokenizer.encoding.n_vocab == 260
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [259]


def test_a_text_with_few_merges_gives_a_smaller_vocabulary_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "llmfast.tokenizer"):
        tokenizer = train_bpe(["aab aab"], 1000)
    assert tokenizer.tokens[256:] == [b"aa", b"aab"]
    assert "259 tokens, not 1,000" in caplog.text
    assert train_bpe([], 300).vocab_size == train_bpe([""], 300).vocab_size == 257
    assert train_bpe(["abab"], 257).vocab_size == 257


@pytest.mark.parametrize("size", [256, 0, -1, 300.0, "4096", True, None, 10**30])
def test_a_vocabulary_size_out_of_range_is_a_clear_error(size):
    with pytest.raises(UserError, match="vocab_size must be at least 257"):
        train_bpe(["text"], size)


@pytest.mark.parametrize("twin", [False, True])
def test_progress_counts_merges_and_its_errors_end_the_training(twin, request, data_folder):
    if twin:
        request.getfixturevalue("without_native")
    text = (data_folder / "text/the-verdict.txt").read_text(encoding="utf-8")
    seen = []
    train_bpe([text], 257 + 200, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 200), (128, 200), (192, 200)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe([text], 457, progress=stop)


@pytest.mark.parametrize("twin", [False, True])
def test_texts_are_not_held(twin, request):
    if twin:
        request.getfixturevalue("without_native")
    character_classes()
    tracemalloc.start()
    train_bpe((f"{i}" + "words and more words " * 50_000 for i in range(4 if twin else 40)), 280)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000  # two texts of 1 MB, and what the tokenizer itself takes


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, " " * 1_000_000 + "x", "ACGT" * 250_000, "\x00" * 1_000_000, "\ud800" * 300_000, "é😀" * 200_000],
    ids=lambda text: f"{text[:2]!r}x{len(text)}",
)
def test_huge_repeats_train_in_seconds(text):
    start = time.perf_counter()
    tokenizer = train_bpe([text], 512)
    assert time.perf_counter() - start < 10
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\ud800", "\ufffd")


def test_one_endless_word_trains_in_seconds(native):
    word = "".join(random.Random(0).choices("ACGT", k=1_000_000))
    start = time.perf_counter()
    assert train_bpe([word], 2_000).vocab_size == 2_000
    assert time.perf_counter() - start < 20


def test_a_trained_tokenizer_encodes_its_pieces_as_the_merges_say(data_folder):
    """tiktoken over the ranks gives what replaying the merges gives."""
    text = (data_folder / "text/the-verdict.txt").read_text(encoding="utf-8")
    tokenizer = train_bpe([text], 500)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    expected = []
    for piece in regex.findall(bpe_train.PIECES, text):
        word = [bytes([byte]) for byte in piece.encode("utf-8")]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(word)) if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            word[i : i + 2] = [word[i] + word[i + 1]]
        expected.extend(ranks[token] for token in word)
    assert tokenizer.encode(text) == expected
    assert len(expected) < len(load_tokenizer("byte").encode(text)) / 2


def test_a_trained_tokenizers_merges_give_its_ids_in_the_tokenizers_library(data_folder, random_texts):
    """The list of merges that other programs read holds all that ours knows."""
    tokenizer = train_bpe([(data_folder / "text/the-verdict.txt").read_text(encoding="utf-8")], 700)
    merges = [(written(left), written(right)) for left, right in tokenizer.merges()]
    vocab = {written(token): rank for rank, token in enumerate(tokenizer.tokens)}
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in random_texts(1_000, 7):
        assert tokenizer.encode(text) == peer.encode(text).ids, repr(text)


def test_merges_of_a_huge_token_take_seconds():
    text = "a" * (1 << 17)
    tokenizer = train_bpe([text, text], 300)
    start = time.perf_counter()
    merges = tokenizer.merges()
    assert time.perf_counter() - start < 5
    assert [left + right for left, right in merges] == tokenizer.tokens[256:]


def test_a_token_that_merging_never_reaches_has_no_merges():
    tokens = [*(bytes([byte]) for byte in range(256)), b"abc"]
    with pytest.raises(UserError, match=r"token 256 \(b'abc'\) is not two earlier tokens joined"):
        BPETokenizer(tokens).merges()
