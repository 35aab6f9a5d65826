// From log masses to page lists.
#pragma once

namespace keysift::KEYSIFT_ISA {

struct TopMemory {
  Buffer weights, group, pages, order;
};

// The pages that one list may choose from: sinks [0, sinks), a window [first, count), and what lies between.
struct Zones {
  int sinks, first, count;
};

inline Zones zones_of(const TopCall& call, std::int64_t row) {
  const auto count = static_cast<int>(std::clamp<std::int64_t>(std::int64_t{call.lasts[row]} + 1, 0, call.pages));
  const auto sinks = static_cast<int>(std::min<std::int64_t>(call.sinks, count));
  return {sinks, std::clamp<int>(call.firsts[row], sinks, count), count};
}

inline float sum_of(const float* numbers, int first, int stop) {
  float sum = 0.0f;
  for (int i = first; i < stop; ++i) sum += numbers[i];
  return sum;
}

inline float sum_of_zones(const float* numbers, const Zones& zones) {
  return sum_of(numbers, 0, zones.sinks) + sum_of(numbers, zones.first, zones.count);
}

// mean += weights * factor
KEYSIFT_INLINE void add_shares(const float* weights, std::int64_t size, float factor, float* mean) {
  for (std::int64_t i = 0; i < size; i += kLanes)
    store(mean + i, fma(load(weights + i), splat(factor), load(mean + i)));
}

// Drops what is not needed to leave out at most `epsilon`; pages: ascending before and after. Returns how many stay.
inline int cut_list(const float* shares, float left, float epsilon, std::int32_t* pages, int count,
                    std::int32_t* order) {
  std::copy_n(pages, count, order);
  std::sort(order, order + count,
            [&](std::int32_t a, std::int32_t b) { return shares[a] != shares[b] ? shares[a] > shares[b] : a < b; });
  int kept = 0;
  for (float before = 0.0f; kept < count && left - before > epsilon; ++kept) before += shares[order[kept]];
  std::sort(order, order + kept);
  std::copy_n(order, kept, pages);
  return kept;
}

inline std::int32_t* put_range(int first, int stop, std::int32_t* out, const std::int32_t* end) {
  while (first < stop && out < end) *out++ = first++;
  return out;
}

inline void write_list(const TopCall& call, std::int64_t list, const Zones& zones, const std::int32_t* pages,
                       int count) {
  std::int32_t* out = call.out + list * call.width;
  std::int32_t* end = out + call.width;
  out = put_range(0, zones.sinks, out, end);
  out = std::copy_n(pages, std::min<std::int64_t>(count, end - out), out);
  out = put_range(zones.first, zones.count, out, end);
  std::fill(out, end, -1);
}

// Weights of a list's heads: exponentials [group, size], factors that make shares of them [group], and their mean share
// [size], zeros past the last page. Pages that are never chosen may be marked in `shares`; one number more fits.
struct ListShares {
  std::int64_t head, group, size;
  float *weights, *factors, *shares;
};

inline ListShares shares_of(const TopCall& call, std::int64_t list, const Zones& zones, TopMemory& memory) {
  const std::int64_t row = list / call.lists, group = call.heads / call.lists, size = padded(zones.count);
  float* weights = memory.weights.floats(group * size + group);
  const ListShares made{row * call.heads + list % call.lists * group, group, size,
                        weights, weights + group * size, memory.group.floats(size + 1)};
  std::fill_n(made.shares, size, 0.0f);
  for (std::int64_t g = 0; g < group; ++g) {
    made.factors[g] = exponentials(call.masses + (made.head + g) * call.pages, zones.count, weights + g * size);
    add_shares(weights + g * size, size, made.factors[g] / static_cast<float>(group), made.shares);
  }
  return made;
}

// Marks the zones, so that none of their pages is among the highest.
inline void hide_zones(const ListShares& list, const Zones& zones) {
  std::fill_n(list.shares, zones.sinks, -1.0f);
  std::fill(list.shares + zones.first, list.shares + list.size, -1.0f);
}

// Share of each head on the zones and on these pages.
inline void write_kept(const TopCall& call, const ListShares& list, const Zones& zones, const std::int32_t* pages,
                       int count) {
  for (std::int64_t g = 0; g < list.group; ++g) {
    const float* mine = list.weights + g * list.size;
    float kept = sum_of_zones(mine, zones);
    for (int i = 0; i < count; ++i) kept += mine[pages[i]];
    call.kept[list.head + g] = kept * list.factors[g];
  }
}

inline void choose_list(const TopCall& call, std::int64_t list) {
  static thread_local TopMemory memory;
  const Zones zones = zones_of(call, list / call.lists);
  const ListShares made = shares_of(call, list, zones, memory);
  const float left = 1.0f - sum_of_zones(made.shares, zones);
  hide_zones(made, zones);
  auto* pages = reinterpret_cast<std::int32_t*>(memory.pages.floats(call.budget + 1));
  int count = take_highest(made.shares, made.size, static_cast<int>(call.budget), 1, pages);
  if (call.epsilon > 0.0f)
    count = cut_list(made.shares, left, call.epsilon, pages, count,
                reinterpret_cast<std::int32_t*>(memory.order.floats(call.budget + 1)));
  write_list(call, list, zones, pages, count);
  write_kept(call, made, zones, pages, count);
}

inline void top_pages(const TopCall& call, int threads) {
  for_each_task(call.rows * call.lists, threads, [&](std::int64_t list) { choose_list(call, list); });
}

}  // namespace keysift::KEYSIFT_ISA
