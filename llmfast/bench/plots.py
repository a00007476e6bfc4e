"""Results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmfast.bench.tables import groups


def plot_ops(results: dict[str, Any], path: Path) -> None:
    """A roofline of every provider, and bars of the speed beside eager PyTorch; forward and backward together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hot = [r for r in results["ops"] if r["cache"] == "hot"] or results["ops"]
    cases = groups([r for r in hot if r["mode"] == "both"] or hot, "op", "shape", "dtype")
    figure, (roof, bars) = pyplot.subplots(
        1, 2, figsize=(15, max(5, 1 + 0.22 * sum(len(v) + 1 for v in cases.values()))), layout="constrained"
    )
    names = list(dict.fromkeys(r["provider"] for r in hot))
    colours = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    shown = [record for members in cases.values() for record in members]
    _roofline(roof, results, shown, colours)
    position, ticks, labels = 0.0, [], []
    for (op, shape, dtype), members in cases.items():
        ticks.append(position + (len(members) - 1) / 2)
        labels.append(f"{op} {dtype}\n{shape}")
        for record in members:
            median, low, high = record["ratio_to_eager"] or (0.0, 0.0, 0.0)
            error = [[max(0.0, median - low)], [max(0.0, high - median)]]
            bars.barh(position, median, xerr=error, color=colours[record["provider"]], ecolor="0.4", height=0.9)
            position += 1
        position += 1
    bars.set_yticks(ticks, labels, fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1, color="0.3", linewidth=1)
    bars.set_xlim(0, 1.3 * max(((r["ratio_to_eager"] or [1.0])[0] for r in shown), default=1.0))
    bars.set_xlabel("times as fast as eager PyTorch, median and 10th to 90th percentile")
    figure.suptitle(f"{results['device']}, torch {results['versions']['torch']}, {results['date'][:10]}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """Tokens a second of every provider, and its memory."""
    records = results["steps"]
    values = {
        "tokens/s": [r["tokens_per_second"] for r in records],
        "MB beyond weights, gradients and moments": [(r["extra_bytes"] or 0) / 1e6 for r in records],
    }
    _bars(results, [r["provider"] for r in records], values, path)


def plot_generate(results: dict[str, Any], path: Path) -> None:
    """Tokens a second, written and read."""
    records = results["generate"]
    names = [f"{r['provider']} {r['dtype']}, batch {r['batch']}" for r in records]
    values = {
        "tokens/s": [r["tokens_per_second"] for r in records],
        "prompt tokens/s": [r["prompt_tokens_per_second"] for r in records],
    }
    _bars(results, names, values, path)


def plot_data(results: dict[str, Any], path: Path) -> None:
    """Tokens a second, and memory."""
    records = results["data"]
    values = {
        "million tokens/s": [r["tokens_per_second"] / 1e6 for r in records],
        "extra MB": [r["extra_bytes"] / 1e6 for r in records],
    }
    _bars(results, [r["provider"] for r in records], values, path)


def _bars(results: dict[str, Any], names: list[str], values: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(values), figsize=(12, 1.5 + 0.4 * len(names)), layout="constrained", sharey=True
    )
    for axes, (label, numbers) in zip(panels, values.items(), strict=True):
        axes.bar_label(axes.barh(names, numbers), fmt="{:,.4g}", padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel(label)
    panels[0].invert_yaxis()
    figure.suptitle(f"{results['device']}, torch {results['versions']['torch']}, {results['date'][:10]}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _roofline(axes: Any, results: dict[str, Any], records: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    copy, rates = results["ceilings"]["copy"], results["ceilings"]["matmul"]
    intensities = [r["flops"] / r["bytes"] for r in records] or [1.0]
    edge = [min(intensities) / 2, max(*intensities, *(2 * rate / copy for rate in rates.values())) * 2]
    for dtype, rate in rates.items():
        xs = [edge[0], rate / copy, edge[1]]
        axes.plot(xs, [min(x * copy, rate) / 1e12 for x in xs], color="0.5", linewidth=1)
        axes.annotate(f"{dtype} products", (edge[1], rate / 1e12), ha="right", va="bottom", fontsize=8)
    for record in records:
        x, y = record["flops"] / record["bytes"], record["flops_per_second"] / 1e12
        axes.plot(x, y, "o", color=colours[record["provider"]], markersize=5)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    if colours:
        axes.legend(fontsize=8)
