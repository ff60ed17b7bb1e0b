// What is kept for the backward pass, in bf16 and back. (In 8 bits it goes through int8_quantise and int8_dequantise.)
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kElementsPerChunk = 32768;

template <class T, class U> void convert(const T *x, U *y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(x + i);
        prefetch(y + i);
        store(y + i, load(x + i));
    }
    for (; i < n; ++i)
        narrow(widen(x[i]), y + i);
}

template <class T, class U>
void convert_rows(const T *x, int64_t x_stride, U *y, int64_t y_stride, int64_t rows, int64_t cols) {
    const int64_t per_chunk = kElementsPerChunk / (cols > 0 ? cols : 1) + 1;
    parallel_for(rows, per_chunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row)
            convert(x + row * x_stride, y + row * y_stride, cols);
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(pack_bf16, (int dtype, const void *x, int64_t x_stride, void *packed, int64_t rows, int64_t cols),
          (dtype, x, x_stride, packed, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        convert_rows(static_cast<const decltype(t) *>(x), x_stride, static_cast<bf16 *>(packed), cols, rows, cols);
        return (int)LT_OK;
    });
}

LT_DEFINE(unpack_bf16, (const void *packed, int dtype, void *out, int64_t out_stride, int64_t rows, int64_t cols),
          (packed, dtype, out, out_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "out", [&](auto t) {
        convert_rows(static_cast<const bf16 *>(packed), cols, static_cast<decltype(t) *>(out), out_stride, rows, cols);
        return (int)LT_OK;
    });
}
