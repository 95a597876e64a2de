// Products of many rows with bfloat16 weights: panels of 64 columns are packed into pairs once, then multiplied in blocks of registers.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "words.h"

#if DIFFKV_BF16

namespace diffkv {

constexpr int64_t kRowBlock = 504;  // rows of x that one packed panel is multiplied with; a multiple of kRows

// Columns [first, first + 64) of weights [in, out] as words [in / 2, 64], rows 2 k and 2 k + 1 in one; zeros beyond the last column.
inline void pack_columns(const uint16_t* weights, int64_t in, int64_t out, int64_t first, int32_t* packed) {
  alignas(64) int16_t order[2][32];
  for (int i = 0; i < 32; ++i) order[0][i] = int16_t(i / 2 + i % 2 * 32), order[1][i] = int16_t(16 + i / 2 + i % 2 * 32);
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const int64_t left = std::min<int64_t>(kPanel, out - first);
  for (int half = 0; half < 2; ++half) {
    const int64_t columns = std::clamp<int64_t>(left - 32 * half, 0, 32);
    const __mmask32 mask = columns == 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    for (int64_t k = 0; k < in; k += 2) {
      const uint16_t* from = weights + k * out + first + 32 * half;
      const __m512i even = _mm512_maskz_loadu_epi16(mask, from), odd = _mm512_maskz_loadu_epi16(mask, from + out);
      int32_t* to = packed + k / 2 * kPanel + 32 * half;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// result [rows, out] of columns [first, first + 64) and rows [begin, begin + kRowBlock) of x [rows, in] in bfloat16, `in` even.
inline void row_block(const uint16_t* x, int64_t rows, int64_t in, const uint16_t* weights, int64_t out, int64_t first, int64_t begin,
                      float* result) {
  const int64_t words = in / 2, end = std::min(rows, begin + kRowBlock), columns = std::min<int64_t>(kPanel, out - first);
  int32_t* packed = scratch<struct PackedColumns, int32_t>(words * kPanel);
  int32_t* last = scratch<struct LastRows, int32_t>(words * kRows);
  pack_columns(weights, in, out, first, packed);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, end - row);
    const int32_t* a = reinterpret_cast<const int32_t*>(x + row * in);
    if (count < kRows) {
      std::memcpy(last, a, count * words * sizeof(int32_t));
      a = last;  // what is behind its rows is multiplied too, and left out
    }
    Floats sum[kRows][kColumns] = {};
    multiply<Pair, kColumns>(a, words, packed, int(words), sum);
    for (int64_t i = 0; i < count; ++i) {
      float* to = result + (row + i) * out + first;
      if (columns == kPanel) {
        for (int j = 0; j < kColumns; ++j) store(to + j * kLanes, sum[i][j]);
      } else {
        std::memcpy(to, &sum[i], columns * sizeof(float));
      }
    }
  }
}

}  // namespace diffkv

#endif
