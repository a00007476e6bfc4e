from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import launching
from launching import launch as launch_in
from launching import metrics_of

forkserver.ensure_running()  # it imports while other tests run
launching.ENVIRONMENT["LLMFAST_MATMUL"] = "default"  # to measure the routes takes longer than the runs


@pytest.fixture
def launch(tmp_path):
    """launch(ranks, name, call=worker.train, **options) -> Done; the run is tmp_path / name / "run"."""
    return lambda size, name, *call, **options: launch_in(tmp_path / name, size, *call, **options)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """beside(name, ranks, call=worker.train, **options) -> a future of Done: a launch beside others, two at a time.

    ``beside.folder`` / name / "run" is the run.
    """
    with ThreadPoolExecutor(2) as pool:

        def start(name, *arguments, **options):
            return pool.submit(launch_in, start.folder / name, *arguments, **options)

        start.folder = tmp_path_factory.mktemp("beside")
        yield start


@pytest.fixture
def metrics(tmp_path):
    """metrics(name) -> the lines of a run's metrics.jsonl."""
    return lambda name: metrics_of(tmp_path / name)
