"""What several verbs share: where output goes, and how a checkpoint is opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmfast.config import option
from llmfast.errors import UserError

if TYPE_CHECKING:
    import torch

    from llmfast.finetuning.prompts import PromptStyle
    from llmfast.nn import GPT
    from llmfast.tokenizer import Tokenizer

JSON_HELP = "print one JSON object on standard output, for programs"

FIELD_HELP = "the field of JSON records, and the column of parquet files, that holds the text"


def note(*words: object) -> None:
    """Something for the person at the terminal: standard error, so that standard output holds the answer alone.

    Of several ranks the first one speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        print(*words, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of the answer, at once."""
    print(text, end="", flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: list[tuple[str, object]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


def read_text(path: str | Path) -> str:
    """A UTF-8 file, ``-`` being standard input."""
    return utf8(sys.stdin.buffer.read(), "standard input") if str(path) == "-" else utf8(Path(path).read_bytes(), path)


def utf8(data: bytes, name: object) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


@dataclass
class ModelOptions:
    """Where and how the model runs."""

    checkpoint: str = field(metadata={"help": "a run (its best checkpoint), its checkpoints folder, or a checkpoint"})
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute type (auto: bfloat16 on GPUs that have it, else float32)"
    )
    backend: str = option(
        "auto", "kernels: auto, cuda, triton, cpp, torch, or per op: attention=triton,layer_norm=cuda"
    )
    threads: int | None = option(None, "CPU threads (default: one a core)")
    quantize: Literal["int8"] | None = option(
        None, "hold the weight matrices in int8, on a CPU: a quarter of the memory"
    )


@dataclass
class SamplingOptions(ModelOptions):
    """How text is written."""

    max_new_tokens: int = option(128, "most tokens to write")
    temperature: float = option(1.0, "0 takes the likeliest token always; higher is wilder")
    top_k: int | None = option(None, "choose among so many likeliest tokens")
    top_p: float | None = option(None, "choose among the likeliest tokens that together have this probability")
    seed: int | None = option(None, "the same seed writes the same text")
    stop_at_eot: bool = option(True, "stop where the model ends its text")
    stop: list[str] = field(default_factory=list, metadata={"help": "stop before any of these texts"})
    prompt_style: str | None = option(
        None,
        "take prompts for instructions, written as finetune instruct writes them in this style; none: go on from the "
        "text as it is (default: as the checkpoint was tuned)",
    )

    def sampling(self) -> dict[str, Any]:
        """The keyword arguments of ``llmfast.generation.generate``, checked."""
        from llmfast.generation.sampling import Sampling

        Sampling(self.temperature, self.top_k, self.top_p)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if "" in self.stop:
            raise UserError("a stop text is empty: leave it out to write without one")
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_at_eot", "stop")
        return {name: getattr(self, name) for name in names}


def chosen_style(name: str | None, checkpoint: Path) -> PromptStyle | None:
    """The prompt style called ``name``, else the one that ``checkpoint`` was tuned with; None for text as it is."""
    from llmfast.finetuning.prompts import prompt_style, style_of

    if name == "none":
        return None
    return style_of(checkpoint) if name is None else prompt_style(name)


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint's model, on its device and in evaluation mode."""

    path: Path
    model: GPT
    tokenizer: Tokenizer | None
    dtype: torch.dtype

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self.path} holds no tokenizer, so that it takes and gives token ids only; llmfast convert "
                f"{self.path} OUT --tokenizer NAME makes a copy that has one"
            )
        return self.tokenizer


@contextmanager
def open_model(options: ModelOptions, *, cast: bool, classifier: bool | None = False) -> Iterator[OpenModel]:
    """The model of ``options.checkpoint`` and its kernels; ``cast`` turns its weights to the compute type, too.

    ``UserError`` where it is a classifier and should write text, or the other way round; None takes both.
    """
    import torch

    from llmfast import ops
    from llmfast.checkpoint import find_checkpoint, load_model, load_tokenizer_of
    from llmfast.training.device import choose_device, choose_dtype

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.quantize and (device.type, dtype) != ("cpu", torch.float32):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"--quantize int8 runs on a CPU in float32, not on {device} in {kind}")
    check_backend(options.backend, device, dtype, loss=not cast)
    path = find_checkpoint(options.checkpoint)
    ops.tune_process(options.threads)
    with ops.use_backend(options.backend):
        model = load_model(path, device=device, dtype=dtype if cast else None)
        if classifier is not None and hasattr(model, "labels") != classifier:
            kind = (
                "no classifier: llmfast finetune classify makes one" if classifier else "a classifier: llmfast classify"
            )
            raise UserError(f"{path} is {kind}")
        if options.quantize and hasattr(model, "labels"):
            raise UserError("--quantize int8 is for models that write text, not for classifiers")
        if options.quantize:
            model = _quantized(model)
            ops.release_freed_memory()
        yield OpenModel(path, model, load_tokenizer_of(path), dtype)


def _quantized(model: GPT) -> GPT:
    from llmfast.nn.int8 import quantize_int8, weight_bytes

    small = quantize_int8(model)
    before, after = weight_bytes(model), weight_bytes(small)
    note(f"int8 weights: {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB")
    return small


def check_backend(name: str, device: torch.device, dtype: torch.dtype, *, loss: bool) -> None:
    """``UserError`` where a backend that is asked for cannot run the model's operations (and its loss) here."""
    from llmfast import ops
    from llmfast.ops._registry import OPS, current_setting

    with ops.use_backend(name):
        setting = current_setting()
    needed = ["layer_norm", "add_layer_norm", "causal_attention", "mlp", *(["linear_cross_entropy"] if loss else [])]
    for op in needed:
        if not OPS[op].resolve(setting, device, dtype):
            backend = setting.backend(op)
            why = "; ".join(OPS[op].reasons(device, dtype)[backend])
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"backend {backend} cannot run {op} in {kind} on {device}: {why}; see llmfast info")


def refuse_addresses(paths: list[str]) -> None:
    for path in paths:
        if "://" in path:
            raise UserError(f"{path} is an address: llmfast reads files, so download it first and name the file")
