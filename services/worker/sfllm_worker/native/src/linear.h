// Linear layers: `y[m][n] = x[m] . w[n] + bias[n]`, in blocks that stay in the caches.

#pragma once

#include <type_traits>

#include "amx.h"

struct Matrix {
    const void *weight;  // [rows, columns] in the element type of the model
    const void *bias;    // [rows] or null
    int64_t rows;
    int64_t columns;
};

enum class Into { REPLACE, ADD };

// Activations that are used again and again should stay in the first-level cache beside a weight's rows.
constexpr size_t ACTIVATION_BYTES = 28 * 1024;

template <int MR>
INLINE void write_tile(const float (*out)[NR], int count, float *y, size_t y_stride, Into into) {
    for (int m = 0; m < MR; m++) {
        float *row = y + m * y_stride;
        if (into == Into::ADD)
            for (int n = 0; n < count; n++) row[n] += out[m][n];
        else
            memcpy(row, out[m], count * sizeof(float));
    }
}

template <class T, int MR>
INLINE void linear_tile(const T *x, size_t x_stride, const T *w, const T *bias, int depth, int count, float *y,
                        size_t y_stride, Into into) {
    const T *rows[NR];
    // Past the last row its neighbour is computed again and dropped.
    for (int n = 0; n < NR; n++) rows[n] = w + (size_t)std::min(n, count - 1) * depth;
    float out[MR][NR];
    dot_tile<T, MR>(x, x_stride, rows, depth, out);
    if (bias)
        for (int m = 0; m < MR; m++)
            for (int n = 0; n < std::min(count, NR); n++) out[m][n] += to_float(bias[n]);
    // Numbers that the compiler knows make these a few moves instead of calls.
    if (count >= NR)
        write_tile<MR>(out, NR, y, y_stride, into);
    else
        write_tile<MR>(out, count, y, y_stride, into);
}

// Rows `first .. first + count` of `matrix` times `m_count` rows of `x`; `y` points at the first of them.
template <class T>
static void linear_block(const T *x, size_t x_stride, int m_count, const Matrix &matrix, int first, int count,
                         float *y, size_t y_stride, Into into) {
    const int depth = (int)matrix.columns;
    const T *w = (const T *)matrix.weight + (size_t)first * depth;
    const T *bias = matrix.bias ? (const T *)matrix.bias + first : nullptr;
    const int fitting = (int)(ACTIVATION_BYTES / (depth * sizeof(T)));
    const int block = std::max(6, fitting / 6 * 6);
    for (int m0 = 0; m0 < m_count; m0 += block) {
        const int m1 = std::min(m_count, m0 + block);
        const int tiles = (m1 - m0 + 5) / 6;
        const size_t next_bytes = 4 * (size_t)depth * sizeof(T), piece = next_bytes / tiles + 1;
        for (int n = 0; n < count; n += 4) {
            const T *wn = w + (size_t)n * depth;
            const T *bn = bias ? bias + n : nullptr;
            // While these rows are used, the next ones are fetched, a piece with each tile.
            const char *next = (const char *)(wn + 4 * (size_t)depth), *const next_end = next + next_bytes;
            const bool fetch = m0 == 0 && n + 4 < count;
#define TILE(MR) \
    linear_tile<T, MR>(x + m * x_stride, x_stride, wn, bn, depth, count - n, y + m * y_stride + n, y_stride, into)
            int m = m0;
            for (int left = tiles; left > 0; left--) {
                for (const char *stop = next + piece; fetch && next < stop && next < next_end; next += 64)
                    __builtin_prefetch(next);
                const int rows = (m1 - m + left - 1) / left;  // tiles of like height
                switch (rows) {
                case 1: TILE(1); break;
                case 2: TILE(2); break;
                case 3: TILE(3); break;
                case 4: TILE(4); break;
                case 5: TILE(5); break;
                case 6: TILE(6); break;
                }
                m += rows;
            }
#undef TILE
        }
    }
}

// Outputs of a product are dealt out in blocks: small enough that every thread gets several.
inline int block_of_rows(int64_t rows, int64_t threads) {
    const int64_t fair = (rows / (threads * 8) + 15) / 16 * 16;
    return (int)std::clamp<int64_t>(fair, 16, 64);
}

// So many token rows at a time share a reading of a block of weights.
constexpr int TOKEN_BLOCK = 240;

// Rows of activations, and the same packed for tiles where those serve; else null.
template <class T> struct Tokens {
    const T *rows;
    int64_t stride, count;
    const uint32_t *packed;
};

template <class T> size_t packed_words(int64_t tokens, int64_t depth) {
#if SFLLM_AMX
    if (std::is_same_v<T, bf16> && amx::serves(tokens, depth)) return amx::packed_words(tokens, depth);
#endif
    (void)tokens, (void)depth;
    return 0;
}

// Called by all threads of a team. `memory` has room for `packed_words`.
template <class T>
Tokens<T> share_tokens(const T *rows, int64_t stride, int64_t count, int64_t depth, uint32_t *memory) {
#if SFLLM_AMX
    if constexpr (std::is_same_v<T, bf16>)
        if (amx::serves(count, depth)) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t += amx::SIDE)
                amx::pack(rows + t * stride, stride, (int)std::min<int64_t>(amx::SIDE, count - t), (int)depth,
                          memory + t * depth / 2);
            return {rows, stride, count, memory};
        }
#endif
    (void)depth, (void)memory;
    return {rows, stride, count, nullptr};
}

// Up to TOKEN_BLOCK tokens from `t` on times rows `first .. first + count` of `matrix`, to `y`.
template <class T>
void linear_part(const Tokens<T> &x, int64_t t, const Matrix &matrix, int first, int count, float *y,
                 size_t y_stride, Into into) {
    const int tokens = (int)std::min<int64_t>(TOKEN_BLOCK, x.count - t);
#if SFLLM_AMX
    if constexpr (std::is_same_v<T, bf16>)
        if (x.packed) {
            const int depth = (int)matrix.columns, tiled = count / amx::SIDE * amx::SIDE;
            amx::multiply_block(x.packed + t * depth / 2, (const T *)matrix.weight + (size_t)first * depth, depth,
                                tiled, tokens, y, y_stride, into == Into::ADD);
            for (int m = 0; matrix.bias && m < tokens; m++)
                for (int n = 0; n < tiled; n++) y[m * y_stride + n] += to_float(((const T *)matrix.bias)[first + n]);
            first += tiled, count -= tiled, y += tiled;
            if (!count) return;
        }
#endif
    linear_block(x.rows + t * x.stride, x.stride, tokens, matrix, first, count, y, y_stride, into);
}

// The whole product. Called by all threads of a team, who share its blocks.
template <class T>
void product(const Tokens<T> &x, const Matrix &matrix, float *y, int64_t y_stride, Into into, int64_t threads) {
    const int rows = block_of_rows(matrix.rows, threads);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t t = 0; t < x.count; t += TOKEN_BLOCK)
        for (int64_t n = 0; n < matrix.rows; n += rows)
            linear_part(x, t, matrix, (int)n, (int)std::min<int64_t>(rows, matrix.rows - n), y + t * y_stride + n,
                        y_stride, into);
}
