"""``python -m llmfast``: the same as the ``llmfast`` command."""

from __future__ import annotations

import sys

from llmfast.cli.main import main

sys.exit(main())
