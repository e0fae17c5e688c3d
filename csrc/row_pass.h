// The row pass of the chunked loss on the CPU: statistics of a chunk of logits, and its gradient in place.
//
// Algorithm (tract_fast/loss/rows.py has the formulas). The entries of label and score tokens, whose logits come apart in
// float32, are overwritten with -inf or, where bias, scale or cap follow, a NaN that arithmetic does not make, which takes
// them out; pass 1 keeps (largest logit, sum of exponentials) block by block; finish() makes the statistics and the
// coefficients of the gradient; pass 2 overwrites each logit with its dZ; the entries of label and score tokens follow. A
// thread takes whole rows; where rows are fewer than threads, the columns of a row are shared.
//
// Numerics: float32 within a block of BLOCK columns, float64 over blocks and in finish(). exp is a polynomial, relative
// error 9e-8 down to e^-87.3 (measured; 1.2e-7 without fused products), of bfloat16 logits 3e-6 (7e-6); below e^-87.7 it is
// 0. tanh is a polynomial where the cap is far away. bfloat16 logits and dZ are rounded to nearest, ties to even. A NaN stays
// in its row. The same result for every number of threads as long as rows are not shared.
//
// Cost: 2 reads and 1 write of the logits (1 read without gradient) and an exponential a logit and pass, about 2 x 20
// FLOP. A row of 49152 float32 logits (192 KiB) stays in the L2 cache between the passes, so memory sees each logit once
// in and once out. Applies to float32 and bfloat16, any V >= 1, rows of any stride.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tract_fast {

constexpr int64_t BLOCK = 1024;  // logits at a time: 4 KiB of float32 and as much of slopes stay in the L1 cache

struct RowPass {
  void* logits;  // (n, n_vocab) raw, rows `stride` elements apart
  int64_t n_vocab, stride;
  const void* bias;                           // (n_vocab) of the logits' type, or null
  const float* row_scale;                     // (n): factor of a row's raw logits, > 0 or NaN, or null
  const float *picked_label, *picked_scores;  // (n), (n, n_tokens): raw logits, without bias
  const int64_t* labels;                      // (n): -1 where there is no cross-entropy
  const float *ce, *score, *score_target;     // (n): terms.py
  const bool* used;                           // (n)
  const int64_t* ids;                         // (n_tokens)
  const float* values;                        // (n_tokens)
  int64_t n_tokens;
  float *nll, *lse, *expected, *mass, *probs;  // written: (n), the last (n, n_tokens)
  float softcap;                               // 0: no cap
  float logit_scale;
  bool vocab, gradient;
};

struct Sums {
  float top;      // largest capped logit of some columns, -FLT_MAX if all are taken out
  double others;  // sum of exp(z - top) over them
};

struct Coefficients {
  float top, factor;  // dZ is factor * exp(z - top) * slope
  float label;        // dZ at the label
  double kappa, others, lse;  // factor is kappa exp(top - lse); probability of all but label and score tokens
};

struct Capped {
  double z, slope;
};

enum class Type { float32, bfloat16 };

// The kernels of one instruction set and type of logits. Columns are [begin, end).
struct Kernels {
  void (*take_out)(const RowPass&, int64_t row);
  Sums (*sums)(const RowPass&, int64_t row, int64_t begin, int64_t end);
  void (*write)(const RowPass&, const Coefficients&, int64_t row, int64_t begin, int64_t end);
  void (*put_back)(const RowPass&, const Coefficients&, const float* scores, int64_t row);
  float (*bias_at)(const void* bias, int64_t column);
  void (*add)(float* total, const void* part, bool first, int64_t n);  // total += part, or = at the first
  // to = from * factor, rounded once, of float32 or of the kernels' type
  void (*scale)(const float* from, float factor, void* to, int64_t n);
  void (*rescale)(const void* from, float factor, void* to, int64_t n);
};

struct SampledKernels;  // sampled.h
struct LeanKernels;     // lean.h

struct Variant {
  const char* name;
  bool (*runs_here)();
  const Kernels &float32, &bfloat16;
  const SampledKernels &sampled_float32, &sampled_bfloat16;
  const LeanKernels &lean_float32, &lean_bfloat16;
  const Kernels& of(Type type) const { return type == Type::float32 ? float32 : bfloat16; }
  const SampledKernels& sampled(Type type) const { return type == Type::float32 ? sampled_float32 : sampled_bfloat16; }
  const LeanKernels& lean(Type type) const { return type == Type::float32 ? lean_float32 : lean_bfloat16; }
};

// All that were compiled in, the fastest first.
const std::vector<Variant>& variants();

// The first that runs on this processor, or the one of this name; null where there is none.
const Variant* find_variant(const char* name = nullptr);

// A raw logit after bias, scale and cap, and its derivative.
Capped transform(const RowPass& p, const Kernels& k, float raw, int64_t column);

// Statistics of a row; returns what pass 2 needs and, in `scores` (n_tokens), dZ at the score tokens.
Coefficients finish(const RowPass& p, const Kernels& k, Sums sums, int64_t row, float* scores);

Sums merge(Sums a, Sums b);

// The pass over n rows. `parallel(count, body)` calls body(begin, end) on several threads for parts of [0, count).
template <class Parallel>
void row_pass(const RowPass& p, int64_t n, const Kernels& k, int64_t threads, const Parallel& parallel) {
  std::vector<float> scores(n * p.n_tokens);
  std::vector<Coefficients> coefficients(n);
  const auto each = [](int64_t begin, int64_t end, auto&& body) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  const auto close = [&](int64_t row, Sums sums) {
    coefficients[row] = finish(p, k, sums, row, &scores[row * p.n_tokens]);
  };
  if (n >= threads) {
    parallel(n, [&](int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t row) {
        k.take_out(p, row);
        close(row, k.sums(p, row, 0, p.n_vocab));
        if (!p.gradient) return;
        k.write(p, coefficients[row], row, 0, p.n_vocab);
        k.put_back(p, coefficients[row], &scores[row * p.n_tokens], row);
      });
    });
    return;
  }
  const int64_t blocks = (p.n_vocab + BLOCK - 1) / BLOCK, shares = std::min(threads, blocks);
  const auto columns = [&](int64_t i, auto&& body) {  // i counts shares of all rows
    const int64_t row = i / shares, share = i % shares;
    const int64_t begin = blocks * share / shares * BLOCK, end = blocks * (share + 1) / shares * BLOCK;
    body(row, begin, std::min(end, p.n_vocab));
  };
  std::vector<Sums> partial(n * shares);
  each(0, n, [&](int64_t row) { k.take_out(p, row); });
  parallel(n * shares, [&](int64_t first, int64_t last) {
    each(first, last, [&](int64_t i) {
      columns(i, [&](int64_t row, int64_t begin, int64_t end) { partial[i] = k.sums(p, row, begin, end); });
    });
  });
  each(0, n, [&](int64_t row) {
    Sums sums = partial[row * shares];
    for (int64_t share = 1; share < shares; ++share) sums = merge(sums, partial[row * shares + share]);
    close(row, sums);
  });
  if (!p.gradient) return;
  parallel(n * shares, [&](int64_t first, int64_t last) {
    each(first, last, [&](int64_t i) {
      columns(i, [&](int64_t row, int64_t begin, int64_t end) { k.write(p, coefficients[row], row, begin, end); });
    });
  });
  each(0, n, [&](int64_t row) { k.put_back(p, coefficients[row], &scores[row * p.n_tokens], row); });
}

}  // namespace tract_fast
