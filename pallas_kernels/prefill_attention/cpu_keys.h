// Keys and values of one head in blocks, unpacked into matrices of words (words.h), wherever they come from.
#pragma once

#include <algorithm>
#include <cmath>

#include "layer_heads.h"
#include "scratch.h"
#include "words.h"

namespace diffkv {

constexpr int kKeys = 256;  // of a block: with their values in the second cache, whatever the head size
constexpr float kLog2E = 1.44269504f;

inline int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// C tokens a head, right-aligned.
struct Chunk {
  Numbers q, k, v;  // [B, G, C, d], [B, C, d], [B, C, d]
  const int32_t* length;
  int group, rows;

  int first(int64_t head) const { return rows - length[head]; }
};

struct Problem {
  Heads heads;
  Chunk chunk;
  float sm_scale, cap;  // cap 0 = none

  int d() const { return heads.d(); }
  // What a dot product is multiplied with: logits are in base 2, and before a soft cap as they are.
  float factor() const { return cap > 0 ? sm_scale : sm_scale * kLog2E; }
  bool pairs() const {
    bool fit = DIFFKV_BF16 && chunk.q.type == Exact::bfloat16 && d() % 2 == 0;
    for (int t = 0; t < heads.pool.layout.tiers; ++t) {
      const Codec& key = heads.pool.layout.tier[t].key;
      fit = fit && (!key.scaled || (key.rows % 2 == 0 && d() / key.groups % 2 == 0));
    }
    return fit;
  }
};

enum class Source { tier0, tier1, recent, chunk };

// At most kKeys keys of one source.
struct Span {
  Source source;
  int64_t first;
  int count;

