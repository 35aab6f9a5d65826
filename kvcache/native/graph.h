// A best-first walk through a graph of keys, by inner product. Keys are read where they lie, through the page table.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kScoredAtOnce = 64;

// One KV head's keys of one sequence.
template <class T>
struct SequenceKeys {
  const T* keys;
  const std::int32_t* frames;
  std::int64_t frame_stride, token_stride, table_stride;
  std::uint32_t page_size;

  const T* at(std::int32_t token) const {
    const std::uint32_t page = static_cast<std::uint32_t>(token) / page_size;
    return keys + frames[page * table_stride] * frame_stride + (token - page * page_size) * token_stride;
  }
};

// scores[v * stride + i] = scale * (queries[v] . key of token tokens[i])
template <class Math>
void score_tokens(const SequenceKeys<typename Math::Element>& keys, const typename Math::Element* const* queries,
                  int heads, const std::int32_t* tokens, int count, int dim, float scale, float* scores, int stride) {
  using T = typename Math::Element;
  const T* rows[kScoredAtOnce + 3];
  for (int i = 0; i < count; ++i) prefetch(rows[i] = keys.at(tokens[i]), dim);
  for (int i = count; i % 4 != 0; ++i) rows[i] = rows[count - 1];
  by_few(heads, [&](int head, auto number) {
    alignas(64) float out[number() * 4];
    for (int i = 0; i < count; i += 4) {
      dots<Math, number(), 4>(queries + head, rows + i, dim, out, 4);
      for (int v = 0; v < number(); ++v)
        for (int j = 0; j < 4 && i + j < count; ++j) scores[(head + v) * stride + i + j] = out[v * 4 + j] * scale;
    }
  });
}

// The best tokens so far, the best first, of equal ones the lower; the first that has not been expanded yet.
class Beam {
 public:
  Beam(ScoredToken* items, int capacity) : items_(items), capacity_(capacity) {}

  void offer(float score, std::int32_t token) {
    const ScoredToken item{score, token, false};
    if (count_ == capacity_ && !before(item, items_[count_ - 1])) return;
    const int place = static_cast<int>(std::upper_bound(items_, items_ + count_, item, before) - items_);
    count_ = std::min(count_ + 1, capacity_);
    std::copy_backward(items_ + place, items_ + count_ - 1, items_ + count_);
    items_[place] = item;
    next_ = std::min(next_, place);
  }

  // The best token that is not expanded yet; -1: none.
  std::int32_t take() {
    while (next_ < count_ && items_[next_].expanded) ++next_;
    if (next_ == count_) return -1;
    items_[next_].expanded = true;
    return items_[next_].token;
  }

  int count() const { return count_; }

 private:
  ScoredToken* items_;
  int capacity_, count_ = 0, next_ = 0;
};

// Token ranges of the search of one row and KV head.
struct SearchRange {
  std::int32_t first;     // tokens before it are scanned
  std::int32_t graph;     // the walk stays below it
  std::int32_t tail;      // tokens from here on are scanned
  std::int32_t window;    // tokens from here on are no hits
  std::int32_t position;  // the query's own

  int scanned() const { return std::min(first, position + 1) + std::max(position + 1 - std::max(tail, first), 0); }
};

inline SearchRange search_range(const GraphSearchCall& call, std::int64_t row) {
  const auto size = static_cast<std::int32_t>(call.page_size);
  const std::int32_t position = call.positions[row];
  const auto first = static_cast<std::int32_t>((call.sink + size - 1) / size * size);
  const auto since = static_cast<std::int32_t>(std::max<std::int64_t>(position - call.window + 1, 0) / size * size);
  const std::int32_t window = std::max(since, first), graph = std::min(call.ends[row], window);
  return {first, graph, std::max(graph, first), window, position};
}

// Marks of the tokens that a walk has met.
class Marks {
 public:
  Marks(float* words, std::int32_t tokens) : words_(reinterpret_cast<std::uint32_t*>(words)) {
    std::fill_n(words_, tokens / 32 + 1, 0u);
  }
  bool first_time(std::int32_t token) {
    const std::uint32_t bit = 1u << (token % 32);
    const bool fresh = !(words_[token / 32] & bit);
    words_[token / 32] |= bit;
    return fresh;
  }

 private:
  std::uint32_t* words_;
};

