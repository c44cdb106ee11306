// torch.ops.xllm on CPU tensors: checks of the arguments, then the kernels.
//
// Only bindings need torch's large headers: they cost more compile time than all kernels.
#include "bindings.h"

#include <limits>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace {

Tensor packed_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                     int64_t rows) {
  const char* op = "packed_linear";
  if (is_double(x)) return reference(op, x, weight, bias, rows)[0].toTensor();
  REQUIRE(x.dim() >= 1, op, "x has no dimension; expected [..., K]");
  int64_t k = x.size(-1);
  REQUIRE(k >= 2 && k % 2 == 0, op, "x has ", k, " columns; expected an even number");
  REQUIRE(rows >= 1, op, "rows is ", rows, "; expected 1 or more");
  expect(op, "weight", weight, x.scalar_type(), {xllm::divide_up(rows, 32), k / 2, 32, 2});
  if (bias) expect(op, "bias", *bias, x.scalar_type(), {rows});
  Tensor input = x.contiguous(), packed = weight.contiguous();
  MaybeTensor added = bias ? MaybeTensor(bias->contiguous()) : MaybeTensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  Tensor out = at::empty(sizes, x.options());
  return by_dtype(op, "x", x, [&](auto zero) {
    using T = decltype(zero);
    xllm::packed_linear({data<T>(input), data<T>(packed), data_or_null<T>(added), data<T>(out),
                         input.numel() / k, rows, k});
    return out;
  });
}

Tensor packed_embedding(const Tensor& weight, const Tensor& ids) {
  const char* op = "packed_embedding";
  if (is_double(weight)) return reference(op, weight, ids)[0].toTensor();
  expect(op, "weight", weight, weight.scalar_type(), {-1, -1, 32, 2});
  REQUIRE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op, "ids is ",
          ids.scalar_type(), "; expected int64 or int32");
  Tensor index = ids.to(at::kLong).contiguous(), packed = weight.contiguous();
  const int64_t* first = data<int64_t>(index);
  for (int64_t i = 0; i < index.numel(); i++)
    REQUIRE(first[i] >= 0 && first[i] < weight.size(0) * 32, op, "ids contains ", first[i],
            "; expected 0 to ", weight.size(0) * 32 - 1);
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(weight.size(1) * 2);
  Tensor out = at::empty(sizes, weight.options());
  return by_dtype(op, "weight", weight, [&](auto zero) {
    using T = decltype(zero);
    xllm::packed_embedding(data<T>(packed), first, data<T>(out), index.numel(), sizes.back());
    return out;
  });
}

// Checks that a page is contiguous, which keys of one head then are.
template <class T, class Element>
xllm::Cache<T> view_cache(const char* op, const Tensor& cache) {
  expect(op, "kv_cache", cache, cache.scalar_type(), {-1, 2, -1, -1, -1});
  bool contiguous = cache.size(0) < 1 || cache[0].is_contiguous();
  REQUIRE(contiguous, op, "kv_cache has strides ", cache.strides(), "; pages must be contiguous");
  return {data<Element>(cache), cache.size(0), cache.size(2), cache.size(3), cache.size(4),
          cache.stride(0)};
}

void kv_write(const Tensor& k, const Tensor& v, Tensor kv_cache, const Tensor& slot_mapping) {
  const char* op = "kv_write";
  if (is_double(k)) return void(reference(op, k, v, kv_cache, slot_mapping));
  by_dtype(op, "kv_cache", kv_cache, [&](auto zero) {
    using T = decltype(zero);
    auto cache = view_cache<T, T>(op, kv_cache);
    expect(op, "k", k, kv_cache.scalar_type(), {-1, cache.groups, cache.dim});
    expect(op, "v", v, kv_cache.scalar_type(), {k.size(0), cache.groups, cache.dim});
    auto dense = [](const Tensor& t) {
      return t.size(0) < 1 || t[0].is_contiguous() ? t : t.contiguous();
    };
    Tensor slots = check_slots(op, slot_mapping, cache.pages * cache.page_size, k.size(0));
    Tensor keys = dense(k), values = dense(v);
    xllm::kv_write<T>({data<T>(keys), data<T>(values), keys.stride(0), values.stride(0), cache,
                       data<int64_t>(slots), k.size(0)});
  });
}

