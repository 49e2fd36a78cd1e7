// Products with a packed right side, for attention: `c[m] = c[m] * factor[m] + a[m] . panel`.
//
// A word is what one lane multiplies at once: a float, or two neighbouring bfloat16. A row of `a` is a run
// of words, a panel has a row of columns for each word. Sums run along the words, one after the other.

#pragma once

#include "dot.h"

template <class T> constexpr int PER_WORD = sizeof(float) / sizeof(T);

template <class T> INLINE typename Pairs<T>::V splat_word(const uint32_t *word) {
    return (typename Pairs<T>::V)(vu{} + *word);
}

template <class T, int MR, int VECTORS>
INLINE void panel_tile(const uint32_t *a, int a_stride, const uint32_t *panel, int columns, int depth, float *c,
                       int c_stride, const float *factors) {
    typedef typename Pairs<T>::V V;
    vf acc[MR][VECTORS];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < VECTORS; v++)
            acc[m][v] = factors ? load(c + m * c_stride + v * LANES) * factors[m] : vf{};
    for (int k = 0; k < depth; k++) {
        V column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) column[v] = load_as<V>(panel + (size_t)k * columns + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            V word = splat_word<T>(a + m * a_stride + k);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[m][v] = Pairs<T>::dot(acc[m][v], word, column[v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < VECTORS; v++) store(c + m * c_stride + v * LANES, acc[m][v]);
}

template <class T, int MR>
static void panel_rows(const uint32_t *a, int a_stride, const uint32_t *panel, int columns, int vectors, int depth,
                       float *c, int c_stride, const float *factors) {
    int v = 0;
    for (; v + 4 <= vectors; v += 4)
        panel_tile<T, MR, 4>(a, a_stride, panel + v * LANES, columns, depth, c + v * LANES, c_stride, factors);
    for (; v < vectors; v++)
        panel_tile<T, MR, 1>(a, a_stride, panel + v * LANES, columns, depth, c + v * LANES, c_stride, factors);
}

// `rows` rows of `a` (each `a_stride` words) with the first `vectors` vectors of a panel's `columns`.
// Without factors `c` is overwritten.
template <class T>
static void multiply_panel(const uint32_t *a, int a_stride, int rows, const uint32_t *panel, int columns,
                           int vectors, int depth, float *c, int c_stride, const float *factors) {
#define ROWS(MR)                                                                                        \
    panel_rows<T, MR>(a + (size_t)m * a_stride, a_stride, panel, columns, vectors, depth,               \
                      c + (size_t)m * c_stride, c_stride, factors ? factors + m : nullptr)
    int m = 0;
    for (; m + 6 <= rows; m += 6) ROWS(6);
    switch (rows - m) {
    case 1: ROWS(1); break;
    case 2: ROWS(2); break;
    case 3: ROWS(3); break;
    case 4: ROWS(4); break;
    case 5: ROWS(5); break;
    }
#undef ROWS
}

// For each distance a power of two: which lanes of two rows make the lower row, and which the upper.
struct TransposeLanes {
    int32_t low[4][LANES] = {}, high[4][LANES] = {};
    constexpr TransposeLanes() {
        for (int step = 0; 1 << step < LANES; step++)
            for (int i = 0; i < LANES; i++) {
                const int d = 1 << step;
                low[step][i] = i & d ? LANES + i - d : i;
                high[step][i] = i & d ? LANES + i : i + d;
            }
    }
};
alignas(64) constexpr TransposeLanes TRANSPOSE_LANES;

// Turns LANES vectors of LANES words around: lane i of vector j becomes lane j of vector i.
INLINE void transpose_words(vi *rows) {
#pragma GCC unroll 4
    for (int step = 0; 1 << step < LANES; step++) {
        const int d = 1 << step;
        const vi low = load_as<vi>(TRANSPOSE_LANES.low[step]), high = load_as<vi>(TRANSPOSE_LANES.high[step]);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & d) continue;
            const vi a = rows[i], b = rows[i + d];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + d] = __builtin_shuffle(a, b, high);
        }
    }
}
