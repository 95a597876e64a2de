// Attention of a prompt chunk and the column sums of its observing rows on the CPU: pallas_kernels/prefill_attention/api.py says what
// they compute.
//
// A unit of work is a block of rows of one head. It unpacks block after block of keys and values into matrices that stay in its core's
// cache, and takes each into a running softmax: no array of rows times keys exists, nor one of unpacked keys beyond a block. Column sums
// split the keys of a head instead. Units do not depend on how many threads or other heads there are.
#include "cpu_columns.h"
#include "cpu_flash.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

// Calls body with the word to multiply in.
template <typename Body>
void with_word(const Problem& p, const Body& body) {
#if DIFFKV_BF16
  if (p.pairs()) return body(Pair{});
#endif
  body(Single{});
}

// The operands that both handlers have; sets `problem` or says what is wrong with them.
ffi::Error read_operands(Problem& problem, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                         const ffi::Buffer<ffi::S32>& length, const ffi::Buffer<ffi::U8>& payload, const ffi::AnyBuffer& meta,
                         int64_t token_data_rows, const ffi::Buffer<ffi::S32>& table, const ffi::Buffer<ffi::S32>& lengths,
                         const ffi::AnyBuffer& recent_k, const ffi::AnyBuffer& recent_v, const ffi::Buffer<ffi::S32>& recent_lengths,
                         const ffi::Buffer<ffi::S32>& layer, ffi::Span<const int64_t> formats) {
  const auto shape = q.dimensions();
  problem.chunk = {Numbers::of(q), Numbers::of(k), Numbers::of(v), length.typed_data(), int(shape[1]), int(shape[2])};
  for (int64_t head = 0; head < shape[0]; ++head) {
    const int32_t tokens = problem.chunk.length[head];
    if (tokens < 0 || tokens > shape[2]) return ffi::Error::InvalidArgument("length outside the chunk");
  }
  return Heads::read(problem.heads, formats, payload, meta, token_data_rows, table, lengths, recent_k, recent_v, recent_lengths, layer);
}

ffi::Error prefill_attention(ffi::ThreadPool threads, ffi::Span<const int64_t> formats, float sm_scale, float cap, int64_t token_data_rows,
                             ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> length,
                             ffi::Buffer<ffi::U8> payload, ffi::AnyBuffer meta, ffi::Buffer<ffi::S32> table,
                             ffi::Buffer<ffi::S32> lengths, ffi::AnyBuffer recent_k, ffi::AnyBuffer recent_v,
                             ffi::Buffer<ffi::S32> recent_lengths, ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> out,
                             ffi::ResultBuffer<ffi::F32> lse) {
  Problem p{};
  p.sm_scale = sm_scale, p.cap = cap;
  auto error = read_operands(p, q, k, v, length, payload, meta, token_data_rows, table, lengths, recent_k, recent_v, recent_lengths, layer,
                             formats);
  if (error.failure()) return error;
  const Attended to{out->typed_data(), lse->typed_data()};
  const int rows = p.chunk.rows, step = rows_at_once(p), blocks = (rows + step - 1) / step;
  with_word(p, [&](auto word) {
    parallel_for(threads, blocks * p.heads.count, [&](int64_t i) {
      const int first = static_cast<int>(blocks - 1 - i / p.heads.count) * step;  // the last rows see most keys: they go first
      attend_rows<decltype(word)>(p, i % p.heads.count, first, std::min(first + step, rows), to);
    });
  });
  return ffi::Error::Success();
}

ffi::Error column_sums(ffi::ThreadPool threads, ffi::Span<const int64_t> formats, float sm_scale, float cap, int64_t token_data_rows,
                       int64_t observe, bool mean, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::Buffer<ffi::S32> length,
                       ffi::Buffer<ffi::U8> payload, ffi::AnyBuffer meta, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths,
                       ffi::AnyBuffer recent_k, ffi::Buffer<ffi::S32> recent_lengths, ffi::Buffer<ffi::S32> layer,
                       ffi::Buffer<ffi::F32> lse, ffi::Buffer<ffi::F32> significance, ffi::ResultBuffer<ffi::F32> significance_out,
                       ffi::ResultBuffer<ffi::F32> recent, ffi::ResultBuffer<ffi::F32> chunk) {
  (void)significance;  // the result lies in its memory
  Problem p{};
  p.sm_scale = sm_scale, p.cap = cap;
  auto error = read_operands(p, q, k, k, length, payload, meta, token_data_rows, table, lengths, recent_k, recent_k, recent_lengths, layer,
                             formats);
  if (error.failure()) return error;
  const Scored to{significance_out->typed_data(), recent->typed_data(), chunk->typed_data(), mean};
  std::fill_n(to.recent, recent->element_count(), 0.0f);
  std::fill_n(to.chunk, chunk->element_count(), 0.0f);
  struct Unit {
    int64_t head;
    Span span;
  };
  std::vector<Unit> units;
  for (int64_t head = 0; head < p.heads.count; ++head) {
    if (length.typed_data()[head] > 0) over_spans(p, head, p.chunk.rows, [&](const Span& span) { units.push_back({head, span}); });
  }
  with_word(p, [&](auto word) {
    parallel_for(threads, units.size(), [&](int64_t i) {
      const int64_t head = units[i].head;
      const int first = std::max(p.chunk.rows - static_cast<int>(observe), p.chunk.first(head));
      score_span<decltype(word)>(p, head, first, units[i].span, lse.typed_data(), to);
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(prefill_attention_cpu, prefill_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("token_data_rows")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(column_sums_cpu, column_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("token_data_rows")
                                  .Attr<int64_t>("observe")
                                  .Attr<bool>("mean")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
