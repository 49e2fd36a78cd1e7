// Attention over the paged KV cache, read in place through the block tables.
//
// Keys are taken in tiles of KEYS tokens, counted from the start of the sequence, with a running softmax
// (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Every SPLIT keys a new partial result
// begins, and partial results are merged in order. A query's result is therefore the same to the last bit
// whether it is a decode or part of a prompt's chunk, and whether one thread or several worked on it.

#pragma once

#include "panel.h"

constexpr int SPLIT = 1024;
constexpr int MAX_QUERY_ROWS = 48;
constexpr float LOG2_E = 1.44269504088896341f;

// Queries of a group's heads stand together as rows of one tile.
inline int tokens_per_tile(const Shape &s) { return std::max(1, MAX_QUERY_ROWS / s.group()); }
inline int max_rows(const Shape &s) { return tokens_per_tile(s) * s.group(); }
// Room for rows that are taken a vector at a time.
inline size_t padded_rows(const Shape &s) { return (max_rows(s) + LANES - 1) / LANES * LANES; }

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

// A partial softmax: of each row the largest score in powers of two, the sum of powers and weighted values.
struct Partial {
    float *largest, *total, *values;

    static size_t floats(const Shape &s) { return padded_rows(s) * (s.padded_dim() + 2); }
    Partial(float *memory, const Shape &s)
        : largest(memory), total(memory + padded_rows(s)), values(memory + 2 * padded_rows(s)) {}

    void clear(int rows, const Shape &s) const {
        std::fill_n(largest, padded_rows(s), -INFINITY);
        std::fill_n(total, padded_rows(s), 0.0f);
        std::fill_n(values, (size_t)rows * s.padded_dim(), 0.0f);
    }
};

// The rows from `first` on to the first ones of `to`.
inline void copy_rows(const Partial &from, int first, int rows, const Partial &to, const Shape &s) {
    to.clear(rows, s);
    std::copy_n(from.largest + first, rows, to.largest);
    std::copy_n(from.total + first, rows, to.total);
    std::copy_n(from.values + (size_t)first * s.padded_dim(), (size_t)rows * s.padded_dim(), to.values);
}

INLINE float power_of(float x) { return power_of_two(splat(x))[0]; }

