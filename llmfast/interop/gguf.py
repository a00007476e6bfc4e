"""GPT to GGUF, the model file of llama.cpp and Ollama, and a Modelfile for ``ollama create``.

llmfast's models are llama.cpp's architecture "gpt2" (its src/models/gpt2.cpp): learned positions, pre-norm, biases
everywhere, tanh GELU, scores scaled by 1/sqrt(head size). What that graph lacks is mapped where the result is the same
(no bias: zeros; no output projection: the identity; another score scale: folded into the queries) and refused where
it is not. The `gguf` package writes and reads the file.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.interop.target import need
from llmfast.nn import GPT
from llmfast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from llmfast.tokenizer.gpt2 import written

DType = Literal["f32", "f16", "bf16", "q8_0"]

_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_FLOAT16_MAX = 65_504.0


def write_gguf(
    model: GPT, tokenizer: Tokenizer | None, path: str | Path, *, dtype: DType = "f32", progress: bool = False
) -> Path:
    """Write ``model`` and ``tokenizer`` as a GGUF file, and a Modelfile for Ollama beside it; returns the file.

    ``path``: a file that ends in .gguf, or a folder, which then holds model.gguf. ``dtype`` is that of the matrices;
    vectors and positions are always float32. Rows of the vocabulary that the tokenizer has no id for are left out,
    as ``generate`` never chooses them. Without a tokenizer the file takes and gives ids, and there is no Modelfile.
    Raises ``UserError`` for a model or tokenizer that llama.cpp cannot compute exactly, or where the gguf package is
    missing; ``ValueError`` for an unknown dtype.
    """
    if dtype not in get_args(DType):
        raise ValueError(f"dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}")
    return _write(model.config, model.state_dict(), Path(path), tokenizer, dtype, progress)


def write(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None) -> None:
    """model.gguf in ``folder``, its matrices in the type that the weights have: what ``llmfast convert`` calls."""
    dtypes: dict[torch.dtype, DType] = {torch.bfloat16: "bf16", torch.float16: "f16"}
    _write(config, weights, folder, tokenizer, dtypes.get(weights["transformer.wte.weight"].dtype, "f32"))


def _write(
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    path: Path,
    tokenizer: Tokenizer | None,
    dtype: DType,
    progress: bool = False,
) -> Path:
    gguf = _package()
    file = path if path.suffix == ".gguf" else path / "model.gguf"
    modelfile = file.with_name("Modelfile")
    if tokenizer is not None:
        _check_modelfile(modelfile, file)
    _refuse(config, tokenizer)
    rows = config.vocab_size if tokenizer is None else tokenizer.vocab_size
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, "gpt2")
        _add_settings(gguf, writer, config, rows, file.stem, dtype)
        _add_tokenizer(gguf, writer, tokenizer)
        try:
            _write_tensors(gguf, writer, lambda: _tensors(config, weights, rows), dtype, progress)
        finally:
            writer.close()
        os.replace(partial, file)
        if tokenizer is not None:
            modelfile.write_text(_modelfile(file, config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or file}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return file


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF takes the gguf package: pip install 'llmfast[gguf]'") from None
    return gguf


def _refuse(config: GPTConfig, tokenizer: Tokenizer | None) -> None:
    need(config, "llama.cpp's gpt2 architecture", activation="gelu_tanh", lm_head_bias=False)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: not its own")


def _add_settings(gguf: ModuleType, writer: Any, config: GPTConfig, rows: int, name: str, dtype: DType) -> None:
    types = gguf.LlamaFileType
    file_types = {
        "f32": types.ALL_F32,
        "f16": types.MOSTLY_F16,
        "bf16": types.MOSTLY_BF16,
        "q8_0": types.MOSTLY_Q8_0,
    }
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _add_tokenizer(gguf: ModuleType, writer: Any, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    if isinstance(tokenizer, CharTokenizer):
        # The longest match over UTF-8, which no character's bytes begin like another's, is one id a character.
        # Unlike the kinds that take BPE tokens, this one has no end of text unless it is given.
        writer.add_tokenizer_model("rwkv")
        tokens = [_escaped(character) for character in tokenizer.characters]
    else:
        pairs = tokenizer.merges() if isinstance(tokenizer, BPETokenizer) else []
        merges = [f"{written(left)} {written(right)}" for left, right in pairs]
        tokens = [written(token) for token in tokenizer.token_bytes()]
        eot = tokenizer.eot_id
        assert eot is not None  # bytes and byte pairs have one
        tokens[eot] = next(iter(tokenizer.special_tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        # llama.cpp wants a list that is not empty; a special token never takes part in a merge.
        writer.add_token_merges(merges or [f"{tokens[eot]} {tokens[eot]}"])
        writer.add_bos_token_id(eot)
        writer.add_eos_token_id(eot)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
    specials = set(tokenizer.special_tokens.values())
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in specials else normal for i in range(len(tokens))])


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return f"\\x{ord(character):02x}" if ord(character) < 0x20 else character


def _write_tensors(
    gguf: ModuleType, writer: Any, tensors: Callable[[], Iterator[tuple[str, Tensor]]], dtype: DType, progress: bool
) -> None:
    """The header, then one tensor after the other, so that no copy of the model is held."""
    total = 0
    for name, tensor in tensors():
        kind = _kind(gguf, name, tensor, dtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        total += (nbytes := tensor.numel() // block * size)
        writer.add_tensor_info(name, tuple(tensor.shape), tensor.numpy().dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for name, tensor in tensors():
            values = _stored(gguf, name, tensor, _kind(gguf, name, tensor, dtype))
            writer.write_tensor_data(values)
            bar.update(values.nbytes)


def _kind(gguf: ModuleType, name: str, tensor: Tensor, dtype: DType) -> Any:
    types = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or name == "position_embd.weight":
        return types.F32
    if dtype == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16  # rows that whole blocks do not fill, as llama.cpp's own converter has it
    return types[dtype.upper()]


def _stored(gguf: ModuleType, name: str, tensor: Tensor, kind: Any) -> Any:
    types = gguf.GGMLQuantizationType
    if kind == types.BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind == types.F16:
        largest = float(tensor.abs().max())
        if _FLOAT16_MAX < largest < math.inf:
            raise UserError(f"{name} holds {largest:.4g}, beyond float16: write f32 or bf16")
        return tensor.to(torch.float16).numpy()
    return gguf.quants.quantize(tensor.numpy(), kind)


@torch.no_grad()
def _tensors(config: GPTConfig, weights: Mapping[str, Tensor], rows: int) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors: (name, contiguous float32 values on the CPU; views of the model's where they can be)."""
    width, left = config.n_embd, set(weights)
    factor = config.softmax_scale * config.head_size**0.5
    if config.tie_embeddings:
        left.discard("lm_head.weight")
    for ours, theirs in _names(config).items():
        absent = theirs.endswith("attn_output") and not config.attn_out_proj
        weight = torch.eye(width) if absent else weights[f"{ours}.weight"]
        parts = {"weight": weight[:rows] if theirs in ("token_embd", "output") else weight}
        if theirs not in ("token_embd", "position_embd", "output"):
            parts["bias"] = weights[f"{ours}.bias"] if f"{ours}.bias" in left else torch.zeros(len(weight))
        left -= {f"{ours}.weight", f"{ours}.bias"}
        for part, tensor in parts.items():
            tensor = tensor.to("cpu", torch.float32)
            if theirs.endswith("attn_qkv") and not math.isclose(factor, 1.0):
                tensor = torch.cat([tensor[:width] * factor, tensor[width:]])
            yield f"{theirs}.{part}", tensor.contiguous()
    if left:
        raise UserError(f"GGUF has no place for {min(left)}: merge adapters into the model first")


def _names(config: GPTConfig) -> dict[str, str]:
    """Our modules' names and llama.cpp's, in the order of the file."""
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd"}
    for i in range(config.n_layer):
        names |= {f"transformer.h.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    return names | {"transformer.ln_f": "output_norm"} | ({} if config.tie_embeddings else {"lm_head": "output"})


def _check_modelfile(modelfile: Path, file: Path) -> None:
    """``UserError`` where a Modelfile of another model is in the way."""
    if modelfile.exists() and not modelfile.read_text(encoding="utf-8", errors="replace").startswith(_from(file)):
        raise UserError(f"{modelfile} is there already and not for {file.name}: write into a folder of its own")


def _from(file: Path) -> str:
    return f"FROM ./{file.name}\n"


def _modelfile(file: Path, config: GPTConfig) -> str:
    # Ollama's usual context is longer than the table of positions, which has no row beyond it.
    return f'{_from(file)}TEMPLATE """{{{{ .Prompt }}}}"""\nPARAMETER num_ctx {config.block_size}\n'
