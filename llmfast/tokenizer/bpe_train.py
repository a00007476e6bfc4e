"""Training a byte-pair encoding on text, in plain Python: the readable twin of csrc/python/bpe.cpp.

Both give the same tokens, by the same rules:

1. A text is split into pieces by GPT-2's pattern; a merge never crosses the border of a piece.
2. Every piece starts as its UTF-8 bytes. Token ids 0-255 are the bytes; each new token takes the next id.
3. Again and again, the pair of neighbouring tokens that occurs most often is joined into a new token. Overlapping pairs
   all count ("aaa" holds two of "aa"); joining goes from left to right. Among equally frequent pairs the one with the
   smaller left id is taken, then the one with the smaller right id.
4. It ends when the vocabulary is full, or when no pair occurs twice: a token seen once teaches a model nothing.

No two merges spell the same token: inside a stretch of text that becomes one token, the merges are those of the stretch
alone, so that its last one is always the same.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); Radford et al., "Language Models
are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

from llmfast.errors import UserError
from llmfast.tokenizer.base import replace_surrogates
from llmfast.tokenizer.bpe import BPETokenizer

logger = logging.getLogger("llmfast.tokenizer")

Progress = Callable[[int, int], None]
Pair = tuple[int, int]

PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
MIN_COUNT = 2
_REPORT_EVERY = 64  # merges between two calls of progress


def train_bpe(texts: Iterable[str], vocab_size: int = 4096, *, progress: Progress | None = None) -> BPETokenizer:
    """A byte-pair encoding trained on ``texts``, which are read once, one at a time.

    ``vocab_size`` counts the 256 bytes, the merged tokens and <|endoftext|>, which is the last id. Text with too few
    repeated pairs gives a smaller vocabulary, and a logged warning. ``progress(done, total)`` counts merges.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 257 <= vocab_size <= 1 << 32:
        raise UserError(
            f"vocab_size must be at least 257 (256 bytes and <|endoftext|>) and fit 32 bits: {vocab_size!r}"
        )
    if isinstance(texts, str):
        texts = [texts]
    merges = vocab_size - 257
    native = _native_trainer()
    if native is None:
        tokens = merge_pieces(count_pieces(texts), merges, progress=progress)
    else:
        trainer = native(character_classes())
        for text in texts:
            trainer.add(_without_surrogates(text))
        tokens = trainer.train(merges, MIN_COUNT, progress)
    if len(tokens) < merges:
        logger.warning(
            "the text gives a vocabulary of %s tokens, not %s: no further pair of tokens occurs twice",
            f"{257 + len(tokens):,}",
            f"{vocab_size:,}",
        )
    return BPETokenizer([bytes([byte]) for byte in range(256)] + tokens)


def count_pieces(texts: Iterable[str]) -> Counter[bytes]:
    """How often each piece (its UTF-8 bytes) occurs in ``texts``."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(match.group().encode("utf-8") for match in PIECES.finditer(_without_surrogates(text)))
    return counts


def merge_pieces(
    counts: Mapping[bytes, int], merges: int, min_count: int = MIN_COUNT, *, progress: Progress | None = None
) -> list[bytes]:
    """The tokens, at most ``merges`` of them, that the most frequent pairs in the pieces make one after the other."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [list(piece) for piece in counts]
    word_counts = list(counts.values())
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)  # may also name words that have lost the pair
    for w, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += word_counts[w]
            words_with[pair].add(w)
    # Every pair has an entry that is at least its count; one that is out of date is put right when it comes up.
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)

    while len(tokens) < 256 + merges and queue and -queue[0][0] >= min_count:
        negative_count, best = heapq.heappop(queue)
        if pair_counts[best] != -negative_count:
            if 0 < pair_counts[best] < -negative_count:
                heapq.heappush(queue, (-pair_counts[best], best))
            continue
        joined = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        grown: set[Pair] = set()
        for w in words_with.pop(best):
            before, after = words[w], join(words[w], best, joined)
            words[w] = after
            for pair in itertools.pairwise(before):
                pair_counts[pair] -= word_counts[w]
            for pair in itertools.pairwise(after):
                pair_counts[pair] += word_counts[w]
                words_with[pair].add(w)
                grown.add(pair)
        for pair in grown:
            heapq.heappush(queue, (-pair_counts[pair], pair))
        if progress and (len(tokens) - 256) % _REPORT_EVERY == 0:
            progress(len(tokens) - 256, merges)
    return tokens[256:]


def join(word: list[int], pair: Pair, joined: int) -> list[int]:
    """``word`` with every ``pair`` in it, from left to right, replaced by the token ``joined``."""
    result = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            result.append(joined)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return result


@functools.cache
def character_classes() -> bytes:
    """One byte for each code point: 1 letter, 2 number, 3 white space, 0 any other; as ``PIECES`` sees them."""
    characters = "".join(map(chr, range(0x110000)))
    classes = bytearray(len(characters))
    for number, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        for run in regex.finditer(pattern, characters):
            classes[run.start() : run.end()] = bytes([number]) * (run.end() - run.start())
    return bytes(classes)


def _without_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return replace_surrogates(text)
    return text


@functools.cache
def _native_trainer() -> Any:
    """The C++ trainer, or None (logged once) where the compiled module is missing."""
    try:
        from llmfast._C import BpeTrainer
    except ImportError:
        logger.warning("the compiled module llmfast._C is missing: training the tokenizer in Python, which is slower")
        return None
    return BpeTrainer
