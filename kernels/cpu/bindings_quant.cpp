// Quantised linear layers on CPU tensors: checks of the arguments, then the kernels.
#include "bindings.h"
#include "quant_linear.h"

namespace {

// Call run(null) with a null pointer to what the codes are stored in.
template <class Run>
void by_code(const char* op, const Tensor& codes, const Run& run) {
  switch (codes.scalar_type()) {
    case at::kChar: return run(static_cast<const int8_t*>(nullptr));
    case at::kFloat8_e4m3fn: return run(static_cast<const xllm::Float8*>(nullptr));
    case at::kInt: return run(static_cast<const xllm::Nibbles*>(nullptr));
    default: REQUIRE(false, op, "codes is ", codes.scalar_type(),
                     "; expected int8, float8_e4m3fn or int32");
  }
}

Tensor quant_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                    const MaybeTensor& zeros, const MaybeTensor& bias, int64_t rows,
                    int64_t group_size) {
  const char* op = "quant_linear";
  if (is_double(x))
    return reference(op, x, codes, scales, zeros, bias, rows, group_size)[0].toTensor();
  REQUIRE(x.dim() >= 1, op, "x has no dimension; expected [..., K]");
  int64_t k = x.size(-1), blocks = xllm::divide_up(rows, 32);
  REQUIRE(k >= 8 && k % 8 == 0, op, "x has ", k, " columns; expected a multiple of 8");
  REQUIRE(rows >= 1, op, "rows is ", rows, "; expected 1 or more");
  REQUIRE(group_size >= 8 && group_size % 8 == 0, op, "group_size is ", group_size,
          "; expected a multiple of 8");
  int64_t groups = xllm::divide_up(k, group_size);
  int64_t inputs = codes.scalar_type() == at::kInt ? 8 : 1;
  expect(op, "codes", codes, codes.scalar_type(), {blocks, k / inputs, 32});
  expect(op, "scales", scales, at::kFloat, {blocks, groups, 32});
  if (zeros) expect(op, "zeros", *zeros, at::kChar, {blocks, groups, 32});
  if (bias) expect(op, "bias", *bias, x.scalar_type(), {rows});
  Tensor input = x.contiguous(), stored = codes.contiguous(), scale = scales.contiguous();
  MaybeTensor zero = zeros ? MaybeTensor(zeros->contiguous()) : MaybeTensor();
  MaybeTensor added = bias ? MaybeTensor(bias->contiguous()) : MaybeTensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  Tensor out = at::empty(sizes, x.options());
  by_dtype(op, "x", x, [&](auto kind) {
    using T = decltype(kind);
    by_code(op, codes, [&]<class Code>(const Code*) {
      xllm::quant_linear<T, Code>({data<T>(input), data<Code>(stored), data<float>(scale),
                                   data_or_null<int8_t>(zero), data_or_null<T>(added),
                                   data<T>(out), input.numel() / k, rows, k, group_size});
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(xllm, CPU, m) { m.impl("quant_linear", TORCH_FN(quant_linear)); }
