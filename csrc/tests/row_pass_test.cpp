// The row pass without Python: every variant that runs here against plain float64 formulas, for sizes around the vector
// and block lengths, rows that are not aligned, rows shared by threads, and values that are not finite.

#include "expect.h"
#include "row_pass.h"
#include "scratch.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <thread>

#define TRACT_FAST_VARIANT testing  // the kernels' own functions, compiled for any processor
#include "row_pass_kernels.h"

using namespace tract_fast;

namespace {

struct Options {
  bool vocab = false, gradient = true, bias = false;
  float softcap = 0.0f, logit_scale = 1.0f;
};

// One problem in float64, and as the kernels take it.
struct Problem {
  int64_t n, v, k, stride;
  Type type;
  Options options;
  std::vector<double> logits, bias;  // what the type holds
  std::vector<float> raw32, bias32, picked_label, picked_scores, ce, score, score_target, values;
  std::vector<float> nll, lse, expected, mass, probs;
  std::vector<uint16_t> raw16, bias16;
  std::vector<int64_t> labels, ids;
  std::vector<char> used;

  Problem(int64_t rows, int64_t vocabulary, int64_t tokens, Type t, Options o, unsigned seed)
      : n(rows), v(vocabulary), k(std::min(tokens, vocabulary)), stride(vocabulary + 3), type(t), options(o) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::vector<float>& x, int64_t size, float scale) {
      for (int64_t i = 0; i < size; ++i) x.push_back(scale * normal(random));
    };
    raw16.resize(n * stride);
    for (int64_t i = 0; i < n * stride; ++i) {
      const float x = 4.0f * normal(random);
      raw16[i] = to_bfloat16(x);
      raw32.push_back(x);
      logits.push_back(type == Type::float32 ? x : from_bfloat16(raw16[i]));
    }
    for (int64_t i = 0; i < v; ++i) {
      const float x = normal(random);
      bias32.push_back(x);
      bias16.push_back(to_bfloat16(x));
      bias.push_back(!options.bias ? 0.0 : type == Type::float32 ? x : from_bfloat16(to_bfloat16(x)));
    }
    for (int64_t i = 0; i < k; ++i) ids.push_back((i * 7 + 3) % v);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    k = static_cast<int64_t>(ids.size());
    for (int64_t i = 0; i < n; ++i) {
      labels.push_back(i % 3 == 0 ? -1 : i % 3 == 1 ? ids[i % k] : static_cast<int64_t>(random() % v));
      used.push_back(labels[i] >= 0 || i % 2 == 0);
      picked_label.push_back(static_cast<float>(at(i, std::max<int64_t>(labels[i], 0))));
      for (int64_t id : ids) picked_scores.push_back(static_cast<float>(at(i, id)));
    }
    draw(ce, n, 1.0f);
    draw(score, n, 1.0f);
    draw(score_target, n, 1.0f);
    draw(values, k, 2.0f);
    for (int64_t i = 0; i < n; ++i) {
      if (labels[i] < 0) ce[i] = 0.0f;
      if (i % 2 != 0) score[i] = score_target[i] = 0.0f;
    }
    for (auto* out : {&nll, &lse, &expected, &mass}) out->resize(n);
    probs.resize(n * k);
  }

  // Sets one raw logit, wherever it is held.
  void set(int64_t row, int64_t column, float x) {
    raw32[row * stride + column] = x;
    raw16[row * stride + column] = to_bfloat16(x);
    logits[row * stride + column] = type == Type::float32 ? x : from_bfloat16(to_bfloat16(x));
    if (labels[row] == column) picked_label[row] = static_cast<float>(at(row, column));
    for (int64_t i = 0; i < k; ++i)
      if (ids[i] == column) picked_scores[row * k + i] = static_cast<float>(at(row, column));
  }

  double at(int64_t row, int64_t column) const { return logits[row * stride + column]; }

  double capped(int64_t row, int64_t column, double* slope = nullptr) const {
    const double z = (at(row, column) + bias[column]) * options.logit_scale;
    if (options.softcap == 0.0f) {
      if (slope) *slope = options.logit_scale;
      return z;
    }
    const double t = std::tanh(z / options.softcap);
    if (slope) *slope = options.logit_scale * (1 - t * t);
    return options.softcap * t;
  }

  RowPass arguments() {
    RowPass p{};
    p.logits = type == Type::float32 ? static_cast<void*>(raw32.data()) : raw16.data();
    p.n_vocab = v;
    p.stride = stride;
    if (options.bias) p.bias = type == Type::float32 ? static_cast<const void*>(bias32.data()) : bias16.data();
    p.picked_label = picked_label.data();
    p.picked_scores = picked_scores.data();
    p.labels = labels.data();
    p.ce = ce.data();
    p.score = score.data();
    p.score_target = score_target.data();
    p.used = reinterpret_cast<const bool*>(used.data());
    p.ids = ids.data();
    p.values = values.data();
    p.n_tokens = k;
    p.nll = nll.data();
    p.lse = lse.data();
    p.expected = expected.data();
    p.mass = mass.data();
    p.probs = probs.data();
    p.softcap = options.softcap;
    p.logit_scale = options.logit_scale;
    p.vocab = options.vocab;
    p.gradient = options.gradient;
    return p;
  }

  double result(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    return type == Type::float32 ? raw32[i] : from_bfloat16(raw16[i]);
  }
};

