// The second look at the codes of pages: all their keys.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr float kMostSpread = 78;  // exp of it, times any page size, and exp of the negative are normal numbers

// A list of full pages of one row and KV head.
struct PageList {
  const std::int32_t* pages;
  int count;
};

// One page, as N heads of a group see it, in units of log2.
template <int N>
struct Scan {
  const std::int32_t* levels;  // [W, S]
  const std::int16_t* pairs;   // [N, padded], queries times half widths
  int padded, words, size;     // size: S
  float factors[N];            // of twice the products
  float offsets[N];            // to add then: scores relative to the centre of the page
};

inline __attribute__((noinline)) Int load_rest(const std::int32_t* p, int there) {
  Int levels = {};
  __builtin_memcpy(&levels, p, there * sizeof *p);
  return levels;
}

KEYSIFT_INLINE Int load_levels(const std::int32_t* p, int there) {
  if (there < kLanes) return load_rest(p, there);
  Int levels;
  __builtin_memcpy(&levels, p, sizeof levels);
  return levels;
}

// Scores of N heads for kLanes tokens from `token` on.
template <int N, int kBits>
KEYSIFT_INLINE void scan_tokens(const Scan<N>& scan, int token, Vec (&scores)[N]) {
  constexpr int kPairs = 16 / kBits;  // of a word
  constexpr std::int32_t kMask = ((1 << kBits) - 1) * 0x10001;
  Int even[N] = {}, odd[N] = {};
  for (int word = 0; word < scan.words; ++word) {
    const Int levels = load_levels(scan.levels + word * scan.size + token, scan.size - token);
    const std::int16_t* pairs = scan.pairs + word * 2 * kPairs;
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      const Int pair = levels >> (i * kBits) & kMask;
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        std::int32_t query;
        __builtin_memcpy(&query, pairs + v * scan.padded + 2 * i, sizeof query);
        Int& sum = i % 2 ? odd[v] : even[v];
        sum = dot_pairs(pair, Int{} + query, sum);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v)
    scores[v] = fma(to_floats(even[v] + odd[v]), splat(scan.factors[v]), splat(scan.offsets[v]));
}

alignas(64) inline const std::int32_t kCounting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lanes past the last token of a page get `other`.
KEYSIFT_INLINE Vec only_tokens(Vec numbers, int there, float other) {
  if (there >= kLanes) return numbers;
  Int lane;
  __builtin_memcpy(&lane, kCounting, sizeof lane);
  return lane < there ? numbers : splat(other);
}

// The greatest score of each head.
template <int N, int kBits>
__attribute__((noinline)) void find_tops(const Scan<N>& scan, float (&tops)[N]) {
  Vec highest_lanes[N], scores[N];
  for (int v = 0; v < N; ++v) highest_lanes[v] = splat(kNothing);
  for (int token = 0; token < scan.size; token += kLanes) {
    scan_tokens<N, kBits>(scan, token, scores);
    for (int v = 0; v < N; ++v)
      highest_lanes[v] = maximum(highest_lanes[v], only_tokens(scores[v], scan.size - token, kNothing));
  }
  for (int v = 0; v < N; ++v) tops[v] = highest(highest_lanes[v]);
}

// Multiplies N queries with the half widths of a page: pairs [N, padded], and their sums in totals.
template <int N>
KEYSIFT_INLINE void weigh_queries(const CodeQueries& queries, int first, const std::int8_t* halves, int half,
                                  std::int16_t* pairs, float (&totals)[kFew]) {
  const Int ones = Int{} + 0x10001;
  Int sums[kFew] = {};
  for (int d = 0; d < queries.padded; d += 2 * kLanes) {
    const Words widths = zip_bytes(halves, d, half);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const int i = v * queries.padded + d;
      const Int pair = (Int)scale_down((Words)load_pairs(queries.pairs + first * queries.padded + i), widths);
      __builtin_memcpy(pairs + i, &pair, sizeof pair);
      sums[v] = dot_pairs(pair, ones, sums[v]);
    }
  }
  store_totals(totals, {to_floats(sums[0]), to_floats(sums[1]), to_floats(sums[2]), to_floats(sums[3])});
}

// Result of the fine scan of a list: log2 of each page's mass against its centre.
struct Fine {
  float* sums;   // [G, stride]
  float* bases;  // [G, stride]
  int stride;
};

