// Working memory of the threads of a team, kept from step to step by the thread that calls them.

#pragma once

#include <omp.h>

#include <cstdlib>
#include <new>

class Scratch {
  public:
    // At least `floats` floats for each thread. Throws std::bad_alloc, which must not happen inside a team.
    Scratch(int64_t threads, size_t floats) : stride((floats + 15) / 16 * 16), memory(grown(threads * stride)) {}

    // The calling thread's part, aligned to a cache line.
    float *mine() const { return memory + omp_get_thread_num() * stride; }

  private:
    const size_t stride;
    float *const memory;

    static float *grown(size_t floats) {
        struct Memory {
            float *data = nullptr;
            size_t size = 0;
            ~Memory() { free(data); }
        };
        thread_local Memory memory;
        if (memory.size < floats) {
            free(memory.data);
            memory.size = 0;
            memory.data = (float *)aligned_alloc(64, floats * sizeof(float));
            if (!memory.data) throw std::bad_alloc();
            memory.size = floats;
        }
        return memory.data;
    }
};
