"""Fine-tunings on several ranks are those on one: losses, scores, answers, and the files of the run."""

from __future__ import annotations

import json

import pytest
import torch
import worker
from launching import metrics_of

from llmfast.config import GPTConfig
from llmfast.nn import GPT
from llmfast.tokenizer import load_tokenizer

CASES = {
    "classify fsdp": dict(train="all", parallel="fsdp"),
    "instruct lora": dict(train="lora", mask_instruction=True),
    "preference": dict(method="dpo"),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base model, and a file that all tasks read."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16)).save_pretrained(folder / "model")
    load_tokenizer("byte").save(folder / "model")
    records = []
    for i in range(40):
        word, answer = "ab"[i % 2] * (i % 5 + 1), "ab"[i % 2]
        records.append(dict(instruction=f"Say {word}", input="", output=answer, chosen=answer, rejected="c"))
        records[-1] |= dict(text=word, label=answer)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def runs(beside, material):
    """Every case on one rank and on two. All begin at once."""
    started = {}
    for case, values in CASES.items():
        options = dict(checkpoint=str(material / "model"), data=str(material / "data.json"), **values)
        for size in (1, 2):
            started[case, size] = beside(f"{case} {size}", size, worker.finetune, kind=case.split()[0], **options)
    return started


@pytest.mark.parametrize("case", CASES)
def test_a_fine_tuning_of_two_ranks_is_that_of_one(runs, beside, case):
    for size in (1, 2):
        runs[case, size].result()
    parents = [beside.folder / f"{case} {size}" for size in (1, 2)]
    one, two = map(metrics_of, parents)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two, strict=True):
        for key in left.keys() & right.keys() - {"mfu"}:
            if not key.endswith("per_second") and isinstance(left[key], float):
                assert left[key] == pytest.approx(right[key], abs=2e-4), key
    folders = [parent / "run" for parent in parents]
    names = [sorted(str(p.relative_to(f)) for p in (*f.glob("*.json"), *f.glob("data/*"))) for f in folders]
    assert names[0] == names[1]
    assert len(names[0]) > 3
    for name in names[0]:
        if name != "results.json":
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
