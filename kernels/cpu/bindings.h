// Argument checks that all bindings share. It pulls in torch's large headers: kernels must not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "parallel.h"
#include "vec.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define REQUIRE(condition, op, ...) TORCH_CHECK(condition, "xllm::", op, ": ", __VA_ARGS__)

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* data_or_null(const MaybeTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// The op's Python reference: for float64, which occurs only where a graph is verified, and for the
// few shapes that no kernel takes.
template <class... Arguments>
torch::jit::Stack reference(const char* op, const Arguments&... arguments) {
  auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(
      (std::string("xllm::") + op).c_str(), "");
  torch::jit::Stack stack;
  (stack.emplace_back(arguments), ...);
  handle.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
  return stack;
}

inline bool is_double(const Tensor& t) { return t.scalar_type() == at::kDouble; }

// Call run(zero) with a zero of the tensor's element type.
template <class Run>
auto by_dtype(const char* op, const char* name, const Tensor& t, const Run& run) {
  REQUIRE(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, op, name, " is ",
          t.scalar_type(), "; expected bfloat16, float32 or float64");
  return t.scalar_type() == at::kBFloat16 ? run(xllm::bf16{}) : run(0.f);
}

// `name` has x's dtype and the sizes given; -1 takes any.
inline void expect(const char* op, const char* name, const Tensor& t, at::ScalarType dtype,
            at::IntArrayRef sizes) {
  bool fits = t.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); i++) fits = sizes[i] < 0 || t.size(i) == sizes[i];
  REQUIRE(t.scalar_type() == dtype && fits, op, name, " is ", t.scalar_type(), t.sizes(),
          "; expected ", dtype, sizes, " (-1: any)");
}

// Slots of a paged cache that has `limit` of them.
inline Tensor check_slots(const char* op, const Tensor& slots, int64_t limit, int64_t tokens) {
  expect(op, "slot_mapping", slots, at::kLong, {tokens});
  Tensor result = slots.contiguous();
  for (int64_t i = 0; i < tokens; i++)
    REQUIRE(data<int64_t>(result)[i] >= 0 && data<int64_t>(result)[i] < limit, op,
            "slot_mapping contains ", data<int64_t>(result)[i], "; expected 0 to ", limit - 1);
  return result;
}

// Every index that the kernel follows is in range: a wrong one must not read foreign memory.
template <class Problem>
void check_batch(const char* op, const Problem& p) {
  int32_t before = p.starts[0];
  REQUIRE(before >= 0, op, "query_start_loc starts at ", before, "; expected 0 or more");
  for (int64_t s = 0; s < p.sequences; s++) {
    int64_t count = p.new_tokens(s), length = p.lengths[s];
    REQUIRE(count >= 0 && p.starts[s + 1] <= p.tokens, op, "query_start_loc goes from ",
            p.starts[s], " to ", p.starts[s + 1], "; expected ascending, at most ", p.tokens);
    if (count == 0) continue;
    int64_t pages = xllm::divide_up(length, p.cache.page_size);
    REQUIRE(length >= count && pages <= p.table_width, op, "seq_lens contains ", length,
            "; expected ", count, " to ", p.table_width * p.cache.page_size);
    for (int64_t i = 0; i < pages; i++) {
      int64_t page = p.table[s * p.table_width + i];
      REQUIRE(page >= 0 && page < p.cache.pages, op, "block_table contains page ", page,
              "; expected 0 to ", p.cache.pages - 1);
    }
  }
}

}  // namespace
