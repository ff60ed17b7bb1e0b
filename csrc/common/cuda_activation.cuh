// Activations and their slopes on CUDA, by the formulas of activation.h, and how elementwise kernels share out a
// matrix.
#pragma once

#include "cuda_kernel.cuh"

namespace lt_cuda {

// s(z) = 1 / (1 + e^-z), and its complement 1 - s.
struct Share {
    float s, rest;
};
__device__ inline Share logistic(float z) {
    const float e = __expf(-fabsf(z)), r = __fdividef(1.0f, 1.0f + e);
    return z > 0.0f ? Share{r, e * r} : Share{e * r, r};
}

// Phi(x), the normal distribution function, and e^(-x^2 / 2); the polynomial is explained in activation.h.
struct Normal {
    float phi, gauss;
};
__device__ inline Normal normal_distribution(float x) {
    const float size = fabsf(x), a = size > 13.285f ? 13.285f : size; // NaN stays NaN
    const float gauss = __expf(-0.5f * a * a);
    const float t = __fdividef(1.0f, fmaf(0.34f, a, 1.0f)), u = t - 0.5f;
    float p = -0.026471851f;
    p = fmaf(p, u, 0.03526252f);
    p = fmaf(p, u, 0.03230798f);
    p = fmaf(p, u, -0.06772998f);
    p = fmaf(p, u, -0.06747644f);
    p = fmaf(p, u, 0.10799363f);
    p = fmaf(p, u, 0.29794392f);
    p = fmaf(p, u, 0.3410649f);
    p = fmaf(p, u, 0.24713932f);
    const float tail = gauss * (p * t);
    return {x > 0.0f ? 1.0f - tail : tail, gauss};
}

struct ValueSlope { // act(x) and act'(x)
    float value, slope;
};

// f(function) with the function float -> ValueSlope of the activation's code; the choice is the same for all threads.
template <class F> __device__ inline void with_activation(int activation, F f) {
    if (activation == LT_GELU)
        f([](float x) {
            const Normal n = normal_distribution(x);
            return ValueSlope{x * n.phi, n.phi + x * n.gauss * 0.3989422804014327f};
        });
    else if (activation == LT_GELU_TANH) // (1 + tanh(z / 2)) / 2 = logistic(z)
        f([](float x) {
            const Share l = logistic(x * (1.5957691216057308f + 0.07135481627260025f * x * x));
            const float value = x * l.s;
            return ValueSlope{value, l.s + value * l.rest * (1.5957691216057308f + 0.21406444881780076f * x * x)};
        });
    else
        f([](float x) {
            const Share l = logistic(x);
            const float value = x * l.s;
            return ValueSlope{value, l.s + value * l.rest};
        });
}

inline bool known_activation(int activation) {
    return activation == LT_SILU || activation == LT_GELU || activation == LT_GELU_TANH;
}

// ---- elementwise kernels: a block takes kSpan vectors of a row; the grid is (spans of a row, rows, looped over)

constexpr int kSpan = 256;

struct Matrix {
    const void *data; // null: absent
    int64_t stride;
};

// f(T{}, std::integral_constant<int, N>{}) for the storage type and the number of elements that one access takes. A
// matrix whose rows, and those of all others, follow one another becomes one row: rows and cols are changed.
template <int COUNT, class F>
int elementwise(int dtype, const Matrix (&matrices)[COUNT], int64_t &rows, int64_t &cols, F f) {
    bool in_one_piece = true;
    for (const Matrix &m : matrices)
        in_one_piece = in_one_piece && (!m.data || m.stride == cols || rows == 1);
    if (in_one_piece) {
        cols *= rows;
        rows = 1;
    }
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        bool aligned = cols % kVector<T> == 0;
        for (const Matrix &m : matrices)
            aligned = aligned && aligned16(m.data, rows > 1 ? m.stride * (int64_t)sizeof(T) : 0);
        return aligned ? f(t, std::integral_constant<int, kVector<T>>{}) : f(t, std::integral_constant<int, 1>{});
    });
}

template <int N> inline dim3 elementwise_grid(int64_t rows, int64_t cols) {
    return dim3((unsigned)ceil_div(cols, (int64_t)kSpan * N), (unsigned)std::min<int64_t>(rows, 65535));
}

// f(row, col) for each of this thread's vectors.
template <int N, class F> __device__ inline void for_vectors(int64_t rows, int64_t cols, F f) {
    const int64_t col = ((int64_t)blockIdx.x * kSpan + threadIdx.x) * N;
    if (col < cols)
        for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
            f(row, col);
}

} // namespace lt_cuda