// Adds a later part of the keys to `to`.
static void merge(const Partial &to, const Partial &part, int rows, const Shape &s) {
    const int dim = s.padded_dim();
    for (int r = 0; r < rows; r++) {
        if (part.largest[r] == -INFINITY) continue;
        const float best = std::max(to.largest[r], part.largest[r]);
        const float keep = to.largest[r] == -INFINITY ? 0.0f : power_of(to.largest[r] - best);
        const float add = power_of(part.largest[r] - best);
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
    const T *keys, *values;  // blocks of one layer, see blocks.h
    float scale, soft_cap;   // a soft cap of 0 is none
    int64_t window;          // 0 is all

    // Words of memory that `attend` needs besides the two partial results.
    static size_t scratch_words(const Shape &s) {
        const size_t rows = max_rows(s);
        return query_words(s) + (size_t)head_words(s) * KEYS + 2 * rows * KEYS + padded_rows(s);
    }

    // Room for the queries of a tile before what `attend` needs besides.
    static size_t query_words(const Shape &s) { return (size_t)max_rows(s) * head_words(s); }

    // The keys `begin .. end`, which lie inside one split, for queries that `gather_queries` has put into
    // `scratch`; `out` takes them in after what it has. `following` is what the thread is likely to do next, so
    // that its keys can be fetched.
    void attend(const Queries &q, const Keys &range, const Partial &out, uint32_t *scratch, const Queries &following,
                const Keys &following_range) const {
        Tile two[2];
        two[0].find(*this, q, range.begin / KEYS * KEYS, range);
        int now = 0;
        for (int64_t at = range.begin / KEYS * KEYS; at < range.end; at += KEYS, now = 1 - now) {
            if (at + KEYS < range.end)
                two[1 - now].find(*this, q, at + KEYS, range);
            else
                two[1 - now].find(*this, following, following_range.begin / KEYS * KEYS, following_range);
            attend_tile(scratch, q, at, two[now], two[1 - now], out, scratch + query_words(s));
        }
    }

    // Rows `[tokens, heads, head_dim]`, those of a key head's group together.
    void gather_queries(const T *q_rows, int kv_head, int tokens, uint32_t *to) const {
        const int group = s.group(), words = head_words(s);
        for (int t = 0; t < tokens; t++) {
            const T *from = q_rows + ((size_t)t * s.heads + kv_head * group) * s.head_dim;
            memcpy(to + (size_t)t * group * words, from, (size_t)group * words * sizeof(uint32_t));
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
    // A tile's words, and which of its keys are in the range. Pointers to others are those of a neighbour.
    struct Tile : TileWords {
        int begin, end;

        void find(const Attention &a, const Queries &q, int64_t tile, const Keys &range) {
            begin = (int)std::clamp<int64_t>(range.begin - tile, 0, KEYS - 1);
            end = (int)std::clamp<int64_t>(range.end - tile, 1, KEYS);
            const int size = a.s.block_size;
            key_stride = size;
            int64_t index = tile / size;
            int slot = (int)(tile % size);
            size_t at = a.block_of(q, index);
            const int64_t last = std::max<int64_t>(range.end - 1, 0) / size;
            // In steps that neither a vector nor a word crosses.
            const int step = size % LANES ? PER_WORD<T> : LANES;
            for (int j = 0; j < KEYS; j += step, slot += step) {
                if (slot >= size) {
                    slot -= size;
                    at = a.block_of(q, std::min(++index, last));
                }
                if (j % LANES == 0) keys[j / LANES] = (const uint32_t *)(a.keys + at) + slot;
                const uint32_t *row = (const uint32_t *)(a.values + at) + (size_t)slot / PER_WORD<T> * a.s.head_dim;
                for (int i = 0; i < step / PER_WORD<T>; i++) values[j / PER_WORD<T> + i] = row + (size_t)i * a.s.head_dim;
            }
        }
    };

    size_t block_of(const Queries &q, int64_t index) const { return block_offset<T>(s, q.table[index], q.kv_head); }

    // In blocks that vectors would cross, keys are packed after all.
    void pack_keys(const Queries &q, int64_t tile, Tile &now, uint32_t *panel) const {
        for (int j = now.begin; j < now.end; j++) {
            const int64_t index = (tile + j) / s.block_size, slot = (tile + j) % s.block_size;
            const uint32_t *from = (const uint32_t *)(keys + block_of(q, index)) + slot;
            for (int w = 0; w < head_words(s); w++) panel[w * KEYS + j] = from[(size_t)w * s.block_size];
        }
        for (int v = 0; v < KEY_VECTORS; v++) now.keys[v] = panel + v * LANES;
        now.key_stride = KEYS;
    }

    static int head_words(const Shape &s) { return s.head_dim / PER_WORD<T>; }

    void attend_tile(const uint32_t *queries, const Queries &q, int64_t tile, Tile &now, const Tile &next,
                     const Partial &out, uint32_t *scratch) const {
        const int rows = q.tokens * s.group(), words = head_words(s), dim = s.padded_dim();
        float *scores = (float *)(scratch + (size_t)words * KEYS);
        T *weights = (T *)(scores + (size_t)max_rows(s) * KEYS);
        float *factors = scores + 2 * (size_t)max_rows(s) * KEYS;
        if (s.block_size % LANES) pack_keys(q, tile, now, scratch);
        const int first = now.begin / LANES, last = (now.end + LANES - 1) / LANES;
        // The next tile is fetched once, while the first rows are computed.
        by_rows(rows, [&](auto count, int m) {
            const auto compute = m ? score_rows<T, count, false> : score_rows<T, count, true>;
            compute(queries + (size_t)m * words, words, now, first, last, next, scores + (size_t)m * KEYS);
        });
        for (int r = 0; r < rows; r += LANES)
            soften(std::min(LANES, rows - r), r, q, tile, now, scores + (size_t)r * KEYS, out, weights + (size_t)r * KEYS,
                   factors + r);
        by_rows(rows, [&](auto count, int m) {
            const auto compute = m ? value_rows<T, count, false> : value_rows<T, count, true>;
            compute((const uint32_t *)(weights + (size_t)m * KEYS), now, now.begin / PER_WORD<T>,
                    (now.end + PER_WORD<T> - 1) / PER_WORD<T>, now.end % PER_WORD<T>, s.head_dim, next,
                    out.values + (size_t)m * dim, dim, factors + m);
        });
    }

    // Up to LANES rows of the running softmax from row `first` on: scores to weights, and the factors for what
    // was summed before.
    void soften(int rows, int first, const Queries &q, int64_t tile, const Tile &now, float *scores, const Partial &out,
                T *weights, float *factors) const {
        const int begin = now.begin / LANES, end = (now.end + LANES - 1) / LANES;
        const vf per_score = splat((soft_cap > 0 ? 1.0f : scale) * LOG2_E);
        vf reduced[LANES] = {};
        for (int r = 0; r < rows; r++) {
            float *row = scores + r * KEYS;
            mask(row, begin, end, q.first + (first + r) / s.group() - tile, now);
            vf best = load(row + begin * LANES);
            for (int v = begin + 1; v < end; v++) best = maximum(load(row + v * LANES), best);
            reduced[r] = best;
        }
        const vf before = load(out.largest + first), none = splat(-INFINITY);
        const vf best = maximum(reduce_rows(reduced, [](vf a, vf b) { return maximum(a, b); }) * per_score, before);
        store(out.largest + first, best);
        // A row that has seen no key yet has no largest score to subtract.
        alignas(64) float bases[LANES];
        const vf base = choose(best == none, vf{}, best), factor = power_of_two(before - base);
        store(bases, base);
        store(factors, factor);
        for (int r = 0; r < rows; r++) {
            vf total = {};
            for (int v = begin; v < end; v++) {
                const vf weight = power_of_two(load(scores + r * KEYS + v * LANES) * per_score - bases[r]);
                store(weights + r * KEYS + v * LANES, weight);
                total += weight;
            }
            reduced[r] = total;
        }
        const vf totals = reduce_rows(reduced, [](vf a, vf b) { return a + b; });
        store(out.total + first, load(out.total + first) * factor + totals);
    }

    // Caps a row of scores, and hides the keys that the query at `position` of the tile does not see.
    void mask(float *row, int begin, int end, int64_t position, const Tile &now) const {
        const int64_t from = window ? std::max<int64_t>(position + 1 - window, now.begin) : now.begin;
        const int64_t to = std::min<int64_t>(position + 1, now.end);
        if (soft_cap > 0)
            for (int v = begin; v < end; v++) {
                const vf x = load(row + v * LANES) * (scale / soft_cap);
                store(row + v * LANES, soft_cap * hyperbolic_tangent(x));
            }
        if (from <= begin * LANES && to >= end * LANES) return;
        const vi low = splat_int((int32_t)from), high = splat_int((int32_t)std::max<int64_t>(to, 0));
        for (int v = begin; v < end; v++) {
            const vi key = lane_numbers() + v * LANES;
            store(row + v * LANES, choose((key >= low) & (key < high), load(row + v * LANES), splat(-INFINITY)));
        }
    }
};
