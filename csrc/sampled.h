// The sampled gradient on the CPU: a chunk of logits -> a short list of (column, value) per row, whose expectation is the
// gradient with respect to the logits; and the products of such lists with W and X.
//
// Algorithm. Let p_j be a row's probabilities and e its threshold. Columns with p_j >= e are listed. Of the others, column
// j is listed with probability f_j / 2^31, where f_j is p_j / e in fixed point, made of z_j by three float operations and
// an integer addition, none of which can be fused or reordered: it exceeds p_j / e by up to 6.2%, and every processor and
// block length gives the same (of the same logits: a soft-cap rounds them differently). Systematic sampling: a running
// sum starts at a number drawn for the row, and j is listed where adding f_j takes it past a multiple of 2^31. A listed
// column has the value kappa p_j (2^31 / f_j), with the p_j of its exact logit: expectation kappa p_j, whatever f_j is,
// rounding included. Label and score tokens are always listed, exactly. Derivation and measurements:
// docs/sampled-gradient.md.
//
// The list of a row has at most K + 3 + 1.07 m / e entries (m: the probability of all other columns). Where that would not
// fit, the longest list of the row is counted (a third read of its logits), and if that does not fit either the threshold
// raised to that of the bound: nothing is ever cut, and the threshold depends on the row alone, not on its draw.
//
// Numerics: as row_pass.h; a listed value in float64 but for its exponential, its logit in float32, products summed in
// float32. 16-bit logits are computed again from X and W for the listed columns, and those that are listed for certain
// replace what they were in the log-sum-exp, so that statistics are nearer to those of float32 logits, too. Same bits for
// every number of threads.
//
// A thread takes many rows together: first their draws, then the rows of W that they list, tile by tile in the
// vocabulary's order, which lists have. Rows of W lie anywhere in memory, and waiting for each of them for each entry took a
// quarter of the time (eps 2^-12); so each is read once for all rows that list it, and asked for before. dX is summed up in
// float32, relative to the largest logit that was drawn on (or to an exact one that is far above it), until the row's
// log-sum-exp is known. A row's results are the same bits whatever rows are taken with it.
//
// Cost beside the logits' GEMM: 2 reads of the logits; per entry 4 D FLOP for dX (its logit, too), 2 D FLOP for dW, whose
// every element is written once; W's listed rows and their norms, once for so many rows (at most 128) that X, dX and a tile
// of W stay in the L2 cache. Where lists are short and few rows share a column, dX goes through the cache for each
// two entries or so, and a tenth of the time is lost against rows that are finished one by one.
#pragma once

#include <utility>

#include "row_pass.h"

