// Numbers of any floating type that arrays may hold, read as float32.
#pragma once

#include "pages.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace diffkv {

inline Exact exact_type(xla::ffi::DataType type) {
  using xla::ffi::DataType;
  return type == DataType::F32 ? Exact::float32 : type == DataType::F16 ? Exact::float16 : Exact::bfloat16;
}

// Whether a layer of the recent windows `[L, ...]` is there.
inline xla::ffi::Error check_layer(const xla::ffi::AnyBuffer& windows, int64_t layer) {
  if (layer >= 0 && layer < windows.dimensions()[0]) return xla::ffi::Error::Success();
  return xla::ffi::Error::InvalidArgument("layer outside the recent windows");
}

inline float element(const void* data, Exact type, int64_t i) {
  if (type == Exact::float32) return static_cast<const float*>(data)[i];
  const Shorts bits = Shorts{} + static_cast<const uint16_t*>(data)[i];
  return type == Exact::bfloat16 ? from_bfloat16(bits)[0] : from_float16(bits)[0];
}

// 16 elements, from any place.
inline Floats elements(const void* data, Exact type, int64_t i) {
  if (type == Exact::float32) return load<Floats>(static_cast<const float*>(data) + i);
  const Shorts bits = load<Shorts>(static_cast<const uint16_t*>(data) + i);
  return type == Exact::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// An array of floating numbers, read as float32.
struct Numbers {
  const char* data;
  Exact type;

  static Numbers of(const xla::ffi::AnyBuffer& buffer) {
    return {static_cast<const char*>(buffer.untyped_data()), exact_type(buffer.element_type())};
  }
  int64_t bytes() const { return type == Exact::float32 ? 4 : 2; }
  Numbers from(int64_t i) const { return {data + i * bytes(), type}; }

  float number(int64_t i) const { return element(data, type, i); }
  // Sixteen numbers from `i` on.
  Floats vector(int64_t i) const { return elements(data, type, i); }
  // The first `n` of them, then zeros; nothing beyond is read.
  Floats vector(int64_t i, int64_t n) const {
    if (n >= kLanes) return vector(i);
    if (n <= 0) return Floats{};
    char some[kLanes * 4] = {};
    std::memcpy(some, data + i * bytes(), n * bytes());
    return elements(some, type, 0);
  }
};

// 16 rows of `n` numbers as columns `x [n, 16]`, four by four: that is what every CPU can turn in registers.
inline void transpose(const float* const* rows, int64_t n, float* x) {
  typedef float Four __attribute__((vector_size(16)));
  for (int lane = 0; lane < kLanes; lane += 4) {
    const float *r0 = rows[lane], *r1 = rows[lane + 1], *r2 = rows[lane + 2], *r3 = rows[lane + 3];
    float* to = x + lane;
    int64_t c = 0;
    for (; c + 4 <= n; c += 4, to += 4 * kLanes) {
      const Four a = load<Four>(r0 + c), b = load<Four>(r1 + c), d = load<Four>(r2 + c), e = load<Four>(r3 + c);
      const Four low_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), high_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four low_de = __builtin_shufflevector(d, e, 0, 4, 1, 5), high_de = __builtin_shufflevector(d, e, 2, 6, 3, 7);
      store(to, __builtin_shufflevector(low_ab, low_de, 0, 1, 4, 5));
      store(to + kLanes, __builtin_shufflevector(low_ab, low_de, 2, 3, 6, 7));
      store(to + 2 * kLanes, __builtin_shufflevector(high_ab, high_de, 0, 1, 4, 5));
      store(to + 3 * kLanes, __builtin_shufflevector(high_ab, high_de, 2, 3, 6, 7));
    }
    for (; c < n; ++c, to += kLanes) to[0] = r0[c], to[1] = r1[c], to[2] = r2[c], to[3] = r3[c];
  }
}

// 16 rows of an array `[rows, n]`, numbers `row [16]`, as columns `[n, 16]`.
inline const float* columns(const void* data, Exact type, int64_t n, const int64_t* row) {
  const float* rows[kLanes];
  float* wide = scratch<struct WideRows, float>(n * kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (type == Exact::float32) {
      rows[lane] = static_cast<const float*>(data) + row[lane] * n;
      continue;
    }
    float* to = wide + lane * n;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) store(to + c, elements(data, type, row[lane] * n + c));
    for (; c < n; ++c) to[c] = element(data, type, row[lane] * n + c);
    rows[lane] = to;
  }
  float* x = scratch<struct Columns, float>(n * kLanes);
  transpose(rows, n, x);
  return x;
}

}  // namespace diffkv
