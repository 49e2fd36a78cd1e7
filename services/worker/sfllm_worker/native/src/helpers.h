// Threads that help the one that leads a step, and for which it never waits.
//
// Each thread begins with a range of a loop's tasks, because memory is read half as fast again in one run as in
// turns, and goes on with what others have left of theirs. What a task gives is written to memory of whoever
// computes it; only the leader puts it where it belongs. So it can compute again what a helper took and did not
// finish, because its core was needed elsewhere, and nothing is spoiled when the helper goes on later. Helpers run
// only where a core has nothing else to do. Lock-free but for falling asleep.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "simd.h"

// Memory that grows and is never cleared.
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer &&other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
    ~Buffer() { free(data); }

    // At least `floats` floats, aligned to a cache line. Throws std::bad_alloc.
    void reserve(size_t floats) {
        if (floats <= size) return;
        free(data);
        size = 0;
        data = (float *)aligned_alloc(64, (floats + 15) / 16 * 64);
        if (!data) throw std::bad_alloc();
        size = floats;
    }
    float *get() const { return data; }

  private:
    float *data = nullptr;
    size_t size = 0;
};

// All memory that the helpers of a step touch, and that is used again when none of them is left in it.
struct Workspace {
    static constexpr int64_t MOST_TASKS = 4096;

    std::shared_ptr<void> read;            // what tasks read
    std::vector<Buffer> results, scratch;  // of the leader, then of each helper
    std::atomic<uint64_t> done[MOST_TASKS] = {};  // the loop for which a task was computed, and by whom
};

// A loop's tasks in as many ranges as there are threads.
struct Ranges {
    int64_t count, threads;

    int64_t begin(int64_t range) const { return count * range / threads; }
    int64_t end(int64_t range) const { return begin(range + 1); }

    static constexpr int64_t NONE = int64_t(1) << 40;

    // The task that is likely to follow on the same thread.
    int64_t after(int64_t task) const {
        const int64_t range = ((task + 1) * threads + count - 1) / count;
        return begin(range) == task + 1 ? NONE : task + 1;
    }
};

class Helpers {
  public:
    // The process's helpers.
    static Helpers &all() {
        static Helpers &helpers = *new Helpers;  // threads outlive static objects
        return helpers;
    }

    // Returns when no helper touches anything that it was given before.
    void wait() {
        std::lock_guard<std::mutex> lock(leading);
        for (auto &helper : helpers)
            while (helper->inside.load()) std::this_thread::yield();
    }

  private:
    friend class Lead;
    typedef void (*Run)(const uint64_t *closure, int64_t task, float *out, float *scratch);
    static constexpr int WORDS = 16, TASK_BITS = 24, MOST_THREADS = 256;
    static constexpr uint64_t TASKS = (1 << TASK_BITS) - 1;
    static constexpr auto AWAKE_FOR = std::chrono::milliseconds(3);

    // A loop. Two of them, so that what the next one is can be written while helpers look at the last one.
    struct Loop {
        std::atomic<Run> run{nullptr};
        std::atomic<Workspace *> workspace{nullptr};
        std::atomic<int64_t> count{0}, threads{1};
        std::atomic<size_t> stride{0};
        std::atomic<uint64_t> closure[WORDS] = {};
    };

    struct Helper {
        size_t index;
        alignas(64) std::atomic<Workspace *> inside{nullptr};
    };

    std::mutex leading;    // held by the one that leads
    bool refused = false;  // a thread that was asked for
    std::vector<std::unique_ptr<Helper>> helpers;
    std::vector<std::unique_ptr<Workspace>> workspaces;
    Loop loops[2];
    // Of each range the number of the loop, then TASK_BITS with its next task. Years pass before numbers come again.
    struct alignas(64) Next {
        std::atomic<uint64_t> turn{0};
    } next[MOST_THREADS];
    alignas(64) std::atomic<int> sleepers{0};
    std::mutex falling_asleep;
    std::condition_variable woken;

