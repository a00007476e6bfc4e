"""Model and run configuration: plain dataclasses, the single source of flags, TOML keys and help texts.

Nothing here imports torch, so that ``llmfast --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llmfast.errors import UserError

Activation = Literal["gelu_tanh", "gelu", "relu"]
Init = Literal["gpt2", "pytorch"]


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": help})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def suggest(name: str, known: Any) -> str:
    """' (did you mean X?)' where a known name is close to ``name``, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a GPT-2-style decoder.

    Defaults are OpenAI's GPT-2 124M. Raises ``UserError`` for values that make no model.
    """

    vocab_size: int = option(50257, "number of token ids")
    block_size: int = option(1024, "longest context, in tokens")
    n_layer: int = option(12, "transformer layers")
    n_head: int = option(12, "attention heads")
    n_embd: int = option(768, "width of the residual stream")
    dropout: float = option(0.0, "dropout on embeddings, attention weights and residual branches")
    bias: bool = option(True, "bias in linear layers and layer norms")
    qkv_bias: bool | None = option(None, "bias of the query/key/value projection (default: as bias)")
    activation: Activation = option("gelu_tanh", "MLP activation")
    tie_embeddings: bool = option(True, "output head shares the token embedding's weight")
    lm_head_bias: bool = option(False, "bias of the output head")
    attn_out_proj: bool = option(True, "output projection after attention")
    attn_scale: float | Literal["n_embd"] | None = option(
        None, "attention score scale: a number, or n_embd for 1/sqrt(n_embd) (default: 1/sqrt(head size))"
    )
    layer_norm_eps: float = option(1e-5, "epsilon of the layer norms")
    init: Init = option("gpt2", "weight initialisation: gpt2 (scaled residuals) or pytorch (PyTorch's defaults)")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        for name in ("bias", "tie_embeddings", "lm_head_bias", "attn_out_proj", "qkv_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name, value) != ("qkv_bias", None):
                raise UserError(f"{name} must be true or false, got {value!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if not _is_number(self.layer_norm_eps) or not self.layer_norm_eps > 0.0:
            raise UserError(f"layer_norm_eps must be a number above 0, got {self.layer_norm_eps!r}")
        if self.activation not in ("gelu_tanh", "gelu", "relu"):
            raise UserError(f"activation must be gelu_tanh, gelu or relu, got {self.activation!r}")
        if self.init not in ("gpt2", "pytorch"):
            raise UserError(f"init must be gpt2 or pytorch, got {self.init!r}")
        if self.attn_scale not in (None, "n_embd") and not _is_number(self.attn_scale):
            raise UserError(f"attn_scale must be a number or n_embd, got {self.attn_scale!r}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def softmax_scale(self) -> float:
        """The factor on attention scores before the softmax."""
        if self.attn_scale is None:
            return self.head_size**-0.5
        return self.n_embd**-0.5 if self.attn_scale == "n_embd" else float(self.attn_scale)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The configuration called ``name`` (see ``PRESETS``), with ``overrides`` on top."""
        if name not in PRESETS:
            raise UserError(f"unknown model preset {name!r}{suggest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Build from a mapping; an unknown key is a ``UserError`` with a suggestion."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"unknown model option {key!r}{suggest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_TLFS: dict[str, Any] = dict(
    vocab_size=50304, qkv_bias=False, activation="relu", tie_embeddings=False, lm_head_bias=True, init="pytorch"
)

