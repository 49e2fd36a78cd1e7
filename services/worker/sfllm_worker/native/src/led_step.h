// A step of few tokens, led by one thread; see helpers.h. Sums are the same, in the same order, as in decoder.h.
//
// Such a step is bound by memory, and its loops are so short that threads would wait for each other hundreds of
// times, each time for whoever had to leave its core to another process.

#pragma once

#include "helpers.h"
#include "packed_linear.h"
#include "step_parts.h"

// Whether to lead a step or product. What one thread puts in place alone grows with the tokens, what each computes
// shrinks with the threads; and in long steps waiting matters less.
inline bool is_led(int64_t tokens, int64_t threads) {
    constexpr int64_t MOST_PUT_IN_PLACE = 48;
    return threads > 1 && tokens * (threads - 1) <= MOST_PUT_IN_PLACE;
}

template <class T> class LedStep : StepParts<T> {
  public:
    static void run(const ModelSpec &model, const KVSpec &kv, const StepSpec &step) {
        Lead lead(step.threads);
        const auto made = std::make_shared<LedStep>(model, kv, step, lead);
        lead.prepare(made, made->result_floats(), made->scratch_floats());
        for (int64_t i = 0; i < model.num_layers; i++) made->run_layer(i);
        for (int64_t i = 0; i < step.num_wanted; i++)
            made->norm(step.wanted[i], model.final_norm, (T *)step.result + i * model.hidden_size);
    }

    LedStep(const ModelSpec &model, const KVSpec &kv, const StepSpec &given, Lead &lead)
        : StepParts<T>(model, kv, given), lead(&lead), tables(step.block_tables, step.block_tables + step.num_sequences * step.table_width),
          normed(tokens * m.hidden_size), q(tokens * q_size), attended(tokens * q_size),
          gated(tokens * m.intermediate_size) {
        step.block_tables = tables.data();
        copy_rotations(given);
        windows = WindowTasks::of(m, step, shape);
    }

  private:
    using StepParts<T>::m, StepParts<T>::step, StepParts<T>::shape, StepParts<T>::q_size, StepParts<T>::tokens;

    Lead *const lead;  // not for helpers
    // What helpers read must not be the caller's, who goes on while one of them may be held up.
    const std::vector<int64_t> tables;
    std::vector<T> normed, q, attended, gated;
    std::vector<RotationSpec> rotations;
    std::vector<float> rotation_rows;
    std::vector<WindowTasks> windows;

    // Only the rows of the step's positions, in their order.
    void copy_rotations(const StepSpec &given) {
        int64_t count = 0;
        for (int64_t i = 0; i < m.num_layers; i++) count = std::max(count, m.layers[i].rotation + 1);
        for (int64_t i = 0; i < count; i++)
            for (int64_t t = 0; t < tokens; t++) {
                const float *row = given.rotations[i].table + given.positions[t] * given.rotations[i].channels;
                rotation_rows.insert(rotation_rows.end(), row, row + given.rotations[i].channels);
            }
        const float *at = rotation_rows.data();
        for (int64_t i = 0; i < count; at += tokens * rotations[i++].channels)
            rotations.push_back({at, given.rotations[i].channels});
        step.rotations = rotations.data();
    }

    size_t head_width() const { return this->head_panels() * PANEL; }

    size_t result_floats() const {
        const size_t panels = std::max(m.hidden_size, m.intermediate_size) / PANEL + 1;
        size_t most = tokens * std::max(this->all_heads() * head_width(), panels * PANEL);
        for (const auto &window : windows) most = std::max(most, attended_floats() + window.partials.size());
        return most;
    }

    // Attention's results lie in rows, then come those of tasks with cut keys.
    size_t attended_floats() const { return (tokens * q_size * sizeof(T) + 63) / 64 * 16; }

    size_t scratch_floats() const { return std::max<size_t>(attention_scratch_floats<T>(shape), tokens * 2 * PANEL); }

    void run_layer(int64_t index) {
        const LayerSpec &layer = m.layers[index];
        T *keys = this->keys_of(index), *values = this->values_of(index);
        norm_all(layer.input_norm, normed.data());
        project_heads(layer, keys, values);
        attend(layer, keys, values);
        add_product(attended.data(), q_size, layer.output, layer.post_attention_norm);
        norm_all(layer.pre_feedforward_norm, normed.data());
        gated_product(layer.gate_up);
        add_product(gated.data(), m.intermediate_size, layer.down, layer.post_feedforward_norm);
    }

    void norm_all(const float *weight, T *out) const {
        for (int64_t t = 0; t < tokens; t++) this->norm(t, weight, out + t * m.hidden_size);
    }

    void project_heads(const LayerSpec &layer, T *keys, T *values) {
        const int64_t panels = this->head_panels(), width = head_width(), heads = this->all_heads();
        const Ranges ranges = lead->ranges(heads);
        const auto compute = [this, &layer, panels, width, ranges](int64_t head, float *out, float *) {
            for (int64_t p = 0; p < panels; p++) {
                const int64_t next = p + 1 < panels ? head * panels + p + 1 : ranges.after(head) * panels;
                linear_panel(normed.data(), m.hidden_size, (int)tokens, layer.qkv, head * panels + p, PANEL,
                             out + p * PANEL, width, Into::REPLACE, next);
            }
            for (int64_t t = 0; t < tokens; t++)
                this->make_head(layer, t, (int)head, out + t * width, (T *)(out + t * width));
        };
        lead->share(heads, tokens * width, compute, [&](int64_t head, const float *out) {
            for (int64_t t = 0; t < tokens; t++) {
                const T *row = (const T *)(out + t * width);
                if (head < shape.heads)
                    std::copy_n(row, shape.head_dim, q.data() + t * q_size + head * shape.head_dim);
                else
                    this->put_head(t, (int)head, keys, values, row);
            }
        });
    }

    void attend(const LayerSpec &layer, const T *keys, const T *values) {
        WindowTasks &window = this->window_of(layer, windows);
        const AttentionTasks &tasks = window.tasks;
        const Attention<T> attention{shape, keys, values, m.attention_scale, m.attention_soft_cap, layer.window};
        const size_t partials = attended_floats(), each = Partial::floats(shape);
        const auto compute = [this, attention, &tasks, partials](int64_t i, float *out, float *scratch) {
            run_task(attention, tasks, i, i + 1, q.data(), (T *)out, out + partials, scratch);
        };
        lead->share(tasks.all.size(), 0, compute, [&](int64_t i, const float *out) {
            const AttentionTask &task = tasks.all[i];
            if (task.split >= 0)
                std::copy_n(out + partials + task.split * each, each, window.partials.data() + task.split * each);
            else if (task.group < 0)
                copy_attended(task, task.row, task.queries.tokens, (const T *)out);
            else
                for (const Decode &member : tasks.groups[task.group].members) copy_attended(task, member.row, 1, (const T *)out);
        });
        if (window.partials.empty()) return;
        for (size_t i = 0; i < tasks.all.size(); i++) merge_splits(attention, tasks, i, window.partials.data(), attended.data());
    }

    void copy_attended(const AttentionTask &task, int64_t row, int count, const T *from) {
        const size_t width = shape.group() * shape.head_dim;
        for (int64_t t = row; t < row + count; t++) {
            const size_t at = t * q_size + task.queries.kv_head * width;
            std::copy_n(from + at, width, attended.data() + at);
        }
    }

    void add_product(const T *x, int64_t x_stride, const Matrix &matrix, const float *post_norm) {
        const int64_t panels = matrix.rows / PANEL;
        const Ranges ranges = lead->ranges(panels);
        const auto compute = [this, x, x_stride, &matrix, ranges](int64_t panel, float *out, float *) {
            linear_panel(x, x_stride, (int)tokens, matrix, panel, PANEL, out, PANEL, Into::REPLACE, ranges.after(panel));
        };
        lead->share(panels, tokens * PANEL, compute, [&](int64_t panel, const float *out) {
            const int count = (int)std::min<int64_t>(PANEL, m.hidden_size - panel * PANEL);
            for (int64_t t = 0; t < tokens; t++, out += PANEL) {
                if (post_norm)
                    std::copy_n(out, count, step.added + t * m.hidden_size + panel * PANEL);
                else
                    add_row(this->hidden(t) + panel * PANEL, out, count);
            }
        });
        for (int64_t t = 0; post_norm && t < tokens; t++) this->add_normed(t, step.added + t * m.hidden_size, post_norm);
    }

    void gated_product(const Matrix &gate_up) {
        const int64_t inner = m.intermediate_size, panels = gate_up.rows / PANEL / 2;
        const Ranges ranges = lead->ranges(panels);
        const auto compute = [this, &gate_up, panels, ranges](int64_t panel, float *out, float *both) {
            const int rows = (int)tokens;
            linear_panel(normed.data(), m.hidden_size, rows, gate_up, panel, PANEL, both, 2 * PANEL, Into::REPLACE,
                         panels + panel);
            linear_panel(normed.data(), m.hidden_size, rows, gate_up, panels + panel, PANEL, both + PANEL, 2 * PANEL,
                         Into::REPLACE, ranges.after(panel));
            for (int t = 0; t < rows; t++) {
                const float *gate = both + t * 2 * PANEL;
                gated_row(gate, gate + PANEL, PANEL, (Activation)m.activation, (T *)out + t * PANEL);
            }
        };
        lead->share(panels, tokens * PANEL, compute, [&](int64_t panel, const float *out) {
            const int count = (int)std::min<int64_t>(PANEL, inner - panel * PANEL);
            for (int64_t t = 0; t < tokens; t++)
                std::copy_n((const T *)out + t * PANEL, count, gated.data() + t * inner + panel * PANEL);
        });
    }
};

