// Attention of some rows of a chunk, one block of keys after the other.
#pragma once

#include "cpu_logits.h"

namespace diffkv {

// Softmax of every query over the keys so far.
struct Partial {
  float *maximum, *total;  // [padded queries], in base 2
  float* output;           // [padded queries, wide], relative to the maximum
  int wide;                // channels, a multiple of 16

  static Partial empty(const Queries& q, int d) {
    const int n = q.padded(), wide = rounded_up(d, kLanes);
    float* memory = scratch<struct Running, float>(int64_t(n) * (wide + 2));
    std::fill_n(memory, int64_t(n) * (wide + 1), 0.0f);
    std::fill_n(memory + int64_t(n) * (wide + 1), n, -INFINITY);
    return {memory + int64_t(n) * (wide + 1), memory + int64_t(n) * wide, memory, wide};
  }
};

// Takes the logits of kRows queries into their maxima and totals: weights relative to the new maxima, and what the older part shrinks by.
template <typename Word>
inline void weigh(const float* logits, int count, float* maximum, float* total, int32_t* weights, float (&shrink)[kLanes]) {
  Floats most[kRows], sums[kRows] = {}, safe[kRows];
  for (int row = 0; row < kRows; ++row) most[row] = splat(maximum[row]);
  for (int at = 0; at < count; at += kLanes) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) most[row] = max(most[row], load<Floats>(logits + row * kKeys + at));
  }
  Floats fallen = {};
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    const float now = largest(most[row]), base = now > -INFINITY ? now : 0;
    safe[row] = splat(base);
    fallen[row] = maximum[row] - base;
    maximum[row] = now;
  }
  // 1 where no key was larger: `exp2` is not exact at 0, and which rows see keys of a span at all depends on the rows beside them
  store(shrink, select(fallen == Floats{}, splat(1), exp2(fallen)));
  for (int at = 0; at < count; at += kLanes * Word::size) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      Floats numbers[Word::size];
      for (int i = 0; i < Word::size; ++i) {
        numbers[i] = exp2(load<Floats>(logits + row * kKeys + at + i * kLanes) - safe[row]);
        sums[row] += numbers[i];
      }
      store(weights + (row * kKeys + at) / Word::size, Word::in_order(numbers));
    }
  }
  for (int row = 0; row < kRows; ++row) total[row] = total[row] * shrink[row] + sum(sums[row]);
}

template <typename Word, int Columns>
inline void mix(const int32_t* weights, int words, const int32_t* values, const float* shrink, float* output, int wide) {
  Floats sums[kRows][Columns];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) sums[row][j] = load<Floats>(output + row * wide + j * kLanes) * shrink[row];
  }
  multiply<Word>(weights, kKeys / Word::size, values, words, sums);
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) store(output + row * wide + j * kLanes, sums[row][j]);
  }
}

// Takes the keys of a span into kRows queries from query i on.
template <typename Word>
inline void attend_block(const Problem& p, const Queries& q, int i, const Span& span, const KeyBlock& block, const int32_t* values,
                         const Partial& partial) {
  alignas(64) float logits[kRows * kKeys];
  alignas(64) int32_t weights[kRows * kKeys / Word::size];
  const int count = rounded_up(seen(q, i + kRows - 1, span), kStrip);
  if (count == 0) return;
  block_logits<Word>(p, q, i, span, block, count, logits);
  float shrink[kLanes];
  weigh<Word>(logits, count, partial.maximum + i, partial.total + i, weights, shrink);
  over_columns(partial.wide, [&](int c, auto columns) {
    const int32_t* panel = values + int64_t(c / kPanel) * (kKeys / Word::size) * kPanel + c % kPanel;
    mix<Word, columns>(weights, count / Word::size, panel, shrink, partial.output + int64_t(i) * partial.wide + c, partial.wide);
  });
}

// Where the results go: [B, G, C, d] and [B, G, C].
struct Attended {
  float *out, *lse;
};

inline void write(const Problem& p, int64_t head, const Queries& q, const Partial& partial, const Attended& to) {
  for (int i = 0; i < q.count(); ++i) {
    const int64_t index = query_index(p, head, q, i), at = index * p.d();
    const float total = partial.total[i], inverse = total > 0 ? 1 / total : 0;
    for (int c = 0; c < p.d(); ++c) to.out[at + c] = partial.output[int64_t(i) * partial.wide + c] * inverse;
    to.lse[index] = total > 0 ? (partial.maximum[i] + std::log2(total)) / kLog2E : INFINITY;
  }
}

// Rows [first, last) of a head; of those before its tokens the output is 0 and the log-sum-exp that of no key.
template <typename Word>
void attend_rows(const Problem& p, int64_t head, int first, int last, const Attended& to) {
  const int begin = std::clamp(p.chunk.first(head), first, last);
  for (int g = 0; g < p.chunk.group; ++g) {
    const int64_t row = (head * p.chunk.group + g) * p.chunk.rows + first;
    std::fill_n(to.out + row * p.d(), int64_t(begin - first) * p.d(), 0.0f);
    std::fill_n(to.lse + row, begin - first, INFINITY);
  }
  if (begin == last) return;
  Queries q = pack_queries<Word>(p, head, begin, last);
  sum_queries(p, head, q);
  const Partial partial = Partial::empty(q, p.d());
  over_spans(p, head, last, [&](const Span& span) {
    const KeyBlock block = pack_keys<Word>(p, head, span);
    const int32_t* values = pack_values<Word>(p, head, span);
    fetch_next(p, head, span);
    for (int i = 0; i < q.padded(); i += kRows) attend_block<Word>(p, q, i, span, block, values, partial);
  });
  write(p, head, q, partial, to);
}

}  // namespace diffkv
