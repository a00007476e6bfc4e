"""GGUF files: what the gguf package reads back, what Ollama is told, and what llama.cpp makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from llmfast import GPT, GPTConfig
from llmfast.errors import UserError
from llmfast.generation import generate_ids
from llmfast.interop import gguf as gguf_writer
from llmfast.interop.gguf import write_gguf
from llmfast.tokenizer import BPETokenizer, load_tokenizer, train_bpe, train_char

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

TEXT = "The cat sat on the mat; l'été, naïve 😀 said 'twas 1,234 o'clock.\n\n  And then?\tIt's \\n over.\r\n"
TINY = GPTConfig(vocab_size=300, block_size=48, n_layer=2, n_head=2, n_embd=64)
VARIANTS = {
    "gpt2": {},
    "untied": dict(tie_embeddings=False),
    "no bias": dict(bias=False),
    "no qkv bias": dict(qkv_bias=False, tie_embeddings=False),
    "no output projection": dict(attn_out_proj=False, bias=False),
    "scale 1/sqrt(width)": dict(attn_scale="n_embd"),
    "scale 0.3": dict(attn_scale=0.3, qkv_bias=False),
}


def random_model(**options) -> GPT:
    """A model whose every parameter counts, biases and norms too."""
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(TINY, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model


def bpe(size: int = 300):
    return train_bpe([TEXT * 9], size)


def read(path: Path):
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_gguf_package_reads_the_same_tensors(tmp_path, dtype):
    model = random_model(tie_embeddings=False)
    _, tensors = read(write_gguf(model, None, tmp_path / "m.gguf", dtype=dtype))
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, TINY.n_layer)
    rounded = {"f16": torch.float16, "bf16": torch.bfloat16}
    for name, value in model.state_dict().items():
        found = tensors.pop(theirs.get_name(name, try_suffixes=(".weight", ".bias")))
        assert found.shape.tolist() == list(value.shape)[::-1]  # ggml counts from the innermost
        plain = value.dim() == 1 or "wpe" in name
        assert found.tensor_type.name == ("F32" if plain else dtype.upper())
        data = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type)).reshape(value.shape)
        if plain or dtype in ("f32", "f16", "bf16"):
            assert torch.equal(data, value if plain or dtype == "f32" else value.to(rounded[dtype]).float())
        else:
            blocks = value.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert ((data.reshape(-1, 32) - blocks).abs() <= step * 0.57).all()  # the step is a float16
    assert not tensors


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_weights_in_a_mapping_keep_their_type(tmp_path, dtype, kind):
    model = random_model().to(dtype)
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    gguf_writer.write(model.config, state, tmp_path, None)
    _, tensors = read(tmp_path / "model.gguf")
    found = tensors["token_embd.weight"]
    assert found.tensor_type.name == kind
    data = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
    assert torch.equal(data, state["transformer.wte.weight"].float())


def test_rows_that_blocks_do_not_fill_stay_f16(tmp_path):
    model = GPT(dataclasses.replace(TINY, n_embd=40))
    _, tensors = read(write_gguf(model, None, tmp_path / "m.gguf", dtype="q8_0"))
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_qkv.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_the_settings_are_llama_cpps(tmp_path):
    tokenizer = bpe()
    config = dataclasses.replace(TINY, layer_norm_eps=1e-4, vocab_size=tokenizer.vocab_size)
    fields, _ = read(write_gguf(GPT(config), tokenizer, tmp_path / "m.gguf", dtype="f16"))
    eot = tokenizer.vocab_size - 1
    expected = {
        "general.architecture": "gpt2",
        "general.name": "m",
        "general.file_type": 1,
        "gpt2.vocab_size": tokenizer.vocab_size,
        "gpt2.context_length": 48,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 256,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-4),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": eot,
        "tokenizer.ggml.bos_token_id": eot,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.token_type": [1] * eot + [3],
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["tokenizer.ggml.tokens"][eot] == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_file_holds_all_that_the_tokenizer_knows(tmp_path, kind):
    """Its tokens and merges, in an independent BPE, give our ids."""
    tokenizer = load_tokenizer(kind) if kind == "byte" else bpe()
    model = GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, n_embd=2))
    fields, _ = read(write_gguf(model, tokenizer, tmp_path / "m.gguf"))
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    merges = [pair for pair in merges if "<|endoftext|>" not in pair]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "byte")
    for text in (TEXT, "", "\0\x01 \xa0  x", "don't <|endoftext|> stop"):
        assert peer.encode(text).ids == tokenizer.encode(text)


def test_rows_without_an_id_are_left_out(tmp_path):
    tokenizer = bpe(280)
    model = random_model(tie_embeddings=False)
    _, tensors = read(write_gguf(model, tokenizer, tmp_path / "m.gguf"))
    for theirs, ours in (("token_embd", model.transformer.wte), ("output", model.lm_head)):
        assert np.array_equal(tensors[f"{theirs}.weight"].data, ours.weight[: tokenizer.vocab_size].detach().numpy())


def test_a_modelfile_is_written_beside_it_and_no_other_one_touched(tmp_path):
    tokenizer = load_tokenizer("byte")
    model = GPT(TINY)
    assert write_gguf(model, tokenizer, tmp_path / "folder") == tmp_path / "folder" / "model.gguf"
    modelfile = tmp_path / "folder" / "Modelfile"
    expected = 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 48\n'
    assert modelfile.read_text(encoding="utf-8") == expected
    write_gguf(model, tokenizer, tmp_path / "folder")  # again, over the old one
    with pytest.raises(UserError, match="is there already and not for other"):
        write_gguf(model, tokenizer, tmp_path / "folder" / "other.gguf")
    write_gguf(model, None, tmp_path / "ids" / "m.gguf")
    assert [path.name for path in (tmp_path / "ids").iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(activation="relu"), "activation is relu, and it has gelu_tanh only"),
        (dict(lm_head_bias=True), "lm_head_bias is True, and it has False only"),
        (dict(vocab_size=200), "the tokenizer has 257 ids, the model 200"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, options, said):
    model = GPT(dataclasses.replace(TINY, **options))
    with pytest.raises(UserError, match=said):
        write_gguf(model, load_tokenizer("byte"), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_mistakes_leave_nothing_behind(tmp_path, monkeypatch):
    model = GPT(TINY)
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16, q8_0, got 'int4'"):
        write_gguf(model, None, tmp_path / "m.gguf", dtype="int4")
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"token_embd.weight holds 1e\+06, beyond float16"):
        write_gguf(model, None, tmp_path / "m.gguf", dtype="f16")
    model.transformer.h[1].mlp.c_fc.lora_A = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=r"no place for transformer.h.1.mlp.c_fc.lora_A: merge adapters"):
        write_gguf(model, None, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"takes the gguf package: pip install 'llmfast\[gguf\]'"):
        write_gguf(model, None, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot write"):
        write_gguf(GPT(TINY), None, tmp_path / "file" / "m.gguf")


def random_texts(count: int) -> list[str]:
    """Words, contractions, white space and characters of many scripts, in any order."""
    rng = random.Random(5)
    blocks = [(0x20, 0x7F), (0, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x1E00, 0x2C00), (0x3000, 0x3100)]
    blocks += [(0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFF00), (0x1D400, 0x1D800), (0x1F300, 0x1F650)]
    words = [
        " the",
        "don't",
        "'ll",
        "'RE",
        "''s",
        "3.14",
        " 12",
        "\n\n",
        "   ",
        " \t",
        "\u3000 ",
        "...",
        " (",
        "é",
        "e\u0301",
    ]

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        block = rng.choice(blocks)
        letters = (chr(rng.randrange(*block)) for _ in range(rng.randrange(1, 5)))
        return "".join(letter for letter in letters if unicodedata.category(letter) != "Cn")

    return ["".join(piece() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


# What llama.cpp makes of it, where llama-cpp-python is installed


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def open_llama(llama_cpp, path: Path, **options):
    """The file in llama.cpp, with a float32 cache, as ours is."""
    return llama_cpp.Llama(
        str(path), n_ctx=0, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False, **options
    )


def logits_of(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(np.array(llama.scores[: len(ids)]))


def greedy(llama, ids: list[int], count: int) -> list[int]:
    llama.reset()
    made: list[int] = []
    for token in llama.generate(list(ids), temp=0.0, repeat_penalty=1.0, top_k=1):
        made.append(token)
        if len(made) == count:
            return made
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits(llama_cpp, tmp_path, variant, one_thread):
    model = random_model(**VARIANTS[variant])
    llama = open_llama(llama_cpp, write_gguf(model, None, tmp_path / "m.gguf"), logits_all=True)
    ids = random.Random(0).choices(range(300), k=40)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0][0]
    theirs = logits_of(llama, ids)
    # llama.cpp looks GELU up in a table of float16.
    assert (ours - theirs).abs().max() < 3e-3 * ours.abs().max()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model that has learnt a text by heart, and its tokenizer."""
    from llmfast.config import TrainConfig
    from llmfast.data import open_tokens, prepare
    from llmfast.training import Trainer

    home = tmp_path_factory.mktemp("trained")
    (home / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    prepare([home / "text.txt"], home / "shards", tokenizer=train_bpe([TEXT * 40], 320), progress=False)
    source = open_tokens(home / "shards")
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, vocab_size=source.tokenizer.vocab_size))
    config = TrainConfig(
        out=str(home / "run"), max_steps=150, micro_batch_size=8, learning_rate=3e-3, warmup_steps=10, eval_every=0,
        sample_every=0, save_every=0, threads=1, device="cpu",
    )  # fmt: skip
    Trainer(model, config, source, tokenizer=source.tokenizer, progress=False).fit()
    return model.eval(), source.tokenizer


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_writes_the_same_text_token_for_token(llama_cpp, trained, tmp_path, dtype, one_thread):
    model, tokenizer = trained
    llama = open_llama(llama_cpp, write_gguf(model, tokenizer, tmp_path / "m.gguf", dtype=dtype))
    prompt = "The cat sat"
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(prompt)
    (ours,) = generate_ids(model, [ids], max_new_tokens=40, temperature=0.0)
    assert greedy(llama, ids, 40) == ours
    assert llama.detokenize(ours).decode("utf-8", "replace") == tokenizer.decode(ours)
    assert tokenizer.decode(ours) in TEXT * 2  # it has learnt something


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte", "char"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(llama_cpp, tmp_path, kind, request):
    texts = [*random_texts(2000), TEXT, "don't <|endoftext|> stop", "  \n\n x  "]
    if kind == "gpt2":
        tokenizer = request.getfixturevalue("gpt2")
    elif kind == "char":
        texts = [text.replace("\0", "") for text in texts]
        tokenizer = train_char([*texts, "\0"])
    else:
        tokenizer = load_tokenizer("byte") if kind == "byte" else bpe()
    model = GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    llama = open_llama(llama_cpp, write_gguf(model, tokenizer, tmp_path / "m.gguf"))
    for text in texts:
        data = text.encode()
        ids = llama.tokenize(data, add_bos=False, special=False) if data else []
        assert ids == tokenizer.encode(text), repr(text)
        assert llama.detokenize(ids) == data
    assert (llama.token_eos() if kind != "char" else None) == tokenizer.eot_id


