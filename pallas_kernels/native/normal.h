// The levels of pallas_kernels/codecs/normal.py, and the numbers of the nearest ones: the top bit of a code is the sign.
#pragma once

#include "reader.h"

namespace diffkv {

// The positive levels of 1, 2 and 4 bits, smallest first.
template <int Bits>
constexpr float kLevels[1] = {0.796875f};
template <>
constexpr float kLevels<2>[2] = {0.453125f, 1.5078125f};
template <>
constexpr float kLevels<4>[8] = {0.1279296875f, 0.388671875f, 0.65625f, 0.94140625f, 1.2578125f, 1.6171875f, 2.0625f, 2.734375f};

// Level `code`; of larger numbers the lowest bits count.
template <int Bits>
constexpr float normal_level(int code) {
  constexpr int half = 1 << (Bits - 1);
  return code & half ? -kLevels<Bits>[code % half] : kLevels<Bits>[code % half];
}

// The levels of codes, whatever their bits above the lowest `Bits`.
template <int Bits>
inline Floats normal_levels(Ints code) {
#if defined(__AVX512F__)
  constexpr auto level = normal_level<Bits>;
  const Floats table = {level(0), level(1), level(2),  level(3),  level(4),  level(5),  level(6),  level(7),
                        level(8), level(9), level(10), level(11), level(12), level(13), level(14), level(15)};
  return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
#else
  Ints size[1 << (Bits - 1)];  // halved bit after bit, without comparisons
  for (int i = 0; i < 1 << (Bits - 1); ++i) size[i] = as_ints(splat(kLevels<Bits>[i]));
  for (int bit = 0; bit < Bits - 1; ++bit) {
    const Ints odd = -((code >> bit) & 1);
    for (int i = 0; i < 1 << (Bits - 2 - bit); ++i) size[i] = size[2 * i] ^ ((size[2 * i] ^ size[2 * i + 1]) & odd);
  }
  return as_floats(size[0] ^ (((code >> (Bits - 1)) & 1) << 31));
#endif
}

#if DIFFKV_PAIRS

// Level `i % 2^Bits` in bfloat16, 32 of them.
template <int Bits>
struct LevelTable {
  alignas(64) uint16_t level[32];

  LevelTable() {
    for (int i = 0; i < 32; ++i) level[i] = to_bfloat16(normal_level<Bits>(i));
  }
};
template <int Bits>
inline const LevelTable<Bits> kLevelTable;

#endif

// Levels are the upper half of a float32 each, so as exact in bfloat16 as integer codes.
template <int Bits>
struct Normal {
  static constexpr int bits = Bits, planes = 8 / Bits;
  static constexpr Exact type = Exact::no;
  static constexpr bool scaled = true, zeroed = false, pairs = true;
  static constexpr float bias = 0;

  static Floats read(const uint8_t* row, int plane, int64_t) {
    return normal_levels<Bits>(widen(load<Bytes>(row)) >> (plane * Bits));
  }
  // Squares are those of the channels divided by a power of two, so that they neither overflow nor vanish.
  static void quantise(int width, const float* x, uint8_t* codes, float* scale, float*, int32_t* wide) {
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
#if DIFFKV_PAIRS
  template <int Shift>
  static __m512i in_pairs(__m512i bytes) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, Shift), _mm512_load_si512(kLevelTable<Bits>.level));
  }
#endif
};

template <> struct ReaderOf<64 + 1> : Normal<1> {};
template <> struct ReaderOf<64 + 2> : Normal<2> {};
template <> struct ReaderOf<64 + 4> : Normal<4> {};

}  // namespace diffkv
