// pallas_kernels/codecs/full.py: values kept exactly, byte i of all channels before byte i + 1.
#pragma once

#include "reader.h"

namespace diffkv {

template <Exact Type>
struct Kept {
  static constexpr int bits = Type == Exact::float32 ? 32 : 16, planes = 1;
  static constexpr Exact type = Type;
  static constexpr bool scaled = false, zeroed = false, pairs = Type == Exact::bfloat16;
  static constexpr float bias = 0;

  static Floats read(const uint8_t* row, int, int64_t next_byte) {
    const auto plane = [&](int i) { return widen(load<Bytes>(row + i * next_byte)); };
    if constexpr (Type == Exact::bfloat16) return as_floats((plane(1) << 24) | (plane(0) << 16));
    if constexpr (Type == Exact::float32) return as_floats((plane(3) << 24) | (plane(2) << 16) | (plane(1) << 8) | plane(0));
    return from_float16(__builtin_convertvector((plane(1) << 8) | plane(0), Shorts));
  }
  static Ints bits_of(Floats x) {
    if constexpr (Type == Exact::bfloat16) return widen(nearest_bfloat16(x));
    if constexpr (Type == Exact::float32) return as_ints(x);
    return widen(to_float16(x));
  }
};

template <> struct ReaderOf<16> : Kept<Exact::bfloat16> {};
template <> struct ReaderOf<17> : Kept<Exact::float16> {};
template <> struct ReaderOf<32> : Kept<Exact::float32> {};

}  // namespace diffkv
