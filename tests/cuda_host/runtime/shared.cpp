// Shared memory of the block that runs: variables lie in an arena between guards, filled with NaN when first seen.
#include "block.h"

#if !defined(__SANITIZE_ADDRESS__)
static void __asan_poison_memory_region(const void *, size_t) {}
static void __asan_unpoison_memory_region(const void *, size_t) {}
constexpr bool kGuardsAreReadable = true;
#else
constexpr bool kGuardsAreReadable = false;
#endif

namespace lt_host {

static unsigned char *add_variable(const char *name, size_t bytes) {
    unsigned char *address = block.arena + block.arena_used;
    const size_t guarded = (bytes + 15) / 16 * 16 + kGuard;
    __asan_unpoison_memory_region(address, guarded);
    memset(address, kPoison, bytes);
    memset(address + bytes, kGuardByte, guarded - bytes);
    __asan_poison_memory_region(address + bytes, guarded - bytes);
    block.ranges.push_back({name, block.arena_used, bytes});
    block.arena_used += guarded;
    return address;
}

void begin_shared() {
    __asan_unpoison_memory_region(block.arena, kGuard);
    memset(block.arena, kGuardByte, kGuard);
    __asan_poison_memory_region(block.arena, kArena);
    block.ranges.clear();
    block.arena_used = kGuard;
    block.static_bytes = 0;
    add_variable("dynamic shared memory", block.dynamic_bytes);
}

void *shared(SharedVariable &variable) {
    if (variable.block == block.serial)
        return variable.address;
    block.static_bytes += (variable.bytes + 15) / 16 * 16;
    if (block.static_bytes > kStaticShared)
        fail("%zu bytes of static shared memory, with %s; at most %zu", block.static_bytes, variable.name,
             kStaticShared);
    if (block.static_bytes + block.dynamic_bytes > kMaxShared)
        fail("%zu bytes of shared memory; sm_80 has %zu a block", block.static_bytes + block.dynamic_bytes, kMaxShared);
    variable.block = block.serial;
    return variable.address = add_variable(variable.name, variable.bytes);
}

unsigned char *dynamic_shared() {
    if (!block.dynamic_bytes)
        fail("uses dynamic shared memory, but the launch gave none");
    return block.arena + kGuard;
}

const SharedRange *shared_range(const void *p, size_t bytes) {
    if (!in_arena(p))
        return nullptr;
    const size_t offset = (const unsigned char *)p - block.arena;
    for (const SharedRange &range : block.ranges)
        if (offset >= range.offset && offset + bytes <= range.offset + range.bytes)
            return &range;
    return nullptr;
}

static bool intact(const unsigned char *guard, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
        if (guard[i] != kGuardByte)
            return false;
    return true;
}

void end_shared() {
    if (!kGuardsAreReadable)
        return;
    size_t guard = 0; // where the one before a variable begins
    for (const SharedRange &range : block.ranges) {
        const size_t end = range.offset + range.bytes;
        if (!intact(block.arena + guard, range.offset - guard) || !intact(block.arena + end, kGuard))
            return fail_afterwards("bytes next to %s, outside of any shared variable, were written", range.name);
        guard = end;
    }
}

void misaligned(const void *address, size_t bytes) {
    fail("%p is not aligned for an access of %zu bytes", address, bytes);
}

} // namespace lt_host
