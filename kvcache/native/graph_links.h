// Parts of the key graphs that no instruction set changes.
#pragma once

#include <cstdint>

#include "abi.h"

namespace keysift {

constexpr int kMaxWalks = 64;  // query heads of a KV head

struct ScoredToken {
  float score;
  std::int32_t token;
  bool expanded;
};

// The best first; of equal ones the lower.
inline bool before(const ScoredToken& a, const ScoredToken& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// Links keys that the same queries want.
void graph_links(const GraphLinksCall& call, int threads);

}  // namespace keysift
