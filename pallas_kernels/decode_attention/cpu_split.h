// One split of a head: up to 1,024 stored tokens, with the last of them the recent window. Three passes: logits of its keys, exponentials
// relative to their maximum, values.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_strips.h"
#include "decode.h"
#include "layer_heads.h"
#include "rope.h"
#include "scratch.h"

namespace diffkv {

constexpr int kSplitStrips = 32;
constexpr int kAhead = 4;  // strips of keys asked for in advance

struct Split {
  int head, first, count;  // strips of the head, counted over its tiers
  bool last;               // takes the recent window too
  int64_t slots;           // logits of one query head
  float *p, *state;        // [G, slots]; maximum, total [G] each and output [G, d]
};

// What a codec has learned: a table for each KV head of the layer.
struct Table {
  Learned all;
  int64_t numbers, kv_heads;

  Learned of(int head) const { return {numbers ? all.data + head % kv_heads * numbers : nullptr, all.bfloat16}; }
};

struct Problem {
  Heads heads;
  Table tables[2][2];                     // of K and V in each tier
  xla::ffi::Span<const float> frequencies;  // of the rotary embedding that stored keys still need; none when empty
  int group;            // query heads a KV head
  bool pairs, scored;   // multiply in bfloat16; add to the significance
  bool mean;            // over the group, else the maximum
  float sm_scale, cap;  // cap 0 = none
  int sliding;          // 0 = none
  const int32_t* query_position;
  const float* queries;  // [B, G, d]
  TokenData token_data;
  float *significance, *recent_scores, *out;
  std::vector<Split> splits;

