// Writing 16 tokens of K or V side by side in a codec (docs/design.md 1): from values, or from another codec.
//
// Every number is rounded as XLA rounds it, so that ties fall to the same side: both quotients of the quantiser are products with a
// reciprocal. No product is followed by a sum that the compiler could contract, but for `scale * code + zero`, whose product is exact.
#pragma once

#include "pages.h"
#include "scratch.h"

namespace diffkv {

// 16 tokens to be written: row r of payload and metadata begins `r * stride` further. Only lanes [first, first + count) change.
struct Target {
  uint8_t* payload;
  uint16_t* meta;
  int stride, first, count;

  template <typename Vector, typename Index, typename Number>
  void put(Number* to, Vector fresh, Index lane) const {
    if (count < kLanes) fresh = (lane >= Number(first)) & (lane < Number(first + count)) ? fresh : load<Vector>(to);
    store(to, fresh);
  }
  void put_bytes(int row, Bytes fresh) const {
    put(payload + int64_t(row) * stride, fresh, Bytes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  }
  void put_meta(int row, Shorts fresh) const {
    put(meta + int64_t(row) * stride, fresh, Shorts{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  }
};

inline Bytes low_bytes(Ints x) { return __builtin_convertvector(x & 255, Bytes); }

// Values `x [head_dim, 16]` as codes, a group of channels after the other.
template <typename Reader>
void encode_groups(const Codec& codec, int head_dim, const float* x, const Target& to) {
  uint8_t* codes = scratch<struct Codes, uint8_t>(head_dim * kLanes);
  const int width = head_dim / codec.groups;
  for (int group = 0; group < codec.groups; ++group) {
    float scale[kLanes], zero[kLanes];
    int32_t wide[kLanes];
    for (int lane = 0; lane < kLanes; lane += kCompared) {
      const int64_t first = group * width * kLanes + lane;
      Reader::quantise(width, x + first, codes + first, scale + lane, zero + lane, wide + lane);
    }
    to.put_meta(group, stored_scale(load<Floats>(scale), load<Ints>(wide)));
    if constexpr (Reader::zeroed) to.put_meta(codec.groups + group, stored_zero(load<Floats>(zero), load<Ints>(wide)));
  }
  for (int row = 0; row < codec.rows; ++row) {
    Bytes packed = load<Bytes>(codes + row * kLanes);
    for (int plane = 1; plane < Reader::planes; ++plane) {
      packed |= load<Bytes>(codes + (row + plane * codec.rows) * kLanes) << uint8_t(plane * Reader::bits);
    }
    to.put_bytes(row, packed);
  }
}

// Values `x [head_dim, 16]` in a codec.
inline void encode(const Codec& codec, int head_dim, const float* x, const Target& to) {
  with_reader(codec.code, [&](auto reader) {
    using Reader = decltype(reader);
    if constexpr (Reader::scaled) return encode_groups<Reader>(codec, head_dim, x, to);
    else for (int c = 0; c < head_dim; ++c) {
      const Ints bits = Reader::bits_of(load<Floats>(x + c * kLanes));
      for (int byte = 0; byte < Reader::bits / 8; ++byte) to.put_bytes(byte * head_dim + c, low_bytes(bits >> (8 * byte)));
    }
  });
}

// 16 tokens of a codec as values `x [head_dim, 16]`; rows of `from` begin `stride` apart.
inline void decode(const Codec& codec, int head_dim, const Stored& from, int stride, float* x) {
  const int width = head_dim / codec.groups;
  with_reader(codec.code, [&](auto reader) {
    using Reader = decltype(reader);
    over_channels<Reader>(head_dim, 0, head_dim, [&](int c, int row, int plane) {
      Floats v = Reader::read(from.payload + int64_t(row) * stride, plane, int64_t(head_dim) * stride);
      const int group = c / width;
      if constexpr (Reader::scaled) {
        const Shorts scale = metadata(from, group, stride, 0);
        v = scale_of(scale) * v;
        if constexpr (Reader::zeroed) v = v + zero_of(scale, metadata(from, codec.groups + group, stride, 0));
      }
      store(x + c * kLanes, v);
    });
  });
}

// Codes of High bits in those of Low, which are no more: q' = (q + r / 2) / r. Rows of `from` begin `stride` apart.
template <int High, int Low>
void demote_payload(int head_dim, const uint8_t* from, int stride, const Target& to) {
  constexpr uint16_t ratio = ((1 << High) - 1) / ((1 << Low) - 1), mask = (1 << High) - 1;
  const int rows = head_dim * Low / 8;  // the channels of a low plane lie in one high plane, from some row on
  for (int row = 0; row < rows; ++row) {
    Shorts packed = {};
    for (int plane = 0; plane < 8 / Low; ++plane) {
      constexpr int low_planes = High / Low;  // that one high plane fills
      const uint8_t* bytes = from + int64_t(row + plane % low_planes * rows) * stride;
      const Shorts code = (__builtin_convertvector(load<Bytes>(bytes), Shorts) >> (plane / low_planes * High)) & mask;
      packed |= ((code + uint16_t(ratio / 2)) / ratio) << (plane * Low);
    }
    to.put_bytes(row, __builtin_convertvector(packed, Bytes));
  }
}

// Calls `body` with std::integral_constant 8, 4, 2 or 1.
template <typename Body>
void with_bits(int bits, const Body& body) {
  if (bits == 8) return body(std::integral_constant<int, 8>{});
  if (bits == 4) return body(std::integral_constant<int, 4>{});
  if (bits == 2) return body(std::integral_constant<int, 2>{});
  return body(std::integral_constant<int, 1>{});
}

// Codes of `high` in those of `low`, which has the same groups and no more bits.
inline void demote_codes(const Codec& high, const Codec& low, int head_dim, const Stored& from, int stride, const Target& to) {
  with_bits(high.bits, [&](auto high_bits) {
    with_bits(low.bits, [&](auto low_bits) {
      if constexpr (low_bits <= high_bits) demote_payload<high_bits, low_bits>(head_dim, from.payload, stride, to);
    });
  });
  const float ratio = float(((1 << high.bits) - 1) / ((1 << low.bits) - 1));
  for (int group = 0; group < high.groups; ++group) {
    const Shorts was = metadata(from, group, stride, 0), zero = metadata(from, high.groups + group, stride, 0);
    const Floats scale = scale_of(was) * ratio;
    const Ints wide = is_wide(was) | ((scale >= kTooLarge) & (scale < INFINITY));
    to.put_meta(group, stored_scale(scale, wide));
    to.put_meta(high.groups + group, stored_zero(zero_of(was, zero), wide));
  }
}

// 16 tokens of one codec in another.
inline void requantise(const Codec& high, const Codec& low, int head_dim, const Stored& from, int stride, const Target& to) {
  const bool uniform = high.code <= 8 && low.code <= 8;  // both `Uniform`
  if (uniform && high.groups == low.groups && high.bits >= low.bits) return demote_codes(high, low, head_dim, from, stride, to);
  float* x = scratch<struct Decoded, float>(head_dim * kLanes);
  decode(high, head_dim, from, stride, x);
  encode(low, head_dim, x, to);
}

}  // namespace diffkv
