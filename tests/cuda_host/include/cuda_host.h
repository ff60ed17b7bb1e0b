// The emulator as the CUDA sources see it. The threads of a block are fibers that run one at a time; each runs until it
// must wait (a barrier, a warp's collective, the end), then another is chosen. See runtime/block.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace lt_host {

// A place in the kernel's source. As a default argument, here() is where the caller calls.
struct Place {
    const char *file;
    int line;
    static constexpr Place here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Thread; // runtime/block.h

extern uint3 thread_index, block_index; // of the thread that runs now
extern dim3 block_size, grid_size;

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

int lane();
void barrier(Place place);

// Waits until every lane of `mask` has called it with the same `name`, mask and place; then `complete` runs once, on
// the operands that the lanes gave.
typedef void (*Complete)(void *const operands[32], unsigned mask);
void collective(const char *name, unsigned mask, Place place, void *operands, Complete complete);

// ---- shuffles and votes ---------------------------------------------------------------------------------------------

struct Shuffle {
    uint64_t value;
    int source;
    unsigned vote;
};
void shuffle(const char *name, unsigned mask, Place place, Shuffle &operands);
unsigned vote(const char *name, unsigned mask, bool predicate, Place place); // the lanes whose predicate holds

template <class T> T shuffled(const char *name, unsigned mask, T value, int source, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffle operands = {0, source, 0};
    memcpy(&operands.value, &value, sizeof value);
    shuffle(name, mask, place, operands);
    memcpy(&value, &operands.value, sizeof value);
    return value;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// One static shared variable of one kernel (or function that kernels call): where it lies in the block that runs now.
struct SharedVariable {
    size_t bytes;
    const char *name;
    uint64_t block; // serial number of the block that `address` belongs to
    unsigned char *address;
};
void *shared(SharedVariable &variable);
unsigned char *dynamic_shared();

// An access of `bytes` at once, which must lie at a multiple of its size.
void misaligned(const void *address, size_t bytes);
#if defined(LT_HOST_TRACED)
void trace_read(const void *address, size_t bytes);
void trace_write(void *address, size_t bytes);
void copy_untraced(void *to, const void *from, size_t bytes);
template <class W> W load(const W *p) {
    if ((uintptr_t)p % sizeof(W))
        misaligned(p, sizeof(W));
    W word;
    trace_read(p, sizeof(W));
    copy_untraced(&word, p, sizeof(W));
    return word;
}
template <class W> void store(W *p, const W &word) {
    if ((uintptr_t)p % sizeof(W))
        misaligned(p, sizeof(W));
    trace_write(p, sizeof(W));
    copy_untraced(p, &word, sizeof(W));
}
#else
template <class W> W load(const W *p) {
    if ((uintptr_t)p % sizeof(W))
        misaligned(p, sizeof(W));
    return *p;
}
template <class W> void store(W *p, const W &word) {
    if ((uintptr_t)p % sizeof(W))
        misaligned(p, sizeof(W));
    *p = word;
}
#endif

// ---- tensor cores and asynchronous copies (csrc/common/cuda_mma.cuh) ------------------------------------------------

enum class Element { F16, BF16 };
void mma_16816(Element type, float d[4], const uint32_t a[4], const uint32_t b[2], Place place);
void mma_tf32_1688(float d[4], const uint32_t a[4], const uint32_t b[2], Place place);
void ldmatrix(const char *name, int matrices, bool transposed, uint32_t *r, const void *shared, Place place);
void cp_async_16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

// ---- launches -------------------------------------------------------------------------------------------------------

// Calls thread(context) for each thread of each block; 0 or a cudaError_t, whose words cudaGetErrorString has.
int launch(const void *kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*thread)(const void *),
           const void *context);

template <class F> int launch(const void *kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const F &thread) {
    return launch(kernel, grid, block, dynamic_shared_bytes, [](const void *f) { (*(const F *)f)(); }, &thread);
}

} // namespace lt_host

// The variable is found by the address of its static record, as each instantiation of a function has its own.
#define LT_SHARED(type, name)                                                           \
    static ::lt_host::SharedVariable name##_record = {sizeof(type), #name, 0, nullptr}; \
    auto &name = *static_cast<std::remove_reference_t<type> *>(::lt_host::shared(name##_record))
#define LT_DYNAMIC_SHARED(name) unsigned char *const name = ::lt_host::dynamic_shared()