// Gets N heads ready to look at page `at` of the list.
template <int N, int kBits>
KEYSIFT_INLINE void start_scan(const PagesCall& call, const PageCodes& codes, const CodeQueries& queries, int first,
                               const float (&spreads)[N], const Fine& fine, int at, std::int16_t* pairs,
                               Scan<N>& scan) {
  constexpr int kLevels = 1 << kBits;
  float totals[kFew], tops[N] = {};
  const std::int8_t* halves = codes.bounds + queries.dim;
  if (queries.dim < queries.padded) halves = std::copy_n(halves, queries.dim, queries.bounds) - queries.dim;
  weigh_queries<N>(queries, first, halves, 16 / kBits, pairs, totals);
  scan.levels = codes.levels, scan.pairs = pairs, scan.padded = queries.padded;
  scan.words = static_cast<int>(call.words), scan.size = static_cast<int>(call.page_size);
  bool wide = false;
  for (int v = 0; v < N; ++v) {
    // 128: what the product of a query and a half width was divided by, which was times 256 before
    const float factor = queries.units[first + v] * call.scale * codes.scales[1] * (128.0f / kLevels * kLog2E);
    scan.factors[v] = 2 * factor;
    scan.offsets[v] = -(kLevels - 1) * totals[v] * factor;
    wide |= spreads[v] > kMostSpread;
  }
  if (wide) find_tops<N, kBits>(scan, tops);
  for (int v = 0; v < N; ++v) {
    fine.bases[(first + v) * fine.stride + at] = tops[v];
    scan.offsets[v] -= tops[v];
  }
}

// N heads look at a block of pages. Step by step for all of them, which leaves the processor more to do at once.
template <int N, int kBits>
KEYSIFT_INLINE void scan_block(const PagesCall& call, const PageCodes (&codes)[kBlock], const CodeQueries& queries,
                               int first, const float (&spreads)[kBlock][N], const Fine& fine, int at) {
  alignas(64) std::int16_t pairs[kBlock * N * kMaxDim];
  Scan<N> scans[kBlock];
  for (int i = 0; i < kBlock; ++i)
    start_scan<N, kBits>(call, codes[i], queries, first, spreads[i], fine, at + i, pairs + i * N * queries.padded,
                         scans[i]);
  Vec sums[N][kBlock], scores[kBlock][N];
  for (int v = 0; v < N; ++v)
    for (int i = 0; i < kBlock; ++i) sums[v][i] = Vec{};
  for (int token = 0; token < call.page_size; token += kLanes) {
    for (int i = 0; i < kBlock; ++i) scan_tokens<N, kBits>(scans[i], token, scores[i]);
    const int there = static_cast<int>(call.page_size) - token;
    for (int v = 0; v < N; ++v)
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) sums[v][i] = sums[v][i] + only_tokens(exp2(scores[i][v]), there, 0.0f);
  }
  for (int v = 0; v < N; ++v) store_totals(fine.sums + (first + v) * fine.stride + at, sums[v]);
}

inline void prefetch_levels(const PagesCall& call, const PageCodes& codes) {
  const auto* bytes = reinterpret_cast<const char*>(codes.levels);
  for (std::int64_t i = 0; i < call.words * call.page_size * 4; i += 64) __builtin_prefetch(bytes + i, 0, 2);
  prefetch(codes.bounds + call.dim, static_cast<int>(call.dim));
}

// Puts the masses of a list's pages in place of what the coarse look gave. spreads: [G, F].
template <int kBits>
void scan_list(const PagesCall& call, std::int64_t row, std::int64_t kv_head, const PageList& list,
               const CodeQueries& queries, const float* spreads, const Fine& fine) {
  const auto page_of = [&](int i) { return list.pages[std::min(i, list.count - 1)]; };
  for (int at = 0; at < list.count; at += kBlock) {
    PageCodes codes[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      prefetch_levels(call, codes_of(call, row, kv_head, page_of(at + kBlock + i)));
      codes[i] = codes_of(call, row, kv_head, page_of(at + i));
    }
    by_few(queries.group, [&](int first, auto number) KEYSIFT_LAMBDA_INLINE {
      constexpr int kNumber = number();
      float mine[kBlock][kNumber];
      for (int i = 0; i < kBlock; ++i)
        for (int v = 0; v < kNumber; ++v) mine[i][v] = spreads[(first + v) * call.pages + page_of(at + i)];
      scan_block<kNumber, kBits>(call, codes, queries, first, mine, fine, at);
    });
  }
  const float log_size = std::log2(static_cast<float>(call.page_size));
  for (int g = 0; g < queries.group; ++g) {
    float* masses = masses_of(call, row, kv_head * queries.group + g);
    float *sums = fine.sums + g * fine.stride, *bases = fine.bases + g * fine.stride;
    std::fill(sums + list.count, sums + padded(list.count), 1.0f);  // what lies there may be no number
    for (int i = 0; i < list.count; i += kLanes) store(sums + i, log2(load(sums + i)) + load(bases + i));
    for (int i = 0; i < list.count; ++i) masses[list.pages[i]] += (sums[i] - log_size) * kLn2;
  }
}

}  // namespace keysift::KEYSIFT_ISA
