// The traced flavour: GCC calls the __tsan functions below at every access to memory, instead of ThreadSanitizer's own.
//
// Races: two threads touch a byte, at least one of them writes, and nothing orders the two. What orders them is
// __syncthreads for the threads of a block and __syncwarp for the lanes of a warp (by vector clocks); the shuffles and
// the other collectives promise no order of memory, and between the blocks of a launch there is none. So a race is
// found whatever order the fibers ran in.
//
// Traffic: bytes of global memory loaded and stored. Stacks, shared memory, parameters and constants do not count.
#include "block.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[]; // this library's own memory

namespace lt_host {

// ---- time -----------------------------------------------------------------------------------------------------------

// An epoch is what lies between two barriers; epochs are counted over all blocks and launches.
static uint32_t epoch = 1, first_of_launch = 1, first_of_block = 1;

// Within an epoch, what each thread knows of the lanes of its warp: accesses stamped with a clock up to this came
// before.
static uint32_t known[kMaxThreads][32];
static uint32_t &clock_of(const Thread &thread) { return known[thread.number][thread.lane()]; }

struct Stamp { // of an access; epoch 0: never
    uint32_t epoch = 0;
    uint32_t thread : 10, clock : 22;
    Stamp() : thread(0), clock(0) {}
};

static Stamp now() {
    Stamp stamp;
    stamp.epoch = epoch;
    stamp.thread = (unsigned)block.self->number;
    stamp.clock = clock_of(*block.self);
    return stamp;
}

// `since`: where the memory's life begins, which is first_of_block for shared memory.
static bool before_now(const Stamp &then, uint32_t since) {
    if (then.epoch < since)
        return true;
    if (then.epoch < first_of_block)
        return false; // another block of this launch
    if (then.epoch < epoch || (int)then.thread == block.self->number)
        return true;
    const bool same_warp = (int)then.thread / 32 == block.self->number / 32;
    return same_warp && then.clock <= known[block.self->number][then.thread % 32];
}

void trace_barrier() { ++epoch; }

void trace_syncwarp(unsigned mask) {
    uint32_t joined[32] = {};
    Thread *warp = &block.threads[block.self->number / 32 * 32];
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 32 && mask >> i & 1; ++j)
            joined[j] = std::max(joined[j], known[warp[i].number][j]);
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) {
            std::copy(joined, joined + 32, known[warp[i].number]);
            ++clock_of(warp[i]);
        }
}

// ---- what happened to each byte -------------------------------------------------------------------------------------

struct Cell {
    Stamp write;
    Stamp read, other_read; // the last, and an earlier one by a thread that a later writer is less likely to know of
};

static void remember_read(Cell &cell, const Stamp &stamp) {
    const Stamp &last = cell.read, &other = cell.other_read;
    const bool last_is_of_another_block = last.epoch < first_of_block;
    const bool other_is_of_another_block = other.epoch < first_of_block && other.epoch >= first_of_launch;
    const bool worth = last.thread / 32 != stamp.thread / 32 || (other.epoch < epoch && last.thread != stamp.thread);
    if (last_is_of_another_block || (!other_is_of_another_block && worth))
        cell.other_read = last;
    cell.read = stamp;
}

constexpr size_t kPage = 4096;
struct Page {
    Cell cells[kPage];
};

static Page *new_page() {
    void *memory = calloc(1, sizeof(Page));
    if (!memory)
        abort();
    return (Page *)memory;
}

static Cell *global_cell(uintptr_t address) {
    static std::unordered_map<uintptr_t, Page *> pages;
    static struct {
        uintptr_t number;
        Page *page;
    } recent[64];
    const uintptr_t number = address / kPage;
    auto &slot = recent[number % 64];
    if (slot.number != number || !slot.page) {
        Page *&page = pages[number];
        if (!page)
            page = new_page();
        slot = {number, page};
    }
    return &slot.page->cells[address % kPage];
}

static Cell shared_cells[kArena];
static bool in_flight[kArena]; // bytes that a cp.async is to bring

void trace_in_flight(void *address, size_t bytes, bool flag) {
    memset(in_flight + ((unsigned char *)address - block.arena), flag, bytes);
}

// ---- traffic --------------------------------------------------------------------------------------------------------

struct Traffic { // bytes, [0] loaded and [1] stored
    uint64_t requested[2], per_block[2], per_launch[2];
};
static std::map<std::string, Traffic> traffic_of; // by kernel
static Traffic *traffic;

void trace_launch() {
    first_of_launch = first_of_block = ++epoch;
    traffic = &traffic_of[kernel_name(block.kernel)];
}

void trace_block() {
    first_of_block = ++epoch;
    for (int t = 0; t < block.size; ++t) {
        memset(known[t], 0, sizeof known[t]);
        clock_of(block.threads[t]) = 1;
    }
    memset(in_flight, 0, sizeof in_flight);
}

// ---- accesses -------------------------------------------------------------------------------------------------------

