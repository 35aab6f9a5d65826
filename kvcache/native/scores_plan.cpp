#include "scores_plan.h"

#include <algorithm>

namespace keysift {
namespace {

int divided_up(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

std::int32_t last_position(const ScoresCall& call) {
  const auto* end = call.positions + call.probes * call.queries_per_probe;
  return end == call.positions ? -1 : *std::max_element(call.positions, end);
}

bool same_sequence(const ScoresCall& call, std::int64_t a, std::int64_t b) {
  const std::int64_t* strides = call.frames_strides;
  if (strides[0] == 0) return true;
  for (std::int64_t head = 0; head < call.kv_heads; ++head)
    for (std::int64_t page = 0; page < call.pages; ++page) {
      const std::int32_t* frame = call.frames + head * strides[1] + page * strides[2];
      if (frame[a * strides[0]] != frame[b * strides[0]]) return false;
    }
  return true;
}

}  // namespace

PageCut::PageCut(const ScoresCall& call, std::int32_t last)
    : page_size(call.page_size),
      tile_pages(static_cast<int>(std::max<std::int64_t>(1, kTileTokens / page_size))),
      page_tiles(divided_up(page_size, kTileTokens)),
      piece_pages(page_tiles > 1 ? std::max(1, kPieceTiles / page_tiles) : kPieceTiles * tile_pages),
      piece_tiles(page_tiles > 1 ? piece_pages * page_tiles : kPieceTiles),
      sums((std::max(piece_pages, piece_tiles) + 15) / 16 * 16),
      pieces(divided_up(std::int64_t{last} + 1, piece_pages * page_size)) {}

ScoresPlan::ScoresPlan(const ScoresCall& call)
    : group(static_cast<int>(call.heads / call.kv_heads)),
      cut(call, last_position(call)),
      parts(call.bands == nullptr ? 1 : 2),
      rows(call.kv_heads * call.probes * call.queries_per_probe, -1),
      queries_(call.probes * call.queries_per_probe) {
  for (std::int32_t probe = 0, end; probe < call.probes; probe = end) {
    end = probe + 1;
    while (end < call.probes && same_sequence(call, probe, end)) ++end;
    add_sequence(call, probe, end);
  }
  plan_rounds();
}

ScoresPlan::~ScoresPlan() = default;  // here, so that it is compiled for any processor

// Cuts the queries of probes [probe, end), which share a sequence, evenly.
void ScoresPlan::add_sequence(const ScoresCall& call, std::int32_t probe, std::int32_t end) {
  const auto first = static_cast<std::int32_t>(order.size());
  for (auto query = probe * call.queries_per_probe; query < end * call.queries_per_probe; ++query)
    if (call.positions[query] >= 0) order.push_back({call.positions[query], static_cast<std::int32_t>(query)});
  std::stable_sort(order.begin() + first, order.end(),
                   [](const ProbeQuery& a, const ProbeQuery& b) { return a.position < b.position; });
  const auto count = static_cast<std::int32_t>(order.size()) - first;
  if (count == 0) return;
  const auto most = std::max<std::int64_t>(1, std::min<std::int64_t>(kChunkRows, kSumsAtOnce / row_floats()) / group);
  const int chunks_of_head = divided_up(count, most), each = divided_up(count, chunks_of_head);
  for (std::int32_t query = 0; query < count; query += each)
    for (std::int32_t head = 0; head < call.kv_heads; ++head)
      chunks.push_back({probe, head, first + query, std::min(each, count - query), 0});
}

void ScoresPlan::plan_rounds() {
  std::int64_t used = 0;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    const std::int64_t needed = std::int64_t{chunks[i].queries} * group;
    if (used > 0 && (used + needed) * row_floats() > kSumsAtOnce) {
      ends_.push_back(i);
      used = 0;
    }
    chunks[i].row = used;
    used += needed;
    rows_at_once = std::max(rows_at_once, used);
  }
  if (!chunks.empty()) ends_.push_back(chunks.size());
}

bool ScoresPlan::next_round() {
  if (round_ == ends_.size()) return false;
  tasks.clear();
  std::fill(rows.begin(), rows.end(), -1);
  for (std::size_t i = round_ > 0 ? ends_[round_ - 1] : 0; i < ends_[round_]; ++i) {
    const Chunk& chunk = chunks[i];
    const std::int64_t last = order[chunk.query + chunk.queries - 1].position;
    for (std::int32_t piece = 0; piece < cut.pieces && cut.first_token(piece) <= last; ++piece)
      tasks.push_back({static_cast<std::int32_t>(i), piece});
    for (std::int32_t query = 0; query < chunk.queries; ++query)
      rows[chunk.kv_head * queries_ + order[chunk.query + query].query] = chunk.row + std::int64_t{query} * group;
  }
  ++round_;
  return true;
}

}  // namespace keysift
