// Causal depthwise convolution with optional SiLU: y[t] = act(bias + sum_w weight[w] x[t - W + 1 + w]).
//
// A task stages a tile of tokens x channels (with its W - 1 predecessors) in fp32, tokens by rows, whatever the layout
// of x: channels are the vector dimension and sequence boundaries only matter while staging. FLOPs: 2 W per element.
// Bytes: x and out once. Numerics: fp32, bias first, taps in order: the same chain in the one-token update, so decoding
// has the bits of the full convolution. Determinism: weight gradients are summed over tokens in order by the task that
// owns the channels.
#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

constexpr int64_t kMaxWidth = 8;
constexpr int64_t kTokens = 128;   // tokens of a tile
constexpr int64_t kChannels = 64;  // channels of a tile

// Rows [t0, t0 + n) x channels [d0, d0 + kChannels) of a (row, channel, token) tensor into dst[t][kChannels], fp32,
// zero beyond D. Tokens are global: row = t / length.
template <class T>
void stage(const T* x, const int64_t* strides, int64_t length, int64_t t0, int64_t n, int64_t d0, int64_t D,
           float* dst) {
  if (n <= 0) return;
  const int64_t row = t0 / length, width = imin(kChannels, D - d0);
  const T* src = x + row * strides[0] + d0 * strides[1] + (t0 - row * length) * strides[2];
  if (strides[1] == 1) {
    for (int64_t i = 0; i < n; ++i) copy_row(src + i * strides[2], width, dst + i * kChannels, kChannels);
  } else if (strides[2] == 1) {
    transpose_copy(src, strides[1], width, n, dst, kChannels, true);
    for (int64_t i = 0; i < n && width < kChannels; ++i)
      for (int64_t c = width; c < kChannels; ++c) dst[i * kChannels + c] = 0.0f;
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < kChannels; ++c)
        dst[i * kChannels + c] = c < width ? to_float(src[c * strides[1] + i * strides[2]]) : 0.0f;
  }
}

template <class T>
void unstage(const float* src, int64_t length, int64_t t0, int64_t n, int64_t d0, int64_t D, T* y,
             const int64_t* strides) {
  if (n <= 0) return;
  const int64_t row = t0 / length, width = imin(kChannels, D - d0);
  T* dst = y + row * strides[0] + d0 * strides[1] + (t0 - row * length) * strides[2];
  if (strides[1] == 1) {
    for (int64_t i = 0; i < n; ++i) copy_row(src + i * kChannels, width, dst + i * strides[2], width);
  } else if (strides[2] == 1) {
    transpose_copy(src, kChannels, n, width, dst, strides[1]);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; ++c) dst[c * strides[1] + i * strides[2]] = from_float<T>(src[i * kChannels + c]);
  }
}

// Tokens [t0 - (W - 1), t0 + n) of a segment: before its beginning come the initial state or zeros.
template <class T>
void stage_with_past(const Conv& p, const Segment& seg, int64_t t0, int64_t n, int64_t d0, float* dst) {
  const int64_t past = p.W - 1, inside = imin(past, t0 - seg.begin), outside = past - inside;
  for (int64_t i = 0; i < outside; ++i) {
    // Column W - 1 - outside + i of the state is the token (outside - i) before the segment.
    const bool known = p.initial_states && seg.initial_row >= 0;
    const T* state = static_cast<const T*>(p.initial_states);
    for (int64_t c = 0; c < kChannels; ++c) {
      const int64_t column = past - (seg.begin - (t0 - past + i));
      dst[i * kChannels + c] =
          known && d0 + c < p.D ? to_float(state[(seg.initial_row * p.D + d0 + c) * past + column]) : 0.0f;
    }
  }
  stage(static_cast<const T*>(p.x), p.x_strides, p.seqs.length, t0 - inside, inside + n, d0, p.D,
        dst + outside * kChannels);
}

