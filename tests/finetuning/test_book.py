"""The book's recipes beside the book's own programs, on tiny models: the same data, order, losses and answers."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llmfast.cli import reproduce
from llmfast.cli.main import main
from llmfast.config import GPTConfig, TrainConfig
from llmfast.finetuning import book
from llmfast.interop import huggingface
from llmfast.nn import GPT
from llmfast.tokenizer import Tokenizer, load_tokenizer, train_bpe

BOOK = Path(os.environ.get("LLMFAST_PEERS", "none"), "LLMs-from-scratch")
DATA = Path(os.environ.get("LLMFAST_TEST_DATA", "none"))
CHECKPOINTS = Path(os.environ.get("LLMFAST_TEST_CHECKPOINTS", "none"))
needs_book = pytest.mark.skipif(not BOOK.is_dir(), reason="LLMFAST_PEERS names no folder with LLMs-from-scratch")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="LLMFAST_TEST_DATA names no folder")
SHAPE = {"vocab_size": 1000, "context_length": 512, "emb_dim": 24, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
EOT = SHAPE["vocab_size"] - 1


def peer(chapter: str, name: str, monkeypatch) -> ModuleType:
    """A program of the book's; what it would import to download weights is left out."""
    folder = BOOK / chapter / "01_main-chapter-code"
    for other in ("previous_chapters", "gpt_train"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, "gpt_download", SimpleNamespace(download_and_load_gpt2=None))
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"book_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"the book's program takes {error.name}")
    return module


@functools.cache
def tokenizer() -> Tokenizer:
    """Of 1,000 tokens, so that the models stay tiny."""
    return train_bpe([(DATA / "text" / "the-verdict.txt").read_text(encoding="utf-8")], SHAPE["vocab_size"])


class Encoding:
    """Our tokenizer under tiktoken's interface."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()

    def encode(self, text: str, allowed_special=()) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def peer_model(module: ModuleType, seed: int = 7) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = module.GPTModel({**SHAPE, "qkv_bias": True})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.1 if len(parameter) >= 512 else 1.0)
    model.out_head.weight = torch.nn.Parameter(model.tok_emb.weight.detach().clone())  # as the book loads GPT-2
    return model


def ours(model: torch.nn.Module) -> GPT:
    """The same weights in our model."""
    p = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state = {"transformer.wte.weight": p["tok_emb.weight"], "transformer.wpe.weight": p["pos_emb.weight"]}
    for i in range(SHAPE["n_layers"]):
        theirs, mine = f"trf_blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            qkv = [p[f"{theirs}.att.W_{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{mine}.attn.c_attn.{kind}"] = torch.cat(qkv)
            state[f"{mine}.attn.c_proj.{kind}"] = p[f"{theirs}.att.out_proj.{kind}"]
            state[f"{mine}.mlp.c_fc.{kind}"] = p[f"{theirs}.ff.layers.0.{kind}"]
            state[f"{mine}.mlp.c_proj.{kind}"] = p[f"{theirs}.ff.layers.2.{kind}"]
        for number in (1, 2):
            state[f"{mine}.ln_{number}.weight"] = p[f"{theirs}.norm{number}.scale"]
            state[f"{mine}.ln_{number}.bias"] = p[f"{theirs}.norm{number}.shift"]
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = p["final_norm.scale"], p["final_norm.shift"]
    state["lm_head.weight"] = p["tok_emb.weight"]
    gpt = GPT(
        GPTConfig(
            vocab_size=SHAPE["vocab_size"], block_size=SHAPE["context_length"], n_layer=SHAPE["n_layers"],
            n_head=SHAPE["n_heads"], n_embd=SHAPE["emb_dim"],
        )
    )  # fmt: skip
    gpt.load_state_dict(state)
    return gpt.eval()


def steps(module: ModuleType, monkeypatch) -> list[float]:
    """The losses that the book's training computes, in order, as it runs; evaluations are left out."""
    losses: list[float] = []
    before = module.calc_loss_batch

    def watched(*arguments):
        loss = before(*arguments)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(module, "calc_loss_batch", watched)
    return losses


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def config(path: Path) -> TrainConfig:
    return TrainConfig(out=str(path), device="cpu", dtype="float32", threads=1)


@pytest.fixture
def messages(tmp_path) -> Path:
    """The first 300 lines of the real file."""
    lines = (DATA / "spam" / "SMSSpamCollection.tsv").read_text(encoding="utf-8").split("\n")[:300]
    path = tmp_path / "messages.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# The order of the data.


