"""From a dataclass of options to flags, TOML keys and help: the dataclass is the only place that names an option.

A field becomes ``--kebab-case``; ``bool`` gets ``--x`` and ``--no-x``, ``list`` takes several values, ``Literal`` is a
choice, and ``metadata["positional"]`` makes it a word without a flag. ``--config FILE.toml`` sets fields by name, and
flags override it. A field called ``json`` is an ordinary flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from llmfast.config import suggest
from llmfast.errors import UserError

T = TypeVar("T")
Action = tuple[str, type, Callable[[Any], int]]  # help, dataclass of options, run

_NOUNS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a dataclass, as the command line sees it."""

    name: str
    types: tuple[type, ...]  # of int, float, str, bool
    choices: tuple[str, ...]
    many: bool
    positional: bool
    help: str
    default: Any  # dataclasses.MISSING where there is none
    owner: type  # the class that declares it

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def no_flag(self) -> str:
        return "--no-" + self.flag[2:]

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        nouns = [_NOUNS[kind] for kind in self.types if not (kind is int and float in self.types)]
        return " or ".join([*nouns, *(["one of " + ", ".join(self.choices)] if self.choices else [])])

    @property
    def metavar(self) -> str:
        if self.positional:
            return self.name.upper()
        names = {int: "INT", float: "NUMBER", str: "TEXT"}
        return "|".join([*self.choices, *(names[kind] for kind in self.types if kind in names)])

    def from_text(self, text: str) -> Any:
        """The value of a word on the command line."""
        if text in self.choices:
            return text
        for kind in self.types:
            try:
                value = kind(text)
            except ValueError:
                continue
            if kind is not float or math.isfinite(value):
                return value
        raise self.error(self.metavar if self.positional else self.flag, repr(text), suggest(text, self.choices))

    def from_toml(self, value: Any, where: str) -> Any:
        """The value of a TOML key; ``where`` names file and key in errors."""
        if self.many and isinstance(value, list):
            return [self._one_from_toml(item, where) for item in value]
        one = self._one_from_toml(value, where)
        return [one] if self.many else one

    def _one_from_toml(self, value: Any, where: str) -> Any:
        if type(value) is int and float in self.types:
            value = float(value)
        known = type(value) in self.types or (type(value) is str and value in self.choices)
        if known and (type(value) is not float or math.isfinite(value)):
            return value
        hint = suggest(value, self.choices) if isinstance(value, str) else ""
        raise self.error(where, f"{value!r} ({type(value).__name__})", hint)

    def error(self, where: str, got: str, hint: str) -> UserError:
        return UserError(f"{where}: expected {self.wanted}, got {got}{hint}")


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass, those that it declares itself before those that it inherits.

    Fields that it names in ``hidden`` are no options: something inherited that has no meaning there.
    """
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.name in getattr(cls, "hidden", ()):
            continue
        owner = next(base for base in reversed(cls.__mro__) if field.name in inspect.get_annotations(base))
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kinds, choices, many = _analyse(hints[field.name])
        help, positional = field.metadata.get("help", ""), field.metadata.get("positional", False)
        found.append(Option(field.name, kinds, choices, many, positional, help, default, owner))
    return tuple(sorted(found, key=lambda option: option.owner is not cls))


def _analyse(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...], bool]:
    """(scalar types, literal choices, whether it is a list) of a type annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        kinds, choices, _ = _analyse(arguments[0])
        return kinds, choices, True
    if origin is Literal:
        return (), arguments, False
    if origin is Union or origin is types.UnionType:
        parts = [_analyse(part) for part in arguments if part is not type(None)]
        kinds = tuple(kind for part in parts for kind in part[0])
        choices = tuple(choice for part in parts for choice in part[1])
        return kinds, choices, any(part[2] for part in parts)
    if hint in _NOUNS:
        return (hint,), (), False
    raise TypeError(f"no flag can be made of {hint!r}")


