// 2:4 sparse weights: mask, compression, and the linear layer that reads the compressed form.
//
// Algorithm: the tiles of core/matmul.h. A run of a panel is expanded into the layout of the micro-kernels when a tile
//   needs it, in L2: the compressed bytes come from memory once for every kTileRows rows, the dense ones never do.
//   Where an element of four belongs is a set of codes, and whether a code is in a set one test of all lanes.
// FLOPs: 2 M N K (the zeros are multiplied). Bytes of the weight: 9/16 of a dense bf16 one, 17/32 of fp32.
// Numerics and determinism: the same bits as csrc/linear with the dense masked weight, whatever the number of rows and
//   threads, because it is the same sum, zeros included.
#include "core/matmul.h"
#include "pruning/pruning.h"

namespace foldscan::FOLDSCAN_ISA::pruning {
namespace {

using namespace foldscan::pruning;

static_assert(kPanel % kNR == 0 && kKC % 8 == 0);
constexpr int64_t kAheadBytes = 8192;

// Where the columns from n on (a multiple of kNR) of a compressed weight lie.
template <class W>
struct Columns {
  const W* values;
  const uint8_t* codes;

  FOLDSCAN_INLINE Columns(const void* all_values, const uint8_t* all_codes, int64_t K, int64_t n)
      : values(static_cast<const W*>(all_values) + n / kPanel * (K / 2) * kPanel + n % kPanel),
        codes(all_codes + n / kPanel * ceil_div(K, 8) * kPanel + n % kPanel) {}
};

// kLanes values as T has them.
template <class T, class W>
FOLDSCAN_INLINE VF load_as(const W* p) {
  if constexpr (sizeof(T) < sizeof(W)) {
    T rounded[kLanes];
    VF::load(p).store(rounded);
    return VF::load(rounded);
  } else {
    return VF::load(p);
  }
}

// w[r] = column i of row 4 group + r, for kLanes columns. A code is i0 + 4 i1 with i0 < i1.
template <class T, class W>
FOLDSCAN_INLINE void expand_group(const Columns<W>& from, int64_t group, int64_t i, VF (&w)[4]) {
  const W* p = from.values + 2 * group * kPanel + i;
  const VF v0 = load_as<T>(p), v1 = load_as<T>(p + kPanel), zero = VF::zero();
  const VC code = VC::load(from.codes + group / 2 * kPanel + i, group % 2 ? 4 : 0);
  const auto first = [&](int r) { return code.in(0x1111 << r); };
  const auto second = [&](int r) { return code.in(0xf << 4 * r); };
  w[0] = select(first(0), v0, zero);
  w[1] = select(first(1), v0, select(second(1), v1, zero));
  w[2] = select(first(2), v0, select(second(2), v1, zero));
  w[3] = select(second(3), v1, zero);
}

// A compressed weight as the B of matmul_tile. `own`: b_panel_size<T>(kKC).
template <class T, class W>
struct SparseB {
  const void* values;
  const uint8_t* codes;
  int64_t K;
  T* own;
  const T* run(int64_t, int64_t) const { return own; }
  FOLDSCAN_INLINE void prepare(int64_t n, int64_t, int64_t k, int64_t kc) const {
    const Columns<W> from(values, codes, K, n);
    T* to = own;
    for (int64_t j = 0; j < kc; j += 4, to += 4 * kNR) {
      // Expanding reads too slowly for the hardware to run far ahead of it.
      const char* next = reinterpret_cast<const char*>(from.values + (k + j) / 2 * kPanel) + kAheadBytes;
      for (int64_t i = 0; i < 2 * kPanel * static_cast<int64_t>(sizeof(W)); i += 64) __builtin_prefetch(next + i);
      if (j % 8 == 0) __builtin_prefetch(from.codes + (k + j) / 8 * kPanel + kAheadBytes / 8);
      for (int64_t i = 0; i < kNR; i += kLanes) {
        VF w[4];
        expand_group<T>(from, (k + j) / 4, i, w);
        if constexpr (sizeof(T) == 4) {
          for (int r = 0; r < 4; ++r) w[r].store(to + r * kNR + i);
        } else {
          pairs(w[0], w[1]).store(to + 2 * i);
          pairs(w[2], w[3]).store(to + 2 * kNR + 2 * i);
        }
      }
    }
  }
};

template <class X, class W>
void run_linear(const Linear24& p) {
  const StridedRows<X, X> load_a{static_cast<const X*>(p.x), p.x_row, 1};
  X* out = static_cast<X*>(p.out);
  const auto store = [&](int64_t m, int64_t n, const float* row, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      VF v = load_upto(row + i, count - i);
      if (p.bias) v = v + load_upto(p.bias + n + i, count - i);
      store_upto(v, out + m * p.N + n + i, count - i);
    }
  };
  matmul_tasks<X>(p.M, p.N, p.K, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols, X* a, float* c) {
    Scratch scratch;
    const SparseB<X, W> b{p.values, p.codes, p.K, scratch.get<X>(b_panel_size<X>(kKC))};
    matmul_tile<X>(m0, rows, n0, cols, p.K, p.K, load_a, b, a, c, nullptr, store);
  });
}

