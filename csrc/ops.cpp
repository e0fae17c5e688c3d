// The kernels as PyTorch operators, in the namespace tract_fast. Through PyTorch's stable ABI, which has all that is
// needed (tensors' pointers and its thread pool), so that one build can serve torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "lean.h"
#include "row_pass.h"
#include "sampled.h"
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
                  "the kernels take float32 or bfloat16");
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

// Arguments of the row pass, checked: everything but what is done with them.
RowPass row_pass_of(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& picked_label,
                    const Tensor& picked_scores, const Tensor& labels, const Tensor& ce, const Tensor& score,
                    const Tensor& score_target, const Tensor& used, const Tensor& ids, const Tensor& values,
                    const Tensor& nll, const Tensor& lse, const Tensor& expected, const Tensor& mass,
                    const Tensor& probs, double softcap, double logit_scale, bool vocab) {
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
  p.row_scale = nullptr;
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
  p.gradient = true;
  return p;
}

void row_pass_op(const Tensor logits, const std::optional<Tensor> bias, const Tensor picked_label,
                 const Tensor picked_scores, const Tensor labels, const Tensor ce, const Tensor score,
                 const Tensor score_target, const Tensor used, const Tensor ids, const Tensor values, const Tensor nll,
                 const Tensor lse, const Tensor expected, const Tensor mass, const Tensor probs, double softcap,
                 double logit_scale, bool vocab, bool gradient) {
  RowPass p = row_pass_of(logits, bias, picked_label, picked_scores, labels, ce, score, score_target, used, ids, values,
                          nll, lse, expected, mass, probs, softcap, logit_scale, vocab);
  p.gradient = gradient;
  row_pass(p, logits.size(0), chosen().of(type_of(logits)), torch::stable::get_num_threads(), in_parallel);
}

// Refuses rows that are not (n, width) of the logits' type, the elements of a row side by side.
void check_rows(const Tensor& t, const char* name, const Tensor& logits, int64_t n) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == n && t.scalar_type() == logits.scalar_type() &&
                      (t.stride(1) == 1 || t.size(1) <= 1) && (t.stride(0) >= t.size(1) || n <= 1),
                  name, " must be (", n, ", D) on the CPU, of the logits' type, the elements of a row side by side");
}

// Lists of a chunk's rows, and dX (or nothing, where it has no rows) with its spread and norm. Where `weights` has rows,
// the logits are a proposal, of which `row_scale` is what each row is still to be multiplied with.
void sampled_rows_op(const Tensor logits, const std::optional<Tensor> bias, const Tensor picked_label,
                     const Tensor picked_scores, const Tensor labels, const Tensor ce, const Tensor score,
                     const Tensor score_target, const Tensor used, const Tensor ids, const Tensor values,
                     const Tensor nll, const Tensor lse, const Tensor expected, const Tensor mass, const Tensor probs,
                     double softcap, double logit_scale, bool vocab, const Tensor x, const Tensor weight,
                     const Tensor starts, const Tensor reference, double eps, const Tensor columns,
                     const Tensor entries, const Tensor counts, const Tensor dx, const Tensor spread,
                     const Tensor norm, const std::optional<Tensor> row_scale, const Tensor weights) {
  using torch::headeronly::ScalarType;
  RowPass p = row_pass_of(logits, bias, picked_label, picked_scores, labels, ce, score, score_target, used, ids,
                                values, nll, lse, expected, mass, probs, softcap, logit_scale, vocab);
  const int64_t n = logits.size(0), most = columns.numel() / std::max<int64_t>(n, 1);
  check_rows(x, "x", logits, n);
  check_rows(weight, "weight", logits, p.n_vocab);
  STD_TORCH_CHECK(x.size(1) == weight.size(1), "x and weight must be of one width");
  const bool proposed = weights.numel() > 0;
  if (proposed) check(weights, "weights", ScalarType::Float, 4 * n);
  if (row_scale.has_value()) {
    STD_TORCH_CHECK(proposed, "row_scale is of a proposal, whose weights are asked for");
    check(*row_scale, "row_scale", ScalarType::Float, n);
    p.row_scale = pointer<float>(*row_scale);
  }
  check(starts, "starts", ScalarType::Long, n);
  check(reference, "reference", ScalarType::Float, 1);
  check(columns, "columns", ScalarType::Int, n * most);
  check(entries, "entries", ScalarType::Float, n * most);
  check(counts, "counts", ScalarType::Int, n);
  STD_TORCH_CHECK(eps > 0 && (most > p.n_vocab || static_cast<double>(most) >= p.n_tokens + EXTRA + OVER / eps),
                  "lists of ", most, " entries are too short");
  check_range(starts, "starts", 0, int64_t{1} << 31);
  const bool wanted = dx.numel() > 0;
  if (wanted) {
    check(dx, "dx", logits.scalar_type(), n * x.size(1));
    check(spread, "spread", ScalarType::Float, n);
    check(norm, "norm", ScalarType::Float, n);
  }
  const Lists lists{pointer<int32_t>(columns), pointer<int32_t>(counts), pointer<float>(entries), most,
                    pointer<int64_t>(starts), eps, double{*pointer<float>(reference)}};
  const Operands operands{x.data_ptr(), weight.data_ptr(), x.size(1), x.stride(0), weight.stride(0),
                          wanted ? dx.data_ptr() : nullptr, pointer<float>(spread), pointer<float>(norm),
                          proposed ? pointer<float>(weights) : nullptr};
  const Variant& variant = chosen();
  const Type type = type_of(logits);
  in_parallel(n, [&](int64_t begin, int64_t end) { sampled_rows(p, lists, operands, variant, type, begin, end); });
}

