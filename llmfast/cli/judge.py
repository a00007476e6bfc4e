"""``llmfast judge``: scores for a model's responses, by a judge model or by their similarity to the references."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmfast.cli.common import JSON_HELP, note, print_json, table
from llmfast.config import option
from llmfast.errors import UserError

if TYPE_CHECKING:
    from llmfast.evaluation.judge import Entry, Judge, Score, Summary
    from llmfast.evaluation.judge_client import ChatClient


@dataclass
class Options:
    """Options of ``llmfast judge``."""

    responses: str = field(
        metadata={
            "positional": True,
            "help": "a JSON list of {instruction, input, output, model_response}, as finetune instruct writes it",
        }
    )
    offline: bool = option(False, "score by similarity to the references, without a judge model")
    model: str | None = option(None, "the judge model (default of Ollama: llama3)")
    api: Literal["ollama", "openai"] = option("ollama", "the server's protocol: Ollama's, or OpenAI's chat completions")
    url: str | None = option(
        None, "the server (default: http://localhost:11434, of --api openai https://api.openai.com/v1)"
    )
    api_key_env: str | None = option(None, "environment variable that holds the key")
    temperature: float = option(0.0, "sampling temperature of the judge model")
    seed: int = option(123, "seed of the judge model")
    num_ctx: int = option(2048, "context of the judge model in tokens (Ollama)")
    timeout: float = option(120.0, "seconds that one answer may take")
    retries: int = option(4, "tries after the first, where a question fails")
    out: str | None = option(None, "file of scores; a rerun goes on from it (default: beside the responses)")
    instruction_key: str = option("instruction", "field with the instruction")
    input_key: str = option("input", "field with the instruction's input, which may be missing")
    reference_key: str = option("output", "field with the correct answer")
    response_key: str = option("model_response", "field with the response to judge")
    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    from llmfast.evaluation.judge import OFFLINE, Keys, ModelJudge, OfflineJudge, read_entries, summarise
    from llmfast.evaluation.judge_client import NoServer

    entries = read_entries(
        options.responses,
        Keys(options.instruction_key, options.input_key, options.reference_key, options.response_key),
    )
    chosen: Judge = OfflineJudge() if options.offline else ModelJudge(_client(options))
    try:
        out = _scores_file(options, chosen)
        scores = _score_all(entries, chosen, out)
    except NoServer as error:
        note(f"{error}\nno judge model: scoring by {OFFLINE}, which is not comparable with a model's scores")
        chosen = OfflineJudge()
        out = _scores_file(options, chosen)
        scores = _score_all(entries, chosen, out)
    summary = summarise(entries, scores)
    if options.json:
        print_json({"judge": chosen.name, "out": str(out), **asdict(summary), "scores": [asdict(s) for s in scores]})
    else:
        print(render(chosen.name, entries, scores, summary, out))
    return 0


def _client(options: Options) -> ChatClient:
    from llmfast.evaluation.judge_client import OLLAMA_URL, OPENAI_URL, ChatClient, api_key_from

    for name, least in (("timeout", 1e-3), ("retries", 0), ("temperature", 0), ("num_ctx", 1)):
        if getattr(options, name) < least:
            raise UserError(f"{name} must be at least {least:g}, got {getattr(options, name)}")
    if options.api == "openai" and options.model is None:
        raise UserError("--api openai takes the judge's name with --model")
    hosted = options.api == "openai" and options.url is None
    variable = options.api_key_env or ("OPENAI_API_KEY" if hosted else None)
    return ChatClient(
        api=options.api,
        url=options.url or (OPENAI_URL if options.api == "openai" else OLLAMA_URL),
        model=options.model or "llama3",
        temperature=options.temperature,
        seed=options.seed,
        num_ctx=options.num_ctx,
        timeout=options.timeout,
        retries=options.retries,
        api_key=None if variable is None else api_key_from(variable),
        say=note,
    )


def _scores_file(options: Options, judge: Judge) -> Path:
    """``--out``, or a file beside the responses that is named after the judge."""
    from llmfast.evaluation.judge import ModelJudge

    if options.out:
        return Path(options.out)
    name = judge.client.model if isinstance(judge, ModelJudge) else "offline"
    path = Path(options.responses)
    return path.with_name(f"{path.stem}.{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-scores.json")


def _score_all(entries: list[Entry], chosen: Judge, out: Path) -> list[Score]:
    from tqdm import tqdm

    from llmfast.evaluation.judge import judge_responses

    with tqdm(total=len(entries), desc="judging", disable=not sys.stderr.isatty(), leave=False) as bar:
        return judge_responses(entries, chosen, out, progress=lambda done, score: bar.update())


def render(judge: str, entries: list[Entry], scores: list[Score], summary: Summary, out: Path) -> str:
    """Scores for people."""
    rows: list[tuple[str, object]] = [("judge", judge), ("entries", summary.entries)]
    if summary.empty:
        rows.append(("empty responses", f"{summary.empty}"))
    if summary.failed:
        rows.append(("failed", f"{summary.failed} without a score, left out of the figures; run again to ask again"))
    if summary.average is None:
        return table([*rows, ("scores", out)])
    rows.append(("average", f"{summary.average:.2f} of 100"))
    rows.append(("median", f"{summary.median:.1f}, standard deviation {summary.stdev:.1f}"))
    if summary.components:
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in summary.components.items())
        rows.append(("made of", parts))
    rows += [("scores", out), ("", ""), ("distribution", "")]
    most = max(summary.distribution)
    for i, count in enumerate(summary.distribution):
        bar = "#" * (40 * count // most)
        rows.append((f"  {10 * i:>2} to {10 * i + 9 if i < 9 else 100:>3}", f"{count:>5}  {bar}"))
    rows += [("", ""), ("worst", "")]
    for index in summary.worst:
        entry, score = entries[index], scores[index]
        rows.append((f"  entry {index}", f"{score.score:5.1f}  {_short(entry.instruction, entry.input)}"))
        rows.append(("", f"       wanted  {_short(entry.reference)}"))
        rows.append(("", f"       got     {_short(entry.response)}"))
    return table(rows)


def _short(*texts: str) -> str:
    line = " ".join(" ".join(texts).split())
    return line if len(line) <= 90 else line[:89] + "…"