const auto with_threads(int64_t threads) {
  return [threads](int64_t count, const auto& body) {
    std::vector<std::thread> pool;
    for (int64_t t = 0; t < threads; ++t)
      pool.emplace_back([&, t] { body(count * t / threads, count * (t + 1) / threads); });
    for (std::thread& thread : pool) thread.join();
  };
}

void run(Problem& p, const Variant& variant, int64_t threads) {
  row_pass(p.arguments(), p.n, variant.of(p.type), threads, with_threads(threads));
}

void check(Problem& p, const Variant& variant, int64_t threads, const std::string& name) {
  run(p, variant, threads);
  for (int64_t row = 0; row < p.n; ++row) {
    double sum = 0, highest = -1e300;
    for (int64_t j = 0; j < p.v; ++j) highest = std::max(highest, p.capped(row, j));
    for (int64_t j = 0; j < p.v; ++j) sum += std::exp(p.capped(row, j) - highest);
    const double lse = highest + std::log(sum);
    double among = 0, mass = 0, expected = 0;
    for (int64_t id : p.ids) among += std::exp(p.capped(row, id) - highest);
    for (int64_t i = 0; i < p.k; ++i) {
      const double share = std::exp(p.capped(row, p.ids[i]) - highest) / (p.options.vocab ? sum : among);
      expected += share * p.values[i];
      expect(std::fabs(p.probs[row * p.k + i] - share) < 1e-6, name + ": probs");
    }
    mass = among / sum;
    const int64_t label = p.labels[row];
    expect(std::fabs(p.lse[row] - lse) < 2e-6 * (1 + std::fabs(lse)), name + ": lse");
    expect(std::fabs(p.nll[row] - (label < 0 ? 0 : lse - p.capped(row, label))) < 5e-6 * (1 + std::fabs(lse)), name + ": nll");
    expect(std::fabs(p.mass[row] - mass) < 1e-6, name + ": mass");
    expect(std::fabs(p.expected[row] - expected) < 1e-5, name + ": expected");
    if (!p.options.gradient) continue;
    const double g = 2 * (expected * p.score[row] - p.score_target[row]);
    for (int64_t j = 0; j < p.v; ++j) {
      double slope = 1;
      const double probability = std::exp(p.capped(row, j, &slope) - lse);
      double dz = p.ce[row] * (probability - (j == label ? 1 : 0));
      double value = 0;
      bool is_token = false;
      for (int64_t i = 0; i < p.k; ++i)
        if (p.ids[i] == j) is_token = true, value = p.values[i];
      if (p.options.vocab) dz += g * probability * (value - expected);
      else if (is_token) dz += g * std::exp(p.capped(row, j) - highest) / among * (value - expected);
      dz = p.used[row] ? dz * slope : 0;
      // half an ulp of bfloat16 is at most 2^-8 of its value; terms of score tokens and labels cancel
      const double unit = p.type == Type::float32 ? 3e-5 : 4e-3, least = is_token || j == label ? 2e-6 * (1 + std::fabs(g)) : 1e-30;
      expect(std::fabs(p.result(row, j) - dz) <= unit * std::fabs(dz) + least, name + ": dZ");
    }
  }
}

