// Attention over the paged KV cache, read in place through the block tables.
//
// Keys are taken in tiles of KEYS tokens, counted from the start of the sequence, with a running softmax
// (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Every SPLIT keys a new partial result
// begins, and partial results are merged in order. A query's result is therefore the same to the last bit
// whether it is a decode or part of a prompt's chunk, and whether one thread or several worked on it.

#pragma once

#include <algorithm>

#include "panel.h"

constexpr int KEYS = 64;
constexpr int SPLIT = 1024;
constexpr int MAX_QUERY_ROWS = 48;

struct Shape {
    int heads, kv_heads, head_dim, block_size;
    int group() const { return heads / kv_heads; }
    // Queries of a group's heads stand together as rows of one tile.
    int tokens_per_tile() const { return std::max(1, MAX_QUERY_ROWS / group()); }
    int max_rows() const { return tokens_per_tile() * group(); }
    int padded_dim() const { return (head_dim + LANES - 1) / LANES * LANES; }
};

// The newest `tokens` queries of a sequence from position `first` on, for one key head.
struct Queries {
    const int64_t *table;
    int64_t first;
    int tokens;
    int kv_head;
};

// Keys by their positions.
struct Keys {
    int64_t begin, end;
};

// A partial softmax: largest score, sum of exponentials and weighted values of each row.
struct Partial {
    float *largest, *total, *values;

    static size_t floats(const Shape &s) { return (size_t)s.max_rows() * (s.padded_dim() + 2); }
    Partial(float *memory, const Shape &s)
        : largest(memory), total(memory + s.max_rows()), values(memory + 2 * s.max_rows()) {}

    void clear(int rows, const Shape &s) const {
        std::fill_n(largest, rows, -INFINITY);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(values, (size_t)rows * s.padded_dim(), 0.0f);
    }
};

INLINE float exponential_of(float x) { return exponential(splat(x))[0]; }

// Adds a later part of the keys to `to`.
static void merge(const Partial &to, const Partial &part, int rows, const Shape &s) {
    const int dim = s.padded_dim();
    for (int r = 0; r < rows; r++) {
        if (part.largest[r] == -INFINITY) continue;
        const float best = std::max(to.largest[r], part.largest[r]);
        const float keep = to.largest[r] == -INFINITY ? 0.0f : exponential_of(to.largest[r] - best);
        const float add = exponential_of(part.largest[r] - best);
        to.largest[r] = best;
        to.total[r] = to.total[r] * keep + part.total[r] * add;
        float *a = to.values + (size_t)r * dim;
        const float *b = part.values + (size_t)r * dim;
        for (int i = 0; i < dim; i++) a[i] = a[i] * keep + b[i] * add;
    }
}

