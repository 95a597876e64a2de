// 32 stored tokens as float32, of every codec: also those whose codes are looked up in a head's learned table.
#pragma once

#include "pages.h"
#include "scratch.h"

namespace diffkv {

// Calls body(group, codes of twice 16 tokens) for all groups of channels of a table's codes. Three bits are the rows of the lower two, then
// those of the upper one.
template <int Bits, typename Body>
inline void over_codes(const uint8_t* payload, int64_t stride, int groups, const Body& body) {
  constexpr int planes = Bits == 3 ? 8 : 8 / Bits;
  const int rows = groups / planes;
  unrolled<planes>([&](auto i) {
    constexpr int plane = i;
    for (int row = 0; row < rows; ++row) {
      Ints codes[2];
      for (int half = 0; half < 2; ++half) {
        const auto bytes = [&](int64_t row) { return widen(load<Bytes>(payload + row * stride + half * kLanes)); };
        if constexpr (Bits == 3) {
          const Ints lower = (bytes(plane % 2 * rows + row) >> (plane / 2 * 2)) & 3, upper = (bytes(2 * rows + row) >> plane) & 1;
          codes[half] = lower | upper << 2;
        } else {
          codes[half] = (bytes(row) >> (plane * Bits)) & ((1 << Bits) - 1);
        }
      }
      body(plane * rows + row, codes);
    }
  });
}

// Numbers `code [16]` of a table of 16.
inline Floats pick(Floats table, Ints code) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
#else
  Floats picked;
  for (int lane = 0; lane < kLanes; ++lane) picked[lane] = table[code[lane]];
  return picked;
#endif
}

// Numbers that a codec has learned, float16 or bfloat16.
struct Learned {
  const uint16_t* data;
  bool bfloat16;

  Floats numbers(Shorts bits) const { return bfloat16 ? from_bfloat16(bits) : from_float16(bits); }
};

