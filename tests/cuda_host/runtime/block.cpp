// Runs the blocks of a launch one after another, and the threads of a block as fibers in a chosen order.
#include "block.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"

namespace lt_host {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
Block block;

static unsigned char *stacks;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

bool in_stacks(const void *p) {
    return (const unsigned char *)p >= stacks && (const unsigned char *)p < stacks + kMaxThreads * kStack;
}

// ---- order of threads -----------------------------------------------------------------------------------------------

static uint64_t ready[kMaxThreads / 64]; // one bit a thread
enum class Order { FORWARD, REVERSE, RANDOM };
static Order order = Order::FORWARD;
static uint64_t seed = 1;

// "forward", "reverse" or "random:SEED"; false for anything else.
static bool set_order(const char *text) {
    if (!strcmp(text, "forward"))
        order = Order::FORWARD;
    else if (!strcmp(text, "reverse"))
        order = Order::REVERSE;
    else if (!strncmp(text, "random:", 7) && text[7]) {
        order = Order::RANDOM;
        seed = strtoull(text + 7, nullptr, 10) * 2 + 1;
    } else
        return false;
    return true;
}

static void set_ready(Thread &thread) {
    thread.state = State::READY;
    ready[thread.number / 64] |= 1ull << thread.number % 64;
}

static uint64_t random_bits() { // xorshift64*
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545f4914f6cdd1dull;
}

// The ready thread whose turn it is: the first, the last, or the first after a number drawn; null where none is ready.
static Thread *next_thread() {
    const int words = (block.size + 63) / 64;
    if (order == Order::REVERSE) {
        for (int w = words - 1; w >= 0; --w)
            if (ready[w])
                return &block.threads[w * 64 + 63 - __builtin_clzll(ready[w])];
        return nullptr;
    }
    const int start = order == Order::RANDOM ? (int)((random_bits() >> 32) * (uint64_t)block.size >> 32) : 0;
    for (int i = 0; i <= words; ++i) {
        const int w = (start / 64 + i) % words;
        uint64_t candidates = ready[w];
        if (i == 0)
            candidates &= ~0ull << start % 64;
        if (candidates)
            return &block.threads[w * 64 + __builtin_ctzll(candidates)];
    }
    return nullptr;
}

static void switch_to(Fiber &from, Thread *next) {
    block.self = next;
    if (next) {
        thread_index = next->index;
        ready[next->number / 64] &= ~(1ull << next->number % 64);
    }
    switch_fiber(from, next ? next->fiber : block.launcher);
    // Here again: whoever switched back has set block.self and thread_index.
}

// Lets others run. Returns when the calling thread has been made ready and its turn has come.
static void wait() {
    Thread *self = block.self;
    Thread *next = next_thread();
    if (next == self)
        ready[self->number / 64] &= ~(1ull << self->number % 64);
    else
        switch_to(self->fiber, next);
}

// ---- errors ---------------------------------------------------------------------------------------------------------

static char words[1024]; // the last launch failure
static bool failed;

static void describe(const Thread *thread, const char *format, va_list arguments) {
    int n = snprintf(words, sizeof words, "kernel %s, block (%u, %u, %u)", kernel_name(block.kernel), block_index.x,
                     block_index.y, block_index.z);
    if (thread)
        n += snprintf(words + n, sizeof words - n, ", thread (%u, %u, %u)", thread->index.x, thread->index.y,
                      thread->index.z);
    n += snprintf(words + n, sizeof words - n, ": ");
    vsnprintf(words + n, sizeof words - n, format, arguments);
    failed = true;
}

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe(block.self, format, arguments);
    va_end(arguments);
    switch_to(block.self->fiber, nullptr); // for good: the launch is over
    abort();
}

static void fail_block(const Thread &thread, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe(&thread, format, arguments);
    va_end(arguments);
}

void fail_afterwards(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe(nullptr, format, arguments);
    va_end(arguments);
}