void check_everything(const Variant& variant) {
  const std::vector<Options> all = {
      {}, {true}, {false, false}, {true, true, true}, {true, true, true, 5.0f, -0.7f}, {false, true, false, 30.0f, 1.3f},
      {false, true, false, 1e6f, 1.0f}};
  for (Type type : {Type::float32, Type::bfloat16})
    for (int64_t v : {1, 2, 15, 16, 17, 31, 33, 1023, 1024, 1025, 4100})
      for (size_t o = 0; o < all.size(); ++o)
        for (int64_t threads : {1, 2, 3, 8}) {
          Problem p(5, v, 5, type, all[o], static_cast<unsigned>(v + 17 * o));
          const std::string name = std::string(variant.name) + (type == Type::float32 ? " float32" : " bfloat16") +
                                   ", V " + std::to_string(v) + ", options " + std::to_string(o) + ", " +
                                   std::to_string(threads) + " threads";
          check(p, variant, threads, name);
        }
}

// Blocks far below the ones before them, and far above.
void check_blocks_apart(const Variant& variant) {
  for (const Type type : {Type::float32, Type::bfloat16})
    for (const float distance : {100.0f, -100.0f, 30.0f, -30.0f, 42.0f})  // sums are taken again from 40 on
      for (const int64_t threads : {1, 8}) {
        Problem p(3, 3 * BLOCK, 5, type, {}, 3);
        for (int64_t row = 0; row < p.n; ++row)
          for (int64_t j = 0; j < p.v; ++j)
            p.set(row, j, static_cast<float>(p.at(row, j)) + distance * static_cast<float>(j / BLOCK));
        check(p, variant, threads, std::string(variant.name) + ", blocks apart");
      }
}

// A label that is almost certain has a loss and a gradient of its own size.
void check_certain_label(const Variant& variant) {
  Problem p(3, 3000, 5, Type::float32, {}, 4);
  const int64_t label = p.labels[2];
  p.set(2, label, 45.0f);
  run(p, variant, 1);
  double rest = 0;
  for (int64_t j = 0; j < p.v; ++j) rest += j == label ? 0 : std::exp(p.capped(2, j) - 45.0);
  const std::string name = std::string(variant.name) + ", certain label";
  expect(rest < 1e-9 && std::fabs(p.nll[2] - std::log1p(rest)) < 1e-4 * rest, name + ": nll");
  bool is_token = false;
  for (int64_t id : p.ids) is_token |= id == label;
  expect(!is_token && std::fabs(p.result(2, label) + p.ce[2] * rest) < 1e-4 * std::fabs(p.ce[2] * rest), name + ": dZ");
}

