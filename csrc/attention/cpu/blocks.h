// The keys and values of one block as operands of the forward pass's two products.
//
// Many rows: K^T and V are packed once, for all tiles of rows that share them. Few rows (decoding): the keys come from
// memory and are used once, so they are taken where they lie, a slab at a time: K is transposed and bf16 V paired into
// a slab that stays in L1, fp32 V is an operand as it is. Either way the operands are the same numbers, summed in the
// same order.
#pragma once

#include "attention/cpu/tiles.h"

namespace foldscan::FOLDSCAN_ISA::attention {
namespace {

constexpr int64_t kBlockKeys = 256;
constexpr int64_t kFewRows = 16;

// Keys that a thread will most likely read after those of a block.
struct Next {
  Pair pair;
  int64_t first;
};

template <class T>
class Block {
 public:
  // For tiles of a unit of `rows` rows.
  Block(const Problem& p, const Pair& pair, int64_t rows, Scratch& scratch)
      : p_(p),
        pair_(pair),
        packed_(rows > kFewRows),
        gather_(p.block_table ? scratch.get<T>(kSlab * imax(p.D, p.Dv)) : nullptr),
        k_(scratch.get<T>(b_packed_size<T>(p.D, packed_ ? kBlockKeys : kSlab))),
        v_(scratch.get<T>(b_packed_size<T>(packed_ ? kBlockKeys : kSlab, p.Dv))) {}

  // Turns to the keys [first, first + count) of the sequence, `first` at a multiple of kNR.
  void open(int64_t first, int64_t count, const Next& after) {
    first_ = first;
    count_ = count;
    if (packed_) return pack();
    after_ = after;
    segment_ = -1;
    run_ = left_ = 0;
    fetch(kLead);
  }

  // s (rows x width) = q K^T for the keys from `from` on, counted from the block's first.
  FOLDSCAN_INLINE void scores(int64_t rows, int64_t from, int64_t width, const T* q, int64_t ldq, float* s) {
    const int64_t panel = b_panel_size<T>(p_.D);
    if (packed_) return multiply<T>(rows, width, p_.D, q, ldq, k_ + from / kNR * panel, panel, s, kBlockKeys);
    for (int64_t n = 0; n < width; n += kSlab) {
      const int64_t count = imin(kSlab, width - n);
      const Rows<T> k = key_rows(p_, pair_, false, first_ + from + n, count, gather_);
      for (int64_t i = 0; i < count; i += kLanes)
        pack_b_col_vector(k.p + i * k.stride, k.stride, p_.D, imin(kLanes, count - i),
                          k_ + i / kNR * panel + i % kNR * kK<T>, [&] { fetch(kLanes * kWhilePacking / 4); });
      for (int64_t d = 0; d < p_.D; d += kPiece) {
        fetch(count * lines(kPiece) * (4 - kWhilePacking) / 4);
        gemm_block<T>(rows, count, imin(kPiece, p_.D - d), q + d, ldq, kK<T>, k_ + d * kNR, kNR * kK<T>, panel, s + n,
                      kBlockKeys, d > 0);
      }
    }
  }

  // o (rows x Dv) = P V, P (rows x width).
  FOLDSCAN_INLINE void mix(int64_t rows, int64_t from, int64_t width, const T* prob, float* o) {
    if (packed_)
      return multiply<T>(rows, p_.Dv, width, prob, kBlockKeys, v_ + from * kNR, b_panel_size<T>(count_), o, p_.Dv);
    const bool in_place = sizeof(T) == 4 && p_.Dv % kLanes == 0;
    constexpr int64_t slab = kSlab / 2, part = 8;
    for (int64_t n = 0; n < width; n += slab) {
      const int64_t count = imin(slab, width - n);
      const Rows<T> v = key_rows(p_, pair_, true, first_ + from + n, count, gather_);
      for (int64_t d = 0; d < p_.Dv; d += kNR) {
        const int64_t cols = imin(kNR, p_.Dv - d), all = count * lines(cols);
        if (in_place) {
          fetch(all);
          gemm_block<T>(rows, cols, count, prob + n, kBlockKeys, kK<T>, v.p + d, v.stride, kNR, o + d, p_.Dv, n > 0);
          continue;
        }
        for (int64_t j = 0; j < count; j += part) {
          fetch(part * lines(cols) * kWhilePacking / 4);
          pack_b_rows(v.p + j * v.stride + d, v.stride, imin(part, count - j), cols, v_ + j * kNR);
        }
        fetch(all * (4 - kWhilePacking) / 4);
        gemm_block<T>(rows, cols, count, prob + n, kBlockKeys, kK<T>, v_, kNR * kK<T>, b_panel_size<T>(count), o + d,
                      p_.Dv, n > 0);
      }
    }
  }

