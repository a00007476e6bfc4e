"""The compiled parts are what every Python, torch and machine can load, and a build that cannot be says why."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fatbin import architectures

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(importlib.util.find_spec("llmfast").origin).parent
LIBRARY = PACKAGE / "_kernels.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="llmfast is installed without its compiled parts")
needs_binutils = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf not found")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build_config() -> dict[str, str]:
    import torch

    torch.ops.load_library(str(LIBRARY))
    return dict(part.split("=") for part in torch.ops.llmfast.build_config().split())


@needs_library
def test_the_library_holds_the_architectures_that_it_names():
    wanted = set()
    for arch in filter(None, build_config()["cuda_archs"].split(",")):
        wanted |= {f"sass {arch}", f"ptx {arch.rstrip('a')}"}
    assert architectures(LIBRARY.read_bytes()) == wanted


@needs_library
def test_the_build_tells_its_version():
    import llmfast

    config = build_config()
    assert config["version"] == llmfast.__version__
    assert config["torch_target"] == "2.10"


@needs_library
@needs_binutils
def test_the_library_needs_torch_by_name_and_neither_cuda_nor_python():
    dynamic = output_of("readelf", "-d", "-W", str(LIBRARY)).splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in dynamic if "(NEEDED)" in line}
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name or "c10" in name or "gomp" in name]
    if not any("asan" in name for name in needed):
        assert not [line for line in dynamic if "(RPATH)" in line or "(RUNPATH)" in line]


@needs_library
@needs_binutils
def test_the_library_uses_nothing_of_torch_but_the_stable_abi():
    symbols = [line.split() for line in output_of("readelf", "--dyn-syms", "-W", str(LIBRARY)).splitlines()]
    undefined = {fields[7].split("@")[0]: fields[4] for fields in symbols if len(fields) > 7 and fields[6] == "UND"}
    mangled = [name for name in undefined if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10"))]
    assert mangled == []
    if build_config()["cuda_archs"]:  # a CPU build of torch does not have it
        assert undefined["aoti_torch_get_current_cuda_stream"] == "WEAK"


def test_the_module_for_python_needs_no_torch():
    if not list(PACKAGE.glob(f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")):
        pytest.skip("no _C for this Python")
    code = (
        "import sys; from llmfast import _C; assert 'torch' not in sys.modules;"
        "print(_C.version, _C.compiler, ','.join(sorted(_C.cpu_features())))"
    )
    version, compiler, features = output_of(sys.executable, "-c", code).split()
    import llmfast

    assert version == llmfast.__version__
    assert compiler
    assert "avx2" in features or os.uname().machine != "x86_64"


SOURCES = "setup.py pyproject.toml CMakeLists.txt MANIFEST.in llmfast/__init__.py kernels/__init__.py".split()


@pytest.fixture
def source(tmp_path):
    """What a build reads, with a package of one module."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="no setuptools, or one that is older than 70.1")
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    pyproject = tmp_path / "pyproject.toml"
    packages = 'packages = ["llmfast", "llmfast.kernels"]'
    pyproject.write_text(re.sub(r"packages = \[.*?\]", packages, pyproject.read_text(), flags=re.S))
    return tmp_path


def setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLMFAST_")}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=source, env={**clean, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"LLMFAST_BUILD": "nothing"}, "LLMFAST_BUILD must be native or none, got 'nothing'"),
        ({"LLMFAST_CUDA": "yes"}, "LLMFAST_CUDA must be auto, ON or OFF, got 'yes'"),
        ({"LLMFAST_CUDA": "ON", "CUDACXX": "no-such-nvcc"}, "LLMFAST_CUDA=ON, but nvcc is neither on PATH nor"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (tried no-such-compiler): install g++ 12 or"),
        ({"LLMFAST_TORCH_DIR": "/no/torch"}, "LLMFAST_TORCH_DIR=/no/torch holds no headers of torch 2.10 or newer"),
        ({"LLMFAST_EXTRA_PYTHONS": "/no/python"}, "cannot ask /no/python for its headers (LLMFAST_EXTRA_PYTHONS)"),
        ({"PATH": "/nowhere", "CXX": sys.executable}, "cmake not found: pip install cmake ninja, or"),
    ],
)  # fmt: skip
def test_a_build_that_cannot_be_says_why_in_one_line(source, environment, says):
    pytest.importorskip("pybind11")
    done = setup(source, "-q", "build_ext", **{"LLMFAST_CUDA": "OFF", **environment})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmfast: ")
    assert says in last
    assert "Traceback" not in done.stderr
    if "compiler" in says or "cmake" in says:
        assert "LLMFAST_BUILD=none" in last


def test_without_compiled_parts_the_wheel_fits_every_machine(source):
    results = source / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "nvidia-h200").mkdir()
    (results / "nvidia-h200" / "ops-mlp.json").write_text("{}")
    done = setup(source, "-q", "bdist_wheel", LLMFAST_BUILD="none", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llmfast/kernels/__init__.py" in names
    assert "llmfast/results/nvidia-h200/ops-mlp.json" in names  # where llmfast.ops looks for evidence
    assert not [name for name in names if name.endswith(".so")]
