// The second phase of column scores: from each row's weights to the mean, the peak and the bands of its probe.
#pragma once

namespace keysift::KEYSIFT_ISA {

// Sums of weights of a round's rows, [row, piece, part, page]. The parts are, with bands: a page's tokens up to the
// query's own offset within its page, which lie on one band, and those past it, which lie on the next nearer one.
struct PageSums {
  float* data;
  float* tops;    // [row, piece], times log2(e)
  float* masses;  // [row, piece], the total of the piece
  std::int64_t row_floats;
  int pieces, piece_floats, part_floats;

  float* at(std::int64_t row, int piece) const { return data + row * row_floats + std::int64_t{piece} * piece_floats; }
};

inline PageSums make_sums(Buffer& memory, const ScoresPlan& plan) {
  const std::int64_t stats = plan.rows_at_once * plan.cut.pieces;
  float* data = memory.floats(plan.rows_at_once * plan.row_floats() + 2 * stats);
  float* tops = data + plan.rows_at_once * plan.row_floats();
  return {data, tops, tops + stats, plan.row_floats(), plan.cut.pieces, plan.cut.sums * plan.parts, plan.cut.sums};
}

// The factors that make masses of a row's weights, one for each of its pieces; padded to whole vectors.
inline void find_factors(const PageSums& sums, std::int64_t row, int pieces, float* factors) {
  const float* tops = sums.tops + row * sums.pieces;
  const float* masses = sums.masses + row * sums.pieces;
  const int padded = (pieces + kLanes - 1) / kLanes * kLanes;
  float top = kNothing, mass = 0.0f;
  for (int i = 0; i < pieces; ++i) top = std::max(top, tops[i]);
  const float base = top == kNothing ? 0.0f : top;
  for (int i = 0; i < padded; ++i) factors[i] = i < pieces ? tops[i] - base : kNothing;
  for (int i = 0; i < padded; i += kLanes) store(factors + i, exp2(load(factors + i)));
  for (int i = 0; i < pieces; ++i) mass += factors[i] * masses[i];
  for (int i = 0; i < pieces; ++i) factors[i] = mass == 0.0f ? 0.0f : factors[i] / mass;
}

// Sums of a probe's head so far. A vector may reach past the last page, where it adds zeros.
struct Pool {
  std::int64_t pages;  // those that may hold anything
  float* factors;
  float* mass;
  float* peak;
  float* bands;  // [pages] from the furthest to the nearest, or null
};

// mass += share * factor * weights, and the peak of it
KEYSIFT_INLINE void pool_piece(const float* weights, const float* behind, int floats, float factor, float share,
                               float* mass, float* peak) {
  for (int i = 0; i < floats; i += kLanes) {
    const Vec weight = behind == nullptr ? load(weights + i) : load(weights + i) + load(behind + i);
    const Vec part = weight * splat(factor);
    store(mass + i, fma(part, splat(share), load(mass + i)));
    store(peak + i, maximum(part, load(peak + i)));
  }
}

KEYSIFT_INLINE void add_scaled(const float* values, int floats, float factor, float* sums) {
  for (int i = 0; i < floats; i += kLanes) store(sums + i, fma(load(values + i), splat(factor), load(sums + i)));
}

// Adds one query's row, which stands at `position`.
inline void pool_row(const PageCut& cut, const PageSums& sums, std::int64_t row, std::int32_t position, float share,
                     const Pool& pool) {
  const int page = static_cast<int>(position / cut.page_size), pieces = page / cut.piece_pages + 1;
  find_factors(sums, row, pieces, pool.factors);
  for (int piece = 0; piece < pieces; ++piece) {
    const float* near = sums.at(row, piece);
    const float* behind = pool.bands == nullptr ? nullptr : near + sums.part_floats;
    const std::int64_t first = std::int64_t{piece} * cut.piece_pages;
    const float factor = pool.factors[piece];
    pool_piece(near, behind, sums.part_floats, factor, share, pool.mass + first, pool.peak + first);
    if (behind == nullptr) continue;
    float* bands = pool.bands + pool.pages - 1 - page + first;
    add_scaled(near, sums.part_floats, factor * share, bands);
    add_scaled(behind, sums.part_floats, factor * share, bands + 1);
  }
}

// Begins with what earlier rounds have left in the caller's tensors.
inline Pool start_pool(const ScoresCall& call, const PageCut& cut, std::int64_t start, Buffer& memory) {
  const std::int64_t pages = std::min<std::int64_t>(call.pages, std::int64_t{cut.pieces} * cut.piece_pages);
  const std::int64_t floats = (pages + cut.piece_pages + cut.sums + 31) / 16 * 16;
  float* data = memory.floats(4 * floats);
  std::fill_n(data, 4 * floats, 0.0f);
  const Pool pool{pages, data, data + floats, data + 2 * floats, call.bands == nullptr ? nullptr : data + 3 * floats};
  std::copy_n(call.mass + start, pages, pool.mass);
  std::copy_n(call.peak + start, pages, pool.peak);
  for (std::int64_t i = 0; i < pages && pool.bands != nullptr; ++i) pool.bands[pages - 1 - i] = call.bands[start + i];
  return pool;
}

inline void keep_pool(const ScoresCall& call, std::int64_t start, const Pool& pool) {
  std::copy_n(pool.mass, pool.pages, call.mass + start);
  for (std::int64_t i = 0; i < pool.pages; ++i)  // a maximum would lose a NaN
    call.peak[start + i] = pool.mass[i] == pool.mass[i] ? pool.peak[i] : pool.mass[i];
  for (std::int64_t i = 0; i < pool.pages && pool.bands != nullptr; ++i)
    call.bands[start + i] = pool.bands[pool.pages - 1 - i];
}

// Adds the round's rows of one probe and head to the caller's tensors.
inline void pool_probe(const ScoresCall& call, const ScoresPlan& plan, const PageSums& sums, std::int64_t probe,
                       std::int64_t head) {
  static thread_local Buffer memory;
  const std::int64_t queries = call.queries_per_probe, kv_head = head / plan.group;
  const std::int64_t* rows = plan.rows.data() + (kv_head * call.probes + probe) * queries;
  const std::int32_t* positions = call.positions + probe * queries;
  std::int64_t here = 0, there = 0;
  for (std::int64_t i = 0; i < queries; ++i) here += rows[i] >= 0, there += positions[i] >= 0;
  if (here == 0) return;
  const std::int64_t start = (probe * call.heads + head) * call.pages;
  const Pool pool = start_pool(call, plan.cut, start, memory);
  for (std::int64_t i = 0; i < queries; ++i)
    if (rows[i] >= 0)
      pool_row(plan.cut, sums, rows[i] + head - kv_head * plan.group, positions[i], 1.0f / static_cast<float>(there),
               pool);
  keep_pool(call, start, pool);
}

}  // namespace keysift::KEYSIFT_ISA
