// pool.cpp: one list of open jobs, one crowd of threads that look for one with a free place. Who helps whom, and when a thread
// sleeps, depends on timing; which bits come out does not, for tasks do not see each other.

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "openmp.h"

namespace rk {
namespace {

// How long a thread looks for more before it sleeps: within a forward the next op comes about as soon, and to wake a thread
// takes tens of microseconds. Longer takes cores from other processes; to yield meanwhile gives them to those of the lowest
// priority for milliseconds (bench/serving.py).
constexpr std::chrono::microseconds PATIENCE{100};

void relax() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// Spins until ready() or until patience ends; true if ready.
template <class F>
bool spin(const F& ready) {
    const auto end = std::chrono::steady_clock::now() + PATIENCE;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

// Where OpenMP binds threads to cores (OMP_PROC_BIND, KMP_AFFINITY), the caller is bound to one of them, and a new thread would
// inherit that core. All that OpenMP may use is open to ours; nothing where it binds none.
std::optional<cpu_set_t> usable_cores() {
    static const auto places = openmp<int (*)()>("omp_get_num_places");
    static const auto size = openmp<int (*)(int)>("omp_get_place_num_procs");
    static const auto list = openmp<void (*)(int, int*)>("omp_get_place_proc_ids");
    if (places == nullptr || size == nullptr || list == nullptr || places() < 1) return std::nullopt;
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int place = 0; place < places(); ++place) {
        std::vector<int> cores(size_t(size(place)));
        list(place, cores.data());
        for (const int core : cores)
            if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &all);
    }
    return all;
}

struct Job {
    const Work& work;
    int64_t places;              // for threads that may still come; guarded by Pool::open
    std::atomic<int> inside{0};  // how many came and are not done
    Job* next = nullptr;
};

class Pool {
   public:
    void run(const Work& work, int64_t helpers) {
        Job job{work, helpers};
        {
            const std::lock_guard lock(open_);
            while (threads_ < helpers && start()) ++threads_;
            job.next = first_;
            first_ = &job;
        }
        jobs_.fetch_add(1);
        for (int64_t asleep = sleeping_.load(), i = 0; i < helpers && i < asleep; ++i) jobs_.notify_one();
        work.run(work.state);
        {
            const std::lock_guard lock(open_);
            Job** at = &first_;
            while (*at != &job) at = &(*at)->next;
            *at = job.next;
        }
        // Nobody can come any more. The last one to leave touches the pool, not the job, which is gone by then.
        const auto alone = [&] { return job.inside.load(std::memory_order_acquire) == 0; };
        if (alone() || spin(alone)) return;
        for (;;) {
            const uint32_t seen = left_.load();
            if (alone()) return;
            left_.wait(seen);
        }
    }

   private:
    bool start() {
        // Signals are for the threads that the program knows of.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this, where = usable_cores()] {
                if (where) sched_setaffinity(0, sizeof *where, &*where);
                look_for_work();
            }).detach();
        } catch (const std::system_error&) {  // the machine allows no more: those that there are do all of it
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    [[noreturn]] void look_for_work() {
        for (;;) {
            const uint32_t seen = jobs_.load();
            if (Job* job = enter()) {
                job->work.run(job->work.state);
                if (job->inside.fetch_sub(1, std::memory_order_release) == 1) {
                    left_.fetch_add(1);
                    left_.notify_all();
                }
            } else if (!spin([&] { return jobs_.load(std::memory_order_relaxed) != seen; })) {
                sleeping_.fetch_add(1);
                jobs_.wait(seen);
                sleeping_.fetch_sub(1);
            }
        }
    }

    Job* enter() {
        const std::lock_guard lock(open_);
        for (Job* job = first_; job != nullptr; job = job->next)
            if (job->places > 0) {
                --job->places;
                job->inside.fetch_add(1, std::memory_order_relaxed);
                return job;
            }
        return nullptr;
    }

    std::mutex open_;
    Job* first_ = nullptr;
    int64_t threads_ = 0;
    std::atomic<uint32_t> jobs_{0};  // how many there were
    std::atomic<uint32_t> left_{0};  // how often a job was left by the last one inside
    std::atomic<int64_t> sleeping_{0};
};

// Never destroyed: its threads run until the process ends. A forked child has a copy without the threads, and perhaps with a
// lock that one of them held; it takes a new one.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static const int once = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    (void)once;
    Pool* found = the_pool.load();
    if (found != nullptr) return *found;
    Pool* made = new Pool;
    if (the_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

void run_shared(const Work& work, int64_t helpers) { pool().run(work, helpers); }

}  // namespace rk
