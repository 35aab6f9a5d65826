#include "pool.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

namespace keysift {
namespace {

constexpr std::int32_t kNowhere = -1, kComing = -2;

// One KV head's part of the tables.
struct Head {
  std::int32_t *where, *owner, *used, *loads, *slots;
  std::int64_t* found;
};

Head head_of(const AdmitCall& call, std::int64_t head) {
  return {call.where + head * call.count,  call.owner + head * call.capacity, call.used + head * call.capacity,
          call.loads + head * call.width, call.slots + head * call.width,    call.found + head * 3};
}

// Calls use(row, page, frame) for every page that a row lists for a KV head, as often as it is listed.
template <class Use>
void for_each_listed(const AdmitCall& call, std::int64_t head, Use use) {
  const std::int64_t group = call.lists / call.kv_heads;
  for (std::int64_t row = 0; row < call.rows; ++row)
    for (std::int64_t list = head * group; list < (head + 1) * group; ++list)
      for (std::int64_t i = 0; i < call.pages_per_list; ++i) {
        const std::int64_t* strides = call.pages_strides;
        const std::int64_t page = call.pages[row * strides[0] + list * strides[1] + i * strides[2]];
        if (page < 0) break;
        const std::int64_t* places = call.frames_strides;
        use(row, page, call.frames[row * places[0] + head * places[1] + page * places[2]]);
      }
}

// Marks resident pages as read and collects the others. `seen` marks slots that have been met.
void look(const AdmitCall& call, std::int64_t head, std::vector<std::int32_t>& misses, std::vector<char>& seen) {
  const Head mine = head_of(call, head);
  misses.clear();
  seen.assign(call.capacity, 0);
  for_each_listed(call, head, [&](std::int64_t, std::int64_t, std::int32_t frame) {
    const std::int32_t slot = mine.where[frame];
    if (slot == kNowhere) {
      mine.where[frame] = kComing;
      misses.push_back(frame);
    } else if (slot >= 0 && slot < call.capacity && !seen[slot]) {
      seen[slot] = 1;
      ++mine.found[0];
      mine.found[1] += mine.used[slot] % 2 == 1;
      if (call.now % 2 == 0) mine.used[slot] = static_cast<std::int32_t>(call.now);
    }
  });
  mine.found[2] = static_cast<std::int64_t>(misses.size());
  std::sort(misses.begin(), misses.end());
}

// The slots that were read longest ago, as many as are missing.
void choose_victims(const AdmitCall& call, const Head& mine, std::size_t count,
                    std::vector<std::pair<std::int32_t, std::int32_t>>& victims) {
  victims.clear();
  for (std::int32_t slot = 0; slot < call.capacity; ++slot)
    if (mine.used[slot] < call.before) victims.emplace_back(mine.used[slot], slot);
  const auto end = victims.begin() + static_cast<std::ptrdiff_t>(std::min(count, victims.size()));
  std::nth_element(victims.begin(), end, victims.end());
  std::sort(victims.begin(), end);
  victims.erase(end, victims.end());
}

// Tells the rows where their pages are.
void write_table(const AdmitCall& call, std::int64_t head) {
  const std::int32_t* where = head_of(call, head).where;
  for_each_listed(call, head, [&](std::int64_t row, std::int64_t page, std::int32_t frame) {
    call.table[(row * call.kv_heads + head) * call.max_pages + page] = std::max(where[frame], 0);
  });
}

int read_fully(int file, char* target, std::int64_t size, std::int64_t offset) {
  for (std::int64_t done = 0; done < size;) {
    const ssize_t moved =
        pread(file, target + done, static_cast<std::size_t>(size - done), static_cast<off_t>(offset + done));
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return moved < 0 ? errno : EIO;
    done += moved;
  }
  return 0;
}

}  // namespace

void admit(const AdmitCall& call) {
  static thread_local std::vector<std::int32_t> misses;
  static thread_local std::vector<char> seen;
  static thread_local std::vector<std::pair<std::int32_t, std::int32_t>> victims;
  // All memory first: what fails later would leave the tables half written.
  misses.reserve(static_cast<std::size_t>(call.count));
  seen.reserve(static_cast<std::size_t>(call.capacity));
  victims.reserve(static_cast<std::size_t>(call.capacity));
  for (std::int64_t head = 0; head < call.kv_heads; ++head) {
    const Head mine = head_of(call, head);
    look(call, head, misses, seen);
    victims.clear();
    if (!misses.empty()) choose_victims(call, mine, misses.size(), victims);
    for (std::size_t i = 0; i < misses.size(); ++i) {
      if (i >= victims.size()) {
        mine.where[misses[i]] = kNowhere;
        continue;
      }
      const std::int32_t slot = victims[i].second;
      if (mine.owner[slot] >= 0) mine.where[mine.owner[slot]] = kNowhere;
      mine.where[misses[i]] = slot;
      mine.owner[slot] = mine.loads[i] = misses[i];
      mine.slots[i] = slot;
      mine.used[slot] = static_cast<std::int32_t>(call.now);
    }
    write_table(call, head);
  }
}

void read_pieces(ReadCall& call) {
  call.error = 0;
  for (std::int64_t i = 0; i < call.kv_heads * call.width; ++i) {
    if (call.loads[i] < 0) continue;
    const std::int64_t head = i / call.width, frame = call.loads[i];
    const std::int64_t offset = frame / call.extent * call.extent_bytes + call.layer_offset +
                                (frame % call.extent * call.kv_heads + head) * call.piece_bytes;
    char* target = call.pool + (call.slots[i] * call.kv_heads + head) * call.piece_bytes;
    call.error = read_fully(static_cast<int>(call.file), target, call.piece_bytes, offset);
    if (call.error) return;
  }
}

}  // namespace keysift