Tensor qk_norm_rope_kv_write(const Tensor& qkv, const MaybeTensor& q_norm,
                             const MaybeTensor& k_norm, double eps, const Tensor& cos,
                             const Tensor& sin, Tensor kv_cache, const Tensor& slot_mapping) {
  const char* op = "qk_norm_rope_kv_write";
  if (is_double(qkv))
    return reference(op, qkv, q_norm, k_norm, eps, cos, sin, kv_cache, slot_mapping)[0].toTensor();
  return by_dtype(op, "qkv", qkv, [&](auto zero) {
    using T = decltype(zero);
    auto dtype = qkv.scalar_type();
    auto cache = view_cache<T, T>(op, kv_cache);
    int64_t groups = cache.groups, dim = cache.dim;
    expect(op, "kv_cache", kv_cache, dtype, {-1, 2, -1, -1, -1});
    expect(op, "qkv", qkv, dtype, {-1, -1});
    int64_t tokens = qkv.size(0), heads = qkv.size(1) / dim - 2 * groups;
    REQUIRE(heads > 0 && qkv.size(1) % dim == 0 && dim % 2 == 0, op, "qkv has ", qkv.size(1),
            " columns; expected (H + 2 * ", groups, ") * ", dim);
    expect(op, "cos", cos, dtype, {tokens, dim});
    expect(op, "sin", sin, dtype, {tokens, dim});
    REQUIRE(q_norm.has_value() == k_norm.has_value(), op, "q_norm and k_norm: both or neither");
    if (q_norm) expect(op, "q_norm", *q_norm, dtype, {dim});
    if (k_norm) expect(op, "k_norm", *k_norm, dtype, {dim});
    Tensor rows = qkv.stride(1) == 1 ? qkv : qkv.contiguous();
    Tensor slots = check_slots(op, slot_mapping, cache.pages * cache.page_size, tokens);
    Tensor cosines = cos.contiguous(), sines = sin.contiguous();
    Tensor out = at::empty({tokens, heads, dim}, qkv.options());
    xllm::qk_norm_rope_kv_write<T>(
        {data<T>(rows), rows.stride(0), heads, data_or_null<T>(q_norm), data_or_null<T>(k_norm),
         float(eps), data<T>(cosines), data<T>(sines), data<T>(out), cache,
         data<int64_t>(slots), tokens});
    return out;
  });
}

Tensor paged_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                       const Tensor& query_start_loc, const Tensor& seq_lens, double scale,
                       std::optional<int64_t> window, std::optional<double> softcap,
                       const MaybeTensor& sinks) {
  const char* op = "paged_attention";
  bool fits = kv_cache.dim() == 5 && kv_cache.size(4) % 8 == 0 && kv_cache.size(4) <= xllm::MAX_DIM;
  if (is_double(q) || !fits)
    return reference(op, q, kv_cache, block_table, query_start_loc, seq_lens, scale, window,
                     softcap, sinks)[0].toTensor();
  return by_dtype(op, "q", q, [&](auto zero) {
    using T = decltype(zero);
    auto cache = view_cache<const T, T>(op, kv_cache);
    expect(op, "kv_cache", kv_cache, q.scalar_type(), {-1, 2, -1, -1, -1});
    expect(op, "q", q, q.scalar_type(), {-1, -1, cache.dim});
    expect(op, "seq_lens", seq_lens, at::kInt, {-1});
    int64_t sequences = seq_lens.size(0), heads = q.size(1);
    expect(op, "query_start_loc", query_start_loc, at::kInt, {sequences + 1});
    expect(op, "block_table", block_table, at::kInt, {sequences, -1});
    REQUIRE(cache.groups > 0 && heads % cache.groups == 0, op, "q has ", heads,
            " heads; expected a multiple of ", cache.groups);
    REQUIRE(!window || *window > 0, op, "window is ", window.value_or(0), "; expected 1 or more");
    REQUIRE(!softcap || *softcap > 0, op, "softcap is ", softcap.value_or(0), "; expected > 0");
    MaybeTensor logits;
    if (sinks) logits = sinks->to(at::kFloat).contiguous();
    if (logits) expect(op, "sinks", *logits, at::kFloat, {heads});
    Tensor queries = q.contiguous(), table = block_table.contiguous();
    Tensor starts = query_start_loc.contiguous(), lengths = seq_lens.contiguous();
    Tensor out = at::empty(q.sizes(), q.options());
    xllm::Attention<T> problem{
        data<T>(queries), data<T>(out), cache, data<int32_t>(table), data<int32_t>(starts),
        data<int32_t>(lengths), data_or_null<float>(logits), sequences, q.size(0), heads,
        table.size(1), window.value_or(std::numeric_limits<int64_t>::max()), float(scale),
        float(softcap.value_or(0))};
    check_batch(op, problem);
    xllm::paged_attention(problem);
    return out;
  });
}

