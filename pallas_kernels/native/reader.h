// What kernels know of a codec that they read channel by channel; each is in a header of its own, which codecs.h includes.
#pragma once

#include <utility>

#include "scales.h"

namespace diffkv {

enum class Exact { no, bfloat16, float16, float32 };

// The reader that has the code, 1 to 127, of `Codec.native` in pallas_kernels/codecs. It says
//   bits, planes            of a channel, channels in a byte: channel `row + plane * rows` lies in payload row `row`;
//   type                    of values that are kept exactly, then `bits_of(values)` are their bits;
//   scaled, zeroed          whether a group of channels has a scale, and a zero point beside it;
//   read(row, plane, next)  codes (or values) of 16 tokens, codes that bfloat16 holds; `next` bytes lie between the rows of an exact type's bytes;
//   quantise(...)           codes `[width, 16]` of a group of channels `x [width, 16]`, its scale, its zero point if any, and whether those are
//                           wide, of kCompared lanes;
//   pairs, in_pairs, bias   whether products in bfloat16 take it; then half words with the four bits (or fewer) from `Shift` on as numbers, and
//                           how far those are above the code. Eight bits are two of four, the upper one sixteenfold.
template <int Code>
struct ReaderOf {
  static constexpr int bits = 0;  // there is none
};

// Calls body(std::integral_constant) for 0 to N - 1.
template <typename Body, int... I>
inline void unrolled(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, typename Body>
inline void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, N>{});
}

}  // namespace diffkv
