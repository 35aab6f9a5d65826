// From log masses to page lists that change little from one token to the next.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr float kOne = 0x1p40f;  // a share of 1 where shares are added up as integers

struct SteadyMemory {
  TopMemory top;
  std::vector<std::int32_t> queried, candidates, victims, chosen;
};

// One list of a row: its pages of the token before and of this one, and where the averages are kept.
struct SteadyList {
  bool known;
  const std::uint8_t* read;
  const float* averages;
  std::uint8_t* now_read;
  float* now_averages;
};

inline SteadyList steady_list(const SteadyCall& call, std::int64_t list) {
  const std::int64_t at = list * call.top.pages;
  return {call.known[list / call.top.lists] != 0, call.read + at, call.averages + at, call.now_read + at,
          call.now_averages + at};
}

inline void move_averages(const SteadyCall& call, const SteadyList& list, const float* shares, int count) {
  const float keep = call.keep, rest = 1.0f - keep;
  for (int i = 0; i < count; ++i)
    list.now_averages[i] = list.known ? list.averages[i] * keep + shares[i] * rest : shares[i];
  std::fill(list.now_averages + count, list.now_averages + call.top.pages, 0.0f);
}

// Marks the pages that stay, zones included, and collects candidates and victims. Returns the number of residents.
inline int sort_out(const SteadyList& list, const Zones& zones, SteadyMemory& memory) {
  std::fill_n(list.now_read, zones.sinks, std::uint8_t{1});
  std::fill(list.now_read + zones.first, list.now_read + zones.count, std::uint8_t{1});
  memory.candidates.clear();
  memory.victims.clear();
  int residents = 0;
  auto queried = memory.queried.begin();
  for (int page = zones.sinks; page < zones.first; ++page) {
    const bool wanted = queried != memory.queried.end() && *queried == page, there = list.known && list.read[page];
    queried += wanted;
    residents += there;
    list.now_read[page] = there;
    if (wanted && !there) memory.candidates.push_back(page);
    if (there && !wanted) memory.victims.push_back(page);
  }
  return residents;
}

// Number of the sorted candidates that come in by the bound; victim i - spare is the one that candidate i replaces.
inline int admitted(const SteadyCall& call, const SteadyList& list, const SteadyMemory& memory, const float* shares,
                    int spare) {
  const auto count = static_cast<int>(memory.candidates.size());
  if (!list.known) return count;
  const int most = call.most < 0 ? count : static_cast<int>(std::min<std::int64_t>(count, call.most));
  int taken = 0;
  for (; taken < most; ++taken) {
    if (taken < spare || call.factor == 0.0f) continue;
    const std::int32_t victim = memory.victims[taken - spare];
    const float bar = std::max(shares[victim], list.now_averages[victim]);
    if (!(shares[memory.candidates[taken]] > bar * call.factor)) break;
  }
  return taken;
}

// Least number that comes in so that those after them hold no more than may be refused.
inline int needed(const SteadyCall& call, const std::vector<std::int32_t>& candidates, const float* shares) {
  auto count = static_cast<int>(candidates.size());
  for (std::int64_t held = 0; count > 0; --count) {
    held += static_cast<std::int64_t>(shares[candidates[count - 1]] * kOne);
    if (held > call.refusable) break;
  }
  return count;
}

inline void write_refused(const SteadyCall& call, std::int64_t list, std::vector<std::int32_t>& candidates, int taken) {
  std::sort(candidates.begin() + taken, candidates.end());
  std::int32_t* out = call.refused + list * call.queried;
  std::int32_t* end = out + call.queried;
  out = std::copy(candidates.begin() + taken, candidates.end(), out);
  std::fill(out, end, -1);
}

// The pages between the zones, and how many of all the token before had chosen.
inline void write_chosen(const SteadyCall& call, std::int64_t index, const SteadyList& list, const Zones& zones,
                         std::vector<std::int32_t>& chosen) {
  int both = 0, all = 0;
  chosen.clear();
  for (int page = 0; page < zones.count; ++page) {
    if (!list.now_read[page]) continue;
    ++all;
    both += list.known && list.read[page];
    if (page >= zones.sinks && page < zones.first) chosen.push_back(page);
  }
  std::fill(list.now_read + zones.count, list.now_read + call.top.pages, std::uint8_t{0});
  write_list(call.top, index, zones, chosen.data(), static_cast<int>(chosen.size()));
  call.overlap[index] = list.known ? static_cast<float>(both) / static_cast<float>(all) : __builtin_nanf("");
}

// The queried pages, ascending; for a row without history as many as the budget holds.
inline void ask(const SteadyCall& call, const SteadyList& list, const ListShares& made, SteadyMemory& memory) {
  const auto wanted = static_cast<int>(list.known ? call.queried : call.top.budget);
  memory.queried.resize(static_cast<std::size_t>(wanted) + 1);
  memory.queried.resize(take_highest(made.shares, made.size, wanted, 1, memory.queried.data()));
}

inline void choose_steadily(const SteadyCall& call, std::int64_t index) {
  static thread_local SteadyMemory memory;
  const TopCall& top = call.top;
  const Zones zones = zones_of(top, index / top.lists);
  const SteadyList list = steady_list(call, index);
  const ListShares made = shares_of(top, index, zones, memory.top);
  const float* shares = made.shares;
  move_averages(call, list, shares, zones.count);
  hide_zones(made, zones);
  ask(call, list, made, memory);
  const int spare = static_cast<int>(top.budget) - sort_out(list, zones, memory);
  auto &candidates = memory.candidates, &victims = memory.victims;
  std::sort(candidates.begin(), candidates.end(), [&](std::int32_t a, std::int32_t b) {
    return shares[a] != shares[b] ? shares[a] > shares[b] : a < b;
  });
  std::sort(victims.begin(), victims.end(), [&](std::int32_t a, std::int32_t b) {
    return list.now_averages[a] != list.now_averages[b] ? list.now_averages[a] < list.now_averages[b] : a < b;
  });
  const int allowed = admitted(call, list, memory, shares, spare);
  const int taken = std::max(allowed, needed(call, candidates, shares));
  for (int i = 0; i < taken; ++i) list.now_read[candidates[i]] = 1;
  for (int i = 0; i < taken - spare; ++i) list.now_read[victims[i]] = 0;
  call.bound_exceeded[index] = taken > allowed;
  write_chosen(call, index, list, zones, memory.chosen);
  write_refused(call, index, candidates, taken);
  write_kept(top, made, zones, memory.chosen.data(), static_cast<int>(memory.chosen.size()));
}

inline void steady_pages(const SteadyCall& call, int threads) {
  for_each_task(call.top.rows * call.top.lists, threads, [&](std::int64_t list) { choose_steadily(call, list); });
}

}  // namespace keysift::KEYSIFT_ISA
