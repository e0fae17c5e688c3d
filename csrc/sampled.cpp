// The parts of sampled.h that no instruction set changes.

#include "sampled.h"

#include <cmath>
#include <cstring>
#include <memory>

namespace tract_fast {
namespace {

constexpr int64_t MOST_ROWS = 128;                  // taken together,
constexpr int64_t MOST_BYTES = int64_t{512} << 10;  // of X and dX at most,
constexpr int64_t TILE_BYTES = int64_t{256} << 10;  // and of W at a time: measured, where the L2 cache has 512 KiB
constexpr int64_t MOST_ENTRIES = int64_t{1} << 17;  // of those rows: 5 MB of what is kept of them
constexpr double FAR = 10.0;                        // further than 8 or 16 bits are from exact logits, most often

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
                 int64_t row) {
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
  const int64_t count =
      s.draw(p, shift_of(e), start, row, lists.columns + row * lists.most, lists.values + row * lists.most, room);
  // more than the bound only where float32 does not resolve the logits (of 1e5 and more): such a row has no draw
  return std::max<int64_t>(count, 0);
}

// A row and its listed columns, between the draw and the end.
struct Listed {
  int64_t count;
  Sums sums;
  Coefficients c;
  std::vector<Capped> at;
  std::vector<float> drawn_on;     // the logits as they were drawn on
  double peak;                     // largest of the logits that were drawn on, and of the listed ones
  std::vector<float> now, before;  // exp(z - peak); where logits were computed again, exp(drawn_on - sums.top)
  int64_t next;                    // entries that read_weights has come to
  double base;                     // its sum is relative to e^base
};

// Rows that a thread takes together, and what reading W for them needs.
struct Together {
  std::vector<Listed> rows;
  std::vector<float> dx;         // (rows, width): of each row the sum of exp(z - base) slope ratio times W's, by add_rows
  std::vector<uint64_t> listed;  // a bit a column,
  std::vector<int32_t> columns;  // and those that are set
  std::unique_ptr<float[]> squares;  // (n_vocab): the squared norm of W's row, where it is listed
  std::vector<float> values;     // of a row in a tile

