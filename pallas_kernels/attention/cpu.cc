// Decode attention over paged, mixed-precision tiers on the CPU: pallas_kernels/attention/api.py says what it computes.
//
// The tokens of a head are cut into splits of at most 1,024, so one long request keeps all cores busy and the result does not depend on
// how many there are. Three passes over a split: logits of its keys, exponentials relative to their maximum, values. Then the splits of a
// head are merged and every token's share is added to its significance: all logits of a step are kept, in a buffer that outlives the call.
#include <algorithm>
#include <vector>

#include "cpu_strips.h"
#include "elements.h"
#include "heads.h"
#include "parallel.h"
#include "scratch.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int kSplitStrips = 32;
constexpr int kAhead = 4;  // strips of keys asked for in advance

struct Split {
  int head, first, count;  // strips of the head, counted over its tiers
  bool last;               // takes the recent window too
  int64_t slots;           // logits of one query head
  float *p, *state;        // [G, slots]; maximum, total [G] each and output [G, d]
};

struct Problem {
  Pool pool;
  int group, slots;  // query heads a KV head; slots of the recent window
  int64_t max_pages;
  float sm_scale, cap;
  bool capped, scored, wide_position, pairs;
  const int32_t *table, *lengths, *recent_lengths, *query_position;
  int sliding;  // 0 = none
  const void *recent_k, *recent_v, *position;
  Exact recent_type;
  const float* queries;  // [B, G, d]
  float *significance, *recent_scores, *out;
  std::vector<Split> splits;

  int d() const { return pool.layout.head_dim; }
  int64_t length(int head, int tier) const { return lengths[head * pool.layout.tiers + tier]; }
  int64_t strips(int head) const {
    int64_t n = 0;
    for (int t = 0; t < pool.layout.tiers; ++t) n += pool.layout.strips(length(head, t));
    return n;
  }
  Strip strip(int head, int64_t i) const {
    const int64_t first = pool.layout.strips(length(head, 0));
    const int t = i >= first;
    return pool.strip(table + head * max_pages, max_pages, t, t ? i - first : i, length(head, t));
  }
  // Offset of a recent token in elements.
  int64_t recent(int head, int slot) const { return (int64_t(head) * slots + slot) * d(); }
};

