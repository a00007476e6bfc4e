"""Text from a model: prompts in, completions out, streamed while they grow."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from llmfast.errors import UserError
from llmfast.generation.decoding import generate_ids
from llmfast.nn import GPT
from llmfast.tokenizer import Tokenizer

Prompts = TypeVar("Prompts", str, list[Any])


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_at_eot: bool = True,
    stop: Sequence[str] = (),
    stream: Callable[..., Any] | None = None,
    use_cache: bool = True,
) -> Prompts:
    """Continue one text, or each of a list of texts or token ids; returns the completions without the prompts.

    A completion ends after ``max_new_tokens``, before the end-of-text token (unless ``stop_at_eot`` is False) or
    before the first of the strings ``stop``. ``stream`` is called with each new piece of text: ``stream(piece)`` for
    one prompt, ``stream(index, piece)`` for a list. Pieces never split a character, and joined they are the
    completion. An empty prompt starts from the end-of-text token. The other options are those of ``generate_ids``.
    Raises ``UserError`` for an argument out of range, and for a tokenizer that does not fit the model.
    """
    listed = [prompts] if isinstance(prompts, str) else prompts
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    stop = [stop] if isinstance(stop, str) else list(stop)
    if "" in stop:
        raise UserError("a stop string is empty: leave it out to generate without one")
    completions = [
        Completion(tokenizer, stop, stream if stream is None or listed is not prompts else partial(stream, index))
        for index in range(len(listed))
    ]
    generate_ids(
        model,
        [_encode_prompt(tokenizer, prompt) for prompt in listed],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eot_id=tokenizer.eot_id if stop_at_eot else None,
        vocab_size=tokenizer.vocab_size,
        on_token=lambda index, token: completions[index].add(token),
        use_cache=use_cache,
    )
    results = [completion.finish() for completion in completions]
    return results[0] if isinstance(prompts, str) else results


def _encode_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if ids:
        return ids
    if tokenizer.eot_id is None:
        raise UserError(f"an empty prompt needs an end-of-text token, and this {tokenizer.kind} tokenizer has none")
    return [tokenizer.eot_id]


class Completion:
    """The text of one row while it grows.

    Held back are bytes that do not make a whole character yet, and text that a stop string may begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str], emit: Callable[[str], Any] | None) -> None:
        self.tokenizer, self.stop, self.emit = tokenizer, stop, emit
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pieces: list[str] = []
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> bool:
        """Append a token; True where a stop string ends the text."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ends = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if ends:
            self.stopped = True
            self._release(min(ends))
            self.held = ""
        else:
            self._release(len(self.held) - max((self._overlap(s) for s in self.stop), default=0))
        return self.stopped

    def finish(self) -> str:
        """The whole text; what was held back and is no stop string comes out."""
        if not self.stopped:
            self.held += self.decoder.decode(b"", final=True)
            self._release(len(self.held))
        return "".join(self.pieces)

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that ``stop`` begins with."""
        return next((n for n in range(min(len(stop), len(self.held)), 0, -1) if self.held.endswith(stop[:n])), 0)

    def _release(self, length: int) -> None:
        piece, self.held = self.held[:length], self.held[length:]
        if piece:
            self.pieces.append(piece)
            if self.emit is not None:
                self.emit(piece)
