"""Every mistake a user makes ends with exit code 2 and one line that names the thing; nothing is half written."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmfast.cli.main import main

TINY = """
    --n-layer 1 --n-head 1 --n-embd 8 --block-size 16 --micro-batch-size 2 --max-steps 2 --eval-batches 1
    --sample-tokens 2
""".split()

# name: (command, what the line says). {x} is a path in the scratch folder, {home} the folder of the trained run.
FLAGS = {
    "unknown verb": ("pretrian", "unknown verb 'pretrian' (did you mean pretrain?)"),
    "flag before the verb": ("--resume", "--resume stands before the verb"),
    "typo in a flag": ("pretrain --max-step 5", "unknown flag --max-step (did you mean --max-steps?)"),
    "flag of another verb": ("info --checkpoint x", "unknown flag --checkpoint"),
    "flag without its value": ("pretrain --out", "--out: expected one argument"),
    "word too many": ("info now", "unexpected argument 'now'"),
    "unknown action": ("tokenizer encdoe hi", "unknown tokenizer action 'encdoe' (did you mean encode?)"),
    "required flag left out": ("generate hello", "--checkpoint is missing"),
    "text for a number": ("pretrain --max-steps many", "--max-steps: expected an integer, got 'many'"),
    "fraction for a whole number": ("pretrain --max-steps 1.5", "--max-steps: expected an integer, got '1.5'"),
    "not a number": ("pretrain --learning-rate nan", "--learning-rate: expected a number"),
    "unknown choice": ("pretrain --schedule cosin", "did you mean cosine?"),
    "zero steps": ("pretrain --max-steps 0", "max_steps must be at least 1, got 0"),
    "negative epochs": ("pretrain --epochs -1", "epochs must be above 0, got -1"),
    "negative learning rate": ("pretrain --learning-rate -1", "learning_rate must be above 0, got -1"),
    "zero threads": ("pretrain --threads 0", "threads must be at least 1, got 0"),
    "zero layers": ("pretrain --n-layer 0", "n_layer must be a positive integer, got 0"),
    "val_fraction above one": ("pretrain --val-fraction 1.5", "val_fraction must lie in [0, 1), got 1.5"),
    "beta of one": ("pretrain --beta2 1", "beta2 must be in [0, 1), got 1.0"),
    "dropout of one": ("pretrain --dropout 1", "dropout must lie in [0, 1), got 1.0"),
    "micro batch that does not divide": (
        "pretrain --batch-size 10 --micro-batch-size 4",
        "batch_size 10 is not a multiple of micro_batch_size 4",
    ),
    "width that heads do not divide": ("pretrain --n-embd 100 --n-head 3", "n_embd 100 is not a multiple of n_head 3"),
    "block size above the model's": ("pretrain --model tiny --block-size 4096", "block size 4096 is above the 128"),
    "unknown preset": (
        "pretrain --model gpt2-meduim",
        "unknown model preset 'gpt2-meduim' (did you mean gpt2-medium?)",
    ),
    "unknown backend": ("pretrain --backend fast", "unknown backend 'fast'"),
    "unknown device": ("pretrain --device gpu", "unknown device 'gpu'"),
    "backend that cannot run here": ("pretrain --device cpu --backend cuda", "backend cuda cannot run layer_norm"),
    "forced backend of one op": (
        "generate --checkpoint {home}/run --device cpu --backend mlp=cuda a",
        "cannot run mlp",
    ),
    "float16 on a CPU": ("pretrain --device cpu --dtype float16", "float16"),
    "tokenizer too small": ("pretrain --tokenizer-size 100", "tokenizer_size must be at least 257"),
    "unknown tokenizer": ("pretrain --tokenizer gpt3", "unknown tokenizer 'gpt3' (did you mean gpt2?)"),
    "resume before the run has begun": ("pretrain --resume --out {x}", "holds no run that has begun"),
    "nothing to resume": ("pretrain --resume --out {x}/none", "nothing to resume: there is no"),
    "nothing to resume in a fine-tuning": (
        "finetune classify --resume --out {x}/none",
        "--resume: there is no run in {x}/none to go on with",
    ),
    "no such configuration": ("pretrain --config {x}/none.toml", "none.toml: No such file or directory"),
    "folder for a configuration": ("pretrain --config {x}", "Is a directory"),
    "mistake where JSON is asked for": ("evaluate --checkpoint {x}/none --json", "no such checkpoint"),
    "file in the way of HDF5": ("prepare --out {x}/out --hdf5 {home}/text.txt", "text.txt: a file is in the way"),
    "no such checkpoint": ("generate --checkpoint {x}/none hello", "no such checkpoint"),
    "folder without a checkpoint": ("generate --checkpoint {x} hello", "no checkpoint in"),
    "top_p out of range": ("generate --checkpoint {home}/run --top-p 1.5 a", "top_p must lie in (0, 1], got 1.5"),
    "top_k of zero": ("generate --checkpoint {home}/run --top-k 0 a", "top_k must be a positive integer, got 0"),
    "negative temperature": ("chat --checkpoint {home}/run --temperature -1", "temperature must be 0"),
    "no tokens to write": ("generate --checkpoint {home}/run --max-new-tokens 0 a", "max_new_tokens must be positive"),
    "plan in epochs without data": ("plan --epochs 2", "a plan in epochs counts the tokens of prepared --data"),
    "plan of a model that is none": ("plan --n-embd 30 --n-head 4", "n_embd 30 is not a multiple of n_head 4"),
    "two kinds of prompts": ("generate --checkpoint {home}/run --prompt-file {x}/a b", "not both"),
    "no such prompt file": ("generate --checkpoint {home}/run --prompt-file {x}/a", "a: No such file or directory"),
    "block size above the checkpoint's": (
        "evaluate --checkpoint {home}/run --block-size 17",
        "block size 17 must lie between 1 and the model's 16",
    ),
    "negative batch": ("evaluate --checkpoint {home}/run --batch-size -1", "batch_size must be at least 1, got -1"),
    "baseline beside a part of the data": (
        "evaluate --checkpoint {home}/run --baseline --eval-batches 2",
        "--baseline compares over the whole split",
    ),
    "baseline without a training part": (
        "evaluate --checkpoint {home}/run --data {home}/text.txt --baseline",
        "--baseline takes prepared data",
    ),
    "model option against a checkpoint": (
        "pretrain --checkpoint {home}/run --n-layer 3 --out {x}/out",
        "--n-layer 3: {home}/run/checkpoints/step-000004 has n_layer 2",
    ),
    "block size above the checkpoint's in training": (
        "pretrain --checkpoint {home}/run --block-size 32 --out {x}/out",
        "block size 32 is above the 16 of",
    ),
    "another tokenizer than the checkpoint's": (
        "pretrain --checkpoint {home}/run --tokenizer byte --data {home}/text.txt --out {x}/out",
        "--tokenizer byte: the tokenizer (byte, 257 tokens) is not the model's (bpe, 300 tokens)",
    ),
    "run in the way": ("pretrain --data {home}/shards --out {home}/run", "already holds a run"),
    "id outside the tokenizer": ("tokenizer decode 999 --tokenizer byte", "token id 999"),
    "no such tokenizer file": ("tokenizer show --tokenizer {x}/none.json", "unknown tokenizer"),
    "copy over something": ("convert {home}/run {home}", "{home} is there already: choose another place"),
    "copy into a file": ("convert {home}/run {x}/m.bin --to llmc", "name the folder to write"),
    "setting without a value": ("convert {home}/run {x}/out --set n_head", "expected NAME=VALUE, such as n_head=12"),
    "setting that there is not": ("convert {home}/run {x}/out --set heads=3", "heads of a saved model cannot be"),
    "unknown format": ("convert {home}/run {x}/out --to onnx", "onnx"),
    "program that cannot hold it": ("convert {home}/run {x}/out --to tlfs", "and it has relu only"),
    "copy of what is no checkpoint": ("convert {home}/text.txt {x}/out", "is no checkpoint that llmfast knows"),
    "address for a path": (
        "prepare https://example.org/a.txt --out {x}/out",
        "https://example.org/a.txt is an address",
    ),
}


def complaint(capsys, words: list[str]) -> str:
    """The one line that ``llmfast WORDS`` leaves on standard error."""
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    print(captured.err, end="")  # for pytest -s: the messages one after the other, to be read
    assert captured.err.startswith("llmfast: error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert code == 2
    return captured.err


@pytest.mark.parametrize("name", FLAGS)
def test_a_mistake_in_the_command_is_one_line(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a run would land by default
    command, said = (text.replace("{x}", str(tmp_path)).replace("{home}", str(home)) for text in FLAGS[name])
    before = files(home)
    assert said in complaint(capsys, command.split())
    assert files(tmp_path) == []
    assert files(home) == before


def files(folder: Path) -> list[Path]:
    """All that is there, but for the lock that a look into a run leaves."""
    return sorted(path for path in folder.rglob("*") if not path.name.endswith("lock"))


def _text(path: Path) -> None:
    path.write_text("a line of text\n" * 50, encoding="utf-8")


def _damage(path: Path) -> None:
    """Flip a byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _spoil(name: str, x: Path, home: Path) -> None:
    """Put into ``x`` what the mistake called ``name`` is about."""
    _text(x / "good.txt")
    if name == "empty file":
        (x / "empty.txt").touch()
    elif name == "binary file":
        (x / "binary.txt").write_bytes(bytes(range(256)) * 50)
    elif name == "text in another encoding":
        (x / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 50)
    elif name == "folder without files":
        (x / "empty").mkdir()
    elif name == "broken JSON line":
        (x / "a.jsonl").write_text('{"text": "fine"}\n{"text": "bro\n')
    elif name == "JSON lines without the field":
        (x / "a.jsonl").write_text('{"text": "fine"}\n{"body": "hm"}\n')
    elif name == "broken JSON":
        (x / "a.json").write_text('[{"text": "fine"}, ')
    elif name == "no parquet":
        (x / "a.parquet").write_bytes(b"PAR1 not really")
    elif name == "broken compression":
        (x / "a.jsonl.zst").write_bytes(b"no zstd at all")
    elif name == "no HDF5":
        (x / "a.h5").write_bytes(b"no hdf5 at all")
    elif name == "odd token file":
        (x / "a.bin").write_bytes(b"123")
    elif name in ("file in the way of the run", "file in the way of the shards"):
        (x / "out").write_text("mine")
    elif name == "other things in the output folder":
        (x / "out").mkdir()
        (x / "out" / "thesis.doc").touch()
    elif name == "cut shard":
        shutil.copytree(home / "shards", x / "shards")
        shard = x / "shards" / "train-00000.bin"
        os.truncate(shard, shard.stat().st_size - 2)
    elif name == "broken record of shards":
        shutil.copytree(home / "shards", x / "shards")
        (x / "shards" / "meta.json").write_text("{")
    elif name == "missing shard":
        shutil.copytree(home / "shards", x / "shards")
        (x / "shards" / "train-00000.bin").unlink()
    elif name in ("ids above the model's vocabulary", "evaluation of other tokens"):
        (x / "train.bin").write_bytes(b"\xf0\xf0" * 1000)
    elif name == "shards of another tokenizer":
        assert main(["prepare", str(x / "good.txt"), "--out", str(x / "bytes"), "--tokenizer", "byte"]) == 0
    elif name in ("damaged weights", "damaged weights of all checkpoints at a resume"):
        shutil.copytree(home / "run", x / "run", symlinks=True)
        for weights in (x / "run").rglob("model.safetensors"):
            _damage(weights)
    elif name.startswith("no tokenizer"):
        from llmfast.nn import GPT

        GPT.from_pretrained(next((home / "run" / "checkpoints").glob("step-*"))).save_pretrained(x / "model")
    elif name == "checkpoint without weights":
        shutil.copytree(home / "run", x / "run", symlinks=True)
        for weights in (x / "run").rglob("model.safetensors"):
            weights.unlink()
    elif name in ("resume of another run", "resume with another model"):
        shutil.copytree(home / "run", x / "run", symlinks=True)
    elif name == "characters that the model never saw":
        (x / "abc.txt").write_text("abc\n" * 200)
        make = ["pretrain", "--data", str(x / "abc.txt"), "--tokenizer", "char", "--out", str(x / "run"), *TINY]
        assert main(make) == 0
    elif name in ("sample prompt outside the characters", "too little text for a window"):
        (x / "abc.txt").write_text("abc" * (200 if name.startswith("sample") else 8))
    elif name == "tokenizer file that is none":
        (x / "llmfast_tokenizer.json").write_text('{"vocab": []}')
    elif name == "prompt that is not UTF-8":
        (x / "prompt").write_bytes(b"\xff\xfe")
    elif name == "typo in the TOML":
        (x / "run.toml").write_text("max_stpes = 5\n")
    elif name == "wrong type in the TOML":
        (x / "run.toml").write_text('max_steps = "many"\n')
    elif name == "broken TOML":
        (x / "run.toml").write_text("max_steps = = 5\n")
    elif name == "bad value in the TOML":
        (x / "run.toml").write_text("val_fraction = 2.0\n")


