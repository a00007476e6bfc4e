import json

import pytest


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a training run of 200 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": i, "loss": 5 - i / 100, "tokens": 64 * i, "tokens_per_second": 1000 + i} for i in range(1, 201)]
    rows[99]["val_loss"] = 4.3219
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text('model = "tiny"\n')
    state = folder / "checkpoints" / "step-000200"
    state.mkdir(parents=True)
    (state / "trainer.json").write_text(json.dumps({"threads": 2, "torch": "2.13", "rng": {"a": 1}}))
    return folder
