// The parts of row_pass.h that no instruction set changes: the end of a row's statistics, and which variant runs.

#include "row_pass.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace tract_fast {

#define TRACT_FAST_DECLARE(variant) \
  namespace variant {               \
  extern const Kernels float32_kernels, bfloat16_kernels; \
  extern const SampledKernels sampled_float32, sampled_bfloat16; \
  extern const LeanKernels lean_float32, lean_bfloat16; \
  }
#define TRACT_FAST_KERNELS(variant) \
  variant::float32_kernels, variant::bfloat16_kernels, variant::sampled_float32, variant::sampled_bfloat16, \
      variant::lean_float32, variant::lean_bfloat16
TRACT_FAST_DECLARE(portable)
#ifdef TRACT_FAST_X86
TRACT_FAST_DECLARE(avx2)
TRACT_FAST_DECLARE(avx512)
TRACT_FAST_DECLARE(avx512bf16)

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
#ifdef TRACT_FAST_X86
      {"avx512bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
       TRACT_FAST_KERNELS(avx512bf16)},
      {"avx512", has_avx512, TRACT_FAST_KERNELS(avx512)},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, TRACT_FAST_KERNELS(avx2)},
#endif
      {"portable", [] { return true; }, TRACT_FAST_KERNELS(portable)},
  };
  return all;
}

const Variant* find_variant(const char* name) {
  for (const Variant& variant : variants())
    if (variant.runs_here() && (name == nullptr || std::strcmp(name, variant.name) == 0)) return &variant;
  return nullptr;
}

Sums merge(Sums a, Sums b) {
  const float top = std::max(a.top, b.top);
  return {top, a.others * std::exp(double{a.top} - top) + b.others * std::exp(double{b.top} - top)};
}

Capped transform(const RowPass& p, const Kernels& k, float raw, int64_t column) {
  double z = raw;
  if (p.bias != nullptr) z += k.bias_at(p.bias, column);
  z *= p.logit_scale;
  if (p.softcap == 0.0f) return {z, p.logit_scale};
  const double e = std::exp(-2.0 * std::fabs(z) / p.softcap);
  return {std::tanh(z / p.softcap) * p.softcap, p.logit_scale * 4.0 * e / ((1.0 + e) * (1.0 + e))};
}

Coefficients finish(const RowPass& p, const Kernels& k, Sums sums, int64_t row, float* scores) {
  const int64_t label = p.labels[row], tokens = p.n_tokens;
  const bool has_label = label >= 0;
  const double nothing = -std::numeric_limits<double>::infinity();
  const Capped at_label = has_label ? transform(p, k, p.picked_label[row], label) : Capped{nothing, 0.0};
  const auto at_token = [&](int64_t i) {
    return p.ids[i] == label ? at_label : transform(p, k, p.picked_scores[row * tokens + i], p.ids[i]);
  };
  double highest = std::max(double{sums.top}, at_label.z), highest_score = nothing;
  for (int64_t i = 0; i < tokens; ++i) highest_score = std::max(highest_score, at_token(i).z);
  highest = std::max(highest, highest_score);

  const double e_top = std::exp(sums.top - highest), e_label = std::exp(at_label.z - highest);
  double rest = sums.others * e_top, among = 0.0;  // all but the label; the score tokens relative to their largest
  for (int64_t i = 0; i < tokens; ++i) {
    const double z = at_token(i).z;
    if (p.ids[i] != label) rest += std::exp(z - highest);
    among += std::exp(z - highest_score);
  }
  const double total = rest + e_label, ratio = std::log(rest) + (highest - at_label.z);
  double mass = 0.0, expected = 0.0;
  float* q = p.probs + row * tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    const double z = at_token(i).z, in_vocabulary = std::exp(z - highest) / total;
    const double share = p.vocab ? in_vocabulary : std::exp(z - highest_score) / among;
    mass += in_vocabulary;
    expected += share * p.values[i];
    q[i] = static_cast<float>(share);
  }
  p.nll[row] = has_label ? static_cast<float>(std::max(ratio, 0.0) + std::log1p(std::exp(-std::fabs(ratio)))) : 0.0f;
  p.lse[row] = static_cast<float>(highest + std::log(total));
  p.expected[row] = static_cast<float>(expected);
  p.mass[row] = static_cast<float>(mass);

  const double ce = p.ce[row], g = 2.0 * (expected * p.score[row] - p.score_target[row]);
  const double label_ce = -ce * rest / total;
  for (int64_t i = 0; i < tokens; ++i) {
    const Capped c = at_token(i);
    const double share = p.vocab ? std::exp(c.z - highest) / total : std::exp(c.z - highest_score) / among;
    const double from_ce = p.ids[i] == label ? label_ce : ce * std::exp(c.z - highest) / total;
    scores[i] = static_cast<float>((from_ce + g * share * (p.values[i] - expected)) * c.slope);
  }
  const double kappa = p.vocab ? ce - g * expected : ce;
  const double at = p.vocab ? label_ce - g * expected * e_label / total : label_ce;
  return {sums.top, static_cast<float>(kappa * e_top / total), static_cast<float>(at * at_label.slope), kappa,
          sums.others * e_top / total, highest + std::log(total)};
}

}  // namespace tract_fast
