#include "attention/attention.h"

#include "bindings/common.h"

namespace foldscan::bindings {
namespace {

void check_heads(const Tensor& t, const char* message) { check(t.dim() >= 3 && t.stride(t.dim() - 1) == 1, message); }

// Cumulative lengths: the values decide which memory is read.
void check_lengths(const int32_t* cu, int64_t n, int64_t total) {
  check(n >= 0 && cu[0] == 0 && (total < 0 || cu[n] == total), "argument cu_seqlens: does not run from 0 to the total");
  for (int64_t s = 0; s < n; ++s) check(cu[s] <= cu[s + 1], "argument cu_seqlens: decreases");
}

void check_pages(const int32_t* table, int64_t n_pages, int64_t used) {
  for (int64_t i = 0; i < used; ++i)
    check(table[i] >= 0 && table[i] < n_pages, "argument block_table: a used page number is out of range");
}

attention::Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                           const OptTensor& block_table, const OptTensor& sinks, double scale, double softcap,
                           int64_t window_left, int64_t window_right) {
  check_heads(q, "attention: q must be (total, heads, headdim) with a dense last dimension");
  check_heads(k, "attention: k must have a dense last dimension");
  check_heads(v, "attention: v must have a dense last dimension");
  const bool paged = block_table.has_value();
  const int64_t dim = paged ? 4 : 3;
  check(q.dim() == 3 && k.dim() == dim && v.dim() == dim, "attention: wrong number of dimensions");
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "attention: q, k, v differ in dtype");
  for (int64_t d = 0; d + 1 < dim; ++d) check(k.size(d) == v.size(d), "attention: k and v differ in shape");
  attention::Problem p{};
  p.q = data(q);
  p.k = data(k);
  p.v = data(v);
  p.cu_q = in_i32(cu_q);
  p.cu_k = in_i32(cu_k);
  p.sinks = in_f32(sinks);
  p.n = cu_q.numel() - 1;
  p.Hq = q.size(1);
  p.Hkv = k.size(dim - 2);
  p.D = q.size(2);
  p.Dv = v.size(dim - 1);
  check(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, "attention: head dimensions are 1 to 256");
  check(k.size(dim - 1) == p.D, "attention: q and k differ in head dimension");
  check(p.Hkv > 0 && p.Hq % p.Hkv == 0, "attention: query heads must be a multiple of key heads");
  check(!sinks || sinks->numel() == p.Hq, "attention: sinks must have one entry a query head");
  check(cu_k.numel() == p.n + 1, "attention: cu_seqlens_q and cu_seqlens_k differ in length");
  check_lengths(p.cu_q, p.n, q.size(0));
  check_lengths(p.cu_k, p.n, paged ? -1 : k.size(0));
  p.q_row = q.stride(0);
  p.q_head = q.stride(1);
  p.k_row = k.stride(dim - 3);
  p.k_head = k.stride(dim - 2);
  p.v_row = v.stride(dim - 3);
  p.v_head = v.stride(dim - 2);
  if (paged) {
    p.block_table = in_i32(*block_table);
    check(block_table->dim() == 2 && block_table->size(0) == p.n, "attention: block_table must have a row a sequence");
    p.table_stride = block_table->size(1);
    p.page_size = k.size(1);
    p.k_page = k.stride(0);
    p.v_page = v.stride(0);
    for (int64_t s = 0; s < p.n; ++s) {
      const int64_t used = p.cu_k[s + 1] - p.cu_k[s];
      check(used == 0 || p.page_size > 0, "argument k: pages have no slots");
      const int64_t pages = used ? ceil_div(used, p.page_size) : 0;
      check(pages <= p.table_stride, "argument block_table: has fewer pages than cu_seqlens_k needs");
      check_pages(p.block_table + s * p.table_stride, k.size(0), pages);
    }
  }
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = window_left;
  p.window_right = window_right;
  p.type = dtype_of(q);
  return p;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                             const Tensor& cu_k, const OptTensor& block_table, const OptTensor& sinks,
                                             double scale, double softcap, int64_t window_left, int64_t window_right) {
  const attention::Problem p =
      problem(q, k, v, cu_q, cu_k, block_table, sinks, scale, softcap, window_left, window_right);
  Tensor out = empty({q.size(0), p.Hq, p.Dv}, p.type);
  Tensor lse = empty({p.Hq, q.size(0)}, ScalarType::Float);
  attention::cpu::forward({.p = p, .out = data(out), .lse = f32(lse)});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const OptTensor& dlse,
                                                              const Tensor& q, const Tensor& k, const Tensor& v,
                                                              const Tensor& out, const Tensor& lse, const Tensor& cu_q,
                                                              const Tensor& cu_k, const OptTensor& sinks, double scale,
                                                              double softcap, int64_t window_left,
                                                              int64_t window_right) {
  const attention::Problem p =
      problem(q, k, v, cu_q, cu_k, std::nullopt, sinks, scale, softcap, window_left, window_right);
  check(dout.is_contiguous() && out.is_contiguous() && dout.numel() == q.size(0) * p.Hq * p.Dv &&
            out.numel() == dout.numel() && dout.scalar_type() == q.scalar_type() &&
            out.scalar_type() == q.scalar_type() && lse.numel() == q.size(0) * p.Hq &&
            (!dlse || dlse->numel() == lse.numel()),
        "attention_backward: shapes or dtypes disagree");
  Tensor dq = empty({q.size(0), p.Hq, p.D}, p.type);
  Tensor dk = empty({k.size(0), p.Hkv, p.D}, p.type);
  Tensor dv = empty({k.size(0), p.Hkv, p.Dv}, p.type);
  Tensor dsinks = empty({sinks ? p.Hq : 0}, ScalarType::Float);
  attention::cpu::backward({.p = p,
                            .out = data(out),
                            .dout = data(dout),
                            .lse = in_f32(lse),
                            .dlse = in_f32(dlse),
                            .dq = data(dq),
                            .dk = data(dk),
                            .dv = data(dv),
                            .dsinks = sinks ? f32(dsinks) : nullptr});
  return {dq, dk, dv, dsinks};
}

