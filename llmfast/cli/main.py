"""``llmfast VERB``: finds the verb, runs it, and turns every mistake into one line.

A verb is a module here with either ``Options`` (a dataclass) and ``run(options) -> int``, or ``ACTIONS``, a table of
such pairs for verbs like ``tokenizer encode``. It is imported only when it is called, so that help answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import llmfast
from llmfast.errors import UserError

VERBS: dict[str, tuple[str, str]] = {
    "info": ("llmfast.cli.info", "which kernels run on this machine, and why not the others"),
    "download": ("llmfast.cli.download", "fetch public corpora and weights"),
    "tokenizer": ("llmfast.cli.tokenizer", "turn text into token ids and back; train a tokenizer"),
    "prepare": ("llmfast.cli.prepare", "turn text into token shards"),
    "pretrain": ("llmfast.cli.pretrain", "train a model on text"),
    "finetune": ("llmfast.cli.finetune", "fit a trained model to a task"),
    "classify": ("llmfast.cli.classify", "name the label of texts with a classifier"),
    "plan": ("llmfast.cli.plan", "parameters, memory and time of a pretraining before it starts"),
    "generate": ("llmfast.cli.generate", "write on from a prompt"),
    "chat": ("llmfast.cli.chat", "write with a model, in turns"),
    "evaluate": ("llmfast.cli.evaluate", "loss and perplexity on held-out text; accuracy of choices and labels"),
    "convert": ("llmfast.cli.convert", "models of other programs, in and out"),
    "judge": ("llmfast.cli.judge", "score a model's responses, by a judge model or against the references"),
    "reproduce": ("llmfast.cli.reproduce", "the book's figures, expected beside got, from OpenAI's GPT-2 weights"),
    "report": ("llmfast.cli.report", "training runs and benchmarks as one HTML page"),
    "bench": ("llmfast.cli.bench", "how fast this machine is, beside PyTorch and the peers"),
}

EXIT_BUG = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


def overview() -> str:
    """The text of ``llmfast --help``."""
    verbs = "\n".join(f"  {verb:<12}{help}" for verb, (_, help) in VERBS.items())
    return f"usage: llmfast VERB [options]\n\n{verbs}\n\nllmfast VERB --help shows a verb's options.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name (default: ``sys.argv``). Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? for a character that it lacks
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon_stdout()
        return 0
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except UserError as error:
        return _complain(f"error: {error}", EXIT_USER)
    except OSError as error:
        _abandon_stdout()
        return _complain(f"error: {_os_error(error)}", EXIT_USER)
    except Exception as error:
        if out_of_memory(error):
            return _complain(f"error: out of memory ({error}); use smaller batches or a smaller model", EXIT_USER)
        if os.environ.get("LLMFAST_TRACEBACK"):
            raise
        hint = "run with LLMFAST_TRACEBACK=1 for the trace"
        return _complain(f"internal error: {type(error).__name__}: {error}; {hint}", EXIT_BUG)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the host or a device has no memory left."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def load_verb(verb: str) -> Any:
    """The module of ``verb``; an unknown one is a ``UserError`` with a suggestion."""
    import importlib

    if verb not in VERBS:
        from llmfast.config import suggest

        if verb.startswith("-"):
            raise UserError(f"{verb} stands before the verb: llmfast VERB {verb}; verbs: {', '.join(VERBS)}")
        raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}; verbs: {', '.join(VERBS)}")
    return importlib.import_module(VERBS[verb][0])


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"llmfast {llmfast.__version__}")
        return 0
    verb, *rest = arguments
    module = load_verb(verb)

    from llmfast.cli.options import parse, pick_action

    title = VERBS[verb][1]
    if hasattr(module, "ACTIONS"):
        action = pick_action(verb, title, module.ACTIONS, rest)
        if action is None:
            return 0
        verb, title, cls, run = action
        rest = rest[1:]
    else:
        cls, run = module.Options, module.run
    options = parse(cls, rest, f"llmfast {verb}", title, getattr(module, "default_config", None))
    return 0 if options is None else run(options)


def _complain(message: str, code: int) -> int:
    """Print ``message`` as one line, whatever it holds; of several ranks the first to meet it does."""
    line = " ".join(message.split())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from llmfast.ranks import speaks

        if not speaks(line):
            return code
        line = f"rank {os.environ.get('RANK')}: {line}"
    print("llmfast:", line, file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _abandon_stdout() -> None:
    """Send what is left in the buffer nowhere, so that the interpreter does not fail again while it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
