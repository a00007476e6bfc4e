"""Damaged and hostile checkpoints of every format that llmfast reads.

    python tests/interop/format_fuzz.py --cases 5000 --seed 1
    python tests/interop/format_fuzz.py --format nanogpt --seed 1 --only 4711    # one case again, with its trace

Every case must be a model that computes, or one ``UserError`` of one line; within 5 seconds, in no more memory than
twice the file's size and 256 MB, and without running anything that stands in the file. One line a format: models,
errors, slowest case, most memory. What is wrong is shown with the command that repeats it; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tensorflow_bundle
import torch
from format_samples import FORMATS

from llmfast import GPT
from llmfast.errors import UserError
from llmfast.interop import openai_tf

SECONDS = 5.0
MEMORY = 256 << 20  # bytes beside twice the file
NUMBERS = (0, 1, -1, 2, 255, 1 << 15, 1 << 24, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63))
VALUES = (*NUMBERS, 0.5, -1e308, float("nan"), float("inf"), True, None, "", "none", "x" * 5000, [], [1], {}, {"a": 1})
PICKLES = (".pt", ".pth", ".bin")
MARK = "executed"

Mutation = Callable[[random.Random, Path], None]


# What can happen to the bytes of any file.


def truncated(rng: random.Random, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, rng.randrange(9), rng.randrange(len(data)), len(data) - 1])])


def place(rng: random.Random, data: bytearray) -> int:
    """Somewhere, most often where headers and directories are."""
    near = rng.choice([64, 1024, 1024, len(data)])
    at = rng.randrange(min(near, len(data)))
    return rng.choice([at, len(data) - 1 - at])


def bits_flipped(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[place(rng, data)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def number_written(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    size, at = rng.choice([2, 4, 8]), place(rng, data) // 4 * 4
    data[at : at + size] = (rng.choice(NUMBERS) & ((1 << 64) - 1)).to_bytes(8, "little")[:size]
    file.write_bytes(data)


def piece_moved(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    start, size = place(rng, data), rng.choice([1, 8, 100, 4096])
    piece = data[start : start + size]
    change = rng.randrange(3)
    if change == 0:
        del data[start : start + size]
    elif change == 1:
        at = place(rng, data)
        data[at:at] = piece
    else:
        data[start : start + size] = bytes(len(piece))
    file.write_bytes(data)


def replaced(rng: random.Random, file: Path) -> None:
    """By something else altogether."""
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.symlink_to(file.name)
    elif kind == 2:
        file.write_bytes(rng.randbytes(rng.randrange(3000)))
    elif kind == 3:
        file.write_bytes(b"[" * 200_000)
    elif kind == 4:
        other = FORMATS[rng.choice(list(FORMATS))]
        with tempfile.TemporaryDirectory(dir=file.parent.parent) as folder:
            other(Path(folder, "other"))
            sources = sorted(path for path in Path(folder, "other").iterdir() if path.is_file())
            shutil.copy(rng.choice(sources), file)


# What an attacker writes, who knows the format.


def json_changed(rng: random.Random, file: Path) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    _change(rng, values)
    file.write_text(json.dumps(values), encoding="utf-8")


def _change(rng: random.Random, values: Any) -> None:
    while True:
        key = rng.choice(list(values)) if isinstance(values, dict) else rng.randrange(len(values))
        inner = values[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            values = inner
            continue
        if isinstance(values, dict) and rng.random() < 0.2:
            del values[key]
        elif isinstance(inner, int) and rng.random() < 0.3:
            values[key] = inner + rng.choice([-1, 1])
        else:
            values[key] = rng.choice(VALUES)
        return


def safetensors_header_changed(rng: random.Random, file: Path) -> None:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.2:
        first, second = rng.sample([name for name in header if name != "__metadata__"], 2)
        header[first] = header[second]
    else:
        _change(rng, header)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) & ((1 << 64) - 1)
    file.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def header_changed(rng: random.Random, file: Path) -> None:
    """llm.c's int32 numbers."""
    data = bytearray(file.read_bytes())
    at = 4 * rng.randrange(9)
    (value,) = struct.unpack_from("<i", data, at)
    changed = rng.choice([value + 1, value - 1, 2 * value, -value, *(n for n in NUMBERS if abs(n) < 1 << 31)])
    struct.pack_into("<i", data, at, max(-(1 << 31), min(changed, (1 << 31) - 1)))
    file.write_bytes(data)


