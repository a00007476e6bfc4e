"""No kernel reads or writes outside of its tensors: each lies against a page that may not be touched (guarded.py).

A sample; ``make fuzz FUZZ=kernels`` makes 300 launches of each kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).with_name("guarded.py")
KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(path.stem for path in KERNELS.glob("*.py") if path.stem != "__init__")
LAUNCHES = 30


@pytest.mark.parametrize("module", MODULES)
def test_launches_touch_nothing_outside(module):
    done = subprocess.run([sys.executable, GUARDED, module, str(LAUNCHES)], capture_output=True, text=True)
    assert done.returncode == 0, f"ended with {done.returncode} (a negative number is a signal): {done.stderr[-2000:]}"
    assert all(count >= LAUNCHES for count in json.loads(done.stdout).values())
