// What the operators share: tensors of PyTorch's stable ABI as pointers, checked, and the variant that runs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>

#include "row_pass.h"

namespace tract_fast {

using torch::stable::Tensor;

// The variant that TRACT_FAST_CPU names, or the fastest one.
inline const Variant& chosen() {
  const char* name = std::getenv("TRACT_FAST_CPU");
  const Variant* variant = find_variant(name != nullptr && *name != '\0' ? name : nullptr);
  STD_TORCH_CHECK(variant != nullptr, "TRACT_FAST_CPU = ", name == nullptr ? "" : name,
                  ": this processor or build has no such variant; unset it");
  return *variant;
}

inline Type type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "the kernels take float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

inline const auto in_parallel = [](int64_t count, const auto& body) { torch::stable::parallel_for(0, count, 1, body); };

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Refuses a tensor that the kernels would read or write wrongly.
inline void check(const Tensor& t, const char* name, torch::headeronly::ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == numel, name,
                  " must be contiguous, on the CPU, of its type, and have ", numel, " elements");
}

// body(begin, end) for parts of n elements, on several threads.
template <class Body>
void over_elements(int64_t n, const Body& body) {
  constexpr int64_t share = 1 << 16;
  in_parallel((n + share - 1) / share,
              [&](int64_t first, int64_t last) { body(first * share, std::min(last * share, n)); });
}

}  // namespace tract_fast
