// Cuts one call of paged attention into tasks. Only a row's own length decides how it is cut, never its neighbours.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "abi.h"

namespace keysift {

constexpr int kFewQueries = 8;      // so many query rows, or fewer, are read against pages in place
constexpr int kTaskQueries = 64;    // most queries of one task: their accumulators stay in the L2 cache
constexpr int kPieceTokens = 1024;  // a long decode row is cut into pieces of so many tokens

// Some queries of one row against a piece of one page list.
struct Task {
  std::int32_t row, list;
  std::int32_t query, queries;  // within the row
  std::int32_t page, pages;     // entries of the list
  std::int32_t piece, pieces;   // this piece and how many its queries have
  std::int32_t group;           // counts the pieces still to come
  std::int64_t partial;         // where piece 0 leaves its partial result
};

struct Plan {
  explicit Plan(const AttentionCall& call);

  // The query heads that share a list.
  int heads_per_list(const AttentionCall& call) const { return static_cast<int>(call.heads / call.lists); }

  std::vector<Task> tasks;  // the most work first
  std::int64_t partials = 0;
  std::unique_ptr<std::atomic<int>[]> missing;  // per group: pieces still to come

 private:
  void add_row(const AttentionCall& call, std::int32_t row);
  void add(const AttentionCall& call, Task task);
};

}  // namespace keysift
