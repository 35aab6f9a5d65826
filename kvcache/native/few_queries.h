// Decode: a few query rows; bound by memory, so pages are read once, in place, and the next tile is fetched meanwhile.
#pragma once

namespace keysift::KEYSIFT_ISA {

// scores[v, token] = scale * (queries[v] . keys[token]); fetches the tile that comes after.
template <class Math, int N>
KEYSIFT_INLINE void score_in_place(const typename Math::Element* const* queries,
                                   const KeyTile<typename Math::Element>& tile,
                                   const KeyTile<typename Math::Element>& later, int dim, float scale, int columns,
                                   float* scores) {
  for (int token = 0; token < columns; token += 4) {
    for (int i = 0; i < 4; ++i) prefetch(later.keys[token + i], dim);
    dots<Math, N, 4>(queries, tile.keys + token, dim, scores + token, kTile);
  }
  for (int v = 0; v < N; ++v)
    for (int c = 0; c < columns; c += kLanes)
      store(scores + v * kTile + c, load(scores + v * kTile + c) * splat(scale));
}

// sums[v] = shrink[v] * sums[v] + weights[v] . values
template <class Math, int N>
KEYSIFT_INLINE void add_in_place(const float* weights, const float* shrink, const KeyTile<typename Math::Element>& tile,
                                 int dim, int columns, const Rows& rows, int row) {
  constexpr int kPair = Math::kPair;
  for (int channel = 0; channel < dim; channel += kLanes * kPair) {
    Vec held[N][kPair], values[kPair];
    float* sums = rows.sums + std::int64_t{row} * rows.stride + channel;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v)
#pragma GCC unroll 2
      for (int i = 0; i < kPair; ++i) held[v][i] = load(sums + v * rows.stride + i * kLanes) * splat(shrink[v]);
    for (int token = 0; token < columns; token += kPair) {
      Math::zip(tile.values + token, channel, values);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v)
#pragma GCC unroll 2
        for (int i = 0; i < kPair; ++i)
          held[v][i] = Math::multiply_add(splat(weights[v * kTile + token / kPair]), values[i], held[v][i]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v)
#pragma GCC unroll 2
      for (int i = 0; i < kPair; ++i) store(sums + v * rows.stride + i * kLanes, held[v][i]);
  }
}

template <class Math>
void attend_tile(const KeyTile<typename Math::Element>& tile, const KeyTile<typename Math::Element>& later,
                 const Rows& rows, const Sight& sight, float scale, const typename Math::Element* const* queries) {
  const int vectors = (tile.count + kLanes - 1) / kLanes, columns = vectors * kLanes;
  alignas(64) float scores[kFew * kTile], weights[kFew * kTile], shrink[kFew + kLanes];
  by_few(rows.count, [&](int row, auto number) KEYSIFT_LAMBDA_INLINE {
    constexpr int kNumber = number();
    score_in_place<Math, kNumber>(queries + row, tile, later, rows.dim, scale, columns, scores);
    mask<kNumber>(scores, tile, rows, row, sight, vectors);
    weigh<Math, kNumber>(scores, weights, shrink, rows, row, vectors);
    add_in_place<Math, kNumber>(weights, shrink, tile, rows.dim, columns, rows, row);
  });
}

template <class Math>
void attend_few(const AttentionCall& call, const Plan& plan, const Partials& partials, const Task& task) {
  using T = typename Math::Element;
  static thread_local Buffer memory;
  const int heads = plan.heads_per_list(call), count = task.queries * heads;
  const Rows rows = start_rows(memory, count, count, heads, static_cast<int>(call.dim), partials.stride - kLanes);
  const Sight sight = sight_of(call, task);
  const T* queries[kFewQueries];
  for (int row = 0; row < count; ++row) queries[row] = query_of<T>(call, task, rows, row);
  KeyTile<T> tiles[2];
  KeyWalk<T> walk(call, task);
  bool more = walk.next(tiles[0]);
  for (int i = 0; more; i ^= 1) {
    more = walk.next(tiles[i ^ 1]);
    for (int token = 0; token < tiles[i ^ 1].count; ++token) prefetch(tiles[i ^ 1].values[token], rows.dim);
    attend_tile<Math>(tiles[i], tiles[i ^ 1], rows, sight, call.scale * kLog2E, queries);
  }
  finish<T>(call, plan, partials, task, rows);
}

}  // namespace keysift::KEYSIFT_ISA
