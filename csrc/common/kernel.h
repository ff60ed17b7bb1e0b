// What every csrc/<op>/cpu.cpp includes. Each such file is compiled once per instruction level (LT_ISA = base, avx2,
// avx512); the base build also defines the C entry point, which forwards to the best level the processor has.
//
// Nothing here may emit a symbol that two levels share: the linker would keep one copy, perhaps the one with AVX-512
// in it, and the library would die on an older machine. So all code lives in namespace lt::LT_ISA, and the files use
// no std:: templates. tests/kernels/test_native_build.py checks the object files for it.
#pragma once

#include <cstdint>

#include "leantune_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lt {

enum isa_level { ISA_BASE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

// The level in use: the processor's, or lower where LEANTUNE_ISA or lt_set_isa asked for less.
int isa_in_use();

// Remembers the message for lt_last_error() and returns the code, so that kernels can `return fail(...)`.
int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

} // namespace lt

// LT_DEFINE(rms_norm_forward, (const float *x, int64_t rows), (x, rows)) { body }
// defines lt::<level>::rms_norm_forward and, once, the C function lt_rms_norm_forward.
#if defined(LT_ENTRY_POINTS) && defined(LT_X86)
#define LT_DEFINE(name, params, args)        \
    namespace lt {                           \
    namespace base {                         \
    int name params;                         \
    }                                        \
    namespace avx2 {                         \
    int name params;                         \
    }                                        \
    namespace avx512 {                       \
    int name params;                         \
    }                                        \
    }                                        \
    extern "C" LT_API int lt_##name params { \
        switch (lt::isa_in_use()) {          \
        case lt::ISA_AVX512:                 \
            return lt::avx512::name args;    \
        case lt::ISA_AVX2:                   \
            return lt::avx2::name args;      \
        default:                             \
            return lt::base::name args;      \
        }                                    \
    }                                        \
    int lt::base::name params
#elif defined(LT_ENTRY_POINTS)
#define LT_DEFINE(name, params, args)                                      \
    namespace lt {                                                         \
    namespace base {                                                       \
    int name params;                                                       \
    }                                                                      \
    }                                                                      \
    extern "C" LT_API int lt_##name params { return lt::base::name args; } \
    int lt::base::name params
#else
#define LT_DEFINE(name, params, args) \
    namespace lt {                    \
    namespace LT_ISA {                \
    int name params;                  \
    }                                 \
    }                                 \
    int lt::LT_ISA::name params
#endif

namespace lt {
namespace LT_ISA {

// Calls f(float{}), f(bf16{}) or f(f16{}): one kernel body for every storage type.
template <class F> static inline int with_dtype(int dtype, const char *argument, F f) {
    switch (dtype) {
    case LT_F32:
        return f(float{});
    case LT_BF16:
        return f(bf16{});
    case LT_F16:
        return f(f16{});
    default:
        return fail(LT_INVALID, "%s: dtype code %d is none of LT_F32, LT_BF16, LT_F16", argument, dtype);
    }
}

} // namespace LT_ISA
} // namespace lt
