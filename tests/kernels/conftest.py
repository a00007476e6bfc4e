"""These tests run the Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
