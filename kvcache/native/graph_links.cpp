// From the nearest keys of training queries to a graph over the keys alone.
#include "graph_links.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "threads.h"

namespace keysift {
namespace {

// Which queries want a token: `queries[first[token] ... first[token + 1] - 1]`, ascending.
struct Wanted {
  std::vector<std::int32_t> first, queries;
};

Wanted invert(const std::int32_t* near, const GraphLinksCall& call) {
  const std::int64_t total = call.queries * call.wanted;
  Wanted wanted;
  wanted.first.assign(call.tokens + 1, 0);
  for (std::int64_t i = 0; i < total; ++i)
    if (near[i] >= 0) ++wanted.first[near[i] + 1];
  for (std::int64_t token = 0; token < call.tokens; ++token) wanted.first[token + 1] += wanted.first[token];
  wanted.queries.resize(wanted.first[call.tokens]);
  std::vector<std::int32_t> next(wanted.first.begin(), wanted.first.end() - 1);
  for (std::int64_t i = 0; i < total; ++i)
    if (near[i] >= 0) wanted.queries[next[near[i]]++] = static_cast<std::int32_t>(i / call.wanted);
  return wanted;
}

struct Partner {
  double score;
  std::int32_t distance, token;

  bool operator<(const Partner& other) const {  // the stronger, the nearer in the text, the lower
    if (score != other.score) return score > other.score;
    return distance < other.distance || (distance == other.distance && token < other.token);
  }
};

struct Counter {
  std::vector<std::int32_t> counts, met;
  std::vector<Partner> ranked;
};

// Ranks the tokens that share queries with this one, by the square of the cosine between the sets of queries that want
// them: shared^2 / wanted, but for a factor that is the same for all. Those wanted by everyone do not crowd out others.
void rank_partners(const std::int32_t* near, const GraphLinksCall& call, const Wanted& wanted, std::int32_t token,
                   Counter& counter) {
  for (std::int32_t i = wanted.first[token]; i < wanted.first[token + 1]; ++i)
    for (std::int64_t j = 0; j < call.wanted; ++j) {
      const std::int32_t other = near[wanted.queries[i] * call.wanted + j];
      if (other >= 0 && other != token && counter.counts[other]++ == 0) counter.met.push_back(other);
    }
  counter.ranked.clear();
  for (const std::int32_t other : counter.met) {
    const double shared = counter.counts[other], all = wanted.first[other + 1] - wanted.first[other];
    counter.ranked.push_back({shared * shared / all, std::abs(other - token), other});
    counter.counts[other] = 0;
  }
  counter.met.clear();
}

void write_links(const GraphLinksCall& call, Counter& counter, std::int32_t* links) {
  const auto kept = std::min<std::int64_t>(static_cast<std::int64_t>(counter.ranked.size()), call.degree);
  std::partial_sort(counter.ranked.begin(), counter.ranked.begin() + kept, counter.ranked.end());
  for (std::int64_t i = 0; i < call.degree; ++i) links[i] = i < kept ? counter.ranked[i].token : -1;
}

bool holds(const std::int32_t* tokens, std::int64_t count, std::int32_t token) {
  return std::find(tokens, tokens + count, token) != tokens + count;
}

// Makes sure that tokens are found, not only find: in each round every token asks those that it is linked with, the
// strongest first, for a link back. They give at most a quarter of their links, the weakest ones.
void link_back(const GraphLinksCall& call, std::int32_t* links) {
  const std::int64_t degree = call.degree, room = degree / 4, firm = degree - room;
  std::vector<std::int32_t> given(call.tokens * room, -1), count(call.tokens, 0);
  for (std::int64_t round = 0; round < room; ++round)
    for (std::int64_t token = 0; token < call.tokens; ++token)
      for (std::int64_t i = 0; i < degree && links[token * degree + i] >= 0; ++i) {
        const std::int64_t to = links[token * degree + i];
        const auto self = static_cast<std::int32_t>(token);
        if (count[to] == room || holds(links + to * degree, firm, self) || holds(&given[to * room], count[to], self))
          continue;
        given[to * room + count[to]++] = self;
        break;
      }
  std::vector<std::int32_t> merged;
  for (std::int64_t token = 0; token < call.tokens; ++token) {
    std::int32_t* own = links + token * degree;
    merged.assign(own, std::find(own, own + firm, -1));
    merged.insert(merged.end(), &given[token * room], &given[token * room] + count[token]);
    for (std::int64_t i = firm; i < degree && own[i] >= 0; ++i)
      if (!holds(merged.data(), static_cast<std::int64_t>(merged.size()), own[i])) merged.push_back(own[i]);
    merged.resize(degree, -1);
    std::copy(merged.begin(), merged.end(), own);
  }
}

}  // namespace

void graph_links(const GraphLinksCall& call, int threads) {
  constexpr std::int64_t kTokensOfTask = 1024;
  const std::int64_t blocks = (call.tokens + kTokensOfTask - 1) / kTokensOfTask;
  std::vector<Wanted> wanted(call.kv_heads);
  for_each_task(call.kv_heads, threads, [&](std::int64_t head) {
    wanted[head] = invert(call.nearest + head * call.queries * call.wanted, call);
  });
  for_each_task(call.kv_heads * blocks, threads, [&](std::int64_t task) {
    const std::int64_t head = task / blocks, end = std::min(call.tokens, (task % blocks + 1) * kTokensOfTask);
    Counter counter;
    counter.counts.assign(call.tokens, 0);
    for (std::int64_t token = task % blocks * kTokensOfTask; token < end; ++token) {
      rank_partners(call.nearest + head * call.queries * call.wanted, call, wanted[head],
                    static_cast<std::int32_t>(token), counter);
      write_links(call, counter, call.links + (head * call.tokens + token) * call.degree);
    }
  });
  if (call.degree >= 4)
    for_each_task(call.kv_heads, threads,
                  [&](std::int64_t head) { link_back(call, call.links + head * call.tokens * call.degree); });
}

}  // namespace keysift
