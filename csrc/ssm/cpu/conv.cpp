// Causal depthwise convolution with optional SiLU: y[t] = act(bias + sum_w weight[w] x[t - W + 1 + w]).
//
// Channels are the vector dimension: a vector of channels walks down a few tokens with its W taps and its last W tokens
// in registers, then the next vector does. Walking far would touch rows whose distance is often a multiple of 4 KiB and
// evict them before the neighbour comes. Tensors with contiguous channels are read and written where they lie; other
// layouts are transposed into fp32 tiles and back. FLOPs: 2 W per element. Bytes: x and out once. Numerics: fp32, bias
// first, taps in order: the same chain in the one-token update, so decoding has the bits of the full convolution.
// Determinism: weight gradients are summed over the tokens of kGroup tiles in order, then over these groups in order.
#include <type_traits>

#include "core/pack.h"
#include "core/parallel.h"
#include "core/vmath.h"
#include "ssm/ssm.h"

namespace foldscan::FOLDSCAN_ISA::ssm {
namespace {

using namespace foldscan::ssm;

constexpr int kMaxWidth = 8;
constexpr int64_t kTokens = 64;      // tokens of a tile
constexpr int64_t kStep = 8;         // of them, a vector of channels walks so many before its neighbour does
constexpr int64_t kChannels = 1024;  // channels of a tile
constexpr int64_t kGroup = 16;       // tiles whose weight gradients one task sums

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

// Taps and bias of all channels as rows of vectors: weight[w] at w * ld, bias at W * ld; zero beyond D.
struct Taps {
  const float* rows;
  int64_t ld;
  FOLDSCAN_INLINE const float* row(int64_t w) const { return rows + w * ld; }
};

Taps make_taps(const float* weight, const float* bias, int64_t D, int64_t W, Scratch& scratch) {
  const int64_t ld = round_up(D, kLanes);
  float* rows = scratch.get<float>((W + 1) * ld);
  transpose_copy(weight, W, D, W, rows, ld, true);
  copy_row(bias ? bias : rows, bias ? D : 0, rows + W * ld, ld);
  return {rows, ld};
}

// Rows of channels, `ld` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t ld;
  FOLDSCAN_INLINE T* at(int64_t t, int64_t c) const { return data + t * ld + c; }
};

// What a tile sees: its tokens, `readable` ones of x from its first on, and in `past` the W - 1 before that.
template <class T>
struct Tile {
  Rows<const T> x, past;
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
  FOLDSCAN_INLINE Column(const Taps& taps, int64_t d, const Tile<T>& tile, int64_t from, int64_t c, int64_t n) {
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

// Channel d0 of the taps is column 0 of the tile.
template <int W, class T>
void forward_tile(Taps taps, int64_t d0, Tile<T> tile, bool silu, Rows<T> y) {
  for (int64_t from = 0; from < tile.tokens; from += kStep) {
    const int64_t to = imin(from + kStep, tile.tokens);
    each_column(tile.channels, [&](int64_t c, int64_t n) FOLDSCAN_LAMBDA {
      Column<W> v(taps, d0 + c, tile, from, c, n);
      int64_t t = from;
      for (; t + kWide <= to && n == kLanes; t += kWide) {
        const VW sum = VW::each([&](int i) FOLDSCAN_LAMBDA {
          __builtin_prefetch(tile.x.at(t + kStep + i, c));
          push(v.window, VF::load(tile.x.at(t + i, c)));
          return convolve(v.tap, v.bias, v.window);
        });
        (silu ? vsilu(sum) : sum).store(y.at(t, c), y.ld);
      }
      for (; t < to; ++t) {
        push(v.window, load_upto(tile.x.at(t, c), n));
        const VF sum = convolve(v.tap, v.bias, v.window);
        store_upto(silu ? vsilu(sum) : sum, y.at(t, c), n);
      }
    });
  }
}

// dpre[t] = dout[t] act'(pre[t]); dx[t] = sum_w weight[w] dpre[t + W - 1 - w]; dweight[w] += dpre[t] x[t - W + 1 + w].
// The tile has readable tokens behind its own, whose dpre reaches back. dpast, where wanted: the gradient of `past`.
template <int W, class T>
void backward_tile(Taps taps, int64_t d0, Tile<T> tile, Rows<const T> dout, bool silu, Rows<T> dx, Rows<float> dpast,
                   Rows<float> grads) {
  alignas(64) float last[kMaxWidth * kChannels];  // dpre of the W - 1 tokens before the step
  const Rows<float> carry{last, kChannels};
  const int64_t end = tile.tokens + W - 1;
  for (int64_t from = 0; from < end; from += kStep) {
    const int64_t to = imin(from + kStep, end);
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
          __builtin_prefetch(tile.x.at(t + kStep + i, c));
          __builtin_prefetch(dout.at(t + kStep + i, c));
          x[W - 1 + i] = VF::load(tile.x.at(t + i, c));
          push(v.window, x[W - 1 + i]);
          return convolve(v.tap, v.bias, v.window);
        });
        if (silu) d = d * vsilu_grad(pre);
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
          if (silu) d = d * vsilu_grad(convolve(v.tap, v.bias, v.window));
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

// Tiles are numbered through all segments.
struct Grid {
  const Segment* segments;
  const int64_t* first_tile;
  int64_t count, tiles;

  Grid(const Sequences& seqs, Scratch& scratch) {
    Segment* s = scratch.get<Segment>(max_segments(seqs));
    count = fill_segments(seqs, s);
    int64_t* first = scratch.get<int64_t>(count + 1);
    first[0] = 0;
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + ceil_div(s[i].end - s[i].begin, kTokens);
    segments = s;
    first_tile = first;
    tiles = first[count];
  }

  int64_t segment_of(int64_t tile) const {
    int64_t lo = 0, hi = count;
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      (first_tile[mid] <= tile ? lo : hi) = mid;
    }
    return lo;
  }
};

// Address of token t, channel d of a (row, channel, token) tensor; tokens are global.
template <class T>
T* address(T* x, const int64_t* strides, int64_t length, int64_t t, int64_t d) {
  return x + t / length * strides[0] + d * strides[1] + t % length * strides[2];
}

// The W - 1 tokens before token t0 of a segment, channels [d0, d0 + kChannels): the sequence's own where it has them,
// before its beginning the initial state or zeros.
template <class T, class To>
void stage_past(const Conv& p, const Segment& seg, int64_t t0, int64_t d0, To* dst) {
  const int64_t past = p.W - 1, outside = past - imin(past, t0 - seg.begin);
  const bool known = p.initial_states && seg.initial_row >= 0;
  const T* state = static_cast<const T*>(p.initial_states);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < past; ++i) {
    const int64_t t = t0 - past + i, column = past - (seg.begin - t);
    for (int64_t c = 0; c < kChannels; ++c) {
      float v = 0.0f;
      if (d0 + c < p.D && i >= outside) {
        v = to_float(*address(x, p.x_strides, p.seqs.length, t, d0 + c));
      } else if (d0 + c < p.D && known) {
        v = to_float(state[(seg.initial_row * p.D + d0 + c) * past + column]);
      }
      dst[i * kChannels + c] = from_float<To>(v);
    }
  }
}

// The tile [t0, t0 + tokens) of a segment, read in place where channels are contiguous, else staged in fp32: calls
// direct(Tile<T>) or staged(Tile<float>).
template <class T, class Direct, class Staged>
void visit_tile(const Conv& p, const Segment& seg, int64_t t0, int64_t tokens, int64_t ahead, int64_t d0,
                bool contiguous, Scratch& scratch, const Direct& direct, const Staged& staged) {
  const int64_t past = p.W - 1, channels = imin(kChannels, p.D - d0), ld = p.x_strides[2];
  if (contiguous) {
    const T* x = address(static_cast<const T*>(p.x), p.x_strides, p.seqs.length, t0, d0);
    if (t0 - past >= seg.begin) return direct(Tile<T>{{x, ld}, {x - past * ld, ld}, tokens, tokens + ahead, channels});
    T* before = scratch.get<T>(past * kChannels);
    stage_past<T>(p, seg, t0, d0, before);
    return direct(Tile<T>{{x, ld}, {before, kChannels}, tokens, tokens + ahead, channels});
  }
  float* in = scratch.get<float>((past + tokens + ahead) * kChannels);
  stage_past<T>(p, seg, t0, d0, in);
  stage(static_cast<const T*>(p.x), p.x_strides, p.seqs.length, t0, tokens + ahead, d0, p.D, in + past * kChannels);
  staged(Tile<float>{{in + past * kChannels, kChannels}, {in, kChannels}, tokens, tokens + ahead, channels});
}

template <int W, class T>
void run_forward(const Conv& p) {
  Scratch scratch;
  const Grid grid(p.seqs, scratch);
  const Taps taps = make_taps(p.weight, p.bias, p.D, W, scratch);
  const int64_t d_blocks = ceil_div(p.D, kChannels);
  const bool contiguous = p.x_strides[1] == 1 && p.out_strides[1] == 1;
  parallel_for(grid.tiles * d_blocks, 1, [&](int64_t task) {
    const int64_t tile = task / d_blocks, d0 = task % d_blocks * kChannels, s = grid.segment_of(tile);
    const Segment& seg = grid.segments[s];
    const int64_t t0 = seg.begin + (tile - grid.first_tile[s]) * kTokens, n = imin(kTokens, seg.end - t0);
    Scratch inner;
    T* out = static_cast<T*>(p.out);
    const auto through_buffer = [&](const Tile<float>& staged) {
      float* y = inner.get<float>(n * kChannels);
      forward_tile<W>(taps, d0, staged, p.silu, Rows<float>{y, kChannels});
      for (int64_t i = 0; seg.padding && i < n * kChannels; ++i) y[i] = 0.0f;
      unstage(y, p.seqs.length, t0, n, d0, p.D, out, p.out_strides);
    };
    visit_tile<T>(
        p, seg, t0, n, 0, d0, contiguous && !seg.padding, inner,
        [&](const Tile<T>& direct) {
          T* y = address(out, p.out_strides, p.seqs.length, t0, d0);
          forward_tile<W>(taps, d0, direct, p.silu, Rows<T>{y, p.out_strides[2]});
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
  const int64_t d_blocks = ceil_div(p.D, kChannels), groups = ceil_div(grid.tiles, kGroup);
  const bool contiguous = p.x_strides[1] == 1 && p.out_strides[1] == 1 && p.dx_strides[1] == 1;
  float* partial = scratch.get<float>(groups * d_blocks * (W + 1) * kChannels);
  parallel_for(groups * d_blocks, 1, [&](int64_t task) {
    const int64_t group = task / d_blocks, d0 = task % d_blocks * kChannels, width = imin(kChannels, p.D - d0);
    const Rows<float> grads{partial + task * (W + 1) * kChannels, kChannels};
    for (int64_t i = 0; i < (W + 1) * kChannels; ++i) grads.data[i] = 0.0f;
    for (int64_t tile = group * kGroup; tile < imin(grid.tiles, (group + 1) * kGroup); ++tile) {
      const int64_t s = grid.segment_of(tile);
      const Segment& seg = grid.segments[s];
      const int64_t t0 = seg.begin + (tile - grid.first_tile[s]) * kTokens, n = imin(kTokens, seg.end - t0);
      const int64_t ahead = imin(past, seg.end - t0 - n);
      Scratch inner;
      const bool state = t0 == seg.begin && p.dinitial_states && seg.initial_row >= 0;
      const Rows<float> dpast{state ? inner.get<float>(kMaxWidth * kChannels) : nullptr, kChannels};
      const T* x_dout = static_cast<const T*>(p.dout);
      visit_tile<T>(
          p, seg, t0, n, ahead, d0, contiguous && !seg.padding, inner,
          [&](const Tile<T>& direct) {
            const T* dout = address(x_dout, p.out_strides, p.seqs.length, t0, d0);
            T* dx = address(static_cast<T*>(p.dx), p.dx_strides, p.seqs.length, t0, d0);
            backward_tile<W>(taps, d0, direct, Rows<const T>{dout, p.out_strides[2]}, p.silu,
                             Rows<T>{dx, p.dx_strides[2]}, dpast, grads);
          },
          [&](const Tile<float>& staged) {
            float* dout = inner.get<float>((n + past) * kChannels);
            float* dx = inner.get<float>(n * kChannels);
            stage(x_dout, p.out_strides, p.seqs.length, t0, n + ahead, d0, p.D, dout);
            for (int64_t i = 0; seg.padding && i < (n + ahead) * kChannels; ++i) dout[i] = 0.0f;
            backward_tile<W>(taps, d0, staged, Rows<const float>{dout, kChannels}, p.silu, Rows<float>{dx, kChannels},
                             dpast, grads);
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
      const float* grads = partial + (g * d_blocks + d / kChannels) * (W + 1) * kChannels + d % kChannels;
      for (int w = 0; w <= W; ++w) sums[w] += grads[w * kChannels];
    }
    for (int w = 0; w < W; ++w) p.dweight[d * W + w] = sums[w];
    p.dbias[d] = sums[W];
  }
}

template <int W, class T>
void run_update(const ConvUpdate& p) {
  constexpr int64_t past = W - 1;
  Scratch scratch;
  const Taps taps = make_taps(p.weight, p.bias, p.D, W, scratch);
  const int64_t d_blocks = ceil_div(p.D, kChannels);
  parallel_for(p.batch * d_blocks, grain_for(kChannels * p.tokens * 32), [&](int64_t task) {
    const int64_t b = task / d_blocks, d0 = task % d_blocks * kChannels, width = imin(kChannels, p.D - d0);
    const int64_t slot = p.slots ? p.slots[b] : b;
    Scratch inner;
    float* in = inner.get<float>((p.tokens + past) * kChannels);
    float* out = inner.get<float>(p.tokens * kChannels);
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
    if (!p.cache_seqlens && p.state_strides[2] == 1) {
      transpose_copy(state + column(past), p.state_strides[1], width, past, in, kChannels, true);
    } else {
      for (int64_t i = 0; i < past; ++i)
        for (int64_t c = 0; c < width; ++c)
          in[i * kChannels + c] = to_float(state[c * p.state_strides[1] + column(past - i) * p.state_strides[2]]);
    }
    float* fresh = in + past * kChannels;
    stage(static_cast<const T*>(p.x) + b * p.x_strides[0], x_strides, p.tokens, 0, p.tokens, d0, p.D, fresh);
    forward_tile<W>(taps, d0, Tile<float>{{fresh, kChannels}, {in, kChannels}, p.tokens, p.tokens, width}, p.silu,
                    Rows<float>{out, kChannels});
    unstage(out, p.tokens, 0, p.tokens, d0, p.D, y, out_strides);
    // A ring takes the new tokens at the write position; otherwise the state shifts left.
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
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_forward<w, float>(p) : run_forward<w, bf16>(p); });
}

void conv_backward(const Conv& p) {
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_backward<w, float>(p) : run_backward<w, bf16>(p); });
}

void conv_update(const ConvUpdate& p) {
  with_width(p.W, [&](auto w) { p.type == DType::kF32 ? run_update<w, float>(p) : run_update<w, bf16>(p); });
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