// rms_norm of x, or of x + residual, which then comes back too.
std::pair<Tensor, Tensor> norm(const char* op, const Tensor& x, const MaybeTensor& residual,
                               const Tensor& weight, double eps) {
  REQUIRE(x.dim() >= 1 && x.size(-1) > 0, op, "x has sizes ", x.sizes(), "; expected [..., N]");
  int64_t columns = x.size(-1);
  expect(op, "weight", weight, x.scalar_type(), {columns});
  if (residual) expect(op, "residual", *residual, x.scalar_type(), x.sizes());
  Tensor rows = x.contiguous(), scale = weight.contiguous();
  MaybeTensor added = residual ? MaybeTensor(residual->contiguous()) : MaybeTensor();
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor total = residual ? at::empty(x.sizes(), x.options()) : out;
  by_dtype(op, "x", x, [&](auto zero) {
    using T = decltype(zero);
    xllm::rms_norm<T>({data<T>(rows), data_or_null<T>(added), data<T>(scale), data<T>(total),
                       data<T>(out), float(eps), rows.numel() / columns, columns});
  });
  return {out, total};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (is_double(x) || weight.scalar_type() != x.scalar_type())
    return reference("rms_norm", x, weight, eps)[0].toTensor();
  return norm("rms_norm", x, {}, weight, eps).first;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  const char* op = "add_rms_norm";
  if (is_double(x) || weight.scalar_type() != x.scalar_type()) {
    auto results = reference(op, x, residual, weight, eps);
    return {results[0].toTensor(), results[1].toTensor()};
  }
  return norm(op, x, residual, weight, eps);
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  const char* op = "silu_mul";
  if (is_double(gate)) return reference(op, gate, up)[0].toTensor();
  expect(op, "up", up, gate.scalar_type(), gate.sizes());
  Tensor left = gate.contiguous(), right = up.contiguous();
  Tensor out = at::empty(gate.sizes(), gate.options());
  by_dtype(op, "gate", gate, [&](auto zero) {
    using T = decltype(zero);
    xllm::silu_mul(data<T>(left), data<T>(right), data<T>(out), out.numel());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(xllm, CPU, m) {
  m.impl("add_rms_norm", TORCH_FN(add_rms_norm));
  m.impl("rms_norm", TORCH_FN(rms_norm));
  m.impl("silu_mul", TORCH_FN(silu_mul));
  m.impl("packed_linear", TORCH_FN(packed_linear));
  m.impl("packed_embedding", TORCH_FN(packed_embedding));
  m.impl("kv_write", TORCH_FN(kv_write));
  m.impl("qk_norm_rope_kv_write", TORCH_FN(qk_norm_rope_kv_write));
  m.impl("paged_attention", TORCH_FN(paged_attention));
}
