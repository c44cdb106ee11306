// torch.ops.xllm.segment_attention on CPU tensors; see xllm/ops/vision.py.
//
// Every segment is an ordinary attention without a mask, for which torch has a blocked kernel.
// Windows are small and mostly of one size: neighbours of equal length go in one call as a batch.
// (All of one length in one call, gathered, was slower: 33 against 19 ms for 48 windows.)
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

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
  for (int64_t b = 0, next; b < segments; b = next) {
    int64_t length = at[b + 1] - at[b];
    for (next = b + 1; next < segments && at[next + 1] - at[next] == length;) next++;
    if (length == 0) continue;
    auto batch = [&](const Tensor& t) {  // [segments, H, length, D]
      Tensor rows = t.narrow(0, at[b], (next - b) * length);
      return rows.unflatten(0, {next - b, length}).transpose(1, 2);
    };
    batch(out).copy_(at::scaled_dot_product_attention(batch(q), batch(k), batch(v), {}, 0.0,
                                                      false, scale));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(xllm, CPU, m) {
  m.impl("segment_attention", TORCH_FN(segment_attention));
}
