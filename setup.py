"""Packaging. Floors only: the newest versions must stay possible, and ``constraints.txt`` fixes what is tested."""

from pathlib import Path

from setuptools import find_packages, setup

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
    package_data={"tract_fast.data": ["demo.jsonl"], "tract_fast.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16",
        "peft>=0.19",
        "datasets>=4.0",
        "numpy>=1.26",
        "scipy>=1.11",
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
        "vllm": ["vllm"],
        "track": ["tensorboard", "wandb", "trackio"],
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff>=0.14",
            "tensorboard",
            "triton; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["tract-fast = tract_fast.cli:main"]},
)
