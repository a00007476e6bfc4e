"""python check_wheel.py WHEEL [PYTHON...]: what the wheel must hold, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 8 << 20

wheel, pythons = Path(sys.argv[1]), sys.argv[2:]
names = set(zipfile.ZipFile(wheel).namelist())
files = {name for name in names if ".dist-info/" not in name}

wanted = {"llmfast/_kernels.so", "llmfast/py.typed"}
wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "llmfast").rglob("*.py")}
wanted |= {f"llmfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
wanted |= {f"llmfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels/configs").glob("*.json")}
recorded = ROOT / "benchmarks" / "results"
wanted |= {f"llmfast/results/{path.relative_to(recorded).as_posix()}" for path in recorded.rglob("ops*.json")}
query = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
for python in [sys.executable, *pythons]:
    wanted.add(f"llmfast/_C{subprocess.check_output([python, '-c', query], text=True).strip()}")

problems = [f"missing: {name}" for name in sorted(wanted - files)]
problems += [f"not wanted: {name}" for name in sorted(files - wanted)]
if not wheel.name.split("-", 2)[2].startswith("py3-none-") or wheel.name.endswith("-any.whl"):
    problems.append(f"the tag is not py3-none-<platform>: {wheel.name}")
if wheel.stat().st_size > LIMIT:
    problems.append(f"{wheel.stat().st_size / 2**20:.1f} MiB, more than {LIMIT >> 20}")
print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, {len(files)} files, _C for {1 + len(pythons)} Pythons")
sys.exit("\n".join(problems) or None)
