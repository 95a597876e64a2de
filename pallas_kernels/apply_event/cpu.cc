// The compression event of many heads on the CPU: pallas_kernels/apply_event/api.py says what it does.
//
// First every head counts what leaves and what enters, so that the pages it takes from and gives to the ring are known (DiffKV,
// arXiv 2412.03131 sec. 5.2); then heads remove and demote, each on its own; then pieces of 256 entering tokens are encoded. Nothing
// changes before everything has been checked.
#include "cpu_head.h"
#include "elements.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int kPiece = 256;  // tokens that one thread encodes at a time

// Exact tokens on their way into tiers; rows of tokens may be longer than those of `entering [B, n]`.
struct Entering {
  const void *k, *v;  // [B, slots, head_dim]
  Exact type;
  const float* significance;  // [B, slots]
  const int32_t *position, *tier_code;
  const bool* admitted;
  int64_t n, slots;
};

// What happens to one head.
struct Plan {
  Leaving leaving;
  int64_t entering[2], granted, given, take, give;  // pages, and where in the ring they are
  int32_t* order;                                   // entering tokens, those of tier 0 first

  int64_t leaves(int t) const { return leaving.total(t); }
  bool idle() const { return entering[0] + entering[1] + leaves(0) + leaves(1) == 0; }
  int64_t after(const Held& head, int t) const {
    return head.lengths[t] - leaves(t) + entering[t] + (t == 1 ? leaving.demoted : 0);
  }
};

// Entering tokens of a tier that go to its slots [from, to).
struct Piece {
  int32_t head, t;
  int64_t from, to, first;  // `first`: slot of the first entering token of the tier
  const int32_t* order;
};

// Checks the admitted heads' tables, and that no page is held twice: heads change theirs at the same time. Marks what they hold.
ffi::Error check(const State& state, const Entering& tokens, uint8_t* seen) {
  std::fill(seen, seen + state.num_pages, 0);
  for (int64_t head = 0; head < state.heads; ++head) {
    if (!tokens.admitted[head]) continue;
    const Held held = state.held(head);
    if (auto error = check(state.layout, held, state.num_pages); error.failure()) return error;
    for (int t = 0; t < state.layout.tiers; ++t) {
      for (int64_t i = 0; i < state.layout.pages(t, held.lengths[t]); ++i) {
        if (seen[held.page(t, i)]++) return ffi::Error::InvalidArgument("page table names a page twice");
      }
    }
  }
  if (state.ring_start < 0 || state.ring_start >= std::max<int64_t>(state.num_pages, 1) || state.ring_count < 0 ||
      state.ring_count > state.num_pages) {
    return ffi::Error::InvalidArgument("ring of free pages begins or ends outside of its array");
  }
  return ffi::Error::Success();
}

// Lists the entering tokens of a head by tier.
void list_entering(const State& state, const Entering& tokens, int64_t head, Plan& plan) {
  const int32_t* code = tokens.tier_code + head * tokens.n;
  int64_t listed = 0;
  for (int t = 0; t < state.layout.tiers; ++t) {
    const int64_t before = listed;
    for (int64_t i = 0; i < tokens.n; ++i) {
      plan.order[listed] = int32_t(i);
      listed += code[i] == t + 1;
    }
    plan.entering[t] = listed - before;
  }
}

// Gives every head its own range of the ring. Pages taken lie in [start, start + count), pages given up go right behind: to places of
// pages that heads hold, so that heads may read and write the ring in any order.
ffi::Error share_ring(const State& state, const Entering& tokens, uint8_t* seen, Plan* plans, int64_t& taken, int64_t& given) {
  taken = given = 0;
  for (int64_t head = 0; head < state.heads; ++head) {
    Plan& plan = plans[head];
    if (!tokens.admitted[head]) continue;
    const Held held = state.held(head);
    int64_t before = 0, after = 0;
    for (int t = 0; t < state.layout.tiers; ++t) {
      before += state.layout.pages(t, held.lengths[t]), after += state.layout.pages(t, plan.after(held, t));
    }
    if (after > state.max_pages) return ffi::Error::InvalidArgument("entering tokens do not fit the page table");
    plan.granted = std::max<int64_t>(after - before, 0), plan.given = std::max<int64_t>(before - after, 0);
    plan.take = state.ring_start + taken, plan.give = state.ring_start + state.ring_count + given;
    taken += plan.granted, given += plan.given;
  }
  if (taken > state.ring_count) return ffi::Error::InvalidArgument("admitted heads need more pages than are free");
  if (state.ring_count + given > state.num_pages) return ffi::Error::InvalidArgument("more pages are free or held than there are");
  for (int64_t i = 0; i < taken; ++i) {
    const int32_t page = state.ring[(state.ring_start + i) % state.num_pages];
    if (page < 0 || page >= state.num_pages || seen[page]++) return ffi::Error::InvalidArgument("ring names a page that is not free");
  }
  return ffi::Error::Success();
}

