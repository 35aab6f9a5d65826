// The exported functions. They hold no state: the level of the instruction set is an argument.
#include <cstddef>
#include <cstdint>
#include <new>

#include "abi.h"
#include "graph_links.h"
#include "pool.h"

namespace keysift {
namespace {

enum Level : int { kLevelPortable, kLevelAvx2, kLevelAvx512, kLevelAvx512Bf16 };

const Kernels& kernels(int level) {
#if defined(__x86_64__)
  if (level == kLevelAvx512Bf16) return kAvx512Bf16;
  if (level == kLevelAvx512) return kAvx512;
  if (level == kLevelAvx2) return kAvx2;
#endif
  return kPortable;
}

// Return values of a kernel, as in library.py.
enum Status : int { kDone, kNoMemory, kFailed };

// Runs the work; exceptions become a status, as none may cross the C interface.
template <class Work>
int status_of(const Work& work) noexcept {
  try {
    work();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (...) {
    return kFailed;
  }
}

}  // namespace
}  // namespace keysift

#define KEYSIFT_EXPORT extern "C" __attribute__((visibility("default")))

// The highest level that this processor and its operating system run.
KEYSIFT_EXPORT int keysift_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool dots = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && dots) return keysift::kLevelAvx512Bf16;
  if (avx512) return keysift::kLevelAvx512;
  if (avx2) return keysift::kLevelAvx2;
#endif
  return keysift::kLevelPortable;
}

// Size, and offset of the last field, of every structure of abi.h in its order; a 0 ends them. calls.py compares them
// with its own.
KEYSIFT_EXPORT const std::int64_t* keysift_layouts() {
  using namespace keysift;
#define KEYSIFT_LAYOUT(Call, last) sizeof(Call), offsetof(Call, last)
  static constexpr std::int64_t layouts[] = {
      KEYSIFT_LAYOUT(AttentionCall, scale),
      KEYSIFT_LAYOUT(Matrix, inputs),
      KEYSIFT_LAYOUT(LinearCall, type),
      KEYSIFT_LAYOUT(LayerInCall, eps),
      KEYSIFT_LAYOUT(LayerOutCall, eps),
      KEYSIFT_LAYOUT(ScoresCall, scale),
      KEYSIFT_LAYOUT(PagesCall, slack),
      KEYSIFT_LAYOUT(TopCall, epsilon),
      KEYSIFT_LAYOUT(SteadyCall, keep),
      KEYSIFT_LAYOUT(ClusterCall, type),
      KEYSIFT_LAYOUT(ProbeCall, scale),
      KEYSIFT_LAYOUT(GraphSearchCall, scale),
      KEYSIFT_LAYOUT(GraphNearestCall, type),
      KEYSIFT_LAYOUT(GraphLinksCall, degree),
      KEYSIFT_LAYOUT(FillCall, type),
      KEYSIFT_LAYOUT(AdmitCall, before),
      KEYSIFT_LAYOUT(ReadCall, error),
      0,
  };
#undef KEYSIFT_LAYOUT
  return layouts;
}

KEYSIFT_EXPORT int keysift_paged_attention(const keysift::AttentionCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).attention(*call, threads); });
}

KEYSIFT_EXPORT int keysift_linear(const keysift::LinearCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).linear(*call, threads); });
}

KEYSIFT_EXPORT int keysift_layer_in(const keysift::LayerInCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).layer_in(*call, threads); });
}

KEYSIFT_EXPORT int keysift_layer_out(const keysift::LayerOutCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).layer_out(*call, threads); });
}

KEYSIFT_EXPORT int keysift_column_scores(const keysift::ScoresCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).column_scores(*call, threads); });
}

KEYSIFT_EXPORT int keysift_code_masses(const keysift::PagesCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).code_masses(*call, threads); });
}

KEYSIFT_EXPORT int keysift_page_bounds(const keysift::PagesCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).page_bounds(*call, threads); });
}

KEYSIFT_EXPORT int keysift_top_pages(const keysift::TopCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).top_pages(*call, threads); });
}

KEYSIFT_EXPORT int keysift_steady_pages(const keysift::SteadyCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).steady_pages(*call, threads); });
}

KEYSIFT_EXPORT int keysift_cluster(const keysift::ClusterCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).cluster(*call, threads); });
}

KEYSIFT_EXPORT int keysift_probe(const keysift::ProbeCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).probe(*call, threads); });
}

KEYSIFT_EXPORT int keysift_graph_search(const keysift::GraphSearchCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).graph_search(*call, threads); });
}

KEYSIFT_EXPORT int keysift_graph_nearest(const keysift::GraphNearestCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).graph_nearest(*call, threads); });
}

KEYSIFT_EXPORT int keysift_graph_links(const keysift::GraphLinksCall* call, int, int threads) {
  return keysift::status_of([&] { keysift::graph_links(*call, threads); });
}

KEYSIFT_EXPORT int keysift_summarize(const keysift::FillCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).summarize(*call, threads); });
}

KEYSIFT_EXPORT int keysift_encode(const keysift::FillCall* call, int level, int threads) {
  return keysift::status_of([&] { keysift::kernels(level).encode(*call, threads); });
}

KEYSIFT_EXPORT int keysift_admit(const keysift::AdmitCall* call, int, int) {
  return keysift::status_of([&] { keysift::admit(*call); });
}

KEYSIFT_EXPORT int keysift_read_pieces(keysift::ReadCall* call, int, int) {
  return keysift::status_of([&] { keysift::read_pieces(*call); });
}