def test_llama_cpp_splits_text_as_the_tokenizer_does(llama_cpp, tmp_path):
    """Merges of an ASCII letter, digit, mark or space with the character behind it show which characters it takes for
    letters, numbers, space and others."""
    bytes_ = [bytes([byte]) for byte in range(256)]
    tokenizer = BPETokenizer([*bytes_, *(bytes([first, byte]) for first in b"a1! \n" for byte in range(0x80, 0x100))])
    model = GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    llama = open_llama(llama_cpp, write_gguf(model, tokenizer, tmp_path / "m.gguf"))
    # Characters that every library's Unicode knows; llama.cpp does not have those of Unicode 16 yet.
    known = [chr(i) for i in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs")]
    sample = known[:3000] + random.Random(1).sample(known[3000:], 3000)
    for i in range(0, len(sample), 500):
        text = "".join(f"a{c}|1{c}|!{c}| {c}|\n{c}|{c}{c}x" for c in sample[i : i + 500])
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


def test_llama_cpp_continues_the_shared_checkpoint_as_hugging_face_does(llama_cpp, tmp_path, one_thread):
    folder = os.environ.get("LLMFAST_TEST_CHECKPOINTS")
    if not folder:
        pytest.skip("LLMFAST_TEST_CHECKPOINTS names no folder of checkpoints")
    from safetensors.torch import load_file

    values = json.loads(Path(folder, "hf-gpt2/config.json").read_text(encoding="utf-8"))
    shape = {name: values[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(block_size=values["n_positions"], **shape)).eval()
    stored = load_file(Path(folder, "hf-gpt2/model.safetensors"))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: tensor.T if name.endswith(conv1d) else tensor for name, tensor in stored.items()}
    model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    expected = np.load(Path(folder, "hf-gpt2.expected.npz"))
    llama = open_llama(llama_cpp, write_gguf(model, None, tmp_path / "m.gguf"), logits_all=True)
    logits = logits_of(llama, expected["input_ids"][0].tolist())
    assert (logits - torch.from_numpy(expected["logits"][0])).abs().max() < 1e-2
    (continued,) = expected["greedy"].tolist()
    assert continued[:8] + greedy(llama, continued[:8], len(continued) - 8) == continued
