"""``python -m llmfast.cli.page > docs/cli.md``: every verb and option on one page, made as the help is."""

from __future__ import annotations

from llmfast.cli.main import VERBS, load_verb
from llmfast.cli.options import Option, help_text, options_of

HEAD = """\
# Command line

`llmfast VERB [options]`; `python -m llmfast` is the same. `llmfast VERB --help` shows what stands here.

- Every option can stand in a TOML file, by its name without the dashes: `--config run.toml`. Flags override the file.
- `--json` prints one JSON object on standard output. Progress and notes go to standard error.
- Exit codes: 0 done; 2 a mistake that one line on standard error names; 130 interrupted (143 by SIGTERM; a training
  run saves first); 1 an error of ours, whose trace `LLMFAST_TRACEBACK=1` shows.

This page is made by `python -m llmfast.cli.page > docs/cli.md`.
"""


def page() -> str:
    parts = [HEAD]
    for verb, (_, title) in VERBS.items():
        module = load_verb(verb)
        if hasattr(module, "ACTIONS"):
            parts.append(f"## llmfast {verb}\n\n{_sentence(title)}\n")
            for name, (help, cls, _) in module.ACTIONS.items():
                parts.append(f"### llmfast {verb} {name}\n\n{_sentence(help)}\n\n{_table(cls)}")
        else:
            parts.append(f"## llmfast {verb}\n\n{_sentence(title)}\n\n{_table(module.Options)}")
    return "\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(cls: type) -> str:
    rows = [f"| {_name(option)} | {_cell(help_text(option))} |\n" for option in options_of(cls)]
    return "| option | |\n|---|---|\n" + "".join(rows)


def _name(option: Option) -> str:
    if option.positional:
        return f"`{option.metavar}{' ...' if option.many else ''}`"
    if bool in option.types:
        return f"`{option.flag}`" if option.default is False else f"`{option.flag}`, `{option.no_flag}`"
    return _cell(f"`{option.flag} {option.metavar}{' ...' if option.many else ''}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


if __name__ == "__main__":
    print(page(), end="")