namespace tract_fast {

constexpr int EXTRA = 3;          // entries of a list beside K and 1.07 m / e
constexpr double OVER = 1.07;     // bound of f_j e / p_j / 2^31, the rounding of the threshold included
constexpr uint32_t KEPT = ~0u;    // a column that is listed for certain
constexpr int STEPS = 256;        // a row's threshold is rounded to 1 / STEPS in its logarithm

struct Lists {
  int32_t *columns, *counts;  // (n, most), (n)
  float* values;              // (n, most)
  int64_t most;  // above n_vocab, or at least K + EXTRA + OVER / eps
  const int64_t* starts;  // (n): the row's number in [0, 2^31)
  double eps, reference;  // e = eps min(1, reference / |kappa|)
};

// What the products read: X (n, width) and W (n_vocab, width) of the logits' type, W's rows `stride` elements apart.
struct Operands {
  const void *x, *weight;
  int64_t width, x_stride, w_stride;
  void* dx;               // (n, width), or null; and with it, of each row of dX,
  float *spread, *norm;   // (n): the variance of its draw, without covariances, its squared norm
  // Not null where the logits are a quantised product, a proposal: (n, 4), of a row's entries that are listed at random,
  float* weights;         // how many, and the largest, the sum and the sum of squares of their p / (proposed p)
};

// Rows index[0], ..., index[count - 1] of a matrix whose rows are `stride` elements apart.
struct Rows {
  const void* first;
  int64_t stride, width;
  const int32_t* index;
  int64_t count;
};

// `times` `before` (or nothing, where it is null) and the sum of values[i] * scale * (row i of `rows`). `before` is what
// add_rows has written.
struct RowSum {
  Rows rows;
  const float* values;
  float scale;
  const float* before = nullptr;
  float times = 1.0f;
};

// Kernels of one instruction set and type of logits.
struct SampledKernels {
  // Entries that no draw of the row exceeds.
  int64_t (*longest)(const RowPass&, float shift, int64_t row);
  // Columns listed and their 2^31 / f_j (1 where certain); returns how many, -1 for more than `most`. Label and score
  // tokens must be taken out.
  int64_t (*draw)(const RowPass&, float shift, uint32_t start, int64_t row, int32_t* columns, float* ratios,
                  int64_t most);
  void (*exps)(float* x, int64_t n);  // in place, x <= 80; the same bits however many are together
  void (*dots)(const void* x, const Rows&, float* to);  // of x and each row; the same bits however many are together
  float (*sum_rows)(const RowSum&, void* to);  // writes the sum, rounded once; returns its squared norm
  float (*add_rows)(const RowSum&, void* to);  // the same in float32, in an order that is the kernels' own
  void (*store)(const float* from, void* to, int64_t n);
  // A row in 8 bits: writes codes in [-127, 127] and returns what they are to be multiplied with; where the row is not
  // finite, zeros and a NaN.
  float (*quantize)(const void* row, int64_t n, int8_t* codes);
  // Of the logits of n columns, as the sums had them.
  void (*capped)(const RowPass&, int64_t row, const int32_t* columns, int64_t n, Capped* to);
};

// Statistics, lists and dX of rows [begin, end).
void sampled_rows(const RowPass& p, const Lists& lists, const Operands& o, const Variant& variant, Type type,
                  int64_t begin, int64_t end);

// The entries of all rows by column, and within it by row; `first` (n_vocab + 1): where each column begins.
struct Transposed {
  std::vector<int64_t> first;
  std::vector<int32_t> rows;
  std::vector<float> values;
};

// `parallel(count, body)` is row_pass.h's. A part has some rows; more of them than MOST would cost more memory than it helps.
template <class Parallel>
Transposed transpose(const int32_t* columns, const int32_t* counts, const float* values, int64_t n, int64_t most,
                     int64_t n_vocab, int64_t threads, const Parallel& parallel) {
  constexpr int64_t MOST = 8;
  const int64_t parts = std::max<int64_t>(1, std::min({threads, n, MOST}));
  std::vector<int64_t> next(parts * n_vocab);  // by part and column: how many entries, then the place of the next one
  const auto each = [&](auto&& body) {         // body(place in `next`, row, entry)
    parallel(parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (int64_t row = n * part / parts; row < n * (part + 1) / parts; ++row)
          for (int64_t i = row * most; i < row * most + counts[row]; ++i) body(next[part * n_vocab + columns[i]], row, i);
    });
  };
  each([](int64_t& count, int64_t, int64_t) { ++count; });
  Transposed t;
  t.first.reserve(n_vocab + 1);
  int64_t total = 0;
  for (int64_t column = 0; column < n_vocab; ++column) {
    t.first.push_back(total);
    for (int64_t i = column; i < parts * n_vocab; i += n_vocab) total += std::exchange(next[i], total);
  }
  t.first.push_back(total);
  t.rows.resize(total);
  t.values.resize(total);
  each([&](int64_t& place, int64_t row, int64_t i) {
    t.rows[place] = static_cast<int32_t>(row);
    t.values[place++] = values[i];
  });
  return t;
}

// dW (n_vocab, width) and db (n_vocab, or null) for columns [begin, end), times `scale`.
void sampled_weight(const Transposed& t, const void* x, int64_t x_stride, int64_t width, float scale, void* dw,
                    void* db, int64_t begin, int64_t end, const Variant& variant, Type type);

}  // namespace tract_fast