PRESETS: dict[str, dict[str, Any]] = {
    # For a laptop; the vocabulary follows the tokenizer.
    "tiny": dict(vocab_size=4096, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "small": dict(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_embd=384),
    # OpenAI, "Language Models are Unsupervised Multitask Learners" (2019).
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    # "Build a Large Language Model (From Scratch)", chapter 4.
    "book-124m": dict(qkv_bias=False, tie_embeddings=False, dropout=0.1, init="pytorch"),
    # train-llm-from-scratch.
    "tlfs-13m": dict(n_layer=1, n_embd=128, n_head=8, block_size=128, **_TLFS),
    "tlfs-77m": dict(n_layer=8, n_embd=512, n_head=8, block_size=512, **_TLFS),
    "tlfs-406m": dict(n_layer=24, n_embd=1024, n_head=16, block_size=1024, **_TLFS),
    "tlfs-3b": dict(n_layer=64, n_embd=2048, n_head=16, block_size=512, **_TLFS),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside linear layers (Hu et al. 2021): W x + (alpha / r) B A dropout(x).

    ``targets`` are ends of module names (``"c_attn"``, ``"mlp.c_proj"``, ``"lm_head"``), or ``"all-linear"``, which
    is every linear layer but the output head, as in PEFT. ``split_qkv`` gives the fused query/key/value projection
    one adapter each for q, k and v. Raises ``UserError`` for values that make no adapter.
    """

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    split_qkv: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise UserError(f"lora_r must be a positive integer, got {self.r!r}")
        if not _is_number(self.alpha) or not self.alpha > 0:
            raise UserError(f"lora_alpha must be a number above 0, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora_dropout must lie in [0, 1), got {self.dropout!r}")
        if not self.targets or isinstance(self.targets, str) or not all(isinstance(t, str) and t for t in self.targets):
            raise UserError(f"lora_targets must be names of modules, got {self.targets!r}")

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


@dataclass
class TrainConfig:
    """Options of the training loop, whatever it trains."""

    out: str = option("runs/run", "run directory: config.toml, metrics.jsonl, loss.png, samples.txt, checkpoints/")
    resume: bool = option(False, "go on from the newest checkpoint in --out that verifies")
    seed: int = option(1337, "seed of initialisation, data order, dropout and samples")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute type; the weights stay float32 (auto: bfloat16 on GPUs that have it, else float32)"
    )
    backend: str = option(
        "auto", "kernels: auto, cuda, triton, cpp, torch, or per op: attention=triton,layer_norm=cuda"
    )
    compile: bool = option(False, "wrap the model in torch.compile")
    threads: int | None = option(None, "CPU threads (default: one a core)")
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = option(
        "auto",
        "of several ranks (torchrun): a copy of the model on each (ddp; auto), its parameters, gradients and optimizer "
        "state in shards (fsdp), or in shards on every machine (hsdp)",
    )

    max_steps: int = option(1000, "optimizer steps")
    epochs: float | None = option(None, "passes over the training data; replaces --max-steps")
    micro_batch_size: int = option(8, "sequences in one forward pass")
    batch_size: int | None = option(None, "sequences in one optimizer step (default: the micro batch)")
    block_size: int | None = option(None, "tokens in a sequence (default: the model's block size)")
    stride: int | None = option(None, "distance between sliding windows (default: block size)")
    sampling: Literal["sliding", "random"] = option("sliding", "shuffled sliding windows, or windows at random places")
    shuffle: bool = option(True, "shuffle sliding windows in every epoch")

    learning_rate: float = option(1e-3, "peak learning rate")
    min_learning_rate: float | None = option(None, "final learning rate of the schedule (default: a tenth of the peak)")
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.1, "AdamW weight decay")
    decay: Literal["matrices", "all"] = option("matrices", "what decays: matrices and embeddings, or every parameter")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")
    adam_eps: float = option(1e-8, "AdamW epsilon")
    grad_clip: float = option(1.0, "clip the gradient norm (0: off)")
    activation_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")

    log_every: int = option(10, "steps between metrics lines")
    eval_every: int | None = option(250, "steps between evaluations (0: only at the end)")
    eval_batches: int = option(20, "micro batches in one evaluation (0: the whole split)")
    eval_train: bool = option(False, "also estimate the training loss at every evaluation, without dropout")
    patience: int | None = option(None, "stop after so many evaluations without a lower validation loss")
    sample_every: int | None = option(None, "steps between samples (default: with every evaluation; 0: never)")
    sample_prompt: str = option("\n", "prompt of the samples")
    sample_tokens: int = option(128, "length of a sample, in tokens")
    save_every: int | None = option(
        None, "steps between checkpoints (default: with every evaluation; 0: only at the end)"
    )
    keep: int = option(2, "periodic checkpoints to keep, beside the best one")
    async_save: Literal["auto", "on", "off"] = option(
        "auto", "write checkpoints beside training, from a copy in the CPU's memory (auto: on GPUs)"
    )


@dataclass
class PretrainConfig(TrainConfig):
    """Options of ``llmfast pretrain``: the loop's, the data's and the model's."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "shards, token files or text: files, folders or globs (default: the Python standard library)"
        },
    )
    val_data: list[str] = field(default_factory=list, metadata={"help": "validation data (default: a part of --data)"})
    val_fraction: float = option(0.1, "part of --data kept for validation")
    split: Literal["auto", "documents", "characters"] = option(
        "auto", "what is split: whole documents, or the characters of one text (auto: documents if there are several)"
    )
    tokenizer: str | None = option(
        None, "gpt2, byte, char, bpe, or a saved tokenizer (default: bpe of at most 4,096 tokens trained on --data)"
    )
    tokenizer_size: int = option(4096, "most tokens of a trained bpe")
    checkpoint: str | None = option(None, "start from these weights, with a fresh optimizer")
    model: str = option("tiny", "preset: " + ", ".join(PRESETS))
    vocab_size: int | None = option(None, "model option: token ids (default: the preset's, or the tokenizer's)")
    n_layer: int | None = option(None, "model option: layers")
    n_head: int | None = option(None, "model option: heads")
    n_embd: int | None = option(None, "model option: width")
    dropout: float | None = option(None, "model option: dropout")
    bias: bool | None = option(None, "model option: bias in linear layers and layer norms")
    qkv_bias: bool | None = option(None, "model option: bias of the query/key/value projection")
    activation: Activation | None = option(None, "model option: MLP activation")
    tie_embeddings: bool | None = option(None, "model option: output head shares the token embedding")
    init: Init | None = option(None, "model option: weight initialisation")


