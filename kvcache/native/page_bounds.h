// The most that each page could hold, from the least and the greatest of its keys in every channel.
#pragma once

namespace keysift::KEYSIFT_ISA {

// Positive and negative parts of G queries: [G, 2, D] floats.
template <class T>
const float* split_queries(const PagesCall& call, const PageRun& run, int group, Buffer& memory) {
  float* parts = memory.floats(std::size_t(group) * 2 * call.dim);
  for (int g = 0; g < group; ++g) {
    const T* query = query_of<T>(call, run.row, run.kv_head * group + g);
    float* mine = parts + g * 2 * call.dim;
    for (std::int64_t d = 0; d < call.dim; d += kLanes) {
      const Vec q = widen(query + d);
      store(mine + d, q > Vec{} ? q : Vec{});
      store(mine + call.dim + d, q > Vec{} ? Vec{} : q);  // a NaN stays here
    }
  }
  return parts;
}

// out[v * stride + page] = the best score of N queries on a block of pages; summaries: of each page, [4, D].
template <class T, int N>
KEYSIFT_INLINE void bound_block(const T* const (&summaries)[kBlock], const float* parts, std::int64_t dim, float* out,
                                int stride) {
  Vec sums[N][kBlock] = {};
#pragma GCC unroll 4
  for (int page = 0; page < kBlock; ++page)
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      const Vec least = widen(summaries[page] + dim + d), greatest = widen(summaries[page] + 2 * dim + d);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        const float* mine = parts + v * 2 * dim + d;
        sums[v][page] = fma(load(mine), greatest, fma(load(mine + dim), least, sums[v][page]));
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store_totals(out + v * stride, sums[v]);
}

template <class T>
void bound_run(const PagesCall& call, const PageRun& run) {
  static thread_local Buffer memory;
  const int group = static_cast<int>(call.heads / call.kv_heads), stop = run.full_stop();
  const float* parts = split_queries<T>(call, run, group, memory);
  const float log_size = std::log(static_cast<float>(call.page_size));
  const auto summaries_of = [&](int page) {
    const std::int64_t frame = frame_of(call, run.row, run.kv_head, page);
    return static_cast<const T*>(call.summaries) + (frame * call.kv_heads + run.kv_head) * 4 * call.dim;
  };
  for (int page = run.first; page < stop; page += kBlock) {
    const T* summaries[kBlock];
    float best[kFew * kBlock];
    for (int i = 0; i < kBlock; ++i) {
      summaries[i] = summaries_of(std::min(page + i, stop - 1));
      prefetch(summaries_of(std::min(page + 2 * kBlock + i, stop - 1)) + call.dim, static_cast<int>(2 * call.dim));
    }
    const int count = std::min(kBlock, stop - page);
    by_few(group, [&](int first, auto number) KEYSIFT_LAMBDA_INLINE {
      bound_block<T, number()>(summaries, parts + first * 2 * call.dim, call.dim, best, kBlock);
      for (int v = 0; v < number(); ++v) {
        float* masses = masses_of(call, run.row, run.kv_head * group + first + v) + page;
        for (int i = 0; i < count; ++i) masses[i] = best[v * kBlock + i] * call.scale + log_size;
      }
    });
  }
  write_open<T>(call, run);
}

template <class T>
void page_bounds_of(const PagesCall& call, int threads) {
  for_each_task(call.rows * call.kv_heads * runs_of_head(call), threads,
                [&](std::int64_t i) { bound_run<T>(call, run_of(call, i)); });
}

}  // namespace keysift::KEYSIFT_ISA
