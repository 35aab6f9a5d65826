// Prefill: tiles of keys and values are packed once and multiplied with all query rows of the task.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kRowBlock = 6;  // query rows of a register tile

// sums[r][c] += cells a[r, i] x columns b[i, c] over i < depth; element (r, i) of a lies at r * RowStep + i * Step.
template <class Math, int Columns, int RowStep, int Step>
KEYSIFT_INLINE void multiply(Vec (&sums)[kRowBlock][Columns], const float* a, const float* b, std::int64_t b_stride,
                             int depth) {
  for (int i = 0; i < depth; ++i, a += Step, b += b_stride) {
    Vec columns[Columns];
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) columns[c] = load(b + c * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRowBlock; ++r) {
      const Vec cell = splat(a[r * RowStep]);
#pragma GCC unroll 4
      for (int c = 0; c < Columns; ++c) sums[r][c] = Math::multiply_add(cell, columns[c], sums[r][c]);
    }
  }
}

// scores[r, column ...] = scale * (queries . keys)
template <class Math, int Columns>
KEYSIFT_INLINE void score_columns(const float* queries, const float* keys, int depth, float scale, float* scores) {
  Vec sums[kRowBlock][Columns] = {};
  multiply<Math, Columns, 1, kRowBlock>(sums, queries, keys, kTile, depth);
#pragma GCC unroll 6
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store(scores + r * kTile + c * kLanes, sums[r][c] * splat(scale));
}

// sums[r, column ...] = shrink[r] * sums + weights . values
template <class Math, int Columns>
KEYSIFT_INLINE void add_columns(const float* weights, const float* shrink, const float* values, std::int64_t stride,
                                int depth, float* sums) {
  Vec held[kRowBlock][Columns];
#pragma GCC unroll 6
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) held[r][c] = load(sums + r * stride + c * kLanes) * splat(shrink[r]);
  multiply<Math, Columns, kTile, 1>(held, weights, values, stride, depth);
#pragma GCC unroll 6
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store(sums + r * stride + c * kLanes, held[r][c]);
}

// Calls work(first vector, number of them as a constant) until `vectors` are covered.
template <class Work>
KEYSIFT_INLINE void by_columns(int vectors, const Work& work) {
  int done = 0;
  for (; done + kColumns <= vectors; done += kColumns) work(done, std::integral_constant<int, kColumns>());
  switch (vectors - done) {
    case 3:
      return work(done, std::integral_constant<int, std::min(3, kColumns)>());
    case 2:
      return work(done, std::integral_constant<int, std::min(2, kColumns)>());
    case 1:
      return work(done, std::integral_constant<int, 1>());
  }
}

// Keys [token, channel] -> cells [channel / kPair, kTile].
template <class Math>
void pack_keys(const KeyTile<typename Math::Element>& tile, int dim, int columns, float* packed) {
  constexpr int kStep = 4 * Math::kPair;
  for (int token = 0; token < columns; token += 4)
    for (int channel = 0; channel < dim; channel += kStep) {
      Quad quads[4];
      for (int i = 0; i < 4; ++i) quads[i] = Math::four_cells(tile.keys[token + i] + channel);
      transpose(quads);
      for (int i = 0; i < 4; ++i) store_quad(packed + (channel / Math::kPair + i) * kTile + token, quads[i]);
    }
}

// Values [token, channel] -> cells [token / kPair, stride], zeros past the last channel.
template <class Math>
void pack_values(const KeyTile<typename Math::Element>& tile, int dim, int columns, std::int64_t stride,
                 float* packed) {
  using T = typename Math::Element;
  constexpr int kStep = kLanes * Math::kPair;
  Vec vectors[Math::kPair];
  for (int token = 0; token < columns; token += Math::kPair, packed += stride)
    for (int channel = 0; channel < dim; channel += kStep) {
      if (channel + kStep <= dim) {
        Math::zip(tile.values + token, channel, vectors);
      } else {
        T rest[Math::kPair][kStep] = {};
        const T* tokens[Math::kPair];
        for (int i = 0; i < Math::kPair; ++i) {
          tokens[i] = rest[i];
          std::copy_n(tile.values[token + i] + channel, dim - channel, rest[i]);
        }
        Math::zip(tokens, 0, vectors);
      }
      for (int i = 0; i < Math::kPair; ++i) store(packed + channel + i * kLanes, vectors[i]);
    }
}