@dataclass
class FinetuneConfig(TrainConfig):
    """Options of every fine-tuning: the loop's, the base model's, the data's, and what of the model is trained."""

    checkpoint: str = field(
        kw_only=True,
        metadata={"help": "the base: a run (its best checkpoint), its checkpoints folder, or a checkpoint"},
    )
    data: str = field(kw_only=True, metadata={"help": "the examples: one file"})
    val_data: str | None = option(None, "examples for validation (default: a part of --data)")
    test_data: str | None = option(None, "examples for the test at the end (default: a part of --data)")
    val_fraction: float = option(0.1, "part of --data kept for validation")
    test_fraction: float = option(0.2, "part of --data kept for the test at the end")
    split_seed: int = option(123, "seed of the split")
    skip_bad: bool = option(False, "leave out examples that cannot be used, and say how many, instead of stopping")
    max_length: int | None = option(None, "cut examples to so many tokens (default: a longer one is an error)")
    dropout: float | None = option(None, "model option: dropout (default: the base's)")
    tokenizer: str | None = option(None, "the base's tokenizer, where its checkpoint holds none")

    train: Literal["all", "lora"] = option("all", "what is trained: all parameters, or low-rank adapters beside them")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: float = option(16.0, "the adapters' output is scaled by alpha / r")
    lora_dropout: float = option(0.0, "dropout in front of the adapters")
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "modules that get an adapter, by the end of their names, as c_attn, mlp.c_proj or lm_head; "
            "all-linear: all but the output head"
        },
    )
    lora_split_qkv: bool = option(False, "one adapter each for query, key and value, instead of one for all three")

    epochs: float | None = option(3.0, "passes over the training examples")
    learning_rate: float = option(5e-5, "peak learning rate")
    warmup_steps: int = option(10, "steps of linear warm-up")
    eval_every: int | None = option(None, "steps between evaluations (default: once an epoch; 0: only at the end)")
    eval_batches: int = option(0, "micro batches in one evaluation (0: the whole split)")

    # Options of the loop that fine-tunings do not have.
    hidden: ClassVar[tuple[str, ...]] = ("max_steps", "block_size", "stride", "sampling", "shuffle")

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(
            self.lora_r, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets), self.lora_split_qkv
        )


