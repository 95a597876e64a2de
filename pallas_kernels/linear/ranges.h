// The order in which a product's terms are added: the weights' rows are cut into ranges, each is summed from its first row to its last,
// and the ranges' sums are added from the first range to the last. Neither rows of x nor threads have a say in it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace diffkv {

constexpr int64_t kStripe = 8;  // rows of weights that are read side by side
constexpr int64_t kRanges = 8;  // ranges of rows, whatever the number of threads

// Rows of weights in a range: whole stripes.
inline int64_t rows_of_range(int64_t in) { return std::max<int64_t>(64, ((in + kRanges - 1) / kRanges + kStripe - 1) / kStripe * kStripe); }

// Ranges of the weights' rows.
inline int64_t ranges_of(int64_t in) { return (in + rows_of_range(in) - 1) / rows_of_range(in); }

}  // namespace diffkv
