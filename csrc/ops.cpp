// The loss's kernels as PyTorch operators, in the namespace tract_fast (those of layers: ops_lean.cpp). Through PyTorch's
// stable ABI, which has all that is needed (tensors' pointers and its thread pool), so that one build can serve torch
// from 2.11 on.

#include "ops.h"

#include <optional>
#include <string>
#include <vector>

#include "sampled.h"
#include "scratch.h"

namespace tract_fast {
namespace {

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

// The logits of the labels (some column's where there is none) and of the score tokens, in float32.
void pick_op(const Tensor x, const Tensor weight, const Tensor labels, const Tensor ids, const Tensor label,
             const Tensor scores) {
  using torch::headeronly::ScalarType;
  const int64_t n = labels.numel(), n_vocab = weight.size(0), tokens = ids.numel();
  check_rows(x, "x", x, n);
  check_rows(weight, "weight", x, n_vocab);
  STD_TORCH_CHECK(x.size(1) == weight.size(1) && n_vocab > 0, "x and weight must be of one width, and of columns");
  check(labels, "labels", ScalarType::Long, n);
  check(ids, "ids", ScalarType::Long, tokens);
  check(label, "label", ScalarType::Float, n);
  check(scores, "scores", ScalarType::Float, n * tokens);
  check_range(labels, "labels", -1, n_vocab);
  check_range(ids, "ids", 0, n_vocab);
  std::vector<int32_t> columns(tokens + n);
  const auto column_of = [](int64_t column) { return static_cast<int32_t>(std::max<int64_t>(column, 0)); };
  std::transform(pointer<int64_t>(ids), pointer<int64_t>(ids) + tokens, columns.begin(), column_of);
  std::transform(pointer<int64_t>(labels), pointer<int64_t>(labels) + n, columns.begin() + tokens, column_of);
  const SampledKernels& kernels = chosen().sampled(type_of(x));
  const char* rows = static_cast<const char*>(x.data_ptr());
  const int64_t bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
  const Rows all{weight.data_ptr(), weight.stride(0), x.size(1), columns.data(), tokens};
  float *to_label = pointer<float>(label), *to_scores = pointer<float>(scores);
  in_parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Rows one = all;
      one.index = columns.data() + tokens + row;
      one.count = 1;
      kernels.dots(rows + row * bytes, one, to_label + row);
      kernels.dots(rows + row * bytes, all, to_scores + row * tokens);
    }
  });
}

// Rows in 8 bits, and what each is to be multiplied with.
void quantize_op(const Tensor rows, const Tensor codes, const Tensor scales) {
  using torch::headeronly::ScalarType;
  const int64_t n = rows.size(0), width = rows.size(1);
  check_rows(rows, "rows", rows, n);
  check(codes, "codes", ScalarType::Char, n * width);
  check(scales, "scales", ScalarType::Float, n);
  const SampledKernels& kernels = chosen().sampled(type_of(rows));
  const char* from = static_cast<const char*>(rows.data_ptr());
  const int64_t bytes = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  int8_t* to = pointer<int8_t>(codes);
  float* to_scales = pointer<float>(scales);
  in_parallel(n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      to_scales[row] = kernels.quantize(from + row * bytes, width, to + row * width);
  });
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
  const int32_t *all_columns = pointer<int32_t>(columns), *all_counts = pointer<int32_t>(counts);
  for (int64_t row = 0; row < n; ++row) {
    const int64_t count = all_counts[row];
    STD_TORCH_CHECK(count >= 0 && count <= most, "counts holds ", count);
    for (int64_t i = row * most; i < row * most + count; ++i)
      STD_TORCH_CHECK(all_columns[i] >= 0 && all_columns[i] < n_vocab, "columns holds ", all_columns[i]);
  }
  const Transposed t = transpose(all_columns, all_counts, pointer<float>(entries), n, most, n_vocab,
                                 torch::stable::get_num_threads(), in_parallel);
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

// out = total * by, rounded once; total is float32 or of out's type.
void scale_op(const Tensor total, const Tensor by, const Tensor out) {
  const bool wide = total.scalar_type() == torch::headeronly::ScalarType::Float;
  check(total, "total", wide ? total.scalar_type() : out.scalar_type(), out.numel());
  check(by, "by", torch::headeronly::ScalarType::Float, 1);
  check(out, "out", out.scalar_type(), total.numel());
  const Kernels& kernels = chosen().of(type_of(out));
  const float factor = *pointer<float>(by);
  over_elements(total.numel(), [&](int64_t begin, int64_t end) {
    char* to = static_cast<char*>(out.data_ptr()) + begin * out.element_size();
    const char* from = static_cast<const char*>(total.data_ptr()) + begin * total.element_size();
    if (wide)
      kernels.scale(reinterpret_cast<const float*>(from), factor, to, end - begin);
    else
      kernels.rescale(from, factor, to, end - begin);
  });
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
int64_t abi_op() { return 6; }

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
  m.def("pick(Tensor x, Tensor weight, Tensor labels, Tensor ids, Tensor(a!) label, Tensor(b!) scores) -> ()");
  m.def("quantize(Tensor rows, Tensor(a!) codes, Tensor(b!) scales) -> ()");
  m.def(
      "sampled_weight(Tensor columns, Tensor entries, Tensor counts, Tensor x, Tensor scale, Tensor(a!) dw, "
      "Tensor(b!) db, int n_vocab) -> ()");
  m.def("add(Tensor(a!) total, Tensor part, bool first) -> ()");
  m.def("scale(Tensor total, Tensor by, Tensor(a!) out) -> ()");
  m.def("scratch(Tensor like, int rows, int columns) -> Tensor");
  m.def("release() -> int");
  m.def("variant() -> str");
  m.def("abi() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tract_fast, CompositeExplicitAutograd, m) {
  m.impl("row_pass", TORCH_BOX(&tract_fast::row_pass_op));
  m.impl("sampled_rows", TORCH_BOX(&tract_fast::sampled_rows_op));
  m.impl("pick", TORCH_BOX(&tract_fast::pick_op));
  m.impl("quantize", TORCH_BOX(&tract_fast::quantize_op));
  m.impl("sampled_weight", TORCH_BOX(&tract_fast::sampled_weight_op));
  m.impl("add", TORCH_BOX(&tract_fast::add_op));
  m.impl("scale", TORCH_BOX(&tract_fast::scale_op));
  m.impl("scratch", TORCH_BOX(&tract_fast::scratch_op));
  m.impl("release", TORCH_BOX(&tract_fast::release_op));
  m.impl("variant", TORCH_BOX(&tract_fast::variant_op));
  m.impl("abi", TORCH_BOX(&tract_fast::abi_op));
}
