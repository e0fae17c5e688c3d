// Rows of the sampled gradient that a thread takes together, more of them than are at once and of more columns than a tile of
// W has: what each has is what it has alone, bit for bit, and its dX is its list times W.

#include "sampled.h"

#include "expect.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>

using namespace tract_fast;

namespace {

constexpr int64_t ROWS = 150, VOCABULARY = 700, WIDTH = 300, MOST = 2 + EXTRA + 70;  // EPS fits into MOST
constexpr double EPS = 1.0 / 64;

// Of all rows.
struct Found {
  std::vector<float> entries = std::vector<float>(ROWS * MOST), nll = std::vector<float>(ROWS), lse = nll, spread = nll,
                     norm = nll, weights = std::vector<float>(4 * ROWS), dx = std::vector<float>(ROWS * WIDTH);
  std::vector<int32_t> columns = std::vector<int32_t>(ROWS * MOST), counts = std::vector<int32_t>(ROWS);
  std::vector<uint16_t> dx16 = std::vector<uint16_t>(ROWS * WIDTH);
  bool operator==(const Found&) const = default;
};

// Rows whose logits are not X W: one's exact logits are far below what is drawn on, one's far above, one's more and more.
struct Problem {
  std::vector<float> x, weight, logits, ce, picked, scores, scale = std::vector<float>(ROWS, 1.0f);
  std::vector<uint16_t> x16, weight16;
  std::vector<int64_t> labels, starts, ids{0, 7};
  std::vector<char> used = std::vector<char>(ROWS, 1);

  Problem() {
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ROWS * WIDTH; ++i) x.push_back(from_bfloat16(to_bfloat16(normal(random))));
    for (int64_t i = 0; i < VOCABULARY * WIDTH; ++i) weight.push_back(from_bfloat16(to_bfloat16(0.12f * normal(random))));
    double norm = 0;  // row 13's exact logits rise by 15 a hundred columns, of which what is drawn on knows nothing
    for (int64_t d = 0; d < WIDTH; ++d) norm += x[13 * WIDTH + d] * x[13 * WIDTH + d];
    for (int64_t i = 0; i < VOCABULARY * WIDTH; ++i) {
      weight[i] += static_cast<float>(15.0 * (i / WIDTH / 100) / norm) * x[13 * WIDTH + i % WIDTH];
      weight16.push_back(to_bfloat16(weight[i]));
      weight[i] = from_bfloat16(weight16[i]);
    }
    for (const float w : x) x16.push_back(to_bfloat16(w));
    used[20] = used[149] = 0;
    for (int64_t i = 0; i < ROWS; ++i) {
      for (int64_t j = 0; j < VOCABULARY; ++j) {
        float z = i == 11 ? 60.0f : i == 12 ? -60.0f : i == 13 ? -15.0f * static_cast<float>(j / 100) : 0.0f;
        for (int64_t d = 0; d < WIDTH; ++d) z += x[i * WIDTH + d] * weight[j * WIDTH + d];
        logits.push_back(z);
      }
      labels.push_back(i % 5 == 0 ? -1 : random() % VOCABULARY);
      starts.push_back(random() >> 1);
      ce.push_back(0.1f * static_cast<float>(1 + random() % 9));
      picked.push_back(labels[i] < 0 ? 0.0f : logits[i * VOCABULARY + labels[i]]);
      for (const int64_t id : ids) scores.push_back(logits[i * VOCABULARY + id]);
    }
  }

  // `step` rows at a call.
  Found run(const Variant& variant, Type type, bool proposed, bool gradient, int64_t step) const {
    const bool wide = type == Type::float32;
    Found f;
    std::vector<float> copy = logits, nothing(ROWS), expected(ROWS), mass(ROWS), probs(2 * ROWS), values{1.0f, 2.0f};
    std::vector<uint16_t> copy16;
    for (const float z : logits) copy16.push_back(to_bfloat16(z));
    RowPass p{};
    p.logits = wide ? static_cast<void*>(copy.data()) : copy16.data();
    p.n_vocab = p.stride = VOCABULARY;
    p.row_scale = proposed ? scale.data() : nullptr;
    p.picked_label = picked.data(), p.picked_scores = scores.data(), p.labels = labels.data();
    p.ce = ce.data(), p.score = p.score_target = nothing.data();
    p.used = reinterpret_cast<const bool*>(used.data());
    p.ids = ids.data(), p.values = values.data(), p.n_tokens = 2;
    p.nll = f.nll.data(), p.lse = f.lse.data(), p.expected = expected.data(), p.mass = mass.data();
    p.probs = probs.data(), p.logit_scale = 1.0f, p.gradient = true;
    const Lists lists{f.columns.data(), f.counts.data(), f.entries.data(), MOST, starts.data(), EPS, 0.5};
    void* const dx = wide ? static_cast<void*>(f.dx.data()) : f.dx16.data();
    const Operands o{wide ? static_cast<const void*>(x.data()) : x16.data(),
                     wide ? static_cast<const void*>(weight.data()) : weight16.data(), WIDTH, WIDTH, WIDTH,
                     gradient ? dx : nullptr, f.spread.data(), f.norm.data(), proposed ? f.weights.data() : nullptr};
    for (int64_t i = 0; i < ROWS; i += step) sampled_rows(p, lists, o, variant, type, i, std::min(i + step, ROWS));
    return f;
  }

  void check_dx(const Found& f, bool wide, const std::string& name) const {
    for (int64_t i = 0; i < ROWS; ++i) {
      double off = 0, size = 0;
      for (int64_t d = 0; d < WIDTH; ++d) {
        double sum = 0, largest = 0;
        for (int64_t e = i * MOST; e < i * MOST + f.counts[i]; ++e) {
          const double summand = double{f.entries[e]} * weight[f.columns[e] * WIDTH + d];
          sum += summand, largest += std::fabs(summand);
        }
        const double found = wide ? f.dx[i * WIDTH + d] : from_bfloat16(f.dx16[i * WIDTH + d]);
        off += (found - sum) * (found - sum), size += largest * largest;
      }
      expect(off <= size * (wide ? 1e-12 : 1e-5), name + ": dX of row " + std::to_string(i));
    }
  }
};

void check(const Variant& variant, const Problem& problem) {
  for (const bool proposed : {false, true})
    for (const bool gradient : {false, true})
      for (const Type type : {Type::float32, Type::bfloat16}) {
        const bool wide = type == Type::float32;
        const auto run = [&](int64_t step) { return problem.run(variant, type, proposed, gradient, step); };
        const Found alone = run(1);
        const std::string name = std::string(variant.name) + (wide ? " float32" : " bfloat16") + (proposed ? ", proposed" : "");
        int64_t listed = 0;
        for (const int32_t count : alone.counts) listed += count;
        expect(listed > 15 * ROWS && alone.counts[20] == 0, name + ": lists are long, that of a row that is not used empty");
        expect(run(ROWS) == alone && run(37) == alone, name + ": a row is what it is alone");
        if (gradient) problem.check_dx(alone, wide, name);
      }
}

}  // namespace

int main() {
  const Problem problem;
  for (const Variant& variant : variants()) {
    if (!variant.runs_here()) continue;
    check(variant, problem);
    std::printf("%s: done\n", variant.name);
  }
  std::printf(failures == 0 ? "together: all passed\n" : "together: %d failures\n", failures);
  return failures != 0;
}
