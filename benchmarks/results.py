"""``python benchmarks/results.py``: results/RESULTS.md and the README's speed table, from results/<device>/*.json.

Nothing in either is written by hand: to change a figure, run its command again and commit the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmfast.bench.tables import data_table, generate_table, ops_table, steps_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = "# Results\n\nMade from the JSON files beside this page by `python benchmarks/results.py`.\n"
BEGIN, END = "<!-- speed: python benchmarks/results.py -->\n", "<!-- end of speed -->"
TEXT = {"ops": ops_table, "train": steps_table, "generate": generate_table, "data": data_table}
README_DEVICE = "cpu-amd-epyc-zen4-2-cores"
README_SHAPES = {"30M": "train-step-30m.json", "characters": "train-step-char.json"}
README_NAMES = {
    "llmfast fp32": "llmfast, float32",
    "llmfast bf16": "llmfast, bfloat16",
    "nanogpt fp32": "nanoGPT, float32",
    "nanogpt bf16": "nanoGPT, bfloat16",
    "nanogpt compile tuned bf16": "nanoGPT, `torch.compile`, with llmfast's allocator settings, bfloat16",
    "huggingface fp32": "Hugging Face GPT-2, float32",
}


def page() -> str:
    """RESULTS.md."""
    parts = [HEAD]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        parts.append(f"## {folder.name}\n")
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            body = _medians(found) if isinstance(found.get("median"), dict) else _bench(found)
            if body:
                parts.append(f"### {path.name}\n\n{_source(found)}\n\n{body}\n")
    return "\n".join(parts)


def _source(found: dict[str, Any]) -> str:
    torch = found.get("versions", found).get("torch", "")
    words = [
        f"`{found.get('command', '')}`",
        found.get("device", ""),
        f"torch {torch}",
        f"commit {found.get('commit')}",
        f"other programs used {found['others']:.0%} of the machine" if "others" in found else "",
    ]
    return "; ".join(word for word in [*words, found.get("date", "")[:10]] if word)


def _bench(found: dict[str, Any]) -> str:
    table = TEXT.get(found.get("kind", ""))
    return f"```\n{table(found)}\n```" if table else ""


def _medians(found: dict[str, Any]) -> str:
    """What train_step.py, decode.py and lora.py record: the medians of every provider, and the targets."""
    tokens, facts = found.get("tokens", 1), found.get("facts", {})
    whole = any("peak bytes" in fact for fact in facts.values())
    header = "peak MB of a step, weights and all" if whole else "MB beyond weights, gradients, moments"
    lines = [f"| provider | ms | tokens/s | {header} |", "|---|---|---|---|"]
    for name, seconds in found["median"].items():
        extra = facts.get(name, {}).get("peak bytes" if whole else "extra")
        memory = f"{extra / 1e6:.0f}" if extra is not None else ""
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {tokens / seconds:,.0f} | {memory} |")
    for row in found.get("targets", []):
        verdict = "met" if row["met"] else "not met"
        lines.append(f"\n{row['what']}: {row['ratio']:.2f}, target {row['target']}: {verdict}")
    return "\n".join(lines)


def readme_table() -> str:
    """The README's table of whole training steps."""
    runs = {name: json.loads((RESULTS / README_DEVICE / file).read_text()) for name, file in README_SHAPES.items()}
    lines = [
        f"| tokens/s (x nanoGPT in float32; share of the matrix products' own time) | {' | '.join(runs)} |",
        "|---|" + "---|" * len(runs),
    ]
    for key, name in README_NAMES.items():
        cells = []
        for run in runs.values():
            median = run["median"]
            if key not in median:
                cells.append("not run")
                continue
            ratio = median["nanogpt fp32"] / median[key]
            share = median[f"floor {key.rpartition(' ')[2]}"] / median[key]
            cell = f"{run['tokens'] / median[key]:.0f} ({ratio:.2f}x; {share:.2f})"
            cells.append(f"**{cell}**" if key.startswith("llmfast") else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with its speed table made anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{readme_table()}{END}{after}"


def main() -> int:
    (RESULTS / "RESULTS.md").write_text(page(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
