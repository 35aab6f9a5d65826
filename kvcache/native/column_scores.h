// Column scores in one pass over the keys: every row keeps the weights of each page against a top that its piece of the
// sequence has seen. What those weights are worth is known when all pieces are done; a second phase makes masses of
// them and pools each probe's queries.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr float kSlack = 16;     // a weight may grow to 2^kSlack before its row's top moves
constexpr int kQuarters = 4;     // of a tile, 16 tokens each
constexpr int kTileVectors = kTile / kLanes;
static_assert(kTile == kTileTokens);

// The rows of a task that see something of its piece, by ascending position; row = query * G + head.
struct ScoreRows {
  int count, padded, piece;
  const ProbeQuery* queries;
  std::int64_t first;       // in the round
  std::int32_t* positions;  // [padded]
  float* tops;              // [padded]
  float* tile_tops;         // [padded, tiles of a piece]: the tops that the weights of a tile were taken against
};

struct ScoresMemory {
  Buffer queries, keys, rows;
};

inline ScoreRows start_score_rows(Buffer& memory, const ScoresPlan& plan, const Chunk& chunk, int piece) {
  const ProbeQuery* queries = plan.order.data() + chunk.query;
  int skipped = 0;
  while (queries[skipped].position < plan.cut.first_token(piece)) ++skipped;
  const int count = (chunk.queries - skipped) * plan.group, padded = (count + kRowBlock - 1) / kRowBlock * kRowBlock;
  float* tops = memory.floats(std::size_t(padded) * (2 + plan.cut.piece_tiles));
  auto* positions = reinterpret_cast<std::int32_t*>(tops + padded);
  for (int row = 0; row < padded; ++row)
    positions[row] = queries[skipped + std::min(row, count - 1) / plan.group].position;
  std::fill_n(tops, padded, kNothing);
  return {count,     padded, piece,           queries + skipped, chunk.row + std::int64_t{skipped} * plan.group,
          positions, tops,   tops + 2 * padded};
}

// Queries -> cells [block of rows, channel / kPair, kRowBlock]; rows that only pad repeat the last one.
template <class Math>
void pack_probes(const ScoresCall& call, const ScoreRows& rows, const Chunk& chunk, int group, float* packed) {
  using T = typename Math::Element;
  const int cells = static_cast<int>(call.dim) / Math::kPair;
  for (int row = 0; row < rows.padded; row += kRowBlock, packed += cells * kRowBlock) {
    const T* queries[kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) {
      const int real = std::min(row + r, rows.count - 1), query = real / group;
      queries[r] = static_cast<const T*>(call.q) + rows.queries[query].query * call.q_strides[0] +
                   (std::int64_t{chunk.kv_head} * group + real - query * group) * call.q_strides[1];
    }
    pack_block<Math>(queries, cells, packed);
  }
}

// A tile of consecutive tokens, and where in its page each of them lies.
template <class T>
struct PageTile : KeyTile<T> {
  alignas(64) std::int32_t offsets[kTile];
  int index;  // in its piece
};

// Fills in tile `tile.index` of a piece; false where `last` lies before it.
template <class T>
bool read_tile(const ScoresCall& call, const PageCut& cut, const Chunk& chunk, int piece, std::int32_t last,
               PageTile<T>& tile) {
  const int whole = tile.index / cut.page_tiles;  // tiles or, where these are shorter, pages
  std::int64_t page = std::int64_t{piece} * cut.piece_pages + std::int64_t{whole} * cut.tile_pages;
  std::int64_t offset = std::int64_t{tile.index - whole * cut.page_tiles} * kTile;
  tile.first = static_cast<std::int32_t>(page * cut.page_size + offset);
  if (tile.index == cut.piece_tiles || tile.first > last) return false;
  const std::int64_t tokens = cut.page_tiles > 1 ? cut.page_size - offset : cut.tile_tokens();
  tile.count = static_cast<int>(std::min({tokens, std::int64_t{kTile}, std::int64_t{last} - tile.first + 1}));
  tile.last = tile.first + tile.count - 1;
  tile.gaps = tile.count < kTile;
  const T* keys = static_cast<const T*>(call.k) + chunk.kv_head * call.k_strides[1];
  const std::int32_t* frames = call.frames + chunk.probe * call.frames_strides[0] +
                               chunk.kv_head * call.frames_strides[1];
  for (int i = 0; i < tile.count; ++page, offset = 0) {
    const T* key = keys + frames[page * call.frames_strides[2]] * call.k_strides[0] + offset * call.k_strides[2];
    for (; i < tile.count && offset < cut.page_size; ++i, ++offset, key += call.k_strides[2]) {
      tile.keys[i] = key;
      tile.positions[i] = tile.first + i;
      tile.offsets[i] = static_cast<std::int32_t>(offset);
    }
  }
  for (int i = tile.count; i < kTile; ++i) {
    tile.keys[i] = reinterpret_cast<const T*>(kZeros);
    tile.positions[i] = kTooNew;
    tile.offsets[i] = 0;
  }
  return true;
}

