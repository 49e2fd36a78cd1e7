// What happens to heads between the products of a step, however its threads share the work.

#pragma once

#include "rows.h"
#include "tasks.h"

template <class T> class StepParts {
  protected:
    StepParts(const ModelSpec &model, const KVSpec &kv, const StepSpec &step)
        : m(model), kv(kv), step(step),
          shape{(int)model.heads, (int)model.kv_heads, (int)model.head_dim, (int)kv.block_size},
          q_size(model.heads * model.head_dim), tokens(step.num_tokens) {}

    const ModelSpec m;
    const KVSpec kv;
    StepSpec step;
    const Shape shape;
    const int64_t q_size, tokens;

    float *hidden(int64_t t) const { return step.hidden + t * m.hidden_size; }
    int64_t head_panels() const { return (m.head_dim + PANEL - 1) / PANEL; }
    int64_t all_heads() const { return m.heads + 2 * m.kv_heads; }

    T *keys_of(int64_t layer) const { return (T *)kv.storage + 2 * layer * cache_size(); }
    T *values_of(int64_t layer) const { return keys_of(layer) + cache_size(); }

    // A query, key or value as it is used, from its product; the first two normed and rotated. `out` may lie over
    // `row`, as narrower elements do over those they are made from.
    void make_head(const LayerSpec &layer, int64_t position, int head, float *row, T *out) const {
        const int dim = shape.head_dim;
        if (head < shape.heads + shape.kv_heads) turn(layer, position, head, row);
        copy_row(row, dim, out);
    }

    // Puts a key or value into its slot.
    void put_head(int64_t t, int head, T *keys, T *values, const T *row) const {
        const int kv_head = (head - shape.heads) % shape.kv_heads;
        const size_t at = block_offset<T>(shape, step.slots[t] / kv.block_size, kv_head);
        const int slot = (int)(step.slots[t] % kv.block_size);
        if (head < shape.heads + shape.kv_heads)
            put_key(shape, keys + at, slot, row);
        else
            put_value(shape, values + at, slot, row);
    }

    void norm(int64_t t, const float *weight, T *out) const {
        norm_row(hidden(t), weight, m.norm_eps, (int)m.hidden_size, out);
    }

    // Adds a product's row to the hidden one, normed first.
    void add_normed(int64_t t, float *row, const float *weight) const {
        norm_row(row, weight, m.norm_eps, (int)m.hidden_size, row);
        add_row(hidden(t), row, (int)m.hidden_size);
    }

    static WindowTasks &window_of(const LayerSpec &layer, std::vector<WindowTasks> &windows) {
        return *std::find_if(windows.begin(), windows.end(), [&](auto &w) { return w.window == layer.window; });
    }

  private:
    size_t cache_size() const { return (size_t)kv.num_blocks * m.kv_heads * shape.head_block(); }

    void turn(const LayerSpec &layer, int64_t position, int head, float *row) const {
        const int dim = shape.head_dim;
        if (layer.qk_norm) norm_row(row, layer.qk_norm + (size_t)head * dim, m.norm_eps, dim, row);
        if (layer.rotation < 0) return;
        const RotationSpec &rotation = step.rotations[layer.rotation];
        rotate_head(row, rotation.table + position * rotation.channels, (int)rotation.channels);
    }
};
