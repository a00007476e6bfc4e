"""``bench ops``: what is timed is right, what is wrong is never timed, and the same provider twice is even."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmfast.bench import plots, tables, timing
from llmfast.bench.case import Case, resident_growth
from llmfast.bench.ceilings import Ceilings, measure_ceilings, measure_read
from llmfast.bench.ops import Selection, bench_ops, describe_shape, parse_shape, pick
from llmfast.bench.providers import CannotRun, Provider, providers
from llmfast.cli.main import main
from llmfast.errors import UserError
from llmfast.ops._registry import OPS

CPU = torch.device("cpu")
SHAPE = {"rows": (4, 33), "width": 96}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings that need no measuring, and short samples."""
    ceilings = Ceilings(2e10, {"float32": 1e11, "bfloat16": 2e11})
    monkeypatch.setattr("llmfast.bench.ops.measure_ceilings", lambda device, dtypes: ceilings)
    monkeypatch.setitem(timing.SAMPLE, False, 0.001)


def run(*who: Provider, **options):
    options = {"ops": ["layer_norm"], "shapes": [SHAPE], "dtypes": [torch.float32], "samples": 3, **options}
    return bench_ops(CPU, Selection(**options), progress=False, among=list(who))


def made(name, function):
    """A provider of layer_norm: ``function(inputs)``."""
    return Provider(name, lambda op, inputs: lambda: function(inputs), pytorch=name == "eager")


def right(inputs):
    return torch.layer_norm(inputs["x"], (96,), inputs["weight"], inputs["bias"], inputs["eps"])


