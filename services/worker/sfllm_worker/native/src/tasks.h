// How the work of a step is cut into tasks that threads take as they come.

#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "step.h"
#include "team.h"

// Queries of one sequence and key head over a range of keys.
struct AttentionTask {
    Queries queries;
    int64_t row;  // of the first query in the step
    Keys keys;
    int64_t split;  // index of the partial result, -1 when the task covers all keys
};

// Decodes of few sequences over long contexts are cut along the keys as well, so that every thread has work.
// The cuts are those at which `attend_all` starts a new partial result in any case.
inline std::vector<AttentionTask> attention_tasks(const StepSpec &step, const Shape &shape, int64_t window) {
    std::vector<AttentionTask> tasks;
    const int per_tile = tokens_per_tile(shape);
    const bool few = step.num_sequences * shape.kv_heads < 4 * step.threads;
    int64_t row = 0, splits = 0;
    for (int64_t i = 0; i < step.num_sequences; i++) {
        const int64_t after = step.last_rows[i] + 1, count = after - row;
        const int64_t start = step.context_lens[i] - count;
        for (int64_t t = 0; t < count; t += per_tile) {
            const int tokens = (int)std::min<int64_t>(per_tile, count - t);
            const int64_t first = start + t, end = first + tokens;
            const int64_t begin = window ? std::max<int64_t>(0, first - window + 1) : 0;
            const int64_t parts = (end - 1) / SPLIT - begin / SPLIT + 1;
            const bool cut = few && count == 1 && parts > 1;
            for (int head = 0; head < shape.kv_heads; head++) {
                const Queries queries{step.block_tables + i * step.table_width, first, tokens, head};
                if (!cut) {
                    tasks.push_back({queries, row + t, {begin, end}, -1});
                    continue;
                }
                for (int64_t p = 0; p < parts; p++) {
                    const int64_t cut_at = (begin / SPLIT + p) * SPLIT;
                    const Keys part{std::max(begin, cut_at), std::min(end, cut_at + SPLIT)};
                    tasks.push_back({queries, row + t, part, splits + p});
                }
                splits += parts;
            }
        }
        row = after;
    }
    return tasks;
}

// Floats that the partial results of tasks with cut keys take together.
inline size_t partial_floats(const std::vector<AttentionTask> &tasks, const Shape &shape) {
    int64_t splits = 0;
    for (const auto &task : tasks) splits = std::max(splits, task.split + 1);
    return splits * Partial::floats(shape);
}

template <class T> size_t attention_scratch_floats(const Shape &shape) {
    return 2 * Partial::floats(shape) + Attention<T>::scratch_words(shape);
}

// All keys of a task, one split after the other; where the task is one of several splits, only that one.
template <class T>
void attend_all(const Attention<T> &attention, const AttentionTask &task, const AttentionTask &following, const T *q,
                const Partial &total, const Partial &part, uint32_t *scratch) {
    const int rows = task.queries.tokens * attention.s.group();
    int64_t begin = task.keys.begin;
    while (begin < task.keys.end) {
        const int64_t end = std::min(task.keys.end, (begin / SPLIT + 1) * SPLIT);
        const bool first = begin == task.keys.begin, last = end == task.keys.end;
        attention.attend(q, task.queries, {begin, end}, first ? total : part, scratch,
                         last ? following.queries : task.queries, last ? following.keys : Keys{end, task.keys.end});
        if (!first) merge(total, part, rows, attention.s);
        begin = end;
    }
}

// Called by all threads of a team, who wait for each other afterwards. `q` and `out` are the step's rows
// `[num_tokens, heads, head_dim]`; `scratch` is the thread's own, `partials` everyone's.
template <class T>
void run_attention(Team &team, const Attention<T> &attention, const std::vector<AttentionTask> &tasks, float *partials,
                   const T *q, T *out, float *scratch) {
    const Shape &s = attention.s;
    const size_t each = Partial::floats(s), row_size = (size_t)s.heads * s.head_dim, count = tasks.size();
    uint32_t *rest = (uint32_t *)(scratch + 2 * each);
    team.share(count, [&](int64_t i) {
        const AttentionTask &task = tasks[i];
        const Partial total(task.split < 0 ? scratch : partials + task.split * each, s);
        const AttentionTask &following = tasks[std::min<size_t>(team.after(i), count - 1)];
        attend_all(attention, task, following, q + task.row * row_size, total, Partial(scratch + each, s), rest);
        if (task.split < 0) attention.finish(total, task.queries, out + task.row * row_size);
    });
    team.wait();
    if (!partials) return;
    // The first split of each query takes in the later ones, which follow it.
    team.share(count, [&](int64_t i) {
        const AttentionTask &task = tasks[i];
        const bool first = task.split >= 0 && (i == 0 || tasks[i - 1].split < 0 || tasks[i - 1].keys.end != task.keys.begin);
        if (!first) return;
        const Partial total(partials + task.split * each, s);
        for (size_t j = i + 1; j < count && tasks[j].split >= 0 && tasks[j].keys.begin == tasks[j - 1].keys.end; j++)
            merge(total, Partial(partials + tasks[j].split * each, s), task.queries.tokens * s.group(), s);
        attention.finish(total, task.queries, out + task.row * row_size);
    });
    team.wait();
}