  int tier() const { return static_cast<int>(source); }
  bool stored() const { return source == Source::tier0 || source == Source::tier1; }
};

// Calls body(span) for all that a head's chunk attends to, up to row `end` of the chunk.
template <typename Body>
void over_spans(const Problem& p, int64_t head, int end, const Body& body) {
  const auto cut = [&](Source source, int64_t first, int64_t end) {
    for (; first < end; first += kKeys) body(Span{source, first, static_cast<int>(std::min<int64_t>(kKeys, end - first))});
  };
  for (int t = 0; t < p.heads.pool.layout.tiers; ++t) cut(static_cast<Source>(t), 0, p.heads.length(head, t));
  cut(Source::recent, 0, p.heads.recent_lengths[head]);
  cut(Source::chunk, p.chunk.first(head), end);
}

// Packed keys. Stored codes stay integers in bfloat16, which holds them exactly (docs/design.md 7): logit = scale dot + zero sum(q).
struct KeyBlock {
  const int32_t* keys;  // matrix [words of a key, kKeys]
  int words, groups;
  const float *scale, *zero;  // [groups, kKeys], the factor of the logits included; null where keys are exact
  float factor;
};

// Where column `column` of a packed matrix with `rows` rows begins.
inline int32_t* column_of(int32_t* matrix, int rows, int column) {
  return matrix + int64_t(column / kPanel) * rows * kPanel + column % kPanel;
}

// Calls body(channel, Word::size vectors: the channels from there on of 16 tokens), codes as they are.
template <typename Word, typename Reader, typename Body>
inline void over_codes(const uint8_t* payload, int stride, int d, int from, int to, const Body& body) {
  over_channels<Reader, Word::size>(d, from, to, [&](int c, int row, int plane) {
    Floats numbers[Word::size];
    for (int i = 0; i < Word::size; ++i) numbers[i] = Reader::read(payload + (row + i) * stride, plane, int64_t(d) * stride);
    body(c, numbers);
  });
}

template <typename Word>
void pack_stored_keys(const Problem& p, int64_t head, const Span& span, int words, int32_t* keys, float* scale, float* zero) {
  const Layout& layout = p.heads.pool.layout;
  const Codec& codec = layout.tier[span.tier()].key;
  const int d = p.d(), stride = layout.tokens, width = d / codec.groups;
  for (int at = 0; at < span.count; at += kLanes) {
    const int half = at / kLanes % 2;
    const Strip strip = p.heads.strip(head, span.tier(), (span.first + at) / kStrip);
    const uint8_t* payload = strip.key.payload + half * kLanes;
    int32_t* to = column_of(keys, words, at);
    with_reader(codec.code, [&](auto reader) {
      using Reader = decltype(reader);
      for (int group = 0; group < codec.groups; ++group) {
        const auto [s, z] = Grid::read(strip.key, codec, group, stride, half);
        over_codes<Word, Reader>(payload, stride, d, group * width, (group + 1) * width, [&](int c, Floats(&numbers)[Word::size]) {
          if (Word::size == 1 && Reader::scaled) numbers[0] = numbers[0] * s + z;
          store(to + c / Word::size * kPanel, Reader::scaled ? Word::joined_codes(numbers) : Word::joined(numbers));
        });
        if (Word::size > 1 && Reader::scaled) {
          store(scale + group * kKeys + at, s * p.factor());
          store(zero + group * kKeys + at, z * p.factor());
        }
      }
    });
  }
}

// Words of `n` numbers from `i` on, then zeros.
template <typename Word>
inline Ints words_of(const Numbers& from, int64_t i, int64_t n) {
  if (Word::size == 2 && from.type == Exact::bfloat16 && n >= 2 * kLanes) return load<Ints>(from.from(i).data);
  Floats numbers[Word::size];
  for (int j = 0; j < Word::size; ++j) numbers[j] = from.vector(i + j * kLanes, n - j * kLanes);
  return Word::in_order(numbers);
}

// Keys that lie one after the other, `d` numbers each; columns beyond `count` in the last 16 are 0.
template <typename Word>
void pack_exact_keys(const Numbers& from, int count, int d, int words, int32_t* keys) {
  for (int at = 0; at < count; at += kLanes) {
    for (int word = 0; word < words; word += kLanes) {
      Ints block[kLanes] = {};
      const int c = word * Word::size;
      for (int i = 0; i < kLanes && at + i < count; ++i) block[i] = words_of<Word>(from, int64_t(at + i) * d + c, d - c);
      transpose(block);
      for (int i = 0; i < std::min(kLanes, words - word); ++i) store(column_of(keys, words, at) + (word + i) * kPanel, block[i]);
    }
  }
}

// Where the keys or values of a span outside of the pool begin.
inline Numbers exact_rows(const Problem& p, int64_t head, const Span& span, bool values) {
  const bool recent = span.source == Source::recent;
  const Numbers& all = recent ? (values ? p.heads.recent_v : p.heads.recent_k) : (values ? p.chunk.v : p.chunk.k);
  return all.from((head * (recent ? p.heads.slots : p.chunk.rows) + span.first) * p.d());
}

template <typename Word>
KeyBlock pack_keys(const Problem& p, int64_t head, const Span& span) {
  const int words = (p.d() + Word::size - 1) / Word::size;
  const Codec* codec = span.stored() ? &p.heads.pool.layout.tier[span.tier()].key : nullptr;
  const bool scaled = codec && codec->scaled && Word::size > 1;
  const int groups = scaled ? codec->groups : 1;
  int32_t* keys = scratch<struct Keys, int32_t>(int64_t(words) * kKeys);
  float* scale = scratch<struct Scales, float>(2 * groups * kKeys);
  float* zero = scale + groups * kKeys;
  if (span.stored()) {
    pack_stored_keys<Word>(p, head, span, words, keys, scale, zero);
  } else {
    pack_exact_keys<Word>(exact_rows(p, head, span, false), span.count, p.d(), words, keys);
  }
  return {keys, words, groups, scaled ? scale : nullptr, scaled ? zero : nullptr, p.factor()};
}

// Values of a strip as rows of words, tokens one after the other in each; dead tokens are 0.
template <typename Word, typename Reader>
void unpack_values(const Strip& strip, const Codec& codec, int stride, int d, int32_t* rows) {
  const int width = d / codec.groups;
  for (int group = 0; group < codec.groups; ++group) {
    const Grid grid[2] = {Grid::read(strip.value, codec, group, stride, 0), Grid::read(strip.value, codec, group, stride, 1)};
    over_channels<Reader>(d, group * width, (group + 1) * width, [&](int c, int row, int plane) {
      Floats numbers[2];
      for (int half = 0; half < 2; ++half) {
        Floats x = Reader::read(strip.value.payload + row * stride + half * kLanes, plane, int64_t(d) * stride);
        if constexpr (Reader::scaled) x = x * grid[half].scale + grid[half].zero;
        numbers[half] = strip.live < kStrip ? select(lanes() + half * kLanes < strip.live, x, Floats{}) : x;
      }
      int32_t* to = rows + c * (kStrip / Word::size);
      if constexpr (Word::size == 2) {
        store(to, Word::in_order(numbers));
      } else {
        store(to, as_ints(numbers[0]));
        store(to + kLanes, as_ints(numbers[1]));
      }
    });
  }
}

template <typename Word>
void pack_stored_values(const Problem& p, int64_t head, const Span& span, int32_t* values) {
  constexpr int strip_words = kStrip / Word::size, rows = kKeys / Word::size;
  const Layout& layout = p.heads.pool.layout;
  const int d = p.d(), wide = rounded_up(d, kLanes);
  const Codec& codec = layout.tier[span.tier()].value;
  int32_t* by_channel = scratch<struct ByChannel, int32_t>(int64_t(wide) * strip_words);
  std::fill(by_channel + d * strip_words, by_channel + wide * strip_words, 0);
  for (int at = 0; at < span.count; at += kStrip) {
    const Strip strip = p.heads.strip(head, span.tier(), (span.first + at) / kStrip);
    with_reader(codec.code, [&](auto reader) { unpack_values<Word, decltype(reader)>(strip, codec, layout.tokens, d, by_channel); });
    for (int c = 0; c < wide; c += kLanes) {
      for (int word = 0; word < strip_words; word += kLanes) {
        Ints block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load<Ints>(by_channel + (c + i) * strip_words + word);
        transpose(block);
        int32_t* to = column_of(values, rows, c) + (at / Word::size + word) * kPanel;
        for (int i = 0; i < kLanes; ++i) store(to + i * kPanel, block[i]);
      }
    }
  }
}

// Values that lie one after the other; those that fill the last strip up are 0.
template <typename Word>
void pack_exact_values(const Numbers& from, int count, int d, int32_t* values) {
  for (int at = 0; at < rounded_up(count, kStrip); at += Word::size) {
    for (int c = 0; c < d; c += kLanes) {
      Floats numbers[Word::size];
      for (int i = 0; i < Word::size; ++i) numbers[i] = from.vector(int64_t(at + i) * d + c, at + i < count ? d - c : 0);
      store(column_of(values, kKeys / Word::size, c) + at / Word::size * kPanel, Word::joined(numbers));
    }
  }
}

// Asks for the pages of the next span while this one is worked on.
inline void fetch_next(const Problem& p, int64_t head, const Span& span) {
  if (!span.stored()) return;
  const Layout& layout = p.heads.pool.layout;
  const Tier& tier = layout.tier[span.tier()];
  const int64_t end = std::min(span.first + 2 * kKeys, p.heads.length(head, span.tier()));
  for (int64_t at = span.first + kKeys; at < end; at += kStrip) {
    const Strip strip = p.heads.strip(head, span.tier(), at / kStrip);
    prefetch(strip.key, tier.key, layout.tokens);
    prefetch(strip.value, tier.value, layout.tokens);
  }
}

// The values of a span as a matrix [kKeys / Word::size, d], filled up to whole strips and to 16 channels with zeros.
template <typename Word>
const int32_t* pack_values(const Problem& p, int64_t head, const Span& span) {
  int32_t* values = scratch<struct Values, int32_t>(int64_t(kKeys / Word::size) * rounded_up(p.d(), kPanel));
  if (span.stored()) {
    pack_stored_values<Word>(p, head, span, values);
  } else {
    pack_exact_values<Word>(exact_rows(p, head, span, true), span.count, p.d(), values);
  }
  return values;
}

}  // namespace diffkv
