"""What CUDA code lies in a shared library, read without CUDA's tools: python fatbin.py FILE.

A fat binary is a run of records behind a header with the magic number 0xBA55ED50; each record is one cubin (SASS) or
one PTX text, with its architecture, in a header of its own. The layout is NVIDIA's, and not documented.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
KINDS = {1: "ptx", 2: "sass"}
ARCHITECTURE_SPECIFIC = 1 << 20  # sm_90a rather than sm_90


def architectures(data: bytes) -> set[str]:
    """Such as {"sass 80", "sass 90a", "ptx 80"}; empty where there is no CUDA code."""
    found = set()
    position = data.find(MAGIC)
    while position >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, position)
        record, end = position + header, position + header + size
        while record < end:
            kind, _, record_header, record_size = struct.unpack_from("<HHIQ", data, record)
            (architecture,) = struct.unpack_from("<I", data, record + 28)
            (flags,) = struct.unpack_from("<Q", data, record + 40)
            found.add(f"{KINDS.get(kind, kind)} {architecture}{'a' if flags & ARCHITECTURE_SPECIFIC else ''}")
            record += record_header + record_size
        position = data.find(MAGIC, end)
    return found


if __name__ == "__main__":
    print("\n".join(sorted(architectures(Path(sys.argv[1]).read_bytes()))))
