// Tiles of the causal convolution: their numbering through all sequences, and copies of what cannot be read in place.
#pragma once

#include "ssm/cpu/conv_tile.h"

namespace foldscan::FOLDSCAN_ISA::ssm {

using namespace foldscan::ssm;

constexpr int64_t kConvTokens = 64;  // tokens of a tile

// Rows [t0, t0 + n) x channels [d0, d0 + kConvChannels) of a (row, channel, token) tensor into dst[t][kConvChannels],
// fp32, zero beyond D. Tokens are global: row = t / length.
template <class T>
void stage(const T* x, const int64_t* strides, int64_t length, int64_t t0, int64_t n, int64_t d0, int64_t D,
           float* dst) {
  if (n <= 0) return;
  const int64_t row = t0 / length, width = imin(kConvChannels, D - d0);
  const T* src = x + row * strides[0] + d0 * strides[1] + (t0 - row * length) * strides[2];
  if (strides[1] == 1) {
    for (int64_t i = 0; i < n; ++i) copy_row(src + i * strides[2], width, dst + i * kConvChannels, kConvChannels);
  } else if (strides[2] == 1) {
    transpose_copy(src, strides[1], width, n, dst, kConvChannels, true);
    for (int64_t i = 0; i < n && width < kConvChannels; ++i)
      for (int64_t c = width; c < kConvChannels; ++c) dst[i * kConvChannels + c] = 0.0f;
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < kConvChannels; ++c)
        dst[i * kConvChannels + c] = c < width ? to_float(src[c * strides[1] + i * strides[2]]) : 0.0f;
  }
}

template <class T>
void unstage(const float* src, int64_t length, int64_t t0, int64_t n, int64_t d0, int64_t D, T* y,
             const int64_t* strides) {
  if (n <= 0) return;
  const int64_t row = t0 / length, width = imin(kConvChannels, D - d0);
  T* dst = y + row * strides[0] + d0 * strides[1] + (t0 - row * length) * strides[2];
  if (strides[1] == 1) {
    for (int64_t i = 0; i < n; ++i) copy_row(src + i * kConvChannels, width, dst + i * strides[2], width);
  } else if (strides[2] == 1) {
    transpose_copy(src, kConvChannels, n, width, dst, strides[1]);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; ++c)
        dst[c * strides[1] + i * strides[2]] = from_float<T>(src[i * kConvChannels + c]);
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
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + ceil_div(s[i].end - s[i].begin, kConvTokens);
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

// The W - 1 tokens before token t0 of a segment, channels [d0, d0 + kConvChannels): the sequence's own where it has
// them, before its beginning the initial state or zeros.
template <class T, class To>
void stage_past(const Conv& p, const Segment& seg, int64_t t0, int64_t d0, To* dst) {
  const int64_t past = p.W - 1, outside = past - imin(past, t0 - seg.begin);
  const bool known = p.initial_states && seg.initial_row >= 0;
  const T* state = static_cast<const T*>(p.initial_states);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < past; ++i) {
    const int64_t t = t0 - past + i, column = past - (seg.begin - t);
    for (int64_t c = 0; c < kConvChannels; ++c) {
      float v = 0.0f;
      if (d0 + c < p.D && i >= outside) {
        v = to_float(*address(x, p.x_strides, p.seqs.length, t, d0 + c));
      } else if (d0 + c < p.D && known) {
        v = to_float(state[(seg.initial_row * p.D + d0 + c) * past + column]);
      }
      dst[i * kConvChannels + c] = from_float<To>(v);
    }
  }
}

// The tile [t0, t0 + tokens) of a segment, read in place where channels are contiguous, else staged in fp32: calls
// direct(ConvTile<T>) or staged(ConvTile<float>).
template <class T, class Direct, class Staged>
void visit_tile(const Conv& p, const Segment& seg, int64_t t0, int64_t tokens, int64_t ahead, int64_t d0,
                bool contiguous, Scratch& scratch, const Direct& direct, const Staged& staged) {
  const int64_t past = p.W - 1, channels = imin(kConvChannels, p.D - d0), ld = p.x_strides[2];
  if (contiguous) {
    const T* x = address(static_cast<const T*>(p.x), p.x_strides, p.seqs.length, t0, d0);
    if (t0 - past >= seg.begin)
      return direct(ConvTile<T>{{x, ld}, {x - past * ld, ld}, tokens, tokens + ahead, channels});
    T* before = scratch.get<T>(past * kConvChannels);
    stage_past<T>(p, seg, t0, d0, before);
    return direct(ConvTile<T>{{x, ld}, {before, kConvChannels}, tokens, tokens + ahead, channels});
  }
  float* in = scratch.get<float>((past + tokens + ahead) * kConvChannels);
  stage_past<T>(p, seg, t0, d0, in);
  stage(static_cast<const T*>(p.x), p.x_strides, p.seqs.length, t0, tokens + ahead, d0, p.D, in + past * kConvChannels);
  staged(ConvTile<float>{
      {in + past * kConvChannels, kConvChannels}, {in, kConvChannels}, tokens, tokens + ahead, channels});
}

}  // namespace foldscan::FOLDSCAN_ISA::ssm
