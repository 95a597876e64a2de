// The codecs that kernels read: one header each, and what the formats of a pool say of them.
#pragma once

#include "full.h"
#include "normal.h"
#include "uniform.h"

namespace diffkv {

// Calls `body` with the reader that has the code.
template <typename Body>
inline void with_reader(int code, const Body& body) {
  unrolled<128>([&](auto i) {
    if constexpr (ReaderOf<i>::bits > 0) {
      if (code == i) body(ReaderOf<i>{});
    }
  });
}

// Calls body(channel, row, plane) for the channels [from, to), plane by plane.
template <typename Reader, int Step = 1, typename Body>
inline void over_channels(int head_dim, int from, int to, const Body& body) {
  const int rows = head_dim / Reader::planes;
  for (int plane = 0; plane < Reader::planes; ++plane) {
    const int first = plane * rows, begin = from > first ? from - first : 0, end = to - first < rows ? to - first : rows;
    for (int row = begin; row < end; row += Step) body(first + row, row, plane);
  }
}

// How K or V is stored: `bits` a channel with a reader, `groups` of channels with a scale and perhaps a zero point; or `bits` for `channels`
// neighbouring channels, looked up in a learned table.
struct Codec {
  int code, bits = 0, groups = 1, rows = 0;  // code of the reader, or more than 128
  bool scaled = false, zeroed = false, pairs = false;
  float bias = 0;
  int channels = 0;  // that share a code of a table; 0 = there is no table
  int outliers = 0;  // of a token, kept beside: rows of their channels behind the codes, rows of their values behind scale and zero point

  // `native` as `Codec.native` gives it: the code of a reader; 128 + bits for a table a group of `number` channels, 192 + bits for one table
  // for all channels, of levels of the range that the token's scale and zero point tell; 256 more an outlier.
  static Codec make(int64_t native, int64_t number, int64_t head_dim) {
    Codec codec{int(native % 256)};
    codec.outliers = int(native / 256);
    if (codec.code > 128) {
      codec.bits = codec.code % 64, codec.scaled = codec.zeroed = codec.code > 192;
      codec.channels = codec.scaled ? 1 : int(number);
    }
    with_reader(codec.code, [&](auto reader) {
      using Reader = decltype(reader);
      codec.bits = Reader::bits, codec.groups = int(number), codec.scaled = Reader::scaled, codec.zeroed = Reader::zeroed;
      codec.pairs = Reader::pairs, codec.bias = Reader::bias;
    });
    codec.rows = int(head_dim / (codec.channels ? codec.channels : 1) * codec.bits / 8) + codec.outliers;
    return codec;
  }
  bool ranged() const { return channels && scaled; }  // one table for all channels
  // Numbers of a head's table.
  int64_t table_size(int head_dim) const { return ranged() ? 1 << bits : channels ? int64_t{head_dim} << bits : 0; }
  int meta_rows() const { return (scaled + zeroed) * groups + outliers; }
  // Whether products are taken with decoded numbers.
  bool decoded_first() const { return channels || outliers; }
};

}  // namespace diffkv
