// One step of a decoder-only transformer: every thread runs `run`, and meets the others between the parts.

#pragma once

#include "rows.h"
#include "scratch.h"
#include "tasks.h"

template <class T> class DecoderStep {
  public:
    DecoderStep(const ModelSpec &model, const KVSpec &kv, const StepSpec &step)
        : m(model), kv(kv), step(step),
          shape{(int)model.heads, (int)model.kv_heads, (int)model.head_dim, (int)kv.block_size},
          q_size(model.heads * model.head_dim), qkv_size(q_size + 2 * model.kv_heads * model.head_dim),
          tokens(step.num_tokens), memory(step.threads, scratch_floats()),
          packed(std::max({packed_words<T>(tokens, m.hidden_size), packed_words<T>(tokens, q_size),
                           packed_words<T>(tokens, m.intermediate_size)})) {
        windows_of_layers();
    }

    // Called by all threads of a team.
    void run() {
        float *scratch = memory.mine();
        embed();
        for (int64_t i = 0; i < m.num_layers; i++) run_layer(i, scratch);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            norm_row(hidden(t), m.final_norm, m.norm_eps, (int)m.hidden_size, (T *)step.result + t * m.hidden_size);
    }

  private:
    const ModelSpec &m;
    const KVSpec &kv;
    const StepSpec &step;
    const Shape shape;
    const int64_t q_size, qkv_size, tokens;
    const Scratch memory;
    std::vector<uint32_t> packed;

    // Layers with the same window share their tasks.
    struct Window {
        int64_t window;
        std::vector<AttentionTask> tasks;
        std::vector<float> partials;
    };
    std::vector<Window> windows;

    float *hidden(int64_t t) const { return step.hidden + t * m.hidden_size; }

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

    size_t scratch_floats() const {
        const size_t gated = 2 * 64 * TOKEN_BLOCK, head = m.head_dim;
        return std::max({attention_scratch_floats<T>(shape), gated, head});
    }

    void run_layer(int64_t index, float *scratch) {
        const LayerSpec &layer = m.layers[index];
        const size_t cache = (size_t)kv.num_blocks * m.kv_heads * kv.block_size * m.head_dim;
        T *keys = (T *)kv.storage + 2 * index * cache, *values = keys + cache;
        T *normed = (T *)step.narrow, *q = normed, *attended = q + tokens * q_size;
        norm_all(layer.input_norm, normed);
        product(shared(normed, m.hidden_size), layer.qkv, step.wide, qkv_size, Into::REPLACE, step.threads);
        place_heads(layer, keys, values, q, scratch);
        attend(layer, keys, values, q, attended, scratch);
        add_product(attended, q_size, layer.output, layer.post_attention_norm);
        norm_all(layer.pre_feedforward_norm, normed);
        // The gated product cannot go where its input is read.
        T *gated = (T *)step.narrow + tokens * m.hidden_size;
        gated_product(normed, layer.gate_up, gated, scratch);
        add_product(gated, m.intermediate_size, layer.down, layer.post_feedforward_norm);
    }

    Tokens<T> shared(const T *x, int64_t size) { return share_tokens(x, size, tokens, size, packed.data()); }

    void embed() {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const T *row = (const T *)m.embedding + step.token_ids[t] * m.hidden_size;
            for (int64_t i = 0; i < m.hidden_size; i++) hidden(t)[i] = to_float(row[i]) * m.embedding_scale;
        }
    }

    void norm_all(const float *weight, T *out) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            norm_row(hidden(t), weight, m.norm_eps, (int)m.hidden_size, out + t * m.hidden_size);
    }

    // Adds a product to the hidden rows, normed first where the model has it so.
    void add_product(const T *x, int64_t x_stride, const Matrix &matrix, const float *post_norm) {
        float *to = post_norm ? step.wide : step.hidden;
        product(shared(x, x_stride), matrix, to, m.hidden_size, post_norm ? Into::REPLACE : Into::ADD, step.threads);
        if (!post_norm) return;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            float *row = step.wide + t * m.hidden_size;
            norm_row(row, post_norm, m.norm_eps, (int)m.hidden_size, row);
            add_row(hidden(t), row, (int)m.hidden_size);
        }
    }

    void gated_product(const T *x, const Matrix &gate_up, T *out, float *scratch) {
        const int64_t inner = m.intermediate_size;
        const int rows = block_of_rows(inner, step.threads);
        const Tokens<T> input = shared(x, m.hidden_size);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t t = 0; t < tokens; t += TOKEN_BLOCK)
            for (int64_t n = 0; n < inner; n += rows) {
                const int count = (int)std::min<int64_t>(rows, inner - n);
                linear_part(input, t, gate_up, (int)n, count, scratch, 2 * rows, Into::REPLACE);
                linear_part(input, t, gate_up, (int)(inner + n), count, scratch + rows, 2 * rows, Into::REPLACE);
                for (int i = 0; i < std::min<int64_t>(TOKEN_BLOCK, tokens - t); i++) {
                    const float *gate = scratch + (size_t)i * 2 * rows;
                    gated_row(gate, gate + rows, count, (Activation)m.activation, out + (t + i) * inner + n);
                }
            }
    }

    // Norms and rotates queries and keys; keys and values go into the cache.
    void place_heads(const LayerSpec &layer, T *keys, T *values, T *q, float *head_memory) {
        const int dim = shape.head_dim, heads = shape.heads, kv_heads = shape.kv_heads;
        const RotationSpec *rotation = layer.rotation < 0 ? nullptr : &step.rotations[layer.rotation];
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const float *row = step.wide + t * qkv_size;
            const int64_t block = step.slots[t] / kv.block_size, offset = step.slots[t] % kv.block_size;
            for (int h = 0; h < heads + 2 * kv_heads; h++) {
                const int kv_head = h - heads < kv_heads ? h - heads : h - heads - kv_heads;
                const size_t at = ((block * kv_heads + kv_head) * kv.block_size + offset) * dim;
                if (h >= heads + kv_heads) {
                    copy_row(row + (size_t)h * dim, dim, values + at);
                    continue;
                }
                memcpy(head_memory, row + (size_t)h * dim, dim * sizeof(float));
                if (layer.qk_norm)
                    norm_row(head_memory, layer.qk_norm + (size_t)h * dim, m.norm_eps, dim, head_memory);
                if (rotation)
                    rotate_head(head_memory, rotation->table + step.positions[t] * rotation->channels,
                                (int)rotation->channels);
                copy_row(head_memory, dim, h < heads ? q + t * q_size + (size_t)h * dim : keys + at);
            }
        }
    }

    void attend(const LayerSpec &layer, const T *keys, const T *values, const T *q, T *attended, float *scratch) {
        Window &window = window_of(layer);
        const Attention<T> attention{shape, keys, values, m.attention_scale, m.attention_soft_cap, layer.window};
        run_attention(attention, window.tasks, window.partials.empty() ? nullptr : window.partials.data(), q,
                      attended, scratch);
    }
};
