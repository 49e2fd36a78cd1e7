// One step of a decoder-only transformer: every thread runs `run`, and meets the others between the parts.

#pragma once

#include "packed_linear.h"
#include "scratch.h"
#include "step_parts.h"
#include "tasks.h"

template <class T> class DecoderStep : StepParts<T> {
  public:
    DecoderStep(const ModelSpec &model, const KVSpec &kv, const StepSpec &step)
        : StepParts<T>(model, kv, step), team(step.threads), memory(step.threads, scratch_floats()),
          normed((T *)step.narrow), q(normed + tokens * model.hidden_size), gated(q), blocks(tokens),
          attended(q + tokens * q_size), windows(WindowTasks::of(model, step, shape)),
          last(wanted_only(this->window_of(model.layers[model.num_layers - 1], windows))),
          wanted_hidden(step.num_wanted * model.hidden_size), wanted_attended(step.num_wanted * q_size) {}

    // Called by all threads of a team.
    void run() {
        team.begin();
        float *scratch = memory.mine();
        for (int64_t i = 0; i + 1 < m.num_layers; i++) run_layer(i, scratch);
        run_last_layer(scratch);
        norm_all(m.final_norm, (T *)step.result);
    }

  private:
    using StepParts<T>::m, StepParts<T>::step, StepParts<T>::shape, StepParts<T>::q_size, StepParts<T>::tokens;

    Team team;
    const Scratch memory;
    // Working memory for all threads. The gated rows lie where queries and results of attention were.
    T *const normed, *const q, *const gated;
    // The rows that are computed: of all tokens, in the end of those that are asked for.
    TokenBlocks blocks;
    T *attended;
    std::vector<WindowTasks> windows;
    WindowTasks last;
    std::vector<float> wanted_hidden;
    std::vector<T> wanted_attended;

    size_t scratch_floats() const {
        const size_t head = this->head_panels() * PANEL, products = std::max<size_t>(2 * PANEL, head) * TokenBlocks::LARGEST;
        return std::max(attention_scratch_floats<T>(shape), products);
    }

    void run_layer(int64_t index, float *scratch) {
        const LayerSpec &layer = m.layers[index];
        attend(index, this->window_of(layer, windows), scratch);
        feed_forward(layer, scratch);
    }

    // Nothing reads what the last layer makes of a token but its keys and values, unless its row is asked for.
    void run_last_layer(float *scratch) {
        const LayerSpec &layer = m.layers[m.num_layers - 1];
        attend(m.num_layers - 1, last, scratch);
        if (team.mine() == 0) keep_wanted();
        team.wait();
        if (blocks.tokens) feed_forward(layer, scratch);
    }

    WindowTasks wanted_only(const WindowTasks &all) const {
        std::vector<bool> is_wanted(tokens);
        for (int64_t i = 0; i < step.num_wanted; i++) is_wanted[step.wanted[i]] = true;
        return all.only([&](int64_t row, int count) {
            return std::find(is_wanted.begin() + row, is_wanted.begin() + row + count, true) != is_wanted.begin() + row + count;
        });
    }

    void keep_wanted() {
        const int64_t width = m.hidden_size;
        for (int64_t i = 0; i < step.num_wanted; i++) {
            std::copy_n(this->hidden(step.wanted[i]), width, wanted_hidden.data() + i * width);
            std::copy_n(attended + step.wanted[i] * q_size, q_size, wanted_attended.data() + i * q_size);
        }
        blocks = TokenBlocks(step.num_wanted);
        attended = wanted_attended.data();
        step.hidden = wanted_hidden.data();
    }

    void attend(int64_t index, WindowTasks &window, float *scratch) {
        const LayerSpec &layer = m.layers[index];
        T *keys = this->keys_of(index), *values = this->values_of(index);
        norm_rows(layer.input_norm);
        project_heads(layer, keys, values, scratch);
        const Attention<T> attention{shape, keys, values, m.attention_scale, m.attention_soft_cap, layer.window};
        run_attention(team, attention, window.tasks, window.partial_results(), q, attended, scratch);
    }

    void feed_forward(const LayerSpec &layer, float *scratch) {
        add_product(attended, q_size, layer.output, layer.post_attention_norm);
        norm_rows(layer.pre_feedforward_norm);
        gated_product(layer.gate_up, scratch);
        add_product(gated, m.intermediate_size, layer.down, layer.post_feedforward_norm);
    }

    void norm_rows(const float *weight) {
        norm_all(weight, normed);
        team.wait();
    }

    void norm_all(const float *weight, T *out) {
        for (int64_t t = team.mine(); t < blocks.tokens; t += team.size()) this->norm(t, weight, out + t * m.hidden_size);
    }

    // Queries, keys and values, head by head; keys and values go into the cache.
    void project_heads(const LayerSpec &layer, T *keys, T *values, float *work) {
        const int64_t heads = this->all_heads(), panels = this->head_panels(), width = panels * PANEL;
        team.share(blocks.count * heads, [&](int64_t i) {
            const int64_t block = i / heads, first = blocks.first(block);
            const int head = (int)(i % heads), rows = blocks.rows(block);
            for (int64_t p = 0; p < panels; p++) {
                const int64_t next = p + 1 < panels ? head * panels + p + 1 : team.after(i) % heads * panels;
                linear_panel(normed + first * m.hidden_size, m.hidden_size, rows, layer.qkv, head * panels + p, PANEL,
                             work + p * PANEL, width, Into::REPLACE, next);
            }
            for (int t = 0; t < rows; t++) place_head(layer, first + t, head, work + t * width, keys, values);
        });
        team.wait();
    }

    void place_head(const LayerSpec &layer, int64_t t, int head, float *row, T *keys, T *values) const {
        T *out = head < shape.heads ? q + t * q_size + (size_t)head * shape.head_dim : (T *)row;
        this->make_head(layer, step.positions[t], head, row, out);
        if (head >= shape.heads) this->put_head(t, head, keys, values, out);
    }

    // Adds a product to the hidden rows, normed first where the model has it so.
    void add_product(const T *x, int64_t x_stride, const Matrix &matrix, const float *post_norm) {
        float *to = post_norm ? step.added : step.hidden;
        product(team, x, x_stride, blocks.tokens, matrix, m.hidden_size, to, m.hidden_size,
                post_norm ? Into::REPLACE : Into::ADD);
        if (!post_norm) return;
        for (int64_t t = team.mine(); t < blocks.tokens; t += team.size())
            this->add_normed(t, step.added + t * m.hidden_size, post_norm);
        team.wait();
    }

    void gated_product(const Matrix &gate_up, float *work) {
        const int64_t inner = m.intermediate_size, panels = gate_up.rows / PANEL / 2;
        team.share(blocks.count * panels, [&](int64_t i) {
            const int64_t block = i / panels, panel = i % panels, first = blocks.first(block);
            const int rows = blocks.rows(block);
            const T *from = normed + first * m.hidden_size;
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
