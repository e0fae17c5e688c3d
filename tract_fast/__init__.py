"""Train LLM judges whose score is a number: TRACT (arXiv 2503.04381).

Nothing is loaded until it is used: ``import tract_fast`` imports no torch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Judge", "__version__", "linear_tract_loss", "quantize_weight"]


def __getattr__(name: str) -> Any:
    if name in ("linear_tract_loss", "quantize_weight"):
        from tract_fast import loss

        return getattr(loss, name)
    if name == "Judge":
        from tract_fast.judge import Judge

        return Judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
