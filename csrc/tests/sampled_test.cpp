// The sampled gradient without Python: the draw against its probabilities over evenly spaced starts, the same lists by
// every variant and type, and the bound of their length.

#include "sampled.h"

#include "expect.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>

#define TRACT_FAST_VARIANT testing  // the kernels' own functions, compiled for any processor
#include "row_pass_kernels.h"
#include "sampled_kernels.h"

using namespace tract_fast;

namespace {

// What a model has between hidden states and logits, and what a call may leave out.
struct Form {
  bool bias = false, dx = true, used = true;
  float softcap = 0.0f, logit_scale = 1.0f;
};

// One row of logits with a label and two score tokens, and what the kernels need of it.
struct Problem {
  int64_t v, width = 5;
  Form form;
  std::vector<float> bias;
  std::vector<float> logits, weight, x;
  std::vector<int64_t> labels{3}, ids{0, 7};
  std::vector<float> values{1.0f, 2.0f}, picked_label{0.5f}, picked_scores{0.1f, -0.2f}, ce{0.75f}, score{0.0f},
      score_target{0.0f};
  std::vector<float> nll{0}, lse{0}, expected{0}, mass{0}, probs{0, 0};
  bool used = true;
  std::vector<float> proposed;  // raw logits to draw on instead, to be multiplied with row_scale
  float row_scale = 1.0f, weights[4] = {-1, -1, -1, -1};

  Problem(int64_t vocabulary, float spread, unsigned seed) : v(vocabulary) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < v; ++i) logits.push_back(spread * normal(random));
    for (int64_t i = 0; i < v * width; ++i) weight.push_back(normal(random));
    for (int64_t i = 0; i < width; ++i) x.push_back(normal(random));
  }

  // A row whose logits, weights and bias are the same in both types: x . w is a multiple of 1/8 below 16.
  Problem(int64_t vocabulary, const Form& form, unsigned seed) : v(vocabulary), form(form), used(form.used) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < width; ++i) x.push_back(random() % 2 ? 1.0f : -0.5f);
    for (int64_t i = 0; i < v * width; ++i) weight.push_back(0.25f * static_cast<float>(static_cast<int>(random() % 9) - 4));
    for (int64_t i = 0; i < v; ++i) {
      if (form.bias) bias.push_back(0.25f * static_cast<float>(static_cast<int>(random() % 9) - 4));
      float z = 0;
      for (int64_t d = 0; d < width; ++d) z += x[d] * weight[i * width + d];
      logits.push_back(z);
    }
    picked_label = {logits[3]};
    picked_scores = {logits[0], logits[7]};
  }

  RowPass pass(void* copy, const void* biases) {
    RowPass p{};
    p.logits = copy;
    p.bias = bias.empty() ? nullptr : biases;
    p.row_scale = proposed.empty() ? nullptr : &row_scale;
    p.softcap = form.softcap;
    p.n_vocab = p.stride = v;
    p.picked_label = picked_label.data();
    p.picked_scores = picked_scores.data();
    p.labels = labels.data();
    p.ce = ce.data();
    p.score = score.data();
    p.score_target = score_target.data();
    p.used = &used;
    p.ids = ids.data();
    p.values = values.data();
    p.n_tokens = 2;
    p.nll = nll.data();
    p.lse = lse.data();
    p.expected = expected.data();
    p.mass = mass.data();
    p.probs = probs.data();
    p.logit_scale = form.logit_scale;
    p.gradient = true;
    return p;
  }

  // The list of one start, dX and the spread of it.
  struct Drawn {
    std::vector<int32_t> columns;
    std::vector<float> values, dx;
    float spread = 0, norm = 0;
  };
  Drawn draw(const Variant& variant, double eps, int64_t start, Type type = Type::float32) {
    const int64_t most = std::min<int64_t>(v + 1, 2 + EXTRA + static_cast<int64_t>(std::ceil(OVER / eps)));
    const bool wide = type == Type::float32;
    std::vector<float> copy = proposed.empty() ? logits : proposed;
    auto logits16 = in_bfloat16(copy), x16 = in_bfloat16(x), weight16 = in_bfloat16(weight), bias16 = in_bfloat16(bias);
    std::vector<uint16_t> dx16(width, to_bfloat16(-7.0f));
    const RowPass p = wide ? pass(copy.data(), bias.data()) : pass(logits16.data(), bias16.data());
    Drawn d;
    d.columns.resize(most);
    d.values.resize(most);
    d.dx.assign(width, -7.0f);
    int32_t count = 0;
    const Lists lists{d.columns.data(), &count, d.values.data(), most, &start, eps, 0.75};
    void* const dx = wide ? static_cast<void*>(d.dx.data()) : dx16.data();
    const void *const rows = wide ? static_cast<const void*>(x.data()) : x16.data(),
                      *const columns = wide ? static_cast<const void*>(weight.data()) : weight16.data();
    const Operands o{rows, columns, width, width, width, form.dx ? dx : nullptr, &d.spread, &d.norm,
                     proposed.empty() ? nullptr : weights};
    sampled_rows(p, lists, o, variant, type, 0, 1);
    if (!wide)
      for (int64_t i = 0; i < width; ++i) d.dx[i] = from_bfloat16(dx16[i]);
    expect(count <= most, "a list fits");
    d.columns.resize(count);
    d.values.resize(count);
    return d;
  }
};

