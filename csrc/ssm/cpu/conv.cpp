// Causal depthwise convolution with optional SiLU: y[t] = act(bias + sum_w weight[w] x[t - W + 1 + w]).
//
// Channels are the vector dimension: a vector of channels walks down a few tokens with its W taps and its last W tokens
// in registers, then the next vector does. Walking far would touch rows whose distance is often a multiple of 4 KiB and
// evict them before the neighbour comes. Tensors with contiguous channels are read and written where they lie; other
// layouts are transposed into fp32 tiles and back. FLOPs: 2 W per element. Bytes: x and out once. Numerics: fp32, bias
// first, taps in order: the same chain in the one-token update, so decoding has the bits of the full convolution.
// Determinism: weight gradients are summed over the tokens of kGroup tiles in order, then over these groups in order.
#include "ssm/cpu/conv_stage.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

constexpr int64_t kGroup = 16;  // tiles whose weight gradients one task sums

template <int W, class T>
void run_forward(const Conv& p) {
  Scratch scratch;
  const Grid grid(p.seqs, scratch);
  const Taps taps = make_taps(p.weight, p.bias, p.D, W, scratch);
  const int64_t d_blocks = ceil_div(p.D, kConvChannels);
  const bool contiguous = p.x_strides[1] == 1 && p.out_strides[1] == 1;
  parallel_for(grid.tiles * d_blocks, 1, [&](int64_t task) {
    const int64_t tile = task / d_blocks, d0 = task % d_blocks * kConvChannels, s = grid.segment_of(tile);
    const Segment& seg = grid.segments[s];
    const int64_t t0 = seg.begin + (tile - grid.first_tile[s]) * kConvTokens, n = imin(kConvTokens, seg.end - t0);
    Scratch inner;
    T* out = static_cast<T*>(p.out);
    const auto through_buffer = [&](const ConvTile<float>& staged) {
      float* y = inner.get<float>(n * kConvChannels);
      forward_tile<W, T>(taps, d0, staged, p.silu, Channels<float>{y, kConvChannels});
      for (int64_t i = 0; seg.padding && i < n * kConvChannels; ++i) y[i] = 0.0f;
      unstage(y, p.seqs.length, t0, n, d0, p.D, out, p.out_strides);
    };
    visit_tile<T>(
        p, seg, t0, n, 0, d0, contiguous && !seg.padding, inner,
        [&](const ConvTile<T>& direct) {
          T* y = address(out, p.out_strides, p.seqs.length, t0, d0);
          forward_tile<W, T>(taps, d0, direct, p.silu, Channels<T>{y, p.out_strides[2]});
        },
        through_buffer);
  });
}

template <int W, class T>
void run_backward(const Conv& p) {
  constexpr int64_t past = W - 1;
  Scratch scratch;
  const Grid grid(p.seqs, scratch);
  const Taps taps = make_taps(p.weight, p.bias, p.D, W, scratch);
  const int64_t d_blocks = ceil_div(p.D, kConvChannels), groups = ceil_div(grid.tiles, kGroup);
  const bool contiguous = p.x_strides[1] == 1 && p.out_strides[1] == 1 && p.dx_strides[1] == 1;
  float* partial = scratch.get<float>(groups * d_blocks * (W + 1) * kConvChannels);
  parallel_for(groups * d_blocks, 1, [&](int64_t task) {
    const int64_t group = task / d_blocks, d0 = task % d_blocks * kConvChannels, width = imin(kConvChannels, p.D - d0);
    const Channels<float> grads{partial + task * (W + 1) * kConvChannels, kConvChannels};
    for (int64_t i = 0; i < (W + 1) * kConvChannels; ++i) grads.data[i] = 0.0f;
    for (int64_t tile = group * kGroup; tile < imin(grid.tiles, (group + 1) * kGroup); ++tile) {
      const int64_t s = grid.segment_of(tile);
      const Segment& seg = grid.segments[s];
      const int64_t t0 = seg.begin + (tile - grid.first_tile[s]) * kConvTokens, n = imin(kConvTokens, seg.end - t0);
      const int64_t ahead = imin(past, seg.end - t0 - n);
      Scratch inner;
      const bool state = t0 == seg.begin && p.dinitial_states && seg.initial_row >= 0;
      const Channels<float> dpast{state ? inner.get<float>(kMaxWidth * kConvChannels) : nullptr, kConvChannels};
      const T* all_dout = static_cast<const T*>(p.dout);
      visit_tile<T>(
          p, seg, t0, n, ahead, d0, contiguous && !seg.padding, inner,
          [&](const ConvTile<T>& direct) {
            const T* dout = address(all_dout, p.out_strides, p.seqs.length, t0, d0);
            T* dx = address(static_cast<T*>(p.dx), p.dx_strides, p.seqs.length, t0, d0);
            backward_tile<W, T>(taps, d0, direct, Channels<const T>{dout, p.out_strides[2]}, p.silu,
                                Channels<T>{dx, p.dx_strides[2]}, dpast, grads);
          },
          [&](const ConvTile<float>& staged) {
            float* dout = inner.get<float>((n + past) * kConvChannels);
            float* dx = inner.get<float>(n * kConvChannels);
            stage(all_dout, p.out_strides, p.seqs.length, t0, n + ahead, d0, p.D, dout);
            for (int64_t i = 0; seg.padding && i < (n + ahead) * kConvChannels; ++i) dout[i] = 0.0f;
            backward_tile<W, T>(taps, d0, staged, Channels<const float>{dout, kConvChannels}, p.silu,
                                Channels<float>{dx, kConvChannels}, dpast, grads);
            unstage(dx, p.seqs.length, t0, n, d0, p.D, static_cast<T*>(p.dx), p.dx_strides);
          });
      if (!state) continue;
      T* dstate = static_cast<T*>(p.dinitial_states) + (seg.initial_row * p.D + d0) * past;
      for (int64_t c = 0; c < width; ++c)
        for (int64_t j = 0; j < past; ++j) dstate[c * past + j] = from_float<T>(*dpast.at(j, c));
    }
  });
  // A sequence without tokens passes its state's gradient nowhere.
  for (int64_t i = 0; i < grid.count && p.dinitial_states; ++i) {
    const Segment& seg = grid.segments[i];
    T* dstate = static_cast<T*>(p.dinitial_states) + seg.initial_row * p.D * past;
    for (int64_t e = 0; seg.begin == seg.end && seg.initial_row >= 0 && e < p.D * past; ++e)
      dstate[e] = from_float<T>(0.0f);
  }
  for (int64_t d = 0; d < p.D; ++d) {
    float sums[W + 1] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float* grads = partial + (g * d_blocks + d / kConvChannels) * (W + 1) * kConvChannels + d % kConvChannels;
      for (int w = 0; w <= W; ++w) sums[w] += grads[w * kConvChannels];
    }
    for (int w = 0; w < W; ++w) p.dweight[d * W + w] = sums[w];
    p.dbias[d] = sums[W];
  }
}

}  // namespace

void conv_forward(const Conv& p) {
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_forward<w, float>(p) : run_forward<w, bf16>(p); });
}

void conv_backward(const Conv& p) {
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_backward<w, float>(p) : run_backward<w, bf16>(p); });
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