// Which tokens of a tier leave it: `leaves [length]` as `Head::remove` reads it.
uint8_t* mark_leaving(const Judge& judge, const Held& head, int t, const Leaving& leaving) {
  const int64_t length = head.lengths[t];
  uint8_t* leaves = scratch<struct Leaves, uint8_t>(length + kLanes);
  if (judge.rules.one_victim) {
    std::fill(leaves, leaves + length, 0);
    leaves[leaving.victim[t]] = t == 0 && leaving.demoted ? 2 : 1;
    return leaves;
  }
  over_slots(judge.layout, head, t, [&](int64_t slot, int64_t token, int64_t) {
    const Floats mean = judge.mean(token);
    store(leaves + slot, low_bytes((judge.dropped(mean) & 1) | (judge.demoted(mean, t) & 2)));
  });
  return leaves;
}

// Removes what leaves a head, and makes room for what enters it.
void change_tables(const State& state, const Judge& judge, const Plan& plan) {
  Head head(state, judge.head);
  head.take_granted(plan.take, plan.granted);
  for (int t = state.layout.tiers; t-- > 0;) {
    if (plan.leaves(t)) head.remove(t, mark_leaving(judge, state.held(judge.head), t, plan.leaving), plan.leaves(t));
  }
  for (int t = 0; t < state.layout.tiers; ++t) head.resize(t, head.length(t) + plan.entering[t]);
  head.finish(plan.give);
}

// Encodes the tokens of a piece, 16 at a time.
void encode_piece(const State& state, const Entering& tokens, const Piece& piece) {
  const Layout& layout = state.layout;
  for (int64_t slot = piece.from / kLanes * kLanes; slot < piece.to; slot += kLanes) {
    const int first = int(std::max(piece.from - slot, int64_t{0})), last = int(std::min<int64_t>(piece.to - slot, kLanes));
    const Place to = place(state, piece.head, piece.t, slot);
    int64_t index[kLanes];  // lanes that hold no entering token take that of another
    for (int lane = 0; lane < kLanes; ++lane) {
      index[lane] = piece.head * tokens.slots + piece.order[slot + std::clamp(lane, first, last - 1) - piece.first];
    }
    for (int i = 0; i < 2; ++i) {
      const float* x = columns(i ? tokens.v : tokens.k, tokens.type, layout.head_dim, index);
      encode(codec_of(layout.tier[piece.t], i), layout.head_dim, x, {to.payload[i], to.meta[i], layout.tokens, first, last - first});
    }
    for (int lane = first; lane < last; ++lane) {
      state.set_token_data(to.token + lane, tokens.significance[index[lane]], tokens.position[index[lane]]);
    }
  }
}

// Cuts what enters into pieces that begin at multiples of 16 slots, so that no two of them write the same vector.
int64_t cut(const State& state, const Entering& tokens, const Plan* plans, Piece* pieces) {
  int64_t count = 0;
  for (int64_t head = 0; head < state.heads; ++head) {
    if (!tokens.admitted[head]) continue;
    const int32_t* order = plans[head].order;
    for (int t = 0; t < state.layout.tiers; order += plans[head].entering[t], ++t) {
      const int64_t end = state.held(head).lengths[t], first = end - plans[head].entering[t];
      for (int64_t from = first, to; from < end; from = to) {
        to = std::min(end, (from / kPiece + 1) * kPiece);
        pieces[count++] = {int32_t(head), t, from, to, first, order};
      }
    }
  }
  return count;
}

