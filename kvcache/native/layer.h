// A decoder layer of the Llama kind at decode, but for its attention: norms, projections, rotary embedding, gated MLP.
// Rounds where the model's own modules round, so that the two agree to the last bit but for the order of sums.
#pragma once

#include <cmath>
#include <vector>

namespace keysift::KEYSIFT_ISA {

template <class T>
KEYSIFT_INLINE float round_trip(float x) {
  return to_float(rounded(x, T()));
}

// out [C] = x / its root mean square * weight.
template <class T>
void rms_norm(const T* x, const T* weight, std::int64_t size, float eps, T* out) {
  float squares[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    for (int j = 0; j < 8; ++j) squares[j] += to_float(x[i + j]) * to_float(x[i + j]);
  for (; i < size; ++i) squares[0] += to_float(x[i]) * to_float(x[i]);
  const float sum = ((squares[0] + squares[1]) + (squares[2] + squares[3])) +
                    ((squares[4] + squares[5]) + (squares[6] + squares[7]));
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) out[i] = rounded(to_float(weight[i]) * round_trip<T>(to_float(x[i]) * factor), T());
}

// x [D] turned in place: its halves are the two coordinates of D / 2 planes.
template <class T>
void rotate(T* x, const T* cos, const T* sin, std::int64_t dim) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[i + half]);
    const float left = round_trip<T>(a * to_float(cos[i])), right = round_trip<T>(b * to_float(cos[i + half]));
    x[i] = rounded(left + round_trip<T>(-b * to_float(sin[i])), T());
    x[i + half] = rounded(right + round_trip<T>(a * to_float(sin[i + half])), T());
  }
}

// Outputs of several matrices in one list of tasks, none of which crosses from one matrix to the next.
struct Block {
  const Matrix* matrix;
  void* out;
  std::int64_t begin, end;
};

inline void add_blocks(const Matrix& matrix, void* out, std::vector<Block>& blocks) {
  for (std::int64_t begin = 0; begin < matrix.outputs; begin += kOutputsOfTask)
    blocks.push_back({&matrix, out, begin, std::min(matrix.outputs, begin + kOutputsOfTask)});
}

// All products of x [B, K], each to its block's out [B, N].
template <class Math>
void multiply_all(const std::vector<Block>& blocks, const typename Math::Element* x, std::int64_t batch, int threads) {
  using T = typename Math::Element;
  for_each_task(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t task) {
    const Block& block = blocks[task];
    const std::int64_t outputs = block.matrix->outputs;
    multiply<Math>(*block.matrix, x, block.matrix->inputs, batch, block.begin, block.end,
                   [&](std::int64_t token, std::int64_t output, float sum) {
                     static_cast<T*>(block.out)[token * outputs + output] = rounded(sum, T());
                   });
  });
}

template <class Math>
void multiply_one(const Matrix& matrix, const typename Math::Element* x, void* out, std::int64_t batch, int threads) {
  std::vector<Block> blocks;
  add_blocks(matrix, out, blocks);
  multiply_all<Math>(blocks, x, batch, threads);
}

template <class Math>
void layer_in(const LayerInCall& call, int threads) {
  using T = typename Math::Element;
  const std::int64_t width = call.to_q.inputs;
  std::vector<T> normed(call.batch * width);
  for (std::int64_t b = 0; b < call.batch; ++b)
    rms_norm(static_cast<const T*>(call.x) + b * width, static_cast<const T*>(call.norm), width, call.eps,
             normed.data() + b * width);
  std::vector<Block> blocks;
  add_blocks(call.to_q, call.q, blocks);
  add_blocks(call.to_k, call.k, blocks);
  add_blocks(call.to_v, call.v, blocks);
  multiply_all<Math>(blocks, normed.data(), call.batch, threads);
  for (std::int64_t b = 0; b < call.batch; ++b) {
    const T *cos = static_cast<const T*>(call.cos) + b * call.dim, *sin = static_cast<const T*>(call.sin) + b * call.dim;
    for (const auto& [outputs, x] : {std::pair{call.to_q.outputs, call.q}, std::pair{call.to_k.outputs, call.k}})
      for (std::int64_t head = 0; head < outputs; head += call.dim)
        rotate(static_cast<T*>(x) + b * outputs + head, cos, sin, call.dim);
  }
}

// act [B, N] = silu(x gate) * (x up)
template <class Math>
void gated(const LayerOutCall& call, const typename Math::Element* x, typename Math::Element* act, int threads) {
  using T = typename Math::Element;
  const std::int64_t outputs = call.gate.outputs, width = call.gate.inputs;
  for_each_task((outputs + kOutputsOfTask - 1) / kOutputsOfTask, threads, [&](std::int64_t task) {
    const std::int64_t begin = task * kOutputsOfTask, end = std::min(outputs, begin + kOutputsOfTask);
    multiply<Math>(call.gate, x, width, call.batch, begin, end, [&](std::int64_t token, std::int64_t output, float sum) {
      const float open = round_trip<T>(sum);
      act[token * outputs + output] = rounded(open / (1.0f + std::exp(-open)), T());
    });
    multiply<Math>(call.up, x, width, call.batch, begin, end, [&](std::int64_t token, std::int64_t output, float sum) {
      T& cell = act[token * outputs + output];
      cell = rounded(to_float(cell) * round_trip<T>(sum), T());
    });
  });
}

template <class T>
void add(const T* a, const T* b, std::int64_t size, T* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = rounded(to_float(a[i]) + to_float(b[i]), T());
}

template <class Math>
void layer_out(const LayerOutCall& call, int threads) {
  using T = typename Math::Element;
  const std::int64_t width = call.to_out.outputs, cells = call.batch * width;
  std::vector<T> sum(cells), change(cells), act(call.batch * call.gate.outputs);
  multiply_one<Math>(call.to_out, static_cast<const T*>(call.attended), change.data(), call.batch, threads);
  add(static_cast<const T*>(call.x), change.data(), cells, sum.data());
  for (std::int64_t b = 0; b < call.batch; ++b)
    rms_norm(sum.data() + b * width, static_cast<const T*>(call.norm), width, call.eps, change.data() + b * width);
  gated<Math>(call, change.data(), act.data(), threads);
  multiply_one<Math>(call.down, act.data(), change.data(), call.batch, threads);
  add(sum.data(), change.data(), cells, static_cast<T*>(call.out));
}

}  // namespace keysift::KEYSIFT_ISA
