// host_kernels.h: the loops behind host.cpp, once per instruction set (cpu/each_isa.h); no guard.

namespace rk {
namespace RK_ISA {

static void elementwise(int code, const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const int some = int(n - i < W ? n - i : W);
        const Vec v = load_some(x + i, some);
        Vec r;
        switch (code) {
            case 0: r = exp_of(v); break;
            case 1: r = sigmoid_of(v); break;
            case 2: r = tanh_of(v); break;
            case 3: r = normcdf_of(v); break;
            case 4: r = gelu_of(v); break;
            case 5: r = gelu_tanh_of(v); break;
            case 6: r = silu_of(v); break;
            case 7: r = relu_of(v); break;
            case 8: r = quick_gelu_of(v); break;
            case 9: r = relu2_of(v); break;
            case 10: r = leaky_relu_of(v); break;
            default: r = mish_of(v); break;
        }
        store_some(y + i, r, some);
    }
}

static void narrow(bool brain, const float* x, uint16_t* y, int64_t n) {
    const Dtype t = brain ? Dtype::BF16 : Dtype::F16;
    for (int64_t i = 0; i < n; i += W) {
        const int some = int(n - i < W ? n - i : W);
        store_some_as(t, y, i, load_some(x + i, some), some);
    }
}

static void widen_all(bool brain, const uint16_t* x, float* y, int64_t n) {
    widen(brain ? Dtype::BF16 : Dtype::F16, x, 0, n, y);
}

}  // namespace RK_ISA
}  // namespace rk