void check_functions() {
  using namespace tract_fast::testing;
  for (int i = 0; i <= 87300; ++i) {
    const float x = -static_cast<float>(i) / 1000.0f, y = static_cast<float>(i) / 10000.0f;
    expect(std::fabs(exp_bounded(x) / std::exp(double{x}) - 1) < 2e-7, "exp(" + std::to_string(x) + ")");
    const double t = std::tanh(double{y});
    expect(std::fabs(tanh_positive(y, exp_bounded(-2.0f * y)) - t) <= 3e-7 * t, "tanh(" + std::to_string(y) + ")");
  }
  for (float x = -87.3f; x <= 80.0f; x += 0.01f) {
    const std::string name = "exp(" + std::to_string(x) + ")";
    const auto off = [&](float e) { return std::fabs(e / std::exp(double{x}) - 1); };
    expect(off(exp_bounded(x)) < 2e-7 && off(exp_of<bfloat16>(x)) < 8e-6, name);
    for (int64_t i = 0; i < LANES; ++i)
      expect(exp_bounded(all_of(x))[i] == exp_bounded(x) && exp_of<bfloat16>(all_of(x))[i] == exp_of<bfloat16>(x), name);
  }
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -0.0f, -std::numeric_limits<float>::infinity()})
    expect(std::isnan(exp_of<bfloat16>(all_of(bad))[0]) == std::isnan(bad) && to_bits(all_of(bad)[0]) == to_bits(bad),
           "what is not a number stays so");
  expect(exp_of<bfloat16>(-100.0f) == 0.0f, "exp of little in bfloat16");
  expect(exp_bounded(-100.0f) == 0.0f && exp_bounded(-std::numeric_limits<float>::infinity()) == 0.0f, "exp of little");
  const auto rounded = [](uint32_t bits) { return narrow<bfloat16>(__builtin_bit_cast(float, bits)); };
  expect(rounded(0x3f808000u) == 0x3f80u && rounded(0x3f818000u) == 0x3f82u, "ties to even");
  expect(rounded(0x3f808001u) == 0x3f81u && rounded(0x3f807fffu) == 0x3f80u, "to nearest");
  for (uint32_t nan : {0x7fffffffu, 0xffffffffu, 0x7f800001u}) expect(std::isnan(widen(rounded(nan))), "NaN stays NaN");
}

void check_values_that_are_not_finite(const Variant& variant) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t threads : {1, 8})
    for (float bad : {nan, infinity, -infinity, 1e-40f}) {
      Problem clean(4, 2000, 5, Type::float32, {}, 1), dirty(4, 2000, 5, Type::float32, {}, 1);
      dirty.raw32[1 * dirty.stride + 1500] = bad;  // row 1, not a label or a token
      run(clean, variant, threads);
      run(dirty, variant, threads);
      const std::string name = std::string(variant.name) + ", " + std::to_string(bad) + " in a row";
      for (int64_t row : {0, 2, 3}) {
        expect(clean.nll[row] == dirty.nll[row] && clean.expected[row] == dirty.expected[row], name + " changes another");
        for (int64_t j = 0; j < clean.v; ++j)
          expect(clean.result(row, j) == dirty.result(row, j), name + " changes another's dZ");
      }
      const bool finite = std::isfinite(dirty.lse[1]);
      expect(finite == (bad == -infinity || bad == 1e-40f), name + ": lse " + std::to_string(dirty.lse[1]));
      Problem half(4, 2000, 5, Type::bfloat16, {}, 1);
      half.set(1, 1500, bad);
      if (std::isnan(bad)) half.raw16[1 * half.stride + 1500] = 0x7fff;
      run(half, variant, threads);
      expect(std::isfinite(half.lse[1]) == finite, name + " of bfloat16: lse");
      expect(std::isnan(half.result(1, 0)) == !finite, name + " of bfloat16: dZ");
      dirty.raw32[3 * dirty.stride + 1500] = bad;  // row 3 has neither a label nor a score
      run(dirty, variant, threads);
      for (int64_t j = 0; j < clean.v; ++j) expect(dirty.result(3, j) == 0, name + " that nothing uses");
    }
}

// An infinite logit is one like any other: the cap makes it finite, a negative scale turns it round.
void check_infinite_logits(const Variant& variant) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (Type type : {Type::float32, Type::bfloat16})
    for (float bad : {infinity, -infinity})
      for (float scale : {1.3f, -1.7f}) {
        Problem capped(3, 2000, 5, type, {false, true, false, 30.0f, scale}, 2);
        for (int64_t row = 0; row < 3; ++row) capped.set(row, 1501, bad);
        check(capped, variant, 1, std::string(variant.name) + ", infinite under a cap");
        Problem bare(3, 2000, 5, type, {false, true, false, 0.0f, scale}, 2);
        bare.set(1, 1501, bad);
        run(bare, variant, 1);
        expect(std::isfinite(bare.lse[1]) == (bad * scale < 0), std::string(variant.name) + ", infinite without a cap");
      }
}

