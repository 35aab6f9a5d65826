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

KEYSIFT_INLINE Int load_levels(const std::int32_t* p, int there) {
  Int levels = {};
  if (there >= kLanes) __builtin_memcpy(&levels, p, sizeof levels);
  else __builtin_memcpy(&levels, p, there * sizeof *p);
  return levels;
}

// Calls use(token, scores of N heads for kLanes tokens from there on).
template <int N, int kBits, class Use>
KEYSIFT_INLINE void scan_page(const Scan<N>& scan, const Use& use) {
  constexpr int kPairs = 16 / kBits;  // of a word
  constexpr std::int32_t kMask = ((1 << kBits) - 1) * 0x10001;
  for (int token = 0; token < scan.size; token += kLanes) {
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
    Vec scores[N];
    for (int v = 0; v < N; ++v)
      scores[v] = fma(to_floats(even[v] + odd[v]), splat(scan.factors[v]), splat(scan.offsets[v]));
    use(token, scores);
  }
}

alignas(64) inline const std::int32_t kCounting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Lanes behind the last token of a page get `other`.
KEYSIFT_INLINE Vec only_tokens(Vec numbers, int there, float other) {
  if (there >= kLanes) return numbers;
  Int lane;
  __builtin_memcpy(&lane, kCounting, sizeof lane);
  return lane < there ? numbers : splat(other);
}

// The greatest score of each head.
template <int N, int kBits>
__attribute__((noinline)) void find_tops(const Scan<N>& scan, float (&tops)[N]) {
  Vec highest_lanes[N];
  for (int v = 0; v < N; ++v) highest_lanes[v] = splat(kNothing);
  scan_page<N, kBits>(scan, [&](int token, const Vec (&scores)[N]) {
    for (int v = 0; v < N; ++v)
      highest_lanes[v] = maximum(highest_lanes[v], only_tokens(scores[v], scan.size - token, kNothing));
  });
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

// What of a list the fine look gives: log2 of each page's mass against its centre.
struct Fine {
  float* sums;   // [G, stride]
  float* bases;  // [G, stride]
  int stride;
};

// Lets N heads look at page `at` of the list; sums: the weights of its tokens, lane by lane.
template <int N, int kBits>
KEYSIFT_INLINE void weigh_page(const PagesCall& call, const PageCodes& codes, const CodeQueries& queries, int first,
                               const float* spreads, const Fine& fine, int at, Vec* sums) {
  constexpr int kLevels = 1 << kBits;
  alignas(64) std::int16_t pairs[N * kMaxDim];
  float totals[kFew], tops[N];
  const std::int8_t* halves = codes.bounds + queries.dim;
  if (queries.dim < queries.padded) halves = std::copy_n(halves, queries.dim, queries.bounds) - queries.dim;
  weigh_queries<N>(queries, first, halves, 16 / kBits, pairs, totals);
  Scan<N> scan{codes.levels, pairs, queries.padded, static_cast<int>(call.words), static_cast<int>(call.page_size), {},
               {}};
  bool wide = false;
  for (int v = 0; v < N; ++v) {
    // 128: what the product of a query and a half width was divided by, which was times 256 before
    const float factor = queries.units[first + v] * call.scale * codes.scales[1] * (128.0f / kLevels * kLog2E);
    scan.factors[v] = 2 * factor;
    scan.offsets[v] = -(kLevels - 1) * totals[v] * factor;
    wide |= spreads[v] > kMostSpread;
    tops[v] = 0.0f;
  }
  if (wide) find_tops<N, kBits>(scan, tops);
  for (int v = 0; v < N; ++v) {
    fine.bases[(first + v) * fine.stride + at] = tops[v];
    scan.offsets[v] -= tops[v];
    sums[v * kBlock] = Vec{};
  }
  scan_page<N, kBits>(scan, [&](int token, const Vec (&scores)[N]) KEYSIFT_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v)
      sums[v * kBlock] = sums[v * kBlock] + only_tokens(exp2(scores[v]), scan.size - token, 0.0f);
  });
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
    for (int i = 0; i < kBlock; ++i) prefetch_levels(call, codes_of(call, row, kv_head, page_of(at + kBlock + i)));
    by_few(queries.group, [&](int first, auto number) KEYSIFT_LAMBDA_INLINE {
      constexpr int kNumber = number();
      Vec sums[kNumber][kBlock] = {};
      for (int i = 0; i < std::min(kBlock, list.count - at); ++i) {
        float mine[kNumber];
        for (int v = 0; v < kNumber; ++v) mine[v] = spreads[(first + v) * call.pages + page_of(at + i)];
        weigh_page<kNumber, kBits>(call, codes_of(call, row, kv_head, page_of(at + i)), queries, first, mine, fine,
                                   at + i, &sums[0][i]);
      }
      for (int v = 0; v < kNumber; ++v) store_totals(fine.sums + (first + v) * fine.stride + at, sums[v]);
    });
  }
  const float log_size = std::log2(static_cast<float>(call.page_size));
  for (int g = 0; g < queries.group; ++g) {
    float* masses = masses_of(call, row, kv_head * queries.group + g);
    float *sums = fine.sums + g * fine.stride, *bases = fine.bases + g * fine.stride;
    for (int i = 0; i < list.count; i += kLanes) store(sums + i, log2(load(sums + i)) + load(bases + i));
    for (int i = 0; i < list.count; ++i) masses[list.pages[i]] += (sums[i] - log_size) * kLn2;
  }
}

}  // namespace keysift::KEYSIFT_ISA
