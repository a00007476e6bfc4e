#pragma once
// Tensors as operands and results of gemm(). Checks name the argument.
#include <optional>
#include <vector>

#include "cpu/gemm.h"
#include "shapes.h"

namespace llmfast::cpu {

inline Dtype dtype_of(const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(type == ScalarType::Float, name, " must be float32 or bfloat16 on a CPU, got ",
                  torch::headeronly::toString(type));
  return Dtype::f32;
}

// A contiguous tensor as the matrix of its rows: (..., columns).
struct Matrix {
  Tensor tensor;
  int64_t rows = 1, columns = 0;
  Dtype dtype;

  Matrix(const char* name, const Tensor& t)
      : tensor(torch::stable::contiguous(t)), dtype(dtype_of(name, t.scalar_type())) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() >= 1, name, " must be a CPU tensor with at least one dimension");
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    columns = t.size(t.dim() - 1);
  }
  // Checked to be (rows, columns).
  Matrix(const char* name, const Tensor& t, int64_t want_rows, int64_t want_columns) : Matrix(name, t) {
    STD_TORCH_CHECK(rows == want_rows && columns == want_columns, name, " must have the shape (", want_rows, ", ",
                    want_columns, "), got (", rows, ", ", columns, ")");
  }

  void* data() { return tensor.mutable_data_ptr(); }
  const void* data() const { return tensor.const_data_ptr(); }
  Operand operand(bool transposed = false) const { return {data(), columns, dtype, transposed}; }
};

// A new one of the shape `sizes`; without elements where it is not wanted.
inline Matrix new_matrix(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type, bool wanted = true) {
  return {"result", torch::stable::new_empty(like, wanted ? sizes : std::vector<int64_t>{0}, type)};
}

// A weight (out, in) read as it lies, and its gradient laid out alike.
struct Weight {
  bool flipped;  // lies as (in, out)
  Matrix stored;
  int64_t rows, columns;  // out, in

  Weight(const char* name, const Tensor& w, int64_t want_rows, int64_t want_columns)
      : flipped(lies_transposed(w)), stored(name, flipped ? torch::stable::transpose(w, 0, 1) : w),
        rows(flipped ? stored.columns : stored.rows), columns(flipped ? stored.rows : stored.columns) {
    STD_TORCH_CHECK(w.dim() == 2 && rows == want_rows && columns == want_columns, name, " must have the shape (", want_rows,
                    ", ", want_columns, "), got (", rows, ", ", columns, ")");
  }
  Operand operand(bool transposed = false) const { return stored.operand(transposed != flipped); }

  // dy^T x for dy (N, out) and x (N, in), of this weight's shape, dtype and layout; without elements where not wanted.
  Tensor gradient(const Matrix& dy, const Matrix& x, Dtype compute, bool wanted) const;
};

// sums (n,) in float32, for column_sums() and the like, and then in the dtype of a parameter.
struct Sums {
  Tensor tensor;

  Sums(const Tensor& like, int64_t n, bool wanted)
      : tensor(torch::stable::new_empty(like, {wanted ? n : 0}, ScalarType::Float)) {}
  float* data() { return static_cast<float*>(tensor.mutable_data_ptr()); }
  Tensor as(ScalarType type) const { return type == ScalarType::Float ? tensor : torch::stable::to(tensor, type); }
};

// A bias (n,) in float32, as gemm() wants it.
struct Bias {
  std::optional<Tensor> tensor;

  Bias(const char* name, const std::optional<Tensor>& t, int64_t n) : tensor(t) {
    if (!t) return;
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == n, name, " must be a CPU tensor of shape (", n, ",)");
    if (t->scalar_type() != ScalarType::Float) tensor = torch::stable::to(*t, ScalarType::Float);
    tensor = torch::stable::contiguous(*tensor);
  }
  const float* data() const { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }
};

// c = a b, all of c, with K terms a sum and operands rounded to `compute`.
inline Product product(Matrix& c, Operand a, Operand b, int64_t K, Dtype compute) {
  return {c.rows, c.columns, K, a, b, c.data(), c.columns, c.dtype, compute};
}

inline Tensor Weight::gradient(const Matrix& dy, const Matrix& x, Dtype compute, bool wanted) const {
  Matrix dw = new_matrix(stored.tensor, {stored.rows, stored.columns}, stored.tensor.scalar_type(), wanted);
  if (!wanted) return dw.tensor;
  gemm(flipped ? product(dw, x.operand(true), dy.operand(), dy.rows, compute)
               : product(dw, dy.operand(true), x.operand(), dy.rows, compute));
  return flipped ? torch::stable::transpose(dw.tensor, 0, 1) : dw.tensor;
}

}  // namespace llmfast::cpu
