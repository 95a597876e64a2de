// New tokens into the recent window and old ones out of it, on the CPU: pallas_kernels/recent_window/api.py says what they compute.
#include <cstring>

#include "elements.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace diffkv;

namespace {

constexpr int64_t kSerial = 1 << 18;  // bytes that one thread moves sooner than others start

// One layer of windows `[L, heads ..., N, numbers of a slot ...]`, as bytes; heads may lie on several axes.
struct Window {
  char* data;
  int64_t heads = 1, slots, slot_bytes;

  Window(ffi::AnyBuffer& all, int64_t layer, bool vectors) {
    const auto shape = all.dimensions();
    const size_t slot_axis = shape.size() - (vectors ? 2 : 1);
    for (size_t axis = 1; axis < slot_axis; ++axis) heads *= shape[axis];
    slots = shape[slot_axis], slot_bytes = int64_t(ffi::ByteWidth(all.element_type())) * (vectors ? shape[slot_axis + 1] : 1);
    data = static_cast<char*>(all.untyped_data()) + layer * heads * slots * slot_bytes;
  }
  char* at(int64_t head, int64_t slot) const { return data + (head * slots + slot) * slot_bytes; }

  void write(int64_t head, int64_t slot, const ffi::AnyBuffer& tokens) const {
    std::memcpy(at(head, slot), static_cast<const char*>(tokens.untyped_data()) + head * slot_bytes, slot_bytes);
  }
  void shift(int64_t head, int64_t by) const {
    std::memmove(at(head, 0), at(head, by), (slots - by) * slot_bytes);
    std::memset(at(head, slots - by), 0, by * slot_bytes);
  }
};

// The old windows are not named: the results lie in their memory.
ffi::Error append_recent(ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::S32> layer, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::S32> slot, ffi::Result<ffi::AnyBuffer> recent_k, ffi::Result<ffi::AnyBuffer> recent_v) {
  const int32_t at = layer.typed_data()[0];
  if (auto error = check_layer(*recent_k, at); error.failure()) return error;
  const Window keys(*recent_k, at, true), values(*recent_v, at, true);
  for (int64_t head = 0; head < keys.heads; ++head) {
    const int32_t to = slot.typed_data()[head];
    if (to < 0 || to >= keys.slots) continue;
    keys.write(head, to, k);
    values.write(head, to, v);
  }
  return ffi::Error::Success();
}

ffi::Error shift_recent(ffi::ThreadPool threads, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::S32> layer,
                        ffi::Buffer<ffi::S32> shift, ffi::Result<ffi::AnyBuffer> recent_k, ffi::Result<ffi::AnyBuffer> recent_v,
                        ffi::Result<ffi::AnyBuffer> significance) {
  const int32_t at = layer.typed_data()[0];
  if (auto error = check_layer(*recent_k, at); error.failure()) return error;
  const Window keys(*recent_k, at, true), values(*recent_v, at, true), scores(*significance, at, false);
  for (int64_t head = 0; head < keys.heads; ++head) {
    const int32_t by = shift.typed_data()[head];
    if (by < 0 || by > keys.slots) return ffi::Error::InvalidArgument("shift outside the recent window");
  }
  const auto one = [&](int64_t head) {
    const int32_t by = shift.typed_data()[head];
    if (by == 0) return;
    keys.shift(head, by);
    values.shift(head, by);
    if (scores.slots > 0) scores.shift(head, by);
  };
  if (keys.heads * keys.slots * keys.slot_bytes > kSerial) {
    parallel_for(threads, keys.heads, one);
  } else {
    for (int64_t head = 0; head < keys.heads; ++head) one(head);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(append_recent_cpu, append_recent,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(shift_recent_cpu, shift_recent,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
