// Weights of linear layers as they lie in memory.

#pragma once

#include "dot.h"
#include "quantized.h"

// Rows of a weight that lie side by side: `words[columns / PER_WORD][PANEL]`.
constexpr int PANEL = 32;

struct Matrix {
    const void *weight;     // panels: words of the model's element type, or of a quantized kind
    const float *bias;      // [rows] or null
    int64_t rows, columns;  // rows are padded to whole panels, columns are whole words
    int64_t kind;           // WeightKind
    const void *unpacked;   // a quantized weight's panels as words of the element type, or null
};

template <class T> size_t panel_bytes(const Matrix &matrix) {
    if (matrix.kind != DENSE) return quantized_panel_bytes(matrix.kind, matrix.columns);
    return matrix.columns * PANEL * sizeof(T);
}

INLINE const char *panel_memory(const Matrix &matrix, int64_t index, size_t bytes) {
    return (const char *)matrix.weight + index * bytes;
}
