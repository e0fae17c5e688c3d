// RMSNorm and the gated product without Python: every variant that runs here against plain float64 formulas, for widths
// around the vector and block lengths, no rows, sums over more rows than one part has, and values that are not finite.

#include "expect.h"
#include "lean.h"

#include <cmath>
#include <limits>
#include <random>
#include <thread>

#define TRACT_FAST_VARIANT testing  // the kernels' own functions, compiled for any processor
#include "row_pass_kernels.h"
#include "lean_kernels.h"

using namespace tract_fast;

namespace {

// Numbers of either type, exactly as long as they may be read or written: sanitizers see one too many.
struct Values {
  Type type;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Values(Type t, int64_t n, float fill = -7.0f) : type(t) {
    if (type == Type::float32) wide.assign(n, fill);
    else narrow.assign(n, to_bfloat16(fill));
  }
  static Values drawn(Type t, int64_t n, unsigned seed, float scale = 1.0f) {
    Values v(t, n);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) v.set(i, scale * normal(random));
    return v;
  }
  void set(int64_t i, float x) {
    if (type == Type::float32) wide[i] = x;
    else narrow[i] = to_bfloat16(x);
  }
  double operator[](int64_t i) const { return type == Type::float32 ? wide[i] : from_bfloat16(narrow[i]); }
  void* data() { return type == Type::float32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  bool operator==(const Values&) const = default;
};

// As near as rounding to the type allows; `scale` is that of what was added up.
void expect_near(const Values& got, int64_t i, double want, double scale, const std::string& what) {
  const double step = got.type == Type::float32 ? 1e-6 : 1.0 / 256;
  const double bound = step * std::fabs(want) + 2e-6 * scale + 1e-37;
  expect(std::fabs(got[i] - want) <= bound,
         what + " " + std::to_string(i) + ": " + std::to_string(got[i]) + ", not " + std::to_string(want));
}

const auto on_threads = [](int64_t count, const auto& body) {
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < 3; ++part)
    threads.emplace_back([&, part] { body(count * part / 3, count * (part + 1) / 3); });
  for (std::thread& thread : threads) thread.join();
};
const auto at_once = [](int64_t count, const auto& body) { body(int64_t{0}, count); };

void check_norm(const Variant& variant, Type type, int64_t n, int64_t width, float offset) {
  const std::string where = std::string(variant.name) + " norm " + std::to_string(n) + " x " + std::to_string(width);
  const LeanKernels& k = variant.lean(type);
  Values x = Values::drawn(type, n * width, 1, 3.0f), dy = Values::drawn(type, n * width, 2);
  Values w = Values::drawn(type, width, 3), y(type, n * width), dx(type, n * width), dw(type, width);
  std::vector<float> weight(width), r(n);
  k.widen(w.data(), offset, weight.data(), width);
  const double eps = 1e-5;
  Norm p{x.data(), weight.data(), r.data(), width, eps, y.data(), dy.data(), dx.data()};
  k.norm(p, 0, n);
  norm_backward(p, n, dw.data(), k, k, at_once);
  std::vector<double> sums(width), sizes(width);
  for (int64_t row = 0; row < n; ++row) {
    double squares = 0, along = 0, size = 0;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      squares += x[at] * x[at];
      along += dy[at] * weight[i] * x[at];
      size += std::fabs(dy[at] * weight[i] * x[at]);
    }
    const double inverse = 1.0 / std::sqrt(squares / width + eps);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      expect_near(y, at, x[at] * inverse * weight[i], 0.0, where + " y");
      const double g = dy[at] * weight[i], back = x[at] * inverse * inverse / width;
      expect_near(dx, at, inverse * (g - back * along), inverse * (std::fabs(g) + std::fabs(back) * size), where + " dx");
      sums[i] += dy[at] * x[at] * inverse;
      sizes[i] += std::fabs(dy[at] * x[at] * inverse);
    }
  }
  for (int64_t i = 0; i < width; ++i) expect_near(dw, i, sums[i], sizes[i], where + " dw");
  Values again(type, width), only(type, width), none(type, n * width);
  norm_backward(p, n, again.data(), k, k, on_threads);
  expect(again == dw, where + ": dw depends on the threads");
  p.dx = nullptr;
  norm_backward(p, n, only.data(), k, k, on_threads);
  expect(only == dw, where + ": dw depends on dx");
  p.dx = none.data();
  norm_backward(p, n, nullptr, k, k, on_threads);
  expect(none == dx, where + ": dx depends on dw");
}

double cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

struct Exact {
  double value, slope;
};
Exact exact(Activation activation, double x) {
  if (activation == Activation::silu) {
    const double s = 1 / (1 + std::exp(-x));
    return {x * s, s * (1 + x * (1 - s))};
  }
  if (activation == Activation::gelu)
    return {x * cdf(x), cdf(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI)};
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (x + 0.044715 * x * x * x));
  return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)};
}

void check_gated(const Variant& variant, Type type, int64_t n, Activation activation) {
  const std::string where = std::string(variant.name) + " gated " + std::to_string(static_cast<int>(activation)) + " of " +
                            std::to_string(n);
  const LeanKernels& k = variant.lean(type);
  Values gate = Values::drawn(type, n, 4, 4.0f), up = Values::drawn(type, n, 5), dy = Values::drawn(type, n, 6);
  for (int64_t i = 0; i < std::min<int64_t>(n, 9); ++i) gate.set(i, 30.0f * (i - 4));  // far on both sides
  Values y(type, n), dgate(type, n), dup(type, n);
  const Gated p{gate.data(), up.data(), dy.data(), y.data(), dgate.data(), dup.data(), activation};
  k.gated(p, 0, n);
  k.gated_backward(p, 0, n);
  for (int64_t i = 0; i < n; ++i) {
    const Exact act = exact(activation, gate[i]);
    const double small = std::min(std::fabs(gate[i]), 1.0);
    expect_near(y, i, act.value * up[i], small * std::fabs(up[i]), where + " y");
    expect_near(dup, i, act.value * dy[i], small * std::fabs(dy[i]), where + " dup");
    expect_near(dgate, i, act.slope * dy[i] * up[i], std::fabs(dy[i] * up[i]), where + " dgate");
  }
}

void check_nan(const Variant& variant) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (Type type : {Type::float32, Type::bfloat16}) {
    const LeanKernels& k = variant.lean(type);
    Values x = Values::drawn(type, 2 * 40, 7), y(type, 2 * 40), dx(type, 2 * 40);
    x.set(3, nan);
    if (type == Type::bfloat16) x.narrow[3] = 0x7fc0u;
    std::vector<float> weight(40, 1.0f), r(2);
    const Norm p{x.data(), weight.data(), r.data(), 40, 1e-5, y.data(), x.data(), dx.data()};
    k.norm(p, 0, 2);
    k.norm_backward(p, 0, 2, nullptr);
    for (int64_t i = 0; i < 80; ++i)
      expect(std::isnan(y[i]) == (i < 40) && std::isnan(dx[i]) == (i < 40), "a NaN fills its row, and no other");
    for (Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
      const Gated g{x.data(), x.data(), x.data(), y.data(), dx.data(), dx.data(), activation};
      k.gated(g, 0, 80);
      for (int64_t i = 0; i < 80; ++i) expect(std::isnan(y[i]) == (i == 3), "a NaN stays where it is");
    }
  }
}

void check_cdf() {
  for (double x = -5.2; x < 9; x += 0.001) {
    const double error = std::fabs(testing::normal_cdf(static_cast<float>(x)) / cdf(static_cast<float>(x)) - 1);
    expect(error < (x < -2 ? 2e-6 : 6e-7), "cdf of " + std::to_string(x) + " is off by " + std::to_string(error * 1e6) + "e-6");
  }
}

}  // namespace

int main() {
  check_cdf();
  for (const Variant& variant : variants()) {
    if (!variant.runs_here()) continue;
    for (Type type : {Type::float32, Type::bfloat16}) {
      for (int64_t width : {1, 7, 16, 33, 576, 1024, 1500}) check_norm(variant, type, 5, width, width % 2 ? 1.0f : 0.0f);
      check_norm(variant, type, 0, 8, 0.0f);
      check_norm(variant, type, 200, 31, 0.0f);
      check_norm(variant, type, SUM_ROWS * MOST_PARTS + 77, 5, 1.0f);
      for (Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh})
        for (int64_t n : {0, 1, 31, 1024, 3000}) check_gated(variant, type, n, activation);
    }
    check_nan(variant);
    std::printf("%s: done\n", variant.name);
  }
  std::printf(failures == 0 ? "lean: all passed\n" : "lean: %d failures\n", failures);
  return failures != 0;
}