void kv_cache_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& positions) {
  check(k.dim() == 3 && v.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4 && k.stride(2) == 1 &&
            v.stride(2) == 1 && k_cache.stride(3) == 1 && v_cache.stride(3) == 1,
        "kv_cache_append: wrong dimensions or strides");
  check(k.scalar_type() == k_cache.scalar_type() && v.scalar_type() == v_cache.scalar_type() &&
            k.size(0) == v.size(0) && k.size(1) == v.size(1) && k_cache.size(2) == k.size(1) &&
            k_cache.size(3) == k.size(2) && v_cache.size(2) == v.size(1) && v_cache.size(3) == v.size(2) &&
            v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1),
        "kv_cache_append: shapes or dtypes disagree");
  const int64_t n = positions.numel(), ke = k.element_size(), ve = v.element_size();
  check(cu_seqlens.numel() == n + 1 && block_table.dim() == 2 && block_table.size(0) == n,
        "kv_cache_append: cu_seqlens, positions and block_table disagree");
  attention::CacheAppend p{};
  p.k = data(k);
  p.v = data(v);
  p.k_cache = data(k_cache);
  p.v_cache = data(v_cache);
  p.block_table = in_i32(block_table);
  p.cu_seqlens = in_i32(cu_seqlens);
  p.positions = in_i32(positions);
  p.n = n;
  p.Hkv = k.size(1);
  p.page_size = k_cache.size(1);
  p.table_stride = block_table.size(1);
  p.k_head_bytes = k.size(2) * ke;
  p.v_head_bytes = v.size(2) * ve;
  p.k_row = k.stride(0) * ke;
  p.k_head = k.stride(1) * ke;
  p.v_row = v.stride(0) * ve;
  p.v_head = v.stride(1) * ve;
  p.k_page = k_cache.stride(0) * ke;
  p.k_slot = k_cache.stride(1) * ke;
  p.k_cache_head = k_cache.stride(2) * ke;
  p.v_page = v_cache.stride(0) * ve;
  p.v_slot = v_cache.stride(1) * ve;
  p.v_cache_head = v_cache.stride(2) * ve;
  check_lengths(p.cu_seqlens, n, k.size(0));
  for (int64_t s = 0; s < n; ++s) {
    const int64_t count = p.cu_seqlens[s + 1] - p.cu_seqlens[s], first = p.positions[s];
    if (count == 0) continue;
    check(first >= 0, "argument positions: got a negative number of keys");
    check(p.page_size > 0 && first + count <= p.table_stride * p.page_size,
          "argument block_table: a sequence grows past the pages of its row");
    const int64_t page = first / p.page_size;
    check_pages(p.block_table + s * p.table_stride + page, k_cache.size(0),
                ceil_div(first + count, p.page_size) - page);
  }
  attention::cpu::cache_append(p);
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved) {
  check_heads(x, "rotary: x must be (tokens, heads, headdim) with a dense last dimension");
  check(x.dim() == 3 && cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1) &&
            2 * cos.size(1) <= x.size(2) && positions.numel() == x.size(0),
        "rotary: shapes disagree");
  const int32_t* at = in_i32(positions);
  for (int64_t t = 0; t < x.size(0); ++t)
    check(at[t] >= 0 && at[t] < cos.size(0), "argument rotary_cos: has fewer positions than are used");
  Tensor out = empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  attention::cpu::rotary({.x = data(x),
                          .out = data(out),
                          .cos = in_f32(cos),
                          .sin = in_f32(sin),
                          .positions = at,
                          .tokens = x.size(0),
                          .heads = x.size(1),
                          .D = x.size(2),
                          .r = cos.size(1),
                          .x_row = x.stride(0),
                          .x_head = x.stride(1),
                          .interleaved = interleaved,
                          .type = dtype_of(x)});
  return out;
}

