// One step of a decoder-only transformer: every thread runs `run`, and meets the others between the parts.

#pragma once

#include "quantized_linear.h"
#include "rows.h"
#include "scratch.h"
#include "tasks.h"

template <class T> class DecoderStep {
  public:
    DecoderStep(const ModelSpec &model, const KVSpec &kv, const StepSpec &step)
        : m(model), kv(kv), step(step),
          shape{(int)model.heads, (int)model.kv_heads, (int)model.head_dim, (int)kv.block_size},
          q_size(model.heads * model.head_dim), tokens(step.num_tokens), blocks(tokens),
          team(step.threads), memory(step.threads, scratch_floats()), normed((T *)step.narrow),
          q(normed + tokens * model.hidden_size), attended(q + tokens * q_size), gated(q) {
        windows_of_layers();
    }

    // Called by all threads of a team.
    void run() {
        team.begin();
        float *scratch = memory.mine();
        for (int64_t i = 0; i < m.num_layers; i++) run_layer(i, scratch);
        norm_all(m.final_norm, (T *)step.result);
    }

  private:
    const ModelSpec &m;
    const KVSpec &kv;
    const StepSpec &step;
    const Shape shape;
    const int64_t q_size, tokens;
    const TokenBlocks blocks;
    Team team;
    const Scratch memory;
    // Working memory for all threads. The gated rows lie where queries and results of attention were.
    T *const normed, *const q, *const attended, *const gated;

    // Layers with the same window share their tasks.
    struct Window {
        int64_t window;
        AttentionTasks tasks;
        std::vector<float> partials;
    };
    std::vector<Window> windows;

    // So few rows each thread norms for itself rather than wait for the others.
    static constexpr int64_t PRIVATE_ROWS = 8;

    float *hidden(int64_t t) const { return step.hidden + t * m.hidden_size; }
    int64_t head_panels() const { return (m.head_dim + PANEL - 1) / PANEL; }

    void windows_of_layers() {
        for (int64_t i = 0; i < m.num_layers; i++) {
            const int64_t window = m.layers[i].window;
            if (std::any_of(windows.begin(), windows.end(), [&](auto &w) { return w.window == window; })) continue;
            Window made{window, attention_tasks(step, shape, window), {}};
            made.partials.resize(partial_floats(made.tasks, shape));
            windows.push_back(std::move(made));
        }
    }

    Window &window_of(const LayerSpec &layer) {
        return *std::find_if(windows.begin(), windows.end(), [&](auto &w) { return w.window == layer.window; });
    }

    size_t private_floats() const { return PRIVATE_ROWS * m.hidden_size; }

    size_t scratch_floats() const {
        const size_t head = head_panels() * PANEL, products = std::max<size_t>(2 * PANEL, head) * TokenBlocks::LARGEST;
        return private_floats() + std::max(attention_scratch_floats<T>(shape), products);
    }

    void run_layer(int64_t index, float *scratch) {
        const LayerSpec &layer = m.layers[index];
        const size_t cache = (size_t)kv.num_blocks * m.kv_heads * kv.block_size * m.head_dim;
        T *keys = (T *)kv.storage + 2 * index * cache, *values = keys + cache;
        float *work = scratch + private_floats();
        project_heads(layer, normed_rows(layer.input_norm, scratch), keys, values, work);
        attend(layer, keys, values, work);
        add_product(attended, q_size, layer.output, layer.post_attention_norm);
        gated_product(normed_rows(layer.pre_feedforward_norm, scratch), layer.gate_up, work);
        add_product(gated, m.intermediate_size, layer.down, layer.post_feedforward_norm);
    }

    // Rows that this thread may read at once; others are not waited for where it norms all of them itself.
    const T *normed_rows(const float *weight, float *scratch) {
        if (tokens > PRIVATE_ROWS) {
            norm_all(weight, normed);
            team.wait();
            return normed;
        }
        T *rows = (T *)scratch;
        for (int64_t t = 0; t < tokens; t++) norm_row(hidden(t), weight, m.norm_eps, (int)m.hidden_size, rows + t * m.hidden_size);
        return rows;
    }

    void norm_all(const float *weight, T *out) {
        for (int64_t t = team.mine(); t < tokens; t += team.size())
            norm_row(hidden(t), weight, m.norm_eps, (int)m.hidden_size, out + t * m.hidden_size);
    }

    // Queries, keys and values, head by head; keys and values go into the cache.
    void project_heads(const LayerSpec &layer, const T *x, T *keys, T *values, float *work) {
        const int64_t heads = shape.heads + 2 * shape.kv_heads, panels = head_panels(), width = panels * PANEL;
        team.share(blocks.count * heads, [&](int64_t i) {
            const int64_t block = i / heads, first = blocks.first(block);
            const int head = (int)(i % heads), rows = blocks.rows(block);
            for (int64_t p = 0; p < panels; p++) {
                const int64_t next = p + 1 < panels ? head * panels + p + 1 : team.after(i) % heads * panels;
                linear_panel(x + first * m.hidden_size, m.hidden_size, rows, layer.qkv, head * panels + p, PANEL,
                             work + p * PANEL, width, Into::REPLACE, next);
            }
            for (int t = 0; t < rows; t++) place_head(layer, first + t, head, work + t * width, keys, values);
        });
        team.wait();
    }

    // A query, key or value goes where it belongs; the first two normed and rotated.
    void place_head(const LayerSpec &layer, int64_t t, int head, float *row, T *keys, T *values) const {
        const int dim = shape.head_dim, heads = shape.heads, kv_heads = shape.kv_heads;
        const int64_t block = step.slots[t] / kv.block_size;
        const int offset = (int)(step.slots[t] % kv.block_size);
        const int kv_head = head - heads < kv_heads ? head - heads : head - heads - kv_heads;
        const size_t at = block_offset<T>(shape, block, kv_head);
        T *const narrow = (T *)row;  // narrower elements may lie over those they are made from
        if (head < heads + kv_heads) turn(layer, step.positions[t], head, row);
        copy_row(row, dim, head < heads ? q + t * q_size + (size_t)head * dim : narrow);
        if (head >= heads + kv_heads)
            put_value(shape, values + at, offset, narrow);
        else if (head >= heads)
            put_key(shape, keys + at, offset, narrow);
    }

    void turn(const LayerSpec &layer, int64_t position, int head, float *row) const {
        const int dim = shape.head_dim;
        if (layer.qk_norm) norm_row(row, layer.qk_norm + (size_t)head * dim, m.norm_eps, dim, row);
        if (layer.rotation < 0) return;
        const RotationSpec &rotation = step.rotations[layer.rotation];
        rotate_head(row, rotation.table + position * rotation.channels, (int)rotation.channels);
    }

    void attend(const LayerSpec &layer, const T *keys, const T *values, float *work) {
        Window &window = window_of(layer);
        const Attention<T> attention{shape, keys, values, m.attention_scale, m.attention_soft_cap, layer.window};
        run_attention(team, attention, window.tasks, window.partials.empty() ? nullptr : window.partials.data(), q,
                      attended, work);
    }

    // Adds a product to the hidden rows, normed first where the model has it so.
    void add_product(const T *x, int64_t x_stride, const Matrix &matrix, const float *post_norm) {
        float *to = post_norm ? step.added : step.hidden;
        product(team, x, x_stride, tokens, matrix, m.hidden_size, to, m.hidden_size,
                post_norm ? Into::REPLACE : Into::ADD);
        if (!post_norm) return;
        for (int64_t t = team.mine(); t < tokens; t += team.size()) {
            float *row = step.added + t * m.hidden_size;
            norm_row(row, post_norm, m.norm_eps, (int)m.hidden_size, row);
            add_row(hidden(t), row, (int)m.hidden_size);
        }
        team.wait();
    }

    void gated_product(const T *x, const Matrix &gate_up, float *work) {
        const int64_t inner = m.intermediate_size, panels = gate_up.rows / PANEL / 2;
        team.share(blocks.count * panels, [&](int64_t i) {
            const int64_t block = i / panels, panel = i % panels, first = blocks.first(block);
            const int rows = blocks.rows(block);
            const T *from = x + first * m.hidden_size;
            linear_panel(from, m.hidden_size, rows, gate_up, panel, PANEL, work, 2 * PANEL, Into::REPLACE, panels + panel);
            linear_panel(from, m.hidden_size, rows, gate_up, panels + panel, PANEL, work + PANEL, 2 * PANEL,
                         Into::REPLACE, team.after(i) % panels);
            const int count = (int)std::min<int64_t>(PANEL, inner - panel * PANEL);
            for (int t = 0; t < rows; t++) {
                const float *gate = work + t * 2 * PANEL;
                gated_row(gate, gate + PANEL, count, (Activation)m.activation, gated + (first + t) * inner + panel * PANEL);
            }
        });
        team.wait();
    }
};
