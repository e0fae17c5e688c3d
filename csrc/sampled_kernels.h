// The kernels of sampled.h, for the instruction set that this is compiled for: included after row_pass_kernels.h.

#include "sampled.h"

namespace tract_fast::TRACT_FAST_VARIANT {
namespace {

constexpr int64_t GROUP = 64;             // columns that are skipped at once where nothing is listed
constexpr float LOWEST = -21.487562f;     // -31 ln 2: f_j is 1 there and below
constexpr float PER_NAT = 12102203.0f;    // 2^23 / ln 2
constexpr float HIGHEST = -9e-8f;         // -1 / PER_NAT and a little: 2^31 itself does not fit

// f_j for z - shift = a: 2^31 e^a, a power of two interpolated linearly, so at least e^a and at most 6.2% more; KEPT from
// 0 on, 0 at -inf (what is taken out, and what has no probability) and of a NaN. Multiplying and truncating are one
// rounding each and the rest is integers: no compiler has a choice.
inline Floats unrounded(Floats a) {
  const Floats bounded = smaller(larger(a, all_of(LOWEST)), all_of(HIGHEST));
  return __builtin_bit_cast(Floats, __builtin_convertvector(bounded * PER_NAT, Ints) + (158 << 23));
}
inline Words drawn(Floats a, Floats f) {
  return __builtin_bit_cast(Words, __builtin_convertvector(f, Ints) & (a > NOTHING));
}
inline Words proposal(Floats a) { return drawn(a, unrounded(a)) | __builtin_bit_cast(Words, a >= 0.0f); }

// `body(begin, raw, before, factor)` of GROUP columns at a time: z - shift is (raw - before) * factor. Plain ones are read
// where they are; others, and those that are missing at the end, as NOTHING, from a buffer. The shift goes off before the
// factor, so that no compiler makes one operation of the two. Ends where `body` returns false.
template <class T, class Body>
inline void over_groups(const RowPass& p, float shift, int64_t row, const Body& body) {
  alignas(64) float z[GROUP];
  const T* logits = row_of<T>(p, row);
  const bool plain = is_plain(p);
  const float factor = factor_of(p, row), before = shift / factor;
  for (int64_t begin = 0; begin < p.n_vocab; begin += GROUP) {
    const int64_t n = p.n_vocab - begin < GROUP ? p.n_vocab - begin : GROUP;
    if (plain && n == GROUP) {
      if (!body(begin, logits + begin, before, factor)) return;
      continue;
    }
    transform(p, plain ? 1.0f : factor, logits + begin, begin, n, z, nullptr);  // the factor goes on once
    for (int64_t i = n; i < GROUP; ++i) z[i] = NOTHING;
    if (!body(begin, z, plain ? before : shift, plain ? factor : 1.0f)) return;
  }
}

template <class T>
int64_t longest(const RowPass& p, float shift, int64_t row) {
  uint64_t sum = 0;
  int64_t kept = 0;
  over_groups<T>(p, shift, row, [&](int64_t, const auto* raw, float before, float factor) {
    Words certain{}, low{}, high{};  // halves, whose sums over a group fit 32 bits
    for (int64_t i = 0; i < GROUP; i += LANES) {
      const Words f = proposal((load(raw + i) - before) * factor), is_kept = __builtin_bit_cast(Words, f == KEPT);
      certain -= is_kept;
      low += f & ~is_kept & 0xffffu;
      high += (f & ~is_kept) >> 16;
    }
    kept += sum_of(certain);
    sum += (uint64_t{sum_of(high)} << 16) + sum_of(low);
    return true;
  });
  return kept + static_cast<int64_t>(sum >> 31) + 1;
}

// Whether a group lists nothing, from where `sum` stands; then it is added to it. Below 2^31 it passes one multiple at most,
// which the sum's highest bit shows; from there on, and so where a column is listed for certain, it is not skipped.
template <class T>
inline bool skips(const T* raw, float before, float factor, uint32_t& sum) {
  constexpr float ONE = 2147483648.0f;
  Words total{};
  Floats size{};
  for (int64_t i = 0; i < GROUP; i += PAIR) {
    const Pair two = load_pair(raw + i);
    const Floats a = (two.a - before) * factor, b = (two.b - before) * factor, first = unrounded(a), second = unrounded(b);
    total += drawn(a, first) + drawn(b, second);
    size += first + second;
  }
  const uint32_t next = sum + sum_of(total);
  if (((sum ^ next) >> 31) != 0) return false;
  constexpr float NEAR = 0.999f * ONE;  // the sums of float32 may have been rounded down
  const bool may_be_large = high_bits(__builtin_bit_cast(Words, size >= NEAR / LANES)) != 0;
  if (may_be_large && sum_of(size) >= NEAR) return false;
  sum = next;
  return true;
}

// Lists columns; returns how many, or -1 where they are more than `most`.
template <class T>
int64_t draw(const RowPass& p, float shift, uint32_t start, int64_t row, int32_t* columns, float* ratios, int64_t most) {
  alignas(64) uint32_t f[GROUP];
  uint32_t sum = start;
  int64_t count = 0;
  over_groups<T>(p, shift, row, [&](int64_t begin, const auto* raw, float before, float factor) {
    if (skips(raw, before, factor, sum)) return true;
    uint64_t listed = 0;
    for (int64_t i = 0; i < GROUP; i += LANES) {
      const Words here = proposal((load(raw + i) - before) * factor), kept = __builtin_bit_cast(Words, here == KEPT);
      const Words added = here & ~kept, from_here = running_sum(added), after = sum + from_here;
      sum += from_here[LANES - 1];
      listed |= uint64_t{high_bits((after ^ (after - added)) | kept)} << i;
      __builtin_memcpy(f + i, &here, sizeof here);
    }
    for (; listed != 0; listed &= listed - 1) {
      if (count == most) {
        count = -1;
        return false;
      }
      const int i = __builtin_ctzll(listed);
      columns[count] = static_cast<int32_t>(begin + i);
      ratios[count++] = f[i] == KEPT ? 1.0f : 2147483648.0f / static_cast<float>(f[i]);
    }
    return true;
  });
  return count;
}

inline void exps(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Floats e = exp_bounded(load(x + i));
    __builtin_memcpy(x + i, &e, sizeof e);
  }
  for (; i < n; ++i) x[i] = exp_bounded(x[i]);
}

// Dot products of x and ROWS rows of W at once, in the same order whatever ROWS is.
template <class T, int ROWS>
inline void dots_of(const T* x, const T* const* w, int64_t n, float* to) {
  int64_t i = 0;
  Pair sums[ROWS] = {};
#ifdef __AVX512BF16__  // the instruction is two fused multiply-adds, and takes denormal numbers for 0
  if constexpr (sizeof(T) == 2) {
    const auto halves = [](const T* from) { return __builtin_bit_cast(__m512bh, _mm512_loadu_si512(from)); };
    for (; i + 2 * PAIR <= n; i += 2 * PAIR) {
      const __m512bh first = halves(x + i), second = halves(x + i + PAIR);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r].a = _mm512_dpbf16_ps(sums[r].a, first, halves(w[r] + i));
        sums[r].b = _mm512_dpbf16_ps(sums[r].b, second, halves(w[r] + i + PAIR));
      }
    }
  }
