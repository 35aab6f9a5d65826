#include "threads.h"

#include <dlfcn.h>

#include <exception>
#include <thread>
#include <vector>

namespace keysift {
namespace {

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch has loaded an OpenMP runtime whose idle threads spin for a while: a second pool would fight it for the cores.
OpenMpParallel loaded_openmp() {
#if defined(__SANITIZE_THREAD__)  // it does not see how OpenMP's threads wait for each other
  return nullptr;
#endif
  static const auto parallel = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return parallel;
}

void run_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  try {
    others.reserve(threads);
    for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  } catch (const std::exception&) {  // those that could be started do the work
  }
  body(context);
  for (auto& other : others) other.join();
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* context) {
  if (threads <= 1) {
    body(context);
  } else if (const auto parallel = loaded_openmp()) {
    parallel(body, context, static_cast<unsigned>(threads), 0);
  } else {
    run_threads(threads, body, context);
  }
}

}  // namespace keysift
