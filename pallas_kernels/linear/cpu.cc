// Products of rows with stored weights. Of a few rows, reading the weights is what takes the time: each is read once, in place, for all.
// All ways of going through them add the terms of a product in one order (ranges.h): a row does not depend on how many others there are.
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
constexpr int64_t kUnitRows = 128;  // rows of x that a thread takes at once, but for blocks
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

  Numbers numbers() const { return {static_cast<const char*>(data), bfloat16 ? Exact::bfloat16 : Exact::float32}; }
};

template <bool Bfloat16>
constexpr Exact type_of = Bfloat16 ? Exact::bfloat16 : Exact::float32;

// Rows [begin, end) of weights [in, out], `count` columns from `first` on, for `Tile` rows of x from `row` on; 16 * Vectors columns if `Whole`.
template <bool Bfloat16, int Tile, int Vectors, bool Whole>
void columns(const Rows& x, int64_t row, const Weights& w, int64_t first, int64_t count, int64_t begin, int64_t end) {
  const Numbers weights = w.numbers();
  Floats total[Tile][Vectors] = {};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = k * w.out + first;
    const char* ahead = weights.from(at + kAhead * w.out).data;
    for (int v = 0; v < Vectors; v += Bfloat16 ? 2 : 1) __builtin_prefetch(ahead + v * kLanes * (Bfloat16 ? 2 : 4));
    for (int v = 0; v < Vectors; ++v) {
      const Floats numbers = Whole ? elements(w.data, type_of<Bfloat16>, at + v * kLanes) : weights.vector(at, count);
      for (int t = 0; t < Tile; ++t) total[t][v] += x.exact[(row + t) * x.width + k] * numbers;
    }
  }
  for (int t = 0; t < Tile; ++t) {
    float* to = w.result + (row + t) * w.out + first;
    for (int v = 0; v < Vectors; ++v) {
      Numbers sums{reinterpret_cast<const char*>(to), Exact::float32};
      if (begin) total[t][v] += sums.vector(v * kLanes, Whole ? kLanes : count);
    }
    std::memcpy(to, &total[t], count * sizeof(float));
  }
}

template <bool Bfloat16>
void column_unit(const Rows& x, const Weights& w, int64_t first) {
  const int64_t last = std::min(first + kUnit, w.out);
  for (int64_t begin = 0, end; begin < w.in; begin = end) {
    end = std::min(w.in, begin + rows_of_range(w.in));
    int64_t column = first;
    const auto next = [&](auto vectors, auto whole) {
      const int64_t count = std::min<int64_t>(vectors * kLanes, last - column);
      over_rows(x.count, [&](int64_t row, auto tile) { columns<Bfloat16, tile, vectors, whole>(x, row, w, column, count, begin, end); });
      column += count;
    };
    while (last - column >= 32) next(std::integral_constant<int, 2>{}, std::true_type{});
    if (last - column >= kLanes) next(std::integral_constant<int, 1>{}, std::true_type{});
    if (last > column) next(std::integral_constant<int, 1>{}, std::false_type{});
  }
}

// `Across` rows of transposed weights [out, in] from `column` on with `Tile` rows of x.
template <bool Bfloat16, int Tile, int Across>
void row_products(const Rows& x, int64_t row, const Weights& w, int64_t column) {
  float result[Across][Tile] = {};
  int64_t k = 0;
#if DIFFKV_BF16
  if (Bfloat16 && x.rounded) {
    __m512 total[Across][Tile] = {};
    const uint16_t* data = static_cast<const uint16_t*>(w.data) + column * w.in;
    for (; k + 32 <= w.in; k += 32) {
      __m512bh factors[Tile];
      for (int t = 0; t < Tile; ++t) factors[t] = (__m512bh)_mm512_loadu_si512(x.rounded + (row + t) * x.width + k);
      for (int a = 0; a < Across; ++a) {
        __builtin_prefetch(data + a * w.in + k + 2048);
        const __m512bh numbers = (__m512bh)_mm512_loadu_si512(data + a * w.in + k);
        for (int t = 0; t < Tile; ++t) total[a][t] = _mm512_dpbf16_ps(total[a][t], numbers, factors[t]);
      }
    }
    for (int a = 0; a < Across; ++a) {
      for (int t = 0; t < Tile; ++t) result[a][t] = sum((Floats)total[a][t]);
    }
  }
#endif
  if (k < w.in) {
    Floats total[Across][Tile] = {};
    const Numbers weights{static_cast<const char*>(w.data), type_of<Bfloat16>};
    const Numbers exact{reinterpret_cast<const char*>(x.exact), Exact::float32};
    const auto add = [&](int64_t k, auto count) {
      for (int a = 0; a < Across; ++a) {
        const Floats numbers = weights.vector((column + a) * w.in + k, count);
        for (int t = 0; t < Tile; ++t) total[a][t] += numbers * exact.vector((row + t) * x.width + k, count);
      }
    };
    for (; k + kLanes <= w.in; k += kLanes) add(k, std::integral_constant<int, kLanes>{});
    if (k < w.in) add(k, w.in - k);
    for (int a = 0; a < Across; ++a) {
      for (int t = 0; t < Tile; ++t) result[a][t] += sum(total[a][t]);
    }
  }
  for (int a = 0; a < Across; ++a) {
    for (int t = 0; t < Tile; ++t) w.result[(row + t) * w.out + column + a] = result[a][t];
  }
}

