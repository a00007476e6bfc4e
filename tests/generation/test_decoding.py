"""generate_ids: cached equals uncached, a row equals itself alone, seeds, stops, the sliding window, bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmfast.config import GPTConfig
from llmfast.errors import UserError
from llmfast.generation import generate_ids
from llmfast.nn import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32, init="pytorch")
MODELS = {
    "tied": {},
    "gpt2 init": dict(init="gpt2"),
    "untied relu": dict(tie_embeddings=False, activation="relu", lm_head_bias=True),
    "no output projection": dict(attn_out_proj=False, attn_scale="n_embd", bias=False),
    "context of 1": dict(block_size=1),
    "context of 2": dict(block_size=2),
    "context of 7": dict(block_size=7),
}
OPTIONS = {
    "greedy": dict(temperature=0),
    "sampled": dict(seed=3),
    "filtered": dict(seed=1, temperature=0.7, top_k=9, top_p=0.8),
    "stopped": dict(seed=1, top_p=0.6, eot_id=11),
}
PROMPTS = [[1, 2, 3], [5] * 40, [7], list(range(16)), list(range(50, 65))]


def small(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **options}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
def test_cached_batched_and_single_generation_give_the_same_ids(shape, options):
    model = small(**shape)
    batch = generate_ids(model, PROMPTS, max_new_tokens=37, **options)
    assert batch == generate_ids(model, PROMPTS, max_new_tokens=37, use_cache=False, **options)
    assert batch == [generate_ids(model, [p], max_new_tokens=37, **options)[0] for p in PROMPTS]
    assert batch == generate_ids(model, PROMPTS[::-1], max_new_tokens=37, **options)[::-1]


@pytest.mark.parametrize("length", [3, 16, 40])
def test_greedy_ids_follow_a_window_slid_by_hand(length):
    model, N = small().eval(), 16
    tokens = list(range(length))
    window = tokens[-N:]
    for _ in range(50):
        if len(window) > N:
            window = window[-N // 2 :]
        with torch.no_grad():
            token = model(torch.tensor([window]))[0][0, -1].argmax().item()
        tokens.append(token)
        window = [*window, token]
    assert generate_ids(model, [list(range(length))], max_new_tokens=50, temperature=0) == [tokens[length:]]


def test_the_window_is_read_again_only_every_half_context():
    model, lengths = small(), []
    read = model.hidden_states
    model.hidden_states = lambda idx, **kw: lengths.append(idx.shape[1]) or read(idx, **kw)
    generate_ids(model, [[1, 2, 3]], max_new_tokens=60)
    assert sum(lengths) < 2.2 * 60


def test_the_seed_fixes_the_text_and_other_seeds_give_others():
    model = small()
    first = generate_ids(model, PROMPTS, seed=5)
    torch.manual_seed(99)
    assert generate_ids(model, PROMPTS, seed=5) == first
    assert generate_ids(model, PROMPTS, seed=6) != first


def test_without_a_seed_torchs_generator_decides():
    model = small()
    torch.manual_seed(4)
    first, second = generate_ids(model, [[1]]), generate_ids(model, [[1]])
    torch.manual_seed(4)
    assert generate_ids(model, [[1]]) == first
    assert first != second


def test_a_given_seed_and_greedy_choice_leave_torchs_generator_alone():
    model = small()
    state = torch.get_rng_state()
    generate_ids(model, [[1]], seed=1)
    generate_ids(model, [[1]], temperature=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_copies_of_a_prompt_give_different_samples():
    samples = generate_ids(small(), [[1, 2]] * 5, seed=0)
    assert len({tuple(sample) for sample in samples}) == 5


def test_rows_end_before_the_end_of_text_id_and_the_others_go_on():
    model = small()
    free = generate_ids(model, PROMPTS, max_new_tokens=30, seed=2)
    eot = free[1][7]
    ended = generate_ids(model, PROMPTS, max_new_tokens=30, seed=2, eot_id=eot)
    assert ended == [row[: row.index(eot)] if eot in row else row for row in free]
    assert len(ended[1]) <= 7


def test_on_token_sees_every_id_in_order_and_can_end_its_row():
    model, seen = small(), {0: [], 1: []}

    def on_token(row: int, token: int) -> bool:
        seen[row].append(token)
        return row == 1 and len(seen[1]) == 4

    rows = generate_ids(model, [[1, 2], [3]], max_new_tokens=9, seed=0, on_token=on_token)
    assert [len(row) for row in rows] == [9, 4]
    assert rows == [seen[0], seen[1]]


def test_ids_of_a_padded_vocabulary_are_never_chosen():
    model = small(tie_embeddings=False, lm_head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[90:] = 50.0
    assert min(generate_ids(model, [[1]], seed=0)[0]) >= 90
    assert max(generate_ids(model, [[1]], seed=0, vocab_size=90)[0]) < 90


def test_every_module_keeps_its_mode_also_after_an_error():
    model = small(dropout=0.5)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]

    def fail(row: int, token: int) -> bool:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_ids(model, [[1]], on_token=fail)
    assert [module.training for module in model.modules()] == modes
    assert generate_ids(model, [[1]], temperature=0) == generate_ids(model.eval(), [[1]], temperature=0)


def test_nothing_asked_is_nothing_done():
    assert generate_ids(small(), []) == []
    assert generate_ids(small(), [[1], [2, 3]], max_new_tokens=0) == [[], []]


def test_prompts_may_be_arrays_and_are_not_changed():
    prompt = np.array([1, 2, 3], np.uint16)
    ids = [1, 2, 3]
    assert generate_ids(small(), [prompt], seed=0) == generate_ids(small(), [ids], seed=0)
    assert ids == prompt.tolist() == [1, 2, 3]


def test_a_bfloat16_model_and_autocast_generate():
    assert len(generate_ids(small().bfloat16(), PROMPTS[:3], max_new_tokens=20, seed=0)[1]) == 20
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate_ids(small(), PROMPTS[:3], max_new_tokens=20, seed=0)[1]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), r"temperature must be 0 \(greedy\) or a positive number, got -0.1"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_k=0), "top_k must be a positive integer, got 0"),
        (dict(top_k=2.5), "top_k must be a positive integer, got 2.5"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (dict(top_p=1.01), r"top_p must lie in \(0, 1\], got 1.01"),
        (dict(max_new_tokens=-1), "max_new_tokens must be a whole number, 0 or more, got -1"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be a whole number, 0 or more, got 2.5"),
        (dict(vocab_size=98), r"vocab_size must lie in 1 \.\. 97"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 97]]), "prompt 0 has an id outside the model's vocabulary of 97"),
        (dict(prompts=[[-1]]), "prompt 0 has an id outside"),
    ],
)
def test_bad_arguments_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        generate_ids(small(), **{"prompts": [[1]], **options})
    assert "\n" not in str(caught.value)


def test_a_broken_model_is_said_to_be_broken():
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[5, 5] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        generate_ids(model, [[5]], max_new_tokens=3)
