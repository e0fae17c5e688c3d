"""Packaging. Floors only: the newest versions must stay possible, and ``constraints.txt`` fixes what is tested.

The native CPU kernels are built by CMakeLists.txt against the torch that is installed already. Without one, or without
a compiler, the package installs without them and says so. TRACT_FAST_SKIP_EXT=1 leaves them out on purpose,
TRACT_FAST_REQUIRE_EXT=1 fails where they cannot be built.
"""

import os
import shutil
import site
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class FreshBuild(build_py):
    """Packs what is there: a module that an earlier build left in build/ would be packed, too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds tract_fast/_native.so, which torch loads; it is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def run(self) -> None:
        for ext in self.extensions:  # one of an earlier build must not pass for this one's
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if os.environ.get("TRACT_FAST_SKIP_EXT") == "1":
            print("tract_fast: TRACT_FAST_SKIP_EXT = 1, so without the native CPU kernels")
            return
        try:
            super().run()
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            if os.environ.get("TRACT_FAST_REQUIRE_EXT") == "1":
                raise
            print(f"tract_fast: the native CPU kernels are left out: {error}")

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run = lambda *command: subprocess.run(["cmake", *command], check=True)  # noqa: E731
        # a folder of its own: CMake's cache would remember the ninja of pip's isolated environment, which is gone
        with tempfile.TemporaryDirectory() as build:
            run("-S", str(Path(__file__).parent), "-B", build, f"-DTRACT_FAST_TORCH={torch}", *generator)
            run("--build", build, "--target", "tract_fast_native", "--parallel")
            run("--install", build, "--prefix", str(target))


def find_torch() -> Path:
    """The torch that is installed: pip builds in an environment of its own without one, so it is not imported."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    given = os.environ.get("TRACT_FAST_TORCH")
    for torch in [Path(given)] if given else [Path(folder) / "torch" for folder in folders]:
        if (torch / "include").is_dir():
            return torch
    raise FileNotFoundError(
        f"no torch in {given or ', '.join(folders)}: install torch first, or name its folder in TRACT_FAST_TORCH"
    )


setup(
    name="tract-fast",
    version="0.1.0",
    description="A lean trainer for LLM judges: two-stage regression-aware fine-tuning with chain of thought (TRACT)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # recipes/ stays a folder of its own in the repository and is installed as tract_fast/recipes, so that `tract-fast
    # demo` finds its recipe in both without a second copy
    packages=[*find_packages(include=["tract_fast", "tract_fast.*"]), "tract_fast.recipes"],
    package_dir={"tract_fast.recipes": "recipes"},
    ext_modules=[Extension("tract_fast._native", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild},
    package_data={"tract_fast.data": ["demo.jsonl"], "tract_fast.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16",
        "peft>=0.19",
        "datasets>=4.0",
        "numpy>=1.26",
        "scipy>=1.12",
        "matplotlib>=3.8",
        "rich>=13.0",
        "tyro>=1.0",
        "safetensors>=0.5",
        "gguf>=0.17",
        "pyyaml>=6.0",
        "jinja2>=3.1",
    ],
    extras_require={
        "gpu": ["liger-kernel>=0.8.2"],
        "flash": ["flash-attn"],
        "server": ["openai>=1.98"],
        "vllm": ["vllm"],
        "track": ["tensorboard", "wandb", "trackio"],
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff>=0.14",
            "cmake>=3.18",
            "tensorboard",
            "transformers[serving]",
            "triton; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["tract-fast = tract_fast.cli:entry"]},
)
