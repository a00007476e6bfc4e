"""``llmfast info``: what runs on this machine, op by op, and why not the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmfast.cli.common import JSON_HELP, print_json, table
from llmfast.config import option


@dataclass
class Options:
    """Options of ``llmfast info``."""

    json: bool = option(False, JSON_HELP)


def run(options: Options) -> int:
    from llmfast.generation import native
    from llmfast.ops import describe, tune_process

    tune_process()  # as every verb that computes
    reasons = native.why_not()
    facts = {**describe(), "decoding": {"chosen": "torch" if reasons else "cpp", "reasons": reasons}}
    if options.json:
        print_json(facts)
    else:
        print(render(facts))
    return 0


def render(facts: dict[str, Any]) -> str:
    """``llmfast.ops.describe()`` and the choice for text generation, for people."""
    versions, library, cpu = facts["versions"], facts["library"], facts["cpu"]
    compiled = {name: value for name, value in library.items() if name not in ("loaded", "why_not") and value}
    built = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in compiled.items())
    parts = [
        table(
            [
                ("llmfast", versions["llmfast"]),
                ("python", f"{versions['python']} on {versions['platform']}"),
                (
                    "torch",
                    f"{versions['torch']}, CUDA {versions['cuda'] or 'none'}, Triton {versions['triton'] or 'none'}",
                ),
                *((device["device"], _device(device)) for device in facts["devices"]),
                ("threads", f"{cpu['threads']}; {cpu['capability']}; allocator: {cpu['allocator']}"),
                ("kernels", f"compiled ({built})" if library["loaded"] else f"none compiled: {library['why_not']}"),
                *([("MLP on CUDA", facts["cuda_mlp"])] if facts["cuda_mlp"] else []),
                ("backend", facts["backend"]),
            ]
        ),
        "Matrix products on the CPU\n"
        + table([(f"  {dtype}", f"{route['route']}: {route['reason']}") for dtype, route in facts["matmul"].items()]),
        "Decoder layers on the CPU\n" + table([(f"  {dtype}", how) for dtype, how in facts["decoder_layer"].items()]),
    ]
    decoding = facts["decoding"]
    parts.append(
        "Token steps of text generation on the CPU\n"
        + table([(f"  {decoding['chosen']}", "; ".join(decoding["reasons"]) or "ours, a whole step in one call")])
    )
    devices = [device["device"] for device in facts["devices"]]
    parts += [_ops(device, {name: op[device] for name, op in facts["ops"].items()}) for device in devices]
    return "\n\n".join(parts)


def _device(device: dict[str, Any]) -> str:
    details = [f"compute capability {device['capability']}"] if "capability" in device else []
    details += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
    return ", ".join([device["name"], *details])


def _ops(device: str, ops: dict[str, Any]) -> str:
    """What runs each op on one device, and under it every backend that does not, with its reasons."""
    dtype = next(iter(ops.values()))["dtype"]
    lines = [f"Operations on {device}, {dtype}"]
    for name, op in ops.items():
        for backend, state in op["backends"].items():
            if state["chosen"]:
                where = f", see {state['evidence']}" if state["evidence"] else ""
                lines.append(f"  {name:<22}{backend}: {state['by']}{where}")
        if not op["chosen"]:
            lines.append(f"  {name:<22}nothing runs")
        for backend, state in op["backends"].items():
            if not state["chosen"]:
                lines.append(f"    {backend:<9}{'; '.join(state['reasons']) or 'could run, another is preferred'}")
    return "\n".join(lines)
