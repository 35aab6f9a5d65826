// The highest of many numbers, and shares of a softmax.
#pragma once

namespace keysift::KEYSIFT_ISA {

KEYSIFT_INLINE std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// out = exp(in - max(in)), with zeros up to a whole vector. Returns the factor that makes shares of them, or 0 and zeros
// in `out` if there are none; a NaN counts as none. `out` may be `in`.
inline float exponentials(const float* in, std::int64_t count, float* out) {
  const std::int64_t whole = count / kLanes * kLanes;
  alignas(64) float rest[kLanes];
  std::fill_n(rest, kLanes, kNothing);
  std::copy(in + whole, in + count, rest);
  Vec tops = load(rest), sum = {};
  for (std::int64_t i = 0; i < whole; i += kLanes) tops = maximum(tops, load(in + i));
  const Vec top = splat(highest(tops));
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const Vec weight = exp2((load(in + i) - top) * splat(kLog2E));
    sum = sum + weight;
    store(out + i, weight);
  }
  if (whole < count) {
    const Vec weight = exp2((load(rest) - top) * splat(kLog2E));
    sum = sum + weight;
    store(out + whole, weight);
  }
  const float mass = total(sum);
  if (mass > 0.0f) return 1.0f / mass;
  std::fill_n(out, padded(count), 0.0f);
  return 0.0f;
}

// Number of numbers that are at least `least`, all compared by their bits, which orders those that are not negative.
KEYSIFT_INLINE std::int64_t count_from(const float* numbers, std::int64_t size, std::int32_t least) {
  Int counts[2] = {};
  const Int bound = Int{} + least;
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    counts[0] -= (Int)load(numbers + i) >= bound;
    counts[1] -= (Int)load(numbers + i + kLanes) >= bound;
  }
  if (i < size) counts[0] -= (Int)load(numbers + i) >= bound;
  const Int both = counts[0] + counts[1];
  std::int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += both[lane];
  return count;
}

// The greatest number, by its bits, from which on there are at least `wanted`; `lowest` where there are not more.
inline std::int32_t find_threshold(const float* numbers, std::int64_t size, std::int64_t wanted, std::int32_t lowest) {
  std::int64_t count = count_from(numbers, size, lowest);
  if (count <= wanted) return lowest;
  Vec top = load(numbers);
  for (std::int64_t i = kLanes; i < size; i += kLanes) top = maximum(top, load(numbers + i));
  std::int32_t low = lowest, high = bit_copy<std::int32_t>(highest(top)) + 1;
  while (high - low > 1 && count != wanted) {
    const std::int32_t middle = low + (high - low) / 2, found = count_from(numbers, size, middle);
    if (found < wanted) high = middle;
    else low = middle, count = found;
  }
  return low;
}

// The indices of the `wanted` highest numbers, ascending, of equal ones the lower; none below `lowest`, by its bits.
// numbers: [size], size a multiple of the lanes, none of them NaN. Writes one index more than it returns the number of.
inline int take_highest(const float* numbers, std::int64_t size, int wanted, std::int32_t lowest,
                        std::int32_t* indices) {
  const std::int32_t threshold = find_threshold(numbers, size, wanted, lowest);
  std::int64_t equals = wanted - count_from(numbers, size, threshold + 1);
  int count = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const auto number = bit_copy<std::int32_t>(numbers[i]);
    const bool equal = number == threshold;
    indices[count] = static_cast<std::int32_t>(i);
    count += (number > threshold) | (equal & (equals > 0));
    equals -= equal;
  }
  return count;
}

}  // namespace keysift::KEYSIFT_ISA
