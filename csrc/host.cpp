// host.cpp: the torch-free side, for tests: the primitives of numerics.h on arrays, as every instruction set computes them, and
// CPU features. pybind11, no torch header.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#define RK_FILE "../host_kernels.h"
#include "cpu/each_isa.h"
#include "cpu/detect.h"
#include "weighing.h"

namespace py = pybind11;
using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

namespace {

bool has(const std::string& isa) {
    const rk::Isa best = rk::detect_isa();
    return isa == "scalar" || (isa == "avx2" && best >= rk::Isa::AVX2) || (isa == "avx512" && best >= rk::Isa::AVX512);
}

int code_of(const std::string& name) {
    const std::string names[] = {"exp",  "sigmoid", "tanh",       "normcdf", "gelu",       "gelu_tanh",
                                 "silu", "relu",    "quick_gelu", "relu2",   "leaky_relu", "mish"};
    std::string all;
    for (int i = 0; i < 12; ++i) {
        if (name == names[i]) return i;
        all += names[i] + (i < 10 ? ", " : i < 11 ? " or " : "");
    }
    throw std::invalid_argument("function must be " + all + ", got " + name);
}

void need(const std::string& isa) {
    if (!has(isa)) throw std::invalid_argument("this CPU has no instruction set named " + isa);
}

Array elementwise(const std::string& name, const Array& x, const std::string& isa) {
    need(isa);
    const int code = code_of(name);
    Array y(x.size());
#ifdef __x86_64__
    if (isa == "avx512") rk::avx512::elementwise(code, x.data(), y.mutable_data(), x.size());
    else if (isa == "avx2") rk::avx2::elementwise(code, x.data(), y.mutable_data(), x.size());
    else
#endif
        rk::scalar::elementwise(code, x.data(), y.mutable_data(), x.size());
    return y;
}

py::array_t<uint16_t> narrow(const Array& x, bool brain, const std::string& isa) {
    need(isa);
    py::array_t<uint16_t> y(x.size());
#ifdef __x86_64__
    if (isa == "avx512") rk::avx512::narrow(brain, x.data(), y.mutable_data(), x.size());
    else if (isa == "avx2") rk::avx2::narrow(brain, x.data(), y.mutable_data(), x.size());
    else
#endif
        rk::scalar::narrow(brain, x.data(), y.mutable_data(), x.size());
    return y;
}

Array widen(const py::array_t<uint16_t, py::array::c_style>& x, bool brain, const std::string& isa) {
    need(isa);
    Array y(x.size());
#ifdef __x86_64__
    if (isa == "avx512") rk::avx512::widen_all(brain, x.data(), y.mutable_data(), x.size());
    else if (isa == "avx2") rk::avx2::widen_all(brain, x.data(), y.mutable_data(), x.size());
    else
#endif
        rk::scalar::widen_all(brain, x.data(), y.mutable_data(), x.size());
    return y;
}

// numerics.h's short forms, of mode tensor: float alone, since no CPU kernel has them.
Array gelu_short(const Array& x) {
    Array y(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = rk::scalar::gelu_short(x.data()[i]);
    return y;
}

Array exp2_short(const Array& d, float c, float least) {
    Array y(d.size());
    for (py::ssize_t i = 0; i < d.size(); ++i) y.mutable_data()[i] = rk::scalar::exp2_short(d.data()[i], c, least);
    return y;
}

py::tuple weighing(float scale, float softcap) {
    const rk::Weighing w = rk::weighing(scale, softcap);
    return py::make_tuple(w.c, w.least, w.scaled);
}

py::dict cpu_features() {
    py::dict d;
    for (const char* isa : {"avx512", "avx2", "scalar"}) d[isa] = has(isa);
    return d;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "The numeric primitives on arrays, per instruction set; CPU features. For tests.";
    m.def("elementwise", &elementwise, py::arg("name"), py::arg("x"), py::arg("isa") = "scalar");
    m.def("narrow", &narrow, py::arg("x"), py::arg("brain"), py::arg("isa") = "scalar", "float32 -> bits of fp16 or bf16");
    m.def("widen", &widen, py::arg("x"), py::arg("brain"), py::arg("isa") = "scalar", "bits of fp16 or bf16 -> float32");
    m.def("gelu_short", &gelu_short, py::arg("x"));
    m.def("exp2_short", &exp2_short, py::arg("d"), py::arg("c"), py::arg("least"));
    m.def("weighing", &weighing, py::arg("scale"), py::arg("softcap"), "(c, least, scaled) of attention in mode tensor");
    m.def("cpu_features", &cpu_features);
}