Queries prepare(const Problem& p, int head) {
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
void finish(const Problem& p, float* logits, Ints seen) {
  Floats x = load<Floats>(logits) * p.sm_scale;
  if (p.capped) x = soft_cap(x, p.cap);
  store(logits, select(seen, x, splat(-INFINITY)));
}

Ints within_window(const Problem& p, int head, const Strip& strip, int half) {
  Ints position;
  const int64_t at = strip.side + half * kLanes;
  if (p.wide_position) {
    position = load<Ints>(static_cast<const int32_t*>(p.position) + at);
  } else {
    position = widen(load<Shorts>(static_cast<const uint16_t*>(p.position) + at));
  }
  return position > p.query_position[head] - p.sliding;
}

void key_strip(const Problem& p, const Queries& q, int head, const Strip& strip, float* logits, int64_t pitch) {
  const Codec& codec = p.pool.layout.tier[strip.tier].key;
  const int stride = p.pool.layout.tokens;
  with_reader(codec, [&](auto reader) {
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
  for (int half = 0; half < 2; ++half) {
    Ints seen = lanes() + half * kLanes < strip.live;
    if (p.sliding) seen &= within_window(p, head, strip, half);
    for (int h = 0; h < p.group; ++h) finish(p, logits + h * pitch + half * kLanes, seen);
  }
}

void recent_logits(const Problem& p, const Queries& q, int head, float* logits, int64_t pitch, int64_t width) {
  const int live = p.recent_lengths[head], d = p.d();
  for (int i = 0; i < width; i += kLanes) {
    const Ints slot = lanes() + i;
    if (i >= live) {
      for (int h = 0; h < p.group; ++h) store(logits + h * pitch + i, splat(-INFINITY));
      continue;
    }
    int64_t rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = int64_t(head) * p.slots + std::min(i + lane, live - 1);
    const float* k = columns(p.recent_k, p.recent_type, d, rows);
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
PanelWeights weigh(const Problem& p, const Codec& codec, bool pairs, const Strip* strips, int count, const float* weights, int64_t pitch,
                   float* constant) {
  const int groups = codec.groups, d = p.d(), width = d / groups, stride = p.pool.layout.tokens;
  const int64_t n = int64_t(groups) * p.group * kPanel * kStrip;
  float* exact = scratch<struct PanelExact, float>(n);
  uint16_t* rounded = scratch<struct PanelRounded, uint16_t>(2 * n);
  for (int group = 0; group < groups; ++group) {
    Floats* sums = scratch<struct PanelSums, Floats>(2 * p.group);  // of weight * zero and of the rounded weights, a query head
    std::fill(sums, sums + 2 * p.group, Floats{});
    for (int s = 0; s < count; ++s) {
      for (int half = 0; half < 2; ++half) {
        Floats scale = splat(1), zero = {};
        if (codec.exact == Exact::no) {
          const Ints live = lanes() + half * kLanes < strips[s].live;
          scale = select(live, metadata(strips[s].value, group, stride, half), Floats{});
          zero = select(live, metadata(strips[s].value, groups + group, stride, half), Floats{});
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
      const float part = sum(sums[2 * h]) - (pairs ? bias(codec.bits) * sum(sums[2 * h + 1]) : 0.0f);
      for (int c = 0; c < width; ++c) constant[h * d + group * width + c] += part;
    }
  }
  return {exact, rounded, rounded + n};
}

void value_panel(const Problem& p, const Strip* strips, int count, const float* weights, int64_t pitch, Floats* out, float* constant) {
  const Codec& codec = p.pool.layout.tier[strips[0].tier].value;
  const bool pairs = p.pairs && pairs_fit(codec, p.d());
  const PanelWeights panel = weigh(p, codec, pairs, strips, count, weights, pitch, constant);
  const int stride = p.pool.layout.tokens;
  with_reader(codec, [&](auto reader) {
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

void recent_values(const Problem& p, int head, const float* weights, int64_t pitch, float* out) {
  const int d = p.d(), live = p.recent_lengths[head];
  over_heads(p.group, [&](int first, auto heads) {
    int c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      Floats total[heads] = {};
      for (int i = 0; i < live; ++i) {
        const Floats v = elements(p.recent_v, p.recent_type, p.recent(head, i) + c);
        for (int h = 0; h < heads; ++h) total[h] += weights[(first + h) * pitch + i] * v;
      }
      for (int h = 0; h < heads; ++h) store(out + (first + h) * d + c, load<Floats>(out + (first + h) * d + c) + total[h]);
    }
    for (; c < d; ++c) {
      for (int i = 0; i < live; ++i) {
        const float v = element(p.recent_v, p.recent_type, p.recent(head, i) + c);
        for (int h = 0; h < heads; ++h) out[(first + h) * d + c] += weights[(first + h) * pitch + i] * v;
      }
    }
  });
}

// Logits to exponentials relative to their maximum.
void exponentials(const Problem& p, const Split& split) {
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

void attend(const Problem& p, const Split& split) {
  const int d = p.d(), n = p.group * d;
  const Queries q = prepare(p, split.head);
  Strip strips[kSplitStrips];
  const Layout& layout = p.pool.layout;
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
    value_panel(p, strips + i, count, split.p + i * kStrip, split.slots, partial, out);
  }
  if (split.last) recent_values(p, split.head, split.p + stored, split.slots, out);
  for (int i = 0; i < n; ++i) out[i] += sum(partial[i]);
}

// Weight of a split among those of its head, a query head: exp(its maximum - M) / sum over splits of total * exp(maximum - M).
float share(const Problem& p, const Split* head, int splits, const Split& of, int h) {
  float most = -INFINITY, total = 0;
  for (int s = 0; s < splits; ++s) most = std::max(most, head[s].state[h]);
  if (most == -INFINITY) return 0;
  for (int s = 0; s < splits; ++s) total += head[s].state[p.group + h] * std::exp(head[s].state[h] - most);
  return std::exp(of.state[h] - most) / total;
}

void merge(const Problem& p, int64_t index) {
  const Split& split = p.splits[index];
  const Split* head = &split;
  while (head > p.splits.data() && head[-1].head == split.head) --head;
  int splits = 0;
  while (head + splits < p.splits.data() + p.splits.size() && head[splits].head == split.head) ++splits;
  const int d = p.d();
  if (split.last) {  // one of the splits writes the head's output
    float* out = p.out + int64_t(split.head) * p.group * d;
    std::fill(out, out + p.group * d, 0.0f);
    for (int s = 0; s < splits; ++s) {
      for (int h = 0; h < p.group; ++h) {
        const float weight = share(p, head, splits, head[s], h);
        for (int c = 0; c < d; ++c) out[h * d + c] += weight * head[s].state[2 * p.group + h * d + c];
      }
    }
  }
  if (!p.scored) {
    if (split.last) std::fill_n(p.recent_scores + int64_t(split.head) * p.slots, p.slots, 0.0f);
    return;
  }
  float* shares = scratch<struct Shares, float>(p.group);
  for (int h = 0; h < p.group; ++h) shares[h] = share(p, head, splits, split, h);
  const auto score = [&](int64_t slot) {
    Floats most = {};
    for (int h = 0; h < p.group; ++h) most = max(most, load<Floats>(split.p + h * split.slots + slot) * shares[h]);
    return most;
  };
  for (int i = 0; i < split.count; ++i) {
    const Strip strip = p.strip(split.head, split.first + i);
    for (int half = 0; half < 2; ++half) {
      float* to = p.significance + strip.side + half * kLanes;
      const Ints live = lanes() + half * kLanes < strip.live;
      const Floats old = load<Floats>(to);
      store(to, select(live, old + score(i * kStrip + half * kLanes), old));
    }
  }
  if (!split.last) return;
  float* recent = p.recent_scores + int64_t(split.head) * p.slots;
  for (int i = 0; i < p.slots; i += kLanes) {
    const Floats scores = score(int64_t(split.count) * kStrip + i);
    std::memcpy(recent + i, &scores, std::min(kLanes, p.slots - i) * sizeof(float));
  }
}

// Cuts every head into splits and gives them their places in the buffer.
void plan(Problem& p, int64_t heads) {
  const int64_t window = (p.slots + kLanes - 1) / kLanes * kLanes, state = (2 + p.d()) * p.group;
  int64_t numbers = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t strips = p.strips(head);
    for (int64_t first = 0; first == 0 || first < strips; first += kSplitStrips) {
      const int64_t count = std::min<int64_t>(kSplitStrips, strips - first);
      const bool last = first + count == strips;
      const int64_t slots = count * kStrip + (last ? window : 0);
      p.splits.push_back({int(head), int(first), int(count), last, slots, nullptr, nullptr});
      numbers += p.group * slots + (state + 15) / 16 * 16;
    }
  }
  float* next = scratch<struct SplitState, float>(numbers);
  for (Split& split : p.splits) {
    split.p = next;
    split.state = next + p.group * split.slots;
    next = split.state + (state + 15) / 16 * 16;
  }
}

ffi::Error check(const Problem& p, int64_t heads, int64_t num_pages) {
  for (int64_t head = 0; head < heads; ++head) {
    if (p.recent_lengths[head] < 0 || p.recent_lengths[head] > p.slots) return ffi::Error::InvalidArgument("recent_len outside the recent window");
    const Held held{p.table + head * p.max_pages, p.lengths + head * p.pool.layout.tiers, p.max_pages};
    if (auto error = check(p.pool.layout, held, num_pages); error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error decode_attention(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::Buffer<ffi::U8> payload, ffi::AnyBuffer meta,
                            ffi::Buffer<ffi::F32> significance, ffi::AnyBuffer position, ffi::Buffer<ffi::S32> table,
                            ffi::Buffer<ffi::S32> lengths, ffi::AnyBuffer recent_k, ffi::AnyBuffer recent_v,
                            ffi::Buffer<ffi::S32> recent_lengths, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> query_position,
                            ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> significance_out,
                            ffi::ResultBuffer<ffi::F32> recent_scores, ffi::Span<const int64_t> formats, float sm_scale, float cap,
                            int64_t sliding) {
  (void)significance;  // the result lies in its memory
  const auto shape = recent_k.dimensions(), pages = payload.dimensions();
  const int64_t heads = shape[1], group = q.dimensions()[1], d = shape[3];
  Problem p{};
  p.pool = {payload.typed_data(), static_cast<const uint16_t*>(meta.untyped_data()),
            Layout::make(formats, d, pages[2], pages[1], meta.dimensions()[1], position.dimensions()[1])};
  p.group = int(group), p.slots = int(shape[2]), p.max_pages = table.dimensions()[1];
  p.sm_scale = sm_scale, p.cap = cap, p.capped = cap > 0, p.sliding = int(sliding);
  p.scored = significance_out->dimensions()[1] > 0;
  p.wide_position = position.element_type() == ffi::DataType::S32;
  p.pairs = q.element_type() == ffi::DataType::BF16;
  p.table = table.typed_data(), p.lengths = lengths.typed_data(), p.recent_lengths = recent_lengths.typed_data();
  p.query_position = query_position.typed_data(), p.position = position.untyped_data();
  p.recent_type = exact_type(recent_k.element_type());
  const int32_t at = layer.typed_data()[0];
  if (at < 0 || at >= shape[0]) return ffi::Error::InvalidArgument("layer outside the recent windows");
  const int64_t offset = at * heads * shape[2] * d * (p.recent_type == Exact::float32 ? 4 : 2);
  p.recent_k = static_cast<const char*>(recent_k.untyped_data()) + offset;
  p.recent_v = static_cast<const char*>(recent_v.untyped_data()) + offset;
  p.out = out->typed_data(), p.significance = significance_out->typed_data(), p.recent_scores = recent_scores->typed_data();
  if (auto error = check(p, heads, pages[0]); error.failure()) return error;
  float* queries = scratch<struct QueryNumbers, float>(heads * group * d);
  for (int64_t i = 0; i < heads * group * d; ++i) queries[i] = element(q.untyped_data(), exact_type(q.element_type()), i);
  p.queries = queries;
  plan(p, heads);
  parallel_for(threads, p.splits.size(), [&](int64_t i) { attend(p, p.splits[i]); });
  parallel_for(threads, p.splits.size(), [&](int64_t i) { merge(p, i); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(decode_attention_cpu, decode_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("sliding"));