// dZ of all columns in float64.
std::vector<double> exact(Problem& p) {
  std::vector<double> z(p.logits.begin(), p.logits.end()), slope(p.v, p.form.logit_scale), dz;
  z[3] = p.picked_label[0];
  z[0] = p.picked_scores[0];
  z[7] = p.picked_scores[1];
  double total = 0;
  for (int64_t j = 0; j < p.v; ++j) {
    z[j] = (z[j] + (p.bias.empty() ? 0.0 : p.bias[j])) * p.form.logit_scale;
    if (p.form.softcap > 0) {
      const double t = std::tanh(z[j] / p.form.softcap);
      z[j] = t * p.form.softcap;
      slope[j] *= 1 - t * t;
    }
    total += std::exp(z[j]);
  }
  for (int64_t j = 0; j < p.v; ++j) dz.push_back(0.75 * (std::exp(z[j]) / total - (j == 3)) * slope[j]);
  return dz;
}

void check_mean(const Variant& variant, Problem p, double eps, bool variance = true) {
  const int64_t v = p.v;
  const std::vector<double> dz = exact(p);
  std::vector<double> mean(v), share(v);
  const int64_t starts = 4096;
  double error = 0, claimed = 0;
  for (int64_t i = 0; i < starts; ++i) {
    const auto drawn = p.draw(variant, eps, (i << 31) / starts + 12345);
    for (size_t j = 0; j < drawn.columns.size(); ++j) {
      mean[drawn.columns[j]] += drawn.values[j] / starts;
      share[drawn.columns[j]] += 1.0 / starts;
    }
    for (int64_t d = 0; d < p.width; ++d) {
      double whole = 0, sparse = 0;
      for (int64_t j = 0; j < v; ++j) whole += dz[j] * p.weight[j * p.width + d];
      for (size_t j = 0; j < drawn.columns.size(); ++j)
        sparse += drawn.values[j] * double{p.weight[drawn.columns[j] * p.width + d]};
      expect(std::fabs(drawn.dx[d] - sparse) <= 1e-5, "dX is the list times W");
      error += (sparse - whole) * (sparse - whole) / starts;
    }
    claimed += drawn.spread / starts;
  }
  const std::string name = std::string(variant.name) + " v " + std::to_string(v);
  bool drawn = false;
  for (int64_t j = 0; j < v; ++j) {
    // evenly spaced starts hit a column's interval once more or less often than its length says
    const double slack = 1.001 * dz[j] / std::max(share[j], 1.0 / starts) / starts;
    expect(std::fabs(mean[j] - dz[j]) <= std::fabs(slack) + 2e-5 * std::fabs(dz[j]), name + ": mean of column " + std::to_string(j));
    drawn |= share[j] > 0 && share[j] < 0.9;
  }
  expect(drawn, name + ": something is drawn");
  if (variance) expect(claimed > 0.8 * error && claimed < 1.25 * error, name + ": the variance is estimated");
}

