// The algorithms, compiled once for each instruction set: the file that includes this has named it in KEYSIFT_ISA and
// included its vectors. Every name lives in its own namespace, so that the linker cannot mix code of two of them.
#pragma once

#define KEYSIFT_LAMBDA_INLINE __attribute__((always_inline))

#include "simd.h"
#include "arithmetic.h"
#include "key_tile.h"
#include "softmax.h"
#include "many_queries.h"
#include "dots.h"
#include "few_queries.h"
#include "linear.h"
#include "layer.h"
#include "pool_scores.h"
#include "column_scores.h"
#include "page_scan.h"
#include "page_bounds.h"
#include "highest.h"
#include "coarse_codes.h"
#include "fine_codes.h"
#include "code_masses.h"
#include "top_pages.h"
#include "steady_pages.h"
#include "cluster.h"
#include "probe.h"
#include "graph.h"
#include "pages.h"

namespace keysift::KEYSIFT_ISA {

template <class T>
void attention_of(const AttentionCall& call, int threads) {
  using Math = typename ArithmeticOf<T>::type;
  constexpr int kStep = kLanes * Math::kPair;
  const Plan plan(call);
  const int stride = static_cast<int>((call.dim + kStep - 1) / kStep * kStep) + kLanes;
  Buffer memory;
  const Partials partials{memory.floats(plan.partials * stride), stride};
  const bool in_place = call.dim % kStep == 0;
  for_each_task(static_cast<std::int64_t>(plan.tasks.size()), threads, [&](std::int64_t i) {
    const Task& task = plan.tasks[i];
    const bool few = task.queries * plan.heads_per_list(call) <= kFewQueries;
    (few && in_place ? attend_few<Math> : attend_many<Math>)(call, plan, partials, task);
  });
}

// Calls work(a number of the type).
template <class Work>
void by_type(Type type, const Work& work) {
  switch (type) {
    case kFloat32:
      return work(float());
    case kBFloat16:
      return work(bfloat16());
    case kFloat16:
      return work(float16());
  }
}

inline void attention(const AttentionCall& call, int threads) {
  by_type(call.type, [&](auto zero) { attention_of<decltype(zero)>(call, threads); });
}

inline void linear(const LinearCall& call, int threads) {
  if (call.type == kFloat32) return linear<ArithmeticOf<float>::type>(call, threads);
  return linear<ArithmeticOf<bfloat16>::type>(call, threads);
}

inline void layer_in(const LayerInCall& call, int threads) {
  if (call.type == kFloat32) return layer_in<ArithmeticOf<float>::type>(call, threads);
  return layer_in<ArithmeticOf<bfloat16>::type>(call, threads);
}

inline void layer_out(const LayerOutCall& call, int threads) {
  if (call.type == kFloat32) return layer_out<ArithmeticOf<float>::type>(call, threads);
  return layer_out<ArithmeticOf<bfloat16>::type>(call, threads);
}

inline void column_scores(const ScoresCall& call, int threads) {
  by_type(call.type, [&](auto zero) { column_scores_of<typename ArithmeticOf<decltype(zero)>::type>(call, threads); });
}

inline void code_masses(const PagesCall& call, int threads) {
  by_type(call.type, [&](auto zero) { code_masses_of<decltype(zero)>(call, threads); });
}

inline void page_bounds(const PagesCall& call, int threads) {
  by_type(call.type, [&](auto zero) { page_bounds_of<decltype(zero)>(call, threads); });
}

inline void cluster(const ClusterCall& call, int threads) {
  by_type(call.type, [&](auto zero) { cluster_of<decltype(zero)>(call, threads); });
}

inline void probe(const ProbeCall& call, int threads) {
  by_type(call.type, [&](auto zero) { probe_of<typename ArithmeticOf<decltype(zero)>::type>(call, threads); });
}

inline void summarize(const FillCall& call, int threads) {
  by_type(call.type, [&](auto zero) { summarize_of<decltype(zero)>(call, threads); });
}

inline void encode(const FillCall& call, int threads) {
  by_type(call.type, [&](auto zero) { encode_of<decltype(zero)>(call, threads); });
}

constexpr Kernels kTable{
    attention,
    linear,
    layer_in,
    layer_out,
    column_scores,
    code_masses,
    page_bounds,
    top_pages,
    steady_pages,
    cluster,
    probe,
    graph_search,
    graph_nearest,
    summarize,
    encode,
};

}  // namespace keysift::KEYSIFT_ISA