#endif
  for (; i + PAIR <= n; i += PAIR) {
    const Pair xs = load_pair(x + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Pair ws = load_pair(w[r] + i);
      sums[r].a += xs.a * ws.a;
      sums[r].b += xs.b * ws.b;
    }
  }
  for (int r = 0; r < ROWS; ++r) to[r] = sum_of(sums[r].a + sums[r].b);
  for (; i < n; ++i)
    for (int r = 0; r < ROWS; ++r) to[r] += widen(x[i]) * widen(w[r][i]);
}

template <class T>
void dots(const void* one, const Rows& rows, float* to) {
  const T* x = static_cast<const T*>(one);
  const auto row = [&](int64_t i) { return static_cast<const T*>(rows.first) + rows.index[i] * rows.stride; };
  int64_t i = 0;
  for (; i + 4 <= rows.count; i += 4) {
    const T* const w[] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    dots_of<T, 4>(x, w, rows.width, to + i);
  }
  if (i + 2 <= rows.count) {
    const T* const w[] = {row(i), row(i + 1)};
    dots_of<T, 2>(x, w, rows.width, to + i);
    i += 2;
  }
  if (i < rows.count) {
    const T* const w[] = {row(i)};
    dots_of<T, 1>(x, w, rows.width, to + i);
  }
}

constexpr int MOST_PAIRS = LANES == 16 ? 8 : 4;