// The weights of the tokens up to `last`; 0 after it.
KEYSIFT_INLINE Vec only_until(Vec weights, const std::int32_t* offsets, std::int32_t last) {
  Int where;
  __builtin_memcpy(&where, offsets, sizeof where);
  return where <= last ? weights : splat(0.0f);
}

// Sums of weights [kTile] over each quarter; the high ones are those past offset `split` of their page.
template <bool kSplit>
KEYSIFT_INLINE void sum_quarters(const float* weights, const std::int32_t* offsets, std::int32_t split,
                                 float (&low)[kQuarters], float (&high)[kQuarters]) {
  constexpr int kVectors = kTileVectors / kQuarters;
  Vec lows[kQuarters] = {}, highs[kQuarters] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kQuarters; ++i)
#pragma GCC unroll 4
    for (int c = i * kVectors; c < (i + 1) * kVectors; ++c) {
      const Vec all = load(weights + c * kLanes);
      const Vec near = kSplit ? only_until(all, offsets + c * kLanes, split) : all;
      lows[i] = lows[i] + near;
      if (kSplit) highs[i] = highs[i] + (all - near);
    }
  store_totals(low, lows);
  if (kSplit) store_totals(high, highs);
}

// Sums of quarters -> sums of pages.
KEYSIFT_INLINE void join_quarters(const float (&quarters)[kQuarters], int pages, float* sums) {
  if (pages == 4) {
    std::copy_n(quarters, 4, sums);
  } else if (pages == 2) {
    sums[0] = quarters[0] + quarters[1];
    sums[1] = quarters[2] + quarters[3];
  } else {
    sums[0] = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
  }
}

// Sums of weights [kTile] over each page of a tile; the parts lie `part` floats apart.
template <bool kSplit>
KEYSIFT_INLINE void sum_pages(const float* weights, const std::int32_t* offsets, std::int32_t split, const PageCut& cut,
                              float* sums, int part) {
  if (cut.page_size == 1) {  // page means: nothing to sum, and a query's own page is all in its nearest band
    std::copy_n(weights, kTile, sums);
    if (kSplit) std::fill_n(sums + part, kTile, 0.0f);
    return;
  }
  if (cut.tile_pages == 1 || cut.page_size % (kTile / kQuarters) == 0) {
    float low[kQuarters], high[kQuarters];
    sum_quarters<kSplit>(weights, offsets, split, low, high);
    join_quarters(low, cut.tile_pages, sums);
    if (kSplit) join_quarters(high, cut.tile_pages, sums + part);
    return;
  }
  const int size = static_cast<int>(cut.page_size), middle = kSplit ? split + 1 : size;
  for (int page = 0; page < cut.tile_pages; ++page, weights += size) {
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < middle; ++i) low += weights[i];
    for (int i = middle; i < size; ++i) high += weights[i];
    sums[page] = low;
    if (kSplit) sums[part + page] = high;
  }
}

// Turns a row's scores [kTile] into weights against its top, and moves the top where they would grow too large.
KEYSIFT_INLINE void weigh_row(float* scores, float& top) {
  Vec highest_lane = load(scores);
#pragma GCC unroll 16
  for (int c = 1; c < kTileVectors; ++c) highest_lane = maximum(highest_lane, load(scores + c * kLanes));
  const float now = highest(highest_lane);
  if (now > top + kSlack) top = now;
  const Vec base = splat(top == kNothing ? 0.0f : top);  // -inf - -inf would be NaN
#pragma GCC unroll 16
  for (int c = 0; c < kTileVectors; ++c) store(scores + c * kLanes, exp2(load(scores + c * kLanes) - base));
}

// Scores of a block of rows [kRowBlock, kTile]. A function of its own: what else stays in registers would push some of
// its sums out of them.
template <class Math>
__attribute__((noinline)) void score_tile(const float* queries, const float* keys, int depth, float scale, int vectors,
                                          float* scores) {
  by_columns(vectors, [&](int c, auto columns) KEYSIFT_LAMBDA_INLINE {
    score_columns<Math, columns()>(queries, keys + c * kLanes, depth, scale, scores + c * kLanes);
  });
}

