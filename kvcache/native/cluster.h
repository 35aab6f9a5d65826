// Lists of keys that lie close together: k-means over segments of a sequence. Every sum has a fixed order, so the same
// keys make the same lists.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kAssigned = 6;               // keys that share one reading of the centroids
constexpr int kPanel = kColumns * kLanes;  // centroids whose sums fit into the registers

// The keys of one segment and KV head, less their mean.
struct Cloud {
  int count, dim, lists, padded;  // padded: lists in whole panels
  float* keys;                    // [count, dim]
  float* mean;                    // [dim]
  float* centroids;               // [lists, dim]
  float* panels;                  // [padded / kPanel, dim, kPanel], the same
  float* lead;                    // [padded], -|centroid|^2 / 2; -inf pads
  std::int32_t* nearest;          // [count], the list that each key belongs to
  std::int32_t* before;           // [count], the round before
  std::int32_t* sizes;            // [lists]
};

inline Cloud make_cloud(Buffer& memory, const ClusterCall& call) {
  Cloud cloud{};
  cloud.count = static_cast<int>(call.pages * call.page_size);
  cloud.dim = static_cast<int>(call.dim);
  cloud.lists = static_cast<int>(call.lists);
  cloud.padded = (cloud.lists + kPanel - 1) / kPanel * kPanel;
  const std::size_t dim = cloud.dim, count = cloud.count, lists = cloud.lists, padded = cloud.padded;
  cloud.panels = memory.floats((count + 1 + lists + padded) * dim + padded + 2 * count + lists);
  cloud.keys = cloud.panels + padded * dim;
  cloud.mean = cloud.keys + count * dim;
  cloud.centroids = cloud.mean + dim;
  cloud.lead = cloud.centroids + lists * dim;
  cloud.nearest = reinterpret_cast<std::int32_t*>(cloud.lead + padded);
  cloud.before = cloud.nearest + count;
  cloud.sizes = cloud.before + count;
  std::fill_n(cloud.nearest, count, -1);
  return cloud;
}

KEYSIFT_INLINE void add_to(const float* x, int dim, float* sums) {
  for (int i = 0; i < dim; i += kLanes) store(sums + i, load(sums + i) + load(x + i));
}

// Reads the keys, and starts with every so many-th of them as a centroid.
template <class T>
void read_keys(const ClusterCall& call, std::int64_t segment, std::int64_t head, const Cloud& cloud) {
  const std::int32_t* frames = call.frames + segment * call.frames_strides[0] + head * call.frames_strides[1];
  const T* keys = static_cast<const T*>(call.k) + head * call.k_strides[1];
  const int size = static_cast<int>(call.page_size), dim = cloud.dim;
  std::fill_n(cloud.mean, dim, 0.0f);
  for (int i = 0; i < cloud.count; ++i) {
    const T* key = keys + frames[i / size * call.frames_strides[2]] * call.k_strides[0] + i % size * call.k_strides[2];
    for (int c = 0; c < dim; c += kLanes) store(cloud.keys + std::int64_t{i} * dim + c, widen(key + c));
    add_to(cloud.keys + std::int64_t{i} * dim, dim, cloud.mean);
  }
  for (int c = 0; c < dim; ++c) cloud.mean[c] /= static_cast<float>(cloud.count);
  for (int i = 0; i < cloud.count; ++i) {
    float* key = cloud.keys + std::int64_t{i} * dim;
    for (int c = 0; c < dim; c += kLanes) store(key + c, load(key + c) - load(cloud.mean + c));
  }
  for (int list = 0; list < cloud.lists; ++list)
    std::copy_n(cloud.keys + std::int64_t{list} * cloud.count / cloud.lists * dim, dim,
                cloud.centroids + std::int64_t{list} * dim);
}

// Lays the centroids out for `nearest_of`.
inline void make_panels(const Cloud& cloud) {
  std::fill_n(cloud.lead + cloud.lists, cloud.padded - cloud.lists, kNothing);
  std::fill_n(cloud.panels + std::int64_t{cloud.padded - kPanel} * cloud.dim, kPanel * cloud.dim, 0.0f);
  for (int list = 0; list < cloud.lists; ++list) {
    const float* centroid = cloud.centroids + std::int64_t{list} * cloud.dim;
    float* column = cloud.panels + std::int64_t{list / kPanel} * kPanel * cloud.dim + list % kPanel;
    Vec square = splat(0.0f);
    for (int c = 0; c < cloud.dim; c += kLanes) square = fma(load(centroid + c), load(centroid + c), square);
    for (int c = 0; c < cloud.dim; ++c) column[c * kPanel] = centroid[c];
    cloud.lead[list] = -0.5f * total(square);
  }
}

