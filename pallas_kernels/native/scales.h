// Numbers beside codes, 16 bits each, as pallas_kernels/codecs/scales.py keeps them: read, rounded and written.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace diffkv {

// 16 bits each: bfloat16 in the lanes that are `wide`, else float16.
inline Floats either(Shorts bits, Ints wide) { return select(wide, from_bfloat16(bits), from_float16(bits)); }

// Which stored scales, and zero points beside them, are bfloat16: a scale is not negative, its sign bit says so.
inline Ints is_wide(Shorts scale) { return widen(scale) > 0x7FFF; }
inline Floats scale_of(Shorts scale) { return either(scale & 0x7FFF, is_wide(scale)); }
inline Floats zero_of(Shorts scale, Shorts zero) { return either(zero, is_wide(scale)); }

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

}  // namespace diffkv
