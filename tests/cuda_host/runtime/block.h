// A launch as the parts of the emulator see it.
#pragma once

#include <vector>

#include "cuda_host.h"
#include "fiber.h"

namespace lt_host {

constexpr int kMaxThreads = 1024;
constexpr size_t kStaticShared = 48 << 10; // nvcc refuses more in one kernel
constexpr size_t kMaxShared = 163 << 10;   // what a block may use on sm_80, the least of the three architectures
constexpr size_t kGuard = 64;              // bytes between two shared variables
constexpr size_t kArena = 512 << 10;       // all variables of a block and the guards between them
constexpr unsigned char kPoison = 0xff;    // every float of such bytes is NaN
constexpr unsigned char kGuardByte = 0xa5;

struct Copy { // cp.async under way
    unsigned char *to;
    const unsigned char *from;
    bool valid;
    int group;
};

enum class State : uint8_t { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Thread {
    Fiber fiber;
    int number;
    uint3 index;
    State state;
    Place place; // where it waits
    // the collective that it waits in
    const char *what;
    unsigned mask;
    void *operands;
    // asynchronous copies
    std::vector<Copy> copies;
    int group; // of the next copy

    int lane() const { return number % 32; }
};

struct SharedRange {
    const char *name;
    size_t offset, bytes;
};

struct Block {
    Thread threads[kMaxThreads];
    int size;     // number of threads
    Thread *self; // the one that runs
    Fiber launcher;
    void (*body)(const void *context);
    const void *context;
    const void *kernel;
    uint64_t serial; // of the block, over all launches
    unsigned char *arena;
    size_t arena_used;
    size_t static_bytes, dynamic_bytes;
    std::vector<SharedRange> ranges; // the shared variables that the block has touched, by offset
};
extern Block block;

inline bool in_arena(const void *p) {
    const unsigned char *address = (const unsigned char *)p;
    return address >= block.arena && address < block.arena + kArena;
}
void begin_shared(); // runtime/shared.cpp
void end_shared();
void fail_afterwards(const char *format, ...) __attribute__((format(printf, 1, 2))); // as fail, outside of any thread

// The shared variable that holds all of the bytes; null where none does.
const SharedRange *shared_range(const void *p, size_t bytes);
bool in_stacks(const void *p);

const char *kernel_name(const void *kernel); // without template arguments; runtime/names.cpp

// runtime/trace.cpp; nothing in the other flavours
#if defined(LT_HOST_TRACED)
void trace_launch();
void trace_block();
void trace_barrier();
void trace_syncwarp(unsigned mask);
void trace_in_flight(void *address, size_t bytes, bool in_flight);
#else
inline void trace_launch() {}
inline void trace_block() {}
inline void trace_barrier() {}
inline void trace_syncwarp(unsigned) {}
inline void trace_in_flight(void *, size_t, bool) {}
inline void trace_read(const void *, size_t) {}
inline void trace_write(void *, size_t) {}
#endif

} // namespace lt_host