// dW and db (or nothing, where they are empty) of lists, times `scale`.
void sampled_weight_op(const Tensor columns, const Tensor entries, const Tensor counts, const Tensor x,
                       const Tensor scale, const Tensor dw, const Tensor db, int64_t n_vocab) {
  using torch::headeronly::ScalarType;
  const int64_t n = counts.numel(), most = columns.numel() / std::max<int64_t>(n, 1), width = x.size(1);
  check(columns, "columns", ScalarType::Int, n * most);
  check(entries, "entries", ScalarType::Float, n * most);
  check(counts, "counts", ScalarType::Int, n);
  check(scale, "scale", ScalarType::Float, 1);
  check_rows(x, "x", x, n);
  if (dw.numel() > 0) check(dw, "dw", x.scalar_type(), n_vocab * width);
  if (db.numel() > 0) check(db, "db", x.scalar_type(), n_vocab);
  for (int64_t row = 0; row < n; ++row) {
    const int64_t count = pointer<int32_t>(counts)[row];
    STD_TORCH_CHECK(count >= 0 && count <= most, "counts holds ", count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = pointer<int32_t>(columns)[row * most + i];
      STD_TORCH_CHECK(column >= 0 && column < n_vocab, "columns holds ", column);
    }
  }
  const Transposed t = transpose(pointer<int32_t>(columns), pointer<int32_t>(counts), pointer<float>(entries), n, most,
                                 n_vocab, torch::stable::get_num_threads(), in_parallel);
  const Variant& variant = chosen();
  const Type type = type_of(x);
  // parts of about as many entries and columns each: frequent columns lie together
  const int64_t parts = std::min<int64_t>(n_vocab, 16 * torch::stable::get_num_threads());
  const int64_t work = t.first[n_vocab] + n_vocab;
  const auto at = [&](int64_t part) {
    const auto before = [&](int64_t column) { return t.first[column] + column < work * part / parts; };
    int64_t low = 0, high = n_vocab;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle)) low = middle + 1; else high = middle;
    }
    return low;
  };
  in_parallel(parts, [&](int64_t first, int64_t last) {
    sampled_weight(t, x.data_ptr(), x.stride(0), width, *pointer<float>(scale),
                   dw.numel() > 0 ? dw.data_ptr() : nullptr, db.numel() > 0 ? db.data_ptr() : nullptr, at(first),
                   last == parts ? n_vocab : at(last), variant, type);
  });
}

// body(begin, end) for parts of n elements, on several threads.
template <class Body>
void over_elements(int64_t n, const Body& body) {
  constexpr int64_t share = 1 << 16;
  in_parallel((n + share - 1) / share,
              [&](int64_t first, int64_t last) { body(first * share, std::min(last * share, n)); });
}

// total += part in float32, or total = part where it is the first.
void add_op(const Tensor total, const Tensor part, bool first) {
  check(total, "total", torch::headeronly::ScalarType::Float, part.numel());
  check(part, "part", part.scalar_type(), total.numel());
  const Kernels& kernels = chosen().of(type_of(part));
  over_elements(total.numel(), [&](int64_t begin, int64_t end) {
    const char* summand = static_cast<const char*>(part.data_ptr()) + begin * part.element_size();
    kernels.add(pointer<float>(total) + begin, summand, first, end - begin);
  });
}

