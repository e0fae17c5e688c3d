// The kernels of row_pass.h for the instruction set that this is compiled for: the passes over plain logits in registers,
// the rest as plain loops that compilers vectorise.
// Included once by every file in variants/, which names its namespace in TRACT_FAST_VARIANT. No templates of std:: here:
// the linker keeps one copy of each, which might be the one for a processor that this is not.

#include <cfloat>
#include <limits>

#include "registers.h"
#include "row_pass.h"

namespace tract_fast::TRACT_FAST_VARIANT {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// What take_out() writes where bias, scale or cap follow: quiet NaNs with a payload of their own, compared as integers. A
// NaN that arithmetic makes has none, so that it is not mistaken for them, and -inf is a logit like any other. Where none
// of them follows (is_plain), -inf is written: it has no probability, and need not be asked for.
constexpr uint32_t OUT = 0x7fde0000u;
inline bool is_out(float x) { return __builtin_bit_cast(uint32_t, x) == OUT; }
inline bool is_out(bfloat16 x) { return x == OUT >> 16; }
template <class T>
inline T out();
template <>
inline float out<float>() {
  return __builtin_bit_cast(float, OUT);
}
template <>
inline bfloat16 out<bfloat16>() {
  return OUT >> 16;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  return static_cast<bfloat16>(narrowed(x));
}

// n floats as T. Those that are T already stand where they belong: see place_for.
inline void narrow_all(const float*, float*, int64_t) {}
inline void narrow_all(const float* from, bfloat16* to, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 32 <= n; i += 32) {  // one instruction, which takes denormal numbers for 0
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    _mm512_storeu_si512(to + i, __builtin_bit_cast(__m512i, both));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) to[j] = narrow<bfloat16>(from[j]);
}
inline float* place_for(float* out, float*) { return out; }
inline float* place_for(bfloat16*, float* buffer) { return buffer; }

// e^x for x <= 80 (a NaN stays one), of a float or of Floats, as exact as sums over logits of type T need it: those in
// bfloat16 are off by up to 2^-9 of themselves. e^x = 2^n e^r, |r| <= ln(2) / 2, n in the low bits of a sum with 1.5 * 2^23;
// below -88 n is -127, whose power of two is 0 in bits: no branch, or compilers would not vectorise what uses this. The
// polynomials have the least largest relative error of those with a constant of 1: 2e-9 of degree 6, 3e-6 of degree 4.
template <class T, class F>
inline F exp_of(F x) {
  constexpr float PER_OCTAVE = 1.44269504f, TO_INTEGER = 12582912.0f;
  x = larger(F{} - 88.0f, x);
  const F shifted = x * PER_OCTAVE + TO_INTEGER, n = shifted - TO_INTEGER;
  F r, p;
  if constexpr (sizeof(T) == 4) {
    r = x - n * 0.693359375f + n * 2.12194440e-4f;  // Cody and Waite: the first product is exact
    p = r * 1.3843217e-3f + 8.374207e-3f;
    p = p * r + 4.1668016e-2f;
    p = p * r + 1.666643e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * r + 1.0f;
  } else {
    r = x - n * 0.693147181f;
    p = r * 4.151368e-2f + 1.6787592e-1f;
    p = p * r + 5.000302e-1f;
    p = p * r + 9.999668e-1f;
  }
  return (p * r + 1.0f) * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}
template <class F>
inline F exp_bounded(F x) {
  return exp_of<float>(x);
}

// tanh(x) for x >= 0, given e = exp(-2 x). Below .625 the quotient cancels: there the polynomial of Cephes' tanhf.
inline float tanh_positive(float x, float e) {
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x, far = (1.0f - e) / (1.0f + e);
  return x < 0.625f ? near : far;
}

inline bool is_plain(const RowPass& p) { return p.bias == nullptr && p.logit_scale == 1.0f && p.softcap == 0.0f; }

inline float factor_of(const RowPass& p, int64_t row) { return p.row_scale == nullptr ? 1.0f : p.row_scale[row]; }

// Capped logits of n <= BLOCK columns into z, -inf where they are taken out; their derivatives into slope, if asked for
// and there is a cap (it is logit_scale otherwise). `factor` is the row's.
template <class T>
inline void transform(const RowPass& p, float factor, const T* raw, int64_t column, int64_t n, float* z, float* slope) {
  if (is_plain(p)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = widen(raw[i]) * factor;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = widen(raw[i]) * factor;
  if (p.bias != nullptr) {
    const T* bias = static_cast<const T*>(p.bias) + column;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] += widen(bias[i]);
  }
  const float scale = p.logit_scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] *= scale;
  if (p.softcap != 0.0f) {
    const float cap = p.softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float x = (z[i] < 0.0f ? -z[i] : z[i]) / cap;
      const float e = exp_bounded(-2.0f * x);  // the slope by it does not cancel as 1 - tanh^2 would
      const float t = tanh_positive(x, e);
      z[i] = (z[i] < 0.0f ? -t : t) * cap;
      if (slope != nullptr) slope[i] = scale * 4.0f * e / ((1.0f + e) * (1.0f + e));
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = is_out(raw[i]) ? NOTHING : z[i];
}

template <class T>
T* row_of(const RowPass& p, int64_t row) {
  return static_cast<T*>(p.logits) + row * p.stride;
}

template <class T>
void take_out(const RowPass& p, int64_t row) {
  T* logits = row_of<T>(p, row);
  const T nothing = is_plain(p) ? narrow<T>(NOTHING) : out<T>();
  if (p.labels[row] >= 0) logits[p.labels[row]] = nothing;
  for (int64_t k = 0; k < p.n_tokens; ++k) logits[p.ids[k]] = nothing;
}

