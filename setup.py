"""Package layout and the native CPU library; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "hybridflow.kernels.native.libhybridflow_native"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def tool(name: str) -> str | None:
    """A build tool: beside this interpreter first (pip's isolated build), then on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


class CMakeBuild(build_ext):
    """Builds the library with CMake; without a working compiler, warns and installs without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + SUFFIX  # no interpreter tag: plain C, ctypes

    def build_extension(self, ext: Extension) -> None:
        target = (ROOT / self.get_ext_fullpath(ext.name)).parent
        try:
            self.run_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            warnings.warn(
                "hybridflow: the native CPU library was not built "
                f"({'CMake failed, see above' if failed else error}). The package works without "
                "it, in plain PyTorch; for the native kernels install a C++17 compiler with OpenMP "
                "and reinstall.",
                stacklevel=1,
            )

    def run_cmake(self, target: Path) -> None:
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise FileNotFoundError("cmake was not found")
        build = (ROOT / self.build_temp).absolute()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DHYBRIDFLOW_SUFFIX={SUFFIX}"),
        ]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        shutil.rmtree(build, ignore_errors=True)  # an isolated build's tools live in a new place
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--config", "Release"], check=True)


class PlatformWheel(bdist_wheel):
    """The library is tied to the platform and to no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for g in patterns for p in ROOT.glob(g))


setup(
    packages=[
        *find_packages(include=["hybridflow", "hybridflow.*"]),
        *("hybridflow.kernels", *(f"hybridflow.kernels.{p}" for p in find_packages("kernels"))),
    ],
    package_dir={"hybridflow": "hybridflow", "hybridflow.kernels": "kernels"},
    package_data={"hybridflow.kernels.swap": ["choices.json"]},
    ext_modules=[
        Extension(
            LIBRARY,
            sources=sources("kernels/**/*.cpp"),
            depends=["CMakeLists.txt", *sources("kernels/**/*.h")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