struct Taps {
  alignas(64) float weight[kMaxWidth][kChannels];
  alignas(64) float bias[kChannels];
};

void load_taps(const float* weight, const float* bias, int64_t d0, int64_t D, int64_t W, Taps& taps) {
  for (int64_t c = 0; c < kChannels; ++c) {
    const bool on = d0 + c < D;
    for (int64_t w = 0; w < W; ++w) taps.weight[w][c] = on ? weight[(d0 + c) * W + w] : 0.0f;
    taps.bias[c] = on && bias ? bias[d0 + c] : 0.0f;
  }
}

// in: n + W - 1 staged rows; out: n rows before the activation.
FOLDSCAN_INLINE void convolve(const Taps& taps, int64_t W, const float* in, int64_t n, float* out) {
  for (int64_t c = 0; c < kChannels; c += kLanes) {
    const VF bias = VF::load(taps.bias + c);
    for (int64_t t = 0; t < n; ++t) {
      VF sum = bias;
      for (int64_t w = 0; w < W; ++w)
        sum = fma(VF::load(taps.weight[w] + c), VF::load(in + (t + w) * kChannels + c), sum);
      sum.store(out + t * kChannels + c);
    }
  }
}

FOLDSCAN_INLINE void silu(float* v, int64_t n) {
  for (int64_t i = 0; i < n * kChannels; i += kLanes) vsilu(VF::load(v + i)).store(v + i);
}

template <class T>
void run_forward(const Conv& p) {
  Scratch scratch;
  Segment* segments = scratch.get<Segment>(max_segments(p.seqs));
  const int64_t count = fill_segments(p.seqs, segments);
  // Tiles are numbered through all segments.
  int64_t* first_tile = scratch.get<int64_t>(count + 1);
  first_tile[0] = 0;
  for (int64_t i = 0; i < count; ++i)
    first_tile[i + 1] = first_tile[i] + ceil_div(segments[i].end - segments[i].begin, kTokens);
  const int64_t d_blocks = ceil_div(p.D, kChannels), tiles = first_tile[count];
  parallel_for(tiles * d_blocks, 1, [&](int64_t task) {
    const int64_t tile = task / d_blocks, d0 = task % d_blocks * kChannels;
    int64_t lo = 0, hi = count;
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      (first_tile[mid] <= tile ? lo : hi) = mid;
    }
    const Segment& seg = segments[lo];
    const int64_t t0 = seg.begin + (tile - first_tile[lo]) * kTokens, n = imin(kTokens, seg.end - t0);
    Scratch inner;
    float* in = inner.get<float>((kTokens + kMaxWidth) * kChannels);
    float* out = inner.get<float>(kTokens * kChannels);
    Taps* taps = inner.get<Taps>(1);
    load_taps(p.weight, p.bias, d0, p.D, p.W, *taps);
    stage_with_past<T>(p, seg, t0, n, d0, in);
    convolve(*taps, p.W, in, n, out);
    if (p.silu) silu(out, n);
    if (seg.padding)
      for (int64_t i = 0; i < n * kChannels; ++i) out[i] = 0.0f;
    unstage(out, p.seqs.length, t0, n, d0, p.D, static_cast<T*>(p.out), p.out_strides);
  });
}

