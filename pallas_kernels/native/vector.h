// Vectors of 16 floats as the compiler's own type: it lowers them to AVX-512, to two AVX2 registers, to NEON or to plain code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__)
#define DIFFKV_BF16 1  // multiplies pairs of bfloat16
#else
#define DIFFKV_BF16 0
#endif
#if DIFFKV_BF16 && defined(__AVX512VBMI__)
#define DIFFKV_PAIRS 1  // and spreads bytes over a register
#else
#define DIFFKV_PAIRS 0
#endif

namespace diffkv {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Vector>
inline void store(void* to, Vector v) {
  std::memcpy(to, &v, sizeof(v));
}

inline Floats splat(float x) { return Floats{} + x; }
inline Ints as_ints(Floats x) { return load<Ints>(&x); }
inline Floats as_floats(Ints x) { return load<Floats>(&x); }
inline Ints widen(Shorts x) { return __builtin_convertvector(x, Ints); }
inline Ints widen(Bytes x) { return widen(__builtin_convertvector(x, Shorts)); }  // in one step GCC 12 goes lane by lane
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// The larger one, `b` where one is NaN. GCC 12 makes two instructions of a > b ? a : b at 512 bits.
inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Combines the 16 lanes pairwise.
template <typename Combine>
inline float folded(Floats v, const Combine& combine) {
  v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

inline float sum(Floats v) {
  return folded(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) { return folded(v, max); }

// Lane numbers 0 to 15.
inline Ints lanes() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline Floats from_bfloat16(Shorts bits) { return as_floats(widen(bits) << 16); }

// float16 bits to float32, subnormals and NaN included; without an instruction for it as pallas_kernels/codecs/tiles.py half_to_float.
inline Floats from_float16(Shorts half) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(&half));
#else
  const Ints bits = widen(half), fraction = bits & 1023, exponent = (bits >> 10) & 31;
  const Floats normal = as_floats(((exponent + 112) << 23) | (fraction << 13));
  const Floats special = as_floats((255 << 23) | (fraction << 13));
  const Floats small = to_floats(fraction) * 0x1p-24f;
  const Floats size = select(exponent == 0, small, select(exponent == 31, special, normal));
  return select(((bits >> 15) & 1) == 1, -size, size);
#endif
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // half to even; of a NaN some NaN or infinity
}

inline Shorts to_bfloat16(Floats x) {
#if DIFFKV_BF16
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
  return load<Shorts>(&bits);
#else
  const Ints bits = as_ints(x);
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Shorts);
#endif
}

// e^x to a few units in the last place, 0 below -87.3, for x <= 88; the Cephes polynomial.
inline Floats exp(Floats x) {
  const Floats bounded = max(x, splat(-87.3f));
  const Floats shifter = splat(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
  Floats whole = bounded * splat(1.44269504f) + shifter;
  const Ints exponent = as_ints(whole) << 23;
  whole = whole - shifter;
  const Floats rest = (bounded - whole * splat(0.693359375f)) - whole * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * rest + splat(1.3981999507e-3f);
  p = p * rest + splat(8.3334519073e-3f);
  p = p * rest + splat(4.1665795894e-2f);
  p = p * rest + splat(1.6666665459e-1f);
  p = p * rest + splat(5.0000001201e-1f);
  p = p * rest * rest + rest + splat(1.0f);
  return select(x < splat(-87.3f), Floats{}, as_floats(as_ints(p) + exponent));
}

// cap * tanh(x / cap).
inline Floats soft_cap(Floats x, float cap) {
  const Floats twice = x * splat(2.0f / cap);
  const Floats e = exp(twice < splat(80.0f) ? twice : splat(80.0f));
  return splat(cap) - splat(2.0f * cap) / (e + splat(1.0f));
}

}  // namespace diffkv
