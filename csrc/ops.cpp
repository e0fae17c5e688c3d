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

// Refuses a tensor that the kernels would read or write wrongly.
void check(const Tensor& t, const char* name, torch::headeronly::ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == numel, name,
                  " must be contiguous, on the CPU, of its type, and have ", numel, " elements");
}

void check_range(const Tensor& indices, const char* name, int64_t least, int64_t end) {
  const int64_t* values = pointer<int64_t>(indices);
  for (int64_t i = 0; i < indices.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= least && values[i] < end, name, " holds ", values[i], ", which is no column");
}

void row_pass_op(const Tensor logits, const std::optional<Tensor> bias, const Tensor picked_label,
                 const Tensor picked_scores, const Tensor labels, const Tensor ce, const Tensor score,
                 const Tensor score_target, const Tensor used, const Tensor ids, const Tensor values, const Tensor nll,
                 const Tensor lse, const Tensor expected, const Tensor mass, const Tensor probs, double softcap,
                 double logit_scale, bool vocab, bool gradient) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1 &&
                      logits.stride(0) >= logits.size(1),
                  "logits must be (n, V) on the CPU, the logits of a row side by side");
  const int64_t n = logits.size(0), n_vocab = logits.size(1), tokens = ids.numel();
  STD_TORCH_CHECK(tokens > 0, "ids must not be empty");
  if (bias.has_value()) check(*bias, "bias", logits.scalar_type(), n_vocab);
  check(picked_label, "picked_label", ScalarType::Float, n);
  check(picked_scores, "picked_scores", ScalarType::Float, n * tokens);
  check(labels, "labels", ScalarType::Long, n);
  check(used, "used", ScalarType::Bool, n);
  check(ids, "ids", ScalarType::Long, tokens);
  check(values, "values", ScalarType::Float, tokens);
  check(probs, "probs", ScalarType::Float, n * tokens);
  for (const Tensor* t : {&ce, &score, &score_target, &nll, &lse, &expected, &mass})
    check(*t, "a term or statistic", ScalarType::Float, n);
  check_range(labels, "labels", -1, n_vocab);
  check_range(ids, "ids", 0, n_vocab);
  RowPass p;
  p.logits = logits.data_ptr();
  p.n_vocab = n_vocab;
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
  p.n_tokens = tokens;
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
  check(total, "total", torch::headeronly::ScalarType::Float, part.numel());
  check(part, "part", part.scalar_type(), total.numel());
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
  int64_t bytes = 0;
  STD_TORCH_CHECK(like.is_cpu() && rows >= 0 && columns >= 0 && !__builtin_mul_overflow(rows, columns, &bytes) &&
                      !__builtin_mul_overflow(bytes, static_cast<int64_t>(like.element_size()), &bytes),
                  "a scratch tensor of ", rows, " x ", columns, " is not possible");
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return torch::stable::from_blob(take_scratch(static_cast<size_t>(bytes)), {sizes, 2}, {strides, 2}, like.device(), like.scalar_type(),
                                  return_scratch);
}

std::string variant_op() { return chosen().name; }

// Raised whenever the operators change; tract_fast/loss/native.py expects the same number.
int64_t abi_op() { return 1; }

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
  m.def("abi() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tract_fast, CompositeExplicitAutograd, m) {
  m.impl("row_pass", TORCH_BOX(&tract_fast::row_pass_op));
  m.impl("add", TORCH_BOX(&tract_fast::add_op));
  m.impl("advise", TORCH_BOX(&tract_fast::advise_op));
  m.impl("scratch", TORCH_BOX(&tract_fast::scratch_op));
  m.impl("variant", TORCH_BOX(&tract_fast::variant_op));
  m.impl("abi", TORCH_BOX(&tract_fast::abi_op));
}
