// Parts that all scans over the pages of single queries share: the split into tasks, the query's own page, the way of
// the results to the caller.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kPagesOfTask = 256;
constexpr int kBlock = 4;  // pages whose lanes are summed at once

// A run of pages as one row and one KV head see it.
struct PageRun {
  std::int64_t row, kv_head;
  int first, stop;
  int full, own;  // pages of the row that are full, which come first; its own page, -1: none

  int full_stop() const { return std::min(stop, std::max(full, first)); }
};

inline std::int64_t runs_of_head(const PagesCall& call) { return (call.pages + kPagesOfTask - 1) / kPagesOfTask; }

inline PageRun run_of(const PagesCall& call, std::int64_t task) {
  const std::int64_t runs = runs_of_head(call), run = task % runs, pair = task / runs, row = pair / call.kv_heads;
  const int first = static_cast<int>(run) * kPagesOfTask, pages = static_cast<int>(call.pages);
  const int own = call.positions[row] < 0 ? -1 : static_cast<int>(call.positions[row] / call.page_size);
  return {row, pair % call.kv_heads, first, std::min(first + kPagesOfTask, pages), std::min(std::max(own, 0), pages),
          own};
}

inline std::int64_t frame_of(const PagesCall& call, std::int64_t row, std::int64_t kv_head, std::int64_t page) {
  const std::int64_t* strides = call.frames_strides;
  return call.frames[row * strides[0] + kv_head * strides[1] + page * strides[2]];
}

inline std::int64_t own_frame(const PagesCall& call, std::int64_t row, std::int64_t kv_head) {
  return call.own[row * call.own_strides[0] + kv_head * call.own_strides[1]];
}

inline float* masses_of(const PagesCall& call, std::int64_t row, std::int64_t head) {
  return call.masses + (row * call.heads + head) * call.pages;
}

template <class T>
const T* query_of(const PagesCall& call, std::int64_t row, std::int64_t head) {
  return static_cast<const T*>(call.q) + row * call.q_strides[0] + head * call.q_strides[1];
}

template <class T>
float dot(const T* a, const T* b, std::int64_t dim) {
  Vec sum = {};
  for (std::int64_t d = 0; d < dim; d += kLanes) sum = fma(widen(a + d), widen(b + d), sum);
  return total(sum);
}

// The exact log mass of the first `tokens` tokens of a page; scores: room for them.
template <class T>
float exact_mass(const PagesCall& call, const T* query, const T* keys, int tokens, float* scores) {
  const int padded = (tokens + kLanes - 1) / kLanes * kLanes;
  for (int token = 0; token < padded; ++token)
    scores[token] = token < tokens
                        ? dot(query, keys + token * call.k_strides[2], call.dim) * (call.scale * kLog2E)
                        : kNothing;
  Vec tops = load(scores), sum = {};
  for (int token = kLanes; token < padded; token += kLanes) tops = maximum(tops, load(scores + token));
  const float top = highest(tops), base = top == kNothing ? 0.0f : top;
  for (int token = 0; token < padded; token += kLanes) sum = sum + exp2(load(scores + token) - splat(base));
  return base * kLn2 + std::log(total(sum));
}

// Writes the pages of a run that are not full: the row's own one and nothing after it.
template <class T>
void write_open(const PagesCall& call, const PageRun& run) {
  static thread_local Buffer memory;
  const std::int64_t group = call.heads / call.kv_heads, head = run.kv_head * group;
  for (std::int64_t g = 0; g < group; ++g) {
    float* masses = masses_of(call, run.row, head + g);
    std::fill(masses + run.full_stop(), masses + run.stop, kNothing);
  }
  if (run.own < run.first || run.own >= run.stop) return;
  const T* keys = static_cast<const T*>(call.k) + run.kv_head * call.k_strides[1] +
                  own_frame(call, run.row, run.kv_head) * call.k_strides[0];
  float* scores = memory.floats(call.page_size + kLanes);
  const int tokens = static_cast<int>(call.positions[run.row] % call.page_size) + 1;
  for (std::int64_t g = 0; g < group; ++g)
    masses_of(call, run.row, head + g)[run.own] =
        exact_mass(call, query_of<T>(call, run.row, head + g), keys, tokens, scores);
}

}  // namespace keysift::KEYSIFT_ISA
