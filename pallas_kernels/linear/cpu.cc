// Products of rows with stored weights. Of a few rows, reading the weights is what takes the time: each is read once, in place, for all.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_rows.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int kAhead = 24;  // rows of weights asked for in advance
constexpr int kUnit = 64;   // columns (or rows, when transposed) of weights that a thread takes at once
constexpr int kFewRows = 32;  // up to here reading the weights takes longer than multiplying

struct Rows {
  int64_t count, width;
  const float* exact;       // [count, width]
  const uint16_t* rounded;  // the same in bfloat16, when both sides are; else null
};

struct Weights {
  const void* data;
  bool bfloat16;
  int64_t in, out;
  float* result;  // [rows, out]
};

template <bool Bfloat16>
inline Floats weights_at(const void* data, int64_t i) {
  if constexpr (Bfloat16) return from_bfloat16(load<Shorts>(static_cast<const uint16_t*>(data) + i));
  return load<Floats>(static_cast<const float*>(data) + i);
}

template <bool Bfloat16>
inline float weight(const void* data, int64_t i) {
  if constexpr (!Bfloat16) return static_cast<const float*>(data)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Columns [first, first + 16 * Vectors) for `Tile` rows of x from `row` on, weights [in, out].
template <bool Bfloat16, int Tile, int Vectors>
void columns(const Rows& x, int64_t row, const Weights& w, int64_t first) {
  Floats total[Tile][Vectors] = {};
  for (int64_t k = 0; k < w.in; ++k) {
    const int64_t at = k * w.out + first;
    const char* ahead = static_cast<const char*>(w.data) + (at + kAhead * w.out) * (Bfloat16 ? 2 : 4);
    for (int v = 0; v < Vectors; v += Bfloat16 ? 2 : 1) __builtin_prefetch(ahead + v * kLanes * (Bfloat16 ? 2 : 4));
    for (int v = 0; v < Vectors; ++v) {
      const Floats numbers = weights_at<Bfloat16>(w.data, at + v * kLanes);
      for (int t = 0; t < Tile; ++t) total[t][v] += x.exact[(row + t) * x.width + k] * numbers;
    }
  }
  for (int t = 0; t < Tile; ++t) {
    for (int v = 0; v < Vectors; ++v) store(w.result + (row + t) * w.out + first + v * kLanes, total[t][v]);
  }
}

#if DIFFKV_BF16

// The same in bfloat16: two rows of weights are interleaved into pairs, 32 columns at a time.
template <int Tile, int Pairs>
void column_pairs(const Rows& x, int64_t row, const Weights& w, int64_t first) {
  __m512 low[Tile][Pairs] = {}, high[Tile][Pairs] = {};
  const uint16_t* data = static_cast<const uint16_t*>(w.data) + first;
  for (int64_t k = 0; k < w.in; k += 2) {
    const uint16_t* even = data + k * w.out;
    for (int v = 0; v < Pairs; ++v) {
      __builtin_prefetch(even + kAhead * w.out + 32 * v);
      __builtin_prefetch(even + (kAhead + 1) * w.out + 32 * v);
      const __m512i a = _mm512_loadu_si512(even + 32 * v), b = _mm512_loadu_si512(even + w.out + 32 * v);
      const __m512bh ab = (__m512bh)_mm512_unpacklo_epi16(a, b), cd = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int t = 0; t < Tile; ++t) {
        int32_t two;
        std::memcpy(&two, x.rounded + (row + t) * x.width + k, sizeof(two));
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(two);
        low[t][v] = _mm512_dpbf16_ps(low[t][v], ab, pair);
        high[t][v] = _mm512_dpbf16_ps(high[t][v], cd, pair);
      }
    }
  }
  // Unpacking works within 128 bits: columns 0-3, 8-11, 16-19, 24-27 are in `low`, the others in `high`.
  const __m512i order_low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i order_high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int t = 0; t < Tile; ++t) {
    for (int v = 0; v < Pairs; ++v) {
      float* to = w.result + (row + t) * w.out + first + 32 * v;
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(low[t][v], order_low, high[t][v]));
      _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low[t][v], order_high, high[t][v]));
    }
  }
}

#endif

// One column, for what is left of a width that is no multiple of 16.
template <bool Bfloat16>
void single_column(const Rows& x, const Weights& w, int64_t column) {
  for (int64_t row = 0; row < x.count; ++row) {
    float total = 0;
    for (int64_t k = 0; k < w.in; ++k) total += x.exact[row * x.width + k] * weight<Bfloat16>(w.data, k * w.out + column);
    w.result[row * w.out + column] = total;
  }
}

// Calls body(row, std::integral_constant tile) for tiles of 8, 4, 2 and 1 rows.
template <typename Body>
void over_rows(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; count - row >= 8; row += 8) body(row, std::integral_constant<int, 8>{});
  if (count - row >= 4) body(row, std::integral_constant<int, 4>{}), row += 4;
  if (count - row >= 2) body(row, std::integral_constant<int, 2>{}), row += 2;
  if (count - row >= 1) body(row, std::integral_constant<int, 1>{});
}

