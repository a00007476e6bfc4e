"""``llmfast report``: training runs and benchmark files as one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmfast
from llmfast.bench.tables import (
    COLUMNS,
    LEGEND,
    ceilings_line,
    data_table,
    describe_shape,
    generate_table,
    groups,
    memory,
    milliseconds,
    ratio,
)
from llmfast.errors import UserError

CURVES = {
    "loss": "loss, nats a token (training, and dashed: validation)",
    "tokens_per_second": "tokens/s",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 260, 64, 34
POINTS = 600  # a curve of more is thinned: the page stays small

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #d8dee8; --page: #ffffff; --band: #f4f6fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf2; --soft: #9aa4b5; --line: #333b4a; --page: #12161d; --band: #1a202a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.wide { overflow-x: auto; } p.note { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
tr.best td { font-weight: 700; background: var(--band); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); }
.c0 { --c: #2f6fde; } .c1 { --c: #d9822b; } .c2 { --c: #2a9d6f; } .c3 { --c: #c2417c; }
.c4 { --c: #7a5cd1; } .c5 { --c: #8a8f20; } svg polyline { fill: none; stroke: var(--c); stroke-width: 1.6; }
.swatch { display: inline-block; width: .8em; height: .8em; background: var(--c); margin: 0 .3em 0 1em; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
"""


def write_report(paths: Sequence[str | Path], out: Path, title: str = "llmfast report") -> Path:
    """Write the page of these run directories and benchmark files. ``UserError`` for a path that is neither."""
    runs = [(path, read_run(path)) for path in map(Path, paths) if path.is_dir()]
    files = [(path, read_results(path)) for path in map(Path, paths) if not path.is_dir()]
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p class=note>llmfast {llmfast.__version__}</p>"]
    if runs:
        parts.append(_runs(runs))
    parts += [_results(path, results) for path, results in files]
    head = f'<meta charset=utf-8><meta name=viewport content="width=device-width"><title>{html.escape(title)}</title>'
    head += f'<link rel=icon href="data:,"><style>{STYLE}</style>'
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    out.write_text(page, encoding="utf-8")
    return out


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, Any]:
    """metrics (a list of dicts), config and environment of a run directory."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{path}: no metrics.jsonl in it: report takes run directories and files of llmfast bench")
    rows = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{metrics}:{number}: not a line of metrics with a step") from None
    config = path / "config.toml"
    return {
        "metrics": rows,
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "environment": _environment(path),
    }


def _environment(path: Path) -> dict[str, Any]:
    """What the newest checkpoint's trainer.json says of the machine: short values alone."""
    states = sorted(path.glob("checkpoints/step-*/trainer.json"))
    if not states:
        return {}
    try:
        found = json.loads(states[-1].read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str | int | float | bool) or k == "matmul"}


