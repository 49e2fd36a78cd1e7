// Products with compressed weights. Words are made in registers and multiplied there, anew for each tile of tokens,
// which costs less than to write them down: an output is the same sum in the same order as from a dense weight.

#pragma once

#include "compressed.h"
#include "linear.h"

// More tokens multiply the dense panels, where those are kept: they compute longer than they wait for memory.
constexpr int COMPRESSED_TOKENS = 16;

#if SFLLM_COMPRESSES
// As many token rows as the registers hold.
constexpr int COMPRESSED_TILE = TILE_TOKENS * TILE_VECTORS / compressed::VECTORS;

template <int MR>
static void compressed_tile(const bf16 *x, size_t x_stride, compressed::Reader reader, int64_t columns, const float *bias,
                            int count, float *y, size_t y_stride, Into into) {
    using compressed::VECTORS, compressed::PAIRS;
    constexpr int POINTERS = (MR + 2) / 3;
    const uint32_t *at[POINTERS];
    const size_t stride = x_stride / 2;
    for (int p = 0; p < POINTERS; p++) at[p] = (const uint32_t *)x + 3 * p * stride;
    vf acc[MR][VECTORS] = {};
    for (int64_t g = 0; g < compressed::group_count(columns); g++)
        reader.group(g, [&](int pair, const vu *words) __attribute__((always_inline)) {
            const size_t word = g * PAIRS + pair;
#pragma GCC unroll 12
            for (int m = 0; m < MR; m++) {
                const vu splat = splat_word<bf16>(at[m / 3] + (m % 3) * stride + word);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) acc[m][v] = Words<bf16>::dot(acc[m][v], splat, words[v]);
            }
        });
#pragma GCC unroll 12
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const int n = v * LANES;
            write_sums(acc[m][v], bias ? bias + n : nullptr, y + m * y_stride + n, count - n, into);
        }
}

// `linear_panel` for a compressed weight.
static void compressed_panel(const bf16 *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                             float *y, size_t y_stride, Into into, int64_t next) {
    const int64_t then = next < matrix.rows / PANEL ? next : index + 1;
    const compressed::Reader reader(panel_memory(matrix, index), matrix.columns, panel_memory(matrix, then));
    const float *bias = matrix.bias ? matrix.bias + index * PANEL : nullptr;
    for (int left = (tokens + COMPRESSED_TILE - 1) / COMPRESSED_TILE, rows; left > 0; left--, tokens -= rows) {
        rows = (tokens + left - 1) / left;
        switch (rows) {
#define CASE(MR)                                                                                                  \
    case MR:                                                                                                      \
        if constexpr (MR <= COMPRESSED_TILE)                                                                      \
            compressed_tile<MR>(x, x_stride, reader, matrix.columns, bias, count, y, y_stride, into);             \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
        x += rows * x_stride, y += rows * y_stride;
    }
}

// Writes `[rows / PANEL][columns / 2][PANEL]` words, the panels of the dense weight.
inline void decompress(const Matrix &matrix, uint32_t *out, int64_t threads) {
    const int64_t panels = matrix.rows / PANEL, words = matrix.columns / 2 * PANEL;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < panels; i++) {
        compressed::Reader reader(panel_memory(matrix, i), matrix.columns, panel_memory(matrix, i + 1));
        for (int64_t g = 0; g < compressed::group_count(matrix.columns); g++)
            reader.unpack(g, out + i * words + g * compressed::PAIRS * PANEL);
    }
}
#endif

// Bytes of a compressed panel of a dense weight, or 0 where compressing does not pay.
inline int64_t compressed_panel_bytes(const Matrix &dense, int64_t threads) {
    const int64_t panels = dense.rows / PANEL;
    int64_t listed = 0;
#pragma omp parallel for num_threads((int)threads) reduction(max : listed)
    for (int64_t i = 0; i < panels; i++) {
        const compressed::CodeBook book((const uint16_t *)panel_memory(dense, i), dense.columns * PANEL);
        listed = std::max(listed, book.listed);
    }
    const int64_t bytes = compressed::panel_bytes(dense.columns, listed);
    return SFLLM_COMPRESSES && bytes * 8 <= dense.panel_bytes * 7 ? bytes : 0;
}

inline void compress(const Matrix &dense, int64_t panel_bytes, uint8_t *out, int64_t threads) {
    const int64_t panels = dense.rows / PANEL;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < panels; i++)
        compressed::pack_panel((const uint32_t *)panel_memory(dense, i), dense.columns, panel_bytes, out + i * panel_bytes);
}
