// The parts of sampled.h that no instruction set changes.

#include "sampled.h"

#include <cmath>
#include <cstring>

namespace tract_fast {
namespace {

int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

const void* row_at(const void* rows, int64_t index, int64_t stride, Type type) {
  return static_cast<const char*>(rows) + index * stride * size_of(type);
}

// Whether listed logits are computed again, from rows of W.
bool again(const Operands& o, Type type) { return type != Type::float32 || o.weights != nullptr; }
bool reads_weight(const Operands& o, Type type) { return o.dx != nullptr || again(o, type); }

// A row's columns and their ratios, label and score tokens apart; returns how many. A row without gradient needs none,
// unless its statistics are to be `corrected` by them.
int64_t draw_row(const RowPass& p, const Lists& lists, const Operands& o, const Coefficients& c, const SampledKernels& s,
                 Type type, int64_t row) {
  const bool corrected = o.weights != nullptr;
  const double kappa = std::fabs(c.kappa);
  if (!((kappa > 0.0 || corrected) && c.others > 0.0 && std::isfinite(kappa) && std::isfinite(c.lse))) return 0;
  const int64_t room = lists.most - p.n_tokens - 1;  // the label's is the 1
  double e = lists.eps * (kappa > lists.reference ? lists.reference / kappa : 1.0);
  const auto shift_of = [&](double threshold) {
    return static_cast<float>(std::round((c.lse + std::log(threshold)) * STEPS) / STEPS);
  };
  // Where the bound does not say that the list fits, the longest one is counted; where that does not fit, the threshold
  // becomes the one of the bound. Both are of the row alone, not of the draw.
  const double sure = OVER * c.others / static_cast<double>(room - (EXTRA - 1));
  if (lists.most <= p.n_vocab && e < sure && s.longest(p, shift_of(e), row) > room) e = sure;
  const auto start = static_cast<uint32_t>(lists.starts[row]);
  const Rows wanted{static_cast<const char*>(o.weight), o.w_stride * size_of(type),
                    reads_weight(o, type) ? o.width * size_of(type) : 0};
  int64_t count = s.draw(p, shift_of(e), start, row, lists.columns + row * lists.most,
                         lists.values + row * lists.most, room, wanted);
  // more than the bound only where float32 does not resolve the logits (of 1e5 and more): such a row has no draw
  return std::max<int64_t>(count, 0);
}

// What the listed columns of a row need of W, from which 16-bit logits are computed again.
struct Listed {
  std::vector<Capped> at;
  std::vector<double> drawn_on;    // the logits as they were drawn on
  std::vector<float> squares;      // of rows of W
  double top, peak;                // largest logit that was drawn on, and of those and the listed ones
  std::vector<float> now, before;  // exp(z - peak); where logits were computed again, exp(drawn_on - top)
};

// Reads the listed rows of W. Returns whether logits were computed again.
bool reread(const RowPass& p, const Lists& lists, const Operands& o, const Kernels& k, const SampledKernels& s, Type type,
            float top, int64_t row, int64_t count, Listed& listed) {
  const int32_t* columns = lists.columns + row * lists.most;
  const void* x = row_at(o.x, row, o.x_stride, type);
  const bool reads_w = reads_weight(o, type), exactly = again(o, type);
  listed.at.resize(count);
  listed.drawn_on.resize(count);
  listed.squares.resize(count);
  listed.now.resize(count);
  listed.before.resize(count);
  listed.peak = listed.top = top;
  for (int64_t i = 0; i < count; ++i) {
    const void* w = row_at(o.weight, columns[i], o.w_stride, type);
    const Products at_w = reads_w ? s.products(x, w, o.width) : Products{};
    listed.squares[i] = at_w.ww;
    listed.at[i] = s.capped_at(p, row, columns[i]);
    listed.drawn_on[i] = listed.at[i].z;
    if (exactly) listed.at[i] = transform(p, k, at_w.xw, columns[i]);
    listed.peak = std::max(listed.peak, listed.at[i].z);
  }
  for (int64_t i = 0; i < count; ++i) listed.now[i] = static_cast<float>(listed.at[i].z - listed.peak);
  s.exps(listed.now.data(), count);
  if (!exactly) return false;
  for (int64_t i = 0; i < count; ++i) listed.before[i] = static_cast<float>(listed.drawn_on[i] - top);
  s.exps(listed.before.data(), count);
  return true;
}

// The row's sums with the listed columns' logits computed again: probabilities must be those of one softmax. Those that
// are listed for certain replace what they were. Of the rest only a sample is known: where it was drawn on a proposal, the
// rest becomes as much larger as the sample is by its exact logits.
Sums corrected(Sums sums, const float* ratios, const Listed& listed, bool proposed) {
  double certain = 0.0, was = 0.0, drawn = 0.0, drawn_was = 0.0;
  for (size_t i = 0; i < listed.at.size(); ++i) {
    const double ratio = ratios[i], now = ratio * listed.now[i], before = ratio * listed.before[i];
    (ratio == 1.0 ? certain : drawn) += now;
    (ratio == 1.0 ? was : drawn_was) += before;
  }
  const float top = static_cast<float>(listed.peak);  // the largest logit, as near as float32 has it
  const double by = proposed && drawn_was > 0.0 ? drawn / drawn_was : std::exp(sums.top - listed.peak);
  const double others = (certain + std::max(sums.others - was, 0.0) * by) * std::exp(listed.peak - top);
  return others > 0.0 ? Sums{top, others} : sums;
}

// What a proposal was worth in a row: of `Operands`.
void write_weights(const float* ratios, const Listed& listed, double lse_was, double lse, float* weights) {
  const double scale = std::exp(listed.peak - lse - (listed.top - lse_was));
  double largest = 0.0, sum = 0.0, squares = 0.0, count = 0.0;
  for (size_t i = 0; i < listed.at.size(); ++i) {
    if (ratios[i] == 1.0f) continue;
    const double weight = listed.before[i] > 0.0f && listed.now[i] > 0.0f
                              ? scale * listed.now[i] / listed.before[i]
                              : std::exp(listed.at[i].z - lse - (listed.drawn_on[i] - lse_was));
    largest = std::max(largest, weight);
    sum += weight;
    squares += weight * weight;
    ++count;
  }
  const double all[] = {count, largest, sum, squares};
  for (int i = 0; i < 4; ++i) weights[i] = static_cast<float>(std::min(all[i], 1e30));
}

// Turns the ratios of a row into values, and finds the spread of their draw.
void settle_row(const Lists& lists, const Operands& o, const Coefficients& c, int64_t row, int64_t count,
                const Listed& listed) {
  float* values = lists.values + row * lists.most;
  const double factor = c.kappa * std::exp(listed.peak - c.lse);
  double spread = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double ratio = values[i];
    values[i] = static_cast<float>(factor * listed.now[i] * listed.at[i].slope * ratio);
    if (ratio > 1.0) spread += double{values[i]} * values[i] * (1.0 - 1.0 / ratio) * listed.squares[i];
  }
  if (o.dx != nullptr) o.spread[row] = static_cast<float>(spread);
}

// Appends the entries of score tokens and label; returns how many entries there are then.
int64_t append(const RowPass& p, const Lists& lists, const Coefficients& c, const float* scores, int64_t row,
               int64_t count) {
  int32_t* columns = lists.columns + row * lists.most;
  float* values = lists.values + row * lists.most;
  bool is_token = false;
  for (int64_t i = 0; i < p.n_tokens; ++i) {
    is_token |= p.ids[i] == p.labels[row];
    columns[count] = static_cast<int32_t>(p.ids[i]);
    values[count++] = scores[i];
  }
  if (p.labels[row] >= 0 && !is_token) {
    columns[count] = static_cast<int32_t>(p.labels[row]);
    values[count++] = c.label;
  }
  return count;
}

}  // namespace

