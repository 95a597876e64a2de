// Which stored tokens leave their tier, on the CPU: pallas_kernels/plan_event/api.py says what it computes.
#include "heads.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

ffi::Error count_moves(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> significance, ffi::AnyBuffer position,
                       ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> tau,
                       ffi::Buffer<ffi::S32> query_spans, ffi::Buffer<ffi::PRED> has_new_tokens, ffi::Buffer<ffi::PRED> receives,
                       ffi::ResultBuffer<ffi::S32> dropped, ffi::ResultBuffer<ffi::S32> demoted, ffi::ResultBuffer<ffi::S32> victim,
                       ffi::Span<const int64_t> formats, bool one_victim) {
  const auto shape = position.dimensions();
  const int64_t heads = table.dimensions()[0], max_pages = table.dimensions()[1];
  const Layout layout = Layout::make(formats, 0, shape[2], 0, 0, shape[1]);
  const auto held = [&](int64_t head) {
    return Held{table.typed_data() + head * max_pages, lengths.typed_data() + head * layout.tiers, max_pages};
  };
  for (int64_t head = 0; head < heads; ++head) {
    if (auto error = check(layout, held(head), shape[0]); error.failure()) return error;
  }
  const TokenData scores = {significance.typed_data(), position.untyped_data(), position.element_type() == ffi::DataType::S32};
  const Rules rules = Rules::of(tau, query_spans, has_new_tokens, receives, one_victim);
  parallel_for(threads, heads, [&](int64_t head) {
    const Leaving leaving = leaving_of(Judge{layout, scores, rules, head}, held(head));
    for (int t = 0; t < layout.tiers; ++t) {
      dropped->typed_data()[head * layout.tiers + t] = leaving.dropped[t];
      victim->typed_data()[head * layout.tiers + t] = leaving.victim[t];
    }
    demoted->typed_data()[head] = leaving.demoted;
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(count_moves_cpu, count_moves,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<bool>("one_victim"));
