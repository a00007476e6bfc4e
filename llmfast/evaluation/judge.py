"""Scores from 0 to 100 for a model's responses, by a judge model or by their similarity to the references.

The question to a judge model, and that an empty response scores 0 unasked, are those of "Build a Large Language Model
(From Scratch)", chapter 7, so that averages compare.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from llmfast.errors import UserError
from llmfast.evaluation.judge_client import ChatClient, Message, NoAnswer, NoServer
from llmfast.evaluation.similarity import similarity
from llmfast.files import write_whole

PROMPT = (
    "Given the input `{task}` and correct output `{reference}`, score the model response `{response}` on a scale from "
    "0 to 100, where 100 is the best score. Respond with the integer number only."
)
TASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}"
)
REMINDER = "Respond with one integer from 0 to 100 and nothing else."
OFFLINE = "reference similarity (offline, no judge model)"
GIVE_UP_AFTER = 3  # entries in a row that a living server fails
FORMAT = 1


@dataclass(frozen=True)
class Keys:
    """The names of an entry's fields."""

    instruction: str = "instruction"
    input: str = "input"  # may be missing or empty
    reference: str = "output"
    response: str = "model_response"


@dataclass(frozen=True)
class Entry:
    """One response to judge."""

    instruction: str
    input: str
    reference: str
    response: str

    @property
    def prompt(self) -> str:
        """The question to a judge model."""
        task = TASK.replace("{instruction}", self.instruction)
        if self.input:
            task += f"\n\n### Input:\n{self.input}"
        fields = {"{task}": task, "{reference}": self.reference, "{response}": self.response}
        return re.sub("|".join(map(re.escape, fields)), lambda match: fields[match[0]], PROMPT)


@dataclass(frozen=True)
class Score:
    """What a judge says of one entry."""

    index: int  # of the entry, from 0
    score: float | None  # 0 to 100; None where the judge's answers hold none
    key: str  # of judge and entry: a score is used again only for the same question to the same judge
    answer: str = ""  # the judge's last words
    details: dict[str, float] | None = None  # exact_match, token_f1 and chrf of the offline judge


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    def score(self, entry: Entry, *, first: bool) -> tuple[float | None, str, dict[str, float] | None]:
        """(score, last answer, details) of an entry; ``first``: no entry was scored yet."""
        ...


class OfflineJudge:
    """Scores by similarity to the reference: no model, no server, and no understanding."""

    name = OFFLINE

    def score(self, entry: Entry, *, first: bool) -> tuple[float | None, str, dict[str, float] | None]:
        found = similarity(entry.response, entry.reference)
        return found.score, "", asdict(found)


class ModelJudge:
    """Scores by a chat model. An answer without a score is asked about once more, then counts as failed."""

    def __init__(self, client: ChatClient) -> None:
        self.client = client
        self.failures = 0  # in a row

    @property
    def name(self) -> str:
        client = self.client
        context = f", num_ctx {client.num_ctx}" if client.api == "ollama" else ""
        return f"{client.model} ({client.api}, temperature {client.temperature:g}, seed {client.seed}{context})"

    def score(self, entry: Entry, *, first: bool) -> tuple[float | None, str, dict[str, float] | None]:
        if not entry.response.strip():
            return 0.0, "", None
        question: Message = {"role": "user", "content": entry.prompt}
        try:
            answer = self.client.ask([question], first=first)
            if (score := parse_score(answer)) is None:
                said: Message = {"role": "assistant", "content": answer[:2000]}
                answer = self.client.ask([question, said, {"role": "user", "content": REMINDER}])
                score = parse_score(answer)
        except NoServer:
            raise
        except NoAnswer as error:
            self.failures += 1
            if self.failures == GIVE_UP_AFTER:
                raise
            return None, str(error), None
        self.failures = 0
        return score, answer, None


_NUMBER = r"(?<![\d.,\w-])(-?\d+(?:[.,]\d+)*)(?![\d\w-])"
_SCALE = re.compile(r"(?:\bfrom\s+|\bscale\s+of\s+|\bbetween\s+)?\b0\s*(?:-|–|to|and|through)\s*100\b", re.I | re.A)
_OUT_OF = re.compile(_NUMBER + r"\W{0,4}(?:/|out\s+of)\W{0,4}100\b", re.I | re.A)
_OF_OTHER = re.compile(_NUMBER + r"\W{0,4}(?:/|out\s+of)\W{0,4}\d", re.I | re.A)
_SAID = re.compile(r"\b(?:score|rating|grade)\b\W{0,6}(?:(?:is|of|would\s+be|as)\b\W{0,6})?" + _NUMBER, re.I | re.A)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.I | re.S)


def parse_score(answer: str) -> float | None:
    """The score from 0 to 100 that a judge's answer states, or None where it states none or several.

    ``85``, ``**85**``, ``85/100``, ``85 out of 100``, ``Score: 85`` and ``85%`` state one, also inside a longer text;
    so does a text with one number. Words ("eighty"), other scales (``8/10``, 0.85) and numbers outside 0 .. 100 do
    not.
    """
    text = _SCALE.sub(" ", _THOUGHT.sub(" ", answer))
    found = _OUT_OF.findall(text)
    if not found and not _OF_OTHER.search(text):
        found = _SAID.findall(text) or re.findall(_NUMBER, text, re.A)
    values = {float(number) if re.fullmatch(r"-?\d+(\.\d+)?", number, re.A) else -1.0 for number in found}
    value = values.pop() if len(values) == 1 else -1.0
    return value if value == 0 or 1 <= value <= 100 else None


