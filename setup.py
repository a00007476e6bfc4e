"""Drives CMake and ninja for the compiled parts; the static metadata is in pyproject.toml.

Environment variables (docs/building.md says more):
  LLMFAST_BUILD=none         no compiled parts: the package runs on PyTorch alone
  LLMFAST_CUDA=auto|ON|OFF   CUDA kernels (auto: where nvcc is found)
  LLMFAST_CUDA_ARCHS         SASS targets, default "80;90a"
  LLMFAST_TORCH_DIR          directory of the torch package whose headers to use
  LLMFAST_EXTRA_PYTHONS      colon-separated interpreters that get a _C in the same wheel
  LLMFAST_SANITIZE           e.g. address,undefined
  MAX_JOBS                   parallel compiler processes
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WITHOUT = "LLMFAST_BUILD=none installs without the compiled parts"
KERNELS = "_kernels.so"


def fail(message: str) -> SystemExit:
    return SystemExit(f"llmfast: {message}")


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name) or default
    if value not in allowed:
        raise fail(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def find_torch() -> Path:
    """The torch package's directory, found without importing it."""
    if os.environ.get("LLMFAST_TORCH_DIR"):
        candidates = [Path(os.environ["LLMFAST_TORCH_DIR"])]
    else:
        spec = importlib.util.find_spec("torch")
        # pip's build isolation hides the environment's packages but keeps sys.prefix, hence sysconfig's paths.
        places = [*(spec.submodule_search_locations or [] if spec else [])]
        places += [str(Path(sysconfig.get_path(key)) / "torch") for key in ("purelib", "platlib")]
        candidates = [Path(place) for place in places]
    for candidate in candidates:
        if (candidate / "include/torch/headeronly/version.h").is_file():
            return candidate.resolve()
    if os.environ.get("LLMFAST_TORCH_DIR"):
        raise fail(f"LLMFAST_TORCH_DIR={candidates[0]} holds no headers of torch 2.10 or newer")
    raise fail(f"no headers of torch 2.10 or newer: install torch first, or set LLMFAST_TORCH_DIR, or {WITHOUT}")


def find_nvcc() -> str | None:
    """nvcc's path, or None where the build is to go without CUDA."""
    mode = choice("LLMFAST_CUDA", "auto", ("auto", "ON", "OFF"))
    if mode == "OFF":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)])
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc", path=path)
    if nvcc is None and mode == "ON":
        raise fail("LLMFAST_CUDA=ON, but nvcc is neither on PATH nor under CUDA_HOME; LLMFAST_CUDA=OFF builds for CPU")
    return nvcc


def find_cxx() -> str:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name):
            return name
    raise fail(f"no C++ compiler found (tried {', '.join(names)}): install g++ 12 or clang++ 15, or {WITHOUT}")


def python_targets() -> list[str]:
    """'include directory|file suffix' of each Python that is to get a _C: this one and LLMFAST_EXTRA_PYTHONS."""
    query = "import sysconfig as s; print(s.get_path('include') + '|' + s.get_config_var('EXT_SUFFIX'))"
    targets = []
    for python in [sys.executable, *filter(None, os.environ.get("LLMFAST_EXTRA_PYTHONS", "").split(os.pathsep))]:
        try:
            target = subprocess.check_output([python, "-c", query], text=True).strip()
        except (OSError, subprocess.CalledProcessError) as error:
            raise fail(f"cannot ask {python} for its headers (LLMFAST_EXTRA_PYTHONS): {error}") from None
        if not (Path(target.partition("|")[0]) / "Python.h").is_file():
            raise fail(f"{python} has no Python.h: install its development headers, or {WITHOUT}")
        targets.append(target)
    return list(dict.fromkeys(targets))


class CMakeBuild(build_ext):
    """One CMake run makes every compiled file."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_kernels"):  # a plain shared library, the same for every Python
            return os.path.join(*fullname.split(".")[:-1], KERNELS)
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "llmfast._kernels":
            return  # made by the same run
        import pybind11

        find_cxx()
        cmake, ninja, nvcc = shutil.which("cmake"), shutil.which("ninja"), find_nvcc()
        if not cmake or not ninja:
            raise fail(f"{'ninja' if cmake else 'cmake'} not found: pip install cmake ninja, or {WITHOUT}")
        sanitize = os.environ.get("LLMFAST_SANITIZE", "")
        build = ROOT / "build" / ("cmake-" + sanitize.replace(",", "-") if sanitize else "cmake")
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # All of them, every time: the CMake cache outlives a build, its environment and its ninja.
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "LLMFAST_CUDA": "ON" if nvcc else "OFF",
            "LLMFAST_CUDA_ARCHS": os.environ.get("LLMFAST_CUDA_ARCHS", "80;90a"),
            "LLMFAST_TORCH_DIR": find_torch(),
            "LLMFAST_SANITIZE": sanitize,
            "LLMFAST_PYTHONS": ";".join(python_targets()),
            "LLMFAST_PYBIND11_INCLUDE": pybind11.get_include(),
            "LLMFAST_VERSION": self.distribution.get_version(),
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            ["-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())],
            ["--build", build, "--parallel", jobs],
            ["--install", build, "--prefix", out],
        ):
            if subprocess.run([cmake, *map(str, command)]).returncode:
                cuda = f"; LLMFAST_CUDA=OFF builds without {nvcc}" if nvcc else ""
                raise fail(f"the native build failed (the compiler's message is above){cuda}; {WITHOUT}")


class WithResults(build_py):
    """Ships the recorded runs, without which no kernel of ours is a default on a GPU (llmfast.ops reads them)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the checkout has them
        results = ROOT / "benchmarks" / "results"
        for path in sorted(results.rglob("ops*.json")):
            target = Path(self.build_lib, "llmfast", "results", path.relative_to(results))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: _kernels.so knows none, and there is a _C for each that was asked for."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.has_ext_modules() else (python, abi, platform)


for stale in (ROOT / "build").glob("lib*"):  # setuptools would put modules deleted since into the wheel
    shutil.rmtree(stale, ignore_errors=True)

native = choice("LLMFAST_BUILD", "native", ("native", "none")) == "native" and sys.platform != "win32"
setup(
    ext_modules=[Extension("llmfast._kernels", []), Extension("llmfast._C", [])] if native else [],
    cmdclass={"build_py": WithResults, "build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