attention::Merge merge_params(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                              const Tensor& out, const Tensor& lse) {
  check(out_a.dim() == 4 && out_a.is_contiguous() && out_b.is_contiguous() && out_a.numel() == out_b.numel() &&
            out_a.scalar_type() == out_b.scalar_type(),
        "merge_attention: outputs disagree");
  const int64_t batch = out_a.size(0), seqlen = out_a.size(1), heads = out_a.size(2);
  check(lse_a.numel() == batch * seqlen * heads && lse_b.numel() == lse_a.numel(), "merge_attention: wrong lse");
  return {.out_a = data(out_a),
          .out_b = data(out_b),
          .lse_a = in_f32(lse_a),
          .lse_b = in_f32(lse_b),
          .out = data(out),
          .lse = f32(lse),
          .batch = batch,
          .seqlen = seqlen,
          .heads = heads,
          .D = out_a.size(3),
          .type = dtype_of(out_a)};
}

std::tuple<Tensor, Tensor> merge_forward(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                         const Tensor& lse_b) {
  Tensor out = torch::stable::empty_like(out_a), lse = torch::stable::empty_like(lse_a);
  attention::cpu::merge(merge_params(out_a, lse_a, out_b, lse_b, out, lse));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_backward(const Tensor& dout, const Tensor& dlse, const Tensor& out_a,
                                                          const Tensor& lse_a, const Tensor& out_b,
                                                          const Tensor& lse_b) {
  check(dout.is_contiguous() && dout.numel() == out_a.numel() && dout.scalar_type() == out_a.scalar_type() &&
            dlse.numel() == lse_a.numel(),
        "merge_attention_backward: shapes or dtypes disagree");
  Tensor dout_a = torch::stable::empty_like(out_a), dout_b = torch::stable::empty_like(out_b);
  Tensor dlse_a = torch::stable::empty_like(lse_a), dlse_b = torch::stable::empty_like(lse_b);
  attention::cpu::merge_backward({.p = merge_params(out_a, lse_a, out_b, lse_b, dout_a, dlse_a),
                                  .dout = data(dout),
                                  .dlse = in_f32(dlse),
                                  .dout_a = data(dout_a),
                                  .dout_b = data(dout_b),
                                  .dlse_a = f32(dlse_a),
                                  .dlse_b = f32(dlse_b)});
  return {dout_a, dlse_a, dout_b, dlse_b};
}

}  // namespace
}  // namespace foldscan::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(foldscan, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? block_table, "
      "Tensor? sinks, float scale, float softcap, int window_left, int window_right) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks, float scale, float softcap, int window_left, "
      "int window_right) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kv_cache_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, "
      "Tensor cu_seqlens, Tensor positions) -> ()");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved) -> Tensor");
  m.def("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");
  m.def(
      "merge_attention_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(foldscan, CPU, m) {
  m.impl("attention", TORCH_BOX(&foldscan::bindings::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&foldscan::bindings::attention_backward));
  m.impl("kv_cache_append", TORCH_BOX(&foldscan::bindings::kv_cache_append));
  m.impl("rotary", TORCH_BOX(&foldscan::bindings::rotary));
  m.impl("merge_attention", TORCH_BOX(&foldscan::bindings::merge_forward));
  m.impl("merge_attention_backward", TORCH_BOX(&foldscan::bindings::merge_backward));
}
