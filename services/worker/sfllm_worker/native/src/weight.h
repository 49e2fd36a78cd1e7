// Weights of linear layers as they lie in memory.

#pragma once

#include "dot.h"

// Rows of a weight that lie side by side: `words[columns / PER_WORD][PANEL]`.
constexpr int PANEL = 32;

struct Matrix {
    const void *weight;     // panels of words of the model's element type
    const float *bias;      // [rows] or null
    int64_t rows, columns;  // rows are padded to whole panels, columns are whole words
};

template <class T> size_t panel_bytes(const Matrix &matrix) { return matrix.columns * PANEL * sizeof(T); }

INLINE const char *panel_memory(const Matrix &matrix, int64_t index, size_t bytes) {
    return (const char *)matrix.weight + index * bytes;
}
