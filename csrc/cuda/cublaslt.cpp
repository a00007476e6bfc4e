// cuBLASLt by name: neither its headers nor the library are needed to build, and a machine without it loads us all the same.
// The few types and numbers below are those of cublasLt.h, the same in its versions 12 and 13.
#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <cstring>

namespace llmfast::cuda {
namespace {

struct Opaque;
using Handle = Opaque*;
enum Status : int { kSuccess = 0 };
enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };       // cudaDataType_t
enum : int { kCompute32F = 68 };                                          // cublasComputeType_t
enum : int { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxLd = 12 };  // of a product
enum : int { kGelu = 32, kBias = 4, kAux = 128, kDGelu = 64 | 128, kBiasGradient = 16 };  // cublasLtEpilogue_t
enum : int { kMaxWorkspace = 1 };                                         // of a preference
enum : int { kOpN = 0, kOpT = 1 };

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  LtState state{false, "no libcublasLt.so.13 or .12 found"};
  size_t (*version)() = nullptr;
  Status (*product_create)(Handle*, int compute, int scale) = nullptr;
  Status (*product_destroy)(Handle) = nullptr;
  Status (*product_set)(Handle, int, const void*, size_t) = nullptr;
  Status (*layout_create)(Handle*, int, uint64_t rows, uint64_t columns, int64_t ld) = nullptr;
  Status (*layout_destroy)(Handle) = nullptr;
  Status (*preference_create)(Handle*) = nullptr;
  Status (*preference_destroy)(Handle) = nullptr;
  Status (*preference_set)(Handle, int, const void*, size_t) = nullptr;
  Status (*heuristic)(void*, Handle, Handle, Handle, Handle, Handle, Handle, int, Heuristic*, int*) = nullptr;
  Status (*matmul)(void*, Handle, const void*, const void*, Handle, const void*, Handle, const void*, const void*, Handle,
                   void*, Handle, const Algorithm*, void*, size_t, cudaStream_t) = nullptr;

  Library() {
    void* library = nullptr;
    // The copy that torch has loaded first; RTLD_NOLOAD finds it wherever it lies.
    for (int mode : {RTLD_NOLOAD, 0})
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
        if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL | mode);
    if (!library) return;
    bool whole = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      whole = whole && function;
    };
    find(version, "cublasLtGetVersion");
    find(product_create, "cublasLtMatmulDescCreate");
    find(product_destroy, "cublasLtMatmulDescDestroy");
    find(product_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
    if (!whole) {
      state.text = "libcublasLt lacks a function";
      return;
    }
    const size_t v = version(), major = v / 10000;
    state.text = "cuBLASLt " + std::to_string(major) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
    state.found = major == 12 || major == 13;
    if (!state.found) state.text += " is neither 12 nor 13";
  }
};

const Library& library() {
  static const Library one;
  return one;
}

// Destroys what was created, in any case.
class Owned {
 public:
  explicit Owned(Status (*destroy)(Handle)) : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (handle) destroy_(handle);
  }
  Handle handle = nullptr;

 private:
  Status (*destroy_)(Handle);
};

}  // namespace

const LtState& cublaslt_state() { return library().state; }

bool cublaslt_product(const LtProduct& p, void* handle, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  const Library& lt = library();
  if (!lt.state.found || p.dtype == DType::f32 || p.M % 8) return false;
  const int type = p.dtype == DType::f16 ? kFloat16 : kBFloat16;
  // Row-major (N, M) is column-major M x N: out = op(w) x.
  Owned product(lt.product_destroy), a(lt.layout_destroy), b(lt.layout_destroy), d(lt.layout_destroy),
      preference(lt.preference_destroy);
  bool ok = lt.product_create(&product.handle, kCompute32F, kFloat32) == kSuccess;
  const auto set = [&](int attribute, const auto& value) {
    ok = ok && lt.product_set(product.handle, attribute, &value, sizeof value) == kSuccess;
  };
  const int trans_a = p.backward ? kOpN : kOpT, trans_b = kOpN;
  const int epilogue = p.backward ? kDGelu | (p.bias ? kBiasGradient : 0) : kGelu | (p.bias ? kBias : 0) | (p.h ? kAux : 0);
  set(kTransA, trans_a);
  set(kTransB, trans_b);
  set(kEpilogue, epilogue);
  if (p.bias) set(kBiasPointer, p.bias);
  if (p.h) {
    set(kAuxPointer, p.h);
    set(kAuxLd, p.M);
  }
  const uint64_t rows = p.M, columns = p.N, terms = p.K;
  ok = ok && (p.backward ? lt.layout_create(&a.handle, type, rows, terms, p.M)
                         : lt.layout_create(&a.handle, type, terms, rows, p.K)) == kSuccess;
  ok = ok && lt.layout_create(&b.handle, type, terms, columns, p.K) == kSuccess;
  ok = ok && lt.layout_create(&d.handle, type, rows, columns, p.M) == kSuccess;
  ok = ok && lt.preference_create(&preference.handle) == kSuccess;
  ok = ok && lt.preference_set(preference.handle, kMaxWorkspace, &workspace_bytes, sizeof workspace_bytes) == kSuccess;
  Heuristic best{};
  int found = 0;
  ok = ok && lt.heuristic(handle, product.handle, a.handle, b.handle, d.handle, d.handle, preference.handle, 1, &best, &found) == kSuccess;
  if (!ok || !found || best.state != kSuccess) return false;
  const float one = 1.f, zero = 0.f;
  return lt.matmul(handle, product.handle, &one, p.w, a.handle, p.x, b.handle, &zero, p.out, d.handle, p.out, d.handle,
                   &best.algorithm, workspace, workspace_bytes, stream) == kSuccess;
}

}  // namespace llmfast::cuda