def read_entries(path: str | Path, keys: Keys = Keys()) -> list[Entry]:
    """The entries of a JSON file: a list of objects with the fields that ``keys`` names.

    Raises ``UserError`` with the index of the first bad entry, counted from 0.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must hold a list of entries, and not an empty one")
    return [_entry(record, keys, f"{path}: entry {index}") for index, record in enumerate(records)]


def _entry(record: Any, keys: Keys, where: str) -> Entry:
    if not isinstance(record, dict):
        raise UserError(f"{where} (from 0) must be an object, got {type(record).__name__}")
    values = {}
    for field, name in asdict(keys).items():
        value = record.get(name, "" if field == "input" else None)
        if value is None and name not in record:
            has = ", ".join(map(repr, record)) or "nothing"
            raise UserError(f"{where} (from 0) has no {name!r}, but {has}: name the field with --{field}-key")
        if not isinstance(value, str):
            raise UserError(f"{where} (from 0): {name!r} must be text, got {json.dumps(value)[:40]}")
        values[field] = value
    return Entry(**values)


def judge_responses(
    entries: list[Entry],
    judge: Judge,
    out: str | Path,
    *,
    progress: Callable[[int, Score], Any] = lambda done, score: None,
) -> list[Score]:
    """Score every entry, in order, and keep ``out`` up to date.

    Scores that ``out`` holds already, of the same judge for the same entry, are used again, failed ones excepted. The
    file is replaced whole after each answer, so that it is readable at any time. ``progress(done, score)`` is called
    for every entry. Raises ``NoServer`` where the first question finds no server, and ``UserError``, naming what is
    kept, where the server fails later; a rerun goes on from there.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for {out.name}")
    kept = {score.key: score for score in read_scores(out) if score.score is not None} if out.exists() else {}
    scores: list[Score] = []
    asked = False
    for index, entry in enumerate(entries):
        key = _key(judge.name, entry)
        if key in kept:
            known = kept[key]
            scores.append(Score(index, known.score, key, known.answer, known.details))
        else:
            try:
                value, answer, details = judge.score(entry, first=not asked and not kept)
            except NoAnswer as error:
                if not asked and not kept and isinstance(error, NoServer):
                    raise
                done = sum(score.score is not None for score in scores)
                raise UserError(f"{error}; {done} of {len(entries)} scores are in {out}: run again to go on") from None
            asked = asked or bool(entry.response.strip())
            scores.append(Score(index, value, key, answer, details))
            if not isinstance(judge, OfflineJudge):  # which is done before a file is written
                write_scores(out, judge.name, scores, kept)
        progress(index + 1, scores[-1])
    write_scores(out, judge.name, scores, {})
    return scores


def _key(name: str, entry: Entry) -> str:
    return hashlib.sha256(f"{name}\n{entry.prompt}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def read_scores(path: Path) -> list[Score]:
    """The scores of a file that ``write_scores`` wrote; ``UserError`` where it is another file."""
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError
        scores = [Score(**score) for score in found["scores"]]
        if not all(score.score is None or isinstance(score.score, int | float) for score in scores):
            raise TypeError
        return scores
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is in the way: it is no file of scores; move it, or name another with --out") from None


def write_scores(path: Path, name: str, scores: list[Score], kept: dict[str, Score]) -> None:
    """Replace ``path`` by ``scores`` and those of ``kept`` that are not among them yet."""
    done = {score.key for score in scores}
    rows = [*scores, *(score for key, score in kept.items() if key not in done)]
    text = json.dumps({"format": FORMAT, "judge": name, "scores": [asdict(score) for score in rows]}, indent=1)
    write_whole(path, text + "\n")


@dataclass(frozen=True)
class Summary:
    """The scores in figures; None where no entry has a score."""

    entries: int
    scored: int
    failed: int  # the judge gave no score
    empty: int  # empty responses
    average: float | None  # of those scored
    median: float | None
    stdev: float | None
    distribution: list[int]  # of 0 .. 9, 10 .. 19, ..., 90 .. 100
    worst: list[int]  # indices of the ten lowest scores, lowest first
    components: dict[str, float]  # averages of what the offline judge's score is made of


def summarise(entries: list[Entry], scores: list[Score]) -> Summary:
    scored = [score for score in scores if score.score is not None]
    values = [score.score or 0.0 for score in scored]
    bins = [0] * 10
    for value in values:
        bins[min(int(value) // 10, 9)] += 1
    details = [score.details for score in scored if score.details]
    return Summary(
        entries=len(entries),
        scored=len(scored),
        failed=len(scores) - len(scored),
        empty=sum(not entry.response.strip() for entry in entries),
        average=statistics.fmean(values) if values else None,
        median=statistics.median(values) if values else None,
        stdev=statistics.pstdev(values) if values else None,
        distribution=bins,
        worst=[score.index for score in sorted(scored, key=lambda score: score.score or 0.0)[:10]],
        components={name: statistics.fmean(d[name] for d in details) for name in (details[0] if details else ())},
    )
