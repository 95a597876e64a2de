// Products of many rows with weights [in, out]: panels of 64 columns are packed into words (words.h), one range of the weights' rows after
// the other, then multiplied in blocks of registers.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "elements.h"
#include "ranges.h"
#include "scratch.h"
#include "words.h"

namespace diffkv {

constexpr int64_t kRowBlock = 504;  // rows of x that one packed panel is multiplied with; a multiple of kRows

// Columns [first, first + 64) of weights [in, out] as words [in, 64]; zeros beyond the last column.
inline void pack_columns(Single, const Numbers& weights, int64_t in, int64_t out, int64_t first, int32_t* packed) {
  for (int64_t k = 0; k < in; ++k, packed += kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) store(packed + c, as_ints(weights.vector(k * out + first + c, out - first - c)));
  }
}

#if DIFFKV_BF16

// The same as words [in / 2, 64], rows 2 k and 2 k + 1 in one.
inline void pack_columns(Pair, const Numbers& weights, int64_t in, int64_t out, int64_t first, int32_t* packed) {
  alignas(64) int16_t order[2][32];
  for (int i = 0; i < 32; ++i) order[0][i] = int16_t(i / 2 + i % 2 * 32), order[1][i] = int16_t(16 + i / 2 + i % 2 * 32);
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const int64_t left = std::min<int64_t>(kPanel, out - first);
  for (int half = 0; half < 2; ++half) {
    const int64_t columns = std::clamp<int64_t>(left - 32 * half, 0, 32);
    const __mmask32 mask = columns == 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(weights.data) + first + 32 * half;
    for (int64_t k = 0; k < in; k += 2) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, from + k * out), odd = _mm512_maskz_loadu_epi16(mask, from + (k + 1) * out);
      int32_t* to = packed + k / 2 * kPanel + 32 * half;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

#endif

// to [kRows, kColumns vectors], rows of `pitch` numbers: kRows rows of x times the packed columns, the sums of the ranges added in order.
template <typename Word>
inline void sum_ranges(const int32_t* a, int64_t words, const int32_t* packed, int64_t in, float* to, int64_t pitch) {
  const int64_t step = rows_of_range(in) / Word::size;
  for (int64_t k = 0; k < words; k += step) {
    Floats sum[kRows][kColumns] = {};
    multiply<Word, kColumns>(a + k, words, packed + k * kPanel, int(std::min(step, words - k)), sum);
    const auto keep = [&](auto first) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          float* place = to + i * pitch + j * kLanes;
          store(place, first ? sum[i][j] : load<Floats>(place) + sum[i][j]);
        }
      }
    };
    if (k == 0) keep(std::true_type{});
    else keep(std::false_type{});
  }
}

// result [rows, out] of columns [first, first + 64) and rows [begin, begin + kRowBlock) of x, whose rows have `words` words.
template <typename Word>
void row_block(const int32_t* x, int64_t rows, int64_t words, const Numbers& weights, int64_t in, int64_t out, int64_t first, int64_t begin,
               float* result) {
  const int64_t end = std::min(rows, begin + kRowBlock), columns = std::min<int64_t>(kPanel, out - first);
  int32_t* packed = scratch<struct PackedColumns, int32_t>(words * kPanel);
  int32_t* last = scratch<struct LastRows, int32_t>(words * kRows);
  pack_columns(Word{}, weights, in, out, first, packed);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, end - row);
    const int32_t* a = x + row * words;
    if (count < kRows) {
      std::memcpy(last, a, count * words * sizeof(int32_t));
      a = last;  // what is behind its rows is multiplied too, and left out
    }
    constexpr int64_t width = kColumns * kLanes;
    for (int64_t c = 0; c < columns; c += width) {
      float* to = result + row * out + first + c;
      if (count == kRows && columns - c >= width) {
        sum_ranges<Word>(a, words, packed + c, in, to, out);
        continue;
      }
      alignas(64) float block[kRows * width];
      sum_ranges<Word>(a, words, packed + c, in, block, width);
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * out, block + i * width, std::min(width, columns - c) * sizeof(float));
    }
  }
}

}  // namespace diffkv