// dpre[t] = dout[t] act'(pre[t]); dx[t] = sum_w weight[w] dpre[t + W - 1 - w]; dweight[w] = sum_t dpre[t] x[t - W + 1 +
// w].
template <class T>
void run_backward(const Conv& p) {
  Scratch scratch;
  Segment* segments = scratch.get<Segment>(max_segments(p.seqs));
  const int64_t count = fill_segments(p.seqs, segments), W = p.W, past = W - 1;
  parallel_for(ceil_div(p.D, kChannels), 1, [&](int64_t block) {
    const int64_t d0 = block * kChannels, width = imin(kChannels, p.D - d0);
    Scratch inner;
    constexpr int64_t kRows = kTokens + 2 * kMaxWidth;
    float* in = inner.get<float>(kRows * kChannels);
    float* pre = inner.get<float>(kRows * kChannels);
    float* dpre = inner.get<float>(kRows * kChannels);
    float* dx = inner.get<float>(kRows * kChannels);
    Taps* taps = inner.get<Taps>(1);
    Taps* grads = inner.get<Taps>(1);
    load_taps(p.weight, p.bias, d0, p.D, W, *taps);
    for (int64_t w = 0; w < W; ++w)
      for (auto& g : grads->weight[w]) g = 0.0f;
    for (auto& g : grads->bias) g = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const Segment& seg = segments[i];
      for (int64_t t0 = seg.begin; t0 < seg.end; t0 += kTokens) {
        // dx of n tokens needs dpre of the W - 1 tokens behind them as well.
        const int64_t n = imin(kTokens, seg.end - t0), ahead = imin(past, seg.end - t0 - n), m = n + ahead;
        stage_with_past<T>(p, seg, t0, m, d0, in);
        stage(static_cast<const T*>(p.dout), p.out_strides, p.seqs.length, t0, m, d0, p.D, dpre);
        if (p.silu) {
          convolve(*taps, W, in, m, pre);
          for (int64_t e = 0; e < m * kChannels; e += kLanes)
            (VF::load(dpre + e) * vsilu_grad(VF::load(pre + e))).store(dpre + e);
        }
        if (seg.padding)
          for (int64_t e = 0; e < m * kChannels; ++e) dpre[e] = 0.0f;
        for (int64_t e = m * kChannels; e < (n + past) * kChannels; ++e) dpre[e] = 0.0f;
        const bool first = t0 == seg.begin;
        for (int64_t c = 0; c < kChannels; c += kLanes) {
          for (int64_t w = 0; w < W; ++w) {
            VF sum = VF::load(grads->weight[w] + c);
            for (int64_t t = 0; t < n; ++t)
              sum = fma(VF::load(dpre + t * kChannels + c), VF::load(in + (t + w) * kChannels + c), sum);
            sum.store(grads->weight[w] + c);
          }
          VF sum = VF::load(grads->bias + c);
          for (int64_t t = 0; t < n; ++t) sum = sum + VF::load(dpre + t * kChannels + c);
          sum.store(grads->bias + c);
          for (int64_t t = 0; t < n; ++t) {
            VF g = VF::zero();
            for (int64_t w = 0; w < W; ++w)
              g = fma(VF::load(taps->weight[w] + c), VF::load(dpre + (t + past - w) * kChannels + c), g);
            g.store(dx + t * kChannels + c);
          }
        }
        unstage(dx, p.seqs.length, t0, n, d0, p.D, static_cast<T*>(p.dx), p.dx_strides);
        if (first && p.dinitial_states && seg.initial_row >= 0) {
          // State column j meets tap w at token t = j - w (0 <= t < n).
          T* state = static_cast<T*>(p.dinitial_states) + (seg.initial_row * p.D + d0) * past;
          for (int64_t c = 0; c < width; ++c)
            for (int64_t j = 0; j < past; ++j) {
              float g = 0.0f;
              for (int64_t w = 0; w <= j; ++w)
                if (j - w < n) g += taps->weight[w][c] * dpre[(j - w) * kChannels + c];
              state[c * past + j] = from_float<T>(g);
            }
        }
      }
      // A sequence without tokens passes its state's gradient nowhere.
      if (seg.begin == seg.end && p.dinitial_states && seg.initial_row >= 0)
        for (int64_t e = 0; e < width * past; ++e)
          static_cast<T*>(p.dinitial_states)[(seg.initial_row * p.D + d0) * past + e] = from_float<T>(0.0f);
    }
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t w = 0; w < W; ++w) p.dweight[(d0 + c) * W + w] = grads->weight[w][c];
      p.dbias[d0 + c] = grads->bias[c];
    }
  });
}

