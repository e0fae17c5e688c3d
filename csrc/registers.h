// Vectors of the instruction set that this is compiled for, where loops are written out: a compiler turns limits of plain
// loops into comparisons and blends, and unrolls loops over rows so that sums leave the registers. GCC's and Clang's vector
// types; instructions by name only where those have none for it. Included by row_pass_kernels.h.

#include <cstdint>
#if defined(__AVX2__)
#pragma GCC diagnostic push  // GCC 12 warns of its own header (gcc.gnu.org/PR105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace tract_fast::TRACT_FAST_VARIANT {
namespace {

using bfloat16 = uint16_t;

#if defined(__AVX512DQ__) && defined(__AVX512BW__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// a > b ? a : b, so b where either is a NaN; a < b ? a : b; a bit for every lane's highest; lanes moved up by STEP, 0 where
// they were.
inline float larger(float a, float b) { return a > b ? a : b; }
#if defined(__AVX512DQ__) && defined(__AVX512BW__)
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline uint32_t high_bits(Words words) { return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, words)); }
template <int STEP>
inline Words moved_up(Words words) {
  return __builtin_bit_cast(
      Words, _mm512_alignr_epi32(__builtin_bit_cast(__m512i, words), _mm512_setzero_si512(), 16 - STEP));
}
#elif defined(__AVX2__)
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline uint32_t high_bits(Words words) {
  return static_cast<uint32_t>(_mm256_movemask_ps(__builtin_bit_cast(__m256, words)));
}
template <int STEP>
inline Words moved_up(Words words) {
  const __m256i all = __builtin_bit_cast(__m256i, words), low = _mm256_permute2x128_si256(all, all, 0x08);
  if constexpr (STEP == 4) return __builtin_bit_cast(Words, low);
  else return __builtin_bit_cast(Words, _mm256_alignr_epi8(all, low, 16 - 4 * STEP));
}
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline uint32_t high_bits(Words words) {
  uint32_t all = 0;
  for (int64_t i = 0; i < LANES; ++i) all |= (words[i] >> 31) << i;
  return all;
}
template <int STEP>
inline Words moved_up(Words words) {
  Words moved{};
  for (int64_t i = STEP; i < LANES; ++i) moved[i] = words[i - STEP];
  return moved;
}
#endif

// The sum of each lane and those before it.
template <int STEP = 1>
inline Words running_sum(Words words) {
  words += moved_up<STEP>(words);
  if constexpr (2 * STEP < LANES) return running_sum<2 * STEP>(words);
  return words;
}

inline Floats all_of(float x) { return x - Floats{}; }  // -0 and NaN stay what they are

// By halves: one addition after the other would wait for each of them.
template <class Vector>
inline auto sum_of(const Vector& v) {
  using Element = decltype(+v[0]);
  alignas(64) Element all[LANES];
  __builtin_memcpy(all, &v, sizeof v);
#pragma GCC unroll 8
  for (int64_t half = LANES / 2; half > 0; half /= 2)
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) all[i] += all[i + half];
  return all[0];
}

inline float largest_of(const Floats& v) {
  float found = v[0];
  for (int64_t i = 1; i < LANES; ++i) found = larger(v[i], found);
  return found;
}

// LANES elements, in their order.
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
inline Floats load(const bfloat16* from) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof x);
  return __builtin_bit_cast(Floats, __builtin_convertvector(x, Words) << 16);
}

// PAIR elements that lie together: of float32 the first half and the second, of bfloat16 every other.
constexpr int64_t PAIR = 2 * LANES;
struct Pair {
  Floats a, b;
};
inline Pair load_pair(const float* from) { return {load(from), load(from + LANES)}; }
inline Pair load_pair(const bfloat16* from) {
  Words words;
  __builtin_memcpy(&words, from, sizeof words);
  return {__builtin_bit_cast(Floats, words << 16), __builtin_bit_cast(Floats, words & 0xffff0000u)};
}

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline Floats from_bits(Words bits) { return __builtin_bit_cast(Floats, bits); }
inline uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline Words to_bits(Floats x) { return __builtin_bit_cast(Words, x); }

// A float or Floats in the low halves, as bfloat16: to nearest, ties to even; a NaN becomes a quiet one.
template <class F>
inline auto narrowed(F x) {
  using Bits = decltype(to_bits(x));
  const Bits bits = to_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : Bits{} + 0x7fc0u;
}
inline void store_pair(const Pair& two, float* to) {
  __builtin_memcpy(to, &two.a, sizeof two.a);
  __builtin_memcpy(to + LANES, &two.b, sizeof two.b);
}
inline void store_pair(const Pair& two, bfloat16* to) {
#ifdef __AVX512BF16__  // rounded by one instruction, which takes denormal numbers for 0: a's are the lower half
  alignas(64) static constexpr uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(two.b, two.a));
  const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
#else
  const Words words = narrowed(two.a) | narrowed(two.b) << 16;
#endif
  __builtin_memcpy(to, &words, sizeof words);
}

}  // namespace
}  // namespace tract_fast::TRACT_FAST_VARIANT
