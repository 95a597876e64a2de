// Products of rows with stored weights. Of a few rows, reading the weights is what takes the time: each is read once, in place, for all.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_few.h"
#include "cpu_rows.h"
#include "elements.h"
#include "parallel.h"
#include "scratch.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int kAhead = 24;  // rows of weights asked for in advance
constexpr int kUnit = 64;   // columns (or rows, when transposed) of weights that a thread takes at once
#if DIFFKV_BF16
constexpr int64_t kBlock = kRowBlock;
#else
constexpr int64_t kBlock = 1;
#endif
constexpr int kFewRows = 32;  // up to here reading the weights takes longer than multiplying

struct Rows {
  int64_t count, width;
  const float* exact;       // [count, width]; null where all products are of pairs of bfloat16
  const uint16_t* rounded;  // the same in bfloat16, when both sides are; else null
};

struct Weights {
  const void* data;
  bool bfloat16;
  int64_t in, out;
  float* result;  // [rows, out]
  float* sums;    // [ranges, rows, padded(out)] of few bfloat16 rows
};

template <bool Bfloat16>
constexpr Exact type_of = Bfloat16 ? Exact::bfloat16 : Exact::float32;

// Columns [first, first + 16 * Vectors) for `Tile` rows of x from `row` on, weights [in, out].
template <bool Bfloat16, int Tile, int Vectors>
void columns(const Rows& x, int64_t row, const Weights& w, int64_t first) {
  Floats total[Tile][Vectors] = {};
  for (int64_t k = 0; k < w.in; ++k) {
    const int64_t at = k * w.out + first;
    const char* ahead = static_cast<const char*>(w.data) + (at + kAhead * w.out) * (Bfloat16 ? 2 : 4);
    for (int v = 0; v < Vectors; v += Bfloat16 ? 2 : 1) __builtin_prefetch(ahead + v * kLanes * (Bfloat16 ? 2 : 4));
    for (int v = 0; v < Vectors; ++v) {
      const Floats numbers = elements(w.data, type_of<Bfloat16>, at + v * kLanes);
      for (int t = 0; t < Tile; ++t) total[t][v] += x.exact[(row + t) * x.width + k] * numbers;
    }
  }
  for (int t = 0; t < Tile; ++t) {
    for (int v = 0; v < Vectors; ++v) store(w.result + (row + t) * w.out + first + v * kLanes, total[t][v]);
  }
}

// One column, for what is left of a width that is no multiple of 16.
template <bool Bfloat16>
void single_column(const Rows& x, const Weights& w, int64_t column) {
  for (int64_t row = 0; row < x.count; ++row) {
    float total = 0;
    for (int64_t k = 0; k < w.in; ++k) total += x.exact[row * x.width + k] * element(w.data, type_of<Bfloat16>, k * w.out + column);
    w.result[row * w.out + column] = total;
  }
}

template <bool Bfloat16>
void column_unit(const Rows& x, const Weights& w, int64_t first) {
  const int64_t end = std::min(first + kUnit, w.out);
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
    const Floats numbers = elements(w.data, type_of<Bfloat16>, at + k);
    for (int t = 0; t < Tile; ++t) total[t] += numbers * load<Floats>(x.exact + (row + t) * x.width + k);
  }
  for (int t = 0; t < Tile; ++t) result[t] += sum(total[t]);
  for (; k < w.in; ++k) {
    for (int t = 0; t < Tile; ++t) result[t] += element(w.data, type_of<Bfloat16>, at + k) * x.exact[(row + t) * x.width + k];
  }
  for (int t = 0; t < Tile; ++t) w.result[(row + t) * w.out + column] = result[t];
}

// What a thread takes at once: 64 columns for all rows; a range of the weights' rows, for few rows of x; 64 columns for a block of many.
enum class Way { columns, range, block };

struct Unit {
  int weights;
  Way way;
  int64_t first, row;  // column, or number of the range; row of x
};

