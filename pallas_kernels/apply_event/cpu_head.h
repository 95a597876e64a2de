// One head in a compression event: its pages, and the tokens that leave its tiers.
#pragma once

#include <algorithm>

#include "encode.h"
#include "heads.h"

namespace diffkv {

// What an event changes: the pool, and the tables of all heads.
struct State {
  Layout layout;
  uint8_t* payload;
  uint16_t* meta;
  float* significance;  // none unless scored
  void* position;
  bool scored, wide;  // wide: int32 positions
  int32_t *table, *lengths, *ring;
  int64_t heads, num_pages, max_pages, ring_start, ring_count;

  Held held(int64_t head) const { return {table + head * max_pages, lengths + head * layout.tiers, max_pages}; }
  void set_token_data(int64_t at, float score, int32_t where) const {
    if (scored) significance[at] = score;
    if (wide) {
      static_cast<int32_t*>(position)[at] = where;
    } else {
      static_cast<uint16_t*>(position)[at] = uint16_t(where);
    }
  }
  int32_t position_at(int64_t at) const {
    return wide ? static_cast<const int32_t*>(position)[at] : static_cast<const uint16_t*>(position)[at];
  }
};

// A slot, or the 16 from it on where it is a multiple of 16: K (0) and V (1) in payload and metadata, and the place in the token arrays.
struct Place {
  uint8_t* payload[2];
  uint16_t* meta[2];
  int64_t token;
};

inline const Codec& codec_of(const Tier& tier, int tensor) { return tensor ? tier.value : tier.key; }

// Slot number `slot` of a tier of a head.
inline Place place(const State& state, int64_t head, int t, int64_t slot) {
  const Layout& layout = state.layout;
  const Tier& tier = layout.tier[t];
  const int64_t per_page = tier.blocks * layout.tokens, page = state.held(head).page(t, slot / per_page);
  const int64_t block = slot % per_page / layout.tokens, lane = slot % layout.tokens;
  const int64_t rows[2] = {block * tier.key.rows, tier.blocks * tier.key.rows + block * tier.value.rows};
  const int64_t metas[2] = {block * tier.key.meta_rows(), tier.blocks * tier.key.meta_rows() + block * tier.value.meta_rows()};
  Place at{};
  for (int tensor = 0; tensor < 2; ++tensor) {
    at.payload[tensor] = state.payload + (page * layout.rows + rows[tensor]) * layout.tokens + lane;
    at.meta[tensor] = state.meta + (page * layout.meta_rows + metas[tensor]) * layout.tokens + lane;
  }
  at.token = (page * layout.token_data_rows + block) * layout.tokens + lane;
  return at;
}

// Copies one token's column of `rows` numbers.
template <typename Number>
void copy_column(const Number* from, int64_t from_stride, Number* to, int64_t to_stride, int rows) {
  for (int row = 0; row < rows; ++row) to[row * to_stride] = from[row * from_stride];
}

// Copies a token within a tier.
inline void copy_token(const State& state, const Tier& tier, const Place& from, const Place& to) {
  const int stride = state.layout.tokens;
  for (int tensor = 0; tensor < 2; ++tensor) {
    const Codec& codec = codec_of(tier, tensor);
    copy_column(from.payload[tensor], stride, to.payload[tensor], stride, codec.rows);
    copy_column(from.meta[tensor], stride, to.meta[tensor], stride, codec.meta_rows());
  }
  state.set_token_data(to.token, state.scored ? state.significance[from.token] : 0, state.position_at(from.token));
}

// Tokens of tier 0 taken out of the pool, side by side as they will lie in tier 1.
struct Falling {
  int stride, first, count = 0;  // the first lies in lane `first`
  Stored tensor[2];
  float* significance;
  int32_t* position;

  // Room for `most` tokens of a tier that go to slots `slot` and up of the next.
  Falling(const Layout& layout, int most, int64_t slot) : stride((most + 2 * kLanes - 1) / kLanes * kLanes), first(int(slot % kLanes)) {
    const Tier& tier = layout.tier[0];
    uint8_t* payload = scratch<struct FallingPayload, uint8_t>(int64_t(tier.key.rows + tier.value.rows) * stride);
    uint16_t* meta = scratch<struct FallingMeta, uint16_t>(int64_t(tier.key.meta_rows() + tier.value.meta_rows()) * stride);
    tensor[0] = {payload, meta};
    tensor[1] = {payload + tier.key.rows * stride, meta + tier.key.meta_rows() * stride};
    significance = scratch<struct FallingScores, float>(most);
    position = scratch<struct FallingPositions, int32_t>(most);
  }
  void take(const State& state, const Place& from) {
    for (int i = 0; i < 2; ++i) {
      const Codec& codec = codec_of(state.layout.tier[0], i);
      const int lane = first + count, tokens = state.layout.tokens;
      copy_column(from.payload[i], tokens, const_cast<uint8_t*>(tensor[i].payload) + lane, stride, codec.rows);
      copy_column(from.meta[i], tokens, const_cast<uint16_t*>(tensor[i].meta) + lane, stride, codec.meta_rows());
    }
    significance[count] = state.significance[from.token], position[count] = state.position_at(from.token);
    ++count;
  }
};

// A head and the pages that it may use: those of its tiers and free ones, of which there are never too few (docs/design.md 3).
class Head {
 public:
  Head(const State& state, int64_t head) : state_(state), head_(head), free_(scratch<struct FreePages, int32_t>(2 * state.max_pages)) {
    for (int t = 0; t < state.layout.tiers; ++t) length_[t] = state.held(head).lengths[t];
  }
  int64_t length(int t) const { return length_[t]; }

