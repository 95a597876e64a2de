// What the heads of one layer hold besides the chunk: stored tokens, recent windows.
#pragma once

#include "elements.h"
#include "heads.h"

namespace diffkv {

// An array of floating numbers, read as float32.
struct Numbers {
  const char* data;
  Exact type;

  static Numbers of(const xla::ffi::AnyBuffer& buffer) {
    return {static_cast<const char*>(buffer.untyped_data()), exact_type(buffer.element_type())};
  }
  int64_t bytes() const { return type == Exact::float32 ? 4 : 2; }
  Numbers from(int64_t i) const { return {data + i * bytes(), type}; }

  // Sixteen numbers from `i` on.
  Floats vector(int64_t i) const { return elements(data, type, i); }
  // The first `n` of them, then zeros; nothing beyond is read.
  Floats vector(int64_t i, int64_t n) const {
    if (n >= kLanes) return vector(i);
    if (n <= 0) return Floats{};
    char some[kLanes * 4] = {};
    std::memcpy(some, data + i * bytes(), n * bytes());
    return elements(some, type, 0);
  }
};

struct Heads {
  Pool pool;
  int64_t count, max_pages, slots;  // heads; columns of the page table; slots of a recent window
  const int32_t *table, *lengths, *recent_lengths;
  Numbers recent_k, recent_v;  // [count, slots, head_dim] of the layer

  int d() const { return pool.layout.head_dim; }
  int64_t length(int64_t head, int tier) const { return lengths[head * pool.layout.tiers + tier]; }
  Strip strip(int64_t head, int tier, int64_t i) const {
    return pool.strip(table + head * max_pages, max_pages, tier, i, length(head, tier));
  }

  // Lengths and page ids that would lead out of an array.
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

}  // namespace diffkv
