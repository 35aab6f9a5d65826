// Search of inverted lists: each query head scans the lists whose centroids score best with it, and every key that no
// list covers yet.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kBins = 512;
constexpr int kMaxGroup = 32;  // query heads of a KV head: one bit each

struct Descending {
  bool operator()(float a, float b) const { return a > b; }
};

// The least score among the `keep` best, and how many that equal it are among them. Scores of -inf never are.
struct Cut {
  float least;
  int equal;
};

// The bin of a score: never lower than that of a lower score.
struct Binning {
  float low, width;

  int operator()(float score) const {
    const float place = (score - low) * width;
    return place > 0.0f ? static_cast<int>(std::min(place, kBins - 1.0f)) : 0;  // a NaN, too: inf - low, times 0
  }
};

inline Cut find_cut(const float* scores, int count, int keep, float* scratch) {
  int finite = 0;
  float low = -kNothing, high = kNothing;
  for (int i = 0; i < count; ++i) {
    if (!(scores[i] > kNothing)) continue;  // nor a NaN
    scratch[finite++] = scores[i];
    low = std::min(low, scores[i]);
    high = std::max(high, scores[i]);
  }
  if (finite <= keep) return {kNothing, 0};
  const Binning bin{low, high - low < 3e38f && high > low ? (kBins - 1) / (high - low) : 0.0f};
  int sizes[kBins] = {}, above = 0, edge = kBins - 1, inside = 0;
  for (int i = 0; i < finite; ++i) ++sizes[bin(scratch[i])];
  while (above + sizes[edge] < keep) above += sizes[edge--];
  for (int i = 0; i < finite; ++i)
    if (bin(scratch[i]) == edge) scratch[inside++] = scratch[i];
  std::nth_element(scratch, scratch + (keep - above - 1), scratch + inside, Descending());
  const float least = scratch[keep - above - 1];
  for (int i = 0; i < inside; ++i) above += scratch[i] > least;
  return {least, keep - above};
}

// Keys that a query head has scanned.
struct Finds {
  float* scores;            // not scaled yet
  std::int32_t* positions;  // in no order
  int count;
};

// One row and KV head.
template <class T>
struct ProbeTask {
  ProbeTask(const ProbeCall& call, std::int64_t task)
      : call(call), row(task / call.kv_heads), head(task % call.kv_heads), group(call.heads / call.kv_heads) {
    position = call.positions[row];
    size = static_cast<std::uint32_t>(call.page_size);
    segments = static_cast<int>(std::min(position / call.page_size * call.page_size / call.segment, call.width));
    places = call.places + row * call.places_strides[0];
    frames = call.frames + row * call.frames_strides[0] + head * call.frames_strides[1];
    for (int g = 0; g < group; ++g)
      queries[g] = static_cast<const T*>(call.q) + row * call.q_strides[0] + (head * group + g) * call.q_strides[1];
  }

  const T* key(std::int32_t token) const {
    const std::uint32_t page = static_cast<std::uint32_t>(token) / size, offset = token - page * size;
    return static_cast<const T*>(call.k) + frames[page * call.frames_strides[2]] * call.k_strides[0] +
           head * call.k_strides[1] + offset * call.k_strides[2];
  }
  const std::int32_t* ends(int segment) const { return call.ends[places[segment]] + head * call.lists; }
  const std::int16_t* tokens(int segment) const { return call.tokens[places[segment]] + head * call.segment; }
  int lists() const { return segments * static_cast<int>(call.lists); }
  std::int64_t out(int g) const { return row * call.heads + head * group + g; }

  const ProbeCall& call;
  std::int64_t row, head;
  int group, segments;
  std::int32_t position;
  std::uint32_t size;  // of a page
  const std::int32_t *places, *frames;
  const T* queries[kMaxGroup];
};