constexpr uintptr_t AHEAD = 4096;  // bytes: a page, where what processors ask for ahead by themselves ends

// `body` of n elements, PAIR at a time, those that are missing at the end as NOTHING. Those further on are asked for: logits
// that a product has just written are most often not in the caches of the core that reads them.
template <class T, class Body>
inline void over_pairs(const T* raw, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    const auto ahead = reinterpret_cast<uintptr_t>(raw + i) + AHEAD;  // may lie behind the last row: it is not read
    for (uintptr_t byte = 0; byte < PAIR * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte));
    body(load_pair(raw + i));
  }
  if (i == n) return;
  T last[PAIR];
  for (int64_t j = 0; j < PAIR; ++j) last[j] = i + j < n ? raw[i + j] : narrow<T>(NOTHING);
  body(load_pair(last));
}

// Adds n <= BLOCK logits z = raw * factor to the sums. They are taken relative to the largest of the blocks before, and
// again relative to their own largest where that is far above it: in the first block, most often.
template <class T>
inline void add_block(Sums& found, const T* raw, float factor, int64_t n) {
  constexpr float FAR = 40.0f;  // BLOCK e^40 is a float32
  float top = found.top, peak;
  Floats sum, other_sum;
  for (;;) {
    Floats largest = all_of(-FLT_MAX), other_largest = largest;
    sum = other_sum = Floats{};
    over_pairs(raw, n, [&](const Pair& two) {
      const Floats a = two.a * factor, b = two.b * factor;
      largest = larger(a, largest);
      other_largest = larger(b, other_largest);
      sum += exp_of<T>(a - top);
      other_sum += exp_of<T>(b - top);
    });
    peak = largest_of(larger(largest, other_largest));
    if (!(peak > top + FAR)) break;
    top = peak;
  }
  const float highest = larger(peak, top);
  const double now = exp_bounded(top - highest), before = exp_bounded(found.top - highest);
  found = {highest, found.others * before + sum_of(sum + other_sum) * now};
}

template <class T>
Sums sums(const RowPass& p, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float z[BLOCK];
  const T* logits = row_of<T>(p, row);
  const float factor = factor_of(p, row);
  Sums found{-FLT_MAX, 0.0};
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int64_t n = end - start < BLOCK ? end - start : BLOCK;
    if (is_plain(p)) {
      add_block(found, logits + start, factor, n);
    } else {
      transform(p, factor, logits + start, start, n, z, nullptr);
      add_block(found, z, 1.0f, n);
    }
  }
  return found;
}

// dZ of plain logits, in registers.
template <class T>
inline void write_plain(T* logits, float factor, float top, int64_t n) {
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    const Pair z = load_pair(logits + i);
    store_pair({factor * exp_of<T>(z.a - top), factor * exp_of<T>(z.b - top)}, logits + i);
  }
  for (; i < n; ++i) logits[i] = narrow<T>(factor * exp_of<T>(widen(logits[i]) - top));
}

template <class T>
void write(const RowPass& p, const Coefficients& c, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float z[BLOCK];
  alignas(64) float slope[BLOCK];
  T* logits = row_of<T>(p, row);
  if (!p.used[row]) {
    for (int64_t i = begin; i < end; ++i) logits[i] = narrow<T>(0.0f);
    return;
  }
  const float top = c.top, factor = c.factor * (p.softcap == 0.0f ? p.logit_scale : 1.0f);
  if (is_plain(p)) return write_plain(logits + begin, factor, top, end - begin);
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int64_t n = end - start < BLOCK ? end - start : BLOCK;
    T* out = logits + start;
    float* made = place_for(out, z);
    transform(p, 1.0f, out, start, n, z, slope);  // dZ is of exact logits alone
    if (p.softcap == 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) made[i] = factor * exp_bounded(z[i] - top);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) made[i] = factor * exp_bounded(z[i] - top) * slope[i];
    }
    narrow_all(made, out, n);
  }
}

template <class T>
void put_back(const RowPass& p, const Coefficients& c, const float* scores, int64_t row) {
  if (!p.used[row]) return;
  T* logits = row_of<T>(p, row);
  if (p.labels[row] >= 0) logits[p.labels[row]] = narrow<T>(c.label);
  for (int64_t k = 0; k < p.n_tokens; ++k) logits[p.ids[k]] = narrow<T>(scores[k]);
}

template <class T>
float bias_at(const void* bias, int64_t column) {
  return widen(static_cast<const T*>(bias)[column]);
}

template <class T>
void add(float* total, const void* part, bool first, int64_t n) {
  const T* summand = static_cast<const T*>(part);
  if (first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] = widen(summand[i]);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] += widen(summand[i]);
}

template <class T>
void scale(const float* from, float factor, void* to, int64_t n) {
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(from[i] * factor);
}
template <class T>
void rescale(const void* from, float factor, void* to, int64_t n) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(widen(in[i]) * factor);
}

template <class T>
constexpr Kernels kernels_of() {
  return {take_out<T>, sums<T>, write<T>, put_back<T>, bias_at<T>, add<T>, scale<T>, rescale<T>};
}

}  // namespace

extern const Kernels float32_kernels, bfloat16_kernels;
const Kernels float32_kernels = kernels_of<float>();
const Kernels bfloat16_kernels = kernels_of<bfloat16>();

}  // namespace tract_fast::TRACT_FAST_VARIANT