    // As many as are wanted, or as the system gives.
    void grow(int64_t count) {
        while ((int64_t)helpers.size() < std::min<int64_t>(count, MOST_THREADS - 1) && !refused) {
            auto made = std::make_unique<Helper>();
            made->index = helpers.size() + 1;
            helpers.reserve(made->index);  // nothing may fail once it runs
            try {
                std::thread([this, helper = made.get()] { work(*helper); }).detach();
            } catch (const std::system_error &) {
                refused = true;
                return;
            }
            helpers.push_back(std::move(made));
        }
    }

    // One that nobody is in. There are at most as many as there are threads.
    Workspace &free_workspace() {
        for (auto &workspace : workspaces) {
            bool used = false;
            for (auto &helper : helpers) used |= helper->inside.load() == workspace.get();
            if (!used) return *workspace;
        }
        workspaces.push_back(std::make_unique<Workspace>());
        return *workspaces.back();
    }

    // Whether there are tasks of the loop that is newest.
    bool has_tasks() const {
        const uint64_t number = next[0].turn.load() >> TASK_BITS;
        const Loop &loop = loops[number & 1];
        const Ranges ranges{loop.count.load(), loop.threads.load()};
        for (int64_t r = 0; r < ranges.threads; r++) {
            const uint64_t turn = next[r].turn.load();
            if (turn >> TASK_BITS == number && (int64_t)(turn & TASKS) < ranges.end(r)) return true;
        }
        return false;
    }

    [[noreturn]] void work(Helper &me) {
#if defined(__linux__) && defined(SCHED_IDLE)
        const sched_param parameter{};
        pthread_setschedparam(pthread_self(), SCHED_IDLE, &parameter);
#endif
        auto idle_since = std::chrono::steady_clock::now();
        for (int turns = 1;; turns++) {
            if (take_task(me)) {
                turns = 0;
                continue;
            }
            relax();
            if (turns == 1) idle_since = std::chrono::steady_clock::now();
            if (turns % 256 || std::chrono::steady_clock::now() - idle_since < AWAKE_FOR) continue;
            sleep();
            turns = 0;
        }
    }

    // A task of its own range if there is one left, else of the ranges that follow.
    bool take_task(Helper &me) {
        const uint64_t number = next[0].turn.load(std::memory_order_acquire) >> TASK_BITS;
        const Loop &loop = loops[number & 1];
        const Ranges ranges{loop.count.load(std::memory_order_relaxed), loop.threads.load(std::memory_order_relaxed)};
        for (int64_t i = 0; i < ranges.threads; i++) {
            const int64_t range = ((int64_t)me.index + i) % ranges.threads;
            const uint64_t turn = next[range].turn.load(std::memory_order_acquire);
            if (turn >> TASK_BITS == number && (int64_t)(turn & TASKS) < ranges.end(range))
                return compute(me, loop, next[range].turn, turn);
        }
        return false;
    }

    bool compute(Helper &me, const Loop &loop, std::atomic<uint64_t> &next_turn, uint64_t turn) {
        const int64_t task = turn & TASKS;
        // All of this may be of another loop already: then the task cannot be had.
        Workspace *workspace = loop.workspace.load(std::memory_order_relaxed);
        const Run run = loop.run.load(std::memory_order_relaxed);
        const size_t stride = loop.stride.load(std::memory_order_relaxed);
        uint64_t closure[WORDS];
        for (int i = 0; i < WORDS; i++) closure[i] = loop.closure[i].load(std::memory_order_relaxed);
        me.inside.store(workspace);
        if (next_turn.compare_exchange_strong(turn, turn + 1)) {
            uint64_t before = workspace->done[task].load(std::memory_order_relaxed);
            float *out = workspace->results[me.index].get() + task * stride;
            run(closure, task, out, workspace->scratch[me.index].get());
            // Fails where another has come first, for a later loop.
            workspace->done[task].compare_exchange_strong(before, (turn & ~TASKS) | me.index);
        }
        me.inside.store(nullptr, std::memory_order_release);
        return true;
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(falling_asleep);
        sleepers.fetch_add(1);
        // Not again when the loop is over that woke it: others follow.
        if (!has_tasks()) woken.wait(lock);
        sleepers.fetch_sub(1);
    }

    void wake() {
        { std::lock_guard<std::mutex> lock(falling_asleep); }
        woken.notify_all();
    }
};

