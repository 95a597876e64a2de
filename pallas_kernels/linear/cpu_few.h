// Products of a few rows with bfloat16 weights [in, out]: the weights are read once, from front to back, which is what memory is fastest at.
//
// A thread takes a range of the weights' rows and adds their products to sums of its own, [rows of x, out]; then the ranges' sums are added.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ranges.h"
#include "words.h"

namespace diffkv {

constexpr int64_t kColumnStep = 32;

inline int64_t padded(int64_t columns) { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }

// Calls body(row, std::integral_constant tile) for tiles of 8, 4, 2 and 1 rows.
template <typename Body>
void over_rows(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; count - row >= 8; row += 8) body(row, std::integral_constant<int, 8>{});
  if (count - row >= 4) body(row, std::integral_constant<int, 4>{}), row += 4;
  if (count - row >= 2) body(row, std::integral_constant<int, 2>{}), row += 2;
  if (count - row >= 1) body(row, std::integral_constant<int, 1>{});
}

#if DIFFKV_BF16

// sums[t] += `Tile` rows of x times rows [k, k + 2 * pairs) of weights, all columns. Unpacking two rows into pairs works within 128 bits,
// so that of each 32 sums the first 16 belong to columns 0-3, 8-11, 16-19, 24-27: `in_order` turns them.
template <int Tile>
inline void add_stripe(const uint16_t* x, int64_t in, const uint16_t* weights, int64_t out, int64_t k, int64_t pairs, float* sums) {
  const int64_t pitch = padded(out);
  for (int64_t c = 0; c < out; c += kColumnStep) {
    const __mmask32 mask = out - c >= kColumnStep ? ~__mmask32{0} : (__mmask32{1} << (out - c)) - 1;
    __m512 low[Tile], high[Tile];
    for (int t = 0; t < Tile; ++t) low[t] = _mm512_loadu_ps(sums + t * pitch + c), high[t] = _mm512_loadu_ps(sums + t * pitch + c + kLanes);
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* row = weights + (k + 2 * p) * out + c;
      __builtin_prefetch(row + kStripe * out);
      __builtin_prefetch(row + (kStripe + 1) * out);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, row), b = _mm512_maskz_loadu_epi16(mask, row + out);
      const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(a, b), second = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int t = 0; t < Tile; ++t) {
        int32_t two;
        std::memcpy(&two, x + t * in + k + 2 * p, sizeof(two));
        const __m512bh factors = (__m512bh)_mm512_set1_epi32(two);
        low[t] = _mm512_dpbf16_ps(low[t], first, factors);
        high[t] = _mm512_dpbf16_ps(high[t], second, factors);
      }
    }
    for (int t = 0; t < Tile; ++t) _mm512_storeu_ps(sums + t * pitch + c, low[t]), _mm512_storeu_ps(sums + t * pitch + c + kLanes, high[t]);
  }
}

// Products of a range of the weights' rows into sums [rows of x, padded(out)].
inline void add_range(const uint16_t* x, int64_t rows, int64_t in, const uint16_t* weights, int64_t out, int64_t range, float* sums) {
  const int64_t begin = range * rows_of_range(in), end = std::min(in, begin + rows_of_range(in));
  std::fill(sums, sums + rows * padded(out), 0.0f);
  for (int64_t k = begin; k < end; k += kStripe) {
    const int64_t pairs = std::min(kStripe, end - k) / 2;
    over_rows(rows, [&](int64_t row, auto tile) { add_stripe<tile>(x + row * in, in, weights, out, k, pairs, sums + row * padded(out)); });
  }
}

// result [rows, out] from column c on, up to 32 of a row: the sum over the ranges, their columns in order.
inline void add_up(const float* sums, int64_t ranges, int64_t between, int64_t left, float* result) {
  __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + kLanes);
  for (int64_t range = 1; range < ranges; ++range) {
    sums += between;
    low = _mm512_add_ps(low, _mm512_loadu_ps(sums));
    high = _mm512_add_ps(high, _mm512_loadu_ps(sums + kLanes));
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto mask = [&](int64_t n) { return n >= kLanes ? ~__mmask16{0} : n <= 0 ? __mmask16{0} : __mmask16((1 << n) - 1); };
  _mm512_mask_storeu_ps(result, mask(left), _mm512_permutex2var_ps(low, first, high));
  _mm512_mask_storeu_ps(result + kLanes, mask(left - kLanes), _mm512_permutex2var_ps(low, second, high));
}

#endif

}  // namespace diffkv
