// The threads that work on a step together: how they share the parts of a loop and wait for each other.

#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "simd.h"

// Lighter than OpenMP's loops and barriers, of which a step has hundreds.
class Team {
  public:
    explicit Team(int64_t threads) : threads((int32_t)threads) {}

    // OpenMP may give fewer threads than were asked for. Called by all of them, before anything else.
    void begin() {
#pragma omp single
        threads = omp_get_num_threads();
    }

    int64_t size() const { return threads; }
    int64_t mine() const { return omp_get_thread_num(); }

    // Calls `work(i)` once for each i below `count`, on whichever thread is free. Loops must be separated by
    // `wait`.
    template <class Work> void share(int64_t count, Work work) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    }

    // Which part of a loop is likely to come to a thread after `part`, when all take one in turn.
    int64_t after(int64_t part) const { return part + threads; }

    // Returns when all threads have come here.
    void wait() {
        const int32_t before = generation.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            generation.store(before + 1, std::memory_order_seq_cst);
            if (sleepers.load(std::memory_order_seq_cst)) wake();
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (generation.load(std::memory_order_acquire) != before) return;
            relax();
        }
        // Whoever is missing may be waiting for this core.
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (generation.load(std::memory_order_seq_cst) == before) sleep(before);
        sleepers.fetch_sub(1, std::memory_order_relaxed);
    }

  private:
    static constexpr int SPINS = 2000;

    int32_t threads;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<int32_t> generation{0};
    std::atomic<int32_t> sleepers{0};

#if defined(__linux__)
    void sleep(int32_t before) { syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
    void sleep(int32_t) { sched_yield(); }
    void wake() {}
#endif
};