static const char *base(const char *file) {
    const char *slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

// ---- waiting for other threads --------------------------------------------------------------------------------------

static bool same_text(const char *a, const char *b) { return a == b || !strcmp(a, b); }
static bool same_place(const Place &a, const Place &b) { return a.line == b.line && same_text(a.file, b.file); }

static int at_barrier;

void barrier(Place place) {
    block.self->place = place;
    block.self->state = State::AT_BARRIER;
    if (++at_barrier == block.size) {
        at_barrier = 0;
        for (int t = 0; t < block.size; ++t) {
            const Place &other = block.threads[t].place;
            if (!same_place(other, place))
                fail("barrier divergence: it waits at %s:%d, but thread number %d at %s:%d", base(place.file),
                     place.line, t, base(other.file), other.line);
        }
        for (int t = 0; t < block.size; ++t)
            set_ready(block.threads[t]);
        trace_barrier();
    }
    wait();
}

int lane() { return block.self->lane(); }

static bool same_collective(const Thread &a, const Thread &b) {
    return a.mask == b.mask && same_text(a.what, b.what) && same_place(a.place, b.place);
}

static unsigned in_collective[32], exited[32]; // for each warp, its lanes that are

void collective(const char *name, unsigned mask, Place place, void *operands, Complete complete) {
    Thread &self = *block.self;
    const int w = self.number / 32;
    Thread *warp = &block.threads[w * 32];
    if (!(mask >> self.lane() & 1))
        fail("%s at %s:%d: mask 0x%08x leaves out the lane that calls it, %d", name, base(place.file), place.line, mask,
             self.lane());
    if (const unsigned absent = mask & exited[w])
        fail("%s at %s:%d: mask 0x%08x names lane %d, which has exited or never was", name, base(place.file),
             place.line, mask, __builtin_ctz(absent));
    self.what = name;
    self.mask = mask;
    self.place = place;
    self.operands = operands;
    self.state = State::IN_COLLECTIVE;
    in_collective[w] |= 1u << self.lane();
    bool together = (in_collective[w] & mask) == mask;
    void *all[32] = {};
    for (int i = 0; i < 32 && together; ++i)
        if (mask >> i & 1) {
            together = same_collective(self, warp[i]);
            all[i] = warp[i].operands;
        }
    if (together) {
        if (complete)
            complete(all, mask);
        else
            trace_syncwarp(mask);
        in_collective[w] &= ~mask;
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1)
                set_ready(warp[i]);
    }
    wait();
}

static void exchange(void *const operands[32], unsigned mask) {
    uint64_t values[32];
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1)
            values[i] = ((Shuffle *)operands[i])->value;
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1))
            continue;
        Shuffle &mine = *(Shuffle *)operands[i];
        if (!(mask >> mine.source & 1))
            fail("a shuffle with mask 0x%08x: lane %d reads from lane %d, which takes no part", mask, i, mine.source);
        mine.value = values[mine.source];
    }
}

void shuffle(const char *name, unsigned mask, Place place, Shuffle &operands) {
    collective(name, mask, place, &operands, exchange);
}

static void count_votes(void *const operands[32], unsigned mask) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1)
            votes |= (unsigned)((Shuffle *)operands[i])->value << i;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1)
            ((Shuffle *)operands[i])->vote = votes;
}

unsigned vote(const char *name, unsigned mask, bool predicate, Place place) {
    Shuffle operands = {predicate, 0, 0};
    collective(name, mask, place, &operands, count_votes);
    return operands.vote;
}

// ---- one block ------------------------------------------------------------------------------------------------------

static void thread_entry() {
    entered_fiber();
    for (;;) {
        block.body(block.context);
        Thread &self = *block.self;
        if (!self.copies.empty())
            fail("it ends with %zu cp.async that no cp_async_wait has waited for", self.copies.size());
        self.state = State::DONE;
        exited[self.number / 32] |= 1u << self.lane();
        wait(); // until the next block
    }
}

static const char *occupation(const Thread &thread, char (&text)[256]) {
    switch (thread.state) {
    case State::AT_BARRIER:
        snprintf(text, sizeof text, "waits at the barrier at %s:%d", base(thread.place.file), thread.place.line);
        break;
    case State::IN_COLLECTIVE:
        snprintf(text, sizeof text, "is in %s at %s:%d with mask 0x%08x", thread.what, base(thread.place.file),
                 thread.place.line, thread.mask);
        break;
    default:
        snprintf(text, sizeof text, "has exited");
    }
    return text;
}

// Why nobody can go on: a thread that waits, and one that it waits for in vain.
static void diagnose() {
    char mine[256], theirs[256];
    for (int t = 0; t < block.size; ++t) {
        const Thread &thread = block.threads[t];
        if (thread.state != State::IN_COLLECTIVE)
            continue;
        for (int i = 0; i < 32; ++i) {
            const Thread &other = block.threads[t / 32 * 32 + i];
            if (thread.mask >> i & 1 && !(other.state == State::IN_COLLECTIVE && same_collective(thread, other)))
                return fail_block(thread, "it %s, but lane %d %s", occupation(thread, mine), i,
                                  occupation(other, theirs));
        }
    }
    const Thread *waiting = nullptr, *elsewhere = nullptr;
    for (int t = 0; t < block.size; ++t) {
        const Thread &thread = block.threads[t];
        (thread.state == State::AT_BARRIER ? waiting : elsewhere) = &thread;
    }
    fail_block(*waiting, "barrier divergence: it %s, but thread number %d %s", occupation(*waiting, mine),
               elsewhere->number, occupation(*elsewhere, theirs));
}