// scores[g, list] of the centroids; -inf for a list without keys.
template <class Math>
void score_lists(const ProbeTask<typename Math::Element>& task, float* scores) {
  using T = typename Math::Element;
  const int lists = static_cast<int>(task.call.lists), stride = task.lists();
  for (int segment = 0; segment < task.segments; ++segment) {
    const T* centroids = static_cast<const T*>(task.call.centroids[task.places[segment]]) +
                         task.head * lists * task.call.dim;
    for (int list = 0; list < lists; list += 4) {
      const T* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = centroids + (list + i) * task.call.dim;
      by_few(task.group, [&](int g, auto number) KEYSIFT_LAMBDA_INLINE {
        dots<Math, number(), 4>(task.queries + g, rows, task.call.dim,
                                scores + std::int64_t{g} * stride + segment * lists + list, stride);
      });
    }
    const std::int32_t* ends = task.ends(segment);
    for (int list = 0; list < lists; ++list)
      if (ends[list] == (list > 0 ? ends[list - 1] : 0))
        for (int g = 0; g < task.group; ++g) scores[std::int64_t{g} * stride + segment * lists + list] = kNothing;
  }
}

// Which heads scan each list, as bits: of equal scores the lower list comes first.
template <class T>
void choose_lists(const ProbeTask<T>& task, const float* scores, float* scratch, std::uint32_t* heads) {
  const int lists = task.lists();
  std::fill_n(heads, lists, 0u);
  for (int g = 0; g < task.group; ++g, scores += lists) {
    Cut cut = find_cut(scores, lists, static_cast<int>(task.call.probes), scratch);
    for (int list = 0; list < lists; ++list)
      if (scores[list] > cut.least || (scores[list] == cut.least && cut.equal-- > 0)) heads[list] |= 1u << g;
  }
}

// Gathers keys that the same heads scan, fetching them meanwhile, and scores them a tile at a time.
template <class Math>
class ListScan {
 public:
  using T = typename Math::Element;

  ListScan(const ProbeTask<T>& task, Finds* finds) : task_(task), finds_(finds) {}

  void begin(std::uint32_t heads) {
    if (heads == heads_) return;
    flush();
    heads_ = heads;
    number_ = 0;
    for (int g = 0; g < task_.group; ++g)
      if (heads >> g & 1) members_[number_] = g, queries_[number_++] = task_.queries[g];
  }
  void add(std::int32_t token) {
    rows_[count_] = task_.key(token);
    prefetch(rows_[count_], static_cast<int>(task_.call.dim));
    positions_[count_++] = token;
    if (count_ == kTile) flush();
  }
  void flush() {
    for (int i = count_; i % 4 != 0; ++i) rows_[i] = rows_[count_ - 1];
    by_few(count_ > 0 ? number_ : 0, [&](int first, auto number) KEYSIFT_LAMBDA_INLINE {
      constexpr int kNumber = number();
      alignas(64) float scores[kNumber * kTile];
      for (int i = 0; i < count_; i += 4)
        dots<Math, kNumber, 4>(queries_ + first, rows_ + i, task_.call.dim, scores + i, kTile);
      for (int v = 0; v < kNumber; ++v) append(finds_[members_[first + v]], scores + v * kTile);
    });
    count_ = 0;
  }

 private:
  void append(Finds& finds, const float* scores) {
    std::copy_n(scores, count_, finds.scores + finds.count);
    std::copy_n(positions_, count_, finds.positions + finds.count);
    finds.count += count_;
  }

  const ProbeTask<T>& task_;
  Finds* finds_;
  std::uint32_t heads_ = 0;
  int number_ = 0, count_ = 0;
  int members_[kMaxGroup];
  const T* queries_[kMaxGroup];
  const T* rows_[kTile];
  std::int32_t positions_[kTile];
};

// Calls work(segment, list, first, end) for each list that some head scans.
template <class T, class Work>
void each_list(const ProbeTask<T>& task, const std::uint32_t* heads, const Work& work) {
  for (int segment = 0; segment < task.segments; ++segment) {
    const std::int32_t* ends = task.ends(segment);
    for (int list = 0; list < task.call.lists; ++list, ++heads)
      if (*heads != 0) work(segment, *heads, list > 0 ? ends[list - 1] : 0, ends[list]);
  }
}

