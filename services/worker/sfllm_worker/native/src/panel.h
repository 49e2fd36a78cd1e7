// The two products of attention over a tile of keys, with keys and values read where they lie.

#pragma once

#include "blocks.h"

// Keys of a tile.
constexpr int KEYS = 64;
constexpr int KEY_VECTORS = KEYS / LANES;

// Where the words of a tile lie. Those of keys outside of a range may be anything.
struct TileWords {
    const uint32_t *keys[KEY_VECTORS];  // word w of a vector of keys is at `keys[v] + w * key_stride`
    size_t key_stride;
    const uint32_t *values[KEYS];       // by words of neighbouring keys
};

template <class T> INLINE typename Words<T>::V load_words(const uint32_t *from) { return load_as<typename Words<T>::V>(from); }

// `scores[m][v] = queries[m] . keys[v]` for MR rows and V vectors. FETCH asks memory for `next` meanwhile.
template <class T, int MR, int V, bool FETCH>
INLINE void score_tile(const uint32_t *queries, int words, const TileWords &tile, int first, const TileWords &next,
                       float *scores) {
    vf acc[MR][V] = {};
    const uint32_t *at[V], *ahead[V];
    for (int v = 0; v < V; v++) {
        at[v] = tile.keys[first + v];
        ahead[v] = next.keys[first + v];
    }
    const size_t stride = tile.key_stride, step = next.key_stride;
    for (int w = 0; w < words; w++) {
        typename Words<T>::V column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            column[v] = load_words<T>(at[v] + w * stride);
            if (FETCH) __builtin_prefetch(ahead[v] + w * step);
        }
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            const auto word = splat_word<T>(queries + m * words + w);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = Words<T>::dot(acc[m][v], word, column[v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < V; v++) store(scores + m * KEYS + (first + v) * LANES, acc[m][v]);
}

template <class T, int MR, bool FETCH>
static void score_rows(const uint32_t *queries, int words, const TileWords &tile, int begin, int end,
                       const TileWords &next, float *scores) {
    int v = begin;
    for (; v + 4 <= end; v += 4) score_tile<T, MR, 4, FETCH>(queries, words, tile, v, next, scores);
    for (; v < end; v++) score_tile<T, MR, 1, FETCH>(queries, words, tile, v, next, scores);
}

// A vector of a row of values; beyond the head's `columns` are zeros, because memory may end there.
template <class T, bool WHOLE> INLINE typename Words<T>::V load_value(const uint32_t *from, int columns) {
    if (WHOLE) return load_words<T>(from);
    typename Words<T>::V v = {};
    memcpy(&v, from, columns * sizeof(uint32_t));
    return v;
}

// `sums[m] = sums[m] * factors[m] + weights[m] . values` for MR rows and V vectors of channels from `column` on.
template <class T, int MR, int V, bool WHOLE, bool FETCH>
INLINE void value_tile(const uint32_t *weights, const TileWords &tile, int begin, int end, bool odd, int column,
                       int columns, const TileWords &next, float *sums, int stride, const float *factors) {
    constexpr int ROW = KEYS / PER_WORD<T>;
    vf acc[MR][V];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < V; v++) acc[m][v] = load(sums + m * stride + column + v * LANES) * factors[m];
    typedef typename Words<T>::V Vector;
    for (int j = begin; j < end; j++) {
        const uint32_t *row = tile.values[j] + column, *ahead = next.values[j] + column;
        Vector values[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            values[v] = load_value<T, WHOLE>(row + v * LANES, columns);
            if (FETCH) __builtin_prefetch(ahead + v * LANES);
        }
        // The last key has no neighbour yet, and what will be overwritten there may be anything.
        if (PER_WORD<T> == 2 && odd && j + 1 == end)
            for (int v = 0; v < V; v++) values[v] = (Vector)((vu)values[v] & 0xffff);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            const auto word = splat_word<T>(weights + m * ROW + j);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = Words<T>::dot(acc[m][v], word, values[v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < V; v++) store(sums + m * stride + column + v * LANES, acc[m][v]);
}

template <class T, int MR, bool FETCH>
static void value_rows(const uint32_t *weights, const TileWords &tile, int begin, int end, bool odd, int head_dim,
                       const TileWords &next, float *sums, int stride, const float *factors) {
    int i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES)
        value_tile<T, MR, 4, true, FETCH>(weights, tile, begin, end, odd, i, LANES, next, sums, stride, factors);
    for (; i + LANES <= head_dim; i += LANES)
        value_tile<T, MR, 1, true, FETCH>(weights, tile, begin, end, odd, i, LANES, next, sums, stride, factors);
    if (i < head_dim)
        value_tile<T, MR, 1, false, FETCH>(weights, tile, begin, end, odd, i, head_dim - i, next, sums, stride, factors);
}

// Calls `work` with the number of rows as a constant and the first row, for all of `rows`.
template <class Work> INLINE void by_rows(int rows, Work work) {
    int m = 0;
    for (; m + 6 <= rows; m += 6) work(std::integral_constant<int, 6>(), m);
    switch (rows - m) {
    case 1: return work(std::integral_constant<int, 1>(), m);
    case 2: return work(std::integral_constant<int, 2>(), m);
    case 3: return work(std::integral_constant<int, 3>(), m);
    case 4: return work(std::integral_constant<int, 4>(), m);
    case 5: return work(std::integral_constant<int, 5>(), m);
    }
}
