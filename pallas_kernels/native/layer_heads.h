// What the heads of one layer hold: stored tokens and a recent window each.
#pragma once

#include "elements.h"
#include "heads.h"

namespace diffkv {

struct Heads {
  Pool pool;
  int64_t count, max_pages, slots;  // heads; columns of the page table; slots of a recent window
  const int32_t *table, *lengths, *recent_lengths;
  Numbers recent_k, recent_v;  // [count, slots, head_dim] of the layer

  // Sets `heads` from a kernel's operands, or says what is wrong with them: lengths and page ids that would lead out of an array.
  static xla::ffi::Error read(Heads& heads, xla::ffi::Span<const int64_t> formats, const xla::ffi::Buffer<xla::ffi::U8>& payload,
                              const xla::ffi::AnyBuffer& meta, int64_t token_data_rows, const xla::ffi::Buffer<xla::ffi::S32>& table,
                              const xla::ffi::Buffer<xla::ffi::S32>& lengths, const xla::ffi::AnyBuffer& recent_k,
                              const xla::ffi::AnyBuffer& recent_v, const xla::ffi::Buffer<xla::ffi::S32>& recent_lengths,
                              const xla::ffi::Buffer<xla::ffi::S32>& layer) {
    const auto window = recent_k.dimensions(), pages = payload.dimensions();
    const int64_t at = layer.typed_data()[0], count = window[1], slots = window[2], d = window[3];
    if (auto error = check_layer(recent_k, at); error.failure()) return error;
    const Layout layout = Layout::make(formats, d, pages[2], pages[1], meta.dimensions()[1], token_data_rows);
    const int64_t offset = at * count * slots * d;
    heads = {{payload.typed_data(), static_cast<const uint16_t*>(meta.untyped_data()), layout},
             count,
             table.dimensions()[1],
             slots,
             table.typed_data(),
             lengths.typed_data(),
             recent_lengths.typed_data(),
             Numbers::of(recent_k).from(offset),
             Numbers::of(recent_v).from(offset)};
    return heads.outside(pages[0]);
  }

  int d() const { return pool.layout.head_dim; }
  int64_t length(int64_t head, int tier) const { return lengths[head * pool.layout.tiers + tier]; }
  Strip strip(int64_t head, int tier, int64_t i) const {
    return pool.strip(table + head * max_pages, max_pages, tier, i, length(head, tier));
  }

  xla::ffi::Error outside(int64_t num_pages) const {
    using xla::ffi::Error;
    if (pool.layout.tokens % kStrip) return Error::InvalidArgument("the lanes of a page must be a multiple of 32");
    for (int64_t head = 0; head < count; ++head) {
      if (recent_lengths[head] < 0 || recent_lengths[head] > slots) return Error::InvalidArgument("recent_len outside the recent window");
      const Held held{table + head * max_pages, lengths + head * pool.layout.tiers, max_pages};
      if (auto error = check(pool.layout, held, num_pages); error.failure()) return error;
    }
    return Error::Success();
  }
};

// One score of the query heads of a group: the mean or the largest of score(h), none of which is negative.
template <typename Score>
inline Floats over_group(int group, bool mean, const Score& score) {
  Floats result = {};
  if (mean) {
    for (int h = 0; h < group; ++h) result += score(h);
    return result / float(group);
  }
  for (int h = 0; h < group; ++h) result = max(result, score(h));
  return result;
}

}  // namespace diffkv
