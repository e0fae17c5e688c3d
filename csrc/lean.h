// The elementwise parts of transformer blocks on the CPU: RMSNorm and the gated product, forward and backward.
//
//   norm    y = x r w                     r = 1 / sqrt(mean x^2 + eps), w with the model's offset (Gemma: weight + 1)
//           dx = r (g - x r^2 mean(g x))  g = dy w;     dw = sum over rows of dy x r
//   gated   y = act(gate) up;  dgate = dy up act'(gate);  dup = dy act(gate)
//
// Nothing but x, r and gate, up is needed for backward, so that nothing else is kept (tract_fast/lean.py). A pass reads
// its arguments once and writes its results once: a row's second reading comes from the L1 or L2 cache.
//
// Numerics: float32 within a row, results rounded once. Sums: float32 over BLOCK columns and over SUM_ROWS rows, float64
// beyond. Rows are cut into parts by their number alone, so that every number of threads gives the same bits.
// exp is that of row_pass_kernels.h (relative error 9e-8); the normal distribution function has a relative error of at most
// 5e-7 from -2 on, and 2e-6 down to -5 (measured). Applies to float32 and bfloat16, any shape, rows side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "row_pass.h"

namespace tract_fast {

constexpr int64_t SUM_ROWS = 64;    // rows that are summed in float32
constexpr int64_t MOST_PARTS = 64;  // of rows, each with a sum of its own

enum class Activation { silu, gelu, gelu_tanh };

struct Norm {
  const void* x;        // (n, width)
  const float* weight;  // (width), the offset added
  float* r;             // (n): written by norm, read by norm_backward
  int64_t width;
  double eps;
  void* y;         // (n, width), written by norm
  const void* dy;  // (n, width)
  void* dx;        // (n, width), written by norm_backward, or null
};

struct Gated {
  const void *gate, *up, *dy;
  void *y, *dgate, *dup;  // y is written by gated, the others by gated_backward
  Activation activation;
};

// Kernels of one instruction set and type of tensors, for rows or elements [begin, end).
struct LeanKernels {
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  void (*norm_backward)(const Norm&, int64_t begin, int64_t end, float* dw);  // adds to dw (width), unless it is null
  void (*gated)(const Gated&, int64_t begin, int64_t end);
  void (*gated_backward)(const Gated&, int64_t begin, int64_t end);
  void (*widen)(const void* from, float offset, float* to, int64_t n);  // to = from + offset
  void (*narrow)(const double* from, void* to, int64_t n);
};

// Backward of n rows; dw (width, of the type of `type`) or null. `parallel` as for row_pass.
template <class Parallel>
void norm_backward(const Norm& p, int64_t n, void* dw, const LeanKernels& k, const LeanKernels& of_weight,
                   const Parallel& parallel) {
  const int64_t rows = std::max(SUM_ROWS, (n + MOST_PARTS - 1) / MOST_PARTS), parts = (n + rows - 1) / rows;
  const int64_t width = p.width;
  std::vector<double> sums(dw != nullptr ? parts * width : 0);
  parallel(parts, [&](int64_t first, int64_t last) {
    std::vector<float> few(dw != nullptr ? width : 0);
    for (int64_t part = first; part < last; ++part) {
      const int64_t end = std::min(n, (part + 1) * rows);
      for (int64_t row = part * rows; row < end; row += SUM_ROWS) {
        std::fill(few.begin(), few.end(), 0.0f);
        k.norm_backward(p, row, std::min(end, row + SUM_ROWS), dw != nullptr ? few.data() : nullptr);
        for (size_t i = 0; i < few.size(); ++i) sums[part * width + i] += few[i];
      }
    }
  });
  if (dw == nullptr) return;
  std::vector<double> total(width);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < width; ++i) total[i] += sums[part * width + i];
  of_weight.narrow(total.data(), dw, width);
}

}  // namespace tract_fast
