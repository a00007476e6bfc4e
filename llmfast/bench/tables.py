"""Results as text, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmfast.bench.case import WRONG
from llmfast.bench.ops import describe_shape

Row = list[str]


def aligned(rows: list[Row], bold: set[tuple[int, int]] | None = None, ansi: bool = False) -> str:
    """Rows in columns, the first to the left, the others to the right; cells in ``bold`` are (row, column)."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for r, row in enumerate(rows):
        cells = []
        for c, cell in enumerate(row):
            text = cell.ljust(widths[c]) if c == 0 else cell.rjust(widths[c])
            cells.append(f"\033[1m{text}\033[0m" if ansi and (r, c) in (bold or ()) else text)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def milliseconds(seconds: list[float]) -> str:
    """ "1.234 (1.220-1.260)": the median, and the tenth and ninetieth percentile."""
    median, low, high = (1e3 * s for s in seconds)
    digits = 4 if median < 0.1 else 3 if median < 10 else 2 if median < 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def rate(record: dict[str, Any]) -> str:
    """GB/s or TFLOP/s, whichever limits the op."""
    if record["bound"] == "copy":
        return f"{record['bytes_per_second'] / 1e9:.0f} GB/s"
    flops = record["flops_per_second"]
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def ratio(values: list[float] | None) -> str:
    """ "1.52 (1.49-1.55)" times as fast as eager."""
    return "" if values is None else "{:.2f} ({:.2f}-{:.2f})".format(*values)


def memory(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("ms", lambda r: milliseconds(r["seconds"])),
    ("x eager", lambda r: ratio(r["ratio_to_eager"])),
    ("rate", rate),
    ("of floor", lambda r: f"{r['share']:.2f}"),
    ("extra MB", lambda r: memory(r.get("peak_bytes"))),
    ("error", lambda r: f"{r['error_ratio']:.2f}" if "error_ratio" in r else ""),
]
LEGEND = (
    "error: the largest against float64, in units of what the op's tests allow (twice eager PyTorch's and a few eps); "
    f"up to {WRONG:g} is another order of adding long sums, more is WRONG"
)


def groups(records: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Records by the values of ``keys``, in their order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        values = tuple(describe_shape(record[k]) if k == "shape" else record[k] for k in keys)
        found.setdefault(values, []).append(record)
    return found


def ops_table(results: dict[str, Any], ansi: bool = False) -> str:
    """The results of ``bench_ops``: one block a case, the fastest of each mode in bold, and who did not run."""
    parts = [ceilings_line(results)]
    apart = groups([*results["ops"], *results["wrong"], *results["not_run"]], "op", "shape", "dtype")
    for (op, shape, dtype), members in apart.items():
        timed = [m for m in members if "mode" in m]
        lines = [f"{op}  {shape}  {dtype}"]
        if timed:
            lines.append(_block(timed, ansi))
        lines += [
            f"  {m['provider']}: {'WRONG' if m in results['wrong'] else 'cannot run'}: {m['why']}"
            for m in members
            if "why" in m
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND])


def _block(records: list[dict[str, Any]], ansi: bool) -> str:
    rows, bold = [["  provider", "", *(title for title, _ in COLUMNS)]], set()
    for (mode, cache), members in groups(records, "mode", "cache").items():
        fastest = min(members, key=lambda r: r["seconds"][0])
        for record in members:
            if record is fastest:
                bold |= {(len(rows), column) for column in range(len(COLUMNS) + 2)}
            name = f"  {record['provider']}" + (" *" if record is fastest and not ansi else "")
            where = mode if cache == "hot" else f"{mode}, {cache}"
            rows.append([name, where, *(cell(record) for _, cell in COLUMNS)])
    return aligned(rows, bold, ansi)


def ceilings_line(results: dict[str, Any]) -> str:
    """What the machine is and can do."""
    found = results["ceilings"]
    rates = ", ".join(f"{dtype} products {flops / 1e12:.3g} TFLOP/s" for dtype, flops in found["matmul"].items())
    torch = results["versions"]["torch"]
    return f"{results['device']}, torch {torch}; copy {found['copy'] / 1e9:.0f} GB/s, {rates}"


def steps_table(results: dict[str, Any], ansi: bool = False) -> str:
    """The results of ``bench_train``, the fastest in bold."""
    shape = results["shape"]
    size = f"{shape['n_layer']} layers, width {shape['n_embd']}, {shape['n_head']} heads, V {shape['vocab_size']}"
    lines = [ceilings_line(results), "", f"{size}, T {shape['block_size']}, B {shape['batch_size']}"]
    rows = [["provider", "ms/step", "tokens/s", "x eager", "MFU", "extra MB", "first loss", "agrees"]]
    best = max((r["tokens_per_second"] for r in results["steps"]), default=0)
    bold = set()
    for record in results["steps"]:
        fastest = record["tokens_per_second"] == best
        if fastest:
            bold |= {(len(rows), column) for column in range(8)}
        agrees = record.get("loss_agrees")
        rows.append(
            [
                record["provider"] + (" *" if fastest and not ansi else ""),
                milliseconds(record["seconds"]),
                f"{record['tokens_per_second']:,.0f}",
                ratio(record.get("ratio_to_eager")),
                f"{record['mfu']:.2f}",
                memory(record["extra_bytes"]),
                f"{record['losses'][0]:.4f}",
                "" if agrees is None else "yes" if agrees else "NO",
            ]
        )
    lines.append(aligned(rows, bold, ansi))
    lines += [f"{row['provider']}: cannot run: {row['why']}" for row in results["not_run"]]
    return "\n".join(lines)


def generate_table(results: dict[str, Any], ansi: bool = False) -> str:
    """The results of ``bench_generate``."""
    rows = [["provider", "dtype", "batch", "prompt tokens/s", "tokens/s", "ms/token", "of floor", "x Hugging Face"]]
    bold = set()
    for members in groups(results["generate"], "dtype", "batch").values():
        best = max(members, key=lambda r: r["tokens_per_second"])
        for r in members:
            if r is best:
                bold |= {(len(rows), column) for column in range(8)}
            rows.append(
                [
                    r["provider"] + (" *" if r is best and not ansi else ""), r["dtype"], str(r["batch"]),
                    f"{r['prompt_tokens_per_second']:,.0f}", f"{r['tokens_per_second']:,.1f}",
                    milliseconds(r["token_seconds"]), f"{r['share']:.2f}", ratio(r["ratio_to_huggingface"]),
                ]
            )  # fmt: skip
    lines = [f"{ceilings_line(results)}, read {results['ceilings']['read'] / 1e9:.0f} GB/s", aligned(rows, bold, ansi)]
    lines += [f"{r['provider']} {r['dtype']} batch {r['batch']}: cannot run: {r['why']}" for r in results["not_run"]]
    return "\n".join(lines)


def data_table(results: dict[str, Any], ansi: bool = False) -> str:
    """The results of ``bench_data``."""
    rows = [["", "tokens", "tokens/s", "seconds", "x tiktoken", "extra MB"]]
    for r in results["data"]:
        seconds = "{:.3f} ({:.3f}-{:.3f})".format(*r["seconds"])
        cells = [f"{r['tokens']:,}", f"{r['tokens_per_second']:,.0f}", seconds, ratio(r.get("ratio_to_tiktoken"))]
        rows.append([r["provider"], *cells, memory(r["extra_bytes"])])
    head = f"{results['device']}, {results['megabytes']} MB of text, {results['workers']} workers"
    return f"{head}, tokenizer {results['tokenizer']}\n{aligned(rows)}"
