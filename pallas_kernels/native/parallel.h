// Work shared between the calling thread and XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace diffkv {

// Calls body(i) once for every i in [0, n), in any order and on several threads; returns when all have returned.
//
// Threads take indices from a counter, so one that the pool starts late finds nothing left and touches nothing of the caller's: the
// caller only waits for indices that were taken, and cannot wait for ever even if the pool never runs a task.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n;
    const Body* body;
    void work() {
      for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
        (*body)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->n = n;
  shared->body = &body;
  for (int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1; helpers > 0; --helpers) {
    pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  for (int64_t spins = 0; shared->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace diffkv
