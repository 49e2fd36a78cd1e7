// Products with quantized weights: a few groups of columns at a time become words in the nearest cache, and
// all tokens multiply those as they would a dense weight's. So an output is the same sum in the same order as
// if the whole weight had been unpacked beforehand.

#pragma once

#include "linear.h"

// Groups at a time when there are many tokens, 16 kB. For floats they are the parts of sums, as in linear.h.
template <class T> constexpr int MOST_GROUPS = sizeof(T) < sizeof(float) ? 8 : FLOAT_PART / quantized::GROUP;

// Adds a part of the columns to the sums of MR tokens, `[MR][PANEL]`.
template <class T, int MR>
static void add_part(const T *x, size_t x_stride, const uint32_t *part, int words, float *sums) {
    constexpr bool APART = sizeof(T) == sizeof(float);
    for (int n = 0; n < PANEL; n += TILE_VECTORS * LANES) {
        Ahead nothing{(const char *)part, 0};
        vf acc[MR][TILE_VECTORS] = {};
        for (int m = 0; m < MR && !APART; m++)
            for (int v = 0; v < TILE_VECTORS; v++) acc[m][v] = load(sums + m * PANEL + n + v * LANES);
        sum_tile<T, MR>((const uint32_t *)x, x_stride / PER_WORD<T>, part + n, words, nothing, acc);
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                float *to = sums + m * PANEL + n + v * LANES;
                store(to, APART ? load(to) + acc[m][v] : acc[m][v]);
            }
    }
}

template <class T>
INLINE void add_part_rows(int rows, const T *x, size_t x_stride, const uint32_t *part, int words, float *sums) {
#define CASE(MR)                                                                            \
    case MR:                                                                                \
        if constexpr (MR <= TILE_TOKENS) add_part<T, MR>(x, x_stride, part, words, sums);   \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

// `linear_panel` for a quantized weight.
template <class T>
static void quantized_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                            float *y, size_t y_stride, Into into, int64_t next) {
    alignas(64) uint32_t part[MOST_GROUPS<T> * quantized::GROUP / PER_WORD<T> * PANEL];
    alignas(64) float sums[TokenBlocks::LARGEST * PANEL];
    const size_t bytes = panel_bytes<T>(matrix);
    const char *panel = panel_memory(matrix, index, bytes);
    const char *then = panel_memory(matrix, next < matrix.rows / PANEL ? next : index + 1, bytes);
    const int tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    // With one tile the processor unpacks the next group while it waits for sums of this one.
    const int64_t groups = quantized::group_count(matrix.columns);
    const int64_t each = tiles == 1 && sizeof(T) < sizeof(float) ? 1 : MOST_GROUPS<T>;
    memset(sums, 0, sizeof(float) * PANEL * tokens);
    for (int64_t g = 0; g < groups; g += each, x += each * quantized::GROUP) {
        const int64_t end = std::min(g + each, groups), columns = std::min(end * quantized::GROUP, matrix.columns);
        unpack_panel<T>(matrix.kind, panel, matrix.columns, g, end, part, then);
        const int words = (int)((columns - g * quantized::GROUP) / PER_WORD<T>);
        for (int m = 0, left = tiles; left > 0; left--) {
            const int rows = (tokens - m + left - 1) / left;
            add_part_rows<T>(rows, x + m * x_stride, x_stride, part, words, sums + m * PANEL);
            m += rows;
        }
    }
    const float *bias = matrix.bias ? matrix.bias + index * PANEL : nullptr;
    for (int m = 0; m < tokens; m++)
        for (int n = 0; n < PANEL; n += LANES)
            write_sums(load(sums + m * PANEL + n), bias ? bias + n : nullptr, y + m * y_stride + n, count - n, into);
}