ffi::Error run(ffi::ThreadPool& threads, const State& state, const Rules& rules, const Entering& tokens, int64_t& taken, int64_t& given) {
  uint8_t* seen = scratch<struct SeenPages, uint8_t>(state.num_pages);
  if (auto error = check(state, tokens, seen); error.failure()) return error;
  const TokenData token_data = {state.significance, state.position, state.wide};
  Plan* plans = scratch<struct Plans, Plan>(state.heads);
  int32_t* orders = scratch<struct Orders, int32_t>(state.heads * (tokens.n + 1));
  parallel_for(threads, state.heads, [&](int64_t head) {
    Plan& plan = plans[head] = Plan{};
    plan.order = orders + head * (tokens.n + 1);
    if (!tokens.admitted[head]) return;
    list_entering(state, tokens, head, plan);
    if (state.scored) plan.leaving = leaving_of(Judge{state.layout, token_data, rules, head}, state.held(head));
  });
  if (auto error = share_ring(state, tokens, seen, plans, taken, given); error.failure()) return error;
  parallel_for(threads, state.heads, [&](int64_t head) {
    if (!plans[head].idle()) change_tables(state, Judge{state.layout, token_data, rules, head}, plans[head]);
  });
  const int64_t most = tokens.n / kPiece + 2 * state.layout.tiers;
  Piece* pieces = scratch<struct Pieces, Piece>(state.heads * most);
  const int64_t count = cut(state, tokens, plans, pieces);
  parallel_for(threads, count, [&](int64_t i) { encode_piece(state, tokens, pieces[i]); });
  return ffi::Error::Success();
}

// The arrays that change are operands too, and are not named: the results lie in their memory. Nor is what `count_moves` gave, which is
// here so that XLA knows that it has read the pool.
ffi::Error apply_event(ffi::ThreadPool threads, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer,
                       ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::F32> tau,
                       ffi::Buffer<ffi::S32> query_spans, ffi::Buffer<ffi::PRED> has_new_tokens, ffi::Buffer<ffi::PRED> receives, ffi::AnyBuffer k,
                       ffi::AnyBuffer v, ffi::Buffer<ffi::F32> token_significance, ffi::Buffer<ffi::S32> token_position,
                       ffi::Buffer<ffi::S32> entering, ffi::Buffer<ffi::PRED> admitted, ffi::ResultBuffer<ffi::U8> payload,
                       ffi::Result<ffi::AnyBuffer> meta, ffi::ResultBuffer<ffi::F32> significance, ffi::Result<ffi::AnyBuffer> position,
                       ffi::ResultBuffer<ffi::S32> table, ffi::ResultBuffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::S32> ring,
                       ffi::ResultBuffer<ffi::S32> ring_start, ffi::ResultBuffer<ffi::S32> ring_count,
                       ffi::Span<const int64_t> formats, bool one_victim) {
  const auto pages = payload->dimensions();
  State state{};
  state.layout = Layout::make(formats, k.dimensions()[2], pages[2], pages[1], meta->dimensions()[1], position->dimensions()[1]);
  state.payload = payload->typed_data(), state.meta = static_cast<uint16_t*>(meta->untyped_data());
  state.significance = significance->typed_data(), state.position = position->untyped_data();
  state.scored = significance->dimensions()[1] > 0, state.wide = position->element_type() == ffi::DataType::S32;
  state.table = table->typed_data(), state.lengths = lengths->typed_data(), state.ring = ring->typed_data();
  state.heads = table->dimensions()[0], state.max_pages = table->dimensions()[1], state.num_pages = pages[0];
  int32_t &start = ring_start->typed_data()[0], &free_pages = ring_count->typed_data()[0];
  state.ring_start = start, state.ring_count = free_pages;
  const Rules rules = Rules::of(tau, query_spans, has_new_tokens, receives, one_victim);
  const Entering tokens = {k.untyped_data(),           v.untyped_data(),       exact_type(k.element_type()), token_significance.typed_data(),
                           token_position.typed_data(), entering.typed_data(), admitted.typed_data(),        entering.dimensions()[1],
                           k.dimensions()[1]};
  int64_t taken, given;
  if (auto error = run(threads, state, rules, tokens, taken, given); error.failure()) return error;
  start = int32_t((start + taken) % std::max<int64_t>(state.num_pages, 1));
  free_pages += int32_t(given - taken);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apply_event_cpu, apply_event,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<bool>("one_victim"));
