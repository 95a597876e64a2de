// The levels of pallas_kernels/codecs/normal.py, and the numbers of the nearest ones: the top bit of a code is the sign.
#pragma once

#include "vector.h"

namespace diffkv {

// The positive levels of 1, 2 and 4 bits, smallest first.
template <int Bits>
constexpr float kLevels[1] = {0.796875f};
template <>
constexpr float kLevels<2>[2] = {0.453125f, 1.5078125f};
template <>
constexpr float kLevels<4>[8] = {0.1279296875f, 0.388671875f, 0.65625f, 0.94140625f, 1.2578125f, 1.6171875f, 2.0625f, 2.734375f};

// Level `code`; of larger numbers the lowest bits count.
template <int Bits>
constexpr float normal_level(int code) {
  constexpr int half = 1 << (Bits - 1);
  return code & half ? -kLevels<Bits>[code % half] : kLevels<Bits>[code % half];
}

// The levels of codes, whatever their bits above the lowest `Bits`.
template <int Bits>
inline Floats normal_levels(Ints code) {
#if defined(__AVX512F__)
  constexpr auto level = normal_level<Bits>;
  const Floats table = {level(0), level(1), level(2),  level(3),  level(4),  level(5),  level(6),  level(7),
                        level(8), level(9), level(10), level(11), level(12), level(13), level(14), level(15)};
  return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)table);
#else
  Ints size[1 << (Bits - 1)];  // halved bit after bit, without comparisons
  for (int i = 0; i < 1 << (Bits - 1); ++i) size[i] = as_ints(splat(kLevels<Bits>[i]));
  for (int bit = 0; bit < Bits - 1; ++bit) {
    const Ints odd = -((code >> bit) & 1);
    for (int i = 0; i < 1 << (Bits - 2 - bit); ++i) size[i] = size[2 * i] ^ ((size[2 * i] ^ size[2 * i + 1]) & odd);
  }
  return as_floats(size[0] ^ (((code >> (Bits - 1)) & 1) << 31));
#endif
}

}  // namespace diffkv
