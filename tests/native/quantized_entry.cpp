// What the tests call of src/quantized.h.

#include "quantized.h"

extern "C" {

int64_t panel_bytes(int64_t kind, int64_t columns) {
    return quantized::group_count(columns) * quantized::group_bytes(kind);
}

void unpack_bf16(int64_t kind, const void *panel, int64_t columns, int64_t first, int64_t last, uint32_t *out) {
    unpack_panel<bf16>(kind, panel, columns, first, last, out, panel);
}

void unpack_float(int64_t kind, const void *panel, int64_t columns, int64_t first, int64_t last, uint32_t *out) {
    unpack_panel<float>(kind, panel, columns, first, last, out, panel);
}
}
