// What the tests call of src/quantized.h, and a loop that measures it.

#include "quantized.h"

extern "C" {

int64_t panel_bytes(int64_t kind, int64_t columns) { return quantized_panel_bytes(kind, columns); }

void unpack_bf16(int64_t kind, const void *panel, int64_t columns, uint32_t *out) {
    unpack_panel<bf16>(kind, panel, columns, out);
}

void unpack_float(int64_t kind, const void *panel, int64_t columns, uint32_t *out) {
    unpack_panel<float>(kind, panel, columns, out);
}

void row_bf16(int64_t kind, const void *panel, int64_t row, int64_t columns, uint16_t *out) {
    unpack_row<bf16>(kind, panel, (int)row, columns, (bf16 *)out);
}

void row_float(int64_t kind, const void *panel, int64_t row, int64_t columns, float *out) {
    unpack_row<float>(kind, panel, (int)row, columns, out);
}

// All panels of a weight into the same words, so that these stay in the cache.
void unpack_all(int64_t kind, const char *panels, int64_t count, int64_t columns, uint32_t *out) {
    for (int64_t i = 0; i < count; i++)
        unpack_panel<bf16>(kind, panels + i * quantized_panel_bytes(kind, columns), columns, out);
}
}
