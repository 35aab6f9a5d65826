#include "plan.h"

#include <algorithm>

namespace keysift {
namespace {

// The first i in [low, high) for which `holds` is false; it must be true before and false after.
template <class Predicate>
std::int32_t partition(std::int32_t low, std::int32_t high, Predicate holds) {
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (holds(middle))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The entries of the list with a token that some of the task's queries may see.
void clip_pages(const AttentionCall& call, Task& task) {
  const std::int32_t* pages = call.pages + task.row * call.pages_strides[0] + task.list * call.pages_strides[1];
  const std::int64_t first = call.starts[task.row] + task.query, last = first + task.queries - 1;
  auto page = [&](std::int32_t i) { return std::int64_t{pages[i * call.pages_strides[2]]}; };
  const auto end = partition(0, static_cast<std::int32_t>(call.pages_per_list),
                             [&](std::int32_t i) { return page(i) >= 0 && page(i) * call.page_size <= last; });
  task.page = partition(0, end, [&](std::int32_t i) {
    return call.window > 0 && (page(i) + 1) * call.page_size <= first - call.window + 1;
  });
  task.pages = end - task.page;
}

}  // namespace

Plan::Plan(const AttentionCall& call) {
  for (std::int32_t row = 0; row < call.rows; ++row) add_row(call, row);
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return std::int64_t{a.queries} * a.pages > std::int64_t{b.queries} * b.pages;
  });
  missing.reset(new std::atomic<int>[tasks.size()]);
  for (const Task& task : tasks) missing[task.group].store(task.pieces, std::memory_order_relaxed);
}

void Plan::add_row(const AttentionCall& call, std::int32_t row) {
  const auto queries =
      static_cast<std::int32_t>(std::min(call.queries_per_row, call.tokens - row * call.queries_per_row));
  for (std::int32_t query = 0; query < queries; query += kTaskQueries)
    for (std::int32_t list = 0; list < call.lists; ++list)
      add(call, Task{row, list, query, std::min(kTaskQueries, queries - query), 0, 0, 0, 1, 0, 0});
}

void Plan::add(const AttentionCall& call, Task task) {
  clip_pages(call, task);
  const int rows = task.queries * heads_per_list(call);
  const auto step = static_cast<std::int32_t>(std::max<std::int64_t>(1, kPieceTokens / call.page_size));
  const std::int32_t end = task.page + task.pages;
  task.group = static_cast<std::int32_t>(tasks.size());
  task.partial = partials;
  if (rows > kFewQueries || task.pages <= step) {
    tasks.push_back(task);
    return;
  }
  task.pieces = (task.pages + step - 1) / step;
  partials += std::int64_t{task.pieces} * rows;
  for (; task.piece < task.pieces; ++task.piece, task.page += step) {
    task.pages = std::min(step, end - task.page);
    tasks.push_back(task);
  }
}

}  // namespace keysift
