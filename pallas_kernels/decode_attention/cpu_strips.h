// Dot products of queries with 32 stored keys, and of weights with panels of stored values: float32, and bfloat16 where the CPU has it.
//
// Scale and zero point stay outside the products (docs/design.md 7): logit = s_t (q . c_t) + z_t sum(q), out += (p s) C^T + sum(p z).
// A payload row is loaded once for all the channels that its planes hold; planes are unrolled, so every shift is a constant.
#pragma once

#include "pages.h"

namespace diffkv {

constexpr int kPanel = 8;  // strips whose values are multiplied together, so that sums stay in registers

// The queries of one KV head, prepared once.
struct Queries {
  int heads, head_dim;
  bool bfloat16;                // multiply in bfloat16
  const float* exact;           // [heads, head_dim]
  const uint16_t* rounded;      // the same in bfloat16; pairs of channels are read as one word
  const uint16_t* sixteenfold;  // rounded * 16
  const float* prefix;          // [heads, head_dim + 1] sums of the first channels, for the zero points

  float channel_sum(int head, int from, int to) const {
    return prefix[head * (head_dim + 1) + to] - prefix[head * (head_dim + 1) + from];
  }
};

// Whether the bfloat16 products can take a codec: they read channels two by two.
template <typename Reader>
constexpr bool pairs_possible = DIFFKV_PAIRS && Reader::pairs;
inline bool pairs_fit(const Codec& codec, int head_dim) {
  return DIFFKV_PAIRS && codec.pairs && !codec.decoded_first() && codec.rows % 2 == 0 && head_dim / codec.groups % 2 == 0;
}

#if DIFFKV_PAIRS

inline Floats dot_pairs(Floats sum, __m512i a, __m512i b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

inline __m512i pair(const uint16_t* two) {
  int32_t word;
  std::memcpy(&word, two, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Two rows of 32 bytes.
inline __m512i two_rows(const uint8_t* first, int64_t next) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first)), _mm256_loadu_si256((const __m256i*)(first + next)), 1);
}

// Places in two_rows from which word t (token t of the first or second 16) is made: its byte of the one row twice, then of the other; or
// for bfloat16, whose upper bytes come from a second pair of rows, the lower and upper byte of each.
inline __m512i spread(int half, bool upper_bytes) {
  alignas(64) int8_t index[64];
  for (int t = 0; t < 16; ++t) {
    index[4 * t] = static_cast<int8_t>(t + 16 * half);
    index[4 * t + 2] = static_cast<int8_t>(32 + t + 16 * half);
    index[4 * t + 1] = static_cast<int8_t>(index[4 * t] + (upper_bytes ? 64 : 0));
    index[4 * t + 3] = static_cast<int8_t>(index[4 * t + 2] + (upper_bytes ? 64 : 0));
  }
  return _mm512_load_si512(index);
}

// Bytes t and 32 + t of two_rows as half word t: the values of 32 tokens kept in bfloat16.
inline __m512i joined(__m512i rows) {
  const __m512i by_eights = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), rows);
  const __m512i interleave = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  return _mm512_shuffle_epi8(by_eights, interleave);
}

#endif

// total += q . codes over rows [begin, end) of planes [First, First + Planes); of biased codes when `Pairs`.
template <typename Reader, bool Pairs, int Heads, int First, int Planes>
inline void accumulate(const Queries& q, int head, const Stored& at, int stride, int begin, int end, Floats (&total)[Heads][2]) {
  const int rows = q.head_dim / Reader::planes;
#if DIFFKV_PAIRS
  if constexpr (Pairs && Reader::type == Exact::bfloat16) {
    const __m512i low = spread(0, true), high = spread(1, true);
    for (int row = begin; row < end; row += 2) {
      const uint8_t* from = at.payload + row * stride;
      const __m512i lower = two_rows(from, stride), upper = two_rows(from + int64_t{q.head_dim} * stride, stride);
      const __m512i numbers[2] = {_mm512_permutex2var_epi8(lower, low, upper), _mm512_permutex2var_epi8(lower, high, upper)};
      for (int h = 0; h < Heads; ++h) {
        const __m512i factor = pair(q.rounded + (head + h) * q.head_dim + row);
        for (int half = 0; half < 2; ++half) total[h][half] = dot_pairs(total[h][half], numbers[half], factor);
      }
    }
    return;
  } else if constexpr (Pairs) {
    const __m512i low = spread(0, false), high = spread(1, false);
    for (int row = begin; row < end; row += 2) {
      const uint8_t* from = at.payload + row * stride;
      const __m512i both = two_rows(from, stride);
      const __m512i bytes[2] = {_mm512_permutexvar_epi8(low, both), _mm512_permutexvar_epi8(high, both)};
      unrolled<Reader::bits == 8 ? 2 : Planes>([&](auto i) {  // of eight bits, the lower and the upper half
        constexpr int shift = Reader::bits == 8 ? 4 * i : (First + i) * Reader::bits;
        const int channel = Reader::bits == 8 ? row : (First + i) * rows + row;
        const __m512i codes[2] = {Reader::template in_pairs<shift>(bytes[0]), Reader::template in_pairs<shift>(bytes[1])};
        const uint16_t* factors = Reader::bits == 8 && i == 1 ? q.sixteenfold : q.rounded;
        for (int h = 0; h < Heads; ++h) {
          const __m512i factor = pair(factors + (head + h) * q.head_dim + channel);
          total[h][0] = dot_pairs(total[h][0], codes[0], factor);
          total[h][1] = dot_pairs(total[h][1], codes[1], factor);
        }
      });
    }
    return;
  }
#endif
  for (int row = begin; row < end; ++row) {
    const uint8_t* from = at.payload + row * stride;
    unrolled<Planes>([&](auto i) {
      constexpr int plane = First + i;
      const int64_t next_byte = int64_t{q.head_dim} * stride;
      const Floats codes[2] = {Reader::read(from, plane, next_byte), Reader::read(from + kLanes, plane, next_byte)};
      for (int h = 0; h < Heads; ++h) {
        const float factor = q.exact[(head + h) * q.head_dim + plane * rows + row];
        total[h][0] += factor * codes[0];
        total[h][1] += factor * codes[1];
      }
    });
  }
}