template <bool Bfloat16>
void column_unit(const Rows& x, const Weights& w, int64_t first) {
  const int64_t end = std::min(first + kUnit, w.out);
#if DIFFKV_BF16
  if (Bfloat16 && x.rounded && x.width % 2 == 0) {
    for (; end - first >= 64; first += 64) {
      over_rows(x.count, [&](int64_t row, auto tile) {
        if constexpr (tile <= 4) return column_pairs<tile, 2>(x, row, w, first);
        column_pairs<tile, 1>(x, row, w, first);
        column_pairs<tile, 1>(x, row, w, first + 32);
      });
    }
    for (; end - first >= 32; first += 32) {
      over_rows(x.count, [&](int64_t row, auto tile) { column_pairs<tile, 1>(x, row, w, first); });
    }
  }
#endif
  for (; end - first >= 32; first += 32) {
    over_rows(x.count, [&](int64_t row, auto tile) { columns<Bfloat16, tile, 2>(x, row, w, first); });
  }
  for (; end - first >= kLanes; first += kLanes) {
    over_rows(x.count, [&](int64_t row, auto tile) { columns<Bfloat16, tile, 1>(x, row, w, first); });
  }
  for (; first < end; ++first) single_column<Bfloat16>(x, w, first);
}

// One row of transposed weights [out, in] with `Tile` rows of x.
template <bool Bfloat16, int Tile>
void row_products(const Rows& x, int64_t row, const Weights& w, int64_t column) {
  const int64_t at = column * w.in;
  float result[Tile] = {};
  int64_t k = 0;
#if DIFFKV_BF16
  if (Bfloat16 && x.rounded) {
    __m512 total[Tile] = {};
    const uint16_t* data = static_cast<const uint16_t*>(w.data) + at;
    for (; k + 32 <= w.in; k += 32) {
      __builtin_prefetch(data + k + 2048);
      const __m512bh numbers = (__m512bh)_mm512_loadu_si512(data + k);
      for (int t = 0; t < Tile; ++t) {
        total[t] = _mm512_dpbf16_ps(total[t], numbers, (__m512bh)_mm512_loadu_si512(x.rounded + (row + t) * x.width + k));
      }
    }
    for (int t = 0; t < Tile; ++t) result[t] = sum((Floats)total[t]);
  }
#endif
  Floats total[Tile] = {};
  for (; k + kLanes <= w.in; k += kLanes) {
    const Floats numbers = weights_at<Bfloat16>(w.data, at + k);
    for (int t = 0; t < Tile; ++t) total[t] += numbers * load<Floats>(x.exact + (row + t) * x.width + k);
  }
  for (int t = 0; t < Tile; ++t) result[t] += sum(total[t]);
  for (; k < w.in; ++k) {
    for (int t = 0; t < Tile; ++t) result[t] += weight<Bfloat16>(w.data, at + k) * x.exact[(row + t) * x.width + k];
  }
  for (int t = 0; t < Tile; ++t) w.result[(row + t) * w.out + column] = result[t];
}

#if DIFFKV_BF16
constexpr int64_t kBlock = kRowBlock;
#else
constexpr int64_t kBlock = 1;
#endif

// What a thread takes at once: 64 columns for all rows, or of many rows a block.
struct Unit {
  int weights;
  int64_t first, row;
  bool block;
};

void multiply(const Rows& x, const Weights& w, const Unit& unit, bool transposed) {
  const int64_t first = unit.first;
#if DIFFKV_BF16
  if (unit.block) return row_block(x.rounded, x.count, w.in, static_cast<const uint16_t*>(w.data), w.out, first, unit.row, w.result);
#endif
  if (!transposed) return w.bfloat16 ? column_unit<true>(x, w, first) : column_unit<false>(x, w, first);
  for (int64_t column = first; column < std::min(first + kUnit, w.out); ++column) {
    over_rows(x.count, [&](int64_t row, auto tile) {
      w.bfloat16 ? row_products<true, tile>(x, row, w, column) : row_products<false, tile>(x, row, w, column);
    });
  }
}

ffi::Error linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs stacks,
                  ffi::RemainingRets results, bool transposed) {
  const int64_t count = x.dimensions()[0], width = x.dimensions()[1], at = layer.typed_data()[0];
  const bool bfloat16 = x.element_type() == ffi::DataType::BF16;
  Rows rows{count, width, static_cast<const float*>(x.untyped_data()), nullptr};
  if (bfloat16) {
    rows.rounded = static_cast<const uint16_t*>(x.untyped_data());
    float* exact = scratch<struct ExactRows, float>(count * width);
    for (int64_t i = 0; i < count * width; ++i) exact[i] = weight<true>(rows.rounded, i);
    rows.exact = exact;
  }
  std::vector<Weights> weights;
  std::vector<Unit> units;
  for (size_t i = 0; i < stacks.size(); ++i) {
    const auto stack = stacks.get<ffi::AnyBuffer>(i).value();
    auto result = results.get<ffi::Buffer<ffi::F32>>(i).value();
    const auto shape = stack.dimensions();
    if (at < 0 || at >= shape[0]) return ffi::Error::InvalidArgument("layer outside the stacked weights");
    const bool narrow = stack.element_type() == ffi::DataType::BF16;
    const char* data = static_cast<const char*>(stack.untyped_data()) + at * shape[1] * shape[2] * (narrow ? 2 : 4);
    const int64_t in = shape[transposed ? 2 : 1], out = shape[transposed ? 1 : 2];
    weights.push_back({data, narrow, in, out, result->typed_data()});
    const bool blocks = DIFFKV_BF16 && bfloat16 && narrow && !transposed && count > kFewRows && in % 2 == 0;
    for (int64_t first = 0; first < out; first += kUnit) {
      for (int64_t row = 0; row < (blocks ? count : 1); row += blocks ? kBlock : 1) units.push_back({int(i), first, row, blocks});
    }
  }
  parallel_for(threads, units.size(), [&](int64_t i) { multiply(rows, weights[units[i].weights], units[i], transposed); });
  return ffi::Error::Success();
}

}  // namespace

// Whether products of many rows are made for this CPU.
extern "C" int multiplies_many_rows() { return DIFFKV_BF16; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_cpu, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed"));