def table_changed(rng: random.Random, file: Path) -> None:
    """TensorFlow's index with entries that lie, its checksums right."""
    pairs = list(openai_tf._table(file.read_bytes()))
    at = rng.randrange(len(pairs))
    key, value = pairs[at]
    kind = rng.randrange(5)
    if kind == 0:
        changed = bytearray(value or b"\0")
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        pairs[at] = key, bytes(changed)
    elif kind == 1:
        pairs[at] = bytes(rng.choice([key[:-1], key + b"x", rng.randbytes(5), b"model/h99999999999/ln_1/g"])), value
    elif kind == 2:
        shape = tuple(abs(rng.choice(NUMBERS)) for _ in range(rng.choice([0, 1, 2, 3, 50])))
        lie = {rng.choice(["shard", "offset", "size"]): rng.choice(NUMBERS) & ((1 << 64) - 1)}
        pairs[at] = key, tensorflow_bundle.entry(shape, 0, bytes(96), dtype=rng.choice([0, 1, 2, 7, 14]), **lie)
    elif kind == 3:
        pairs[at] = key, tensorflow_bundle.header(rng.choice(NUMBERS) & ((1 << 31) - 1))
    else:
        del pairs[at]
    file.write_bytes(tensorflow_bundle.table(sorted(pairs), rng.choice([1, 7, 100])))


def pickle_changed(rng: random.Random, file: Path) -> None:
    """The pickle inside of a file of torch.save, the archive around it whole."""
    entries = _entries(file)
    if entries is None:
        return bits_flipped(rng, file)
    name = next(name for name in entries if name.endswith("data.pkl"))
    inner = file.with_name("inner")
    inner.write_bytes(entries[name])
    rng.choice([truncated, bits_flipped, number_written, piece_moved])(rng, inner)
    entries[name] = inner.read_bytes()
    inner.unlink()
    _zip(file, entries)


def archive_changed(rng: random.Random, file: Path) -> None:
    entries = _entries(file)
    if entries is None:
        return piece_moved(rng, file)
    name = rng.choice(list(entries))
    kind = rng.randrange(5)
    if kind == 0:
        del entries[name]
    elif kind == 1:
        entries[name] = entries[name][: rng.randrange(len(entries[name]) + 1)]
    elif kind == 2:
        entries[rng.choice(["../out", "/tmp/out", "archive/data/0", "x" * 300])] = entries.pop(name)
    elif kind == 3:
        entries[name] = bytes(50 << 20)  # small when compressed
    _zip(file, entries, zipfile.ZIP_DEFLATED if kind in (3, 4) else zipfile.ZIP_STORED)


class Hostile:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def hostile_pickle(rng: random.Random, mark: Path) -> bytes:
    """A pickle that makes the file ``mark``, by one of the ways that there are."""
    command = f"echo > {mark}"
    code = f"open({str(mark)!r}, 'w')"
    made = rng.choice([
        Hostile(os.system, (command,)),
        Hostile(eval, (code,)),
        Hostile(exec, (code,)),
        Hostile(__import__("subprocess").call, (["touch", str(mark)],)),
        Hostile(torch.save, ({}, str(mark))),
        Hostile(torch.load, (str(mark),)),
        Hostile(getattr, ("text", "upper")),
        Hostile(pickle.loads, (pickle.dumps(Hostile(eval, (code,))),)),
    ])  # fmt: skip
    text = repr(command).encode()
    protocol_0 = b"cos\nsystem\n(S" + text + b"\ntR."
    by_hand = [protocol_0, b"(S" + text + b"\nios\nsystem\n.", b"(cos\nsystem\nS" + text + b"\no."]
    nested = {"model": {"transformer.wte.weight": made}, "model_args": made}
    return rng.choice([*by_hand, *(pickle.dumps(value, protocol=rng.randrange(6)) for value in (made, [made], nested))])


def code_inside(rng: random.Random, file: Path) -> None:
    hostile = hostile_pickle(rng, file.parent.parent / MARK)
    entries = _entries(file)
    kind = rng.randrange(4)
    if kind == 0 or entries is None:
        start = b"" if kind == 1 else b"\x80\x02"
        file.write_bytes(start + hostile.removeprefix(start) + file.read_bytes())
        return
    name = next(name for name in entries if name.endswith("data.pkl"))
    # Alone, or before what was there; or as a second pickle under another name.
    entries[name if kind < 3 else "x/data.pkl"] = hostile if kind == 1 else hostile[:-1] + b"0" + entries[name]
    _zip(file, entries)


