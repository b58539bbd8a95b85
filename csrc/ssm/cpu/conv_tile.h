// One tile of the causal convolution in registers, forward and backward. conv.cpp has the algorithm.
#pragma once

#include <type_traits>

#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {

using namespace foldscan::ssm;

constexpr int kMaxWidth = 8;
constexpr int64_t kConvStep = 8;         // tokens that a vector of channels walks before its neighbour does
constexpr int64_t kConvChannels = 1024;  // channels of a tile

// Taps and bias of all channels as rows of vectors: weight[w] at w * ld, bias at W * ld; zero beyond D.
struct Taps {
  const float* rows;
  int64_t ld;
  FOLDSCAN_INLINE const float* row(int64_t w) const { return rows + w * ld; }
};

inline Taps make_taps(const float* weight, const float* bias, int64_t D, int64_t W, Scratch& scratch) {
  const int64_t ld = round_up(D, kLanes);
  float* rows = scratch.get<float>((W + 1) * ld);
  transpose_copy(weight, W, D, W, rows, ld, true);
  copy_row(bias ? bias : rows, bias ? D : 0, rows + W * ld, ld);
  return {rows, ld};
}

// Rows of channels, `ld` elements apart.
template <class T>
struct Channels {
  T* data;
  int64_t ld;
  FOLDSCAN_INLINE T* at(int64_t t, int64_t c) const { return data + t * ld + c; }
};

// What a tile sees: its tokens, `readable` ones of x from its first on, and in `past` the W - 1 before that.
template <class T>
struct ConvTile {
  Channels<const T> x, past;
  int64_t tokens, readable, channels;
};

template <int W>
FOLDSCAN_INLINE VF convolve(const VF (&tap)[W], VF bias, const VF (&window)[W]) {
  VF sum = bias;
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) sum = fma(tap[w], window[w], sum);
  return sum;
}

template <int W>
FOLDSCAN_INLINE void push(VF (&window)[W], VF newest) {
#pragma GCC unroll 8
  for (int w = 0; w + 1 < W; ++w) window[w] = window[w + 1];
  window[W - 1] = newest;
}

// The registers of a vector of channels at column c of a tile: taps, bias, and the window before token `from`.
template <int W>
struct Column {
  VF tap[W], bias, window[W];
  template <class T>
  FOLDSCAN_INLINE Column(const Taps& taps, int64_t d, const ConvTile<T>& tile, int64_t from, int64_t c, int64_t n) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) tap[w] = VF::load(taps.row(w) + d);
    bias = VF::load(taps.row(W) + d);
    window[0] = VF::zero();
#pragma GCC unroll 8
    for (int w = 1; w < W; ++w) {
      const int64_t t = from - W + w;
      window[w] = t >= tile.readable ? VF::zero() : load_upto(t < 0 ? tile.past.at(W - 1 + t, c) : tile.x.at(t, c), n);
    }
  }
};

// fn(c, n) for every vector of n channels at column c.
template <class Fn>
FOLDSCAN_INLINE void each_column(int64_t channels, const Fn& fn) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) fn(c, int64_t{kLanes});
  if (c < channels) fn(c, channels - c);
}

// Channel d0 of the taps is column 0 of the tile. S: the type of the tensors, which may be staged in another one.
template <int W, class S, class T>
void forward_tile(Taps taps, int64_t d0, ConvTile<T> tile, bool silu, Channels<T> y) {
  for (int64_t from = 0; from < tile.tokens; from += kConvStep) {
    const int64_t to = imin(from + kConvStep, tile.tokens);
    each_column(tile.channels, [&](int64_t c, int64_t n) FOLDSCAN_LAMBDA {
      Column<W> v(taps, d0 + c, tile, from, c, n);
      int64_t t = from;
      for (; t + kWide <= to && n == kLanes; t += kWide) {
        const VW sum = VW::each([&](int i) FOLDSCAN_LAMBDA {
          __builtin_prefetch(tile.x.at(t + kConvStep + i, c));
          push(v.window, VF::load(tile.x.at(t + i, c)));
          return convolve(v.tap, v.bias, v.window);
        });
        (silu ? vsilu_for<S>(sum) : sum).store(y.at(t, c), y.ld);
      }
      for (; t < to; ++t) {
        push(v.window, load_upto(tile.x.at(t, c), n));
        const VF sum = convolve(v.tap, v.bias, v.window);
        store_upto(silu ? vsilu_for<S>(sum) : sum, y.at(t, c), n);
      }
    });
  }
}