// The vectors of one block of rows -> cells [channel / kPair, kRowBlock].
template <class Math>
KEYSIFT_INLINE void pack_block(const typename Math::Element* const (&queries)[kRowBlock], int cells, float* packed) {
  for (int i = 0; i < cells; i += 4, packed += 4 * kRowBlock)
    for (int first : {0, kRowBlock - 4}) {  // transposes of four rows that overlap cover all six
      Quad quads[4];
      for (int r = 0; r < 4; ++r) quads[r] = Math::four_cells(queries[first + r] + i * Math::kPair);
      transpose(quads);
      for (int j = 0; j < 4; ++j) store_quad(packed + j * kRowBlock + first, quads[j]);
    }
}

// Queries -> cells [block of rows, channel / kPair, kRowBlock]; rows that only pad repeat the last one.
template <class Math>
void pack_queries(const AttentionCall& call, const Task& task, const Rows& rows, float* packed) {
  using T = typename Math::Element;
  const int cells = rows.dim / Math::kPair;
  for (int row = 0; row < rows.padded; row += kRowBlock, packed += cells * kRowBlock) {
    const T* queries[kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) queries[r] = query_of<T>(call, task, rows, std::min(row + r, rows.count - 1));
    for (int r = 2 * kRowBlock; r < 3 * kRowBlock; ++r)
      prefetch(query_of<T>(call, task, rows, std::min(row + r, rows.count - 1)), rows.dim);
    pack_block<Math>(queries, cells, packed);
  }
}

struct ManyQueriesMemory {
  Buffer queries, keys, values, rows;
};

// The vectors of a tile's tokens that are not all too new for a query at `position`.
template <class T>
int vectors_until(const KeyTile<T>& tile, std::int32_t position) {
  int vectors = (tile.count + kLanes - 1) / kLanes;
  while (tile.positions[(vectors - 1) * kLanes] > position) --vectors;
  return vectors;
}

// One block of query rows against one packed tile.
template <class Math>
void attend_block(const KeyTile<typename Math::Element>& tile, const Rows& rows, int row, const Sight& sight,
                  float scale, const float* queries, const float* keys, const float* values) {
  const int vectors = vectors_until(tile, sight.position(rows, row + kRowBlock - 1)), depth = rows.dim / Math::kPair;
  alignas(64) float scores[kRowBlock * kTile], weights[kRowBlock * kTile], shrink[kRowBlock + kLanes];
  float* sums = rows.sums + std::int64_t{row} * rows.stride;
  by_columns(vectors, [&](int c, auto columns) KEYSIFT_LAMBDA_INLINE {
    score_columns<Math, columns()>(queries, keys + c * kLanes, depth, scale, scores + c * kLanes);
  });
  mask<kRowBlock>(scores, tile, rows, row, sight, vectors);
  weigh<Math, kRowBlock>(scores, weights, shrink, rows, row, vectors);
  by_columns(rows.stride / kLanes, [&](int c, auto columns) KEYSIFT_LAMBDA_INLINE {
    add_columns<Math, columns()>(weights, shrink, values + c * kLanes, rows.stride, vectors * kLanes / Math::kPair,
                                 sums + c * kLanes);
  });
}

template <class Math>
void attend_many(const AttentionCall& call, const Plan& plan, const Partials& partials, const Task& task) {
  using T = typename Math::Element;
  static thread_local ManyQueriesMemory memory;
  const int dim = static_cast<int>(call.dim), heads = plan.heads_per_list(call), count = task.queries * heads;
  const Rows rows = start_rows(memory.rows, count, (count + kRowBlock - 1) / kRowBlock * kRowBlock, heads, dim,
                               partials.stride - kLanes);
  const Sight sight = sight_of(call, task);
  float* queries = memory.queries.floats(rows.padded * dim / Math::kPair);
  float* keys = memory.keys.floats(kTile * dim / Math::kPair);
  float* values = memory.values.floats(kTile * rows.stride / Math::kPair);
  pack_queries<Math>(call, task, rows, queries);
  KeyTile<T> tile;
  for (KeyWalk<T> walk(call, task); walk.next(tile);) {
    const int columns = (tile.count + kLanes - 1) / kLanes * kLanes;
    pack_keys<Math>(tile, dim, columns, keys);
    pack_values<Math>(tile, dim, columns, rows.stride, values);
    for (int row = 0; row < rows.padded; row += kRowBlock)
      if (tile.first <= sight.position(rows, row + kRowBlock - 1))
        attend_block<Math>(tile, rows, row, sight, call.scale * kLog2E, queries + row * (dim / Math::kPair), keys,
                           values);
  }
  finish<T>(call, plan, partials, task, rows);
}

}  // namespace keysift::KEYSIFT_ISA