template <class T> class Attention {
  public:
    Shape s;
    const T *keys, *values;  // [blocks, kv_heads, block_size, head_dim]
    float scale, soft_cap;   // a soft cap of 0 is none
    int64_t window;          // 0 is all

    // Words of memory that `attend` needs besides the two partial results.
    static size_t scratch_words(const Shape &s) {
        const size_t rows = s.max_rows(), words = head_words(s);
        return rows * words + words * KEYS + (size_t)KEYS * s.padded_dim() + 2 * rows * KEYS + rows;
    }

    // The keys `begin .. end`, which lie inside one split. `q_rows` are rows `[tokens, heads, head_dim]`, those
    // of `q` first. `following` is what the thread is likely to do next, so that its keys can be fetched.
    void attend(const T *q_rows, const Queries &q, const Keys &range, const Partial &out, uint32_t *scratch,
                const Queries &following, const Keys &following_range) const {
        gather_queries(q_rows, q, scratch);
        out.clear(q.tokens * s.group(), s);
        uint32_t *rest = scratch + (size_t)s.max_rows() * head_words(s);
        Rows two[2];
        two[0].find(*this, q, range.begin / KEYS * KEYS, range);
        int now = 0;
        for (int64_t tile = range.begin / KEYS * KEYS; tile < range.end; tile += KEYS, now = 1 - now) {
            if (tile + KEYS < range.end)
                two[1 - now].find(*this, q, tile + KEYS, range);
            else
                two[1 - now].find(*this, following, following_range.begin / KEYS * KEYS, following_range);
            attend_tile(scratch, q, tile, two[now], two[1 - now], out, rest);
        }
    }

    // Divides by the sums and writes rows `[tokens, heads, head_dim]`.
    void finish(const Partial &in, const Queries &q, T *out_rows) const {
        const int group = s.group();
        for (int r = 0; r < q.tokens * group; r++) {
            T *out = out_rows + ((size_t)(r / group) * s.heads + q.kv_head * group + r % group) * s.head_dim;
            const float *row = in.values + (size_t)r * s.padded_dim();
            const float factor = 1.0f / in.total[r];
            int i = 0;
            for (; i + LANES <= s.head_dim; i += LANES) store(out + i, load(row + i) * factor);
            if (i < s.head_dim) store_some(out + i, load(row + i) * factor, s.head_dim - i);
        }
    }

  private:
    // Where a tile's keys and values are. Those outside of the range are null: no query sees them, and what is
    // in their blocks may be anything.
    struct Rows {
        const T *keys[KEYS], *values[KEYS];
        int count;  // up to the last key

        void find(const Attention &a, const Queries &q, int64_t tile, const Keys &range) {
            std::fill_n(keys, KEYS, nullptr);
            std::fill_n(values, KEYS, nullptr);
            count = (int)std::clamp<int64_t>(range.end - tile, 0, KEYS);
            int j = (int)std::max<int64_t>(0, range.begin - tile);
            int64_t index = (tile + j) / a.s.block_size, slot = (tile + j) % a.s.block_size;
            for (; j < count; index++, slot = 0) {
                size_t at = ((q.table[index] * a.s.kv_heads + q.kv_head) * a.s.block_size + slot) * a.s.head_dim;
                for (; slot < a.s.block_size && j < count; slot++, j++, at += a.s.head_dim) {
                    keys[j] = a.keys + at;
                    values[j] = a.values + at;
                }
            }
        }
    };

    static int head_words(const Shape &s) { return s.head_dim / PER_WORD<T>; }

    void gather_queries(const T *q_rows, const Queries &q, uint32_t *to) const {
        const int group = s.group(), words = head_words(s);
        for (int t = 0; t < q.tokens; t++) {
            const T *from = q_rows + ((size_t)t * s.heads + q.kv_head * group) * s.head_dim;
            memcpy(to + (size_t)t * group * words, from, (size_t)group * words * sizeof(uint32_t));
        }
    }

    void attend_tile(const uint32_t *queries, const Queries &q, int64_t tile, const Rows &now, const Rows &next,
                     const Partial &out, uint32_t *scratch) const {
        const int rows = q.tokens * s.group(), words = head_words(s), dim = s.padded_dim(), count = now.count;
        uint32_t *key_panel = scratch;
        uint32_t *value_panel = key_panel + (size_t)words * KEYS;
        float *scores = (float *)(value_panel + (size_t)KEYS * dim);
        T *weights = (T *)(scores + (size_t)s.max_rows() * KEYS);
        float *factors = scores + 2 * (size_t)s.max_rows() * KEYS;
        const int vectors = (count + LANES - 1) / LANES;
        pack_keys(now, next, vectors, key_panel);
        multiply_panel<T>(queries, words, rows, key_panel, KEYS, vectors, words, scores, KEYS, nullptr);
        for (int r = 0; r < rows; r++) {
            const int64_t position = q.first + r / s.group();
            const int64_t seen_to = std::min<int64_t>(count, position + 1 - tile);
            const int64_t seen_from = window ? position + 1 - window - tile : 0;
            factors[r] = soften(scores + (size_t)r * KEYS, vectors, (int)std::max<int64_t>(seen_from, 0),
                                (int)std::max<int64_t>(seen_to, 0), out, r, weights + (size_t)r * KEYS);
        }
        const int depth = pack_values(now, next, value_panel);
        multiply_panel<T>((const uint32_t *)weights, KEYS / PER_WORD<T>, rows, value_panel, dim, dim / LANES, depth,
                          out.values, dim, factors);
    }

    // One row of the running softmax: scores to weights. The factor for what was summed before.
    float soften(const float *scores, int vectors, int from, int to, const Partial &out, int r, T *weights) const {
        if (from >= to) {
            std::fill_n(weights, vectors * LANES, T{});
            return 1.0f;
        }
        const vi lanes = lane_numbers();
        const bool partly = from > 0 || to < vectors * LANES;
        vf kept[KEYS / LANES];
        vf best = splat(-INFINITY);
        for (int v = 0; v < vectors; v++) {
            vf x = load(scores + v * LANES) * scale;
            if (soft_cap > 0) x = soft_cap * hyperbolic_tangent(x / soft_cap);
            if (partly) {
                const vi key = lanes + v * LANES;
                x = choose((key >= from) & (key < to), x, splat(-INFINITY));
            }
            kept[v] = x;
            best = maximum(best, x);
        }
        const float before = out.largest[r], now = std::max(before, largest(best));
        vf total = {};
        for (int v = 0; v < vectors; v++) {
            const vf weight = exponential(kept[v] - now);
            store(weights + v * LANES, weight);
            total += weight;
        }
        const float factor = before == -INFINITY ? 0.0f : exponential_of(before - now);
        out.largest[r] = now;
        out.total[r] = out.total[r] * factor + sum(total);
        return factor;
    }

    // Keys side by side: row w of the panel has word w of every key. Rows that are null are zeros.
    void pack_keys(const Rows &now, const Rows &next, int vectors, uint32_t *panel) const {
        const int words = head_words(s);
        for (int v = 0; v < KEYS / LANES; v++) {
            for (int i = 0; i < LANES; i++) prefetch(next.keys[v * LANES + i]);
            if (v >= vectors) continue;
            for (int w = 0; w < words; w += LANES) {
                const int width = std::min(LANES, words - w);
                vi square[LANES];
                for (int i = 0; i < LANES; i++) {
                    const T *row = now.keys[v * LANES + i];
                    square[i] = row ? load_words(row + w * PER_WORD<T>, width) : vi{};
                }
                transpose_words(square);
                for (int i = 0; i < width; i++)
                    memcpy(panel + (size_t)(w + i) * KEYS + v * LANES, &square[i], sizeof(vi));
            }
        }
    }

    static INLINE vi load_words(const T *from, int count) {
        if (count == LANES) return load_as<vi>(from);
        vi words = {};
        memcpy(&words, from, count * sizeof(uint32_t));
        return words;
    }

    // Values with as many keys in a word as it holds; the panel's depth in words.
    int pack_values(const Rows &now, const Rows &next, uint32_t *panel) const;

    // Blocks lie anywhere in memory, so the hardware cannot guess the next tile; a few requests at a time
    // between other work keep the memory busy without filling its queues.
    INLINE void prefetch(const T *row) const {
        if (row)
            for (size_t i = 0; i < s.head_dim * sizeof(T); i += 64) __builtin_prefetch((const char *)row + i);
    }
};

