// Dot products of queries with 32 stored keys, and of weights with panels of stored values: float32, and bfloat16 where the CPU has it.
//
// Scale and zero point stay outside the products (docs/design.md 7): logit = s_t (q . c_t) + z_t sum(q), out += (p s) C^T + sum(p z).
#pragma once

#include <type_traits>

#include "pages.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define DIFFKV_BF16 1
#else
#define DIFFKV_BF16 0
#endif

namespace diffkv {

constexpr int kPanel = 8;  // strips whose values are multiplied together, so that sums stay in registers

// The queries of one KV head, prepared once.
struct Queries {
  int heads, head_dim;
  bool bfloat16;                    // multiply in bfloat16
  const float* exact;               // [heads, head_dim]
  const uint16_t* rounded;          // the same in bfloat16; pairs of channels are read as one word
  const uint16_t* sixteenfold;      // rounded * 16
  const float* prefix;              // [heads, head_dim + 1] sums of the first channels, for the zero points

  float channel_sum(int head, int from, int to) const { return prefix[head * (head_dim + 1) + to] - prefix[head * (head_dim + 1) + from]; }
};

inline bool pairs_fit(const Codec& codec, int head_dim) {
  return DIFFKV_BF16 && codec.exact == Exact::no && codec.rows % 2 == 0 && head_dim / codec.groups % 2 == 0;
}

inline Floats scale(const Stored& at, int row, int stride, int half) {
  return from_float16(load<Shorts>(at.meta + row * stride + half * kLanes));
}

template <typename Reader, int Heads>
inline void dots(const Queries& q, int first, const Stored& at, int stride, int from, int to, Floats (&total)[Heads][2]) {
  over_channels<Reader>(q.head_dim, from, to, [&](int c, int row, int plane) {
    const uint8_t* bytes = at.payload + row * stride;
    const int64_t next_byte = q.head_dim * stride;
    const Floats low = Reader::read(bytes, plane, next_byte), high = Reader::read(bytes + kLanes, plane, next_byte);
    for (int h = 0; h < Heads; ++h) {
      const float x = q.exact[(first + h) * q.head_dim + c];
      total[h][0] += x * low;
      total[h][1] += x * high;
    }
  });
}

#if DIFFKV_BF16

inline Floats dot_pairs(Floats sum, __m512i a, __m512i b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

inline __m512i pair(const uint16_t* two) {
  int32_t word;
  std::memcpy(&word, two, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Bytes t and 32 + t (rows c and c + 1 of one token) into the two halves of word t, for tokens 0 to 15 and 16 to 31.
inline __m512i spread(int half) {
  alignas(64) int8_t index[64];
  for (int t = 0; t < 16; ++t) {
    index[4 * t] = index[4 * t + 1] = static_cast<int8_t>(t + 16 * half);
    index[4 * t + 2] = index[4 * t + 3] = static_cast<int8_t>(32 + t + 16 * half);
  }
  return _mm512_load_si512(index);
}

// Bits `shift ...` of every half word as the bfloat16 number 128 + code: at most four bits fit its fraction exactly.
inline __m512i biased_codes(__m512i bytes, int shift, int mask) {
  const __m512i shifted = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(shift));
  return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(mask), _mm512_set1_epi16(0x4300), 0xEA);  // (a & b) | c
}

// Sums of q times (128 + code) over channels [from, to) of one group; eight bits are two codes of four, the upper one sixteenfold.
template <typename Reader, int Heads>
inline void biased_dots(const Queries& q, int first, const Stored& at, int stride, int from, int to, Floats (&total)[Heads][2]) {
  constexpr int bits = Reader::bits, mask = bits == 8 ? 15 : (1 << bits) - 1;
  const __m512i low = spread(0), high = spread(1);
  over_channels<Reader, 2>(q.head_dim, from, to, [&](int c, int row, int plane) {
    const uint8_t* rows = at.payload + row * stride;
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)rows)),
                                            _mm256_loadu_si256((const __m256i*)(rows + stride)), 1);
    const __m512i bytes[2] = {_mm512_permutexvar_epi8(low, both), _mm512_permutexvar_epi8(high, both)};
    for (int half = 0; half < 2; ++half) {
      const __m512i codes = biased_codes(bytes[half], plane * bits, mask);
      for (int h = 0; h < Heads; ++h) total[h][half] = dot_pairs(total[h][half], codes, pair(q.rounded + (first + h) * q.head_dim + c));
      if constexpr (bits == 8) {
        const __m512i upper = biased_codes(bytes[half], 4, mask);
        for (int h = 0; h < Heads; ++h) total[h][half] = dot_pairs(total[h][half], upper, pair(q.sixteenfold + (first + h) * q.head_dim + c));
      }
    }
  });
}