// out = total * by, rounded once.
void scale_op(const Tensor total, const Tensor by, const Tensor out) {
  check(total, "total", torch::headeronly::ScalarType::Float, out.numel());
  check(by, "by", torch::headeronly::ScalarType::Float, 1);
  check(out, "out", out.scalar_type(), total.numel());
  const Kernels& kernels = chosen().of(type_of(out));
  const float factor = *pointer<float>(by);
  over_elements(total.numel(), [&](int64_t begin, int64_t end) {
    char* to = static_cast<char*>(out.data_ptr()) + begin * out.element_size();
    kernels.scale(pointer<float>(total) + begin, factor, to, end - begin);
  });
}

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

// Gives back what scratch() keeps; returns its bytes.
int64_t release_op() {
  const auto bytes = static_cast<int64_t>(kept_scratch());
  release_scratch();
  return bytes;
}

std::string variant_op() { return chosen().name; }

// Raised whenever the operators change; tract_fast/loss/native.py expects the same number.
int64_t abi_op() { return 5; }

}  // namespace
}  // namespace tract_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tract_fast, m) {
  m.def(
      "row_pass(Tensor(a!) logits, Tensor? bias, Tensor picked_label, Tensor picked_scores, Tensor labels, Tensor ce, "
      "Tensor score, Tensor score_target, Tensor used, Tensor ids, Tensor values, Tensor(b!) nll, Tensor(c!) lse, "
      "Tensor(d!) expected, Tensor(e!) mass, Tensor(f!) probs, float softcap, float logit_scale, bool vocab, "
      "bool gradient) -> ()");
  m.def(
      "sampled_rows(Tensor(a!) logits, Tensor? bias, Tensor picked_label, Tensor picked_scores, Tensor labels, "
      "Tensor ce, Tensor score, Tensor score_target, Tensor used, Tensor ids, Tensor values, Tensor(b!) nll, "
      "Tensor(c!) lse, Tensor(d!) expected, Tensor(e!) mass, Tensor(f!) probs, float softcap, float logit_scale, "
      "bool vocab, Tensor x, Tensor weight, Tensor starts, Tensor reference, float eps, Tensor(g!) columns, "
      "Tensor(h!) entries, Tensor(i!) counts, Tensor(j!) dx, Tensor(k!) spread, Tensor(l!) norm, Tensor? row_scale, "
      "Tensor(m!) weights) -> ()");
  m.def(
      "sampled_weight(Tensor columns, Tensor entries, Tensor counts, Tensor x, Tensor scale, Tensor(a!) dw, "
      "Tensor(b!) db, int n_vocab) -> ()");
  m.def("add(Tensor(a!) total, Tensor part, bool first) -> ()");
  m.def("scale(Tensor total, Tensor by, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float offset, float eps, Tensor(a!) y, Tensor(b!) r) -> ()");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float offset, Tensor r, Tensor(a!) dx, Tensor(b!) dw) "
      "-> ()");
  m.def("gated(Tensor gate, Tensor up, int activation, Tensor(a!) y) -> ()");
  m.def("gated_backward(Tensor dy, Tensor gate, Tensor up, int activation, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
  m.def("scratch(Tensor like, int rows, int columns) -> Tensor");
  m.def("release() -> int");
  m.def("variant() -> str");
  m.def("abi() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tract_fast, CompositeExplicitAutograd, m) {
  m.impl("row_pass", TORCH_BOX(&tract_fast::row_pass_op));
  m.impl("sampled_rows", TORCH_BOX(&tract_fast::sampled_rows_op));
  m.impl("sampled_weight", TORCH_BOX(&tract_fast::sampled_weight_op));
  m.impl("add", TORCH_BOX(&tract_fast::add_op));
  m.impl("scale", TORCH_BOX(&tract_fast::scale_op));
  m.impl("scratch", TORCH_BOX(&tract_fast::scratch_op));
  m.impl("release", TORCH_BOX(&tract_fast::release_op));
  m.impl("variant", TORCH_BOX(&tract_fast::variant_op));
  m.impl("abi", TORCH_BOX(&tract_fast::abi_op));
}

// Of the CPU alone: tensors without storage are met by tract_fast/loss/native.py.
STABLE_TORCH_LIBRARY_IMPL(tract_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&tract_fast::rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&tract_fast::rms_norm_backward_op));
  m.impl("gated", TORCH_BOX(&tract_fast::gated_op));
  m.impl("gated_backward", TORCH_BOX(&tract_fast::gated_backward_op));
}
