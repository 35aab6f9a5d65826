// Online softmax of query rows, in base 2, and the way of its result to the caller.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;

// Running state of a task's query rows; row = query * heads of the list + head.
struct Rows {
  int count, padded;       // padded: rows that have memory
  int heads, dim, stride;  // stride: floats from one row of sums to the next
  float* sums;             // [padded, stride] weighted values
  float* tops;             // [padded] greatest score so far, times log2(e)
  float* masses;           // [padded, kLanes] weights so far, lane by lane
};

inline Rows start_rows(Buffer& memory, int count, int padded, int heads, int dim, int stride) {
  float* data = memory.floats(static_cast<std::size_t>(padded) * (stride + kLanes + 1));
  Rows rows{count, padded, heads, dim, stride, data, data + padded * (stride + kLanes), data + padded * stride};
  std::fill(data, rows.tops, 0.0f);
  std::fill(rows.tops, rows.tops + padded, kNothing);
  return rows;
}

// Token ranges that the positions of a task allow; the queries of `rows` stand at start + row / heads.
struct Sight {
  std::int32_t start, queries, window;

  std::int32_t position(const Rows& rows, int row) const { return start + std::min(row / rows.heads, queries - 1); }
  std::int32_t before(std::int32_t position) const {
    return window > 0 ? std::max(position - window, kTooOld) : kTooOld;
  }
};

inline Sight sight_of(const AttentionCall& call, const Task& task) {
  return {call.starts[task.row] + task.query, task.queries,
          static_cast<std::int32_t>(std::min<std::int64_t>(call.window, INT32_MAX))};
}

// Hides what rows [row, row + N) may not see from their scores [N, kTile].
template <int N, class T>
KEYSIFT_INLINE void mask(float* scores, const KeyTile<T>& tile, const Rows& rows, int row, const Sight& sight,
                         int vectors) {
  const std::int32_t low = sight.position(rows, row), high = sight.position(rows, row + N - 1);
  if (!tile.gaps && tile.last <= low && tile.first > sight.before(high)) return;
  for (int r = 0; r < N; ++r) {
    const std::int32_t position = sight.position(rows, row + r);
    for (int c = 0; c < vectors * kLanes; c += kLanes)
      store(scores + r * kTile + c,
            only_between(load(scores + r * kTile + c), tile.positions + c, sight.before(position), position));
  }
}

// Turns scores [N, kTile] into weights, as cells, and gives the factor by which the sums so far shrink.
template <class Math, int N>
KEYSIFT_INLINE void weigh(float* scores, float* weights, float* shrink, const Rows& rows, int row, int vectors) {
  constexpr int kPadded = (N + kLanes - 1) / kLanes * kLanes;
  alignas(64) float bases[kPadded] = {}, drops[kPadded] = {};
  for (int r = 0; r < N; ++r) {
    Vec top = load(scores + r * kTile);
    for (int c = 1; c < vectors; ++c) top = maximum(top, load(scores + r * kTile + c * kLanes));
    const float before = rows.tops[row + r], now = std::max(before, highest(top));
    rows.tops[row + r] = now;
    bases[r] = now == kNothing ? 0.0f : now;  // -inf - -inf would be NaN
    drops[r] = before - bases[r];
  }
  for (int r = 0; r < N; r += kLanes) store(shrink + r, exp2(load(drops + r)));
  for (int r = 0; r < N; ++r) {
    float* masses = rows.masses + (row + r) * kLanes;
    Vec mass = load(masses) * splat(shrink[r]);
    for (int c = 0; c < vectors; ++c) {
      const Vec weight = exp2(load(scores + r * kTile + c * kLanes) - splat(bases[r]));
      mass = mass + weight;
      Math::store_weights(weights + r * kTile, c, weight);
    }
    store(masses, mass);
  }
}

// Place of a query row in the caller's tensors.
struct Place {
  std::int64_t token, head;
};

