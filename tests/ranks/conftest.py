from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import launch as launch_in


@pytest.fixture
def launch(tmp_path):
    """launch(ranks, name, call=worker.train, **options) -> Done; the run is tmp_path / name / "run"."""
    return lambda size, name, *call, **options: launch_in(tmp_path / name, size, *call, **options)


@pytest.fixture
def metrics(tmp_path):
    """metrics(name) -> the lines of a run's metrics.jsonl."""
    return lambda name: [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").open()]