static bool on_launching_stack(const void *p) {
    static thread_local const char *begin, *end;
    if (!begin) {
        pthread_attr_t attributes;
        void *bottom;
        size_t bytes;
        if (pthread_getattr_np(pthread_self(), &attributes) || pthread_attr_getstack(&attributes, &bottom, &bytes))
            abort();
        pthread_attr_destroy(&attributes);
        begin = (const char *)bottom;
        end = begin + bytes;
    }
    return p >= begin && p < end;
}

[[noreturn]] static void race(const void *p, bool write, const Stamp &other, bool other_wrote) {
    const SharedRange *range = shared_range(p, 1);
    char what[128];
    if (range)
        snprintf(what, sizeof what, "shared %s + %zu bytes", range->name,
                 (size_t)((const unsigned char *)p - block.arena) - range->offset);
    else
        snprintf(what, sizeof what, "global memory at %p", p);
    const uint3 index = block.threads[other.thread].index;
    fail("race: it %s %s, which thread (%u, %u, %u)%s %s with no barrier between", write ? "writes" : "reads", what,
         index.x, index.y, index.z, other.epoch < first_of_block ? " of another block" : "",
         other_wrote ? "writes" : "reads");
}

static void visit(Cell &cell, const void *p, bool write, const Stamp &stamp, uint32_t since) {
    if (!before_now(cell.write, since))
        race(p, write, cell.write, true);
    if (!write)
        return remember_read(cell, stamp);
    for (const Stamp &read : {cell.read, cell.other_read})
        if (!before_now(read, since))
            race(p, write, read, false);
    cell.write = stamp;
}

static void access(const void *p, size_t bytes, bool write) {
    if (!block.self || in_stacks(p))
        return;
    const Stamp stamp = now();
    if (in_arena(p)) {
        if (!shared_range(p, bytes))
            fail("%s %zu bytes of shared memory outside of any variable", write ? "writes" : "reads", bytes);
        const size_t offset = (size_t)((const unsigned char *)p - block.arena);
        for (size_t i = 0; i < bytes; ++i) {
            if (in_flight[offset + i])
                fail("%s shared memory that a cp.async fills, before the cp_async_wait", write ? "writes" : "reads");
            visit(shared_cells[offset + i], (const char *)p + i, write, stamp, first_of_block);
        }
        return;
    }
    if ((p >= __ehdr_start && p < _end) || on_launching_stack(p))
        return;
    traffic->requested[write] += bytes;
    for (size_t i = 0; i < bytes; ++i) {
        Cell &cell = *global_cell((uintptr_t)p + i);
        const uint32_t last = write ? cell.write.epoch : cell.read.epoch;
        traffic->per_block[write] += last < first_of_block;
        traffic->per_launch[write] += last < first_of_launch;
        visit(cell, (const char *)p + i, write, stamp, first_of_launch);
    }
}

void trace_read(const void *address, size_t bytes) { access(address, bytes, false); }
void trace_write(void *address, size_t bytes) { access(address, bytes, true); }
void copy_untraced(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

} // namespace lt_host

// Bytes of global memory that the kernels called `kernel` (all where it is null) have touched since the last reset:
// result[0..1] every access, [2..3] each byte once a block (a block's second look is served by L1 or L2), [4..5] each
// byte once a launch (what memory sees if L2 holds all that blocks share); loaded, then stored.
extern "C" __attribute__((visibility("default"))) void lt_host_traffic(const char *kernel, uint64_t result[6]) {
    std::fill(result, result + 6, 0);
    for (const auto &[name, traffic] : lt_host::traffic_of)
        if (!kernel || name == kernel)
            for (int i = 0; i < 2; ++i) {
                result[i] += traffic.requested[i];
                result[2 + i] += traffic.per_block[i];
                result[4 + i] += traffic.per_launch[i];
            }
}

extern "C" __attribute__((visibility("default"))) void lt_host_traffic_reset() {
    for (auto &entry : lt_host::traffic_of)
        entry.second = {};
}

// Names of the kernels launched since the library was opened, in one text of lines.
extern "C" __attribute__((visibility("default"))) const char *lt_host_kernels() {
    static std::string names;
    names.clear();
    for (const auto &entry : lt_host::traffic_of)
        names += entry.first + "\n";
    return names.c_str();
}

// ---- what the compiler calls ----------------------------------------------------------------------------------------

#define LT_HOOKS(n)                                                                     \
    extern "C" void __tsan_read##n(void *p) { lt_host::access(p, n, false); }           \
    extern "C" void __tsan_write##n(void *p) { lt_host::access(p, n, true); }           \
    extern "C" void __tsan_unaligned_read##n(void *p) { lt_host::access(p, n, false); } \
    extern "C" void __tsan_unaligned_write##n(void *p) { lt_host::access(p, n, true); }
LT_HOOKS(1)
LT_HOOKS(2)
LT_HOOKS(4)
LT_HOOKS(8)
LT_HOOKS(16)
extern "C" void __tsan_read_range(void *p, size_t bytes) { lt_host::access(p, bytes, false); }
extern "C" void __tsan_write_range(void *p, size_t bytes) { lt_host::access(p, bytes, true); }
extern "C" void __tsan_vptr_update(void **, void *) {}
extern "C" void __tsan_init() {}