// `Part` neighbouring channels of 32 tokens, which lie token after token in `rows`.
template <int Part>
inline void as_channels(const Learned& table, const uint16_t* rows, Floats* x) {
  typedef uint16_t Wide __attribute__((vector_size(64)));
  for (int half = 0; half < 2; ++half, rows += kLanes * Part) {
    if constexpr (Part == 4) {
      const Wide a = load<Wide>(rows), b = load<Wide>(rows + 32);
      x[half] = table.numbers(__builtin_shufflevector(a, b, 0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60));
      x[2 + half] = table.numbers(__builtin_shufflevector(a, b, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61));
      x[4 + half] = table.numbers(__builtin_shufflevector(a, b, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62));
      x[6 + half] = table.numbers(__builtin_shufflevector(a, b, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63));
    } else if constexpr (Part == 2) {
      const Wide a = load<Wide>(rows);
      x[half] = table.numbers(__builtin_shufflevector(a, a, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
      x[2 + half] = table.numbers(__builtin_shufflevector(a, a, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    } else {
      x[half] = table.numbers(load<Shorts>(rows));
    }
  }
}

// Channels `x [head_dim, 2]` of codes that name rows of a table: one codebook `[2^Bits, channels]` a group of channels, or one for all.
//
// `Part` channels are taken at once. All rows are copied before any is turned into channels: a load that follows the stores that it reads
// has to wait for them.
template <int Bits, int Part>
inline void look_up_rows(const Codec& codec, const Stored& at, int stride, int head_dim, const Learned& table, Floats* x) {
  const int channels = codec.channels, groups = head_dim / channels;
  uint8_t* codes = scratch<struct Codes, uint8_t>(groups * kStrip);
  over_codes<Bits>(at.payload, stride, groups, [&](int group, const Ints (&code)[2]) {
    for (int half = 0; half < 2; ++half) {
      store(codes + group * kStrip + half * kLanes, __builtin_convertvector(__builtin_convertvector(code[half], Shorts), Bytes));
    }
  });
  uint16_t* rows = scratch<struct Rows, uint16_t>(head_dim * kStrip);
  uint16_t* to = rows;
  for (int group = 0; group < groups; ++group) {
    const uint16_t* book = table.data + (codec.ranged() ? 0 : int64_t{group} * (channels << Bits));
    const uint8_t* code = codes + group * kStrip;
    for (int c = 0; c < channels; c += Part) {
      for (int lane = 0; lane < kStrip; ++lane, to += Part) std::memcpy(to, book + code[lane] * channels + c, 2 * Part);
    }
  }
  for (int c = 0; c < head_dim; c += Part) as_channels<Part>(table, rows + c * kStrip, x + 2 * c);
}

// The same of single channels with at most 16 levels, which one register holds.
template <int Bits>
inline void look_up_levels(const Codec& codec, const Stored& at, int stride, int head_dim, const Learned& table, Floats* x) {
  over_codes<Bits>(at.payload, stride, head_dim, [&](int channel, const Ints (&code)[2]) {
    uint16_t few[kLanes] = {};
    std::memcpy(few, table.data + (codec.ranged() ? 0 : channel << Bits), 2 << Bits);
    const Floats levels = table.numbers(load<Shorts>(few));
    for (int half = 0; half < 2; ++half) x[2 * channel + half] = pick(levels, code[half]);
  });
}

inline void look_up(const Codec& codec, const Stored& at, int stride, int head_dim, const Learned& table, Floats* x) {
  const auto with_bits = [&](auto bits) {
    if constexpr (bits <= 4) {
      if (codec.channels == 1) return look_up_levels<bits>(codec, at, stride, head_dim, table, x);
    }
    if (codec.channels % 4 == 0) return look_up_rows<bits, 4>(codec, at, stride, head_dim, table, x);
    if (codec.channels % 2 == 0) return look_up_rows<bits, 2>(codec, at, stride, head_dim, table, x);
    look_up_rows<bits, 1>(codec, at, stride, head_dim, table, x);
  };
  if (codec.bits == 8) return with_bits(std::integral_constant<int, 8>{});
  if (codec.bits == 4) return with_bits(std::integral_constant<int, 4>{});
  if (codec.bits == 3) return with_bits(std::integral_constant<int, 3>{});
  if (codec.bits == 2) return with_bits(std::integral_constant<int, 2>{});
  with_bits(std::integral_constant<int, 1>{});
}

// Puts the outliers of the first `live` tokens in their places in `x [head_dim, 32]`.
inline void place_outliers(const Codec& codec, const Stored& at, int stride, int head_dim, int live, float* x) {
  const int pairs = codec.outliers / 2, first_row = codec.meta_rows() - codec.outliers;
  for (int i = 0; i < pairs; ++i) {
    float values[2][kStrip];
    for (int half = 0; half < 2; ++half) {
      const Shorts first = metadata(at, first_row + i, stride, half), second = metadata(at, first_row + pairs + i, stride, half);
      const Floats smaller = from_bfloat16(first), larger = from_bfloat16(second);  // the smaller one comes first in bfloat16 alone
      const Ints wide = smaller < larger;
      store(values[0] + half * kLanes, select(wide, larger, from_float16(first)));
      store(values[1] + half * kLanes, select(wide, smaller, from_float16(second)));
    }
    for (int which = 0; which < 2; ++which) {
      const uint8_t* channel = at.payload + int64_t{codec.rows - codec.outliers + which * pairs + i} * stride;
      for (int t = 0; t < live; ++t) {
        if (channel[t] < head_dim) x[channel[t] * kStrip + t] = values[which][t];
      }
    }
  }
}

// Channels `[head_dim, 2]` of a strip's keys or values; `table` is the head's learned one. Lanes from `live` on are zeros.
inline Floats* decoded(const Codec& codec, const Stored& at, int stride, int head_dim, const Learned& table, int live) {
  Floats* x = scratch<struct DecodedStrip, Floats>(2 * head_dim);
  if (codec.channels) {
    look_up(codec, at, stride, head_dim, table, x);
  } else {
    with_reader(codec.code, [&](auto reader) {
      using Reader = decltype(reader);
      over_channels<Reader>(head_dim, 0, head_dim, [&](int channel, int row, int plane) {
        const uint8_t* from = at.payload + int64_t{row} * stride;
        for (int half = 0; half < 2; ++half) x[2 * channel + half] = Reader::read(from + half * kLanes, plane, int64_t{head_dim} * stride);
      });
    });
  }
  const int width = head_dim / codec.groups;
  for (int group = 0; group < codec.groups; ++group) {
    for (int half = 0; half < 2; ++half) {
      const Ints real = lanes() + half * kLanes < live;
      const auto [scale, zero] = Grid::read(at, codec, group, stride, half);
      if (!codec.scaled && live == kStrip) continue;
      for (int c = group * width; c < (group + 1) * width; ++c) x[2 * c + half] = select(real, x[2 * c + half] * scale + zero, Floats{});
    }
  }
  place_outliers(codec, at, stride, head_dim, live, reinterpret_cast<float*>(x));
  return x;
}

}  // namespace diffkv
