// A team of threads that takes numbered tasks, in order, from one counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace keysift {

// Runs body(context), which does not throw, once on each of at most `threads` threads, the caller's among them.
void run_team(int threads, void (*body)(void*), void* context);

// Calls body(task) for each. If one throws, no more begin, and the caller gets the exception once all are done: it
// must leave neither a thread nor a region of OpenMP, which would end the process.
template <class Body>
void for_each_task(std::int64_t tasks, int threads, const Body& body) {
  struct Shared {
    const Body& body;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } shared{body, tasks};
  auto take = [](void* context) {
    auto& shared = *static_cast<Shared*>(context);
    try {
      for (std::int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;)
        shared.body(task);
    } catch (...) {
      shared.next.store(shared.tasks, std::memory_order_relaxed);
      if (!shared.failed.exchange(true)) shared.error = std::current_exception();
    }
  };
  run_team(static_cast<int>(std::min<std::int64_t>(threads, tasks)), take, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace keysift