// dpre[t] = dout[t] act'(pre[t]); dx[t] = sum_w weight[w] dpre[t + W - 1 - w]; dweight[w] += dpre[t] x[t - W + 1 + w].
// The tile has readable tokens behind its own, whose dpre reaches back. dpast, where wanted: the gradient of `past`.
template <int W, class S, class T>
void backward_tile(Taps taps, int64_t d0, ConvTile<T> tile, Channels<const T> dout, bool silu, Channels<T> dx,
                   Channels<float> dpast, Channels<float> grads) {
  alignas(64) float last[kMaxWidth * kConvChannels];  // dpre of the W - 1 tokens before the step
  const Channels<float> carry{last, kConvChannels};
  const int64_t end = tile.tokens + W - 1;
  for (int64_t from = 0; from < end; from += kConvStep) {
    const int64_t to = imin(from + kConvStep, end);
    each_column(tile.channels, [&](int64_t c, int64_t n) FOLDSCAN_LAMBDA {
      Column<W> v(taps, d0 + c, tile, from, c, n);
      VF dpre[W], dweight[W], dbias = VF::load(grads.at(W, c));
      dpre[0] = VF::zero();
#pragma GCC unroll 8
      for (int w = 1; w < W; ++w) dpre[w] = from ? VF::load(carry.at(w - 1, c)) : VF::zero();
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) dweight[w] = VF::load(grads.at(w, c));
      // dpre of token t is the last one that x of token t - (W - 1) waits for.
      const auto emit = [&](int64_t t) FOLDSCAN_LAMBDA {
        VF g = VF::zero();
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) g = fma(v.tap[w], dpre[W - 1 - w], g);
        if (t >= W - 1) {
          store_upto(g, dx.at(t - (W - 1), c), n);
        } else if (dpast.data) {
          g.store(dpast.at(t, c));
        }
      };
      int64_t t = from;
      for (; t + kWide <= imin(to, tile.tokens) && n == kLanes; t += kWide) {
        VW d = VW::load(dout.at(t, c), dout.ld);
        VF x[kWide + W - 1];  // the tokens that meet these
#pragma GCC unroll 8
        for (int w = 1; w < W; ++w) x[w - 1] = v.window[w];
        const VW pre = VW::each([&](int i) FOLDSCAN_LAMBDA {
          __builtin_prefetch(tile.x.at(t + kConvStep + i, c));
          __builtin_prefetch(dout.at(t + kConvStep + i, c));
          x[W - 1 + i] = VF::load(tile.x.at(t + i, c));
          push(v.window, x[W - 1 + i]);
          return convolve(v.tap, v.bias, v.window);
        });
        if (silu) d = d * vsilu_grad_for<S>(pre);
#pragma GCC unroll 4
        for (int i = 0; i < kWide; ++i) {
#pragma GCC unroll 8
          for (int w = 0; w < W; ++w) dweight[w] = fma(d.v[i], x[i + w], dweight[w]);
          dbias = dbias + d.v[i];
          push(dpre, d.v[i]);
          emit(t + i);
        }
      }
      for (; t < to; ++t) {
        VF d = VF::zero();
        if (t < tile.readable) {
          push(v.window, load_upto(tile.x.at(t, c), n));
          d = load_upto(dout.at(t, c), n);
          if (silu) d = d * vsilu_grad_for<S>(convolve(v.tap, v.bias, v.window));
        }
        if (t < tile.tokens) {
#pragma GCC unroll 8
          for (int w = 0; w < W; ++w) dweight[w] = fma(d, v.window[w], dweight[w]);
          dbias = dbias + d;
        }
        push(dpre, d);
        emit(t);
      }
#pragma GCC unroll 8
      for (int w = 1; w < W; ++w) dpre[w].store(carry.at(w - 1, c));
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) dweight[w].store(grads.at(w, c));
      dbias.store(grads.at(W, c));
    });
  }
}

// Calls fn with W as a constant.
template <class Fn>
void with_width(int64_t W, const Fn& fn) {
  switch (W) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    case 5:
      return fn(std::integral_constant<int, 5>{});
    case 6:
      return fn(std::integral_constant<int, 6>{});
    case 7:
      return fn(std::integral_constant<int, 7>{});
    default:
      return fn(std::integral_constant<int, kMaxWidth>{});
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
