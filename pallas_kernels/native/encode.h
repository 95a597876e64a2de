// Writing 16 tokens of K or V side by side in a codec (docs/design.md 1): from values, or from another codec.
//
// Every number is rounded as XLA rounds it, so that ties fall to the same side: both quotients of the quantiser are products with a
// reciprocal. No product is followed by a sum that the compiler could contract, but for `scale * code + zero`, whose product is exact.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

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

// The nearest float16, half to even, overflow to infinity; without an instruction for it as pallas_kernels/codecs/tiles.py float_to_half.
inline Shorts to_float16(Floats x) {
#if defined(__F16C__)
  __m256 parts[2];
  __m128i halves[2];
  std::memcpy(parts, &x, sizeof(x));
  for (int i = 0; i < 2; ++i) halves[i] = _mm256_cvtps_ph(parts[i], _MM_FROUND_TO_NEAREST_INT);
  return load<Shorts>(halves);
#else
  const Ints bits = as_ints(x), size = bits & 0x7FFFFFFF;
  const Ints rounded = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
  const Ints normal = rounded < 0x7C00 ? rounded : Ints{} + 0x7C00;
  const Ints small = as_ints(as_floats(size) * 0x1p24f + 0x1p23f) & 0x7FFFFF;  // the sum leaves the rounded integer in the low bits
  Ints half = size < (113 << 23) ? small : normal;
  half = size > 0x7F800000 ? Ints{} + 0x7E00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Shorts);
#endif
}

// The nearest bfloat16, half to even, also of subnormals; unlike `to_bfloat16`, which may take an instruction that flushes those.
inline Shorts nearest_bfloat16(Floats x) {
  const Ints bits = as_ints(x), rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
  return __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? Ints{} + 0x7FC0 : rounded, Shorts);
}

// As many lanes as the CPU compares at once: of wider vectors GCC would compare lane by lane.
#if defined(__AVX512F__)
constexpr int kCompared = 16;
#elif defined(__AVX__)
constexpr int kCompared = 8;
#else
constexpr int kCompared = 4;
#endif
typedef float SomeFloats __attribute__((vector_size(4 * kCompared)));
typedef int32_t SomeInts __attribute__((vector_size(4 * kCompared)));
typedef uint8_t SomeBytes __attribute__((vector_size(kCompared)));

// What pallas_kernels/codecs/scales.py says of numbers beside codes; `wide` lanes, -1 or 0, are bfloat16.
constexpr float kTooLarge = 65520, kTooSmall = 0x1p-16f, kSmallZero = 0x1p-8f, kLimit = 0x1p119f;

inline SomeFloats size_of(SomeFloats x) { return x < 0 ? -x : x; }

inline SomeFloats saturated(SomeFloats x) {
  const SomeFloats most = x < 0 ? SomeFloats{} - kLimit : SomeFloats{} + kLimit, size = size_of(x);
  return (size > kLimit) & (size < INFINITY) ? most : x;
}

inline SomeInts needs_wide(SomeFloats scale, SomeFloats zero) {
  const SomeFloats size = size_of(zero) > scale ? size_of(zero) : scale;
  return ((size >= kTooLarge) & (size < INFINITY)) | ((scale < kTooSmall) & (size > 0) & (size < kSmallZero));
}

// The largest bfloat16 up to x.
inline SomeFloats rounded_down(SomeFloats x) {
  const SomeInts bits = load<SomeInts>(&x), moved = (bits + (bits < 0 ? SomeInts{} + 0xFFFF : SomeInts{})) & -0x10000;
  return load<SomeFloats>(&moved);
}

inline Shorts stored_scale(Floats scale, Ints wide) {
  const Ints narrow = widen(to_float16(scale)) & 0x7FFF, bits = wide ? widen(nearest_bfloat16(scale)) | 0x8000 : narrow;
  return __builtin_convertvector(bits, Shorts);
}

inline Shorts stored_zero(Floats zero, Ints wide) {
  const Ints bits = wide ? widen(nearest_bfloat16(zero)) : widen(to_float16(zero));
  return __builtin_convertvector(bits, Shorts);
}

