// The page tables of B heads: whether they may be followed, and which stored tokens of a head leave their tier (docs/design.md 1).
#pragma once

#include <algorithm>
#include <limits>

#include "pages.h"
#include "xla/ffi/api/ffi.h"

namespace diffkv {

// What a head holds: its row of the page table and the lengths of its tiers.
struct Held {
  const int32_t *row, *lengths;
  int64_t max_pages;

  int64_t page(int t, int64_t index) const { return row[t == 0 ? index : max_pages - 1 - index]; }
};

// Lengths and page ids that would lead out of an array.
inline xla::ffi::Error check(const Layout& layout, const Held& head, int64_t num_pages) {
  if (layout.tokens % kLanes) return xla::ffi::Error::InvalidArgument("the lanes of a page must be a multiple of 16");
  int64_t pages = 0;
  for (int t = 0; t < layout.tiers; ++t) {
    const int64_t used = head.lengths[t] < 0 ? head.max_pages + 1 : layout.pages(t, head.lengths[t]);
    pages += used;
    if (pages > head.max_pages) return xla::ffi::Error::InvalidArgument("tier_len beyond the page table");
    for (int64_t i = 0; i < used; ++i) {
      if (head.page(t, i) < 0 || head.page(t, i) >= num_pages) {
        return xla::ffi::Error::InvalidArgument("page table names a page that the pool does not have");
      }
    }
  }
  return xla::ffi::Error::Success();
}

// Significance and position of the pool's tokens.
struct TokenData {
  const float* significance;
  const void* position;
  bool wide;  // int32 positions, else uint16

  Ints position_at(int64_t i) const {
    return wide ? load<Ints>(static_cast<const int32_t*>(position) + i) : widen(load<Shorts>(static_cast<const uint16_t*>(position) + i));
  }
};

// Rules of B heads, as pallas_kernels/plan_event/reference.py has them.
struct Rules {
  const float* tau;         // [B, 2] high, low
  const int32_t* query_spans;  // [B, spans, 2] end, length
  const bool *has_new_tokens, *receives;
  int64_t spans;
  bool one_victim;

  static Rules of(const xla::ffi::Buffer<xla::ffi::F32>& tau, const xla::ffi::Buffer<xla::ffi::S32>& query_spans,
                  const xla::ffi::Buffer<xla::ffi::PRED>& has_new_tokens, const xla::ffi::Buffer<xla::ffi::PRED>& receives, bool one_victim) {
    return {tau.typed_data(), query_spans.typed_data(), has_new_tokens.typed_data(), receives.typed_data(), query_spans.dimensions()[1], one_victim};
  }
};

// Tokens of a head that leave each tier; with one victim a tier, its slot, else -1.
struct Leaving {
  int32_t dropped[2] = {0, 0}, demoted = 0, victim[2] = {-1, -1};

  int32_t total(int t) const { return dropped[t] + (t == 0 ? demoted : 0); }
};

// Decides over the stored tokens of one head.
struct Judge {
  const Layout& layout;
  TokenData token_data;
  Rules rules;
  int64_t head;

  // S / n of 16 tokens; `total` and `position` are those of the pool from `token` on.
  Floats mean(int64_t token) const {
    const Ints position = token_data.position_at(token);
    Ints queries = {};
    for (int64_t s = 0; s < rules.spans; ++s) {
      const int32_t* span = rules.query_spans + (head * rules.spans + s) * 2;
      if (span[1] <= 0) continue;
      Ints after = span[0] - position;
      after = after > 0 ? after : Ints{};
      queries += after < span[1] ? after : Ints{} + span[1];
    }
    return load<Floats>(token_data.significance + token) / to_floats(queries > 1 ? queries : Ints{} + 1);
  }
  Ints dropped(Floats mean) const { return mean < rules.tau[2 * head + 1]; }
  Ints demoted(Floats mean, int t) const { return t == 0 && layout.tiers == 2 ? (mean < rules.tau[2 * head]) & ~dropped(mean) : Ints{}; }
};

// Calls body(slot, token, live) for every 16 slots of a tier: their place in significance and position, and how many hold tokens.
template <typename Body>
void over_slots(const Layout& layout, const Held& head, int t, const Body& body) {
  const int64_t per_page = layout.tier[t].blocks * layout.tokens, length = head.lengths[t];
  for (int64_t first = 0, index = 0; first < length; first += per_page, ++index) {
    const int64_t token = head.page(t, index) * layout.token_data_rows * layout.tokens;
    for (int64_t i = 0; i < std::min(per_page, length - first); i += kLanes) body(first + i, token + i, length - first - i);
  }
}

// How many tokens of a tier leave it.
inline void count_leaving(const Judge& judge, const Held& head, int t, Leaving& leaving) {
  Ints dropped = {}, demoted = {};
  over_slots(judge.layout, head, t, [&](int64_t, int64_t token, int64_t live) {
    const Floats mean = judge.mean(token);
    const Ints counted = lanes() < int(std::min<int64_t>(live, kLanes));
    dropped -= counted & judge.dropped(mean);
    demoted -= counted & judge.demoted(mean, t);
  });
  for (int lane = 0; lane < kLanes; ++lane) {
    leaving.dropped[t] += dropped[lane];
    if (t == 0) leaving.demoted += demoted[lane];
  }
}

// The same when only the least significant token of a tier, the oldest of equals, may leave it.
inline void find_victim(const Judge& judge, const Held& head, int t, Leaving& leaving) {
  constexpr int32_t kLast = std::numeric_limits<int32_t>::max();
  Floats least = splat(INFINITY);
  Ints oldest = Ints{} + kLast, slots = oldest;
  over_slots(judge.layout, head, t, [&](int64_t slot, int64_t token, int64_t live) {
    const Floats mean = judge.mean(token);
    const Ints position = judge.token_data.position_at(token);
    const Ints less = (lanes() < int(std::min<int64_t>(live, kLanes))) & ((mean < least) | ((mean == least) & (position < oldest)));
    least = select(less, mean, least), oldest = less ? position : oldest, slots = less ? lanes() + int(slot) : slots;
  });
  int best = 0;
  for (int lane = 1; lane < kLanes; ++lane) {
    if (least[lane] < least[best] || (least[lane] == least[best] && oldest[lane] < oldest[best])) best = lane;
  }
  const Floats mean = splat(least[best]);
  const bool dropped = judge.dropped(mean)[0], demoted = judge.demoted(mean, t)[0];
  if (slots[best] == kLast || !(dropped || demoted)) return;
  leaving.victim[t] = slots[best], leaving.dropped[t] = dropped;
  if (t == 0) leaving.demoted = demoted;
}

// Which stored tokens of a head leave, none where no token enters it.
inline Leaving leaving_of(const Judge& judge, const Held& head) {
  Leaving leaving;
  if (!judge.rules.has_new_tokens[judge.head]) return leaving;
  for (int t = 0; t < judge.layout.tiers; ++t) {
    if (!judge.rules.one_victim) {
      count_leaving(judge, head, t, leaving);
    } else if (judge.rules.receives[judge.head * judge.layout.tiers + t]) {
      find_victim(judge, head, t, leaving);
    }
  }
  return leaving;
}

}  // namespace diffkv