// q . k of `Heads` query heads and 32 keys into logits[h * pitch ...]; what lies in dead lanes means nothing.
template <typename Reader, bool Pairs, int Heads>
void key_products(const Queries& q, int head, const Codec& codec, const Stored& at, int stride, float* logits, int64_t pitch) {
  const int width = q.head_dim / codec.groups, rows = q.head_dim / Reader::planes;
  Floats total[Heads][2] = {};
  for (int group = 0; group < codec.groups; ++group) {
    Floats part[Heads][2] = {};
    if (codec.groups == 1) {
      accumulate<Reader, Pairs, Heads, 0, Reader::planes>(q, head, at, stride, 0, rows, part);
    } else {
      unrolled<Reader::planes>([&](auto plane) {
        const int begin = group * width - plane * rows, end = begin + width;
        accumulate<Reader, Pairs, Heads, plane, 1>(q, head, at, stride, begin > 0 ? begin : 0, end < rows ? end : rows, part);
      });
    }
    for (int half = 0; half < 2; ++half) {
      const Grid grid = Grid::read(at, codec, group, stride, half);
      for (int h = 0; h < Heads; ++h) {
        const float channels = q.channel_sum(head + h, group * width, (group + 1) * width);
        if (Pairs) part[h][half] -= Reader::bias * channels;
        total[h][half] += part[h][half] * grid.scale;
        if (Reader::zeroed) total[h][half] += channels * grid.zero;
      }
    }
  }
  for (int h = 0; h < Heads; ++h) {
    store(logits + h * pitch, total[h][0]);
    store(logits + h * pitch + kLanes, total[h][1]);
  }
}

// Weights of a panel of strips, scaled by each group of the values: what the value products read.
struct PanelWeights {
  const float* exact;           // [groups, heads, kPanel, 32]
  const uint16_t* rounded;      // the same in bfloat16
  const uint16_t* sixteenfold;  // rounded * 16
};

// out[h, c] += weight * code of the panel's tokens, as 16 partial sums. `OneGroup`: all planes share their weights.
template <typename Reader, bool Pairs, bool OneGroup, int Heads>
void value_products(const Codec& codec, int head_dim, int heads, int head, const Strip* strips, int count, int stride,
                    const PanelWeights& weights, Floats* out) {
  constexpr int planes = Reader::planes;
  const int width = head_dim / codec.groups, rows = head_dim / planes;
  const auto place = [&](int channel, int h, int s) {
    return (((OneGroup ? 0 : channel / width) * heads + head + h) * kPanel + s) * kStrip;
  };
  for (int row = 0; row < rows; ++row) {
    Floats total[planes][Heads] = {};
    for (int s = 0; s < count; ++s) {
      const uint8_t* from = strips[s].value.payload + row * stride;
#if DIFFKV_PAIRS
      if constexpr (Pairs && Reader::type == Exact::bfloat16) {
        const __mmask32 live = strips[s].live == kStrip ? ~__mmask32{0} : (__mmask32{1} << strips[s].live) - 1;
        const __m512i numbers = _mm512_maskz_mov_epi16(live, joined(two_rows(from, int64_t{head_dim} * stride)));
        for (int h = 0; h < Heads; ++h) {
          total[0][h] = dot_pairs(total[0][h], numbers, _mm512_loadu_si512(weights.rounded + place(row, h, s)));
        }
        continue;
      } else if constexpr (Pairs) {
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
        unrolled<planes>([&](auto i) {
          const __m512i codes = Reader::template in_pairs<Reader::bits == 8 ? 0 : i * Reader::bits>(bytes);
          for (int h = 0; h < Heads; ++h) {
            total[i][h] = dot_pairs(total[i][h], codes, _mm512_loadu_si512(weights.rounded + place(i * rows + row, h, s)));
          }
        });
        if constexpr (Reader::bits == 8) {
          const __m512i upper = Reader::template in_pairs<4>(bytes);
          for (int h = 0; h < Heads; ++h) {
            total[0][h] = dot_pairs(total[0][h], upper, _mm512_loadu_si512(weights.sixteenfold + place(row, h, s)));
          }
        }
        continue;
      }
#endif
      for (int half = 0; half < 2; ++half) {
        unrolled<planes>([&](auto i) {
          Floats code = Reader::read(from + half * kLanes, i, int64_t{head_dim} * stride);
          if (!Reader::scaled && strips[s].live < kStrip) code = select(lanes() + half * kLanes < strips[s].live, code, Floats{});
          for (int h = 0; h < Heads; ++h) total[i][h] += code * load<Floats>(weights.exact + place(i * rows + row, h, s) + half * kLanes);
        });
      }
    }
    for (int i = 0; i < planes; ++i) {
      for (int h = 0; h < Heads; ++h) out[(head + h) * head_dim + i * rows + row] += total[i][h];
    }
  }
}

}  // namespace diffkv