// Codes [width, 16] of one group of channels, its scale and zero point, and whether those are wide; of kCompared lanes.
inline void quantise_lanes(int bits, int width, const float* x, uint8_t* codes, float* scale, float* zero, int32_t* wide) {
  const float most = float((1 << bits) - 1);
  SomeFloats low = load<SomeFloats>(x), high = low;
  SomeInts nan = low != low;
  for (int c = 1; c < width; ++c) {
    const SomeFloats v = load<SomeFloats>(x + c * kLanes);
    low = v < low ? v : low, high = v > high ? v : high, nan |= v != v;
  }
  low = nan ? SomeFloats{} + NAN : low;
  low = saturated(low), high = saturated(high);
  SomeFloats size = (high - low) * (1 / most);
  const SomeInts far = needs_wide(size, low);
  const SomeFloats down = rounded_down(low), up = -rounded_down((down - high) * (1 / most));
  low = far ? down : low, size = far ? up : size;
  const SomeFloats steps = 1 / (size > 0 ? size : SomeFloats{} + 1);
  store(scale, size);
  store(zero, low);
  store(wide, far);
  for (int c = 0; c < width; ++c) {
    SomeFloats ratio = (load<SomeFloats>(x + c * kLanes) - low) * steps;
    ratio = ratio > 0 ? ratio : SomeFloats{};  // also what is not a number
    ratio = ratio < most ? ratio : SomeFloats{} + most;
    const SomeInts code = load<SomeInts>(&(const SomeFloats&)(ratio + 0x1p23f));  // rounds half to even, into the low bits
    store(codes + c * kLanes, __builtin_convertvector(code & 255, SomeBytes));
  }
}

// Codes [width, 16] of one token's channels in levels of the normal distribution, and its scale; of kCompared lanes. Squares are those of
// the channels divided by a power of two, so that they neither overflow nor vanish.
template <int Bits>
inline void normal_lanes(int width, const float* x, uint8_t* codes, float* scale, int32_t* wide) {
  constexpr int half = 1 << (Bits - 1);
  SomeFloats largest = {}, squares = {}, of_levels = {}, to_rms = {};
  for (int c = 0; c < width; ++c) {
    const SomeFloats size = size_of(load<SomeFloats>(x + c * kLanes));
    largest = size > largest ? size : largest;
  }
  SomeInts exponent = load<SomeInts>(&largest) & 0x7F800000;
  exponent = exponent < 27 << 23 ? SomeInts{} + (27 << 23) : exponent;
  exponent = exponent > 247 << 23 ? SomeInts{} + (247 << 23) : exponent;
  const SomeInts reciprocal = (254 << 23) - exponent;
  const SomeFloats unit = load<SomeFloats>(&exponent), inverse = load<SomeFloats>(&reciprocal);
  for (int c = 0; c < width; ++c) {
    const SomeFloats v = load<SomeFloats>(x + c * kLanes) * inverse;
    squares += v * v;
  }
  const SomeFloats means = squares / float(width);
  for (int lane = 0; lane < kCompared; ++lane) to_rms[lane] = means[lane] > 0 ? 1 / std::sqrt(means[lane]) : 0;
  for (int c = 0; c < width; ++c) {
    const SomeFloats v = load<SomeFloats>(x + c * kLanes) * inverse * to_rms, size = size_of(v);
    SomeInts code = v < 0 ? SomeInts{} + half : SomeInts{};
    SomeFloats level = SomeFloats{} + kLevels<Bits>[0];
    for (int i = 1; i < half; ++i) {
      const SomeInts above = size > (kLevels<Bits>[i - 1] + kLevels<Bits>[i]) / 2;
      code -= above;
      level = above ? SomeFloats{} + kLevels<Bits>[i] : level;
    }
    of_levels += level * level;
    store(codes + c * kLanes, __builtin_convertvector(code, SomeBytes));
  }
  const SomeFloats ratio = squares / of_levels;
  SomeFloats root;
  for (int lane = 0; lane < kCompared; ++lane) root[lane] = std::sqrt(ratio[lane]);
  root = root * unit;
  store(wide, needs_wide(root, SomeFloats{}));
  store(scale, saturated(root));
}

inline void normal_lanes(int bits, int width, const float* x, uint8_t* codes, float* scale, int32_t* wide) {
  if (bits == 4) return normal_lanes<4>(width, x, codes, scale, wide);
  if (bits == 2) return normal_lanes<2>(width, x, codes, scale, wide);
  normal_lanes<1>(width, x, codes, scale, wide);
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
    float scale[kLanes], zero[kLanes];
    int32_t wide[kLanes];
    for (int lane = 0; lane < kLanes; lane += kCompared) {
      const int64_t first = group * width * kLanes + lane;
      if (codec.normal) normal_lanes(codec.bits, width, x + first, codes + first, scale + lane, wide + lane);
      else quantise_lanes(codec.bits, width, x + first, codes + first, scale + lane, zero + lane, wide + lane);
    }
    to.put_meta(group, stored_scale(load<Floats>(scale), load<Ints>(wide)));
    if (codec.zeroed()) to.put_meta(codec.groups + group, stored_zero(load<Floats>(zero), load<Ints>(wide)));
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
  const bool uniform = high.zeroed() && low.zeroed();
  if (uniform && high.groups == low.groups && high.bits >= low.bits) return demote_codes(high, low, head_dim, from, stride, to);
  float* x = scratch<struct Decoded, float>(head_dim * kLanes);
  decode(high, head_dim, from, stride, x);
  encode(low, head_dim, x, to);
}

}  // namespace diffkv