  int d() const { return heads.d(); }
  const Layout& layout() const { return heads.pool.layout; }
  int slots() const { return int(heads.slots); }
  int64_t strips(int head) const {
    int64_t n = 0;
    for (int t = 0; t < layout().tiers; ++t) n += layout().strips(heads.length(head, t));
    return n;
  }
  // Strip of a head, counted over its tiers.
  Strip strip(int head, int64_t i) const {
    const int64_t first = layout().strips(heads.length(head, 0));
    const int t = i >= first;
    return heads.strip(head, t, t ? i - first : i);
  }
  // Where a recent token begins, in numbers.
  int64_t recent(int head, int slot) const { return (head * heads.slots + slot) * d(); }
};

inline Queries prepare(const Problem& p, int head) {
  const int d = p.d(), n = p.group * d;
  const float* exact = p.queries + int64_t(head) * n;
  uint16_t* rounded = scratch<struct Rounded, uint16_t>(2 * n);
  float* prefix = scratch<struct Prefix, float>(p.group * (d + 1));
  for (int i = 0; i < n; ++i) {
    rounded[i] = to_bfloat16(exact[i]);
    rounded[n + i] = to_bfloat16(16 * exact[i]);
  }
  for (int h = 0; h < p.group; ++h) {
    prefix[h * (d + 1)] = 0;
    for (int c = 0; c < d; ++c) prefix[h * (d + 1) + c + 1] = prefix[h * (d + 1) + c] + exact[h * d + c];
  }
  return {p.group, d, p.pairs, exact, rounded, rounded + n, prefix};
}

// Logits of 16 tokens from their dot products; -inf where not `seen`.
inline void finish(const Problem& p, float* logits, Ints seen) {
  Floats x = load<Floats>(logits) * p.sm_scale;
  if (p.cap > 0) x = soft_cap(x, p.cap);
  store(logits, select(seen, x, splat(-INFINITY)));
}

// key_products of keys that are decoded first.
inline void decoded_keys(const Problem& p, const Queries& q, int head, const Strip& strip, float* logits, int64_t pitch) {
  const int d = p.d();
  Floats* k = decoded(p.layout().tier[strip.tier].key, strip.key, p.layout().tokens, d, p.tables[strip.tier][0].of(head), strip.live);
  if (p.frequencies.size()) {
    turn_pairs(k, d, p.frequencies.begin(), {p.token_data.position_at(strip.token), p.token_data.position_at(strip.token + kLanes)});
  }
  over_heads(p.group, [&](int first, auto heads) {
    Floats total[heads][2] = {};
    for (int c = 0; c < d; ++c) {
      for (int h = 0; h < heads; ++h) {
        const float factor = q.exact[(first + h) * d + c];
        for (int half = 0; half < 2; ++half) total[h][half] += factor * k[2 * c + half];
      }
    }
    for (int h = 0; h < heads; ++h) {
      for (int half = 0; half < 2; ++half) store(logits + (first + h) * pitch + half * kLanes, total[h][half]);
    }
  });
}

inline void stored_keys(const Problem& p, const Queries& q, int head, const Strip& strip, float* logits, int64_t pitch) {
  const Codec& codec = p.layout().tier[strip.tier].key;
  const int stride = p.layout().tokens;
  if (codec.decoded_first() || p.frequencies.size()) return decoded_keys(p, q, head, strip, logits, pitch);
  with_reader(codec.code, [&](auto reader) {
    using Reader = decltype(reader);
    over_heads(p.group, [&](int first, auto count) {
      float* to = logits + first * pitch;
      if constexpr (pairs_possible<Reader>) {
        if (q.bfloat16 && pairs_fit(codec, q.head_dim)) {
          return key_products<Reader, true, count>(q, first, codec, strip.key, stride, to, pitch);
        }
      }
      key_products<Reader, false, count>(q, first, codec, strip.key, stride, to, pitch);
    });
  });
}

inline void key_strip(const Problem& p, const Queries& q, int head, const Strip& strip, float* logits, int64_t pitch) {
  stored_keys(p, q, head, strip, logits, pitch);
  for (int half = 0; half < 2; ++half) {
    Ints seen = lanes() + half * kLanes < strip.live;
    if (p.sliding) seen &= p.token_data.position_at(strip.token + half * kLanes) > p.query_position[head] - p.sliding;
    for (int h = 0; h < p.group; ++h) finish(p, logits + h * pitch + half * kLanes, seen);
  }
}

inline void recent_logits(const Problem& p, const Queries& q, int head, float* logits, int64_t pitch, int64_t width) {
  const int live = p.heads.recent_lengths[head], d = p.d();
  for (int i = 0; i < width; i += kLanes) {
    const Ints slot = lanes() + i;
    if (i >= live) {
      for (int h = 0; h < p.group; ++h) store(logits + h * pitch + i, splat(-INFINITY));
      continue;
    }
    int64_t rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = head * p.heads.slots + std::min(i + lane, live - 1);
    const float* k = columns(p.heads.recent_k.data, p.heads.recent_k.type, d, rows);
    over_heads(p.group, [&](int first, auto heads) {
      Floats total[heads] = {};
      for (int c = 0; c < d; ++c) {
        for (int h = 0; h < heads; ++h) total[h] += q.exact[(first + h) * d + c] * load<Floats>(k + c * kLanes);
      }
      for (int h = 0; h < heads; ++h) store(logits + (first + h) * pitch + i, total[h]);
    });
    const Ints seen = (slot < live) & (p.sliding ? live - 1 - slot < p.sliding : slot < live);
    for (int h = 0; h < p.group; ++h) finish(p, logits + h * pitch + i, seen);
  }
}

// Weights of a panel scaled by every group of the values, and out[h, c] += sum(p z) less the bias of the bfloat16 codes.
inline PanelWeights weigh(const Problem& p, const Codec& codec, bool pairs, const Strip* strips, int count, const float* weights, int64_t pitch,
                   float* constant) {
  const int groups = codec.groups, d = p.d(), width = d / groups, stride = p.layout().tokens;
  const int64_t n = int64_t(groups) * p.group * kPanel * kStrip;
  float* exact = scratch<struct PanelExact, float>(n);
  uint16_t* rounded = scratch<struct PanelRounded, uint16_t>(2 * n);
  for (int group = 0; group < groups; ++group) {
    Floats* sums = scratch<struct PanelSums, Floats>(2 * p.group);  // of weight * zero and of the rounded weights, a query head
    std::fill(sums, sums + 2 * p.group, Floats{});
    for (int s = 0; s < count; ++s) {
      for (int half = 0; half < 2; ++half) {
        auto [scale, zero] = Grid::read(strips[s].value, codec, group, stride, half);
        if (codec.scaled) {
          const Ints live = lanes() + half * kLanes < strips[s].live;
          scale = select(live, scale, Floats{}), zero = select(live, zero, Floats{});
        }
        for (int h = 0; h < p.group; ++h) {
          const int64_t at = ((int64_t(group) * p.group + h) * kPanel + s) * kStrip + half * kLanes;
          const Floats w = load<Floats>(weights + h * pitch + s * kStrip + half * kLanes);
          sums[2 * h] += w * zero;
          if (!pairs) {
            store(exact + at, w * scale);
            continue;
          }
          const Shorts bits = to_bfloat16(w * scale);
          const Floats kept = from_bfloat16(bits);
          store(rounded + at, bits);
          if (codec.bits == 8) store(rounded + n + at, to_bfloat16(kept * 16.0f));
          sums[2 * h + 1] += kept;
        }
      }
    }
    for (int h = 0; h < p.group; ++h) {
      const float part = sum(sums[2 * h]) - (pairs ? codec.bias * sum(sums[2 * h + 1]) : 0.0f);
      for (int c = 0; c < width; ++c) constant[h * d + group * width + c] += part;
    }
  }
  return {exact, rounded, rounded + n};
}

// value_products of values that are decoded first.
inline void decoded_values(const Problem& p, int head, const Strip& strip, const float* weights, int64_t pitch, Floats* out) {
  const int d = p.d();
  const Floats* v = decoded(p.layout().tier[strip.tier].value, strip.value, p.layout().tokens, d, p.tables[strip.tier][1].of(head), strip.live);
  over_heads(p.group, [&](int first, auto heads) {
    Floats weight[heads][2];
    for (int h = 0; h < heads; ++h) {
      for (int half = 0; half < 2; ++half) weight[h][half] = load<Floats>(weights + (first + h) * pitch + half * kLanes);
    }
    for (int c = 0; c < d; ++c) {
      for (int h = 0; h < heads; ++h) out[(first + h) * d + c] += weight[h][0] * v[2 * c] + weight[h][1] * v[2 * c + 1];
    }
  });
}

inline void value_panel(const Problem& p, int head, const Strip* strips, int count, const float* weights, int64_t pitch, Floats* out,
                        float* constant) {
  const Codec& codec = p.layout().tier[strips[0].tier].value;
  if (codec.decoded_first()) {
    for (int s = 0; s < count; ++s) decoded_values(p, head, strips[s], weights + s * kStrip, pitch, out);
    return;
  }
  const bool pairs = p.pairs && pairs_fit(codec, p.d());
  const PanelWeights panel = weigh(p, codec, pairs, strips, count, weights, pitch, constant);
  const int stride = p.layout().tokens;
  with_reader(codec.code, [&](auto reader) {
    using Reader = decltype(reader);
    over_heads(p.group, [&](int first, auto heads) {
      const auto multiply = [&](auto in_pairs, auto one_group) {
        value_products<Reader, in_pairs, one_group, heads>(codec, p.d(), p.group, first, strips, count, stride, panel, out);
      };
      if constexpr (pairs_possible<Reader>) {
        if (pairs) return codec.groups == 1 ? multiply(std::true_type{}, std::true_type{}) : multiply(std::true_type{}, std::false_type{});
      }
      multiply(std::false_type{}, std::false_type{});
    });
  });
}

inline void recent_values(const Problem& p, int head, const float* weights, int64_t pitch, float* out) {
  const int d = p.d(), live = p.heads.recent_lengths[head];
  over_heads(p.group, [&](int first, auto heads) {
    int c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      Floats total[heads] = {};
      for (int i = 0; i < live; ++i) {
        const Floats v = p.heads.recent_v.vector(p.recent(head, i) + c);
        for (int h = 0; h < heads; ++h) total[h] += weights[(first + h) * pitch + i] * v;
      }
      for (int h = 0; h < heads; ++h) store(out + (first + h) * d + c, load<Floats>(out + (first + h) * d + c) + total[h]);
    }
    for (; c < d; ++c) {
      for (int i = 0; i < live; ++i) {
        const float v = p.heads.recent_v.number(p.recent(head, i) + c);
        for (int h = 0; h < heads; ++h) out[(first + h) * d + c] += weights[(first + h) * pitch + i] * v;
      }
    }
  });
}

