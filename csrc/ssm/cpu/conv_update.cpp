// The causal convolution's next tokens, in place on its state: the arithmetic of the full convolution.
#include "ssm/cpu/conv_stage.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

template <int W, class T>
void run_update(const ConvUpdate& p) {
  constexpr int64_t past = W - 1;
  Scratch scratch;
  const Taps taps = make_taps(p.weight, p.bias, p.D, W, scratch);
  const int64_t d_blocks = ceil_div(p.D, kConvChannels);
  parallel_for(p.batch * d_blocks, grain_for(kConvChannels * p.tokens * 8), [&](int64_t task) {
    const int64_t b = task / d_blocks, d0 = task % d_blocks * kConvChannels, width = imin(kConvChannels, p.D - d0);
    const int64_t slot = p.slots ? p.slots[b] : b;
    Scratch inner;
    float* in = inner.get<float>((p.tokens + past) * kConvChannels);
    float* out = inner.get<float>(p.tokens * kConvChannels);
    const int64_t out_strides[3] = {0, p.out_strides[1], p.out_strides[2]};
    const int64_t x_strides[3] = {0, p.x_strides[1], p.x_strides[2]};
    T* y = static_cast<T*>(p.out) + b * p.out_strides[0];
    if (slot < 0) {
      for (int64_t i = 0; i < p.tokens * kConvChannels; ++i) out[i] = 0.0f;
      unstage(out, p.tokens, 0, p.tokens, d0, p.D, y, out_strides);
      return;
    }
    T* state = static_cast<T*>(p.conv_state) + slot * p.state_strides[0] + d0 * p.state_strides[1];
    // Column of the state that holds the token `back` steps before the first new one.
    const int64_t write = p.cache_seqlens ? p.cache_seqlens[b] % p.state_len : 0;
    const auto column = [&](int64_t back) {
      return p.cache_seqlens ? (write - back + p.state_len) % p.state_len : p.state_len - back;
    };
    if (!p.cache_seqlens && p.state_strides[2] == 1) {
      transpose_copy(state + column(past), p.state_strides[1], width, past, in, kConvChannels, true);
    } else {
      for (int64_t i = 0; i < past; ++i)
        for (int64_t c = 0; c < width; ++c)
          in[i * kConvChannels + c] = to_float(state[c * p.state_strides[1] + column(past - i) * p.state_strides[2]]);
    }
    float* fresh = in + past * kConvChannels;
    stage(static_cast<const T*>(p.x) + b * p.x_strides[0], x_strides, p.tokens, 0, p.tokens, d0, p.D, fresh);
    forward_tile<W, T>(taps, d0,
                       ConvTile<float>{{fresh, kConvChannels}, {in, kConvChannels}, p.tokens, p.tokens, width}, p.silu,
                       Channels<float>{out, kConvChannels});
    unstage(out, p.tokens, 0, p.tokens, d0, p.D, y, out_strides);
    // A ring takes the new tokens at the write position; otherwise the state shifts left.
    if (!p.cache_seqlens && p.state_len == past && p.state_strides[2] == 1)
      return transpose_copy(in + p.tokens * kConvChannels, kConvChannels, past, width, state, p.state_strides[1]);
    for (int64_t c = 0; c < width; ++c) {
      T* row = state + c * p.state_strides[1];
      if (p.cache_seqlens) {
        for (int64_t t = imax(0, p.tokens - p.state_len); t < p.tokens; ++t)
          row[(write + t) % p.state_len * p.state_strides[2]] = from_float<T>(fresh[t * kConvChannels + c]);
      } else {
        for (int64_t j = 0; j + p.tokens < p.state_len; ++j)
          row[j * p.state_strides[2]] = row[(j + p.tokens) * p.state_strides[2]];
        for (int64_t t = imax(0, p.tokens - p.state_len); t < p.tokens; ++t)
          row[(p.state_len - p.tokens + t) * p.state_strides[2]] = from_float<T>(fresh[t * kConvChannels + c]);
      }
    }
  });
}

}  // namespace

void conv_update(const ConvUpdate& p) {
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_update<w, float>(p) : run_update<w, bf16>(p); });
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
