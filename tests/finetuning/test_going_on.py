"""A run that was killed goes on as if nothing had happened, and only as the same run."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llmfast.config import InstructConfig, PreferenceConfig
from llmfast.errors import UserError
from llmfast.finetuning.instruct import finetune_instruct
from llmfast.finetuning.preference import finetune_preference
from llmfast.training.update import Update

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

KINDS = {
    "instruct": (InstructConfig, finetune_instruct),
    "preference": (PreferenceConfig, finetune_preference),
}


@pytest.fixture
def tune(base, entries, write, tmp_path):
    """tune(kind, out, **options) -> (result, file of responses)."""
    records = [{**entry, "chosen": entry["output"], "rejected": "c"} for entry in entries]
    data = write(records)

    def run(kind, out, **options):
        config_class, finetune = KINDS[kind]
        values = dict(
            checkpoint=str(base), data=data, out=str(tmp_path / out), prompt_style="{instruction} {input}>", threads=1,
            micro_batch_size=4, learning_rate=3e-3, response_tokens=8, sample_every=0, device="cpu", log_every=1,
            epochs=1.5, dropout=0.1, save_every=3, eval_every=4,
        )  # fmt: skip
        return finetune(config_class(**{**values, **options}), progress=False)

    return run


def curve(result):
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("instruct", dict(train="lora", lora_dropout=0.1)),
        ("instruct", dict(packing=True, mask_instruction=True, split="random", epochs=9)),
        ("preference", dict()),
        ("preference", dict(method="kto", train="lora", precompute_reference=True)),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(tune, monkeypatch, kind, options):
    whole, answers = tune(kind, "whole", **options)
    original, calls = Update.apply, []

    def killed(self, *arguments):
        calls.append(None)
        if len(calls) == whole.steps * 2 // 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Update, "apply", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(kind, "killed", **options)
    resumed, again = tune(kind, "killed", **options, resume=True)
    assert curve(resumed) == curve(whole)
    names = {file.name for file in whole.checkpoint.iterdir()} - {"manifest.json", "trainer.json"}
    assert len(names) >= 4
    for name in names:
        if name == "adapter_model.safetensors":  # its header is written in no fixed order
            assert_close(load_file(resumed.checkpoint / name), load_file(whole.checkpoint / name), rtol=0, atol=0)
            continue
        assert (resumed.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes(), name
    assert again.read_bytes() == answers.read_bytes()


def test_another_run_is_refused_and_changes_nothing(tune, entries, write):
    result, _ = tune("instruct", "run", epochs=0.3)
    before = {file.name: file.read_bytes() for file in (result.out / "data").iterdir()}
    others = [{**entry, "output": "c"} for entry in entries]
    for options, says in (
        (dict(data=write(others, "others.json")), "train.jsonl holds other examples"),
        (dict(test_fraction=0.2), "holds other examples"),
        (dict(mask_instruction=True), "mask_instruction was False, now True"),
        (dict(prompt_style="phi3", max_length=90), "prompt_style was"),
    ):
        with pytest.raises(UserError, match=says):
            tune("instruct", "run", epochs=0.6, resume=True, **options)
        assert before == {file.name: file.read_bytes() for file in (result.out / "data").iterdir()}


def test_a_run_stops_early_where_validation_no_longer_improves(tune):
    result, answers = tune("instruct", "run", epochs=50, learning_rate=1e-12, patience=2, eval_every=2)
    assert result.stopped_early
    assert result.steps <= 8
    assert answers is not None
