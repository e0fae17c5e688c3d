// lean.h's kernels as PyTorch operators.

#include <vector>

#include "lean.h"
#include "ops.h"

namespace tract_fast {
namespace {

// Arguments that norm and its backward share; `weight` holds what Norm::weight points to. r is checked with the rows.
Norm norm_of(const Tensor& x, const Tensor& weight, double offset, double eps, const Tensor& r,
             std::vector<float>& wide) {
  const int64_t width = weight.numel(), n = r.numel();
  STD_TORCH_CHECK(width > 0, "weight must not be empty");
  check(x, "x", x.scalar_type(), n * width);
  check(weight, "weight", weight.scalar_type(), width);
  check(r, "r", torch::headeronly::ScalarType::Float, n);
  wide.resize(width);
  chosen().lean(type_of(weight)).widen(weight.data_ptr(), static_cast<float>(offset), wide.data(), width);
  Norm p{};
  p.x = x.data_ptr();
  p.weight = wide.data();
  p.r = pointer<float>(r);
  p.width = width;
  p.eps = eps;
  return p;
}

// y and r of rows x; w is weight + offset.
void rms_norm_op(const Tensor x, const Tensor weight, double offset, double eps, const Tensor y, const Tensor r) {
  std::vector<float> wide;
  Norm p = norm_of(x, weight, offset, eps, r, wide);
  check(y, "y", x.scalar_type(), x.numel());
  p.y = y.data_ptr();
  const LeanKernels& kernels = chosen().lean(type_of(x));
  torch::stable::parallel_for(0, r.numel(), std::max<int64_t>(1, (1 << 15) / p.width),
                              [&](int64_t begin, int64_t end) { kernels.norm(p, begin, end); });
}

// dx and dw, each (or nothing, where it is empty), of rows whose r is known.
void rms_norm_backward_op(const Tensor dy, const Tensor x, const Tensor weight, double offset, const Tensor r,
                          const Tensor dx, const Tensor dw) {
  std::vector<float> wide;
  Norm p = norm_of(x, weight, offset, 0.0, r, wide);
  check(dy, "dy", x.scalar_type(), x.numel());
  p.dy = dy.data_ptr();
  if (dx.numel() > 0) {
    check(dx, "dx", x.scalar_type(), x.numel());
    p.dx = dx.data_ptr();
  }
  if (dw.numel() > 0) check(dw, "dw", weight.scalar_type(), p.width);
  const Variant& variant = chosen();
  norm_backward(p, r.numel(), dw.numel() > 0 ? dw.data_ptr() : nullptr, variant.lean(type_of(x)),
                variant.lean(type_of(weight)), in_parallel);
}

Gated gated_of(const Tensor& gate, const Tensor& up, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "there is no activation ", activation);
  check(gate, "gate", gate.scalar_type(), gate.numel());
  check(up, "up", gate.scalar_type(), gate.numel());
  Gated p{};
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  p.activation = static_cast<Activation>(activation);
  return p;
}

// y = act(gate) * up.
void gated_op(const Tensor gate, const Tensor up, int64_t activation, const Tensor y) {
  Gated p = gated_of(gate, up, activation);
  check(y, "y", gate.scalar_type(), gate.numel());
  p.y = y.data_ptr();
  const LeanKernels& kernels = chosen().lean(type_of(gate));
  over_elements(gate.numel(), [&](int64_t begin, int64_t end) { kernels.gated(p, begin, end); });
}

void gated_backward_op(const Tensor dy, const Tensor gate, const Tensor up, int64_t activation, const Tensor dgate,
                       const Tensor dup) {
  Gated p = gated_of(gate, up, activation);
  for (const Tensor* t : {&dy, &dgate, &dup}) check(*t, "a gradient", gate.scalar_type(), gate.numel());
  p.dy = dy.data_ptr();
  p.dgate = dgate.data_ptr();
  p.dup = dup.data_ptr();
  const LeanKernels& kernels = chosen().lean(type_of(gate));
  over_elements(gate.numel(), [&](int64_t begin, int64_t end) { kernels.gated_backward(p, begin, end); });
}

}  // namespace
}  // namespace tract_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tract_fast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float offset, float eps, Tensor(a!) y, Tensor(b!) r) -> ()");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float offset, Tensor r, Tensor(a!) dx, Tensor(b!) dw) "
      "-> ()");
  m.def("gated(Tensor gate, Tensor up, int activation, Tensor(a!) y) -> ()");
  m.def("gated_backward(Tensor dy, Tensor gate, Tensor up, int activation, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
}

// Of the CPU alone: tensors without storage are met by tract_fast/loss/native.py.
STABLE_TORCH_LIBRARY_IMPL(tract_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&tract_fast::rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&tract_fast::rms_norm_backward_op));
  m.impl("gated", TORCH_BOX(&tract_fast::gated_op));
  m.impl("gated_backward", TORCH_BOX(&tract_fast::gated_backward_op));
}