void sampled_rows(const RowPass& p, const Lists& lists, const Operands& o, const Variant& variant, Type type,
                  int64_t begin, int64_t end) {
  const Kernels& k = variant.of(type);
  const SampledKernels& s = variant.sampled(type);
  std::vector<float> scores(p.n_tokens);
  Listed listed;
  for (int64_t row = begin; row < end; ++row) {
    k.take_out(p, row);
    Sums sums = k.sums(p, row, 0, p.n_vocab);
    Coefficients c = finish(p, k, sums, row, scores.data());
    const bool proposed = o.weights != nullptr;
    int64_t count = p.used[row] ? draw_row(p, lists, o, c, s, type, row) : 0;
    const float* ratios = lists.values + row * lists.most;
    const double lse_was = c.lse;
    if (reread(p, lists, o, k, s, type, sums.top, row, count, listed) && count > 0) {
      sums = corrected(sums, ratios, listed, proposed);
      c = finish(p, k, sums, row, scores.data());
    }
    if (proposed) write_weights(ratios, listed, lse_was, c.lse, o.weights + 4 * row);
    settle_row(lists, o, c, row, count, listed);
    if (p.used[row]) count = append(p, lists, c, scores.data(), row, count);
    lists.counts[row] = static_cast<int32_t>(count);
    if (o.dx == nullptr) continue;
    const RowSum all{o.weight, o.w_stride, o.width, lists.columns + row * lists.most, ratios, count, 1.0f};
    o.norm[row] = s.sum_rows(all, const_cast<void*>(row_at(o.dx, row, o.width, type)));
  }
}

Transposed transpose(const int32_t* columns, const int32_t* counts, const float* values, int64_t n, int64_t most,
                     int64_t n_vocab) {
  Transposed t;
  t.first.assign(n_vocab + 1, 0);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < counts[row]; ++i) ++t.first[columns[row * most + i] + 1];
  for (int64_t column = 0; column < n_vocab; ++column) t.first[column + 1] += t.first[column];
  t.rows.resize(t.first[n_vocab]);
  t.values.resize(t.first[n_vocab]);
  std::vector<int64_t> next(t.first.begin(), t.first.end() - 1);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < counts[row]; ++i) {
      const int64_t place = next[columns[row * most + i]]++;
      t.rows[place] = static_cast<int32_t>(row);
      t.values[place] = values[row * most + i];
    }
  return t;
}

void sampled_weight(const Transposed& t, const void* x, int64_t x_stride, int64_t width, float scale, void* dw,
                    void* db, int64_t begin, int64_t end, const Variant& variant, Type type) {
  const SampledKernels& s = variant.sampled(type);
  for (int64_t column = begin; column < end; ++column) {
    const int64_t first = t.first[column], count = t.first[column + 1] - first;
    if (dw != nullptr) {
      void* const to = const_cast<void*>(row_at(dw, column, width, type));
      const RowSum all{x, x_stride, width, t.rows.data() + first, t.values.data() + first, count, scale};
      if (count > 0)
        s.sum_rows(all, to);
      else
        std::memset(to, 0, static_cast<size_t>(width * size_of(type)));
    }
    if (db == nullptr) continue;
    float sum = 0.0f;
    for (int64_t i = first; i < first + count; ++i) sum += t.values[i];
    sum *= scale;
    s.store(&sum, const_cast<void*>(row_at(db, column, 1, type)), 1);
  }
}

}  // namespace tract_fast
