"""What a run tells: metrics.jsonl, loss.png, samples.txt, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llmfast.files import write_whole
from llmfast.ops.process import cores_are_crowded
from llmfast.ranks import Ranks
from llmfast.training.metrics import MetricsFunction, Sums, add_sums, means, over_ranks

METRICS = "step tokens loss train_loss val_loss lr grad_norm tokens_per_second mfu".split()  # the order in a line
PLOT_SECONDS = 60.0  # at most so often while the run lasts: a plot takes a third of a second
LINE_SECONDS = 10.0  # where no bar can be drawn


class Report:
    """Writes a run's files and draws its progress on standard error.

    ``done`` steps of ``total`` are done already: what an earlier process wrote about later ones is cut, so that no
    step appears twice.
    """

    def __init__(self, directory: Path, *, done: int, total: int, unit: str = "token", progress: bool) -> None:
        self._directory = directory
        self._unit = unit
        self._path = directory / "metrics.jsonl"
        self._samples = directory / "samples.txt"
        self._total = total
        self._progress = progress
        self._plotted = self._printed = time.monotonic()
        self._crowded = False
        _keep(self._path, [line for line in _lines(self._path) if _step(line) <= done])
        _keep(self._samples, _samples_until(self._samples, done))
        self._file = self._path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=None if progress else True, dynamic_ncols=True, leave=False
        )

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()

    def say(self, text: str) -> None:
        if self._progress:
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        self._bar.update()

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one line; values that are None are left out."""
        known = {key: values[key] for key in dict.fromkeys((*METRICS, *values)) if values.get(key) is not None}
        # JSON has no other numbers.
        line = {key: value for key, value in known.items() if not isinstance(value, float) or math.isfinite(value)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(self._numbers(line), refresh=False)
        evaluated = "val_loss" in line or line["step"] == self._total
        if evaluated or (self._bar.disable and time.monotonic() - self._printed > LINE_SECONDS):
            self.say(f"step {line['step']:,}/{self._total:,}  {self._numbers(line)}")
            self._printed = time.monotonic()
        if cores_are_crowded() and not self._crowded:
            self.say("other processes use this machine's cores, which makes training slower while they do")
            self._crowded = True

    def sample(self, step: int, text: str) -> None:
        """Append to samples.txt and show the beginning."""
        with self._samples.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{_header(step)}\n{text}\n\n")
        shown = " ".join(text.split())
        self.say(f"  sample: {shown[:100]}{'...' if len(shown) > 100 else ''}")

    def plot(self, *, now: bool = False) -> None:
        """Draw loss.png from metrics.jsonl, unless that was done a moment ago."""
        if not now and time.monotonic() - self._plotted < PLOT_SECONDS:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = [json.loads(line) for line in _lines(self._path)]
        shown = ["loss", *_measured(lines)]
        figure = Figure(figsize=(7 if len(shown) == 1 else 4.5 * len(shown), 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        for place, name in enumerate(shown, 1):
            axes = figure.add_subplot(1, len(shown), place)
            curves = ((name, "training", "-"), (f"train_{name}", "training, without dropout", "o-"))
            for key, label, style in (*curves, (f"val_{name}", "validation", "o-")):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
            axes.set(
                xlabel="step", ylabel=f"loss (nats per {self._unit})" if name == "loss" else name.replace("_", " ")
            )
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        unfinished = self._directory / ".loss.png"
        figure.savefig(unfinished, format="png", dpi=120)
        os.replace(unfinished, self._directory / "loss.png")
        self._plotted = time.monotonic()

    def _numbers(self, line: dict[str, Any]) -> str:
        short = {"loss": "loss", "train_loss": "train", "val_loss": "val"}
        parts = [f"{label} {line[key]:.4f}" for key, label in short.items() if key in line]
        others = (key for key in line if key.startswith("val_") and key != "val_loss")
        parts += [f"{key.replace('_', ' ')} {line[key]:.4g}" for key in others if isinstance(line[key], float)]
        if (rate := line.get(f"{self._unit}s_per_second")) is not None:
            parts.append(f"{rate:,.0f} {self._unit}s/s")
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        return "  ".join(parts)


class Silent(Report):
    """Of the ranks that only compute."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def metrics(self, values: dict[str, Any]) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        pass

    def plot(self, *, now: bool = False) -> None:
        pass


class Speed:
    """Loss, metrics, tokens/s and MFU since the last metrics line, and tokens/s of the whole run.

    ``flops`` is the work of one token, ``peak`` the FLOP/s of one rank's device; without them there is no MFU.
    Evaluations, samples and checkpoints stand between ``read`` and ``restart`` and do not count. ``unit`` is what is
    counted where that is not tokens.
    """

    def __init__(
        self,
        flops: float | None,
        peak: float | None,
        metrics_fn: MetricsFunction = means,
        unit: str = "token",
        ranks: Ranks | None = None,
    ) -> None:
        self._metrics_fn, self._unit, self._ranks = metrics_fn, unit, ranks or Ranks()
        self._share = flops / peak / self._ranks.size if flops and peak else None
        self._all_tokens, self._all_seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        self._tokens = 0
        self._loss: Any = 0.0
        self._sums: Sums = {}
        self._began = time.perf_counter()

    def add(self, loss: Tensor, tokens: int, sums: Sums) -> None:
        self._loss = self._loss + loss * tokens
        add_sums(self._sums, sums)
        self._tokens += tokens

    def read(self) -> dict[str, Any]:
        """The values of a metrics line, of the metrics only single numbers; waits for the device."""
        loss = float(self._loss) / self._tokens
        seconds = time.perf_counter() - self._began
        self._all_tokens, self._all_seconds = self._all_tokens + self._tokens, self._all_seconds + seconds
        rate = self._tokens / seconds
        sums = over_ranks(self._ranks, self._sums)
        measured = {k: v for k, v in self._metrics_fn(sums, self._tokens).items() if isinstance(v, float)}
        mfu = rate * self._share if self._share else None
        size = self._ranks.size
        a_rank = {f"{self._unit}s_per_second_per_rank": rate / size} if size > 1 else {}
        return {"loss": loss, **measured, f"{self._unit}s_per_second": rate, **a_rank, "mfu": mfu}

    @property
    def overall(self) -> float | None:
        return self._all_tokens / self._all_seconds if self._all_tokens else None


def _measured(lines: list[dict[str, Any]]) -> list[str]:
    """The metrics, other than the loss, that evaluations gave as single numbers."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("val_") and key != "val_loss")
    return [key.removeprefix("val_") for key in keys if any(isinstance(line.get(key), float) for line in lines)]


def _header(step: int) -> str:
    return f"===== step {step} ====="


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a sample may hold any of the characters that it splits at.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.removesuffix("\n").split("\n") if text else []


def _step(line: str) -> float:
    """The step of a metrics line; infinite for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _samples_until(path: Path, step: int) -> list[str]:
    kept: list[str] = []
    for line in _lines(path):
        header = re.fullmatch(r"===== step (\d+) =====", line)
        if header and int(header[1]) > step:
            break
        kept.append(line)
    return kept


def _keep(path: Path, lines: list[str]) -> None:
    """Cut a file to ``lines``, in one step."""
    if path.exists():
        write_whole(path, "".join(f"{line}\n" for line in lines))
