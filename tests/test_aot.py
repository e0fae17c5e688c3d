"""Every launch configuration of the kernels compiles for GPUs that are not here, and none needs more than one has."""

from __future__ import annotations

import pytest

from benchmarks import aot

MOST_INSTRUCTIONS = {"row_kernel": 3520, "sums_kernel": 3216, "dz_kernel": 2960}  # of triton 3.7.1


@pytest.mark.parametrize("arch", list(aot.SHARED_LIMIT))
@pytest.mark.parametrize("case", aot.cases(), ids=lambda case: f"{case[0].__name__} {case[2]} {case[1]} {case[4]}")
def test_compiles_without_spills_and_on_the_matrix_units(case, arch):
    built = aot.build(*case, arch)
    assert not aot.problems(built)
    assert built.registers > 0 and built.instructions > 100
    assert built.instructions <= 1.1 * MOST_INSTRUCTIONS[built.kernel], "grown by a tenth since it was looked at"


def test_a_spill_is_found():
    """ptxas spills a tile of 128 x 256 in dz_kernel."""
    kernel, name, dtype, constants, config = next(c for c in aot.cases() if c[0].__name__ == "dz_kernel")
    large = type(config)(config.kwargs | {"BM": 128, "BN": 256}, num_warps=8, num_stages=3)
    assert "of stack" in " ".join(aot.problems(aot.build(kernel, name, dtype, constants, large, 80)))
