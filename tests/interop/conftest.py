from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmfast.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    folder = os.environ.get("LLMFAST_TEST_DATA")
    if not folder:
        pytest.skip("LLMFAST_TEST_DATA names no folder of test data")
    return load_tokenizer(Path(folder, "gpt2"))
