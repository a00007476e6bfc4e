"""``bench ops``: every op of the registry, every provider, checked and then timed in turns."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llmfast.bench.case import MODES, Case
from llmfast.bench.ceilings import Ceilings, measure_ceilings
from llmfast.bench.environment import header
from llmfast.bench.providers import Call, CannotRun, Provider, providers
from llmfast.bench.timing import SAMPLE, Clock, Spread, interleave, paired_ratio, spread
from llmfast.config import suggest
from llmfast.errors import UserError
from llmfast.ops._registry import OPS, Op

SAMPLES = {"cuda": 30, "cpu": 10}
SECONDS = 4.0  # for one mode of one case on a CPU; the samples that do not fit are not taken, but for the first FEWEST
FEWEST = 5
BASELINE = "eager"


@dataclass(frozen=True)
class Selection:
    """What ``bench_ops`` runs. Empty or None: this device's default."""

    ops: list[str] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    modes: tuple[str, ...] = MODES
    caches: tuple[str, ...] = ()
    providers: list[str] = field(default_factory=list)
    samples: int | None = None


def bench_ops(
    device: torch.device,
    selection: Selection | None = None,
    *,
    progress: bool = True,
    among: list[Provider] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """The results as ``header`` and these keys, JSON-able; times in seconds, [median, 10th, 90th percentile].

    ceilings: copy (bytes/s), matmul (FLOP/s by dtype); ops: one record a provider, op, shape, dtype, mode and cache;
    wrong, not_run: who was not timed, and why. ``among``: the providers to choose from (default: all).
    ``keep(results)`` is called after each case, so that a run which is cut short has something to show.
    ``UserError`` for an op or provider that does not exist.
    """
    chosen, gpu = selection or Selection(), device.type == "cuda"
    names = chosen.ops or list(OPS)
    for name in names:
        if name not in OPS:
            raise UserError(f"unknown op {name!r}{suggest(name, OPS)}; ops: {', '.join(OPS)}")
    who = pick(among or providers(), chosen.providers)
    dtypes = chosen.dtypes or ([torch.bfloat16] if gpu else [torch.float32, torch.bfloat16])
    caches = chosen.caches or (("hot", "cold") if gpu else ("hot",))
    cases = [
        (OPS[name], shape, dtype)
        for name in names
        for shape in chosen.shapes or (OPS[name].gpu_samples if gpu else OPS[name].cpu_samples or OPS[name].samples)
        for dtype in dtypes
    ]
    results = header("ops", device)
    ceilings = measure_ceilings(device, dtypes)
    results |= {"ceilings": ceilings.to_dict(), "samples": chosen.samples, "ops": [], "wrong": [], "not_run": []}
    from tqdm import tqdm

    with tqdm(cases, unit="case", disable=None if progress else True, leave=False, dynamic_ncols=True) as bar:
        for op, shape, dtype in bar:
            bar.set_description(f"{op.name} {describe_shape(shape)} {_name(dtype)}")
            one = _Runner(op, shape, dtype, device, ceilings)
            for key, rows in one.run(who, chosen.modes, caches, chosen.samples).items():
                results[key] += rows
            keep(results)
            del one
            gc.collect()
            torch.compiler.reset()
            if gpu:
                torch.cuda.empty_cache()
    return results


def pick(known: list[Provider], wanted: list[str]) -> list[Provider]:
    """The providers whose names, or parts of names ("SDPA", "llmfast"), are wanted; all of them for none."""
    for part in wanted:
        if not any(part.lower() in provider.name.lower() for provider in known):
            names = [provider.name for provider in known]
            raise UserError(f"unknown provider {part!r}{suggest(part, names)}; providers: {', '.join(names)}")
    return [p for p in known if not wanted or any(part.lower() in p.name.lower() for part in wanted)]


class _Runner:
    """One op, shape and dtype."""

    def __init__(
        self, op: Op, shape: dict[str, Any], dtype: torch.dtype, device: torch.device, ceilings: Ceilings
    ) -> None:
        self.op, self.device, self.ceilings = op, device, ceilings
        self.what: dict[str, Any] = {"op": op.name, "shape": shape, "dtype": _name(dtype)}
        self.rows: dict[str, list[dict[str, Any]]] = {"ops": [], "wrong": [], "not_run": []}
        self.case: Case | None = None
        try:
            self.case = Case(op, shape, dtype, device)
        except torch.OutOfMemoryError:
            self.rows["not_run"].append({**self.what, "provider": "all", "why": "the inputs do not fit into memory"})

    def run(
        self, who: list[Provider], modes: tuple[str, ...], caches: tuple[str, ...], samples: int | None
    ) -> dict[str, list[dict[str, Any]]]:
        if self.case is None:
            return self.rows
        ready: dict[str, tuple[Provider, Call]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for provider in who:
            if provider.runs(self.op):
                call = self._ready(provider, facts)
                if call is not None:
                    ready[provider.name] = provider, call
        times = {(cache, mode): self._times(ready, mode, cache, samples) for cache in caches for mode in modes if ready}
        for name, (provider, call) in ready.items():
            wrong = self._wrong(provider, call, (2,))
            if wrong:
                self.rows["wrong"].append({**self.what, "provider": name, "why": wrong})
                for one in times.values():
                    one.pop(name, None)
        for (cache, mode), seconds in times.items():
            for name in seconds:
                self.rows["ops"].append(self._record(ready, name, mode, cache, seconds) | facts[name])
        return self.rows

    def _ready(self, provider: Provider, facts: dict[str, dict[str, Any]]) -> Call | None:
        """The provider's function, once it has given right answers; else why not goes into the rows."""
        assert self.case is not None
        try:
            with provider.context(self.op):
                call = provider.make(self.op, self.case.inputs)
            wrong = self._wrong(provider, call, (0, 1), facts)
            if not wrong:
                facts[provider.name]["peak_bytes"] = self.case.peak_bytes(provider, call)
                return call
        except CannotRun as reason:
            self.rows["not_run"].append({**self.what, "provider": provider.name, "why": str(reason)})
            return None
        except Exception as error:  # whatever a package throws is its reason
            why = f"{type(error).__name__}: {_first_line(error)}"
            self.rows["not_run"].append({**self.what, "provider": provider.name, "why": why})
            return None
        self.rows["wrong"].append({**self.what, "provider": provider.name, "why": wrong})
        return None

    def _wrong(
        self, provider: Provider, call: Call, draws: tuple[int, ...], facts: dict[str, dict[str, Any]] | None = None
    ) -> str | None:
        assert self.case is not None
        with provider.context(self.op), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why SDPA passes over its other kernels
            ratio, wrong = self.case.why_wrong(call, draws)
        if facts is not None:
            facts[provider.name] = {"error_ratio": ratio}
        return wrong

    def _times(
        self, ready: dict[str, tuple[Provider, Call]], mode: str, cache: str, samples: int | None
    ) -> dict[str, list[float]]:
        assert self.case is not None
        clock = Clock(self.device, cold=cache == "cold")
        tasks = {name: self.case.task(provider, call, mode) for name, (provider, call) in ready.items()}
        if samples is None:
            samples, gpu = SAMPLES.get(self.device.type, 10), self.device.type == "cuda"
            if not gpu:
                turn = sum(max(clock.sample(task, 1), SAMPLE[gpu]) for task in tasks.values())
                samples = min(samples, max(FEWEST, int(SECONDS / turn)))
        return interleave(clock, tasks, samples)

    def _record(
        self,
        ready: dict[str, tuple[Provider, Call]],
        name: str,
        mode: str,
        cache: str,
        seconds: dict[str, list[float]],
    ) -> dict[str, Any]:
        assert self.case is not None
        provider = ready[name][0]
        bytes, flops = self.case.costs[mode]
        floor, bound = self.ceilings.floor(bytes, flops, self.what["dtype"])
        time = spread(seconds[name])
        own = [n for n in seconds if ready[n][0].pytorch]
        best = min(own, key=lambda n: spread(seconds[n]).median) if own else None
        ratio: Spread | None = paired_ratio(seconds[BASELINE], seconds[name]) if BASELINE in seconds else None
        record = {
            **self.what, "device": _gpu_or_cpu(self.device), "provider": name, "mode": mode, "cache": cache,
            "correct": True, "seconds": time.to_list(), "samples": len(seconds[name]),
            "bytes": bytes, "flops": flops, "bytes_per_second": bytes / time.median,
            "flops_per_second": flops / time.median, "share": floor / time.median, "bound": bound,
            "ratio_to_eager": ratio and ratio.to_list(),
        }  # fmt: skip
        if provider.backend:
            record["backend"] = provider.backend
        if best is not None:
            record["best_of_pytorch"] = best
            record["speedup"] = paired_ratio(seconds[best], seconds[name]).median
        return record


def _gpu_or_cpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_shape(shape: dict[str, Any]) -> str:
    """A shape in the words of ``--shape``."""
    return ",".join(f"{name}={_value(value)}" for name, value in shape.items())


def _value(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def parse_shape(op: Op, text: str) -> dict[str, Any]:
    """``describe_shape`` backwards, over the op's first sample: "rows=16x1024,width=768"; T sets Tq and Tk.

    ``UserError`` for a size that the op does not have or a value that is none.
    """
    known = {name: value for sample in (*op.samples, *op.gpu_samples) for name, value in sample.items()}
    shape: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        names = ["Tq", "Tk"] if name == "T" and "Tq" in known else [name]
        if not equals or names[0] not in known:
            raise UserError(f"--shape: {op.name} has no size {name!r}{suggest(name, known)}; sizes: {', '.join(known)}")
        for one in names:
            shape[one] = _parsed(f"--shape: {name}", value, known[one])
    missing = [name for name in op.samples[0] if name not in shape]
    if missing:
        raise UserError(f"--shape: {op.name} needs {', '.join(missing)} as well, as in {describe_shape(op.samples[0])}")
    return shape


def _parsed(where: str, text: str, like: Any) -> Any:
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, tuple | list):
            value: Any = tuple(int(n) for n in text.split("x"))
            sizes = value
        elif isinstance(like, int | float):
            value = int(text) if isinstance(like, int) else float(text)
            sizes = (value,)
        else:
            return text
    except (ValueError, KeyError):
        raise UserError(f"{where}: expected something like {_value(like)}, got {text!r}") from None
    if any(n <= 0 for n in sizes):
        raise UserError(f"{where}: expected positive sizes, got {text!r}")
    return value