static bool run_block() {
    ++block.serial;
    begin_shared();
    trace_block();
    at_barrier = 0;
    for (int w = 0; w * 32 < block.size; ++w) {
        const int lanes = block.size - w * 32;
        exited[w] = lanes < 32 ? ~0u << lanes : 0;
        in_collective[w] = 0;
    }
    for (int t = 0; t < block.size; ++t) {
        block.threads[t].group = 0;
        set_ready(block.threads[t]);
    }
    switch_to(block.launcher, next_thread());
    bool stuck = false;
    for (int t = 0; t < block.size; ++t)
        stuck = stuck || block.threads[t].state != State::DONE;
    if (stuck && !failed)
        diagnose();
    end_shared();
    return !failed;
}

// ---- launches -------------------------------------------------------------------------------------------------------

static void *reserve(size_t bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        abort();
    return memory;
}

static void prepare() {
    const size_t page = 4096;
    stacks = (unsigned char *)reserve(kMaxThreads * kStack);
    for (int t = 0; t < kMaxThreads; ++t) {
        Thread &thread = block.threads[t];
        thread.number = t;
        thread.state = State::DONE;
        mprotect(stacks + t * kStack, page, PROT_NONE); // an overflow stops here
        thread.fiber.stack = stacks + t * kStack + page;
        // Tops at different offsets, so that the threads' innermost frames do not share a few sets of the cache.
        thread.fiber.stack_bytes = kStack - page - (size_t)t % 64 * 192;
        thread.fiber.restart(thread_entry);
    }
    block.arena = (unsigned char *)reserve(kArena);
    const char *text = getenv("LT_HOST_ORDER");
    if (text && !set_order(text)) {
        fprintf(stderr, "LT_HOST_ORDER=%s is not forward, reverse or random:SEED\n", text);
        abort();
    }
}

static std::map<std::string, size_t> dynamic_budgets; // bytes, by kernel

static bool last_block_alone; // of a launch: what lies at its far end is looked at without running all before it

int launch(const void *kernel, dim3 grid, dim3 size, size_t dynamic_bytes, void (*body)(const void *),
           const void *context) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    if (!block.arena)
        prepare();
    const uint64_t threads = (uint64_t)size.x * size.y * size.z;
    if (!threads || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || dynamic_bytes > kMaxShared)
        return cudaErrorInvalidConfiguration;
    const auto budget = dynamic_budgets.find(kernel_name(kernel));
    if (budget != dynamic_budgets.end() && dynamic_bytes > budget->second) {
        snprintf(words, sizeof words,
                 "kernel %s: the launch asks for %zu bytes of dynamic shared memory; its budget is %zu",
                 kernel_name(kernel), dynamic_bytes, budget->second);
        return cudaErrorLaunchFailure;
    }
    failed = false;
    block.size = (int)threads;
    block.body = body;
    block.context = context;
    block.kernel = kernel;
    block.dynamic_bytes = dynamic_bytes;
    block_size = size;
    grid_size = grid;
    for (unsigned t = 0; t < threads; ++t)
        block.threads[t].index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    trace_launch();
    const unsigned one = last_block_alone;
    for (unsigned z = one * (grid.z - 1); z < grid.z; ++z)
        for (unsigned y = one * (grid.y - 1); y < grid.y; ++y)
            for (unsigned x = one * (grid.x - 1); x < grid.x; ++x) {
                block_index = {x, y, z};
                if (!run_block()) {
                    for (unsigned t = 0; t < threads; ++t) {
                        block.threads[t].fiber.restart(thread_entry);
                        block.threads[t].copies.clear();
                    }
                    memset(ready, 0, sizeof ready);
                    return cudaErrorLaunchFailure;
                }
            }
    return cudaSuccess;
}

} // namespace lt_host

// Returns 0, or -1 for a text that is not "forward", "reverse" or "random:SEED".
extern "C" __attribute__((visibility("default"))) int lt_host_order(const char *text) {
    return lt_host::set_order(text) ? 0 : -1;
}

// Launches of `kernel` that ask for more bytes of dynamic shared memory fail from now on.
extern "C" __attribute__((visibility("default"))) void lt_host_dynamic_budget(const char *kernel, size_t bytes) {
    lt_host::dynamic_budgets[kernel] = bytes;
}

// Whether launches run their last block alone.
extern "C" __attribute__((visibility("default"))) void lt_host_last_block_alone(int yes) {
    lt_host::last_block_alone = yes;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorLaunchFailure:
        return lt_host::words;
    }
    return "unknown error";
}
