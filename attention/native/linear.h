// A linear layer at decode: every weight is read once for all tokens of the step.
#pragma once

namespace keysift::KEYSIFT_ISA {

constexpr int kOutputsOfTask = 32;

template <class Math, int N, int R>
void linear_rows(const LinearCall& call, std::int64_t output, int token) {
  using T = typename Math::Element;
  const T *x[N], *weights[R];
  alignas(64) float out[N * R];
  for (int v = 0; v < N; ++v) x[v] = static_cast<const T*>(call.x) + (token + v) * call.x_stride;
  for (int r = 0; r < R; ++r)
    weights[r] = static_cast<const T*>(call.weight) + std::min(output + r, call.outputs - 1) * call.inputs;
  dots<Math, N, R>(x, weights, call.inputs, out, R);
  const auto* bias = static_cast<const T*>(call.bias);
  const int count = static_cast<int>(std::min<std::int64_t>(R, call.outputs - output));
  for (int v = 0; v < N; ++v)
    for (int r = 0; r < count; ++r) {
      const float sum = out[v * R + r] + (bias == nullptr ? 0.0f : to_float(bias[output + r]));
      static_cast<T*>(call.out)[(token + v) * call.outputs + output + r] = rounded(sum, T());
    }
}

template <class Math>
void linear(const LinearCall& call, int threads) {
  const std::int64_t tasks = (call.outputs + kOutputsOfTask - 1) / kOutputsOfTask;
  for_each_task(tasks, threads, [&](std::int64_t task) {
    const std::int64_t end = std::min(call.outputs, (task + 1) * kOutputsOfTask);
    for (std::int64_t output = task * kOutputsOfTask; output < end; output += 8)
      by_few(static_cast<int>(call.batch), [&](int token, auto number) {
        constexpr int kRows = number() <= 2 ? 8 : 4;  // as many sums as the registers hold
        for (int row = 0; row < 8 && output + row < end; row += kRows)
          linear_rows<Math, number(), kRows>(call, output + row, token);
      });
  });
}

}  // namespace keysift::KEYSIFT_ISA
