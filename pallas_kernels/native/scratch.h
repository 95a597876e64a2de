// Memory to work in that outlives a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace diffkv {

// `n` numbers, aligned to 64 bytes, of the calling thread and of one purpose: `scratch<struct Name, float>(n)`, where the name belongs to
// the function that it stands in. The memory grows and never shrinks, so that a call neither allocates nor touches fresh pages of the
// operating system; what it holds is left from earlier calls.
template <typename Purpose, typename Number>
Number* scratch(size_t n) {
  thread_local std::vector<Number> memory;
  if (memory.size() < n + 64) memory.resize(n + 64);
  return reinterpret_cast<Number*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

}  // namespace diffkv
