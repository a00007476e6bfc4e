"""Plants bugs in the CUDA kernels by rule; the emulator must find every one that changes results or memory safety.

    python tests/emulation/mutate.py                     # a fixed sample of every file, as CI runs it
    python tests/emulation/mutate.py attention_tile.h --most 100 --seed 3

A mutant is one place of one file, changed by one rule. It is compiled for one data type and run against float64 under
several schedules (release), then with ASan and UBSan, then with the race detector, until one of them objects. The
mutants that none objects to must be in HARMLESS, each with what makes it so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import BUILDS, CSRC, FLAGS, HERE, run

CUDA = CSRC / "cuda"
BFLOAT16 = 2  # its number in DType

# rule -> what it looks for, and what it writes instead; several pairs are several kinds of the same mistake
RULES: dict[str, list[tuple[str, str]]] = {
    "missing barrier": [(r"__sync(threads|warp)\(\);", ";"), (r"named_barrier\w*\([^;]*\);", ";")],
    "missing wait": [(r"(cp_async|wgmma|tma)_wait\w*<[^>]+>\(\);", ";"), (r"barrier_wait\([^;]*\);", ";")],
    "missing arrival": [(r"barrier_arrive\w*\([^;]*\);", ";")],
    "wait for too little": [
        (r"((?:cp_async|wgmma)_wait)<0>", r"\1<1>"),
        (r"((?:cp_async|wgmma)_wait)<1>", r"\1<2>"),
        (r"_wait<kStages - 2>", "_wait<kStages - 1>"),
    ],
    "missing commit": [(r"(cp_async|wgmma)_commit\(\);", ";")],
    "off by one": [(r"(?<=[\w\])]) < (?=[\w(])", " <= "), (r"(?<=[\w\])]) <= (?=[\w(])", " < ")],
    "missing mask": [
        (r"const bool (there|seen|inside|ok) = [^;]*;", r"const bool \1 = true;"),
        (r"if \((\w+(?: \+ [\w *]+)?) < [\w.]+\)", r"if (\1 >= 0)"),
        (r"&& [\w.+* ]+ < [\w.]+(?=[;)])", ""),
    ],
    "wrong fragment": [
        (r"lane / 4\b", "lane % 8"),
        (r"lane % 4\b", "(lane & 1)"),
        (r"lane & 15\b", "lane & 7"),
        (r"lane >> 4\b", "(lane >> 3 & 1)"),
        (r"\+ 8 \* (\w+)", r"+ 4 * \1"),
        (r"(ldmatrix<\d), true>", r"\1, false>"),
        (r"i % 2 \* 2 \+ 1\]", "i % 2 * 2]"),
    ],
    "wrong lane": [(r"(__shfl_xor_sync\([^;]*), 2\)", r"\1, 1)"), (r"offset = 16;", "offset = 8;")],
    "misaligned access": [(r"(chunk|c) \* (kWidth|N)\b", r"\1 * \2 + 1"), (r"\* int\(16 / sizeof\(T\)\)", "* 4")],
    "wrong stage": [(r"tile % 2 \*", "0 *"), (r"stage \* (k\w+)", r"0 * \1"), (r"step % kStages \*", "0 *")],
    "forgotten factor": [
        (r" \*= shrink;", " *= 1.f;"),
        (r" \* (a\.)?scale\b", ""),
        (r"\? a\.dropout\.scale :", "? 1.f :"),
    ],
    "too little shared memory": [(r"(kBytes|n \* sizeof\(float\)), stream", r"\1 - 16, stream")],
}

# ... and those of the files with fewer places for the rules above.
MORE: dict[str, list[tuple[str, str]]] = {
    "not zeroed": [(r"= 0\.f(?=[,;])", "= 1.f"), (r": T\(0\.f\)", ": T(1.f)"), (r"\] = \{\};", "] = {1.f};")],
    "neighbour's place": [(r"\[(k\w+|2 \* k\w+) \+ (\w+)\]", r"[\2]"), (r"\((full|empty) \+ s\b", r"(\1")],
    "forgotten maximum": [(r"fmaxf\((\w+), \w+\)", r"\1"), (r"      top = x;\n", "")],
    "wrong turn": [(r"step / kStages & 1\b", "0"), (r"(step - 1) % kStages", r"0 % kStages")],
    "forgotten term": [(r" \* (g\.)?factor\b", ""), (r"activate_backward\(\w+, float\([^()]*\)\)", "1.f")],
    "beside its alignment": [(r"(\w+) \+ at\)", r"\1 + at + 1)")],
}


@dataclass(frozen=True)
class Target:
    """What tests a file: the driver, and the sources whose kernels it calls."""

    driver: str
    sources: tuple[str, ...]
    dtype: int = BFLOAT16
    cases: int = 14
    more: bool = False  # the rules of MORE too


ATTENTION = Target(
    "attention.cpp",
    ("attention_forward.cu", "attention_forward_sm90.cu", "attention_backward.cu", "attention_backward_sm90.cu"),
    cases=120,
)
GEMM = Target("gemm.cpp", ("gemm.cu", "gemm_sm90.cu"), cases=40)
TARGETS = {
    "lora_linear.cu": Target("lora_linear.cpp", ("lora_linear.cu",), cases=40),
    "layer_norm.cu": Target("layer_norm.cpp", ("layer_norm.cu",), cases=40),
    "cross_entropy.cu": Target("cross_entropy.cpp", ("cross_entropy.cu",), cases=40, more=True),
    "activation.cu": Target("activation.cpp", ("activation.cu",), cases=40, more=True),
    "gemm.cu": GEMM,
    "gemm_sm90.cu": GEMM,
    "gemm_epilogue.h": GEMM,
    "pipeline.h": GEMM,
    "attention_tile.h": ATTENTION,
    "attention_forward.cu": ATTENTION,
    "attention_forward_sm90.cu": ATTENTION,
    "attention_backward.cu": ATTENTION,
    "attention_backward_sm90.cu": ATTENTION,
}

# (file, rule, the changed line) -> why nothing can object
HARMLESS: dict[tuple[str, str, str], str] = {
    (
        "attention_backward.cu",
        "misaligned access",
        "for (int chunk = lane % 2; query + row < a.Tq && chunk * kWidth < a.D; chunk += 2) {",
    ): "a bound, no address: chunks are as wide as D is a multiple of",
    (
        "layer_norm.cu",
        "off by one",
        "for (int64_t row0 = int64_t(blockIdx.x) * blockDim.y; row0 < rows; row0 += int64_t(gridDim.x) * blockDim.y) {",
    ): "one more step, in which no row is there",
    (
        "lora_linear.cu",
        "off by one",
        "constexpr int kChunks = W / 8, kRowsOfBanks = kChunks < 8 ? 8 / kChunks : 1, "
        "kExchanged = kChunks < 8 ? kChunks : 8;",
    ): "where the two are equal, either is right",
    ("attention_forward.cu", "off by one", "if (a.scale < 0.f) Mma<T>::negate(f);"): "a scale of zero has no sign",
    ("attention_forward.cu", "missing mask", "if (tile + 1 < tiles) load_keys(tile + 1);"): "copies zeros once more",
    ("cross_entropy.cu", "off by one", "const int head = misfit == 0 ? 0 : N - misfit < V ? N - misfit : V;"): (
        "where the two are equal, either is right"
    ),
    ("cross_entropy.cu", "not zeroed", "float top = kLowest, sum = 0.f, total = 0.f;  // of z log2(e), for exp2"): (
        "a share whose maximum is kLowest is scaled by 2^-inf where it meets another"
    ),
    ("activation.cu", "not zeroed", "in.v[e] = at + e < n ? h[at + e] : T(0.f);"): "beyond n nothing is stored",
    ("activation.cu", "not zeroed", "if (kBackward) gradient.v[e] = at + e < n ? dh[at + e] : T(0.f);"): (
        "beyond n nothing is stored"
    ),
    ("gemm_epilogue.h", "off by one", "const int height = rows - first < kGroup ? rows - first : kGroup;"): (
        "where the two are equal, either is right"
    ),
    ("activation.cu", "off by one", "const bool whole = at + N <= n;"): ("the last whole pack goes element by element"),
    ("activation.cu", "off by one", "for (int e = 0; e < N; ++e) {"): "the loop over the rest ends with the array",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    rule: str
    line: int
    text: str  # of the line as it was
    source: str  # of the whole file, changed


def code_of(source: str) -> str:
    """The source with comments blanked, of the same length."""
    return re.sub(r"//[^\n]*", lambda match: " " * len(match[0]), source)


def mutants(file: str) -> list[Mutant]:
    source = (CUDA / file).read_text(encoding="utf-8")
    code, found = code_of(source), []
    rules = {**RULES, **MORE} if TARGETS[file].more else RULES
    for rule, pairs in rules.items():
        for old, new in pairs:
            for match in re.finditer(old, code):
                start = code.rfind("\n", 0, match.start()) + 1
                text = source[start : source.find("\n", start)]
                if text.lstrip().startswith(("#", "template", "static_assert", "using")):
                    continue
                changed = source[: match.start()] + match.expand(new) + source[match.end() :]
                found.append(Mutant(file, rule, source.count("\n", 0, start) + 1, text.strip(), changed))
    return found


def sample(found: list[Mutant], most: int, rng: random.Random) -> list[Mutant]:
    """At most ``most``, of as many rules as there are."""
    by_rule = [[m for m in found if m.rule == rule] for rule in (*RULES, *MORE)]
    for some in by_rule:
        rng.shuffle(some)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_rule))
    return [m for m in turns if m is not None][:most]


def one_type(source: str) -> str:
    """Of a dispatch over the data types, the bfloat16 one alone: a third of the time to compile."""
    return re.sub(r" *case DType::f(32|16): return [\w<>]+\([^;]*\);\n", "", source)


def gcc(*words: object) -> None:
    command = ["nice", "g++", *FLAGS.split(), "-w", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


class Workshop:
    """Compiled parts in a directory: drivers and unchanged sources once, mutants one by one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts: dict[tuple[str, str], Path] = {}
        self.lock = threading.Lock()  # a part is compiled once

    def part(self, build: str, source: Path) -> Path:
        """The object of an unchanged source."""
        key = (build, source.name)
        with self.lock:
            if key not in self.parts:
                out = self.directory / f"{build}-{source.name}.o"
                flags = BUILDS[build][0 if source.suffix == ".cu" else 1].split()
                copy = self.directory / source.name
                copy.write_text(one_type(source.read_text(encoding="utf-8")), encoding="utf-8")
                gcc(*flags, f"-I{CSRC}", f"-I{HERE}", f"-I{source.parent}", "-x", "c++", "-c", copy, "-o", out)
                self.parts[key] = out
        return self.parts[key]

    def program(self, build: str, target: Target, mutant: Mutant | None, folder: Path) -> Path:
        objects = [self.part(build, HERE / target.driver)]
        if build == "race":
            objects.append(self.part(build, CSRC / "emulation/race.cpp"))
        for name in target.sources:
            if mutant is None or (name != mutant.file and mutant.file.endswith(".cu")):
                objects.append(self.part(build, CUDA / name))
                continue
            copy = folder / "cuda"  # its headers shadow the originals
            if not copy.exists():
                shutil.copytree(CUDA, copy)
                for path in copy.iterdir():
                    path.write_text(one_type(mutant.source if path.name == mutant.file else path.read_text()))
            objects.append(folder / f"{build}-{name}.o")
            flags = BUILDS[build][0].split()
            gcc(*flags, f"-I{folder}", f"-I{CSRC}", "-x", "c++", "-c", copy / name, "-o", objects[-1])
        out = folder / build
        gcc("-o", out, *objects, *BUILDS[build][2].split(), "-ldl")
        return out


