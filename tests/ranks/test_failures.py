"""A rank that dies, hangs, fails or is told to stop ends the whole job, and says why."""

from __future__ import annotations

import json

import pytest

from llmfast.checkpoint import find_checkpoint

FAST = dict(save_every=3, eval_every=3, max_steps=1000, async_save="on", slow=0.1)
SAID = {"SIGKILL": "is gone", "SIGSTOP": "shown no sign of life", "hang": "has not gone on"}


@pytest.fixture(scope="module", autouse=True)
def dying(beside):
    """Runs that wait for one of their ranks most of the time; others go on beside them."""
    return {kind: beside(kind, 3, check=False, trouble=kind, step=20, patience=4.0, **FAST) for kind in SAID}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_stops_all_before_the_update(launch, tmp_path, mode):
    done = launch(2, "run", check=False, trouble="nan", step=15, parallel=mode, **FAST)
    assert done.codes == [2, 2]
    [line] = [line for text in done.said for line in text.splitlines() if "step" in line]
    assert "the loss is nan; on rank 1 the loss " in line
    assert "No weight was changed" in line
    assert f"the last checkpoint is {find_checkpoint(tmp_path / 'run' / 'run', prefer='latest')}" in line


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_saves_once_and_ends_all(launch, metrics, tmp_path, mode):
    done = launch(2, "run", check=False, trouble="SIGTERM", step=15, parallel=mode, **FAST)
    assert done.codes == [143, 143]
    result = json.loads(done.said[0].splitlines()[-1])
    assert result["interrupted"] == "SIGTERM"
    assert result["steps"] == metrics("run")[-1]["step"]
    assert find_checkpoint(tmp_path / "run" / "run", prefer="latest").name == f"step-{result['steps']:06d}"


def test_a_disk_that_is_full_on_one_rank_ends_all_with_its_reason(launch, tmp_path):
    done = launch(2, "run", check=False, parallel="fsdp", full=3, **FAST)
    assert done.codes == [2, 2]
    [line] = [line for text in done.said for line in text.splitlines() if "cannot write" in line]
    assert "step-000009: No space left on device; make room" in line
    folder = tmp_path / "run" / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", "step-000003", "step-000006"]
    assert find_checkpoint(folder, prefer="latest").name == "step-000006"


@pytest.mark.parametrize("kind", SAID)
def test_a_rank_that_dies_or_hangs_ends_all(dying, beside, kind):
    done = dying[kind].result()
    assert all(done.codes), done
    assert done.seconds < 30 + 20, done  # it has to start, too
    [line] = [line for text in done.said for line in text.splitlines() if line.startswith("llmfast: error")]
    assert line.startswith("llmfast: error: rank 1 (process "), done
    assert SAID[kind] in line, done
    assert find_checkpoint(beside.folder / kind / "run", prefer="latest")
