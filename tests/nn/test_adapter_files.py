"""Adapters on disk: PEFT's own format, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmfast.checkpoint import load_model
from llmfast.config import GPTConfig, LoRAConfig
from llmfast.errors import UserError
from llmfast.nn import GPT, GPTForClassification, add_lora, load_adapter, lora_state_dict, save_adapter
from llmfast.nn.lora import lora_layers

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=24)
IDX = torch.randint(0, 61, (3, 13), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "as PEFT": LoRAConfig(r=4, alpha=8),
    "one each for q, k and v": LoRAConfig(r=3, alpha=5, split_qkv=True),
    "attention alone": LoRAConfig(r=2, alpha=1, targets=("c_attn", "attn.c_proj")),
    "one layer": LoRAConfig(r=2, targets=("transformer.h.1.mlp.c_fc",)),
}


def tiny(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, **options})).eval()


def stir(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, 0.0, 0.1)
    return model


def hugging_face_twin(model, kind="GPT2LMHeadModel", **options):
    """Hugging Face's model with the same weights; a classifier's head is its own."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    twin = getattr(transformers, kind)(config).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {k: v.detach().T if k.endswith(turned) else v.detach() for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (([], []) if kind == "GPT2LMHeadModel" else (["score.weight"], ["lm_head.weight"]))
    return twin


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_made_here_gives_peft_the_same_logits(config, tmp_path):
    peft = pytest.importorskip("peft")
    twin = hugging_face_twin(tiny())
    model = stir(add_lora(tiny(), config))
    save_adapter(model, tmp_path, base="base")
    theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, model(IDX)[0], rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDX).logits, model(IDX)[0], rtol=1e-4, atol=1e-5)


PEFT_CONFIGS = {
    "c_attn alone, the default": dict(r=8, lora_alpha=16, target_modules=["c_attn"]),
    "all linear layers": dict(r=4, lora_alpha=2, target_modules="all-linear", lora_dropout=0.1),
    "rank-stabilised": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["c_fc"]),
    "ranks of their own": dict(
        r=4, lora_alpha=8, target_modules=["c_attn", "mlp.c_proj"], rank_pattern={"c_attn": 2},
        alpha_pattern={"mlp.c_proj": 3},
    ),
    "a rank that three divides": dict(r=6, target_modules=["c_attn"]),
}  # fmt: skip


@pytest.mark.parametrize("options", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_an_adapter_that_peft_trained_gives_the_same_logits_here(options, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny()
    theirs = peft.get_peft_model(hugging_face_twin(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        theirs(input_ids=IDX, labels=IDX).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(str(tmp_path))
    with torch.no_grad():
        wanted, before = theirs(IDX).logits, base(IDX)[0]
        model = load_adapter(base, tmp_path).eval()
        torch.testing.assert_close(model(IDX)[0], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-3)


LABELS = ["eggs", "ham", "spam"]
FEW = dict(kind="GPT2ForSequenceClassification", num_labels=3, pad_token_id=0)


@pytest.mark.parametrize("named", [True, False])
def test_a_classifier_that_peft_trained_gives_the_same_logits_here(named, tmp_path):
    """Its head has no bias, and the folder of the adapter names no labels: these are the base's, or LABEL_0 and on."""
    peft = pytest.importorskip("peft")
    base, folder = tiny(), tmp_path / "base"
    names = dict(num_labels=3, id2label=dict(enumerate(LABELS))) if named else {}
    hugging_face_twin(base, **names).save_pretrained(folder)
    theirs = peft.get_peft_model(
        hugging_face_twin(base, **FEW), peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn", "c_fc"])
    )
    theirs.peft_config["default"].base_model_name_or_path = str(folder)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        theirs(input_ids=IDX, labels=torch.arange(3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(str(tmp_path / "adapter"))
    model = load_model(tmp_path / "adapter")
    assert model.labels == (LABELS if named else ["LABEL_0", "LABEL_1", "LABEL_2"])
    with torch.no_grad():
        torch.testing.assert_close(model(IDX), theirs(IDX).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split_qkv", [False, True])
def test_a_classifier_trained_here_gives_peft_the_same_logits(split_qkv, tmp_path):
    """Where its head has the bias that ours has."""
    peft = pytest.importorskip("peft")
    model = GPTForClassification.from_gpt(tiny(), LABELS)
    stir(add_lora(model, LoRAConfig(r=4, split_qkv=split_qkv)))
    nn.init.normal_(model.score.bias)
    save_adapter(model, tmp_path, base="base")
    twin = hugging_face_twin(tiny(), **FEW)
    twin.score = nn.Linear(24, 3)
    theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, model(IDX), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_survives_the_disk_bit_by_bit(config, tmp_path):
    model = stir(add_lora(tiny(), config))
    save_adapter(model, tmp_path)
    again = load_adapter(tiny(), tmp_path)
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(lora_state_dict(again)[name], tensor), name
    shapes = [(layer.r, layer.alpha, layer.splits) for layer in lora_layers(model).values()]
    assert [(layer.r, layer.alpha, layer.splits) for layer in lora_layers(again).values()] == shapes


def test_a_classifiers_adapter_carries_its_head(tmp_path):
    torch.manual_seed(1)
    model = GPTForClassification.from_gpt(tiny(), ["a", "b", "c"])
    stir(add_lora(model, LoRAConfig(r=2, targets=("c_attn", "score"))))
    save_adapter(model, tmp_path)
    torch.manual_seed(2)
    again = load_adapter(GPTForClassification.from_gpt(tiny(), ["a", "b", "c"]), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDX), model.eval()(IDX))


def change(path, **values):
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **values}))


def test_what_is_no_plain_lora_is_refused(tmp_path):
    save_adapter(add_lora(tiny(), LoRAConfig(r=2)), tmp_path)
    for values, says in [
        (dict(use_dora=True), "use_dora True is not supported"),
        (dict(bias="all"), "bias 'all' is not supported"),
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported"),
        (dict(peft_type="IA3"), "describes no LoRA adapter"),
    ]:
        before = (tmp_path / "adapter_config.json").read_text()
        change(tmp_path, **values)
        with pytest.raises(UserError, match=says):
            load_adapter(tiny(), tmp_path)
        (tmp_path / "adapter_config.json").write_text(before)
    with pytest.raises(UserError, match=r"is \(2, 24\), the model wants \(2, 32\)"):
        load_adapter(tiny(n_embd=32), tmp_path)
    with pytest.raises(UserError, match="belongs to another model"):
        load_adapter(tiny(n_layer=1), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has no transformer\.h\.0\.attn\.c_attn\.lora_B"):
        load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is not readable"):
        load_adapter(tiny(), tmp_path)
