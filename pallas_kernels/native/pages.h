// The pool as kernels see it: formats, and strips of 32 tokens found through a page table (docs/design.md 2).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "levels.h"

namespace diffkv {

constexpr int kStrip = 32;  // tokens that are handled at once; divides the lanes of a page

// How K or V is stored: `bits` a channel with `groups` scales and zero points, or with one scale as numbers of levels of the normal
// distribution, or exactly in a floating type; or `bits` for `channels` neighbouring channels, looked up in a learned table.
enum class Exact { no, bfloat16, float16, float32 };

struct Codec {
  int bits, groups, rows;
  Exact exact;
  bool normal;
  int channels;  // that share a code of a table; 0 = there is no table
  bool ranged;   // one table for all channels, of levels of the range that the token's scale and zero point tell
  int outliers;  // of a token, kept beside: rows of their channels behind the codes, rows of their values behind scale and zero point

  // `code` as `Codec.native` gives it: 1, 2, 4, 8 bits; 16 bfloat16, 17 float16, 32 float32; 64 + bits for normal levels,
  // 128 + bits for a table a group of `number` channels, 192 + bits for a table of levels of the token's range; 256 more an outlier.
  static Codec make(int64_t code, int64_t number, int64_t head_dim) {
    const int outliers = static_cast<int>(code / 256);
    code %= 256;
    const Exact exact = code == 16 ? Exact::bfloat16 : code == 17 ? Exact::float16 : code == 32 ? Exact::float32 : Exact::no;
    const int bits = static_cast<int>(code == 17 ? 16 : code > 64 ? code % 64 : code);
    const bool ranged = code > 192, table = code > 128;
    const int channels = ranged ? 1 : table ? static_cast<int>(number) : 0, groups = exact != Exact::no || table ? 1 : static_cast<int>(number);
    const int rows = static_cast<int>(head_dim / (table ? channels : 1) * bits / 8);
    return {bits, groups, rows + outliers, exact, code > 64 && !table, channels, ranged, outliers};
  }
  // Numbers of a head's table.
  int64_t table_size(int head_dim) const { return ranged ? 1 << bits : channels ? int64_t{head_dim} << bits : 0; }
  bool scaled() const { return exact == Exact::no && (!channels || ranged); }
  bool zeroed() const { return scaled() && !normal; }
  int meta_rows() const { return (scaled() + zeroed()) * groups + outliers; }
  // Whether products are taken with decoded numbers.
  bool decoded_first() const { return channels || outliers; }
};

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

// 16 bits each: bfloat16 in the lanes that are `wide`, else float16.
inline Floats either(Shorts bits, Ints wide) { return select(wide, from_bfloat16(bits), from_float16(bits)); }

// Which stored scales, and zero points beside them, are bfloat16: a scale is not negative, its sign bit says so.
inline Ints is_wide(Shorts scale) { return widen(scale) > 0x7FFF; }
inline Floats scale_of(Shorts scale) { return either(scale & 0x7FFF, is_wide(scale)); }
inline Floats zero_of(Shorts scale, Shorts zero) { return either(zero, is_wide(scale)); }

// Scale and zero point of a group of the first or second 16 tokens, as far as a codec has them; else 1 and 0.
struct Grid {
  Floats scale = splat(1), zero = {};

  static Grid read(const Stored& at, const Codec& codec, int group, int stride, int half) {
    Grid grid;
    if (!codec.scaled()) return grid;
    const Shorts scale = metadata(at, group, stride, half);
    grid.scale = scale_of(scale);
    if (codec.zeroed()) grid.zero = zero_of(scale, metadata(at, codec.groups + group, stride, half));
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

// Codes (or, of exact types, values) of 16 tokens: channel `row + plane * rows` lies in payload row `row`.
template <int Bits>
struct Uniform {
  static constexpr int bits = Bits, planes = 8 / Bits;
  static constexpr Exact type = Exact::no;
  static constexpr bool scaled = true, zeroed = true;
  static Floats read(const uint8_t* row, int plane, int64_t) {
    return to_floats((widen(load<Bytes>(row)) >> (plane * Bits)) & ((1 << Bits) - 1));
  }
};

// Levels of N(0, 1), pallas_kernels/codecs/normal.py: the upper half of a float32 each, so as exact in bfloat16 as the codes of Uniform.
template <int Bits>
struct Normal {
  static constexpr int bits = Bits, planes = 8 / Bits;
  static constexpr Exact type = Exact::no;
  static constexpr bool scaled = true, zeroed = false;
  static Floats read(const uint8_t* row, int plane, int64_t) {
    return normal_levels<Bits>(widen(load<Bytes>(row)) >> (plane * Bits));
  }
};

template <Exact Type>
struct Kept {
  static constexpr int bits = Type == Exact::float32 ? 32 : 16, planes = 1;
  static constexpr Exact type = Type;
  static constexpr bool scaled = false, zeroed = false;
  static Floats read(const uint8_t* row, int, int64_t next_byte) {
    const auto plane = [&](int i) { return widen(load<Bytes>(row + i * next_byte)); };
    if constexpr (Type == Exact::bfloat16) return as_floats((plane(1) << 24) | (plane(0) << 16));
    if constexpr (Type == Exact::float32) return as_floats((plane(3) << 24) | (plane(2) << 16) | (plane(1) << 8) | plane(0));
    return from_float16(__builtin_convertvector((plane(1) << 8) | plane(0), Shorts));
  }
};

// Calls body(std::integral_constant) for 0 to N - 1.
template <typename Body, int... I>
inline void unrolled(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, typename Body>
inline void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, N>{});
}

// Calls body(channel, row, plane) for the channels [from, to), plane by plane.
template <typename Reader, int Step = 1, typename Body>
inline void over_channels(int head_dim, int from, int to, const Body& body) {
  const int rows = head_dim / Reader::planes;
  for (int plane = 0; plane < Reader::planes; ++plane) {
    const int first = plane * rows, begin = from > first ? from - first : 0, end = to - first < rows ? to - first : rows;
    for (int row = begin; row < end; row += Step) body(first + row, row, plane);
  }
}

// Calls `body` with the reader of a codec.
template <typename Body>
auto with_reader(const Codec& codec, const Body& body) {
  if (codec.exact == Exact::bfloat16) return body(Kept<Exact::bfloat16>{});
  if (codec.exact == Exact::float16) return body(Kept<Exact::float16>{});
  if (codec.exact == Exact::float32) return body(Kept<Exact::float32>{});
  if (codec.normal && codec.bits == 4) return body(Normal<4>{});
  if (codec.normal && codec.bits == 2) return body(Normal<2>{});
  if (codec.normal) return body(Normal<1>{});
  if (codec.bits == 8) return body(Uniform<8>{});
  if (codec.bits == 4) return body(Uniform<4>{});
  if (codec.bits == 2) return body(Uniform<2>{});
  return body(Uniform<1>{});
}

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
