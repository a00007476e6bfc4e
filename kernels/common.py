"""What the Triton kernels share: tile configurations, activations, the dropout mask, the order of tiles.

Configurations lie in ``configs/sm<NN>.json``, one file a GPU architecture: per kernel a list of rows {"when":
{dimension: [low, high], "dtype": [...]}, "config": {tile sizes, "num_warps", "num_stages"}}. The first row that fits a
launch is taken, else the kernel's default, which is legal everywhere. Nothing is searched unless LLMFAST_AUTOTUNE=1
asks for it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when a kernel is decorated
AUTOTUNE = os.environ.get("LLMFAST_AUTOTUNE") == "1" and not INTERPRET
CONFIGS = Path(__file__).parent / "configs"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TUNED: dict[str, Tuned] = {}  # every kernel with a configuration, by name

Config = dict[str, int]


class Tuned:
    """A kernel and its configurations.

    default: legal on every architecture and for every dtype; interpreted: small blocks for the interpreter; search:
    what LLMFAST_AUTOTUNE=1 tries, for every new value of the ``key`` dimensions of a launch.
    """

    def __init__(self, kernel: Any, default: Config, interpreted: Config, search: Sequence[Config] = ()) -> None:
        self.kernel, self.default, self.interpreted, self.search = kernel, default, interpreted, tuple(search)
        self.name: str = kernel.fn.__name__
        self._tuned: dict[Any, Config] = {}
        self._refused: list[Config] = []  # rows that do not fit this GPU
        self.choose = functools.lru_cache(4096)(self._choose)
        TUNED[self.name] = self

    def configs(self, capability: int) -> list[Config]:
        """Every configuration that may run on ``capability`` (10 major + minor)."""
        rows = [row["config"] for row in table(capability).get(self.name, [])]
        return rows + [self.default] * (self.default not in rows)

    def least(self, tile: str) -> int:
        """The smallest value of ``tile`` in any launch anywhere: what a buffer with room for each tile is sized by."""
        rows = [row["config"] for number in architectures() for row in table(number).get(self.name, [])]
        return min(config[tile] for config in (self.interpreted, self.default, *self.search, *rows))

    def _choose(self, capability: int, dtype: torch.dtype, dims: tuple[tuple[str, int], ...]) -> Config:
        have = {**dict(dims), "dtype": DTYPE_NAMES[dtype]}
        for row in table(capability).get(self.name, []):
            if row["config"] not in self._refused and all(_fits(have[k], limits) for k, limits in row["when"].items()):
                return row["config"]
        return self.default

    def __call__(
        self, grid: Callable[[Config], tuple[int, ...]], *args: Any, dtype: torch.dtype, dims: Config,
        adds_to: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch over ``grid(config)`` blocks with the configuration for ``dtype`` and the sizes ``dims``.

        adds_to: a tensor that the kernel adds to, and that a search, which launches often, must not change.
        """
        if INTERPRET:
            config = self.interpreted
        elif AUTOTUNE and self.search:
            config = self._search(grid, args, dtype, dims, adds_to)
        else:
            config = self.choose(capability(), dtype, tuple(dims.items()))
        try:
            self.kernel[grid(config)](*args, **config)
        except triton.runtime.errors.OutOfResources:  # sm_86 has less shared memory than sm_80, sm_120 than sm_100
            if config == self.default:
                raise
            self._refused.append(config)
            self.choose.cache_clear()
            self(grid, *args, dtype=dtype, dims=dims, adds_to=adds_to)

    def _search(self, grid: Any, args: Any, dtype: torch.dtype, dims: Config, adds_to: Tensor | None) -> Config:
        key = (dtype, *dims.items())
        if key not in self._tuned:
            before = None if adds_to is None else adds_to.clone()
            timed = [(self.milliseconds(grid, args, config), config) for config in (*self.search, self.default)]
            self._tuned[key] = min(timed, key=lambda pair: pair[0])[1]
            if adds_to is not None and before is not None:
                adds_to.copy_(before)
        return self._tuned[key]

    def milliseconds(self, grid: Callable[[Config], tuple[int, ...]], args: tuple[Any, ...], config: Config) -> float:
        """The median time of a launch; infinity where the GPU or its compiler refuses ``config``."""
        errors = triton.runtime.errors
        try:
            return triton.testing.do_bench(lambda: self.kernel[grid(config)](*args, **config), return_mode="median")
        except (errors.OutOfResources, errors.PTXASError, triton.CompilationError):
            return float("inf")


