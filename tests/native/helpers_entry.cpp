// Loops over src/helpers.h that compute numbers which are easy to check, and helpers that are held up in them.

#include "helpers.h"

namespace {

typedef std::chrono::steady_clock Clock;

struct Gate {
    std::thread::id leader = std::this_thread::get_id();
    std::atomic<bool> closed{true};
    std::atomic<int> held{0}, helped{0};

    bool on_helper() const { return std::this_thread::get_id() != leader; }
    // False when it takes too long. Sleeps, because helpers run only where nobody else does.
    template <class Condition> static bool wait(Condition condition) {
        for (auto end = Clock::now() + std::chrono::seconds(60); !condition();) {
            if (Clock::now() > end) return false;
            std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
        return true;
    }
};

// A loop of which each result is `value + task`: how many were not committed once, or wrong.
template <class Meanwhile> int64_t wrong(Lead &lead, int64_t tasks, float value, Meanwhile meanwhile) {
    std::vector<int> times(tasks);
    int64_t errors = 0;
    const auto compute = [value, meanwhile](int64_t i, float *out, float *scratch) {
        scratch[0] = value;
        meanwhile(i);
        out[0] = scratch[0];
        out[1] = (float)i;
    };
    lead.share(tasks, 2, compute, [&](int64_t i, const float *out) {
        times[i]++;
        errors += out[0] != value || out[1] != (float)i;
    });
    for (int n : times) errors += n != 1;
    return errors;
}

}  // namespace

extern "C" {

int64_t wrong_results(int64_t threads, int64_t tasks, int64_t steps) {
    int64_t errors = 0;
    for (int64_t s = 0; s < steps; s++) {
        Lead lead(threads);
        lead.prepare(nullptr, 2 * tasks, 16);
        for (int loop = 0; loop < 5; loop++)
            errors += wrong(lead, tasks, (float)(5 * s + loop), [](int64_t) {});
    }
    return errors;
}

// A helper stops within a task, while the leader ends the loop, runs others and begins other steps; then it goes
// on within a later loop. 0, or what went wrong.
int64_t held_up_helper() {
    auto gate = std::make_shared<Gate>();
    Gate *const g = gate.get();
    const std::weak_ptr<Gate> kept = gate;
    {
        Lead lead(2);
        lead.prepare(std::move(gate), 128, 16);
        const auto until_held = [g](int64_t) {
            if (!g->on_helper())
                Gate::wait([g] { return g->held > 0; });
            else if (g->held.fetch_add(1) == 0)
                Gate::wait([g] { return !g->closed; });
        };
        if (wrong(lead, 64, 1, until_held)) return 1;
        if (g->held < 1) return 2;
        if (wrong(lead, 64, 2, [](int64_t) {})) return 3;
    }
    for (int step = 0; step < 3; step++) {
        Lead lead(2);
        lead.prepare(nullptr, 128, 16);
        if (wrong(lead, 64, 3, [](int64_t) {})) return 4;
        if (kept.expired()) return 5;
        if (step < 2) continue;
        const auto until_helped = [g](int64_t) {
            if (g->on_helper())
                g->helped++;
            else if (g->closed.exchange(false), !Gate::wait([g] { return g->helped > 0; }))
                g->helped = -1000;
        };
        if (wrong(lead, 64, 4, until_helped)) return 6;
        if (g->helped < 0) return 7;
    }
    Helpers::all().wait();
    return 0;
}
}
