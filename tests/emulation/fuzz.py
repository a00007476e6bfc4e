"""Many random cases of every emulated CUDA kernel, in the three builds.

    python tests/emulation/fuzz.py --cases 200 --seed 0

Each build runs ``--cases`` cases, the race detector once more a tenth of them with global memory watched as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import BUILDS, DRIVERS, driver, run

LANES = [("release", 1, {}), ("sanitized", 1, {}), ("race", 1, {}), ("race", 10, {"LLMFAST_RACE_GLOBAL": "1"})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drivers", nargs="*", default=list(DRIVERS), choices=[*DRIVERS, []])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--builds", nargs="+", default=list(BUILDS), choices=BUILDS)
    options = parser.parse_args()
    failed = 0
    for name in options.drivers:
        for build, share, environment in (lane for lane in LANES if lane[0] in options.builds):
            program = driver(build, name)
            began, left = time.monotonic(), -(-options.cases // share)
            done = None
            for first in range(0, left, 20):  # in portions, so that no run is long
                done = run(program, min(20, left - first), options.seed * 1000 + first, **environment)
                if done.returncode:
                    break
            failed += done.returncode != 0
            said = (done.stdout + done.stderr).strip() if done.returncode else "ok"
            what = f"{name} {build}{' with global memory' if environment else ''}"
            print(f"{what}: {left} cases, seed {options.seed}, {time.monotonic() - began:.0f} s: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