void multiply(const Rows& x, const Weights& w, const Unit& unit, bool transposed) {
  const int64_t first = unit.first;
#if DIFFKV_BF16
  const uint16_t* numbers = static_cast<const uint16_t*>(w.data);
  if (unit.way == Way::block) return row_block(x.rounded, x.count, w.in, numbers, w.out, first, unit.row, w.result);
  if (unit.way == Way::range) {
    return add_range(x.rounded, x.count, w.in, numbers, w.out, first, w.sums + first * x.count * padded(w.out));
  }
#endif
  if (!transposed) return w.bfloat16 ? column_unit<true>(x, w, first) : column_unit<false>(x, w, first);
  for (int64_t column = first; column < std::min(first + kUnit, w.out); ++column) {
    over_rows(x.count, [&](int64_t row, auto tile) {
      w.bfloat16 ? row_products<true, tile>(x, row, w, column) : row_products<false, tile>(x, row, w, column);
    });
  }
}

// Cuts a product into units; of those by ranges, `numbers` grows by the sums that they need.
void plan(std::vector<Unit>& units, const Rows& x, const Weights& w, int index, bool transposed, int64_t& numbers) {
  const bool pairs = DIFFKV_BF16 && x.rounded && w.bfloat16 && !transposed && w.in % 2 == 0;
  if (pairs && x.count <= kFewRows) {
    for (int64_t range = 0; range < ranges_of(w.in); ++range) units.push_back({index, Way::range, range, 0});
    numbers += ranges_of(w.in) * x.count * padded(w.out);
    return;
  }
  for (int64_t first = 0; first < w.out; first += kUnit) {
    for (int64_t row = 0; row < (pairs ? x.count : 1); row += kBlock) units.push_back({index, pairs ? Way::block : Way::columns, first, row});
  }
}

// Adds the ranges' sums of every product that was made by ranges.
void add_ranges(ffi::ThreadPool& threads, const Rows& x, const std::vector<Weights>& weights) {
#if DIFFKV_BF16
  parallel_for(threads, weights.size() * x.count, [&](int64_t i) {
    const Weights& w = weights[i / x.count];
    const int64_t row = i % x.count, pitch = padded(w.out);
    if (!w.sums) return;
    for (int64_t c = 0; c < w.out; c += kColumnStep) {
      add_up(w.sums + row * pitch + c, ranges_of(w.in), x.count * pitch, w.out - c, w.result + row * w.out + c);
    }
  });
#else
  (void)threads, (void)x, (void)weights;
#endif
}

ffi::Error linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs stacks,
                  ffi::RemainingRets results, bool transposed) {
  const int64_t count = x.dimensions()[0], width = x.dimensions()[1], at = layer.typed_data()[0];
  Rows rows{count, width, static_cast<const float*>(x.untyped_data()), nullptr};
  if (x.element_type() == ffi::DataType::BF16) rows.rounded = static_cast<const uint16_t*>(x.untyped_data());
  std::vector<Weights> weights;
  std::vector<Unit> units;
  std::vector<int64_t> places;
  int64_t numbers = 0;
  for (size_t i = 0; i < stacks.size(); ++i) {
    const auto stack = stacks.get<ffi::AnyBuffer>(i).value();
    auto result = results.get<ffi::Buffer<ffi::F32>>(i).value();
    const auto shape = stack.dimensions();
    if (at < 0 || at >= shape[0]) return ffi::Error::InvalidArgument("layer outside the stacked weights");
    const bool narrow = stack.element_type() == ffi::DataType::BF16;
    const char* data = static_cast<const char*>(stack.untyped_data()) + at * shape[1] * shape[2] * (narrow ? 2 : 4);
    weights.push_back({data, narrow, shape[transposed ? 2 : 1], shape[transposed ? 1 : 2], result->typed_data(), nullptr});
    places.push_back(numbers);
    plan(units, rows, weights.back(), int(i), transposed, numbers);
  }
  const auto exact = [](const Unit& unit) { return unit.way == Way::columns; };
  if (rows.rounded && std::any_of(units.begin(), units.end(), exact)) {
    float* wide = scratch<struct ExactRows, float>(count * width);
    for (int64_t i = 0; i < count * width; ++i) wide[i] = element(rows.rounded, Exact::bfloat16, i);
    rows.exact = wide;
  }
  float* sums = scratch<struct RangeSums, float>(numbers);
  for (const Unit& unit : units) {
    if (unit.way == Way::range) weights[unit.weights].sums = sums + places[unit.weights];
  }
  parallel_for(threads, units.size(), [&](int64_t i) { multiply(rows, weights[units[i].weights], units[i], transposed); });
  if (numbers) add_ranges(threads, rows, weights);
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
