// Weights of linear layers as they lie in memory.

#pragma once

#include "dot.h"
#include "quantized.h"

// Rows of a weight that lie side by side: `words[columns / PER_WORD][PANEL]`.
constexpr int PANEL = 32;

struct Matrix {
    const void *weight;     // panels: words of the model's element type, or of another kind
    const float *bias;      // [rows] or null
    int64_t rows, columns;  // rows are padded to whole panels, columns are whole words
    int64_t kind;           // WeightKind
    int64_t panel_bytes;    // from one panel to the next
    const void *unpacked;   // the panels as words of the element type where `weight` has others, or null
};

INLINE const char *panel_memory(const Matrix &matrix, int64_t index) {
    return (const char *)matrix.weight + index * matrix.panel_bytes;
}
