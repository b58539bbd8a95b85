#include "core/isa.h"
#include "ssm/ssm.h"

FOLDSCAN_DISPATCH(ssm, scan_forward, ScanForward)
FOLDSCAN_DISPATCH(ssm, scan_backward, ScanBackward)
FOLDSCAN_DISPATCH(ssm, scan_extend, ScanExtend)
FOLDSCAN_DISPATCH(ssm, state_update, StateUpdate)
FOLDSCAN_DISPATCH(ssm, conv_forward, Conv)
FOLDSCAN_DISPATCH(ssm, conv_backward, Conv)
FOLDSCAN_DISPATCH(ssm, conv_update, ConvUpdate)
FOLDSCAN_DISPATCH(ssm, selective_scan_forward, SelectiveScan)
FOLDSCAN_DISPATCH(ssm, selective_scan_backward, SelectiveScan)
FOLDSCAN_DISPATCH(ssm, rmsnorm_forward, RmsNorm)
FOLDSCAN_DISPATCH(ssm, rmsnorm_backward, RmsNorm)

namespace foldscan::ssm {

int64_t max_segments(const Sequences& s) {
  if (s.cu_seqlens) return s.count;
  return s.seq_idx ? s.rows * s.length : s.rows;
}

int64_t fill_segments(const Sequences& s, Segment* out) {
  int64_t n = 0;
  if (s.cu_seqlens) {
    for (int64_t i = 0; i < s.count; ++i) out[n++] = {s.cu_seqlens[i], s.cu_seqlens[i + 1], i, i, false};
    return n;
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t first = row * s.length, last = first + s.length;
    int64_t begin = first;
    for (int64_t t = first + 1; s.seq_idx && t < last; ++t) {
      if (s.seq_idx[t] == s.seq_idx[t - 1]) continue;
      out[n++] = {begin, t, begin == first ? row : -1, -1, s.seq_idx[begin] < 0};
      begin = t;
    }
    const bool padding = s.seq_idx && s.length > 0 && s.seq_idx[begin] < 0;
    out[n++] = {begin, last, begin == first ? row : -1, row, padding};
  }
  return n;
}

}  // namespace foldscan::ssm
