// Contexts to switch between: some nanoseconds each on x86-64, through ucontext on other machines.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(LT_HOST_UCONTEXT)
#define LT_HOST_SWITCH // our own
#else
#include <ucontext.h>
#endif

namespace lt_host {

struct Fiber {
    unsigned char *stack = nullptr; // null: the context of the launching thread
    size_t stack_bytes = 0;
#if defined(LT_HOST_SWITCH)
    void *saved = nullptr; // its stack pointer while another runs
#else
    ucontext_t saved;
#endif

    // The next switch to it calls `entry`, which must never return. What it ran before is forgotten.
    void restart(void (*entry)());
};

void switch_fiber(Fiber &from, Fiber &to);
void entered_fiber(); // the first thing that `entry` calls

} // namespace lt_host
