// Walks a task's pages and hands out their tokens in tiles.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kTile = 64;  // tokens of a tile
constexpr int kMaxDim = 256;
constexpr std::int32_t kTooOld = -1, kTooNew = INT32_MAX;  // stand for positions that no query of the task may see

alignas(64) inline const float kZeros[kMaxDim] = {};

template <class T>
KEYSIFT_INLINE void prefetch(const T* row, int dim) {
  for (std::size_t byte = 0; byte < dim * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// Tokens that none of the task's queries may see point to zeros: what their slots hold cannot leak, not even as 0 *
// NaN.
template <class T>
struct KeyTile {
  const T* keys[kTile];
  const T* values[kTile];
  alignas(64) std::int32_t positions[kTile];  // ascending
  int count;                                  // tokens, before the padding
  bool gaps;                                  // some position is kTooOld or kTooNew
  std::int32_t first, last;                   // of the other positions
};

template <class T>
class KeyWalk {
 public:
  KeyWalk(const AttentionCall& call, const Task& task)
      : call_(call),
        page_(task.page),
        end_(task.page + task.pages),
        pages_stride_(call.pages_strides[2]),
        frames_stride_(call.frames_strides[2]) {
    const std::int64_t kv_head = task.list / (call.lists / call.kv_heads);
    pages_ = call.pages + task.row * call.pages_strides[0] + task.list * call.pages_strides[1];
    frames_ = call.frames + task.row * call.frames_strides[0] + kv_head * call.frames_strides[1];
    keys_ = static_cast<const T*>(call.k) + kv_head * call.k_strides[1];
    values_ = static_cast<const T*>(call.v) + kv_head * call.v_strides[1];
    last_seen_ = call.starts[task.row] + task.query + task.queries - 1;
    before_seen_ = call.window > 0 ? call.starts[task.row] + task.query - call.window : -1;
  }

  // Fills the next tile; false where no token is left.
  bool next(KeyTile<T>& tile) {
    tile.count = 0;
    tile.gaps = false;
    tile.first = kTooNew;
    tile.last = -1;
    while (tile.count < kTile && page_ < end_) take_run(tile);
    const bool gaps = tile.gaps || tile.count % kLanes > 0;  // padding of whole vectors is never read
    for (int i = tile.count; i < kTile; ++i) hide(tile, i, kTooNew);
    tile.gaps = gaps;
    return tile.count > 0;
  }

 private:
  // Appends the rest of the current page, as far as it fits.
  void take_run(KeyTile<T>& tile) {
    const std::int64_t page = pages_[page_ * pages_stride_], frame = frames_[page * frames_stride_];
    const int run = static_cast<int>(std::min<std::int64_t>(call_.page_size - offset_, kTile - tile.count));
    const auto position = static_cast<std::int32_t>(page * call_.page_size + offset_);
    const T* key = keys_ + frame * call_.k_strides[0] + offset_ * call_.k_strides[2];
    const T* value = values_ + frame * call_.v_strides[0] + offset_ * call_.v_strides[2];
    for (int i = 0; i < run; ++i) {
      tile.keys[tile.count + i] = key + i * call_.k_strides[2];
      tile.values[tile.count + i] = value + i * call_.v_strides[2];
      tile.positions[tile.count + i] = position + i;
    }
    note_sight(tile, position, run);
    tile.count += run;
    offset_ += run;
    if (offset_ == call_.page_size) offset_ = 0, ++page_;
  }

  void note_sight(KeyTile<T>& tile, std::int32_t position, int run) {
    const std::int64_t first = std::max<std::int64_t>(position, before_seen_ + 1);
    const std::int64_t last = std::min<std::int64_t>(position + run - 1, last_seen_);
    for (int i = 0; i < run; ++i) {
      if (position + i < first) hide(tile, tile.count + i, kTooOld);
      if (position + i > last) hide(tile, tile.count + i, kTooNew);
    }
    if (first > last) return;
    tile.first = std::min(tile.first, static_cast<std::int32_t>(first));
    tile.last = std::max(tile.last, static_cast<std::int32_t>(last));
  }

  void hide(KeyTile<T>& tile, int i, std::int32_t position) {
    tile.keys[i] = tile.values[i] = reinterpret_cast<const T*>(kZeros);
    tile.positions[i] = position;
    tile.gaps = true;
  }

  const AttentionCall& call_;
  const std::int32_t* pages_;
  const std::int32_t* frames_;
  const T* keys_;
  const T* values_;
  std::int64_t page_, end_, pages_stride_, frames_stride_, offset_ = 0, last_seen_, before_seen_;
};

}  // namespace keysift::KEYSIFT_ISA
