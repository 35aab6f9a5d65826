// Dot products of a few vectors with many rows of memory that are read once, in place.
#pragma once

namespace keysift::KEYSIFT_ISA {

// out[v * stride + r] = x[v] . rows[r]. Each product is summed in the same order for every N, so a vector's bits do not
// depend on its company. One row comes after the other: the processor fetches a single stream ahead by itself, and
// reorders enough to fill the wait for a row's two sums with the next row.
template <class Math, int N, int R>
KEYSIFT_INLINE void dots(const typename Math::Element* const* x, const typename Math::Element* const* rows,
                         std::int64_t size, float* out, int stride) {
  static_assert(R % 4 == 0);
  constexpr int kStep = kLanes * Math::kPair;
  Vec sums[N][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec even[N] = {}, odd[N] = {};
    std::int64_t i = 0;
    for (; i + 2 * kStep <= size; i += 2 * kStep) {
      const Vec first = Math::cells(rows[r] + i), second = Math::cells(rows[r] + i + kStep);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        even[v] = Math::multiply_add(Math::cells(x[v] + i), first, even[v]);
        odd[v] = Math::multiply_add(Math::cells(x[v] + i + kStep), second, odd[v]);
      }
    }
    if (i < size) {
      const Vec rest = Math::cells(rows[r] + i);
      for (int v = 0; v < N; ++v) even[v] = Math::multiply_add(Math::cells(x[v] + i), rest, even[v]);
    }
    for (int v = 0; v < N; ++v) sums[v][r] = even[v] + odd[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v)
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4)
      store_totals(out + v * stride + r, {sums[v][r], sums[v][r + 1], sums[v][r + 2], sums[v][r + 3]});
}

constexpr int kFew = 4;  // vectors that share one reading

// Calls work(first, number as a constant) for groups of up to kFew.
template <class Work>
KEYSIFT_INLINE void by_few(int count, const Work& work) {
  int done = 0;
  for (; done + kFew <= count; done += kFew) work(done, std::integral_constant<int, kFew>());
  switch (count - done) {
    case 3:
      return work(done, std::integral_constant<int, 3>());
    case 2:
      return work(done, std::integral_constant<int, 2>());
    case 1:
      return work(done, std::integral_constant<int, 1>());
  }
}

}  // namespace keysift::KEYSIFT_ISA