// The lane that holds the most, and of equals the one that stands for the lower list.
inline std::int32_t lowest_best(Vec best, Int where) {
  const float top = highest(best);
  std::int32_t found = INT32_MAX;
  for (int lane = 0; lane < kLanes; ++lane)
    if (best[lane] == top && where[lane] < found) found = where[lane];
  return found == INT32_MAX ? 0 : found;  // nothing equals a NaN
}

// The list of each of kAssigned keys: the greatest x . centroid - |centroid|^2 / 2 has the least distance.
inline void nearest_of(const float* const (&keys)[kAssigned], const Cloud& cloud, std::int32_t* out) {
  Vec best[kAssigned];
  Int where[kAssigned], lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < kAssigned; ++r) best[r] = splat(kNothing), where[r] = Int{};
  for (int first = 0; first < cloud.padded; first += kPanel) {
    const float* panel = cloud.panels + std::int64_t{first} * cloud.dim;
    Vec sums[kAssigned][kColumns];
#pragma GCC unroll 6
    for (int r = 0; r < kAssigned; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = load(cloud.lead + first + c * kLanes);
    for (int i = 0; i < cloud.dim; ++i) {
      Vec columns[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) columns[c] = load(panel + i * kPanel + c * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kAssigned; ++r) {
        const Vec x = splat(keys[r][i]);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(x, columns[c], sums[r][c]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kAssigned; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const auto higher = sums[r][c] > best[r];
        best[r] = higher ? sums[r][c] : best[r];
        where[r] = higher ? lane + (first + c * kLanes) : where[r];
      }
  }
  for (int r = 0; r < kAssigned; ++r) out[r] = lowest_best(best[r], where[r]);
}

// Gives every key its list; false where none has changed.
inline bool assign(Cloud& cloud) {
  std::int32_t* last = cloud.nearest;
  cloud.nearest = cloud.before;
  cloud.before = last;
  make_panels(cloud);
  for (int i = 0; i < cloud.count; i += kAssigned) {
    const float* keys[kAssigned];
    std::int32_t lists[kAssigned];
    for (int r = 0; r < kAssigned; ++r)
      keys[r] = cloud.keys + std::int64_t{std::min(i + r, cloud.count - 1)} * cloud.dim;
    nearest_of(keys, cloud, lists);
    std::copy_n(lists, std::min(kAssigned, cloud.count - i), cloud.nearest + i);
  }
  return __builtin_memcmp(cloud.nearest, cloud.before, sizeof(std::int32_t) * cloud.count) != 0;
}

// Moves each centroid to the mean of its keys; one without keys stays.
inline void move_centroids(const Cloud& cloud) {
  std::fill_n(cloud.sizes, cloud.lists, 0);
  for (int i = 0; i < cloud.count; ++i) {
    float* sums = cloud.centroids + std::int64_t{cloud.nearest[i]} * cloud.dim;
    if (cloud.sizes[cloud.nearest[i]]++ == 0) std::fill_n(sums, cloud.dim, 0.0f);
    add_to(cloud.keys + std::int64_t{i} * cloud.dim, cloud.dim, sums);
  }
  for (int list = 0; list < cloud.lists; ++list) {
    if (cloud.sizes[list] == 0) continue;
    float* centroid = cloud.centroids + std::int64_t{list} * cloud.dim;
    for (int c = 0; c < cloud.dim; ++c) centroid[c] /= static_cast<float>(cloud.sizes[list]);
  }
}

template <class T>
void write_lists(const ClusterCall& call, std::int64_t which, const Cloud& cloud) {
  std::int16_t* tokens = call.tokens + which * cloud.count;
  std::int32_t* ends = call.ends + which * cloud.lists;
  T* centroids = static_cast<T*>(call.centroids) + which * cloud.lists * cloud.dim;
  for (int list = 0, end = 0; list < cloud.lists; ++list) {
    ends[list] = end;  // where the list begins; writing its tokens moves it to where it ends
    end += cloud.sizes[list];
  }
  for (int i = 0; i < cloud.count; ++i) tokens[ends[cloud.nearest[i]]++] = static_cast<std::int16_t>(i);
  for (int list = 0; list < cloud.lists; ++list)
    for (int c = 0; c < cloud.dim; c += kLanes) {
      const std::int64_t at = std::int64_t{list} * cloud.dim + c;
      narrow(load(cloud.centroids + at) + load(cloud.mean + c), centroids + at);
    }
}

template <class T>
void cluster_of(const ClusterCall& call, int threads) {
  for_each_task(call.segments * call.kv_heads, threads, [&](std::int64_t task) {
    static thread_local Buffer memory;
    Cloud cloud = make_cloud(memory, call);
    read_keys<T>(call, task / call.kv_heads, task % call.kv_heads, cloud);
    for (std::int64_t i = 0; i < call.iterations && assign(cloud); ++i) move_centroids(cloud);
    write_lists<T>(call, task, cloud);
  });
}

}  // namespace keysift::KEYSIFT_ISA
