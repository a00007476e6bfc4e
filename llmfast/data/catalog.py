"""The public corpora and weights that ``llmfast download`` knows: where they are, how large, and their SHA-256.

Every hash was computed from the file itself, or published by several who did (docs/data.md). A file without one is
trusted when it first arrives, and held to that from then on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remote:
    """One file, at the first of ``urls`` that answers. ``size`` in bytes; ``sha256`` and ``size`` None: not known.

    With ``member`` the file is that member of an archive (zip or tar) at ``urls``, whose hash is ``archive_sha256``.
    """

    name: str
    urls: tuple[str, ...]
    sha256: str | None = None
    size: int | None = None
    member: str | None = None
    archive_sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """What one name of ``llmfast download`` fetches; several files go into a folder of that name."""

    what: str
    files: tuple[Remote, ...]

    @property
    def size(self) -> int | None:
        """Bytes on the disk, None where a file's size is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def pinned(self) -> bool:
        return all(file.sha256 for file in self.files)


_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
_BOOK_MIRROR = "https://f001.backblazeb2.com/file/LLMs-from-scratch/"
_OPENAI = "https://openaipublic.blob.core.windows.net/"
HUB = "https://huggingface.co/"
_PILE = HUB + "datasets/monology/pile-uncopyrighted/resolve/3be90335b66f24456a5d6659d9c8d208c0357119/"

VOCAB_BPE = ("1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", 456_318)
ENCODER_JSON = ("196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", 1_042_301)

# Hugging Face's repositories of the four sizes: commit, then SHA-256 and size of config.json and model.safetensors.
_Known = tuple[str | None, int | None]
HUB_MODELS: dict[str, tuple[str, _Known, _Known]] = {
    "gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        ("0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4", 665),
        ("248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", 548_105_171),
    ),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", (None, None), (None, None)),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", (None, None), (None, None)),
    "gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        ("be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a", None),
        ("0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a", None),
    ),
}
OPENAI_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}

# OpenAI's own checkpoints: SHA-256 and size of hparams.json, model.ckpt.index and model.ckpt.data-00000-of-00001.
_CHECKPOINTS: dict[str, tuple[_Known, _Known, _Known]] = {
    "124M": (
        ("d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318", 90),
        ("71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687", 5_215),
        ("2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118", 497_759_232),
    ),
    "355M": ((None, 91), (None, 10_399), (None, 1_419_292_672)),
    "774M": ((None, None), (None, None), (None, None)),
    "1558M": ((None, None), (None, None), (None, None)),
}
_CHECKPOINT = ("dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb", 77)


def _hub_model(name: str) -> Entry:
    commit, config, weights = HUB_MODELS[name]
    at = f"{HUB}openai-community/{name}/resolve/{commit}/"
    files = {
        "config.json": config,
        "model.safetensors": weights,
        "vocab.json": ENCODER_JSON,
        "merges.txt": VOCAB_BPE,
    }
    size = OPENAI_SIZES[name]
    return Entry(
        f"GPT-2 {size} in Hugging Face's format, with its vocabulary",
        tuple(Remote(file, (at + file,), *known) for file, known in files.items()),
    )


def _openai_model(size: str) -> Entry:
    hparams, index, data = _CHECKPOINTS[size]
    files = {
        "checkpoint": _CHECKPOINT,
        "hparams.json": hparams,
        "model.ckpt.index": index,
        "model.ckpt.data-00000-of-00001": data,
        "encoder.json": ENCODER_JSON,
        "vocab.bpe": VOCAB_BPE,
    }
    places = (f"{_OPENAI}gpt-2/models/{size}/", f"{_BOOK_MIRROR}gpt2/{size}/")
    return Entry(
        f"GPT-2 {size}, OpenAI's own TensorFlow checkpoint, with its vocabulary",
        tuple(Remote(file, tuple(at + file for at in places), *known) for file, known in files.items()),
    )


def _text(what: str, name: str, url: str, sha256: str | None, size: int | None) -> Entry:
    return Entry(what, (Remote(name, (url,), sha256, size),))


ENTRIES: dict[str, Entry] = {
    "the-verdict": _text(
        'Edith Wharton, "The Verdict": the text of the book\'s chapters 2 to 5',
        "the-verdict.txt",
        _BOOK + "ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        20_479,
    ),
    "shakespeare": _text(
        "Shakespeare, 1.1 MB: char-rnn's and nanoGPT's tinyshakespeare",
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
        "data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
    ),
    "sms-spam": Entry(
        "UCI SMS Spam Collection: 5,574 messages, ham or spam",
        (
            Remote(
                "SMSSpamCollection.tsv",
                (
                    "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
                    _BOOK_MIRROR + "sms%2Bspam%2Bcollection.zip",
                ),
                "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
                477_907,
                member="SMSSpamCollection",
                archive_sha256="1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
            ),
        ),
    ),
    "instructions": _text(
        "1,100 instructions with answers: the book's chapter 7",
        "instruction-data.json",
        _BOOK + "ch07/01_main-chapter-code/instruction-data.json",
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        203_524,
    ),
    "preferences": _text(
        "the same with a chosen and a rejected answer",
        "instruction-data-with-preference.json",
        _BOOK + "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        386_968,
    ),
    "pile-val": _text(
        "the Pile's validation part without its copyrighted sources, as jsonl.zst",
        "pile-val.jsonl.zst",
        _PILE + "val.jsonl.zst",
        "db5e5d1532bf8dc33a6589b50ecba1a8c96f7b4b9cb343d168e603c393007c26",
        338_045_152,
    ),
    "pile-00": _text(
        "one of the 30 training shards of the same Pile, about 11 GB",
        "pile-00.jsonl.zst",
        _PILE + "train/00.jsonl.zst",
        None,
        None,
    ),
    "gpt2-vocab": Entry(
        "GPT-2's vocabulary, for --tokenizer and LLMFAST_GPT2_VOCAB",
        (
            Remote("encoder.json", (_OPENAI + "gpt-2/encodings/main/encoder.json",), *ENCODER_JSON),
            Remote("vocab.bpe", (_OPENAI + "gpt-2/encodings/main/vocab.bpe",), *VOCAB_BPE),
        ),
    ),
    **{name: _hub_model(name) for name in HUB_MODELS},
    **{f"gpt2-{size}": _openai_model(size) for size in _CHECKPOINTS},
}
