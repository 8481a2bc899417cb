// schema.cpp: every op's signature, one line each. Backends register themselves at the bottom of their own family files.
// Arguments are what rerank_kernels/ops/<family>.py has checked and laid out; weights are [N, K], contiguous, as
// nn.Linear holds them, but for sparse_ffn's (rerank_kernels/backend/weights.py).

#include <dlfcn.h>

#include <cstdio>

#include "library.h"

namespace rk {

const char* loaded_from() {
    Dl_info here{};
    return dladdr(reinterpret_cast<void*>(&loaded_from), &here) != 0 ? here.dli_fname : "a file that is not known";
}

bool first_copy() {
    static const bool first = [] {
        TorchLibraryHandle probe = nullptr;
        if (aoti_torch_library_init_def(RK_STRING(RK_LIBRARY), __FILE__, __LINE__, &probe) == AOTI_TORCH_SUCCESS) {
            aoti_torch_delete_library_object(probe);
            return true;
        }
        std::fprintf(stderr,
                     "rerank_kernels: %s is a second copy of the C++ library in this process; it stays idle, and the copy "
                     "that was loaded first goes on serving\n",
                     loaded_from());
        return false;
    }();
    return first;
}

}  // namespace rk

// clang-format off
RK_TORCH_LIBRARY(m) {
    // norm
    m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> Tensor");
    m.def("normalize(Tensor x, float eps) -> Tensor");
    // softmax
    m.def("softmax(Tensor x) -> Tensor");
    m.def("row_sum(Tensor x, bool mean) -> Tensor");
    // linear
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, ScalarType out_dtype) -> Tensor");
    m.def("linear_tensor(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, ScalarType out_dtype) -> Tensor");
    m.def("bmm(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor");
    m.def("bmm_tensor(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor");
    m.def("activation(Tensor x, int kind, ScalarType out_dtype) -> Tensor");
    // attention
    m.def("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, int left, int right, float scale) -> Tensor");
    m.def("attention_tensor(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, int left, int right, float scale) -> Tensor");
    // pooling
    m.def("pool(Tensor x, Tensor cu_seqlens, bool mean, ScalarType out_dtype) -> Tensor");
    m.def("score_head(Tensor pooled, Tensor? dense_weight, Tensor? dense_bias, int activation, Tensor out_weight, Tensor? out_bias) -> (Tensor, Tensor, Tensor)");
    // sparse_ffn
    m.def("transpose_weight(Tensor weight) -> Tensor");
    m.def("sparse_ffn(Tensor x, Tensor first_weight, Tensor? first_bias, Tensor? coarse, Tensor? rest, Tensor? bounds, Tensor? up_weight, Tensor? up_bias, Tensor down_rows, Tensor? down_bias) -> Tensor");
    m.def("sparse_ffn_tensor(Tensor x, Tensor first_weight, Tensor? first_bias, Tensor? up_weight, Tensor? up_bias, Tensor down_rows, Tensor? down_bias) -> Tensor");
    // which instruction set the cpu kernels use: "auto", "avx512", "avx2", "scalar"; "" only asks. For tests and info.
    m.def("force_isa(str name) -> str");
    // makes PyTorch's own operations on this thread run on it alone; csrc/cpu/threads.cpp
    m.def("hold_threads(int count) -> int");
    // NUMERICS_VERSION of numerics.h: the Python side asks whether it is its own.
    m.def("numerics_version() -> int");
    // compiler, torch and flags, for info; the library's file, for the message about a second copy.
    m.def("build_info() -> str");
    m.def("loaded_from() -> str");
    // the CUDA launchers that have several ways to serve a call, "linear 7, attention 2"; force_launch: which of them one takes,
    // -1 for its own choice. For tests.
    m.def("launchers() -> str");
    m.def("force_launch(str kernel, int way) -> str");
}