template <class T>
void run_update(const ConvUpdate& p) {
  const int64_t d_blocks = ceil_div(p.D, kChannels), past = p.W - 1;
  parallel_for(p.batch * d_blocks, grain_for(kChannels * p.tokens * 32), [&](int64_t task) {
    const int64_t b = task / d_blocks, d0 = task % d_blocks * kChannels, width = imin(kChannels, p.D - d0);
    const int64_t slot = p.slots ? p.slots[b] : b;
    Scratch scratch;
    float* in = scratch.get<float>((p.tokens + kMaxWidth) * kChannels);
    float* out = scratch.get<float>(p.tokens * kChannels);
    const int64_t out_strides[3] = {0, p.out_strides[1], p.out_strides[2]};
    const int64_t x_strides[3] = {0, p.x_strides[1], p.x_strides[2]};
    T* y = static_cast<T*>(p.out) + b * p.out_strides[0];
    if (slot < 0) {
      for (int64_t i = 0; i < p.tokens * kChannels; ++i) out[i] = 0.0f;
      unstage(out, p.tokens, 0, p.tokens, d0, p.D, y, out_strides);
      return;
    }
    T* state = static_cast<T*>(p.conv_state) + slot * p.state_strides[0] + d0 * p.state_strides[1];
    // Column of the state that holds the token `back` steps before the first new one.
    const int64_t write = p.cache_seqlens ? p.cache_seqlens[b] % p.state_len : 0;
    const auto column = [&](int64_t back) {
      return p.cache_seqlens ? (write - back + p.state_len) % p.state_len : p.state_len - back;
    };
    for (int64_t i = 0; i < past; ++i)
      for (int64_t c = 0; c < kChannels; ++c)
        in[i * kChannels + c] =
            c < width ? to_float(state[c * p.state_strides[1] + column(past - i) * p.state_strides[2]]) : 0.0f;
    stage(static_cast<const T*>(p.x) + b * p.x_strides[0], x_strides, p.tokens, 0, p.tokens, d0, p.D,
          in + past * kChannels);
    Taps* taps = scratch.get<Taps>(1);
    load_taps(p.weight, p.bias, d0, p.D, p.W, *taps);
    convolve(*taps, p.W, in, p.tokens, out);
    if (p.silu) silu(out, p.tokens);
    unstage(out, p.tokens, 0, p.tokens, d0, p.D, y, out_strides);
    // A ring takes the new tokens at the write position; otherwise the state shifts left.
    const float* fresh = in + past * kChannels;
    for (int64_t c = 0; c < width; ++c) {
      T* row = state + c * p.state_strides[1];
      if (p.cache_seqlens) {
        for (int64_t t = imax(0, p.tokens - p.state_len); t < p.tokens; ++t)
          row[(write + t) % p.state_len * p.state_strides[2]] = from_float<T>(fresh[t * kChannels + c]);
      } else {
        for (int64_t j = 0; j + p.tokens < p.state_len; ++j)
          row[j * p.state_strides[2]] = row[(j + p.tokens) * p.state_strides[2]];
        for (int64_t t = imax(0, p.tokens - p.state_len); t < p.tokens; ++t)
          row[(p.state_len - p.tokens + t) * p.state_strides[2]] = from_float<T>(fresh[t * kChannels + c]);
      }
    }
  });
}

}  // namespace

void conv_forward(const Conv& p) {
  if (p.type == DType::kF32) {
    run_forward<float>(p);
  } else {
    run_forward<bf16>(p);
  }
}

void conv_backward(const Conv& p) {
  if (p.type == DType::kF32) {
    run_backward<float>(p);
  } else {
    run_backward<bf16>(p);
  }
}

void conv_update(const ConvUpdate& p) {
  if (p.type == DType::kF32) {
    run_update<float>(p);
  } else {
    run_update<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
