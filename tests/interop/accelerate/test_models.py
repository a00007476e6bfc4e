"""accelerate() on other people's models: the same losses, gradients and texts, by other kernels, and back again."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import nn

import llmfast
from llmfast import ops
from llmfast.interop.accelerate.swap import swap_of
from llmfast.ops import _library
from tests.interop.accelerate.models import MODELS, C, V, book, hugging_face, loss_of, nanogpt

pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif(_library.why_not_loaded() is not None, reason="needs the compiled kernels")
X = torch.randint(1, V, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["native", "torch"])
def backend(request):
    """Both the kernels, with whole decoder layers, and the way without any."""
    if request.param == "native" and _library.why_not_loaded() is not None:
        pytest.skip("needs the compiled kernels")
    with ops.use_backend("cpp" if request.param == "native" else "torch"):
        yield request.param


def results(model: nn.Module) -> list[torch.Tensor]:
    """Loss and gradients by name; the gradients are cleared."""
    loss = loss_of(model, X)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(found, wanted, rel=2e-5):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) <= rel * float(b.norm()) + 1e-7


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own_and_restore_gives_back_its_bits(name, backend):
    model = MODELS[name]()
    before, keys = results(model), list(model.state_dict())
    kind, parameters = type(model), [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()]
    report = llmfast.accelerate(model)
    assert {e.swap for e in report.swapped} >= {"decoder layer", "attention", "mlp", "layer norm", "head"}
    assert {e.type for e in report.kept} <= {"Embedding"}
    assert list(model.state_dict()) == keys
    assert [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()] == parameters
    assert isinstance(model, kind)
    assert inspect.signature(model.forward) == inspect.signature(kind.forward.__get__(model))
    assert_equal(results(model), before)
    assert llmfast.restore(model) is model
    assert type(model) is kind
    assert all(swap_of(m) is None and not any("llmfast" in k for k in m.__dict__) for m in model.modules())
    for again, first in zip(results(model), before, strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize(
    ("name", "stays"),
    [("gqa", "att.W_query"), ("mla", "att.W_query"), ("swa", "att.W_query"), ("moe", "ff.gate")],
)
def test_the_books_other_attentions_and_experts_stay_and_the_rest_is_swapped(name, stays, backend):
    model = book(name)
    for p in model.parameters():  # an expert that no token asks for has no gradient
        p.grad = torch.zeros_like(p)
    loss_of(model, X).backward()
    wanted = [p.grad for p in model.parameters()]
    report = llmfast.accelerate(model)
    assert {e.swap for e in report.swapped} == {"layer norm", "head", "attention" if name == "moe" else "mlp"}
    assert f"trf_blocks.0.{stays}" in {e.name for e in report.kept}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss_of(model, X).backward()
    assert_equal([p.grad for p in model.parameters()], wanted)


def test_nothing_but_the_instance_changes():
    one, other = hugging_face(), hugging_face()
    classes = {type(m): dict(vars(type(m))) for m in one.modules()}
    functions = {module: dict(vars(module)) for module in (torch.nn.functional, torch.nn, torch)}
    llmfast.accelerate(one)
    assert all(dict(vars(kind)) == before for kind, before in classes.items())
    assert all(dict(vars(module)) == before for module, before in functions.items())
    assert all(swap_of(m) is None for m in other.modules())


@native
@pytest.mark.parametrize("name", MODELS)
def test_whole_layers_run_in_one_call(name, fused_calls):
    model = MODELS[name]()
    llmfast.accelerate(model)
    fused_calls[0] = 0  # the proof before the swap took one
    results(model)
    assert fused_calls == [2]


def test_twice_is_once_and_the_report_says_the_same():
    model = hugging_face()
    first = str(llmfast.accelerate(model))
    kinds = [type(m) for m in model.modules()]
    assert str(llmfast.accelerate(model)) == first
    assert [type(m) for m in model.modules()] == kinds
    assert "transformer.h.0..1 (GPT2Block)" in first
    assert "logits=None" in first


@pytest.mark.parametrize("flag", ["attention", "layer_norm", "mlp", "loss"])
def test_flags_leave_their_part_alone(flag):
    model = hugging_face()
    report = llmfast.accelerate(model, **{flag: False})
    names = {"attention": "attention", "layer_norm": "layer norm", "mlp": "mlp", "loss": "loss"}
    found = {e.swap for e in report.swapped}
    assert names[flag] not in found
    assert found >= set(names.values()) - {names[flag]}
    assert ("decoder layer" in found) == (flag == "loss")
    assert any(e.reason == f"{flag}=False" for e in report.kept)
    if flag == "loss":
        assert model(X, labels=X).logits is not None


def test_the_process_is_tuned_for_a_model_on_the_cpu_unless_it_is_not_wanted():
    report = llmfast.accelerate(nanogpt())
    assert report.process == str(ops.tune_process())
    assert report.process in str(report)
    assert llmfast.accelerate(nanogpt(), tune_process=False).process is None
    with torch.device("meta"):
        elsewhere = nanogpt()
    assert llmfast.accelerate(elsewhere).process is None


def test_what_is_no_module_is_refused():
    for call in (llmfast.accelerate, llmfast.restore):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
            call({})


def test_logits_beside_the_loss_come_in_evaluation_or_when_asked():
    for model in (hugging_face(), nanogpt()):
        llmfast.accelerate(model)
        call = (lambda m: m(X, labels=X).logits) if hasattr(model.config, "n_positions") else (lambda m: m(X, X)[0])
        assert call(model) is None
        assert call(model.eval()) is not None
        model.llmfast_return_logits = False
        assert call(model) is None
        model.llmfast_return_logits = True
        assert call(model.train()) is not None
        llmfast.restore(model)
        assert not hasattr(model, "llmfast_return_logits")


@pytest.mark.parametrize(
    "options",
    [dict(num_items_in_batch=77), dict(shift_labels=X.roll(3, 1)), dict(return_dict=False), dict(use_cache=True)],
    ids=str,
)
def test_hugging_faces_loss_arguments(options):
    model = hugging_face()
    labels = X.masked_fill(X % 3 == 0, -100)
    wanted = model(X, labels=labels, **options)
    llmfast.accelerate(model)
    found = model(X, labels=labels, **options)
    torch.testing.assert_close(found[0], wanted[0])
    assert isinstance(found, tuple) == ("return_dict" in options)
    if "use_cache" in options:
        assert found.past_key_values.get_seq_length() == X.shape[1]
        torch.testing.assert_close(found.past_key_values.layers[1].keys, wanted.past_key_values.layers[1].keys,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    elif "return_dict" not in options:
        assert found.past_key_values is None


def test_hidden_states_and_a_loss_of_its_own_are_still_given():
    model = hugging_face()
    wanted = model(X, labels=X, output_hidden_states=True)
    llmfast.accelerate(model)
    found = model(X, labels=X, output_hidden_states=True)
    assert_equal(found.hidden_states, wanted.hidden_states)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    with pytest.warns(RuntimeWarning, match="loss function of its own"):
        assert model(X, labels=X).loss == 7


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2ForSequenceClassification"])
def test_other_heads_of_hugging_face(kind, backend):
    model = hugging_face(kind)
    options = {} if kind == "GPT2Model" else {"labels": torch.tensor([0, 1])}
    wanted = model(X, **options)[0]
    report = llmfast.accelerate(model)
    assert len([e for e in report.swapped if e.swap == "decoder layer"]) == 2
    torch.testing.assert_close(model(X, **options)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "shape"), [(nanogpt, (0, 5)), (book, (0, 5)), (hugging_face, (1, 1)), (nanogpt, (1, 1)), (book, (1, 1))]
)
def test_batches_of_nothing_and_of_one_token(make, shape, backend):
    model, ids = make().eval(), torch.ones(shape, dtype=torch.long)
    with torch.no_grad():
        wanted = logits_of(model, ids)
        llmfast.accelerate(model)
        found = logits_of(model, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_greedy_texts_are_the_same_with_and_without_padding(side, backend):
    model = hugging_face().eval()
    mask = torch.ones_like(X)
    if side != "none":
        mask[0, slice(-9, None) if side == "right" else slice(9)] = 0
    call = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    wanted = model.generate(X * mask, **call)
    logits = model(X * mask, attention_mask=mask).logits
    llmfast.accelerate(model)
    if side == "left":
        with pytest.warns(RuntimeWarning, match="left padding"):
            found = model(X * mask, attention_mask=mask).logits
    else:
        found = model(X * mask, attention_mask=mask).logits
    assert_equal([found], [logits])
    assert torch.equal(model.generate(X * mask, **call), wanted)


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


def greedy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(10):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def test_greedy_texts_of_nanogpt_and_the_book_are_the_same():
    for model in (nanogpt().eval(), book().eval(), book("kv cache").eval()):
        wanted = greedy(model, X)
        llmfast.accelerate(model)
        assert torch.equal(greedy(model, X), wanted)


def test_the_books_cache_takes_its_own_way():
    model = book("kv cache").eval()
    with torch.no_grad():
        wanted = model(X[:, :5], use_cache=True), model(X[:, 5:6], use_cache=True)
        model.reset_kv_cache()
        llmfast.accelerate(model)
        with pytest.warns(RuntimeWarning, match="called with a cache"):
            found = model(X[:, :5], use_cache=True), model(X[:, 5:6], use_cache=True)
    assert_equal(found, wanted)


def test_attention_weights_come_from_an_eager_model():
    model = hugging_face(attn_implementation="eager").eval()
    wanted = model(X, output_attentions=True)
    llmfast.accelerate(model)
    with pytest.warns(RuntimeWarning, match="attn_implementation='eager'"):
        found = model(X, output_attentions=True)
    assert len(found.attentions) == 2
    assert_equal(found.attentions, wanted.attentions)
    assert_equal([found.logits], [wanted.logits])


def test_cross_attention_stays_the_models_own():
    model = hugging_face(add_cross_attention=True)
    encoder = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(2))
    wanted = model(X, encoder_hidden_states=encoder).logits
    report = llmfast.accelerate(model)
    assert {e.name for e in report.kept if e.type == "GPT2Attention"} == {
        f"transformer.h.{i}.crossattention" for i in (0, 1)
    }
    assert_equal([model(X, encoder_hidden_states=encoder).logits], [wanted])


@pytest.mark.parametrize("make", [hugging_face, nanogpt, book])
@pytest.mark.parametrize("fresh", [False, True])
def test_dropout_acts_as_often_as_it_should(make, fresh):
    """The mean over many masks is the model without dropout, as far as the first layer's output goes."""
    model = make(dropout=0.2)
    if not fresh:
        loss_of(model, X)
    llmfast.accelerate(model)
    block = next(m for m in model.modules() if swap_of(m) == "decoder layer")
    x = torch.randn(1, 9, C, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    a = block(x)
    torch.manual_seed(0)
    assert torch.equal(block(x), a)
    assert not torch.equal(block(x), a)
    with torch.no_grad():
        many = block(x.expand(3000, -1, -1))
        own = llmfast.restore(block)(x.expand(3000, -1, -1))
    error = (many.std(0) - own.std(0)).abs() / own.std(0)
    assert float(error.mean()) < 0.05
    assert float(((many.mean(0) - own.mean(0)) / own.std(0)).abs().mean()) < 0.06


@pytest.mark.parametrize("make", [hugging_face, nanogpt, book])
def test_copies_pickles_and_state_dicts(make):
    model = make()
    llmfast.accelerate(model)
    wanted = results(model)
    twin = copy.deepcopy(model)
    assert_equal(results(twin), wanted, 0)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_equal(results(loaded), wanted, 0)
    assert type(llmfast.restore(loaded)) is type(make())
    loaded.load_state_dict(model.state_dict())
    assert_equal(results(loaded), wanted)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert not torch.equal(results(model)[0], wanted[0])


def test_hugging_face_saves_and_loads_what_it_knows(tmp_path):
    model = hugging_face()
    wanted = results(model)
    llmfast.accelerate(model)
    model.save_pretrained(tmp_path)
    assert '"GPT2LMHeadModel"' in (tmp_path / "config.json").read_text()
    assert_equal(results(type(hugging_face()).from_pretrained(tmp_path).train()), wanted, 0)