// Both types, with what may stand between hidden states and logits; a row that is not used; no dX.
void check_forms(const Variant& variant) {
  const double eps = 1.0 / 32;
  for (const bool bias : {false, true})
    for (const float softcap : {0.0f, 6.0f})
      for (const float scale : {1.0f, 0.5f}) {
        Form form{bias, true, true, softcap, scale};
        // few different logits: neighbours are drawn together, and the estimate leaves covariances out
        check_mean(variant, Problem(300, form, 3), eps, false);
        for (const int64_t start : {int64_t{0}, int64_t{77777777}, (int64_t{1} << 31) - 1}) {
          Problem p(300, form, 3);
          const auto whole = p.draw(variant, eps, start), half = p.draw(variant, eps, start, Type::bfloat16);
          const std::string name = std::string(variant.name) + (bias ? ": bias" : ":") + " cap " + std::to_string(softcap);
          expect(whole.columns == half.columns, name + ", both types list the same");
          expect(whole.columns.size() > 3, name + ", something is listed");
          for (size_t j = 0; j < whole.values.size() && j < half.values.size(); ++j)
            expect(std::fabs(whole.values[j] - half.values[j]) <= 2e-6 * std::fabs(whole.values[j]), name + ", values");
          float largest = 0;
          for (int64_t d = 0; d < p.width; ++d) largest = std::max(largest, std::fabs(whole.dx[d]));
          for (int64_t d = 0; d < p.width; ++d)
            expect(std::fabs(whole.dx[d] - half.dx[d]) <= largest / 256, name + ", dX is rounded once");
          form.dx = false;
          Problem without(300, form, 3);
          for (const Type type : {Type::float32, Type::bfloat16}) {
            const auto list = without.draw(variant, eps, start, type);
            expect(list.columns == whole.columns && list.dx[0] == -7.0f, name + ", no dX");
            for (size_t j = 0; j < list.values.size() && j < whole.values.size(); ++j)
              expect(std::fabs(list.values[j] - whole.values[j]) <= 2e-6 * std::fabs(whole.values[j]), name + ", no dX");
          }
          form.dx = true;
        }
      }
  Problem unused(300, Form{false, true, false, 0.0f, 1.0f}, 3);
  for (const Type type : {Type::float32, Type::bfloat16}) {
    const auto list = unused.draw(variant, eps, 5, type);
    expect(list.columns.empty() && list.dx == std::vector<float>(5, 0.0f), "a row that is not used");
  }
}

// Drawn on logits that are off by up to 3/4 and half as large as they should be: in the mean dZ of the exact ones. A single
// column keeps the error that the log-sum-exp has in the draws that list it (neighbours come with it); over columns it
// goes away.
void check_quantised(const Variant& variant) {
  for (const bool bias : {false, true})
    for (const Type type : {Type::float32, Type::bfloat16}) {
      const Form form{bias, true, true, 0.0f, 1.0f};
      Problem p(300, form, 3);
      std::mt19937 random(4);
      for (const float z : p.logits) p.proposed.push_back(0.5f * (z + 0.25f * static_cast<float>(static_cast<int>(random() % 7) - 3)));
      p.row_scale = 2.0f;
      const std::vector<double> dz = exact(p);
      std::vector<double> mean(p.v), share(p.v);
      double lse = 0, true_lse = 0, drawn_lse = 0, at_random = 0, largest = 0;
      for (int64_t j = 0; j < p.v; ++j) {
        const float b = bias ? p.bias[j] : 0.0f;
        const bool apart = j == 3 || j == 0 || j == 7;
        true_lse += std::exp(double{p.logits[j]} + b);
        drawn_lse += std::exp(double{apart ? p.logits[j] : 2.0f * p.proposed[j]} + b);
      }
      const int64_t starts = 2048;
      for (int64_t i = 0; i < starts; ++i) {
        const auto drawn = p.draw(variant, 1.0 / 64, (i << 31) / starts + 12345, type);
        for (size_t j = 0; j < drawn.columns.size(); ++j) {
          mean[drawn.columns[j]] += drawn.values[j] / starts;
          share[drawn.columns[j]] += 1.0 / starts;
        }
        lse += double{p.lse[0]} / starts;
        at_random += p.weights[0] / starts;
        largest = std::max(largest, double{p.weights[1]});
        expect(p.weights[1] * p.weights[0] >= p.weights[2] * 0.999 && p.weights[3] <= p.weights[1] * p.weights[2] * 1.001,
               "weights agree with each other");
      }
      const std::string name = std::string(variant.name) + (bias ? ", bias" : "") + ", quantised";
      expect(std::fabs(drawn_lse / true_lse - 1) > 0.03, name + ": the logits are bad");
      expect(std::fabs(lse - std::log(true_lse)) < 0.01, name + ": the log-sum-exp");
      double between = 0;
      for (const double s : share) between += s < 0.999 ? s : 0.0;
      expect(std::fabs(at_random - between) < 0.05, name + ": entries listed at random");
      expect(largest > 1.5 && largest < 3, name + ": the largest weight");
      double sum = 0, true_sum = 0, miss = 0, size = 0;
      for (int64_t j = 0; j < p.v; ++j) {
        const double slack = 1.001 * dz[j] / std::max(share[j], 1.0 / starts) / starts;
        expect(std::fabs(mean[j] - dz[j]) <= std::fabs(slack) + 0.2 * std::fabs(dz[j]), name + ": mean of column " + std::to_string(j));
        if (j != 3) sum += mean[j], true_sum += dz[j];
      }
      expect(std::fabs(sum / true_sum - 1) < 0.01, name + ": mean over columns");
      for (int64_t d = 0; d < p.width; ++d) {
        double found = 0, whole = 0;
        for (int64_t j = 0; j < p.v; ++j) found += mean[j] * p.weight[j * p.width + d], whole += dz[j] * p.weight[j * p.width + d];
        miss += (found - whole) * (found - whole);
        size += whole * whole;
      }
      expect(miss < 0.01 * 0.01 * size, name + ": mean of dX, off by " + std::to_string(std::sqrt(miss / size)));
    }
}