class Returns(torch.autograd.Function):
    """A forward pass of any kind with the right gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, y):
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = torch.layer_norm(x, (96,), weight, bias)
        return *torch.autograd.grad(y, (x, weight, bias), dy), None


def returning(inputs, y):
    return Returns.apply(inputs["x"], inputs["weight"], inputs["bias"], y.detach())


def slightly_wrong(inputs):
    return right(inputs) * 1.001


def unwritten(inputs):
    y = right(inputs).detach().clone()
    out = torch.empty_like(y)
    out[:-1] = y[:-1]
    return returning(inputs, out)


class Cached:
    """The first answer for the same tensors, again and again."""

    def __init__(self):
        self.kept = {}

    def __call__(self, inputs):
        key = inputs["x"].data_ptr(), inputs["x"]._version
        if key not in self.kept:
            self.kept[key] = right(inputs).detach()
        return returning(inputs, self.kept[key])


class CachedLater(Cached):
    """Computes while it is being checked."""

    calls = 0

    def __call__(self, inputs):
        self.calls += 1
        return super().__call__(inputs) if self.calls > 4 else right(inputs)


def wrong_gradient(inputs):
    y = right(inputs)
    return y + (inputs["weight"] - inputs["weight"].detach())


@pytest.mark.parametrize("cheat", [slightly_wrong, unwritten, Cached(), CachedLater(), wrong_gradient])
def test_a_provider_that_is_wrong_is_reported_and_not_timed(cheat):
    results = run(made("eager", right), made("cheat", cheat))
    assert {r["provider"] for r in results["ops"]} == {"eager"}
    assert [r["provider"] for r in results["wrong"]] == ["cheat"]
    assert "cheat: WRONG: " in tables.ops_table(results)


def test_what_other_programs_use_is_told(tmp_path, capsys, monkeypatch):
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not tell")
    others = timing.Others()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.7)
        share = others.share()
        busy.kill()
    assert 0.1 / os.cpu_count() < share <= 1
    monkeypatch.setattr(timing.Others, "share", lambda self: 0.37)
    words = ["bench", "ops", "layer_norm", "--shape", "rows=5,width=64", "--dtype", "float32", "--samples", "3"]
    assert main([*words, "--device", "cpu", "--providers", "eager", "--save", str(tmp_path / "a.json")]) == 0
    assert "other programs used 37%" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["others"] == 0.37


def test_results_without_a_time_are_drawn(tmp_path):
    plots.plot_ops(run(made("cheat", slightly_wrong)), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_products_of_lower_precision_are_wrong_and_another_order_of_adding_is_not():
    """The rule for errors beyond the tests' limit: docs/benchmarks.md."""
    shape = {"rows": (1024,), "C": 64, "M": 96}

    def provider(name, product):
        def make(op, inputs):
            def call():
                x, w1, b1, w2, b2 = (inputs[k] for k in ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias"))
                return product(torch.nn.functional.gelu(product(x, w1) + b1, approximate="tanh"), w2) + b2

            return call

        return Provider(name, make)

    class RunningSums(torch.autograd.Function):
        """x @ w.T, whose gradient by w adds row after row."""

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            dw = torch.zeros_like(w)
            for row, d in zip(x, dy, strict=True):
                dw.addr_(d, row)
            return dy @ w, dw

    low = provider("low", lambda x, w: (x.bfloat16() @ w.bfloat16().t()).float())
    results = run(low, provider("running", RunningSums.apply), ops=["mlp"], shapes=[shape], modes=("both",))
    assert [r["provider"] for r in results["wrong"]] == ["low"]
    (running,) = results["ops"]
    assert 1 < running["error_ratio"] < 4
    assert f"{running['error_ratio']:.2f}" in tables.ops_table(results)


def test_reasons_of_a_provider_that_cannot_run_are_shown():
    def declines(op, inputs):
        raise CannotRun("no such device")

    def fails(inputs):
        raise RuntimeError("first line\nsecond line")

    results = run(made("eager", right), Provider("absent", declines), made("broken", fails))
    table = tables.ops_table(results)
    assert "absent: cannot run: no such device" in table
    assert "broken: cannot run: RuntimeError: first line\n" in table + "\n"


def test_the_same_provider_twice_is_even_within_the_printed_spread():
    results = run(made("eager", right), made("again", right), samples=15)
    again = [r for r in results["ops"] if r["provider"] == "again"]
    assert len(again) == 3
    for record in again:
        median, low, high = record["ratio_to_eager"]
        assert low <= 1.0 <= high
        assert 0.6 < median < 1.6  # on a busy machine almost any spread holds 1


def test_a_slower_provider_is_not_even():
    """What the test above would see."""

    def slower(inputs):
        for _ in range(4):
            y = right(inputs)
        return y

    results = run(made("eager", right), made("slower", slower), samples=15, modes=("forward",))
    assert results["ops"][1]["ratio_to_eager"][0] < 0.7


def test_on_a_cpu_long_calls_get_fewer_samples_unless_a_number_is_asked_for(monkeypatch):
    monkeypatch.setattr("llmfast.bench.ops.SECONDS", 0.008)
    shape = {"modes": ("forward",), "samples": None}
    assert run(made("eager", right), **shape)["ops"][0]["samples"] == 8
    monkeypatch.setattr("llmfast.bench.ops.SECONDS", 0.001)
    assert run(made("eager", right), **shape)["ops"][0]["samples"] == 5
    assert run(made("eager", right), **{**shape, "samples": 7})["ops"][0]["samples"] == 7


def test_a_record_says_what_was_done_and_how_fast():
    results = run(*pick(providers(), ["eager", "llmfast torch"]))
    json.dumps(results)
    x = torch.empty(4, 33, 96)
    forward = next(r for r in results["ops"] if r["provider"] == "llmfast torch" and r["mode"] == "forward")
    assert (forward["bytes"], forward["flops"]) == (2 * x.nbytes + 2 * 96 * 4, 8 * x.numel())
    assert forward["bytes_per_second"] == pytest.approx(forward["bytes"] / forward["seconds"][0])
    ceilings = results["ceilings"]
    floor = max(forward["bytes"] / ceilings["copy"], forward["flops"] / ceilings["matmul"]["float32"])
    assert forward["share"] == pytest.approx(floor / forward["seconds"][0])
    assert forward["backend"] == "torch"
    assert forward["best_of_pytorch"] == "eager"
    assert results["schema"] == 1
    assert results["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", list(OPS))
def test_every_op_of_the_registry_can_be_timed(name):
    sample = OPS[name].samples[0]
    results = run(*pick(providers(), ["llmfast torch", "eager"]), ops=[name], shapes=[sample], modes=("both",))
    assert {r["provider"] for r in results["ops"]} == {"llmfast torch", "eager"}
    assert not results["wrong"]


def test_ceilings_are_those_of_a_copy_and_a_product():
    found = measure_ceilings(CPU, [torch.float32])
    assert 0.2 * found.copy < measure_read(CPU) < 20 * found.copy
    assert 1e8 < found.copy < 1e12
    assert 1e9 < found.matmul["float32"] < 1e14
    assert found.floor(int(found.copy), 0, "float32") == (pytest.approx(1.0), "copy")
    assert found.floor(0, int(found.matmul["float32"]), "float32") == (pytest.approx(1.0), "matmul")


def test_what_is_frozen_gets_no_gradient():
    case = Case(OPS["lora_linear"], OPS["lora_linear"].samples[0], torch.float32, CPU)
    assert case.wanted == ["x", "lora_A", "lora_B"]


def test_attention_too_large_for_float64_is_compared_by_heads(monkeypatch):
    monkeypatch.setattr("llmfast.bench.case.WHOLE", 2 * 16 * 16)
    shape = {"B": 2, "H": 3, "Tq": 16, "Tk": 16, "D": 8}
    options = {"ops": ["causal_attention"], "shapes": [shape], "modes": ("both",)}
    results = run(*pick(providers(), ["llmfast torch", "eager"]), **options)
    assert len(results["ops"]) == 2

    def other_scale(op, inputs):
        return lambda: op.eager(**inputs, scale=0.3)

    assert run(Provider("scaled", other_scale), **options)["wrong"]


def test_dropout_is_timed_and_checked_without():
    shape = {"rows": (4, 33), "width": 96, "dropout_p": 0.5}
    seen = []

    def sees(op, inputs):
        def call():
            seen.append(inputs["dropout_p"])
            return op.eager(**inputs)

        return call

    eager = pick(providers(), ["eager", "llmfast torch"])
    results = run(*eager, Provider("sees", sees), ops=["add_layer_norm"], shapes=[shape], modes=("both",))
    assert not results["wrong"]
    assert len(results["ops"]) == 3
    assert seen[0] == 0.0
    assert seen[-1] == 0.0
    assert 0.5 in seen


def test_memory_is_that_of_one_pass():
    def run():
        a = torch.empty(10_000_000, dtype=torch.uint8).fill_(1)
        del a
        torch.empty(30_000_000, dtype=torch.uint8).fill_(1)

    assert resident_growth(run) == pytest.approx(30e6, abs=4e6)


@pytest.mark.parametrize("name", list(OPS))
def test_shapes_are_written_as_they_are_read(name):
    op = OPS[name]
    for shape in (*op.gpu_samples, *op.cpu_samples):
        assert parse_shape(op, describe_shape(shape)) == shape


def test_t_sets_queries_and_keys():
    shape = parse_shape(OPS["causal_attention"], "B=1,H=2,T=8,D=4")
    assert (shape["Tq"], shape["Tk"]) == (8, 8)


@pytest.mark.parametrize(
    ("op", "text", "says"),
    [
        ("layer_norm", "rows=4x2,widht=8", "width"),
        ("layer_norm", "rows=4x2", "needs width"),
        ("layer_norm", "rows=4xtwo,width=8", "4xtwo"),
        ("layer_norm", "rows=4,width=0", "positive"),
        ("mlp", "rows=4,C=8,M", "'M'"),
    ],
)
def test_a_wrong_shape_is_the_users_mistake(op, text, says):
    with pytest.raises(UserError, match=says):
        parse_shape(OPS[op], text)


def test_the_command_prints_saves_and_plots(tmp_path, capsys):
    words = ["bench", "ops", "layer_norm", "--shape", "rows=5,width=64", "--dtype", "float32", "--samples", "3"]
    files = ["--save", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([*words, *files, "--device", "cpu", "--providers", "eager", "llmfast"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "a.json").read_text())
    for record in results["ops"]:
        assert tables.milliseconds(record["seconds"]) in printed
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    plots.plot_ops(results, tmp_path / "b.png")


@pytest.mark.parametrize(
    "words",
    [
        ["layer_nrom"],
        ["layer_norm", "--providers", "lama"],
        ["--shape", "rows=5,width=64"],
        ["layer_norm", "--samples", "0"],
        ["--save", "/no/such/folder/a.json"],
        ["--plot", "a.pdf"],
        ["--save", "/tmp"],
    ],
)
def test_mistakes_are_one_line(words, capsys):
    assert main(["bench", "ops", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "internal" not in error
