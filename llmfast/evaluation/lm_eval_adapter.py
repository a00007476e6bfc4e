"""llmfast's models in EleutherAI's lm-evaluation-harness (extra ``eval``).

    python -m llmfast.evaluation.lm_eval_adapter run --model llmfast --model_args checkpoint=DIR --tasks hellaswag

is the harness's own command with a model called ``llmfast``; in Python, ``LlmfastLM(model, tokenizer)`` goes to
``lm_eval.simple_evaluate(model=...)``.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from llmfast.checkpoint import find_checkpoint, load_model, load_tokenizer_of
from llmfast.errors import UserError
from llmfast.evaluation.likelihood import encode_pair, log_likelihoods
from llmfast.generation import generate
from llmfast.nn import GPT
from llmfast.tokenizer import Tokenizer
from llmfast.training.device import choose_device, choose_dtype

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"the adapter takes lm-evaluation-harness: pip install 'llmfast[eval]' ({error})") from None

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("llmfast")
class LlmfastLM(TemplateLM):
    """A ``GPT`` and its tokenizer as the harness sees a model.

    ``--model_args`` are the arguments of ``from_checkpoint``: ``checkpoint=DIR,dtype=bfloat16``.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, batch_size: int = 8, max_gen_toks: int = 256) -> None:
        super().__init__()
        if tokenizer.eot_id is None:
            raise UserError(f"the harness takes an end-of-text token, and this {tokenizer.kind} tokenizer has none")
        self.model, self.tokens = model, tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._device = next(model.parameters()).device

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_gen_toks: int = 256,
    ) -> LlmfastLM:
        """The model of a run or checkpoint, its weights in the compute type ``dtype``."""
        place = choose_device(device or "auto")
        path = find_checkpoint(checkpoint)
        tokenizer = load_tokenizer_of(path)
        if tokenizer is None:
            raise UserError(f"{path} holds no tokenizer, which the harness takes")
        model = load_model(path, device=place, dtype=choose_dtype(dtype, place))
        return cls(model, tokenizer, batch_size=_batch_size(batch_size), max_gen_toks=int(max_gen_toks))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        known = {"checkpoint", "device", "dtype", "batch_size", "max_gen_toks"}
        more = {k: v for k, v in (additional_config or {}).items() if v is not None and k in known}
        return cls.from_checkpoint(**{**arg_dict, **more})

    @property
    def eot_token_id(self) -> int:
        assert self.tokens.eot_id is not None
        return self.tokens.eot_id

    @property
    def max_length(self) -> int:
        return self.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        return f"llmfast-{self.tokens.kind}-{self.tokens.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokens.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.tokens, context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found = log_likelihoods(self.model, [(c, e) for _, c, e in requests], self.batch_size, progress=bar.update)
        for (texts, _, _), one in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            counts.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = []
        for request, first, last in zip(requests, [0, *counts], counts, strict=False):
            totals.append(sum(scores[first:last]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                options = self._sampling(requests[numbers[0]].args[1])
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    prompts = [self._fit(requests[n].args[0], options["max_new_tokens"]) for n in batch]
                    for number, text in zip(batch, generate(self.model, self.tokens, prompts, **options), strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return texts

    def _sampling(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation options as those of ``generate``; an unknown one is an error."""
        known = normalize_gen_kwargs(asked, self.max_gen_toks)
        options = {
            "max_new_tokens": known.pop("max_gen_toks"),
            "temperature": known.pop("temperature", 1.0 if known.pop("do_sample", False) else 0.0),
            "stop": [text for text in known.pop("until") or [] if text],
            "seed": known.pop("seed", None),
        }
        options |= {name: known.pop(name) for name in ("top_k", "top_p") if name in known}
        known.pop("do_sample", None)  # the temperature says it
        if known:
            raise UserError(f"generation option {min(known)!r} is not one that llmfast knows")
        return options

    def _fit(self, prompt: str, new_tokens: int) -> str:
        """The end of ``prompt`` that leaves room for the new tokens, where the model has so much."""
        room = max(self.max_length - new_tokens, self.max_length // 2, 1)
        ids = self.tokens.encode(prompt)
        return prompt if len(ids) <= room else self.tokens.decode(ids[-room:])


def _batch_size(value: int | str | None) -> int:
    try:
        return max(int(value or 8), 1)
    except ValueError:
        return 8  # "auto"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
