// Log masses of pages by their codes: a look at the bounds of all, then at the keys of those that promise most.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kListOfTask = 64;  // candidates

// Per thread.
struct CodeMemory {
  Buffer queries, coarse, fine, ranks;
};

// For all tasks of a call.
struct CodePlan {
  std::int64_t lists, list_runs;  // rows times KV heads; tasks of one
  bool ranked;                    // there may be more full pages than candidates
  float* spreads;                 // [R, Hq, F]
  std::int32_t* counts;           // [lists], pages of each list; 0 where all full pages are looked at anyway
  std::int32_t* pages;            // [lists, candidates + 1]

  std::int32_t* list(const PagesCall& call, std::int64_t i) const { return pages + i * (call.candidates + 1); }
};

inline CodePlan make_plan(const PagesCall& call, Buffer& memory) {
  const std::int64_t lists = call.rows * call.kv_heads, spreads = call.rows * call.heads * call.pages;
  const bool ranked = call.candidates < call.pages;
  float* data = memory.floats(spreads + (ranked ? lists * (call.candidates + 2) : 0) + 1);
  auto* counts = reinterpret_cast<std::int32_t*>(data + spreads);
  return {lists, (call.candidates + kListOfTask - 1) / kListOfTask, ranked, data, counts, counts + lists};
}

inline bool takes_all(const PagesCall& call, const PageRun& run) { return run.full <= call.candidates; }

inline Fine make_fine(Buffer& memory, int group) {
  constexpr int kStride = kPagesOfTask + 16;
  float* data = memory.floats(std::size_t(2) * group * kStride);
  return {data, data + group * kStride, kStride};
}

// half: half the channels of a word.
inline int half_word(const PagesCall& call) { return static_cast<int>(call.dim / call.words / 2); }

inline void look_at_list(const PagesCall& call, const CodePlan& plan, std::int64_t row, std::int64_t kv_head,
                         const PageList& list, const CodeQueries& queries, const Fine& fine) {
  const float* spreads = plan.spreads + (row * call.heads + kv_head * queries.group) * call.pages;
  (half_word(call) == 8 ? scan_list<2> : scan_list<4>)(call, row, kv_head, list, queries, spreads, fine);
}

// The coarse look at a run; also the fine one, where no page of the row has to be left out.
template <class T>
void first_look(const PagesCall& call, const CodePlan& plan, const PageRun& run, CodeMemory& memory) {
  const int count = run.full_stop() - run.first;
  write_open<T>(call, run);
  if (count == 0) return;
  const CodeQueries queries = round_queries<T>(call, run, half_word(call), memory.queries);
  const Coarse coarse = make_coarse(memory.coarse, queries.group);
  look_at_run(call, run, queries, coarse);
  const float log_size = std::log(static_cast<float>(call.page_size));
  for (int g = 0; g < queries.group; ++g) {
    const std::int64_t head = run.kv_head * queries.group + g;
    const float* centres = coarse.middles + g * coarse.stride;
    float* masses = masses_of(call, run.row, head) + run.first;
    for (int i = 0; i < count; ++i) masses[i] = centres[i] + log_size;
    std::copy_n(coarse.spreads + g * coarse.stride, count,
                plan.spreads + (run.row * call.heads + head) * call.pages + run.first);
  }
  if (!takes_all(call, run)) return;
  std::int32_t pages[kPagesOfTask];
  for (int i = 0; i < count; ++i) pages[i] = run.first + i;
  look_at_list(call, plan, run.row, run.kv_head, {pages, count}, queries, make_fine(memory.fine, queries.group));
}

// Ranks the full pages of a row and KV head.
inline void choose_candidates(const PagesCall& call, const CodePlan& plan, std::int64_t i, Buffer& memory) {
  const std::int64_t row = i / call.kv_heads, group = call.heads / call.kv_heads, head = i % call.kv_heads * group;
  const PageRun run = run_of(call, i * runs_of_head(call));
  plan.counts[i] = 0;
  if (takes_all(call, run)) return;
  const std::int64_t size = padded(run.full);
  float* ranks = memory.floats(2 * size);
  float* scores = ranks + size;
  std::fill_n(ranks, size, 0.0f);
  for (std::int64_t g = 0; g < group; ++g) {
    const float* masses = masses_of(call, row, head + g);
    const float* spreads = plan.spreads + (row * call.heads + head + g) * call.pages;
    for (int page = 0; page < run.full; ++page) scores[page] = masses[page] + call.slack * spreads[page];
    const float factor = exponentials(scores, run.full, scores);
    for (std::int64_t page = 0; page < size; page += kLanes)
      store(ranks + page, fma(load(scores + page), splat(factor), load(ranks + page)));
  }
  std::fill(ranks + run.full, ranks + size, -1.0f);
  plan.counts[i] = take_highest(ranks, size, static_cast<int>(call.candidates), 0, plan.list(call, i));
}

// The fine look at a part of a list.
template <class T>
void second_look(const PagesCall& call, const CodePlan& plan, std::int64_t task, CodeMemory& memory) {
  const std::int64_t i = task / plan.list_runs;
  const int first = static_cast<int>(task % plan.list_runs) * kListOfTask;
  const int count = std::min(kListOfTask, plan.counts[i] - first);
  if (count <= 0) return;
  const PageRun run = run_of(call, i * runs_of_head(call));
  const CodeQueries queries = round_queries<T>(call, run, half_word(call), memory.queries);
  look_at_list(call, plan, run.row, run.kv_head, {plan.list(call, i) + first, count}, queries,
               make_fine(memory.fine, queries.group));
}

// Memory of the calling thread; its destructor is registered by the thread that first passes the declaration.
inline CodeMemory& own_memory() {
  static thread_local CodeMemory memory;
  return memory;
}

template <class T>
void code_masses_of(const PagesCall& call, int threads) {
  static thread_local Buffer shared;
  const CodePlan plan = make_plan(call, shared);
  for_each_task(plan.lists * runs_of_head(call), threads,
                [&](std::int64_t i) { first_look<T>(call, plan, run_of(call, i), own_memory()); });
  if (!plan.ranked) return;
  for_each_task(plan.lists, threads, [&](std::int64_t i) { choose_candidates(call, plan, i, own_memory().ranks); });
  for_each_task(plan.lists * plan.list_runs, threads,
                [&](std::int64_t i) { second_look<T>(call, plan, i, own_memory()); });
}

}  // namespace keysift::KEYSIFT_ISA