// Walks from the entries; returns how many keys it multiplied. Hubs, which many queries want, are scored but would only
// crowd the beam.
template <class Math>
int walk_graph(const GraphSearchCall& call, const SequenceKeys<typename Math::Element>& keys, std::int64_t row,
               std::int64_t kv_head, const typename Math::Element* query, const SearchRange& range, Marks marks,
               Beam& beam, Beam& hubs) {
  std::int32_t fresh[kScoredAtOnce];
  float scores[kScoredAtOnce];
  const std::int64_t number = call.hubs[row] + call.entries[row];
  const std::int32_t* points = call.points[row] + kv_head * number;
  const std::int32_t* links = call.links[row] + kv_head * call.ends[row] * call.degree;
  int count = 0, total = 0;
  Beam* to = &hubs;
  auto score = [&] {
    if (count == 0) return;
    score_tokens<Math>(keys, &query, 1, fresh, count, static_cast<int>(call.dim), call.scale, scores, 0);
    for (int i = 0; i < count; ++i) to->offer(scores[i], fresh[i]);
    total += count;
    count = 0;
  };
  auto meet = [&](std::int32_t token) {
    if (token < range.first || token >= range.graph || !marks.first_time(token)) return;
    fresh[count++] = token;
    if (count == kScoredAtOnce) score();
  };
  for (int i = 0; i < call.hubs[row]; ++i) meet(points[i]);
  score();
  to = &beam;
  for (std::int64_t i = call.hubs[row]; i < number; ++i) meet(points[i]);
  score();
  for (std::int32_t token; (token = beam.take()) >= 0;) {
    meet(token - 1);
    meet(token + 1);
    const std::int32_t* of_token = links + std::int64_t{token} * call.degree;
    for (int i = 0; i < call.degree && of_token[i] >= 0; ++i) meet(of_token[i]);
    score();
  }
  return total;
}

// Scores the tokens outside of the walk: [heads, range.scanned()].
template <class Math>
void scan_rest(const GraphSearchCall& call, const SequenceKeys<typename Math::Element>& keys,
               const typename Math::Element* const* queries, int heads, const SearchRange& range, float* scores) {
  std::int32_t tokens[kScoredAtOnce];
  const int total = range.scanned(), low = std::min(range.first, range.position + 1);
  for (int done = 0; done < total;) {
    const int count = std::min(kScoredAtOnce, total - done);
    for (int i = 0; i < count; ++i) tokens[i] = done + i < low ? done + i : range.tail + done + i - low;
    score_tokens<Math>(keys, queries, heads, tokens, count, static_cast<int>(call.dim), call.scale, scores + done,
                       total);
    done += count;
  }
}

// Adds tokens' weights, and takes the logarithm of what each page got.
inline void add_masses(const ScoredToken* hits, int count, const SearchRange& range, const float* scores,
                       std::uint32_t page_size, std::int64_t pages, float* masses) {
  const int total = range.scanned(), low = std::min(range.first, range.position + 1);
  float top = count > 0 ? hits[0].score : kNothing;
  for (int i = 0; i < total; ++i) top = std::max(top, scores[i]);
  std::fill_n(masses, pages, 0.0f);
  for (int i = 0; i < total; ++i)
    masses[(i < low ? i : range.tail + i - low) / page_size] += std::exp(scores[i] - top);
  for (int i = 0; i < count; ++i)
    if (hits[i].token < range.tail) masses[hits[i].token / page_size] += std::exp(hits[i].score - top);
  for (std::int64_t i = 0; i < pages; ++i) masses[i] = masses[i] > 0.0f ? std::log(masses[i]) + top : kNothing;
}

inline void write_hits(const GraphSearchCall& call, std::int64_t index, const ScoredToken* hits, int count) {
  for (int i = 0; i < call.top_k; ++i) {
    call.keys[index * call.top_k + i] = i < count ? hits[i].token : -1;
    call.scores[index * call.top_k + i] = i < count ? hits[i].score : kNothing;
  }
}

struct SearchMemory {
  Buffer beam, hits, scores, marks;
};

template <class Math>
void search_head(const GraphSearchCall& call, const SequenceKeys<typename Math::Element>& keys, std::int64_t row,
                 std::int64_t kv_head, int head, const typename Math::Element* query, const SearchRange& range,
                 const float* scanned, SearchMemory& memory) {
  const int capacity = static_cast<int>(call.beam), wanted = static_cast<int>(call.top_k);
  const std::int32_t tail = std::max(range.window - range.tail, 0);  // scanned tokens that are no window
  auto* items = reinterpret_cast<ScoredToken*>(memory.beam.floats(std::size_t(capacity) * sizeof(ScoredToken) / 4));
  auto* hits = reinterpret_cast<ScoredToken*>(memory.hits.floats(std::size_t(wanted) * sizeof(ScoredToken) / 4));
  int total = range.scanned();
  Beam beam(items, capacity), best(hits, wanted);
  if (range.graph > range.first)
    total += walk_graph<Math>(call, keys, row, kv_head, query, range,
                              Marks(memory.marks.floats(range.graph / 32 + 1), range.graph), beam, best);
  const int low = std::min(range.first, range.position + 1);
  for (int i = 0; i < tail && range.tail + i <= range.position; ++i) best.offer(scanned[low + i], range.tail + i);
  for (int i = 0; i < beam.count(); ++i) best.offer(items[i].score, items[i].token);
  const std::int64_t index = row * call.heads + kv_head * (call.heads / call.kv_heads) + head;
  write_hits(call, index, hits, best.count());
  call.scanned[index] = total;
  add_masses(hits, best.count(), range, scanned, static_cast<std::uint32_t>(call.page_size), call.pages,
             call.masses + index * call.pages);
}