// Columns [first, first + kUnit) of transposed weights and kUnitRows rows of x from `begin` on: a few columns at a time for all of these,
// so that both stay in the first cache.
template <bool Bfloat16>
void row_unit(const Rows& x, const Weights& w, int64_t first, int64_t begin) {
  constexpr int64_t at_once = 8;
  const int64_t last = std::min(first + kUnit, w.out);
  for (; first < last; first += at_once) {
    over_rows(std::min(kUnitRows, x.count - begin), [&](int64_t row, auto tile) {
      const int64_t end = std::min(first + at_once, last);
      int64_t column = first;
      if (tile == 8) {
        for (; column + 2 <= end; column += 2) row_products<Bfloat16, tile, 2>(x, begin + row, w, column);
      }
      for (; column < end; ++column) row_products<Bfloat16, tile, 1>(x, begin + row, w, column);
    });
  }
}

// What a thread takes at once: 64 columns for some rows; a range of the weights' rows, for few rows of x; 64 columns for a block of many.
enum class Way { columns, range, block };

struct Unit {
  int weights;
  Way way;
  int64_t first, row;  // column, or number of the range; row of x
};

// Whether products are of pairs of bfloat16.
bool in_pairs(const Rows& x, const Weights& w, bool transposed) {
  return DIFFKV_BF16 && x.rounded && w.bfloat16 && !transposed && w.in % 2 == 0;
}

void block(const Rows& x, const Weights& w, const Unit& unit, bool transposed) {
  const auto run = [&](auto word, const void* rows, int64_t words) {
    const int32_t* numbers = static_cast<const int32_t*>(rows);
    row_block<decltype(word)>(numbers, x.count, words, w.numbers(), w.in, w.out, unit.first, unit.row, w.result);
  };
#if DIFFKV_BF16
  if (in_pairs(x, w, transposed)) return run(Pair{}, x.rounded, w.in / 2);
#endif
  run(Single{}, x.exact, w.in);
}

void multiply(const Rows& x, const Weights& w, const Unit& unit, bool transposed) {
  const int64_t first = unit.first;
  if (unit.way == Way::block) return block(x, w, unit, transposed);
#if DIFFKV_BF16
  if (unit.way == Way::range) {
    const uint16_t* numbers = static_cast<const uint16_t*>(w.data);
    return add_range(x.rounded, x.count, w.in, numbers, w.out, first, w.sums + first * x.count * padded(w.out));
  }
#endif
  if (!transposed) return w.bfloat16 ? column_unit<true>(x, w, first) : column_unit<false>(x, w, first);
  w.bfloat16 ? row_unit<true>(x, w, first, unit.row) : row_unit<false>(x, w, first, unit.row);
}

// Cuts a product into units; of those by ranges, `numbers` grows by the sums that they need.
void plan(std::vector<Unit>& units, const Rows& x, const Weights& w, int index, bool transposed, int64_t& numbers) {
  const bool few = x.count <= kFewRows;
  if (few && in_pairs(x, w, transposed)) {
    for (int64_t range = 0; range < ranges_of(w.in); ++range) units.push_back({index, Way::range, range, 0});
    numbers += ranges_of(w.in) * x.count * padded(w.out);
    return;
  }
  const Way way = few || transposed ? Way::columns : Way::block;
  for (int64_t first = 0; first < w.out; first += kUnit) {
    for (int64_t row = 0; row < x.count; row += way == Way::block ? kRowBlock : kUnitRows) units.push_back({index, way, first, row});
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
  const auto exact = [&](const Weights& w) { return !in_pairs(rows, w, transposed); };
  if (rows.rounded && std::any_of(weights.begin(), weights.end(), exact)) {
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_cpu, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed"));