// Columns beyond the head are zeros: what is behind a row in memory may be anything. So is a null row.
template <class T> INLINE vf head_columns(const T *row, int i, int head_dim) {
    if (!row) return vf{};
    if (i + LANES <= head_dim) return load(row + i);
    return load_some(row + i, head_dim - i);
}

template <> inline int Attention<float>::pack_values(const Rows &now, const Rows &next, uint32_t *panel) const {
    const int dim = s.padded_dim();
    for (int j = 0; j < KEYS; j++) {
        prefetch(next.values[j]);
        for (int i = 0; i < dim && j < now.count; i += LANES) {
            const vf v = head_columns(now.values[j], i, s.head_dim);
            memcpy(panel + (size_t)j * dim + i, &v, sizeof v);
        }
    }
    return now.count;
}

template <> inline int Attention<bf16>::pack_values(const Rows &now, const Rows &next, uint32_t *panel) const {
    const int dim = s.padded_dim();
    for (int j = 0; j < KEYS; j += 2) {
        prefetch(next.values[j]);
        prefetch(next.values[j + 1]);
        for (int i = 0; i < dim && j < now.count; i += LANES) {
            const vu even = (vu)head_columns(now.values[j], i, s.head_dim) >> 16;
            const vu odd = (vu)head_columns(now.values[j + 1], i, s.head_dim);
            const vu pair = even | odd;
            memcpy(panel + (size_t)(j / 2) * dim + i, &pair, sizeof pair);
        }
    }
    return (now.count + 1) / 2;
}