@dataclass
class ClassifyConfig(FinetuneConfig):
    """Options of ``llmfast finetune classify``."""

    data: str = field(
        kw_only=True, metadata={"help": "the examples: one CSV, TSV, JSON or JSONL file with a text and a label each"}
    )
    text_column: str | None = option(None, "column of the text (default: guessed, and said)")
    label_column: str | None = option(None, "column of the label (default: guessed, and said)")
    balance: bool = option(False, "take as many examples of each class as the rarest has")
    class_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "weight of a class in the loss, as spam=3; balanced: each class counts as much as another"},
    )
    pad_to: int | None = option(None, "pad texts to so many tokens (default: to the longest of a batch)")
    train: Literal["all", "last-block", "head", "lora"] = option(  # type: ignore[assignment]
        "all", "what is trained: all parameters; last-block: last layer, final norm and head; the head; or adapters"
    )
    sample_every: int | None = option(0, "a classifier writes no samples")

    hidden: ClassVar[tuple[str, ...]] = (*FinetuneConfig.hidden, "sample_every", "sample_prompt", "sample_tokens")


@dataclass
class ConversationConfig(FinetuneConfig):
    """Options of tuning on conversations."""

    prompt_style: str | None = option(
        None,
        "alpaca, phi3, chatml, plain, a template with {instruction} and {input}, or a file that holds one "
        "(default: the one that the base was tuned with, else alpaca)",
    )
    split: Literal["book", "random"] = option(
        "book",
        "training, test and validation examples in the order of --data (the book's), or shuffled by --split-seed",
    )
    val_fraction: float = option(0.05, "part of --data kept for validation")
    test_fraction: float = option(0.1, "part of --data kept for the test at the end")
    response_tokens: int = option(
        256, "longest answer to an example of the test split, in tokens (0: none are written)"
    )


@dataclass
class InstructConfig(ConversationConfig):
    """Options of ``llmfast finetune instruct``; learning rate, batch and epochs are the book's."""

    mask_instruction: bool = option(False, "learn the responses only, not the prompts")
    packing: bool = option(False, "several conversations in a row of the context's length, kept apart by attention")
    epochs: float | None = option(2.0, "passes over the training examples")


@dataclass
class PreferenceConfig(ConversationConfig):
    """Options of ``llmfast finetune preference``; learning rate, batch and epochs are the book's."""

    method: Literal["dpo", "orpo", "kto"] = option("dpo", "the loss: DPO and ORPO learn from pairs, KTO from labels")
    beta: float = option(0.1, "dpo, kto: how closely the model keeps to the reference; orpo: weight of the odds ratio")
    average_log_probs: bool = option(False, "dpo, kto: mean over a response's tokens instead of their sum (the book's)")
    desirable_weight: float = option(1.0, "kto: weight of desirable examples")
    undesirable_weight: float = option(1.0, "kto: weight of undesirable examples")
    precompute_reference: bool = option(
        False, "ask the reference model once, before the training, instead of holding it beside the model"
    )
    epochs: float | None = option(1.0, "passes over the training examples")
    learning_rate: float = option(5e-6, "peak learning rate")
    weight_decay: float = option(0.01, "AdamW weight decay")
    dropout: float | None = option(0.0, "model option: dropout (the reference has none)")


MODEL_OVERRIDES = "vocab_size n_layer n_head n_embd dropout bias qkv_bias activation tie_embeddings init".split()