@pytest.mark.parametrize(("count", "rows", "eval_every", "per_epoch"), [(35, 8, 3, 3), (16, 8, 5, 0), (7, 2, 1, 3)])
def test_the_order_is_that_of_a_data_loader(count, rows, eval_every, per_epoch):
    data = torch.utils.data.TensorDataset(torch.arange(count))
    training = torch.utils.data.DataLoader(data, batch_size=rows, shuffle=True, drop_last=True)
    validation = torch.utils.data.DataLoader(data, batch_size=rows)
    order, step = [], 0

    def look() -> None:
        for loader in (training, validation):
            next(iter(loader))

    torch.manual_seed(123)
    for _ in range(3):
        for (batch,) in training:
            order += batch.tolist()
            if step % eval_every == 0:
                look()
            step += 1
        if per_epoch:
            look()
    assert book.loader_order(count, rows, 3, eval_every=eval_every, per_epoch=per_epoch) == order


@needs_book
@needs_data
def test_spam_splits_are_pandas(monkeypatch):
    pandas = pytest.importorskip("pandas")
    theirs = peer("ch06", "gpt_class_finetune", monkeypatch)
    path = DATA / "spam" / "SMSSpamCollection.tsv"
    frame = pandas.read_csv(path, sep="\t", header=None, names=["Label", "Text"])
    assert len(frame) == 5572
    balanced = theirs.create_balanced_dataset(frame)
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    parts = theirs.random_split(balanced, 0.7, 0.1)
    found = book.spam_splits(path)
    assert [len(part) for part in found.values()] == [1045, 149, 300]
    for part, expected in zip(found.values(), parts, strict=True):
        assert part == list(zip(expected["Text"], expected["Label"], strict=True))
    examples = book.spam_examples(found, load_tokenizer(str(DATA / "gpt2")), 1024)
    assert {len(ids) for part in examples.values() for ids, _ in part} == {120}  # the book's max_length


# Whole recipes, step by step.


@needs_book
@needs_data
@pytest.mark.parametrize("lora", [False, True])
def test_spam_losses_are_the_books_step_by_step(monkeypatch, tmp_path, messages, one_thread, lora):
    pandas = pytest.importorskip("pandas")
    theirs = peer("ch06", "gpt_class_finetune", monkeypatch)
    model = peer_model(theirs)
    gpt = ours(model)

    frame = pandas.read_csv(messages, sep="\t", header=None, names=["Label", "Text"])
    balanced = theirs.create_balanced_dataset(frame)
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    sets, longest = {}, None
    for name, part in zip(("train", "validation", "test"), theirs.random_split(balanced, 0.7, 0.1), strict=True):
        part.to_csv(tmp_path / f"{name}.csv", index=None)
        sets[name] = theirs.SpamDataset(tmp_path / f"{name}.csv", Encoding(), longest, pad_token_id=EOT)
        longest = sets["train"].max_length
    load = torch.utils.data.DataLoader
    train = load(sets["train"], batch_size=8, shuffle=True, drop_last=True)
    validation, test = load(sets["validation"], batch_size=8), load(sets["test"], batch_size=8)

    torch.manual_seed(123)
    head = torch.nn.Linear(SHAPE["emb_dim"], 2)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.out_head = head
    if lora:
        for parameter in model.parameters():
            parameter.requires_grad = False
        torch.manual_seed(123)
        for loader in (train, validation, test):
            theirs.calc_accuracy_loader(loader, model, "cpu", num_batches=10)
        spec = importlib.util.spec_from_file_location(
            "book_appendix_e", BOOK / "pkg" / "llms_from_scratch" / "appendix_e.py"
        )
        appendix = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(appendix)
        appendix.replace_linear_with_lora(model, rank=16, alpha=16)
    else:
        for part in (model.trf_blocks[-1], model.final_norm):
            for parameter in part.parameters():
                parameter.requires_grad = True
    losses = steps(theirs, monkeypatch)
    torch.manual_seed(123)
    rate = 8e-4 if lora else 5e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    theirs.train_classifier_simple(model, train, validation, optimizer, "cpu", num_epochs=5, eval_freq=50, eval_iter=5)

    got = book.spam(gpt, tokenizer(), messages, config(tmp_path / "run"), lora=lora)
    assert len(losses) == 5 * (len(sets["train"]) // 8)
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=2e-5)
    assert losses[-1] != losses[0]
    for name, loader in (("validation", validation), ("test", test)):
        assert got[f"{name} accuracy"] == pytest.approx(100 * theirs.calc_accuracy_loader(loader, model, "cpu"))


