// Weights that are no words of the model's elements: how they become them, and who multiplies them.

#pragma once

#include "compressed_linear.h"
#include "quantized_linear.h"

// More tokens multiply words that were unpacked beforehand, where those are kept. For a quantized weight that is then
// up to a tenth faster than to unpack; with seven it takes 1.15 times as long, with four 1.4 times.
inline int most_packed(int64_t kind) { return kind == COMPRESSED ? COMPRESSED_TOKENS : 7; }

// By words that were unpacked beforehand. Not by matrix tiles, whose sums are others: fewer tokens have none.
template <class T>
static void unpacked_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count,
                           float *y, size_t y_stride, Into into, int64_t next) {
    const int64_t words = matrix.columns / PER_WORD<T>;
    const uint32_t *panels = (const uint32_t *)matrix.unpacked, *panel = panels + index * words * PANEL;
    const bool more = next < matrix.rows / PANEL;
    const Ahead ahead = fetch_next(panel, more ? (const char *)(panels + next * words * PANEL) : nullptr, tokens);
    dense_tiles(x, x_stride, tokens, panel, (int)words, matrix.bias ? matrix.bias + index * PANEL : nullptr, count, y,
                y_stride, into, ahead);
}

template <class T>
static void packed_panel(const T *x, size_t x_stride, int tokens, const Matrix &matrix, int64_t index, int count, float *y,
                         size_t y_stride, Into into, int64_t next) {
    if (matrix.unpacked && tokens > most_packed(matrix.kind))
        return unpacked_panel(x, x_stride, tokens, matrix, index, count, y, y_stride, into, next);
#if SFLLM_COMPRESSES
    if constexpr (sizeof(T) == sizeof(bf16))
        if (matrix.kind == COMPRESSED)
            return compressed_panel(x, x_stride, tokens, matrix, index, count, y, y_stride, into, next);
#endif
    quantized_panel(x, x_stride, tokens, matrix, index, count, y, y_stride, into, next);
}

// Writes `[rows / PANEL][columns / PER_WORD][PANEL]` words, the panels of the dense weight.
template <class T> void unpack_matrix(const Matrix &matrix, uint32_t *out, int64_t threads) {
#if SFLLM_COMPRESSES
    if (matrix.kind == COMPRESSED) return decompress(matrix, out, threads);
#endif
    unpack_quantized<T>(matrix, out, threads);
}
