// Descriptions of a full page: its summary, and its keys in a few bits.
#pragma once

namespace keysift::KEYSIFT_ISA {

typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));

// The numbers from p on, of which `there` are left; 0 past them.
template <class T>
KEYSIFT_INLINE Vec widen_part(const T* p, std::int64_t there) {
  if (there >= kLanes) return widen(p);
  T some[kLanes] = {};
  __builtin_memcpy(some, p, there * sizeof *p);
  return widen(some);
}

template <class T>
KEYSIFT_INLINE void narrow_part(Vec v, T* p, std::int64_t there) {
  if (there >= kLanes) return narrow(v, p);
  T some[kLanes];
  narrow(v, some);
  __builtin_memcpy(p, some, there * sizeof *p);
}

KEYSIFT_INLINE Bytes to_bytes(Vec whole) {
  return __builtin_convertvector(__builtin_convertvector(whole, Int), Bytes);
}

// A NaN among the numbers stays.
KEYSIFT_INLINE Vec lower(Vec least, Vec x) { return (x < least) | (x != x) ? x : least; }
KEYSIFT_INLINE Vec higher(Vec greatest, Vec x) { return (x > greatest) | (x != x) ? x : greatest; }

template <class T>
void summarize_page(const FillCall& call, std::int64_t frame, std::int64_t head) {
  const T* keys = static_cast<const T*>(call.k) + frame * call.k_strides[0] + head * call.k_strides[1];
  const T* values = static_cast<const T*>(call.v) + frame * call.v_strides[0] + head * call.v_strides[1];
  T* out = static_cast<T*>(call.summaries) + frame * call.summaries_strides[0] + head * call.summaries_strides[1];
  const Vec size = splat(static_cast<float>(call.page_size));
  for (std::int64_t d = 0; d < call.dim; d += kLanes) {
    const std::int64_t there = call.dim - d;
    Vec least = widen_part(keys + d, there), greatest = least, key_sum = least;
    Vec value_sum = widen_part(values + d, there);
    for (std::int64_t token = 1; token < call.page_size; ++token) {
      const Vec key = widen_part(keys + token * call.k_strides[2] + d, there);
      least = lower(least, key);
      greatest = higher(greatest, key);
      key_sum = key_sum + key;
      value_sum = value_sum + widen_part(values + token * call.v_strides[2] + d, there);
    }
    const Vec rows[] = {key_sum / size, least, greatest, value_sum / size};
    for (int i = 0; i < 4; ++i) narrow_part(rows[i], out + i * call.summaries_strides[2] + d, there);
  }
}

// Bounds [padded], 0 past channel `dim`, to whole multiples of their scale; they become what these stand for.
inline void round_bounds(float* bounds, std::int64_t dim, std::int8_t* multiples, float* scale) {
  Vec most = {};
  for (std::int64_t d = 0; d < dim; d += kLanes) most = maximum(most, (Vec)((Int)load(bounds + d) & 0x7fffffff));
  *scale = highest(most) / 127;
  const Vec step = splat(*scale), divisor = splat(std::max(*scale, 1e-30f)), shift = splat(0x1.8p23f);
  for (std::int64_t d = 0; d < dim; d += kLanes) {
    const Vec whole = (load(bounds + d) / divisor + shift) - shift;  // half to even
    const Bytes bytes = to_bytes(whole);
    __builtin_memcpy(multiples + d, &bytes, std::min<std::int64_t>(kLanes, dim - d));
    store(bounds + d, fma(whole, step, Vec{}));  // rounded here: no later addition is fused with the product
  }
}

// The cells of a page's channels, [padded] each; past the last, all numbers are in the first cell.
struct Cells {
  float* low;
  float* width;
};

// Writes the bounds of a page; room: [2, padded].
template <class T>
Cells bound_page(const FillCall& call, std::int64_t frame, std::int64_t head, float* room, std::int64_t padded) {
  const T* least = static_cast<const T*>(call.summaries) + frame * call.summaries_strides[0] +
                   head * call.summaries_strides[1] + call.summaries_strides[2];
  const T* greatest = least + call.summaries_strides[2];
  float *middle = room, *half = room + padded;
  for (std::int64_t d = 0; d < call.dim; d += kLanes) {
    const Vec low = widen_part(least + d, call.dim - d), high = widen_part(greatest + d, call.dim - d);
    store(middle + d, (low + high) * splat(0.5f));
    store(half + d, (high - low) * splat(0.5f));
  }
  std::int8_t* multiples = call.bounds + frame * call.bounds_strides[0] + head * call.bounds_strides[1];
  float* scales = call.scales + frame * call.scales_strides[0] + head * call.scales_strides[1];
  round_bounds(middle, call.dim, multiples, scales);
  round_bounds(half, call.dim, multiples + call.bounds_strides[2], scales + 1);
  const Vec share = splat(2.0f / static_cast<float>(1 << call.bits)), narrowest = splat(1e-30f);
  for (std::int64_t d = 0; d < call.dim; d += kLanes) {
    const Vec extent = load(half + d);
    store(middle + d, load(middle + d) - extent);
    store(half + d, maximum(extent * share, narrowest));
  }
  return {middle, half};
}