def _entries(file: Path) -> dict[str, bytes] | None:
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(file: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


ANY: tuple[Mutation, ...] = (truncated, bits_flipped, bits_flipped, number_written, piece_moved)


def mutations(file: Path) -> tuple[Mutation, ...]:
    """Those that fit a file, the knowing ones as often as all of the others."""
    if file.suffix == ".json":
        return *ANY, *[json_changed] * 5
    if file.suffix == ".safetensors":
        return *ANY, *[safetensors_header_changed] * 5
    if file.suffix == ".index":
        return *ANY, *[table_changed] * 5
    if file.name == "model.bin":
        return *ANY, *[header_changed] * 5
    if file.suffix in PICKLES:
        return *ANY, pickle_changed, pickle_changed, archive_changed, code_inside, code_inside
    return ANY


# Running them.


@dataclass
class Outcome:
    """What became of the cases of one format."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.counts.total():>6} cases{self.counts['model']:>6} models{self.counts['error']:>6} errors"
        most = f"slowest {self.slowest:5.2f} s   most memory {self.memory / 1e6:6.1f} MB"
        return f"{self.name:<12}{counts}   {most}   {len(self.wrong)} wrong"


def mutate(name: str, seed: int, case: int, original: Path, folder: Path) -> str:
    """Case ``case`` of a format in the new ``folder``; returns what was done."""
    shutil.copytree(original, folder)
    rng = random.Random(f"{seed} {name} {case}")
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    weights = [4 if path.suffix == ".index" else max(1, min(4, path.stat().st_size // 1000)) for path in files]
    (file,) = rng.choices(files, weights)
    change = replaced if rng.random() < 0.03 else rng.choice(mutations(file))
    change(rng, file)
    return f"{change.__name__} in {file.name}"


def attempt(path: Path) -> str:
    """ "model", "error", or what is wrong."""
    try:
        model = GPT.from_pretrained(path).eval()
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))
    except UserError as error:
        text = str(error)
        return "error" if text and "\n" not in text and len(text) < 10_000 else f"not one clear line: {text[:300]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "model"


def peak_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def work(name: str, seed: int, cases: list[int], original: Path, home: Path, pipe: Connection) -> None:
    """Run the cases one after the other; tell of each that it begins and how it ended."""
    torch.set_num_threads(1)
    logging.disable()
    limit = 2 * sum(path.stat().st_size for path in original.iterdir()) + MEMORY
    attempt(original)  # what is loaded and allocated once
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * limit, resource.RLIM_INFINITY))  # the machine's safety
    for case in cases:
        folder = home / "case"
        pipe.send((case, "being made", None, 0.0, 0))
        done = mutate(name, seed, case, original, folder)
        pipe.send((case, done, None, 0.0, 0))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, start = peak_memory(), time.monotonic()
        result = attempt(folder)
        seconds, memory = time.monotonic() - start, peak_memory() - before
        if (home / MARK).exists():
            result = "code was executed"
            (home / MARK).unlink()
        elif seconds > SECONDS:
            result = f"{seconds:.1f} s"
        elif memory > limit:
            result = f"{memory / 1e6:.0f} MB"
        pipe.send((case, done, result, seconds, memory))
        shutil.rmtree(folder)


def run(name: str, seed: int, cases: int) -> Outcome:
    """Cases 0 to ``cases`` - 1 of one format, each in a process that may die."""
    outcome, context = Outcome(name), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as home:
        original = Path(home, "original")
        FORMATS[name](original)
        left = list(range(cases))
        while left:
            shutil.rmtree(Path(home, "case"), ignore_errors=True)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, seed, left, original, Path(home), theirs))
            process.start()
            theirs.close()
            done, result = "nothing", "hung"
            while left:
                try:
                    if not ours.poll(4 * SECONDS):
                        break
                    case, done, result, seconds, memory = ours.recv()
                except EOFError:
                    result = "the process died"
                    break
                if result is None:
                    result = "hung"
                    continue
                left.remove(case)
                outcome.slowest, outcome.memory = max(outcome.slowest, seconds), max(outcome.memory, memory)
                _count(outcome, seed, case, done, result)
            process.kill()
            process.join()
            if left:
                _count(outcome, seed, left.pop(0), done, result)
    return outcome


def _count(outcome: Outcome, seed: int, case: int, done: str, result: str) -> None:
    known = result in ("model", "error")
    outcome.counts[result if known else "wrong"] += 1
    if not known:
        command = f"--format {outcome.name} --seed {seed} --only {case}"
        outcome.wrong.append(f"{result} ({done}; python tests/interop/format_fuzz.py {command})")


def repeat(name: str, seed: int, case: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        FORMATS[name](Path(home, "original"))
        print(mutate(name, seed, case, Path(home, "original"), Path(home, "case")))
        try:
            print(GPT.from_pretrained(Path(home, "case")).config)
        except Exception:
            traceback.print_exc()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="a format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--only", type=int, help="this case alone, in this process")
    options = parser.parse_args()
    if options.only is not None:
        repeat(options.format[0], options.seed, options.only)
        return 0
    print(f"seed {options.seed}, {options.cases} cases a format")
    wrong = []
    for name in options.format:
        outcome = run(name, options.seed, options.cases)
        print(outcome, flush=True)
        wrong += outcome.wrong
    print(*wrong[:100], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
