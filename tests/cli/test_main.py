"""The command as a process: it answers at once, and whatever happens ends in an exit code and one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType

import pytest

import llmfast
from llmfast.cli import main as cli
from llmfast.errors import UserError

COMMAND = [sys.executable, "-m", "llmfast"]


def start(*words, code=None):
    command = COMMAND if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)


def only_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text


@pytest.fixture
def verb(monkeypatch):
    """Makes ``llmfast fail`` a verb that runs a function."""

    def install(function):
        module = ModuleType("failing_verb")
        module.Options = make_dataclass("Options", [])
        module.run = lambda _: function()
        monkeypatch.setitem(sys.modules, "failing_verb", module)
        monkeypatch.setitem(cli.VERBS, "fail", ("failing_verb", "fails"))

    return install


def test_version_and_help_name_every_verb():
    assert start("--version").stdout == f"llmfast {llmfast.__version__}\n"
    shown = start("--help").stdout
    for name, (_, help) in cli.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(help)}$", shown, re.M)
    assert start().stdout == start("help").stdout == shown


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_imports_neither_torch_nor_numpy(words):
    code = (
        "import sys; from llmfast.cli.main import main; code = main(); "
        "print(sorted({'torch', 'numpy', 'matplotlib', 'tiktoken'} & set(sys.modules)), code, file=sys.stderr)"
    )
    assert start(*words, code=code).stderr == "[] 0\n"


def test_help_is_there_within_six_times_the_bare_interpreter_s_start():
    def seconds(command):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    script = Path(sys.executable).with_name("llmfast")
    command = [str(script)] if script.exists() else COMMAND
    pairs = [(seconds([sys.executable, "-c", "pass"]), seconds([*command, "--help"])) for _ in range(7)]
    bare, help = (min(column) for column in zip(*pairs, strict=True))
    print(f"llmfast --help {help * 1e3:.1f} ms, bare interpreter {bare * 1e3:.1f} ms, ratio {help / bare:.2f}")
    assert help < 6 * bare + 0.05  # slack for a busy machine


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the file\nis  empty"), 2, "llmfast: error: the file is empty"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "b"), 2, "error: b: Permission denied"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (MemoryError(), 2, "error: out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 2, "error: out of memory (CUDA"),
        (KeyboardInterrupt(), 130, "llmfast: interrupted"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; run with LLMFAST_TRACEBACK=1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_is_one_line(verb, capsys, monkeypatch, error, code, said):
    monkeypatch.delenv("LLMFAST_TRACEBACK", raising=False)

    def fail():
        raise error

    verb(fail)
    assert cli.main(["fail"]) == code
    assert said in only_line(capsys.readouterr().err)


def test_an_error_of_ours_shows_its_trace_on_request(verb, monkeypatch):
    monkeypatch.setenv("LLMFAST_TRACEBACK", "1")
    verb(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_real_memory_errors_of_torch_are_told_as_such():
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert cli.out_of_memory(caught.value)
    assert cli.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not cli.out_of_memory(RuntimeError("shapes do not match"))


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen([*COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 0


def test_a_terminal_without_unicode_gets_question_marks():
    words = ["tokenizer", "decode", *map(str, "né".encode()), "--tokenizer", "byte"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "n?\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "No space left on device" in only_line(done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_is_one_line():
    code = (
        "import sys, time; from llmfast.cli import main as cli; "
        "cli._dispatch = lambda _: (print('ready', flush=True), time.sleep(30)); sys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert only_line(process.communicate(timeout=30)[1]) == "llmfast: interrupted\n"
    assert process.returncode == 130
