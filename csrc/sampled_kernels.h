// The kernels of sampled.h, for the instruction set that this is compiled for: included after row_pass_kernels.h.

#include "sampled.h"

namespace tract_fast::TRACT_FAST_VARIANT {
namespace {

constexpr int64_t GROUP = 64;          // columns that are skipped at once where nothing is listed
constexpr uint32_t FEW = 1u << 25;     // f_j below it in a whole group cannot overflow its sum
constexpr float LOWEST = -21.487562f;  // -31 ln 2: f_j is 1 there and below
constexpr float PER_NAT = 12102203.0f;  // 2^23 / ln 2

// f_j for z - shift = a: 2^31 e^a, a power of two interpolated linearly, so at least e^a and at most 6.2% more; KEPT from
// 0 on, 0 at -inf (what is taken out, and what has no probability). Multiplying and truncating are one rounding each and the rest is integers: no compiler has a choice.
inline uint32_t proposal(float a) {
  const float bounded = a < LOWEST ? LOWEST : a;
  int32_t steps = static_cast<int32_t>((bounded < 0.0f ? bounded : -0.0f) * PER_NAT);
  steps = steps < -1 ? steps : -1;  // 2^31 itself does not fit
  const float f = __builtin_bit_cast(float, steps + (158 << 23));
  const uint32_t whole = static_cast<uint32_t>(static_cast<int32_t>(f));
  const uint32_t drawn = a == NOTHING ? 0u : whole;
  return a < 0.0f ? drawn : KEPT;
}

// Of n <= BLOCK logits. The shift goes off before the factor, so that no compiler makes one operation of the two.
template <class T>
inline void proposals(const RowPass& p, float factor, const T* raw, int64_t column, int64_t n, float shift,
                      uint32_t* f) {
  if (is_plain(p)) {
    const float before = shift / factor;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      f[i] = proposal(((is_out(raw[i]) ? NOTHING : widen(raw[i])) - before) * factor);
    return;
  }
  alignas(64) float z[BLOCK];
  transform(p, factor, raw, column, n, z, nullptr);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) f[i] = proposal(z[i] - shift);
}

template <class T>
int64_t longest(const RowPass& p, float shift, int64_t row) {
  alignas(64) uint32_t f[BLOCK];
  const float factor = factor_of(p, row);
  uint64_t sum = 0;
  int64_t kept = 0;
  for (int64_t begin = 0; begin < p.n_vocab; begin += BLOCK) {
    const int64_t n = p.n_vocab - begin < BLOCK ? p.n_vocab - begin : BLOCK;
    proposals(p, factor, row_of<T>(p, row) + begin, begin, n, shift, f);
    for (int64_t group = 0; group < n; group += GROUP) {
      const int64_t end = n - group < GROUP ? n : group + GROUP;
      uint32_t certain = 0, low = 0, high = 0;  // halves, whose sums over a group fit 32 bits
#pragma omp simd reduction(+ : certain, low, high)
      for (int64_t i = group; i < end; ++i) {
        const uint32_t counted = f[i] == KEPT ? 0u : f[i];
        certain += f[i] == KEPT;
        low += counted & 0xffffu;
        high += counted >> 16;
      }
      kept += certain;
      sum += (uint64_t{high} << 16) + low;
    }
  }
  return kept + static_cast<int64_t>(sum >> 31) + 1;
}

// Lists columns from `columns[count]` on; returns how many there are then, or -1 where they are more than `most`.
template <class T>
int64_t draw(const RowPass& p, float shift, uint32_t start, int64_t row, int32_t* columns, float* ratios, int64_t most) {
  alignas(64) uint32_t f[GROUP];
  const T* logits = row_of<T>(p, row);
  const bool plain = is_plain(p);
  const float factor = factor_of(p, row), before = shift / factor;
  uint32_t sum = start;
  int64_t count = 0;
  for (int64_t begin = 0; begin < p.n_vocab; begin += GROUP) {
    const int64_t n = p.n_vocab - begin < GROUP ? p.n_vocab - begin : GROUP;
    uint32_t any = 0, total = 0;
    if (plain && n == GROUP) {  // in registers: most groups are read here and nowhere else
#pragma omp simd reduction(| : any) reduction(+ : total)
      for (int64_t i = 0; i < GROUP; ++i) {
        const T raw = logits[begin + i];
        const uint32_t one = proposal(((is_out(raw) ? NOTHING : widen(raw)) - before) * factor);
        any |= one;
        total += one;
      }
    } else {
      proposals(p, factor, logits + begin, begin, n, shift, f);
#pragma omp simd reduction(| : any) reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) {
        any |= f[i];
        total += f[i];
      }
    }
    if (any < FEW && ((sum ^ (sum + total)) >> 31) == 0) {
      sum += total;
      continue;
    }
    if (plain && n == GROUP) proposals(p, factor, logits + begin, begin, n, shift, f);
    for (int64_t i = 0; i < n; ++i) {
      const bool kept = f[i] == KEPT;
      const uint32_t next = kept ? sum : sum + f[i];
      const bool crossed = ((sum ^ next) >> 31) != 0;
      sum = next;
      if (!(kept || crossed) || is_out(logits[begin + i])) continue;
      if (count == most) return -1;
      columns[count] = static_cast<int32_t>(begin + i);
      ratios[count++] = kept ? 1.0f : 2147483648.0f / static_cast<float>(f[i]);
    }
  }
  return count;
}

template <class T>
Products products(const void* x_row, const void* w_row, int64_t n) {
  const T *x = static_cast<const T*>(x_row), *w = static_cast<const T*>(w_row);
  float xw = 0.0f, ww = 0.0f;
#pragma omp simd reduction(+ : xw, ww)
  for (int64_t i = 0; i < n; ++i) {
    xw += widen(x[i]) * widen(w[i]);
    ww += widen(w[i]) * widen(w[i]);
  }
  return {xw, ww};
}

template <class T>
void axpy(float* total, float factor, const void* row, int64_t n) {
  const T* x = static_cast<const T*>(row);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] += factor * widen(x[i]);
}

template <class T>
void store(const float* from, void* to, int64_t n) {
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(from[i]);
}

template <class T>
Capped capped_at(const RowPass& p, int64_t row, int64_t column) {
  float z, slope = p.logit_scale;
  transform(p, factor_of(p, row), row_of<T>(p, row) + column, column, 1, &z, &slope);
  return {z, slope};
}

template <class T>
constexpr SampledKernels sampled_kernels_of() {
  return {longest<T>, draw<T>, products<T>, axpy<T>, store<T>, capped_at<T>};
}

}  // namespace

extern const SampledKernels sampled_float32, sampled_bfloat16;
const SampledKernels sampled_float32 = sampled_kernels_of<float>();
const SampledKernels sampled_bfloat16 = sampled_kernels_of<bfloat16>();

}  // namespace tract_fast::TRACT_FAST_VARIANT
