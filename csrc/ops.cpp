// The row pass as PyTorch operators, in the namespace tract_fast. Through PyTorch's stable ABI, which has all that is
// needed (tensors' pointers and its thread pool), so that one build can serve torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "row_pass.h"
#include "scratch.h"

namespace tract_fast {
namespace {

using torch::stable::Tensor;

// The variant that TRACT_FAST_CPU names, or the fastest one.
const Variant& chosen() {
  const char* name = std::getenv("TRACT_FAST_CPU");
  const Variant* variant = find_variant(name != nullptr && *name != '\0' ? name : nullptr);
  STD_TORCH_CHECK(variant != nullptr, "TRACT_FAST_CPU = ", name == nullptr ? "" : name,
                  ": this processor or build has no such variant; unset it");
  return *variant;
}

Type type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "logits must be float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

const auto in_parallel = [](int64_t count, const auto& body) { torch::stable::parallel_for(0, count, 1, body); };

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void row_pass_op(const Tensor logits, const std::optional<Tensor> bias, const Tensor picked_label,
                 const Tensor picked_scores, const Tensor labels, const Tensor ce, const Tensor score,
                 const Tensor score_target, const Tensor used, const Tensor ids, const Tensor values, const Tensor nll,
                 const Tensor lse, const Tensor expected, const Tensor mass, const Tensor probs, double softcap,
                 double logit_scale, bool vocab, bool gradient) {
  const int64_t n = logits.size(0);
  STD_TORCH_CHECK(logits.stride(1) == 1, "the logits of a row must lie side by side");
  for (const Tensor* t : {&picked_label, &picked_scores, &labels, &ce, &score, &score_target, &used, &ids, &values,
                          &nll, &lse, &expected, &mass, &probs})
    STD_TORCH_CHECK(t->is_contiguous() && t->is_cpu(), "all tensors must be contiguous and on the CPU");
  STD_TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() && bias->numel() == logits.size(1) &&
                                        bias->scalar_type() == logits.scalar_type()),
                  "bias must be contiguous, (n_vocab), of the type of the logits");
  RowPass p;
  p.logits = logits.data_ptr();
  p.n_vocab = logits.size(1);
  p.stride = logits.stride(0);
  p.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  p.picked_label = pointer<float>(picked_label);
  p.picked_scores = pointer<float>(picked_scores);
  p.labels = pointer<int64_t>(labels);
  p.ce = pointer<float>(ce);
  p.score = pointer<float>(score);
  p.score_target = pointer<float>(score_target);
  p.used = pointer<bool>(used);
  p.ids = pointer<int64_t>(ids);
  p.values = pointer<float>(values);
  p.n_tokens = ids.size(0);
  p.nll = pointer<float>(nll);
  p.lse = pointer<float>(lse);
  p.expected = pointer<float>(expected);
  p.mass = pointer<float>(mass);
  p.probs = pointer<float>(probs);
  p.softcap = static_cast<float>(softcap);
  p.logit_scale = static_cast<float>(logit_scale);
  p.vocab = vocab;
  p.gradient = gradient;
  row_pass(p, n, chosen().of(type_of(logits)), torch::stable::get_num_threads(), in_parallel);
}

// total += part, in float32.
void add_op(const Tensor total, const Tensor part) {
  STD_TORCH_CHECK(total.is_contiguous() && part.is_contiguous() && total.numel() == part.numel(),
                  "both must be contiguous and of one size");
  const Kernels& kernels = chosen().of(type_of(part));
  const int64_t size = part.element_size();
  constexpr int64_t share = 1 << 16;
  const int64_t n = total.numel();
  in_parallel((n + share - 1) / share, [&](int64_t first, int64_t last) {
    const int64_t begin = first * share, end = std::min(last * share, n);
    kernels.add(pointer<float>(total) + begin, static_cast<const char*>(part.data_ptr()) + begin * size, end - begin);
  });
}

// Ask for huge pages under a buffer that was not touched yet, for fewer page faults. A hint that a system may not know or
// not grant, hence no error.
void advise_op(const Tensor buffer) {
#ifdef __linux__
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t end = begin + buffer.numel() * buffer.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An undefined (rows, columns) tensor of the type of `like`, in memory that is kept for the next one when it goes.
Tensor scratch_op(const Tensor like, int64_t rows, int64_t columns) {
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(columns) * like.element_size();
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return torch::stable::from_blob(take_scratch(bytes), {sizes, 2}, {strides, 2}, like.device(), like.scalar_type(),
                                  return_scratch);
}

std::string variant_op() { return chosen().name; }

}  // namespace
}  // namespace tract_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tract_fast, m) {
  m.def(
      "row_pass(Tensor(a!) logits, Tensor? bias, Tensor picked_label, Tensor picked_scores, Tensor labels, Tensor ce, "
      "Tensor score, Tensor score_target, Tensor used, Tensor ids, Tensor values, Tensor(b!) nll, Tensor(c!) lse, "
      "Tensor(d!) expected, Tensor(e!) mass, Tensor(f!) probs, float softcap, float logit_scale, bool vocab, "
      "bool gradient) -> ()");
  m.def("add(Tensor(a!) total, Tensor part) -> ()");
  m.def("advise(Tensor(a!) buffer) -> ()");
  m.def("scratch(Tensor like, int rows, int columns) -> Tensor");
  m.def("variant() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tract_fast, CompositeExplicitAutograd, m) {
  m.impl("row_pass", TORCH_BOX(&tract_fast::row_pass_op));
  m.impl("add", TORCH_BOX(&tract_fast::add_op));
  m.impl("advise", TORCH_BOX(&tract_fast::advise_op));
  m.impl("scratch", TORCH_BOX(&tract_fast::scratch_op));
  m.impl("variant", TORCH_BOX(&tract_fast::variant_op));
}
