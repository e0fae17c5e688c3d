// The sampled gradient's products and sums of rows, its 8-bit rows and dW, against plain loops.

#include "sampled.h"

#include "expect.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>

using namespace tract_fast;

namespace {

// Products and sums of rows against plain loops, for widths around those of registers, rows further apart than wide.
void check_rows(const Variant& variant) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  const int64_t n = 4;
  for (const int64_t width : {0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 513, 1000})
    for (const int64_t count : {0, 1, 2, 6, 7, 9})
      for (const bool wide : {true, false}) {
        const int64_t stride = width + 3;
        std::vector<float> w, x, values;
        std::vector<int32_t> index;
        const auto draw = [&] { return from_bfloat16(to_bfloat16(normal(random))); };  // the same in both types
        for (int64_t i = 0; i < (n - 1) * stride + width; ++i) w.push_back(draw());
        for (int64_t i = 0; i < width; ++i) x.push_back(draw());
        for (int64_t i = 0; i < count; ++i) index.push_back(random() % n), values.push_back(normal(random));
        const auto w16 = in_bfloat16(w), x16 = in_bfloat16(x);
        const void *const all = wide ? static_cast<const void*>(w.data()) : w16.data(),
                   *const one = wide ? static_cast<const void*>(x.data()) : x16.data();
        const SampledKernels& s = variant.sampled(wide ? Type::float32 : Type::bfloat16);
        const std::string name = std::string(variant.name) + (wide ? " float32" : " bfloat16") + ", width " + std::to_string(width);
        std::vector<float> dots(count + 1, -7.0f);
        s.dots(one, {all, stride, width, index.data(), count}, dots.data());
        for (int64_t i = 0; i < count; ++i) {
          double xw = 0, size = 0;
          for (int64_t d = 0; d < width; ++d) {
            const double product = double{x[d]} * w[index[i] * stride + d];
            xw += product, size += std::fabs(product);
          }
          float alone;
          s.dots(one, {all, stride, width, &index[i], 1}, &alone);
          expect(std::fabs(dots[i] - xw) <= 2e-6 * size && alone == dots[i], name + ": dot product");
        }
        expect(dots[count] == -7.0f, name + ": no further");
        const bool more = count % 2 == 1;  // to what add_rows has left, half of the first row
        const float half = 0.5f;
        const int32_t none = 0;
        std::vector<float> sum(width + 1, -7.0f), before(width + 1, -7.0f);
        s.add_rows({{all, stride, width, &none, 1}, &half, 1.0f}, before.data());
        s.add_rows({{all, stride, width, &none, 1}, &half, 2.0f, before.data(), -1.0f}, before.data());
        expect(before[width] == -7.0f, name + ": no further");
        std::vector<uint16_t> sum16(width + 1, to_bfloat16(-7.0f));
        const float norm = s.sum_rows({{all, stride, width, index.data(), count}, values.data(), 0.3f,
                                       more ? before.data() : nullptr, 0.2f},
                                      wide ? static_cast<void*>(sum.data()) : sum16.data());
        if (!wide)
          for (int64_t d = 0; d <= width; ++d) sum[d] = from_bfloat16(sum16[d]);
        double squares = 0, sizes = 0;
        for (int64_t d = 0; d < width; ++d) {
          double wanted = more ? 0.2 * 0.5 * w[d] : 0.0, largest = std::fabs(wanted);
          for (int64_t i = 0; i < count; ++i) {
            const double summand = double{values[i]} * 0.3 * w[index[i] * stride + d];
            wanted += summand, largest += std::fabs(summand);
          }
          expect(std::fabs(sum[d] - wanted) <= 1e-6 * largest + (wide ? 0 : std::fabs(wanted) / 256), name + ": sum");
          squares += wanted * wanted, sizes += largest * largest;
        }
        expect(sum[width] == -7.0f && std::fabs(norm - squares) <= 1e-5 * sizes, name + ": squared norm, and no further");
      }
}

