// Logits of some rows of a chunk against a block of keys.
#pragma once

#include "cpu_keys.h"

namespace diffkv {

// Rows [first, last) of one KV head's chunk times its query heads, packed: query i is row first + i / G of query head i % G. The number
// of queries is filled up to a multiple of kRows with zeros, which count as copies of the last row.
struct Queries {
  int first, last, group, words;
  const int32_t *packed, *rows;  // [padded, words], [padded]
  const float* sums[2];          // [padded, groups] of each tier's groups of channels, for the zero points

  int count() const { return (last - first) * group; }
  int padded() const { return rounded_up(count(), kRows); }
};

// Rows that are handled at once: their queries and outputs stay in the second cache, and unpacking a block of keys for them costs little.
inline int rows_at_once(const Problem& p) {
  const int queries = std::min(64 * kRows, 49152 / p.d());
  return std::max(1, queries / p.chunk.group);
}

// Index of query i in [B, G, C].
inline int64_t query_index(const Problem& p, int64_t head, const Queries& q, int i) {
  return (head * p.chunk.group + i % q.group) * p.chunk.rows + q.rows[i];
}

template <typename Word>
Queries pack_queries(const Problem& p, int64_t head, int first, int last) {
  const int d = p.d(), words = (d + Word::size - 1) / Word::size;
  Queries q{first, last, p.chunk.group, words, nullptr, nullptr, {}};
  int32_t* packed = scratch<struct Packed, int32_t>(int64_t(q.padded()) * words);
  int32_t* rows = scratch<struct Rows, int32_t>(q.padded());
  q.packed = packed, q.rows = rows;
  for (int i = 0; i < q.padded(); ++i) {
    rows[i] = std::min(first + i / q.group, last - 1);
    const Numbers from = p.chunk.q.from(i < q.count() ? query_index(p, head, q, i) * p.d() : 0);
    for (int c = 0; c < d; c += kLanes * Word::size) {
      const Ints in_order = words_of<Word>(from, c, i < q.count() ? d - c : 0);
      std::memcpy(packed + i * words + c / Word::size, &in_order, std::min(kLanes, words - c / Word::size) * sizeof(int32_t));
    }
  }
  return q;
}

// Sums of the queries over each group of channels of a tier's keys.
inline const float* group_sums(const Problem& p, int64_t head, const Queries& q, int groups, float* sums) {
  const int width = p.d() / groups;
  for (int i = 0; i < q.count(); ++i) {
    const Numbers from = p.chunk.q.from(query_index(p, head, q, i) * p.d());
    for (int group = 0; group < groups; ++group) {
      Floats total = {};
      for (int c = 0; c < width; c += kLanes) total += from.vector(group * width + c, width - c);
      sums[i * groups + group] = sum(total);
    }
  }
  std::fill(sums + q.count() * groups, sums + q.padded() * groups, 0.0f);
  return sums;
}

inline void sum_queries(const Problem& p, int64_t head, Queries& q) {
  const Layout& layout = p.heads.pool.layout;
  int64_t groups = 0;
  for (int t = 0; t < layout.tiers; ++t) groups += layout.tier[t].key.groups;
  float* sums = scratch<struct Sums, float>(groups * q.padded());
  for (int t = 0; t < layout.tiers; ++t) {
    q.sums[t] = group_sums(p, head, q, layout.tier[t].key.groups, sums);
    sums += layout.tier[t].key.groups * q.padded();
  }
}

// How many keys of a span query i sees, from the first on.
inline int seen(const Queries& q, int i, const Span& span) {
  if (span.source != Source::chunk) return span.count;
  return static_cast<int>(std::clamp<int64_t>(q.rows[i] + 1 - span.first, 0, span.count));
}

// Logits of queries i to i + kRows against vectors of keys from `column` on.
template <typename Word, int Columns, bool Scaled>
inline void some_logits(const Queries& q, int i, const float* sums, const KeyBlock& block, int column, float* logits) {
  const int32_t* keys = block.keys + int64_t(column / kPanel) * block.words * kPanel + column % kPanel;
  const int width = block.words / block.groups;
  for (int group = 0; group < block.groups; ++group) {
    Floats total[kRows][Columns] = {}, scale[Columns], zero[Columns];
    multiply<Word>(q.packed + int64_t(i) * q.words + group * width, q.words, keys + group * width * kPanel, width, total);
    for (int j = 0; Scaled && j < Columns; ++j) {
      scale[j] = load<Floats>(block.scale + group * kKeys + column + j * kLanes);
      zero[j] = load<Floats>(block.zero + group * kKeys + column + j * kLanes);
    }
    const auto finish = [&](auto add) {
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
          float* to = logits + row * kKeys + column + j * kLanes;
          Floats x = total[row][j] * block.factor;
          if constexpr (Scaled) x = total[row][j] * scale[j] + zero[j] * sums[(i + row) * block.groups + group];
          if constexpr (add) x += load<Floats>(to);
          store(to, x);
        }
      }
    };
    if (group == 0) finish(std::false_type{});
    else finish(std::true_type{});
  }
}

// Logits, in base 2, of kRows queries from query i on against the first `count` keys of a block, whole strips; masked ones -inf.
template <typename Word>
inline void block_logits(const Problem& p, const Queries& q, int i, const Span& span, const KeyBlock& block, int count, float* logits) {
  over_columns(count, [&](int column, auto columns) {
    if (block.scale) some_logits<Word, columns, true>(q, i, q.sums[span.tier()], block, column, logits);
    else some_logits<Word, columns, false>(q, i, nullptr, block, column, logits);
  });
  for (int row = 0; row < kRows; ++row) {
    float* line = logits + row * kKeys;
    if (p.cap > 0) {
      for (int at = 0; at < count; at += kLanes) store(line + at, soft_cap(load<Floats>(line + at), p.cap) * kLog2E);
    }
    const int keys = seen(q, i + row, span);
    for (int at = keys / kLanes * kLanes; at < count; at += kLanes) {
      store(line + at, select(lanes() + at < keys, load<Floats>(line + at), splat(-INFINITY)));
    }
  }
}

}  // namespace diffkv
