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

inline void choose_list(const TopCall& call, std::int64_t list) {
  static thread_local TopMemory memory;
  const std::int64_t row = list / call.lists, group = call.heads / call.lists;
  const std::int64_t head = row * call.heads + list % call.lists * group;
  const Zones zones = zones_of(call, row);
  const std::int64_t size = padded(zones.count);
  float* weights = memory.weights.floats(group * size + group);
  float* factors = weights + group * size;
  float* shares = memory.group.floats(size + 1);
  std::fill_n(shares, size, 0.0f);
  for (std::int64_t g = 0; g < group; ++g) {
    factors[g] = exponentials(call.masses + (head + g) * call.pages, zones.count, weights + g * size);
    add_shares(weights + g * size, size, factors[g] / static_cast<float>(group), shares);
  }
  const float left = 1.0f - sum_of_zones(shares, zones);
  std::fill_n(shares, zones.sinks, -1.0f);
  std::fill(shares + zones.first, shares + size, -1.0f);
  auto* pages = reinterpret_cast<std::int32_t*>(memory.pages.floats(call.budget + 1));
  int count = take_highest(shares, size, static_cast<int>(call.budget), 1, pages);
  if (call.epsilon > 0.0f)
    count = cut_list(shares, left, call.epsilon, pages, count,
                reinterpret_cast<std::int32_t*>(memory.order.floats(call.budget + 1)));
  write_list(call, list, zones, pages, count);
  for (std::int64_t g = 0; g < group; ++g) {
    const float* mine = weights + g * size;
    float kept = sum_of_zones(mine, zones);
    for (int i = 0; i < count; ++i) kept += mine[pages[i]];
    call.kept[head + g] = kept * factors[g];
  }
}

inline void top_pages(const TopCall& call, int threads) {
  for_each_task(call.rows * call.lists, threads, [&](std::int64_t list) { choose_list(call, list); });
}

}  // namespace keysift::KEYSIFT_ISA
