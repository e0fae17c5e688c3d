"""Every launch configuration of the kernels compiles for GPUs that are not here, and none needs more than one has."""

from __future__ import annotations

import pytest

from benchmarks import aot


def compiled_here(case) -> bool:
    """``python -m benchmarks.aot`` compiles the rest, which takes minutes."""
    kernel, _, dtype, constants, _, odd = case
    bias, cap, vocab = (constants.get(name) for name in ("HAS_BIAS", "SOFTCAP", "VOCAB"))
    if bias != cap or dtype == "fp16":
        return False
    if kernel.__name__ in ("draw_kernel", "settle_kernel", "place_kernel", "weight_kernel"):
        sizes = odd or constants.get("PROPOSED", False)  # whose widths are even
        return sizes and vocab == bias and constants.get("MAY_BE_LONG", True) and constants.get("NEED_DX", True)
    return True


CASES = [case for case in aot.cases() if compiled_here(case)]
MOST_INSTRUCTIONS = {
    "row_kernel": 2208,
    "sums_kernel": 2952,
    "dz_kernel": 3200,
    "draw_kernel": 2856,
    "settle_kernel": 2600,
    "place_kernel": 400,
    "weight_kernel": 700,
}  # of triton 3.7.1


@pytest.mark.parametrize("arch", list(aot.SHARED_LIMIT))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[2]} {case[1]} {case[4]}")
def test_compiles_without_spills_and_on_the_matrix_units(case, arch):
    *chosen, odd = case
    built = aot.build(*chosen, arch, odd)
    assert not aot.problems(built)
    assert built.registers > 0 and built.instructions > 100
    assert built.instructions <= 1.1 * MOST_INSTRUCTIONS[built.kernel], "grown by a tenth since it was looked at"


def test_a_spill_is_found():
    """ptxas spills a tile of 128 x 256 in dz_kernel."""
    kernel, name, dtype, constants, config, _ = next(c for c in aot.cases() if c[0].__name__ == "dz_kernel")
    large = type(config)(config.kwargs | {"BM": 128, "BN": 256}, num_warps=8, num_stages=3)
    assert "of stack" in " ".join(aot.problems(aot.build(kernel, name, dtype, constants, large, 80, False)))