// One block of query rows against one packed tile.
template <class Math, bool kSplit>
void score_block(const PageTile<typename Math::Element>& tile, const PageCut& cut, const ScoreRows& rows, int row,
                 int depth, float scale, const float* queries, const float* keys, const PageSums& sums) {
  const std::int32_t* positions = rows.positions + row;
  const int vectors = vectors_until(tile, positions[kRowBlock - 1]);
  alignas(64) float scores[kRowBlock * kTile];
  score_tile<Math>(queries, keys, depth, scale, vectors, scores);
  const bool open = !tile.gaps && tile.last <= positions[0];
  const int there = std::min(kRowBlock, rows.count - row);
  for (int r = 0; r < there; ++r) {
    float* mine = scores + r * kTile;
    for (int c = 0; c < vectors * kLanes && !open; c += kLanes)
      store(mine + c, only_between(load(mine + c), tile.positions + c, kTooOld, positions[r]));
    for (int c = vectors * kLanes; c < kTile; c += kLanes) store(mine + c, splat(kNothing));
    weigh_row(mine, rows.tops[row + r]);
    rows.tile_tops[(row + r) * cut.piece_tiles + tile.index] = rows.tops[row + r];
    const std::int32_t split = kSplit ? positions[r] % static_cast<std::int32_t>(cut.page_size) : 0;
    sum_pages<kSplit>(mine, tile.offsets, split, cut,
                      sums.at(rows.first + row + r, rows.piece) + tile.index * cut.tile_pages, sums.part_floats);
  }
}

// Sums of tiles -> sums of pages, in place.
inline void join_tiles(const PageCut& cut, float* sums) {
  for (int page = 0; page < cut.piece_pages; ++page) {
    const float* tiles = sums + page * cut.page_tiles;
    float sum = 0.0f;
    for (int i = 0; i < cut.page_tiles; ++i) sum += tiles[i];
    sums[page] = sum;
  }
  std::fill(sums + cut.piece_pages, sums + cut.sums, 0.0f);
}

// Puts all sums of a row's piece on its last top, and notes that and their total.
inline void finish_piece(const PageCut& cut, const ScoreRows& rows, int row, const PageSums& sums) {
  float* data = sums.at(rows.first + row, rows.piece);
  const float* tops = rows.tile_tops + row * cut.piece_tiles;
  const float top = rows.tops[row];
  Vec mass = {};
  for (float* part = data; part < data + sums.piece_floats; part += sums.part_floats) {
    for (int tile = 0; tile < cut.piece_tiles && tops[tile] < top; ++tile) {
      const float shrink = std::exp2(tops[tile] - top);
      for (int i = 0; i < cut.tile_pages; ++i) part[tile * cut.tile_pages + i] *= shrink;
    }
    if (cut.page_tiles > 1) join_tiles(cut, part);
    for (int i = 0; i < sums.part_floats; i += kLanes) mass = mass + load(part + i);
  }
  const std::int64_t index = (rows.first + row) * sums.pieces + rows.piece;
  sums.tops[index] = top;
  sums.masses[index] = total(mass);
}

template <class Math, bool kSplit>
void score_piece(const ScoresCall& call, const ScoresPlan& plan, const PageSums& sums, const ScoresTask& task) {
  using T = typename Math::Element;
  static thread_local ScoresMemory memory;
  const Chunk& chunk = plan.chunks[task.chunk];
  const int dim = static_cast<int>(call.dim), depth = dim / Math::kPair;
  const ScoreRows rows = start_score_rows(memory.rows, plan, chunk, task.piece);
  float* queries = memory.queries.floats(std::size_t(rows.padded) * depth);
  float* keys = memory.keys.floats(kTile * depth);
  pack_probes<Math>(call, rows, chunk, plan.group, queries);
  for (int row = 0; row < rows.count; ++row)
    std::fill_n(sums.at(rows.first + row, task.piece), sums.piece_floats, 0.0f);
  PageTile<T> tile;
  const std::int32_t last = rows.positions[rows.count - 1];
  for (tile.index = 0; read_tile(call, plan.cut, chunk, task.piece, last, tile); ++tile.index) {
    pack_keys<Math>(tile, dim, (tile.count + kLanes - 1) / kLanes * kLanes, keys);
    for (int row = 0; row < rows.padded; row += kRowBlock)
      if (tile.first <= rows.positions[row + kRowBlock - 1])
        score_block<Math, kSplit>(tile, plan.cut, rows, row, depth, call.scale * kLog2E, queries + row * depth, keys,
                                  sums);
  }
  for (int row = 0; row < rows.count; ++row) finish_piece(plan.cut, rows, row, sums);
}

template <class Math>
void column_scores_of(const ScoresCall& call, int threads) {
  static thread_local Buffer memory;
  ScoresPlan plan(call);
  const PageSums sums = make_sums(memory, plan);
  const auto score = plan.parts == 2 ? score_piece<Math, true> : score_piece<Math, false>;
  while (plan.next_round()) {
    for_each_task(static_cast<std::int64_t>(plan.tasks.size()), threads,
                  [&](std::int64_t i) { score(call, plan, sums, plan.tasks[i]); });
    for_each_task(call.probes * call.heads, threads,
                  [&](std::int64_t i) { pool_probe(call, plan, sums, i / call.heads, i % call.heads); });
  }
}

}  // namespace keysift::KEYSIFT_ISA
