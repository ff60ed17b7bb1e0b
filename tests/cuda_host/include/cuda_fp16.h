// __half on the host: storage and conversions.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
typedef __half half;

inline float __half2float(__half x) { return (float)lt_bits<_Float16>(x.bits); }
inline __half __float2half_rn(float x) { return {lt_bits<uint16_t>((_Float16)x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
