"""Which implementation runs, and what is said when none can."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from llmfast import UserError, ops
from llmfast.ops import _library, _registry, matmul
from llmfast.ops._registry import BACKENDS, OPS, current_setting, forget_choices, use_backend


@pytest.fixture(autouse=True)
def _fresh():
    forget_choices()
    yield
    forget_choices()


def _inputs(name):
    return OPS[name].inputs(OPS[name].samples[0], torch.float32, "cpu")


@pytest.fixture
def ran(monkeypatch):
    """The backends that layer_norm ran, in order."""
    calls = []
    op = OPS["layer_norm"]

    def watched(implementation):
        def run(*args):
            calls.append(implementation.backend)
            return implementation.run(*args)

        return dataclasses.replace(implementation, run=run)

    monkeypatch.setattr(op, "implementations", [watched(i) for i in op.implementations])
    return calls


needs_library = pytest.mark.skipif(_library.why_not_loaded() is not None, reason=str(_library.why_not_loaded()))
BIG, SMALL = (torch.randn(600, 64), torch.ones(64)), (torch.randn(6, 64), torch.ones(64))


@needs_library
def test_auto_takes_our_kernel_where_it_pays_and_a_forced_backend_always_runs(ran):
    ops.layer_norm(*BIG)
    ops.layer_norm(*SMALL)
    with use_backend("cpp"):
        ops.layer_norm(*SMALL)
    with use_backend("layer_norm=torch"):
        ops.layer_norm(*BIG)
    assert ran == ["cpp", "torch", "cpp", "torch"]


@needs_library
def test_settings_nest_and_a_per_op_setting_leaves_the_others(ran):
    with use_backend("cpp"):
        with use_backend("attention=torch"):
            assert current_setting().backend("causal_attention") == "torch"
            ops.layer_norm(*SMALL)
            with use_backend("torch"):
                ops.layer_norm(*SMALL)
            ops.layer_norm(*SMALL)
        assert current_setting().backend("causal_attention") == "cpp"
    assert str(current_setting()) == "auto"
    assert ran == ["cpp", "torch", "cpp"]


def test_the_setting_is_restored_after_an_error_and_works_as_a_decorator():
    @use_backend("torch")
    def inside(depth):
        assert current_setting().backend("mlp") == "torch"
        return inside(depth - 1) if depth else None

    inside(2)
    with pytest.raises(ZeroDivisionError), use_backend("cpp"):
        1 / 0  # noqa: B018
    assert str(current_setting()) == "auto"


def test_threads_do_not_see_each_others_setting():
    seen, inside, done = [], threading.Event(), threading.Event()

    def other():
        with use_backend("torch"):
            inside.set()
            done.wait(10)
            seen.append(str(current_setting()))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen.append(str(current_setting()))
    done.set()
    thread.join()
    assert seen == ["auto", "torch"]


def test_a_recomputed_forward_chooses_as_the_first_one(ran):
    x, weight = SMALL[0].clone().requires_grad_(), SMALL[1]
    with use_backend("torch"):
        y = torch.utils.checkpoint.checkpoint(ops.layer_norm, x, weight, use_reentrant=False)
        y.sum().backward()
    assert ran == ["torch", "torch"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_setting_travels_with_torchs_thread_local_state():
    with use_backend("mlp=cpp"):
        future = torch.jit._fork(_setting_text)
    assert torch.jit._wait(future) == "auto,mlp=cpp"


def _setting_text():
    return str(current_setting())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch", {"mlp": "torch", "causal_attention": "torch"}),
        ("attention=triton,layer_norm=cuda", {"causal_attention": "triton", "layer_norm": "cuda", "mlp": "auto"}),
        ("torch, loss = cpp", {"linear_cross_entropy": "cpp", "mlp": "torch"}),
        ("lora=cuda", {"lora_linear": "cuda"}),
        ("cross_entropy=triton", {"linear_cross_entropy": "triton"}),
        ("", {"mlp": "auto"}),
    ],
)
def test_the_environment_sets_backends_by_op_and_short_name(monkeypatch, text, expected):
    monkeypatch.setenv("LLMFAST_BACKEND", text)
    assert {op: current_setting().backend(op) for op in expected} == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [("trition", "did you mean triton"), ("atention=torch", "did you mean attention"), ("mlp=", "unknown backend")],
)
def test_an_unknown_name_is_one_line_with_a_suggestion(monkeypatch, text, hint):
    monkeypatch.setenv("LLMFAST_BACKEND", text)
    with pytest.raises(UserError, match=hint) as error:
        ops.mlp(**_inputs("mlp"))
    assert "LLMFAST_BACKEND" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.delenv("LLMFAST_BACKEND")
    with pytest.raises(UserError, match=hint), use_backend(text):
        pass


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_run_says_why_in_one_line(name, backend):
    with use_backend(backend), pytest.raises(UserError) as error:
        OPS[name].function(**_inputs(name))
    assert isinstance(error.value, RuntimeError)
    text = str(error.value)
    assert text.startswith(f"{name}: backend {backend} cannot run ")
    assert "\n" not in text
    assert all(reason in text for reason in OPS[name].reasons(torch.device("cpu"), torch.float32)[backend])
    assert re.search(r"\(backends that could: .*torch\)", text)
    assert "float32 cpu" in text
    assert str(tuple(next(iter(_inputs(name).values())).shape)) in text


def test_a_missing_library_is_a_reason_and_auto_says_once_that_it_fell_back(monkeypatch, tmp_path, caplog, ran):
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "_kernels.so")
    _library.why_not_loaded.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "llmfast.ops"):
            ops.layer_norm(*BIG)
            ops.layer_norm(*BIG)
            ops.layer_norm(BIG[0].bfloat16(), BIG[1])
        assert ran == ["torch"] * 3
        assert [r.message.count("not built") for r in caplog.records] == [1]
        with use_backend("cpp"), pytest.raises(RuntimeError, match="not built"):
            ops.layer_norm(*BIG)
        (tmp_path / "_kernels.so").write_bytes(b"\x7fELF but not for long")
        _library.why_not_loaded.cache_clear()
        forget_choices()
        with use_backend("cpp"), pytest.raises(RuntimeError, match="does not load"):
            ops.layer_norm(*BIG)
    finally:
        monkeypatch.undo()
        _library.why_not_loaded.cache_clear()


def test_on_a_gpu_our_kernels_wait_for_evidence(monkeypatch, tmp_path):
    gpu, op = torch.device("cuda", 0), OPS["layer_norm"]
    ours = next(i for i in op.implementations if i.backend == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    record = {"op": "layer_norm", "backend": "cuda", "device": "NVIDIA H200", "correct": True, "speedup": 1.2}
    for records, reasons in (
        ([], 1),
        ([record], 0),
        ([record, {**record, "speedup": 0.9}], 1),
        ([{**record, "correct": False}], 1),
        ([{**record, "device": "NVIDIA A100"}], 1),
    ):
        monkeypatch.setattr(
            _registry, "_evidence_records", lambda records=records: [{**r, "file": "x"} for r in records]
        )
        assert len(op.why_not_default(ours, gpu)) == reasons


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_auto_on_a_gpu_is_pytorch_until_a_run_is_recorded(op, monkeypatch):
    gpu = torch.device("cuda", 0)
    ready = [dataclasses.replace(i, unavailable=lambda device: []) for i in op.implementations]
    monkeypatch.setattr(op, "implementations", ready)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(_registry, "_evidence_records", lambda: ())

    def chosen(setting):
        return [i.backend for i in op.resolve(_registry.parse_setting(setting, _registry.AUTO), gpu, torch.bfloat16)]

    assert chosen("auto") == ["torch"]
    for implementation in op.implementations:
        if "cuda" in implementation.devices:
            assert chosen(implementation.backend) == [implementation.backend]


def test_evidence_is_read_from_results_files(monkeypatch, tmp_path):
    record = {"op": "mlp", "backend": "cuda", "device": "cpu", "correct": True, "speedup": 1.0}
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps({"ops": [record]}))
    (folder / "broken.json").write_text("{")
    monkeypatch.setattr(_registry, "__file__", str(tmp_path / "llmfast" / "ops" / "_registry.py"))
    assert _registry.evidence("mlp", "cuda", torch.device("cpu")) == "a.json"
    assert _registry.evidence("mlp", "triton", torch.device("cpu")) is None


def test_describe_is_json_and_covers_every_op_and_backend():
    report = json.loads(json.dumps(ops.describe()))
    assert set(report["ops"]) == set(OPS)
    assert set(report["matmul"]) == {"float32", "bfloat16"}
    for devices in report["ops"].values():
        for entry in devices.values():
            assert set(entry["backends"]) == set(BACKENDS)
            assert [b for b, e in entry["backends"].items() if e["chosen"]] == [entry["chosen"]]
            assert all(e["available"] or e["reasons"] for e in entry["backends"].values())
    assert report["library"]["loaded"] == (report["library"]["why_not"] is None)


@pytest.fixture
def routing(monkeypatch):
    monkeypatch.setattr(matmul, "_routes", {})
    return monkeypatch


@pytest.mark.parametrize("route", matmul.ROUTES)
def test_the_environment_fixes_the_matmul_route(routing, route):
    routing.setenv("LLMFAST_MATMUL", route)
    if any(matmul._why_not(route, dtype) for dtype in matmul.ROUTED):
        pytest.skip(f"no {route} here")
    assert ops.matmul_routing() == {"float32": route, "bfloat16": route}


def test_a_bad_matmul_route_is_a_user_error(routing):
    routing.setenv("LLMFAST_MATMUL", "onednnn")
    with pytest.raises(UserError, match="did you mean onednn"):
        ops.matmul_routing()


def test_measured_routes_follow_the_times_and_are_kept(routing):
    def times(default, onednn, ours):
        return lambda dtype, routes: {"default": default, "onednn": onednn, "ours": ours}

    routing.setattr(matmul, "_why_not", lambda route, dtype: None)
    for measured, route, library in (
        (times(300.0, 200.0, 210.0), "ours", "onednn"),  # as good as the best library, and it needs no copies around it
        (times(300.0, 200.0, 250.0), "onednn", "onednn"),
        (times(200.0, 199.0, 250.0), "default", "default"),
    ):
        matmul.forget_routing()
        routing.setattr(matmul, "_measure", measured)
        assert ops.matmul_routing() == {"float32": route, "bfloat16": route}
        assert matmul.routing_report()["float32"]["library"] == library
    routing.setattr(matmul, "_measure", times(1.0, 9.0, 9.0))
    assert matmul.routing_report()["float32"]["default_us"] == 200.0
    ops.set_matmul_routing({"float32": "ours"})
    assert ops.matmul_routing() == {"float32": "ours", "bfloat16": "default"}


def test_rounding_onednn_is_refused_for_float32(routing):
    exact = matmul.mm_tn

    def rounding(dy, x, onednn):
        return exact(dy.bfloat16().to(dy.dtype) if onednn else dy, x, False)

    routing.setattr(matmul, "mm_tn", rounding)
    assert ops.matmul_routing()["float32"] != "onednn"
    assert "onednn rounds" in matmul.routing_report()["float32"]["reason"]
    with pytest.raises(ValueError, match="rounds"):
        ops.set_matmul_routing({"float32": "onednn"})


def test_the_measurement_leaves_random_numbers_threads_and_precision_alone(routing):
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    ops.matmul_routing()
    after = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


ON_ONE_THREAD = """
import re, sys
import torch
from llmfast.ops import matmul

