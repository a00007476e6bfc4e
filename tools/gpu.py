"""Everything that needs an NVIDIA GPU, in one command: build, test, sanitize, tune, measure. No network.

    python tools/gpu.py                       # all stages, under nine minutes
    python tools/gpu.py --only build ops-mlp  # some stages
    python tools/gpu.py --minutes 25 --full   # more samples, dtypes and tools
    python tools/gpu.py --rehearse            # every stage on a machine without a GPU, on the CPU
    python tools/gpu.py --list

It runs with the machine's own Python and torch, in place. Every stage has a time limit of its own and a log; later ones
run if an earlier one fails. Results and logs lie in gpu-results/, and what passed there is not run again until a source
changes (``--again`` does it anyway). After every stage, so that a run which is cut short keeps what it has, SUMMARY.md
says what came out, and where OUT is set, that folder gets it, the report and everything else as one archive.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
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
SANITIZE_SECONDS = 75
SOURCES = ("csrc/**/*", "kernels/**/*", "llmfast/**/*.py", "tests/**/*", "tools/*.py", "setup.py", "CMakeLists.txt")


@dataclass(frozen=True)
class Stage:
    """One command: ``command(options, folder)`` gives its words, or the reason why it cannot run as a string.

    interpreted: in a rehearsal Triton's interpreter stands in for the GPU, where Triton is installed.
    """

    name: str
    seconds: int
    title: str
    command: Callable[[argparse.Namespace, Path], list[str] | str]
    environment: dict[str, str] = field(default_factory=dict)
    interpreted: bool = False


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def device(options: argparse.Namespace) -> list[str]:
    return ["--device", "cpu" if options.rehearse else "cuda"]


def facts(options: argparse.Namespace, folder: Path) -> list[str] | str:
    return ["bash", "-c", "nvidia-smi; nvcc --version; " + " ".join(python("-m", "llmfast", "info"))]


def conformance(options: argparse.Namespace, folder: Path) -> list[str] | str:
    major, minor = options.gpu[1] if options.gpu else (0, 0)
    arch = f"{major}{minor}" + "a" * (major >= 9)  # "a": wgmma and its kind, for this architecture alone
    nvcc = f"nvcc -std=c++17 -gencode arch=compute_{arch},code=sm_{arch}"
    compiler = "g++ -std=c++17 -DLLMFAST_EMULATE -x c++" if options.rehearse else nvcc
    if shutil.which(compiler.split()[0]) is None:
        return f"no {compiler.split()[0]} on PATH"
    program = folder / "conformance"
    return ["bash", "-c", f"{compiler} -Icsrc tests/emulation/conformance.cu -o {program} && {program}"]


def build(options: argparse.Namespace, folder: Path) -> list[str] | str:
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH"
    if options.gpu and not options.full:  # for the GPU that is here: the others' code takes as long again
        own = {8: "80", 9: "90a"}.get(options.gpu[1][0])
        if own:
            os.environ.setdefault("LLMFAST_CUDA_ARCHS", own)
    return python("setup.py", "build_ext", "--inplace")


def tests(*paths: str, **extra: str) -> Callable[[argparse.Namespace, Path], list[str] | str]:
    def command(options: argparse.Namespace, folder: Path) -> list[str] | str:
        found = [path for path in paths if (ROOT / path).exists()]
        if not found:
            return f"no {' or '.join(paths)} here"
        chosen = extra["rehearsal" if options.rehearse else "gpu"]
        words = ["-q", "-p", "no:cacheprovider", "-k", chosen, "--maxfail=40"]
        if not options.rehearse and importlib.util.find_spec("xdist"):
            words += ["-n", "6"]  # most of the time is Triton's compiler
        return python("-m", "pytest", *words, *found)

    return command


def sanitize(options: argparse.Namespace, folder: Path) -> list[str] | str:
    program = python("tools/gpu_small_shapes.py", *device(options))
    if options.rehearse:
        return program
    if shutil.which("compute-sanitizer") is None:
        return "no compute-sanitizer on PATH"
    # Ours alone are instrumented: PyTorch's own kernels would take most of the time.
    own = [
        "llmfast",
        *{n for f in ROOT.glob("kernels/*.py") for n in re.findall(r"^def (_\w+)\(", f.read_text(), re.M)},
    ]
    filters = " ".join(f"--kernel-name kns={name}" for name in sorted(own))
    tools = ["memcheck", "racecheck"] + ["initcheck", "synccheck"] * options.full
    each = round(0.9 * SANITIZE_SECONDS * options.patience / len(tools))
    run = f"timeout {each} compute-sanitizer --target-processes application-only --error-exitcode 9 --tool $tool"
    run += f" {filters} {' '.join(program)}"
    return ["bash", "-c", f"bad=0; for tool in {' '.join(tools)}; do echo == $tool; {run} || bad=$?; done; exit $bad"]


def tune(options: argparse.Namespace, folder: Path) -> list[str] | str:
    if importlib.util.find_spec("triton") is None:
        return python("-c", "import llmfast.bench.tune") if options.rehearse else "no triton"
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
        words += "--model tiny --block-size 32 --batch-size 1 --turns 1 --providers llmfast eager".split()
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
    Stage("build", 200, "the extension, in place, with nvcc where it is", build),
    Stage("facts", 30, "driver, compiler, what llmfast sees", facts),
    Stage("kernels", 90, "every implementation on the GPU against float64",
          tests("tests/ops/test_ops_accuracy.py", "tests/emulation/test_emulated_ops.py", gpu="cuda and at_most",
                rehearsal="layer_norm and (at_most or float64) and not -torch-"), interpreted=True),
    *(Stage(f"ops-{name}", 60, f"bench ops {name}", ops(name)) for name in OPS),
    Stage("train", 150, "bench train: GPT-2 124M", train),
    Stage("tune", 45, "the shipped configurations of the Triton kernels", tune, interpreted=True),
    # PyTorch's allocator would hide a read beyond a tensor.
    Stage("sanitize", SANITIZE_SECONDS, "compute-sanitizer on small shapes", sanitize,
          {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    Stage("compile", 60, "torch.compile and opcheck on the GPU",
          tests("tests/ops/test_ops_compile.py", "tests/kernels/test_raw_ops.py", gpu="cuda", rehearsal="layer_norm"),
          interpreted=True),
    Stage("report", 20, "one page of the results", report),
]  # fmt: skip
RESERVE = 25.0  # seconds kept for the last stage


def find_gpu() -> tuple[str, list[int]] | str:
    """(name, compute capability) of the GPU, or why torch sees none."""
    code = "import torch as t; c = t.cuda; g = c.is_available(); import json"
    code += "; print(json.dumps([t.__version__, *([c.get_device_name(), c.get_device_capability()] if g else [])]))"
    done = subprocess.run(python("-c", code), capture_output=True, text=True)
    if done.returncode:
        return f"{sys.executable} cannot import torch"
    version, *gpu = json.loads(done.stdout.splitlines()[-1])
    return (gpu[0], gpu[1]) if gpu else f"torch {version} sees no NVIDIA GPU"


def prepare() -> None:
    """What the stages expect: this Python's programs and CUDA's on PATH, the Triton kernels inside the package."""
    ends = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(filter(None, ends))
    # In a checkout they lie beside the package; an installed one has them inside.
    link = ROOT / "llmfast" / "kernels"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to("../kernels")


def commit() -> str:
    """The checkout's commit; empty where this is none."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def sources() -> str:
    """A digest of everything that a stage builds, tests or runs: results of other sources are not these sources'."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_stage(stage: Stage, options: argparse.Namespace, folder: Path, seconds: float) -> dict[str, object]:
    """Runs one stage within ``seconds``; all of its processes end with it."""
    command = stage.command(options, folder)
    if isinstance(command, str):
        return {"status": "cannot run", "why": command, "seconds": 0.0}
    log, began = folder / f"{stage.name}.log", time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    if options.rehearse and stage.interpreted:
        environment["TRITON_INTERPRET"] = "1"
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


def write_summary(folder: Path, results: dict[str, dict[str, object]], what: dict[str, str]) -> None:
    whole = {"schema": 1, **what, "stages": results}
    (folder / "summary.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    head = f"# {what['machine']}, commit {what['commit'] or 'unknown'}, sources {what['sources']}"
    lines = [head, "", "| stage | | seconds | |", "|---|---|---|---|"]
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


def run(options: argparse.Namespace, stages: list[Stage], folder: Path, gpu: tuple[str, list[int]] | str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    no_gpu = gpu if isinstance(gpu, str) else None
    options.gpu = None if no_gpu else gpu
    what = {"machine": no_gpu or str(gpu[0]), "commit": commit(), "sources": sources()}
    before = folder / "summary.json"
    results: dict[str, dict[str, object]] = {}
    if before.exists() and not options.again:
        found = json.loads(before.read_text(encoding="utf-8"))
        if all(found.get(key) == what[key] for key in ("machine", "sources")):
            results = found["stages"]
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
        write_summary(folder, results, what)
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
    prepare()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the stage which runs ends as well
    try:
        return run(options, stages, ROOT / "gpu-results", find_gpu())
    except KeyboardInterrupt:
        print("stopped; the stages that ended keep their results", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
