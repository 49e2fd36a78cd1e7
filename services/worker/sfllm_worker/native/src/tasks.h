// How the work of a step is cut into tasks that threads take as they come.

#pragma once

#include <algorithm>
#include <vector>

#include "groups.h"
#include "team.h"

// Queries of one sequence and key head over a range of keys, or those of a group's members over all of theirs.
struct AttentionTask {
    Queries queries;
    int64_t row;  // of the first query in the step
    Keys keys;
    int64_t split;             // index of the partial result, -1 when the task covers all keys
    int64_t group = -1;        // of several decodes
};

struct AttentionTasks {
    std::vector<AttentionTask> all;
    std::vector<DecodeGroup> groups;
};

// Cuts one sequence's queries. Decodes of few sequences over long contexts are cut along the keys as well, so
// that every thread has work: where `attend_all` starts a new partial result in any case.
inline void add_tasks(std::vector<AttentionTask> &tasks, const Shape &shape, const int64_t *table, int64_t start,
                      int64_t count, int64_t row, int64_t window, bool few, int64_t &splits) {
    const int per_tile = tokens_per_tile(shape);
    for (int64_t t = 0; t < count; t += per_tile) {
        const int tokens = (int)std::min<int64_t>(per_tile, count - t);
        const int64_t first = start + t, end = first + tokens;
        const int64_t begin = window ? std::max<int64_t>(0, first - window + 1) : 0;
        const int64_t parts = (end - 1) / SPLIT - begin / SPLIT + 1;
        const bool cut = few && count == 1 && parts > 1;
        for (int head = 0; head < shape.kv_heads; head++) {
            const Queries queries{table, first, tokens, head};
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
}

inline AttentionTasks attention_tasks(const StepSpec &step, const Shape &shape, int64_t window) {
    AttentionTasks tasks;
    const bool few = step.num_sequences * shape.kv_heads < 4 * step.threads;
    std::vector<Decode> decodes;
    int64_t row = 0, splits = 0;
    for (int64_t i = 0; i < step.num_sequences; i++) {
        const int64_t after = step.last_rows[i] + 1, count = after - row, start = step.context_lens[i] - count;
        const int64_t *table = step.block_tables + i * step.table_width;
        // Sequences see different keys through a window.
        if (count == 1 && !few && !window)
            decodes.push_back({table, start, row});
        else
            add_tasks(tasks.all, shape, table, start, count, row, window, few, splits);
        row = after;
    }
    for (auto &group : decode_groups(decodes, shape, 3 * step.threads)) {
        const Decode &first = group.members[0];
        if (group.members.size() == 1) {
            add_tasks(tasks.all, shape, first.table, first.position, 1, first.row, window, few, splits);
            continue;
        }
        for (int head = 0; head < shape.kv_heads; head++)
            tasks.all.push_back({{first.table, group.shared, (int)group.members.size(), head},
                                 first.row, {0, group.shared}, -1, (int64_t)tasks.groups.size()});
        tasks.groups.push_back(std::move(group));
    }
    return tasks;
}

// Floats that the partial results of tasks with cut keys take together.
inline size_t partial_floats(const AttentionTasks &tasks, const Shape &shape) {
    int64_t splits = 0;
    for (const auto &task : tasks.all) splits = std::max(splits, task.split + 1);
    return splits * Partial::floats(shape);
}

template <class T> size_t attention_scratch_floats(const Shape &shape) {
    return 3 * Partial::floats(shape) + Attention<T>::scratch_words(shape);
}

// Where a thread keeps its partial results, and what attention needs besides.
struct AttentionMemory {
    Partial total, part, group;
    uint32_t *rest;

    AttentionMemory(float *memory, const Shape &s)
        : total(memory, s), part(memory + Partial::floats(s), s), group(memory + 2 * Partial::floats(s), s),
          rest((uint32_t *)(memory + 3 * Partial::floats(s))) {}
};

// Keys of queries that were gathered, one split after the other, the first of which goes on with `total`.
template <class T>
void attend_all(const Attention<T> &attention, const Queries &queries, const Keys &keys, const Queries &following,
                const Keys &following_keys, const Partial &total, const AttentionMemory &memory) {
    const int rows = queries.tokens * attention.s.group();
    for (int64_t begin = keys.begin; begin < keys.end;) {
        const int64_t end = std::min(keys.end, (begin / SPLIT + 1) * SPLIT);
        const bool apart = begin > keys.begin || (begin && begin % SPLIT == 0), last = end == keys.end;
        if (apart) memory.part.clear(rows, attention.s);
        attention.attend(queries, {begin, end}, apart ? memory.part : total, memory.rest, last ? following : queries,
                         last ? following_keys : Keys{end, keys.end});
        if (apart) merge(total, memory.part, rows, attention.s);
        begin = end;
    }
}

// The keys that a group's members share for all of them, then the others of each.
template <class T>
void attend_group(const Attention<T> &attention, const AttentionTask &task, const DecodeGroup &group,
                  const AttentionTask &following, const T *q, T *out, const AttentionMemory &memory) {
    const Shape &s = attention.s;
    const size_t row_size = (size_t)s.heads * s.head_dim, words = Attention<T>::query_words(s) / max_rows(s) * s.group();
    const int head = task.queries.kv_head, count = task.queries.tokens;
    const auto alone = [&](int i) { return Queries{group.members[i].table, group.members[i].position, 1, head}; };
    const auto own = [&](int i) { return Keys{group.shared, group.members[i].position + 1}; };
    for (int i = 0; i < count; i++)
        attention.gather_queries(q + group.members[i].row * row_size, head, 1, memory.rest + i * words);
    memory.group.clear(count * s.group(), s);
    attend_all(attention, task.queries, task.keys, alone(0), own(0), memory.group, memory);
    for (int i = 0; i < count; i++) {
        const bool last = i + 1 == count;
        copy_rows(memory.group, i * s.group(), s.group(), memory.total, s);
        attention.gather_queries(q + group.members[i].row * row_size, head, 1, memory.rest);
        attend_all(attention, alone(i), own(i), last ? following.queries : alone(i + 1),
                   last ? following.keys : own(i + 1), memory.total, memory);
        attention.finish(memory.total, alone(i), out + group.members[i].row * row_size);
    }
}

// One task, towards rows `[num_tokens, heads, head_dim]` of `out`, or of `partials` where its keys are cut.
// `following` is the task that this thread is likely to have next.
template <class T>
void run_task(const Attention<T> &attention, const AttentionTasks &tasks, size_t index, size_t following, const T *q,
              T *out, float *partials, float *scratch) {
    const Shape &s = attention.s;
    const size_t row_size = (size_t)s.heads * s.head_dim;
    const AttentionTask &task = tasks.all[index], &then = tasks.all[std::min(following, tasks.all.size() - 1)];
    const AttentionMemory memory(scratch, s);
    if (task.group >= 0) return attend_group(attention, task, tasks.groups[task.group], then, q, out, memory);
    const Partial total = task.split < 0 ? memory.total : Partial(partials + task.split * Partial::floats(s), s);
    attention.gather_queries(q + task.row * row_size, task.queries.kv_head, task.queries.tokens, memory.rest);
    total.clear(task.queries.tokens * s.group(), s);
    attend_all(attention, task.queries, task.keys, then.queries, then.keys, total, memory);
    if (task.split < 0) attention.finish(total, task.queries, out + task.row * row_size);
}

// The first split of each query takes in the later ones, which follow it.
template <class T>
void merge_splits(const Attention<T> &attention, const AttentionTasks &tasks, size_t index, float *partials, T *out) {
    const Shape &s = attention.s;
    const std::vector<AttentionTask> &all = tasks.all;
    const size_t each = Partial::floats(s);
    const AttentionTask &task = all[index];
    const bool later = index > 0 && all[index - 1].split >= 0 && all[index - 1].keys.end == task.keys.begin;
    if (task.split < 0 || later) return;
    const Partial total(partials + task.split * each, s);
    for (size_t j = index + 1; j < all.size() && all[j].split >= 0 && all[j].keys.begin == all[j - 1].keys.end; j++)
        merge(total, Partial(partials + all[j].split * each, s), task.queries.tokens * s.group(), s);
    attention.finish(total, task.queries, out + task.row * s.heads * s.head_dim);
}

// Called by all threads of a team, who wait for each other afterwards. `q` and `out` are the step's rows
// `[num_tokens, heads, head_dim]`; `scratch` is the thread's own, `partials` everyone's.
template <class T>
void run_attention(Team &team, const Attention<T> &attention, const AttentionTasks &tasks, float *partials,
                   const T *q, T *out, float *scratch) {
    const size_t count = tasks.all.size();
    team.share(count, [&](int64_t i) { run_task(attention, tasks, i, team.after(i), q, out, partials, scratch); });
    team.wait();
    if (!partials) return;
    team.share(count, [&](int64_t i) { merge_splits(attention, tasks, i, partials, out); });
    team.wait();
}

// The tasks of a step's layers: those with the same window share them.
struct WindowTasks {
    int64_t window;
    AttentionTasks tasks;
    std::vector<float> partials;

    float *partial_results() { return partials.empty() ? nullptr : partials.data(); }

    // Without the tiles of several queries none of which is wanted, which `is_wanted(row, count)` says.
    template <class Wanted> WindowTasks only(Wanted is_wanted) const {
        WindowTasks left = *this;
        const auto is_needless = [&](const AttentionTask &task) {
            return task.group < 0 && task.split < 0 && !is_wanted(task.row, task.queries.tokens);
        };
        left.tasks.all.erase(std::remove_if(left.tasks.all.begin(), left.tasks.all.end(), is_needless), left.tasks.all.end());
        return left;
    }

    static std::vector<WindowTasks> of(const ModelSpec &m, const StepSpec &step, const Shape &shape) {
        std::vector<WindowTasks> all;
        for (int64_t i = 0; i < m.num_layers; i++) {
            const int64_t window = m.layers[i].window;
            if (std::any_of(all.begin(), all.end(), [&](auto &w) { return w.window == window; })) continue;
            WindowTasks made{window, attention_tasks(step, shape, window), {}};
            made.partials.resize(partial_floats(made.tasks, shape));
            all.push_back(std::move(made));
        }
        return all;
    }
};
