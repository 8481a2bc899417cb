// pool.cpp: csrc/cpu/pool.cpp by itself, under ThreadSanitizer where test_threads.py asks for it: sums of many callers at once,
// callers inside of callers, forked children. Prints nothing if all is well.
#include "../csrc/cpu/pool.cpp"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Sum {
    int64_t count;
    int64_t depth;
    std::atomic<int64_t> next{0};
    std::vector<int64_t> seen;  // a plain array: TSan sees a caller that reads before the last thread has left
    Sum(int64_t n, int64_t deep) : count(n), depth(deep), seen(size_t(n), 0) {}
};

static int64_t sum(int64_t count, int64_t helpers, int64_t depth);

static void claim(void* state) {
    auto& of = *static_cast<Sum*>(state);
    for (int64_t i = of.next.fetch_add(1); i < of.count; i = of.next.fetch_add(1)) {
        if (i % 4 == 1) sched_yield();  // others come in the middle, on a machine of one core too
        of.seen[size_t(i)] += of.depth > 0 ? sum(3, 2, of.depth - 1) : i + 1;
    }
}

static int64_t sum(int64_t count, int64_t helpers, int64_t depth) {
    Sum all(count, depth);
    rk::run_shared({claim, &all}, helpers);
    int64_t total = 0;
    for (const int64_t x : all.seen) total += x;
    return total;
}

// Whether somebody comes to help.
static bool helped() {
    std::atomic<int> here{0};
    const auto meet = [](void* state) {
        auto& count = *static_cast<std::atomic<int>*>(state);
        ++count;
        for (int wait = 0; wait < 10'000 && count < 2; ++wait) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    rk::run_shared({meet, &here}, 1);
    return here == 2;
}

static bool right(int rounds) {
    for (int round = 0; round < rounds; ++round) {
        if (sum(17, 3, 0) != 17 * 18 / 2 || sum(1, 5, 0) != 1) return false;
        if (sum(5, 2, 1) != 5 * 6) return false;                                // nested: 5 times 1 + 2 + 3
        if (round % 50 == 0) std::this_thread::sleep_for(rk::PATIENCE * 3);     // all have gone to sleep
    }
    return true;
}

int main(int, char** arguments) {
    std::vector<std::thread> callers;
    std::atomic<int> wrong{0};
    for (int caller = 0; caller < 4; ++caller) callers.emplace_back([&] { wrong += !right(400); });
    for (auto& caller : callers) caller.join();
    if (wrong) return std::puts("wrong sums"), 1;
    if (!helped()) return std::puts("nobody helps"), 1;
    if (std::strcmp(arguments[1], "fork") != 0) return 0;
    // while other threads are inside of jobs, so that the child's copy of the pool is at any point
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) right(1);
    });
    for (int child = 0; child < 20; ++child) {
        const pid_t id = fork();
        if (id == 0) {
            alarm(20);
            _exit(helped() && right(3) ? 0 : 1);
        }
        int status = 0;
        waitpid(id, &status, 0);
        if (status != 0) return std::printf("child %d ended with %d\n", child, status), 1;
    }
    stop = true;
    busy.join();
    return 0;
}
