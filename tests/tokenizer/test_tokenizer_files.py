"""Saved tokenizers, GPT-2's vocabulary files, and what is said when a file is wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time

import pytest
import tiktoken.load

from llmfast.errors import UserError
from llmfast.tokenizer import TOKENIZER_FILE, load_tokenizer, train_bpe, train_char
from llmfast.tokenizer import gpt2 as gpt2_module

TEXT = "the cat sat on the mat; naïve 😀 \n"


@pytest.fixture
def no_vocabulary(monkeypatch, tmp_path):
    """No file named, an empty cache, and a network that refuses."""
    monkeypatch.delenv("LLMFAST_GPT2_VOCAB", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(url):
        raise ConnectionError(url)

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    return tmp_path


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe"])
def test_a_saved_tokenizer_needs_no_other_file(kind, tmp_path, request, no_vocabulary):
    if kind == "gpt2":
        tokenizer = request.getfixturevalue("gpt2")
    elif kind == "byte":
        tokenizer = load_tokenizer("byte")
    else:
        tokenizer = train_char([TEXT]) if kind == "char" else train_bpe([TEXT * 9], 290)
    path = tokenizer.save(tmp_path / "new folder")
    assert path == tmp_path / "new folder" / TOKENIZER_FILE
    assert [file.name for file in path.parent.iterdir()] == [TOKENIZER_FILE]
    for spec in (path, str(path.parent), shutil.copy(path, tmp_path / "renamed.json")):
        copy = load_tokenizer(spec)
        assert (copy.kind, copy.vocab_size, copy.eot_id) == (kind, tokenizer.vocab_size, tokenizer.eot_id)
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
        assert copy.decode(copy.encode(TEXT)) == TEXT
    tokenizer.save(path.parent)  # again, over the old one


def test_gpt2_is_saved_within_300_kilobytes(gpt2, tmp_path):
    assert gpt2.save(tmp_path).stat().st_size < 300_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: {**content, "tokens": content["tokens"][:-40]},
        lambda content: {**content, "tokens": "%%%"},
        lambda content: {**content, "sha256": "0" * 64},
        lambda content: {**content, "vocab_size": 280},
        lambda content: {**content, "vocab_size": 0},
        lambda content: {**content, "vocab_size": 10**30},
        lambda content: {**content, "vocab_size": "290"},
        lambda content: {**content, "kind": "gpt2"},
        lambda content: {**content, "kind": "byte"},
        lambda content: {**content, "kind": "wordpiece"},
        lambda content: {**content, "version": 99},
        lambda content: {key: value for key, value in content.items() if key != "kind"},
        lambda content: {key: value for key, value in content.items() if key != "tokens"},
        lambda content: {"model": "another program's"},
        lambda content: [content],
    ],
)
def test_a_damaged_saved_tokenizer_is_one_clear_error(damage, tmp_path):
    path = train_bpe([TEXT * 9], 290).save(tmp_path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"12", b"null", b'"text"', b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_one_clear_error(content, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no tokenizer"):
        load_tokenizer(path)


def test_a_character_file_out_of_order_is_damaged(tmp_path):
    path = train_char(["abc"]).save(tmp_path)
    path.write_text(path.read_text().replace("abc", "acb"))
    with pytest.raises(UserError, match="not in order"):
        load_tokenizer(path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the tokenizer to .*file"):
        load_tokenizer("byte").save(tmp_path / "file")


@pytest.mark.parametrize(
    "files", [["vocab.bpe", "encoder.json"], ["vocab.bpe"], ["encoder.json"], ["r50k_base.tiktoken"]]
)
def test_each_of_gpt2s_files_gives_the_same_tokens_and_ids(files, data_folder, tmp_path, monkeypatch):
    lines = (data_folder / "gpt2/r50k_base.tiktoken").read_bytes().splitlines()
    expected = {int(line.split()[1]): base64.b64decode(line.split()[0]) for line in lines}
    for name in files:
        shutil.copy(data_folder / "gpt2" / name, tmp_path)
    specs = [tmp_path] + [tmp_path / name for name in files]
    for tokenizer in map(load_tokenizer, specs):
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("gpt2", 50257, 50256)
        assert dict(enumerate(tokenizer.tokens)) == expected
    monkeypatch.setenv("LLMFAST_GPT2_VOCAB", str(tmp_path))
    assert load_tokenizer("gpt2").tokens == load_tokenizer("r50k_base").tokens == tokenizer.tokens


def test_the_names_of_other_programs_and_windows_line_ends_are_read(data_folder, gpt2, tmp_path):
    shutil.copy(data_folder / "gpt2/encoder.json", tmp_path / "vocab.json")
    merges = (data_folder / "gpt2/vocab.bpe").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "merges.txt").write_bytes(merges)
    assert load_tokenizer(tmp_path).tokens == gpt2.tokens
    assert load_tokenizer(tmp_path / "merges.txt").tokens == gpt2.tokens


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("vocab.bpe", lambda data: data[:100_003].rpartition(b"\n")[0], "mergeable tokens of 50,256"),
        ("vocab.bpe", lambda data: b"", "it holds 256 mergeable tokens"),
        ("vocab.bpe", lambda data: data.replace(b"\ni n\n", b"\nn i\n"), "differ"),
        ("vocab.bpe", lambda data: data.replace(b"\ni n\n", b"\ni n x\n"), "damaged"),
        ("vocab.bpe", lambda data: b"\x80\x81" + data, "damaged"),
        ("encoder.json", lambda data: data[:-100], "damaged"),
        ("encoder.json", lambda data: b"[1, 2]", "damaged"),
        ("encoder.json", lambda data: data.replace(b'"!": 0', b'"!": 50257'), "damaged"),
        ("encoder.json", lambda data: data.replace(b'"!": 0, "\\"": 1', b'"!": 1, "\\"": 0'), "differ"),
        ("encoder.json", lambda data: data.replace(b"endoftext", b"endoftxt"), "damaged"),
        ("r50k_base.tiktoken", lambda data: data[:400_000].rpartition(b"\n")[0], "mergeable tokens of 50,256"),
        ("r50k_base.tiktoken", lambda data: data[:-3], "50,255 mergeable tokens"),
        ("r50k_base.tiktoken", lambda data: b"not a vocabulary at all", "damaged"),
        ("r50k_base.tiktoken", lambda data: data.replace(b" 300\n", b" 99999\n"), "damaged"),
    ],
)
@pytest.mark.parametrize("beside_whole_files", [False, True])
def test_a_wrong_vocabulary_file_is_one_clear_error(name, damage, said, beside_whole_files, data_folder, tmp_path):
    if beside_whole_files:
        shutil.copytree(data_folder / "gpt2", tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    data = (data_folder / "gpt2" / name).read_bytes()
    assert damage(data) != data
    (tmp_path / name).write_bytes(damage(data))
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_tiktokens_cache_is_used_without_the_network(data_folder, gpt2, no_vocabulary):
    cache = no_vocabulary / "cache"
    cache.mkdir()
    urls = {"r50k_base.tiktoken": "encodings/r50k_base.tiktoken", "vocab.bpe": "gpt-2/encodings/main/vocab.bpe"}
    for name, url in urls.items():
        cached = cache / hashlib.sha1(f"https://openaipublic.blob.core.windows.net/{url}".encode()).hexdigest()
        shutil.copyfile(data_folder / "gpt2" / name, cached)
        assert load_tokenizer("gpt2").tokens == gpt2.tokens
        cached.write_bytes(b"cut short")
        with pytest.raises(UserError, match="cannot be fetched"):
            load_tokenizer("gpt2")


def test_what_the_network_brings_is_checked_and_cached(data_folder, gpt2, no_vocabulary, monkeypatch):
    asked = []

    def answer(url):
        asked.append(url)
        return (data_folder / "gpt2/r50k_base.tiktoken").read_bytes()

    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: b"a login page")
    with pytest.raises(UserError, match="cannot be fetched"):
        load_tokenizer("gpt2")
    monkeypatch.setattr(tiktoken.load, "read_file", answer)
    assert load_tokenizer("gpt2").tokens == load_tokenizer("gpt2").tokens == gpt2.tokens
    assert len(asked) == 1


def test_without_vocabulary_and_network_the_error_names_the_ways(no_vocabulary):
    with pytest.raises(UserError, match=r"cannot be fetched \(ConnectionError\)") as error:
        load_tokenizer("gpt2")
    for way in ("vocab.bpe", "LLMFAST_GPT2_VOCAB", "TIKTOKEN_CACHE_DIR", "--tokenizer bpe"):
        assert way in str(error.value)


def test_a_network_that_never_answers_is_given_up(no_vocabulary, monkeypatch):
    monkeypatch.setattr(gpt2_module, "_NETWORK_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: time.sleep(2))
    start = time.perf_counter()
    with pytest.raises(UserError, match="no answer within"):
        load_tokenizer("gpt2")
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gtp2", "did you mean gpt2"),
        ("/no/such/folder", "unknown tokenizer '/no/such/folder'"),
        ("", "unknown tokenizer ''"),
        ("x" * 5000, "cannot read the tokenizer xxx.*name too long"),
        ("a\0b", "unknown tokenizer"),
        ("char", "train it first"),
        ("bpe", "train it first"),
    ],
)
def test_a_spec_that_names_nothing_is_a_clear_error(spec, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        load_tokenizer(spec)


def test_a_folder_without_a_tokenizer_and_a_wrong_variable_are_clear_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"holds neither {TOKENIZER_FILE}"):
        load_tokenizer(tmp_path)
    monkeypatch.setenv("LLMFAST_GPT2_VOCAB", str(tmp_path))
    with pytest.raises(UserError, match="named by LLMFAST_GPT2_VOCAB"):
        load_tokenizer("gpt2")
    monkeypatch.setenv("LLMFAST_GPT2_VOCAB", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no such file or folder.*named by LLMFAST_GPT2_VOCAB"):
        load_tokenizer("gpt2")
