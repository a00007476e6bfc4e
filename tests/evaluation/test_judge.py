"""Judging through HTTP servers of every temper, and what is kept of it."""

from __future__ import annotations

import json
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import (
    drips,
    floods,
    free_port,
    half,
    refuses,
    resets,
    says,
    serving,
    sleeps,
    streams,
)

from llmfast.cli.main import main
from llmfast.errors import UserError
from llmfast.evaluation import judge as judging
from llmfast.evaluation.judge import Entry, ModelJudge, OfflineJudge, judge_responses, parse_score, read_entries
from llmfast.evaluation.judge_client import ChatClient, NoAnswer, NoServer, api_key_from

RECORDS = [
    {"instruction": "Add {reference}.", "input": "1 and 2", "output": "3", "model_response": "3"},
    {"instruction": "Name a colour.", "input": "", "output": "Red.", "model_response": "Blue, or red."},
    {"instruction": "Say nothing.", "output": "Nothing.", "model_response": " "},
    {"instruction": "Greet.", "input": "", "output": "Hello!", "model_response": "hello"},
]


@pytest.fixture
def responses(tmp_path) -> Path:
    path = tmp_path / "responses.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return path


def ask(server, **options) -> str:
    options = {"timeout": 5.0, "sleep": lambda seconds: None, **options}
    return ChatClient(url=server.url, **options).ask([{"role": "user", "content": "How good?"}])


# The protocols.


def test_ollamas_question_is_the_books():
    with serving(says("85")) as server:
        assert ask(server) == "85"
    path, question, headers = server.asked[0]
    assert path == "/api/chat"
    assert question == {
        "model": "llama3",
        "messages": [{"role": "user", "content": "How good?"}],
        "stream": False,
        "options": {"seed": 123, "temperature": 0, "num_ctx": 2048},
    }
    assert "Authorization" not in headers


def test_openais_question_carries_the_key():
    with serving(says("85")) as server:
        url = f"{server.url}/v1/"
        client = ChatClient(api="openai", url=url, model="gpt-x", api_key="sk-secret", timeout=5.0)
        assert client.ask([{"role": "user", "content": "How good?"}]) == "85"
    path, question, headers = server.asked[0]
    assert path == "/v1/chat/completions"
    assert question["model"] == "gpt-x"
    assert (question["temperature"], question["seed"]) == (0, 123)
    assert headers["Authorization"] == "Bearer sk-secret"


def test_a_stream_of_lines_is_read_as_one_answer():
    with serving(streams("Score", ": 8", "5")) as server:
        assert ask(server) == "Score: 85"


# Servers that fail.


@pytest.mark.parametrize(
    "fault",
    [
        refuses(500),
        refuses(503),
        refuses(429, Retry_After="0"),
        refuses(408),
        half,
        resets,
        floods,
        streams("8", ends=False),
        lambda handler, question: handler.reply(b""),
        lambda handler, question: handler.reply(b"<html>busy</html>"),
        lambda handler, question: handler.reply(b'{"error": "the model runner crashed"}'),
        lambda handler, question: handler.reply(b'{"message": {"content": null}, "done": true}'),
    ],
)
def test_a_failure_that_passes_is_asked_again(fault):
    with serving(fault, fault, says("85")) as server:
        assert ask(server) == "85"
    assert len(server.asked) == 3


@pytest.mark.parametrize("fault", [sleeps, drips])
def test_an_answer_has_its_time(fault):
    with serving(fault, says("85")) as server:
        assert ask(server, timeout=0.2) == "85"
    with serving(fault) as server, pytest.raises(NoAnswer, match=r"no whole answer within 0\.2 s \(2 tries\)"):
        ask(server, timeout=0.2, retries=1)


def test_pauses_grow_or_are_the_servers():
    pauses: list[float] = []
    later = formatdate(usegmt=True)
    with serving(
        refuses(500), refuses(500), refuses(429, Retry_After="7.5"), refuses(429, Retry_After="9999"),
        refuses(429, Retry_After=later), refuses(429, Retry_After="nan"), says("85"),
    ) as server:  # fmt: skip
        assert ask(server, sleep=pauses.append, retries=6) == "85"
    assert pauses == [1.0, 2.0, 7.5, 120.0, 0.0, 30.0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refuses(404, "model 'llama3' not found"), "status 404: model 'llama3' not found; get it with: ollama pull"),
        (refuses(401, {"message": "no key"}), "status 401: no key; name the environment variable"),
        (refuses(400, "bad\nrequest"), "status 400: bad request"),
        (refuses(302, Location="http://127.0.0.1:9/"), "status 302"),
    ],
)
def test_what_another_try_cannot_mend_is_said_at_once(fault, words):
    with serving(fault) as server, pytest.raises(UserError, match=words):
        ask(server)
    assert len(server.asked) == 1