void check_same(const Variant& variant) {
  for (const int64_t v : {8, 63, 64, 65, 1023, 1024, 1025, 5000})
    for (const int64_t start : {int64_t{0}, int64_t{77777777}, (int64_t{1} << 31) - 1}) {
      Problem p(v, 2.0f, 9);
      const auto a = p.draw(variant, 1.0 / 64, start), b = p.draw(*find_variant("portable"), 1.0 / 64, start);
      expect(a.columns == b.columns, std::string(variant.name) + ": the same columns, v " + std::to_string(v));
    }
}

// A group whose f_j pass two multiples of 2^31, while sums of float32, by lanes of eight, stay below one.
void check_two_multiples(const Variant& variant) {
  const float lane[] = {-0x1.4403eap+1f, -0x1.3229a8p+2f, -0x1.00c0a4p+2f, -0x1.4252c4p+2f,
                        -0x1.67aaeap+2f, -0x1.d5469cp+2f, -0x1.d3264ep+2f, -0x1.aae1f4p+2f};
  std::vector<float> logits;
  for (int64_t i = 0; i < 64; ++i) logits.push_back(lane[i / 8]);
  int64_t label = -1;
  RowPass p{};
  p.logits = logits.data();
  p.n_vocab = p.stride = 64;
  p.labels = &label;
  p.logit_scale = 1.0f;
  for (const uint32_t start : {0x7fffffffu, 0x7ffffff0u, 12345u}) {
    uint64_t sum = start;
    for (const float z : logits) sum += testing::proposal(testing::all_of(z))[0];
    std::vector<int32_t> columns(65);
    std::vector<float> ratios(65);
    const int64_t count = variant.sampled_float32.draw(p, 0.0f, start, 0, columns.data(), ratios.data(), 64);
    expect(count == static_cast<int64_t>(sum >> 31), std::string(variant.name) + ": multiples of 2^31");
  }
}

void check_flat(const Variant& variant) {
  Problem p(3000, 0.0f, 1);
  for (const int64_t start : {int64_t{0}, (int64_t{1} << 31) - 1})
    expect(p.draw(variant, 1.0 / 32, start).columns.size() > 25, "a flat row has a long list");
  p.logits.assign(3000, 3e6f);  // here float32 resolves 1/4
  p.picked_label[0] = p.picked_scores[0] = p.picked_scores[1] = 3e6f;
  for (const int64_t start : {int64_t{0}, (int64_t{1} << 31) - 1}) p.draw(variant, 1.0 / 32, start);
  p.logits[100] = std::numeric_limits<float>::quiet_NaN();
  expect(p.draw(variant, 1.0 / 32, 5).columns.size() == 3, "a broken row lists label and score tokens");
}

void check_proposals() {
  const auto proposal = [](float a) { return testing::proposal(testing::all_of(a))[0]; };
  for (float a = -21.4f; a < 0.0f; a += 0.01f) {
    const double f = proposal(a), wanted = std::exp(double{a}) * 2147483648.0;
    expect(f >= wanted * (1 - 2e-6) - 1 && f <= wanted * 1.0616 + 1, "proposal of " + std::to_string(a));
  }
  expect(proposal(0.0f) == KEPT && proposal(3.0f) == KEPT, "kept");
  expect(proposal(-std::numeric_limits<float>::infinity()) == 0u, "nothing is not drawn");
  expect(proposal(-50.0f) == 1u && proposal(-FLT_MAX) == 1u, "and all else may be");
  expect(proposal(-1e-8f) < 1u << 31, "fits");
}

}  // namespace

int main() {
  check_proposals();
  for (const Variant& variant : variants()) {
    if (!variant.runs_here()) continue;
    check_mean(variant, Problem(200, 1.5f, 5), 1.0 / 16);
    check_mean(variant, Problem(1100, 1.0f, 5), 1.0 / 64);
    check_forms(variant);
    check_same(variant);
    check_quantised(variant);
    check_two_multiples(variant);
    check_flat(variant);
    std::printf("%s: done\n", variant.name);
  }
  std::printf(failures == 0 ? "sampled: all passed\n" : "sampled: %d failures\n", failures);
  return failures != 0;
}
