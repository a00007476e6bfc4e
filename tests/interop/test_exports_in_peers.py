"""What llmfast writes, loaded by the programs whose formats these are."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from format_samples import SHAPE, TLFS, model

from llmfast import GPT, interop
from llmfast.errors import UserError
from llmfast.tokenizer import ByteTokenizer, train_bpe, train_char

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def peer(monkeypatch) -> Callable[[str, str], ModuleType]:
    """A module out of a peer's repository, found in a folder of it."""

    def imported(folder: str, name: str) -> ModuleType:
        if "LLMFAST_PEERS" not in os.environ:
            pytest.skip("LLMFAST_PEERS names no folder of peers' repositories")
        home = Path(os.environ["LLMFAST_PEERS"], folder)
        if not home.is_dir():
            pytest.skip(f"LLMFAST_PEERS has no {folder}")
        monkeypatch.syspath_prepend(str(home))
        return importlib.import_module(name)

    return imported


def exported(ours: GPT, folder: Path, to: str, **options) -> Path:
    ours.save_pretrained(folder / "saved")
    return interop.convert(folder / "saved", folder / "out", to, **options)


@torch.no_grad()
def assert_equal_logits(ours: GPT, theirs: torch.Tensor, ids: torch.Tensor) -> None:
    expected = ours(ids)[0]
    assert (theirs - expected).abs().max() <= 2e-5 * expected.abs().max()


HUGGING_FACE = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "no biases": dict(bias=False),
    "no QKV bias": dict(qkv_bias=False),
    "ReLU": dict(activation="relu"),
    "erf GELU": dict(activation="gelu"),
    "unscaled": dict(attn_scale=1.0),
    "another epsilon": dict(layer_norm_eps=1e-3),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_transformers_computes_the_same(transformers, tmp_path, ids, case):
    ours = model(**HUGGING_FACE[case], dropout=0.1)
    out = exported(ours, tmp_path, "hf")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.resid_pdrop == 0.1
    with torch.no_grad():
        assert_equal_logits(ours, theirs.eval()(ids).logits, ids)


@pytest.mark.parametrize("case", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_is_read(transformers, tmp_path, case, dtype):
    """One file, shards, pytorch_model.bin, the headless GPT2Model."""
    out = exported(model(**HUGGING_FACE[case]), tmp_path, "hf", dtype=dtype)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out, dtype=dtype)
    expected = GPT.from_pretrained(out).state_dict()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name, zipped in (("bin", True), ("old bin", False)):
        theirs.config.save_pretrained(tmp_path / name)
        file = tmp_path / name / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=zipped)
    for name in ("one", "shards", "bin", "old bin"):
        read = GPT.from_pretrained(tmp_path / name)
        assert read.config.tie_embeddings == (case == "tied"), name
        assert all(torch.equal(t, expected[key]) for key, t in read.state_dict().items()), name
    theirs.transformer.save_pretrained(tmp_path / "headless")
    if case == "tied":
        read = GPT.from_pretrained(tmp_path / "headless")
        assert all(torch.equal(t, expected[key]) for key, t in read.state_dict().items())
    else:
        with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
            GPT.from_pretrained(tmp_path / "headless")


TEXT = "The cat's 12 hats — naïve 😀 words,\n\n  and   spaces<|endoftext|> don't."


TOKENIZERS = {"byte": ByteTokenizer, "bpe": lambda: train_bpe([TEXT * 5], 290), "char": lambda: train_char([TEXT])}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_goes_along(transformers, tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    out = exported(model(vocab_size=tokenizer.vocab_size + 7), tmp_path, "hf", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = TEXT.replace("<|endoftext|>", "")  # special there, text here
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert settings.eos_token_id == tokenizer.eot_id
    (out / "llmfast_tokenizer.json").unlink()
    again = interop.load_tokenizer(out)
    assert again is not None
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_loads_its_file(peer, tmp_path, ids, bias):
    nanogpt = peer("nanoGPT", "model")
    ours = model(activation="gelu", bias=bias)
    content = torch.load(exported(ours, tmp_path, "nanogpt") / "ckpt.pt")
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**content["model_args"]))  # as sample.py does
    theirs.load_state_dict(content["model"])
    optimizer = theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(content["optimizer"])  # as train.py does with init_from=resume
    with torch.no_grad():
        assert_equal_logits(ours, theirs.eval()(ids, ids)[0], ids)


def test_a_compiled_nanogpts_prefix_and_extras_do_not_matter(tmp_path):
    ours = model(activation="gelu")
    file = exported(ours, tmp_path, "nanogpt") / "ckpt.pt"
    content = torch.load(file)
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    mask = torch.ones(13, 13).tril().view(1, 1, 13, 13)  # of its versions before PyTorch 2
    content["model"] |= {f"_orig_mod.transformer.h.{i}.attn.bias": mask for i in range(2)}
    torch.save(content, file)
    state = GPT.from_pretrained(file).state_dict()
    assert all(torch.equal(state[name], t) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("options", [{}, dict(qkv_bias=False, tie_embeddings=False)])
def test_the_books_model_loads_its_file(peer, tmp_path, ids, options):
    book = peer("LLMs-from-scratch/pkg", "llms_from_scratch.ch04")
    ours = model(**options)
    out = exported(ours, tmp_path, "book")
    config = json.loads((out / "config.json").read_text())
    theirs = book.GPTModel(config)
    theirs.load_state_dict(torch.load(out / "model.pth"))
    with torch.no_grad():
        assert_equal_logits(ours, theirs.eval()(ids), ids)


def test_train_llm_from_scratch_loads_its_file(peer, tmp_path, ids):
    Transformer = peer("train-llm-from-scratch", "src.models.transformer").Transformer
    ours = model(**TLFS)
    out = exported(ours, tmp_path, "tlfs")
    config = json.loads((out / "config.json").read_text())
    config["N_BLOCKS"] = config.pop("n_blocks")
    theirs = Transformer(**config)
    theirs.load_state_dict(torch.load(out / "transformer.pt")["model_state_dict"])
    with torch.no_grad():
        assert_equal_logits(ours, theirs.eval()(ids)[0], ids)


def test_between_the_gelus_there_is_a_warning_and_the_weights(tmp_path, caplog):
    ours = model()
    out = exported(ours, tmp_path, "nanogpt")
    assert "nanoGPT computes GELU's erf form, this model GELU's tanh form" in caplog.text
    back = GPT.from_pretrained(out)
    assert back.config == dataclasses.replace(ours.config, activation="gelu")
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in back.state_dict().items())


@pytest.mark.parametrize(
    ("options", "to", "said"),
    [
        (dict(tie_embeddings=False), "nanogpt", "tie_embeddings is False, and it has True only"),
        (dict(tie_embeddings=False), "llmc", "tie_embeddings is False, and it has True only"),
        (dict(activation="relu"), "book", "activation is relu, and it has gelu_tanh only"),
        (dict(), "tlfs", "activation is gelu_tanh, and it has relu only"),
        (dict(attn_scale="n_embd"), "hf", r"attn_scale is n_embd, and it has 1/sqrt\(head size\) only"),
        (dict(attn_out_proj=False), "llmc", "attn_out_proj is False, and it has True only"),
        (TLFS, "hf", "lm_head_bias is True, and it has False only"),
    ],
)
def test_what_a_program_cannot_hold_is_refused_and_nothing_written(tmp_path, options, to, said):
    with pytest.raises(UserError, match=f"cannot hold this model: {said}"):
        exported(model(**options), tmp_path, to)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
