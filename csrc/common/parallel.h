// Threads. The library never links an OpenMP runtime: PyTorch ships its own, and two of them in one process fight over
// the cores. Instead it borrows the runtime that is already loaded (PyTorch's where PyTorch is, else found by name;
// called through GOMP_parallel, which libgomp, libiomp5 and libomp all export), and without one it uses a small pool of
// its own that sleeps when idle.
#pragma once

#include <cstdint>

namespace lt {

typedef void (*chunk_body)(void *context, int64_t chunk, int thread);

// Runs body for every chunk in [0, chunks), on several threads, each chunk once. Which thread takes which chunk varies;
// what a chunk computes may depend on its number only, so that results are the same for any number of threads.
void parallel_chunks(int64_t chunks, chunk_body body, void *context);

// Threads that parallel_chunks may use now; thread numbers given to bodies are below it.
int max_threads();

// One aligned block of at least `bytes`, kept for the calling thread and reused by later calls (contents undefined).
// Kernels take scratch through it so that the steady state allocates nothing. Null when memory is short.
void *thread_scratch(int64_t bytes);

} // namespace lt

namespace lt {
namespace LT_ISA {

// parallel_for(rows, 64, [&](int64_t begin, int64_t end, int thread) {...}): pieces of `grain` items.
template <class F> static inline void parallel_for(int64_t items, int64_t grain, F f) {
    struct context {
        F *f;
        int64_t items, grain;
    } c = {&f, items, grain};
    const int64_t chunks = grain > 0 ? (items + grain - 1) / grain : 0;
    parallel_chunks(
        chunks,
        [](void *p, int64_t chunk, int thread) {
            context *c = static_cast<context *>(p);
            const int64_t begin = chunk * c->grain;
            const int64_t end = begin + c->grain < c->items ? begin + c->grain : c->items;
            (*c->f)(begin, end, thread);
        },
        &c);
}

} // namespace LT_ISA
} // namespace lt
