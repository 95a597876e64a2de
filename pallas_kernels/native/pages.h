// The pool as kernels see it: formats, and strips of 32 tokens found through a page table (docs/design.md 2).
#pragma once

#include <cstdint>

#include "codecs.h"

namespace diffkv {

constexpr int kStrip = 32;  // tokens that are handled at once; divides the lanes of a page

struct Tier {
  Codec key, value;
  int blocks;  // of `tokens` tokens in a page
};

struct Layout {
  int head_dim, tokens, rows, meta_rows, token_data_rows, tiers;
  Tier tier[2];

  // `formats` holds key code, key groups, value code, value groups and blocks of each tier.
  template <typename Numbers>
  static Layout make(const Numbers& formats, int64_t head_dim, int64_t tokens, int64_t rows, int64_t meta_rows, int64_t token_data_rows) {
    Layout layout{int(head_dim), int(tokens), int(rows), int(meta_rows), int(token_data_rows), int(formats.size() / 5), {}};
    for (int t = 0; t < layout.tiers; ++t) {
      const int64_t* f = &formats[5 * t];
      layout.tier[t] = {Codec::make(f[0], f[1], head_dim), Codec::make(f[2], f[3], head_dim), int(f[4])};
    }
    return layout;
  }
  int64_t strips(int64_t length) const { return (length + kStrip - 1) / kStrip; }
  int64_t pages(int t, int64_t length) const { return (length + tier[t].blocks * tokens - 1) / (tier[t].blocks * tokens); }
};

// 32 tokens of one tensor: row r of payload or metadata begins `r * stride` further.
struct Stored {
  const uint8_t* payload;
  const uint16_t* meta;  // as pallas_kernels/codecs/scales.py keeps numbers
};

// Row `row` of the metadata of the first or second 16 tokens.
inline Shorts metadata(const Stored& at, int row, int stride, int half) {
  return load<Shorts>(at.meta + int64_t(row) * stride + half * kLanes);
}

// Scale and zero point of a group of the first or second 16 tokens, as far as a codec has them; else 1 and 0.
struct Grid {
  Floats scale = splat(1), zero = {};

  static Grid read(const Stored& at, const Codec& codec, int group, int stride, int half) {
    Grid grid;
    if (!codec.scaled) return grid;
    const Shorts scale = metadata(at, group, stride, half);
    grid.scale = scale_of(scale);
    if (codec.zeroed) grid.zero = zero_of(scale, metadata(at, codec.groups + group, stride, half));
    return grid;
  }
};

// Asks for 32 tokens before they are needed: pages lie anywhere, so the CPU cannot guess the next one.
inline void prefetch(const Stored& at, const Codec& codec, int stride) {
  const int step = stride < 64 ? 64 / stride : 1;
  for (int row = 0; row < codec.rows; row += step) __builtin_prefetch(at.payload + row * stride);
  for (int row = 0; row < codec.meta_rows(); ++row) __builtin_prefetch(at.meta + row * stride);
}

struct Strip {
  Stored key, value;
  int64_t token;  // index of its first token in significance and position
  int tier, live;
};

struct Pool {
  const uint8_t* payload;
  const uint16_t* meta;
  Layout layout;

  // Strip number `i` of a tier that holds `length` tokens; tier 0 grows from the left end of the table, tier 1 from the right.
  Strip strip(const int32_t* table, int64_t max_pages, int t, int64_t i, int64_t length) const {
    const Tier& tier = layout.tier[t];
    const int64_t per_block = layout.tokens / kStrip, per_page = tier.blocks * per_block;
    const int64_t column = i / per_page, block = i % per_page / per_block, lane = i % per_block * kStrip;
    const int64_t page = table[t == 0 ? column : max_pages - 1 - column];
    const uint8_t* rows = payload + page * layout.rows * layout.tokens + lane;
    const uint16_t* metas = meta + page * layout.meta_rows * layout.tokens + lane;
    const int64_t key_row = block * tier.key.rows, value_row = tier.blocks * tier.key.rows + block * tier.value.rows;
    const int64_t key_meta = block * tier.key.meta_rows(), value_meta = tier.blocks * tier.key.meta_rows() + block * tier.value.meta_rows();
    const int64_t left = length - i * kStrip;
    return {{rows + key_row * layout.tokens, metas + key_meta * layout.tokens},
            {rows + value_row * layout.tokens, metas + value_meta * layout.tokens},
            (page * layout.token_data_rows + block) * layout.tokens + lane,
            t,
            static_cast<int>(left < kStrip ? left : kStrip)};
  }
};

// Calls `body` with std::integral_constant 1 to 4 for the next query heads until `heads` are done: body(first, count).
template <typename Body>
void over_heads(int heads, const Body& body) {
  int first = 0;
  for (; heads - first >= 4; first += 4) body(first, std::integral_constant<int, 4>{});
  if (heads - first == 3) body(first, std::integral_constant<int, 3>{});
  if (heads - first == 2) body(first, std::integral_constant<int, 2>{});
  if (heads - first == 1) body(first, std::integral_constant<int, 1>{});
}

}  // namespace diffkv