// Rows in 8 bits: each code nearest to its element, the whole range used; zeros, the smallest and the largest numbers, and
// what is not finite.
void check_codes(const Variant& variant) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t n : {1, 3, 15, 16, 17, 64, 100, 1000})
    for (const float size : {1.0f, 0.0f, 1e-37f, 1e38f, inf, nan})
      for (const bool wide : {true, false}) {
        std::vector<float> row;
        for (int64_t i = 0; i < n; ++i) row.push_back(from_bfloat16(to_bfloat16(0.2f * std::clamp(normal(random), -4.0f, 4.0f))));
        for (float& x : row) x = from_bfloat16(to_bfloat16(std::isfinite(size) ? x * size : x));
        if (!std::isfinite(size)) row[random() % n] = size;
        const auto row16 = in_bfloat16(row);
        std::vector<int8_t> codes(n + 1, -7);
        const SampledKernels& s = variant.sampled(wide ? Type::float32 : Type::bfloat16);
        const float scale = s.quantize(wide ? static_cast<const void*>(row.data()) : row16.data(), n, codes.data());
        const std::string name = std::string(variant.name) + (wide ? " float32" : " bfloat16") + ", codes of " + std::to_string(size);
        expect(codes[n] == -7, name + ": no further");
        if (!std::isfinite(size)) {
          expect(std::isnan(scale) && std::count(codes.begin(), codes.end(), 0) == n, name + ": zeros and a NaN");
          continue;
        }
        int most = 0;
        for (int64_t i = 0; i < n; ++i) {
          most = std::max(most, std::abs(codes[i]));
          expect(std::fabs(double{row[i]} - codes[i] * double{scale}) <= 0.5001 * scale, name + ": nearest");
        }
        expect(scale > 0 && (size < 1e-30f || most == 127), name + ": all of the range");
      }
}

void check_weight(const Variant& variant) {
  const int64_t n = 3, most = 4, v = 6, width = 5;
  const std::vector<int32_t> columns{5, 0, 2, 9, 0, 9, 9, 9, 2, 5, 0, 1}, counts{3, 1, 4};
  const std::vector<float> values{1, 2, 3, 9, 4, 9, 9, 9, 5, 6, 7, 8};
  std::vector<float> x, dw(v * width, -1.0f), db(v, -1.0f);
  for (int64_t i = 0; i < n * width; ++i) x.push_back(0.1f * i - 0.4f);
  const auto by_one = [](int64_t n, auto&& body) {  // parts in an order that no thread promises
    for (int64_t i = n; i > 0; --i) body(i - 1, i);
  };
  const Transposed t = transpose(columns.data(), counts.data(), values.data(), n, most, v, 1, by_one);
  for (const int64_t threads : {2, 3, 99}) {
    const Transposed parts = transpose(columns.data(), counts.data(), values.data(), n, most, v, threads, by_one);
    expect(parts.first == t.first && parts.rows == t.rows && parts.values == t.values, "transposed in parts");
  }
  sampled_weight(t, x.data(), width, width, 2.0f, dw.data(), db.data(), 0, 4, variant, Type::float32);
  sampled_weight(t, x.data(), width, width, 2.0f, dw.data(), db.data(), 4, v, variant, Type::float32);
  for (int64_t j = 0; j < v; ++j) {
    double sum = 0;
    std::vector<double> row(width);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t e = 0; e < counts[i]; ++e)
        if (columns[i * most + e] == j) {
          sum += 2.0 * values[i * most + e];
          for (int64_t d = 0; d < width; ++d) row[d] += 2.0 * values[i * most + e] * x[i * width + d];
        }
    expect(db[j] == static_cast<float>(sum), "db");
    for (int64_t d = 0; d < width; ++d) expect(std::fabs(dw[j * width + d] - row[d]) < 1e-5, "dW");
  }
}

}  // namespace

int main() {
  for (const Variant& variant : variants()) {
    if (!variant.runs_here()) continue;
    check_rows(variant);
    check_codes(variant);
    check_weight(variant);
    std::printf("%s: done\n", variant.name);
  }
  std::printf(failures == 0 ? "products: all passed\n" : "products: %d failures\n", failures);
  return failures != 0;
}