def _fits(value: Any, limits: list[Any]) -> bool:
    return value in limits if isinstance(value, str) else limits[0] <= value <= limits[1]


@functools.cache
def architectures() -> list[int]:
    """Those that have a file of configurations."""
    return [int(path.stem.removeprefix("sm")) for path in CONFIGS.glob("sm*.json")]


@functools.cache
def table(capability: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of the newest architecture that is not newer than ``capability``."""
    older = [number for number in architectures() if number <= capability]
    return json.loads((CONFIGS / f"sm{max(older)}.json").read_text(encoding="utf-8")) if older else {}


def capability() -> int:
    """10 major + minor of the current GPU."""
    return int(driver.active.get_current_target().arch)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once at least; the sums of a backward pass are split over them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take three TF32 ones, which is as exact as float32, or one where PyTorch's own may."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def rows_of(x: Tensor) -> Tensor:
    """x (..., C) as contiguous rows (N, C)."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def dropout_limit(p: float) -> tuple[int, float]:
    """(words below which an element is dropped, factor of those that stay), as csrc/cpu/philox.h has it."""
    drop = min(int(p * 2.0**32 + 0.5), 2**32 - 1)
    return drop, 2.0**32 / (2**32 - drop)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(tile row, tile column, rows, columns) of this program's tile of an (M, N) output.

    Tiles are numbered in groups of GROUP tile rows, whose operands stay in L2.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * columns)
    tile_m, tile_n = group * GROUP + inside % height, inside // height
    return tile_m, tile_n, tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def place(m, n, M, N, stride):
    """(where, which of them exist) of the rows m and columns n of an (M, N) matrix whose rows are ``stride`` apart."""
    return m.to(tl.int64)[:, None] * stride + n[None, :], (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def with_bias(tile, bias_ptr, n, N):
    """A float32 tile plus the elements n of a bias (N,), if there is one."""
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def keep(seed, row, first_column, drop, COLUMNS: tl.constexpr):
    """(rows, COLUMNS) bool: which elements stay, as csrc/cpu/philox.h makes them.

    row: int64 (rows,); first_column: a multiple of 4, from which the COLUMNS (likewise) count.
    """
    quad = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.int64)[None, :]
    row = row[:, None] + tl.zeros_like(quad)
    quad = quad + tl.zeros_like(row)
    a, b, c, d = tl.philox(
        seed,
        (quad & 0xFFFFFFFF).to(tl.uint32),
        (row & 0xFFFFFFFF).to(tl.uint32),
        (row >> 32).to(tl.uint32),
        (quad >> 32).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d)) >= drop


@triton.jit
def tanh(x):
    """By one exponential: erf or a library tanh doubles the code of a loop."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """gelu_tanh, gelu (erf) or relu of float32 h."""
    if ACTIVATION == "relu":
        return tl.maximum(h, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        return 0.5 * h * (1.0 + tanh(0.7978845608028654 * h * (1.0 + 0.044715 * h * h)))


@triton.jit
def activate_backward(h, ACTIVATION: tl.constexpr):
    """Its derivative at h."""
    if ACTIVATION == "relu":
        return tl.where(h > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    else:
        t = tanh(0.7978845608028654 * h * (1.0 + 0.044715 * h * h))
        return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * h * h)


@triton.jit
def _column_sum(x_ptr, y_ptr, rows, N, x_row, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(tl.program_id(1) * BLOCK_R, rows, tl.num_programs(1) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at, inside = place(row, columns, rows, N, x_row)
        total += tl.load(x_ptr + at, mask=inside, other=0.0)
    y_ptr += tl.program_id(1).to(tl.int64) * N + columns
    y = tl.sum(total, 0)
    if ADD:
        y += tl.load(y_ptr, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=columns < N)


def column_sum(x: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """The column sums of x (rows, N), whose rows are contiguous, in ``out`` (N,), or added to it.

    Many rows of few columns are summed in shares first, so that the whole GPU reads.
    """
    rows, N = x.shape
    block = 32 if INTERPRET else 64
    columns = triton.cdiv(N, block)
    shares = min(triton.cdiv(rows, 256), triton.cdiv(2 * multiprocessors(x.device), columns))
    if shares > 1:
        part = torch.empty(shares, N, dtype=torch.float32, device=x.device)
        _column_sum[(columns, shares)](x, part, rows, N, x.stride(0), False, BLOCK_R=32, BLOCK_N=block, num_warps=4)
        x, rows = part, shares
    _column_sum[(columns, 1)](x, out, rows, N, x.stride(0), add, BLOCK_R=32, BLOCK_N=block, num_warps=4)
    return out
