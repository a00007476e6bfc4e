#include <optional>

#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/operand.h"
#include "stable.h"

namespace llmfast::cpu {
namespace {

// A matrix whose rows or columns are contiguous; `keep` holds the copy that another layout needs.
Operand operand(const Tensor& t, const char* name, Tensor& keep) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have two dimensions, got ", t.dim());
  const Dtype dtype = dtype_of(name, t.scalar_type());
  const int64_t rows = t.size(0), columns = t.size(1);
  keep = t;
  // The stride along a dimension of size 1 says nothing.
  if ((columns == 1 || t.stride(1) == 1) && (rows <= 1 || t.stride(0) >= columns))
    return {t.const_data_ptr(), rows <= 1 ? columns : t.stride(0), dtype, false};
  if ((rows == 1 || t.stride(0) == 1) && (columns <= 1 || t.stride(1) >= rows))
    return {t.const_data_ptr(), columns <= 1 ? rows : t.stride(1), dtype, true};
  keep = torch::stable::contiguous(t);
  return {keep.const_data_ptr(), columns, dtype, false};
}

void check(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "a (M, K) and b (K, N) do not fit");
}

Tensor mm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool bf16, bool bf16_out) {
  check(a, b);
  const int64_t M = a.size(0), N = b.size(1);
  Tensor keep_a = a, keep_b = b;
  const Bias added("bias", bias, N);
  Product p = {};
  p.M = M, p.N = N, p.K = a.size(1);
  p.a = operand(a, "a", keep_a);
  p.b = operand(b, "b", keep_b);
  p.compute = bf16 ? Dtype::bf16 : Dtype::f32;
  p.bias = added.data();
  Tensor c = torch::stable::new_empty(a, {M, N}, bf16_out ? ScalarType::BFloat16 : ScalarType::Float);
  p.c = c.mutable_data_ptr();
  p.c_stride = N;
  p.c_dtype = bf16_out ? Dtype::bf16 : Dtype::f32;
  gemm(p);
  return c;
}

Tensor mm_int8(const Tensor& a, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Matrix x("a", a), rows("scales", scales);
  STD_TORCH_CHECK(a.dim() == 2 && weight.is_cpu() && weight.dim() == 2 && weight.scalar_type() == ScalarType::Char &&
                      weight.size(1) == x.columns && x.dtype == Dtype::f32,
                  "a (M, K) must be float32 and weight (N, K) int8");
  STD_TORCH_CHECK(scales.dim() == 1 && scales.size(0) == weight.size(0) && rows.dtype == Dtype::f32,
                  "scales must be float32 of shape (N,)");
  const Tensor kept = torch::stable::contiguous(weight);
  const Bias added("bias", bias, weight.size(0));
  Matrix c = new_matrix(a, {x.rows, weight.size(0)}, ScalarType::Float);
  Product p = product(c, x.operand(), {kept.const_data_ptr(), x.columns, Dtype::i8, true,
                                       static_cast<const float*>(rows.data())}, x.columns, Dtype::f32);
  p.bias = added.data();
  gemm(p);
  return c.tensor;
}

void add_mm(Tensor& c, const Tensor& a, const Tensor& b, bool bf16) {
  check(a, b);
  STD_TORCH_CHECK(c.dim() == 2 && c.size(0) == a.size(0) && c.size(1) == b.size(1) && c.is_contiguous() &&
                      c.scalar_type() == ScalarType::Float,
                  "c must be (M, N) float32 and contiguous");
  Tensor keep_a = a, keep_b = b;
  Product p = {};
  p.M = a.size(0), p.N = b.size(1), p.K = a.size(1);
  p.a = operand(a, "a", keep_a);
  p.b = operand(b, "b", keep_b);
  p.compute = bf16 ? Dtype::bf16 : Dtype::f32;
  p.c = c.mutable_data_ptr();
  p.c_stride = p.N;
  p.c_dtype = Dtype::f32;
  p.accumulate = true;
  gemm(p);
}

Tensor sums_of_columns(const Tensor& x_in) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x must have two dimensions, got ", x_in.dim());
  const Dtype dtype = dtype_of("x", x_in.scalar_type());
  const Tensor x = x_in.stride(1) == 1 || x_in.size(1) <= 1 ? x_in : torch::stable::contiguous(x_in);
  Tensor sums = torch::stable::new_empty(x, {x.size(1)}, ScalarType::Float);
  column_sums(dtype, x.const_data_ptr(), x.stride(0), static_cast<float*>(sums.mutable_data_ptr()), x.size(0),
              x.size(1));
  return sums;
}

}  // namespace
}  // namespace llmfast::cpu

STABLE_TORCH_LIBRARY_IMPL(llmfast, CPU, m) {
  m.impl("mm", TORCH_BOX(&llmfast::cpu::mm));
  m.impl("column_sums", TORCH_BOX(&llmfast::cpu::sums_of_columns));
  m.impl("mm_int8", TORCH_BOX(&llmfast::cpu::mm_int8));
  m.impl("add_mm_", TORCH_BOX(&llmfast::cpu::add_mm));
}
