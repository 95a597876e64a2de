// pallas_kernels/codecs/uniform.py: integer codes from a group's least number to its largest.
#pragma once

#include "reader.h"

namespace diffkv {

template <int Bits>
struct Uniform {
  static constexpr int bits = Bits, planes = 8 / Bits;
  static constexpr Exact type = Exact::no;
  static constexpr bool scaled = true, zeroed = true, pairs = true;
  static constexpr float bias = (Bits == 8 ? 17 : 1) * 128;

  static Floats read(const uint8_t* row, int plane, int64_t) {
    return to_floats((widen(load<Bytes>(row)) >> (plane * Bits)) & ((1 << Bits) - 1));
  }
  static void quantise(int width, const float* x, uint8_t* codes, float* scale, float* zero, int32_t* wide) {
    constexpr float most = (1 << Bits) - 1;
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
#if DIFFKV_PAIRS
  // 128 + code.
  template <int Shift>
  static __m512i in_pairs(__m512i bytes) {
    constexpr int mask = Bits >= 4 ? 15 : (1 << Bits) - 1;
    return _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, Shift), _mm512_set1_epi16(mask), _mm512_set1_epi16(0x4300), 0xEA);  // (a & b) | c
  }
#endif
};

template <> struct ReaderOf<1> : Uniform<1> {};
template <> struct ReaderOf<2> : Uniform<2> {};
template <> struct ReaderOf<4> : Uniform<4> {};
template <> struct ReaderOf<8> : Uniform<8> {};

}  // namespace diffkv