# build, its share of the cases, environment
LANES = [("release", 1, {}), ("sanitized", 4, {}), ("race", 8, {}), ("race", 16, {"LLMFAST_RACE_GLOBAL": "1"})]


NO_PROGRAM = "no bug: it does not compile"


def objection(workshop: Workshop, target: Target, mutant: Mutant | None) -> str | None:
    """The first lane's complaint; None if none has one."""
    with tempfile.TemporaryDirectory(dir=workshop.directory) as name:
        programs: dict[str, Path] = {}
        for build, share, environment in LANES if mutant else LANES[:1]:  # the tests run the others on it as it is
            try:
                if build not in programs:
                    programs[build] = workshop.program(build, target, mutant, Path(name))
            except RuntimeError:
                if mutant is None:
                    raise
                return NO_PROGRAM
            cases = max(1, target.cases // share)
            try:
                done = run(programs[build], cases, 1, target.dtype, **environment)
            except subprocess.TimeoutExpired:
                return f"{build}: does not end"
            if done.returncode:
                said = re.search(r"(case \d+: .*|SUMMARY: .*|.*runtime error: .*)", done.stdout + done.stderr)
                return f"{build}: {said[0][:150] if said else f'exit code {done.returncode}'}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TARGETS), help="of csrc/cuda (default: all)")
    parser.add_argument("--most", type=int, default=14, help="mutants of a file (default: 14)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        workshop = Workshop(Path(name))
        for file in options.files:
            target = TARGETS[file]
            clean = objection(workshop, target, None)
            if clean:
                print(f"{file} as it is: {clean}")
                return 1
            chosen = sample(mutants(file), options.most, random.Random(options.seed))
            said = pool.map(lambda mutant, target=target: objection(workshop, target, mutant), chosen)
            missed = planted = 0
            for mutant, what in zip(chosen, said, strict=True):
                planted += what != NO_PROGRAM
                why = HARMLESS.get((mutant.file, mutant.rule, mutant.text))
                missed += what is None and why is None
                verdict = what or (f"harmless: {why}" if why else "NOT FOUND")
                print(f"{file}:{mutant.line}: {mutant.rule}: {mutant.text}\n    {verdict}", flush=True)
            print(f"== {file}: {planted} bugs by {len({m.rule for m in chosen})} rules, {missed} not found\n")
            failures += missed
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
