// Decode attention over paged, mixed-precision tiers on the CPU: pallas_kernels/decode_attention/api.py says what it computes.
//
// The tokens of a head are cut into splits, so one long request keeps all cores busy and the result does not depend on how many there are.
// Then the splits of a head are merged and every token's share is added to its significance: all logits of a step are kept, in a buffer
// that outlives the call.
#include "cpu_split.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

// Turns the maximum of every split, a query head, into its weight among those of its head: exp(its maximum - M) / sum over splits of
// total * exp(maximum - M).
void share(const Problem& p) {
  for (size_t first = 0, end; first < p.splits.size(); first = end) {
    for (end = first + 1; !p.splits[end - 1].last;) ++end;
    for (int h = 0; h < p.group; ++h) {
      float most = -INFINITY, total = 0;
      for (size_t s = first; s < end; ++s) most = std::max(most, p.splits[s].state[h]);
      for (size_t s = first; s < end; ++s) {
        float* state = p.splits[s].state;
        state[h] = most > -INFINITY ? std::exp(state[h] - most) : 0;
        total += state[p.group + h] * state[h];
      }
      for (size_t s = first; s < end && total > 0; ++s) p.splits[s].state[h] /= total;
    }
  }
}

// The output of a head: the weighted sum over its splits, of which `last` is the last.
void sum_outputs(const Problem& p, const Split* last) {
  const int d = p.d();
  float* out = p.out + int64_t(last->head) * p.group * d;
  std::fill(out, out + p.group * d, 0.0f);
  for (const Split* split = last - last->first / kSplitStrips; split <= last; ++split) {
    for (int h = 0; h < p.group; ++h) {
      for (int c = 0; c < d; ++c) out[h * d + c] += split->state[h] * split->state[2 * p.group + h * d + c];
    }
  }
}

// Adds to the significance of every token of a split its share, the maximum or the mean over the query heads.
void score(const Problem& p, const Split& split) {
  const auto shares = [&](int64_t slot) {
    return over_group(p.group, p.mean, [&](int h) { return load<Floats>(split.p + h * split.slots + slot) * split.state[h]; });
  };
  for (int i = 0; i < split.count; ++i) {
    const Strip strip = p.strip(split.head, split.first + i);
    for (int half = 0; half < 2; ++half) {
      float* to = p.significance + strip.token + half * kLanes;
      const Ints live = lanes() + half * kLanes < strip.live;
      const Floats old = load<Floats>(to);
      store(to, select(live, old + shares(i * kStrip + half * kLanes), old));
    }
  }
  if (!split.last) return;
  float* recent = p.recent_scores + split.head * p.heads.slots;
  for (int i = 0; i < p.slots(); i += kLanes) {
    const Floats scores = shares(int64_t(split.count) * kStrip + i);
    std::memcpy(recent + i, &scores, std::min(kLanes, p.slots() - i) * sizeof(float));
  }
}

// Cuts every head into splits and gives them their places in the buffer.
void plan(Problem& p) {
  const int64_t window = (p.slots() + kLanes - 1) / kLanes * kLanes, state = (2 + p.d()) * p.group;
  int64_t numbers = 0;
  for (int64_t head = 0; head < p.heads.count; ++head) {
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

// Sets `table` to what a codec has learned in a layer, float16 or bfloat16 `[L, kv heads, ...]`; or says that it does not fit the codec and the heads.
ffi::Error read_table(Table& table, const Codec& codec, const ffi::AnyBuffer& learned, int64_t layer, const Heads& heads) {
  const int64_t numbers = codec.table_size(heads.d());
  if (numbers == 0) return ffi::Error::Success();
  const auto shape = learned.dimensions();
  if (shape.size() < 3 || layer >= shape[0] || shape[1] < 1 || heads.count % shape[1] || learned.element_count() != size_t(shape[0] * shape[1] * numbers)) {
    return ffi::Error::InvalidArgument("learned tables that do not fit the codec, the layers or the heads");
  }
  const auto* data = static_cast<const uint16_t*>(learned.untyped_data()) + layer * shape[1] * numbers;
  table = {{data, learned.element_type() == ffi::DataType::BF16}, numbers, shape[1]};
  return ffi::Error::Success();
}

ffi::Error decode_attention(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::Buffer<ffi::U8> payload, ffi::AnyBuffer meta,
                            ffi::Buffer<ffi::F32> significance, ffi::AnyBuffer position, ffi::Buffer<ffi::S32> table,
                            ffi::Buffer<ffi::S32> lengths, ffi::AnyBuffer recent_k, ffi::AnyBuffer recent_v,
                            ffi::Buffer<ffi::S32> recent_lengths, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> query_position,
                            ffi::AnyBuffer keys0, ffi::AnyBuffer values0, ffi::AnyBuffer keys1, ffi::AnyBuffer values1,
                            ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> significance_out,
                            ffi::ResultBuffer<ffi::F32> recent_scores, ffi::Span<const int64_t> formats,
                            ffi::Span<const float> frequencies, float sm_scale, float cap, int64_t sliding, bool mean) {
  (void)significance;  // the result lies in its memory
  Problem p{};
  auto error = Heads::read(p.heads, formats, payload, meta, position.dimensions()[1], table, lengths, recent_k, recent_v, recent_lengths,
                           layer);
  if (error.failure()) return error;
  const ffi::AnyBuffer* learned[2][2] = {{&keys0, &values0}, {&keys1, &values1}};
  for (int t = 0; t < p.layout().tiers; ++t) {
    const Codec* codecs[2] = {&p.layout().tier[t].key, &p.layout().tier[t].value};
    for (int i = 0; i < 2; ++i) {
      error = read_table(p.tables[t][i], *codecs[i], *learned[t][i], layer.typed_data()[0], p.heads);
      if (error.failure()) return error;
    }
  }
  if (frequencies.size() && frequencies.size() * 2 != size_t(p.d())) return ffi::Error::InvalidArgument("a frequency for each pair of channels");
  p.frequencies = frequencies;
  const Numbers numbers = Numbers::of(q);
  const int64_t count = q.element_count();
  float* queries = scratch<struct QueryNumbers, float>(count);
  for (int64_t i = 0; i < count; ++i) queries[i] = numbers.number(i);
  p.group = int(q.dimensions()[1]), p.queries = queries, p.pairs = numbers.type == Exact::bfloat16;
  p.sm_scale = sm_scale, p.cap = cap, p.sliding = int(sliding), p.query_position = query_position.typed_data();
  p.token_data = {significance_out->typed_data(), position.untyped_data(), position.element_type() == ffi::DataType::S32};
  p.scored = significance_out->dimensions()[1] > 0, p.mean = mean, p.significance = significance_out->typed_data();
  p.out = out->typed_data(), p.recent_scores = recent_scores->typed_data();
  plan(p);
  parallel_for(threads, p.splits.size(), [&](int64_t i) { attend(p, p.splits[i]); });
  share(p);
  if (!p.scored) std::fill_n(p.recent_scores, recent_scores->element_count(), 0.0f);
  parallel_for(threads, p.splits.size(), [&](int64_t i) {
    if (p.splits[i].last) sum_outputs(p, &p.splits[i]);
    if (p.scored) score(p, p.splits[i]);
  });
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
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const float>>("frequencies")
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("sliding")
                                  .Attr<bool>("mean"));
