"""The harness itself, driving our models."""

from __future__ import annotations

import json

import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.evaluation.multiple_choice import Question, evaluate_multiple_choice
from llmfast.generation import generate
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = 32


@pytest.fixture(scope="module")
def lm():
    from llmfast.evaluation.lm_eval_adapter import LlmfastLM

    torch.manual_seed(2)
    model = GPT(GPTConfig(vocab_size=257, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    return LlmfastLM(model, load_tokenizer("byte"), batch_size=3)


def instances(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def logs(lm, ids: list[int]) -> torch.Tensor:
    """(T - 1,) float64: the log-probability of each token after the first, from one forward pass."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids[:-1]]))[0][0].double()
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def test_loglikelihood(lm, one_thread):
    found = lm.loglikelihood(instances("loglikelihood", ("a cat", " sat"), ("", "x"), ("so ", "far")), True)
    expected = [logs(lm, [*b"a cat sat"])[-4:].sum(), logs(lm, [256, *b"x"]).sum(), logs(lm, [*b"so far"])[-4:].sum()]
    assert [score for score, _ in found] == pytest.approx([float(e) for e in expected], rel=1e-5)
    assert all(isinstance(greedy, bool) for _, greedy in found)


def test_rolling_predicts_every_byte_once(lm, one_thread):
    text = "abcdefghij" * 8
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("z",), ("",)), True)
    ids = [256, *text.encode()]
    expected = logs(lm, ids[: BLOCK + 1]).sum() + logs(lm, ids[BLOCK : 2 * BLOCK + 1]).sum()
    expected += logs(lm, ids[-BLOCK - 1 :])[-(len(ids) - 1 - 2 * BLOCK) :].sum()  # the rest, with a full context
    assert found == pytest.approx([float(expected), float(logs(lm, [256, *b"z"]).sum()), 0], rel=1e-5)


def test_generate_until(lm, one_thread):
    plain = generate(lm.model, lm.tokens, "cat", max_new_tokens=12, temperature=0)
    stop = plain[4]
    requests = instances(
        "generate_until",
        ("cat", {"until": [stop], "max_gen_toks": 12}),
        ("dog", {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False}),
        ("cat", {"until": [], "max_gen_toks": 12, "temperature": 0.0}),
        ("c" * 100, {"until": [], "max_gen_toks": 4}),
    )
    texts = lm.generate_until(requests, True)
    assert texts[0] == plain[: plain.index(stop)]
    assert texts[2] == plain
    assert len(texts[1].encode()) <= 3
    assert texts[3] == generate(lm.model, lm.tokens, "c" * (BLOCK - 4), max_new_tokens=4, temperature=0)
    with pytest.raises(UserError, match="'num_beams' is not one that llmfast knows"):
        lm.generate_until(instances("generate_until", ("a", {"until": [], "num_beams": 4})), True)


def test_a_whole_task_agrees_with_our_own_multiple_choice(lm, tmp_path, monkeypatch, one_thread):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"ctx": f"the {a} cat", "endings": [f"sat {b}", f"{a} ran far", "is", f"{b}{b} or"], "label": i % 3}
        for i, (a, b) in enumerate((a, b) for a in "xyzuv" for b in "pqrs")
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(
        config={
            "task": "ours", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "validation_split": "validation", "output_type": "multiple_choice", "doc_to_text": "{{ctx}}",
            "doc_to_target": "label", "doc_to_choice": "endings",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )  # fmt: skip
    found = lm_eval.evaluate(lm=lm, task_dict={"ours": task}, bootstrap_iters=0)["results"]["ours"]
    questions = [Question(row["ctx"], row["endings"], row["label"], "") for row in rows]
    ours = evaluate_multiple_choice(lm.model, lm.tokens, questions)
    assert (found["acc,none"], found["acc_norm,none"]) == (ours.acc, ours.acc_norm)
    assert ours.acc != ours.acc_norm


def test_the_harness_opens_a_checkpoint(lm, tmp_path):
    from lm_eval.api.registry import get_model

    from llmfast.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "run", 1, model=lm.model, tokenizer=lm.tokens, state=None)
    opened = get_model("llmfast").create_from_arg_obj(
        {"checkpoint": str(tmp_path / "run")}, {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    assert opened.batch_size == 2
    assert opened.model.config == lm.model.config
    save_checkpoint(tmp_path / "bare", 1, model=lm.model, state=None)
    with pytest.raises(UserError, match="holds no tokenizer"):
        get_model("llmfast").create_from_arg_obj({"checkpoint": str(tmp_path / "bare")})