// dx (M, K) = dout (M, N) W: the weight is expanded to dense (K, N) once and packed along K.
template <class X, class W>
void run_backward(const Linear24Backward& p) {
  const X* dout = static_cast<const X*>(p.dout);
  if (p.dx) {
    Scratch scratch;
    X* dense = scratch.get<X>(p.K * p.N);
    parallel_for(p.K / 4, grain_for(p.N * 4), [&](int64_t group) {
      for (int64_t n = 0; n < p.N; n += kLanes) {
        VF w[4];
        expand_group<X>(Columns<W>(p.values, p.codes, p.K, n / kNR * kNR), group, n % kNR, w);
        for (int r = 0; r < 4; ++r) store_upto(w[r], dense + (4 * group + r) * p.N + n, p.N - n);
      }
    });
    X* dx = static_cast<X*>(p.dx);
    matmul<X>(
        p.M, p.K, p.N, StridedRows<X, X>{dout, p.N, 1}, RawB<X, X>{dense, 1, p.N},
        [&](int64_t m, int64_t k, const float* row, int64_t count) { copy_row(row, count, dx + m * p.K + k, count); });
  }
  if (p.dbias) column_sums(dout, p.M, p.N, p.dbias);
}

template <class T>
void run_mask(const Mask24& p) {
  const T* scores = static_cast<const T*>(p.scores);
  parallel_for(p.rows, grain_for(p.cols * 4), [&](int64_t r) {
    for (int64_t c = 0; c < p.cols; c += 4) {
      float s[4];
      for (int i = 0; i < 4; ++i) {
        s[i] = to_float(scores[r * p.cols + c + i]);
        if (p.magnitude && s[i] < 0) s[i] = -s[i];
      }
      int first = 0;
      for (int i = 1; i < 4; ++i)
        if (s[i] > s[first]) first = i;
      int second = first == 0 ? 1 : 0;
      for (int i = second + 1; i < 4; ++i)
        if (i != first && s[i] > s[second]) second = i;
      for (int i = 0; i < 4; ++i) p.mask[r * p.cols + c + i] = i == first || i == second;
    }
  });
}

template <class T>
void run_compress(const Compress24& p) {
  const T* weight = static_cast<const T*>(p.weight);
  T* values = static_cast<T*>(p.values);
  // A task takes the groups of a few cache lines of every row.
  constexpr int64_t kGroups = 16;
  const int64_t pieces = ceil_div(p.K / 4, kGroups), code_rows = ceil_div(p.K, 8);
  parallel_for(ceil_div(p.N, kPanel) * pieces, grain_for(kPanel * kGroups * 8), [&](int64_t task) {
    const int64_t panel = task / pieces, begin = task % pieces * kGroups, end = imin(p.K / 4, begin + kGroups);
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t n = panel * kPanel + i;
      for (int64_t g = begin; g < end; ++g) {
        T* to = values + (panel * (p.K / 2) + 2 * g) * kPanel + i;
        uint8_t& byte = p.codes[(panel * code_rows + g / 2) * kPanel + i];
        int place[2] = {0, 1}, found = 0;
        to[0] = to[kPanel] = from_float<T>(0.0f);
        if (n < p.N) {
          for (int c = 0; c < 4; ++c)
            if (p.mask[n * p.K + 4 * g + c] && found < 2) place[found++] = c;
          for (int c = 0; c < 2; ++c) to[c * kPanel] = weight[n * p.K + 4 * g + place[c]];
        }
        const uint8_t code = static_cast<uint8_t>(place[0] + 4 * place[1]);
        byte = static_cast<uint8_t>(g % 2 ? byte | code << 4 : code);
      }
    }
  });
}

}  // namespace

void linear_2_4(const Linear24& p) {
  if (p.x_type == DType::kF32) {
    run_linear<float, float>(p);
  } else if (p.value_type == DType::kF32) {
    run_linear<bf16, float>(p);
  } else {
    run_linear<bf16, bf16>(p);
  }
}

void linear_2_4_backward(const Linear24Backward& p) {
  if (p.x_type == DType::kF32) {
    run_backward<float, float>(p);
  } else if (p.value_type == DType::kF32) {
    run_backward<bf16, float>(p);
  } else {
    run_backward<bf16, bf16>(p);
  }
}

void mask_2_4(const Mask24& p) {
  if (p.type == DType::kF32) {
    run_mask<float>(p);
  } else {
    run_mask<bf16>(p);
  }
}

void compress_2_4(const Compress24& p) {
  if (p.type == DType::kF32) {
    run_compress<float>(p);
  } else {
    run_compress<bf16>(p);
  }
}

}  // namespace foldscan::FOLDSCAN_ISA::pruning