def read_results(path: Path) -> dict[str, Any]:
    """A file that ``llmfast bench --save`` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: not a JSON file") from None
    if not isinstance(found, dict) or found.get("kind") not in TABLES:
        raise UserError(f"{path}: not a file of llmfast bench")
    if found.get("schema") != 1:
        raise UserError(f"{path}: schema {found.get('schema')}; this llmfast reads schema 1")
    return found


# ---- Training runs ---------------------------------------------------------------------------------------------------


def _runs(runs: list[tuple[Path, dict[str, Any]]]) -> str:
    parts = ["<h2>Training</h2>"]
    legend = "".join(
        f"<span class='c{i % 6}'><i class=swatch></i>{_text(path)}</span>" for i, (path, _) in enumerate(runs)
    )
    parts.append(f"<p>{legend}</p>")
    for key, label in CURVES.items():
        curves = []
        for i, (_, run) in enumerate(runs):
            curves.append((i, "", _points(run["metrics"], key)))
            if key == "loss":
                curves.append((i, "5 4", _points(run["metrics"], "val_loss")))
        if any(points for _, _, points in curves):
            parts.append(f"<h3>{_text(label)}</h3>{_chart(curves)}")
    rows = [["run", "steps", "tokens", "last loss", "best validation loss", "median tokens/s"]]
    for path, run in runs:
        rows.append([str(path), *_summary(run["metrics"])])
    parts.append(_table(rows))
    for path, run in runs:
        if run["config"]:
            parts.append(_folded(f"configuration of {path}", f"<pre>{_text(run['config'])}</pre>"))
        if run["environment"]:
            pairs = [["", ""], *([k, json.dumps(v)] for k, v in run["environment"].items())]
            parts.append(_folded(f"environment of {path}", _table(pairs)))
    return "".join(parts)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>"


def _points(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(float(row["step"]), float(row[key])) for row in metrics if isinstance(row.get(key), int | float)]
    found = [point for point in found if math.isfinite(point[1])]
    every = -(-len(found) // POINTS) or 1
    return [*found[:-1:every], *found[-1:]]


def _summary(metrics: list[dict[str, Any]]) -> list[str]:
    def values(key: str) -> list[float]:
        return [row[key] for row in metrics if isinstance(row.get(key), int | float)]

    loss, val, speed = values("loss"), values("val_loss"), sorted(values("tokens_per_second"))
    return [
        f"{metrics[-1]['step']:,}" if metrics else "",
        f"{values('tokens')[-1]:,}" if values("tokens") else "",
        f"{loss[-1]:.4f}" if loss else "",
        f"{min(val):.4f}" if val else "",
        f"{speed[len(speed) // 2]:,.0f}" if speed else "",
    ]


def _chart(curves: list[tuple[int, str, list[tuple[float, float]]]]) -> str:
    """An inline SVG of curves (colour, dashes, points)."""
    points = [point for _, _, curve in curves for point in curve]
    (x0, x1), (y0, y1) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def x(value: float) -> float:
        return LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - 12)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 10)

    parts = []
    for tick in _ticks(y0, y1):
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - 12} y1={y(tick):.1f} y2={y(tick):.1f} />")
        parts.append(f"<text x={LEFT - 6} y={y(tick) + 4:.1f} text-anchor=end>{tick:.4g}</text>")
    for tick in _ticks(x0, x1):
        parts.append(f"<text x={x(tick):.1f} y={HEIGHT - 12} text-anchor=middle>{tick:,.0f}</text>")
    for colour, dashes, curve in curves:
        if curve:
            line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve)
            parts.append(f"<polyline class=c{colour % 6} stroke-dasharray='{dashes}' points='{line}' />")
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} height={HEIGHT} role=img>{''.join(parts)}</svg>"


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


# ---- Benchmarks ------------------------------------------------------------------------------------------------------


def _results(path: Path, results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [("command", results["command"]), ("commit", results["commit"]), ("date", results["date"])]
    lines += [("device", results["device"]), ("versions", versions)]
    environment = _table([["", ""], *([k, v] for k, v in lines)])
    body = TABLES[results["kind"]](results)
    return f"<h2>{_text(path.name)}: bench {results['kind']}</h2>{body}<h3>Environment</h3>{environment}"


def _ops(results: dict[str, Any]) -> str:
    parts = [f"<p>{_text(ceilings_line(results))}</p>"]
    for key, records in groups(results["ops"], "op", "shape", "dtype").items():
        rows, best = [["provider", "", *(title for title, _ in COLUMNS)]], set()
        for (mode, cache), members in groups(records, "mode", "cache").items():
            fastest = min(members, key=lambda r: r["seconds"][0])
            for record in members:
                if record is fastest:
                    best.add(len(rows))
                where = mode if cache == "hot" else f"{mode}, {cache}"
                rows.append([record["provider"], where, *(cell(record) for _, cell in COLUMNS)])
        parts.append(f"<h3>{_text('  '.join(key))}</h3>{_table(rows, best)}")
    return "".join(parts) + f"<p class=note>{_text(LEGEND)}</p>" + _others(results)


def _steps(results: dict[str, Any]) -> str:
    rows, best = [["provider", "ms/step", "tokens/s", "x eager", "MFU", "extra MB", "first loss"]], set()
    fastest = max((r["tokens_per_second"] for r in results["steps"]), default=0)
    for r in results["steps"]:
        if r["tokens_per_second"] == fastest:
            best.add(len(rows))
        cells = [milliseconds(r["seconds"]), f"{r['tokens_per_second']:,.0f}", ratio(r.get("ratio_to_eager"))]
        rows.append([r["provider"], *cells, f"{r['mfu']:.2f}", memory(r["extra_bytes"]), f"{r['losses'][0]:.4f}"])
    line = f"{ceilings_line(results)}; {describe_shape(results['shape'])}"
    return f"<p>{_text(line)}</p>{_table(rows, best)}{_others(results)}"


def _others(results: dict[str, Any]) -> str:
    """Who was wrong or could not run."""
    rows = [["provider", "", "why"]]
    for key, word in (("wrong", "wrong"), ("not_run", "did not run")):
        for row in results.get(key, []):
            case = f"{row['op']} {describe_shape(row['shape'])} {row['dtype']}" if "op" in row else ""
            rows.append([row["provider"], f"{word} {case}", row["why"]])
    return _folded(f"{len(rows) - 1} not timed", _table(rows)) if len(rows) > 1 else ""


def _preformatted(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda results: f"<div class=wide><pre>{_text(table(results))}</pre></div>"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ops": _ops,
    "train": _steps,
    "generate": _preformatted(generate_table),
    "data": _preformatted(data_table),
}


def _table(rows: list[list[str]], best: set[int] | None = None) -> str:
    def line(cells: list[str], tag: str, number: int) -> str:
        mark = " class=best" if number in (best or ()) else ""
        return f"<tr{mark}>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(rows[0], "th", -1) if any(rows[0]) else ""
    return f"<div class=wide><table>{head}{''.join(line(r, 'td', i) for i, r in enumerate(rows[1:], 1))}</table></div>"


def _text(value: object) -> str:
    return html.escape(str(value))