  float* dx_of(int64_t i, const Operands& o) { return o.dx == nullptr ? nullptr : dx.data() + i * o.width; }
};

// Statistics as the logits have them, and the draw.
void open_row(const RowPass& p, const Lists& lists, const Operands& o, const Kernels& k, const SampledKernels& s,
              Type type, int64_t row, float* scores, Listed& listed) {
  k.take_out(p, row);
  listed.sums = k.sums(p, row, 0, p.n_vocab);
  listed.c = finish(p, k, listed.sums, row, scores);
  listed.count = p.used[row] ? draw_row(p, lists, o, listed.c, s, row) : 0;
  listed.peak = listed.base = listed.sums.top;
  listed.next = 0;
  listed.at.resize(listed.count);
  listed.drawn_on.resize(listed.count);
  s.capped(p, row, lists.columns + row * lists.most, listed.count, listed.at.data());  // while it is in the cache
  for (int64_t i = 0; i < listed.count; ++i) {
    listed.drawn_on[i] = static_cast<float>(listed.at[i].z);
    if (!again(o, type)) listed.peak = std::max(listed.peak, listed.at[i].z);
  }
}

// Adds what entries [first, end) of a row give to its sum, which becomes relative to a larger base where a logit is far
// above it: as far as 8 or 16 bits were from the exact one. Entry by entry, so that tiles change nothing.
void add_entries(const Lists& lists, const Operands& o, const SampledKernels& s, int64_t row, int64_t first, int64_t end,
                 std::vector<float>& values, float* dx, Listed& listed) {
  const int32_t* columns = lists.columns + row * lists.most;
  const float* ratios = lists.values + row * lists.most;
  while (first < end) {
    if (const double z = listed.at[first].z; z - listed.base > FAR) {
      const auto less = static_cast<float>(std::exp(listed.base - z));
      for (int64_t d = 0; d < o.width; ++d) dx[d] *= less;
      listed.base = z;
    }
    values.clear();
    for (int64_t i = first; i < end && !(listed.at[i].z - listed.base > FAR); ++i)
      values.push_back(static_cast<float>(listed.at[i].z - listed.base));
    const auto n = static_cast<int64_t>(values.size());
    s.exps(values.data(), n);
    for (int64_t i = 0; i < n; ++i)
      values[i] *= static_cast<float>(listed.at[first + i].slope * ratios[first + i]);
    s.add_rows({{o.weight, o.w_stride, o.width, columns + first, n}, values.data(), 1.0f, dx}, dx);
    first += n;
  }
}

// Reads the rows of W that a row lists below column `end`, from where it stands.
void read_row(const RowPass& p, const Lists& lists, const Operands& o, const Kernels& k, const SampledKernels& s,
              Type type, int64_t row, int64_t end, std::vector<float>& values, float* dx, Listed& listed) {
  const int32_t* columns = lists.columns + row * lists.most;
  const void* x = row_at(o.x, row, o.x_stride, type);
  const int64_t first = listed.next;
  int64_t i = first;
  while (i < listed.count && columns[i] < end) ++i;
  if (again(o, type)) {
    values.resize(i - first);
    s.dots(x, {o.weight, o.w_stride, o.width, columns + first, i - first}, values.data());
    for (int64_t j = first; j < i; ++j) {
      listed.at[j] = transform(p, k, values[j - first], columns[j]);
      listed.peak = std::max(listed.peak, listed.at[j].z);
    }
  }
  listed.next = i;
  if (o.dx != nullptr) add_entries(lists, o, s, row, first, i, values, dx, listed);
}

// Asks for rows of W ahead: they lie anywhere in it, and each would be waited for.
void fetch(const Operands& o, Type type, const int32_t* columns, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const char* row = static_cast<const char*>(row_at(o.weight, columns[i], o.w_stride, type));
    for (int64_t byte = 0; byte < o.width * size_of(type); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Reads the rows of W that n rows from `begin` on list: tile by tile of those, in the vocabulary's order, which lists
// have, so that a row of W comes from memory once for all of them, and a row's part of dX once for several rows of W.
void read_weights(const RowPass& p, const Lists& lists, const Operands& o, const Kernels& k, const SampledKernels& s,
                  Type type, int64_t begin, int64_t n, Together& together) {
  std::vector<uint64_t>& listed = together.listed;
  listed.assign((p.n_vocab + 63) / 64, 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < together.rows[i].count; ++j) {
      const int32_t column = lists.columns[(begin + i) * lists.most + j];
      listed[column / 64] |= uint64_t{1} << column % 64;
    }
  std::vector<int32_t>& columns = together.columns;
  columns.clear();
  for (size_t word = 0; word < listed.size(); ++word)
    for (uint64_t bits = listed[word]; bits != 0; bits &= bits - 1)
      columns.push_back(static_cast<int32_t>(word * 64 + __builtin_ctzll(bits)));
  const auto all = static_cast<int64_t>(columns.size());
  const int64_t tile = std::max<int64_t>(1, TILE_BYTES / (o.width * size_of(type) + 1));
  fetch(o, type, columns.data(), std::min(tile, all));
  for (int64_t first = 0; first < all; first += tile) {
    const int64_t next = std::min(first + tile, all), more = std::min(tile, all - next);
    for (int64_t i = first; i < next && o.dx != nullptr; ++i)
      s.dots(row_at(o.weight, columns[i], o.w_stride, type), {o.weight, o.w_stride, o.width, &columns[i], 1},
             &together.squares[columns[i]]);
    for (int64_t i = 0; i < n; ++i) {
      fetch(o, type, columns.data() + next + more * i / n, more * (i + 1) / n - more * i / n);
      read_row(p, lists, o, k, s, type, begin + i, next < all ? columns[next] : p.n_vocab, together.values,
               together.dx_of(i, o), together.rows[i]);
    }
  }
}

// The row's sums with the listed columns' logits computed again: probabilities must be those of one softmax. Those that
// are listed for certain replace what they were. Of the rest only a sample is known: where it was drawn on a proposal, the
// rest becomes as much larger as the sample is by its exact logits.
Sums corrected(const float* ratios, const Listed& listed, bool proposed) {
  const Sums& sums = listed.sums;
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
  const double scale = std::exp(listed.peak - lse - (listed.sums.top - lse_was));
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
void settle_row(const Lists& lists, const Operands& o, int64_t row, const Together& together, const Listed& listed) {
  const int32_t* columns = lists.columns + row * lists.most;
  float* values = lists.values + row * lists.most;
  const double factor = listed.c.kappa * std::exp(listed.peak - listed.c.lse);
  double spread = 0.0;
  for (int64_t i = 0; i < listed.count; ++i) {
    const double ratio = values[i];
    values[i] = static_cast<float>(factor * listed.now[i] * listed.at[i].slope * ratio);
    if (ratio > 1.0 && o.dx != nullptr)
      spread += double{values[i]} * values[i] * (1.0 - 1.0 / ratio) * together.squares[columns[i]];
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

// Statistics with what was computed again, values, dX; of row i of those that are taken together.
void close_row(const RowPass& p, const Lists& lists, const Operands& o, const Kernels& k, const SampledKernels& s,
               Type type, int64_t row, float* scores, int64_t i, Together& together) {
  Listed& listed = together.rows[i];
  const int64_t count = listed.count;
  const bool proposed = o.weights != nullptr;
  const float* ratios = lists.values + row * lists.most;
  const double lse_was = listed.c.lse;
  listed.now.resize(count);
  for (int64_t j = 0; j < count; ++j) listed.now[j] = static_cast<float>(listed.at[j].z - listed.peak);
  s.exps(listed.now.data(), count);
  Sums sums = listed.sums;
  if (again(o, type) && count > 0) {
    listed.before.resize(count);
    for (int64_t j = 0; j < count; ++j) listed.before[j] = listed.drawn_on[j] - listed.sums.top;
    s.exps(listed.before.data(), count);
    sums = corrected(ratios, listed, proposed);
  }
  listed.c = finish(p, k, sums, row, scores);
  if (proposed) write_weights(ratios, listed, lse_was, listed.c.lse, o.weights + 4 * row);
  settle_row(lists, o, row, together, listed);
  const int64_t all = p.used[row] ? append(p, lists, listed.c, scores, row, count) : count;
  lists.counts[row] = static_cast<int32_t>(all);
  if (o.dx == nullptr) return;
  const double times = listed.c.kappa * std::exp(listed.base - listed.c.lse);
  const int64_t own = row * lists.most + count;
  const RowSum sum{{o.weight, o.w_stride, o.width, lists.columns + own, all - count}, lists.values + own, 1.0f,
                   count > 0 ? together.dx_of(i, o) : nullptr, static_cast<float>(times)};
  o.norm[row] = s.sum_rows(sum, const_cast<void*>(row_at(o.dx, row, o.width, type)));
}

}  // namespace

void sampled_rows(const RowPass& p, const Lists& lists, const Operands& o, const Variant& variant, Type type,
                  int64_t begin, int64_t end) {
  const Kernels& k = variant.of(type);
  const SampledKernels& s = variant.sampled(type);
  std::vector<float> scores(p.n_tokens);
  const int64_t step = std::clamp<int64_t>(MOST_BYTES / (o.width * (size_of(type) + 4) + 1), 1, MOST_ROWS);
  Together together;
  together.rows.resize(std::min(step, end - begin));
  if (o.dx != nullptr) together.squares.reset(new float[p.n_vocab]);  // undefined: most of it is never touched
  for (int64_t first = begin, n; first < end; first += n) {
    int64_t entries = 0;
    for (n = 0; n < step && first + n < end && entries <= MOST_ENTRIES; ++n) {
      open_row(p, lists, o, k, s, type, first + n, scores.data(), together.rows[n]);
      entries += together.rows[n].count;
    }
    together.dx.assign(o.dx == nullptr ? 0 : n * o.width, 0.0f);
    if (reads_weight(o, type)) read_weights(p, lists, o, k, s, type, first, n, together);
    for (int64_t i = 0; i < n; ++i)
      close_row(p, lists, o, k, s, type, first + i, scores.data(), i, together);
  }
}

void sampled_weight(const Transposed& t, const void* x, int64_t x_stride, int64_t width, float scale, void* dw,
                    void* db, int64_t begin, int64_t end, const Variant& variant, Type type) {
  const SampledKernels& s = variant.sampled(type);
  for (int64_t column = begin; column < end; ++column) {
    const int64_t first = t.first[column], count = t.first[column + 1] - first;
    if (dw != nullptr) {
      void* const to = const_cast<void*>(row_at(dw, column, width, type));
      const RowSum all{{x, x_stride, width, t.rows.data() + first, count}, t.values.data() + first, scale};
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