def test_the_key_is_never_shown(monkeypatch):
    with serving(refuses(401, "wrong key sk-secret")) as server, pytest.raises(UserError) as error:
        ask(server, api_key="sk-secret")
    assert "***" in str(error.value)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", "sk-se\ncret")
    with pytest.raises(UserError, match="JUDGE_KEY") as error:
        api_key_from("JUDGE_KEY")
    assert "cret" not in str(error.value)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        api_key_from("NO_SUCH_KEY")


@pytest.mark.parametrize(
    "url", ["localhost:11434", "ftp://x", "http://", "http://x:port", "http://x/?a=1", "http://a b"]
)
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="is no address of a judge"):
        ChatClient(url=url)


def test_an_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(UserError, match="name a key with --api-key-env") as error:
        ChatClient(url="http://me:secret@host")
    assert "secret" not in str(error.value)


# Numbers in answers.


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("85", 85), (" 85.\n", 85), ("**85**", 85), ("Score: 85/100", 85), ("85 out of 100.", 85), ("[[85]]", 85),
        ("**Score:** 85", 85), ("85%", 85), ("92.5", 92.5), ("0", 0), ("100", 100), ("score is 0/100", 0),
        ("On a scale from 0 to 100, I would score this a solid 70. It names 2 of the 3 parts.", None),
        ("On a scale from 0 to 100, I would give this 70.", 70), ("Score (0-100): 40", 40),
        ("It names 2 of 3 parts. Score: 60", 60), ("The score would be 60, as 1 + 1 = 2.", 60),
        ("Score: 60. No, score: 70.", None), ("Score: 60\n\nSo the final score is 60.", 60),
        ("<think>maybe 30 or 40</think>\n50", 50),
        ("eighty", None), ("", None), ("105", None), ("-5", None), ("8/10", None), ("7 out of 10", None),
        ("0.85", None), ("1,000", None), ("85-90", None), ("٨٥", None), ("1e2", None), ("nan", None),
    ],
)  # fmt: skip
def test_parse_score(answer, score):
    assert parse_score(answer) == score


# Whole runs.


def fast(server, **options) -> ModelJudge:
    return ModelJudge(ChatClient(url=server.url, timeout=5.0, retries=1, sleep=lambda seconds: None, **options))


def test_the_prompt_holds_the_entry_as_it_is():
    prompt = Entry(**{"instruction": "Add {reference}.", "input": "1", "reference": "{task}", "response": "`x`"}).prompt
    assert prompt == (
        "Given the input `Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd {reference}.\n\n### Input:\n1` and correct output `{task}`, score the "
        "model response ``x`` on a scale from 0 to 100, where 100 is the best score. Respond with the integer number "
        "only."
    )


def test_a_rambling_judge_is_asked_once_more_and_then_counts_as_failed(responses, tmp_path):
    entries = read_entries(responses)
    with serving(says("Well, eighty?"), says("80"), says("It is 7 or 8."), says("Fine."), says("60")) as server:
        scores = judge_responses(entries, fast(server), tmp_path / "out.json")
    assert [score.score for score in scores] == [80, None, 0, 60]
    dialogue = server.asked[1][1]["messages"]
    assert [message["role"] for message in dialogue] == ["user", "assistant", "user"]
    assert dialogue[1]["content"] == "Well, eighty?"
    summary = judging.summarise(entries, scores)
    assert (summary.scored, summary.failed, summary.empty) == (3, 1, 1)
    assert summary.average == pytest.approx(140 / 3)
    assert summary.worst == [2, 3, 0]
    assert summary.distribution == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0]


def test_a_server_that_dies_midway_leaves_scores_to_go_on_from(responses, tmp_path):
    entries, out = read_entries(responses), tmp_path / "out.json"
    with serving(says("80")) as server:
        port = server.server_port

        def last(handler, question):
            says("70")(handler, question)
            handler.close_connection = True
            server.socket.close()  # nothing listens from here on

        server.script.append(last)
        judge = fast(server)
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: .*3 of 4 scores are in .*out\.json: run again"):
            judge_responses(entries, judge, out)
    assert [score.score for score in judging.read_scores(out)] == [80, 70, 0]

    with serving(says("60")) as server:
        scores = judge_responses(entries, fast(server), out)
    assert [score.score for score in scores] == [80, 70, 0, 60]
    assert len(server.asked) == 1
    with serving(says("1")) as server:
        judge_responses(entries, fast(server), out)
        assert server.asked == []
        other = judge_responses(entries, fast(server, model="mistral"), out)  # whose scores those are not
    assert [score.score for score in other] == [1, 1, 0, 1]
    assert json.loads(out.read_text())["judge"].startswith("mistral")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_failed_and_changed_entries_are_asked_again(responses, tmp_path):
    entries, out = read_entries(responses), tmp_path / "out.json"
    with serving(says("80"), says("?"), says("?"), says("60")) as server:
        judge_responses(entries, fast(server), out)
    entries[3] = Entry("Greet.", "", "Hello!", "Hello!")
    with serving(says("90")) as server:
        scores = judge_responses(entries, fast(server), out)
    assert [score.score for score in scores] == [80, 90, 0, 90]
    assert len(server.asked) == 2


