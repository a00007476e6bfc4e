from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmfast.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA names no folder of test data")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2(real_data: Path) -> Tokenizer:
    return load_tokenizer(real_data / "gpt2")