@needs_book
@needs_data
def test_instruction_losses_are_the_books_step_by_step(monkeypatch, tmp_path, one_thread):
    theirs = peer("ch07", "gpt_instruction_finetuning", monkeypatch)
    import previous_chapters as loop

    model = peer_model(theirs)
    gpt = ours(model)
    encoding = Encoding()
    records = json.loads((DATA / "instructions" / "instruction-data.json").read_text(encoding="utf-8"))[:60]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    splits = book.instruction_splits(path)
    assert [len(part) for part in splits.values()] == [51, 6, 3]

    def collate(batch):
        return theirs.custom_collate_fn(batch, pad_token_id=EOT, allowed_max_length=1024)

    load = torch.utils.data.DataLoader
    train = load(theirs.InstructionDataset(records[:51], encoding), 8, collate_fn=collate, shuffle=True, drop_last=True)
    validation = load(theirs.InstructionDataset(records[57:], encoding), 8, collate_fn=collate)
    torch.manual_seed(123)
    with torch.no_grad():
        before = [loop.calc_loss_loader(loader, model, "cpu", num_batches=5) for loader in (train, validation)]
    losses = steps(loop, monkeypatch)
    torch.manual_seed(123)
    loop.train_model_simple(
        model, train, validation, torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1), "cpu",
        num_epochs=2, eval_freq=5, eval_iter=5, start_context="a", tokenizer=encoding,
    )  # fmt: skip
    got, responses = book.instruct(gpt, encoding.tokenizer, path, config(tmp_path / "run"), max_new_tokens=6)
    assert [got["training loss before"], got["validation loss before"]] == pytest.approx(before, abs=2e-5)
    found = losses_of(tmp_path / "run")
    assert len(found) == len(losses) == 12
    assert found == pytest.approx(losses, abs=2e-5)
    entries = json.loads(responses.read_text())
    assert [entry["output"] for entry in entries] == [record["output"] for record in records[51:57]]
    text = theirs.format_input(records[51])
    ids = loop.generate(model, torch.tensor([encoding.encode(text)]), 6, SHAPE["context_length"], eos_id=EOT)
    answer = encoding.decode(ids[0].tolist())[len(text) :].replace("### Response:", "").strip()
    assert entries[0]["model_response"] == answer