inline Place place_of(const AttentionCall& call, const Task& task, const Rows& rows, int row) {
  const int query = row / rows.heads;
  return {task.row * call.queries_per_row + task.query + query,
          std::int64_t{task.list} * rows.heads + row - query * rows.heads};
}

template <class T>
const T* query_of(const AttentionCall& call, const Task& task, const Rows& rows, int row) {
  const Place place = place_of(call, task, rows, row);
  return static_cast<const T*>(call.q) + place.token * call.q_strides[0] + place.head * call.q_strides[1];
}

// Divides a row by its mass and writes it where the caller wants it.
template <class T>
void write_row(const AttentionCall& call, Place place, float* sums, float top, float mass, int dim) {
  const std::int64_t index = place.token * call.heads + place.head;
  T* out = static_cast<T*>(call.out) + index * call.dim;
  const Vec factor = splat(mass == 0.0f ? 0.0f : 1.0f / mass);
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) narrow(load(sums + d) * factor, out + d);
  if (d < dim) {
    T rest[kLanes];
    narrow(load(sums + d) * factor, rest);
    std::copy(rest, rest + dim - d, out + d);
  }
  call.lse[index] = mass == 0.0f ? kNothing : top * kLn2 + std::log(mass);
}

template <class T>
void write_rows(const AttentionCall& call, const Task& task, const Rows& rows) {
  for (int row = 0; row < rows.count; ++row)
    write_row<T>(call, place_of(call, task, rows, row), rows.sums + std::int64_t{row} * rows.stride, rows.tops[row],
                 total(load(rows.masses + row * kLanes)), rows.dim);
}

// Results of pieces: [partials, stride]; sums, then top and mass in the last kLanes.
struct Partials {
  float* data;
  int stride;

  float* at(std::int64_t index) const { return data + index * stride; }
};

inline void keep_rows(const Partials& partials, const Task& task, const Rows& rows) {
  for (int row = 0; row < rows.count; ++row) {
    float* kept = partials.at(task.partial + std::int64_t{task.piece} * rows.count + row);
    std::copy_n(rows.sums + std::int64_t{row} * rows.stride, rows.stride, kept);
    kept[rows.stride] = rows.tops[row];
    kept[rows.stride + 1] = total(load(rows.masses + row * kLanes));
  }
}

// Adds up all pieces of a row by their log-sum-exp, in their order, whichever finished last.
inline void merge_pieces(const Partials& partials, const Task& task, const Rows& rows, int row) {
  float* sums = rows.sums + std::int64_t{row} * rows.stride;
  float* masses = rows.masses + row * kLanes;
  float top = kNothing;
  auto piece = [&](int i) { return partials.at(task.partial + std::int64_t{i} * rows.count + row); };
  for (int i = 0; i < task.pieces; ++i) top = std::max(top, piece(i)[rows.stride]);
  std::fill_n(sums, rows.stride, 0.0f);
  std::fill_n(masses, kLanes, 0.0f);
  rows.tops[row] = top;
  for (int i = 0; i < task.pieces && top != kNothing; ++i) {
    const float* part = piece(i);
    const float share = std::exp2(part[rows.stride] - top);
    masses[0] += share * part[rows.stride + 1];
    for (int d = 0; d < rows.stride; d += kLanes) store(sums + d, fma(splat(share), load(part + d), load(sums + d)));
  }
}

// Writes the rows, or keeps them until the last piece of their group comes.
template <class T>
void finish(const AttentionCall& call, const Plan& plan, const Partials& partials, const Task& task, const Rows& rows) {
  if (task.pieces > 1) {
    keep_rows(partials, task, rows);
    if (plan.missing[task.group].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int row = 0; row < rows.count; ++row) merge_pieces(partials, task, rows, row);
  }
  write_rows<T>(call, task, rows);
}

}  // namespace keysift::KEYSIFT_ISA