// Logits to exponentials relative to their maximum.
inline void exponentials(const Problem& p, const Split& split) {
  for (int h = 0; h < p.group; ++h) {
    float* logits = split.p + h * split.slots;
    Floats most = splat(-INFINITY), total = {};
    for (int64_t i = 0; i < split.slots; i += kLanes) most = max(most, load<Floats>(logits + i));
    const float maximum = largest(most), safe = maximum > -INFINITY ? maximum : 0;
    for (int64_t i = 0; i < split.slots; i += kLanes) {
      const Floats e = exp(load<Floats>(logits + i) - safe);
      store(logits + i, e);
      total += e;
    }
    split.state[h] = maximum;
    split.state[p.group + h] = sum(total);
  }
}

inline void attend(const Problem& p, const Split& split) {
  const int d = p.d(), n = p.group * d;
  const Queries q = prepare(p, split.head);
  Strip strips[kSplitStrips];
  const Layout& layout = p.layout();
  for (int i = 0; i < split.count; ++i) strips[i] = p.strip(split.head, split.first + i);
  for (int i = 0; i < split.count; ++i) {
    if (i + kAhead < split.count) prefetch(strips[i + kAhead].key, layout.tier[strips[i + kAhead].tier].key, layout.tokens);
    key_strip(p, q, split.head, strips[i], split.p + i * kStrip, split.slots);
  }
  const int64_t stored = int64_t(split.count) * kStrip;
  if (split.last) recent_logits(p, q, split.head, split.p + stored, split.slots, split.slots - stored);
  exponentials(p, split);
  Floats* partial = scratch<struct PartialSums, Floats>(n);
  float* out = split.state + 2 * p.group;
  std::fill(partial, partial + n, Floats{});
  std::fill(out, out + n, 0.0f);
  for (int i = 0, count; i < split.count; i += count) {
    for (count = 1; count < kPanel && i + count < split.count && strips[i + count].tier == strips[i].tier;) ++count;
    for (int next = i + count; next < std::min(i + count + kPanel, split.count); ++next) {
      prefetch(strips[next].value, layout.tier[strips[next].tier].value, layout.tokens);
    }
    value_panel(p, split.head, strips + i, count, split.p + i * kStrip, split.slots, partial, out);
  }
  if (split.last) recent_values(p, split.head, split.p + stored, split.slots, out);
  for (int i = 0; i < n; ++i) out[i] += sum(partial[i]);
}

}  // namespace diffkv
