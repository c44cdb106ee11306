// torch.ops.xllm.segment_attention on CPU tensors; see xllm/ops/vision.py.
//
// Every segment is an ordinary attention without a mask, for which torch has a blocked kernel.
// Windows are small and of few sizes: all segments of one length go in one call as a batch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <map>
#include <numeric>
#include <vector>

namespace {

using at::Tensor;

#define REQUIRE(condition, ...) TORCH_CHECK(condition, "xllm::segment_attention: ", __VA_ARGS__)

// The op's Python reference: float64 occurs only where a graph is verified.
Tensor reference(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 double scale) {
  auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("xllm::segment_attention", "");
  torch::jit::Stack stack{q, k, v, cu_seqlens, scale};
  handle.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
  return stack[0].toTensor();
}

void check(const char* name, const Tensor& t, const Tensor& q) {
  REQUIRE(t.scalar_type() == q.scalar_type() && t.sizes() == q.sizes(), name, " is ",
          t.scalar_type(), t.sizes(), "; expected ", q.scalar_type(), q.sizes());
}

// Bounds ascend from 0 or more to N or less: a wrong one must not read foreign memory.
const int32_t* check_bounds(const Tensor& bounds, int64_t patches) {
  const int32_t* at = bounds.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < bounds.size(0); b++)
    REQUIRE(at[b] >= (b ? at[b - 1] : 0) && at[b] <= patches, "cu_seqlens contains ", at[b],
            " at ", b, "; expected ascending, 0 to ", patches);
  return at;
}

// The rows of all segments of a length, for each length.
std::map<int64_t, std::vector<int64_t>> rows_by_length(const int32_t* at, int64_t segments) {
  std::map<int64_t, std::vector<int64_t>> found;
  for (int64_t b = 0; b < segments; b++) {
    if (at[b + 1] == at[b]) continue;
    auto& rows = found[at[b + 1] - at[b]];
    rows.resize(rows.size() + at[b + 1] - at[b]);
    std::iota(rows.end() - (at[b + 1] - at[b]), rows.end(), at[b]);
  }
  return found;
}

Tensor segment_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& cu_seqlens, double scale) {
  if (q.scalar_type() == at::kDouble) return reference(q, k, v, cu_seqlens, scale);
  REQUIRE(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kFloat, "q is ",
          q.scalar_type(), "; expected bfloat16, float32 or float64");
  REQUIRE(q.dim() == 3, "q has sizes ", q.sizes(), "; expected [N, H, D]");
  check("k", k, q);
  check("v", v, q);
  REQUIRE(cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0,
          "cu_seqlens is ", cu_seqlens.scalar_type(), cu_seqlens.sizes(), "; expected Int[B + 1]");
  Tensor bounds = cu_seqlens.contiguous();
  const int32_t* at = check_bounds(bounds, q.size(0));
  int64_t segments = bounds.size(0) - 1;
  Tensor out = at::empty(q.sizes(), q.options());
  out.narrow(0, 0, at[0]).zero_();
  out.narrow(0, at[segments], q.size(0) - at[segments]).zero_();
  for (const auto& [length, rows] : rows_by_length(at, segments)) {
    Tensor index = at::empty({int64_t(rows.size())}, at::kLong);
    std::copy(rows.begin(), rows.end(), index.data_ptr<int64_t>());
    bool all = index.size(0) == q.size(0);
    auto batch = [&, length = length](const Tensor& t) {  // [segments, H, length, D]
      Tensor picked = all ? t : t.index_select(0, index);
      return picked.unflatten(0, {-1, length}).transpose(1, 2);
    };
    Tensor made = at::scaled_dot_product_attention(batch(q), batch(k), batch(v), {}, 0.0, false,
                                                   scale);
    made = made.transpose(1, 2).flatten(0, 1);
    if (all) return made.contiguous();
    out.index_copy_(0, index, made);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(xllm, CPU, m) {
  m.impl("segment_attention", TORCH_FN(segment_attention));
}