  // Pages from the ring, from `at` on.
  void take_granted(int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) free_[free_count_++] = state_.ring[(at + i) % state_.num_pages];
  }

  // Changes the length of a tier; its emptied pages become free, new ones come from the free ones.
  void resize(int t, int64_t length) {
    const int64_t before = state_.layout.pages(t, length_[t]), after = state_.layout.pages(t, length);
    for (int64_t i = before; i-- > after;) {
      free_[free_count_++] = column(t, i);
      column(t, i) = int32_t(state_.num_pages);
    }
    for (int64_t i = before; i < after; ++i) column(t, i) = free_[--free_count_];
    length_[t] = length;
  }

  // Removes the tokens of a tier for which `leaves` (1 = dropped, 2 = demoted) is not 0, `total` of them. The last tokens fill their
  // holes. Goes in rounds of one page where tokens are demoted: it is freed before they ask for a page of tier 1.
  void remove(int t, const uint8_t* leaves, int64_t total) {
    const bool demotes = t == 0 && state_.layout.tiers == 2;
    const int64_t kept = length_[t] - total, width = demotes ? state_.layout.tier[0].blocks * state_.layout.tokens : total;
    int64_t hole = 0;
    Moves* moves = scratch<struct Movers, Moves>(width);
    while (length_[t] > kept) {
      const int64_t top = length_[t], bottom = std::max(kept, top - width);
      Falling falling(state_.layout, demotes ? int(width) : 0, demotes ? length_[1] : 0);
      int64_t count = 0;
      for (int64_t slot = top; slot-- > bottom;) {
        int64_t gone = slot;
        if (!leaves[slot]) {
          while (!leaves[hole]) ++hole;
          moves[count++] = {slot, gone = hole++};
        }
        if (leaves[gone] == 2) falling.take(state_, place(state_, head_, 0, gone));
      }
      for (int64_t i = 0; i < count; ++i) {
        copy_token(state_, state_.layout.tier[t], place(state_, head_, t, moves[i].from), place(state_, head_, t, moves[i].to));
      }
      resize(t, bottom);
      if (falling.count) append(falling);
    }
  }

  // Writes the lengths, and returns the free pages to the ring, from `at` on.
  void finish(int64_t at) {
    for (int64_t i = 0; i < free_count_; ++i) state_.ring[(at + i) % state_.num_pages] = free_[i];
    for (int t = 0; t < state_.layout.tiers; ++t) state_.lengths[head_ * state_.layout.tiers + t] = int32_t(length_[t]);
  }

 private:
  struct Moves {
    int64_t from, to;
  };

  int32_t& column(int t, int64_t index) { return state_.table[head_ * state_.max_pages + (t == 0 ? index : state_.max_pages - 1 - index)]; }

  // Requantises tokens to the tail of tier 1.
  void append(const Falling& falling) {
    const Layout& layout = state_.layout;
    const int64_t start = length_[1] - falling.first;  // slot of lane 0
    resize(1, length_[1] + falling.count);
    for (int lane = 0; lane < falling.first + falling.count; lane += kLanes) {
      const int first = std::max(falling.first - lane, 0), last = std::min(falling.first + falling.count - lane, kLanes);
      const Place to = place(state_, head_, 1, start + lane);
      for (int i = 0; i < 2; ++i) {
        const Codec& high = codec_of(layout.tier[0], i);
        const Stored from = {falling.tensor[i].payload + lane, falling.tensor[i].meta + lane};
        const Target target = {to.payload[i], to.meta[i], layout.tokens, first, last - first};
        requantise(high, codec_of(layout.tier[1], i), layout.head_dim, from, falling.stride, target);
      }
      for (int i = first; i < last; ++i) {
        const int token = lane + i - falling.first;
        state_.set_token_data(to.token + i, falling.significance[token], falling.position[token]);
      }
    }
  }

  const State& state_;
  int64_t head_, length_[2] = {0, 0}, free_count_ = 0;
  int32_t* free_;
};

}  // namespace diffkv
