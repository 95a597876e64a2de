// Probability mass that each key gets from the observing rows of a chunk.
#pragma once

#include "cpu_logits.h"

namespace diffkv {

// Where the sums go: the pool's significance, to which they are added, [B, slots] and [B, C]; `mean` over the group, else the maximum.
struct Scored {
  float *significance, *recent, *chunk;
  bool mean;
};

// sums[g, key] += probabilities of kRows queries from query i on.
template <typename Word>
inline void add_columns(const Problem& p, int64_t head, const Queries& q, int i, const Span& span, const KeyBlock& block,
                        const float* lse, float* sums) {
  alignas(64) float logits[kRows * kKeys];
  const int count = rounded_up(seen(q, i + kRows - 1, span), kStrip);
  if (count == 0) return;
  block_logits<Word>(p, q, i, span, block, count, logits);
  for (int row = 0; row < std::min(kRows, q.count() - i); ++row) {
    const float total = lse[query_index(p, head, q, i + row)] * kLog2E;
    const float* line = logits + row * kKeys;
    float* to = sums + (i + row) % q.group * kKeys;
    for (int at = 0; at < count; at += kLanes) store(to + at, load<Floats>(to + at) + exp2(load<Floats>(line + at) - total));
  }
}

// Gives the keys of a span what they got: one score of the group.
inline void deliver(const Problem& p, int64_t head, const Span& span, const float* sums, const Scored& to) {
  for (int at = 0; at < span.count; at += kLanes) {
    const Floats scores = over_group(p.chunk.group, to.mean, [&](int g) { return load<Floats>(sums + g * kKeys + at); });
    const int live = std::min(kLanes, span.count - at);
    if (span.stored()) {
      float* sums = to.significance + p.heads.strip(head, span.tier(), (span.first + at) / kStrip).token + at % kStrip;
      for (int i = 0; i < live; ++i) sums[i] += scores[i];
    } else {
      float* row = span.source == Source::recent ? to.recent + head * p.heads.slots : to.chunk + head * p.chunk.rows;
      std::memcpy(row + span.first + at, &scores, live * sizeof(float));
    }
  }
}

// The sums of one span over rows [first, C) of the chunk.
template <typename Word>
void score_span(const Problem& p, int64_t head, int first, const Span& span, const float* lse, const Scored& to) {
  float* sums = scratch<struct Columns, float>(p.chunk.group * kKeys);
  std::fill_n(sums, p.chunk.group * kKeys, 0.0f);
  const KeyBlock block = pack_keys<Word>(p, head, span);
  const int step = rows_at_once(p);
  for (int row = first; row < p.chunk.rows; row += step) {
    Queries q = pack_queries<Word>(p, head, row, std::min(row + step, p.chunk.rows));
    if (block.scale) sum_queries(p, head, q);
    for (int i = 0; i < q.padded(); i += kRows) add_columns<Word>(p, head, q, i, span, block, lse, sums);
  }
  deliver(p, head, span, sums, to);
}

}  // namespace diffkv