_PRETRAIN = f"pretrain {' '.join(TINY)} --tokenizer byte --out {{x}}/out"
FILES = {
    "missing file": (f"{_PRETRAIN} --data {{x}}/none.txt", "{x}/none.txt: no such file or folder"),
    "missing file to prepare": ("prepare {x}/none.txt --out {x}/out", "{x}/none.txt: no such file or folder"),
    "glob without a match": (f"{_PRETRAIN} --data {{x}}/*.md", "{x}/*.md: no file"),
    "empty file": (f"{_PRETRAIN} --data {{x}}/empty.txt", "{x}/empty.txt: the file is empty"),
    "binary file": (f"{_PRETRAIN} --data {{x}}/binary.txt", "{x}/binary.txt"),
    "text in another encoding": ("prepare {x}/latin.txt --out {x}/out --tokenizer byte", "{x}/latin.txt"),
    "folder without files": (f"{_PRETRAIN} --data {{x}}/empty", "{x}/empty: the folder holds no text files"),
    "broken JSON line": ("prepare {x}/a.jsonl --out {x}/out --tokenizer byte", "a.jsonl, line 2: not JSON"),
    "JSON lines without the field": ("prepare {x}/a.jsonl --out {x}/out --tokenizer byte", "'text'"),
    "broken JSON": ("prepare {x}/a.json --out {x}/out --tokenizer byte", "a.json"),
    "no parquet": ("prepare {x}/a.parquet --out {x}/out --tokenizer byte", "a.parquet"),
    "broken compression": ("prepare {x}/a.jsonl.zst --out {x}/out --tokenizer byte", "a.jsonl.zst"),
    "no HDF5": (f"{_PRETRAIN} --data {{x}}/a.h5", "a.h5: not an HDF5 file"),
    "odd token file": (f"{_PRETRAIN} --data {{x}}/a.bin", "a.bin: 3 bytes are no whole number"),
    "text beside tokens": (f"{_PRETRAIN} --data {{home}}/shards {{x}}/good.txt", "{x}/good.txt text"),
    "two folders of tokens": (f"{_PRETRAIN} --data {{home}}/shards {{home}}/shards", "one folder or file of tokens"),
    "file in the way of the run": (f"{_PRETRAIN} --data {{x}}/good.txt", "{x}/out: a file is in the way"),
    "file in the way of the shards": ("prepare {x}/good.txt --out {x}/out", "{x}/out: a file is in the way"),
    "other things in the output folder": ("prepare {x}/good.txt --out {x}/out", "thesis.doc"),
    "file in the way of a tokenizer": (
        "tokenizer train --data {x}/good.txt --out {x}/good.txt",
        "a file is in the way",
    ),
    "cut shard": (f"{_PRETRAIN} --data {{x}}/shards", "train-00000.bin"),
    "missing shard": (f"{_PRETRAIN} --data {{x}}/shards", "train-00000.bin: the shard is missing"),
    "broken record of shards": (f"{_PRETRAIN} --data {{x}}/shards", "meta.json: not the record"),
    "ids above the model's vocabulary": (
        f"{_PRETRAIN} --data {{x}}/train.bin",
        "is id 61680, but the model's vocab_size",
    ),
    "shards of another tokenizer": (
        "pretrain --checkpoint {home}/run --data {x}/bytes --out {x}/out",
        "{x}/bytes: the tokenizer (byte, 257 tokens) is not the model's (bpe",
    ),
    "evaluation of other tokens": (
        "evaluate --checkpoint {home}/run --data {x}/train.bin",
        "token 0 is id 61680",
    ),
    "vocabulary smaller than the tokenizer's": (
        f"{_PRETRAIN} --data {{x}}/good.txt --vocab-size 100",
        "257 token ids, the model only 100",
    ),
    "too little text for a window": (f"{_PRETRAIN} --data {{x}}/abc.txt --block-size 100", "block_size 100"),
    "sample prompt outside the characters": (
        f"{_PRETRAIN.replace('byte', 'char')} --data {{x}}/abc.txt --sample-prompt z",
        "--sample-prompt 'z'",
    ),
    "characters that the model never saw": (
        "generate --checkpoint {x}/run --prompt-file {x}/good.txt",
        "character ' '",
    ),
    "prompt that is not UTF-8": ("generate --checkpoint {home}/run --prompt-file {x}/prompt", "prompt is not UTF-8"),
    "damaged weights": ("generate --checkpoint {x}/run hello", "is damaged"),
    "no tokenizer to write with": ("generate --checkpoint {x}/model hello", "{x}/model holds no tokenizer"),
    "no tokenizer to read text with": ("evaluate --checkpoint {x}/model --data {x}/good.txt", "holds no tokenizer"),
    "no tokenizer to go on with": (
        "pretrain --checkpoint {x}/model --data {x}/good.txt --out {x}/out",
        "{x}/model holds no tokenizer: name the one",
    ),
    "a new tokenizer for an old model": (
        "pretrain --checkpoint {home}/run --tokenizer bpe --data {x}/good.txt --out {x}/out",
        "--tokenizer bpe would train a new one",
    ),
    "checkpoint without weights": ("evaluate --checkpoint {x}/run", "model.safetensors is missing"),
    "damaged weights of all checkpoints at a resume": ("pretrain --resume --out {x}/run", "is damaged"),
    "resume of another run": ("pretrain --resume --out {x}/run --learning-rate 5", "learning_rate was 0.001, now 5.0"),
    "resume with another model": ("pretrain --resume --out {x}/run --n-layer 3", "--n-layer 3"),
    "tokenizer file that is none": (f"{_PRETRAIN} --tokenizer {{x}}", "llmfast_tokenizer.json is no tokenizer"),
    "folder for a tokenizer": ("tokenizer show --tokenizer {x}", "{x} holds neither llmfast_tokenizer.json nor"),
    "folder for a prompt": ("generate --checkpoint {home}/run --prompt-file {x}", "{x}: Is a directory"),
    "typo in the TOML": ("pretrain --config {x}/run.toml", "unknown key 'max_stpes' (did you mean max_steps?)"),
    "wrong type in the TOML": (
        "pretrain --config {x}/run.toml",
        "run.toml: max_steps: expected an integer, got 'many'",
    ),
    "broken TOML": ("pretrain --config {x}/run.toml", "run.toml: not a TOML file: Invalid value (at line 1"),
    "bad value in the TOML": ("pretrain --config {x}/run.toml", "val_fraction must lie in [0, 1), got 2.0"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_the_files_is_one_line(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _spoil(name, tmp_path, home)
    command, said = (text.replace("{x}", str(tmp_path)).replace("{home}", str(home)) for text in FILES[name])
    before = files(home)
    assert said in complaint(capsys, command.split())
    assert files(home) == before
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))
    assert not list((tmp_path / "out").rglob("meta.json"))


@pytest.fixture
def lines(capsys):
    return lambda *words: complaint(capsys, [str(word) for word in words])


def test_cuda_where_there_is_none(home, lines):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "device cuda is not there" in lines("generate", "--checkpoint", home / "run", "--device", "cuda", "a")


def test_a_run_in_progress_is_left_alone(home, tmp_path, lines):
    from llmfast.training.rundir import RunDirectory

    with RunDirectory(tmp_path / "out", resume=False):
        said = lines("pretrain", "--data", home / "shards", "--out", tmp_path / "out", *TINY)
    assert f"out is in use by process {os.getpid()}" in said


def test_gpt2_without_its_files(tmp_path, lines, monkeypatch):
    monkeypatch.setenv("LLMFAST_GPT2_VOCAB", str(tmp_path / "none"))
    assert "none (named by LLMFAST_GPT2_VOCAB)" in lines("tokenizer", "encode", "hello")


@pytest.mark.parametrize(
    ("file", "library"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard"), ("a.h5", "h5py")]
)
def test_a_format_without_its_library(file, library, tmp_path, lines, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    (tmp_path / file).write_bytes(b"whatever")
    said = lines("pretrain", "--data", tmp_path / file, "--tokenizer", "byte", "--out", tmp_path / "out", *TINY)
    assert library in said
    assert "pip install" in said


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="only a user without privileges is refused")
def test_a_folder_that_may_not_be_written(home, tmp_path, lines):
    tmp_path.chmod(0o500)
    said = lines("pretrain", "--data", home / "shards", "--out", tmp_path / "out", *TINY)
    assert f"{tmp_path / 'out'}: Permission denied" in said


# ---- as real processes


def run(*words, input: bytes = b"", **options) -> subprocess.CompletedProcess[str]:
    """``llmfast WORDS``; the output as text."""
    command = [sys.executable, "-m", "llmfast", *map(str, words)]
    done = subprocess.run(command, capture_output=True, input=input, timeout=120, **options)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def small_files() -> None:
    """No file of this process may grow above 8 kB: a full disk, for those who cannot mount one."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_no_room_for_shards_is_one_line_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 2000)
    words = ["prepare", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "byte"]
    done = run(*words, preexec_fn=small_files)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "out: no space left on the disk" in done.stderr
    assert not (tmp_path / "out" / "meta.json").exists()
    assert run(*words).returncode == 0
    assert (tmp_path / "out" / "meta.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_no_room_for_a_checkpoint_ends_the_run_without_a_trace_and_without_a_checkpoint(home, tmp_path):
    out = tmp_path / "out"
    done = run("pretrain", "--data", home / "shards", "--out", out, *TINY, preexec_fn=small_files)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("llmfast: error: ")
    assert not list((out / "checkpoints").glob("step-*"))


def test_standard_input_that_is_not_utf8():
    done = run("tokenizer", "encode", "--tokenizer", "byte", input=b"ok\xff")
    assert done.returncode == 2
    assert done.stderr == "llmfast: error: standard input is not UTF-8 text: byte 2 is 0xff\n"


def test_a_line_of_a_dialogue_that_is_not_utf8(home, lines, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert "standard input is not UTF-8 text: byte 0 is 0xff" in lines("chat", "--checkpoint", home / "run")


def test_words_that_are_not_ids():
    done = run("tokenizer", "decode", "--tokenizer", "byte", input=b"1 2 x")
    assert (done.returncode, done.stderr) == (2, "llmfast: error: 'x' on standard input is not a token id\n")


def test_an_unknown_backend_in_the_environment():
    done = run("info", env={**os.environ, "LLMFAST_BACKEND": "warp"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "LLMFAST_BACKEND: unknown backend 'warp'" in done.stderr
