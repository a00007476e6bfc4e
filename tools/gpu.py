"""Everything that needs an NVIDIA GPU, in one command: build, test, sanitize, tune, measure. No network.

    python tools/gpu.py                       # all stages, under nine minutes
    python tools/gpu.py --only build ops-mlp  # some stages
    python tools/gpu.py --minutes 25 --full   # more samples, dtypes and tools
    python tools/gpu.py --rehearse            # every stage on a machine without a GPU, on the CPU
    python tools/gpu.py --list

It runs with the machine's own Python and torch, in place. Every stage has a time limit of its own and a log; later ones
run if an earlier one fails. Results and logs lie in gpu-results/, and what passed there is not run again (``--again``
does it anyway). After every stage, so that a run which is cut short keeps what it has, SUMMARY.md says what came out,
and where OUT is set, that folder gets it, the report and everything else as one archive.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The ops and, but for --full, their shapes: GPT-2 124M's, and a large one.
OPS = {
    "causal_attention": ["B=16,H=12,T=1024,D=64,packed=true", "B=4,H=16,T=4096,D=64,packed=true"],
    "layer_norm": ["rows=16x1024,width=768", "rows=16x1024,width=1600"],
    "add_layer_norm": ["rows=16x1024,width=768,dropout_p=0.1", "rows=16x1024,width=1600"],
    "mlp": ["rows=16x1024,C=768,M=3072", "rows=16x1024,C=1600,M=6400"],
    "linear_cross_entropy": ["rows=8x1024,C=768,V=50257"],
    "lora_linear": ["rows=16x1024,K=768,N=2304,r=8", "rows=16x1024,K=1600,N=4800,r=64"],
}
TAIL = 12  # lines of a failed stage's log that are shown


@dataclass(frozen=True)
class Stage:
    """One command: ``command(options, folder)`` gives its words, or the reason why it cannot run as a string."""

    name: str
    seconds: int
    title: str
    command: Callable[[argparse.Namespace, Path], list[str] | str]
    environment: dict[str, str] = field(default_factory=dict)


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def device(options: argparse.Namespace) -> list[str]:
    return ["--device", "cpu" if options.rehearse else "cuda"]


def facts(options: argparse.Namespace, folder: Path) -> list[str] | str:
    return ["bash", "-c", "nvidia-smi; nvcc --version; " + " ".join(python("-m", "llmfast", "info"))]


def conformance(options: argparse.Namespace, folder: Path) -> list[str] | str:
    compiler = "g++ -std=c++17 -DLLMFAST_EMULATE -x c++" if options.rehearse else "nvcc -std=c++17 -arch=native"
    if shutil.which(compiler.split()[0]) is None:
        return f"no {compiler.split()[0]} on PATH"
    program = folder / "conformance"
    return ["bash", "-c", f"{compiler} -Icsrc tests/emulation/conformance.cu -o {program} && {program}"]


def build(options: argparse.Namespace, folder: Path) -> list[str] | str:
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH"
    # In a checkout the Triton kernels lie beside the package; an installed one has them inside.
    link = "test -e llmfast/kernels || ln -s ../kernels llmfast/kernels"
    return ["bash", "-c", f"{link}; exec {sys.executable} setup.py build_ext --inplace"]


def tests(*paths: str, **extra: str) -> Callable[[argparse.Namespace, Path], list[str] | str]:
    def command(options: argparse.Namespace, folder: Path) -> list[str] | str:
        found = [path for path in paths if (ROOT / path).exists()]
        if not found:
            return f"no {' or '.join(paths)} here"
        words = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            extra["rehearsal" if options.rehearse else "gpu"],
            "--maxfail=40",
        ]
        if not options.rehearse and importlib.util.find_spec("xdist"):
            words += ["-n", "6"]  # most of the time is Triton's compiler
        return python("-m", "pytest", *words, *found)

    return command


def sanitize(options: argparse.Namespace, folder: Path) -> list[str] | str:
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    program = python("tools/gpu_small_shapes.py", *device(options))
    if options.rehearse:
        return program
    if not Path(checker).exists():
        return "no compute-sanitizer on PATH"
    tools = "memcheck racecheck initcheck synccheck" if options.full else "memcheck racecheck"
    run = f"{checker} --error-exitcode 9 --tool $tool {' '.join(program)}"
    return ["bash", "-c", f"bad=0; for tool in {tools}; do echo == $tool; {run} || bad=$?; done; exit $bad"]


def tune(options: argparse.Namespace, folder: Path) -> list[str] | str:
    if options.rehearse:
        return python("-c", "import llmfast.bench.tune")
    return python("-m", "llmfast.bench.tune", "--out", str(folder / "tuned.json"))


def ops(name: str) -> Callable[[argparse.Namespace, Path], list[str] | str]:
    def command(options: argparse.Namespace, folder: Path) -> list[str] | str:
        words = ["bench", "ops", name, "--save", str(folder / f"ops-{name}.json"), *device(options)]
        if options.rehearse:
            words += ["--samples", "3", "--mode", "both", "--dtype", "float32", "--providers", "llmfast", "eager"]
        elif options.full:
            words += ["--dtype", "bfloat16", "float32", "--samples", "50"]
        else:
            words += ["--cache", "cold", "--shape", *OPS[name]]
        return python("-m", "llmfast", *words)

    return command


def train(options: argparse.Namespace, folder: Path) -> list[str] | str:
    words = ["bench", "train", "--save", str(folder / "train.json"), *device(options)]
    if options.rehearse:
        words += [
            "--model",
            "tiny",
            "--block-size",
            "32",
            "--batch-size",
            "1",
            "--turns",
            "1",
            "--providers",
            "llmfast",
            "eager",
        ]
    else:
        words += ["--providers", "llmfast ours", "llmfast", "eager", "compile", "huggingface"]
        words += ["--ladder", "--turns", "15"] if options.full else []
    return python("-m", "llmfast", *words)


def report(options: argparse.Namespace, folder: Path) -> list[str] | str:
    found = sorted(str(path) for path in folder.glob("*.json") if path.name.startswith(("ops-", "train")))
    if not found:
        return "no results to report"
    return python("-m", "llmfast", "report", *found, "--out", str(folder / "report.html"))


STAGES = [
    Stage("conformance", 60, "each wrapper of PTX does what its emulation does", conformance),
    Stage("build", 150, "the extension, in place, with nvcc where it is", build),
    Stage("facts", 30, "driver, compiler, what llmfast sees", facts),
    Stage("kernels", 75, "every implementation on the GPU against float64",
          tests("tests/ops/test_ops_accuracy.py", gpu="cuda and at_most", rehearsal="at_most and layer_norm-cpp")),
    *(Stage(f"ops-{name}", 60, f"bench ops {name}", ops(name)) for name in OPS),
    Stage("train", 120, "bench train: GPT-2 124M", train),
    Stage("tune", 45, "the shipped configurations of the Triton kernels", tune),
    # PyTorch's allocator would hide a read beyond a tensor.
    Stage("sanitize", 60, "compute-sanitizer on small shapes", sanitize, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    Stage("compile", 45, "torch.compile and opcheck on the GPU",
          tests("tests/ops/test_ops_compile.py", gpu="cuda", rehearsal="layer_norm")),
    Stage("report", 20, "one page of the results", report),
]  # fmt: skip
RESERVE = 25.0  # seconds kept for the last stage


def why_no_gpu() -> str | None:
    """The reason, if torch sees no NVIDIA GPU."""
    code = "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else '-')"
    done = subprocess.run(python("-c", code), capture_output=True, text=True)
    if done.returncode:
        return f"{sys.executable} cannot import torch"
    name = done.stdout.strip()
    return f"torch {name[:-2]} sees no NVIDIA GPU" if name.endswith(" -") else None


def run_stage(stage: Stage, options: argparse.Namespace, folder: Path, seconds: float) -> dict[str, object]:
    """Runs one stage within ``seconds``; all of its processes end with it."""
    command = stage.command(options, folder)
    if isinstance(command, str):
        return {"status": "cannot run", "why": command, "seconds": 0.0}
    log, began = folder / f"{stage.name}.log", time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    with open(log, "w", encoding="utf-8") as file:
        print("$", " ".join(command), file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        except KeyboardInterrupt:
            end(process)
            raise
        end(process)  # what it left running
    took = round(time.monotonic() - began, 1)
    status = "timed out" if code is None else "ok" if code == 0 else "nothing to do" if code == 5 else "failed"
    return {"status": status, "code": code, "seconds": took, "log": log.name, "command": " ".join(command)}


def end(process: subprocess.Popen) -> None:
    """End the stage's whole session: first politely, so that it may write what it has."""
    for sign, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def write_summary(folder: Path, results: dict[str, dict[str, object]], commit: str) -> None:
    whole = {"schema": 1, "commit": commit, "stages": results}
    (folder / "summary.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    lines = [f"# GPU run of {commit or 'an unknown commit'}", "", "| stage | | seconds | |", "|---|---|---|---|"]
    for name, result in results.items():
        lines.append(
            f"| {name} | {result['status']} | {result['seconds']} | {result.get('why', result.get('log', ''))} |"
        )
    (folder / "SUMMARY.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if os.environ.get("OUT"):
        out = Path(os.environ["OUT"])
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / "gpu-results.tar.gz", "w:gz") as archive:
            archive.add(folder, "gpu-results")
        for name in ("SUMMARY.md", "report.html"):
            if (folder / name).exists():
                shutil.copy(folder / name, out / name)


def tail(path: Path) -> str:
    return "\n".join("    " + line for line in path.read_text(errors="replace").splitlines()[-TAIL:])


def run(options: argparse.Namespace, stages: list[Stage], folder: Path, no_gpu: str | None) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    before = folder / "summary.json"
    results: dict[str, dict[str, object]] = {}
    if before.exists():
        found = json.loads(before.read_text(encoding="utf-8"))
        # Another commit's results are not this one's.
        results = found["stages"] if found["commit"] == commit and not options.again else {}
    deadline = time.monotonic() + 60 * options.minutes
    for stage in stages:
        if results.get(stage.name, {}).get("status") in ("ok", "nothing to do"):
            print(f"{stage.name:24} done before", flush=True)
            continue
        left = deadline - time.monotonic() - (0 if stage is stages[-1] else RESERVE)
        if no_gpu and not options.rehearse:
            result: dict[str, object] = {"status": "cannot run", "why": no_gpu, "seconds": 0.0}
        elif left < 5:
            result = {"status": "cannot run", "why": f"the {options.minutes:g} minutes are over", "seconds": 0.0}
        else:
            print(f"{stage.name:24} {stage.title} ...", flush=True)
            result = run_stage(stage, options, folder, min(stage.seconds * options.patience, left))
        results[stage.name] = result
        write_summary(folder, results, commit)
        print(f"{stage.name:24} {result['status']}, {result['seconds']} s {result.get('why', '')}".rstrip(), flush=True)
        if result["status"] in ("failed", "timed out"):
            print(tail(folder / f"{stage.name}.log"), flush=True)
    bad = [name for name in (stage.name for stage in stages) if results[name]["status"] not in ("ok", "nothing to do")]
    print(f"{len(stages) - len(bad)} of {len(stages)} stages passed; results in {folder}")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help="these stages alone")
    parser.add_argument("--skip", nargs="+", choices=names, metavar="STAGE", default=[], help="all but these")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (default: 8.5)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on each stage's own limit")
    parser.add_argument("--full", action="store_true", help="more dtypes, samples and tools; give it more --minutes")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: every command, on the CPU")
    parser.add_argument("--list", action="store_true", help="name the stages and their limits")
    options = parser.parse_args(argv)
    stages = [s for s in STAGES if s.name in (options.only or names) and s.name not in options.skip]
    if options.list:
        for stage in stages:
            print(f"{stage.name:24} {stage.seconds:4} s  {stage.title}")
        return 0
    folder = ROOT / "gpu-results"
    return run(options, stages, folder, why_no_gpu())


if __name__ == "__main__":
    sys.exit(main())