// Memory for all keys that each head will scan.
template <class T>
void make_finds(const ProbeTask<T>& task, const std::uint32_t* heads, Buffer& memory, Finds* finds) {
  const int tail = task.position + 1 - task.segments * static_cast<int>(task.call.segment);
  std::size_t sizes[kMaxGroup], all = 0;
  std::fill_n(sizes, task.group, tail + kLanes);
  each_list(task, heads, [&](int, std::uint32_t members, int first, int end) {
    for (int g = 0; g < task.group; ++g) sizes[g] += members >> g & 1 ? end - first : 0;
  });
  for (int g = 0; g < task.group; ++g) all += sizes[g];
  float* data = memory.floats(2 * all);
  for (int g = 0; g < task.group; data += 2 * sizes[g++])
    finds[g] = {data, reinterpret_cast<std::int32_t*>(data + sizes[g]), 0};
}

template <class Math>
void scan(const ProbeTask<typename Math::Element>& task, const std::uint32_t* heads, Finds* finds) {
  const auto length = static_cast<std::int32_t>(task.call.segment);
  ListScan<Math> scan(task, finds);
  each_list(task, heads, [&](int segment, std::uint32_t members, int first, int end) {
    const std::int16_t* tokens = task.tokens(segment);
    scan.begin(members);
    for (int i = first; i < end; ++i) scan.add(segment * length + tokens[i]);
  });
  scan.begin(~0u >> (kMaxGroup - task.group));
  for (std::int32_t token = task.segments * length; token <= task.position; ++token) scan.add(token);
  scan.flush();
}

// Writes the log mass of the scanned keys of each page.
inline void write_masses(const ProbeCall& call, std::int64_t out, const Finds& finds, Buffer& memory) {
  float* masses = call.masses + out * call.pages;
  float* sums = memory.floats(call.pages);
  const auto size = static_cast<std::uint32_t>(call.page_size);
  float top = kNothing;
  for (int i = 0; i < finds.count; ++i) top = std::max(top, finds.scores[i]);
  std::fill_n(sums, call.pages, 0.0f);
  for (int i = 0; i < finds.count; i += kLanes)
    store(finds.scores + i, exp2((load(finds.scores + i) - splat(top)) * splat(call.scale * kLog2E)));
  for (int i = 0; i < finds.count; ++i) sums[static_cast<std::uint32_t>(finds.positions[i]) / size] += finds.scores[i];
  for (std::int64_t page = 0; page < call.pages; ++page)
    masses[page] = sums[page] > 0.0f ? std::log(sums[page]) + top * call.scale : kNothing;
}

struct ProbeMemory {
  Buffer lists, finds, out;
};

template <class Math>
void probe_one(const ProbeTask<typename Math::Element>& task, ProbeMemory& memory) {
  const std::size_t lists = task.lists();
  float* scores = memory.lists.floats((task.group + 2) * lists);
  float* scratch = scores + task.group * lists;
  auto* heads = reinterpret_cast<std::uint32_t*>(scratch + lists);
  Finds finds[kMaxGroup];
  score_lists<Math>(task, scores);
  choose_lists(task, scores, scratch, heads);
  make_finds(task, heads, memory.finds, finds);
  scan<Math>(task, heads, finds);
  for (int g = 0; g < task.group; ++g) write_masses(task.call, task.out(g), finds[g], memory.out);
}

template <class Math>
void probe_of(const ProbeCall& call, int threads) {
  for_each_task(call.rows * call.kv_heads, threads, [&](std::int64_t i) {
    static thread_local ProbeMemory memory;
    probe_one<Math>(ProbeTask<typename Math::Element>(call, i), memory);
  });
}

}  // namespace keysift::KEYSIFT_ISA
