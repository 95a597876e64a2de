// Quantisation of blocks and demotion from one format to another on the CPU: pallas_kernels/codecs/api.py says what they compute.
#include "elements.h"
#include "encode.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int kPieces = 16;  // of 16 tokens that one thread takes at a time

// K and V of all blocks: `[N, rows, T]` each.
struct Results {
  uint8_t* payload[2];
  uint16_t* meta[2];
};

// Calls body(block, first token) for every 16 tokens of `blocks` blocks of `tokens`.
template <typename Body>
void over_pieces(ffi::ThreadPool& threads, int64_t blocks, int64_t tokens, const Body& body) {
  const int64_t per_block = tokens / kLanes, n = blocks * per_block;
  parallel_for(threads, (n + kPieces - 1) / kPieces, [&](int64_t task) {
    for (int64_t i = task * kPieces; i < std::min(n, (task + 1) * kPieces); ++i) body(i / per_block, i % per_block * kLanes);
  });
}

Target target(const Codec& codec, const Results& to, int tensor, int64_t block, int64_t tokens, int64_t first) {
  return {to.payload[tensor] + block * codec.rows * tokens + first, to.meta[tensor] + block * codec.meta_rows() * tokens + first,
          int(tokens), 0, kLanes};
}

ffi::Error encode_blocks(ffi::ThreadPool threads, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::ResultBuffer<ffi::U8> k_payload,
                         ffi::ResultBuffer<ffi::U8> v_payload, ffi::Result<ffi::AnyBuffer> k_meta, ffi::Result<ffi::AnyBuffer> v_meta,
                         ffi::Span<const int64_t> formats) {
  const int64_t head_dim = k.dimensions()[1], tokens = k.dimensions()[2];
  const Tier tier = Layout::make(formats, head_dim, tokens, 0, 0, 0).tier[0];
  const Results to = {{k_payload->typed_data(), v_payload->typed_data()},
                      {static_cast<uint16_t*>(k_meta->untyped_data()), static_cast<uint16_t*>(v_meta->untyped_data())}};
  over_pieces(threads, k.dimensions()[0], tokens, [&](int64_t block, int64_t first) {
    float* x = scratch<struct Values, float>(head_dim * kLanes);
    for (int tensor = 0; tensor < 2; ++tensor) {
      const ffi::AnyBuffer& from = tensor ? v : k;
      const Codec& codec = tensor ? tier.value : tier.key;
      for (int64_t c = 0; c < head_dim; ++c) {
        store(x + c * kLanes, elements(from.untyped_data(), exact_type(from.element_type()), (block * head_dim + c) * tokens + first));
      }
      encode(codec, int(head_dim), x, target(codec, to, tensor, block, tokens, first));
    }
  });
  return ffi::Error::Success();
}

ffi::Error demote_blocks(ffi::ThreadPool threads, ffi::Buffer<ffi::U8> k_payload, ffi::Buffer<ffi::U8> v_payload, ffi::AnyBuffer k_meta,
                         ffi::AnyBuffer v_meta, ffi::ResultBuffer<ffi::U8> new_k_payload, ffi::ResultBuffer<ffi::U8> new_v_payload,
                         ffi::Result<ffi::AnyBuffer> new_k_meta, ffi::Result<ffi::AnyBuffer> new_v_meta,
                         ffi::Span<const int64_t> formats, int64_t head_dim) {
  const int64_t tokens = k_payload.dimensions()[2];
  const Layout layout = Layout::make(formats, head_dim, tokens, 0, 0, 0);
  const Results to = {{new_k_payload->typed_data(), new_v_payload->typed_data()},
                      {static_cast<uint16_t*>(new_k_meta->untyped_data()), static_cast<uint16_t*>(new_v_meta->untyped_data())}};
  over_pieces(threads, k_payload.dimensions()[0], tokens, [&](int64_t block, int64_t first) {
    for (int tensor = 0; tensor < 2; ++tensor) {
      const Codec& high = tensor ? layout.tier[0].value : layout.tier[0].key;
      const Codec& low = tensor ? layout.tier[1].value : layout.tier[1].key;
      const uint8_t* payload = (tensor ? v_payload : k_payload).typed_data() + block * high.rows * tokens + first;
      const void* meta = (tensor ? v_meta : k_meta).untyped_data();
      const Stored from = {payload, static_cast<const uint16_t*>(meta) + block * high.meta_rows() * tokens + first};
      requantise(high, low, int(head_dim), from, int(tokens), target(low, to, tensor, block, tokens, first));
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(encode_cpu, encode_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("formats"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(demote_cpu, demote_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<int64_t>("head_dim"));