@needs_book
@needs_data
def test_verdict_losses_and_text_are_the_books(monkeypatch, one_thread):
    theirs = peer("ch05", "gpt_train", monkeypatch)
    import previous_chapters as loop

    monkeypatch.setattr(loop.tiktoken, "get_encoding", lambda name: Encoding())
    model = peer_model(theirs).eval()
    text = (DATA / "text" / "the-verdict.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    size = {"batch_size": 2, "max_length": 256, "stride": 256}
    train = theirs.create_dataloader_v1(text[:cut], drop_last=True, shuffle=True, **size)
    validation = theirs.create_dataloader_v1(text[cut:], drop_last=False, shuffle=False, **size)
    torch.manual_seed(123)
    expected = [theirs.calc_loss_loader(loader, model, "cpu") for loader in (train, validation)]
    encoding = Encoding()
    got = book.verdict(ours(model), encoding.tokenizer, text)
    assert [got["training loss"], got["validation loss"]] == pytest.approx(expected, abs=1e-5)
    ids = theirs.generate_text_simple(model, torch.tensor([encoding.encode(book.GREEDY_PROMPT)]), 15, 512)
    assert got["greedy text"] == encoding.decode(ids[0].tolist())


@needs_data
def test_lora_trains_what_the_book_counts():
    with torch.device("meta"):
        gpt = GPT(GPTConfig.preset("gpt2"))
    gpt.to_empty(device="cpu")
    model = book.spam_classifier(gpt, lora=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_666_528


# The command.


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A folder with OpenAI's checkpoint in miniature, else Hugging Face's copy of one, and a tokenizer that fits it."""
    source = CHECKPOINTS / "openai-tf"
    for size in ("124M", "355M"):
        folder = tmp_path / "models" / size
        folder.mkdir(parents=True)
        if source.is_dir():
            for file in source.iterdir():
                (folder / file.name).symlink_to(file)
        else:
            torch.manual_seed(0)
            model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=24, dropout=0.1))
            huggingface.write(model.config, model.state_dict(), folder, None)
        load_tokenizer("byte").save(folder)
    return tmp_path / "models"


def test_without_weights_the_command_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMFAST_GPT2", raising=False)
    assert main(["reproduce", "book-instruct"]) == 2
    error = capsys.readouterr().err
    assert "GPT-2 355M is not here: get OpenAI's weights with llmfast download gpt2-355M" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("LLMFAST_GPT2", "elsewhere")
    assert main(["reproduce", "book-spam"]) == 2
    assert "elsewhere holds no checkpoint of GPT-2 124M" in capsys.readouterr().err
    assert main(["reproduce", "book-span"]) == 2
    assert "did you mean book-spam?" in capsys.readouterr().err


def test_without_data_the_command_says_how_to_get_it(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "book-spam", "--checkpoints", str(tiny)]) == 2
    assert "SMSSpamCollection.tsv: get it with llmfast download sms-spam" in capsys.readouterr().err


def test_verdict_through_the_command(tiny, tmp_path, capsys, monkeypatch, one_thread):
    text = tmp_path / "text.txt"
    text.write_text("It had always been a good story. " * 60)
    monkeypatch.setenv("LLMFAST_GPT2", str(tiny))
    words = ["reproduce", "book-verdict", "--data", str(text)]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "training loss    expected 3.7547 +- 0.001" in shown
    assert "DIFFERS" in shown
    assert main([*words, "--json"]) == 1
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert 4 < figures["training loss"]["got"] < 8
    assert figures["greedy text"]["got"].startswith("Every effort moves you")


@pytest.mark.parametrize("recipe", ["book-spam", "book-lora"])
def test_spam_through_the_command(tiny, tmp_path, capsys, one_thread, recipe):
    data = tmp_path / "messages.tsv"
    ham, spam = "ham\tSee you at {}\n", "spam\tWIN {} pounds now!\n"
    data.write_text("".join(ham.format(i) + ham.format(-i) + spam.format(i) for i in range(30)))
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--threads", "1", "--json"]
    assert main(["reproduce", recipe, "--checkpoints", str(tiny), *words]) in (0, 1)
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert set(figures) == {"training accuracy", "validation accuracy", "test accuracy"}
    assert all(0 <= figure["got"] <= 100 and figure["holds"] is not None for figure in figures.values())
    assert len(losses_of(tmp_path / "run")) == 25  # 42 messages, whole batches of 8, 5 epochs


def test_a_run_that_is_there_stays_as_it_is(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "data.tsv").write_text("ham\tone\nspam\ttwo\n")
    words = ["--data", str(tmp_path / "data.tsv"), "--out", str(tmp_path / "run")]
    assert main(["reproduce", "book-spam", "--checkpoints", str(tiny), *words]) == 2
    assert "already holds a run: move it away, or choose another --out" in capsys.readouterr().err


def test_half_a_training_has_no_figures(tiny, tmp_path, monkeypatch, one_thread):
    data = tmp_path / "messages.tsv"
    data.write_text("".join(f"ham\tsee {i}\nspam\twin {i}\n" for i in range(30)))
    step, steps = book.spam_loss, []

    def stopped(*arguments):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(book, "spam_loss", stopped)
    model, tokens = (
        GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16)),
        load_tokenizer("byte"),
    )
    with pytest.raises(KeyboardInterrupt):
        book.spam(model, tokens, data, config(tmp_path / "run"), lora=False)
    assert len(steps) == 3


def test_hugging_faces_copy_trains_without_its_dropout(tmp_path):
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    huggingface.write(model.config, model.state_dict(), tmp_path, None)
    load_tokenizer("byte").save(tmp_path)
    assert reproduce._open(tmp_path)[0].config.dropout == 0


def test_instructions_through_the_command(tiny, tmp_path, capsys, one_thread):
    sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
    from chat_server import says, serving

    data = tmp_path / "data.json"
    records = [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(20)]
    data.write_text(json.dumps(records))
    with serving(says("50")) as server:
        words = ["--data", str(data), "--out", str(tmp_path / "run"), "--threads", "1", "--judge-url", server.url]
        assert main(["reproduce", "book-instruct", "--checkpoints", str(tiny), *words]) == 1
    shown = capsys.readouterr().out
    assert "judge's average" in shown
    assert "got 50 of 100" in shown
    entries = json.loads((tmp_path / "run" / "instruction-data-with-response.json").read_text())
    assert [entry["instruction"] for entry in entries] == ["Say 17", "Say 18"]