void check_add(const Variant& variant) {
  for (int64_t n : {0, 1, 15, 16, 17, 1000}) {
    std::vector<float> total(n, 1.5f), part(n);
    std::vector<uint16_t> part16(n);
    for (int64_t i = 0; i < n; ++i) part[i] = static_cast<float>(i), part16[i] = to_bfloat16(part[i]);
    variant.float32.add(total.data(), part.data(), false, n);
    variant.bfloat16.add(total.data(), part16.data(), false, n);
    for (int64_t i = 0; i < n; ++i)
      expect(total[i] == 1.5f + part[i] + from_bfloat16(part16[i]), std::string(variant.name) + ": add");
    variant.bfloat16.add(total.data(), part16.data(), true, n);
    for (int64_t i = 0; i < n; ++i) expect(total[i] == from_bfloat16(part16[i]), std::string(variant.name) + ": first");
    variant.float32.scale(part.data(), 0.3f, total.data(), n);
    std::vector<float> same(n);
    std::vector<uint16_t> same16(n);
    variant.float32.rescale(part.data(), 0.3f, same.data(), n);
    variant.bfloat16.rescale(part16.data(), 0.3f, same16.data(), n);
    const auto was = part16;
    variant.bfloat16.scale(part.data(), 0.3f, part16.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const float wanted = part[i] * 0.3f, miss = std::fabs(from_bfloat16(part16[i]) - wanted);
      expect(total[i] == wanted && miss <= wanted / 256, std::string(variant.name) + ": scale");  // to the nearest
      const float wanted16 = from_bfloat16(was[i]) * 0.3f;
      expect(same[i] == wanted && std::fabs(from_bfloat16(same16[i]) - wanted16) <= wanted16 / 256,
             std::string(variant.name) + ": scale, of its own type");
    }
  }
}

void check_scratch() {
  void* small = take_scratch(1000);
  void* large = take_scratch(5 << 20);
  expect(small != large && reinterpret_cast<uintptr_t>(large) % 64 == 0, "scratch is aligned");
  static_cast<char*>(large)[(5 << 20) - 1] = 1;
  return_scratch(small);
  expect(kept_scratch() == size_t{2} << 20, "what comes back is kept");
  return_scratch(large);
  expect(kept_scratch() == size_t{8} << 20, "and so is another");
  expect(take_scratch(1000) == small && kept_scratch() == size_t{6} << 20, "the one that fits best is given out again");
  void* tiny = take_scratch(1000);
  expect(tiny != large && kept_scratch() == size_t{6} << 20, "a small one does not take a large block");
  return_scratch(tiny);
  return_scratch(small);
  expect(kept_scratch() == size_t{10} << 20, "nor drives it out");
  expect(take_scratch(4 << 20) == large && kept_scratch() == size_t{4} << 20, "which serves what is half of it");
  return_scratch(large);
  return_scratch(take_scratch(9 << 20));
  expect(kept_scratch() == size_t{18} << 20, "a larger one takes the place of the smallest");
  release_scratch();
  expect(kept_scratch() == 0, "nothing is kept when it is released");
  std::vector<std::thread> pool;
  for (int t = 0; t < 8; ++t)
    pool.emplace_back([] {
      for (int i = 0; i < 100; ++i) {
        char* memory = static_cast<char*>(take_scratch(1000));
        memory[0] = 1;
        return_scratch(memory);
      }
    });
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

int main() {
  check_scratch();
  check_functions();
  int run_here = 0;
  for (const Variant& variant : variants()) {
    if (!variant.runs_here()) {
      std::printf("%s: not on this processor\n", variant.name);
      continue;
    }
    check_everything(variant);
    check_blocks_apart(variant);
    check_certain_label(variant);
    check_values_that_are_not_finite(variant);
    check_infinite_logits(variant);
    check_add(variant);
    std::printf("%s: checked\n", variant.name);
    ++run_here;
  }
  expect(run_here > 0, "no variant runs here");
  expect(find_variant("portable") != nullptr && find_variant("abacus") == nullptr, "variants by name");
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
