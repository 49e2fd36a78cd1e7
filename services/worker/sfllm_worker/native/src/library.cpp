// The functions that Python calls. Each returns 0, or 1 when memory ran out.

#include "decoder.h"
#include "sampling.h"

namespace {

template <class T> void decoder_step(const ModelSpec &model, const KVSpec &kv, const StepSpec &step) {
    DecoderStep<T> run(model, kv, step);
#pragma omp parallel num_threads((int)step.threads)
    run.run();
}

template <class T> void linear(const Matrix &matrix, const T *x, int64_t tokens, float *y, int64_t threads) {
    std::vector<uint32_t> packed(packed_words<T>(tokens, matrix.columns));
#pragma omp parallel num_threads((int)threads)
    product(share_tokens(x, matrix.columns, tokens, matrix.columns, packed.data()), matrix, y, matrix.rows,
            Into::REPLACE, threads);
}

template <class T> void attend(const AttentionSpec &spec, const StepSpec &step) {
    const Shape shape{(int)spec.heads, (int)spec.kv_heads, (int)spec.head_dim, (int)spec.block_size};
    const Attention<T> attention{shape,      (const T *)spec.keys, (const T *)spec.values,
                                 spec.scale, spec.soft_cap,        spec.window};
    const auto tasks = attention_tasks(step, shape, spec.window);
    std::vector<float> partials(partial_floats(tasks, shape));
    const Scratch scratch(step.threads, attention_scratch_floats<T>(shape));
#pragma omp parallel num_threads((int)step.threads)
    run_attention(attention, tasks, partials.empty() ? nullptr : partials.data(), (const T *)spec.queries,
                  (T *)spec.result, scratch.mine());
}

template <class Call> int guarded(Call call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace

extern "C" {

// The sizes of the structures in the order of structures.py, so that a mismatch is found at load.
int64_t sfllm_structure_size(int64_t index) {
    const int64_t sizes[] = {sizeof(Matrix), sizeof(LayerSpec), sizeof(ModelSpec),    sizeof(RotationSpec),
                             sizeof(KVSpec), sizeof(StepSpec),  sizeof(AttentionSpec),
                             sizeof(SampleSpec)};
    return index < (int64_t)(sizeof sizes / sizeof *sizes) ? sizes[index] : -1;
}

// From how many tokens on products of this element type go through matrix tiles, 0 if never. There a row may
// round differently from one that is computed with fewer others.
int64_t sfllm_tiles_from(int64_t element_type) {
    return element_type == BFLOAT16 && amx::serves(amx::FEWEST_TOKENS, amx::DEPTH) ? amx::FEWEST_TOKENS : 0;
}

int sfllm_decoder_step(const ModelSpec *model, const KVSpec *kv, const StepSpec *step) {
    return guarded([&] {
        if (model->element_type == BFLOAT16)
            decoder_step<bf16>(*model, *kv, *step);
        else
            decoder_step<float>(*model, *kv, *step);
    });
}

// `y[tokens][rows] = x[tokens][columns]` times `matrix`, in float32.
int sfllm_linear(int64_t element_type, const Matrix *matrix, const void *x, int64_t tokens, float *y,
                 int64_t threads) {
    return guarded([&] {
        if (element_type == BFLOAT16)
            linear(*matrix, (const bf16 *)x, tokens, y, threads);
        else
            linear(*matrix, (const float *)x, tokens, y, threads);
    });
}

int sfllm_attend(const AttentionSpec *spec, const StepSpec *step) {
    return guarded([&] {
        if (spec->element_type == BFLOAT16)
            attend<bf16>(*spec, *step);
        else
            attend<float>(*spec, *step);
    });
}

// A token for each row of logits, which are overwritten. `sound` says whether a row had one to give.
int sfllm_sample(float *logits, int64_t rows, int64_t size, const SampleSpec *specs, int64_t *tokens,
                 uint8_t *sound, int64_t threads) {
    return guarded([&] {
        // Small rows are not worth waking a thread.
        if (rows * size < 1 << 16) threads = 1;
        const Scratch scratch(threads, RandomToken::scratch_floats(size));
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
        for (int64_t i = 0; i < rows; i++)
            sound[i] = sample_row(logits + i * size, size, specs[i], scratch.mine(), tokens[i]);
    });
}

// Rows one by one, as the step does it inside; `y[tokens][size]`.
void sfllm_norm(const float *x, const float *weight, float eps, int64_t tokens, int64_t size, float *y) {
    for (int64_t t = 0; t < tokens; t++) norm_row(x + t * size, weight, eps, (int)size, y + t * size);
}

// `x[tokens][2 * size]`: gates, then what they are multiplied by.
void sfllm_gated(const float *x, int64_t activation, int64_t tokens, int64_t size, float *y) {
    for (int64_t t = 0; t < tokens; t++)
        gated_row(x + 2 * t * size, x + (2 * t + 1) * size, (int)size, (Activation)activation, y + t * size);
}
}