class _Flag(argparse.Action):
    """``--x`` stores True, ``--no-x`` stores False."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # a flag stays on one line


def build_parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of a dataclass. It only splits words; ``parse`` turns them into values."""
    options = options_of(cls)
    words = [option for option in options if option.positional]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *(f"[{o.metavar} ...]" if o.many else o.metavar for o in words), "[options]"]),
        description="\n".join([description, *(f"  {option.metavar}: {help_text(option)}" for option in words)]),
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    parser.add_argument("--config", metavar="FILE.toml", help="set options from a file; flags override it")
    groups: dict[type, Any] = {cls: parser}
    for option in options:
        if option.positional:
            continue
        if option.owner not in groups:
            groups[option.owner] = parser.add_argument_group((option.owner.__doc__ or "").splitlines()[0].rstrip("."))
        keywords: dict[str, Any] = {"help": help_text(option).replace("%", "%%")}
        flags = [option.flag]
        if bool in option.types:
            keywords.update(action=_Flag, nargs=0)
            if option.default is False:
                parser.add_argument(option.no_flag, dest=option.name, **{**keywords, "help": argparse.SUPPRESS})
            else:
                flags.append(option.no_flag)
        else:
            keywords["metavar"] = option.metavar
            if option.many:
                keywords.update(nargs="+", action="extend", metavar=(option.metavar, "" if option.choices else "TEXT"))
        groups[option.owner].add_argument(*flags, dest=option.name, **keywords)
    return parser


def help_text(option: Option) -> str:
    """The help of an option, with its default where that says something."""
    default = option.default
    if default is dataclasses.MISSING:
        return f"{option.help} (required)"
    if default is None or default is False or default == [] or "(default" in option.help:
        return option.help
    if f"({default}:" in option.help:  # the help already says what the default does
        return option.help
    shown = {True: "on"}.get(default, default) if isinstance(default, bool) else repr(default).strip("'")
    return f"{option.help} (default: {shown})"


def parse(
    cls: type[T],
    arguments: Sequence[str],
    prog: str,
    description: str,
    default_config: Callable[[dict[str, Any]], Path | None] | None = None,
) -> T | None:
    """An instance of ``cls`` from command-line words and the ``--config`` file; None where help was printed.

    ``default_config`` gives, from the words, the file to read where none is named.
    """
    parser = build_parser(cls, prog, description)
    words = list(arguments)
    if "--" in words:  # what follows is no flag, whatever it looks like
        words, literal = words[: words.index("--")], words[words.index("--") + 1 :]
    else:
        literal = []
    namespace, rest = parser.parse_known_args(words)
    given = vars(namespace)
    if "help" in given:
        parser.print_help()
        return None
    for word in rest:
        if len(word) > 1 and word.startswith("-"):
            raise _unknown_flag(word, parser, prog)
    options = options_of(cls)
    rest += literal
    for option in options:
        if option.positional and rest:
            given[option.name] = rest if option.many else rest.pop(0)
            rest = [] if option.many else rest
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see {prog} --help")
    config = given.get("config") or (default_config(given) if default_config else None)
    values = read_toml(Path(config), options) if config else {}
    for option in options:
        if option.name in given:
            value = given[option.name]
            if bool in option.types:
                values[option.name] = value
            else:
                values[option.name] = [*map(option.from_text, value)] if option.many else option.from_text(value)
    for option in options:
        if option.default is dataclasses.MISSING and option.name not in values:
            raise UserError(f"{option.metavar if option.positional else option.flag} is missing; see {prog} --help")
    return cls(**values)


def read_toml(path: Path, options: Sequence[Option]) -> dict[str, Any]:
    """The values that a TOML file gives to ``options``; keys in snake_case or kebab-case."""
    known = {option.name: option for option in options}
    values = {}
    for key, value in load_toml(path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown key {key!r}{suggest(name, known)}")
        values[name] = known[name].from_toml(value, f"{path}: {key}")
    return values


def load_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def pick_action(
    verb: str, title: str, actions: dict[str, Action], arguments: Sequence[str]
) -> tuple[str, str, type, Callable[[Any], int]] | None:
    """(verb and action, help, options, run) of ``llmfast VERB ACTION``; None where help was printed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<12}{action[0]}" for name, action in actions.items())
        print(f"usage: llmfast {verb} ACTION [options]\n\n{title}\n\n{listed}\n")
        print(f"llmfast {verb} ACTION --help shows an action's options.")
        return None
    name = arguments[0]
    if name not in actions:
        raise UserError(f"unknown {verb} action {name!r}{suggest(name, actions)}; actions: {', '.join(actions)}")
    help, cls, run = actions[name]
    return f"{verb} {name}", help, cls, run


def _unknown_flag(word: str, parser: argparse.ArgumentParser, prog: str) -> UserError:
    flag = word.split("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    return UserError(f"unknown flag {flag}{suggest(flag, known)}; see {prog} --help")
