// A team of threads that takes numbered tasks, in order, from one counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace keysift {

// Runs body(context) once on each of `threads` threads, the caller's among them.
void run_team(int threads, void (*body)(void*), void* context);

template <class Body>
void for_each_task(std::int64_t tasks, int threads, const Body& body) {
  struct Shared {
    const Body& body;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
  } shared{body, tasks};
  auto take = [](void* context) {
    auto& shared = *static_cast<Shared*>(context);
    for (std::int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;)
      shared.body(task);
  };
  run_team(static_cast<int>(std::min<std::int64_t>(threads, tasks)), take, &shared);
}

}  // namespace keysift