// As many blocks of PAIRS PAIR elements as there are from `begin` on; then of half as many. Returns where it ends.
template <class T, class Out, int PAIRS>
inline int64_t sum_blocks(const RowSum& s, int64_t begin, Out* to, float& norm) {
  for (; begin + PAIRS * PAIR <= s.rows.width; begin += PAIRS * PAIR) {
    Pair sums[PAIRS] = {};
    if (s.before != nullptr)
#pragma GCC unroll 8
      for (int j = 0; j < PAIRS; ++j) {
        const Pair two = load_pair(s.before + begin + j * PAIR);
        sums[j] = {s.times * two.a, s.times * two.b};
      }
    const T* rows = static_cast<const T*>(s.rows.first) + begin;
    for (int64_t i = 0; i < s.rows.count; ++i) {
      const T* row = rows + s.rows.index[i] * s.rows.stride;
      const float factor = s.values[i] * s.scale;
#pragma GCC unroll 8
      for (int j = 0; j < PAIRS; ++j) {
        const Pair two = load_pair(row + j * PAIR);
        sums[j].a += factor * two.a;
        sums[j].b += factor * two.b;
      }
    }
    Floats squares{};
#pragma GCC unroll 8
    for (int j = 0; j < PAIRS; ++j) {
      squares += sums[j].a * sums[j].a + sums[j].b * sums[j].b;
      store_pair(sums[j], to + begin + j * PAIR);
    }
    norm += sum_of(squares);
  }
  if constexpr (PAIRS > 1) return sum_blocks<T, Out, PAIRS / 2>(s, begin, to, norm);
  return begin;
}

template <class T, class Out>
float sum_rows(const RowSum& s, void* out) {
  float norm = 0.0f;
  Out* to = static_cast<Out*>(out);
  for (int64_t j = sum_blocks<T, Out, MOST_PAIRS>(s, 0, to, norm); j < s.rows.width; ++j) {
    float sum = s.before == nullptr ? 0.0f : s.times * s.before[j];
    for (int64_t i = 0; i < s.rows.count; ++i)
      sum += s.values[i] * s.scale * widen(static_cast<const T*>(s.rows.first)[s.rows.index[i] * s.rows.stride + j]);
    norm += sum * sum;
    to[j] = narrow<Out>(sum);
  }
  return norm;
}

template <class T>
void store(const float* from, void* to, int64_t n) {
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(from[i]);
}

// The bits of a magnitude, which have the order of magnitudes, a NaN last; to be scaled to a float's.
inline uint32_t magnitude(float x) { return to_bits(x) & 0x7fffffffu; }
inline uint16_t magnitude(bfloat16 x) { return x & 0x7fffu; }

template <class T>
float quantize(const void* from, int64_t n, int8_t* codes) {
  constexpr float LARGEST = 127.0f, SMALLEST = 1e-30f;  // of the scale: what is divided by it stays finite
  constexpr float TO_INTEGER = 12582912.0f;             // 1.5 * 2^23: the lowest bits of a sum with it, to nearest even
  const T* row = static_cast<const T*>(from);
  decltype(magnitude(T{})) largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const auto here = magnitude(row[i]);
    largest = here > largest ? here : largest;
  }
  const float size = from_bits(sizeof(T) == 2 ? uint32_t{largest} << 16 : uint32_t{largest});
  if (!(size <= FLT_MAX)) {
    __builtin_memset(codes, 0, static_cast<size_t>(n));
    return __builtin_nanf("");
  }
  const float scale = size == 0.0f ? 1.0f : larger(SMALLEST, size / LARGEST), by = 1.0f / scale;
  float products[BLOCK];  // in memory before they are rounded: no compiler makes one operation of the two
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t some = n - begin < BLOCK ? n - begin : BLOCK;
#pragma omp simd
    for (int64_t i = 0; i < some; ++i) products[i] = widen(row[begin + i]) * by;
#pragma omp simd
    for (int64_t i = 0; i < some; ++i) codes[begin + i] = static_cast<int8_t>(to_bits(products[i] + TO_INTEGER));
  }
  return scale;
}

template <class T>
void capped(const RowPass& p, int64_t row, const int32_t* columns, int64_t n, Capped* to) {
  const T* logits = row_of<T>(p, row);
  const float factor = factor_of(p, row);
  const bool plain = is_plain(p);
  for (int64_t i = 0; i < n; ++i) {
    float z, slope = p.logit_scale;
    if (plain)
      z = widen(logits[columns[i]]) * factor;
    else
      transform(p, factor, logits + columns[i], columns[i], 1, &z, &slope);
    to[i] = {z, slope};
  }
}

template <class T>
constexpr SampledKernels sampled_kernels_of() {
  return {longest<T>, draw<T>, exps, dots<T>, sum_rows<T, T>, sum_rows<T, float>, store<T>, quantize<T>,
          capped<T>};
}

}  // namespace

extern const SampledKernels sampled_float32, sampled_bfloat16;
const SampledKernels sampled_float32 = sampled_kernels_of<float>();
const SampledKernels sampled_bfloat16 = sampled_kernels_of<bfloat16>();

}  // namespace tract_fast::TRACT_FAST_VARIANT