// Leads a step: the calling thread, from construction to destruction.
class Lead {
  public:
    explicit Lead(int64_t threads) : pool(Helpers::all()), lock(pool.leading) {
        pool.grow(threads - 1);
        space = &pool.free_workspace();
        space->results.resize(pool.helpers.size() + 1);
        space->scratch.resize(pool.helpers.size() + 1);
    }

    // Keeps what tasks read for as long as helpers may, and makes room for the results of a loop and for what its
    // tasks need meanwhile. Throws std::bad_alloc.
    void prepare(std::shared_ptr<void> read, size_t result_floats, size_t scratch_floats) {
        space->read = std::move(read);
        for (auto &result : space->results) result.reserve(result_floats);
        for (auto &scratch : space->scratch) scratch.reserve(scratch_floats);
    }

    // How a loop of so many tasks is shared.
    Ranges ranges(int64_t count) const { return {count, (int64_t)pool.helpers.size() + 1}; }

    // For each i below `count` calls `compute(i, out, scratch)` on some thread and then `commit(i, out)` on this
    // one; `out` of task i lies `i * stride` floats into the results of the helper that computes it, or is what
    // stays in this thread's cache. What `compute` reads must last as long as helpers may; it is copied itself.
    template <class Compute, class Commit> void share(int64_t count, size_t stride, Compute compute, Commit commit) {
        static_assert(std::is_trivially_copyable_v<Compute> && sizeof(Compute) <= sizeof(uint64_t) * Helpers::WORDS);
        float *mine = space->results[0].get(), *scratch = space->scratch[0].get();
        const bool alone = pool.helpers.empty() || count < 2 || count > Workspace::MOST_TASKS;
        if (alone) {
            for (int64_t i = 0; i < count; i++) compute(i, mine, scratch), commit(i, mine);
            return;
        }
        publish(count, stride, compute);
        taken.assign(count, true);
        const Ranges all = ranges(count);
        for (int64_t r = 0; r < all.threads; r++)
            for (int64_t i; (i = pool.next[r].turn.fetch_add(1) & Helpers::TASKS) < all.end(r); taken[i] = false)
                compute(i, mine, scratch), commit(i, mine);
        for (int64_t i = 0; i < count; i++) {
            if (!taken[i]) continue;
            const float *result = result_of(i, stride);
            if (!result) compute(i, mine, scratch), result = mine;
            commit(i, result);
        }
    }

  private:
    // Longer than a task takes whose helper has a core.
    static constexpr int SPINS = 400;

    Helpers &pool;
    std::lock_guard<std::mutex> lock;
    Workspace *space;
    std::vector<uint8_t> taken;
    uint64_t loop_number = 0;

    template <class Compute> void publish(int64_t count, size_t stride, const Compute &compute) {
        loop_number = (pool.next[0].turn.load() >> Helpers::TASK_BITS) + 1;
        Helpers::Loop &loop = pool.loops[loop_number & 1];
        uint64_t closure[Helpers::WORDS] = {};
        memcpy(closure, &compute, sizeof compute);
        for (int i = 0; i < Helpers::WORDS; i++) loop.closure[i].store(closure[i], std::memory_order_relaxed);
        loop.run.store(
            [](const uint64_t *words, int64_t task, float *out, float *scratch) {
                (*(const Compute *)words)(task, out, scratch);
            },
            std::memory_order_relaxed);
        loop.workspace.store(space, std::memory_order_relaxed);
        const Ranges all = ranges(count);
        loop.count.store(count, std::memory_order_relaxed);
        loop.threads.store(all.threads, std::memory_order_relaxed);
        loop.stride.store(stride, std::memory_order_relaxed);
        // The first one last: helpers look there for a new loop.
        for (int64_t r = all.threads - 1; r >= 0; r--) pool.next[r].turn.store(loop_number << Helpers::TASK_BITS | all.begin(r));
        if (pool.sleepers.load()) pool.wake();
    }

    // What a helper has computed, or null if it has not come back in time.
    const float *result_of(int64_t task, size_t stride) const {
        for (int i = 0; i < SPINS; i++, relax()) {
            const uint64_t done = space->done[task].load(std::memory_order_acquire);
            if (done >> Helpers::TASK_BITS == loop_number) return space->results[done & Helpers::TASKS].get() + task * stride;
        }
        return nullptr;
    }
};