def counts():
    return re.findall(r"(?:num|max)_threads\\(\\) : (\\d+)", torch.__config__.parallel_info())

if len(sys.argv) > 1:
    torch.set_num_threads(3)  # MKL has a count of its own from then on
before = counts()
assert "1" not in before, before
torch.set_num_threads = None
with matmul._alone():
    assert set(counts()) == {"1"}, counts()
assert counts() == before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's Linux wheels bring OpenMP")
@pytest.mark.parametrize("threads", [[], ["3"]])
def test_the_measurement_runs_on_one_thread_without_pytorchs_lasting_switch(threads):
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", ON_ONE_THREAD, *threads], env=env, check=True)


def test_the_switch_to_onednn_ends_with_the_last_of_many_threads():
    if matmul._why_not_onednn(torch.float32):
        pytest.skip("no oneDNN here")
    setting = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")
    before = torch.get_float32_matmul_precision(), setting()
    x, seen = torch.randn(64, 64), []

    def work():
        for _ in range(300):
            seen.append(matmul.with_onednn(torch.mm, x, x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert (torch.get_float32_matmul_precision(), setting()) == before


def test_a_repeated_route_repeats_the_bits(routing):
    x, weight = torch.randn(256, 96), torch.randn(128, 96)
    for route in matmul.ROUTES:
        try:
            ops.set_matmul_routing({"float32": route})
        except ValueError as refusal:
            pytest.skip(str(refusal))
        assert torch.equal(ops.linear(x, weight), ops.linear(x, weight))


def test_tune_process_says_what_it_did_and_can_be_called_again():
    threads = torch.get_num_threads()
    try:
        first, second = ops.tune_process(1), ops.tune_process()
        assert first == second
        assert first.threads == torch.get_num_threads() == 1
        assert first.matmul == ops.matmul_routing()
        assert first.allocator in str(first)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="at least 1"):
        ops.tune_process(0)


def test_everything_imports_and_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import llmfast
from llmfast import ops
from llmfast.ops import _triton
from llmfast.ops._registry import OPS
for op in OPS.values():
    op.function(**op.inputs(op.samples[0], torch.float32, "cpu"))
ops.describe()
assert _triton.unavailable(torch.device("cuda")) == ["triton is not installed"]
assert not any(name.startswith("llmfast.kernels") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