 private:
  static constexpr int64_t kSlab = kNR > 64 ? kNR : 64;
  static constexpr int64_t kPiece = 32;        // of a head, between fetches
  static constexpr int64_t kLead = 128;        // cache lines between fetching and reading
  static constexpr int64_t kWhilePacking = 3;  // quarters of the lines that are fetched while packing, not multiplying

  static int64_t lines(int64_t elements) { return ceil_div(elements * static_cast<int64_t>(sizeof(T)), 64); }

  void pack() {
    for (int64_t n = 0; n < count_; n += kSlab) {
      const int64_t slab = imin(kSlab, count_ - n);
      const Rows<T> k = key_rows(p_, pair_, false, first_ + n, slab, gather_);
      pack_b_cols(k.p, k.stride, p_.D, slab, k_ + n / kNR * b_panel_size<T>(p_.D));
      const Rows<T> v = key_rows(p_, pair_, true, first_ + n, slab, gather_);
      for (int64_t d = 0; d < p_.Dv; d += kNR)
        pack_b_rows(v.p + d, v.stride, slab, imin(kNR, p_.Dv - d), v_ + d / kNR * b_panel_size<T>(count_) + n * kNR);
    }
  }

  // Asks for the next cache lines: K of the block, V of the block, then the first of what comes after. A few at a time
  // and all the time, between the pieces of arithmetic: a core can wait for a few dozen lines at once and stands still
  // when it asks for more, and rows of one head are too far apart for the hardware to foresee.
  FOLDSCAN_INLINE void fetch(int64_t lines) {
    for (; lines > 0; lines -= row_lines_) {
      if (run_ == 0 && !next_run()) return;
      for (int64_t i = 0; i < row_lines_; ++i) __builtin_prefetch(at_ + i * 64);
      at_ += stride_;
      --run_;
    }
  }

  // The next rows at one stride.
  bool next_run() {
    if (left_ == 0) {
      if (segment_ == 2) return false;
      ++segment_;
      row_lines_ = lines(segment_ == 1 ? p_.Dv : p_.D);
      stride_ = (segment_ == 1 ? p_.v_row : p_.k_row) * static_cast<int64_t>(sizeof(T));
      key_ = segment_ == 2 ? after_.first : first_;
      left_ = segment_ == 2 ? imax(0, imin(after_.pair.Lk - key_, kLead / row_lines_)) : count_;
      if (left_ == 0) return false;
    }
    at_ = reinterpret_cast<const char*>(key_row<T>(p_, segment_ == 2 ? after_.pair : pair_, segment_ == 1, key_, run_));
    run_ = imin(run_, left_);
    key_ += run_;
    left_ -= run_;
    return true;
  }

  const Problem& p_;
  const Pair& pair_;
  const bool packed_;
  T *const gather_, *const k_, *const v_;
  int64_t first_ = 0, count_ = 0;
  // Of fetch: the keys to come (in K, V or what comes after), and the current run of rows.
  Next after_{};
  int segment_ = 0;
  int64_t key_ = 0, left_ = 0, run_ = 0, row_lines_ = 0, stride_ = 0;
  const char* at_ = nullptr;
};

}  // namespace
}  // namespace foldscan::FOLDSCAN_ISA::attention
