// A linear layer at decode: every weight is read once for all tokens of the step.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kOutputsOfTask = 32;
constexpr int kGroup = 64;  // inputs that share a scale

// As `dots`, of rows in int8, each of whose groups has a scale.
template <class Math, int N, int R>
KEYSIFT_INLINE void scaled_dots(const typename Math::Element* const* x, const std::int8_t* const* rows,
                                const float* const* scales, std::int64_t size, float* out) {
  static_assert(R % 4 == 0);
  Vec sums[N][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec sum[N] = {};
    for (std::int64_t group = 0; group < size; group += kGroup) {
      Vec part[N] = {};
      for (int i = 0; i < kGroup; i += kLanes * Math::kPair) {
        const Vec weights = Math::bytes(rows[r] + group + i);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) part[v] = Math::multiply_add(Math::cells(x[v] + group + i), weights, part[v]);
      }
      const Vec scale = splat(scales[r][group / kGroup]);
      for (int v = 0; v < N; ++v) sum[v] = fma(part[v], scale, sum[v]);
    }
    for (int v = 0; v < N; ++v) sums[v][r] = sum[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v)
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4)
      store_totals(out + v * R + r, {sums[v][r], sums[v][r + 1], sums[v][r + 2], sums[v][r + 3]});
}

// out [N, R], the products of N tokens with R outputs; the last output stands in for those past it.
template <class Math, int N, int R>
KEYSIFT_INLINE void products(const Matrix& matrix, const typename Math::Element* const* x, std::int64_t output,
                             float* out) {
  using T = typename Math::Element;
  std::int64_t numbers[R];
  for (int r = 0; r < R; ++r) numbers[r] = std::min(output + r, matrix.outputs - 1);
  if (matrix.scales == nullptr) {
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = static_cast<const T*>(matrix.weight) + numbers[r] * matrix.inputs;
    return dots<Math, N, R>(x, rows, matrix.inputs, out, R);
  }
  const std::int8_t* rows[R];
  const float* scales[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = static_cast<const std::int8_t*>(matrix.weight) + numbers[r] * matrix.inputs;
    scales[r] = matrix.scales + numbers[r] * (matrix.inputs / kGroup);
  }
  scaled_dots<Math, N, R>(x, rows, scales, matrix.inputs, out);
}

// Calls store(token, output, sum) for all tokens [B, K] and the outputs from `begin` to `end`.
template <class Math, class Store>
KEYSIFT_INLINE void multiply(const Matrix& matrix, const typename Math::Element* x, std::int64_t stride,
                             std::int64_t batch, std::int64_t begin, std::int64_t end, const Store& store) {
  using T = typename Math::Element;
  const auto* bias = static_cast<const T*>(matrix.bias);
  for (std::int64_t first = begin; first < end; first += 8)
    by_few(static_cast<int>(batch), [&](int token, auto number) {
      constexpr int kRows = number() <= 2 ? 8 : 4;  // as many sums as the registers hold
      const T* tokens[number()];
      for (int v = 0; v < number(); ++v) tokens[v] = x + (token + v) * stride;
      alignas(64) float out[number() * kRows];
      for (std::int64_t output = first; output < std::min(end, first + 8); output += kRows) {
        products<Math, number(), kRows>(matrix, tokens, output, out);
        const int count = static_cast<int>(std::min<std::int64_t>(kRows, end - output));
        for (int v = 0; v < number(); ++v)
          for (int r = 0; r < count; ++r)
            store(token + v, output + r, out[v * kRows + r] + (bias == nullptr ? 0.0f : to_float(bias[output + r])));
      }
    });
}

template <class Math>
void linear(const LinearCall& call, int threads) {
  using T = typename Math::Element;
  const Matrix& matrix = call.matrix;
  for_each_task((matrix.outputs + kOutputsOfTask - 1) / kOutputsOfTask, threads, [&](std::int64_t task) {
    const std::int64_t begin = task * kOutputsOfTask, end = std::min(matrix.outputs, begin + kOutputsOfTask);
    multiply<Math>(matrix, static_cast<const T*>(call.x), call.x_strides[0], call.batch, begin, end,
                   [&](std::int64_t token, std::int64_t output, float sum) {
                     static_cast<T*>(call.out)[token * matrix.outputs + output] = rounded(sum, T());
                   });
  });
}

}  // namespace keysift::KEYSIFT_ISA
