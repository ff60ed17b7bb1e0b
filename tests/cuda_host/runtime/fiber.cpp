#include "fiber.h"

#include <cstdint>
#include <cstring>

#if defined(LT_HOST_SWITCH)
// Saves what the ABI says a call preserves, then does the same backwards on the other stack. (The control words of the
// floating-point units are those of the launch throughout.)
extern "C" void lt_host_switch(void **save, void *load);
asm(R"(
    .text
    .p2align 4
    .globl lt_host_switch
    .hidden lt_host_switch
    .type lt_host_switch, @function
lt_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size lt_host_switch, .-lt_host_switch
)");
#endif

namespace lt_host {

void Fiber::restart(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_bytes); // left by frames that never returned
#endif
#if defined(LT_HOST_SWITCH)
    constexpr int kRegisters = 6;
    uintptr_t *top = (uintptr_t *)(stack + stack_bytes) - 1; // at `entry` the stack is as after a call
    *--top = (uintptr_t)entry;
    memset(top -= kRegisters, 0, kRegisters * sizeof *top);
    saved = top;
#else
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = stack_bytes;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
static const void *launcher_stack; // of the thread that launched; the sanitizer tells it when it is left
static size_t launcher_stack_bytes;
static bool leaving_launcher;

void entered_fiber() {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (leaving_launcher) {
        launcher_stack = bottom;
        launcher_stack_bytes = bytes;
    }
}
#else
void entered_fiber() {}
#endif

void switch_fiber(Fiber &from, Fiber &to) {
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack;
    leaving_launcher = !from.stack;
    __sanitizer_start_switch_fiber(&fake_stack, to.stack ? to.stack : launcher_stack,
                                   to.stack ? to.stack_bytes : launcher_stack_bytes);
#endif
#if defined(LT_HOST_SWITCH)
    lt_host_switch(&from.saved, to.saved);
#else
    swapcontext(&from.saved, &to.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    if (leaving_launcher) {
        launcher_stack = bottom;
        launcher_stack_bytes = bytes;
    }
#endif
}

} // namespace lt_host
