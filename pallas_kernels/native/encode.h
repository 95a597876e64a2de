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
  uint16_t* meta;  // float16 bits
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

// The nearest float16, half to even, overflow to infinity, as pallas_kernels/codecs/tiles.py float_to_half does.
inline Shorts to_float16(Floats x) {
  const Ints bits = as_ints(x), size = bits & 0x7FFFFFFF;
  const Ints rounded = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
  const Ints normal = rounded < 0x7C00 ? rounded : Ints{} + 0x7C00;
  const Ints small = as_ints(as_floats(size) * 0x1p24f + 0x1p23f) & 0x7FFFFF;  // the sum leaves the rounded integer in the low bits
  Ints half = size < (113 << 23) ? small : normal;
  half = size > 0x7F800000 ? Ints{} + 0x7E00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Shorts);
}

// The nearest bfloat16, half to even, also of subnormals; unlike `to_bfloat16`, which may take an instruction that flushes those.
inline Shorts nearest_bfloat16(Floats x) {
  const Ints bits = as_ints(x), rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
  return __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? Ints{} + 0x7FC0 : rounded, Shorts);
}

// Codes [width, 16] of one group of channels, and its scale and zero point.
inline void quantise_group(int bits, int width, const float* x, uint8_t* codes, Floats& scale, Floats& zero) {
  const float most = float((1 << bits) - 1);
  Floats low = load<Floats>(x), high = low;
  Ints nan = low != low;
  for (int c = 1; c < width; ++c) {
    const Floats v = load<Floats>(x + c * kLanes);
    low = v < low ? v : low, high = v > high ? v : high, nan |= v != v;
  }
  zero = select(nan, splat(NAN), low);
  scale = (high - zero) * (1 / most);
  const Floats steps = 1 / select(scale > 0.0f, scale, splat(1));
  for (int c = 0; c < width; ++c) {
    Floats ratio = (load<Floats>(x + c * kLanes) - zero) * steps;
    ratio = select(ratio > 0.0f, ratio, Floats{});  // also what is not a number
    ratio = select(ratio < most, ratio, splat(most));
    store(codes + c * kLanes, low_bytes(as_ints(ratio + 0x1p23f)));  // rounds half to even, to an integer in the low bits
  }
}

// Values `x [head_dim, 16]` in a codec.
inline void encode(const Codec& codec, int head_dim, const float* x, const Target& to) {
  if (codec.exact != Exact::no) {
    for (int c = 0; c < head_dim; ++c) {
      const Floats v = load<Floats>(x + c * kLanes);
      Ints bits = as_ints(v);
      if (codec.exact == Exact::bfloat16) bits = widen(nearest_bfloat16(v));
      if (codec.exact == Exact::float16) bits = widen(to_float16(v));
      for (int byte = 0; byte < codec.bits / 8; ++byte) to.put_bytes(byte * head_dim + c, low_bytes(bits >> (8 * byte)));
    }
    return;
  }
  uint8_t* codes = scratch<struct Codes, uint8_t>(head_dim * kLanes);
  const int width = head_dim / codec.groups, planes = 8 / codec.bits;
  for (int group = 0; group < codec.groups; ++group) {
    Floats scale, zero;
    quantise_group(codec.bits, width, x + group * width * kLanes, codes + group * width * kLanes, scale, zero);
    to.put_meta(group, to_float16(scale));
    to.put_meta(codec.groups + group, to_float16(zero));
  }
  for (int row = 0; row < codec.rows; ++row) {
    Bytes packed = load<Bytes>(codes + row * kLanes);
    for (int plane = 1; plane < planes; ++plane) {
      packed |= load<Bytes>(codes + (row + plane * codec.rows) * kLanes) << uint8_t(plane * codec.bits);
    }
    to.put_bytes(row, packed);
  }
}

// 16 tokens of a codec as values `x [head_dim, 16]`; rows of `from` begin `stride` apart.
inline void decode(const Codec& codec, int head_dim, const Stored& from, int stride, float* x) {
  const int width = head_dim / codec.groups;
  with_reader(codec, [&](auto reader) {
    using Reader = decltype(reader);
    over_channels<Reader>(head_dim, 0, head_dim, [&](int c, int row, int plane) {
      Floats v = Reader::read(from.payload + int64_t(row) * stride, plane, int64_t(head_dim) * stride);
      if constexpr (Reader::scaled) {
        const uint16_t* scale = from.meta + c / width * stride;
        v = from_float16(load<Shorts>(scale)) * v + from_float16(load<Shorts>(scale + codec.groups * stride));
      }
      store(x + c * kLanes, v);
    });
  });
}

// Codes of `high` to those of `low`, which has the same groups and no more bits: q' = (q + r / 2) / r.
inline void demote_codes(const Codec& high, const Codec& low, const Stored& from, int stride, const Target& to) {
  const int ratio = ((1 << high.bits) - 1) / ((1 << low.bits) - 1), planes = 8 / low.bits, mask = (1 << high.bits) - 1;
  const int factor = 65536 / ratio + 1;  // x * factor >> 16 is x / ratio for all sums there are
  const uint8_t* rows[8];
  int shifts[8];
  for (int plane = 0; plane < planes; ++plane) {
    const int channel = plane * low.rows;
    rows[plane] = from.payload + int64_t(channel % high.rows) * stride, shifts[plane] = channel / high.rows * high.bits;
  }
  for (int row = 0; row < low.rows; ++row) {
    Ints packed = {};
    for (int plane = 0; plane < planes; ++plane) {
      const Ints code = (widen(load<Bytes>(rows[plane] + int64_t(row) * stride)) >> shifts[plane]) & mask;
      packed |= (((code + ratio / 2) * factor) >> 16) << (plane * low.bits);
    }
    to.put_bytes(row, low_bytes(packed));
  }
  for (int group = 0; group < high.groups; ++group) {
    to.put_meta(group, to_float16(from_float16(load<Shorts>(from.meta + group * stride)) * float(ratio)));
    to.put_meta(high.groups + group, load<Shorts>(from.meta + (high.groups + group) * stride));
  }
}

// 16 tokens of one codec in another.
inline void requantise(const Codec& high, const Codec& low, int head_dim, const Stored& from, int stride, const Target& to) {
  const bool uniform = high.exact == Exact::no && low.exact == Exact::no;
  if (uniform && high.groups == low.groups && high.bits >= low.bits) return demote_codes(high, low, from, stride, to);
  float* x = scratch<struct Decoded, float>(head_dim * kLanes);
  decode(high, head_dim, from, stride, x);
  encode(low, head_dim, x, to);
}

}  // namespace diffkv
