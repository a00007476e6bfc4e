"""Token ids from a model, a batch of prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmfast.errors import UserError
from llmfast.generation import native
from llmfast.generation.sampling import Sampling, noise_generators
from llmfast.nn import GPT, KVCache
from llmfast.nn.int8 import Int8GPT


@dataclass
class Row:
    """One text in the making: ``tokens`` are prompt and new ids, of which the model sees those from ``start`` on."""

    index: int
    tokens: list[int]
    noise: torch.Generator
    start: int
    new: list[int] = field(default_factory=list)

    def slide(self, block_size: int) -> bool:
        """Make room in a window that has outgrown the context: keep its newer half. True where it had to.

        Half a context is read again every half context, so that the cost of a token does not grow with the text.
        """
        if len(self.tokens) - self.start <= block_size:
            return False
        self.start = len(self.tokens) - (block_size + 1) // 2
        return True

    @property
    def window(self) -> list[int]:
        return self.tokens[self.start :]


def generate_ids(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eot_id: int | None = None,
    vocab_size: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt by at most ``max_new_tokens`` ids; returns the new ids only.

    ``temperature`` 0 is greedy; else see ``Sampling``. A ``seed`` fixes the result, row by row, whatever else is in
    the batch. A row ends before ``eot_id``, or where ``on_token(row, id)`` returns True. Ids from ``vocab_size`` on
    (padding of the vocabulary) are never chosen. Past the context length the window slides: its newer half is read
    again, and positions count from there. ``use_cache=False`` recomputes every window: slow, the same ids.
    Raises ``UserError`` for an argument out of range, an empty prompt or an id outside the model's vocabulary.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be a whole number, 0 or more, got {max_new_tokens!r}")
    config = model.config
    if vocab_size is not None and not 1 <= vocab_size <= config.vocab_size:
        raise UserError(f"vocab_size must lie in 1 .. {config.vocab_size} (the model's), got {vocab_size}")
    texts = [[int(token) for token in prompt] for prompt in prompts]
    for number, prompt in enumerate(texts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one token, such as the end-of-text id")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {number} has an id outside the model's vocabulary of {config.vocab_size}")
    noise = noise_generators(texts, seed if temperature else 0)  # greedy choice draws nothing
    rows = [
        Row(number, prompt, noise[number], max(0, len(prompt) - config.block_size))
        for number, prompt in enumerate(texts)
    ]
    if rows and max_new_tokens:
        with torch.inference_mode(), evaluating(model):
            reader = CachedReader(model, rows, max_new_tokens) if use_cache else Reader(model)
            active = list(rows)
            while active:
                logits = reader.read(active)[:, :vocab_size]
                chosen = sampling.choose(logits, [row.noise for row in active])
                # From the back, so that a dropped row's place is filled by one that is done with this step.
                for place in reversed(range(len(active))):
                    row, token = active[place], chosen[place]
                    ended = token == eot_id
                    if not ended:
                        row.tokens.append(token)
                        row.new.append(token)
                        ended = bool(on_token and on_token(row.index, token)) or len(row.new) == max_new_tokens
                    if ended:
                        reader.drop(place)
                        active[place] = active[-1]
                        active.pop()
    return [row.new for row in rows]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Reader:
    """Reads every row's whole window at each step."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def read(self, rows: list[Row]) -> Tensor:
        """Logits (N, V) of the rows' last tokens."""
        for row in rows:
            row.slide(self.model.config.block_size)
        return self.model.lm_head(self._read_windows([row.window for row in rows], None))

    def drop(self, place: int) -> None:
        """Forget the row at ``place``; the last one takes its place."""

    def _read_windows(self, windows: list[list[int]], cache: KVCache | None) -> Tensor:
        """Hidden states (N, C) of the windows' last tokens."""
        # Padding stands on the right, where no causal query of the window itself sees it.
        width, device = max(map(len, windows)), self.model.transformer.wpe.weight.device
        idx = torch.tensor([w + [0] * (width - len(w)) for w in windows], device=device)
        last = torch.tensor([len(w) - 1 for w in windows], device=device)
        hidden = self.model.hidden_states(idx, cache=cache)
        if cache is not None:
            cache.set_lengths([len(w) for w in windows])
        return hidden[torch.arange(len(windows), device=device), last]


class CachedReader(Reader):
    """Reads each token once, and a window again only where it slides."""

    def __init__(self, model: GPT, rows: list[Row], max_new_tokens: int) -> None:
        super().__init__(model)
        weight = model.transformer.wpe.weight
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif isinstance(model, Int8GPT):
            dtype = torch.bfloat16  # int8 weights are read so fast that float32 keys and values would cost as much
        self.cache = KVCache(
            model.config,
            len(rows),
            min(model.config.block_size, max(len(row.tokens) for row in rows) + max_new_tokens),
            device=weight.device,
            dtype=dtype,
        )
        self.native = native.step_of(model, len(rows), max_new_tokens)

    def read(self, rows: list[Row]) -> Tensor:
        cache, block_size = self.cache, self.model.config.block_size
        read = [0 if row.slide(block_size) else n for row, n in zip(rows, cache.lengths, strict=True)]
        lengths = [len(row.tokens) - row.start - 1 for row in rows]
        if not any(read):
            cache.set_lengths(read)
            logits = self._read_prompts([row.window for row in rows])
            if logits is not None:
                return logits
        else:
            for place, row in enumerate(rows):
                if read[place] < lengths[place]:  # it slid: its window is read again, up to the last token
                    self._read_windows([row.window[:-1]], cache.row(place))
        cache.set_lengths(lengths)
        tokens = [row.tokens[-1] for row in rows]
        if self.native is not None:
            return self.native(tokens, cache)
        idx = torch.tensor(tokens, device=cache.storage.device)[:, None]
        return self.model.lm_head(self.model.hidden_states(idx, cache=cache)[:, 0])

    def _read_prompts(self, windows: list[list[int]]) -> Tensor | None:
        """Fill the empty cache. Logits of the last tokens, or None where these are left to the native step."""
        width = max(map(len, windows)) - 1
        if self.native is not None and width <= self.native.short_prompt:
            for t in range(width):  # a shorter window is padded, as in a forward pass
                self.native([window[t] if t < len(window) else 0 for window in windows], self.cache)
        elif self.native is not None and isinstance(self.model, Int8GPT):  # a step is faster than the pass's head
            self._read_windows([window[:-1] for window in windows], self.cache)
        else:
            return self.model.lm_head(self._read_windows(windows, self.cache))
        return None

    def drop(self, place: int) -> None:
        self.cache.drop(place)