// A product alone, such as a model's head: `y[tokens][outputs]`.
template <class T>
void led_product(const Matrix &matrix, const T *x, int64_t tokens, int64_t outputs, float *y, int64_t threads) {
    // Small panels are taken several at a time.
    constexpr int64_t MOST_TASKS = 512;
    const int64_t panels = matrix.rows / PANEL, each = (panels + MOST_TASKS - 1) / MOST_TASKS;
    const int64_t count = (panels + each - 1) / each, stride = tokens * each * PANEL;
    Lead lead(threads);
    const auto rows = std::make_shared<std::vector<T>>(x, x + tokens * matrix.columns);
    lead.prepare(rows, count * stride, 0);
    const Ranges ranges = lead.ranges(count);
    const auto compute = [x = (const T *)rows->data(), tokens, matrix, panels, each, ranges](int64_t i, float *out, float *) {
        const int64_t first = i * each, last = std::min(first + each, panels);
        for (int64_t p = first; p < last; p++) {
            const int64_t next = p + 1 < last ? p + 1 : ranges.after(i) * each;
            linear_panel(x, matrix.columns, (int)tokens, matrix, p, PANEL, out + (p - first) * PANEL, each * PANEL,
                         Into::REPLACE, next);
        }
    };
    lead.share(count, stride, compute, [&](int64_t i, const float *out) {
        const int64_t first = i * each * PANEL, width = std::min(each * PANEL, outputs - first);
        for (int64_t t = 0; t < tokens; t++) std::copy_n(out + t * each * PANEL, width, y + t * outputs + first);
    });
}
