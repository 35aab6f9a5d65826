// Cuts one call of column scores into tasks and rounds. Neither the threads nor a row's neighbours change its result.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"

namespace keysift {

constexpr int kTileTokens = 64;              // most keys that are multiplied at once
constexpr int kPieceTiles = 16;              // a sequence is cut into pieces of so many tiles
constexpr int kChunkRows = 256;              // most query rows of one task: they stay in the L2 cache
constexpr std::int64_t kSumsAtOnce = 8 << 20;  // page sums of a round, in floats: 32 MiB

// Split of a sequence's tokens into tiles and pieces. A tile holds whole pages, or a part of one.
struct PageCut {
  PageCut(const ScoresCall& call, std::int32_t last);

  std::int64_t page_size;
  int tile_pages;   // 1 where a page is longer than a tile
  int page_tiles;   // tiles of a page; 1 where a tile holds a whole one
  int piece_pages;
  int piece_tiles;  // also how many tops a piece leaves
  int sums;         // a piece's page sums, and room for its tiles', in floats, padded to whole cache lines
  int pieces;       // up to the last position that any query sees

  std::int64_t tile_tokens() const { return page_tiles > 1 ? kTileTokens : tile_pages * page_size; }
  std::int64_t first_token(int piece) const { return std::int64_t{piece} * piece_pages * page_size; }
};

struct ProbeQuery {
  std::int32_t position, query;  // query: index into q
};

// Queries of one sequence, and one KV head's query heads. Row = query * G + head.
struct Chunk {
  std::int32_t probe, kv_head;   // probe: whose frames all of them use
  std::int32_t query, queries;   // entries of the order
  std::int64_t row;              // where the sums of its first row lie
};

struct ScoresTask {
  std::int32_t chunk, piece;
};

struct ScoresPlan {
  explicit ScoresPlan(const ScoresCall& call);
  ~ScoresPlan();

  // Lays out the next chunks whose page sums fit into memory; false where none is left.
  bool next_round();

  int group;                          // G
  std::vector<ProbeQuery> order;      // those that exist; of each sequence by position
  PageCut cut;
  int parts;                          // 2: the sums of a page are split for the bands
  std::vector<Chunk> chunks;
  std::vector<ScoresTask> tasks;      // of the round
  std::vector<std::int64_t> rows;     // [Hkv, B * m], where the round keeps a query's G rows; -1: nowhere
  std::int64_t rows_at_once = 0;      // most rows of a round

  std::int64_t row_floats() const { return std::int64_t{cut.pieces} * cut.sums * parts; }

 private:
  void add_sequence(const ScoresCall& call, std::int32_t probe, std::int32_t end);
  void plan_rounds();

  std::int64_t queries_;
  std::vector<std::size_t> ends_;     // of each round, in chunks
  std::size_t round_ = 0;
};

}  // namespace keysift