template <class Math>
void graph_search_of(const GraphSearchCall& call, int threads) {
  using T = typename Math::Element;
  const int group = static_cast<int>(call.heads / call.kv_heads);
  for_each_task(call.rows * call.kv_heads, threads, [&](std::int64_t task) {
    static thread_local SearchMemory memory;
    const std::int64_t row = task / call.kv_heads, kv_head = task % call.kv_heads;
    const SequenceKeys<T> keys{static_cast<const T*>(call.k) + kv_head * call.k_strides[1],
                               call.frames + row * call.frames_strides[0] + kv_head * call.frames_strides[1],
                               call.k_strides[0], call.k_strides[2], call.frames_strides[2],
                               static_cast<std::uint32_t>(call.page_size)};
    const SearchRange range = search_range(call, row);
    const T* queries[kMaxWalks];
    for (int head = 0; head < group; ++head)
      queries[head] = static_cast<const T*>(call.q) + row * call.q_strides[0] +
                      (kv_head * group + head) * call.q_strides[1];
    float* scores = memory.scores.floats(std::size_t(group) * range.scanned());
    scan_rest<Math>(call, keys, queries, group, range, scores);
    for (int head = 0; head < group; ++head)
      search_head<Math>(call, keys, row, kv_head, head, queries[head], range,
                        scores + std::int64_t{head} * range.scanned(), memory);
  });
}

// Keeps the best tokens of one query; of equal ones the lower, as long as they come in ascending order.
class Nearest {
 public:
  Nearest(ScoredToken* items, int wanted) : items_(items), wanted_(wanted) {}

  void offer(float score, std::int32_t token) {
    if (!(score > threshold_)) return;
    items_[count_++] = {score, token, false};
    if (count_ == 2 * wanted_) shrink();
  }
  void write(std::int32_t* tokens) {
    std::sort(items_, items_ + count_, before);
    for (int i = 0; i < wanted_; ++i) tokens[i] = i < count_ ? items_[i].token : -1;
  }

 private:
  void shrink() {
    std::nth_element(items_, items_ + wanted_ - 1, items_ + count_, before);
    count_ = wanted_;
    threshold_ = items_[wanted_ - 1].score;
  }

  ScoredToken* items_;
  int wanted_, count_ = 0;
  float threshold_ = kNothing;
};

constexpr int kQueriesOfTask = 64;

// The exactly nearest tokens of training queries; a tile of keys is read once for all queries of a task.
template <class Math>
void graph_nearest_of(const GraphNearestCall& call, int threads) {
  using T = typename Math::Element;
  const std::int64_t blocks = (call.queries + kQueriesOfTask - 1) / kQueriesOfTask;
  for_each_task(blocks * call.kv_heads, threads, [&](std::int64_t task) {
    static thread_local Buffer memory;
    const std::int64_t kv_head = task / blocks, first = task % blocks * kQueriesOfTask;
    const int count = static_cast<int>(std::min<std::int64_t>(kQueriesOfTask, call.queries - first));
    const SequenceKeys<T> keys{static_cast<const T*>(call.k) + kv_head * call.k_strides[1], call.frames,
                               call.k_strides[0], call.k_strides[2], 1, static_cast<std::uint32_t>(call.page_size)};
    const std::int64_t query = kv_head * call.queries + first, room = 2 * call.wanted;
    auto* items = reinterpret_cast<ScoredToken*>(memory.floats(count * room * sizeof(ScoredToken) / 4));
    std::vector<Nearest> nearest;
    const T* queries[kQueriesOfTask];
    for (int i = 0; i < count; ++i) {
      nearest.emplace_back(items + i * room, static_cast<int>(call.wanted));
      queries[i] = static_cast<const T*>(call.q) + (query + i) * call.dim;
    }
    alignas(64) float scores[kQueriesOfTask * kScoredAtOnce];
    std::int32_t tokens[kScoredAtOnce];
    for (auto token = call.first; token < call.end; token += kScoredAtOnce) {
      const int here = static_cast<int>(std::min<std::int64_t>(kScoredAtOnce, call.end - token));
      for (int i = 0; i < here; ++i) tokens[i] = static_cast<std::int32_t>(token + i);
      score_tokens<Math>(keys, queries, count, tokens, here, static_cast<int>(call.dim), 1.0f, scores, kScoredAtOnce);
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < here; ++j) nearest[i].offer(scores[i * kScoredAtOnce + j], tokens[j]);
    }
    for (int i = 0; i < count; ++i) nearest[i].write(call.nearest + (query + i) * call.wanted);
  });
}

inline void graph_search(const GraphSearchCall& call, int threads) {
  switch (call.type) {
    case kFloat32:
      return graph_search_of<Single<float>>(call, threads);
    case kBFloat16:
      return graph_search_of<Single<bfloat16>>(call, threads);
    case kFloat16:
      return graph_search_of<Single<float16>>(call, threads);
  }
}

inline void graph_nearest(const GraphNearestCall& call, int threads) {
  switch (call.type) {
    case kFloat32:
      return graph_nearest_of<Single<float>>(call, threads);
    case kBFloat16:
      return graph_nearest_of<Single<bfloat16>>(call, threads);
    case kFloat16:
      return graph_nearest_of<Single<float16>>(call, threads);
  }
}

}  // namespace keysift::KEYSIFT_ISA
