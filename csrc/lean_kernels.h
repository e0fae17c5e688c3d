// The kernels of lean.h, for the instruction set that this is compiled for: included after row_pass_kernels.h.

#include "lean.h"

namespace tract_fast::TRACT_FAST_VARIANT {
namespace {

struct Acted {
  float value, slope;  // act(x), act'(x)
};

// x s(a x...) for a logistic s: both of its sides without cancellation.
struct Logistic {
  float s, rest;  // s(x), 1 - s(x)
};
inline Logistic logistic(float x) {
  const float e = exp_bounded(x < 0.0f ? x : -x);
  const float large = 1.0f / (1.0f + e), small = e * large;
  return x < 0.0f ? Logistic{small, large} : Logistic{large, small};
}

// The normal distribution function: its lower tail by Chebyshev fitting of erfc (Numerical Recipes' erfcc, relative error
// 1.2e-7), so that nothing cancels at negative x.
inline float normal_cdf(float x) {
  const float z = (x < 0.0f ? -x : x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exp_bounded(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

template <Activation A>
inline Acted act(float x);
template <>
inline Acted act<Activation::silu>(float x) {
  const Logistic l = logistic(x);
  return {x * l.s, l.s * (1.0f + x * l.rest)};
}
template <>
inline Acted act<Activation::gelu>(float x) {
  const float cdf = normal_cdf(x);
  return {x * cdf, cdf + x * 0.39894228f * exp_bounded(-0.5f * x * x)};
}
template <>
inline Acted act<Activation::gelu_tanh>(float x) {  // (1 + tanh u) / 2 = s(2 u)
  const float twice = 1.59576912f * (x + 0.044715f * x * x * x);
  const Logistic l = logistic(twice);
  return {x * l.s, l.s + x * l.s * l.rest * 1.59576912f * (1.0f + 0.134145f * x * x)};
}

template <class T>
const T* row_at(const void* rows, int64_t row, int64_t width) {
  return static_cast<const T*>(rows) + row * width;
}

template <class T>
void norm(const Norm& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[BLOCK];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_at<T>(p.x, row, p.width);
    T* y = static_cast<T*>(p.y) + row * p.width;
    double squares = 0.0;
    for (int64_t start = 0; start < p.width; start += BLOCK) {
      const int64_t stop = p.width - start < BLOCK ? p.width : start + BLOCK;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < stop; ++i) sum += widen(x[i]) * widen(x[i]);
      squares += sum;
    }
    const float r = static_cast<float>(1.0 / __builtin_sqrt(squares / p.width + p.eps));
    p.r[row] = r;
    for (int64_t start = 0; start < p.width; start += BLOCK) {
      const int64_t n = p.width - start < BLOCK ? p.width - start : BLOCK;
      float* made = place_for(y + start, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) made[i] = widen(x[start + i]) * r * p.weight[start + i];
      narrow_all(made, y + start, n);
    }
  }
}

template <class T>
void norm_backward(const Norm& p, int64_t begin, int64_t end, float* dw) {
  alignas(64) float buffer[BLOCK];
  for (int64_t row = begin; row < end; ++row) {
    const T *x = row_at<T>(p.x, row, p.width), *dy = row_at<T>(p.dy, row, p.width);
    const float r = p.r[row];
    if (dw != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) dw[i] += widen(dy[i]) * (widen(x[i]) * r);
    }
    if (p.dx == nullptr) continue;
    double along = 0.0;  // g . x
    for (int64_t start = 0; start < p.width; start += BLOCK) {
      const int64_t stop = p.width - start < BLOCK ? p.width : start + BLOCK;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < stop; ++i) sum += widen(dy[i]) * p.weight[i] * widen(x[i]);
      along += sum;
    }
    const float back = static_cast<float>(along / p.width * r * r);
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    for (int64_t start = 0; start < p.width; start += BLOCK) {
      const int64_t n = p.width - start < BLOCK ? p.width - start : BLOCK;
      float* made = place_for(dx + start, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        made[i] = r * (widen(dy[start + i]) * p.weight[start + i] - widen(x[start + i]) * back);
      narrow_all(made, dx + start, n);
    }
  }
}

template <class T, Activation A>
void gated_by(const Gated& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[BLOCK];
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* y = static_cast<T*>(p.y);
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int64_t n = end - start < BLOCK ? end - start : BLOCK;
    float* made = place_for(y + start, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) made[i] = act<A>(widen(gate[start + i])).value * widen(up[start + i]);
    narrow_all(made, y + start, n);
  }
}

template <class T, Activation A>
void gated_backward_by(const Gated& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[BLOCK];
  alignas(64) float other[BLOCK];
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up), *dy = static_cast<const T*>(p.dy);
  T *dgate = static_cast<T*>(p.dgate), *dup = static_cast<T*>(p.dup);
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int64_t n = end - start < BLOCK ? end - start : BLOCK;
    float *of_gate = place_for(dgate + start, buffer), *of_up = place_for(dup + start, other);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Acted a = act<A>(widen(gate[start + i]));
      const float g = widen(dy[start + i]);
      of_gate[i] = g * widen(up[start + i]) * a.slope;
      of_up[i] = g * a.value;
    }
    narrow_all(of_gate, dgate + start, n);
    narrow_all(of_up, dup + start, n);
  }
}

template <class T>
void gated(const Gated& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::silu: return gated_by<T, Activation::silu>(p, begin, end);
    case Activation::gelu: return gated_by<T, Activation::gelu>(p, begin, end);
    case Activation::gelu_tanh: return gated_by<T, Activation::gelu_tanh>(p, begin, end);
  }
}

template <class T>
void gated_backward(const Gated& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::silu: return gated_backward_by<T, Activation::silu>(p, begin, end);
    case Activation::gelu: return gated_backward_by<T, Activation::gelu>(p, begin, end);
    case Activation::gelu_tanh: return gated_backward_by<T, Activation::gelu_tanh>(p, begin, end);
  }
}

template <class T>
void widen_with(const void* from, float offset, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(static_cast<const T*>(from)[i]) + offset;
}

template <class T>
void narrow_from(const double* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(to)[i] = narrow<T>(static_cast<float>(from[i]));
}

template <class T>
constexpr LeanKernels lean_kernels_of() {
  return {norm<T>, norm_backward<T>, gated<T>, gated_backward<T>, widen_with<T>, narrow_from<T>};
}

}  // namespace

extern const LeanKernels lean_float32, lean_bfloat16;
const LeanKernels lean_float32 = lean_kernels_of<float>();
const LeanKernels lean_bfloat16 = lean_kernels_of<bfloat16>();

}  // namespace tract_fast::TRACT_FAST_VARIANT
