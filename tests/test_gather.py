"""Gathered rows and their gradient, against index_select in float64; always the same bits."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.operators import Called
from tract_fast.gather import add_rows, add_runs, add_sorted, gather_rows


@settings(max_examples=60)
@given(index=st.lists(st.integers(0, 7), max_size=20), width=st.sampled_from([(), (3,), (2, 5)]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_and_gradient(dtype, index, width):
    torch.manual_seed(0)
    index = torch.tensor(index, dtype=torch.int64)
    x = torch.randn(8, *width).to(dtype).requires_grad_()
    out = gather_rows(x, index)
    assert torch.equal(out, x.index_select(0, index))
    upstream = torch.randn(out.shape).to(dtype)
    (found,) = torch.autograd.grad(out, x, upstream)
    expected = torch.zeros(8, *width, dtype=torch.float64).index_add_(0, index, upstream.double())
    # 16 bits are summed in float32 and rounded once: half a unit in the last place
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6 if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("add", [add_runs, add_sorted], ids=["cpu", "cuda"])
def test_both_sums(add):
    """What each device runs, here on the CPU: a prompt of 40 rows that four rationales read."""
    index = torch.cat([torch.cat([torch.arange(40), torch.arange(40 + 9 * i, 49 + 9 * i)]) for i in range(4)])
    grad = torch.randn(len(index), 2, 8)
    expected = torch.zeros(76, 2, 8, dtype=torch.float64).index_add_(0, index, grad.double())
    out = add(torch.zeros(76, 2, 8), index, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_sum_of_cuda_sorts():
    """``index_add_`` gives the same sums and leaves their order to the threads, which no comparison would show."""
    tensors = torch.zeros(4, 2), torch.tensor([0, 0, 3]), torch.ones(3, 2)
    with Called() as called:
        add_sorted(*tensors)
    assert called.operators == [torch.ops.aten.index_put_.default]


def test_operators_keep_their_promises():
    """Schema, fake and autograd registration, as torch checks them."""
    x, index = torch.randn(6, 2, 4, requires_grad=True), torch.tensor([0, 1, 1, 5, 0])
    torch.library.opcheck(gather_rows, (x, index))
    torch.library.opcheck(add_rows, (torch.randn(5, 2, 4), index, 6))


def test_compiles_as_one_operator():
    """In a compiled graph, forward and backward, for any number of rows, without a break."""

    def doubled(x, index):
        return gather_rows(2 * x, index).sin()

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for n in (5, 9):
        index = torch.arange(n) % 4
        x = torch.randn(6, 3, requires_grad=True)
        want, got = (torch.autograd.grad(f(x, index).square().sum(), x)[0] for f in (doubled, compiled))
        torch.testing.assert_close(got, want)
