// Rotary position embedding of keys that are stored without it, as pallas_kernels/rope.py has it.
#pragma once

#include "vector.h"

namespace diffkv {

struct Turn {
  Floats cos, sin;
};

// Of angles from 0 to 10^5: reduced by quarters of a turn in three steps, then the Cephes polynomials.
inline Turn turn(Floats angle) {
  const Floats shifter = splat(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
  const Floats rounded = angle * splat(0.636619772f) + shifter, quarters = rounded - shifter;
  const Ints quarter = as_ints(rounded);
  const Floats x = ((angle - quarters * splat(1.5703125f)) - quarters * splat(4.837512969970703125e-4f)) - quarters * splat(7.54978995489e-8f);
  const Floats z = x * x;
  const Floats sin = ((splat(-1.9515295891e-4f) * z + splat(8.3321608736e-3f)) * z + splat(-1.6666654611e-1f)) * z * x + x;
  const Floats cos = ((splat(2.443315711809948e-5f) * z + splat(-1.388731625493765e-3f)) * z + splat(4.166664568298827e-2f)) * z * z +
                     (splat(1.0f) - splat(0.5f) * z);
  const Ints odd = -(quarter & 1);
  const Ints swapped = (as_ints(sin) ^ as_ints(cos)) & odd;  // 0 where they stay
  return {as_floats(as_ints(cos) ^ swapped ^ (((quarter + 1) & 2) << 30)), as_floats(as_ints(sin) ^ swapped ^ ((quarter & 2) << 30))};
}

// Channels `x [d, 2]` of twice 16 tokens, turned by the angles of their positions: channel c is paired with channel c + d / 2.
inline void turn_pairs(Floats* x, int d, const float* frequencies, const Ints (&position)[2]) {
  const Floats at[2] = {to_floats(position[0]), to_floats(position[1])};
  for (int c = 0; c < d / 2; ++c) {
    for (int half = 0; half < 2; ++half) {
      Floats &first = x[2 * c + half], &second = x[2 * (c + d / 2) + half];
      const Turn by = turn(at[half] * frequencies[c]);
      const Floats turned = first * by.cos - second * by.sin;
      second = second * by.cos + first * by.sin;
      first = turned;
    }
  }
}

}  // namespace diffkv
