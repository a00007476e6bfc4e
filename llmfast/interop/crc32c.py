"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, at NumPy's speed.

A CRC is linear over GF(2). So the words of the data are laid out in rows of ``lanes``, and every lane takes in its
column, each step being a multiplication by x^(32 lanes); then neighbouring lanes join. In front of the data zeros
change nothing while the register is zero, so that any length fills the rows; what the real starting value 0xFFFFFFFF
adds is its own image after as many bytes. Bit i of a register stands for x^(31 - i).
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78
_FEW, _MANY = 64, 8192  # lanes for short and for long data
_BLOCK = 8 << 20  # bytes taken in at once
_MASK = 0xA282EAD8


def crc32c(data: np.ndarray) -> int:
    """The checksum of ``data`` (n,) uint8."""
    register = 0xFFFFFFFF
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        register = int(_times(register, _power(len(block)))) ^ _linear(block)
    return register ^ 0xFFFFFFFF


def unmask(stored: int) -> int:
    """The checksum behind the form in which TensorFlow (as LevelDB) stores it."""
    rotated = (stored - _MASK) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def _linear(block: np.ndarray) -> int:
    """The register after ``block`` where it began as zero."""
    lanes = _MANY if len(block) > 100 * _MANY else _FEW
    rows = -(-len(block) // (4 * lanes))
    padded = np.zeros(4 * lanes * rows, np.uint8)
    padded[len(padded) - len(block) :] = block
    low, high = _tables(lanes)
    registers = np.zeros(lanes, np.uint32)
    for row in padded.view("<u4").reshape(rows, lanes):
        registers = low.take(registers & 0xFFFF) ^ high.take(registers >> 16) ^ row
    distance = 4  # bytes between neighbours
    while len(registers) > 1:
        registers = _times(registers[0::2], _power(distance)) ^ registers[1::2]
        distance *= 2
    return int(_times(registers, _power(4))[0])


@functools.lru_cache(maxsize=2)
def _tables(lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the lower and of the upper 16 bits of a register while a row of words passes."""
    every = np.arange(1 << 16, dtype=np.uint32)
    return _times(every, _power(4 * lanes)), _times(every << 16, _power(4 * lanes))


def _times(a: np.ndarray | int, b: int) -> np.ndarray:
    """Products of polynomials modulo the generator; ``a`` (n,) uint32 or one."""
    product, a = np.zeros_like(a, dtype=np.uint32), np.array(a, dtype=np.uint32)
    for bit in range(31, -1, -1):  # coefficients of b from x^0 on; a is multiplied by x each time
        if b >> bit & 1:
            product ^= a
        a = (a >> 1) ^ np.where(a & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return product


@functools.lru_cache(maxsize=256)
def _power(count: int) -> int:
    """x^(8 count) modulo the generator: what multiplies a register while ``count`` bytes of zeros pass."""
    result, square = 1 << 31, 1 << 23  # x^0, x^8
    while count:
        if count & 1:
            result = int(_times(result, square))
        square = int(_times(square, square))
        count >>= 1
    return result
