// The first look at the codes of pages: how high their keys score in the middle, and how far around it they may lie.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kQueryStep = 32;  // queries are padded with zeros to so many channels, two vectors' worth or less
constexpr float kQueryMost = 32767;

KEYSIFT_INLINE Int load_pairs(const std::int16_t* p) {
  Int pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

// Products of pairs, added to `sum`.
KEYSIFT_INLINE Int dot_pairs(Int a, Int b, Int sum) { return (Int)add_products((Words)a, (Words)b, (Words)sum); }

KEYSIFT_INLINE Vec to_floats(Int numbers) { return __builtin_convertvector(numbers, Vec); }

// The G queries of a task in 16 bits, each in units of its own.
struct CodeQueries {
  int group, dim, padded;      // padded: int16 of a query
  float* units;                // [G]
  std::int16_t* plain;         // [G, padded]
  std::int16_t* magnitudes;    // [G, padded]
  std::int16_t* pairs;         // [G, padded], in the order of `zipped`, as levels come
  std::int8_t* bounds;         // [2, padded], room for those of a page
};

inline CodeQueries make_room(Buffer& memory, int group, int dim) {
  const int padded = (dim + kQueryStep - 1) / kQueryStep * kQueryStep;
  const std::size_t count = std::size_t(group) * padded;
  float* data = memory.floats((3 * count + padded) / 2 + group + 16);
  auto* plain = reinterpret_cast<std::int16_t*>(data);
  std::fill_n(plain, 3 * count + padded, std::int16_t{0});
  return {group, dim, padded, data + (3 * count + padded) / 2, plain, plain + count, plain + 2 * count,
          reinterpret_cast<std::int8_t*>(plain + 3 * count)};
}

template <class T>
void round_query(const T* query, int half, const CodeQueries& queries, int g) {
  alignas(64) std::int32_t rounded[kMaxDim];
  Vec tops = {};
  for (int d = 0; d < queries.dim; d += kLanes) {
    const Vec q = widen(query + d);
    tops = maximum(tops, q < Vec{} ? Vec{} - q : q);
  }
  const float top = highest(tops);
  const Vec factor = splat(top > 1e-30f ? kQueryMost / top : 0.0f);
  const Vec magic = splat(0x1.8p23f);  // rounds what it is added to
  Vec sum = {};  // NaN where any channel is
  for (int d = 0; d < queries.dim; d += kLanes) {
    const Vec q = widen(query + d) * factor;
    sum = sum + q;
    const Int whole = (Int)(q + magic) - (Int)magic;
    __builtin_memcpy(rounded + d, &whole, sizeof whole);
  }
  const float all = total(sum);
  queries.units[g] = all == all ? top / kQueryMost : all;
  for (int d = 0; d < queries.dim; ++d) {
    const auto q = static_cast<std::int16_t>(rounded[d]);
    queries.plain[g * queries.padded + d] = q;
    queries.magnitudes[g * queries.padded + d] = static_cast<std::int16_t>(q < 0 ? -q : q);
    queries.pairs[g * queries.padded + d] = static_cast<std::int16_t>(rounded[zipped(d, half)]);
  }
}

// half: half the channels of a word.
template <class T>
CodeQueries round_queries(const PagesCall& call, const PageRun& run, int half, Buffer& memory) {
  const int group = static_cast<int>(call.heads / call.kv_heads);
  const CodeQueries queries = make_room(memory, group, static_cast<int>(call.dim));
  for (int g = 0; g < group; ++g) round_query(query_of<T>(call, run.row, run.kv_head * group + g), half, queries, g);
  return queries;
}

// Results of a run of pages for the heads of a group.
struct Coarse {
  float* middles;  // [G, stride], products with the middles of pages, in units of query and scale; then centres
  float* spreads;  // [G, stride], the same of magnitudes and half widths
  float* scales;   // [2, stride]
  int stride;
};

inline Coarse make_coarse(Buffer& memory, int group) {
  constexpr int kStride = kPagesOfTask + 16;
  float* data = memory.floats(std::size_t(2) * (group + 1) * kStride);
  return {data, data + group * kStride, data + 2 * group * kStride, kStride};
}

// Products of N queries with the bounds [2, padded] of a block of pages.
template <int N>
KEYSIFT_INLINE void look_at_block(const std::int8_t* const (&middles)[kBlock],
                                  const std::int8_t* const (&halves)[kBlock], const CodeQueries& queries, int first,
                                  const Coarse& coarse, int at) {
  const std::int16_t* plain = queries.plain + first * queries.padded;
  const std::int16_t* magnitudes = queries.magnitudes + first * queries.padded;
  Vec centres[N][kBlock], spreads[N][kBlock];
#pragma GCC unroll 4
  for (int page = 0; page < kBlock; ++page) {
    Int centre[N] = {}, spread[N] = {};
    for (int d = 0; d < queries.padded; d += 2 * kLanes) {
      const Int middle = (Int)widen_bytes(middles[page] + d), half = (Int)widen_bytes(halves[page] + d);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        const int i = v * queries.padded + d;
        centre[v] = dot_pairs(middle, load_pairs(plain + i), centre[v]);
        spread[v] = dot_pairs(half, load_pairs(magnitudes + i), spread[v]);
      }
    }
    for (int v = 0; v < N; ++v) centres[v][page] = to_floats(centre[v]), spreads[v][page] = to_floats(spread[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    store_totals(coarse.middles + (first + v) * coarse.stride + at, centres[v]);
    store_totals(coarse.spreads + (first + v) * coarse.stride + at, spreads[v]);
  }
}

// Addresses of the codes of a page.
struct PageCodes {
  const std::int8_t* bounds;   // [2, D]
  const float* scales;         // [2]
  const std::int32_t* levels;  // [W, S]
};

inline PageCodes codes_of(const PagesCall& call, std::int64_t row, std::int64_t kv_head, std::int64_t page) {
  const std::int64_t index = frame_of(call, row, kv_head, page) * call.kv_heads + kv_head;
  return {call.bounds + index * 2 * call.dim, call.scales + index * 2,
          call.levels + index * call.words * call.page_size};
}

// Centres and spreads of the full pages of a run, in natural units of scores.
inline void look_at_run(const PagesCall& call, const PageRun& run, const CodeQueries& queries, const Coarse& coarse) {
  const int stop = run.full_stop(), dim = queries.dim;
  alignas(64) std::int8_t room[2 * kBlock * kMaxDim] = {};
  const auto page_of = [&](int page) { return codes_of(call, run.row, run.kv_head, std::min(page, stop - 1)); };
  for (int page = run.first; page < stop; page += kBlock) {
    const std::int8_t *middles[kBlock], *halves[kBlock];
    const int at = page - run.first;
    for (int i = 0; i < kBlock; ++i) {
      const PageCodes codes = page_of(page + i), later = page_of(page + i + 2 * kBlock);
      prefetch(later.bounds, 2 * dim);
      __builtin_prefetch(later.scales, 0, 2);
      middles[i] = codes.bounds, halves[i] = codes.bounds + dim;
      if (dim < queries.padded) {
        std::int8_t* copy = room + i * 2 * kMaxDim;
        middles[i] = std::copy_n(codes.bounds, dim, copy) - dim;
        halves[i] = std::copy_n(codes.bounds + dim, dim, copy + kMaxDim) - dim;
      }
      coarse.scales[at + i] = codes.scales[0], coarse.scales[coarse.stride + at + i] = codes.scales[1];
    }
    by_few(queries.group, [&](int first, auto number) KEYSIFT_LAMBDA_INLINE {
      look_at_block<number()>(middles, halves, queries, first, coarse, at);
    });
  }
  for (int g = 0; g < queries.group; ++g) {
    const Vec unit = splat(queries.units[g] * call.scale);
    float *centres = coarse.middles + g * coarse.stride, *spreads = coarse.spreads + g * coarse.stride;
    for (int i = 0; i < stop - run.first; i += kLanes) {
      store(centres + i, load(centres + i) * (load(coarse.scales + i) * unit));
      store(spreads + i, load(spreads + i) * (load(coarse.scales + coarse.stride + i) * unit));
    }
  }
}

}  // namespace keysift::KEYSIFT_ISA
