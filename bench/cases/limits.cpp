// limits.cpp: what this machine can do at most, for bench/limits.py: `limits THREADS` prints one line of JSON.
// gflops: fused multiply-adds on registers, two operations each. cache_gbs, memory_gbs: reading 6 MiB again and again, which a
// last-level cache holds, and 512 MiB. Best of several tries, all threads together. Built with -O3 -march=native.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Vec __attribute__((vector_size(W * 4), aligned(4)));

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds that f(thread) takes on all threads at once, the least of `tries`.
template <class F>
static double least(int threads, int tries, const F& f) {
    double best = 1e30;
    for (int t = 0; t < tries; ++t) {
        std::atomic<int> ready{0};
        std::vector<std::thread> others;
        double begin = 0.0;
        const auto together = [&](int i) {
            ready.fetch_add(1);
            while (ready.load() < threads) {}
            if (i == 0) begin = now();
            f(i);
        };
        for (int i = 1; i < threads; ++i) others.emplace_back(together, i);
        together(0);
        for (auto& o : others) o.join();
        const double took = now() - begin;
        best = took < best ? took : best;
    }
    return best;
}

static volatile float sink;

static void multiply(int64_t rounds) {
    constexpr int CHAINS = 12;  // more than latency times throughput
    Vec acc[CHAINS];
    const Vec a = Vec{} + 0.9999f, b = Vec{} + 1e-4f;
    for (int c = 0; c < CHAINS; ++c) acc[c] = Vec{} + float(c);
    for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * a + b;
    float sum = 0.0f;
    for (int c = 0; c < CHAINS; ++c) sum += acc[c][0];
    sink = sum;
}

static void read(const float* p, int64_t n, int times) {
    Vec sum[8] = {};
    for (int t = 0; t < times; ++t)
        for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
#pragma GCC unroll 8
            for (int c = 0; c < 8; ++c) sum[c] += *reinterpret_cast<const Vec*>(p + i + c * W);
    float total = 0.0f;
    for (int c = 0; c < 8; ++c) total += sum[c][0];
    sink = total;
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    constexpr int64_t large = int64_t(128) << 20, small = int64_t(3) << 19;  // floats
    std::vector<float> memory(large, 1.0f);
    constexpr int64_t rounds = 4000000;
    const double flops = 2.0 * 12 * W * rounds * threads / least(threads, 7, [&](int) { multiply(rounds); });
    const auto rate = [&](int64_t n, int times) {
        const int64_t share = n / threads;
        return 4.0 * share * threads * times / least(threads, 7, [&](int i) { read(memory.data() + i * share, share, times); });
    };
    const double cache = rate(small, 40), bytes = rate(large, 1);
    std::printf("{\"gflops\": %.1f, \"cache_gbs\": %.1f, \"memory_gbs\": %.1f}\n", flops * 1e-9, cache * 1e-9, bytes * 1e-9);
}