def test_one_entry_that_the_server_cannot_take_does_not_stop_the_others(responses, tmp_path):
    with serving(refuses(500), refuses(500), says("70")) as server:
        scores = judge_responses(read_entries(responses), fast(server), tmp_path / "out.json")
    assert [score.score for score in scores] == [None, 70, 0, 70]
    with serving(refuses(500)) as server, pytest.raises(UserError, match="status 500"):
        judge_responses(read_entries(responses), fast(server), tmp_path / "none.json")


def test_scores_on_disk_are_whole_at_every_moment(responses, tmp_path):
    out, seen = tmp_path / "out.json", []

    def look(question):
        seen.append(len(judging.read_scores(out)) if out.exists() else 0)
        return "50"

    with serving(says(look)) as server:
        judge_responses(read_entries(responses), fast(server), out)
    assert seen == [0, 1, 3]


# The command.


def run(*words: object) -> int:
    return main(["judge", *map(str, words)])


def test_the_command_prints_figures_and_the_worst(responses, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with serving(says("90"), says("30"), says("60")) as server:
        key = ["--api-key-env", "JUDGE_KEY"]
        assert run(responses, "--api", "openai", "--url", f"{server.url}/v1", "--model", "a/b:7", *key) == 0
    shown = capsys.readouterr()
    assert "average          45.00 of 100" in shown.out
    assert shown.out.index("Say nothing.") < shown.out.index("Name a colour.") < shown.out.index("Greet.")
    assert "sk-secret" not in shown.out + shown.err
    assert "sk-secret" not in responses.with_name("responses.a-b-7-scores.json").read_text()


def test_without_a_server_the_offline_judge_steps_in_and_says_so(responses, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert run(responses, "--url", url, "--json") == 0
    shown = capsys.readouterr()
    assert "Connection refused" in shown.err
    assert "scoring by reference similarity (offline, no judge model)" in shown.err
    found = json.loads(shown.out)
    assert found["judge"] == "reference similarity (offline, no judge model)"
    assert found["out"].endswith("responses.offline-scores.json")
    scores = [score["score"] for score in found["scores"]]
    assert (scores[0], scores[2], scores[3]) == (100, 0, 100)
    assert 0 < scores[1] < 100
    assert found["components"]["exact_match"] == 50
    assert run(responses, "--offline", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_run_that_has_a_models_scores_does_not_fall_back(responses, capsys):
    with serving(says("90"), says("80"), refuses(400)) as server:
        assert run(responses, "--url", server.url, "--retries", 0) == 2
    assert run(responses, "--url", server.url, "--retries", 0) == 2
    assert "3 of 4 scores are in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'[{"instruction": "a"}]', "entry 0 (from 0) has no 'output', but 'instruction': name the field with"),
        (json.dumps([RECORDS[0], 7]).encode(), "entry 1 (from 0) must be an object, got int"),
        (json.dumps([{**RECORDS[0], "model_response": None}]).encode(), "'model_response' must be text, got null"),
        (b"[]", "must hold a list of entries"),
        (b'{"a": 1}', "must hold a list of entries"),
        (b"[1,", "is not valid JSON"),
        (b'["\xff"]', "is not UTF-8 text: byte 2"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, capsys, text, words):
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    assert run(path, "--offline") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--api openai", "--api openai takes the judge's name with --model"),
        ("--api openai --model x", "OPENAI_API_KEY is not set"),
        ("--timeout 0", "timeout must be at least"),
        ("--url nowhere", "'nowhere' is no address of a judge"),
        ("--offline --response-key answer", "has no 'answer'"),
        ("--offline --out {x}/none/scores.json", "there is no folder"),
        ("--offline --out {x}/responses.json", "is in the way: it is no file of scores"),
    ],
)
def test_mistakes_in_flags(responses, capsys, monkeypatch, flags, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = responses.read_bytes()
    assert run(responses, *flags.format(x=responses.parent).split()) == 2
    assert words in capsys.readouterr().err
    assert responses.read_bytes() == before


def test_other_field_names(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"q": "1+1?", "a": "2", "r": "2"}]', encoding="utf-8")
    keys = judging.Keys(instruction="q", reference="a", response="r")
    assert read_entries(path, keys) == [Entry("1+1?", "", "2", "2")]
    scores = judge_responses(read_entries(path, keys), OfflineJudge(), tmp_path / "scores.json")
    assert [score.score for score in scores] == [100.0]


def test_no_server_is_told_apart_at_the_first_question():
    client = ChatClient(url=f"http://127.0.0.1:{free_port()}", retries=2, sleep=lambda seconds: None)
    with pytest.raises(NoServer, match=r"Connection refused$"):
        client.ask([], first=True)
    with pytest.raises(NoServer, match=r"Connection refused \(3 tries\)"):
        client.ask([])
