// Products of small matrices whose numbers lie in 32-bit words: one float32 a word, or a pair of bfloat16 where the CPU multiplies those.
#pragma once

#include <cstdint>
#include <utility>

#include "vector.h"

namespace diffkv {

// A block of kRows times kColumns vectors of sums fills the registers: 32 of 512 bits, else at least 16 of 256 or 32 of 128.
constexpr int kRows = 6;
#ifdef __AVX512F__
constexpr int kColumns = 4;
#else
constexpr int kColumns = 1;
#endif
constexpr int kPanel = 64;  // words of a row of a packed matrix; its panels follow each other

struct Single {
  static constexpr int size = 1;  // numbers in a word
  static Floats multiply_add(Floats sum, Ints a, Ints b) { return sum + as_floats(a) * as_floats(b); }
  // `size` vectors of numbers, in their order.
  static Ints in_order(const Floats (&numbers)[1]) { return as_ints(numbers[0]); }
  // Word i holds number i of each vector; codes are exact in bfloat16.
  static Ints joined(const Floats (&numbers)[1]) { return as_ints(numbers[0]); }
  static Ints joined_codes(const Floats (&codes)[1]) { return as_ints(codes[0]); }
};

#if DIFFKV_BF16

struct Pair {
  static constexpr int size = 2;
  static Floats multiply_add(Floats sum, Ints a, Ints b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  static Ints in_order(const Floats (&numbers)[2]) { return (Ints)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]); }
  static Ints joined(const Floats (&numbers)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)numbers[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)numbers[1]));
    return (Ints)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static Ints joined_codes(const Floats (&codes)[2]) { return Ints(Unsigned(as_ints(codes[0])) >> 16) | as_ints(codes[1]); }
};

#endif

// sum[i][j] += row i of `a` times columns j of `b`: `a` has rows of `pitch` words, `b` is a panel from the first of its columns on.
template <typename Word, int Columns>
inline void multiply(const int32_t* a, int64_t pitch, const int32_t* b, int words, Floats (&sum)[kRows][Columns]) {
  for (int k = 0; k < words; ++k, b += kPanel) {
    Ints right[Columns];
    for (int j = 0; j < Columns; ++j) right[j] = load<Ints>(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Ints left = Ints{} + a[i * pitch + k];
      for (int j = 0; j < Columns; ++j) sum[i][j] = Word::multiply_add(sum[i][j], left, right[j]);
    }
  }
}

// Calls body(column, number of vectors as a constant) over `columns` columns, a multiple of 16, without crossing a panel.
template <typename Body>
inline void over_columns(int columns, const Body& body) {
  int at = 0;
  for (; columns - at >= kColumns * kLanes; at += kColumns * kLanes) body(at, std::integral_constant<int, kColumns>{});
  const int left = (columns - at) / kLanes;
  if (kColumns > 1 && left == 1) body(at, std::integral_constant<int, 1>{});
  if (kColumns > 2 && left == 2) body(at, std::integral_constant<int, 2>{});
  if (kColumns > 3 && left == 3) body(at, std::integral_constant<int, 3>{});
}

template <int Step, size_t... Lane>
inline void exchange(Ints& a, Ints& b, std::index_sequence<Lane...>) {
  const Ints first = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) ? kLanes + Lane : Lane + Step)...);
  a = first;
}

template <int Step>
inline void exchange_rows(Ints (&m)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & Step)) exchange<Step>(m[i], m[i + Step], std::make_index_sequence<kLanes>{});
  }
}

inline void transpose(Ints (&m)[kLanes]) {
  exchange_rows<1>(m);
  exchange_rows<2>(m);
  exchange_rows<4>(m);
  exchange_rows<8>(m);
}

// 2^x to a few units in the last place for x < 128; 0 from -150 down at the latest.
inline Floats exp2(Floats x) {
#ifdef __AVX512DQ__
  const __m512 rest = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_set1_ps(1.877576679e-3f);
  for (const float c : {8.989340146e-3f, 5.582631794e-2f, 2.401536171e-1f, 6.931530732e-1f, 9.999999251e-1f}) {
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  }
  return (Floats)_mm512_scalef_ps(p, (__m512)x);  // times 2 to the whole part
#else
  const Floats bounded = max(splat(-127.0f), x), shifter = splat(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
  const Floats whole = bounded + shifter, rest = bounded - (whole - shifter);
  Floats p = splat(1.326472721e-3f);
  for (const float c : {9.671512812e-3f, 5.550733745e-2f, 2.402224208e-1f, 6.931469776e-1f, 1.0f}) p = p * rest + splat(c);
  return as_floats(as_ints(p) + (as_ints(whole) << 23));  // at -127 the bits of 1 and of the exponent cancel: 0
#endif
}

}  // namespace diffkv