// The cell of every key, a byte each: levels [S, row], and kLanes more that it may write to.
template <class T>
void find_levels(const FillCall& call, const T* keys, const Cells& cells, std::uint8_t* levels, std::int64_t row) {
  const Vec last = splat(static_cast<float>((1 << call.bits) - 1));
  for (std::int64_t token = 0; token < call.page_size; ++token)
    for (std::int64_t d = 0; d < call.dim; d += kLanes) {
      const Vec key = widen_part(keys + token * call.k_strides[2] + d, call.dim - d);
      Vec cell = (key - load(cells.low + d)) / load(cells.width + d);
      cell = cell > Vec{} ? cell : Vec{};  // a NaN has to be some number
      const Bytes bytes = to_bytes(cell < last ? cell : last);
      __builtin_memcpy(levels + token * row + d, &bytes, sizeof bytes);  // 0 past the last channel
    }
}

// The low bits of 8 bytes, side by side.
template <int kBits>
KEYSIFT_INLINE std::uint32_t squeeze(std::uint64_t bytes) {
  constexpr int kGap = 8 - kBits;
  constexpr std::uint64_t kPairs = ((1u << 2 * kBits) - 1) * 0x0001000100010001u;
  constexpr std::uint64_t kFours = ((1u << 4 * kBits) - 1) * 0x0000000100000001u;
  bytes = (bytes | bytes >> kGap) & kPairs;
  bytes = (bytes | bytes >> 2 * kGap) & kFours;
  return static_cast<std::uint32_t>(bytes | bytes >> 4 * kGap);
}

// levels [S, W * n] to words [W, S].
template <int kBits>
void pack_levels(const FillCall& call, const std::uint8_t* levels, std::int32_t* words) {
  for (std::int64_t word = 0; word < call.words; ++word)
    for (std::int64_t token = 0; token < call.page_size; ++token) {
      std::uint64_t bytes[4 / kBits];
      __builtin_memcpy(bytes, levels + (token * call.words + word) * sizeof bytes, sizeof bytes);
      std::uint32_t packed = squeeze<kBits>(bytes[0]);
      if constexpr (kBits == 2) packed = (packed & 0xffffu) | squeeze<kBits>(bytes[1]) << 16;
      words[word * call.levels_strides[2] + token] = static_cast<std::int32_t>(packed);
    }
}

template <class T>
void encode_page(const FillCall& call, std::int64_t frame, std::int64_t head) {
  static thread_local Buffer memory;
  const std::int64_t padded = (call.dim + kLanes - 1) / kLanes * kLanes, row = call.words * 32 / call.bits;
  const std::int64_t size = call.page_size * row;
  float* room = memory.floats(2 * padded + (size + kLanes + 3) / 4);
  auto* levels = reinterpret_cast<std::uint8_t*>(room + 2 * padded);
  const T* keys = static_cast<const T*>(call.k) + frame * call.k_strides[0] + head * call.k_strides[1];
  std::fill_n(levels, size, 0);
  find_levels(call, keys, bound_page<T>(call, frame, head, room, padded), levels, row);
  std::int32_t* words = call.levels + frame * call.levels_strides[0] + head * call.levels_strides[1];
  (call.bits == 4 ? pack_levels<4> : pack_levels<2>)(call, levels, words);
}

// Calls use(frame, head) for every head of the listed frames.
template <class Use>
void for_each_page(const FillCall& call, int threads, const Use& use) {
  for_each_task(call.filled * call.kv_heads, threads,
                [&](std::int64_t task) { use(call.frames[task / call.kv_heads], task % call.kv_heads); });
}

template <class T>
void summarize_of(const FillCall& call, int threads) {
  for_each_page(call, threads, [&](std::int64_t frame, std::int64_t head) { summarize_page<T>(call, frame, head); });
}

template <class T>
void encode_of(const FillCall& call, int threads) {
  for_each_page(call, threads, [&](std::int64_t frame, std::int64_t head) { encode_page<T>(call, frame, head); });
}

}  // namespace keysift::KEYSIFT_ISA