#endif

// q . k of `Heads` query heads and 32 keys into logits[h * pitch ...]; what lies in dead lanes means nothing.
template <typename Reader, bool Pairs, int Heads>
inline void key_products(const Queries& q, int first, const Codec& codec, const Stored& at, int stride, float* logits, int64_t pitch) {
  Floats total[Heads][2] = {};
  const int width = q.head_dim / codec.groups;
  for (int group = 0; group < codec.groups; ++group) {
    const int from = group * width, to = from + width;
    Floats part[Heads][2] = {};
    float bias = 0;
#if DIFFKV_BF16
    if constexpr (Pairs) {
      biased_dots<Reader, Heads>(q, first, at, stride, from, to, part);
      bias = 128.0f * (Reader::bits == 8 ? 17.0f : 1.0f);
    } else
#endif
      dots<Reader, Heads>(q, first, at, stride, from, to, part);
    for (int h = 0; h < Heads; ++h) {
      const float channels = q.channel_sum(first + h, from, to);
      for (int half = 0; half < 2; ++half) {
        if constexpr (Reader::scaled) {
          total[h][half] += (part[h][half] - bias * channels) * scale(at, group, stride, half);
          total[h][half] += channels * scale(at, codec.groups + group, stride, half);
        } else {
          total[h][half] = part[h][half];
        }
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
  const float* exact;       // [groups, heads, kPanel, 32]
  const uint16_t* rounded;  // the same in bfloat16
  const uint16_t* sixteenfold;
};

// out[h, c] += weight * code of the panel's tokens, as 16 partial sums.
template <typename Reader, bool Pairs, int Heads>
inline void value_products(const Codec& codec, int head_dim, int heads, int first, const Strip* strips, int count, int stride,
                           const PanelWeights& weights, Floats* out) {
  const int width = head_dim / codec.groups;
  over_channels<Reader>(head_dim, 0, head_dim, [&](int c, int row, int plane) {
    Floats total[Heads] = {};
    const int64_t at = (c / width * heads + first) * kPanel * kStrip;
    for (int s = 0; s < count; ++s) {
      const uint8_t* from = strips[s].value.payload + row * stride;
#if DIFFKV_BF16
      if constexpr (Pairs) {
        constexpr int bits = Reader::bits, mask = bits == 8 ? 15 : (1 << bits) - 1;
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
        const __m512i codes = biased_codes(bytes, plane * bits, mask);
        for (int h = 0; h < Heads; ++h) {
          total[h] = dot_pairs(total[h], codes, _mm512_loadu_si512(weights.rounded + at + (h * kPanel + s) * kStrip));
        }
        if constexpr (bits == 8) {
          const __m512i upper = biased_codes(bytes, 4, mask);
          for (int h = 0; h < Heads; ++h) {
            total[h] = dot_pairs(total[h], upper, _mm512_loadu_si512(weights.sixteenfold + at + (h * kPanel + s) * kStrip));
          }
        }
        continue;
      }
#endif
      for (int half = 0; half < 2; ++half) {
        Floats code = Reader::read(from + half * kLanes, plane, head_dim * stride);
        if (!Reader::scaled && strips[s].live < kStrip) code = select(lanes() + half * kLanes < strips[s].live, code, Floats{});
        for (int h = 0; h < Heads; ++h) total[h] += code * load<Floats>(weights.exact + at + (h * kPanel + s) * kStrip + half * kLanes);
      }
    }
    for (int h = 0; h < Heads; ++h) out[(first + h) * head_dim + c] += total[h];
  });
}

}  // namespace diffkv
