// Rows of a weight by token id: the hidden rows that a step begins with.

#pragma once

#include <vector>

#include "compressed.h"
#include "weight.h"

// The kind of a weight that is no panels but whole rows of the model's elements, as an embedding alone may be.
constexpr int64_t PLAIN_ROWS = -1;

template <class T> void plain_row(const T *from, int64_t columns, float *out) {
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) store(out + i, load(from + i));
    if (i < columns) store_some(out + i, load_some(from + i, (int)(columns - i)), (int)(columns - i));
}

// `row` is counted from the panel's first.
template <class T> void dense_row(const uint32_t *panel, int row, int64_t columns, float *out) {
    for (int64_t i = 0; i < columns; i += PER_WORD<T>, panel += PANEL)
        for (int part = 0; part < PER_WORD<T>; part++) out[i + part] = to_float(((const T *)(panel + row))[part]);
}

// Rounded to the model's elements, as products read it.
template <class T, int64_t KIND> void quantized_row(const uint8_t *group, int row, int64_t columns, float *out) {
    using namespace quantized;
    // Four bits of two rows share a byte.
    const int place = nibbles(KIND) ? row / 16 * 16 + row % 8 * 2 : row * 2, shift = row % 16 / 8 * 4;
    for (int64_t start = 0; start < columns; start += GROUP, group += group_bytes(KIND)) {
        const float scale = from_half(load_as<uint16_t>(group + 2 * row));
        const float offset = offsets(KIND) ? from_half(load_as<uint16_t>(group + 2 * (ROWS + row))) : 0.0f;
        const uint8_t *values = group + head_bytes(KIND) + place;
        float wide[GROUP];
        for (int i = 0; i < GROUP; i++) {
            const uint8_t byte = values[i / 2 * pair_bytes(KIND) + i % 2];
            wide[i] = (float)(nibbles(KIND) ? (byte >> shift & 15) - middle(KIND) : (int8_t)byte) * scale + offset;
        }
        T narrow[GROUP];
        for (int i = 0; i < GROUP; i += LANES) store(narrow + i, load(wide + i));
        plain_row(narrow, std::min<int64_t>(GROUP, columns - start), out + start);
    }
}

inline void compressed_row(const uint8_t *panel, int row, int64_t columns, float *out) {
    std::vector<uint16_t> elements(columns);
    compressed::unpack_row(panel, row, columns, elements.data());
    plain_row((const bf16 *)elements.data(), columns, out);
}

// `out[columns]` is row `token` of the weight times `scale`.
template <class T> void embed_token(const Matrix &weight, int64_t token, float scale, float *out) {
    const int64_t columns = weight.columns;
    if (weight.kind == PLAIN_ROWS) {
        plain_row((const T *)weight.weight + token * columns, columns, out);
    } else {
        const int row = (int)(token % PANEL);
        const char *panel = panel_memory(weight, token / PANEL);
        switch (weight.kind) {
        case DENSE: dense_row<T>((const uint32_t *)panel, row, columns, out); break;
        case COMPRESSED: compressed_row((const uint8_t *)panel, row, columns, out); break;
        case INT8: quantized_row<T, INT8>((const uint8_t *)panel, row, columns, out); break;
        case INT8_OFFSET: quantized_row<T, INT8_OFFSET>((const uint8_t *)panel, row, columns, out); break;
        case INT4: quantized_row<T, INT4>((const uint8_t *)panel, row, columns, out); break;
        case INT4_OFFSET: quantized_row<T, INT4_OFFSET>((const uint8_t *)panel, row, columns, out); break;
        }
    }
    for (int64_t i = 0; i < columns; i++) out[i] *= scale;
}
